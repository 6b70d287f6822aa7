"""One verification of all tables, written down chunk by chunk, so that it can be gone on with."""

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.compare import Digest, Sum, parts_that_differ, suspects
from fleetlift.core.tenant.schema import TableName, quoted_table
from fleetlift.core.tenant.verify_report import Finding, Key, Kind, TableCheck, VerifyProgress, VerifyReport
from fleetlift.store.pool import Conn
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.verify_ahead import KEYS_LIVE_S, PARTS, Ahead
from fleetlift.tenant.verify_bag import Bag
from fleetlift.tenant.verify_members import KeySets
from fleetlift.tenant.verify_rows import Shape, fingerprint
from fleetlift.tenant.verify_sql import (
    ascends,
    batches,
    between,
    both,
    hexadecimal,
    is_small,
    nth_key,
    out_of_bounds,
    sums,
)

if TYPE_CHECKING:
    from fleetlift.tenant.verify import Verifier

_BOOKS = f"""
CREATE SCHEMA IF NOT EXISTS {MOVE_SCHEMA};
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.checked (
    run integer NOT NULL, table_name text NOT NULL, upper text[], plainly boolean NOT NULL DEFAULT false,
    source_rows bigint NOT NULL DEFAULT 0, target_rows bigint NOT NULL DEFAULT 0,
    chunks integer NOT NULL DEFAULT 0, totals text NOT NULL DEFAULT '{{}}',
    problems text[] NOT NULL DEFAULT '{{}}', done boolean NOT NULL DEFAULT false,
    closure text NOT NULL DEFAULT '', PRIMARY KEY (run, table_name));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.found (
    run integer NOT NULL, table_name text NOT NULL, kind text NOT NULL, key text[] NOT NULL,
    columns text[] NOT NULL, PRIMARY KEY (run, table_name, kind, key));
"""


class Checked(msgspec.Struct, kw_only=True):
    """How far one table is."""

    table: TableName
    upper: Key | None = None
    plainly: bool = False
    source_rows: int = 0
    target_rows: int = 0
    chunks: int = 0
    totals: dict[Kind, int] = {}
    problems: list[str] = []
    done: bool = False


class Run:
    """One verification of all tables, written down chunk by chunk."""

    def __init__(
        self,
        verifier: "Verifier",
        progress: Callable[[VerifyProgress], None],
        probe: Callable[[str], Awaitable[None]] | None,
    ) -> None:
        self._v, self._progress, self._probe = verifier, progress, probe
        self._number = 0
        self._tables: dict[TableName, Checked] = {}
        self._began = 0.0
        self._compared = 0  # by this process
        self._total = 0
        self._listed = 0
        self._restless = False  # the last chunk differed: rather cut the next one in parts at once
        self._ahead: Ahead | None = None

    async def whole(self, resume: bool) -> VerifyReport:
        try:
            return await self._whole(resume)
        finally:
            if self._ahead is not None:
                await self._ahead.close()

    async def _whole(self, resume: bool) -> VerifyReport:
        self._began = time.monotonic()
        await self._v.open()
        source, target = await self._v.sessions()
        await self._open_books(target, resume)
        schema = self._v.closure.schema
        tables = list(dict.fromkeys([*self._v.closure.order, *schema.tables]))
        for table in tables:
            self._tables.setdefault(table, Checked(table=table))
        sizes = await self._estimate(target)
        tables.sort(key=lambda table: -sizes.get(table, 0))  # the largest first, so that lanes end together
        if self._v.lanes > 1 and self._total >= self._v.ahead_rows:
            self._ahead = Ahead(
                self._v.urls,
                self._v.members,
                list(self._to_come(tables)),
                lambda: self._restless,
                lanes=self._v.lanes,
                chunk_rows=self._v.chunk_rows,
            )
        for table in tables:
            shape = self._v.shapes.get(table)
            checked = self._tables[table]
            if shape is None or checked.done or not self._v.counts(table):
                continue
            if self._v.members.part(table) is Part.NONE:
                await self._should_be_empty(target, shape, checked)
                continue
            if shape.key:
                await self._keyed(source, target, shape, checked)
            else:
                await self._fresh_keys(source)
                await self._bag(target, shape, checked)
        return await self._end(target)

    async def _fresh_keys(self, source: Conn) -> KeySets:
        if self._v.keys is None or self._v.keys_age_s > KEYS_LIVE_S:
            return await self._v.make_keys(source)
        return self._v.keys

    def _to_come(self, tables: Iterable[TableName]) -> Iterable[tuple[Shape, Key | None]]:
        """The tables to be compared by key, and from where on."""
        for table in tables:
            shape, checked = self._v.shapes.get(table), self._tables[table]
            if shape is None or not shape.key or checked.done or checked.plainly:
                continue
            if self._v.members.part(table) is not Part.NONE and self._v.counts(table):
                yield shape, checked.upper

    # books

    async def _open_books(self, target: Conn, resume: bool) -> None:
        await target.execute(_BOOKS)
        mark = fingerprint(self._v.shapes, repr((self._v.closure.root, self._v.closure.edges)))
        row = await target.fetchrow(
            f"SELECT run, done, closure FROM {MOVE_SCHEMA}.checked WHERE table_name = '' "
            "ORDER BY run DESC LIMIT 1"
        )
        if row is not None and resume and not row["done"] and row["closure"] == mark:
            self._number = row["run"]
            for one in await target.fetch(
                f"SELECT * FROM {MOVE_SCHEMA}.checked WHERE run = $1 AND table_name <> ''", self._number
            ):
                self._tables[one["table_name"]] = Checked(
                    table=one["table_name"],
                    upper=None if one["upper"] is None else tuple(one["upper"]),
                    plainly=one["plainly"],
                    source_rows=one["source_rows"],
                    target_rows=one["target_rows"],
                    chunks=one["chunks"],
                    totals={Kind(kind): n for kind, n in json.loads(one["totals"]).items()},
                    problems=list(one["problems"]),
                    done=one["done"],
                )
            self._listed = await target.fetchval(
                f"SELECT count(*) FROM {MOVE_SCHEMA}.found WHERE run = $1", self._number
            )
            return
        self._number = 1 if row is None else row["run"] + 1
        async with target.transaction():
            await target.execute(f"DELETE FROM {MOVE_SCHEMA}.checked")
            await target.execute(f"DELETE FROM {MOVE_SCHEMA}.found")
            await target.execute(
                f"INSERT INTO {MOVE_SCHEMA}.checked (run, table_name, closure) VALUES ($1, '', $2)",
                self._number,
                mark,
            )

    async def _write(self, target: Conn, checked: Checked, found: Sequence[Finding]) -> None:
        """Note a chunk as checked, together with what was found in it."""
        for one in found:
            checked.totals[one.kind] = checked.totals.get(one.kind, 0) + 1
        room = max(0, self._v.max_findings - self._listed)
        kept = found[:room]
        await self._step(f"{checked.table}:{checked.chunks}")
        async with target.transaction():
            if kept:
                await target.executemany(
                    f"INSERT INTO {MOVE_SCHEMA}.found VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
                    [(self._number, f.table, f.kind.value, list(f.key), list(f.columns)) for f in kept],
                )
            await target.execute(
                f"INSERT INTO {MOVE_SCHEMA}.checked VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) "
                "ON CONFLICT (run, table_name) DO UPDATE SET upper = excluded.upper, "
                "plainly = excluded.plainly, source_rows = excluded.source_rows, "
                "target_rows = excluded.target_rows, chunks = excluded.chunks, totals = excluded.totals, "
                "problems = excluded.problems, done = excluded.done",
                self._number,
                checked.table,
                checked.upper,
                checked.plainly,
                checked.source_rows,
                checked.target_rows,
                checked.chunks,
                json.dumps(checked.totals),
                checked.problems,
                checked.done,
            )
        self._listed += len(kept)
        self._tell(checked)

    async def _end(self, target: Conn) -> VerifyReport:
        await self._step("end")
        problems = [p for one in self._tables.values() for p in one.problems]
        if self._v.back:
            # The schemas may have gone their own ways since; what is carried back are rows.
            lost = [table for table in self._tables if self._v.counts(table) and table not in self._v.shapes]
            problems += [p for p in self._v.shape_problems if p.partition(":")[0] in lost]
        else:
            problems += [*self._v.shape_problems, *await self._strange_tables(target)]
        found = [
            Finding(
                kind=Kind(row["kind"]),
                table=row["table_name"],
                key=tuple(row["key"]),
                columns=tuple(row["columns"]),
            )
            for row in await target.fetch(
                f"SELECT * FROM {MOVE_SCHEMA}.found WHERE run = $1 ORDER BY table_name, kind, key",
                self._number,
            )
        ]
        await target.execute(
            f"UPDATE {MOVE_SCHEMA}.checked SET done = true WHERE run = $1 AND table_name = ''", self._number
        )
        return VerifyReport(
            run=self._number,
            tables=tuple(
                TableCheck(
                    table=one.table,
                    source_rows=one.source_rows,
                    target_rows=one.target_rows,
                    chunks=one.chunks,
                    totals=dict(one.totals),
                )
                for one in self._tables.values()
            ),
            findings=tuple(found),
            problems=tuple(problems),
            took_s=time.monotonic() - self._began,
        )

    async def _step(self, name: str) -> None:
        if self._probe is not None:
            await self._probe(name)

    def _tell(self, checked: Checked) -> None:
        took_s = time.monotonic() - self._began
        rows = sum(max(one.source_rows, one.target_rows) for one in self._tables.values())
        rate = self._compared / took_s if took_s > 0 else 0.0
        self._total = max(self._total, rows)
        self._progress(
            VerifyProgress(
                table=checked.table,
                rows=rows,
                rows_total=self._total,
                findings=sum(sum(one.totals.values()) for one in self._tables.values()),
                rate_rows_s=rate,
                left_s=(self._total - rows) / rate if rate > 0 else None,
            )
        )

    async def _estimate(self, target: Conn) -> dict[TableName, int]:
        """About how many rows the target has in each table; in all, for the eyes of people."""
        rows = await target.fetch(
            "SELECT n.nspname || '.' || c.relname, greatest(c.reltuples, 0)::int8, c.relkind = 'r' "
            "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p') "
            "AND n.nspname <> ALL(ARRAY['pg_catalog', 'information_schema', $1])",
            MOVE_SCHEMA,
        )
        self._total = sum(count for _, count, leaf in rows if leaf)
        return {name: count for name, count, _ in rows}

    # tables

    async def _keyed(self, source: Conn, target: Conn, shape: Shape, checked: Checked) -> None:
        size = self._v.chunk_rows
        upper: Key | None = None
        smaller = False
        while not checked.done:
            lower = checked.upper
            look = None
            if self._ahead is not None and not smaller:
                look = await self._ahead.next(shape.table)
            if look is not None:
                assert look.lower == lower, "chunks are looked at in their order"
                upper = look.upper
            elif not smaller and (lower is not None or not await is_small(target, shape, size)):
                upper = await nth_key(target, shape, "true", lower, None, size, checked.plainly)
            elif not smaller:
                upper = None
            if (
                look is None
                and upper is not None
                and not checked.plainly
                and not await ascends(source, shape, lower, upper)
            ):
                # The source sorts such keys in another way: from the start, byte by byte.
                checked.upper, checked.plainly, smaller = None, True, False
                checked.source_rows = checked.target_rows = 0
                checked.totals = {}
                done = await target.execute(
                    f"DELETE FROM {MOVE_SCHEMA}.found WHERE run = $1 AND table_name = $2",
                    self._number,
                    shape.table,
                )
                self._listed -= int(done.rpartition(" ")[2])
                continue
            here = between(shape, lower, upper, checked.plainly)
            mine: dict[int, Sum] = {}
            theirs: dict[int, Sum] = {}
            cut = 0  # in how many parts it was looked at; 0: not yet
            if look is not None:
                cut, mine, theirs = await look.compared
            parts = parts_that_differ(mine, theirs)
            comes = "" if cut and not parts else (await self._fresh_keys(source)).comes(shape.table)
            if comes and cut != PARTS:
                for into in (PARTS,) if self._restless or cut else (1, PARTS):
                    mine, theirs = await both(
                        sums(source, shape, f"{here} AND {comes}", into), sums(target, shape, here, into)
                    )
                    if not (parts := parts_that_differ(mine, theirs)):
                        break
            self._restless = bool(parts)
            rows = sum(one.rows for one in mine.values())
            if rows > 2 * size and not smaller:
                # Far more on the source than on the target: in pieces of the source's own.
                if self._ahead is not None:
                    self._ahead.leave(shape.table)
                comes = (await self._fresh_keys(source)).comes(shape.table)
                upper = await nth_key(source, shape, comes, lower, upper, size, checked.plainly)
                smaller = True
                continue
            smaller = False
            found: list[Finding] = []
            if parts:
                found = await self._rows(source, target, shape, here, comes, parts)
            checked.source_rows += rows
            checked.target_rows += sum(one.rows for one in theirs.values())
            checked.chunks += 1
            checked.upper, checked.done = upper, upper is None
            self._compared += rows
            if checked.done and shape.partitioned:
                checked.problems = await out_of_bounds(target, shape)
            await self._write(target, checked, found)

    async def _rows(
        self, source: Conn, target: Conn, shape: Shape, here: str, comes: str, parts: Sequence[int]
    ) -> list[Finding]:
        async def listed(conn: Conn, which: str) -> list[tuple[Key, Digest]]:
            rows = await conn.fetch(f"SELECT k, a, b FROM {shape.hashed(which, PARTS, parts)}")
            return [(tuple(row[0]), (row[1], row[2])) for row in rows]

        mine, theirs = await both(listed(source, f"{here} AND {comes}"), listed(target, here))
        found: list[Finding] = []
        for batch in batches(suspects(mine, theirs)):
            found += await self._v.examine(shape, batch, listed=True)
        return found

    async def _bag(self, target: Conn, shape: Shape, checked: Checked) -> None:
        bag = Bag(self._v, shape)
        found = await bag.findings()
        checked.source_rows, checked.target_rows = bag.source_rows, bag.target_rows
        checked.chunks, checked.done = 1, True
        self._compared += bag.source_rows
        if shape.partitioned:
            checked.problems = await out_of_bounds(target, shape)
        await self._write(target, checked, found)

    async def _should_be_empty(self, target: Conn, shape: Shape, checked: Checked) -> None:
        rows = await target.fetch(
            f"SELECT k, a, b FROM {shape.hashed('true', PARTS)} LIMIT {self._v.max_findings}"
        )
        found = [
            Finding(
                kind=Kind.FOREIGN,
                table=shape.table,
                key=tuple(row[0]) if shape.key else (hexadecimal((row[1], row[2])),),
            )
            for row in rows
        ]
        if found:
            checked.target_rows = await target.fetchval(f"SELECT count(*) FROM {shape.sql}")
            checked.totals[Kind.FOREIGN] = checked.target_rows - len(found)
        checked.done = True
        await self._write(target, checked, found)

    async def _strange_tables(self, target: Conn) -> list[str]:
        """Tables with rows on the target that are on no side of this move."""
        rows = await target.fetch(
            "SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname <> 'information_schema' "
            "AND n.nspname !~ '^(pg_|fleetlift_)' AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_depend d "
            "WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e') "
            "ORDER BY 1"
        )
        strange = [row[0] for row in rows if row[0] not in self._v.closure.schema.tables]
        found = []
        for name in strange:
            if await target.fetchval(f"SELECT EXISTS (SELECT 1 FROM {quoted_table(name)})"):
                found.append(f"{name}: this table is not on the source, and has rows on the target")
        return found
