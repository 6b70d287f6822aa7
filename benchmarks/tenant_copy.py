"""How fast a tenant's rows are copied, against plain COPY of the same rows into the same tables.

Ours is the whole of it: slot and publication are made and the stream is spooled meanwhile, the rows are
found by the closure's rules, counted and cut, every chunk is noted with its rows, and in the end all of it
is on the disk. Plain is what somebody who knows the schema would type: for each table one `COPY (SELECT …
WHERE it is the tenant's) TO STDOUT`, piped into `COPY … FROM STDIN` by psql, in binary. Both go into
freshly made tables with their primary keys, on servers with the same settings, which write to disk.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.tenant_data import TENANT, TenantRows, fill
from fleetlift.bus.embedded import random_database_password
from fleetlift.core.tenant.closure import Closure, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.store.embedded import EmbeddedPostgres, installed_binaries
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.ddl import create_schema
from fleetlift.tenant.follow import Follower
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.pg_dump import connection_environment

ROWS = 1_050_000
ROUNDS = 3
MOVE = "bench"

FIGURES = (
    Figure(
        name="tenant_copy_vs_copy",
        unit="×",
        better="higher",
        target=0.6,
        means="copy of a tenant's 1 M rows, followed and resumable, against plain COPY of the same rows",
        limit="plain COPY by psql, one table after the other, which is 1 ×",
    ),
)

DEVICES = f"IN (SELECT id FROM device WHERE customer_id = {TENANT})"
PLAIN = {
    "currency": "true",
    "customers": f"id = {TENANT}",
    "device_profile": f"id IN (SELECT profile_id FROM device WHERE customer_id = {TENANT})",
    "device": f"customer_id = {TENANT}",
    "reading": f"device_id {DEVICES}",
    "event": f"device_id {DEVICES}",
    "invoice": f"customer_id = {TENANT}",
}


@contextlib.asynccontextmanager
async def servers(directory: Path) -> AsyncIterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A source and a target, as durable as `fleetlift serve` makes them, that can be followed."""
    settings = {"wal_level": "logical", "max_wal_senders": "10", "max_replication_slots": "10"}
    async with contextlib.AsyncExitStack() as stack:
        found: list[EmbeddedPostgres] = []
        for name in ("source", "target"):
            place = directory / name
            place.mkdir(parents=True)
            place.chmod(0o711)
            server = EmbeddedPostgres(
                place / "pg",
                password=random_database_password(),
                log_file=place / "postgresql.log",
                extra=settings,
            )
            stack.push_async_callback(server.stop)
            await server.start()
            found.append(server)
        yield found[0], found[1]


async def closure_of_tenant(url: str) -> Closure:
    """The rules of the large tenant's rows."""
    conn = await asyncpg.connect(url)
    try:
        root = Root(table="public.customers", column="id", value=str(TENANT))
        return closure_of(await read_schema(conn), Rules(root=root, whole=("public.currency",)))
    finally:
        await conn.close()


async def emptied(source: str, target: str, closure: Closure) -> None:
    """The target with the schema and no row, nothing left to write for what was there before."""
    conn = await asyncpg.connect(target)
    try:
        await conn.execute(
            f"DROP SCHEMA IF EXISTS public CASCADE; CREATE SCHEMA public; "
            f"DROP SCHEMA IF EXISTS {MOVE_SCHEMA} CASCADE; DROP TYPE IF EXISTS device_kind"
        )
        await create_schema(source, target, closure, move=MOVE)
        await conn.execute("CHECKPOINT")
    finally:
        await conn.close()


async def check(target: str, rows: TenantRows) -> None:
    """Every table has as many rows as the tenant has. Raises BenchFailed."""
    conn = await asyncpg.connect(target)
    try:
        for table, count in rows.tables.items():
            found = await conn.fetchval(f"SELECT count(*) FROM {table}")
            if found != count:
                raise BenchFailed(f"{table} has {found:,} rows after the copy, not {count:,}")
    finally:
        await conn.close()


async def plain(source: str, target: str) -> float:
    """Seconds that plain COPY takes."""
    psql = str(installed_binaries() / "psql")
    from_, to = connection_environment(source), connection_environment(target)
    began = time.monotonic()
    for table, where in PLAIN.items():
        reading, writing = os.pipe()
        out = f"COPY (SELECT * FROM {table} WHERE {where}) TO STDOUT (FORMAT binary)"
        processes = [
            await asyncio.create_subprocess_exec(psql, "-XqAt", "-c", out, stdout=writing, env=from_),
            await asyncio.create_subprocess_exec(
                *(psql, "-Xq", "-c", "SET session_replication_role = replica"),
                *("-c", f"COPY {table} FROM STDIN (FORMAT binary)"),
                stdin=reading,
                env=to,
            ),
        ]
        os.close(reading)
        os.close(writing)
        if any([await process.wait() for process in processes]):
            raise BenchFailed(f"plain COPY of {table} failed")
    return time.monotonic() - began


async def ours(source: str, target: str, closure: Closure, directory: Path) -> tuple[float, float]:
    """Seconds that our copy takes, with all that goes with it, and those of the copying alone."""
    began = time.monotonic()
    follower = Follower(source, target, closure, move=MOVE, directory=directory)
    prepared = await follower.prepare()
    following = asyncio.create_task(follower.run())
    try:
        copier = Copier(source, target, closure, move=MOVE, snapshot=prepared.snapshot)
        result = await copier.run(lambda _: None)
        took_s = time.monotonic() - began
        if following.done():
            raise BenchFailed(f"following stopped: {following.exception()}")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await follower.drop()
    return took_s, result.took_s


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    plain_s: float
    ours_s: float
    copying_s: float


async def measure(bench: Bench) -> tuple[list[Taken], TenantRows]:
    """The rounds, plain and ours in turn."""
    rounds: list[Taken] = []
    async with servers(bench.directory) as (from_, to):
        bench.progress("making twenty tenants")
        rows = await fill(from_.url, rows=ROWS // (10 if bench.quick else 1))
        closure = await closure_of_tenant(from_.url)
        for number in range(ROUNDS):
            bench.progress("plain COPY", number, ROUNDS, "rounds")
            await emptied(from_.url, to.url, closure)
            plain_s = await plain(from_.url, to.url)
            await check(to.url, rows)
            bench.progress("our copy", number, ROUNDS, "rounds")
            await emptied(from_.url, to.url, closure)
            ours_s, copying_s = await ours(from_.url, to.url, closure, bench.directory / f"spool-{number}")
            await check(to.url, rows)
            rounds.append(Taken(plain_s=plain_s, ours_s=ours_s, copying_s=copying_s))
    return rounds, rows


async def run(bench: Bench) -> list[Measured]:
    rounds, rows = await measure(bench)
    middle = sorted(rounds, key=lambda one: one.plain_s / one.ours_s)[len(rounds) // 2]
    return [
        Measured(
            name="tenant_copy_vs_copy",
            value=middle.plain_s / middle.ours_s,
            limit=1.0,
            notes=(
                f"{rows.total:,} rows of {len(rows.tables)} tables: plain COPY {middle.plain_s:.2f} s, ours "
                f"{middle.ours_s:.2f} s, {middle.ours_s - middle.copying_s:.2f} s of it for slot and stream",
                "plain / ours by round: "
                + ", ".join(f"{one.plain_s:.2f} / {one.ours_s:.2f} s" for one in rounds),
            ),
        )
    ]
