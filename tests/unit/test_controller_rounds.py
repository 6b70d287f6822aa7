"""How often a migration is looked after."""

from fleetlift.migrate.runner import PAUSE_MOST_S, ROUND_EVERY_S, ROUND_SHARE, pause_after


def test_rounds_keep_their_pace_and_leave_room_for_other_work() -> None:
    assert pause_after(0.01) == ROUND_EVERY_S - 0.01
    assert pause_after(0.4) == 0.4 / ROUND_SHARE - 0.4


def test_a_round_that_waited_for_a_side_that_hangs_is_soon_followed_by_the_next() -> None:
    """While the new side hangs, a revert is followed up every few seconds and not twice a minute."""
    assert pause_after(20.0) == PAUSE_MOST_S
