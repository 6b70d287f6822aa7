"""What a batch of whole transactions comes to: the last version of each row, by key.

A row is told by its key at the end of the batch; what lay in between is not applied. An update that changes
the key takes the old key's row away and leaves the new key's. A TOAST value that an update did not touch is
taken from an earlier version in the batch; where there is none it stays a hole (None), which the target's
row fills. Tables without a key have no net effect: their rows go in and out one by one, in order, each with
the transaction that did it.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Final, TypeAlias

import msgspec

from fleetlift.core.tenant.pgoutput import (
    DELETE,
    INSERT,
    NULL,
    UPDATE,
    BadMessage,
    Cells,
    Relation,
    read_delete,
    read_insert,
    read_update,
)
from fleetlift.core.tenant.schema import Table, TableName

ROW_KINDS: Final = frozenset((INSERT, UPDATE, DELETE))

Key: TypeAlias = bytes | tuple[bytes, ...]
"""The cell of a key of one column, or the cells of one of several, in the key's order."""


class Differs(Exception):
    """The table that the stream describes is not the one the move began with. The text says how."""


def key_of(columns: tuple[int, ...]) -> Callable[[Cells], Key]:
    """Takes a row's key out of its cells."""
    getter: Callable[[Cells], Key] = itemgetter(*columns)
    return getter


def cells_of(key: Key) -> tuple[bytes, ...]:
    """The cells of a key, one or several."""
    return key if isinstance(key, tuple) else (key,)


class Layout:
    """How the rows that the stream sends for one relation (a table, or a partition of it) are read."""

    def __init__(self, relation: Relation, table: Table, key: Sequence[str]) -> None:
        """`key`: the columns by which rows are told; () for none. Raises Differs when columns were added,
        dropped or renamed since the move began, or when old rows come without the key."""
        sent = tuple(column.name for column in relation.columns)
        copied = table.copied
        if set(sent) != set(copied):
            new = ", ".join(sorted(set(sent) - set(copied)))
            gone = ", ".join(sorted(set(copied) - set(sent)))
            told = " and ".join(
                text for text in (new and f"has a new column {new}", gone and f"has lost {gone}") if text
            )
            raise Differs(f"{relation.schema}.{relation.name} {told}")
        self.table: TableName = table.name
        self.relation = relation
        self.columns = copied
        place = {name: at for at, name in enumerate(sent)}
        order = tuple(place[name] for name in copied)
        self._reorder: Callable[[Cells], tuple[bytes | None, ...]] | None = (
            None if order == tuple(range(len(order))) else itemgetter(*order)
        )
        self.mixed = self._reorder is not None
        self.key_columns = tuple(key)
        known = {column.name for column in relation.columns if column.key or relation.identity == "f"}
        if not set(key) <= known:
            raise Differs(
                f"{relation.schema}.{relation.name}: its old rows come without {', '.join(key)}; its REPLICA "
                "IDENTITY was changed"
            )
        at = {name: n for n, name in enumerate(copied)}
        self.key_at = tuple(at[name] for name in self.key_columns)
        self.key: Callable[[Cells], Key] | None = key_of(self.key_at) if self.key_at else None
        self.id = relation.id.to_bytes(4, "big")
        self.count = len(copied)

    def arranged(self, cells: Cells) -> Cells:
        """The row with its columns in the order of `table.copied`."""
        if len(cells) != self.count:
            raise BadMessage(f"a row of {self.table} has {len(cells)} columns: expected {self.count}")
        return cells if self._reorder is None else list(self._reorder(cells))


class Net(msgspec.Struct):
    """The net effect on a table with a key. `rows`: the last version, None: gone. `born`: keys whose first
    event in the batch was an insert, so that the row did not exist before. `moved`: keys that a row with
    holes has come to: its values are not those of whatever row the other side has under that key."""

    table: TableName
    rows: dict[Key, Cells | None]
    born: set[Key]
    moved: set[Key]
    holes: bool = False  # some row may have one

    @property
    def strange(self) -> list[Key]:
        """Keys of rows with holes that only the source can fill."""
        return [key for key in self.moved if None in (self.rows[key] or ())]


class RowOp(msgspec.Struct, frozen=True):
    """One row of a table without a key, put in or taken out by the transaction `xid`."""

    insert: bool
    cells: Cells
    xid: int


class Batch:
    """The changes since the last `clear`, and how many bytes they came in. Fed in the order of the log."""

    def __init__(self) -> None:
        self.nets: dict[TableName, Net] = {}
        self.ops: dict[TableName, list[RowOp]] = {}
        self.changes = 0
        self.bytes = 0

    def clear(self) -> None:
        self.nets = {}
        self.ops = {}
        self.changes = 0
        self.bytes = 0

    def __bool__(self) -> bool:
        return self.changes > 0

    def take(
        self, messages: Sequence[bytes], at: int, layouts: Mapping[bytes, Layout], xid: int, changes_max: int
    ) -> int:
        """Take in the Insert, Update and Delete messages from `at` on, up to the first of another kind, or
        until there are `changes_max` changes; gives where it stopped. `layouts` are found by a relation's
        four bytes. Raises BadMessage."""
        end = min(len(messages), at + max(1, changes_max - self.changes))
        began, size, relation = at, 0, b""
        while at < end:
            data = messages[at]
            kind = data[0]
            if kind not in ROW_KINDS:
                break
            if data[1:5] != relation:
                relation = data[1:5]
                if relation not in layouts:
                    raise BadMessage("a change of a table that was not described")
                layout = layouts[relation]
                key_of = layout.key
                if key_of is not None:
                    net = self._net_of(layout.table)
                    rows, born = net.rows, net.born
            at += 1
            size += len(data)
            if key_of is None:
                self._add_op(layout, data, xid)
            elif kind == INSERT:
                cells = read_insert(data)
                if layout.mixed or len(cells) != layout.count:
                    cells = layout.arranged(cells)
                key = key_of(cells)
                before = len(rows)
                rows[key] = cells
                if len(rows) != before:
                    born.add(key)
            else:
                _change(net, layout, key_of, data)
        self.changes += at - began
        self.bytes += size
        return at

    def _net_of(self, table: TableName) -> Net:
        net = self.nets.get(table)
        if net is None:
            net = self.nets[table] = Net(table, {}, set(), set())
        return net

    def _add_op(self, layout: Layout, data: bytes, xid: int) -> None:
        ops = self.ops.setdefault(layout.table, [])
        kind = data[0]
        if kind == INSERT:
            ops.append(RowOp(True, layout.arranged(read_insert(data)), xid))
            return
        if kind == DELETE:
            old_kind, old = read_delete(data)
            new = None
        else:
            old_kind, before, new = read_update(data)
            old = before or []
        if old_kind != "O":
            raise Differs(
                f"{layout.table} has no key, and its old rows do not come: set REPLICA IDENTITY FULL"
            )
        old = layout.arranged(old)
        ops.append(RowOp(False, old, xid))
        if new is not None:
            cells = layout.arranged(new)
            _fill(cells, old)
            ops.append(RowOp(True, cells, xid))


def _change(net: Net, layout: Layout, key_of: Callable[[Cells], Key], data: bytes) -> None:
    """Take in an Update or Delete message."""
    rows = net.rows
    if data[0] == DELETE:
        _, old = read_delete(data)
        rows[key_of(layout.arranged(old))] = None
        return
    _, before, new = read_update(data)
    cells = layout.arranged(new)
    key = key_of(cells)
    was = key
    if before is not None:
        was = key_of(layout.arranged(before))
        if None in cells and layout.relation.identity == "f":
            _fill(cells, layout.arranged(before))
    if None in cells:
        net.holes = True
        earlier = rows.get(was)
        if earlier is not None:
            _fill(cells, earlier)
    if was != key:
        rows[was] = None
        if None in cells:
            net.moved.add(key)
    rows[key] = cells


def _fill(cells: Cells, earlier: Cells) -> None:
    """Values that did not change are those of the version before, where it has them."""
    for at, value in enumerate(cells):
        if value is None:
            cells[at] = earlier[at]


def copy_row(cells: Cells) -> bytes:
    """A row as COPY BINARY into columns of type text wants it. Holes go as NULL."""
    count = len(cells).to_bytes(2, "big")
    if None in cells:
        return count + b"".join(b"\xff\xff\xff\xff" if value is None else value for value in cells)
    return count + b"".join(cells)  # type: ignore[arg-type]


def copy_lines(rows: Sequence[Cells]) -> bytes:
    """Whole rows as COPY in its text format wants them, into columns of any type."""
    lines: list[bytes] = []
    add = lines.append
    nulls = 0
    for cells in rows:
        if NULL in cells:
            values = [b"\\N" if cell == NULL else cell[4:] for cell in cells]  # type: ignore[index]
            nulls += cells.count(NULL)
            add(b"\t".join(values))
        else:
            add(b"\t".join([cell[4:] for cell in cells]))  # type: ignore[index]
    add(b"")
    text = b"\n".join(lines)
    # One look at all of them: nothing but what was put in here may have a meaning of its own.
    if (
        text.count(b"\\") == nulls
        and text.count(b"\n") == len(rows)
        and b"\r" not in text
        and (not rows or text.count(b"\t") == len(rows) * (len(rows[0]) - 1))
    ):
        return text
    return b"".join(b"\t".join(map(_escaped, cells)) + b"\n" for cells in rows)


def _escaped(cell: bytes | None) -> bytes:
    if cell == NULL:
        return b"\\N"
    assert cell is not None
    value = cell[4:].replace(b"\\", b"\\\\")
    return value.replace(b"\t", b"\\t").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + b"\0" * 8
COPY_TAIL = b"\xff\xff"
