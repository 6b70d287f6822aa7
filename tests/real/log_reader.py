"""A telemetry reader at work on a real log: starting it, feeding it, waiting until it has caught up."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fleetlift.backend import telemetry
from fleetlift.backend.context import Context
from fleetlift.store import positions

NOW = float(int(time.time()))


async def eventually(check: Callable[[], Awaitable[Any]], *, within_s: float = 15.0) -> Any:
    """The first true answer of `check`, asked again and again until the deadline."""
    deadline = time.monotonic() + within_s
    while True:
        if answer := await check():
            return answer
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def reading(ctx: Context) -> AsyncIterator[None]:
    """A telemetry reader at work; killed at the end, without a chance to finish anything."""
    task = asyncio.create_task(telemetry.run(ctx))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def publish(ctx: Context, topic: str, body: Any, headers: dict[str, str] | None = None) -> None:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    await ctx.publisher.to_log(topic, payload, headers or {"Nmqtt-Pub": "1"})


async def publish_all(ctx: Context, device: str, seqs: range, channel: str = "gps") -> None:
    await asyncio.gather(
        *(publish(ctx, f"dt/{device}/{channel}", {"ts": NOW + n / 1000, "seq": n}) for n in seqs)
    )


async def stored(ctx: Context) -> int:
    return int(await ctx.pool.fetchval("SELECT count(*) FROM telemetry"))


async def caught_up(ctx: Context) -> None:
    """Waits until rows and account have everything that the log holds."""

    async def check() -> bool:
        last = (await ctx.nc.jetstream().stream_info("$MQTT_msgs")).state.last_seq
        async with ctx.pool.acquire() as conn:
            found = [await positions.load(conn, name) for name in ("telemetry", "ledger")]
        return all(at is not None and at[1] == last for at in found)

    await eventually(check)
