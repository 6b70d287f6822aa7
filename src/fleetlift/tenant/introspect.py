"""Reads a database's tables, keys and references from PostgreSQL's catalogues, in four queries."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.schema import Column, DatabaseSchema, ForeignKey, Table
from fleetlift.store.pool import Conn

OLDEST: Final = 130000  # server_version_num
_TABLES_MAX: Final = 20_000

# Ordinary and partitioned tables that are no partitions, and foreign ones, of schemas that people made.
_OURS: Final = """
ours AS (
  SELECT c.oid, n.nspname, c.relname, c.relkind, c.relpersistence, c.relreplident, c.relhassubclass
  FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relkind IN ('r', 'p', 'f') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
    AND n.nspname NOT LIKE 'fleetlift\\_%'
)"""

_TABLES: Final = f"""
WITH {_OURS}
SELECT o.oid, o.nspname, o.relname, o.relkind, o.relpersistence, o.relreplident,
  row_security_active(o.oid) AS hides, has_table_privilege(o.oid, 'SELECT') AS readable,
  o.relkind <> 'p' AND (o.relhassubclass AND EXISTS (SELECT 1 FROM pg_inherits i WHERE i.inhparent = o.oid)
    OR EXISTS (SELECT 1 FROM pg_inherits i WHERE i.inhrelid = o.oid)) AS inherits,
  leaves.rows, leaves.bytes, leaves.identities, leaves.unlogged, leaves.foreign_ones
FROM ours o CROSS JOIN LATERAL (
  SELECT coalesce(sum(greatest(l.reltuples, 0)), 0)::bigint AS rows,
    coalesce(sum(pg_table_size(l.oid)), 0)::bigint AS bytes,
    coalesce(array_agg(DISTINCT l.relreplident::text), '{{}}') AS identities,
    coalesce(bool_or(l.relpersistence = 'u'), false) AS unlogged,
    coalesce(bool_or(l.relkind = 'f'), false) AS foreign_ones
  FROM pg_catalog.pg_class l
  WHERE o.relkind <> 'p' AND l.oid = o.oid
    OR o.relkind = 'p' AND l.relkind <> 'p' AND l.oid IN (SELECT relid FROM pg_partition_tree(o.oid))
) leaves
ORDER BY o.nspname, o.relname"""

_COLUMNS: Final = f"""
WITH {_OURS}, fills AS (
  SELECT d.refobjid AS relid, d.refobjsubid AS attnum, d.objid AS seq, 0 AS rank
  FROM pg_catalog.pg_depend d
  WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass
    AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
  UNION ALL
  SELECT a.adrelid, a.adnum, d.refobjid, 1
  FROM pg_catalog.pg_attrdef a JOIN pg_catalog.pg_depend d
    ON d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid AND d.refclassid = 'pg_class'::regclass
), sequences AS (
  SELECT DISTINCT ON (f.relid, f.attnum) f.relid, f.attnum, n.nspname || '.' || c.relname AS name
  FROM fills f JOIN pg_catalog.pg_class c ON c.oid = f.seq AND c.relkind = 'S'
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  ORDER BY f.relid, f.attnum, f.rank, f.seq
)
SELECT o.oid, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod) AS type, a.attnotnull,
  a.attgenerated::text, a.attidentity::text, coalesce(s.name, '') AS sequence
FROM ours o JOIN pg_catalog.pg_attribute a ON a.attrelid = o.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN sequences s ON s.relid = o.oid AND s.attnum = a.attnum
ORDER BY o.oid, a.attnum"""

_KEYS: Final = f"""
WITH {_OURS}
SELECT o.oid, i.indisprimary, i.indisreplident, c.relname,
  (i.indkey::int2[])[0:i.indnkeyatts - 1] AS columns
FROM ours o JOIN pg_catalog.pg_index i ON i.indrelid = o.oid
  JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
WHERE i.indisunique AND i.indisvalid AND i.indexprs IS NULL AND i.indpred IS NULL
  AND (i.indimmediate OR i.indisprimary)
ORDER BY o.oid, i.indisprimary DESC, i.indisreplident DESC, i.indnkeyatts, c.relname"""

# A foreign key of a partitioned table has a copy a partition, which has a parent (conparentid).
_FOREIGN_KEYS: Final = f"""
WITH {_OURS}
SELECT k.conrelid, k.confrelid, k.conname, k.conkey, k.confkey,
  c.relispartition AS of_partition, p.relispartition AS to_partition,
  CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid ELSE c.oid END AS child_root,
  CASE WHEN p.relispartition THEN pg_partition_root(p.oid)::oid ELSE p.oid END AS parent_root
FROM pg_catalog.pg_constraint k JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
  JOIN pg_catalog.pg_class p ON p.oid = k.confrelid
WHERE k.contype = 'f' AND k.conparentid = 0
  AND (CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid ELSE c.oid END) IN (SELECT oid FROM ours)
ORDER BY k.conrelid, k.conname, k.oid"""


async def read_schema(conn: Conn) -> DatabaseSchema:
    """Every table that people made. Types are qualified (`public.email`), whatever the search path is.

    Raises BadInput for servers before 13 and for names that hold a dot.
    """
    version = int(await conn.fetchval("SELECT current_setting('server_version_num')"))
    if version < OLDEST:
        raise BadInput(f"PostgreSQL {version // 10_000} is too old: a tenant's move needs 13 or newer")
    async with conn.transaction(isolation=None):
        path = await conn.fetchval("SELECT current_setting('search_path')")
        await conn.execute("SELECT set_config('search_path', '', true)")
        tables = await conn.fetch(_TABLES)
        columns = await conn.fetch(_COLUMNS)
        keys = await conn.fetch(_KEYS)
        foreign_keys = await conn.fetch(_FOREIGN_KEYS)
        await conn.execute("SELECT set_config('search_path', $1, true)", path)
    return _assembled(tables, columns, keys, foreign_keys, version)


Row = Mapping[str, Any]


def _assembled(
    tables: list[Any], columns: list[Any], keys: list[Any], refs: list[Any], version: int
) -> DatabaseSchema:
    if len(tables) > _TABLES_MAX:
        raise BadInput(f"the database has {len(tables)} tables; at most {_TABLES_MAX} are read")
    names: dict[int, str] = {}
    skipped: dict[str, str] = {}
    for row in tables:
        if "." in row["nspname"] or "." in row["relname"]:
            raise BadInput(
                f'"{row["nspname"]}"."{row["relname"]}": a schema or table with a dot in its name cannot be '
                "moved; rename it first"
            )
        name = f"{row['nspname']}.{row['relname']}"
        if _letter(row["relkind"]) == "f":
            skipped[name] = "a foreign table: its rows are in another database, and stay there"
        else:
            names[row["oid"]] = name
    of: dict[int, dict[int, Column]] = defaultdict(dict)
    for row in columns:
        of[row["oid"]][row["attnum"]] = Column(
            name=row["attname"],
            type=row["type"],
            not_null=row["attnotnull"],
            generated=row["attgenerated"],
            identity=row["attidentity"],
            sequence=row["sequence"],
        )
    chosen: dict[int, tuple[tuple[str, ...], bool]] = {}
    for row in keys:
        parts = [of[row["oid"]].get(number) for number in row["columns"]]
        if row["oid"] not in chosen and all(part is not None and part.not_null for part in parts):
            chosen[row["oid"]] = (tuple(part.name for part in parts if part), row["indisprimary"])
    references, odd = _references(refs, names, of)
    found = {}
    for row in tables:
        if row["oid"] not in names:
            continue
        key, primary = chosen.get(row["oid"], ((), False))
        identities = sorted(row["identities"])
        identity = "n" if "n" in identities else identities[0] if identities else _letter(row["relreplident"])
        found[names[row["oid"]]] = Table(
            name=names[row["oid"]],
            columns=tuple(of[row["oid"]].values()),
            key=key,
            primary_key=primary,
            identity=identity,
            partitioned=_letter(row["relkind"]) == "p",
            foreign_keys=tuple(references[row["oid"]]),
            rows=row["rows"],
            bytes=row["bytes"],
            problems=(*_problems(row), *odd[row["oid"]]),
        )
    return DatabaseSchema(tables=found, version=version, skipped=skipped)


def _references(
    refs: list[Any], names: Mapping[int, str], of: Mapping[int, Mapping[int, Column]]
) -> tuple[dict[int, list[ForeignKey]], dict[int, list[str]]]:
    """Foreign keys by table, and those that cannot be told as one between two whole tables."""
    found: dict[int, list[ForeignKey]] = defaultdict(list)
    odd: dict[int, list[str]] = defaultdict(list)
    for row in refs:
        child, parent = row["child_root"], row["parent_root"]
        if child not in names:
            continue
        if row["of_partition"] or row["to_partition"] or parent not in names:
            odd[child].append(
                f"foreign key {row['conname']} is of or to a single partition, or to a table of PostgreSQL's "
                "own: declare it between the partitioned tables"
            )
            continue
        found[child].append(
            ForeignKey(
                name=row["conname"],
                columns=tuple(of[child][number].name for number in row["conkey"]),
                to=names[parent],
                to_columns=tuple(of[parent][number].name for number in row["confkey"]),
            )
        )
    return found, odd


def _problems(row: Row) -> list[str]:
    said = []
    if row["unlogged"]:
        said.append("unlogged: its changes are not in the log and cannot be followed (SET LOGGED first)")
    if row["inherits"]:
        said.append("inherits from another table or is inherited from: only partitioning can be moved")
    if row["foreign_ones"]:
        said.append("one of its partitions is a foreign table")
    if not row["readable"]:
        said.append("this role may not read it (GRANT SELECT)")
    if row["hides"]:
        said.append("row security hides rows of it from this role (use one with BYPASSRLS)")
    if len(row["identities"]) > 1:
        said.append("its partitions differ in REPLICA IDENTITY: make them the same")
    return said


def _letter(value: Any) -> str:
    """A `"char"` of the catalogue, which asyncpg gives as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
