"""Names of devices and tenants, and what they may look like."""

import re

from fleetlift.core.errors import BadInput

DEVICE_ID = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
TENANT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
REPLAY = "replay"  # tenant of the identities that replays use; `replay-…` are further ones
REPLAY_PREFIX = "replay-"  # of their device ids, and of the ids of replayed commands


def checked_device_id(text: str) -> str:
    """`text` when it can name a device (AWS's rule for things), else BadInput.

    Dots are refused because NATS Server refuses MQTT client ids that contain one.
    """
    if not DEVICE_ID.fullmatch(text):
        raise BadInput(f"device id {text!r}: use 1 to 128 letters, digits, ':', '_' or '-'")
    return text


def checked_tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise BadInput(f"tenant id {text!r}: use 1 to 63 lower-case letters, digits or '-'")
    return text


def is_replay_id(text: str) -> bool:
    """Whether a device or command id is one of a replay: nothing that bears it may move anything."""
    return text[: len(REPLAY_PREFIX)].lower() == REPLAY_PREFIX


def is_replay_tenant(text: str) -> bool:
    return text == REPLAY or text.startswith(REPLAY_PREFIX)


def checked_replay_identity(device: str, tenant: str) -> None:
    """BadInput when a device id reserved for replays goes with a real tenant, or the other way round."""
    if is_replay_id(device) and not is_replay_tenant(tenant):
        raise BadInput(
            f"device id {device!r}: ids that begin with {REPLAY_PREFIX!r} are reserved for replays, whose "
            f"tenant is {REPLAY!r} or begins with {REPLAY_PREFIX!r}: use another id"
        )
    if is_replay_tenant(tenant) and not device.startswith(REPLAY_PREFIX):
        raise BadInput(
            f"tenant {tenant!r} is reserved for replays, and real devices do not belong to it: use another "
            f"tenant, or an id that begins with {REPLAY_PREFIX!r}"
        )
