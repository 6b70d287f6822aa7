"""How much faster than the clock a whole migration of 100 devices is simulated, on one core."""

import time

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from fleetlift.simulate.run import simulate

DEVICES = 100
FIRST_SEED = 1
SEEDS = 8

FIGURES = (
    Figure(
        name="simulation_speedup",
        unit="x",
        better="higher",
        target=100.0,
        means=f"simulated seconds a second, whole migrations of {DEVICES} devices with faults, on one core",
        limit="the clock itself",
    ),
)


async def run(bench: Bench) -> list[Measured]:
    seeds = range(FIRST_SEED, FIRST_SEED + (2 if bench.quick else SEEDS))
    simulated_s = took_s = 0.0
    faults = 0
    for done, seed in enumerate(seeds):
        bench.progress("simulating", done, len(seeds), "migrations")
        began = time.monotonic()
        outcome = simulate(seed, devices=DEVICES)
        took_s += time.monotonic() - began
        if outcome.violated is not None:
            raise BenchFailed(f"seed {seed} broke {outcome.violated}: {outcome.what}")
        simulated_s += outcome.simulated_s
        faults += outcome.faults
    note = f"{len(seeds)} migrations, {simulated_s:,.0f} simulated seconds in {took_s:.1f} s, {faults} faults"
    return [Measured(name="simulation_speedup", value=simulated_s / took_s, limit=1.0, notes=(note,))]
