"""What a sample shows of a gate's limit for sure: within it, beyond it, or not yet either.

Everything is said of harm: of the operations that went wrong, of those that took longer than a time, of
events an hour. A limit of its own (`>= 98%`, `<= 250ms`) is about the devices of the wave and what happens
to them while it bakes. A limit beside the old side's figure is, where other devices give that figure, about
devices: the bounds then allow for the chance that made these devices the wave, and those the control.
"""

import math
from bisect import bisect_left
from enum import StrEnum
from typing import Final

import msgspec
from msgspec.structs import replace

from fleetlift.core.anytime import (
    margin_of_error,
    rate_bounds,
    share_above,
    share_at_most,
    share_bounds,
)
from fleetlift.core.migration import Arm, Basis, Sample, Spread

_LEAST_SHARE: Final = 0.005  # a margin below this is not aimed at: bounds are tightest where it is
_FURTHEST: Final = 1000.0  # so many times what was measured is as good as never


class Figure(StrEnum):
    """How a metric comes about. What is counted is exact; the others are samples of what could happen."""

    COUNTED = "counted"
    SHARE = "share"
    TIME = "time"
    RATE = "rate"


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """A gate's limit, as `core/gates.py` reads it. `quantile`: of a metric of times, else 0."""

    figure: Figure
    higher: bool  # the value is better higher
    absolute: float | None
    ratio: float | None  # of the old side's figure
    margin: float = 0.0  # worse than that by so much
    quantile: float = 0.0


class Assessment(msgspec.Struct, frozen=True, kw_only=True):
    """`low` and `high` bound the value, each at the confidence asked for; infinite: nothing is known."""

    within: bool
    beyond: bool
    low: float
    high: float


def measured(limit: Limit, sample: Sample) -> bool:
    """Whether the sample has the sums that bounds on such a figure are computed from."""
    if limit.figure is Figure.TIME:
        return sample.spread is not None and sample.spread.n > 0
    return sample.arm is not None and sample.arm.n > 0


def compared(limit: Limit, sample: Sample) -> bool:
    """Whether it also has them of the old side."""
    if limit.figure is Figure.TIME:
        return sample.old_spread is not None and sample.old_spread.n > 0
    return sample.old_arm is not None and sample.old_arm.n > 0


def assess(limit: Limit, sample: Sample, confidence: float) -> Assessment:
    """Judge `sample`, of which `measured` holds; a ratio counts only where `compared` holds too.

    The chance of error is shared out to all bounds that an answer rests on, so that "within" is said of a
    value beyond the limit, ever, with a probability of one less `confidence` at most, and "beyond" of one
    within.
    """
    relative = limit.ratio is not None and compared(limit, sample)
    parts = (limit.absolute is not None) + 2 * relative
    alpha = (1 - confidence) / max(parts, 1)
    low, high = _bounds(limit, sample, alpha)
    passes, fails = [False], [True]
    if limit.absolute is not None:
        passes.append(_passes(limit, low, high, limit.absolute))
        fails.append(_fails(limit, low, high, limit.absolute))
    if relative:
        own_low, own_high = _beside(limit, sample, alpha)
        old_low, old_high = _beside(limit, _turned(sample), alpha)
        strict, lax = (old_high, old_low) if limit.higher else (old_low, old_high)
        passes.append(_passes(limit, own_low, own_high, resolved(limit, strict)))
        fails.append(_fails(limit, own_low, own_high, resolved(limit, lax)))
        if passes[-1] or not (any(passes) or _asks_less(limit, sample)):
            low, high = own_low, own_high
    elif limit.ratio is not None:
        fails.append(False)  # the old side's figure could allow more
    return Assessment(within=any(passes), beyond=all(fails), low=low, high=high)


def _asks_less(limit: Limit, sample: Sample) -> bool:
    """Whether the limit of its own is the laxer one, as far as the figures go."""
    if limit.absolute is None or sample.old is None:
        return False
    relative = resolved(limit, sample.old)
    return limit.absolute <= relative if limit.higher else limit.absolute >= relative


def resolved(limit: Limit, old: float) -> float:
    """The limit that the old side's figure makes."""
    assert limit.ratio is not None
    return limit.ratio * old - limit.margin if limit.higher else limit.ratio * old + limit.margin


def still_needed(limit: Limit, sample: Sample, confidence: float) -> float | None:
    """How many times as much would decide, should things go on like this; None: that is not to be seen."""

    def decides(times: float) -> bool:
        found = assess(limit, _grown(sample, times), confidence)
        return found.within or found.beyond

    if not decides(_FURTHEST):
        return None
    low, high = 0.0, math.log(_FURTHEST)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if decides(math.exp(middle)) else (middle, high)
    return math.exp(high)


# -- values and limits -------------------------------------------------------------------------------------


def _passes(limit: Limit, low: float, high: float, at: float) -> bool:
    return low >= at - 1e-9 if limit.higher else high <= at + 1e-9


def _fails(limit: Limit, low: float, high: float, at: float) -> bool:
    return high < at - 1e-9 if limit.higher else low > at + 1e-9


def _turned(sample: Sample) -> Sample:
    """The same, seen from the old side."""
    return replace(
        sample,
        arm=sample.old_arm,
        old_arm=sample.arm,
        spread=sample.old_spread,
        old_spread=sample.spread,
    )


def _bounds(limit: Limit, sample: Sample, alpha: float) -> tuple[float, float]:
    """Of the value, about these devices alone."""
    match limit.figure:
        case Figure.TIME:
            assert sample.spread is not None
            return _times(sample.spread, None, 1 - limit.quantile, alpha)
        case Figure.RATE:
            assert sample.arm is not None
            return rate_bounds(sample.arm.n, sample.arm.x, alpha)
        case _:
            assert sample.arm is not None
            return _value(limit, *share_bounds(sample.arm.n, sample.arm.x, alpha))


def _beside(limit: Limit, sample: Sample, alpha: float) -> tuple[float, float]:
    """Of the value, when it stands beside the figure of other devices."""
    if sample.basis is not Basis.DEVICES:
        return _bounds(limit, sample, alpha)
    if limit.figure is Figure.TIME:
        assert sample.spread is not None and sample.old_spread is not None
        return _times(sample.spread, sample.old_spread, 1 - limit.quantile, alpha)
    one, other = sample.arm, sample.old_arm
    assert one is not None and other is not None
    if limit.figure is Figure.RATE:
        low, high = rate_bounds(one.n, one.x, alpha)
        mean = (one.x + other.x + 1) / (one.n + other.n)
        scale = max(abs((limit.ratio or 1) - 1), 0.1) * mean
    else:
        low, high = share_bounds(one.n, one.x, alpha)
        scale = max(abs((limit.ratio or 1) - 1) + limit.margin / 100, _LEAST_SHARE)
    off = _off_by(one, other, scale, alpha)
    low, high = min(low, one.x / one.n - off), max(high, one.x / one.n + off)
    return (max(low, 0.0), high) if limit.figure is Figure.RATE else _value(limit, low, high)


def _value(limit: Limit, low: float, high: float) -> tuple[float, float]:
    """Bounds of a share that went wrong, as bounds of the value in percent."""
    low, high = 100 * max(low, 0.0), 100 * min(high, 1.0)
    return (100 - high, 100 - low) if limit.higher else (low, high)


# -- times -------------------------------------------------------------------------------------------------


def _times(one: Spread, other: Spread | None, tail: float, alpha: float) -> tuple[float, float]:
    """Of the time that a share `tail` of the operations exceeds, as an edge of a bucket.

    The upper bound is the least edge from which on surely no more than `tail` took longer; the lower one is
    the edge after the last up to which surely more did.
    """

    def off_by(place: int, edge_s: float) -> float:
        if other is None:
            return 0.0
        return _off_by(_at(one, place), _at(other, _place(other, edge_s)), tail / 2, alpha)

    # Fewer took longer than a later edge: where the operations alone are sure, they are so from there on.
    last = len(one.edges_s)
    sure_from = bisect_left(range(last), True, key=lambda i: share_at_most(one.n, one.x[i], tail, alpha))
    high = math.inf
    for place in range(last - 1, sure_from - 1, -1):
        if one.x[place] / one.n + off_by(place, one.edges_s[place]) > tail:
            break
        high = one.edges_s[place]
    # All took longer than the edge before the first one.
    before = (one.n, *one.x[:-1])
    sure_upto = bisect_left(range(last), True, key=lambda i: not share_above(one.n, before[i], tail, alpha))
    low = 0.0
    for place in range(sure_upto):
        if before[place] / one.n - off_by(place - 1, one.edges_s[place - 1] if place else 0.0) <= tail:
            break
        low = one.edges_s[place]
    return low, high


def _place(one: Spread, edge_s: float) -> int:
    """The place of the last edge up to `edge_s`; -1: below all of them."""
    place = -1
    for at, own_s in enumerate(one.edges_s):
        if own_s > edge_s:
            break
        place = at
    return place


def _at(one: Spread, place: int) -> Arm:
    """What took longer than an edge, as what went wrong; below all edges everything did."""
    if place < 0:
        return Arm(devices=one.devices, n=one.n, x=one.n, nn=one.nn, xx=one.nn, nx=one.nn)
    return Arm(devices=one.devices, n=one.n, x=one.x[place], nn=one.nn, xx=one.xx[place], nx=one.nx[place])


# -- devices as units --------------------------------------------------------------------------------------


def _off_by(one: Arm, other: Arm, scale: float, alpha: float) -> float:
    """How far the ratio x / n may be off what equally chosen devices have on the average.

    A few devices of which none has met with harm yet show no difference at all between devices; the
    difference that the other arm shows is then taken to be there too.
    """
    if one.devices < 2:
        return math.inf
    chance = one.x * (1 - one.x / one.n) if one.x < one.n else 0.0  # alike as devices may be, never less
    own = max(_residual(one), chance) / one.n**2
    off = margin_of_error(own, scale, _freedom(one), alpha)
    if other.devices > one.devices:
        theirs = _residual(other)
        implied = max(theirs / other.nn * one.nn, theirs / other.n * one.n) / one.n**2
        off = max(off, margin_of_error(implied, scale, _freedom(other), alpha))
    return off


def _residual(one: Arm) -> float:
    """The sum over devices of (x - ratio * n)**2, made up for the ratio being that of these very devices."""
    ratio = one.x / one.n
    squares = one.xx - 2 * ratio * one.nx + ratio * ratio * one.nn
    return max(squares, 0.0) * one.devices / (one.devices - 1)


def _freedom(one: Arm) -> float:
    """Devices less one; devices that did little count little (Kish's effective sample size)."""
    return min(one.devices, one.n * one.n / one.nn) - 1


# -- more of the same --------------------------------------------------------------------------------------


def _grown(sample: Sample, times: float) -> Sample:
    return replace(
        sample,
        arm=_grown_arm(sample.arm, times),
        old_arm=_grown_arm(sample.old_arm, times),
        spread=_grown_spread(sample.spread, times),
        old_spread=_grown_spread(sample.old_spread, times),
    )


def _grown_arm(one: Arm | None, times: float) -> Arm | None:
    """The same devices after `times` as much: chance evens out within a device, not between devices."""
    if one is None or one.n <= 0:
        return one
    ratio = one.x / one.n
    squares = max(one.xx - 2 * ratio * one.nx + ratio * ratio * one.nn, 0.0)
    chance = min(squares, one.x * max(1 - ratio, 0.0))
    return replace(
        one,
        n=one.n * times,
        x=one.x * times,
        nn=one.nn * times**2,
        nx=one.nx * times**2,
        xx=one.xx * times**2 - (times**2 - times) * chance,
    )


def _grown_spread(one: Spread | None, times: float) -> Spread | None:
    if one is None or one.n <= 0:
        return one
    arms = [_grown_arm(_at(one, place), times) for place in range(len(one.edges_s))]
    return replace(
        one,
        n=one.n * times,
        nn=one.nn * times**2,
        x=tuple(a.x for a in arms if a is not None),
        xx=tuple(a.xx for a in arms if a is not None),
        nx=tuple(a.nx for a in arms if a is not None),
    )
