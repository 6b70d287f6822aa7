"""The live screen of a tenant's move: always the size asked for, readable in black and white."""

import io

import pytest
from move_examples import BACK, EXAMPLES, FINISHED, FRESH, HELD, NAMES, RUNNING, T0, steps
from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from fleetlift.cli.screen import SIGNS
from fleetlift.cli.tenant_watch import MARKS, render, snapshot
from fleetlift.core.migration import Phase
from fleetlift.core.status import EventLine
from fleetlift.core.tenant.move import StepPhase
from fleetlift.core.tenant.status import MoveStatus, from_document, to_document

SIZES = [(80, 24), (100, 30), (120, 40), (200, 50), (40, 8), (60, 15), (130, 12), (45, 60)]


def lines_of(status: MoveStatus, width: int, height: int) -> list[Text]:
    return [text for text in render(status, width, height).renderables if isinstance(text, Text)]


def shown(status: MoveStatus, width: int = 120, height: int = 45) -> str:
    """The screen as plain text, every colour taken away."""
    console = Console(width=width, height=height, file=io.StringIO(), record=True, highlight=False)
    console.print(render(status, width, height))
    return console.export_text(styles=False)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_screen_is_exactly_as_large_as_the_terminal(name: str, width: int, height: int) -> None:
    """No line wraps and none is missing, whatever the terminal and the move."""
    lines = lines_of(EXAMPLES[name], width, height)
    assert len(lines) == height
    assert all(line.cell_len <= width and "\n" not in line.plain for line in lines)
    printed = shown(EXAMPLES[name], width, height).splitlines()
    assert len(printed) <= height and all(len(line) <= width for line in printed)
    assert EXAMPLES[name].name[:8] in printed[0]


@pytest.mark.parametrize("size", [(0, 0), (1, 1), (39, 7)])
def test_a_terminal_that_is_too_small_gets_the_smallest_screen(size: tuple[int, int]) -> None:
    lines = lines_of(RUNNING, *size)
    assert len(lines) == 8 and max(line.cell_len for line in lines) <= 40


def test_what_matters_is_on_it() -> None:
    """Each step, what the open one says with its figures, the way back, the stream, who is where, gates."""
    text = shown(RUNNING)
    for part in (
        *NAMES,
        *("▶ running", "cloud.example.com/shared → dedicated.example.com/acme", "1:15 gone"),
        *("◷ switch: dns", "wave 2/2", "what switch: dns says", "rows verified 12,345", "freeze 120 ms"),
        *("4.8 MiB", "✓ way back open", "lag", "rows applied", "rows copied", "12,000 of 12,000"),
        *("at the old address 0", "on the new side 40", "telemetry.completeness == 100%", "drain: old: done"),
    ):
        assert part in text, part


def test_every_phase_of_a_step_has_a_sign_of_its_own_beside_its_colour() -> None:
    """`undoing` and `undone` share theirs: the word beside them, or the open step, tells which."""
    assert set(MARKS) == set(StepPhase)
    signs = [MARKS[phase][0] for phase in StepPhase if phase is not StepPhase.UNDONE]
    assert all(sign.strip() for sign in signs) and len(set(signs)) == len(signs)
    for phase in StepPhase:
        assert f"{MARKS[phase][0]} {NAMES[0]}" in shown(replace(RUNNING, step=0, steps=steps(phase)))


def test_every_phase_of_a_move_has_a_sign_and_its_word() -> None:
    for phase in Phase:
        sign = SIGNS[phase.value][0]
        assert sign and f"{sign} {phase.value}" in shown(replace(RUNNING, phase=phase), 80, 24)


def test_a_breach_says_why_and_what_can_be_done() -> None:
    text = shown(HELD)
    assert "! held" in text and "✗ revert" in text and "97.25 %" in text
    assert "Resume tries again, revert goes back." in text


def test_a_closed_way_back_is_said_at_once_and_in_words() -> None:
    text = shown(replace(RUNNING, way_back="the slot is gone"))
    assert "✗ no way back: the slot is gone" in text and "way back open" not in text
    released = shown(replace(FINISHED, phase=Phase.RELEASED))
    assert "no way back any more: released" in released


def test_what_a_revert_leaves_behind_is_said_beside_the_way_back() -> None:
    last = RUNNING.timeline[-1]
    left = replace(last, point=replace(last.point, not_carried=1_200))
    text = shown(replace(RUNNING, timeline=(*RUNNING.timeline[:-1], left)))
    assert "way back open, but for 1,200 changes of rows that all tenants share" in text


def test_a_way_back_that_is_gone_shows_the_steps_going_back() -> None:
    text = shown(BACK)
    assert "↩ switch: database" in text and "reverted by ops" in text


def test_a_silent_mover_is_noticed_unless_all_is_over() -> None:
    silent = replace(RUNNING, controller_seen_at=T0 - 100)
    assert "mover has been silent for 2 min 55 s" in shown(silent)
    assert "silent" not in shown(replace(FINISHED, controller_seen_at=T0 - 100))


def test_approval_names_the_command_to_give() -> None:
    five = (StepPhase.DONE,) * 5
    waiting = replace(RUNNING, steps=steps(*five, StepPhase.AWAITING_APPROVAL))
    assert "? waiting for 'fleetlift migrate approve acme-to-dedicated'" in shown(waiting, 80, 24)


def test_an_end_is_said_and_the_clock_stands() -> None:
    text = shown(replace(FINISHED, now=T0 + 5000))
    assert "✓ finished" in text and "1:15 in all" in text


def test_a_hostile_text_neither_styles_nor_breaks_the_screen() -> None:
    """What a database or a device says is text: no markup, no second line."""
    evil = "[red]x[/red]\nsecond\tline\x1b[31m"
    event = EventLine(id=1, at=T0, actor="ops", kind="step_failed", text=evil)
    status = replace(RUNNING, phase=Phase.HELD, reason=evil, events=(event,))
    lines = lines_of(status, 100, 40)
    assert len(lines) == 40
    assert all(c not in line.plain for line in lines for c in "\n\t\x1b")
    assert "[red]x[/red]" in shown(status)


def test_a_snapshot_ends_with_its_last_line() -> None:
    for status in (RUNNING, FRESH, FINISHED):
        lines = [one for one in snapshot(status, 100).renderables if isinstance(one, Text)]
        assert lines[-1].plain.strip() and all(line.cell_len <= 100 for line in lines)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_status_survives_its_way_over_the_wire(name: str) -> None:
    document = to_document(EXAMPLES[name])
    assert to_document(from_document(document)) == document
