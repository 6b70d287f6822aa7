"""What the DNS lever decides: which records to set, when a TTL has been waited out, what may still be cached.

A name is moved in the order of `MOVES`: its TTL is lowered, the old TTL is waited out, then it is switched,
by a share or at once, and settled with its own TTL again. The way back is open at every step. Nothing here
asks a server or a clock; `levers/dns.py` does.

A switch of a name moves *resolutions*, not connections: a device follows when it next asks, and it asks when
it next connects. What is left behind is the business of `core/stale_tail.py` and of the relay.
"""

import ipaddress
import math
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from fleetlift.core.errors import BadInput, Conflict

LOW_TTL_S: Final = 30
TTL_MAX_S: Final = 7 * 86_400  # what resolvers keep at most, RFC 8767 section 4
VALUES_MAX: Final = 100
WEIGHT_STEPS: Final = 200  # weights of both sides add up to this, so a share is set to half a per cent
OLD_SET, NEW_SET = "fleetlift-old", "fleetlift-new"  # set identifiers of weighted records

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)


class RecordType(StrEnum):
    A = "A"
    AAAA = "AAAA"
    CNAME = "CNAME"


class Weighted(msgspec.Struct, frozen=True, kw_only=True):
    """One weighted set of a name: `weight` of the sum of all weights is its share of the answers."""

    id: str
    weight: int
    values: tuple[str, ...]


class RecordSet(msgspec.Struct, frozen=True, kw_only=True):
    """What stands at a name, of one type. Names and values are lower-case, without a final dot, values
    sorted.

    `weights` is empty for plain records; else it has a row for each weighted set, and `values` are all
    theirs.
    """

    name: str
    type: RecordType
    ttl_s: int
    values: tuple[str, ...]
    weights: tuple[Weighted, ...] = ()

    @property
    def text(self) -> str:
        """As on screen: `iot.example.com 30 A 192.0.2.1`."""
        if self.weights:
            sets = sorted(self.weights, key=lambda one: one.id)
            values = " + ".join(f"{one.weight}×({' '.join(one.values)})" for one in sets)
        else:
            values = " ".join(self.values)
        return f"{self.name} {self.ttl_s} {self.type} {values}"


class DnsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One name that is moved, as the plan gives it.

    `old` and `new` are the addresses of the two sides (for a CNAME, one host name each); an empty `old` takes
    what stands there before the first change. `ttl_s` holds while the name is moved. `tls_port` 0: no TLS is
    spoken there, and no certificate is asked for.
    """

    name: str
    new: tuple[str, ...]
    old: tuple[str, ...] = ()
    type: RecordType = RecordType.A
    ttl_s: int = LOW_TTL_S
    tls_port: int = 0


class RecordsChanged(Conflict):
    """Somebody else has changed what stands at a name. Nothing was overwritten."""


# --- names and values ---------------------------------------------------------------------------------------


def checked_name(text: str) -> str:
    """A host name as records hold it: lower-case, no final dot. Raises BadInput."""
    name = text.strip().rstrip(".").lower()
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise BadInput(f"{text[:300]!r} is not a host name such as iot.example.com")
    return name


def checked_values(kind: RecordType, values: Sequence[str]) -> tuple[str, ...]:
    """Addresses or a host name in the one form they are compared in, sorted, each once. Raises BadInput."""
    if len(values) > VALUES_MAX:
        raise BadInput(f"{len(values)} values for one name: at most {VALUES_MAX} are taken")
    if kind is RecordType.CNAME:
        found = sorted({checked_name(value) for value in values})
        if len(found) > 1:
            raise BadInput(f"a CNAME points to one name, not to {', '.join(found)}")
        return tuple(found)
    version = 4 if kind is RecordType.A else 6
    addresses = set()
    for value in values:
        try:
            address = ipaddress.ip_address(value.strip())
        except ValueError:
            raise BadInput(
                f"{value[:100]!r} is not an IPv{version} address, as {kind} records hold"
            ) from None
        if address.version != version:
            raise BadInput(f"{value} is not an IPv{version} address, as {kind} records hold")
        addresses.add(address)
    return tuple(str(one) for one in sorted(addresses, key=int))


def checked_record(record: DnsRecord) -> DnsRecord:
    """`record` with names and values in their one form. Raises BadInput with what is wrong."""
    name = checked_name(record.name)
    new, old = checked_values(record.type, record.new), checked_values(record.type, record.old)
    if not new:
        raise BadInput(f"{name}: give the new side's addresses")
    if set(new) & set(old):
        raise BadInput(f"{name}: {', '.join(sorted(set(new) & set(old)))} would be old and new at once")
    if not 1 <= record.ttl_s <= TTL_MAX_S:
        raise BadInput(f"{name}: a TTL of {record.ttl_s} s; give 1 s to 7 days")
    if not 0 <= record.tls_port <= 65535:
        raise BadInput(f"{name}: port {record.tls_port} does not exist")
    return msgspec.structs.replace(record, name=name, new=new, old=old)


# --- the states of one name ---------------------------------------------------------------------------------


class Phase(StrEnum):
    PLANNED = "planned"
    TTL_LOWERED = "ttl-lowered"
    WAITED = "waited"  # no cache holds the old TTL any more
    SWITCHED = "switched"  # a share of the answers, or all, are the new side's
    SETTLED = "settled"  # all are, and the name has its own TTL again


class Event(StrEnum):
    LOWER = "lower the TTL"
    WAIT = "wait the old TTL out"
    SWITCH = "switch"
    SETTLE = "settle"
    REVERT = "revert"
    RESTORE = "restore the TTL"


MOVES: Final[Mapping[Phase, Mapping[Event, Phase]]] = {
    Phase.PLANNED: {Event.LOWER: Phase.TTL_LOWERED},
    Phase.TTL_LOWERED: {Event.WAIT: Phase.WAITED, Event.RESTORE: Phase.PLANNED},
    Phase.WAITED: {Event.SWITCH: Phase.SWITCHED, Event.RESTORE: Phase.PLANNED},
    Phase.SWITCHED: {
        Event.SWITCH: Phase.SWITCHED,
        Event.SETTLE: Phase.SETTLED,
        Event.REVERT: Phase.TTL_LOWERED,
    },
    # Caches may then hold the new side's answer for its whole long TTL: the way back is open, and slow.
    Phase.SETTLED: {Event.REVERT: Phase.TTL_LOWERED},
}

REVERSE: Final[Mapping[Event, Event]] = {
    Event.LOWER: Event.RESTORE,
    Event.SWITCH: Event.REVERT,
    Event.SETTLE: Event.REVERT,
}


def advance(phase: Phase, event: Event) -> Phase:
    """The phase after `event`. Raises Conflict when a name in `phase` does not allow it."""
    if (after := MOVES[phase].get(event)) is None:
        allowed = ", ".join(MOVES[phase]) or "nothing"
        raise Conflict(f"a name that is {phase} cannot {event}; possible: {allowed}")
    return after


# --- what is to stand at a name -----------------------------------------------------------------------------


def checked_share(share_percent: float, *, weighted: bool) -> float:
    """A share that can be set exactly. Raises BadInput for one that cannot.

    Plain DNS has no weights. Mixing addresses of both sides into one answer is not a share: a device gets all
    of them, takes the first, the nearest by RFC 6724 or the next one after a failure, and so changes sides as
    it likes. So without weights only 0 and 100 are taken; the relay moves an exact share, device by device.
    """
    if not math.isfinite(share_percent) or not 0 <= share_percent <= 100:
        raise BadInput(f"a share of {share_percent:g} %: give 0 to 100")
    if not weighted and share_percent not in (0, 100):
        raise BadInput(
            f"a share of {share_percent:g} %: these servers have no weighted records. Switch name by "
            "name, 0 or "
            "100 % each, or move a share of the devices by the relay (`share_percent` of its routes)"
        )
    if (share_percent * WEIGHT_STEPS / 100) % 1:
        raise BadInput(f"a share of {share_percent:g} %: weights are set in steps of half a per cent")
    return share_percent


def lowered(original: RecordSet, ttl_s: int) -> RecordSet:
    """What stands there while the name waits: the same with a TTL that is never longer than before."""
    return msgspec.structs.replace(original, ttl_s=min(ttl_s, original.ttl_s))


def switched(record: DnsRecord, original: RecordSet, share_percent: float) -> RecordSet:
    """What is to stand there when `share_percent` of the answers are the new side's."""
    before = lowered(original, record.ttl_s)
    if share_percent == 0:
        return before
    if share_percent == 100:
        return msgspec.structs.replace(before, values=record.new, weights=())
    new = round(share_percent * WEIGHT_STEPS / 100)
    return msgspec.structs.replace(
        before,
        values=tuple(sorted({*original.values, *record.new})),
        weights=(
            Weighted(id=NEW_SET, weight=new, values=record.new),
            Weighted(id=OLD_SET, weight=WEIGHT_STEPS - new, values=original.values),
        ),
    )


def share_of(record: DnsRecord, original: RecordSet, now: RecordSet) -> float:
    """The share of the answers that are the new side's, per cent, by what stands there `now`.

    Raises RecordsChanged when that is neither side's nor a mixture that the lever made: somebody else's
    change.
    """
    if now.type is original.type and not now.weights:
        if now.values == original.values and not original.weights:
            return 0.0
        if now.values == record.new:
            return 100.0
    if now == lowered(original, now.ttl_s):
        return 0.0
    if now.type is original.type and now.weights:
        sets = {one.id: one for one in now.weights}
        new, old = sets.get(NEW_SET), sets.get(OLD_SET)
        if len(sets) == 2 and new and old and new.values == record.new and old.values == original.values:
            return 100 * new.weight / (new.weight + old.weight)
    raise RecordsChanged(
        f"{now.name} holds {now.text!r}, which is neither the old side's ({' '.join(original.values)}) "
        "nor the "
        f"new side's ({' '.join(record.new)}): see who changed it, put it right, then repeat the step"
    )


def phase_of(record: DnsRecord, original: RecordSet, now: RecordSet, *, waited: bool) -> Phase:
    """Where a name is, by what stands there alone, so that a killed mover knows where it was.

    `waited`: the old TTL is known to have run out since it was lowered. Raises RecordsChanged as `share_of`.
    """
    share = share_of(record, original, now)
    if share:
        own = now.ttl_s >= original.ttl_s > record.ttl_s
        return Phase.SETTLED if share == 100 and own else Phase.SWITCHED
    if now.ttl_s > record.ttl_s:
        return Phase.PLANNED
    return Phase.WAITED if waited else Phase.TTL_LOWERED


# --- time ---------------------------------------------------------------------------------------------------


def may_switch_at(lowered_at: float, old_ttl_s: float) -> float:
    """When no cache that honours TTLs holds the old TTL any more. `lowered_at` is when the *last* of the
    authoritative servers was seen to answer with the low one; a cache may have asked it just before."""
    return lowered_at + old_ttl_s


def gone_at(changed_at: float, ttl_before_s: float) -> float:
    """When the answers from before a change have left all caches that honour TTLs."""
    return changed_at + ttl_before_s


def stale_resolutions(since_s: float, ttl_s: float, *, share_percent: float = 100.0) -> float:
    """The share of caches, 0 to 1, that still answer with the old side so long after a switch.

    For caches that honour the TTL and were filled evenly: their answers run out one by one until `ttl_s`, and
    `share_percent` of those who ask again get the new side.
    """
    left = 1.0 if since_s <= 0 else max(0.0, 1 - since_s / ttl_s) if ttl_s > 0 else 0.0
    return left + (1 - left) * (1 - share_percent / 100)


# --- how a device keeps what it was told --------------------------------------------------------------------


class HonoursTtl(msgspec.Struct, frozen=True, tag="honours-ttl"):
    """As the standard wants it."""

    def keeps_s(self, ttl_s: float) -> float:
        return ttl_s


class IgnoresTtl(msgspec.Struct, frozen=True, tag="ignores-ttl"):
    """A cache in the way (a runtime, a home router, a carrier's resolver) with a minimum of its own."""

    min_s: float

    def keeps_s(self, ttl_s: float) -> float:
        return max(ttl_s, self.min_s)


class PinsFirst(msgspec.Struct, frozen=True, tag="pins-first"):
    """Asks once after power-on and keeps the address for good."""

    def keeps_s(self, ttl_s: float) -> float:
        return math.inf


ResolverModel = HonoursTtl | IgnoresTtl | PinsFirst


def agrees(wanted: RecordSet, answer: RecordSet) -> bool:
    """Whether a server's `answer` is what `wanted` lets it say: of weighted sets it says one."""
    if wanted.weights and not answer.weights:
        return answer.ttl_s == wanted.ttl_s and any(one.values == answer.values for one in wanted.weights)
    return answer == wanted
