"""What `tenant explain` finds before anything moves: which rows come, by what, and what is wrong."""

from enum import StrEnum

import msgspec

from fleetlift.core.tenant.closure import Edge, Part, Policy
from fleetlift.core.tenant.derive import columns_text, short
from fleetlift.core.tenant.schema import TableName


class Severity(StrEnum):
    """LEAK and REFUSED stop a move; MISSING and NOTE are for a person to read."""

    LEAK = "leak"  # a row of another tenant comes along, or one that comes points at it
    REFUSED = "refused"  # cannot be moved as it is
    MISSING = "missing"  # looks like the tenant's and stays
    NOTE = "note"


class Kind(StrEnum):
    """What was found; the same word in JSON for as long as it means the same."""

    NO_ROOT = "no root row"
    OTHER_TENANT = "points at another tenant"
    OTHER_ROOT = "root points at another root"
    COPIED = "copied from an owned table"
    TENANT_COLUMN = "tenant column says another tenant"
    STAYS = "points at the tenant and stays"
    TENANT_COLUMN_STAYS = "tenant column says this tenant and stays"
    DANGLING = "reference finds no row"
    CARRIED = "reference carried without its row"
    UNMOVABLE = "cannot be moved"
    FIRES = "fires on the target"
    EXTENSION = "extension needed"
    SKIPPED = "not a table of rows"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`count` rows of `table`, some of their keys in `samples`; `advice` says what to write or to do."""

    severity: Severity
    kind: Kind
    text: str
    advice: str = ""
    table: TableName = ""
    edge: str = ""
    count: int = 0
    samples: tuple[str, ...] = ()


class TableExplained(msgspec.Struct, frozen=True, kw_only=True):
    """`rows` come: `owned` and `shared` ones, or all. `bytes` is their estimated share of the table's.

    `paths` are the references that bring rows, as people read them.
    """

    table: TableName
    part: Part
    rows: int = 0
    owned: int = 0
    shared: int = 0
    total: int = 0
    total_exact: bool = True
    bytes: int = 0
    paths: tuple[str, ...] = ()


class EdgeExplained(msgspec.Struct, frozen=True, kw_only=True):
    """A reference and its policy; `otherwise` for OWN ones that point at rows which do not come."""

    edge: str
    text: str
    policy: Policy
    otherwise: Policy | None
    chosen: bool
    declared: bool


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Tables in the order of copying, then those with nothing to bring are only counted."""

    root: str
    tables: tuple[TableExplained, ...]
    edges: tuple[EdgeExplained, ...]
    findings: tuple[Finding, ...]
    tables_not_coming: tuple[TableName, ...] = ()

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def bytes(self) -> int:
        return sum(table.bytes for table in self.tables)

    @property
    def leaks(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity is Severity.LEAK)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """What stands against a move, each with what to do about it."""
        return tuple(
            f"{one.text}{f': {one.advice}' if one.advice else ''}"
            for one in self.findings
            if one.severity in (Severity.LEAK, Severity.REFUSED)
        )

    @property
    def ok(self) -> bool:
        """Nothing leaks and nothing is refused."""
        return not self.obstacles


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One row, and the reference by which the row before it is in because of this one ("" for the first)."""

    table: TableName
    key: str
    by: str = ""


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a row comes. `chain` leads from it to the root row; `reasons` say why it does not."""

    table: TableName
    key: str
    part: Part
    chain: tuple[Link, ...] = ()
    reasons: tuple[str, ...] = ()


def edge_text(edge: Edge) -> str:
    """`device.customer_id → customers`, with the condition of a polymorphic one."""
    when = " and ".join(f"{column} = '{value}'" for column, value in edge.when)
    text = f"{short(edge.child)}.{columns_text(edge.columns)} → {short(edge.parent)}"
    return f"{text} when {when}" if when else text


def own_path(edge: Edge) -> str:
    """`device ← customers by customer_id`."""
    when = " and ".join(f"{column} = '{value}'" for column, value in edge.when)
    text = f"{short(edge.child)} ← {short(edge.parent)} by {columns_text(edge.columns)}"
    return f"{text} when {when}" if when else text


def up_path(edge: Edge) -> str:
    """`country ← referred to by customers.country_id`."""
    return f"{short(edge.parent)} ← referred to by {short(edge.child)}.{columns_text(edge.columns)}"


def to_write(edge: Edge, *policies: Policy) -> str:
    """What the plan's `tables:` says to give the edge these policies: `device: {copy: [profile_id]}`."""
    said = ", ".join(f"{policy}: [{columns_text(edge.columns)}]" for policy in policies)
    return f"'{short(edge.child)}: {{{said}}}'"
