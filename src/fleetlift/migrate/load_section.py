"""A load test's result as a part of a page: figures, what was offered and accepted over time, latencies.

Pure: a result in, HTML out, with the classes and the script of `report.css` and `report.js`.
"""

from html import escape
from typing import Final

from fleetlift.core.load_result import LoadResult, Quantiles
from fleetlift.core.units import format_count, format_quantity
from fleetlift.migrate.page import Figure, section, table, tiles
from fleetlift.migrate.plots import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Series, lines, nice_ticks, value_label

_HEIGHT: Final = 200


def load_section(result: LoadResult, *, heading: str = "Load test") -> str:
    """Tiles, then the section: verdict, table of classes, plots, what was stored and what went wrong."""
    body = f"{_verdict(result)}{_classes(result)}{load_result_plots(result)}{_problems(result)}"
    return tiles(_figures(result)) + section(heading, body)


def load_result_plots(result: LoadResult) -> str:
    """Offered against accepted, latency over time, and the histogram of all latencies."""
    span = max((p.at_s + p.for_s for p in result.series), default=1.0)
    mid = [(p.at_s + p.for_s / 2, p) for p in result.series]
    rates = [
        Series(name="offered", points=[(t, p.offered / p.for_s) for t, p in mid], role="old"),
        Series(name="accepted", points=[(t, p.accepted / p.for_s) for t, p in mid], role="new"),
    ]
    if any(p.errors for p in result.series):
        rates.append(Series(name="errors", points=[(t, p.errors / p.for_s) for t, p in mid]))
    times = [
        Series(name="p99", points=[(t, p.p99_s) for t, p in mid], role="new"),
        Series(name="generator late", points=[(t, p.late_p99_s) for t, p in mid], role="old"),
    ]
    return (
        "<h3>Messages a second</h3>"
        + lines(rates, title="Messages a second, offered and accepted", span=span, unit="")
        + "<h3>Latency, from the moment a message was meant to be sent</h3>"
        + lines(times, title="99th percentile of latency over time", span=span, unit="s")
        + "<h3>How often which latency</h3>"
        + histogram(result.buckets, result.latency)
    )


def histogram(buckets: tuple[tuple[float, int], ...], latency: Quantiles) -> str:
    """Bars over latencies on a logarithmic scale, with lines at p50, p99 and the longest."""
    if not buckets:
        return "<p>Nothing was acknowledged.</p>"
    high = max(count for _, count in buckets)
    ticks = nice_ticks(0.0, float(high))
    top = max(ticks[-1], high)
    inner, width = _HEIGHT - TOP - BOTTOM, (WIDTH - LEFT - RIGHT) / len(buckets)

    def y(count: float) -> float:
        return round(TOP + inner * (1 - count / top), 1)

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        label = escape(value_label(tick, ""))
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{label}</text>')
    each = max(1, len(buckets) // 8)
    for n, (edge_s, count) in enumerate(buckets):
        x = round(LEFT + n * width, 1)
        title = f"up to {value_label(edge_s, 's')}: {format_count(count)}"
        parts.append(
            f'<rect class="band new" x="{x}" y="{y(count)}" width="{max(width - 1, 1):.1f}" '
            f'height="{_HEIGHT - BOTTOM - y(count):.1f}"><title>{escape(title)}</title></rect>'
        )
        if n % each == 0:
            parts.append(
                f'<text class="tick" x="{x + width:.1f}" y="{_HEIGHT - BOTTOM + 17}" text-anchor="middle">'
                f"{escape(value_label(edge_s, 's'))}</text>"
            )
    marked = (("p50", latency.p50_s), ("p99", latency.p99_s), ("max", latency.max_s))
    for line, (name, value_s) in enumerate(marked):
        place = next((n for n, (edge_s, _) in enumerate(buckets) if value_s <= edge_s), len(buckets) - 1)
        x = round(LEFT + (place + 0.5) * width, 1)
        label = f"{name} {value_label(value_s, 's')}"
        parts.append(
            f'<g class="mark step"><line x1="{x}" x2="{x}" y1="{TOP}" y2="{_HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{x + 3}" y="{TOP + 9 + 13 * line}">{escape(label)}</text></g>'
        )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Histogram of latencies">{"".join(parts)}</svg>'
    )


def _verdict(result: LoadResult) -> str:
    if result.invalid:
        return f'<p class="bad">✗ This run does not count: {escape("; ".join(result.invalid))}.</p>'
    return "<p>✓ The generator was on time: the figures are the target's.</p>"


def _figures(result: LoadResult) -> list[Figure]:
    lost = result.lost
    return [
        Figure(label="accepted a second", value=format_count(round(result.rate_s))),
        Figure(
            label="p99 from the intended sending",
            value=format_quantity(result.latency.p99_s, "s") if result.latency.n else "–",
        ),
        Figure(label="offered", value=format_count(result.counts.offered)),
        Figure(label="accepted", value=format_count(result.counts.accepted)),
        Figure(label="errors", value=format_count(result.errors), good=result.errors == 0),
        Figure(
            label="lost",
            value="not known" if lost is None else format_count(lost),
            good=None if lost is None else lost == 0,
        ),
        Figure(
            label="generator late (p99)",
            value=format_quantity(result.late.p99_s, "s"),
            good=not result.invalid,
        ),
        Figure(label="devices", value=format_count(result.devices)),
    ]


def _classes(result: LoadResult) -> str:
    rows = []
    for one in result.classes:
        counts, latency = one.counts, one.latency
        numbers = (one.devices, counts.offered, counts.accepted, counts.rejected, counts.failed)
        times = (latency.p50_s, latency.p99_s, latency.p999_s, latency.max_s)
        cells = [format_count(number) for number in numbers]
        cells += [format_quantity(value, "s") if latency.n else "–" for value in times]
        rows.append(
            f"<tr><td>{escape(one.name)}</td>" + "".join(f"<td class=n>{c}</td>" for c in cells) + "</tr>"
        )
    heads = ("class", "devices", "offered", "accepted", "rejected", "failed", "p50", "p99", "p99.9", "max")
    return table(heads, rows, figures_from=1)


def _problems(result: LoadResult) -> str:
    stored = result.stored
    said = [
        f"Stored: {format_count(stored.stored)}; read again: {format_count(stored.reread)} of "
        f"{format_count(stored.reread_of)}; twice: {format_count(stored.doubled)}."
        if stored is not None
        else f"What was stored is not proved: {result.why_unproved}."
    ]
    said += [f"{text}." for text in result.problems]
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in said) + "</ul>"
