"""The device shadow's rules, those of AWS IoT Core: what a request makes of a document, and what is answered.

Pure: a stored shadow and a request go in, the new shadow and the answers come out. Nothing is changed in
place. Source: AWS IoT Core developer guide, "Device Shadow service documents", "Device Shadow MQTT topics"
and "Device Shadow error messages". Where the guide is silent, `docs/shadows.md` says what was chosen.
"""

import re
from enum import IntEnum, StrEnum
from typing import TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from fleetlift.core.jsonvalue import Json, JsonObject

SHADOW_NAME = re.compile(r"[$a-zA-Z0-9:_-]{1,64}")
CLASSIC = ""  # the name under which the unnamed shadow is kept

KEEPS_VERSION_S = 48 * 3600  # a shadow made again within this time goes on counting
CLIENT_TOKEN_BYTES_MAX = 64


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How large a shadow may grow. `state_bytes` counts desired and reported as compact JSON, not metadata.

    `depth` counts from 1 at the children of desired and reported. The defaults refuse nothing that a cloud
    a fleet may come from accepts; `STRICT` is what AWS itself allows.
    """

    state_bytes: int = 65_536
    depth: int = 10
    request_bytes: int = 262_144


DEFAULT = Limits()
STRICT = Limits(state_bytes=8_192, depth=8, request_bytes=131_072)


class ShadowKey(msgspec.Struct, frozen=True, order=True):
    """One shadow of one device. `name` is "" for the classic shadow."""

    device: str
    name: str = CLASSIC


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """One stored shadow. An absent section is None; metadata has its tree, with timestamps as leaves.

    A deleted shadow stays as a version number (`deleted_at`, Unix seconds), so that numbering can go on.
    """

    version: int
    updated_at: float
    desired: JsonObject | None = None
    reported: JsonObject | None = None
    desired_meta: JsonObject | None = None
    reported_meta: JsonObject | None = None
    deleted_at: float | None = None


# -- what is answered ----------------------------------------------------------------------------------


class Suffix(StrEnum):
    """The end of the topic that an answer goes to."""

    GET_ACCEPTED = "get/accepted"
    GET_REJECTED = "get/rejected"
    UPDATE_ACCEPTED = "update/accepted"
    UPDATE_REJECTED = "update/rejected"
    DELTA = "update/delta"
    DOCUMENTS = "update/documents"
    DELETE_ACCEPTED = "delete/accepted"
    DELETE_REJECTED = "delete/rejected"


class _Body(msgspec.Struct, frozen=True, kw_only=True, rename={"client_token": "clientToken"}):
    pass


class Document(_Body, frozen=True, kw_only=True):
    """The body of get/accepted (the whole shadow) and update/accepted (the request and its timestamps)."""

    state: JsonObject | None
    metadata: JsonObject
    version: int
    timestamp: int
    client_token: str | UnsetType = UNSET


class Delta(_Body, frozen=True, kw_only=True):
    """The part of desired that the device has not reported, with that part's metadata."""

    version: int
    timestamp: int
    state: JsonObject
    metadata: JsonObject
    client_token: str | UnsetType = UNSET


class Snapshot(_Body, frozen=True, kw_only=True):
    state: JsonObject
    metadata: JsonObject
    version: int


class Documents(_Body, frozen=True, kw_only=True):
    """The shadow before (absent for a first update) and after an update."""

    previous: Snapshot | UnsetType = UNSET
    current: Snapshot
    timestamp: int
    client_token: str | UnsetType = UNSET


class Deleted(_Body, frozen=True, kw_only=True):
    version: int
    timestamp: int
    client_token: str | UnsetType = UNSET


class Code(IntEnum):
    BAD_REQUEST = 400
    NOT_FOUND = 404
    CONFLICT = 409
    TOO_LARGE = 413
    NOT_UTF8 = 415


class Refused(_Body, frozen=True, kw_only=True):
    """The error document. `message` is AWS's own text, which some firmware compares letter by letter."""

    code: Code
    message: str
    timestamp: int | UnsetType = UNSET
    client_token: str | UnsetType = UNSET


Body: TypeAlias = Document | Delta | Documents | Deleted | Refused


class Answer(msgspec.Struct, frozen=True):
    suffix: Suffix
    body: Body


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a request led to. `shadow` is to be stored; None: nothing changes. Answers in order of sending."""

    shadow: Shadow | None
    answers: tuple[Answer, ...]

    @property
    def refused(self) -> Refused | None:
        body = self.answers[0].body
        return body if isinstance(body, Refused) else None


# -- requests ------------------------------------------------------------------------------------------


class Operation(StrEnum):
    GET = "get"
    UPDATE = "update"
    DELETE = "delete"


def handle(
    operation: Operation,
    key: ShadowKey,
    shadow: Shadow | None,
    payload: bytes,
    now: float,
    limits: Limits = DEFAULT,
) -> Outcome:
    """What one request from a topic leads to. `shadow` is the stored one, a deleted one included."""
    match operation:
        case Operation.GET:
            return get(key, shadow, now, _token_of(payload))
        case Operation.DELETE:
            return delete(key, shadow, now, _token_of(payload))
        case Operation.UPDATE:
            request = read_update(payload, limits, now)
            if isinstance(request, Refused):
                return Outcome(shadow=None, answers=(Answer(Suffix.UPDATE_REJECTED, request),))
            return update(shadow, request, now, limits)


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """A checked update request. A section UNSET is not named; None removes it; `clear` is `"state": null`."""

    desired: JsonObject | UnsetType | None = UNSET
    reported: JsonObject | UnsetType | None = UNSET
    clear: bool = False
    version: int | None = None
    client_token: str | UnsetType = UNSET


def read_update(payload: bytes, limits: Limits, now: float) -> Update | Refused:
    """The request that `payload` holds, or AWS's error for what is wrong with it."""
    token: str | UnsetType = UNSET

    def refused(message: str, code: Code = Code.BAD_REQUEST) -> Refused:
        return Refused(code=code, message=message, timestamp=int(now), client_token=token)

    if len(payload) > limits.request_bytes:
        return refused("The payload exceeds the maximum size allowed", Code.TOO_LARGE)
    try:
        body: Json = msgspec.json.decode(payload)
    except RecursionError:
        return refused(_TOO_DEEP)
    except (msgspec.MsgspecError, ValueError):
        try:
            payload.decode()
        except UnicodeDecodeError:
            return refused("Unsupported documented encoding; supported encoding is UTF-8", Code.NOT_UTF8)
        return refused("Invalid JSON")
    if not isinstance(body, dict):
        return refused("Invalid JSON")
    if (given := body.get("clientToken")) is not None:
        if not isinstance(given, str) or len(given.encode()) > CLIENT_TOKEN_BYTES_MAX:
            return refused("Invalid clientToken")
        token = given
    version = body.get("version")
    if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 0):
        return refused("Invalid version")
    if "state" not in body:
        return refused("Missing required node: state")
    state = body["state"]
    if state is None:
        return Update(clear=True, version=version, client_token=token)
    if not isinstance(state, dict):
        return refused("State node must be an object")
    sections: dict[str, JsonObject | UnsetType | None] = {}
    for name in ("desired", "reported"):
        section = state.get(name, UNSET)
        if section is not UNSET and section is not None:
            if not isinstance(section, dict):
                return refused(f"{name.capitalize()} node must be an object")
            if (wrong := _wrong(section, limits.depth)) is not None:
                return refused(wrong)
        sections[name] = section
    return Update(
        desired=sections["desired"], reported=sections["reported"], version=version, client_token=token
    )


def get(key: ShadowKey, shadow: Shadow | None, now: float, client_token: str | UnsetType = UNSET) -> Outcome:
    """The whole document, with the delta when there is one."""
    if shadow is None or shadow.deleted_at is not None:
        return Outcome(shadow=None, answers=(Answer(Suffix.GET_REJECTED, _no_shadow(key, client_token)),))
    body = document(shadow, now, client_token)
    return Outcome(shadow=None, answers=(Answer(Suffix.GET_ACCEPTED, body),))


def delete(
    key: ShadowKey, shadow: Shadow | None, now: float, client_token: str | UnsetType = UNSET
) -> Outcome:
    """Removes the document and keeps its version, from which a shadow made again within 48 hours goes on."""
    if shadow is None or shadow.deleted_at is not None:
        return Outcome(shadow=None, answers=(Answer(Suffix.DELETE_REJECTED, _no_shadow(key, client_token)),))
    return Outcome(
        shadow=Shadow(version=shadow.version, updated_at=now, deleted_at=now),
        answers=(
            Answer(
                Suffix.DELETE_ACCEPTED,
                Deleted(version=shadow.version, timestamp=int(now), client_token=client_token),
            ),
        ),
    )


def update(shadow: Shadow | None, request: Update, now: float, limits: Limits = DEFAULT) -> Outcome:
    """Merges `request` into the shadow, which is made when there is none.

    Every accepted update adds exactly 1 to the version, also one without effect. Answers: accepted, then the
    delta when the whole document has one (whether or not this update touched it), then both documents.
    """
    timestamp, token = int(now), request.client_token

    def refused(message: str, code: Code) -> Outcome:
        body = Refused(code=code, message=message, timestamp=timestamp, client_token=token)
        return Outcome(shadow=None, answers=(Answer(Suffix.UPDATE_REJECTED, body),))

    before = shadow if shadow is not None and shadow.deleted_at is None else None
    if request.version is not None and request.version != (before.version if before is not None else 0):
        return refused("Version conflict", Code.CONFLICT)

    if request.clear:
        desired = reported = _Section(None, None, None)
    else:
        desired = _merged(
            before.desired if before else None,
            before.desired_meta if before else None,
            request.desired,
            timestamp,
        )
        reported = _merged(
            before.reported if before else None,
            before.reported_meta if before else None,
            request.reported,
            timestamp,
        )
    if _size(desired.state) + _size(reported.state) > limits.state_bytes:
        return refused("The payload exceeds the maximum size allowed", Code.TOO_LARGE)

    after = Shadow(
        version=_version_before(shadow, now) + 1,
        updated_at=now,
        desired=desired.state,
        reported=reported.state,
        desired_meta=desired.meta,
        reported_meta=reported.meta,
    )
    answers = [Answer(Suffix.UPDATE_ACCEPTED, _echo(request, desired, reported, after.version, timestamp))]
    lacking = delta(after)
    if lacking is not None:
        state, metadata = lacking
        answers.append(
            Answer(
                Suffix.DELTA,
                Delta(
                    version=after.version,
                    timestamp=timestamp,
                    state=state,
                    metadata=metadata,
                    client_token=token,
                ),
            )
        )
    answers.append(
        Answer(
            Suffix.DOCUMENTS,
            Documents(
                previous=_snapshot(before) if before is not None else UNSET,
                current=_snapshot(after),
                timestamp=timestamp,
                client_token=token,
            ),
        )
    )
    return Outcome(shadow=after, answers=tuple(answers))


def document(shadow: Shadow, now: float, client_token: str | UnsetType = UNSET) -> Document:
    """The shadow as get/accepted shows it."""
    state, metadata = _sections(shadow)
    lacking = delta(shadow)
    if lacking is not None:
        state["delta"] = lacking[0]
    return Document(
        state=state, metadata=metadata, version=shadow.version, timestamp=int(now), client_token=client_token
    )


def delta(shadow: Shadow) -> tuple[JsonObject, JsonObject] | None:
    """What the device still lacks, and that part's metadata; None when it has everything desired."""
    if shadow.desired is None:
        return None
    state, metadata = _lacking(shadow.desired, shadow.desired_meta or {}, shadow.reported or {})
    return (state, metadata) if state else None


def delta_answer(shadow: Shadow, now: float) -> Answer | None:
    """The delta message of a shadow as it stands, for telling a device again."""
    lacking = delta(shadow)
    if lacking is None:
        return None
    state, metadata = lacking
    body = Delta(version=shadow.version, timestamp=int(now), state=state, metadata=metadata)
    return Answer(Suffix.DELTA, body)


def replacing(held: JsonObject | None, wanted: JsonObject) -> JsonObject:
    """The patch that makes a section `held` exactly `wanted`: keys that are not wanted become null."""
    patch: JsonObject = {key: None for key in (held or {}) if key not in wanted}
    for key, value in wanted.items():
        here = (held or {}).get(key)
        patch[key] = replacing(here, value) if isinstance(here, dict) and isinstance(value, dict) else value
    return patch


def same(a: Json, b: Json) -> bool:
    """Equality of JSON values: 1 equals 1.0, true does not equal 1 (as Python would have it)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# -- inside --------------------------------------------------------------------------------------------

_TOO_DEEP = "JSON contains too many levels of nesting; maximum is 6"  # AWS's text, whatever its limit is
_INVALID_NODE = "State contains an invalid node"


class _Section(msgspec.Struct, frozen=True):
    """A section after an update, and what the answer says of the fields named (None: it is not named)."""

    state: JsonObject | None
    meta: JsonObject | None
    echo: Json


def _merged(
    state: JsonObject | None, meta: JsonObject | None, patch: JsonObject | UnsetType | None, timestamp: int
) -> _Section:
    if isinstance(patch, UnsetType):
        return _Section(state, meta, None)
    if patch is None:
        return _Section(None, None, {"timestamp": timestamp})
    merged, merged_meta, echo = _merge(state or {}, meta or {}, patch, timestamp)
    # a section without keys is no section; an empty object further inside is a value like any other
    return _Section(merged or None, merged_meta if merged else None, echo)


def _merge(
    state: JsonObject, meta: JsonObject, patch: JsonObject, timestamp: int
) -> tuple[JsonObject, JsonObject, JsonObject]:
    """Copies of state and metadata with the patch applied, and metadata for every field the patch names."""
    state, meta = dict(state), dict(meta)
    echo: JsonObject = {}
    for key, value in patch.items():
        if value is None:
            state.pop(key, None)
            meta.pop(key, None)
            echo[key] = {"timestamp": timestamp}
        elif isinstance(value, dict):
            held, held_meta = state.get(key), meta.get(key)
            if not isinstance(held, dict) or not isinstance(held_meta, dict):
                held, held_meta = {}, {}
            state[key], meta[key], echo[key] = _merge(held, held_meta, value, timestamp)
        else:
            state[key] = value
            meta[key] = echo[key] = _stamped(value, timestamp)
    return state, meta, echo


def _stamped(value: Json, timestamp: int) -> Json:
    """The metadata of a value: each leaf becomes its timestamp, an array one per element."""
    if isinstance(value, dict):
        return {key: _stamped(inner, timestamp) for key, inner in value.items()}
    if isinstance(value, list):
        return [_stamped(inner, timestamp) for inner in value]
    return {"timestamp": timestamp}


def _lacking(desired: JsonObject, meta: JsonObject, reported: JsonObject) -> tuple[JsonObject, JsonObject]:
    state: JsonObject = {}
    metadata: JsonObject = {}
    for key, wanted in desired.items():
        if key in reported:
            had, stamp = reported[key], meta.get(key)
            if isinstance(wanted, dict) and isinstance(had, dict):
                inner, inner_meta = _lacking(wanted, stamp if isinstance(stamp, dict) else {}, had)
                if inner:
                    state[key], metadata[key] = inner, inner_meta
                continue
            if same(wanted, had):
                continue
        state[key] = wanted
        if key in meta:
            metadata[key] = meta[key]
    return state, metadata


def _wrong(section: JsonObject, depth_max: int) -> str | None:
    """What is wrong with a section: nested too deep, or a null inside an array."""
    work: list[tuple[Json, int, bool]] = [(section, 0, False)]
    while work:
        value, depth, in_array = work.pop()
        if isinstance(value, dict | list):
            if depth >= depth_max and value:
                return _TOO_DEEP
            if isinstance(value, dict):
                # a null below an array cannot mean "remove", since arrays are replaced as a whole
                work.extend((inner, depth + 1, in_array) for inner in value.values())
            else:
                work.extend((inner, depth + 1, True) for inner in value)
        elif value is None and in_array:
            return _INVALID_NODE
    return None


def _size(section: JsonObject | None) -> int:
    return len(msgspec.json.encode(section)) if section is not None else 0


def _version_before(shadow: Shadow | None, now: float) -> int:
    if shadow is None:
        return 0
    if shadow.deleted_at is not None and now - shadow.deleted_at > KEEPS_VERSION_S:
        return 0
    return shadow.version


def _echo(request: Update, desired: _Section, reported: _Section, version: int, timestamp: int) -> Document:
    """What update/accepted says: the request's own state, nulls included, and metadata for those fields."""
    state: JsonObject | None = None
    metadata: JsonObject = {"timestamp": timestamp}
    if not request.clear:
        state, metadata = {}, {}
        for name, named, section in (
            ("desired", request.desired, desired),
            ("reported", request.reported, reported),
        ):
            if not isinstance(named, UnsetType):
                state[name], metadata[name] = named, section.echo
    return Document(
        state=state,
        metadata=metadata,
        version=version,
        timestamp=timestamp,
        client_token=request.client_token,
    )


def _sections(shadow: Shadow) -> tuple[JsonObject, JsonObject]:
    state: JsonObject = {}
    metadata: JsonObject = {}
    if shadow.desired is not None:
        state["desired"], metadata["desired"] = shadow.desired, shadow.desired_meta
    if shadow.reported is not None:
        state["reported"], metadata["reported"] = shadow.reported, shadow.reported_meta
    return state, metadata


def _snapshot(shadow: Shadow) -> Snapshot:
    state, metadata = _sections(shadow)
    return Snapshot(state=state, metadata=metadata, version=shadow.version)


def _no_shadow(key: ShadowKey, client_token: str | UnsetType) -> Refused:
    # no timestamp: the live service sends exactly these fields, and firmware is known to compare the text
    name = f"{key.device}~{key.name}" if key.name else key.device
    return Refused(
        code=Code.NOT_FOUND, message=f"No shadow exists with name: '{name}'", client_token=client_token
    )


class _Token(msgspec.Struct, frozen=True, rename={"client_token": "clientToken"}):
    client_token: str | UnsetType = UNSET


def _token_of(payload: bytes) -> str | UnsetType:
    """The client token of a get or delete, whose content is ignored otherwise."""
    if not payload or len(payload) > 4096:
        return UNSET
    try:
        token = msgspec.json.decode(payload, type=_Token).client_token
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return UNSET
    return token if isinstance(token, str) and len(token.encode()) <= CLIENT_TOKEN_BYTES_MAX else UNSET
