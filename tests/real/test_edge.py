"""Devices at the edge: who gets in, what they may do there, and what is known of their coming and going."""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import paho.mqtt.client as paho
import pytest
from nats.errors import Error as NatsError

from fleetlift.backend import passwords, registry, telemetry
from fleetlift.backend.context import Context
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.bus.embedded import SUBSCRIPTIONS_MAX
from fleetlift.config import split_address
from fleetlift.edge import auth, presence
from fleetlift.store import devices as device_store
from fleetlift.store import presence as presence_store
from fleetlift.store import telemetry as telemetry_store
from fleetlift.store.devices import tell_revoked

REFUSED = 135  # what paho makes of CONNACK code 5, the only one NATS Server refuses with
BAD_NAME = 134  # of code 4


async def eventually(check: Callable[[], Awaitable[Any]], *, within_s: float = 15.0) -> Any:
    """The first true answer of `check`, asked again and again until the deadline."""
    deadline = time.monotonic() + within_s
    while True:
        if answer := await check():
            return answer
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


class Phone:
    """An MQTT client as firmware uses one, for tests that await."""

    def __init__(
        self, ctx: Context, device: str, *, client_id: str | None = None, clean: bool = True
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = split_address(ctx.settings.mqtt)
        name = device if client_id is None else client_id
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=name, clean_session=clean, reconnect_on_failure=False
        )
        self.user = device
        self.code: asyncio.Future[int] = self._loop.create_future()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        self.inbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._acks: dict[int, asyncio.Future[int]] = {}
        self._client.on_connect = lambda _c, _u, _f, code, _p: self._tell(self.code, code.value)
        self._client.on_disconnect = lambda *_: self._tell(self.gone, None)
        self._client.on_publish = lambda _c, _u, mid, code, _p: self._acked(mid, code.value)
        self._client.on_subscribe = lambda _c, _u, mid, codes, _p: self._acked(mid, codes[0].value)
        self._client.on_message = lambda _c, _u, m: self._loop.call_soon_threadsafe(
            self.inbox.put_nowait, (m.topic, m.payload)
        )

    def _tell(self, future: "asyncio.Future[Any]", value: Any) -> None:
        def tell() -> None:
            if not future.done():
                future.set_result(value)

        with contextlib.suppress(RuntimeError):  # the loop of a test that has ended
            self._loop.call_soon_threadsafe(tell)

    def _acked(self, mid: int, code: int) -> None:
        def tell() -> None:
            future = self._acks.setdefault(mid, self._loop.create_future())
            if not future.done():
                future.set_result(code)

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(tell)

    async def connect(self, password: str | None, *, user: str | None = None) -> int:
        """The code of the CONNACK; 0 is welcome."""
        if password is not None:
            self._client.username_pw_set(self.user if user is None else user, password)
        await asyncio.to_thread(lambda: self._client.connect(*self._address, 30))
        self._client.loop_start()
        return await asyncio.wait_for(asyncio.shield(self.code), 10)

    async def publish(self, topic: str, body: Any, qos: int = 1) -> None:
        """Returns once the PUBACK is there."""
        payload = body if isinstance(body, bytes) else json.dumps(body)
        info = self._client.publish(topic, payload, qos)
        assert await self._ack(info.mid) == 0

    async def subscribe(self, topic: str, qos: int = 1) -> bool:
        mid = self._client.subscribe(topic, qos)[1]
        assert mid is not None
        return await self._ack(mid) < 0x80

    async def _ack(self, mid: int) -> int:
        return await asyncio.wait_for(self._acks.setdefault(mid, self._loop.create_future()), 10)

    async def close(self) -> None:
        self._client.disconnect()
        await asyncio.to_thread(self._client.loop_stop)


@contextlib.asynccontextmanager
async def running(*services: Awaitable[None]) -> AsyncIterator[None]:
    """Services at work; killed at the end."""
    tasks = [asyncio.ensure_future(service) for service in services]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def phone(ctx: Context, device: str, password: str | None = None, **how: Any) -> AsyncIterator[Phone]:
    """A connected device; its password is `pw-` and its id."""
    made = Phone(ctx, device, **how)
    try:
        code = await made.connect(f"pw-{device}" if password is None else password)
        assert code == 0, f"CONNACK {code}"
        yield made
    finally:
        await made.close()


async def register(ctx: Context, *devices: str) -> None:
    async with ctx.pool.acquire() as conn:
        await registry.put_devices(
            conn,
            [
                NewDevice(id=d, tenant="t", credentials=(Credential(kind="password", value=f"pw-{d}"),))
                for d in devices
            ],
            generated=True,
            make_tenants=True,
        )


@pytest.fixture
async def edge(ctx: Context) -> AsyncIterator[Context]:
    """A backend at whose edge devices a and b may sign in."""
    await register(ctx, "a", "b")
    ready = asyncio.Event()
    async with running(auth.run(ctx, ready=ready)):
        await asyncio.wait_for(ready.wait(), 10)
        yield ctx


async def test_what_was_acknowledged_is_stored(edge: Context) -> None:
    """After the PUBACK it can be read back, though the reader starts later; QoS 0 is taken while it runs."""
    async with phone(edge, "a") as a:
        for n in range(20):
            await a.publish("dt/a/gps/raw", {"ts": 1_700_000_000 + n, "seq": n, "lat": n / 3})
        async with running(telemetry.run(edge)):

            async def qos0() -> bool:
                await a.publish("dt/a/qos0", {"ts": 5, "seq": 1}, qos=0)
                return bool(await edge.pool.fetchval("SELECT count(*) FROM telemetry WHERE channel = 'qos0'"))

            await eventually(qos0)
    async with edge.pool.acquire() as conn:
        rows = (await telemetry_store.read(conn, "a", channel="gps/raw")).items
    assert [row.seq for row in rows] == list(range(20))


async def test_others_are_not_let_in(edge: Context) -> None:
    """Wrong passwords, unknown devices, others' client ids and empty fields are all refused."""
    let_in = []
    for user, client_id, password in [
        ("a", "a", "wrong"),
        ("a", "a", "pw-b"),
        ("nobody", "nobody", "pw-nobody"),
        ("a", "b", "pw-a"),
        ("a", "ab", "pw-a"),
        ("a", "a/", "pw-a"),
        ("", "a", "pw-a"),
        ("svc", "svc", "pw-a"),
        ("a", "a", ""),
    ]:
        made = Phone(edge, user, client_id=client_id)
        if await made.connect(password) not in (BAD_NAME, REFUSED):
            let_in.append((user, client_id, password))
        await made.close()
    assert let_in == []


async def test_the_services_names_open_nothing_at_the_mqtt_listener(edge: Context) -> None:
    """A device's secret does not open the bus, and only the services' own passwords do."""
    import nats

    with pytest.raises(NatsError):
        await nats.connect(
            edge.settings.nats_url, user="a", password="pw-a", allow_reconnect=False, connect_timeout=5
        )


async def test_sign_in_takes_aws_user_names_and_further_connections(edge: Context) -> None:
    """What follows `?` in a user name is not part of it, and `a/2` is a second connection of device a."""
    made = Phone(edge, "a", client_id="a/2")
    try:
        assert await made.connect("pw-a", user="a?SDK=PythonV2&Version=1.31.0") == 0
    finally:
        await made.close()


OWN = ["dt/{d}/x", "$aws/things/{d}/shadow/update", "$aws/things/{d}/shadow/name/n/get"]
OWN += ["$aws/commands/things/{d}/executions/1/response/json"]
NOBODYS = ["feed/legacy/{d}/x", "feed/legacy/b/x", "$JS/API/STREAM/DELETE/$MQTT_msgs", "$MQTT/msgs/dt/b/x"]
NOBODYS += ["$aws/commands/things/{d}/executions/1/request/json", "$aws/things/{d}/shadow/update/accepted"]
NOBODYS += ["$SYS/REQ/SERVER/PING", "dt", "x/y"]


async def test_a_device_publishes_to_its_own_topics_only(edge: Context) -> None:
    """Whatever else a device publishes is dropped: it reaches neither the log nor anybody listening."""
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(message.subject)

    for subject in ("dt.>", "$aws.>", "feed.>", "x.>", "dt"):
        await edge.nc.subscribe(subject, cb=hear)
    await edge.nc.flush()
    mine = [topic.format(d="a") for topic in OWN]
    others = [topic.format(d="b") for topic in OWN] + [topic.format(d="a") for topic in NOBODYS]
    async with phone(edge, "a") as a:
        for topic in [*others, *mine]:
            await a.publish(topic, {"seq": 1})

    async def check() -> bool:
        return len(heard) >= len(mine)

    await eventually(check)
    assert sorted(heard) == sorted(topic.replace("/", ".") for topic in mine)
    state = (await edge.nc.jetstream().stream_info("$MQTT_msgs", subjects_filter=">")).state
    assert sorted(state.subjects or {}) == sorted("$MQTT.msgs." + t.replace("/", ".") for t in mine)


async def test_a_device_subscribes_to_its_own_topics_only(edge: Context) -> None:
    allowed = ["$aws/things/a/shadow/#", "$aws/things/a/shadow/update/delta"]
    allowed += ["$aws/things/a/shadow/name/+/get/+", "$aws/commands/things/a/executions/+/request/json"]
    denied = [
        "#",
        "+/#",
        "dt/#",
        "dt/a/#",
        "dt/b/x",
        "feed/#",
        "$SYS/#",
        "$JS/API/#",
        "$MQTT/#",
        "$MQTT/sub/#",
    ]
    denied += ["$aws/#", "$aws/things/+/shadow/#", "$aws/things/b/shadow/#", "_INBOX/#", "*", ">"]
    denied += ["$aws/commands/things/b/executions/+/request/json", "$share/g/dt/a/x"]
    async with phone(edge, "a") as a:
        assert [t for t in allowed if not await a.subscribe(t)] == []
        assert [t for t in denied if await a.subscribe(t)] == []


async def test_a_command_waits_for_a_device_that_is_away(edge: Context) -> None:
    """What was sent to a device in its absence is delivered when it is back, within its own permissions."""
    topic = "$aws/commands/things/a/executions/1/request/json"
    async with phone(edge, "a", clean=False) as a:
        assert await a.subscribe("$aws/commands/things/a/executions/+/request/json")
    await edge.publisher.to_device(topic, b"{}")
    async with phone(edge, "a", clean=False) as a:
        assert await asyncio.wait_for(a.inbox.get(), 10) == (topic, b"{}")


async def test_when_nobody_answers_nobody_gets_in(ctx: Context) -> None:
    await register(ctx, "a")
    made = Phone(ctx, "a")
    try:
        assert await made.connect("pw-a") == REFUSED
    finally:
        await made.close()


async def test_several_workers_share_the_sign_ins(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of two workers answer, and when one is killed the other goes on."""
    answered: list[int] = []
    original = auth._Worker.on_request

    async def noted(self: Any, message: Any) -> None:
        answered.append(id(self))
        await original(self, message)

    monkeypatch.setattr(auth._Worker, "on_request", noted)
    devices = [f"d{n}" for n in range(20)]
    await register(ctx, "a", *devices)
    first, second = asyncio.Event(), asyncio.Event()
    async with running(auth.run(ctx, ready=first)):
        async with running(auth.run(ctx, ready=second)):
            await asyncio.wait_for(asyncio.gather(first.wait(), second.wait()), 10)
            for device in itertools.chain(devices, devices):
                async with phone(ctx, device):
                    pass
                if len(set(answered)) == 2:
                    break
            assert len(set(answered)) == 2
        for device in devices[:5]:
            async with phone(ctx, device):
                pass


async def test_a_credential_taken_back_is_refused_at_once_and_its_connection_cut(edge: Context) -> None:
    """Changing a password or deleting the device ends its connection; the old password opens nothing."""
    async with running(presence.run(edge)):
        async with phone(edge, "a") as a:

            async def seen() -> bool:
                async with edge.pool.acquire() as conn:
                    known = await presence_store.get(conn, "a")
                return known is not None and known.connected

            await eventually(seen)
            async with edge.pool.acquire() as conn:
                new = Credential(kind="token", value="another")
                await registry.put_device(conn, NewDevice(id="a", tenant="t", credentials=(new,)))
            await asyncio.wait_for(a.gone, 10)
        for password, code in (("pw-a", REFUSED), ("another", 0)):
            made = Phone(edge, "a")
            assert await made.connect(password) == code
            await made.close()
        async with phone(edge, "b") as b:
            async with edge.pool.acquire() as conn:
                await registry.delete_device(conn, "b")
            await asyncio.wait_for(b.gone, 10)
        made = Phone(edge, "b")
        assert await made.connect("pw-b") == REFUSED
        await made.close()


async def test_presence_tells_comings_and_goings(edge: Context) -> None:
    """Connected since when, and why it left; a take-over is a new connection and not an absence."""

    async def state(connected: bool) -> Callable[[], Awaitable[Any]]:
        async def check() -> Any:
            async with edge.pool.acquire() as conn:
                known = await presence_store.get(conn, "b")
            return known if known is not None and known.connected is connected else None

        return check

    async with running(presence.run(edge)):
        first = Phone(edge, "b")
        assert await first.connect("pw-b") == 0
        before = await eventually(await state(True))
        assert abs(before.since - time.time()) < 30
        assert before.remote == "127.0.0.1"
        second = Phone(edge, "b")
        assert await second.connect("pw-b") == 0
        await asyncio.wait_for(first.gone, 10)

        async def taken_over() -> bool:
            async with edge.pool.acquire() as conn:
                known = await presence_store.get(conn, "b")
            return known is not None and known.connected and known.cid != before.cid

        await eventually(taken_over)
        await first.close()
        assert await presence.kick(edge, "b") == 1
        gone = await eventually(await state(False))
        assert gone.reason == "Kicked"
        await second.close()
        async with edge.pool.acquire() as conn:
            happened = (await presence_store.events(conn, device="b")).items
            assert happened[0].connected is False
        assert [event.connected for event in happened].count(True) == 2
        assert await presence.kick(edge, "b") == 0


async def test_presence_outlives_that_many_devices_are_cut_off_at_once(edge: Context) -> None:
    """A whole tenant's credentials go in one instant: more than one connection may ask about."""
    revoked = [f"gone-{n}" for n in range(SUBSCRIPTIONS_MAX * 2)]

    async def seen() -> bool:
        async with edge.pool.acquire() as conn:
            known = await presence_store.get(conn, "b")
        return known is not None and known.connected

    async with running(presence.run(edge)):
        async with phone(edge, "a"):
            await asyncio.sleep(0)
        async with edge.pool.acquire() as conn:
            await tell_revoked(conn, revoked)
        async with phone(edge, "b"):
            await eventually(seen)
        assert not edge.sys_nc.is_closed


async def test_presence_is_put_right_after_nobody_watched(edge: Context) -> None:
    """What happened while the service was away is found in the server's own list."""
    gone = Phone(edge, "a")
    assert await gone.connect("pw-a") == 0

    async def who() -> set[str]:
        async with edge.pool.acquire() as conn:
            return set(await presence_store.connected(conn))

    async def only_a() -> bool:
        return await who() == {"a"}

    async def only_b() -> bool:
        return await who() == {"b"}

    async with running(presence.run(edge)):
        await eventually(only_a)
    await gone.close()
    async with phone(edge, "b"), running(presence.run(edge)):
        await eventually(only_b)


async def test_sign_in_outlasts_a_short_absence_of_the_database(
    edge: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the registry only devices that were let in a short while ago get in."""

    async def away(*_: Any) -> Any:
        raise ConnectionRefusedError("away")

    checker = auth.Checker(edge.pool)
    await checker.check("a", "pw-a")
    monkeypatch.setattr(device_store, "credentials", away)
    await checker.check("a", "pw-a")
    for device, password in (("a", "wrong"), ("b", "pw-b")):
        with pytest.raises(auth.Refused, match="registry does not answer"):
            await checker.check(device, password)
    monkeypatch.setattr(auth, "TRUSTED_FOR_S", 0.0)
    with pytest.raises(auth.Refused, match="registry does not answer"):
        await checker.check("a", "pw-a")
    checker.close()


async def test_a_storm_of_reconnects_is_not_a_storm_of_hashing(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password is hashed once, right or wrong, however often it comes, until the stored one changes."""
    hashed: list[str] = []
    original = passwords.verify

    def noted(stored: str, secret: str) -> bool:
        hashed.append(secret)
        return original(stored, secret)

    monkeypatch.setattr(passwords, "verify", noted)

    async def put(password: str) -> None:
        async with ctx.pool.acquire() as conn:
            given = (Credential(kind="password", value=password),)
            await registry.put_devices(
                conn, [NewDevice(id="a", tenant="t", credentials=given)], make_tenants=True
            )

    await put("one")
    checker = auth.Checker(ctx.pool)
    for _ in range(50):
        await checker.check("a", "one")
        with pytest.raises(auth.Refused, match="wrong password"):
            await checker.check("a", "two")
    assert hashed == ["one", "two"]
    await put("two")
    with pytest.raises(auth.Refused, match="wrong password"):
        await checker.check("a", "one")
    await checker.check("a", "two")
    checker.close()


async def test_the_services_end_when_told_to_stop(ctx: Context) -> None:
    """A clean stop takes a moment and raises nothing."""
    ready = asyncio.Event()
    services = [auth.run(ctx, ready=ready), presence.run(ctx), telemetry.run(ctx)]
    tasks = [asyncio.create_task(service) for service in services]
    await asyncio.wait_for(ready.wait(), 10)
    ctx.stop.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)
