"""How many times more than what people would write instead: Mosquitto, one paho consumer, INSERT by INSERT.

Same machine, same generator, same PostgreSQL with the same settings and the same durability, same rule for
what counts as sustained. Left out in the other's favour: sign-in, and any check for doubles.
"""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec

from benchmarks import ingest
from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.handwritten import TABLE, Where
from benchmarks.ladder import highest
from benchmarks.mqtt_load import Generator, Job, Said, generator
from benchmarks.processes import cpu_profile
from fleetlift.bus.embedded import random_database_password
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Conn
from fleetlift.testing import free_port

BEGIN_AT = 2000.0
STALLED_S = 20.0  # without a row: what is missing is lost

FIGURES = (
    Figure(
        name="ingest_vs_handwritten",
        unit="×",
        better="higher",
        target=5.0,
        means="ingest_msg_s against Mosquitto, one paho consumer and one INSERT a message",
        limit="that peer itself, which is 1 ×",
    ),
)


class Trial(ingest.Trial, frozen=True, kw_only=True):
    """One stretch of the peer, which may lose messages."""

    lost: int

    @property
    def problem(self) -> str:
        return f"{self.lost} messages were lost" if self.lost > 0 else super().problem


def find_mosquitto() -> str:
    """The program; installed first where that can be done unasked. Raises BenchFailed with what to do."""
    places = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return shutil.which("mosquitto", path=places) or _missing()


def _missing() -> str:
    raise BenchFailed("Mosquitto is not installed: apt-get install --no-install-recommends mosquitto")


async def install_mosquitto(bench: Bench) -> None:
    """By Debian's package, when we are root on such a system and it is not there."""
    with contextlib.suppress(BenchFailed):
        find_mosquitto()
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    bench.progress("installing mosquitto")
    process = await asyncio.create_subprocess_exec(
        *("apt-get", "install", "-y", "-q", "--no-install-recommends", "mosquitto"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )
    await process.wait()


@contextlib.asynccontextmanager
async def peer(directory: Path) -> AsyncIterator[tuple[tuple[str, int], Conn, dict[str, int]]]:
    """(address, connection to its database, pids by name) of broker, database and consumer, all running."""
    async with contextlib.AsyncExitStack() as stack:
        postgres = EmbeddedPostgres(
            directory / "pg", password=random_database_password(), log_file=directory / "postgresql.log"
        )
        stack.push_async_callback(postgres.stop)
        await ingest.note_commit_times(await postgres.start())
        await postgres.stop()
        url = await postgres.start()
        connection = await asyncpg.connect(url)
        stack.push_async_callback(connection.close)
        await connection.execute(TABLE)
        port = free_port()
        configuration = directory / "mosquitto.conf"
        configuration.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
            f"persistence true\npersistence_location {directory}/\nmax_queued_messages 0\nlog_type error\n"
            + ("user root\n" if os.geteuid() == 0 else "")
        )
        broker = await asyncio.create_subprocess_exec(find_mosquitto(), "-c", str(configuration))
        stack.push_async_callback(_ended, broker)
        await listening(port)
        consumer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.handwritten"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        stack.push_async_callback(_ended, consumer)
        assert consumer.stdin is not None and consumer.stdout is not None
        consumer.stdin.write(msgspec.json.encode(Where("127.0.0.1", port, url)) + b"\n")
        async with asyncio.timeout(20.0):
            if await consumer.stdout.readline() != b"ready\n":
                raise BenchFailed("the handwritten consumer did not start")
        assert postgres.child is not None and postgres.child.pid is not None
        pids = {"mosquitto": broker.pid, "consumer": consumer.pid, "postgres": postgres.child.pid}
        yield ("127.0.0.1", port), connection, pids


async def _ended(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def listening(port: int, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise BenchFailed("mosquitto does not listen") from None
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return


async def publish_and_count(
    bench: Bench, conn: Conn, source: Generator, job: Job, pids: dict[str, int]
) -> Trial:
    """Publish, wait until all is stored or nothing moves any more, and see how late the rows were."""
    what = f"the peer, {job.rate:,.0f} msg/s for {job.seconds:.0f} s"

    def progress(said: Said) -> None:
        bench.progress(what, said.acked, job.rate * job.seconds, "msg")

    before = await _numbered(conn)
    async with cpu_profile(what, {**pids, "generator": source.pid}) as profile:
        load = await source.publish(job, progress)
        counted, moved_at = 0, time.monotonic()
        while counted < load.acked and time.monotonic() < moved_at + STALLED_S:
            await asyncio.sleep(0.2)
            if (now := await _numbered(conn) - before) > counted:
                counted, moved_at = now, time.monotonic()
            bench.progress("the peer stores the rest", counted, load.acked, "msg")
    found = await conn.fetchrow(
        """SELECT count(DISTINCT (device, seq)) AS stored, percentile_disc(array[0.5, 0.99, 1.0]::float8[])
               WITHIN GROUP (ORDER BY extract(epoch FROM pg_xact_commit_timestamp(xmin) - ts)::float8) AS late
             FROM readings WHERE channel = $1""",
        job.channel,
    )
    assert found is not None
    p50_s, p99_s, max_s = found["late"] or (0.0, 0.0, 0.0)
    return Trial(
        rate=job.rate,
        load=load,
        profile=profile,
        p50_s=p50_s,
        p99_s=p99_s,
        max_s=max_s,
        lost=load.acked - found["stored"],
    )


async def _numbered(conn: Conn) -> int:
    """How many rows there have been, without counting them."""
    return int(await conn.fetchval("SELECT last_value - (NOT is_called)::int FROM readings_id_seq"))


async def run(bench: Bench) -> list[Measured]:
    await install_mosquitto(bench)
    find_mosquitto()
    number = 0
    directory = bench.directory / "peer"
    directory.mkdir()
    directory.chmod(0o711)
    async with peer(directory) as (address, connection, pids):
        devices = [(f"bench-{n:04}", "") for n in range(ingest.CONNECTIONS)]

        async def trial(rate: float, seconds: float) -> Trial:
            nonlocal number
            number += 1
            job = Job(channel=f"trial{number}", rate=rate, seconds=seconds)
            async with generator(address, devices) as source:
                return await publish_and_count(bench, connection, source, job, pids)

        theirs, proof, _ = await highest(
            ingest.RATES,
            BEGIN_AT,
            trial,
            short_s=bench.seconds(10.0, 5.0),
            long_s=bench.seconds(ingest.SUSTAINED_S / 2),
        )
    bench.profiles.append(proof.profile)
    invalid = proof.load.late or ingest.too_busy(proof.profile)
    if proof.problem:
        invalid = invalid or f"the peer sustained no rate ({proof.problem})"
    if (earlier := bench.earlier.get("ingest_msg_s")) is not None:
        ours, invalid = earlier.value, invalid or earlier.invalid
    else:
        found = await ingest.search(bench, inside=False)
        ours, invalid = found.rate, invalid or found.invalid
    return [
        Measured(
            name="ingest_vs_handwritten",
            value=ours / theirs,
            limit=1.0,
            invalid=invalid,
            notes=(
                f"ours {ours:,.0f} msg/s, the peer's {theirs:,.0f} msg/s (p50 {proof.p50_s:.2f} s, "
                f"p99 {proof.p99_s:.2f} s), by the same rule: all stored, p99 at most {ingest.P99_MAX_S:g} s",
                "the same PostgreSQL, synchronous_commit on for both; the peer signs nobody in",
            ),
        )
    ]
