"""pg_dump's output is taken apart into objects, and put into the order in which they are made."""

from types import MappingProxyType

import pytest

from fleetlift.core.tenant.closure import Closure, Edge, Part, Policy, Root
from fleetlift.core.tenant.dumped import (
    DumpedObject,
    ForeignKeyFacts,
    dumped_objects,
    finishing_stages,
    not_valid,
    split_always,
    why_left_out,
)
from fleetlift.core.tenant.schema import DatabaseSchema

SCRIPT = r"""--
-- PostgreSQL database dump
--

\restrict abcDEF123

SET statement_timeout = 0;

--
-- TOC entry 2718 (class 1259 OID 16419)
-- Dependencies: 228 17
-- Name: odd name; Type: TABLE; Schema: Odd Place; Owner: me
--

CREATE TABLE "Odd Place"."odd name" (
    a text DEFAULT '
--
-- Name: not a heading; Type: TABLE; Schema: x; Owner: y
--
'
);


--
-- TOC entry 3 (class 0 OID 0)
-- Name: TABLE "odd name"; Type: COMMENT; Schema: Odd Place; Owner: me
--

COMMENT ON TABLE "Odd Place"."odd name" IS 'x';


-- Completed on 2026-11-28 20:37:23 UTC

--
-- PostgreSQL database dump complete
--

\unrestrict abcDEF123

"""


def test_objects_come_with_their_names_and_nothing_else() -> None:
    """No command of psql, no settings, no trailer; what only looks like a heading is none."""
    first, second = dumped_objects(SCRIPT)
    assert (first.name, first.type, first.schema, first.oid) == ("odd name", "TABLE", "Odd Place", 16419)
    assert first.sql.endswith("'\n);") and "not a heading" in first.sql
    assert first.title == "table Odd Place.odd name"
    assert second.sql == """COMMENT ON TABLE "Odd Place"."odd name" IS 'x';"""


def made(type_: str, name: str = "x") -> DumpedObject:
    return DumpedObject(name=name, type=type_, schema="public", oid=1, sql="")


def test_keys_come_before_references_and_triggers_last() -> None:
    """Nothing acts on rows while they are still coming."""
    stages = finishing_stages(
        made(kind) for kind in ("TRIGGER", "FK CONSTRAINT", "INDEX", "RULE", "POLICY", "INDEX ATTACH")
    )
    assert [stage.name for stage in stages] == ["indexes", "attached", "other", "references", "triggers"]


def test_a_trigger_for_applied_changes_waits() -> None:
    """It has acted on the source already."""
    sql = (
        "CREATE TRIGGER t AFTER INSERT ON public.a EXECUTE FUNCTION f();\n\n"
        "ALTER TABLE public.a ENABLE ALWAYS TRIGGER t;"
    )
    now, later = split_always(sql)
    assert now == "CREATE TRIGGER t AFTER INSERT ON public.a EXECUTE FUNCTION f();"
    assert later == ("ALTER TABLE public.a ENABLE ALWAYS TRIGGER t;",)
    disabled = "CREATE TRIGGER t;\nALTER TABLE a DISABLE TRIGGER t;"
    assert split_always(disabled) == (disabled, ())


def test_a_reference_is_first_made_for_new_rows() -> None:
    """Unless it is so already."""
    assert not_valid("ALTER TABLE a ADD CONSTRAINT b FOREIGN KEY (c) REFERENCES d(e);") == (
        "ALTER TABLE a ADD CONSTRAINT b FOREIGN KEY (c) REFERENCES d(e) NOT VALID;"
    )
    said = "ALTER TABLE a ADD CONSTRAINT b FOREIGN KEY (c) REFERENCES d(e) NOT VALID;"
    assert not_valid(said) == said


def closure(policy: Policy, else_: Policy = Policy.FORBID, to: Part = Part.OWNED) -> Closure:
    edge = Edge(
        name="p.child.fk",
        child="p.child",
        columns=("a",),
        parent="p.to",
        parent_columns=("id",),
        policy=policy,
        else_=else_,
    )
    return Closure(
        schema=DatabaseSchema(),
        root=Root(table="p.root", column="id", value="1"),
        parts=MappingProxyType({"p.child": Part.OWNED, "p.to": to, "p.other": Part.NONE}),
        edges=(edge,),
        order=("p.child",),
    )


@pytest.mark.parametrize(
    ("rules", "left_out"),
    [
        (closure(Policy.OWN), False),
        (closure(Policy.COPY), False),
        (closure(Policy.REFER), True),
        (closure(Policy.OWN, Policy.REFER), True),
        (closure(Policy.FORBID, to=Part.NONE), False),
        (closure(Policy.COPY, to=Part.NONE), True),
    ],
)
def test_a_reference_that_may_dangle_gets_no_foreign_key(rules: Closure, left_out: bool) -> None:
    """Rows it points at stay behind; one that points at nothing (FORBID) is kept."""
    key = ForeignKeyFacts(name="fk", table="p.child", to="p.to")
    assert bool(why_left_out(rules, key)) is left_out


def test_references_between_tables_without_rows_are_kept() -> None:
    """And one to a table that stays, from rows that come, is not."""
    rules = closure(Policy.OWN)
    assert not why_left_out(rules, ForeignKeyFacts(name="x", table="p.other", to="p.other"))
    assert why_left_out(rules, ForeignKeyFacts(name="x", table="p.child", to="p.other"))
