"""Queries of shadows. Functions take a connection and leave transactions to their caller.

Whoever changes shadows locks their rows first, in order of (device, name). So requests read from the log, the
API and a migration's orders can write at the same time, from different processes, without losing an update.
"""

from collections.abc import Collection, Mapping, Sequence

import asyncpg
import msgspec

from fleetlift.core.jsonvalue import JsonObject
from fleetlift.core.shadow import Shadow, ShadowKey
from fleetlift.store.paging import DEFAULT_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn

_COLUMNS = """s.device, s.name, s.version, s.desired, s.reported, s.desired_meta, s.reported_meta,
    extract(epoch FROM s.updated_at)::float8 AS updated_at,
    extract(epoch FROM s.deleted_at)::float8 AS deleted_at"""
_KEYS = "unnest($1::text[], $2::text[]) k(device, name)"


async def load(conn: Conn, keys: Collection[ShadowKey]) -> dict[ShadowKey, Shadow]:
    """The shadows as they are stored, deleted ones included; without a lock."""
    found = await conn.fetch(
        f"SELECT {_COLUMNS} FROM {_KEYS} JOIN shadow s USING (device, name)", *_columns_of(keys)
    )
    return dict(_shadow(row) for row in found)


async def lock(conn: Conn, keys: Collection[ShadowKey]) -> dict[ShadowKey, Shadow]:
    """The same, locked until the transaction ends; a key that has no shadow yet is locked as well.

    A row that says "deleted at version 0" stands for a shadow that never was: without a row there would be
    nothing to lock, and two writers could each make version 1.
    """
    ordered = sorted(keys)
    columns = _columns_of(ordered)
    await conn.execute(
        f"""INSERT INTO shadow (device, name, version, deleted_at)
            SELECT k.device, k.name, 0, 'epoch' FROM {_KEYS}
            WHERE NOT EXISTS (SELECT FROM shadow s WHERE s.device = k.device AND s.name = k.name)
            ON CONFLICT DO NOTHING""",
        *columns,
    )
    found = await conn.fetch(
        f"""SELECT {_COLUMNS} FROM {_KEYS} JOIN shadow s USING (device, name)
            ORDER BY s.device, s.name FOR UPDATE OF s""",
        *columns,
    )
    return dict(_shadow(row) for row in found)


async def save(conn: Conn, shadows: Mapping[ShadowKey, Shadow]) -> None:
    """Write shadows whose rows the caller has locked."""
    if not shadows:
        return
    rows = list(shadows.items())
    await conn.execute(
        """UPDATE shadow s SET version = n.version, desired = n.desired::json, reported = n.reported::json,
               desired_meta = n.desired_meta::json, reported_meta = n.reported_meta::json,
               updated_at = to_timestamp(n.updated_at), deleted_at = to_timestamp(n.deleted_at)
           FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[],
                       $8::float8[], $9::float8[])
                n(device, name, version, desired, reported, desired_meta, reported_meta, updated_at,
                  deleted_at)
           WHERE s.device = n.device AND s.name = n.name""",
        [key.device for key, _ in rows],
        [key.name for key, _ in rows],
        [shadow.version for _, shadow in rows],
        [_text(shadow.desired) for _, shadow in rows],
        [_text(shadow.reported) for _, shadow in rows],
        [_text(shadow.desired_meta) for _, shadow in rows],
        [_text(shadow.reported_meta) for _, shadow in rows],
        [shadow.updated_at for _, shadow in rows],
        [shadow.deleted_at for _, shadow in rows],
    )


async def names(
    conn: Conn, device: str, *, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[str]:
    """The names of a device's named shadows, in order; the classic one is not among them."""
    checked_limit(limit)
    behind = "" if after is None else from_cursor(after, tuple[str])[0]
    found = await conn.fetch(
        """SELECT name FROM shadow WHERE device = $1 AND name > $2 AND deleted_at IS NULL
           ORDER BY name LIMIT $3""",
        device,
        behind,
        limit + 1,
    )
    items = [row["name"] for row in found[:limit]]
    return Page(items, to_cursor(items[-1]) if len(found) > limit else None)


async def all_named(conn: Conn, name: str, devices: Sequence[str] | None = None) -> dict[str, Shadow]:
    """The shadow called `name` of each device that has one; `devices` None: of all devices."""
    found = await conn.fetch(
        f"""SELECT {_COLUMNS} FROM shadow s
            WHERE s.name = $1 AND s.deleted_at IS NULL AND ($2::text[] IS NULL OR s.device = ANY($2))""",
        name,
        devices,
    )
    return {row["device"]: _shadow(row)[1] for row in found}


async def reported(conn: Conn, name: str, devices: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(device, what it reports as JSON text) of the shadows called `name`; `devices` None: of all devices."""
    found = await conn.fetch(
        """SELECT device, reported::text FROM shadow
           WHERE name = $1 AND deleted_at IS NULL AND reported IS NOT NULL
             AND ($2::text[] IS NULL OR device = ANY($2))""",
        name,
        devices,
    )
    return [(device, text) for device, text in found]


def _columns_of(keys: Collection[ShadowKey]) -> tuple[list[str], list[str]]:
    return [key.device for key in keys], [key.name for key in keys]


def _shadow(row: asyncpg.Record) -> tuple[ShadowKey, Shadow]:
    return ShadowKey(row["device"], row["name"]), Shadow(
        version=row["version"],
        updated_at=row["updated_at"],
        desired=_object(row["desired"]),
        reported=_object(row["reported"]),
        desired_meta=_object(row["desired_meta"]),
        reported_meta=_object(row["reported_meta"]),
        deleted_at=row["deleted_at"],
    )


def _object(text: str | None) -> JsonObject | None:
    return None if text is None else msgspec.json.decode(text, type=JsonObject)


def _text(section: JsonObject | None) -> str | None:
    return None if section is None else msgspec.json.encode(section).decode()
