"""The device agent: what firmware must do to be moved between two backends, as a machine without I/O.

`Agent.on(event, now) -> [action, …]` holds no socket, task, clock, disk or source of chance. A shell
(`device/shell.py`) feeds it and does what it says; a simulator feeds the same machine. `docs/device.md`
is the contract in words; `MOVES` in `moves.py` is its state table.

Whatever is promised to others is on disk before it is done: a telemetry message before it is sent, a
command's id before it is executed, its outcome before it is answered, a new phase before it is reported.
The machine says `Persist(token, …)` and goes on with what waits for it at `Stored(token)`.

The agent is put together of `Outbox`, `Commands`, `Moves` and `Upkeep`. They share the two links and the
actions of the event at hand; each decides what is its own, and what concerns several is said here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec

from fleetlift.core.orders import HEALTH_CHANNEL, DevicePhase, DeviceReport, Flags, Orders
from fleetlift.device.actions import Actions
from fleetlift.device.clock import SideClock
from fleetlift.device.commands import Commands
from fleetlift.device.link import Link
from fleetlift.device.messages import (
    Action,
    AnswerAcked,
    Close,
    CommandFinished,
    CommandReceived,
    Connected,
    Event,
    LinkState,
    Lost,
    OrdersReceived,
    Path,
    Record,
    Refused,
    ReportAcked,
    Saved,
    ShadowAnswered,
    ShadowChanged,
    ShadowGet,
    Started,
    Stored,
    Subscribed,
    SubscribeNew,
    TelemetryAcked,
    TelemetryProduced,
    Timer,
    TryTelemetryAcked,
)
from fleetlift.device.moves import Leg, Moves
from fleetlift.device.outbox import Key, Outbox
from fleetlift.device.settings import DEFAULTS
from fleetlift.device.settings import AgentSettings as AgentSettings
from fleetlift.device.upkeep import Upkeep

# A timer that comes so much too late means that the clock jumped, or that everything stood still.
_JUMP_S: Final = 5.0


class Agent:
    """One device's agent. `judge(name, params)` says why the application would refuse a command, or None;
    it must be pure. `chance()` gives numbers in [0, 1) that spread reconnects."""

    def __init__(
        self,
        *,
        judge: Callable[[str, bytes], str | None],
        chance: Callable[[], float],
        settings: AgentSettings = DEFAULTS,
    ) -> None:
        self._settings = settings
        self._old, self._new = Link(Path.OLD), Link(Path.NEW)
        self._links = links = {Path.OLD: self._old, Path.NEW: self._new}
        self._actions = actions = Actions()
        self._clock = SideClock()
        self._outbox = Outbox(settings, actions)
        self._commands = Commands(settings, actions, self._clock, links, judge)
        self._moves = Moves(settings, actions, self._outbox, links)
        self._upkeep = Upkeep(settings, actions, self._outbox, self._commands, self._moves, links, chance)
        self._now = -math.inf
        self._started_at = 0.0
        self._health_at = math.inf
        self._health_every_s = settings.health_every_s

    # --- what a shell or a screen may look at ---

    @property
    def record(self) -> Record:
        return self._moves.record

    @property
    def phase(self) -> DevicePhase:
        return self._moves.record.phase

    @property
    def flags(self) -> Flags:
        return self._moves.record.flags

    @property
    def stale_orders(self) -> int:
        return self._moves.stale_orders

    @property
    def duplicates(self) -> int:
        """Second copies of commands."""
        return self._commands.duplicates

    @property
    def refused(self) -> int:
        """Telemetry that found the outbox full."""
        return self._outbox.refused

    @property
    def shed(self) -> int:
        """Messages given up on one path because the outbox was full; the other path has them."""
        return self._outbox.shed

    @property
    def acked(self) -> Mapping[Path, int]:
        """Telemetry messages, by the path that has acknowledged them."""
        return self._outbox.acked_by

    @property
    def outbox_depth(self) -> int:
        return self._outbox.depth

    @property
    def next_seq(self) -> Mapping[str, int]:
        return self._outbox.next_seq

    def outbox_keys(self) -> Iterable[Key]:
        return self._outbox.keys()

    def link(self, path: Path) -> LinkState:
        return self._links[path].state

    def report(self) -> DeviceReport:
        return self._moves.report()

    def set_health_every(self, seconds: float) -> None:
        """From the next sign of life on."""
        self._health_every_s = seconds

    # --- the one way in ---

    def on(self, event: Event, now: float) -> list[Action]:
        """What is to be done about `event`, in this order. `now` is Unix seconds and may jump."""
        actions, outbox = self._actions, self._outbox
        out: list[Action] = []
        actions.out = out
        if now < self._now:
            self._jumped(now - self._now)
        elif now > actions.timer_at + _JUMP_S:
            self._jumped(now - max(actions.timer_at, self._now))
        self._now = now
        match event:
            case TelemetryAcked():
                link = self._links[event.path]
                self._moves.served(link)
                outbox.acked(link, event.keys, now)
                return out
            case TelemetryProduced():
                outbox.produce(event.channel, event.body, now)
                return out
            case Stored() if event.alone:
                self._commands.stored_alone(event.token)
                self._moves.stored_alone(event.token)
            case Stored():
                actions.stored = max(actions.stored, event.token)
                if not (self._commands.await_disk or self._moves.await_disk):
                    # Telemetry alone waited: what every measurement goes through takes the short way.
                    outbox.pump(self._old, now)
                    outbox.pump(self._new, now)
                    return out
                self._commands.stored()
                self._moves.stored()
            case Started():
                self._started(event.saved, now)
            case Connected():
                if event.time_s is not None:
                    self._clock.told(event.time_s, now)
                self._connected(self._links[event.path], now)
            case Lost():
                self._upkeep.down(self._links[event.path], event.reason, now)
            case Refused():
                self._upkeep.down(self._links[event.path], event.reason or "refused", now)
            case Subscribed():
                self._subscribed(event.granted, now)
            case TryTelemetryAcked():
                self._moves.served(self._new)
                self._moves.leg_done(Leg.TELEMETRY, now)
            case AnswerAcked():
                self._moves.served(self._links[event.path])
                if self._commands.answer_acked(event):
                    self._moves.leg_done(Leg.COMMAND, now)
            case ReportAcked():
                self._moves.served(self._links[event.path])
            case ShadowAnswered():
                self._shadow_answered(event, now)
            case ShadowChanged():
                if event.epoch is not None and event.epoch > self.record.epoch and self._new.ready:
                    out.append(ShadowGet())
            case OrdersReceived():
                self._ordered(self._links[event.path], event.orders, now)
            case CommandReceived():
                self._commands.received(event, self.flags.commands, now)
            case CommandFinished():
                self._commands.finished(event)
            case Timer():
                actions.timer_at = math.inf
        self._settle(now)
        return out

    # --- what concerns more than one part ---

    def _started(self, saved: Saved, now: float) -> None:
        self._started_at = now
        self._health_at = now + self._health_every_s
        self._old.down_since = self._new.down_since = now
        self._outbox.started(saved.outbox, saved.next_seq, saved.record.flags.telemetry)
        self._commands.started(saved.commands)
        self._moves.started(saved.record, now)

    def _connected(self, link: Link, now: float) -> None:
        if link.state is not LinkState.CONNECTING:
            self._actions.out.append(Close(link.path))
            return
        link.state = LinkState.UP
        self._actions.arm(now + self._settings.acked_within_s)
        if link is self._old:
            self._moves.ready(link)
        else:
            self._actions.out.append(SubscribeNew())
            link.connecting_since = now
            self._commands.asked_time = True
        self._outbox.pump(link, now)

    def _subscribed(self, granted: bool, now: float) -> None:
        if self._new.state is not LinkState.UP:
            return
        if granted:
            self._moves.subscribed(now)
        else:
            self._upkeep.close(self._new, "subscription refused", now)

    def _shadow_answered(self, event: ShadowAnswered, now: float) -> None:
        if event.time_s is not None:
            self._clock.told(event.time_s, now)
        self._commands.asked_time = False
        if event.orders is not None:
            self._ordered(self._new, event.orders, now)
        if event.ok:
            self._moves.served(self._new)
            self._moves.leg_done(Leg.SHADOW, now)

    def _ordered(self, link: Link, orders: Orders, now: float) -> None:
        if self._moves.ordered(link, orders, now):
            self._upkeep.close(self._new, "the new side moved", now)
            self._new.retry_now(now)

    def _settle(self, now: float) -> None:
        """What follows from state and time, whatever the event was."""
        self._moves.tend(now)
        self._commands.judge_early(self.flags.commands, now)
        if now >= self._health_at:
            self._health_at = now + self._health_every_s
            self._health(now)
            self._commands.forget(now)
        self._old.wanted, self._new.wanted = self._moves.wants(now)
        for link in (self._old, self._new):
            self._commands.send_owed(link, now)
            self._upkeep.tend(link, now)
            self._outbox.pump(link, now)
        self._actions.arm(min(self._upkeep.deadline(self._health_at), self._moves.deadline(now)))

    def _health(self, now: float) -> None:
        body = {
            "outbox": self.outbox_depth,
            "uptime_s": round(now - self._started_at, 1),
            "links": {link.path.value: link.state.value for link in (self._old, self._new)},
            "phase": self.phase.value,
        }
        if self.refused:
            body["refused"] = self.refused
        self._outbox.produce(HEALTH_CHANNEL, msgspec.json.encode(body), now)

    def _jumped(self, by_s: float) -> None:
        """The clock was set on (or, below 0, back) by so much: what was due in ten seconds still is.

        A device that stood still for a while looks the same, and the same is right: nobody had the time to
        answer it meanwhile.
        """
        self._old.jumped(by_s)
        self._new.jumped(by_s)
        self._outbox.jumped(by_s)
        self._commands.jumped(by_s)
        self._moves.jumped(by_s)
        self._clock.jumped(by_s)
        self._actions.timer_at += by_s
        self._health_at += by_s
        self._started_at += by_s
