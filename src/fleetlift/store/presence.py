"""Queries of presence: which device is connected, since when, and why it left.

Every function takes a connection and leaves transactions to its caller. Times are Unix seconds.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fleetlift.store.paging import DEFAULT_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one device's connection. (`server_id`, `cid`) names it; `reason`: why it left."""

    device: str
    connected: bool
    since: float
    reason: str = ""
    server_id: str = ""
    cid: int = 0
    remote: str = ""


class PresenceEvent(msgspec.Struct, frozen=True, kw_only=True):
    device: str
    connected: bool
    at: float
    reason: str = ""


_COLUMNS = "device, connected, extract(epoch FROM since)::float8 AS since, reason, server_id, cid, remote"


async def get(conn: Conn, device: str) -> Presence | None:
    """None: the device has never been seen."""
    found = await conn.fetchrow(f"SELECT {_COLUMNS} FROM presence WHERE device = $1", device)
    return Presence(**dict(found)) if found else None


async def get_many(conn: Conn, devices: Sequence[str] | None = None) -> dict[str, Presence]:
    """By device; None: of all devices ever seen."""
    found = await conn.fetch(
        f"SELECT {_COLUMNS} FROM presence WHERE $1::text[] IS NULL OR device = ANY($1)", devices
    )
    return {r["device"]: Presence(**dict(r)) for r in found}


async def connected(conn: Conn) -> dict[str, Presence]:
    """Every device that is connected now."""
    found = await conn.fetch(f"SELECT {_COLUMNS} FROM presence WHERE connected")
    return {r["device"]: Presence(**dict(r)) for r in found}


async def events(
    conn: Conn, *, device: str, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[PresenceEvent]:
    """A device's comings and goings, newest first."""
    checked_limit(limit)
    before = None if after is None else from_cursor(after, tuple[int])[0]
    found = await conn.fetch(
        """SELECT id, device, connected, extract(epoch FROM at)::float8 AS at, reason FROM presence_event
           WHERE device = $1 AND ($2::bigint IS NULL OR id < $2) ORDER BY id DESC LIMIT $3""",
        device,
        before,
        limit + 1,
    )
    items = [
        PresenceEvent(device=r["device"], connected=r["connected"], at=r["at"], reason=r["reason"])
        for r in found[:limit]
    ]
    return Page(items, to_cursor(found[limit - 1]["id"]) if len(found) > limit else None)


async def save(conn: Conn, changed: Mapping[str, Presence], happened: Iterable[PresenceEvent]) -> None:
    """Set the presence of devices to what it is now, and keep what happened on the way."""
    if changed:
        rows = [changed[device] for device in sorted(changed)]
        await conn.execute(
            """INSERT INTO presence (device, connected, since, reason, server_id, cid, remote)
               SELECT device, connected, to_timestamp(since), reason, server_id, cid, remote
               FROM unnest($1::text[], $2::boolean[], $3::float8[], $4::text[], $5::text[], $6::bigint[],
                           $7::text[])
                    t(device, connected, since, reason, server_id, cid, remote)
               ON CONFLICT (device) DO UPDATE SET connected = EXCLUDED.connected, since = EXCLUDED.since,
                   reason = EXCLUDED.reason, server_id = EXCLUDED.server_id, cid = EXCLUDED.cid,
                   remote = EXCLUDED.remote""",
            [r.device for r in rows],
            [r.connected for r in rows],
            [r.since for r in rows],
            [r.reason for r in rows],
            [r.server_id for r in rows],
            [r.cid for r in rows],
            [r.remote for r in rows],
        )
    events_ = list(happened)
    if events_:
        await conn.execute(
            """INSERT INTO presence_event (device, connected, at, reason)
               SELECT device, connected, to_timestamp(at), reason
               FROM unnest($1::text[], $2::boolean[], $3::float8[], $4::text[])
                    t(device, connected, at, reason)""",
            [e.device for e in events_],
            [e.connected for e in events_],
            [e.at for e in events_],
            [e.reason for e in events_],
        )
