"""The device agent: what firmware must do to be moved between two backends, as a machine without I/O.

`Agent.on(event, now) -> [action, …]` holds no socket, task, clock, disk or source of chance. A shell
(`device/shell.py`) feeds it and does what it says; a simulator feeds the same machine. `docs/device.md`
is the contract in words; `MOVES` below is its state table.

Whatever is promised to others is on disk before it is done: a telemetry message before it is sent, a
command's id before it is executed, its outcome before it is answered, a new phase before it is reported.
The machine says `Persist(token, …)` and goes on with what waits for it at `Stored(token)`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from fleetlift.core.errors import FleetError
from fleetlift.core.orders import (
    HEALTH_CHANNEL,
    PROBE_COMMAND,
    TRY_CHANNEL,
    CommandsFlag,
    DevicePhase,
    DeviceReport,
    Flags,
    LinkFlag,
    Orders,
    TelemetryFlag,
)
from fleetlift.device.clock import SideClock
from fleetlift.device.messages import (
    Action,
    AnswerAcked,
    AnswerCommand,
    AnswerStatus,
    Change,
    Close,
    CommandFinished,
    CommandForgotten,
    CommandKept,
    CommandReceived,
    CommandRecord,
    Connected,
    ConnectNew,
    ConnectOld,
    Entry,
    EntryAdded,
    EntryDropped,
    Event,
    Execute,
    LinkState,
    Lost,
    OrdersReceived,
    Path,
    Persist,
    Place,
    Record,
    RecordChanged,
    Refused,
    Report,
    ReportAcked,
    Saved,
    SendTelemetry,
    SendTryTelemetry,
    SetTimer,
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

# --- the table of phases ---


class Cause(StrEnum):
    """What moves a device from phase to phase."""

    ORDERED_OLD = "ordered-old"  # a newer epoch whose flags need no new side
    ORDERED_NEW = "ordered-new"  # a newer epoch whose flags need the new side, which is not being served
    ORDERED_WHILE_SERVED = "ordered-while-served"  # the same, while the new side serves this device
    TRY_SUCCEEDED = "try-succeeded"  # telemetry, command and shadow have gone round on the new side
    TRY_FAILED = "try-failed"  # the deadline passed, or the order cannot be tried
    NEW_LOST = "new-lost"  # the new side was lost for longer than the limit


MOVES: Mapping[DevicePhase, Mapping[Cause, DevicePhase]] = {
    DevicePhase.OLD: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
    },
    DevicePhase.TRYING: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
        Cause.TRY_SUCCEEDED: DevicePhase.MOVED,
        Cause.TRY_FAILED: DevicePhase.WENT_BACK,
    },
    DevicePhase.MOVED: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
        Cause.ORDERED_WHILE_SERVED: DevicePhase.MOVED,
        Cause.NEW_LOST: DevicePhase.WENT_BACK,
    },
    DevicePhase.WENT_BACK: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
    },
}


class IllegalMove(FleetError):
    """A mistake of the program: this cause means nothing in this phase."""


class Leg(StrEnum):
    """The three round trips of a try."""

    TELEMETRY = "telemetry"
    SHADOW = "shadow"
    COMMAND = "command"


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one agent. Times are seconds."""

    window: int = 64  # telemetry messages on the way, each path
    keep_acked_s: float = 1.0  # what the new side acknowledged is kept until it is seen alive so long after
    outbox_max: int = 20_000  # messages; when full, new telemetry is refused and counted
    body_max: int = 240_000  # bytes of one telemetry body
    connect_within_s: float = 10.0
    acked_within_s: float = 10.0  # a link that owes an acknowledgement for longer is closed and made anew
    backoff_s: float = 0.5
    backoff_max_s: float = 10.0
    health_every_s: float = 10.0
    remember_commands_s: float = 8 * 86_400.0  # after the later of receipt and expiry
    executing_max: int = 64
    owed_max: int = 1_000  # answers kept for a path that does not take them
    linger_s: float = 3.0  # a link no longer wanted stays this long for answers that are owed
    stranded_after_s: float = 60.0  # with the old side away for this long, orders are awaited on the new one
    retry_legs_s: float = 3.0
    starts_unserved_max: int = 5  # a moved device that starts so often without being served goes back
    updatable: bool = True  # False: firmware that cannot be moved; it answers orders with "unsupported"


# --- the machine -----------------------------------------------------------------------------------------

_JUMP_S = (
    5.0  # a timer that comes so much too late means that the clock jumped, or that everything stood still
)
_BIT = {Path.OLD: 1, Path.NEW: 2}
_DEMAND = {TelemetryFlag.OLD: 1, TelemetryFlag.BOTH: 3, TelemetryFlag.NEW: 2}
_EXECUTES = {
    Path.OLD: frozenset({CommandsFlag.OLD, CommandsFlag.DRY_RUN, CommandsFlag.BOTH}),
    Path.NEW: frozenset({CommandsFlag.BOTH, CommandsFlag.NEW}),
}

Key = tuple[str, int]
DEFAULTS = AgentSettings()


class _Held:
    """An entry of the outbox, with the paths that have acknowledged it and the token that stores it."""

    __slots__ = ("acked", "entry", "gone", "kept", "token")

    def __init__(self, entry: Entry, token: int) -> None:
        self.entry, self.token = entry, token
        self.acked = 0
        self.gone = False
        self.kept = False  # nobody waits for it any more, but a power cut may make it needed again


class _Link:
    """One of the two links: what is wanted of it, how it is, and what is under way on it."""

    __slots__ = (
        "attempts",
        "connecting_since",
        "down_since",
        "in_flight",
        "owed",
        "path",
        "queue",
        "ready",
        "retry_at",
        "state",
        "unwanted_since",
        "wanted",
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = LinkState.DOWN
        self.wanted = False
        self.ready = False  # up, and (on the new side) subscribed: reports and answers may go
        self.attempts = 0
        self.retry_at = 0.0
        self.connecting_since = 0.0
        self.down_since: float | None = 0.0  # None: it serves, by evidence and not only by being connected
        self.unwanted_since: float | None = None
        self.queue: deque[_Held] = deque()  # not yet sent by this path, in order
        self.in_flight: dict[Key, tuple[_Held, float]] = {}
        self.owed: dict[str, tuple[AnswerStatus, bytes, float | None]] = {}  # by command id; when it was sent


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
        self.settings = settings
        self.record = Record()
        self.refused = 0  # telemetry that found the outbox full
        self.shed = 0  # messages given up on one path because the outbox was full; the other path has them
        self.stale_orders = 0
        self.duplicates = 0
        self.acked = {Path.OLD: 0, Path.NEW: 0}
        self._judge = judge
        self._chance = chance
        self._old, self._new = _Link(Path.OLD), _Link(Path.NEW)
        self._links = {Path.OLD: self._old, Path.NEW: self._new}
        self._outbox: dict[Key, _Held] = {}
        self._next_seq: dict[str, int] = {}
        self._commands: dict[str, CommandRecord] = {}
        self._executing: set[str] = set()  # until the outcome is stored
        self._early: list[CommandReceived] = []  # came before the new side has told its time
        self._asked_time = False  # since the new side was connected, and it has not answered yet
        self._clock = SideClock()
        self._outcomes: deque[tuple[int, str]] = deque()  # (token, command id): answered once stored
        self._demand = 1
        self._token = 0
        self._stored = 0
        self._waiting: deque[tuple[int, tuple[Action, ...]]] = deque()
        self._report_token: int | None = None
        self._legs: set[Leg] = set()
        self._legs_at = math.inf
        self._timer_at = math.inf
        self._health_at = math.inf
        self._started_at = 0.0
        self._kept: deque[tuple[float, _Held]] = deque()  # with the time at which the last path acknowledged
        self._kept_count = 0
        self._partly = 0  # entries that one path has acknowledged and another still owes
        self._now = -math.inf
        self._connect_reason = (
            ""  # why the new side could not be reached last, for the report of a failed try
        )
        self._out: list[Action] = []

    # --- what a shell or a screen may look at ---

    @property
    def phase(self) -> DevicePhase:
        return self.record.phase

    @property
    def flags(self) -> Flags:
        return self.record.flags

    @property
    def outbox_depth(self) -> int:
        return len(self._outbox) - self._kept_count

    @property
    def next_seq(self) -> Mapping[str, int]:
        return self._next_seq

    def outbox_keys(self) -> Iterable[Key]:
        return [key for key, held in self._outbox.items() if not held.kept]

    def link(self, path: Path) -> LinkState:
        return self._links[path].state

    def set_health_every(self, seconds: float) -> None:
        """From the next sign of life on."""
        self.settings = msgspec.structs.replace(self.settings, health_every_s=seconds)

    def report(self) -> DeviceReport:
        r = self.record
        return DeviceReport(epoch=r.epoch, phase=r.phase, flags=r.flags, reason=r.reason)

    # --- the one way in ---

    def on(self, event: Event, now: float) -> list[Action]:
        """What is to be done about `event`, in this order. `now` is Unix seconds and may jump."""
        self._out = []
        if now < self._now:
            self._jumped(now - self._now)
        elif now > self._timer_at + _JUMP_S:
            self._jumped(now - max(self._timer_at, self._now))
        self._now = now
        match event:
            case TelemetryAcked():
                self._telemetry_acked(event, now)
                return self._out
            case TelemetryProduced():
                self._produce(event.channel, event.body, now)
                return self._out
            case Stored() if event.alone:
                self._on_stored_alone(event.token)
            case Stored():
                if not (self._waiting or self._outcomes or self._report_token):
                    # Telemetry alone waited: what every measurement goes through takes the short way.
                    self._stored = max(self._stored, event.token)
                    self._pump(self._old, now)
                    self._pump(self._new, now)
                    return self._out
                self._on_stored(event.token)
            case Started():
                self._started(event.saved, now)
            case Connected():
                if event.time_s is not None:
                    self._clock.told(event.time_s, now)
                self._connected(self._links[event.path], now)
            case Lost():
                self._ended(self._links[event.path], event.reason, now)
            case Refused():
                self._ended(self._links[event.path], event.reason or "refused", now)
            case Subscribed():
                self._subscribed(event.granted, now)
            case TryTelemetryAcked():
                self._served(self._new)
                self._leg_done(Leg.TELEMETRY)
            case AnswerAcked():
                self._answer_acked(event)
            case ReportAcked():
                self._served(self._links[event.path])
            case ShadowAnswered():
                self._shadow_answered(event, now)
            case ShadowChanged():
                if event.epoch is not None and event.epoch > self.record.epoch and self._new.ready:
                    self._out.append(ShadowGet())
            case OrdersReceived():
                self._ordered(event.path, event.orders, now)
            case CommandReceived():
                self._commanded(event, now)
            case CommandFinished():
                self._finished(event)
            case Timer():
                self._timer_at = math.inf
        self._settle(now)
        return self._out

    # --- start ---

    def _started(self, saved: Saved, now: float) -> None:
        self.record = saved.record
        self._next_seq = dict(saved.next_seq)
        self._started_at = now
        self._health_at = now + self.settings.health_every_s
        self._demand = _DEMAND[self.record.flags.telemetry]
        for entry in saved.outbox:
            self._outbox[entry.channel, entry.seq] = _Held(entry, 0)
            # A counter may not fall behind the messages that it has numbered.
            self._next_seq[entry.channel] = max(self._next_seq.get(entry.channel, 1), entry.seq + 1)
        for link in (self._old, self._new):
            link.down_since = now
            self._requeue(link)
        interrupted: list[Change] = []
        for command in saved.commands:
            if command.status is None:
                # Begun, and whether it was done nobody knows: it is never begun again.
                command = msgspec.structs.replace(
                    command,
                    status=AnswerStatus.FAILED,
                    detail=_detail("INTERRUPTED", "the device restarted while it executed this command"),
                )
                interrupted.append(CommandKept(command))
            self._commands[command.id] = command
            if not command.answered and command.status is not None:
                self._links[command.path].owed[command.id] = (command.status, command.detail, None)
        if interrupted:
            self._persist(*interrupted, wait=False)
        if self.record.phase is DevicePhase.TRYING:
            self._legs_at = now
        elif self.record.phase is DevicePhase.MOVED:
            # Each start counts the limit of a lost side anew: a device that is started again and again for
            # want of a connection would never reach it.
            if self.record.starts_unserved >= self.settings.starts_unserved_max:
                times = self.record.starts_unserved
                self._back(Cause.NEW_LOST, f"started {times} times without being served by the new side")
            else:
                self._note_starts(self.record.starts_unserved + 1)

    def _note_starts(self, unserved: int) -> None:
        self.record = msgspec.structs.replace(self.record, starts_unserved=unserved)
        self._persist(RecordChanged(self.record), wait=False)

    # --- telemetry ---

    def _produce(self, channel: str, body: bytes, now: float) -> None:
        if len(body) > self.settings.body_max or not self._room():
            self.refused += 1
            return
        seq = self._next_seq.get(channel, 1)
        self._next_seq[channel] = seq + 1
        entry = Entry(channel, seq, round(now * 1000), body)
        self._token += 1
        held = _Held(entry, self._token)
        self._outbox[channel, seq] = held
        if self._demand & 1:
            self._old.queue.append(held)
        if self._demand & 2:
            self._new.queue.append(held)
        self._out.append(Persist(self._token, (EntryAdded(entry),)))

    def _room(self) -> bool:
        """Whether the outbox takes one more. When it is full, a message that at least one side has stored
        makes room, oldest first; without such a message new telemetry is refused, never old dropped."""
        if len(self._outbox) < self.settings.outbox_max:
            return True
        if not self._partly:
            return False
        held = next(held for held in self._outbox.values() if held.acked)
        self.shed += not held.kept
        self._persist(self._leave(held), wait=False)
        return True

    def _leave(self, held: _Held) -> EntryDropped:
        key = (held.entry.channel, held.entry.seq)
        del self._outbox[key]
        held.gone = True
        self._kept_count -= held.kept
        self._partly -= held.acked != 0
        return EntryDropped(*key)

    def _telemetry_acked(self, event: TelemetryAcked, now: float) -> None:
        link, bit = self._links[event.path], _BIT[event.path]
        self._served(link)
        dropped: list[Change] = []
        for key in event.keys:
            link.in_flight.pop(key, None)
            if (held := self._outbox.get(key)) is None or held.acked & bit:
                continue
            self._partly += held.acked == 0
            held.acked |= bit
            self.acked[event.path] += 1
            if held.acked & self._demand == self._demand:
                if self._demand & _BIT[Path.NEW] and self.settings.keep_acked_s > 0:
                    held.kept = True
                    self._kept_count += 1
                    self._kept.append((now, held))
                else:
                    dropped.append(self._leave(held))
        if link is self._new:
            # It lives, so what it acknowledged a while ago is on its disk by now.
            while self._kept and self._kept[0][0] <= now - self.settings.keep_acked_s:
                if not (held := self._kept.popleft()[1]).gone:
                    dropped.append(self._leave(held))
        if dropped:
            self._persist(*dropped, wait=False)
        self._pump(link, now)

    def _unkeep(self) -> list[_Held]:
        """Let go of what is kept: it is in the outbox like everything else there."""
        kept = [held for _, held in self._kept if not held.gone]
        for held in kept:
            held.kept = False
        self._kept.clear()
        self._kept_count = 0
        return kept

    def _doubt_kept(self) -> None:
        """The new side is lost, perhaps by a power cut, and with it what it acknowledged last: all that is
        kept goes again. Should it be there, its seq says that it came twice."""
        for held in self._unkeep():
            held.acked &= ~_BIT[Path.NEW]
            self._partly -= held.acked == 0
            self.acked[Path.NEW] -= 1

    def _demand_changed(self) -> None:
        """The flags name other paths now. Entries leave once those have acknowledged; the others go on,
        in order, by every path that is asked for and lacks them."""
        self._demand = _DEMAND[self.record.flags.telemetry]
        self._unkeep()
        done = [held for held in self._outbox.values() if held.acked & self._demand == self._demand]
        if done:
            self._persist(*[self._leave(held) for held in done], wait=False)
        for link in (self._old, self._new):
            self._requeue(link)

    def _requeue(self, link: _Link) -> None:
        bit = _BIT[link.path]
        if not self._demand & bit:
            link.queue = deque()
            return
        link.queue = deque(
            held for key, held in self._outbox.items() if not held.acked & bit and key not in link.in_flight
        )

    def _pump(self, link: _Link, now: float) -> None:
        if link.state is not LinkState.UP or not self._demand & _BIT[link.path]:
            return
        queue, in_flight = link.queue, link.in_flight
        while queue and len(in_flight) < self.settings.window:
            held = queue[0]
            if held.token > self._stored:
                break
            queue.popleft()
            if held.gone:
                continue
            entry = held.entry
            if not in_flight:
                self._arm(now + self.settings.acked_within_s)
            in_flight[entry.channel, entry.seq] = (held, now)
            self._out.append(SendTelemetry(link.path, entry.channel, entry.seq, entry.ts_ms, entry.body))

    def _health(self, now: float) -> None:
        body = {
            "outbox": self.outbox_depth,
            "uptime_s": round(now - self._started_at, 1),
            "links": {link.path.value: link.state.value for link in (self._old, self._new)},
            "phase": self.record.phase.value,
        }
        if self.refused:
            body["refused"] = self.refused
        self._produce(HEALTH_CHANNEL, msgspec.json.encode(body), now)

    # --- commands ---

    def _commanded(self, event: CommandReceived, now: float) -> None:
        link = self._links[event.path]
        flag = self.record.flags.commands
        if link is self._new and self._awaits_time(now):
            self._early.append(event)
            return
        expired = self._clock.time(now) > event.expires_at
        if event.name == PROBE_COMMAND:
            self._answer(link, event.id, AnswerStatus.EXPIRED if expired else AnswerStatus.SUCCEEDED)
            return
        if event.dry_run or (event.path is Path.NEW and flag is CommandsFlag.DRY_RUN):
            if expired:
                self._answer(link, event.id, AnswerStatus.EXPIRED)
            elif (why := self._judge(event.name, event.params)) is None:
                self._answer(link, event.id, AnswerStatus.WOULD_EXECUTE)
            else:
                self._answer(link, event.id, AnswerStatus.WOULD_REFUSE, _detail("WOULD_REFUSE", why))
            return
        if (known := self._commands.get(event.id)) is not None:
            self._known_again(link, known)
            return
        if expired:
            self._answer(link, event.id, AnswerStatus.EXPIRED)
            return
        if flag not in _EXECUTES[event.path]:
            text = f"this device takes commands as {flag.value!r}, so not by the {event.path.value} side"
            self._answer(link, event.id, AnswerStatus.FAILED, _detail("WRONG_SIDE", text))
            return
        if len(self._executing) >= self.settings.executing_max:
            text = f"{len(self._executing)} commands are being executed; send it again later"
            self._answer(link, event.id, AnswerStatus.FAILED, _detail("BUSY", text))
            return
        kept = CommandRecord(
            id=event.id, path=event.path, at=self._clock.time(now), expires_at=event.expires_at
        )
        self._commands[event.id] = kept
        self._executing.add(event.id)
        self._persist(
            CommandKept(kept),
            then=(
                AnswerCommand(event.path, event.id, AnswerStatus.ACKNOWLEDGED, b"{}"),
                Execute(event.id, event.name, event.params),
            ),
        )

    def _awaits_time(self, now: float) -> bool:
        """Whether the new side is about to tell its time: what waited there for the device comes before."""
        return (
            self._asked_time
            and not self._clock.known
            and self._new.state is LinkState.UP
            and now - self._new.connecting_since < self.settings.acked_within_s
            and len(self._early) < self.settings.owed_max
        )

    def _judge_early(self, now: float) -> None:
        """The time is known, or will not be: decide on what came before."""
        early, self._early = self._early, []
        for event in early:
            self._commanded(event, now)

    def _known_again(self, link: _Link, known: CommandRecord) -> None:
        """A second copy: by the same path it gets the first one's answer again, by the other `duplicate`."""
        self.duplicates += 1
        if known.path is not link.path:
            text = f"the first copy came by the {known.path.value} side"
            self._answer(link, known.id, AnswerStatus.DUPLICATE, _detail("DUPLICATE", text))
        elif known.status is not None and known.id not in self._executing:
            self._answer(link, known.id, known.status, known.detail)
        elif link.ready:
            self._out.append(AnswerCommand(link.path, known.id, AnswerStatus.ACKNOWLEDGED, b"{}"))

    def _finished(self, event: CommandFinished) -> None:
        known = self._commands.get(event.id)
        if known is None or known.status is not None:
            return
        status = AnswerStatus.SUCCEEDED if event.ok else AnswerStatus.FAILED
        done = msgspec.structs.replace(known, status=status, detail=event.detail)
        self._commands[event.id] = done
        self._persist(CommandKept(done))
        self._outcomes.append((self._token, event.id))

    def _answer(self, link: _Link, id_: str, status: AnswerStatus, detail: bytes = b"{}") -> None:
        """Owe a final answer until the side has acknowledged it; `_settle` sends it."""
        link.owed.pop(id_, None)
        if len(link.owed) >= self.settings.owed_max:
            del link.owed[next(iter(link.owed))]
        link.owed[id_] = (status, detail, None)

    def _answer_acked(self, event: AnswerAcked) -> None:
        link = self._links[event.path]
        self._served(link)
        owed = link.owed.get(event.id)
        if owed is None or owed[0] is not event.status:
            return
        del link.owed[event.id]
        known = self._commands.get(event.id)
        if known is not None and known.path is event.path and known.status is event.status:
            if not known.answered:
                self._commands[event.id] = known = msgspec.structs.replace(known, answered=True)
                self._persist(CommandKept(known), wait=False)
        elif event.path is Path.NEW and known is None and event.status is AnswerStatus.SUCCEEDED:
            self._leg_done(Leg.COMMAND)  # only a probe succeeds without having been remembered

    def _send_owed(self, link: _Link, now: float) -> None:
        if not link.ready:
            return
        for id_, (status, detail, sent_at) in link.owed.items():
            if sent_at is not None:
                continue
            link.owed[id_] = (status, detail, now)
            self._out.append(AnswerCommand(link.path, id_, status, detail))

    # --- orders and the move ---

    def _ordered(self, path: Path, orders: Orders, now: float) -> None:
        record = self.record
        self._served(self._links[path])
        if not self.settings.updatable:
            if orders.epoch > 0 and self._links[path].ready:
                report = DeviceReport(
                    epoch=orders.epoch,
                    phase=DevicePhase.OLD,
                    flags=Flags(),
                    reason="unsupported: this firmware cannot be updated",
                )
                self._out.append(Report(path, report))
            return
        if orders.epoch <= record.epoch:
            if orders.epoch < record.epoch:
                self.stale_orders += 1
                if self._links[path].ready and self._report_token is None:
                    self._out.append(Report(path, self.report()))  # so that the side learns what holds
            return
        if (held := record.orders) is not None:
            # Where the new side is comes with the first order only, and is kept for the way out of a
            # stranding even when a later order needs no new side.
            orders = msgspec.structs.replace(
                orders, new=orders.new or held.new, credential=orders.credential or held.credential
            )
        same_place = held is not None and held.new == orders.new and held.credential == orders.credential
        if not orders.flags.needs_new:
            self._move(Cause.ORDERED_OLD, orders=orders, flags=orders.flags)
        elif record.phase is DevicePhase.MOVED and same_place and self._new.down_since is None:
            self._move(Cause.ORDERED_WHILE_SERVED, orders=orders, flags=orders.flags)
        else:
            self._legs.clear()
            self._legs_at = now
            self._connect_reason = ""
            self._move(Cause.ORDERED_NEW, orders=orders, try_started_at=now)
            if orders.new is None or orders.credential is None:
                self._back(Cause.TRY_FAILED, "try failed: the order names no endpoint or no credential")
            elif not same_place and self._new.state is not LinkState.DOWN:
                self._out.append(Close(Path.NEW))
                self._down(self._new, "the new side moved", now)
                self._new.attempts, self._new.retry_at = 0, now
            elif self._new.state is LinkState.DOWN:
                self._new.attempts, self._new.retry_at = 0, now

    def _shadow_answered(self, event: ShadowAnswered, now: float) -> None:
        if event.time_s is not None:
            self._clock.told(event.time_s, now)
        self._asked_time = False
        if event.orders is not None:
            self._ordered(Path.NEW, event.orders, now)
        if event.ok:
            self._served(self._new)
            self._leg_done(Leg.SHADOW)

    def _leg_done(self, leg: Leg) -> None:
        if self.record.phase is not DevicePhase.TRYING or self._new.state is not LinkState.UP:
            return
        self._legs.add(leg)
        if len(self._legs) == len(Leg):
            assert self.record.orders is not None
            self._move(Cause.TRY_SUCCEEDED, flags=self.record.orders.flags)

    def _back(self, cause: Cause, reason: str) -> None:
        self._move(cause, flags=Flags(), reason=reason)

    def _move(
        self,
        cause: Cause,
        *,
        orders: Orders | None = None,
        flags: Flags | None = None,
        reason: str = "",
        try_started_at: float | None = None,
    ) -> None:
        """The only place where the phase changes. The change is stored, then reported by every link."""
        before = self.record
        if (phase := MOVES[before.phase].get(cause)) is None:
            raise IllegalMove(f"{cause.value} in phase {before.phase.value}")
        self.record = Record(
            epoch=orders.epoch if orders else before.epoch,
            phase=phase,
            flags=flags if flags is not None else before.flags,
            reason=reason,
            orders=orders or before.orders,
            try_started_at=try_started_at,
            served_at=_place(before.orders) if cause is Cause.TRY_SUCCEEDED else before.served_at,
        )
        self._persist(RecordChanged(self.record))
        self._report_token = self._token
        if self._old.down_since is not None and phase is not before.phase:
            # Nobody may have needed the old side until now: count its absence from here.
            self._old.down_since = self._now
        if self.record.flags.telemetry is not before.flags.telemetry:
            self._demand_changed()

    # --- links ---

    @property
    def _knows_new(self) -> bool:
        return _place(self.record.orders) is not None or self.record.served_at is not None

    def _wants(self, now: float) -> tuple[bool, bool]:
        """Whether the old and the new link are wanted now."""
        record = self.record
        known = self._knows_new
        if record.phase is DevicePhase.MOVED:
            if _closes_old(record.flags):
                # The old link closes once the new one serves; until then, and while the new one is lost
                # for less than the limit, it stays as it is.
                return self._old.wanted and self._new.down_since is not None, True
            return True, True
        if record.phase is DevicePhase.TRYING:
            return True, known
        stranded = (
            self._old.down_since is not None and now - self._old.down_since >= self.settings.stranded_after_s
        )
        return True, known and stranded

    def _place(self, attempt: int) -> Place:
        """Where to look for the new side. Without an old side, and with a newest order that may name a wrong
        place, every other attempt goes to where the device was served before."""
        named, known = _place(self.record.orders), self.record.served_at
        stranded = self.record.phase in (DevicePhase.OLD, DevicePhase.WENT_BACK)
        place = known if named is None or (stranded and known is not None and attempt % 2) else named
        assert place is not None
        return place

    def _ended(self, link: _Link, reason: str, now: float) -> None:
        if link.state is not LinkState.DOWN:
            self._down(link, reason, now)

    def _connected(self, link: _Link, now: float) -> None:
        if link.state is not LinkState.CONNECTING:
            self._out.append(Close(link.path))
            return
        link.state = LinkState.UP
        self._arm(now + self.settings.acked_within_s)
        if link is self._old:
            self._ready(link)
        else:
            self._out.append(SubscribeNew())
            link.connecting_since = now
            self._asked_time = True
        self._pump(link, now)

    def _subscribed(self, granted: bool, now: float) -> None:
        if self._new.state is not LinkState.UP:
            return
        if not granted:
            self._out.append(Close(Path.NEW))
            self._down(self._new, "subscription refused", now)
            return
        self._ready(self._new)
        self._out.append(ShadowGet())
        if self.record.phase is DevicePhase.TRYING:
            self._legs_at = now + self.settings.retry_legs_s
            self._try_telemetry(now)

    def _try_telemetry(self, now: float) -> None:
        body = msgspec.json.encode({"epoch": self.record.epoch})
        self._out.append(SendTryTelemetry(TRY_CHANNEL, round(now * 1000), body))

    def _ready(self, link: _Link) -> None:
        link.ready = True
        if self.record.epoch and self._report_token is None:
            self._out.append(Report(link.path, self.report()))

    def _served(self, link: _Link) -> None:
        """There is evidence that the side serves this device; being connected is none."""
        if link.state is LinkState.UP:
            link.down_since = None
            link.attempts = 0
            if link is self._new and self.record.starts_unserved:
                self._note_starts(0)

    def _down(self, link: _Link, reason: str, now: float) -> None:
        if link.down_since is None:
            link.down_since = now
        if link is self._new and reason:
            self._connect_reason = reason
        link.state = LinkState.DOWN
        link.ready = False
        if link is self._new:
            self._doubt_kept()
        link.in_flight.clear()
        link.retry_at = now + self._backoff(link.attempts)
        link.attempts += 1
        link.unwanted_since = None
        for id_, (status, detail, _) in link.owed.items():
            link.owed[id_] = (status, detail, None)
        self._requeue(link)

    def _backoff(self, attempts: int) -> float:
        """Doubling, at most `backoff_max_s`, spread over half to the whole of it."""
        s = self.settings
        return min(s.backoff_max_s, s.backoff_s * 2.0 ** min(attempts, 20)) * (0.5 + self._chance() / 2)

    def _tend(self, link: _Link, now: float) -> None:
        """Make or end the link as it is wanted."""
        if link.wanted:
            link.unwanted_since = None
            if link.state is LinkState.DOWN and now >= link.retry_at:
                if link is self._old:
                    self._out.append(ConnectOld())
                else:
                    place = self._place(link.attempts)
                    self._out.append(ConnectNew(place.endpoint, place.credential))
                link.state, link.connecting_since = LinkState.CONNECTING, now
            elif link.state is LinkState.CONNECTING and (
                now - link.connecting_since >= self.settings.connect_within_s
            ):
                self._out.append(Close(link.path))
                self._down(link, f"no answer within {self.settings.connect_within_s:g} s", now)
            elif link.state is LinkState.UP and self._overdue(link, now):
                # Lost since it last owed something, not since that was noticed.
                if link.down_since is None:
                    link.down_since = self._owed_since(link)
                self._out.append(Close(link.path))
                self._down(link, f"no acknowledgement within {self.settings.acked_within_s:g} s", now)
        elif link.state is not LinkState.DOWN:
            if link.unwanted_since is None:
                link.unwanted_since = now
            busy = link.ready and (
                self._report_token is not None
                or bool(link.owed)
                or any(self._commands[id_].path is link.path for id_ in self._executing)
            )
            if not busy or now - link.unwanted_since >= self.settings.linger_s:
                self._out.append(Close(link.path))
                self._down(link, "", now)
                link.attempts, link.retry_at = 0, now

    def _overdue(self, link: _Link, now: float) -> bool:
        since = self._owed_since(link)
        return since is not None and now - since >= self.settings.acked_within_s

    def _owed_since(self, link: _Link) -> float | None:
        """Since when the other end has owed us something: an acknowledgement, or the subscription."""
        since: float | None = None
        if link is self._new and not link.ready:
            since = link.connecting_since
        if link.in_flight:
            sent_at = next(iter(link.in_flight.values()))[1]
            since = sent_at if since is None else min(since, sent_at)
        for _, _, sent in link.owed.values():
            if sent is not None:
                return sent if since is None else min(since, sent)
        return since

    # --- what follows from state and time ---

    def _settle(self, now: float) -> None:
        record, s = self.record, self.settings
        if record.phase is DevicePhase.TRYING:
            self._tend_try(now)
        elif record.phase is DevicePhase.MOVED and (since := self._new.down_since) is not None:
            assert record.orders is not None
            if now - since >= _limit(record.orders.new_lost_limit_s):
                why = f": {self._connect_reason}" if self._connect_reason else ""
                self._back(Cause.NEW_LOST, f"new side lost for {now - since:.0f} s{why}")
        if self._early and not self._awaits_time(now):
            self._judge_early(now)
        if now >= self._health_at:
            self._health_at = now + s.health_every_s
            self._health(now)
            self._forget(now)
        self._old.wanted, self._new.wanted = self._wants(now)
        for link in (self._old, self._new):
            self._send_owed(link, now)
            self._tend(link, now)
            self._pump(link, now)
        self._arm(self._next_deadline(now))

    def _tend_try(self, now: float) -> None:
        record = self.record
        assert record.orders is not None
        within = _limit(record.orders.try_within_s)
        started = record.try_started_at
        if started is None or started > now:
            # The clock was set back while the device was off: the try is not made longer by that.
            started = now
            self.record = msgspec.structs.replace(record, try_started_at=now)
        if now - started >= within:
            self._back(Cause.TRY_FAILED, self._why_the_try_failed(within))
        elif now >= self._legs_at:
            self._legs_at = now + self.settings.retry_legs_s
            if self._new.ready:
                if Leg.SHADOW not in self._legs:
                    self._out.append(ShadowGet())
                if Leg.TELEMETRY not in self._legs:
                    self._try_telemetry(now)

    def _why_the_try_failed(self, within: float) -> str:
        if self._new.state is not LinkState.UP:
            return f"try failed: no connection within {within:g} s: {self._connect_reason or 'no answer'}"
        missing = ", ".join(leg.value for leg in Leg if leg not in self._legs)
        return f"try failed: no round trip of {missing} within {within:g} s"

    def _next_deadline(self, now: float) -> float:
        s, at = self.settings, self._health_at
        for link in (self._old, self._new):
            if link.state is LinkState.CONNECTING:
                at = min(at, link.connecting_since + s.connect_within_s)
            elif link.state is LinkState.DOWN and link.wanted:
                at = min(at, link.retry_at)
            elif link.wanted and (since := self._owed_since(link)) is not None:
                at = min(at, since + s.acked_within_s)
            if link.unwanted_since is not None:
                at = min(at, link.unwanted_since + s.linger_s)
        record = self.record
        if record.phase is DevicePhase.TRYING and record.orders is not None:
            started = record.try_started_at if record.try_started_at is not None else now
            at = min(at, started + _limit(record.orders.try_within_s), self._legs_at)
        elif record.phase is DevicePhase.MOVED and self._new.down_since is not None:
            assert record.orders is not None
            at = min(at, self._new.down_since + _limit(record.orders.new_lost_limit_s))
        elif self._old.down_since is not None and self._knows_new and not self._new.wanted:
            at = min(at, self._old.down_since + s.stranded_after_s)
        return at

    def _arm(self, at: float) -> None:
        if at < self._timer_at:
            self._timer_at = at
            self._out.append(SetTimer(at))

    def _forget(self, now: float) -> None:
        if not (self._old.ready or self._new.ready):
            return  # nobody is there to tell the time, and a wrong clock must not make ids forgotten early
        limit = self._clock.time(now) - self.settings.remember_commands_s
        old = [c.id for c in self._commands.values() if max(c.at, c.expires_at) < limit and c.status]
        for id_ in old:
            path = self._commands.pop(id_).path
            self._links[path].owed.pop(id_, None)
        if old:
            self._persist(*map(CommandForgotten, old), wait=False)

    def _jumped(self, by: float) -> None:
        """The clock was set on (or, below 0, back) by so much: what was due in ten seconds still is.

        A device that stood still for a while looks the same, and the same is right: nobody had the time to
        answer it meanwhile.
        """
        for link in (self._old, self._new):
            link.retry_at += by
            link.connecting_since += by
            if link.down_since is not None:
                link.down_since += by
            if link.unwanted_since is not None:
                link.unwanted_since += by
            link.in_flight = {key: (held, at + by) for key, (held, at) in link.in_flight.items()}
            for id_, (status, detail, sent_at) in link.owed.items():
                link.owed[id_] = (status, detail, None if sent_at is None else sent_at + by)
        self._kept = deque((at + by, held) for at, held in self._kept)
        self._clock.jumped(by)
        self._legs_at += by
        self._timer_at += by
        self._health_at += by
        self._started_at += by
        if self.record.try_started_at is not None:
            self.record = msgspec.structs.replace(self.record, try_started_at=self.record.try_started_at + by)
            if self.record.phase is DevicePhase.TRYING:
                self._persist(RecordChanged(self.record), wait=False)

    # --- persist before act ---

    def _persist(self, *changes: Change, then: tuple[Action, ...] = (), wait: bool = True) -> None:
        self._token += 1
        self._out.append(Persist(self._token, changes, wait))
        if then:
            self._waiting.append((self._token, then))

    def _on_stored(self, token: int) -> None:
        self._stored = max(self._stored, token)
        while self._waiting and self._waiting[0][0] <= self._stored:
            for action in self._waiting.popleft()[1]:
                if not isinstance(action, AnswerCommand) or self._links[action.path].ready:
                    self._out.append(action)
        while self._outcomes and self._outcomes[0][0] <= self._stored:
            self._tell_outcome(self._outcomes.popleft()[1])
        if self._report_token is not None and self._report_token <= self._stored:
            self._tell_report()

    def _tell_outcome(self, id_: str) -> None:
        done = self._commands[id_]
        self._executing.discard(id_)
        if done.status is not None:
            self._answer(self._links[done.path], id_, done.status, done.detail)

    def _tell_report(self) -> None:
        self._report_token = None
        for link in (self._old, self._new):
            if link.ready:
                self._out.append(Report(link.path, self.report()))

    def _on_stored_alone(self, token: int) -> None:
        """A full disk takes no telemetry, but it has taken this: what waited for it alone goes on."""
        for waiting in [one for one in self._waiting if one[0] == token]:
            self._waiting.remove(waiting)
            self._out += [
                one for one in waiting[1] if not isinstance(one, AnswerCommand) or self._links[one.path].ready
            ]
        for outcome in [one for one in self._outcomes if one[0] == token]:
            self._outcomes.remove(outcome)
            self._tell_outcome(outcome[1])
        if self._report_token is not None and self._report_token == token:
            self._tell_report()


def _closes_old(flags: Flags) -> bool:
    """A closed old link together with work for the old side would strand that work: then it stays open."""
    return flags.link is LinkFlag.NEW and _DEMAND[flags.telemetry] == 2 and flags.commands is CommandsFlag.NEW


def _place(orders: Orders | None) -> Place | None:
    if orders is None or orders.new is None:
        return None
    return Place(orders.new, orders.credential or "")


def _limit(seconds: float) -> float:
    """An order's limit, kept within what lets a device come back: a second to an hour."""
    return min(max(seconds, 1.0), 3600.0)


def _detail(code: str, reason: str) -> bytes:
    detail: dict[str, Any] = {"code": code, "reason": reason}
    return msgspec.json.encode(detail)
