"""The other direction: what a batch of the target's changes comes to on the source."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import asyncpg

from fleetlift.core.tenant.changes import Batch, Key
from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.pgoutput import Cells
from fleetlift.core.tenant.schema import TableName
from fleetlift.tenant.apply import Writer, key_columns
from fleetlift.tenant.follow_state import Following
from fleetlift.tenant.membership import literal
from fleetlift.tenant.names import MOVE_SCHEMA

Refetch = Callable[[TableName, Sequence[Key]], Awaitable[Mapping[Key, Cells]]]


class WayBack:
    """Applies batches: owned rows as they are; of others, which many tenants share, only what is not there
    yet; what stays behind is counted by table. `target`: where the changes come from."""

    def __init__(
        self, f: Following, target: "asyncpg.Connection[Any]", writer: Writer, refetch: Refetch
    ) -> None:
        self._f, self._target, self._writer, self._refetch = f, target, writer, refetch

    async def apply(self, batch: Batch) -> None:
        f = self._f
        for table in f.closure.order:
            owned = f.closure.parts[table] is Part.OWNED
            net = batch.nets.get(table)
            if net is not None:
                if keys := net.strange:
                    filled = await self._refetch(table, keys)
                    net.rows.update((key, filled.get(key)) for key in keys)
                if owned:
                    kept = await self._shared_among(table, net.rows)
                    f.not_carried[table] += len(kept)
                    rows = {key: cells for key, cells in net.rows.items() if key not in kept}
                    gone = [key for key, cells in rows.items() if cells is None]
                    f.touched.add(table, await self._writer.delete(table, gone))
                    missing = await self._writer.upsert(table, [c for c in rows.values() if c is not None])
                    f.touched.add(table, rows)
                    if missing:
                        found = await self._refetch(table, missing)
                        await self._writer.upsert(table, list(found.values()))
                else:
                    new = [net.rows[key] for key in net.born]
                    await self._writer.insert_absent(
                        table, [c for c in new if c is not None and None not in c]
                    )
                    f.not_carried[table] += len(net.rows) - len(new)
            ops = batch.ops.get(table)
            if ops:
                if owned:
                    f.touched.add(table, ())
                    await self._writer.play(table, ops)
                else:
                    f.not_carried[table] += len(ops)

    async def _shared_among(self, table: TableName, keys: Iterable[Key]) -> set[Key]:
        """Those of `keys` that came along only because they are referred to, in a table of owned rows."""
        if not self._f.closure.brought_by(table):
            return set()
        asked = list(keys)
        w = self._writer.of[table]
        rows = await self._target.fetch(
            f"SELECT n FROM {w.given_keys} "
            f"JOIN {MOVE_SCHEMA}.shared_row h ON h.table_name = {literal(table)} AND h.key = {w.given_key}",
            *key_columns(asked),
        )
        return {asked[row["n"] - 1] for row in rows}
