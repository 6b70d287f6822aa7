"""How long `fleetlift serve` takes until everything works: the first time, and again on the same directory.

Several starts each, of which the median counts. The programs' files are in memory already, as they are on a
machine that somebody works on.
"""

import asyncio
import time
from pathlib import Path
from statistics import median

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from fleetlift.bus.embedded import EmbeddedNats, random_database_password
from fleetlift.config import overrides_from
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.testing import nats_settings, running_backend

TIMES = 5

FIGURES = (
    Figure(
        name="serve_first_s",
        unit="s",
        better="lower",
        target=5.0,
        means="fleetlift serve on an empty directory, until it says ready",
        limit="initdb, then the start of PostgreSQL and NATS Server alone, side by side",
    ),
    Figure(
        name="serve_again_s",
        unit="s",
        better="lower",
        target=2.0,
        means="fleetlift serve on the same directory again, until it says ready",
        limit="the start of PostgreSQL and NATS Server alone, side by side, on existing files",
    ),
)


async def backend_starts(directory: Path) -> tuple[float, float]:
    """Seconds of the first start and of the second one."""
    began = time.monotonic()
    async with running_backend(directory) as backend:
        first_s = time.monotonic() - began
        if status := await backend.stop():
            raise BenchFailed(f"fleetlift serve stopped with exit status {status}")
        began = time.monotonic()
        await backend.start()
        return first_s, time.monotonic() - began


async def engine_starts(directory: Path) -> tuple[float, float]:
    """The same of the two engines alone."""
    directory.mkdir()
    directory.chmod(0o711)
    settings = nats_settings(directory)
    password = random_database_password()
    took = []
    for _ in range(2):
        postgres = EmbeddedPostgres(
            directory / "pg", password=password, log_file=directory / "postgresql.log"
        )
        nats = EmbeddedNats(
            directory / "nats", settings, log_file=directory / "nats.log", sync=overrides_from().sync
        )
        began = time.monotonic()
        try:
            await asyncio.gather(postgres.start(), nats.start())
            took.append(time.monotonic() - began)
        finally:
            await asyncio.gather(postgres.stop(), nats.stop())
    return took[0], took[1]


async def run(bench: Bench) -> list[Measured]:
    times = 2 if bench.quick else TIMES
    ours, alone = [], []
    await backend_starts(bench.directory / "warm")  # not counted
    for n in range(times):
        bench.progress("starting", n, times, "starts")
        ours.append(await backend_starts(bench.directory / f"backend{n}"))
        alone.append(await engine_starts(bench.directory / f"engines{n}"))
    found = []
    for figure, at in zip(FIGURES, (0, 1), strict=True):
        each = [pair[at] for pair in ours]
        found.append(
            Measured(
                name=figure.name,
                value=median(each),
                limit=median(pair[at] for pair in alone),
                notes=(f"{times} starts: {', '.join(f'{s:.2f}' for s in each)} s",),
            )
        )
    return found
