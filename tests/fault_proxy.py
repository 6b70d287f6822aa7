"""A TCP proxy for one link, with faults that can be switched on and off while it runs.

Stands between a device and a side, or between the engine and the old side:

    async with FaultProxy(server.address) as proxy:
        …connect to proxy.address…
        proxy.cut()
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from fleetlift.testing import free_port

READ_BYTES = 16 * 1024
UP, DOWN = "up", "down"  # towards the server, towards the client
BOTH = frozenset({UP, DOWN})


class FaultProxy:
    """Faults are attributes, which may be set at any time, and methods for what happens once.

    `stalled`: directions in which nothing passes; connections are still taken. `latency_s` (a range that each
    piece draws from) and `bytes_per_s` slow both directions, each connection for itself.
    """

    def __init__(self, target: tuple[str, int], *, seed: int = 1) -> None:
        self.target = target
        self.address = ("127.0.0.1", free_port())
        self.stalled: frozenset[str] = frozenset()
        self.latency_s = (0.0, 0.0)
        self.bytes_per_s = 0.0
        self.accepted = 0
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"tcp://{self.address[0]}:{self.address[1]}"

    @property
    def forwarding(self) -> bool:
        """Connections are open, or something that was held back is under way still."""
        return bool(self._links)

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- faults ---

    async def refuse(self, *, reset: bool = True) -> None:
        """Nobody listens any more, and what was open is cut."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut(reset=reset)
        await asyncio.sleep(0)

    async def accept(self) -> None:
        """Connections are taken again."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, *self.address, limit=READ_BYTES)

    def cut(self, *, reset: bool = True) -> None:
        """End all connections, by RST or by FIN; what was under way is lost."""
        for link in list(self._links):
            link.end(reset=reset)

    def half_open(self) -> None:
        """The network forgets the connections there are: nothing passes, and nobody hears that they ended."""
        for link in self._links:
            link.dead = True

    async def reorder(self, hold_s: float) -> None:
        """The client is cut off and may come back, while its last bytes reach the server `hold_s` later.

        So a new connection's first bytes overtake the old one's last ones.
        """
        links = list(self._links)
        for link in links:
            link.holding = True
        await asyncio.sleep(0.3)  # something to be overtaken comes together
        for link in links:
            link.cut_client()
            self._spawn(link.deliver_late(hold_s))

    # --- forwarding ---

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.target, limit=READ_BYTES)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(self, writer, up_writer)
        self._links.add(link)
        try:
            for pump in (link.pump(reader, up_writer, UP), link.pump(up_reader, writer, DOWN)):
                self._spawn(pump)
            await link.over.wait()
        finally:
            self._links.discard(link)
            link.end(reset=False)

    async def passage(self, size: int) -> None:
        """The time that `size` bytes take."""
        seconds = self._random.uniform(*self.latency_s)
        if self.bytes_per_s:
            seconds += size / self.bytes_per_s
        if seconds:
            await asyncio.sleep(seconds)


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: FaultProxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.over = asyncio.Event()
        self.dead = False  # the network has forgotten it
        self.holding = False  # what the client sends is kept back
        self.held = bytearray()
        self._client, self._server = client, server

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self.proxy.passage(len(data))
                while not self.over.is_set():
                    if not self.dead and direction not in self.proxy.stalled:
                        break
                    await asyncio.sleep(0.02)
                else:
                    return
                if self.holding:
                    if direction == UP:
                        self.held += data
                    continue
                writer.write(data)
                await writer.drain()
        if not self.dead and not self.holding:
            self.over.set()

    def cut_client(self) -> None:
        _reset(self._client)

    async def deliver_late(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        with contextlib.suppress(OSError):
            self._server.write(bytes(self.held))
            await self._server.drain()
        self.holding = False
        self.over.set()

    def end(self, *, reset: bool) -> None:
        self.over.set()
        for writer in (self._client, self._server):
            if reset:
                _reset(writer)
            else:
                writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST: the other end loses what it has not read yet."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
