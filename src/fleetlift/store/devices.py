"""Queries of tenants, devices and their credentials.

Every function takes a connection and leaves transactions to its caller. Times are Unix seconds; JSON
travels as text.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import asyncpg
import msgspec

from fleetlift.core import where as conditions
from fleetlift.store.paging import DEFAULT_LIMIT, MAX_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn

# Told by NOTIFY, with a JSON list of device ids: credentials these devices may be connected with are gone.
REVOKED_CHANNEL = "device_revoked"


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: float


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device as its tenant sees it: `credentials` are the kinds it has, never their values."""

    id: str
    tenant: str
    dialect: str
    attributes: dict[str, Any]
    credentials: tuple[str, ...] = ()
    connected: bool = False
    since: float | None = None  # since when connected or away; None: never seen
    reason: str = ""  # why it left
    created_at: float
    updated_at: float


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is written of a device. `attributes` is JSON text."""

    id: str
    tenant: str
    dialect: str
    attributes: str


class StoredCredential(msgspec.Struct, frozen=True, kw_only=True):
    """`value` is a hash with its scheme for passwords and tokens, the PEM for keys and certificates."""

    device: str
    n: int
    kind: str
    value: str


# -- tenants -------------------------------------------------------------------------------------------


async def put_tenant(conn: Conn, tenant: str, name: str) -> None:
    await conn.execute(
        "INSERT INTO tenant (id, name) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET name = EXCLUDED.name",
        tenant,
        name,
    )


async def add_missing_tenants(conn: Conn, tenants: Sequence[str]) -> None:
    await conn.execute(
        "INSERT INTO tenant (id, name) SELECT t, t FROM unnest($1::text[]) t ON CONFLICT DO NOTHING",
        sorted(tenants),
    )


async def existing_tenants(conn: Conn, tenants: Sequence[str]) -> set[str]:
    found = await conn.fetch("SELECT id FROM tenant WHERE id = ANY($1::text[])", tenants)
    return {r["id"] for r in found}


async def list_tenants(conn: Conn, *, limit: int = DEFAULT_LIMIT, after: str | None = None) -> Page[Tenant]:
    checked_limit(limit)
    found = await conn.fetch(
        """SELECT id, name, extract(epoch FROM created_at)::float8 AS created_at FROM tenant
           WHERE $1::text IS NULL OR id > $1 ORDER BY id LIMIT $2""",
        None if after is None else from_cursor(after, tuple[str])[0],
        limit + 1,
    )
    items = [Tenant(**dict(r)) for r in found[:limit]]
    return Page(items, to_cursor(items[-1].id) if len(found) > limit else None)


# -- devices -------------------------------------------------------------------------------------------

_SELECT = """
    SELECT d.id, d.tenant, d.dialect, d.attributes::text AS attributes,
           ARRAY(SELECT DISTINCT kind FROM device_credential WHERE device = d.id ORDER BY 1) AS credentials,
           coalesce(p.connected, false) AS connected, extract(epoch FROM p.since)::float8 AS since,
           coalesce(p.reason, '') AS reason, extract(epoch FROM d.created_at)::float8 AS created_at,
           extract(epoch FROM d.updated_at)::float8 AS updated_at
    FROM device d LEFT JOIN presence p ON p.device = d.id"""


def _device(r: asyncpg.Record) -> Device:
    return Device(
        **{
            **dict(r),
            "attributes": msgspec.json.decode(r["attributes"]),
            "credentials": tuple(r["credentials"]),
        }
    )


async def get(conn: Conn, device: str, *, tenant: str | None = None) -> Device | None:
    """None when there is no such device, or it belongs to another tenant."""
    found = await conn.fetchrow(
        _SELECT + " WHERE d.id = $1 AND ($2::text IS NULL OR d.tenant = $2)", device, tenant
    )
    return _device(found) if found else None


async def get_page(
    conn: Conn,
    *,
    tenant: str | None = None,
    where: conditions.Expression = conditions.EVERYTHING,
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> Page[Device]:
    """Devices by id that `where` selects; of one tenant, or of all."""
    checked_limit(limit)
    at = "" if after is None else from_cursor(after, tuple[str])[0]
    items: list[Device] = []
    async for device in _select(conn, tenant, where, at, limit + 1):
        items.append(device)
        if len(items) > limit:
            return Page(items[:limit], to_cursor(items[limit - 1].id))
    return Page(items)


async def select(
    conn: Conn, *, tenant: str | None = None, where: conditions.Expression = conditions.EVERYTHING
) -> list[Device]:
    """Every device that `where` selects, by id."""
    return [device async for device in _select(conn, tenant, where, "", MAX_LIMIT)]


async def _select(
    conn: Conn, tenant: str | None, where: conditions.Expression, after: str, wanted: int
) -> AsyncIterator[Device]:
    """Devices by id; conditions are evaluated here, a page at a time, as SQL knows nothing of versions."""
    needs_shadow = any(name.split(".")[0] == "shadow" for name in conditions.fields_used(where))
    page = wanted if where == conditions.EVERYTHING else MAX_LIMIT
    while True:
        found = await conn.fetch(
            _SELECT + " WHERE d.id > $1 AND ($2::text IS NULL OR d.tenant = $2) ORDER BY d.id LIMIT $3",
            after,
            tenant,
            page,
        )
        read = [_device(r) for r in found]
        shadows = await _shadows(conn, [d.id for d in read]) if needs_shadow else {}
        for device in read:
            if conditions.evaluate(where, record(device, shadows.get(device.id))):
                yield device
        if len(found) < page:
            return
        after = read[-1].id


def record(device: Device, shadow: Mapping[str, Any] | None = None) -> dict[str, object]:
    """A device as conditions (`core/where.py`) see it."""
    known: dict[str, object] = {
        "id": device.id,
        "tenant": device.tenant,
        "attributes": device.attributes,
        "connected": device.connected,
        "connection": {"connected": device.connected, "since": device.since, "reason": device.reason},
    }
    if shadow is not None:
        known["shadow"] = shadow
    return known


async def _shadows(conn: Conn, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The classic shadows: `desired`, `reported`, and the reported keys themselves for short conditions."""
    found = await conn.fetch(
        """SELECT device, desired::text AS desired, reported::text AS reported FROM shadow
           WHERE device = ANY($1::text[]) AND name = '' AND deleted_at IS NULL""",
        devices,
    )
    shadows: dict[str, dict[str, Any]] = {}
    for r in found:
        desired = msgspec.json.decode(r["desired"] or "{}")
        reported = msgspec.json.decode(r["reported"] or "{}")
        flat = reported if isinstance(reported, dict) else {}
        shadows[r["device"]] = {**flat, "desired": desired, "reported": reported}
    return shadows


async def owners(conn: Conn, devices: Sequence[str]) -> dict[str, str]:
    """The tenant of each of these devices that exists."""
    found = await conn.fetch("SELECT id, tenant FROM device WHERE id = ANY($1::text[])", devices)
    return {r["id"]: r["tenant"] for r in found}


async def former_owners(conn: Conn, devices: Sequence[str]) -> dict[str, str]:
    """The tenant that each of these devices had when it was deleted."""
    found = await conn.fetch("SELECT id, tenant FROM former_device WHERE id = ANY($1::text[])", devices)
    return {r["id"]: r["tenant"] for r in found}


async def known_owners(conn: Conn, devices: Sequence[str]) -> dict[str, str]:
    """The tenant of each of these devices that exists, or did until it was deleted."""
    found = await conn.fetch(
        """SELECT id, tenant FROM device WHERE id = ANY($1::text[])
           UNION ALL
           SELECT id, tenant FROM former_device f WHERE id = ANY($1::text[])
               AND NOT EXISTS (SELECT FROM device d WHERE d.id = f.id)""",
        devices,
    )
    return {r["id"]: r["tenant"] for r in found}


async def has_messages(conn: Conn, device: str) -> bool:
    """Whether telemetry is stored under this id."""
    found: bool = await conn.fetchval(
        """SELECT EXISTS (SELECT FROM telemetry WHERE device = $1)
                  OR EXISTS (SELECT FROM ledger WHERE device = $1)""",
        device,
    )
    return found


async def put(conn: Conn, rows: Sequence[DeviceRow]) -> set[str]:
    """Create devices, or replace what is written of them; returns them without those of another tenant."""
    written = await conn.fetch(
        """INSERT INTO device (id, tenant, dialect, attributes)
           SELECT id, tenant, dialect, attributes::jsonb
           FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) t(id, tenant, dialect, attributes)
           ON CONFLICT (id) DO UPDATE SET dialect = EXCLUDED.dialect, attributes = EXCLUDED.attributes,
               updated_at = now() WHERE device.tenant = EXCLUDED.tenant
           RETURNING device.id""",
        [r.id for r in rows],
        [r.tenant for r in rows],
        [r.dialect for r in rows],
        [r.attributes for r in rows],
    )
    return {r["id"] for r in written}


async def delete(conn: Conn, device: str, *, tenant: str | None = None) -> bool:
    """Remove a device, its credentials and its presence. Telemetry, ledger and commands stay.

    So does the knowledge whose they are: the id goes to no other tenant.
    """
    status = await conn.execute(
        """WITH gone AS (
               DELETE FROM device WHERE id = $1 AND ($2::text IS NULL OR tenant = $2) RETURNING id, tenant)
           INSERT INTO former_device (id, tenant) SELECT id, tenant FROM gone
           ON CONFLICT (id) DO UPDATE SET tenant = EXCLUDED.tenant, deleted_at = now()""",
        device,
        tenant,
    )
    if status.endswith(" 0"):
        return False
    await conn.execute("DELETE FROM presence WHERE device = $1", device)
    return True


async def count(conn: Conn, *, tenant: str | None = None) -> int:
    return int(
        await conn.fetchval("SELECT count(*) FROM device WHERE $1::text IS NULL OR tenant = $1", tenant) or 0
    )


# -- credentials -----------------------------------------------------------------------------------------


async def credentials(conn: Conn, devices: Sequence[str]) -> dict[str, list[StoredCredential]]:
    """The credentials of those of the devices that exist, in their order; without any, an empty list."""
    found = await conn.fetch(
        """SELECT d.id, c.n, c.kind, c.value FROM device d LEFT JOIN device_credential c ON c.device = d.id
           WHERE d.id = ANY($1::text[]) ORDER BY d.id, c.n""",
        devices,
    )
    known: dict[str, list[StoredCredential]] = {}
    for r in found:
        mine = known.setdefault(r["id"], [])
        if r["n"] is not None:
            mine.append(StoredCredential(device=r["id"], n=r["n"], kind=r["kind"], value=r["value"]))
    return known


async def delete_credentials(conn: Conn, devices: Sequence[str], *, n: int | None = None) -> list[str]:
    """Remove all credentials of devices, or the ones at place `n`; returns the devices that had some."""
    found = await conn.fetch(
        """DELETE FROM device_credential WHERE device = ANY($1::text[]) AND ($2::int IS NULL OR n = $2)
           RETURNING device""",
        devices,
        n,
    )
    return sorted({r["device"] for r in found})


async def put_credentials(conn: Conn, added: Sequence[StoredCredential]) -> None:
    """Write credentials at their places. The devices must exist."""
    if added:
        await conn.execute(
            """INSERT INTO device_credential (device, n, kind, value)
               SELECT * FROM unnest($1::text[], $2::smallint[], $3::text[], $4::text[])
               ON CONFLICT (device, n) DO UPDATE SET kind = EXCLUDED.kind, value = EXCLUDED.value""",
            [c.device for c in added],
            [c.n for c in added],
            [c.kind for c in added],
            [c.value for c in added],
        )


async def tell_revoked(conn: Conn, devices: Sequence[str]) -> None:
    """Tell whoever holds connections of these devices, once the transaction commits."""
    for start in range(0, len(devices), 50):  # a notification holds 8,000 bytes at most
        await conn.execute(
            "SELECT pg_notify($1, $2)",
            REVOKED_CHANNEL,
            msgspec.json.encode(list(devices[start : start + 50])).decode(),
        )
