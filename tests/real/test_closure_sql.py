"""SQL of a closure against a brute-force one, on generated schemas and rows in a real PostgreSQL."""

import itertools
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import asyncpg
import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy, Reference, Root, Rules
from fleetlift.core.tenant.derive import closure_of, refusals
from fleetlift.core.tenant.explanation import Kind
from fleetlift.core.tenant.rules import parse_rules
from fleetlift.core.tenant.schema import TableName, quoted_table
from fleetlift.tenant.explain import explain
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.membership import member_condition, owned_condition, row_condition, shared_condition
from fleetlift.testing import LoopThread, TestPostgres
from tenant_world import CLOUD_TABLES, fill_cloud

# -- generated worlds ----------------------------------------------------------------------------------------

KEYS: Mapping[str, tuple[str, ...]] = {
    "int": ("integer",),
    "text": ("text",),
    "C": ('text COLLATE "C"',),
    "uuid": ("uuid",),
    "char": ("character(3)",),
    "both": ("integer", "text"),
    "none": (),
}
"""Kinds of keys, with the types of their columns."""


class Ref(msgspec.Struct, frozen=True):
    """A foreign key to table number `to`: its columns are `r{n}_0`, `r{n}_1`."""

    to: int
    not_null: bool
    policy: Policy | None
    otherwise: Policy | None
    points: tuple[int | None, ...]  # for each row of the child the parent's row, None: NULL
    half_null: bool


class Made(msgspec.Struct, frozen=True):
    """One table: `whole`, `left_out`, or a tenant column or polymorphic reference that the plan declares."""

    key: str
    rows: int
    refs: tuple[Ref, ...]
    fate: str  # "", "whole", "none"
    tenant: tuple[
        int | None, ...
    ]  # a column without a foreign key: the root's rows, 99 is none; () no column
    poly: tuple[tuple[str, str], ...]  # (kind, id) a row: kind "t1" or "t2", id as text; () no columns


def key_of(kind: str, row: int) -> tuple[Any, ...]:
    """The key's values in row `row`."""
    return {
        "int": (row + 1,),
        "text": (f"k'{row}\\",),
        "C": (f"c{row}",),
        "uuid": (f"00000000-0000-0000-0000-{row:012d}",),
        "char": (f"a{row}",),
        "both": (row // 2, f"b{row % 2}"),
        "none": (),
    }[kind]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Made, ...]:
    count = draw(st.integers(2, 6))
    kinds = ["int"] + [draw(st.sampled_from(sorted(KEYS))) for _ in range(count - 1)]
    sizes = [draw(st.integers(1, 5)) for _ in range(count)]
    made = []
    for n in range(count):
        refs = []
        for _ in range(draw(st.integers(0 if n == 0 else 1, 3))):
            targets = [t for t in range(count) if kinds[t] != "none"]
            to = draw(st.sampled_from([0, *targets] if n else targets))
            not_null = draw(st.booleans())
            row = st.integers(0, sizes[to] - 1)
            points = tuple(draw(row if not_null else st.none() | row) for _ in range(sizes[n]))
            policy = draw(st.none() | st.none() | st.sampled_from(list(Policy)))
            otherwise = draw(st.none() | st.sampled_from([Policy.COPY, Policy.REFER]))
            refs.append(Ref(to, not_null, policy, otherwise, points, draw(st.booleans())))
        fate = draw(st.sampled_from(["", "", "", "", "whole", "none"])) if n else ""
        tenant = tuple(
            draw(st.none() | st.sampled_from([1, 1, 2, 99]))
            for _ in range(sizes[n] if n and draw(st.integers(0, 3)) == 0 else 0)
        )
        poly: tuple[tuple[str, str], ...] = ()
        if n and count > 2 and draw(st.booleans()):
            kind, entity = st.sampled_from(["t1", "t2", "?"]), st.sampled_from(ids(kinds) * 2 + ["01", "x"])
            poly = tuple((draw(kind), draw(entity)) for _ in range(sizes[n]))
        made.append(Made(kinds[n], sizes[n], tuple(refs), fate, tenant, poly))
    return tuple(made)


def ids(kinds: list[str]) -> list[str]:
    """Keys of the first rows of the tables that polymorphic ids may mean."""
    return [str(key_of(kind, row)[0]) for kind in kinds[1:3] if kind != "none" for row in range(2)]


def table(n: int) -> TableName:
    return f"public.t{n}"


def text(value: Any) -> str:
    if value is None:
        return "NULL"
    return (
        str(value) if isinstance(value, int) else "E'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    )


def rows_of(world: tuple[Made, ...]) -> dict[TableName, list[dict[str, Any]]]:
    """All rows as Python has them, column by column; `rid` numbers a table's rows."""
    found: dict[TableName, list[dict[str, Any]]] = {}
    for n, made in enumerate(world):
        rows = []
        for row in range(made.rows):
            columns: dict[str, Any] = {"rid": row}
            columns |= {f"k{m}": value for m, value in enumerate(key_of(made.key, row))}
            for r, ref in enumerate(made.refs):
                width = len(KEYS[world[ref.to].key])
                point = ref.points[row]
                values = [None] * width if point is None else list(key_of(world[ref.to].key, point))
                if width == 2 and ref.half_null and not ref.not_null and row % 2:
                    values[1] = None
                columns |= {f"r{r}_{m}": value for m, value in enumerate(values)}
            if made.tenant:
                columns["tenant"] = made.tenant[row]
            if made.poly:
                columns["kind"], columns["id"] = made.poly[row]
            rows.append(columns)
        found[table(n)] = rows
    return found


def ddl(world: tuple[Made, ...]) -> str:
    """Tables, rows, then foreign keys, which may go in circles."""
    statements, later = [], []
    for n, made in enumerate(world):
        columns = ["rid integer"]
        columns += [f"k{m} {type_} NOT NULL" for m, type_ in enumerate(KEYS[made.key])]
        for r, ref in enumerate(made.refs):
            types = KEYS[world[ref.to].key]
            if types == ("integer",) and r % 2:
                types = ("bigint",)
            columns += [
                f"r{r}_{m} {type_}{' NOT NULL' if ref.not_null else ''}" for m, type_ in enumerate(types)
            ]
            mine = ", ".join(f"r{r}_{m}" for m in range(len(types)))
            theirs = ", ".join(f"k{m}" for m in range(len(types)))
            later.append(f"ALTER TABLE t{n} ADD FOREIGN KEY ({mine}) REFERENCES t{ref.to} ({theirs})")
        columns += ["tenant text"] if made.tenant else []
        columns += ["kind text", "id text"] if made.poly else []
        if made.key != "none":
            columns.append(f"PRIMARY KEY ({', '.join(f'k{m}' for m in range(len(KEYS[made.key])))})")
        statements.append(f"CREATE TABLE t{n} ({', '.join(columns)})")
    for name, rows in rows_of(world).items():
        values = ", ".join(f"({', '.join(text(v) for v in row.values())})" for row in rows)
        statements.append(f"INSERT INTO {name} ({', '.join(rows[0])}) VALUES {values}")
    return ";\n".join([*statements, *later])


def rules_of(world: tuple[Made, ...], *, with_policies: bool) -> Rules:
    references = []
    policies: dict[tuple[TableName, tuple[str, ...]], Policy] = {}
    otherwise: dict[tuple[TableName, tuple[str, ...]], Policy] = {}
    for n, made in enumerate(world):
        if made.tenant:
            references.append(Reference(table=table(n), columns=("tenant",), to=table(0), to_columns=("k0",)))
        for to in (1, 2) if made.poly else ():
            if world[to].key != "none":
                references.append(
                    Reference(
                        table=table(n),
                        columns=("id",),
                        to=table(to),
                        to_columns=("k0",),
                        when=(("kind", f"t{to}"),),
                    )
                )
        for r, ref in enumerate(made.refs):
            place = (table(n), tuple(f"r{r}_{m}" for m in range(len(KEYS[world[ref.to].key]))))
            if with_policies and ref.policy and made.fate != "none":
                policies[place] = ref.policy
                if ref.policy is Policy.OWN and ref.otherwise:
                    otherwise[place] = ref.otherwise
    return Rules(
        root=Root(table=table(0), column="k0", value="1"),
        references=tuple(references),
        whole=tuple(table(n) for n, made in enumerate(world) if made.fate == "whole"),
        left_out=tuple(table(n) for n, made in enumerate(world) if made.fate == "none"),
        policies=policies,
        otherwise=otherwise,
    )


# -- the brute force -----------------------------------------------------------------------------------------


def points_at(edge: Edge, child: Mapping[str, Any], parent: Mapping[str, Any]) -> bool:
    if any(child[column] != value for column, value in edge.when):
        return False
    pairs = [(child[a], parent[b]) for a, b in zip(edge.columns, edge.parent_columns, strict=True)]
    if any(a is None for a, _ in pairs):
        return False
    return all(a == b if edge.declared else str(a) == str(b) for a, b in pairs)


class Truth(msgspec.Struct):
    owned: set[tuple[TableName, int]]
    coming: set[tuple[TableName, int]]


def brute_force(closure: Closure, rows: Mapping[TableName, list[dict[str, Any]]]) -> Truth:
    """The least sets of core/tenant/closure.py, by going over every pair of rows until nothing changes."""
    owned = {
        (closure.root.table, row["rid"])
        for row in rows[closure.root.table]
        if str(row[closure.root.column]) == closure.root.value
    }
    pairs = [
        (edge, (edge.child, child["rid"]), (edge.parent, parent["rid"]))
        for edge in closure.edges
        for child, parent in itertools.product(rows[edge.child], rows[edge.parent])
        if points_at(edge, child, parent)
    ]
    while new := {c for e, c, p in pairs if e.policy is Policy.OWN and p in owned} - owned:
        owned |= new
    coming = owned | {
        (name, row["rid"]) for name in rows if closure.parts[name] is Part.WHOLE for row in rows[name]
    }
    while new := {p for e, c, p in pairs if Policy.COPY in (e.policy, e.else_) and c in coming} - coming:
        coming |= new
    return Truth(owned=owned, coming=coming)


async def by_sql(conn: "asyncpg.Connection[Any]", closure: Closure) -> dict[str, set[tuple[TableName, int]]]:
    found: dict[str, set[tuple[TableName, int]]] = {
        "member": set(),
        "owned": set(),
        "shared": set(),
        "row": set(),
    }
    selects = [
        f"SELECT '{what}', '{name}', rid FROM {quoted_table(name)} r WHERE {condition(closure, name, 'r')}"
        for name in closure.schema.tables
        for what, condition in (
            ("member", member_condition),
            ("owned", owned_condition),
            ("shared", shared_condition),
            ("row", row_condition),
        )
    ]
    for what, name, rid in await conn.fetch(" UNION ALL ".join(selects)):
        found[what].add((name, rid))
    return found


# -- the tests -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_url(postgres: TestPostgres, engine_loop: LoopThread) -> Iterator[str]:
    url = engine_loop.run(postgres.new_database(template="template1"))
    yield url
    engine_loop.run(postgres.drop_database(url))


@pytest.fixture(scope="module")
def engine_conn(empty_url: str, engine_loop: LoopThread) -> Iterator["asyncpg.Connection[Any]"]:
    # Each world has tables of its own by the same names, so that a cached plan is of another world.
    conn = engine_loop.run(asyncpg.connect(empty_url, statement_cache_size=0))
    # Cycles of many tables are joins of many; the best order for a handful of rows is not worth the search.
    engine_loop.run(conn.execute("SET join_collapse_limit = 2; SET jit = off"))
    yield conn
    engine_loop.run(conn.close())


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
@given(world=worlds())
def test_sql_finds_the_rows_that_going_over_all_pairs_finds(
    world: tuple[Made, ...], engine_conn: "asyncpg.Connection[Any]", engine_loop: LoopThread
) -> None:
    """Owned, shared and all coming rows, and each row asked for by itself, whatever schema and rows are."""
    for seen in engine_loop.run(one_world(engine_conn, world)):
        event(seen)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
@given(world=worlds())
def test_every_leak_is_counted(
    world: tuple[Made, ...], engine_conn: "asyncpg.Connection[Any]", engine_loop: LoopThread
) -> None:
    """A reference that stops a move counts the coming rows that point at rows which do not come."""
    engine_loop.run(one_world(engine_conn, world, leaks=True), timeout_s=110)


async def one_world(
    conn: "asyncpg.Connection[Any]", world: tuple[Made, ...], *, leaks: bool = False
) -> list[str]:
    seen = []
    transaction = conn.transaction(isolation="repeatable_read")
    await transaction.start()
    try:
        await conn.execute(ddl(world))
        schema = await read_schema(conn)
        assert set(schema.tables) == {table(n) for n in range(len(world))}
        try:
            closure = closure_of(schema, rules_of(world, with_policies=True))
        except BadInput as refused:
            assert "write" in str(refused)
            closure = closure_of(schema, rules_of(world, with_policies=False))
            seen.append("policies that were refused")
        seen.append("cycles" if closure.cycles else "no cycles")
        truth = brute_force(closure, rows_of(world))
        if leaks:
            found_leaks = {
                one.edge: one.count
                for one in (await explain(conn, closure)).findings
                if one.kind in (Kind.OTHER_TENANT, Kind.OTHER_ROOT)
            }
            assert found_leaks == brute_leaks(closure, rows_of(world), truth)
            return seen
        found = await by_sql(conn, closure)
        assert found["owned"] == truth.owned
        assert found["row"] == truth.owned
        assert found["member"] == truth.coming
        whole = {name for name, part in closure.parts.items() if part is Part.WHOLE}
        assert found["shared"] == {one for one in truth.coming - truth.owned if one[0] not in whole}
        return seen
    finally:
        await transaction.rollback()


def brute_leaks(
    closure: Closure, rows: Mapping[TableName, list[dict[str, Any]]], truth: Truth
) -> dict[str, int]:
    """By edge: pairs of a row that comes and the row it points at, which does not."""
    found: dict[str, int] = {}
    for edge in closure.edges:
        if edge.policy is Policy.FORBID or (edge.policy is Policy.OWN and edge.else_ is Policy.FORBID):
            count = sum(
                (edge.child, child["rid"]) in truth.coming
                and (edge.parent, parent["rid"]) not in truth.coming
                and points_at(edge, child, parent)
                for child, parent in itertools.product(rows[edge.child], rows[edge.parent])
            )
            if count:
                found[edge.name] = count
    return found


# -- named cases ---------------------------------------------------------------------------------------------


@pytest.fixture
async def cloud(postgres: TestPostgres, engine_loop: LoopThread) -> AsyncIterator["asyncpg.Connection[Any]"]:
    url = engine_loop.run(postgres.new_database(template="template1"))
    await fill_cloud(url)
    conn = await asyncpg.connect(url)
    yield conn
    await conn.close()
    engine_loop.run(postgres.drop_database(url))


async def closure_for(conn: "asyncpg.Connection[Any]", tenant: int, tables: str = CLOUD_TABLES) -> Closure:
    schema = await read_schema(conn)
    return closure_of(schema, parse_rules(f"customers.id = {tenant}", yaml.safe_load(tables), schema))


async def test_every_mark_of_a_tenant_comes_and_no_other(cloud: "asyncpg.Connection[Any]") -> None:
    """Each tenant's name is in all that it owns: what comes holds its own mark in full and nobody else's."""
    everything = "\n".join([text for name in await tables_of(cloud) for text in await texts(cloud, name)])
    for tenant in (1, 3):
        closure = await closure_for(cloud, tenant)
        coming = "\n".join(
            [
                text
                for name in closure.order
                for text in await texts(cloud, name, member_condition(closure, name, "r"))
            ]
        )
        marks = re.compile(r"tenant-\d+")
        assert set(marks.findall(coming)) == {f"tenant-{tenant}"}
        mine = f"tenant-{tenant}"
        assert coming.count(mine) == everything.count(mine) > 50


async def tables_of(conn: "asyncpg.Connection[Any]") -> list[TableName]:
    return list((await read_schema(conn)).tables)


async def texts(conn: "asyncpg.Connection[Any]", name: TableName, where: str = "true") -> list[str]:
    rows = await conn.fetch(f"SELECT r::text AS row FROM {quoted_table(name)} r WHERE {where}")
    return [row["row"] for row in rows]


async def test_each_row_of_the_cloud_is_somebodys_once(cloud: "asyncpg.Connection[Any]") -> None:
    """Five tenants' owned rows together are all rows that can be owned, but for one that has no tenant."""
    closures = [await closure_for(cloud, tenant) for tenant in range(1, 6)]
    for name, part in closures[0].parts.items():
        if part is not Part.OWNED:
            continue
        conditions = [owned_condition(closure, name, "r") for closure in closures]
        counts = await cloud.fetch(
            f"SELECT ({' + '.join(f'(coalesce({c}, false))::int' for c in conditions)}) AS owners, "
            f"count(*) AS rows FROM {quoted_table(name)} r GROUP BY 1"
        )
        found = {row["owners"]: row["rows"] for row in counts}
        assert found.pop(0, 0) == (1 if name == "public.audit_log" else 0)
        assert set(found) == {1}


async def test_a_trigger_knows_whose_a_row_is(cloud: "asyncpg.Connection[Any]") -> None:
    """NEW and OLD in triggers, for text ids that are no numbers or UUIDs at all, too."""
    closure = await closure_for(cloud, 2)
    await cloud.execute("CREATE TABLE seen (name text, op text, new bool, old bool)")
    for name in ("public.ts_kv", "public.device", "public.audit_log"):
        new, old = row_condition(closure, name, "NEW"), row_condition(closure, name, "OLD")
        plain = name.partition(".")[2]
        await cloud.execute(
            f"""CREATE FUNCTION see_{plain}() RETURNS trigger LANGUAGE plpgsql AS $f$ BEGIN
            INSERT INTO seen VALUES ('{plain}', TG_OP,
              CASE WHEN TG_OP <> 'DELETE' THEN coalesce({new}, false) END,
              CASE WHEN TG_OP <> 'INSERT' THEN coalesce({old}, false) END);
            RETURN NULL; END $f$;
            CREATE TRIGGER see AFTER INSERT OR UPDATE OR DELETE ON {name}
              FOR EACH ROW EXECUTE FUNCTION see_{plain}()"""
        )
    mine = await cloud.fetchval("SELECT min(id) FROM device WHERE customer_id = 2")
    room = await cloud.fetchval("SELECT min(id::text) FROM asset WHERE customer_id = 2")
    entities = [("DEVICE", str(mine)), ("DEVICE", f"0{mine}"), ("DEVICE", "9" * 30), ("DEVICE", "9" * 19)]
    entities += [("DEVICE", "x'"), ("ASSET", room), ("ASSET", room.upper()), ("ASSET", str(mine)), ("?", "")]
    for kind, entity in entities:
        await cloud.execute("INSERT INTO ts_kv VALUES ($1, $2, 'k', 1, 1, NULL)", kind, entity)
    told = [row["new"] for row in await cloud.fetch("SELECT new FROM seen")]
    assert told == [True, False, False, False, False, True, False, False, False]
    await cloud.execute("TRUNCATE seen")
    await cloud.execute("UPDATE device SET customer_id = 3 WHERE id = $1", mine)
    await cloud.execute("UPDATE ts_kv SET num = 2 WHERE entity_type = 'DEVICE' AND entity_id = $1", str(mine))
    await cloud.execute("INSERT INTO audit_log (customer_id, action) VALUES (2, 'x'), (NULL, 'y')")
    rows = [tuple(row) for row in await cloud.fetch("SELECT DISTINCT * FROM seen ORDER BY 1, 3")]
    assert rows == [
        ("audit_log", "INSERT", False, None),
        ("audit_log", "INSERT", True, None),
        ("device", "UPDATE", False, True),
        ("ts_kv", "UPDATE", False, False),
    ]


async def test_one_row_is_looked_up_by_index(cloud: "asyncpg.Connection[Any]") -> None:
    """A fence asks for each row of every tenant: the way up is by keys, also from an id kept as text."""
    await cloud.execute(
        "INSERT INTO device (customer_id, name) SELECT 2, 'd' || n FROM generate_series(1, 5000) n; ANALYZE"
    )
    closure = await closure_for(cloud, 2)
    rows = {
        "public.ts_kv": "SELECT 'DEVICE' AS entity_type, '7' AS entity_id OFFSET 0",
        "public.alarm": "SELECT 7::bigint AS device_id OFFSET 0",
    }
    for name, row in rows.items():
        plan = await cloud.fetch(f"EXPLAIN SELECT {row_condition(closure, name, 'r')} FROM ({row}) r")
        lines = "\n".join(line[0] for line in plan)
        assert "device_pkey" in lines, lines
        assert "Seq Scan on device" not in lines and "device_customer_id" not in lines, lines


async def test_many_paths_do_not_make_long_statements(cloud: "asyncpg.Connection[Any]") -> None:
    """Twelve levels with three references each: 3^12 paths, and a statement that fits."""
    await cloud.execute("CREATE SCHEMA deep")
    before = "public.customers"
    for level in range(12):
        await cloud.execute(
            f"CREATE TABLE deep.t{level} (id bigint PRIMARY KEY, "
            + ", ".join(f"{c} bigint REFERENCES {before}" for c in "abc")
            + ")"
        )
        values = "(1, 1, NULL, 2), (2, NULL, 2, 1), (3, NULL, NULL, NULL), (4, 3, 3, 3)"
        await cloud.execute(f"INSERT INTO deep.t{level} VALUES {values}")
        before = f"deep.t{level}"
    closure = await closure_for(cloud, 2)
    for condition in (member_condition, row_condition):
        text = condition(closure, "deep.t11", "r")
        assert len(text) < 120_000
        rows = await cloud.fetch(f"SELECT id FROM deep.t11 r WHERE {text} ORDER BY id")
        assert [row["id"] for row in rows] == [1, 2]


async def test_odd_tables_are_told_and_not_moved(cloud: "asyncpg.Connection[Any]") -> None:
    """Unlogged, inherited, hidden, unreadable and keyless tables, and what a schema holds beside tables."""
    await cloud.execute(
        """
        CREATE SCHEMA odd; CREATE SCHEMA fleetlift_move;
        CREATE TABLE fleetlift_move.chunk (id int);
        CREATE TEMP TABLE passing (id int);
        CREATE VIEW odd.seen AS SELECT 1 AS x;
        CREATE UNLOGGED TABLE odd.quick (id int PRIMARY KEY, customer_id bigint REFERENCES customers);
        CREATE TABLE odd.above (id int PRIMARY KEY, customer_id bigint REFERENCES customers);
        CREATE TABLE odd.below () INHERITS (odd.above);
        CREATE TABLE odd.by_index (a int NOT NULL, b int, c text NOT NULL, UNIQUE (b), UNIQUE (c, a));
        CREATE UNIQUE INDEX partial ON odd.by_index (a) WHERE b > 0;
        CREATE TABLE odd.part (id int, at int NOT NULL, customer_id bigint REFERENCES customers,
          PRIMARY KEY (id, at)) PARTITION BY LIST (at);
        CREATE TABLE odd.part_1 PARTITION OF odd.part FOR VALUES IN (1) PARTITION BY RANGE (id);
        CREATE TABLE odd.part_1_a PARTITION OF odd.part_1 DEFAULT;
        ALTER TABLE odd.part_1_a ADD CONSTRAINT alone FOREIGN KEY (id) REFERENCES odd.above;
        CREATE TABLE odd."Übel "" $x" ("select" int PRIMARY KEY, "a.b" bigint REFERENCES customers);
        INSERT INTO odd."Übel "" $x" VALUES (1, 2), (2, 3);
        CREATE FUNCTION odd.nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        """
    )
    schema = await read_schema(cloud)
    assert {name for name in schema.tables if not name.startswith("public.")} == {
        "odd.quick",
        "odd.above",
        "odd.below",
        "odd.by_index",
        "odd.part",
        'odd.Übel " $x',
    }
    assert schema.tables["odd.by_index"].key == ("c", "a")
    assert not schema.tables["odd.by_index"].primary_key
    assert [key.name for key in schema.tables["odd.part"].foreign_keys] == ["part_customer_id_fkey"]
    closure = await closure_for(cloud, 2)
    said = "\n".join(refusals(closure))
    for text in ("odd.quick: unlogged", "odd.above: inherits", "odd.part: foreign key alone"):
        assert text in said
    name = 'odd.Übel " $x'
    where = member_condition(closure, name, "r")
    rows = await cloud.fetch(f'SELECT "select" FROM {quoted_table(name)} r WHERE {where}')
    assert [row["select"] for row in rows] == [1]
    assert await cloud.fetchval("SHOW search_path") == '"$user", public'


async def test_rows_that_row_security_hides_are_not_forgotten(cloud: "asyncpg.Connection[Any]") -> None:
    """A role that sees only some rows would move only some: the move is refused instead."""
    await cloud.execute(
        "CREATE ROLE half; GRANT SELECT ON ALL TABLES IN SCHEMA public TO half; "
        "REVOKE SELECT ON users FROM half; "
        "ALTER TABLE device ENABLE ROW LEVEL SECURITY; SET ROLE half"
    )
    try:
        said = "\n".join(refusals(await closure_for(cloud, 2)))
        assert "public.device: row security hides rows" in said
        assert "public.users: this role may not read it" in said
    finally:
        await cloud.execute("RESET ROLE; DROP OWNED BY half; DROP ROLE half")
