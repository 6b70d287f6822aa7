"""A source, a target and a follower between them: the world of the tests of following."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg

from fleetlift.core.tenant.closure import Closure, Part, Policy, Reference, Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.membership import member_condition
from tenant_world import CLOUD_RULES, Pair


def rules(root: str, value: str, *references: Reference, **other: Any) -> Rules:
    """Rules from a root such as `public.t.id`."""
    table, _, column = root.rpartition(".")
    return Rules(root=Root(table=table, column=column, value=value), references=references, **other)


async def read_closure(url: str, given: Rules) -> Closure:
    conn = await asyncpg.connect(url)
    try:
        return closure_of(await read_schema(conn), given)
    finally:
        await conn.close()


class World:
    """One move between two databases, without its copier: rows are copied by one plain statement a table."""

    def __init__(self, pair: Pair, closure: Closure, directory: Path) -> None:
        self.pair = pair
        self.closure = closure
        self.directory = directory
        self.source: asyncpg.Connection[Any]
        self.target: asyncpg.Connection[Any]
        self.follower: Follower
        self._task: asyncio.Task[None] | None = None

    def new_follower(self, **settings: Any) -> Follower:
        self.follower = Follower(
            self.pair.source, self.pair.target, self.closure, move="t", directory=self.directory, **settings
        )
        return self.follower

    def run(self) -> asyncio.Task[None]:
        self._task = asyncio.create_task(self.follower.run())
        return self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(BaseException):
                await self._task
            self._task = None

    async def prepare(self, **settings: Any) -> str:
        """Slot on the source; the snapshot to copy from."""
        prepared = await self.new_follower(**settings).prepare()
        assert prepared.snapshot is not None
        return prepared.snapshot

    async def follow(self) -> None:
        """Copied, and followed from then on; all there was is there."""
        await self.copy(await self.prepare())
        self.run()
        self.follower.start_applying()
        await self.settled()

    async def copy(self, snapshot: str | None, tables: Sequence[TableName] | None = None) -> None:
        """The tenant's rows as the snapshot shows them (None: as they are now)."""
        reader = await asyncpg.connect(self.pair.source)
        try:
            await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            if snapshot is not None:
                await reader.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            await self.target.execute("SET session_replication_role = replica")
            for table in tables or self.closure.order:
                columns = self.closure.schema.tables[table].copied
                listed = ", ".join(quoted(name) for name in columns)
                rows = bytearray()

                async def take(data: bytes, into: bytearray = rows) -> None:
                    into.extend(data)

                await reader.copy_from_query(
                    f"SELECT {listed} FROM {quoted_table(table)} t WHERE "
                    f"{member_condition(self.closure, table, 't')}",
                    output=take,
                )
                await self.target.execute(
                    f"CREATE TEMP TABLE chunk AS SELECT {listed} FROM {quoted_table(table)} WITH NO DATA"
                )
                await self.target.copy_to_table("chunk", columns=columns, source=_once(bytes(rows)))
                await self.target.execute(
                    f"INSERT INTO {quoted_table(table)} ({listed}) OVERRIDING SYSTEM VALUE "
                    f"SELECT {listed} FROM chunk ON CONFLICT DO NOTHING; DROP TABLE chunk"
                )
            lsn = await reader.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
            if snapshot is None:
                self.follower.must_pass(lsn)
            await self.target.execute("SET session_replication_role = origin")
        finally:
            await reader.close()

    async def settled(self, within_s: float = 30.0) -> None:
        """All that is committed on the source is on the target, and what was fetched for it is passed."""
        lsn = await self.source.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        assert await self.follower.reached(lsn, within_s), self.follower.progress
        while self.follower.progress.fresh_until > self.follower.progress.applied_lsn:
            assert await self.follower.reached(self.follower.progress.fresh_until, within_s)

    async def differences(self) -> dict[str, tuple[Any, Any]]:
        """By table: rows that the target lacks, and rows that it should not have."""
        found = {}
        for table, part in self.closure.parts.items():
            if part is Part.NONE:
                continue
            columns = ", ".join(
                f"t.{quoted(c.name)}::text" for c in self.closure.schema.tables[table].columns
            )
            query = f"SELECT {columns} FROM {quoted_table(table)} t"
            want = Counter(
                tuple(row)
                for row in await self.source.fetch(
                    f"{query} WHERE {member_condition(self.closure, table, 't')}"
                )
            )
            have = Counter(tuple(row) for row in await self.target.fetch(query))
            if want != have:
                found[table] = (
                    sorted((want - have).elements(), key=str),
                    sorted((have - want).elements(), key=str),
                )
        return found

    async def same(self) -> None:
        """The target has what the source says the tenant has: nothing missing, nothing foreign."""
        await self.settled()
        await self.follower.tidy()
        found = await self.differences()
        assert not found, "\n".join(
            f"{table}: lacks {lack[:4]} ({len(lack)}), has wrongly {extra[:4]} ({len(extra)})"
            for table, (lack, extra) in found.items()
        )


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@contextlib.asynccontextmanager
async def world(
    pair: Pair,
    directory: Path,
    given: Rules,
    *,
    ddl: str,
    rows: str | None = None,
) -> AsyncIterator[World]:
    """Source and target with the schema `ddl`, the source filled by `rows` (None: it is there already)."""
    source = await asyncpg.connect(pair.source)
    target = await asyncpg.connect(pair.target)
    try:
        await target.execute(ddl)
        if rows is not None:
            await source.execute(ddl)
            await source.execute(rows)
        made = World(pair, await read_closure(pair.source, given), directory)
        made.source, made.target = source, target
        try:
            yield made
        finally:
            await made.stop()
    finally:
        await source.close()
        await target.close()


async def until(condition: Callable[[], bool | Awaitable[Any]], within_s: float = 30.0) -> None:
    """Wait for a condition; fail when it does not come true in time."""
    async with asyncio.timeout(within_s):
        while True:
            held = condition()
            if held if isinstance(held, bool) else await held:
                return
            await asyncio.sleep(0.005)


__all__ = [
    "CLOUD_RULES",
    "Direction",
    "Mapping",
    "Policy",
    "World",
    "read_closure",
    "rules",
    "until",
    "world",
]
