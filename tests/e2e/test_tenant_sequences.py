"""A tenant goes there and back: the ids of all the others are not used up by it."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from tenant_cloud import mover

from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fill_cloud, fresh_pair

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

VALUES = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public'"


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as made:
        await fill_cloud(made.source)
        yield made


async def fetch(url: str, query: str) -> list[Any]:
    conn = await asyncpg.connect(url)
    try:
        return await conn.fetch(query)
    finally:
        await conn.close()


async def test_there_and_back_costs_only_the_ids_that_were_given(pair: Pair) -> None:
    """A group is made on the target, so its number must not come again on the source; nothing else is."""
    await fetch(pair.source, "CREATE TABLE ticket (id smallserial PRIMARY KEY)")
    before: dict[str, int] = {r[0]: r[1] for r in await fetch(pair.source, VALUES)}
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            await moving.start()
            await moving.until("finished")
            made = "INSERT INTO device_group (customer_id, name) VALUES (2, 'new') RETURNING id"
            [[given]] = await fetch(pair.target, made)
            assert given > 1_000_000
            await moving.ask("revert")
            await moving.until("reverted")
            after = {r[0]: r[1] for r in await fetch(pair.source, VALUES)}
            assert after == {**before, "device_group_id_seq": given + 1}
            await moving.ask("resume")
            await moving.until("finished")
            await moving.ask("revert")
            await moving.until("reverted")
            assert {r[0]: r[1] for r in await fetch(pair.source, VALUES)} == after
