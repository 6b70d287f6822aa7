"""What is held of the tenant on the target: how rows are there, as far as it is known, and writing them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from fleetlift.core.tenant.changes import Key, cells_of
from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.pgoutput import NULL, Cells, text_of
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.tenant.apply import TableWriter, Writer, any_plan, key_columns
from fleetlift.tenant.membership import literal, matches
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.reader import Reader, read_keys
from fleetlift.tenant.reference import (
    Ref,
    Reference,
    References,
    base_type,
    cast_of,
    getter,
    is_exact,
    is_possible,
    own_place,
    place_of,
)

CACHE_MAX: Final = 200_000  # references remembered of one kind; then they are looked up anew
_LOOK_UP_MAX: Final = 5_000

NONE, OWNED, SHARED = 0, 1, 2
"""How a row is on the target."""


class Held:
    """The rows on the target. `cache`: how rows are there, by what refers to them; `lost`: what has gone in
    this transaction and may still be pointed at."""

    def __init__(
        self,
        refs: References,
        writer: Writer,
        reader: Reader,
        touched: Callable[[TableName, Iterable[Key]], None],
    ) -> None:
        self._refs = refs
        self._closure = refs.closure
        self._writer = writer
        self._conn = writer.conn
        self._reader = reader
        self.touched = touched
        self.cache: dict[tuple[str, ...], dict[Ref, int]] = defaultdict(dict)
        self.lost: dict[tuple[str, ...], set[Ref]] = defaultdict(set)
        self.cand_made = False

    def known(self, ref: Reference, value: Ref) -> int:
        return self.cache[place_of(ref)].get(value, NONE)

    async def know(self, table: TableName, rows: Iterable[Cells]) -> None:
        """Look up what the rows' OWN edges point at, as far as it is not known."""
        own = self._refs.own[table]
        if not own:
            return
        rows = list(rows)
        for ref in own:
            cache = self.cache[place_of(ref)]
            of = ref.of
            asked: set[Ref] = set()
            if ref.plain:
                (at,) = ref.at
                asked = {cells[at] for cells in rows} - cache.keys() - {NULL}  # type: ignore[assignment]
            else:
                for cells in rows:
                    value = of(cells)
                    if value is not None and value not in cache:
                        asked.add(value)
            if not asked:
                continue
            if len(cache) + len(asked) > CACHE_MAX:
                # What this batch needs that was known is asked again.
                cache.clear()
                asked |= {value for cells in rows if (value := of(cells)) is not None}
            cache.update(await self.look_up(ref, list(asked)))

    async def look_up(self, ref: Reference, values: Sequence[Ref]) -> dict[Ref, int]:
        found = dict.fromkeys(values, NONE)
        asked = [value for value in values if is_possible(ref, value)]
        for at in range(0, len(asked), _LOOK_UP_MAX):
            some = asked[at : at + _LOOK_UP_MAX]
            sql = self._look_up_sql(ref)
            arguments = [[text_of(cells_of(value)[n]) for value in some] for n in range(len(ref.at))]
            if ref.native:
                records = await self._conn.fetch(sql, *arguments)
            else:
                async with any_plan(self._conn):
                    records = await self._conn.fetch(sql, *arguments)
            for record in records:
                found[some[record["n"] - 1]] = record["state"]
        return found

    def _look_up_sql(self, ref: Reference) -> str:
        edge = ref.edge
        count = len(edge.columns)
        if ref.native:
            pairs = [
                f"p.{quoted(b)} = x.v{n}::{cast_of(ref, a, b)}"
                for n, (a, b) in enumerate(zip(edge.columns, edge.parent_columns, strict=True))
            ]
            join = " AND ".join(pairs)
            lateral = ""
        else:
            made = [
                *(
                    f"x.v{n}::{ref.child.column(name).type} AS {quoted(name)}"
                    for n, name in enumerate(edge.columns)
                ),
                *(
                    f"{literal(value)}::{ref.child.column(name).type} AS {quoted(name)}"
                    for name, value in edge.when
                    if name not in edge.columns
                ),
            ]
            lateral = f"CROSS JOIN LATERAL (SELECT {', '.join(made)}) c "
            join = matches(self._closure, edge, "c", "p")
        listed = ", ".join(f"v{n}" for n in range(count))
        arrays = ", ".join(f"${n + 1}::text[]" for n in range(count))
        return (
            f"SELECT x.n, {self.state_sql(edge.parent, 'p')} AS state "
            f"FROM unnest({arrays}) WITH ORDINALITY x({listed}, n) {lateral}"
            f"JOIN {quoted_table(edge.parent)} p ON {join}"
        )

    def state_sql(self, table: TableName, alias: str) -> str:
        """How the row is on the target, in SQL."""
        if self._closure.parts[table] is Part.SHARED:
            return str(SHARED)
        if table not in self._refs.mixed:
            return str(OWNED)
        return f"CASE WHEN {self.is_shared_sql(table, alias)} THEN {SHARED} ELSE {OWNED} END"

    def is_shared_sql(self, table: TableName, alias: str) -> str:
        key = self._writer.of[table].key_array.replace('t."', f'{alias}."')
        return (
            f"EXISTS (SELECT 1 FROM {MOVE_SCHEMA}.shared_row h WHERE h.table_name = {literal(table)} "
            f"AND h.key = {key})"
        )

    async def states(self, table: TableName, keys: Iterable[Key]) -> dict[Key, int]:
        """How each of the rows is on the target now."""
        w = self._writer.of[table]
        cache = self.cache[own_place(table, w.key)] if self._has_exact_key(w) else {}
        found: dict[Key, int] = {}
        asked = []
        for key in keys:
            state = cache.get(key)
            if state is None:
                asked.append(key)
            else:
                found[key] = state
        for at in range(0, len(asked), _LOOK_UP_MAX):
            some = asked[at : at + _LOOK_UP_MAX]
            arguments = [[text_of(cells_of(key)[n]) for key in some] for n in range(len(w.key))]
            listed = ", ".join(f"v{n}" for n in range(len(w.key)))
            arrays = ", ".join(f"${n + 1}::text[]" for n in range(len(w.key)))
            join = " AND ".join(f"t.{quoted(name)} = x.v{n}::{w.types[name]}" for n, name in enumerate(w.key))
            now = dict.fromkeys(some, NONE)
            for record in await self._conn.fetch(
                f"SELECT x.n, {self.state_sql(table, 't')} AS state FROM unnest({arrays}) "
                f"WITH ORDINALITY x({listed}, n) JOIN {w.sql_name} t ON {join}",
                *arguments,
            ):
                now[some[record["n"] - 1]] = record["state"]
            if len(cache) > CACHE_MAX:
                cache.clear()
            cache.update(now)
            found.update(now)
        return found

    def _has_exact_key(self, w: TableWriter) -> bool:
        return all(is_exact(base_type(w.types[name])) for name in w.key)

    def remember(self, table: TableName, rows: Iterable[Cells], owned: Mapping[Key, Cells]) -> None:
        """The cache says of these rows that they are there."""
        w = self._writer.of[table]
        if not w.key:
            return
        get = getter(w, w.key)
        places = self._places(table)
        for cells in rows:
            key = get(cells)
            state = OWNED if key in owned else SHARED
            for place, of in places:
                self.cache[place][of(cells)] = state

    def _places(self, table: TableName) -> list[tuple[tuple[str, ...], Callable[[Cells], Ref]]]:
        w = self._writer.of[table]
        found = {own_place(table, w.key): getter(w, w.key)} if w.key else {}
        for ref in (*self._refs.down[table], *self._refs.brought[table]):
            if ref.exact:
                found[place_of(ref)] = getter(w, ref.edge.parent_columns)
        return list(found.items())

    def forget_refs(self, table: TableName) -> None:
        """References whose texts may differ though they are equal cannot be kept up to date by text."""
        for ref in (*self._refs.down[table], *self._refs.brought[table]):
            if not ref.exact:
                self.cache[place_of(ref)].clear()

    def forget_table(self, table: TableName) -> None:
        w = self._writer.of[table]
        if w.key:
            self.cache.pop(own_place(table, w.key), None)
        for ref in (*self._refs.down[table], *self._refs.brought[table]):
            self.cache.pop(place_of(ref), None)

    def forget(self) -> None:
        """The target was written to by somebody else: nothing is known of it."""
        self.cache.clear()

    async def upsert(self, table: TableName, rows: Sequence[Cells]) -> None:
        if not rows:
            return
        missing = await self._writer.upsert(table, rows)
        w = self._writer.of[table]
        self.touched(table, map(getter(w, w.key), rows))
        if missing:
            found = await self.read_keys(table, missing)
            await self._writer.upsert(table, list(found.values()))

    async def copy(self, table: TableName, rows: Sequence[Cells]) -> None:
        """Rows that nobody has put here, of a table nothing hangs on."""
        await self._writer.copy(table, rows)
        w = self._writer.of[table]
        self.touched(table, map(getter(w, w.key), rows))

    async def delete(self, table: TableName, keys: Sequence[Key]) -> None:
        if not keys:
            return
        self.touched(table, await self._writer.delete(table, keys))
        if self._refs.is_inner(table):
            w = self._writer.of[table]
            for ref in (*self._refs.down[table], *self._refs.brought[table]):
                if ref.by_key and ref.exact:
                    cache = self.cache[place_of(ref)]
                    for key in keys:
                        cache[key] = NONE
                else:
                    self.cache[place_of(ref)].clear()
            cache = self.cache[own_place(table, w.key)]
            for key in keys:
                cache[key] = NONE
            if table in self._refs.mixed:
                await self.unshare(table, keys)

    async def unshare(self, table: TableName, keys: Sequence[Key]) -> None:
        w = self._writer.of[table]
        await self._conn.execute(
            f"DELETE FROM {MOVE_SCHEMA}.shared_row h USING {w.given_keys} "
            f"WHERE h.table_name = {literal(table)} AND h.key = {w.given_key_as_stored}",
            *key_columns(keys),
        )

    async def is_owned_now(self, table: TableName, keys: Sequence[Key]) -> None:
        if keys and table in self._refs.mixed:
            await self.unshare(table, keys)

    async def share(self, table: TableName, rows: Sequence[Cells]) -> None:
        """Note that rows of a table that also has owned ones are only referred to."""
        w = self._writer.of[table]
        await self._conn.execute(
            f"INSERT INTO {MOVE_SCHEMA}.shared_row (table_name, key) "
            f"SELECT {literal(table)}, {w.given_key_as_stored} FROM {w.given_keys} ON CONFLICT DO NOTHING",
            *[[text_of(cells[n] or NULL) for cells in rows] for n in w.key_at],
        )

    async def read_keys(self, table: TableName, keys: Sequence[Key]) -> dict[Key, Cells]:
        """The rows with these keys as the source has them now."""
        return await read_keys(self._reader, self._writer.of[table], keys)
