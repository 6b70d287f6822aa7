"""The log and the publisher, on a real NATS Server."""

import asyncio

from fleetlift.backend.context import Context
from fleetlift.bus.log import LogMessage, read


async def test_what_was_stored_is_read_in_order_and_once(ctx: Context) -> None:
    """Every message published into the log comes back in order, with topic, payload and headers."""
    await asyncio.gather(
        *(
            ctx.publisher.to_log("feed/legacy/d.1/gps", b"%d" % n, {"Fleetlift-Seq": str(n)})
            for n in range(3000)
        )
    )
    seen: list[LogMessage] = []
    async for batch in read(ctx.settings, after=None, filters=["feed.>"], name="t", until_end=True):
        assert batch.position.seq == batch[-1].seq
        seen += batch
    assert [m.seq for m in seen] == list(range(1, 3001))
    assert sorted(int(m.payload) for m in seen) == list(range(3000))
    assert all(m.headers["Fleetlift-Seq"] == m.payload.decode() for m in seen)
    assert {m.topic for m in seen} == {"feed/legacy/d.1/gps"}
    assert await ctx.pool.fetchval("SELECT count(*) FROM device") == 0
