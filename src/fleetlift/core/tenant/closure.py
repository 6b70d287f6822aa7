"""Which rows of a database belong to one tenant, as rules over its tables.

Given a root row (`customers.id = 42`), the schema's foreign keys and what the plan adds, every reference
(edge) from a child table to a parent table has a policy:

- OWN: a row whose reference points at a row that the tenant owns is owned as well (followed *down*).
- COPY: a row that a coming row refers to comes along as a *shared* row (followed *up*); what refers to a
  shared row is not drawn in by it.
- REFER: the reference is carried as it is, the row it points at does not come along, and the target gets no
  foreign key for it.
- FORBID: a coming row that points at a row that does not come stops the move.

The tenant's rows are the least sets with: root ∈ OWNED; child ∈ OWNED when any of its OWN edges points into
OWNED; parent ∈ SHARED when a COPY edge of a row of OWNED ∪ SHARED ∪ WHOLE points at it and it is not OWNED;
every row of a table with `whole` comes (WHOLE). A reference with a NULL among its columns points at nothing
(MATCH SIMPLE). An OWN edge of a coming row that points at a row of that table which does not come is a leak
(it belongs to another tenant) unless the plan says what to do with it (`else_`).
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec

from fleetlift.core.tenant.schema import DatabaseSchema, TableName


class Policy(StrEnum):
    OWN = "own"
    COPY = "copy"
    REFER = "refer"
    FORBID = "forbid"


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """The tenant's own row: `column = value`, `value` as text in the column's type."""

    table: TableName
    column: str
    value: str


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """A reference that the plan declares: `columns` of `table` to `to_columns` of `to`.

    `when`: it holds only for rows with these values (as text), for polymorphic references.
    """

    table: TableName
    columns: tuple[str, ...]
    to: TableName
    to_columns: tuple[str, ...]
    when: tuple[tuple[str, str], ...] = ()


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan's `copy` step says of tables, its names resolved to `schema.table`.

    `policies` is by (child table, column names as declared, in order); it wins over the defaults. `whole`
    tables come along entirely; `left_out` tables stay, with no row and no reference followed from or to them.
    `full_identity`: tables without a key whose REPLICA IDENTITY may be set to FULL on the source meanwhile.
    `otherwise`: what to do where an OWN edge points at a row that does not come (COPY or REFER), by the same.
    """

    root: Root
    references: tuple[Reference, ...] = ()
    whole: tuple[TableName, ...] = ()
    left_out: tuple[TableName, ...] = ()
    policies: Mapping[tuple[TableName, tuple[str, ...]], Policy] = MappingProxyType({})
    full_identity: tuple[TableName, ...] = ()
    otherwise: Mapping[tuple[TableName, tuple[str, ...]], Policy] = MappingProxyType({})


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """One reference from `child` to `parent` and what to do about it. `name` is unique in a closure:
    the constraint's (`public.device.device_customer_fk`) or `public.ts_kv(entity_id) -> public.device(id)`.

    `else_` (OWN edges only): what to do when it points at a row that does not come: FORBID unless the plan
    has said COPY or REFER.
    """

    name: str
    child: TableName
    columns: tuple[str, ...]
    parent: TableName
    parent_columns: tuple[str, ...]
    policy: Policy
    else_: Policy = Policy.FORBID
    declared: bool = True  # by a foreign key; else by the plan
    when: tuple[tuple[str, str], ...] = ()
    chosen: bool = False  # the plan has named the policy; else it is the default

    @property
    def forbids(self) -> bool:
        """Whether it stops the move when it points at a row that does not come."""
        return Policy.FORBID in (self.policy, self.else_ if self.policy is Policy.OWN else None)


class Part(StrEnum):
    """How a table takes part: its rows can be OWNED, or only SHARED, or all come, or none does."""

    OWNED = "owned"
    SHARED = "shared"
    WHOLE = "whole"
    NONE = "none"


class Closure(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one tenant's rows, complete: made by `closure_of(schema, rules)`.

    `tables` has every table of the schema; `order` those that have rows to bring, each after the parents
    of its edges as far as there are no cycles. `cycles`: groups of tables whose OWN edges form a cycle (a
    table with an OWN edge to itself is a group of one).
    """

    schema: DatabaseSchema
    root: Root
    parts: Mapping[TableName, Part]
    edges: tuple[Edge, ...]
    order: tuple[TableName, ...]
    cycles: tuple[tuple[TableName, ...], ...] = ()
    full_identity: tuple[TableName, ...] = ()

    def own(self, table: TableName) -> tuple[Edge, ...]:
        """The OWN edges by which a row of `table` can be owned."""
        return tuple(e for e in self.edges if e.child == table and e.policy is Policy.OWN)

    def up(self, table: TableName) -> tuple[Edge, ...]:
        """The edges by which a coming row of `table` brings shared rows."""
        return tuple(e for e in self.edges if e.child == table and Policy.COPY in (e.policy, e.else_))

    def stops(self, table: TableName) -> tuple[Edge, ...]:
        """The edges by which a coming row of `table` must not point at a row that does not come."""
        return tuple(e for e in self.edges if e.child == table and e.forbids)

    def stopped_by(self, table: TableName) -> tuple[Edge, ...]:
        """The edges that must not point at a row of `table` that does not come."""
        return tuple(e for e in self.edges if e.parent == table and e.forbids)

    def down(self, table: TableName) -> tuple[Edge, ...]:
        """The OWN edges that point at `table`."""
        return tuple(e for e in self.edges if e.parent == table and e.policy is Policy.OWN)

    def brought_by(self, table: TableName) -> tuple[Edge, ...]:
        """The edges that can bring rows of `table` along as shared ones."""
        return tuple(e for e in self.edges if e.parent == table and Policy.COPY in (e.policy, e.else_))
