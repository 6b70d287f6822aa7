"""The report of a tenant's move: the same kind of page as a fleet's, with plots of its own.

`render` is pure: facts in, page out. `report_html` reads the facts from the engine's tables.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.core.load_result import LoadResult
from fleetlift.core.tenant.status import MovePoint, StepLine
from fleetlift.migrate.load_section import load_section
from fleetlift.migrate.page import (
    AuditLine,
    Figure,
    audit_lines,
    audit_section,
    mark_legend,
    marks_of,
    page,
    section,
    table,
    tiles,
)
from fleetlift.migrate.plots import Mark, Series, bands, lines, value_label
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.migrate.tenant_status import step_lines
from fleetlift.store import engine as store
from fleetlift.store import tenant_moves
from fleetlift.store.pool import Pool

POINTS_MAX = 600


class MoveReport(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one page. `figures` wins over the verdict made of the steps; `loads`: its load tests."""

    name: str
    tenant: str
    phase: str
    reason: str
    plan: str
    plan_version: int
    started_at: float
    ended_at: float
    steps: Sequence[StepLine]
    points: Sequence[tuple[float, MovePoint]]
    audit: Sequence[AuditLine]
    figures: Sequence[Figure] = ()
    loads: Sequence[LoadResult] = ()
    chain_head: str = ""


def render(data: MoveReport) -> str:
    """The page. Deterministic: the same facts give the same bytes."""
    span = max(data.ended_at - data.started_at, 1.0)
    marks = marks_of(data.audit, data.started_at)
    times = _times(data)
    sections = [
        tiles(data.figures or _figures(data)),
        section("Steps", _steps(data)),
        section("Rows over time", _rows(times, span, marks), mark_legend(marks)),
        section("How far the other database is behind", _lag(times, span, marks)),
        section("Writes while the database was switched", _freeze(data)),
        section("Traffic by side", _traffic(times, span, marks)),
        *_loads(data),
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


def _times(data: MoveReport) -> list[tuple[float, MovePoint]]:
    every, last = max(1, len(data.points) // POINTS_MAX), len(data.points) - 1
    return [
        (at - data.started_at, point)
        for i, (at, point) in enumerate(data.points)
        if i % every == 0 or i == last
    ]


def figure_of(data: MoveReport, name: str) -> Any:
    """The newest figure of that name among the steps, None when no step has it."""
    found = None
    for step in data.steps:
        found = step.figures.get(name, found)
    return found


def _figures(data: MoveReport) -> list[Figure]:
    """The verdict: what came, what was lost or strange, how long writers stood still."""
    shown = []
    for name, label, zero in (
        ("rows_verified", "rows on the target, every one verified", False),
        ("rows_missing", "rows missing", True),
        ("rows_foreign", "rows of other tenants", True),
        ("rows_differing", "rows that differ", True),
        ("writes_refused", "writes refused while the database was switched", None),
    ):
        value = figure_of(data, name)
        if value is not None:
            good = None if zero is None else (value == 0 if zero else value > 0)
            shown.append(Figure(label=label, value=f"{value:,}", good=good))
    freeze_s = figure_of(data, "freeze_s")
    if freeze_s is not None:
        shown.append(Figure(label="writers stood still", value=value_label(float(freeze_s), "s")))
    return shown


def _steps(data: MoveReport) -> str:
    rows = []
    for step in data.steps:
        took = ""
        if step.started_at is not None and step.ended_at is not None:
            took = value_label(step.ended_at - step.started_at, "s")
        figures = ", ".join(
            f"{k} {_shown(v)}" for k, v in step.figures.items() if not isinstance(v, list | dict)
        )
        rows.append(
            f"<tr><td>{escape(step.name)}</td><td>{escape(step.phase.value)}</td><td class=n>{took}</td>"
            f"<td>{escape(step.text)}<br><small>{escape(figures)}</small></td></tr>"
        )
    return table(("step", "is", "took", "what it says"), rows, figures_from=2)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _rows(times: Sequence[tuple[float, MovePoint]], span: float, marks: Sequence[Mark]) -> str:
    if not any(point.rows_copied is not None for _, point in times):
        return "<p>Nothing was copied.</p>"
    series = [
        Series(name="copied", role="new", points=[(t, _number(p.rows_copied)) for t, p in times]),
        Series(name="applied", role="both", points=[(t, _number(p.rows_applied)) for t, p in times]),
    ]
    return lines(series, title="Rows copied, and changes applied", span=span, unit="", marks=marks)


def _lag(times: Sequence[tuple[float, MovePoint]], span: float, marks: Sequence[Mark]) -> str:
    if not any(point.lag_s is not None for _, point in times):
        return "<p>Nothing was followed.</p>"
    series = [Series(name="lag", role="old", points=[(t, p.lag_s) for t, p in times])]
    return lines(series, title="Lag of the stream", span=span, unit="s", marks=marks)


def _freeze(data: MoveReport) -> str:
    phases = figure_of(data, "freeze_steps")
    if not isinstance(phases, list) or not phases:
        return "<p>The database was not switched.</p>"
    whole = sum(took for _, took in phases) or 1.0
    rows, began = [], 0.0
    for name, took in phases:
        bar = (
            f'<svg width="100%" height="12" role="img" aria-label="{escape(name)}">'
            f'<rect class="s-new" x="{100 * began / whole:.2f}%" width="{max(100 * took / whole, 0.3):.2f}%" '
            'height="12" fill="currentColor"></rect></svg>'
        )
        rows.append(
            f"<tr><td>{escape(str(name))}</td><td class=n>{value_label(float(took), 's')}</td>"
            f'<td style="width:60%">{bar}</td></tr>'
        )
        began += took
    return table(("while writers stood still", "took", ""), rows, figures_from=1)


def _traffic(times: Sequence[tuple[float, MovePoint]], span: float, marks: Sequence[Mark]) -> str:
    known = [(t, p) for t, p in times if p.at_old is not None or p.at_new is not None]
    if not known:
        return "<p>No names were switched, or nobody counted who comes where.</p>"
    devices = bands(
        [
            Series(name="new side", role="new", points=[(t, _number(p.at_new)) for t, p in known]),
            Series(name="old address", role="old", points=[(t, _number(p.at_old)) for t, p in known]),
        ],
        title="Devices by the address they come to",
        span=span,
        unit="",
        marks=marks,
        height=240,
    )
    rates = lines(
        [
            Series(name="old side", role="old", points=[(t, p.rate_old) for t, p in known]),
            Series(name="new side", role="new", points=[(t, p.rate_new) for t, p in known]),
        ],
        title="Messages a second by side",
        span=span,
        unit="/s",
        marks=marks,
    )
    return devices + rates


def _loads(data: MoveReport) -> list[str]:
    if not data.loads:
        return [section("Load on the new side", "<p>The plan has no load test, or it has not ended.</p>")]
    return [load_section(one, heading="Load on the new side") for one in data.loads]


def load_file(directory: Path, name: str, at: int) -> Path:
    """Where the mover keeps the result of the load test that is step `at`."""
    return directory / "moves" / name / f"load-{at}.json"


def _number(value: int | None) -> float | None:
    return None if value is None else float(value)


async def report_html(engine: Pool, name: str, directory: Path) -> str:
    """The report of a move as it stands now. Raises NotFound."""
    return render(await read_report(engine, name, directory))


async def read_report(engine: Pool, name: str, directory: Path, figures: Sequence[Figure] = ()) -> MoveReport:
    """The facts of a report, from the engine's records, and what load tests left in the data directory."""
    async with engine.acquire() as conn:
        stored = await tenant_moves.load(conn, name)
        points = await store.samples_of(conn, name, MovePoint)
    audit = await engine.fetch(
        "SELECT at, actor, kind, text, evidence, hash FROM engine.audit WHERE migration = $1 ORDER BY id",
        name,
    )
    plan = parse_tenant_plan(stored.head.plan, file=f"{name}.yaml")
    return MoveReport(
        name=name,
        tenant=stored.head.tenant,
        phase=stored.state.phase.value,
        reason=stored.state.reason,
        plan=stored.head.plan,
        plan_version=stored.head.plan_version,
        started_at=stored.head.created_at,
        ended_at=points[-1][0] if points else stored.head.updated_at,
        steps=step_lines(plan, stored),
        points=points,
        audit=audit_lines([dict(row) for row in audit]),
        figures=figures,
        loads=[
            msgspec.json.decode(path.read_bytes(), type=LoadResult)
            for at in range(len(plan.steps))
            if (path := load_file(directory, name, at)).is_file()
        ],
        chain_head=(audit[-1]["hash"] or "") if audit else "",
    )
