"""Copying a tenant's rows: chunks by key from one snapshot, in parallel, resumable at every chunk.

Rows pass through as the server sends them, nothing is parsed. A chunk's rows and the note that it is done are
one transaction on the target, so each chunk is copied exactly once whatever is killed. These transactions do
not wait for the disk (`synchronous_commit = off`): a crash of the target loses rows and note together, and
what is noted is read again before the copy is called done, after a commit that did wait.
"""

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, Literal, TypeAlias, TypeVar

import asyncpg
import msgspec

from fleetlift.cancelling import end, raise_if_cancelled
from fleetlift.core.errors import BadInput, Conflict, FleetError, Unavailable
from fleetlift.core.tenant.chunks import (
    ALL,
    OWNED,
    SHARED,
    Chunk,
    CopyProgress,
    Rate,
    Split,
    TableProgress,
    TypeFacts,
    batches,
    chunks_of,
    left_s,
    range_condition,
    split_query,
    steps_a_chunk,
    thinned,
    travels_binary,
)
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.schema import Table, TableName, quoted, quoted_table
from fleetlift.core.tenant.throttle import (
    FULL,
    Replica,
    SourceLoad,
    Throttle,
    pace,
    rest_s,
    rows_rest_s,
)
from fleetlift.tenant.membership import Within, owned_condition, shared_condition
from fleetlift.tenant.names import MOVE_SCHEMA, slot_name

T = TypeVar("T")

Conn: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Conditions = Callable[[Closure, TableName, str, Within], Mapping[str, str]]
"""By part ("owned", "shared", "all"), the SQL that selects a table's coming rows, over an alias; what is
given last holds of them as well."""

_ALIAS: Final = "copied"
_BOUNDS_OF: Final = "\0{}\0"  # where a chunk's bounds belong; no SQL holds the character 0
_BOUNDS_AT: Final = re.compile("\0(.*?)\0")
_PIECES_MAX: Final = 16  # read from the source and not yet sent to the target, by a worker
_PIECE_BYTES: Final = 256 << 10
_WATCHED_EVERY_S: Final = 1.0
_TOLD_EVERY_S: Final = 0.5

_SESSION: Final[Mapping[str, str]] = {
    "application_name": "fleetlift copy",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    # Refused rather than silently fewer rows, where a policy would hide some.
    "row_security": "off",
    # Keys are compared by their text, and some tables travel as text: it must mean the same on both sides.
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
}
_TARGET_SESSION: Final[Mapping[str, str]] = {**_SESSION, "synchronous_commit": "off"}

_BOOKKEEPING = f"""
CREATE SCHEMA IF NOT EXISTS {MOVE_SCHEMA};
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.chunk (
    move text, table_name text, part text, number int, lower text[], upper text[], counted bigint NOT NULL,
    rows bigint, bytes bigint, done_at timestamptz, PRIMARY KEY (move, table_name, part, number));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.copied (
    move text PRIMARY KEY, fresh_until pg_lsn, done_at timestamptz);
"""

_TRANSIENT: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.SerializationError,  # also what a standby says when replay has to remove rows that we still read
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TooManyConnectionsError,
    asyncpg.OutOfMemoryError,
)
_NO_SNAPSHOT: Final = (
    asyncpg.InvalidParameterValueError,
    asyncpg.UndefinedObjectError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.FeatureNotSupportedError,
)


class CopyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied by all runs of the move together. `fresh_until_lsn`: everything up to it must have been
    applied before the target is right; "" when nothing was read but the slot's own snapshot."""

    rows: int
    bytes: int
    tables: Mapping[TableName, TableProgress]
    fresh_until_lsn: str = ""
    took_s: float = 0.0
    retried: int = 0

    @property
    def fresh_until(self) -> int:
        """`fresh_until_lsn` as a number, as `Follower.must_pass` takes it; 0 for ""."""
        high, _, low = self.fresh_until_lsn.partition("/")
        return (int(high, 16) << 32) + int(low, 16) if low else 0


class _SourceFailed(Exception):
    """Reading failed, not writing."""

    def __init__(self, problem: BaseException) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """`generation` grows with every one that had to be taken anew."""

    id: str
    generation: int


def conditions_of(
    closure: Closure, table: TableName, alias: str, within: Within | None = None
) -> Mapping[str, str]:
    """Which rows of a table come, by the closure's rules; `within`: the surrounding query's own condition."""
    match closure.parts[table]:
        case Part.WHOLE:
            return {ALL: "TRUE"}
        case Part.SHARED:
            return {ALL: shared_condition(closure, table, alias, within)}
        case Part.OWNED if closure.brought_by(table):
            return {
                OWNED: owned_condition(closure, table, alias, within),
                SHARED: shared_condition(closure, table, alias, within),
            }
        case Part.OWNED:
            return {OWNED: owned_condition(closure, table, alias, within)}
        case _:
            return {}


class Copier:
    """Copies what belongs to a tenant into a schema made by `create_schema`, table by table in chunks.

    `snapshot` is the one exported with the move's slot; where it is gone (or None) a fresh one is taken, and
    how far the stream must have been applied for it is noted as `fresh_until_lsn`. With `replica_url` rows
    are read from that standby, once it has replayed `consistent_lsn` (by default what the slot has
    confirmed). `run` may be called again after whatever stopped it: chunks that are done stay done.
    `on_step` hears of every step before it is taken, for tests that stop at each.
    """

    def __init__(
        self,
        source_url: str,
        target_url: str,
        closure: Closure,
        *,
        move: str = "move",
        snapshot: str | None = None,
        consistent_lsn: str | int | None = None,
        replica_url: str | None = None,
        chunk_rows: int = 10_000,
        workers: int = 2,
        throttle: Throttle | None = None,
        patience_s: float = 60.0,
        replica_wait_s: float = 600.0,
        conditions: Conditions = conditions_of,
        on_step: Callable[[str], None] | None = None,
    ) -> None:
        if chunk_rows < 1 or not 1 <= workers <= 64:
            raise BadInput("a copy needs chunks of at least one row, and 1 to 64 workers")
        self._source_url, self._target_url, self._closure = source_url, target_url, closure
        self._move, self._replica_url = move, replica_url
        if isinstance(consistent_lsn, int):
            consistent_lsn = f"{consistent_lsn >> 32:X}/{consistent_lsn & 0xFFFFFFFF:X}"
        self._consistent_lsn = consistent_lsn
        self._chunk_rows, self._workers = chunk_rows, workers
        self._throttle = throttle or Throttle()
        self._patience_s, self._replica_wait_s = patience_s, replica_wait_s
        self._conditions = conditions
        self._on_step = on_step
        # A snapshot of the primary cannot be used on a standby.
        self._snapshot = _Snapshot(id=snapshot, generation=0) if snapshot and not replica_url else None
        self._holder: Conn | None = None
        self._renewing = asyncio.Lock()
        self._binary: dict[TableName, bool] = {}
        self._sql: dict[TableName, Mapping[str, str]] = {}
        self._to_split: deque[TableName] = deque()
        self._to_copy: deque[tuple[Chunk, ...]] = deque()
        self._splitting = 0
        self._changed = asyncio.Event()
        self._pace = FULL
        self._paced = asyncio.Event()  # set while the pace is above 0
        self._phase = "counting"
        self._totals: dict[TableName, TableProgress] = {}
        self._moving_bytes = 0  # of chunks that are not done yet
        self._rows_rate, self._bytes_rate = Rate(), Rate()
        self._retried = 0
        self._last_problem = ""

    # -- progress -----------------------------------------------------------------------------------------

    @property
    def progress(self) -> CopyProgress:
        rows = sum(table.rows for table in self._totals.values())
        rows_total = sum(max(table.rows, table.rows_total) for table in self._totals.values())
        rate = self._rows_rate.a_second
        return CopyProgress(
            phase=self._phase,
            rows=rows,
            rows_total=rows_total,
            bytes=sum(table.bytes for table in self._totals.values()) + self._moving_bytes,
            rows_s=rate,
            bytes_s=self._bytes_rate.a_second,
            left_s=None if self._phase == "counting" else left_s(rows, rows_total, rate),
            tables=dict(self._totals),
            throttled_why=self._pace.why,
            retried=self._retried,
            last_problem=self._last_problem,
        )

    def _step(self, name: str) -> None:
        if self._on_step is not None:
            self._on_step(name)

    # -- the run ------------------------------------------------------------------------------------------

    async def run(self, progress: Callable[[CopyProgress], None] | None = None) -> CopyResult:
        """Copy what is not on the target yet. Cancelling leaves what is done.

        Raises Conflict when the target refuses rows, Unavailable when a database stays away or a disk is
        full; both say what to do, and the copy goes on where it was when it is run again.
        """
        began = time.monotonic()
        try:
            await self._patiently("preparing", self._prepare)
            async with asyncio.TaskGroup() as group:
                watchers = [group.create_task(self._watch_source(), name="copy: source's load")]
                if progress is not None:
                    watchers.append(group.create_task(self._tell(progress), name="copy: progress"))
                while not await self._patiently("reading what is done", self._load_chunks):
                    await self._copy_all()
                await end(watchers)
        except* FleetError as problems:
            raise _first(problems) from problems
        finally:
            await self._drop_holder()
        self._phase = "done"
        result = await self._patiently("reading what is done", lambda: self._result(began))
        if progress is not None:
            progress(self.progress)
        return result

    async def _copy_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(number), name=f"copy: worker {number}")

    async def _prepare(self) -> None:
        async with self._source() as source:
            self._binary = await _binary_tables(source, self._closure)
        async with self._target() as target:
            async with target.transaction():
                await target.execute(_BOOKKEEPING)
            missing = [
                table
                for table in self._closure.order
                if await target.fetchval("SELECT to_regclass($1)", quoted_table(table)) is None
            ]
        if missing:
            raise Conflict(f"the target has no table {missing[0]}: create the schema there first")
        # A chunk's bounds are put in later, where a condition reads its own table: else each chunk would find
        # the whole table's rows anew.
        self._sql = {
            table: self._conditions(self._closure, table, _ALIAS, _BOUNDS_OF.format)
            for table in self._closure.order
        }

    async def _load_chunks(self) -> bool:
        """Read what is done and what is left; True when nothing is. What was noted is on the disk then."""
        conn = await _connect(self._target_url, {**_TARGET_SESSION, "synchronous_commit": "on"})
        async with _closing(conn):
            # This commit waits for the disk, and with it for all that came before it in the log.
            await conn.execute(
                f"INSERT INTO {MOVE_SCHEMA}.copied (move) VALUES ($1) "
                "ON CONFLICT (move) DO UPDATE SET done_at = NULL",
                self._move,
            )
            rows = await conn.fetch(
                f"SELECT table_name, part, number, lower, upper, counted, rows, bytes, "
                f"done_at IS NOT NULL AS done FROM {MOVE_SCHEMA}.chunk WHERE move = $1 "
                "ORDER BY table_name, part, number",
                self._move,
            )
            left: dict[TableName, list[Chunk]] = {table: [] for table in self._closure.order}
            totals = {table: TableProgress() for table in self._closure.order}
            for row in rows:
                table = row["table_name"]
                if table not in left:
                    continue
                totals[table] = _added(
                    totals[table],
                    rows=row["rows"] or 0,
                    rows_total=row["counted"],
                    bytes=row["bytes"] or 0,
                    chunks=int(row["done"]),
                    chunks_total=1,
                )
                if not row["done"]:
                    left[table].append(_chunk(row))
            self._totals = totals
            self._to_split = deque(
                table for table in self._closure.order if self._sql[table] and not totals[table].chunks_total
            )
            self._phase = "counting" if self._to_split else "copying"
            self._to_copy = deque(
                batches((chunk for table in self._closure.order for chunk in left[table]), self._chunk_rows)
            )
            if self._to_split or self._to_copy:
                return False
            await conn.execute(f"UPDATE {MOVE_SCHEMA}.copied SET done_at = now() WHERE move = $1", self._move)
            return True

    async def _result(self, began: float) -> CopyResult:
        async with self._target() as target:
            fresh = await target.fetchval(
                f"SELECT fresh_until::text FROM {MOVE_SCHEMA}.copied WHERE move = $1", self._move
            )
        return CopyResult(
            rows=sum(table.rows for table in self._totals.values()),
            bytes=sum(table.bytes for table in self._totals.values()),
            tables=dict(self._totals),
            fresh_until_lsn=fresh or "",
            took_s=time.monotonic() - began,
            retried=self._retried,
        )

    # -- workers ------------------------------------------------------------------------------------------

    async def _work(self, number: int) -> None:
        worker = _Worker(self)
        try:
            while True:
                # One worker goes ahead counting, the others copy what has been counted.
                if self._to_split and (number == 0 or not self._to_copy):
                    table = self._to_split.popleft()
                    self._splitting += 1
                    try:
                        chunks = await self._patiently(
                            f"counting {table}", partial(worker.split, table), worker.reset
                        )
                    finally:
                        self._splitting -= 1
                        self._changed.set()
                    self._add(table, chunks)
                elif self._to_copy:
                    batch = self._to_copy.popleft()
                    await self._wait_for_pace()
                    started = time.monotonic()
                    await self._patiently(
                        f"copying {batch[0].table}", partial(worker.copy, batch), worker.reset
                    )
                    await self._rest(sum(chunk.rows for chunk in batch), time.monotonic() - started)
                elif self._splitting:
                    self._changed.clear()
                    await self._changed.wait()
                else:
                    return
        finally:
            worker.close()

    def _add(self, table: TableName, chunks: Sequence[Chunk]) -> None:
        self._totals[table] = _added(
            self._totals[table], rows_total=sum(c.rows for c in chunks), chunks_total=len(chunks)
        )
        last = self._to_copy.pop() if self._to_copy else ()
        self._to_copy.extend(batches((*last, *chunks), self._chunk_rows))
        if not self._to_split and not self._splitting:
            self._phase = "copying"
        self._changed.set()

    def done(self, chunk: Chunk, rows: int, size: int) -> None:
        """A worker has committed a chunk."""
        self._totals[chunk.table] = _added(self._totals[chunk.table], rows=rows, bytes=size, chunks=1)

    def moving(self, size: int) -> None:
        """Bytes on their way; negative when they have arrived, or never will."""
        self._moving_bytes += size

    async def _patiently(
        self,
        what: str,
        attempt: Callable[[], Awaitable[T]],
        reset: Callable[[], None] = lambda: None,
    ) -> T:
        """Try again what fails for a passing reason, for `patience_s` at most."""
        first_failed_at: float | None = None
        for number in range(1_000_000):
            try:
                return await attempt()
            except (_SourceFailed, asyncpg.PostgresError, *_TRANSIENT) as problem:
                raise_if_cancelled()
                reset()
                reading = isinstance(problem, _SourceFailed)
                cause = problem.problem if isinstance(problem, _SourceFailed) else problem
                self._last_problem = f"{what}: {cause or type(cause).__name__}"
                if not isinstance(cause, _TRANSIENT):
                    raise self._explained(what, cause, reading=reading) from cause
                now = time.monotonic()
                first_failed_at = first_failed_at or now
                if now - first_failed_at > self._patience_s:
                    raise Unavailable(
                        f"{self._last_problem}; tried {number + 1} times. What is copied is kept: go on when "
                        "both databases are well"
                    ) from cause
                self._retried += 1
                await asyncio.sleep(min(5.0, 0.1 * 2 ** min(number, 10)))
        raise AssertionError

    def _explained(self, what: str, problem: BaseException, *, reading: bool) -> FleetError:
        kept = "What is copied is kept: run it again to go on"
        said = " ".join(str(problem).split()) or type(problem).__name__
        if isinstance(problem, asyncpg.DiskFullError):
            side = "source (for sorting)" if reading else "target"
            return Unavailable(f"{what}: the disk of the {side} is full: {said}. Make room. {kept}")
        if isinstance(problem, asyncpg.InsufficientPrivilegeError):
            return Conflict(
                f"{what}: {said}. The copy needs a user who may read every row of the source, and set "
                "session_replication_role on the target"
            )
        if isinstance(problem, asyncpg.IntegrityConstraintViolationError):
            return Conflict(f"{what}: the target refuses a row: {said} {kept}")
        return Conflict(f"{what}: {said}. {kept}")

    # -- pace ---------------------------------------------------------------------------------------------

    async def _wait_for_pace(self) -> None:
        while self._pace.share <= 0:
            await self._paced.wait()

    async def _rest(self, rows: int, worked_s: float) -> None:
        share = self._pace.share
        rest = rest_s(worked_s, share) if 0 < share < 1 else 0.0
        rest = max(rest, rows_rest_s(rows, worked_s, self._throttle.rows_s_max, self._workers))
        if rest > 0:
            await asyncio.sleep(rest)

    async def _watch_source(self) -> None:
        """Read the source's load once a second, on the primary also when rows come from a standby."""
        conn: Conn | None = None
        try:
            while True:
                try:
                    if conn is None or conn.is_closed():
                        conn = await _connect(self._source_url, {**_SESSION, "statement_timeout": "10s"})
                    load = await _source_load(conn, slot_name(self._move))
                except (asyncpg.PostgresError, *_TRANSIENT):
                    raise_if_cancelled()
                    load = SourceLoad(known=False)
                    if conn is not None:
                        conn.terminate()
                    conn = None
                self._pace = pace(load, self._throttle)
                if self._pace.share > 0:
                    self._paced.set()
                else:
                    self._paced.clear()
                await asyncio.sleep(_WATCHED_EVERY_S)
        finally:
            if conn is not None:
                conn.terminate()

    async def _tell(self, progress: Callable[[CopyProgress], None]) -> None:
        while True:
            now = time.monotonic()
            self._rows_rate.add(now, sum(table.rows for table in self._totals.values()))
            self._bytes_rate.add(
                now, sum(table.bytes for table in self._totals.values()) + self._moving_bytes
            )
            progress(self.progress)
            await asyncio.sleep(_TOLD_EVERY_S)

    # -- connections and snapshots ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _source(self) -> AsyncIterator[Conn]:
        conn = await _connect(self._replica_url or self._source_url, _SESSION)
        async with _closing(conn):
            yield conn

    @contextlib.asynccontextmanager
    async def _target(self) -> AsyncIterator[Conn]:
        conn = await _connect(self._target_url, _TARGET_SESSION)
        async with _closing(conn):
            yield conn

    async def open_reader(self) -> Conn:
        """A session that reads in the shared snapshot, which is taken anew when it is gone."""
        for attempt in range(4):
            snapshot = self._snapshot or await self._fresh_snapshot(-1)
            conn = await _connect(self._replica_url or self._source_url, _SESSION)
            try:
                await conn.execute(
                    "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; "
                    f"SET TRANSACTION SNAPSHOT '{snapshot.id}'"
                )
                # A worker that dies in a long count leaves no statement behind (PostgreSQL 14 and later).
                await conn.execute(
                    "SELECT pg_catalog.set_config(name, '5s', false) FROM pg_catalog.pg_settings "
                    "WHERE name = 'client_connection_check_interval'"
                )
            except _NO_SNAPSHOT:
                conn.terminate()
                if attempt == 3:
                    raise
                await self._fresh_snapshot(snapshot.generation)
            except BaseException:
                conn.terminate()
                raise
            else:
                return conn
        raise AssertionError

    async def open_writer(self) -> Conn:
        conn = await _connect(self._target_url, _TARGET_SESSION)
        try:
            # Triggers and rules have acted on the source already; foreign keys come later.
            await conn.execute("SET session_replication_role = replica")
        except BaseException:
            conn.terminate()
            raise
        return conn

    async def _fresh_snapshot(self, instead_of: int) -> _Snapshot:
        """Take a snapshot, note how far the stream must go for it, and only then let it be used."""
        async with self._renewing:
            if self._snapshot is not None and self._snapshot.generation > instead_of:
                return self._snapshot
            await self._drop_holder()
            conn = await _connect(self._replica_url or self._source_url, _SESSION)
            try:
                standby = await conn.fetchval("SELECT pg_is_in_recovery()")
                if standby:
                    await self._wait_for_replay(conn)
                await conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                snapshot_id = await conn.fetchval("SELECT pg_export_snapshot()")
                # Read after the snapshot was taken: no transaction that it sees has ended behind this.
                lsn = await conn.fetchval(
                    "SELECT pg_last_wal_replay_lsn()::text"
                    if standby
                    else "SELECT pg_current_wal_insert_lsn()::text"
                )
                async with self._target() as target, target.transaction():
                    # On the disk before it is used: it must not be lost while the snapshot goes on.
                    await target.execute("SET LOCAL synchronous_commit = on")
                    await target.execute(
                        f"INSERT INTO {MOVE_SCHEMA}.copied AS c (move, fresh_until) "
                        "VALUES ($1, $2::text::pg_lsn) ON CONFLICT (move) DO UPDATE SET fresh_until = "
                        "greatest(coalesce(c.fresh_until, '0/0'), excluded.fresh_until)",
                        self._move,
                        lsn,
                    )
                    # The follower's own note, where it is there: it outlives whoever would tell it.
                    if await target.fetchval("SELECT to_regclass($1)", f"{MOVE_SCHEMA}.position"):
                        await target.execute(
                            f"UPDATE {MOVE_SCHEMA}.position SET fresh_until = "
                            "greatest(fresh_until, $2::text::pg_lsn) WHERE slot = $1",
                            slot_name(self._move),
                            lsn,
                        )
            except BaseException:
                conn.terminate()
                raise
            self._holder = conn
            self._snapshot = _Snapshot(
                id=snapshot_id, generation=self._snapshot.generation + 1 if self._snapshot else 0
            )
            self._step("fresh snapshot")
            return self._snapshot

    async def _wait_for_replay(self, standby: Conn) -> None:
        """Until the standby shows what the slot's stream begins with, or more."""
        point = self._consistent_lsn
        if point is None:
            primary = await _connect(self._source_url, _SESSION)
            async with _closing(primary):
                point = await primary.fetchval(
                    "SELECT coalesce((SELECT confirmed_flush_lsn FROM pg_replication_slots "
                    "WHERE slot_name = $1), pg_current_wal_lsn())::text",
                    slot_name(self._move),
                )
        deadline = time.monotonic() + self._replica_wait_s
        while not await standby.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", point):
            self._last_problem = f"waiting for the replica to replay {point}"
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"the replica has not replayed {point} within {self._replica_wait_s:.0f} s: copy from "
                    "the primary (from_replica: false), or see why it is behind"
                )
            await asyncio.sleep(0.2)

    async def _drop_holder(self) -> None:
        if self._holder is not None:
            self._holder.terminate()
            self._holder = None

    def query_parts(self, chunk: Chunk) -> tuple[Table, str]:
        """The table, and the SQL that selects a chunk's rows."""
        table = self._closure.schema.tables[chunk.table]
        condition = _bounded(
            self._sql[chunk.table][chunk.part], lambda alias: range_condition(chunk, table, alias)
        )
        columns = ", ".join(f"{_ALIAS}.{quoted(name)}" for name in table.copied)
        return table, (
            f"SELECT {columns} FROM {_from(table)} "
            f"WHERE ({condition}) AND {range_condition(chunk, table, _ALIAS)}"
        )

    # What a worker needs to know.

    def parts(self, table: TableName) -> Mapping[str, str]:
        return {part: _bounded(text, lambda _: "TRUE") for part, text in self._sql[table].items()}

    def table(self, name: TableName) -> Table:
        return self._closure.schema.tables[name]

    def is_shared_among_owned(self, chunk: Chunk) -> bool:
        """Whether the chunk's rows must be told apart on the target from the tenant's own."""
        return chunk.part == SHARED

    def format(self, table: TableName) -> Literal["binary", "text"]:
        return "binary" if self._binary[table] else "text"

    @property
    def move(self) -> str:
        return self._move

    @property
    def chunk_rows(self) -> int:
        return self._chunk_rows

    def step(self, name: str) -> None:
        self._step(name)


class _Worker:
    """A session on either side, opened when needed and thrown away after any failure."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._reader: Conn | None = None
        self._writer: Conn | None = None
        self._merging = False  # the next attempt must expect rows that are there already

    def reset(self) -> None:
        self.close()

    def close(self) -> None:
        for conn in (self._reader, self._writer):
            if conn is not None:
                conn.terminate()
        self._reader = self._writer = None

    async def _open_reader(self) -> Conn:
        if self._reader is None or self._reader.is_closed():
            try:
                self._reader = await self._copier.open_reader()
            except (asyncpg.PostgresError, *_TRANSIENT) as problem:
                raise _SourceFailed(problem) from problem
        return self._reader

    async def _open_writer(self) -> Conn:
        if self._writer is None or self._writer.is_closed():
            self._writer = await self._copier.open_writer()
        return self._writer

    async def split(self, name: TableName) -> tuple[Chunk, ...]:
        """Count a table's coming rows, cut it into chunks, and note these on the target."""
        reader = await self._open_reader()
        table = self._copier.table(name)
        chunks: list[Chunk] = []
        for part, condition in self._copier.parts(name).items():
            try:
                if table.key:
                    rows = await reader.fetch(
                        split_query(table, _from(table), _ALIAS, condition, self._copier.chunk_rows)
                    )
                    splits = [Split(key=tuple(row[:-1]), count=row[-1]) for row in (tuple(r) for r in rows)]
                    counted = splits[-1].count if splits else 0
                    every = steps_a_chunk(counted, table.rows)
                    chunks += chunks_of(name, part, thinned(splits, every))
                else:
                    count = await reader.fetchval(f"SELECT count(*) FROM {_from(table)} WHERE {condition}")
                    chunks += chunks_of(name, part, [Split(key=(), count=count)])
            except (asyncpg.PostgresError, *_TRANSIENT) as problem:
                raise _SourceFailed(problem) from problem
        writer = await self._open_writer()
        async with writer.transaction():
            # Another run of this move may have cut it meanwhile; its bounds count then.
            await writer.execute(f"LOCK TABLE {MOVE_SCHEMA}.chunk IN SHARE ROW EXCLUSIVE MODE")
            there = await writer.fetch(
                "SELECT table_name, part, number, lower, upper, counted, done_at IS NOT NULL AS done "
                f"FROM {MOVE_SCHEMA}.chunk WHERE move = $1 AND table_name = $2 ORDER BY part, number",
                self._copier.move,
                name,
            )
            if there:
                return tuple(_chunk(row) for row in there if not row["done"])
            await writer.copy_records_to_table(
                "chunk",
                schema_name=MOVE_SCHEMA,
                columns=["move", "table_name", "part", "number", "lower", "upper", "counted"],
                records=[
                    (self._copier.move, c.table, c.part, c.number, c.lower, c.upper, c.rows) for c in chunks
                ],
            )
        self._copier.step(f"split {name}")
        return tuple(chunks)

    async def copy(self, batch: Sequence[Chunk]) -> None:
        """Copy chunks in one transaction; those that are done already are left out."""
        reader, writer = await self._open_reader(), await self._open_writer()
        copied: list[tuple[Chunk, int, int]] = []
        try:
            async with writer.transaction():
                for chunk in batch:
                    self._copier.step(f"chunk {chunk.table} {chunk.part} {chunk.number}: begin")
                    # A killed run's own transaction may still be ending: this waits for it.
                    if await writer.fetchval(
                        f"SELECT done_at IS NOT NULL FROM {MOVE_SCHEMA}.chunk WHERE move = $1 "
                        "AND table_name = $2 AND part = $3 AND number = $4 FOR UPDATE",
                        *(self._copier.move, chunk.table, chunk.part, chunk.number),
                    ):
                        continue
                    rows, size = await self._rows(reader, writer, chunk)
                    self._copier.step(f"chunk {chunk.table} {chunk.part} {chunk.number}: rows")
                    copied.append((chunk, rows, size))
                    await writer.execute(
                        f"UPDATE {MOVE_SCHEMA}.chunk SET rows = $5, bytes = $6, done_at = now() "
                        "WHERE move = $1 AND table_name = $2 AND part = $3 AND number = $4",
                        *(self._copier.move, chunk.table, chunk.part, chunk.number, rows, size),
                    )
                self._copier.step(f"batch {batch[0].table} {batch[0].number}: commit")
        except asyncpg.UniqueViolationError:
            # A row that an earlier chunk brought from an older snapshot, when it was in another part or
            # partition. Either version will do: the stream brings what came after.
            if self._merging:
                raise
            self._merging = True
            self.close()
            await self.copy(batch)
            return
        finally:
            self._copier.moving(-sum(size for _, _, size in copied))
        self._merging = False
        for chunk, rows, size in copied:
            self._copier.done(chunk, rows, size)

    async def _rows(self, reader: Conn, writer: Conn, chunk: Chunk) -> tuple[int, int]:
        table, query = self._copier.query_parts(chunk)
        shared = self._copier.is_shared_among_owned(chunk)
        if not (shared or (self._merging and table.key)):
            return await self._stream(reader, writer, query, table, table.name)
        columns = ", ".join(quoted(name) for name in table.copied)
        await writer.execute(
            f"CREATE TEMP TABLE IF NOT EXISTS fleetlift_chunk ON COMMIT DROP AS "
            f"SELECT {columns} FROM {quoted_table(table.name)} WITH NO DATA"
        )
        rows, size = await self._stream(reader, writer, query, table, "pg_temp.fleetlift_chunk")
        await writer.execute(
            f"INSERT INTO {quoted_table(table.name)} ({columns}) OVERRIDING SYSTEM VALUE "
            f"SELECT {columns} FROM pg_temp.fleetlift_chunk ON CONFLICT DO NOTHING"
        )
        if shared:
            await note_shared(writer, table, "pg_temp.fleetlift_chunk")
        await writer.execute("DROP TABLE pg_temp.fleetlift_chunk")
        return rows, size

    async def _stream(
        self, reader: Conn, writer: Conn, query: str, table: Table, into: TableName
    ) -> tuple[int, int]:
        """Rows and bytes that went from `query` on the source into a table on the target."""
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue(_PIECES_MAX)
        form = self._copier.format(table.name)

        async def read() -> None:
            try:
                await reader.copy_from_query(query, output=pieces.put, format=form)
            except (asyncpg.PostgresError, *_TRANSIENT) as problem:
                raise_if_cancelled()
                await pieces.put(None)
                raise _SourceFailed(problem) from problem
            await pieces.put(None)

        reading = asyncio.create_task(read(), name=f"copy: reading {table.name}")
        size = 0

        async def arriving() -> AsyncIterator[bytes]:
            nonlocal size
            while (piece := await pieces.get()) is not None:
                more = [piece]
                together = len(piece)
                ended = False
                while together < _PIECE_BYTES and not pieces.empty():
                    if (one := pieces.get_nowait()) is None:
                        ended = True
                        break
                    more.append(one)
                    together += len(one)
                size += together
                self._copier.moving(together)
                yield b"".join(more) if len(more) > 1 else piece
                if ended:
                    break
            await reading  # raises what went wrong: the target then takes nothing of it

        schema, _, name = into.partition(".")
        try:
            status = await writer.copy_to_table(
                name, schema_name=schema, columns=list(table.copied), source=arriving(), format=form
            )
        except BaseException:
            self._copier.moving(-size)
            raise
        finally:
            await end([reading])
        return int(status.rpartition(" ")[2]), size


async def note_shared(writer: Conn, table: Table, rows: str) -> None:
    """Note that the rows of `rows` came along with others and are not the tenant's own."""
    keys = ", ".join(f"{quoted(column)}::text" for column in table.key)
    await writer.execute(
        f"CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.shared_row "
        "(table_name text, key text[], PRIMARY KEY (table_name, key))"
    )
    await writer.execute(
        f"INSERT INTO {MOVE_SCHEMA}.shared_row (table_name, key) "
        f"SELECT $1, ARRAY[{keys}]::text[] FROM {rows} ON CONFLICT DO NOTHING",
        table.name,
    )


def _bounded(condition: str, bounds: Within) -> str:
    return _BOUNDS_AT.sub(lambda found: bounds(found[1]), condition)


def _from(table: Table) -> str:
    # What inherits from a plain table is a table of its own; a partitioned one is nothing but its parts.
    return f"{'' if table.partitioned else 'ONLY '}{quoted_table(table.name)} AS {_ALIAS}"


def _chunk(row: asyncpg.Record) -> Chunk:
    return Chunk(
        table=row["table_name"],
        part=row["part"],
        number=row["number"],
        lower=None if row["lower"] is None else tuple(row["lower"]),
        upper=None if row["upper"] is None else tuple(row["upper"]),
        rows=row["counted"],
    )


def _added(
    table: TableProgress,
    *,
    rows: int = 0,
    rows_total: int = 0,
    bytes: int = 0,
    chunks: int = 0,
    chunks_total: int = 0,
) -> TableProgress:
    return TableProgress(
        rows=table.rows + rows,
        rows_total=table.rows_total + rows_total,
        bytes=table.bytes + bytes,
        chunks=table.chunks + chunks,
        chunks_total=table.chunks_total + chunks_total,
    )


def _first(problems: BaseExceptionGroup[FleetError]) -> FleetError:
    one: BaseException = problems
    while isinstance(one, BaseExceptionGroup):
        one = one.exceptions[0]
    assert isinstance(one, FleetError)
    return one


async def _connect(url: str, settings: Mapping[str, str]) -> Conn:
    return await asyncpg.connect(url, timeout=30.0, server_settings=dict(settings), statement_cache_size=20)


@contextlib.asynccontextmanager
async def _closing(conn: Conn) -> AsyncIterator[None]:
    try:
        yield
    finally:
        conn.terminate()


async def _source_load(conn: Conn, slot: str) -> SourceLoad:
    active = await conn.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND backend_type = 'client backend' "
        "AND application_name NOT LIKE 'fleetlift%'"
    )
    replicas = await conn.fetch(
        "SELECT coalesce(nullif(r.application_name, ''), r.client_addr::text, r.pid::text) AS name, "
        "extract(epoch FROM r.replay_lag)::float8 AS lag_s FROM pg_stat_replication r "
        "LEFT JOIN pg_replication_slots s ON s.active_pid = r.pid "
        "WHERE s.slot_type IS DISTINCT FROM 'logical' AND r.state IN ('streaming', 'catchup') "
        "AND r.application_name NOT LIKE 'fleetlift%'"
    )
    retained = await conn.fetchval(
        "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint FROM pg_replication_slots "
        "WHERE slot_name = $1",
        slot,
    )
    return SourceLoad(
        active=active,
        replicas=tuple(Replica(name=row["name"], lag_s=row["lag_s"]) for row in replicas),
        slot_retained_bytes=retained or 0,
    )


_TYPES = """
SELECT t.oid, t.typname AS name, t.typtype::text AS kind, t.typcategory = 'A' AND t.typelem <> 0 AS is_array,
    t.typsend <> 0 AS sends,
    CASE WHEN t.typtype = 'd' THEN ARRAY[t.typbasetype]
         WHEN t.typcategory = 'A' AND t.typelem <> 0 THEN ARRAY[t.typelem]
         WHEN t.typtype = 'r' THEN (SELECT ARRAY[rngsubtype] FROM pg_range WHERE rngtypid = t.oid)
         WHEN t.typtype = 'c' THEN (
             SELECT array_agg(atttypid) FROM pg_attribute
             WHERE attrelid = t.typrelid AND attnum > 0 AND NOT attisdropped)
    END::oid[]::bigint[] AS inner
FROM pg_type t
WHERE t.typtype <> 'p'
"""

# Multiranges are asked for by themselves: before PostgreSQL 14 there is no column that leads to them.
_MULTIRANGES = "SELECT rngmultitypid::bigint AS oid, rngtypid::bigint AS range FROM pg_range"

_COLUMN_TYPES = """
SELECT n.nspname || '.' || c.relname AS table, a.attname AS column, a.atttypid::bigint AS type
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p')
  AND n.nspname || '.' || c.relname = ANY ($1::text[])
"""


async def _binary_tables(source: Conn, closure: Closure) -> dict[TableName, bool]:
    """Which tables can be copied in binary: those whose columns' binary form means the same anywhere."""
    types = {
        row["oid"]: TypeFacts(
            oid=row["oid"],
            name=row["name"],
            kind=row["kind"],
            array=row["is_array"],
            sends=row["sends"],
            inner=tuple(row["inner"] or ()),
        )
        for row in await source.fetch(_TYPES)
    }
    if source.get_server_version().major >= 14:
        for row in await source.fetch(_MULTIRANGES):
            if row["oid"] in types:
                types[row["oid"]] = msgspec.structs.replace(types[row["oid"]], inner=(row["range"],))
    found = dict.fromkeys(closure.order, True)
    for row in await source.fetch(_COLUMN_TYPES, list(closure.order)):
        if row["column"] in closure.schema.tables[row["table"]].copied:
            found[row["table"]] &= travels_binary(row["type"], types)
    return found
