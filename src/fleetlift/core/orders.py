"""What a migration tells a device, and what the device tells back.

Orders travel as one JSON document: by the old side as its configuration, by the new side as the desired
state of the named shadow `fleetlift`. The device applies the newest epoch it has seen and refuses older
ones, so that two sides never both believe they own it. `docs/device.md` is the language-neutral contract.
"""

from enum import StrEnum

import msgspec


class TelemetryFlag(StrEnum):
    OLD = "old"
    BOTH = "both"
    NEW = "new"


class CommandsFlag(StrEnum):
    OLD = "old"
    DRY_RUN = "dry-run"
    BOTH = "both"
    NEW = "new"


class LinkFlag(StrEnum):
    BOTH = "both"  # the old link stays open; the new one is open when telemetry or commands need it
    NEW = "new"  # the old link is closed


class Flags(msgspec.Struct, frozen=True, kw_only=True, gc=False, rename="kebab"):
    """Which side does what for one device. The defaults are a device that nobody has moved."""

    telemetry: TelemetryFlag = TelemetryFlag.OLD
    commands: CommandsFlag = CommandsFlag.OLD
    link: LinkFlag = LinkFlag.BOTH

    @property
    def needs_new(self) -> bool:
        return self != Flags()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the new side listens for MQTT. With `tls`, `ca_pem` is what its certificate is checked by."""

    host: str
    port: int
    tls: bool = False
    ca_pem: str | None = None


class Orders(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One order to one device.

    `epoch` grows with every order; `new` and `credential` (the password for the new side) come with the
    first order that needs the new side; the try must succeed within `try_within_s`; a moved device that
    has lost the new side for `new_lost_limit_s` goes back to the old side by itself.
    """

    epoch: int
    migration: str
    flags: Flags
    new: Endpoint | None = None
    credential: str | None = None
    try_within_s: float = 30.0
    new_lost_limit_s: float = 30.0


class DevicePhase(StrEnum):
    OLD = "old"  # on the old side, nothing going on
    TRYING = "trying"  # connecting to the new side, or doing the round trip there
    MOVED = "moved"  # the try has succeeded; the flags are applied
    WENT_BACK = "went-back"  # the try failed, or the new side was lost for too long: on the old side alone


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What a device says of itself, by every link it has: the orders it has applied, and how that went."""

    epoch: int
    phase: DevicePhase
    flags: Flags
    reason: str = ""


SHADOW_NAME = "fleetlift"  # the named shadow that carries orders (desired) and reports (reported)
PROBE_COMMAND = (
    "fleetlift.probe"  # the command of a try's round trip: answered, never shown to the application
)
TRY_CHANNEL = "fleetlift/try"  # the telemetry of a try's round trip
HEALTH_CHANNEL = "health"  # a small sign of life the agent sends of its own
