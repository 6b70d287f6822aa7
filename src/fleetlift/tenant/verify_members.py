"""Which rows are the tenant's, as the verifier sees it: it shares nothing with what chose the rows to copy.

For whole tables: breadth first from the root downwards, the keys of each generation kept in temporary tables
of the source's session (`KeySets`). They are as old as their making, so a row that looks wrong by them is
looked at again for itself: upwards from the row, reference by reference, until the root is met or nothing is
left (`owned_among`). That walk is the mover's own; the database is asked for single rows by key.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from fleetlift.core.tenant.closure import Closure, Edge, Part
from fleetlift.core.tenant.compare import reaching
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.core.tenant.verify_report import Key
from fleetlift.store.pool import Conn
from fleetlift.tenant.verify_rows import Shape, literal

_FAMILIES: Final = (
    frozenset({"smallint", "integer", "bigint"}),
    frozenset({"text", "character varying", "bpchar", "name"}),
)
_READS: Final[Mapping[str, re.Pattern[str]]] = {  # texts that can be a value of that type
    "smallint": re.compile(r"-?[0-9]{1,4}"),
    "integer": re.compile(r"-?[0-9]{1,9}"),
    "bigint": re.compile(r"-?[0-9]{1,18}"),
    "uuid": re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
}


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """An edge as SQL. `textual`: its two sides are of types that are only alike as text."""

    edge: Edge
    textual: bool

    def child(self, alias: str) -> str:
        return self._columns(alias, self.edge.columns)

    def parent(self, alias: str) -> str:
        return self._columns(alias, self.edge.parent_columns)

    def _columns(self, alias: str, names: Sequence[str]) -> str:
        cast = "::text" if self.textual else ""
        return ", ".join(f"{alias}.{quoted(name)}{cast}" for name in names)

    def holds(self, alias: str) -> str:
        """`… AND ` for the rows of the child that this reference holds for; "" for all."""
        return "".join(f"{alias}.{quoted(name)} = {literal(value)} AND " for name, value in self.edge.when)

    def value(self, alias: str) -> str:
        """The texts that the reference of a row points by; NULL when it points at nothing."""
        texts = ", ".join(f"{alias}.{quoted(name)}::text" for name in self.edge.columns)
        given = " AND ".join(f"{alias}.{quoted(name)} IS NOT NULL" for name in self.edge.columns)
        return f"CASE WHEN {self.holds(alias)}{given} THEN ARRAY[{texts}] END"


class Membership:
    """A closure's edges between tables that are on both sides."""

    def __init__(self, closure: Closure, shapes: Mapping[TableName, Shape]) -> None:
        self.closure, self.shapes = closure, shapes
        self._links = [
            Link(edge=edge, textual=_textual(edge, shapes))
            for edge in closure.edges
            if edge.child in shapes and edge.parent in shapes and self.part(edge.child) is not Part.NONE
        ]

    def part(self, table: TableName) -> Part:
        return self.closure.parts.get(table, Part.NONE)

    def own(self, table: TableName) -> list[Link]:
        return self._of(self.closure.own(table))

    def down(self, table: TableName) -> list[Link]:
        return self._of(self.closure.down(table))

    def up(self, table: TableName) -> list[Link]:
        return self._of(self.closure.up(table))

    def stops(self, table: TableName) -> list[Link]:
        return self._of(self.closure.stops(table))

    def stopped_by(self, table: TableName) -> list[Link]:
        return self._of(self.closure.stopped_by(table))

    def brought_by(self, table: TableName) -> list[Link]:
        if self.part(table) in (Part.WHOLE, Part.NONE):
            return []
        return self._of(self.closure.brought_by(table))

    def _of(self, edges: Iterable[Edge]) -> list[Link]:
        names = {edge.name for edge in edges}
        return [link for link in self._links if link.edge.name in names]

    def is_root(self, table: TableName, alias: str) -> str:
        """SQL: whether the row is the root; never NULL."""
        root = self.closure.root
        if table != root.table:
            return "false"
        return f"({alias}.{quoted(root.column)} = {literal(root.value)}) IS TRUE"


def _textual(edge: Edge, shapes: Mapping[TableName, Shape]) -> bool:
    for column, to in zip(edge.columns, edge.parent_columns, strict=True):
        mine = shapes[edge.child].field(column).plain
        theirs = shapes[edge.parent].field(to).plain
        if mine != theirs and not any(mine in family and theirs in family for family in _FAMILIES):
            return True
    return False


# -- whole tables, downwards ------------------------------------------------------------------------------


class KeySets:
    """Temporary tables of one session on the source: the keys of the tenant's rows that others refer to."""

    def __init__(self, conn: Conn, membership: Membership) -> None:
        self._conn, self._members = conn, membership
        self._owned: dict[TableName, tuple[str, tuple[str, ...]]] = {}
        self._shared: dict[TableName, tuple[str, tuple[str, ...]]] = {}
        self._made = 0

    async def make(self) -> None:
        """Make them, or make them anew, all from one snapshot."""
        async with self._conn.transaction(isolation="repeatable_read"):
            for name, _ in [*self._owned.values(), *self._shared.values()]:
                await self._conn.execute(f"DROP TABLE {name}")
            self._owned, self._shared = {}, {}
            await self._make_owned()
            await self._make_shared()
            for name, _ in [*self._owned.values(), *self._shared.values()]:
                await self._conn.execute(f"ANALYZE {name}")

    def owns(self, table: TableName, alias: str = "r") -> str:
        """SQL: whether the row `alias` is owned by these sets (or comes because all of its table do)."""
        if self._members.part(table) is Part.WHOLE:
            return "true"
        ways = [self._way(link, alias=alias) for link in self._members.own(table)]
        if table == self._members.closure.root.table:
            ways.append(self._members.is_root(table, alias))
        return f"({' OR '.join(ways)})" if ways else "false"

    def brings(self, table: TableName, alias: str = "r", generation: int | None = None) -> str:
        """SQL: whether the row `alias` comes along as a shared one by these sets."""
        if table not in self._shared:
            return "false"
        name, columns = self._shared[table]
        key = self._members.shapes[table].key or columns
        mine = ", ".join(f"{alias}.{quoted(column)}" for column in key)
        theirs = ", ".join(f"s.{quoted(column)}" for column in key)
        only = "" if generation is None else f" WHERE s.generation = {generation}"
        return f"(({mine}) IN (SELECT {theirs} FROM {name} s{only}))"

    def comes(self, table: TableName) -> str:
        owns, brings = self.owns(table), self.brings(table)
        ways = [way for way in (owns, brings) if way != "false"]
        return "true" if "true" in ways else f"({' OR '.join(ways)})" if ways else "false"

    def _way(self, link: Link, generation: int | None = None, alias: str = "r") -> str:
        name, _ = self._owned[link.edge.parent]
        only = "" if generation is None else f" WHERE p.generation = {generation}"
        return (
            f"({link.holds(alias)}({link.child(alias)}) IN (SELECT {link.parent('p')} FROM {name} p{only}))"
        )

    async def _new(self, table: TableName, columns: tuple[str, ...], what: str) -> str:
        self._made += 1
        name = f"pg_temp.fleetlift_{what}_{self._made}"
        shape = self._members.shapes[table]
        picked = ", ".join(quoted(column) for column in columns)
        await self._conn.execute(
            f"CREATE TEMPORARY TABLE {name.removeprefix('pg_temp.')} AS "
            f"SELECT {picked}, 0 AS generation FROM {shape.sql} LIMIT 0"
        )
        return name

    async def _make_owned(self) -> None:
        members = self._members
        inner = [table for table in members.shapes if members.down(table)]
        for table in inner:
            columns = tuple(
                dict.fromkeys(c for link in members.down(table) for c in link.edge.parent_columns)
            )
            self._owned[table] = (await self._new(table, columns, "owned"), columns)
        roots = [table for table in inner if table == members.closure.root.table]
        fresh = set()
        for table in roots:
            if await self._add(self._owned[table], table, members.is_root(table, "r"), 0):
                fresh.add(table)
        generation = 0
        while fresh:
            generation += 1
            grown = set()
            for table in inner:
                links = [link for link in members.own(table) if link.edge.parent in fresh]
                for link in links:
                    way = self._way(link, generation - 1)
                    if await self._add(self._owned[table], table, way, generation):
                        grown.add(table)
            fresh = grown

    async def _make_shared(self) -> None:
        members = self._members
        brought = [table for table in members.shapes if members.brought_by(table)]
        for table in brought:
            key = members.shapes[table].key
            more = (c for link in members.brought_by(table) for c in link.edge.parent_columns)
            columns = tuple(dict.fromkeys([*key, *more]))
            self._shared[table] = (await self._new(table, columns, "shared"), columns)
        generation, fresh = 0, set(brought)
        while fresh:
            grown = set()
            for table in brought:
                for link in members.brought_by(table):
                    child = link.edge.child
                    if generation == 0:
                        comes = self.owns(child, "c")
                    elif child in fresh and child in self._shared:
                        comes = self.brings(child, "c", generation - 1)
                    else:
                        continue
                    way = (
                        f"({link.parent('r')}) IN (SELECT {link.child('c')} FROM "
                        f"{members.shapes[child].sql} c WHERE {link.holds('c')}{comes})"
                    )
                    if await self._add(self._shared[table], table, way, generation):
                        grown.add(table)
            fresh = grown
            generation += 1

    async def _add(
        self, into: tuple[str, tuple[str, ...]], table: TableName, which: str, generation: int
    ) -> bool:
        name, columns = into
        mine = ", ".join("r." + quoted(column) for column in columns)
        theirs = ", ".join(quoted(column) for column in columns)
        done = await self._conn.execute(
            f"INSERT INTO {name} SELECT n.*, {generation} FROM ("
            f"SELECT {mine} FROM {self._members.shapes[table].sql} r WHERE {which} "
            f"EXCEPT SELECT {theirs} FROM {name}) n"
        )
        return not done.endswith(" 0")


# -- single rows, upwards ---------------------------------------------------------------------------------


class Target(NamedTuple):
    """Where a reference points: rows of `table` whose `columns` read so. `textual`: compared as text."""

    table: TableName
    columns: tuple[str, ...]
    values: Key
    textual: bool = False


async def owned_among(conn: Conn, members: Membership, table: TableName, keys: Collection[Key]) -> set[Key]:
    """Those of `keys` whose row is owned, as of now (one snapshot, if the caller's transaction has one)."""
    if members.part(table) is Part.WHOLE:
        return set(keys)
    if members.part(table) is not Part.OWNED:
        return set()
    shape = members.shapes[table]
    asked = {Target(table, shape.key, key) for key in keys}
    refers_to: dict[Target, set[Target]] = {}
    roots: set[Target] = set()
    frontier = asked
    while frontier:
        found: set[Target] = set()
        groups: dict[tuple[TableName, tuple[str, ...], bool], list[Target]] = {}
        for one in frontier:
            refers_to[one] = set()
            groups.setdefault((one.table, one.columns, one.textual), []).append(one)
        for targets in groups.values():
            found |= await _look(conn, members, targets, refers_to, roots)
        frontier = found - refers_to.keys()
    owned = reaching(roots, refers_to)
    return {one.values for one in asked if one in owned}


async def _look(
    conn: Conn,
    members: Membership,
    targets: list[Target],
    refers_to: dict[Target, set[Target]],
    roots: set[Target],
) -> set[Target]:
    """Read the rows that `targets` (of one table, by the same columns) mean; gives what they refer to."""
    first = targets[0]
    shape = members.shapes[first.table]
    links = members.own(first.table)
    columns = [link.value("r") for link in links]
    head = ", ".join(["q.n", f"{members.is_root(first.table, 'r')} AS root", *columns])
    found: set[Target] = set()
    for row in await conn.fetch(
        *by_key(shape, first.columns, [t.values for t in targets], head, first.textual)
    ):
        one = targets[row[0] - 1]
        if row[1]:
            roots.add(one)
        for link, values in zip(links, tuple(row)[2:], strict=True):
            if values is not None:
                edge = link.edge
                parent = Target(edge.parent, edge.parent_columns, tuple(values), link.textual)
                refers_to[one].add(parent)
                found.add(parent)
    return found


def by_key(
    shape: Shape,
    columns: Sequence[str],
    values: Sequence[Key],
    head: str,
    textual: bool = False,
    tail: str = "",
) -> tuple[str, ...]:
    """Query and arguments for the rows `r` whose `columns` are each of `values`; `q.n` counts them from 1.

    `textual`: only rows that read exactly so as text (values that cannot be of the type find nothing).
    """
    lists: list[list[str | None]] = [[] for _ in columns]
    same = []
    for n, name in enumerate(columns):
        field = shape.field(name)
        reads = _READS.get(field.plain)
        if not textual:
            same.append(f"r.{quoted(name)} = q.c{n}::{field.plain}")
        elif reads is None:
            same.append(f"r.{quoted(name)}::text = q.c{n}")
        else:
            same.append(f"r.{quoted(name)} = q.c{n}::{field.plain} AND r.{quoted(name)}::text = q.c{n}")
        for value in values:
            fits = not textual or reads is None or reads.fullmatch(value[n])
            lists[n].append(value[n] if fits else None)
    arrays = ", ".join(f"${n + 1}::text[]" for n in range(len(columns)))
    names = ", ".join(f"c{n}" for n in range(len(columns)))
    query = (
        f"SELECT {head} FROM unnest({arrays}) WITH ORDINALITY q({names}, n) "
        f"JOIN {shape.sql} r ON {' AND '.join(same)} {tail}"
    )
    return (query, *lists)  # type: ignore[arg-type]
