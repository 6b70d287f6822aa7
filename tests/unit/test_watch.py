"""The live screen: always the size asked for, readable in black and white, what matters always on it."""

import ast
import io
from pathlib import Path
from types import ModuleType

import pytest
from msgspec.structs import replace
from rich.console import Console
from status_examples import BIG, EXAMPLES, FINISHED, HELD, RUNNING, T0

from fleetlift.cli.watch import EVENT_SIGNS, figure, render, spark, stopwatch
from fleetlift.core import decide, requests, round
from fleetlift.core.migration import Phase, Verdict, WavePhase
from fleetlift.core.status import MigrationStatus, from_document, to_document
from fleetlift.migrate import controller

SIZES = [(80, 24), (100, 30), (120, 40), (200, 50), (40, 8), (60, 15), (130, 12)]


def shown(status: MigrationStatus, width: int, height: int) -> str:
    """The screen as plain text, every colour taken away."""
    console = Console(width=width, height=height, file=io.StringIO(), record=True, highlight=False)
    console.print(render(status, width, height))
    return console.export_text(styles=False)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_screen_is_exactly_as_large_as_the_terminal(name: str, width: int, height: int) -> None:
    """No line wraps and none is missing, whatever the terminal and the migration."""
    lines = shown(EXAMPLES[name], width, height).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert EXAMPLES[name].name[:8] in lines[0]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (160, 45)])
def test_what_matters_is_on_it(width: int, height: int) -> None:
    """Step and wave, devices by side, rates, each gate with figure and limit, the last event."""
    text = shown(RUNNING, width, height)
    for part in (
        "▶ running",
        "telemetry → new, wave 5 of 6 (50%, 14 devices)",
        "◷ baking 2.5 s of 4.0 s",
        "1:35 gone",
        "about 1:44 left",
        "both 29",
        "new 28",
        "telemetry.completeness >= 99.99%",
        "limit 99.99 %",
        "82 ms",
        "151/s",
        "old 310 ms",
        "14 of 14 devices were seen",
    ):
        assert part in text, part


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (160, 45)])
def test_a_breach_says_why_with_the_figures_and_without_colour(width: int, height: int) -> None:
    """The gate that went wrong comes first, with mark, figure and reason; the wave shows its return."""
    text = shown(HELD, width, height)
    assert "! held" in text and "✗ revert" in text and "97.4 %" in text
    assert "↩" in text and "97.4 % of 4,204 messages arrived" in text
    assert text.index("✗ revert") < text.index("✓ advance")


def test_gates_that_do_not_hold_are_never_the_ones_left_out() -> None:
    """With more gates than lines, those that hold give way."""
    many = replace(
        HELD, gates=(*(replace(RUNNING.gates[2], gate=f"extra.{n} == 0") for n in range(30)), HELD.gates[0])
    )
    text = shown(many, 80, 24)
    assert "✗ revert" in text and "more that hold" in text


def test_a_gate_that_is_not_decided_looks_neither_like_a_breach_nor_like_missing_data() -> None:
    """By sign and by word, not by colour alone."""
    gate = replace(RUNNING.gates[0], verdict=Verdict.HOLD, undecided=True, why="needs 110 more commands")
    text = shown(replace(RUNNING, gates=(gate, HELD.gates[1])), 100, 30)
    assert "◷ not yet" in text and "needs 110 more commands" in text
    assert "! hold" in text and "no data" in text and "✗" not in text


def test_many_stragglers_are_counted_and_where_to_read_them_is_said() -> None:
    text = shown(BIG, 100, 40)
    assert "stragglers 1,840" in text and "fleetlift migrate devices connect-to-fleetlift" in text


def test_an_end_is_said_and_the_clock_stands() -> None:
    text = shown(replace(FINISHED, now=T0 + 5000), 80, 24)
    assert "✓ finished" in text and "1:35 in all" in text and "left" not in text.splitlines()[0]


def test_a_silent_controller_is_noticed() -> None:
    assert "silent for 1 min 40 s" in shown(replace(RUNNING, controller_seen_at=T0 - 100), 80, 24)


def test_approval_names_the_command_to_give() -> None:
    waiting = replace(RUNNING, wave_phase=WavePhase.AWAITING_APPROVAL)
    assert "fleetlift migrate approve connect-to-fleetlift" in shown(waiting, 120, 30)
    assert "fleetlift migrate approve connect-to-fleetlift" in shown(waiting, 80, 30)


def test_every_phase_and_wave_phase_can_be_shown() -> None:
    for phase in Phase:
        for wave_phase in WavePhase:
            assert phase.value in shown(replace(RUNNING, phase=phase, wave_phase=wave_phase), 80, 24)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_status_survives_its_way_over_the_wire(name: str) -> None:
    """Moments travel as RFC 3339 in UTC and come back to the millisecond."""
    document = to_document(EXAMPLES[name])
    assert document["started_at"].endswith("Z")
    assert to_document(from_document(document)) == document


def test_figures_are_short_and_carry_their_unit() -> None:
    assert figure(None, "%") == "–"
    assert figure(99.9912, "%") == "99.991 %"
    assert figure(100.0, "%") == "100 %"
    assert figure(0.25, "s") == "250 ms"
    assert figure(75.0, "s") == "1 min 15 s"
    assert figure(3.0, "") == "3"
    assert stopwatch(59.6) == "1:00" and stopwatch(3700) == "1 h 01 min"


def noted_kinds(module: ModuleType) -> set[str]:
    """Every kind of audit line that the module's code notes down."""
    kinds: set[str] = set()
    for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text())):
        if not isinstance(node, ast.Call):
            continue
        named = [k.value for k in node.keywords if k.arg == "kind"]
        notes = isinstance(node.func, ast.Attribute) and node.func.attr in ("note", "note_devices")
        for value in (*named, *(node.args[:1] if notes else [])):
            constants = [c.value for c in ast.walk(value) if isinstance(c, ast.Constant)]
            kinds |= {c for c in constants if isinstance(c, str)}
    return kinds


def test_every_kind_of_event_that_is_noted_has_a_mark() -> None:
    """A new kind of audit line must be given its sign on the screen."""
    noted = set[str]().union(*map(noted_kinds, (decide, requests, round, controller)))
    assert "gate_breached" in noted and noted <= set(EVENT_SIGNS), noted - set(EVENT_SIGNS)


def test_sparks_stand_on_their_ground_and_stay_in_their_field() -> None:
    """Nothing measured is blank, nought is the lowest line, the top fills the height."""
    assert spark([None, 0.0, 4.0, 8.0, 99.0], 5, 1, 8.0) == [" ▁▄██"]
    assert spark([8.0], 3, 2, 8.0) == ["  █", "  █"]
    assert spark([1.0], 1, 1, 0.0) == ["▁"]
