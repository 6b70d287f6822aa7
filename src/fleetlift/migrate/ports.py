"""What a round of a migration and the bridge need of the world: database, sides, measurements, disk.

The service gives them PostgreSQL and sockets; the simulator gives the same code a world of its own. A call
raises one of `GONE` when what it needs is away.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import asyncpg

from fleetlift.core.gates import Gate
from fleetlift.core.migration import (
    AuditEntry,
    FleetDevice,
    GateResult,
    MigrationState,
    Request,
    Sample,
)
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.plan import Rung
from fleetlift.core.telemetry import DeadLetter
from fleetlift.core.timeline import TimelinePoint
from fleetlift.levers.flag import Moved, Observed, OldSide
from fleetlift.migrate import journal
from fleetlift.sides.base import SideCommand
from fleetlift.store import engine
from fleetlift.store.commands import Answer
from fleetlift.store.engine import StoredMigration
from fleetlift.store.pool import Pool

GONE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)


class Store(Protocol):
    """The engine's database; each call is one transaction."""

    async def load(self, name: str) -> StoredMigration: ...

    async def open_requests(self, name: str) -> Sequence[Request]: ...

    async def commit(
        self,
        before: StoredMigration,
        after: MigrationState,
        *,
        audit: Sequence[AuditEntry],
        answered: Sequence[int],
        gates: Sequence[GateResult],
        plan: str | None,
        now: float,
    ) -> StoredMigration:
        """All or nothing. Raises Conflict when another has committed since `before` was read."""
        ...

    async def add_sample(self, name: str, at: float, point: TimelinePoint) -> None: ...

    async def add_emergency(
        self, name: str, epoch: int, actor: str, *, devices: Sequence[str] | None
    ) -> None: ...


class Lever(Protocol):
    """How devices are moved, and what both sides know of them."""

    async def observe(self, devices: Sequence[str], old: OldSide) -> Observed: ...

    async def move(self, orders: Mapping[str, Orders]) -> Moved: ...


class Old(OldSide, Protocol):
    """The old side as the bridge keeps it up to date."""

    @property
    def why_down(self) -> str: ...

    @property
    def snapshots(self) -> int: ...


class New(Protocol):
    """What the new side does for a migration, apart from taking orders. Raises Unavailable."""

    async def adopt(self, devices: Sequence[FleetDevice], migration: str) -> list[str]: ...

    async def follow_reports(self, reports: Mapping[str, DeviceReport]) -> None: ...

    async def withdraw(self, devices: Sequence[str], *, migration: str) -> None: ...

    def credential(self, device: str) -> str: ...


class Measures(Protocol):
    """Measurements of the open wave; what cannot be measured has no value."""

    async def samples(
        self, gates: Sequence[Gate], state: MigrationState, rungs: Sequence[Rung], now: float
    ) -> dict[str, Sample]: ...

    async def note_baselines(self, epochs: Mapping[str, int]) -> None: ...

    async def rates(self, devices: Sequence[str], now: float) -> tuple[float | None, float | None]: ...

    async def latencies(
        self, devices: Sequence[str], now: float
    ) -> dict[str, tuple[float | None, float | None]]: ...


class Journal(Protocol):
    """The migration's journal on disk."""

    def size(self) -> int:
        """In bytes; 0 when there is none yet."""
        ...

    async def add(self, *records: journal.Record) -> None: ...

    async def story(self) -> journal.Story | None: ...


class FeedStore(Protocol):
    """What the bridge keeps in the backend's database; each call is one transaction."""

    async def position(self, key: str) -> str | None: ...

    async def owners(self, of: Sequence[str]) -> dict[str, str]:
        """The tenants of those devices that the backend knows, or has known."""
        ...

    async def settle(
        self, key: str, position: str, answers: Sequence[Answer], letters: Sequence[DeadLetter]
    ) -> int:
        """Note answers and dead letters with the position that covers them; how many answers were news."""
        ...

    async def take_outgoing(
        self, migrations: Sequence[str], *, again: bool, after: str, limit: int, now: float
    ) -> tuple[str, list[SideCommand]]:
        """Commands of path `old` after the id `after`, marked as sent; the last id looked at ("": none)."""
        ...

    async def unreachable(self, command: str, reason: str, at: float) -> None:
        """The old side could not take this command."""
        ...


class EngineStore:
    """`Store` in PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, name: str) -> StoredMigration:
        async with self._pool.acquire() as conn:
            return await engine.load(conn, name)

    async def open_requests(self, name: str) -> Sequence[Request]:
        async with self._pool.acquire() as conn:
            return await engine.open_requests(conn, name)

    async def commit(self, before: StoredMigration, after: MigrationState, **what: Any) -> StoredMigration:
        async with self._pool.acquire() as conn:
            return await engine.commit(conn, before, after, **what)

    async def add_sample(self, name: str, at: float, point: TimelinePoint) -> None:
        async with self._pool.acquire() as conn:
            await engine.add_sample(conn, name, at, point)

    async def add_emergency(
        self, name: str, epoch: int, actor: str, *, devices: Sequence[str] | None
    ) -> None:
        async with self._pool.acquire() as conn:
            await engine.add_emergency(conn, name, epoch, actor, devices=devices)
