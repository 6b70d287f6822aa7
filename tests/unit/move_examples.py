"""Hand-made tenants' moves for the live screen and the report: one moment of each kind worth looking at."""

from msgspec.structs import replace

from fleetlift.core.migration import GateResult, Phase, Verdict
from fleetlift.core.status import EventLine
from fleetlift.core.tenant.move import StepPhase
from fleetlift.core.tenant.status import MoveMoment, MovePoint, MoveStatus, StepLine

T0 = 1_760_000_000.0
NAMES = (
    *("copy: tenant data", "warm: caches", "validate: load", "freeze: registration", "switch: database"),
    *("switch: dns", "drain: old"),
)


def steps(*phases: StepPhase) -> tuple[StepLine, ...]:
    done = (StepPhase.DONE,) * len(NAMES)
    return tuple(
        StepLine(
            name=name,
            phase=phase,
            wave=int(name == "switch: dns"),
            waves=2 if name == "switch: dns" else 1,
            text=""
            if phase is StepPhase.WAITING
            else f"what {name} says, at some length, of what it has done",
            figures={"rows_verified": 12_345, "freeze_s": 0.12, "copied_bytes": 5_000_000}
            if phase is not StepPhase.WAITING
            else {},
            started_at=None if phase is StepPhase.WAITING else T0 + n,
            ended_at=T0 + n + 1 if phase is StepPhase.DONE else None,
        )
        for n, (name, phase) in enumerate(
            zip(NAMES, (*phases, *(StepPhase.WAITING,) * len(done)), strict=False)
        )
    )


def points(count: int) -> list[tuple[float, MovePoint]]:
    return [
        (
            T0 + n,
            MovePoint(
                phase="running",
                step=min(n // 10, 6),
                rows_copied=min(n * 1000, 12_000),
                rows_total=12_000,
                rows_applied=n * 10,
                applied_s=10.0,
                lag_s=0.1 * (n % 7),
                lag_bytes=100 * n,
                at_old=max(0, 40 - n),
                at_new=min(40, n),
                rate_new=2.0 * n,
                offered_s=100.0 if 20 <= n < 30 else None,
                accepted_s=99.0 if 20 <= n < 30 else None,
                load_p99_s=0.02 if 20 <= n < 30 else None,
            ),
        )
        for n in range(count)
    ]


GATE = GateResult(
    gate="telemetry.completeness == 100%",
    verdict=Verdict.ADVANCE,
    value=100.0,
    limit=100.0,
    unit="%",
    n=1200,
    why="0 of 1,200 missing",
)
DONE, WORKING, BAKING = StepPhase.DONE, StepPhase.WORKING, StepPhase.BAKING
RUNNING = MoveStatus(
    name="acme-to-dedicated",
    tenant="acme",
    source="cloud.example.com/shared",
    target="dedicated.example.com/acme",
    phase=Phase.RUNNING,
    started_at=T0,
    now=T0 + 75,
    step=5,
    steps=steps(DONE, DONE, DONE, DONE, DONE, BAKING),
    gates=(GATE,),
    timeline=tuple(MoveMoment(at=at, point=point) for at, point in points(60)),
    events=tuple(
        EventLine(id=n, at=T0 + n, actor="controller", kind="step_done", text=f"{name}: done")
        for n, name in enumerate(NAMES)
    ),
    controller_seen_at=T0 + 74.5,
)
BREACHED = replace(
    GATE, verdict=Verdict.REVERT, value=97.25, why="97.25 %, asked for 100 %: 33 of 1,200 missing"
)
HELD = replace(
    RUNNING, phase=Phase.HELD, reason="gate breached: telemetry.completeness == 100%", gates=(BREACHED,)
)
COPYING = replace(RUNNING, step=0, steps=steps(WORKING), gates=(), timeline=RUNNING.timeline[:3])
FRESH = replace(RUNNING, step=0, steps=steps(), gates=(), timeline=(), events=(), controller_seen_at=None)
BACK = replace(
    RUNNING,
    phase=Phase.REVERTING,
    reason="reverted by ops",
    step=4,
    steps=steps(DONE, DONE, DONE, DONE, StepPhase.UNDOING, StepPhase.UNDONE, StepPhase.UNDONE),
)
FINISHED = replace(RUNNING, phase=Phase.FINISHED, step=6, steps=steps(*(DONE,) * 7), ended_at=T0 + 75)
ENDLESS = replace(HELD, name="n" * 300, reason="why " * 300, gates=(BREACHED,) * 12, way_back="broken " * 80)
EXAMPLES = {
    "running": RUNNING,
    "held": HELD,
    "copying": COPYING,
    "fresh": FRESH,
    "back": BACK,
    "finished": FINISHED,
    "endless": ENDLESS,
}
