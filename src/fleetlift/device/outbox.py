"""The outbox of telemetry: each message is kept until every path that is asked for has acknowledged it."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from fleetlift.core.orders import TelemetryFlag
from fleetlift.device.actions import Actions
from fleetlift.device.link import Link
from fleetlift.device.messages import (
    Change,
    Entry,
    EntryAdded,
    EntryDropped,
    LinkState,
    Path,
    Persist,
    SendTelemetry,
)
from fleetlift.device.settings import AgentSettings

Key = tuple[str, int]

# Sets of paths are bits here: every measurement goes through this.
_OLD: Final = 1
_NEW: Final = 2
_DEMAND: Final = {TelemetryFlag.OLD: _OLD, TelemetryFlag.BOTH: _OLD | _NEW, TelemetryFlag.NEW: _NEW}


class _Held:
    """An entry of the outbox, with the paths that have acknowledged it and the token that stores it."""

    __slots__ = ("acked", "entry", "gone", "kept", "token")

    def __init__(self, entry: Entry, token: int) -> None:
        self.entry, self.token = entry, token
        self.acked = 0
        self.gone = False
        self.kept = False  # nobody waits for it any more, but a power cut may make it needed again


class _Lane:
    """What one path has yet to send, in order, and what it has sent and waits for."""

    __slots__ = ("bit", "in_flight", "queue")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.queue: deque[_Held] = deque()
        self.in_flight: dict[Key, tuple[_Held, float]] = {}  # with the time at which it was sent


class Outbox:
    """Entries in the order of production, and how far each path has got with them."""

    def __init__(self, settings: AgentSettings, actions: Actions) -> None:
        self.refused = 0  # telemetry that found the outbox full
        self.shed = 0  # messages given up on one path because the outbox was full; the other path has them
        self.acked_by = {Path.OLD: 0, Path.NEW: 0}
        self.next_seq: dict[str, int] = {}
        self._settings = settings
        self._actions = actions
        self._held: dict[Key, _Held] = {}
        self._old, self._new = _Lane(_OLD), _Lane(_NEW)
        self._lanes: Mapping[Path, _Lane] = {Path.OLD: self._old, Path.NEW: self._new}
        self._demand = _OLD
        self._kept: deque[tuple[float, _Held]] = deque()  # with the time at which the last path acknowledged
        self._kept_count = 0
        self._partly = 0  # entries that at least one path has acknowledged

    @property
    def depth(self) -> int:
        return len(self._held) - self._kept_count

    def keys(self) -> Iterable[Key]:
        return [key for key, held in self._held.items() if not held.kept]

    def started(self, entries: Iterable[Entry], next_seq: Mapping[str, int], flag: TelemetryFlag) -> None:
        self.next_seq = dict(next_seq)
        self._demand = _DEMAND[flag]
        for entry in entries:
            self._held[entry.channel, entry.seq] = _Held(entry, 0)
            # A counter may not fall behind the messages that it has numbered.
            self.next_seq[entry.channel] = max(self.next_seq.get(entry.channel, 1), entry.seq + 1)
        self._requeue(self._old)
        self._requeue(self._new)

    # --- in, out, acknowledged ---

    def produce(self, channel: str, body: bytes, now: float) -> None:
        if len(body) > self._settings.body_max or not self._room():
            self.refused += 1
            return
        seq = self.next_seq.get(channel, 1)
        self.next_seq[channel] = seq + 1
        entry = Entry(channel, seq, round(now * 1000), body)
        actions = self._actions
        actions.token = token = actions.token + 1
        held = _Held(entry, token)
        self._held[channel, seq] = held
        if self._demand & _OLD:
            self._old.queue.append(held)
        if self._demand & _NEW:
            self._new.queue.append(held)
        actions.out.append(Persist(token, (EntryAdded(entry),)))

    def pump(self, link: Link, now: float) -> None:
        """Send what is stored, as far as the window lets it."""
        if link.state is not LinkState.UP:
            return
        lane = self._lanes[link.path]
        if not self._demand & lane.bit:
            return
        queue, in_flight, actions = lane.queue, lane.in_flight, self._actions
        while queue and len(in_flight) < self._settings.window:
            held = queue[0]
            if held.token > actions.stored:
                break
            queue.popleft()
            if held.gone:
                continue
            entry = held.entry
            if not in_flight:
                actions.arm(now + self._settings.acked_within_s)
            in_flight[entry.channel, entry.seq] = (held, now)
            actions.out.append(SendTelemetry(link.path, entry.channel, entry.seq, entry.ts_ms, entry.body))

    def acked(self, link: Link, keys: Iterable[Key], now: float) -> None:
        lane = self._lanes[link.path]
        bit = lane.bit
        dropped: list[Change] = []
        for key in keys:
            lane.in_flight.pop(key, None)
            if (held := self._held.get(key)) is None or held.acked & bit:
                continue
            self._partly += held.acked == 0
            held.acked |= bit
            self.acked_by[link.path] += 1
            # The old side may acknowledge late what nobody waits for any more, and what is kept already.
            if held.acked & self._demand == self._demand and not held.kept:
                if self._demand & _NEW and self._settings.keep_acked_s > 0:
                    held.kept = True
                    self._kept_count += 1
                    self._kept.append((now, held))
                else:
                    dropped.append(self._leave(held))
        if lane is self._new:
            # It lives, so what it acknowledged a while ago is on its disk by now.
            while self._kept and self._kept[0][0] <= now - self._settings.keep_acked_s:
                if not (held := self._kept.popleft()[1]).gone:
                    dropped.append(self._leave(held))
        if dropped:
            self._actions.persist(*dropped, wait=False)
        self.pump(link, now)

    def _room(self) -> bool:
        """Whether the outbox takes one more. When it is full, a message that at least one side has stored
        makes room, oldest first; without such a message new telemetry is refused, never old dropped."""
        if len(self._held) < self._settings.outbox_max:
            return True
        if not self._partly:
            return False
        held = next(held for held in self._held.values() if held.acked)
        self.shed += not held.kept
        self._actions.persist(self._leave(held), wait=False)
        return True

    def _leave(self, held: _Held) -> EntryDropped:
        key = (held.entry.channel, held.entry.seq)
        del self._held[key]
        held.gone = True
        self._kept_count -= held.kept
        self._partly -= held.acked != 0
        return EntryDropped(*key)

    # --- when links and flags change ---

    def demand(self, flag: TelemetryFlag) -> None:
        """The flags name other paths now. Entries leave once those have acknowledged; the others go on,
        in order, by every path that is asked for and lacks them."""
        self._demand = _DEMAND[flag]
        self._unkeep()
        done = [held for held in self._held.values() if held.acked & self._demand == self._demand]
        if done:
            self._actions.persist(*[self._leave(held) for held in done], wait=False)
        self._requeue(self._old)
        self._requeue(self._new)

    def lost(self, path: Path) -> None:
        """The link is down: what was sent and not acknowledged goes again."""
        lane = self._lanes[path]
        if lane is self._new:
            self._doubt_kept()
        lane.in_flight.clear()
        self._requeue(lane)

    def _doubt_kept(self) -> None:
        """The new side is lost, perhaps by a power cut, and with it what it acknowledged last: all that is
        kept goes again. Should it be there, its seq says that it came twice."""
        for held in self._unkeep():
            held.acked &= ~_NEW
            self._partly -= held.acked == 0
            self.acked_by[Path.NEW] -= 1

    def _unkeep(self) -> list[_Held]:
        """Let go of what is kept: it is in the outbox like everything else there."""
        kept = [held for _, held in self._kept if not held.gone]
        for held in kept:
            held.kept = False
        self._kept.clear()
        self._kept_count = 0
        return kept

    def _requeue(self, lane: _Lane) -> None:
        if not self._demand & lane.bit:
            lane.queue = deque()
            return
        lane.queue = deque(
            held
            for key, held in self._held.items()
            if not held.acked & lane.bit and key not in lane.in_flight
        )

    # --- time ---

    def awaits_since(self, path: Path) -> float | None:
        """Since when this path has awaited an acknowledgement."""
        for _, sent_at in self._lanes[path].in_flight.values():
            return sent_at
        return None

    def jumped(self, by_s: float) -> None:
        for lane in (self._old, self._new):
            lane.in_flight = {key: (held, at + by_s) for key, (held, at) in lane.in_flight.items()}
        self._kept = deque((at + by_s, held) for at, held in self._kept)
