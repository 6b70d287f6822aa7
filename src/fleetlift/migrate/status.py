"""How a migration stands, from the engine's tables alone: a few small queries, cheap enough to poll."""

from collections.abc import Sequence
from statistics import median
from typing import TypeVar

from fleetlift.core.migration import MemberState, MigrationState, Phase, WavePhase
from fleetlift.core.orders import CommandsFlag, Flags, TelemetryFlag
from fleetlift.core.plan import Plan, Rung, ladder
from fleetlift.core.status import (
    EventLine,
    Mark,
    MigrationStatus,
    Moment,
    RungStatus,
    Straggler,
    WaveStatus,
)
from fleetlift.core.waves import approved
from fleetlift.migrate.planfile import parse_plan
from fleetlift.store import audit
from fleetlift.store import engine as store
from fleetlift.store.engine import MemberCount
from fleetlift.store.pool import Pool

T = TypeVar("T")

EVENTS = 12
STRAGGLERS = 20
TIMELINE_S = 300.0
TIMELINE_POINTS = 120
MOVE_S_GUESS = 5.0  # how long a wave's move takes while none has been seen
_OVER = (Phase.FINISHED, Phase.REVERTED, Phase.RELEASED)
_GOING_BACK = (Phase.REVERTING, Phase.REVERTED)


async def read_status(engine: Pool, name: str, *, now: float) -> MigrationStatus:
    """The status of one migration. Raises NotFound when there is none of that name."""
    async with engine.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        stored = await store.head(conn, name)
        counts = await store.member_counts(conn, name)
        late = await store.members_page(conn, name, states=[MemberState.STRAGGLER], limit=STRAGGLERS)
        events = await audit.newest(conn, name, EVENTS)
        points = await store.samples(conn, name, since=now - TIMELINE_S)
        times = await audit.wave_times(conn, name)
        ended = await audit.ended_at(conn, name)
        asked = await store.open_request_count(conn, name)
    plan = parse_plan(stored.plan, file=f"{name}.yaml")
    rungs = ladder(plan)
    state = stored.state
    rung = rungs[min(max(state.rung, 1), len(rungs) - 1)]
    part = [c for c in counts if c.state is not MemberState.EXCLUDED]
    taking_part = sum(c.devices for c in part)
    by_side = {"old": 0, "both": 0, "new": 0}
    for count in part:
        by_side[side_of(rungs[min(standing(count), len(rungs) - 1)].flags)] += count.devices
    shown = _rungs(plan, state, rungs, part, taking_part)
    return MigrationStatus(
        name=name,
        tenant=stored.tenant,
        from_side=plan.old.kind,
        to_side=plan.new.kind,
        phase=state.phase,
        reason=state.reason,
        plan_version=stored.plan_version,
        started_at=stored.created_at,
        now=now,
        ended_at=ended if state.phase in _OVER else None,
        time_left_s=time_left(plan, state, shown, times, now),
        lever=plan.lever,
        on_breach=plan.on_breach.value,
        rung=state.rung,
        wave=state.wave,
        wave_phase=state.wave_phase,
        bake_s=rung.bake_s,
        bake_started_at=state.bake_started_at,
        rungs=shown,
        devices=taking_part,
        devices_old=by_side["old"],
        devices_both=by_side["both"],
        devices_new=by_side["new"],
        moving=_sum(part, MemberState.MOVING, MemberState.RETURNING),
        excluded=_sum(counts, MemberState.EXCLUDED),
        never_seen=sum(c.never_seen for c in counts),
        reverts=state.reverts,
        stragglers=tuple(Straggler(device=m.device, reason=m.reason, since=m.told_at) for m in late),
        stragglers_total=_sum(counts, MemberState.STRAGGLER),
        gates=stored.gates,
        timeline=tuple(Moment(at=at, point=point) for at, point in thinned(points, TIMELINE_POINTS)),
        events=tuple(EventLine(id=e.id, at=e.at, actor=e.actor, kind=e.kind, text=e.text) for e in events),
        open_requests=asked,
        controller_seen_at=max([stored.updated_at, *(at for at, _ in points[-1:])]),
    )


def thinned(points: Sequence[T], most: int) -> list[T]:
    """At most `most` of them, evenly, the newest always among them."""
    every = -(-len(points) // most) or 1
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % every == 0]


def side_of(flags: Flags) -> str:
    """`old`, `both` or `new`: where telemetry and commands go under these flags."""
    if flags == Flags():
        return "old"
    if flags.telemetry is TelemetryFlag.NEW and flags.commands is CommandsFlag.NEW:
        return "new"
    return "both"


def standing(count: MemberCount) -> int:
    """The rung whose flags these members obey as far as is known."""
    moving = count.state in (MemberState.MOVING, MemberState.STRAGGLER)
    return count.came_from if moving else count.rung


def _sum(counts: Sequence[MemberCount], *states: MemberState) -> int:
    return sum(c.devices for c in counts if c.state in states)


def _rungs(
    plan: Plan, state: MigrationState, rungs: Sequence[Rung], counts: Sequence[MemberCount], fleet: int
) -> tuple[RungStatus, ...]:
    shown = []
    for rung in rungs[1:]:
        mark = _rung_mark(state, rung.index)
        shown.append(
            RungStatus(
                rung=rung.index,
                step=str(rung.move),
                stage=rung.stage,
                mark=mark,
                devices=sum(c.devices for c in counts if standing(c) >= rung.index),
                waves=_waves(plan, state, rungs, rung, fleet, mark),
            )
        )
    return tuple(shown)


def _rung_mark(state: MigrationState, index: int) -> Mark:
    if state.phase in _GOING_BACK:
        return Mark.RETURNED if index <= state.rung else Mark.WAITING
    if index < state.rung or state.phase in (Phase.FINISHED, Phase.RELEASED):
        return Mark.DONE
    return Mark.OPEN if index == state.rung else Mark.WAITING


def _waves(
    plan: Plan, state: MigrationState, rungs: Sequence[Rung], rung: Rung, fleet: int, mark: Mark
) -> tuple[WaveStatus, ...]:
    below = [lower.waves[-1] for lower in rungs[1 : rung.index]]
    before, shown = 0, []
    for place, share in enumerate(rung.waves):
        last = place + 1 == len(rung.waves)
        most = approved((share, *below), fleet, control=plan.fleet.control, last=last)
        limit = max(before, most)
        adds, before = limit - before, limit
        if mark is Mark.OPEN:
            now = Mark.DONE if place < state.wave else Mark.WAITING
            if place == state.wave:
                now = Mark.RETURNED if state.wave_phase is WavePhase.RETURNING else Mark.OPEN
        else:
            now = mark
        if adds == 0 and now in (Mark.DONE, Mark.WAITING):
            now = Mark.SKIPPED
        shown.append(WaveStatus(label=str(share), devices=adds, mark=now))
    return tuple(shown)


def time_left(
    plan: Plan, state: MigrationState, rungs: Sequence[RungStatus], moves_s: Sequence[float], now: float
) -> float | None:
    """Seconds until the end if every gate holds: bakes still to come, moves as long as they were so far."""
    if state.phase is not Phase.RUNNING:
        return 0.0 if state.phase in _OVER else None
    bakes = {rung.index: rung.bake_s for rung in ladder(plan)}
    move_s = median(moves_s) if moves_s else MOVE_S_GUESS
    left = 0.0
    for rung in rungs:
        for wave in rung.waves:
            if wave.mark is Mark.WAITING:
                left += move_s + bakes[rung.rung]
            elif wave.mark is Mark.OPEN:
                if state.bake_started_at is not None:
                    left += max(0.0, state.bake_started_at + bakes[rung.rung] - now)
                elif state.wave_opened_at is not None:
                    left += max(0.0, state.wave_opened_at + move_s - now) + bakes[rung.rung]
                else:
                    left += move_s + bakes[rung.rung]
    return left
