"""One simulated device: the real agent, a disk, two links, and an application that obeys commands."""

import random
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from fleetlift.core.command import Path
from fleetlift.core.orders import Endpoint, Flags
from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.device.agent import Agent, AgentSettings
from fleetlift.simulate.clock import Clock
from fleetlift.simulate.disk import Disk
from fleetlift.simulate.history import History
from fleetlift.simulate.network import Link, Wire

NAMES = ("lock", "unlock", "honk")  # the commands that the application knows


class Firmware(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with this device's firmware, in its code for the new side. Nothing, by default."""

    drop_share: float = 0.0  # of telemetry by the new path: taken for sent, and never sent
    goes_back: bool = False  # its tries never succeed
    executes_in_dry_run: bool = False  # ... and answers that it has
    late_s: float = 0.0  # how much later it answers by the new path

    @property
    def good(self) -> bool:
        return self == Firmware()


class Eyes(Protocol):
    """Sees what a device does."""

    def executes(self, one: "Executed") -> None: ...

    def accepted(self, device: str, path: Path, flags: Flags) -> None: ...


class Executed(msgspec.Struct, frozen=True):
    """The actuator has moved. `by_agent` False: bad firmware did it behind the agent's back."""

    at: float
    device: str
    command: str
    path: Path
    by_agent: bool


class Sides(msgspec.Struct, frozen=True):
    """What devices of a world find at the other ends."""

    old: Any  # OldSide
    new: Any  # NewSide


def judge(name: str, params: bytes) -> str | None:
    return None if name in NAMES else f"{name!r} is not known"


class SimulatedDevice:
    """Alive or not; `boot` and `crash` are its power switch."""

    def __init__(
        self,
        id_: str,
        clock: Clock,
        history: History,
        sides: Sides,
        eyes: Eyes,
        *,
        settings: AgentSettings,
        firmware: Firmware,
        attributes: Mapping[str, Any],
        period_s: float,
        chance: random.Random,
    ) -> None:
        self.id = id_
        self.firmware = firmware
        self.attributes = dict(attributes)
        self.alive = False
        self.skew_s = 0.0  # of its clock
        self.disk = Disk(clock)
        self.acked: dict[Path, dict[str, RangeSet]] = {Path.OLD: {}, Path.NEW: {}}  # by what sides have said
        self.producing = True
        self.boots = 0
        self.period_s = period_s
        self._clock = clock
        self._history = history
        self._sides = sides
        self._eyes = eyes
        self._settings = settings
        self._chance = chance
        self.links = {
            Path.OLD: Link(clock, self, Path.OLD, sides.old, chance),
            Path.NEW: Link(clock, self, Path.NEW, sides.new, chance),
        }
        self._wires: dict[Path, Wire | None] = {Path.OLD: None, Path.NEW: None}
        self._timer = 0
        self._token = self._stored = 0
        self._after: list[tuple[int, Callable[[], None]]] = []
        self._n = 0
        self.agent = self._new_agent()
        self._acts: dict[type[Any], Callable[[Any], None]] = {
            m.SendTelemetry: self._send,
            m.Persist: self._persist,
            m.SetTimer: self._set_timer,
            m.AnswerCommand: self._answer,
            m.Execute: self._execute,
            m.Report: self._report,
            m.ConnectOld: self._connect_old,
            m.ConnectNew: self._connect_new,
            m.Close: self._close,
            m.SubscribeNew: self._subscribe,
            m.SendTryTelemetry: self._try_telemetry,
            m.ShadowGet: self._shadow_get,
        }

    def _new_agent(self) -> Agent:
        return Agent(judge=judge, chance=self._chance.random, settings=self._settings)

    # -- power -------------------------------------------------------------------------------------------

    def boot(self) -> None:
        self.alive = True
        self.boots += 1
        self.agent = self._new_agent()
        self._token = self._stored = 0
        self._after = []
        self._history.note(self.id, "boot", self.disk.record.epoch, self.disk.record.phase.value)
        self.feed(m.Started(self.disk.load()))
        self._clock.after(self.period_s * self._chance.random(), self._produce, self.boots)

    def crash(self, *, power: bool) -> None:
        """The process is gone, or the power: what was not on disk is lost, what was under way is not."""
        if not self.alive:
            return
        self.alive = False
        self._history.note(self.id, "crash", "power" if power else "process")
        self.disk.power_off()
        for path, wire in self._wires.items():
            if wire is not None and wire.device_has:
                wire.died_with_device(power=power)
            self._wires[path] = None

    def set_clock(self, skew_s: float) -> None:
        self._history.note(self.id, "clock", round(skew_s, 3))
        self.skew_s = skew_s

    # -- the agent and its actions -----------------------------------------------------------------------

    def feed(self, event: m.Event) -> None:
        acts = self._acts
        before = self.agent.record
        actions = self.agent.on(event, self._clock.now + self.skew_s)
        if self.agent.record is not before and self.agent.record.phase is not before.phase:
            r = self.agent.record
            self._history.note(self.id, "phase", r.phase.value, r.epoch, r.reason)
        for action in actions:
            acts[type(action)](action)

    def arrived(self, wire: Wire, event: m.Event) -> None:
        path = wire.link.path
        if self._wires[path] is not wire:
            return
        kind = type(event)
        if kind is m.TelemetryAcked:
            acked = self.acked[path]
            for channel, seq in event.keys:  # type: ignore[union-attr]
                if (held := acked.get(channel)) is None:
                    held = acked[channel] = RangeSet()
                held.add(seq)
        elif kind is m.Lost or kind is m.Refused:
            self._wires[path] = None
        elif kind is m.CommandReceived and path is Path.NEW:
            self._command_by_new(wire, event)  # type: ignore[arg-type]
            return
        elif kind is m.ShadowAnswered and self.firmware.goes_back:
            return
        self.feed(event)

    def _command_by_new(self, wire: Wire, event: m.CommandReceived) -> None:
        dry = event.dry_run or self.agent.flags.commands.value == "dry-run"
        if self.firmware.executes_in_dry_run and dry and event.name in NAMES:
            self._move_actuator(event.id, Path.NEW, by_agent=False)
            wire.up(self._sides.new.answered, event.id, m.AnswerStatus.SUCCEEDED, b"{}")
        else:
            self.feed(event)
        # Acknowledged only once what it asked for is on disk: else it must come again.
        self._after_stored(lambda: wire.up(self._sides.new.command_taken, event.id))

    def _after_stored(self, call: Callable[[], None]) -> None:
        if self._token <= self._stored:
            call()
        else:
            self._after.append((self._token, call))

    def _persist(self, action: m.Persist) -> None:
        if action.wait:
            self._token = action.token
        self.disk.write(action.changes, action.token if action.wait else None, self._on_stored)
        for change in action.changes:
            if type(change) is m.RecordChanged:
                record = change.record
                self._history.note(self.id, "applies", record.epoch, record.phase.value, _short(record))
            elif type(change) is m.CommandKept and change.command.status is None:
                self._eyes.accepted(self.id, change.command.path, self.agent.flags)

    def _on_stored(self, token: int) -> None:
        self._stored = token
        self.feed(m.Stored(token))
        while self._after and self._after[0][0] <= token:
            self._after.pop(0)[1]()

    def _set_timer(self, action: m.SetTimer) -> None:
        self._timer += 1
        # Never at once: real time passes between setting a timer and its call.
        delay_s = max(0.001, action.at - self._clock.now - self.skew_s)
        self._clock.after(delay_s, self._tick, self._timer)

    def _tick(self, timer: int) -> None:
        if timer == self._timer and self.alive:
            self.feed(m.Timer())

    # -- links -------------------------------------------------------------------------------------------

    def _connect_old(self, action: m.ConnectOld) -> None:
        self._wires[Path.OLD] = self.links[Path.OLD].connect("")

    def _connect_new(self, action: m.ConnectNew) -> None:
        self._wires[Path.NEW] = self.links[Path.NEW].connect(action.credential)

    def _close(self, action: m.Close) -> None:
        if (wire := self._wires[action.path]) is not None:
            self._wires[action.path] = None
            wire.closed_by_device()

    def _subscribe(self, action: m.SubscribeNew) -> None:
        if (wire := self._wires[Path.NEW]) is not None:
            wire.up(self._sides.new.subscribe)

    def _send(self, action: m.SendTelemetry) -> None:
        wire = self._wires[action.path]
        if wire is None:
            return
        if action.path is Path.OLD:
            wire.up(self._sides.old.telemetry, action)
        elif self.firmware.drop_share and self._chance.random() < self.firmware.drop_share:
            # Not by the links: no side has said so, only this firmware believes it.
            key = ((action.channel, action.seq),)
            self._clock.after(0.0, self._believe, wire, m.TelemetryAcked(Path.NEW, key))
        else:
            wire.up(self._sides.new.telemetry, action)

    def _believe(self, wire: Wire, event: m.TelemetryAcked) -> None:
        if self._wires[Path.NEW] is wire:
            self.feed(event)

    def _try_telemetry(self, action: m.SendTryTelemetry) -> None:
        if (wire := self._wires[Path.NEW]) is not None:
            wire.up(self._sides.new.try_telemetry, action)

    def _shadow_get(self, action: m.ShadowGet) -> None:
        if (wire := self._wires[Path.NEW]) is not None:
            wire.up(self._sides.new.shadow_get)

    def _report(self, action: m.Report) -> None:
        if (wire := self._wires[action.path]) is not None:
            side = self._sides.old if action.path is Path.OLD else self._sides.new
            wire.up(side.report, action.report)

    def _answer(self, action: m.AnswerCommand) -> None:
        wire = self._wires[action.path]
        if wire is None:
            return
        side = self._sides.old if action.path is Path.OLD else self._sides.new
        args = (side.answered, action.id, action.status, action.detail)
        if self.firmware.late_s and action.path is Path.NEW:
            self._clock.after(self.firmware.late_s, wire.up, *args)
        else:
            wire.up(*args)

    # -- the application ---------------------------------------------------------------------------------

    def _produce(self, boot: int) -> None:
        if boot != self.boots or not self.alive:
            return
        if self.producing:
            self._n += 1
            self.feed(m.TelemetryProduced("position", b'{"n":%d}' % self._n))
        self._clock.after(self.period_s, self._produce, boot)

    def _execute(self, action: m.Execute) -> None:
        self._move_actuator(action.id, self.disk.commands[action.id].path, by_agent=True)
        self._clock.after(0.05 + 3.0 * self._chance.random() ** 2, self._finished, self.boots, action.id)

    def _move_actuator(self, command: str, path: Path, *, by_agent: bool) -> None:
        self._history.note(self.id, "executes", command, path.value, by_agent)
        self._eyes.executes(Executed(self._clock.now, self.id, command, path, by_agent))

    def _finished(self, boot: int, command: str) -> None:
        if boot == self.boots and self.alive:
            self.feed(m.CommandFinished(command, True, b"{}"))


def _short(record: m.Record) -> str:
    f = record.flags
    return f"{f.telemetry.value}/{f.commands.value}/{f.link.value}"


ENDPOINT = Endpoint(host="new.example.com", port=8883, tls=True)
