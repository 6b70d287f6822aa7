"""What the verifier asks one database: sums over chunks, bounds, and where chunks end."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Final, TypeVar

from fleetlift.core.tenant.compare import Digest, Sum
from fleetlift.core.tenant.schema import quoted
from fleetlift.core.tenant.verify_report import Key
from fleetlift.store.pool import Conn
from fleetlift.tenant.verify_rows import Shape

_T = TypeVar("_T")

BATCH: Final = 500  # rows looked at together


def batches(keys: list[Key]) -> Iterable[list[Key]]:
    return (keys[n : n + BATCH] for n in range(0, len(keys), BATCH))


def one_of(shape: Shape, keys: Iterable[Key]) -> str:
    names = ", ".join("r." + quoted(name) for name in shape.key)
    values = ", ".join(f"({shape.bound(key, plainly=False)})" for key in keys)
    return f"({names}) IN ({values})"


def between(shape: Shape, lower: Key | None, upper: Key | None, plainly: bool) -> str:
    ways = []
    for key, sign in ((lower, ">"), (upper, "<=")):
        if key is not None:
            bound = shape.bound(key, plainly=plainly)
            ways.append(f"({shape.ordered(plainly=plainly)}) {sign} ({bound})")
    return " AND ".join(ways) or "true"


def hexadecimal(digest: Digest) -> str:
    """A digest as text: what stands for a row that has no key."""
    return "".join(f"{half & (2**64 - 1):016x}" for half in digest)


async def sums(conn: Conn, shape: Shape, which: str, parts: int) -> dict[int, Sum]:
    """The rows for which `which` holds, by part; with `parts` 1 all together, which costs a third.

    Those all together are to be compared with one another only.
    """
    if parts == 1 and shape.quick:
        rows = await conn.fetch(
            f"SELECT 0, count(*), coalesce(sum({shape.quick}), 0) FROM {shape.sql} r WHERE {which}"
        )
        return {0: Sum(rows=rows[0][1], first=int(rows[0][2]))}
    part, grouped = ("p", " GROUP BY p") if parts > 1 else ("0", "")
    rows = await conn.fetch(
        f"SELECT {part}, count(*), coalesce(sum(a), 0), coalesce(sum(b), 0) "
        f"FROM {shape.hashed(which, parts)}{grouped}"
    )
    return {row[0]: Sum(rows=row[1], first=int(row[2]), second=int(row[3])) for row in rows}


async def both(one: Awaitable[_T], other: Awaitable[_T]) -> tuple[_T, _T]:
    """Both at the same time; when one fails, the other has ended before the error is raised."""
    found = await asyncio.gather(one, other, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found[0], found[1]  # type: ignore[return-value]


async def is_small(target: Conn, shape: Shape, rows: int) -> bool:
    """Whether the table is known to have fewer rows than that, without looking at any."""
    known = await target.fetchval(
        "SELECT sum(c.reltuples) FROM pg_catalog.pg_partition_tree($1::text::regclass) t "
        "JOIN pg_catalog.pg_class c ON c.oid = t.relid WHERE t.isleaf HAVING min(c.reltuples) >= 0",
        shape.name,
    )
    if not shape.partitioned:
        known = await target.fetchval(
            "SELECT reltuples FROM pg_catalog.pg_class WHERE oid = $1::text::regclass AND reltuples >= 0",
            shape.name,
        )
    return known is not None and 0 < known < 0.9 * rows


async def ascends(source: Conn, shape: Shape, lower: Key | None, upper: Key) -> bool:
    return lower is None or bool(await source.fetchval(f"SELECT {shape.ascends(lower, upper)}"))


async def nth_key(
    conn: Conn, shape: Shape, which: str, lower: Key | None, upper: Key | None, n: int, plainly: bool
) -> Key | None:
    """The `n`-th key of the rows above `lower` for which `which` holds; None when there are no more."""
    here = between(shape, lower, upper, plainly)
    row = await conn.fetchrow(
        f"SELECT {shape.keys} FROM {shape.sql} r WHERE {here} AND {which} "
        f"ORDER BY {shape.ordered(plainly=plainly)} OFFSET {n - 1} LIMIT 1"
    )
    return None if row is None else tuple(row)


async def out_of_bounds(target: Conn, shape: Shape) -> list[str]:
    """Rows in a partition that is not for them: a query for them would not look there."""
    partitions = await target.fetch(
        "SELECT t.relid::regclass::text AS name, "
        "pg_catalog.pg_get_partition_constraintdef(t.relid) AS bounds "
        "FROM pg_catalog.pg_partition_tree($1::text::regclass) t WHERE t.isleaf",
        shape.name,
    )
    found = []
    for one in partitions:
        if one["bounds"] is None:
            continue
        rows = await target.fetchval(
            f"SELECT count(*) FROM ONLY {one['name']} WHERE ({one['bounds']}) IS NOT TRUE"
        )
        if rows:
            found.append(
                f"{shape.table}: {rows} rows are in the partition {one['name']}, which is not for them"
            )
    return found
