"""The wire format of the legacy backend: binary frames over TCP, as home-grown telemetry servers have them.

Without I/O: `encode(message)` gives the bytes of one frame, `Decoder.feed(bytes)` the messages that are
complete. `docs/legacy-protocol.md` is the same format byte by byte. All numbers are big-endian; times are
Unix milliseconds; JSON travels as the bytes that the sender wrote and is not parsed here.

A frame: magic "CL", version, type, flags (16 bits), body length (32 bits), body, CRC-32 of all before it.
"""

import struct
import zlib
from collections.abc import Callable
from enum import IntFlag, StrEnum
from typing import Any, NamedTuple, TypeVar

import msgspec

from fleetlift.core.errors import BadInput

MAGIC = b"CL"
VERSION = 1
MAX_BODY_BYTES = 1 << 20  # of any frame
MAX_TELEMETRY_BYTES = 256 * 1024  # of one telemetry body; a server refuses more
MAX_DOCUMENT_BYTES = 64 * 1024  # of any other JSON: configurations, reports, params, details, attributes
MAX_SEQ = (1 << 63) - 1  # what databases keep in a signed 64-bit column
FEED_FROM_NOW = MAX_SEQ  # as the position of FEED_FROM: only what comes after this request
MAX_ACKS = 1000  # entries a sender puts into one TELEMETRY_ACK

_HEADER = struct.Struct(">2sBBHI")
_U8 = struct.Struct(">B")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_I64 = struct.Struct(">q")
HEADER_BYTES = _HEADER.size
CHECKSUM_BYTES = _U32.size


class FrameFlag(IntFlag):
    MORE = 1  # of a list's page: another page follows after its last item


class FrameFault(StrEnum):
    MAGIC = "magic"
    VERSION = "version"
    FLAGS = "flags"
    OVERSIZE = "oversize"
    CHECKSUM = "checksum"
    TYPE = "type"
    FIELD = "field"  # the body does not hold what its type says


class BadFrame(BadInput):
    """What came is not a frame of this protocol. The stream cannot be read on: close the connection.

    `before` holds the messages of the same `feed` that were complete and good before the fault.
    """

    def __init__(self, fault: FrameFault, text: str, before: "tuple[Message, ...]" = ()) -> None:
        super().__init__(f"{text}; close the connection and sign in again")
        self.fault = fault
        self.before = before


class Mode(StrEnum):
    EXECUTE = "execute"
    DRY_RUN = "dry-run"


class ReplyStatus(StrEnum):
    """How a device answers a command. All but `acknowledged` are final."""

    ACKNOWLEDGED = "acknowledged"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    WOULD_EXECUTE = "would-execute"
    WOULD_REFUSE = "would-refuse"
    DUPLICATE = "duplicate"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        return self is not ReplyStatus.ACKNOWLEDGED


# ---- the device's side -------------------------------------------------------------------------------


class Login(msgspec.Struct, frozen=True):
    """Device → server, first on a connection. `key` is the device's secret."""

    device: str
    key: str
    firmware: str = ""

    def __repr__(self) -> str:  # the key stays out of logs and tracebacks
        return f"Login(device={self.device!r}, key='***', firmware={self.firmware!r})"


class LoginOk(msgspec.Struct, frozen=True):
    """The device is in. It must send something (a HEARTBEAT at least) every `heartbeat_s` seconds."""

    server_time_ms: int
    heartbeat_s: int


class LoginRefused(msgspec.Struct, frozen=True):
    """The server closes after this. `reason` is for people."""

    reason: str


class Telemetry(msgspec.Struct, frozen=True):
    """One message. `seq` counts per channel, 0 to 2**63-1; `body` is JSON."""

    channel: str
    seq: int
    ts_ms: int
    body: bytes


class Ack(msgspec.Struct, frozen=True):
    channel: str
    seq: int


class TelemetryAck(msgspec.Struct, frozen=True):
    """The messages named are stored durably. Not cumulative: each entry stands for itself alone."""

    acks: tuple[Ack, ...]


class Command(msgspec.Struct, frozen=True):
    """Server → device; sent again after each login until a final reply or expiry. `params`: a JSON object."""

    id: str
    name: str
    mode: Mode
    expires_at_ms: int
    params: bytes


class CommandReply(msgspec.Struct, frozen=True):
    """Device → server. `detail`: a JSON object. Kept and repeated by the device until acknowledged."""

    id: str
    status: ReplyStatus
    detail: bytes = b"{}"


class CommandReplyAck(msgspec.Struct, frozen=True):
    """The reply is stored durably."""

    id: str
    status: ReplyStatus


class Config(msgspec.Struct, frozen=True):
    """The whole configuration, at login and on change. `revision` grows by one per change."""

    revision: int
    document: bytes


class ConfigReport(msgspec.Struct, frozen=True):
    """What the device says it has applied (a JSON object): after each login and on change."""

    document: bytes


class Heartbeat(msgspec.Struct, frozen=True):
    """Either a device or an owner; answered by HEARTBEAT_ACK."""


class HeartbeatAck(msgspec.Struct, frozen=True):
    pass


class Bye(msgspec.Struct, frozen=True):
    """Either way: the sender is about to close."""

    reason: str = ""


# ---- the owner's side: the same port, after OWNER_LOGIN ----------------------------------------------


class OwnerLogin(msgspec.Struct, frozen=True):
    key: str

    def __repr__(self) -> str:
        return "OwnerLogin(key='***')"


class OwnerOk(msgspec.Struct, frozen=True):
    server_time_ms: int


class FeedFrom(msgspec.Struct, frozen=True):
    """Asks for all that was received after `after` (0: from the beginning), then for what comes, for good.

    With FEED_FROM_NOW the first batch is empty and tells where the feed stands.
    """

    request: int
    after: int


class TelemetryItem(msgspec.Struct, frozen=True):
    position: int
    device: str
    at_ms: int  # when the server stored it
    channel: str
    seq: int
    ts_ms: int
    body: bytes


class AnswerItem(msgspec.Struct, frozen=True):
    position: int
    device: str
    at_ms: int
    command: str
    status: ReplyStatus
    detail: bytes


class PresenceItem(msgspec.Struct, frozen=True):
    position: int
    device: str
    at_ms: int
    connected: bool
    reason: str


class ReportItem(msgspec.Struct, frozen=True):
    position: int
    device: str
    at_ms: int
    document: bytes


Item = TelemetryItem | AnswerItem | PresenceItem | ReportItem


class FeedBatch(msgspec.Struct, frozen=True):
    """Items in the order of their positions. `position`: all up to here has been sent.

    An empty batch says that the server is alive and has nothing newer.
    """

    request: int
    position: int
    items: tuple[Item, ...] = ()


class ListDevices(msgspec.Struct, frozen=True):
    """A page of devices with ids greater than `after`, in the order of their ids."""

    request: int
    after: str = ""
    limit: int = 1000


class DeviceEntry(msgspec.Struct, frozen=True):
    """`since_ms`: since when it has been connected or away; -1: never seen. `attributes`: a JSON object."""

    id: str
    connected: bool
    since_ms: int
    attributes: bytes


class DeviceList(msgspec.Struct, frozen=True):
    request: int
    more: bool
    items: tuple[DeviceEntry, ...]


class ListReports(msgspec.Struct, frozen=True):
    request: int
    after: str = ""
    limit: int = 1000


class ReportEntry(msgspec.Struct, frozen=True):
    device: str
    at_ms: int
    document: bytes


class ReportList(msgspec.Struct, frozen=True):
    request: int
    more: bool
    items: tuple[ReportEntry, ...]


class SendCommand(msgspec.Struct, frozen=True):
    """Queues a command until it is answered or expires. The same id twice is one command."""

    request: int
    device: str
    id: str
    name: str
    mode: Mode
    expires_at_ms: int
    params: bytes


class SetConfig(msgspec.Struct, frozen=True):
    """Replaces a device's configuration. Refused when its `epoch` is older than the held document's."""

    request: int
    device: str
    document: bytes


class RegisterDevice(msgspec.Struct, frozen=True):
    """Creates a device or replaces its key and attributes. An empty key leaves the held one."""

    request: int
    device: str
    key: str
    attributes: bytes

    def __repr__(self) -> str:
        return f"RegisterDevice(request={self.request}, device={self.device!r}, key='***')"


class Ok(msgspec.Struct, frozen=True):
    """What was asked for is stored durably."""

    request: int


class ErrorCode(StrEnum):
    UNKNOWN_DEVICE = "unknown-device"
    OLDER_EPOCH = "older-epoch"
    BAD_REQUEST = "bad-request"
    UNAVAILABLE = "unavailable"  # the server could not store it: try again
    POSITION_GONE = "position-gone"  # the feed cannot go on there without a gap


class Error(msgspec.Struct, frozen=True):
    request: int
    code: ErrorCode
    reason: str


Message = (
    Login
    | LoginOk
    | LoginRefused
    | Telemetry
    | TelemetryAck
    | Command
    | CommandReply
    | CommandReplyAck
    | Config
    | ConfigReport
    | Heartbeat
    | HeartbeatAck
    | Bye
    | OwnerLogin
    | OwnerOk
    | FeedFrom
    | FeedBatch
    | ListDevices
    | DeviceList
    | ListReports
    | ReportList
    | SendCommand
    | SetConfig
    | RegisterDevice
    | Ok
    | Error
)


# ---- fields ------------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """How one field is written to the end of a body, and read at an offset (value, offset after it)."""

    name: str  # as in docs/legacy-protocol.md
    write: Callable[[bytearray, Any], None]
    read: Callable[[bytes, int], tuple[Any, int]]


def _number(name: str, layout: struct.Struct) -> _Field:
    pack, unpack, size = layout.pack, layout.unpack_from, layout.size

    def write(out: bytearray, value: int) -> None:
        out += pack(value)

    def read(body: bytes, at: int) -> tuple[int, int]:
        return unpack(body, at)[0], at + size

    return _Field(name, write, read)


def _bytes(name: str, layout: struct.Struct) -> _Field:
    pack, unpack, size = layout.pack, layout.unpack_from, layout.size

    def write(out: bytearray, value: bytes) -> None:
        out += pack(len(value))
        out += value

    def read(body: bytes, at: int) -> tuple[bytes, int]:
        start = at + size
        end = start + unpack(body, at)[0]
        if end > len(body):
            raise ValueError(f"a {name} field runs past the end of the body")
        return body[start:end], end

    return _Field(name, write, read)


def _text(name: str, layout: struct.Struct) -> _Field:
    plain = _bytes(name, layout)

    def write(out: bytearray, value: str) -> None:
        plain.write(out, value.encode())

    def read(body: bytes, at: int) -> tuple[str, int]:
        raw, at = plain.read(body, at)
        return raw.decode(), at

    return _Field(name, write, read)


E = TypeVar("E", bound=StrEnum)


def _choice(name: str, of: type[E]) -> _Field:
    """One byte: 1 is the first member, in the order of their definition."""
    codes = {member: code for code, member in enumerate(of, start=1)}
    members = {code: member for member, code in codes.items()}

    def write(out: bytearray, value: E) -> None:
        out.append(codes[value])

    def read(body: bytes, at: int) -> tuple[E, int]:
        if (member := members.get(body[at])) is None:
            raise ValueError(f"{body[at]} is no {name}")
        return member, at + 1

    return _Field(name, write, read)


def _record(of: type[Any], *fields: _Field) -> _Field:
    def write(out: bytearray, value: Any) -> None:
        for field, part in zip(fields, msgspec.structs.astuple(value), strict=True):
            field.write(out, part)

    def read(body: bytes, at: int) -> tuple[Any, int]:
        values = []
        for field in fields:
            value, at = field.read(body, at)
            values.append(value)
        return of(*values), at

    return _Field(of.__name__, write, read)


def _list(of: _Field) -> _Field:
    def write(out: bytearray, value: tuple[Any, ...]) -> None:
        out += _U16.pack(len(value))
        for item in value:
            of.write(out, item)

    def read(body: bytes, at: int) -> tuple[tuple[Any, ...], int]:
        count = _U16.unpack_from(body, at)[0]
        at += 2
        items = []
        for _ in range(count):
            item, at = of.read(body, at)
            items.append(item)
        return tuple(items), at

    return _Field(f"list of {of.name}", write, read)


def _one_of(name: str, kinds: dict[int, tuple[type[Any], _Field]]) -> _Field:
    """One byte says which record follows."""
    codes = {of: code for code, (of, _) in kinds.items()}

    def write(out: bytearray, value: Any) -> None:
        code = codes[type(value)]
        out.append(code)
        kinds[code][1].write(out, value)

    def read(body: bytes, at: int) -> tuple[Any, int]:
        if (kind := kinds.get(body[at])) is None:
            raise ValueError(f"{body[at]} is no {name}")
        return kind[1].read(body, at + 1)

    return _Field(name, write, read)


def _write_flag(out: bytearray, value: bool) -> None:
    out.append(1 if value else 0)


def _read_flag(body: bytes, at: int) -> tuple[bool, int]:
    if body[at] > 1:
        raise ValueError("a truth value is 0 or 1")
    return body[at] == 1, at + 1


def _write_seq(out: bytearray, value: int) -> None:
    if not 0 <= value <= MAX_SEQ:
        raise ValueError("a seq is 0 to 2**63-1")
    out += _U64.pack(value)


def _read_seq(body: bytes, at: int) -> tuple[int, int]:
    value: int = _U64.unpack_from(body, at)[0]
    if value > MAX_SEQ:
        raise ValueError("a seq is 0 to 2**63-1")
    return value, at + 8


u16, u32, i64 = _number("u16", _U16), _number("u32", _U32), _number("i64", _I64)
u63 = _Field("u63", _write_seq, _read_seq)
flag = _Field("bool", _write_flag, _read_flag)
text8, text16 = _text("text8", _U8), _text("text16", _U16)
json32 = _bytes("json32", _U32)
mode, status, code = _choice("mode", Mode), _choice("status", ReplyStatus), _choice("code", ErrorCode)
item = _one_of(
    "item",
    {
        1: (TelemetryItem, _record(TelemetryItem, u63, text8, i64, text8, u63, i64, json32)),
        2: (AnswerItem, _record(AnswerItem, u63, text8, i64, text8, status, json32)),
        3: (PresenceItem, _record(PresenceItem, u63, text8, i64, flag, text8)),
        4: (ReportItem, _record(ReportItem, u63, text8, i64, json32)),
    },
)

# Every message: its type on the wire and its fields, in the struct's order. `more` is a flag, not a field.
MESSAGES: dict[type[Any], tuple[int, tuple[_Field, ...]]] = {
    Login: (0x01, (text8, text16, text8)),
    LoginOk: (0x02, (i64, u16)),
    LoginRefused: (0x03, (text8,)),
    Telemetry: (0x04, (text8, u63, i64, json32)),
    TelemetryAck: (0x05, (_list(_record(Ack, text8, u63)),)),
    Command: (0x06, (text8, text8, mode, i64, json32)),
    CommandReply: (0x07, (text8, status, json32)),
    CommandReplyAck: (0x08, (text8, status)),
    Config: (0x09, (u63, json32)),
    ConfigReport: (0x0A, (json32,)),
    Heartbeat: (0x0B, ()),
    HeartbeatAck: (0x0C, ()),
    Bye: (0x0D, (text8,)),
    OwnerLogin: (0x40, (text16,)),
    OwnerOk: (0x41, (i64,)),
    FeedFrom: (0x42, (u32, u63)),
    FeedBatch: (0x43, (u32, u63, _list(item))),
    ListDevices: (0x44, (u32, text8, u16)),
    DeviceList: (0x45, (u32, _list(_record(DeviceEntry, text8, flag, i64, json32)))),
    ListReports: (0x46, (u32, text8, u16)),
    ReportList: (0x47, (u32, _list(_record(ReportEntry, text8, i64, json32)))),
    SendCommand: (0x48, (u32, text8, text8, text8, mode, i64, json32)),
    SetConfig: (0x49, (u32, text8, json32)),
    RegisterDevice: (0x4A, (u32, text8, text16, json32)),
    Ok: (0x4B, (u32,)),
    Error: (0x4C, (u32, code, text16)),
}
_BY_TYPE = {code_: (of, fields) for of, (code_, fields) in MESSAGES.items()}


def encode(message: Message) -> bytes:
    """The bytes of one frame. Raises BadInput when a field does not fit (too long, out of range)."""
    of = type(message)
    type_, fields = MESSAGES[of]
    body = bytearray()
    flags = 0
    values = msgspec.structs.astuple(message)
    if of is DeviceList or of is ReportList:
        flags = int(FrameFlag.MORE) if values[1] else 0
        values = (values[0], values[2])
    try:
        for field, value in zip(fields, values, strict=True):
            field.write(body, value)
    except (struct.error, ValueError) as exc:
        raise BadInput(f"{of.__name__} does not fit into a frame: {exc}") from exc
    if len(body) > MAX_BODY_BYTES:
        raise BadInput(f"{of.__name__} of {len(body)} bytes: a frame holds at most {MAX_BODY_BYTES}")
    frame = bytearray(_HEADER.pack(MAGIC, VERSION, type_, flags, len(body)))
    frame += body
    frame += _U32.pack(zlib.crc32(frame))
    return bytes(frame)


def short(text: str) -> str:
    """As much of `text` as fits into a field of 255 bytes."""
    return text.encode()[:255].decode(errors="ignore")


class Decoder:
    """Turns a stream of bytes, cut anywhere, into messages.

    Holds at most one frame that is not yet complete: `max_body_bytes` and the frame's envelope.
    """

    def __init__(self, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.max_body_bytes = max_body_bytes  # may be raised once the peer has signed in
        self._held = bytearray()
        self._fault: BadFrame | None = None

    @property
    def held_bytes(self) -> int:
        """How much of a frame that is not yet complete is held."""
        return len(self._held)

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises BadFrame at the first fault, and ever after."""
        if self._fault is not None:
            raise BadFrame(self._fault.fault, "the stream was already broken")
        held = self._held
        held += data
        messages: list[Message] = []
        at = 0
        try:
            while len(held) - at >= HEADER_BYTES:
                end = at + self._frame_bytes(at)
                if len(held) < end:
                    break
                messages.append(_message(bytes(held[at:end])))
                at = end
            else:
                # A wrong start is refused before the rest of a header may never come.
                if not MAGIC.startswith(held[at : at + 2]) and not held[at:].startswith(MAGIC):
                    raise BadFrame(FrameFault.MAGIC, "the bytes that came do not begin a frame")
        except BadFrame as fault:
            fault.before = tuple(messages)
            self._fault = fault
            self._held = bytearray()
            raise
        del held[:at]
        return messages

    def _frame_bytes(self, at: int) -> int:
        magic, version, _, flags, length = _HEADER.unpack_from(self._held, at)
        if magic != MAGIC:
            raise BadFrame(FrameFault.MAGIC, "the bytes that came do not begin a frame")
        if version != VERSION:
            raise BadFrame(FrameFault.VERSION, f"version {version} is not spoken here, only {VERSION}")
        if flags & ~int(FrameFlag.MORE):
            raise BadFrame(FrameFault.FLAGS, f"flags {flags:#06x} are not known in version {VERSION}")
        if length > self.max_body_bytes:
            raise BadFrame(
                FrameFault.OVERSIZE, f"a body of {length} bytes: at most {self.max_body_bytes} are taken"
            )
        return HEADER_BYTES + int(length) + CHECKSUM_BYTES


def _message(frame: bytes) -> Message:
    """The message of one complete frame whose header has been checked."""
    end = len(frame) - CHECKSUM_BYTES
    if zlib.crc32(memoryview(frame)[:end]) != _U32.unpack_from(frame, end)[0]:
        raise BadFrame(FrameFault.CHECKSUM, "a frame's checksum does not match its content")
    _, _, type_, flags, _ = _HEADER.unpack_from(frame)
    if (known := _BY_TYPE.get(type_)) is None:
        raise BadFrame(FrameFault.TYPE, f"message type {type_:#04x} is not known")
    of, fields = known
    paged = of is DeviceList or of is ReportList
    if flags and not paged:
        raise BadFrame(FrameFault.FLAGS, f"{of.__name__} takes no flags")
    body = frame[HEADER_BYTES:end]
    values = []
    at = 0
    try:
        for field in fields:
            value, at = field.read(body, at)
            values.append(value)
    except (struct.error, IndexError, ValueError) as exc:
        raise BadFrame(FrameFault.FIELD, f"{of.__name__}: {exc or 'the body ends too early'}") from exc
    if at != len(body):
        raise BadFrame(FrameFault.FIELD, f"{of.__name__}: {len(body) - at} bytes too many")
    if paged:
        values.insert(1, bool(flags & FrameFlag.MORE))
    message: Message = of(*values)
    return message
