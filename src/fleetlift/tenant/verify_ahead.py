"""Chunks compared before it is their turn, several at the same time."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from fleetlift.cancelling import end, raise_if_cancelled
from fleetlift.core.tenant.compare import Sum
from fleetlift.core.tenant.schema import TableName
from fleetlift.core.tenant.verify_report import Key
from fleetlift.store.pool import Conn
from fleetlift.tenant.verify_members import KeySets, Membership
from fleetlift.tenant.verify_rows import Shape, connect
from fleetlift.tenant.verify_sql import ascends, between, both, is_small, nth_key, sums

PARTS: Final = 4_096  # of a chunk: rows are fetched only of those parts that differ
KEYS_LIVE_S: Final = 60.0  # key sets older than this are made anew before the next table
_LOOKS: Final = 64


class _Lane(msgspec.Struct, kw_only=True):
    """A session on either side that compares chunks, with key sets of its own."""

    source: Any
    target: Any
    keys: KeySets
    made: float = float("-inf")


class _Look(msgspec.Struct, kw_only=True):
    """The next chunk of a table, being compared. `upper` None and no `compared`: no more of this table.

    `compared`: in how many parts it was cut, and the sums of these on both sides.
    """

    table: TableName
    lower: Key | None = None
    upper: Key | None = None
    compared: "asyncio.Task[tuple[int, dict[int, Sum], dict[int, Sum]]] | None" = None
    problem: BaseException | None = None


class _Compared(msgspec.Struct, kw_only=True):
    """A chunk that was looked at ahead."""

    lower: Key | None
    upper: Key | None
    compared: "asyncio.Task[tuple[int, dict[int, Sum], dict[int, Sum]]]"


class Ahead:
    """First looks at chunks before it is their turn, several at the same time.

    They are taken in the order of `tables`, each once. What is not alike, and a table whose keys do not sort
    alike, is looked at again by whoever takes them.
    """

    def __init__(
        self,
        urls: tuple[str, str],
        members: Membership,
        tables: Sequence[tuple[Shape, Key | None]],
        restless: Callable[[], bool],
        *,
        lanes: int,
        chunk_rows: int,
    ) -> None:
        self._urls, self._members, self._chunk_rows = urls, members, chunk_rows
        self._tables, self._restless = tables, restless
        self._free: asyncio.Queue[_Lane | None] = asyncio.Queue()
        for _ in range(lanes):
            self._free.put_nowait(None)
        self._looks: asyncio.Queue[_Look] = asyncio.Queue(_LOOKS)
        self._comparing: set[asyncio.Task[Any]] = set()
        self._open: list[Any] = []
        self._left: set[TableName] = set()
        self._over = {shape.table for shape, _ in tables}  # those whose looks have not been taken to the end
        self._cutting = asyncio.create_task(self._cut(), name="verify: cutting tables in chunks")

    async def close(self) -> None:
        await end([self._cutting, *self._comparing])
        for conn in self._open:
            with contextlib.suppress(Exception):
                await conn.close(timeout=5)

    def leave(self, table: TableName) -> None:
        """No more looks at this table: whoever takes them goes on without."""
        self._left.add(table)
        self._over.discard(table)

    async def next(self, table: TableName) -> _Compared | None:
        """The next look at `table`; None when there are no more."""
        while table in self._over:
            look = await self._looks.get()
            if look.problem is not None:
                raise look.problem
            if look.table != table:
                continue  # of a table that was left
            if look.compared is None:
                self._over.discard(table)
                return None
            return _Compared(lower=look.lower, upper=look.upper, compared=look.compared)
        return None

    async def _cut(self) -> None:
        try:
            source, target = await self._connected()
            for shape, lower in self._tables:
                await self._cut_table(source, target, shape, lower)
        except Exception as problem:
            raise_if_cancelled()
            await self._looks.put(_Look(table="", problem=problem))

    async def _cut_table(self, source: Conn, target: Conn, shape: Shape, lower: Key | None) -> None:
        size = self._chunk_rows
        small = await is_small(target, shape, size)
        while shape.table not in self._left:
            upper = None
            if lower is not None or not small:
                upper = await nth_key(target, shape, "true", lower, None, size, plainly=False)
            if upper is not None and not await ascends(source, shape, lower, upper):
                break
            comparing = asyncio.create_task(self._compare(shape, lower, upper), name="verify: a chunk")
            self._comparing.add(comparing)
            comparing.add_done_callback(self._compared)
            await self._looks.put(_Look(table=shape.table, lower=lower, upper=upper, compared=comparing))
            if upper is None:
                break
            lower = upper
        await self._looks.put(_Look(table=shape.table))

    def _compared(self, task: "asyncio.Task[Any]") -> None:
        self._comparing.discard(task)
        if not task.cancelled():
            task.exception()  # whoever takes it raises it

    async def _compare(
        self, shape: Shape, lower: Key | None, upper: Key | None
    ) -> tuple[int, dict[int, Sum], dict[int, Sum]]:
        lane = await self._free.get()
        try:
            if lane is None:
                source, target = await self._connected()
                lane = _Lane(source=source, target=target, keys=KeySets(source, self._members))
            if time.monotonic() - lane.made > KEYS_LIVE_S:
                await lane.keys.make()
                lane.made = time.monotonic()
            here = between(shape, lower, upper, plainly=False)
            cut = PARTS if self._restless() else 1
            mine, theirs = await both(
                sums(lane.source, shape, f"{here} AND {lane.keys.comes(shape.table)}", cut),
                sums(lane.target, shape, here, cut),
            )
            return cut, mine, theirs
        finally:
            self._free.put_nowait(lane)

    async def _connected(self) -> tuple[Conn, Conn]:
        async def opened(url: str, which: str) -> Any:
            self._open.append(conn := await connect(url, which))
            return conn

        return await both(opened(self._urls[0], "source"), opened(self._urls[1], "target"))
