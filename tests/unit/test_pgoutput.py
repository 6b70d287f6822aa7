"""Messages of logical replication, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant import pgoutput
from fleetlift.core.tenant.pgoutput import (
    NULL,
    BadMessage,
    Begin,
    Commit,
    Delete,
    Insert,
    Logical,
    Origin,
    Relation,
    RelationColumn,
    Truncate,
    Type,
    Update,
    cell,
    decode,
    encode,
    lsn_of,
    lsn_text,
)

U4 = st.integers(0, 2**32 - 1)
U8 = st.integers(0, 2**64 - 1)
I8 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
ROWS = st.lists(st.none() | st.just(NULL) | st.binary(max_size=40).map(cell), max_size=8)
COLUMNS = st.builds(RelationColumn, NAMES, U4, st.integers(-(2**31), 2**31 - 1), st.booleans())
MESSAGES = st.one_of(
    st.builds(Begin, U8, I8, U4),
    st.builds(Commit, U8, U8, I8, st.integers(0, 255)),
    st.builds(Relation, U4, NAMES, NAMES, st.sampled_from("dnfi"), st.lists(COLUMNS, max_size=5).map(tuple)),
    st.builds(Insert, U4, ROWS),
    st.builds(Update, U4, ROWS),
    st.builds(Update, U4, ROWS, st.sampled_from("KO"), ROWS),
    st.builds(Delete, U4, st.sampled_from("KO"), ROWS),
    st.builds(Truncate, st.lists(U4, max_size=4).map(tuple), st.integers(0, 3)),
    st.builds(Logical, st.booleans(), U8, NAMES, st.binary(max_size=30)),
    st.builds(Type, U4, NAMES, NAMES),
    st.builds(Origin, U8, NAMES),
)


@given(MESSAGES)
def test_what_is_written_is_read_again(message: pgoutput.Message) -> None:
    assert decode(encode(message)) == message


@given(MESSAGES, st.data())
def test_a_message_cut_anywhere_is_refused(message: pgoutput.Message, data: st.DataObject) -> None:
    """No prefix of a message passes for one; a reader never takes half a row for a row."""
    raw = encode(message)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(BadMessage):
        decode(raw[:cut])


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        found = decode(data)
    except BadMessage:
        return
    assert decode(encode(found)) == found


def test_binary_values_are_refused() -> None:
    """They would be stored as if they were text."""
    with pytest.raises(BadMessage, match="kind 98"):
        decode(b"I\0\0\0\x01N\0\x01b\0\0\0\x01x")


@given(U8)
def test_positions_are_written_as_postgresql_writes_them(lsn: int) -> None:
    assert lsn_of(lsn_text(lsn)) == lsn
    assert lsn_text(0x16B374D848) == "16/B374D848"


@pytest.mark.parametrize("text", ["", "1", "x/y", "1/2/3"])
def test_no_position_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="write-ahead log"):
        lsn_of(text)
