"""The closure's edges, made ready to be followed row by row, and what is said of them in SQL."""

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import Key, cells_of
from fleetlift.core.tenant.closure import Closure, Edge, Part
from fleetlift.core.tenant.pgoutput import NULL, Cells, cell
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.tenant.apply import TableWriter, Writer, key_texts
from fleetlift.tenant.membership import literal

_INTEGER: Final = re.compile(rb"0|-?[1-9][0-9]{0,17}")
_UUID: Final = re.compile(rb"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
_INTEGERS: Final = frozenset({"smallint", "integer", "bigint"})
_TEXTS: Final = frozenset({"text", "character varying"})
Ref: TypeAlias = Key
Where: TypeAlias = tuple[TableName, tuple[str, ...]]


class Reference:
    """One edge, made ready: where its columns are in a row, and how its parent is looked up."""

    def __init__(self, closure: Closure, edge: Edge, child: TableWriter, parent_key: Sequence[str]) -> None:
        self.edge = edge
        self.child = child.table
        self.parent = closure.schema.tables[edge.parent]
        at = tuple(child.at[name] for name in edge.columns if name in child.at)
        self.usable = len(at) == len(edge.columns)
        self.at = at
        self._get: Callable[[Cells], Ref] = itemgetter(*at)
        self._single = len(at) == 1
        self.plain = len(at) == 1 and not edge.when
        self.when = tuple((child.at[name], cell(value)) for name, value in edge.when)
        self.reads = (*at, *(n for n, _ in self.when))
        self.where: Where = (edge.parent, edge.parent_columns)
        self.by_key = tuple(edge.parent_columns) == tuple(parent_key)
        types = [
            (base_type(self.child.column(a).type), base_type(self.parent.column(b).type))
            for a, b in zip(edge.columns, edge.parent_columns, strict=True)
        ]
        self.exact = all(is_exact(a) and is_exact(b) for a, b in types)
        self.patterns = tuple(
            (_INTEGER if b in _INTEGERS else _UUID)
            if a in _TEXTS and (b in _INTEGERS or b == "uuid")
            else None
            for a, b in types
        )
        self.native = all(
            a == b or {a, b} <= _INTEGERS or p for (a, b), p in zip(types, self.patterns, strict=True)
        )

    def of(self, cells: Cells) -> Ref | None:
        """What the row points at; None: nothing (a null in it, or another kind of row)."""
        for n, value in self.when:
            if cells[n] != value:
                return None
        ref = self._get(cells)
        if self._single:
            return None if ref == NULL else ref
        return None if NULL in ref else ref


class References:
    """The edges between tables of the move, by table and by what they are for."""

    def __init__(self, closure: Closure, writer: Writer) -> None:
        self.closure = closure
        refs = {
            edge.name: Reference(
                closure,
                edge,
                writer.of[edge.child],
                writer.of[edge.parent].key if edge.parent in writer.of else (),
            )
            for edge in closure.edges
            if edge.child in writer.of and closure.parts[edge.parent] is not Part.NONE
        }
        bad = [name for name, ref in refs.items() if not ref.usable]
        if bad:
            raise Conflict(f"{bad[0]}: a reference by a generated column cannot be followed")
        self.own = {t: [refs[e.name] for e in closure.own(t) if e.name in refs] for t in writer.of}
        self.down = {t: [refs[e.name] for e in closure.down(t) if e.name in refs] for t in writer.of}
        self.up = {
            t: [
                refs[e.name]
                for e in closure.up(t)
                if e.name in refs and closure.parts[e.parent] is not Part.WHOLE
            ]
            for t in writer.of
        }
        self.brought = {t: [refs[e.name] for e in closure.brought_by(t) if e.name in refs] for t in writer.of}
        self.mixed = {t for t in writer.of if closure.parts[t] is Part.OWNED and self.brought[t]}
        self.group: dict[TableName, tuple[TableName, ...]] = {}
        for cycle in closure.cycles:
            for table in cycle:
                self.group[table] = cycle
        self.number = {t: n for n, t in enumerate(closure.order)}

    def is_inner(self, table: TableName) -> bool:
        return bool(self.down[table] or self.brought[table]) or table == self.closure.root.table


def base_type(type_: str) -> str:
    return re.sub(r"\(.*?\)", "", type_).strip()


def is_exact(type_: str) -> bool:
    """Whether two values of the type are equal just when their texts are."""
    return type_ in _INTEGERS or type_ in _TEXTS or type_ == "uuid"


def place_of(ref: Reference) -> tuple[str, ...]:
    """References that are looked up alike share what is known; those of equal texts, with the parent's
    key."""
    if ref.exact:
        return (ref.edge.parent, *ref.edge.parent_columns)
    return (ref.edge.name, "")


def own_place(table: TableName, key: Sequence[str]) -> tuple[str, ...]:
    return (table, *key)


def getter(w: TableWriter, columns: Sequence[str]) -> Callable[[Cells], Any]:
    return itemgetter(*(w.at[name] for name in columns))


def cast_of(ref: Reference, child: str, parent: str) -> str:
    """The type a reference's value is compared in. Integers: the child's may be too big for the parent's."""
    a, b = base_type(ref.child.column(child).type), base_type(ref.parent.column(parent).type)
    return (
        "bigint"
        if b in _INTEGERS
        else ref.parent.column(parent).type
        if a in _TEXTS
        else ref.child.column(child).type
    )


def one_column_sql(ref: Reference, values: Sequence[Ref]) -> str:
    """Children of parents by one column, so that the source's index on it serves."""
    edge = ref.edge
    child, parent = ref.child.column(edge.columns[0]).type, ref.parent.column(edge.parent_columns[0]).type
    a, b = base_type(child), base_type(parent)
    texts = [key_texts(value)[0] for value in values]
    when = "".join(f" AND c.{quoted(name)}::text = {literal(value)}" for name, value in edge.when)
    column = f"c.{quoted(edge.columns[0])}"
    if edge.declared or a == b or {a, b} <= _INTEGERS or {a, b} <= _TEXTS:
        return f"{column} IN ({', '.join(f'{literal(text)}::{parent}' for text in texts)}){when}"
    cast = "" if a in _TEXTS else "::text"
    listed = ", ".join(f"{literal(text)}::{parent}::text" for text in texts)
    return f"{column}{cast} IN ({listed}){when}"


def is_possible(ref: Reference, value: Ref) -> bool:
    return all(
        pattern is None or pattern.fullmatch(one[4:])
        for pattern, one in zip(ref.patterns, cells_of(value), strict=True)
    )


def values_sql(ref: Reference, values: Sequence[Ref]) -> str:
    """Rows of the parent's columns, as a table `p`."""
    types = [ref.parent.column(name).type for name in ref.edge.parent_columns]
    rows = ", ".join(
        "("
        + ", ".join(f"{literal(text)}::{type_}" for text, type_ in zip(key_texts(value), types, strict=True))
        + ")"
        for value in values
    )
    listed = ", ".join(quoted(name) for name in ref.edge.parent_columns)
    return f"(VALUES {rows}) p({listed})"


def key_of(texts: Sequence[str]) -> Key:
    cells = tuple(cell(text) for text in texts)
    return cells if len(cells) > 1 else cells[0]


def count_of(status: str) -> int:
    return int(status.rsplit(" ", 1)[-1])


def array_text(texts: Sequence[str]) -> str:
    """An array of texts as PostgreSQL writes one."""
    return "{" + ",".join('"' + t.replace("\\", "\\\\").replace('"', '\\"') + '"' for t in texts) + "}"
