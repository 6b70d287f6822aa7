"""How often devices connect anew: who keeps coming and going, and the rate beside that of the control."""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from fleetlift.core.figures import arm, rate_sample
from fleetlift.core.migration import Arm, Basis, Member, Sample
from fleetlift.core.orders import TelemetryFlag
from fleetlift.core.plan import Rung
from fleetlift.core.units import format_devices
from fleetlift.migrate.wave import EXAMPLES, LEAST, Groups, Wave, moment, standing_flags, summary
from fleetlift.store.pool import Conn

FLAP_SPAN_S = 300.0
FLAP_CONNECTS = 3
_REMEMBERED = 500_000  # connections to the old side
_HOUR_S = 3600.0


class OldConnects:
    """The connections to the old side that its feed has told of since `since`. Memory only."""

    def __init__(self, since: float | None = None) -> None:
        self.since = time.time() if since is None else since
        self._seen: deque[tuple[float, str]] = deque()

    def add(self, device: str, at: float) -> None:
        self._seen.append((at, device))
        if len(self._seen) > _REMEMBERED:
            self.since = max(self.since, self._seen.popleft()[0])

    def counts(self, devices: Collection[str], since: float) -> Mapping[str, int]:
        found = dict.fromkeys(devices, 0)
        for at, device in self._seen:
            if at >= since and device in found:
                found[device] += 1
        return found


async def measure_flapping(conn: Conn, wave: Wave, since: float, now: float) -> Sample:
    rows = await conn.fetch(
        "SELECT e.device, count(*) AS connects FROM presence_event e "
        "JOIN unnest($1::text[], $2::timestamptz[]) d(device, since) ON d.device = e.device "
        "WHERE e.connected AND e.at >= $3 AND e.at >= d.since "
        "GROUP BY e.device HAVING count(*) >= $4 ORDER BY 2 DESC",
        [m.device for m in wave.moved],
        [moment(m.moved_at or since) for m in wave.moved],
        moment(max(since, now - FLAP_SPAN_S)),
        FLAP_CONNECTS,
    )
    moved = len(wave.moved)
    return Sample(
        value=float(len(rows)) if moved else None,
        n=moved,
        evidence=summary(
            f"{len(rows):,} of {moved:,} devices",
            examples=[{"device": row["device"], "connects": row["connects"]} for row in rows[:EXAMPLES]],
        ),
    )


async def measure_rate(
    conn: Conn,
    wave: Wave,
    groups: Groups,
    rungs: Sequence[Rung],
    old_connects: OldConnects | None,
    since: float,
    now: float,
) -> Sample:
    """Connections an hour: of moved devices to the new side, of the control to the side that serves it."""
    begins = {m.device: max(since, m.moved_at or since) for m in wave.moved}
    new = await _new_side(conn, begins, now)
    old, basis, whose = None, Basis.NONE, "nobody to compare with"
    if len(groups.control) >= LEAST:
        there = {m.device: since for m in groups.control if _has_new_link(m, rungs)}
        if len(there) >= LEAST:
            old = await _new_side(conn, there, now)
        elif old_connects is not None:
            start = max(since, old_connects.since)
            counted = old_connects.counts([m.device for m in groups.control], start)
            hours = max(now - start, 0.0) / _HOUR_S
            old = arm((hours, n) for n in counted.values())
        basis, whose = Basis.DEVICES, f"control, {format_devices(len(groups.control))}"
    hours_all = f"{new.x:,.0f} in {new.n:,.1f} device-hours; {whose}"
    return rate_sample(new, old, basis, over_s=now - since, evidence=summary(hours_all, basis=whose))


def _has_new_link(member: Member, rungs: Sequence[Rung]) -> bool:
    return standing_flags(member, rungs).telemetry is not TelemetryFlag.OLD


async def _new_side(conn: Conn, begins: Mapping[str, float], now: float) -> Arm:
    rows = await conn.fetch(
        "SELECT e.device, count(*) AS connects FROM presence_event e "
        "JOIN unnest($1::text[], $2::timestamptz[]) d(device, since) ON d.device = e.device "
        "WHERE e.connected AND e.at >= $3 AND e.at > d.since GROUP BY e.device",
        list(begins),
        [moment(at) for at in begins.values()],
        moment(min(begins.values(), default=now)),
    )
    found = {row["device"]: row["connects"] for row in rows}
    return arm(((now - at) / _HOUR_S, found.get(device, 0)) for device, at in begins.items())
