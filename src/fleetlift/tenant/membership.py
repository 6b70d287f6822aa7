"""SQL predicates for a tenant's rows, from a closure.

Each condition is one expression over a row that is aliased in the surrounding query, complete in itself: the
sets of owned (and shared) rows of other tables are common table expressions inside it, each written once,
however many paths lead to it. Sets are asked for by IN, so that the planner may hash big ones and use
indexes for small ones. Tables whose references form a cycle are resolved together by one recursive query:
its rows are keys, one column group for each reference of the cycle, one reference filled in a row.

`row_condition` is for triggers: it knows one row and only climbs up from it, by EXISTS.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, NamedTuple

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy
from fleetlift.core.tenant.derive import components
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table

_INTEGERS: Final = frozenset({"smallint", "integer", "bigint"})
_TEXTS: Final = frozenset({"text", "character varying"})
_PATHS_MAX: Final = 16  # above it, a row's ways up are walked by one recursive query instead of spelt out


Within = Callable[[str], str]
"""A further condition over an alias, which the surrounding query sets as well: it is then set early, too."""
Also = Callable[[TableName, str], str]
"""For a row of a table, by its alias, a condition under which it counts as owned whatever it points at."""


def member_condition(closure: Closure, table: TableName, alias: str, within: Within | None = None) -> str:
    """True of the rows of `table` that come along, for whatever reason."""
    match closure.parts[table]:
        case Part.NONE:
            return "false"
        case Part.WHOLE:
            return "true"
        case _:
            sets = _Sets(closure)
            return sets.condition(table, alias, [*sets.owned_by(table), *sets.brought_by(table)], within)


def owned_condition(closure: Closure, table: TableName, alias: str, within: Within | None = None) -> str:
    """True of the rows of `table` that the tenant owns."""
    sets = _Sets(closure)
    return sets.condition(table, alias, sets.owned_by(table), within)


def shared_condition(closure: Closure, table: TableName, alias: str, within: Within | None = None) -> str:
    """True of the rows of `table` that come along only because a coming row refers to them."""
    if closure.parts[table] in (Part.NONE, Part.WHOLE) or not closure.brought_by(table):
        return "false"
    sets = _Sets(closure)
    brought = sets.condition(table, alias, sets.brought_by(table), within)
    if closure.parts[table] is Part.SHARED:
        return brought
    return f"({brought} AND ({owned_condition(closure, table, alias, within)}) IS NOT TRUE)"


def points_at_coming(closure: Closure, edge: Edge, alias: str) -> str:
    """True of the rows of the edge's child, aliased `alias`, whose reference finds a row that comes."""
    if closure.parts[edge.parent] is Part.NONE:
        return "false"
    values = _tuple(_child_values(closure, edge, alias))
    sought = ", ".join(_parent_values(closure, edge, "_m"))
    member = member_condition(closure, edge.parent, "_m")
    within = f"{values} IN (SELECT {sought} FROM {quoted_table(edge.parent)} _m WHERE {member})"
    return f"({_all([within, _when(edge, alias)])}) IS TRUE"


def points_somewhere(closure: Closure, edge: Edge, alias: str) -> str:
    """True of the rows of the edge's child whose reference finds a row at all."""
    return f"({_all([_finds(closure, edge, alias), _when(edge, alias)])}) IS TRUE"


def refers(edge: Edge, alias: str) -> str:
    """True of the rows of the edge's child that refer to something by it: no NULL, and `when` holds."""
    return _all([*(f"{_column(alias, column)} IS NOT NULL" for column in edge.columns), _when(edge, alias)])


def matches(closure: Closure, edge: Edge, child: str, parent: str) -> str:
    """True of two rows, aliased, of which the first refers to the second by the edge."""
    return _all([_matches(closure, edge, child, parent), _when(edge, child)])


def row_condition(
    closure: Closure, table: TableName, row: Literal["NEW", "OLD"] | str, also: Also | None = None
) -> str:
    """True when the tenant owns the one row `row`, in a trigger of `table` (or aliased in a query).

    Quick for rows of other tenants: it climbs from the row to the root, by the parents' keys. What hangs on a
    row for which `also` holds counts as owned too.
    """
    if closure.parts[table] is not Part.OWNED:
        return "false"
    return _Climb(closure, also).condition(table, row)


def literal(value: str) -> str:
    """A text as SQL, right whatever `standard_conforming_strings` says."""
    if "\0" in value:
        raise BadInput("a value of a row cannot hold the character 0")
    doubled = value.replace("'", "''")
    return "E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in value else f"'{doubled}'"


def root_condition(closure: Closure, alias: str) -> str:
    """True of the root row."""
    root = closure.root
    column = closure.schema.tables[root.table].column(root.column)
    return f"{_column(alias, root.column)} = {literal(root.value)}::{column.type}"


# -- how two rows are compared ------------------------------------------------------------------------------


def _column(alias: str, column: str) -> str:
    return f"{alias}.{quoted(column)}"


def _base(type_: str) -> str:
    return re.sub(r"\(.*?\)", "", type_).strip()


def _casts(child: str, parent: str) -> tuple[str, str]:
    """What to append to a child's column and a parent's one, of these types, to compare them.

    The parent's side is brought to the child's text where one is a text, so that the child's index serves;
    never a text to another type, which would fail on the first text that is none.
    """
    a, b = _base(child), _base(parent)
    if a == b or {a, b} <= _INTEGERS or {a, b} <= _TEXTS:
        return "", ""
    return "" if a in _TEXTS else "::text", "" if b in _TEXTS else "::text"


def _sides(closure: Closure, edge: Edge) -> list[tuple[str, str]]:
    """The casts of each pair of columns. PostgreSQL itself knows how a foreign key's are compared."""
    if edge.declared:
        return [("", "")] * len(edge.columns)
    child, parent = closure.schema.tables[edge.child], closure.schema.tables[edge.parent]
    return [
        _casts(child.column(a).type, parent.column(b).type)
        for a, b in zip(edge.columns, edge.parent_columns, strict=True)
    ]


def _child_values(closure: Closure, edge: Edge, alias: str) -> list[str]:
    return [
        f"{_column(alias, column)}{cast}"
        for column, (cast, _) in zip(edge.columns, _sides(closure, edge), strict=True)
    ]


def _parent_values(closure: Closure, edge: Edge, alias: str) -> list[str]:
    return [
        f"{_column(alias, column)}{cast}"
        for column, (_, cast) in zip(edge.parent_columns, _sides(closure, edge), strict=True)
    ]


def _matches(closure: Closure, edge: Edge, child: str, parent: str) -> str:
    """The condition under which one row of the parent is looked up for one of the child."""
    return _looked_up(closure, edge, [_column(child, column) for column in edge.columns], parent)


def _looked_up(closure: Closure, edge: Edge, values: Sequence[str], parent: str) -> str:
    """The parent aliased `parent` has the child's `values`, told so that the parent's index serves."""
    a, b = closure.schema.tables[edge.child], closure.schema.tables[edge.parent]
    said = []
    for value, column, to, (cast, cast_to) in zip(
        values, edge.columns, edge.parent_columns, _sides(closure, edge), strict=True
    ):
        sought = _column(parent, to)
        if cast_to and not cast and (typed := _parsed(value, a.column(column).type, b.column(to).type)):
            said.append(f"{sought} = {typed}")
        said.append(f"{value}{cast} = {sought}{cast_to}")
    return " AND ".join(said)


def _parsed(value: str, type_: str, to: str) -> str:
    """A text as a number or UUID; NULL, and no error, for a text that is none. "" for other types."""
    if _base(type_) not in _TEXTS:
        return ""
    if _base(to) == "uuid":
        shape = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
        return f"CASE WHEN {value} ~ '{shape}' THEN {value}::uuid END"
    if _base(to) in _INTEGERS:
        fits = f"{value}::numeric BETWEEN -9223372036854775808 AND 9223372036854775807"
        return f"CASE WHEN {value} ~ '^-?[0-9]{{1,19}}$' THEN CASE WHEN {fits} THEN {value}::bigint END END"
    return ""


def _finds(closure: Closure, edge: Edge, alias: str) -> str:
    parent = quoted_table(edge.parent)
    return f"EXISTS (SELECT 1 FROM {parent} _p WHERE {_matches(closure, edge, alias, '_p')})"


def _when(edge: Edge, alias: str) -> str:
    return " AND ".join(f"{_column(alias, column)}::text = {literal(value)}" for column, value in edge.when)


def _all(conditions: Iterable[str]) -> str:
    return " AND ".join(condition for condition in conditions if condition) or "true"


def _any(conditions: Sequence[str]) -> str:
    if not conditions:
        return "false"
    return conditions[0] if len(conditions) == 1 else "(" + " OR ".join(f"({c})" for c in conditions) + ")"


def _tuple(values: Sequence[str]) -> str:
    return f"({', '.join(values)})"


def _typed_null(table: TableName, column: str) -> str:
    """A NULL of exactly the column's type, modifier and collation."""
    return f"(NULL::{quoted_table(table)}).{quoted(column)}"


# -- sets of rows -------------------------------------------------------------------------------------------


class _Branch(NamedTuple):
    """One way for a row to be in: its `values` are among those that `query` gives, while `when` holds.

    Without a query, `when` is all of it. Both are texts over the row's alias; `query` names the sets.
    """

    when: Callable[[str], str]
    values: Callable[[str], list[str]] = lambda alias: []
    query: str = ""

    def text(self, alias: str, with_: str = "") -> str:
        within = f"{_tuple(self.values(alias))} IN ({with_}{self.query})" if self.query else ""
        return _all([within, self.when(alias)])


class _Sets:
    """Sets of rows as common table expressions, each made when it is first asked for."""

    def __init__(self, closure: Closure) -> None:
        self.closure = closure
        self._made: dict[tuple[str, str], str] = {}  # (kind, table or first of group) → name
        self._texts: list[str] = []
        self._own_group = _groups(closure, lambda edge: edge.policy is Policy.OWN)
        self._up_group = _groups(closure, lambda edge: Policy.COPY in (edge.policy, edge.else_))
        needed: dict[TableName, set[str]] = defaultdict(set)
        for edge in closure.edges:
            needed[edge.parent].update(edge.parent_columns)
            needed[edge.child].update((*edge.columns, *(column for column, _ in edge.when)))
        self._needed = needed

    def condition(
        self, table: TableName, alias: str, branches: Sequence[_Branch], within: Within | None = None
    ) -> str:
        """`branches` over `alias` as one expression that has the sets within."""
        with_ = f"WITH RECURSIVE {', '.join(self._texts)} " if self._texts else ""
        key = self.closure.schema.tables[table].key
        if len(branches) > 1 and key:
            names = ", ".join(_column("_x", column) for column in key)
            early = within("_x") if within else ""
            ways = " UNION ALL ".join(
                f"SELECT {names} FROM {quoted_table(table)} _x WHERE {_all([early, branch.text('_x')])}"
                for branch in branches
            )
            return f"{_tuple([_column(alias, column) for column in key])} IN ({with_}{ways})"
        return _any([branch.text(alias, with_) for branch in branches])

    def owned_by(self, table: TableName) -> list[_Branch]:
        """The ways for a row of `table` to be owned."""
        closure, group = self.closure, self._own_group.get(table, ())
        if table == closure.root.table:
            return [_Branch(lambda alias: root_condition(closure, alias))]
        found: dict[tuple[object, ...], list[tuple[Edge, str]]] = {}
        for edge in closure.own(table):
            keys = self._cycle_keys(edge, group) if edge.parent in group else self._owned_keys(edge)
            # Several targets of the same columns are one set, if its types agree.
            alike = (edge.columns, tuple(column for column, _ in edge.when), *self._types(edge))
            found.setdefault(alike, []).append((edge, keys))
        return [self._one_of(edges) for edges in found.values()]

    def _types(self, edge: Edge) -> list[str]:
        """The types of the keys that a row's values are sought among."""
        parent = self.closure.schema.tables[edge.parent]
        return [
            "text" if cast else parent.column(column).type
            for column, (_, cast) in zip(edge.parent_columns, _sides(self.closure, edge), strict=True)
        ] + [cast for cast, _ in _sides(self.closure, edge)]

    def _one_of(self, edges: Sequence[tuple[Edge, str]]) -> _Branch:
        first, keys = edges[0]
        if len(edges) == 1:
            return self._child_in(first, keys)
        queries = []
        for n, (edge, keys) in enumerate(edges):
            said = "".join(f", {literal(value)}::text" for _, value in edge.when)
            names = ", ".join(f"v{m}" for m in range(len(edge.columns)))
            queries.append(f"SELECT {names}{said} FROM ({keys}) _k{n}({names})")
        return _Branch(
            lambda alias: "",
            lambda alias: [
                *_child_values(self.closure, first, alias),
                *(f"{_column(alias, column)}::text" for column, _ in first.when),
            ],
            " UNION ALL ".join(queries),
        )

    def _owned_by_edge(self, edge: Edge) -> _Branch:
        return self._child_in(edge, self._owned_keys(edge))

    def _owned_keys(self, edge: Edge) -> str:
        """A query for what the values of a row may be that is owned by the edge."""
        values = ", ".join(_parent_values(self.closure, edge, "_o"))
        if edge.parent == self.closure.root.table:
            within = f"{quoted_table(edge.parent)} _o WHERE {root_condition(self.closure, '_o')}"
        else:
            within = f"{self._set('owned', edge.parent)} _o"
        return f"SELECT {values} FROM {within}"

    def _child_in(self, edge: Edge, query: str) -> _Branch:
        return _Branch(
            lambda alias: _when(edge, alias), lambda alias: _child_values(self.closure, edge, alias), query
        )

    def _cycle_keys(self, edge: Edge, group: tuple[TableName, ...]) -> str:
        """A query for the keys of owned rows that `edge`, within a cycle, may point at."""
        inner = [e for e in self.closure.edges if e.policy is Policy.OWN and {e.child, e.parent} <= {*group}]
        name = self._made.get(("cycle", group[0]))
        if name is None:
            keys = _Keys(inner, lambda e: (e.parent, e.parent_columns))
            begins = []
            for one in inner:
                outer = [e for e in self.closure.own(one.parent) if e.parent not in group]
                for way in map(self._owned_by_edge, outer):
                    columns = keys.row(one, [_column("_x", column) for column in one.parent_columns])
                    begins.append(
                        f"SELECT {columns} FROM {quoted_table(one.parent)} _x WHERE {way.text('_x')}"
                    )
            name = self._name("cycle", group[0])
            joins, goes_on = [], []
            for n, one in enumerate(inner):
                child = f"_c{n}"
                found = _all(
                    [
                        *(
                            f"{value} = {key}{cast}"
                            for value, key, (_, cast) in zip(
                                _child_values(self.closure, one, child),
                                keys.of(one, "_r"),
                                _sides(self.closure, one),
                                strict=True,
                            )
                        ),
                        _when(one, child),
                    ]
                )
                joins.append(f"LEFT JOIN {quoted_table(one.child)} {child} ON {found}")
                for following in inner:
                    if following.parent == one.child:
                        at = [_column(child, column) for column in following.parent_columns]
                        goes_on.append(f"SELECT {keys.row(following, at)}")
            self._texts.append(keys.recursive(name, begins, joins, goes_on))
        keys = _Keys(inner, lambda e: (e.parent, e.parent_columns))
        return _selected(name, keys.of(edge, "_r"), [cast for _, cast in _sides(self.closure, edge)])

    def brought_by(self, table: TableName) -> list[_Branch]:
        """The ways for a row of `table` to be referred to by one that comes."""
        if self.closure.parts[table] is Part.WHOLE:
            return []
        group = self._up_group.get(table, ())
        found = []
        for edge in self.closure.brought_by(table):
            if edge.child in group:
                found.append(self._parent_in(edge, self._chain_keys(edge, group)))
            else:
                found.append(self._brought_by_edge(edge))
        return found

    def _brought_by_edge(self, edge: Edge) -> _Branch:
        values = ", ".join(_child_values(self.closure, edge, "_o"))
        where = _all([_when(edge, "_o")])
        return self._parent_in(
            edge, f"SELECT {values} FROM {self._set('coming', edge.child)} _o WHERE {where}"
        )

    def _parent_in(self, edge: Edge, query: str) -> _Branch:
        return _Branch(lambda alias: "", lambda alias: _parent_values(self.closure, edge, alias), query)

    def _chain_keys(self, edge: Edge, group: tuple[TableName, ...]) -> str:
        """A query for what `edge`, within a cycle of references upwards, points at from coming rows."""
        closure = self.closure
        inner = [
            e for e in closure.edges if Policy.COPY in (e.policy, e.else_) and {e.child, e.parent} <= {*group}
        ]
        keys = _Keys(inner, lambda e: (e.child, e.columns))
        name = self._made.get(("chain", group[0]))
        if name is None:
            begins = []
            for one in inner:
                columns = keys.row(one, [_column("_x", column) for column in one.columns])
                select = f"SELECT {columns} FROM {quoted_table(one.child)} _x WHERE "
                if closure.parts[one.child] is Part.WHOLE:
                    begins.append(select + _all([_when(one, "_x")]))
                    continue
                outer = [e for e in closure.brought_by(one.child) if e.child not in group]
                ways = self.owned_by(one.child) if closure.parts[one.child] is Part.OWNED else []
                for way in (*ways, *map(self._brought_by_edge, outer)):
                    begins.append(select + _all([way.text("_x"), _when(one, "_x")]))
            name = self._name("chain", group[0])
            joins, goes_on = [], []
            for n, one in enumerate(inner):
                parent = f"_p{n}"
                found, further = _one_up(closure, keys, one, inner, parent)
                joins.append(f"LEFT JOIN {quoted_table(one.parent)} {parent} ON {found}")
                goes_on += further
            self._texts.append(keys.recursive(name, begins, joins, goes_on))
        return _selected(name, keys.of(edge, "_r"), [cast for cast, _ in _sides(closure, edge)])

    def _set(self, kind: Literal["owned", "coming"], table: TableName) -> str:
        """The name of a set of rows of `table`, with the columns that references use; it may hold doubles."""
        if kind == "coming" and self.closure.parts[table] is Part.WHOLE:
            return quoted_table(table)
        if (kind, table) in self._made:
            return self._made[kind, table]
        ways = self.owned_by(table) if self.closure.parts[table] is Part.OWNED else []
        if kind == "coming":
            ways += self.brought_by(table)
        columns = ", ".join(_column("_x", column) for column in sorted(self._needed[table]))
        selects = [f"SELECT {columns} FROM {quoted_table(table)} _x WHERE {way.text('_x')}" for way in ways]
        name = self._name(kind, table)
        self._texts.append(f"{name} AS ({' UNION ALL '.join(selects)})")
        return name

    def _name(self, kind: str, of: TableName) -> str:
        name = self._made[kind, of] = f"_{kind}_{len(self._made)}"
        return name


class _Keys:
    """The columns of a recursive query over keys: for each edge those of one of its ends."""

    def __init__(
        self, edges: Sequence[Edge], end: Callable[[Edge], tuple[TableName, tuple[str, ...]]]
    ) -> None:
        self._columns = {
            edge.name: [
                (f"k{n}_{m}", _typed_null(end(edge)[0], column)) for m, column in enumerate(end(edge)[1])
            ]
            for n, edge in enumerate(edges)
        }

    def row(self, edge: Edge, values: Sequence[str]) -> str:
        """A row with the values at the edge's columns, NULL elsewhere."""
        return ", ".join(
            text
            for name, columns in self._columns.items()
            for text in (values if name == edge.name else [null for _, null in columns])
        )

    def of(self, edge: Edge, alias: str) -> list[str]:
        return [f"{alias}.{name}" for name, _ in self._columns[edge.name]]

    def recursive(
        self, name: str, begins: Sequence[str], joins: Sequence[str], goes_on: Sequence[str]
    ) -> str:
        """`joins` from a row `_r` to what its one filled key finds; `goes_on` to the rows that follow.

        A key with a NULL in it finds nothing, so a row of `_r` is joined to the rows of one edge only.
        """
        columns = ", ".join(column for of_edge in self._columns.values() for column, _ in of_edge)
        filled = _any(
            [" AND ".join(f"_v.{column} IS NOT NULL" for column, _ in of) for of in self._columns.values()]
        )
        return (
            f"{name}({columns}) AS (({' UNION ALL '.join(begins)}) UNION "
            f"SELECT _v.* FROM {name} _r {' '.join(joins)} "
            f"CROSS JOIN LATERAL ({' UNION ALL '.join(goes_on)}) AS _v({columns}) WHERE {filled})"
        )


def _selected(name: str, columns: Sequence[str], casts: Sequence[str]) -> str:
    values = ", ".join(f"{column}{cast}" for column, cast in zip(columns, casts, strict=True))
    return f"SELECT {values} FROM {name} _r WHERE {' AND '.join(f'{c} IS NOT NULL' for c in columns)}"


def _one_up(
    closure: Closure, keys: _Keys, edge: Edge, inner: Sequence[Edge], parent: str
) -> tuple[str, list[str]]:
    """For `_Keys.recursive`: what a row `_r` finds by `edge`, aliased `parent`, and the rows that follow it
    by the references of `inner`."""
    further = []
    for following in inner:
        if following.child == edge.parent:
            at = [_column(parent, column) for column in following.columns]
            further.append(f"SELECT {keys.row(following, at)} WHERE {_all([_when(following, parent)])}")
    return _looked_up(closure, edge, keys.of(edge, "_r"), parent), further


def _groups(closure: Closure, follows: Callable[[Edge], bool]) -> dict[TableName, tuple[TableName, ...]]:
    """Tables whose references, of those followed, form a cycle, each with all of its cycle."""
    arrows = [(edge.child, edge.parent) for edge in closure.edges if follows(edge)]
    selfish = {child for child, parent in arrows if child == parent}
    groups = components(sorted({table for arrow in arrows for table in arrow}), arrows)
    return {
        table: tuple(group) for group in groups if len(group) > 1 or group[0] in selfish for table in group
    }


# -- one row ------------------------------------------------------------------------------------------------


class _Climb:
    """Whether one row is owned, asked upwards from it.

    OFFSET 0 keeps the planner from finding all owned rows at once, where it is asked for many.
    """

    def __init__(self, closure: Closure, also: Also | None) -> None:
        self._closure = closure
        self._also = also
        self._groups = _groups(closure, lambda edge: edge.policy is Policy.OWN)
        self._count = 0

    def condition(self, table: TableName, row: str) -> str:
        if self._paths(table, {}) > _PATHS_MAX:
            above = {table}
            while (
                more := {
                    e.parent
                    for t in above
                    for e in self._closure.own(t)
                    if e.parent != self._closure.root.table
                }
                - above
            ):
                above |= more
            self._groups = dict.fromkeys(above, tuple(sorted(above)))
        return self._owned(table, row)

    def _paths(self, table: TableName, known: dict[TableName, int]) -> int:
        if table == self._closure.root.table:
            return 1
        if table not in known:
            group = self._groups.get(table, ())
            known[table] = 1  # while it is being counted
            known[table] = sum(
                self._paths(edge.parent, known)
                for one in (group or (table,))
                for edge in self._closure.own(one)
                if edge.parent not in group
            )
        return known[table]

    def _owned(self, table: TableName, row: str) -> str:
        if table == self._closure.root.table:
            also = [self._also(table, row)] if self._also else []
            return _any([root_condition(self._closure, row), *also])
        group = self._groups.get(table, ())
        inner = [edge for edge in self._closure.own(table) if edge.parent in group]
        ways = self._outer(table, row, group)
        if inner:
            ways.append(self._within(inner, row, group))
        return _any(ways)

    def _outer(self, table: TableName, row: str, group: tuple[TableName, ...]) -> list[str]:
        ways = [self._by(edge, row) for edge in self._closure.own(table) if edge.parent not in group]
        return [*ways, self._also(table, row)] if self._also else ways

    def _by(self, edge: Edge, row: str) -> str:
        root = self._closure.root
        if edge.parent == root.table and edge.parent_columns == (root.column,):
            (value,) = _child_values(self._closure, edge, row)
            ((_, cast),) = _sides(self._closure, edge)
            type_ = self._closure.schema.tables[root.table].column(root.column).type
            return _all([f"{value} = {literal(root.value)}::{type_}{cast}", _when(edge, row)])
        self._count += 1
        parent = f"_a{self._count}"
        found = _all([_matches(self._closure, edge, row, parent), self._owned(edge.parent, parent)])
        return _all(
            [
                _when(edge, row),
                f"EXISTS (SELECT 1 FROM {quoted_table(edge.parent)} {parent} WHERE {found} OFFSET 0)",
            ]
        )

    def _within(self, first: Sequence[Edge], row: str, group: tuple[TableName, ...]) -> str:
        """Climb within a cycle until a row is found that is owned from outside of it."""
        closure = self._closure
        inner = [e for e in closure.edges if e.policy is Policy.OWN and {e.child, e.parent} <= {*group}]
        keys = _Keys(inner, lambda e: (e.child, e.columns))
        begins = [
            f"SELECT {keys.row(edge, [_column(row, column) for column in edge.columns])} "
            f"WHERE {_all([_when(edge, row)])}"
            for edge in first
        ]
        joins, goes_on, ends = [], [], []
        self._count += 1
        name = f"_up_{self._count}"
        for n, edge in enumerate(inner):
            parent = f"_p{self._count}_{n}"
            found, further = _one_up(closure, keys, edge, inner, parent)
            joins.append(f"LEFT JOIN {quoted_table(edge.parent)} {parent} ON {found}")
            goes_on += further
            if outer := self._outer(edge.parent, parent, group):
                ends.append(
                    f"EXISTS (SELECT 1 FROM {name} _r JOIN {quoted_table(edge.parent)} {parent} ON {found} "
                    f"WHERE {_any(outer)} OFFSET 0)"
                )
        walk = keys.recursive(name, begins, joins, goes_on)
        return f"EXISTS (WITH RECURSIVE {walk} SELECT 1 WHERE {_any(ends)} OFFSET 0)"
