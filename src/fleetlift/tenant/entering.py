"""Rows that enter: descendants of what is owned now, and what coming rows refer to, from the source."""

from collections import defaultdict
from collections.abc import Sequence

from fleetlift.core.tenant.changes import cells_of
from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.pgoutput import NULL, Cells
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.tenant.apply import Writer, key_texts
from fleetlift.tenant.held import CACHE_MAX, NONE, SHARED, Held
from fleetlift.tenant.membership import literal, matches, member_condition
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.reader import FETCH_KEYS, Reader
from fleetlift.tenant.reference import (
    Ref,
    Reference,
    References,
    array_text,
    getter,
    is_possible,
    key_of,
    one_column_sql,
    place_of,
    values_sql,
)


class Entering:
    """Fetches from the source what a batch brings along. `fetched`: what was, since it was last cleared."""

    def __init__(self, refs: References, held: Held, writer: Writer, reader: Reader) -> None:
        self._refs = refs
        self._closure = refs.closure
        self._writer = writer
        self._conn = writer.conn
        self._held = held
        self._reader = reader
        self._coming_refs: dict[str, tuple[Reference, set[Ref]]] = {}
        self.fetched: set[tuple[str, Ref]] = set()
        self.entered = 0

    async def enter(self, table: TableName, rows: Sequence[Cells], born: set[int]) -> None:
        """Bring the descendants of rows that were not owned before. `born`: rows that have just been made, to
        which a declared reference can only come later."""
        waiting: list[tuple[TableName, list[Cells], set[int]]] = [(table, list(rows), born)]
        while waiting:
            t, some, young = waiting.pop()
            w = self._writer.of[t]
            for ref in self._refs.down[t]:
                get = getter(w, ref.edge.parent_columns)
                values: list[Ref] = []
                for cells in some:
                    if ref.edge.declared and id(cells) in young and self._writer.of[ref.edge.child].key:
                        continue
                    value = get(cells)
                    if NULL in cells_of(value) or (ref.edge.name, value) in self.fetched:
                        continue
                    self.fetched.add((ref.edge.name, value))
                    values.append(value)
                for at in range(0, len(values), FETCH_KEYS):
                    found = await self._fetch_children(ref, values[at : at + FETCH_KEYS])
                    if found:
                        waiting.append((ref.edge.child, found, set()))

    async def _fetch_children(self, ref: Reference, values: Sequence[Ref]) -> list[Cells]:
        """Put in the children of these parents as the source has them; gives those that have children."""
        child = ref.edge.child
        w = self._writer.of[child]
        further: list[Cells] = []
        inner = self._refs.is_inner(child)

        async def take(rows: list[Cells]) -> None:
            self.entered += len(rows)
            if w.key:
                if inner:
                    get = getter(w, w.key)
                    state = await self._held.states(child, [get(cells) for cells in rows])
                    await self._held.is_owned_now(child, [key for key, how in state.items() if how == SHARED])
                await self._held.upsert(child, rows)
                if inner:
                    self._held.remember(child, rows, {get(cells): cells for cells in rows})
                    self._held.forget_refs(child)
                    further.extend(rows)
            else:
                await self._writer.insert(child, rows)
            self.note_up(child, rows)

        if not w.key:
            self._held.touched(child, ())
            await self._delete_children(ref, values)
        parents = values_sql(ref, values)
        where = f"EXISTS (SELECT 1 FROM {parents} WHERE {matches(self._closure, ref.edge, 'c', 'p')})"
        if len(ref.at) == 1:
            where = one_column_sql(ref, values)
        await self._reader.rows(w.table, where, take)
        if not w.key:
            await self._mark_fresh(ref, values)
        return further

    async def _delete_children(self, ref: Reference, values: Sequence[Ref]) -> None:
        await self._conn.execute(
            f"DELETE FROM {quoted_table(ref.edge.child)} c USING {values_sql(ref, values)} "
            f"WHERE {matches(self._closure, ref.edge, 'c', 'p')}"
        )

    async def _mark_fresh(self, ref: Reference, values: Sequence[Ref]) -> None:
        """Rows without a key that were read whole: what the snapshot shows must not be done again."""
        await self._conn.execute(
            f"INSERT INTO {MOVE_SCHEMA}.read_as_of (table_name, edge, ref, snapshot) "
            "SELECT $1, $2, x.ref::text[], $4 FROM unnest($3::text[]) x(ref) ON CONFLICT (table_name, "
            "edge, ref) "
            "DO UPDATE SET snapshot = EXCLUDED.snapshot",
            ref.edge.child,
            ref.edge.name,
            [array_text(key_texts(value)) for value in values],
            self._reader.snapshot,
        )

    async def fresh(self, table: TableName) -> dict[tuple[str, Ref], list[str]]:
        found: dict[tuple[str, Ref], list[str]] = defaultdict(list)
        for record in await self._conn.fetch(
            f"SELECT edge, ref, snapshot FROM {MOVE_SCHEMA}.read_as_of WHERE table_name = $1", table
        ):
            found[record["edge"], key_of(record["ref"]) if record["ref"] else ()].append(record["snapshot"])
        return found

    def note_up(self, table: TableName, rows: Sequence[Cells]) -> None:
        """These rows come: what they refer to by COPY edges has to be there."""
        for ref in self._refs.up[table]:
            cache = self._held.cache[place_of(ref)]
            entry = self._coming_refs.setdefault(ref.edge.name, (ref, set()))[1]
            for cells in rows:
                if any(cells[n] is None for n in ref.reads):
                    continue  # it did not change, so it is there
                value = ref.of(cells)
                if value is not None and cache.get(value, NONE) == NONE:
                    entry.add(value)

    async def bring_ancestors(self) -> None:
        while True:
            asked = [(ref, values) for ref, values in self._coming_refs.values() if values]
            if not asked:
                return
            self._coming_refs = {}
            for ref, values in asked:
                states = await self._held.look_up(ref, list(values))
                cache = self._held.cache[place_of(ref)]
                if len(cache) > CACHE_MAX:
                    cache.clear()
                cache.update({value: how for value, how in states.items() if how != NONE})
                missing = [
                    value
                    for value, how in states.items()
                    if how == NONE and ("up " + ref.edge.name, value) not in self.fetched
                ]
                self.fetched.update(("up " + ref.edge.name, value) for value in missing)
                for at in range(0, len(missing), FETCH_KEYS):
                    await self._fetch_parents(ref, missing[at : at + FETCH_KEYS])

    async def _fetch_parents(self, ref: Reference, values: Sequence[Ref]) -> None:
        parent = ref.edge.parent
        w = self._writer.of[parent]
        edge = ref.edge
        rows_sql = ", ".join(
            "("
            + ", ".join(
                f"{literal(text)}::{ref.child.column(name).type}"
                for name, text in zip(edge.columns, key_texts(value), strict=True)
            )
            + "".join(
                f", {literal(text)}::{ref.child.column(name).type}"
                for name, text in edge.when
                if name not in edge.columns
            )
            + ")"
            for value in values
        )
        listed = ", ".join(
            quoted(name) for name in (*edge.columns, *(n for n, _ in edge.when if n not in edge.columns))
        )
        children = f"(VALUES {rows_sql}) x({listed})"
        where = f"EXISTS (SELECT 1 FROM {children} WHERE {matches(self._closure, edge, 'x', 'c')})"
        if ref.native and len(edge.columns) == 1:
            ((column,), kind) = (edge.parent_columns, ref.parent.column(edge.parent_columns[0]).type)
            possible = [value for value in values if is_possible(ref, value)]
            if not possible:
                return
            array = ", ".join(f"{literal(key_texts(value)[0])}::{kind}" for value in possible)
            where = f"c.{quoted(column)} IN ({array})"

        async def take(rows: list[Cells]) -> None:
            await self._held.upsert(parent, rows)
            if parent in self._refs.mixed:
                await self._held.share(parent, rows)
            self._held.remember(parent, rows, {})
            self._held.forget_refs(parent)
            self.note_up(parent, rows)

        await self._reader.rows(w.table, where, take)

    async def read_keyless_anew(self) -> None:
        """Rows without a key cannot be applied twice. Where they may have been copied from several snapshots,
        they are read again from one, and what that shows is not applied."""
        for table in self._closure.order:
            w = self._writer.of[table]
            if w.key or self._closure.parts[table] is Part.NONE:
                continue
            self._held.touched(table, ())
            await self._conn.execute(f"DELETE FROM {w.sql_name}")

            async def take(rows: list[Cells], table: TableName = table) -> None:
                await self._writer.insert(table, rows)
                self.note_up(table, rows)

            await self._reader.rows(w.table, member_condition(self._closure, table, "c"), take)
            await self._conn.execute(
                f"INSERT INTO {MOVE_SCHEMA}.read_as_of (table_name, edge, ref, snapshot) VALUES "
                "($1, '', '{}', $2) ON CONFLICT (table_name, edge, ref) DO UPDATE SET snapshot = "
                "EXCLUDED.snapshot",
                table,
                self._reader.snapshot,
            )
        await self.bring_ancestors()
