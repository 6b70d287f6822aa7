"""How a migration stands, as one document: what the API answers, the live screen draws, the demo watches.

`migrate/status.py` fills it from the engine's tables. Times are Unix seconds, durations seconds.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec

from fleetlift.core.migration import GateResult, Phase, WavePhase
from fleetlift.core.timeline import TimelinePoint


class Mark(StrEnum):
    """How far a rung or a wave is."""

    WAITING = "waiting"
    OPEN = "open"
    DONE = "done"
    SKIPPED = "skipped"  # a wave that adds no device
    RETURNED = "returned"  # its devices went back after a breach


class WaveStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One wave of a rung: its share as the plan writes it, and how many devices it raises."""

    label: str  # "10 devices", "5%"
    devices: int
    mark: Mark = Mark.WAITING


class RungStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rung of the ladder: (step, stage) of the plan. `devices` stand on it or higher."""

    rung: int
    step: str  # telemetry | commands | link
    stage: str  # both | new | dry-run
    mark: Mark = Mark.WAITING
    devices: int = 0
    waves: tuple[WaveStatus, ...] = ()


class Straggler(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was told to move and has not, with the reason and since when."""

    device: str
    reason: str
    since: float | None = None


class EventLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the audit log without its evidence."""

    id: int
    at: float
    actor: str
    kind: str
    text: str


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the timeline with its moment."""

    at: float
    point: TimelinePoint


class MigrationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All that a screen needs. Members are counted, not listed; lists are short and newest last."""

    name: str
    tenant: str
    from_side: str
    to_side: str
    phase: Phase
    reason: str = ""
    plan_version: int = 1
    started_at: float
    now: float
    ended_at: float | None = None  # when it finished or was reverted or released
    time_left_s: float | None = None  # by the plan's bakes and the waves still to come; None: not known
    lever: str = "flag"
    on_breach: str = "revert"

    rung: int = 0
    wave: int = 0
    wave_phase: WavePhase = WavePhase.MOVING
    bake_s: float | None = None  # of the open wave
    bake_started_at: float | None = None
    rungs: tuple[RungStatus, ...] = ()

    devices: int = 0  # members that take part, excluded ones left out
    devices_old: int = 0  # served by the old side alone
    devices_both: int = 0
    devices_new: int = 0
    moving: int = 0  # told, evidence awaited
    excluded: int = 0
    never_seen: int = 0
    reverts: int = 0
    stragglers: tuple[Straggler, ...] = ()  # the first few; `stragglers_total` counts all
    stragglers_total: int = 0

    gates: tuple[GateResult, ...] = ()
    timeline: tuple[Moment, ...] = ()  # the last few minutes, thinned to at most 120 points
    events: tuple[EventLine, ...] = ()  # the last dozen
    open_requests: int = 0  # asked for by people, not yet answered by the controller
    controller_seen_at: float | None = None  # when the controller last wrote; old: nobody decides


# Names of the fields above (and of what they hold) that are moments: RFC 3339 on the wire, Unix seconds here.
_MOMENTS = frozenset(
    {"at", "now", "since", "started_at", "ended_at", "bake_started_at", "controller_seen_at"}
)


def to_document(status: MigrationStatus) -> dict[str, Any]:
    """The status as JSON writes it, with moments in RFC 3339, UTC."""
    return written_moments(status)


def from_document(document: Mapping[str, Any]) -> MigrationStatus:
    """The inverse of `to_document`. Raises msgspec.ValidationError for anything else."""
    return msgspec.convert(read_moments(document), MigrationStatus)


def written_moments(status: msgspec.Struct) -> dict[str, Any]:
    """A status of either kind as a document, its moments as text."""
    document = _moments(msgspec.to_builtins(status), _written)
    assert isinstance(document, dict)
    return document


def read_moments(document: Mapping[str, Any]) -> Any:
    """The inverse of `written_moments`."""
    return _moments(document, _read)


def _written(value: Any) -> Any:
    if not isinstance(value, int | float):
        return value
    return datetime.fromtimestamp(value, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read(value: Any) -> Any:
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else value
    except ValueError:
        return value


def _moments(value: Any, turn: Callable[[Any], Any], *, key: str = "") -> Any:
    """`value` with every moment in it turned; evidence of gates and figures of steps are left as they are."""
    if key in ("evidence", "figures"):
        return value
    if isinstance(value, Mapping):
        return {k: turn(v) if k in _MOMENTS else _moments(v, turn, key=k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_moments(v, turn) for v in value]
    return value
