"""Range sets behave as sets of integers, whatever the order of additions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.ranges import MAX_MEMBER, MIN_MEMBER, RangeSet

small = st.integers(-30, 30)
anywhere = st.one_of(small, st.integers(MIN_MEMBER, MAX_MEMBER))
members = st.lists(anywhere, max_size=60)


def numbers(found: list[tuple[int, int]]) -> set[int]:
    return {n for start, end in found for n in range(start, end)}


@given(members)
def test_it_holds_what_was_added_and_nothing_else(given_members: list[int]) -> None:
    """Membership, size and the news of each addition agree with a plain set."""
    ranges, plain = RangeSet(), set[int]()
    for n in given_members:
        assert ranges.add(n) == (n not in plain)
        plain.add(n)
        assert ranges.count == len(plain)
    for n in [*given_members, *range(-31, 32)]:
        assert (n in ranges) == (n in plain)
    assert ranges.highest == (max(plain) if plain else None)


@given(members)
def test_ranges_are_sorted_and_never_touch(given_members: list[int]) -> None:
    """The representation is the shortest there is, so equal sets look equal."""
    ranges = RangeSet(given_members)
    edges = [edge for pair in ranges.ranges() for edge in pair]
    assert edges == sorted(set(edges))
    assert ranges == RangeSet(sorted(given_members, reverse=True))


@given(st.lists(st.tuples(small, st.integers(0, 12)), max_size=30))
def test_whole_ranges_are_added_as_their_members_would_be(spans: list[tuple[int, int]]) -> None:
    ranges, plain = RangeSet(), set[int]()
    for start, length in spans:
        new = set(range(start, start + length))
        assert ranges.add_range(start, start + length) == len(new - plain)
        plain |= new
    assert numbers(list(ranges.ranges())) == plain


@given(st.lists(small), small, small)
def test_gaps_are_what_is_missing_between_two_numbers(given_members: list[int], lo: int, hi: int) -> None:
    """Gaps within [lo, hi] are exactly the numbers there that are no members, in rising ranges."""
    found = RangeSet(given_members).gaps(lo, hi)
    assert numbers(found) == set(range(lo, hi + 1)) - set(given_members)
    assert found == sorted(found)
    assert all(start < end for start, end in found)


@given(st.lists(small), st.lists(small))
def test_union_and_difference_agree_with_sets(a: list[int], b: list[int]) -> None:
    left, right = RangeSet(a), RangeSet(b)
    assert numbers(list(left.union(right).ranges())) == set(a) | set(b)
    assert numbers(list(left.minus(right).ranges())) == set(a) - set(b)
    assert left == RangeSet(a), "neither changes the set it is asked of"


@given(members)
def test_the_text_for_postgresql_reads_back_the_same(given_members: list[int]) -> None:
    ranges = RangeSet(given_members)
    assert RangeSet.from_pg(ranges.to_pg()) == ranges


def test_the_text_is_postgresqls_own_form() -> None:
    assert RangeSet([1, 2, 3, 9]).to_pg() == "{[1,4),[9,10)}"
    assert RangeSet().to_pg() == "{}"
    assert RangeSet.from_pg("{[1,3],(5,7]}") == RangeSet([1, 2, 3, 6, 7])


@pytest.mark.parametrize("text", ["", "{", "[1,2)", "{[1,)}", "{(,5)}", "{[1,2)x}", "{[1;2)}"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a multirange"):
        RangeSet.from_pg(text)


@pytest.mark.parametrize("n", [MAX_MEMBER + 1, MIN_MEMBER - 1])
def test_numbers_beyond_int64_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match="int64"):
        RangeSet().add(n)


def test_a_counter_with_no_gaps_costs_one_range() -> None:
    ranges = RangeSet(range(100_000))
    assert (ranges.range_count, ranges.count) == (1, 100_000)
