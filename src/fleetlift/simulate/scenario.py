"""What a seed stands for: a fleet, a plan, an operator's temper, and the faults of one simulation.

Every part is drawn from a stream of chance of its own, so that leaving out a fault or some devices leaves
the rest of the case as it was.
"""

import random
from collections.abc import Sequence
from typing import Any

import msgspec

from fleetlift.device.agent import AgentSettings
from fleetlift.simulate.device import Firmware

DEVICES_MOST = 300
_SIZES = ((0.6, 3, 7), (0.3, 8, 16), (0.09, 17, 40), (0.01, 41, DEVICES_MOST))
_WAVES = (
    ("100%",),
    ("50%", "100%"),
    ("1 device", "100%"),
    ("1 device", "25%", "100%"),
    ("2 devices", "40%", "100%"),
    ("10%", "50%", "100%"),
    ("34%", "67%", "100%"),
)
_GATES = {
    "telemetry": ("telemetry.completeness >= 95%", "devices.silent == 0", "telemetry.delay.p99 <= 60s"),
    "commands": ("commands.agreement >= 80%", "commands.executed_twice == 0", "devices.failed <= 3"),
    "link": ("devices.silent == 0", "telemetry.completeness >= 90%"),
}
_STAGES = {
    "telemetry": (("both", "new"), ("both",), ("new",)),
    "commands": (("dry-run", "both", "new"), ("both", "new"), ("new",), ("dry-run", "new")),
    "link": (("new",),),
}


class DeviceDraw(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    hardware: int
    updatable: bool
    firmware: Firmware
    period_s: float
    joins_at: float | None  # None: it is there from the start
    outbox_max: int


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault. `share` of the devices (at least one) have it; `number` names it within its seed."""

    number: int
    kind: str
    at: float
    lasts_s: float
    share: float = 0.0
    old: bool = False  # of the two sides or links, the old one
    how: float = 0.0  # in [0, 1): whatever more the kind needs


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    devices: tuple[DeviceDraw, ...]
    plan: dict[str, Any]
    faults: tuple[Fault, ...]
    round_every_s: float
    commands_every_s: float
    meddling: float  # how likely the operator is to do something uncalled for, each time he looks
    cut_at: float | None  # when the ending comes, if not after the migration's own end
    ending: str  # "stay", "revert", "journal" or "release"

    @property
    def text(self) -> str:
        return msgspec.json.encode(self.plan).decode()


def chance(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed}/{what}")


def draw(seed: int, devices: int | None = None, faults: Sequence[int] | None = None) -> Scenario:
    """The case of a seed; with `devices` a fleet of that size, with `faults` only those of its own."""
    c = chance(seed, "case")
    count, bad = _size(c), _bad_firmware(c)
    calm = c.random() < 0.08
    drawn = () if calm else _faults(seed)
    return Scenario(
        seed=seed,
        devices=tuple(_device(seed, n, bad) for n in range(devices if devices is not None else count)),
        plan=_plan(chance(seed, "plan")),
        faults=drawn if faults is None else tuple(f for f in drawn if f.number in faults),
        round_every_s=c.choice((1.0, 2.0, 3.0)),
        commands_every_s=c.uniform(0.6, 2.5),
        meddling=0.0 if calm else c.choice((0.0, 0.0, 0.05, 0.2)),
        ending=c.choice(("stay", "revert", "revert", "journal", "journal", "release")),
        cut_at=c.uniform(20, 300) if c.random() < 0.4 else None,
    )


def _size(c: random.Random) -> int:
    r = c.random()
    for share, low, high in _SIZES:
        if r < share:
            return c.randint(low, high)
        r -= share
    return DEVICES_MOST


def _bad_firmware(c: random.Random) -> tuple[float, Firmware]:
    """The share of devices whose firmware misbehaves, and how."""
    if c.random() < 0.75:
        return 0.0, Firmware()
    kind = c.choice(("drops", "goes back", "executes", "late"))
    share = c.uniform(0.05, 0.6)
    match kind:
        case "drops":
            return share, Firmware(drop_share=c.uniform(0.1, 1.0))
        case "goes back":
            return share, Firmware(goes_back=True)
        case "executes":
            return share, Firmware(executes_in_dry_run=True)
        case _:
            return share, Firmware(late_s=c.uniform(1.0, 20.0))


def _device(seed: int, n: int, bad: tuple[float, Firmware]) -> DeviceDraw:
    c = chance(seed, f"device {n}")
    misbehaves = c.random() < bad[0]
    return DeviceDraw(
        id=f"car-{n:03}",
        hardware=c.choice((1, 2, 2, 3, 3, 3)),
        updatable=c.random() > 0.04,
        firmware=bad[1] if misbehaves else Firmware(),
        period_s=c.uniform(2.0, 8.0),
        joins_at=c.uniform(10, 200) if n >= 3 and c.random() < 0.05 else None,
        outbox_max=c.choice((30, 20_000, 20_000, 20_000)),
    )


def settings(drawn: DeviceDraw) -> AgentSettings:
    return AgentSettings(outbox_max=drawn.outbox_max, updatable=drawn.updatable)


def _plan(c: random.Random) -> dict[str, Any]:
    moves = c.choice(
        (
            ("telemetry",),
            ("telemetry", "commands"),
            ("telemetry", "commands", "link"),
            ("telemetry", "commands", "link"),
            ("commands", "telemetry"),
            ("commands",),
        )
    )
    steps: list[dict[str, Any]] = []
    for move in moves:
        step: dict[str, Any] = {
            "move": move,
            "waves": list(c.choice(_WAVES)),
            "bake": _seconds(c.uniform(3, 15)),
            "gates": c.sample(_GATES[move], c.randint(1, len(_GATES[move]))),
        }
        stages = c.choice([some for some in _STAGES[move] if "link" not in moves or some[-1] == "new"])
        if move != "link":
            step["stages"] = list(stages)
        if c.random() < 0.15:
            step["approve"] = True
        steps.append(step)
    if c.random() < 0.2:
        steps[-1]["waves"] = ["34%", "67%", "90%"]
    plan: dict[str, Any] = {
        "migration": "simulated",
        "fleet": {"tenant": "t", "where": c.choice(("", "", "attributes.hardware >= 2"))},
        "from": {"legacy": "tcp://old.example.com:7700"},
        "to": {"fleetlift": "default"},
        "lever": "flag",
        "on_breach": c.choice(("revert", "revert", "hold")),
        "try_within": _seconds(c.uniform(8, 25)),
        "new_lost_limit": _seconds(c.uniform(5, 30)),
        "settle": _seconds(c.uniform(15, 40)),
        "grace": _seconds(c.uniform(2, 5)),
        "silent_after": _seconds(c.uniform(20, 60)),
        "commands_timeout": _seconds(c.uniform(5, 12)),
        "retry_after": _seconds(c.uniform(20, 60)),
        "no_data_after": _seconds(c.uniform(20, 60)),
        "steps": steps,
    }
    if c.random() < 0.8:
        plan["confidence"] = "none"
    if not plan["fleet"]["where"]:
        del plan["fleet"]["where"]
    return plan


def _seconds(value: float) -> str:
    return f"{value:.1f}s"


# -- faults -----------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[float, float, float]] = {
    # kind: how likely beside the others, and how long it lasts
    "reboot": (6, 0.5, 30),
    "power": (3, 1, 120),
    "disk full": (2, 5, 40),
    "clock": (2, 0, 0),
    "cut": (2, 0, 0),
    "stall": (2, 3, 70),
    "half-open": (2, 0, 0),
    "refused": (2, 5, 40),
    "slow": (2, 20, 60),
    "new down": (2, 3, 90),
    "new hangs": (1, 3, 40),
    "database down": (2, 2, 60),
    "old down": (2, 3, 60),
    "old hangs": (1, 3, 30),
    "telemetry worker": (3, 0.5, 30),
    "state worker": (2, 0.5, 20),
    "controller": (2, 0.5, 20),
    "controller at a step": (6, 0.5, 10),
    "two controllers": (3, 5, 40),
    "engine down": (2, 2, 20),
    "engine loses answers": (2, 5, 30),
    "controller cut off": (2, 3, 30),
}
FAULTS_WITHIN_S = 240.0


def _faults(seed: int) -> tuple[Fault, ...]:
    c = chance(seed, "faults")
    number = c.choice((1, 2, 3, 4, 6, 8, 12))
    kinds, weights = list(KINDS), [weight for weight, _, _ in KINDS.values()]
    found = []
    for n in range(number):
        kind = c.choices(kinds, weights)[0]
        _, least, most = KINDS[kind]
        found.append(
            Fault(
                number=n,
                kind=kind,
                at=c.uniform(2, FAULTS_WITHIN_S),
                lasts_s=c.uniform(least, most),
                share=c.choice((0.0, 0.1, 0.5, 1.0)),
                old=c.random() < 0.5,
                how=c.random(),
            )
        )
    return tuple(sorted(found, key=lambda fault: fault.at))
