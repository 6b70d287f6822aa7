"""Of one row: the chain of references that brings it along, or the reasons why it does not come."""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

import asyncpg
import msgspec

from fleetlift.core.errors import BadInput, NotFound
from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy
from fleetlift.core.tenant.derive import columns_text, short
from fleetlift.core.tenant.explanation import Link, Why, edge_text, to_write
from fleetlift.core.tenant.schema import Table, TableName, quoted, quoted_table
from fleetlift.store.pool import Conn
from fleetlift.tenant.membership import (
    literal,
    matches,
    member_condition,
    owned_condition,
    refers,
    row_condition,
)

SAMPLES: Final = 5
_SEEN_MAX: Final = 10_000  # rows looked at for one answer

_EASY: Final = 4  # references within cycles that a planner orders at once


async def why(conn: Conn, closure: Closure, table: TableName, key: Mapping[str, str] | Sequence[str]) -> Why:
    """Why one row comes, or why it does not. `key`: values as texts, by column or in the key's order.

    Raises NotFound when there is no such row, BadInput when the key does not fit the table.
    """
    if table not in closure.schema.tables:
        raise NotFound(f"there is no table {table} in the source")
    async with snapshot(conn, closure):
        return await _Reasoner(conn, closure).why(table, _named(closure.schema.tables[table], key))


@contextlib.asynccontextmanager
async def snapshot(conn: Conn, closure: Closure) -> AsyncIterator[None]:
    """Everything within is read as of one moment; nothing can be written."""
    cyclic = {table for group in closure.cycles for table in group}
    entangled = sum(edge.child in cyclic and edge.parent in cyclic for edge in closure.edges) > _EASY
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        await conn.execute("SET LOCAL jit = off; SET LOCAL work_mem = '64MB'")
        if entangled:  # seconds of planning for each of many statements are not worth the best order
            await conn.execute("SET LOCAL join_collapse_limit = 2")
        yield


def _named(table: Table, key: Mapping[str, str] | Sequence[str]) -> Mapping[str, str]:
    if isinstance(key, Mapping):
        known = [column.name for column in table.columns]
        for column in key:
            if column not in known:
                raise BadInput(f"{table.name} has no column {column!r}; it has {', '.join(known)}")
        if not key:
            raise BadInput(f"{table.name}: name the row, such as {(*table.key, 'column')[0]}=VALUE")
        return key
    if len(key) != len(table.key):
        raise BadInput(
            f"{table.name} has "
            + (f"the key {columns_text(table.key)}" if table.key else "no key")
            + ": name the row as COLUMN=VALUE, several separated by ','"
        )
    return dict(zip(table.key, key, strict=True))


def shown_key(table: Table, alias: str, also: Sequence[str] = ()) -> str:
    """A row's key as text, such as `device_id=7, number=2`; of a table without a key the columns `also`."""
    columns = table.key or tuple(also) or table.copied[:3]
    parts = [f"{literal(c + '=')} || coalesce({alias}.{quoted(c)}::text, 'NULL')" for c in columns]
    return f"concat_ws(', ', {', '.join(parts)})"


class _Row(msgspec.Struct, frozen=True):
    """A row of the snapshot, by where it lies."""

    table: TableName
    tableoid: int
    ctid: str
    key: str

    def at(self, alias: str) -> str:
        return f"{alias}.tableoid = {self.tableoid} AND {alias}.ctid = '{self.ctid}'::tid"


class _Reasoner:
    def __init__(self, conn: Conn, closure: Closure) -> None:
        self._conn, self._closure = conn, closure

    async def why(self, table: TableName, key: Mapping[str, str]) -> Why:
        row = await self._named(table, key)
        part = self._closure.parts[table]
        if part is Part.WHOLE:
            return Why(table=table, key=row.key, part=Part.WHOLE, chain=(Link(table=table, key=row.key),))
        if await self._is(row, row_condition(self._closure, table, "r")):
            return Why(table=table, key=row.key, part=Part.OWNED, chain=tuple(await self._owned(row)))
        if await self._is(row, member_condition(self._closure, table, "r")):
            return Why(table=table, key=row.key, part=Part.SHARED, chain=tuple(await self._shared(row)))
        return Why(table=table, key=row.key, part=Part.NONE, reasons=tuple(await self._reasons(row)))

    async def _named(self, table: TableName, key: Mapping[str, str]) -> _Row:
        columns = self._closure.schema.tables[table]
        where = " AND ".join(
            f"r.{quoted(name)} = {literal(value)}::{columns.column(name).type}" for name, value in key.items()
        )
        try:
            rows = await self._rows(table, f"{quoted_table(table)} r", where, 1)
        except asyncpg.DataError as problem:
            raise BadInput(f"{table}: this is no key of it: {problem}") from problem
        if not rows:
            said = ", ".join(f"{name}={value}" for name, value in key.items())
            raise NotFound(f"there is no row of {short(table)} with {said}")
        return rows[0]

    async def _rows(
        self, table: TableName, from_: str, where: str, most: int, alias: str = "r"
    ) -> list[_Row]:
        shown = shown_key(self._closure.schema.tables[table], alias)
        found = await self._conn.fetch(
            f"SELECT {alias}.tableoid::bigint AS tableoid, {alias}.ctid::text AS ctid, {shown} AS key "
            f"FROM {from_} WHERE {where} ORDER BY 3 LIMIT {most}"
        )
        return [_Row(table, one["tableoid"], one["ctid"], one["key"]) for one in found]

    async def _is(self, row: _Row, condition: str) -> bool:
        sql = f"SELECT EXISTS (SELECT 1 FROM {quoted_table(row.table)} r WHERE {row.at('r')} AND {condition})"
        return bool(await self._conn.fetchval(sql))

    async def _parents(self, row: _Row, edge: Edge, where: str = "true") -> list[_Row]:
        on = matches(self._closure, edge, "c", "r")
        return await self._rows(
            edge.parent,
            f"{quoted_table(edge.child)} c JOIN {quoted_table(edge.parent)} r ON {on}",
            f"{row.at('c')} AND {where}",
            SAMPLES,
        )

    async def _owned(self, row: _Row) -> list[Link]:
        """The shortest chain of OWN references from an owned row to the root row."""
        closure, root = self._closure, self._closure.root.table
        before: dict[_Row, tuple[_Row, Edge] | None] = {row: None}
        front = [row]
        while front and len(before) < _SEEN_MAX:
            following = []
            for one in front:
                if one.table == root:
                    return _chain(one, before)
                for edge in closure.own(one.table):
                    owned = row_condition(closure, edge.parent, "r")
                    for parent in await self._parents(one, edge, owned):
                        if parent not in before:
                            before[parent] = (one, edge)
                            following.append(parent)
            front = following
        return [Link(table=row.table, key=row.key)]

    async def _shared(self, row: _Row) -> list[Link]:
        """The shortest chain of references that bring `row`: to an owned row, and from it to the root."""
        closure = self._closure
        before: dict[_Row, tuple[_Row, Edge] | None] = {row: None}
        front = [row]
        while front and len(before) < _SEEN_MAX:
            following = []
            for one in front:
                for edge in closure.brought_by(one.table):
                    on = matches(closure, edge, "r", "p")
                    from_ = f"{quoted_table(edge.child)} r JOIN {quoted_table(edge.parent)} p ON {on}"
                    whole = closure.parts[edge.child] is Part.WHOLE
                    surely = "true" if whole else owned_condition(closure, edge.child, "r")
                    for condition in (surely, member_condition(closure, edge.child, "r")):
                        if condition == "false":
                            continue
                        found = await self._rows(edge.child, from_, f"{one.at('p')} AND {condition}", 50)
                        if found and condition == surely:
                            before[found[0]] = (one, edge)
                            chain = _chain(found[0], before)
                            return chain if whole else [*chain, *(await self._owned(found[0]))[1:]]
                        for child in found:
                            if child not in before:
                                before[child] = (one, edge)
                                following.append(child)
            front = following
        return [Link(table=row.table, key=row.key)]

    async def _reasons(self, row: _Row) -> list[str]:
        closure, table = self._closure, row.table
        if closure.parts[table] is Part.NONE:
            return [
                f"{short(table)} does not take part: it is left out ('none'), or no reference leads from it "
                f"to {short(closure.root.table)}, nor from rows that come to it"
            ]
        if table == closure.root.table:
            return [f"it is not the row with {closure.root.column} = {closure.root.value}"]
        said = []
        for edge in closure.edges:
            if edge.child != table:
                continue
            parents = await self._parents(row, edge)
            target = f"{columns_text(edge.columns)} ({edge.policy})"
            if edge.policy is Policy.OWN:
                if parents:
                    said.append(
                        f"{target} points at {short(edge.parent)} {parents[0].key}, which the tenant does "
                        "not own"
                    )
                elif await self._is(row, refers(edge, "r")):
                    said.append(f"{target} points at no row of {short(edge.parent)}")
                else:
                    said.append(f"{target} is NULL, or its condition does not hold")
            elif parents and await self._is(parents[0], row_condition(closure, edge.parent, "r")):
                said.append(
                    f"{target} points at the tenant's {short(edge.parent)} {parents[0].key}, but does not "
                    f"own: write {to_write(edge, Policy.OWN)} if it should"
                )
        if not closure.own(table):
            said.append("rows of it are not owned, they only come with rows that refer to them")
        if closure.brought_by(table):
            said.append("no row that comes refers to it")
        return said


def _chain(last: _Row, before: Mapping[_Row, tuple[_Row, Edge] | None]) -> list[Link]:
    links: list[Link] = []
    row: _Row | None = last
    while row is not None:
        step = before[row]
        links.append(Link(table=row.table, key=row.key, by=edge_text(step[1]) if step else ""))
        row = step[0] if step else None
    return links[::-1]
