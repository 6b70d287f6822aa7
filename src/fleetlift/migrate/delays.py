"""How late messages came, by device: the new side's beside those of the control, or of the same devices."""

from collections.abc import Hashable, Iterable, Mapping, Sequence

from fleetlift.core.figures import spread, time_sample
from fleetlift.core.migration import Basis, Member, MigrationState, Sample, Spread
from fleetlift.core.orders import TelemetryFlag
from fleetlift.core.plan import Rung
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.core.units import format_devices
from fleetlift.migrate.wave import LEAST, QUANTILES, Groups, Wave, moment, standing_flags, summary
from fleetlift.store.pool import Conn

BEFORE_S = 600.0  # of the devices' past, where that is what they are compared with
WINDOW_S = 10.0
_ENOUGH = 20  # messages that make a comparison

Counts = dict[int, int]  # by bucket of core/delays.py


class DelayBook:
    """Counts by device since a measurement began: what lies in windows that are over is read once."""

    def __init__(self) -> None:
        self._of: Hashable = None
        self._sums: dict[tuple[str, str, float], Counts] = {}
        self._upto: dict[tuple[str, str, float], float] = {}

    def begin(self, of: Hashable) -> None:
        """Forget what was read of another measurement."""
        if of != self._of:
            self._of, self._sums, self._upto = of, {}, {}

    async def counts(
        self, conn: Conn, path: str, devices: Sequence[str], since: float, until: float, over_at: float
    ) -> list[Counts]:
        """Of each device that sent anything between the two; windows that began before `over_at` are over."""
        if not devices:
            return []
        since -= since % WINDOW_S
        over_at = min(over_at - over_at % WINDOW_S, until)
        starts = [self._upto.get((path, device, since), since) for device in devices]
        rows = await conn.fetch(
            _COUNTS_SQL,
            devices,
            [moment(start) for start in starts],
            path,
            moment(over_at),
            moment(until),
            moment(min(starts)),
        )
        fresh: dict[str, Counts] = {}
        for row in rows:
            if row["over"]:
                own = self._sums.setdefault((path, row["device"], since), {})
            else:
                own = fresh.setdefault(row["device"], {})
            own[row["bucket"]] = own.get(row["bucket"], 0) + row["n"]
        found = []
        for device, start in zip(devices, starts, strict=True):
            key = (path, device, since)
            self._upto[key] = max(start, over_at)
            total = dict(self._sums.get(key, ()))
            for place, n in fresh.get(device, {}).items():
                total[place] = total.get(place, 0) + n
            if total:
                found.append(total)
        return found


async def measure_delays(
    conn: Conn,
    book: DelayBook,
    wave: Wave,
    groups: Groups,
    state: MigrationState,
    rungs: Sequence[Rung],
    old_path: str,
    *,
    since: float,
    now: float,
    over_at: float,
) -> dict[str, Sample]:
    """`over_at`: what was received before then is in the account."""
    book.begin((state.rung, state.wave, since))
    moved = [m.device for m in groups.moved]

    async def read(path: str, devices: Sequence[str], start: float, end: float) -> list[Counts]:
        return await book.counts(conn, path, devices, start, end, over_at)

    def by_path(members: Iterable[Member], path: str) -> list[str]:
        return [m.device for m in members if _path(m, rungs, old_path) == path]

    new = spread(await read(MQTT_PATH, moved, since, now))
    old, basis, whose = Spread(devices=0, n=0, nn=0, edges_s=(), x=(), xx=(), nx=()), Basis.NONE, ""
    attempts: list[tuple[str, Basis, Mapping[str, Sequence[str]], float, float]] = [
        ("the same devices, same time", Basis.SAME, {old_path: moved}, since, now),
        ("the same devices, before", Basis.SAME, {old_path: moved}, since - BEFORE_S, since),
        (
            "devices still on the old side",
            Basis.DEVICES,
            {old_path: by_path(groups.others, old_path)},
            since - BEFORE_S,
            now,
        ),
    ]
    if len(groups.control) >= LEAST:
        paths = {path: by_path(groups.control, path) for path in (old_path, MQTT_PATH)}
        attempts.insert(
            0, (f"control, {format_devices(len(groups.control))}", Basis.DEVICES, paths, since, now)
        )
    for whose, basis, devices, start, end in attempts:  # noqa: B007 (what served is part of the evidence)
        old = spread([one for path, some in devices.items() for one in await read(path, some, start, end)])
        if old.n >= _ENOUGH:
            break
    told = f"n = {round(new.n):,}, old n = {round(old.n):,} ({whose})"
    if len(groups.moved) < len(wave.moved):
        told += f"; {len(groups.moved):,} of {len(wave.moved):,} devices"
    return {
        f"telemetry.delay.{label}": time_sample(
            q, new, old, basis, over_s=now - since, evidence=summary(told, basis=whose, old_n=round(old.n))
        )
        for label, q in QUANTILES.items()
    }


def _path(member: Member, rungs: Sequence[Rung], old_path: str) -> str:
    """The path that serves a device that stays where it is."""
    return MQTT_PATH if standing_flags(member, rungs).telemetry is TelemetryFlag.NEW else old_path


# By the primary key, window by window: a scan of all that came lately would read the whole fleet.
_COUNTS_SQL = """
SELECT w.device, w.window_start < $4 AS over, (u.place - 1)::int AS bucket, sum(u.n)::bigint AS n
FROM generate_series($6::timestamptz, $5::timestamptz, interval '10 s') AS t(at)
JOIN unnest($1::text[], $2::timestamptz[]) AS d(device, since) ON d.since <= t.at
JOIN receipt_window w ON w.window_start = t.at AND w.path = $3 AND w.device = d.device
CROSS JOIN LATERAL unnest(w.delay_counts) WITH ORDINALITY u(n, place)
WHERE u.n > 0 GROUP BY 1, 2, 3
"""
