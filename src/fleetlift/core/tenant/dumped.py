"""What pg_dump prints of a schema, taken apart into its objects.

`pg_dump --verbose` heads every object with a comment that names it; what stands before the first heading are
settings for the session, which we make ourselves.
"""

import re
from collections.abc import Iterable

import msgspec

from fleetlift.core.tenant.closure import Closure, Part, Policy
from fleetlift.core.tenant.schema import TableName

_HEADING = re.compile(
    r"^--\n-- TOC entry (?P<id>\d+) \(class (?P<class>\d+) OID (?P<oid>\d+)\)\n(?:-- Dependencies: [^\n]*\n)?"
    r"-- Name: (?P<name>.*?); Type: (?P<type>[A-Z ]+); Schema: (?P<schema>.*?); Owner:[^\n]*\n--\n",
    re.MULTILINE,
)
# Since its repair of CVE-2025-8714 pg_dump frames its output in commands of psql; we send no such commands.
_PSQL_COMMAND = re.compile(r"^\\(?:un)?restrict [A-Za-z0-9]*$", re.MULTILINE)
_TRAILER = re.compile(
    r"^-- Completed on [^\n]*\n|^--\n-- PostgreSQL database dump complete\n--\n", re.MULTILINE
)

FOREIGN = frozenset({"FOREIGN DATA WRAPPER", "SERVER", "USER MAPPING", "FOREIGN TABLE"})
"""They lead from the database to others, with other tenants' data: they stay."""


class DumpedObject(msgspec.Struct, frozen=True, kw_only=True):
    """One object's SQL. `name` is "table object" for what belongs to a table, `type` is pg_dump's word."""

    name: str
    type: str
    schema: str
    oid: int
    sql: str

    @property
    def title(self) -> str:
        """How people are told of it: `index public.device_asset_id_idx`."""
        where = "" if self.schema in ("-", "") else f"{self.schema}."
        return f"{self.type.lower()} {where}{self.name}"


def dumped_objects(script: str) -> tuple[DumpedObject, ...]:
    """The objects of `pg_dump --verbose`'s plain output, in its order (which respects dependencies)."""
    script = _TRAILER.sub("", _PSQL_COMMAND.sub("", script))
    found = list(_HEADING.finditer(script))
    ends = [match.start() for match in found[1:]] + [len(script)]
    return tuple(
        DumpedObject(
            name=match["name"],
            type=match["type"],
            schema=match["schema"],
            oid=int(match["oid"]),
            sql=script[match.end() : end].strip(),
        )
        for match, end in zip(found, ends, strict=True)
    )


class ForeignKeyFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A foreign key as the catalogue has it; `table` and `to` are roots where they are partitions."""

    name: str
    table: TableName
    to: TableName


def why_left_out(closure: Closure, key: ForeignKeyFacts) -> str:
    """Why the target gets no such foreign key, or "" when it does.

    A reference that is carried as it is may point at rows that do not come: a key would refuse them.
    """
    for edge in closure.edges:
        if edge.child == key.table and edge.declared and edge.name == f"{key.table}.{key.name}":
            if edge.policy is Policy.REFER or (edge.policy is Policy.OWN and edge.else_ is Policy.REFER):
                return f"rows may refer to rows of {key.to} that do not come along"
            if edge.policy is not Policy.FORBID and _stays(closure, key):
                return f"{key.to} stays on the source"
            return ""
    return f"{key.to} stays on the source" if _stays(closure, key) else ""


def _stays(closure: Closure, key: ForeignKeyFacts) -> bool:
    return (
        closure.parts.get(key.to, Part.NONE) is Part.NONE
        and closure.parts.get(key.table, Part.NONE) is not Part.NONE
    )


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """Objects that may be made side by side once all earlier stages are done."""

    name: str
    objects: tuple[DumpedObject, ...]


def finishing_stages(objects: Iterable[DumpedObject]) -> tuple[Stage, ...]:
    """The order in which what comes after the rows is made: foreign keys need unique keys, triggers and rules
    come last so that nothing acts on rows that are still being applied."""
    stages: dict[str, list[DumpedObject]] = {
        "indexes": [],
        "attached": [],
        "other": [],
        "references": [],
        "triggers": [],
    }
    for one in objects:
        match one.type:
            case "CONSTRAINT" | "INDEX" | "CHECK CONSTRAINT":
                stages["indexes"].append(one)
            case "INDEX ATTACH":
                stages["attached"].append(one)
            case "FK CONSTRAINT":
                stages["references"].append(one)
            case "TRIGGER" | "RULE" | "EVENT TRIGGER":
                stages["triggers"].append(one)
            case _:
                stages["other"].append(one)
    return tuple(Stage(name=name, objects=tuple(found)) for name, found in stages.items() if found)


_ENABLED_ALWAYS = re.compile(
    r"^ALTER (?:TABLE|EVENT TRIGGER) [^;]*ENABLE (?:ALWAYS|REPLICA)[^;]*;\s*$", re.MULTILINE
)


def split_always(sql: str) -> tuple[str, tuple[str, ...]]:
    """A trigger's or rule's SQL without what makes it act on applied changes too, and those statements.

    While changes are applied such a trigger would act a second time on what it has done on the source.
    """
    later = tuple(match.group(0).strip() for match in _ENABLED_ALWAYS.finditer(sql))
    return _ENABLED_ALWAYS.sub("", sql).strip(), later


def not_valid(sql: str) -> str:
    """`ALTER TABLE … ADD CONSTRAINT … FOREIGN KEY …;` so that rows already there are not looked at yet."""
    head, sep, tail = sql.rpartition(";")
    if not sep or "NOT VALID" in head[-12:]:
        return sql
    return f"{head} NOT VALID;{tail}"


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """An object that the target refuses. `examples` are rows that are in the way, for people."""

    name: str
    reason: str
    examples: tuple[str, ...] = ()


class SchemaProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the making of the schema is; `doing` are the objects in the works right now."""

    stage: str
    done: int
    total: int
    doing: tuple[str, ...] = ()


class SchemaReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made on the target, by title. `left_out` says of each object why, `roles` were made without
    a login, `notes` are for people. `resumed`: it was all there from an earlier run of the same move."""

    made: tuple[str, ...] = ()
    existed: tuple[str, ...] = ()
    failed: tuple[Failed, ...] = ()
    left_out: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    resumed: bool = False
