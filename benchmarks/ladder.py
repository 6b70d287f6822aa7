"""The highest rate that a system sustains: short trials at fixed rates to find it, a long one to prove it."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar


class Trial(Protocol):
    """One stretch at one rate. `problem` says what was wrong with it; empty when it was sustained."""

    @property
    def problem(self) -> str: ...


T = TypeVar("T", bound=Trial)


async def highest(
    rates: Sequence[float],
    begin_at: float,
    trial: Callable[[float, float], Awaitable[T]],
    *,
    short_s: float,
    long_s: float,
) -> tuple[float, T, list[tuple[float, T]]]:
    """(rate, its long trial, all trials): the highest of `rates` (ascending) at which a long trial holds.

    `trial(rate, seconds)` is called with short stretches from `begin_at` upwards until one fails, or
    downwards until one holds; then with a long one at the best, and below it while that fails. When none
    holds, the last long trial is returned, with its problem.
    """
    tried: list[tuple[float, T]] = []

    async def holds(rate: float, seconds: float) -> T:
        done = await trial(rate, seconds)
        tried.append((rate, done))
        return done

    at = rates.index(begin_at)
    if (await holds(rates[at], short_s)).problem:
        while at > 0:
            at -= 1
            if not (await holds(rates[at], short_s)).problem:
                break
    else:
        while at + 1 < len(rates) and not (await holds(rates[at + 1], short_s)).problem:
            at += 1
    while (proof := await holds(rates[at], long_s)).problem and at > 0:
        at -= 1
    return rates[at], proof, tried
