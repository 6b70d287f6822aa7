"""The target made for a move, and taken away again when the move goes back."""

import contextlib
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.tenant.schema import quoted
from fleetlift.tenant.ddl import connected, made_by

_SCHEMAS: Final = """
SELECT nspname FROM pg_namespace
WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1
"""


def database_of(url: str) -> str:
    return urlsplit(url).path.lstrip("/")


def maintenance_url(url: str) -> str:
    """The same server's database `postgres`, from which others are made and dropped."""
    return urlunsplit(urlsplit(url)._replace(path="/postgres"))


async def is_there(url: str) -> bool:
    """Whether there is such a database. Raises Unavailable when its server does not answer."""
    try:
        conn = await asyncpg.connect(url, timeout=10.0)
    except asyncpg.InvalidCatalogNameError:
        return False
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise Unavailable(f"a database does not answer: {error or type(error).__name__}") from error
    await conn.close(timeout=5.0)
    return True


async def maker_of(url: str) -> str | None:
    """The move that has made the schema of a database, if any has."""
    async with connected(url) as conn:
        made = await made_by(conn)
        return made[0] if made is not None else None


async def make_database(url: str) -> None:
    """Make the target's database where it is not there."""
    async with connected(maintenance_url(url)) as conn:
        with contextlib.suppress(asyncpg.DuplicateDatabaseError):
            await conn.execute(f"CREATE DATABASE {quoted(database_of(url))} TEMPLATE template0")


async def drop_database(url: str) -> None:
    """Drop the target's database with whoever is connected to it, slots in it included."""
    name = database_of(url)
    async with connected(maintenance_url(url)) as conn:
        await conn.fetch(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots "
            "WHERE database = $1 AND active_pid IS NOT NULL",
            name,
        )
        await conn.fetch(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
            "WHERE database = $1 AND active_pid IS NULL",
            name,
        )
        await conn.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")


async def empty_target(url: str, *, move: str) -> int:
    """Drop all that the move has made in the target's database; how many schemas. It was empty before, so
    everything there is the move's. Raises Conflict when another move has made it."""
    async with connected(url) as conn:
        made = await made_by(conn)
        if made is None:
            return 0
        if made[0] != move:
            raise Conflict(f"the target was made by the move {made[0]!r}: nothing of it was dropped")
        names = [row["nspname"] for row in await conn.fetch(_SCHEMAS)]
        async with conn.transaction():
            for name in names:
                await conn.execute(f"DROP SCHEMA {quoted(name)} CASCADE")
            # As PostgreSQL makes it in a new database.
            await conn.execute("CREATE SCHEMA public AUTHORIZATION pg_database_owner")
            await conn.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
            await conn.execute("COMMENT ON SCHEMA public IS 'standard public schema'")
        return len(names)
