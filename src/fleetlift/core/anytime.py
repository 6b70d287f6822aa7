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
_UP: Final = tuple((step, math.expm1(step)) for step in _STEPS)
_DOWN: Final = tuple((step, math.expm1(-step)) for step in _STEPS)
_EXTREME: Final = 0.2  # the weight of "nothing ever goes wrong", which is what one hopes for
_LOG_EXTREME: Final = math.log(_EXTREME)
_LOG_WEIGHT: Final = math.log((1 - _EXTREME) / len(_STEPS))
_LOG_EACH: Final = math.log(1 / len(_STEPS))
_SCALES: Final = (1.0, 4.0, 16.0)
_TRIES: Final = 60
_TINY: Final = 1e-12


def share_at_most(n: float, x: float, p0: float, alpha: float) -> bool:
    """Whether `x` of `n` show that the mean rate was not above `p0`."""
    if n <= 0 or p0 <= 0 or x / n >= p0:
        return p0 >= 1
    enough = -math.log(alpha)
    return p0 >= 1 or (_best(n, x, p0) >= enough and _less(n, x, p0) >= enough)


def share_above(n: float, x: float, p0: float, alpha: float) -> bool:
    """Whether `x` of `n` show that the mean rate was above `p0`."""
    if n <= 0 or p0 >= 1 or x / n <= p0:
        return False
    enough = -math.log(alpha)  # and what never happens has not happened
    return p0 <= 0 or (_best(n, x, p0) >= enough and _more(n, x, p0) >= enough)


def share_bounds(n: float, x: float, alpha: float) -> tuple[float, float]:
    """(lower, upper) of the mean rate; each is wrong ever with probability `alpha`."""
    if n <= 0:
        return 0.0, 1.0
    seen, enough = x / n, -math.log(alpha)
    low = _edge(lambda p: _more(n, x, p) - enough, seen, _TINY) if x > 0 else 0.0
    return low, _edge(lambda p: _less(n, x, p) - enough, seen, 1 - _TINY) if x < n else 1.0


def rate_bounds(hours: float, x: float, alpha: float) -> tuple[float, float]:
    """(lower, upper) of events an hour; the upper one is infinite before anything was measured."""
    if hours <= 0:
        return 0.0, math.inf
    seen, enough = x / hours, -math.log(alpha)
    most = seen + 1 / hours
    while _rarer(hours, x, most) < enough:
        most *= 2
    low = _edge(lambda r: _oftener(hours, x, r) - enough, seen, seen * _TINY) if x > 0 else 0.0
    return low, _edge(lambda r: _rarer(hours, x, r) - enough, seen, most)


# Logarithms of the mixtures of likelihood ratios: how much less (more) often things went wrong than at p0.


def _best(n: float, x: float, p0: float) -> float:
    """The alternative that fits best, which no mixture exceeds: often enough to know."""
    wrong = x * math.log(x / (n * p0)) if x > 0 else 0.0
    return wrong + ((n - x) * math.log((n - x) / (n * (1 - p0))) if x < n else 0.0)


def _less(n: float, x: float, p0: float) -> float:
    logs = [_LOG_WEIGHT - x * step - n * math.log1p(p0 * fall) for step, fall in _DOWN]
    return _log_sum([*logs, _LOG_EXTREME - n * math.log1p(-p0)] if x == 0 else logs)


def _more(n: float, x: float, p0: float) -> float:
    return _log_sum([_LOG_EACH + x * step - n * math.log1p(p0 * rise) for step, rise in _UP])


def _rarer(hours: float, x: float, rate: float) -> float:
    logs = [_LOG_WEIGHT - x * step - hours * rate * fall for step, fall in _DOWN]
    return _log_sum([*logs, _LOG_EXTREME + hours * rate] if x == 0 else logs)


def _oftener(hours: float, x: float, rate: float) -> float:
    return _log_sum([_LOG_EACH + x * step - hours * rate * rise for step, rise in _UP])


def margin_of_error(variance: float, scale: float, freedom: float, alpha: float) -> float:
    """How far an estimate with this variance is off at most, to one side, at any time.

    `scale` is the difference that matters: the bound is tightest when the error has come near to it, or,
    since few devices may never bring it there, to some multiples of it. `freedom` is the number of
    independent units behind the variance, less one.
    """
    if variance <= 0:
        return 0.0
    if freedom <= 0:
        return math.inf
    return min(_mixture(variance, scale * times, freedom, alpha / len(_SCALES)) for times in _SCALES)


def _mixture(variance: float, scale: float, freedom: float, alpha: float) -> float:
    ratio = variance / (scale * scale)  # one over information, in units of what is needed
    z = math.sqrt((1 + ratio) * 2 * math.log1p(math.sqrt(1 + 1 / ratio) / (2 * alpha)))
    return _as_student(z, freedom) * math.sqrt(variance)


def _as_student(z: float, freedom: float) -> float:
    """The point of Student's t that is as improbable as `z` is of the normal distribution."""
    exponent = (z * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(exponent)) if exponent < 700 else math.inf


def _edge(excess: Callable[[float], float], inner: float, outer: float) -> float:
    """Where `excess`, negative at `inner` and growing outwards, reaches nought; the outer side of it.

    To five figures, by false position; an end that stays twice loses half of its weight (the Illinois rule).
    """
    at_inner, at_outer = excess(inner), excess(outer)
    if at_outer < 0 or at_inner >= 0:
        return outer
    stayed = 0
    for _ in range(_TRIES):
        middle = (inner * at_outer - outer * at_inner) / (at_outer - at_inner)
        found = excess(middle)
        if found >= 0:
            at_inner, stayed = (at_inner / 2, 1) if stayed == 1 else (at_inner, 1)
            outer, at_outer = middle, found
        else:
            at_outer, stayed = (at_outer / 2, -1) if stayed == -1 else (at_outer, -1)
            inner, at_inner = middle, found
        if abs(outer - inner) <= 1e-5 * abs(outer) or 0 <= found < 1e-4:
            break
    return outer


def _log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(sum([math.exp(one - top) for one in logs]))
