"""The command service: sends what is queued for path `new`, reads devices' answers, ends what has expired.

A command is marked as sent before its copy is published: killed in between, it is sent again when the device
connects or after a while, and a device refuses a second copy by its id. Answers are read from the log, with
the reader's position in the transaction that records them.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from fleetlift.backend.context import Context
from fleetlift.backend.follow import Message, Then, follow, until_stopped
from fleetlift.backend.shadows import Services
from fleetlift.core.command import (
    EXPIRES_IN_S_DEFAULT,
    GRACE_S,
    RETRY_AFTER_CONNECT_S,
    BadResponse,
    Command,
    Mode,
    Path,
    PathState,
    ResponseError,
    Status,
    checked_expiry,
    checked_name,
    checked_params,
    paths_for,
    read_response,
    retry_due,
    uuid7,
)
from fleetlift.core.errors import BadInput, Conflict, NotFound
from fleetlift.core.identity import DEVICE_ID, checked_device_id
from fleetlift.core.jsonvalue import JsonObject
from fleetlift.log import get_logger
from fleetlift.store import commands as store
from fleetlift.store.paging import DEFAULT_LIMIT, Page
from fleetlift.store.pool import Conn, sole_owner

log = get_logger(__name__)

READER = "commands"
FILTERS = ("$aws.commands.things.*.executions.*.response.json",)
WAKE = "fleetlift.commands.queued"  # a word on the bus that a command waits; the sweep finds what it missed
SWEEP_S = 0.5
_SEND_MAX = 1000


class NewCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command to be made. `id` is for callers that repeat themselves; None: a new one."""

    device: str
    name: str
    params: JsonObject = {}
    expires_in_s: float = EXPIRES_IN_S_DEFAULT
    mode: str = "execute"
    id: str | None = None


async def run(ctx: Context) -> None:
    """Send commands, record answers and end what has expired, until the context stops."""

    async def apply(conn: Conn, messages: Sequence[Message]) -> Then:
        told = await _record(conn, messages)
        return lambda: _tell(ctx, told)

    await until_stopped(
        ctx, follow(ctx, reader=READER, filters=FILTERS, apply=apply, now=time.time), _courier(ctx)
    )


# -- for callers in the house --------------------------------------------------------------------------


async def create_command(
    ctx: Services,
    device: str,
    name: str,
    params: JsonObject | None = None,
    expires_in_s: float = EXPIRES_IN_S_DEFAULT,
    mode: str = "execute",
    principal: str = "",
    *,
    id: str | None = None,
) -> Command:
    """Queue a command by every path that the device's migration state names; it is sent at once.

    Returns it as stored, with its paths. With an `id` (a UUID) that is known already, the earlier command is
    returned and nothing is queued. Raises BadInput, or NotFound for a device that is not registered.
    """
    new = NewCommand(
        device=device, name=name, params=params or {}, expires_in_s=expires_in_s, mode=mode, id=id
    )
    (command,) = await create_commands(ctx, [new], principal)
    return command


async def create_commands(ctx: Services, new: Sequence[NewCommand], principal: str = "") -> list[Command]:
    """The same for many commands, in one transaction: all are queued, or none."""
    for one in new:
        checked_device_id(one.device)
        checked_name(one.name)
        checked_params(one.params)
        checked_expiry(one.expires_in_s)
        if one.mode not in tuple(Mode):
            raise BadInput(f"command mode {one.mode!r}: use execute or dry-run")
        if one.id is not None and not _is_uuid(one.id):
            raise BadInput(f"command id {one.id!r}: use a UUID in its usual form, in lower case")
    now = round(time.time(), 6)  # as exact as the database keeps it: what is returned is what is stored
    async with ctx.pool.acquire() as conn, conn.transaction():
        routes = await store.routes(conn, [one.device for one in new])
        commands = []
        for one in new:
            if (route := routes.get(one.device)) is None:
                raise NotFound(f"device {one.device} is not registered: create it first")
            commands.append(_command(one, route, principal, now))
        try:
            await store.insert(conn, commands)
        except asyncpg.DataError as error:
            raise BadInput(f"command: cannot be stored ({error})") from error
        given = [command.id for command, one in zip(commands, new, strict=True) if one.id is not None]
        known = await store.get_many(conn, given) if given else {}
    with contextlib.suppress(Exception):  # without the word, the next sweep finds it
        await ctx.nc.publish(WAKE, b"")
    made = [known.get(command.id, command) for command in commands]
    for command, one in zip(made, new, strict=True):
        if (command.device, command.name) != (one.device, one.name):
            raise Conflict(f"command id {command.id} is taken by another command: use a new one")
    return made


async def get_command(ctx: Services, command: str) -> Command:
    """A command with each path's outcome. Raises NotFound."""
    async with ctx.pool.acquire() as conn:
        found = await store.get_many(conn, [command])
    if not found:
        raise NotFound(f"command {command} is not known")
    return next(iter(found.values()))


async def list_commands(
    ctx: Services, device: str, *, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[Command]:
    """A device's commands, newest first."""
    async with ctx.pool.acquire() as conn:
        return await store.listed(conn, checked_device_id(device), limit=limit, after=after)


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def _command(new: NewCommand, route: store.Route, principal: str, now: float) -> Command:
    mode = Mode(new.mode)
    return Command(
        id=new.id or uuid7(now, secrets.randbits(74)),
        device=new.device,
        tenant=route.tenant,
        name=new.name,
        params=new.params,
        mode=mode,
        status=Status.QUEUED,
        created_by=principal,
        created_at=now,
        expires_at=round(now + new.expires_in_s, 6),
        paths=tuple(
            PathState(path=path, mode=by, created_at=now)
            for path, by in paths_for(route.commands, mode, new.name)
        ),
    )


# -- sending and ending --------------------------------------------------------------------------------


async def _courier(ctx: Context) -> None:
    """Send what is queued when told so, repeat and close in a slow round; one process at a time."""
    while True:
        async with sole_owner(ctx.settings.database_url, "command courier") as owner:
            wake = asyncio.Event()
            wake.set()

            async def on_wake(_: object, wake: asyncio.Event = wake) -> None:
                wake.set()

            subscription = await ctx.nc.subscribe(WAKE, cb=on_wake)
            try:
                await _rounds(ctx, owner, wake)
            finally:
                with contextlib.suppress(Exception):
                    await subscription.unsubscribe()


async def _rounds(ctx: Context, owner: "asyncpg.Connection[Any]", wake: asyncio.Event) -> None:
    swept_at = 0.0
    while not owner.is_closed():
        with contextlib.suppress(TimeoutError):
            # Not wait_for: before Python 3.12 it loses a cancellation that comes with what it awaits.
            async with asyncio.timeout(SWEEP_S):
                await wake.wait()
        wake.clear()
        try:
            await send_queued(ctx)
            if time.monotonic() - swept_at >= SWEEP_S:
                await send_again(ctx)
                await close_expired(ctx)
                swept_at = time.monotonic()
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as problem:
            log.warning("command_round_put_off", reason=str(problem) or repr(problem))
            await asyncio.sleep(1.0)


async def send_queued(ctx: Services) -> int:
    """Send every command that waits for its first copy by path `new`. Returns how many were sent."""
    sent = 0
    while True:
        now = time.time()
        async with ctx.pool.acquire() as conn, conn.transaction():
            due = await store.queued(conn, Path.NEW, now=now, limit=_SEND_MAX)
            marked = await store.mark_sent(conn, Path.NEW, [one.id for one in due], now) if due else set()
        await _send(ctx, [one for one in due if one.id in marked])
        sent += len(marked)
        if len(due) < _SEND_MAX:
            return sent


async def send_again(ctx: Services) -> int:
    """Send another copy of what a connected device has left unanswered for long enough."""
    now = time.time()
    async with ctx.pool.acquire() as conn, conn.transaction():
        quiet = await store.unanswered(conn, Path.NEW, now=now, quiet_s=RETRY_AFTER_CONNECT_S)
        due = [
            one
            for one in quiet
            if one.sent_at is not None
            and retry_due(
                now=now,
                sent_at=one.sent_at,
                waiting_since=one.created_at,
                connected_since=one.connected_since,
            )
        ]
        marked = await store.mark_sent(conn, Path.NEW, [one.id for one in due], now) if due else set()
    await _send(ctx, [one for one in due if one.id in marked])
    if marked:
        log.info("commands_sent_again", count=len(marked))
    return len(marked)


async def close_expired(ctx: Services, *, grace_s: float = GRACE_S) -> int:
    """End every command whose expiry and grace are over. Returns how many were ended or had a path closed."""
    closed = 0
    while True:
        async with ctx.pool.acquire() as conn, conn.transaction():
            ended = await store.close_due(conn, now=time.time(), grace_s=grace_s)
        closed += len(ended)
        if len(ended) < 1000:
            break
    if closed:
        log.info("commands_closed", count=closed)
    return closed


class _Request(msgspec.Struct, frozen=True):
    """What a device gets. `mode` is that of the path, `expires_at` Unix seconds."""

    name: str
    params: msgspec.Raw
    mode: str
    expires_at: float


async def _send(ctx: Services, copies: Sequence[store.Outgoing]) -> None:
    """Publish copies. One that fails stays marked as sent, and is repeated as if it had got lost."""
    results = await asyncio.gather(
        *(
            ctx.publisher.to_device(
                f"$aws/commands/things/{one.device}/executions/{one.id}/request/json",
                msgspec.json.encode(_Request(one.name, one.params, one.mode, one.expires_at)),
            )
            for one in copies
        ),
        return_exceptions=True,
    )
    failures = [problem for problem in results if isinstance(problem, BaseException)]
    if failures:
        log.warning("command_copies_lost", count=len(failures), reason=str(failures[0]))


# -- answers -------------------------------------------------------------------------------------------


class _Accepted(msgspec.Struct, frozen=True, rename="camel"):
    execution_id: str


class _Rejected(msgspec.Struct, frozen=True, rename="camel"):
    error: str
    error_message: str
    execution_id: str


class _Told(msgspec.Struct, frozen=True):
    device: str
    body: _Accepted | _Rejected


_WHY: Mapping[ResponseError, str] = {
    ResponseError.NOT_FOUND: "no such execution for this device",
    ResponseError.TERMINAL: "the execution has ended already; the answer was noted as late",
}


async def _record(conn: Conn, messages: Sequence[Message]) -> list[_Told]:
    answers: list[store.Answer] = []
    told: list[_Told] = []
    for message in messages:
        tokens = message.subject.split(".")
        device, execution = tokens[3], tokens[5]
        if not DEVICE_ID.fullmatch(device) or len(execution) > 64:
            continue
        try:
            reported = read_response(message.payload)
        except BadResponse as problem:
            told.append(_Told(device, _Rejected(problem.error, str(problem), execution)))
            continue
        answers.append(
            store.Answer(command=execution, path=Path.NEW, reported=reported, at=message.at, device=device)
        )
    for answer, result in zip(answers, await store.record_answers(conn, answers), strict=True):
        body = (
            _Accepted(answer.command)
            if result.error is None
            else _Rejected(result.error, _WHY.get(result.error, ""), answer.command)
        )
        told.append(_Told(answer.device, body))
    return told


async def _tell(ctx: Services, told: Sequence[_Told]) -> None:
    """Say to devices whether their answers were taken: live only, since nothing hangs on it."""
    for one in told:
        verdict = "accepted" if isinstance(one.body, _Accepted) else "rejected"
        subject = (
            f"$aws.commands.things.{one.device}.executions.{one.body.execution_id}.response.{verdict}.json"
        )
        if not {" ", "\t", "*", ">"} & set(subject):
            await ctx.nc.publish(subject, msgspec.json.encode(one.body))
