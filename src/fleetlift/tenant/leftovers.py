"""What a move has left on a database, and its removal: after a release, nothing."""

import asyncio
import contextlib
from enum import StrEnum
from typing import Final

import asyncpg
import msgspec

from fleetlift.core.errors import Conflict, NotFound, Unavailable
from fleetlift.core.tenant.schema import quoted
from fleetlift.tenant.fence import Connection, remove_fence, tag_of, until_locked
from fleetlift.tenant.names import (
    FENCE_SCHEMA,
    MOVE_SCHEMA,
    publication_name,
    reverse_slot_name,
    slot_name,
)


class Kind(StrEnum):
    SLOT = "replication slot"
    PUBLICATION = "publication"
    SUBSCRIPTION = "subscription"
    ORIGIN = "replication origin"
    SCHEMA = "schema"
    FENCE = "fence"
    TRIGGER = "trigger"
    IDENTITY = "replica identity to be put back on the other side"
    TEMPORARY = "temporary table"
    SETTING = "setting"


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is there because of a move."""

    kind: Kind
    name: str

    @property
    def text(self) -> str:
        return f"{self.kind} {self.name}"


_FIND: Final = f"""
SELECT 'SLOT' AS kind, slot_name::text AS name FROM pg_replication_slots
  WHERE database = current_database() AND NOT temporary AND slot_name LIKE 'fleetlift\\_%'
UNION ALL SELECT 'PUBLICATION', pubname::text FROM pg_publication WHERE pubname LIKE 'fleetlift\\_%'
UNION ALL SELECT 'SUBSCRIPTION', subname::text FROM pg_subscription
  WHERE subname LIKE 'fleetlift\\_%'
    AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL SELECT 'ORIGIN', roname FROM pg_replication_origin WHERE roname LIKE 'fleetlift\\_%'
UNION ALL SELECT 'SCHEMA', nspname::text FROM pg_namespace
  WHERE nspname IN ('{FENCE_SCHEMA}', '{MOVE_SCHEMA}')
UNION ALL SELECT 'TRIGGER', tgname || ' on ' || tgrelid::regclass::text FROM pg_trigger
  WHERE NOT tgisinternal AND tgname LIKE 'fleetlift\\_%'
UNION ALL SELECT 'TEMPORARY', c.oid::regclass::text FROM pg_class c
  WHERE c.relpersistence = 't' AND c.relkind = 'r' AND c.relname LIKE 'fleetlift\\_%'
UNION ALL SELECT 'SETTING', split_part(c, '=', 1) FROM pg_db_role_setting s, unnest(s.setconfig) c
  WHERE c LIKE 'fleetlift\\_%' AND s.setdatabase IN
    (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
ORDER BY 1, 2
"""
_NOTED: Final = f"{MOVE_SCHEMA}.identity_before"
_IS_FULL: Final = "SELECT relreplident = 'f' FROM pg_class WHERE oid = to_regclass($1)"
_TRIES: Final = 100


async def leftovers(url: str, move: str | None = None) -> list[Leftover]:
    """What is there of `move`, or of any; [] after a release. Temporary tables, which go with their session,
    are only listed with those of any.

    Raises NotFound when there is no such database.
    """
    conn = await _connect(url)
    try:
        rows = await conn.fetch(_FIND)
        found = [Leftover(kind=Kind[row["kind"]], name=row["name"]) for row in rows]
        fences = await _fences(conn)
        found += [Leftover(kind=Kind.FENCE, name=name) for name in fences.values()]
        slots = await _slots_in_books(conn)
        noted = await _identities(conn, None if move is None else _names(move))
        found += [Leftover(kind=Kind.IDENTITY, name=row["relation"]) for row in noted]
    finally:
        await conn.close()
    if move is None:
        return found
    mine, tag = _names(move), tag_of(move)
    kept = []
    for one in found:
        match one.kind:
            case Kind.SLOT | Kind.PUBLICATION | Kind.SUBSCRIPTION | Kind.ORIGIN:
                ours = one.name in mine
            case Kind.TRIGGER:
                ours = one.name.startswith(f"fleetlift_fence_{tag}_")
            case Kind.FENCE:
                ours = one.name == move
            case Kind.SCHEMA if one.name == FENCE_SCHEMA:
                ours = not set(fences) - {tag}
            case Kind.SCHEMA:
                ours = not slots - mine
            case Kind.TEMPORARY:
                ours = False  # whose it is cannot be seen
            case Kind.IDENTITY | Kind.SETTING:
                ours = True
        if ours:
            kept.append(one)
    return kept


async def clean(
    url: str, move: str, *, other_url: str | None = None, within_s: float = 60.0
) -> list[Leftover]:
    """Remove all that `move` has left on a database, and say what that was. May be repeated.

    Replica identities of the *other* side's tables may be noted here; they are put back by way of
    `other_url`. Without it Conflict is raised while some are noted, because the note would be lost.
    Raises NotFound when there is no such database.
    """
    before = await leftovers(url, move)
    conn = await _connect(url)
    try:
        mine = _names(move)
        await _put_identities_back(conn, mine, other_url)
        for name in sorted(mine):
            await _drop_subscription(conn, name)
            await _drop_slot(conn, name)
            await conn.execute(f"DROP PUBLICATION IF EXISTS {quoted(name)}")
            if await conn.fetchval("SELECT count(*) FROM pg_replication_origin WHERE roname = $1", name):
                await conn.execute("SELECT pg_replication_origin_drop($1)", name)
        await remove_fence(conn, tag_of(move), within_s=within_s)
        for one in before:
            if one.kind is Kind.SETTING:
                await _reset(conn, one.name)
        if not await _slots_in_books(conn) - mine:
            await conn.execute(f"DROP SCHEMA IF EXISTS {MOVE_SCHEMA} CASCADE")
        else:
            await conn.execute(f"DELETE FROM {MOVE_SCHEMA}.position WHERE slot = ANY($1::text[])", list(mine))
    finally:
        await conn.close()
    return before


async def put_identities_back(url: str, move: str, *, other_url: str) -> None:
    """Give the other side's tables the replica identity that `move` has noted here. Raises NotFound when
    there is no such database."""
    conn = await _connect(url)
    try:
        await _put_identities_back(conn, _names(move), other_url)
    finally:
        await conn.close()


def _names(move: str) -> frozenset[str]:
    return frozenset({slot_name(move), publication_name(move), reverse_slot_name(move)})


async def _connect(url: str) -> Connection:
    try:
        return await asyncpg.connect(
            url,
            timeout=10.0,
            command_timeout=60.0,
            server_settings={"application_name": "fleetlift clean", "lock_timeout": "5s", "search_path": ""},
        )
    except asyncpg.InvalidCatalogNameError as exc:
        raise NotFound(f"there is no such database: {exc}") from exc
    except (OSError, asyncpg.PostgresError) as exc:
        raise Unavailable(f"the database does not answer: {exc}") from exc


async def _fences(conn: Connection) -> dict[str, str]:
    """Tag → move of every fence."""
    if await conn.fetchval("SELECT to_regclass($1)", f"{FENCE_SCHEMA}.move") is None:
        return {}
    return {row["tag"]: row["move"] for row in await conn.fetch(f"SELECT tag, move FROM {FENCE_SCHEMA}.move")}


async def _slots_in_books(conn: Connection) -> set[str]:
    """The followers whose position is kept here: several moves share one schema."""
    if await conn.fetchval("SELECT to_regclass($1)", f"{MOVE_SCHEMA}.position") is None:
        return set()
    return {row["slot"] for row in await conn.fetch(f"SELECT slot FROM {MOVE_SCHEMA}.position")}


async def _identities(conn: Connection, slots: frozenset[str] | None) -> list[asyncpg.Record]:
    """Replica identities of the other side that followers have noted here; of any, without `slots`."""
    if not await conn.fetchval("SELECT to_regclass($1) IS NOT NULL", _NOTED):
        return []
    return await conn.fetch(
        f"SELECT relation, clause FROM {_NOTED} WHERE slot = ANY($1::text[]) OR $1 IS NULL ORDER BY 1",
        None if slots is None else list(slots),
    )


async def _put_identities_back(conn: Connection, slots: frozenset[str], other_url: str | None) -> None:
    rows = await _identities(conn, slots)
    if not rows:
        return
    if other_url is None:
        names = ", ".join(row["relation"] for row in rows)
        raise Conflict(
            f"the replica identity of {names} must be put back first: give the other side's URL too"
        )
    try:
        other = await _connect(other_url)
    except NotFound:
        return  # its tables are gone with it
    try:
        for row in rows:
            if await other.fetchval(_IS_FULL, row["relation"]):

                async def put_back(row: asyncpg.Record = row) -> None:
                    await other.execute(f"ALTER TABLE {row['relation']} REPLICA IDENTITY {row['clause']}")

                await until_locked(other, row["relation"], put_back)
            await conn.execute(
                f"DELETE FROM {_NOTED} WHERE slot = ANY($1::text[]) AND relation = $2",
                list(slots),
                row["relation"],
            )
    finally:
        await other.close()


async def _drop_subscription(conn: Connection, name: str) -> None:
    known = await conn.fetchval(
        "SELECT count(*) FROM pg_subscription WHERE subname = $1 AND subdbid = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())",
        name,
    )
    if known:
        # Without its slot: that is on the other side, and goes there.
        await conn.execute(f"ALTER SUBSCRIPTION {quoted(name)} DISABLE")
        await conn.execute(f"ALTER SUBSCRIPTION {quoted(name)} SET (slot_name = NONE)")
        await conn.execute(f"DROP SUBSCRIPTION {quoted(name)}")


async def _drop_slot(conn: Connection, name: str) -> None:
    """Drop a slot, ending whoever still reads from it: it is this move's own."""
    for _ in range(_TRIES):
        row = await conn.fetchrow(
            "SELECT active_pid FROM pg_replication_slots "
            "WHERE slot_name = $1 AND database = current_database()",
            name,
        )
        if row is None:
            return
        if row["active_pid"] is not None:
            await conn.execute("SELECT pg_terminate_backend($1)", row["active_pid"])
        with contextlib.suppress(asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
            await conn.execute("SELECT pg_drop_replication_slot($1)", name)
            return
        await asyncio.sleep(0.05)
    raise Conflict(f"the replication slot {name} is taken again and again: stop the mover that reads from it")


async def _reset(conn: Connection, setting: str) -> None:
    rows = await conn.fetch(
        "SELECT d.datname, r.rolname FROM pg_db_role_setting s "
        "LEFT JOIN pg_database d ON d.oid = s.setdatabase "
        "LEFT JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) c WHERE split_part(c, '=', 1) = $1",
        setting,
    )
    name = ".".join(quoted(part) for part in setting.split("."))
    for row in rows:
        at = f" IN DATABASE {quoted(row['datname'])}" if row["datname"] and row["rolname"] else ""
        what = (
            f"ROLE {quoted(row['rolname'])}{at}" if row["rolname"] else f"DATABASE {quoted(row['datname'])}"
        )
        await conn.execute(f"ALTER {what} RESET {name}")
