"""The device's side of the bargain, on a simulated network, disk and clock."""

import itertools
import random
from collections.abc import Callable

import pytest
from agent_world import NEW, OLD, World, flags, orders

from fleetlift.core.orders import HEALTH_CHANNEL, DevicePhase, Endpoint, Flags, LinkFlag, TelemetryFlag
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings
from fleetlift.device.moves import MOVES, Cause, IllegalMove

S = m.AnswerStatus
BOTH = flags("both")
ALL_NEW = flags("new", "new", "new")


# --- telemetry ---------------------------------------------------------------------------------------------


def test_an_unmoved_device_sends_by_the_old_side_only() -> None:
    w = World()
    w.run(1)
    w.produce(100)
    w.run(1)
    assert [w.sides[OLD].stored.get(("can", n)) for n in range(1, 101)] == list(w.bodies.values())
    assert not w.sides[NEW].stored and w.drained() and not w.disk.outbox


def test_what_is_produced_without_a_link_waits_and_is_sent_in_order() -> None:
    w = World()
    w.set_state(OLD, "away")
    w.produce(500)
    w.run(30)
    assert w.agent.outbox_depth >= 500
    w.set_state(OLD, "ok")
    w.run(20)
    assert w.drained() and not w.lost()
    assert [seq for channel, seq in w.sides[OLD].stored if channel == "can"] == list(range(1, 501))


def test_seq_goes_on_after_a_restart_and_nothing_unsent_is_lost() -> None:
    w = World()
    w.run(1)
    for _ in range(5):
        w.produce(50)
        w.run(w.random.random() / 20)
        w.crash()
    w.run(5)
    assert w.produced["can"] == 250 and not w.lost() and w.drained()


def test_in_both_a_message_leaves_the_outbox_only_when_both_sides_have_it() -> None:
    w = World()
    w.run(1)
    w.move(BOTH)
    w.set_state(NEW, "silent")
    w.produce(10)
    w.run(0.5)
    assert len([k for k in w.sides[OLD].stored if k[0] == "can"]) == 10
    assert len([k for k in w.disk.outbox if k[0] == "can"]) == 10


@pytest.mark.parametrize("sequence", list(itertools.permutations(["old", "both", "new"])))
def test_no_change_of_flags_loses_or_doubles_a_message(sequence: tuple[str, ...]) -> None:
    """Messages are on the way at each change, and each side keeps one copy of a (channel, seq)."""
    w = World()
    w.run(1)
    for telemetry in (*sequence, *reversed(sequence)):
        w.produce(40)
        w.run(0.015)
        w.move(flags(telemetry))
        w.produce(40)
        w.run(0.005)
    w.run(5)
    assert not w.lost() and w.drained()
    on_old, on_new = w.sides[OLD].stored, w.sides[NEW].stored
    assert {**on_old, **on_new} == w.bodies


def test_a_full_outbox_refuses_new_telemetry_and_counts_it() -> None:
    """Never the oldest is dropped: what was taken is kept, what is not taken gets no seq."""
    w = World(settings=AgentSettings(outbox_max=100))
    w.set_state(OLD, "away")
    w.produce(150)
    assert (w.agent.outbox_depth, w.agent.refused) == (100, 50)
    w.set_state(OLD, "ok")
    w.run(20)
    w.produce(1)
    w.run(1)
    assert max(seq for channel, seq in w.sides[OLD].stored if channel == "can") == 101 and not w.lost()


def test_a_dead_new_side_does_not_fill_the_outbox_against_the_old_one() -> None:
    """In `both`, what the old side has stored makes room when the outbox is full."""
    w = World(settings=AgentSettings(outbox_max=100))
    w.run(1)
    w.move(BOTH, new_lost_limit_s=600)
    w.set_state(NEW, "away")
    for _ in range(300):
        w.produce(1)
        w.run(0.1)
    assert w.agent.refused == 0 and w.agent.shed > 150 and not w.lost()
    assert len([k for k in w.sides[OLD].stored if k[0] == "can"]) == 300


def test_health_is_told_every_ten_seconds() -> None:
    w = World()
    w.run(61)
    health = [body for (channel, _), body in w.sides[OLD].stored.items() if channel == HEALTH_CHANNEL]
    assert len(health) == 6 and b'"links":{"old":"up","new":"down"}' in health[0]


def test_a_link_that_owes_acknowledgements_is_made_anew() -> None:
    w = World()
    w.run(1)
    w.set_state(OLD, "silent")
    w.produce(5)
    w.run(8)
    w.set_state(OLD, "ok")
    w.run(15)
    assert w.drained() and not w.lost()


# --- commands ----------------------------------------------------------------------------------------------


def test_a_command_is_acknowledged_executed_and_answered() -> None:
    w = World()
    w.run(1)
    w.command(OLD, "c1")
    w.run(1)
    assert w.executed == ["c1"]
    assert w.sides[OLD].answers == [("c1", S.ACKNOWLEDGED), ("c1", S.SUCCEEDED)]


@pytest.mark.parametrize("first", [OLD, NEW])
def test_in_both_the_first_copy_is_executed_and_the_second_answered_duplicate(first: m.Path) -> None:
    w = World()
    w.run(1)
    w.move(flags("both", "both"))
    second = NEW if first is OLD else OLD
    w.command(first, "c1")
    w.run(0.03)
    w.command(second, "c1")
    w.run(1)
    assert w.executed == ["c1"]
    assert w.sides[first].final("c1") == [S.SUCCEEDED]
    assert w.sides[second].final("c1") == [S.DUPLICATE]


def test_a_duplicate_is_refused_after_a_restart() -> None:
    w = World()
    w.run(1)
    w.move(flags("both", "both"))
    w.command(OLD, "c1")
    w.run(1)
    w.crash()
    w.run(1)
    w.command(NEW, "c1")
    w.run(1)
    assert w.executed == ["c1"] and w.sides[NEW].final("c1") == [S.DUPLICATE]


def test_a_second_copy_by_the_same_path_gets_the_first_ones_answer_again() -> None:
    """The side asks again because it may have lost the answer."""
    w = World()
    w.run(1)
    w.command(OLD, "c1")
    w.run(1)
    w.crash()
    w.run(1)
    w.command(OLD, "c1")
    w.run(1)
    assert w.executed == ["c1"] and w.sides[OLD].final("c1") == [S.SUCCEEDED, S.SUCCEEDED]


def test_a_command_cut_off_by_a_crash_is_answered_failed_and_never_begun_again() -> None:
    w = World()
    w.finish_commands = False
    w.run(1)
    w.command(OLD, "c1")
    w.run(1)
    assert w.executed == ["c1"]
    w.crash()
    w.run(2)
    assert w.executed == ["c1"] and set(w.sides[OLD].final("c1")) == {S.FAILED}


def test_an_answer_that_was_not_acknowledged_is_given_again() -> None:
    w = World()
    w.run(1)
    w.command(OLD, "c1")
    w.run(0.06)
    w.break_link(OLD)
    w.crash()
    w.run(5)
    assert w.executed == ["c1"] and w.sides[OLD].final("c1")


def test_a_command_that_comes_after_its_expiry_is_refused() -> None:
    w = World()
    w.run(1)
    w.command(OLD, "c1", for_s=-1)
    w.run(1)
    assert w.executed == [] and w.sides[OLD].final("c1") == [S.EXPIRED]


def test_in_dry_run_the_new_sides_copy_says_what_it_would_do_and_the_old_one_does_it() -> None:
    w = World()
    w.run(1)
    w.move(flags("both", "dry-run"))
    for path in (NEW, OLD):
        w.command(path, "c1")
        w.command(path, "c2", "explode")
    w.run(1)
    assert w.executed == ["c1", "c2"]  # the application itself refuses c2
    assert w.sides[NEW].final("c1") == [S.WOULD_EXECUTE]
    assert w.sides[NEW].final("c2") == [S.WOULD_REFUSE]
    assert w.sides[OLD].final("c1") == [S.SUCCEEDED]


def test_a_callers_own_dry_run_is_never_executed() -> None:
    w = World()
    w.run(1)
    w.command(OLD, "c1", dry_run=True)
    w.run(1)
    assert w.executed == [] and w.sides[OLD].final("c1") == [S.WOULD_EXECUTE]


@pytest.mark.parametrize(
    ("commands", "executes_old", "executes_new"),
    [("old", True, False), ("both", True, True), ("new", False, True)],
)
def test_only_a_side_that_the_flags_name_is_obeyed(
    commands: str, executes_old: bool, executes_new: bool
) -> None:
    w = World()
    w.run(1)
    w.move(flags("both", commands))
    w.command(OLD, "by-old")
    w.command(NEW, "by-new")
    w.run(1)
    assert ("by-old" in w.executed, "by-new" in w.executed) == (executes_old, executes_new)


def test_ids_are_forgotten_only_after_commands_have_long_expired() -> None:
    w = World(settings=AgentSettings(remember_commands_s=3600))
    w.run(1)
    w.command(OLD, "c1", for_s=100)
    w.run(3500)
    assert "c1" in w.disk.commands
    w.run(300)
    assert "c1" not in w.disk.commands


# --- the move ----------------------------------------------------------------------------------------------


def test_a_move_is_prepared_tried_and_committed_and_both_sides_hear_of_it() -> None:
    w = World()
    w.run(1)
    epoch = w.move(BOTH)
    w.run(1)
    assert w.in_phase(DevicePhase.MOVED)
    assert w.sides[NEW].tries >= 1
    for side in w.sides.values():
        assert (side.reports[-1].epoch, side.reports[-1].phase) == (epoch, DevicePhase.MOVED)
        assert side.reports[-1].flags == BOTH


def test_until_the_try_has_succeeded_everything_stays_with_the_old_side() -> None:
    w = World()
    w.run(1)
    w.order(OLD, orders(1, flags("new", "new", "new")))  # no probe: the command's round trip is missing
    w.run(10)
    w.produce(10)
    w.run(1)
    assert w.in_phase(DevicePhase.TRYING) and w.agent.flags == Flags()
    assert len([k for k in w.sides[OLD].stored if k[0] == "can"]) == 10
    assert not w.sides[NEW].stored


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("refusing", "no connection within 30 s: refused"),
        ("away", "no connection within 30 s: no answer"),
        ("silent", "no round trip of telemetry, shadow, command"),
        ("denying", "subscription refused"),
    ],
)
def test_a_try_that_fails_ends_on_the_old_side_and_says_why(state: str, why: str) -> None:
    w = World()
    w.run(1)
    w.set_state(NEW, state)
    w.order(OLD, orders(1, ALL_NEW))
    w.run(35)
    assert w.in_phase(DevicePhase.WENT_BACK) and w.agent.flags == Flags()
    assert why in w.sides[OLD].reports[-1].reason
    assert w.agent.link(OLD) is m.LinkState.UP and w.agent.link(NEW) is m.LinkState.DOWN


def test_a_try_without_a_probe_fails_and_names_the_missing_leg() -> None:
    w = World()
    w.run(1)
    w.order(OLD, orders(1, BOTH))
    w.run(35)
    assert w.sides[OLD].reports[-1].reason == "try failed: no round trip of command within 30 s"


def test_a_device_that_went_back_stays_there_until_a_newer_epoch() -> None:
    w = World()
    w.run(1)
    w.set_state(NEW, "refusing")
    w.order(OLD, orders(5, BOTH))
    w.run(40)
    w.set_state(NEW, "ok")
    w.probe()
    w.order(OLD, orders(5, BOTH))
    w.run(60)
    assert w.in_phase(DevicePhase.WENT_BACK)
    w.move(BOTH, 6)
    assert w.in_phase(DevicePhase.MOVED)


def test_an_older_epoch_is_refused_and_the_side_is_told_what_holds() -> None:
    w = World()
    w.run(1)
    w.move(BOTH, 7)
    w.run(1)
    told = len(w.sides[OLD].reports)
    w.order(OLD, orders(6, Flags()))
    w.run(1)
    assert w.agent.flags == BOTH and w.agent.stale_orders == 1
    assert [r.epoch for r in w.sides[OLD].reports[told:]] == [7]


def test_the_old_link_is_closed_only_once_the_new_one_serves() -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    assert w.agent.link(OLD) is m.LinkState.DOWN and not w.sides[OLD].connected
    assert w.sides[OLD].reports[-1].phase is DevicePhase.MOVED
    w.produce(20)
    w.run(1)
    assert w.drained() and not w.lost()


def test_the_old_link_stays_open_while_any_work_is_left_for_the_old_side() -> None:
    """Flags that contradict each other strand nothing."""
    w = World()
    w.run(1)
    w.move(flags("both", "new", "new"))
    w.produce(20)
    w.run(1)
    assert w.sides[OLD].connected and w.drained() and not w.lost()


def test_a_new_side_lost_for_less_than_the_limit_is_waited_for() -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.set_state(NEW, "away")
    w.produce(20)
    w.run(20)
    assert w.in_phase(DevicePhase.MOVED) and w.agent.outbox_depth >= 20
    w.set_state(NEW, "ok")
    w.run(20)
    assert w.in_phase(DevicePhase.MOVED) and w.drained() and not w.lost()


@pytest.mark.parametrize("f", [BOTH, flags("new", "new"), ALL_NEW], ids=["both", "new", "closed"])
@pytest.mark.parametrize("state", ["refusing", "away", "silent", "denying"])
def test_a_new_side_lost_for_longer_than_the_limit_sends_the_device_back(f: Flags, state: str) -> None:
    """The dead-man revert; flapping, or being connected without being served, is lost as well."""
    w = World()
    w.run(1)
    w.move(f)
    w.run(1)
    w.set_state(NEW, state)
    if state == "denying":
        w.break_link(NEW)
    w.produce(30)
    w.run(50)
    w.produce(30)
    w.run(10)
    assert w.in_phase(DevicePhase.WENT_BACK) and w.agent.flags == Flags()
    assert w.sides[OLD].connected and "new side lost for" in w.sides[OLD].reports[-1].reason
    assert w.drained() and not w.lost()


def test_a_side_that_hangs_is_lost_since_it_owes_an_answer() -> None:
    """Connected and silent is as lost as gone: the limit counts from the first message left unanswered."""
    w = World()
    w.run(1)
    w.move(BOTH, new_lost_limit_s=20.0)
    w.run(1)
    w.set_state(NEW, "silent")
    w.produce(5)
    w.run(18)
    assert w.in_phase(DevicePhase.MOVED)
    w.run(3)
    assert w.in_phase(DevicePhase.WENT_BACK)


def test_once_moved_a_new_order_applies_at_once() -> None:
    w = World()
    w.run(1)
    w.move(BOTH)
    w.run(1)
    w.order(OLD, orders(2, flags("new", "dry-run"), new=None, credential=None))
    w.run(0.2)
    assert w.in_phase(DevicePhase.MOVED) and w.agent.flags == flags("new", "dry-run")


def test_a_moved_device_takes_orders_by_the_new_side_alone() -> None:
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.order(NEW, orders(2, Flags(), new=None, credential=None))
    w.run(5)
    assert w.in_phase(DevicePhase.OLD)
    assert w.sides[OLD].connected and not w.sides[NEW].connected
    assert w.sides[NEW].reports[-1].phase is DevicePhase.OLD  # said before the link was closed


def test_a_revert_works_while_the_new_side_is_down() -> None:
    w = World()
    w.run(1)
    w.move(flags("both", "both"))
    w.set_state(NEW, "away")
    w.order(OLD, orders(2, Flags(), new=None, credential=None))
    w.run(0.5)
    assert w.in_phase(DevicePhase.OLD) and w.agent.flags == Flags()


def test_orders_for_another_endpoint_are_tried_there() -> None:
    w = World()
    w.run(1)
    w.move(BOTH)
    w.run(1)
    w.log.clear()
    w.move(BOTH, new=Endpoint(host="other.example.com", port=1883))
    assert [a.endpoint.host for a in w.log if isinstance(a, m.ConnectNew)] == ["other.example.com"]


def test_orders_without_an_endpoint_fail_the_try_at_once() -> None:
    w = World()
    w.run(1)
    w.order(OLD, orders(1, BOTH, new=None))
    w.run(1)
    assert w.in_phase(DevicePhase.WENT_BACK) and "names no endpoint" in w.agent.record.reason


def test_a_try_goes_on_after_a_restart_but_not_for_longer() -> None:
    w = World()
    w.run(1)
    w.set_state(NEW, "away")
    w.order(OLD, orders(1, BOTH))
    for _ in range(4):
        w.run(8)
        w.crash()
    w.run(1)
    assert w.in_phase(DevicePhase.WENT_BACK)


def test_a_device_whose_old_side_is_gone_listens_on_the_new_one_for_orders() -> None:
    """Whatever went wrong, one of two sides that accepts it gets to talk to it."""
    w = World()
    w.run(1)
    w.move(ALL_NEW)
    w.run(1)
    w.set_state(OLD, "away")
    w.set_state(NEW, "away")
    w.run(60)
    assert w.in_phase(DevicePhase.WENT_BACK)
    w.set_state(NEW, "ok")
    w.produce(5)
    w.run(90)
    assert w.sides[NEW].connected and not w.lost()
    assert w.sides[NEW].reports[-1].phase is DevicePhase.WENT_BACK
    w.order(NEW, orders(2, ALL_NEW))
    w.probe()
    w.run(20)
    assert w.in_phase(DevicePhase.MOVED) and w.drained() and not w.lost()


def test_firmware_that_cannot_be_updated_says_so_and_goes_on_as_before() -> None:
    w = World(settings=AgentSettings(updatable=False))
    w.run(1)
    w.order(OLD, orders(3, ALL_NEW))
    w.produce(5)
    w.run(40)
    assert w.in_phase(DevicePhase.OLD) and not w.sides[NEW].connected
    assert w.sides[OLD].reports[-1].epoch == 3 and "unsupported" in w.sides[OLD].reports[-1].reason
    assert w.drained()


def test_answers_owed_by_a_link_that_closes_are_given_first() -> None:
    w = World()
    w.command_takes_s = 0.5
    w.run(1)
    w.move(flags("both", "both"))
    w.command(NEW, "c1")
    w.run(0.1)
    w.order(OLD, orders(2, Flags()))
    w.run(3)
    assert w.sides[NEW].final("c1") == [S.SUCCEEDED] and not w.sides[NEW].connected


@pytest.mark.parametrize("restarts", [False, True])
def test_an_outcome_owed_by_an_old_link_that_has_closed_goes_by_the_new_one(restarts: bool) -> None:
    """The new side is told by which path the command came; a copy by itself is no reason to say less."""
    w = World()
    w.command_takes_s = 8.0
    w.run(1)
    w.command(OLD, "c1")
    w.run(0.5)
    w.move(ALL_NEW)
    w.run(5)
    assert not w.sides[OLD].connected and w.sides[OLD].final("c1") == []
    if restarts:
        w.crash()
        w.run(0.1)
    w.command(NEW, "c1")
    w.run(15)
    outcome = S.FAILED if restarts else S.SUCCEEDED
    assert set(w.sides[NEW].final("c1")) <= {outcome, S.DUPLICATE} and outcome in w.sides[NEW].final("c1")
    assert w.executed == ["c1"]


def test_an_outcome_owed_by_a_new_link_that_has_closed_goes_by_the_old_one_once_that_asks() -> None:
    w = World()
    w.command_takes_s = 8.0
    w.run(1)
    w.move(flags("both", "both"))
    w.command(NEW, "c1")
    w.run(0.5)
    w.order(OLD, orders(2, Flags()))
    w.run(5)
    assert not w.sides[NEW].connected and w.sides[NEW].final("c1") == []
    w.command(OLD, "c1")
    w.run(15)
    assert w.sides[OLD].final("c1") == [S.SUCCEEDED]


def test_a_clock_set_back_delays_nothing() -> None:
    w = World()
    w.run(1)
    w.set_state(OLD, "away")
    w.run(5)
    w.set_state(OLD, "ok")
    shift = 86_400.0
    w.now -= shift
    w.timer_at = None if w.timer_at is None else w.timer_at - shift
    w._queue = [(at - shift, n, life, event) for at, n, life, event in w._queue]
    w.produce(3)
    w.run(15)
    assert w.sides[OLD].connected and w.drained()


# --- every phase, every fault ------------------------------------------------------------------------------


def _old(w: World) -> None:
    w.run(1)


def _trying(w: World) -> None:
    w.run(1)
    w.order(OLD, orders(1, flags("both", "both")))
    w.run(0.5)
    assert w.in_phase(DevicePhase.TRYING)


def _moved(f: Flags) -> Callable[[World], None]:
    def go(w: World) -> None:
        w.run(1)
        w.move(f)
        w.run(1)

    return go


def _went_back(w: World) -> None:
    w.run(1)
    w.set_state(NEW, "refusing")
    w.order(OLD, orders(1, ALL_NEW))
    w.run(40)
    w.set_state(NEW, "ok")
    assert w.in_phase(DevicePhase.WENT_BACK)


PHASES: dict[str, Callable[[World], None]] = {
    "old": _old,
    "trying": _trying,
    "moved-both": _moved(flags("both", "both")),
    "moved-new": _moved(flags("new", "new")),
    "moved-closed": _moved(ALL_NEW),
    "went-back": _went_back,
}


def _outage(path: m.Path, state: str, seconds: float) -> Callable[[World], None]:
    def strike(w: World) -> None:
        w.set_state(path, state)
        if state == "denying":
            w.break_link(path)
        w.run(seconds)
        w.set_state(path, "ok")

    return strike


def _both_away(w: World) -> None:
    w.set_state(OLD, "away")
    w.set_state(NEW, "away")
    w.run(100)
    w.set_state(OLD, "ok")
    w.set_state(NEW, "ok")


def _flapping(path: m.Path) -> Callable[[World], None]:
    def strike(w: World) -> None:
        for _ in range(60):
            w.break_link(path)
            w.run(0.7)

    return strike


def _crashing(w: World) -> None:
    for _ in range(20):
        w.produce(3)
        w.run(w.random.random())
        w.crash()


def _crash_then_new_away(w: World) -> None:
    w.crash()
    _outage(NEW, "away", 100)(w)


FAULTS: dict[str, Callable[[World], None]] = {
    **{
        f"{path.value}-{state}-{seconds}s": _outage(path, state, seconds)
        for path in (OLD, NEW)
        for state in ("refusing", "away", "silent", "denying")
        for seconds in (5, 100)
        if not (path is OLD and state == "denying")
    },
    "both-away": _both_away,
    "old-flapping": _flapping(OLD),
    "new-flapping": _flapping(NEW),
    "crashing": _crashing,
    "crash-then-new-away": _crash_then_new_away,
    "order-old": lambda w: w.order(OLD, orders(50, Flags())),
    "order-old-by-new": lambda w: w.order(NEW, orders(50, Flags())),
    "order-all-new": lambda w: w.order(OLD, orders(50, ALL_NEW)),
    "order-nowhere": lambda w: w.order(OLD, orders(50, ALL_NEW, new=None, credential=None)),
    "stale-order": lambda w: w.order(OLD, orders(0, Flags())),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("phase", PHASES)
def test_no_fault_in_any_phase_strands_a_device_or_loses_a_message(phase: str, fault: str) -> None:
    """Afterwards the device is connected to a side that accepts it, and all it measured is stored there."""
    w = World()
    PHASES[phase](w)
    w.produce(20)
    w.command(OLD, "by-old")
    w.command(NEW, "by-new")
    FAULTS[fault](w)
    w.produce(20)
    w.run(150)
    assert not w.lost()
    assert w.drained(), w
    assert len(set(w.executed)) == len(w.executed)
    served_by = NEW if w.agent.flags.telemetry is TelemetryFlag.NEW else OLD
    assert w.sides[served_by].connected, w
    if w.agent.flags.link is LinkFlag.BOTH or not w.in_phase(DevicePhase.MOVED):
        assert w.sides[OLD].connected, w
    w.produce(5)
    w.run(1)
    assert w.drained(), w


@pytest.mark.parametrize("phase", DevicePhase)
@pytest.mark.parametrize("cause", Cause)
def test_the_table_of_phases_is_the_machines_only_way(phase: DevicePhase, cause: Cause) -> None:
    w = World()
    w.agent._moves.record = m.Record(phase=phase)
    if cause in MOVES[phase]:
        w.agent._moves.move(cause, w.now)
        assert w.agent.phase is MOVES[phase][cause]
    else:
        with pytest.raises(IllegalMove):
            w.agent._moves.move(cause, w.now)


@pytest.mark.parametrize("seed", [*range(60), 1220, 1231, 1887])
def test_whatever_happens_nothing_is_lost_and_nothing_done_twice(seed: int) -> None:
    """Random orders, commands, outages and crashes; then quiet, after which everything is delivered."""
    w = World(seed)
    r = random.Random(seed)
    epoch = 0
    ids = itertools.count()
    states = ["ok", "ok", "refusing", "away", "silent", "denying"]
    for _ in range(120):
        match r.randrange(10):
            case 0 | 1 | 2:
                w.produce(r.randrange(1, 20), r.choice(["can", "gps"]))
            case 3:
                id_ = f"c{next(ids)}"
                for path in r.sample([OLD, NEW], 2):
                    w.command(path, id_, dry_run=r.random() < 0.1)
            case 4:
                epoch += 1
                f = flags(
                    r.choice(["old", "both", "new"]),
                    r.choice(["old", "dry-run", "both", "new"]),
                    r.choice(["both", "both", "new"]),
                )
                w.order(r.choice([OLD, NEW]), orders(epoch, f, new_lost_limit_s=r.choice([5, 30])))
                w.probe(epoch)
            case 5:
                w.set_state(OLD, r.choice(states[:-1]))
            case 6:
                w.set_state(NEW, r.choice(states))
            case 7:
                w.break_link(r.choice([OLD, NEW]))
            case 8 if r.random() < 0.5:
                w.crash()
            case _:
                pass
        w.run(r.choice([0.0, 0.005, 0.03, 0.5, 5.0, 40.0]))
        assert not w.lost()
    w.set_state(OLD, "ok")
    w.set_state(NEW, "ok")
    w.run(200)
    assert not w.lost() and w.drained(), w
    assert len(set(w.executed)) == len(w.executed)
    assert w.agent.record == w.disk.record
