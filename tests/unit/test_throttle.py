"""How fast a copy may read, from what the source has to do besides."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.tenant.throttle import (
    FULL,
    Replica,
    SourceLoad,
    Throttle,
    pace,
    rest_s,
    rows_rest_s,
)

LIMITS = Throttle()


def test_an_idle_source_is_copied_flat_out() -> None:
    """A replica that does not say how far it is behind has nothing to replay."""
    assert pace(SourceLoad(replicas=(Replica(name="one"), Replica(name="two", lag_s=4.9))), LIMITS) == FULL


@pytest.mark.parametrize(
    ("load", "share", "why"),
    [
        (
            SourceLoad(replicas=(Replica(name="standby1", lag_s=12.5),)),
            0.7,
            "replica standby1 is 12 s behind",
        ),
        (SourceLoad(active=60), 0.5, "60 statements of others are running on the source"),
        (
            SourceLoad(slot_retained_bytes=16 << 30),
            0.0,
            "the move's slot holds back 17.2 GB of the source's log",
        ),
        (
            SourceLoad(active=21, replicas=(Replica(name="a", lag_s=31.0), Replica(name="b", lag_s=6.0))),
            0.0,
            "replica a is 31 s behind",
        ),
        (SourceLoad(known=False), 0.25, "the source's load cannot be read"),
    ],
)
def test_the_worst_figure_decides_and_is_told(load: SourceLoad, share: float, why: str) -> None:
    """Words for the screen, with the figure in them."""
    found = pace(load, LIMITS)
    assert found.share == pytest.approx(share)
    assert found.why == why


def test_a_bound_of_zero_is_not_looked_at() -> None:
    """What the plan does not want to be measured by."""
    assert pace(SourceLoad(active=10_000), Throttle(active_max=0)) == FULL


@given(
    active=st.integers(0, 500),
    lag=st.floats(0, 100),
    more=st.floats(0, 100),
    held=st.integers(0, 1 << 40),
)
def test_more_load_never_makes_it_faster(active: int, lag: float, more: float, held: int) -> None:
    """The pace lies between standing still and flat out, and falls with every figure."""

    def share(active: int, lag: float) -> float:
        load = SourceLoad(active=active, replicas=(Replica(name="r", lag_s=lag),), slot_retained_bytes=held)
        found = pace(load, LIMITS)
        assert (found.why == "") == (found.share == 1.0)
        return found.share

    assert 0.0 <= share(active + 1, lag + more) <= share(active, lag) <= 1.0


def test_rests_make_the_pace() -> None:
    """Half the time is as long a rest as the work took; a bound on rows counts all workers."""
    assert rest_s(2.0, 1.0) == 0.0
    assert rest_s(2.0, 0.5) == 2.0
    assert rest_s(1.0, 0.25) == 3.0
    assert rows_rest_s(1000, 0.5, 0, 2) == 0.0
    assert rows_rest_s(1000, 0.5, 1000, 2) == 1.5
    assert rows_rest_s(1000, 5.0, 1000, 2) == 0.0
