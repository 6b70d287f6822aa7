"""The bridge between a real legacy server and a real backend: nothing lost, nothing twice, nothing late."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fault_proxy import FaultProxy
from fleetlift.backend import commands, registry, telemetry
from fleetlift.backend.context import Context
from fleetlift.backend.registry import NewDevice
from fleetlift.core import legacy as wire
from fleetlift.core.command import Status
from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags
from fleetlift.migrate.bridge import Bridge
from fleetlift.migrate.feed_store import PostgresFeedStore
from fleetlift.migrate.noise import NoiseReader
from fleetlift.sides.fleetlift import FleetliftSide
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer
from fleetlift.sides.legacy.side import LegacySide
from fleetlift.store import ledger, parity
from fleetlift.store import telemetry as telemetry_store

KEY = "not-a-real-key-of-a-device"


async def until(what: Callable[[], Awaitable[bool]], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not await what():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
async def legacy(tmp_path: Path) -> AsyncIterator[LegacyServer]:
    async with LegacyServer(tmp_path / "legacy") as server:
        await server.register([DeviceSeed(f"car-{n}", KEY, {"hardware": n}) for n in range(3)])
        yield server


class Car:
    """A device of the legacy server: sends, answers commands, reports."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.received: list[wire.Message] = []
        self.executed: list[str] = []
        self._decoder = wire.Decoder()

    def send(self, *messages: wire.Message) -> None:
        self.writer.write(b"".join(map(wire.encode, messages)))

    def telemetry(self, first: int, last: int, channel: str = "position") -> None:
        now_ms = int(time.time() * 1000)
        self.send(
            *(
                wire.Telemetry(channel, seq, now_ms, b'{"lat":47.1,"n":%d}' % seq)
                for seq in range(first, last)
            )
        )

    async def live(self) -> None:
        while data := await self.reader.read(65536):
            for message in self._decoder.feed(data):
                self.received.append(message)
                if isinstance(message, wire.Command):
                    if message.id not in self.executed:
                        self.executed.append(message.id)
                    self.send(wire.CommandReply(message.id, wire.ReplyStatus.SUCCEEDED, b'{"door":"closed"}'))


@asynccontextmanager
async def car(server: LegacyServer, device: str = "car-0") -> AsyncIterator[Car]:
    one = Car(*await asyncio.open_connection(*server.address))
    one.send(wire.Login(device, KEY, "1"))
    task = asyncio.create_task(one.live())
    try:
        async with asyncio.timeout(5):
            while not any(isinstance(m, wire.LoginOk) for m in one.received):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield one
    finally:
        task.cancel()
        one.writer.close()


def bridge_to(server: LegacyServer, ctx: Context) -> Bridge:
    side = LegacySide(server.url, server.owner_key)
    bridge = Bridge(
        side,
        key="legacy test",
        store=PostgresFeedStore(ctx.pool),
        to_log=lambda topic, payload, headers: ctx.publisher.to_log(topic, payload, headers),
        noise=NoiseReader(side, ctx.publisher.to_log),
    )
    bridge.migrations["move"] = "carshare"
    return bridge


@asynccontextmanager
async def running(bridge: Bridge) -> AsyncIterator[Bridge]:
    task = asyncio.create_task(bridge.run())
    try:
        yield bridge
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bridge.close()


@asynccontextmanager
async def service(work: Callable[[Context], Awaitable[Any]], ctx: Context) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work(ctx))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def distinct(ctx: Context) -> int:
    async with ctx.pool.acquire() as conn:
        return sum(row.distinct for row in await ledger.totals(conn) if row.path == "legacy")


async def test_a_bridge_killed_again_and_again_loses_nothing_and_stores_nothing_twice(
    ctx: Context, legacy: LegacyServer
) -> None:
    """What the old side has acknowledged is stored once, however often the bridge dies in between."""
    total = 6000
    async with car(legacy) as one, service(telemetry.run, ctx):
        for start in range(0, total, 1000):
            bridge = bridge_to(legacy, ctx)
            task = asyncio.create_task(bridge.run())
            one.telemetry(start, start + 1000)
            before = await distinct(ctx)

            async def some_more(before: int = before) -> bool:
                return await distinct(ctx) > before

            await until(some_more)
            # No farewell: what was read and not yet noted is read again by the next one.
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await bridge.close()
        async with running(bridge_to(legacy, ctx)):

            async def all_there() -> bool:
                return await distinct(ctx) == total

            await until(all_there)
        async with ctx.pool.acquire() as conn:
            assert await conn.fetchval("SELECT count(*) FROM telemetry") == total
            assert await conn.fetchval("SELECT count(DISTINCT seq) FROM telemetry") == total
            assert await conn.fetchval("SELECT count(*) FROM dead_letter") == 0


async def test_the_position_is_noted_only_for_what_the_log_holds(
    ctx: Context, legacy: LegacyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the log refuses, the position stands still; afterwards everything comes."""
    refuse = True
    publish = ctx.publisher.to_log

    async def to_log(topic: str, payload: bytes, headers: Any = None) -> int:
        if refuse:
            raise Unavailable("the log is away")
        return await publish(topic, payload, headers)

    monkeypatch.setattr(ctx.publisher, "to_log", to_log)
    bridge = bridge_to(legacy, ctx)
    async with car(legacy) as one, service(telemetry.run, ctx), running(bridge):

        async def sign_in_noted() -> bool:
            return await bridge.position() != ""

        async def current() -> bool:
            return bridge.feed_behind(5.0) == ""

        await until(sign_in_noted)
        await until(current)
        held = await bridge.position()
        one.telemetry(0, 100)

        async def not_followed() -> bool:
            return "not being followed" in bridge.feed_behind(5.0)

        await until(not_followed)
        assert await bridge.position() == held
        refuse = False

        async def all_there() -> bool:
            return await distinct(ctx) == 100

        await until(all_there)
        await until(current)
        assert await bridge.position() != held


async def test_the_old_side_is_known_as_it_is_now(ctx: Context, legacy: LegacyServer) -> None:
    """Inventory, presence and reports follow the feed; a side that goes away is seen to be away."""
    bridge = bridge_to(legacy, ctx)
    async with running(bridge):
        await until(lambda: _true(bridge.up))
        assert bridge.fleet is not None
        assert {d.id: d.attributes for d in bridge.fleet.values()} == {
            f"car-{n}": {"hardware": n} for n in range(3)
        }
        async with car(legacy, "car-1") as one:
            await until(lambda: _true(bridge.fleet is not None and bridge.fleet["car-1"].connected))
            report = DeviceReport(epoch=7, phase=DevicePhase.TRYING, flags=Flags())
            one.send(wire.ConfigReport(msgspec.json.encode(report)))
            await until(lambda: _true(bridge.reports.get("car-1") == report))
        await until(lambda: _true(bridge.fleet is not None and not bridge.fleet["car-1"].connected))


async def _true(value: bool) -> bool:
    return value


async def _adopted(ctx: Context) -> None:
    side = FleetliftSide(ctx, tenant="carshare", key=b"k" * 32)
    assert await side.adopt([FleetDevice(id="car-0"), FleetDevice(id="car-1")], "move") == []


async def test_a_command_goes_by_the_old_side_and_its_answer_comes_back(
    ctx: Context, legacy: LegacyServer
) -> None:
    """A device that nobody has moved is commanded through Fleetlift by its old side, promptly."""
    await _adopted(ctx)
    async with car(legacy) as one, running(bridge_to(legacy, ctx)) as bridge:
        await until(lambda: _true(bridge.up))
        asked = await commands.create_command(ctx, "car-0", "lock", {"doors": "all"}, 30.0)
        assert [p.path for p in asked.paths] == ["old"]

        async def ended() -> bool:
            return (await commands.get_command(ctx, asked.id)).status is Status.SUCCEEDED

        started = time.monotonic()
        await until(ended)
        assert time.monotonic() - started < 10
        assert one.executed == [asked.id]
        [path] = (await commands.get_command(ctx, asked.id)).paths
        assert path.detail.get("door") == "closed" or "door" in str(path.detail)
        assert path.latency_s is not None


async def test_commands_outlive_the_bridge(ctx: Context, legacy: LegacyServer) -> None:
    """What was queued, or marked as sent when the bridge died, is sent by the next one."""
    await _adopted(ctx)
    lost = await commands.create_command(ctx, "car-0", "lock", {}, 30.0)
    queued = await commands.create_command(ctx, "car-0", "unlock", {}, 30.0)
    async with ctx.pool.acquire() as conn:  # as a bridge leaves it that dies between mark and sending
        await conn.execute(
            "UPDATE command_path SET status = 'sent', sent_at = now() WHERE command = $1", lost.id
        )
    async with car(legacy) as one, running(bridge_to(legacy, ctx)):

        async def both_ended() -> bool:
            found = [await commands.get_command(ctx, c.id) for c in (lost, queued)]
            return all(c.status is Status.SUCCEEDED for c in found)

        await until(both_ended)
        assert sorted(one.executed) == sorted([lost.id, queued.id])


async def test_a_command_that_the_old_side_refuses_is_unreachable(ctx: Context, legacy: LegacyServer) -> None:
    """A device that the old side does not know ends its command at once, with the reason."""
    side = FleetliftSide(ctx, tenant="carshare", key=b"k" * 32)
    await side.adopt([FleetDevice(id="bike-9")], "move")
    async with running(bridge_to(legacy, ctx)):
        asked = await commands.create_command(ctx, "bike-9", "lock", {}, 30.0)

        async def ended() -> bool:
            return (await commands.get_command(ctx, asked.id)).paths[0].status == "unreachable"

        await until(ended)


async def test_a_hundred_messages_of_a_side_gone_wrong_do_not_stop_the_feed(
    ctx: Context, legacy: LegacyServer
) -> None:
    """What can never enter the log is a dead letter with its reason, and the feed goes on."""
    async with car(legacy) as one, service(telemetry.run, ctx), running(bridge_to(legacy, ctx)):
        one.telemetry(0, 3, channel="a channel with spaces")
        one.telemetry(0, 3)

        async def all_there() -> bool:
            async with ctx.pool.acquire() as conn:
                letters = await conn.fetchval("SELECT count(*) FROM dead_letter")
                return bool(await distinct(ctx) + letters == 6 and letters == 3)

        await until(all_there)


async def test_the_feed_is_read_a_second_time_to_measure_its_noise(
    ctx: Context, legacy: LegacyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old side tells the same twice here, and what it tells the second time is stored nowhere."""
    monkeypatch.setattr("fleetlift.migrate.noise.FIRST_AFTER_S", 0.5)
    async with car(legacy) as one, service(telemetry.run, ctx), running(bridge_to(legacy, ctx)):
        sent = 0

        async def measured() -> bool:
            nonlocal sent
            one.telemetry(sent, sent + 20)
            sent += 20
            async with ctx.pool.acquire() as conn:
                return "position" in await parity.noise(conn, "legacy")

        await until(measured)

        async def all_stored() -> bool:
            return await distinct(ctx) == sent

        await until(all_stored)
    async with ctx.pool.acquire() as conn:
        noise = (await parity.noise(conn, "legacy"))["position"]
        assert await conn.fetchval("SELECT sum(received) FROM ledger") == sent
    assert noise.compared > 0
    assert noise.differing == 0


async def test_what_a_side_says_of_another_tenants_device_is_not_stored_as_that_tenants(
    ctx: Context, legacy: LegacyServer
) -> None:
    """An old side that names a device of another tenant adds nothing to what that tenant reads.

    The letter that keeps it is for tokens of every tenant: it names no device. So it is with a deleted
    device, and with one that the old side's own inventory gives to somebody else.
    """
    await legacy.register([DeviceSeed("car-9", KEY, {"tenant": "meters"})])
    async with ctx.pool.acquire() as conn:
        await registry.put_devices(
            conn,
            [
                NewDevice(id="car-0", tenant="carshare"),
                *(NewDevice(id=f"car-{n}", tenant="meters") for n in (1, 2)),
            ],
            make_tenants=True,
        )
        await registry.delete_device(conn, "car-2")
    bridge = bridge_to(legacy, ctx)
    await bridge.refresh()
    async with service(telemetry.run, ctx), running(bridge):
        for name in ("car-1", "car-2", "car-9", "car-0"):
            async with car(legacy, name) as one:
                one.telemetry(0, 2)
                one.telemetry(2, 3, channel="a channel with spaces")
                await asyncio.sleep(0)

        async def all_there() -> bool:
            async with ctx.pool.acquire() as conn:
                letters = await conn.fetchval("SELECT count(*) FROM dead_letter")
                return bool(await distinct(ctx) == 2 and letters == 10)

        await until(all_there)
    async with ctx.pool.acquire() as conn:
        assert {r["device"] for r in await conn.fetch("SELECT device FROM telemetry")} == {"car-0"}
        assert (await telemetry_store.dead_letters(conn, tenant="meters")).items == []
        kept = (await telemetry_store.dead_letters(conn)).items
        assert sum("belongs to a tenant" in letter.reason for letter in kept) == 9


async def test_nobody_takes_an_id_under_which_messages_wait(ctx: Context, legacy: LegacyServer) -> None:
    """A tenant cannot read a stranger's messages by registering the id that the old side knows them by."""
    async with car(legacy) as one, service(telemetry.run, ctx), running(bridge_to(legacy, ctx)):
        one.telemetry(0, 2)

        async def there() -> bool:
            return await distinct(ctx) == 2

        await until(there)
    async with ctx.pool.acquire() as conn:
        with pytest.raises(Conflict, match="and no owner"):
            await registry.check_unclaimed(conn, "car-0")
        await registry.check_unclaimed(conn, "car-7")
        await registry.put_devices(conn, [NewDevice(id="car-0", tenant="carshare")], make_tenants=True)
        await registry.check_unclaimed(conn, "car-0")


async def test_a_feed_that_went_silent_counts_as_behind_and_a_quiet_one_does_not(
    ctx: Context, legacy: LegacyServer
) -> None:
    """A connection that the network has forgotten looks like a fleet with nothing to say; beats tell."""
    async with FaultProxy(legacy.address) as proxy:
        side = LegacySide(proxy.url, legacy.owner_key)
        bridge = Bridge(
            side,
            key="legacy test",
            store=PostgresFeedStore(ctx.pool),
            to_log=lambda topic, payload, headers: ctx.publisher.to_log(topic, payload, headers),
        )
        bridge.migrations["move"] = "carshare"
        async with car(legacy) as one, service(telemetry.run, ctx), running(bridge):

            async def current() -> bool:
                return bridge.feed_behind(1.0) == ""

            one.telemetry(0, 100)
            await until(current)
            position = await bridge.position()
            for _ in range(45):  # quiet, for longer than three signs of life
                await asyncio.sleep(0.1)
                assert bridge.feed_behind(3.0) == ""
            assert await bridge.position() == position, "a sign of life is nothing to note"

            proxy.half_open()
            struck = time.monotonic()
            one.telemetry(100, 200)

            async def silent() -> bool:
                return "no sign of life" in bridge.feed_behind(1.0)

            await until(silent, 9)
            assert time.monotonic() - struck < 9
            assert "no sign of life" not in bridge.feed_behind(60.0), "the grace is longer"
            proxy.cut()

            async def all_there() -> bool:
                return await distinct(ctx) == 200

            await until(current)
            await until(all_there)
