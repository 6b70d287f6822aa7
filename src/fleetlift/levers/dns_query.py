"""Asking one authoritative server, by TCP, what it says of a name."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import dns.asyncquery
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype

from fleetlift.config import join_address
from fleetlift.core.dns import RecordSet, RecordType, checked_values
from fleetlift.core.errors import Unavailable

Address = tuple[str, int]

# What a connection that breaks, hangs or talks nonsense raises.
TROUBLE: Final = (OSError, EOFError, dns.exception.DNSException)


async def ask(server: Address, name: str, kind: str, *, timeout_s: float) -> dns.message.Message:
    """The server's own, authoritative answer. Raises Unavailable with the reason when it gives none."""
    where = join_address(*server)
    query = dns.message.make_query(name, kind, flags=0)
    try:
        async with asyncio.timeout(timeout_s):
            answer = await dns.asyncquery.tcp(query, server[0], port=server[1], timeout=timeout_s)
    except (TimeoutError, dns.exception.Timeout):
        raise Unavailable(f"the DNS server {where} gives no answer within {timeout_s:g} s") from None
    except TROUBLE as error:
        raise Unavailable(f"the DNS server {where} cannot be asked ({why(error)})") from error
    if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
        raise Unavailable(
            f"the DNS server {where} answers {dns.rcode.to_text(answer.rcode())} when asked for {name}"
        )
    if not answer.flags & dns.flags.AA:
        raise Unavailable(f"the DNS server {where} is not authoritative for {name}: give one that is")
    return answer


async def read_from(server: Address, name: str, kind: RecordType, *, timeout_s: float) -> RecordSet | None:
    """What stands at `name`, and not where a CNAME leads. Raises Unavailable."""
    answer = await ask(server, name, kind.value, timeout_s=timeout_s)
    wanted = dns.rdatatype.from_text(kind.value)
    found = answer.get_rrset(answer.answer, dns.name.from_text(name), dns.rdataclass.IN, wanted)
    if found is None:
        return None
    values = checked_values(kind, [item.to_text() for item in found])
    return RecordSet(name=name, type=kind, ttl_s=found.ttl, values=values)


async def ask_all(
    servers: Sequence[Address], name: str, kind: RecordType, *, timeout_s: float
) -> Mapping[str, RecordSet | str]:
    """What each server answers, or why it gives none."""

    async def one(server: Address) -> RecordSet | str:
        try:
            found = await read_from(server, name, kind, timeout_s=timeout_s)
        except Unavailable as error:
            return str(error)
        return found if found is not None else f"has no {kind} record of {name}"

    answers = await asyncio.gather(*(one(server) for server in servers))
    return {join_address(*server): answer for server, answer in zip(servers, answers, strict=True)}


def why(error: BaseException) -> str:
    """A few words for a person."""
    if isinstance(error, EOFError):
        return "the connection was closed"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.lower() if isinstance(error, OSError) else text
