"""How many shadow updates of devices a backend acknowledges in a second.

200 devices publish `{"state": {"reported": {…}}}` to their own shadow by MQTT, QoS 1, in an open model; what
counts is the `accepted` message that comes back to the device that asked, after the commit. A rate counts
when every update was accepted, the stored versions say so too, and 99 of 100 came within a second of when the
update was meant to be sent.
"""

import asyncpg
import msgspec

from benchmarks.bench import Bench
from benchmarks.clients import Device, Load, OpenModel, child, connected
from benchmarks.figures import Figure, Measured
from benchmarks.ingest import register
from benchmarks.limits import upserts_per_s
from benchmarks.sustained import Kind, sustained
from fleetlift.core import mqtt
from fleetlift.testing import running_backend

DEVICES = 200
TARGET = 3000.0
RATES = (
    500.0,
    1000.0,
    1500.0,
    2000.0,
    2500.0,
    TARGET,
    4000.0,
    5000.0,
    6000.0,
    7000.0,
    8000.0,
    9000.0,
    10_000.0,
)
P99_MAX_S = 1.0
_BODY = (
    b'{"state":{"reported":{"n":%d,"soc":78.5,"lat":47.137421,"lon":8.542319,"locked":true,"cabin":21.5}},'
    b'"clientToken":"%d"}'
)
_TOKEN = b'"clientToken":"'

FIGURES = (
    Figure(
        name="shadow_updates_s",
        unit="/s",
        better="higher",
        target=TARGET,
        means="shadow updates by MQTT accepted, sustained for 30 s with a p99 below 1 s",
        limit="PostgreSQL alone replacing the same documents, 50 a transaction, one connection",
    ),
)


KIND = Kind(
    module="benchmarks.shadow_updates",
    noun="updates",
    path="update to accepted",
    rates=RATES,
    target=TARGET,
    p99_max_s=P99_MAX_S,
)


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    devices: list[tuple[str, str]]
    rate: float
    seconds: float


async def updates(spec: Spec) -> Load:
    """The generator."""
    model = OpenModel(spec.rate, spec.seconds)

    def on_publish(device: Device, packet: mqtt.Publish) -> None:
        start = packet.payload.rindex(_TOKEN) + len(_TOKEN)
        number = int(packet.payload[start : packet.payload.index(b'"', start)])
        if packet.topic.endswith("/accepted"):
            model.answered(number)
        else:
            model.refused(number)

    def filters(name: str) -> list[tuple[str, int]]:
        base = f"$aws/things/{name}/shadow/update"
        return [(f"{base}/accepted", 0), (f"{base}/rejected", 0)]

    devices = await connected((spec.host, spec.port), spec.devices, filters, on_publish)
    topics = [f"$aws/things/{device.name}/shadow/update" for device in devices]

    def send(number: int) -> None:
        which = number % len(devices)
        devices[which].publish(topics[which], _BODY % (number, number))

    return await model.run(send)


async def run(bench: Bench) -> list[Measured]:
    async with running_backend(bench.directory / "backend") as backend:
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            devices = await register(connection, DEVICES)
            host, port = backend.mqtt

            async def stored() -> int:
                return int(
                    await connection.fetchval("SELECT coalesce(sum(version), 0) FROM shadow WHERE name = ''")
                )

            found = await sustained(
                bench,
                backend,
                KIND,
                lambda rate, seconds: Spec(host=host, port=port, devices=devices, rate=rate, seconds=seconds),
                stored,
            )
            bench.progress("the same documents by PostgreSQL alone")
            alone = await upserts_per_s(connection, (_BODY % (1, 1)).decode(), DEVICES)
        finally:
            await connection.close()
    return [
        Measured(
            name="shadow_updates_s", value=found.rate, limit=alone, invalid=found.invalid, notes=found.notes
        )
    ]


if __name__ == "__main__":
    child(Spec, updates)
