"""Who a new connection comes from, by its first bytes: the client id of MQTT, the server name of TLS.

Nothing is validated here beyond what is needed to find the name: the bytes go on to a backend, which is the
one to refuse them. Every version of MQTT is read (3.1, 3.1.1, 5), and so is a will of any QoS.
"""

from typing import Final

import msgspec

PEEK_BYTES_MAX: Final = 65_536  # a CONNECT that is longer is named by what stands in its beginning
NAME_CHARS_MAX: Final = 256


class Peek(msgspec.Struct, frozen=True, kw_only=True):
    """What the first bytes say. All empty: a protocol that is not known here."""

    protocol: str = ""  # mqtt | tls | "" for another one
    client_id: str = ""
    username: str = ""
    server_name: str = ""


OTHER: Final = Peek()


class _Short(Exception):
    pass


class _Bytes:
    def __init__(self, data: bytes, end: int) -> None:
        self.data, self.at, self.end = data, 0, end

    def take(self, n: int) -> bytes:
        start, self.at = self.at, self.at + n
        if self.at > self.end:
            raise ValueError("fields beyond the end of the packet")
        if self.at > len(self.data):
            raise _Short
        return self.data[start : self.at]

    def number(self, n: int = 2) -> int:
        return int.from_bytes(self.take(n), "big")

    def blob(self) -> bytes:
        return self.take(self.number())

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
            shift += 7
            if shift > 21:
                raise ValueError("a length of more than four bytes")


def peek(data: bytes) -> Peek | None:
    """Who speaks; None while more bytes are needed to say. With `PEEK_BYTES_MAX` bytes there is an answer."""
    if not data:
        return None
    try:
        if data[0] == 0x10:
            return _mqtt(data)
        if data[0] == 0x16:
            return _tls(data)
    except _Short:
        return None if len(data) < PEEK_BYTES_MAX else OTHER
    except (ValueError, IndexError):
        return OTHER
    return OTHER


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")[:NAME_CHARS_MAX]


def _mqtt(data: bytes) -> Peek:
    head = _Bytes(data, len(data) + 5)
    head.take(1)
    length = head.varint()
    fields = _Bytes(data, head.at + length)
    fields.at = head.at
    name, level, flags = fields.blob(), fields.number(1), fields.number(1)
    if name not in (b"MQTT", b"MQIsdp"):
        return OTHER
    fields.take(2)  # keep alive
    if level >= 5:
        fields.take(fields.varint())
    client_id = _text(fields.blob())
    try:
        if flags & 0x04:
            if level >= 5:
                fields.take(fields.varint())
            fields.blob()
            fields.blob()
        username = _text(fields.blob()) if flags & 0x80 else ""
    except _Short:
        if len(data) < PEEK_BYTES_MAX:
            raise
        username = ""
    return Peek(protocol="mqtt", client_id=client_id, username=username)


def _tls(data: bytes) -> Peek:
    """RFC 8446 section 4.1.2 and RFC 6066 section 3; a ClientHello may be cut into several records."""
    hello, at = b"", 0
    while len(hello) < 4 or len(hello) < 4 + int.from_bytes(hello[1:4], "big"):
        if len(data) < at + 5:
            raise _Short
        if data[at] != 0x16 or data[at + 1] != 3:
            raise ValueError("no TLS handshake")
        size = int.from_bytes(data[at + 3 : at + 5], "big")
        if not 0 < size <= 16_640:
            raise ValueError("a TLS record of an impossible size")
        if len(data) < at + 5 + size:
            raise _Short
        hello += data[at + 5 : at + 5 + size]
        at += 5 + size
        if hello[0] != 1:
            raise ValueError("no ClientHello")
    fields = _Bytes(hello, 4 + int.from_bytes(hello[1:4], "big"))
    fields.take(4 + 2 + 32)  # header, version, random
    fields.take(fields.number(1))  # session id
    fields.blob()  # cipher suites
    fields.take(fields.number(1))  # compression methods
    if fields.at < fields.end:
        extensions_end = fields.number() + fields.at
        while fields.at < extensions_end:
            kind, body = fields.number(), fields.blob()
            if kind == 0 and len(body) >= 5 and body[2] == 0:
                size = int.from_bytes(body[3:5], "big")
                return Peek(protocol="tls", server_name=_text(body[5 : 5 + size]).lower())
    return Peek(protocol="tls")
