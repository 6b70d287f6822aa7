"""Queries of telemetry rows, dead letters, receipt windows and the counters of the telemetry reader.

Every function takes a connection and leaves transactions to its caller. Times are Unix seconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg
import msgspec

from fleetlift.core.telemetry import DeadLetter, Telemetry
from fleetlift.store.paging import DEFAULT_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn

WINDOW_S = 10  # width of a receipt window


class TelemetryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One stored message. `body` is its JSON as the device sent it."""

    channel: str
    ts: float
    seq: int | None
    body: msgspec.Raw
    path: str
    received_at: float


class DeadLetterRow(msgspec.Struct, frozen=True, kw_only=True):
    """One message that could not be stored, and why. `payload` is its beginning, of `payload_bytes`."""

    id: int
    device: str
    path: str
    topic: str
    reason: str
    payload: bytes
    payload_bytes: int
    received_at: float


class Counter(msgspec.Struct, frozen=True):
    """One counter for Prometheus: `name` ends in its unit, `path` is its label (empty: none)."""

    name: str
    path: str
    value: float


# -- reading -------------------------------------------------------------------------------------------

# The ledger knows every channel of a device; going channel by channel, each page is a few index look-ups,
# however much the device has sent. A default partition keeps PostgreSQL from scanning days in order.
_CHANNELS = "(SELECT DISTINCT channel FROM ledger WHERE device = $1 AND ($2::text IS NULL OR channel = $2)) c"
_COLUMNS = """t.channel, (extract(epoch FROM t.ts) * 1000)::bigint AS ts_ms, t.msg_key, t.seq,
    t.body::text AS body, t.path, extract(epoch FROM t.received_at)::float8 AS received_at"""


def _read_sql(order: str, beyond: str, bound: str) -> str:
    return f"""
    SELECT t.* FROM {_CHANNELS} CROSS JOIN LATERAL (
        SELECT {_COLUMNS} FROM telemetry t
        WHERE t.device = $1 AND t.channel = c.channel
          AND ($3::float8 IS NULL OR t.ts >= to_timestamp($3))
          AND ($4::float8 IS NULL OR t.ts < to_timestamp($4))
          AND ($5::bigint IS NULL OR (t.ts {bound} to_timestamp($5::float8 / 1000)
               AND (t.ts, t.channel, t.msg_key)
                   {beyond} (to_timestamp($5::float8 / 1000), $6::text, $7::bigint)))
        ORDER BY t.ts {order}, t.msg_key {order} LIMIT $8
    ) t ORDER BY t.ts_ms {order}, t.channel {order}, t.msg_key {order} LIMIT $8"""


_OLDEST_FIRST = _read_sql("ASC", ">", ">=")
_NEWEST_FIRST = _read_sql("DESC", "<", "<=")


async def read(
    conn: Conn,
    device: str,
    *,
    channel: str | None = None,
    since: float | None = None,
    until: float | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
    newest: bool = False,
) -> Page[TelemetryRow]:
    """A device's messages with `since` <= ts < `until`, oldest first, or newest first.

    `after` is the `next` of the page before. Raises BadInput for a bad limit or cursor.
    """
    checked_limit(limit)
    at: tuple[int | None, str | None, int | None] = (None, None, None)
    if after is not None:
        at = from_cursor(after, tuple[int, str, int])
    sql = _NEWEST_FIRST if newest else _OLDEST_FIRST
    found = await conn.fetch(sql, device, channel, since, until, *at, limit + 1)
    more = len(found) > limit
    found = found[:limit]
    cursor = to_cursor(found[-1]["ts_ms"], found[-1]["channel"], found[-1]["msg_key"]) if more else None
    return Page([_row(r) for r in found], cursor)


async def latest(conn: Conn, device: str) -> list[TelemetryRow]:
    """The newest message of each of a device's channels, by channel."""
    found = await conn.fetch(
        f"""SELECT t.* FROM {_CHANNELS} CROSS JOIN LATERAL (
            SELECT {_COLUMNS} FROM telemetry t WHERE t.device = $1 AND t.channel = c.channel
            ORDER BY t.ts DESC, t.msg_key DESC LIMIT 1) t ORDER BY t.channel""",
        device,
        None,
    )
    return [_row(r) for r in found]


def _row(r: asyncpg.Record) -> TelemetryRow:
    return TelemetryRow(
        channel=r["channel"],
        ts=r["ts_ms"] / 1000,
        seq=r["seq"],
        body=msgspec.Raw(r["body"].encode()),
        path=r["path"],
        received_at=r["received_at"],
    )


async def dead_letters(
    conn: Conn,
    *,
    device: str | None = None,
    tenant: str | None = None,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> Page[DeadLetterRow]:
    """Dead letters, newest first; of one device, or of the devices of one tenant."""
    checked_limit(limit)
    before = None if after is None else from_cursor(after, tuple[int])[0]
    found = await conn.fetch(
        """SELECT id, device, path, topic, reason, payload, payload_bytes,
                  extract(epoch FROM received_at)::float8 AS received_at
           FROM dead_letter l
           WHERE ($1::text IS NULL OR device = $1) AND ($2::bigint IS NULL OR id < $2)
             AND ($3::text IS NULL OR EXISTS (SELECT FROM device d WHERE d.id = l.device AND d.tenant = $3))
           ORDER BY id DESC LIMIT $4""",
        device,
        before,
        tenant,
        limit + 1,
    )
    rows = [DeadLetterRow(**dict(r)) for r in found[:limit]]
    return Page(rows, to_cursor(rows[-1].id) if len(found) > limit else None)


# -- counters ------------------------------------------------------------------------------------------


async def add_to_counters(conn: Conn, added: Mapping[tuple[str, str], float]) -> None:
    """Add to counters by (name, path). Part of the transaction that did what is counted."""
    rows = sorted((name, path, value) for (name, path), value in added.items() if value)
    if rows:
        await conn.execute(
            """INSERT INTO metric AS m (name, path, value)
               SELECT * FROM unnest($1::text[], $2::text[], $3::float8[])
               ON CONFLICT (name, path) DO UPDATE SET value = m.value + EXCLUDED.value""",
            *_columns(rows, 3),
        )


async def set_gauges(conn: Conn, values: Mapping[tuple[str, str], float]) -> None:
    """Set values by (name, path)."""
    if values:
        rows = sorted((name, path, value) for (name, path), value in values.items())
        await conn.execute(
            """INSERT INTO metric (name, path, value)
               SELECT * FROM unnest($1::text[], $2::text[], $3::float8[])
               ON CONFLICT (name, path) DO UPDATE SET value = EXCLUDED.value""",
            *_columns(rows, 3),
        )


async def counters(conn: Conn) -> list[Counter]:
    """Every counter (name ending in `_total`) and gauge, for /metrics. They outlive restarts."""
    found = await conn.fetch("SELECT name, path, value FROM metric ORDER BY name, path")
    return [Counter(r["name"], r["path"], r["value"]) for r in found]


# -- writing -------------------------------------------------------------------------------------------


async def insert(conn: Conn, rows: Sequence[Telemetry]) -> int:
    """Store messages; returns how many were new. What is there already stays as it is."""
    if not rows:
        return 0
    status = await conn.execute(
        """INSERT INTO telemetry (device, channel, ts, msg_key, seq, body, path, received_at)
           SELECT device, channel, to_timestamp(ts_ms::float8 / 1000), msg_key, seq, body::json, path,
                  to_timestamp(received_at)
           FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[],
                       $7::text[], $8::float8[])
                t(device, channel, ts_ms, msg_key, seq, body, path, received_at)
           ON CONFLICT DO NOTHING""",
        [r.device for r in rows],
        [r.channel for r in rows],
        [r.ts_ms for r in rows],
        [r.msg_key for r in rows],
        [r.seq for r in rows],
        [r.body for r in rows],
        [r.path for r in rows],
        [r.received_at for r in rows],
    )
    return int(status.rsplit(" ", 1)[-1])


async def insert_unless_repeated(conn: Conn, row: Telemetry) -> int:
    """Store a message that has a count but no time of its own, unless the day before brought the same one.

    Such a message is dated by its receipt, so only its count and body can tell a repetition.
    """
    status = await conn.execute(
        """INSERT INTO telemetry (device, channel, ts, msg_key, seq, body, path, received_at)
           SELECT $1, $2, to_timestamp($3::float8 / 1000), $4, $8, $5::text::json, $6, to_timestamp($7)
           WHERE NOT EXISTS (SELECT FROM telemetry t WHERE t.device = $1 AND t.channel = $2
                             AND t.ts > to_timestamp($3::float8 / 1000) - interval '1 day'
                             AND t.seq = $8 AND t.body::text = $5)
           ON CONFLICT DO NOTHING""",
        row.device,
        row.channel,
        row.ts_ms,
        row.msg_key,
        row.body,
        row.path,
        row.received_at,
        row.seq,
    )
    return int(status.rsplit(" ", 1)[-1])


async def insert_dead_letters(conn: Conn, letters: Sequence[DeadLetter]) -> None:
    if letters:
        await conn.execute(
            """INSERT INTO dead_letter (received_at, path, topic, device, reason, payload, payload_bytes)
               SELECT to_timestamp(received_at), path, topic, device, reason, payload, payload_bytes
               FROM unnest($1::float8[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[],
                           $7::bigint[])
                    t(received_at, path, topic, device, reason, payload, payload_bytes)""",
            [x.received_at for x in letters],
            [x.path for x in letters],
            [x.topic for x in letters],
            [x.device for x in letters],
            [x.reason for x in letters],
            [x.payload for x in letters],
            [x.payload_bytes for x in letters],
        )


WindowKey = tuple[str, str, int]  # device, path, start of the window in Unix seconds


async def load_windows(conn: Conn, keys: Sequence[WindowKey]) -> dict[WindowKey, list[int]]:
    """The delay counts of those windows that have some."""
    found = await conn.fetch(
        """SELECT w.device, w.path, k.start, w.delay_counts
           FROM unnest($1::text[], $2::text[], $3::bigint[]) k(device, path, start)
           JOIN receipt_window w
             ON w.window_start = to_timestamp(k.start) AND w.path = k.path AND w.device = k.device""",
        *_columns(keys, 3),
    )
    return {(r["device"], r["path"], r["start"]): list(r["delay_counts"]) for r in found}


async def save_windows(conn: Conn, windows: Mapping[WindowKey, Sequence[int]]) -> None:
    """Set the counts of windows to what they are now."""
    if windows:
        keys = sorted(windows)
        # unnest would flatten arrays of arrays, so each window's counts travel as the text of an array.
        await conn.execute(
            """INSERT INTO receipt_window (device, path, window_start, messages, delay_counts)
               SELECT device, path, to_timestamp(start), messages, counts::integer[]
               FROM unnest($1::text[], $2::text[], $3::bigint[], $4::integer[], $5::text[])
                    t(device, path, start, messages, counts)
               ON CONFLICT (window_start, path, device)
               DO UPDATE SET messages = EXCLUDED.messages, delay_counts = EXCLUDED.delay_counts""",
            *_columns(keys, 3),
            [sum(windows[k]) for k in keys],
            ["{" + ",".join(map(str, windows[k])) + "}" for k in keys],
        )


def _columns(rows: Iterable[Sequence[Any]], n: int) -> list[list[Any]]:
    rows = list(rows)
    return [[row[i] for row in rows] for i in range(n)]


# -- days ----------------------------------------------------------------------------------------------


def _partition(day: date) -> str:
    return f"telemetry_{day:%Y%m%d}"


async def days(conn: Conn) -> list[date]:
    """The days that have a partition of their own, oldest first."""
    found = await conn.fetch(
        """SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
           WHERE i.inhparent = 'telemetry'::regclass AND c.relname ~ '^telemetry_[0-9]{8}$' ORDER BY 1"""
    )
    return [datetime.strptime(r["relname"][-8:], "%Y%m%d").replace(tzinfo=UTC).date() for r in found]


async def make_day(conn: Conn, day: date) -> int:
    """Give a day (UTC) its partition; returns how many rows moved there from the default one.

    Run it in a transaction: the rows are moved and the partition appears at once, or nothing happens.
    """
    name, after = _partition(day), day + timedelta(days=1)
    await conn.execute("LOCK TABLE telemetry_other IN ACCESS EXCLUSIVE MODE")
    bounds = f"ts >= '{day} 00:00:00+00' AND ts < '{after} 00:00:00+00'"
    await conn.execute(f"CREATE TABLE {name} (LIKE telemetry INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
    moved = await conn.execute(
        f"WITH gone AS (DELETE FROM telemetry_other WHERE {bounds} RETURNING *)"
        f" INSERT INTO {name} SELECT * FROM gone"
    )
    await conn.execute(
        f"ALTER TABLE telemetry ATTACH PARTITION {name}"
        f" FOR VALUES FROM ('{day} 00:00:00+00') TO ('{after} 00:00:00+00')"
    )
    return int(moved.rsplit(" ", 1)[-1])


async def drop_before(conn: Conn, day: date) -> list[date]:
    """Forget all telemetry of the days before `day`; returns the days whose partitions were dropped."""
    gone = [d for d in await days(conn) if d < day]
    for d in gone:
        await conn.execute(f"DROP TABLE {_partition(d)}")
    # A clock that is far behind is no reason to forget a message early.
    await conn.execute(
        "DELETE FROM telemetry_other WHERE ts < $1 AND received_at < $1",
        datetime(day.year, day.month, day.day, tzinfo=UTC),
    )
    return gone


async def drop_windows_before(conn: Conn, at: float) -> None:
    await conn.execute("DELETE FROM receipt_window WHERE window_start < to_timestamp($1)", at)


async def drop_dead_letters_before(conn: Conn, at: float) -> None:
    await conn.execute("DELETE FROM dead_letter WHERE received_at < to_timestamp($1)", at)


async def drop_presence_events_before(conn: Conn, at: float) -> None:
    await conn.execute("DELETE FROM presence_event WHERE at < to_timestamp($1)", at)
