"""Bounds that hold at every moment at once, so that one may look as often as one likes.

A bound of the usual kind is right with probability 95 % when it is looked at once; looked at every second it
is wrong sooner or later for certain. These here are wrong *ever* with probability `alpha` at most.

Two questions are told apart.

*What went wrong on these devices* (`at_most`, `above`, and the bounds made of them). Operations are counted
in the order in which they began. Whatever ties them together, in one device or over time, the likelihood
ratio of any fixed alternative to "the mean rate so far is p0 or more" is at most a martingale, since the
logarithm of a Bernoulli's moment generating function is concave in its mean; a weighted sum of such ratios
exceeds 1/alpha with probability alpha at most (Ville 1939). Sums instead of the best single alternative: the
method of mixtures (Robbins 1970; Howard, Ramdas, McAuliffe, Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", and 2020, "Time-uniform Chernoff bounds via nonnegative
supermartingales"). No assumption about the rate, or about how many devices there are. The same holds of
counts per time, with Poisson's moment generating function.

*What would happen on other devices, equally chosen* (`margin_of_error`). The device is the unit: its
operations count as one observation of a ratio, with a variance from the spread between devices (Cochran
1977, ratio estimator). The error is bounded by the normal mixture over information time, one over the
variance: estimates of this kind have independent increments in it (Scharfstein, Tsiatis, Robins 1997), also
when a device's own rate is constant and more operations teach nothing more; that is an asymptotic confidence
sequence (Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2021, "Time-uniform central limit theory"). With few
devices it is widened as Student's t is (Wallace 1959).

A quantile's bound needs no correction for the many places it might be at: the one test at its true place is
enough (Howard, Ramdas 2022, "Sequential estimation of quantiles with applications to A/B testing and
best-arm identification").
"""

import math
from collections.abc import Callable
from typing import Final

_STEPS: Final = tuple(0.005 * 1.26**k for k in range(31))  # 0.005 … 5: log odds between claim and alternative
_EXTREME: Final = 0.2  # the weight of "nothing ever goes wrong", which is what one hopes for
_WEIGHT: Final = (1 - _EXTREME) / len(_STEPS)
_LOG_WEIGHT: Final = math.log(_WEIGHT)
_LOG_EACH: Final = math.log(1 / len(_STEPS))
_HALVINGS: Final = 40


def share_at_most(n: float, x: float, p0: float, alpha: float) -> bool:
    """Whether `x` of `n` show that the mean rate was not above `p0`."""
    if n <= 0 or p0 <= 0:
        return False
    if p0 >= 1:
        return True
    if x / n >= p0:
        return False
    logs = [math.log(_EXTREME) - n * math.log1p(-p0)] if x == 0 else []
    logs += [_LOG_WEIGHT + _share_ratio(n, x, p0, -step) for step in _STEPS]
    return _log_sum(logs) >= -math.log(alpha)


def share_above(n: float, x: float, p0: float, alpha: float) -> bool:
    """Whether `x` of `n` show that the mean rate was above `p0`."""
    if n <= 0 or p0 >= 1 or x / n <= p0:
        return False
    if p0 <= 0:
        return x > 0  # what never happens has not happened
    return _log_sum([_LOG_EACH + _share_ratio(n, x, p0, step) for step in _STEPS]) >= -math.log(alpha)


def _share_ratio(n: float, x: float, p0: float, step: float) -> float:
    """The log likelihood of odds times e**step over that of p0."""
    return x * step - n * math.log1p(p0 * math.expm1(step))


def rate_at_most(hours: float, x: float, rate: float, alpha: float) -> bool:
    """Whether `x` events in `hours` show that the mean rate was not above `rate`."""
    if hours <= 0 or rate <= 0 or x / hours >= rate:
        return False
    logs = [math.log(_EXTREME) + hours * rate] if x == 0 else []
    logs += [_LOG_WEIGHT - x * step - hours * rate * math.expm1(-step) for step in _STEPS]
    return _log_sum(logs) >= -math.log(alpha)


def rate_above(hours: float, x: float, rate: float, alpha: float) -> bool:
    """Whether `x` events in `hours` show that the mean rate was above `rate`."""
    if hours <= 0 or x / hours <= rate:
        return False
    if rate <= 0:
        return x > 0
    logs = [_LOG_EACH + x * step - hours * rate * math.expm1(step) for step in _STEPS]
    return _log_sum(logs) >= -math.log(alpha)


def share_bounds(n: float, x: float, alpha: float) -> tuple[float, float]:
    """(lower, upper) of the mean rate; each is wrong ever with probability `alpha`."""
    if n <= 0:
        return 0.0, 1.0
    seen = x / n
    low = _edge(lambda p: not share_above(n, x, p, alpha), 0.0, seen) if x > 0 else 0.0
    return low, _edge(lambda p: share_at_most(n, x, p, alpha), seen, 1.0)


def rate_bounds(hours: float, x: float, alpha: float) -> tuple[float, float]:
    """(lower, upper) of events an hour; the upper one is infinite before anything was measured."""
    if hours <= 0:
        return 0.0, math.inf
    seen = x / hours
    most = seen + 1 / hours
    while not rate_at_most(hours, x, most, alpha):
        most *= 2
    low = _edge(lambda r: not rate_above(hours, x, r, alpha), 0.0, seen) if x > 0 else 0.0
    return low, _edge(lambda r: rate_at_most(hours, x, r, alpha), seen, most)


def margin_of_error(variance: float, scale: float, freedom: float, alpha: float) -> float:
    """How far an estimate with this variance is off at most, to one side, at any time.

    `scale` is the difference that matters: the bound is tightest when the error has come near to it.
    `freedom` is the number of independent units behind the variance, less one.
    """
    if variance <= 0:
        return 0.0
    if freedom <= 0:
        return math.inf
    ratio = variance / (scale * scale)  # one over information, in units of what is needed
    z = math.sqrt((1 + ratio) * 2 * math.log1p(math.sqrt(1 + 1 / ratio) / (2 * alpha)))
    return _as_student(z, freedom) * math.sqrt(variance)


def _as_student(z: float, freedom: float) -> float:
    """The point of Student's t that is as improbable as `z` is of the normal distribution."""
    exponent = (z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(exponent)) if exponent < 700 else math.inf


def _edge(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least value in [low, high] from which on `holds`, to one part in 10**12."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(one - top) for one in logs))
