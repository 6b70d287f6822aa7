"""Following: what is committed on one database, as it concerns one tenant, is applied to another.

`prepare` makes slot and publication and gives the snapshot for the copy; `run` spools what comes; after
`start_applying` it is applied, in whole transactions, each target transaction with the position that it
reaches, so exactly once. Killed anywhere, or cut off from either database, it goes on from that position.

Partitions are published each by itself (not by their root), because the TRUNCATE of a partition would
otherwise not be told.
"""

import asyncio
import contextlib
import gc
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import asyncpg
import psycopg2

from fleetlift.cancelling import end, raise_if_cancelled
from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import Differs
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.pgoutput import BadMessage
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.log import get_logger
from fleetlift.store.pool import lock_key
from fleetlift.tenant.apply import connect, connect_applier
from fleetlift.tenant.canary import CANARY
from fleetlift.tenant.follow_books import BOOKS, OLDEST, counted
from fleetlift.tenant.follow_session import Session, close_soon
from fleetlift.tenant.follow_state import Direction, Following, FollowProgress, FollowState, Prepared, Stop
from fleetlift.tenant.names import MOVE_SCHEMA, publication_name, reverse_slot_name, slot_name
from fleetlift.tenant.spool import Spool
from fleetlift.tenant.stream import Stream
from fleetlift.tenant.touched import TOUCHED_MAX, Touched, TouchedKeys

__all__ = [
    "CANARY",
    "OLDEST",
    "SPOOL_BYTES_MAX",
    "TOUCHED_MAX",
    "Direction",
    "FollowProgress",
    "FollowState",
    "Follower",
    "Prepared",
    "Touched",
    "TouchedKeys",
]

log = get_logger(__name__)

SPOOL_BYTES_MAX: Final = 20 << 30

_CANARY_S: Final = 1.0
_GC_THRESHOLD: Final = 50_000
_CAUGHT_UP_S: Final = 2.0
_RETRY_S: Final = 0.1
_RETRY_S_MAX: Final = 5.0


class Follower:
    """Follows `source_url` for `target_url`. In the reverse direction the source is the move's target.

    `directory`: for the spool. `target_settings`: session settings of the applying connection (what passes a
    fence). `at` is called at named points, for tests that kill there.
    """

    def __init__(
        self,
        source_url: str,
        target_url: str,
        closure: Closure,
        *,
        move: str,
        directory: Path,
        direction: Direction = Direction.FORWARD,
        target_settings: Mapping[str, str] | None = None,
        spool_bytes_max: int = SPOOL_BYTES_MAX,
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._source_url = source_url
        self._target_url = target_url
        reverse = direction is Direction.REVERSE
        self.slot = reverse_slot_name(move) if reverse else slot_name(move)
        self.publication = self.slot if reverse else publication_name(move)
        self._f = Following(
            source_url,
            target_url,
            closure,
            [closure.schema.tables[name] for name in closure.order if closure.parts[name] is not Part.NONE],
            move=move,
            slot=self.slot,
            publication=self.publication,
            directory=directory / f"spool-{direction}",
            reverse=reverse,
            at=at,
        )
        if reverse:
            self._f.applying.set()
        self._settings = target_settings or {}
        self._spool_bytes_max = spool_bytes_max
        self._stream: Stream | None = None
        self._reconnects = 0
        self._waits = ""
        self._trouble = ""
        self._stopped = ""
        self.touched = self._f.touched

    # --- what is asked of it

    async def prepare(self, *, anew: bool = True) -> Prepared:
        """Make what following needs on both sides: settings, publication, slot, books. Idempotent.

        Raises BadInput when the source cannot be followed, Conflict when a slot that was there is lost: never
        is it made anew in silence. `anew=False`: nothing is made, it has to be there.
        """
        target = await connect(self._target_url, name=f"follow {self.slot}")
        source = await connect(self._source_url, name=f"follow {self.slot}")
        try:
            await self._f.books.check_source(source)
            await target.execute(BOOKS)
            row = await target.fetchrow(
                f"SELECT (lsn - '0/0')::bigint AS lsn FROM {MOVE_SCHEMA}.position WHERE slot = $1", self.slot
            )
            if row is not None:
                await self._f.books.check_slot(source, self._f.applied)
                self._f.applied = row["lsn"]
                return Prepared(snapshot=None, lsn=row["lsn"])
            if not anew:
                raise Conflict(
                    f"{self.slot} is not in {MOVE_SCHEMA}.position any more, so nobody knows what has come: "
                    + ("some changes would be lost" if self._f.reverse else "the copy must start again")
                )
            await self._f.books.drop_slot(source)
            self._f.at("before identity")
            await self._f.books.set_identities(source, target)
            self._f.at("before publication")
            await self._f.books.make_publication(source)
            leaves = await self._f.books.leaf_names(source)
            self._f.at("before slot")
            self._f.touched.overflow()  # what came before it is not known here
            self._f.state = FollowState.WAITING
            lsn, snapshot = await self._f.books.make_slot()
            self._f.state = FollowState.NEW
            self._f.at("after slot")
            token = secrets.token_hex(8)
            shutil.rmtree(self._f.directory, ignore_errors=True)
            self._f.directory.mkdir(parents=True)
            (self._f.directory / "token").write_text(token)
            async with target.transaction():
                await target.execute(
                    f"INSERT INTO {MOVE_SCHEMA}.position (slot, lsn, spool) VALUES ($1, '0/0'::pg_lsn + "
                    "$2::numeric, $3)",
                    self.slot,
                    lsn,
                    token,
                )
                for table in ("partition", "unowned_row"):
                    await target.execute(f"DELETE FROM {MOVE_SCHEMA}.{table} WHERE slot = $1", self.slot)
                await target.execute(
                    f"INSERT INTO {MOVE_SCHEMA}.partition SELECT $1, unnest($2::text[])", self.slot, leaves
                )
            self._f.applied = lsn
            return Prepared(snapshot=snapshot, lsn=lsn)
        finally:
            await source.close()
            await target.close()

    def start_applying(self) -> None:
        """The copy is done: what was spooled, and what comes, goes to the target from now on."""
        self._f.applying.set()

    async def release_snapshot(self) -> None:
        """Nobody copies from the snapshot of `prepare` any more: it holds back the source's vacuum no longer.
        Idempotent."""
        await self._f.books.release_snapshot()

    def must_pass(self, lsn: int) -> None:
        """Rows were written to the target by somebody else: see `Following.must_pass`."""
        self._f.must_pass(lsn)

    def forget_stop(self) -> None:
        """What stopped it may have been mended: it is shown no more. Rows noted as touched stay noted."""
        if self._stopped:
            self._f.state, self._stopped = FollowState.RECONNECTING, ""

    async def run(self) -> None:
        """Follow until cancelled. Raises Conflict when it cannot go on (run it again once that is mended);
        connects again for everything else."""
        self.forget_stop()
        pause_s = _RETRY_S
        if gc.get_threshold()[0] < _GC_THRESHOLD:
            # What a batch holds stays until it is applied: looking through it again and again takes a third
            # of the time.
            gc.set_threshold(_GC_THRESHOLD, 50, 100)
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._session()
                except (Stop, Differs, BadMessage) as problem:
                    self._f.state, self._stopped = FollowState.STOPPED, str(problem)
                    log.error("following_stopped", slot=self.slot, why=str(problem))
                    raise Conflict(str(problem)) from problem
                except Conflict as problem:
                    self._f.state, self._stopped = FollowState.STOPPED, str(problem)
                    log.error("following_stopped", slot=self.slot, why=str(problem))
                    raise
                except (
                    OSError,
                    TimeoutError,
                    asyncpg.PostgresError,
                    asyncpg.InterfaceError,
                    asyncpg.InternalClientError,  # a connection that broke in the middle of a step
                    psycopg2.Error,
                ) as problem:
                    raise_if_cancelled()
                    self._classify(problem)
                    self._trouble = f"{type(problem).__name__}: {problem}".strip()
                    log.warning("following_connects_again", slot=self.slot, why=self._trouble)
                self._f.state = FollowState.RECONNECTING
                self._reconnects += 1
                pause_s = _RETRY_S if time.monotonic() - began > 10 else min(_RETRY_S_MAX, pause_s * 2)
                await asyncio.sleep(pause_s)
        finally:
            for wanted in self._f.tidy_wanted if self._stopped else ():
                if not wanted.done():
                    wanted.set_exception(Conflict(self._stopped))
            await self._f.tell_moved()
            await self._f.books.release_snapshot()

    @property
    def progress(self) -> FollowProgress:
        stream, spool = self._stream, self._f.spool
        flushed = self._f.canaries.flushed
        received = max(stream.received if stream else 0, self._f.applied)
        now = time.monotonic()
        return FollowProgress(
            state=self._f.state,
            received_lsn=received,
            applied_lsn=self._f.applied,
            fresh_until=self._f.fresh_until,
            rows=self._f.rows,
            rows_s=self._f.rate(now),
            transactions=self._f.transactions,
            entered=self._f.entered,
            left=self._f.left,
            not_carried=self._f.not_carried.total(),
            spooled_bytes=spool.size_bytes if spool else 0,
            queued_bytes=stream.queued_bytes if stream else 0,
            lag_bytes=max(0, flushed - self._f.applied) if flushed else None,
            lag_s=self._f.canaries.lag_s(now),
            caught_up=self.caught_up,
            reconnects=self._reconnects,
            waits=self._waits or (stream.paused if stream else ""),
            trouble=self._trouble,
            stopped=self._stopped,
        )

    @property
    def caught_up(self) -> bool:
        """All that was on the source two seconds ago is on the target, proven by a canary that came out."""
        now = time.monotonic()
        lag_s = self._f.canaries.lag_s(now)
        return (
            self._f.state is FollowState.LIVE
            and lag_s is not None
            and lag_s < _CAUGHT_UP_S
            and now - self._f.canaries.out_at < _CAUGHT_UP_S + _CANARY_S
            and self._f.applied >= self._f.fresh_until
            and not self._f.unsettled_until
        )

    async def reached(self, lsn: int, within_s: float) -> bool:
        """Whether everything up to `lsn` of the source's log is on the target, at last after `within_s`."""
        deadline = time.monotonic() + within_s
        nudged = 0.0
        while self._f.applied < lsn:
            if self._stopped:
                return False
            now = time.monotonic()
            if now >= deadline:
                return False
            if now - nudged > 0.2:
                # The log may end with what does not come by the stream, so something has to come behind it.
                nudged = now
                with contextlib.suppress(
                    OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError
                ):
                    async with asyncio.timeout(max(0.01, deadline - now)):
                        await self._f.canaries.emit()
                raise_if_cancelled()
            async with self._f.moved:
                if self._f.applied < lsn and not self._stopped:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(max(0.001, min(0.2, deadline - time.monotonic()))):
                            await self._f.moved.wait()
        return True

    async def not_carried(self) -> Mapping[TableName, int]:
        """How many changes stayed behind, by table: updates and deletes of rows that all tenants share."""
        target = await connect(self._target_url, name=f"follow {self.slot}")
        try:
            if not await target.fetchval(f"SELECT to_regclass('{MOVE_SCHEMA}.position') IS NOT NULL"):
                return {}
            told = await target.fetchval(
                f"SELECT to_jsonb(p) ->> 'not_carried' FROM {MOVE_SCHEMA}.position p WHERE slot = $1",
                self.slot,
            )
            return counted(told or "{}")
        finally:
            await target.close()

    async def tidy(self) -> int:
        """Take away what nothing on the target supports or refers to any more, before a verification; how
        many rows went. Only once `fresh_until` is passed does the target hold all that supports its rows.
        Raises Conflict when following has stopped."""
        if self._stopped:
            raise Conflict(self._stopped)
        wanted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._f.tidy_wanted.append(wanted)
        if self._stream is not None:
            self._stream.interrupt()
        return await wanted

    async def drop(self) -> None:
        """Remove slot and publication from the source, give tables their identity back, and the spool away.
        Idempotent. `run` must have ended."""
        await self._f.books.release_snapshot()
        source = await connect(self._source_url, name=f"follow {self.slot}")
        try:
            await self._f.books.drop_slot(source)
            await source.execute(f"DROP PUBLICATION IF EXISTS {quoted(self.publication)}")
            with contextlib.suppress(OSError, asyncpg.CannotConnectNowError):
                target = await connect(self._target_url, name=f"follow {self.slot}")
                try:
                    await self._f.books.restore_identities(source, target)
                    await self._f.books.close(target, drop=self._f.reverse)
                finally:
                    await target.close()
        finally:
            await source.close()
        shutil.rmtree(self._f.directory, ignore_errors=True)

    # --- a session: from connecting to the first thing that breaks

    async def _session(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            target = await connect_applier(
                self._target_url, name=f"follow {self.slot}", settings=self._settings
            )
            stack.push_async_callback(close_soon, target)
            if not await target.fetchval("SELECT pg_try_advisory_lock($1)", lock_key(f"follow {self.slot}")):
                raise OSError("another follower of this move still holds the target")
            source = await connect(self._source_url, name=f"follow {self.slot}")
            stack.push_async_callback(close_soon, source)
            session = Session(self._f, source, target, stack)
            position = await session.open()
            await self._f.books.check_slot(source, self._f.applied)
            spool = Spool(self._f.directory)
            self._f.spool = spool
            spool.open()
            stack.callback(spool.close)
            stream = Stream(
                self._source_url,
                slot=self.slot,
                publication=self.publication,
                from_lsn=max(position, spool.last_commit),
                spool=spool,
                spool_bytes_max=self._spool_bytes_max,
            )
            stream.applied = position
            self._stream = stream
            stack.push_async_callback(stream.stop)
            self._f.state = FollowState.CATCHING_UP if self._f.applying.is_set() else FollowState.SPOOLING
            self._f.canaries.side = await connect(self._source_url, name=f"canary {self.slot}")
            stack.push_async_callback(close_soon, self._f.canaries.side)
            self._f.canaries.clear()
            stream.start()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_plain(self._keep_canaries())),
                    group.create_task(_plain(session.apply_all(stream))),
                ]
                try:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await end(tasks)
            for task in done:
                if problem := task.result():
                    raise problem

    async def _keep_canaries(self) -> None:
        side = self._f.canaries.side
        assert side is not None
        while True:
            await self._f.canaries.emit()
            async with self._f.canaries.lock:
                row = await side.fetchrow(
                    "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1", self.slot
                )
                if row is None or row["wal_status"] == "lost":
                    await self._f.books.check_slot(side, self._f.applied)
                await self._check_partitions(side)
            await asyncio.sleep(_CANARY_S)

    async def _check_partitions(self, side: "asyncpg.Connection[Any]") -> None:
        """A partition that is detached or dropped takes its rows along without a word in the stream."""
        if not any(table.partitioned for table in self._f.tables) or self._f.known_leaves is None:
            return
        there = set(await self._f.books.leaf_names(side))
        if gone := sorted(self._f.known_leaves - there):
            raise Stop(
                f"the partition {gone[0]} was detached or dropped on the source: its rows went without "
                "being told, "
                "so the copy must start again"
            )
        self._f.known_leaves |= there

    def _classify(self, problem: BaseException) -> None:
        """Raise for what connecting again does not mend."""
        text = str(problem)
        if isinstance(problem, psycopg2.Error):
            if "replication slot" in text and (
                "does not exist" in text or "no longer" in text or "invalidated" in text
            ):
                self._give_up(
                    f"the replication slot {self.slot} is lost ({text.strip()}): the copy must start again"
                )
            if "has already been removed" in text or ("publication" in text and "does not exist" in text):
                self._give_up(
                    f"the source cannot send what was changed ({text.strip()}): the copy must start again"
                )
            return
        if isinstance(problem, asyncpg.PostgresError) and problem.sqlstate:
            state = problem.sqlstate
            if state.startswith(("08", "53", "57", "40", "55", "58")) or state == "25P03":
                return
            if (
                state in ("23505", "23P01")
                and self._f.applied >= self._f.careful_until
                and self._stream is not None
            ):
                # Values may only have been swapped: the same again, transaction by transaction.
                self._f.careful_until = max(self._stream.received, self._f.applied + 1)
                return
            detail = (getattr(problem, "detail", None) or "")[:300]
            constraint = getattr(problem, "constraint_name", None)
            side = "source" if self._f.reverse else "target"
            self._give_up(
                f"the {side} refuses a change: {problem.args[0] if problem.args else text}"
                + (f" (constraint {constraint})" if constraint else "")
                + (f": {detail}" if detail else "")
            )

    def _give_up(self, why: str) -> None:
        self._f.state, self._stopped = FollowState.STOPPED, why
        log.error("following_stopped", slot=self.slot, why=why)
        raise Conflict(why)


async def _plain(work: Any) -> Exception | None:
    """Its exception as a result: a group must not wrap it."""
    try:
        await work
    except Exception as problem:
        return problem
    return None
