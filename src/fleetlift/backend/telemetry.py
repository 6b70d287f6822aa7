"""The telemetry reader: from the log into PostgreSQL, each message once, whatever is killed when.

One process at a time reads. Rows, dead letters and the position in the log commit together. The account
(ledger and receipt windows) commits with them too, but at high rates only once a second, since it would
otherwise be rewritten for every message: it has a position of its own, never ahead of the rows'. A new reader
begins at the account's position; the rows in between are there already and stay as they are.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.backend.follow import until_stopped
from fleetlift.backend.parity import Parity
from fleetlift.bus.log import LogBatch, LogPosition, read, standing
from fleetlift.bus.subjects import to_topic
from fleetlift.bus.wire import connect
from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core import telemetry as messages
from fleetlift.core.delays import bucket, dense
from fleetlift.core.errors import BadInput, Conflict, Unavailable
from fleetlift.core.ranges import RangeSet
from fleetlift.core.telemetry import DeadLetter, Telemetry
from fleetlift.log import get_logger
from fleetlift.store import ledger, positions
from fleetlift.store import telemetry as store
from fleetlift.store.ledger import LedgerRow
from fleetlift.store.pool import Conn, sole_owner
from fleetlift.store.telemetry import WINDOW_S, WindowKey

log = get_logger(__name__)

ROWS, ACCOUNT = "telemetry", "ledger"  # names of the two positions
# The server picks by several filters at a few thousand messages a second, and hands out everything twenty
# times as fast. Nearly everything is telemetry.
FILTERS = (">",)
TOPICS = ("dt/", "feed/")
BATCH_MAX = 4000
LINGER_S = 0.1

ACCOUNT_EVERY_S = 1.0  # at high rates; otherwise the account commits with every batch
ACCOUNT_AT_ONCE = 500  # changed ledger rows and windows that are cheap enough to commit with every batch
CACHED_CHANNELS_MAX = 100_000
CACHED_RANGES_MAX = 1_000_000
RANGES_MAX = 10_000  # of one channel by one path: numbers that would need more are stored, but not counted
WINDOWS_KEPT_S = 60  # in memory, behind the newest

DAYS_AHEAD = 2
HOUSEKEEPING_EVERY_S = 600.0
WINDOWS_KEEP_DAYS = 2  # in the database
QOS0_IN_FLIGHT_MAX = 2000

_DAY_MS = 86_400_000
_RETRYABLE = (Conflict, Unavailable, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)
# What PostgreSQL says of a row it cannot take: data, integrity, limits (nesting, size of an index entry).
_POISON_CLASSES = frozenset({"22", "23", "54"})


async def run(ctx: Context) -> None:
    """Store telemetry until `ctx.stop` is set. Waits while another process does, or an engine is away."""
    await until_stopped(ctx, _read_for_ever(ctx))


async def _read_for_ever(ctx: Context) -> None:
    while True:
        try:
            async with sole_owner(ctx.settings.database_url, "telemetry") as ownership:
                await _Reader(ctx).work(ownership)
        except* _RETRYABLE as problems:
            first = _first(problems)
            log.warning("telemetry_reader_interrupted", problem=f"{type(first).__name__}: {first}")
        raise_if_cancelled()
        await asyncio.sleep(0.5)


def _first(problem: BaseException) -> BaseException:
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    return problem


class _Reader:
    """One term of reading. Whatever fails, its memory is thrown away and the next term loads it again."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._turn = asyncio.Lock()  # batches and the ticker's flushes take turns
        self._account = _Account()
        self._parity = Parity()
        self._rows_at: positions.Place | None = None
        self._account_at: positions.Place | None = None
        self._taken: positions.Place | None = None  # up to where the account in memory goes
        self._replayed_until = 0  # up to this position, what is no row was dealt with in an earlier term
        self._days: set[date] = set()
        self._counted: Counter[tuple[str, str]] = Counter()
        self._flushed_at = 0.0
        self._unread = 0

    async def work(self, ownership: "asyncpg.Connection[Any]") -> None:
        async with self._pool.acquire() as conn:
            self._rows_at = await positions.load(conn, ROWS)
            self._account_at = await positions.load(conn, ACCOUNT)
            self._days = set(await store.days(conn))
        await self._keep_house()
        start = await self._start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick(ownership), name="telemetry-ticker")
            tasks.create_task(self._take_qos0(), name="telemetry-qos0")
            batches = read(
                self._ctx.settings,
                after=start,
                filters=FILTERS,
                name=ROWS,
                batch_max=BATCH_MAX,
                linger_s=LINGER_S,
            )
            async with contextlib.aclosing(cast("AsyncGenerator[LogBatch, None]", batches)):
                async for batch in batches:
                    async with self._turn:
                        await self._take(batch)

    async def _start(self) -> positions.Place | None:
        """Where the account stands; at the beginning, when the stream was made anew since."""
        rows, account = self._rows_at, self._account_at
        if rows is None:
            return None
        if account is None or account[0] != rows[0]:
            account = (rows[0], 0, None)
        found = await standing(self._ctx.settings, rows)
        if found.created == rows[0]:
            # A log that lost its end gives numbers again: those are new messages.
            self._replayed_until = found.seq
        return account

    # -- a batch -------------------------------------------------------------------------------------------

    async def _take(self, batch: LogBatch) -> None:
        if self._rows_at is not None and batch.position.created != self._rows_at[0]:
            self._replayed_until = 0
        elif self._taken is not None and batch[0].seq <= self._taken[1]:
            # Numbers that this term has read come again: the log has lost its end meanwhile.
            self._replayed_until = min(self._replayed_until, batch[0].seq - 1)
        rows: list[Telemetry] = []
        again: list[Telemetry] = []
        letters: list[DeadLetter] = []
        counted = self._counted
        for message in batch:
            if not message.topic.startswith(TOPICS):
                continue
            found = messages.parse(message.topic, message.headers, message.payload, message.at)
            replayed = message.seq <= self._replayed_until
            if type(found) is Telemetry and found.again:
                again.append(found)
            elif type(found) is Telemetry:
                rows.append(found)
                if not replayed:
                    counted["fleetlift_telemetry_received_messages_total", found.path] += 1
            elif not replayed and messages.HEADER_AGAIN not in (message.headers or {}):
                letters.append(found)  # type: ignore[arg-type]
        self._unread = batch.behind
        await self._make_days(rows)
        async with self._pool.acquire() as conn, conn.transaction():
            await self._account.load(conn, rows)
            repeated, seconds = self._account.take(rows)
            await self._insert([row for row in rows if id(row) not in repeated], letters, conn)
            for row in repeated.values():
                await self._insert_one(row, letters, conn)
            await self._parity.take(conn, seconds, again)
            await store.insert_dead_letters(conn, letters)
            counted["fleetlift_telemetry_dead_letters_total", ""] += len(letters)
            await self._advance_rows(conn, batch.position)
            self._taken = batch.position.as_row()
            await store.add_to_counters(conn, counted)
            counted.clear()
            flushed = await self._flush(conn) if self._flush_is_due() else False
        if flushed:
            self._saved()
        for letter in letters[:10]:
            log.warning(
                "telemetry_refused", device=letter.device, topic=letter.topic[:200], reason=letter.reason
            )

    async def _insert(self, rows: Sequence[Telemetry], letters: list[DeadLetter], conn: Conn) -> None:
        """Store rows; what PostgreSQL refuses is found by halving and becomes a dead letter."""
        if not rows:
            return
        try:
            async with conn.transaction():
                stored = await store.insert(conn, rows)
        except (asyncpg.PostgresError, asyncpg.DataError, UnicodeError, OverflowError) as problem:
            if not _is_poison(problem):
                raise
            if len(rows) == 1:
                letters.append(_refused(rows[0], problem))
            else:
                half = len(rows) // 2
                await self._insert(rows[:half], letters, conn)
                await self._insert(rows[half:], letters, conn)
        else:
            self._counted["fleetlift_telemetry_stored_messages_total", ""] += stored

    async def _insert_one(self, row: Telemetry, letters: list[DeadLetter], conn: Conn) -> None:
        try:
            async with conn.transaction():
                stored = await store.insert_unless_repeated(conn, row)
        except (asyncpg.PostgresError, asyncpg.DataError, UnicodeError, OverflowError) as problem:
            if not _is_poison(problem):
                raise
            letters.append(_refused(row, problem))
        else:
            self._counted["fleetlift_telemetry_stored_messages_total", ""] += stored

    async def _advance_rows(self, conn: Conn, to: LogPosition) -> None:
        before = self._rows_at
        if before is not None and before[0] == to.created and to.seq <= self._replayed_until:
            return  # still in what an earlier term has stored
        await positions.advance(conn, ROWS, before=before, after=to.as_row())
        self._rows_at = to.as_row()

    # -- the account ---------------------------------------------------------------------------------------

    def _flush_is_due(self) -> bool:
        return self._changes <= ACCOUNT_AT_ONCE or time.monotonic() - self._flushed_at >= ACCOUNT_EVERY_S

    @property
    def _changes(self) -> int:
        return self._account.changes + self._parity.changes

    def _saved(self) -> None:
        self._account.saved()
        self._parity.saved()

    async def _flush(self, conn: Conn) -> bool:
        """Write the account as of `_taken`. The memory is marked as saved once the transaction commits."""
        if self._taken is None:
            return False
        await self._account.save(conn)
        await self._parity.save(conn, time.time())
        if self._account_at != self._taken:
            await positions.advance(conn, ACCOUNT, before=self._account_at, after=self._taken)
            self._account_at = self._taken
        await store.set_gauges(conn, {("fleetlift_telemetry_unread_messages", ""): self._unread})
        self._flushed_at = time.monotonic()
        return True

    async def _tick(self, ownership: "asyncpg.Connection[Any]") -> None:
        """Write the account when no batch comes to do it, keep house, and notice when ownership is lost."""
        house_kept_at = time.monotonic()
        while True:
            await asyncio.sleep(ACCOUNT_EVERY_S / 2)
            if ownership.is_closed():
                raise Unavailable("the connection that owns the telemetry reader was lost")
            async with self._turn:
                if self._changes and self._flush_is_due():
                    async with self._pool.acquire() as conn, conn.transaction():
                        flushed = await self._flush(conn)
                    if flushed:
                        self._saved()
                if time.monotonic() - house_kept_at >= HOUSEKEEPING_EVERY_S:
                    house_kept_at = time.monotonic()
                    await self._keep_house()

    # -- days ------------------------------------------------------------------------------------------------

    async def _keep_house(self) -> None:
        today = datetime.now(UTC).date()
        for ahead in range(-1, DAYS_AHEAD + 1):
            await self._make_day(today + timedelta(days=ahead))
        keep = timedelta(days=self._ctx.settings.telemetry_keep_days)
        now = time.time()
        async with self._pool.acquire() as conn, conn.transaction():
            gone = await store.drop_before(conn, today - keep)
            await store.drop_windows_before(conn, now - WINDOWS_KEEP_DAYS * 86400)
            await store.drop_dead_letters_before(conn, now - keep.total_seconds())
            await store.drop_presence_events_before(conn, now - keep.total_seconds())
        self._days -= set(gone)
        if gone:
            log.info("telemetry_days_dropped", oldest=str(gone[0]), newest=str(gone[-1]), days=len(gone))

    async def _make_days(self, rows: Sequence[Telemetry]) -> None:
        today = datetime.now(UTC).date()
        oldest = today - timedelta(days=self._ctx.settings.telemetry_keep_days - 1)
        newest = today + timedelta(days=DAYS_AHEAD)
        for number in sorted({row.ts_ms // _DAY_MS for row in rows}):
            day = date(1970, 1, 1) + timedelta(days=number)
            if oldest <= day <= newest:  # others stay in the partition for clocks far from ours
                await self._make_day(day)

    async def _make_day(self, day: date) -> None:
        if day in self._days:
            return
        async with self._pool.acquire() as conn, conn.transaction():
            moved = await store.make_day(conn, day)
        self._days.add(day)
        log.info("telemetry_day_made", day=str(day), rows_moved=moved)

    # -- QoS 0 -----------------------------------------------------------------------------------------------

    async def _take_qos0(self) -> None:
        """Enter into the log what devices publish with QoS 0, which NATS stores nowhere.

        At most once, as QoS 0 promises: what comes while no reader works, or in too great a number, is gone.
        """
        settings, publisher = self._ctx.settings, self._ctx.publisher
        in_flight: set[asyncio.Task[None]] = set()

        async def enter(topic: str, payload: bytes) -> None:
            # Qos 0 asks for no more than a try.
            with contextlib.suppress(BadInput, Unavailable):
                await publisher.to_log(topic, payload, {"Nmqtt-Pub": "0"})

        def on_message(subject: bytes, _reply: bytes, headers: bytes, payload: bytes) -> None:
            if b"Nmqtt-Pub:0" not in headers.replace(b" ", b""):
                return
            if len(in_flight) >= QOS0_IN_FLIGHT_MAX:
                self._counted["fleetlift_telemetry_qos0_dropped_messages_total", ""] += 1
                return
            task = asyncio.create_task(enter(to_topic(subject.decode()), payload))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)

        while True:
            wire = None
            try:
                wire = await connect(
                    settings.nats_url,
                    user=settings.nats_svc_user,
                    password=settings.nats_svc_password,
                    name="telemetry-qos0",
                    on_message=on_message,
                )
                wire.send(b"SUB dt.> 1\r\n")
                await asyncio.shield(wire.closed)
            except Unavailable:
                pass  # the log's reader says so
            finally:
                if wire is not None:
                    wire.close()
            await asyncio.sleep(0.5)


class _Account:
    """The ledger and the receipt windows in memory: what is being counted, and what is not yet written."""

    def __init__(self) -> None:
        self._channels: OrderedDict[tuple[str, str], dict[str, LedgerRow]] = OrderedDict()
        self._changed: dict[tuple[str, str, str], LedgerRow] = {}
        self._windows: dict[WindowKey, dict[int, int]] = {}
        self._changed_windows: set[WindowKey] = set()
        self._ranges = 0

    @property
    def changes(self) -> int:
        return len(self._changed) + len(self._changed_windows)

    async def load(self, conn: Conn, rows: Sequence[Telemetry]) -> None:
        """Make sure that everything these rows are counted in is in memory."""
        # Key by key: sets and views would walk through all that is kept, for every batch.
        channels = {(row.device, row.channel) for row in rows}
        if unknown := [key for key in channels if key not in self._channels]:
            for key in unknown:
                self._channels[key] = {}
            for known in await ledger.load(conn, sorted(unknown)):
                self._channels[known.device, known.channel][known.path] = known
                self._ranges += known.ranges.range_count
        for key in channels:
            self._channels.move_to_end(key)
        windows = {_window(row) for row in rows}
        if new := [window for window in windows if window not in self._windows]:
            for window in new:
                self._windows[window] = {}
            for window, counts in (await store.load_windows(conn, sorted(new))).items():
                self._windows[window] = {i: n for i, n in enumerate(counts) if n}

    def take(self, rows: Sequence[Telemetry]) -> tuple[dict[int, Telemetry], list[Telemetry]]:
        """Count rows. Returns, by `id`, those that have no time of their own and a number seen before, and
        the second copies: new to their own path, with a number that has come by the other side's."""
        doubtful: dict[int, Telemetry] = {}
        seconds: list[Telemetry] = []
        for row in rows:
            paths = self._channels[row.device, row.channel]
            entry = paths.get(row.path)
            if entry is None:
                beside = next(iter(paths.values()), None)
                entry = paths[row.path] = LedgerRow(
                    device=row.device,
                    channel=row.channel,
                    path=row.path,
                    ranges=RangeSet(),
                    first_at=row.received_at,
                    last_at=row.received_at,
                )
                if beside is not None:
                    entry.restarts, entry.earlier = beside.restarts, beside.earlier
                    entry.began_at, entry.began_ts_ms = beside.began_at, beside.began_ts_ms
            if row.seq is not None and row.seq <= 1 and row.ts_given:
                self._note_beginning(paths, row)
            if (
                not row.ts_given
                and row.seq is not None
                and any(row.seq in known.ranges for known in paths.values())
            ):
                doubtful[id(row)] = row
            if len(paths) > 1 and row.seq is not None and row.seq not in entry.ranges:
                device_own = row.path == messages.MQTT_PATH
                for path, known in paths.items():
                    if (path == messages.MQTT_PATH) != device_own and row.seq in known.ranges:
                        seconds.append(row)
                        break
            self._count(entry, row)
            window = _window(row)
            counts = self._windows[window]
            at = bucket(row.delay_s)
            counts[at] = counts.get(at, 0) + 1
            self._changed_windows.add(window)
        return doubtful, seconds

    def _count(self, entry: LedgerRow, row: Telemetry) -> None:
        entry.received += 1
        entry.first_at = min(entry.first_at, row.received_at)
        entry.last_at = max(entry.last_at, row.received_at)
        seq, ranges = row.seq, entry.ranges
        before = ranges.range_count
        if (
            seq is None
            or (
                before >= RANGES_MAX and seq not in ranges and seq - 1 not in ranges and seq + 1 not in ranges
            )
            or (entry.restarts and _of_an_earlier_count(entry, row))
        ):
            entry.uncounted += 1
        elif ranges.add(seq):
            self._ranges += ranges.range_count - before
        else:
            entry.doubles += 1
        self._changed[entry.device, entry.channel, entry.path] = entry

    def _note_beginning(self, paths: Mapping[str, LedgerRow], row: Telemetry) -> None:
        """Notice a count that begins, or begins anew: its first number comes later, with another time."""
        some = next(iter(paths.values()))
        anew = False
        if row.seq == 1 and any(0 in entry.ranges for entry in paths.values()):
            return  # this device counts from 0
        if any(row.seq in entry.ranges for entry in paths.values()):
            if some.began_ts_ms is None or some.began_at is None:
                # Counted before beginnings were noted: a copy of the first message is not as late as that.
                anew = row.ts_ms / 1000 > some.first_at + 60.0
            else:
                anew = row.ts_ms != some.began_ts_ms and row.received_at > some.began_at
                if not anew:
                    return
        if anew:
            numbers = RangeSet()
            for entry in paths.values():
                numbers = numbers.union(entry.ranges)
        for entry in paths.values():
            if anew:
                self._ranges -= entry.ranges.range_count
                entry.ranges = RangeSet()
                entry.earlier += numbers.count
                entry.restarts += 1
            entry.began_at, entry.began_ts_ms = row.received_at, row.ts_ms
            self._changed[entry.device, entry.channel, entry.path] = entry
        if anew:
            log.warning("device_counts_anew", device=row.device, channel=row.channel, earlier=some.earlier)

    async def save(self, conn: Conn) -> None:
        await ledger.save(conn, [self._changed[key] for key in sorted(self._changed)])
        await store.save_windows(conn, {key: dense(self._windows[key]) for key in self._changed_windows})

    def saved(self) -> None:
        """What was saved is committed: forget what is not needed any more, within bounds."""
        self._changed.clear()
        self._changed_windows.clear()
        if self._windows:
            horizon = max(start for _, _, start in self._windows) - WINDOWS_KEPT_S
            self._windows = {key: counts for key, counts in self._windows.items() if key[2] >= horizon}
        while self._channels and (
            len(self._channels) > CACHED_CHANNELS_MAX or self._ranges > CACHED_RANGES_MAX
        ):
            _, paths = self._channels.popitem(last=False)
            self._ranges -= sum(entry.ranges.range_count for entry in paths.values())


def _of_an_earlier_count(entry: LedgerRow, row: Telemetry) -> bool:
    """Late by the time of receipt and by the device's own: either clock alone may err."""
    return (
        entry.began_at is not None
        and entry.began_ts_ms is not None
        and row.received_at < entry.began_at
        and row.ts_ms < entry.began_ts_ms
    )


def _window(row: Telemetry) -> WindowKey:
    return row.device, row.path, int(row.received_at // WINDOW_S) * WINDOW_S


def _is_poison(problem: Exception) -> bool:
    if isinstance(problem, asyncpg.PostgresError) and problem.sqlstate:
        return problem.sqlstate[:2] in _POISON_CLASSES
    return not isinstance(problem, asyncpg.PostgresConnectionError)


def _refused(row: Telemetry, problem: Exception) -> DeadLetter:
    prefix = "dt" if row.path == messages.MQTT_PATH else f"feed/{row.path}"
    return messages.dead_letter(
        f"{prefix}/{row.device}/{row.channel}",
        row.device,
        row.path,
        f"database: {str(problem)[:300]}",
        row.body.encode(),
        row.received_at,
    )
