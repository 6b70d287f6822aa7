"""What of the source's schema is no longer as it was at the copy.

Publication, follower, verifier and fence go by the tables, columns and references of the copy. A table that a
deploy has made since has rows of the tenant that nobody brings, compares or fences: they would stay behind,
and the source would go on taking more of them after the switch.
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

from fleetlift.core.tenant.closure import Closure, Part, Policy
from fleetlift.core.tenant.schema import Table, TableName

SHOWN: Final = 5
WHAT_TO_DO: Final = (
    "take this back on the source until the move is released (drop the new table or reference, or move it "
    "away), then resume; or revert, which empties the target, and resume: the copy then begins anew with the "
    "schema as it is. The source serves on"
)

_Place: TypeAlias = tuple[TableName, tuple[str, ...], TableName, tuple[str, ...], tuple[tuple[str, str], ...]]


def schema_changes(before: Closure, after: Closure) -> tuple[str, ...]:
    """What differs of the tables that have rows of the tenant, and of their references; () when nothing does.

    Tables that have none, before and after, may come, change and go as they like.
    """
    was, now = _coming(before), _coming(after)
    said = [_came(name, before) for name in sorted(now.keys() - was.keys())]
    said += [_went(name, after) for name in sorted(was.keys() - now.keys())]
    for name in sorted(was.keys() & now.keys()):
        if was[name] is not now[name]:
            said.append(f"{name}: its rows came as {was[name]} ones and would come as {now[name]} ones")
        said += _of_table(before.schema.tables[name], after.schema.tables[name])
    return (*said, *_of_references(before, after, was.keys() & now.keys()))


def told(changes: tuple[str, ...]) -> str:
    """The changes and what to do about them, for people; "" when there are none."""
    if not changes:
        return ""
    more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return (
        f"the source's schema is not as it was at the copy: {'; '.join(changes[:SHOWN])}{more}: {WHAT_TO_DO}"
    )


def _coming(closure: Closure) -> Mapping[TableName, Part]:
    return {name: part for name, part in closure.parts.items() if part is not Part.NONE}


def _came(name: TableName, before: Closure) -> str:
    how = "has rows of the tenant now" if name in before.schema.tables else "is a new table"
    return f"{name} {how}, and its rows would stay behind"


def _went(name: TableName, after: Closure) -> str:
    return f"{name} has no rows of the tenant any more" if name in after.schema.tables else f"{name} is gone"


def _of_table(before: Table, after: Table) -> list[str]:
    name, said = before.name, []
    was, now = ({one.name: one for one in table.columns} for table in (before, after))
    said += [f"{name} has a new column {column}" for column in now if column not in was]
    said += [f"{name} has lost its column {column}" for column in was if column not in now]
    for column in [one for one in was if one in now]:
        if was[column].type != now[column].type:
            said.append(f"{name}.{column} was {was[column].type} and is {now[column].type}")
        elif was[column].generated != now[column].generated:
            said.append(f"{name}.{column} is {'' if now[column].generated else 'no longer '}generated")
    if before.key != after.key:
        keys = [", ".join(key) or "none" for key in (before.key, after.key)]
        said.append(f"the key of {name} was {keys[0]} and is {keys[1]}")
    return said


def _of_references(before: Closure, after: Closure, tables: "set[TableName]") -> list[str]:
    """Of tables that came and still do; those of others come and go with their tables."""
    was, now = _references(before, tables), _references(after, tables)
    said = [f"{_told(place)} is a new reference" for place in now if place not in was]
    said += [f"{_told(place)} is no reference any more" for place in was if place not in now]
    return said + [
        f"{_told(place)} is treated as '{now[place][0]}' and was as '{was[place][0]}'"
        for place in now
        if place in was and was[place] != now[place]
    ]


def _references(closure: Closure, tables: "set[TableName]") -> dict[_Place, tuple[Policy, Policy]]:
    return {
        (edge.child, edge.columns, edge.parent, edge.parent_columns, edge.when): (edge.policy, edge.else_)
        for edge in closure.edges
        if edge.child in tables
    }


def _told(place: _Place) -> str:
    child, columns, parent, to_columns, _ = place
    return f"{child}({', '.join(columns)}) -> {parent}({', '.join(to_columns)})"
