"""The log and the publisher, on a real NATS Server: nothing skipped, nothing twice, whatever is killed."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
from nats.js.api import StreamConfig

from fleetlift.backend.context import Context
from fleetlift.bus.connect import ensure_log
from fleetlift.bus.log import LogMessage, read, stream_state
from fleetlift.bus.publish import ToDevice
from fleetlift.bus.subjects import STREAM
from fleetlift.config import Settings
from fleetlift.core.errors import BadInput, Conflict, FleetError, Unavailable
from fleetlift.store import positions
from fleetlift.testing import LoopThread, TestNats


async def until(true: Callable[[], bool], within_s: float = 20.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_was_stored_is_read_in_order_and_once(ctx: Context) -> None:
    """Every message published into the log comes back in order, with topic, payload and headers."""
    topic = "feed/legacy/d.1/gps"
    await asyncio.gather(
        *(ctx.publisher.to_log(topic, b"%d" % n, {"Fleetlift-Seq": str(n)}) for n in range(3000))
    )
    seen: list[LogMessage] = []
    async for batch in read(ctx.settings, after=None, filters=["feed.>"], name="t", until_end=True):
        assert batch.position.seq == batch[-1].seq
        seen += batch
    assert [m.seq for m in seen] == list(range(1, 3001))
    assert sorted(int(m.payload) for m in seen) == list(range(3000))
    assert all(m.headers["Fleetlift-Seq"] == m.payload.decode() for m in seen)
    assert {m.topic for m in seen} == {topic}


async def test_a_reader_sees_only_what_it_filters(ctx: Context) -> None:
    """Filters are subjects of topics; the position still moves by the sequence of the whole log."""
    for n in range(10):
        await ctx.publisher.to_log(f"dt/d{n % 2}/gps", b"%d" % n)
        await ctx.publisher.to_log("feed/legacy/d/gps", b"other")
    async for batch in read(ctx.settings, after=None, filters=["dt.d1.>"], name="t", until_end=True):
        assert [m.payload for m in batch] == [b"1", b"3", b"5", b"7", b"9"]
        assert batch.position.seq == 19


async def test_large_messages_come_whole_and_too_large_ones_are_refused(ctx: Context) -> None:
    """Up to the server's limit a message passes; beyond it the publisher says so and stays usable."""
    body = bytes(range(256)) * 1024
    await asyncio.gather(*(ctx.publisher.to_log("dt/d/big", body) for _ in range(300)))
    with pytest.raises(BadInput, match="are allowed"):
        await ctx.publisher.to_log("dt/d/big", bytes(2 * 1024 * 1024))
    count = 0
    async for batch in read(ctx.settings, after=None, filters=["dt.>"], name="t", until_end=True):
        assert all(m.payload == body for m in batch)
        count += len(batch)
    assert count == 300


async def test_many_messages_to_devices_keep_their_order_and_one_that_cannot_go_keeps_none_back(
    ctx: Context,
) -> None:
    """More than leave together; what is only for who listens now is not in the log."""
    live: list[bytes] = []

    async def heard(message: Any) -> None:
        live.append(message.data)

    subscription = await ctx.nc.subscribe("cmd.>", cb=heard)
    await ctx.nc.flush()
    messages = [ToDevice(f"cmd/d{n % 3}", b"%d" % n, stored=n % 10 != 0) for n in range(1200)]
    assert await ctx.publisher.to_devices(messages) == ""
    assert await ctx.publisher.to_devices([]) == ""
    assert "no/+" in await ctx.publisher.to_devices([ToDevice("no/+", b""), ToDevice("cmd/last", b"last")])
    large = ToDevice("cmd/large", bytes(2 * 1024 * 1024))
    assert "too many" in await ctx.publisher.to_devices([large, ToDevice("cmd/last", b"end", stored=False)])
    expected = [b"%d" % n for n in range(1200) if n % 10] + [b"last"]
    stored: list[bytes] = []
    async for batch in read(ctx.settings, after=None, filters=("cmd.>",), name="t", until_end=True):
        stored += [message.payload for message in batch]
        assert all(message.headers["Nmqtt-Pub"] == "1" for message in batch)
    assert stored == expected
    await until(lambda: len(live) >= 1202)
    assert live == [b"%d" % n for n in range(1200)] + [b"last", b"end"]
    await subscription.unsubscribe()


async def test_killed_anywhere_a_reader_stores_each_message_once(ctx: Context) -> None:
    """Position and effect share a transaction: dying anywhere loses nothing, doubles nothing."""
    await ctx.pool.execute("CREATE TABLE stored (seq bigint PRIMARY KEY, n int UNIQUE)")
    total, chance = 10_000, random.Random(7)

    async def reader() -> None:
        async with ctx.pool.acquire() as connection:
            before = await positions.load(connection, "t")
            source = read(
                ctx.settings, after=before, filters=["dt.>"], name="t", batch_max=50, linger_s=0.001
            )
            async for batch in source:
                async with connection.transaction():
                    await connection.copy_records_to_table(
                        "stored", records=[(m.seq, int(m.payload)) for m in batch]
                    )
                    after = batch.position.as_row()
                    await positions.advance(connection, "t", before=before, after=after)
                before = after

    async def writer() -> None:
        for start in range(0, total, 50):
            await asyncio.gather(
                *(ctx.publisher.to_log("dt/d/x", b"%d" % n) for n in range(start, start + 50))
            )

    async with asyncio.TaskGroup() as group:
        group.create_task(writer())
        kills = 0
        while await ctx.pool.fetchval("SELECT count(*) FROM stored") < total:
            victim = asyncio.create_task(reader())
            done, _ = await asyncio.wait([victim], timeout=chance.uniform(0.02, 0.15))
            assert not done, victim.exception()
            victim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await victim
            kills += 1
    assert kills >= 3
    row = await ctx.pool.fetchrow("SELECT count(*), count(DISTINCT n), max(seq) FROM stored")
    assert row is not None
    assert tuple(row) == (total, total, total)


async def test_two_readers_of_one_name_cannot_both_store(ctx: Context) -> None:
    """Should two processes ever believe they own a reader, the second one's transaction is refused."""
    await ctx.publisher.to_log("dt/d/x", b"1")
    created, _, last = await stream_state(ctx.settings)
    async with ctx.pool.acquire() as connection:
        await positions.advance(connection, "t", before=None, after=(created, last, None))
        for before in (None, (created, 0, None)):
            with pytest.raises(Conflict):
                await positions.advance(connection, "t", before=before, after=(created, last, None))
        assert await positions.load(connection, "t") == (created, last, None)


async def test_reader_and_publisher_outlive_a_killed_server(
    ctx: Context, nats_server: TestNats, engine_loop: LoopThread
) -> None:
    """What was confirmed before, during and after a kill -9 of the server is read once, in order."""
    confirmed: set[int] = set()
    seen: list[LogMessage] = []

    async def follow() -> None:
        async for batch in read(ctx.settings, after=None, filters=["dt.>"], name="t", linger_s=0):
            seen.extend(batch)

    async def write(numbers: range) -> None:
        for n in numbers:
            while True:
                try:
                    await ctx.publisher.to_log("dt/d/x", b"%d" % n)
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            confirmed.add(n)

    following = asyncio.create_task(follow())
    writers = [asyncio.create_task(write(range(k * 400, (k + 1) * 400))) for k in range(5)]
    for share in (300, 1000):
        await until(lambda share=share: len(confirmed) >= share)  # type: ignore[misc]
        nats_server.server.child.kill()
    await asyncio.gather(*writers)
    await until(lambda: len({m.payload for m in seen}) == 2000)
    following.cancel()
    assert [m.seq for m in seen] == sorted({m.seq for m in seen})
    assert {int(m.payload) for m in seen} >= confirmed


async def test_a_log_made_anew_is_read_from_its_beginning(ctx: Context, settings: Settings) -> None:
    """Sequence numbers start again at 1 then: an old position must not skip the new messages."""
    for n in range(5):
        await ctx.publisher.to_log("dt/d/x", b"old%d" % n)
    async for batch in read(settings, after=None, filters=["dt.>"], name="t", until_end=True):
        old = batch.position
    js = ctx.nc.jetstream()
    await js.delete_stream(STREAM)
    await ensure_log(ctx.nc, settings)
    await ctx.publisher.to_log("dt/d/x", b"new")
    async for batch in read(settings, after=old, filters=["dt.>"], name="t", until_end=True):
        assert [m.payload for m in batch] == [b"new"]
        assert batch.position.created > old.created


async def test_a_log_that_would_lose_messages_is_refused(ctx: Context, settings: Settings) -> None:
    """A stream made by the server itself drops what nobody waits for; serving with it would be a lie."""
    js = ctx.nc.jetstream()
    await js.delete_stream(STREAM)
    await js.add_stream(StreamConfig(name=STREAM, subjects=["$MQTT.msgs.>"], retention="interest"))
    with pytest.raises(Unavailable, match="loses messages"):
        await ensure_log(ctx.nc, settings)


async def test_wrong_password_and_dead_server_are_told_plainly(settings: Settings) -> None:
    """Errors name what to look at; they are ours, not the library's."""
    import msgspec

    from fleetlift.bus.wire import connect

    with pytest.raises(FleetError, match="Authorization"):
        await connect(settings.nats_url, user="svc", password="wrong", name="t", on_message=lambda *_: None)
    nowhere = msgspec.structs.replace(settings, nats_url="nats://127.0.0.1:1")
    with pytest.raises(Unavailable, match="does not answer"):
        await connect(nowhere.nats_url, user="svc", password="x", name="t", on_message=lambda *_: None)
