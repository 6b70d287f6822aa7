"""Connections by nats-py, for everything that is not the log: services, requests, the system account."""

import contextlib
from collections.abc import AsyncIterator

import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from fleetlift.bus.subjects import STORED, STREAM
from fleetlift.bus.wire import trusting
from fleetlift.config import Settings
from fleetlift.core.errors import Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

MAX_CONSUMERS = 200_000


@contextlib.asynccontextmanager
async def connected(
    settings: Settings, *, user: str, password: str, name: str, wait_s: float = 30.0
) -> AsyncIterator[Client]:
    """A connection that comes back by itself for ever. Raises Unavailable when none is made in `wait_s`."""

    async def on_error(problem: Exception) -> None:
        log.warning("nats_error", connection=name, problem=str(problem) or type(problem).__name__)

    try:
        client = await nats.connect(
            settings.nats_url.split(","),
            user=user,
            password=password,
            name=name,
            connect_timeout=3,
            reconnect_time_wait=0.25,
            allow_reconnect=True,
            # Before the first connection this is how often to try, then how often in a row.
            max_reconnect_attempts=max(1, int(wait_s / 0.25)),
            error_cb=on_error,
            ping_interval=20,
            pending_size=8 * 1024 * 1024,
            tls=trusting(settings.nats_ca) if settings.nats_url.startswith("tls:") else None,
        )
    except (OSError, NatsError) as problem:
        raise Unavailable(f"NATS at {settings.nats_url} does not answer ({problem})") from problem
    client.options["max_reconnect_attempts"] = -1
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):
            await client.close()


async def ensure_log(client: Client, settings: Settings) -> None:
    """Make the stream that holds what devices publish, or bring its limits up to date.

    It must exist before the first device connects: the server would make it with interest retention, which
    drops what nobody is waiting for, PUBACK or not.
    """
    js = client.jetstream(timeout=10)
    wanted = StreamConfig(
        name=STREAM,
        subjects=[STORED + ">"],
        storage=StorageType.FILE,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.OLD,
        max_age=settings.log_max_age_s,
        max_bytes=settings.log_max_bytes,
        max_consumers=MAX_CONSUMERS,
        allow_direct=True,
        num_replicas=settings.log_replicas,
    )
    try:
        found = (await js.stream_info(STREAM)).config
    except NotFoundError:
        await js.add_stream(wanted)
        log.info("log_created", max_age_s=settings.log_max_age_s, max_bytes=settings.log_max_bytes)
        return
    if found.retention != RetentionPolicy.LIMITS:
        raise Unavailable(
            f"the stream {STREAM} exists with {found.retention} retention, which loses messages: stop the "
            f"devices, delete it (nats stream rm '{STREAM}') and start again"
        )
    limits = (settings.log_max_age_s, settings.log_max_bytes, settings.log_replicas)
    if (found.max_age, found.max_bytes, found.num_replicas) != limits:
        await js.update_stream(wanted.evolve(max_consumers=found.max_consumers))
        log.info("log_limits_changed", max_age_s=limits[0], max_bytes=limits[1], replicas=limits[2])
