"""A migration's plan, parsed: what `migrate/planfile.py` reads from YAML and `core/decide.py` follows."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec.structs import replace

from fleetlift.core.errors import Conflict
from fleetlift.core.gates import Gate, parse_gate
from fleetlift.core.orders import CommandsFlag, Flags, LinkFlag, TelemetryFlag
from fleetlift.core.parity import Rule
from fleetlift.core.units import Share

CONFIDENCE: Final = 0.95
"""Of a plan that says nothing: a gate errs in one wave of twenty at most, however often it is looked at."""


class Move(StrEnum):
    """What a step moves."""

    TELEMETRY = "telemetry"
    COMMANDS = "commands"
    LINK = "link"


class OnBreach(StrEnum):
    REVERT = "revert"  # the open wave's devices go back one rung
    HOLD = "hold"  # they stay; a person decides


STAGES: Final[Mapping[Move, tuple[str, ...]]] = MappingProxyType(
    {
        Move.TELEMETRY: ("both", "new"),
        Move.COMMANDS: ("dry-run", "both", "new"),
        Move.LINK: ("new",),
    }
)
"""The stages a step may have, in their only order; a plan may leave some out, or spread them over steps."""


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices: those of `tenant` that `where` selects ("": all). `canaries` go first, in this order.

    `control` of them, the last in the order, are raised by the last wave of each rung only. `updatable` is
    what a selected device must meet to be moved at all; "": unless its attribute `updatable` is false.
    """

    tenant: str
    where: str = ""
    updatable: str = ""
    canaries: tuple[str, ...] = ()
    control: Share | None = None


class SideSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A side as the plan names it: `{legacy: "tcp://…", token_env: NAME}`."""

    kind: str
    address: str
    options: Mapping[str, str] = {}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One `move`. Times in seconds."""

    move: Move
    stages: tuple[str, ...]
    waves: tuple[Share, ...]
    bake_s: float
    gates: tuple[Gate, ...] = ()
    approve: bool = False  # a person approves each wave after its bake
    settle_s: float = 60.0  # a device told to move may take so long before it counts as a straggler
    grace_s: float = 30.0  # a message may be under way so long before it counts as missing
    silent_after_s: float = 300.0  # a moved device unheard of for so long is silent
    commands_timeout_s: float = 60.0  # a command unanswered for so long counts as failed in the gates
    retry_after_s: float = 600.0  # a device that went back by itself is tried again after so long
    no_data_after_s: float | None = None  # None: max(bake, 60 s)
    confidence: float | None = CONFIDENCE  # of gates on sampled figures; None: they are compared as they are


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One migration. `old` and `new` are its `from` and `to`; the last two go into every order."""

    name: str
    fleet: Fleet
    old: SideSpec
    new: SideSpec
    steps: tuple[Step, ...]
    lever: str = "flag"
    on_breach: OnBreach = OnBreach.REVERT
    parity: tuple[Rule, ...] = ()  # what may differ between the sides
    try_within_s: float = 30.0
    new_lost_limit_s: float = 30.0


class Rung(msgspec.Struct, frozen=True, kw_only=True):
    """One (step, stage) of the ladder. `flags` are what a device on it obeys; rung 0 is `Flags()`."""

    index: int
    step: int  # index into the plan's steps; -1 for rung 0
    move: Move | None = None
    stage: str = "old"
    flags: Flags = Flags()
    waves: tuple[Share, ...] = ()
    bake_s: float = 0.0
    gates: tuple[Gate, ...] = ()
    approve: bool = False
    settle_s: float = 60.0
    grace_s: float = 30.0
    silent_after_s: float = 300.0
    commands_timeout_s: float = 60.0
    retry_after_s: float = 600.0
    no_data_after_s: float = 60.0

    @property
    def name(self) -> str:
        """As on screen: `telemetry: both`."""
        return f"{self.move}: {self.stage}" if self.move else "old side"


MOVES_SUCCESS: Final = parse_gate("moves.success >= 95%")
"""Every rung has it, unless its step has a gate of its own on the same metric."""


def ladder(plan: Plan) -> tuple[Rung, ...]:
    """The rungs of `plan`: every stage of every step, each with the flags of all stages up to it.

    `ladder(plan)[0]` is the old side; a device on rung k obeys `ladder(plan)[k].flags`.
    """
    rungs = [Rung(index=0, step=-1)]
    for number, step in enumerate(plan.steps):
        for stage in step.stages:
            rungs.append(
                Rung(
                    index=len(rungs),
                    step=number,
                    move=step.move,
                    stage=stage,
                    flags=_raised(rungs[-1].flags, step.move, stage),
                    waves=step.waves,
                    bake_s=step.bake_s,
                    gates=_gates(step),
                    approve=step.approve,
                    settle_s=step.settle_s,
                    grace_s=step.grace_s,
                    silent_after_s=step.silent_after_s,
                    commands_timeout_s=step.commands_timeout_s,
                    retry_after_s=step.retry_after_s,
                    no_data_after_s=(
                        max(step.bake_s, 60.0) if step.no_data_after_s is None else step.no_data_after_s
                    ),
                )
            )
    return tuple(rungs)


def gates_of(plan: Plan) -> tuple[Gate, ...]:
    """Every gate of the plan once, in the order of the ladder."""
    return tuple({gate.text: gate for rung in ladder(plan) for gate in rung.gates}.values())


def _gates(step: Step) -> tuple[Gate, ...]:
    own = any(gate.metric == MOVES_SUCCESS.metric for gate in step.gates)
    gates = step.gates if own else (*step.gates, MOVES_SUCCESS)
    return tuple(replace(gate, confidence=step.confidence) if gate.sampled else gate for gate in gates)


def _raised(flags: Flags, move: Move, stage: str) -> Flags:
    match move:
        case Move.TELEMETRY:
            return replace(flags, telemetry=TelemetryFlag(stage))
        case Move.COMMANDS:
            return replace(flags, commands=CommandsFlag(stage))
        case Move.LINK:
            return replace(flags, link=LinkFlag(stage))


def check_amendment(old: Plan, new: Plan, rung: int) -> None:
    """Raise Conflict when a running migration on `rung` cannot go on with `new`.

    Fleet, gates, waves and times may change, and what comes above `rung`; the migration's name, its
    sides, its lever and the rungs that devices stand on may not.
    """
    for what, before, after in (
        ("the migration's name", old.name, new.name),
        ("the tenant", old.fleet.tenant, new.fleet.tenant),
        ("the old side", old.old, new.old),
        ("the new side", old.new, new.new),
        ("the lever", old.lever, new.lever),
    ):
        if before != after:
            raise Conflict(f"an amended plan keeps {what}; revert and start another migration instead")
    if _climbed(ladder(old), rung) != _climbed(ladder(new), rung):
        raise Conflict(
            "an amended plan keeps the steps and stages that devices stand on already; "
            "change fleet, waves, gates, times or later steps"
        )


def _climbed(rungs: Sequence[Rung], upto: int) -> list[Flags]:
    return [rung.flags for rung in rungs[: upto + 1]]
