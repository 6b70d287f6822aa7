"""The mover: carries out every tenant's move that is not over, one leader at a time.

A process of its own beside the controller of fleets, so that a copy at full speed never holds up a wave, and
the other way round.
"""

import asyncio
import contextlib
import os
from collections.abc import Collection
from typing import Any

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.core.errors import FleetError
from fleetlift.log import get_logger
from fleetlift.migrate.kill_switch import KillSwitch
from fleetlift.migrate.leading import Leader, lead_in_turn
from fleetlift.migrate.runner import rounds_forever
from fleetlift.store import tenant_moves
from fleetlift.store.pool import Conn, Pool

log = get_logger(__name__)

LEADER = "tenant mover"


async def run(ctx: Context) -> None:
    """Lead when it is this process's turn, until `ctx.stop` is set."""
    switch = KillSwitch(os.environ.get("FLEETLIFT_KILL_AT", ""), ctx.settings.path / "mover-killed-at")
    await lead_in_turn(ctx, LEADER, lambda pool, lock: Mover(ctx, pool, switch).lead(lock), role=Mover.role)


class Mover(Leader):
    """Runs every move that has not been cleaned away."""

    role = "mover"

    def __init__(self, ctx: Context, engine: Pool, switch: KillSwitch) -> None:
        super().__init__(engine)
        self._ctx = ctx
        self._switch = switch
        self._runners: dict[str, Any] = {}

    async def wanted(self, conn: Conn) -> Collection[str]:
        return await tenant_moves.unfinished(conn)

    async def take_up(self, name: str, wake: asyncio.Event) -> "asyncio.Task[None]":
        # Most instances never move a tenant: what it takes is loaded with the first move.
        from fleetlift.mover.wiring import runner_of

        async with self._engine.acquire() as conn:
            stored = await tenant_moves.load(conn, name)
        runner = runner_of(stored, ctx=self._ctx, store=self._engine, step=self._switch.step)
        self._runners[name] = runner
        log.info("migration_taken_up", migration=name, phase=stored.state.phase.value)
        return asyncio.create_task(rounds_forever(runner, wake), name=f"move {name}")

    async def let_go(self, name: str) -> None:
        with contextlib.suppress(FleetError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await self._runners.pop(name).close()
