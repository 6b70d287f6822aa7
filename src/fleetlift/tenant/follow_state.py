"""How a follower stands: what it and its sessions, one after another, know and change."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.schema import Table, TableName
from fleetlift.tenant.canary import Canaries
from fleetlift.tenant.follow_books import Books
from fleetlift.tenant.spool import Spool
from fleetlift.tenant.touched import TouchedKeys


class Direction(StrEnum):
    FORWARD = "forward"
    REVERSE = "reverse"


class FollowState(StrEnum):
    NEW = "new"
    WAITING = "waiting"  # for transactions that were open when the slot was to be made
    SPOOLING = "spooling"
    CATCHING_UP = "catching-up"
    LIVE = "live"
    RECONNECTING = "reconnecting"
    STOPPED = "stopped"


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """`snapshot`: what the copy has to read from; None when following goes on from before, and the copy reads
    from a snapshot of its own. `lsn`: from where on changes come, or up to where they are applied."""

    snapshot: str | None
    lsn: int


class FollowProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How following stands. Positions are bytes of the source's log; rates are of the last seconds.

    `lag_s`: how long ago a canary was written that has not come out yet (0: all have). `waits`: why nothing
    goes on at the moment; `trouble`: why it had to connect again, the last time; `stopped`: why it cannot
    go on.
    """

    state: FollowState
    received_lsn: int = 0
    applied_lsn: int = 0
    fresh_until: int = 0
    rows: int = 0
    rows_s: float = 0.0
    transactions: int = 0
    entered: int = 0
    left: int = 0
    not_carried: int = 0
    spooled_bytes: int = 0
    queued_bytes: int = 0
    lag_bytes: int | None = None
    lag_s: float | None = None
    caught_up: bool = False
    reconnects: int = 0
    waits: str = ""
    trouble: str = ""
    stopped: str = ""


class Stop(Exception):
    """Following cannot go on; the text says why and what to do."""


class Following:
    """What lives as long as the follower, through all its sessions."""

    def __init__(
        self,
        source_url: str,
        target_url: str,
        closure: Closure,
        tables: Sequence[Table],
        *,
        move: str,
        slot: str,
        publication: str,
        directory: Path,
        reverse: bool,
        at: Callable[[str], None],
    ) -> None:
        self.source_url = source_url
        self.target_url = target_url
        self.closure = closure
        self.tables = tables
        self.move = move
        self.slot = slot
        self.directory = directory
        self.reverse = reverse
        self.at = at
        self.books = Books(source_url, closure, tables, slot=slot, publication=publication)
        self.canaries = Canaries()
        self.touched = TouchedKeys()
        self.applying = asyncio.Event()
        self.state = FollowState.NEW
        self.spool: Spool | None = None
        self.known_leaves: set[str] | None = None
        self.applied = 0
        self.fresh_until = 0
        self.careful_until = 0
        self.unsettled_until = 0  # up to here rows may be there without what hangs on them
        self.written_by_others = False
        self.rows = 0
        self.transactions = 0
        self.entered = 0
        self.left = 0
        self.not_carried: Counter[TableName] = Counter()
        self.moved = asyncio.Condition()
        self.rates: deque[tuple[float, int]] = deque(maxlen=12)
        self.tidy_wanted: list[asyncio.Future[int]] = []

    def must_pass(self, lsn: int) -> None:
        """Rows were written to the target by somebody else (the copy, a repair), who read them from the
        source
        when its log was at `lsn`."""
        self.fresh_until = max(self.fresh_until, lsn)
        self.unsettled_until = max(self.unsettled_until, lsn)
        self.written_by_others = True

    async def tell_moved(self) -> None:
        async with self.moved:
            self.moved.notify_all()

    def rate(self, now: float) -> float:
        if len(self.rates) < 2 or now - self.rates[-1][0] > 5:
            return 0.0
        (began, rows), (ended, total) = self.rates[0], self.rates[-1]
        return (total - rows) / max(0.001, ended - began)
