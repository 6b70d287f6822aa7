"""What a device agent is told, what it says is to be done, and what it keeps on disk."""

from enum import StrEnum

import msgspec

from fleetlift.core.command import Path as Path
from fleetlift.core.orders import DevicePhase, DeviceReport, Endpoint, Flags, Orders

# --- words -----------------------------------------------------------------------------------------------


class LinkState(StrEnum):
    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"


class AnswerStatus(StrEnum):
    """How a command is answered. All but `acknowledged` are final."""

    ACKNOWLEDGED = "acknowledged"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    WOULD_EXECUTE = "would-execute"
    WOULD_REFUSE = "would-refuse"
    DUPLICATE = "duplicate"
    EXPIRED = "expired"


# --- what is kept on disk --------------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One telemetry message of the outbox. `body` is a JSON object; `ts_ms` Unix milliseconds."""

    channel: str
    seq: int
    ts_ms: int
    body: bytes


class Place(msgspec.Struct, frozen=True):
    """A new side, and what lets the device in there."""

    endpoint: Endpoint
    credential: str

    def __repr__(self) -> str:
        return f"Place(endpoint={self.endpoint.host}:{self.endpoint.port}, credential='***')"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The state of the move. `flags` are those applied; `orders` is the newest order seen.

    `served_at` is where a try last succeeded: the newest order may name a place that lets nobody in.
    """

    epoch: int = 0
    phase: DevicePhase = DevicePhase.OLD
    flags: Flags = Flags()
    reason: str = ""
    orders: Orders | None = None
    try_started_at: float | None = None
    served_at: Place | None = None
    starts_unserved: int = 0  # of a moved device, since the new side last served it


class CommandRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command that was executed, or may have been. `status` None: begun, outcome unknown.

    `at`, when it came, and `expires_at` are by the sides' clock.
    """

    id: str
    path: Path
    at: float
    expires_at: float
    status: AnswerStatus | None = None
    detail: bytes = b"{}"
    answered: bool = False


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """All that an agent finds when it starts. `outbox` is in the order of production."""

    record: Record = Record()
    next_seq: dict[str, int] = {}
    outbox: tuple[Entry, ...] = ()
    commands: tuple[CommandRecord, ...] = ()


class EntryAdded(msgspec.Struct, frozen=True, gc=False):
    """Keep the entry, and that the channel's next seq is one higher."""

    entry: Entry


class EntryDropped(msgspec.Struct, frozen=True, gc=False):
    channel: str
    seq: int


class RecordChanged(msgspec.Struct, frozen=True):
    record: Record


class CommandKept(msgspec.Struct, frozen=True):
    """Insert or replace by id."""

    command: CommandRecord


class CommandForgotten(msgspec.Struct, frozen=True):
    id: str


Change = EntryAdded | EntryDropped | RecordChanged | CommandKept | CommandForgotten


# --- events ----------------------------------------------------------------------------------------------


class Started(msgspec.Struct, frozen=True):
    saved: Saved


class TelemetryProduced(msgspec.Struct, frozen=True, gc=False):
    """The application measured something. `body`: the bytes of a JSON object without `ts` and `seq`."""

    channel: str
    body: bytes


class Connected(msgspec.Struct, frozen=True):
    """The link is up and signed in. `time_s`: what time it is there, if the side says so."""

    path: Path
    session_present: bool = False
    time_s: float | None = None


class Lost(msgspec.Struct, frozen=True):
    """The link has ended, whoever ended it."""

    path: Path
    reason: str = ""


class Refused(msgspec.Struct, frozen=True):
    """The link could not be made: not reachable, or the sign-in was refused."""

    path: Path
    reason: str = ""


class Subscribed(msgspec.Struct, frozen=True):
    """The new side has answered SubscribeNew; `granted` only if it granted everything."""

    granted: bool = True


class TelemetryAcked(msgspec.Struct, frozen=True, gc=False):
    """The side has stored these messages, (channel, seq) each."""

    path: Path
    keys: tuple[tuple[str, int], ...]


class TryTelemetryAcked(msgspec.Struct, frozen=True):
    pass


class AnswerAcked(msgspec.Struct, frozen=True):
    path: Path
    id: str
    status: AnswerStatus


class ReportAcked(msgspec.Struct, frozen=True):
    path: Path


class ShadowAnswered(msgspec.Struct, frozen=True):
    """The answer to ShadowGet: the orders that the shadow holds, if any. `ok` False: it failed there.

    `time_s`: what time it is on the new side.
    """

    orders: Orders | None = None
    ok: bool = True
    time_s: float | None = None


class ShadowChanged(msgspec.Struct, frozen=True):
    """The shadow's desired state differs from what was reported; `epoch` is the desired one, if it does."""

    epoch: int | None


class OrdersReceived(msgspec.Struct, frozen=True):
    path: Path
    orders: Orders


class CommandReceived(msgspec.Struct, frozen=True):
    """`params`: a JSON object; `expires_at`: Unix seconds. `replayed`: it bears the mark of a replay."""

    path: Path
    id: str
    name: str
    params: bytes
    dry_run: bool
    expires_at: float
    replayed: bool = False


class CommandFinished(msgspec.Struct, frozen=True):
    """The application has executed the command. `detail`: a JSON object, its result or what went wrong."""

    id: str
    ok: bool
    detail: bytes = b"{}"


class Stored(msgspec.Struct, frozen=True):
    """Everything up to and including this token is on disk; `alone`: this token's changes, nothing before."""

    token: int
    alone: bool = False


class Timer(msgspec.Struct, frozen=True):
    pass


Event = (
    Started
    | TelemetryProduced
    | Connected
    | Lost
    | Refused
    | Subscribed
    | TelemetryAcked
    | TryTelemetryAcked
    | AnswerAcked
    | ReportAcked
    | ShadowAnswered
    | ShadowChanged
    | OrdersReceived
    | CommandReceived
    | CommandFinished
    | Stored
    | Timer
)


# --- actions ---------------------------------------------------------------------------------------------


class ConnectOld(msgspec.Struct, frozen=True):
    pass


class ConnectNew(msgspec.Struct, frozen=True):
    endpoint: Endpoint
    credential: str

    def __repr__(self) -> str:  # the credential stays out of logs and tracebacks
        return f"ConnectNew(endpoint={self.endpoint.host}:{self.endpoint.port}, credential='***')"


class Close(msgspec.Struct, frozen=True):
    """Send what is waiting to be sent, say goodbye, close. Nothing of that connection is fed in after it."""

    path: Path


class SubscribeNew(msgspec.Struct, frozen=True):
    """Subscribe to orders (shadow) and commands."""


class SendTelemetry(msgspec.Struct, frozen=True, gc=False):
    path: Path
    channel: str
    seq: int
    ts_ms: int
    body: bytes


class SendTryTelemetry(msgspec.Struct, frozen=True):
    """One message by the new path on the channel of tries, without a seq: it belongs to no series."""

    channel: str
    ts_ms: int
    body: bytes


class AnswerCommand(msgspec.Struct, frozen=True):
    """`detail`: a JSON object; with a refusal its `code` and `reason`."""

    path: Path
    id: str
    status: AnswerStatus
    detail: bytes


class Execute(msgspec.Struct, frozen=True):
    id: str
    name: str
    params: bytes


class Persist(msgspec.Struct, frozen=True):
    """Put the changes on disk in the order given; say `Stored(token)` when `wait`. Tokens only grow."""

    token: int
    changes: tuple[Change, ...]
    wait: bool = True


class Report(msgspec.Struct, frozen=True):
    path: Path
    report: DeviceReport


class ShadowGet(msgspec.Struct, frozen=True):
    pass


class SetTimer(msgspec.Struct, frozen=True):
    """Feed `Timer` at `at` (Unix seconds) or soon after; replaces the timer set before."""

    at: float


Action = (
    ConnectOld
    | ConnectNew
    | Close
    | SubscribeNew
    | SendTelemetry
    | SendTryTelemetry
    | AnswerCommand
    | Execute
    | Persist
    | Report
    | ShadowGet
    | SetTimer
)
