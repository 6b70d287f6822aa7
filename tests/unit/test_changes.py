"""What a batch of changes comes to."""

import re

from hypothesis import given
from hypothesis import strategies as st
from pytest import raises

from fleetlift.core.tenant.changes import Batch, Differs, Layout, RowOp, copy_lines, copy_row
from fleetlift.core.tenant.pgoutput import (
    NULL,
    Cells,
    Delete,
    Insert,
    Message,
    Relation,
    RelationColumn,
    Update,
    cell,
    encode,
)
from fleetlift.core.tenant.schema import Column, Table

TABLE = Table(
    name="public.t",
    columns=(
        *(Column(name=name, type="text") for name in ("id", "name", "big")),
        Column(name="made", type="text", generated="s"),
    ),
    key=("id",),
)


def _layout(*sent: str, key: tuple[str, ...] = ("id",), identity: str = "d") -> Layout:
    columns = tuple(RelationColumn(name, 25, -1, name in key) for name in sent or ("id", "name", "big"))
    return Layout(Relation(1, "public", "t", identity, columns), TABLE, key)


def _row(*values: str | None) -> Cells:
    """A row; "=": a value that was not touched."""
    return [None if value == "=" else cell(value) for value in values]


def _batch(*messages: Message, layout: Layout | None = None) -> Batch:
    batch = Batch()
    for message in messages:
        _add(batch, layout or _layout(), message, 7)
    return batch


def _add(batch: Batch, layout: Layout, message: Message, xid: int) -> None:
    assert batch.take([encode(message)], 0, {layout.id: layout}, xid, 1000) == 1


def test_the_last_version_of_a_row_counts() -> None:
    batch = _batch(
        Insert(1, _row("1", "a", "x")), Update(1, _row("1", "b", "=")), Update(1, _row("1", "c", "="))
    )
    net = batch.nets["public.t"]
    assert net.rows == {cell("1"): _row("1", "c", "x")}
    assert net.born == {cell("1")}


def test_a_moved_key_is_a_row_less_and_a_row_more() -> None:
    """The value that was not touched goes with it, where it is known."""
    batch = _batch(
        Update(1, _row("1", "b", "y")),
        Update(1, _row("2", "b", "="), "K", _row("1", None, None)),
        Update(1, _row("3", "b", "="), "K", _row("9", None, None)),
    )
    rows = batch.nets["public.t"].rows
    assert rows[cell("1")] is None and rows[cell("9")] is None
    assert rows[cell("2")] == _row("2", "b", "y")
    assert rows[cell("3")] == _row("3", "b", "=")
    assert not batch.nets["public.t"].born


def test_a_row_that_went_first_was_not_born_in_the_batch() -> None:
    batch = _batch(Delete(1, "K", _row("1", None, None)), Insert(1, _row("1", "a", "x")))
    assert batch.nets["public.t"].born == set()
    assert batch.nets["public.t"].rows == {cell("1"): _row("1", "a", "x")}


def test_columns_are_taken_by_name() -> None:
    """A partition may have them in another order."""
    batch = _batch(Insert(1, _row("x", "1", "a")), layout=_layout("big", "id", "name"))
    assert batch.nets["public.t"].rows == {cell("1"): _row("1", "a", "x")}


def test_rows_without_a_key_go_in_and_out_one_by_one() -> None:
    layout = _layout(key=(), identity="f")
    batch = _batch(
        Insert(1, _row("1", "a", "x")),
        Update(1, _row("1", "b", "="), "O", _row("1", "a", "x")),
        layout=layout,
    )
    a, b = _row("1", "a", "x"), _row("1", "b", "x")
    assert batch.ops["public.t"] == [RowOp(True, a, 7), RowOp(False, a, 7), RowOp(True, b, 7)]


def test_a_schema_that_has_changed_is_told() -> None:
    with raises(Differs, match="new column more"):
        _layout("id", "name", "big", "more")
    with raises(Differs, match="has lost big"):
        _layout("id", "name")
    with raises(Differs, match="without name"):
        Layout(
            Relation(
                1, "public", "t", "d", tuple(RelationColumn(n, 25, -1, n == "id") for n in TABLE.copied)
            ),
            TABLE,
            ("name",),
        )


@given(st.lists(st.lists(st.none() | st.text("ab\\\t\n\rN.ä\0", max_size=4), min_size=2, max_size=2)))
def test_rows_go_out_as_copy_text_wants_them(rows: list[list[str | None]]) -> None:
    """Each line a row, each field a value, whatever they hold. Source: PostgreSQL, COPY, "Text Format"."""
    lines = copy_lines([_row(*values) for values in rows]).decode().split("\n")
    assert lines.pop() == ""
    meant = {"\\": "\\", "t": "\t", "n": "\n", "r": "\r"}
    read = [
        [
            None if field == "\\N" else re.sub(r"\\(.)", lambda found: meant[found[1]], field)
            for field in line.split("\t")
        ]
        for line in lines
    ]
    assert read == rows


def test_a_row_goes_out_as_copy_binary_wants_it() -> None:
    assert copy_row(_row("1", None, "ab")) == b"\0\3" + b"\0\0\0\x011" + NULL + b"\0\0\0\x02ab"


KEYS = st.sampled_from("123")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), KEYS, KEYS),
        st.tuples(st.just("update"), KEYS, KEYS),
        st.tuples(st.just("delete"), KEYS, KEYS),
    ),
    max_size=12,
)


@given(st.dictionaries(KEYS, st.just("old")), STEPS)
def test_any_batch_comes_to_what_its_steps_come_to(
    start: dict[str, str], steps: list[tuple[str, str, str]]
) -> None:
    """Rows as a plain dict, changed step by step as a table would be; refused steps are not in the log."""
    rows: dict[str, tuple[str, str]] = {key: (value, "big" + key) for key, value in start.items()}
    first = dict(rows)
    batch = Batch()
    layout = _layout()
    for n, (step, key, other) in enumerate(steps):
        if step == "insert" and key not in rows:
            rows[key] = (f"new {n}", f"big {n}")
            _add(batch, layout, Insert(1, _row(key, *rows[key])), n)
        elif step == "update" and key in rows and (other == key or other not in rows):
            old = rows.pop(key)
            rows[other] = (f"changed {n}", old[1])
            moved = () if other == key else ("K", _row(key, None, None))
            _add(batch, layout, Update(1, _row(other, rows[other][0], "="), *moved), n)
        elif step == "delete" and key in rows:
            del rows[key]
            _add(batch, layout, Delete(1, "K", _row(key, None, None)), n)
    got = {cell(key): _row(key, *values) for key, values in first.items()}
    net = batch.nets.get("public.t")
    for at, cells in (net.rows if net else {}).items():
        assert isinstance(at, bytes)
        if net and at in net.born:
            assert at not in got
        if cells is None:
            got.pop(at, None)
        else:
            # A row that came to this key is not filled from the one that was here.
            before = None if net and at in net.strange else got.get(at)
            if None not in cells or before is not None:
                got[at] = [b if a is None else a for a, b in zip(cells, before or cells, strict=True)]
            else:
                got[at] = cells
    want = {cell(key): _row(key, *values) for key, values in rows.items()}
    assert set(got) == set(want)
    for at, row in got.items():
        # A hole after a moved key is filled from the source.
        assert all(a is None or a == b for a, b in zip(row, want[at], strict=True))


def test_a_row_that_takes_over_a_key_does_not_take_over_its_long_values() -> None:
    """Row 2 goes, row 1 becomes row 2, and its long value did not change: it is not the old row 2's."""
    batch, layout = Batch(), _layout()
    _add(batch, layout, Delete(1, "K", _row("2", None, None)), 1)
    _add(batch, layout, Update(1, _row("2", "moved", "="), "K", _row("1", None, None)), 1)
    net = batch.nets["public.t"]
    assert net.strange == [cell("2")]
    _add(batch, layout, Update(1, _row("2", "whole", "long")), 2)
    assert net.strange == []
