"""From a message of the log to a telemetry row: what is accepted, and why the rest is not.

Two topics carry telemetry: `dt/{device}/{channel…}`, published by devices, and
`feed/{side}/{device}/{channel…}`, where the bridge enters what another side has received. Nothing is
dropped: whatever cannot be a row becomes a `DeadLetter` with its reason.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import msgspec

from fleetlift.core.identity import DEVICE_ID
from fleetlift.core.ranges import MAX_MEMBER

MAX_BODY_BYTES = 256 * 1024
MAX_NESTING = 64
MAX_CHANNEL_CHARS = 512
MAX_SEQ = MAX_MEMBER  # 2**63 - 2, so that a range that ends behind it is still a bigint
DEAD_LETTER_BYTES = 64 * 1024  # of a refused payload, this much is kept

MQTT_PATH = "mqtt"  # the path of what devices publish themselves

# In a feed's message, where ts, seq and the time of receipt stand beside a body that is kept as it was sent.
HEADER_TS = "Fleetlift-Ts"
HEADER_SEQ = "Fleetlift-Seq"
HEADER_RECEIVED = "Fleetlift-Received"
HEADER_AGAIN = "Fleetlift-Again"  # the old side was asked for it a second time, only to compare

_MILLISECONDS_FROM = 1e11  # numbers at least this large are milliseconds: as seconds, the year 5138
_MAX_TS_MS = 253_402_300_799_999  # the end of the year 9999


class Telemetry(msgspec.Struct, frozen=True, gc=False):
    """One accepted message. `ts_ms` is Unix milliseconds, `received_at` Unix seconds; `body` is JSON text.

    `ts_given` is False when the message carried no time, and `ts_ms` is that of its receipt. `again`: it is a
    second reading of what the old side has told before, to be compared, and neither stored nor counted.
    """

    device: str
    channel: str
    ts_ms: int
    seq: int | None
    body: str
    path: str
    received_at: float
    ts_given: bool = True
    again: bool = False

    @property
    def msg_key(self) -> int:
        """What tells messages of the same device, channel and time apart: `seq`, or a digest (negative).

        A message dated by its receipt is known by its body too: a counter that began anew may bring another
        one with the same `seq` in the same millisecond.
        """
        if self.seq is not None and self.ts_given:
            return self.seq
        text = self.body if self.seq is None else f"{self.seq} {self.body}"
        digest = blake2b(text.encode(), digest_size=8).digest()
        return -1 - (int.from_bytes(digest, "big") >> 1)

    @property
    def delay_s(self) -> float:
        """From the device's own time to the receipt; 0 for a message without a time."""
        return self.received_at - self.ts_ms / 1000 if self.ts_given else 0.0


class DeadLetter(msgspec.Struct, frozen=True, gc=False):
    """One message that cannot be stored as telemetry. `device` may be empty; `payload` is its beginning."""

    device: str
    path: str
    topic: str
    reason: str
    payload: bytes
    payload_bytes: int
    received_at: float


class _Refused(Exception):
    """The reason why a message cannot be telemetry."""


def parse(topic: str, headers: Mapping[str, str] | None, payload: bytes, at: float) -> Telemetry | DeadLetter:
    """Read one message of the log. Never raises.

    `at` is the time in Unix seconds at which the log took the message.
    """
    path, device, again = MQTT_PATH, "", False
    try:
        kind, _, rest = topic.partition("/")
        if kind == "feed":
            path, _, rest = rest.partition("/")
            if not path or path == MQTT_PATH or not _storable(path):
                path = path or "feed"
                raise _Refused("topic: expected feed/{side}/{device}/{channel}")
        elif kind != "dt":
            raise _Refused("topic: expected dt/{device}/{channel} or feed/{side}/{device}/{channel}")
        device, _, channel = rest.partition("/")
        if not DEVICE_ID.fullmatch(device):
            raise _Refused("topic: the device id is not one (1 to 128 letters, digits, ':', '_' or '-')")
        if not channel or len(channel) > MAX_CHANNEL_CHARS or not _storable(channel):
            raise _Refused(f"topic: expected a channel of 1 to {MAX_CHANNEL_CHARS} characters")
        text, value = _json(payload)
        if kind == "feed":
            head = headers or {}
            again = HEADER_AGAIN in head
            ts = _number(head.get(HEADER_TS), HEADER_TS)
            seq = _seq(_integer(head.get(HEADER_SEQ)), HEADER_SEQ)
            received = _number(head.get(HEADER_RECEIVED), HEADER_RECEIVED)
            ts_ms = None if ts is None else _in_range(ts * 1000, HEADER_TS)
            received_at = at if received is None else _in_range(received * 1000, HEADER_RECEIVED) / 1000
        else:
            ts_ms, seq, received_at = None, None, at
            if type(value) is dict:
                ts_ms = _ts_ms(value.get("ts"))
                seq = _seq(value.get("seq"), "seq")
        if ts_ms is None:
            return Telemetry(
                device, channel, round(received_at * 1000), seq, text, path, received_at, False, again
            )
        return Telemetry(device, channel, ts_ms, seq, text, path, received_at, True, again)
    except _Refused as refused:
        return dead_letter(topic, device, path, str(refused), payload, at)
    except Exception as unforeseen:
        # The reader must go on whatever a device sends; the type's name is enough to find the case.
        return dead_letter(topic, device, path, f"unreadable: {type(unforeseen).__name__}", payload, at)


def dead_letter(topic: str, device: str, path: str, reason: str, payload: bytes, at: float) -> DeadLetter:
    """A dead letter whose texts PostgreSQL can hold, with the beginning of the payload."""
    return DeadLetter(
        device=_made_storable(device)[:256],
        path=_made_storable(path)[:256],
        topic=_made_storable(topic)[:4096],
        reason=_made_storable(reason)[:1000],
        payload=bytes(payload[:DEAD_LETTER_BYTES]),
        payload_bytes=len(payload),
        received_at=at,
    )


def _json(payload: bytes) -> tuple[str, Any]:
    if len(payload) > MAX_BODY_BYTES:
        raise _Refused(f"body: {len(payload)} bytes, the most is {MAX_BODY_BYTES}")
    try:
        text = payload.decode()
    except UnicodeDecodeError as wrong:
        raise _Refused(f"body: not UTF-8 (byte {wrong.start})") from None
    # Counting opening brackets is cheap and, for all but odd messages, enough.
    if payload.count(b"[") + payload.count(b"{") > MAX_NESTING and _nesting(payload) > MAX_NESTING:
        raise _Refused(f"body: nested deeper than {MAX_NESTING} levels")
    try:
        return text, msgspec.json.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as wrong:
        raise _Refused(f"body: not JSON ({wrong})") from None


def _nesting(payload: bytes) -> int:
    """How deep brackets nest outside of strings."""
    depth = deepest = 0
    in_string = escaped = False
    for byte in payload:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _ts_ms(ts: object) -> int | None:
    """A device's `ts` in Unix milliseconds: a number (seconds, or milliseconds from 1e11 on) or RFC 3339."""
    if ts is None:
        return None
    kind = type(ts)
    if kind is int or kind is float:
        number: float = ts  # type: ignore[assignment]
        return _in_range(number * 1000 if number < _MILLISECONDS_FROM else number, "ts")
    if kind is str:
        try:
            when = datetime.fromisoformat(ts)  # type: ignore[arg-type]
        except ValueError:
            raise _Refused("ts: expected Unix seconds, milliseconds or an RFC 3339 time") from None
        if when.tzinfo is None:
            raise _Refused("ts: the RFC 3339 time needs its offset from UTC, as in …Z")
        since = when - datetime(1970, 1, 1, tzinfo=UTC)
        micros = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        return _in_range(micros / 1000, "ts")
    raise _Refused("ts: expected Unix seconds, milliseconds or an RFC 3339 time")


def _in_range(ms: float, what: str) -> int:
    if not 0 <= ms <= _MAX_TS_MS:  # not true of not-a-number either
        raise _Refused(f"{what}: outside of the years 1970 to 9999")
    return round(ms)


def _seq(seq: object, what: str) -> int | None:
    if seq is None:
        return None
    if type(seq) is float and seq.is_integer() and abs(seq) < 2**53:
        seq = int(seq)  # 5.0 is the same JSON number as 5
    if type(seq) is not int:
        raise _Refused(f"{what}: expected an integer")
    if not 0 <= seq <= MAX_SEQ:
        raise _Refused(f"{what}: expected 0 to {MAX_SEQ}")
    return seq


def _integer(text: str | None) -> object:
    if text is None or text == "":
        return None
    digits = text[1:] if text[:1] == "-" else text
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 30 else text


def _number(text: str | None, what: str) -> float | None:
    if text is None or text == "":
        return None
    try:
        return float(text)
    except ValueError:
        raise _Refused(f"{what}: expected Unix seconds") from None


def _storable(text: str) -> bool:
    return _made_storable(text) == text


def _made_storable(text: str) -> str:
    """PostgreSQL's text holds neither NUL nor lone surrogates."""
    if text.isascii():
        return text.replace("\x00", "\N{REPLACEMENT CHARACTER}") if "\x00" in text else text
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}")
