"""A tenant's schema goes to a database of its own, before and after the rows."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.tenant.closure import Closure, Policy, Reference, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.dumped import SchemaProgress, SchemaReport
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant import pg_dump
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.ddl import (
    SequencesAhead,
    create_schema,
    finish_schema,
    open_triggers,
    set_sequences_ahead,
)
from fleetlift.tenant.introspect import read_schema
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fill_cloud, fresh_pair, running_postgres

ODD_SQL = """
CREATE SCHEMA "Odd ""Place";
CREATE TYPE "Odd ""Place".mood AS ENUM ('sad', 'it''s ok', '😀');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE mood_pair AS (m "Odd ""Place".mood, n int);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN moods AS "Odd ""Place".mood[];
CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO trail (what) VALUES (TG_TABLE_NAME || ' ' || TG_OP); RETURN NULL; END $$;
CREATE TABLE tenant (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE trail (n int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);
CREATE SEQUENCE small_ids AS smallint INCREMENT BY -2 MAXVALUE -1 MINVALUE -101;
CREATE SEQUENCE round_and_round MAXVALUE 1000 CYCLE;
CREATE TABLE "Odd ""Place"."Thing's" (
  "Key" int NOT NULL, "select" text COLLATE "C" NOT NULL, tenant_id int NOT NULL REFERENCES tenant,
  mood "Odd ""Place".mood DEFAULT 'sad', moods "Odd ""Place".mood[], all_moods moods, pair pair,
  mood_pair mood_pair, level positive, span int4range, relation regclass, raw bytea,
  twice int GENERATED ALWAYS AS (twice("Key")) STORED, amount money, exact numeric, ratio float8,
  pause interval, at timestamptz, small int DEFAULT nextval('small_ids'),
  number int GENERATED ALWAYS AS IDENTITY (START WITH 100 INCREMENT BY 5),
  PRIMARY KEY ("Key", "select"), CONSTRAINT "named check" CHECK ("Key" <> 13));
COMMENT ON COLUMN "Odd ""Place"."Thing's"."Key" IS 'it''s a key; -- really';
CREATE UNIQUE INDEX thing_number ON "Odd ""Place"."Thing's" (number) INCLUDE (level);
CREATE INDEX thing_lower ON "Odd ""Place"."Thing's" (lower("select")) WHERE level > 1;
CREATE STATISTICS thing_stats ON "Key", tenant_id FROM "Odd ""Place"."Thing's";
ALTER TABLE "Odd ""Place"."Thing's" ADD CONSTRAINT no_overlap EXCLUDE USING gist (span WITH &&);
GRANT SELECT, INSERT ON "Odd ""Place"."Thing's" TO odd_app;
ALTER TABLE trail OWNER TO "odd Owner";
ALTER TABLE trail ENABLE ROW LEVEL SECURITY;
CREATE POLICY trail_policy ON trail TO odd_app USING (what <> 'secret');
CREATE TABLE keyless (tenant_id int REFERENCES tenant, what text, n int);
CREATE TABLE by_unique (code text NOT NULL, tenant_id int NOT NULL REFERENCES tenant, note text);
CREATE UNIQUE INDEX by_unique_code ON by_unique (code);
ALTER TABLE by_unique REPLICA IDENTITY USING INDEX by_unique_code;
CREATE TABLE archive (id int PRIMARY KEY, note text);
CREATE TABLE refers (id int PRIMARY KEY, tenant_id int NOT NULL REFERENCES tenant,
  archive_id int CONSTRAINT refers_archive REFERENCES archive, level int);
ALTER TABLE refers ADD CONSTRAINT old_rows_may CHECK (level > 0) NOT VALID;
CREATE TABLE measured (tenant_id int NOT NULL, day int NOT NULL, value int, PRIMARY KEY (tenant_id, day))
  PARTITION BY LIST (day);
CREATE TABLE measured_1 PARTITION OF measured FOR VALUES IN (1);
CREATE TABLE measured_rest PARTITION OF measured DEFAULT PARTITION BY RANGE (tenant_id);
CREATE TABLE measured_low PARTITION OF measured_rest FOR VALUES FROM (MINVALUE) TO (100);
CREATE INDEX measured_value ON measured (value);
ALTER TABLE measured ADD CONSTRAINT measured_tenant FOREIGN KEY (tenant_id) REFERENCES tenant;
CREATE VIEW busy AS SELECT t.name, count(*) FROM tenant t JOIN refers r ON r.tenant_id = t.id GROUP BY 1;
CREATE MATERIALIZED VIEW sums AS SELECT tenant_id, sum(value) AS total FROM measured GROUP BY 1;
CREATE UNIQUE INDEX sums_tenant ON sums (tenant_id);
CREATE TRIGGER thing_noted AFTER INSERT ON "Odd ""Place"."Thing's" FOR EACH ROW EXECUTE FUNCTION noted();
CREATE TRIGGER refers_noted AFTER INSERT ON refers FOR EACH ROW EXECUTE FUNCTION noted();
ALTER TABLE refers ENABLE ALWAYS TRIGGER refers_noted;
CREATE RULE no_delete AS ON DELETE TO archive DO INSTEAD NOTHING;
INSERT INTO tenant VALUES (1, 'one'), (2, 'two');
INSERT INTO archive VALUES (1, 'old');
INSERT INTO refers VALUES (1, 1, 1, 5), (2, 1, NULL, 5), (3, 2, 1, 5);
INSERT INTO "Odd ""Place"."Thing's"
    ("Key", "select", tenant_id, mood, moods, all_moods, pair, mood_pair, level, span, relation, raw, amount,
     exact, ratio, pause, at)
  SELECT n, E'a\\\\''b\\n' || n, 1 + n % 2, '😀', '{sad,"it''s ok",NULL}', '{"😀"}', (n, 'x,"y')::pair,
    ('sad', n)::mood_pair, n, int4range(n * 10, n * 10 + 5), 'tenant'::regclass, '\\x00ff5c'::bytea, n * 1.5,
    1e-20::numeric + n, 0.1::float8 + n, '1 mon -3 days 04:05:06.7'::interval,
    '2026-03-29 01:59:59.123456+01'::timestamptz
  FROM generate_series(1, 12) n;
INSERT INTO keyless VALUES (1, 'same', 1), (1, 'same', 1), (1, NULL, NULL), (2, 'other', 1);
INSERT INTO by_unique VALUES ('a', 1, 'x'), ('b', 1, NULL), ('c', 2, '');
INSERT INTO measured SELECT t, d, t * d FROM generate_series(1, 2) t, generate_series(1, 9) d;
REFRESH MATERIALIZED VIEW sums;
DELETE FROM trail;
"""

ODD_RULES = Rules(
    root=Root(table="public.tenant", column="id", value="1"),
    references=(
        Reference(table="public.measured", columns=("tenant_id",), to="public.tenant", to_columns=("id",)),
    ),
    left_out=("public.archive",),
    policies={("public.refers", ("archive_id",)): Policy.REFER},
    full_identity=("public.keyless",),
)

_CATALOGUE = """
SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname !~ '^(pg_|information_schema|fleetlift)'
UNION ALL SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
  FROM pg_constraint WHERE conrelid <> 0
    AND connamespace::regnamespace::text !~ '^(pg_|information|fleetlift)'
UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid) || tgenabled::text FROM pg_trigger
  WHERE NOT tgisinternal
UNION ALL SELECT 'rule ' || definition FROM pg_rules WHERE schemaname = 'public'
UNION ALL SELECT 'policy ' || tablename || policyname || qual FROM pg_policies
UNION ALL SELECT 'comment ' || description FROM pg_description WHERE classoid = 'pg_class'::regclass
  AND objoid >= 16384
UNION ALL SELECT 'column ' || attrelid::regclass || ' ' || attname || ' ' ||
    format_type(atttypid, atttypmod) || attnotnull || attidentity::text || attgenerated::text ||
    coalesce(pg_get_expr(adbin, adrelid), '')
  FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
  JOIN pg_class c ON c.oid = attrelid
  WHERE attnum > 0 AND relnamespace::regnamespace::text !~ '^(pg_|information|fleetlift)'
    AND relkind IN ('r', 'p')
UNION ALL SELECT 'granted ' || c.oid::regclass || ' ' || relowner::regrole || coalesce(relacl::text, '') ||
    relrowsecurity || relreplident::text
  FROM pg_class c WHERE relnamespace::regnamespace::text !~ '^(pg_|information|fleetlift)'
UNION ALL SELECT 'statistics ' || pg_get_statisticsobjdef(oid) FROM pg_statistic_ext
UNION ALL SELECT 'sequence ' || sequencename || start_value || increment_by || min_value || max_value || cycle
  FROM pg_sequences WHERE schemaname !~ '^fleetlift'
ORDER BY 1
"""


@pytest_asyncio.fixture(loop_scope="module")
async def odd(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as pair:
        try:
            await run_sql(pair.source, 'CREATE ROLE odd_app; CREATE ROLE "odd Owner" NOLOGIN')
            await run_sql(pair.source, ODD_SQL)
            yield pair
        finally:
            for url in (pair.source, pair.target):
                await run_sql(url, 'DROP OWNED BY odd_app, "odd Owner" CASCADE')
            await run_sql(server.url, 'DROP ROLE odd_app; DROP ROLE "odd Owner"')


one_loop = pytest.mark.asyncio(loop_scope="module")


async def run_sql(url: str, sql: str) -> list[tuple[Any, ...]]:
    conn = await asyncpg.connect(url)
    try:
        if sql.lstrip().upper().startswith(("SELECT", "UPDATE")):
            return [tuple(row) for row in await conn.fetch(sql)]
        await conn.execute(sql)
        return []
    finally:
        await conn.close()


async def closure(url: str, rules: Rules) -> Closure:
    conn = await asyncpg.connect(url)
    try:
        return closure_of(await read_schema(conn), rules)
    finally:
        await conn.close()


async def catalogue(url: str) -> list[str]:
    return [str(row[0]) for row in await run_sql(url, _CATALOGUE)]


@one_loop
async def test_everything_of_a_schema_comes_along(odd: Pair) -> None:
    """Types, keys, generated and identity columns, partitions, policies, grants, comments: as they were,
    but for the reference to a table that stays and a trigger that waits for the target to open."""
    rules = await closure(odd.source, ODD_RULES)
    before = await create_schema(odd.source, odd.target, rules, move="odd")
    assert before.left_out == ()
    indexes = {row[0] for row in await run_sql(odd.target, "SELECT indexname FROM pg_indexes")}
    assert "by_unique_code" in indexes and "thing_lower" not in indexes and "thing_number" not in indexes

    copied = await Copier(odd.source, odd.target, rules, move="odd", chunk_rows=3).run()
    assert copied.tables["public.keyless"].rows == 3
    seen: list[SchemaProgress] = []
    report = await finish_schema(odd.source, odd.target, rules, move="odd", progress=seen.append)

    assert report.failed == ()
    assert report.left_out == (
        "fk constraint public.refers refers_archive: rows may refer to rows of public.archive that do not "
        "come along",
    )
    assert {one.stage for one in seen} >= {"indexes", "references", "validating", "triggers", "views"}
    there, here = await catalogue(odd.source), await catalogue(odd.target)
    assert set(there) - set(here) == {
        "constraint refers refers_archive FOREIGN KEY (archive_id) REFERENCES archive(id)",
        "trigger CREATE TRIGGER refers_noted AFTER INSERT ON public.refers FOR EACH ROW EXECUTE FUNCTION "
        "noted()A",
    }
    assert [one for one in here if one not in there] == [
        "trigger CREATE TRIGGER refers_noted AFTER INSERT ON public.refers FOR EACH ROW EXECUTE FUNCTION "
        "noted()O"
    ]
    assert await run_sql(odd.target, "SELECT total::int FROM sums") == [(45,)]
    assert await run_sql(odd.target, "SELECT count(*) FROM trail") == [(0,)]  # no trigger has fired

    assert await open_triggers(odd.target) == (
        "ALTER TABLE public.refers ENABLE ALWAYS TRIGGER refers_noted;",
    )
    assert await open_triggers(odd.target) == ()
    assert not [
        line for line in await catalogue(odd.target) if line.endswith("noted()O") and "refers" in line
    ]

    again = await finish_schema(odd.source, odd.target, rules, move="odd")
    assert again.failed == () and not [
        title for title in again.made if "index " in title and "attach" not in title
    ]
    resumed = await create_schema(odd.source, odd.target, rules, move="odd")
    assert resumed.resumed and resumed.made == before.made


@one_loop
async def test_roles_that_lack_are_made_without_a_login(odd: Pair, server: EmbeddedPostgres) -> None:
    """Another server knows none of the roles that own things or may do something: they are made and named,
    and what belongs to whom is as it was."""
    with scratch_directory() as directory:
        async with running_postgres(directory) as other:
            rules = await closure(odd.source, ODD_RULES)
            report = await create_schema(odd.source, other.url, rules, move="odd")
            assert report.roles == ("odd Owner", "odd_app")
            logins = "SELECT rolcanlogin, rolsuper FROM pg_roles WHERE rolname ~ '^odd'"
            assert await run_sql(other.url, logins) == [(False, False)] * 2
            await Copier(odd.source, other.url, rules, move="odd").run()
            assert (await finish_schema(odd.source, other.url, rules, move="odd")).failed == ()
            granted = [line for line in await catalogue(other.url) if line.startswith("granted")]
            assert granted == [line for line in await catalogue(odd.source) if line.startswith("granted")]


@one_loop
async def test_rows_of_odd_types_are_the_same_on_both_sides(odd: Pair) -> None:
    """Arrays of enums, composites, domains, ranges, names of relations: none is garbled by other OIDs."""
    await run_sql(odd.target, "CREATE TYPE shifts_oids AS ENUM ('x'); DROP TYPE shifts_oids")
    rules = await closure(odd.source, ODD_RULES)
    await create_schema(odd.source, odd.target, rules, move="odd")
    await Copier(odd.source, odd.target, rules, move="odd", chunk_rows=2).run()
    table = '"Odd ""Place"."Thing\'s"'
    text = f"SELECT t::text FROM {table} t WHERE tenant_id = 1 ORDER BY 1"
    assert await run_sql(odd.target, text) == await run_sql(odd.source, text)
    for name in ("keyless", "by_unique", "measured", "refers"):
        text = f"SELECT t::text FROM {name} t WHERE tenant_id = 1 ORDER BY 1"
        assert await run_sql(odd.target, text) == await run_sql(odd.source, text)
        assert await run_sql(odd.target, f"SELECT count(*) FROM {name} WHERE tenant_id <> 1") == [(0,)]


@one_loop
async def test_sequences_start_ahead_and_never_go_back(odd: Pair) -> None:
    """Ids that the source gives to its other tenants afterwards are not those that the target gives."""
    rules = await closure(odd.source, ODD_RULES)
    await create_schema(odd.source, odd.target, rules, move="odd")
    report = await set_sequences_ahead(odd.source, odd.target, rules, gap=1000)
    number = '"Odd ""Place"."Thing\'s_number_seq"'
    assert await run_sql(odd.target, f"SELECT last_value FROM {number}") == [(155 + 5000,)]
    # A descending one with 50 ids, 12 of them gone: half the rest is left to the source, and that is said.
    assert await run_sql(odd.target, "SELECT last_value FROM small_ids") == [(-23 - 20 * 2,)]
    assert any("only 39 ids are left" in note for note in report.notes)
    assert any("it starts again at its end" in note or "round_and_round" in note for note in report.notes)
    assert (await set_sequences_ahead(odd.source, odd.target, rules, gap=10)).set == {}
    assert await run_sql(odd.target, f"SELECT last_value FROM {number}") == [(155 + 5000,)]


@one_loop
async def test_on_the_way_back_only_what_has_given_ids_is_set(server: EmbeddedPostgres) -> None:
    """The source's sequences are every tenant's, and a smallint has not many ids: again and again there and
    back costs none where the target gave none, nor of tables whose rows stay."""
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=2, devices=1, values=1)
        await run_sql(pair.source, "CREATE TABLE ticket (id smallserial PRIMARY KEY)")
        await run_sql(
            pair.source, "CREATE TABLE note (id smallserial PRIMARY KEY, user_id bigint REFERENCES users)"
        )
        await run_sql(pair.source, "INSERT INTO note (user_id) SELECT 1 FROM generate_series(1, 100)")
        rules = await closure(pair.source, Rules(root=Root(table="public.customers", column="id", value="1")))
        await create_schema(pair.source, pair.target, rules, move="one")
        values = "SELECT sequencename, last_value FROM pg_sequences WHERE schemaname = 'public'"
        before = dict(await run_sql(pair.source, values))
        assert before["note_id_seq"] == 100
        for _ in range(20):
            there = await set_sequences_ahead(pair.source, pair.target, rules)
            back = SequencesAhead(pair.target, pair.source, rules, gap=1, back=True, stood=there.stands)
            assert (await back()).set == {}
            await back.aclose()
        assert dict(await run_sql(pair.source, values)) == before
        for name in ("ticket", "device"):
            await run_sql(pair.target, f"SELECT nextval('{name}_id_seq')")
        given = (await run_sql(pair.target, "SELECT last_value FROM device_id_seq"))[0][0]
        back = SequencesAhead(pair.target, pair.source, rules, gap=1, back=True, stood=there.stands)
        assert (await back()).set == {"public.device_id_seq": given + 1}
        await back.aclose()
        assert dict(await run_sql(pair.source, values)) == {**before, "device_id_seq": given + 1}
        back = SequencesAhead(pair.target, pair.source, rules, gap=1, back=True)
        assert "public.note_id_seq" in (await back()).set, "nobody knows where they stood: to be sure"
        await back.aclose()


@one_loop
async def test_a_target_with_tables_is_refused(server: EmbeddedPostgres) -> None:
    """Nothing of others is touched: the target must be empty, or this move's own."""
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=2, devices=1, values=1)
        rules = await closure(pair.source, Rules(root=Root(table="public.customers", column="id", value="1")))
        await run_sql(pair.target, "CREATE TABLE mine (id int)")
        with pytest.raises(Conflict, match=r"not empty: it has public\.mine"):
            await create_schema(pair.source, pair.target, rules, move="one")
        with pytest.raises(Conflict, match="has not made this target's schema"):
            await finish_schema(pair.source, pair.target, rules, move="one")
        await run_sql(pair.target, "DROP TABLE mine")
        await create_schema(pair.source, pair.target, rules, move="one")
        with pytest.raises(Conflict, match="prepared by the move 'one'"):
            await create_schema(pair.source, pair.target, rules, move="two")


@one_loop
async def test_a_schema_that_the_target_refuses_is_not_half_made(server: EmbeddedPostgres) -> None:
    """One transaction: whatever is refused, nothing stays."""
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=2, devices=1, values=1)
        rules = await closure(pair.source, Rules(root=Root(table="public.customers", column="id", value="1")))
        await run_sql(pair.target, "CREATE TYPE email AS ENUM ('in the way')")
        with pytest.raises(Conflict, match=r"refuses domain public\.email: .*nothing of the schema was made"):
            await create_schema(pair.source, pair.target, rules, move="one")
        assert await run_sql(
            pair.target,
            "SELECT count(*) FROM pg_class WHERE relnamespace::regnamespace::text ~ '^(public|fleet)'",
        ) == [(0,)]


@one_loop
async def test_what_the_target_violates_is_listed_with_rows_and_can_be_gone_on_with(
    server: EmbeddedPostgres,
) -> None:
    """Every refused constraint is named with an example, all others are made; once repaired, the rest."""
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=2, devices=4, values=1)
        rules = await closure(pair.source, Rules(root=Root(table="public.customers", column="id", value="1")))
        await create_schema(pair.source, pair.target, rules, move="one")
        await Copier(pair.source, pair.target, rules, move="one").run()
        await run_sql(
            pair.target,
            "ALTER TABLE device ALTER customer_id DROP NOT NULL;"
            "UPDATE device SET name = 'twice' WHERE id IN (SELECT id FROM device ORDER BY id LIMIT 2);"
            "UPDATE device SET profile_id = 77 WHERE id = (SELECT max(id) FROM device);",
        )
        report = await finish_schema(pair.source, pair.target, rules, move="one")
        failed = {one.name: one for one in report.failed}
        assert set(failed) == {
            "constraint public.device device_customer_id_name_key",
            "fk constraint public.device device_profile_id_fkey",
        }
        assert "twice" in failed["constraint public.device device_customer_id_name_key"].examples[0]
        assert "profile_id = 77" in failed["fk constraint public.device device_profile_id_fkey"].examples[0]
        assert "fk constraint public.device device_asset_id_fkey" in report.made
        await run_sql(pair.target, "UPDATE device SET name = 'd' || id, profile_id = NULL")
        report = await finish_schema(pair.source, pair.target, rules, move="one")
        assert report.failed == ()
        assert await run_sql(pair.target, "SELECT count(*) FROM pg_constraint WHERE NOT convalidated") == [
            (0,)
        ]


async def finished_unless_cancelled(pair: Pair, rules: Closure, step: int) -> SchemaReport | None:
    """Finish the schema, cancelled at the `step`-th thing it tells; None when it was."""
    heard = 0

    def stop_at(_: SchemaProgress) -> None:
        nonlocal heard
        heard += 1
        if heard == step:
            running.cancel()

    running = asyncio.create_task(
        finish_schema(pair.source, pair.target, rules, move="one", progress=stop_at)
    )
    try:
        return await running
    except asyncio.CancelledError:
        return None


@one_loop
async def test_finishing_goes_on_wherever_it_was_cancelled(server: EmbeddedPostgres) -> None:
    """Cancelled at every object in turn: each is there or not, none half, and in the end all are."""
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=2, devices=2, values=1)
        rules = await closure(pair.source, Rules(root=Root(table="public.customers", column="id", value="1")))
        await create_schema(pair.source, pair.target, rules, move="one")
        await Copier(pair.source, pair.target, rules, move="one").run()
        report = None
        for step in itertools.count(9, 9):
            report = await finished_unless_cancelled(pair, rules, step)
            if report is not None:
                break
        assert report is not None
        assert report.failed == ()
        kinds = (
            "SELECT contype::text, count(*) FROM pg_constraint "
            "WHERE convalidated AND connamespace = 'public'::regnamespace GROUP BY 1 ORDER BY 1"
        )
        assert await run_sql(pair.target, kinds) == await run_sql(pair.source, kinds)


@one_loop
async def test_a_newer_server_is_refused_with_its_reason(odd: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our pg_dump reads no schema of a server newer than itself."""
    rules = await closure(odd.source, ODD_RULES)
    monkeypatch.setattr(pg_dump, "VERSION", 17)
    with pytest.raises(BadInput, match="PostgreSQL 18, and the pg_dump that comes with Fleetlift is 17"):
        await create_schema(odd.source, odd.target, rules, move="odd")


def test_a_password_goes_by_the_environment_only() -> None:
    """Nothing of a URL appears on a command line, and what pg_dump cannot be given is refused without it."""
    found = pg_dump.connection_environment("postgresql://me:s%40crt@/db?host=/run/pg&sslmode=require")
    assert found["PGPASSWORD"] == "s@crt" and found["PGHOST"] == "/run/pg" and found["PGSSLMODE"] == "require"
    with pytest.raises(BadInput) as problem:
        pg_dump.connection_environment("postgresql://me:secret@/db?keepalives=1")
    assert "secret" not in str(problem.value) and "keepalives" in str(problem.value)
