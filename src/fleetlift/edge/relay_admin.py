"""The relay's own HTTP API: its routes, who still comes, letting go. On loopback, with a token.

| call | meaning |
| --- | --- |
| `GET /v1/status` | connections, counts, how far letting go is |
| `GET /v1/routes`, `PUT /v1/routes` | the routing table; an older epoch is refused with 409 |
| `GET /v1/stragglers?since=&after=&limit=` | who comes to the old address, by name |
| `POST /v1/release` `{"rate_per_s": 5}` | let connections to the old side go; `"everything": true` all of
them |
| `DELETE /v1/release` | stop that |
"""

import asyncio
import contextlib
import hmac
import ipaddress
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
import uvicorn

from fleetlift.config import checked_address, split_address, write_private
from fleetlift.core.errors import BadInput, FleetError, Forbidden, NotFound
from fleetlift.core.relaying import Routes
from fleetlift.edge.relay import Relay

BODY_BYTES_MAX: Final = 64 * 1024 * 1024  # a routing table with a row for each of many devices
PAGE_MAX: Final = 10_000
TOKEN_FILE: Final = "relay.token"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ReleaseWanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rate_per_s: float
    everything: bool = False


class Unauthorized(FleetError):
    status = 401


def own_token(data: Path) -> str:
    """The token in the data directory, for its owner only; drawn when there is none."""
    path = data / TOKEN_FILE
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32) + "\n")
    if path.stat().st_mode & 0o077:
        raise Forbidden(f"{path} can be read by others: chmod 600 {path}, or remove it for a new one")
    token = path.read_text().strip()
    if len(token) < 16:
        raise BadInput(f"{path} holds no token: remove it, and a new one is drawn")
    return token


class AdminApp:
    """An ASGI application."""

    def __init__(self, relay: Relay, token: str) -> None:
        self._relay = relay
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        try:
            status, body = 200, msgspec.json.encode(await self._answer(scope, receive))
        except FleetError as error:
            status = error.status
            body = msgspec.json.encode(
                {"status": status, "title": type(error).__name__, "detail": str(error)}
            )
        kind = b"application/json" if status == 200 else b"application/problem+json"
        head = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Mapping[str, Any], receive: Receive) -> Any:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._expected):
            raise Unauthorized(f"the token in {TOKEN_FILE} of the relay's data directory is needed")
        relay = self._relay
        match scope["method"], scope["path"]:
            case "GET", "/v1/status":
                return relay.status()
            case "GET", "/v1/routes":
                return relay.routes
            case "PUT", "/v1/routes":
                return relay.set_routes(_decoded(await _body(receive), Routes))
            case "GET", "/v1/stragglers":
                query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
                limit = max(1, min(PAGE_MAX, int(_number(query.get("limit", "1000")))))
                found = relay.visitors.stragglers(
                    relay.routes,
                    time.time(),
                    since=_number(query.get("since", "0")),
                    after=query.get("after", ""),
                    limit=limit + 1,
                )
                page = found[:limit]
                return {"items": page, "next": page[-1].client if len(found) > limit else None}
            case "GET", "/v1/release":
                return relay.release_status()
            case "POST", "/v1/release":
                wanted = _decoded(await _body(receive), ReleaseWanted)
                return relay.release(wanted.rate_per_s, everything=wanted.everything)
            case "DELETE", "/v1/release":
                return relay.stop_release()
        raise NotFound(f"{scope['method']} {scope['path']}: the relay knows no such call")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"{text[:40]!r} is not a number") from None


def _decoded(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise BadInput(f"the body cannot be used: {problem}") from problem


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadInput("the body ended early")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_BYTES_MAX:
            raise BadInput(f"a body of more than {BODY_BYTES_MAX:,} bytes")
    return body


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the command handles them


@contextlib.asynccontextmanager
async def serving_admin(relay: Relay, listen: str, token: str) -> AsyncIterator[str]:
    """Serve the API inside the block; gives its URL."""
    host, _ = split_address(listen)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadInput(
            f"--admin {listen}: the relay's API speaks plain HTTP and listens on loopback only; reach it "
            "from "
            "elsewhere by ssh -L"
        )
    address = checked_address(listen, "admin")
    host, port = split_address(address)
    config = uvicorn.Config(
        AdminApp(relay, token),
        host=host,
        port=port,
        http="httptools",
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=100,
        timeout_graceful_shutdown=2,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(), name="relay admin")
    try:
        while not server.started:
            if task.done():
                await task
                raise BadInput(f"--admin {listen} cannot be served")
            await asyncio.sleep(0.01)
        yield f"http://{address}"
    finally:
        server.should_exit = True
        await task
