"""A world for one device agent: two sides, a disk, a network and a clock, all simulated."""

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

import msgspec

from fleetlift.core.command import Path
from fleetlift.core.orders import (
    PROBE_COMMAND,
    CommandsFlag,
    DevicePhase,
    DeviceReport,
    Endpoint,
    Flags,
    LinkFlag,
    Orders,
    TelemetryFlag,
)
from fleetlift.device import messages as m
from fleetlift.device.agent import Agent, AgentSettings

OLD, NEW = Path.OLD, Path.NEW
ENDPOINT = Endpoint(host="new.example.com", port=8883)
ROUND_TRIP_S = 0.02
T0 = 1_700_000_000.0


def flags(telemetry: str = "old", commands: str = "old", link: str = "both") -> Flags:
    return Flags(telemetry=TelemetryFlag(telemetry), commands=CommandsFlag(commands), link=LinkFlag(link))


def orders(epoch: int, f: Flags, **changes: Any) -> Orders:
    fields: dict[str, Any] = {
        "epoch": epoch,
        "migration": "m",
        "flags": f,
        "new": ENDPOINT,
        "credential": "secret",
        **changes,
    }
    return Orders(**fields)


class Disk:
    """What is kept. `apply` is all there is to a write. `full`: nothing is taken; it waits in memory."""

    def __init__(self) -> None:
        self.full = False
        self.record = m.Record()
        self.next_seq: dict[str, int] = {}
        self.outbox: dict[tuple[str, int], m.Entry] = {}
        self.commands: dict[str, m.CommandRecord] = {}

    def apply(self, changes: tuple[m.Change, ...]) -> None:
        for change in changes:
            match change:
                case m.EntryAdded(entry):
                    self.outbox[entry.channel, entry.seq] = entry
                    self.next_seq[entry.channel] = entry.seq + 1
                case m.EntryDropped(channel, seq):
                    self.outbox.pop((channel, seq), None)
                case m.RecordChanged(record):
                    self.record = record
                case m.CommandKept(command):
                    self.commands[command.id] = command
                case m.CommandForgotten(id_):
                    self.commands.pop(id_, None)

    def saved(self) -> m.Saved:
        return m.Saved(
            record=self.record,
            next_seq=dict(self.next_seq),
            outbox=tuple(self.outbox.values()),
            commands=tuple(self.commands.values()),
        )


class SideModel:
    """One side: `state` is ok, refusing (answers no), away (answers nothing), silent (connects, acknowledges
    nothing) or denying (refuses subscriptions)."""

    def __init__(self) -> None:
        self.state = "ok"
        self.connected = False
        self.subscribed = False
        self.stored: dict[tuple[str, int], bytes] = {}
        self.copies = 0
        self.answers: list[tuple[str, m.AnswerStatus]] = []
        self.reports: list[DeviceReport] = []
        self.orders: Orders | None = None
        self.backlog: list[m.CommandReceived] = []  # sent again at each connection, as both sides do
        self.tries = 0
        self.mute: set[str] = set()  # of telemetry, shadow, command: what gets no answer during a try

    def final(self, id_: str) -> list[m.AnswerStatus]:
        return [s for i, s in self.answers if i == id_ and s is not m.AnswerStatus.ACKNOWLEDGED]


class World:
    def __init__(self, seed: int = 1, settings: AgentSettings | None = None) -> None:
        self.random = random.Random(seed)
        self.settings = settings or AgentSettings()
        self.now = T0
        self.skew_s = 0.0  # how far the device's clock is ahead of the sides'
        self.tell_time = True
        self.unstored: list[tuple[m.Change, ...] | int] = []  # what a full disk has not taken, in order
        self.sides = {OLD: SideModel(), NEW: SideModel()}
        self.disk = Disk()
        self.executed: list[str] = []
        self.produced: dict[str, int] = {}
        self.bodies: dict[tuple[str, int], bytes] = {}
        self.timer_at: float | None = None
        self._busy = 0
        self.command_takes_s = 0.05
        self.finish_commands = True
        self._queue: list[tuple[float, int, int, Callable[[], m.Event | None]]] = []
        self._n = itertools.count()
        self._life = 0  # events of an earlier life, or of an earlier connection, are lost with it
        self._connection = {OLD: 0, NEW: 0}
        self._broken: set[tuple[Path, int]] = set()  # what was under way on these is lost
        self.log: list[m.Action] = []
        self.agent = self._new_agent()
        self.boot()

    def _new_agent(self) -> Agent:
        return Agent(
            judge=lambda name, params: None if name in ("lock", "honk") else f"{name!r} is not known",
            chance=self.random.random,
            settings=self.settings,
        )

    def boot(self) -> None:
        self._life += 1
        self.timer_at = None
        self.unstored = []
        for path, side in self.sides.items():
            side.connected = side.subscribed = False
            self._connection[path] += 1
        self.agent = self._new_agent()
        self.feed(m.Started(self.disk.saved()))

    def crash(self) -> None:
        """kill -9 and start again from what is on disk."""
        self.boot()

    def jump(self, by_s: float) -> None:
        """The device's clock is set on, or back."""
        self.skew_s += by_s

    def fill_disk(self) -> None:
        self.disk.full = True

    def free_disk(self) -> None:
        self.disk.full = False
        waiting, self.unstored = self.unstored, []
        for changes in waiting:
            if not isinstance(changes, int):
                self._write(changes)
        for token in waiting:
            if isinstance(token, int):
                self.feed(m.Stored(token))

    # --- time ---

    def later(self, after_s: float, event: Callable[[], m.Event | None]) -> None:
        heapq.heappush(self._queue, (self.now + after_s, next(self._n), self._life, event))

    def on_connection(self, path: Path, after_s: float, event: Callable[[], m.Event | None]) -> None:
        connection = self._connection[path]
        self.later(after_s, lambda: event() if connection == self._connection[path] else None)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            at = self._queue[0][0] if self._queue else None
            if self.timer_at is not None and (at is None or self.timer_at <= at):
                if self.timer_at > end:
                    break
                self._busy = self._busy + 1 if self.timer_at <= self.now else 0
                assert self._busy < 100, "the agent's timer goes round and round without time passing"
                self.now, self.timer_at = max(self.now, self.timer_at), None
                self.feed(m.Timer())
            elif at is not None and at <= end:
                _, _, life, event = heapq.heappop(self._queue)
                self.now = max(self.now, at)
                if life == self._life and (happened := event()) is not None:
                    self.feed(happened)
            else:
                break
        self.now = end

    def until(self, condition: Callable[[], bool], within_s: float) -> None:
        end = self.now + within_s
        while not condition():
            assert self.now < end, f"not within {within_s} s; {self}"
            self.run(0.05)

    def __repr__(self) -> str:
        a = self.agent
        return (
            f"phase={a.phase.value} flags={a.flags} reason={a.record.reason!r} outbox={a.outbox_depth} "
            f"old={a.link(OLD).value} new={a.link(NEW).value}"
        )

    # --- what the outside does ---

    def produce(self, n: int = 1, channel: str = "can") -> None:
        for _ in range(n):
            self.feed(m.TelemetryProduced(channel, b'{"v":%d}' % self.random.randrange(10**9)))

    def order(self, path: Path, given: Orders) -> None:
        """Hand an order to a side, which delivers it now or at the next connection."""
        side = self.sides[path]
        side.orders = given
        if side.connected and side.state == "ok":
            if path is OLD:
                self.on_connection(OLD, ROUND_TRIP_S, lambda: m.OrdersReceived(OLD, given))
            else:
                self.on_connection(NEW, ROUND_TRIP_S, lambda: m.ShadowChanged(given.epoch))

    def command(
        self, path: Path, id_: str, name: str = "lock", *, dry_run: bool = False, for_s: float = 3600.0
    ) -> None:
        given = m.CommandReceived(path, id_, name, b"{}", dry_run, self.now + for_s)
        side = self.sides[path]
        side.backlog.append(given)
        if side.connected and (path is OLD or side.subscribed):
            self.on_connection(path, ROUND_TRIP_S, lambda: given)

    def probe(self, epoch: int = 0) -> None:
        self.command(NEW, f"probe-{epoch}-{next(self._n)}", PROBE_COMMAND)

    def break_link(self, path: Path) -> None:
        side = self.sides[path]
        if side.connected:
            self._cut(path)
            self.feed(m.Lost(path, "connection reset"))

    def set_state(self, path: Path, state: str) -> None:
        self.sides[path].state = state
        if state in ("refusing", "away"):
            self.break_link(path)

    def _cut(self, path: Path, *, gently: bool = False) -> None:
        if not gently:
            self._broken.add((path, self._connection[path]))
        self._connection[path] += 1
        self.sides[path].connected = self.sides[path].subscribed = False

    # --- what the agent asks for ---

    def feed(self, event: m.Event) -> None:
        todo = [event]
        while todo:
            for action in self.agent.on(todo.pop(0), self.now + self.skew_s):
                self.log.append(action)
                todo += self.act(action)

    def act(self, action: m.Action) -> list[m.Event]:
        match action:
            case m.Persist(token, changes, wait):
                if self.disk.full:
                    self.unstored += [changes, token] if wait else [changes]
                    return []
                self._write(changes)
                if wait:
                    self.later(0.001, lambda: m.Stored(token))
            case m.ConnectOld():
                self._connect(OLD)
            case m.ConnectNew(endpoint, credential):
                if endpoint.host.startswith("wrong") or credential.startswith("wrong"):
                    self.later(ROUND_TRIP_S, lambda: m.Refused(NEW, "not here, or not with that"))
                else:
                    self._connect(NEW)
            case m.Close(path):
                self._cut(path, gently=True)
            case m.SetTimer(at):
                self.timer_at = at - self.skew_s
            case m.Execute(id_, _, _):
                assert self.disk.commands[id_].status is None, "executed before it was remembered"
                self.executed.append(id_)
                if self.finish_commands:
                    self.later(self.command_takes_s, lambda: m.CommandFinished(id_, True, b'{"ok":true}'))
            case m.SubscribeNew():
                side = self.sides[NEW]
                if side.state == "ok":
                    side.subscribed = True
                    self.on_connection(NEW, ROUND_TRIP_S, lambda: m.Subscribed(True))
                    for command in side.backlog:
                        if not side.final(command.id):
                            self.on_connection(NEW, 2 * ROUND_TRIP_S, lambda c=command: c)  # type: ignore[misc]
                elif side.state == "denying":
                    self.on_connection(NEW, ROUND_TRIP_S, lambda: m.Subscribed(False))
            case m.SendTelemetry(path, channel, seq, _, body):
                assert self.disk.next_seq[channel] > seq, "sent before it was stored"
                assert self.sides[path].connected, "sent on a link that is not up"
                assert self.bodies[channel, seq] == body, "a seq was given to two messages"
                self._reach(path, lambda: self._store(path, channel, seq, body))
            case m.SendTryTelemetry():
                self.sides[NEW].tries += 1
                if "telemetry" not in self.sides[NEW].mute:
                    self._reach(NEW, m.TryTelemetryAcked)
            case m.AnswerCommand(path, id_, status, _):
                if "command" not in self.sides[path].mute:
                    self._reach(path, lambda: self._answered(path, id_, status))
            case m.Report(path, report):
                assert self.disk.record.epoch >= report.epoch or not self.settings.updatable
                self._reach(path, lambda: self._reported(path, report))
            case m.ShadowGet() if "shadow" not in self.sides[NEW].mute:
                self._reach(NEW, lambda: m.ShadowAnswered(self.sides[NEW].orders, time_s=self._time()))
        return []

    def _time(self) -> float | None:
        return self.now if self.tell_time else None

    def _write(self, changes: tuple[m.Change, ...]) -> None:
        self.disk.apply(changes)
        for change in changes:
            if isinstance(change, m.EntryAdded):
                e = change.entry
                assert self.produced.get(e.channel, 0) + 1 == e.seq, "a seq was skipped or reused"
                self.produced[e.channel] = e.seq
                self.bodies[e.channel, e.seq] = e.body

    def _connect(self, path: Path) -> None:
        side = self.sides[path]
        assert not side.connected, "connected twice"
        if side.state == "refusing":
            self.later(ROUND_TRIP_S, lambda: m.Refused(path, "refused"))
        elif side.state != "away":

            def connected() -> m.Event:
                side.connected = True
                if path is OLD and side.state == "ok":
                    if (given := side.orders) is not None:
                        self.on_connection(OLD, ROUND_TRIP_S, lambda: m.OrdersReceived(OLD, given))
                    for command in side.backlog:
                        if not side.final(command.id):
                            self.on_connection(OLD, 2 * ROUND_TRIP_S, lambda c=command: c)  # type: ignore[misc]
                return m.Connected(path, time_s=self._time() if path is OLD else None)

            self.on_connection(path, ROUND_TRIP_S, connected)

    def _reach(self, path: Path, effect: Callable[[], m.Event]) -> None:
        """Half a round trip to the side, where it takes effect; half back, where the answer may be lost."""
        if self.sides[path].state != "ok":
            return

        connection = (path, self._connection[path])

        def arrive() -> None:
            if connection not in self._broken:
                answer = effect()
                if connection[1] == self._connection[path]:
                    self.on_connection(path, ROUND_TRIP_S / 2, lambda: answer)

        self.later(ROUND_TRIP_S / 2, arrive)

    def _store(self, path: Path, channel: str, seq: int, body: bytes) -> m.Event:
        side = self.sides[path]
        side.copies += 1
        side.stored[channel, seq] = body
        return m.TelemetryAcked(path, ((channel, seq),))

    def _answered(self, path: Path, id_: str, status: m.AnswerStatus) -> m.Event:
        self.sides[path].answers.append((id_, status))
        return m.AnswerAcked(path, id_, status)

    def _reported(self, path: Path, report: DeviceReport) -> m.Event:
        self.sides[path].reports.append(msgspec.json.decode(msgspec.json.encode(report), type=DeviceReport))
        return m.ReportAcked(path)

    # --- what must hold ---

    def in_phase(self, phase: DevicePhase) -> bool:
        return self.agent.phase is phase

    def drained(self) -> bool:
        """Whether all that is waiting gets acknowledged within two seconds."""
        for _ in range(40):
            if not self.agent.outbox_depth:
                return True
            self.run(0.05)
        return False

    def lost(self) -> list[tuple[str, int]]:
        """What was produced and is neither on a side nor on the device's disk."""
        return [
            (channel, seq)
            for channel, last in self.produced.items()
            for seq in range(1, last + 1)
            if (channel, seq) not in self.disk.outbox
            and not any((channel, seq) in side.stored for side in self.sides.values())
        ]

    def move(self, f: Flags, epoch: int | None = None, **changes: Any) -> int:
        """Order flags by the old side, with a probe by the new one, and wait until they are applied."""
        epoch = epoch if epoch is not None else self.agent.record.epoch + 1
        self.order(OLD, orders(epoch, f, **changes))
        self.order(NEW, orders(epoch, f, **changes))
        self.probe(epoch)
        self.until(lambda: self.agent.record.epoch == epoch and self.agent.flags == f, 20)
        return epoch
