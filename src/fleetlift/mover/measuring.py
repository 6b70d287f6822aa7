"""What the gates of `switch: dns` ask: who is silent since the names went over, and what is missing.

Devices of a tenant's move run firmware that nobody can change: what is known of them is what the new side has
received and who is connected, and who comes to the relay at the old address.
"""

import time
from collections.abc import Mapping
from typing import Final

from fleetlift.core.errors import FleetError
from fleetlift.core.migration import Phase, Sample
from fleetlift.core.orders import TRY_CHANNEL
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.core.tenant.move import MoveState
from fleetlift.core.tenant.plan import POOL, SwitchDns
from fleetlift.core.units import format_devices, format_some
from fleetlift.mover.move import Move
from fleetlift.mover.naming import relay_of
from fleetlift.mover.numbers import Before, numbers_before
from fleetlift.store.pool import Pool

LOOK_EVERY_S: Final = 1.0
GRACE_S: Final = 10.0  # a number may be on its way so long before it counts as missing
SHOWN: Final = 5


class Measures:
    """Measurements of one move. Remembers since when each gap has been there."""

    def __init__(self) -> None:
        self._gaps: dict[tuple[str, str, str], float] = {}

    async def measure(self, move: Move, step: SwitchDns, wave: int) -> Mapping[str, Sample]:
        """A sample for each of the step's gates, by its text, of the devices whose names it switches."""
        now = time.time()
        pool = step.waves[wave] == POOL and move.plan.rehearsal is not None
        tenant = move.plan.rehearsal.tenant if pool and move.plan.rehearsal else move.plan.tenant
        found: dict[str, Sample] = {}
        for gate in step.gates:
            match gate.metric:
                case "devices.silent":
                    found[gate.text] = await self._silent(move, step, tenant, now)
                case "telemetry.completeness":
                    found[gate.text] = await self._complete(
                        move, tenant, await numbers_before(move, move.state.step), now
                    )
        return found

    async def _silent(self, move: Move, step: SwitchDns, tenant: str, now: float) -> Sample:
        """Devices that were heard since the move began, on either side, and not for `silent_after`."""
        on_new = await last_on_new(move.backend, tenant)
        heard = dict(on_new)
        try:
            if (relay := relay_of(move)) is not None:
                async with relay:
                    for one in await relay.stragglers():
                        if one.client in on_new:
                            last = now if one.open_old or one.open_new else one.last_seen
                            heard[one.client] = max(heard[one.client], last)
        except FleetError as error:  # who comes there is not known, so nobody can be said to be silent
            return Sample(value=None, evidence={"summary": str(error)})
        began = move.state.steps[0].started_at or 0.0
        known = {device: last for device, last in heard.items() if last > began}
        if not known:
            return Sample(
                value=None, evidence={"summary": f"no device of {tenant} was heard since the move began"}
            )
        silent = sorted(device for device, last in known.items() if now - last > step.silent_after_s)
        who = f": {format_some(silent, SHOWN)}" if silent else ""
        return Sample(
            value=float(len(silent)),
            n=len(known),
            evidence={"summary": f"{format_devices(len(silent))} of {len(known):,} silent{who}"},
        )

    async def _complete(self, move: Move, tenant: str, before: Before, now: float) -> Sample:
        """Of the numbers between the first and the last that the new side has of each channel since the names
        went over: its share."""
        rows = await move.backend.fetch(
            _GAPS_SQL, tenant, TRY_CHANNEL, MQTT_PATH, before.devices, before.channels, before.upto
        )
        expected = sum(row["expected"] for row in rows)
        if not expected:
            return Sample(
                value=None, evidence={"summary": f"nothing with a number has come from {tenant} yet"}
            )
        gaps = {
            (row["device"], row["channel"], gap): row["sizes"][n]
            for row in rows
            for n, gap in enumerate(row["gaps"])
        }
        self._gaps = {key: self._gaps.get(key, now) for key in gaps}
        missing = sum(size for key, size in gaps.items() if now - self._gaps[key] > GRACE_S)
        devices = sorted({key[0] for key in gaps if now - self._gaps[key] > GRACE_S})
        who = f": {format_some(devices, SHOWN)}" if devices else ""
        return Sample(
            value=100.0 * (expected - missing) / expected,
            n=expected,
            evidence={"summary": f"{missing:,} of {expected:,} missing{who}", "missing": missing},
        )


async def last_on_new(backend: Pool, tenant: str) -> dict[str, float]:
    """When each of the tenant's devices was last seen here, Unix seconds; 0: never. Who is connected is seen
    now."""
    rows = await backend.fetch(_LAST_SQL, tenant)
    return {row["id"]: float(row["last"]) for row in rows}


async def on_line(backend: Pool, tenant: str) -> tuple[int, int]:
    """How many of the tenant's devices are connected here, and how many messages they have sent."""
    row = await backend.fetchrow(_ON_LINE_SQL, tenant)
    return (0, 0) if row is None else (row["devices"], row["received"])


_LAST_SQL = """
SELECT d.id, greatest(
    coalesce(extract(epoch FROM max(l.last_at)), 0),
    coalesce(extract(epoch FROM max(CASE WHEN p.connected THEN now() ELSE p.since END)), 0))::float8 AS last
FROM device d
LEFT JOIN ledger l ON l.device = d.id AND l.path = 'mqtt'
LEFT JOIN presence p ON p.device = d.id
WHERE d.tenant = $1 GROUP BY d.id
"""

_ON_LINE_SQL = """
SELECT count(*) FILTER (WHERE p.connected)::int AS devices,
    coalesce(sum((SELECT sum(received) FROM ledger l WHERE l.device = d.id AND l.path = 'mqtt')), 0)::bigint
        AS received
FROM device d LEFT JOIN presence p ON p.device = d.id WHERE d.tenant = $1
"""

_GAPS_SQL = """
SELECT device, channel, upper(ranges) - lower(ranges) AS expected,
    array(SELECT gap::text FROM unnest(range_merge(ranges)::int8multirange - ranges) gap LIMIT 1000) AS gaps,
    array(SELECT upper(gap) - lower(gap)
          FROM unnest(range_merge(ranges)::int8multirange - ranges) gap LIMIT 1000) AS sizes
FROM (
    SELECT l.device, l.channel,
        CASE WHEN b.upto IS NULL THEN l.ranges
             ELSE l.ranges * int8multirange(int8range(b.upto, NULL)) END AS ranges
    FROM ledger l JOIN device d ON d.id = l.device
    LEFT JOIN unnest($4::text[], $5::text[], $6::bigint[]) AS b (device, channel, upto)
        ON b.device = l.device AND b.channel = l.channel
    WHERE d.tenant = $1 AND l.channel <> $2 AND l.path = $3
) since
WHERE NOT isempty(ranges)
"""


class Counts:
    """Who comes where, for the timeline; asked once a second."""

    def __init__(self) -> None:
        self._at = 0.0
        self._received: tuple[float, int] | None = None
        self._shown: dict[str, float | int | None] = {}

    async def look(self, move: Move, state: MoveState) -> None:
        """Count, from the moment on when names can be switched."""
        now = time.monotonic()
        if now - self._at < LOOK_EVERY_S or state.phase in (Phase.REVERTED, Phase.RELEASED):
            return
        self._at = now
        at_new, received = await on_line(move.backend, move.plan.tenant)
        before, self._received = self._received, (now, received)
        rate = None if before is None else max(0, received - before[1]) / (now - before[0])
        at_old: int | None = None
        try:
            if (relay := relay_of(move)) is not None:
                async with relay:
                    own = await last_on_new(move.backend, move.plan.tenant)
                    at_old = sum(
                        1
                        for one in await relay.stragglers()
                        if one.client in own and one.open_old + one.open_new
                    )
        except FleetError:
            at_old = None
        self._shown = {"at_old": at_old, "at_new": at_new, "rate_new": rate}

    def shown(self) -> dict[str, float | int | None]:
        return self._shown
