"""Devices with firmware that nobody can change: plain MQTT, and a name that they look up.

Each counts its messages, keeps what is not acknowledged and sends it again after it is back. They keep the
account of what was acknowledged to them, against which both sides are checked.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from fleetlift.core import mqtt
from fleetlift.core.errors import FleetError
from fleetlift.core.ranges import RangeSet
from fleetlift.load.resolving import Resolver

KEEP_ALIVE_S: Final = 10
SIGN_IN_WITHIN_S: Final = 10.0
ACKNOWLEDGED_WITHIN_S: Final = 15.0  # a connection that acknowledges nothing for so long is given up
UNDER_WAY_MAX: Final = 64
OUTBOX_MAX: Final = 100_000
AGAIN_S: Final = (0.1, 0.2, 0.5, 1.0)


class PlainDevice:
    """One device. `host` is a name; `resolver` is how this device looks it up."""

    def __init__(
        self,
        device: str,
        password: str,
        *,
        host: str,
        port: int,
        resolver: Resolver,
        rate_s: float,
        channel: str = "telemetry",
        body: Callable[[int], dict[str, object]] | None = None,
    ) -> None:
        self.device = device
        self._password = password
        self._host, self._port = host, port
        self._resolver = resolver
        self._every_s = 1.0 / rate_s
        self._topic = f"dt/{device}/{channel}"
        self._body = body or (lambda seq: {})
        self._outbox: deque[tuple[int, bytes]] = deque()
        self._seq = 0
        self._silent = asyncio.Event()  # set: makes no more messages
        self._acked = asyncio.Event()  # set at each acknowledgement
        self.acknowledged = RangeSet()
        self.address = ""  # that it is connected to; "": none
        self.connects = 0
        self.longest_gap_s = 0.0
        self._acknowledged_at: float | None = None

    @property
    def sent(self) -> int:
        """How many messages it has made."""
        return self._seq

    @property
    def waiting(self) -> int:
        return len(self._outbox)

    def fall_silent(self) -> None:
        """Make no more messages; what waits is still sent."""
        self._silent.set()

    async def emptied(self) -> None:
        """Wait until nothing waits any more."""
        while self._outbox:
            self._acked.clear()
            await self._acked.wait()

    async def run(self) -> None:
        """Live until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._make(), name=f"{self.device} makes")
            group.create_task(self._stay_connected(), name=f"{self.device} sends")

    async def _make(self) -> None:
        due = time.monotonic()
        while not self._silent.is_set():
            due += self._every_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(self._outbox) < OUTBOX_MAX and not self._silent.is_set():
                self._seq += 1
                content = {"seq": self._seq, "ts": round(time.time(), 3), **self._body(self._seq)}
                self._outbox.append((self._seq, msgspec.json.encode(content)))

    async def _stay_connected(self) -> None:
        tries = 0
        while True:
            try:
                addresses = await self._resolver.resolve(self._host)
                await self._session(addresses[tries % len(addresses)])
                tries = 0
            except (OSError, TimeoutError, FleetError, asyncio.IncompleteReadError):
                tries += 1
            finally:
                self.address = ""
            await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])

    async def _session(self, address: str) -> None:
        """One connection, until it ends."""
        async with asyncio.timeout(SIGN_IN_WITHIN_S):
            reader, writer = await asyncio.open_connection(address, self._port)
        try:
            decoder = mqtt.Decoder()
            hello = mqtt.Connect(
                client_id=self.device,
                username=self.device,
                password=self._password.encode(),
                keep_alive_s=KEEP_ALIVE_S,
            )
            writer.write(mqtt.encode(hello))
            packets: list[mqtt.Packet] = []
            async with asyncio.timeout(SIGN_IN_WITHIN_S):
                while not packets:
                    packets = decoder.feed(await _some(reader))
            answer = packets.pop(0)
            if not isinstance(answer, mqtt.ConnAck) or answer.code:
                raise OSError("not let in")
            self.address = address
            self.connects += 1
            await self._talk(reader, writer, decoder)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                async with asyncio.timeout(1.0):
                    await writer.wait_closed()

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: mqtt.Decoder
    ) -> None:
        """Send from the front of the outbox, in order; a message leaves it when it is acknowledged."""
        under_way: dict[int, int] = {}  # packet id: seq
        upto = 0  # the newest seq that this connection has sent
        packet_id = 0
        pinged = heard = time.monotonic()
        reading = asyncio.ensure_future(_some(reader))
        try:
            while True:
                for seq, payload in self._outbox:
                    if len(under_way) >= UNDER_WAY_MAX:
                        break
                    if seq > upto:
                        packet_id = packet_id % 65_535 + 1
                        under_way[packet_id] = upto = seq
                        writer.write(mqtt.publish(self._topic, payload, qos=1, packet_id=packet_id))
                if time.monotonic() - pinged > KEEP_ALIVE_S / 2:
                    pinged = time.monotonic()
                    writer.write(mqtt.encode(mqtt.PingReq()))
                await writer.drain()
                await asyncio.wait({reading}, timeout=min(self._every_s, 0.5))
                if reading.done():
                    heard = time.monotonic()
                    for packet in decoder.feed(reading.result()):
                        if isinstance(packet, mqtt.PubAck) and (number := under_way.pop(packet.packet_id, 0)):
                            self._acknowledge(number)
                    reading = asyncio.ensure_future(_some(reader))
                elif time.monotonic() - heard > ACKNOWLEDGED_WITHIN_S:
                    raise TimeoutError("the side says nothing any more")
        finally:
            reading.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
                await reading

    def _acknowledge(self, seq: int) -> None:
        now = time.monotonic()
        if self._acknowledged_at is not None:
            self.longest_gap_s = max(self.longest_gap_s, now - self._acknowledged_at - self._every_s)
        self._acknowledged_at = now
        self.acknowledged.add_range(seq, seq + 1)
        while self._outbox and self._outbox[0][0] in self.acknowledged:
            self._outbox.popleft()
        self._acked.set()


async def _some(reader: asyncio.StreamReader) -> bytes:
    data = await reader.read(65_536)
    if not data:
        raise OSError("the connection ended")
    return data


class PlainFleet:
    """Many plain devices in one task group."""

    def __init__(self, devices: Sequence[PlainDevice]) -> None:
        self.devices = list(devices)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="plain devices")

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for device in self.devices:
                group.create_task(device.run(), name=device.device)

    @property
    def connected(self) -> int:
        return sum(1 for device in self.devices if device.address)

    def at(self, address: str) -> int:
        """How many are connected to that address."""
        return sum(1 for device in self.devices if device.address == address)

    async def finish(self, within_s: float) -> int:
        """Make no more, send what waits; how many messages are left after `within_s`."""
        for device in self.devices:
            device.fall_silent()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                for device in self.devices:
                    await device.emptied()
        await self.stop()
        return sum(device.waiting for device in self.devices)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
