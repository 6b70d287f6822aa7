"""Completeness from ranges, against counting number by number."""

from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.account import Channel, expected_and_missing
from fleetlift.core.ranges import RangeSet

NUMBERS = st.integers(0, 40)


@given(
    got=st.sets(NUMBERS),
    baseline=st.none() | NUMBERS,
    base=st.integers(-1, 40),
    upto=NUMBERS,
)
def test_what_is_missing_is_what_a_count_finds(
    got: set[int], baseline: int | None, base: int, upto: int
) -> None:
    counted = {n for n in got if baseline is None or n > baseline}
    first = min(counted, default=base + 1)
    due = set(range(first, upto + 1))
    expected, missing = expected_and_missing(
        Channel(baseline=baseline, base=base, upto=upto, got=RangeSet(got))
    )
    assert expected == len(due)
    assert missing == RangeSet(due - counted)
