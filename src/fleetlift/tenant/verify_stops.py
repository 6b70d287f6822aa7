"""Rows that have come to point, by a reference that stops the move, at a row that does not come.

The explanation looks at every row before the copy and before the switch. What was written since is looked at
here by its keys, from both ends: a row that points away now, and a row that left while others point at it. On
the source both are in order, and nothing on the target refuses them: streams write past its foreign keys.
"""

from collections.abc import Sequence

from fleetlift.core.tenant.schema import quoted
from fleetlift.core.tenant.verify_report import Finding, Key, Kind
from fleetlift.store.pool import Conn
from fleetlift.tenant.verify_members import Link, Membership, by_key
from fleetlift.tenant.verify_rows import Shape


async def forbidden(
    source: Conn, target: Conn, members: Membership, shape: Shape, keys: Sequence[Key]
) -> list[Finding]:
    """The target's rows among `keys`, or that refer to one of them, that point at a row which is on the
    source and not on the target. Of a table without a key, all rows are looked at."""
    found: dict[tuple[str, Key], Finding] = {}
    for link in members.stops(shape.table):
        for one in await _pointing(source, target, members, link, shape.key, keys):
            found[link.edge.name, one.key] = one
    for link in members.stopped_by(shape.table):
        columns = link.edge.parent_columns
        texts = ", ".join(f"r.{quoted(name)}::text" for name in columns)
        rows = await source.fetch(*by_key(shape, shape.key, keys, f"ARRAY[{texts}]")) if shape.key else []
        values = [tuple(row[0]) for row in rows if None not in row[0]]
        for one in await _pointing(source, target, members, link, link.edge.columns, values):
            found[link.edge.name, one.key] = one
    return list(found.values())


async def _pointing(
    source: Conn, target: Conn, members: Membership, link: Link, columns: Sequence[str], values: Sequence[Key]
) -> list[Finding]:
    """The target's rows whose `columns` read as one of `values` (all, where there are no `columns`) and that
    point by `link` at a row that only the source has."""
    child, parent = members.shapes[link.edge.child], members.shapes[link.edge.parent]
    away = f"NOT EXISTS (SELECT 1 FROM {parent.sql} p WHERE ({link.parent('p')}) = ({link.child('r')}))"
    key = child.keys or child.hexadecimal
    head = f"ARRAY[{key}] AS key, {link.value('r')} AS value"
    if columns:
        textual = link.textual and columns == link.edge.columns
        rows = await target.fetch(*by_key(child, columns, values, head, textual, tail=f"AND {away}"))
    else:
        rows = await target.fetch(f"SELECT {head} FROM {child.sql} r WHERE {away}")
    pointing = [(tuple(row["key"]), tuple(row["value"])) for row in rows if row["value"] is not None]
    at = sorted({value for _, value in pointing})
    asked = by_key(parent, link.edge.parent_columns, at, "q.n", link.textual)
    there = {at[row[0] - 1] for row in await source.fetch(*asked)} if at else set()
    return [
        Finding(kind=Kind.FORBIDDEN, table=child.table, key=key, columns=link.edge.columns)
        for key, value in pointing
        if value in there
    ]
