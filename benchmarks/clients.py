"""What the benches of shadows and commands share: devices that listen as well as publish, and an open model.

A generator is a process of its own (`python -m benchmarks.NAME`): it takes one JSON line, does what it says
and answers with one JSON line. On two cores it must leave most of them to what is measured, hence the plain
protocols and uvloop.
"""

import asyncio
import itertools
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import uvloop

from benchmarks.figures import BenchFailed
from benchmarks.mqtt_load import LATE_MAX_S, TICK_S, quantile
from fleetlift.core import mqtt

T = TypeVar("T")

DONE_WITHIN_S = 30.0  # after the last request, until every answer must have come


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a generator did. Latencies count from the intended time; `wall_s` is until the last answer."""

    sent: int
    answered: int
    refused: int
    wall_s: float
    late_p99_s: float
    p50_s: float
    p99_s: float
    max_s: float

    @property
    def late(self) -> str:
        """Why the generator makes this run invalid; empty when it does not."""
        return "" if self.late_p99_s <= LATE_MAX_S else f"the generator was late by {self.late_p99_s:.2f} s"


class Device(asyncio.Protocol):
    """One device, signed in and subscribed once `ready` is done. `on_publish` gets what comes to it."""

    def __init__(
        self,
        name: str,
        password: str,
        filters: Sequence[tuple[str, int]],
        on_publish: Callable[["Device", mqtt.Publish], None],
    ) -> None:
        self.name, self._password, self._filters, self._on_publish = (
            name,
            password,
            tuple(filters),
            on_publish,
        )
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decoder = mqtt.Decoder()
        self._packet_ids = itertools.cycle(range(1, 0x10000))

    def publish(self, topic: str, payload: bytes) -> None:
        """With QoS 1; the answer to it is what counts, not its PUBACK."""
        self._transport.write(mqtt.publish(topic, payload, qos=1, packet_id=next(self._packet_ids)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        hello = mqtt.Connect(
            client_id=self.name, username=self.name, password=self._password.encode(), keep_alive_s=0
        )
        self._transport.write(mqtt.encode(hello))

    def data_received(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            match packet:
                case mqtt.Publish():
                    if packet.qos:
                        self._transport.write(mqtt.puback(packet.packet_id))
                    self._on_publish(self, packet)
                case mqtt.ConnAck(code=0):
                    self._transport.write(mqtt.encode(mqtt.Subscribe(1, self._filters)))
                case mqtt.SubAck() if mqtt.SUBSCRIBE_REFUSED not in packet.codes:
                    self.ready.set_result(None)
                case mqtt.PubAck():
                    pass
                case _:
                    raise BenchFailed(f"{self.name}: the broker answered {packet}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(BenchFailed(f"{self.name} was not let in ({exc})"))


async def connected(
    address: tuple[str, int],
    devices: Sequence[tuple[str, str]],
    filters: Callable[[str], Sequence[tuple[str, int]]],
    on_publish: Callable[[Device, mqtt.Publish], None],
) -> list[Device]:
    """Devices (id, password), signed in one after the other and subscribed to their `filters`."""
    found = []
    loop = asyncio.get_running_loop()
    for name, password in devices:
        device = Device(name, password, filters(name), on_publish)
        await loop.create_connection(lambda device=device: device, *address)  # type: ignore[misc]
        await device.ready
        found.append(device)
    return found


class OpenModel:
    """Requests at a rate, whether or not earlier ones have been answered; each answered once."""

    def __init__(self, rate: float, seconds: float) -> None:
        self._rate, self._total = rate, round(rate * seconds)
        self._intended: dict[int, float] = {}
        self._latencies, self._lateness = array("d"), array("d")
        self._refused = 0
        self._last = 0.0

    def answered(self, number: int) -> None:
        """Request `number` has come to its end. Raises BenchFailed when it had already."""
        intended = self._intended.pop(number, None)
        if intended is None:
            raise BenchFailed(f"request {number} was answered twice")
        self._last = time.monotonic()
        self._latencies.append(self._last - intended)

    def refused(self, number: int) -> None:
        self._refused += 1
        self._intended.pop(number, None)

    async def run(self, send: Callable[[int], None]) -> Load:
        """`send(number)` for each request when its time has come; then wait for what is unanswered."""
        began, sent = time.monotonic() + TICK_S, 0
        while sent < self._total:
            due = min(self._total, int((time.monotonic() - began) * self._rate))
            while sent < due:
                intended = began + sent / self._rate
                self._intended[sent] = intended
                send(sent)
                self._lateness.append(time.monotonic() - intended)
                sent += 1
            await asyncio.sleep(TICK_S)
        end = time.monotonic() + DONE_WITHIN_S
        while self._intended and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)
        return Load(
            sent=sent,
            answered=len(self._latencies),
            refused=self._refused,
            wall_s=(self._last or time.monotonic()) - began,
            late_p99_s=quantile(self._lateness, 0.99),
            p50_s=quantile(self._latencies, 0.5),
            p99_s=quantile(self._latencies, 0.99),
            max_s=quantile(self._latencies, 1.0),
        )


# -- processes --------------------------------------------------------------------------------------------


def child(spec: type[T], work: Callable[[T], Awaitable[Load]]) -> None:
    """The generator's side: a specification on standard input, its load on standard output."""
    given = msgspec.json.decode(sys.stdin.readline(), type=spec)

    async def main() -> Load:
        return await work(given)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        done = runner.run(main())
    sys.stdout.write(msgspec.json.encode(done).decode() + "\n")


async def generate(module: str, spec: Any, on_start: Callable[[int], None] = lambda pid: None) -> Load:
    """The bench's side: run generator `module` in a process; `on_start` is told its pid."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    try:
        on_start(process.pid)
        text, _ = await process.communicate(msgspec.json.encode(spec) + b"\n")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise BenchFailed(f"the generator ended with {process.returncode}")
    return msgspec.json.decode(text, type=Load)
