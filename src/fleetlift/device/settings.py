"""The limits of an agent; `docs/device.md` lists them with their defaults."""

from typing import Final

import msgspec


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one agent. Times are seconds."""

    window: int = 64  # telemetry messages on the way, each path
    keep_acked_s: float = 1.0  # what the new side acknowledged is kept until it is seen alive so long after
    outbox_max: int = 20_000  # messages; when full, new telemetry is refused and counted
    body_max: int = 240_000  # bytes of one telemetry body
    connect_within_s: float = 10.0
    acked_within_s: float = 10.0  # a link that owes an acknowledgement for longer is closed and made anew
    backoff_s: float = 0.5
    backoff_max_s: float = 10.0
    health_every_s: float = 10.0
    remember_commands_s: float = 8 * 86_400.0  # after the later of receipt and expiry
    executing_max: int = 64
    owed_max: int = 1_000  # answers kept for a path that does not take them
    linger_s: float = 3.0  # a link no longer wanted stays this long for answers that are owed
    stranded_after_s: float = 60.0  # with the old side away for this long, orders are awaited on the new one
    retry_legs_s: float = 3.0
    starts_unserved_max: int = 5  # a moved device that starts so often without being served goes back
    updatable: bool = True  # False: firmware that cannot be moved; it answers orders with "unsupported"


DEFAULTS: Final = AgentSettings()
