"""How simulated devices find a side: a resolver on a device, with the faults that real ones have.

Asks one server, keeps the answer as its model says (`core/dns.py`: honours the TTL, ignores it, pins the
first answer for good), and goes on with a stale answer while the server is away, as RFC 8767 allows.
"""

import asyncio
import time
from collections.abc import Callable

import dns.asyncquery
import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import msgspec

from fleetlift.config import split_address
from fleetlift.core.dns import HonoursTtl, RecordType, ResolverModel, checked_name
from fleetlift.core.errors import Unavailable

CHAIN_MAX = 8  # CNAMEs that lead to each other
NAMES_MAX = 1000


class _Kept(msgspec.Struct, frozen=True):
    values: tuple[str, ...]
    until: float


class Resolver:
    """One device's resolver. `server` is host:port; `asked` counts the questions that went out."""

    def __init__(
        self,
        server: str,
        *,
        model: ResolverModel | None = None,
        timeout_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = split_address(server)
        self._model = model or HonoursTtl()
        self._timeout_s = timeout_s
        self._clock = clock
        self._kept: dict[tuple[str, RecordType], _Kept] = {}
        self.asked = 0

    async def resolve(self, name: str, kind: RecordType = RecordType.A) -> tuple[str, ...]:
        """Addresses of `name`, in the server's order. Raises Unavailable when there are none to be had."""
        key = (checked_name(name), kind)
        kept = self._kept.get(key)
        if kept is not None and self._clock() < kept.until:
            return kept.values
        try:
            values, ttl_s = await self._ask(*key)
        except Unavailable:
            if kept is None:
                raise
            return kept.values
        if len(self._kept) >= NAMES_MAX:
            self._kept.clear()
        self._kept[key] = _Kept(values, self._clock() + self._model.keeps_s(ttl_s))
        return values

    def forget(self) -> None:
        """The device was switched off and on: even a pinned address is gone."""
        self._kept.clear()

    async def _ask(self, name: str, kind: RecordType) -> tuple[tuple[str, ...], float]:
        """Addresses and the shortest TTL on the way to them."""
        ttl_s, asked = float("inf"), name
        wanted = dns.rdatatype.from_text(kind.value)
        for _ in range(CHAIN_MAX):
            answer = await self._query(asked, kind)
            here = dns.name.from_text(asked)
            for _ in range(CHAIN_MAX):
                found = answer.get_rrset(answer.answer, here, dns.rdataclass.IN, wanted)
                if found is not None:
                    return tuple(item.to_text() for item in found), min(ttl_s, found.ttl)
                alias = answer.get_rrset(answer.answer, here, dns.rdataclass.IN, dns.rdatatype.CNAME)
                if alias is None:
                    break
                ttl_s, here = min(ttl_s, alias.ttl), alias[0].target
            following = here.to_text(True).lower()
            if following == asked:
                raise Unavailable(f"{name} has no {kind} record")
            asked = following
        raise Unavailable(f"{name} leads through more than {CHAIN_MAX} CNAMEs")

    async def _query(self, name: str, kind: RecordType) -> dns.message.Message:
        self.asked += 1
        query = dns.message.make_query(name, kind.value)
        host, port = self._server
        try:
            async with asyncio.timeout(self._timeout_s):
                answer, _ = await dns.asyncquery.udp_with_fallback(query, host, self._timeout_s, port)
        except (TimeoutError, OSError, EOFError, dns.exception.DNSException) as error:
            raise Unavailable(f"the resolver {host}:{port} does not answer for {name}") from error
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise Unavailable(f"{name}: the resolver answers {dns.rcode.to_text(answer.rcode())}")
        return answer
