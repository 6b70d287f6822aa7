"""Plots as inline SVG: no library, no network, readable in print and in the dark.

A plot is a string of SVG that scales with its page. Colour is never the only sign: every series is named at
its end, the old side's lines are dashed, limits are drawn with their figure. Hovering shows the figures of
that moment (a few lines of script in `report.py` read the `data-points` of each plot).
"""

import json
import math
from collections.abc import Sequence
from html import escape

import msgspec

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 960, 58, 92, 18, 26


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One line or band. `points`: (seconds since the start, value); None (not measured) breaks the line."""

    name: str
    points: Sequence[tuple[float, float | None]]
    role: str = "neutral"  # old | both | new | neutral: which colour, and dashed for old


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """A moment worth a vertical line. `kind`: step | breach | person | done."""

    at: float
    label: str
    kind: str = "step"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round figures (1, 2 or 5 times a power of ten) that span low..high, at most `count` + 2 of them."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):  # next to nothing lies between them
        high = low + 1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    ticks = []
    while (value := first * step) < high + step * 0.999:
        ticks.append(round(value, 10))
        first += 1
    return ticks


def clock_label(t: float) -> str:
    """Seconds since the start as people read them: 0:45, 12:00, 3 h 20."""
    whole = round(t)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 172_800:
        return f"{whole // 3600} h {whole % 3600 // 60:02d}"
    return f"{whole / 86_400:.1f} d"


def time_ticks(span: float) -> list[float]:
    steps = (5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 43_200, 86_400, 604_800)
    step = next((s for s in steps if span / s <= 9), steps[-1])
    return [float(t) for t in range(0, int(span) + 1, step)]


def value_label(value: float, unit: str) -> str:
    """A figure with its unit, short: 0.25 s becomes 250 ms, 99.730 % becomes 99.73 %."""
    if unit == "%":
        text = f"{value:.3f}".rstrip("0").rstrip(".")
        return f"{text} %"
    if unit == "s":
        if abs(value) >= 1:
            return f"{value:.3g} s"
        return f"{value * 1000:.3g} ms"
    text = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{text} {unit}".strip()


class _Frame:
    """The axes of one plot: maps time and value to the drawing."""

    def __init__(self, span: float, low: float, high: float, height: int, unit: str) -> None:
        self.span, self.height, self.unit = max(span, 1.0), height, unit
        self.ticks = nice_ticks(low, high)
        self.low, self.high = min(self.ticks[0], low), max(self.ticks[-1], high)

    def x(self, t: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(max(t, 0.0), self.span) / self.span, 1)

    def y(self, value: float) -> float:
        inner = self.height - TOP - BOTTOM
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(TOP + inner * (1 - share), 1)

    def axes(self) -> str:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            label = escape(value_label(tick, self.unit))
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
        for t in time_ticks(self.span):
            x, y = self.x(t), self.height - BOTTOM
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>')
            label = clock_label(t)
            parts.append(f'<text class="tick" x="{x}" y="{y + 17}" text-anchor="middle">{label}</text>')
        return "".join(parts)

    def marks(self, marks: Sequence[Mark]) -> str:
        parts = []
        for mark in marks:
            x = self.x(mark.at)
            parts.append(
                f'<g class="mark {escape(mark.kind)}"><line x1="{x}" x2="{x}" y1="{TOP}" '
                f'y2="{self.height - BOTTOM}"/><title>{clock_label(mark.at)} {escape(mark.label)}</title></g>'
            )
        return "".join(parts)

    def end_labels(self, labels: Sequence[tuple[str, str, float]]) -> str:
        """Names at the right end, pushed apart where they would overlap. Items are (name, role, y)."""
        parts, last = [], -math.inf
        for name, role, y in sorted(labels, key=lambda item: item[2]):
            at = max(y, last + 14)
            last = at
            parts.append(
                f'<text class="name {escape(role)}" x="{WIDTH - RIGHT + 8}" y="{at + 4:.1f}">'
                f"{escape(name)}</text>"
            )
        return "".join(parts)


def _svg(frame: _Frame, body: str, title: str, data: object) -> str:
    payload = escape(json.dumps(data, separators=(",", ":")), quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {frame.height}" role="img" aria-label="{escape(title)}" '
        f'data-span="{frame.span}" data-left="{LEFT}" data-right="{WIDTH - RIGHT}" data-points="{payload}">'
        f'{body}<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{frame.height - BOTTOM}"/></svg>'
    )


def _hover(series: Sequence[Series], unit: str) -> list[dict[str, object]]:
    """What the page's script shows under the pointer: the label is made here, so it knows no units."""
    return [
        {
            "name": s.name,
            "points": [[round(t, 1), value_label(v, unit)] for t, v in s.points if v is not None],
        }
        for s in series
    ]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    span: float,
    unit: str,
    marks: Sequence[Mark] = (),
    height: int = 200,
    limit: Series | None = None,
    breaches: Sequence[tuple[float, float]] = (),
    from_zero: bool = True,
) -> str:
    """Lines over time; `limit` is a step line with its figure; `from_zero` false zooms to the values.

    `breaches` are points that get a cross of their own.
    """
    shown = [v for s in (*series, *([limit] if limit else [])) for _, v in s.points if v is not None]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    elif high > low:
        low, high = low - (high - low) * 0.1, high + (high - low) * 0.1
    else:
        low, high = low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9
    if unit == "%":
        low, high = min(low, 99.99), min(high, 100.0)
    frame = _Frame(span, low, high, height, unit)
    if unit == "%":
        frame.high = min(frame.high, 100.0)
        frame.ticks = [t for t in frame.ticks if t <= 100.0]
    parts = [frame.axes(), frame.marks(marks)]
    labels = []
    if limit and any(v is not None for _, v in limit.points):
        parts.append(f'<path class="limit" d="{_path(frame, limit.points, steps=True)}"/>')
        last = next(v for _, v in reversed(limit.points) if v is not None)
        labels.append((f"limit {value_label(last, unit)}", "limit", frame.y(last)))
    for s in series:
        parts.append(f'<path class="line {escape(s.role)}" d="{_path(frame, s.points)}"/>')
        last_value = next((v for _, v in reversed(s.points) if v is not None), None)
        if last_value is not None:
            labels.append((s.name, s.role, frame.y(last_value)))
    for t, v in breaches:
        parts.append(
            f'<text class="breach" x="{frame.x(t)}" y="{frame.y(v) + 5}" text-anchor="middle">✗</text>'
        )
    parts.append(frame.end_labels(labels))
    return _svg(frame, "".join(parts), title, _hover((*series, *([limit] if limit else [])), unit))


def bands(
    series: Sequence[Series],
    *,
    title: str,
    span: float,
    unit: str,
    marks: Sequence[Mark] = (),
    height: int = 200,
) -> str:
    """Stacked bands over time, first series at the bottom. All series have the same times."""
    times = [t for t, _ in series[0].points] if series else []
    total = [sum(s.points[i][1] or 0.0 for s in series) for i in range(len(times))]
    frame = _Frame(span, 0.0, max(total, default=1.0) or 1.0, height, unit)
    parts = [frame.axes()]
    floor = [0.0] * len(times)
    labels = []
    for s in series:
        top = [floor[i] + (s.points[i][1] or 0.0) for i in range(len(times))]
        if times:
            upper = " ".join(f"{frame.x(t)},{frame.y(v)}" for t, v in zip(times, top, strict=True))
            lower = " ".join(
                f"{frame.x(t)},{frame.y(v)}" for t, v in reversed(list(zip(times, floor, strict=True)))
            )
            parts.append(f'<polygon class="band {escape(s.role)}" points="{upper} {lower}"/>')
            if top[-1] > floor[-1]:
                labels.append(
                    (
                        f"{s.name} {value_label(top[-1] - floor[-1], '')}",
                        s.role,
                        frame.y((top[-1] + floor[-1]) / 2),
                    )
                )
        floor = top
    parts += [frame.marks(marks), frame.end_labels(labels)]
    return _svg(frame, "".join(parts), title, _hover(series, unit))


def _path(frame: _Frame, points: Sequence[tuple[float, float | None]], *, steps: bool = False) -> str:
    parts: list[str] = []
    pen_down = False
    for t, v in points:
        if v is None or math.isnan(v):
            pen_down = False
            continue
        x, y = frame.x(t), frame.y(v)
        if not pen_down:
            parts.append(f"M{x} {y}h.1")  # so that a point alone is seen too
        elif steps:
            parts.append(f"H{x}V{y}")
        else:
            parts.append(f"L{x} {y}")
        pen_down = True
    return "".join(parts)
