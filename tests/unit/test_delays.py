"""Delays are counted in buckets fine enough to judge by."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.delays import BUCKETS, EDGES_S, bucket, dense, merge, quantile

delays = st.floats(min_value=0.001, max_value=3600)


def counted(values: list[float]) -> list[int]:
    counts: dict[int, int] = {}
    for value in values:
        counts[bucket(value)] = counts.get(bucket(value), 0) + 1
    return dense(counts)


@given(st.lists(delays, min_size=1), st.sampled_from([0.0, 0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_never_too_low_and_at_most_ten_percent_too_high(values: list[float], q: float) -> None:
    exact = sorted(values)[max(1, math.ceil(q * len(values) - 1e-9)) - 1]
    read = quantile(counted(values), q)
    assert read is not None
    assert exact - 1e-9 <= read <= exact * 1.1 + 1e-8


@given(st.lists(delays), st.lists(delays))
def test_counts_of_two_windows_add_up(a: list[float], b: list[float]) -> None:
    assert merge([counted(a), counted(b)]) == counted(a + b)


def test_every_delay_has_a_bucket() -> None:
    """Clocks that run ahead count as on time, messages later than an hour as late, nonsense as late."""
    assert bucket(-5.0) == bucket(0.0) == bucket(0.001) == 0
    assert bucket(0.0011) == 1
    assert bucket(3600.0) == BUCKETS - 2
    assert bucket(3601.0) == bucket(math.inf) == bucket(math.nan) == BUCKETS - 1
    assert list(EDGES_S) == sorted(set(EDGES_S))


def test_no_messages_have_no_quantile_and_very_late_ones_no_limit() -> None:
    assert quantile([], 0.99) is None
    assert quantile([0, 0], 0.99) is None
    assert quantile(counted([4000.0]), 0.5) == math.inf
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantile([1], 99)
