"""How a tenant's move stands: what the API answers, the live screen draws, the demo watches.

`migrate/tenant_status.py` fills it from the engine's tables. Times are Unix seconds, durations seconds.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from fleetlift.core.migration import GateResult, Phase
from fleetlift.core.status import EventLine, read_moments, written_moments
from fleetlift.core.tenant.move import StepPhase
from fleetlift.core.timeline import GatePoint

KIND = "tenant"


class MovePoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One point of a move's timeline. None: not measured. Rows are sums since the start, rates a second.

    `not_carried`: changes on the target of rows that all tenants share; a revert leaves them behind.
    `at_old` and `at_new` are connections at the old address and devices on line at the new side.
    """

    phase: str
    step: int
    rows_copied: int | None = None
    rows_total: int | None = None
    rows_applied: int | None = None
    applied_s: float | None = None
    lag_s: float | None = None
    lag_bytes: int | None = None
    not_carried: int | None = None
    at_old: int | None = None
    at_new: int | None = None
    rate_old: float | None = None
    rate_new: float | None = None
    offered_s: float | None = None
    accepted_s: float | None = None
    load_p99_s: float | None = None
    frozen: bool = False
    gates: tuple[GatePoint, ...] = ()


class MoveMoment(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    point: MovePoint


class StepLine(msgspec.Struct, frozen=True, kw_only=True):
    """One step: where it is and what it says of itself. `figures` are by name, units last."""

    name: str
    phase: StepPhase
    wave: int = 0
    waves: int = 1
    text: str = ""
    figures: Mapping[str, Any] = {}
    started_at: float | None = None
    ended_at: float | None = None


class MoveStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All that a screen needs. `source` and `target` are addresses without secrets."""

    kind: str = KIND
    name: str
    tenant: str
    source: str
    target: str
    phase: Phase
    reason: str = ""
    way_back: str = ""  # why there is none; "": there is one
    plan_version: int = 1
    started_at: float
    now: float
    ended_at: float | None = None
    step: int = 0
    steps: tuple[StepLine, ...] = ()
    reverts: int = 0
    gates: tuple[GateResult, ...] = ()
    timeline: tuple[MoveMoment, ...] = ()
    events: tuple[EventLine, ...] = ()
    open_requests: int = 0
    controller_seen_at: float | None = None


def to_document(status: MoveStatus) -> dict[str, Any]:
    """The status as JSON writes it, with moments in RFC 3339, UTC."""
    return written_moments(status)


def from_document(document: Mapping[str, Any]) -> MoveStatus:
    """The inverse of `to_document`. Raises msgspec.ValidationError for anything else."""
    return msgspec.convert(read_moments(document), MoveStatus)
