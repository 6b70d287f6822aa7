"""The ledger of a device: which numbers came by which path, which are missing, which came twice."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby, islice
from typing import Final

import msgspec
from litestar import Router, get
from litestar.params import FromPath

from fleetlift.api.auth import VIEWER
from fleetlift.api.wire import Call, Listing, moment, services
from fleetlift.backend import registry
from fleetlift.core.ranges import RangeSet
from fleetlift.store import ledger as store
from fleetlift.store.ledger import LedgerRow

ANY_PATH: Final = "any"  # all paths laid together
RANGES_MOST: Final = 1000  # in one answer; the counts are always whole

Span = tuple[int, int]  # first and last number, both included


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One channel by one path, or by any. Ranges are [first, last], both included.

    `gaps` lie between the first and the last number that came by any path. `doubles` are copies of what the
    same path had brought before; `uncounted` are messages without a number. A device that was installed anew
    counts from the beginning: `restarts` says how often, `earlier` how many numbers came of earlier counts.
    """

    channel: str
    path: str
    distinct: int
    missing: int
    received: int
    doubles: int
    uncounted: int
    ranges: tuple[Span, ...]
    gaps: tuple[Span, ...]
    first_at: datetime
    last_at: datetime
    restarts: int
    earlier: int


def accounts(rows: Sequence[LedgerRow]) -> list[Account]:
    """Rows of one device, by channel: each path's account, then that of all of them together."""
    found = []
    for channel, group in groupby(rows, key=lambda row: row.channel):
        paths = list(group)
        everything = RangeSet()
        for row in paths:
            everything = everything.union(row.ranges)
        together = LedgerRow(
            device=paths[0].device,
            channel=channel,
            path=ANY_PATH,
            ranges=everything,
            received=sum(row.received for row in paths),
            doubles=sum(row.doubles for row in paths),
            uncounted=sum(row.uncounted for row in paths),
            first_at=min(row.first_at for row in paths),
            last_at=max(row.last_at for row in paths),
            restarts=paths[0].restarts,
            earlier=paths[0].earlier,
        )
        found += [_account(row, everything) for row in (*paths, together)]
    return found


def _account(row: LedgerRow, everything: RangeSet) -> Account:
    known = list(everything.ranges())
    gaps = row.ranges.gaps(known[0][0], known[-1][1] - 1) if known else []
    return Account(
        channel=row.channel,
        path=row.path,
        distinct=row.ranges.count,
        missing=sum(end - start for start, end in gaps),
        received=row.received,
        doubles=row.doubles,
        uncounted=row.uncounted,
        ranges=_shown(row.ranges.ranges()),
        gaps=_shown(gaps),
        first_at=moment(row.first_at),
        last_at=moment(row.last_at),
        restarts=row.restarts,
        earlier=row.earlier,
    )


def _shown(ranges: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
    return tuple((start, end - 1) for start, end in islice(ranges, RANGES_MOST))


@get("/devices/{device:str}/ledger", opt=VIEWER, summary="What came of a device, by which path")
async def show_ledger(request: Call, device: FromPath[str]) -> Listing[Account]:
    """By channel: each path's account, then `any`, which lays all paths together. Not paged."""
    async with services(request).pool.acquire() as conn:
        await registry.get_device(conn, device, tenant=request.user.tenant)
        return Listing(accounts(await store.rows(conn, devices=[device])))


router = Router("/", route_handlers=[show_ledger], tags=["telemetry"])
