"""A tenant's move whose rounds run in the test's own process, on a small source and target."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import asyncpg

from fleetlift.backend import registry
from fleetlift.backend.context import Context
from fleetlift.config import Settings
from fleetlift.core.migration import Phase, RequestKind
from fleetlift.core.tenant.move import MoveState, begin
from fleetlift.migrate.runner import rounds_forever
from fleetlift.mover.runner import MoveRunner, read_plan
from fleetlift.mover.wiring import runner_of
from fleetlift.store import engine, tenant_moves
from fleetlift.store.pool import Pool

SCHEMA = """
CREATE TABLE owner (id int PRIMARY KEY);
CREATE TABLE item (id int PRIMARY KEY, owner_id int NOT NULL REFERENCES owner, name text NOT NULL);
CREATE TABLE event (item_id int REFERENCES item, body text);
CREATE INDEX ON item (owner_id);
"""
ROWS = """
INSERT INTO owner VALUES (1), (2);
INSERT INTO item SELECT n, 1 + n % 2, 'item ' || n FROM generate_series(1, 20) n;
INSERT INTO event SELECT id, 'event' FROM item;
"""
PLAN = """\
migration: {name}
tenant: {name}
from: {{postgresql: "{source}", password_env: {password}_SOURCE}}
to: {{postgresql: "{target}", password_env: {password}_TARGET}}
steps:
  - copy: tenant data
    root: owner.id = {owner}
    tables:
      event: {{identity: full}}
  - switch: database
    at_most: 5s
"""


async def fill(url: str) -> None:
    """The source: items with an even number are owner 1's, the others owner 2's."""
    await run(url, SCHEMA, ROWS)


async def run(url: str, *statements: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        for statement in statements:
            await conn.execute(statement)
    finally:
        await conn.close()


async def value(url: str, query: str) -> Any:
    conn = await asyncpg.connect(url)
    try:
        return await conn.fetchval(query)
    finally:
        await conn.close()


def no_step(_name: str) -> None:
    """The hook of a mover that nobody kills."""


class Moving:
    """One move in the engine's store, and the mover that looks after it while there is one."""

    def __init__(self, pool: Pool, name: str, directory: Path) -> None:
        self.pool, self.name, self.directory = pool, name, directory
        self.runner: MoveRunner | None = None
        self._rounds: asyncio.Task[None] | None = None

    async def start(self, step: Callable[[str], None] = no_step) -> None:
        """A mover begins, as after a restart. `step` is called at named steps."""
        async with self.pool.acquire() as conn:
            stored = await tenant_moves.load(conn, self.name)
        ctx = SimpleNamespace(settings=Settings(data_dir=str(self.directory)), pool=self.pool)
        self.runner = runner_of(stored, ctx=cast(Context, ctx), store=self.pool, step=step)
        self._rounds = asyncio.create_task(rounds_forever(self.runner, asyncio.Event(), every_s=0.1))

    async def stop(self) -> None:
        """The mover ends; what it was at is begun again by the next."""
        if self._rounds is not None and self.runner is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
            await self.runner.close()
        self.runner = self._rounds = None

    async def ask(self, kind: RequestKind) -> None:
        async with self.pool.acquire() as conn:
            await engine.add_request(conn, self.name, kind, {}, "ann")

    async def state(self) -> MoveState:
        async with self.pool.acquire() as conn:
            return (await tenant_moves.load(conn, self.name)).state

    async def noted(self, kind: str) -> int:
        """How many entries of a kind are in the audit log."""
        async with self.pool.acquire() as conn:
            return int(await conn.fetchval("SELECT count(*) FROM engine.audit WHERE kind = $1", kind))

    async def until(self, condition: Callable[[MoveState], bool], within_s: float = 60.0) -> MoveState:
        """The state once nothing is asked for any more and the condition holds."""
        end = asyncio.get_running_loop().time() + within_s
        while True:
            async with self.pool.acquire() as conn:
                asked = await engine.open_requests(conn, self.name)
            state = await self.state()
            if not asked and condition(state):
                return state
            assert asyncio.get_running_loop().time() < end, state
            await asyncio.sleep(0.05)

    async def until_phase(self, *phases: Phase, within_s: float = 60.0) -> MoveState:
        return await self.until(lambda state: state.phase in phases, within_s)


@contextlib.asynccontextmanager
async def move(
    pool: Pool,
    directory: Path,
    source: str,
    target: str,
    *,
    name: str = "one",
    owner: int = 1,
    create: bool = False,
) -> AsyncIterator[Moving]:
    """A move of an owner's rows that has not begun; its mover is not there yet. `create`: it makes the
    target's database."""
    urls, password = {}, f"PASSWORD_OF_{name.upper()}"
    for side, url in (("SOURCE", source), ("TARGET", target)):
        parts = urlsplit(url)
        user, _, os.environ[f"{password}_{side}"] = parts.netloc.rpartition("@")[0].partition(":")
        urls[side.lower()] = parts._replace(netloc=f"{user}@").geturl()
    text = PLAN.format(name=name, owner=owner, password=password, **urls)
    text = text.replace("to: {", "to: {create: true, ") if create else text
    async with pool.acquire() as conn:
        await registry.create_tenant(conn, name, name)
        await tenant_moves.create(
            conn,
            tenant=name,
            plan=text,
            files={},
            state=begin(read_plan(text)),
            audit=[],
            created_by="ann",
            now=0.0,
        )
    moving = Moving(pool, name, directory)
    try:
        yield moving
    finally:
        await moving.stop()
        for side in ("SOURCE", "TARGET"):
            del os.environ[f"{password}_{side}"]
