"""The verifier while both databases change: no false alarm, and nothing that stays wrong is overlooked."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator

import asyncpg
import pytest

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Policy, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.verify_report import Kind, by_table
from fleetlift.tenant.follow_books import BOOKS
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.verify import Verifier
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fresh_pair, running_postgres

SCHEMA = """
CREATE TABLE customers (id bigint PRIMARY KEY, name text);
CREATE TABLE device (id bigint PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers, n bigint);
CREATE TABLE note (customer_id bigint NOT NULL REFERENCES customers, what text);
"""
FILL = """
INSERT INTO customers VALUES (1, 'one'), (2, 'two');
INSERT INTO device SELECT n, 1 + n % 2, 0 FROM generate_series(1, 400) n;
INSERT INTO note SELECT 1 + n % 2, 'note ' || n % 7 FROM generate_series(1, 60) n;
ALTER TABLE device REPLICA IDENTITY FULL;
ALTER TABLE note REPLICA IDENTITY FULL;
CREATE PUBLICATION moved FOR TABLE customers WHERE (id = 2), device WHERE (customer_id = 2),
    note WHERE (customer_id = 2);
"""


class Stream:
    """PostgreSQL's own logical replication of tenant 2's rows."""

    def __init__(self, pair: Pair, closure: Closure) -> None:
        self.pair, self.closure = pair, closure

    async def settle(self, lsn: int) -> None:
        """Until the subscription has applied and reported all up to `lsn`."""
        conn = await asyncpg.connect(self.pair.source)
        try:
            async with asyncio.timeout(60):
                while not await conn.fetchval(  # noqa: ASYNC110
                    "SELECT coalesce(max(confirmed_flush_lsn) >= $1, false) FROM pg_replication_slots "
                    "WHERE database = current_database()",
                    lsn,
                ):
                    await asyncio.sleep(0.02)
        finally:
            await conn.close()


@contextlib.asynccontextmanager
async def streaming() -> AsyncIterator[Stream]:
    with scratch_directory() as directory:
        async with (
            running_postgres(directory / "both", extra={"wal_receiver_status_interval": "1"}) as server,
            fresh_pair(server) as pair,
        ):
            source, target = await asyncpg.connect(pair.source), await asyncpg.connect(pair.target)
            await source.execute(SCHEMA)
            await source.execute(FILL)
            await source.execute("SELECT pg_create_logical_replication_slot('moved', 'pgoutput')")
            closure = closure_of(
                await read_schema(source),
                Rules(
                    root=Root(table="public.customers", column="id", value="2"),
                    full_identity=("public.note",),
                ),
            )
            await target.execute(SCHEMA + "ALTER TABLE note REPLICA IDENTITY FULL")
            for table, which in (
                ("customers", "id = 2"),
                ("device", "customer_id = 2"),
                ("note", "customer_id = 2"),
            ):
                rows = await source.fetch(f"SELECT * FROM {table} WHERE {which}")
                await target.copy_records_to_table(table, records=[tuple(row) for row in rows])
            await target.execute(
                f"CREATE SUBSCRIPTION moved CONNECTION '{pair.source}' PUBLICATION moved "
                "WITH (create_slot = false, copy_data = false, slot_name = moved)"
            )
            try:
                yield Stream(pair, closure)
            finally:
                await target.execute("ALTER SUBSCRIPTION moved DISABLE")
                await target.execute("ALTER SUBSCRIPTION moved SET (slot_name = NONE)")
                await target.execute("DROP SUBSCRIPTION moved")
                await source.close()
                await target.close()


def changes(seed: int) -> Iterator[str]:
    """Statements that insert, update, delete and move rows between the tenants, one row all the time."""
    rng = random.Random(seed)
    fresh = 1_000_000 * (seed + 1)
    while True:
        fresh += 1
        device = rng.randint(1, 400)
        yield "UPDATE device SET n = n + 1 WHERE id = 3"
        yield rng.choice(
            (
                f"UPDATE device SET n = n + 1 WHERE id = {device}",
                f"UPDATE device SET customer_id = 3 - customer_id WHERE id = {device | 4}",
                f"INSERT INTO device VALUES ({fresh}, {1 + fresh % 2}, 0)",
                f"DELETE FROM device WHERE id = {fresh - 2}",
                f"INSERT INTO note VALUES (2, 'note {fresh % 7}')",
                "DELETE FROM note WHERE ctid = (SELECT min(ctid) FROM note)",
                f"UPDATE note SET what = 'note {fresh % 7}' WHERE ctid = (SELECT max(ctid) FROM note)",
            )
        )


@contextlib.asynccontextmanager
async def writers(
    url: str, count: int = 2, *, of: Callable[[int], Iterator[str]] = changes
) -> AsyncIterator[None]:
    """Sessions that write without a pause while the block runs."""
    stop = asyncio.Event()

    async def write(seed: int) -> None:
        conn = await asyncpg.connect(url)
        for statement in of(seed):
            if stop.is_set():
                break
            with contextlib.suppress(asyncpg.DeadlockDetectedError):
                await conn.execute(statement)
            await asyncio.sleep(0.002)
        await conn.close()

    tasks = [asyncio.create_task(write(seed)) for seed in range(count)]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def test_writers_raise_no_alarm_and_hide_no_damage() -> None:
    """While rows are written and change tenants, only what was damaged is found; and repaired."""
    async with (
        streaming() as stream,
        Verifier(
            stream.pair.source,
            stream.pair.target,
            stream.closure,
            settle=stream.settle,
            chunk_rows=50,
            ahead_rows=0,
        ) as v,
    ):
        damage = (
            "UPDATE device SET n = -5 WHERE id = 501",
            "DELETE FROM device WHERE id = 503",
            "INSERT INTO device VALUES (-1, 2, 0)",
        )
        source = await asyncpg.connect(stream.pair.source)
        await source.execute("INSERT INTO device VALUES (501, 2, 0), (503, 2, 0)")
        await stream.settle(await source.fetchval("SELECT pg_current_wal_insert_lsn()"))
        async with writers(stream.pair.source):
            report = await v.run()
            assert not report.blocks, report.findings
            target = await asyncpg.connect(stream.pair.target)
            for statement in damage:
                await target.execute(statement)
            await target.close()
            report = await v.run()
            blocking = {(f.kind, f.key) for f in report.findings if f.kind is not Kind.UNSETTLED}
            assert blocking == {
                (Kind.DIFFERING, ("501",)),
                (Kind.MISSING, ("503",)),
                (Kind.FOREIGN, ("-1",)),
            }
            repaired = await v.repair(report)
            await stream.settle(repaired.fresh_until)
            assert not (await v.recheck(by_table(report.findings))).blocks
        await stream.settle(await source.fetchval("SELECT pg_current_wal_insert_lsn()"))
        assert (await v.recheck({"public.device": [("3",), ("501",)]})).agrees
        assert (await v.run()).agrees
        await source.close()


async def test_on_the_way_back_what_is_only_on_its_way_is_no_difference() -> None:
    """The target, which publishes here, is ahead; writers write there without a pause."""
    async with (
        streaming() as stream,
        Verifier(
            *(stream.pair.target, stream.pair.source, stream.closure),
            settle=stream.settle,
            chunk_rows=50,
            ahead_rows=0,
            back=True,
        ) as v,
    ):
        target, source = await asyncpg.connect(stream.pair.source), await asyncpg.connect(stream.pair.target)
        await target.execute(
            "DELETE FROM device WHERE customer_id = 1; DELETE FROM note WHERE customer_id = 1; "
            "DELETE FROM customers WHERE id = 1"
        )
        await target.execute("INSERT INTO device VALUES (501, 2, 0), (503, 2, 0)")
        await source.execute("INSERT INTO customers VALUES (1, 'one'); INSERT INTO device VALUES (2, 1, 0)")
        await stream.settle(await target.fetchval("SELECT pg_current_wal_insert_lsn()"))
        hot = [(str(n),) for n in range(1, 400, 2)]
        async with writers(stream.pair.source, of=hot_changes):
            for report in (await v.run(), await v.recheck({"public.device": hot, "public.note": []})):
                assert not report.blocks, report.findings
            await source.execute("UPDATE device SET n = -5 WHERE id = 501; DELETE FROM device WHERE id = 503")
            await source.execute("INSERT INTO device VALUES (-1, 2, 0); INSERT INTO note VALUES (2, 'lost')")
            report = await v.run()
        blocking = {
            f.key for f in report.findings if f.kind is not Kind.UNSETTLED and f.table != "public.note"
        }
        assert blocking == {("501",), ("503",), ("-1",)}
        await stream.settle(await target.fetchval("SELECT pg_current_wal_insert_lsn()"))
        report = await v.recheck({"public.device": hot, "public.note": []})
        assert [(f.kind, f.table) for f in report.findings] == [(Kind.MISSING, "public.note")]
        await source.close()
        await target.close()


def hot_changes(seed: int) -> Iterator[str]:
    """Statements on tenant 2's rows: each is written to every now and then."""
    rng = random.Random(seed)
    fresh = 1_000_000 * (seed + 1)
    while True:
        fresh += 1
        yield f"UPDATE device SET n = n + 1 WHERE id = {rng.randrange(1, 40, 2)}"
        yield f"INSERT INTO device VALUES ({fresh}, 2, 0)"
        yield f"DELETE FROM device WHERE id = {fresh - 5}"
        yield f"INSERT INTO note VALUES (2, 'note {fresh % 7}')"


async def test_on_the_way_back_rows_that_only_came_along_are_not_compared() -> None:
    with scratch_directory() as directory:
        async with running_postgres(directory / "both") as server, fresh_pair(server) as pair:
            source, target = await asyncpg.connect(pair.source), await asyncpg.connect(pair.target)
            await source.execute(FAMILIES)
            closure = closure_of(
                await read_schema(source),
                Rules(
                    root=Root(table="public.customers", column="id", value="2"),
                    policies={("public.customers", ("parent_id",)): Policy.COPY},
                ),
            )
            await target.execute(FAMILIES + BOOKS)
            await source.execute("INSERT INTO customers VALUES (1, 'one', NULL), (2, 'two', 1)")
            await target.execute(
                "INSERT INTO customers VALUES (1, 'as it was', NULL), (2, 'two', 1), (5, 'made there', 2); "
                "INSERT INTO fleetlift_move.shared_row VALUES ('public.customers', '{1}')"
            )
            keys = [("1",), ("2",), ("5",)]
            async with Verifier(pair.source, pair.target, closure, back=True) as v:
                for report in (await v.run(), await v.recheck({"public.customers": keys})):
                    assert [(f.kind, f.key) for f in report.findings] == [(Kind.FOREIGN, ("5",))]
            await source.close()
            await target.close()


FAMILIES = """
CREATE TABLE customers (id bigint PRIMARY KEY, name text, parent_id bigint REFERENCES customers);
"""


async def test_some_rows_are_checked_again_with_what_they_refer_to() -> None:
    """Given keys: rows that are right are not listed, whatever their tenant; a dangling reference is."""
    with scratch_directory() as directory:
        async with running_postgres(directory / "both") as server, fresh_pair(server) as pair:
            source, target = await asyncpg.connect(pair.source), await asyncpg.connect(pair.target)
            await source.execute(PROFILES + PROFILES_FILL)
            closure = closure_of(
                await read_schema(source),
                Rules(root=Root(table="public.customers", column="id", value="2")),
            )
            await target.execute(PROFILES)
            await target.execute(
                "INSERT INTO customers VALUES (2, 'two'); INSERT INTO profile VALUES (1, NULL); "
                "INSERT INTO device SELECT n, 2, 1 FROM generate_series(2, 800, 2) n"
            )
            keys = [(str(n),) for n in range(1, 401)]
            async with Verifier(pair.source, pair.target, closure) as v:
                report = await v.recheck({"public.device": keys, "public.profile": [("1",), ("2",)]})
                assert report.agrees
                await target.execute(
                    "ALTER TABLE device DROP CONSTRAINT device_profile_id_fkey; DELETE FROM profile"
                )
                report = await v.recheck({"public.device": [("2",)]})
                assert [(f.kind, f.table, f.key) for f in report.findings] == [
                    (Kind.MISSING, "public.profile", ("1",))
                ]
                await v.repair(report)
                assert (await v.recheck({"public.device": keys})).agrees
                await target.execute(
                    "SET session_replication_role = replica; INSERT INTO device VALUES (1, 1, 1)"
                )
                report = await v.recheck({"public.device": keys})
                assert [(f.kind, f.key) for f in report.findings] == [(Kind.FOREIGN, ("1",))]
                await source.execute("INSERT INTO tag VALUES (2, 'late')")
                report = await v.recheck({"public.tag": [("of any digest",)]})
                assert [f.kind for f in report.findings] == [Kind.MISSING]
                with pytest.raises(BadInput, match="a key has 1 values"):
                    await v.recheck({"public.device": [("1", "2")]})
                with pytest.raises(BadInput, match="no table"):
                    await v.recheck({"public.nothing": [("1",)]})
            await source.close()
            await target.close()


PROFILES = """
CREATE TABLE customers (id bigint PRIMARY KEY, name text);
CREATE TABLE profile (id int PRIMARY KEY, parent_id int REFERENCES profile);
CREATE TABLE device (id bigint PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers,
    profile_id int REFERENCES profile);
CREATE TABLE tag (device_id bigint REFERENCES device, what text);
"""
PROFILES_FILL = """
INSERT INTO customers VALUES (1, 'one'), (2, 'two');
INSERT INTO profile VALUES (1, NULL), (2, NULL);
INSERT INTO device SELECT n, 1 + (n + 1) % 2, 1 FROM generate_series(1, 800) n;
"""


async def test_keys_that_the_source_sorts_in_another_way_are_all_compared() -> None:
    """With another order of keys on the target its chunks are none of the source's: nothing is skipped."""
    labels = [f"'kind {n}'" for n in range(60)]
    made = (
        "CREATE TYPE kind AS ENUM ({}); CREATE TABLE customers (id bigint PRIMARY KEY);"
        "CREATE TABLE item (name kind PRIMARY KEY, customer_id bigint REFERENCES customers);"
        "INSERT INTO customers VALUES (2);"
        f"INSERT INTO item SELECT unnest(ARRAY[{', '.join(labels)}])::kind, 2;"
    )
    with scratch_directory() as directory:
        async with running_postgres(directory / "both") as server, fresh_pair(server) as pair:
            source, target = await asyncpg.connect(pair.source), await asyncpg.connect(pair.target)
            await source.execute(made.format(", ".join(labels)))
            await target.execute(made.format(", ".join(labels[30:] + labels[:30])))
            closure = closure_of(
                await read_schema(source),
                Rules(root=Root(table="public.customers", column="id", value="2")),
            )
            async with Verifier(pair.source, pair.target, closure, chunk_rows=9) as v:
                report = await v.run()
                assert report.agrees
                assert report.rows == 61
                await target.execute("DELETE FROM item WHERE name IN ('kind 3', 'kind 50')")
                report = await v.run()
                assert {f.key for f in report.findings} == {("kind 3",), ("kind 50",)}
                assert report.total(Kind.MISSING) == 2
            await source.close()
            await target.close()
