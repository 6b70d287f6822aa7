"""Who comes to the old address: kept in memory, and on disk often enough that a kill forgets about a second.

A client is known by the name that its first bytes tell, else by its address. There is room for so many; who
comes beyond that is served and counted, and the count keeps the old side from being released.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.relaying import Routes, To
from fleetlift.core.stale_tail import MEASURED_WITHIN_S, Reason, reason

VISITORS_MAX: Final = 1_000_000

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS visitor (
    client TEXT PRIMARY KEY, peer TEXT NOT NULL, protocol TEXT NOT NULL,
    first_seen REAL NOT NULL, last_seen REAL NOT NULL, last_opened REAL NOT NULL,
    connections INTEGER NOT NULL, bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, side TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS watch (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    since REAL NOT NULL, until REAL NOT NULL, forgotten INTEGER NOT NULL
);
"""


class Visitor:
    """One client of the old address. Times are Unix seconds; bytes are those of its closed and open
    connections."""

    __slots__ = (
        "bytes_down",
        "bytes_up",
        "client",
        "connections",
        "first_seen",
        "last_opened",
        "last_seen",
        "open_new",
        "open_old",
        "peer",
        "protocol",
        "side",
    )

    def __init__(self, client: str, peer: str, protocol: str, now: float) -> None:
        self.client, self.peer, self.protocol = client, peer, protocol
        self.first_seen = self.last_seen = self.last_opened = now
        self.connections = self.bytes_up = self.bytes_down = self.open_old = self.open_new = 0
        self.side = ""

    def row(self) -> tuple[Any, ...]:
        return (
            self.client,
            self.peer,
            self.protocol,
            self.first_seen,
            self.last_seen,
            self.last_opened,
            self.connections,
            self.bytes_up,
            self.bytes_down,
            self.side,
        )


class Straggler(msgspec.Struct, frozen=True, kw_only=True):
    """A client that still comes to the old address. `side` is where it was last forwarded to."""

    client: str
    peer: str
    protocol: str
    first_seen: float
    last_seen: float
    last_opened: float
    connections: int
    open_old: int
    open_new: int
    bytes_up: int
    bytes_down: int
    side: str
    reason: Reason


class Visitors:
    """All of them. `since` and `until`: the time over which the old address was watched without a gap."""

    def __init__(self, path: Path, now: float) -> None:
        self.by_client: dict[str, Visitor] = {}
        self.forgotten = 0
        self._dirty: set[Visitor] = set()
        self._lock = threading.Lock()  # one write to disk at a time
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            for row in self._db.execute("SELECT * FROM visitor"):
                one = Visitor(row[0], row[1], row[2], row[3])
                _, _, _, one.first_seen, one.last_seen, one.last_opened = row[:6]
                one.connections, one.bytes_up, one.bytes_down, one.side = row[6:]
                self.by_client[one.client] = one
            watch = self._db.execute("SELECT since, until, forgotten FROM watch").fetchone()
        except sqlite3.DatabaseError as problem:
            raise BadInput(
                f"{path} cannot be read ({problem}): move it away; who came is then counted anew"
            ) from problem
        self.since = self.until = now
        if watch is not None:
            self.forgotten = watch[2]
            if now - watch[1] <= MEASURED_WITHIN_S:
                self.since = min(watch[0], now)

    def came(self, client: str, peer: str, protocol: str, now: float) -> Visitor:
        """A connection of `client` was opened."""
        one = self.by_client.get(client)
        if one is None:
            one = Visitor(client, peer, protocol, now)
            if len(self.by_client) < VISITORS_MAX:
                self.by_client[client] = one
            else:
                self.forgotten += 1
        one.peer, one.protocol = peer, protocol
        one.last_opened = one.last_seen = now
        one.connections += 1
        self.changed(one)
        return one

    def changed(self, one: Visitor) -> None:
        if self.by_client.get(one.client) is one:
            self._dirty.add(one)

    def save_later(self, now: float) -> tuple[list[tuple[Any, ...]], tuple[float, float, int]]:
        """What `save` is to write: taken in the loop, written in a thread."""
        if not 0 <= now - self.until <= MEASURED_WITHIN_S:
            self.since = (
                now  # stood still for so long, or the clock was set: what came meanwhile is not known
            )
        self.until = now
        rows = [one.row() for one in self._dirty]
        self._dirty.clear()
        return rows, (self.since, self.until, self.forgotten)

    def save(self, rows: Iterable[tuple[Any, ...]], watch: tuple[float, float, int]) -> None:
        with self._lock:
            self._db.execute("BEGIN")
            try:
                self._db.executemany("INSERT OR REPLACE INTO visitor VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
                self._db.execute("INSERT OR REPLACE INTO watch VALUES (1, ?, ?, ?)", watch)
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def stragglers(
        self, routes: Routes, now: float, *, since: float = 0.0, after: str = "", limit: int = 1000
    ) -> list[Straggler]:
        """Clients seen at the old address since `since`, in the order of their names, behind `after`. Whose
        connection is open is seen now."""
        names = sorted(
            name
            for name, one in self.by_client.items()
            if name > after and (one.last_seen >= since or _open(one))
        )
        return [self._straggler(self.by_client[name], routes, now) for name in names[:limit]]

    def _straggler(self, one: Visitor, routes: Routes, now: float) -> Straggler:
        return Straggler(
            client=one.client,
            peer=one.peer,
            protocol=one.protocol,
            first_seen=one.first_seen,
            last_seen=max(one.last_seen, now) if _open(one) else one.last_seen,
            last_opened=one.last_opened,
            connections=one.connections,
            open_old=one.open_old,
            open_new=one.open_new,
            bytes_up=one.bytes_up,
            bytes_down=one.bytes_down,
            side=one.side or To.OLD.value,
            reason=reason(
                first_seen=one.first_seen,
                last_opened=one.last_opened,
                open_now=_open(one),
                switched_at=routes.switched_at,
                ttl_s=routes.ttl_s,
            ),
        )


def _open(one: Visitor) -> int:
    return one.open_old + one.open_new
