"""Which devices a wave raises: a fixed order of the fleet, of which each wave takes a longer beginning.

The order is set when a device is first seen and kept for good: named canaries first, then by a hash of
migration and device, so that a small wave is an even sample and not the oldest devices. Devices that join
later go to the end. So no device leaves a wave because percentages or the fleet have changed.

A plan may keep a control: the last devices of the order, equally chosen, are left for the last wave of each
rung.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from fleetlift.core.units import Share


def ordered(migration: str, canaries: Sequence[str], devices: Iterable[str]) -> tuple[str, ...]:
    """`devices`, each once: canaries in the plan's order, then the others as the hash has it."""
    there = set(devices)
    first = [device for device in dict.fromkeys(canaries) if device in there]
    rest = sorted(there.difference(first), key=lambda device: (_key(migration, device), device))
    return (*first, *rest)


def newcomers(
    migration: str, canaries: Sequence[str], ranks: Mapping[str, int], devices: Iterable[str]
) -> dict[str, int]:
    """Ranks for those of `devices` that have none in `ranks` yet: after all others, in their own order."""
    start = max(ranks.values(), default=-1) + 1
    fresh = ordered(migration, canaries, (device for device in devices if device not in ranks))
    return {device: start + place for place, device in enumerate(fresh)}


def approved(shares: Sequence[Share], total: int, *, control: Share | None = None, last: bool = True) -> int:
    """How many of `total` devices may stand on a rung when its wave opens.

    `shares` are the wave's own and the last of each lower rung: no step goes further than those before it.
    Only the `last` wave of a rung takes the control as well.
    """
    most = min(share.of(total) for share in shares)
    return most if last or control is None else min(most, total - control.of(total))


def chosen(candidates: Iterable[tuple[int, str]], raised: int, limit: int) -> tuple[str, ...]:
    """The devices a wave raises: the first `candidates` (rank, device), until `limit` stand on the rung."""
    room = max(0, limit - raised)
    return tuple(device for _, device in sorted(candidates)[:room])


def _key(migration: str, device: str) -> bytes:
    return blake2b(f"{migration}\0{device}".encode(), digest_size=16).digest()
