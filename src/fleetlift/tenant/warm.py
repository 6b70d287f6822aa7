"""Filling the target's cache before traffic comes, with what is read most on the source.

Tables and indexes are taken hottest first, by the source's own counts, until the target's cache is full. With
the extension `pg_prewarm` their blocks are loaded as they lie; without it they are read by queries, tables
piece by piece (so that the server does not pass them through its small ring buffer) and plain B-tree indexes
in their order.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

import asyncpg
import msgspec

from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.schema import quoted, quoted_table
from fleetlift.tenant.ddl import Conn, connected
from fleetlift.tenant.names import MOVE_SCHEMA

_PIECE_BLOCKS: Final = 8192  # 64 MB: how much is read between two words about it

# Reads of tables and of their indexes, partitions by themselves.
_HEAT: Final = """
SELECT schemaname || '.' || relname AS name, coalesce(heap_blks_read, 0) + coalesce(heap_blks_hit, 0) AS heat
FROM pg_statio_user_tables
UNION ALL
SELECT schemaname || '.' || indexrelname, coalesce(idx_blks_read, 0) + coalesce(idx_blks_hit, 0)
FROM pg_statio_user_indexes
"""

_RELATIONS: Final = """
SELECT c.oid, n.nspname || '.' || c.relname AS name, c.relkind::text AS kind,
    (pg_relation_size(c.oid) / current_setting('block_size')::int)::int AS blocks,
    tn.nspname || '.' || t.relname AS table,
    CASE WHEN i.indexrelid IS NOT NULL AND am.amname = 'btree' AND i.indpred IS NULL AND i.indexprs IS NULL
         THEN array(SELECT a.attname FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY k(n, place)
                    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n ORDER BY place)::text[]
    END AS columns
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_index i ON i.indexrelid = c.oid
LEFT JOIN pg_am am ON am.oid = c.relam
JOIN pg_class t ON t.oid = coalesce(i.indrelid, c.oid) JOIN pg_namespace tn ON tn.oid = t.relnamespace
WHERE c.relkind IN ('r', 'i') AND (i.indexrelid IS NULL OR i.indisvalid)
  AND coalesce(pg_partition_root(t.oid), t.oid) = ANY (
      SELECT to_regclass(name)::oid FROM unnest($1::text[]) AS names(name))
"""


class WarmReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the cache now: `blocks`, of which `brought` were not there before.

    The hit shares are those of reading all `relations`, before and afterwards: how much of what was looked
    for was found in the cache.
    """

    method: str
    relations: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    blocks: int = 0
    brought: int = 0
    bytes: int = 0
    hit_share_before: float = 0.0
    hit_share_after: float = 0.0


class WarmProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is; `checking`: all is read, and read once more to see what it has brought."""

    relation: str
    blocks: int
    blocks_total: int
    checking: bool = False


class _Relation(msgspec.Struct, frozen=True, kw_only=True):
    oid: int
    name: str
    table: str
    blocks: int
    columns: tuple[str, ...] | None  # of an index that can be read by a query
    index: bool


async def warm(
    source_url: str,
    target_url: str,
    closure: Closure,
    *,
    share_of_cache: float = 0.8,
    progress: Callable[[WarmProgress], None] | None = None,
) -> WarmReport:
    """Bring the target's hottest tables and indexes into its cache, `share_of_cache` of it at most."""
    async with (
        connected(source_url) as source,
        connected(target_url, application_name="fleetlift warm") as target,
    ):
        heat = {row["name"]: row["heat"] for row in await source.fetch(_HEAT)}
        rows = await target.fetch(_RELATIONS, [quoted_table(table) for table in closure.order])
        prewarm = await _prewarm(target)
        relations = sorted(
            (
                _Relation(
                    oid=row["oid"],
                    name=row["name"],
                    table=row["table"],
                    blocks=row["blocks"],
                    columns=tuple(row["columns"]) if row["columns"] else None,
                    index=row["kind"] == "i",
                )
                for row in rows
                if row["blocks"]
            ),
            # What nobody has read yet on the source comes last, small ones first.
            key=lambda one: (-heat.get(one.name, 0), one.blocks),
        )
        cache = await target.fetchval("SELECT setting::bigint FROM pg_settings WHERE name = 'shared_buffers'")
        chosen, left_out = _fitting(relations, int(cache * share_of_cache), readable=prewarm == "")
        block_bytes = int(await target.fetchval("SHOW block_size"))
        await target.execute("SET enable_sort = off; SET max_parallel_workers_per_gather = 0; SET jit = off")
        before = await _read(target, chosen, prewarm, progress, checking=False)
        after = await _read(target, chosen, prewarm, progress, checking=True)
        return WarmReport(
            method="pg_prewarm" if prewarm else "reading",
            relations=tuple(one.name for one in chosen),
            left_out=left_out,
            blocks=sum(one.blocks for one in chosen),
            brought=before[1],
            bytes=sum(one.blocks for one in chosen) * block_bytes,
            hit_share_before=_share(before),
            hit_share_after=_share(after),
        )


def _share(counted: tuple[int, int]) -> float:
    hits, reads = counted
    return hits / (hits + reads) if hits + reads else 0.0


def _fitting(
    relations: Sequence[_Relation], blocks_max: int, *, readable: bool
) -> tuple[list[_Relation], tuple[str, ...]]:
    """Those that fit in, in their order, and of the others why not. `readable`: by queries only."""
    chosen: list[_Relation] = []
    left_out: list[str] = []
    for one in relations:
        if readable and one.index and one.columns is None:
            left_out.append(f"{one.name}: only pg_prewarm can load an index of this kind")
        elif one.blocks > blocks_max:
            left_out.append(f"{one.name}: its {one.blocks} blocks do not fit in what is left of the cache")
        else:
            chosen.append(one)
            blocks_max -= one.blocks
    return chosen, tuple(left_out)


async def _prewarm(target: Conn) -> str:
    """The function's qualified name, or "" where the server does not have it (or does not let us)."""
    found = (
        "SELECT quote_ident(n.nspname) || '.pg_prewarm' FROM pg_proc p "
        "JOIN pg_namespace n ON n.oid = p.pronamespace WHERE p.proname = 'pg_prewarm' LIMIT 1"
    )
    name = await target.fetchval(found)
    if name is None and await target.fetchval(
        "SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'pg_prewarm')"
    ):
        try:
            # In the move's own schema: it goes away with it.
            await target.execute(
                f"CREATE SCHEMA IF NOT EXISTS {MOVE_SCHEMA}; CREATE EXTENSION pg_prewarm SCHEMA {MOVE_SCHEMA}"
            )
        except asyncpg.PostgresError:
            return ""
        name = await target.fetchval(found)
    return name or ""


async def _read(
    target: Conn,
    relations: Sequence[_Relation],
    prewarm: str,
    progress: Callable[[WarmProgress], None] | None,
    *,
    checking: bool,
) -> tuple[int, int]:
    """Blocks found in the cache and blocks brought there, by reading all of `relations`."""
    total = sum(one.blocks for one in relations)
    hits = reads = done = 0
    for one in relations:
        for statement in _statements(one, prewarm):
            if progress is not None:
                progress(WarmProgress(relation=one.name, blocks=done, blocks_total=total, checking=checking))
            plan = json.loads(
                await target.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}")
            )
            node: dict[str, Any] = plan[0]["Plan"]
            hits += node["Shared Hit Blocks"]
            reads += node["Shared Read Blocks"]
        done += one.blocks
    return hits, reads


def _statements(one: _Relation, prewarm: str) -> list[str]:
    pieces = [
        (first, min(first + _PIECE_BLOCKS, one.blocks)) for first in range(0, one.blocks, _PIECE_BLOCKS)
    ]
    if prewarm:
        return [
            f"SELECT {prewarm}({one.oid}::regclass, 'buffer', 'main', {first}, {last - 1})"
            for first, last in pieces
        ]
    table = f"ONLY {quoted_table(one.table)}"
    if one.columns is not None:
        columns = ", ".join(quoted(column) for column in one.columns)
        return [f"SELECT count(*) FROM (SELECT {columns} FROM {table} ORDER BY {columns} OFFSET 0) AS read"]
    return [
        f"SELECT count(*) FROM {table} WHERE ctid >= '({first},0)' AND ctid < '({last},0)'"
        for first, last in pieces
    ]
