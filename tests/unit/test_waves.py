"""Who moves when: an order that is set once, of which each wave takes a longer beginning."""

from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.units import Share
from fleetlift.core.waves import approved, chosen, newcomers, ordered

IDS = st.sets(st.text("abcdef0123456789", min_size=1, max_size=6), max_size=60)
SHARES = st.one_of(
    st.builds(Share, devices=st.integers(1, 100)), st.builds(Share, percent=st.integers(1, 100).map(float))
)


@given(IDS, st.lists(st.sampled_from("abcdef")))
def test_each_device_stands_in_the_order_once_and_canaries_first(ids: set[str], canaries: list[str]) -> None:
    order = ordered("m", canaries, ids)
    assert sorted(order) == sorted(ids)
    first = [c for c in dict.fromkeys(canaries) if c in ids]
    assert list(order[: len(first)]) == first


@given(IDS)
def test_the_order_does_not_depend_on_how_the_fleet_was_listed(ids: set[str]) -> None:
    assert ordered("m", (), sorted(ids)) == ordered("m", (), sorted(ids, reverse=True))


def test_another_migration_has_another_order() -> None:
    ids = [f"car-{n}" for n in range(50)]
    assert ordered("one", (), ids) != ordered("two", (), ids)


@given(IDS, IDS)
def test_who_joins_later_comes_after_all_others(first: set[str], later: set[str]) -> None:
    ranks = newcomers("m", (), {}, first)
    joined = newcomers("m", (), ranks, later | first)
    assert set(joined) == later - first
    assert all(rank >= len(first) for rank in joined.values())
    assert sorted({**ranks, **joined}.values()) == list(range(len(first | later)))


@given(st.lists(SHARES, min_size=1, max_size=5), st.integers(0, 500))
def test_no_step_may_go_further_than_those_before_it(shares: list[Share], total: int) -> None:
    limit = approved(shares, total)
    assert limit <= total
    assert all(limit <= share.of(total) for share in shares)


@given(SHARES, SHARES, st.integers(0, 500))
def test_only_the_last_wave_of_a_rung_takes_the_control(share: Share, control: Share, total: int) -> None:
    early = approved((share,), total, control=control, last=False)
    assert early == min(share.of(total), total - control.of(total))
    assert approved((share,), total, control=control, last=True) == share.of(total)


@given(IDS, st.lists(st.tuples(SHARES, IDS, IDS), max_size=8))
def test_a_device_once_raised_stays_and_no_wave_raises_more_than_approved(
    ids: set[str], waves: list[tuple[Share, set[str], set[str]]]
) -> None:
    """Whatever the percentages do, whoever joins or leaves between the waves."""
    ranks = newcomers("m", (), {}, ids)
    fleet = set(ids)
    raised: set[str] = set()
    for share, join, leave in waves:
        fleet = (fleet | join) - leave
        ranks.update(newcomers("m", (), ranks, fleet))
        limit = approved((share,), len(fleet))
        picked = chosen(((ranks[d], d) for d in fleet - raised), len(raised), limit)
        assert len(set(picked)) == len(picked)
        assert not raised & set(picked)
        if picked:
            assert len(raised) + len(picked) <= limit
            others = fleet - raised - set(picked)
            assert all(ranks[d] < ranks[o] for d in picked for o in others)
        raised |= set(picked)
