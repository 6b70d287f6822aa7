"""Names in a hosted zone of AWS Route 53, with weights.

A change is one batch that deletes exactly what was read and creates what is wanted: Route 53 carries out all
of it or nothing, and refuses it when what stands there is no longer the same. It counts once the batch is
INSYNC. Credentials are found as AWS's own tools find them.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from fleetlift.config import split_address
from fleetlift.core.dns import (
    RecordsChanged,
    RecordSet,
    RecordType,
    Weighted,
    checked_name,
    checked_values,
)
from fleetlift.core.errors import BadInput, FleetError, Forbidden, Unavailable
from fleetlift.levers.dns_query import ask_all

T = TypeVar("T")

TRIES: Final = 3
_POLICIES: Final = (
    ("AliasTarget", "is an alias"),
    ("Failover", "has failover routing"),
    ("GeoLocation", "has routing by place"),
    ("GeoProximityLocation", "has routing by place"),
    ("Region", "has routing by latency"),
    ("MultiValueAnswer", "has multivalue routing"),
    ("CidrRoutingConfig", "has routing by address"),
    ("HealthCheckId", "has a health check"),
)


class Route53:
    """One hosted zone. `servers` are asked too, if given, whether a change is out; `api` is for a private
    endpoint."""

    weighted = True

    def __init__(
        self,
        zone_id: str,
        *,
        servers: Sequence[str] = (),
        profile: str | None = None,
        api: str | None = None,
        region: str = "us-east-1",  # Route 53 is one for all regions
        timeout_s: float = 10.0,
        insync_within_s: float = 300.0,
        poll_s: float = 2.0,
    ) -> None:
        import boto3
        from botocore.config import Config

        self.zone_id = zone_id.removeprefix("/hostedzone/")
        if not re.fullmatch(r"[A-Z0-9]{1,32}", self.zone_id):
            raise BadInput(f"{zone_id[:60]!r} is not the id of a hosted zone such as Z2ABCDEF")
        self._servers = [split_address(server) for server in servers]
        self._insync_within_s = insync_within_s
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._client = boto3.Session(profile_name=profile).client(
            "route53",
            endpoint_url=api,
            region_name=region,
            config=Config(
                connect_timeout=timeout_s,
                read_timeout=timeout_s,
                retries={"total_max_attempts": 2, "mode": "standard"},
            ),
        )

    @property
    def name(self) -> str:
        return f"Route 53 zone {self.zone_id}"

    async def read(self, name: str, kind: RecordType) -> RecordSet | None:
        return _record_set(name, kind, await self._stored(name, kind))

    async def _stored(self, name: str, kind: RecordType) -> list[Mapping[str, Any]]:
        """The rows at `name` as Route 53 holds them: to delete one it must be written in the same way."""
        rows = await self._call(
            lambda: self._client.list_resource_record_sets(
                HostedZoneId=self.zone_id,
                StartRecordName=name + ".",
                StartRecordType=kind.value,
                MaxItems="100",
            )["ResourceRecordSets"]
        )
        return [row for row in rows if _plain(row["Name"]) == name and row["Type"] == kind.value]

    async def authoritative(self, name: str, kind: RecordType) -> Mapping[str, RecordSet | str]:
        try:
            found: RecordSet | str = await self.read(name, kind) or f"has no {kind} record of {name}"
        except Unavailable as error:
            found = str(error)
        return {
            "route53": found,
            **await ask_all(self._servers, name, kind, timeout_s=self._timeout_s),
        }

    async def write(self, records: Sequence[RecordSet], expected: Sequence[RecordSet]) -> None:
        trouble: FleetError | None = None
        for _ in range(TRIES):
            try:
                stored = [await self._stored(record.name, record.type) for record in records]
                now = [
                    _record_set(record.name, record.type, rows)
                    for record, rows in zip(records, stored, strict=True)
                ]
                # What is as wanted is written again all the same: that batch is INSYNC after the one before
                # it.
                if now != list(records):
                    _unchanged(expected, now)
                await self._batch([row for rows in stored for row in rows], records)
                return
            except NotInSync:
                raise
            except Unavailable as error:
                trouble = error
            except RecordsChanged as error:
                if isinstance(error, _Unexpected):
                    raise
                trouble = error  # perhaps by ourselves, when the answer was lost: the next round sees
        assert trouble is not None
        raise trouble

    async def fence(self, records: Sequence[RecordSet]) -> None:
        """Nothing to do: a batch is carried out before it is answered, or never, and deletes only what it
        knows."""

    async def prove(self, record: RecordSet) -> None:
        await self._batch(await self._stored(record.name, record.type), [record])

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    async def _batch(self, before: Sequence[Mapping[str, Any]], after: Sequence[RecordSet]) -> None:
        changes = [{"Action": "DELETE", "ResourceRecordSet": row} for row in before] + [
            {"Action": "CREATE", "ResourceRecordSet": row} for one in after for row in _rows(one)
        ]
        change = await self._call(
            lambda: self._client.change_resource_record_sets(
                HostedZoneId=self.zone_id, ChangeBatch={"Comment": "fleetlift", "Changes": changes}
            )["ChangeInfo"]
        )
        deadline = time.monotonic() + self._insync_within_s
        while change["Status"] != "INSYNC":
            if time.monotonic() > deadline:
                raise NotInSync(
                    f"{self.name}: the change {change['Id']} is not out on all servers after "
                    f"{self._insync_within_s:g} s. Repeat the step"
                )
            await asyncio.sleep(self._poll_s)
            change = await self._call(lambda: self._client.get_change(Id=change["Id"])["ChangeInfo"])  # noqa: B023

    async def _call(self, call: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            return await asyncio.to_thread(call)
        except NoCredentialsError:
            raise Forbidden(
                f"{self.name}: no AWS credentials are found; set them as for AWS's own tools"
            ) from None
        except ClientError as error:
            detail = error.response.get("Error", {})
            code, text = str(detail.get("Code", "")), str(detail.get("Message", ""))[:500]
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code == "InvalidChangeBatch":
                raise RecordsChanged(
                    f"{self.name} refuses the change, and nothing was overwritten: {text}. If somebody "
                    "else has "
                    "changed the records, see who it was; then repeat the step"
                ) from error
            if code == "NoSuchHostedZone":
                raise BadInput(f"{self.name} does not exist, or not in this account") from error
            if status in (401, 403):
                raise Forbidden(f"{self.name} refuses us ({code}): {text}") from error
            raise Unavailable(f"{self.name} answers {code or status}: {text}") from error
        except BotoCoreError as error:
            raise Unavailable(f"{self.name} does not answer ({error}); repeat the step") from error


class NotInSync(Unavailable):
    """A change was accepted and is slow to come out. Not tried again at once: it would only queue behind."""


class _Unexpected(RecordsChanged):
    """Read, and not what it should be."""


def _unchanged(expected: Sequence[RecordSet], now: Sequence[RecordSet | None]) -> None:
    for before, there in zip(expected, now, strict=True):
        if before != there:
            raise _Unexpected(
                f"{before.name} holds {there.text if there else 'nothing'!r} instead of {before.text!r}: "
                "somebody "
                "else has changed it, and nothing was overwritten. See who it was, then repeat the step"
            )


def _plain(name: str) -> str:
    """Route 53 writes unusual characters as octal: `\\052` is `*`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name).rstrip(".").lower()


def _record_set(name: str, kind: RecordType, rows: Sequence[Mapping[str, Any]]) -> RecordSet | None:
    if not rows:
        return None
    for row in rows:
        for key, text in _POLICIES:
            if row.get(key):
                raise BadInput(f"{name} {text} in Route 53: give it simple or weighted records to move it")
    values = [checked_values(kind, [item["Value"] for item in row["ResourceRecords"]]) for row in rows]
    ttl_s = {int(row["TTL"]) for row in rows}
    if len(ttl_s) > 1:
        raise BadInput(f"{name} has weighted records with different TTLs: give them the same one")
    weights = tuple(
        sorted(
            (
                Weighted(id=row["SetIdentifier"], weight=int(row["Weight"]), values=these)
                for row, these in zip(rows, values, strict=True)
                if "SetIdentifier" in row
            ),
            key=lambda one: one.id,
        )
    )
    return RecordSet(
        name=checked_name(name),
        type=kind,
        ttl_s=ttl_s.pop(),
        values=tuple(sorted({value for these in values for value in these})) if weights else values[0],
        weights=weights,
    )


def _rows(record: RecordSet) -> list[dict[str, Any]]:
    def row(values: Sequence[str]) -> dict[str, Any]:
        final = "." if record.type is RecordType.CNAME else ""
        return {
            "Name": record.name + ".",
            "Type": record.type.value,
            "TTL": record.ttl_s,
            "ResourceRecords": [{"Value": value + final} for value in values],
        }

    if not record.weights:
        return [row(record.values)]
    return [{**row(one.values), "SetIdentifier": one.id, "Weight": one.weight} for one in record.weights]
