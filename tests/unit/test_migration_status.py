"""What the status says of rungs, waves and the time left."""

from msgspec.structs import replace

from fleetlift.core.migration import MemberState, MigrationState, Phase, WavePhase
from fleetlift.core.plan import ladder
from fleetlift.core.status import Mark
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.status import _rungs, time_left
from fleetlift.store.engine import MemberCount

PLAN = parse_plan("""
migration: m
fleet: {tenant: carshare}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
steps:
  - {move: telemetry, stages: [both, new], waves: [1 device, 1%, 100%], bake: 100s}
  - {move: commands, stages: [new], waves: [50%, 100%], bake: 10s}
""")
CONTROLLED = """
migration: m
fleet: {tenant: carshare, control: 3 devices}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
steps:
  - {move: telemetry, stages: [both], waves: [90%, 100%], bake: 100s}
"""
STATE = MigrationState(name="m", rung=1, wave=1, wave_opened_at=1000.0, bake_started_at=1010.0)
COUNTS = [
    MemberCount(rung=1, came_from=0, state=MemberState.MOVED, devices=1, never_seen=0),
    MemberCount(rung=1, came_from=0, state=MemberState.MOVING, devices=1, never_seen=0),
    MemberCount(rung=0, came_from=0, state=MemberState.WAITING, devices=8, never_seen=0),
]


def marks(state: MigrationState) -> list[list[str]]:
    return [
        [rung.mark, *(wave.mark for wave in rung.waves)]
        for rung in _rungs(PLAN, state, ladder(PLAN), COUNTS, 10)
    ]


def test_waves_are_done_open_waiting_or_add_nothing() -> None:
    """One device is one per cent of ten already: the second wave adds none."""
    shown = _rungs(PLAN, replace(STATE, wave=2), ladder(PLAN), COUNTS, 10)
    assert [wave.devices for wave in shown[0].waves] == [1, 0, 9]
    assert [wave.mark for wave in shown[0].waves] == [Mark.DONE, Mark.SKIPPED, Mark.OPEN]
    assert [rung.mark for rung in shown] == [Mark.OPEN, Mark.WAITING, Mark.WAITING]
    assert shown[0].devices == 1


def test_the_control_is_left_to_the_last_wave() -> None:
    plan = parse_plan(CONTROLLED)
    shown = _rungs(plan, STATE, ladder(plan), COUNTS, 10)
    assert [wave.devices for wave in shown[0].waves] == [7, 3]


def test_a_wave_that_goes_back_is_seen_to() -> None:
    held = replace(STATE, wave=2, phase=Phase.HELD, wave_phase=WavePhase.RETURNING)
    assert marks(held)[0] == ["open", "done", "skipped", "returned"]


def test_at_the_end_everything_is_done_and_after_a_revert_nothing_is() -> None:
    assert {mark for rung in marks(replace(STATE, phase=Phase.FINISHED)) for mark in rung} <= {
        "done",
        "skipped",
    }
    assert [rung[0] for rung in marks(replace(STATE, phase=Phase.REVERTED, rung=2))] == [
        "returned",
        "returned",
        "waiting",
    ]


def test_time_left_is_bakes_to_come_and_moves_as_long_as_so_far() -> None:
    """The open wave's rest, then every wave that adds devices."""
    state = replace(STATE, wave=2)
    shown = _rungs(PLAN, state, ladder(PLAN), COUNTS, 10)
    left = time_left(PLAN, state, shown, [4.0, 4.0, 30.0], now=1050.0)
    # 60 s of this bake; rung 2: two waves that add; rung 3: two waves
    assert left == 60 + 2 * (4 + 100) + 2 * (4 + 10)
    assert time_left(PLAN, replace(state, phase=Phase.HELD), shown, [], now=1050.0) is None
    assert time_left(PLAN, replace(state, phase=Phase.FINISHED), shown, [], now=1050.0) == 0.0
