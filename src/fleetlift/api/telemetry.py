"""What devices sent: stored messages, the newest of each channel, and what could not be stored."""

from base64 import b64encode
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get
from litestar.params import FromPath, QueryParameter

from fleetlift.api.auth import VIEWER
from fleetlift.api.wire import LIMIT, After, Call, Limit, Listing, listing, moment, services, unix
from fleetlift.backend import registry
from fleetlift.core.errors import BadInput, NotFound
from fleetlift.store import telemetry as store
from fleetlift.store.telemetry import DeadLetterRow, TelemetryRow

Channel = Annotated[
    str | None,
    QueryParameter(max_length=512, description="Only this channel, as in `status` or `engine/oil`."),
]
Since = Annotated[datetime | None, QueryParameter(description="Messages of this moment or later.")]
Until = Annotated[datetime | None, QueryParameter(description="Messages before this moment.")]
Order = Annotated[Literal["oldest", "newest"], QueryParameter(description="Which come first.")]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One stored message. `ts`: the device's time; `seq`: its count, null for none; `path`: how it came."""

    channel: str
    ts: datetime
    seq: int | None
    body: Any
    path: str
    received_at: datetime


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not be stored, and why. `payload` is its beginning in Base64."""

    id: int
    device: str
    path: str
    topic: str
    reason: str
    payload: str
    payload_bytes: int
    received_at: datetime


def shown(row: TelemetryRow) -> Message:
    return Message(
        channel=row.channel,
        ts=moment(row.ts),
        seq=row.seq,
        body=row.body,  # the text as stored: it is not parsed to be written again
        path=row.path,
        received_at=moment(row.received_at),
    )


def shown_letter(row: DeadLetterRow) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        device=row.device,
        path=row.path,
        topic=row.topic,
        reason=row.reason,
        payload=b64encode(row.payload).decode(),
        payload_bytes=row.payload_bytes,
        received_at=moment(row.received_at),
    )


@get("/devices/{device:str}/telemetry", opt=VIEWER, summary="List a device's messages")
async def list_telemetry(
    request: Call,
    device: FromPath[str],
    channel: Channel = None,
    since: Since = None,
    until: Until = None,
    order: Order = "oldest",
    limit: Limit = LIMIT,
    after: After = None,
) -> Listing[Message]:
    """By the device's own time, oldest first unless asked otherwise."""
    first, last = unix(since, "since"), unix(until, "until")
    if first is not None and last is not None and first > last:
        raise BadInput("since is later than until: swap them")
    async with services(request).pool.acquire() as conn:
        known = True
        try:
            await registry.get_device(conn, device, tenant=request.user.tenant)
        except NotFound:
            if request.user.tenant is not None:
                raise
            known = False  # messages outlive their device, for those who see every tenant
        page = await store.read(
            conn,
            device,
            channel=channel,
            since=first,
            until=last,
            limit=limit,
            after=after,
            newest=order == "newest",
        )
        if not known and not page.items:
            await registry.get_device(conn, device)
    return listing(page, shown)


@get("/devices/{device:str}/telemetry/latest", opt=VIEWER, summary="The newest message of each channel")
async def latest_telemetry(request: Call, device: FromPath[str]) -> Listing[Message]:
    async with services(request).pool.acquire() as conn:
        await registry.get_device(conn, device, tenant=request.user.tenant)
        return Listing([shown(row) for row in await store.latest(conn, device)])


@get("/dead-letters", opt=VIEWER, summary="List messages that could not be stored")
async def list_dead_letters(
    request: Call,
    device: Annotated[str | None, QueryParameter(max_length=128, description="Only of this device.")] = None,
    limit: Limit = LIMIT,
    after: After = None,
) -> Listing[DeadLetter]:
    """Newest first, with the reason."""
    async with services(request).pool.acquire() as conn:
        page = await store.dead_letters(
            conn, device=device, tenant=request.user.tenant, limit=limit, after=after
        )
    return listing(page, shown_letter)


router = Router("/", route_handlers=[list_telemetry, latest_telemetry, list_dead_letters], tags=["telemetry"])
