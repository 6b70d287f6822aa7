"""The bridge in the moment when the last migration that it is for is released."""

from collections.abc import Mapping, Sequence
from typing import Any

from fleetlift.core.telemetry import DeadLetter
from fleetlift.migrate.bridge import Bridge
from fleetlift.sides.base import TelemetryReceived


class _Side:
    name = "legacy"


class _Store:
    """Knows who owns the devices. While it is asked, the migration is released."""

    def __init__(self) -> None:
        self.bridge: Any = None

    async def owners(self, of: Sequence[str]) -> dict[str, str]:
        self.bridge.migrations.clear()
        return dict.fromkeys(of, "carshare")


async def test_what_is_read_while_the_last_migration_is_released_does_not_become_foreign() -> None:
    """It was acknowledged to the device: it goes into the log, and is no dead letter. (Found by a soak.)"""
    entered: list[str] = []

    async def to_log(topic: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        entered.append(topic)
        return len(entered)

    store = _Store()
    bridge = Bridge(_Side(), key="legacy", store=store, to_log=to_log)  # type: ignore[arg-type]
    bridge.migrations["one"] = "carshare"
    store.bridge = bridge
    message = TelemetryReceived(
        device="car-0", channel="position", seq=7, ts=1.0, body=b"{}", received_at=2.0
    )
    letters: list[DeadLetter] = await bridge._enter([message])
    assert letters == []
    assert entered == ["feed/legacy/car-0/position"]
