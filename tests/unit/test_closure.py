"""What every reference of a schema means for a tenant's rows, by default and by a plan."""

from collections.abc import Mapping

import pytest

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Part, Policy, Reference, Root, Rules
from fleetlift.core.tenant.derive import closure_of, components, refusals
from fleetlift.core.tenant.schema import Column, DatabaseSchema, ForeignKey, Table

OWN, COPY, REFER, FORBID = Policy.OWN, Policy.COPY, Policy.REFER, Policy.FORBID


def schema(**tables: str) -> DatabaseSchema:
    """`device="customer_id! -> customers, asset_id -> asset"`: `!` is NOT NULL; each table has a key `id`."""
    made = {}
    for name, text in tables.items():
        columns, keys = [Column(name="id", type="bigint", not_null=True)], []
        for part in filter(None, text.split(",")):
            column, _, parent = part.strip().partition(" -> ")
            plain = column.rstrip("!")
            columns.append(Column(name=plain, type="bigint", not_null=column != plain))
            if parent:
                keys.append(
                    ForeignKey(
                        name=f"{plain}_fk", columns=(plain,), to=f"public.{parent}", to_columns=("id",)
                    )
                )
        made[f"public.{name}"] = Table(
            name=f"public.{name}", columns=tuple(columns), key=("id",), foreign_keys=tuple(keys)
        )
    return DatabaseSchema(tables=made)


ROOT = Root(table="public.customers", column="id", value="42")


def derive(tables: DatabaseSchema, **more: object) -> Closure:
    return closure_of(tables, Rules(root=ROOT, **more))  # type: ignore[arg-type]


def policies(closure: Closure) -> dict[str, Policy]:
    return {
        f"{edge.child.removeprefix('public.')}.{','.join(edge.columns)}": edge.policy
        for edge in closure.edges
    }


def parts(closure: Closure) -> dict[str, str]:
    return {name.removeprefix("public."): part.value for name, part in closure.parts.items()}


CASES: Mapping[str, tuple[DatabaseSchema, dict[str, Policy]]] = {
    "a chain down from the root is owned": (
        schema(customers="", device="customer_id! -> customers", alarm="device_id! -> device"),
        {"device.customer_id": OWN, "alarm.device_id": OWN},
    ),
    "a nullable chain is owned too": (
        schema(customers="", device="customer_id -> customers", alarm="device_id -> device"),
        {"device.customer_id": OWN, "alarm.device_id": OWN},
    ),
    "what is referred to is copied, and what that refers to": (
        schema(customers="country_id -> country", country="currency -> money", money=""),
        {"customers.country_id": COPY, "country.currency": COPY},
    ),
    "a junction row is either side's": (
        schema(
            customers="",
            device="customer_id! -> customers",
            team="customer_id! -> customers",
            team_device="team_id! -> team, device_id! -> device",
        ),
        {
            "device.customer_id": OWN,
            "team.customer_id": OWN,
            "team_device.team_id": OWN,
            "team_device.device_id": OWN,
        },
    ),
    "whose a device is, is said by its customer, not by the building it stands in": (
        schema(
            customers="",
            asset="customer_id! -> customers, parent_id -> asset",
            device="customer_id! -> customers, asset_id -> asset",
        ),
        {
            "asset.customer_id": OWN,
            "asset.parent_id": FORBID,
            "device.customer_id": OWN,
            "device.asset_id": FORBID,
        },
    ),
    "a nullable reference of a row with a sure owner does not own it": (
        schema(
            customers="",
            users="customer_id! -> customers",
            device="customer_id! -> customers",
            alarm="device_id! -> device, seen_by -> users",
        ),
        {
            "users.customer_id": OWN,
            "device.customer_id": OWN,
            "alarm.device_id": OWN,
            "alarm.seen_by": FORBID,
        },
    ),
    "a country with a home tenant does not drag in everybody who lives there": (
        schema(
            customers="country_id -> country",
            country="home_id -> customers",
            users="customer_id! -> customers, country_id! -> country",
        ),
        {
            "customers.country_id": COPY,
            "country.home_id": OWN,
            "users.customer_id": OWN,
            "users.country_id": COPY,
        },
    ),
    "profiles may be the tenant's, and may be nobody's": (
        schema(
            customers="",
            users="customer_id! -> customers",
            profile="made_by -> users, parent_id -> profile",
            device="customer_id! -> customers, profile_id! -> profile",
            setting="profile_id! -> profile",
        ),
        {
            "users.customer_id": OWN,
            "profile.made_by": OWN,
            "profile.parent_id": OWN,
            "device.customer_id": OWN,
            "device.profile_id": COPY,
            "setting.profile_id": OWN,
        },
    ),
    "the root is one row": (
        schema(
            customers="parent_id -> customers, contact_id -> users, plan_id -> plan",
            users="customer_id! -> customers",
            plan="",
        ),
        {
            "customers.parent_id": FORBID,
            "customers.contact_id": FORBID,
            "customers.plan_id": COPY,
            "users.customer_id": OWN,
        },
    ),
    "a cycle without a sure owner is owned all around": (
        schema(customers="", a="customer_id -> customers, b_id -> b", b="a_id -> a"),
        {"a.customer_id": OWN, "a.b_id": OWN, "b.a_id": OWN},
    ),
    "a claim of the root itself always owns": (
        schema(
            customers="",
            device="customer_id! -> customers",
            event="device_id! -> device, customer_id -> customers",
        ),
        {"device.customer_id": OWN, "event.device_id": OWN, "event.customer_id": OWN},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_defaults(case: str) -> None:
    tables, expected = CASES[case]
    assert policies(derive(tables)) == expected


def test_parts_and_order_of_a_small_cloud() -> None:
    closure = derive(
        schema(
            customers="country_id -> country",
            country="",
            device="customer_id! -> customers",
            alarm="device_id! -> device",
            other="",
            lists="",
        ),
        whole=("public.lists",),
    )
    assert parts(closure) == {
        "customers": "owned",
        "country": "shared",
        "device": "owned",
        "alarm": "owned",
        "other": "none",
        "lists": "whole",
    }
    order = closure.order
    assert set(order) == {t for t, part in closure.parts.items() if part is not Part.NONE}
    assert order.index("public.country") < order.index("public.customers") < order.index("public.device")
    assert order.index("public.device") < order.index("public.alarm")
    assert closure.cycles == ()


def test_cycles_are_told() -> None:
    closure = derive(
        schema(customers="", a="customer_id -> customers, b_id -> b", b="a_id -> a", c="a_id -> a, c_id -> c")
    )
    assert closure.cycles == (("public.a", "public.b"), ("public.c",))
    assert closure.order == ("public.customers", "public.a", "public.b", "public.c")


CLOUD = schema(
    customers="",
    device="customer_id! -> customers, profile_id -> profile",
    profile="",
    alarm="device_id! -> device",
    log="customer_id, device_id",
)


def test_a_plan_wins_over_the_defaults() -> None:
    closure = derive(CLOUD, policies={("public.device", ("profile_id",)): REFER})
    assert policies(closure)["device.profile_id"] is REFER
    assert parts(closure)["profile"] == "none"
    (edge,) = [edge for edge in closure.edges if edge.columns == ("profile_id",)]
    assert edge.chosen


def test_own_with_an_otherwise() -> None:
    closure = derive(
        CLOUD,
        policies={("public.alarm", ("device_id",)): OWN},
        otherwise={("public.alarm", ("device_id",)): COPY},
    )
    (edge,) = closure.own("public.alarm")
    assert edge.else_ is COPY
    assert closure.brought_by("public.device") == (edge,)
    assert closure.up("public.alarm") == (edge,)


def test_a_declared_reference_owns() -> None:
    reference = Reference(
        table="public.log", columns=("customer_id",), to="public.customers", to_columns=("id",)
    )
    closure = derive(CLOUD, references=(reference,))
    (edge,) = closure.own("public.log")
    assert (edge.name, edge.declared) == ("public.log(customer_id) -> public.customers(id)", False)


def test_a_reference_that_is_a_foreign_key_already_is_there_once() -> None:
    reference = Reference(
        table="public.device", columns=("customer_id",), to="public.customers", to_columns=("id",)
    )
    assert [e.name for e in derive(CLOUD, references=(reference,)).own("public.device")] == [
        "public.device.customer_id_fk"
    ]


def test_nothing_is_followed_through_a_table_that_is_left_out() -> None:
    closure = derive(CLOUD, left_out=("public.device",))
    assert parts(closure)["device"] == parts(closure)["alarm"] == "none"
    assert [edge.name for edge in closure.edges] == []


def test_a_reference_to_a_table_that_is_left_out_is_carried() -> None:
    closure = derive(CLOUD, left_out=("public.profile",))
    assert policies(closure)["device.profile_id"] is REFER


def test_nothing_is_owned_through_a_table_that_comes_whole() -> None:
    closure = derive(CLOUD, whole=("public.device",))
    assert parts(closure)["device"] == "whole"
    assert parts(closure)["alarm"] == "none"
    assert policies(closure) == {"device.customer_id": FORBID, "device.profile_id": COPY}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"policies": {("public.device", ("profile_id",)): OWN}}, "no reference leads from public.profile"),
        ({"policies": {("public.device", ("id",)): OWN}}, "it has customer_id, profile_id"),
        ({"policies": {("public.profile", ("id",)): OWN}}, "it has none"),
        ({"whole": ("public.customers",)}, "every tenant"),
        ({"left_out": ("public.customers",)}, "cannot be left out"),
        ({"left_out": ("public.nothing",)}, "no table public.nothing"),
        ({"whole": ("public.log",), "left_out": ("public.log",)}, "one of 'all' and 'none'"),
        (
            {"left_out": ("public.profile",), "policies": {("public.device", ("profile_id",)): COPY}},
            "refer: [profile_id]",
        ),
        (
            {"whole": ("public.device",), "policies": {("public.alarm", ("device_id",)): OWN}},
            "comes whole, so its rows say nothing",
        ),
        ({"otherwise": {("public.device", ("profile_id",)): REFER}}, "need a reference that can own"),
    ],
)
def test_what_cannot_be_names_table_and_what_to_write(rules: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput) as bad:
        derive(CLOUD, **rules)
    assert said in str(bad.value)


def test_the_root_cannot_be_owned_by_a_reference() -> None:
    with pytest.raises(BadInput, match="one row"):
        derive(
            schema(customers="parent_id -> customers"),
            policies={("public.customers", ("parent_id",)): OWN},
        )


def test_a_table_without_a_key_is_refused_until_the_plan_says_so() -> None:
    one = Table(
        name="public.tag",
        columns=(Column(name="customer_id", type="bigint"),),
        foreign_keys=(
            ForeignKey(name="fk", columns=("customer_id",), to="public.customers", to_columns=("id",)),
        ),
        problems=("unlogged",),
    )
    tables = DatabaseSchema(tables={**CLOUD.tables, one.name: one})
    said = refusals(derive(tables))
    assert "public.tag: unlogged" in said
    assert any("'tag: {identity: full}'" in text for text in said)
    assert refusals(derive(tables, full_identity=("public.tag",))) == ("public.tag: unlogged",)
    assert refusals(derive(tables, left_out=("public.tag",))) == ()


def test_the_order_of_the_schema_does_not_matter() -> None:
    backwards = DatabaseSchema(tables=dict(reversed(list(CLOUD.tables.items()))))
    one, two = derive(CLOUD), derive(backwards)
    assert (one.edges, one.order, one.cycles) == (two.edges, two.order, two.cycles)


def test_components_of_a_chain_deeper_than_pythons_stack() -> None:
    nodes = [f"t{n:05}" for n in range(5000)]
    arrows = list(zip(nodes[1:], nodes, strict=False))
    assert components(nodes, arrows) == [[node] for node in nodes]
    assert components(nodes, [*arrows, (nodes[0], nodes[-1])]) == [nodes]
