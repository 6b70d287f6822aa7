"""How far ahead of the source's a sequence on the target starts.

Both databases go on giving ids after the switch: the source to its other tenants, the target to the one that
left. So that an id given on one side is not given on the other (rows flow back until the move is released),
the target leaves a gap of ids to the source.

On the way back the source's sequences, which are every tenant's, are set only where they have to be: where
the target has given out ids since the switch that its rows bring along.
"""

import msgspec

from fleetlift.core.tenant.closure import Closure, Part


class SequenceState(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence, `name` as `schema.name`. `column_max`/`column_min`: what the column it fills can hold."""

    name: str
    last_value: int
    is_called: bool
    increment: int = 1
    minimum: int = 1
    maximum: int = (1 << 63) - 1
    cycle: bool = False
    column_max: int = (1 << 63) - 1
    column_min: int = -(1 << 63)


class Ahead(msgspec.Struct, frozen=True, kw_only=True):
    """What to set on the target, or None to leave it, and what to tell people ("" when all is well)."""

    value: int | None = None
    is_called: bool = True
    note: str = ""


def ahead(source: SequenceState, target: SequenceState, gap: int) -> Ahead:
    """`gap` is a number of ids. Never backwards, and never beyond what sequence and column can hold.

    Where there is no room for the whole gap half of the room is left to the source. A cycling sequence starts
    again some day on both sides: it is set ahead, and said that this proves nothing.
    """
    step = source.increment
    up = step > 0
    limit = (
        min(source.maximum, target.maximum, source.column_max)
        if up
        else max(source.minimum, target.minimum, source.column_min)
    )
    room = max(0, (limit - source.last_value) // step)
    note = ""
    wanted = min(gap, room)
    if gap > room:
        wanted = (room + 1) // 2
        note = (
            f"{source.name}: only {room} ids are left of what it can give: the target starts {wanted} ahead "
            f"instead of {gap}; both sides may run out"
        )
    if source.cycle and gap:
        note = note or f"{source.name}: it starts again at its end, so ids may come twice in spite of the gap"
    value = source.last_value + wanted * step
    behind = target.last_value < value if up else target.last_value > value
    same = target.last_value == value
    # Where the target has given ids itself it may be further ahead already: a reverted and repeated move.
    if not (behind or (same and (source.is_called or wanted > 0) and not target.is_called)):
        return Ahead(note=note)
    return Ahead(value=value, is_called=source.is_called or wanted > 0, note=note)


def has_given(state: SequenceState, stood_at: int | None) -> bool:
    """Whether it may have given out ids since it stood at a value that had been given; None: not known."""
    return stood_at is None or state.last_value != stood_at


def staying(closure: Closure) -> frozenset[str]:
    """Sequences that fill only tables without rows of the tenant. One that fills none may be anybody's."""
    fills: dict[str, set[Part]] = {}
    for table in closure.schema.tables.values():
        for column in table.columns:
            fills.setdefault(column.sequence, set()).add(closure.parts[table.name])
    return frozenset(name for name, parts in fills.items() if name and parts == {Part.NONE})
