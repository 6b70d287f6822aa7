"""The DNS lever: names are moved from one side's addresses to the other's, and back.

Each step may be repeated after a kill at any moment: it first reads what stands there, changes only what is
not as wanted, and is done when every authoritative server answers so. What somebody else changed meanwhile is
refused, never overwritten. The caller keeps the original records, which `originals` gives, before the first
step; all other steps need them.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

import msgspec

from fleetlift.core.dns import (
    DnsRecord,
    Phase,
    RecordSet,
    RecordType,
    agrees,
    checked_record,
    checked_share,
    gone_at,
    lowered,
    may_switch_at,
    phase_of,
    share_of,
    switched,
)
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound, Unavailable
from fleetlift.core.units import format_duration
from fleetlift.levers.certificate_check import certificate_of
from fleetlift.log import get_logger

log = get_logger(__name__)

POLL_S: Final = 0.1  # between two questions whether a change is out
CERTIFICATE_DAYS_MIN: Final = 14.0


class DnsProvider(Protocol):
    """Whoever holds the zone. Calls raise Unavailable when it does not answer, Forbidden when it refuses
    us."""

    @property
    def name(self) -> str: ...

    @property
    def weighted(self) -> bool:
        """Whether answers can be shared out by weights."""
        ...

    async def read(self, name: str, kind: RecordType) -> RecordSet | None:
        """What stands at `name` now, where changes are made; None when there is nothing of that type."""
        ...

    async def write(self, records: Sequence[RecordSet], expected: Sequence[RecordSet]) -> None:
        """Replace `expected` by `records`, all or none, if all of `expected` still stand; else
        RecordsChanged.

        What is as wanted already is left so. Unavailable with an unknown outcome: repeat it.
        """
        ...

    async def authoritative(self, name: str, kind: RecordType) -> Mapping[str, RecordSet | str]:
        """What each listed authoritative server answers, or why it gives no answer."""
        ...

    async def fence(self, records: Sequence[RecordSet]) -> None:
        """Whatever was sent before and waits on its way must come to nothing from now on."""
        ...

    async def prove(self, record: RecordSet) -> None:
        """Write `record` as it stands: shows that we may, and changes nothing. Raises what stands against
        it."""
        ...

    async def close(self) -> None: ...


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What stands against moving a name, and what to do."""

    name: str
    text: str


class Lowered(msgspec.Struct, frozen=True, kw_only=True):
    """Keep it: after a kill, `lower_ttl` with this `lowered_at` does not wait from the beginning."""

    records: tuple[RecordSet, ...]
    lowered_at: float  # when all servers were seen to answer with the low TTL
    switch_from: float


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """What stands after a step. `gone_at`: when caches that honour TTLs hold nothing from before it."""

    records: tuple[RecordSet, ...]
    at: float
    gone_at: float


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one authoritative server answers for one name. `problem` is empty when it answers."""

    name: str
    server: str
    values: tuple[str, ...] = ()
    ttl_s: int | None = None
    problem: str = ""


class DnsLever:
    """Moves `records`, all of one provider.

    `within_s` bounds how long a change may take until every authoritative server shows it. `clock` gives Unix
    seconds. `ca_file` is whom devices trust; empty: the system's store.
    """

    def __init__(
        self,
        provider: DnsProvider,
        records: Iterable[DnsRecord],
        *,
        within_s: float = 60.0,
        ca_file: str = "",
        certificate_days_min: float = CERTIFICATE_DAYS_MIN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        checked = [checked_record(record) for record in records]
        self.records = {(record.name, record.type): record for record in checked}
        if len(self.records) < len(checked) or not checked:
            raise BadInput("give each name that is moved once for a type, and at least one")
        self._provider = provider
        self._within_s = within_s
        self._ca_file = ca_file
        self._certificate_s_min = certificate_days_min * 86_400
        self._clock = clock

    # --- before ---

    async def originals(self) -> tuple[RecordSet, ...]:
        """What stands at the names now. Store it before the first step: all ways back lead there."""
        found = []
        for record in self.records.values():
            now = await self._read(record)
            if record.old and now.values != record.old:
                raise Conflict(
                    f"{record.name} holds {' '.join(now.values)}, and the plan says that the old side is "
                    f"{' '.join(record.old)}: correct one of them"
                )
            found.append(now)
        return tuple(found)

    async def check(self, originals: Sequence[RecordSet] = ()) -> list[Problem]:
        """All that stands against moving the names; empty when nothing does. Changes nothing.

        With `originals`, a move that has begun is checked, else one that is about to begin.
        """
        given = {(one.name, one.type): one for one in originals}
        problems: list[Problem] = []
        for record in self.records.values():
            try:
                problems += await self._check_one(record, given.get((record.name, record.type)))
            except FleetError as error:
                problems.append(Problem(name=record.name, text=str(error)))
        return problems

    async def _check_one(self, record: DnsRecord, original: RecordSet | None) -> list[Problem]:
        name, texts = record.name, []
        now = await self._read(record)
        before = original or now
        if before.weights:
            texts.append("has weighted records of your own: move a name that has plain ones")
        elif original is None and now.values == record.new:
            texts.append("holds the new side's addresses already: there is nothing to move")
        elif original is None and record.old and now.values != record.old:
            texts.append(f"holds {' '.join(now.values)}, not the old side's {' '.join(record.old)}")
        else:
            share_of(record, before, now)
        for other in (RecordType.A, RecordType.AAAA):
            if record.type is not RecordType.CNAME and other is not record.type:
                beside = await self._provider.read(name, other)
                if beside is not None and (name, other) not in self.records:
                    texts.append(
                        f"also has {other} records ({' '.join(beside.values)}), which would lead devices "
                        "to the "
                        "old side after the switch: remove them first, or move a name without them"
                    )
        answers = await self._provider.authoritative(name, record.type)
        for server, answer in answers.items():
            if isinstance(answer, str):
                texts.append(f"{server}: {answer}")
            elif not agrees(now, answer):
                texts.append(f"{server} answers {answer.text!r} instead of {now.text!r}: wait, or repair it")
        try:
            await self._provider.prove(now)
        except FleetError as error:
            texts.append(str(error))
        if record.tls_port:
            texts += await self._check_certificates(record, before)
        return [Problem(name=name, text=text) for text in texts]

    async def _check_certificates(self, record: DnsRecord, original: RecordSet) -> list[str]:
        """Both sides must hold a certificate for the name that devices ask for."""
        texts = []
        sides = [("old", host) for host in original.values] + [("new", host) for host in record.new]
        found = await asyncio.gather(
            *(certificate_of(record.name, host, record.tls_port, ca_file=self._ca_file) for _, host in sides)
        )
        for (side, host), one in zip(sides, found, strict=True):
            if one.problem:
                texts.append(f"the {side} side at {host} port {record.tls_port}: {one.problem}")
            elif one.expires_at - self._clock() < self._certificate_s_min:
                left = format_duration(max(0.0, round(one.expires_at - self._clock())))
                texts.append(
                    f"the {side} side's certificate at {host} ends in {left}: renew it before the switch"
                )
        return texts

    # --- the steps ---

    async def lower_ttl(self, originals: Sequence[RecordSet], *, lowered_at: float | None = None) -> Lowered:
        """Lower the TTLs; the old ones then have to be waited out, until `switch_from`.

        Also possible on the new side, before a planned return. `lowered_at` is what an earlier call returned;
        it counts only if the TTLs are low indeed.
        """
        records, waits, all_low = [], [0.0], True
        for record, original, now in await self._now(originals):
            share_of(record, original, now)
            low = lowered(now, record.ttl_s)
            records.append((now, low))
            all_low = all_low and now == low
            waits.append(
                max(original.ttl_s, now.ttl_s) if original.ttl_s > record.ttl_s or now != low else 0.0
            )
        await self._replace(records)
        at = lowered_at if lowered_at is not None and all_low else self._clock()
        log.info("dns_ttl_lowered", names=[low.name for _, low in records], switch_from=at + max(waits))
        return Lowered(
            records=tuple(low for _, low in records),
            lowered_at=at,
            switch_from=may_switch_at(at, max(waits)),
        )

    async def wait_until(self, when: float) -> None:
        """Sleep until `when`. A clock that is set meanwhile does not shorten the wait."""
        await asyncio.sleep(max(0.0, when - self._clock()))

    async def switch(
        self,
        originals: Sequence[RecordSet],
        *,
        share_percent: float = 100.0,
        switch_from: float,
        names: Iterable[str] | None = None,
    ) -> Changed:
        """Give the new side `share_percent` of the answers for `names` (all). Raises Conflict before
        `switch_from`, which `lower_ttl` returned."""
        checked_share(share_percent, weighted=self._provider.weighted)
        if (left := switch_from - self._clock()) > 0:
            raise Conflict(
                f"the old TTL may be cached for {format_duration(round(left, 3))} more: wait, then switch"
            )
        records = []
        for record, original, now in await self._now(originals, names):
            share_of(record, original, now)
            if now.ttl_s > record.ttl_s:
                raise Conflict(
                    f"the TTL of {record.name} is {now.ttl_s} s: lower it and wait before a switch"
                )
            records.append((now, switched(record, original, share_percent)))
        return await self._change("dns_switched", records, share_percent)

    async def revert(
        self, originals: Sequence[RecordSet], *, names: Iterable[str] | None = None, force: bool = False
    ) -> Changed:
        """Back to the old side's records, at once and whatever share was switched; the TTL stays low.

        `force` also overwrites what somebody else has set. Restore the TTL by `restore_ttl`.
        """
        # A switch whose answer never came may still be on its way, and nothing may be left to change here.
        await self._provider.fence([original for _, original, _ in await self._now(originals, names)])
        records = []
        for record, original, now in await self._now(originals, names):
            if not force:
                share_of(record, original, now)
            records.append((now, lowered(original, record.ttl_s)))
        return await self._change("dns_reverted", records, 0.0)

    async def restore_ttl(
        self, originals: Sequence[RecordSet], *, names: Iterable[str] | None = None
    ) -> Changed:
        """Give the names their own TTL again, on whichever side they are wholly."""
        records, share = [], 0.0
        for record, original, now in await self._now(originals, names):
            share = share_of(record, original, now)
            if share not in (0, 100):
                raise Conflict(f"{record.name} is switched by {share:g} %: give it 0 or 100 % first")
            records.append((now, msgspec.structs.replace(now, ttl_s=original.ttl_s)))
        return await self._change("dns_ttl_restored", records, share)

    # --- looking ---

    async def observe(self) -> list[Seen]:
        """What each authoritative server answers for each name now."""
        seen = []
        for record in self.records.values():
            for server, answer in (await self._provider.authoritative(record.name, record.type)).items():
                if isinstance(answer, str):
                    seen.append(Seen(name=record.name, server=server, problem=answer))
                else:
                    seen.append(
                        Seen(name=record.name, server=server, values=answer.values, ttl_s=answer.ttl_s)
                    )
        return seen

    async def phases(
        self, originals: Sequence[RecordSet], *, switch_from: float | None = None
    ) -> dict[str, Phase]:
        """Where each name is, read from what stands there: what a mover that was killed begins with.

        Of a name with addresses of two families, the one that is behind.
        """
        waited = switch_from is not None and self._clock() >= switch_from
        found: dict[str, Phase] = {}
        for record, original, now in await self._now(originals):
            phase = phase_of(record, original, now, waited=waited)
            found[record.name] = min(phase, found.get(record.name, phase), key=list(Phase).index)
        return found

    async def shares(self, originals: Sequence[RecordSet]) -> dict[str, float]:
        """The new side's share of the answers for each name, per cent."""
        found: dict[str, float] = {}
        for record, original, now in await self._now(originals):
            share = share_of(record, original, now)
            found[record.name] = min(share, found.get(record.name, share))
        return found

    # --- inside ---

    async def _read(self, record: DnsRecord) -> RecordSet:
        found = await self._provider.read(record.name, record.type)
        if found is None:
            if record.type is not RecordType.CNAME:
                alias = await self._provider.read(record.name, RecordType.CNAME)
                if alias is not None:
                    raise Conflict(
                        f"{record.name} is a CNAME for {alias.values[0]}: move it as a CNAME, or move "
                        "that name"
                    )
            raise NotFound(
                f"{record.name} has no {record.type} record at {self._provider.name}: see the plan"
            )
        return found

    async def _now(
        self, originals: Sequence[RecordSet], names: Iterable[str] | None = None
    ) -> list[tuple[DnsRecord, RecordSet, RecordSet]]:
        """Record, original and what stands there now, of each name that is asked for."""
        given = {(one.name, one.type): one for one in originals}
        wanted = None if names is None else set(names)
        if wanted is not None and (strange := wanted - {record.name for record in self.records.values()}):
            raise BadInput(f"{', '.join(sorted(strange))}: not among the names that are moved")
        found = []
        for key, record in self.records.items():
            name = record.name
            if wanted is not None and name not in wanted:
                continue
            if (original := given.get(key)) is None:
                raise BadInput(
                    f"{name}: the original {record.type} record is missing; it was read before the start"
                )
            if original.weights:
                raise BadInput(f"{name} had weighted records of its own: they cannot be moved")
            found.append((record, original, await self._read(record)))
        return found

    async def _change(
        self, event: str, records: Sequence[tuple[RecordSet, RecordSet]], share_percent: float
    ) -> Changed:
        await self._replace(records)
        at = self._clock()
        log.info(event, names=[wanted.name for _, wanted in records], share_percent=share_percent)
        return Changed(
            records=tuple(wanted for _, wanted in records),
            at=at,
            gone_at=gone_at(at, max((before.ttl_s for before, _ in records), default=0)),
        )

    async def _replace(self, records: Sequence[tuple[RecordSet, RecordSet]]) -> None:
        """Write, all names at once, then wait until every authoritative server answers so."""
        if not records:
            return
        await self._provider.write([wanted for _, wanted in records], [before for before, _ in records])
        deadline = time.monotonic() + self._within_s
        for _, wanted in records:
            while behind := await self._behind(wanted):
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"{wanted.name} is changed at {self._provider.name}, but within "
                        f"{self._within_s:g} s not "
                        f"all authoritative servers say so: {'; '.join(behind)}. Repair them and repeat "
                        "the step"
                    )
                await asyncio.sleep(POLL_S)

    async def _behind(self, wanted: RecordSet) -> list[str]:
        answers = await self._provider.authoritative(wanted.name, wanted.type)
        return [
            f"{server} {answer if isinstance(answer, str) else f'answers {answer.text!r}'}"
            for server, answer in answers.items()
            if isinstance(answer, str) or not agrees(wanted, answer)
        ]
