"""Which of the changed rows are the tenant's, and what else comes or goes with them.

The target is the index: a changed row is owned when the row that one of its OWN edges points at is on the
target and owned there. A batch is applied as a whole, tables in the closure's order, parents first:

- A row that is owned is put in. If it was not owned before, it *enters*: its descendants by OWN edges are
  fetched from the source.
- A row that is not (any more) is taken away, with those of its descendants that nothing else supports:
  first all descendants are candidates, then whoever is supported from outside the candidates is kept, again
  and again. So a ring of rows that support only one another goes too.
- What a coming row refers to by a COPY edge is fetched from the source if it is not there. Rows that are
  only referred to are kept apart in `fleetlift_move.shared_row` where their table has owned ones as well.

What is fetched may be newer than the batch. Every later change of it comes by the stream and is applied on
top, so the target is right once all is applied up to where the source was when it was read (`fresh_until`).
A commit can be in the log before it is visible; what is fetched is therefore read in a snapshot that shows
every transaction applied so far.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.changes import Batch, Key, Net, RowOp, cells_of
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.pgoutput import NULL, Cells, cell
from fleetlift.core.tenant.schema import TableName
from fleetlift.tenant.apply import TableWriter, Writer
from fleetlift.tenant.entering import Entering
from fleetlift.tenant.held import NONE, OWNED, SHARED, Held
from fleetlift.tenant.leaving import Leaving
from fleetlift.tenant.membership import literal, root_condition
from fleetlift.tenant.reader import Reader, is_visible
from fleetlift.tenant.reference import Ref, Reference, References, Where, getter, key_of, place_of
from fleetlift.tenant.tidying import Tidying


class Members:
    """Applies batches with their memberships. One for the life of the connections it uses."""

    def __init__(
        self,
        closure: Closure,
        writer: Writer,
        reader: Reader,
        touched: Callable[[TableName, Iterable[Key]], None],
    ) -> None:
        self._closure = closure
        self._reader = reader
        self._writer = writer
        self._conn = writer.conn
        self._refs = References(closure, writer)
        self._held = Held(self._refs, writer, reader, touched)
        self._entering = Entering(self._refs, self._held, writer, reader)
        self._leaving = Leaving(self._refs, self._held, writer)
        self._tidying = Tidying(self._refs, self._held, writer)
        self._root_cell = cell(closure.root.value)
        self._root_key: Key | None = None
        self.ahead = False  # rows may be there that come after what is applied
        self.unsettled = False  # a row may be there, written by others, without what hangs on it

    async def start(self) -> None:
        """Find the root row."""
        root = self._closure.root
        w = self._writer.of[root.table]
        type_ = w.table.column(root.column).type
        value = await self._conn.fetchval(f"SELECT ({literal(root.value)}::{type_})::text")
        self._root_cell = cell(value)
        row = await self._conn.fetchrow(
            f"SELECT {w.key_array} AS key FROM {w.sql_name} t WHERE {root_condition(self._closure, 't')}"
        )
        self._root_key = key_of(row["key"]) if row else None

    # --- beside the batches

    async def tidy(self) -> int:
        """Take away all that nothing on the target supports or refers to any more; how many rows went."""
        return await self._tidying.tidy()

    async def mark_shared(self) -> None:
        """Note which rows of tables that also have owned ones are only referred to, after the copy."""
        await self._tidying.mark_shared()

    async def read_keyless_anew(self) -> None:
        """Read rows without a key again, where they may have been copied from several snapshots."""
        await self._entering.read_keyless_anew()

    def forget(self) -> None:
        """The target was written to by somebody else: nothing is known of it."""
        self._held.forget()

    def end_transaction(self) -> None:
        """What was applied is committed."""
        self._held.lost.clear()

    def take_counts(self) -> tuple[int, int]:
        """How many rows entered and left since the last time."""
        counts = self._entering.entered, self._leaving.left
        self._entering.entered = self._leaving.left = 0
        return counts

    # --- a batch

    async def apply(self, batch: Batch, *, whole: bool) -> None:
        """Apply all of it. `whole`: it holds whole transactions; else a piece of one."""
        self._entering.fetched.clear()
        done: set[TableName] = set()
        for table in self._closure.order:
            if table in done:
                continue
            group = self._refs.group.get(table, (table,))
            done.update(group)
            nets = [batch.nets[t] for t in group if t in batch.nets]
            for net in nets:
                await self._fill_moved(net)
            if nets:
                part = self._closure.parts[table]
                if part is Part.WHOLE:
                    await self._apply_whole(nets[0])
                elif part is Part.SHARED:
                    await self._apply_shared(nets[0])
                else:
                    await self._apply_owned(group, nets, whole)
            for t in group:
                if batch.ops.get(t):
                    await self._apply_ops(t, batch.ops[t])
        await self._entering.bring_ancestors()

    async def _apply_whole(self, net: Net) -> None:
        rows = [cells for cells in net.rows.values() if cells is not None]
        gone = [key for key, cells in net.rows.items() if cells is None]
        await self._held.delete(net.table, gone)
        await self._held.upsert(net.table, rows)
        self._entering.note_up(net.table, rows)

    async def _apply_shared(self, net: Net) -> None:
        """A row that somebody refers to stays up to date; who newly refers to one brings it later."""
        state = await self._held.states(net.table, net.rows)
        there = [cells for key, cells in net.rows.items() if cells is not None and state[key] != NONE]
        gone = [key for key, cells in net.rows.items() if cells is None and state[key] != NONE]
        await self._held.delete(net.table, gone)
        await self._held.upsert(net.table, there)
        self._entering.note_up(net.table, there)

    async def _apply_ops(self, table: TableName, ops: Sequence[RowOp]) -> None:
        part = self._closure.parts[table]
        fresh = await self._entering.fresh(table)
        everything = fresh.get(("", ()), [])
        if part is Part.WHOLE:
            chosen = [op for op in ops if not any(is_visible(op.xid, snapshot) for snapshot in everything)]
            self._held.touched(table, ())
        else:
            by = self._refs.own[table]
            await self._held.know(table, (op.cells for op in ops))
            chosen = []
            for op in ops:
                refs = [(ref, value) for ref in by if (value := ref.of(op.cells)) is not None]
                if not any(
                    self._held.known(ref, value) == OWNED
                    or (not op.insert and value in self._held.lost.get(place_of(ref), ()))
                    for ref, value in refs
                ):
                    continue
                self._held.touched(table, ())  # also when it is left out: that it was read has to be true
                seen = [snapshot for ref, value in refs for snapshot in fresh.get((ref.edge.name, value), ())]
                seen += everything
                if any(is_visible(op.xid, snapshot) for snapshot in seen):
                    continue
                chosen.append(op)
        await self._writer.play(table, chosen)
        self._entering.note_up(table, [op.cells for op in chosen if op.insert])

    async def _apply_owned(self, group: Sequence[TableName], nets: Sequence[Net], whole: bool) -> None:
        if len(group) == 1 and group[0] not in self._refs.group and not self._refs.is_inner(group[0]):
            await self._apply_leaf(nets[0])
            return
        await self._apply_inner(group, nets, whole)

    async def _apply_leaf(self, net: Net) -> None:
        """A table nothing else hangs on: the many rows."""
        table, rows, born = net.table, net.rows, net.born
        own = self._refs.own[table]
        w = self._writer.of[table]
        in_key = all(n in w.key_at for ref in own for n in ref.reads)
        await self._fill_refs(net, {n for ref in own for n in ref.reads})
        if len(own) == 1 and own[0].plain and born.issuperset(rows):
            # The usual case, and the most rows: new ones, by one reference of one column.
            (at,) = own[0].at
            coming = [cells for cells in rows.values() if cells is not None]
            await self._held.know(table, coming)
            cache = self._held.cache[place_of(own[0])]
            coming = [cells for cells in coming if cache.get(cells[at]) == OWNED]  # type: ignore[arg-type]
            # One that came and went may have been read in between, with what entered or by a repair.
            await self._held.delete(table, [key for key, cells in rows.items() if cells is None])
            if self.ahead or self._reader.is_open or self._writer.careful:
                await self._held.upsert(table, coming)  # they may have been read as well
            else:
                await self._held.copy(table, coming)
            self._entering.note_up(table, coming)
            return
        if in_key:
            # The key tells whose a row is, also of a row that is gone.
            pairs = [(key, cells, cells or self._from_key(w, key)) for key, cells in rows.items()]
        else:
            pairs = [(key, cells, cells) for key, cells in rows.items()]  # type: ignore[misc]
        await self._held.know(table, (basis for _, _, basis in pairs if basis is not None))
        caches = [(ref.of, self._held.cache[place_of(ref)]) for ref in own]
        lost = [(ref.of, self._held.lost[place_of(ref)]) for ref in own if self._held.lost.get(place_of(ref))]
        keep: list[Cells] = []
        gone: list[Key] = []
        for key, cells, basis in pairs:
            owned = False
            if basis is not None:
                for of, cache in caches:
                    value = of(basis)
                    if value is not None and cache.get(value) == OWNED:
                        owned = True
                        break
            if owned and cells is not None:
                keep.append(cells)
            elif cells is None and key in born:
                gone.append(key)  # it came and went, and may have been read in between, with what entered
            elif owned or (not in_key and key not in born):
                gone.append(key)
            elif lost and basis is not None and any(of(basis) in refs for of, refs in lost):
                gone.append(key)  # it goes in the same transaction as what it belonged to
        await self._held.delete(table, gone)
        await self._held.upsert(table, keep)
        self._entering.note_up(table, keep)

    async def _apply_inner(self, group: Sequence[TableName], nets: Sequence[Net], whole: bool) -> None:
        inside = set(group)
        before: dict[TableName, dict[Key, int]] = {}
        sure: dict[TableName, dict[Key, Cells]] = {}
        unsure: dict[TableName, dict[Key, Cells]] = {}
        gone: dict[TableName, list[Key]] = {}
        for net in nets:
            t = net.table
            await self._fill_refs(
                net,
                {n for ref in (*self._refs.own[t], *self._refs.up[t]) for n in ref.reads}
                | self._parent_at(t),
            )
            before[t] = await self._held.states(t, net.rows)
            await self._held.know(t, (cells for cells in net.rows.values() if cells is not None))
            outside = [ref for ref in self._refs.own[t] if ref.edge.parent not in inside]
            sure[t], unsure[t] = {}, {}
            gone[t] = [key for key, cells in net.rows.items() if cells is None]
            for key, cells in net.rows.items():
                if cells is not None:
                    is_sure = self._is_root(t, cells) or any(
                        (value := ref.of(cells)) is not None and self._held.known(ref, value) == OWNED
                        for ref in outside
                    )
                    (sure if is_sure else unsure)[t][key] = cells
            if t == self._closure.root.table and self._root_key is not None:
                root_row = net.rows.get(self._root_key, b"")
                if root_row is None or (root_row and self._root_key not in sure[t]):
                    raise Conflict(
                        f"the tenant's own row in {t} was deleted or is another one now: the move cannot "
                        "go on"
                    )
        owned = {t: dict(rows) for t, rows in sure.items()}
        if inside & set(self._refs.group):
            self._within(inside, nets, before, owned, unsure)
        seeds: list[tuple[Reference, list[Ref]]] = []
        suspects: dict[TableName, list[Key]] = {}
        entering: dict[TableName, list[Cells]] = {}
        for net in nets:
            t = net.table
            was = before[t]
            held_gone = [key for key in gone[t] if was[key] != NONE]
            leaving = [
                key
                for key in unsure[t]
                if was[key] == OWNED and (key not in owned[t] or t in self._refs.group)
            ]
            shared = [key for key in unsure[t] if was[key] == SHARED and key not in owned[t]]
            old, changed = await self._leaving.old_values(
                t, held_gone, {**{key: unsure[t][key] for key in leaving}, **owned[t]}
            )
            seeds += old
            put = [
                *owned[t].values(),
                *(unsure[t][key] for key in (*leaving, *shared) if key not in owned[t]),
            ]
            await self._held.delete(t, held_gone)
            await self._held.upsert(t, put)
            if leaving:
                suspects[t] = leaving
            self._entering.note_up(t, put)
            new = [key for key in owned[t] if self.unsettled or was[key] != OWNED]
            await self._held.is_owned_now(t, [key for key in owned[t] if was[key] == SHARED])
            entering[t] = [owned[t][key] for key in new]
            born = {id(owned[t][key]) for key in new if key in net.born} if whole else set()
            self._held.remember(t, put, owned[t])
            self._held.forget_refs(t)
            await self._entering.enter(t, [*entering[t], *changed], born)
        if seeds or suspects:
            await self._leaving.leave(seeds, suspects)
            for t in suspects:
                self._held.forget_table(t)

    def _within(
        self,
        inside: set[TableName],
        nets: Sequence[Net],
        before: Mapping[TableName, Mapping[Key, int]],
        owned: dict[TableName, dict[Key, Cells]],
        unsure: Mapping[TableName, Mapping[Key, Cells]],
    ) -> None:
        """Add to `owned` the rows that rows of the same cycle support: those of the batch that are owned, or
        those on the target that the batch does not touch."""
        by_net = {net.table: net for net in nets}
        where: dict[Where, set[Ref]] = {}
        touched: dict[Where, set[Ref]] = {}
        links = [ref for t in inside for ref in self._refs.own[t] if ref.edge.parent in inside]
        for ref in links:
            if ref.where in where:
                continue
            parent, columns = ref.where
            where[ref.where] = set()
            touched[ref.where] = set()
            if parent in by_net:
                get = getter(self._writer.of[parent], columns)
                where[ref.where] = {get(cells) for cells in owned[parent].values()}
                touched[ref.where] = {get(cells) for cells in unsure[parent].values()}
                if ref.by_key:
                    touched[ref.where] |= {key for key, cells in by_net[parent].rows.items() if cells is None}
        changed = True
        while changed:
            changed = False
            for t in by_net:
                for key, cells in unsure[t].items():
                    if key in owned[t]:
                        continue
                    for ref in self._refs.own[t]:
                        if ref.edge.parent not in inside:
                            continue
                        value = ref.of(cells)
                        if value is None:
                            continue
                        if value in where[ref.where] or (
                            value not in touched[ref.where] and self._held.known(ref, value) == OWNED
                        ):
                            owned[t][key] = cells
                            for place, found in where.items():
                                if place[0] == t:
                                    found.add(getter(self._writer.of[t], place[1])(cells))
                            changed = True
                            break

    # --- what is known

    def _is_root(self, table: TableName, cells: Cells) -> bool:
        root = self._closure.root
        return table == root.table and cells[self._writer.of[table].at[root.column]] == self._root_cell

    def _from_key(self, w: TableWriter, key: Key) -> Cells:
        cells: Cells = [NULL] * len(w.columns)
        for n, value in zip(w.key_at, cells_of(key), strict=True):
            cells[n] = value
        return cells

    def _parent_at(self, table: TableName) -> set[int]:
        w = self._writer.of[table]
        return {w.at[name] for ref in self._refs.down[table] for name in ref.edge.parent_columns}

    async def _fill_moved(self, net: Net) -> None:
        """Rows that have come to a key with values that the source did not send are read there."""
        if keys := net.strange:
            found = await self._held.read_keys(net.table, keys)
            net.rows.update((key, found.get(key)) for key in keys)

    async def _fill_refs(self, net: Net, at: Iterable[int]) -> None:
        """Where a value that decides is one that the source did not send, read the row."""
        if not net.holes:
            return
        wanted = set(at)
        holes = [
            key
            for key, cells in net.rows.items()
            if cells is not None and None in cells and any(cells[n] is None for n in wanted)
        ]
        if not holes:
            return
        for key, row in (await self._held.read_keys(net.table, holes)).items():
            net.rows[key] = row
        for key in holes:
            if None in (net.rows[key] or ()):
                net.rows[key] = None  # gone from the source meanwhile; the stream will say so
