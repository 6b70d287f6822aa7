"""Device agents on real sockets: the legacy server, a whole backend, SQLite, processes that are killed."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fleetlift.backend.context import open_context
from fleetlift.core.errors import Conflict
from fleetlift.core.orders import CommandsFlag, DevicePhase, Endpoint, Flags, LinkFlag, Orders, TelemetryFlag
from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings
from fleetlift.device.fleet import DeviceSpec, Fleet, make_inventory, specs_of
from fleetlift.device.journal import Journal
from fleetlift.device.recorded import vehicles
from fleetlift.device.shell import DeviceShell, Misbehaviour
from fleetlift.device.vehicle import VehicleApplication
from fleetlift.sides.base import CommandAnswered, FeedItem, SideCommand, TelemetryReceived
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer
from fleetlift.sides.legacy.side import LegacySide
from fleetlift.testing import RunningBackend, free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

OWNER_KEY = "an-owner-key-of-the-tests"
PASSWORD = "a-password-for-the-new-side"
OLD, NEW = m.Path.OLD, m.Path.NEW
ALL_NEW = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
BOTH = Flags(telemetry=TelemetryFlag.BOTH, commands=CommandsFlag.BOTH)


def _key(device: str) -> str:
    return f"not-a-real-key-of-{device}"


async def until(condition: Callable[[], Any], within_s: float = 15.0, what: str = "it") -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {within_s} s"
        await asyncio.sleep(0.02)


class OldSide:
    """A real legacy server with its owner reading the feed."""

    def __init__(self, directory: Path, devices: Sequence[str], port: int = 0) -> None:
        self.directory, self.devices, self.port = directory, devices, port
        self.items: list[FeedItem] = []

    async def __aenter__(self) -> "OldSide":
        self.server = LegacyServer(
            self.directory, host="127.0.0.1", port=self.port, owner_key=OWNER_KEY, dispatch_every_s=0.05
        )
        await self.server.__aenter__()
        await self.server.register([DeviceSeed(name, _key(name), {}) for name in self.devices])
        self.side = LegacySide(self.server.url, OWNER_KEY)
        self._reader = asyncio.create_task(self._read())
        host, port = self.server.url.removeprefix("tcp://").rsplit(":", 1)
        self.address = (host, int(port))
        return self

    async def _read(self) -> None:
        async for _, items in self.side.feed(""):
            self.items += items

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self.side.close()
        await self.server.__aexit__(None, None, None)

    def seqs(self, device: str, channel: str) -> RangeSet:
        return RangeSet(
            item.seq
            for item in self.items
            if isinstance(item, TelemetryReceived) and (item.device, item.channel) == (device, channel)
            if item.seq is not None
        )

    def answers(self, command: str) -> list[str]:
        return [i.status for i in self.items if isinstance(i, CommandAnswered) and i.command == command]


class NewSide:
    """A whole backend, spoken to by its API, and a way to cut devices off from it."""

    def __init__(self, backend: RunningBackend) -> None:
        self.backend = backend
        headers = {"Authorization": f"Bearer {backend.token}"}
        self.http = httpx.AsyncClient(base_url=backend.url + "/api/v1", headers=headers, timeout=20)
        self._proxy: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def admit(self, device: str) -> None:
        await self.http.post("/tenants", json={"id": "carshare", "name": "Car sharing"})  # or it is there
        body = {"tenant": "carshare", "credentials": [{"kind": "password", "value": PASSWORD}]}
        (await self.http.put(f"/devices/{device}", json=body)).raise_for_status()

    async def probe(self, device: str) -> None:
        await self.command(device, "fleetlift.probe")

    async def command(self, device: str, name: str, **params: Any) -> str:
        body = {"name": name, "params": params, "expires_in": 30, "mode": "execute"}
        answer = await self.http.post(f"/devices/{device}/commands", json=body)
        answer.raise_for_status()
        return str(answer.json()["id"])

    async def status(self, command: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.http.get(f"/commands/{command}")).json()
        return found

    async def seqs(self, device: str, channel: str) -> RangeSet:
        found = RangeSet()
        after = None
        while True:
            params: dict[str, str] = {"channel": channel, "limit": "1000"}
            if after:
                params["after"] = after
            page = (await self.http.get(f"/devices/{device}/telemetry", params=params)).json()
            found.add_many(item["seq"] for item in page["items"])
            if not (after := page["next"]):
                return found

    async def reported(self, device: str) -> dict[str, Any]:
        answer = await self.http.get(f"/devices/{device}/shadow", params={"name": "fleetlift"})
        document: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
        state: dict[str, Any] = document.get("state", {}).get("reported", {})
        return state

    async def open(self) -> None:
        """Devices reach the backend through a port that can be closed."""

        async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while data := await reader.read(65_536):
                    writer.write(data)
                    await writer.drain()
            except OSError:
                pass
            finally:
                writer.close()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(*self.backend.mqtt)
            self._writers |= {writer, back}
            await asyncio.gather(pipe(reader, back), pipe(there, writer))
            self._writers -= {writer, back}

        self.port = self.port or free_port()
        self._proxy = await asyncio.start_server(connected, "127.0.0.1", self.port)

    async def cut(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None
            for writer in list(self._writers):
                writer.transport.abort()

    async def close(self) -> None:
        await self.cut()
        await self.http.aclose()

    def orders(self, epoch: int, flags: Flags, **changes: Any) -> Orders:
        fields: dict[str, Any] = {
            "epoch": epoch,
            "migration": "test",
            "flags": flags,
            "new": Endpoint(host="127.0.0.1", port=self.port),
            "credential": PASSWORD,
            "try_within_s": 15.0,
            "new_lost_limit_s": 2.0,
            **changes,
        }
        return Orders(**fields)


class Bench:
    """Both sides and one device between them."""

    def __init__(self, device: str, old: OldSide, new: NewSide, directory: Path) -> None:
        self.device, self.old, self.new, self.directory = device, old, new, directory

    def start(self, misbehaviour: Misbehaviour | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.journal = Journal(self.directory, schedule=loop.call_later)
        self.shell = DeviceShell(
            self.device,
            _key(self.device),
            old=self.old.address,
            journal=self.journal,
            application=VehicleApplication(takes_s=0.01),
            settings=AgentSettings(backoff_s=0.1, backoff_max_s=0.5),
            misbehaviour=misbehaviour,
        )
        self.shell.start()

    async def stop(self, *, abruptly: bool = False) -> None:
        await self.shell.stop(abruptly=abruptly)
        self.journal.close()

    async def move(self, epoch: int, flags: Flags, **changes: Any) -> None:
        await self.old.side.deliver({self.device: self.new.orders(epoch, flags, **changes)})
        await self.new.probe(self.device)
        await until(lambda: self.shell.agent.record.epoch == epoch, what="the order")
        await until(lambda: self.shell.agent.flags == flags, what=f"the move to {flags}")

    async def produce(self, n: int) -> None:
        for number in range(n):
            self.shell.produce("can", b'{"v":%d}' % number)
            await asyncio.sleep(0.002)


@asynccontextmanager
async def bench(backend: RunningBackend, tmp_path: Path, device: str) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(OldSide(tmp_path / "legacy", [device]))
        new = NewSide(backend)
        stack.push_async_callback(new.close)
        await new.open()
        await new.admit(device)
        made = Bench(device, old, new, tmp_path / "device")
        made.start()
        await until(lambda: made.shell.agent.link(OLD) is m.LinkState.UP)
        yield made
        await made.stop()


async def test_a_device_moves_there_step_by_step_and_back_without_losing_anything(
    backend: RunningBackend, tmp_path: Path
) -> None:
    """prepare → try → commit, both, new, old link closed, and all the way back."""
    async with bench(backend, tmp_path, "car-there-and-back") as b:
        await b.produce(50)
        await b.move(1, BOTH)
        await b.produce(50)
        await b.move(2, Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW))
        await b.produce(50)
        await b.move(3, ALL_NEW)
        await b.produce(50)
        await until(lambda: b.shell.agent.link(OLD) is m.LinkState.DOWN)
        command = await b.new.command(b.device, "unlock")
        await until(lambda: command in b.shell.executed)
        end = time.monotonic() + 10
        while (await b.new.status(command))["status"] != "succeeded":
            assert time.monotonic() < end, await b.new.status(command)
            await asyncio.sleep(0.05)
        while (await b.new.reported(b.device)).get("epoch") != 3:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        # Told by the shadow: the old link is closed.
        order = msgspec.to_builtins(b.new.orders(4, Flags()))
        answer = await b.new.http.patch(
            f"/devices/{b.device}/shadow?name=fleetlift", json={"state": {"desired": order}}
        )
        answer.raise_for_status()
        await until(lambda: b.shell.agent.link(OLD) is m.LinkState.UP and b.shell.agent.flags == Flags())
        assert b.shell.agent.phase is DevicePhase.OLD
        await b.produce(50)
        await until(lambda: b.shell.agent.outbox_depth == 0)
        await until(lambda: b.old.seqs(b.device, "can").highest == 250)
        end = time.monotonic() + 10
        while True:
            together = b.old.seqs(b.device, "can").union(await b.new.seqs(b.device, "can"))
            if together == RangeSet(range(1, 251)):
                break
            assert time.monotonic() < end, together
            await asyncio.sleep(0.1)
        assert max(b.shell.executed.values()) == 1


async def test_a_device_that_loses_the_new_side_goes_back_by_itself(
    backend: RunningBackend, tmp_path: Path
) -> None:
    async with bench(backend, tmp_path, "car-dead-man") as b:
        await b.move(1, ALL_NEW)
        await until(lambda: b.shell.agent.link(OLD) is m.LinkState.DOWN)
        await b.new.cut()
        await b.produce(20)
        await until(lambda: b.shell.agent.phase is DevicePhase.WENT_BACK, 10)
        await until(lambda: b.shell.agent.outbox_depth == 0)
        assert "new side lost for" in b.shell.agent.record.reason
        await until(lambda: len(b.old.seqs(b.device, "can")) == 20)
        reports = await b.old.side.reports()
        assert reports[b.device].phase is DevicePhase.WENT_BACK


async def test_a_try_that_cannot_connect_fails_and_the_old_side_hears_why(
    backend: RunningBackend, tmp_path: Path
) -> None:
    async with bench(backend, tmp_path, "car-try") as b:
        orders = b.new.orders(1, BOTH, credential="wrong", try_within_s=2.0)
        await b.old.side.deliver({b.device: orders})
        await until(lambda: b.shell.agent.phase is DevicePhase.WENT_BACK)
        end = time.monotonic() + 5
        while not (reports := await b.old.side.reports()) or reports[b.device].phase.value != "went-back":
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert "did not let this device in" in reports[b.device].reason


async def test_seq_and_command_ids_are_kept_over_a_restart(backend: RunningBackend, tmp_path: Path) -> None:
    """The second copy comes by the other side, after the device was restarted, and is not executed."""
    async with (
        bench(backend, tmp_path, "car-restart") as b,
        open_context(backend.settings, name="test") as context,
    ):
        await b.move(1, BOTH)
        await b.produce(10)
        command = SideCommand(
            id="0195fd6e-7f00-7000-8000-000000000001",
            device=b.device,
            name="lock",
            params={},
            mode="execute",
            expires_at=time.time() + 60,
        )
        await b.old.side.send_command(command)
        await until(lambda: "succeeded" in b.old.answers(command.id))
        await b.stop(abruptly=True)
        b.start()
        await until(lambda: b.shell.agent.link(NEW) is m.LinkState.UP)
        payload = msgspec.json.encode(
            {"name": "lock", "params": {}, "mode": "execute", "expires_at": command.expires_at}
        )
        base = f"$aws/commands/things/{b.device}/executions/{command.id}"
        await context.publisher.to_device(f"{base}/request/json", payload)
        await until(lambda: b.shell.agent.duplicates == 1)
        assert command.id not in b.shell.executed
        await b.produce(10)
        await until(lambda: b.shell.agent.outbox_depth == 0)
        await until(lambda: b.old.seqs(b.device, "can") == RangeSet(range(1, 21)))


async def test_firmware_that_drops_on_the_new_side_leaves_gaps_there_and_none_on_the_old(
    backend: RunningBackend, tmp_path: Path
) -> None:
    async with bench(backend, tmp_path, "car-faulty") as b:
        await b.stop()
        b.start(Misbehaviour(drop_share=0.5))
        await b.move(1, BOTH)
        await b.produce(100)
        await until(lambda: b.shell.agent.outbox_depth == 0)
        await until(lambda: b.old.seqs(b.device, "can") == RangeSet(range(1, 101)))
        async with asyncio.timeout(15):
            while len(seqs := await b.new.seqs(b.device, "can")) <= 10:  # noqa: ASYNC110 - rows come later
                await asyncio.sleep(0.05)
        assert len(seqs) < 90


async def test_a_recorded_fleet_tells_the_truth_about_what_it_sent(tmp_path: Path) -> None:
    chosen = vehicles(8)
    keys = make_inventory(tmp_path / "inventory.jsonl", chosen)
    async with OldSide(tmp_path / "legacy", []) as old:
        await old.server.register([DeviceSeed(v.id, keys[v.id], v.attributes) for v in chosen])
        fleet = Fleet(specs_of(chosen, keys), old=old.address, state_dir=tmp_path / "state", speed=20)
        await fleet.start()
        await asyncio.sleep(1.0)
        fleet.pause_producing()
        assert await fleet.drain(10)
        status = fleet.status(final=True)
        await fleet.stop()
        assert status.produced > 300 and status.outbox == 0 and status.connected_old == 8
        assert 0 < status.longest_gap_s < 5
        assert status.truth is not None
        for name, truth in status.truth.items():
            for channel, told in truth.channels.items():
                await until(lambda n=name, c=channel, t=told: len(old.seqs(n, c)) == t.produced)  # type: ignore[misc]
                assert told.acked == [(1, told.produced)] and told.waiting == []


async def test_a_state_directory_belongs_to_one_process(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    first = Journal(tmp_path, schedule=loop.call_later)
    with pytest.raises(Conflict, match="stop the process that has it"):
        Journal(tmp_path, schedule=loop.call_later)
    first.close()


async def test_a_device_killed_mid_stream_loses_nothing_and_counts_on(tmp_path: Path) -> None:
    """kill -9, again and again, while it measures 200 times a second; then every seq is at the old side."""
    async with OldSide(tmp_path / "legacy", ["car-killed"]) as old:
        command = [
            sys.executable,
            "-m",
            "fleetlift.cli.main",
            "device",
            "run",
            "car-killed",
            "--old",
            old.server.url,
            "--state",
            str(tmp_path / "state"),
            "--every",
            "0.005",
        ]
        env = {**os.environ, "FLEETLIFT_DEVICE_KEY": _key("car-killed")}
        for _ in range(3):
            had = len(old.seqs("car-killed", "example"))
            process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
            await until(lambda n=had: len(old.seqs("car-killed", "example")) > n + 60)  # type: ignore[misc]
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait)
        last = subprocess.Popen([*command, "--count", "20"], env=env, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        assert await asyncio.to_thread(last.wait) == 0
        with sqlite3.connect(tmp_path / "state" / "device.db") as db:
            [(next_seq,)] = db.execute("SELECT next_seq FROM counter WHERE channel = 'example'").fetchall()
            assert db.execute("SELECT count(*) FROM outbox").fetchall() == [(0,)]
        await until(lambda: old.seqs("car-killed", "example") == RangeSet(range(1, next_seq)))
        assert next_seq > 200


async def test_a_device_spec_hides_its_key() -> None:
    assert "secret" not in repr(DeviceSpec("d", "secret"))
