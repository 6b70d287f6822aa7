"""What a verification of a tenant's rows found."""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType

import msgspec

from fleetlift.core.tenant.schema import TableName

Key = tuple[str, ...]
"""A row's key as text, in the order of `Table.key`. Without a key: one digest of the whole row."""


class Kind(StrEnum):
    MISSING = "missing"  # the tenant's row on the source, not on the target
    FOREIGN = "foreign"  # on the target, but no row of the tenant's on the source
    DIFFERING = "differing"
    DOUBLED = "doubled"  # more often on the target than on the source
    FORBIDDEN = "forbidden"  # points at a row that does not come, by a reference that stops the move
    SURPLUS = "surplus"  # a shared row of no other tenant that nobody refers to any more; blocks nothing
    UNSETTLED = (
        "unsettled"  # changed each time it was looked at; to be checked again once writers stand still
    )


BLOCKING = frozenset({Kind.MISSING, Kind.FOREIGN, Kind.DIFFERING, Kind.DOUBLED, Kind.FORBIDDEN})


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One row that is not as it should be. `columns`: which differ (DIFFERING) or point there (FORBIDDEN).
    Values are never told."""

    kind: Kind
    table: TableName
    key: Key
    columns: tuple[str, ...] = ()


class TableCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one table as they were counted, and how many findings of each kind."""

    table: TableName
    source_rows: int = 0
    target_rows: int = 0
    chunks: int = 0
    totals: Mapping[Kind, int] = MappingProxyType({})


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """`findings` is bounded, `tables[].totals` counts all. `problems`: what concerns no single row, such as
    a table that is not on the target or a row outside of its partition's bounds.
    """

    run: int = 0
    tables: tuple[TableCheck, ...] = ()
    findings: tuple[Finding, ...] = ()
    problems: tuple[str, ...] = ()
    took_s: float = 0.0

    @property
    def rows(self) -> int:
        """The tenant's rows on the source that were compared."""
        return sum(one.source_rows for one in self.tables)

    def total(self, *kinds: Kind) -> int:
        return sum(one.totals.get(kind, 0) for one in self.tables for kind in kinds)

    @property
    def blocks(self) -> bool:
        """Whether the cutover must not be: something is wrong, or a kind of error was not looked at."""
        return bool(self.problems) or self.total(*BLOCKING) > 0

    @property
    def agrees(self) -> bool:
        """Every row was compared while it stood still, and all of them are alike."""
        return not self.blocks and self.total(Kind.UNSETTLED) == 0

    @property
    def unsettled(self) -> Mapping[TableName, tuple[Key, ...]]:
        """Keys to hand to `recheck` once writers stand still."""
        return by_table(f for f in self.findings if f.kind is Kind.UNSETTLED)


def by_table(findings: Iterable[Finding]) -> Mapping[TableName, tuple[Key, ...]]:
    """The keys of `findings`, by table, each once, in order."""
    found: dict[TableName, dict[Key, None]] = {}
    for one in findings:
        found.setdefault(one.table, {})[one.key] = None
    return {table: tuple(keys) for table, keys in found.items()}


class VerifyProgress(msgspec.Struct, frozen=True, kw_only=True):
    """`rows_total` is an estimate; `rate_rows_s` and `left_s` are of this process's own work."""

    table: TableName = ""
    rows: int = 0
    rows_total: int = 0
    findings: int = 0
    rate_rows_s: float = 0.0
    left_s: float | None = None


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """What a repair did. The source was read up to `fresh_until`: not caught up before that is applied."""

    fresh_until: int = 0
    written: int = 0
    deleted: int = 0
