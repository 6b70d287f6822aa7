"""The fence around a tenant's rows, in the database itself: whoever writes them meets it.

Row triggers that fire always (also for replicated changes) ask whether a row is the tenant's. If so the
writer takes a shared lock until its transaction ends, and then reads whether the fence is closed: so the
mover that closes it and then gets the lock to itself knows that nothing from before is still under way. Rows
of other tenants pass without a lock.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import asyncpg
import msgspec

from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.errors import Conflict, Forbidden, Unavailable
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.fence import (
    Action,
    FenceState,
    Holder,
    Refused,
    Side,
    Status,
    after,
    status_at,
)
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.tenant import fence_sql as sql
from fleetlift.tenant.names import FENCE_SCHEMA

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Condition = Callable[[Closure, TableName, str], str]
"""(closure, table, "NEW" or "OLD") → SQL that says whether that row is the tenant's."""

LOCK_TIMEOUT_S: Final = 0.1  # other tenants' writers wait behind us for no longer, each time we try
_POLL_S: Final = 0.002
_BUSY: Final = (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError)
_GONE: Final = (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError)
_AWAY: Final = (
    OSError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)


class StillWriting(Conflict):
    """Transactions that write the tenant's rows did not end in time; the fence is open again."""

    def __init__(self, holders: tuple[Holder, ...], waited_s: float) -> None:
        listed = "; ".join(str(holder) for holder in holders[:5]) or "they have ended meanwhile"
        more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
        super().__init__(
            f"transactions that may write the tenant's rows were still open after {waited_s:.1f} s: "
            f"{listed}{more}; the source serves on. End them, or let the plan end them, and try again"
        )
        self.holders = holders


class _Refused(Conflict):
    """It was not closed by us, so it is not for us to open."""


class Lapsed(Conflict):
    """The fence has opened by itself: its time was over before it was sealed."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing of the tenant's is under way. Times are of the database's clock."""

    closed_at_ms: int
    until_ms: int
    took_s: float
    ended: tuple[Holder, ...] = ()  # transactions that were ended for it


def tag_of(move: str) -> str:
    """What tells the objects of one move's fence from another's."""
    return hashlib.sha256(move.encode()).hexdigest()[:8]


def lock_key(move: str) -> int:
    """The advisory lock of a move's writers."""
    return int.from_bytes(hashlib.sha256(f"fleetlift fence {move}".encode()).digest()[:8], "big", signed=True)


class Fence:
    """One side's fence of one move. `closure` says which rows it is about; on the target it is all rows.

    `token` lets a session pass: give its connections `pass_settings`. A fence that is installed again with
    another token refuses the old one. `new_place` is told to writers who come too late; no secrets in it.
    """

    def __init__(
        self,
        url: str,
        closure: Closure,
        *,
        move: str,
        side: Side,
        token: str | None = None,
        new_place: str = "",
        condition: Condition | None = None,
    ) -> None:
        self.side = side
        self.move = move
        self.token = token or secrets.token_urlsafe(32)
        self.tag = tag_of(move)
        self._key = lock_key(move)
        self._url = url
        self._closure = closure
        self._new_place = new_place
        self._condition = condition or _row_condition
        self._conn: Connection | None = None
        self._busy = asyncio.Lock()

    @property
    def pass_settings(self) -> dict[str, str]:
        """Settings of a connection that may write though the fence is closed."""
        return {"fleetlift_fence.pass": self.token}

    @property
    def tables(self) -> tuple[TableName, ...]:
        """The tables it stands around."""
        if self.side is Side.TARGET:
            return self._closure.order
        return tuple(t for t in self._closure.order if self._closure.parts[t] is Part.OWNED)

    async def aclose(self) -> None:
        if self._conn is not None:
            conn, self._conn = self._conn, None
            with contextlib.suppress(Exception):
                await conn.close(timeout=2.0)

    # -- putting it up ------------------------------------------------------------------------------------

    async def install(self, *, lock_timeout_s: float = LOCK_TIMEOUT_S, within_s: float = 60.0) -> int:
        """Put it up around every table, open (on a fence that is there already: as it was), and say how many.

        May be repeated: what is there and right is left. Each table is locked against writers for a moment,
        for which others wait `lock_timeout_s` at most; then we step back and try again. Raises Unavailable
        with who is in the way after `within_s`.
        """
        async with self._connection() as conn:
            await self._prepare(conn)
            wanted: dict[str, list[_Trigger]] = {}
            relations: list[asyncpg.Record] = []
            schemas = await self._type_schemas(conn)
            loose = {(row["child"], row["name"]) for row in await conn.fetch(sql.LOOSE)}
            async with conn.transaction():
                await conn.execute(
                    sql.guard_function(self.tag, self._key, self.side, self.move, self._new_place, self._hash)
                )
                for table in self.tables:
                    relations = await conn.fetch(sql.RELATIONS, sql.relation_text(table))
                    wanted[table] = await self._triggers(conn, table, relations, schemas, loose)
            there = await conn.fetch(sql.TRIGGERS, f"fleetlift_fence_{self.tag}_%")
            for table, triggers in wanted.items():
                await self._until_locked(
                    conn,
                    table,
                    within_s,
                    lock_timeout_s,
                    lambda triggers=triggers, table=table: self._put_up(conn, table, triggers, there),  # type: ignore[misc]
                )
            await conn.execute(
                f"UPDATE {FENCE_SCHEMA}.move SET installed_at = clock_timestamp() "
                "WHERE tag = $1 AND installed_at IS NULL",
                self.tag,
            )
            return len(wanted)

    @property
    def _hash(self) -> str:
        return hashlib.sha256(self.token.encode()).hexdigest()

    async def _prepare(self, conn: Connection) -> None:
        async with conn.transaction():
            # Two movers that install at once would otherwise meet in the catalogue.
            await conn.execute("SELECT pg_advisory_xact_lock($1)", self._key ^ 1)
            await conn.execute(sql.SCHEMA)
            for name in sql.SEQUENCES:
                known = await conn.fetchval("SELECT to_regclass($1)", sql.sequence(name, self.tag))
                if known is None:
                    await conn.execute(f"CREATE SEQUENCE {sql.sequence(name, self.tag)} MINVALUE 0 START 0")
                    await conn.execute(f"SELECT {sql.put(name, self.tag, '0')}")
            await conn.execute(sql.control_functions(self.tag, self._key))
            await conn.execute(
                f"INSERT INTO {FENCE_SCHEMA}.move (tag, move, side) VALUES ($1, $2, $3) "
                "ON CONFLICT DO NOTHING",
                self.tag,
                self.move,
                self.side,
            )

    async def _type_schemas(self, conn: Connection) -> str:
        oids = [
            row["oid"] for t in self.tables for row in await conn.fetch(sql.RELATIONS, sql.relation_text(t))
        ]
        root, edges = self._closure.root, self._closure.edges
        columns = {root.column, *(c for e in edges for c in (*e.columns, *e.parent_columns))}
        columns |= {name for e in edges for name, _ in e.when}
        names = [row["name"] for row in await conn.fetch(sql.TYPE_SCHEMAS, oids, list(columns))]
        return ", ".join(["pg_catalog", *(quoted(name) for name in names), "pg_temp"])

    async def _triggers(
        self,
        conn: Connection,
        table: TableName,
        relations: list[asyncpg.Record],
        search_path: str,
        loose: set[tuple[str, str]],
    ) -> "list[_Trigger]":
        """The triggers that `table` must have; makes the function that they call."""
        partitioned = any(row["kind"] == "p" for row in relations)
        guard = f"{FENCE_SCHEMA}.guard_{self.tag}"
        made = [
            self._trigger(row["name"], "tru", "BEFORE TRUNCATE", "STATEMENT", "", f"{guard}()")
            for row in relations
            if row["kind"] in "rp"
        ]
        name = sql.relation_text(table)
        if self.side is Side.TARGET:
            # Every write counts, so a statement is asked once; partitions made later get row triggers.
            each = "ROW" if partitioned else "STATEMENT"
            when = "AFTER" if partitioned else "BEFORE"
            return [
                *made,
                self._trigger(name, "all", f"{when} INSERT OR UPDATE OR DELETE", each, "", f"{guard}()"),
            ]
        new, old = (self._condition(self._closure, table, row) for row in ("NEW", "OLD"))
        has_children = bool(self._closure.down(table))
        inserts_enter = any(
            not e.declared or (e.child, e.name.rpartition(".")[2]) in loose for e in self._closure.down(table)
        )
        entering = f"{guard}('entering')"
        if _plain(new) and _plain(old):
            inserted = entering if inserts_enter else f"{guard}()"
            entered = entering if has_children else f"{guard}()"
            return [
                *made,
                self._trigger(name, "ins", "AFTER INSERT", "ROW", new, inserted),
                self._trigger(name, "del", "AFTER DELETE", "ROW", old, f"{guard}()"),
                self._trigger(name, "upd", "AFTER UPDATE", "ROW", old, f"{guard}()"),
                self._trigger(
                    name, "ent", "AFTER UPDATE", "ROW", f"({new}) AND ({old}) IS NOT TRUE", entered
                ),
            ]
        look = f"look_{self.tag}_{_short(table)}"
        await conn.execute(
            sql.look_function(
                look,
                self.tag,
                self._key,
                self.move,
                self._new_place,
                self._hash,
                new=f"({new})",
                old=f"({old})",
                decides=self._decides(table),
                inserts_enter=inserts_enter,
                search_path=search_path,
            )
        )
        return [
            *made,
            self._trigger(
                name, "row", "AFTER INSERT OR UPDATE OR DELETE", "ROW", "", f"{FENCE_SCHEMA}.{look}()"
            ),
        ]

    def _decides(self, table: TableName) -> tuple[str, ...]:
        columns = [c for e in self._closure.own(table) for c in (*e.columns, *(name for name, _ in e.when))]
        if table == self._closure.root.table:
            columns.append(self._closure.root.column)
        # Its key as well: a row of a cycle may be its own ancestor.
        return tuple(dict.fromkeys([*columns, *self._closure.schema.tables[table].key]))

    def _trigger(self, relation: str, kind: str, event: str, each: str, when: str, call: str) -> "_Trigger":
        asked = f" WHEN ({when})" if when else ""
        text = f"{event} ON {relation} FOR EACH {each}{asked} EXECUTE FUNCTION {call}"
        name = f"fleetlift_fence_{self.tag}_{kind}_{_short(text)}"
        return _Trigger(name=name, relation=relation, create=f"CREATE TRIGGER {name} {text}")

    async def _put_up(
        self, conn: Connection, table: TableName, triggers: "list[_Trigger]", there: list[asyncpg.Record]
    ) -> None:
        relations = await conn.fetch(sql.RELATIONS, sql.relation_text(table))
        oids = {row["oid"] for row in relations}
        known = {(row["name"], row["oid"]) for row in there if row["oid"] in oids}
        prefix = f"fleetlift_fence_{self.tag}_"
        for trigger in triggers:
            oid = await conn.fetchval("SELECT $1::text::regclass::oid", trigger.relation)
            if (trigger.name, oid) not in known:
                await conn.execute(trigger.create)
        wanted = {trigger.name for trigger in triggers}
        for row in await conn.fetch(sql.TRIGGERS, f"{prefix}%"):
            if row["oid"] not in oids or "_frz_" in row["name"]:
                continue
            if row["name"] not in wanted:
                if not row["inherited"]:
                    await conn.execute(f"DROP TRIGGER IF EXISTS {quoted(row['name'])} ON {row['relation']}")
            elif row["enabled"] != "A":
                await conn.execute(
                    f"ALTER TABLE {row['relation']} ENABLE ALWAYS TRIGGER {quoted(row['name'])}"
                )

    async def _until_locked(
        self,
        conn: Connection,
        table: TableName,
        within_s: float,
        lock_timeout_s: float,
        work: Callable[[], Any],
    ) -> None:
        """Do `work` in a transaction that waits for locks only briefly, again and again."""
        await until_locked(
            conn, sql.relation_text(table), work, within_s=within_s, lock_timeout_s=lock_timeout_s
        )

    # -- closing and opening ------------------------------------------------------------------------------

    async def arm(
        self,
        *,
        for_s: float,
        drain_within_s: float,
        terminate: bool = False,
        closed: Callable[[int, int], Awaitable[None]] | None = None,
    ) -> Drained:
        """Close it for `for_s` and wait until no transaction that may have written the tenant's rows is open.

        Those that were let in before go on to their end; whoever comes now is refused. After half of
        `drain_within_s`, with `terminate`, the sessions that hold the tenant's rows are ended (others', that
        only may have written some, never). Raises StillWriting, the fence open again, when it was not enough.
        """
        began = asyncio.get_running_loop().time()
        async with self._connection() as conn:
            ended: tuple[Holder, ...] = ()
            try:
                closed_at, until = await self._close(conn, for_s)
                if closed is not None:
                    await closed(closed_at, until)
                while (drained := await self._call(conn, "drain", until)) != 1:
                    if drained == -1:
                        raise Lapsed("the fence opened by itself before all writers were done; try again")
                    waited_s = asyncio.get_running_loop().time() - began
                    if waited_s > drain_within_s:
                        raise StillWriting(await self._holders(conn), waited_s)
                    if terminate and not ended and waited_s > drain_within_s / 2:
                        ended = await self._terminate(conn)
                    await asyncio.sleep(_POLL_S)
                await self._bystanders_done(conn, began, drain_within_s)
            except _Refused:
                raise
            except BaseException:
                # Whatever has happened, the source goes on at once; if this fails too, its time runs out.
                with contextlib.suppress(Exception):
                    await asyncio.shield(self._thaw_anew())
                raise
        return Drained(
            closed_at_ms=closed_at,
            until_ms=until,
            took_s=asyncio.get_running_loop().time() - began,
            ended=ended,
        )

    async def _close(self, conn: Connection, for_s: float) -> tuple[int, int]:
        for_ms = max(1, round(for_s * 1000))
        until = int(await self._call(conn, "arm", for_ms))
        if until == -1:
            status = (await self._state(conn)).status
            raise _Refused(
                "the fence is sealed: it cannot be armed"
                if status is Status.SEALED
                else "the fence is closed already, by somebody else"
            )
        return until - for_ms, until

    async def _bystanders_done(self, conn: Connection, began: float, within_s: float) -> None:
        """Wait for writers that found a row to be another's when it may already have been on its way here.

        Only tables that are looked up can have such rows, and only once a row has become the tenant's since
        the fence is up, or for a transaction that began before that.
        """
        looked_up = [t for t in self.tables if self.side is Side.SOURCE and not self._is_plain(t)]
        if not looked_up:
            return
        oids = [
            row["oid"] for t in looked_up for row in await conn.fetch(sql.RELATIONS, sql.relation_text(t))
        ]
        entered = int(await conn.fetchval(f"SELECT {sql.read('entered', self.tag)}"))
        installed = await conn.fetchval(
            f"SELECT installed_at FROM {FENCE_SCHEMA}.move WHERE tag = $1", self.tag
        )
        first: set[str] | None = None
        while True:
            rows = [
                row
                for row in await conn.fetch(sql.WRITING, oids)
                if entered > 0 or row["began"] is None or installed is None or row["began"] < installed
            ]
            if first is None:
                first = {row["id"] for row in rows}
            # A prepared transaction may have got another id when it was prepared.
            rows = [row for row in rows if row["id"] in first or row["pid"] == 0]
            if not rows:
                return
            waited_s = asyncio.get_running_loop().time() - began
            if waited_s > within_s:
                raise StillWriting(tuple(_holder(row, bystander=True) for row in rows), waited_s)
            await asyncio.sleep(_POLL_S)

    def _is_plain(self, table: TableName) -> bool:
        return _plain(self._condition(self._closure, table, "NEW"))

    async def seal(self, until_ms: int, *, within_s: float = 1.0) -> bool:
        """Close it for good; False when its time was over before (the source may have taken writes).

        This is the point of no return of a cutover: one row of the log, on disk before we come back. Raises
        Unavailable when the answer did not come: read the state then.
        """
        async with self._connection() as conn:
            end = asyncio.get_running_loop().time() + within_s
            while (sealed := await self._call(conn, "seal", until_ms)) == 0:
                if asyncio.get_running_loop().time() > end:
                    return False
                await asyncio.sleep(_POLL_S)
            return sealed == 1

    async def thaw(self) -> bool:
        """Open it again before it was sealed; False if it is sealed. No fence is open too."""
        async with self._connection() as conn:
            return await self._thaw(conn)

    async def _thaw_anew(self) -> None:
        """Thaw by a connection of its own: the usual one may be busy with what was cancelled."""
        conn = await _connect(self._url)
        try:
            await self._thaw(conn)
        finally:
            await conn.close(timeout=2.0)

    async def _thaw(self, conn: Connection) -> bool:
        try:
            thawed = await self._call(conn, "thaw")
        except _GONE:
            return True
        return thawed == 1

    async def close(self) -> None:
        """Close it at once and for good (a target that has never been open)."""
        async with self._connection() as conn:
            after((await self._state(conn)).status, Action.SHUT)
            await self._call(conn, "shut")

    async def open(self) -> None:
        """Open a sealed fence. Whoever calls this knows that the other side is sealed."""
        async with self._connection() as conn:
            if await self._call(conn, "unseal") != 1:
                raise Conflict("the fence is closed for a time, not sealed: thaw it, or wait")

    unseal = open

    # -- frozen features ----------------------------------------------------------------------------------

    async def freeze(
        self,
        features: Iterable[TableName] | Mapping[TableName, Iterable[str]],
        until_ms: int,
        *,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
        within_s: float = 30.0,
    ) -> None:
        """Refuse these operations (INSERT, UPDATE, DELETE; without any: INSERT) on the tenant's rows.

        Until `until_ms`, in Unix ms of the database's clock (`clock_ms`). Repeated, it moves the moment. It
        ends by itself, whatever becomes of the mover.
        """
        async with self._connection() as conn:
            await self._prepare(conn)
            schemas = await self._type_schemas(conn)
            chosen = features if isinstance(features, Mapping) else dict.fromkeys(features, ("INSERT",))
            for table, operations in chosen.items():
                names = " OR ".join(sorted({_operation(o) for o in operations}))
                function = f"freeze_{self.tag}_{_short(table)}"
                if self._closure.parts.get(table) is not Part.OWNED:
                    raise Conflict(
                        f"{table} has no rows that the tenant owns: it cannot be frozen for the tenant"
                    )
                new, old = (f"({self._condition(self._closure, table, row)})" for row in ("NEW", "OLD"))
                await conn.execute(
                    sql.freeze_function(
                        function, self.tag, self.move, self._hash, new=new, old=old, search_path=schemas
                    )
                )
                trigger = self._trigger(
                    sql.relation_text(table),
                    "frz",
                    f"AFTER {names}",
                    "ROW",
                    "",
                    f"{FENCE_SCHEMA}.{function}()",
                )

                async def put_up(trigger: _Trigger = trigger, table: TableName = table) -> None:
                    there = await conn.fetch(sql.TRIGGERS, f"fleetlift_fence_{self.tag}_frz_%")
                    oids = {r["oid"] for r in await conn.fetch(sql.RELATIONS, sql.relation_text(table))}
                    if not any(row["name"] == trigger.name and row["oid"] in oids for row in there):
                        await conn.execute(trigger.create)
                    for row in await conn.fetch(sql.TRIGGERS, f"fleetlift_fence_{self.tag}_frz_%"):
                        if row["oid"] in oids and row["enabled"] != "A":
                            await conn.execute(
                                f"ALTER TABLE {row['relation']} ENABLE ALWAYS TRIGGER {quoted(row['name'])}"
                            )

                await self._until_locked(conn, table, within_s, lock_timeout_s, put_up)
            await conn.execute(f"SELECT {sql.put('frozen', self.tag, str(max(0, until_ms)))}")

    async def unfreeze(self) -> None:
        """Let the frozen features go on."""
        async with self._connection() as conn:
            with contextlib.suppress(*_GONE):
                await conn.execute(f"SELECT {sql.put('frozen', self.tag, '0')}")

    # -- what is there ------------------------------------------------------------------------------------

    async def state(self) -> FenceState:
        """Read it back; Status.ABSENT where it is not, or not complete."""
        async with self._connection() as conn:
            return await self._state(conn)

    async def _state(self, conn: Connection) -> FenceState:
        try:
            row = await conn.fetchrow(sql.states(self.tag))
            installed = await conn.fetchrow(
                f"SELECT installed_at FROM {FENCE_SCHEMA}.move WHERE tag = $1 AND installed_at IS NOT NULL",
                self.tag,
            )
        except _GONE:
            return FenceState(status=Status.ABSENT)
        assert row is not None
        tables = await conn.fetch(sql.TRIGGERS, f"fleetlift_fence_{self.tag}_%")
        status = status_at(row["until"], row["span"], row["clock"]) if installed else Status.ABSENT
        return FenceState(
            status=status,
            until_ms=row["until"],
            window_ms=row["span"],
            now_ms=row["clock"],
            drained=row["drained"] == 1,
            frozen_until_ms=row["frozen"],
            refused=Refused(closing=row["refused"], sealed=row["late"], frozen=row["unmet"]),
            tables=len({r["oid"] for r in tables}),
        )

    async def refused(self) -> Refused:
        return (await self.state()).refused

    async def holders(self) -> tuple[Holder, ...]:
        """Open transactions that have written the tenant's rows since the fence is up, the oldest first."""
        async with self._connection() as conn:
            return await self._holders(conn)

    async def long_transactions(self, longer_than_s: float) -> tuple[Holder, ...]:
        """Open transactions on its tables, of any tenant, that may hold up a drain."""
        async with self._connection() as conn:
            oids = [
                row["oid"]
                for t in self.tables
                for row in await conn.fetch(sql.RELATIONS, sql.relation_text(t))
            ]
            rows = await conn.fetch(sql.WRITING, oids)
            return tuple(_holder(row, bystander=True) for row in rows if row["age_s"] > longer_than_s)

    async def position(self) -> int:
        """The log's position after all that has committed, with a message behind it for a follower to meet.

        Call it once drained. Commits that the server has not yet put on disk lie before it as well.
        """
        async with self._connection() as conn:
            lsn = int(
                await conn.fetchval("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
            )
            await conn.fetchval(
                "SELECT pg_logical_emit_message(true, 'fleetlift', "
                "json_build_object('position', $1::bigint)::text)",
                lsn,
            )
            return lsn

    async def clock_ms(self) -> int:
        """The database's own clock, Unix ms."""
        async with self._connection() as conn:
            return int(await conn.fetchval(f"SELECT {sql.NOW_MS}"))

    async def try_pass(self) -> None:
        """Write nothing through the fence as the reverse stream would. Raises Forbidden with the reason.

        In a transaction that is rolled back, with triggers and foreign keys off as the stream has them: which
        needs the privileges that the stream needs.
        """
        conn = await _connect(self._url, self.pass_settings)
        try:
            transaction = conn.transaction()
            await transaction.start()
            try:
                await conn.execute("SET LOCAL lock_timeout = '1s'")
                await conn.execute("SET LOCAL session_replication_role = replica")
                for table in self.tables:
                    name = sql.relation_text(table)
                    columns = [quoted(c) for c in self._closure.schema.tables[table].copied]
                    names = ", ".join(columns)
                    # Planned and checked as the stream's own, but with no row chosen nobody's row is locked.
                    await conn.execute(
                        f"INSERT INTO {name} ({names}) OVERRIDING SYSTEM VALUE "
                        f"SELECT {names} FROM {name} WHERE false"
                    )
                    settable = [
                        quoted(c.name)
                        for c in self._closure.schema.tables[table].columns
                        if not c.generated and c.identity != "a"
                    ]
                    for column in settable[:1]:
                        await conn.execute(f"UPDATE {name} SET {column} = {column} WHERE false")
                    await conn.execute(f"DELETE FROM {name} WHERE false")
            finally:
                await transaction.rollback()
        except asyncpg.PostgresError as exc:
            raise Forbidden(
                f"changes could not be carried back to the {self.side}: {exc}; "
                "without a way back there is no cutover"
            ) from exc
        finally:
            await conn.close(timeout=2.0)

    async def remove(self, *, lock_timeout_s: float = LOCK_TIMEOUT_S, within_s: float = 60.0) -> None:
        """Take it away, with all that belongs to it; nothing happens where there is none."""
        async with self._connection() as conn:
            after((await self._state(conn)).status, Action.REMOVE)
            await remove_fence(conn, self.tag, lock_timeout_s=lock_timeout_s, within_s=within_s)

    # -- helpers ------------------------------------------------------------------------------------------

    async def _call(self, conn: Connection, name: str, *arguments: int) -> int:
        places = ", ".join(f"${n}" for n in range(1, len(arguments) + 1))
        return int(await conn.fetchval(f"SELECT {FENCE_SCHEMA}.{name}_{self.tag}({places})", *arguments))

    async def _holders(self, conn: Connection) -> tuple[Holder, ...]:
        high, low = (self._key >> 32) & 0xFFFFFFFF, self._key & 0xFFFFFFFF
        return tuple(_holder(row) for row in await conn.fetch(sql.HOLDERS, high, low))

    async def _terminate(self, conn: Connection) -> tuple[Holder, ...]:
        holders = [h for h in await self._holders(conn) if h.pid]
        for holder in holders:
            await conn.fetchval("SELECT pg_terminate_backend($1)", holder.pid)
        return tuple(holders)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """The fence's one connection, kept open between calls: a cutover has no time to connect again."""
        async with self._busy:
            try:
                if self._conn is None or self._conn.is_closed():
                    self._conn = await _connect(self._url, self.pass_settings)
                yield self._conn
            except _AWAY as exc:
                await self.aclose()
                raise_if_cancelled()
                raise Unavailable(f"the {self.side}'s database does not answer: {exc}") from exc


class _Trigger(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    relation: str  # as SQL
    create: str


def _row_condition(closure: Closure, table: TableName, row: str) -> str:
    from fleetlift.tenant.membership import row_condition

    return row_condition(closure, table, row)


def _plain(condition: str) -> bool:
    """Whether a condition reads the row alone, so that a trigger's WHEN can ask it (no subquery there)."""
    return "select" not in condition.lower()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _operation(name: str) -> str:
    if (upper := name.upper()) not in ("INSERT", "UPDATE", "DELETE"):
        raise Conflict(f"{name!r} cannot be frozen: INSERT, UPDATE or DELETE can")
    return upper


def _holder(row: asyncpg.Record, *, bystander: bool = False) -> Holder:
    return Holder(
        pid=row["pid"],
        application=row["application"],
        user=row["usename"],
        age_s=max(0.0, row["age_s"]),
        query=row["query"],
        bystander=bystander,
    )


async def _connect(url: str, settings: Mapping[str, str] | None = None) -> Connection:
    conn = await asyncpg.connect(
        url,
        timeout=10.0,
        command_timeout=60.0,
        server_settings={"application_name": "fleetlift fence", "lock_timeout": "5s", **(settings or {})},
    )
    # A seal that is said to be done must have reached the disk.
    await conn.execute(
        "SELECT set_config('synchronous_commit', 'on', false) "
        "WHERE current_setting('synchronous_commit') = 'off'"
    )
    return conn


async def until_locked(
    conn: Connection,
    relation: str,
    work: Callable[[], Any],
    *,
    within_s: float = 60.0,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> None:
    """Do `work` in a transaction that waits for `relation`'s lock only briefly, again and again.

    So other sessions, which queue behind us, are never held up for longer than `lock_timeout_s`.
    """
    end = asyncio.get_running_loop().time() + within_s
    pause_s = lock_timeout_s / 2
    while True:
        try:
            async with conn.transaction():
                await conn.execute(f"SET LOCAL lock_timeout = {max(1, round(lock_timeout_s * 1000))}")
                await work()
                return
        except _BUSY as exc:
            if asyncio.get_running_loop().time() > end:
                oids = [r["oid"] for r in await conn.fetch(sql.RELATIONS, relation)]
                rows = await conn.fetch(sql.WRITING, oids)
                listed = "; ".join(str(_holder(row)) for row in rows[:5]) or "they have ended meanwhile"
                raise Unavailable(
                    f"{relation} could not be locked for a moment within {within_s:.0f} s; "
                    f"in the way: {listed}"
                ) from exc
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 1.0)


async def remove_fence(
    conn: Connection, tag: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S, within_s: float = 60.0
) -> None:
    """Remove the triggers, functions and numbers of one fence, and the schema with the last."""
    triggers = await conn.fetch(sql.TRIGGERS, f"fleetlift_fence_{tag}_%")
    for row in triggers:
        if row["inherited"]:
            continue

        async def drop(row: asyncpg.Record = row) -> None:
            await conn.execute(f"DROP TRIGGER IF EXISTS {quoted(row['name'])} ON {row['relation']}")

        await until_locked(conn, row["relation"], drop, within_s=within_s, lock_timeout_s=lock_timeout_s)
    async with conn.transaction():
        if await conn.fetchval("SELECT to_regnamespace($1)", FENCE_SCHEMA) is None:
            return
        for row in await conn.fetch(
            "SELECT p.oid::regprocedure::text AS name FROM pg_proc p "
            "JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname = $1 AND (p.proname LIKE $2 OR p.proname LIKE $3)",
            FENCE_SCHEMA,
            f"%\\_{tag}",
            f"%\\_{tag}\\_%",
        ):
            await conn.execute(f"DROP FUNCTION IF EXISTS {row['name']}")
        for name in sql.SEQUENCES:
            await conn.execute(f"DROP SEQUENCE IF EXISTS {sql.sequence(name, tag)}")
        if await conn.fetchval("SELECT to_regclass($1)", f"{FENCE_SCHEMA}.move") is not None:
            await conn.execute(f"DELETE FROM {FENCE_SCHEMA}.move WHERE tag = $1", tag)
            if await conn.fetchval(f"SELECT count(*) FROM {FENCE_SCHEMA}.move") == 0:
                await conn.execute(f"DROP SCHEMA {FENCE_SCHEMA} CASCADE")
