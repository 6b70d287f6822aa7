"""The names of a tenant's plan, and whoever holds their zone."""

import socket
from typing import Any
from urllib.parse import urlsplit

from fleetlift.core.dns import DnsRecord, RecordType
from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.plan import DnsServer, SwitchDns, TenantPlan
from fleetlift.levers.dns import DnsLever, DnsProvider
from fleetlift.levers.rfc2136 import Rfc2136, read_key

DNS_PORT = 53


def dns_provider(server: DnsServer) -> DnsProvider:
    """Whoever holds the zone, by the plan's `dns:`. Raises BadInput when its key is missing."""
    if server.route53:
        from fleetlift.levers.route53 import Route53  # boto3 takes long to load

        return Route53(server.route53, servers=server.servers, api=server.api or None)
    return Rfc2136(
        server.zone,
        primary=_with_port(server.server),
        key=read_key(server.key),
        servers=[_with_port(one) for one in server.servers],
    )


def dns_lever(plan: TenantPlan, step: SwitchDns, provider: DnsProvider) -> DnsLever:
    """The lever for a step's records."""
    return DnsLever(
        provider,
        [
            DnsRecord(
                name=record.name,
                new=record.to or _addresses(plan.new.mqtt, record.type),
                type=RecordType(record.type),
                ttl_s=round(record.ttl_s),
                tls_port=_tls_port(plan.old.mqtt),
            )
            for record in step.records
        ],
        ca_file=plan.old.ca_file,
    )


def provider_of(plan: TenantPlan) -> DnsProvider:
    """The provider of a plan that switches names."""
    if plan.dns is None:
        raise BadInput("'switch: dns' needs 'dns:' at the top of the plan")
    return dns_provider(plan.dns)


def _with_port(server: str) -> str:
    plain = server.count(":") == 0 or server.endswith("]")
    return f"{server}:{DNS_PORT}" if plain else server


def _tls_port(mqtt: str) -> int:
    parts = urlsplit(mqtt)
    return (parts.port or 8883) if parts.scheme == "mqtts" else 0


def _addresses(mqtt: str, kind: str) -> tuple[str, ...]:
    host = urlsplit(mqtt).hostname
    if not host:
        raise BadInput("a record without 'to:' needs 'mqtt:' under the plan's 'to:'")
    if kind == "CNAME":
        return (host,)
    family = socket.AF_INET if kind == "A" else socket.AF_INET6
    try:
        found: list[Any] = socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadInput(
            f"{host}: no {kind} address is known ({error}); write 'to:' for each record"
        ) from error
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
