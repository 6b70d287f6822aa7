"""The longest time for which any device of a moving fleet got no message acknowledged.

100 devices with ten messages a second each go through a whole migration (telemetry, commands, the link, by
waves and stages) while commands go on. A device's gap is the time in which it had something to say and no
side acknowledged anything. The pause between two of its measurements is part of it: it is never below 0.1 s.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured

if TYPE_CHECKING:
    from small_world import World

# Where the tests have their fleet from, and what it needs.
_TESTS = [Path(__file__).parent.parent / "tests" / part for part in ("", "e2e")]

DEVICES = 100
UNDISTURBED_S = 20.0
WITHIN_S = 300.0
LAG_MAX_S = 0.25  # of the loop that plays the devices; beyond it the gap may be the bench's own

FIGURES = (
    Figure(
        name="gap_s",
        unit="s",
        better="lower",
        target=1.0,
        means="a device's longest time without an acknowledgement while 100 devices are moved",
        limit="the same of the same fleet, before the migration",
    ),
)


class _Lag:
    """How late the loop of this process was at most: the devices live on it."""

    def __init__(self) -> None:
        self.most_s = 0.0

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator["_Lag"]:
        async def watch() -> None:
            while True:
                due = time.monotonic() + 0.02
                await asyncio.sleep(0.02)
                self.most_s = max(self.most_s, time.monotonic() - due)

        task = asyncio.create_task(watch(), name="lag")
        try:
            yield self
        finally:
            task.cancel()


def _forget_gaps(world: "World") -> None:
    for shell in world.fleet.shells.values():
        shell.longest_gap_s, shell.longest_gap_at = 0.0, None


def _longest(world: "World") -> tuple[float, str, float]:
    """(seconds, device, median over the devices) of the longest gaps so far."""
    gaps = sorted((truth.longest_gap_s, name) for name, truth in world.fleet.truth().items())
    return *gaps[-1], gaps[len(gaps) // 2][0]


async def run(bench: Bench) -> list[Measured]:
    sys.path += [str(path) for path in _TESTS if str(path) not in sys.path]
    from small_world import small_world

    devices = 20 if bench.quick else DEVICES
    async with small_world(bench.directory, devices=devices) as world:
        bench.progress("the fleet signs in to the old side")
        await asyncio.sleep(3.0)
        _forget_gaps(world)
        seconds = bench.seconds(UNDISTURBED_S, 5.0)
        for second in range(round(seconds)):
            bench.progress("the fleet, undisturbed", second, seconds, "s")
            await asyncio.sleep(1.0)
        undisturbed_s, _, _ = _longest(world)
        _forget_gaps(world)
        began = time.monotonic()
        roots = {"serve": world.backend.pid, "devices and old side": os.getpid()}
        async with _Lag().watched() as lag, bench.profiled("the migration", roots):
            await world.start()
            while (status := await world.status())["phase"] != "finished":
                if time.monotonic() > began + WITHIN_S or status["phase"] in ("held", "reverted", "failed"):
                    raise BenchFailed(f"the migration is {status['phase']}: {status.get('reason')}")
                bench.progress("the migration", status["devices_new"], devices, "devices")
                await asyncio.sleep(0.2)
        took_s = time.monotonic() - began
        longest_s, device, median_s = _longest(world)
        bench.progress("comparing what was acknowledged with what is stored")
        try:
            await world.nothing_lost_nothing_twice()
        except AssertionError as problem:
            raise BenchFailed(f"lost or done twice: {problem}") from None
        if status["reverts"] or status["stragglers_total"]:
            raise BenchFailed(f"{status['reverts']} reverts, {status['stragglers_total']} stragglers")
    return [
        Measured(
            name="gap_s",
            value=longest_s,
            limit=undisturbed_s,
            invalid=(
                f"the devices' own process was late by {lag.most_s:.2f} s" if lag.most_s > LAG_MAX_S else ""
            ),
            notes=(
                f"{devices} devices moved in {took_s:.0f} s; the longest gap was {device}'s, half of the "
                f"devices had none above {median_s:.2f} s; the devices' process was late by "
                f"{lag.most_s * 1000:.0f} ms at most",
            ),
        )
    ]
