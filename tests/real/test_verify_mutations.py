"""The mutation run of the verifier: every way in which a row can be wrong that we can think of is found."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
import msgspec
import pytest
import pytest_asyncio

from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.verify_report import Kind, VerifyReport, by_table
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant import verify, verify_rows
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.verify import Verifier
from fleetlift.testing import scratch_directory
from tenant_world import CLOUD_RULES, CLOUD_SQL, Pair, fill_cloud, fresh_pair, running_postgres

TENANT = 2

SAMPLE_SQL = """
CREATE TYPE colour AS ENUM ('red', 'green');
CREATE DOMAIN code AS char(4);
CREATE TYPE point3 AS (x float8, y float8, label text);
CREATE TABLE sample (
    id bigint PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers,
    f8 float8, f4 float4, n numeric, n2 numeric(12,2), at timestamptz, plain timestamp, gap interval,
    t text, t2 text, v varchar(40), c char(8), d code, j jsonb, js json, a int[], ta text[], b bytea, u uuid,
    e colour, ea colour[], p point3, net inet, r int4range, ok boolean, day date, big bigint, tz timetz,
    twice bigint GENERATED ALWAYS AS (big * 2) STORED);
CREATE TABLE left_out (id int PRIMARY KEY, what text);
"""
SAMPLE_ROWS = """
INSERT INTO sample SELECT n, 1 + n % 3, 0.1, 0.1, 1.0, 1, '2026-03-29 01:30:00.123456+00', '2026-03-29 01:30',
    '1 day', 'Zoë', NULL, 'abc', 'ab', 'x', '{"a": 1, "b": [1, 2]}', '{"a":1, "b":2}', '{1,2,3}', '{a,NULL}',
    '\\x00ff', '00000000-0000-0000-0000-000000000001', 'red', '{red,green}', '(1,2,three)', '10.0.0.1',
    '[1,5)',
    true, '2026-01-01', 7, '12:00:00+00'
  FROM generate_series(1, 30) n;
UPDATE sample SET f8 = -'NaN'::float8, f4 = -'NaN'::float4 WHERE id = 4;  -- NaN of other bits
INSERT INTO left_out VALUES (1, 'stays');
UPDATE alarm SET note = note || number;
"""
MINE = "id = 1"  # a row of TENANT's in `sample`; its neighbour of TENANT's has id 4

D = "customer_id = 2"
OWNED = {
    "currency": "true",
    "country": "id IN (SELECT country_id FROM customers WHERE id = 2)",
    "customers": "id = 2",
    "device_profile": "id IN (1, 2, 3)",
    "users": D,
    "asset": D,
    "device": D,
    "device_group": D,
    "group_device": f"group_id IN (SELECT id FROM device_group WHERE {D})",
    "alarm": f"device_id IN (SELECT id FROM device WHERE {D})",
    "alarm_comment": f"device_id IN (SELECT id FROM device WHERE {D})",
    "ts_kv": f"entity_id IN (SELECT id::text FROM device WHERE {D}) OR "
    f"entity_id IN (SELECT id::text FROM asset WHERE {D})",
    "audit_log": D,
    "event_tag": f"device_id IN (SELECT id FROM device WHERE {D})",
    "sample": D,
}
"""Which rows are the tenant's, written by hand."""

RULES = msgspec.structs.replace(CLOUD_RULES, left_out=("public.left_out",))


async def copied(pair: Pair) -> None:
    """Bring the rows of OWNED over, by nobody's code but this."""
    source, target = await asyncpg.connect(pair.source), await asyncpg.connect(pair.target)
    try:
        await target.execute(CLOUD_SQL + SAMPLE_SQL + "SET session_replication_role = replica")
        for table, which in OWNED.items():
            columns = [
                row[0]
                for row in await source.fetch(
                    "SELECT attname FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 "
                    "AND attgenerated = '' AND NOT attisdropped ORDER BY attnum",
                    table,
                )
            ]
            chunks: list[bytes] = []

            async def keep(data: bytes, chunks: list[bytes] = chunks) -> None:
                chunks.append(data)

            await source.copy_from_query(
                f"SELECT {', '.join(columns)} FROM {table} WHERE {which}", output=keep
            )

            async def give(chunks: list[bytes] = chunks) -> AsyncIterator[bytes]:
                for chunk in chunks:
                    yield chunk

            await target.copy_to_table(table, source=give(), columns=columns)
    finally:
        await source.close()
        await target.close()


class World(msgspec.Struct, frozen=True):
    server: EmbeddedPostgres
    pair: Pair
    closure: Closure


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """A source with five tenants, and a target with all that is tenant 2's."""
    with scratch_directory() as directory:
        async with running_postgres(directory / "both") as server, fresh_pair(server) as pair:
            await fill_cloud(pair.source)
            source = await asyncpg.connect(pair.source)
            await source.execute(SAMPLE_SQL + SAMPLE_ROWS)
            closure = closure_of(await read_schema(source), RULES)
            await source.close()
            await copied(pair)
            yield World(server, pair, closure)


_clones = 0


@contextlib.asynccontextmanager
async def damaged(world: World, *statements: str) -> AsyncIterator[str]:
    """A clone of the target on which `statements` were run past all triggers and constraints."""
    global _clones
    _clones += 1
    name = f"clone_{_clones}"
    original = world.pair.target.split("@/")[1].split("?")[0]
    admin = await asyncpg.connect(world.server.url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {original}")
    url = world.pair.target.replace(f"@/{original}?", f"@/{name}?")
    try:
        conn = await asyncpg.connect(url)
        try:
            await conn.execute("SET session_replication_role = replica")
            for statement in statements:
                await conn.execute(statement)
        finally:
            await conn.close()
        yield url
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


def found_in(report: VerifyReport) -> set[tuple[Kind, str]]:
    return {(one.kind, one.table.removeprefix("public.")) for one in report.findings}


def set_(column: str, value: str) -> str:
    return f"UPDATE sample SET {column} = {value} WHERE {MINE}"


DIFFERING: Mapping[str, tuple[str, str]] = {
    "stale row": ("t", set_("t", "'what it was before'")),
    "text cut off": ("v", set_("v", "'ab'")),
    "NULL for a text": ("t", set_("t", "NULL")),
    "an empty text for NULL": ("t2", set_("t2", "''")),
    "the word NULL for NULL": ("t2", set_("t2", "'NULL'")),
    "last bit of a float8": ("f8", set_("f8", "0.10000000000000002")),
    "last bit of a float4": ("f4", set_("f4", "0.10000001")),
    "scale of a numeric": ("n", set_("n", "1.00")),
    "cent of a numeric": ("n2", set_("n2", "1.01")),
    "a microsecond": ("at", set_("at", "at + interval '1 microsecond'")),
    "an hour by a time zone": ("at", set_("at", "at + interval '1 hour'")),
    "time zone of a plain timestamp": ("plain", set_("plain", "plain + interval '2 hours'")),
    "zone of a time": ("tz", set_("tz", "'13:00:00+01'")),
    "24 hours for a day": ("gap", set_("gap", "'24 hours'")),
    "encoding: bytes read as Latin-1": ("t", set_("t", "convert_from(convert_to(t, 'UTF8'), 'LATIN1')")),
    "encoding: composed and decomposed": ("t", set_("t", "normalize(t, NFD)")),
    "case": ("t", set_("t", "upper(t)")),
    "blank at the end of a text": ("t", set_("t", "t || ' '")),
    "blank at the end of a varchar": ("v", set_("v", "v || ' '")),
    "char": ("c", set_("c", "'ac'")),
    "domain over char": ("d", set_("d", "'y'")),
    "number form in jsonb": ("j", set_("j", """'{"a": 1.0, "b": [1, 2]}'""")),
    "number for a text in jsonb": ("j", set_("j", """'{"a": "1", "b": [1, 2]}'""")),
    "json null for NULL": ("j", set_("j", "'null'")),
    "blank in json": ("js", set_("js", """'{"a":1,"b":2}'""")),
    "order of keys in json": ("js", set_("js", """'{"b":2, "a":1}'""")),
    "element of an array": ("a", set_("a", "'{1,2,4}'")),
    "order of an array": ("a", set_("a", "'{2,1,3}'")),
    "bounds of an array": ("a", set_("a", "'[0:2]={1,2,3}'")),
    "NULL in an array": ("ta", set_("ta", """'{a,"NULL"}'""")),
    "empty array for NULL elements": ("ta", set_("ta", "'{}'")),
    "byte": ("b", set_("b", r"'\x00fe'")),
    "bytes cut off at zero": ("b", set_("b", r"'\x'")),
    "uuid": ("u", set_("u", "'00000000-0000-0000-0000-000000000002'")),
    "enum": ("e", set_("e", "'green'")),
    "array of enums": ("ea", set_("ea", "'{green,red}'")),
    "field of a composite": ("p", set_("p", "'(1,2,\"\")'")),
    "mask of an address": ("net", set_("net", "'10.0.0.1/8'")),
    "bound of a range": ("r", set_("r", "'[1,6)'")),
    "boolean": ("ok", set_("ok", "false")),
    "day": ("day", set_("day", "day + 1")),
    "both halves of a bigint": ("big", set_("big", "(1::bigint << 32) + 6")),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", DIFFERING)
async def test_a_value_that_differs_is_found(world: World, what: str) -> None:
    """Whatever differs in a value is found, with its key and column, and repaired on demand."""
    column, statement = DIFFERING[what]
    target = world.pair.target
    conn = await asyncpg.connect(target, server_settings={"session_replication_role": "replica"})
    await conn.execute(statement)
    await conn.close()
    async with Verifier(world.pair.source, target, world.closure) as v:
        report = await v.run()
        named = [(f.kind, f.table, f.key) for f in report.findings]
        assert named == [(Kind.DIFFERING, "public.sample", ("1",))]
        assert column in report.findings[0].columns
        assert report.blocks
        repaired = await v.repair(report)
        assert (repaired.written, repaired.deleted) == (1, 0)
        assert (await v.recheck({"public.sample": [("1",)]})).agrees


ROWS: Mapping[str, tuple[str, set[tuple[Kind, str]]]] = {
    "a row dropped": ("DELETE FROM sample WHERE id = 1", {(Kind.MISSING, "sample")}),
    "the last row dropped": (
        "DELETE FROM sample WHERE id = (SELECT max(id) FROM sample)",
        {(Kind.MISSING, "sample")},
    ),
    "the root dropped": ("DELETE FROM customers", {(Kind.MISSING, "customers")}),
    "a shared row dropped": ("DELETE FROM device_profile WHERE id = 1", {(Kind.MISSING, "device_profile")}),
    "a row of a whole table dropped": (
        "DELETE FROM currency WHERE code = 'CHF'",
        {(Kind.MISSING, "currency")},
    ),
    "a junction's row dropped": (
        "DELETE FROM group_device WHERE device_id = (SELECT min(device_id) FROM group_device)",
        {(Kind.MISSING, "group_device")},
    ),
    "a row of a table without a key dropped": (
        "DELETE FROM event_tag WHERE ctid = (SELECT min(ctid) FROM event_tag)",
        {(Kind.MISSING, "event_tag")},
    ),
    "a row that came back after a delete": (
        "INSERT INTO sample (id, customer_id) VALUES (1000, 2)",
        {(Kind.FOREIGN, "sample")},
    ),
    "another tenant's row": (
        "INSERT INTO users (id, customer_id, email) SELECT 1, 1, 'user1@tenant-1'",
        {(Kind.FOREIGN, "users")},
    ),
    "another tenant's row beneath": (
        "INSERT INTO ts_kv (entity_type, entity_id, key, ts, num) VALUES ('DEVICE', '1', 'speed', 1, 0.5)",
        {(Kind.FOREIGN, "ts_kv")},
    ),
    "another tenant's row without a key": (
        "INSERT INTO event_tag VALUES (1, 'tag1')",
        {(Kind.FOREIGN, "event_tag")},
    ),
    "a row of a table that stays": ("INSERT INTO left_out VALUES (1, 'stays')", {(Kind.FOREIGN, "left_out")}),
    "a shared row that nobody needs": (
        "INSERT INTO device_profile VALUES (4, 'unused', NULL)",
        {(Kind.SURPLUS, "device_profile")},
    ),
    "doubled without a key": (
        "INSERT INTO event_tag SELECT * FROM event_tag LIMIT 1",
        {(Kind.DOUBLED, "event_tag")},
    ),
    "values of two rows swapped": (
        "UPDATE alarm a SET note = b.note FROM alarm b WHERE a.number = 1 AND b.number = 1 AND "
        "(a.device_id, b.device_id) IN (SELECT x, y FROM (SELECT min(id), max(id) FROM device) d(p, q), "
        "LATERAL (VALUES (p, q), (q, p)) v(x, y))",
        {(Kind.DIFFERING, "alarm")},
    ),
    "keys of two rows swapped": (
        "UPDATE alarm SET number = 13 - number WHERE device_id = (SELECT min(id) FROM device); "
        "UPDATE alarm SET number = number - 10 WHERE number > 10",
        {(Kind.DIFFERING, "alarm")},
    ),
    "columns swapped": ("UPDATE ts_kv SET txt = key WHERE ts = 7", {(Kind.DIFFERING, "ts_kv")}),
    "minus zero": ("UPDATE ts_kv SET num = '-0' WHERE num = 0.5 AND ts = 1", {(Kind.DIFFERING, "ts_kv")}),
    "reference to another tenant's row": (
        "UPDATE device SET asset_id = gen_random_uuid() WHERE id = (SELECT min(id) FROM device)",
        {(Kind.DIFFERING, "device")},
    ),
    "key changed": (
        "UPDATE asset SET id = gen_random_uuid() WHERE name = 'tenant-2-site-1'",
        {(Kind.MISSING, "asset"), (Kind.FOREIGN, "asset")},
    ),
    "a whole table lost": ("TRUNCATE alarm_comment", {(Kind.MISSING, "alarm_comment")}),
    "all of a partition lost": ("TRUNCATE audit_log_old", {(Kind.MISSING, "audit_log")}),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", ROWS)
async def test_a_row_that_should_or_should_not_be_there_is_found(world: World, what: str) -> None:
    """Rows dropped, doubled, swapped, left over or another tenant's are found, and repaired on demand."""
    statement, expected = ROWS[what]
    async with (
        damaged(world, statement) as target,
        Verifier(world.pair.source, target, world.closure, ahead_rows=0) as v,
    ):
        report = await v.run()
        assert found_in(report) == expected
        assert report.blocks == (expected != {(Kind.SURPLUS, "device_profile")})
        assert (await v.recheck(by_table(report.findings))).blocks or "surplus" in str(expected)
        if "left_out" not in str(expected):
            await v.repair(report)
            assert found_in(await v.run()) == set()


STRUCTURES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "a row in the wrong partition": (
        (
            "ALTER TABLE audit_log DETACH PARTITION audit_log_old",
            "UPDATE audit_log_old SET at = '2030-01-01' WHERE id = (SELECT min(id) FROM audit_log_old)",
            "ALTER TABLE audit_log_old ADD CONSTRAINT fits "
            "CHECK (at IS NOT NULL AND at < '2026-01-01') NOT VALID",
            "UPDATE pg_constraint SET convalidated = true WHERE conname = 'fits'",
            "ALTER TABLE audit_log ATTACH PARTITION audit_log_old "
            "FOR VALUES FROM (MINVALUE) TO ('2026-01-01')",
        ),
        "1 rows are in the partition",
    ),
    "a generated column that computes something else": (
        (
            "ALTER TABLE sample DROP COLUMN twice, "
            "ADD COLUMN twice bigint GENERATED ALWAYS AS (big * 3) STORED",
        ),
        "",
    ),
    "a narrower type": (("ALTER TABLE sample ALTER v TYPE varchar(30)",), "character varying(30)"),
    "a numeric without its scale": (("ALTER TABLE sample ALTER n2 TYPE numeric",), "numeric(12,2)"),
    "a column that is missing": (("ALTER TABLE sample DROP COLUMN net",), "column net is not on the target"),
    "a column too many": (("ALTER TABLE sample ADD COLUMN more int",), "column more is only on the target"),
    "a table that is missing": (("DROP TABLE sample",), "this table is not on the target"),
    "a table of nobody's with rows": (("CREATE TABLE strange AS SELECT 1 AS id",), "public.strange"),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("what", STRUCTURES)
async def test_a_table_that_is_not_what_it_should_be_is_found(world: World, what: str) -> None:
    """What keeps rows from being compared, or a query from finding them, blocks as much as a wrong row."""
    statements, words = STRUCTURES[what]
    async with damaged(world, *statements) as target, Verifier(world.pair.source, target, world.closure) as v:
        report = await v.run()
        assert report.blocks
        assert words in " ".join(report.problems)
        if not words:
            assert found_in(report) == {(Kind.DIFFERING, "sample")}
            assert {f.columns for f in report.findings} == {("twice",)}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_row_that_is_twice_under_one_key_is_found(world: World) -> None:
    """Where no index forbids it (not made yet, or broken), a doubled row is seen and repaired."""
    statements = (
        "ALTER TABLE alarm_comment DROP CONSTRAINT alarm_comment_pkey",
        "INSERT INTO alarm_comment SELECT * FROM alarm_comment ORDER BY id LIMIT 1",
    )
    async with damaged(world, *statements) as target, Verifier(world.pair.source, target, world.closure) as v:
        report = await v.run()
        assert found_in(report) == {(Kind.DOUBLED, "alarm_comment")}
        await v.repair(report)
        assert (await v.run()).agrees


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_right_is_left_in_peace(world: World) -> None:
    """A right copy agrees, with every row counted; in which order they lie does not matter."""
    async with damaged(world, "UPDATE device SET name = name", "REINDEX TABLE device") as target:
        source = await asyncpg.connect(world.pair.source)
        expected = {
            f"public.{table}": await source.fetchval(f"SELECT count(*) FROM {table} WHERE {which}")
            for table, which in OWNED.items()
        }
        await source.close()
        async with Verifier(world.pair.source, target, world.closure, chunk_rows=7) as v:
            report = await v.run()
            assert report.agrees and not report.findings
            assert {one.table: one.source_rows for one in report.tables if one.source_rows} == expected
            assert sum(one.chunks for one in report.tables) > 30


NEIGHBOURS = {
    "double precision": ("0", "'-0'", "1", "'-1'", "'NaN'", "'Infinity'"),
    "bigint": ("0", "1", "'-1'", "4294967296", "4294967297", "'-4294967297'"),
    "integer": ("0", "1", "'-1'"),
    "boolean": ("true", "false"),
    "text": ("''", "' '", "'0'", "E'\\t'"),
    "bpchar": ("''", "' '", "'a'", "'a '"),
    "numeric": ("0", "0.0", "1", "1.0", "'NaN'"),
    "bytea": ("''", "'\\x00'", "'\\x0000'"),
    "jsonb": ("'0'", "'0.0'", "'\"\"'", "'null'"),
    "date": ("'2000-01-01'", "'infinity'", "'2000-01-02'"),
    "timestamp with time zone": ("'2000-01-01'", "'2000-01-01 00:00:00.000001'", "'infinity'"),
}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("type_", NEIGHBOURS)
async def test_the_quick_hash_tells_rows_apart(world: World, type_: str) -> None:
    """All pairs of values that are alike in some way, in two columns that are hashed one after the other."""
    values = ("NULL", *NEIGHBOURS[type_])
    fields = tuple(verify_rows.Field(name=n, type=type_, sent=f"r.{n}", plain=type_) for n in ("a", "b"))
    shape = verify_rows.Shape(table="pg_temp.pair", key=(), fields=fields, hashes_bytes=True)
    conn = await verify_rows.connect(world.pair.source, "source")
    try:
        await conn.execute(f"CREATE TEMP TABLE pair (a {type_}, b {type_})")
        pairs = ", ".join(f"({a}, {b})" for a in values for b in values)
        await conn.execute(f"INSERT INTO pair VALUES {pairs}")
        assert shape.quick and "record_send" not in shape.quick
        found = [row[0] for row in await conn.fetch(f"SELECT {shape.quick} FROM pg_temp.pair r")]
        assert len(set(found)) == len(found) == len(values) ** 2
    finally:
        await conn.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_text_goes_where_the_server_cannot_hash_bytes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PostgreSQL 18 there is no hash of bytes with 64 bits: the same is found without it."""
    found = verify_rows.shapes

    async def older(*args: Any) -> Any:
        shapes, problems = await found(*args)
        changed = {name: msgspec.structs.replace(s, hashes_bytes=False) for name, s in shapes.items()}
        return changed, problems

    monkeypatch.setattr(verify, "shapes", older)
    statements = (
        set_("f8", "0.10000000000000002"),
        "DELETE FROM event_tag WHERE ctid = (SELECT min(ctid) FROM event_tag)",
    )
    async with damaged(world, *statements) as target, Verifier(world.pair.source, target, world.closure) as v:
        report = await v.run()
        assert found_in(report) == {(Kind.DIFFERING, "sample"), (Kind.MISSING, "event_tag")}
        await v.repair(report)
        assert (await v.run()).agrees


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("ahead_rows", [0, verify.AHEAD_ROWS], ids=["lanes", "one lane"])
async def test_findings_are_bounded_and_all_are_counted(world: World, ahead_rows: int) -> None:
    """A target that is all wrong gives a short list and a full count."""
    async with (
        damaged(world, "TRUNCATE ts_kv") as target,
        Verifier(
            world.pair.source, target, world.closure, chunk_rows=20, max_findings=10, ahead_rows=ahead_rows
        ) as v,
    ):
        report = await v.run()
        rows = next(one for one in report.tables if one.table == "public.ts_kv")
        assert len(report.findings) == 10
        assert report.total(Kind.MISSING) == rows.source_rows == 172
        assert rows.chunks > 4


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("ahead_rows", [0, verify.AHEAD_ROWS], ids=["lanes", "one lane"])
async def test_a_run_goes_on_where_it_was_stopped(world: World, ahead_rows: int) -> None:
    """Stopped before each chunk is noted and begun again, it ends, and has found what was found before."""
    damage = (
        "DROP SCHEMA IF EXISTS fleetlift_move CASCADE",
        set_("t", "'stale'"),
        "DELETE FROM ts_kv WHERE ts = 3",
    )
    async with damaged(world, *damage) as target:
        stops: list[str] = []

        async def stop(step: str) -> None:
            if step not in stops:
                stops.append(step)
                raise Stopped

        runs = 0
        while True:
            runs += 1
            async with Verifier(
                world.pair.source, target, world.closure, chunk_rows=40, ahead_rows=ahead_rows
            ) as v:
                try:
                    report = await v.run(probe=stop)
                except Stopped:
                    continue
                break
        assert runs == len(stops) + 1 > 15
        assert len(set(stops)) == len(stops)
        assert report.run == 1
        assert report.total(Kind.DIFFERING) == 1
        assert report.total(Kind.MISSING) == 12
        assert len(report.findings) == 13
        async with Verifier(world.pair.source, target, world.closure) as v:
            assert (await v.run()).run == 2


class Stopped(Exception):
    """Instead of a process that is killed."""
