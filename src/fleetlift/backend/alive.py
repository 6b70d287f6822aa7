"""Which workers live: each answers a ping of its role on the bus, several of one role share the answering."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

SUBJECT = "fleetlift.alive."


@contextlib.asynccontextmanager
async def answering(nc: Client, role: str) -> AsyncIterator[None]:
    """Answer pings for `role` for as long as the block lasts."""

    async def answer(ping: Msg) -> None:
        await ping.respond(b"")

    subscription = await nc.subscribe(SUBJECT + role, queue=role, cb=answer)
    await nc.flush()
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            await subscription.unsubscribe()


async def missing(nc: Client, roles: Sequence[str], *, within_s: float = 1.0) -> list[str]:
    """Those of `roles` that nobody answers for in time; all of them when the bus is away."""

    async def answers(role: str) -> bool:
        try:
            await nc.request(SUBJECT + role, b"", timeout=within_s)
        except (NatsError, TimeoutError, OSError):
            return False
        return True

    found = await asyncio.gather(*(answers(role) for role in roles))
    return [role for role, there in zip(roles, found, strict=True) if not there]
