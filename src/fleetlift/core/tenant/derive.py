"""From a schema and a plan's rules to a closure: what to do about every reference, and the defaults.

The defaults, where the plan says nothing. A table *can be owned* when references lead from it to the root's
table. Its owner is *sure* when a chain of references over NOT NULL columns does: then each of its rows is
some tenant's, and of which one is known. From this follows, of a reference from a child to a parent:

- child is the root's table: never OWN, for the root is one row. FORBID to a table whose owner is sure (the
  root's own one too), else COPY.
- parent cannot be owned, or comes whole: COPY.
- the plan has declared the reference, or the parent is the root's table: OWN.
- the child's owner is sure: OWN when the reference is part of the shortest such chains. Any other reference
  can only add rows that are another tenant's, so it does not: FORBID where the parent's owner is sure (a
  device in another tenant's building is a fault in the data), else COPY (a profile may be nobody's, or
  everybody's).
- the child's owner is not sure: OWN.

Nothing is ever followed down from a row that is shared or comes whole.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy, Rules
from fleetlift.core.tenant.schema import DatabaseSchema, Table, TableName


def closure_of(schema: DatabaseSchema, rules: Rules) -> Closure:
    """Complete and in a fixed order. Raises BadInput that names table and edge and what to write."""
    _check(schema, rules)
    edges = _candidates(schema, rules)
    distance, sure = _reach(schema, rules, edges)
    decided = [_decided(edge, rules, distance, sure, schema) for edge in edges]
    parts = _parts(schema, rules, decided)
    kept = tuple(edge for edge in decided if parts[edge.child] is not Part.NONE)
    coming = sorted(table for table, part in parts.items() if part is not Part.NONE)
    own = [edge for edge in kept if edge.policy is Policy.OWN]
    return Closure(
        schema=schema,
        root=rules.root,
        parts=parts,
        edges=kept,
        order=_order(coming, kept, own),
        cycles=_cycles(coming, own),
        full_identity=tuple(sorted(rules.full_identity)),
    )


def refusals(closure: Closure) -> tuple[str, ...]:
    """Why tables that come cannot be moved as they are; () when all can."""
    said = []
    for name in closure.order:
        table = closure.schema.tables[name]
        said += [f"{name}: {problem}" for problem in table.problems]
        full = table.identity == "f" or name in closure.full_identity
        if not table.key and not full:
            said.append(
                f"{name} has no key to tell its rows apart: add a primary key, or write "
                f"'{short(name)}: {{identity: full}}' to have its REPLICA IDENTITY set to FULL for the move"
            )
        elif table.key and table.identity == "n":
            said.append(
                f"{name} has REPLICA IDENTITY NOTHING, so that its changes cannot be followed: "
                f"ALTER TABLE {name} REPLICA IDENTITY DEFAULT"
            )
        elif table.key and not table.primary_key and table.identity == "d" and not full:
            said.append(
                f"{name} has no primary key, and its REPLICA IDENTITY does not name its unique index: "
                f"ALTER TABLE {name} REPLICA IDENTITY USING INDEX …, or write "
                f"'{short(name)}: {{identity: full}}'"
            )
    return tuple(said)


def short(table: TableName) -> str:
    """As people write it in a plan: `device` for `public.device`."""
    return table.removeprefix("public.")


def columns_text(columns: Sequence[str]) -> str:
    """`a` or `(a, b)`, as a plan has it."""
    return columns[0] if len(columns) == 1 else f"({', '.join(columns)})"


def _check(schema: DatabaseSchema, rules: Rules) -> None:
    root = schema.tables.get(rules.root.table)
    if root is None:
        raise BadInput(f"root: there is no table {rules.root.table} in the source")
    if rules.root.column not in {column.name for column in root.columns}:
        raise BadInput(f"root: {rules.root.table} has no column {rules.root.column!r}")
    if rules.root.table in rules.whole:
        raise BadInput(f"{rules.root.table} holds the root row: 'all' would bring every tenant")
    if rules.root.table in rules.left_out:
        raise BadInput(f"{rules.root.table} holds the root row and cannot be left out")
    for name in (*rules.whole, *rules.left_out, *rules.full_identity):
        if name not in schema.tables:
            raise BadInput(f"there is no table {name} in the source")
    if both := sorted(set(rules.whole) & set(rules.left_out)):
        raise BadInput(f"{both[0]} is said to come whole and to be left out: write one of 'all' and 'none'")
    for reference in rules.references:
        for table, columns in (
            (reference.table, (*reference.columns, *(column for column, _ in reference.when))),
            (reference.to, reference.to_columns),
        ):
            if table not in schema.tables:
                raise BadInput(f"there is no table {table} in the source")
            known = {column.name for column in schema.tables[table].columns}
            for column in columns:
                if column not in known:
                    raise BadInput(f"{table} has no column {column!r}")
        if len(reference.columns) != len(reference.to_columns) or not reference.columns:
            raise BadInput(
                f"{reference.table}: {columns_text(reference.columns)} -> {reference.to}: as many columns "
                "on the left as on the right"
            )


def _candidates(schema: DatabaseSchema, rules: Rules) -> list[Edge]:
    """Every reference of a table that is not left out, in the order of names; policies still to come."""
    found: dict[str, Edge] = {}
    seen: set[tuple[object, ...]] = set()
    for name in sorted(schema.tables):
        if name in rules.left_out:
            continue
        for key in schema.tables[name].foreign_keys:
            if key.to not in schema.tables:
                continue
            seen.add((name, key.columns, key.to, key.to_columns))
            edge = Edge(
                name=f"{name}.{key.name}",
                child=name,
                columns=key.columns,
                parent=key.to,
                parent_columns=key.to_columns,
                policy=Policy.COPY,
            )
            found[edge.name] = edge
    for one in rules.references:
        same = (one.table, one.columns, one.to, one.to_columns)
        if one.table in rules.left_out or (not one.when and same in seen):
            continue
        name = f"{one.table}({', '.join(one.columns)}) -> {one.to}({', '.join(one.to_columns)})" + "".join(
            f" when {column} = '{value}'" for column, value in one.when
        )
        found[name] = Edge(
            name=name,
            child=one.table,
            columns=one.columns,
            parent=one.to,
            parent_columns=one.to_columns,
            policy=Policy.COPY,
            declared=False,
            when=one.when,
        )
    known = {(edge.child, edge.columns) for edge in found.values()}
    for table, columns in (*rules.policies, *rules.otherwise):
        if (table, columns) not in known:
            raise BadInput(
                f"{table}: no reference goes out from {columns_text(columns)}; it has "
                + (
                    ", ".join(sorted({columns_text(c) for t, c in known if t == table}))
                    or "none (declare one: COLUMN -> TABLE.COLUMN)"
                )
            )
    return [found[name] for name in sorted(found)]


def _reach(
    schema: DatabaseSchema, rules: Rules, edges: Sequence[Edge]
) -> tuple[Mapping[TableName, int], Mapping[TableName, int]]:
    """Tables that can be owned, and those whose owner is sure, with their distance from the root's."""
    closed = {*rules.whole, *rules.left_out}
    down = defaultdict(list)
    down_sure = defaultdict(list)
    polymorphic = defaultdict(set)
    for edge in edges:
        polymorphic[edge.child, edge.columns].add(edge.parent)
    for edge in edges:
        if edge.child == rules.root.table or edge.child in closed or edge.parent in closed:
            continue
        if rules.policies.get((edge.child, edge.columns), Policy.OWN) is not Policy.OWN:
            continue
        down[edge.parent].append(edge.child)
        if _certain(edge, schema.tables[edge.child], polymorphic[edge.child, edge.columns]):
            down_sure[edge.parent].append(edge.child)
    return _distances(rules.root.table, down), _distances(rules.root.table, down_sure)


def _certain(edge: Edge, child: Table, parents: set[TableName]) -> bool:
    """Whether every row of the child points at a row of the parent by it."""
    not_null = {column.name for column in child.columns if column.not_null}
    return not edge.when and not_null.issuperset(edge.columns) and (edge.declared or len(parents) == 1)


def _distances(root: TableName, down: Mapping[TableName, Iterable[TableName]]) -> dict[TableName, int]:
    found, edge_of = {root: 0}, [root]
    while edge_of:
        following = []
        for table in edge_of:
            for child in down.get(table, ()):
                if child not in found:
                    found[child] = found[table] + 1
                    following.append(child)
        edge_of = following
    return found


def _decided(
    edge: Edge,
    rules: Rules,
    distance: Mapping[TableName, int],
    sure: Mapping[TableName, int],
    schema: DatabaseSchema,
) -> Edge:
    place = (edge.child, edge.columns)
    policy = rules.policies.get(place)
    otherwise = rules.otherwise.get(place)
    if edge.parent in rules.left_out:
        if policy in (Policy.OWN, Policy.COPY):
            raise BadInput(
                f"{edge.name}: {edge.parent} is left out ('none'), so its rows can neither own nor come; "
                f"write 'refer: [{columns_text(edge.columns)}]' for {short(edge.child)}, or nothing"
            )
        return msgspec.structs.replace(edge, policy=policy or Policy.REFER, chosen=policy is not None)
    if policy is Policy.OWN:
        _may_own(edge, rules, distance)
    chosen = policy or _default(edge, rules, distance, sure, schema)
    if otherwise is not None and chosen is not Policy.OWN:
        raise BadInput(
            f"{edge.name}: 'own' and '{otherwise}' together need a reference that can own; write "
            f"'{otherwise}' alone"
        )
    return msgspec.structs.replace(
        edge, policy=chosen, else_=otherwise or Policy.FORBID, chosen=policy is not None
    )


def _may_own(edge: Edge, rules: Rules, distance: Mapping[TableName, int]) -> None:
    why = ""
    if edge.child == rules.root.table:
        why = "the tenant's own row is one row, and no reference of its table can add another"
    elif edge.child in rules.whole:
        why = f"{edge.child} comes whole already"
    elif edge.parent in rules.whole:
        why = f"{edge.parent} comes whole, so its rows say nothing of whose a row is"
    elif edge.parent not in distance:
        why = f"no reference leads from {edge.parent} to {rules.root.table}, so its rows cannot be owned"
    if why:
        raise BadInput(
            f"{edge.name} cannot be 'own': {why}; write 'copy', 'refer' or 'forbid' for "
            f"[{columns_text(edge.columns)}] of {short(edge.child)}"
        )


def _default(
    edge: Edge,
    rules: Rules,
    distance: Mapping[TableName, int],
    sure: Mapping[TableName, int],
    schema: DatabaseSchema,
) -> Policy:
    root = rules.root.table
    upward = Policy.FORBID if edge.parent in sure else Policy.COPY
    if edge.parent in rules.whole or edge.parent not in distance:
        return Policy.COPY
    if edge.child == root or edge.child in rules.whole:
        return upward
    if edge.parent == root or not edge.declared or edge.child not in sure:
        return Policy.OWN
    on_the_way = (
        _certain(edge, schema.tables[edge.child], {edge.parent})
        and edge.parent in sure
        and sure[edge.parent] < sure[edge.child]
    )
    return Policy.OWN if on_the_way else upward


def _parts(schema: DatabaseSchema, rules: Rules, edges: Sequence[Edge]) -> dict[TableName, Part]:
    parts = dict.fromkeys(sorted(schema.tables), Part.NONE)
    parts[rules.root.table] = Part.OWNED
    for table in rules.whole:
        parts[table] = Part.WHOLE
    changed = True
    while changed:
        changed = False
        for edge in edges:
            child, parent = parts[edge.child], parts[edge.parent]
            if edge.policy is Policy.OWN and parent is Part.OWNED and child is not Part.OWNED:
                parts[edge.child], changed = Part.OWNED, True
            copies = Policy.COPY in (edge.policy, edge.else_)
            if copies and child is not Part.NONE and parent is Part.NONE:
                parts[edge.parent], changed = Part.SHARED, True
    return parts


def _order(coming: Sequence[TableName], edges: Sequence[Edge], own: Sequence[Edge]) -> tuple[TableName, ...]:
    found: list[TableName] = []
    for group in components(coming, [(e.child, e.parent) for e in edges]):
        inside = [(e.child, e.parent) for e in own if e.child in group and e.parent in group]
        for part in components(group, inside):
            found += part
    return tuple(found)


def _cycles(coming: Sequence[TableName], own: Sequence[Edge]) -> tuple[tuple[TableName, ...], ...]:
    selfish = {edge.child for edge in own if edge.child == edge.parent}
    groups = components(coming, [(edge.child, edge.parent) for edge in own])
    return tuple(tuple(group) for group in groups if len(group) > 1 or group[0] in selfish)


def components(
    nodes: Sequence[TableName], arrows: Iterable[tuple[TableName, TableName]]
) -> list[list[TableName]]:
    """Groups that reach each other by `arrows` (child, parent), parents before children; names in order.

    Tarjan's algorithm, on a stack of its own: a schema may be deeper than Python's.
    """
    known = set(nodes)
    up: dict[TableName, set[TableName]] = defaultdict(set)
    for child, parent in arrows:
        if child in known and parent in known:
            up[child].add(parent)
    index: dict[TableName, int] = {}
    low: dict[TableName, int] = {}
    waiting: list[TableName] = []
    inside: set[TableName] = set()
    groups: list[list[TableName]] = []

    for start in sorted(known):
        if start in index:
            continue
        index[start] = low[start] = len(index)
        waiting.append(start)
        inside.add(start)
        work = [(start, iter(sorted(up[start])))]
        while work:
            node, rest = work[-1]
            for parent in rest:
                if parent not in index:
                    index[parent] = low[parent] = len(index)
                    waiting.append(parent)
                    inside.add(parent)
                    work.append((parent, iter(sorted(up[parent]))))
                    break
                if parent in inside:
                    low[node] = min(low[node], index[parent])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    group: list[TableName] = []
                    while not group or group[-1] != node:
                        group.append(waiting.pop())
                        inside.discard(group[-1])
                    groups.append(sorted(group))
    return groups
