"""Rows onto a database: whole tables' worth of changes in a few statements, whatever their number.

Rows come as cells (see `core/tenant/pgoutput.py`), go by COPY into a temporary table of texts, and from there
with casts into their table. Everything happens in the caller's transaction.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple

import asyncpg

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import (
    COPY_HEAD,
    COPY_TAIL,
    Key,
    RowOp,
    cells_of,
    copy_lines,
    copy_row,
)
from fleetlift.core.tenant.pgoutput import NULL, Cells, text_of
from fleetlift.core.tenant.schema import Table, TableName, quoted, quoted_table
from fleetlift.store.pool import Conn

SESSION: Final[Mapping[str, str]] = {
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "timezone": "UTC",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "row_security": "off",
    "jit": "off",
    "synchronous_commit": "on",
}
"""What every session that reads or writes rows as texts sets, so that a text means the same on both sides."""

_COPY_CHUNK: Final = 256 << 10
_COPY_ROWS: Final = 500
_GIVEN_KEYS: Final = 2000  # with more, a table of them is quicker than arrays


async def connect(
    url: str, *, name: str, settings: Mapping[str, str] | None = None
) -> "asyncpg.Connection[Any]":
    """A connection whose texts are right for rows."""
    conn = await asyncpg.connect(
        url, timeout=10.0, server_settings={"application_name": f"fleetlift {name}", **SESSION}
    )
    for key, value in (settings or {}).items():
        await conn.execute("SELECT set_config($1, $2, false)", key, value)
    return conn


async def connect_applier(
    url: str, *, name: str, settings: Mapping[str, str] | None = None
) -> "asyncpg.Connection[Any]":
    """A connection that writes rows as they are: no trigger, no foreign key and no rule of the target acts.

    Its joins go by index: what is staged is small, and nothing is known of it when a statement is planned.
    """
    conn = await connect(url, name=name, settings=settings)
    try:
        await conn.execute(
            "SET session_replication_role = replica; SET enable_hashjoin = off; SET enable_mergejoin = off"
        )
    except asyncpg.InsufficientPrivilegeError as problem:
        await conn.close()
        raise Conflict(
            "the target's user may not set session_replication_role: make it a superuser, or "
            "GRANT SET ON PARAMETER session_replication_role TO it"
        ) from problem
    return conn


class Unique(NamedTuple):
    """A unique index beside the key's: `values` that no two rows for which `where` holds have in common, both
    as SQL over the table's columns."""

    name: str
    values: Sequence[str]
    where: str | None


Spare = Callable[[TableName, Unique, Sequence[tuple[Key, Key]], Collection[Key]], Awaitable[Collection[Key]]]
"""Asked of pairs of a row in the way and the row that it is in the way of, and of which rows were read anew:
those in the way that may not be touched. Raises when one of them stays in the way."""


class TableWriter:
    """The statements of one table. `key`: by which columns its rows are told; () when it has none."""

    def __init__(self, number: int, table: Table, key: Sequence[str]) -> None:
        self.table = table
        self.name: TableName = table.name
        self.sql_name = quoted_table(table.name)
        self.columns = table.copied
        self.key = tuple(key)
        self.types = {column.name: column.type for column in table.columns}
        self.stage = f"fl_row_{number}"
        self.key_stage = f"fl_key_{number}"
        self.at = {name: n for n, name in enumerate(self.columns)}
        self.key_at = tuple(self.at[name] for name in self.key)
        listed = ", ".join(quoted(name) for name in self.columns)
        values = ", ".join(f"c{n}::{self.types[name]}" for n, name in enumerate(self.columns))
        rest = [name for name in self.columns if name not in self.key]
        sets = ", ".join(f"{quoted(name)} = EXCLUDED.{quoted(name)}" for name in rest)
        insert = (
            f"INSERT INTO {self.sql_name} ({listed}) OVERRIDING SYSTEM VALUE "
            f"SELECT {values} FROM {self.stage}"
        )
        arbiter = ", ".join(quoted(name) for name in self.key)
        self.insert_sql = insert
        self.insert_absent_sql = f"{insert} ON CONFLICT ({arbiter}) DO NOTHING"
        self.upsert_sql = f"{insert} ON CONFLICT ({arbiter}) " + (
            f"DO UPDATE SET {sets}" if rest else "DO NOTHING"
        )
        keys = ", ".join(f"k{n}, k{n}::{self.types[name]} AS v{n}" for n, name in enumerate(self.key))
        self.keys_query = f"(SELECT {keys} FROM {self.key_stage} OFFSET 0)"
        self.key_matches = " AND ".join(f"t.{quoted(name)} = s.v{n}" for n, name in enumerate(self.key))
        given = ", ".join(f"k{n}" for n in range(len(self.key)))
        arrays = ", ".join(f"${n + 1}::text[]" for n in range(len(self.key)))
        self.given_key = f"ARRAY[{given}]"
        self.given_key_as_stored = (
            "ARRAY[" + ", ".join(f"(k{n}::{self.types[name]})::text" for n, name in enumerate(self.key)) + "]"
        )
        numbered = ", ".join([*(f"k{n}" for n in range(len(self.key))), "n"])
        self.given_keys = f"unnest({arrays}) WITH ORDINALITY x({numbered})"
        self.given = given
        self.given_query = f"(SELECT {keys} FROM {self.given_keys} OFFSET 0)"
        self.delete_sql, self.delete_given_sql = (
            f"DELETE FROM {self.sql_name} t USING {of} s WHERE {self.key_matches} RETURNING {given}"
            for of in (self.keys_query, self.given_query)
        )
        self.key_array = self.key_array_of("t")
        row = ", ".join(f"c{n}::{self.types[name]} AS v{n}" for n, name in enumerate(self.columns))
        self.row_query = f"(SELECT {row} FROM {self.stage} OFFSET 0)"

    def key_array_of(self, alias: str) -> str:
        """The key of a row as an array of texts."""
        return "ARRAY[" + ", ".join(f"{alias}.{quoted(name)}::text" for name in self.key) + "]::text[]"

    def standing_sql(self, of: str, condition: str) -> str:
        """Which of the keys `of` have a row `t`, each with whether the condition holds of it."""
        return (
            f"SELECT {self.given}, ({condition}) IS TRUE FROM {of} s "
            f"JOIN {self.sql_name} t ON {self.key_matches}"
        )

    def in_the_way_sql(self, unique: Unique) -> str:
        """The key of each row that the index keeps a staged row from being put in by, with the latter's."""
        values = ", ".join(f"{value} AS u{n}" for n, value in enumerate(unique.values))
        where = f" WHERE {unique.where}" if unique.where else ""
        row = ", ".join(
            f"x.c{n}::{self.types[name]} AS {quoted(name)}" for n, name in enumerate(self.columns)
        )
        theirs = ", ".join(f"{quoted(name)}::text AS k{n}" for n, name in enumerate(self.key))
        asked = ", ".join([*(f"t.k{n}" for n in range(len(self.key))), *(f"x.c{n}" for n in self.key_at)])
        same = " AND ".join(f"t.u{n} = s.u{n}" for n in range(len(unique.values)))
        return (
            f"SELECT {asked} FROM {self.stage} x "
            f"CROSS JOIN LATERAL (SELECT {values} FROM (SELECT {row}) y{where}) s "
            f"JOIN (SELECT {theirs}, {values} FROM {self.sql_name}{where}) t ON {same}"
        )

    def told(self, key: Key) -> str:
        """A key as people read it."""
        return f"({', '.join(self.key)}) = ({', '.join(key_texts(key))})"

    def update_sql(self, holes: frozenset[int]) -> str:
        """Update the rows that are there, but for the columns in `holes`; gives the keys of the others."""
        match = " AND ".join(f"t.{quoted(name)} = s.v{self.at[name]}" for name in self.key)
        sets = ", ".join(
            f"{quoted(name)} = s.v{n}"
            for n, name in enumerate(self.columns)
            if n not in holes and name not in self.key
        )
        missing = (
            f"SELECT {', '.join(f'c{n}' for n in self.key_at)} FROM {self.stage} x, LATERAL "
            f"(SELECT {', '.join(f'x.c{n}::{self.types[self.columns[n]]} AS v{n}' for n in self.key_at)}) s "
            f"WHERE NOT EXISTS (SELECT 1 FROM {self.sql_name} t WHERE {match})"
        )
        if not sets:
            return missing
        update = f"UPDATE {self.sql_name} t SET {sets} FROM {self.row_query} s WHERE {match}"
        return f"WITH done AS ({update}) {missing}"


class Writer:
    """Writes rows of many tables over one connection, inside its transaction. Lives as long as it does."""

    def __init__(self, conn: Conn, writers: Mapping[TableName, TableWriter]) -> None:
        self.conn = conn
        self.of = writers
        self._made: set[str] = set()
        self._dirty: set[str] = set()
        self.rows = 0
        self.careful = False  # rows that a unique index keeps from being put in one by one
        self.unique: Mapping[TableName, Sequence[Unique]] = {}
        self.refetch: Callable[[TableName, Sequence[Key]], Awaitable[Mapping[Key, Cells]]] | None = None
        self.spare: Spare | None = None

    def new_transaction(self) -> None:
        """Temporary tables are empty again at the end of a transaction."""
        self._dirty.clear()

    async def stage_rows(self, table: TableName, rows: Iterable[Cells]) -> None:
        w = self.of[table]
        await self._stage(w.stage, "c", len(w.columns), map(copy_row, rows))

    async def stage_keys(self, table: TableName, keys: Iterable[Key]) -> None:
        w = self.of[table]
        head = len(w.key).to_bytes(2, "big")
        await self._stage(w.key_stage, "k", len(w.key), (head + b"".join(cells_of(key)) for key in keys))

    async def _stage(self, name: str, prefix: str, columns: int, rows: Iterable[bytes]) -> None:
        if name not in self._made:
            listed = ", ".join(f"{prefix}{n} text" for n in range(columns))
            await self.conn.execute(
                f"CREATE TEMP TABLE IF NOT EXISTS {name} ({listed}) ON COMMIT DELETE ROWS"
            )
            self._made.add(name)
        if name in self._dirty:
            await self.conn.execute(f"TRUNCATE {name}")
        self._dirty.add(name)
        await self.conn.copy_to_table(name, source=_chunks(rows), format="binary")

    async def upsert(self, table: TableName, rows: Sequence[Cells], new: Sequence[Cells] = ()) -> list[Key]:
        """Put rows in or update them. Gives the keys of rows with holes that are not there: only the source
        has their values. `new`: whole rows whose keys were free a moment ago; one whose key is taken is never
        put over what stands there. Raises what PostgreSQL says of a constraint."""
        if self.careful and self.unique.get(table):
            return await self._replace(table, rows, new) if rows or new else []
        w = self.of[table]
        whole: Sequence[Cells] = rows
        missing: list[Key] = []
        if any(None in row for row in rows):
            whole = [row for row in rows if None not in row]
            by_holes: dict[frozenset[int], list[Cells]] = {}
            for row in rows:
                if None in row:
                    by_holes.setdefault(frozenset(n for n, v in enumerate(row) if v is None), []).append(row)
            for holes, some in by_holes.items():
                await self.stage_rows(table, some)
                missing += [key_from(record) for record in await self.conn.fetch(w.update_sql(holes))]
        if whole:
            await self.stage_rows(table, whole)
            await self.conn.execute(w.upsert_sql)
        self.rows += len(rows)
        await self.copy(table, new)
        return missing

    async def _replace(self, table: TableName, rows: Sequence[Cells], new: Sequence[Cells]) -> list[Key]:
        """Put rows in when a unique index other than the key's is in the way: first take all their old
        versions
        away, so that values can be swapped between them. A row in the way that is none of them is out of date
        (what has changed it since has not come yet), or ours is: both are read anew from the source."""
        w = self.of[table]
        get = itemgetter(*w.key_at)
        free = {get(cells) for cells in new}
        held = {get(cells): cells for cells in (*rows, *new)}
        missing: list[Key] = []
        holes = [key for key, cells in held.items() if None in cells]
        if holes:
            there = await self._read(table, holes)
            for key in holes:
                old = there.get(key)
                if old is None:
                    missing.append(key)
                    del held[key]
                else:
                    held[key] = [b if a is None else a for a, b in zip(held[key], old, strict=True)]
        gone = await self.delete(table, [key for key in held if key not in free])
        self.rows -= len(gone)
        asked: set[Key] = set()
        while True:
            await self.stage_rows(table, held.values())
            stale: set[Key] = set()
            for unique in self.unique[table]:
                pairs = [
                    (key_from(record[: len(w.key)]), key_from(record[len(w.key) :]))
                    for record in await self.conn.fetch(w.in_the_way_sql(unique))
                ]
                spared = await self.spare(table, unique, pairs, asked) if self.spare and pairs else ()
                stale.update(theirs for theirs, _ in pairs if theirs not in spared)
                stale.update(ours for _, ours in pairs)
            stale -= asked
            if not stale or self.refetch is None:
                break
            asked |= stale
            await self.delete(table, [key for key in stale if key not in free])
            fresh = await self.refetch(table, list(stale))
            for key in stale:
                held.pop(key, None)
                if key in fresh:
                    held[key] = fresh[key]
        await self.conn.execute(w.insert_sql)
        self.rows += len(held)
        return missing

    async def _read(self, table: TableName, keys: Sequence[Key]) -> dict[Key, Cells]:
        """The rows with these keys as they are here."""
        w = self.of[table]
        await self.stage_keys(table, keys)
        given = ", ".join(f"s.k{n}" for n in range(len(w.key)))
        listed = ", ".join(f"t.{quoted(name)}::text" for name in w.columns)
        found: dict[Key, Cells] = {}
        for record in await self.conn.fetch(
            f"SELECT {given}, {listed} FROM {w.keys_query} s JOIN {w.sql_name} t ON {w.key_matches}"
        ):
            values = tuple(record)
            found[key_from(values[: len(w.key)])] = [_cell(value) for value in values[len(w.key) :]]
        return found

    async def standing(self, table: TableName, keys: Collection[Key], condition: str) -> dict[Key, bool]:
        """Those of `keys` that have a row here, with whether the condition holds of it (aliased `t`)."""
        if not keys:
            return {}
        w = self.of[table]
        if len(keys) <= _GIVEN_KEYS:
            records = await self.conn.fetch(w.standing_sql(w.given_query, condition), *key_columns(keys))
        else:
            await self.stage_keys(table, keys)
            records = await self.conn.fetch(w.standing_sql(w.keys_query, condition))
        return {key_from(tuple(record)[:-1]): record[-1] for record in records}

    async def insert_absent(self, table: TableName, rows: Sequence[Cells]) -> None:
        """Put in the rows whose key is not there; leave the others as they are."""
        if rows:
            await self.stage_rows(table, rows)
            await self.conn.execute(self.of[table].insert_absent_sql)
            self.rows += len(rows)

    async def copy(self, table: TableName, rows: Sequence[Cells]) -> None:
        """Put in whole rows that are not there, the quickest way. UniqueViolationError: one is."""
        if rows:
            schema, _, name = table.partition(".")
            await self.conn.copy_to_table(
                name, schema_name=schema, columns=self.of[table].columns, source=_lines(rows)
            )
            self.rows += len(rows)

    async def insert(self, table: TableName, rows: Sequence[Cells]) -> None:
        """Put in rows of a table without a key."""
        if rows:
            await self.stage_rows(table, rows)
            await self.conn.execute(self.of[table].insert_sql)
            self.rows += len(rows)

    async def delete(self, table: TableName, keys: Sequence[Key]) -> list[Key]:
        """Take rows away, where they are; gives the keys of those that were."""
        if not keys:
            return []
        w = self.of[table]
        if len(keys) <= _GIVEN_KEYS:
            records = await self.conn.fetch(w.delete_given_sql, *key_columns(keys))
        else:
            await self.stage_keys(table, keys)
            records = await self.conn.fetch(w.delete_sql)
        there = [key_from(record) for record in records]
        self.rows += len(there)
        return there

    async def play(self, table: TableName, ops: Sequence[RowOp]) -> None:
        """Rows of a table without a key, in and out; each delete takes one row that is the same in every
        column. Equal rows cannot be told apart, so what counts is how many come or go."""
        w = self.of[table]
        net: Counter[tuple[bytes | None, ...]] = Counter()
        for op in ops:
            net[tuple(op.cells)] += 1 if op.insert else -1
        gone = [list(row) for row, n in net.items() for _ in range(-n)]
        if gone:
            await self.stage_rows(table, gone)
            n = range(len(w.columns))
            texts = ", ".join(f"t.{quoted(name)}::text AS v{at}" for at, name in enumerate(w.columns))
            same = " AND ".join(f"f.v{at} IS NOT DISTINCT FROM s.v{at}" for at in n)
            wanted = ", ".join(
                f"(c{at}::{w.types[name]})::text AS v{at}" for at, name in enumerate(w.columns)
            )
            listed = ", ".join(f"v{at}" for at in n)
            await self.conn.execute(
                f"WITH s AS (SELECT {listed}, count(*) AS n FROM (SELECT {wanted} FROM {w.stage}) q "
                f"GROUP BY {listed}), "
                f"f AS (SELECT f.o, f.c, s.n, row_number() OVER (PARTITION BY "
                f"{', '.join(f's.v{at}' for at in n)} "
                f"ORDER BY f.o, f.c) AS place FROM "
                f"(SELECT t.tableoid AS o, t.ctid AS c, {texts} FROM {w.sql_name} t) f JOIN s ON {same}) "
                f"DELETE FROM {w.sql_name} t USING f WHERE t.tableoid = f.o AND t.ctid = f.c AND f.place "
                "<= f.n"
            )
            self.rows += len(gone)
        await self.insert(table, [list(row) for row, n in net.items() for _ in range(n)])


def key_texts(key: Key) -> list[str]:
    """A key's values as texts."""
    return [text_of(value) or "" for value in cells_of(key)]


def key_columns(keys: Iterable[Key]) -> list[list[str]]:
    """Some keys as `TableWriter.given_keys` takes them: their values as texts, a list for each column."""
    return [list(texts) for texts in zip(*map(key_texts, keys), strict=True)]


def key_from(record: Iterable[str | None]) -> Key:
    """A key from its values as texts."""
    cells = tuple(_cell(value) for value in record)
    return cells if len(cells) > 1 else cells[0]


def _cell(value: str | None) -> bytes:
    if value is None:
        return NULL
    raw = value.encode()
    return len(raw).to_bytes(4, "big") + raw


async def _lines(rows: Sequence[Cells]) -> AsyncIterator[bytes]:
    for at in range(0, len(rows), _COPY_ROWS):
        yield copy_lines(rows[at : at + _COPY_ROWS])


async def _chunks(rows: Iterable[bytes]) -> AsyncIterator[bytes]:
    parts, size = [COPY_HEAD], 0
    for row in rows:
        parts.append(row)
        size += len(row)
        if size > _COPY_CHUNK:
            yield b"".join(parts)
            parts, size = [], 0
    parts.append(COPY_TAIL)
    yield b"".join(parts)


@contextlib.asynccontextmanager
async def any_plan(conn: Conn) -> AsyncIterator[None]:
    """For statements that go over whole tables: the planner may hash and merge."""
    await conn.execute("SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on")
    yield
    await conn.execute("SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off")
