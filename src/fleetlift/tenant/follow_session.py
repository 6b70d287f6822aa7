"""One session of following: what lives as long as its connections, and applies what comes.

Whole transactions of the source go to the target, in each target transaction with the position that it
reaches.
"""

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import asyncpg
import msgspec

from fleetlift.cancelling import end
from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import ROW_KINDS, Batch, Differs, Key, Layout
from fleetlift.core.tenant.pgoutput import (
    BEGIN,
    COMMIT,
    MESSAGE,
    RELATION,
    TRUNCATE,
    Cells,
    Logical,
    Relation,
    Truncate,
    decode,
)
from fleetlift.core.tenant.schema import Table, TableName, quoted_table
from fleetlift.log import get_logger
from fleetlift.tenant.apply import TableWriter, Unique, Writer, connect
from fleetlift.tenant.canary import CANARY
from fleetlift.tenant.follow_books import BOOKS, counted
from fleetlift.tenant.follow_state import Following, FollowState, Stop
from fleetlift.tenant.members import Members
from fleetlift.tenant.names import APPLIED, MOVE_SCHEMA
from fleetlift.tenant.reader import Reader, read_keys
from fleetlift.tenant.stream import Stream
from fleetlift.tenant.way_back import WayBack

log = get_logger(__name__)

_BATCH_CHANGES: Final = 8_000  # a batch of whole transactions is applied at the next commit after so many
_PIECE_CHANGES: Final = 20_000  # a transaction is applied in pieces of so many
_PIECE_BYTES: Final = 16 << 20
_BUSY_CHANGES: Final = 200  # a batch with so many waits a little for more: each commit costs
_GATHER_S: Final = 0.01
_LINGER_S: Final = 0.1


class _Load:
    """What one target transaction is to hold: whole transactions of the source, and what came with them."""

    def __init__(self) -> None:
        self.batch = Batch()
        self.pending = 0  # transactions of the source that are whole
        self.commit_lsn = 0
        self.xid = 0
        self.xids: list[int] = []
        self.canaries: list[bytes] = []
        self.pieces = False  # a transaction is being applied in pieces
        self.echo = False  # the open transaction is one that this move has applied to the source itself


class Session:
    """What lives as long as the connections: the layouts of tables, the open target transaction."""

    def __init__(
        self,
        following: Following,
        source: "asyncpg.Connection[Any]",
        target: "asyncpg.Connection[Any]",
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._f = following
        self._stack = stack
        self._source = source
        self._target = target
        self._closure = following.closure
        self._layouts: dict[bytes, Layout] = {}
        self._relations: dict[int, str] = {}
        self._types: dict[tuple[int, int], str] = {}
        self._roots: dict[str, TableName] = {}
        self._working: asyncio.Task[None] | None = None
        self._transaction: Any = None
        self._reader = Reader(source)
        self._second: Reader | None = None

    async def open(self) -> int:
        """Read the position and what tables are like; the position."""
        f = self._f
        await self._target.execute(BOOKS)
        row = await self._target.fetchrow(
            "SELECT (lsn - '0/0')::bigint AS lsn, (fresh_until - '0/0')::bigint AS fresh, spool, marked, "
            "(unsettled_until - '0/0')::bigint AS unsettled, "
            "transactions, rows, not_carried "
            f"FROM {MOVE_SCHEMA}.position WHERE slot = $1",
            f.slot,
        )
        if row is None:
            raise Conflict(f"nothing is known of {f.slot} on the target: prepare it first")
        token = f.directory / "token"
        if row["spool"]:
            if not token.exists() or token.read_text() != row["spool"]:
                raise Conflict(
                    f"the spool in {f.directory} is not there any more, and with it changes that the "
                    "source has "
                    "forgotten: the copy must start again"
                )
        else:
            # All that was spooled is on the target; a spool begins anew, and from now on it counts.
            shutil.rmtree(f.directory, ignore_errors=True)
            f.directory.mkdir(parents=True)
            name = secrets.token_hex(8)
            token.write_text(name)
            await self._target.execute(
                f"UPDATE {MOVE_SCHEMA}.position SET spool = $2 WHERE slot = $1", f.slot, name
            )
        f.applied = row["lsn"]
        f.fresh_until = max(f.fresh_until, row["fresh"])
        f.transactions, f.rows = row["transactions"], row["rows"]
        f.not_carried = counted(row["not_carried"])
        self._marked = bool(row["marked"])
        f.unsettled_until = max(f.unsettled_until, row["unsettled"])
        if await self._target.fetchval(f"SELECT to_regclass('{MOVE_SCHEMA}.copied') IS NOT NULL"):
            copied = await self._target.fetchval(
                f"SELECT max((fresh_until - '0/0')::bigint) FROM {MOVE_SCHEMA}.copied"
            )
            if copied and copied > row["lsn"] and not f.reverse:
                f.must_pass(copied)
        leaves = await self._target.fetch(
            f"SELECT relation FROM {MOVE_SCHEMA}.partition WHERE slot = $1", f.slot
        )
        f.known_leaves = {record["relation"] for record in leaves}
        writers = {}
        for number, table in enumerate(f.tables):
            writers[table.name] = TableWriter(number, table, await self._key_of(table))
        self._writer = Writer(self._target, writers)
        self._writer.refetch = self._refetch
        self._writer.unique = await self._unique()
        if f.reverse:
            committed = await connect(f.target_url, name=f"others {f.slot}")
            self._stack.push_async_callback(close_soon, committed)
            self._back = WayBack(f, self._source, self._writer, self._refetch, committed)
        else:
            self._members = Members(self._closure, self._writer, self._reader, f.touched.add)
            await self._members.start()
        await self._find_partitions()
        return int(row["lsn"])

    async def _key_of(self, table: Table) -> Sequence[str]:
        """By which columns rows are told: what the stream sends of old rows."""
        if table.identity != "i" or table.name in self._closure.full_identity:
            return table.key
        rows = await self._source.fetch(
            "SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid "
            "AND a.attnum = ANY (i.indkey) WHERE i.indrelid = $1::regclass AND i.indisreplident ORDER BY "
            "a.attnum",
            quoted_table(table.name),
        )
        names = [row["attname"] for row in rows]
        return table.key if not names or set(table.key) <= set(names) else names

    async def _unique(self) -> dict[TableName, list[Unique]]:
        """The target's unique indexes beside the keys."""
        found: dict[TableName, list[Unique]] = {}
        for table in self._f.tables:
            for row in await self._target.fetch(
                "SELECT c.relname, i.indexprs IS NULL AS plain, pg_get_expr(i.indpred, i.indrelid) AS where, "
                "ARRAY(SELECT pg_get_indexdef(i.indexrelid, n, false) "
                "FROM generate_series(1, i.indnkeyatts) n ORDER BY n) AS values, "
                "ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = i.indrelid "
                "AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])) AS columns, "
                "ARRAY(SELECT a.attname::text FROM pg_depend d JOIN pg_attribute a "
                "ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid "
                "WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid "
                "AND d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid) AS reads "
                "FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE i.indrelid = $1::regclass AND i.indisunique",
                quoted_table(table.name),
            ):
                keys = row["plain"] and set(row["columns"]) == set(self._writer.of[table.name].key)
                if not keys and {*row["columns"], *row["reads"]} <= set(table.copied):
                    unique = Unique(row["relname"], tuple(row["values"]), row["where"])
                    found.setdefault(table.name, []).append(unique)
        return found

    async def _refetch(self, table: TableName, keys: Sequence[Key]) -> Mapping[Key, Cells]:
        """Rows as the source has them now, while the other connection may be busy with reading."""
        if self._second is None:
            conn = await connect(self._f.source_url, name=f"rows {self._f.slot}")
            self._stack.push_async_callback(close_soon, conn)
            self._second = Reader(conn)
        self._second.recent |= self._reader.recent
        found = await read_keys(self._second, self._writer.of[table], keys)
        self._f.fresh_until = max(self._f.fresh_until, await self._second.close())
        return found

    async def _find_partitions(self) -> None:
        self._roots = {table.name: table.name for table in self._f.tables}
        for row in await self._source.fetch(
            "SELECT n.nspname || '.' || c.relname AS leaf, rn.nspname || '.' || r.relname AS root "
            "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_class r ON r.oid = pg_partition_root(c.oid) JOIN pg_namespace rn ON rn.oid = "
            "r.relnamespace "
            "WHERE c.relispartition AND c.relkind = 'r'"
        ):
            if row["root"] in self._roots and row["leaf"] != row["root"]:
                self._roots[row["leaf"]] = row["root"]

    # --- the log, message by message

    async def apply_all(self, stream: Stream) -> None:
        """Apply what comes, for ever."""
        f = self._f
        if not f.applying.is_set():
            waits = [asyncio.create_task(stream.failed()), asyncio.create_task(f.applying.wait())]
            try:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waits:
                    task.cancel()
            for task in done:
                task.result()
        await f.books.release_snapshot()
        f.state = FollowState.CATCHING_UP
        if not self._marked and not f.reverse:
            await self._begin()
            await self._members.mark_shared()
            if f.unsettled_until:
                await self._members.read_keyless_anew()
                f.fresh_until = max(f.fresh_until, await self._reader.close())
            await self._target.execute(
                f"UPDATE {MOVE_SCHEMA}.position SET marked = true, "
                "fresh_until = greatest(fresh_until, '0/0'::pg_lsn + $2::numeric), "
                "unsettled_until = greatest(unsettled_until, '0/0'::pg_lsn + $3::numeric) WHERE slot = $1",
                f.slot,
                f.fresh_until,
                f.unsettled_until,
            )
            await self._transaction.commit()
            self._transaction = None
            await self._members.start()
        position = f.applied
        began = time.monotonic()
        inside = skipped = False
        layouts, load = self._layouts, _Load()
        try:
            while True:
                block = await stream.get()
                if self._working is not None:
                    await asyncio.sleep(0)  # it goes on while the next batch is read
                    if self._working.done():
                        await self._finish()
                messages = block.messages if block is not None else ()
                at = 0
                while at < len(messages):
                    message = messages[at]
                    kind = message[0]
                    if kind in ROW_KINDS and not skipped and not load.echo:
                        at = load.batch.take(messages, at, layouts, load.xid, _PIECE_CHANGES)
                        if load.batch.changes >= _PIECE_CHANGES or load.batch.bytes >= _PIECE_BYTES:
                            await self._finish()
                            load.pieces = True
                            await self._apply(load, whole=False)
                        continue
                    at += 1
                    if kind in ROW_KINDS:
                        continue
                    if kind == BEGIN:
                        inside, load.echo = True, False
                        load.xid = int.from_bytes(message[17:21], "big")
                        skipped = int.from_bytes(message[1:9], "big") < position
                    elif kind == COMMIT:
                        inside = False
                        if skipped:
                            continue
                        load.pending += 1
                        load.commit_lsn = int.from_bytes(message[10:18], "big")
                        load.xids.append(load.xid)
                        if (
                            load.batch.changes >= _BATCH_CHANGES
                            or load.pieces
                            or load.commit_lsn <= f.careful_until
                        ):
                            assert block is not None
                            load = await self._hand_over(load, stream, block.segment)
                    else:
                        await self._other(message, kind, skipped, load)
                if not load.pending:
                    began = time.monotonic()
                elif not inside and not stream.waiting and block is not None:
                    busy = self._working is not None or load.batch.changes >= _BUSY_CHANGES
                    linger = busy and time.monotonic() - began < _LINGER_S
                    if not linger or not await stream.more_within(_GATHER_S):
                        load = await self._hand_over(load, stream, block.segment)
                if stream.live and f.state is FollowState.CATCHING_UP:
                    f.state = FollowState.LIVE
                if not inside and not load.pending and (f.tidy_wanted or f.unsettled_until):
                    await self._finish()
                    if f.unsettled_until and not f.reverse and f.applied >= f.fresh_until:
                        await self._settle()
                    if f.tidy_wanted:
                        await self._tidy()
        finally:
            working, self._working = self._working, None
            if working is not None:
                await end([working])

    async def _hand_over(self, load: _Load, stream: Stream, segment: int) -> _Load:
        """Have the batch applied while the next one is read; that one."""
        await self._finish()
        self._working = asyncio.create_task(self._commit(load, stream, segment))
        # Whoever waits for more has to hear of a failure.
        self._working.add_done_callback(lambda _: stream.interrupt())
        return _Load()

    async def _finish(self) -> None:
        """Wait for the batch that is being applied. Raises what went wrong with it."""
        working, self._working = self._working, None
        if working is not None:
            await working

    async def _settle(self) -> None:
        """Rows that others wrote may have come without what supports them; all that does is there now."""
        f = self._f
        await self._begin()
        took = await self._members.tidy()
        await self._target.execute(
            f"UPDATE {MOVE_SCHEMA}.position SET unsettled_until = '0/0' WHERE slot = $1", f.slot
        )
        await self._transaction.commit()
        self._transaction = None
        f.unsettled_until = 0
        log.info("target_settled", slot=f.slot, took=took)

    async def _other(self, message: bytes, kind: int, skipped: bool, load: _Load) -> None:
        if kind == RELATION:
            await self._finish()  # it may be using the source's connection
            relation = decode(message)
            assert isinstance(relation, Relation)
            await self._described(relation)
        elif kind == TRUNCATE and not skipped:
            truncate = decode(message)
            assert isinstance(truncate, Truncate)
            names = ", ".join(self._relations.get(one, str(one)) for one in truncate.relations)
            raise Stop(
                f"{names} was truncated on the source, which takes rows of every tenant away: the move "
                "cannot go "
                "on; abort it and start the copy again"
            )
        elif kind == MESSAGE and not skipped:
            found = decode(message)
            if isinstance(found, Logical) and found.transactional:
                if found.prefix == CANARY:
                    load.canaries.append(found.content)
                elif found.prefix == APPLIED and found.content == self._f.move.encode():
                    load.echo = True

    async def _described(self, relation: Relation) -> None:
        name = f"{relation.schema}.{relation.name}"
        self._relations[relation.id] = name
        if name not in self._roots:
            await self._find_partitions()
        root = self._roots.get(name)
        if root is None:
            raise Stop(f"changes of {name} come, which is not part of the move: was a table renamed?")
        table = self._closure.schema.tables[root]
        layout = Layout(relation, table, self._writer.of[root].key)
        await self._same_types(relation, table)
        self._layouts[layout.id] = layout

    async def _same_types(self, relation: Relation, table: Table) -> None:
        asked = [
            (column.type_oid, column.modifier)
            for column in relation.columns
            if (column.type_oid, column.modifier) not in self._types
        ]
        if asked:
            async with self._source.transaction():
                await self._source.execute("SET LOCAL search_path = ''")
                for row in await self._source.fetch(
                    "SELECT o, m, format_type(o, m) AS type FROM unnest($1::oid[], $2::int[]) x(o, m)",
                    [oid for oid, _ in asked],
                    [modifier for _, modifier in asked],
                ):
                    self._types[row["o"], row["m"]] = row["type"]
        for column in relation.columns:
            type_ = self._types[column.type_oid, column.modifier]
            before = table.column(column.name).type
            if type_ != before:
                raise Differs(
                    f"{relation.schema}.{relation.name}: the type of {column.name} was {before} and is "
                    f"{type_} now; "
                    "the move cannot go on: abort it and start the copy again"
                )

    # --- to the target

    async def _begin(self, *, writes: bool = True) -> None:
        """`writes`: rows, not only the position; whoever follows the target has to know."""
        if self._transaction is None:
            self._transaction = self._target.transaction()
            await self._transaction.start()
            if writes:
                await self._target.execute(
                    "SELECT pg_logical_emit_message(true, $1, $2::text)", APPLIED, self._f.move
                )
            self._writer.new_transaction()

    async def _apply(self, load: _Load, *, whole: bool) -> None:
        await self._begin()
        self._f.at("before rows")
        self._writer.careful = self._f.careful_until > self._f.applied
        if self._f.written_by_others and not self._f.reverse:
            self._f.written_by_others = False
            self._members.forget()
        if not self._f.reverse:
            self._members.unsettled = self._f.unsettled_until > self._f.applied
            self._members.ahead = self._members.unsettled or self._f.fresh_until > self._f.applied
        if self._f.reverse:
            await self._back.apply(load.batch)
        else:
            if load.pieces:
                self._reader.recent.add(load.xid)
            for xid in load.xids:
                await self._reader.applied(xid)
            load.xids.clear()
            await self._members.apply(load.batch, whole=whole)
        self._f.at("after rows")
        load.batch.clear()

    async def _commit(self, load: _Load, stream: Stream, segment: int) -> None:
        f = self._f
        if load.batch:
            await self._apply(load, whole=not load.pieces)
        for xid in load.xids:
            await self._reader.applied(xid)
        await self._begin(writes=False)
        f.fresh_until = max(f.fresh_until, await self._reader.close())
        await self._target.execute(
            f"UPDATE {MOVE_SCHEMA}.position SET lsn = '0/0'::pg_lsn + $2::numeric, "
            "fresh_until = greatest(fresh_until, '0/0'::pg_lsn + $3::numeric), transactions = "
            "transactions + $4, "
            "rows = rows + $5, spool = CASE WHEN $6 THEN '' ELSE spool END, "
            "unsettled_until = greatest(unsettled_until, '0/0'::pg_lsn + $7::numeric), not_carried = $8 "
            "WHERE slot = $1",
            f.slot,
            load.commit_lsn,
            f.fresh_until,
            load.pending,
            self._writer.rows,
            segment == 0,
            f.unsettled_until,
            msgspec.json.encode(+f.not_carried).decode(),
        )
        f.at("before commit")
        await self._transaction.commit()
        f.at("after commit")
        self._transaction = None
        f.transactions += load.pending
        f.rows += self._writer.rows
        if not f.reverse:
            entered, left = self._members.take_counts()
            f.entered += entered
            f.left += left
            self._members.end_transaction()
        self._writer.rows = 0
        f.applied = stream.applied = load.commit_lsn
        now = time.monotonic()
        if not f.rates or now - f.rates[-1][0] > 0.5:
            f.rates.append((now, f.rows))
        for content in load.canaries:
            f.canaries.came(content)
        if f.spool is not None:
            if segment:
                f.spool.forget_before(segment)
            elif f.spool.size_bytes:
                f.spool.clear()
        await f.tell_moved()

    async def _tidy(self) -> None:
        f = self._f
        while f.tidy_wanted:
            wanted = f.tidy_wanted.pop(0)
            if wanted.done():
                continue
            if f.reverse:
                wanted.set_result(0)
                continue
            await self._begin()
            try:
                took = await self._members.tidy()
                await self._transaction.commit()
            except BaseException as problem:
                wanted.set_exception(OSError(f"the follower was cut off: {problem}"))
                raise
            self._transaction = None
            wanted.set_result(took)


async def close_soon(conn: "asyncpg.Connection[Any]") -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(2.0):
            await conn.close()
