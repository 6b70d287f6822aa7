"""Names of devices and tenants, and what they may look like."""

import re

from fleetlift.core.errors import BadInput

DEVICE_ID = re.compile(r"[a-zA-Z0-9:_-]{1,128}")
TENANT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


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
