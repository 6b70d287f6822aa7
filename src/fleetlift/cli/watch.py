"""The live screen of a migration: who is where, what is moving, what was measured, what happened.

`render` is pure: a status in, exactly `height` lines of `width` columns out. It is what `fleetlift migrate
watch` and the demo show. Every colour has a mark or a word beside it, so that it reads in black and white.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from rich.console import Group
from rich.text import Text

from fleetlift.cli.screen import SIGNS, span
from fleetlift.core.migration import GateResult, Phase, Verdict, WavePhase
from fleetlift.core.status import EventLine, Mark, MigrationStatus, RungStatus

OLD, BOTH, NEW = "#d9902f", "#a371c7", "#2fa39a"
FAINT = "grey58"
BAD, WARN, GOOD, LIVE = "red", "yellow", "green", "cyan"
FILLS = (("old", "░", OLD), ("both", "▒", BOTH), ("new", "█", NEW))
MARKS = {
    Mark.WAITING: ("·", FAINT),
    Mark.OPEN: ("▶", f"bold {LIVE}"),
    Mark.DONE: ("✓", GOOD),
    Mark.SKIPPED: ("-", FAINT),
    Mark.RETURNED: ("↩", BAD),
}
VERDICTS = {Verdict.ADVANCE: ("✓", GOOD), Verdict.HOLD: ("!", WARN), Verdict.REVERT: ("✗", BAD)}
UNDECIDED = ("◷", LIVE)  # measured, but too little of it to be sure: a hold that is nobody's fault
DONE = (Phase.FINISHED, Phase.REVERTED, Phase.RELEASED)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# what the audit log notes → mark and style; kinds that are not here are shown with a dot
EVENT_SIGNS: Mapping[str, tuple[str, str]] = {
    "migration_started": ("▶", LIVE),
    "migration_resumed": ("▶", LIVE),
    "device_resumed": ("▶", LIVE),
    "plan_amended": ("▶", LIVE),
    "wave_approved": ("▶", LIVE),
    "wave_opened": ("▶", LIVE),
    "wave_moved": ("→", LIVE),
    "stragglers_moved": ("→", LIVE),
    "wave_passed": ("✓", GOOD),
    "migration_finished": ("✓", GOOD),
    "migration_released": ("✓", GOOD),
    "step_begun": ("▶", LIVE),
    "step_worked": ("→", LIVE),
    "step_done": ("✓", GOOD),
    "way_back_open": ("✓", GOOD),
    "move_cleaned": ("✓", GOOD),
    "approval_awaited": ("?", WARN),
    "clean_failed": ("!", WARN),
    "step_failed": ("✗", BAD),
    "undo_failed": ("✗", BAD),
    "follow_stopped": ("✗", BAD),
    "way_back_closed": ("✗", BAD),
    "step_undone": ("↩", BAD),
    "wave_skipped": ("-", FAINT),
    "devices_joined": ("+", FAINT),
    "migration_paused": ("‖", WARN),
    "wave_awaits_approval": ("?", WARN),
    "growth_held": ("!", WARN),
    "request_refused": ("!", WARN),
    "stragglers_found": ("!", WARN),
    "foreign_orders_seen": ("!", WARN),
    "devices_went_back": ("!", WARN),
    "devices_try_again": ("!", WARN),
    "devices_not_adopted": ("!", WARN),
    "devices_of_another_tenant": ("!", WARN),
    "migration_not_taken_up": ("!", WARN),
    "migration_taken_up": ("!", WARN),
    "gate_breached": ("✗", BAD),
    "breach_held": ("✗", BAD),
    "wave_returning": ("↩", BAD),
    "wave_returned": ("↩", BAD),
    "device_sent_back": ("↩", BAD),
    "emergency_taken_in": ("↩", BAD),
    "emergency_repeated": ("↩", WARN),
    "migration_reverting": ("↩", BAD),
    "migration_reverted": ("↩", BAD),
}
EIGHTHS = " ▁▂▃▄▅▆▇█"
CONTROLLER_QUIET_S = 15.0
HINTS = {Phase.HELD: "Resume, amend or revert?", Phase.PAUSED: "Resume goes on."}


class Span(NamedTuple):
    """One part of a line: text and its style."""

    text: str
    style: str = ""


def line(*parts: Span | str, width: int) -> Text:
    """One line of at most `width` columns, cut with '…' where it is too long.

    A database's error has lines, and a name may hold what moves a terminal's cursor: either becomes a space.
    """
    text = Text(no_wrap=True, overflow="ellipsis", end="")
    for part in parts:
        words, style = (part, "") if isinstance(part, str) else part
        text.append(_CONTROLS.sub(" ", words), style)
    text.truncate(width, overflow="ellipsis")
    return text


def spread(left: Text, right: Text, width: int) -> Text:
    """`left` at the left edge and `right` at the right one; the left part gives way."""
    room = width - right.cell_len - 1
    if room < 8:
        return line(Span(left.plain), width=width)
    text = left.copy()
    text.truncate(room, overflow="ellipsis")
    text.append(" " * (width - text.cell_len - right.cell_len))
    return text.append_text(right)


def title(name: str, width: int, remark: str = "") -> Text:
    """A section's heading: its name, a thin rule, a remark at the right end."""
    tail = f" {remark}" if remark else ""
    rule = "─" * max(0, width - len(name) - 1 - len(tail))
    return line(Span(name, "bold"), Span(f" {rule}", FAINT), Span(tail, FAINT), width=width)


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%H:%M:%S")


def stopwatch(seconds: float) -> str:
    """Time gone as a stopwatch shows it: 0:45, 12:00; from an hour on as people say it."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}" if whole < 3600 else span(whole)


def figure(value: float | None, unit: str) -> str:
    """A measured value with its unit, short: 99.73 %, 120 ms, 3 devices; '–' when nothing was measured."""
    if value is None:
        return "–"
    if unit in ("share", "%"):
        scaled = value * 100 if unit == "share" else value
        return f"{scaled:.3f}".rstrip("0").rstrip(".") + " %"
    if unit in ("s", "seconds"):
        return span(value)
    text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}/s" if value >= 99.5 else f"{value:.1f}/s"


def spark(values: Sequence[float | None], width: int, rows: int, top: float) -> list[str]:
    """The newest `width` values as columns of `rows` lines, from 0 to `top`; nothing measured stays blank."""
    recent: list[float | None] = list(values)[-width:]
    recent = [*([None] * (width - len(recent))), *recent]
    heights = [
        None if v is None else max(1, round(min(1.0, v / top if top > 0 else 0.0) * rows * 8)) for v in recent
    ]
    return [
        "".join(" " if h is None else EIGHTHS[min(8, max(0, h - 8 * (rows - 1 - row)))] for h in heights)
        for row in range(rows)
    ]


def resampled(values: Sequence[float | None], width: int) -> list[float | None]:
    """`values` brought to at most `width` points: each is the mean of those it stands for."""
    if len(values) <= width:
        return list(values)
    out: list[float | None] = []
    for n in range(width):
        part = [v for v in values[n * len(values) // width : (n + 1) * len(values) // width] if v is not None]
        out.append(sum(part) / len(part) if part else None)
    return out


def header(s: MigrationStatus, width: int) -> list[Text]:
    """Name, phase and clock; below it what is going on, in a sentence."""
    mark, style = SIGNS.get(s.phase.value, ("", ""))
    phase = Span(f"{mark} {s.phase.value}", f"bold {style}".strip())
    ended = s.ended_at if s.ended_at is not None and s.phase in DONE else None
    clock_text = f"{stopwatch((ended or s.now) - s.started_at)} {'in all' if ended else 'gone'}"
    if s.time_left_s is not None and not ended and s.phase is Phase.RUNNING:
        clock_text += f" · about {stopwatch(s.time_left_s)} left"
    left = line(Span(s.name, "bold"), "  ", phase, Span(f"  {s.from_side} → {s.to_side}", FAINT), width=width)
    return [spread(left, Text(clock_text), width), doing(s, width)]


def doing(s: MigrationStatus, width: int) -> Text:
    """What is going on now, or why nothing is."""
    quiet = None if s.controller_seen_at is None else s.now - s.controller_seen_at
    if s.phase not in DONE and quiet is not None and quiet > CONTROLLER_QUIET_S:
        return line(
            Span(f"✗ The controller has been silent for {span(quiet)}: is the server running?", BAD),
            width=width,
        )
    if s.phase in (Phase.HELD, Phase.REVERTING, Phase.REVERTED, Phase.PAUSED):
        style = WARN if s.phase in (Phase.PAUSED, Phase.HELD) else BAD
        hint = HINTS.get(s.phase, "")
        return line(
            Span(s.reason or s.phase.value, style), Span(f"  {hint}" if hint else "", FAINT), width=width
        )
    if s.phase in DONE:
        return line(Span(s.reason or "Everything in the plan is done.", GOOD), width=width)
    rung = next((r for r in s.rungs if r.rung == s.rung), None)
    if rung is None:
        return line(Span(s.reason), width=width)
    wave = rung.waves[s.wave] if s.wave < len(rung.waves) else None
    parts: list[Span | str] = [Span(f"{rung.step} → {rung.stage}", "bold")]
    if wave is not None:
        many = devices(wave.devices)
        share = many if wave.label in (many, f"{wave.devices} devices") else f"{wave.label}, {many}"
        parts.append(f", wave {s.wave + 1} of {len(rung.waves)} ({share})")
    match s.wave_phase:
        case WavePhase.MOVING:
            parts.append(Span(f"  → moving, {devices(s.moving)} to go", LIVE))
        case WavePhase.BAKING:
            baked = s.now - s.bake_started_at if s.bake_started_at is not None else 0.0
            whole = f" of {span(s.bake_s)}" if s.bake_s is not None else ""
            parts.append(Span(f"  ◷ baking {span(min(baked, s.bake_s or baked))}{whole}", LIVE))
        case WavePhase.AWAITING_APPROVAL:
            asked = Span(f"? waiting for 'fleetlift migrate approve {s.name}'", WARN)
            whole_line = line(*parts, "  ", asked, width=10_000)
            fits = whole_line.cell_len <= width  # what to type must not be cut off: else it comes first
            parts = [*parts, "  ", asked] if fits else [asked, "  ", *parts]
        case WavePhase.RETURNING:
            parts.append(Span("  ↩ going back", BAD))
    if s.reason:
        parts.append(Span(f"  {s.reason}", FAINT))
    return line(*parts, width=width)


def devices(n: int) -> str:
    return f"{n:,} device" + ("" if n == 1 else "s")


def sides(s: MigrationStatus, width: int) -> list[Text]:
    """The fleet as one bar, by the side that serves each device, with its legend."""
    counts = (
        s.devices_old + s.excluded,
        s.devices_both,
        s.devices_new,
    )  # who takes no part stays on the old one
    total = max(1, sum(counts))
    cells = [n * width / total for n in counts]
    whole = [int(c) for c in cells]
    for n in sorted(range(3), key=lambda i: cells[i] - whole[i], reverse=True)[: width - sum(whole)]:
        whole[n] += 1
    for n in range(3):  # a side that serves anyone is seen
        if counts[n] and not whole[n]:
            whole[n], whole[whole.index(max(whole))] = 1, max(whole) - 1
    if not sum(counts):
        return [
            line(Span("·" * width, FAINT), width=width),
            line(Span("No device is on it yet.", FAINT), width=width),
        ]
    bar = line(
        *(Span(fill * n, colour) for (_, fill, colour), n in zip(FILLS, whole, strict=True)), width=width
    )
    legend: list[Span | str] = []
    for (name, fill, colour), n in zip(FILLS, counts, strict=True):
        legend += [Span(fill * 2, colour), f" {name} {n:,}   "]
    remarks = [
        Span(f"→ moving {s.moving:,}   ", LIVE) if s.moving else None,
        Span(f"! stragglers {s.stragglers_total:,}   ", WARN) if s.stragglers_total else None,
        Span(f"- left out {s.excluded:,}   ", FAINT) if s.excluded else None,
        Span(f"○ never seen {s.never_seen:,}   ", FAINT) if s.never_seen else None,
        Span(f"↩ reverts {s.reverts:,}", WARN) if s.reverts else None,
    ]
    return [bar, line(*legend, *(r for r in remarks if r), width=width)]


def ladder(s: MigrationStatus, width: int, rows: int) -> list[Text]:
    """Steps and stages from the first to the last; the open one with its waves."""
    lines = []
    names = max((len(f"{r.step} {r.stage}") for r in s.rungs), default=0) + 2
    for r in s.rungs:
        mark, style = MARKS[r.mark]
        name = f"{r.step} {r.stage}"
        share = f"{r.devices:,}/{s.devices:,}" if r.devices or r.mark is not Mark.WAITING else ""
        head = line(
            Span(f"{mark} ", style),
            Span(f"{name:<{names}}", style if r.mark is Mark.OPEN else ""),
            width=width,
        )
        waves = wave_marks(r, width - head.cell_len - len(share) - 2)
        lines.append(spread(head.append_text(waves), Text(share, FAINT), width))
    current = next((n for n, r in enumerate(s.rungs) if r.rung == s.rung), 0)
    if len(lines) < rows and s.rungs and s.phase not in DONE:
        lines.insert(current + 1, wave_labels(s.rungs[current], width))
    if len(lines) > rows:  # keep the open rung in sight
        first = min(max(0, current - rows // 2), len(lines) - rows)
        lines = lines[first : first + rows]
    return lines


def wave_marks(r: RungStatus, width: int) -> Text:
    text = Text()
    for wave in r.waves:
        mark, style = MARKS[wave.mark]
        text.append(mark, style)
    text.truncate(max(0, width), overflow="ellipsis")
    return text


def wave_labels(r: RungStatus, width: int) -> Text:
    parts: list[Span | str] = ["  "]
    for wave in r.waves:
        mark, style = MARKS[wave.mark]
        parts.append(Span(f"{mark}{wave.label.replace(' devices', ' dev')} ", style))
    return line(*parts, width=width)


def traffic(s: MigrationStatus, width: int, rows: int) -> list[Text]:
    """Messages a second by side with their recent course, and how long commands take."""
    points = [m.point for m in s.timeline]
    old, new = [p.rate_old for p in points], [p.rate_new for p in points]
    top = max([v for v in (*old, *new) if v is not None], default=0.0)
    each = max(1, min(6, (rows - 1) // 2))
    room = max(4, width - 16)
    lines = []
    for name, values, colour in (("old", old, OLD), ("new", new, NEW)):
        now = rate(values[-1] if values else None)
        drawn = spark(resampled(values, room), room, each, top)
        for n, row in enumerate(drawn):
            last = n == each - 1
            label = Span(f"{name:<4}" if last else "    ", colour)
            lines.append(line(label, Span(row, colour), f" {now if last else '':>10}", width=width))
    if points and len(lines) < rows:
        p = points[-1]
        lines.append(
            line(
                Span("commands, p95  ", FAINT),
                Span("old ", OLD),
                span(p.latency_old_p95),
                Span("   new ", NEW),
                span(p.latency_new_p95),
                width=width,
            )
        )
    return lines[:rows]


def gates(results: Sequence[GateResult], width: int, rows: int) -> list[Text]:
    """Each gate with its measured value and limit; below one that does not hold, why."""
    if not results:
        return [line(Span("No gate is measured now.", FAINT), width=width)][:rows]
    ordered = sorted(results, key=lambda g: (Verdict.REVERT, Verdict.HOLD, Verdict.ADVANCE).index(g.verdict))
    why_rows = max(0, rows - len(ordered))
    name_width = min(max(len(g.gate) for g in ordered), max(16, width - 44))
    lines = []
    for g in ordered:
        mark, style = UNDECIDED if g.undecided else VERDICTS[g.verdict]
        word = "not yet" if g.undecided else g.verdict.value
        value = "no data" if g.value is None else figure(g.value, g.unit)
        name = g.gate if len(g.gate) <= name_width else g.gate[: name_width - 1] + "…"
        parts: list[Span | str] = [
            Span(f"{mark} {word:<8}", style),
            f"{name:<{name_width}}  ",
            Span(f"{value:>11}", f"bold {style}"),
            Span(f"  limit {figure(g.limit, g.unit)}" if g.limit is not None else "", FAINT),
            Span(f"  n={g.n:,}" if g.n else "", FAINT),
        ]
        lines.append(line(*parts, width=width))
        if g.verdict is not Verdict.ADVANCE and g.why and why_rows > 0:
            lines.append(line(Span(f"  {g.why}", style), width=width))
            why_rows -= 1
    if len(lines) > rows:
        hidden = len(lines) - rows + 1
        lines = [*lines[: rows - 1], line(Span(f"  and {hidden} more that hold", FAINT), width=width)]
    return lines


def sign_of(kind: str) -> tuple[str, str]:
    """Mark and style of an event of this kind."""
    return EVENT_SIGNS.get(kind, ("·", FAINT))


def events(found: Sequence[EventLine], width: int, rows: int) -> list[Text]:
    """The last events, newest at the bottom."""
    lines = []
    for e in found[-rows:] if rows > 0 else []:
        mark, style = sign_of(e.kind)
        who = f"{e.actor}: " if e.actor not in ("", "controller") and e.actor not in e.text else ""
        lines.append(
            line(
                Span(f"{clock(e.at)} ", FAINT),
                Span(f"{mark} ", style),
                f"{who}{e.text or e.kind}",
                width=width,
            )
        )
    return lines or [line(Span("Nothing yet.", FAINT), width=width)][:rows]


def stragglers(s: MigrationStatus, width: int, rows: int) -> list[Text]:
    lines = []
    for item in s.stragglers[:rows]:
        since = f" for {span(s.now - item.since)}" if item.since is not None else ""
        lines.append(line(Span("! ", WARN), f"{item.device}{since}  ", Span(item.reason, FAINT), width=width))
    if s.stragglers_total > len(lines) and lines:
        more = s.stragglers_total - len(lines) + 1
        lines[-1] = line(Span(f"! and {more} more: fleetlift migrate devices {s.name}", WARN), width=width)
    return lines


def beside(left: list[Text], right: list[Text], left_width: int, gap: int) -> list[Text]:
    """Two columns, the left one `left_width` wide."""
    lines = []
    for n in range(max(len(left), len(right))):
        text = left[n].copy() if n < len(left) else Text()
        text.append(" " * (left_width + gap - text.cell_len))
        lines.append(text.append_text(right[n]) if n < len(right) else text)
    return lines


def render(status: MigrationStatus, width: int, height: int) -> Group:
    """The screen: exactly `height` lines (at least 8) of at most `width` columns (at least 40).

    Where there is room, sections stand beside each other (from 130 columns) and are set apart by blank lines.
    """
    width, height = max(40, width), max(8, height)
    top = [*header(status, width), *sides(status, width)]
    room = height - len(top)
    body = _wide(status, width, room) if width >= 130 else _narrow(status, width, room)
    return filled((top + body)[:height], height)


def snapshot(status: MigrationStatus, width: int) -> Group:
    """The screen as a page to be printed once: as long as it needs to be."""
    rows = 30 + 2 * len(status.gates) + min(4, len(status.stragglers))
    return without_room(render(status, width, rows))


def filled(lines: Sequence[Text], height: int) -> Group:
    """A screen of exactly `height` lines, of which there are no more than that; none is broken."""
    shown = [*lines, *(Text() for _ in range(height - len(lines)))]
    for text in shown:
        text.no_wrap, text.overflow = True, "crop"
        text.end = "\n"
    shown[-1].end = ""
    return Group(*shown)


def without_room(screen: Group) -> Group:
    """The screen without the empty lines at its end."""
    lines = [text for text in screen.renderables if isinstance(text, Text)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return Group(*lines)


def _gate_rows(status: MigrationStatus) -> int:
    failing = sum(g.verdict is not Verdict.ADVANCE for g in status.gates)
    return max(1, len(status.gates) + failing)


def _upper(status: MigrationStatus, width: int, rows: int) -> list[Text]:
    """Steps at the left, traffic at the right."""
    half = (width - 3) // 2
    left = [title("Steps", half), *ladder(status, half, rows)]
    right = [
        title("Messages", width - 3 - half, "a second"),
        *traffic(status, width - 3 - half, min(rows, 7)),
    ]
    return beside(left, right, half, 3)


def _lower(status: MigrationStatus, width: int, room: int) -> list[Text]:
    """Stragglers, when there are any and room for them, then events to the bottom."""
    lines: list[Text] = []
    late = min(len(status.stragglers), 4, max(0, room - 6))
    if late:
        lines = [title("Stragglers", width, f"{status.stragglers_total:,}"), *stragglers(status, width, late)]
        if room - len(lines) >= 8:
            lines.append(Text())
    if room - len(lines) >= 2:
        lines += [title("Events", width), *events(status.events, width, room - len(lines) - 1)]
    return lines


def _narrow(status: MigrationStatus, width: int, room: int) -> list[Text]:
    rungs = len(status.rungs) + (status.phase not in DONE)
    wanted_gates = _gate_rows(status)
    airy = room >= rungs + wanted_gates + 14
    space = [Text()] if airy else []
    upper_rows = max(2, min(max(rungs, 5), room - 1 - len(space) * 3 - 3 - 4))
    upper = _upper(status, width, upper_rows)
    gate_rows = max(1, min(wanted_gates, room - len(upper) - 1 - len(space) * 3 - 3))
    middle = [title("Gates", width), *gates(status.gates, width, gate_rows)]
    lines = [*space, *upper, *space, *middle, *space]
    return [*lines, *_lower(status, width, room - len(lines))]


def _wide(status: MigrationStatus, width: int, room: int) -> list[Text]:
    gap = 4
    left_width = (width - gap) // 2
    right_width = width - gap - left_width
    room -= 1
    rungs = len(status.rungs) + (status.phase not in DONE)
    steps = [title("Steps", left_width), *ladder(status, left_width, max(2, min(rungs, room // 2)))]
    gate_rows = max(1, room - len(steps) - 2)
    left = [*steps, Text(), title("Gates", left_width), *gates(status.gates, left_width, gate_rows)]
    flow = [
        title("Messages", right_width, "a second"),
        *traffic(status, right_width, min(13, max(3, room // 3))),
    ]
    right = [*flow, Text(), *_lower(status, right_width, room - len(flow) - 1)]
    return [Text(), *beside(left[:room], right[:room], left_width, gap)]
