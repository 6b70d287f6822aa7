"""The fleet of a soak, in a process of its own: `python -m fleetlift.load.fleet ORDERS.json`.

Device agents on their disks, measuring at a steady rate. What they did is told to files that survive the
process: each execution of a command before it begins, and every second what the devices hold true.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from fleetlift import log
from fleetlift.device.agent import AgentSettings
from fleetlift.device.fleet import DeviceSpec, Fleet, write_whole
from fleetlift.device.shell import Application, DeviceShell

CHANNEL = "position"
READY = "fleet running"
STATUS_EVERY_S = 0.5


class Device(msgspec.Struct, frozen=True):
    """A line of the fleet."""

    id: str
    key: str

    def __repr__(self) -> str:
        return f"Device(id={self.id!r}, key='***')"


class FleetOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    old: tuple[str, int]
    devices: list[Device]
    messages_per_s: float  # of each device
    drain_s: float  # at SIGTERM: how long outboxes may take to empty
    settings: AgentSettings
    state: str
    status: str
    executed: str


class _Logged:
    """An application whose every execution is on disk, as `DEVICE COMMAND`, before it begins."""

    def __init__(self, inner: Application, device: str, file: int) -> None:
        self._inner, self._device, self._file = inner, device, file

    def judge(self, name: str, params: bytes) -> str | None:
        return self._inner.judge(name, params)

    async def execute(self, id_: str, name: str, params: bytes) -> tuple[bool, bytes]:
        os.write(self._file, f"{self._device} {id_}\n".encode())
        return await self._inner.execute(id_, name, params)


class _LoggedFleet(Fleet):
    def log_to(self, file: int) -> None:
        self._file = file

    def _shell(self, spec: DeviceSpec, number: int) -> DeviceShell:
        shell = super()._shell(spec, number)
        shell.application = _Logged(shell.application, spec.id, self._file)
        return shell


async def run(orders: FleetOrders) -> None:
    """Drive until SIGTERM; then drain, tell the truth a last time and end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    fleet = _LoggedFleet(
        [DeviceSpec(device.id, device.key) for device in orders.devices],
        old=orders.old,
        state_dir=Path(orders.state),
        settings=orders.settings,
    )
    fleet.log_to(os.open(orders.executed, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600))
    await fleet.start()

    def tell(*, final: bool = False) -> None:
        now = msgspec.structs.replace(fleet.status(final=True), final=final)
        write_whole(Path(orders.status), msgspec.json.encode(now))

    tell()
    print(READY, flush=True)  # noqa: T201 - what the parent waits for
    driving = asyncio.create_task(_drive(fleet, 1.0 / orders.messages_per_s))
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_EVERY_S):
                await stop.wait()
        tell()
    driving.cancel()
    fleet.pause_producing()
    await fleet.drain(orders.drain_s)
    tell(final=True)
    await fleet.stop()


async def _drive(fleet: Fleet, every_s: float) -> None:
    """A measurement of every device at a time."""
    number = 0
    while True:
        number += 1
        for shell in fleet.shells.values():
            shell.produce(CHANNEL, b'{"lat":47.1,"lon":8.5,"n":%d}' % number)
        await asyncio.sleep(every_s)


def main() -> None:
    import uvloop

    log.configure(level="warning")
    uvloop.run(run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=FleetOrders)))


if __name__ == "__main__":
    main()
