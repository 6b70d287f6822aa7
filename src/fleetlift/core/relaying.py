"""Where the relay sends a connection, how fast it lets go of old ones, and the header that tells who came.

The relay stands at the old address. Its routing table is replaced whole, by epochs: an older one is refused,
so that a mover that was thought dead cannot send devices back.
"""

import ipaddress
import math
from collections.abc import Mapping
from enum import StrEnum
from hashlib import blake2b
from typing import Final

import msgspec

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.peek import Peek

RULES_MAX: Final = 1_000_000
RATE_MAX_PER_S: Final = 10_000.0


class To(StrEnum):
    OLD = "old"
    NEW = "new"


class WhenNewDown(StrEnum):
    REFUSE = "refuse"
    OLD = "old"


class Routes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The routing table. A device's own rule counts first, then the longest prefix, the share, the default.

    `share_percent` of the clients go to the new side, chosen by a hash of their id: a larger share holds all
    of a smaller one. `when_new_down: old` lets a connection fall back if the new side cannot be reached at
    all; it is off because after a cutover of data the old side must take no more writes. `switched_at` and
    `ttl_s` say when DNS was switched, so that the relay can tell why somebody still comes.
    """

    epoch: int = 0
    default: To = To.OLD
    share_percent: float = 0.0
    devices: Mapping[str, To] = {}
    prefixes: Mapping[str, To] = {}
    when_new_down: WhenNewDown = WhenNewDown.REFUSE
    switched_at: float | None = None
    ttl_s: float = 0.0


def checked_routes(routes: Routes) -> Routes:
    """`routes`, or BadInput with what cannot be used."""
    if routes.epoch < 0 or routes.epoch >= 2**63:
        raise BadInput(f"epoch {routes.epoch}: give a whole number from 0")
    if not 0 <= routes.share_percent <= 100:
        raise BadInput(f"share_percent {routes.share_percent:g}: give 0 to 100")
    if len(routes.devices) + len(routes.prefixes) > RULES_MAX:
        raise BadInput(f"more than {RULES_MAX:,} rules: use prefixes or a share")
    if "" in routes.prefixes:
        raise BadInput("an empty prefix means everybody: use `default`")
    if not 0 <= routes.ttl_s < math.inf:
        raise BadInput(f"ttl_s {routes.ttl_s:g}: give seconds")
    return routes


def replaced(held: Routes, given: Routes) -> Routes:
    """The table that holds after `given` came. Raises Conflict for an older epoch, or the same one with
    another content; the same table again changes nothing."""
    checked_routes(given)
    if given.epoch < held.epoch or (given.epoch == held.epoch and given != held):
        raise Conflict(
            f"the relay's routes are of epoch {held.epoch}: epoch {given.epoch} is refused. Read them, "
            "decide "
            f"again, and send epoch {held.epoch + 1}"
        )
    return given


def place(client: str) -> float:
    """Where a client stands among all, 0 to 100, by a hash that never changes."""
    digest = blake2b(client.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 * 100


class Router:
    """A table made ready for looking up one connection after the other."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self._lengths = sorted({len(prefix) for prefix in routes.prefixes}, reverse=True)

    def side(self, client: str) -> To:
        routes = self.routes
        if (own := routes.devices.get(client)) is not None:
            return own
        for length in self._lengths:
            if (found := routes.prefixes.get(client[:length])) is not None:
                return found
        if routes.share_percent and place(client) < routes.share_percent:
            return To.NEW
        return routes.default


def client_of(seen: Peek, peer: str) -> str:
    """The name a connection is routed and listed by: client id, else user name, else `ip` or `name@ip`."""
    if seen.client_id or seen.username:
        return seen.client_id or seen.username
    return f"{seen.server_name}@{peer}" if seen.server_name else peer


class Pace:
    """At most `rate_per_s` in any second: evenly spaced, and time that was missed is not made up for."""

    def __init__(self, rate_per_s: float) -> None:
        if not 0 < rate_per_s <= RATE_MAX_PER_S:
            raise BadInput(f"a rate of {rate_per_s:g}/s: give more than 0, at most {RATE_MAX_PER_S:,.0f}")
        self.gap_s = 1 / rate_per_s
        self._next = -math.inf

    def begin_after(self, other: "Pace") -> None:
        """Take over from another rate: its last one counts for this one too."""
        self._next = other._next - other.gap_s + self.gap_s

    def wait_s(self, now: float) -> float:
        """How long to wait yet until one may go; 0: now."""
        return max(0.0, self._next - now)

    def went(self, now: float) -> None:
        """One has gone, by `now` at the latest."""
        self._next = now + self.gap_s


class ProxyHeader(StrEnum):
    """The header by which a backend learns who is behind the relay (HAProxy's PROXY protocol)."""

    NONE = "none"
    V1 = "v1"
    V2 = "v2"


def proxy_header(kind: ProxyHeader, source: tuple[str, int], target: tuple[str, int]) -> bytes:
    """The bytes before a client's own. Addresses of different families are said to be unknown."""
    if kind is ProxyHeader.NONE:
        return b""
    here, there = (_address(one[0]) for one in (source, target))
    known = here is not None and there is not None and here.version == there.version
    if kind is ProxyHeader.V1:
        if not known:
            return b"PROXY UNKNOWN\r\n"
        assert here is not None
        return f"PROXY TCP{here.version} {here} {there} {source[1]} {target[1]}\r\n".encode()
    signature = b"\r\n\r\n\0\r\nQUIT\n"
    if not known:
        return signature + b"\x21\x00\0\0"
    assert here is not None and there is not None
    body = here.packed + there.packed + source[1].to_bytes(2, "big") + target[1].to_bytes(2, "big")
    family = b"\x11" if here.version == 4 else b"\x21"
    return signature + b"\x21" + family + len(body).to_bytes(2, "big") + body


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
