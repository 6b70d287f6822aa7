"""How fast a tenant's changes are applied, against native logical replication of the same changes.

Both have a slot on the source from before the changes, wait until all are committed, and then apply them to
tables with the same rows and keys on the same server: inserts, updates and deletes of the large tenant, in
transactions of 50 rows, as an application writes them. Native is a subscription to the same tables. Ours
decides of every row whose it is and notes its position with every commit.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.tenant_copy import closure_of_tenant, plain, servers
from benchmarks.tenant_data import TENANT, fill
from fleetlift.core.tenant.closure import Closure
from fleetlift.tenant.ddl import create_schema
from fleetlift.tenant.follow import Follower

ROWS = 200_000
CHANGES = 400_000
IN_ONE = 50
ROUNDS = 5
MOVE = "bench_follow"

FIGURES = (
    Figure(
        name="tenant_follow_vs_native",
        unit="×",
        better="higher",
        target=0.7,
        means="changes of a tenant applied a second, against native logical replication of the same changes",
        limit="a subscription of PostgreSQL, which is 1 ×",
    ),
)


async def write(url: str, changes: int, round_: int) -> None:
    """`changes` rows of the tenant changed: six in ten inserted, three updated, one deleted."""
    conn = await asyncpg.connect(url)
    try:
        await conn.execute("SET synchronous_commit = off")
        await conn.execute(
            f"""
CREATE TEMP TABLE mine AS SELECT row_number() OVER () AS n, id FROM device WHERE customer_id = {TENANT};
CREATE INDEX ON mine (n);
ANALYZE mine;
CREATE OR REPLACE PROCEDURE pg_temp.write(transactions int, first bigint) LANGUAGE plpgsql AS $$
DECLARE devices bigint := (SELECT count(*) FROM mine);
BEGIN
  FOR t IN 1..transactions LOOP
    INSERT INTO reading SELECT m.id, first + t, 'speed', t, NULL
      FROM mine m WHERE m.n BETWEEN 1 + t * 20 % (devices - 20) AND 20 + t * 20 % (devices - 20);
    INSERT INTO event (device_id, at, severity, body) SELECT m.id, now(), 1, '{{"text": "again"}}'
      FROM mine m WHERE m.n BETWEEN 1 + t * 10 % (devices - 20) AND 10 + t * 10 % (devices - 20);
    UPDATE reading r SET num = num + 1 FROM mine m WHERE r.device_id = m.id AND r.ts = first + t
      AND m.n BETWEEN 1 + t * 20 % (devices - 20) AND 15 + t * 20 % (devices - 20);
    DELETE FROM reading r USING mine m WHERE r.device_id = m.id AND r.ts = first + t
      AND m.n BETWEEN 1 + t * 20 % (devices - 20) AND 5 + t * 20 % (devices - 20);
    COMMIT;
  END LOOP;
END $$;
"""
        )
        await conn.execute(
            f"CALL pg_temp.write({changes // IN_ONE}, {1_900_000_000_000 + round_ * 10_000_000})"
        )
        await conn.execute(f"UPDATE customers SET name = 'round {round_}' WHERE id = {TENANT}")
    finally:
        await conn.close()


async def native(target: str, round_: int) -> float:
    """Seconds until the subscription has applied all."""
    conn = await asyncpg.connect(target)
    try:
        began = time.monotonic()
        await conn.execute("ALTER SUBSCRIPTION bench ENABLE")
        await _arrived(conn, round_)
        took = time.monotonic() - began
        await conn.execute("ALTER SUBSCRIPTION bench DISABLE")
        return took
    finally:
        await conn.close()


async def ours(follower: Follower, target: str, round_: int) -> float:
    """Seconds until the follower has applied all."""
    conn = await asyncpg.connect(target)
    try:
        began = time.monotonic()
        task = asyncio.create_task(follower.run())
        follower.start_applying()
        await _arrived(conn, round_, task)
        took = time.monotonic() - began
        task.cancel()
        await asyncio.wait([task])
        return took
    finally:
        await conn.close()


async def _arrived(
    conn: "asyncpg.Connection[asyncpg.Record]", round_: int, task: "asyncio.Task[None] | None" = None
) -> None:
    async with asyncio.timeout(300):
        while await conn.fetchval(f"SELECT name FROM customers WHERE id = {TENANT}") != f"round {round_}":
            if task is not None and task.done():
                raise BenchFailed(f"following ended: {task.exception()}")
            await asyncio.sleep(0.02)


async def same(first: str, second: str) -> None:
    """Both have the same rows. Raises BenchFailed."""
    sums = []
    for url in (first, second):
        conn = await asyncpg.connect(url)
        try:
            sums.append(
                [
                    await conn.fetchrow(f"SELECT count(*), sum(hashtextextended(t::text, 0)) FROM {table} t")
                    for table in ("reading", "event", "device", "customers")
                ]
            )
        finally:
            await conn.close()
    if sums[0] != sums[1]:
        raise BenchFailed(f"what was applied differs: {sums}")


@contextlib.asynccontextmanager
async def prepared(directory: Path) -> AsyncIterator[tuple[str, str, str, Closure, Follower]]:
    """URLs of the source and of two filled targets with a slot each, and the follower of the second."""
    async with servers(directory) as (source, server):
        await fill(source.url, rows=ROWS)
        closure = await closure_of_tenant(source.url)
        admin = await asyncpg.connect(server.url)
        try:
            await admin.execute("CREATE DATABASE native")
            await admin.execute("CREATE DATABASE ours")
        finally:
            await admin.close()
        targets = [server.url.replace("@/fleetlift?", f"@/{name}?") for name in ("native", "ours")]
        for target in targets:
            await create_schema(source.url, target, closure, move=MOVE)
            await plain(source.url, target)
        follower = Follower(source.url, targets[1], closure, move=MOVE, directory=directory / "spool")
        await follower.prepare()
        first = await asyncpg.connect(source.url)
        second = await asyncpg.connect(targets[0])
        try:
            await first.execute("CREATE PUBLICATION bench FOR TABLE reading, event, device, customers")
            await first.execute("SELECT pg_create_logical_replication_slot('bench_native', 'pgoutput')")
            await second.execute(
                f"CREATE SUBSCRIPTION bench CONNECTION '{source.url}' PUBLICATION bench WITH "
                "(create_slot = false, slot_name = 'bench_native', enabled = false, copy_data = false)"
            )
            yield source.url, targets[0], targets[1], closure, follower
            await second.execute("ALTER SUBSCRIPTION bench SET (slot_name = NONE)")
            await second.execute("DROP SUBSCRIPTION bench")
        finally:
            await first.close()
            await second.close()


async def run(bench: Bench) -> list[Measured]:
    """Both, round after round, in turn; the median of the ratios."""
    ratios, rates = [], []
    changes = CHANGES // (10 if bench.quick else 1)
    async with prepared(bench.directory / "tenant-follow") as (
        source,
        target_native,
        target_ours,
        closure,
        _,
    ):
        for round_ in range(1, ROUNDS + 1):
            bench.progress("changes applied", round_ - 1, ROUNDS, "rounds")
            await write(source, changes, round_)
            follower = Follower(
                source,
                target_ours,
                closure,
                move=MOVE,
                directory=bench.directory / "tenant-follow" / "spool",
            )
            if round_ % 2:
                n = await native(target_native, round_)
                o = await ours(follower, target_ours, round_)
            else:
                o = await ours(follower, target_ours, round_)
                n = await native(target_native, round_)
            ratios.append(n / o)
            rates.append((changes / n, changes / o))
            await same(target_native, target_ours)
    best = sorted(range(ROUNDS), key=lambda at: ratios[at])[ROUNDS // 2]
    said = ", ".join(f"{o:,.0f} against {n:,.0f}" for n, o in rates)
    return [
        Measured(
            name="tenant_follow_vs_native",
            value=ratios[best],
            limit=1.0,
            notes=(f"{changes:,} changes a round; rows a second, ours against native: {said}",),
        )
    ]
