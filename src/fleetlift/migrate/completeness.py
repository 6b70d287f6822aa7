"""Completeness: of the messages that moved devices have numbered, how many the new side has. A count."""

from collections import deque
from collections.abc import Mapping

import msgspec

from fleetlift.core.migration import Sample
from fleetlift.core.orders import TRY_CHANNEL, TelemetryFlag
from fleetlift.core.plan import Rung
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.migrate.wave import EXAMPLES, Wave, summary
from fleetlift.store.pool import Conn, Pool

Top = dict[tuple[str, str], int]  # the highest seq known of each (device, channel)


class Tops:
    """The highest seq of each channel as it was a while ago: what may still be on its way is not missing."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, Top]] = deque()

    def add(self, at: float, top: Top, grace_s: float) -> None:
        """Remember `top`. Keeps about five moments of the grace and the newest one that is older."""
        if self._history and at - self._history[-1][0] < grace_s / 5:
            return
        self._history.append((at, top))
        while len(self._history) > 1 and self._history[1][0] <= at - grace_s:
            self._history.popleft()

    def before(self, at: float) -> Top:
        """The newest that was known at `at`; empty when nothing is remembered of then."""
        known: Top = {}
        for then, top in self._history:
            if then > at:
                break
            known = top
        return known


class Completeness:
    """The account of one migration's waves. Holds only a short memory of sequence numbers."""

    def __init__(self, name: str, *, backend: Pool, engine: Pool, old_path: str) -> None:
        self._name = name
        self._backend = backend
        self._engine = engine
        self._old_path = old_path
        self._tops = Tops()
        self._baselines: dict[str, tuple[int, dict[str, int]]] = {}  # device: (epoch, top by channel)
        self._moved_tops: dict[tuple[str, int], dict[str, int]] = {}  # (device, epoch): top by channel

    async def note_baselines(self, epochs: Mapping[str, int]) -> None:
        """Keep, before devices are told, up to which seq the new side has each channel already.

        A device that comes back to the new side has left numbers out there on purpose; only what it numbers
        from now on counts. The first note of an epoch stays.
        """
        wanted = {d: e for d, e in epochs.items() if self._baselines.get(d, (-1,))[0] < e}
        if not wanted:
            return
        async with self._engine.acquire() as conn:
            rows = await conn.fetch(
                "SELECT device, epoch, seqs::text AS seqs FROM engine.baseline "
                "WHERE migration = $1 AND device = ANY($2::text[])",
                self._name,
                list(wanted),
            )
        for row in rows:
            self._baselines[row["device"]] = (row["epoch"], msgspec.json.decode(row["seqs"]))
        wanted = {d: e for d, e in wanted.items() if self._baselines.get(d, (-1,))[0] < e}
        if not wanted:
            return
        seqs: dict[str, dict[str, int]] = {device: {} for device in wanted}
        async with self._backend.acquire() as conn:
            for row in await conn.fetch(
                "SELECT device, channel, upper(ranges) - 1 AS top FROM ledger "
                "WHERE path = $1 AND device = ANY($2::text[]) AND NOT isempty(ranges)",
                MQTT_PATH,
                list(wanted),
            ):
                seqs[row["device"]][row["channel"]] = row["top"]
        async with self._engine.acquire() as conn:
            await conn.execute(
                "INSERT INTO engine.baseline AS b (migration, device, epoch, seqs) "
                "SELECT $1, device, epoch, seqs::jsonb "
                "FROM unnest($2::text[], $3::bigint[], $4::text[]) t(device, epoch, seqs) "
                "ON CONFLICT (migration, device) DO UPDATE SET epoch = excluded.epoch, seqs = excluded.seqs "
                "WHERE b.epoch < excluded.epoch",
                self._name,
                list(wanted),
                list(wanted.values()),
                [msgspec.json.encode(seqs[d]).decode() for d in wanted],
            )
        for device, epoch in wanted.items():
            self._baselines[device] = (epoch, seqs[device])

    async def measure(self, conn: Conn, wave: Wave, rung: Rung, now: float) -> dict[str, Sample]:
        name = "telemetry.completeness"
        if not wave.moved or rung.flags.telemetry is TelemetryFlag.OLD:
            return {name: Sample(value=None, evidence=summary("no device of the wave has moved"))}
        await self.note_baselines({m.device: m.epoch for m in wave.moved})
        top: Top = {}
        settled: Top = {}
        heard_at = 0.0
        told_at = {m.device: m.told_at or now for m in wave.moved}
        anew: set[tuple[str, str]] = set()  # channels whose count began anew since their device was told
        unbroken: dict[tuple[str, str], tuple[int, int]] = {}  # what the new side has, from and to before
        for device, channel, last, last_at, anew_at, lower, upper in await conn.fetch(
            _TOPS_SQL, list(told_at), TRY_CHANNEL, [MQTT_PATH, self._old_path], MQTT_PATH
        ):
            key = (device, channel)
            top[key] = last
            heard_at = max(heard_at, last_at)
            if anew_at is not None and anew_at > told_at[device]:
                anew.add(key)
            if last_at <= now - rung.grace_s:
                settled[key] = last
            if lower is not None and upper is not None:
                unbroken[key] = lower, upper
        if top and now - heard_at > rung.silent_after_s:
            # What came before says nothing of the time since: a wave that sends nothing is not complete.
            silent = f"nothing has come from the wave for {now - heard_at:.0f} s"
            return {name: Sample(value=None, evidence=summary(silent))}
        epochs = {m.device: m.epoch for m in wave.moved}
        fresh = {device for device, epoch in epochs.items() if (device, epoch) not in self._moved_tops}
        for device in fresh:
            self._moved_tops[device, epochs[device]] = {}
        for (device, channel), seq in top.items() if fresh else ():
            if device in fresh:
                self._moved_tops[device, epochs[device]][channel] = seq
        self._tops.add(now, top, rung.grace_s)
        upto = {**self._tops.before(now - rung.grace_s), **settled}
        # A count that began anew has left its former heights.
        upto = {key: min(seq, top[key]) for key, seq in upto.items() if key in top}
        expected, missing, devices = 0, 0, 0
        keys, after = [], []
        for key, hi in upto.items():
            if key[0] not in epochs:
                continue
            # Where the count began anew, what the new side has of it is expected from its first number there.
            lo = None if key in anew else self._baselines.get(key[0], (0, {}))[1].get(key[1])
            lower, upper = unbroken.get(key, (0, 0))
            first = lower if lo is None else max(lower, lo + 1)
            if first < upper and hi < upper:  # as it is nearly everywhere: nothing is missing
                expected += max(0, hi - first + 1)
            else:
                keys.append(key)
                after.append(lo)
        rows = []
        if keys:
            moved = (self._moved_tops[key[0], epochs[key[0]]].get(key[1], -1) for key in keys)
            rows = await conn.fetch(
                _MISSING_SQL,
                [device for device, _ in keys],
                [channel for _, channel in keys],
                after,
                [upto[key] if key in anew else base for key, base in zip(keys, moved, strict=True)],
                [upto[key] for key in keys],
                MQTT_PATH,
                EXAMPLES,
            )
        if rows:
            expected += rows[0]["all_expected"]
            missing, devices = rows[0]["all_missing"], rows[0]["all_devices"]
        if not expected:
            return {name: Sample(value=None, evidence=summary("no numbered message is old enough to judge"))}
        noun = "device" if devices == 1 else "devices"
        return {
            name: Sample(
                value=100.0 * (expected - missing) / expected,
                n=expected,
                evidence=summary(
                    f"{missing:,} of {expected:,} missing" + (f", {devices:,} {noun}" if missing else ""),
                    expected=expected,
                    missing=missing,
                    devices=devices,
                    examples=[
                        {
                            "device": row["device"],
                            "channel": row["channel"],
                            "missing": row["missing"],
                            "of": row["expected"],
                            "gaps": row["gaps"],
                        }
                        for row in rows
                        if row["missing"]
                    ],
                ),
            )
        }


# Of each (device, channel): the highest number known, when anything came last, since when the count is
# another one, and the bounds of what the new side has, where that is without a gap.
_TOPS_SQL = """
SELECT device, channel, max(upper(ranges)) - 1, extract(epoch FROM max(last_at))::float8,
       extract(epoch FROM max(began_at) FILTER (WHERE restarts > 0))::float8,
       max(lower(ranges)) FILTER (WHERE path = $4 AND ranges = range_merge(ranges)::int8multirange),
       max(upper(ranges)) FILTER (WHERE path = $4 AND ranges = range_merge(ranges)::int8multirange)
FROM ledger
WHERE device = ANY($1::text[]) AND channel <> $2 AND path = ANY($3::text[]) AND NOT isempty(ranges)
GROUP BY device, channel
"""

# Of each (device, channel): what lies between the first seq that the new side has seen since the baseline
# `lo` (or, where it has seen none, the first one after `base`) and `hi`, less what the new side has.
_MISSING_SQL = """
WITH u AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
        AS u(device, channel, lo, base, hi)),
g AS (
    SELECT u.*, coalesce(m.ranges, '{}'::int8multirange)
        * int8multirange(int8range(CASE WHEN u.lo IS NULL THEN NULL ELSE u.lo + 1 END, NULL)) AS got
    FROM u LEFT JOIN ledger m ON m.device = u.device AND m.channel = u.channel AND m.path = $6),
f AS (SELECT g.*, coalesce(lower(g.got), g.base + 1) AS first FROM g),
x AS (
    SELECT device, channel, hi - first + 1 AS expected, int8multirange(int8range(first, hi + 1)) - got AS miss
    FROM f WHERE first <= hi),
y AS (
    SELECT x.*, (SELECT coalesce(sum(upper(r) - lower(r)), 0)::bigint FROM unnest(miss) r) AS missing FROM x),
z AS (
    SELECT sum(expected)::bigint AS all_expected, sum(missing)::bigint AS all_missing,
           count(DISTINCT device) FILTER (WHERE missing > 0) AS all_devices FROM y)
SELECT y.device, y.channel, y.expected, y.missing, left(y.miss::text, 200) AS gaps, z.*
FROM y CROSS JOIN z ORDER BY y.missing DESC, y.device, y.channel LIMIT $7
"""
