"""`tenant explain` on a cloud in which rows of two tenants are entangled in every way that is known."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
import pytest
import yaml

from fleetlift.cli.main import command_tree
from fleetlift.core.errors import BadInput, NotFound
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.explanation import Explanation, Finding, Kind, Severity
from fleetlift.core.tenant.rules import parse_rules
from fleetlift.core.tenant.schema import quoted_table
from fleetlift.tenant.explain import explain
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.membership import member_condition
from fleetlift.tenant.why import why
from fleetlift.testing import LoopThread, TestPostgres
from tenant_world import CLOUD_TABLES, fill_cloud

Db = Any


@pytest.fixture
def cloud_url(postgres: TestPostgres, engine_loop: LoopThread) -> Iterator[str]:
    url = engine_loop.run(postgres.new_database(template="template1"))
    engine_loop.run(fill_cloud(url))
    yield url
    engine_loop.run(postgres.drop_database(url))


@pytest.fixture
async def cloud(cloud_url: str) -> AsyncIterator[Db]:
    conn = await asyncpg.connect(cloud_url)
    yield conn
    await conn.close()


KEYED = CLOUD_TABLES + "event_tag: {identity: full}\n"


async def closure_for(conn: Db, more: str = "", tables: str = KEYED) -> Closure:
    schema = await read_schema(conn)
    said = yaml.safe_load(tables) | (yaml.safe_load(more) or {})
    return closure_of(schema, parse_rules("customers.id = 2", said, schema))


async def explained(conn: Db, more: str = "", tables: str = KEYED) -> Explanation:
    return await explain(conn, await closure_for(conn, more, tables))


def the(found: Explanation, kind: Kind, severity: Severity | None = None) -> Finding:
    (one,) = [f for f in found.findings if f.kind is kind and severity in (None, f.severity)]
    return one


async def a_device_of(conn: Db, tenant: int) -> int:
    return int(await conn.fetchval("SELECT min(id) FROM device WHERE customer_id = $1", tenant))


async def test_a_tidy_cloud_has_nothing_to_complain_of(cloud: Db) -> None:
    found = await explained(cloud)
    assert found.ok and not found.leaks, found.findings
    by_name = {one.table: one for one in found.tables}
    device = by_name["public.device"]
    assert (device.part, device.rows, device.total, device.shared) == (Part.OWNED, 8, 40, 0)
    assert device.paths == ("device ← customers by customer_id",)
    assert 0 < device.bytes < 16384
    assert by_name["public.currency"].rows == 3
    assert (by_name["public.country"].rows, by_name["public.country"].shared) == (1, 1)
    assert by_name["public.country"].paths == ("country ← referred to by customers.country_id",)
    assert "ts_kv ← device by entity_id when entity_type = 'DEVICE'" in by_name["public.ts_kv"].paths
    assert found.rows == sum(one.rows for one in found.tables) == 247


async def test_a_junction_row_between_two_tenants_leaks(cloud: Db) -> None:
    other = await a_device_of(cloud, 3)
    await cloud.execute("INSERT INTO group_device VALUES (2, $1)", other)
    found = await explained(cloud)
    leak = the(found, Kind.OTHER_TENANT)
    assert (leak.table, leak.count, leak.samples) == (
        "public.group_device",
        1,
        (f"group_id=2, device_id={other}",),
    )
    assert "'group_device: {own: [device_id], refer: [device_id]}'" in leak.advice
    assert not found.ok
    # what is advised does away with it: the row without the device, or neither
    carried = await explained(cloud, "group_device: {own: [device_id], refer: [device_id]}")
    assert carried.ok
    assert the(carried, Kind.CARRIED).count == 1
    left = await explained(cloud, "group_device: {refer: [group_id]}")
    assert left.ok


async def test_bringing_the_other_row_along_is_a_leak_of_its_own(cloud: Db) -> None:
    other = await a_device_of(cloud, 3)
    await cloud.execute("INSERT INTO group_device VALUES (2, $1)", other)
    found = await explained(cloud, "group_device: {own: [device_id], copy: [device_id]}")
    copied = the(found, Kind.COPIED)
    assert (copied.severity, copied.table, copied.samples) == (
        Severity.LEAK,
        "public.device",
        (f"id={other}",),
    )
    away = the(found, Kind.OTHER_TENANT)
    assert (away.table, away.edge) == ("public.device", "public.device.device_customer_id_fkey")
    device = next(one for one in found.tables if one.table == "public.device")
    assert (device.owned, device.shared) == (8, 1)


async def test_the_root_points_at_another_root(cloud: Db) -> None:
    await cloud.execute("UPDATE customers SET parent_id = 1 WHERE id = 2")
    await cloud.execute("UPDATE customers SET parent_id = 2 WHERE id IN (3, 4)")
    found = await explained(cloud)
    assert the(found, Kind.OTHER_ROOT).samples == ("id=2",)
    stays = the(found, Kind.STAYS)
    assert (stays.severity, stays.count, stays.samples) == (Severity.MISSING, 2, ("id=3", "id=4"))
    assert (await explained(cloud, "customers: {refer: [parent_id]}")).ok


async def test_a_device_in_another_tenants_building_stays_and_the_reverse_leaks(cloud: Db) -> None:
    mine, other = await a_device_of(cloud, 2), await a_device_of(cloud, 3)
    site = "(SELECT min(id::text)::uuid FROM asset WHERE customer_id = {})"
    await cloud.execute(f"UPDATE device SET asset_id = {site.format(2)} WHERE id = {other}")
    await cloud.execute(f"UPDATE device SET asset_id = {site.format(3)} WHERE id = {mine}")
    found = await explained(cloud)
    assert the(found, Kind.OTHER_TENANT).samples == (f"id={mine}",)
    stays = the(found, Kind.STAYS)
    assert stays.samples == (f"id={other}",)
    assert "'device: {own: [asset_id]}'" in stays.advice


async def test_shared_rows_that_are_a_tenants(cloud: Db) -> None:
    """A profile made by another tenant's user comes along with a device; one that nobody made may."""
    await cloud.execute("ALTER TABLE device_profile ADD made_by bigint REFERENCES users")
    await cloud.execute(
        "UPDATE device_profile SET made_by = (SELECT min(id) FROM users WHERE customer_id = 3) WHERE id = 3"
    )
    more = "device_profile: {own: [parent_id], copy: [parent_id]}"
    found = await explained(cloud, more)
    away = the(found, Kind.OTHER_TENANT)
    assert (away.table, away.samples) == ("public.device_profile", ("id=3",))
    copied = [one for one in found.findings if one.kind is Kind.COPIED]
    assert {(one.severity, one.count) for one in copied} >= {(Severity.LEAK, 1)}
    await cloud.execute("UPDATE device_profile SET made_by = NULL")
    tidy = await explained(cloud, more)
    assert tidy.ok
    assert {one.severity for one in tidy.findings if one.kind is Kind.COPIED} == {Severity.NOTE}


async def test_tenant_columns_that_no_reference_uses(cloud: Db) -> None:
    """A shared table that says another tenant, and a table of the tenant's that nobody has told of."""
    await cloud.execute(
        """
        ALTER TABLE device_profile ADD customer_id bigint;
        UPDATE device_profile SET customer_id = 3 WHERE id = 3;
        CREATE TABLE invoice (id int PRIMARY KEY, customer_id text);
        INSERT INTO invoice VALUES (1, '2'), (2, '2'), (3, '4');
        """
    )
    found = await explained(cloud)
    leak = the(found, Kind.TENANT_COLUMN)
    assert (leak.table, leak.samples) == ("public.device_profile", ("id=3",))
    stays = the(found, Kind.TENANT_COLUMN_STAYS)
    assert (stays.table, stays.count) == ("public.invoice", 2)
    assert "'invoice: customer_id'" in stays.advice
    told = await explained(cloud, "invoice: customer_id")
    assert Kind.TENANT_COLUMN_STAYS not in {one.kind for one in told.findings}
    assert next(one for one in told.tables if one.table == "public.invoice").rows == 2


async def test_dangling_references_that_nobody_declared(cloud: Db) -> None:
    await cloud.execute(
        "CREATE TABLE hint (id int PRIMARY KEY, customer_id bigint REFERENCES customers, device text);"
        "INSERT INTO hint VALUES (1, 2, 'gone'), (2, 2, NULL), (3, 3, 'gone')"
    )
    found = await explained(cloud, "hint: device -> device.id")
    assert the(found, Kind.DANGLING).samples == ("id=1",)
    assert found.ok


async def test_what_cannot_be_moved_is_said_before(cloud: Db) -> None:
    await cloud.execute(
        """
        CREATE TABLE photo (id int PRIMARY KEY, customer_id bigint REFERENCES customers, data oid);
        SELECT lo_from_bytea(0, 'x');
        CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER loud AFTER INSERT ON device FOR EACH ROW EXECUTE FUNCTION nothing();
        CREATE TRIGGER quiet AFTER INSERT ON device FOR EACH ROW EXECUTE FUNCTION nothing();
        ALTER TABLE device ENABLE ALWAYS TRIGGER loud;
        """
    )
    found = await explained(cloud, tables=CLOUD_TABLES)
    refused = [one.text for one in found.findings if one.severity is Severity.REFUSED]
    assert any("event_tag has no key" in text for text in refused)
    assert any("1 large object(s), and photo.data" in text for text in refused)
    assert "trigger loud of device" in the(found, Kind.FIRES).text


async def test_a_root_that_is_not_there(cloud: Db) -> None:
    schema = await read_schema(cloud)
    nobody = closure_of(schema, parse_rules("customers.id = 99", yaml.safe_load(KEYED), schema))
    assert the(await explain(cloud, nobody), Kind.NO_ROOT).count == 0
    nonsense = closure_of(schema, parse_rules("customers.id = acme", yaml.safe_load(KEYED), schema))
    with pytest.raises(BadInput, match=r"'acme' is no value of customers\.id"):
        await explain(cloud, nonsense)


async def test_nothing_of_another_tenant_changes_what_is_said(cloud: Db) -> None:
    """Two worlds that differ in other tenants' rows only give the same explanation, but for totals."""
    before = await explained(cloud)
    await cloud.execute(
        "INSERT INTO device (customer_id, name) VALUES (3, 'new');"
        "UPDATE users SET email = 'x' || email WHERE customer_id = 4; DELETE FROM ts_kv WHERE ts = 2 AND "
        "entity_id NOT IN (SELECT id::text FROM device WHERE customer_id = 2) AND entity_type = 'DEVICE'"
    )
    after = await explained(cloud)
    assert before.findings == after.findings
    assert [(t.table, t.rows, t.owned, t.paths) for t in before.tables] == [
        (t.table, t.rows, t.owned, t.paths) for t in after.tables
    ]


async def test_why_agrees_with_what_comes_for_every_row(cloud: Db) -> None:
    """Each row that comes has a chain that ends at the root's row; each other one has a reason."""
    await cloud.execute("DELETE FROM ts_kv WHERE ts > 2")
    closure = await closure_for(cloud)
    asked = 0
    for name in closure.schema.tables:
        table = closure.schema.tables[name]
        if not table.key:
            continue
        columns = ", ".join(f'r."{column}"::text AS k{n}' for n, column in enumerate(table.key))
        condition = member_condition(closure, name, "r")
        for row in await cloud.fetch(
            f"SELECT ({condition}) IS TRUE AS comes, {columns} FROM {quoted_table(name)} r LIMIT 40"
        ):
            comes, *key = row.values()
            answer = await why(cloud, closure, name, key)
            asked += 1
            assert bool(answer.chain) == comes, (name, key, answer)
            assert bool(answer.reasons) == (not comes)
            if answer.part in (Part.OWNED, Part.SHARED):
                last = answer.chain[-1]
                assert (last.table, last.key) in (
                    ("public.customers", "id=2"),
                    ("public.currency", last.key),
                )
                assert all(link.by for link in answer.chain[1:])
    assert asked > 250


async def test_why_of_rows_by_name(cloud: Db) -> None:
    closure = await closure_for(cloud)
    profile = await why(cloud, closure, "public.device_profile", {"name": "base"})
    assert profile.part is Part.SHARED
    assert [link.by for link in profile.chain] == [
        "",
        "device_profile.parent_id → device_profile",
        "device.profile_id → device_profile",
        "device.customer_id → customers",
    ]
    row = await cloud.fetchrow(
        "SELECT device_id::text, tag FROM event_tag WHERE device_id = $1", await a_device_of(cloud, 2)
    )
    tag = await why(cloud, closure, "public.event_tag", dict(row))
    assert (tag.part, tag.chain[-1].key) == (Part.OWNED, "id=2")
    with pytest.raises(NotFound):
        await why(cloud, closure, "public.device", ["999999"])
    with pytest.raises(BadInput, match="no key of it"):
        await why(cloud, closure, "public.device", ["x"])
    with pytest.raises(BadInput, match="has the key"):
        await why(cloud, closure, "public.alarm", ["1"])
    other = await why(cloud, closure, "public.device", [str(await a_device_of(cloud, 3))])
    assert other.reasons == ("customer_id (own) points at customers id=3, which the tenant does not own",)


def run(*words: str) -> int:
    """The command's exit status."""
    try:
        command_tree().main(["tenant", "explain", *words], prog_name="fleetlift", standalone_mode=False)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_command_shows_it(
    cloud_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THE_CLOUD", cloud_url)
    tables = tmp_path / "tables.yaml"
    tables.write_text(KEYED)
    base = ["--from-env", "THE_CLOUD", "--root", "customers.id=2", "--tables", str(tables)]
    run(*base)
    shown = capsys.readouterr().out
    assert "device ← customers by customer_id" in shown
    assert "✓ Nothing of another tenant comes along." in shown
    run(*base, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["rows"] == 247
    run(*base, "--why", "alarm_comment", "id=1")
    assert "alarm_comment id=1" in capsys.readouterr().out
    run(*base, "--why", "country", "3", "--json")
    assert json.loads(capsys.readouterr().out)["comes"]
    tables.write_text("currency: all\ndevise: {owns: [x]}\n")
    with pytest.raises(BadInput, match=r"tables\.yaml:2:9: devise\.owns: is not a key here"):
        run(*base)
    with pytest.raises(BadInput, match="give --plan PLAN"):
        run("--root", "customers.id=2")


def test_the_command_reads_a_plan(
    cloud_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a plan only the source is asked: the target need not be there yet."""
    parts = urlsplit(cloud_url)
    monkeypatch.setenv("SOURCE_PASSWORD", unquote(parts.password or ""))
    plan = tmp_path / "plan.yaml"
    without = cloud_url.replace(f":{parts.password}@", "@")
    plan.write_text(
        f"""
migration: two
tenant: acme
from: {{postgresql: "{without}", password_env: SOURCE_PASSWORD, mqtt: "mqtt://127.0.0.1:1"}}
to: {{postgresql: "postgresql://nobody@127.0.0.1:1/none", mqtt: "mqtt://127.0.0.1:2"}}
lever: dns
dns: {{server: "127.0.0.1:1", zone: example.com, key: "env:KEY"}}
steps:
  - copy: tenant data
    root: customers.id = 2
    tables:
      {{audit_log: customer_id, currency: all, event_tag: {{identity: full}}, ts_kv: none}}
  - switch: database
  - switch: dns
    records: [{{name: iot.example.com, to: 127.0.0.2}}]
    waves: [100%]
"""
    )
    run("--plan", str(plan), "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["rows"] == 247 - 172
    with pytest.raises(BadInput, match="--plan says it all"):
        run("--plan", str(plan), "--root", "customers.id=3")
