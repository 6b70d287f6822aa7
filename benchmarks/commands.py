"""How many commands a second go from an HTTP request to their final state, and how long the latest take.

One request a command (`POST /api/v1/devices/{id}/commands`), by 32 kept connections to the one API process;
each device gets its command by MQTT and answers `SUCCEEDED`, QoS 1; the command has come to its end when the
backend tells the device that its answer is accepted, which it does once that is committed. The model is open:
latency counts from the moment at which the request was meant to be made.
"""

import asyncio
from typing import cast

import asyncpg
import msgspec

from benchmarks.bench import Bench
from benchmarks.clients import Device, Load, OpenModel, child, connected
from benchmarks.figures import Figure, Measured
from benchmarks.ingest import register
from benchmarks.limits import orders_per_s
from benchmarks.sustained import Kind, sustained
from fleetlift.core import mqtt
from fleetlift.testing import running_backend

DEVICES = 200
CONNECTIONS = 32
TARGET = 1000.0
RATES = (100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 850.0, TARGET, 1200.0, 1400.0, 1700.0, 2000.0)
P99_MAX_S = 0.5

FIGURES = (
    Figure(
        name="commands_s",
        unit="/s",
        better="higher",
        target=TARGET,
        means="single commands by HTTP, each executed and answered, for 30 s with a p99 below 0.5 s",
        limit="PostgreSQL alone inserting a row and bringing it to its end, 50 a transaction, one connection",
    ),
    Figure(
        name="commands_p99_s",
        unit="s",
        better="lower",
        target=P99_MAX_S,
        means="from the intended request to the final state stored, at that rate",
        limit="the p99 of one such row inserted and brought to its end alone, in two transactions",
    ),
)


KIND = Kind(
    module="benchmarks.commands",
    noun="commands",
    path="request to final state",
    rates=RATES,
    target=TARGET,
    p99_max_s=P99_MAX_S,
)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    devices: list[tuple[str, str]]
    http: tuple[str, int]
    token: str
    rate: float
    seconds: float


class _Http(asyncio.Protocol):
    """One kept connection with one request at a time; answers are short and have a Content-Length."""

    def __init__(self, pool: "_Requests") -> None:
        self._pool, self._buffer, self.number = pool, b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        if len(body) >= length:
            self._buffer = b""
            self._pool.done(self, int(head[9:12]), body)


class _Answer(msgspec.Struct):
    id: str


class _Requests:
    """Requests by whichever connection is free; those for which none is wait in order."""

    def __init__(self, spec: Spec, model: OpenModel) -> None:
        self._spec, self._model = spec, model
        self._free: list[_Http] = []
        self._queue: list[int] = []
        self._numbers: dict[str, int] = {}  # of commands by id, once the API has said it
        self._early: set[str] = set()  # final before the API's own answer was read

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(CONNECTIONS):
            _, connection = await loop.create_connection(lambda: _Http(self), *self._spec.http)
            self._free.append(connection)

    def send(self, number: int) -> None:
        if not self._free:
            self._queue.append(number)
            return
        connection = self._free.pop()
        connection.number = number
        device, _ = self._spec.devices[number % len(self._spec.devices)]
        body = b'{"name":"lock","params":{"door":%d}}' % (number % 4)
        connection.transport.write(
            b"POST /api/v1/devices/%s/commands HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %s\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (device.encode(), self._spec.token.encode(), len(body), body)
        )

    def done(self, connection: _Http, status: int, body: bytes) -> None:
        if status != 202:
            self._model.refused(connection.number)
        else:
            command = msgspec.json.decode(body, type=_Answer).id
            if command in self._early:
                self._early.discard(command)
                self._model.answered(connection.number)
            else:
                self._numbers[command] = connection.number
        self._free.append(connection)
        if self._queue:
            self.send(self._queue.pop(0))

    def final(self, command: str) -> None:
        if (number := self._numbers.pop(command, None)) is None:
            self._early.add(command)
        else:
            self._model.answered(number)


async def commands(spec: Spec) -> Load:
    """The generator: callers and devices."""
    model = OpenModel(spec.rate, spec.seconds)
    requests = _Requests(spec, model)

    def on_publish(device: Device, packet: mqtt.Publish) -> None:
        # $aws/commands/things/{device}/executions/{command}/request/json, or …/response/accepted/json
        parts = packet.topic.split("/")
        if parts[6] == "request":
            answer = f"$aws/commands/things/{device.name}/executions/{parts[5]}/response/json"
            device.publish(answer, b'{"status":"SUCCEEDED"}')
        else:
            requests.final(parts[5])

    def filters(name: str) -> list[tuple[str, int]]:
        base = f"$aws/commands/things/{name}/executions/+"
        return [(f"{base}/request/json", 1), (f"{base}/response/accepted/json", 0)]

    await connected((spec.host, spec.port), spec.devices, filters, on_publish)
    await requests.open()
    return await model.run(requests.send)


async def run(bench: Bench) -> list[Measured]:
    async with running_backend(bench.directory / "backend") as backend:
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            devices = await register(connection, DEVICES)
            host, port = backend.mqtt
            web, _, web_port = backend.url.partition("://")[2].rpartition(":")

            def spec(rate: float, seconds: float) -> Spec:
                return Spec(
                    host=host,
                    port=port,
                    devices=devices,
                    http=(web, int(web_port)),
                    token=backend.token,
                    rate=rate,
                    seconds=seconds,
                )

            async def stored() -> int:
                return int(
                    await connection.fetchval("SELECT count(*) FROM command WHERE status = 'succeeded'")
                )

            found = await sustained(bench, backend, KIND, spec, stored)
            bench.progress("the same rows by PostgreSQL alone")
            alone, alone_s = await orders_per_s(connection, '{"door":1}')
        finally:
            await connection.close()
    return [
        Measured(name="commands_s", value=found.rate, limit=alone, invalid=found.invalid, notes=found.notes),
        Measured(name="commands_p99_s", value=found.load.p99_s, limit=alone_s, invalid=found.invalid),
    ]


if __name__ == "__main__":
    child(Spec, commands)
