"""The legacy server's memory: one SQLite file, one thread that writes, one that reads.

The writing thread takes batches: whatever gathered while the last transaction was committed goes into the
next one. Everything the owner's feed tells is a row of `event`; its rowid is the feed's position.
"""

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.core import legacy as wire
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound, Unavailable
from fleetlift.core.identity import checked_device_id
from fleetlift.log import get_logger

log = get_logger(__name__)

KEY_CHARACTERS_MIN = 16
FEED_ITEMS_MAX = 1000
FEED_BYTES_MAX = 256 * 1024  # a batch ends after the item that passes this
UNANSWERED_GRACE_MS = 30_000  # a command that was delivered may be answered this long after its expiry
FORGET_ROWS = 5000  # deleted in one transaction

TELEMETRY, ANSWER, PRESENCE, REPORT = 1, 2, 3, 4

Work = Callable[[], object]
TelemetryRow = tuple[str, int, str, int, int, bytes]  # device, at_ms, channel, seq, ts_ms, body

_SCHEMA = Path(__file__).with_name("schema.sql")
_INSERT_TELEMETRY = (
    "INSERT INTO event (kind, device, at_ms, name, number, ts_ms, body)"
    f" VALUES ({TELEMETRY}, ?, ?, ?, ?, ?, ?)"
)
_LATE = (
    "state IN ('queued', 'sent', 'acknowledged')"
    " AND expires_at_ms <= ? - CASE state WHEN 'queued' THEN 0 ELSE ? END"
)


class HeldConfig(msgspec.Struct, frozen=True):
    revision: int
    document: bytes
    changed: bool = False


class SignedIn(msgspec.Struct, frozen=True):
    session: int
    config: HeldConfig | None


class DueCommand(msgspec.Struct, frozen=True):
    device: str
    session: int
    command: wire.Command


def key_hash(key: str) -> bytes:
    """Salt and digest. A fast hash will do: keys are long random strings, so there is nothing to guess."""
    salt = os.urandom(hashlib.blake2b.SALT_SIZE)
    return salt + hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest()


def key_matches(key: str, held: bytes) -> bool:
    salt, digest = held[:16], held[16:]
    return hmac.compare_digest(hashlib.blake2b(key.encode(), salt=salt, digest_size=32).digest(), digest)


def checked_key(key: str) -> str:
    if len(key) < KEY_CHARACTERS_MIN:
        raise BadInput(
            f"a device key needs at least {KEY_CHARACTERS_MIN} characters: give a longer random one"
        )
    return key


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """`text` parsed, when it is a JSON object of at most MAX_DOCUMENT_BYTES; else BadInput."""
    if len(text) > wire.MAX_DOCUMENT_BYTES:
        raise BadInput(f"{what} has {len(text)} bytes: at most {wire.MAX_DOCUMENT_BYTES} are taken")
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError) as exc:
        raise BadInput(f"{what} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BadInput(f"{what} must be a JSON object")
    return value


class Forgotten(Exception):
    """What follows a position of the feed is no longer kept; `first` is the oldest position that is."""

    def __init__(self, first: int) -> None:
        super().__init__(first)
        self.first = first


class Storage:
    """Queries of the legacy server. `apply` is called by one thread, the `read_…` methods by another."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)  # SQLite gives the files beside it the same mode
        self._write = _connect(path)
        # FULL: an acknowledged message outlives a power cut too, not only a killed process.
        self._write.execute("PRAGMA synchronous = FULL")
        self._write.executescript(_SCHEMA.read_text())
        self._read = _connect(path)
        self._read.execute("PRAGMA query_only = ON")
        self.last_position = _last_given(self._write)

    def close(self) -> None:
        self._read.close()
        self._write.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._write.close()

    def apply(self, batch: Sequence[Work]) -> list[object]:
        """Do the works in one transaction; their results, once that is on disk.

        A FleetError that a work raises (before it writes) is its result, and so is Unavailable when its rows
        could not be stored; then nothing of that work is stored.
        """
        try:
            results = self._transaction(batch)
        except Exception as exc:
            if len(batch) > 1:  # one of them may be at fault: the others go through alone
                return [self.apply([work])[0] for work in batch]
            log.error("legacy_write_failed", error=str(exc))
            return [Unavailable(f"the legacy server could not store it ({exc}); try again")]
        self.last_position = _last_given(self._write)
        return results

    def _transaction(self, batch: Sequence[Work]) -> list[object]:
        self._write.execute("BEGIN IMMEDIATE")
        try:
            results = [_outcome(work) for work in batch]
            self._write.execute("COMMIT")
        except BaseException:
            if self._write.in_transaction:
                self._write.execute("ROLLBACK")
            raise
        return results

    # ---- works: called within `apply` ----------------------------------------------------------------

    def add_telemetry(self, rows: Sequence[TelemetryRow]) -> None:
        self._write.executemany(_INSERT_TELEMETRY, rows)

    def register(self, device: str, hashed: bytes | None, attributes: bytes) -> None:
        """Create a device, or replace its attributes and, given one, its key."""
        checked_device_id(device)
        json_object(attributes, "attributes")
        known = self._write.execute("SELECT 1 FROM device WHERE id = ?", (device,)).fetchone()
        if hashed is None:
            if not known:
                raise BadInput(f"device {device} is new: give it a key")
            self._write.execute(
                "UPDATE device SET attributes = ? WHERE id = ?", (attributes.decode(), device)
            )
            return
        self._write.execute(
            "INSERT INTO device (id, key_hash, attributes) VALUES (?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET key_hash = excluded.key_hash, attributes = excluded.attributes",
            (device, hashed, attributes.decode()),
        )

    def sign_in(self, device: str, firmware: str, at_ms: int, reason: str) -> SignedIn:
        """A device is there: what it may have missed is queued anew, and its configuration is handed out."""
        (session,) = self._write.execute(
            "UPDATE device SET session = session + 1, connected = 1, since_ms = ?1, firmware = ?2,"
            " first_seen_ms = coalesce(first_seen_ms, ?1) WHERE id = ?3 RETURNING session",
            (at_ms, firmware, device),
        ).fetchone()
        self._write.execute(
            "UPDATE command SET state = 'queued' WHERE device = ? AND state IN ('sent', 'acknowledged')",
            (device,),
        )
        self._add_event(PRESENCE, device, at_ms, name=reason, number=1)
        row = self._write.execute(
            "SELECT revision, document FROM config WHERE device = ?", (device,)
        ).fetchone()
        return SignedIn(session, HeldConfig(*row) if row else None)

    def sign_out(self, device: str, at_ms: int, reason: str) -> None:
        self._write.execute("UPDATE device SET connected = 0, since_ms = ? WHERE id = ?", (at_ms, device))
        self._add_event(PRESENCE, device, at_ms, name=reason, number=0)

    def sign_everyone_out(self, at_ms: int, reason: str) -> None:
        """After a start: whoever was connected to the process before this one is so no longer."""
        for (device,) in self._write.execute("SELECT id FROM device WHERE connected = 1").fetchall():
            self.sign_out(device, at_ms, reason)

    def add_report(self, device: str, document: bytes, at_ms: int) -> None:
        json_object(document, "a configuration report")
        self._write.execute("INSERT OR REPLACE INTO report VALUES (?, ?, ?)", (device, at_ms, document))
        self._add_event(REPORT, device, at_ms, body=document)

    def set_config(self, device: str, document: bytes) -> HeldConfig:
        """Replace a device's configuration. Raises Conflict for an epoch older than the held one.

        The same document again changes nothing. A document without an epoch replaces none that has one.
        """
        epoch = json_object(document, "the configuration").get("epoch")
        if epoch is not None and (not isinstance(epoch, int) or abs(epoch) > wire.MAX_SEQ):
            raise BadInput("the configuration's epoch must be an integer of 64 bits")
        self._must_know(device)
        row = self._write.execute(
            "SELECT revision, epoch, document FROM config WHERE device = ?", (device,)
        ).fetchone()
        revision, held_epoch, held = row or (0, None, None)
        if held == document:
            return HeldConfig(revision, document)
        if held_epoch is not None and (epoch is None or epoch < held_epoch):
            says = "names no epoch" if epoch is None else f"is of epoch {epoch}"
            raise Conflict(
                f"the configuration {says}, but {device} holds epoch {held_epoch}: decide anew from that"
            )
        self._write.execute(
            "INSERT OR REPLACE INTO config VALUES (?, ?, ?, ?)", (device, revision + 1, epoch, document)
        )
        return HeldConfig(revision + 1, document, changed=True)

    def add_command(self, command: wire.SendCommand, at_ms: int) -> None:
        """Queue a command. The same id twice is one command."""
        json_object(command.params, "params")
        if not command.id or not command.name:
            raise BadInput("a command needs an id and a name")
        self._must_know(command.device)
        self._write.execute(
            "INSERT INTO command VALUES (?, ?, ?, ?, ?, ?, ?, 'queued') ON CONFLICT DO NOTHING",
            (
                command.device,
                command.id,
                command.name,
                command.mode.value,
                command.params,
                command.expires_at_ms,
                at_ms,
            ),
        )

    def mark_sent(self, sent: Iterable[DueCommand]) -> None:
        """Not for a device that has signed in again meanwhile: its new connection has not got the command."""
        self._write.executemany(
            "UPDATE command SET state = 'sent' WHERE device = ?1 AND id = ?2 AND state = 'queued'"
            " AND EXISTS (SELECT 1 FROM device WHERE id = ?1 AND session = ?3)",
            [(due.device, due.command.id, due.session) for due in sent],
        )

    def add_answer(self, device: str, reply: wire.CommandReply, at_ms: int) -> None:
        """A device's answer; a repeated one, or one after a final one, changes nothing.

        `expired` and `duplicate` give way to what really happened, when that comes later.
        """
        replaces = "('queued', 'sent', 'acknowledged', 'expired', 'duplicate')"
        if not reply.status.final:
            replaces = "('queued', 'sent')"
        detail = reply.detail
        try:
            json_object(detail, "a reply's detail")
        except BadInput:  # that the command was answered matters more than how well
            detail = msgspec.json.encode({"unreadable": detail.decode(errors="replace")})
        changed = self._write.execute(
            "UPDATE command SET state = ?1"
            f" WHERE device = ?2 AND id = ?3 AND state IN {replaces} AND state <> ?1",
            (reply.status.value, device, reply.id),
        ).rowcount
        if changed:
            self._add_event(ANSWER, device, at_ms, name=reply.id, status=reply.status.value, body=detail)

    def expire(self, now_ms: int) -> None:
        """End what nobody will answer any more: undelivered at expiry, unanswered some time after it."""
        late = self._write.execute(
            f"SELECT device, id, state FROM command WHERE {_LATE} LIMIT 1000",
            (now_ms, UNANSWERED_GRACE_MS),
        ).fetchall()
        for device, command, state in late:
            why = b"not delivered" if state == "queued" else b"delivered, but not answered"
            self._write.execute(
                "UPDATE command SET state = 'expired' WHERE device = ? AND id = ?", (device, command)
            )
            self._add_event(
                ANSWER,
                device,
                now_ms,
                name=command,
                status=wire.ReplyStatus.EXPIRED.value,
                body=b'{"reason":"' + why + b' before it expired"}',
            )

    def forget(self, before_ms: int) -> int:
        """Delete the oldest events, and ended commands, of before a moment; how many events went."""
        self._write.execute(
            "DELETE FROM command WHERE created_at_ms < ?1 AND expires_at_ms < ?1"
            " AND state NOT IN ('queued', 'sent', 'acknowledged')",
            (before_ms,),
        )
        return self._write.execute(
            "DELETE FROM event WHERE at_ms < ?"
            " AND position IN (SELECT position FROM event ORDER BY position LIMIT ?)",
            (before_ms, FORGET_ROWS),
        ).rowcount

    def _must_know(self, device: str) -> None:
        if self._write.execute("SELECT 1 FROM device WHERE id = ?", (device,)).fetchone() is None:
            raise NotFound(f"the legacy server does not know device {device}: register it first")

    def _add_event(
        self,
        kind: int,
        device: str,
        at_ms: int,
        *,
        name: str = "",
        number: int = 0,
        status: str = "",
        body: bytes = b"",
    ) -> None:
        self._write.execute(
            "INSERT INTO event (kind, device, at_ms, name, number, status, body)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (kind, device, at_ms, name, number, status, body),
        )

    # ---- reading -------------------------------------------------------------------------------------

    def read_keys(self) -> dict[str, bytes]:
        """The key hashes of all devices."""
        return dict(self._read.execute("SELECT id, key_hash FROM device"))

    def read_feed(self, request: int, after: int) -> tuple[bytes, int]:
        """One FEED_BATCH frame of what follows `after`, and its last position; (b"", after): nothing.

        Raises Forgotten when what follows is no longer kept: positions have no gaps, so one that is left out
        was there once.
        """
        self._read.execute("BEGIN")  # one moment for both questions: forgetting goes on meanwhile
        try:
            first = self.read_first_position()
            if 0 < after < first - 1:
                raise Forgotten(first)
            return self._read_feed(request, after)
        finally:
            self._read.execute("COMMIT")

    def _read_feed(self, request: int, after: int) -> tuple[bytes, int]:
        items: list[wire.Item] = []
        size = 0
        cursor = self._read.execute(
            "SELECT position, kind, device, at_ms, name, number, ts_ms, status, body FROM event"
            " WHERE position > ? ORDER BY position LIMIT ?",
            (after, FEED_ITEMS_MAX),
        )
        for row in cursor:
            items.append(_item(*row))
            size += len(row[8])
            if size > FEED_BYTES_MAX:
                break
        cursor.close()
        if not items:
            return b"", after
        last = items[-1].position
        return wire.encode(wire.FeedBatch(request, last, tuple(items))), last

    def read_first_position(self) -> int:
        """The oldest position that is still kept (or the next one to be given out)."""
        row = self._read.execute("SELECT min(position) FROM event").fetchone()
        if row[0] is not None:
            return int(row[0])
        return _last_given(self._read) + 1

    def read_devices(self, asked: wire.ListDevices) -> wire.DeviceList:
        limit = max(1, min(asked.limit, 1000))
        rows = self._read.execute(
            "SELECT id, connected, coalesce(since_ms, -1), attributes, firmware FROM device"
            " WHERE id > ? ORDER BY id LIMIT ?",
            (asked.after, limit + 1),
        ).fetchall()
        page, more = _page(rows, limit, lambda row: len(row[3]))
        return wire.DeviceList(
            asked.request,
            more,
            tuple(
                wire.DeviceEntry(id_, bool(connected), since_ms, _attributes(attributes, firmware))
                for id_, connected, since_ms, attributes, firmware in page
            ),
        )

    def read_reports(self, asked: wire.ListReports) -> wire.ReportList:
        limit = max(1, min(asked.limit, 1000))
        rows = self._read.execute(
            "SELECT device, at_ms, document FROM report WHERE device > ? ORDER BY device LIMIT ?",
            (asked.after, limit + 1),
        ).fetchall()
        page, more = _page(rows, limit, lambda row: len(row[2]))
        return wire.ReportList(asked.request, more, tuple(wire.ReportEntry(*row) for row in page))

    def read_due(self, now_ms: int) -> tuple[list[DueCommand], bool]:
        """The queued commands of connected devices, oldest first, and whether any command has expired."""
        rows = self._read.execute(
            "SELECT c.device, d.session, c.id, c.name, c.mode, c.expires_at_ms, c.params FROM command c"
            " JOIN device d ON d.id = c.device AND d.connected = 1"
            " WHERE c.state = 'queued' AND c.expires_at_ms > ? ORDER BY c.created_at_ms LIMIT 1000",
            (now_ms,),
        ).fetchall()
        late = self._read.execute(
            f"SELECT 1 FROM command WHERE {_LATE} LIMIT 1",
            (now_ms, UNANSWERED_GRACE_MS),
        ).fetchone()
        due = [
            DueCommand(device, session, wire.Command(id_, name, wire.Mode(mode), expires_at_ms, params))
            for device, session, id_, name, mode, expires_at_ms, params in rows
        ]
        return due, late is not None


def _last_given(connection: sqlite3.Connection) -> int:
    """The newest position that was given out, as this connection sees it; 0: none yet."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'").fetchone()
    return int(row[0]) if row else 0


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    connection.execute("PRAGMA journal_mode = WAL")
    return connection


def _outcome(work: Work) -> object:
    try:
        return work()
    except FleetError as exc:
        return exc


def _item(
    position: int,
    kind: int,
    device: str,
    at_ms: int,
    name: str,
    number: int,
    ts_ms: int,
    status: str,
    body: bytes,
) -> wire.Item:
    match kind:
        case 1:
            return wire.TelemetryItem(position, device, at_ms, name, number, ts_ms, body)
        case 2:
            return wire.AnswerItem(position, device, at_ms, name, wire.ReplyStatus(status), body)
        case 3:
            return wire.PresenceItem(position, device, at_ms, number == 1, name)
        case _:
            return wire.ReportItem(position, device, at_ms, body)


def _page(
    rows: list[tuple[Any, ...]], limit: int, size_of: Callable[[tuple[Any, ...]], int]
) -> tuple[list[tuple[Any, ...]], bool]:
    """As many rows as fit into a frame, at least one, and whether there are more."""
    size = 0
    for n, row in enumerate(rows[:limit]):
        size += size_of(row) + 300
        if n and size > wire.MAX_BODY_BYTES - 1024:
            return rows[:n], True
    return rows[:limit], len(rows) > limit


def _attributes(attributes: str, firmware: str) -> bytes:
    if not firmware:
        return attributes.encode()
    return msgspec.json.encode({**msgspec.json.decode(attributes), "firmware": firmware})
