"""Devices in bad condition, moved through a small ladder over live connections to real sides.

One has a full flash, two have clocks that are an hour off, one's disk is cloned into a twin that connects by
the same id, and one is installed anew after it has moved.
"""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from small_world import QUICK, World, small_world

from fleetlift.core.command import FINAL
from fleetlift.core.orders import CommandsFlag, DevicePhase, Flags, TelemetryFlag
from fleetlift.device.journal import Journal
from fleetlift.device.shell import DeviceShell
from fleetlift.device.vehicle import VehicleApplication
from fleetlift.testing import scratch_directory

FULL, AHEAD, BEHIND, CLONED, ANEW = (f"car-{n}" for n in range(5))
HOUR_S = 3600.0
TRY_S = 8.0
MOVED = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW)
STEPS = """
steps:
  - move: telemetry
    stages: [both, new]
    waves: [100%]
    bake: 500ms
    gates: [telemetry.completeness >= 95%, devices.silent == 0]
  - move: commands
    stages: [new]
    waves: [100%]
    bake: 30s
    gates: [devices.silent == 0, connections.flapping <= 1]
"""


class Device(DeviceShell):
    """An agent on a disk of its own that remembers the body of each message it has numbered."""

    def __init__(self, world: World, device: str, directory: Path, *, off_s: float = 0.0) -> None:
        self.journal = Journal(directory, schedule=asyncio.get_running_loop().call_later)
        self.bodies: dict[tuple[str, int], bytes] = {}
        super().__init__(
            device,
            next(spec.key for spec in world.fleet.specs if spec.id == device),
            old=world.legacy.address,
            journal=self.journal,
            application=VehicleApplication(),
            settings=QUICK,
            now=lambda: time.time() + off_s,
        )

    def produce(self, channel: str, body: bytes) -> None:
        seq = self.agent.next_seq.get(channel, 1)
        super().produce(channel, body)
        if self.agent.next_seq.get(channel, 1) > seq:
            self.bodies[channel, seq] = body

    async def switch_off(self) -> None:
        await self.stop(abruptly=True)
        self.journal.close()

    def acked_bodies(self) -> dict[str, str]:
        """Of this life: what some side has acknowledged; with its channel and number."""
        return {
            _canonical(body): f"{channel} {seq}"
            for (channel, seq), body in self.bodies.items()
            if seq in self.acked.get(channel, ())
        }


def _canonical(body: bytes | str) -> str:
    """A body without the stamp that it gets for the new side."""
    fields = json.loads(body)
    return json.dumps({key: fields[key] for key in sorted(fields.keys() - {"ts", "seq"})})


class Odd:
    """The world with devices of ours in the place of the fleet's."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self._directory = world, directory
        self.devices: list[Device] = []  # every life of each

    async def put(self, device: str, *, disk: str = "", off_s: float = 0.0, twin: bool = False) -> Device:
        """Start a device, which takes the place of the one with its id unless it is its twin."""
        one = Device(self.world, device, self._directory / (disk or device), off_s=off_s)
        self.devices.append(one)
        if not twin:
            before = self.world.fleet.shells[device]
            self.world.fleet.shells[device] = one
            if not isinstance(before, Device):
                await before.stop()
        one.start()
        return one

    def clone(self, device: str) -> str:
        """The disk of a device that is switched off, once more."""
        shutil.copytree(self._directory / device, self._directory / f"{device}-twin")
        return f"{device}-twin"

    async def close(self) -> None:
        for device in self.devices:
            with contextlib.suppress(Exception):
                await device.switch_off()


@contextlib.asynccontextmanager
async def odd_world() -> AsyncIterator[Odd]:
    with scratch_directory() as directory:
        async with small_world(Path(directory), devices=5) as world:
            plan = world.plan.partition("steps:")[0].replace("new_lost_limit: 2s", "new_lost_limit: 20s")
            world.plan = plan + STEPS
            odd = Odd(world, Path(directory) / "odd")
            try:
                yield odd
            finally:
                await odd.close()


def fill(device: Device) -> None:
    """Its disk may not grow from now on, and it has more to store than there is room for."""
    [pages] = device.journal._db.execute("PRAGMA page_count").fetchone()
    device.journal._db.execute(f"PRAGMA max_page_count = {pages}")
    for n in range(100):
        device.produce("can", b'{"frame":%d,"pad":"%s"}' % (n, b"x" * 3000))


def free(device: Device) -> None:
    device.journal._db.execute("PRAGMA max_page_count = 1000000")


async def until(what: Any, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def chatter(twin: Device) -> None:
    """On a channel of its own: twins count on from the same number, and the same number of one millisecond
    is one message."""
    n = 0
    while True:
        n += 1
        twin.produce("door", b'{"twin":%d}' % n)
        await asyncio.sleep(0.1)


async def flapping(world: World, within_s: float) -> None:
    """The migration's own figure names the one that comes and goes."""
    said: Any = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while True:
                for gate in (await world.status())["gates"]:
                    if gate["gate"].startswith("connections.flapping"):
                        said = gate
                        if gate["value"] == 1 and CLONED in msgspec.json.encode(gate).decode():
                            return
                await asyncio.sleep(0.1)
    raise AssertionError(said)


@pytest.mark.timeout(150)
async def test_a_full_flash_wrong_clocks_a_twin_and_a_reinstallation() -> None:
    async with odd_world() as odd:
        world = odd.world
        full = await odd.put(FULL)
        await odd.put(AHEAD, off_s=HOUR_S)
        await odd.put(BEHIND, off_s=-HOUR_S)
        cloned, anew = await odd.put(CLONED), await odd.put(ANEW)
        await until(lambda: all(one.acked for one in odd.devices), 10)

        fill(full)
        await world.start()
        await until(lambda: full.agent.phase is DevicePhase.MOVED, 20)
        assert full.journal._failing, "it was told, tried and moved with a disk that takes nothing more"
        free(full)
        await until(lambda: any(channel == "can" for channel in full.acked), 10)

        baking = await world.until(
            lambda s: (s["rung"], s["wave_phase"]) == (3, "baking") or s["phase"] != "running", within_s=60
        )
        assert baking["phase"] == "running", baking["reason"]
        assert all(one.agent.flags == MOVED for one in odd.devices)

        # A wiped disk, and a flash image that was used for two devices.
        await anew.switch_off()
        again = await odd.put(ANEW, disk="installed-anew")
        await cloned.switch_off()
        disk = odd.clone(CLONED)
        await odd.put(CLONED)
        twin = await odd.put(CLONED, disk=disk, twin=True)
        talking = asyncio.create_task(chatter(twin))
        try:
            await until(lambda: again.agent.flags == MOVED, TRY_S + 4)
            assert "devices_try_again" in {event["kind"] for event in await world.events()}
            await flapping(world, 10)
            await until(lambda: twin.acked, 10)
        finally:
            talking.cancel()
        await twin.stop()

        done = await world.until(lambda s: s["phase"] in ("finished", "held"), within_s=80)
        assert (done["phase"], done["reverts"], done["stragglers_total"]) == ("finished", 0, 0), done[
            "reason"
        ]
        await _all_is_accounted_for(odd)


async def _all_is_accounted_for(odd: Odd) -> None:
    """What any life of any device had acknowledged is stored; no agent has executed a command twice; every
    command has ended, and none has expired by a wrong clock."""
    connection = await asyncpg.connect(odd.world.backend.settings.database_url)
    try:
        async with asyncio.timeout(20):
            while True:
                acked = [(one.device, one.acked_bodies()) for one in odd.devices]
                stored: dict[str, set[str]] = {}
                for row in await connection.fetch("SELECT device, body::text AS body FROM telemetry"):
                    stored.setdefault(row["device"], set()).add(_canonical(row["body"]))
                lost = [
                    (device, [f"{bodies[body]}: {body[:40]}" for body in sorted(missing)[:5]])
                    for device, bodies in acked
                    if (missing := bodies.keys() - stored.get(device, set()))
                ]
                open_ = await connection.fetch(
                    "SELECT id::text, status FROM command WHERE NOT status = ANY($1::text[])"
                    " AND created_at < now() - interval '13 seconds'",
                    [status.value for status in FINAL],
                )
                if not lost and not open_:
                    break
                await asyncio.sleep(0.2)
        # What the old side still held when its device moved may have come too late: that is `failed`.
        expired = await connection.fetch(
            "SELECT device, status FROM command WHERE device = ANY($1::text[])"
            " AND NOT name LIKE 'fleetlift.%' AND created_at < now() - interval '2 seconds'"
            " AND status NOT IN ('succeeded', 'failed')",
            [AHEAD, BEHIND],
        )
        assert not expired, [dict(row) for row in expired]
    except TimeoutError:
        raise AssertionError(f"lost: {lost}, open: {[dict(row) for row in open_]}") from None
    finally:
        await connection.close()
    for one in odd.devices:
        assert all(n == 1 for n in one.executed.values()), one.device
