"""What a capture is: recorded messages, how they lie in segments, and the account that proves it complete.

A capture is a directory. Its segments hold blocks, each with its own checksum, and end with a footer; the
manifest names the segments and holds the account. The bytes are laid down here, compression and files are
`load/capture_file.py`'s; docs/capture.md describes the format for other programs.
"""

import struct
import zlib
from collections.abc import Mapping
from enum import StrEnum
from hashlib import blake2b
from typing import Literal

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.identity import DEVICE_ID

FORMAT = 1
MAGIC = b"FLCAP\x001\n"
RECORD_BYTES_MAX = 16 * 1024 * 1024  # topic and payload of one message
BLOCK_BYTES_MAX = 32 * 1024 * 1024  # uncompressed; a block ends with the record that brings it past its size
BLOCK_RECORDS_MAX = 1_000_000
FOOTER_BYTES_MAX = 64 * 1024
GAPS_NAMED_MAX = 1000

Direction = Literal["up", "down"]


class DamagedCapture(BadInput):
    """A capture, or a segment of it, is not as it was written; the text names it."""


class UnfinishedCapture(BadInput):
    """A capture was never closed: its recorder was killed, or is still at work."""


class CapturedMessage(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One message of a device. `at_s`: Unix seconds at which it was received, or for a command made."""

    device: str
    at_s: float
    topic: str
    qos: int
    payload: bytes
    direction: Direction


# -- blocks --------------------------------------------------------------------------------------------------

_HEADER = struct.Struct(">cIIII")  # kind, stored bytes, raw bytes, records, checksum
HEADER_BYTES = _HEADER.size
RECORDS, FOOTER = b"R", b"F"


class BlockHeader(msgspec.Struct, frozen=True):
    kind: bytes
    stored_bytes: int
    raw_bytes: int
    records: int
    checksum: int


def block(kind: bytes, stored: bytes, raw_bytes: int, records: int) -> bytes:
    """A block as it lies in a segment: its header, and its body as it was compressed."""
    head = _HEADER.pack(kind, len(stored), raw_bytes, records, 0)
    return _HEADER.pack(kind, len(stored), raw_bytes, records, zlib.crc32(stored, zlib.crc32(head))) + stored


def read_header(data: bytes) -> BlockHeader:
    """The header in the first HEADER_BYTES of `data`. Raises DamagedCapture for what cannot be one."""
    kind, stored, raw, records, checksum = _HEADER.unpack_from(data)
    limit = {RECORDS: BLOCK_BYTES_MAX + RECORD_BYTES_MAX, FOOTER: FOOTER_BYTES_MAX}.get(kind, -1)
    if raw > limit or stored > limit + limit // 64 + 1024 or records > BLOCK_RECORDS_MAX:
        raise DamagedCapture("a block's header is damaged")
    return BlockHeader(kind, stored, raw, records, checksum)


def check_body(header: BlockHeader, stored: bytes) -> None:
    """Raises DamagedCapture when a block's body is not what its header says."""
    head = _HEADER.pack(header.kind, header.stored_bytes, header.raw_bytes, header.records, 0)
    if len(stored) != header.stored_bytes or zlib.crc32(stored, zlib.crc32(head)) != header.checksum:
        raise DamagedCapture("a block's checksum does not fit")


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[CapturedMessage])
_ARRAY = struct.Struct(">BI")


def encode_record(message: CapturedMessage) -> bytes:
    """Raises BadInput for a message larger than a capture holds."""
    if len(message.payload) + 4 * len(message.topic) > RECORD_BYTES_MAX:
        raise BadInput(
            f"a message of {len(message.payload)} bytes on {message.topic[:80]!r}: a capture holds up to "
            f"{RECORD_BYTES_MAX} bytes"
        )
    return _ENCODER.encode(message)


def join_records(records: list[bytes]) -> bytes:
    """Encoded records as the one MessagePack array that a block holds."""
    return _ARRAY.pack(0xDD, len(records)) + b"".join(records)


def decode_records(raw: bytes, records: int) -> list[CapturedMessage]:
    try:
        found = _DECODER.decode(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError) as problem:
        raise DamagedCapture(f"a block does not hold records ({problem})") from None
    if len(found) != records:
        raise DamagedCapture(f"a block holds {len(found)} records, and its header says {records}")
    return found


# -- segments and manifest -----------------------------------------------------------------------------------


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A closed segment, as its footer and the manifest have it. `sha256`: of all bytes before the footer."""

    capture: str
    number: int
    records: int
    first_at_s: float
    last_at_s: float
    sha256: str
    recovered: bool = False  # closed after its recorder had died

    @property
    def name(self) -> str:
        return segment_name(self.number)


def segment_name(number: int, *, is_open: bool = False) -> str:
    return f"{number:06d}.{'open' if is_open else 'seg'}"


def encode_footer(segment: Segment) -> bytes:
    body = msgspec.json.encode(segment)
    return block(FOOTER, body, len(body), 0)


def decode_footer(body: bytes) -> Segment:
    try:
        return msgspec.json.decode(body, type=Segment)
    except (msgspec.MsgspecError, ValueError) as problem:
        raise DamagedCapture(f"the footer cannot be read ({problem})") from None


class State(StrEnum):
    RECORDING = "recording"
    COMPLETE = "complete"  # all that was asked for is there
    STOPPED = "stopped"  # ended before its time, on purpose or for want of room
    RECOVERED = "recovered"  # its recorder was killed, and what was whole was kept


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Messages that the log no longer had when they were to be read: after the one, before the other time.

    `messages` of all devices, unknown in a tenant's capture (None) or when the log was made anew.
    """

    after_s: float
    before_s: float
    messages: int | None
    reason: str


class LogRange(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the log that was read, every number from `first` to `last`: each was `captured`, left out
    for a reason, or is in a gap."""

    created: str
    first: int
    last: int
    read: int
    captured: int
    left_out: dict[str, int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a capture holds, and the account of it. Times are Unix seconds.

    `offered`: messages of the selection that the source handed out, counted where they were read; `captured`:
    those in segments, counted where they were written. `commands_offered` is what the registry of commands
    counts afterwards; None: nobody could ask. `devices`: messages up and down of each.
    """

    format: int = FORMAT
    id: str
    state: State = State.RECORDING
    reason: str = ""
    source: str = ""
    tenant: str | None = None
    share: str = ""
    pseudonyms: str = ""  # "": devices have their own names; else which key gave them others, not the key
    masked: int = 0
    resumed: int = 0  # how often a recorder went on behind one that was killed or stopped
    started_at_s: float
    until_s: float
    ended_at_s: float | None = None
    first_at_s: float | None = None
    last_at_s: float | None = None
    offered: int = 0
    captured: int = 0
    commands_offered: int | None = None
    commands_captured: int = 0
    payload_bytes: int = 0
    stored_bytes: int = 0
    gaps: list[Gap] = []
    gaps_more: int = 0
    log: LogRange | None = None
    segments: list[Segment] = []
    devices: dict[str, tuple[int, int]] = {}

    @property
    def messages(self) -> int:
        return self.captured + self.commands_captured


def shortfalls(manifest: Manifest) -> list[str]:
    """Why a capture is not proven complete; empty when it is. Each says what is missing."""
    found = []
    if manifest.state is not State.COMPLETE:
        found.append(f"it is {manifest.state.value}" + (f": {manifest.reason}" if manifest.reason else ""))
    if manifest.captured != manifest.offered:
        found.append(f"{manifest.offered} messages were offered and {manifest.captured} captured")
    if manifest.commands_offered is None:
        if manifest.commands_captured:
            found.append("the commands were not counted again")
    elif manifest.commands_offered != manifest.commands_captured:
        found.append(
            f"{manifest.commands_offered} commands were made and {manifest.commands_captured} captured"
        )
    in_segments = sum(one.records for one in manifest.segments)
    if in_segments != manifest.messages:
        found.append(f"{manifest.messages} messages were captured and {in_segments} are in segments")
    by_device = sum(up + down for up, down in manifest.devices.values())
    if by_device != manifest.messages:
        found.append(f"{manifest.messages} messages were captured and {by_device} are counted by device")
    for gap in manifest.gaps:
        missing = "messages" if gap.messages is None else f"{gap.messages} messages"
        found.append(f"{missing} between {gap.after_s:.3f} and {gap.before_s:.3f}: {gap.reason}")
    if manifest.gaps_more:
        found.append(f"{manifest.gaps_more} more gaps")
    log = manifest.log
    if log is not None:
        missed = sum(gap.messages or 0 for gap in manifest.gaps)
        numbers, told = log.last - log.first + 1, log.captured + sum(log.left_out.values())
        anew = any(gap.messages is None for gap in manifest.gaps)
        if not anew and not manifest.gaps_more and (numbers != log.read + missed or log.read != told):
            found.append(f"of {numbers} numbers of the log {log.read} were read and {told} accounted for")
    return found


# -- the account of the log ----------------------------------------------------------------------------------


class Account(msgspec.Struct):
    """Where a reader of the log stands, and what became of every number it has passed.

    It is also what lets a killed capture go on: it is on disk before the records that it speaks of.
    """

    created: str
    first: int
    seq: int  # the newest number passed
    at_s: float
    read: int = 0
    offered: int = 0
    commands: int = 0
    commands_until_s: float = 0.0
    masked: int = 0
    payload_bytes: int = 0
    left_out: dict[str, int] = {}
    gaps: list[Gap] = []
    gaps_more: int = 0

    def passes(self, seq: int, at_s: float) -> None:
        """The reader has been handed number `seq`; a jump is a gap."""
        if seq > self.seq + 1:
            self.gap(at_s, seq - self.seq - 1, "the log had deleted them (its age or size limit)")
        elif seq <= self.seq:
            self.gap(at_s, None, "the log lost its end, and gives its numbers again")
        self.seq, self.at_s = seq, at_s
        self.read += 1

    def anew(self, created: str, at_s: float) -> None:
        """The log was made anew: its numbers begin at 1 again."""
        self.gap(at_s, None, "the log was made anew")
        self.created, self.seq = created, 0

    def gap(self, before_s: float, messages: int | None, reason: str) -> None:
        if len(self.gaps) < GAPS_NAMED_MAX:
            self.gaps.append(Gap(after_s=self.at_s, before_s=before_s, messages=messages, reason=reason))
        else:
            self.gaps_more += 1

    def leaves_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def range(self) -> LogRange:
        return LogRange(
            created=self.created,
            first=self.first,
            last=self.seq,
            read=self.read,
            captured=self.offered,
            left_out=dict(self.left_out),
        )


# -- which messages ------------------------------------------------------------------------------------------


class Origin(msgspec.Struct, frozen=True):
    """Whose a topic of the log is. `kind`: `up`, `down`, `command` (a stored copy of one) or `feed`."""

    device: str
    kind: str
    side: str = ""
    topic: str = ""  # of a feed: as the device would publish it itself


def origin(topic: str) -> Origin | None:
    """What a topic of Fleetlift's log says of its message; None: it is no device's."""
    kind, _, rest = topic.partition("/")
    if kind == "dt":
        device = rest.partition("/")[0]
        return Origin(device, "up") if DEVICE_ID.fullmatch(device) else None
    if kind == "feed":
        side, _, rest = rest.partition("/")
        device = rest.partition("/")[0]
        return Origin(device, "feed", side, "dt/" + rest) if DEVICE_ID.fullmatch(device) else None
    levels = topic.split("/")
    if levels[:2] == ["$aws", "things"] and len(levels) > 4 and levels[3] == "shadow":
        up = levels[-1] in ("get", "update", "delete")
        return Origin(levels[2], "up" if up else "down")
    if levels[:3] == ["$aws", "commands", "things"] and len(levels) > 5 and levels[4] == "executions":
        match levels[6:]:
            case ["request", *_]:
                return Origin(levels[3], "command")
            case ["response", "json"]:
                return Origin(levels[3], "up")
        return Origin(levels[3], "down")
    return None


def in_share(device: str, percent: float) -> bool:
    """Whether a device is in a share: the same in every capture, and a larger share holds a smaller one."""
    place = int.from_bytes(blake2b(device.encode(), digest_size=8, person=b"capture").digest())
    return place < percent / 100 * 2**64


def count_devices(counts: dict[str, tuple[int, int]], message: CapturedMessage) -> None:
    up, down = counts.get(message.device, (0, 0))
    counts[message.device] = (up + 1, down) if message.direction == "up" else (up, down + 1)


def check_counts(manifest: Manifest, counted: Mapping[str, tuple[int, int]]) -> None:
    """Raises DamagedCapture when the messages in the segments are not those the manifest counts."""
    for device in sorted(set(manifest.devices) | set(counted)):
        if (has := counted.get(device, (0, 0))) != (says := manifest.devices.get(device, (0, 0))):
            raise DamagedCapture(
                f"device {device!r} has {has} messages up and down, the manifest says {says}"
            )
