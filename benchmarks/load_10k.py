"""10,000 messages a second for a minute, by `fleetlift load`, against a whole Fleetlift on the same cores.

A thousand devices, some of them always on, some in bursts; every acknowledged message is looked for among the
rows. A run in which the generator was late does not count.
"""

import os

import asyncpg

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.ingest import durability, register, too_busy
from benchmarks.processes import cpu_profile
from fleetlift.core.units import format_quantity
from fleetlift.core.workload import Scenario
from fleetlift.load.credentials import Login
from fleetlift.load.run import Progress, Target, run_load
from fleetlift.load.scenario import parse_scenario
from fleetlift.load.witness import Database
from fleetlift.testing import running_backend

RATE = 10_000.0
LEAST = 9_900.0  # accepted a second, below which it was not the load that was asked for

SCENARIO = """
scenario: bench-10k
devices: 1000
for: 60s
rate: 10000/s
classes:
  - class: parked
    share: 50%
    topics: dt/{device}/status
    size: 120
    background: 5/s
  - class: driving
    share: 50%
    topics:
      dt/{device}/position: 4
      dt/{device}/engine: 1
    size: {p0: 120, p50: 170, p99: 400}
    background: 5/s
    active: {rate: 20/s, for: 5s, every: 10s}
"""

FIGURES = (
    Figure(
        name="load_10k_lost",
        unit="msg",
        better="lower",
        target=0.0,
        means="acknowledged messages that are not stored, of 10,000/s for 60 s by fleetlift load",
    ),
    Figure(
        name="load_10k_p99_s",
        unit="s",
        better="lower",
        target=1.0,
        means="from the intended moment of sending to the PUBACK, at that rate",
        limit="how late the generator itself was (p99), of which it includes all",
    ),
)


def scenario(for_s: float) -> Scenario:
    return parse_scenario(SCENARIO.replace("60s", f"{for_s:.0f}s"))


async def run(bench: Bench) -> list[Measured]:
    of = scenario(bench.seconds(60.0))
    async with running_backend(bench.directory / "backend") as backend:
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            devices = await register(connection, of.devices, "load")
            durable = await durability(connection)

            def progress(seen: Progress) -> None:
                if seen.doing in ("playing", "waiting for answers"):
                    bench.progress(f"{RATE:,.0f} msg/s", seen.accepted, RATE * of.for_s, "msg")
                else:
                    bench.progress(seen.doing, seen.done, seen.total)

            target = Target(
                url=f"mqtt://{backend.mqtt[0]}:{backend.mqtt[1]}",
                logins=[Login(*device) for device in devices],
                witness=Database(backend.settings.database_url),
            )
            roots = {"serve": backend.pid, "generator": 0, "bench": os.getpid()}  # the first name counts

            def started(pids: list[int]) -> None:
                roots["generator"] = pids[0]

            async with cpu_profile(f"{RATE:,.0f} msg/s", roots) as profile:
                result = await run_load(of, target, processes=1, progress=progress, on_start=started)
            letters = await connection.fetchval("SELECT count(*) FROM dead_letter")
        finally:
            await connection.close()
    bench.profiles.append(profile)
    stored = result.stored
    if stored is None:
        raise BenchFailed(result.why_unproved)
    if stored.doubled or letters:
        raise BenchFailed(f"{stored.doubled} messages are stored twice, {letters} became dead letters")
    invalid = "; ".join(result.invalid) or too_busy(profile)
    if not invalid and result.errors:
        invalid = f"{result.errors} of {result.counts.offered} messages were not accepted: {result.problems}"
    if not invalid and result.rate_s < LEAST * (0.97 if bench.quick else 1):
        invalid = f"only {result.rate_s:,.0f} messages a second were accepted"
    latency, late = result.latency, result.late
    notes = (
        f"{result.counts.accepted:,} accepted, {stored.stored:,} distinct rows; "
        f"{result.rate_s:,.0f} a second for {result.lasted_s:.0f} s",
        f"PUBACK: p50 {format_quantity(latency.p50_s, 's')}, p99.9 {format_quantity(latency.p999_s, 's')}, "
        f"longest {format_quantity(latency.max_s, 's')}; the generator was late by "
        f"{format_quantity(late.p99_s, 's')} (p99), {format_quantity(late.max_s, 's')} (most), and used "
        f"{sum(result.cpu):.2f} cores",
        durable,
    )
    return [
        Measured(name="load_10k_lost", value=float(result.lost or 0), invalid=invalid, notes=notes),
        Measured(name="load_10k_p99_s", value=latency.p99_s, limit=late.p99_s, invalid=invalid),
    ]
