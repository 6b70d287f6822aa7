"""Who may publish and subscribe to what over MQTT: every topic family, by every kind of caller, cell by cell.

What `edge/permits.py` means is written down here a second time, as a table, and asked of a real server.
"""

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest
from nats.errors import Error as NatsError

from fleetlift.backend import registry
from fleetlift.backend.context import Context
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.bus.embedded import SUBSCRIPTIONS_MAX
from fleetlift.config import split_address
from fleetlift.core import mqtt
from fleetlift.edge import auth

DEVICES = {"a1": "a", "a2": "a", "b1": "b"}  # device: tenant

# Topic: may its device {d} publish there, subscribe to it. Nobody else may either.
OWN: dict[str, tuple[bool, bool]] = {
    "dt/{d}": (True, False),
    "dt/{d}/x": (True, False),
    "dt/{d}/engine/oil": (True, False),
    "$aws/things/{d}/shadow": (False, True),
    "$aws/things/{d}/shadow/get": (True, True),
    "$aws/things/{d}/shadow/update": (True, True),
    "$aws/things/{d}/shadow/delete": (True, True),
    "$aws/things/{d}/shadow/other": (False, True),
    "$aws/things/{d}/shadow/get/accepted": (False, True),
    "$aws/things/{d}/shadow/update/delta": (False, True),
    "$aws/things/{d}/shadow/name/fleetlift/update": (True, True),
    "$aws/things/{d}/shadow/name/n/get": (True, True),
    "$aws/things/{d}/shadow/name/n/update/delta": (False, True),
    "$aws/things/{d}/shadow/name/n/m/get": (False, True),
    "$aws/commands/things/{d}/executions/1/request/json": (False, True),
    "$aws/commands/things/{d}/executions/1/response/json": (True, False),
    "$aws/commands/things/{d}/executions/1/response/accepted/json": (False, True),
    "$aws/commands/things/{d}/executions/1/response/rejected/json": (False, True),
    "$aws/commands/things/{d}/executions/1/response/json/x": (False, False),
    "feed/legacy/{d}/x": (False, False),
    "$MQTT/msgs/dt/{d}/x": (False, False),
    "$MQTT/sub/{d}": (False, False),
    "_INBOX/{d}": (False, False),
    "telemetry/{d}": (False, False),
    "{d}": (False, False),
}
NOBODYS = [
    "$SYS/REQ/SERVER/PING",
    "$SYS/REQ/USER/AUTH",
    "$SYS/ACCOUNT/DEV/CONNECT",
    "$JS/API/STREAM/NAMES",
    "$JS/API/STREAM/PURGE/$MQTT_msgs",
    "$JS/API/STREAM/MSG/GET/$MQTT_rmsgs",
    "$JS/ACK/x",
    "$MQTT/JSA/x",
    "$MQTT/rmsgs/dt/b1/x",
    "$MQTT/deliver/pubrel/x",
    "_INBOX/x/y",
    "alive/auth",
    "dt",
    "x",
    "$share/g/dt/b1/x",
]
WILDCARDS = {  # may device {d} subscribe
    "#": False,
    "+": False,
    "+/#": False,
    "+/+/+": False,
    "/#": False,
    "dt/#": False,
    "dt/+/x": False,
    "dt/{d}/#": False,
    "feed/#": False,
    "$aws/#": False,
    "$aws/things/#": False,
    "$aws/things/+/shadow/#": False,
    "$aws/things/{d}/#": False,
    "$aws/things/{d}/shadow/#": True,
    "$aws/things/{d}/shadow/+": True,
    "$aws/things/{d}/shadow/name/+/update/delta": True,
    "$aws/commands/things/+/executions/+/request/json": False,
    "$aws/commands/things/{d}/executions/#": False,
    "$aws/commands/things/{d}/executions/+/request/json": True,
    "$aws/commands/things/{d}/executions/+/response/#": False,
    "$SYS/#": False,
    "$JS/#": False,
    "$MQTT/#": False,
    "$MQTT/sub/#": False,
    "_INBOX/#": False,
    "$share/g/#": False,
    "$share/g/dt/{d}/x": False,
    "$share/g/$aws/things/{d}/shadow/#": False,
}


@pytest.fixture
async def edge(ctx: Context) -> AsyncIterator[Context]:
    """Sign-in at work for three devices of two tenants, and one that was deleted."""
    async with ctx.pool.acquire() as conn:
        await registry.put_devices(
            conn,
            [
                NewDevice(id=d, tenant=t, credentials=(Credential(kind="password", value=f"pw-{d}"),))
                for d, t in {**DEVICES, "gone": "a"}.items()
            ],
            generated=True,
            make_tenants=True,
        )
        await registry.delete_device(conn, "gone")
    ready = asyncio.Event()
    working = asyncio.create_task(auth.run(ctx, ready=ready))
    await asyncio.wait_for(ready.wait(), 10)
    yield ctx
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)


class Caller:
    """One MQTT connection, packet by packet."""

    def __init__(self, ctx: Context) -> None:
        self._address = split_address(ctx.settings.mqtt)
        self._decoder = mqtt.Decoder()
        self._held: list[mqtt.Packet] = []
        self._ids = itertools.cycle(range(1, 60_000))

    async def open(
        self, user: str | None, password: str | None, *, client_id: str = "", will: mqtt.Will | None = None
    ) -> int:
        """The code of the CONNACK; -1 when the connection was closed instead."""
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        self.send(
            mqtt.Connect(
                client_id=client_id or user or "x",
                username=user,
                password=None if password is None else password.encode(),
                will=will,
            )
        )
        welcome = await self.next()
        return welcome.code if isinstance(welcome, mqtt.ConnAck) else -1

    def send(self, *packets: mqtt.Packet) -> None:
        self.writer.write(b"".join(map(mqtt.encode, packets)))

    async def next(self) -> mqtt.Packet | None:
        while not self._held:
            try:
                data = await asyncio.wait_for(self.reader.read(65536), 10)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._held += self._decoder.feed(data)
        return self._held.pop(0)

    async def publish(self, topic: str, qos: int, *, retain: bool) -> None:
        """Returns once the server has dealt with it."""
        number = next(self._ids) if qos else 0
        self.send(mqtt.Publish(topic, b'{"seq":1}', qos, number, retain), mqtt.PingReq())
        while not isinstance(await self.next(), mqtt.PingResp | None):
            pass

    async def may_subscribe(self, topic_filter: str, qos: int = 1) -> bool:
        self.send(mqtt.Subscribe(next(self._ids), ((topic_filter, qos),)))
        while not isinstance(answer := await self.next(), mqtt.SubAck | None):
            pass
        return answer is not None and answer.codes[0] < mqtt.SUBSCRIBE_REFUSED

    async def received(self) -> list[str]:
        """Topics of what was sent to it up to now."""
        self.send(mqtt.PingReq())
        found = []
        while not isinstance(packet := await self.next(), mqtt.PingResp | None):
            if isinstance(packet, mqtt.Publish):
                found.append(packet.topic)
        return found

    def cut(self) -> None:
        """Gone without a good-bye, which is what a will is for."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def signed_in(ctx: Context, device: str, **how: Any) -> AsyncIterator[Caller]:
    caller = Caller(ctx)
    assert await caller.open(device, f"pw-{device}", **how) == 0
    try:
        yield caller
    finally:
        caller.writer.close()


async def stored(ctx: Context, stream: str) -> set[str]:
    """Subjects of what a stream holds."""
    state = (await ctx.nc.jetstream().stream_info(stream, subjects_filter=">")).state
    return set((state.subjects or {}).keys())


def subject(topic: str) -> str:
    return topic.replace("/", ".")


async def test_only_a_device_with_its_own_password_gets_in(edge: Context) -> None:
    """Neither a wrong nor a missing password, a deleted device, another's name nor a service's credential."""
    settings = edge.settings
    refused: list[tuple[str | None, str | None, str]] = [
        ("a1", "wrong", ""),
        ("a1", "pw-a2", ""),
        ("a1", "pw-b1", ""),
        ("a1", None, ""),
        ("a1", "", ""),
        (None, None, "a1"),
        ("", "pw-a1", "a1"),
        ("gone", "pw-gone", ""),
        ("nobody", "pw-nobody", ""),
        ("a1", "pw-a1", "b1"),
        ("a1", "pw-a1", "b1/1"),
        ("a1", "pw-a1", "a1/"),
        ("A1", "pw-a1", ""),
        ("a1 ", "pw-a1", ""),
        ("*", "pw-a1", "*"),
        (">", "pw-a1", ">"),
        (settings.nats_svc_user, settings.nats_svc_password, ""),
        (settings.nats_auth_user, settings.nats_auth_password, ""),
        (settings.nats_sys_user, settings.nats_sys_password, ""),
    ]
    for user, password, client_id in refused:
        caller = Caller(edge)
        code = await caller.open(user, password, client_id=client_id)
        assert code != 0, (user, client_id)
        assert await caller.next() is None, "the connection is closed behind a refusal"
        caller.writer.close()
    for device in DEVICES:
        async with signed_in(edge, device) as caller:
            assert await caller.received() == []


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_device_publishes_exactly_where_the_table_says(edge: Context, qos: int) -> None:
    """What is denied is neither heard nor stored, also with QoS 1 and as a retained message."""
    heard: set[str] = set()

    async def hear(message: Any) -> None:
        heard.add(message.subject)

    for pattern in ("dt.>", "$aws.>", "feed.>", "x", "dt", "telemetry.>", "_INBOX.x.>", "alive.>", *DEVICES):
        await edge.nc.subscribe(pattern, cb=hear)
    await edge.nc.flush()
    topics = [*NOBODYS, *(t.format(d=d) for t in OWN for d in DEVICES)]
    for device, retain in itertools.product(DEVICES, (False, True)):
        async with signed_in(edge, device) as caller:
            for topic in topics:
                await caller.publish(topic, qos, retain=retain)
    await edge.nc.flush()
    allowed = {subject(t.format(d=d)) for t, (may, _) in OWN.items() if may for d in DEVICES}
    assert {s for s in heard if not s.startswith("$MQTT")} == allowed
    assert await stored(edge, "$MQTT_msgs") == ({f"$MQTT.msgs.{s}" for s in allowed} if qos else set())
    assert await stored(edge, "$MQTT_rmsgs") == {f"$MQTT.rmsgs.{s}" for s in allowed}
    for device in DEVICES:  # and what was retained reaches only whose it is
        async with signed_in(edge, device) as caller:
            assert await caller.may_subscribe("$aws/things/" + device + "/shadow/#")
            found = set(await caller.received())
            assert all(f"/{device}/" in topic for topic in found), found


async def test_each_device_publishes_on_its_own_alone(edge: Context) -> None:
    """For one device at a time: nobody stores anything in another's name, of either tenant."""
    for device in DEVICES:
        before = await stored(edge, "$MQTT_msgs")
        async with signed_in(edge, device) as caller:
            for other, topic in itertools.product(DEVICES, OWN):
                if other != device:
                    await caller.publish(topic.format(d=other), 1, retain=False)
        assert await stored(edge, "$MQTT_msgs") == before, device


async def test_a_device_subscribes_exactly_where_the_table_says(edge: Context) -> None:
    """For itself, for a neighbour of its own tenant and for one of another; wildcards and `$share` too."""
    for device, other in itertools.product(("a1", "b1"), DEVICES):
        wrong = []
        async with signed_in(edge, device) as caller:
            table = {t: may for t, (_, may) in OWN.items()} | WILDCARDS
            for topic, may in table.items():
                asked = topic.format(d=other)
                if other != device and asked == topic:
                    continue  # names no device: asked once is enough
                if await caller.may_subscribe(asked) != (may and other == device):
                    wrong.append(asked)
            if other == device:
                wrong += [topic for topic in NOBODYS if await caller.may_subscribe(topic)]
        assert wrong == [], f"{device} asks for what is {other}'s"


async def test_nothing_of_a_tenant_reaches_a_device_of_another(edge: Context) -> None:
    """With every subscription that b1 can get, it hears of b1 and of nobody else."""
    async with signed_in(edge, "b1") as listener, signed_in(edge, "a1") as speaker:
        for topic in [*OWN, *WILDCARDS]:
            for device in DEVICES:
                await listener.may_subscribe(topic.format(d=device))
        for topic in OWN:
            await speaker.publish(topic.format(d="a1"), 1, retain=False)
        for device in ("a1", "b1"):
            await edge.publisher.to_device(f"$aws/things/{device}/shadow/update/delta", b"{}")
        await edge.nc.flush()
        async with asyncio.timeout(10):
            while not (heard := await listener.received()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert set(heard) == {"$aws/things/b1/shadow/update/delta"}


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_will_speaks_by_the_same_table(edge: Context, qos: int) -> None:
    """A will may name anything; what its device may not publish is dropped when it would be published."""
    for topic in [*NOBODYS, *(t.format(d=d) for t, (may, _) in OWN.items() if may for d in ("a2", "b1"))]:
        caller = Caller(edge)
        await caller.open("a1", "pw-a1", will=mqtt.Will(topic=topic, payload=b"{}", qos=qos, retain=True))
        caller.cut()
    last = Caller(edge)
    await last.open("a1", "pw-a1", will=mqtt.Will(topic="dt/a1/last", payload=b"{}", qos=1, retain=True))
    last.cut()
    async with asyncio.timeout(10):
        while not await stored(edge, "$MQTT_msgs"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await stored(edge, "$MQTT_msgs") == {"$MQTT.msgs.dt.a1.last"}
    assert await stored(edge, "$MQTT_rmsgs") == {"$MQTT.rmsgs.dt.a1.last"}


async def test_the_bus_itself_is_closed_to_devices(edge: Context) -> None:
    """NATS's own port takes no device's secret, whatever name comes with it, nor nobody's."""
    settings = edge.settings
    for user, password in (
        ("a1", "pw-a1"),
        ("b1", "pw-b1"),
        (settings.nats_svc_user, "pw-a1"),
        (settings.nats_sys_user, "pw-a1"),
        (settings.nats_auth_user, ""),
        ("", ""),
    ):
        with pytest.raises((NatsError, OSError)):
            await nats.connect(
                settings.nats_url,
                **({"user": user, "password": password} if user else {}),
                allow_reconnect=False,
                connect_timeout=5,
            )


async def test_one_device_cannot_subscribe_without_end(edge: Context) -> None:
    """Each QoS 1 filter is a consumer of the log, of which all devices have a number together."""
    async with signed_in(edge, "a1") as caller:
        granted = 0
        for n in range(SUBSCRIPTIONS_MAX + 50):
            if not await caller.may_subscribe(f"$aws/things/a1/shadow/name/n{n}/get/accepted"):
                break
            granted += 1
        assert 50 <= granted <= SUBSCRIPTIONS_MAX
    async with signed_in(edge, "b1") as other:
        assert await other.may_subscribe("$aws/things/b1/shadow/#")
