"""Migrations: check and start a plan, watch it, steer it, read what happened and why."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any, cast

import msgspec
from litestar import Response, Router, get, post
from litestar.enums import MediaType
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage

from fleetlift.api.auth import OPERATOR, VIEWER, bearer_of
from fleetlift.api.wire import (
    LIMIT,
    After,
    Call,
    Limit,
    Listing,
    Services,
    moment,
    owned_tenant,
    services,
    stamp,
)
from fleetlift.core.certificate import Certificate
from fleetlift.core.errors import BadInput, Conflict, Forbidden, NotFound, Unavailable
from fleetlift.core.migration import Member, MemberState, RequestKind
from fleetlift.core.plan import check_amendment
from fleetlift.core.status import written_moments
from fleetlift.core.tenant.plan import TenantPlan, check_tenant_amendment
from fleetlift.migrate import certificate, check, controller, report, status, tenant_check, tenant_report
from fleetlift.migrate.check import PlanCheck
from fleetlift.migrate.parity import ParityReport, read_parity
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.tenant_check import FILES_MAX, MoveCheck
from fleetlift.migrate.tenant_planfile import parse_any_plan, parse_tenant_plan
from fleetlift.migrate.tenant_status import read_move_status
from fleetlift.store import audit, claims
from fleetlift.store import engine as store
from fleetlift.store.audit import AuditRow
from fleetlift.store.claims import Claimed
from fleetlift.store.engine import TENANT, StoredMigration
from fleetlift.store.paging import from_cursor, to_cursor
from fleetlift.store.pool import Conn

PLAN_CHARS_MAX = 256 * 1024
STREAMS_MAX = 100
STREAM_POLL_S = 0.5
STREAM_KEEPALIVE_S = 15.0
STREAM_CHECK_S = 5.0  # how often a stream asks whether its token still holds
WAIT_S_MAX = 20.0

Wait = Annotated[
    float,
    QueryParameter(ge=0, le=WAIT_S_MAX, description="Seconds to wait for the controller to deal with it."),
]


class PlanIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`plan`: the plan file, as text. `files`: those that it names (scenarios of load), by name."""

    plan: Annotated[str, msgspec.Meta(min_length=1, max_length=PLAN_CHARS_MAX)]
    files: Annotated[dict[str, str], msgspec.Meta(max_length=FILES_MAX)] = {}


class RevertIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nothing: everything goes back. `wave`: the open wave does. `device`: this one does."""

    wave: bool = False
    device: str | None = None


class ResumeIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes on: everything (the default), or one device that was sent back takes part again."""

    device: str | None = None


class ReleaseIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`force`: also while there are devices that have not moved; they are given up."""

    force: bool = False


class MigrationOut(msgspec.Struct, frozen=True, kw_only=True):
    """A migration in a list. `GET /migrations/{name}` says more."""

    name: str
    kind: str
    tenant: str
    phase: str
    reason: str
    rung: int
    wave: int
    wave_phase: str
    plan_version: int
    reverts: int
    created_by: str
    created_at: datetime
    updated_at: datetime


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of the controller. `answered`: it has dealt with it; the audit log says how."""

    request: int
    kind: str
    answered: bool


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the audit log, with the figures that led to it."""

    id: int
    at: datetime
    actor: str
    kind: str
    text: str
    evidence: dict[str, Any]


class MemberOut(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a migration. `rank` is its place in the order of waves; `rung` where it stands."""

    device: str
    rank: int
    rung: int
    epoch: int
    state: str
    reason: str
    wave: int | None
    told_at: datetime | None
    moved_at: datetime | None


def shown(m: StoredMigration) -> MigrationOut:
    return MigrationOut(
        name=m.name,
        kind=m.kind,
        tenant=m.tenant,
        phase=m.state.phase.value,
        reason=m.state.reason,
        rung=m.state.rung,
        wave=m.state.wave,
        wave_phase=m.state.wave_phase.value,
        plan_version=m.plan_version,
        reverts=m.state.reverts,
        created_by=m.created_by,
        created_at=moment(m.created_at),
        updated_at=moment(m.updated_at),
    )


def shown_event(row: AuditRow) -> Event:
    return Event(
        id=row.id, at=moment(row.at), actor=row.actor, kind=row.kind, text=row.text, evidence=row.evidence
    )


def shown_member(m: Member) -> MemberOut:
    return MemberOut(
        device=m.device,
        rank=m.rank,
        rung=m.rung,
        epoch=m.epoch,
        state=m.state.value,
        reason=m.reason,
        wave=m.wave,
        told_at=stamp(m.told_at),
        moved_at=stamp(m.moved_at),
    )


async def visible(conn: Conn, request: Call, name: str) -> StoredMigration:
    """The migration without its members; NotFound also for another tenant's."""
    found = await store.head(conn, name)
    if request.user.tenant not in (None, found.tenant):
        raise NotFound(f"no migration named {name!r}: `fleetlift migrate list` shows those there are")
    return found


def of_a_fleet(stored: StoredMigration, what: str) -> StoredMigration:
    """Raises Conflict for a tenant's move, which has no such thing."""
    if stored.kind == TENANT:
        raise Conflict(
            f"{stored.name!r} moves a tenant, and only a fleet's migration has {what}: "
            "its report has the audit log"
        )
    return stored


def may_bring_plans(request: Call) -> None:
    """A plan names servers to connect to and queries to run with the server's own rights."""
    if request.user.tenant is not None:
        raise Forbidden(
            "A plan names servers and queries, so it takes a token of every tenant to bring one. "
            "Pausing, approving and reverting are open to the tenant's operators."
        )


@get("/", opt=VIEWER, summary="List migrations")
async def list_migrations(request: Call, limit: Limit = LIMIT, after: After = None) -> Listing[MigrationOut]:
    """By name."""
    last = "" if after is None else from_cursor(after, tuple[str])[0]
    async with services(request).engine.acquire() as conn:
        found = await store.listed(conn, tenant=owned_tenant(request), after=last, limit=limit + 1)
    more = len(found) > limit
    return Listing([shown(m) for m in found[:limit]], to_cursor(found[limit - 1].name) if more else None)


@post("/", opt=OPERATOR, summary="Start a migration")
async def start_migration(request: Call, data: JSONBody[PlanIn]) -> MigrationOut:
    """The plan is checked first; with a mistake in it nothing starts. Tokens of every tenant only."""
    may_bring_plans(request)
    found = services(request)
    plan = parse_any_plan(data.plan)
    if isinstance(plan, TenantPlan):
        await tenant_check.start_move(
            found.engine, data.plan, data.files, actor=request.user.name, now=time.time()
        )
    else:
        await controller.start_migration(found.engine, data.plan, actor=request.user.name, now=time.time())
    async with found.engine.acquire() as conn:
        return shown(await store.head(conn, plan.name))


@post("/check", opt=OPERATOR, status_code=200, summary="Check a plan against the fleet")
async def check_plan(request: Call, data: JSONBody[PlanIn]) -> PlanCheck | MoveCheck:
    """Which devices and waves, or which tables and names; what is missing. Nothing moves."""
    may_bring_plans(request)
    found = services(request)
    plan = parse_any_plan(data.plan)
    if isinstance(plan, TenantPlan):
        tenant_check.check_files(data.files)
        return await tenant_check.check_move(plan, data.files)
    return await check.check_plan(found.engine, found.pool, data.plan)


@get("/{name:str}", opt=VIEWER, summary="How a migration stands")
async def show_migration(request: Call, name: FromPath[str]) -> dict[str, Any]:
    """Phase, steps and waves, devices by side, gates with their figures, rates, last events, stragglers."""
    found = services(request)
    async with found.engine.acquire() as conn:
        stored = await visible(conn, request, name)
    if stored.kind == TENANT:
        return written_moments(await read_move_status(found.engine, name, now=time.time()))
    return written_moments(await status.read_status(found.engine, name, now=time.time()))


async def check_member(request: Call, name: str, device: str) -> None:
    """NotFound unless `device` takes part in the migration, and the caller may see that."""
    async with services(request).engine.acquire() as conn:
        await visible(conn, request, name)
        if not await conn.fetchval(
            "SELECT true FROM engine.member WHERE migration = $1 AND device = $2", name, device
        ):
            raise NotFound(f"device {device!r} is not part of migration {name!r}: check its id")


async def check_unclaimed(request: Call, name: str, device: str | None = None) -> None:
    """Conflict when another migration has taken devices of this one (or `device`) since it went back."""
    async with services(request).engine.acquire() as conn:
        await visible(conn, request, name)
        taken = await claims.claimed_from(conn, name, device=device)
    if taken:
        raise Claimed(taken)


async def ask(
    request: Call, name: str, kind: RequestKind, args: dict[str, Any], wait: float
) -> Response[Asked]:
    """Note the request for the controller and wait up to `wait` seconds for it to be dealt with."""
    found = services(request)
    async with found.engine.acquire() as conn:
        await visible(conn, request, name)
        ident = await store.add_request(conn, name, kind, args, request.user.name)
    deadline = time.monotonic() + wait
    answered = False
    while wait and not answered and time.monotonic() < deadline and not found.ctx.stop.is_set():
        await asyncio.sleep(0.1)
        async with found.engine.acquire() as conn:
            answered = await store.is_answered(conn, ident)
    return Response(
        Asked(request=ident, kind=kind.value, answered=answered), status_code=200 if answered else 202
    )


@post("/{name:str}/pause", opt=OPERATOR, status_code=202, summary="Pause: nothing grows, gates stay armed")
async def pause(request: Call, name: FromPath[str], wait: Wait = 0.0) -> Response[Asked]:
    return await ask(request, name, RequestKind.PAUSE, {}, wait)


@post("/{name:str}/resume", opt=OPERATOR, status_code=202, summary="Go on after a pause or a breach")
async def resume(
    request: Call, name: FromPath[str], data: JSONBody[ResumeIn | None] = None, wait: Wait = 0.0
) -> Response[Asked]:
    args: dict[str, Any] = {}
    if data and data.device:
        args = {"device": data.device}
        await check_member(request, name, data.device)
    await check_unclaimed(request, name, args.get("device"))
    return await ask(request, name, RequestKind.RESUME, args, wait)


@post("/{name:str}/approve", opt=OPERATOR, status_code=202, summary="Approve the wave that waits for it")
async def approve(request: Call, name: FromPath[str], wait: Wait = 0.0) -> Response[Asked]:
    return await ask(request, name, RequestKind.APPROVE, {}, wait)


@post("/{name:str}/release", opt=OPERATOR, status_code=202, summary="Give up the way back for good")
async def release(
    request: Call, name: FromPath[str], data: JSONBody[ReleaseIn | None] = None, wait: Wait = 0.0
) -> Response[Asked]:
    """Refused while devices have not moved, unless forced; the audit log says so."""
    return await ask(request, name, RequestKind.RELEASE, {"force": True} if data and data.force else {}, wait)


@post(
    "/{name:str}/revert",
    opt=OPERATOR,
    status_code=202,
    summary="Bring back everything, the open wave or one device",
)
async def revert(
    request: Call, name: FromPath[str], data: JSONBody[RevertIn | None] = None, wait: Wait = 0.0
) -> Response[Asked]:
    """Works also while the new side is down."""
    body = data or RevertIn()
    if body.wave and body.device:
        raise BadInput("Name either the wave or a device, not both.")
    args: dict[str, Any] = {}
    if body.wave:
        args = {"wave": True}
    if body.device:
        args = {"device": body.device}
        await check_member(request, name, body.device)
    return await ask(request, name, RequestKind.REVERT, args, wait)


@post("/{name:str}/amend", opt=OPERATOR, status_code=202, summary="Replace the plan and go on with it")
async def amend(
    request: Call, name: FromPath[str], data: JSONBody[PlanIn], wait: Wait = 0.0
) -> Response[Asked]:
    """What has been climbed must stay the same; narrowing the fleet or coming waves is what it is for."""
    may_bring_plans(request)
    async with services(request).engine.acquire() as conn:
        held = await visible(conn, request, name)
    if held.kind == TENANT:
        move = parse_tenant_plan(data.plan)
        check_tenant_amendment(parse_tenant_plan(held.plan), move, held.state.rung - 1)
        return await ask(request, name, RequestKind.AMEND, {"plan": data.plan}, wait)
    plan = parse_plan(data.plan)
    if plan.name != name:
        raise BadInput(f"The plan is of migration {plan.name!r}; to amend {name!r} it must carry that name.")
    if plan.fleet.tenant != held.tenant:
        raise Conflict(f"The plan is of tenant {plan.fleet.tenant!r}, the migration of {held.tenant!r}.")
    check_amendment(parse_plan(held.plan), plan, held.state.rung)
    await check_unclaimed(request, name)
    return await ask(request, name, RequestKind.AMEND, {"plan": data.plan}, wait)


@get("/{name:str}/plan", opt=VIEWER, summary="The plan, as text", media_type=MediaType.TEXT)
async def show_plan(request: Call, name: FromPath[str]) -> str:
    async with services(request).engine.acquire() as conn:
        return (await visible(conn, request, name)).plan


@get("/{name:str}/report", opt=VIEWER, summary="The report: one HTML file", media_type=MediaType.HTML)
async def show_report(request: Call, name: FromPath[str]) -> str:
    """Self-contained: needs no network. Works while the migration runs, too."""
    found = services(request)
    async with found.engine.acquire() as conn:
        stored = await visible(conn, request, name)
    if stored.kind == TENANT:
        return await tenant_report.report_html(found.engine, name, found.ctx.settings.path)
    return await report.report_html(found.engine, found.pool, name)


@get("/{name:str}/parity", opt=VIEWER, summary="What both sides saw of the same messages")
async def show_parity(request: Call, name: FromPath[str]) -> ParityReport:
    """Every message of devices that send (or last sent) to both sides, in exactly one class, and each field
    that differed, with the noise of the old side against itself."""
    found = services(request)
    async with found.engine.acquire() as conn:
        stored = of_a_fleet(await visible(conn, request, name), "parity")
        members = await store.members_page(conn, name, limit=None)
    async with found.pool.acquire() as conn:
        return await read_parity(conn, parse_plan(stored.plan), name, [m.device for m in members])


@get("/{name:str}/certificate", opt=VIEWER, summary="The certificate: evidence of every decision, signed")
async def show_certificate(
    request: Call,
    name: FromPath[str],
    so_far: Annotated[
        bool, QueryParameter(description="Also while the migration is not over; it says so then.")
    ] = False,
) -> Response[Certificate]:
    """One JSON file, to be kept byte for byte: `fleetlift certificate verify` checks it without a server."""
    found = services(request)
    async with found.engine.acquire() as conn:
        of_a_fleet(await visible(conn, request, name), "a certificate")
    data = await certificate.issue(
        found.engine, found.pool, name, data_dir=found.ctx.settings.path, now=time.time(), so_far=so_far
    )
    return cast("Response[Certificate]", Response(data, media_type=MediaType.JSON))


@get("/{name:str}/devices", opt=VIEWER, summary="The devices of a migration")
async def list_members(
    request: Call,
    name: FromPath[str],
    member_state: Annotated[
        list[MemberState] | None,
        QueryParameter(name="state", max_items=10, description="Only in these states."),
    ] = None,
    limit: Limit = LIMIT,
    after: After = None,
) -> Listing[MemberOut]:
    """In the order of waves. Stragglers and excluded devices come with the reason."""
    last = -1 if after is None else from_cursor(after, tuple[int])[0]
    async with services(request).engine.acquire() as conn:
        await visible(conn, request, name)
        found = await store.members_page(conn, name, states=member_state or (), after=last, limit=limit + 1)
    more = len(found) > limit
    return Listing(
        [shown_member(m) for m in found[:limit]], to_cursor(found[limit - 1].rank) if more else None
    )


class Streams:
    """How many event streams are open: each costs a query every half second."""

    def __init__(self) -> None:
        self.open = 0


STREAMS = Streams()


@get("/{name:str}/events", opt=VIEWER, summary="The audit log")
async def list_events(
    request: Call, name: FromPath[str], limit: Limit = LIMIT, after: After = None
) -> Response[Listing[Event]]:
    """Oldest first. With `Accept: text/event-stream` new events follow as they happen; `Last-Event-ID` goes
    on where a stream was lost."""
    found = services(request)
    streaming = "text/event-stream" in request.headers.get("accept", "")
    last = 0 if after is None else from_cursor(after, tuple[int])[0]
    async with found.engine.acquire() as conn:
        await visible(conn, request, name)
        if not streaming:
            rows = await audit.page(conn, name, after=last, limit=limit + 1)
            more = len(rows) > limit
            cursor = to_cursor(rows[limit - 1].id) if more else None
            return Response(Listing([shown_event(r) for r in rows[:limit]], cursor))
    if STREAMS.open >= STREAMS_MAX:
        raise Unavailable(f"{STREAMS_MAX} event streams are open already: close some, or read pages.")
    resumed = request.headers.get("last-event-id", "")
    if resumed.isdecimal() and len(resumed) < 19:
        last = int(resumed)
    token = bearer_of(request.headers)
    return cast("Response[Listing[Event]]", ServerSentEvent(follow(found, name, last, token)))


async def follow(found: Services, name: str, last: int, token: str) -> AsyncIterator[ServerSentEventMessage]:
    """The events of a migration after `last`, then each new one, until the server stops or `token` goes."""
    STREAMS.open += 1
    try:
        spoken = checked = time.monotonic()
        while not found.ctx.stop.is_set():
            if time.monotonic() - checked >= STREAM_CHECK_S:
                if await found.verifier.verify(token) is None:
                    return
                checked = time.monotonic()
            async with found.engine.acquire() as conn:
                rows = await audit.page(conn, name, after=last, limit=200)
            for row in rows:
                last = row.id
                yield ServerSentEventMessage(
                    id=row.id, event=row.kind, data=msgspec.json.encode(shown_event(row)).decode()
                )
            if rows:
                spoken = time.monotonic()
                continue
            if time.monotonic() - spoken > STREAM_KEEPALIVE_S:
                spoken = time.monotonic()
                yield ServerSentEventMessage(comment="still here")
            try:
                async with asyncio.timeout(STREAM_POLL_S):
                    await found.ctx.stop.wait()
            except TimeoutError:
                continue
    finally:
        STREAMS.open -= 1


router = Router(
    "/migrations",
    route_handlers=[
        list_migrations,
        start_migration,
        check_plan,
        show_migration,
        pause,
        resume,
        approve,
        release,
        revert,
        amend,
        show_plan,
        show_report,
        show_certificate,
        show_parity,
        list_members,
        list_events,
    ],
    tags=["migrations"],
)
