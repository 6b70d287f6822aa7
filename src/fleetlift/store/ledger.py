"""Queries of the ledger: which sequence numbers of each channel came by which path.

Every function takes a connection and leaves transactions to its caller. Times are Unix seconds.
"""

from collections.abc import Sequence

import asyncpg
import msgspec

from fleetlift.core.ranges import RangeSet
from fleetlift.store.pool import Conn


class LedgerRow(msgspec.Struct, kw_only=True):
    """What one path has brought of one channel of one device.

    `received` counts every copy that came, `doubles` those whose number this path had brought before, and
    `uncounted` those without a number. `ranges` are the numbers. A device that was installed anew counts from
    the beginning: then `ranges` are of its newest count, which began with a message of `began_ts_ms` that was
    received at `began_at`, and `earlier` is how many numbers of earlier counts had come by any path. These
    last four are the channel's, and the same for all its paths.
    """

    device: str
    channel: str
    path: str
    ranges: RangeSet
    received: int = 0
    doubles: int = 0
    uncounted: int = 0
    first_at: float
    last_at: float
    restarts: int = 0
    began_at: float | None = None
    began_ts_ms: int | None = None
    earlier: int = 0


class PathTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over devices and channels; `distinct` is how many different numbers came."""

    path: str
    devices: int
    received: int
    doubles: int
    uncounted: int
    distinct: int
    last_at: float


_COLUMNS = """l.device, l.channel, l.path, l.ranges::text AS ranges, l.received, l.doubles, l.uncounted,
    extract(epoch FROM l.first_at)::float8 AS first_at, extract(epoch FROM l.last_at)::float8 AS last_at,
    l.restarts, extract(epoch FROM l.began_at)::float8 AS began_at, l.began_ts_ms, l.earlier"""


async def rows(
    conn: Conn,
    *,
    devices: Sequence[str] | None = None,
    channel: str | None = None,
    path: str | None = None,
) -> list[LedgerRow]:
    """Ledger rows by device, channel and path; None selects all."""
    found = await conn.fetch(
        f"""SELECT {_COLUMNS} FROM ledger l
            WHERE ($1::text[] IS NULL OR device = ANY($1)) AND ($2::text IS NULL OR channel = $2)
              AND ($3::text IS NULL OR path = $3) ORDER BY device, channel, path""",
        devices,
        channel,
        path,
    )
    return [_row(r) for r in found]


async def totals(conn: Conn, *, devices: Sequence[str] | None = None) -> list[PathTotals]:
    """Sums by path."""
    found = await conn.fetch(
        """SELECT path, count(DISTINCT device) AS devices, sum(received)::bigint AS received,
                  sum(doubles)::bigint AS doubles, sum(uncounted)::bigint AS uncounted,
                  extract(epoch FROM max(last_at))::float8 AS last_at
           FROM ledger WHERE $1::text[] IS NULL OR device = ANY($1) GROUP BY path ORDER BY path""",
        devices,
    )
    return [PathTotals(**dict(r), distinct=r["received"] - r["doubles"] - r["uncounted"]) for r in found]


class DeviceAccount(msgspec.Struct, frozen=True, kw_only=True):
    """One device over all its channels. `received` copies by path; `stored` distinct messages by any path.

    `missing` numbers lie between the first and the last of their channel and came by no path; `gaps` names
    them, channel by channel. Of a channel whose count began anew they are those of the newest count.
    """

    device: str
    received: dict[str, int]
    stored: int
    missing: int
    gaps: tuple[str, ...]


async def by_device(conn: Conn, devices: Sequence[str]) -> list[DeviceAccount]:
    """The accounts of those of `devices` that anything has come from."""
    received: dict[str, dict[str, int]] = {}
    for r in await conn.fetch(
        """SELECT device, path, sum(received)::bigint AS received FROM ledger
           WHERE device = ANY($1) GROUP BY device, path""",
        devices,
    ):
        received.setdefault(r["device"], {})[r["path"]] = r["received"]
    found = await conn.fetch(
        """WITH known AS (
               SELECT device, channel, range_agg(ranges) AS seqs,
                      sum(uncounted) + max(earlier) AS uncounted
                 FROM ledger WHERE device = ANY($1) GROUP BY device, channel
           ), gaps AS (
               SELECT device, channel, uncounted, seqs,
                      CASE WHEN isempty(seqs) THEN '{}'::int8multirange
                           ELSE int8multirange(int8range(lower(seqs), upper(seqs))) - seqs END AS gaps
                 FROM known
           )
           SELECT device,
                  sum((SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM unnest(seqs) r))
                      + sum(uncounted) AS stored,
                  sum((SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM unnest(gaps) r)) AS missing,
                  array_agg(channel || ' ' || gaps::text) FILTER (WHERE NOT isempty(gaps)) AS gaps
             FROM gaps GROUP BY device ORDER BY device
                   """,
        devices,
    )
    return [
        DeviceAccount(
            device=r["device"],
            received=received.get(r["device"], {}),
            stored=int(r["stored"]),
            missing=int(r["missing"]),
            gaps=tuple(r["gaps"] or ()),
        )
        for r in found
    ]


def _row(r: asyncpg.Record) -> LedgerRow:
    return LedgerRow(**{**dict(r), "ranges": RangeSet.from_pg(r["ranges"])})


# -- for the reader of the log ----------------------------------------------------------------------------


async def load(conn: Conn, keys: Sequence[tuple[str, str]]) -> list[LedgerRow]:
    """The rows of all paths of those (device, channel)."""
    found = await conn.fetch(
        f"""SELECT {_COLUMNS} FROM unnest($1::text[], $2::text[]) k(device, channel)
            JOIN ledger l ON l.device = k.device AND l.channel = k.channel""",
        [k[0] for k in keys],
        [k[1] for k in keys],
    )
    return [_row(r) for r in found]


async def save(conn: Conn, changed: Sequence[LedgerRow]) -> None:
    """Set rows to what they are now."""
    if changed:
        await conn.execute(
            """INSERT INTO ledger
                   (device, channel, path, ranges, received, doubles, uncounted, first_at, last_at,
                    restarts, began_at, began_ts_ms, earlier)
               SELECT device, channel, path, ranges::int8multirange, received, doubles, uncounted,
                      to_timestamp(first_at), to_timestamp(last_at),
                      restarts, to_timestamp(began_at), began_ts_ms, earlier
               FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                           $7::bigint[], $8::float8[], $9::float8[], $10::integer[], $11::float8[],
                           $12::bigint[], $13::bigint[])
                    t(device, channel, path, ranges, received, doubles, uncounted, first_at, last_at,
                      restarts, began_at, began_ts_ms, earlier)
               ON CONFLICT (device, channel, path) DO UPDATE SET ranges = EXCLUDED.ranges,
                   received = EXCLUDED.received, doubles = EXCLUDED.doubles, uncounted = EXCLUDED.uncounted,
                   first_at = EXCLUDED.first_at, last_at = EXCLUDED.last_at, restarts = EXCLUDED.restarts,
                   began_at = EXCLUDED.began_at, began_ts_ms = EXCLUDED.began_ts_ms,
                   earlier = EXCLUDED.earlier""",
            [r.device for r in changed],
            [r.channel for r in changed],
            [r.path for r in changed],
            [r.ranges.to_pg() for r in changed],
            [r.received for r in changed],
            [r.doubles for r in changed],
            [r.uncounted for r in changed],
            [r.first_at for r in changed],
            [r.last_at for r in changed],
            [r.restarts for r in changed],
            [r.began_at for r in changed],
            [r.began_ts_ms for r in changed],
            [r.earlier for r in changed],
        )
