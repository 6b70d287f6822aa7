"""What a measurement is of, the devices of the open wave, and how its findings are put."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from fleetlift.core.migration import Member, MemberState, MigrationState
from fleetlift.core.orders import Flags
from fleetlift.core.plan import Rung

EXAMPLES = 10  # named in one piece of evidence
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Wave(msgspec.Struct, frozen=True, kw_only=True):
    """The open wave's devices: all that were told, and those of them that have moved."""

    told: tuple[Member, ...]
    moved: tuple[Member, ...]


def open_wave(state: MigrationState) -> Wave:
    """The members that the open wave has raised (or is raising)."""
    told = tuple(
        m
        for m in state.members.values()
        if m.rung == state.rung
        and m.wave == state.wave
        and m.epoch > 0
        and m.state in (MemberState.MOVING, MemberState.MOVED, MemberState.STRAGGLER)
    )
    return Wave(told=told, moved=tuple(m for m in told if m.state is MemberState.MOVED))


def standing_flags(member: Member, rungs: Sequence[Rung]) -> Flags:
    """The flags that a member obeys as far as is known: those of its rung once it has moved there."""
    at = member.came_from if member.state in (MemberState.MOVING, MemberState.STRAGGLER) else member.rung
    return rungs[min(at, len(rungs) - 1)].flags


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def summary(text: str, **more: Any) -> dict[str, Any]:
    return {"summary": text, **more}
