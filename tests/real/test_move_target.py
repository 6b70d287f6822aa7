"""The target of a tenant's move: only what the move has made goes with it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from move_world import fill, move, run, value

from fleetlift.core.migration import Phase, RequestKind
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Pool
from fleetlift.tenant.emptying import drop_database, is_there
from tenant_world import Pair, fresh_pair

OWNERS = "SELECT string_agg(id::text, ' ') FROM owner"
SLOTS = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"


SERVER_SETTINGS = {"fsync": "off"}


@pytest.fixture
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        await fill(fresh.source)
        yield fresh


async def test_a_database_that_another_move_has_made_is_left_alone(
    pool: Pool, pair: Pair, tmp_path: Path
) -> None:
    """Two moves name the same database: the second is held, and taken back without touching the first's."""
    await drop_database(pair.target)
    async with (
        move(pool, tmp_path, pair.source, pair.target, create=True) as one,
        move(pool, tmp_path, pair.source, pair.target, name="two", owner=2, create=True) as two,
    ):
        await one.start()
        await one.until_phase(Phase.FINISHED)
        await two.start()
        held = await two.until_phase(Phase.HELD)
        assert "prepared by the move 'one'" in held.reason
        assert await value(pair.source, SLOTS) == 0, "it has begun nothing"
        await two.ask(RequestKind.REVERT)
        await two.until_phase(Phase.REVERTED)
        assert await value(pair.target, OWNERS) == "1"
        await one.ask(RequestKind.REVERT)
        await one.until_phase(Phase.REVERTED)
        assert not await is_there(pair.target)
        await two.ask(RequestKind.RESUME)
        await two.until_phase(Phase.FINISHED)
        assert await value(pair.target, OWNERS) == "2"
        await two.ask(RequestKind.REVERT)
        await two.until_phase(Phase.REVERTED)


async def test_a_database_that_was_there_is_emptied_and_not_dropped(
    pool: Pool, pair: Pair, tmp_path: Path
) -> None:
    async with move(pool, tmp_path, pair.source, pair.target, create=True) as one:
        await one.start()
        await one.until_phase(Phase.FINISHED)
        await one.ask(RequestKind.REVERT)
        await one.until_phase(Phase.REVERTED)
        assert await value(pair.target, "SELECT to_regclass('owner') IS NULL")
        await run(pair.target, "CREATE TABLE anything (id int)")
