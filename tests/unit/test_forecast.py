"""What `migrate check` foretells of gates: how much they need, how long it takes, what is never sure."""

import pytest
from msgspec.structs import replace

from fleetlift.core.figures import arm, share_sample
from fleetlift.core.gates import Gate, judge, parse_gate
from fleetlift.core.migration import Basis, FleetDevice, Verdict
from fleetlift.migrate import check
from fleetlift.migrate.forecast import Pace, forecast, hopeless
from fleetlift.migrate.planfile import parse_plan

PLAN = """
migration: m
fleet: {tenant: carshare, canaries: [car-1]}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
bake: 1m
steps:
  - move: commands
    stages: [dry-run]
    waves: [10 devices, 100%]
    gates: [commands.agreement >= 98%, commands.latency.p95 <= 1 x old, commands.executed_twice == 0]
"""


def sure(text: str) -> Gate:
    return replace(parse_gate(text), confidence=0.95)


def test_the_least_that_is_foretold_is_what_the_gate_really_takes() -> None:
    gate = sure("commands.agreement >= 98%")
    found = forecast(gate, ((10, 90), (90, 0)), Pace(commands=0.1))
    assert found.least == 200
    assert list(found.waves_s) == pytest.approx([200, 22], abs=1)
    for n, verdict in ((199, Verdict.HOLD), (200, Verdict.ADVANCE)):
        sample = share_sample(arm([(n, 0)]), None, Basis.NONE, over_s=1.0, evidence={})
        assert judge(gate, sample).verdict is verdict


@pytest.mark.parametrize(
    ("text", "never"),
    [
        ("commands.agreement >= 100%", True),
        ("commands.latency.p95 <= 1 x old", True),
        ("commands.success >= 1 x old", True),
        ("commands.success >= old - 0.5%", False),
        ("commands.latency.p95 <= 1.0 x old or 250ms", False),
        ("telemetry.delay.p99 <= 1.2 x old", False),
        ("connections.rate <= 1.3 x old", False),
        ("connections.rate <= 2", False),
    ],
)
def test_a_limit_without_room_is_never_sure(text: str, never: bool) -> None:
    assert hopeless(sure(text)) is never


def test_an_unknown_pace_leaves_the_time_unknown() -> None:
    found = forecast(sure("telemetry.delay.p95 <= 500ms"), ((10, 90),), Pace())
    assert found.least and found.waves_s == (None,)


def test_the_check_warns_of_gates_that_are_late_never_or_not_sure_at_all() -> None:
    fleet = [FleetDevice(id=f"car-{n}", connected=True) for n in range(100)]
    plan = parse_plan(PLAN)
    shown = check.lay_out(plan, fleet, fleet)
    rungs = tuple(check._foreseen(plan, rung, shown.movable, Pace(commands=0.01)) for rung in shown.rungs)
    found = {finding.kind: finding.text for finding in check.certainty_findings(plan, rungs)}
    assert set(found) == {"gate_never_decided", "gate_takes_long"}
    assert found["gate_never_decided"].startswith("commands.latency.p95 <= 1 x old can never be decided")
    assert "wave 10 devices: commands.agreement >= 98% needs 34m at the soonest" in found["gate_takes_long"]
    plain = parse_plan(PLAN.replace("bake: 1m", "bake: 1m\nconfidence: none"))
    assert {f.kind for f in check.certainty_findings(plain, shown.rungs)} == {"no_confidence"}
