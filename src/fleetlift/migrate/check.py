"""Checking a plan against the fleet before anything moves: which devices, which waves, what is missing."""

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from fleetlift.core import where
from fleetlift.core.errors import FleetError
from fleetlift.core.gates import Gate, Source
from fleetlift.core.migration import FleetDevice
from fleetlift.core.plan import Plan, gates_of, ladder
from fleetlift.core.selection import cannot_move, selected
from fleetlift.core.units import Share, format_devices, format_duration
from fleetlift.core.waves import approved, ordered
from fleetlift.migrate.controller import read_inventory
from fleetlift.migrate.forecast import Forecast, Pace, forecast, hopeless
from fleetlift.migrate.free_queries import free_sql, prometheus
from fleetlift.migrate.planfile import parse_plan
from fleetlift.store import claims
from fleetlift.store.pool import Pool

SHOWN_MAX = 1000  # devices named in one list of the answer
RECENT_S = 3600.0
MESSAGES_SPAN_S = 600.0
FAR_ABOVE = 3.0  # times the bake: what a gate needs beyond that is told
LONG_S = 60.0


class Severity(StrEnum):
    ERROR = "error"  # the migration would not start, or could not go on
    WARNING = "warning"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is missing or doubtful, and what to do. `kind` is a stable name."""

    severity: Severity
    kind: str
    text: str


class Excluded(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    reason: str


class PlannedWave(msgspec.Struct, frozen=True, kw_only=True):
    """One wave: its share as written, how many devices it adds, and how many stand on its rung then."""

    label: str
    adds: int
    total: int


class PlannedRung(msgspec.Struct, frozen=True, kw_only=True):
    """One step's stage. `bake_s`: how long each wave is watched at the least; `gates`: what must hold."""

    rung: int
    step: str
    stage: str
    bake_s: float
    approve: bool
    gates: tuple[str, ...]
    waves: tuple[PlannedWave, ...]
    forecasts: tuple[Forecast, ...] = ()  # of gates that wait until they are sure


class PlanCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What `migrate check` says. `order` are the first devices to move; lists are cut at `SHOWN_MAX`."""

    ok: bool
    migration: str
    tenant: str
    from_side: str
    to_side: str
    inventory: int  # devices the old side knows
    selected: int  # of these, what the plan's condition selects
    movable: int
    connected: int  # of the movable ones, connected to the old side now
    order: tuple[str, ...]
    excluded: tuple[Excluded, ...]
    excluded_total: int
    rungs: tuple[PlannedRung, ...]
    takes_s: float  # at least: every wave that adds devices bakes once
    findings: tuple[Finding, ...]


async def check_plan(engine: Pool, backend: Pool, plan_text: str) -> PlanCheck:
    """Read the fleet from the old side and lay the plan over it. Raises BadInput for the plan's own mistakes.

    A side that does not answer is a finding, not an error: the rest of the plan is shown all the same.
    """
    plan = parse_plan(plan_text)
    findings: list[Finding] = []
    inventory: tuple[FleetDevice, ...] = ()
    try:
        inventory = await read_inventory(plan)
    except FleetError as problem:
        findings.append(
            Finding(severity=Severity.ERROR, kind="old_side_away", text=f"The old side: {problem}")
        )
    fleet = selected(plan, inventory)
    shown = lay_out(plan, inventory, fleet)
    if inventory:
        findings += fleet_findings(plan, inventory, fleet)
    findings += await _engine_findings(engine, plan, fleet)
    findings += await _gate_findings(backend, plan)
    if shown.movable:
        pace = await _pace(backend, plan)
        rungs = tuple(_foreseen(plan, planned, shown.movable, pace) for planned in shown.rungs)
        shown = msgspec.structs.replace(shown, rungs=rungs)
    findings += certainty_findings(plan, shown.rungs)
    return msgspec.structs.replace(
        shown, findings=tuple(findings), ok=all(f.severity is not Severity.ERROR for f in findings)
    )


def lay_out(plan: Plan, inventory: Sequence[FleetDevice], fleet: Sequence[FleetDevice]) -> PlanCheck:
    """Devices and waves of the plan, as the controller would take them now."""
    reasons = {d.id: cannot_move(plan.fleet, d) for d in fleet}
    movable = [d for d in fleet if reasons[d.id] is None]
    order = ordered(plan.name, plan.fleet.canaries, [d.id for d in movable])
    excluded = [Excluded(device=i, reason=why) for i, why in sorted(reasons.items()) if why is not None]
    takes_s = 0.0
    rungs: list[PlannedRung] = []
    below: list[Share] = []
    for rung in ladder(plan)[1:]:
        waves, before = [], 0
        for number, share in enumerate(rung.waves, 1):
            last = number == len(rung.waves)
            most = approved((share, *below), len(order), control=plan.fleet.control, last=last)
            total = max(before, most)
            waves.append(PlannedWave(label=str(share), adds=total - before, total=total))
            takes_s += rung.bake_s if total > before else 0.0
            before = total
        below.append(rung.waves[-1])
        rungs.append(
            PlannedRung(
                rung=rung.index,
                step=str(rung.move),
                stage=rung.stage,
                bake_s=rung.bake_s,
                approve=rung.approve,
                gates=tuple(gate.text for gate in rung.gates),
                waves=tuple(waves),
            )
        )
    return PlanCheck(
        ok=True,
        migration=plan.name,
        tenant=plan.fleet.tenant,
        from_side=plan.old.kind,
        to_side=plan.new.kind,
        inventory=len(inventory),
        selected=len(fleet),
        movable=len(movable),
        connected=sum(d.connected for d in movable),
        order=order[:SHOWN_MAX],
        excluded=tuple(excluded[:SHOWN_MAX]),
        excluded_total=len(excluded),
        rungs=tuple(rungs),
        takes_s=takes_s,
        findings=(),
    )


def fleet_findings(
    plan: Plan, inventory: Sequence[FleetDevice], fleet: Sequence[FleetDevice]
) -> list[Finding]:
    """What the fleet itself lacks: attributes no device has, canaries that are not there, nothing to move."""
    found = []
    known = {f"attributes.{name}" for d in inventory for name in d.attributes}
    for condition in filter(str.strip, (plan.fleet.where, plan.fleet.updatable)):
        for name in sorted(where.attributes_used(where.parse(condition))):
            if not any(name == k or name.startswith(f"{k}.") for k in known):
                found.append(
                    Finding(
                        severity=Severity.WARNING,
                        kind="unknown_attribute",
                        text=f"No device has {name}, which {condition!r} asks for: check its spelling. "
                        f"Known are {', '.join(sorted(known)[:12]) or 'none'}.",
                    )
                )
    movable = {d.id for d in fleet if cannot_move(plan.fleet, d) is None}
    strangers = [c for c in plan.fleet.canaries if c not in movable]
    if strangers:
        found.append(
            Finding(
                severity=Severity.WARNING,
                kind="canary_not_there",
                text=f"Canaries that cannot go first: {', '.join(strangers[:10])}. They are not among the "
                "devices to be moved.",
            )
        )
    if not movable:
        found.append(
            Finding(
                severity=Severity.ERROR,
                kind="nothing_to_move",
                text=f"No device can be moved: {len(inventory):,} known, {len(fleet):,} selected.",
            )
        )
    away = sum(not d.connected for d in fleet if d.id in movable)
    if away:
        found.append(
            Finding(
                severity=Severity.WARNING,
                kind="devices_away",
                text=f"{format_devices(away)} of {len(movable):,} to be moved "
                f"{'is' if away == 1 else 'are'} not connected now: told when they are back, "
                "stragglers until then.",
            )
        )
    return found


async def _engine_findings(engine: Pool, plan: Plan, fleet: Sequence[FleetDevice]) -> list[Finding]:
    found = []
    async with engine.acquire() as conn:
        phase = await conn.fetchval("SELECT phase FROM engine.migration WHERE name = $1", plan.name)
        taken = await claims.claimed(conn, [d.id for d in fleet])
    if phase is not None:
        found.append(
            Finding(
                severity=Severity.WARNING,
                kind="name_taken",
                text=f"A migration {plan.name!r} exists already ({phase}): amend it, or choose another name.",
            )
        )
    others = sorted({(m, d) for d, m in taken if m != plan.name})
    if others:
        names = sorted({m for m, _ in others})
        found.append(
            Finding(
                severity=Severity.ERROR,
                kind="devices_taken",
                text=f"{format_devices(len(others))} are part of {', '.join(names)} ({others[0][1]}, for "
                "one): revert or release that first.",
            )
        )
    return found


async def _gate_findings(backend: Pool, plan: Plan) -> list[Finding]:
    """Gates that would have no data: a gate without data never lets a wave advance."""
    found = []
    gates = gates_of(plan)
    by_commands = [g for g in gates if g.metric.startswith("commands.")]
    if by_commands:
        async with backend.acquire() as conn:
            sent = await conn.fetchval(
                "SELECT count(*) FROM command "
                "WHERE tenant = $1 AND created_at > now() - make_interval(secs => $2)",
                plan.fleet.tenant,
                RECENT_S,
            )
        if not sent:
            found.append(
                Finding(
                    severity=Severity.WARNING,
                    kind="gate_without_data",
                    text=f"{', '.join(g.text for g in by_commands)}: no command was sent in the last hour. "
                    "Without commands these gates have no data, and no wave of theirs advances.",
                )
            )
    for gate in gates:
        if gate.source is not Source.METRIC and (why := await unreadable(backend, gate)):
            found.append(
                Finding(severity=Severity.WARNING, kind="gate_without_data", text=f"{gate.text}: {why}")
            )
    return found


async def _pace(backend: Pool, plan: Plan) -> Pace:
    """What the fleet's devices have lately done, as far as this backend has seen it."""
    async with backend.acquire() as conn:
        row = await conn.fetchrow(
            "SELECT (SELECT count(*) FROM device WHERE tenant = $1) AS devices, "
            "(SELECT count(*) FROM command WHERE tenant = $1 "
            "AND created_at > now() - make_interval(secs => $2)) AS commands, "
            "(SELECT extract(epoch FROM now() - min(created_at))::float8 FROM command WHERE tenant = $1 "
            "AND created_at > now() - make_interval(secs => $2)) AS span, "
            "(SELECT sum(messages) / count(DISTINCT device) / $3::float8 FROM receipt_window "
            "WHERE window_start > now() - make_interval(secs => $3::float8) "
            "AND device IN (SELECT id FROM device WHERE tenant = $1)) AS messages",
            plan.fleet.tenant,
            RECENT_S,
            MESSAGES_SPAN_S,
        )
    assert row is not None
    commands = row["commands"] / max(row["span"], 1.0) / row["devices"] if row["commands"] else None
    return Pace(messages=row["messages"], commands=commands)


def _foreseen(plan: Plan, planned: PlannedRung, movable: int, pace: Pace) -> PlannedRung:
    rung = ladder(plan)[planned.rung]
    waves = tuple((wave.adds, movable - wave.total) for wave in planned.waves)
    bounded = (gate for gate in rung.gates if gate.bounded)
    return msgspec.structs.replace(planned, forecasts=tuple(forecast(gate, waves, pace) for gate in bounded))


def certainty_findings(plan: Plan, rungs: Sequence[PlannedRung]) -> list[Finding]:
    """Gates that are never sure, or long after the bake; gates that need not be sure at all."""
    found: list[Finding] = []

    def warn(kind: str, text: str) -> None:
        if not any(f.text == text for f in found):
            found.append(Finding(severity=Severity.WARNING, kind=kind, text=text))

    for rung in ladder(plan)[1:]:
        for gate in rung.gates:
            if gate.sampled and gate.confidence is None:
                warn(
                    "no_confidence",
                    f"{gate.text}: confidence is none, so figures are compared as they are. Looked at all "
                    "the time, a good wave goes back and a bad one passes by chance sooner or later.",
                )
            elif gate.bounded and hopeless(gate):
                warn(
                    "gate_never_decided",
                    f"{gate.text} can never be decided: a limit of all, or exactly that of the old side, "
                    "leaves no room to be sure. Allow a little, as in 99.9%, 1.2 x old or old - 0.5%.",
                )
    texts = {gate.text: gate for gate in gates_of(plan)}
    for planned in rungs:
        name = f"{planned.step}: {planned.stage}"
        for one in planned.forecasts:
            if hopeless(texts[one.gate]):
                continue
            for i in one.never:
                warn(
                    "gate_never_decided",
                    f"{name}, wave {planned.waves[i].label}: {planned.waves[i].adds:,} devices are too few "
                    f"for {one.gate} ever to be decided. Make the wave larger, or add an absolute limit.",
                )
            slow = [
                (seconds, wave.label)
                for seconds, wave in zip(one.waves_s, planned.waves, strict=True)
                if seconds is not None and seconds > max(FAR_ABOVE * planned.bake_s, LONG_S)
            ]
            if slow:
                seconds, label = max(slow)
                warn(
                    "gate_takes_long",
                    f"{name}, wave {label}: {one.gate} needs {format_duration(coarse(seconds))} at the "
                    f"soonest, the bake is {format_duration(planned.bake_s)}. The wave waits for it; more "
                    "traffic, larger waves or a laxer limit shorten that.",
                )
    return found


def coarse(seconds: float) -> float:
    """Rounded to what a reader wants to know."""
    size = next(s for upto, s in ((120, 1), (7200, 60), (86_400, 900), (math.inf, 86_400)) if seconds <= upto)
    return math.ceil(seconds / size) * size


async def unreadable(backend: Pool, gate: Gate) -> str | None:
    """Why a free query gives no figure now; None when it does."""
    if gate.source is Source.PROMETHEUS:
        sample = await prometheus(gate.url, gate.query)
    else:
        sample = await free_sql(backend, gate.query)
    if sample.value is None:
        return f"gives no figure now ({sample.evidence.get('summary', 'no rows')})"
    return None
