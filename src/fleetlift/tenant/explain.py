"""Explains a closure against the rows as they are: counts, paths, leaks.

All is read in one snapshot, which may be a standby's; nothing is written.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

import asyncpg

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy
from fleetlift.core.tenant.derive import columns_text, refusals, short
from fleetlift.core.tenant.explanation import (
    EdgeExplained,
    Explanation,
    Finding,
    Kind,
    Severity,
    TableExplained,
    edge_text,
    own_path,
    to_write,
    up_path,
)
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.store.pool import Conn
from fleetlift.tenant.membership import (
    literal,
    matches,
    member_condition,
    owned_condition,
    points_at_coming,
    points_somewhere,
    refers,
    root_condition,
    shared_condition,
)
from fleetlift.tenant.why import SAMPLES, shown_key, snapshot

_COUNTED_MAX: Final = 1_000_000  # a table with more rows is told by the catalogue's estimate
_TENANT_NAMES: Final = frozenset({"tenant_id", "tenant"})


async def explain(conn: Conn, closure: Closure) -> Explanation:
    """Everything to know before the tenant's rows move. It takes about as long as reading them."""
    async with snapshot(conn, closure):
        teller = _Teller(conn, closure)
        of_root = await teller.root()
        tables = [await teller.table(name) for name in closure.order]
        findings = [
            *of_root,
            *[one for edge in closure.edges for one in await teller.edge(edge)],
            *[one for name in closure.schema.tables for one in await teller.tenant_columns(name)],
            *await teller.around(),
        ]
    order = list(Severity)
    root = closure.root
    return Explanation(
        root=f"{short(root.table)}.{root.column} = {root.value}",
        tables=tuple(tables),
        edges=tuple(_edge(edge) for edge in closure.edges),
        findings=tuple(sorted(findings, key=lambda one: order.index(one.severity))),
        tables_not_coming=tuple(t for t, part in closure.parts.items() if part is Part.NONE),
    )


def _edge(edge: Edge) -> EdgeExplained:
    return EdgeExplained(
        edge=edge.name,
        text=edge_text(edge),
        policy=edge.policy,
        otherwise=edge.else_ if edge.policy is Policy.OWN else None,
        chosen=edge.chosen,
        declared=edge.declared,
    )


class _Teller:
    def __init__(self, conn: Conn, closure: Closure) -> None:
        self._conn, self._closure = conn, closure
        self._tables = closure.schema.tables

    # -- how much ---------------------------------------------------------------------------------------

    async def table(self, name: TableName) -> TableExplained:
        closure, table, part = self._closure, self._tables[name], self._closure.parts[name]
        source = quoted_table(name)
        exact = table.rows <= _COUNTED_MAX
        total = await self._value(f"SELECT count(*) FROM {source}") if exact else table.rows
        owned = shared = 0
        if part is Part.OWNED:
            owned = await self._count(name, owned_condition(closure, name, "r"))
        if part in (Part.OWNED, Part.SHARED):
            shared = await self._count(name, shared_condition(closure, name, "r"))
        rows = total if part is Part.WHOLE else owned + shared
        paths = [f"all of {short(name)}"] if part is Part.WHOLE else []
        if name == closure.root.table:
            paths.append(f"{short(name)} with {closure.root.column} = {closure.root.value}")
        paths += [own_path(edge) for edge in closure.own(name)]
        if part is not Part.WHOLE:
            paths += [up_path(edge) for edge in closure.brought_by(name)]
        return TableExplained(
            table=name,
            part=part,
            rows=rows,
            owned=owned,
            shared=shared,
            total=max(total, rows),
            total_exact=exact,
            bytes=round(table.bytes * rows / max(total, rows, 1)),
            paths=tuple(paths),
        )

    async def _value(self, sql: str) -> Any:
        return await self._conn.fetchval(sql)

    async def _count(self, name: TableName, where: str) -> int:
        if where == "false":
            return 0
        return int(await self._value(f"SELECT count(*) FROM {quoted_table(name)} r WHERE {where}"))

    async def _found(
        self, name: TableName, from_: str, where: str, also: Sequence[str] = ()
    ) -> tuple[int, tuple[str, ...]]:
        """How many rows `r` of the table `name` there are in `from_`, and some of their keys."""
        if where == "false":
            return 0, ()
        count = int(await self._value(f"SELECT count(*) FROM {from_} WHERE {where}"))
        if not count:
            return 0, ()
        shown = shown_key(self._tables[name], "r", also)
        rows = await self._conn.fetch(f"SELECT {shown} AS key FROM {from_} WHERE {where} LIMIT {SAMPLES}")
        return count, tuple(sorted(row["key"] for row in rows))

    # -- what is wrong ----------------------------------------------------------------------------------

    async def root(self) -> list[Finding]:
        closure = self._closure
        name = closure.root.table
        try:
            async with self._conn.transaction():
                count = await self._count(name, root_condition(closure, "r"))
        except asyncpg.DataError as problem:
            raise BadInput(
                f"root: {closure.root.value!r} is no value of {short(name)}.{closure.root.column}: {problem}"
            ) from problem
        if count == 1:
            return []
        return [
            Finding(
                severity=Severity.REFUSED,
                kind=Kind.NO_ROOT,
                table=name,
                count=count,
                text=f"there are {count} rows of {short(name)} with {closure.root.column} = "
                f"{closure.root.value}; a tenant is one row",
                advice="correct 'root:' in the plan",
            )
        ]

    async def edge(self, edge: Edge) -> list[Finding]:
        found = []
        if edge.forbids:
            found += await self._points_away(edge)
        elif edge.policy is Policy.REFER or edge.else_ is Policy.REFER:
            found += await self._carried(edge)
        if Policy.COPY in (edge.policy, edge.else_) and self._closure.parts[edge.parent] is Part.OWNED:
            found += await self._copied(edge)
        if edge.policy is not Policy.OWN and self._closure.parts[edge.parent] is Part.OWNED:
            found += await self._stays(edge)
        if not edge.declared:
            found += await self._dangling(edge)
        return found

    def _pairs(self, edge: Edge) -> str:
        """Rows of the child as `r` with the row of the parent that they refer to, `p`."""
        on = matches(self._closure, edge, "r", "p")
        return f"{quoted_table(edge.child)} r JOIN {quoted_table(edge.parent)} p ON {on}"

    def _not_coming(self, table: TableName, alias: str) -> str:
        return f"({member_condition(self._closure, table, alias)}) IS NOT TRUE"

    async def _points_away(self, edge: Edge) -> list[Finding]:
        closure = self._closure
        count, samples = await self._found(
            edge.child,
            self._pairs(edge),
            f"{member_condition(closure, edge.child, 'r')} AND {self._not_coming(edge.parent, 'p')}",
            edge.columns,
        )
        if not count:
            return []
        child, parent = short(edge.child), short(edge.parent)
        of_root = edge.child == closure.root.table
        if edge.policy is Policy.OWN:
            kept = f"{to_write(edge, Policy.OWN, Policy.REFER)} to carry the references as they are"
            with_them = f"{to_write(edge, Policy.OWN, Policy.COPY)} to bring the other rows along"
        else:
            kept = f"{to_write(edge, Policy.REFER)} to carry the references as they are"
            with_them = f"{to_write(edge, Policy.COPY)} to bring the other rows along"
        others = [
            one
            for one in closure.own(edge.child)
            if one.name != edge.name and not (one.parent == closure.root.table and not one.when)
        ]
        instead = "".join(
            f", {to_write(one, Policy.REFER)} if such rows are not to come by {columns_text(one.columns)}"
            for one in others[:2]
            if edge.policy is Policy.OWN
        )
        return [
            Finding(
                severity=Severity.LEAK,
                kind=Kind.OTHER_ROOT if of_root and edge.parent == edge.child else Kind.OTHER_TENANT,
                table=edge.child,
                edge=edge.name,
                count=count,
                samples=samples,
                text=f"{_rows(count, child)} that {_comes(count)} {_points(count)} by "
                f"{columns_text(edge.columns)} at rows of {parent} that do not come: not this tenant's",
                advice=f"correct the rows, or write {kept}, {with_them}{instead}",
            )
        ]

    async def _carried(self, edge: Edge) -> list[Finding]:
        where = f"{member_condition(self._closure, edge.child, 'r')} AND {self._not_coming(edge.parent, 'p')}"
        count, samples = await self._found(edge.child, self._pairs(edge), where, edge.columns)
        if not count:
            return []
        return [
            Finding(
                severity=Severity.NOTE,
                kind=Kind.CARRIED,
                table=edge.child,
                edge=edge.name,
                count=count,
                samples=samples,
                text=f"{_rows(count, short(edge.child))} will point by {columns_text(edge.columns)} at "
                f"rows of {short(edge.parent)} that are not on the target ('refer'), without a foreign key",
            )
        ]

    async def _copied(self, edge: Edge) -> list[Finding]:
        closure, parent = self._closure, edge.parent
        brought = f"EXISTS (SELECT 1 FROM {quoted_table(edge.child)} c WHERE " + (
            f"{matches(closure, edge, 'c', 'r')} AND {member_condition(closure, edge.child, 'c')})"
        )
        shared = f"{shared_condition(closure, parent, 'r')} AND {brought}"
        source = f"{quoted_table(parent)} r"
        count, samples = await self._found(parent, source, shared)
        if not count:
            return []
        claims = [
            f"{points_somewhere(closure, one, 'r')} AND NOT {points_at_coming(closure, one, 'r')}"
            for one in closure.own(parent)
        ]
        claims += ["true"] if parent == closure.root.table else []
        belongs = " OR ".join(f"({claim})" for claim in claims) or "false"
        foreign, theirs = await self._found(parent, source, f"{shared} AND ({belongs})")
        text = (
            f"{_rows(count, short(parent))} that the tenant does not own {_comes(count)} because of "
            f"{edge_text(edge)} ('copy')"
        )
        if not foreign:
            return [
                Finding(
                    severity=Severity.NOTE,
                    kind=Kind.COPIED,
                    table=parent,
                    edge=edge.name,
                    count=count,
                    samples=samples,
                    text=f"{text}; nobody owns them",
                )
            ]
        return [
            Finding(
                severity=Severity.LEAK,
                kind=Kind.COPIED,
                table=parent,
                edge=edge.name,
                count=foreign,
                samples=theirs,
                text=f"{text}; {foreign} of them {'is' if foreign == 1 else 'are'} another tenant's",
                advice=f"write {to_write(edge, Policy.REFER)} to leave them, or "
                f"{to_write(edge, Policy.FORBID)} to stop at such references",
            )
        ]

    async def _stays(self, edge: Edge) -> list[Finding]:
        closure = self._closure
        if closure.parts[edge.child] not in (Part.OWNED, Part.SHARED):
            return []
        where = f"{owned_condition(closure, edge.parent, 'p')} AND {self._not_coming(edge.child, 'r')}"
        count, samples = await self._found(edge.child, self._pairs(edge), where, edge.columns)
        if not count:
            return []
        own = f"write {to_write(edge, Policy.OWN)} to bring them" if edge.child != closure.root.table else ""
        return [
            Finding(
                severity=Severity.MISSING,
                kind=Kind.STAYS,
                table=edge.child,
                edge=edge.name,
                count=count,
                samples=samples,
                text=f"{_rows(count, short(edge.child))} {_points(count)} by {columns_text(edge.columns)} at "
                f"the tenant's rows of {short(edge.parent)} and {'stays' if count == 1 else 'stay'}: "
                "by what says whose they are, they are not the tenant's",
                advice=own,
            )
        ]

    async def _dangling(self, edge: Edge) -> list[Finding]:
        closure = self._closure
        where = (
            f"{member_condition(closure, edge.child, 'r')} AND {refers(edge, 'r')} "
            f"AND NOT {points_somewhere(closure, edge, 'r')}"
        )
        if not edge.when and any(
            one.child == edge.child and one.columns == edge.columns and one is not edge
            for one in closure.edges
        ):
            return []  # one of several targets: that it is not this one says nothing
        count, samples = await self._found(edge.child, f"{quoted_table(edge.child)} r", where, edge.columns)
        if not count:
            return []
        return [
            Finding(
                severity=Severity.NOTE,
                kind=Kind.DANGLING,
                table=edge.child,
                edge=edge.name,
                count=count,
                samples=samples,
                text=f"{_rows(count, short(edge.child))} that {_comes(count)} {_points(count)} by "
                f"{columns_text(edge.columns)} at no row of {short(edge.parent)}; they come as they are",
            )
        ]

    async def tenant_columns(self, name: TableName) -> list[Finding]:
        """Columns that are called as those that hold the root's key are, and that no reference uses."""
        closure, table, part = self._closure, self._tables[name], self._closure.parts[name]
        root = closure.root
        called = {
            edge.columns[0]
            for edge in closure.edges
            if edge.parent == root.table and edge.parent_columns == (root.column,)
        }
        singular = re.sub(r"s$", "", root.table.partition(".")[2])
        called |= _TENANT_NAMES | {f"{singular}_{root.column}"}
        used = {column for edge in closure.edges if edge.child == name for column in edge.columns}
        used |= {c for key in table.foreign_keys for c in key.columns}
        found = []
        for column in table.columns:
            if column.name not in called or column.name in used or name == root.table:
                continue
            value = f"r.{quoted(column.name)}::text"
            said = f"column {column.name}"
            if part is not Part.NONE:
                count, samples = await self._found(
                    name,
                    f"{quoted_table(name)} r",
                    f"{member_condition(closure, name, 'r')} AND {value} <> {literal(root.value)}",
                    (column.name,),
                )
                if count:
                    found.append(
                        Finding(
                            severity=Severity.LEAK,
                            kind=Kind.TENANT_COLUMN,
                            table=name,
                            count=count,
                            samples=samples,
                            text=f"{_rows(count, short(name))} that {_comes(count)} ({part}) "
                            f"{'has' if count == 1 else 'have'} another tenant in {said}",
                            advice=f"write '{short(name)}: {column.name}' if it says whose a row is",
                        )
                    )
            count, samples = await self._found(
                name,
                f"{quoted_table(name)} r",
                f"{self._not_coming(name, 'r')} AND {value} = {literal(root.value)}",
                (column.name,),
            )
            if count:
                found.append(
                    Finding(
                        severity=Severity.MISSING,
                        kind=Kind.TENANT_COLUMN_STAYS,
                        table=name,
                        count=count,
                        samples=samples,
                        text=f"{_rows(count, short(name))} {'has' if count == 1 else 'have'} this tenant in "
                        f"{said} and {'stays' if count == 1 else 'stay'}",
                        advice=f"write '{short(name)}: {column.name}' to bring them",
                    )
                )
        return found

    async def around(self) -> list[Finding]:
        """What is not rows, or cannot be moved."""
        closure = self._closure
        found = [
            Finding(severity=Severity.REFUSED, kind=Kind.UNMOVABLE, table=text.partition(" ")[0], text=text)
            for text in refusals(closure)
        ]
        found += [
            Finding(severity=Severity.NOTE, kind=Kind.SKIPPED, table=name, text=f"{short(name)}: {reason}")
            for name, reason in closure.schema.skipped.items()
        ]
        objects = await self._value("SELECT count(*) FROM pg_catalog.pg_largeobject_metadata")
        holders = [
            f"{short(name)}.{column.name}"
            for name in closure.order
            for column in self._tables[name].columns
            if column.type in ("oid", "lo", "public.lo")
        ]
        if objects and holders:
            found.append(
                Finding(
                    severity=Severity.REFUSED,
                    kind=Kind.UNMOVABLE,
                    count=objects,
                    text=f"the database holds {objects} large object(s), and {', '.join(holders)} may refer "
                    "to them; large objects are not in the log and are not moved",
                    advice="keep such contents in bytea columns, or outside of the database",
                )
            )
        names = [quoted_table(name) for name in closure.order]
        for row in await self._conn.fetch(_FIRES, names):
            found.append(
                Finding(
                    severity=Severity.NOTE,
                    kind=Kind.FIRES,
                    table=f"{row['nspname']}.{row['relname']}",
                    text=f"{row['what']} {row['name']} of {short(row['nspname'] + '.' + row['relname'])} is "
                    "enabled ALWAYS or for REPLICA: it would act on rows that the move writes",
                    advice="it is switched off on the target until the cutover; see what it does",
                )
            )
        extensions = await self._conn.fetch(
            "SELECT extname, extversion FROM pg_catalog.pg_extension WHERE extname <> 'plpgsql' ORDER BY 1"
        )
        if extensions:
            listed = ", ".join(f"{row['extname']} {row['extversion']}" for row in extensions)
            found.append(
                Finding(
                    severity=Severity.NOTE,
                    kind=Kind.EXTENSION,
                    count=len(extensions),
                    text=f"the source uses extensions that the target's server must have: {listed}",
                )
            )
        return found


_FIRES: Final = """
SELECT n.nspname, c.relname, t.what, t.name
FROM (
  SELECT tgrelid AS relid, 'trigger' AS what, tgname AS name FROM pg_catalog.pg_trigger
  WHERE NOT tgisinternal AND tgenabled IN ('A', 'R')
  UNION ALL
  SELECT ev_class, 'rule', rulename FROM pg_catalog.pg_rewrite WHERE ev_enabled IN ('A', 'R')
) t JOIN pg_catalog.pg_class c ON c.oid = t.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = ANY (SELECT name::regclass FROM unnest($1::text[]) name)
ORDER BY 1, 2, 3, 4"""


def _rows(count: int, table: str) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'} of {table}"


def _comes(count: int) -> str:
    return "comes" if count == 1 else "come"


def _points(count: int) -> str:
    return "points" if count == 1 else "point"
