"""PostgreSQL's logical replication messages, as the output plugin pgoutput (protocol 1) writes them.

A row is a list of *cells*: the column's length in 4 bytes and its text, just as COPY BINARY wants a column of
type text, so that a row travels to the target without being looked at twice. `NULL` is the cell of a null;
None stands for a TOAST value that the update did not touch and that the source therefore does not send.

Values come as text, not in binary (`binary 'false'`): the binary form of an array, composite or range of a
type that users made carries the OID that the type has on the source, and the target's is another one; a text
is right for each type, version and encoding.

Source: PostgreSQL, "Logical Replication Message Formats".
"""

import struct
from typing import Final, TypeAlias

import msgspec

from fleetlift.core.errors import BadInput

Cells: TypeAlias = list[bytes | None]

NULL: Final = b"\xff\xff\xff\xff"
_TEXT, _NULL, _SAME = ord("t"), ord("n"), ord("u")
_NEW, _KEY, _OLD = ord("N"), ord("K"), ord("O")

BEGIN, COMMIT, RELATION, TYPE, ORIGIN, MESSAGE = b"B"[0], b"C"[0], b"R"[0], b"Y"[0], b"O"[0], b"M"[0]
INSERT, UPDATE, DELETE, TRUNCATE = b"I"[0], b"U"[0], b"D"[0], b"T"[0]


class BadMessage(BadInput):
    """Bytes that are no message of pgoutput's protocol 1 with values as text."""


class Begin(msgspec.Struct, frozen=True, gc=False):
    """`lsn`: of the commit record. `at_us`: the source's clock at the commit, since 2000."""

    lsn: int
    at_us: int
    xid: int


class Commit(msgspec.Struct, frozen=True, gc=False):
    """`end_lsn`: behind the commit record; a slot confirmed up to there does not send it again."""

    lsn: int
    end_lsn: int
    at_us: int
    flags: int = 0


class RelationColumn(msgspec.Struct, frozen=True, gc=False):
    name: str
    type_oid: int
    modifier: int
    key: bool  # part of the replica identity


class Relation(msgspec.Struct, frozen=True):
    """`identity`: `relreplident`. Sent before a table's first change, and again when its definition
    changed."""

    id: int
    schema: str
    name: str
    identity: str
    columns: tuple[RelationColumn, ...]


class Insert(msgspec.Struct, frozen=True):
    relation: int
    new: Cells


class Update(msgspec.Struct, frozen=True):
    """`old_kind`: "" when no identity column changed, "K": `old` has the identity's columns, "O": all."""

    relation: int
    new: Cells
    old_kind: str = ""
    old: Cells | None = None


class Delete(msgspec.Struct, frozen=True):
    relation: int
    old_kind: str
    old: Cells


class Truncate(msgspec.Struct, frozen=True):
    relations: tuple[int, ...]
    options: int


class Logical(msgspec.Struct, frozen=True, gc=False):
    """What `pg_logical_emit_message` wrote."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class Type(msgspec.Struct, frozen=True, gc=False):
    oid: int
    schema: str
    name: str


class Origin(msgspec.Struct, frozen=True, gc=False):
    lsn: int
    name: str


Message: TypeAlias = Begin | Commit | Relation | Insert | Update | Delete | Truncate | Logical | Type | Origin

_SIZE = struct.Struct(">I").unpack_from
_BEGIN = struct.Struct(">QqI")
_COMMIT = struct.Struct(">BQQq")


def cell(text: str | bytes | None) -> bytes:
    """The cell of a value."""
    if text is None:
        return NULL
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(4, "big") + raw


def text_of(value: bytes) -> str | None:
    """The value of a cell; None: null."""
    return None if value == NULL else value[4:].decode()


def read_row(data: bytes, at: int) -> tuple[Cells, int]:
    """The row that begins at `at`, and where it ends. Past the end of `data`: it is cut off; the caller
    compares (one comparison a message, not one a column)."""
    count = (data[at] << 8) | data[at + 1]
    at += 2
    cells: Cells = []
    for _ in range(count):
        kind = data[at]
        if kind == _TEXT:
            end = at + 5 + _SIZE(data, at + 1)[0]
            cells.append(data[at + 1 : end])
            at = end
        elif kind == _NULL:
            cells.append(NULL)
            at += 1
        elif kind == _SAME:
            cells.append(None)
            at += 1
        else:
            raise BadMessage(f"a column's value is of kind {kind}: expected t, n or u")
    return cells, at


def read_insert(data: bytes) -> Cells:
    """The row of an Insert message."""
    try:
        if data[5] != _NEW:
            raise BadMessage("an insert has no new row")
        cells, end = read_row(data, 6)
    except (IndexError, struct.error):
        raise BadMessage("an insert is cut off") from None
    if end != len(data):
        raise BadMessage("an insert does not end where its row ends")
    return cells


def read_update(data: bytes) -> tuple[str, Cells | None, Cells]:
    """Kind of the old row, the old row, the new row of an Update message."""
    try:
        kind, at, old = "", 5, None
        if data[5] in (_KEY, _OLD):
            kind = chr(data[5])
            old, at = read_row(data, 6)
        if data[at] != _NEW:
            raise BadMessage("an update has no new row")
        new, end = read_row(data, at + 1)
    except (IndexError, struct.error):
        raise BadMessage("an update is cut off") from None
    if end != len(data):
        raise BadMessage("an update does not end where its row ends")
    return kind, old, new


def read_delete(data: bytes) -> tuple[str, Cells]:
    """Kind of the old row and the old row of a Delete message."""
    try:
        if data[5] not in (_KEY, _OLD):
            raise BadMessage("a delete has no old row")
        old, end = read_row(data, 6)
    except (IndexError, struct.error):
        raise BadMessage("a delete is cut off") from None
    if end != len(data):
        raise BadMessage("a delete does not end where its row ends")
    return chr(data[5]), old


def decode(data: bytes) -> Message:
    """One message. Raises BadMessage."""
    if not data:
        raise BadMessage("an empty message")
    try:
        found = _decode(data)
    except (IndexError, struct.error, ValueError) as problem:
        raise BadMessage(f"a message of kind {data[:1]!r} is malformed: {problem}") from None
    return found


def _decode(data: bytes) -> Message:
    kind = data[0]
    if kind == INSERT:
        return Insert(_uint(data, 1), read_insert(data))
    if kind == UPDATE:
        old_kind, old, new = read_update(data)
        return Update(_uint(data, 1), new, old_kind, old)
    if kind == DELETE:
        old_kind, gone = read_delete(data)
        return Delete(_uint(data, 1), old_kind, gone)
    if kind == BEGIN:
        return Begin(*_BEGIN.unpack(data[1:]))
    if kind == COMMIT:
        flags, lsn, end_lsn, at_us = _COMMIT.unpack(data[1:])
        return Commit(lsn, end_lsn, at_us, flags)
    if kind == RELATION:
        return _relation(data)
    if kind == TRUNCATE:
        (count, options) = struct.unpack_from(">IB", data, 1)
        _ends(data, 6 + 4 * count)
        return Truncate(struct.unpack_from(f">{count}I", data, 6), options)
    if kind == MESSAGE:
        flags, lsn = struct.unpack_from(">BQ", data, 1)
        if flags > 1:
            raise BadMessage(f"unknown flags {flags} of a message")
        prefix, at = _string(data, 10)
        size = _uint(data, at)
        _ends(data, at + 4 + size)
        return Logical(bool(flags), lsn, prefix, data[at + 4 :])
    if kind == TYPE:
        schema, at = _string(data, 5)
        name, at = _string(data, at)
        _ends(data, at)
        return Type(_uint(data, 1), schema, name)
    if kind == ORIGIN:
        (lsn,) = struct.unpack_from(">Q", data, 1)
        name, at = _string(data, 9)
        _ends(data, at)
        return Origin(lsn, name)
    raise BadMessage(f"an unknown kind of message: {data[:1]!r}")


def _relation(data: bytes) -> Relation:
    schema, at = _string(data, 5)
    name, at = _string(data, at)
    identity, (count,) = chr(data[at]), struct.unpack_from(">H", data, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        flags = data[at]
        if flags > 1:
            raise BadMessage(f"unknown flags {flags} of a column")
        column, at = _string(data, at + 1)
        oid, modifier = struct.unpack_from(">Ii", data, at)
        at += 8
        columns.append(RelationColumn(column, oid, modifier, bool(flags)))
    _ends(data, at)
    return Relation(_uint(data, 1), schema or "pg_catalog", name, identity, tuple(columns))


def encode(message: Message) -> bytes:
    """The message's bytes, for tests and for tools that play one."""
    match message:
        case Insert():
            return b"I" + _u4(message.relation) + b"N" + _row(message.new)
        case Update():
            old = b"" if message.old is None else message.old_kind.encode() + _row(message.old)
            return b"U" + _u4(message.relation) + old + b"N" + _row(message.new)
        case Delete():
            return b"D" + _u4(message.relation) + message.old_kind.encode() + _row(message.old)
        case Begin():
            return b"B" + _BEGIN.pack(message.lsn, message.at_us, message.xid)
        case Commit():
            return b"C" + _COMMIT.pack(message.flags, message.lsn, message.end_lsn, message.at_us)
        case Relation():
            columns = b"".join(
                bytes((c.key,)) + c.name.encode() + b"\0" + struct.pack(">Ii", c.type_oid, c.modifier)
                for c in message.columns
            )
            head = message.schema.encode() + b"\0" + message.name.encode() + b"\0"
            tail = message.identity.encode("latin-1") + struct.pack(">H", len(message.columns))
            return b"R" + _u4(message.id) + head + tail + columns
        case Truncate():
            count = len(message.relations)
            return b"T" + struct.pack(f">IB{count}I", count, message.options, *message.relations)
        case Logical():
            head = struct.pack(">BQ", message.transactional, message.lsn)
            return b"M" + head + message.prefix.encode() + b"\0" + cell(message.content)
        case Type():
            return b"Y" + _u4(message.oid) + message.schema.encode() + b"\0" + message.name.encode() + b"\0"
        case Origin():
            return b"O" + message.lsn.to_bytes(8, "big") + message.name.encode() + b"\0"


def _row(cells: Cells) -> bytes:
    parts = [len(cells).to_bytes(2, "big")]
    for value in cells:
        parts.append(b"u" if value is None else b"n" if value == NULL else b"t" + value)
    return b"".join(parts)


def _u4(number: int) -> bytes:
    return number.to_bytes(4, "big")


def _uint(data: bytes, at: int) -> int:
    found: int = struct.unpack_from(">I", data, at)[0]
    return found


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode(), end + 1


def _ends(data: bytes, at: int) -> None:
    if at != len(data):
        raise BadMessage(f"a message of kind {data[:1]!r} has {len(data)} bytes: expected {at}")


def lsn_text(lsn: int) -> str:
    """`16/B374D848`, as PostgreSQL writes it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def lsn_of(text: str) -> int:
    """`16/B374D848` → its number. Raises BadInput."""
    try:
        high, low = text.split("/")
        return (int(high, 16) << 32) | int(low, 16)
    except ValueError:
        raise BadInput(
            f"{text!r} is no position in a write-ahead log: expected such as 16/B374D848"
        ) from None
