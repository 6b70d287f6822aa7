"""Following the log: what devices sent is worked off in groups, each with its position in one transaction.

One process at a time follows as a given reader. What came by QoS 0 joins the groups without a position.
Killed at any moment, it goes on behind the last group that was committed. Answers, which follow a commit, may
be lost then; an effect never is, and no message of the log has its effect twice.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import msgspec
from nats.aio.client import Client

from fleetlift.backend.context import Context
from fleetlift.bus.live import listen
from fleetlift.bus.log import LogBatch, LogPosition, newest, read
from fleetlift.cancelling import end
from fleetlift.core.errors import Conflict
from fleetlift.log import get_logger
from fleetlift.store import positions
from fleetlift.store.pool import Conn, Pool, sole_owner

log = get_logger(__name__)


GROUP_MAX = 2000  # messages in one transaction
LIVE_MAX = 20_000  # QoS 0 messages that may wait; beyond that they are dropped, as QoS 0 allows
_LINGER_S = 0.005
_RETRY_S = 0.25
_RETRY_S_MAX = 5.0
_FINISH_S = 5.0  # less than after which `end` asks again


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message of a device. `seq` None: it came by QoS 0 and is in no log. `at`: Unix seconds."""

    subject: str
    payload: bytes
    at: float
    seq: int | None = None


# what a group does: its effects on the connection, and then, once they are committed, what it returns
Then = Callable[[], Awaitable[None]]
Apply = Callable[[Conn, Sequence[Message]], Awaitable[Then]]


async def until_stopped(ctx: Context, *work: Awaitable[None]) -> None:
    """Run `work` until it ends, fails, or the context is to stop; then cancel what is left and await it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_plainly(one)) for one in work]
        stop = asyncio.create_task(ctx.stop.wait())
        try:
            await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            await end(tasks)


async def follow(
    ctx: Context, *, reader: str, filters: Sequence[str], apply: Apply, now: Callable[[], float]
) -> None:
    """Work off what devices publish on `filters`, for ever, as the only one who does so for `reader`."""
    while True:
        async with sole_owner(ctx.settings.database_url, f"reader {reader}") as owner:
            log.info("reader_started", reader=reader)
            await _Follower(ctx, reader, filters, apply, now, owner).run()
        log.info("reader_starts_again", reader=reader)


async def heard_until(pool: Pool, nc: Client, *, reader: str, filters: Sequence[str], now: float) -> float:
    """Until when `reader` has heard all that devices stored on `filters`, Unix seconds; `now`: it waits for
    nothing. Raises Unavailable when NATS does not tell."""
    created, seq, at = await newest(nc, filters)
    async with pool.acquire() as conn:
        place = await positions.load(conn, reader)
    if seq == 0:
        return now
    if place is None or place[0] != created:
        return 0.0  # nothing of this log
    # A log that has lost its end gives the same numbers again: the time tells.
    if seq <= place[1] and (place[2] is None or at <= place[2] + 0.001):
        return now
    return place[2] or 0.0


async def _plainly(work: Awaitable[None]) -> None:
    await work


class _LostPlace(Exception):
    """Another process has moved this reader: load the position again."""


class _Follower:
    def __init__(
        self,
        ctx: Context,
        reader: str,
        filters: Sequence[str],
        apply: Apply,
        now: Callable[[], float],
        owner: "asyncpg.Connection[Any]",
    ) -> None:
        self.ctx, self.reader, self.filters, self.apply, self.now = ctx, reader, filters, apply, now
        self.owner = owner
        self.live: deque[Message] = deque()
        self.batches: deque[LogBatch] = deque()
        self.arrived = asyncio.Event()
        self.room = asyncio.Event()
        self.position: positions.Place | None = None
        self.dropped = 0
        self.telling: asyncio.Task[None] | None = None  # the answers of the last group, on their way

    async def run(self) -> None:
        self.position = await self._load()
        group = [
            asyncio.create_task(
                listen(self.ctx.settings, subjects=self.filters, name=self.reader, deliver=self._take_live)
            ),
            asyncio.create_task(self._read_log()),
            asyncio.create_task(self._work()),
        ]
        try:
            done, _ = await asyncio.wait(group, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with contextlib.suppress(_LostPlace):
                    task.result()
        finally:
            await end(group)
            if self.telling is not None:
                await asyncio.wait([self.telling], timeout=_FINISH_S)
                await end([self.telling])

    def _take_live(self, subject: str, payload: bytes) -> None:
        if len(self.live) >= LIVE_MAX:
            self.dropped += 1
            if self.dropped == 1 or self.dropped % LIVE_MAX == 0:
                log.warning("live_messages_dropped", reader=self.reader, dropped=self.dropped)
            return
        self.live.append(Message(subject, payload, self.now()))
        self.arrived.set()

    async def _read_log(self) -> None:
        after = self.position
        async for batch in read(
            self.ctx.settings,
            after=after,
            filters=self.filters,
            name=self.reader,
            batch_max=GROUP_MAX,
            linger_s=_LINGER_S,
        ):
            while len(self.batches) >= 2:
                self.room.clear()
                await self.room.wait()
            self.batches.append(batch)
            self.arrived.set()

    async def _work(self) -> None:
        while True:
            await self.arrived.wait()
            if self.owner.is_closed():
                raise _LostPlace
            group: list[Message] = []
            position: LogPosition | None = None
            while self.batches and len(group) < GROUP_MAX:
                batch = self.batches.popleft()
                position = batch.position
                group.extend(Message(m.subject, m.payload, m.at, m.seq) for m in batch)
            self.room.set()
            while self.live and len(group) < GROUP_MAX:
                group.append(self.live.popleft())
            if not self.batches and not self.live:
                self.arrived.clear()
            await self._finish(self._group(group, position))

    async def _finish(self, work: Awaitable[None]) -> None:
        """Await a group; when told to stop meanwhile, let it come to its end first, for a while."""
        task = asyncio.create_task(_plainly(work))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=_FINISH_S)
            if not task.done():
                await end([task])
            raise

    async def _group(self, messages: Sequence[Message], position: LogPosition | None) -> None:
        """One group, again and again until it is committed; a message that cannot be kept is set aside."""
        retry_s = _RETRY_S
        while True:
            try:
                then = await self._commit(messages, position)
                break
            except Conflict as problem:
                log.warning("reader_moved_by_another", reader=self.reader, reason=str(problem))
                raise _LostPlace from problem
            except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, ValueError) as problem:
                await self._divide(messages, position, problem)
                return
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as problem:
                log.warning("group_put_off", reader=self.reader, reason=str(problem) or repr(problem))
                await asyncio.sleep(retry_s)
                retry_s = min(_RETRY_S_MAX, retry_s * 2)
        # Answers leave while the next group is worked off, but never before those of the group before.
        await self._told()
        self.telling = asyncio.create_task(_plainly(then()))

    async def _told(self) -> None:
        if (telling := self.telling) is None:
            return
        await asyncio.wait([telling])
        self.telling = None
        if not telling.cancelled() and (problem := telling.exception()) is not None:
            log.warning("answers_lost", reader=self.reader, reason=str(problem) or repr(problem))

    async def _commit(self, messages: Sequence[Message], position: LogPosition | None) -> Then:
        async with self.ctx.pool.acquire() as conn, conn.transaction():
            then = await self.apply(conn, messages)
            if position is not None:
                await positions.advance(conn, self.reader, before=self.position, after=position.as_row())
        if position is not None:
            self.position = position.as_row()
        return then

    async def _divide(
        self, messages: Sequence[Message], position: LogPosition | None, problem: Exception
    ) -> None:
        """Halve a group that the database refuses, until the one message that is the cause stands alone."""
        if len(messages) > 1:
            half = len(messages) // 2
            for part in (messages[:half], messages[half:]):
                last = max(((m.seq, m.at) for m in part if m.seq is not None), default=None)
                await self._group(
                    part, None if last is None or position is None else LogPosition(position.created, *last)
                )
            return
        (message,) = messages
        log.error("message_set_aside", reader=self.reader, subject=message.subject, reason=str(problem))

        async def set_aside(conn: Conn, _: Sequence[Message]) -> Then:
            await conn.execute(
                """INSERT INTO dead_letter (received_at, path, topic, device, reason, payload, payload_bytes)
                   VALUES (to_timestamp($1), 'mqtt', $2, $3, $4, $5, $6)""",
                message.at,
                message.subject.replace(".", "/"),
                "",
                f"{self.reader}: {problem}"[:500].replace("\x00", ""),
                message.payload[:65_536],
                len(message.payload),
            )
            return _nothing

        apply, self.apply = self.apply, set_aside
        try:
            await self._group(messages, position)
        finally:
            self.apply = apply

    async def _load(self) -> positions.Place | None:
        retry_s = _RETRY_S
        while True:
            try:
                async with self.ctx.pool.acquire() as conn:
                    return await positions.load(conn, self.reader)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as problem:
                log.warning("position_not_readable", reader=self.reader, reason=str(problem))
                await asyncio.sleep(retry_s)
                retry_s = min(_RETRY_S_MAX, retry_s * 2)


async def _nothing() -> None:
    return
