"""A PostgreSQL database's tables as a move of a tenant sees them. Read by `tenant/introspect.py`."""

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

TableName = str
"""`schema.table` without quotes, such as `public.device`."""


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """`type` is as `format_type` prints it; `generated` and `identity` are the catalogue's letters, or ""."""

    name: str
    type: str
    not_null: bool = False
    generated: str = ""  # "s": stored, "v": virtual; never copied, the target computes it
    identity: str = ""  # "a": always, "d": by default
    sequence: str = ""  # the sequence that fills it, `schema.name`; "": none


class ForeignKey(msgspec.Struct, frozen=True, kw_only=True):
    """`columns` of the table that declares it refer to `to_columns` of `to`, in the same order."""

    name: str
    columns: tuple[str, ...]
    to: TableName
    to_columns: tuple[str, ...]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table, or the root of a partitioned one (partitions are not listed).

    `key`: the columns that tell its rows apart, all NOT NULL: those of the primary key, else of the replica
    identity's index, else of a unique index over NOT NULL columns; () when there are none. `identity` is
    `relreplident`: d(efault), i(ndex), f(ull), n(othing). `rows` and `bytes` are the catalogue's estimates,
    summed over partitions; `bytes` are those of rows and TOAST, without indexes. `problems` say why its rows
    cannot be moved (it is unlogged, inherits, hides rows from this role, …); () as a rule.
    """

    name: TableName
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    primary_key: bool = True  # whether `key` is the primary key
    identity: str = "d"
    partitioned: bool = False
    foreign_keys: tuple[ForeignKey, ...] = ()
    rows: int = 0
    bytes: int = 0
    problems: tuple[str, ...] = ()

    def column(self, name: str) -> Column:
        """Raises KeyError."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the columns that travel, in the table's order: all but generated ones."""
        return tuple(column.name for column in self.columns if not column.generated)


class DatabaseSchema(msgspec.Struct, frozen=True, kw_only=True):
    """Every ordinary table of every schema that is not PostgreSQL's own (nor `fleetlift_*`).

    `skipped` are relations that hold no rows of this database to move (foreign tables), with the reason.
    """

    tables: Mapping[TableName, Table] = MappingProxyType({})
    version: int = 0  # server_version_num
    skipped: Mapping[TableName, str] = MappingProxyType({})


def quoted(name: str) -> str:
    """A column or schema as SQL: `a"b` → `"a""b"`."""
    return '"' + name.replace('"', '""') + '"'


def quoted_table(table: TableName) -> str:
    """`public.device` → `"public"."device"`. Introspection refuses schemas with a dot in their name."""
    schema, _, name = table.partition(".")
    return f"{quoted(schema)}.{quoted(name)}"
