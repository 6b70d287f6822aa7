"""Capture and replay against a whole backend: counts at socket and store, kills, stalls, real agents."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
import pytest_asyncio
from small_disk import mounted, unmounted

from fault_proxy import BOTH, UP, FaultProxy
from fleetlift.backend import registry
from fleetlift.backend.commands import create_command
from fleetlift.backend.context import Context, open_context
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.bus.log import LogMessage, read, stream_state
from fleetlift.core import mqtt
from fleetlift.core.capture import (
    Account,
    CapturedMessage,
    DamagedCapture,
    Manifest,
    State,
    UnfinishedCapture,
    shortfalls,
)
from fleetlift.core.errors import BadInput, Conflict, NotFound
from fleetlift.core.masking import Rules
from fleetlift.core.orders import CommandsFlag, DevicePhase, Endpoint, Flags, LinkFlag, Orders, TelemetryFlag
from fleetlift.device import messages as m
from fleetlift.device.journal import Journal
from fleetlift.device.shell import DeviceShell
from fleetlift.device.vehicle import VehicleApplication
from fleetlift.load.capture import Options, Selection, capture
from fleetlift.load.capture_file import CaptureWriter, OutOfRoom, read_capture, read_manifest
from fleetlift.load.replay import Api, Outcome, Replay
from fleetlift.load.replay import Options as ReplayOptions
from fleetlift.testing import RunningBackend, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORD = "a-long-enough-password"
NOW = 1_700_000_000.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ctx(backend: RunningBackend) -> AsyncIterator[Context]:
    async with open_context(backend.settings, name="test") as context:
        yield context


async def until(condition: Callable[[], Any], *, within_s: float = 20.0, what: str = "it") -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {within_s:g} s"
        await asyncio.sleep(0.01)
    return found


async def eventually(check: Callable[[], Awaitable[Any]], *, within_s: float = 20.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := await check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return found


async def register(ctx: Context, tenant: str, *devices: str) -> None:
    given = (Credential(kind="password", value=PASSWORD),)
    async with ctx.pool.acquire() as conn:
        await registry.put_devices(
            conn,
            [NewDevice(id=device, tenant=tenant, credentials=given) for device in devices],
            generated=True,
            make_tenants=True,
        )


class Sender(asyncio.Protocol):
    """A device that publishes and keeps what was acknowledged: the count at the socket."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.acked: dict[int, tuple[str, bytes]] = {}
        self.sent: dict[int, tuple[str, bytes]] = {}
        self.welcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._decoder = mqtt.Decoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        hello = mqtt.Connect(client_id=self.device, username=self.device, password=PASSWORD.encode())
        transport.write(mqtt.encode(hello))

    def data_received(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            if isinstance(packet, mqtt.ConnAck):
                self.welcome.set_result(packet.code)
            elif isinstance(packet, mqtt.PubAck):
                self.acked[packet.packet_id] = self.sent[packet.packet_id]

    def publish(self, channel: str, body: bytes) -> None:
        number = len(self.sent) + 1
        self.sent[number] = (f"dt/{self.device}/{channel}", body)
        self.transport.write(mqtt.publish(*self.sent[number], qos=1, packet_id=number))

    def produce(self, count: int) -> None:
        for _ in range(count):
            n = len(self.sent) + 1
            self.publish("gps", b'{"ts":%d,"seq":%d,"lat":47.1}' % (NOW * 1000 + n, n))

    async def confirmed(self) -> None:
        await until(lambda: len(self.acked) == len(self.sent), what="every PUBACK")


@asynccontextmanager
async def sending(backend: RunningBackend, *devices: str) -> AsyncIterator[list[Sender]]:
    loop = asyncio.get_running_loop()
    senders: list[Sender] = []
    for device in devices:
        _, sender = await loop.create_connection(lambda device=device: Sender(device), *backend.mqtt)  # type: ignore[misc]
        assert await sender.welcome == 0
        senders.append(sender)
    yield senders
    for sender in senders:
        sender.transport.close()


@asynccontextmanager
async def recording(ctx: Context, to: Path, **changes: Any) -> AsyncIterator[asyncio.Task[Manifest]]:
    """A capture at work inside the block, ended as at Ctrl-C behind it unless it is over before."""
    stop = asyncio.Event()
    fields: dict[str, Any] = {"to": to, "for_s": 300.0, "block_bytes": 4096, "segment_bytes": 4096, **changes}
    task = asyncio.create_task(capture(ctx.settings, Options(**fields), stop=stop))
    await until(lambda: (to / "manifest.json").exists() or task.done(), what="the capture's start")
    yield task
    stop.set()
    async with asyncio.timeout(40):
        await asyncio.wait([task])


async def logged(ctx: Context, subject: str) -> list[LogMessage]:
    """Everything in the log under a subject, in its order."""
    return [
        message
        async for batch in read(ctx.settings, after=None, filters=(subject,), name="test", until_end=True)
        for message in batch
    ]


def bodies(messages: Sequence[CapturedMessage], device: str) -> list[tuple[str, bytes]]:
    return [(one.topic, one.payload) for one in messages if one.device == device and one.direction == "up"]


def seqs(messages: Sequence[LogMessage]) -> list[int]:
    return [json.loads(one.payload)["seq"] for one in messages]


def first_of_each(numbers: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(numbers))


# -- capture ------------------------------------------------------------------------------------------------


async def test_a_tenants_capture_holds_what_its_sockets_were_acknowledged_and_nothing_else(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """Counted at the socket, in the log and in the capture; across segments, with large bodies; commands too.
    The other tenant's ids, secrets and bodies are nowhere in the capture's files."""
    await register(ctx, "acme", "ca-1", "ca-2", "ca-3")
    await register(ctx, "rival", "cr-1", "cr-2")
    to = tmp_path / "capture"
    async with (
        sending(backend, "ca-1", "ca-2", "ca-3", "cr-1", "cr-2") as senders,
        recording(ctx, to, selection=Selection(tenant="acme")) as task,
        httpx.AsyncClient(
            base_url=backend.url + "/api/v1", headers={"authorization": f"Bearer {backend.token}"}
        ) as api,
    ):
        commands = []
        for sender in senders:
            sender.produce(400)
            sender.publish("photo", b'{"data":"' + sender.device.encode() * 40_000 + b'"}')
            sender.publish("config", b'{"seq":1,"wifi":{"password":"hunter2-%s"}}' % sender.device.encode())
            made = await api.post(
                f"/devices/{sender.device}/commands", json={"name": "lock", "params": {"pin": "hunter2"}}
            )
            assert made.status_code == 202
            commands.append(made.json()["id"])
        # An id that does not tell its time is found by the second count.
        await create_command(ctx, "ca-1", "honk", id=str(uuid4()))
        for sender in senders:
            await sender.confirmed()
    manifest = task.result()
    assert shortfalls(manifest) == ["it is stopped: it was interrupted"]
    got = list(read_capture(to))
    for sender in senders[:3]:
        mine = bodies(got, sender.device)
        assert len(mine) == len(sender.acked) == 402
        assert mine[:401] == list(sender.acked.values())[:401]
        assert json.loads(mine[401][1]) == {"seq": 1, "wifi": {"password": "***"}}
    assert {one.device for one in got} == {"ca-1", "ca-2", "ca-3"}
    down = [one for one in got if one.direction == "down"]
    assert [one.topic.split("/")[5] for one in down][:3] == commands[:3]
    assert json.loads(down[0].payload)["params"] == {"pin": "***"}
    assert (manifest.captured, manifest.commands_captured) == (1206, 4) == (manifest.offered, len(down))
    assert len(manifest.segments) >= 3
    assert manifest.log is None
    for path in to.iterdir():
        text = path.read_bytes()
        if path.name != "progress.jsonl":
            assert b"cr-1" not in text and b"rival" not in text
    assert not [one for one in got if b"hunter2" in one.payload or b"cr-" in one.payload]


async def test_a_share_is_recorded_and_every_number_of_the_log_accounted_for(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """Ended early, a capture says so and still balances; the log counts what was left out, by reason."""
    devices = [f"cs-{n}" for n in range(6)]
    await register(ctx, "shared", *devices)
    named = frozenset(devices[:2])
    to, pseudo = tmp_path / "c", tmp_path / "p"
    async with (
        sending(backend, *devices) as senders,
        recording(ctx, to, selection=Selection(devices=named)) as task,
        recording(ctx, pseudo, selection=Selection(devices=named), key=b"k" * 32) as hidden,
    ):
        for sender in senders:
            sender.produce(50)
        for sender in senders:
            await sender.confirmed()
    manifest = task.result()
    assert shortfalls(manifest) == ["it is stopped: it was interrupted"]
    assert manifest.captured == manifest.offered == 100
    assert manifest.log is not None
    log = manifest.log
    assert log.last - log.first + 1 == log.read == 100 + sum(log.left_out.values())
    assert log.left_out["not selected"] == 200
    plain, names = list(read_capture(to)), {one.device for one in read_capture(pseudo)}
    assert {one.device for one in plain} == named
    assert len(names) == 2
    assert hidden.result().captured == 100
    assert not names & named
    assert not any(b"cs-" in one.payload or "cs-" in one.topic for one in read_capture(pseudo))


async def test_what_another_sides_feed_brings_is_recorded_as_the_device_would_send_it(
    ctx: Context, tmp_path: Path
) -> None:
    to = tmp_path / "c"
    async with recording(ctx, to, selection=Selection(feed="legacy")) as task:
        for n in range(1, 11):
            head = {"Fleetlift-Ts": f"{NOW + n}", "Fleetlift-Seq": f"{n}", "Fleetlift-Received": f"{NOW + 9}"}
            await ctx.publisher.to_log("feed/legacy/cf-1/can", b'{"v":1}', head)
            await ctx.publisher.to_log("feed/legacy/cf-1/can", b'{"v":1}', {**head, "Fleetlift-Again": "1"})
            await ctx.publisher.to_log("feed/other/cf-1/can", b'{"v":2}', head)
    got = list(read_capture(to))
    assert [one.topic for one in got] == ["dt/cf-1/can"] * 10
    assert [json.loads(one.payload) for one in got] == [
        {"ts": round((NOW + n) * 1000), "seq": n, "v": 1} for n in range(1, 11)
    ]
    assert task.result().captured == 10


def cli(*arguments: str | Path, backend: RunningBackend, output: Path) -> "subprocess.Popen[bytes]":
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fleetlift.cli.main", *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FLEETLIFT_URL": backend.url, "FLEETLIFT_TOKEN": backend.token},
        )


async def exit_status(process: "subprocess.Popen[bytes]", output: Path, *, within_s: float = 60.0) -> int:
    try:
        await until(lambda: process.poll() is not None, within_s=within_s, what="the command's end")
    except AssertionError:
        process.kill()
        raise AssertionError(output.read_text()) from None
    status = process.poll()
    assert status is not None
    return status


async def test_a_killed_recorder_goes_on_and_nothing_is_missing_or_double(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """SIGKILL of a real process in the middle; devices go on sending while nobody records."""
    await register(ctx, "killed", "ck-1", "ck-2")
    to, out = tmp_path / "c", tmp_path / "out"
    common: list[str | Path] = ["capture", "--to", to, "--data", backend.data_dir, "--tenant", "killed"]
    async with sending(backend, "ck-1", "ck-2") as senders:
        process = cli(*common, "--for", "5m", backend=backend, output=out)
        await until(lambda: (to / "manifest.json").exists() or process.poll() is not None, what="its start")
        assert process.poll() is None, out.read_text()
        first = to / "000001.open"
        for _ in range(500):
            for sender in senders:
                sender.produce(20)
            await asyncio.sleep(0.01)
            if first.exists() and first.stat().st_size > 4000:
                break
        process.kill()
        await exit_status(process, out)
        with pytest.raises(UnfinishedCapture):
            list(read_capture(to))
        for sender in senders:
            sender.produce(100)
        for sender in senders:
            await sender.confirmed()
        assert await exit_status(cli(*common, "--recover", backend=backend, output=out), out) == 1
        kept = read_manifest(to)
        assert kept.state is State.RECOVERED
        assert "killed" in kept.reason
        assert kept.captured == kept.offered == sum(1 for _ in read_capture(to)) > 0
        again = cli(*common, "--for", "1s", "--resume", "--json", backend=backend, output=out)
        assert await exit_status(again, out) == 0, out.read_text()
    assert json.loads(out.read_text())["complete"] is True
    manifest = read_manifest(to)
    assert shortfalls(manifest) == []
    assert manifest.resumed == 1
    assert any(one.recovered for one in manifest.segments)
    got = list(read_capture(to))
    begun = json.loads(bodies(got, "ck-1")[0][1])["seq"]
    for sender in senders:
        mine = bodies(got, sender.device)
        assert mine == list(sender.acked.values())[-len(mine) :]
    assert begun <= 20
    assert await exit_status(cli("capture", "--to", to, "--check", backend=backend, output=out), out) == 0
    segment = to / manifest.segments[0].name
    segment.write_bytes(segment.read_bytes()[:-10])
    assert await exit_status(cli("capture", "--to", to, "--check", backend=backend, output=out), out) == 1
    assert segment.name in out.read_text()


async def test_a_full_disk_ends_a_capture_cleanly(tmp_path: Path) -> None:
    """On a real file system that has no room left: what was recorded is closed, balanced and readable."""
    disk = tmp_path / "disk"
    if not await mounted(disk, size="2m"):
        pytest.skip("no file system can be mounted here")
    try:
        manifest = Manifest(id="full", started_at_s=NOW, until_s=NOW + 60)
        account = Account(created="x", first=1, seq=0, at_s=NOW)
        writer = CaptureWriter(disk / "c", manifest, account, block_bytes=8192, segment_bytes=200_000)
        with pytest.raises(OutOfRoom, match="disk is full"):
            for n in range(1, 100_000):
                account.passes(n, NOW + n)
                account.offered += 1
                writer.add(CapturedMessage("car-1", NOW + n, "dt/car-1/x", 1, os.urandom(500), "up"))
        closed = writer.close(State.COMPLETE)
        kept = sum(1 for _ in read_capture(disk / "c"))
    finally:
        await unmounted(disk)
    assert closed.state is State.STOPPED
    assert closed.offered == closed.captured == kept > 1000
    assert [one for one in shortfalls(closed) if "disk is full" not in one] == []


async def test_captures_of_nobody_and_of_replays_are_refused(ctx: Context, tmp_path: Path) -> None:
    for tenant, problem in (("nobody", NotFound), ("replay", BadInput)):
        with pytest.raises(problem):
            await capture(
                ctx.settings,
                Options(to=tmp_path / "c", for_s=1, selection=Selection(tenant=tenant), rules=Rules()),
                stop=asyncio.Event(),
            )
    assert not (tmp_path / "c").exists()


# -- replay -------------------------------------------------------------------------------------------------


def made_capture(to: Path, devices: Sequence[str], count: int, *, every_s: float = 0.001) -> None:
    """A capture of `count` messages of each device, in turn, and a command to each at the end."""
    account = Account(created="x", first=1, seq=0, at_s=NOW)
    writer = CaptureWriter(to, Manifest(id=to.name, started_at_s=NOW, until_s=NOW), account, block_bytes=8192)
    at_s = NOW
    for n in range(1, count + 1):
        for device in devices:
            at_s += every_s
            account.offered += 1
            body = b'{"ts":%d,"seq":%d,"pad":"%s"}' % (NOW * 1000 + n, n, b"x" * (n % 50))
            writer.add(CapturedMessage(device, at_s, f"dt/{device}/gps", 1, body, "up"))
    for device in devices:
        account.commands += 1
        topic = f"$aws/commands/things/{device}/executions/c-{device}/request/json"
        body = b'{"name":"unlock","params":{"door":1},"mode":"execute","expires_at":1}'
        writer.add(CapturedMessage(device, at_s, topic, 1, body, "down"))
    writer.close(State.COMPLETE, commands_offered=len(devices))


def replay_options(backend: RunningBackend, path: Path, **changes: Any) -> ReplayOptions:
    host, port = backend.mqtt
    fields: dict[str, Any] = {
        "capture": path,
        "host": host,
        "port": port,
        "state": path.with_suffix(".state"),
        "api": Api(backend.url, backend.token),
        "provision": True,
        "speed": 0.0,
        **changes,
    }
    return ReplayOptions(**fields)


async def played(options: ReplayOptions) -> Outcome:
    async with asyncio.timeout(60):
        return await Replay(options).run()


@asynccontextmanager
async def agent(
    backend: RunningBackend, device: str, password: str, directory: Path
) -> AsyncIterator[DeviceShell]:
    """A real device agent, on the new side, that executes every command it may."""
    host, port = backend.mqtt
    journal = Journal(directory, schedule=asyncio.get_running_loop().call_later)
    flags = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
    orders = Orders(
        epoch=1, migration="test", flags=flags, new=Endpoint(host=host, port=port), credential=password
    )
    moved = m.Record(epoch=1, phase=DevicePhase.MOVED, flags=flags, orders=orders)
    journal.write(device, (m.RecordChanged(moved),))
    journal.flush()
    application = VehicleApplication(takes_s=0.0)
    shell = DeviceShell(
        device, "no-key", old=("127.0.0.1", free_port()), journal=journal, application=application
    )
    shell.start()
    try:
        await until(lambda: shell.agent.link(m.Path.NEW) is m.LinkState.UP, what="the agent's connection")
        yield shell
    finally:
        await shell.stop()
        journal.close()


async def test_a_replay_is_in_order_counted_and_moves_no_device(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """As fast as it goes: by device in the order of the capture, every message acknowledged and stored once;
    the commands reach live agents, which execute none of them."""
    made_capture(tmp_path / "order", ["co-1", "co-2", "co-3"], 300)
    options = replay_options(backend, tmp_path / "order")
    first = Replay(options)
    outcome = await asyncio.wait_for(first.run(), 60)
    assert outcome.finished and outcome.reason == ""
    assert (first.waiting_bytes, first.ends.waiting, outcome.again) == (0, 0, 0)
    assert (outcome.total, outcome.acknowledged, outcome.refused, outcome.failed) == (903, 903, 0, 0)
    for device in ("co-1", "co-2", "co-3"):
        assert seqs(await logged(ctx, f"dt.replay-{device}.gps")) == list(range(1, 301))
        assert await logged(ctx, f"dt.{device}.>") == []

    async def stored() -> bool:
        count = "SELECT count(*) FROM telemetry WHERE device LIKE 'replay-co-%'"
        return bool(await ctx.pool.fetchval(count) == 900)

    await eventually(stored)
    assert (await played(options)).played == outcome.played  # done: nothing is left to play

    async with agent(backend, "replay-co-1", first.credentials["replay-co-1"], tmp_path / "agent") as shell:

        async def answered() -> Any:
            return await ctx.pool.fetchval(
                """SELECT p.detail FROM command c JOIN command_path p ON p.command = c.id
                   WHERE c.device = 'replay-co-1' AND c.status = 'would-execute'"""
            )

        assert "replayed" in json.loads(await eventually(answered))["reasonDescription"]
        assert shell.executed == {}
    modes = await ctx.pool.fetch("SELECT DISTINCT mode FROM command WHERE device LIKE 'replay-%'")
    assert [row["mode"] for row in modes] == ["dry-run"]


async def test_a_live_device_refuses_whatever_bears_a_mark(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """Frames that get to a real device all the same, by a mistake on the side: the device fails closed. The
    same frame without marks is executed, so the device under test does execute."""
    await register(ctx, "live", "cl-1")
    async with agent(backend, "cl-1", PASSWORD, tmp_path / "agent") as shell:
        marked: dict[str, dict[str, Any]] = {
            "a-real-id": {"mode": "execute", "replayed": True},
            "replay-1": {"mode": "execute"},
            "another-id": {"mode": "rehearsal"},
            "third-id": {"mode": "execute", "replayed": "maybe"},
        }
        request = {"name": "unlock", "params": {}, "expires_at": time.time() + 60}
        topic = "$aws/commands/things/cl-1/executions/{}/request/json"
        plain = msgspec.json.encode({**request, "mode": "execute"})

        async def takes_commands() -> bool:
            await ctx.publisher.to_device(topic.format("plain"), plain)  # nobody, before it has subscribed
            return shell.executed == {"plain": 1}

        await eventually(takes_commands)
        for id_, mark in marked.items():
            await ctx.publisher.to_device(topic.format(id_), msgspec.json.encode({**request, **mark}))
        await ctx.publisher.to_device(topic.format("fence"), plain)
        await until(lambda: "fence" in shell.executed, what="the command behind the marked ones")

        async def answers() -> dict[str, Any]:
            found = await logged(ctx, "$aws.commands.things.cl-1.executions.*.response.json")
            return {one.topic.split("/")[5]: json.loads(one.payload) for one in found}

        async def all_answered() -> bool:
            return len((await answers()).keys() & marked.keys()) == len(marked)

        await eventually(all_answered)
        for id_ in marked:
            assert (await answers())[id_]["statusReason"]["reasonCode"] == "WOULD_EXECUTE", id_
        assert shell.executed == {"plain": 1, "fence": 1}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {backend.token}"}) as api:
        base = backend.url + "/api/v1/devices"
        real = await api.put(f"{base}/replay-cl-9", json={"tenant": "live"})
        assert (real.status_code, "reserved for replays" in real.text) == (400, True)
        ours = await api.put(f"{base}/cl-9", json={"tenant": "replay"})
        assert ours.status_code == 400
        executing = await api.post(f"{base}/replay-cl-9/commands", json={"name": "unlock"})
        assert executing.status_code == 400


async def test_a_replay_against_real_devices_is_refused_before_anything_is_sent(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    made_capture(tmp_path / "closed", ["cx-1"], 5)
    await register(ctx, "real", "cx-1")
    with_password = {"credentials": {"replay-cx-1": PASSWORD, "cx-1": PASSWORD}, "provision": False}
    async with FaultProxy(backend.mqtt) as proxy:
        common = {"host": proxy.address[0], "port": proxy.address[1], **with_password}

        async def refused(problem: type[Exception], text: str, **changes: Any) -> None:
            with pytest.raises(problem, match=text):
                await played(replay_options(backend, tmp_path / "closed", **{**common, **changes}))

        await refused(BadInput, "could be a real device", names={"cx-1": "cx-1"})
        await refused(BadInput, "nothing says whose the devices", api=None)
        await refused(Conflict, "not registered")
        await refused(BadInput, "not one of replays", tenant="real")
        # Such a row can only be older than the rule; the replay does not trust the name alone.
        await ctx.pool.execute("INSERT INTO device (id, tenant) VALUES ('replay-cx-1', 'real')")
        await refused(Conflict, "belongs to tenant 'real'")
        await refused(Conflict, "belongs to another tenant", provision=True)
        await ctx.pool.execute("DELETE FROM device WHERE id = 'replay-cx-1'")
        assert proxy.accepted == 0
    assert await logged(ctx, "dt.cx-1.>") == await logged(ctx, "dt.replay-cx-1.>") == []


class Broker(asyncio.Protocol):
    """A broker that has no registry: it lets everyone in, and keeps what is published."""

    def __init__(self, kept: list[tuple[str, str, bytes]]) -> None:
        self.kept, self.name = kept, ""
        self._decoder = mqtt.Decoder()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            if isinstance(packet, mqtt.Connect):
                self.name = packet.client_id
                self.transport.write(mqtt.encode(mqtt.ConnAck(False, 0)))
            elif isinstance(packet, mqtt.Publish):
                self.kept.append((self.name, packet.topic, packet.payload))
                self.transport.write(mqtt.puback(packet.packet_id))


async def test_a_broker_without_a_registry_gets_nothing_that_is_not_marked(
    backend: RunningBackend, tmp_path: Path
) -> None:
    made_capture(tmp_path / "broker", ["cn-1", "cn-2"], 50)
    kept: list[tuple[str, str, bytes]] = []
    server = await asyncio.get_running_loop().create_server(lambda: Broker(kept), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    names = {"cn-1": "replay-one", "cn-2": "replay-two"}
    no_registry: dict[str, Any] = {"api": None, "unchecked": True, "provision": False, "names": names}
    credentials = dict.fromkeys(names.values(), PASSWORD)
    outcome = await played(
        replay_options(
            backend, tmp_path / "broker", host="127.0.0.1", port=port, credentials=credentials, **no_registry
        )
    )
    server.close()
    assert (outcome.acknowledged, len(kept)) == (102, 102)
    assert {client for client, _, _ in kept} == {"replay-one", "replay-two"}
    assert all(
        client in topic.split("/") and not names.keys() & set(topic.split("/")) for client, topic, _ in kept
    )
    commands = [(topic, json.loads(body)) for _, topic, body in kept if topic.startswith("$aws")]
    assert len(commands) == 2
    for topic, command in commands:
        assert "/executions/replay-c-" in topic
        assert (command["mode"], command["replayed"]) == ("dry-run", True)


async def test_stalls_and_broken_connections_lose_nothing_and_keep_the_order(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """At least once, `seq` intact: by first occurrence, a device's messages are those of the capture."""
    made_capture(tmp_path / "storm", ["cb-1", "cb-2"], 1500)
    async with FaultProxy(backend.mqtt) as proxy:
        options = replay_options(
            backend, tmp_path / "storm", host=proxy.address[0], port=proxy.address[1], speed=3.0
        )
        playing = Replay(options)
        task = asyncio.create_task(playing.run())

        async def done(count: int) -> None:
            await until(lambda: playing.ends.done >= count or task.done(), what=f"{count} messages")
            assert not task.done(), task.result()

        for count in (300, 900):
            await done(count)
            proxy.cut()
        await done(1300)
        proxy.stalled = frozenset({UP})
        held = playing.ends.done
        await until(lambda: playing.ends.waiting > 200, what="the open model going on")
        assert playing.ends.done < held + 100
        proxy.cut()
        proxy.stalled = BOTH
        await asyncio.sleep(0)
        proxy.stalled = frozenset()
        await done(2000)
        await proxy.refuse()
        await until(lambda: playing.ends.waiting > 100, what="the open model going on")
        await proxy.accept()
        outcome = await asyncio.wait_for(task, 60)
    assert outcome.finished
    assert (outcome.total, outcome.acknowledged) == (3002, 3002)
    assert outcome.again > 0
    for device in ("cb-1", "cb-2"):
        got = seqs(await logged(ctx, f"dt.replay-{device}.gps"))
        assert first_of_each(got) == list(range(1, 1501))

    async def stored() -> bool:
        count = "SELECT count(*) FROM telemetry WHERE device IN ('replay-cb-1', 'replay-cb-2')"
        return bool(await ctx.pool.fetchval(count) == 3000)

    await eventually(stored)


async def test_a_killed_replay_goes_on_where_it_was(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """SIGKILL of a real process; the second run completes the account, and the order holds over both."""
    made_capture(tmp_path / "resume", ["cq-1", "cq-2"], 2000, every_s=0.0025)
    out = tmp_path / "out"
    host, port = backend.mqtt
    common: list[str | Path] = ["replay", tmp_path / "resume", "--to", f"mqtt://{host}:{port}", "--json"]
    common += ["--provision", "--state", tmp_path / "state"]
    process = cli(*common, "--speed", "1x", backend=backend, output=out)
    position = tmp_path / "state" / "position.json"

    def stands() -> int:
        return int(json.loads(position.read_text())["done"]) if position.exists() else 0

    await until(lambda: stands() > 200 or process.poll() is not None, what="a position")
    process.send_signal(signal.SIGKILL)
    assert await exit_status(process, out) == -signal.SIGKILL, out.read_text()
    stood = stands()
    assert 200 < stood < 4000
    again = cli(*common, "--speed", "as-fast", backend=backend, output=out)
    assert await exit_status(again, out) == 0, out.read_text()
    outcome = json.loads(out.read_text())
    assert outcome["total"] == outcome["acknowledged"] == outcome["played"] == 4002
    for device in ("cq-1", "cq-2"):
        got = seqs(await logged(ctx, f"dt.replay-{device}.gps"))
        assert first_of_each(got) == list(range(1, 2001))
    assert oct((tmp_path / "state" / "credentials.jsonl").stat().st_mode)[-3:] == "600"
    secrets = re.findall(r'"password":"([^"]+)"', (tmp_path / "state" / "credentials.jsonl").read_text())
    assert len(secrets) == 2
    assert not any(secret in out.read_text() for secret in secrets)


async def test_wrong_passwords_and_messages_a_side_cannot_bear_are_counted(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    """Neither holds up another device, nor the messages behind it; the totals still add up."""
    account = Account(created="x", first=1, seq=0, at_s=NOW)
    writer = CaptureWriter(tmp_path / "odd", Manifest(id="odd", started_at_s=NOW, until_s=NOW), account)
    bodies_ = [b'{"seq":1}', b'{"seq":2,"x":"' + b"y" * 2_000_000 + b'"}', b'{"seq":3}']
    for device in ("cw-1", "cw-2"):
        for body in bodies_ if device == "cw-1" else bodies_[:1]:
            account.offered += 1
            writer.add(CapturedMessage(device, NOW, f"dt/{device}/gps", 1, body, "up"))
    account.offered += 1
    writer.add(CapturedMessage("cw-1", NOW, "$aws/things/cw-1/shadow/update/delta", 1, b"{}", "down"))
    writer.close(State.COMPLETE)
    await register(ctx, "replay", "replay-cw-1", "replay-cw-2")
    credentials = {"replay-cw-1": PASSWORD, "replay-cw-2": "wrong"}
    outcome = await played(
        replay_options(backend, tmp_path / "odd", provision=False, credentials=credentials)
    )
    assert outcome.finished
    assert (outcome.acknowledged, outcome.refused, outcome.failed, outcome.left_out) == (2, 2, 0, 1)
    assert sorted(outcome.reasons)[0].startswith("the side closes the connection")
    assert first_of_each(seqs(await logged(ctx, "dt.replay-cw-1.gps"))) == [1, 3]


async def test_a_side_that_never_answers_stops_the_replay_with_its_position_kept(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    made_capture(tmp_path / "away", ["cz-1"], 20)
    nobody = {"api": None, "unchecked": True, "provision": False, "credentials": {"replay-cz-1": PASSWORD}}
    options = replay_options(backend, tmp_path / "away", port=free_port(), give_up_s=1.0, **nobody)
    outcome = await played(options)
    assert not outcome.finished
    assert "does not answer any more" in outcome.reason
    assert outcome.open == 21
    host, port = backend.mqtt
    with pytest.raises(BadInput, match="name another --state"):
        Replay(replay_options(backend, tmp_path / "away"))
    moved = replay_options(backend, tmp_path / "away", host=host, port=port, again=True)
    assert (await played(moved)).acknowledged == 21


async def test_damage_in_a_capture_ends_its_replay_by_name(
    backend: RunningBackend, ctx: Context, tmp_path: Path
) -> None:
    made_capture(tmp_path / "damaged", ["cd-1"], 100)
    path = tmp_path / "damaged" / "000001.seg"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedCapture, match=r"000001\.seg"):
        await played(replay_options(backend, tmp_path / "damaged"))


async def test_what_the_log_had_deleted_is_a_named_gap(ctx: Context, tmp_path: Path) -> None:
    """Nobody recorded, and the log did not wait: the capture goes on, and never claims to be complete."""
    to, mine = tmp_path / "c", Selection(devices=frozenset({"cg-1"}))
    async with recording(ctx, to, selection=mine) as task:
        await ctx.publisher.to_log("dt/cg-1/gps", b'{"seq":1}')
        await until(lambda: (to / "000001.open").exists(), what="a block")
        task.cancel()
        await asyncio.wait([task])
    for n in (2, 3, 4):
        await ctx.publisher.to_log("dt/cg-1/gps", b'{"seq":%d}' % n)
    await ctx.nc.jetstream().purge_stream("$MQTT_msgs")
    await ctx.publisher.to_log("dt/cg-1/gps", b'{"seq":5}')
    options = Options(to=to, for_s=0.2, resume=True, selection=mine)
    for other in (Selection(), Selection(percent=5)):
        with pytest.raises(BadInput, match="the same selection"):
            await capture(
                ctx.settings, msgspec.structs.replace(options, selection=other), stop=asyncio.Event()
            )
    with pytest.raises(BadInput, match="without --pseudonyms"):
        await capture(ctx.settings, msgspec.structs.replace(options, key=b"k" * 32), stop=asyncio.Event())
    async with asyncio.timeout(40):
        manifest = await capture(ctx.settings, options, stop=asyncio.Event())
    assert [json.loads(one.payload)["seq"] for one in read_capture(to)] == [1, 5]
    (gap,) = manifest.gaps
    assert gap.messages is not None and gap.messages >= 3
    (missing,) = shortfalls(manifest)
    assert "the log had deleted them" in missing


async def test_the_log_is_read_to_the_mark_of_the_end(ctx: Context, tmp_path: Path) -> None:
    """An idle log too: the capture's own marks come out, and are counted as such."""
    _, _, before = await stream_state(ctx.settings)
    async with recording(ctx, tmp_path / "c", for_s=0.2) as task:
        manifest = await asyncio.wait_for(task, 40)
    assert shortfalls(manifest) == []
    assert manifest.log is not None
    assert manifest.log.first > before
    assert manifest.log.left_out["mark"] == 1
