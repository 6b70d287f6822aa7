"""MQTT 3.1.1 packets to bytes and back, without I/O: QoS 0 and 1, both directions.

`encode(packet)` gives the bytes of one packet; a `Decoder` is fed bytes as they come and gives whole
packets. Section numbers are those of the OASIS standard "MQTT Version 3.1.1". QoS 2 is left out on
purpose: Fleetlift's edge does not take it, and devices that need it are served by QoS 1 plus `seq`.
"""

from collections.abc import Callable
from enum import IntEnum

import msgspec

from fleetlift.core.errors import BadInput

MAX_PACKET = 268_435_455  # what the length field can say, section 2.2.3
_PROTOCOL = b"\x00\x04MQTT\x04"  # name and level, sections 3.1.2.1 and 3.1.2.2


class BadPacket(BadInput):
    """Bytes that are not MQTT 3.1.1 as this codec speaks it. The connection must be closed (section 4.8)."""


class ConnectCode(IntEnum):
    """CONNACK's return codes, table 3.1."""

    ACCEPTED = 0
    BAD_PROTOCOL = 1
    BAD_CLIENT_ID = 2
    UNAVAILABLE = 3
    BAD_CREDENTIALS = 4
    NOT_AUTHORIZED = 5


SUBSCRIBE_REFUSED = 0x80  # section 3.9.3


class Will(msgspec.Struct, frozen=True, kw_only=True):
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


class Connect(msgspec.Struct, frozen=True, kw_only=True):
    """Section 3.1. `keep_alive_s` 0 switches the server's silence check off. A password needs a user name."""

    client_id: str
    clean: bool = True
    keep_alive_s: int = 60
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None


class ConnAck(msgspec.Struct, frozen=True):
    """Section 3.2. `code` is a ConnectCode, or a number the standard does not know."""

    session_present: bool
    code: int


class Publish(msgspec.Struct, frozen=True, gc=False):
    """Section 3.3. `packet_id` is 0 exactly when `qos` is 0."""

    topic: str
    payload: bytes
    qos: int = 0
    packet_id: int = 0
    retain: bool = False
    dup: bool = False


class PubAck(msgspec.Struct, frozen=True, gc=False):
    packet_id: int


class Subscribe(msgspec.Struct, frozen=True):
    """Section 3.8: (filter, wanted QoS) each."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]


class SubAck(msgspec.Struct, frozen=True):
    """Section 3.9: one granted QoS, or SUBSCRIBE_REFUSED, for each filter in its order."""

    packet_id: int
    codes: tuple[int, ...]


class Unsubscribe(msgspec.Struct, frozen=True):
    packet_id: int
    filters: tuple[str, ...]


class UnsubAck(msgspec.Struct, frozen=True):
    packet_id: int


class PingReq(msgspec.Struct, frozen=True):
    pass


class PingResp(msgspec.Struct, frozen=True):
    pass


class Disconnect(msgspec.Struct, frozen=True):
    pass


Packet = (
    Connect
    | ConnAck
    | Publish
    | PubAck
    | Subscribe
    | SubAck
    | Unsubscribe
    | UnsubAck
    | PingReq
    | PingResp
    | Disconnect
)


# --- encoding --------------------------------------------------------------------------------------------


def remaining_length(n: int) -> bytes:
    """The length field of section 2.2.3: 7 bits a byte, lowest first, at most four bytes."""
    if n < 128:
        return bytes((n,))
    if n > MAX_PACKET:
        raise BadPacket(f"a packet of {n} bytes: MQTT allows {MAX_PACKET}")
    out = bytearray()
    while True:
        n, low = n >> 7, n & 0x7F
        if not n:
            out.append(low)
            return bytes(out)
        out.append(low | 0x80)


def _framed(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes((first,)) + remaining_length(len(body)) + body


def _blob(data: bytes) -> bytes:
    if len(data) > 0xFFFF:
        raise BadPacket(f"a field of {len(data)} bytes: MQTT allows 65535 (section 1.5.3)")
    return len(data).to_bytes(2, "big") + data


def _text(text: str) -> bytes:
    """A length-prefixed UTF-8 string; U+0000 and lone surrogates are not allowed (section 1.5.3)."""
    if "\0" in text:
        raise BadPacket("a string with U+0000 (section 1.5.3)")
    try:
        return _blob(text.encode())
    except UnicodeEncodeError:
        raise BadPacket("a string that is not UTF-8 (section 1.5.3)") from None


def _packet_id(number: int) -> bytes:
    if not 0 < number <= 0xFFFF:
        raise BadPacket(f"packet id {number}: use 1 to 65535 (section 2.3.1)")
    return number.to_bytes(2, "big")


def _checked_qos(qos: int) -> int:
    if qos not in (0, 1):
        raise BadPacket(f"QoS {qos}: this codec speaks 0 and 1")
    return qos


def _checked_topic(topic: str) -> str:
    if not topic or "+" in topic or "#" in topic:
        raise BadPacket(f"topic {topic!r}: a topic to publish to is not empty and holds no wildcard")
    return topic


def publish(
    topic: str,
    payload: bytes,
    *,
    qos: int = 0,
    packet_id: int = 0,
    retain: bool = False,
    dup: bool = False,
) -> bytes:
    """The bytes of a PUBLISH, without building a packet first: what a busy sender calls. Section 3.3."""
    name = _text(_checked_topic(topic))
    if qos == 0:
        # A DUP flag without an acknowledgement to miss is a protocol error (section 3.3.1.1).
        return _framed(0x30 | retain, name, payload)
    return _framed(0x30 | dup << 3 | _checked_qos(qos) << 1 | retain, name, _packet_id(packet_id), payload)


def puback(packet_id: int) -> bytes:
    """Section 3.4."""
    return b"\x40\x02" + _packet_id(packet_id)


def _connect(packet: Connect) -> bytes:
    if packet.password is not None and packet.username is None:
        raise BadPacket("a password without a user name (section 3.1.2.9)")
    if not packet.client_id and not packet.clean:
        raise BadPacket("an empty client id needs a clean session (section 3.1.3.1)")
    if not 0 <= packet.keep_alive_s <= 0xFFFF:
        raise BadPacket(f"keep alive {packet.keep_alive_s} s: use 0 to 65535")
    flags = packet.clean << 1
    fields = [_text(packet.client_id)]
    if packet.will is not None:
        flags |= 0x04 | _checked_qos(packet.will.qos) << 3 | packet.will.retain << 5
        fields += [_text(_checked_topic(packet.will.topic)), _blob(packet.will.payload)]
    if packet.username is not None:
        flags |= 0x80
        fields.append(_text(packet.username))
    if packet.password is not None:
        flags |= 0x40
        fields.append(_blob(packet.password))
    return _framed(0x10, _PROTOCOL, bytes((flags,)), packet.keep_alive_s.to_bytes(2, "big"), *fields)


def _subscribe(packet: Subscribe) -> bytes:
    if not packet.filters:
        raise BadPacket("a SUBSCRIBE without filters (section 3.8.3)")
    fields = [_text(name) + bytes((_checked_qos(qos),)) for name, qos in packet.filters]
    return _framed(0x82, _packet_id(packet.packet_id), *fields)


def _unsubscribe(packet: Unsubscribe) -> bytes:
    if not packet.filters:
        raise BadPacket("an UNSUBSCRIBE without filters (section 3.10.3)")
    return _framed(0xA2, _packet_id(packet.packet_id), *map(_text, packet.filters))


def encode(packet: Packet) -> bytes:
    """The bytes of one packet. Raises BadPacket when the standard does not allow its values."""
    match packet:
        case Publish():
            return publish(
                packet.topic,
                packet.payload,
                qos=packet.qos,
                packet_id=packet.packet_id,
                retain=packet.retain,
                dup=packet.dup,
            )
        case PubAck():
            return puback(packet.packet_id)
        case Connect():
            return _connect(packet)
        case ConnAck():
            return bytes((0x20, 2, packet.session_present, packet.code))
        case Subscribe():
            return _subscribe(packet)
        case SubAck():
            return _framed(0x90, _packet_id(packet.packet_id), bytes(packet.codes))
        case Unsubscribe():
            return _unsubscribe(packet)
        case UnsubAck():
            return b"\xb0\x02" + _packet_id(packet.packet_id)
        case PingReq():
            return b"\xc0\x00"
        case PingResp():
            return b"\xd0\x00"
        case Disconnect():
            return b"\xe0\x00"


# --- decoding --------------------------------------------------------------------------------------------


class _Fields:
    """Reads one packet's body from its start; every shortage is a BadPacket."""

    __slots__ = ("at", "body")

    def __init__(self, body: bytes) -> None:
        self.body, self.at = body, 0

    def take(self, n: int) -> bytes:
        start, self.at = self.at, self.at + n
        if self.at > len(self.body):
            raise BadPacket("a packet shorter than its fields")
        return self.body[start : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def packet_id(self) -> int:
        if not (number := self.number()):
            raise BadPacket("packet id 0 (section 2.3.1)")
        return number

    def blob(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        return _decoded(self.blob())

    @property
    def left(self) -> int:
        return len(self.body) - self.at

    def end(self) -> None:
        if self.left:
            raise BadPacket(f"{self.left} bytes behind a packet's fields")


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadPacket("a string that is not UTF-8 (section 1.5.3)") from None
    if "\0" in text:
        raise BadPacket("a string with U+0000 (section 1.5.3)")
    return text


def _read_connect(fields: _Fields) -> Connect:
    if fields.take(len(_PROTOCOL)) != _PROTOCOL:
        raise BadPacket("a CONNECT that is not MQTT 3.1.1 (section 3.1.2)")
    flags = fields.take(1)[0]
    if flags & 0x01 or flags & 0xC0 == 0x40 or (not flags & 0x04 and flags & 0x38):
        raise BadPacket(f"connect flags {flags:#04x} (section 3.1.2.3)")
    keep_alive_s = fields.number()
    client_id = fields.text()
    will = None
    if flags & 0x04:
        will = Will(
            topic=_checked_topic(fields.text()),
            payload=fields.blob(),
            qos=_checked_qos(flags >> 3 & 3),
            retain=bool(flags & 0x20),
        )
    username = fields.text() if flags & 0x80 else None
    password = fields.blob() if flags & 0x40 else None
    if not client_id and not flags & 0x02:
        raise BadPacket("an empty client id needs a clean session (section 3.1.3.1)")
    return Connect(
        client_id=client_id,
        clean=bool(flags & 0x02),
        keep_alive_s=keep_alive_s,
        username=username,
        password=password,
        will=will,
    )


def _read_connack(fields: _Fields) -> ConnAck:
    flags, code = fields.take(2)
    if flags > 1:
        raise BadPacket(f"CONNACK flags {flags:#04x} (section 3.2.2.1)")
    return ConnAck(bool(flags), code)


def _read_subscribe(fields: _Fields) -> Subscribe:
    packet_id, filters = fields.packet_id(), []
    while fields.left:
        filters.append((fields.text(), _checked_qos(fields.take(1)[0])))
    if not filters:
        raise BadPacket("a SUBSCRIBE without filters (section 3.8.3)")
    return Subscribe(packet_id, tuple(filters))


def _read_suback(fields: _Fields) -> SubAck:
    packet_id, codes = fields.packet_id(), tuple(fields.take(fields.left))
    if not codes or any(code not in (0, 1, 2, SUBSCRIBE_REFUSED) for code in codes):
        raise BadPacket("a SUBACK with other codes than 0, 1, 2 and 128 (section 3.9.3)")
    return SubAck(packet_id, codes)


def _read_unsubscribe(fields: _Fields) -> Unsubscribe:
    packet_id, filters = fields.packet_id(), []
    while fields.left:
        filters.append(fields.text())
    if not filters:
        raise BadPacket("an UNSUBSCRIBE without filters (section 3.10.3)")
    return Unsubscribe(packet_id, tuple(filters))


_READERS: dict[int, Callable[[_Fields], Packet]] = {
    0x10: _read_connect,
    0x20: _read_connack,
    0x40: lambda fields: PubAck(fields.packet_id()),
    0x82: _read_subscribe,
    0x90: _read_suback,
    0xA2: _read_unsubscribe,
    0xB0: lambda fields: UnsubAck(fields.packet_id()),
    0xC0: lambda fields: PingReq(),
    0xD0: lambda fields: PingResp(),
    0xE0: lambda fields: Disconnect(),
}


def _read_publish(first: int, body: bytes) -> Publish:
    qos = first >> 1 & 3
    name_end = 2 + int.from_bytes(body[:2], "big")
    start = name_end + 2 if qos else name_end
    if len(body) < max(start, 2):
        raise BadPacket("a packet shorter than its fields")
    packet_id = int.from_bytes(body[name_end:start], "big") if qos else 0
    if qos > 1 or (qos and not packet_id) or (first & 0x08 and not qos):
        raise BadPacket(f"a PUBLISH with flags {first & 15:#x} and packet id {packet_id} (section 3.3)")
    topic = _checked_topic(_decoded(body[2:name_end]))
    return Publish(topic, body[start:], qos, packet_id, bool(first & 1), bool(first & 8))


class Decoder:
    """Bytes in, whole packets out.

    A packet whose body is longer than `max_packet` bytes is refused as soon as its length is known, so
    that a peer cannot make us hold more than that. After a BadPacket the decoder is of no further use.
    """

    __slots__ = ("_buffer", "max_packet")

    def __init__(self, *, max_packet: int = 1_048_576) -> None:
        self._buffer = b""
        self.max_packet = max_packet

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that `data` completes, in order. Raises BadPacket; those before it are then lost,
        which is what closing the connection (section 4.8) would do as well."""
        buffer = self._buffer + data if self._buffer else bytes(data)
        packets: list[Packet] = []
        at, size = 0, len(buffer)
        while size - at >= 2:
            first, length, head = buffer[at], buffer[at + 1], at + 2
            if length & 0x80:  # a length of more than one byte, section 2.2.3
                length &= 0x7F
                shift = 7
                while head < size:
                    byte = buffer[head]
                    head += 1
                    length |= (byte & 0x7F) << shift
                    if not byte & 0x80:
                        break
                    shift += 7
                    if shift > 21:
                        raise BadPacket("a length field of more than four bytes (section 2.2.3)")
                else:
                    break
            if length > self.max_packet:
                raise BadPacket(f"a packet of {length} bytes: {self.max_packet} are allowed here")
            end = head + length
            if end > size:
                break
            if first & 0xF0 == 0x30:
                packets.append(_read_publish(first, buffer[head:end]))
            else:
                if (reader := _READERS.get(first)) is None:
                    raise BadPacket(f"a packet that begins with {first:#04x}: not QoS 0 or 1 of MQTT 3.1.1")
                fields = _Fields(buffer[head:end])
                packets.append(reader(fields))
                fields.end()
            at = end
        self._buffer = buffer[at:] if at else buffer
        return packets
