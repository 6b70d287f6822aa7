"""From recorded messages to what a replay sends: under names of its own, and never as a real command.

MQTT 3.1.1 has no place for a mark beside a message, so the mark is in the names: whatever a replay sends
upwards comes from an identity `replay-…`, which no real device can have; a replayed command goes to such an
identity, its id begins with `replay-`, its mode is `dry-run` and it says `replayed`. Each of the last three
alone keeps a device from executing it.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import msgspec

from fleetlift.core.capture import CapturedMessage
from fleetlift.core.command import EXPIRES_IN_S_DEFAULT
from fleetlift.core.errors import BadInput
from fleetlift.core.identity import DEVICE_ID, REPLAY_PREFIX, is_replay_id

_ID_CHARS_MAX = 128
_COMMANDS = "$aws/commands/things/"


class Publish(msgspec.Struct, frozen=True, gc=False):
    """To be published by `device`, QoS 1."""

    device: str
    topic: str
    payload: bytes


class SendCommand(msgspec.Struct, frozen=True, gc=False):
    """A command to be sent to `device`, as a dry run. `topic` and `payload`: as a broker is given it."""

    device: str
    name: str
    params: dict[str, Any]
    topic: str
    payload: bytes


class LeftOut(msgspec.Struct, frozen=True, gc=False):
    reason: str


Play = Publish | SendCommand | LeftOut


def replay_id(device: str) -> str:
    """The identity that a recorded device is replayed by."""
    if is_replay_id(device):
        raise BadInput(f"device {device!r} was itself a replay's: a replay is not replayed")
    if DEVICE_ID.fullmatch(device) and len(device) <= _ID_CHARS_MAX - len(REPLAY_PREFIX):
        return REPLAY_PREFIX + device
    return REPLAY_PREFIX + blake2b(device.encode("utf-8", "replace"), digest_size=16).hexdigest()


def checked_names(names: Mapping[str, str]) -> dict[str, str]:
    """A map from recorded devices to identities. Raises BadInput unless every one is reserved for replays."""
    taken: dict[str, str] = {}
    for device, identity in names.items():
        if not DEVICE_ID.fullmatch(identity) or not identity.startswith(REPLAY_PREFIX):
            raise BadInput(
                f"device {device!r} is to be replayed as {identity!r}, which could be a real device: "
                f"identities of a replay begin with {REPLAY_PREFIX!r}"
            )
        if (other := taken.setdefault(identity, device)) != device:
            raise BadInput(f"devices {other!r} and {device!r} are both to be replayed as {identity!r}")
    return dict(names)


class _Request(msgspec.Struct, frozen=True):
    name: str
    params: dict[str, Any] = {}


def play(message: CapturedMessage, identity: str, *, now: float) -> Play:
    """What a replay does with a recorded message. `now`: Unix seconds, from which a command is good again."""
    if not identity.startswith(REPLAY_PREFIX):
        raise BadInput(f"{identity!r} is no identity of a replay")
    levels = _renamed(message.topic.split("/"), message.device, identity)
    if identity not in levels:
        return LeftOut("the topic does not name its device, and would not show that it is replayed")
    is_command = message.topic.startswith(_COMMANDS) and len(levels) > 5
    if is_command and not is_replay_id(levels[5]):
        levels[5] = REPLAY_PREFIX + levels[5]
    topic = "/".join(levels)
    if message.direction == "up":
        return Publish(identity, topic, message.payload)
    if not is_command or levels[6:7] != ["request"]:
        return LeftOut("what the side tells devices by itself (answers, configuration) is not replayed")
    try:
        request = msgspec.json.decode(message.payload, type=_Request)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return LeftOut("a command that cannot be read")
    marked = {
        "name": request.name,
        "params": request.params,
        "mode": "dry-run",
        "replayed": True,
        "expires_at": now + EXPIRES_IN_S_DEFAULT,
    }
    return SendCommand(identity, request.name, request.params, topic, msgspec.json.encode(marked))


def _renamed(levels: list[str], device: str, identity: str) -> list[str]:
    """The device's level replaced: where the topic is known to have it, else wherever it stands."""
    place = {"dt": 1, "$aws": 3 if levels[1:2] == ["commands"] else 2}.get(levels[0])
    if place is not None:
        return (
            [*levels[:place], identity, *levels[place + 1 :]] if levels[place : place + 1] == [device] else []
        )
    return [identity if level == device else level for level in levels]


class Tally(msgspec.Struct):
    """What became of a capture's messages: `total` = acknowledged + refused + failed + left_out + open.

    `refused`: the side did not take it. `failed`: nobody knows whether it has it. `left_out`: not for replay.
    `played`: sent at least once; `again`: sent more than once, which `seq` tells from a second message.
    """

    total: int
    played: int = 0
    acknowledged: int = 0
    refused: int = 0
    failed: int = 0
    left_out: int = 0
    again: int = 0
    reasons: dict[str, int] = {}

    @property
    def open(self) -> int:
        return self.total - self.acknowledged - self.refused - self.failed - self.left_out

    def because(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < 100:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
