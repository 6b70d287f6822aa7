"""One process leads at a time: a service's turn, taken by an advisory lock on the engine's database."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.cancelling import end, raise_if_cancelled
from fleetlift.core.errors import FleetError
from fleetlift.log import get_logger
from fleetlift.migrate.runner import ERROR_PAUSE_S, ROUND_EVERY_S
from fleetlift.store import engine as store
from fleetlift.store.pool import Conn, Pool, open_pool, sole_owner

log = get_logger(__name__)

Lead = Callable[[Pool, "asyncpg.Connection[Any]"], Awaitable[None]]


@contextlib.asynccontextmanager
async def engine_pool(ctx: Context) -> AsyncIterator[Pool]:
    """Connections to the engine's database: those of the backend, when it is the same one."""
    settings = ctx.settings
    if settings.engine_url == settings.database_url:
        yield ctx.pool
    else:
        async with open_pool(settings.engine_url, name="engine") as pool:
            yield pool


async def lead_in_turn(ctx: Context, lock: str, lead: Lead, *, role: str) -> None:
    """Call `lead(engine, connection of the lock)` whenever the lock `lock` is ours, until `ctx.stop` is set.

    The lead is lost with the connection; then it is tried for again.
    """
    async with engine_pool(ctx) as engine:
        work = asyncio.create_task(_lead_forever(ctx, lock, lead, engine, role), name=role)
        stop = asyncio.create_task(ctx.stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            await end([work, stop])


async def _lead_forever(ctx: Context, lock: str, lead: Lead, engine: Pool, role: str) -> None:
    while True:
        try:
            async with sole_owner(ctx.settings.engine_url, lock) as conn:
                log.info(f"{role}_leads")
                await lead(engine, conn)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise_if_cancelled()
            log.warning(f"{role}_lost_database", reason=str(error))
        await asyncio.sleep(ERROR_PAUSE_S)


class Leader:
    """Runs each migration that is wanted while it leads, and lets go of those that are not any more.

    A migration's `wake` says that somebody has asked for something.
    """

    role: str

    def __init__(self, engine: Pool) -> None:
        self._engine = engine
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}

    async def wanted(self, conn: Conn) -> Collection[str]:
        """The names of those that are to be run."""
        raise NotImplementedError

    async def take_up(self, name: str, wake: asyncio.Event) -> "asyncio.Task[None]":
        """Begin to run it. Raises FleetError when it cannot be; then it is tried again and again."""
        raise NotImplementedError

    async def let_go(self, name: str) -> None:
        """Its task has ended: close what was open for it."""

    async def tend(self, wanted: Collection[str]) -> None:
        """What else is to be done in each round."""

    async def lead(self, lock: "asyncpg.Connection[Any]") -> None:
        """Work until the lock's connection is lost, or cancelled."""
        await lock.add_listener(store.REQUEST_CHANNEL, self._asked)
        broken: set[str] = set()
        try:
            while not lock.is_closed():
                async with self._engine.acquire() as conn:
                    wanted = await self.wanted(conn)
                for name in wanted:
                    if name not in self._tasks:
                        try:
                            wake = self._wake.setdefault(name, asyncio.Event())
                            self._tasks[name] = await self.take_up(name, wake)
                            broken.discard(name)
                        except FleetError as error:
                            # One migration that cannot be run must not keep the others from running.
                            if name not in broken:
                                log.error("migration_not_taken_up", migration=name, reason=str(error))
                                broken.add(name)
                for name in [n for n in self._tasks if n not in wanted]:
                    await self._end(name)
                await self.tend(wanted)
                await asyncio.sleep(ROUND_EVERY_S)
            log.warning(f"{self.role}_lost_lock")
        finally:
            for name in list(self._tasks):
                await self._end(name)

    def _asked(self, conn: Any, pid: int, channel: str, payload: object) -> None:
        if (event := self._wake.get(str(payload))) is not None:
            event.set()

    async def _end(self, name: str) -> None:
        task = self._tasks.pop(name)
        self._wake.pop(name, None)
        await end([task])
        await self.let_go(name)
