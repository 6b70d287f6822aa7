"""Is it alive, is it ready, and how much does it do: /healthz, /readyz, /metrics."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import asyncpg
import msgspec
from litestar import Response, get
from litestar.enums import MediaType, ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fleetlift.api.auth import OPEN, VIEWER
from fleetlift.api.wire import Call, Services, services
from fleetlift.backend import alive
from fleetlift.log import get_logger
from fleetlift.store import telemetry as telemetry_store
from fleetlift.store.pool import Pool

log = get_logger(__name__)

ROLES = ("auth", "telemetry", "state", "controller", "mover")  # the workers beside this one
PART_S = 2.0  # a part that has not answered by then does not work


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """`parts`: each part with "ok", or what is wrong with it."""

    ready: bool
    parts: dict[str, str]


@get("/healthz", opt=OPEN, summary="Is the process alive?", tags=["health"], media_type=MediaType.JSON)
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@get("/readyz", opt=OPEN, summary="Does every part work?", tags=["health"])
async def readyz(request: Call) -> Response[Readiness]:
    """200 when devices and people can be served, else 503; `parts` names what does not work."""
    parts = await check_parts(services(request))
    ready = all(state == "ok" for state in parts.values())
    return Response(
        Readiness(ready=ready, parts=parts),
        status_code=200 if ready else 503,
        headers={"cache-control": "no-store"} | ({} if ready else {"retry-after": "1"}),
    )


async def check_parts(found: Services) -> dict[str, str]:
    """Every part with "ok" or what is wrong, within a few seconds whatever hangs."""

    async def database(pool: Pool) -> str:
        try:
            async with asyncio.timeout(PART_S):
                await pool.fetchval("SELECT 1")
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as problem:
            log.warning("database_not_answering", problem=f"{type(problem).__name__}: {problem}")
            return "does not answer"
        return "ok"

    async def bus() -> str:
        return "ok" if found.ctx.nc.is_connected else "not connected"

    async def workers() -> dict[str, str]:
        if not found.ctx.nc.is_connected:
            return dict.fromkeys(ROLES, "not reachable: the bus is away")
        gone = await alive.missing(found.ctx.nc, ROLES, within_s=PART_S)
        return {role: "does not answer" if role in gone else "ok" for role in ROLES}

    engine = database(found.engine) if found.engine is not found.pool else None
    base, on_bus, living = await asyncio.gather(database(found.pool), bus(), workers())
    parts = {"database": base, "bus": on_bus, **{f"worker {role}": state for role, state in living.items()}}
    if engine is not None:
        parts["engine database"] = await engine
    return parts


# -- metrics -------------------------------------------------------------------------------------------

REGISTRY = CollectorRegistry()
REQUESTS = Counter(
    "fleetlift_http_requests", "HTTP requests answered.", ("method", "status"), registry=REGISTRY
)
SECONDS = Histogram(
    "fleetlift_http_request_seconds",
    "Time to the first byte of an answer.",
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)


class Measured(ASGIMiddleware):
    """Counts answers and times them."""

    scopes = (ScopeType.HTTP,)

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                SECONDS.observe(time.perf_counter() - began)
                REQUESTS.labels(scope.get("method", ""), str(message["status"])).inc()
            await send(message)

        await next_app(scope, receive, sending)


class Snapshot:
    """Figures read from the database once, as a collector of prometheus_client."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


async def read_figures(found: Services, tenant: str | None) -> list[Metric]:
    """Figures of the whole instance, or of one tenant only."""
    metrics: list[Metric] = []

    def gauge(name: str, text: str, value: float) -> None:
        metrics.append(GaugeMetricFamily(name, text, value=value))

    async with found.pool.acquire() as conn:
        row = await conn.fetchrow(
            """SELECT count(*) AS devices, count(*) FILTER (WHERE p.connected) AS connected
               FROM device d LEFT JOIN presence p ON p.device = d.id
               WHERE $1::text IS NULL OR d.tenant = $1""",
            tenant,
        )
        assert row is not None
        gauge("fleetlift_devices", "Registered devices.", row["devices"])
        gauge("fleetlift_devices_connected", "Devices connected now.", row["connected"])
        open_commands = await conn.fetchval(
            "SELECT count(*) FROM command WHERE ended_at IS NULL AND ($1::text IS NULL OR tenant = $1)",
            tenant,
        )
        gauge("fleetlift_commands_open", "Commands without a final state.", open_commands)
        if tenant is None:
            positions = GaugeMetricFamily(
                "fleetlift_log_position",
                "The last message of the log each reader has stored.",
                labels=["reader"],
            )
            for p in await conn.fetch("SELECT reader, seq FROM log_position ORDER BY reader"):
                positions.add_metric([p["reader"]], p["seq"])
            metrics.append(positions)
            families: dict[str, CounterMetricFamily] = {}
            for counter in await telemetry_store.counters(conn):
                name = counter.name.removesuffix("_total")
                family = families.setdefault(
                    name, CounterMetricFamily(name, name.replace("_", " "), labels=["path"])
                )
                family.add_metric([counter.path], counter.value)
            metrics += families.values()
    members = GaugeMetricFamily(
        "fleetlift_migration_members", "Devices of a migration by state.", labels=["migration", "state"]
    )
    phases = GaugeMetricFamily(
        "fleetlift_migration_phase", "1 for the phase a migration is in.", labels=["migration", "phase"]
    )
    async with found.engine.acquire() as conn:
        for m in await conn.fetch(
            "SELECT name, phase FROM engine.migration WHERE $1::text IS NULL OR tenant = $1 ORDER BY name",
            tenant,
        ):
            phases.add_metric([m["name"], m["phase"]], 1)
        for m in await conn.fetch(
            """SELECT m.migration, m.state, count(*) AS n FROM engine.member m
               JOIN engine.migration g ON g.name = m.migration AND ($1::text IS NULL OR g.tenant = $1)
               GROUP BY 1, 2 ORDER BY 1, 2""",
            tenant,
        ):
            members.add_metric([m["migration"], m["state"]], m["n"])
    return [*metrics, phases, members]


@get("/metrics", opt=VIEWER, summary="Figures for Prometheus", tags=["health"])
async def metrics(request: Call) -> Response[bytes]:
    """A tenant's token gets the tenant's figures."""
    registry = CollectorRegistry()
    registry.register(Snapshot(await read_figures(services(request), request.user.tenant)))
    text = generate_latest(registry)
    if request.user.tenant is None:
        text += generate_latest(REGISTRY)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


handlers: list[Any] = [healthz, readyz, metrics]
