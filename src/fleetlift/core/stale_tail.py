"""Who still comes to the old address, why, for how long yet, and whether the old side may be released.

A switch of DNS leaves a tail: caches that ignore TTLs, firmware that pins an address, connections that are
older than the switch, devices that sleep for a month. The old side is not released while a share of the fleet
of `epsilon` or more still comes, nor while a device has been seen on neither side since the switch, unless a
person has signed it off by name. What was not measured counts against the release.
"""

import math
from collections.abc import Mapping, Sequence, Set
from enum import StrEnum
from typing import Final

import msgspec

from fleetlift.core.units import format_devices, format_duration, format_some

MEASURED_WITHIN_S: Final = 60.0  # an older look at the old address does not count as measured
SHOWN: Final = 5


class Reason(StrEnum):
    """Why a device is likely to come to the old address still."""

    NOT_SWITCHED = "the name is not switched yet"
    LONG_LIVED = "a connection from before the switch"
    CACHED = "DNS answer cached within its TTL"
    IGNORES_TTL = "a cache that ignores the TTL"
    PINNED = "pinned address"


def reason(
    *, first_seen: float, last_opened: float, open_now: int, switched_at: float | None, ttl_s: float
) -> Reason:
    """The likely reason, from when a device last opened a connection to the old address.

    `ttl_s` is the TTL that stood at the switch. A device that still opens connections a day and ten TTLs
    later asks nobody any more.
    """
    if switched_at is None:
        return Reason.NOT_SWITCHED
    if last_opened < switched_at:
        return Reason.LONG_LIVED if open_now else Reason.CACHED
    after = last_opened - switched_at
    if after <= ttl_s:
        return Reason.CACHED
    if after > max(10 * ttl_s, 86_400.0) or first_seen > switched_at + max(10 * ttl_s, 86_400.0):
        return Reason.PINNED
    return Reason.IGNORES_TTL


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a fleet since its names were switched. Times are Unix seconds.

    `on_old` and `on_new`: when each device was last seen at the old address and on the new side, whichever
    way it came there. `strangers`: when each client of the old address was last seen that is no device of the
    fleet by name.
    """

    devices: Set[str]
    on_old: Mapping[str, float]
    on_new: Mapping[str, float]
    strangers: Mapping[str, float] = {}
    switched_at: float | None  # wholly, by the last name
    ttl_s: float  # that stood at the switch
    measured_from: float | None  # since when the old address is watched without a gap
    measured_until: float | None
    forgotten: int = 0  # clients that the relay had no room to remember


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the old side may go. `stale` and `never_seen` name what would break if it went now."""

    allowed: bool
    stale_share: float  # 0 to 1
    stale: tuple[str, ...]
    never_seen: tuple[str, ...]
    signed_off: tuple[str, ...]  # of those never seen
    reasons: tuple[str, ...]  # why not; empty when allowed
    not_before: float | None  # when the window ends at the earliest; None before the switch


def may_release(
    tail: Tail, *, now: float, epsilon: float, longest_sleep_s: float, signed_off: Set[str] = frozenset()
) -> Release:
    """Whether the old address may be given up, and who holds it up.

    The window in which a device counts as stale is the longer of TTL and `longest_sleep_s`: whoever comes to
    the old address within it will come again. A device that has a sign-off is not missed when it was never
    seen; one that still comes is stale all the same.
    """
    window_s = max(tail.ttl_s, longest_sleep_s)
    since = now - window_s
    stale = sorted(
        device
        for device in tail.devices
        # That it was on the new side since is no proof: the relay leads it there from the old address.
        if tail.on_old.get(device, -math.inf) > since
    )
    strangers = sorted(client for client, last in tail.strangers.items() if last > since)
    switched_at = tail.switched_at
    seen_since = {
        device
        for seen in (tail.on_old, tail.on_new)
        for device, last in seen.items()
        if switched_at is not None and last >= switched_at
    }
    missing = sorted(tail.devices - seen_since)
    never_seen = tuple(device for device in missing if device not in signed_off)
    total = len(tail.devices) + len(strangers)
    share = (len(stale) + len(strangers)) / total if total else 0.0

    reasons = []
    if not tail.devices:
        reasons.append("no device of the fleet is known, so nothing can be said of it")
    if not 0 < epsilon <= 1:
        reasons.append(f"the share that may be left behind is {epsilon:g}: give more than 0, at most 1")
    elif share >= epsilon:
        names = format_some([*stale, *strangers], SHOWN)
        reasons.append(f"{share:.2%} still come to the old address (allowed: below {epsilon:.2%}): {names}")
    if never_seen:
        names = format_some(never_seen, SHOWN)
        count = format_devices(len(never_seen))
        reasons.append(f"{count} not seen on either side since the switch and not signed off: {names}")
    if tail.forgotten:
        reasons.append(f"{tail.forgotten} clients of the old address were not remembered for want of room")
    not_before = None
    if switched_at is None:
        reasons.append("the names are not switched wholly")
    else:
        began = max(switched_at, math.inf if tail.measured_from is None else tail.measured_from)
        not_before = None if math.isinf(began) else began + window_s
        if not_before is None:
            reasons.append("the old address was never watched: let the relay stand there")
        elif now < not_before:
            left = format_duration(math.ceil(not_before - now))
            reasons.append(f"the old address must be watched for {left} more (longest sleep, or TTL)")
        if tail.measured_until is None or now - tail.measured_until > MEASURED_WITHIN_S:
            reasons.append("the old address is not watched now: start the relay there")
    return Release(
        allowed=not reasons,
        stale_share=share,
        stale=(*stale, *strangers),
        never_seen=never_seen,
        signed_off=tuple(device for device in missing if device in signed_off),
        reasons=tuple(reasons),
        not_before=not_before,
    )


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When the stale share falls below what is allowed. `at` None: it does not fall, or too little is
    known."""

    at: float | None
    half_life_s: float | None
    floor: float  # the share that no wait removes: pinned addresses


def forecast(
    samples: Sequence[tuple[float, float]], *, epsilon: float, floor: float = 0.0, not_before: float = 0.0
) -> Forecast:
    """When a tail that dies out evenly is below `epsilon`, from (time, stale share) samples.

    Fits an exponential to what is above `floor`, the share of those who pin the address and never leave by
    themselves. With a floor of epsilon or more there is no such time: those have to be called by name.
    """
    above = [(at, math.log(share - floor)) for at, share in samples if share - floor > 1e-9]
    if floor >= epsilon:
        return Forecast(at=None, half_life_s=None, floor=floor)
    if samples and samples[-1][1] < epsilon:
        return Forecast(at=max(samples[-1][0], not_before), half_life_s=None, floor=floor)
    if len(above) < 3:
        return Forecast(at=None, half_life_s=None, floor=floor)
    mid_at = sum(at for at, _ in above) / len(above)
    mid = sum(value for _, value in above) / len(above)
    spread = sum((at - mid_at) ** 2 for at, _ in above)
    slope = sum((at - mid_at) * (value - mid) for at, value in above) / spread if spread else 0.0
    if slope >= -1e-12:
        return Forecast(at=None, half_life_s=None, floor=floor)
    at = mid_at + (math.log(epsilon - floor) - mid) / slope
    return Forecast(at=max(at, samples[-1][0], not_before), half_life_s=-math.log(2) / slope, floor=floor)
