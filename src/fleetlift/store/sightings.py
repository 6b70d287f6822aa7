"""Queries of what the backend has seen of devices, read as a whole or only where it has changed.

What has changed is told by the transaction that wrote each row (`xmin`): at a `Reading`, every transaction
older than its `oldest` has ended, so all that a later statement sees beyond it was written by that one or by
newer ones. A commit that comes late is therefore not missed; some rows are read twice.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.store.pool import Conn

# The age of a row older than two thousand million transactions may be anything: at worst it is read again.
_CHANGED = "age(xmin) <= age($1::text::xid)"

# Joined, for a planner that is given a hundred thousand by `= ANY` looks at each of them.
_DEVICES = "unnest($1::text[]) d(device) USING (device)"


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of the database that what was written later can be asked by."""

    server: datetime  # its start: another one's transactions may be counted otherwise
    oldest: str  # transaction that had not ended
    rows: int  # of the ledger, about; -1: not known


async def reading(conn: Conn) -> Reading:
    """The moment that this statement sees; take it before whatever is to be read after it."""
    row = await conn.fetchrow(
        "SELECT pg_postmaster_start_time() AS server, "
        "pg_snapshot_xmin(pg_current_snapshot())::xid::text AS oldest, reltuples::bigint AS rows "
        "FROM pg_class WHERE oid = 'ledger'::regclass"
    )
    assert row is not None
    return Reading(server=row["server"], oldest=row["oldest"], rows=row["rows"])


async def connected(conn: Conn, devices: Sequence[str]) -> list[tuple[str, bool]]:
    """Which of `devices` are connected."""
    found = await conn.fetch(f"SELECT device, true FROM presence JOIN {_DEVICES} WHERE connected", devices)
    return [(device, there) for device, there in found]


async def connected_since(conn: Conn, since: Reading) -> list[tuple[str, bool]]:
    """Devices whose presence has changed, and whether they are connected; a device deleted is not."""
    found = await conn.fetch(
        f"SELECT id, false FROM former_device WHERE {_CHANGED} AND id NOT IN (SELECT device FROM presence) "
        f"UNION ALL SELECT device, connected FROM presence WHERE {_CHANGED}",
        since.oldest,
    )
    return [(device, there) for device, there in found]


async def reported_since(conn: Conn, name: str, since: Reading) -> list[tuple[str, str | None]]:
    """(device, what it reports as JSON text, None: nothing any more) of shadows that have changed."""
    found = await conn.fetch(
        "SELECT device, CASE WHEN deleted_at IS NULL THEN reported::text END FROM shadow "
        f"WHERE name = $2 AND {_CHANGED}",
        since.oldest,
        name,
    )
    return [(device, text) for device, text in found]


_NEWEST = "device, path = $2 AS by_new, extract(epoch FROM max(last_at))::float8"


async def heard(conn: Conn, devices: Sequence[str]) -> list[tuple[str, bool, float]]:
    """(device, by the new path or another, when its newest telemetry came)."""
    found = await conn.fetch(
        f"SELECT {_NEWEST} FROM ledger JOIN {_DEVICES} GROUP BY 1, 2", devices, MQTT_PATH
    )
    return [(device, by_new, at) for device, by_new, at in found]


async def heard_since(conn: Conn, since: Reading) -> list[tuple[str, bool, float]]:
    """The same of channels that have changed; the time of a channel only ever grows."""
    found = await conn.fetch(
        f"SELECT {_NEWEST} FROM ledger WHERE {_CHANGED} GROUP BY 1, 2", since.oldest, MQTT_PATH
    )
    return [(device, by_new, at) for device, by_new, at in found]
