"""Hand-made migrations for the live screen: one moment of each kind worth looking at."""

import math

from msgspec.structs import replace

from fleetlift.core.migration import GateResult, Phase, Verdict, WavePhase
from fleetlift.core.status import EventLine, Mark, MigrationStatus, Moment, RungStatus, Straggler, WaveStatus
from fleetlift.core.timeline import TimelinePoint

T0 = 1_760_000_000.0
LABELS = ("10 devices", "1%", "5%", "25%", "50%", "100%")
COUNTS = (10, 0, 0, 4, 14, 29)
COMMAND_LABELS = ("1%", "10%", "50%", "100%")


def waves(
    marks: str, labels: tuple[str, ...] = LABELS, counts: tuple[int, ...] = COUNTS
) -> tuple[WaveStatus, ...]:
    by_letter = {"d": Mark.DONE, "o": Mark.OPEN, "w": Mark.WAITING, "s": Mark.SKIPPED, "r": Mark.RETURNED}
    return tuple(
        WaveStatus(label=label, devices=n, mark=by_letter[m])
        for m, label, n in zip(marks, labels, counts, strict=False)
    )


def commands(marks: str) -> tuple[WaveStatus, ...]:
    return waves(marks, COMMAND_LABELS, (1, 5, 23, 28))


def timeline(n: int, moved: float) -> tuple[Moment, ...]:
    points = []
    for i in range(n):
        share = moved * i / n
        points.append(
            Moment(
                at=T0 + i,
                point=TimelinePoint(
                    phase="running",
                    rung=2,
                    wave=4,
                    wave_phase="baking",
                    devices_old=57 - int(57 * share),
                    devices_both=0,
                    devices_new=int(57 * share),
                    rate_old=300 * (1 - share) + 20 * math.sin(i / 5),
                    rate_new=max(0.0, 300 * share + 15 * math.cos(i / 4)),
                    latency_old_p50=0.11,
                    latency_old_p95=0.31,
                    latency_new_p50=0.02,
                    latency_new_p95=0.045,
                ),
            )
        )
    return tuple(points)


RUNNING = MigrationStatus(
    name="connect-to-fleetlift",
    tenant="carshare",
    from_side="legacy",
    to_side="fleetlift",
    phase=Phase.RUNNING,
    started_at=T0 - 95,
    now=T0,
    time_left_s=104,
    rung=2,
    wave=4,
    wave_phase=WavePhase.BAKING,
    bake_s=4.0,
    bake_started_at=T0 - 2.5,
    rungs=(
        RungStatus(rung=1, step="telemetry", stage="both", mark=Mark.DONE, devices=57, waves=waves("dssddd")),
        RungStatus(rung=2, step="telemetry", stage="new", mark=Mark.OPEN, devices=28, waves=waves("dssdow")),
        RungStatus(rung=3, step="commands", stage="dry-run", waves=commands("wwww")),
        RungStatus(rung=4, step="commands", stage="both", waves=commands("wwww")),
        RungStatus(rung=5, step="commands", stage="new", waves=commands("wwww")),
        RungStatus(rung=6, step="link", stage="new", waves=waves("www", ("5%", "50%", "100%"), (3, 26, 28))),
    ),
    devices=57,
    devices_old=0,
    devices_both=29,
    devices_new=28,
    moving=0,
    excluded=6,
    never_seen=2,
    reverts=0,
    gates=(
        GateResult(
            gate="telemetry.completeness >= 99.99%",
            verdict=Verdict.ADVANCE,
            why="100 % of 12,431 messages arrived",
            value=100.0,
            limit=99.99,
            unit="%",
            n=12431,
        ),
        GateResult(
            gate="telemetry.delay.p99 <= 1.2 x old",
            verdict=Verdict.ADVANCE,
            why="82 ms, old side 118 ms",
            value=0.082,
            limit=0.1416,
            unit="s",
            n=12431,
            old=0.118,
        ),
        GateResult(
            gate="devices.silent == 0",
            verdict=Verdict.ADVANCE,
            why="none of 28 devices is silent",
            value=0,
            limit=0,
            n=28,
        ),
    ),
    timeline=timeline(95, 0.5),
    events=tuple(
        EventLine(id=i, at=T0 - 60 + 6 * i, actor=actor, kind=kind, text=text)
        for i, (actor, kind, text) in enumerate(
            [
                ("anna", "migration_started", "started: 57 devices, 6 rungs, 27 waves"),
                ("controller", "wave_opened", "telemetry → both, wave 1 (10 devices): 10 devices told"),
                ("controller", "wave_passed", "telemetry → both, wave 1: every gate held for 4 s"),
                ("controller", "wave_opened", "telemetry → both, wave 6 (100%): 29 devices told"),
                ("controller", "wave_passed", "telemetry → both: all 57 devices are there"),
                ("controller", "wave_opened", "telemetry → new, wave 5 (50%): 14 devices told"),
                (
                    "controller",
                    "wave_moved",
                    "telemetry → new, wave 5: 14 of 14 devices were seen on the new side",
                ),
            ]
        )
    ),
    controller_seen_at=T0 - 0.4,
)

HELD = replace(
    RUNNING,
    phase=Phase.HELD,
    reason="telemetry.completeness is 97.4 %, limit 99.99 %: wave 4 of telemetry → both went back",
    rung=1,
    wave=3,
    reverts=1,
    time_left_s=None,
    rungs=(
        RungStatus(rung=1, step="telemetry", stage="both", mark=Mark.OPEN, devices=10, waves=waves("dssrww")),
        *(replace(r, mark=Mark.WAITING, devices=0) for r in RUNNING.rungs[1:]),
    ),
    devices_old=46,
    devices_both=11,
    devices_new=0,
    moving=3,
    gates=(
        replace(
            RUNNING.gates[0],
            verdict=Verdict.REVERT,
            value=97.4,
            why="97.4 % of 4,204 messages arrived; missing: car-0031 (61), car-0044 (48); all are hardware 4",
        ),
        replace(RUNNING.gates[1], verdict=Verdict.HOLD, value=None, n=0, why="no command has ended in 30 s"),
        RUNNING.gates[2],
    ),
    stragglers=(
        Straggler(device="car-0031", reason="try failed: no PUBACK on the new side", since=T0 - 40),
        Straggler(device="car-0044", reason="offline since it was told", since=T0 - 300),
    ),
    stragglers_total=2,
    events=(
        *RUNNING.events[:4],
        EventLine(
            id=8,
            at=T0 - 9,
            actor="controller",
            kind="gate_breached",
            text="telemetry.completeness is 97.4 %, limit 99.99 % (4,204 messages)",
        ),
        EventLine(
            id=9,
            at=T0 - 8,
            actor="controller",
            kind="wave_returned",
            text="wave 4: 4 devices told to go back",
        ),
    ),
)

FINISHED = replace(
    RUNNING,
    phase=Phase.FINISHED,
    rung=6,
    wave=2,
    ended_at=T0,
    time_left_s=None,
    devices_both=0,
    devices_new=57,
    rungs=tuple(
        replace(r, mark=Mark.DONE, devices=57, waves=tuple(replace(w, mark=Mark.DONE) for w in r.waves))
        for r in RUNNING.rungs
    ),
)

EMPTY = MigrationStatus(
    name="first",
    tenant="t",
    from_side="legacy",
    to_side="fleetlift",
    phase=Phase.RUNNING,
    started_at=T0,
    now=T0,
)

BIG = replace(
    HELD,
    devices=312_400,
    devices_old=290_000,
    devices_both=400,
    devices_new=22_000,
    stragglers=tuple(
        Straggler(device=f"meter-{n:06d}", reason="never connected since it was told", since=T0 - 86_000)
        for n in range(10)
    ),
    stragglers_total=1840,
)

EXAMPLES = {"running": RUNNING, "held": HELD, "finished": FINISHED, "empty": EMPTY, "big": BIG}
