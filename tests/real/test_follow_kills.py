"""Killed anywhere, with either database restarted under it, a follower goes on where it was."""

import asyncio
import os
import pickle
import random
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from follow_world import CLOUD_RULES, World, rules, until, world

from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.testing import scratch_directory
from tenant_world import CLOUD_SQL, Pair, fill_cloud, fresh_pair, running_postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHILD = Path(__file__).with_name("follow_child.py")

DDL = """
CREATE TABLE owner (id int PRIMARY KEY);
CREATE TABLE item (id int PRIMARY KEY, owner_id int NOT NULL REFERENCES owner, n int NOT NULL DEFAULT 0);
CREATE TABLE event (item_id int REFERENCES item ON DELETE CASCADE, body text);
"""
ROWS = """
INSERT INTO owner VALUES (1), (2);
INSERT INTO item SELECT n, 1 + n % 2 FROM generate_series(1, 20) n;
"""
RULES = rules("public.owner.id", "1", full_identity=("public.event",))


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        yield fresh


async def _child(w: World, point: str, nth: int, *, applying: bool) -> asyncio.subprocess.Process:
    file = w.directory / "child.pickle"
    file.write_bytes(pickle.dumps((w.pair.source, w.pair.target, w.closure, w.directory, applying)))
    return await asyncio.create_subprocess_exec(sys.executable, str(CHILD), str(file), point, str(nth))


async def _write(w: World, rng: random.Random) -> None:
    """A transaction whose parts do not show twice: rows without a key, and counts."""
    item = rng.randint(1, 20)
    async with w.source.transaction():
        await w.source.execute("INSERT INTO event VALUES ($1, 'more')", item)
        await w.source.execute(
            "UPDATE item SET n = n + 1, owner_id = $2 WHERE id = $1", item, rng.choice((1, 1, 2))
        )


POINTS = ["before identity", "before publication", "before slot", "after slot"]
APPLYING = ["before rows", "after rows", "before commit", "after commit"]


@pytest.mark.parametrize("point", POINTS)
async def test_killed_while_preparing(pair: Pair, tmp_path: Path, point: str) -> None:
    """Preparing again makes what is missing, and never two of anything; dropping leaves nothing."""
    async with world(pair, tmp_path, RULES, ddl=DDL, rows=ROWS) as w:
        child = await _child(w, point, 1, applying=False)
        assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
        await w.source.execute("INSERT INTO event VALUES (2, 'between')")
        await w.copy(await w.prepare())
        w.run()
        w.follower.start_applying()
        await w.source.execute("INSERT INTO event VALUES (2, 'after')")
        await w.same()
        await w.stop()
        await w.follower.drop()
        assert (
            await w.source.fetchval("SELECT relreplident::text FROM pg_class WHERE relname = 'event'") == "d"
        )
        assert not await w.source.fetch("SELECT 1 FROM pg_publication")
        assert not await w.source.fetch(
            "SELECT 1 FROM pg_replication_slots WHERE database = current_database()"
        )


async def test_killed_again_and_again_while_applying(pair: Pair, tmp_path: Path) -> None:
    """At each named point, early and late: nothing is missing and nothing is there twice."""
    rng = random.Random(1)
    async with world(pair, tmp_path, RULES, ddl=DDL, rows=ROWS) as w:
        await w.copy(await w.prepare())
        for point in APPLYING:
            for nth in (1, 4):
                child = await _child(w, point, nth, applying=True)
                while child.returncode is None:
                    await _write(w, rng)
                    await asyncio.sleep(0.02)
                assert child.returncode == -signal.SIGKILL
        w.new_follower()
        w.run()
        w.follower.start_applying()
        await w.same()


async def test_killed_while_spooling(pair: Pair, tmp_path: Path) -> None:
    """At any moment, also in the middle of a transaction or a write: what was confirmed is in the spool."""
    rng = random.Random(2)
    async with world(pair, tmp_path, RULES, ddl=DDL, rows=ROWS) as w:
        await w.copy(await w.prepare())
        for n in range(3):
            child = await _child(w, "never", 1, applying=False)
            for _ in range(30):
                await _write(w, rng)
            await w.source.execute("INSERT INTO event SELECT 2, 'many' FROM generate_series(1, 20000)")
            await until(lambda: bool(list(tmp_path.rglob("*.seg"))))
            await asyncio.sleep(0.1 + 0.2 * n)
            os.kill(child.pid, signal.SIGKILL)
            await child.wait()
            newest = sorted(tmp_path.rglob("*.seg"))[-1]
            with newest.open("ab") as file:
                file.write(b"\0\0\1\0torn")
        w.new_follower()
        w.run()
        await _write(w, rng)
        w.follower.start_applying()
        await w.same()


async def test_either_database_is_killed_and_comes_back(tmp_path: Path) -> None:
    """The follower says so, connects again by itself and loses nothing."""
    with scratch_directory() as directory:
        async with (
            running_postgres(directory / "a", throwaway=False) as a,
            running_postgres(directory / "b", throwaway=False) as b,
            fresh_pair(a, b) as pair,
        ):
            source = await asyncpg.connect(pair.source)
            await source.execute(DDL)
            await source.execute(ROWS)
            await source.close()
            async with world(pair, tmp_path, RULES, ddl=DDL) as w:
                await w.copy(await w.prepare())
                w.run()
                w.follower.start_applying()
                await w.settled()
                for server in (a, b):
                    before = w.follower.progress.reconnects
                    writer = asyncio.create_task(_keep_writing(pair.source, 150))
                    await asyncio.sleep(0.2)
                    os.kill(_postmaster(server), signal.SIGKILL)
                    await until(partial(_reconnected, w, before))
                    await writer
                    w.source = await _connected(pair.source)
                    w.target = await _connected(pair.target)
                    await w.same()
                    await until(lambda: w.follower.caught_up)


def _reconnected(w: World, before: int) -> bool:
    return w.follower.progress.reconnects > before


def _postmaster(server: EmbeddedPostgres) -> int:
    return int((server.directory / "data" / "postmaster.pid").read_text().split()[0])


async def _connected(url: str) -> "asyncpg.Connection[asyncpg.Record]":
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncpg.connect(url)
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)


async def _keep_writing(url: str, count: int) -> None:
    conn = await _connected(url)
    for n in range(count):
        try:
            async with conn.transaction():
                await conn.execute("INSERT INTO event VALUES ($1, 'kept')", 1 + n % 20)
                await conn.execute("UPDATE item SET n = n + 1 WHERE id = $1", 1 + n % 20)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            conn = await _connected(url)
        await asyncio.sleep(0.005)
    await conn.close()


async def test_a_cloud_at_work_with_a_follower_that_dies(pair: Pair, tmp_path: Path) -> None:
    """Writers, long transactions, one open from before the start, kills: at rest the target is the tenant."""
    await fill_cloud(pair.source)
    async with world(pair, tmp_path, CLOUD_RULES, ddl=CLOUD_SQL) as w:
        await w.copy(await w.prepare())
        late = await asyncpg.connect(pair.source)
        held = late.transaction()
        await held.start()
        await late.execute(
            "UPDATE device SET name = name || ' held' WHERE customer_id IN (2, 3) AND id % 3 = 0"
        )
        stop = asyncio.Event()
        writers = [asyncio.create_task(_cloud_writer(pair.source, random.Random(n), stop)) for n in range(3)]
        for point, nth in (("before commit", 3), ("after rows", 5), ("after commit", 4)):
            child = await _child(w, point, nth, applying=True)
            assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
        await late.execute("UPDATE device SET customer_id = 2 WHERE customer_id = 4 AND id % 2 = 0")
        await held.commit()
        await late.close()
        w.new_follower()
        w.run()
        w.follower.start_applying()
        await asyncio.sleep(1.0)
        stop.set()
        await asyncio.gather(*writers)
        await w.same()
        assert w.follower.progress.transactions > 50


async def _cloud_writer(url: str, rng: random.Random, stop: asyncio.Event) -> None:
    conn = await asyncpg.connect(url, server_settings={"lock_timeout": "20ms"})
    try:
        while not stop.is_set():
            try:
                async with conn.transaction():
                    for _ in range(rng.choice((1, 2, 4))):
                        try:
                            async with conn.transaction():
                                await conn.execute(_cloud_statement(rng))
                        except asyncpg.PostgresError:
                            pass
                    if rng.random() < 0.1:
                        raise asyncpg.DivisionByZeroError
            except asyncpg.PostgresError:
                pass
            await asyncio.sleep(0.002)
    finally:
        await conn.close()


def _cloud_statement(rng: random.Random) -> str:
    tenant, other = rng.randint(1, 4), rng.choice((2, 2, 3))
    device = f"(SELECT id FROM device ORDER BY md5(id::text || '{rng.random()}') LIMIT 1)"
    asset = (
        f"(SELECT id FROM asset WHERE customer_id = {tenant} "
        f"ORDER BY md5(id::text || '{rng.random()}') LIMIT 1)"
    )
    word = f"{rng.getrandbits(24):x}"
    return rng.choice(
        [
            f"INSERT INTO device (customer_id, name, profile_id) VALUES ({tenant}, '{word}', "
            f"{rng.randint(1, 3)})",
            f"UPDATE device SET customer_id = {other}, asset_id = NULL WHERE id = {device}",
            f'UPDATE device SET attributes = attributes || \'{{"w": "{word}"}}\' WHERE id = {device}',
            f"UPDATE device SET asset_id = {asset} WHERE id = {device} AND customer_id = {tenant}",
            f"DELETE FROM alarm WHERE device_id = {device}",
            f"INSERT INTO alarm VALUES ({device}, {rng.randint(3, 9)}, 'low', NULL, '{word}') ON "
            "CONFLICT DO NOTHING",
            f"UPDATE alarm SET number = number + 20 WHERE device_id = {device} AND number < 3",
            f"INSERT INTO alarm_comment (device_id, number, body) SELECT device_id, number, '{word}' "
            "FROM alarm "
            f"WHERE device_id = {device} LIMIT 1",
            f"INSERT INTO ts_kv SELECT 'DEVICE', {device}::text, '{word}', n, n FROM generate_series(1, 5) n",
            f"UPDATE ts_kv SET num = num + 1 WHERE entity_id = {device}::text",
            f"DELETE FROM ts_kv WHERE entity_id = {device}::text AND ts % 3 = 0",
            f"INSERT INTO asset (customer_id, name) VALUES ({tenant}, '{word}')",
            f"UPDATE asset SET parent_id = {asset} WHERE id = {asset}",
            f"UPDATE asset SET customer_id = {other} WHERE id = {asset} AND parent_id IS NULL",
            f"INSERT INTO users (customer_id, email) VALUES ({tenant}, '{word}@x')",
            f"UPDATE users SET email = '{word}@y', customer_id = {other} WHERE customer_id = {tenant} "
            "AND id % 5 = 0",
            f"INSERT INTO group_device SELECT id, {device} FROM device_group WHERE customer_id = {tenant}",
            f"DELETE FROM group_device WHERE device_id = {device}",
            f"INSERT INTO audit_log (customer_id, at, action) VALUES ({tenant}, now() - interval "
            f"'{rng.randint(0, 700)} days', '{word}')",
            f"UPDATE audit_log SET at = at - interval '300 days' WHERE customer_id = {tenant} AND id % 7 = 0",
            f"INSERT INTO event_tag VALUES ({device}, '{word}')",
            f"UPDATE event_tag SET tag = '{word}' WHERE device_id = {device}",
            f"DELETE FROM event_tag WHERE device_id = {device}",
            f"UPDATE device_profile SET name = '{word}' WHERE id = {rng.randint(1, 4)}",
            f"UPDATE customers SET country_id = {rng.randint(1, 3)} WHERE id = {tenant}",
            f"UPDATE currency SET name = '{word}' WHERE code = 'EUR'",
        ]
    )
