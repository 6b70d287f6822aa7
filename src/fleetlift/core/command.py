"""What a command goes through: the states of each path it is sent by, and the one state its caller sees.

A command goes by one path or two: `new` (our own MQTT) and `old` (the other side of a migration). Its id is
the same on both, and the device executes an id once, so the copy that comes second is answered `duplicate`.
Device messages have the shape of AWS IoT Core's commands (developer guide, "Remote commands").
"""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from uuid import UUID

import msgspec

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.jsonvalue import Json, JsonObject, deeper_than
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag

EXPIRES_IN_S_DEFAULT = 60.0
EXPIRES_IN_S_MIN = 1.0
EXPIRES_IN_S_MAX = 7 * 86_400.0
GRACE_S = 5.0  # an answer may still be on its way when a command expires
PARAMS_BYTES_MAX = 65_536
RESULT_BYTES_MAX = 65_536
PARAMS_DEPTH_MAX = 32
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._:-]{0,63}")

BROUGHT_BY = "fleetlift.path"  # in an answer: the path that brought the command, when it is closed now
WRONG_SIDE = "WRONG_SIDE"  # a device's reason: its flags do not let it take commands by this side now

RETRY_AFTER_S = 2.0  # the first copy after the first; later ones wait half as long as was waited in all
RETRY_AFTER_S_MAX = 60.0
RETRY_AFTER_CONNECT_S = 1.0  # a device that comes back subscribes, and empties its queue, before a copy


class Mode(StrEnum):
    EXECUTE = "execute"
    DRY_RUN = "dry-run"


class Path(StrEnum):
    NEW = "new"
    OLD = "old"


class PathStatus(StrEnum):
    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"  # the device has it and is at work
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    WOULD_EXECUTE = "would-execute"
    WOULD_REFUSE = "would-refuse"
    DUPLICATE = "duplicate"  # the device had it by the other path already
    EXPIRED = "expired"
    UNREACHABLE = "unreachable"  # the side could not take it for this device


class Status(StrEnum):
    """What the caller of a command sees."""

    QUEUED = "queued"
    SENT = "sent"
    ACKNOWLEDGED = "acknowledged"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    WOULD_EXECUTE = "would-execute"
    EXPIRED = "expired"


_ENDS = frozenset(
    {
        PathStatus.SUCCEEDED,
        PathStatus.FAILED,
        PathStatus.WOULD_EXECUTE,
        PathStatus.WOULD_REFUSE,
        PathStatus.DUPLICATE,
        PathStatus.EXPIRED,
        PathStatus.UNREACHABLE,
    }
)

# An answer may overtake the note that the command was sent, so every open state leads to every end.
# `duplicate` is an end that one thing corrects: the outcome itself, by the same path. Then the device had
# met a second delivery of the copy it was working on, and not the other path's.
MOVES: Mapping[PathStatus, frozenset[PathStatus]] = {
    PathStatus.QUEUED: frozenset({PathStatus.SENT, PathStatus.ACKNOWLEDGED}) | _ENDS,
    PathStatus.SENT: frozenset({PathStatus.ACKNOWLEDGED}) | _ENDS,
    PathStatus.ACKNOWLEDGED: _ENDS - {PathStatus.DUPLICATE},
    PathStatus.DUPLICATE: frozenset({PathStatus.SUCCEEDED, PathStatus.FAILED}),
    PathStatus.SUCCEEDED: frozenset(),
    PathStatus.FAILED: frozenset(),
    PathStatus.WOULD_EXECUTE: frozenset(),
    PathStatus.WOULD_REFUSE: frozenset(),
    PathStatus.EXPIRED: frozenset(),
    PathStatus.UNREACHABLE: frozenset(),
}

OPEN = frozenset({PathStatus.QUEUED, PathStatus.SENT, PathStatus.ACKNOWLEDGED})
FINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.WOULD_EXECUTE, Status.EXPIRED})


class PathState(msgspec.Struct, frozen=True, kw_only=True):
    """One path of a command. Times are Unix seconds."""

    path: Path
    mode: Mode
    status: PathStatus = PathStatus.QUEUED
    attempts: int = 0
    created_at: float = 0.0
    sent_at: float | None = None
    acknowledged_at: float | None = None
    ended_at: float | None = None
    detail: JsonObject = {}

    @property
    def wrong_side(self) -> bool:
        """Open, though the device has said that it takes no commands by this side at present."""
        return self.status in OPEN and _wrong_side(self.detail)

    @property
    def latency_s(self) -> float | None:
        """From the first sending to the device's final answer; None when there was none."""
        if self.sent_at is None or self.ended_at is None or self.status not in _ANSWERED:
            return None
        return max(0.0, self.ended_at - self.sent_at)

    @property
    def ack_latency_s(self) -> float | None:
        if self.sent_at is None or self.acknowledged_at is None:
            return None
        return max(0.0, self.acknowledged_at - self.sent_at)


_ANSWERED = _ENDS - {PathStatus.EXPIRED, PathStatus.UNREACHABLE}


def _wrong_side(detail: JsonObject) -> bool:
    """By the new side the reason is AWS's `reasonCode`, by an old one the agent's own `code`."""
    return WRONG_SIDE in (detail.get("reasonCode"), detail.get("code"))


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A command with its paths. Times are Unix seconds; `ended_at` None: its status is not final yet."""

    id: str
    device: str
    tenant: str
    name: str
    params: JsonObject
    mode: Mode
    status: Status
    created_by: str
    created_at: float
    expires_at: float
    ended_at: float | None = None
    paths: tuple[PathState, ...] = ()


# -- making one ----------------------------------------------------------------------------------------


def paths_for(
    route: CommandsFlag | None, mode: Mode, name: str = "", *, released: bool = False
) -> tuple[tuple[Path, Mode], ...]:
    """The paths a new command goes by, each with its mode.

    `route` is what the device's migration says of commands; None: there is none. A caller's own dry run is
    one on every path. The probe of a move always goes by the new side, which it is there to try. With
    `released`, nobody keeps the old path any more: none is left when the new one would not do as asked.
    """
    if name == PROBE_COMMAND or route is None:
        return ((Path.NEW, mode),)
    if released:
        by_new = route in (CommandsFlag.BOTH, CommandsFlag.NEW)
        return ((Path.NEW, mode),) if by_new else ()
    match route:
        case CommandsFlag.NEW:
            return ((Path.NEW, mode),)
        case CommandsFlag.OLD:
            return ((Path.OLD, mode),)
        case CommandsFlag.DRY_RUN:
            return (Path.OLD, mode), (Path.NEW, Mode.DRY_RUN)
        case CommandsFlag.BOTH:
            return (Path.OLD, mode), (Path.NEW, mode)


def checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadInput(
            f"command name {name!r}: use 1 to 64 letters, digits, '.', '_', ':' or '-', "
            "the first a letter or digit"
        )
    return name


def checked_params(params: object) -> JsonObject:
    """`params` when it is a JSON object of at most 64 KiB without NUL characters; else BadInput."""
    if not isinstance(params, dict):
        raise BadInput('command params: expected a JSON object such as {"door": "left"}')
    try:
        encoded = msgspec.json.encode(params)
    except (TypeError, OverflowError, RecursionError, ValueError) as error:
        raise BadInput(f"command params: not JSON ({error})") from error
    if len(encoded) > PARAMS_BYTES_MAX:
        raise BadInput(
            f"command params of {len(encoded)} bytes: at most {PARAMS_BYTES_MAX} are sent to a device"
        )
    if deeper_than(params, PARAMS_DEPTH_MAX):
        raise BadInput(f"command params: nested deeper than {PARAMS_DEPTH_MAX} levels")
    if b"\\u0000" in encoded:
        raise BadInput("command params: a text holds a NUL character, which cannot be stored")
    return params


def checked_expiry(expires_in_s: float) -> float:
    if not EXPIRES_IN_S_MIN <= expires_in_s <= EXPIRES_IN_S_MAX:
        raise BadInput(
            f"expires_in {expires_in_s:g} s: use {EXPIRES_IN_S_MIN:g} to {EXPIRES_IN_S_MAX:g} seconds"
        )
    return expires_in_s


def uuid7(now: float, random: int) -> str:
    """A UUID version 7: milliseconds of `now` (Unix seconds), then 74 bits of `random`. RFC 9562, 5.7."""
    random_a, random_b = (random >> 62) & 0xFFF, random & (2**62 - 1)
    number = (int(now * 1000) & (2**48 - 1)) << 80 | 0x7 << 76 | random_a << 64 | 0b10 << 62 | random_b
    return str(UUID(int=number))


# -- answers -------------------------------------------------------------------------------------------


class ResponseError(StrEnum):
    """AWS's names for why a device's response is refused."""

    INVALID_JSON = "InvalidJson"
    INVALID_REQUEST = "InvalidRequest"
    NOT_FOUND = "ResourceNotFound"
    TERMINAL = "TerminalStateReached"


class BadResponse(BadInput):
    """A device's response cannot be read; `error` is what the device is told."""

    def __init__(self, error: ResponseError, message: str) -> None:
        super().__init__(message)
        self.error = error


class _Reason(msgspec.Struct, frozen=True, rename="camel"):
    reason_code: str = ""
    reason_description: str = ""


class _Response(msgspec.Struct, frozen=True, rename="camel"):
    status: str
    status_reason: _Reason | None = None
    result: dict[str, object] | None = None
    path: str = msgspec.field(default="", name=BROUGHT_BY)


class Reported(msgspec.Struct, frozen=True):
    """What a device's response says: the path's status, and what goes into its detail.

    `path` is the one that brought the command, when the answer had to come by the other.
    """

    status: PathStatus
    detail: JsonObject
    path: Path | None = None


_STATUSES: Mapping[str, PathStatus] = {
    "IN_PROGRESS": PathStatus.ACKNOWLEDGED,
    "SUCCEEDED": PathStatus.SUCCEEDED,
    "FAILED": PathStatus.FAILED,
    "REJECTED": PathStatus.FAILED,
    "TIMED_OUT": PathStatus.FAILED,
}
_REASONS: Mapping[tuple[str, str], PathStatus] = {
    ("SUCCEEDED", "WOULD_EXECUTE"): PathStatus.WOULD_EXECUTE,
    ("REJECTED", "WOULD_REFUSE"): PathStatus.WOULD_REFUSE,
    ("REJECTED", "DUPLICATE"): PathStatus.DUPLICATE,
    ("REJECTED", "EXPIRED"): PathStatus.EXPIRED,
}


def read_response(payload: bytes) -> Reported:
    """What a device's response says of its path. Raises BadResponse.

    `{"status": "IN_PROGRESS"|"SUCCEEDED"|"FAILED"|"REJECTED"|"TIMED_OUT",
      "statusReason": {"reasonCode", "reasonDescription"}?, "result": {...}?}`
    """
    if len(payload) > RESULT_BYTES_MAX:
        raise BadResponse(ResponseError.INVALID_REQUEST, f"a response holds at most {RESULT_BYTES_MAX} bytes")
    try:
        response = msgspec.json.decode(payload, type=_Response)
    except msgspec.ValidationError as error:
        raise BadResponse(ResponseError.INVALID_REQUEST, str(error)) from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadResponse(ResponseError.INVALID_JSON, "the response is not JSON in UTF-8") from error
    if response.status not in _STATUSES:
        expected = ", ".join(_STATUSES)
        raise BadResponse(
            ResponseError.INVALID_REQUEST, f"status {response.status!r}: expected one of {expected}"
        )
    detail: JsonObject = {}
    code = ""
    if response.status_reason is not None:
        code = response.status_reason.reason_code[:64]
        detail = {"reasonCode": code, "reasonDescription": response.status_reason.reason_description[:1024]}
    if response.result is not None:
        if deeper_than(response.result, PARAMS_DEPTH_MAX):
            raise BadResponse(
                ResponseError.INVALID_REQUEST, f"result nested deeper than {PARAMS_DEPTH_MAX} levels"
            )
        detail["result"] = response.result  # type: ignore[assignment]
    status = _REASONS.get((response.status, code), _STATUSES[response.status])
    return Reported(status, storable(detail), _brought_by(response.path))


def reported(status: PathStatus, detail: Mapping[str, object]) -> Reported:
    """The same of an answer that came by an old side."""
    rest = {key: value for key, value in detail.items() if key != BROUGHT_BY}
    return Reported(status, storable(rest), _brought_by(detail.get(BROUGHT_BY)))


def _brought_by(path: object) -> Path | None:
    return Path(path) if isinstance(path, str) and path in tuple(Path) else None


def storable(detail: Mapping[str, object]) -> JsonObject:
    """`detail` as JSON that PostgreSQL keeps: no NUL in texts, nothing but JSON."""

    def clean(value: object) -> Json:
        match value:
            case str():
                return value.replace("\x00", "\ufffd")
            case bool() | None | float() | int():
                return value
            case Mapping():
                return {str(key).replace("\x00", "\ufffd"): clean(inner) for key, inner in value.items()}
            case list() | tuple():
                return [clean(inner) for inner in value]
            case _:
                return str(value)

    return {str(key).replace("\x00", "\ufffd"): clean(inner) for key, inner in detail.items()}


class Recorded(msgspec.Struct, frozen=True):
    """The paths after an answer, and whether they changed. `error`: what the device is told, if anything."""

    paths: tuple[PathState, ...]
    changed: bool
    error: ResponseError | None = None


def record(paths: Sequence[PathState], path: Path, reported: Reported, at: float) -> Recorded:
    """The paths of a command once `path` has reported. Repeating a report changes nothing.

    WRONG_SIDE is no outcome: the device has not taken the command, and may take it by the other path, or by
    a later copy once its flags say so. The path stays open and remembers it.

    A report that comes after the path's end does not change it; it is kept in `detail.late`, so that a
    command which was executed after it had expired can be seen. Raises Conflict when the command does not go
    by `path`.
    """
    here = next((state for state in paths if state.path is path), None)
    if here is None:
        raise Conflict(f"the command does not go by path {path}")
    after, error = _after(here, reported, at, alone=len(paths) == 1)
    if after is here:
        return Recorded(tuple(paths), False, error)
    return Recorded(tuple(after if state is here else state for state in paths), True, error)


def _after(
    here: PathState, reported: Reported, at: float, *, alone: bool
) -> tuple[PathState, ResponseError | None]:
    status, detail = reported.status, reported.detail
    if status is PathStatus.DUPLICATE and alone and here.status in OPEN:
        # no other path could have brought it, so this one did, by an earlier copy: the outcome is to come
        status, detail = PathStatus.ACKNOWLEDGED, {}
    if status is PathStatus.FAILED and _wrong_side(detail):
        if here.status not in (PathStatus.QUEUED, PathStatus.SENT) or here.wrong_side:
            return here, None
        return msgspec.structs.replace(here, detail={**here.detail, **detail}), None
    if status is here.status:
        return here, None
    if status in MOVES[here.status]:
        ends = status in _ENDS
        return (
            msgspec.structs.replace(
                here,
                status=status,
                detail=detail if here.wrong_side else {**here.detail, **detail},
                acknowledged_at=here.acknowledged_at
                if here.acknowledged_at is not None or status is not PathStatus.ACKNOWLEDGED
                else at,
                ended_at=at if ends else None,
            ),
            None,
        )
    if here.status in OPEN or status in OPEN or status is PathStatus.DUPLICATE:
        return here, None  # overtaken by what is already known, or the second copy that a retry sent
    if "late" in here.detail:
        return here, ResponseError.TERMINAL
    late: JsonObject = {**detail, "status": status.value, "at": at}
    return msgspec.structs.replace(here, detail={**here.detail, "late": late}), ResponseError.TERMINAL


# -- the command's own state ---------------------------------------------------------------------------

_STANDING: Sequence[PathStatus] = (PathStatus.ACKNOWLEDGED, PathStatus.SENT, PathStatus.QUEUED)


def resolve(paths: Sequence[PathState]) -> Status:
    """The status of a command by those of its paths.

    Any path succeeded: succeeded. Otherwise it stays open while a path that counts is open, then is failed
    when one failed or refused, would-execute when one would, and else expired. Beside a path that executes,
    one in dry run does not count; beside one that failed, nor does an open one that was the wrong side: the
    device has had the command and would refuse another copy. `duplicate` says that another path brought the
    command: alone, it leaves the command acknowledged until the outcome comes or the command is closed.
    """
    statuses = {state.status for state in paths}
    if PathStatus.SUCCEEDED in statuses:
        return Status.SUCCEEDED
    executing = [state for state in paths if state.mode is Mode.EXECUTE]
    failed = any(state.status is PathStatus.FAILED for state in executing)
    counted = {state.status for state in executing if not (failed and state.wrong_side)} or statuses
    for status in _STANDING:
        if status in counted:
            return Status.ACKNOWLEDGED if PathStatus.DUPLICATE in counted else Status(status.value)
    if counted & {PathStatus.FAILED, PathStatus.WOULD_REFUSE}:
        return Status.FAILED
    if PathStatus.WOULD_EXECUTE in counted:
        return Status.WOULD_EXECUTE
    if PathStatus.DUPLICATE in counted:
        return Status.ACKNOWLEDGED
    return Status.EXPIRED


def close(paths: Sequence[PathState], at: float) -> tuple[tuple[PathState, ...], Status]:
    """The paths and the final status of a command whose expiry and grace are over."""
    closed = tuple(
        msgspec.structs.replace(state, status=PathStatus.EXPIRED, ended_at=at)
        if state.status in OPEN
        else state
        for state in paths
    )
    status = resolve(closed)
    return closed, status if status in FINAL else Status.EXPIRED


def settled(command: Command, paths: tuple[PathState, ...], at: float) -> Command:
    """The command with new paths. Once it has ended, its own status never changes."""
    if command.ended_at is not None:
        return msgspec.structs.replace(command, paths=paths)
    status = resolve(paths)
    return msgspec.structs.replace(
        command, paths=paths, status=status, ended_at=at if status in FINAL else None
    )


def ended(command: Command, at: float) -> Command:
    """The command once its expiry and grace are over: nothing of it stays open."""
    paths, status = close(command.paths, at)
    if command.ended_at is not None:
        return msgspec.structs.replace(command, paths=paths)
    return msgspec.structs.replace(command, paths=paths, status=status, ended_at=at)


def retry_due(*, now: float, sent_at: float, waiting_since: float, connected_since: float) -> bool:
    """Whether a connected device that has not answered gets another copy.

    `waiting_since` is when the command was made. A device that came back after the last copy gets one shortly
    after it connected; then copies thin out, each waiting half of all that was waited before.
    """
    since_copy = now - max(sent_at, connected_since)
    if connected_since > sent_at:
        return since_copy >= RETRY_AFTER_CONNECT_S
    waited = sent_at - max(waiting_since, connected_since)
    return since_copy >= min(RETRY_AFTER_S_MAX, max(RETRY_AFTER_S, waited / 2))
