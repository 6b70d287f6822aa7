"""The disk of one device agent, or of thousands in a process: state, counters, outbox, executed commands.

One SQLite file a process, one transaction for all that came together within a few milliseconds. By default
it survives the process being killed at any moment; with `durable=True` a power cut as well (one fsync a
transaction). A disk that takes nothing leaves everything unstored, so agents send and execute nothing more
until it does again; their outboxes fill up and then refuse new telemetry. A disk that is full takes what
needs no more room: entries leave the outbox, so that others find their place, and orders are kept.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.device.messages import (
    Change,
    CommandForgotten,
    CommandKept,
    CommandRecord,
    Entry,
    EntryAdded,
    EntryDropped,
    Record,
    RecordChanged,
    Saved,
)
from fleetlift.log import get_logger

log = get_logger(__name__)

GATHER_S = 0.005  # how long the first change of a transaction waits for others
RETRY_S = 1.0  # after the disk has refused a transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (device TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (
  device TEXT, channel TEXT, next_seq INTEGER NOT NULL, PRIMARY KEY (device, channel)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
  device TEXT, channel TEXT, seq INTEGER, ts_ms INTEGER NOT NULL, body BLOB NOT NULL,
  PRIMARY KEY (device, channel, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS command (
  device TEXT, id TEXT, record BLOB NOT NULL, PRIMARY KEY (device, id)) WITHOUT ROWID;
"""
_VERSION = 1

Schedule = Callable[[float, Callable[[], None]], object]


class Journal:
    """`write` notes changes; they are stored together a little later, by `schedule(delay_s, call)`.

    Raises Conflict when another process has the directory.
    """

    def __init__(self, directory: Path, *, schedule: Schedule, durable: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = directory / "device.db"
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # it holds credentials
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0.2)
        try:
            # Exclusive: the file is this process's alone until it ends, however it ends.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
            self._db.executescript(_SCHEMA)
            if self._db.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                # Only then: a full disk would not take it, and must not keep a device from starting.
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.OperationalError as exc:
            self._db.close()
            raise Conflict(
                f"{directory} cannot be used ({exc}): stop the process that has it, or name another directory"
            ) from exc
        self._schedule = schedule
        self._due = False
        self._failing = False
        self._changes: list[tuple[str, Change]] = []
        self._stored: list[Callable[[], None]] = []
        self._alone: list[Callable[[], None]] = []

    def load(self, device: str) -> Saved:
        """What an agent starts from."""
        rows = self._db.execute("SELECT record FROM state WHERE device = ?", (device,)).fetchall()
        counters = self._db.execute("SELECT channel, next_seq FROM counter WHERE device = ?", (device,))
        entries = self._db.execute(
            "SELECT channel, seq, ts_ms, body FROM outbox WHERE device = ? ORDER BY channel, seq", (device,)
        )
        commands = self._db.execute("SELECT record FROM command WHERE device = ? ORDER BY id", (device,))
        return Saved(
            record=msgspec.json.decode(rows[0][0], type=Record) if rows else Record(),
            next_seq=dict(counters.fetchall()),
            outbox=tuple(Entry(*row) for row in entries),
            commands=tuple(msgspec.json.decode(row[0], type=CommandRecord) for row in commands),
        )

    def write(
        self,
        device: str,
        changes: Iterable[Change],
        stored: Callable[[], None] | None = None,
        alone: Callable[[], None] | None = None,
    ) -> None:
        """Store `changes` in order, then call `stored`.

        When the disk is full, changes that need no more room overtake entries for the outbox: `alone` is
        called as soon as these are stored, and `stored` once everything before them is too.
        """
        self._changes += [(device, change) for change in changes]
        if stored is not None:
            self._stored.append(stored)
        if alone is not None:
            self._alone.append(alone)
        if not self._due:
            self._due = True
            self._schedule(GATHER_S, self.flush)

    def flush(self) -> None:
        """Store now all that has been written. What the disk refuses is tried again later."""
        self._due = False
        calls: list[Callable[[], None]] = []
        if self._changes:
            if (problem := self._try(self._changes)) is None:
                self._failing = False
                self._changes, self._alone = [], []
                calls, self._stored = self._stored, []
            else:
                if not self._failing:
                    log.error("device_disk_failed", error=str(problem), changes=len(self._changes))
                self._failing = self._due = True
                growing, others = _parted(self._changes)
                if others and self._try(others) is None:
                    self._changes = growing
                    calls, self._alone = self._alone, []
                self._schedule(RETRY_S, self.flush)
        else:
            calls, self._stored, self._alone = self._stored, [], []
        for call in calls:
            call()

    def _try(self, changes: Sequence[tuple[str, Change]]) -> sqlite3.Error | None:
        """Commit `changes`, or nothing of them and return why."""
        try:
            self._commit(changes)
        except sqlite3.Error as problem:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            return problem
        return None

    def _commit(self, changes: Sequence[tuple[str, Change]]) -> None:
        added: dict[tuple[str, str, int], tuple[int, bytes]] = {}
        dropped: list[tuple[str, str, int]] = []
        counters: dict[tuple[str, str], int] = {}
        records: dict[str, Record] = {}
        commands: dict[tuple[str, str], CommandRecord | None] = {}
        for device, change in changes:
            match change:
                case EntryAdded(entry):
                    added[device, entry.channel, entry.seq] = (entry.ts_ms, entry.body)
                    counters[device, entry.channel] = entry.seq + 1
                case EntryDropped(channel, seq):
                    key = (device, channel, seq)
                    if added.pop(key, None) is None:
                        dropped.append(key)
                case RecordChanged(record):
                    records[device] = record
                case CommandKept(command):
                    commands[device, command.id] = command
                case CommandForgotten(id_):
                    commands[device, id_] = None
        db = self._db
        encode = msgspec.json.encode
        db.execute("BEGIN IMMEDIATE")
        # What leaves goes first: on a full disk it makes the room for what comes.
        db.executemany("DELETE FROM outbox WHERE device = ? AND channel = ? AND seq = ?", dropped)
        # OR REPLACE: a commit that failed may have been one that the disk has taken all the same.
        db.executemany(
            "INSERT OR REPLACE INTO outbox VALUES (?,?,?,?,?)", [(*key, *row) for key, row in added.items()]
        )
        db.executemany(
            "INSERT OR REPLACE INTO counter VALUES (?,?,?)", [(*k, n) for k, n in counters.items()]
        )
        db.executemany(
            "INSERT OR REPLACE INTO state VALUES (?,?)", [(d, encode(r)) for d, r in records.items()]
        )
        db.executemany(
            "INSERT OR REPLACE INTO command VALUES (?,?,?)",
            [(*key, encode(command)) for key, command in commands.items() if command is not None],
        )
        db.executemany(
            "DELETE FROM command WHERE device = ? AND id = ?",
            [key for key, command in commands.items() if command is None],
        )
        db.execute("COMMIT")

    def close(self) -> None:
        """Store what is left and let go of the file. Raises Unavailable when the disk refuses."""
        try:
            if self._changes:
                self._commit(self._changes)
                self._changes = []
        except sqlite3.Error as exc:
            raise Unavailable(f"the device's state could not be stored: {exc}") from exc
        finally:
            self._db.close()


def _parted(
    changes: Iterable[tuple[str, Change]],
) -> tuple[list[tuple[str, Change]], list[tuple[str, Change]]]:
    """What makes the outbox grow, and the rest; an entry that left before it was stored is in neither."""
    growing: dict[tuple[str, str, int], tuple[str, Change]] = {}
    others: list[tuple[str, Change]] = []
    for device, change in changes:
        match change:
            case EntryAdded(entry):
                growing[device, entry.channel, entry.seq] = (device, change)
            case EntryDropped(channel, seq) if growing.pop((device, channel, seq), None) is not None:
                pass
            case _:
                others.append((device, change))
    return list(growing.values()), others
