"""Times that are counted together are what a histogram would have recorded one by one."""

from hypothesis import given
from hypothesis import strategies as st

from fleetlift.load import histograms

TIMES = st.lists(st.floats(min_value=0, max_value=4000), max_size=60)


@given(TIMES, st.integers(1, 10))
def test_times_counted_together_are_those_recorded_one_by_one(given_s: list[float], at_least: int) -> None:
    times, one_by_one = histograms.Times(), histograms.empty()
    for seconds in given_s:
        times.note(seconds)
        times.count(at_least)
        histograms.record(one_by_one, seconds)
    together = histograms.laid(times.take())
    assert together.get_total_count() == len(given_s)
    for percent in (1, 50, 99, 100):
        assert together.get_value_at_percentile(percent) == one_by_one.get_value_at_percentile(percent)
    assert not times.take()


@given(TIMES.filter(bool))
def test_a_percentile_of_counts_is_the_histograms(given_s: list[float]) -> None:
    times, histogram = histograms.Times(), histograms.empty()
    for seconds in given_s:
        times.note(max(seconds, 1e-6))
        histograms.record(histogram, seconds)
    found = histograms.percentile_s(times.take(), 99)
    there = histograms.quantiles(histogram).p99_s
    assert there * 0.999 - 2e-6 <= found <= there or there >= 3600


def test_there_is_nothing_of_nothing() -> None:
    assert histograms.percentile_s(histograms.Times().take(), 99) == 0.0
