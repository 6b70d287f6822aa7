"""A device for tests: a real MQTT 3.1.1 client (paho), spoken to from a test's own loop."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fleetlift.backend import registry
from fleetlift.backend.context import Context
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.config import Settings, split_address
from fleetlift.edge import auth

T = TypeVar("T")

PASSWORD = "a-long-enough-password"


@contextlib.asynccontextmanager
async def serving(ctx: Context, *services: Callable[[Context], Awaitable[None]]) -> AsyncIterator[None]:
    """Services at work; cancelled at the end."""

    async def work(run: Callable[[Context], Awaitable[None]]) -> None:
        await run(ctx)

    tasks = [asyncio.create_task(work(run)) for run in services]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def registered(ctx: Context, *devices: str) -> None:
    """Devices in the registry, each with `PASSWORD`, hashed once for all: hashing is slow on purpose."""
    async with ctx.pool.acquire() as conn, conn.transaction():
        first, *others = devices
        given = (Credential(kind="password", value=PASSWORD),)
        await registry.put_devices(
            conn,
            [NewDevice(id=first, tenant="t1", credentials=given)]
            + [NewDevice(id=name, tenant="t1") for name in others],
            make_tenants=True,
        )
        await conn.execute(
            """INSERT INTO device_credential
               SELECT (jsonb_populate_record(c, jsonb_build_object('device', d.id))).*
               FROM device_credential c, unnest($2::text[]) d(id) WHERE c.device = $1""",
            first,
            others,
        )


@contextlib.asynccontextmanager
async def letting_in(ctx: Context) -> AsyncIterator[None]:
    """The service that lets devices in, already listening: NATS refuses for seconds while nobody does."""
    async with serving(ctx, auth.run):
        for _ in range(200):
            answer = await ctx.sys_nc.request(
                "$SYS.REQ.SERVER.PING.CONNZ", b'{"acc":"AUTH","subscriptions":true}', timeout=5
            )
            if b"$SYS.REQ.USER.AUTH" in answer.data:
                break
            await asyncio.sleep(0.02)
        yield


async def until(found: Callable[[], T | None], *, within_s: float = 10.0, what: str = "it") -> T:
    """What `found` returns once that is neither None nor False."""
    deadline = time.monotonic() + within_s
    while True:
        value = found()
        if value is not None and value is not False:
            return value
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s:g} s"
        await asyncio.sleep(0.01)


class Device:
    """One connection. Messages are kept in order in `received`, as (topic, parsed JSON)."""

    def __init__(self, settings: Settings, device: str, *, clean: bool = True) -> None:
        self.received: list[tuple[str, Any]] = []
        self.on_json: Callable[[str, Any], None] | None = None  # called in the client's own thread
        self._address = split_address(settings.mqtt)
        self._granted: dict[int, list[int]] = {}
        self._confirmed: set[int] = set()
        self._connected: list[int] = []
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=device, clean_session=clean)
        self.client.username_pw_set(device, PASSWORD)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda c, u, f, code, p: self._connected.append(code.value)
        self.client.on_message = self._on_message
        self.client.on_subscribe = lambda c, u, mid, codes, p: self._granted.__setitem__(
            mid, [code.value for code in codes]
        )
        self.client.on_publish = lambda c, u, mid, code, p: self._confirmed.add(mid)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        body = msgspec.json.decode(message.payload)
        if self.on_json is not None:
            self.on_json(message.topic, body)
        self.received.append((message.topic, body))

    async def connect(self) -> "Device":
        """Connect, again while refused: who checks passwords may only be starting."""
        assert self.client.connect(*self._address) is MQTTErrorCode.MQTT_ERR_SUCCESS
        self.client.loop_start()
        await until(lambda: 0 in self._connected, what="a CONNACK that welcomes")
        return self

    async def subscribe(self, *filters: str, qos: int = 1) -> None:
        for topic_filter in filters:
            _, mid = self.client.subscribe(topic_filter, qos)
            assert mid is not None
            granted = await until(lambda mid=mid: self._granted.get(mid), what="SUBACK")  # type: ignore[misc]
            assert granted == [qos], f"{topic_filter}: {granted}"

    async def publish(self, topic: str, body: object, *, qos: int = 1) -> None:
        """Publish, and with QoS 1 wait for the PUBACK."""
        payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
        mid = self.client.publish(topic, payload, qos).mid
        if qos:
            await until(lambda: mid in self._confirmed, what="PUBACK")

    def publish_json(self, topic: str, body: object, qos: int = 1) -> None:
        """Publish and wait for nothing; also from the client's own thread."""
        self.client.publish(topic, msgspec.json.encode(body), qos)

    async def confirmed(self, mids: list[int], *, within_s: float = 20.0) -> None:
        await until(lambda: self._confirmed.issuperset(mids), within_s=within_s, what="all PUBACKs")

    def bodies(self, suffix: str) -> list[Any]:
        return [body for topic, body in list(self.received) if topic.endswith(suffix)]

    async def receive(self, suffix: str, *, count: int = 1, within_s: float = 10.0) -> Any:
        """The `count`-th body on a topic ending in `suffix`."""
        await until(
            lambda: len(self.bodies(suffix)) >= count, within_s=within_s, what=f"a message on {suffix}"
        )
        return self.bodies(suffix)[count - 1]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
