"""Connections to PostgreSQL."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import asyncpg

from fleetlift.core.errors import Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

Pool: TypeAlias = "asyncpg.Pool[Any]"
Conn: TypeAlias = "asyncpg.Connection[Any] | asyncpg.pool.PoolConnectionProxy[Any]"
"""A connection, one's own or lent by a pool."""

CONNECT_ERRORS = (
    OSError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncio.TimeoutError,
)


async def _as_it_is(connection: "asyncpg.Connection[Any]") -> None:
    """What a borrower leaves is nothing but an open transaction, which asyncpg ends itself. Its usual four
    statements at each return cost as much as a small transaction."""


@contextlib.asynccontextmanager
async def open_pool(url: str, *, name: str, size: int = 10, wait_s: float = 30.0) -> AsyncIterator[Pool]:
    """A pool on `url`, closed at the end. Waits up to `wait_s` for a server that is starting.

    Columns of type json and jsonb are their text, as asyncpg has it (COPY needs it so).
    `name` is seen in pg_stat_activity.
    Raises Unavailable when the server does not answer in time.
    """
    deadline = asyncio.get_running_loop().time() + wait_s
    pause_s = 0.05
    while True:
        try:
            pool = await asyncpg.create_pool(
                url,
                min_size=1,
                max_size=size,
                server_settings={"application_name": f"fleetlift {name}", "timezone": "UTC"},
                command_timeout=60.0,
                timeout=10.0,
                reset=_as_it_is,
            )
            break
        except CONNECT_ERRORS as problem:
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"PostgreSQL does not answer ({problem}): is it running?") from problem
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 2)
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(5.0):
                await pool.close()
        except TimeoutError:
            pool.terminate()


def lock_key(name: str) -> int:
    """The advisory lock's number for a name: 63 bits of its digest, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


@contextlib.asynccontextmanager
async def sole_owner(
    url: str, name: str, *, retry_s: float = 1.0
) -> AsyncIterator["asyncpg.Connection[Any]"]:
    """Be the only one, among all processes on this database, who is inside with this `name`.

    Waits for its turn. The lock lives on a connection of its own and is lost with it: who keeps working for
    long must watch `connection.is_closed()`, or guard what it writes (see `store.positions.advance`).
    """
    while True:
        try:
            connection = await asyncpg.connect(
                url, timeout=10.0, server_settings={"application_name": f"fleetlift owner {name}"}
            )
        except CONNECT_ERRORS:
            await asyncio.sleep(retry_s)
            continue
        try:
            if await connection.fetchval("SELECT pg_try_advisory_lock($1)", lock_key(name)):
                log.debug("ownership_taken", owner=name)
                yield connection
                return
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2.0):
                    await connection.close()
        await asyncio.sleep(retry_s)
