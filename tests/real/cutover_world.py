"""What tests of the fence and the cutover share: the small cloud's rules, for its second customer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec

from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.derive import closure_of
from fleetlift.tenant.introspect import read_schema
from tenant_world import CLOUD_RULES


async def cloud_closure(url: str, customer: int = 2) -> Closure:
    """The rules of one customer of `fill_cloud`'s database."""
    conn = await asyncpg.connect(url)
    try:
        schema = await read_schema(conn)
    finally:
        await conn.close()
    root = msgspec.structs.replace(CLOUD_RULES.root, value=str(customer))
    return closure_of(schema, msgspec.structs.replace(CLOUD_RULES, root=root))


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = 30.0) -> None:
    """Wait for a condition; fail when it does not come true in time."""
    async with asyncio.timeout(within_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.005)
