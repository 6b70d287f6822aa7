"""Simulations by seed: one, many at once, and a failing one made smaller."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial

import msgspec
import structlog

from fleetlift.simulate.breakages import broken
from fleetlift.simulate.scenario import draw
from fleetlift.simulate.world import Outcome, World

AT_ONCE = 4  # seeds handed to a process together


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is run: a seed; with `devices` or `faults` (numbers of the seed's own) a smaller case of it."""

    seed: int
    devices: int | None = None
    faults: tuple[int, ...] | None = None
    breakage: str = ""

    @property
    def command(self) -> str:
        """How to run it again and see what happened."""
        parts = [f"fleetlift simulate --seed {self.seed} --runs 1 --trace"]
        if self.devices is not None:
            parts.append(f"--devices {self.devices}")
        if self.faults is not None:
            parts.append(f"--faults {','.join(map(str, self.faults)) or 'none'}")
        if self.breakage:
            parts.append(f"--break {self.breakage}")
        return " ".join(parts)


def simulate(
    seed: int,
    *,
    devices: int | None = None,
    faults: Sequence[int] | None = None,
    breakage: str = "",
    trace: int = 60,
) -> Outcome:
    """One migration. With `trace` the outcome of a broken promise holds so many last lines of the history."""
    with quiet(), broken(breakage) if breakage else contextlib.nullcontext():
        return World(draw(seed, devices, faults)).run(trace=trace)


def run_case(case: Case, trace: int = 60) -> Outcome:
    return simulate(case.seed, devices=case.devices, faults=case.faults, breakage=case.breakage, trace=trace)


def simulate_many(
    seeds: Sequence[int], *, jobs: int = 0, devices: int | None = None, breakage: str = ""
) -> Iterator[Outcome]:
    """Outcomes in the order of the seeds, from `jobs` processes (0: as many as there are processors)."""
    run = partial(_some, devices=devices, breakage=breakage)
    jobs = jobs or len(os.sched_getaffinity(0))
    parts = [seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE)]
    if jobs == 1:
        for part in parts:
            yield from run(part)
        return
    with ProcessPoolExecutor(jobs) as pool:
        waiting: list[Future[list[Outcome]]] = []
        try:
            for part in parts:
                waiting.append(pool.submit(run, part))
                if len(waiting) > 2 * jobs:
                    yield from waiting.pop(0).result()
            for one in waiting:
                yield from one.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _some(seeds: Sequence[int], *, devices: int | None, breakage: str) -> list[Outcome]:
    return [simulate(seed, devices=devices, breakage=breakage) for seed in seeds]


def smaller(case: Case, promise: str, most: int = 40) -> tuple[Case, Outcome]:
    """A smaller case of the same seed that breaks the same promise: without faults that it does not need,
    then with fewer devices. At most so many runs."""
    scenario = draw(case.seed, case.devices, case.faults)
    best = msgspec.structs.replace(case, faults=tuple(sorted(f.number for f in scenario.faults)))
    outcome = run_case(best)
    runs = 0

    def still(candidate: Case) -> Outcome | None:
        nonlocal runs
        runs += 1
        found = run_case(candidate)
        return found if found.violated == promise else None

    for number in best.faults or ():
        rest = tuple(n for n in best.faults or () if n != number)
        if runs < most and (found := still(msgspec.structs.replace(best, faults=rest))):
            best, outcome = msgspec.structs.replace(best, faults=rest), found
    devices = len(scenario.devices)
    while devices > 1 and runs < most:
        fewer = msgspec.structs.replace(best, devices=devices // 2)
        if (found := still(fewer)) is None:
            break
        best, outcome, devices = fewer, found, devices // 2
    return best, outcome


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The product's log says what it always says of faults; here they are the daily bread."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
