"""Schema migrations: in order, once, also when several start together."""

import asyncio

import asyncpg
import pytest

from fleetlift.core.errors import Conflict
from fleetlift.store.migrate import SchemaChange, changes, migrate
from fleetlift.testing import LoopThread, TestPostgres

ONE = SchemaChange(number=1, name="one", sql="CREATE TABLE one (id int); SELECT pg_sleep(0.1);")
TWO = SchemaChange(number=2, name="two", sql="CREATE TABLE two (id int);")


@pytest.fixture
def empty_database(postgres: TestPostgres, engine_loop: LoopThread) -> str:
    """A database without any table of ours."""
    return engine_loop.run(postgres.new_database(template="template1"))


async def tables(url: str) -> set[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        return {row["tablename"] for row in rows}
    finally:
        await connection.close()


async def test_the_whole_schema_applies_and_applying_again_does_nothing(empty_database: str) -> None:
    known = changes()
    assert await migrate(empty_database) == [change.number for change in known]
    assert await migrate(empty_database) == []


async def test_the_engine_schema_applies_alone(empty_database: str) -> None:
    """The migration engine may have a database of its own, without the backend's tables."""
    await migrate(empty_database, part="engine")
    assert await tables(empty_database) == {"schema_version"}
    assert await migrate(empty_database, part="engine") == []


async def test_starters_that_come_together_do_not_clash(empty_database: str) -> None:
    """Four at once: each file is applied by exactly one of them."""
    applied = await asyncio.gather(*(migrate(empty_database, known=[ONE, TWO]) for _ in range(4)))
    assert sorted(number for numbers in applied for number in numbers) == [1, 2]


async def test_a_failing_file_leaves_nothing_behind(empty_database: str) -> None:
    """Each file is one transaction; those before it stay."""
    broken = SchemaChange(number=2, name="two", sql="CREATE TABLE two (id int); SELECT 1/0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(empty_database, known=[ONE, broken])
    assert await tables(empty_database) == {"schema_version", "one"}
    assert await migrate(empty_database, known=[ONE, TWO]) == [2]


async def test_a_changed_file_is_refused(empty_database: str) -> None:
    await migrate(empty_database, known=[ONE])
    changed = SchemaChange(number=1, name="one", sql="CREATE TABLE uno (id int)")
    with pytest.raises(Conflict, match="changed after it had been applied"):
        await migrate(empty_database, known=[changed, TWO])
    assert "two" not in await tables(empty_database)


async def test_a_newer_database_is_refused(empty_database: str) -> None:
    """An old program on a new schema would write what the new one cannot read."""
    await migrate(empty_database, known=[ONE, TWO])
    with pytest.raises(Conflict, match="run the newer Fleetlift"):
        await migrate(empty_database, known=[ONE])
