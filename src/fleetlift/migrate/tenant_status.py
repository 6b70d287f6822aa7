"""How a tenant's move stands, from the engine's tables alone: a few small queries, cheap enough to poll."""

from urllib.parse import urlsplit

from fleetlift.core.migration import Phase
from fleetlift.core.status import EventLine
from fleetlift.core.tenant.plan import TenantPlan, step_name, waves_of
from fleetlift.core.tenant.status import MoveMoment, MovePoint, MoveStatus, StepLine
from fleetlift.migrate.status import EVENTS, TIMELINE_POINTS, TIMELINE_S, thinned
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.store import audit, tenant_moves
from fleetlift.store import engine as store
from fleetlift.store.pool import Pool
from fleetlift.store.tenant_moves import StoredMove

_OVER = (Phase.FINISHED, Phase.REVERTED, Phase.RELEASED)


async def read_move_status(engine: Pool, name: str, *, now: float) -> MoveStatus:
    """The status of one move. Raises NotFound when there is none of that name."""
    async with engine.acquire() as conn:
        stored = await tenant_moves.load(conn, name)
        events = await audit.newest(conn, name, EVENTS)
        points = await store.samples_of(conn, name, MovePoint, since=now - TIMELINE_S)
        ended = await audit.ended_at(conn, name)
        asked = await store.open_request_count(conn, name)
    plan = parse_tenant_plan(stored.head.plan, file=f"{name}.yaml")
    state = stored.state
    return MoveStatus(
        name=name,
        tenant=stored.head.tenant,
        source=shown_address(plan.source.url),
        target=shown_address(plan.target.url),
        phase=state.phase,
        reason=state.reason,
        way_back=state.way_back,
        plan_version=stored.head.plan_version,
        started_at=stored.head.created_at,
        now=now,
        ended_at=ended if state.phase in _OVER else None,
        step=state.step,
        steps=step_lines(plan, stored),
        reverts=state.reverts,
        gates=stored.head.gates,
        timeline=tuple(MoveMoment(at=at, point=point) for at, point in thinned(points, TIMELINE_POINTS)),
        events=tuple(EventLine(id=e.id, at=e.at, actor=e.actor, kind=e.kind, text=e.text) for e in events),
        open_requests=asked,
        controller_seen_at=max([stored.head.updated_at, *(at for at, _ in points[-1:])]),
    )


def step_lines(plan: TenantPlan, stored: StoredMove) -> tuple[StepLine, ...]:
    """The plan's steps with where each is."""
    return tuple(
        StepLine(
            name=step_name(step),
            phase=one.phase,
            wave=one.wave,
            waves=waves_of(step),
            text=one.text,
            figures=one.figures,
            started_at=one.started_at,
            ended_at=one.ended_at,
        )
        for step, one in zip(plan.steps, stored.state.steps, strict=False)
    )


def shown_address(url: str) -> str:
    """A database's address as people know it: `host/name`, without user, password and options."""
    parts = urlsplit(url)
    return f"{parts.hostname or 'local'}{f':{parts.port}' if parts.port else ''}{parts.path}"
