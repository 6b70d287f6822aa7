"""The bridge in the moment when the last migration that it is for is released, or when it is to stop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from fleetlift import cancelling
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DeviceReport
from fleetlift.core.telemetry import DeadLetter
from fleetlift.migrate.bridge import Bridge
from fleetlift.sides.base import FeedItem, TelemetryReceived


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


class _Deaf:
    """A side on which a library swallows the first cancellation, as asyncpg does when a connection breaks in
    the same moment."""

    name = "legacy"

    def __init__(self) -> None:
        self.asked = 0

    async def inventory(self) -> list[FleetDevice]:
        self.asked += 1
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        return []

    async def reports(self) -> dict[str, DeviceReport]:
        return {}

    async def feed(self, after: str) -> AsyncIterator[tuple[str, list[FeedItem]]]:
        await asyncio.sleep(3600)
        yield after, []


class _Nowhere(_Store):
    async def position(self, key: str) -> str | None:
        return None

    async def take_outgoing(self, *_: Any, **__: Any) -> tuple[str, list[Any]]:
        return "", []


async def test_a_bridge_ends_though_a_library_has_lost_the_word_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a controller that lost its database waits for it for ever, and no migration goes on. (Found by a
    soak.)"""

    async def to_log(topic: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        return 1

    monkeypatch.setattr(cancelling, "ASK_AGAIN_S", 0.1)
    side = _Deaf()
    bridge = Bridge(side, key="legacy", store=_Nowhere(), to_log=to_log)  # type: ignore[arg-type]
    task = asyncio.create_task(bridge.run())
    while not side.asked:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await cancelling.end([task])
