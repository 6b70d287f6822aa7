"""The promises of `decide`: a whole migration of a pretended fleet, with and without faults."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from pretend import START, Pretend, PretendDevice, good_sample, plan, shake

from fleetlift.core.decide import begin, decide
from fleetlift.core.errors import BadInput
from fleetlift.core.migration import (
    FleetDevice,
    MemberState,
    Observations,
    Phase,
    RequestKind,
    Sample,
    Tell,
    Verdict,
    WavePhase,
)
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags
from fleetlift.core.plan import Move, OnBreach, gates_of, ladder
from fleetlift.core.units import parse_share
from fleetlift.core.waves import approved

ALL_MOVES = (Move.TELEMETRY, Move.COMMANDS, Move.LINK)
COMPLETENESS = "telemetry.completeness >= 99%"
GATES_ON_MOVES = ("moves.success >= 50%",)
BAD = Sample(value=97.31, n=15310, evidence={"summary": "412 of 15,310 missing, 6 devices"})


# -- the plain way -------------------------------------------------------------------------------------


def test_a_fleet_without_faults_reaches_the_end() -> None:
    """Every device ends on the last rung, each wave opened and passed once, in order."""
    p = Pretend(plan(moves=ALL_MOVES), 40)
    p.until(Phase.FINISHED)
    last = ladder(p.plan)[-1].flags
    assert {d.flags for d in p.devices.values()} == {last}
    assert p.kinds().count("wave_opened") == p.kinds().count("wave_passed") == 6 * 4
    assert p.state.reverts == 0


def test_no_wave_passes_before_its_bake_is_over() -> None:
    p = Pretend(plan(bake_s=30), 20)
    p.until_wave(1, 0)
    opened = p.now
    p.until_wave(1, 1)
    assert p.now - opened >= 30


def test_canaries_go_first_in_the_plans_order() -> None:
    p = Pretend(plan(waves=("2 devices", "100%"), canaries=("car-007", "car-003")), 10)
    p.until_wave(1, 0)
    p.run(3)
    assert p.on_new() == {"car-007", "car-003"}


def test_a_wave_that_adds_no_device_is_skipped_and_noted() -> None:
    p = Pretend(plan(waves=("3 devices", "10%", "100%")), 10)
    p.until(Phase.FINISHED)
    assert p.kinds().count("wave_skipped") == 2
    assert p.kinds().count("wave_opened") == 4


def test_a_fleet_of_nothing_cannot_begin() -> None:
    with pytest.raises(BadInput, match="no device"):
        begin(plan(), (), 0)


def test_devices_that_cannot_be_updated_take_no_part_and_are_listed_with_the_reason() -> None:
    fleet = [FleetDevice(id="a"), FleetDevice(id="b", attributes={"updatable": False})]
    members = begin(plan(), fleet, 0).members
    assert members["b"].state is MemberState.EXCLUDED
    assert "updatable is false" in members["b"].reason


def test_a_partial_migration_ends_where_its_last_wave_ends() -> None:
    p = Pretend(plan(waves=("10%", "30%")), 20)
    p.until(Phase.FINISHED)
    assert len(p.on_new()) == 6


# -- evidence ------------------------------------------------------------------------------------------


def test_a_move_counts_only_by_evidence_from_the_new_side() -> None:
    """What a device says by the old side alone does not make it moved."""
    p = Pretend(plan(waves=("1 device", "100%")), 4)
    p.step()
    told = p.tells[0].device
    device = p.devices[told]
    device.report_by_new = None  # the new side has heard nothing of it
    for _ in range(14):
        assert p.state.members[told].state is MemberState.MOVING
        device.pending = None
        device.report_by_new = None
        p.step()
    p.run(5)
    assert p.state.phase is Phase.HELD
    assert "new side has not heard" in p.state.reason


def test_a_report_without_telemetry_on_the_new_path_does_not_count() -> None:
    p = Pretend(plan(waves=("1 device", "100%")), 4)
    p.step()
    told = p.tells[0].device
    for _ in range(10):
        p.devices[told].new_telemetry_at = None
        p.state = p.stored(decide(p.plan, p.state, p.observe(), p.now).state)
        p.now += 1
    assert p.state.members[told].state is MemberState.MOVING


def test_a_report_of_an_older_epoch_does_not_count() -> None:
    p = Pretend(plan(waves=("100%",)), 1, epoch=10)
    p.step()
    device = p.devices["car-000"]
    flags = ladder(p.plan)[1].flags
    device.pending = None
    device.report = device.report_by_new = DeviceReport(epoch=10, phase=DevicePhase.MOVED, flags=flags)
    device.new_telemetry_at = p.now
    p.state = decide(p.plan, p.state, p.observe(), p.now).state
    assert p.state.members["car-000"].state is MemberState.MOVING


def test_devices_that_are_away_become_stragglers_and_do_not_block() -> None:
    """They are listed with the reason, and move when they come."""
    p = Pretend(plan(), 20)
    away = [p.devices["car-004"], p.devices["car-011"]]
    for device in away:
        device.online = False
    away[1].seen = False
    p.until(Phase.FINISHED)
    members = p.state.members
    assert p.members(MemberState.STRAGGLER) == {"car-004", "car-011"}
    assert members["car-004"].reason.startswith("offline since")
    assert members["car-011"].reason == "never seen"
    for device in away:
        device.online, device.seen, device.since = True, True, p.now
    p.run(10)
    assert p.members(MemberState.STRAGGLER) == set()
    assert "stragglers_moved" in p.kinds()


def test_a_first_wave_that_nobody_can_reach_waits_and_does_not_pass() -> None:
    p = Pretend(plan(), 10)
    for device in p.devices.values():
        device.online = False
    p.run(500)
    assert (p.state.phase, p.state.rung, p.state.wave) == (Phase.RUNNING, 1, 0)
    assert p.state.wave_phase is WavePhase.MOVING
    assert "can be reached" in p.state.reason


def test_an_order_lost_on_its_way_is_repeated_with_the_same_epoch() -> None:
    p = Pretend(plan(waves=("100%",)), 3)
    p.step(deliver=lambda _: False)
    p.run(20)
    epochs = {t.epoch for t in p.tells}
    assert epochs == {1}
    assert p.on_new() == set(p.devices)


def test_orders_are_repeated_less_and_less_often() -> None:
    """A device that stays away gets a handful of repeats in ten minutes, not hundreds."""
    p = Pretend(plan(waves=("1 device",), settle_s=600.0), 1)
    p.devices["car-000"].deaf = True
    p.run(600)
    assert 8 <= len(p.tells) <= 16


def test_devices_that_go_back_by_themselves_count_against_the_wave() -> None:
    p = Pretend(plan(waves=("10 devices", "100%")), 20)
    first = [m.device for m in sorted(p.state.members.values(), key=lambda m: m.rank)[:10]]
    for name in first[:2]:
        p.devices[name].goes_back = True
    p.until(Phase.HELD)
    assert p.state.reason.startswith("moves.success 80 % < 95 % (8 of 10 devices moved, 2 failed")
    assert "try failed" in p.state.reason
    assert p.state.reverts == 1
    p.run(5)
    assert p.on_new() == set()


def test_the_limit_on_moves_can_be_the_plans_own() -> None:
    p = Pretend(plan(waves=("10 devices", "100%"), gates=("moves.success >= 80%",)), 20)
    for name in [m.device for m in sorted(p.state.members.values(), key=lambda m: m.rank)[:2]]:
        p.devices[name].goes_back = True
    p.until(Phase.FINISHED)
    assert len(p.members(MemberState.STRAGGLER)) == 2


def test_a_device_that_went_back_is_tried_again_with_a_newer_epoch() -> None:
    p = Pretend(plan(waves=("100%",), gates=("moves.success >= 10%",), bake_s=300), 10)
    p.devices["car-005"].goes_back = True
    p.until_wave(1, 0)
    p.run(10)
    assert p.members(MemberState.STRAGGLER) == {"car-005"}
    before = p.state.members["car-005"].epoch
    p.devices["car-005"].goes_back = False
    p.run(70)
    assert p.state.members["car-005"].state is MemberState.MOVED
    assert p.state.members["car-005"].epoch > before


# -- gates ---------------------------------------------------------------------------------------------


def test_a_breach_sends_the_open_wave_back_one_rung_and_no_other() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(2, 1)
    p.run(3)
    mine = {m.device for m in p.state.members.values() if m.rung == 2 and m.wave == 1}
    before = {m.device for m in p.state.members.values() if m.rung == 2 and m.wave == 0}
    assert mine and before
    p.samples[COMPLETENESS] = BAD
    p.step()
    assert p.state.phase is Phase.HELD
    assert p.state.wave_phase is WavePhase.RETURNING
    assert p.state.reason == "telemetry.completeness 97.31 % < 99 % (412 of 15,310 missing, 6 devices)"
    p.run(5)
    rungs = ladder(p.plan)
    assert {p.devices[name].flags for name in mine} == {rungs[1].flags}
    assert {p.devices[name].flags for name in before} == {rungs[2].flags}
    assert "wave_returned" in p.kinds()
    breach = next(entry for entry in p.audit if entry.kind == "gate_breached")
    assert breach.evidence["value"] == 97.31 and breach.evidence["limit"] == 99


def test_with_hold_the_wave_stays_and_a_person_decides() -> None:
    p = Pretend(plan(on_breach=OnBreach.HOLD), 20)
    p.until_wave(1, 1)
    p.run(3)
    there = p.on_new()
    p.samples[COMPLETENESS] = BAD
    p.run(50)
    assert p.state.phase is Phase.HELD
    assert p.on_new() == there
    assert p.state.reverts == 0
    p.samples[COMPLETENESS] = good_sample(COMPLETENESS)
    p.ask(RequestKind.RESUME)
    p.until(Phase.FINISHED)


def test_nobody_new_is_told_while_a_breach_is_open() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 2)
    p.run(3)
    p.samples[COMPLETENESS] = BAD
    p.step()
    told = {t.device for t in p.tells}
    p.run(300)
    assert {t.device for t in p.tells} == told
    assert p.state.phase is Phase.HELD


def test_a_resumed_breach_is_tried_again_with_the_same_devices() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 2)
    p.run(3)
    mine = {m.device for m in p.state.members.values() if m.wave == 2}
    p.samples[COMPLETENESS] = BAD
    p.run(5)
    p.samples[COMPLETENESS] = good_sample(COMPLETENESS)
    p.ask(RequestKind.RESUME)
    p.run(3)
    assert {m.device for m in p.state.members.values() if m.wave == 2} == mine
    assert p.state.measured_from is not None and p.state.measured_from > START + 20
    p.until(Phase.FINISHED)


@pytest.mark.parametrize(
    "sample",
    [None, Sample(value=None), Sample(value=float("nan"), n=50), Sample(value=100.0, n=3)],
    ids=["absent", "no value", "not a number", "too few"],
)
def test_missing_data_never_advances_and_in_the_end_counts_as_a_breach(sample: Sample | None) -> None:
    p = Pretend(plan(bake_s=20), 10)
    p.until_wave(1, 0)
    if sample is None:
        del p.samples[COMPLETENESS]
    else:
        p.samples[COMPLETENESS] = sample
    p.run(55)
    assert (p.state.phase, p.state.rung, p.state.wave) == (Phase.RUNNING, 1, 0)
    p.run(60)
    assert p.state.phase is Phase.HELD
    assert p.state.reason.startswith("no data for 1m: telemetry.completeness")
    p.run(5)
    assert p.on_new() == set()


def test_without_any_data_at_all_nothing_grows() -> None:
    p = Pretend(plan(gates=("telemetry.completeness >= 99%", "telemetry.delay.p99 <= 1.2 x old")), 30)
    p.samples = {}
    p.run(1000)
    assert p.state.phase is Phase.HELD
    assert max(m.rung for m in p.state.members.values()) == 0


def test_missing_data_is_forgiven_when_it_comes_back_in_time() -> None:
    p = Pretend(plan(bake_s=20), 10)
    p.until_wave(1, 0)
    good = p.samples.pop(COMPLETENESS)
    p.run(50)
    p.samples[COMPLETENESS] = good
    p.until(Phase.FINISHED)


def test_no_tolerance_means_at_once_even_while_the_wave_is_moving() -> None:
    gate = "commands.executed_twice == 0"
    p = Pretend(plan(gates=(gate,)), 20)
    p.until_wave(1, 1)
    p.samples[gate] = Sample(value=1.0, n=1, evidence={"summary": "lock on car-004"})
    p.step()
    assert p.state.phase is Phase.HELD
    assert "lock on car-004" in p.state.reason


def test_other_gates_wait_for_the_bake_to_be_judged() -> None:
    """While a wave moves, its figures mean little yet."""
    p = Pretend(plan(waves=("10 devices", "100%")), 20)
    for device in p.devices.values():
        device.deaf = True
    p.samples[COMPLETENESS] = BAD
    p.run(5)
    assert p.state.phase is Phase.RUNNING


def test_a_device_gone_silent_after_its_move_is_noticed() -> None:
    p = Pretend(plan(gates=("devices.silent == 0",), silent_after_s=10.0, bake_s=60), 20)
    p.until_wave(1, 1)
    p.run(3)
    p.devices[p.tells[0].device].deaf = True
    p.until(Phase.HELD, within_s=30)
    assert p.state.reason.startswith("devices.silent 1 > 0") or "devices.silent 1 != 0" in p.state.reason


def test_the_new_side_lost_by_the_whole_fleet_breaches_and_sends_back() -> None:
    p = Pretend(plan(waves=("50%", "100%"), bake_s=200), 20)
    p.until_wave(1, 1)
    p.run(3)
    p.new_up = False
    for device in p.devices.values():
        device.report = DeviceReport(
            epoch=device.epoch, phase=DevicePhase.WENT_BACK, flags=Flags(), reason="new side lost"
        )
        device.flags = Flags()
    p.step()
    assert p.state.phase is Phase.HELD
    assert "new side lost" in p.state.reason


# -- what people ask for -------------------------------------------------------------------------------


def test_pausing_holds_the_next_wave_and_resuming_goes_on() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 1)
    p.ask(RequestKind.PAUSE)
    p.run(200)
    assert (p.state.phase, p.state.wave) == (Phase.PAUSED, 1)
    p.ask(RequestKind.RESUME)
    p.until(Phase.FINISHED)


def test_gates_stay_armed_while_paused() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 1)
    p.run(3)
    p.ask(RequestKind.PAUSE)
    p.run(3)
    p.samples[COMPLETENESS] = BAD
    p.step()
    assert p.state.phase is Phase.HELD


def test_a_wave_that_needs_approval_waits_for_it_with_its_gates_armed() -> None:
    p = Pretend(plan(approve=True), 20)
    p.until_wave(1, 0)
    p.run(200)
    assert p.state.wave_phase is WavePhase.AWAITING_APPROVAL
    p.ask(RequestKind.APPROVE)
    p.until_wave(1, 1)
    p.run(50)
    assert p.state.wave_phase is WavePhase.AWAITING_APPROVAL
    p.samples[COMPLETENESS] = BAD
    p.step()
    assert p.state.phase is Phase.HELD


def test_approval_cannot_be_given_in_advance() -> None:
    p = Pretend(plan(approve=True), 20)
    p.until_wave(1, 0)
    p.ask(RequestKind.APPROVE)
    p.run(100)
    assert p.state.wave == 0
    assert "request_refused" in p.kinds()


@pytest.mark.parametrize("rung", range(1, 7))
@pytest.mark.parametrize("wave", [0, 2])
def test_everything_can_be_reverted_from_any_point(rung: int, wave: int) -> None:
    p = Pretend(plan(moves=ALL_MOVES), 20)
    p.until_wave(rung, wave)
    p.run(rung * 3)
    p.ask(RequestKind.REVERT)
    p.until(Phase.REVERTED, within_s=30)
    assert p.on_new() == set()


def test_reverting_goes_on_though_the_new_side_is_down() -> None:
    p = Pretend(plan(moves=ALL_MOVES), 20)
    p.until_wave(4, 1)
    p.new_up = False
    p.samples.clear()
    p.ask(RequestKind.REVERT)
    p.until(Phase.REVERTED, within_s=30)
    assert p.on_new() == set()


def test_a_revert_lists_whom_it_could_not_reach_and_reaches_them_later() -> None:
    p = Pretend(plan(), 20)
    p.until(Phase.FINISHED)
    p.devices["car-003"].online = False
    p.ask(RequestKind.REVERT)
    p.until(Phase.REVERTED, within_s=60)
    done = p.audit[-1]
    assert done.kind == "migration_reverted" and list(done.evidence["unreached"]) == ["car-003"]
    p.devices["car-003"].online, p.devices["car-003"].since = True, p.now
    p.run(10)
    assert p.on_new() == set()
    assert p.state.members["car-003"].state is MemberState.RETURNED


def test_a_revert_is_not_over_while_a_reachable_device_has_not_said_so() -> None:
    p = Pretend(plan(), 10)
    p.until(Phase.FINISHED)
    p.devices["car-003"].deaf = True
    p.ask(RequestKind.REVERT)
    p.run(100)
    assert p.state.phase is Phase.REVERTING
    p.devices["car-003"].deaf = False
    p.until(Phase.REVERTED, within_s=70)


def test_a_reverted_migration_can_begin_again() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(2, 1)
    p.ask(RequestKind.REVERT)
    p.until(Phase.REVERTED, within_s=30)
    p.ask(RequestKind.RESUME)
    p.until(Phase.FINISHED)
    assert len(p.on_new()) == 20


def test_one_wave_can_be_sent_back() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 2)
    p.run(3)
    p.ask(RequestKind.REVERT, wave=True)
    p.run(4)
    assert p.state.phase is Phase.HELD
    assert len(p.on_new()) == 2


def test_one_device_can_be_sent_back_and_stays_there_until_resumed() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(2, 0)
    p.run(3)
    name = p.tells[0].device
    p.ask(RequestKind.REVERT, device=name)
    p.run(4)
    assert p.devices[name].flags == Flags()
    assert p.state.members[name].state is MemberState.EXCLUDED
    assert p.state.members[name].moved_at is not None
    p.until(Phase.FINISHED)
    assert p.on_new() == set(p.devices) - {name}
    p.ask(RequestKind.RESUME, device=name)
    p.ask(RequestKind.RESUME)
    p.until(Phase.RUNNING, within_s=3)
    p.until(Phase.FINISHED)
    assert p.on_new() == set(p.devices)


def test_an_amended_plan_sends_those_it_leaves_out_back_and_opens_the_breached_wave_again() -> None:
    p = Pretend(plan(waves=("5 devices", "50%", "100%")), 20)
    p.until_wave(1, 1)
    p.run(3)
    p.samples[COMPLETENESS] = BAD
    p.run(4)
    assert p.state.phase is Phase.HELD
    faulty = {name for n, name in enumerate(sorted(p.devices)) if n % 3 == 0}
    p.selected = lambda name: name not in faulty
    p.samples[COMPLETENESS] = good_sample(COMPLETENESS)
    p.ask(RequestKind.AMEND)
    p.step()
    assert (p.state.phase, p.state.rung, p.state.wave) == (Phase.RUNNING, 1, 1)
    p.until(Phase.FINISHED)
    assert p.on_new() == set(p.devices) - faulty
    assert p.members(MemberState.EXCLUDED) == faulty
    assert all(p.state.members[name].rung == 0 for name in faulty)


def test_an_amendment_waits_until_the_fleet_can_be_read() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 1)
    p.readable = False
    p.ask(RequestKind.AMEND)
    p.run(5)
    assert p.requests
    p.readable = True
    p.run(2)
    assert not p.requests


def test_release_is_refused_while_devices_have_not_moved_unless_forced() -> None:
    p = Pretend(plan(), 10)
    p.devices["car-002"].online = False
    p.until(Phase.FINISHED)
    p.ask(RequestKind.RELEASE)
    p.step()
    assert p.kinds()[-1] == "request_refused"
    assert "car-002" in p.audit[-1].text
    p.ask(RequestKind.RELEASE, force=True)
    p.step()
    assert p.state.phase is Phase.RELEASED
    p.ask(RequestKind.REVERT)
    p.step()
    assert p.state.phase is Phase.RELEASED and p.audit[-1].kind == "request_refused"


def test_release_is_refused_for_devices_that_joined_after_the_last_wave() -> None:
    """Nobody has told them anything: with the old side gone they would be cut off unnoticed."""
    p = Pretend(plan(), 10)
    p.until(Phase.FINISHED)
    p.devices["late"] = PretendDevice("late")
    p.step()
    p.ask(RequestKind.RELEASE)
    p.step()
    assert p.audit[-1].kind == "request_refused" and "late" in p.audit[-1].text
    p.ask(RequestKind.RELEASE, force=True)
    p.step()
    assert p.state.phase is Phase.RELEASED


def test_release_is_refused_while_a_device_that_was_taken_out_is_on_its_way_back() -> None:
    p = Pretend(plan(), 10)
    p.until(Phase.FINISHED)
    p.devices["car-003"].online = False
    p.ask(RequestKind.REVERT, device="car-003")
    p.step()
    p.ask(RequestKind.RELEASE)
    p.step()
    assert p.audit[-1].kind == "request_refused" and "car-003" in p.audit[-1].text


def test_an_emergency_revert_by_the_journal_is_taken_in() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 3)
    p.run(3)
    for device in p.devices.values():
        device.told(500, Flags())
    p.ask(RequestKind.EMERGENCY, epoch=500)
    p.step()
    assert p.state.phase is Phase.REVERTING
    assert p.state.epoch > 500
    p.until(Phase.REVERTED, within_s=30)
    assert p.on_new() == set()


def test_an_emergency_repeated_is_one_revert() -> None:
    """Who uses the journal twice, because the first time not all answered, sends nothing back twice."""
    p = Pretend(plan(), 10)
    p.until_wave(1, 2)
    p.ask(RequestKind.EMERGENCY, epoch=500)
    p.ask(RequestKind.EMERGENCY, epoch=600)
    told = len(p.tells)
    p.until(Phase.REVERTED)
    assert len(p.tells) - told == 5 and {tell.rung for tell in p.tells[told:]} == {0}
    p.ask(RequestKind.EMERGENCY, epoch=700)
    p.step()
    assert p.state.phase is Phase.REVERTED and p.state.epoch == 700
    assert [k for k in p.kinds() if "emergency" in k or k == "migration_reverted"] == [
        "emergency_taken_in",
        "emergency_repeated",
        "migration_reverted",
        "emergency_repeated",
    ]


def test_devices_that_obey_somebody_elses_order_back_are_not_fought_over() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 3)
    p.run(3)
    for name in sorted(p.on_new())[:3]:
        p.devices[name].told(900, Flags())
    p.run(3)
    assert p.state.phase is Phase.HELD
    assert "newer order" in p.state.reason
    told = len(p.tells)
    p.run(100)
    assert len(p.tells) == told
    p.ask(RequestKind.RESUME)
    p.until(Phase.FINISHED)
    assert p.on_new() == set(p.devices)


def test_every_request_is_answered_once() -> None:
    p = Pretend(plan(), 5)
    for kind in RequestKind:
        p.ask(kind, text="odd", actor="names")
    decision = p.step()
    assert decision.answered == tuple(range(1, len(RequestKind) + 1))


# -- sides that are down -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["old_up", "new_up", "readable"])
def test_nothing_grows_while_a_side_or_the_fleet_cannot_be_read(what: str) -> None:
    p = Pretend(plan(bake_s=5, no_data_after_s=1000.0), 20)
    p.until_wave(1, 1)
    p.run(3)
    setattr(p, what, False)
    told = {t.device for t in p.tells}
    p.run(100)
    assert {t.device for t in p.tells} == told
    assert p.state.phase is Phase.RUNNING
    assert p.state.reason.startswith("waits: ")
    setattr(p, what, True)
    p.until(Phase.FINISHED)


def test_missing_data_sends_nobody_back_to_an_old_side_that_is_down() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 2)
    p.run(3)
    p.old_up = False
    p.samples.clear()
    p.run(300)
    assert p.on_new()
    p.old_up = True
    p.step()
    assert p.state.phase is Phase.HELD


def test_a_breach_sends_nobody_back_to_an_old_side_that_is_down() -> None:
    """The figures may be bad because it is down; nothing grows, and once it answers the wave goes back."""
    p = Pretend(plan(), 20)
    p.until_wave(1, 2)
    p.run(3)
    p.old_up = False
    p.samples[COMPLETENESS] = BAD
    told = len(p.tells)
    p.run(300)
    assert p.on_new()
    assert len(p.tells) == told
    assert p.state.reason.startswith("waits for the old side")
    assert sum(entry.kind == "breach_held" for entry in p.audit) == 1
    p.old_up = True
    p.step()
    assert p.state.phase is Phase.HELD


# -- a fleet that changes ------------------------------------------------------------------------------


def test_devices_that_join_come_last_and_the_migration_takes_them_along() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 1)
    before = {name: m.rank for name, m in p.state.members.items()}
    for n in range(5):
        p.devices[f"aaa-{n}"] = PretendDevice(f"aaa-{n}")
    p.until(Phase.FINISHED)
    assert len(p.on_new()) == 25
    assert {name: p.state.members[name].rank for name in before} == before
    assert min(p.state.members[f"aaa-{n}"].rank for n in range(5)) == 20


def test_a_device_that_leaves_the_fleet_changes_nothing_for_the_others() -> None:
    p = Pretend(plan(), 20)
    p.until_wave(1, 1)
    p.run(3)
    there = p.on_new()
    p.selected = lambda name: name not in {"car-001", "car-002", "car-003", "car-004"}
    p.run(3)
    assert p.on_new() == there


def test_a_late_device_goes_back_to_where_it_came_from() -> None:
    """A device that joined when the others were on rung 1 was raised from rung 0, and returns there."""
    p = Pretend(plan(waves=("100%",)), 5)
    p.until_wave(2, 0)
    p.devices["late"] = PretendDevice("late")
    p.samples[COMPLETENESS] = BAD
    p.run(5)
    assert p.state.phase is Phase.HELD
    p.samples[COMPLETENESS] = good_sample(COMPLETENESS)
    p.ask(RequestKind.RESUME)
    p.run(3)
    assert p.state.members["late"].came_from == 0
    p.samples[COMPLETENESS] = BAD
    p.run(5)
    assert p.devices["late"].flags == Flags()


def test_a_device_that_still_sends_by_both_paths_is_not_back_by_the_old_one() -> None:
    """It has heard neither that it is to leave the old path, nor that it is to go back."""
    p = Pretend(plan(waves=("100%",)), 1)
    while p.state.members["car-000"].rung < 2:
        p.step(deliver=lambda tell: tell.rung < 2)
    p.ask(RequestKind.REVERT)
    for _ in range(3):
        p.step(deliver=lambda _: False)
    assert p.members(MemberState.RETURNED) == set()
    p.until(Phase.REVERTED)
    assert p.on_new() == set()


# -- killed controllers, and chance --------------------------------------------------------------------


def test_deciding_twice_on_the_same_facts_gives_the_same() -> None:
    p = Pretend(plan(), 20)
    for _ in range(120):
        assert decide(p.plan, p.state, p.observe(), p.now) == decide(p.plan, p.state, p.observe(), p.now)
        p.step()


def test_a_controller_killed_after_telling_but_before_storing_goes_on() -> None:
    """Its successor orders again, with epochs that the devices take."""
    p = Pretend(plan(), 20)
    rng = random.Random(7)
    while p.state.phase is not Phase.FINISHED:
        assert p.now < START + 5000
        p.step(commit=rng.random() > 0.3)
    assert p.on_new() == set(p.devices)


def test_a_controller_killed_between_two_orders_goes_on() -> None:
    p = Pretend(plan(settle_s=300.0), 20)
    rng = random.Random(8)
    while p.state.phase is not Phase.FINISHED:
        assert p.now < START + 5000
        p.step(deliver=lambda _: rng.random() > 0.3)
    assert p.on_new() == set(p.devices)


def _check_invariants(p: Pretend, decision: Any, before: Any) -> None:
    """What must hold after every round, whatever happens."""
    state = decision.state
    rungs = ladder(p.plan)
    assert state.epoch >= before.epoch
    for tell in decision.actions:
        member = state.members[tell.device]
        assert (tell.epoch, tell.rung) == (member.epoch, member.rung)
        was = before.members.get(tell.device)
        if was is not None and was.epoch != tell.epoch:
            assert tell.epoch > before.epoch, "an epoch was used twice"
    climbed = [
        m
        for m in state.members.values()
        if (old := before.members.get(m.device)) is None or m.rung > old.rung
    ]
    climbed = [m for m in climbed if m.rung > 0]
    if climbed:
        # Growth: only when running, all of it on the open rung, and not beyond what the wave approves.
        assert state.phase is Phase.RUNNING and p.old_up and p.new_up and p.readable
        assert {m.rung for m in climbed} == {state.rung}
        able = [m for m in state.members.values() if m.state is not MemberState.EXCLUDED]
        shares = (rungs[state.rung].waves[state.wave],)
        assert sum(m.rung >= state.rung for m in able) <= approved(shares, len(p.devices))
        if before.wave_opened_at is not None and (before.rung, before.wave) != (state.rung, state.wave):
            assert all(r.verdict is Verdict.ADVANCE for r in decision.gates)
    assert {m.rank for m in state.members.values()} == set(range(len(state.members)))
    for name, member in before.members.items():
        assert state.members[name].rank == member.rank


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), hold=st.booleans(), retry=st.booleans())
def test_whatever_happens_the_promises_hold_and_the_fleet_can_be_brought_back(
    seed: int, hold: bool, retry: bool
) -> None:
    """Random faults, requests, lost orders and killed controllers; at the end a revert brings all home."""
    rng = random.Random(seed)
    p = Pretend(
        plan(
            moves=rng.choice([(Move.TELEMETRY,), ALL_MOVES]),
            waves=rng.choice([("1 device", "25%", "100%"), ("3 devices", "60%"), ("100%",)]),
            gates=rng.choice(
                [(COMPLETENESS,), (COMPLETENESS, "devices.silent <= 1"), ("moves.success >= 50%",)]
            ),
            on_breach=OnBreach.HOLD if hold else OnBreach.REVERT,
            bake_s=5,
            silent_after_s=20.0,
        ),
        rng.randrange(1, 9),
        epoch=rng.randrange(100),
    )
    for _ in range(rng.randrange(20, 150)):
        if rng.random() < 0.15:
            shake(p, rng)
        if rng.random() < 0.05 and p.samples:
            text = rng.choice(list(p.samples))
            p.samples[text] = rng.choice([BAD, Sample(value=None), good_sample(text)])
        if rng.random() < 0.04:
            p.old_up, p.new_up, p.readable = (rng.random() < 0.8 for _ in range(3))
        if rng.random() < 0.06:
            kind = rng.choice([k for k in RequestKind if k is not RequestKind.RELEASE])
            args: dict[str, Any] = rng.choice([{}, {"wave": True}, {"device": rng.choice(list(p.devices))}])
            p.ask(kind, **args)
        before = p.state
        stored = rng.random() < 0.95  # what was not is told to nobody
        decision = p.step(deliver=lambda _, stored=stored: stored and rng.random() < 0.9, commit=stored)  # type: ignore[misc]
        _check_invariants(p, decision, before)
    p.old_up = p.new_up = p.readable = True
    for device in p.devices.values():
        device.online, device.deaf, device.goes_back, device.since = True, False, False, p.now
    p.requests.clear()
    p.ask(RequestKind.REVERT)
    p.run(80)
    assert p.state.phase is Phase.REVERTED
    assert p.on_new() == set()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_fleet_that_recovers_always_arrives(seed: int) -> None:
    """After any stretch of faults, good days and a person who resumes bring everyone over."""
    rng = random.Random(seed)
    p = Pretend(plan(bake_s=5), 8)
    for _ in range(100):
        shake(p, rng)
        p.step()
        if p.state.phase is Phase.HELD:
            p.ask(RequestKind.RESUME)
    for device in p.devices.values():
        device.online, device.deaf, device.goes_back, device.since = True, False, False, p.now
    for _ in range(900):
        if p.state.phase is Phase.HELD and not p.requests:
            p.ask(RequestKind.RESUME)
        p.step()
    assert p.state.phase is Phase.FINISHED
    assert p.on_new() == set(p.devices)


def test_a_large_fleet_is_decided_in_one_round() -> None:
    the_plan = plan(waves=("1%", "100%"))
    fleet = tuple(FleetDevice(id=f"d{n}", connected=True) for n in range(20_000))
    state = begin(the_plan, fleet, 0)
    samples = {g.text: good_sample(g.text) for g in gates_of(the_plan) if g.metric != "moves.success"}
    seen = Observations(fleet=fleet, samples=samples)
    decision = decide(the_plan, state, seen, START)
    assert len(decision.actions) == parse_share("1%").of(20_000)
    assert all(isinstance(action, Tell) for action in decision.actions)
    assert replace(decision.state, members={}).phase is Phase.RUNNING
