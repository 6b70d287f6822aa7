"""The simulated new side: where devices connect, the durable log, and the workers that read it.

Acknowledged is what is in the log. Workers take batches from it; what a batch comes to and the position
behind it are committed as one, so that a worker killed in between reads the batch again.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fleetlift.core.command import Command, Path, read_response
from fleetlift.core.errors import Unavailable
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.ranges import RangeSet
from fleetlift.core.shadow import Document, Operation
from fleetlift.device import messages as m
from fleetlift.device.links import read_orders, response, with_stamp
from fleetlift.simulate.clock import Clock
from fleetlift.simulate.database import Database, LogMessage
from fleetlift.simulate.history import History
from fleetlift.simulate.network import Wire
from fleetlift.store.commands import Answer

SWEEP_S = 1.0
LINGER_S = 0.2  # how long a worker lets a batch grow
COMMIT_S = 0.06  # and how long its transaction takes
BATCH_MAX = 4000


class NewSide:
    """`up`: devices can connect; `hanging`: they connect and nothing is said; `worker_up`, `database.up`."""

    def __init__(self, clock: Clock, history: History, database: Database, chance: random.Random) -> None:
        self.up = True
        self.hanging = False
        self.database = database
        self.log: list[LogMessage] = []
        self.telemetry_up = self.state_up = True
        self.acked: dict[str, dict[str, RangeSet]] = {}  # acknowledged, by device and channel
        self._clock = clock
        self._history = history
        self._chance = chance
        self._wires: dict[str, Wire] = {}
        self._sessions: dict[str, dict[str, m.CommandReceived]] = {}  # commands not yet taken, by device
        self._telemetry_life = self._state_life = 0
        self._telemetry_busy = self._state_busy = False
        self._state_log: list[tuple[Wire, Callable[[Wire, Any], None], Any]] = []
        self._state_position = 0
        self._sweeping = False

    # -- connections -------------------------------------------------------------------------------------

    def opened(self, wire: Wire, credential: str) -> None:
        device = wire.link.device.id
        if not self.database.up:
            wire.side_has = False
            wire.down(m.Refused(Path.NEW, "the server is not available"))
            return
        if self.database.credentials.get(device) != credential:
            self._history.note("new", "refuses", device)
            wire.side_has = False
            wire.down(m.Refused(Path.NEW, "the server refused the user name or password"))
            return
        if (older := self._wires.get(device)) is not None and older.side_has:
            older.closed_by_side("taken over")
        self._wires[device] = wire
        known = device in self._sessions
        self._sessions.setdefault(device, {})
        wire.accepted(None, session_present=known)
        self._clock.after(0.05, self._seen, device, wire)

    def _seen(self, device: str, wire: Wire) -> None:
        if self._wires.get(device) is wire and wire.session:
            self.database.presence[device] = self._clock.now
            self.database.connects.setdefault(device, []).append(self._clock.now)
            self._history.note("new", "connected", device)

    def closed(self, wire: Wire, reason: str) -> None:
        device = wire.link.device.id
        if self._wires.get(device) is wire:
            del self._wires[device]
            self.database.presence.pop(device, None)
            self._history.note("new", "gone", device, reason)

    def subscribe(self, wire: Wire) -> None:
        wire.subscribed = True
        wire.down(m.Subscribed())
        for command in self._sessions[wire.link.device.id].values():
            wire.down(command)

    def drop_all(self, reason: str) -> None:
        """The servers are killed: every connection ends."""
        for wire in list(self._wires.values()):
            wire.cut(reason)

    # -- the log -----------------------------------------------------------------------------------------

    def append(self, topic: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        number = len(self.log) + 1
        self.log.append((number, topic, headers, payload, self._clock.now))
        if not self._telemetry_busy and self.telemetry_up:
            self._telemetry_busy = True
            self._clock.after(LINGER_S, self._read_telemetry, self._telemetry_life)
        return number

    def telemetry(self, wire: Wire, sent: m.SendTelemetry) -> None:
        device = wire.link.device.id
        payload = with_stamp(sent.body, b'"ts":%d,"seq":%d' % (sent.ts_ms, sent.seq))
        self.append(f"dt/{device}/{sent.channel}", payload)
        channels = self.acked.setdefault(device, {})
        if (acked := channels.get(sent.channel)) is None:
            acked = channels[sent.channel] = RangeSet()
        acked.add(sent.seq)
        wire.down(m.TelemetryAcked(Path.NEW, ((sent.channel, sent.seq),)))

    def try_telemetry(self, wire: Wire, sent: m.SendTryTelemetry) -> None:
        payload = with_stamp(sent.body, b'"ts":%d' % sent.ts_ms)
        self.append(f"dt/{wire.link.device.id}/{sent.channel}", payload)
        wire.down(m.TryTelemetryAcked())

    def _read_telemetry(self, life: int) -> None:
        if life != self._telemetry_life:
            return
        at = self.database.telemetry_position
        if at >= len(self.log):
            self._telemetry_busy = False
            return
        batch = self.log[at : at + BATCH_MAX]
        self._clock.after(COMMIT_S, self._commit_telemetry, life, self.database.take_telemetry(batch))

    def _commit_telemetry(self, life: int, commit: Callable[[], None]) -> None:
        if life != self._telemetry_life:
            return  # killed between reading and committing
        if not self.database.up:
            self._clock.after(1.0, self._read_telemetry, life)
            return
        commit()
        self._clock.after(LINGER_S, self._read_telemetry, life)

    def kill_telemetry(self) -> None:
        self.telemetry_up = False
        self._telemetry_life += 1

    def start_telemetry(self) -> None:
        self.telemetry_up = True
        self._telemetry_busy = True
        self._clock.after(0.0, self._read_telemetry, self._telemetry_life)

    # -- shadows and answers -----------------------------------------------------------------------------

    def shadow_get(self, wire: Wire) -> None:
        self._state(wire, self._give_shadow, None)

    def report(self, wire: Wire, report: DeviceReport) -> None:
        self._state(wire, self._take_report, report)
        wire.down(m.ReportAcked(Path.NEW))

    def answered(self, wire: Wire, command: str, status: m.AnswerStatus, detail: bytes) -> None:
        self._state(wire, self._take_answer, (command, response(status, detail), self._clock.now))
        wire.down(m.AnswerAcked(Path.NEW, command, status))

    def command_taken(self, wire: Wire, command: str) -> None:
        self._sessions[wire.link.device.id].pop(command, None)

    def _state(self, wire: Wire, call: Callable[[Wire, Any], None], message: Any) -> None:
        self._state_log.append((wire, call, message))
        if not self._state_busy and self.state_up:
            self._state_busy = True
            self._clock.after(COMMIT_S, self._read_state, self._state_life)

    def _read_state(self, life: int) -> None:
        if life != self._state_life:
            return
        if not self.database.up:
            self._clock.after(1.0, self._read_state, life)
            return
        while self._state_position < len(self._state_log):
            wire, call, message = self._state_log[self._state_position]
            call(wire, message)
            self._state_position += 1
        self._state_busy = False

    def kill_state(self) -> None:
        self.state_up = False
        self._state_life += 1

    def start_state(self) -> None:
        self.state_up = True
        self._state_busy = True
        self._clock.after(0.0, self._read_state, self._state_life)

    def _give_shadow(self, wire: Wire, _: None) -> None:
        device = wire.link.device.id
        outcome = self.database.shadow_request(device, Operation.GET, b"", self._clock.now)
        body = outcome.answers[0].body
        at = int(self._clock.now) + 0.5
        if isinstance(body, Document):
            desired = (body.state or {}).get("desired")
            orders = read_orders(msgspec.json.encode(desired), device) if desired is not None else None
            wire.down(m.ShadowAnswered(orders, time_s=at))
        else:
            wire.down(m.ShadowAnswered(None, time_s=at))

    def _take_report(self, wire: Wire, report: DeviceReport) -> None:
        reported = {
            "epoch": report.epoch,
            "phase": report.phase.value,
            "flags": report.flags,
            "reason": report.reason,
        }
        payload = msgspec.json.encode({"state": {"reported": reported}})
        device = wire.link.device.id
        self.database.shadow_request(device, Operation.UPDATE, payload, self._clock.now)
        self._history.note("new", "report", device, report.epoch, report.phase.value)
        self._tell_delta(device)

    def _take_answer(self, wire: Wire, message: tuple[str, bytes, float]) -> None:
        command, payload, at = message
        reported = read_response(payload)
        self._history.note("new", "answer", wire.link.device.id, command, reported.status.value)
        path = reported.path or Path.NEW
        answer = Answer(command=command, path=path, reported=reported, at=at, device=wire.link.device.id)
        self.database.commands.answer([answer])

    def _tell_delta(self, device: str) -> None:
        wire = self._wires.get(device)
        if (
            wire is not None
            and wire.subscribed
            and (epoch := self.database.desired_epoch(device)) is not None
        ):
            wire.down(m.ShadowChanged(epoch))

    # -- commands ----------------------------------------------------------------------------------------

    def wake_courier(self) -> None:
        """Something may wait: send it soon, and look after what is open until nothing is."""
        self._clock.after(0.02, self._send_queued)
        if not self._sweeping:
            self._sweeping = True
            self._clock.after(SWEEP_S, self._sweep)

    def _send_queued(self) -> None:
        if not (self.state_up and self.database.up and self.up):
            return
        commands, now = self.database.commands, self._clock.now
        waiting = [command.id for command in commands.waiting(Path.NEW, now)]
        for command in commands.mark_sent(Path.NEW, waiting, now):
            self._publish(command)

    def _sweep(self) -> None:
        commands, now = self.database.commands, self._clock.now
        if self.state_up and self.database.up:
            commands.close_due(now)
            if self.up:
                self._send_queued()
                for command in commands.send_again(self.database.presence.get, now):
                    self._publish(command)
        self._sweeping = bool(commands.open)
        if self._sweeping:
            self._clock.after(SWEEP_S, self._sweep)

    def _publish(self, command: Command) -> None:
        """To the device's session: now, or when it next connects. A copy that is there is there twice."""
        mode = next(state.mode for state in command.paths if state.path is Path.NEW)
        event = m.CommandReceived(
            Path.NEW, command.id, command.name, b"{}", mode.value == "dry-run", command.expires_at
        )
        session = self._sessions.get(command.device)
        if session is None:
            return  # it has never been here; the courier's next copy comes once it has
        session[command.id] = event
        wire = self._wires.get(command.device)
        if wire is not None and wire.subscribed:
            wire.down(event)

    # -- what the engine asks ----------------------------------------------------------------------------

    def deliver(self, orders: Mapping[str, Orders], credential: Callable[[str], str]) -> dict[str, str]:
        """Route, credential, shadow and probe, in this order. Refusals by device."""
        now = self._clock.now
        refused = self.database.route(orders)
        for device, order in orders.items():
            if device in refused:
                continue
            if order.flags.needs_new:
                self.database.credentials[device] = credential(device)
            if (why := self.database.set_desired(device, order, now)) is not None:
                refused[device] = why
                continue
            if order.flags.needs_new:
                self.database.probe(device, order, now)
            self._tell_delta(device)
        self.wake_courier()
        return refused

    def check_up(self) -> None:
        if not self.database.up:
            raise Unavailable("the new side's database does not answer")

    def follow(self, reports: Mapping[str, DeviceReport]) -> None:
        self.database.follow(reports, self._clock.now)
        self.wake_courier()

    def withdraw(self, devices: Sequence[str]) -> None:
        for device in devices:
            self.database.credentials.pop(device, None)
