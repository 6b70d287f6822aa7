"""A small mover for tests of the cutover: fences, followers and verifier, and nothing of the controller.

As a program it kills itself at the step it is told: `cutover_mover.py CONFIGURATION STEP`.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import msgspec

from fleetlift.core.tenant.closure import Closure, Root, Rules
from fleetlift.core.tenant.cutover import CutoverState
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.fence import Side
from fleetlift.tenant.cutover import CutoverParts, TouchedChecks, no_step, run_cutover
from fleetlift.tenant.ddl import set_sequences_ahead
from fleetlift.tenant.fence import Fence
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.verify import Verifier

MOVE = "small"
SCHEMA = """
CREATE TABLE customers (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE device (
    id bigserial PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers, name text NOT NULL UNIQUE);
CREATE TABLE reading (
    device_id bigint NOT NULL REFERENCES device, n bigint, value text, PRIMARY KEY (device_id, n));
CREATE TABLE tag (device_id bigint REFERENCES device, tag text);
CREATE TABLE link (
    id int PRIMARY KEY, device_id bigint NOT NULL REFERENCES device, peer_id bigint REFERENCES device);
"""
ROWS = """
INSERT INTO customers VALUES (1, 'one'), (2, 'two'), (3, 'three');
INSERT INTO device (id, customer_id, name) SELECT c * 10 + n, c, c || '-' || n
    FROM generate_series(1, 3) c, generate_series(0, 2) n;
SELECT setval('device_id_seq', 100);
INSERT INTO reading SELECT id, n, 'r' || n FROM device, generate_series(1, 5) n;
INSERT INTO tag SELECT id, 'old' FROM device, generate_series(1, 2);
INSERT INTO link VALUES (1, 20, 21), (2, 20, NULL), (3, 11, 12);
"""


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    target: str
    directory: str
    token: str
    at_most_s: float = 20.0

    @property
    def state_file(self) -> Path:
        return Path(self.directory) / "state.json"

    def state(self) -> CutoverState:
        if not self.state_file.exists():
            return CutoverState()
        return msgspec.json.decode(self.state_file.read_bytes(), type=CutoverState)

    async def save(self, state: CutoverState) -> None:
        unfinished = self.state_file.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(state))
        unfinished.rename(self.state_file)


async def closure_at(url: str) -> Closure:
    conn = await asyncpg.connect(url)
    try:
        return closure_of(
            await read_schema(conn),
            Rules(root=Root(table="public.customers", column="id", value="2"), full_identity=("public.tag",)),
        )
    finally:
        await conn.close()


def fences(given: Configuration, closure: Closure) -> tuple[Fence, Fence]:
    """Of the source and of the target."""
    source, target = (
        Fence(url, closure, move=MOVE, side=side, token=given.token, new_place="small.example.com")
        for url, side in ((given.source, Side.SOURCE), (given.target, Side.TARGET))
    )
    return source, target


class ReverseStream:
    """The follower from the target to the source, in a task of its own."""

    def __init__(self, given: Configuration, closure: Closure, token: Fence) -> None:
        self.follower = Follower(
            given.target,
            given.source,
            closure,
            move=MOVE,
            directory=Path(given.directory),
            direction=Direction.REVERSE,
            target_settings=token.pass_settings,
        )
        self.task: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        if (await self.follower.prepare()).snapshot is not None:
            self.follower.touched.begin()

    async def start(self) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self.follower.run())


class Mover(msgspec.Struct, kw_only=True):
    parts: CutoverParts
    forward: Follower
    reverse: ReverseStream
    verifier: Verifier
    back: TouchedChecks


@contextlib.asynccontextmanager
async def moving(given: Configuration) -> AsyncIterator[Mover]:
    """A mover whose follower has caught up. Its slot was made before the source had any row."""
    closure = await closure_at(given.source)
    source, target = fences(given, closure)
    forward = Follower(
        given.source,
        given.target,
        closure,
        move=MOVE,
        directory=Path(given.directory),
        target_settings=target.pass_settings,
    )
    await forward.prepare()
    forward.start_applying()
    running = asyncio.create_task(forward.run())
    reverse = ReverseStream(given, closure, source)

    async def settle(lsn: int) -> None:
        await forward.reached(lsn, 10.0)

    async def settle_back(lsn: int) -> None:
        assert await reverse.follower.reached(lsn, 10.0)

    verifier = Verifier(given.source, given.target, closure, settle=settle, move=MOVE)
    behind = Verifier(given.source, given.target, closure, settle=settle_back, back=True)
    try:
        async with asyncio.timeout(30):
            while not forward.caught_up:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with verifier, behind:
            yield Mover(
                parts=CutoverParts(
                    source=source,
                    target=target,
                    stream=forward,
                    checks=TouchedChecks(verifier, forward.touched),
                    reverse=reverse,
                    set_sequences=lambda: set_sequences_ahead(given.source, given.target, closure, gap=1000),
                ),
                forward=forward,
                reverse=reverse,
                verifier=verifier,
                back=TouchedChecks(behind, reverse.follower.touched),
            )
    finally:
        tasks = [running, *([reverse.task] if reverse.task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await source.aclose()
        await target.aclose()


async def cut_over(mover: Mover, given: Configuration, step: Callable[[str], None] = no_step) -> CutoverState:
    return await run_cutover(
        mover.parts, given.state(), at_most_s=given.at_most_s, save=given.save, step=step, settle_within_s=20
    )


def kill_at(wanted: str) -> Callable[[str], None]:
    def step(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


async def main(file: str, wanted: str) -> None:
    given = msgspec.json.decode(Path(file).read_bytes(), type=Configuration)
    async with moving(given) as mover:
        await cut_over(mover, given, kill_at(wanted))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
