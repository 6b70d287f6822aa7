"""How many messages a second go from 1,000 MQTT connections to rows, and how late the latest 1 % are.

A real backend with real sign-ins; devices that publish with QoS 1 in an open model; rows whose commit time
PostgreSQL itself has noted. A rate counts only when every message that was acknowledged is a row, exactly
once, is counted in the ledger, and 99 of 100 were rows within a second of when they were meant to be sent.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.ladder import highest
from benchmarks.machine import BUSY_MAX_CORES
from benchmarks.mqtt_load import Generator, Job, Load, Said, generator
from benchmarks.processes import Profile, cpu_profile, python_workers
from fleetlift.backend.passwords import generate_secret
from fleetlift.backend.registry import Credential, NewDevice, put_devices
from fleetlift.backend.telemetry import BATCH_MAX
from fleetlift.config import overrides_from
from fleetlift.core.ranges import RangeSet
from fleetlift.store.pool import Conn
from fleetlift.testing import RunningBackend, running_backend

CONNECTIONS = 1000
_THOUSANDS = (
    0.5,
    0.7,
    1,
    1.2,
    1.4,
    1.7,
    2,
    2.4,
    2.8,
    3.4,
    4,
    5,
    6,
    7,
    8.5,
    10,
    12,
    14,
    17,
    20,
    24,
    28,
    34,
    40,
)
RATES = tuple(1000.0 * n for n in _THOUSANDS)
TARGET = 10_000.0
P99_MAX_S = 1.0
SUSTAINED_S = 60.0
STORED_WITHIN_S = 180.0
COPIED_ROWS = 200_000

FIGURES = (
    Figure(
        name="ingest_msg_s",
        unit="msg/s",
        better="higher",
        target=TARGET,
        means="MQTT QoS 1 from 1,000 connections to rows, sustained for 60 s with a p99 below 1 s",
        limit="the slower one of the broker alone and a raw COPY of the same rows",
    ),
    Figure(
        name="ingest_p99_s",
        unit="s",
        better="lower",
        target=P99_MAX_S,
        means="from the intended time of publishing to the commit of the row, at that rate",
        limit="publish to PUBACK by the broker alone, at the same rate",
    ),
)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch at one rate, every row accounted for. `p99_s` is publish-to-row."""

    rate: float
    load: Load
    profile: Profile
    p50_s: float
    p99_s: float
    max_s: float

    @property
    def problem(self) -> str:
        # A rate that the generator itself cannot keep shows nothing: the search goes below it.
        if self.load.trouble or self.load.late:
            return self.load.trouble or self.load.late
        return f"p99 {self.p99_s:.2f} s" if self.p99_s > P99_MAX_S else ""


# -- the backend ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def timed_backend(directory: Path) -> AsyncIterator[RunningBackend]:
    """A whole backend whose PostgreSQL notes when each transaction was committed (nothing else differs)."""
    async with running_backend(directory) as backend:
        await note_commit_times(backend.settings.database_url)
        await backend.stop()
        await backend.start()
        yield backend


async def note_commit_times(database_url: str) -> None:
    """Takes effect when the server starts next."""
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("ALTER SYSTEM SET track_commit_timestamp = on")
        await connection.execute("ALTER SYSTEM SET track_wal_io_timing = on")
    finally:
        await connection.close()


async def register(conn: Conn, count: int = CONNECTIONS, prefix: str = "bench") -> list[tuple[str, str]]:
    """Make devices `bench-0000` and so on with generated secrets; returns (id, secret) of each."""
    devices = [(f"{prefix}-{n:04}", generate_secret()) for n in range(count)]
    new = [
        NewDevice(id=name, tenant="bench", credentials=(Credential(kind="password", value=secret),))
        for name, secret in devices
    ]
    await put_devices(conn, new, generated=True, make_tenants=True)
    return devices


# -- a trial ----------------------------------------------------------------------------------------------


async def publish_and_check(
    bench: Bench, conn: Conn, backend: RunningBackend, source: Generator, job: Job
) -> Trial:
    """Publish, wait until all is stored, and compare what was acknowledged with what is there.

    Raises BenchFailed when anything is missing, doubled or miscounted.
    """
    what = f"{job.rate:,.0f} msg/s for {job.seconds:.0f} s"

    def progress(said: Said) -> None:
        bench.progress(what, said.acked, job.rate * job.seconds, "msg")

    async with cpu_profile(what, {"serve": backend.pid, "generator": source.pid}) as profile:
        load = await source.publish(job, progress)
        await _until_counted(bench, conn, job.channel, load.acked)
    if load.trouble:  # some of what was in flight may be stored all the same, and then has no PUBACK
        await asyncio.sleep(2.0)
    bench.progress("comparing what was acknowledged with what is stored")
    await _check(conn, job.channel, load)
    p50_s, p99_s, max_s = await _latencies(conn, job.channel)
    return Trial(rate=job.rate, load=load, profile=profile, p50_s=p50_s, p99_s=p99_s, max_s=max_s)


async def _until_counted(bench: Bench, conn: Conn, channel: str, acked: int) -> None:
    deadline = time.monotonic() + STORED_WITHIN_S
    while True:
        counted = await conn.fetchval(
            "SELECT coalesce(sum(received), 0)::bigint FROM ledger WHERE channel = $1", channel
        )
        if counted >= acked:
            return
        if time.monotonic() > deadline:
            raise BenchFailed(
                f"{acked - counted} of {acked} acknowledged messages were not stored within "
                f"{STORED_WITHIN_S:.0f} s"
            )
        bench.progress("storing the rest", counted, acked, "msg")
        await asyncio.sleep(0.2)


async def _check(conn: Conn, channel: str, load: Load) -> None:
    found = await conn.fetchrow(
        "SELECT count(*), count(DISTINCT (device, seq)) FROM telemetry WHERE channel = $1", channel
    )
    assert found is not None
    rows, distinct = found
    if rows != distinct or not load.acked <= rows <= load.sent:
        raise BenchFailed(
            f"{load.sent} messages were sent, {load.acked} acknowledged, "
            f"{rows} rows ({distinct} distinct) are stored"
        )
    ledger = await conn.fetch(
        "SELECT device, ranges::text AS ranges, received, doubles FROM ledger WHERE channel = $1", channel
    )
    for row in ledger:
        expected = RangeSet()
        expected.add_range(1, row["received"] + 1)
        if row["doubles"] or RangeSet.from_pg(row["ranges"]).to_pg() != expected.to_pg():
            raise BenchFailed(f"the ledger of {row['device']} is wrong: {dict(row)}")
    if (counted := sum(row["received"] for row in ledger)) != rows:
        raise BenchFailed(f"{rows} rows are stored, the ledger counts {counted}")
    if letters := await conn.fetchval("SELECT count(*) FROM dead_letter"):
        raise BenchFailed(f"{letters} messages became dead letters")


async def _latencies(conn: Conn, channel: str) -> tuple[float, float, float]:
    found = await conn.fetchval(
        """SELECT percentile_disc(array[0.5, 0.99, 1.0]::float8[]) WITHIN GROUP (ORDER BY
               extract(epoch FROM pg_xact_commit_timestamp(xmin) - ts)::float8)
             FROM telemetry WHERE channel = $1""",
        channel,
    )
    if found is None or None in found:
        raise BenchFailed("PostgreSQL did not note when rows were committed (track_commit_timestamp)")
    p50_s, p99_s, max_s = found
    return p50_s, p99_s, max_s


async def flush_s(conn: Conn) -> float:
    """The mean time of a WAL flush so far: a row is safe that much after the noted time of its commit."""
    found = await conn.fetchrow(
        "SELECT sum(fsync_time) AS ms, sum(fsyncs) AS n FROM pg_stat_io WHERE object = 'wal'"
    )
    assert found is not None
    return float(found["ms"]) / float(found["n"]) / 1000 if found["n"] else 0.0


async def durability(conn: Conn) -> str:
    """What the two engines were told to force to disk, and when."""
    commit, fsync = [
        await conn.fetchval(f"SELECT current_setting('{name}')") for name in ("synchronous_commit", "fsync")
    ]
    return (
        f"NATS sync_interval {overrides_from().sync}; PostgreSQL synchronous_commit {commit}, fsync {fsync}"
    )


# -- limits -----------------------------------------------------------------------------------------------


async def broker_alone(bench: Bench, directory: Path, rate: float) -> tuple[float, float]:
    """(PUBACKs a second flat out, p99 of PUBACK at `rate`) of the same server, sign-ins and log, unread."""
    async with running_backend(directory, arguments=["--workers", "auth"]) as backend:
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            devices = await register(connection)
        finally:
            await connection.close()
        async with generator(backend.mqtt, devices) as source:
            seconds = bench.seconds(10.0, 5.0)
            bench.progress("the broker alone, at the same rate")
            same = await source.publish(Job(channel="same", rate=rate, seconds=seconds))
            bench.progress("the broker alone, flat out")
            async with bench.profiled("the broker alone", {"serve": backend.pid, "generator": source.pid}):
                flat_out = await source.publish(Job(channel="most", rate=0, seconds=seconds, window=16))
    return flat_out.acked / flat_out.wall_s, same.ack_p99_s


async def raw_copy(bench: Bench, conn: Conn, channel: str) -> float:
    """Rows a second that COPY brings into an empty table with the same columns and primary key, from one
    connection, in transactions as large as the reader's, with the same durability."""
    columns = ("device", "channel", "ts", "msg_key", "seq", "body", "path", "received_at")
    bench.progress("raw COPY of the same rows")
    rows: list[Any] = [
        tuple(row)
        for row in await conn.fetch(
            f"SELECT {', '.join(columns)} FROM telemetry WHERE channel = $1 ORDER BY received_at LIMIT $2",
            channel,
            COPIED_ROWS,
        )
    ]
    await conn.execute(
        """CREATE TABLE bench_copy (device text, channel text, ts timestamptz, msg_key bigint, seq bigint,
               body json, path text, received_at timestamptz, PRIMARY KEY (device, channel, ts, msg_key))"""
    )
    began = time.monotonic()
    for first in range(0, len(rows), BATCH_MAX):
        await conn.copy_records_to_table(
            "bench_copy", records=rows[first : first + BATCH_MAX], columns=columns
        )
    took_s = time.monotonic() - began
    await conn.execute("DROP TABLE bench_copy")
    return len(rows) / took_s


def too_busy(profile: Profile) -> str:
    """Why what others did on the machine makes this run invalid; empty when it does not."""
    if profile.others_cores <= BUSY_MAX_CORES:
        return ""
    return f"processes that do not belong to it used {profile.others_cores:.1f} cores"


# -- the bench --------------------------------------------------------------------------------------------


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The highest rate, and what is to be said about it."""

    rate: float
    trial: Trial
    copy_rows_s: float
    invalid: str
    notes: tuple[str, ...]


async def search(bench: Bench, *, begin_at: float = TARGET, inside: bool = True) -> Found:
    """The highest rate that a backend sustains. `inside`: look into its workers too, after the measuring."""
    async with timed_backend(bench.directory / "backend") as backend:
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            devices = await register(connection)
            number = 0

            async def trial(rate: float, seconds: float) -> Trial:
                nonlocal number
                number += 1
                job = Job(channel=f"trial{number}", rate=rate, seconds=seconds)
                bench.progress("signing in 1,000 devices")
                async with generator(backend.mqtt, devices) as source:
                    return await publish_and_check(bench, connection, backend, source, job)

            rate, proof, tried = await highest(
                RATES,
                begin_at,
                trial,
                short_s=bench.seconds(10.0, 5.0),
                long_s=bench.seconds(SUSTAINED_S),
            )
            bench.profiles.append(proof.profile)
            channel = f"trial{number}"
            if inside:
                async with generator(backend.mqtt, devices) as source:
                    await _look_inside(bench, backend, source, rate)
            flushed_s = await flush_s(connection)
            durable = await durability(connection)
            copied = await raw_copy(bench, connection, channel)
        finally:
            await connection.close()
    load = proof.load
    invalid = load.late or too_busy(proof.profile)
    steps = ", ".join(f"{r:,.0f}: {t.p99_s:.2f} s{' (too late)' if t.problem else ''}" for r, t in tried)
    notes = (
        f"sustained {load.sending_s:.0f} s, {load.acked:,} messages, all stored and counted exactly once",
        f"publish to row: p50 {proof.p50_s:.2f} s, p99 {proof.p99_s:.2f} s, longest {proof.max_s:.2f} s; "
        f"the flush after a commit ({1000 * flushed_s:.1f} ms) is not in it",
        f"publish to PUBACK: p50 {load.ack_p50_s * 1000:.0f} ms, p99 {load.ack_p99_s * 1000:.0f} ms; "
        f"the generator was late by {load.late_p99_s * 1000:.0f} ms (p99), "
        f"{load.late_max_s * 1000:.0f} ms (most)",
        f"p99 of each trial: {steps}",
        durable,
    )
    return Found(rate=rate, trial=proof, copy_rows_s=copied, invalid=invalid, notes=notes)


async def _look_inside(bench: Bench, backend: RunningBackend, source: Generator, rate: float) -> None:
    """Keep the load up for some more seconds and see what the Python workers do under it."""
    bench.progress("looking into the workers")
    seconds = bench.seconds(12.0, 6.0)
    more = asyncio.create_task(source.publish(Job(channel="inside", rate=rate, seconds=seconds)))
    await asyncio.sleep(2.0)
    await bench.look_inside(python_workers(backend.pid, ("telemetry", "state")), for_s=seconds - 3.0)
    await more


async def run(bench: Bench) -> list[Measured]:
    found = await search(bench)
    pubacks, ack_p99_s = await broker_alone(bench, bench.directory / "broker", found.rate)
    problem = found.trial.problem
    both = f"the broker alone {pubacks:,.0f} msg/s, raw COPY {found.copy_rows_s:,.0f} rows/s"
    invalid = found.invalid or (f"no rate was sustained ({problem})" if problem else "")
    return [
        Measured(
            name="ingest_msg_s",
            value=found.rate,  # all of whose messages were acknowledged and stored
            limit=min(pubacks, found.copy_rows_s),
            invalid=invalid,
            notes=(*found.notes, both),
        ),
        Measured(name="ingest_p99_s", value=found.trial.p99_s, limit=ack_p99_s, invalid=invalid),
    ]
