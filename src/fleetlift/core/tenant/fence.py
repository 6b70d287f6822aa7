"""What the fence around a tenant's rows says, and when: pure decisions on what was read of a database.

The fence of a move is in the database itself. What it says is one number that every writer reads, whatever
its isolation level (a sequence, which transactions and snapshots do not hide): 0 is open, SEALED is closed
for good, anything else is closed until then, in Unix milliseconds of the database's own clock. So a mover
that dies leaves a fence that opens by itself.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from fleetlift.core.errors import Conflict

SEALED: Final = 9223372036854775807
OPEN: Final = 0

REFUSED: Final = "FL001"  # SQLSTATE: the tenant is being moved; the write may be tried again
MOVED: Final = "FL002"  # SQLSTATE: the tenant has moved; it must be written at its new place
FROZEN: Final = "FL003"  # SQLSTATE: a feature is frozen for the time of the move
NOT_OPEN: Final = "FL004"  # SQLSTATE: this place is not open for the tenant's writes yet


class Side(StrEnum):
    SOURCE = "source"
    TARGET = "target"


class Status(StrEnum):
    """What a fence does with a write of the tenant's rows."""

    ABSENT = "absent"  # there is no fence
    OPEN = "open"  # lets it through, and knows of it until its transaction ends
    CLOSED = "closed"  # refuses it until a moment, then opens by itself
    SEALED = "sealed"  # refuses it for good


class Action(StrEnum):
    INSTALL = "install"
    ARM = "arm"
    LAPSE = "lapse"  # the moment has come: whoever writes next opens it
    THAW = "thaw"
    SEAL = "seal"
    UNSEAL = "unseal"  # the way back: this side serves again
    SHUT = "shut"  # at once and for good, without a drain: a place that has never been open
    REMOVE = "remove"


MOVES: Final[Mapping[Status, Mapping[Action, Status]]] = MappingProxyType(
    {
        Status.ABSENT: {
            Action.INSTALL: Status.OPEN,
            Action.REMOVE: Status.ABSENT,
        },
        Status.OPEN: {
            Action.INSTALL: Status.OPEN,
            Action.ARM: Status.CLOSED,
            Action.THAW: Status.OPEN,
            Action.SHUT: Status.SEALED,
            Action.UNSEAL: Status.OPEN,
            Action.REMOVE: Status.ABSENT,
        },
        Status.CLOSED: {
            Action.LAPSE: Status.OPEN,
            Action.THAW: Status.OPEN,
            Action.SEAL: Status.SEALED,
            Action.INSTALL: Status.CLOSED,
        },
        Status.SEALED: {
            Action.INSTALL: Status.SEALED,
            Action.SEAL: Status.SEALED,
            Action.SHUT: Status.SEALED,
            Action.UNSEAL: Status.OPEN,
            Action.REMOVE: Status.ABSENT,
        },
    }
)
"""Every legal move of a fence. A sealed one is not thawed, a closed one not removed: somebody is at work."""


def after(status: Status, action: Action) -> Status:
    """The status that `action` leads to. Raises Conflict when it is not allowed."""
    if (then := MOVES[status].get(action)) is None:
        raise Conflict(f"a fence that is {status} cannot {action}")
    return then


def status_at(until_ms: int, window_ms: int, now_ms: int) -> Status:
    """What a fence whose number is `until_ms` does at `now_ms`. `window_ms`: for how long it was closed.

    A clock that has gone back behind the moment of closing opens it as well: no jump keeps it closed for
    longer than its window.
    """
    if until_ms == OPEN:
        return Status.OPEN
    if until_ms == SEALED:
        return Status.SEALED
    return Status.CLOSED if until_ms - window_ms <= now_ms < until_ms else Status.OPEN


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A transaction that the fence waits for. `pid` is 0 for a prepared one, whose `query` is its name."""

    pid: int
    application: str
    user: str
    age_s: float
    query: str
    bystander: bool = False  # not known to write the tenant's rows, but it wrote tables that have some

    def __str__(self) -> str:
        who = f"prepared transaction {self.query!r}" if self.pid == 0 else f"process {self.pid}"
        what = "" if self.pid == 0 else f", last statement {' '.join(self.query.split())[:80]!r}"
        app = self.application or "no application name"
        return f"{who} of {self.user} ({app}), open for {self.age_s:.1f} s{what}"


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """How many writes (rows, or statements on a target) were turned away; counted outside of transactions.

    `closing`: between arming and sealing or thawing; `sealed`: since; `frozen`: of frozen features.
    """

    closing: int = 0
    sealed: int = 0
    frozen: int = 0


class FenceState(msgspec.Struct, frozen=True, kw_only=True):
    """A fence as it was read. Times are of the database's clock, in Unix ms."""

    status: Status
    until_ms: int = 0
    window_ms: int = 0
    now_ms: int = 0
    drained: bool = False  # nothing that was let through before it closed is under way any more
    frozen_until_ms: int = 0
    refused: Refused = Refused()
    tables: int = 0

    @property
    def left_s(self) -> float:
        """How long it stays closed, when it is."""
        return (self.until_ms - self.now_ms) / 1000 if self.status is Status.CLOSED else 0.0

    @property
    def frozen(self) -> bool:
        return self.frozen_until_ms > self.now_ms


class Serving(StrEnum):
    """Who takes the tenant's writes, as both fences say."""

    SOURCE = "source"
    TARGET = "target"
    NEITHER = "neither"
    BOTH = "both"


def serving(source: Status, target: Status) -> Serving:
    """Who serves. A target without a fence counts as open: nothing would keep a writer out."""
    at_source = source in (Status.ABSENT, Status.OPEN)
    at_target = target in (Status.ABSENT, Status.OPEN)
    if at_source and at_target:
        return Serving.BOTH
    if at_source:
        return Serving.SOURCE
    return Serving.TARGET if at_target else Serving.NEITHER
