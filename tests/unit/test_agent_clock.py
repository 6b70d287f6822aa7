"""A device whose clock is wrong, or jumps: limits hold by elapsed time, expiries by the sides' clock."""

import pytest
from agent_world import NEW, OLD, World, flags, orders

from fleetlift.core.orders import DevicePhase
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings

S = m.AnswerStatus
ALL_NEW = flags("new", "new", "new")
HOUR = 3600.0
OFF = [HOUR, -HOUR, 9 * 86_400.0, -9 * 86_400.0]


@pytest.mark.parametrize("off_s", OFF)
def test_a_wrong_clock_refuses_no_command_that_is_still_good(off_s: float) -> None:
    w = World()
    w.jump(off_s)
    w.crash()
    w.run(1)
    w.command(OLD, "c1", for_s=20)
    w.run(1)
    assert w.executed == ["c1"]


@pytest.mark.parametrize("off_s", OFF)
def test_a_wrong_clock_carries_out_no_command_that_has_expired(off_s: float) -> None:
    """The old side hands out a command that waited too long: an hour's error must not make it good again."""
    w = World()
    w.jump(off_s)
    w.crash()
    w.run(1)
    w.command(OLD, "c1", for_s=-5)
    w.run(1)
    assert w.executed == [] and w.sides[OLD].final("c1") == [S.EXPIRED]


@pytest.mark.parametrize("off_s", OFF)
def test_a_clock_that_jumps_between_two_commands_changes_nothing(off_s: float) -> None:
    """The side told its time before the jump; by how much the clock was set is known well enough."""
    w = World()
    w.run(1)
    w.jump(off_s)
    w.command(OLD, "good", for_s=60)
    w.command(OLD, "expired", for_s=-15)
    w.run(1)
    assert w.executed == ["good"] and w.sides[OLD].final("expired") == [S.EXPIRED]


@pytest.mark.parametrize("off_s", OFF)
def test_what_waited_on_the_new_side_is_judged_once_that_has_told_its_time(off_s: float) -> None:
    """After a start with the old link closed, commands come before the answer that carries the time."""
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.set_state(NEW, "away")
    w.command(NEW, "good", for_s=100)
    w.command(NEW, "expired", for_s=4)
    w.run(8)
    w.set_state(NEW, "ok")
    w.jump(off_s)
    w.crash()
    w.run(5)
    assert w.executed == ["good"], w
    assert w.sides[NEW].final("expired") == [S.EXPIRED]


def test_a_side_that_tells_no_time_is_taken_at_the_devices_own() -> None:
    w = World()
    w.tell_time = False
    w.crash()
    w.run(1)
    w.move(ALL_NEW)
    w.command(NEW, "c1", for_s=20)
    w.run(1)
    assert w.executed == ["c1"]


@pytest.mark.parametrize("off_s", [9 * 86_400.0, 10 * 365 * 86_400.0])
def test_a_clock_far_ahead_forgets_no_command_and_so_none_is_done_twice(off_s: float) -> None:
    w = World()
    w.run(1)
    w.move(flags("both", "both"))
    w.command(OLD, "c1")
    w.run(1)
    w.set_state(OLD, "away")
    w.set_state(NEW, "away")
    w.jump(off_s)
    w.crash()
    w.run(12)  # a sign of life, at which ids are forgotten
    w.set_state(OLD, "ok")
    w.set_state(NEW, "ok")
    w.run(25)
    w.command(NEW, "c1")
    w.run(1)
    assert w.executed == ["c1"] and w.sides[NEW].final("c1") == [S.DUPLICATE]


@pytest.mark.parametrize("off_s", OFF)
def test_a_jump_fails_no_try(off_s: float) -> None:
    w = World()
    w.run(1)
    w.order(OLD, orders(1, flags("both", "both")))
    w.run(5)
    assert w.in_phase(DevicePhase.TRYING)
    w.jump(off_s)
    w.run(20)
    assert w.in_phase(DevicePhase.TRYING)
    w.run(15)
    assert w.in_phase(DevicePhase.WENT_BACK), "and makes none longer either"


@pytest.mark.parametrize("off_s", OFF)
def test_a_jump_makes_no_side_lost(off_s: float) -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.set_state(NEW, "away")
    w.run(10)
    w.jump(off_s)
    w.run(15)
    assert w.in_phase(DevicePhase.MOVED)
    w.run(10)
    assert w.in_phase(DevicePhase.WENT_BACK)


def test_a_device_that_stood_still_does_not_take_its_side_for_lost() -> None:
    """A process that was stopped for minutes looks like a clock that was set on."""
    w = World()
    w.run(1)
    w.move(flags("both", "both"))
    w.run(1)
    w.set_state(NEW, "away")
    w.run(5)
    w.now += 300.0
    w.run(0.1)
    w.set_state(NEW, "ok")
    w.run(21)
    assert w.in_phase(DevicePhase.MOVED) and w.sides[NEW].connected


def test_a_moved_device_that_starts_again_and_again_goes_back() -> None:
    """A watchdog that restarts it for want of a connection, before the limit of a lost side is over."""
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.set_state(NEW, "away")
    for _ in range(AgentSettings().starts_unserved_max + 1):
        w.run(9)
        w.crash()
    assert w.in_phase(DevicePhase.WENT_BACK)
    w.run(5)
    assert w.sides[OLD].reports[-1].reason == "started 5 times without being served by the new side"


def test_starts_in_between_which_the_new_side_serves_do_not_add_up() -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    for _ in range(20):
        w.run(2)
        w.crash()
    w.run(1)
    assert w.in_phase(DevicePhase.MOVED) and w.disk.record.starts_unserved == 0


def test_an_order_is_reported_only_once_it_is_stored_whatever_else_comes() -> None:
    """A stale order asks for a report of what holds; that must wait for the disk too."""
    w = World()
    w.run(1)
    w.fill_disk()
    w.order(OLD, orders(5, ALL_NEW))
    w.run(0.1)
    w.order(OLD, orders(4, ALL_NEW))
    w.run(1)
    assert not w.sides[OLD].reports
    w.free_disk()
    w.run(1)
    assert w.sides[OLD].reports[-1].epoch == 5


def test_where_it_was_served_before_is_tried_when_the_newest_order_leads_nowhere() -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.order(NEW, orders(2, ALL_NEW, credential="wrong"))
    w.run(5)
    assert w.in_phase(DevicePhase.TRYING)
    w.set_state(OLD, "away")
    w.run(120)
    assert w.in_phase(DevicePhase.WENT_BACK)
    w.order(NEW, orders(3, ALL_NEW))
    w.probe(3)
    w.until(lambda: w.in_phase(DevicePhase.MOVED), 60)


def test_a_full_disk_that_takes_orders_lets_them_be_reported() -> None:
    """Telemetry waits for room; a move, a revert and a command need none."""
    w = World()
    w.run(1)
    w.set_state(OLD, "silent")
    w.fill_disk()
    w.produce(3)
    w.set_state(OLD, "ok")
    w.order(OLD, orders(7, flags()))
    w.command(OLD, "c1")
    w.run(0.2)
    tokens = [one for one in w.unstored if isinstance(one, int)]
    assert not w.sides[OLD].reports and w.executed == []
    for token in tokens[3:]:
        for changes in w.unstored:
            if not isinstance(changes, int) and not any(isinstance(c, m.EntryAdded) for c in changes):
                w.disk.apply(changes)
        w.feed(m.Stored(token, alone=True))
    w.run(0.2)
    assert w.sides[OLD].reports[-1].epoch == 7 and w.executed == ["c1"]
    assert not w.sides[OLD].stored, "what is not on disk is not sent"
    w.free_disk()
    w.run(15)
    assert w.drained() and not w.lost() and w.sides[OLD].final("c1") == [S.SUCCEEDED]


@pytest.mark.parametrize("off_s", OFF)
def test_a_jump_keeps_no_message_longer_than_a_power_cut_asks_for(off_s: float) -> None:
    """A clock set back by an hour would else keep an hour's telemetry on the device's disk."""
    w = World()
    w.move(ALL_NEW)
    w.produce()
    w.run(0.1)
    w.jump(off_s)
    for _ in range(6):
        w.produce()
        w.run(1)
    assert len(w.disk.outbox) <= 3
