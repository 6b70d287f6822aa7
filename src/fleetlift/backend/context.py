"""What every service gets: its settings, a database pool, the bus, and the word to stop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from nats.aio.client import Client

from fleetlift.bus.connect import connected
from fleetlift.bus.publish import Publisher
from fleetlift.config import Settings
from fleetlift.store.pool import Pool, open_pool


class Context:
    """Shared by the services of one process. A service runs until `stop` is set, or it is cancelled."""

    def __init__(
        self, *, settings: Settings, pool: Pool, nc: Client, sys_nc: Client, publisher: Publisher
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.nc = nc  # account DEV: beside the devices
        self.sys_nc = sys_nc  # account SYS: the server's own events
        self.publisher = publisher
        self.stop = asyncio.Event()


@contextlib.asynccontextmanager
async def open_context(settings: Settings, *, name: str, pool_size: int = 10) -> AsyncIterator[Context]:
    """Open everything a service needs; closed in reverse order, also when opening fails half-way.

    Waits up to 30 s for engines that are starting, then raises Unavailable.
    """
    async with contextlib.AsyncExitStack() as stack:
        nc = await stack.enter_async_context(
            connected(settings, user=settings.nats_svc_user, password=settings.nats_svc_password, name=name)
        )
        sys_nc = await stack.enter_async_context(
            connected(settings, user=settings.nats_sys_user, password=settings.nats_sys_password, name=name)
        )
        pool = await stack.enter_async_context(open_pool(settings.database_url, name=name, size=pool_size))
        publisher = Publisher(settings, name=f"{name} publisher")
        stack.push_async_callback(publisher.close)
        yield Context(settings=settings, pool=pool, nc=nc, sys_nc=sys_nc, publisher=publisher)
