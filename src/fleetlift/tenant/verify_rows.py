"""How the verifier reads rows: the settings of its sessions, each table's columns, a canonical form of a row.

A row's canonical form is what `record_send` makes of its columns: their binary forms with their lengths, -1
for NULL. It keeps the bits of floats (−0 and 0 differ; NaN is one value), the scale of numerics, microseconds
whatever the time zone is, blanks at the end, the text of json. Types that have an OID of their own in each
database (enums, domains, those of extensions) and those whose binary form is an OID go in as text, with
settings that are the same in all sessions. It is hashed twice, with two seeds; where a server is older than
18 its hexadecimal text is, since there is no such function for bytes. Both cost less than MD5.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import asyncpg
import msgspec

from fleetlift.core.errors import Unavailable
from fleetlift.core.tenant.schema import Table, TableName, quoted, quoted_table
from fleetlift.store.pool import Conn

SESSION: Mapping[str, str] = {
    "application_name": "fleetlift verify",
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "lc_monetary": "C",
    "xmlbinary": "base64",
    "xmloption": "content",
    "search_path": "",
    "row_security": "off",  # rather an error than rows that are not seen
    "constraint_exclusion": "off",  # constraints are what is checked here
    "jit": "off",
    "max_parallel_workers_per_gather": "0",  # the source, with its key sets, can have none: it takes longest
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}

SEEDS = (8_191, 131_071)  # of the two halves of a digest
VERSION = "r.tableoid::text || '/' || r.ctid::text || '/' || r.xmin::text"
_CONNECT_S = 15
_CHEAP = {"smallint": "hashint2", "integer": "hashint4", "bigint": "hashint8", "uuid": "uuid_hash"}
_INTEGER = ("{value}", "0", "pg_catalog.hashint4extended({value}, {seed})")
_TEXT = ("{value}", "''", 'pg_catalog.hashtextextended({value} COLLATE "C", {seed})')
_BYTES = "pg_catalog.hashbyteaextended({value}, {seed})"
_CHAINED: Mapping[str, tuple[str, str, str]] = {
    # What is hashed, what stands for NULL, and how.
    "smallint": _INTEGER,
    "integer": _INTEGER,
    # This hash folds both halves into one, so the seed has to tell which.
    "bigint": ("{value}", "0", "pg_catalog.hashint8extended({value}, {seed} # {value})"),
    "boolean": ("{value}::integer", "0", _INTEGER[2]),
    # This one is the seed itself for a zero of either sign.
    "double precision": (
        "{value}",
        "0",
        "pg_catalog.hashint4extended(CASE WHEN {value} = 0 THEN "
        "pg_catalog.get_byte(pg_catalog.float8send({value}), 0) + 1 ELSE 0 END, "
        "pg_catalog.hashfloat8extended({value}, {seed}))",
    ),
    "text": _TEXT,
    "character varying": _TEXT,
    "bytea": ("{value}", "''", _BYTES),
    **{
        name: (f"pg_catalog.{send}({{value}})", "''", _BYTES)
        for name, send in {
            "timestamp with time zone": "timestamptz_send",
            "timestamp without time zone": "timestamp_send",
            "date": "date_send",
            "numeric": "numeric_send",
            "uuid": "uuid_send",
            "jsonb": "jsonb_send",
            "bpchar": "bpcharsend",
        }.items()
    },
}
_CHAINED_MAX = 30  # of a table's columns: their NULLs are the bits of one integer
_FLOATS = frozenset({"double precision", "real"})  # NaN may have other bits, as of Infinity - Infinity
_FIRST_OWN_OID = 16_384  # from here on OIDs are each database's own
_OID_LIKE = frozenset(
    {"regclass", "regcollation", "regconfig", "regdictionary", "regnamespace", "regoper", "regoperator"}
    | {"regproc", "regprocedure", "regrole", "regtype"}
)


async def connect(url: str, which: str) -> "asyncpg.Connection[Any]":
    """A session in which a value reads alike wherever it is. Raises Unavailable, without the URL."""
    try:
        return await asyncpg.connect(url, server_settings=dict(SESSION), timeout=_CONNECT_S)
    except (OSError, asyncpg.PostgresError, TimeoutError) as problem:
        raise Unavailable(f"the {which} database does not let the verifier in: {problem}") from None


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """A column. `sent`: SQL of what goes into the canonical form, for a row aliased `r`."""

    name: str
    type: str  # as SQL, with its schema
    sent: str
    plain: str  # the type below any domains, without length: "bigint", "bpchar"
    generated: bool = False
    collation: str = ""  # its own on the source, as SQL; "": the database's, or none


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """One table as both databases have it: the columns of both, in the source's order."""

    table: TableName
    key: tuple[str, ...]
    fields: tuple[Field, ...]
    partitioned: bool = False
    hashes_bytes: bool = False  # by a function that PostgreSQL has from 18 on

    @property
    def name(self) -> str:
        return quoted_table(self.table)

    @property
    def sql(self) -> str:
        """To read from: a partitioned table with its parts, any other without what inherits from it."""
        return self.name if self.partitioned else f"ONLY {self.name}"

    @property
    def canonical(self) -> str:
        """The canonical form of the row aliased `r`."""
        sent = ", ".join(field.sent for field in self.fields)
        return f"pg_catalog.record_send(ROW({sent}))"

    def _half(self, form: str, seed: int) -> str:
        if self.hashes_bytes:
            return f"pg_catalog.hashbyteaextended({form}, {seed})"
        return f"pg_catalog.hashtextextended({form}, {seed})"

    @property
    def _form(self) -> str:
        if self.hashes_bytes:
            return self.canonical
        return f"pg_catalog.encode({self.canonical}, 'hex') COLLATE \"C\""

    @property
    def keys(self) -> str:
        """The key of the row aliased `r` as texts, separated by commas."""
        return ", ".join(f"r.{quoted(name)}::text" for name in self.key)

    def ascends(self, low: Sequence[str], high: Sequence[str]) -> str:
        """Whether the source sorts the key `low` before `high`, as its index does."""
        sides = (
            ", ".join(
                f"{literal(value)}::{self.field(name).plain}{self.field(name).collation}"
                for name, value in zip(self.key, key, strict=True)
            )
            for key in (low, high)
        )
        return " < ".join(f"ROW({side})" for side in sides)

    @property
    def digests(self) -> str:
        """Both halves of the digest of the row aliased `r`: fine for a few rows, dear for many."""
        return ", ".join(self._half(self._form, seed) for seed in SEEDS)

    @property
    def hexadecimal(self) -> str:
        """The digest of the row aliased `r` as the text that stands for a row without a key."""
        halves = (self._half(self._form, seed) for seed in SEEDS)
        return " || ".join(f"pg_catalog.lpad(pg_catalog.to_hex({half}), 16, '0')" for half in halves)

    @property
    def quick(self) -> str:
        """64 bits of the row aliased `r`, for a third of what its digest costs; "" where it cannot be had.

        Each value's bytes are hashed with the hash so far as seed, and last of all which values are NULL.
        Hashes that PostgreSQL has for its indexes serve only where they read every bit, or where what they
        leave out can be told otherwise: not those of times and numerics, of which several are the same.
        """
        if not self.hashes_bytes:
            return ""
        chained = [field for field in self.fields if field.plain in _CHAINED][:_CHAINED_MAX]
        rest = ", ".join(field.sent for field in self.fields if field not in chained)
        hashed = str(SEEDS[0]) + "::bigint"
        if rest:
            hashed = self._half(f"pg_catalog.record_send(ROW({rest}))", SEEDS[0])
        nulls = []
        for n, field in enumerate(chained):
            sent, null, form = _CHAINED[field.plain]
            value = sent.format(value=field.sent)
            if field.name not in self.key:
                value = f"coalesce({value}, {null})"
                nulls.append(f"(({field.sent}) IS NULL)::integer << {n}")
            # The source's keys are not NULL. One that is on the target has no hash: then the sums differ.
            hashed = form.format(value=value, seed=hashed)
        if nulls:
            hashed = f"pg_catalog.hashint4extended({' | '.join(f'({one})' for one in nulls)}, {hashed})"
        return hashed

    @property
    def _cheap_part(self) -> str:
        """A number from the key of the row `r` that costs next to nothing and is the same on both sides;
        "" when the key's types have none."""
        found = []
        for name in self.key:
            hashed = _CHEAP.get(self.field(name).plain)
            if hashed is not None:
                found.append(f"pg_catalog.{hashed}({self.field(name).sent})")
        return " # ".join(found)

    def hashed(self, which: str, parts: int, only: Iterable[int] | None = None) -> str:
        """A subquery `h` of the rows `r` for which `which` holds: digest `a`, `b`, part `p`, key `k`, and
        `v`, which is another one after each write to the row.

        `only`: of these parts. Where the key tells the part, the other rows' digests are not computed.
        """
        key = f"ARRAY[{self.keys}]" if self.key else "NULL::text[]"
        chosen = "" if only is None else f" = ANY('{{{','.join(map(str, only))}}}'::bigint[])"
        if self._cheap_part:
            inner, outer = f"(({self._cheap_part}) & {parts - 1})::bigint", "p"
            which = f"{which} AND {inner}{chosen}" if chosen else which
            chosen = ""
        else:
            inner, outer = "NULL::bigint", f"a & {parts - 1}"
        rows = (
            f"(SELECT {self._form} AS x, {key} AS k, {inner} AS p, {VERSION} AS v "
            f"FROM {self.sql} r WHERE {which} OFFSET 0)"
        )
        halves = f"{self._half('x', SEEDS[0])} AS a, {self._half('x', SEEDS[1])} AS b"
        where = f" WHERE {outer}{chosen}" if chosen else ""
        return (
            f"(SELECT a, b, {outer} AS p, k, v FROM (SELECT k, p, v, {halves} FROM {rows} c OFFSET 0) d"
            f"{where}) h"
        )

    def field(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    def ordered(self, *, plainly: bool) -> str:
        """What rows are ordered by: the key as its index has it, or, `plainly`, its texts byte by byte."""
        if plainly:
            return ", ".join(f'r.{quoted(name)}::text COLLATE "C"' for name in self.key)
        return ", ".join(f"r.{quoted(name)}" for name in self.key)

    def bound(self, key: Sequence[str], *, plainly: bool) -> str:
        """`key` as SQL, to be compared with `ordered`."""
        if plainly:
            return ", ".join(f'{literal(value)}::text COLLATE "C"' for value in key)
        return ", ".join(
            f"{literal(value)}::{self.field(name).plain}" for name, value in zip(self.key, key, strict=True)
        )


def literal(value: str) -> str:
    """Text as an SQL literal, right whatever `standard_conforming_strings` says."""
    if "\\" in value:
        return " E'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
    return "'" + value.replace("'", "''") + "'"


_COLUMNS = """
WITH RECURSIVE t AS (
    SELECT c.oid, n.nspname || '.' || c.relname AS name, c.relkind
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND n.nspname || '.' || c.relname = ANY($1::text[])),
d AS (
    SELECT oid AS type, oid AS base FROM pg_catalog.pg_type
    UNION ALL
    SELECT d.type, b.typbasetype FROM d JOIN pg_catalog.pg_type b ON b.oid = d.base WHERE b.typtype = 'd')
SELECT t.name AS table, t.relkind = 'p' AS partitioned, a.attname AS name,
       pg_catalog.format_type(a.atttypid, a.atttypmod) AS type, a.atttypid::int8 AS type_oid,
       b.oid::int8 AS base_oid, b.typname AS base_name, b.typsend::oid <> 0 AS sends,
       pg_catalog.format_type(b.oid, -1) AS plain, a.attgenerated::text AS generated,
       (SELECT ' COLLATE ' || pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.collname)
        FROM pg_catalog.pg_collation c JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace
        WHERE c.oid = a.attcollation AND c.collname <> 'default') AS collation
FROM t JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN d ON d.type = a.atttypid JOIN pg_catalog.pg_type b ON b.oid = d.base AND b.typtype <> 'd'
ORDER BY t.name, a.attnum"""


async def shapes(
    source: Conn, target: Conn, tables: Iterable[Table]
) -> tuple[dict[TableName, Shape], list[str]]:
    """The tables as both databases have them, and what keeps rows from being compared in full."""
    known = {table.name: table for table in tables}
    here, there = await _columns(source, known), await _columns(target, known)
    found, problems = {}, []
    hashes_bytes = min(conn.get_server_version().major for conn in (source, target)) >= 18
    for name, table in known.items():
        mine, theirs = here.get(name), there.get(name)
        if mine is None:
            problems.append(f"{name}: this table is no longer on the source")
            continue
        if theirs is None:
            problems.append(f"{name}: this table is not on the target")
            continue
        fields = []
        for column, (field, how) in mine.items():
            if column not in theirs:
                problems.append(f"{name}: column {column} is not on the target")
                continue
            other, other_how = theirs[column]
            if field.type != other.type or how != other_how:
                problems.append(
                    f"{name}: column {column} is {field.type}{how} on the source and "
                    f"{other.type}{other_how} on the target"
                )
            fields.append(field)
        problems.extend(
            f"{name}: column {column} is only on the target" for column in theirs if column not in mine
        )
        if not all(part in {field.name for field in fields} for part in table.key):
            continue
        found[name] = Shape(
            table=name,
            key=table.key,
            fields=tuple(fields),
            partitioned=table.partitioned,
            hashes_bytes=hashes_bytes,
        )
    return found, problems


async def _columns(conn: Conn, tables: Iterable[TableName]) -> dict[TableName, dict[str, tuple[Field, str]]]:
    found: dict[TableName, dict[str, tuple[Field, str]]] = {}
    for row in await conn.fetch(_COLUMNS, list(tables)):
        column = "r." + quoted(row["name"])
        if row["base_oid"] >= _FIRST_OWN_OID or row["base_name"] in _OID_LIKE or not row["sends"]:
            sent = f"{column}::text"
        elif row["type_oid"] != row["base_oid"]:
            sent = f"{column}::{row['plain']}"
        else:
            sent = column
        if row["plain"] in _FLOATS:
            sent = f"CASE WHEN {sent} = 'NaN' THEN 'NaN' ELSE {sent} END"
        field = Field(
            name=row["name"],
            type=row["type"],
            sent=sent,
            plain=row["plain"],
            generated=bool(row["generated"]),
            collation=row["collation"] or "",
        )
        how = " GENERATED" if field.generated else ""
        found.setdefault(row["table"], {})[row["name"]] = (field, how)
    return found


def fingerprint(shapes_: Mapping[TableName, Shape], more: str) -> str:
    """Changes when something else would be compared, so that a verification begun before is not resumed."""
    text = repr(sorted((name, shape.key, shape.fields) for name, shape in shapes_.items())) + more
    return hashlib.sha256(text.encode()).hexdigest()[:32]
