"""The other direction: what a batch of the target's changes comes to on the source.

All other tenants live there. A row that stands on the source under a key of the batch, or that a unique index
puts in the way, is written only when it is the tenant's: by what stands there now, by what is committed (what
the batch itself has changed must not count against it), or because this way back has left it just so. For the
last, each row that it writes and that is nobody's or another's after it is noted (`unowned_row`), and what
hangs on such a row counts with it: the tenant may make a row first, and take it as its own later.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import asyncpg

from fleetlift.core.tenant.changes import Batch, Key, Net
from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.pgoutput import Cells, text_of
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.tenant.apply import Unique, Writer, key_columns, key_from
from fleetlift.tenant.follow_state import Following, Stop
from fleetlift.tenant.membership import literal, row_condition
from fleetlift.tenant.names import MOVE_SCHEMA

Refetch = Callable[[TableName, Sequence[Key]], Awaitable[Mapping[Key, Cells]]]

_MAKE_WAY: Final = "Change or delete one of the two, then resume; it is also tried again by itself"


class WayBack:
    """Applies batches: owned rows as they are; of others, which many tenants share, only what is not there
    yet; what stays behind is counted by table. `target`: where the changes come from; `committed`: reads the
    source beside the transaction that is being applied. Raises Stop where another's row is in the way."""

    def __init__(
        self,
        f: Following,
        target: "asyncpg.Connection[Any]",
        writer: Writer,
        refetch: Refetch,
        committed: "asyncpg.Connection[Any]",
    ) -> None:
        self._f, self._target, self._writer, self._refetch = f, target, writer, refetch
        self._committed = committed
        owned = [table for table in f.closure.order if f.closure.parts[table] is Part.OWNED]
        self._is_ours = {table: row_condition(f.closure, table, "t") for table in owned}
        self._was_ours = {table: row_condition(f.closure, table, "t", self._left_so) for table in owned}
        self._telling = {table: self._telling_columns(table) for table in owned}
        writer.spare = self._spare

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
                    await self._carry(net)
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

    async def _carry(self, net: Net) -> None:
        """Put the tenant's rows in, update them, take them away."""
        table, writer = net.table, self._writer
        kept = await self._shared_among(table, net.rows)
        self._f.not_carried[table] += len(kept)
        rows = {key: cells for key, cells in net.rows.items() if key not in kept}
        there = await writer.standing(table, rows, self._is_ours[table])
        if strange := [key for key, ours in there.items() if not ours]:
            await self._leave_out(net, rows, await self._foreign(table, strange))
        await writer.delete(table, [key for key, cells in rows.items() if cells is None and key in there])
        put = {key: cells for key, cells in rows.items() if cells is not None}
        new = {key: cells for key, cells in put.items() if key not in there}
        missing = [key for key, cells in new.items() if None in cells]
        missing += await writer.upsert(
            table,
            [cells for key, cells in put.items() if key in there],
            [cells for cells in new.values() if None not in cells],
        )
        self._f.touched.add(table, rows)
        if missing:
            found = await self._refetch(table, missing)
            await writer.upsert(table, (), list(found.values()))
            put.update(found)
        await self._note_unowned(table, put)

    async def _leave_out(self, net: Net, rows: dict[Key, Cells | None], foreign: Collection[Key]) -> None:
        """Take out of `rows` what would come over rows that are not the tenant's. What is not the tenant's on
        the target either is not carried; for a row that is, somebody has to make way."""
        w = self._writer.of[net.table]
        on_target: dict[Key, bool] = {}
        if asked := [key for key in foreign if rows[key] is not None]:
            found = await self._target.fetch(
                w.standing_sql(w.given_query, self._is_ours[net.table]), *key_columns(asked)
            )
            on_target = {key_from(tuple(record)[:-1]): record[-1] for record in found}
        for key in foreign:
            if on_target.get(key):
                raise Stop(
                    f"{net.table}: the tenant's row {w.told(key)} cannot go back to the source: the row of "
                    f"that key there is not the tenant's. {_MAKE_WAY}"
                )
            # One that is gone from the target by now comes as gone, or has come and gone here.
            if (rows.pop(key) is None and key not in net.born) or key in on_target:
                self._f.not_carried[net.table] += 1

    async def _spare(
        self, table: TableName, unique: Unique, pairs: Sequence[tuple[Key, Key]], asked: Collection[Key]
    ) -> Collection[Key]:
        """See `apply.Spare`: other tenants' rows are neither taken away nor read anew."""
        there = await self._writer.standing(table, {theirs for theirs, _ in pairs}, self._is_ours[table])
        foreign = await self._foreign(table, [key for key, ours in there.items() if not ours])
        w = self._writer.of[table]
        for theirs, ours in pairs:
            if theirs in foreign and ours in asked:
                raise Stop(
                    f"{table}: the tenant's row {w.told(ours)} cannot go back to the source: the row "
                    f"{w.told(theirs)} there, which is not the tenant's, is the same to the unique index "
                    f"{unique.name}. {_MAKE_WAY}"
                )
        return foreign

    async def _foreign(self, table: TableName, keys: Sequence[Key]) -> set[Key]:
        """Those of the keys whose rows were not the tenant's before this transaction, nor left so by it."""
        if not keys:
            return set()
        found = await self._committed.fetch(
            self._writer.of[table].standing_sql(self._writer.of[table].given_query, self._was_ours[table]),
            *key_columns(keys),
        )
        return {key_from(tuple(record)[:-1]) for record in found if not record[-1]}

    def _left_so(self, table: TableName, row: str) -> str:
        """True of a row, by its alias, that stands as this way back has left it."""
        w = self._writer.of.get(table)
        if w is None:
            return "false"
        return (
            f"EXISTS (SELECT 1 FROM {MOVE_SCHEMA}.unowned_row u WHERE u.slot = {literal(self._f.slot)} AND "
            f"u.table_name = {literal(table)} AND u.key = {w.key_array_of(row)} "
            f"AND u.digest = md5(({row}.*)::text) OFFSET 0)"
        )

    def _telling_columns(self, table: TableName) -> tuple[str, ...]:
        """The columns of a row that say whose it is."""
        closure = self._f.closure
        if table == closure.root.table:
            return (closure.root.column,)
        own = closure.own(table)
        names = [name for edge in own for name in (*edge.columns, *(name for name, _ in edge.when))]
        return tuple(dict.fromkeys(names))

    async def _note_unowned(self, table: TableName, rows: Mapping[Key, Cells]) -> None:
        """Note how those of the rows stand now that are not the tenant's."""
        w, writer = self._writer.of[table], self._writer
        names = self._telling[table]
        at = [w.at[name] for name in names]
        alike: dict[tuple[bytes | None, ...], list[Key]] = defaultdict(list)
        for key, cells in rows.items():
            alike[tuple([cells[n] for n in at])].append(key)
        told = [values for values in alike if None not in values]
        unsure = [key for values, keys in alike.items() if None in values for key in keys]
        if told:
            listed = ", ".join(f"x{n}" for n in range(len(names)))
            arrays = ", ".join(f"${n + 1}::text[]" for n in range(len(names)))
            row = ", ".join(f"x.x{n}::{w.types[name]} AS {quoted(name)}" for n, name in enumerate(names))
            for record in await writer.conn.fetch(
                f"SELECT x.n FROM unnest({arrays}) WITH ORDINALITY x({listed}, n) "
                f"CROSS JOIN LATERAL (SELECT {row}) t WHERE ({self._is_ours[table]}) IS NOT TRUE",
                *([text_of(value) for value in column] for column in zip(*told, strict=True)),
            ):
                unsure += alike[told[record["n"] - 1]]
        there = await writer.standing(table, unsure, self._is_ours[table])
        if unowned := [key for key, ours in there.items() if not ours]:
            await writer.conn.execute(
                f"INSERT INTO {MOVE_SCHEMA}.unowned_row (slot, table_name, key, digest) "
                f"SELECT {literal(self._f.slot)}, {literal(table)}, {w.key_array}, md5((t.*)::text) "
                f"FROM {w.given_query} s JOIN {w.sql_name} t ON {w.key_matches} "
                "ON CONFLICT (slot, table_name, key) DO UPDATE SET digest = EXCLUDED.digest",
                *key_columns(unowned),
            )

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
