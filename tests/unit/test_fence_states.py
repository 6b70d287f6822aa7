"""What a fence says, without a database."""

import pytest

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.fence import (
    MOVES,
    SEALED,
    Action,
    Holder,
    Serving,
    Status,
    after,
    serving,
    status_at,
)


@pytest.mark.parametrize(
    ("until", "now", "status"),
    [
        (0, 5_000, Status.OPEN),
        (SEALED, 5_000, Status.SEALED),
        (6_000, 5_000, Status.CLOSED),
        (6_000, 5_999, Status.CLOSED),
        (6_000, 6_000, Status.OPEN),
        (6_000, 4_999, Status.OPEN),  # the clock has gone back to before it closed
        (6_000, 9_000_000, Status.OPEN),
    ],
)
def test_a_fence_is_closed_within_its_window_only(until: int, now: int, status: Status) -> None:
    assert status_at(until, 1_000, now) is status


def test_every_status_has_its_row() -> None:
    assert set(MOVES) == set(Status)
    assert all(set(row) <= set(Action) and set(row.values()) <= set(Status) for row in MOVES.values())


def test_nobody_seals_what_was_not_closed_or_thaws_what_is_sealed() -> None:
    assert [s for s in Status if Action.SEAL in MOVES[s]] == [Status.CLOSED, Status.SEALED]
    assert Action.THAW not in MOVES[Status.SEALED]
    with pytest.raises(Conflict, match="closed cannot remove"):
        after(Status.CLOSED, Action.REMOVE)


def test_who_serves() -> None:
    assert serving(Status.OPEN, Status.SEALED) is Serving.SOURCE
    assert serving(Status.ABSENT, Status.SEALED) is Serving.SOURCE
    assert serving(Status.SEALED, Status.OPEN) is Serving.TARGET
    assert serving(Status.SEALED, Status.SEALED) is Serving.NEITHER
    assert serving(Status.CLOSED, Status.SEALED) is Serving.NEITHER
    assert serving(Status.OPEN, Status.ABSENT) is Serving.BOTH


def test_a_holder_is_told_so_that_people_find_it() -> None:
    shown = str(Holder(pid=7, application="shop", user="app", age_s=3.21, query="UPDATE  x\n SET y = 1"))
    assert shown == "process 7 of app (shop), open for 3.2 s, last statement 'UPDATE x SET y = 1'"
    prepared = Holder(pid=0, application="", user="app", age_s=60.0, query="tx-1")
    assert str(prepared).startswith("prepared transaction 'tx-1' of app")
