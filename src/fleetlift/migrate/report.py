"""The report of a migration: one HTML file that needs no network, for people who were not there.

`render` is pure: facts in, page out. `report_html` reads the facts from the engine's tables.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from fleetlift.core.errors import NotFound
from fleetlift.core.migration import MemberState
from fleetlift.core.plan import ladder
from fleetlift.core.timeline import TimelinePoint
from fleetlift.migrate.page import (
    AuditLine,
    Figure,
    audit_lines,
    audit_section,
    decoded,
    mark_legend,
    marks_of,
    page,
    section,
    table,
    tiles,
)
from fleetlift.migrate.parity import ParityReport, read_parity
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.plots import Mark, Series, bands, clock_label, lines
from fleetlift.store import ledger
from fleetlift.store.pool import Pool


class PathTotal(msgspec.Struct, frozen=True, kw_only=True):
    """What came by one path: copies received, distinct messages, copies that the same path brought again."""

    path: str
    received: int
    distinct: int
    doubles: int


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One device's account over its channels. `missing`: seqs inside its ranges that no path brought."""

    device: str
    by_path: dict[str, int]
    stored: int
    missing: int
    gaps: tuple[str, ...] = ()


class MemberLine(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    state: str
    rung: int
    reason: str
    attributes: dict[str, Any] = {}


class ReportData(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    tenant: str
    phase: str
    reason: str
    plan: str
    plan_version: int
    started_at: float
    ended_at: float
    points: Sequence[tuple[float, TimelinePoint]]
    audit: Sequence[AuditLine]
    totals: Sequence[PathTotal]
    ledger: Sequence[LedgerLine]
    members: Sequence[MemberLine]
    figures: Sequence[Figure] = ()
    rungs: Sequence[str] = ()  # names of the ladder's rungs, index 0 is "old side"
    old_path: str = "old"
    chain_head: str = ""  # the hash of the audit log's last entry
    parity: ParityReport | None = None


def render(data: ReportData) -> str:
    """The page. Deterministic: the same facts give the same bytes."""
    span = max(data.ended_at - data.started_at, 1.0)
    marks = marks_of(data.audit, data.started_at)
    sections = [
        tiles(data.figures),
        section("Devices by side", _devices_plot(data, span, marks), mark_legend(marks)),
        section("Messages a second, by side", _rate_plot(data, span, marks)),
        section(
            "Command latency, old side against new",
            _latency_plot(data, span, marks),
            "Time from sending a command by a path to the device's answer on that path, over the last 30 s.",
        ),
        section(
            "Gates", _gate_plots(data, span, marks), "Each gate's measured value over time, with its limit."
        ),
        section("Devices that did not go all the way", _stayed(data)),
        section("Ledger", _ledger(data)),
        section("Parity: what both sides saw of the same messages", _parity(data.parity)),
        audit_section(data.audit, data.started_at, data.chain_head),
        section(f"Plan (version {data.plan_version})", f"<pre>{escape(data.plan)}</pre>"),
    ]
    return page(
        name=data.name,
        tenant=data.tenant,
        phase=data.phase,
        reason=data.reason,
        started_at=data.started_at,
        ended_at=data.ended_at,
        sections=sections,
    )


def _times(data: ReportData) -> list[tuple[float, TimelinePoint]]:
    """Points at seconds since the start, thinned to some hundreds; breaches are always kept."""
    every, last = max(1, len(data.points) // 600), len(data.points) - 1
    kept = [
        one
        for i, one in enumerate(data.points)
        if i % every == 0 or i == last or any(gate.verdict == "revert" for gate in one[1].gates)
    ]
    return [(at - data.started_at, point) for at, point in kept]


def _devices_plot(data: ReportData, span: float, marks: Sequence[Mark]) -> str:
    times = _times(data)
    series = [
        Series(name="new", role="new", points=[(t, float(p.devices_new)) for t, p in times]),
        Series(name="both", role="both", points=[(t, float(p.devices_both)) for t, p in times]),
        Series(name="old", role="old", points=[(t, float(p.devices_old)) for t, p in times]),
    ]
    return bands(series, title="Devices by side over time", span=span, unit="", marks=marks, height=240)


def _rate_plot(data: ReportData, span: float, marks: Sequence[Mark]) -> str:
    times = _times(data)
    series = [
        Series(name="old side", role="old", points=[(t, p.rate_old) for t, p in times]),
        Series(name="new side", role="new", points=[(t, p.rate_new) for t, p in times]),
    ]
    return lines(series, title="Messages a second by side", span=span, unit="/s", marks=marks)


def _latency_plot(data: ReportData, span: float, marks: Sequence[Mark]) -> str:
    times = _times(data)
    series = [
        Series(name="old p95", role="old", points=[(t, p.latency_old_p95) for t, p in times]),
        Series(name="old p50", role="old thin", points=[(t, p.latency_old_p50) for t, p in times]),
        Series(name="new p95", role="new", points=[(t, p.latency_new_p95) for t, p in times]),
        Series(name="new p50", role="new thin", points=[(t, p.latency_new_p50) for t, p in times]),
    ]
    return lines(series, title="Command latency by side", span=span, unit="s", marks=marks)


def _gate_plots(data: ReportData, span: float, marks: Sequence[Mark]) -> str:
    times = _times(data)
    texts: dict[str, str] = {}
    for _, point in times:
        for gate in point.gates:
            texts.setdefault(gate.gate, gate.unit)
    if not texts:
        return "<p>No gate was measured.</p>"
    figures = []
    for text, unit in texts.items():
        found = [(t, next((g for g in p.gates if g.gate == text), None)) for t, p in times]
        value = Series(name="measured", role="new", points=[(t, g.value if g else None) for t, g in found])
        limit = Series(name="limit", points=[(t, g.limit if g else None) for t, g in found])
        breaches = [(t, g.value) for t, g in found if g and g.verdict == "revert" and g.value is not None]
        decided = any(g.verdict == "advance" for _, g in found if g)
        sign = "✓ held" if decided else "! never sure of it"
        if breaches:
            sign = f'<span class="bad">✗ breached at {clock_label(breaches[0][0])}</span>'
        plot = lines(
            [value],
            title=text,
            span=span,
            unit=unit,
            height=150,
            limit=limit,
            marks=marks,
            breaches=breaches,
            from_zero=unit != "%",
        )
        figures.append(f"<figure><figcaption><code>{escape(text)}</code> {sign}</figcaption>{plot}</figure>")
    return "".join(figures)


def _stayed(data: ReportData) -> str:
    top = len(data.rungs) - 1
    rest = [m for m in data.members if m.rung < top or m.state != MemberState.MOVED.value]
    if not rest:
        return "<p>None: every device of the plan is on the new side.</p>"
    rows = []
    for m in rest:
        stands = data.rungs[m.rung] if m.rung < len(data.rungs) else str(m.rung)
        about = ", ".join(f"{k} {_plain(v)}" for k, v in sorted(m.attributes.items()))
        cells = (m.device, m.state, stands, m.reason, about)
        rows.append("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>")
    return table(("device", "state", "stands at", "why", "attributes"), rows)


def _plain(value: Any) -> str:
    """An attribute as the plan and the API write it: `true`, not Python's `True`."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _ledger(data: ReportData) -> str:
    paths = [t.path for t in data.totals]
    total_rows = [
        f"<tr><td>{escape(t.path)}</td><td class=n>{t.received:,}</td><td class=n>{t.distinct:,}</td>"
        f"<td class=n>{t.doubles:,}</td></tr>"
        for t in data.totals
    ]
    totals = table(
        ("path", "copies received", "distinct messages", "came again by the same path"), total_rows
    )
    rows = []
    for line in data.ledger:
        cells = "".join(f"<td class=n>{line.by_path.get(p, 0):,}</td>" for p in paths)
        gap = f' <span class="bad">✗ {escape(", ".join(line.gaps))}</span>' if line.gaps else " ✓"
        rows.append(
            f"<tr><td>{escape(line.device)}</td>{cells}<td class=n>{line.stored:,}</td>"
            f"<td class=n>{line.missing:,}{gap}</td></tr>"
        )
    detail = table(("device", *(f"by {p}" for p in paths), "stored", "missing"), rows, figures_from=1)
    return f"{totals}<details><summary>{len(rows)} devices</summary>{detail}</details>"


def _parity(found: ParityReport | None) -> str:
    if found is None or not found.all:
        return "<p>No device has sent to both sides: nothing was compared.</p>"
    classes = ("matched", "only_old", "only_new", "differing", "ignored")
    rows = [
        f"<tr><td>{escape(c.channel)}</td><td class=n>{c.all:,}</td>"
        + "".join(f"<td class=n>{getattr(c.account, name):,}</td>" for name in classes)
        + "</tr>"
        for c in found.channels
    ]
    heads = ("channel", "all", "matched", "only old", "only new", "differing", "differing by rule")
    noise = (
        f"of {found.noise_compared:,} messages that the old side was asked for twice, "
        f"{found.noise_differing:,} differed from themselves"
        if found.noise_compared
        else "not measured"
    )
    sign = '<span class="bad">✗' if found.above_noise > 0 else "<span>✓"
    text = (
        f"<p>{sign} {found.above_noise * 100:.3g} % of the pairs differ above the old side's noise</span> "
        f"({noise}).</p>{table(heads, rows, figures_from=1)}"
    )
    if found.fields:
        fields = [
            f"<tr><td>{escape(f.channel)}</td><td><code>{escape(f.field)}</code></td>"
            f"<td>{escape(f.likely)}</td><td>{escape(f.old)}</td><td>{escape(f.new)}</td>"
            f"<td class=n>{f.differing:,}</td><td class=n>{f.allowed:,}</td>"
            f"<td class=n>{f.above_noise * 100:.3g} %</td></tr>"
            for f in found.fields
        ]
        columns = ("channel", "field", "likely", "old", "new", "differs", "by rule", "above noise")
        text += table(columns, fields, figures_from=5)
    return text


async def report_html(engine: Pool, backend: Pool, name: str) -> str:
    """The report of migration `name` as it stands now. Raises NotFound."""
    return render(await read_report(engine, backend, name))


async def read_report(engine: Pool, backend: Pool, name: str, figures: Sequence[Figure] = ()) -> ReportData:
    """The facts of a report: the engine's records, and the ledger of the migration's devices."""
    row = await engine.fetchrow("SELECT * FROM engine.migration WHERE name = $1", name)
    if row is None:
        raise NotFound(f"there is no migration {name!r}; `fleetlift migrate list` shows those there are")
    plan = parse_plan(row["plan"])
    samples = await engine.fetch("SELECT at, data FROM engine.sample WHERE migration = $1 ORDER BY at", name)
    audit = await engine.fetch(
        "SELECT at, actor, kind, text, evidence, hash FROM engine.audit WHERE migration = $1 ORDER BY id",
        name,
    )
    members = await engine.fetch("SELECT * FROM engine.member WHERE migration = $1 ORDER BY rank", name)
    devices = [m["device"] for m in members]
    attributes = {
        r["id"]: decoded(r["attributes"])
        for r in await backend.fetch("SELECT id, attributes FROM device WHERE id = ANY($1)", devices)
    }
    async with backend.acquire() as conn:
        totals = await ledger.totals(conn, devices=devices)
        accounts = await ledger.by_device(conn, devices)
        compared = await read_parity(conn, plan, name, devices)
    return ReportData(
        name=name,
        tenant=row["tenant"],
        phase=row["phase"],
        reason=decoded(row["state"]).get("reason", ""),
        plan=row["plan"],
        plan_version=row["plan_version"],
        chain_head=(audit[-1]["hash"] or "") if audit else "",
        started_at=row["created_at"].timestamp(),
        ended_at=(samples[-1]["at"] if samples else row["updated_at"]).timestamp(),
        points=[(s["at"].timestamp(), _point(s["data"])) for s in samples],
        audit=audit_lines(audit),
        totals=[
            PathTotal(path=t.path, received=t.received, distinct=t.distinct + t.uncounted, doubles=t.doubles)
            for t in totals
        ],
        ledger=[
            LedgerLine(
                device=a.device, by_path=a.received, stored=a.stored, missing=a.missing, gaps=a.gaps[:5]
            )
            for a in accounts
        ],
        members=[
            MemberLine(
                device=m["device"],
                state=m["state"],
                rung=m["rung"],
                reason=m["reason"],
                attributes=attributes.get(m["device"], {}),
            )
            for m in members
        ],
        figures=figures,
        parity=compared,
        rungs=tuple(rung.name for rung in ladder(plan)),
    )


def _point(value: Any) -> TimelinePoint:
    if isinstance(value, str):
        return msgspec.json.decode(value, type=TimelinePoint)
    return msgspec.convert(value, TimelinePoint)
