"""The live screen of a tenant's move: its steps, the stream, gates, what happened.

`render` is pure: a status in, exactly `height` lines of `width` columns out, as `watch.py` does for a fleet.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from fleetlift.cli.screen import SIGNS, span
from fleetlift.cli.watch import (
    BAD,
    CONTROLLER_QUIET_S,
    DONE,
    FAINT,
    GOOD,
    LIVE,
    NEW,
    OLD,
    WARN,
    Span,
    events,
    filled,
    gates,
    line,
    rate,
    resampled,
    spark,
    spread,
    stopwatch,
    title,
    without_room,
)
from fleetlift.core.migration import Phase
from fleetlift.core.tenant.move import StepPhase
from fleetlift.core.tenant.status import MovePoint, MoveStatus, StepLine

MARKS: Mapping[StepPhase, tuple[str, str]] = {
    StepPhase.WAITING: ("·", FAINT),
    StepPhase.WORKING: ("▶", f"bold {LIVE}"),
    StepPhase.BAKING: ("◷", f"bold {LIVE}"),
    StepPhase.AWAITING_APPROVAL: ("?", WARN),
    StepPhase.DONE: ("✓", GOOD),
    StepPhase.UNDOING: ("↩", BAD),
    StepPhase.UNDONE: ("↩", FAINT),
}
RATES = ("offered_s", "accepted_s")  # messages a second, not seconds
HINTS = {
    Phase.HELD: "Resume tries again, revert goes back.",
    Phase.PAUSED: "Resume goes on.",
    Phase.FINISHED: "Release gives up the way back, revert goes it.",
}


def header(s: MoveStatus, width: int) -> list[Text]:
    """Name, phase and clock; below it what is going on, in a sentence."""
    mark, style = SIGNS.get(s.phase.value, ("", ""))
    phase = Span(f"{mark} {s.phase.value}", f"bold {style}".strip())
    ended = s.ended_at if s.ended_at is not None and s.phase in DONE else None
    clock = f"{stopwatch((ended or s.now) - s.started_at)} {'in all' if ended else 'gone'}"
    left = line(Span(s.name, "bold"), "  ", phase, Span(f"  {s.source} → {s.target}", FAINT), width=width)
    return [spread(left, Text(clock), width), doing(s, width), way_back(s, width)]


def doing(s: MoveStatus, width: int) -> Text:
    """What is going on now, or why nothing is."""
    quiet = None if s.controller_seen_at is None else s.now - s.controller_seen_at
    if s.phase not in DONE and quiet is not None and quiet > CONTROLLER_QUIET_S:
        return line(
            Span(f"✗ The mover has been silent for {span(quiet)}: is the server running?", BAD), width=width
        )
    hint = HINTS.get(s.phase, "")
    tail = Span(f"  {hint}" if hint else "", FAINT)
    if s.reason:
        style = WARN if s.phase in (Phase.PAUSED, Phase.HELD) else BAD
        return line(Span(s.reason, GOOD if s.phase is Phase.RELEASED else style), tail, width=width)
    if s.phase in DONE:
        return line(Span("Everything in the plan is done.", GOOD), tail, width=width)
    step = s.steps[min(s.step, len(s.steps) - 1)]
    asked = step.phase is StepPhase.AWAITING_APPROVAL
    what = f"? waiting for 'fleetlift migrate approve {s.name}'" if asked else step.text or step.phase.value
    return line(Span(step.name, "bold"), "  ", Span(what, WARN if asked else LIVE), width=width)


def way_back(s: MoveStatus, width: int) -> Text:
    """Whether a revert would lose nothing, now."""
    if s.phase is Phase.RELEASED:
        return line(Span("- no way back any more: released", FAINT), width=width)
    if s.way_back:
        return line(Span(f"✗ no way back: {s.way_back}", BAD), width=width)
    stays = s.timeline[-1].point.not_carried if s.timeline else None
    told = f", but for {stays:,} changes of rows that all tenants share" if stays else ""
    return line(Span("✓ way back open", GOOD), Span(told, WARN), width=width)


def steps(s: MoveStatus, width: int) -> list[Text]:
    lines = []
    names = max((len(one.name) for one in s.steps), default=0) + 2
    for number, one in enumerate(s.steps):
        mark, style = MARKS[one.phase]
        opened = number == s.step and s.phase not in DONE
        took = took_text(one, s.now)
        wave = f"wave {one.wave + 1}/{one.waves}  " if one.waves > 1 and one.started_at else ""
        left = line(
            Span(f"{mark} ", style),
            Span(f"{one.name:<{names}}", style if opened else ""),
            Span(wave + one.text, "" if opened else FAINT),
            width=width - len(took) - 1,
        )
        lines.append(spread(left, Text(took, FAINT), width))
        if opened:
            lines += [line("    ", Span(text, FAINT), width=width) for text in figure_lines(one.figures)]
    return lines


def took_text(one: StepLine, now: float) -> str:
    if one.started_at is None:
        return ""
    return span((one.ended_at or now) - one.started_at)


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """Figures as a line: `rows 12,000 · rate_s 8,412`; longer texts on lines of their own."""
    short, long = [], []
    for name, value in figures.items():
        if isinstance(value, str) and len(value) > 24:
            long.append(f"{name.replace('_', ' ')}: {value}")
        elif isinstance(value, bool | str):
            short.append(f"{name.replace('_', ' ')} {value}")
        elif isinstance(value, int | float):
            short.append(figure_text(name, value))
    return [*([" · ".join(short)] if short else []), *long]


def figure_text(name: str, value: float) -> str:
    """A figure with its unit, which its name ends in."""
    plain, _, unit = name.rpartition("_")
    if name in RATES:
        return f"{plain} {rate(value)}"
    if unit == "s" and plain:
        return f"{plain.replace('_', ' ')} {span(value)}"
    if unit == "bytes":
        return f"{plain.replace('_', ' ')} {size(value)}"
    shown = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"
    return f"{name.replace('_', ' ')} {shown}"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def stream(s: MoveStatus, width: int) -> list[Text]:
    """The course of lag and of rows applied, and who is where."""
    points = [moment.point for moment in s.timeline]
    last = points[-1] if points else MovePoint(phase="", step=0)
    room = max(8, width - 34)
    lines = []
    for name, values, colour, now in (
        ("lag", [p.lag_s for p in points], OLD, "–" if last.lag_s is None else span(last.lag_s)),
        ("rows applied", [p.applied_s for p in points], NEW, rate(last.applied_s)),
    ):
        top = max([v for v in values if v is not None], default=0.0)
        drawn = spark(resampled(values, room), room, 1, top)[0]
        lines.append(line(Span(f"{name:<14}", colour), Span(drawn, colour), f" {now:>12}", width=width))
    if last.rows_copied is not None:
        of = f" of {last.rows_total:,}" if last.rows_total else ""
        lines.append(line(Span("rows copied   ", FAINT), f"{last.rows_copied:,}{of}", width=width))
    if last.at_old is not None or last.at_new is not None:
        lines.append(
            line(
                Span("at the old address ", OLD),
                "–" if last.at_old is None else f"{last.at_old:,}",
                Span("   on the new side ", NEW),
                "–" if last.at_new is None else f"{last.at_new:,}",
                width=width,
            )
        )
    return lines


def render(status: MoveStatus, width: int, height: int) -> Group:
    """The screen: exactly `height` lines (at least 8) of at most `width` columns (at least 40)."""
    width, height = max(40, width), max(8, height)
    lines = [*header(status, width), Text(), title("Steps", width), *steps(status, width)]
    room = height - len(lines)
    if room >= 6:
        lines += [Text(), title("Stream", width), *stream(status, width)]
    if status.gates and height - len(lines) >= 5:
        wanted = min(len(status.gates) * 2, max(1, height - len(lines) - 4))
        lines += [Text(), title("Gates", width), *gates(status.gates, width, wanted)]
    if (left := height - len(lines)) >= 3:
        lines += [Text(), title("Events", width), *events(status.events, width, left - 2)]
    return filled(lines[:height], height)


def snapshot(status: MoveStatus, width: int) -> Group:
    """The screen as a page to be printed once: as long as it needs to be."""
    return without_room(render(status, width, 34 + 2 * len(status.gates) + len(status.steps)))
