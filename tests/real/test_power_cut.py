"""A power cut takes the end of NATS's log: what comes back, and that everything goes on from there.

The cut is made in the file: the server is killed, and the end of its newest block is torn as a file system
may leave it.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import httpx
import pytest
from log_reader import NOW, caught_up, eventually, publish, publish_all, reading, stored

from fleetlift.backend.context import Context
from fleetlift.bus.log import read, stream_state
from fleetlift.bus.subjects import STREAM
from fleetlift.core.orders import (
    CommandsFlag,
    DevicePhase,
    Endpoint,
    Flags,
    LinkFlag,
    Orders,
    TelemetryFlag,
)
from fleetlift.device import messages
from fleetlift.device.agent import AgentSettings
from fleetlift.device.journal import Journal
from fleetlift.device.shell import DeviceShell
from fleetlift.supervise import locked_directory
from fleetlift.testing import LoopThread, RunningBackend, TestNats, free_port, scratch_directory

PASSWORD = "not-a-real-password-of-car-1"


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


class _Quiet:
    """The device's own program: it takes no commands."""

    def judge(self, name: str, params: bytes) -> str | None:
        return "no commands here"

    async def execute(self, id_: str, name: str, params: bytes) -> tuple[bool, bytes]:
        raise AssertionError("nothing was to be executed")


def on_new_side(directory: Path, mqtt: tuple[str, int]) -> tuple[DeviceShell, Journal]:
    """A device that a migration has moved, with its disk."""
    journal = Journal(directory, schedule=asyncio.get_running_loop().call_later)
    flags = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
    orders = Orders(
        epoch=1,
        migration="done",
        flags=flags,
        new=Endpoint(host=mqtt[0], port=mqtt[1]),
        credential=PASSWORD,
        new_lost_limit_s=600.0,
    )
    record = messages.Record(epoch=1, phase=DevicePhase.MOVED, flags=flags, orders=orders)
    journal.write("car-1", (messages.RecordChanged(record),))
    journal.flush()
    settings = AgentSettings(backoff_s=0.1, backoff_max_s=0.5)
    old = ("127.0.0.1", free_port())
    shell = DeviceShell(
        "car-1", "-", old=old, journal=journal, application=_Quiet(), settings=settings, seed=1
    )
    return shell, journal


@pytest.mark.timeout(180)
async def test_what_a_power_cut_took_from_the_log_comes_again_from_the_device() -> None:
    """Acknowledged, not yet read by anybody, and gone with the end of the log: the device still has it."""
    with scratch_directory() as directory:
        listen = ["--http", f"127.0.0.1:{free_port()}", "--mqtt", f"127.0.0.1:{free_port()}"]
        unread = RunningBackend(directory / "data", [*listen, "--workers", "auth,state,api"], {})
        backend = RunningBackend(directory / "data", listen, {})
        await unread.start()
        device = {"tenant": "carshare", "credentials": [{"kind": "password", "value": PASSWORD}]}
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {unread.token}"}) as client:
            await client.post(f"{unread.url}/api/v1/tenants", json={"id": "carshare", "name": "Car sharing"})
            made = await client.put(f"{unread.url}/api/v1/devices/car-1", json=device)
            assert made.status_code < 300, made.text
        shell, journal = on_new_side(directory / "device", unread.mqtt)
        shell.start()
        try:
            for _ in range(150):
                shell.produce("gps", b'{"lat":47.1}')
                await asyncio.sleep(0.02)
            await eventually(lambda: _true(shell.agent.outbox_depth == 0))
            assert shell.acked["gps"].count == 150
            await unread.kill()
            async with locked_directory(directory / "data"):  # its engines are gone
                blocks = (directory / "data" / "nats" / "jetstream").rglob(f"{STREAM}/msgs/*.blk")
                torn(max(blocks, key=lambda path: int(path.stem)), 3000)
            restarted_at = time.time()
            await backend.start()
            connection = await asyncpg.connect(backend.settings.database_url)
            try:

                async def all_there() -> bool:
                    found = await connection.fetchval("SELECT count(*) FROM telemetry WHERE channel = 'gps'")
                    return int(found) >= 150

                await eventually(all_there, within_s=30.0)
                rows = await connection.fetch(
                    "SELECT seq, extract(epoch FROM received_at)::float8 AS at FROM telemetry "
                    "WHERE channel = 'gps'"
                )
            finally:
                await connection.close()
            assert sorted(row["seq"] for row in rows) == list(range(1, 151))
            assert 5 < sum(row["at"] > restarted_at for row in rows) < 60, (
                "the cut took what is now here again"
            )
        finally:
            await shell.stop()
            journal.close()
            await backend.stop()


async def _true(value: bool) -> bool:
    return value
