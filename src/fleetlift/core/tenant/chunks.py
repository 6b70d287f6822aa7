"""How a tenant's rows are cut into chunks by key, and in what order they are copied.

Every comparison of keys is the source's own: two databases may sort text differently, so the target is never
asked which of two keys is the greater one. Chunks of a table cover the whole range of keys, the first and the
last being open, so that a row whose key lies beyond all that were seen when it was cut is copied by whoever
reads later.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fleetlift.core.tenant.schema import Table, TableName, quoted

Key = tuple[str, ...]
"""The values of a table's key columns, as text."""

OWNED, SHARED, ALL = "owned", "shared", "all"
"""Which rows of a table a chunk brings: the tenant's own, those shared with it, or simply all that come."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """The coming rows of `table` with `lower` < key ≤ `upper`; None: open. `number` counts from 0 in a table
    and part; `rows` is what was counted when the table was cut."""

    table: TableName
    part: str = ALL
    number: int = 0
    lower: Key | None = None
    upper: Key | None = None
    rows: int = 0


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """The key of the `count`-th coming row of a table, in the order of its key."""

    key: Key
    count: int


def chunks_of(table: TableName, part: str, splits: Sequence[Split]) -> tuple[Chunk, ...]:
    """Chunks with the bounds of `splits`, the last of which is the table's last row.

    No rows: one chunk, open on both sides (it is still asked: rows may have come since it was counted).
    """
    bounds = [split.key for split in splits[:-1]]
    counts = [0, *(split.count for split in splits)] if splits else [0, 0]
    lowers: list[Key | None] = [None, *bounds]
    uppers: list[Key | None] = [*bounds, None]
    return tuple(
        Chunk(
            table=table,
            part=part,
            number=number,
            lower=lower,
            upper=upper,
            rows=counts[number + 1] - counts[number],
        )
        for number, (lower, upper) in enumerate(zip(lowers, uppers, strict=True))
    )


_SPARSE = 0.05  # of a table's rows: below it a chunk's range of keys is mostly other tenants' rows
_STEPS_MAX = 20


def steps_a_chunk(counted: int, table_rows: int) -> int:
    """How many times larger chunks are where the tenant has few of a table's rows.

    A chunk reads either its range of keys, with all other tenants' rows in it, or all of the tenant's rows
    by another index; either is repeated for every chunk, so the fewer the better.
    """
    if counted <= 0 or table_rows <= counted or counted >= _SPARSE * table_rows:
        return 1
    return min(_STEPS_MAX, max(1, round(_SPARSE * table_rows / counted)))


def thinned(splits: Sequence[Split], every: int) -> tuple[Split, ...]:
    """Every `every`-th split, and the last."""
    return (*splits[every - 1 : -1 : every], *splits[-1:])


def batches(chunks: Iterable[Chunk], rows_max: int) -> tuple[tuple[Chunk, ...], ...]:
    """Chunks that are copied in one transaction: small ones together, up to `rows_max` rows, in order."""
    done: list[tuple[Chunk, ...]] = []
    batch: list[Chunk] = []
    rows = 0
    for chunk in chunks:
        if batch and rows + chunk.rows > rows_max:
            done.append(tuple(batch))
            batch, rows = [], 0
        batch.append(chunk)
        rows += chunk.rows
    if batch:
        done.append(tuple(batch))
    return tuple(done)


def literal(value: str) -> str:
    """A string as SQL, whatever `standard_conforming_strings` says."""
    text = value.replace("'", "''")
    return f" E'{text.replace(chr(92), chr(92) * 2)}'" if "\\" in value else f"'{text}'"


def range_condition(chunk: Chunk, table: Table, alias: str) -> str:
    """SQL that is true for rows of `table` (as `alias`) between the chunk's bounds; "TRUE" when it has none.

    A comparison of whole rows, which an index over the key's columns serves.
    """
    types = {column.name: column.type for column in table.columns}
    columns = ", ".join(f"{alias}.{quoted(name)}" for name in table.key)

    def compared(sign: str, key: Key) -> str:
        values = ", ".join(
            f"{literal(value)}::{types[name]}" for name, value in zip(table.key, key, strict=True)
        )
        return f"({columns}) {sign} ({values})"

    parts = [compared(">", chunk.lower)] if chunk.lower is not None else []
    if chunk.upper is not None:
        parts.append(compared("<=", chunk.upper))
    return " AND ".join(parts) or "TRUE"


def split_query(table: Table, source: str, alias: str, condition: str, chunk_rows: int) -> str:
    """One pass over a table's coming rows: the key of every `chunk_rows`-th and of the last, with its count.

    `source` is what follows FROM. Columns: the key's, as text, then the count.
    """
    names = [f"k{n}" for n in range(len(table.key))]
    keys = ", ".join(
        f"{alias}.{quoted(column)} AS {name}" for name, column in zip(names, table.key, strict=True)
    )
    order = ", ".join(f"{alias}.{quoted(column)}" for column in table.key)
    return (
        f"SELECT {', '.join(f'{name}::text' for name in names)}, n FROM ("
        f"SELECT {keys}, row_number() OVER w AS n, lead(1) OVER w AS next "
        f"FROM {source} WHERE {condition} WINDOW w AS (ORDER BY {order})) AS numbered "
        f"WHERE n % {chunk_rows} = 0 OR next IS NULL ORDER BY n"
    )


class TableProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What of a table is on the target. `rows_total` is what was counted when it was cut."""

    rows: int = 0
    rows_total: int = 0
    bytes: int = 0
    chunks: int = 0
    chunks_total: int = 0


class CopyProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a copy is. `rows_s` and `bytes_s` are of the last seconds; `left_s` is None while unknown.

    `throttled_why` is for people: why it copies slower than it could, or "" when it does not.
    """

    phase: str = ""  # what it is at: "counting", "copying", "done"
    rows: int = 0
    rows_total: int = 0
    bytes: int = 0
    rows_s: float = 0.0
    bytes_s: float = 0.0
    left_s: float | None = None
    tables: Mapping[TableName, TableProgress] = {}
    throttled_why: str = ""
    retried: int = 0
    last_problem: str = ""


class Rate:
    """How fast something grew lately: fed with totals at moments, all of them the caller's."""

    def __init__(self, over_s: float = 10.0) -> None:
        self._over_s = over_s
        self._seen: list[tuple[float, float]] = []

    def add(self, at: float, total: float) -> None:
        self._seen.append((at, total))
        while len(self._seen) > 2 and self._seen[1][0] <= at - self._over_s:
            del self._seen[0]

    @property
    def a_second(self) -> float:
        if len(self._seen) < 2:
            return 0.0
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else 0.0


def left_s(rows: int, rows_total: int, rows_s: float) -> float | None:
    """Seconds until the rest is copied at that rate."""
    if rows >= rows_total:
        return 0.0
    return (rows_total - rows) / rows_s if rows_s > 0 else None


# -- binary or text ---------------------------------------------------------------------------------------

FIRST_OWN_OID = 16384  # PostgreSQL's FirstNormalObjectId: types below it have the same OID everywhere
_BY_OID = frozenset(
    {
        *("regproc", "regprocedure", "regoper", "regoperator", "regclass", "regtype", "regrole"),
        *("regnamespace", "regconfig", "regdictionary", "regcollation", "regdatabase"),
    }
)


class TypeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A type as the catalogue has it. `kind` is `typtype`; `inner` are the OIDs of a domain's base, a range's
    subtype, an array's element or a composite's columns."""

    oid: int
    name: str
    kind: str
    array: bool = False
    sends: bool = True  # has a binary form at all
    inner: tuple[int, ...] = ()


def travels_binary(oid: int, types: Mapping[int, TypeFacts]) -> bool:
    """Whether a column's binary form means the same in another database.

    Arrays and composites carry the OIDs of what is in them, which differ for types that users make (enums,
    domains, composites, those of extensions); `regclass` and its like are nothing but OIDs. Enums themselves
    travel by their labels.
    """
    found = types.get(oid)
    if found is None or not found.sends or found.name in _BY_OID:
        return False
    if (found.array or found.kind == "c") and any(inner >= FIRST_OWN_OID for inner in found.inner):
        return False
    return all(travels_binary(inner, types) for inner in found.inner)
