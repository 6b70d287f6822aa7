"""Real DNS servers for the tests: Knot and BIND, one zone each, and levers on them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from fleetlift.core.dns import DnsRecord
from fleetlift.levers.dns import DnsLever
from fleetlift.levers.rfc2136 import Rfc2136, TsigKey
from fleetlift.testing import DnsServer, running_bind, running_knot, scratch_directory

ZONE = "example.test"
OLD, OLD_2, NEW = "192.0.2.1", "192.0.2.2", "198.51.100.1"
RECORDS = (
    f"iot 2 IN A {OLD}",
    f"iot 2 IN A {OLD_2}",
    f"test-pool 2 IN A {OLD}",
    f"slow 3600 IN A {OLD}",
    "www 2 IN CNAME old-cloud.example.net.",
    f"dual 2 IN A {OLD}",
    "dual 2 IN AAAA 2001:db8::1",
    f"*.wild 2 IN A {OLD}",
)
RUNNERS: dict[str, Callable[..., AbstractAsyncContextManager[DnsServer]]] = {
    "knot": running_knot,
    "bind": running_bind,
}


@asynccontextmanager
async def dns_server(kind: str) -> AsyncIterator[DnsServer]:
    with scratch_directory("fleetlift-dns-") as directory:
        async with RUNNERS[kind](directory, ZONE, RECORDS) as server:
            yield server


@pytest.fixture(params=list(RUNNERS))
async def server(request: pytest.FixtureRequest) -> AsyncIterator[DnsServer]:
    """A fresh server of each kind."""
    async with dns_server(request.param) as running:
        yield running


def provider(
    server: DnsServer, *, primary: str = "", key: TsigKey | None = None, timeout_s: float = 5.0
) -> Rfc2136:
    return Rfc2136(server.zone, primary=primary or server.address, key=key or server.key, timeout_s=timeout_s)


def lever(server: DnsServer, *records: DnsRecord, within_s: float = 10.0) -> DnsLever:
    return DnsLever(provider(server), records or IOT, within_s=within_s)


IOT = (DnsRecord(name="iot.example.test", new=(NEW,), ttl_s=1),)
