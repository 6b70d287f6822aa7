"""The state of a migration: a ladder of rungs, the devices on it, and the phases it goes through.

Every (step, stage) of a plan is one rung of a ladder; rung 0 is "all on the old side". Each device stands
on one rung; a wave raises the next share of the fleet, in a fixed order of devices, by one rung. Revert
means a lower rung. `decide` (in `core/decide.py`) is the only place that changes this state.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from fleetlift.core.orders import DeviceReport


class Phase(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"  # nothing grows; gates stay armed
    HELD = (
        "held"  # a gate was breached: the wave went back (or stays, by `on_breach: hold`); a person decides
    )
    REVERTING = "reverting"
    REVERTED = "reverted"
    FINISHED = "finished"
    RELEASED = (
        "released"  # the way back was given up on purpose; nothing of the migration is kept on the sides
    )


class WavePhase(StrEnum):
    MOVING = "moving"  # devices were told; evidence from the new side is awaited
    BAKING = "baking"
    AWAITING_APPROVAL = "awaiting-approval"
    RETURNING = "returning"  # a breach: this wave's devices are going back one rung


class MemberState(StrEnum):
    WAITING = "waiting"  # not yet told anything
    MOVING = "moving"
    MOVED = "moved"  # evidence seen on the new side (or on the old one, after a revert to rung 0)
    RETURNING = "returning"
    RETURNED = "returned"
    STRAGGLER = "straggler"  # told, and has not moved; `reason` says why
    EXCLUDED = "excluded"  # no longer, or never, eligible; `reason` says why


class Member(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One device of the migration. `rank` is its place in the order; a device keeps it for good."""

    device: str
    rank: int
    rung: int = 0
    epoch: int = 0  # of the last order given; 0: none yet
    state: MemberState = MemberState.WAITING
    reason: str = ""
    told_at: float | None = None
    moved_at: float | None = None  # when the evidence for `rung` was seen
    wave: int | None = None  # index of the wave that raised it to `rung`
    came_from: int = 0  # the rung it was on before it was told `rung`: where a breach takes it back to


class MigrationState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    phase: Phase = Phase.RUNNING
    rung: int = 1  # the rung that the open wave raises devices to
    wave: int = 0  # index of the open wave within that rung
    wave_phase: WavePhase = WavePhase.MOVING
    wave_opened_at: float | None = None  # None: the wave's devices have not been told yet
    bake_started_at: float | None = None
    unmeasured_since: float | None = None  # since when some gate has had no data
    approved: bool = False
    epoch: int = 0
    reason: str = ""
    reverts: int = 0
    measured_from: float | None = None  # gates are measured over [this, now]; set as a wave opens or resumes
    told_again_at: float | None = None  # when orders not yet obeyed were last repeated
    returned_at: float | None = None  # when all reachable devices of a breached wave were back
    kept_back: tuple[str, ...] = ()  # devices that a person sent back; excluded until resumed
    members: Mapping[str, Member] = {}


class FleetDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the inventory of a side knows it."""

    id: str
    attributes: dict[str, Any] = {}
    connected: bool = False
    since: float | None = None  # since when it has been connected or away; None: never seen


class DeviceObservation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is known of one device now. `report` is the newest epoch's report seen by either side."""

    connected_old: bool = False
    connected_new: bool = False
    report: DeviceReport | None = None
    report_by_new: DeviceReport | None = None  # the evidence that a move counts by
    new_telemetry_at: float | None = None  # newest telemetry that came by the new path
    old_telemetry_at: float | None = None


class RequestKind(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"  # from paused; from held: try the breached wave again
    APPROVE = "approve"
    REVERT = "revert"  # args: {} everything, {"wave": true} the open wave, {"device": id} one device
    AMEND = "amend"  # the plan was replaced (narrowed, usually); go on with it
    RELEASE = "release"
    EMERGENCY = "emergency"  # the journal shows that `revert --journal` was used: take that in


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a person asked for. `id` is its row; each is decided once."""

    id: int
    kind: RequestKind
    actor: str
    at: float
    args: dict[str, Any] = {}


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """What some devices did, summed over them: `n` operations (or hours) a device, `x` of them gone wrong.

    The sums of squares tell how much the devices differ: a device that fails a thousand times is one device.
    """

    devices: int  # with anything to count
    n: float
    x: float
    nn: float  # the sum of n * n over devices, and so on
    xx: float
    nx: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How long operations took, as an `Arm` for each of `edges_s`, whose `x` are those that took longer.

    Times are those of `core/delays.py`: a bucket's upper edge. Only edges of buckets that hold anything are
    listed, in ascending order.
    """

    devices: int
    n: float
    nn: float
    edges_s: tuple[float, ...]
    x: tuple[float, ...]
    xx: tuple[float, ...]
    nx: tuple[float, ...]


class Basis(StrEnum):
    """What the old side's figure is of, and so how far it may be off."""

    NONE = ""
    DEVICES = "devices"  # other devices, equally chosen: these and those differ by chance
    SAME = "same"  # the same devices, by the other path or before: no chance in who they are


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One measurement for a gate. `value` None: there is no data. `old` is the old side's, for ratios.

    What was sampled comes with the sums that bounds are computed from, `arm` or `spread`; `core/figures.py`
    makes such samples of figures by device. `over_s` is the time that it took to come together.
    """

    value: float | None
    n: int = 0
    old: float | None = None
    old_n: int = 0
    evidence: dict[str, Any] = {}
    arm: Arm | None = None
    old_arm: Arm | None = None
    spread: Spread | None = None
    old_spread: Spread | None = None
    basis: Basis = Basis.NONE
    over_s: float = 0.0


class Observations(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision may rest on. `fleet`: the devices that `where` selects; None: not readable now."""

    fleet: tuple[FleetDevice, ...] | None = None
    devices: Mapping[str, DeviceObservation] = {}
    samples: Mapping[str, Sample] = {}  # by the gate's text
    requests: tuple[Request, ...] = ()
    old_up: bool = True
    new_up: bool = True


class Tell(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag=True):
    """Give one device its order for a rung. Safe to repeat: the device applies an epoch once."""

    device: str
    epoch: int
    rung: int


Action = Tell


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the audit log: what was decided, by whom, and the figures that led to it.

    `kind` is past tense and stable, as in `wave_opened`, `gate_breached`, `wave_returned`.
    """

    kind: str
    text: str
    actor: str = "controller"
    evidence: dict[str, Any] = {}


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    state: MigrationState
    actions: tuple[Action, ...] = ()
    audit: tuple[AuditEntry, ...] = ()
    answered: tuple[int, ...] = ()  # ids of the requests dealt with
    gates: tuple["GateResult", ...] = ()  # the verdicts of this round, for screen and report


class Verdict(StrEnum):
    ADVANCE = "advance"
    HOLD = "hold"
    REVERT = "revert"


class GateResult(msgspec.Struct, frozen=True, kw_only=True):
    """One gate's verdict with the evidence it was computed from."""

    gate: str
    verdict: Verdict
    why: str  # one line with the figures
    value: float | None = None
    limit: float | None = None  # in the value's unit, ratios resolved
    unit: str = ""
    n: int = 0
    old: float | None = None
    evidence: dict[str, Any] = {}
    missing: bool = False  # held for want of data; for longer than `no_data_after` that is a breach
    undecided: bool = False  # held though there is data: too little of it to be sure either way
    bound: float | None = None  # what the value is at the worst (advance, hold) or at the best (revert)
    sample: Sample | None = None  # what the verdict was computed from: `judge(gate, sample)` says the same
