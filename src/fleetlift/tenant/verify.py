"""Is every row of the tenant on the target as it is on the source, and nothing else? Asked while both change.

Tables are compared in chunks by key, one aggregate on either side at the same time: how many rows, and the
sums of their 128-bit digests. Only where those differ are rows looked at, and only a row that differs from a
source that stands still, after all that the source had written has been applied, is a finding.

The digests are sums of hashes, not proof against someone who forges rows. For a row that was damaged by
accident to go unseen, 64 bits must agree by chance when its chunk is looked at as a whole: 2^-64 for each
damaged chunk (2^-128 where rows are compared one by one). Adding hashes up rather than hashing them in order
costs nothing, since each row's key is part of what is hashed.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.compare import (
    Digest,
    SourceRow,
    TargetRow,
    Verdict,
    judged,
    kind_of,
)
from fleetlift.core.tenant.schema import TableName
from fleetlift.core.tenant.verify_report import (
    Finding,
    Key,
    Kind,
    Repaired,
    TableCheck,
    VerifyProgress,
    VerifyReport,
)
from fleetlift.store.pool import Conn
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.verify_bag import TRIES, Bag
from fleetlift.tenant.verify_members import KeySets, Membership, by_key, owned_among
from fleetlift.tenant.verify_repair import repair
from fleetlift.tenant.verify_rows import VERSION, Shape, connect, shapes
from fleetlift.tenant.verify_run import Run
from fleetlift.tenant.verify_sql import batches
from fleetlift.tenant.verify_stops import forbidden

Settle = Callable[[int], Awaitable[None]]
"""Returns once the target has applied all that the source had written up to this LSN; raises if it cannot."""

CHUNK_ROWS: Final = 1_000_000
MAX_FINDINGS: Final = 1_000  # listed; all are counted
LANES: Final = 2  # chunks that are compared at the same time, by a session on either side for each
AHEAD_ROWS: Final = 100_000  # with fewer rows, one lane is as quick


async def stands_still(_lsn: int) -> None:
    """For a source that nobody writes to any more, and whose changes have all been applied."""


class _Side(msgspec.Struct):
    """What is read of one row on the source."""

    row: SourceRow
    listed: bool = False  # by the key sets it comes along as a shared row


class Verifier:
    """Compares `closure`'s rows of two databases; it writes only its own two tables on the target.

    Use it as an async context manager: its sessions stay open in between, so that `recheck` is quick. One
    call at a time. `writes_with`: settings with which `repair` writes (what lets it pass a fence). `move`:
    whose repairs they are, so that the way back does not carry them. `lanes`: how many chunks are compared at
    the same time where there are at least `ahead_rows` rows. `back`: the target is ahead and the source
    follows, so `settle` waits for the source; only what is carried back is compared, the tenant's own rows.
    """

    def __init__(
        self,
        source_url: str,
        target_url: str,
        closure: Closure,
        *,
        settle: Settle = stands_still,
        chunk_rows: int = CHUNK_ROWS,
        max_findings: int = MAX_FINDINGS,
        lanes: int = LANES,
        ahead_rows: int = AHEAD_ROWS,
        writes_with: Mapping[str, str] = MappingProxyType({}),
        move: str = "",
        back: bool = False,
    ) -> None:
        if chunk_rows < 1 or max_findings < 1 or not 1 <= lanes <= 16:
            raise BadInput("chunk_rows and max_findings must be at least 1, lanes 1 to 16")
        self.lanes, self.ahead_rows = lanes, ahead_rows
        self.urls = (source_url, target_url)
        self.closure, self.settle = closure, settle
        self.writes_with, self.move = dict(writes_with), move
        self.back = back
        self.chunk_rows, self.max_findings = chunk_rows, max_findings
        self._open: tuple[Any, Any, Any] | None = None  # source, target, and one more to the source
        self.shapes: dict[TableName, Shape] = {}
        self.shape_problems: list[str] = []
        self.members = Membership(closure, {})
        self.keys: KeySets | None = None
        self._keys_made = 0.0

    async def __aenter__(self) -> "Verifier":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect and read the catalogues; again, when schema or connections have changed."""
        await self.close()
        wanted = ((self.urls[0], "source"), (self.urls[1], "target"), (self.urls[0], "source"))
        tried = await asyncio.gather(*(connect(*one) for one in wanted), return_exceptions=True)
        opened = [one for one in tried if not isinstance(one, BaseException)]
        if problems := [one for one in tried if isinstance(one, BaseException)]:
            for conn in opened:
                await conn.close()
            raise problems[0]
        source, target, watcher = opened
        self._open = (source, target, watcher)
        self.shapes, self.shape_problems = await shapes(source, target, self.closure.schema.tables.values())
        self.members = Membership(self.closure, self.shapes)
        self.keys = None

    async def close(self) -> None:
        opened, self._open = self._open, None
        for conn in opened or ():
            with contextlib.suppress(Exception):
                await conn.close(timeout=5)

    async def sessions(self) -> tuple[Conn, Conn]:
        if self._open is None or any(conn.is_closed() for conn in self._open):
            await self.open()
        assert self._open is not None
        return self._open[0], self._open[1]

    def counts(self, table: TableName) -> bool:
        """Whether the rows of this table are compared."""
        return not self.back or self.members.part(table) is Part.OWNED

    # -- every row ----------------------------------------------------------------------------------------

    async def run(
        self,
        progress: Callable[[VerifyProgress], None] = lambda _: None,
        *,
        resume: bool = True,
        probe: Callable[[str], Awaitable[None]] | None = None,
    ) -> VerifyReport:
        """Compare every row. A run that was interrupted goes on where it was, chunk by chunk (`resume`).

        What was checked holds for when it was checked: rows changed since are for `recheck`. `probe` is told
        each step before it is taken, for tests that stop it there.
        """
        return await Run(self, progress, probe).whole(resume)

    # -- some rows ----------------------------------------------------------------------------------------

    async def recheck(
        self, keys: Mapping[TableName, Collection[Sequence[str]]], *, thorough: bool = True
    ) -> VerifyReport:
        """Compare the rows of these keys (as text), whether they are the tenant's, and whether what they
        refer to came along, or may stay.

        Quick while writers stand still. A table without a key is compared as a whole, whatever its keys; if
        it is not `thorough`, it counts as unsettled when it differs, and which rows do is not asked.
        """
        began = time.monotonic()
        source, target = await self.sessions()
        found: list[Finding] = []
        pointing: list[Finding] = []
        checks: dict[TableName, int] = {}
        problems: list[str] = []
        referred: dict[TableName, set[Key]] = {}
        for table, some in keys.items():
            if table not in self.shapes:
                if table not in self.closure.schema.tables:
                    raise BadInput(f"there is no table {table} in this move")
                problems += [p for p in self.shape_problems if p.startswith(f"{table}:")]
                continue
            shape = self.shapes[table]
            if not shape.key:
                if self.keys is None or self._keys_made < began:
                    await self.make_keys(source)  # older ones would not know what came since
                bag = Bag(self, shape)
                found += await bag.findings(thorough=thorough)
                pointing += [] if self.back else await forbidden(source, target, self.members, shape, ())
                checks[table] = bag.source_rows
                continue
            mine = [tuple(key) for key in dict.fromkeys(tuple(key) for key in some)]
            if bad := next((key for key in mine if len(key) != len(shape.key)), None):
                raise BadInput(f"{table}: a key has {len(shape.key)} values, this one {len(bad)}")
            for batch in batches(mine):
                found += await self.examine(shape, batch, listed=False)
                if self.back:
                    continue  # what they refer to is the source's own, or carried as such
                pointing += await forbidden(source, target, self.members, shape, batch)
                for parent, more in (await self._dangling(source, target, shape, batch)).items():
                    referred.setdefault(parent, set()).update(more)
            checks[table] = len(mine)
        for table, more in referred.items():
            fresh = sorted(more - {tuple(key) for key in keys.get(table, ())})
            for batch in batches(fresh):
                found += await self.examine(self.shapes[table], batch, listed=False)
            checks[table] = checks.get(table, 0) + len(fresh)
        wrong = {(one.table, one.key) for one in found}
        found += [one for one in dict.fromkeys(pointing) if (one.table, one.key) not in wrong]
        for one in found:
            checks.setdefault(one.table, 0)
        return VerifyReport(
            tables=tuple(
                TableCheck(table=table, source_rows=rows, target_rows=rows, totals=totals(found, table))
                for table, rows in checks.items()
            ),
            findings=tuple(found[: self.max_findings]),
            problems=tuple(problems),
            took_s=time.monotonic() - began,
        )

    async def _dangling(
        self, source: Conn, target: Conn, shape: Shape, keys: list[Key]
    ) -> dict[TableName, set[Key]]:
        """Rows that those of `keys` on the target bring along and that are not there, by their key."""
        found: dict[TableName, set[Key]] = {}
        for link in self.members.up(shape.table):
            parent = self.shapes[link.edge.parent]
            if not parent.key:
                continue
            same = f"({link.parent('p')}) = ({link.child('r')})"
            there = f"AND NOT EXISTS (SELECT 1 FROM {parent.sql} p WHERE {same})"
            head = f"{link.value('r')} AS value"
            rows = await target.fetch(*by_key(shape, shape.key, keys, head, tail=there))
            values = sorted({tuple(row[0]) for row in rows if row[0] is not None})
            if not values:
                continue
            columns = link.edge.parent_columns
            asked = by_key(parent, columns, values, f"ARRAY[{parent.keys}]", link.textual)
            for row in await source.fetch(*asked):
                found.setdefault(parent.table, set()).add(tuple(row[0]))
        return found

    # -- rows that look wrong -----------------------------------------------------------------------------

    async def make_keys(self, source: Conn) -> KeySets:
        if self.keys is None:
            self.keys = KeySets(source, self.members)
        await self.keys.make()
        self._keys_made = time.monotonic()
        return self.keys

    @property
    def keys_age_s(self) -> float:
        return float("inf") if self.keys is None else time.monotonic() - self._keys_made

    async def examine(self, shape: Shape, keys: Sequence[Key], *, listed: bool) -> list[Finding]:
        """Which of these rows are wrong, each looked at until it has stood still or `TRIES` are used up.

        `listed`: rows that come along as shared ones are taken from the source's key sets too, made anew;
        else only from what refers to them on the target.
        """
        source, target = await self.sessions()
        part = self.members.part(shape.table)
        brought_by = [] if self.back else self.members.brought_by(shape.table)
        pending = dict.fromkeys(await self._carried_back(target, shape, keys) if self.back else keys)
        suspected: dict[Key, Kind] = {}
        found: list[Finding] = []
        for attempt in range(TRIES):
            if not pending:
                break
            if listed and brought_by and attempt > 0:
                await self.make_keys(source)
            use_sets = listed and bool(brought_by) and self.keys is not None
            before = await self.source_rows(source, shape, list(pending), use_sets)
            lsn = await source.fetchval("SELECT pg_catalog.pg_current_wal_insert_lsn()")
            between: dict[Key, set[Digest | None]] = {}
            if attempt == 0:
                there = await self._target_rows(target, shape, list(pending), before, lazily=not listed)
                after = before
            else:
                async with self._watched(shape, list(pending), attempt >= 2) as between:
                    if not self.back:
                        await self.settle(lsn)
                    there = await self._target_rows(target, shape, list(pending), before, lazily=not listed)
                    if self.back:
                        await self.settle_back(target)
                after = await self.source_rows(source, shape, list(pending), use_sets)
            for key in list(pending):
                mine, theirs, later = before[key], there[key], after[key]
                brought = bool(brought_by) and (mine.listed or later.listed or theirs.needed)
                meanwhile: set[Digest | None] = set()
                if mine.row.owned or brought:
                    meanwhile = between.get(key, meanwhile)
                verdict = judged(mine.row, theirs, later.row, brought=brought, between=meanwhile)
                if verdict is Verdict.SAME:
                    del pending[key]
                    continue
                if attempt == 0 or verdict is Verdict.CHANGING:
                    suspected.pop(key, None)
                    continue
                kind = kind_of(later.row, theirs, brought=brought, part=part)
                if suspected.get(key) is not kind:
                    suspected[key] = kind
                    continue
                del pending[key]
                found.append(Finding(kind=kind, table=shape.table, key=key))
        found += [Finding(kind=Kind.UNSETTLED, table=shape.table, key=key) for key in pending]
        return await self._with_columns(source, target, shape, found)

    async def settle_back(self, target: Conn) -> None:
        """Wait until the source has what the target has now: what was read of it before is there as well."""
        await self.settle(await target.fetchval("SELECT pg_catalog.pg_current_wal_insert_lsn()"))

    async def _carried_back(self, target: Conn, shape: Shape, keys: Sequence[Key]) -> list[Key]:
        """Those of `keys` that did not come along only because they are referred to."""
        if not self.members.brought_by(shape.table):
            return list(keys)
        rows = await target.fetch(
            f"SELECT n FROM generate_subscripts($2::text[], 1) n JOIN {MOVE_SCHEMA}.shared_row h "
            "ON h.table_name = $1 AND h.key = ARRAY(SELECT unnest(($2::text[])[n:n]))",
            shape.table,
            [list(key) for key in keys],
        )
        stay = {row[0] - 1 for row in rows}
        return [key for n, key in enumerate(keys) if n not in stay]

    async def source_rows(
        self, source: Conn, shape: Shape, keys: list[Key], use_sets: bool
    ) -> dict[Key, _Side]:
        """What the source has of `keys`, and whether it is the tenant's, in one snapshot."""
        listed = self.keys.brings(shape.table) if use_sets and self.keys is not None else "false"
        head = f"q.n, {shape.digests}, {VERSION}, {listed} AS listed"
        found = {key: _Side(SourceRow()) for key in keys}
        async with source.transaction(isolation="repeatable_read"):
            rows = await source.fetch(*by_key(shape, shape.key, keys, head))
            there = [keys[row[0] - 1] for row in rows]
            owned = await owned_among(source, self.members, shape.table, there)
        for row in rows:
            key = keys[row[0] - 1]
            found[key] = _Side(
                SourceRow(digest=(row[1], row[2]), owned=key in owned, version=row[3]), bool(row[4])
            )
        return found

    async def _target_rows(
        self, target: Conn, shape: Shape, keys: list[Key], source: Mapping[Key, _Side], *, lazily: bool
    ) -> dict[Key, TargetRow]:
        digests: dict[Key, list[Digest]] = {key: [] for key in keys}
        needed: set[Key] = set()
        async with target.transaction(isolation="repeatable_read"):
            head = f"q.n, {shape.digests}"
            for row in await target.fetch(*by_key(shape, shape.key, keys, head)):
                digests[keys[row[0] - 1]].append((row[1], row[2]))
            asked = [key for key in keys if source[key].row.digest is not None and not source[key].row.owned]
            if lazily and self.members.part(shape.table) is Part.SHARED:
                # A shared row that both sides have is at most surplus, which is not asked for here.
                needed = {key for key in asked if digests[key]}
                asked = [key for key in asked if not digests[key]]
            if asked and self.members.brought_by(shape.table):
                needed |= await self._needed(target, shape, asked)
        return {
            key: TargetRow(digests=tuple(sorted(found)), needed=key in needed)
            for key, found in digests.items()
        }

    async def _needed(self, target: Conn, shape: Shape, keys: list[Key]) -> set[Key]:
        """Those of `keys` that a row on the target refers to by an edge that brings rows along."""
        found: set[Key] = set()
        for link in self.members.brought_by(shape.table):
            child = self.shapes[link.edge.child]
            if set(link.edge.parent_columns) <= set(shape.key):
                columns = [shape.key.index(name) for name in link.edge.parent_columns]
                values = [tuple(key[n] for n in columns) for key in keys]
                only = f"WHERE {link.holds('r')}true"
                asked = by_key(child, link.edge.columns, values, "DISTINCT q.n", link.textual, only)
            else:
                refers = f"{link.holds('c')}({link.child('c')}) = ({link.parent('r')})"
                tail = f"WHERE EXISTS (SELECT 1 FROM {child.sql} c WHERE {refers})"
                asked = by_key(shape, shape.key, keys, "q.n", tail=tail)
            found |= {keys[row[0] - 1] for row in await target.fetch(*asked)}
        return found

    @contextlib.asynccontextmanager
    async def _watched(
        self, shape: Shape, keys: list[Key], really: bool
    ) -> AsyncIterator[dict[Key, set[Digest | None]]]:
        """Which states the rows of `keys` go through on the source while the block runs: as many as are seen.

        For rows that never stand still long enough.
        """
        seen: dict[Key, set[Digest | None]] = {}
        if not really or self._open is None:
            yield seen
            return
        watcher, few = self._open[2], keys[:50]
        stop = asyncio.Event()

        async def watch() -> None:
            while not stop.is_set():
                there = set()
                for row in await watcher.fetch(*by_key(shape, shape.key, few, f"q.n, {shape.digests}")):
                    key = few[row[0] - 1]
                    there.add(key)
                    seen.setdefault(key, set()).add((row[1], row[2]))
                for key in few:
                    if key not in there:
                        seen.setdefault(key, set()).add(None)
                await asyncio.sleep(0)

        task = asyncio.create_task(watch())
        try:
            yield seen
        finally:
            stop.set()
            await task

    async def _with_columns(
        self, source: Conn, target: Conn, shape: Shape, found: list[Finding]
    ) -> list[Finding]:
        """The findings, with the columns that differ."""
        differing = [one.key for one in found if one.kind is Kind.DIFFERING][: self.max_findings]
        if not differing:
            return found
        fields = ", ".join(
            f"pg_catalog.md5(pg_catalog.record_send(ROW({field.sent})))" for field in shape.fields
        )
        asked = by_key(shape, shape.key, differing, f"q.n, ARRAY[{fields}]")
        mine = {differing[row[0] - 1]: row[1] for row in await source.fetch(*asked)}
        theirs = {differing[row[0] - 1]: row[1] for row in await target.fetch(*asked)}
        names = [field.name for field in shape.fields]
        return [
            msgspec.structs.replace(
                one,
                columns=tuple(
                    name for name, a, b in zip(names, mine[one.key], theirs[one.key], strict=True) if a != b
                ),
            )
            if one.key in mine and one.key in theirs and one.kind is Kind.DIFFERING
            else one
            for one in found
        ]

    # -- on demand ----------------------------------------------------------------------------------------

    async def repair(self, report: VerifyReport) -> Repaired:
        """Make the rows of `report`'s findings on the target what they are on the source now; verify again
        afterwards. See `verify_repair.repair`."""
        return await repair(self, report)


def totals(found: Iterable[Finding], table: TableName) -> Mapping[Kind, int]:
    return dict(Counter(one.kind for one in found if one.table == table))
