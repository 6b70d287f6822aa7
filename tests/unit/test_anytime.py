"""Bounds at any time: what they say, and that they are wrong as seldom as they may be."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.anytime import (
    margin_of_error,
    rate_bounds,
    share_above,
    share_at_most,
    share_bounds,
)

COUNTS = st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


@given(COUNTS, st.sampled_from([0.2, 0.05, 0.01]))
def test_bounds_lie_around_what_was_seen_and_agree_with_the_tests(
    counts: tuple[int, int], alpha: float
) -> None:
    n, x = counts
    low, high = share_bounds(n, x, alpha)
    assert 0 <= low <= x / n <= high <= 1
    if high < 1:
        assert share_at_most(n, x, min(high * 1.001, 1), alpha)
        assert not share_at_most(n, x, high * 0.999, alpha)
    if low > 1e-9:
        assert share_above(n, x, low * 0.999, alpha)
        assert not share_above(n, x, low * 1.001, alpha)


@given(COUNTS)
def test_more_confidence_asks_for_more(counts: tuple[int, int]) -> None:
    n, x = counts
    sure, surer = share_bounds(n, x, 0.05), share_bounds(n, x, 0.001)
    assert surer[0] <= sure[0] + 1e-12 and surer[1] >= sure[1] - 1e-12


def test_nothing_seen_in_few_operations_proves_little() -> None:
    """Without a single failure a limit of 2 % takes 200 operations; looked at once it would take 149."""
    assert not share_at_most(150, 0, 0.02, 0.05)
    assert share_at_most(200, 0, 0.02, 0.05)
    assert not share_at_most(10**9, 0, 0.0, 0.05)  # that it never happens is never sure
    assert share_above(10, 1, 0.0, 0.05)


def test_rates_an_hour_have_bounds_too() -> None:
    assert rate_bounds(0, 0, 0.05) == (0.0, math.inf)
    low, high = rate_bounds(100, 50, 0.05)
    assert 0.25 < low < 0.5 < high < 0.85
    assert rate_bounds(10, 0, 0.05)[0] == 0


@pytest.mark.parametrize("p", [0.003, 0.05, 0.5])
def test_looked_at_after_every_operation_a_bound_is_seldom_ever_wrong(p: float) -> None:
    rng, alpha, runs = random.Random(11), 0.1, 200
    wrong_low = wrong_high = 0
    for _ in range(runs):
        x, low_fails, high_fails = 0, False, False
        for n in range(1, 400):
            x += rng.random() < p
            low_fails = low_fails or share_above(n, x, p, alpha)
            high_fails = high_fails or share_at_most(n, x, p, alpha)
        wrong_low, wrong_high = wrong_low + low_fails, wrong_high + high_fails
    assert max(wrong_low, wrong_high) <= alpha * runs + 3 * math.sqrt(alpha * runs)


def test_few_devices_widen_the_error() -> None:
    wide = [margin_of_error(1e-6, 0.005, devices - 1, 0.05) for devices in (2, 5, 10, 100, 10_000)]
    assert wide == sorted(wide, reverse=True)
    assert margin_of_error(1e-6, 0.005, 0, 0.05) == math.inf
    assert 2 * 0.001 < wide[-1] < 4 * 0.001  # some standard errors, not dozens
