"""A deploy changes the source's schema while one of its tenants moves: nothing of the tenant stays behind."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncpg
import pytest
import pytest_asyncio
from tenant_cloud import PLAN, Writers, foreign_rows, leftovers_in, mover, without_password

from fleetlift.config import Settings
from fleetlift.core.tenant.move import MoveState
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.mover.move import Move
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Pool
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fill_cloud, fresh_pair

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

NOTE = "CREATE TABLE device_note (id bigserial PRIMARY KEY, device_id bigint REFERENCES device, note text)"
NOTES = "INSERT INTO device_note (device_id, note) SELECT id, 'n' FROM device WHERE customer_id = 2"


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as made:
        await fill_cloud(made.source)
        yield made


async def run(url: str, *statements: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


async def test_a_table_that_is_made_meanwhile_holds_the_move_before_anything_is_fenced(pair: Pair) -> None:
    """With rows of the tenant in it, which nobody has copied. Taken back, the move goes on; reverted, the
    copy begins anew and brings it."""
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            await moving.until_step(0, "done")
            await moving.ask("pause")
            await run(pair.source, NOTE, NOTES)
            await moving.ask("resume")
            status = await moving.until("held")
            assert "public.device_note is a new table" in status["reason"]
            assert "drop the new table" in status["reason"]
            assert status["steps"][3]["phase"] != "done"
            await moving.ask("resume")
            assert "device_note" in (await moving.until("held"))["reason"]
            await writers.write(10)
            await moving.ask("revert")
            await moving.until("reverted")
            assert await leftovers_in(pair.source) == []
            await moving.ask("resume")
            await moving.until("finished")
            await writers.write(10)
            await writers.finish()
            assert await writers.account(pair.target) == {"values": 0, "points": 0, "strange": 0}
            assert await foreign_rows(pair.target) == 0
            conn = await asyncpg.connect(pair.target)
            assert await conn.fetchval("SELECT count(*) FROM device_note") == 8
            await conn.close()


async def test_a_change_that_is_taken_back_lets_the_move_go_on(pair: Pair) -> None:
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            await moving.start()
            await moving.until_step(0, "done")
            await moving.ask("pause")
            await run(pair.source, "CREATE TABLE theirs (id int PRIMARY KEY)", NOTE)
            await moving.ask("resume")
            await moving.until("held")
            await run(pair.source, "DROP TABLE device_note")
            await moving.ask("resume")
            await moving.until("finished")


async def test_a_mover_that_starts_again_goes_by_the_schema_of_the_copy(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was deployed while it was away; forgotten, it goes by what is there."""
    url, password = without_password(pair.source)
    monkeypatch.setenv("SOURCE_PASSWORD", password)

    def made() -> Move:
        plan = parse_tenant_plan(PLAN.format(source=url, target=without_password(pair.target)[0]))
        return Move(
            plan,
            settings=cast(Settings, SimpleNamespace(path=tmp_path)),
            backend=cast(Pool, None),
            files={},
            state=lambda: MoveState(name=plan.name),
            save=cast(Any, None),
            kill=lambda _: None,
        )

    copied = await made().closure()
    assert await made().source_changed() == ""
    await run(pair.source, NOTE)
    again = made()
    assert await again.closure() == copied
    assert "device_note" in await again.source_changed()
    again.forget_closure()
    assert "public.device_note" in (await again.closure()).order
    assert await again.source_changed() == ""
    await run(pair.source, "ALTER TABLE audit_log DROP COLUMN customer_id")
    assert "customer_id" in await again.source_changed(), "the plan's own rules do not fit any more"
