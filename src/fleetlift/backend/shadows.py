"""The shadow service: AWS's shadow topics for devices, and the same documents for callers in the house.

Requests that came by QoS 1 are read from the log; their effect and the reader's position are one transaction.
Answers are published once that is committed, so a device that is told "accepted" is told the truth. When the
process dies between the two, those answers are lost: a device asks again after its time-out, as with AWS.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from nats.aio.client import Client

from fleetlift.backend.context import Context
from fleetlift.backend.follow import Message, Then, follow, until_stopped
from fleetlift.bus.publish import Publisher, ToDevice
from fleetlift.config import Settings
from fleetlift.core import shadow as rules
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound
from fleetlift.core.identity import DEVICE_ID, checked_device_id
from fleetlift.core.jsonvalue import JsonObject
from fleetlift.core.orders import SHADOW_NAME
from fleetlift.core.shadow import (
    CLASSIC,
    DEFAULT,
    Answer,
    Code,
    Deleted,
    Document,
    Limits,
    Operation,
    Outcome,
    Refused,
    Shadow,
    ShadowKey,
    Suffix,
    Update,
)
from fleetlift.log import get_logger
from fleetlift.store import shadows as store
from fleetlift.store.paging import DEFAULT_LIMIT, Page
from fleetlift.store.pool import Conn, Pool

log = get_logger(__name__)

# Reader of the log: the requests it takes. The answers go to longer subjects and are never read as requests.
# One filter each: with six, NATS Server 2.15 hands out 700 messages a second where it can do 16,000.
READERS = {"shadows": "$aws.things.*.shadow.*", "shadows-named": "$aws.things.*.shadow.name.*.*"}
_OPERATIONS = frozenset(Operation)
_DEVICES_AT_ONCE = 1000


class Services(Protocol):
    """What the calls below need of a context."""

    @property
    def pool(self) -> Pool: ...
    @property
    def publisher(self) -> Publisher: ...
    @property
    def nc(self) -> Client: ...
    @property
    def settings(self) -> Settings: ...


class TooLarge(BadInput):
    """The shadow would be larger than it may be."""

    status = 413


class NotUtf8(BadInput):
    status = 415


async def run(ctx: Context) -> None:
    """Answer devices' shadow requests until the context stops."""
    limits = _limits(ctx.settings)

    async def apply(conn: Conn, messages: Sequence[Message]) -> Then:
        told = await _apply(conn, messages, limits)
        return lambda: _publish(ctx, told)

    readers = (
        follow(ctx, reader=reader, filters=(subject,), apply=apply, now=time.time)
        for reader, subject in READERS.items()
    )
    await until_stopped(ctx, *readers)


# -- for callers in the house --------------------------------------------------------------------------


async def get_shadow(ctx: Services, device: str, name: str = CLASSIC) -> Document:
    """The whole shadow. Raises NotFound, in AWS's words."""
    key = _checked_key(device, name)
    async with ctx.pool.acquire() as conn:
        stored = (await store.load(conn, [key])).get(key)
    body = _body(rules.get(key, stored, time.time()))
    assert isinstance(body, Document)
    return body


async def update_shadow(ctx: Services, device: str, name: str, request: bytes | JsonObject) -> Document:
    """Merge an AWS update request (`{"state": {…}, "version"?, "clientToken"?}`) into the shadow.

    Returns what update/accepted says. The device and every other listener get the messages they would get if
    the request had come by MQTT. Raises BadInput (400, 413, 415) or Conflict (409), in AWS's words.
    """
    payload = request if isinstance(request, bytes) else msgspec.json.encode(request)
    body = _body(await _handle_one(ctx, Operation.UPDATE, _checked_key(device, name), payload))
    assert isinstance(body, Document)
    return body


async def delete_shadow(ctx: Services, device: str, name: str = CLASSIC) -> Deleted:
    """Remove the shadow; its version goes on when it is made again within 48 hours. Raises NotFound."""
    body = _body(await _handle_one(ctx, Operation.DELETE, _checked_key(device, name), b""))
    assert isinstance(body, Deleted)
    return body


async def list_named(
    ctx: Services, device: str, *, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[str]:
    """The names of a device's named shadows, without the classic one."""
    async with ctx.pool.acquire() as conn:
        return await store.names(conn, checked_device_id(device), limit=limit, after=after)


async def set_desired_many(
    ctx: Services,
    documents: Mapping[str, JsonObject],
    *,
    name: str = SHADOW_NAME,
    refuse: Callable[[str, JsonObject | None], str | None] | None = None,
) -> dict[str, str]:
    """Make the desired state of one named shadow exactly the given document, for many devices.

    Returns the refusals: device to reason. `refuse(device, desired now)` is asked under the row's lock and
    may say why not (an order of an older epoch). Each device gets its delta, again also when the desired
    state is already as wanted: repeating is harmless, and changes no version then.
    """
    refused: dict[str, str] = {}
    devices = sorted(documents)
    for start in range(0, len(devices), _DEVICES_AT_ONCE):
        some = {device: documents[device] for device in devices[start : start + _DEVICES_AT_ONCE]}
        refused |= await _set_desired(ctx, some, name, refuse)
    return refused


async def named_shadows(
    ctx: Services, name: str = SHADOW_NAME, devices: Sequence[str] | None = None
) -> dict[str, Shadow]:
    """The shadow called `name` by device, of those that have one; `devices` None: of all."""
    async with ctx.pool.acquire() as conn:
        return await store.all_named(conn, name, devices)


# -- inside --------------------------------------------------------------------------------------------


class _Told(msgspec.Struct, frozen=True):
    key: ShadowKey
    answer: Answer


def _request(subject: str) -> tuple[Operation, ShadowKey] | None:
    """What a subject asks for; None when it names no device or shadow that can be."""
    match subject.split("."):
        case ["$aws", "things", device, "shadow", operation] if (
            operation in _OPERATIONS and DEVICE_ID.fullmatch(device)
        ):
            return Operation(operation), ShadowKey(device)
        case ["$aws", "things", device, "shadow", "name", name, operation] if DEVICE_ID.fullmatch(
            device
        ) and rules.SHADOW_NAME.fullmatch(name):
            return Operation(operation), ShadowKey(device, name)
    return None


async def _apply(conn: Conn, messages: Sequence[Message], limits: Limits) -> list[_Told]:
    """Work off requests in their order: load every shadow once, apply in memory, write each once."""
    requests = [(asked, message) for message in messages if (asked := _request(message.subject)) is not None]
    if not requests:
        return []
    written = {key for (operation, key), _ in requests if operation is not Operation.GET}
    only_read = {key for (_, key), _ in requests} - written
    shadows = await store.load(conn, only_read) if only_read else {}
    if written:
        shadows |= await store.lock(conn, written)
    changed: dict[ShadowKey, Shadow] = {}
    told: list[_Told] = []
    for (operation, key), message in requests:
        outcome = rules.handle(operation, key, shadows.get(key), message.payload, message.at, limits)
        if outcome.shadow is not None:
            shadows[key] = changed[key] = outcome.shadow
        told.extend(_Told(key, answer) for answer in outcome.answers)
    await store.save(conn, changed)
    return told


async def _handle_one(ctx: Services, operation: Operation, key: ShadowKey, payload: bytes) -> Outcome:
    limits = _limits(ctx.settings)
    async with ctx.pool.acquire() as conn, conn.transaction():
        stored = (await store.lock(conn, [key])).get(key)
        outcome = rules.handle(operation, key, stored, payload, time.time(), limits)
        if outcome.shadow is not None:
            await store.save(conn, {key: outcome.shadow})
    if outcome.refused is None:  # a caller is told of a refusal by the call; topics are for what happened
        await _publish(ctx, [_Told(key, answer) for answer in outcome.answers])
    return outcome


async def _set_desired(
    ctx: Services,
    documents: Mapping[str, JsonObject],
    name: str,
    refuse: Callable[[str, JsonObject | None], str | None] | None,
) -> dict[str, str]:
    keys = {device: _checked_key(device, name) for device in documents}
    refused: dict[str, str] = {}
    told: list[_Told] = []
    changed: dict[ShadowKey, Shadow] = {}
    now = time.time()
    async with ctx.pool.acquire() as conn, conn.transaction():
        shadows = await store.lock(conn, list(keys.values()))
        for device, document in documents.items():
            key = keys[device]
            stored = shadows.get(key)
            held = stored.desired if stored is not None else None
            if refuse is not None and (why := refuse(device, held)) is not None:
                refused[device] = why
                continue
            if stored is not None and stored.deleted_at is None and rules.same(held or {}, document):
                again = rules.delta_answer(stored, now)
                told.extend([_Told(key, again)] if again is not None else [])
                continue
            outcome = rules.update(
                stored, Update(desired=rules.replacing(held, document)), now, _limits(ctx.settings)
            )
            if outcome.shadow is None:
                refused[device] = outcome.refused.message if outcome.refused else "refused"
                continue
            changed[key] = outcome.shadow
            told.extend(_Told(key, answer) for answer in outcome.answers)
        await store.save(conn, changed)
    await _publish(ctx, told)
    return refused


async def _publish(ctx: Services, told: Sequence[_Told]) -> None:
    """Send answers, each device's in order. What cannot be sent is logged: its effect is stored already."""
    # Documents are large, and for listeners in the cloud rather than devices: live only, not kept in the log.
    lost = await ctx.publisher.to_devices(
        [
            ToDevice(
                f"{_base(one.key)}/{one.answer.suffix.value}",
                _encode(one.answer.body),
                stored=one.answer.suffix is not Suffix.DOCUMENTS,
            )
            for one in told
        ]
    )
    if lost:
        log.warning("shadow_answers_lost", reason=lost)


_encode = msgspec.json.Encoder().encode


def _base(key: ShadowKey) -> str:
    named = f"/name/{key.name}" if key.name else ""
    return f"$aws/things/{key.device}/shadow{named}"


def _body(outcome: Outcome) -> Document | Deleted:
    """The answer's body, or the error that a refusal is to a caller in the house."""
    body = outcome.answers[0].body
    if isinstance(body, Refused):
        raise _ERRORS[body.code](body.message)
    assert isinstance(body, Document | Deleted)
    return body


_ERRORS: Mapping[Code, type[FleetError]] = {
    Code.BAD_REQUEST: BadInput,
    Code.NOT_FOUND: NotFound,
    Code.CONFLICT: Conflict,
    Code.TOO_LARGE: TooLarge,
    Code.NOT_UTF8: NotUtf8,
}


def _limits(settings: Settings) -> Limits:
    return msgspec.structs.replace(DEFAULT, state_bytes=settings.shadow_state_bytes)


def _checked_key(device: str, name: str) -> ShadowKey:
    if name != CLASSIC and not rules.SHADOW_NAME.fullmatch(name):
        raise BadInput(f"shadow name {name!r}: use 1 to 64 letters, digits, '$', ':', '_' or '-'")
    return ShadowKey(checked_device_id(device), name)
