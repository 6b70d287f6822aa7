"""Names on a server that takes dynamic updates (RFC 2136) signed by TSIG (RFC 8945): Knot, BIND, PowerDNS.

Each update names what must still stand there, and the version of the zone (its SOA) that was read with it. So
a concurrent change is refused, a change of the TTL alone too, and an update that was delayed on its way comes
to nothing once the zone has moved on.
"""

import asyncio
import base64
import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import dns.asyncquery
import dns.exception
import dns.name
import dns.rcode
import dns.rdataset
import dns.rdatatype
import dns.rdtypes.ANY.SOA
import dns.tsig
import dns.update
import msgspec

from fleetlift.config import join_address, split_address
from fleetlift.core.dns import RecordsChanged, RecordSet, RecordType, checked_name
from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, Unavailable
from fleetlift.levers.dns_query import TROUBLE, Address, ask, ask_all, read_from, why

ALGORITHMS: Final = ("hmac-sha256", "hmac-sha384", "hmac-sha512", "hmac-sha224", "hmac-sha1")
KEY_VARIABLE: Final = "FLEETLIFT_DNS_KEY"
TRIES: Final = 3  # of an update whose answer does not come
OUTDATED_MAX: Final = 20  # times that others may change the zone while we are about to

_BIND_KEY = re.compile(
    r'key\s+"?([^"\s{]+)"?\s*\{\s*algorithm\s+"?([a-z0-9-]+)"?\s*;\s*secret\s+"?([A-Za-z0-9+/=]+)"?\s*;\s*\}',
    re.I,
)
_PREREQUISITE_FAILED: Final = frozenset(
    {dns.rcode.YXDOMAIN, dns.rcode.YXRRSET, dns.rcode.NXRRSET, dns.rcode.NXDOMAIN}
)


class TsigKey(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    algorithm: str
    secret: bytes

    def __repr__(self) -> str:
        return f"TsigKey(name={self.name!r}, algorithm={self.algorithm!r}, secret=***)"


def parse_key(text: str) -> TsigKey:
    """A key as `tsig-keygen` prints it, or `[algorithm:]name:secret`. Raises BadInput, which tells no
    secret."""
    if match := _BIND_KEY.search(text):
        name, algorithm, secret = match.groups()
    else:
        parts = text.strip().split(":")
        if len(parts) not in (2, 3):
            raise BadInput("a TSIG key is `[algorithm:]name:secret`, or what tsig-keygen prints")
        name, secret = parts[-2:]
        algorithm = parts[0] if len(parts) == 3 else ALGORITHMS[0]
    if algorithm.lower().rstrip(".") not in ALGORITHMS:
        raise BadInput(f"TSIG algorithm {algorithm[:40]!r}: give one of {', '.join(ALGORITHMS)}")
    try:
        raw = base64.b64decode(secret, validate=True)
    except ValueError:
        raw = b""
    if not raw:
        raise BadInput("the secret of the TSIG key is not base64")
    return TsigKey(name=checked_name(name), algorithm=algorithm.lower().rstrip("."), secret=raw)


def read_key(source: str = f"env:{KEY_VARIABLE}", environ: Mapping[str, str] | None = None) -> TsigKey:
    """The key that `source` names: `env:VARIABLE`, or a file that only its owner may read."""
    if source.startswith("env:"):
        variable = source[4:]
        if not (text := (os.environ if environ is None else environ).get(variable, "")):
            raise BadInput(f"{variable} is not set: put the TSIG key there, as [algorithm:]name:secret")
        return parse_key(text)
    path = Path(source)
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise Forbidden(f"{path} can be read by others: chmod 600 {path}")
        return parse_key(path.read_text())
    except OSError as error:
        raise BadInput(f"the TSIG key in {path} cannot be read ({error.strerror or error})") from error


class Rfc2136:
    """One zone. `primary` takes the updates; `servers` are asked whether a change is out (the primary too).

    Without a key it can only be read.
    """

    weighted = False

    def __init__(
        self,
        zone: str,
        *,
        primary: str,
        key: TsigKey | None,
        servers: Sequence[str] = (),
        timeout_s: float = 5.0,
    ) -> None:
        self.zone = checked_name(zone)
        self._primary = split_address(primary)
        self._servers: list[Address] = list(
            dict.fromkeys([self._primary, *(split_address(server) for server in servers)])
        )
        self._key = None if key is None else dns.tsig.Key(key.name, key.secret, key.algorithm)
        self._timeout_s = timeout_s
        self._soa_ttl_s = 0  # as last read

    @property
    def name(self) -> str:
        return f"the DNS server {join_address(*self._primary)}"

    async def read(self, name: str, kind: RecordType) -> RecordSet | None:
        return await read_from(self._primary, self._inside(name), kind, timeout_s=self._timeout_s)

    async def authoritative(self, name: str, kind: RecordType) -> Mapping[str, RecordSet | str]:
        return await ask_all(self._servers, self._inside(name), kind, timeout_s=self._timeout_s)

    async def write(self, records: Sequence[RecordSet], expected: Sequence[RecordSet]) -> None:
        if any(record.weights for record in records):
            raise BadInput("plain DNS has no weights: switch by 0 or 100 %")
        unanswered = outdated = 0
        trouble: FleetError | None = None
        while unanswered < TRIES and outdated < OUTDATED_MAX:
            try:
                # The version first: whatever changes after it makes the update come to nothing.
                version = await self._version()
                now = [await self.read(record.name, record.type) for record in records]
                if now == list(records):
                    return
                for before, there in zip(expected, now, strict=True):
                    if before != there:
                        raise RecordsChanged(
                            f"{before.name} holds {there.text if there else 'nothing'!r} instead of "
                            f"{before.text!r}: somebody else has changed it, and nothing was overwritten. "
                            "See who "
                            "it was, then repeat the step"
                        )
                if await self._send(records, expected, version):
                    return
                outdated += 1
            except Unavailable as error:
                # The update may have been carried out all the same: the next round reads that.
                unanswered, trouble = unanswered + 1, error
        if trouble is not None:
            raise trouble
        raise Conflict(
            f"the zone {self.zone} was changed by others {OUTDATED_MAX} times while {records[0].name} was "
            "to be "
            "changed: repeat the step when it is quieter"
        )

    async def fence(self, records: Sequence[RecordSet]) -> None:
        """Move the zone's version on: every update is bound to the one it was made for."""
        for _ in range(OUTDATED_MAX):
            if await self._send([], [], await self._version(), next_version=True):
                return
        raise Conflict(
            f"the zone {self.zone} is changed too often by others: repeat the step when it is quieter"
        )

    async def prove(self, record: RecordSet) -> None:
        for _ in range(OUTDATED_MAX):
            version = await self._version()
            if await self._send([record], [record], version):
                return
            if await self.read(record.name, record.type) != record:
                break
        raise RecordsChanged(
            f"{record.name} does not stand in the zone {self.zone} as it is answered ({record.text}): it "
            "is being "
            "changed now, or is made by a wildcard"
        )

    async def close(self) -> None:
        pass

    def _inside(self, name: str) -> str:
        if name != self.zone and not name.endswith("." + self.zone):
            raise BadInput(f"{name} is not in the zone {self.zone}")
        return name

    async def _version(self) -> dns.rdataset.Rdataset:
        answer = await ask(self._primary, self.zone, "SOA", timeout_s=self._timeout_s)
        apex = dns.name.from_text(self.zone)
        for rrset in answer.answer:
            if rrset.name == apex and rrset.rdtype == dns.rdatatype.SOA:
                self._soa_ttl_s = rrset.ttl
                return dns.rdataset.from_rdata_list(0, list(rrset))
        raise BadInput(f"{self.name} does not hold the zone {self.zone}")

    async def _send(
        self,
        records: Sequence[RecordSet],
        expected: Sequence[RecordSet],
        version: dns.rdataset.Rdataset,
        *,
        next_version: bool = False,
    ) -> bool:
        """True when the server has done it, False when what it was bound to no longer stands."""
        if self._key is None:
            raise Forbidden(
                f"a TSIG key is needed to change {self.zone}: give one by {KEY_VARIABLE} or a file"
            )
        key_name = self._key.name.to_text(True)
        update = dns.update.UpdateMessage(self.zone, keyring=self._key)
        update.present(dns.name.from_text(self.zone), version)
        for before in expected:
            update.present(dns.name.from_text(before.name), _rdataset(before, ttl_s=0))
        for record in records:
            update.replace(dns.name.from_text(record.name), _rdataset(record))
        if next_version:
            soa = version[0]
            assert isinstance(soa, dns.rdtypes.ANY.SOA.SOA)
            # Section 3.4.2.2: a later SOA replaces the one there.
            later = soa.replace(serial=soa.serial % 0xFFFF_FFFF + 1)
            update.add(dns.name.from_text(self.zone), dns.rdataset.from_rdata(self._soa_ttl_s, later))
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await dns.asyncquery.tcp(
                    update, self._primary[0], port=self._primary[1], timeout=self._timeout_s
                )
        except (TimeoutError, dns.exception.Timeout):
            raise Unavailable(
                f"{self.name} has not answered an update within {time.monotonic() - began:.3g} s; it may "
                "have "
                "carried it out. Repeat the step: it reads first what stands there"
            ) from None
        except (dns.tsig.PeerBadTime, dns.tsig.BadTime):
            raise Forbidden(f"{self.name} refuses the TSIG signature for its time: set both clocks") from None
        except (dns.tsig.PeerError, dns.tsig.BadSignature, dns.tsig.BadKey) as error:
            raise Forbidden(
                f"{self.name} refuses the TSIG key {key_name} ({type(error).__name__}): check "
                "its name, algorithm and secret"
            ) from error
        except TROUBLE as error:
            raise Unavailable(f"{self.name} cannot be reached for an update ({why(error)})") from error
        code = answer.rcode()
        if code == dns.rcode.NOERROR:
            return True
        if code in _PREREQUISITE_FAILED:
            return False
        text = dns.rcode.to_text(code)
        if code in (dns.rcode.REFUSED, dns.rcode.NOTAUTH):
            raise Forbidden(
                f"{self.name} answers {text} to an update of "
                f"{', '.join(one.name for one in records) or self.zone}: let the key "
                f"{key_name} update the zone {self.zone} there"
            )
        raise Unavailable(f"{self.name} answers {text} to an update: see its log")


def _rdataset(record: RecordSet, *, ttl_s: int | None = None) -> dns.rdataset.Rdataset:
    values = [value + "." if record.type is RecordType.CNAME else value for value in record.values]
    return dns.rdataset.from_text("IN", record.type.value, record.ttl_s if ttl_s is None else ttl_s, *values)
