"""A device for tests: a real MQTT 3.1.1 client (paho), spoken to from a test's own loop."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fleetlift.config import Settings, split_address

T = TypeVar("T")


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

    def __init__(
        self, settings: Settings, client_id: str, *, clean: bool = True, user: str = "", password: str = ""
    ) -> None:
        self.received: list[tuple[str, Any]] = []
        self._address = split_address(settings.mqtt)
        self._granted: dict[int, list[int]] = {}
        self._confirmed: set[int] = set()
        self._connected: list[int] = []
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=clean)
        # Users of the server itself pass by the auth callout: tests of services need no sign-in.
        self.client.username_pw_set(user or settings.nats_svc_user, password or settings.nats_svc_password)
        self.client.on_connect = lambda c, u, f, code, p: self._connected.append(code.value)
        self.client.on_message = self._on_message
        self.client.on_subscribe = lambda c, u, mid, codes, p: self._granted.__setitem__(
            mid, [code.value for code in codes]
        )
        self.client.on_publish = lambda c, u, mid, code, p: self._confirmed.add(mid)

    def _on_message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self.received.append((message.topic, msgspec.json.decode(message.payload)))

    async def connect(self) -> "Device":
        """Connect and wait for the CONNACK; fails when it refuses."""
        self._connected.clear()
        assert self.client.connect(*self._address) is MQTTErrorCode.MQTT_ERR_SUCCESS
        self.client.loop_start()
        code = await until(lambda: self._connected[-1] + 1 if self._connected else None, what="CONNACK")
        assert code == 1, f"refused with code {code - 1}"
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

    def publish_many(self, topic: str, bodies: list[object]) -> list[int]:
        """Publish without waiting; `confirmed` tells later."""
        return [self.client.publish(topic, msgspec.json.encode(body), 1).mid for body in bodies]

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

    def vanish(self) -> None:
        """Drop the connection without a word."""
        self.client.loop_stop()
        sock = self.client.socket()
        if sock is not None:
            sock.close()
