"""What following keeps: slot, publication and identities on the source, its books on the target."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import asyncpg
import msgspec
import psycopg2

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.derive import refusals
from fleetlift.core.tenant.pgoutput import lsn_of, lsn_text
from fleetlift.core.tenant.schema import Table, TableName, quoted, quoted_table
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.stream import replication_connection

OLDEST: Final = 140000
_LOCK_S: Final = 3.0
_LOCK_TRIES: Final = 20
_CANCEL_EVERY_S: Final = 0.1
GIVEN_UP_WITHIN_S: Final = 12.0  # connecting takes up to 10

BOOKS: Final = f"""
CREATE SCHEMA IF NOT EXISTS {MOVE_SCHEMA};
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.position (
  slot text PRIMARY KEY, lsn pg_lsn NOT NULL, fresh_until pg_lsn NOT NULL DEFAULT '0/0',
  spool text NOT NULL DEFAULT '', marked boolean NOT NULL DEFAULT false,
  unsettled_until pg_lsn NOT NULL DEFAULT '0/0', transactions bigint NOT NULL DEFAULT 0, rows bigint NOT
  NULL DEFAULT 0);
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = '{MOVE_SCHEMA}.position'::regclass
      AND attname = 'not_carried') THEN
    ALTER TABLE {MOVE_SCHEMA}.position ADD not_carried text NOT NULL DEFAULT '{{}}';
  END IF;
END $$;
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.shared_row (
  table_name text NOT NULL, key text[] NOT NULL, PRIMARY KEY (table_name, key));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.read_as_of (
  table_name text NOT NULL, edge text NOT NULL, ref text[] NOT NULL, snapshot text NOT NULL,
  PRIMARY KEY (table_name, edge, ref));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.identity_before (
  slot text, relation text, clause text NOT NULL, PRIMARY KEY (slot, relation));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.partition (slot text, relation text, PRIMARY KEY (slot, relation));
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.unowned_row (
  slot text, table_name text, key text[], digest text NOT NULL, PRIMARY KEY (slot, table_name, key));
"""

_LEAVES: Final = """
SELECT l.oid, format('%I.%I', n.nspname, l.relname) AS name, l.relreplident::text AS identity,
  (SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
   WHERE i.indrelid = l.oid AND i.indisreplident) AS index
FROM pg_class l JOIN pg_namespace n ON n.oid = l.relnamespace
WHERE l.relkind = 'r'
  AND (l.oid = $1::regclass OR l.oid IN (SELECT relid FROM pg_partition_tree($1::regclass)))
ORDER BY 2"""


def counted(text: str) -> Counter[TableName]:
    """What `position.not_carried` says, by table."""
    return Counter(msgspec.json.decode(text, type=dict[TableName, int]))


class _SlotMaker:
    """Makes a slot in a thread, which goes on when whoever waits for it is cancelled. Once given up it leaves
    no slot behind: nobody would read from it, and the source would keep its log until its disk is full."""

    def __init__(self, url: str, slot: str) -> None:
        self._url, self._slot = url, slot
        self._conn: Any = None
        self._given_up = False
        self._over = threading.Event()  # there is nothing to cancel any more

    def make(self) -> tuple[Any, str, str] | None:
        """In the thread: connection, consistent point and snapshot; None when it was given up."""
        made = None
        try:
            self._conn = conn = replication_connection(self._url, name=f"slot {self._slot}")
            cursor = conn.cursor()
            if not self._given_up:
                cursor.execute(f'CREATE_REPLICATION_SLOT "{self._slot}" LOGICAL pgoutput EXPORT_SNAPSHOT')
                _, point, snapshot, _ = cursor.fetchone()
                self._over.set()
                if self._given_up:
                    cursor.execute(f'DROP_REPLICATION_SLOT "{self._slot}"')
                else:
                    made = conn, point, snapshot
        except psycopg2.Error:
            if not self._given_up:
                raise
        finally:
            self._over.set()
            if made is None and self._conn is not None:
                self._conn.close()
        return made

    async def give_up(self, making: "asyncio.Task[tuple[Any, str, str] | None]") -> None:
        """See `make` end. A thread that takes longer than that looks for itself whether it was given up."""
        self._given_up = True
        pending: set[asyncio.Task[Any]] = {making, asyncio.create_task(asyncio.to_thread(self._cancel))}
        deadline = time.monotonic() + GIVEN_UP_WITHIN_S
        while pending and (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):  # asked again: this is how it ends
                _, pending = await asyncio.wait(pending, timeout=left_s)
        if making.done() and making.exception() is None and (made := making.result()) is not None:
            # Made in the same moment: whoever begins or cleans up from here on finds the slot, and drops it.
            made[0].close()

    def _cancel(self) -> None:
        """Again and again: between two statements it has no effect."""
        while not self._over.wait(_CANCEL_EVERY_S):
            if self._conn is not None:
                with contextlib.suppress(psycopg2.Error):
                    self._conn.cancel()


class Books:
    """Makes, checks and takes away what one follower has on both sides."""

    def __init__(
        self, source_url: str, closure: Closure, tables: Sequence[Table], *, slot: str, publication: str
    ) -> None:
        self._source_url = source_url
        self._closure = closure
        self._tables = tables
        self.slot = slot
        self.publication = publication
        self._maker: Any = None

    async def check_source(self, source: "asyncpg.Connection[Any]") -> None:
        version = int(await source.fetchval("SELECT current_setting('server_version_num')"))
        if version < OLDEST:
            raise BadInput(
                f"PostgreSQL {version // 10_000} on the source cannot send canaries in its log: "
                "following needs 14"
            )
        if (level := await source.fetchval("SHOW wal_level")) != "logical":
            raise BadInput(f"the source has wal_level = {level}: set it to logical and restart the server")
        if await source.fetchval("SELECT pg_is_in_recovery()"):
            raise BadInput("the source is a standby: changes are followed from the primary")
        if said := refusals(self._closure):
            raise BadInput("; ".join(said))

    async def leaf_names(self, source: "asyncpg.Connection[Any]") -> list[str]:
        names = []
        for table in self._tables:
            if table.partitioned:
                names += [row["name"] for row in await source.fetch(_LEAVES, quoted_table(table.name))]
        return names

    async def set_identities(
        self, source: "asyncpg.Connection[Any]", target: "asyncpg.Connection[Any]"
    ) -> None:
        for table in self._tables:
            if table.name not in self._closure.full_identity:
                continue
            for leaf in await source.fetch(_LEAVES, quoted_table(table.name)):
                if leaf["identity"] == "f":
                    continue
                clause = {
                    "d": "DEFAULT",
                    "n": "NOTHING",
                    "i": f"USING INDEX {quoted(leaf['index'] or '')}",
                }[leaf["identity"]]
                await target.execute(
                    f"INSERT INTO {MOVE_SCHEMA}.identity_before VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                    self.slot,
                    leaf["name"],
                    clause,
                )
                await self._alter(source, f"ALTER TABLE {leaf['name']} REPLICA IDENTITY FULL")

    async def restore_identities(
        self, source: "asyncpg.Connection[Any]", target: "asyncpg.Connection[Any]"
    ) -> None:
        if not await target.fetchval(f"SELECT to_regclass('{MOVE_SCHEMA}.identity_before') IS NOT NULL"):
            return
        for row in await target.fetch(
            f"SELECT relation, clause FROM {MOVE_SCHEMA}.identity_before WHERE slot = $1", self.slot
        ):
            if await source.fetchval("SELECT to_regclass($1) IS NOT NULL", row["relation"]):
                await self._alter(source, f"ALTER TABLE {row['relation']} REPLICA IDENTITY {row['clause']}")
            await target.execute(
                f"DELETE FROM {MOVE_SCHEMA}.identity_before WHERE slot = $1 AND relation = $2",
                self.slot,
                row["relation"],
            )

    async def close(self, target: "asyncpg.Connection[Any]", *, drop: bool) -> None:
        """Take this follower out of the books; with `drop` they go too, once nobody else is in them: several
        moves may go back to one source."""
        if not await target.fetchval(f"SELECT to_regclass('{MOVE_SCHEMA}.position') IS NOT NULL"):
            return
        for table in ("unowned_row", "partition", "position"):
            await target.execute(f"DELETE FROM {MOVE_SCHEMA}.{table} WHERE slot = $1", self.slot)
        others = (
            f"SELECT EXISTS (SELECT 1 FROM {MOVE_SCHEMA}.position) "
            f"OR EXISTS (SELECT 1 FROM {MOVE_SCHEMA}.identity_before)"
        )
        if not drop or await target.fetchval(others):
            return
        async with target.transaction():
            # Nobody enters himself between the look and the drop.
            await target.execute(f"LOCK TABLE {MOVE_SCHEMA}.position, {MOVE_SCHEMA}.identity_before")
            if not await target.fetchval(others):
                await target.execute(f"DROP SCHEMA {MOVE_SCHEMA} CASCADE")

    async def _alter(self, conn: "asyncpg.Connection[Any]", sql: str) -> None:
        """A statement that needs a table for itself: never lets writers queue behind it for long."""
        for left in reversed(range(_LOCK_TRIES)):
            try:
                async with conn.transaction():
                    await conn.execute(f"SET LOCAL lock_timeout = '{round(_LOCK_S * 1000)}ms'")
                    await conn.execute(sql)
            except asyncpg.LockNotAvailableError:
                if not left:
                    raise Conflict(
                        f"a lock could not be had for: {sql}; end the transactions on it"
                    ) from None
                await asyncio.sleep(0.2)
            else:
                return

    async def make_publication(self, source: "asyncpg.Connection[Any]") -> None:
        tables = ", ".join(quoted_table(table.name) for table in self._tables)
        await source.execute(f"DROP PUBLICATION IF EXISTS {quoted(self.publication)}")
        await source.execute(
            f"CREATE PUBLICATION {quoted(self.publication)} FOR TABLE {tables} "
            "WITH (publish = 'insert, update, delete, truncate')"
        )

    async def make_slot(self) -> tuple[int, str]:
        """The slot's consistent point, and the snapshot of just then, valid while the connection is open."""
        maker = _SlotMaker(self._source_url, self.slot)
        making = asyncio.create_task(asyncio.to_thread(maker.make))
        try:
            made = await asyncio.shield(making)
        except asyncio.CancelledError:
            await maker.give_up(making)
            raise
        except psycopg2.Error as problem:
            raise Conflict(f"the source gives no replication slot: {str(problem).strip()}") from problem
        assert made is not None
        self._maker, point, snapshot = made
        return lsn_of(point), snapshot

    async def release_snapshot(self) -> None:
        maker, self._maker = self._maker, None
        if maker is not None:
            with contextlib.suppress(psycopg2.Error):
                await asyncio.to_thread(maker.close)

    async def drop_slot(self, source: "asyncpg.Connection[Any]") -> None:
        for _ in range(100):
            row = await source.fetchrow(
                "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1", self.slot
            )
            if row is None:
                return
            if row["active_pid"]:
                await source.execute("SELECT pg_terminate_backend($1)", row["active_pid"])
            with contextlib.suppress(asyncpg.ObjectInUseError, asyncpg.UndefinedObjectError):
                await source.execute("SELECT pg_drop_replication_slot($1)", self.slot)
                return
            await asyncio.sleep(0.05)
        raise Conflict(f"the replication slot {self.slot} is in use and cannot be dropped")

    async def check_slot(self, source: "asyncpg.Connection[Any]", applied: int) -> None:
        row = await source.fetchrow(
            "SELECT wal_status, active_pid, (confirmed_flush_lsn - '0/0')::bigint AS confirmed "
            "FROM pg_replication_slots WHERE slot_name = $1",
            self.slot,
        )
        if row is None:
            raise Conflict(
                f"the replication slot {self.slot} is not on the source any more, and with it the "
                "changes since "
                f"{lsn_text(applied)}: the copy must start again (abort the move, then start it)"
            )
        if row["wal_status"] == "lost":
            raise Conflict(
                f"the source has given up the replication slot {self.slot} (max_slot_wal_keep_size) with the "
                f"changes since {lsn_text(applied)}: the copy must start again, with a higher limit"
            )
        if not await source.fetchval(
            "SELECT EXISTS (SELECT 1 FROM pg_publication WHERE pubname = $1)", self.publication
        ):
            raise Conflict(
                f"the publication {self.publication} is not on the source any more: the copy must start again"
            )
        if row["active_pid"]:
            # Only one applier holds the target's lock, so this is what a dead one has left.
            await source.execute("SELECT pg_terminate_backend($1)", row["active_pid"])
