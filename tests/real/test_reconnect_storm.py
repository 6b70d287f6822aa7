"""Two thousand devices at once: the new side's edge restarts, and everybody comes back."""

import asyncio
import contextlib
import os
import secrets
import signal
import time
from pathlib import Path

import asyncpg
import psutil
import pytest

from fleetlift.backend import registry
from fleetlift.core.orders import CommandsFlag, DevicePhase, Endpoint, Flags, LinkFlag, Orders, TelemetryFlag
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings
from fleetlift.device.fleet import DeviceSpec, Fleet
from fleetlift.device.journal import Journal
from fleetlift.testing import RunningBackend, free_port, running_backend, scratch_directory

DEVICES = 2000
# As documented for firmware: doubling up to ten seconds, spread over half to the whole of it.
SETTINGS = AgentSettings(health_every_s=60.0)
ALL_NEW = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
BACK_WITHIN_S = 150.0  # a busy machine takes its time; who is locked out is never served


async def registered(backend: RunningBackend) -> dict[str, str]:
    """Devices with credentials as a migration draws them."""
    drawn = {f"car-{n}": secrets.token_urlsafe(32) for n in range(DEVICES)}
    connection = await asyncpg.connect(backend.settings.database_url)
    try:
        await registry.put_devices(
            connection,
            [
                registry.NewDevice(
                    id=device,
                    tenant="carshare",
                    credentials=(registry.Credential(kind="password", value=secret),),
                )
                for device, secret in drawn.items()
            ],
            generated=True,
            make_tenants=True,
        )
    finally:
        await connection.close()
    return drawn


def moved(state: Path, backend: RunningBackend, drawn: dict[str, str]) -> None:
    """Each device's disk says that it has moved wholly to this backend."""
    journal = Journal(state, schedule=lambda delay_s, call: None)
    host, port = backend.mqtt
    for device, secret in drawn.items():
        orders = Orders(
            epoch=1,
            migration="m",
            flags=ALL_NEW,
            new=Endpoint(host=host, port=port),
            credential=secret,
            new_lost_limit_s=600.0,
        )
        record = m.Record(epoch=1, phase=DevicePhase.MOVED, flags=ALL_NEW, orders=orders)
        journal.write(device, [m.RecordChanged(record)])
    journal.close()


async def all_served(fleet: Fleet, within_s: float) -> None:
    """Wait until every device has its link up and its telemetry through."""
    started = time.monotonic()
    while any(
        shell.agent.link(m.Path.NEW) is not m.LinkState.UP or shell.agent.outbox_depth
        for shell in fleet.shells.values()
    ):
        assert time.monotonic() - started < within_s, fleet.status(by_device=False)
        await asyncio.sleep(0.1)


def end_at_once(backend: RunningBackend) -> None:
    """NATS Server takes some 20 ms a session to stop JetStream, and nothing of it is needed again."""
    processes = psutil.Process(backend.pid).children(recursive=True)
    os.kill(backend.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.timeout(400)
async def test_two_thousand_devices_come_back_at_once_and_nobody_is_locked_out() -> None:
    """The edge is killed and started again under them: all are let in within a bound, and what they measured
    meanwhile arrives."""
    with scratch_directory() as directory:
        async with running_backend(directory / "backend") as backend:
            drawn = await registered(backend)
            moved(directory / "devices", backend, drawn)
            fleet = Fleet(
                [DeviceSpec(device, "not-a-real-key-of-it") for device in drawn],
                old=("127.0.0.1", free_port()),
                state_dir=directory / "devices",
                settings=SETTINGS,
            )
            await fleet.start()
            try:
                await all_served(fleet, BACK_WITHIN_S)
                acked = fleet.status(by_device=False).acked_new
                nats = next(
                    child
                    for child in psutil.Process(backend.pid).children(recursive=True)
                    if "nats-server" in child.name()
                )
                os.kill(nats.pid, signal.SIGKILL)
                await asyncio.sleep(1.0)
                for shell in fleet.shells.values():
                    shell.produce("position", b'{"lat":47.1}')
                await all_served(fleet, BACK_WITHIN_S)
                status = fleet.status(by_device=False)
                assert status.acked_new >= acked + DEVICES
                assert status.phases == {"moved": DEVICES}
            finally:
                await fleet.stop(abruptly=True)
                end_at_once(backend)
