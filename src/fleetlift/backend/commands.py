"""The command service: sends what is queued for path `new`, reads devices' answers, ends what has expired.

A command is marked as sent before its copy is published: killed in between, it is sent again when the device
connects or after a while, and a device refuses a second copy by its id. That is also why the first copy to a
device that is connected need not be stored: should nobody take it, a stored one follows. Answers are read
from the log, with the reader's position in the transaction that records them.
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
from fleetlift.backend.follow import Message, Then, follow, heard_until, until_stopped
from fleetlift.backend.shadows import Services
from fleetlift.bus.publish import ToDevice
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
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound, Unavailable
from fleetlift.core.identity import DEVICE_ID, checked_device_id, is_replay_id
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
_CLOSE_MAX = 1000


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
    returned and nothing is queued. Raises BadInput, NotFound for a device that is not registered, Conflict
    for one that was left on the old side when its migration was released.
    """
    new = NewCommand(
        device=device, name=name, params=params or {}, expires_in_s=expires_in_s, mode=mode, id=id
    )
    (command,) = await create_commands(ctx, [new], principal)
    return command


async def create_commands(ctx: Services, new: Sequence[NewCommand], principal: str = "") -> list[Command]:
    """The same for many commands, in one transaction: all are queued, or none."""
    for one in new:
        _check(one)
    async with ctx.pool.acquire() as conn, conn.transaction():
        made = [_or_raised(one) for one in await _make(conn, [Asked(one, principal) for one in new])]
    await _wake(ctx)
    return made


class Asked(msgspec.Struct, frozen=True):
    """A command with who asks for it. `tenant` not None: only for a device of that tenant."""

    new: NewCommand
    principal: str
    tenant: str | None = None


class Intake:
    """Takes single commands from many callers, and queues those that come together in one transaction.

    While one transaction is under way the next group gathers, so nobody waits for company that may not come.
    Each caller gets its own command, or its own error.
    """

    def __init__(self, ctx: Services) -> None:
        self._ctx = ctx
        self._waiting: list[tuple[Asked, asyncio.Future[Command]]] = []
        self._work: asyncio.Task[None] | None = None

    async def create(self, asked: Asked) -> Command:
        """As `create_command`; NotFound also for a device of another tenant than `asked.tenant`."""
        _check(asked.new)
        future: asyncio.Future[Command] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._work_off(), name="command intake")
        return await future

    async def _work_off(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[:_SEND_MAX], self._waiting[_SEND_MAX:]
            try:
                await self._group(group)
            except Exception as problem:  # whatever it is, nobody is left waiting
                for _, future in group:
                    if not future.done():
                        future.set_exception(problem)

    async def _group(self, group: Sequence[tuple[Asked, asyncio.Future[Command]]]) -> None:
        made: list[Command | FleetError]
        try:
            async with self._ctx.pool.acquire() as conn, conn.transaction():
                made = await _make(conn, [asked for asked, _ in group])
        except BadInput as refused:
            if len(group) > 1:  # the database refuses one of them: find out which
                for one in group:
                    await self._group([one])
                return
            made = [refused]
        await _wake(self._ctx)
        for (_, future), result in zip(group, made, strict=True):
            if future.done():  # its caller has gone away
                continue
            if isinstance(result, Command):
                future.set_result(result)
            else:
                future.set_exception(result)


def _check(new: NewCommand) -> None:
    checked_device_id(new.device)
    checked_name(new.name)
    checked_params(new.params)
    checked_expiry(new.expires_in_s)
    if new.mode not in tuple(Mode):
        raise BadInput(f"command mode {new.mode!r}: use execute or dry-run")
    if is_replay_id(new.device) and new.mode != Mode.DRY_RUN:
        raise BadInput(f"device {new.device!r} is a replay's and executes nothing: send it a dry-run")
    if new.id is not None and not _is_uuid(new.id):
        raise BadInput(f"command id {new.id!r}: use a UUID in its usual form, in lower case")


async def _make(conn: Conn, asked: Sequence[Asked]) -> list[Command | FleetError]:
    """Store commands in the caller's transaction; each as it is stored, or why it is not.

    Raises BadInput when the database refuses one of them: then none is stored.
    """
    now = round(time.time(), 6)  # as exact as the database keeps it: what is returned is what is stored
    routes = await store.routes(conn, [one.new.device for one in asked])
    made: list[Command | FleetError] = []
    for one in asked:
        route = routes.get(one.new.device)
        if route is None or one.tenant not in (None, route.tenant):
            made.append(NotFound(f"device {one.new.device!r} does not exist: create it, or check its id"))
        else:
            queued = _command(one.new, route, one.principal, now)
            made.append(queued if queued.paths else Conflict(_OUT_OF_REACH.format(one.new.device, route)))
    commands: dict[str, Command] = {}  # the first of those that name the same id
    for command in made:
        if isinstance(command, Command):
            commands.setdefault(command.id, command)
    try:
        await store.insert(conn, list(commands.values()))
    except asyncpg.DataError as error:
        raise BadInput(f"command: cannot be stored ({error})") from error
    given = [one.new.id for one in asked if one.new.id is not None]
    known = await store.get_many(conn, given) if given else {}
    for n, one in enumerate(asked):
        if isinstance(made[n], FleetError) or (earlier := known.get(one.new.id or "")) is None:
            continue
        if (earlier.device, earlier.name) == (one.new.device, one.new.name):
            made[n] = earlier
        else:
            made[n] = Conflict(f"command id {one.new.id} is taken by another command: use a new one")
    return made


_OUT_OF_REACH = (
    "device {0!r} takes commands by the old side, which is out of reach from here since migration "
    "{1.migration!r} was released: send the command there"
)


def _or_raised(made: Command | FleetError) -> Command:
    if isinstance(made, FleetError):
        raise made
    return made


async def _wake(ctx: Services) -> None:
    with contextlib.suppress(Exception):  # without the word, the next sweep finds it
        await ctx.nc.publish(WAKE, b"")


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
            for path, by in paths_for(route.commands, mode, new.name, released=route.released)
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
        except (OSError, TimeoutError, Unavailable, asyncpg.PostgresError, asyncpg.InterfaceError) as problem:
            log.warning("command_round_put_off", reason=str(problem) or repr(problem))
            await asyncio.sleep(1.0)


async def send_queued(ctx: Services) -> int:
    """Send every command that waits for its first copy by path `new`. Returns how many were sent."""
    sent = 0
    while True:
        async with ctx.pool.acquire() as conn:
            taken = await store.take_queued(conn, Path.NEW, now=time.time(), limit=_SEND_MAX)
        # For each device that may get stored messages the server keeps a file of what was delivered. It is
        # written for every copy, and costs more than all the rest of a command: hence the live copies.
        await _send(ctx, taken)
        sent += len(taken)
        if len(taken) < _SEND_MAX:
            return sent


async def send_again(ctx: Services) -> int:
    """Send a stored copy of what has been left unanswered for long enough by a device that is connected, or
    that has gone before any copy was stored for it."""
    now = time.time()
    async with ctx.pool.acquire() as conn:
        quiet = await store.unanswered(conn, Path.NEW, now=now, quiet_s=RETRY_AFTER_CONNECT_S)
        due = [
            msgspec.structs.replace(one, live=False)
            for one in quiet
            if one.sent_at is not None
            and retry_due(
                now=now,
                sent_at=one.sent_at,
                waiting_since=one.created_at,
                connected_since=one.connected_since or 0.0,
            )
        ]
        if not due:
            return 0
        async with conn.transaction():
            marked = await store.mark_sent(conn, Path.NEW, [one.id for one in due], now)
    await _send(ctx, [one for one in due if one.id in marked])
    if marked:
        log.info("commands_sent_again", count=len(marked))
    return len(marked)


async def close_expired(ctx: Services, *, grace_s: float = GRACE_S) -> int:
    """End every command whose expiry and grace are over. Returns how many were ended or had a path closed.

    None is ended before the reader of answers has come to that moment: while it was away an answer may have
    been given in time, and wait in the log. Raises Unavailable when that cannot be told.
    """
    closed = 0
    while True:
        now = time.time()
        async with ctx.pool.acquire() as conn:
            if not await store.due(conn, expired_before=now - grace_s, limit=1):
                break
        heard = await heard_until(ctx.pool, ctx.nc, reader=READER, filters=FILTERS, now=now)
        async with ctx.pool.acquire() as conn, conn.transaction():
            ids = await store.due(conn, expired_before=min(now, heard) - grace_s, limit=_CLOSE_MAX)
            await store.close(conn, ids, now)
        closed += len(ids)
        if len(ids) < _CLOSE_MAX:
            break
    if closed:
        log.info("commands_closed", count=closed)
    return closed


class _Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device gets. `mode` is that of the path, `expires_at` Unix seconds.

    `replayed`: it is sent to a replay's identity, and whoever gets it must not execute it.
    """

    name: str
    params: msgspec.Raw
    mode: str
    expires_at: float
    replayed: bool = False


def _request(copy: store.Outgoing) -> bytes:
    replayed = is_replay_id(copy.device)
    mode = Mode.DRY_RUN if replayed else copy.mode
    return msgspec.json.encode(_Request(copy.name, copy.params, mode, copy.expires_at, replayed))


async def _send(ctx: Services, copies: Sequence[store.Outgoing]) -> None:
    """Publish copies. One that fails stays marked as sent, and is repeated as if it had got lost."""
    lost = await ctx.publisher.to_devices(
        [
            ToDevice(
                f"$aws/commands/things/{one.device}/executions/{one.id}/request/json",
                _request(one),
                stored=not one.live,
            )
            for one in copies
        ]
    )
    if lost:
        log.warning("command_copies_lost", reason=lost)


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
            store.Answer(
                command=execution,
                path=reported.path or Path.NEW,
                reported=reported,
                at=message.at,
                device=device,
            )
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
    await ctx.publisher.to_devices(
        [
            ToDevice(
                f"$aws/commands/things/{one.device}/executions/{one.body.execution_id}/response/"
                f"{'accepted' if isinstance(one.body, _Accepted) else 'rejected'}/json",
                msgspec.json.encode(one.body),
                stored=False,
            )
            for one in told
        ]
    )
