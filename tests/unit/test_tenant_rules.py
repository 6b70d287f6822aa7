"""What a plan says of tables, read against a schema."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Policy, Reference, Root
from fleetlift.core.tenant.rules import BadRules, check_syntax, parse_root, parse_rules
from fleetlift.core.tenant.schema import Column, DatabaseSchema, ForeignKey, Table


def table(
    name: str, *columns: str, keys: tuple[ForeignKey, ...] = (), key: tuple[str, ...] = ("id",)
) -> Table:
    return Table(
        name=name,
        columns=tuple(Column(name=c, type="bigint", not_null=c in key) for c in columns),
        key=key,
        foreign_keys=keys,
    )


def to(name: str, column: str, parent: str) -> ForeignKey:
    return ForeignKey(name=name, columns=(column,), to=parent, to_columns=("id",))


SCHEMA = DatabaseSchema(
    tables={
        one.name: one
        for one in (
            table("public.customers", "id", "name"),
            table(
                "public.device",
                "id",
                "customer_id",
                "profile_id",
                keys=(
                    to("device_customer_fk", "customer_id", "public.customers"),
                    to("device_profile_fk", "profile_id", "public.profile"),
                ),
            ),
            table("public.asset", "id"),
            table("public.profile", "id"),
            table("public.ts_kv", "entity_type", "entity_id", "a", "b", key=()),
            table("public.audit_log", "id", "customer_id"),
            table("crm.note", "id", "device_id"),
            table("crm.currency", "id"),
            table("old.currency", "id"),
            table("public.pair", "x", "y", key=("x", "y")),
        )
    },
    skipped={"public.far": "a foreign table: its rows are in another database, and stay there"},
)


def problems(root: str, tables: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(BadRules) as bad:
        parse_rules(root, tables, SCHEMA)
    return dict(bad.value.problems)


def test_the_plan_of_the_design() -> None:
    rules = parse_rules(
        "customers.id = 42",
        {
            "ts_kv": "entity_id -> device.id when entity_type = 'DEVICE' "
            "| asset.id when entity_type = 'ASSET'",
            "audit_log": "customer_id",
            "crm.currency": "all",
            "crm.note": "none",
            "device": {"copy": ["profile_id"], "identity": "full"},
        },
        SCHEMA,
    )
    assert rules.root == Root(table="public.customers", column="id", value="42")
    assert rules.references == (
        Reference(
            table="public.ts_kv",
            columns=("entity_id",),
            to="public.device",
            to_columns=("id",),
            when=(("entity_type", "DEVICE"),),
        ),
        Reference(
            table="public.ts_kv",
            columns=("entity_id",),
            to="public.asset",
            to_columns=("id",),
            when=(("entity_type", "ASSET"),),
        ),
        Reference(
            table="public.audit_log", columns=("customer_id",), to="public.customers", to_columns=("id",)
        ),
    )
    assert rules.whole == ("crm.currency",)
    assert rules.left_out == ("crm.note",)
    assert rules.policies == {("public.device", ("profile_id",)): Policy.COPY}
    assert rules.full_identity == ("public.device",)


def test_a_mapping_declares_references_and_their_policies() -> None:
    rules = parse_rules(
        "public.customers.id='a''b'",
        {
            "ts_kv": {"refs": ["(a, b) -> pair(x, y)", "entity_id -> device.id"], "refer": ["(a", "b)"]},
            "device": {"own": "device_customer_fk", "refer": ["customer_id"], "forbid": ["profile_id"]},
        },
        SCHEMA,
    )
    assert rules.root.value == "a'b"
    assert rules.references[0] == Reference(
        table="public.ts_kv", columns=("a", "b"), to="public.pair", to_columns=("x", "y")
    )
    assert rules.policies == {
        ("public.ts_kv", ("a", "b")): Policy.REFER,
        ("public.device", ("customer_id",)): Policy.OWN,
        ("public.device", ("profile_id",)): Policy.FORBID,
    }
    assert rules.otherwise == {("public.device", ("customer_id",)): Policy.REFER}


def test_a_table_alone_of_its_name_needs_no_schema() -> None:
    assert parse_rules("customers.id = 1", {"note": "all"}, SCHEMA).whole == ("crm.note",)


@pytest.mark.parametrize(
    ("key", "value", "place", "said"),
    [
        ("devise", "all", "devise", "did you mean 'device'"),
        ("currency", "all", "currency", "crm.currency, old.currency"),
        ("far", "all", "far", "foreign table"),
        ("customers", "all", "customers", "every tenant"),
        ("customers", "none", "customers", "cannot be left out"),
        ("audit_log", "custmer_id", "audit_log", "did you mean 'customer_id'"),
        ("ts_kv", "entity_id -> device", "ts_kv", "expected TABLE.COLUMN"),
        ("ts_kv", "entity_id -> nothing.id", "ts_kv", "no table 'nothing'"),
        ("ts_kv", "entity_id -> device.no", "ts_kv", "no column 'no'"),
        ("ts_kv", "entity_id -> device.id when kind = 'x'", "ts_kv", "no column 'kind'"),
        ("ts_kv", "entity_id -> device.id when entity_type", "ts_kv", "COLUMN = 'VALUE'"),
        ("ts_kv", "(a, b) -> device.id", "ts_kv", "2 column(s) before '->', 1 after"),
        ("device", {"copy": ["id"]}, "device.copy", "it has: customer_id, profile_id"),
        ("asset", {"copy": ["id"]}, "asset.copy", "it has none"),
        (
            "device",
            {"copy": ["profile_id"], "refer": ["profile_id"]},
            "device",
            "one reference has one policy",
        ),
        ("device", {"cpy": ["profile_id"]}, "device.cpy", "did you mean 'copy'"),
        ("device", {"identity": "nothing"}, "device.identity", "expected 'full'"),
        ("device", {"copy": {"a": "b"}}, "device.copy", "expected a list"),
        ("device", 5, "device", "expected 'all'"),
        ("device", "", "device", "expected 'all'"),
        ("a; drop", "all", "a; drop", "no table's name"),
    ],
)
def test_every_mistake_names_its_key(key: str, value: object, place: str, said: str) -> None:
    assert said in problems("customers.id = 42", {key: value})[place]


def test_every_mistake_is_told_at_once() -> None:
    assert set(problems("customers.no = 1", {"x": "all", "device": {"y": []}})) == {"", "x", "device.y"}


def test_a_table_is_named_once() -> None:
    assert "same table" in problems("customers.id = 1", {"note": "all", "crm.note": "none"})["crm.note"]


@pytest.mark.parametrize(
    "text", ["customers", "customers.id", "customers.id =", "= 4", "a.b.c.d = 1", "a.b = 'x"]
)
def test_a_root_that_is_none(text: str) -> None:
    with pytest.raises(BadInput):
        parse_root(text)


def test_a_root_must_be_one_row() -> None:
    assert "does not tell rows apart" in problems("customers.name = x", {})[""]


def test_syntax_is_checked_without_a_schema() -> None:
    check_syntax({"anything": "a -> b.c | d.e when f = 'g|h' and i = 4", "other": {"own": ["x"]}, "z": "all"})
    with pytest.raises(BadRules) as bad:
        check_syntax({"anything": "a -> ", "other": {"owns": ["x"]}})
    assert [key for key, _ in bad.value.problems] == ["anything", "other.owns"]


def test_the_page_shows_what_is_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tenant-rows.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (step,) = yaml.safe_load(block)
    parse_root(step["root"])
    check_syntax(step["tables"])
    entries = re.findall(r"^\| `(\w+: [^`]+)` \|", page, re.MULTILINE)
    assert len(entries) > 7
    for entry in entries:
        check_syntax(yaml.safe_load(entry.replace("\\|", "|")))
