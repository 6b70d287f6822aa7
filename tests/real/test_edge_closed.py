"""What a device could try by MQTT's side doors: wills, retained messages, look-alike ids, large packets."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fleetlift.backend import registry
from fleetlift.backend.context import Context
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.config import split_address
from fleetlift.edge import auth

DEVICES = ("a", "a:b", "a-b", "ab", "b")


@pytest.fixture
async def edge(ctx: Context) -> AsyncIterator[Context]:
    """A backend with devices whose ids begin alike."""
    async with ctx.pool.acquire() as conn:
        await registry.put_devices(
            conn,
            [
                NewDevice(id=d, tenant="t", credentials=(Credential(kind="password", value=f"pw-{d}"),))
                for d in DEVICES
            ],
            generated=True,
            make_tenants=True,
        )
    ready = asyncio.Event()
    working = asyncio.create_task(auth.run(ctx, ready=ready))
    await asyncio.wait_for(ready.wait(), 10)
    yield ctx
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


def text(value: str) -> bytes:
    return struct.pack(">H", len(value.encode())) + value.encode()


def packet(kind: int, body: bytes) -> bytes:
    """An MQTT 3.1.1 control packet (section 2.2)."""
    size, length = b"", len(body)
    while True:
        length, low = divmod(length, 128)
        size += bytes([low | (0x80 if length else 0)])
        if not length:
            return bytes([kind]) + size + body


def connect(device: str, *, client_id: str = "", will: tuple[str, int, bool] | None = None) -> bytes:
    flags = 0xC2 if will is None else 0xC2 | 0x04 | will[1] << 3 | (0x20 if will[2] else 0)
    body = text("MQTT") + bytes([4, flags]) + struct.pack(">H", 60) + text(client_id or device)
    if will is not None:
        body += text(will[0]) + text('{"seq": 1}')
    return packet(0x10, body + text(device) + text(f"pw-{device}"))


def publish(topic: str, qos: int, *, retain: bool = False) -> bytes:
    number = struct.pack(">H", 7) if qos else b""
    return packet(0x30 | qos << 1 | retain, text(topic) + number + b'{"seq": 1}')


class Wire:
    """A TCP connection to the edge that sends whatever it likes."""

    def __init__(self, ctx: Context) -> None:
        self._address = split_address(ctx.settings.mqtt)

    async def open(self) -> "Wire":
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        return self

    async def ask(self, data: bytes) -> bytes:
        """The next packet's beginning; empty when the server closed the connection."""
        self.writer.write(data)
        try:
            return await asyncio.wait_for(self.reader.read(4096), 5)
        except ConnectionError:
            return b""

    def cut(self) -> None:
        """Gone without a good-bye, which is what a will is for."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


WELCOME = b"\x20\x02\x00\x00"
OTHERS = [
    "dt/b/x",
    "feed/legacy/a/x",
    "$aws/things/b/shadow/name/fleetlift/update",
    "$aws/things/a:b/shadow/update",
    "$aws/commands/things/b/executions/1/response/json",
    "$aws/commands/things/a/executions/1/request/json",
    "$MQTT/msgs/dt/b/x",
    "$JS/API/STREAM/PURGE/$MQTT_msgs",
]


async def stored(ctx: Context) -> list[str]:
    state = (await ctx.nc.jetstream().stream_info("$MQTT_msgs", subjects_filter=">")).state
    return sorted((state.subjects or {}).keys())


async def heard_of(ctx: Context) -> list[str]:
    """Every subject that is published from now on, the server's own apart."""
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(message.subject)

    for subject in ("dt.>", "$aws.>", "feed.>"):
        await ctx.nc.subscribe(subject, cb=hear)
    await ctx.nc.flush()
    return heard


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("retain", [False, True])
async def test_a_will_speaks_for_its_own_device_only(edge: Context, qos: int, retain: bool) -> None:
    heard = await heard_of(edge)
    for topic in [*OTHERS, "dt/a/last-words"]:
        wire = await Wire(edge).open()
        await wire.ask(connect("a", will=(topic, qos, retain)))
        wire.cut()
    deadline = time.monotonic() + 10
    while "dt.a.last-words" not in heard:
        assert time.monotonic() < deadline, "the will was not published"
        await asyncio.sleep(0.02)
    await edge.nc.flush()
    assert set(heard) == {"dt.a.last-words"}
    assert set(await stored(edge)) <= {"$MQTT.msgs.dt.a.last-words"}


@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_nothing_is_published_for_another_device_by_any_quality_or_as_retained(
    edge: Context, qos: int
) -> None:
    heard = await heard_of(edge)
    for topic in [
        *OTHERS,
        "dt/a/../b/x",
        "dt//a/x",
        "dt/a%2Fb/x",
        "dt/b//x",
        "dt/a.b/x",
        "dt/ab",
        "dt/a:b/x",
    ]:
        for retain in (False, True):
            wire = await Wire(edge).open()
            assert await wire.ask(connect("a")) == WELCOME
            await wire.ask(publish(topic, qos, retain=retain) + packet(0xC0, b""))
            wire.writer.close()
    await edge.nc.flush()
    strange = [
        s for s in [*heard, *(await stored(edge))] if not s.removeprefix("$MQTT.msgs.").startswith("dt.a.")
    ]
    assert strange == []


@pytest.mark.parametrize("device", ["a", "a:b", "a-b", "ab"])
async def test_ids_that_begin_alike_are_different_devices(edge: Context, device: str) -> None:
    """Nobody takes another's session by its client id, nor reads what is another's."""
    others = [d for d in DEVICES if d != device]
    for other in others:
        for client_id in (other, f"{other}/1"):
            wire = await Wire(edge).open()
            assert await wire.ask(connect(device, client_id=client_id)) != WELCOME
            wire.writer.close()
    wire = await Wire(edge).open()
    assert await wire.ask(connect(device)) == WELCOME
    for other in others:
        for topic in (f"$aws/things/{other}/shadow/#", f"$share/g/$aws/things/{other}/shadow/#"):
            answer = await wire.ask(packet(0x82, b"\x00\x01" + text(topic) + b"\x01"))
            assert answer[:1] == b"" or answer[4] == 0x80, topic
    wire.writer.close()


async def test_a_packet_that_claims_to_be_endless_takes_no_memory(edge: Context) -> None:
    """Before sign-in and after: the server closes the connection instead of waiting for 256 MB."""
    claim = b"\xff\xff\xff\x7f"
    wire = await Wire(edge).open()
    assert await wire.ask(b"\x10" + claim + b"x" * 2000) == b""
    wire = await Wire(edge).open()
    assert await wire.ask(connect("a")) == WELCOME
    answer = await wire.ask(b"\x32" + claim + text("dt/a/x") + b"\x00\x01" + b"x" * 4_000_000)
    assert answer == b""
