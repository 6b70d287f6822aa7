"""Simulations by seed."""

import contextlib
import logging
from collections.abc import Iterator, Sequence

import structlog

from fleetlift.simulate.scenario import draw
from fleetlift.simulate.world import Outcome, World


def simulate(
    seed: int, *, devices: int | None = None, faults: Sequence[int] | None = None, trace: int = 200
) -> Outcome:
    """One migration. `devices` and `faults` (numbers of the seed's own) make a smaller case of the same."""
    with quiet():
        return World(draw(seed, devices, faults)).run(trace=trace)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The product's log says what it always says of faults; here they are the daily bread."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
