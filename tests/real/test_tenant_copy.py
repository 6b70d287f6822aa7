"""A tenant's rows are copied: all of them, nobody else's, once, whatever is killed meanwhile."""

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg2
import psycopg2.extensions
import pytest
import pytest_asyncio
from small_disk import mounted, space_on, unmounted

from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.tenant.chunks import Chunk, CopyProgress
from fleetlift.core.tenant.closure import Closure, Policy, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.throttle import Throttle
from fleetlift.store.embedded import EmbeddedPostgres, installed_binaries
from fleetlift.supervise import run_once
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.ddl import create_schema
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.warm import warm
from fleetlift.testing import scratch_directory
from tenant_world import CLOUD_RULES, LOGICAL, Pair, fill_cloud, fresh_pair, running_postgres

one_loop = pytest.mark.asyncio(loop_scope="module")

# What tenant 2 has, said again without the closure: every name and note tells whose it is.
EXPECTED = {
    "customers": "id = 2",
    "users": "customer_id = 2",
    "asset": "customer_id = 2",
    "device": "customer_id = 2",
    "device_group": "customer_id = 2",
    "group_device": "group_id IN (SELECT id FROM device_group WHERE customer_id = 2)",
    "alarm": "note LIKE 'tenant-2-%'",
    "alarm_comment": "body LIKE 'about tenant-2-%'",
    "ts_kv": "entity_id IN (SELECT id::text FROM device WHERE customer_id = 2) "
    "OR entity_id IN (SELECT id::text FROM asset WHERE customer_id = 2)",
    "audit_log": "customer_id = 2",
    "event_tag": "device_id IN (SELECT id FROM device WHERE customer_id = 2)",
    "currency": "true",
    "country": "id = 3",
    "device_profile": "id <> 4",
}


class Crash(BaseException):
    """The copier is gone from one moment to the next."""


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        await fill_cloud(fresh.source)
        yield fresh


async def sql(url: str, text: str) -> list[tuple[Any, ...]]:
    conn = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await conn.fetch(text)]
    finally:
        await conn.close()


async def closure(url: str, rules: Rules = CLOUD_RULES) -> Closure:
    conn = await asyncpg.connect(url)
    try:
        return closure_of(await read_schema(conn), rules)
    finally:
        await conn.close()


async def prepared(pair: Pair, rules: Rules = CLOUD_RULES) -> Closure:
    found = await closure(pair.source, rules)
    await create_schema(pair.source, pair.target, found, move="acme")
    return found


async def assert_same(pair: Pair) -> None:
    """The target has the tenant's rows as they are on the source, each once, and no other."""
    for table, where in EXPECTED.items():
        there = await sql(pair.source, f"SELECT t::text FROM {table} t WHERE {where} ORDER BY 1")
        here = await sql(pair.target, f"SELECT t::text FROM {table} t ORDER BY 1")
        assert here == there, table


async def sessions(url: str) -> int:
    rows = await sql(url, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fleetlift copy'")
    return int(rows[0][0])


@one_loop
async def test_the_tenant_s_rows_come_and_no_others(pair: Pair) -> None:
    """Every table of the cloud, by polymorphic and composite references, with a generated column, partitions,
    a table without a key and one that comes whole; progress adds up to what is there."""
    rules = await prepared(pair)
    told: list[CopyProgress] = []
    result = await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=7).run(told.append)
    await assert_same(pair)
    assert result.rows == sum(table.rows for table in result.tables.values()) == told[-1].rows
    assert told[-1].rows_total == told[-1].rows and told[-1].phase == "done" and told[-1].left_s == 0.0
    assert told[-1].bytes == result.bytes > 0
    assert result.tables["public.ts_kv"].chunks == 172 // 7 + 1
    again = await Copier(pair.source, pair.target, rules, move="acme").run()
    assert again.rows == result.rows
    await assert_same(pair)


@one_loop
async def test_a_chunk_of_a_junction_reads_only_its_own_rows(pair: Pair) -> None:
    """A row that is the tenant's by either of two references is looked for within the chunk's bounds."""
    conn = await asyncpg.connect(pair.source)
    await conn.execute(
        "CREATE TABLE link (id int PRIMARY KEY, device_id bigint REFERENCES device, asset_id uuid "
        "REFERENCES asset); INSERT INTO link SELECT n, CASE WHEN n % 3 > 0 THEN (SELECT min(id) FROM device "
        "WHERE customer_id = 2) END, CASE WHEN n % 3 = 0 THEN (SELECT id FROM asset WHERE customer_id = 2 "
        "ORDER BY id LIMIT 1) END FROM generate_series(1, 9000) n; ANALYZE link"
    )
    rules = await prepared(pair)
    copier = Copier(pair.source, pair.target, rules, move="acme", chunk_rows=300)
    result = await copier.run()
    assert (result.tables["public.link"].rows, result.tables["public.link"].chunks) == (9000, 30)
    assert await sql(pair.target, "SELECT count(*), count(DISTINCT id) FROM link") == [(9000, 9000)]
    chunk = Chunk(table="public.link", part="owned", number=3, lower=("900",), upper=("1200",))
    plan = await conn.fetch("EXPLAIN (ANALYZE, TIMING off) " + copier.query_parts(chunk)[1])
    await conn.close()
    read = [
        int(row[0].split("rows=")[2].split()[0].partition(".")[0]) for row in plan if " on link" in row[0]
    ]
    assert len(read) >= 2 and max(read) <= 300


@one_loop
async def test_a_tenant_without_rows_and_tables_without_rows(pair: Pair) -> None:
    """Nothing to copy is no failure: what is shared by all is there, all else is empty."""
    rules = await prepared(pair, Rules(root=Root(table="public.customers", column="id", value="99")))
    result = await Copier(pair.source, pair.target, rules, move="acme").run()
    assert result.rows == 0
    assert await sql(pair.target, "SELECT count(*) FROM device") == [(0,)]


@one_loop
async def test_a_crash_at_any_step_copies_every_chunk_once(pair: Pair) -> None:
    """Each run dies some steps after it began, each one step later; the next goes on where it was."""
    rules = await prepared(pair)
    steps: set[str] = set()
    for number, kind in enumerate(itertools.chain(["split"], itertools.cycle(["begin", "rows", "commit"]))):
        heard = 0

        def crash(step: str, kind: str = kind, after: int = 2 + 2 * number) -> None:
            nonlocal heard
            heard += 1
            if heard >= after and kind in step:
                steps.add(kind)
                raise Crash

        copier = Copier(pair.source, pair.target, rules, move="acme", chunk_rows=25, on_step=crash)
        try:
            await copier.run()
        except BaseExceptionGroup as problems:
            assert problems.subgroup(Crash) is not None
            continue
        break
    assert steps >= {"split", "begin", "rows", "commit"}
    await assert_same(pair)
    undone = await sql(pair.target, "SELECT count(*) FROM fleetlift_move.chunk WHERE done_at IS NULL")
    assert undone == [(0,)]


@one_loop
async def test_backends_killed_at_any_step_are_replaced(pair: Pair) -> None:
    """The servers end our sessions again and again: the copy goes on by itself, and no row comes twice."""
    rules = await prepared(pair)
    heard = 0

    def kill(step: str) -> None:
        nonlocal heard
        heard += 1
        if heard % 7 == 0 and heard < 50:
            with contextlib.closing(psycopg2.connect(pair.target)) as conn, conn.cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'fleetlift copy' AND datname = ANY (%s)",
                    ([name] if (name := _database(heard, pair)) else [],),
                )

    result = await Copier(
        pair.source, pair.target, rules, move="acme", chunk_rows=25, on_step=kill, snapshot=None
    ).run()
    assert result.retried > 0
    await assert_same(pair)


def _database(number: int, pair: Pair) -> str:
    """Now the source's sessions, now the target's."""
    url: str = (pair.source, pair.target)[number % 2]
    return url.partition("@/")[2].partition("?")[0]


@one_loop
async def test_a_killed_process_goes_on_where_it_was(pair: Pair, tmp_path: Path) -> None:
    """kill -9 of the whole mover, while rows are under way."""
    rules = await prepared(pair)
    code = (
        "import asyncio, pickle, sys\n"
        "from fleetlift.core.tenant.throttle import Throttle\n"
        "from fleetlift.tenant.copy import Copier\n"
        "closure = pickle.load(open(sys.argv[1], 'rb'))\n"
        "def told(step):\n    print(step, flush=True)\n"
        "asyncio.run(Copier(*sys.argv[2:4], closure, move='acme', chunk_rows=10, on_step=told,\n"
        "                   throttle=Throttle(rows_s_max=300)).run())\n"
    )
    file = tmp_path / "closure"
    file.write_bytes(pickle.dumps(rules))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(file), pair.source, pair.target, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    seen = 0
    while seen < 12:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, "the copier has ended by itself"
        seen += b"rows" in line
    process.send_signal(signal.SIGKILL)
    await process.wait()
    done = await sql(pair.target, "SELECT count(*) FROM fleetlift_move.chunk WHERE done_at IS NOT NULL")
    assert done[0][0] > 3
    await Copier(pair.source, pair.target, rules, move="acme").run()
    await assert_same(pair)


@one_loop
async def test_a_cancelled_copy_leaves_no_session_and_goes_on(pair: Pair) -> None:
    """Cancelling leaves what is done, and nothing that still reads or writes."""
    rules = await prepared(pair)
    running: asyncio.Task[object]

    def stop(step: str) -> None:
        if step.startswith("chunk public.ts_kv") and step.endswith(": rows"):
            running.cancel()

    copier = Copier(pair.source, pair.target, rules, move="acme", chunk_rows=10, on_step=stop)
    running = asyncio.create_task(copier.run())
    with pytest.raises(asyncio.CancelledError):
        await running
    async with asyncio.timeout(20):
        while await sessions(pair.source):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=10).run()
    await assert_same(pair)


@one_loop
async def test_the_given_snapshot_is_read_and_a_fresh_one_where_it_is_gone(pair: Pair) -> None:
    """All chunks show one moment; after a restart the rest shows a later one, and how far the stream must
    have been applied for it is kept before any row of it is copied."""
    rules = await prepared(pair)
    exporter = await asyncpg.connect(pair.source)
    await exporter.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    snapshot = await exporter.fetchval("SELECT pg_export_snapshot()")
    conn = await asyncpg.connect(pair.source)
    await conn.execute("UPDATE device SET name = name || '-later'")
    chunks = 0

    def stop(step: str) -> None:
        nonlocal chunks
        chunks += "chunk public.ts_kv" in step and step.endswith("begin")
        if chunks == 3:
            raise Crash

    with pytest.raises(BaseExceptionGroup):
        await Copier(
            pair.source, pair.target, rules, move="acme", chunk_rows=20, snapshot=snapshot, on_step=stop
        ).run()
    assert await sql(pair.target, "SELECT fresh_until FROM fleetlift_move.copied") == [(None,)]
    assert await sql(pair.target, "SELECT count(*) FROM device WHERE name LIKE '%later'") == [(0,)]
    await exporter.close()
    await conn.execute("UPDATE ts_kv SET num = -1 WHERE ts = 20")
    lsn = await conn.fetchval("SELECT pg_current_wal_lsn()::text")
    await _execute(
        pair.target,
        "CREATE TABLE fleetlift_move.position (slot text PRIMARY KEY, fresh_until pg_lsn);"
        "INSERT INTO fleetlift_move.position VALUES ('fleetlift_acme', '0/0')",
    )
    result = await Copier(
        pair.source, pair.target, rules, move="acme", chunk_rows=20, snapshot=snapshot
    ).run()
    noted = await sql(pair.target, "SELECT fresh_until::text FROM fleetlift_move.position")
    assert noted == [(result.fresh_until_lsn,)] and result.fresh_until > 0
    assert await conn.fetchval("SELECT $1::text::pg_lsn >= $2::text::pg_lsn", result.fresh_until_lsn, lsn)
    await conn.close()
    counts = "SELECT count(*) > 0 FROM ts_kv WHERE num = -1"
    assert await sql(pair.target, counts) == [(True,)]  # of the chunks that were read later


@one_loop
async def test_rows_of_others_that_are_referred_to_are_told_apart(pair: Pair) -> None:
    """A parent customer comes along as a shared row of a table that also has rows of the tenant's own."""
    await sql(pair.source, "UPDATE customers SET parent_id = 4 WHERE id = 2")
    rules = await prepared(
        pair,
        Rules(
            root=CLOUD_RULES.root,
            references=CLOUD_RULES.references,
            whole=CLOUD_RULES.whole,
            policies={("public.customers", ("parent_id",)): Policy.COPY},
            full_identity=CLOUD_RULES.full_identity,
        ),
    )
    await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=5).run()
    assert await sql(pair.target, "SELECT id FROM customers ORDER BY 1") == [(2,), (4,)]
    assert await sql(pair.target, "SELECT table_name, key FROM fleetlift_move.shared_row") == [
        ("public.customers", ["4"])
    ]


@one_loop
async def test_a_row_that_is_there_already_is_not_in_the_way(pair: Pair) -> None:
    """An older snapshot may have brought it by another chunk: either version will do."""
    rules = await prepared(pair)
    conn = await asyncpg.connect(pair.target)
    await conn.execute("SET session_replication_role = replica")
    await conn.execute(
        "INSERT INTO device (id, customer_id, name) SELECT n, 2, 'older' FROM generate_series(1, 40) n"
    )
    await conn.close()
    await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=3).run()
    assert await sql(pair.target, "SELECT count(*) FROM device") == [(40,)]


@one_loop
async def test_a_row_that_the_target_refuses_stops_the_copy_with_its_reason(pair: Pair) -> None:
    """It names the table and the row; once that is repaired the copy goes on."""
    rules = await prepared(pair)
    await sql(pair.target, "ALTER TABLE alarm ADD CONSTRAINT calm CHECK (number < 2)")
    with pytest.raises(Conflict, match=r"copying public\..*refuses a row.*\"calm\".*What is copied is kept"):
        await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=5).run()
    await sql(pair.target, "ALTER TABLE alarm DROP CONSTRAINT calm")
    await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=5).run()
    await assert_same(pair)


@one_loop
async def test_a_full_disk_on_the_target_stops_the_copy_and_it_goes_on(pair: Pair) -> None:
    """The server's own error for a full disk, raised where it would be: nothing is lost by it."""
    rules = await prepared(pair)
    await _execute(
        pair.target,
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF (SELECT count(*) FROM ts_kv) > 60 THEN RAISE EXCEPTION USING ERRCODE = '53100', "
        "MESSAGE = 'could not extend file: No space left on device'; END IF; RETURN NULL; END $$;"
        "CREATE TRIGGER full_disk AFTER INSERT ON ts_kv EXECUTE FUNCTION full_disk();"
        "ALTER TABLE ts_kv ENABLE ALWAYS TRIGGER full_disk",
    )
    with pytest.raises(Unavailable, match=r"disk of the target is full.*Make room\. What is copied is kept"):
        await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=20, workers=1).run()
    done = await sql(pair.target, "SELECT count(*) FROM ts_kv")
    assert done[0][0] == 60
    await _execute(pair.target, "DROP FUNCTION full_disk CASCADE")
    await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=20).run()
    await assert_same(pair)


async def _execute(url: str, text: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        await conn.execute(text)
    finally:
        await conn.close()


@one_loop
async def test_a_busy_source_makes_the_copy_stand_still_and_says_why(pair: Pair) -> None:
    """While others need the source it waits, with the reason on screen; then it goes on."""
    rules = await prepared(pair)
    blocker = await asyncpg.connect(pair.source)
    busy = asyncio.create_task(blocker.execute("SELECT pg_sleep(600)"))
    why: list[str] = []

    def told(progress: CopyProgress) -> None:
        why.append(progress.throttled_why)

    copying = asyncio.create_task(
        Copier(
            pair.source,
            pair.target,
            rules,
            move="acme",
            chunk_rows=1,
            throttle=Throttle(active=0, active_max=1, rows_s_max=150),
        ).run(told)
    )
    async with asyncio.timeout(30):
        while not any("statements of others are running on the source" in one for one in why):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not copying.done()
    blocker.terminate()
    await asyncio.gather(busy, return_exceptions=True)
    await sql(
        pair.source, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^SELECT pg_sleep'"
    )
    await asyncio.wait_for(copying, 60)
    await assert_same(pair)


@one_loop
async def test_a_target_that_dies_loses_no_chunk_that_was_called_done(server: EmbeddedPostgres) -> None:
    """kill -9 of the target's server takes commits with it that did not wait for the disk: what the copy
    had heard of them does not count, and it goes on once the server is back."""
    with scratch_directory() as directory:
        async with (
            running_postgres(directory, extra={"wal_writer_delay": "10s"}) as other,
            fresh_pair(server, other) as pair,
        ):
            await fill_cloud(pair.source)
            rules = await prepared(pair)
            deaths = 0

            def kill(step: str) -> None:
                nonlocal deaths
                if "ts_kv" in step and step.endswith(("commit", "rows")) and deaths < 3:
                    deaths += 1
                    assert other.child is not None
                    other.child.kill()

            copier = Copier(pair.source, pair.target, rules, move="acme", chunk_rows=10, on_step=kill)
            result = await asyncio.wait_for(copier.run(), 90)
            assert deaths == 3 and result.retried > 0
            await assert_same(pair)
            assert result.rows == sum(table.rows for table in result.tables.values())
            assert await sql(pair.target, "SELECT sum(rows)::int FROM fleetlift_move.chunk") == [
                (result.rows,)
            ]


@one_loop
async def test_a_disk_that_is_really_full(server: EmbeddedPostgres, pair: Pair) -> None:
    """A table on a file system of 4 MB: the copy stops with the reason, and goes on once there is room."""
    with scratch_directory() as directory:
        directory.chmod(0o711)
        disk = directory / "disk"
        if not await mounted(disk, size="4m"):
            pytest.skip("no file system can be mounted here")
        try:
            await _execute(
                pair.source,
                "INSERT INTO ts_kv "
                "SELECT 'DEVICE', (SELECT min(id)::text FROM device WHERE customer_id = 2), "
                "'bulk', n, n, repeat('x', 200) FROM generate_series(1, 20000) n",
            )
            rules = await prepared(pair)
            space = space_on(disk, server)
            await _execute(pair.target, f"CREATE TABLESPACE fleetlift_full LOCATION '{space}'")
            await _execute(pair.target, "ALTER TABLE ts_kv SET TABLESPACE fleetlift_full")
            with pytest.raises(Unavailable, match=r"disk of the target is full.*No space left on device"):
                await Copier(pair.source, pair.target, rules, move="acme", chunk_rows=2000).run()
            done = await sql(pair.target, "SELECT count(*) FROM ts_kv")
            noted = await sql(
                pair.target,
                "SELECT sum(rows)::int FROM fleetlift_move.chunk WHERE table_name = 'public.ts_kv'",
            )
            assert 0 < done[0][0] < 20000 and noted == done
            await _execute(pair.target, "ALTER TABLE ts_kv SET TABLESPACE pg_default")
            await Copier(pair.source, pair.target, rules, move="acme").run()
            await assert_same(pair)
            await _execute(pair.target, "DROP TABLESPACE fleetlift_full")
        finally:
            await unmounted(disk, though_in_use=True)


class Standby(EmbeddedPostgres):
    """A server that is what its primary's backup makes it."""

    async def _ensure_database(self) -> None:
        """It has the primary's."""


@contextlib.asynccontextmanager
async def standby_of(primary: EmbeddedPostgres, directory: Path) -> AsyncIterator[EmbeddedPostgres]:
    directory.mkdir()
    directory.chmod(0o711)
    dsn = psycopg2.extensions.parse_dsn(primary.url)
    standby = Standby(
        directory / "pg",
        password=dsn["password"],
        log_file=directory / "standby.log",
        throwaway=True,
        extra=LOGICAL,
    )
    place = standby._prepare()
    os.environ["PGPASSWORD"] = dsn["password"]
    try:
        run_once(
            [
                *(str(place.binaries / "pg_basebackup"), "-D", str(place.cluster), "-R", "-c", "fast"),
                *("-h", dsn["host"], "-U", dsn["user"]),
            ],
            run_as=place.run_as,
        )
    finally:
        del os.environ["PGPASSWORD"]
    await standby.start()
    try:
        yield standby
    finally:
        await standby.stop()


@one_loop
async def test_rows_are_read_from_a_replica_once_it_has_replayed_enough(server: EmbeddedPostgres) -> None:
    """The replica's own snapshot is used, and its replay position is what the stream must pass."""
    assert installed_binaries()
    with scratch_directory() as directory:
        async with fresh_pair(server) as pair, standby_of(server, directory / "standby") as standby:
            await fill_cloud(pair.source)
            rules = await prepared(pair)
            replica = pair.source.replace(server.url.partition("host=")[2], standby.url.partition("host=")[2])
            await _execute(standby.url, "SELECT pg_wal_replay_pause()")
            async with asyncio.timeout(10):  # it is only asked to
                while (await sql(standby.url, "SELECT pg_get_wal_replay_pause_state()"))[0][0] != "paused":  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            await _execute(pair.source, "UPDATE device SET name = name || '-late' WHERE customer_id = 2")
            # Where commits do not wait for the disk, what is written ends before them.
            point = (await sql(pair.source, "SELECT pg_current_wal_insert_lsn()::text"))[0][0]
            copier = Copier(
                pair.source,
                pair.target,
                rules,
                move="acme",
                snapshot="00000003-00000001-1",
                consistent_lsn=point,
                replica_url=replica,
            )
            copying = asyncio.create_task(copier.run())
            async with asyncio.timeout(30):
                while "waiting for the replica" not in copier.progress.last_problem:
                    assert not copying.done()
                    await asyncio.sleep(0.02)
            await _execute(standby.url, "SELECT pg_wal_replay_resume()")
            result = await asyncio.wait_for(copying, 60)
            assert (await sql(server.url, f"SELECT '{result.fresh_until_lsn}'::pg_lsn >= '{point}'"))[0][0]
            await assert_same(pair)


@one_loop
async def test_caches_are_warm_and_it_says_what_that_brought(pair: Pair) -> None:
    """Tables and indexes are read into the target's cache, hottest first, within what fits in."""
    rules = await prepared(pair)
    await Copier(pair.source, pair.target, rules, move="acme").run()
    report = await warm(pair.source, pair.target, rules)
    assert (
        report.blocks >= report.brought and report.blocks > 0 and report.method in ("pg_prewarm", "reading")
    )
    assert "public.ts_kv" in report.relations
    assert 0.0 <= report.hit_share_before <= report.hit_share_after <= 1.0
    little = await warm(pair.source, pair.target, rules, share_of_cache=0.0)
    assert little.relations == () and little.left_out
