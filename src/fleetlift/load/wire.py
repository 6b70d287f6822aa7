"""What the parent of a load test and its generators say to each other: one JSON text a line, over pipes.

Passwords go this way too, and so never stand on a command line or in an environment.
"""

from typing import Final

import msgspec

from fleetlift.core.load_result import Counts
from fleetlift.core.workload import Scenario

LINE_MOST: Final = 1 << 28


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where devices connect to. `path`: of HTTP, with {device}, {topic} and {password} filled in."""

    host: str
    port: int
    tls: bool = False
    ca: str | None = None  # a file; None: the system's
    path: str = "/topics/{topic}?qos=1"
    auth: str = "basic"  # of HTTP: basic, bearer or none


class Player(msgspec.Struct, frozen=True, kw_only=True):
    """One device that a generator plays: its number in the scenario, and how it signs in."""

    number: int
    device: str
    password: str = ""

    def __repr__(self) -> str:
        return f"Player({self.number}, {self.device!r}, …)"


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one generator is to do. `run` marks every message; `account`: tell which were not acknowledged."""

    scenario: Scenario
    endpoint: Endpoint
    players: list[Player]
    run: str
    account: bool = True
    drain_s: float = 30.0


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """Start at this moment of the machine's monotonic clock; `epoch` is the Unix time of its zero."""

    at: float
    epoch: float


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Offer nothing more, and wait only for what is on its way."""


Order = Begin | Stop


class Connected(msgspec.Struct, frozen=True, kw_only=True, tag="connected"):
    """How many devices are signed in, before the beginning. `over`: all have been tried, and it could begin.

    `problem`: what kept most of the others out.
    """

    devices: int
    refused: int
    over: bool = False
    problem: str = ""


class Tick(msgspec.Struct, frozen=True, kw_only=True, tag="tick"):
    """One second (number `second`). Counts are of this second alone; `latency` is a histogram."""

    second: int
    offered: int
    accepted: int
    errors: int
    connected: int
    late_p99_s: float
    latency: str


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """A device's numbers of one topic: 1 to `last` were offered, and all but `missing` acknowledged."""

    device: str
    topic: str
    last: int
    missing: list[int] = []

    @property
    def accepted(self) -> int:
        return self.last - len(self.missing)


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The end. `counts` and `latency` are by class; times count from the beginning."""

    counts: list[Counts]
    latency: list[str]
    late: str
    lag: str
    sign_in: str
    cpu: float
    lasted_s: float
    last_accepted_s: float
    closed: int
    reconnects: int
    problems: dict[str, int]
    account: list[Account]
    account_whole: bool


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Why the generator cannot go on."""

    problem: str


Said = Connected | Tick | Done | Failed
