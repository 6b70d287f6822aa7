"""A tenant's database moves while everybody writes: nothing lost, nothing foreign, and the way back."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio
from tenant_cloud import Writers, foreign_rows, leftovers_in, mover

from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.emptying import drop_database, is_there
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fill_cloud, fresh_pair, running_postgres

pytestmark = pytest.mark.timeout(300)

NOTHING_LOST = {"values": 0, "points": 0, "strange": 0}


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as made:
        await fill_cloud(made.source)
        yield made


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_moves_with_all_its_writes_and_is_released(pair: Pair) -> None:
    """Copied, followed, verified, switched and released, with writers on all of it."""
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            status = await moving.until("finished")
            await asyncio.sleep(0.3)  # writers go on at the new place
            await writers.write(20)
            await writers.finish()
            figures = {k: v for step in status["steps"] for k, v in step["figures"].items()}
            assert await writers.account(pair.target) == NOTHING_LOST
            assert await foreign_rows(pair.target) == 0
            assert figures["rows_missing"] == figures["rows_foreign"] == figures["rows_differing"] == 0
            assert figures["freeze_s"] < 5.0
            assert writers.others > 0
            await moving.ask("release")
            await moving.until_cleaned()
            assert await leftovers_in(pair.source) + await leftovers_in(pair.target) == []


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_goes_back_with_what_was_written_on_the_target(pair: Pair) -> None:
    """After the switch writers write on the target; a revert brings all of it to the source."""
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            await moving.until("finished")
            target = await asyncpg.connect(pair.target)
            await target.execute("UPDATE currency SET name = 'only there'")
            await target.close()
            await writers.write(50)
            await moving.ask("revert")
            status = await moving.until("reverted")
            assert "were not carried: 3 of public.currency" in status["steps"][3]["text"]
            await asyncio.sleep(0.3)
            await writers.finish()
            assert await writers.account(pair.source) == NOTHING_LOST
            assert await leftovers_in(pair.source) == []
            assert await leftovers_in(pair.target) == []


RELEASE_STEPS = ("target-released", "source-released", "all-released")
COPY_STEPS = ("slot-made", "schema-made", "rows-copied", "schema-finished", "caught-up")
RELEASE_STEPS = ("target-released", "source-released", "all-released")
COPY_STEPS = ("slot-made", "schema-made", "rows-copied", "schema-finished", "caught-up")
SWITCH_STEPS = (
    *("caches-warmed", "freeze-installed", "fence-installed", "armed", "sealed", "opened"),
    *RELEASE_STEPS,
)
BACK_STEPS = (
    *("back-verified", "back-armed", "back-position-reached", "back-sealed", "back-opened"),
    *("thawed", "fence-removed", "source-cleaned", "target-gone"),
)
DROP_STEPS = ("source-cleaned", "target-gone")


@pytest.mark.parametrize("steps", [COPY_STEPS, SWITCH_STEPS], ids=["copy", "switch"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_mover_killed_at_named_steps_comes_through(pair: Pair, steps: tuple[str, ...]) -> None:
    """SIGKILL at each step, once each: it goes on, and nothing is lost. `test_cutover.py` has every step."""
    with scratch_directory() as directory:
        kill_at = ",".join(steps)
        async with mover(directory / "data", pair.source, pair.target, kill_at=kill_at) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            while (await moving.until("finished", "held", within_s=200))["phase"] == "held":
                await moving.ask("resume")  # a bound was hit while it was dead: the source served on
            await writers.write(20)
            await writers.finish()
            assert await writers.account(pair.target) == NOTHING_LOST
            assert await foreign_rows(pair.target) == 0
            await moving.ask("release")
            await moving.until_cleaned()
            killed = (directory / "data" / "mover-killed-at").read_text().split()
            assert sorted(killed) == sorted(steps)
            assert await leftovers_in(pair.source) + await leftovers_in(pair.target) == []


@pytest.mark.parametrize(
    ("steps", "create"), [(BACK_STEPS, False), (DROP_STEPS, True)], ids=["emptied", "dropped"]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_mover_killed_on_the_way_back_comes_back(
    pair: Pair, steps: tuple[str, ...], create: bool
) -> None:
    """Also when the move has made the database, which is gone when its last step is taken back once more.
    What has gone back can be released as well."""
    if create:
        await drop_database(pair.target)
    with scratch_directory() as directory:
        kill_at = ",".join(steps)
        async with mover(
            directory / "data", pair.source, pair.target, kill_at=kill_at, create=create
        ) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            await moving.until("finished")
            await writers.write(50)
            await moving.ask("revert")
            while (await moving.until("reverted", "held", within_s=200))["phase"] == "held":
                await moving.ask("resume")
            await writers.write(20)
            await writers.finish()
            killed = (directory / "data" / "mover-killed-at").read_text().split()
            assert sorted(killed) == sorted(steps)
            assert await writers.account(pair.source) == NOTHING_LOST
            assert await leftovers_in(pair.source) == []
            assert await is_there(pair.target) is not create
            await moving.ask("release")
            await moving.until_cleaned()


@pytest.mark.asyncio(loop_scope="module")
async def test_either_database_may_be_killed_at_any_time() -> None:
    """Source and target, each on a server of its own that keeps what it commits, die in turn."""
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(scratch_directory())
        server, other = [
            await stack.enter_async_context(running_postgres(directory / name, throwaway=False))
            for name in ("cloud", "dedicated")
        ]
        pair = await stack.enter_async_context(fresh_pair(server, other))
        await fill_cloud(pair.source, values=300)
        moving = await stack.enter_async_context(mover(directory / "data", pair.source, pair.target))
        writers = Writers(pair.source, pair.target)
        await writers.start()
        await moving.start()
        for number, victim in enumerate((server, other, server)):
            await asyncio.sleep(0.7 * number)
            kill(victim)
            await answering(victim)
        while (await moving.until("finished", "held"))["phase"] == "held":
            await moving.ask("resume")
        kill(other)
        await answering(other)
        await writers.write(20)
        await writers.finish()
        assert await writers.account(pair.target) == NOTHING_LOST
        assert await foreign_rows(pair.target) == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_rows_that_are_wrong_on_the_target_are_told_and_repaired(pair: Pair) -> None:
    """While the move is paused and followed: dropped, foreign and stale rows are found by key and mended."""
    with scratch_directory() as directory:
        async with mover(directory / "data", pair.source, pair.target) as moving:
            writers = Writers(pair.source, pair.target)
            await writers.start()
            await moving.start()
            await moving.until_step(0, "done")
            await moving.ask("pause")
            target = await asyncpg.connect(pair.target)
            await target.execute("SET session_replication_role = replica")
            await target.execute("DELETE FROM alarm WHERE number = 2")
            await target.execute("UPDATE users SET email = 'stale@x' WHERE id = (SELECT min(id) FROM users)")
            await target.execute("INSERT INTO device_group VALUES (999, 3, 'foreign')")
            await target.close()
            status, said = await moving.run("tenant", "verify")
            assert status == 1
            assert "public.alarm" in said
            assert "public.device_group (999)" in said
            assert "public.users" in said
            status, said = await moving.run("tenant", "repair", "--yes")
            assert status == 0, said
            await moving.ask("resume")
            await moving.until("finished")
            await writers.write(20)
            await writers.finish()
            assert await writers.account(pair.target) == NOTHING_LOST
            assert await foreign_rows(pair.target) == 0


def kill(server: EmbeddedPostgres) -> None:
    """SIGKILL the postmaster; its supervisor starts it again."""
    assert server.child is not None and server.child.pid is not None
    os.kill(server.child.pid, signal.SIGKILL)


async def answering(server: EmbeddedPostgres) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                conn = await asyncpg.connect(server.url, timeout=2.0)
            except (OSError, TimeoutError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)
            else:
                await conn.close()
                return
