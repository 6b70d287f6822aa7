"""The legacy server over real sockets, and its owner's side."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar, cast

import msgspec
import pytest

from fleetlift.core import legacy as wire
from fleetlift.core.errors import BadInput, Conflict, Forbidden, NotFound, Unavailable
from fleetlift.core.orders import CommandsFlag, DevicePhase, DeviceReport, Flags, Orders
from fleetlift.sides.base import (
    CommandAnswered,
    FeedItem,
    PresenceChanged,
    ReportReceived,
    SideCommand,
    TelemetryReceived,
)
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer, read_inventory
from fleetlift.sides.legacy.side import LegacySide
from fleetlift.sides.legacy.storage import Storage, key_hash

WITHIN_S = 10.0
OWNER_KEY = "an-owner-key-of-the-tests"
NOW_MS = 1_700_000_000_000

M = TypeVar("M")


def _key(device: str) -> str:
    return f"not-a-real-key-of-{device}"


def _seeds(count: int = 3) -> list[DeviceSeed]:
    return [DeviceSeed(f"car-{n}", _key(f"car-{n}"), {"hardware": n}) for n in range(1, count + 1)]


class Device:
    """A device as simple as can be: frames out, frames in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._decoder = wire.Decoder()
        self._inbox: list[wire.Message] = []

    @classmethod
    async def connect(cls, address: tuple[str, int]) -> Self:
        return cls(*await asyncio.open_connection(*address))

    @classmethod
    async def sign_in(cls, address: tuple[str, int], device: str = "car-1") -> Self:
        self = await cls.connect(address)
        self.send(wire.Login(device, _key(device), "4.2"))
        await self.expect(wire.LoginOk)
        return self

    def send(self, *messages: wire.Message) -> None:
        self.writer.write(b"".join(map(wire.encode, messages)))

    async def next(self) -> wire.Message:
        async with asyncio.timeout(WITHIN_S):
            while not self._inbox:
                data = await self.reader.read(65536)
                if not data:
                    raise ConnectionError("the server closed the connection")
                self._inbox += self._decoder.feed(data)
        return self._inbox.pop(0)

    async def expect(self, of: type[M]) -> M:
        message = await self.next()
        assert isinstance(message, of), message
        return message

    async def closed(self) -> str:
        """The reason of the BYE before the server closed."""
        reason = ""
        with contextlib.suppress(ConnectionError):
            while True:
                if isinstance(message := await self.next(), wire.Bye):
                    reason = message.reason
        return reason

    async def acknowledged(self, count: int) -> set[tuple[str, int]]:
        acks: set[tuple[str, int]] = set()
        while len(acks) < count:
            acks |= {(ack.channel, ack.seq) for ack in (await self.expect(wire.TelemetryAck)).acks}
        return acks

    def close(self) -> None:
        self.writer.close()


class ServerProcess:
    """`fleetlift legacy serve` as a process of its own, which can be killed."""

    def __init__(self, data: Path, process: asyncio.subprocess.Process, ready: str) -> None:
        self.data, self.process = data, process
        host, _, port = ready.rsplit("/", 1)[1].rpartition(":")
        self.address = (host, int(port))

    @classmethod
    async def start(cls, data: Path, *options: str) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(
                "-m",
                "fleetlift.cli.legacy",
                "serve",
                "--data",
                str(data),
                "--listen",
                "127.0.0.1:0",
                *options,
            ),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "FLEETLIFT_LEGACY_KEY": OWNER_KEY},
        )
        assert process.stdout is not None
        async with asyncio.timeout(WITHIN_S):
            line = (await process.stdout.readline()).decode().strip()
        assert "ready on tcp://" in line, line
        return cls(data, process, line)

    def side(self) -> LegacySide:
        return LegacySide(f"tcp://{self.address[0]}:{self.address[1]}", OWNER_KEY)

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(how)
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()


@asynccontextmanager
async def _process(data: Path, *options: str) -> AsyncIterator[ServerProcess]:
    server = await ServerProcess.start(data, *options)
    try:
        yield server
    finally:
        await server.stop(signal.SIGKILL)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LegacyServer]:
    async with LegacyServer(tmp_path / "legacy", dispatch_every_s=0.02, owner_key=OWNER_KEY) as opened:
        await opened.register(_seeds())
        yield opened


@pytest.fixture
async def side(server: LegacyServer) -> AsyncIterator[LegacySide]:
    opened = LegacySide(server.url, OWNER_KEY)
    yield opened
    await opened.close()


async def _items(side: LegacySide, count: int, after: str = "") -> tuple[str, list[FeedItem]]:
    """The first `count` items after a position (or more, to the end of a batch), and the position reached."""
    items: list[FeedItem] = []
    async with asyncio.timeout(WITHIN_S), aclosing(side.feed(after)) as batches:
        async for position, batch in batches:
            items += batch
            if len(items) >= count:
                return position, items
    raise AssertionError("the feed ended")


async def _until(side: LegacySide, of: type[M], after: str = "") -> M:
    """The first item of a kind."""
    async with asyncio.timeout(WITHIN_S), aclosing(side.feed(after)) as batches:
        async for _, batch in batches:
            for item in batch:
                if isinstance(item, of):
                    return item
    raise AssertionError("the feed ended")


def _telemetry(items: Sequence[FeedItem]) -> list[TelemetryReceived]:
    return [item for item in items if isinstance(item, TelemetryReceived)]


def _command(id_: str = "c-1", *, expires_in_s: float = 30.0, device: str = "car-1") -> SideCommand:
    return SideCommand(
        id=id_,
        device=device,
        name="lock",
        params={"doors": 4},
        mode="execute",
        expires_at=time.time() + expires_in_s,
    )


def _orders(epoch: int) -> Orders:
    return Orders(epoch=epoch, migration="m", flags=Flags(commands=CommandsFlag.DRY_RUN))


# ---- devices -----------------------------------------------------------------------------------------


async def test_what_was_acknowledged_is_there_after_kill_9_and_each_message_once(tmp_path: Path) -> None:
    """The server is killed in the midst of a stream; all it acknowledged is in its feed after a restart."""
    inventory = tmp_path / "fleet.jsonl"
    inventory.write_text("\n".join(msgspec.json.encode(seed).decode() for seed in _seeds()))
    acknowledged: set[tuple[str, int]] = set()
    async with _process(tmp_path / "data", "--devices", str(inventory)) as server:
        device = await Device.sign_in(server.address)

        async def send() -> None:
            for seq in range(100_000):
                device.send(wire.Telemetry("gps", seq, NOW_MS + seq, b'{"speed":51.5}'))
                await device.writer.drain()

        sending = asyncio.create_task(send())
        while len(acknowledged) < 3000:
            acknowledged |= await device.acknowledged(1)
        await server.stop(signal.SIGKILL)
        with contextlib.suppress(ConnectionError):
            while True:  # what the server still got out before it died
                acknowledged |= await device.acknowledged(1)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)

    async with _process(tmp_path / "data") as server:
        side = server.side()
        end = await _end(side)
        stored: list[int | None] = []
        async with aclosing(side.feed("")) as batches:
            async for position, batch in batches:
                stored += [item.seq for item in _telemetry(batch)]
                if int(position) >= end:
                    break
        assert {seq for _, seq in acknowledged} <= set(stored)
        assert len(stored) == len(set(stored))
        await side.close()
        assert await server.stop() == 0


async def _end(side: LegacySide) -> int:
    async with aclosing(side.feed("now")) as batches:
        async for position, _ in batches:
            return int(position)
    raise AssertionError("the feed ended")


async def test_telemetry_comes_out_of_the_feed_as_it_went_in(server: LegacyServer, side: LegacySide) -> None:
    device = await Device.sign_in(server.address)
    device.send(wire.Telemetry("gps/raw", 2**63 - 1, NOW_MS + 1, b'{"lat": 52.50,"odd":"\xc3\xa4"}'))
    assert await device.acknowledged(1) == {("gps/raw", 2**63 - 1)}
    item = await _until(side, TelemetryReceived)
    assert (item.device, item.channel, item.seq) == ("car-1", "gps/raw", 2**63 - 1)
    assert item.ts == (NOW_MS + 1) / 1000
    assert item.body == b'{"lat": 52.50,"odd":"\xc3\xa4"}'
    assert abs(item.received_at - time.time()) < WITHIN_S
    device.close()


@pytest.mark.parametrize(
    ("device", "key", "reason"),
    [
        ("car-1", "a-wrong-key-of-enough-length", "the key is wrong"),
        ("car-99", _key("car-99"), "this device is not known: its owner must register it"),
    ],
)
async def test_a_wrong_key_and_an_unknown_device_are_refused(
    server: LegacyServer, device: str, key: str, reason: str
) -> None:
    stranger = await Device.connect(server.address)
    stranger.send(wire.Login(device, key), wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    assert (await stranger.expect(wire.LoginRefused)).reason == reason
    await stranger.closed()
    assert server.connected == 0


async def test_with_enroll_the_first_key_is_the_devices_for_good(tmp_path: Path) -> None:
    async with LegacyServer(tmp_path, enroll=True) as server:
        (await Device.sign_in(server.address, "car-new")).close()
        thief = await Device.connect(server.address)
        thief.send(wire.Login("car-new", "another-key-of-enough-length"))
        await thief.expect(wire.LoginRefused)
        short = await Device.connect(server.address)
        short.send(wire.Login("ä" * 120, "short"))
        await short.expect(wire.LoginRefused)


async def test_a_newer_login_replaces_the_older_connection(server: LegacyServer, side: LegacySide) -> None:
    """The older one hears why; for the owner the device was never away."""
    first = await Device.sign_in(server.address)
    second = await Device.sign_in(server.address)
    assert await first.closed() == "a newer connection signed in"
    second.send(wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    await second.acknowledged(1)
    _, items = await _items(side, 3)
    assert [(item.connected, item.reason) for item in items if isinstance(item, PresenceChanged)] == [
        (True, "signed in"),
        (True, "signed in again"),
    ]
    assert server.connected == 1
    second.send(wire.Bye("ignition off"))
    await second.closed()
    _, items = await _items(side, 4)
    last = items[-1]
    assert isinstance(last, PresenceChanged)
    assert (last.connected, last.reason) == (False, "said good-bye: ignition off")


async def test_garbage_closes_its_own_connection_only(server: LegacyServer) -> None:
    good = await Device.sign_in(server.address, "car-1")
    bad = await Device.sign_in(server.address, "car-2")
    bad.send(wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    bad.writer.write(b"\x00" * 100)
    assert "bad frame" in await bad.closed()
    for garbage in (os.urandom(64), wire.encode(wire.Heartbeat()), wire.encode(wire.OwnerLogin("wrong"))):
        stranger = await Device.connect(server.address)
        stranger.writer.write(garbage)
        await stranger.closed()
    good.send(wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    assert await good.acknowledged(1) == {("gps", 1)}
    good.close()


async def test_a_silent_device_is_taken_for_lost(tmp_path: Path) -> None:
    async with LegacyServer(tmp_path, heartbeat_s=1, owner_key=OWNER_KEY) as server:
        await server.register(_seeds())
        silent, alive = [await Device.sign_in(server.address, name) for name in ("car-1", "car-2")]

        async def beat() -> None:
            while True:
                alive.send(wire.Heartbeat())
                await alive.expect(wire.HeartbeatAck)
                await asyncio.sleep(0.5)

        beating = asyncio.create_task(beat())
        assert (await silent.closed()).startswith("silent for")
        assert not beating.done()
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def test_a_device_that_reads_nothing_does_not_fill_the_servers_memory(server: LegacyServer) -> None:
    """Its answers pile up to a bound, then the server reads no more from it; others go on."""
    deaf = await Device.sign_in(server.address, "car-1")
    deaf.writer.transport.pause_reading()  # type: ignore[attr-defined]
    channel = "c" * 250
    message = wire.encode(wire.Telemetry(channel, 1, NOW_MS, b"{}"))
    with pytest.raises(TimeoutError):
        for _ in range(600):  # 80 MB of answers, were nobody to stop it
            deaf.writer.write(message * 500)
            async with asyncio.timeout(0.7):
                await deaf.writer.drain()
    assert server.buffered_bytes < 8 * 1024 * 1024
    other = await Device.sign_in(server.address, "car-2")
    other.send(wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    await other.acknowledged(1)
    deaf.writer.transport.abort()
    other.close()


async def test_a_thousand_devices_at_once_are_all_served(tmp_path: Path) -> None:
    count = 1000
    async with LegacyServer(tmp_path, owner_key=OWNER_KEY) as server:
        await server.register(_seeds(count))

        async def one(name: str) -> Device:
            device = await Device.sign_in(server.address, name)
            device.send(*(wire.Telemetry("gps", seq, NOW_MS, b'{"v":1}') for seq in range(5)))
            assert len(await device.acknowledged(5)) == 5
            return device

        devices = await asyncio.gather(*(one(f"car-{n}") for n in range(1, count + 1)))
        assert server.connected == count
        side = LegacySide(server.url, OWNER_KEY)
        assert sum(device.connected for device in await side.inventory()) == count
        _, items = await _items(side, 6 * count)
        assert len({(item.device, item.seq) for item in _telemetry(items)}) == 5 * count
        await side.close()
        for device in devices:
            device.close()


# ---- the owner ---------------------------------------------------------------------------------------


async def test_the_feed_resumes_exactly_where_it_was_left_also_after_a_restart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with LegacyServer(data, owner_key=OWNER_KEY) as server:
        await server.register(_seeds())
        device = await Device.sign_in(server.address)
        side = LegacySide(server.url, OWNER_KEY)
        position, seen = "", []
        for start in range(0, 60, 20):
            device.send(*(wire.Telemetry("gps", start + n, NOW_MS, b"{}") for n in range(20)))
            await device.acknowledged(20)
            position, items = await _items(side, 1, position)
            seen += items
        device.send(wire.Telemetry("gps", 60, NOW_MS, b"{}"))
        await device.acknowledged(1)
        await side.close()
    async with LegacyServer(data, owner_key=OWNER_KEY) as server:
        side = LegacySide(server.url, OWNER_KEY)
        _, items = await _items(side, 2, position)
        assert [item.seq for item in _telemetry(seen + items)] == list(range(61))
        left = items[-1]
        assert isinstance(left, PresenceChanged)
        assert (left.connected, left.reason) == (False, "the server is stopping")
        await side.close()


async def test_a_feed_position_that_would_leave_a_gap_is_refused(tmp_path: Path) -> None:
    """A position of another data directory, or one whose successors were forgotten, is never skipped over."""
    async with LegacyServer(tmp_path, owner_key=OWNER_KEY) as server:
        side = LegacySide(server.url, OWNER_KEY)
        with pytest.raises(Conflict, match="another data directory"):
            await _items(side, 1, "1000")
        with pytest.raises(BadInput):
            await _items(side, 1, "abc")
        await server.register(_seeds())
        for _ in range(3):
            device = await Device.sign_in(server.address)
            device.send(wire.Bye())
            await device.closed()
        await _items(side, 6)
        await side.close()
    async with LegacyServer(tmp_path, owner_key=OWNER_KEY, keep_days=0) as server:
        side = LegacySide(server.url, OWNER_KEY)
        with pytest.raises(Conflict, match="no longer kept"):
            async with asyncio.timeout(WITHIN_S):
                while True:  # forgetting begins with the start, and takes a moment
                    await _items(side, 1, "2")
        assert await _end(side) == 6
        await side.close()


async def test_a_command_waits_for_its_device_and_its_answer_comes_by_the_feed(
    server: LegacyServer, side: LegacySide
) -> None:
    await side.send_command(_command())
    await side.send_command(_command())  # the same id is the same command
    device = await Device.sign_in(server.address)
    command = await device.expect(wire.Command)
    assert (command.id, command.name, command.mode) == ("c-1", "lock", wire.Mode.EXECUTE)
    assert json.loads(command.params) == {"doors": 4}
    device.send(
        wire.CommandReply("c-1", wire.ReplyStatus.ACKNOWLEDGED),
        wire.CommandReply("c-1", wire.ReplyStatus.SUCCEEDED, b'{"ms":12}'),
    )
    assert (await device.expect(wire.CommandReplyAck)).status == "acknowledged"
    assert (await device.expect(wire.CommandReplyAck)).status == "succeeded"
    device.send(wire.CommandReply("c-1", wire.ReplyStatus.DUPLICATE), wire.Telemetry("end", 1, NOW_MS, b"{}"))
    await device.expect(wire.CommandReplyAck)
    await device.acknowledged(1)
    _, items = await _items(side, 4)
    answers = [(item.status, item.detail) for item in items if isinstance(item, CommandAnswered)]
    assert answers == [("acknowledged", {}), ("succeeded", {"ms": 12})]
    device.close()


async def test_a_command_without_a_final_answer_comes_again_after_the_next_login(
    server: LegacyServer, side: LegacySide
) -> None:
    await side.send_command(_command())
    first = await Device.sign_in(server.address)
    await first.expect(wire.Command)
    second = await Device.sign_in(server.address)
    assert (await second.expect(wire.Command)).id == "c-1"
    second.send(wire.CommandReply("c-1", wire.ReplyStatus.SUCCEEDED))
    await second.expect(wire.CommandReplyAck)
    third = await Device.sign_in(server.address)
    await side.send_command(_command("c-2"))
    assert (await third.expect(wire.Command)).id == "c-2"
    third.close()


async def test_a_command_given_to_a_connection_that_was_replaced_is_not_taken_for_delivered(
    tmp_path: Path,
) -> None:
    """The dispatch loop and a new login may cross: what the older connection got, the newer one gets too."""
    storage = Storage(tmp_path / "legacy.sqlite")

    def do(work: Callable[[], M]) -> M:
        (result,) = storage.apply([work])
        assert not isinstance(result, Exception), result
        return cast("M", result)

    do(lambda: storage.register("car-1", key_hash(_key("car-1")), b"{}"))
    do(lambda: storage.sign_in("car-1", "4.2", NOW_MS, ""))
    do(
        lambda: storage.add_command(
            wire.SendCommand(1, "car-1", "c-1", "lock", wire.Mode.EXECUTE, NOW_MS + 9000, b"{}"), NOW_MS
        )
    )
    due, _ = storage.read_due(NOW_MS)
    newer = do(lambda: storage.sign_in("car-1", "4.2", NOW_MS, ""))
    do(lambda: storage.mark_sent(due))
    due, _ = storage.read_due(NOW_MS)
    assert [(entry.command.id, entry.session) for entry in due] == [("c-1", newer.session)]
    do(lambda: storage.mark_sent(due))
    assert storage.read_due(NOW_MS) == ([], False)
    storage.close()


async def test_a_work_that_cannot_be_stored_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "legacy.sqlite")
    good = partial(storage.add_telemetry, [("car-1", NOW_MS, "gps", 1, NOW_MS, b"{}")])
    bad = partial(storage.add_telemetry, [("car-1", NOW_MS, "gps", 2**64, NOW_MS, b"{}")])
    results = storage.apply([good, bad, good])
    assert [type(result) for result in results] == [type(None), Unavailable, type(None)]
    assert storage.last_position == 2
    storage.close()


async def test_an_expired_command_is_not_delivered_and_says_so(
    server: LegacyServer, side: LegacySide
) -> None:
    await side.send_command(_command("c-late", expires_in_s=0.05))
    answer = await _until(side, CommandAnswered)
    assert (answer.command, answer.status) == ("c-late", "expired")
    device = await Device.sign_in(server.address)
    await side.send_command(_command("c-next"))
    assert (await device.expect(wire.Command)).id == "c-next"
    device.close()


async def test_orders_reach_a_device_at_login_and_at_once_when_it_is_connected(
    server: LegacyServer, side: LegacySide
) -> None:
    assert await side.deliver({"car-1": _orders(3)}) == {}
    device = await Device.sign_in(server.address)
    config = await device.expect(wire.Config)
    assert msgspec.json.decode(config.document, type=Orders) == _orders(3)
    assert await side.deliver({"car-1": _orders(4)}) == {}
    newer = await device.expect(wire.Config)
    assert newer.revision == config.revision + 1
    assert msgspec.json.decode(newer.document, type=Orders).epoch == 4
    device.close()


async def test_orders_of_an_older_epoch_are_refused_and_a_repeated_delivery_is_harmless(
    server: LegacyServer, side: LegacySide
) -> None:
    assert await side.deliver({name: _orders(5) for name in ("car-1", "car-2")}) == {}
    refused = await side.deliver({"car-1": _orders(4), "car-2": _orders(6), "car-99": _orders(1)})
    assert set(refused) == {"car-1", "car-99"}
    assert "epoch 4" in refused["car-1"]
    assert "epoch 5" in refused["car-1"]
    assert "register" in refused["car-99"]
    assert await side.deliver({"car-2": _orders(6)}) == {}
    with pytest.raises(Conflict):
        await side.set_config("car-1", {"interval": 10})  # would wipe out the orders
    device = await Device.sign_in(server.address, "car-2")
    assert (await device.expect(wire.Config)).revision == 2
    device.close()


async def test_a_devices_report_is_kept_and_told(server: LegacyServer, side: LegacySide) -> None:
    report = DeviceReport(
        epoch=3, phase=DevicePhase.WENT_BACK, flags=Flags(), reason="no answer to the probe"
    )
    device = await Device.sign_in(server.address)
    device.send(wire.ConfigReport(msgspec.json.encode(report)))
    told = await _until(side, ReportReceived)
    assert (told.device, told.report) == ("car-1", report)
    assert await side.reports() == {"car-1": report}
    device.send(wire.ConfigReport(b'{"odd":1}'), wire.ConfigReport(b"no json \xff"))
    device.send(wire.Telemetry("gps", 1, NOW_MS, b"{}"))
    assert (await _until(side, TelemetryReceived)).seq == 1  # neither stops the feed
    device.close()


async def test_the_inventory_tells_attributes_and_who_is_connected(
    server: LegacyServer, side: LegacySide
) -> None:
    await side.register("car-4", _key("car-4"), {"hardware": 4})
    device = await Device.sign_in(server.address, "car-4")
    by_id = {entry.id: entry for entry in await side.inventory()}
    assert list(by_id) == ["car-1", "car-2", "car-3", "car-4"]
    assert by_id["car-4"].attributes == {"hardware": 4, "firmware": "4.2"}
    assert by_id["car-4"].connected
    assert not by_id["car-1"].connected
    assert by_id["car-1"].since is None
    with pytest.raises(BadInput):
        await side.register("car 5", _key("car 5"), {})
    with pytest.raises(BadInput, match="16 characters"):
        await side.register("car-5", "short", {})
    with pytest.raises(NotFound):
        await side.send_command(_command(device="car-99"))
    device.close()


async def test_an_owner_with_a_wrong_key_is_refused(server: LegacyServer) -> None:
    side = LegacySide(server.url, "wrong")
    with pytest.raises(Forbidden, match=r"owner\.key"):
        await side.inventory()
    with pytest.raises(Forbidden):
        await _items(side, 1)
    await side.close()


async def test_a_lost_server_is_unavailable_and_the_same_side_goes_on_when_it_is_back(tmp_path: Path) -> None:
    async with LegacyServer(tmp_path, owner_key=OWNER_KEY) as server:
        await server.register(_seeds())
        side = LegacySide(server.url, OWNER_KEY)
        assert len(await side.inventory()) == 3
        watching = asyncio.create_task(_items(side, 1))
    with pytest.raises(Unavailable):
        await watching
    with pytest.raises(Unavailable, match="see that it runs"):
        await side.inventory()
    async with LegacyServer(tmp_path, port=server.address[1], owner_key=OWNER_KEY):
        assert len(await side.inventory()) == 3
    await side.close()


async def test_a_data_directory_serves_one_process_and_keeps_its_key_to_itself(tmp_path: Path) -> None:
    async with LegacyServer(tmp_path) as server:
        with pytest.raises(Conflict, match="another legacy server"):
            async with LegacyServer(tmp_path):
                pass
        assert (tmp_path / "owner.key").read_text().strip() == server.owner_key
        await server.register(_seeds())
        for path in tmp_path.iterdir():
            assert path.name == "address" or path.stat().st_mode & 0o077 == 0, path
            assert _key("car-1").encode() not in path.read_bytes()
    assert (tmp_path / "address").read_text().startswith("127.0.0.1:")


def test_an_inventory_is_read_from_csv_and_json_lines(tmp_path: Path) -> None:
    table = tmp_path / "fleet.csv"
    table.write_text(f"device,key,hardware,model,plug\ncar-1,{_key('car-1')},3,Zoe,true\n")
    assert read_inventory(table) == [
        DeviceSeed("car-1", _key("car-1"), {"hardware": 3, "model": "Zoe", "plug": True})
    ]
    lines = tmp_path / "fleet.jsonl"
    lines.write_bytes(b"\n".join(map(msgspec.json.encode, _seeds())))
    assert read_inventory(lines) == _seeds()
    lines.write_text('{"device": "car-1"}')
    with pytest.raises(BadInput, match=r"fleet\.jsonl:1"):
        read_inventory(lines)


async def _fleetlift(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fleetlift.cli.legacy", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "FLEETLIFT_LEGACY_KEY": OWNER_KEY},
    )
    async with asyncio.timeout(WITHIN_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_an_owner_looks_at_the_server_and_sends_commands_from_the_command_line(
    server: LegacyServer,
) -> None:
    where = ("--data", str(server.data_dir))
    device = await Device.sign_in(server.address)

    async def answer() -> None:
        command = await device.expect(wire.Command)
        device.send(wire.CommandReply(command.id, wire.ReplyStatus.SUCCEEDED, command.params))

    answering = asyncio.create_task(answer())
    (code, sent, _), (_, devices, _) = await asyncio.gather(
        _fleetlift("send", "car-1", "lock", "--params", '{"doors":4}', "--json", *where),
        _fleetlift("devices", "--json", *where),
    )
    await answering
    assert code == 0
    assert json.loads(sent)["status"] == "succeeded"
    assert json.loads(sent)["detail"] == {"doors": 4}
    assert [json.loads(line)["id"] for line in devices.splitlines()] == ["car-1", "car-2", "car-3"]
    code, feed, _ = await _fleetlift("feed", "--no-follow", "--json", *where)
    assert code == 0
    assert [json.loads(line)["type"] for line in feed.splitlines()] == ["presence", "command"]
    code, _, err = await _fleetlift("send", "car-99", "lock", *where)
    assert code == 1
    assert "register" in err
    device.close()
