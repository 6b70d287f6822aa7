"""Many devices in one process: recorded vehicles, each with its agent, on one loop, one disk, one timer."""

import asyncio
import heapq
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings
from fleetlift.device.journal import Journal
from fleetlift.device.recorded import Vehicle, played
from fleetlift.device.shell import DeviceShell, Misbehaviour
from fleetlift.device.vehicle import VehicleApplication

TICK_S = 0.002  # messages due within the same tick are produced together
CONNECT_SPREAD_S = 0.002  # between the starts of two devices, so that their sign-ins do not come as a storm


class InventoryEntry(msgspec.Struct, frozen=True):
    """A line of an inventory file, as `fleetlift legacy serve --devices` takes it."""

    device: str
    key: str
    attributes: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"InventoryEntry(device={self.device!r}, key='***')"


class DeviceSpec(msgspec.Struct, frozen=True):
    """One device of a fleet. `vehicle` None: it measures nothing of its own."""

    id: str
    key: str
    attributes: dict[str, Any] = {}
    vehicle: Vehicle | None = None
    misbehaviour: Misbehaviour | None = None

    def __repr__(self) -> str:
        return f"DeviceSpec(id={self.id!r}, key='***')"


class ChannelTruth(msgspec.Struct, frozen=True):
    """What a device holds true of one channel. Ranges are [first, last], both included."""

    produced: int  # the highest seq given; numbering begins at 1
    acked: list[tuple[int, int]]  # acknowledged to the device by some side, and so to be found there
    waiting: list[tuple[int, int]]  # in the outbox still


class DeviceTruth(msgspec.Struct, frozen=True):
    channels: dict[str, ChannelTruth]
    executed: dict[str, int]  # how often each command was executed, by id
    refused: int  # telemetry that found the outbox full
    longest_gap_s: float
    longest_gap_at: float | None


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device now. `gap_s`: for how long telemetry has been waiting without any acknowledgement."""

    phase: str
    epoch: int
    telemetry: str
    commands: str
    link: str
    old: str
    new: str
    outbox: int
    acked_old: int
    acked_new: int
    executed: int
    gap_s: float
    longest_gap_s: float
    reason: str
    attributes: dict[str, Any]


class FleetStatus(msgspec.Struct, frozen=True):
    """The fleet now. Counters count from the start of this process; times are Unix seconds.

    `produced` is what was numbered and stored by the devices; `acked_old` and `acked_new` count a message
    once a path. `executed` counts commands, `executed_twice` those of them that were executed again.
    """

    at: float
    started_at: float
    devices: int
    produced: int
    acked_old: int
    acked_new: int
    outbox: int
    refused: int
    connected_old: int
    connected_new: int
    executed: int
    executed_twice: int
    duplicates: int
    longest_gap_s: float
    longest_gap_device: str
    phases: dict[str, int]
    by_device: dict[str, DeviceStatus]
    final: bool = False
    truth: dict[str, DeviceTruth] | None = None  # only in the last status


def specs_of(
    vehicles: Iterable[Vehicle],
    keys: dict[str, str],
    *,
    faulty_revision: int | None = None,
    misbehaviour: Misbehaviour | None = None,
) -> list[DeviceSpec]:
    """The fleet of `vehicles`; the faulty hardware revision misbehaves. Raises BadInput without a key."""
    specs = []
    for vehicle in vehicles:
        if (key := keys.get(vehicle.id)) is None:
            raise BadInput(
                f"{vehicle.id} has no key in the inventory file; remove the file to have it made anew"
            )
        faulty = faulty_revision is not None and vehicle.attributes["hardware"] == faulty_revision
        specs.append(
            DeviceSpec(vehicle.id, key, vehicle.attributes, vehicle, misbehaviour if faulty else None)
        )
    return specs


def read_inventory(path: Path) -> dict[str, InventoryEntry]:
    """The devices of an inventory file (JSON lines). Raises BadInput that names the line."""
    entries: dict[str, InventoryEntry] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.strip():
            try:
                entry = msgspec.json.decode(line, type=InventoryEntry)
            except msgspec.DecodeError as exc:
                raise BadInput(f"{path}:{number}: {exc}; expected {{device, key, attributes}}") from exc
            entries[entry.device] = entry
    return entries


def make_inventory(path: Path, vehicles: Iterable[Vehicle]) -> dict[str, str]:
    """The keys of `vehicles` by id, from the inventory file at `path`; missing ones are made and added.

    The file holds secrets: it is made with mode 0600, and replaced as a whole.
    """
    entries = read_inventory(path) if path.exists() else {}
    before = dict(entries)
    for vehicle in vehicles:
        held = entries.get(vehicle.id)
        key = held.key if held is not None else secrets.token_urlsafe(24)
        entries[vehicle.id] = InventoryEntry(vehicle.id, key, vehicle.attributes)
    if entries != before:
        write_whole(path, b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries.values()))
    return {entry.device: entry.key for entry in entries.values()}


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file so that a reader sees the old one or the new one, never half of it. Mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    draft.replace(path)


class Fleet:
    """`await start()`, look at `status()`, `await stop()`.

    `speed` is how much faster than recorded the vehicles send. Raises Conflict when another process has
    the state directory.
    """

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        *,
        old: tuple[str, int],
        state_dir: Path,
        speed: float = 1.0,
        settings: AgentSettings | None = None,
        durable: bool = False,
    ) -> None:
        if speed <= 0:
            raise BadInput(f"speed {speed:g}: use a number above 0")
        self.specs = tuple(specs)
        self.shells: dict[str, DeviceShell] = {}
        self.started_at = 0.0
        self._old, self._speed, self._state_dir, self._durable = old, speed, state_dir, durable
        self._settings = settings or AgentSettings()
        self._journal: Journal | None = None
        self._due: list[tuple[float, int]] = []
        self._begin: list[float] = []  # when each of `_parts` began to play
        self._parts: list[tuple[DeviceShell, str, Iterator[tuple[float, bytes]], bytes]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._first_seq: dict[str, dict[str, int]] = {}

    async def start(self) -> None:
        """Start every agent, a few milliseconds apart, and the measurements of each with it."""
        loop = asyncio.get_running_loop()
        self._journal = Journal(self._state_dir, schedule=loop.call_later, durable=self._durable)
        self.started_at = time.time()
        for number, spec in enumerate(self.specs):
            shell = self._shell(spec, number)
            self.shells[spec.id] = shell
            shell.start()
            self._first_seq[spec.id] = dict(shell.agent.next_seq)
            if spec.vehicle is not None:
                trip = played(spec.vehicle.trip)
                _, body = next(trip)
                heapq.heappush(self._due, (loop.time(), len(self._parts)))
                self._parts.append((shell, spec.vehicle.trip.channel, trip, body))
                self._begin.append(loop.time())
            await asyncio.sleep(CONNECT_SPREAD_S)
        self._play()

    def _shell(self, spec: DeviceSpec, number: int) -> DeviceShell:
        assert self._journal is not None
        updatable = bool(spec.attributes.get("updatable", True))
        application = VehicleApplication()
        shell = DeviceShell(
            spec.id,
            spec.key,
            old=self._old,
            journal=self._journal,
            application=application,
            settings=msgspec.structs.replace(self._settings, updatable=updatable),
            firmware=str(spec.attributes.get("firmware", "")),
            misbehaviour=spec.misbehaviour,
            seed=number,
        )
        application.on_health_s = shell.agent.set_health_every
        return shell

    # --- playing ---

    def _play(self) -> None:
        """Produce all that is due; one timer serves the whole fleet."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        due = self._due
        while due and due[0][0] <= now + TICK_S / 2:
            _, index = due[0]
            shell, channel, trip, body = self._parts[index]
            shell.produce(channel, body)
            at_s, body = next(trip)
            self._parts[index] = (shell, channel, trip, body)
            heapq.heapreplace(due, (self._begin[index] + at_s / self._speed, index))
        if due and not self._stopping:
            self._timer = loop.call_later(max(TICK_S, due[0][0] - loop.time()), self._play)

    def pause_producing(self) -> None:
        """No further measurements; what waits goes on being sent."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()

    async def drain(self, within_s: float) -> bool:
        """Wait until every outbox is empty; False when it takes longer than `within_s`."""
        end = asyncio.get_running_loop().time() + within_s
        while any(shell.agent.outbox_depth for shell in self.shells.values()):
            if asyncio.get_running_loop().time() >= end:
                return False
            await asyncio.sleep(0.05)
        return True

    async def stop(self, *, abruptly: bool = False) -> None:
        """Close every link and the disk. What is in outboxes stays there for the next start."""
        self.pause_producing()
        await asyncio.gather(*(shell.stop(abruptly=abruptly) for shell in self.shells.values()))
        await asyncio.sleep(0)
        if self._journal is not None:
            self._journal.close()

    # --- looking ---

    def status(self, *, final: bool = False, by_device: bool = True) -> FleetStatus:
        """Figures of now. `final` adds the truth, for the verdict of a migration."""
        now = time.time()
        shells = self.shells
        devices = {
            spec.id: _device_status(shells[spec.id], spec.attributes, now)
            for spec in self.specs
            if spec.id in shells
        }
        gaps = {name: max(d.longest_gap_s, d.gap_s) for name, d in devices.items()}
        worst = max(gaps, key=gaps.__getitem__, default="")
        phases: dict[str, int] = {}
        for d in devices.values():
            phases[d.phase] = phases.get(d.phase, 0) + 1
        return FleetStatus(
            at=now,
            started_at=self.started_at,
            devices=len(devices),
            produced=sum(self._produced(name) for name in shells),
            acked_old=sum(d.acked_old for d in devices.values()),
            acked_new=sum(d.acked_new for d in devices.values()),
            outbox=sum(d.outbox for d in devices.values()),
            refused=sum(shell.agent.refused for shell in shells.values()),
            connected_old=sum(d.old == m.LinkState.UP for d in devices.values()),
            connected_new=sum(d.new == m.LinkState.UP for d in devices.values()),
            executed=sum(d.executed for d in devices.values()),
            executed_twice=sum(n > 1 for shell in shells.values() for n in shell.executed.values()),
            duplicates=sum(shell.agent.duplicates for shell in shells.values()),
            longest_gap_s=gaps.get(worst, 0.0),
            longest_gap_device=worst,
            phases=phases,
            by_device=devices if by_device else {},
            final=final,
            truth=self.truth() if final else None,
        )

    def _produced(self, device: str) -> int:
        first = self._first_seq.get(device, {})
        counters = self.shells[device].agent.next_seq
        return sum(after - first.get(channel, 1) for channel, after in counters.items())

    def truth(self) -> dict[str, DeviceTruth]:
        """What each device holds true. A message leaves a device only once acknowledged, so all that was
        numbered, in this life or an earlier one, and does not wait any more has been acknowledged."""
        now = time.time()
        found = {}
        for name, shell in self.shells.items():
            waiting: dict[str, RangeSet] = {}
            for channel, seq in shell.agent.outbox_keys():
                waiting.setdefault(channel, RangeSet()).add(seq)
            channels = {}
            for channel, next_seq in shell.agent.next_seq.items():
                held = waiting.get(channel, RangeSet())
                numbered = RangeSet()
                numbered.add_range(1, next_seq)
                # One path may have acknowledged what waits for the other.
                acked = numbered.minus(held).union(shell.acked.get(channel, RangeSet()))
                channels[channel] = ChannelTruth(next_seq - 1, _closed(acked), _closed(held))
            gap_s = shell.gap_s(now)
            longer = gap_s > shell.longest_gap_s
            found[name] = DeviceTruth(
                channels,
                dict(shell.executed),
                shell.agent.refused,
                gap_s if longer else shell.longest_gap_s,
                now if longer else shell.longest_gap_at,
            )
        return found


def _closed(numbers: RangeSet) -> list[tuple[int, int]]:
    return [(start, end - 1) for start, end in numbers.ranges()]


def _device_status(shell: DeviceShell, attributes: dict[str, Any], now: float) -> DeviceStatus:
    agent = shell.agent
    flags = agent.flags
    return DeviceStatus(
        phase=agent.phase.value,
        epoch=agent.record.epoch,
        telemetry=flags.telemetry.value,
        commands=flags.commands.value,
        link=flags.link.value,
        old=agent.link(m.Path.OLD).value,
        new=agent.link(m.Path.NEW).value,
        outbox=agent.outbox_depth,
        acked_old=agent.acked[m.Path.OLD],
        acked_new=agent.acked[m.Path.NEW],
        executed=len(shell.executed),
        gap_s=round(shell.gap_s(now), 3),
        longest_gap_s=round(shell.longest_gap_s, 3),
        reason=agent.record.reason,
        attributes=attributes,
    )
