"""The interface that a backend is plugged in by. `docs/your-own-backend.md` shows one in under a page.

A side that only can be read from (a feed) and told orders and commands is enough to be the old side.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.telemetry import HEADER_RECEIVED, HEADER_SEQ, HEADER_TS


class TelemetryReceived(msgspec.Struct, frozen=True, kw_only=True, tag="telemetry"):
    """One telemetry message that the side has stored. Times are Unix seconds; `seq` None: not counted."""

    device: str
    channel: str
    ts: float
    seq: int | None
    body: bytes  # JSON, as the device sent it
    received_at: float


class CommandAnswered(msgspec.Struct, frozen=True, kw_only=True, tag="command"):
    """A device's answer to a command that went by this side. `status` as in `core/command.py`."""

    device: str
    command: str
    status: str
    detail: dict[str, Any] = {}
    at: float


class PresenceChanged(msgspec.Struct, frozen=True, kw_only=True, tag="presence"):
    device: str
    connected: bool
    at: float
    reason: str = ""


class ReportReceived(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    device: str
    report: DeviceReport
    at: float


def log_entry(side: str, message: TelemetryReceived) -> tuple[str, dict[str, str]]:
    """The topic and the headers by which a message that `side` has received enters the log."""
    headers = {HEADER_TS: repr(message.ts), HEADER_RECEIVED: repr(message.received_at)}
    if message.seq is not None:
        headers[HEADER_SEQ] = str(message.seq)
    return f"feed/{side}/{message.device}/{message.channel}", headers


FeedItem = TelemetryReceived | CommandAnswered | PresenceChanged | ReportReceived


class SideCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command to one device. `id` is the same on every path, so that the device refuses a second copy."""

    id: str
    device: str
    name: str
    params: dict[str, Any]
    mode: str  # execute | dry-run
    expires_at: float


class Side(Protocol):
    """What the engine needs of a backend. Each call raises `Unavailable` when the backend does not answer."""

    name: str

    async def inventory(self) -> Sequence[FleetDevice]:
        """Every device the side knows."""
        ...

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        """Hand each device its orders, now or when it next connects; refusals by device with the reason.

        Repeating a delivery is harmless; an epoch older than the one held is refused.
        """
        ...

    async def reports(self) -> Mapping[str, DeviceReport]:
        """The last report of each device that has made one by this side."""
        ...

    async def send_command(self, command: SideCommand) -> None:
        """Queue a command. Sending the same id twice is harmless. The answer comes by the feed."""
        ...

    def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        """All that the side receives after position `after` ("": from the beginning), with new positions.

        A position without items is a sign of life. A side whose idle feed gives one every so many seconds may
        say so by an attribute `feed_speaks_every_s`; then gates see at once when the feed has gone silent.
        Ends or raises when the side is lost; the caller comes back with the position it has stored.
        """
        ...

    async def close(self) -> None: ...
