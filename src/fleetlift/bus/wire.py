"""A thin client of the NATS protocol, for the two places where the number of messages matters.

nats-py spends some 25 µs a message; this spends 3. It speaks only what the log reader and the publisher need
and leaves everything else (services, requests, the system account) to nats-py.
Source: https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import msgspec

from fleetlift.core.errors import BadInput, Unavailable

# (subject, reply or b"", header block or b"", payload)
OnMessage = Callable[[bytes, bytes, bytes, bytes], None]


class ServerInfo(msgspec.Struct, frozen=True):
    server_id: str = ""
    max_payload: int = 1024 * 1024


class Wire(asyncio.Protocol):
    """One connection. Messages of all subscriptions go to `on_message`, in order, from within the event loop.

    `closed` is done when the connection is lost, with the reason as its result; nothing is sent after that.
    """

    def __init__(
        self,
        user: str,
        password: str,
        name: str,
        on_message: OnMessage,
        tls: tuple[ssl.SSLContext, str] | None = None,  # and the server's name
    ) -> None:
        self._tls = tls
        self._upgrade: asyncio.Task[None] | None = None
        self._login = {"user": user, "pass": password, "name": name}
        self._on_message = on_message
        self._rest = b""
        self._need = 0
        self._out: list[bytes] = []
        self._flushing = False
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.info = ServerInfo()
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.writable = asyncio.Event()
        self.writable.set()
        self.inbox = b"_INBOX." + secrets.token_hex(11).encode()

    def send(self, data: bytes) -> None:
        """Send bytes of the protocol; what is sent in one turn of the loop leaves in one write."""
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        self._flushing = False
        if self._out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, so this cannot be asserted.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=4 * 1024 * 1024)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(str(exc) if exc else "the server closed the connection")

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        buffer = self._rest + data if self._rest else data
        position, end = 0, len(buffer)
        if end < self._need:  # the rest of one large message has not come yet
            self._rest = buffer
            return
        self._need = 0
        on_message = self._on_message
        while position < end:
            line_end = buffer.find(b"\r\n", position)
            if line_end < 0:
                break
            kind = buffer[position]
            if kind == 0x48 or kind == 0x4D:  # HMSG, MSG
                words = buffer[position:line_end].split(b" ")
                start = line_end + 2
                stop = start + int(words[-1])
                if stop + 2 > end:
                    self._need = stop + 2 - position
                    break
                if kind == 0x48:
                    body = start + int(words[-2])
                    reply = words[3] if len(words) == 6 else b""
                    on_message(words[1], reply, buffer[start:body], buffer[body:stop])
                else:
                    reply = words[3] if len(words) == 5 else b""
                    on_message(words[1], reply, b"", buffer[start:stop])
                position = stop + 2
            else:
                self._control(buffer[position:line_end])
                position = line_end + 2
        self._rest = buffer[position:] if position < end else b""

    def _control(self, line: bytes) -> None:
        word = line[:4].upper()
        if word == b"PING":
            self.send(b"PONG\r\n")
        elif word == b"PONG":
            if not self.ready.done():
                self.ready.set_result(None)
        elif word == b"INFO":
            first = not self.info.server_id
            self.info = msgspec.json.decode(line[5:], type=ServerInfo)
            if first and self._tls is not None:
                self._upgrade = self._loop.create_task(self._start_tls(*self._tls))
            elif first:
                self._sign_in()
        elif word == b"-ERR":
            text = line[4:].decode(errors="replace").strip()
            # A permission error is about one subject; the connection stays.
            if "Permissions Violation" not in text:
                self._fail(text)
                if self._transport is not None:
                    self._transport.close()

    async def _start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """The server speaks first in the clear, then both change to TLS. Nothing secret was sent before."""
        try:
            plain = self._transport
            assert plain is not None
            secure = await self._loop.start_tls(plain, self, context, server_hostname=host)
        except (OSError, AssertionError) as problem:
            self._fail(f"TLS: {problem}")
            return
        self._transport = secure
        self._sign_in()

    def _sign_in(self) -> None:
        login = {**self._login, "verbose": False, "pedantic": False, "headers": True, "lang": "python"}
        login |= {"version": "1", "protocol": 1, "no_responders": True, "tls_required": self._tls is not None}
        self.send(b"CONNECT " + msgspec.json.encode(login) + b"\r\nPING\r\n")

    def _fail(self, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)
        if not self.ready.done():
            self.ready.set_exception(Unavailable(f"NATS refused the connection: {reason}"))
            self.ready.exception()
        self.writable.set()


async def connect(
    url: str,
    *,
    user: str,
    password: str,
    name: str,
    on_message: OnMessage,
    ca: str = "",
    timeout_s: float = 5.0,
) -> Wire:
    """Connect and sign in. Of several servers, with commas between, to the first that answers.

    Raises Unavailable when none can be reached, or it refuses.
    With a `tls://` URL the server's certificate must be good for its name, by the authority in the PEM file
    `ca` (empty: by those that the system trusts).
    """
    servers = url.split(",")
    for server in servers[:-1]:
        with contextlib.suppress(Unavailable):
            return await _connect(server, user, password, name, on_message, ca, timeout_s / len(servers))
    return await _connect(servers[-1], user, password, name, on_message, ca, timeout_s / len(servers))


async def _connect(
    url: str, user: str, password: str, name: str, on_message: OnMessage, ca: str, timeout_s: float
) -> Wire:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    host, port = parts.hostname or "127.0.0.1", parts.port or 4222
    tls = (trusting(ca), host) if parts.scheme == "tls" else None
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            _, wire = await loop.create_connection(
                lambda: Wire(user, password, name, on_message, tls), host, port
            )
            try:
                await wire.ready
            except BaseException:
                wire.close()
                raise
            return wire
    except (OSError, TimeoutError) as problem:
        raise Unavailable(f"NATS at {host}:{port} does not answer ({problem})") from problem


def trusting(ca: str) -> ssl.SSLContext:
    """A TLS context that believes the authority in the PEM file `ca`, or the system's. Raises BadInput."""
    try:
        return ssl.create_default_context(cafile=ca or None)
    except OSError as problem:
        raise BadInput(f"{ca} is no certificate authority ({problem}): give a PEM file") from problem


def parse_headers(block: bytes) -> tuple[str, dict[str, str]]:
    """(status, headers) of a header block `NATS/1.0[ status]\\r\\nName: value\\r\\n…`."""
    lines = block.decode(errors="replace").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name] = value.strip()
    return lines[0].removeprefix("NATS/1.0").strip(), headers


def format_headers(headers: dict[str, str]) -> bytes:
    """The header block of a message. Names and values hold no line break: raises ValueError."""
    if any("\r" in text or "\n" in text for pair in headers.items() for text in pair):
        raise ValueError("a header cannot contain a line break")
    return b"NATS/1.0\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items()).encode() + b"\r\n"
