"""What of the source's schema has changed since the copy, as far as it matters to a tenant's rows."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from fleetlift.core.tenant.closure import Closure, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.schema import Column, DatabaseSchema, ForeignKey, Table
from fleetlift.core.tenant.schema_changes import schema_changes, told

RULES = Rules(root=Root(table="public.customers", column="id", value="42"), whole=("public.currency",))


def table(name: str, *columns: str, **references: str) -> Table:
    """`table("device", "customer_id", customer_id="customers")`: columns, `id` too, and references."""
    return Table(
        name=f"public.{name}",
        columns=tuple(Column(name=one, type="bigint", not_null=True) for one in ("id", *columns)),
        key=("id",),
        foreign_keys=tuple(
            ForeignKey(name=f"{column}_fk", columns=(column,), to=f"public.{to}", to_columns=("id",))
            for column, to in references.items()
        ),
    )


DEVICE = table("device", "customer_id", "region_id", customer_id="customers")
TABLES = (
    table("customers"),
    table("currency"),
    DEVICE,
    table("alarm", "device_id", device_id="device"),
    table("region"),
    table("elsewhere"),
)


def closure(*tables: Table) -> Closure:
    """Of `TABLES`, those of the same name replaced."""
    found = {one.name: one for one in (*TABLES, *tables)}
    return closure_of(DatabaseSchema(tables=found), RULES)


def without(name: str) -> Closure:
    found = {one.name: one for one in TABLES if one.name != f"public.{name}"}
    return closure_of(DatabaseSchema(tables=found), RULES)


def with_columns(change: Callable[[Column], Column | None]) -> Table:
    columns = [change(one) for one in DEVICE.columns]
    return replace(DEVICE, columns=tuple(one for one in columns if one is not None))


def test_what_does_not_concern_the_tenant_may_change() -> None:
    """Statistics, tables of others, their references to each other."""
    grown = replace(DEVICE, rows=10_000, bytes=1 << 30, identity="f")
    others = (table("elsewhere", "more"), table("new_one"), table("another", "new_id", new_id="new_one"))
    assert schema_changes(closure(), closure(grown, *others)) == ()
    assert told(()) == ""


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            closure(table("device_note", "device_id", device_id="device")),
            ["public.device_note is a new table, and its rows would stay behind"],
        ),
        (
            closure(table("elsewhere", "device_id", device_id="device")),
            ["public.elsewhere has rows of the tenant now, and its rows would stay behind"],
        ),
        (without("alarm"), ["public.alarm is gone"]),
        (
            closure(table("alarm", "device_id")),
            ["public.alarm has no rows of the tenant any more"],
        ),
        (
            closure(table("device", "customer_id", "region_id", customer_id="customers", region_id="region")),
            [
                "public.region has rows of the tenant now, and its rows would stay behind",
                "public.device(region_id) -> public.region(id) is a new reference",
            ],
        ),
        (closure(table("currency", "device_id", device_id="device")), None),
        (
            closure(replace(DEVICE, columns=(*DEVICE.columns, Column(name="vin", type="text")))),
            ["public.device has a new column vin"],
        ),
        (
            closure(with_columns(lambda one: None if one.name == "region_id" else one)),
            ["public.device has lost its column region_id"],
        ),
        (
            closure(with_columns(lambda one: replace(one, type="text") if one.name == "region_id" else one)),
            ["public.device.region_id was bigint and is text"],
        ),
        (
            closure(with_columns(lambda one: replace(one, generated="s") if one.name == "id" else one)),
            ["public.device.id is generated"],
        ),
        (closure(replace(DEVICE, key=())), ["the key of public.device was id and is none"]),
    ],
)
def test_what_concerns_the_tenant_is_told(after: Closure, said: list[str] | None) -> None:
    found = schema_changes(closure(), after)
    assert found
    if said is not None:
        assert list(found) == said


def test_a_rule_that_turns_out_otherwise_is_told() -> None:
    """A reference that a new NOT NULL makes the sure one is another rule for the same columns."""
    nullable = replace(
        table("alarm", "device_id", "user_id", device_id="device", user_id="users"),
        columns=(
            Column(name="id", type="bigint", not_null=True),
            Column(name="device_id", type="bigint"),
            Column(name="user_id", type="bigint"),
        ),
    )
    users = table("users", "customer_id", customer_id="customers")
    sure = table("alarm", "device_id", "user_id", device_id="device")
    changed = replace(
        nullable,
        columns=(sure.columns[0], sure.columns[1], nullable.columns[2]),
    )
    found = schema_changes(closure(users, nullable), closure(users, changed))
    assert found == ("public.alarm(user_id) -> public.users(id) is treated as 'forbid' and was as 'own'",)


def test_few_are_shown_and_the_rest_counted() -> None:
    text = told(tuple(f"change {n}" for n in range(8)))
    assert "change 4; and 3 more" in text
    assert "change 5" not in text
    assert "revert" in text and "resume" in text
