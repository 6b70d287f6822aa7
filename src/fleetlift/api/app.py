"""The HTTP server of a backend: the native API, health and metrics, on one address."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from litestar import Litestar, Response, Router
from litestar.datastructures import MutableScopeHeaders, State
from litestar.middleware import DefineMiddleware
from litestar.routes import HTTPRoute
from litestar.types import Message, Scope

from fleetlift.api import (
    access,
    commands,
    devices,
    health,
    ledger,
    migrations,
    openapi,
    problems,
    shadows,
    telemetry,
)
from fleetlift.api.auth import BearerAuthentication
from fleetlift.api.wire import Services
from fleetlift.backend.commands import Intake
from fleetlift.backend.context import Context
from fleetlift.backend.tokens import TokenVerifier
from fleetlift.config import split_address
from fleetlift.log import get_logger
from fleetlift.store.pool import open_pool

log = get_logger(__name__)

BODY_BYTES_MAX = 1024 * 1024
CLOSING_S = 5.0  # how long answers under way may take once the server is told to stop


async def plain_headers(response: Response[Any]) -> Response[Any]:
    """No answer is guessed at by a browser or kept by a cache: they hold a fleet's data.

    A coroutine though it awaits nothing: Litestar hands plain functions to a thread, for each request.
    """
    response.headers.setdefault("x-content-type-options", "nosniff")
    response.headers.setdefault("cache-control", "no-store")
    return response


async def whole_allow(message: Message, scope: Scope) -> None:
    """Litestar's own answer to OPTIONS names the methods of one handler only, where a path has several."""
    if message["type"] == "http.response.start" and scope.get("method") == "OPTIONS":
        for route in scope["litestar_app"].routes:
            if route.path_format == scope.get("path_template") and isinstance(route, HTTPRoute):
                MutableScopeHeaders.from_message(message)["allow"] = ", ".join(sorted(route.methods))


def make_app(found: Services) -> Litestar:
    """The application over `found`; everything but health needs a token."""
    api = Router(
        "/api/v1",
        route_handlers=[
            devices.router,
            telemetry.router,
            ledger.router,
            commands.router,
            shadows.router,
            migrations.router,
            access.router,
        ],
    )
    return Litestar(
        route_handlers=[api, openapi.show_description, *health.handlers],
        state=State({"services": found}),
        middleware=[
            health.Measured(),
            # Without the second of these OPTIONS would pass unauthenticated, and fail for want of a caller.
            DefineMiddleware(BearerAuthentication, exclude_from_auth_key="open", exclude_http_methods=()),
        ],
        exception_handlers={Exception: problems.answer},
        after_request=plain_headers,
        before_send=[whole_allow],
        request_max_body_size=BODY_BYTES_MAX,
        openapi_config=openapi.CONFIG,
        debug=False,
        logging_config=None,
    )


class Server(uvicorn.Server):
    """Uvicorn without its own signal handling: the worker process is told to stop by its context."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(app: Litestar, ctx: Context) -> uvicorn.Config:
    settings = ctx.settings
    host, port = split_address(settings.http)
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        loop="none",  # the worker's loop is running already
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(CLOSING_S),
        limit_concurrency=2000,
        ssl_certfile=settings.cert_file if settings.http_tls else None,
        ssl_keyfile=settings.key_file if settings.http_tls else None,
    )


async def run(ctx: Context) -> None:
    """Serve HTTP on `settings.http` until `ctx.stop` is set. Answers under way are finished first."""
    async with contextlib.AsyncExitStack() as stack:
        engine = ctx.pool
        if ctx.settings.engine_url != ctx.settings.database_url:
            engine = await stack.enter_async_context(
                open_pool(ctx.settings.engine_url, name="api engine", size=5)
            )
        found = Services(
            ctx=ctx,
            pool=ctx.pool,
            engine=engine,
            verifier=TokenVerifier(ctx.pool),
            intake=Intake(ctx),
            started_at=time.time(),
        )
        server = Server(server_config(make_app(found), ctx))

        async def stop_when_told() -> None:
            await ctx.stop.wait()
            server.should_exit = True

        telling = asyncio.create_task(stop_when_told(), name="api stop")
        try:
            log.info("api_started", url=ctx.settings.http_url)
            await server.serve()
        finally:
            telling.cancel()
        if not ctx.stop.is_set():
            raise RuntimeError(f"the HTTP server on {ctx.settings.http} ended by itself")
        log.info("api_stopped")
