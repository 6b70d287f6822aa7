"""Rows that leave: what nothing on the target supports any more, rings included."""

from collections.abc import Mapping, Sequence

from fleetlift.core.tenant.changes import Key, cells_of
from fleetlift.core.tenant.pgoutput import Cells, text_of
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.tenant.apply import Writer, any_plan
from fleetlift.tenant.held import Held
from fleetlift.tenant.membership import matches, root_condition
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.reader import FETCH_KEYS
from fleetlift.tenant.reference import (
    Ref,
    Reference,
    References,
    array_text,
    count_of,
    getter,
    key_of,
    place_of,
    values_sql,
)


class Leaving:
    """Takes rows away with those of their descendants that nothing else supports."""

    def __init__(self, refs: References, held: Held, writer: Writer) -> None:
        self._refs = refs
        self._closure = refs.closure
        self._writer = writer
        self._conn = writer.conn
        self._held = held
        self.left = 0

    async def old_values(
        self, table: TableName, gone: Sequence[Key], staying: Mapping[Key, Cells]
    ) -> tuple[list[tuple[Reference, list[Ref]]], list[Cells]]:
        """By which values children may point at rows that go away or whose referred-to columns change; and
        the
        rows that change so. A declared foreign key lets no child behind: what it does comes by the stream, in
        the same transaction."""
        seeds: list[tuple[Reference, list[Ref]]] = []
        changed: dict[Key, Cells] = {}
        w = self._writer.of[table]
        for ref in self._refs.down[table]:
            if ref.edge.declared and ref.by_key and ref.exact:
                self._held.lost[place_of(ref)].update(gone)
                continue
            if ref.by_key:
                if gone:
                    seeds.append((ref, list(gone)))
                continue
            keys = [*gone, *staying]
            if not keys:
                continue
            get = getter(w, ref.edge.parent_columns)
            arguments = [[text_of(cells_of(key)[n]) for key in keys] for n in range(len(w.key))]
            arrays = ", ".join(f"${n + 1}::text[]" for n in range(len(w.key)))
            listed = ", ".join(f"v{n}" for n in range(len(w.key)))
            join = " AND ".join(f"t.{quoted(name)} = x.v{n}::{w.types[name]}" for n, name in enumerate(w.key))
            columns = ", ".join(f"t.{quoted(name)}::text" for name in ref.edge.parent_columns)
            values = []
            for record in await self._conn.fetch(
                f"SELECT x.n, ARRAY[{columns}] AS old FROM unnest({arrays}) WITH ORDINALITY x({listed}, n) "
                f"JOIN {w.sql_name} t ON {join}",
                *arguments,
            ):
                key = keys[record["n"] - 1]
                if None in record["old"]:
                    continue
                old = key_of(record["old"])
                if key in staying:
                    if get(staying[key]) == old:
                        continue
                    changed[key] = staying[key]
                values.append(old)
            if values:
                seeds.append((ref, values))
        return seeds, list(changed.values())

    async def leave(
        self, seeds: Sequence[tuple[Reference, Sequence[Ref]]], suspects: Mapping[TableName, Sequence[Key]]
    ) -> None:
        """Take away what these rows supported and nothing else does. `seeds`: values that children may
        point at
        and that are gone; `suspects`: rows whose own support has changed."""
        async with any_plan(self._conn):
            if not self._held.cand_made:
                await self._conn.execute(
                    "CREATE TEMP TABLE IF NOT EXISTS fl_cand (tab int, o oid, c tid, round int, "
                    "PRIMARY KEY (o, c)) ON COMMIT DELETE ROWS"
                )
                self._held.cand_made = True
            await self._conn.execute("TRUNCATE fl_cand")
            found: set[TableName] = set()
            for table, keys in suspects.items():
                await self._writer.stage_keys(table, keys)
                w = self._writer.of[table]
                if await self._candidates(
                    table,
                    f"SELECT {self._refs.number[table]}, t.tableoid, t.ctid, 0 FROM {w.sql_name} t "
                    f"JOIN {w.keys_query} s ON {w.key_matches}",
                ):
                    found.add(table)
            for ref, values in seeds:
                child = ref.edge.child
                for at in range(0, len(values), FETCH_KEYS):
                    some = values_sql(ref, values[at : at + FETCH_KEYS])
                    if await self._candidates(
                        child,
                        f"SELECT {self._refs.number[child]}, c.tableoid, c.ctid, 0 "
                        f"FROM {quoted_table(child)} c JOIN {some} ON "
                        f"{matches(self._closure, ref.edge, 'c', 'p')}",
                    ):
                        found.add(child)
            level, newest = 0, set(found)
            while newest:
                following: set[TableName] = set()
                for table in newest:
                    for ref in self._refs.down[table]:
                        child = ref.edge.child
                        if await self._candidates(
                            child,
                            f"SELECT {self._refs.number[child]}, c.tableoid, c.ctid, {level + 1} "
                            f"FROM fl_cand k JOIN {quoted_table(table)} p ON p.tableoid = k.o AND p.ctid "
                            "= k.c "
                            f"JOIN {quoted_table(child)} c ON {matches(self._closure, ref.edge, 'c', 'p')} "
                            f"WHERE k.tab = {self._refs.number[table]} AND k.round = {level}",
                        ):
                            following.add(child)
                level += 1
                newest = following
                found |= following
            if found:
                await self._keep_supported(found)
                await self._take_away(found)

    async def _candidates(self, table: TableName, query: str) -> int:
        return count_of(
            await self._conn.execute(
                f"INSERT INTO fl_cand {query.replace('SELECT', 'SELECT DISTINCT', 1)} ON CONFLICT DO NOTHING"
            )
        )

    async def _keep_supported(self, found: set[TableName]) -> None:
        changed = True
        while changed:
            changed = False
            for table in sorted(found, key=self._refs.number.__getitem__):
                ways = [
                    f"EXISTS (SELECT 1 FROM {quoted_table(ref.edge.parent)} p "
                    f"WHERE {matches(self._closure, ref.edge, 'c', 'p')} AND NOT EXISTS "
                    "(SELECT 1 FROM fl_cand q WHERE q.o = p.tableoid AND q.c = p.ctid)"
                    + (
                        f" AND NOT {self._held.is_shared_sql(ref.edge.parent, 'p')}"
                        if ref.edge.parent in self._refs.mixed
                        else ""
                    )
                    + ")"
                    for ref in self._refs.own[table]
                ]
                if table == self._closure.root.table:
                    ways.append(root_condition(self._closure, "c"))
                if not ways:
                    continue
                done = count_of(
                    await self._conn.execute(
                        f"DELETE FROM fl_cand k USING {quoted_table(table)} c WHERE k.tab = "
                        f"{self._refs.number[table]} "
                        f"AND c.tableoid = k.o AND c.ctid = k.c AND ({' OR '.join(ways)})"
                    )
                )
                changed = changed or (done > 0 and bool(self._refs.down[table]))

    async def _take_away(self, found: set[TableName]) -> None:
        for table in found & self._refs.mixed:
            await self._stay_shared(table)
        for table in found:
            w = self._writer.of[table]
            key = w.key_array if w.key else "NULL::text[]"
            records = await self._conn.fetch(
                f"DELETE FROM {w.sql_name} t USING fl_cand k WHERE k.tab = {self._refs.number[table]} "
                f"AND t.tableoid = k.o AND t.ctid = k.c RETURNING {key} AS key"
            )
            self.left += len(records)
            keys = [key_of(record["key"]) for record in records] if w.key else []
            if records:
                self._held.touched(table, keys)
            if keys and table in self._refs.mixed:
                await self._held.unshare(table, keys)
            if records and self._refs.is_inner(table):
                self._held.forget_table(table)

    async def _stay_shared(self, table: TableName) -> None:
        """Rows that leave but that coming rows still refer to by a COPY edge become shared ones."""
        w = self._writer.of[table]
        changed = True
        while changed:
            changed = False
            for ref in self._refs.brought[table]:
                child = ref.edge.child
                records = await self._conn.fetch(
                    f"DELETE FROM fl_cand k USING {w.sql_name} t WHERE k.tab = {self._refs.number[table]} "
                    "AND t.tableoid = k.o AND t.ctid = k.c AND EXISTS "
                    f"(SELECT 1 FROM {quoted_table(child)} c WHERE "
                    f"{matches(self._closure, ref.edge, 'c', 't')} "
                    "AND NOT EXISTS (SELECT 1 FROM fl_cand q WHERE q.o = c.tableoid AND q.c = c.ctid)) "
                    f"RETURNING {w.key_array} AS key"
                )
                if records:
                    changed = True
                    await self._conn.execute(
                        f"INSERT INTO {MOVE_SCHEMA}.shared_row (table_name, key) "
                        "SELECT $1, x.key::text[] FROM unnest($2::text[]) x(key) ON CONFLICT DO NOTHING",
                        table,
                        [array_text(record["key"]) for record in records],
                    )
                    self._held.forget_table(table)
