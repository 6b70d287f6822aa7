"""What a measurement is of, the devices of the open wave, and how its findings are put."""

import heapq
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

import msgspec

from fleetlift.core.migration import Member, MemberState, MigrationState
from fleetlift.core.orders import Flags
from fleetlift.core.plan import Rung

EXAMPLES = 10  # named in one piece of evidence
ARM_MOST = 2000  # devices of which times are compared: enough for any bound, and quick to read
LEAST = 5  # devices of a control
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


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a comparison is between. `control` are equally chosen and stay behind; empty: nobody may stand for
    the wave's devices, because canaries were named and not chosen, or nobody is left."""

    moved: tuple[Member, ...]  # of a large wave an even sample
    control: tuple[Member, ...]
    others: tuple[Member, ...]  # still served by the old side, raised by earlier waves among them


def groups(wave: Wave, state: MigrationState, canaries: Collection[str]) -> Groups:
    """The open wave and those it can be compared with, `ARM_MOST` of each: the order is an even one."""
    named = any(m.device in canaries for m in wave.moved)
    staying = [m for m in state.members.values() if m.device not in canaries and _stays(m)]
    behind = [] if named else [m for m in staying if m.rung < state.rung]
    others = [] if named else [m for m in staying if m.wave != state.wave or m.rung != state.rung]
    return Groups(moved=_even(wave.moved), control=_even(behind), others=_even(others))


def _stays(member: Member) -> bool:
    """Served as its rung says. Who is on the way, has failed or was sent back is no measure for others."""
    return member.state in (MemberState.WAITING, MemberState.MOVED)


def _even(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(heapq.nsmallest(ARM_MOST, members, key=attrgetter("rank")))
