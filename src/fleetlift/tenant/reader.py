"""Rows of the source, read in a snapshot that shows every transaction applied so far."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import asyncpg

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import Key
from fleetlift.core.tenant.pgoutput import NULL, Cells
from fleetlift.core.tenant.schema import Table, quoted, quoted_table
from fleetlift.tenant.apply import TableWriter, key_texts
from fleetlift.tenant.membership import literal
from fleetlift.tenant.reference import base_type, getter, is_exact

_VISIBLE_S: Final = 60.0
_RECENT_MAX: Final = 5_000
_ROWS: Final = 5_000
FETCH_KEYS: Final = 500


class Reader:
    """Rows of the source by key, read in one snapshot from `open` to `close`."""

    def __init__(self, conn: "asyncpg.Connection[Any]") -> None:
        self.conn = conn
        self.recent: set[int] = set()  # transactions applied that were not yet seen to be visible
        self.waits_for = ""
        self._transaction: Any = None

    @property
    def is_open(self) -> bool:
        return self._transaction is not None

    async def applied(self, xid: int) -> None:
        self.recent.add(xid)
        if len(self.recent) > _RECENT_MAX and self._transaction is None:
            snapshot = await self.conn.fetchval("SELECT pg_current_snapshot()::text")
            self.recent = {one for one in self.recent if not is_visible(one, snapshot)}

    async def open(self) -> None:
        if self._transaction is not None:
            return
        deadline = time.monotonic() + _VISIBLE_S
        while True:
            transaction = self.conn.transaction(isolation="repeatable_read", readonly=True)
            await transaction.start()
            snapshot = await self.conn.fetchval("SELECT pg_current_snapshot()::text")
            hidden = {xid for xid in self.recent if not is_visible(xid, snapshot)}
            if not hidden:
                self.recent.clear()
                self.waits_for = ""
                self.snapshot: str = snapshot
                self._transaction = transaction
                return
            await transaction.rollback()
            self.waits_for = f"transaction {min(hidden)}, which is in the log and not yet visible"
            if time.monotonic() > deadline:
                raise Conflict(
                    f"the source does not show {self.waits_for}: does a synchronous standby not answer?"
                )
            await asyncio.sleep(0.005)

    async def close(self) -> int:
        """End the snapshot. Up to where the log must be applied for what was read to be right; 0: nothing
        was."""
        if self._transaction is None:
            return 0
        transaction, self._transaction = self._transaction, None
        lsn: int = await self.conn.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        await transaction.rollback()
        return lsn

    async def rows(self, table: Table, where: str, sink: Callable[[list[Cells]], Awaitable[None]]) -> None:
        """The rows of `table c` for which `where` holds, a bounded number at a time."""
        await self.open()
        listed = ", ".join(f"c.{quoted(name)}::text" for name in table.copied)
        held = bytearray()
        began = False

        async def take(data: bytes) -> None:
            nonlocal began
            held.extend(data)
            at = 0
            if not began:
                if len(held) < 19:
                    return
                at, began = 19, True
            raw = bytes(held)
            rows: list[Cells] = []
            size = len(raw)
            while size - at >= 2:
                count = (raw[at] << 8) | raw[at + 1]
                if count == 0xFFFF:
                    break
                cells, end = _binary_row(raw, at + 2, count)
                if end > size:
                    break
                rows.append(cells)
                at = end
                if len(rows) >= _ROWS:
                    await sink(rows)
                    rows = []
            del held[:at]
            if rows:
                await sink(rows)

        await self.conn.copy_from_query(
            f"SELECT {listed} FROM {quoted_table(table.name)} c WHERE {where}", output=take, format="binary"
        )


def _binary_row(raw: bytes, at: int, count: int) -> tuple[Cells, int]:
    cells: Cells = []
    size = len(raw)
    for _ in range(count):
        if at + 4 > size:
            return cells, size + 1
        head = raw[at : at + 4]
        if head == NULL:
            cells.append(NULL)
            at += 4
            continue
        end = at + 4 + int.from_bytes(head, "big")
        cells.append(raw[at:end])
        at = end
    return cells, at


def is_visible(xid: int, snapshot: str) -> bool:
    """Whether a snapshot (`xmin:xmax:xip,…`, 64 bits) shows what the committed transaction `xid` (32 bits,
    not
    more than 2^31 away) did."""
    low, high, running = snapshot.split(":")
    xmax = int(high)
    full = xmax - ((xmax - xid) & 0xFFFFFFFF)
    if (xmax - full) >= 1 << 31:
        full += 1 << 32
    if full >= xmax:
        return False
    return full < int(low) or str(full) not in running.split(",")


async def read_keys(reader: Reader, w: TableWriter, keys: Sequence[Key]) -> dict[Key, Cells]:
    """The rows of a table with these keys as the source has them, by the keys asked for."""
    found: dict[Key, Cells] = {}
    get = getter(w, w.key)

    async def take(rows: list[Cells]) -> None:
        for cells in rows:
            found[get(cells)] = cells

    columns = ", ".join(f"c.{quoted(name)}" for name in w.key)
    for at in range(0, len(keys), FETCH_KEYS):
        values = ", ".join(
            "("
            + ", ".join(
                f"{literal(text)}::{w.types[name]}" for name, text in zip(w.key, key_texts(key), strict=True)
            )
            + ")"
            for key in keys[at : at + FETCH_KEYS]
        )
        await reader.rows(w.table, f"({columns}) IN ({values})", take)
    if all(is_exact(base_type(w.types[name])) for name in w.key):
        return found
    # The texts of keys as they were read may differ from those of the stream.
    by_key = {_loose(key): key for key in keys}
    return {by_key.get(_loose(key), key): cells for key, cells in found.items()}


def _loose(key: Key) -> tuple[str, ...]:
    short = {"true": "t", "false": "f"}
    return tuple(short.get(text, text.rstrip(" ")) for text in key_texts(key))
