"""A power cut takes the end of NATS's log: what comes back, and that everything goes on from there.

The cut is made in the file: the server is killed, and the end of its newest block is torn as a file system
may leave it.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from log_reader import NOW, caught_up, eventually, publish, publish_all, reading, stored

from fleetlift.backend.context import Context
from fleetlift.bus.log import read, stream_state
from fleetlift.bus.subjects import STREAM
from fleetlift.testing import LoopThread, TestNats


def newest_block(server: TestNats) -> Path:
    blocks = (server.directory / "nats" / "jetstream").rglob(f"{STREAM}/msgs/*.blk")
    return max(blocks, key=lambda path: int(path.stem))


def torn(path: Path, lost_bytes: int) -> None:
    """The size was not written: the file ends in the middle of a record."""
    os.truncate(path, path.stat().st_size - lost_bytes)


def zeroed(path: Path, lost_bytes: int) -> None:
    """The size was written and the data was not: ext4 shows zeros."""
    size = path.stat().st_size
    os.truncate(path, size - lost_bytes)
    os.truncate(path, size)


def scrambled(path: Path, lost_bytes: int) -> None:
    """A sector of something else stands where the end was."""
    with path.open("r+b") as file:
        file.seek(-lost_bytes, os.SEEK_END)
        file.write(b"\xa5" * min(512, lost_bytes))


def cut_power(server: TestNats, engines: LoopThread, damage: Callable[[Path, int], None], lost: int) -> None:
    engines.run(server.stop())  # SIGKILL
    damage(newest_block(server), lost)
    engines.run(server.server.start())


async def end_of_log(ctx: Context) -> int:
    return (await stream_state(ctx.settings))[2]


@pytest.mark.parametrize("damage", [torn, zeroed, scrambled])
@pytest.mark.parametrize("meanwhile", ["reading", "killed"])
async def test_after_a_torn_tail_what_is_new_is_stored_and_what_comes_again_is_not(
    ctx: Context,
    nats_server: TestNats,
    engine_loop: LoopThread,
    damage: Callable[[Path, int], None],
    meanwhile: str,
) -> None:
    """The reader stood beyond what is left. Numbers of the log are given again, to other messages: those are
    stored, also when they have passed the reader's place before it looks. What devices send again is there
    already."""
    async with reading(ctx):
        await publish_all(ctx, "car-1", range(1, 201))
        await caught_up(ctx)
        assert await stored(ctx) == 200
        if meanwhile == "reading":
            cut_power(nats_server, engine_loop, damage, 4321)
            left = await end_of_log(ctx)
            assert 100 < left < 200
            await publish_all(ctx, "car-1", range(left + 1, 401))
            await eventually(lambda: has(ctx, 400))
    if meanwhile == "killed":
        cut_power(nats_server, engine_loop, damage, 4321)
        left = await end_of_log(ctx)
        assert 100 < left < 200
        await publish_all(
            ctx, "car-1", range(201, 401)
        )  # and the end of the log is beyond the reader's place
        assert await end_of_log(ctx) > 200
        async with reading(ctx):
            await eventually(lambda: has(ctx, 400))
            await caught_up(ctx)
            await publish(ctx, "dt/car-1/gps", {"ts": NOW + 0.4, "seq": 400})
            await caught_up(ctx)
    assert await ctx.pool.fetchval("SELECT count(DISTINCT seq) FROM telemetry") == 400
    assert await stored(ctx) == 400


async def has(ctx: Context, count: int) -> bool:
    return await stored(ctx) >= count


async def test_cut_at_any_byte_the_log_keeps_a_beginning_without_a_gap(
    ctx: Context, nats_server: TestNats, engine_loop: LoopThread
) -> None:
    """What comes back is the messages up to the cut, unchanged and in order; later ones follow on."""
    written = 0
    kept: list[bytes] = []
    for lost in (1, 40, 333, 1):
        await asyncio.gather(
            *(ctx.publisher.to_log("dt/car-1/x", b"message %d" % n) for n in range(written, written + 50))
        )
        before = [m.payload async for batch in all_of(ctx) for m in batch]
        assert before[: len(kept)] == kept
        written += 50
        cut_power(nats_server, engine_loop, torn, lost)
        kept = [m.payload async for batch in all_of(ctx) for m in batch]
        assert kept == before[: len(kept)]
        assert len(before) - 12 <= len(kept) < len(before)


def all_of(ctx: Context):  # type: ignore[no-untyped-def]
    return read(ctx.settings, after=None, filters=[">"], name="all", until_end=True)
