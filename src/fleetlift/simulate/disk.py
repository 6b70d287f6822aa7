"""A device's disk: what is on it survives a reboot, what was not yet written is lost."""

from collections.abc import Callable

from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.simulate.clock import Clock

GATHER_S = 0.01  # how long the first change of a transaction waits for others
RETRY_S = 1.0  # after the disk has refused


class Disk:
    """`write` notes changes; they are on disk together a little later, and then `stored(token)` is called."""

    def __init__(self, clock: Clock) -> None:
        self.full = False
        self.record = m.Record()
        self.next_seq: dict[str, int] = {}
        self.outbox: dict[tuple[str, int], m.Entry] = {}
        self.commands: dict[str, m.CommandRecord] = {}
        self.kept: dict[str, RangeSet] = {}  # the numbers of all messages that were ever on disk
        self.epochs: list[int] = [0]  # every epoch that was ever applied, in order
        self._clock = clock
        self._waiting: list[m.Change] = []
        self._token: int | None = None
        self._stored: Callable[[int], None] = lambda token: None
        self._due = False
        self._life = 0

    def load(self) -> m.Saved:
        return m.Saved(
            record=self.record,
            next_seq=dict(self.next_seq),
            outbox=tuple(self.outbox[key] for key in sorted(self.outbox)),
            commands=tuple(self.commands[id_] for id_ in sorted(self.commands)),
        )

    def write(self, changes: tuple[m.Change, ...], token: int | None, stored: Callable[[int], None]) -> None:
        self._waiting += changes
        if token is not None:
            self._token, self._stored = token, stored
        if not self._due:
            self._due = True
            self._clock.after(GATHER_S, self._flush, self._life)

    def waiting(self) -> dict[str, RangeSet]:
        """The numbers in the outbox, by channel."""
        found: dict[str, RangeSet] = {}
        for channel, seq in self.outbox:
            found.setdefault(channel, RangeSet()).add(seq)
        return found

    def power_off(self) -> None:
        """What waits is lost."""
        self._life += 1
        self._waiting, self._token, self._due = [], None, False

    def _flush(self, life: int) -> None:
        if life != self._life:
            return
        if self.full:
            self._clock.after(RETRY_S, self._flush, life)
            return
        self._due = False
        changes, self._waiting = self._waiting, []
        for change in changes:
            self._apply(change)
        token, self._token = self._token, None
        if token is not None:
            self._stored(token)

    def _apply(self, change: m.Change) -> None:
        kind = type(change)
        if kind is m.EntryAdded:
            entry = change.entry  # type: ignore[union-attr]
            self.outbox[entry.channel, entry.seq] = entry
            self.next_seq[entry.channel] = entry.seq + 1
            if (kept := self.kept.get(entry.channel)) is None:
                kept = self.kept[entry.channel] = RangeSet()
            kept.add(entry.seq)
        elif kind is m.EntryDropped:
            self.outbox.pop((change.channel, change.seq), None)  # type: ignore[union-attr]
        else:
            match change:
                case m.RecordChanged(record):
                    self.record = record
                    self.epochs.append(record.epoch)
                case m.CommandKept(command):
                    self.commands[command.id] = command
                case m.CommandForgotten(id_):
                    self.commands.pop(id_, None)
