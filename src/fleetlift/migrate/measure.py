"""Measurements for gates, by SQL from ledger, receipt windows, commands and presence.

A measurement is of the open wave: the devices that it raised, since they have moved. What is still on its way
(younger than the rung's grace or command timeout) counts neither for nor against. Every sample carries the
evidence it was computed from; what cannot be measured has no value, and a gate never passes on that.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from fleetlift.core.command import uuid7
from fleetlift.core.decide import OWN_METRICS
from fleetlift.core.delays import quantile
from fleetlift.core.errors import FleetError
from fleetlift.core.gates import Gate, Source
from fleetlift.core.migration import (
    MigrationState,
    Sample,
)
from fleetlift.core.orders import (
    PROBE_COMMAND,
    TRY_CHANNEL,
    TelemetryFlag,
)
from fleetlift.core.plan import Rung
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.log import get_logger
from fleetlift.migrate.command_outcomes import measure_commands
from fleetlift.migrate.free_queries import free_sql, prometheus
from fleetlift.migrate.wave import EXAMPLES, QUANTILES, Wave, moment, open_wave, standing_flags, summary
from fleetlift.store.pool import Conn, Pool

log = get_logger(__name__)

DELAY_SPAN_S = 600.0  # delays and comparisons look back at most so far: a long bake stays cheap to measure
FLAP_SPAN_S = 300.0
FLAP_CONNECTS = 3
FRESH_S = 2.0  # the account of telemetry is written at least every second

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


class LogEnds:
    """Where the log ended a while ago: a reader that has not come so far shows figures of the past."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, datetime, int]] = deque()

    def add(self, at: float, created: datetime, last: int, within_s: float) -> None:
        """Remember the end of the log. What was noted before a longer pause proves nothing any more."""
        history = self._history
        if history and (at - history[-1][0] > within_s or history[-1][1] != created):
            history.clear()
        history.append((at, created, last))
        while len(history) > 1 and history[1][0] <= at - within_s:
            history.popleft()

    def reached(self, created: datetime, seq: int) -> bool:
        """Whether a reader at this position has all that was in the log `within_s` ago."""
        return bool(self._history) and created == self._history[0][1] and seq >= self._history[0][2]


class Measurer:
    """Measures one migration's gates. Holds only a short memory of sequence numbers."""

    def __init__(
        self,
        name: str,
        *,
        backend: Pool,
        engine: Pool,
        old_path: str,
        log_end: Callable[[], Awaitable[tuple[datetime, int]]] | None = None,
        feed_behind: Callable[[float], str] = lambda within_s: "",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log_end` tells the log's time of creation and last number; `feed_behind(within_s)` why the old
        side's feed does not show what was sent up to so long ago, or ""."""
        self._name = name
        self._backend = backend
        self._engine = engine
        self._old_path = old_path
        self._monotonic = monotonic
        self._log_end = log_end
        self._feed_behind = feed_behind
        self._ends = LogEnds()
        self._tops = Tops()
        self._baselines: dict[str, tuple[int, dict[str, int]]] = {}  # device: (epoch, top by channel)
        self._moved_tops: dict[tuple[str, int], dict[str, int]] = {}  # (device, epoch): top by channel
        self._cached: tuple[object, float, dict[str, Sample]] | None = None

    # -- where the new side's account begins -------------------------------------------------------------

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

    # -- all gates of a rung -----------------------------------------------------------------------------

    async def samples(
        self,
        gates: Iterable[Gate],
        state: MigrationState,
        rungs: Sequence[Rung],
        now: float,
    ) -> dict[str, Sample]:
        """One sample a gate, by the gate's text. What could not be measured has no value and says why.

        The figures of a large fleet are reused until they are four times as old as they took to compute.
        """
        key = (state.rung, state.wave, state.wave_phase, state.measured_from, len(open_wave(state).moved))
        if self._cached is not None and self._cached[0] == key and self._monotonic() < self._cached[1]:
            return self._cached[2]
        started = self._monotonic()
        result = await self._samples(tuple(gates), state, rungs, now)
        took = self._monotonic() - started
        self._cached = (key, started + (5 * took if took > 0.2 else 0.0), result)
        return result

    async def _samples(
        self,
        gates: Sequence[Gate],
        state: MigrationState,
        rungs: Sequence[Rung],
        now: float,
    ) -> dict[str, Sample]:
        wave = open_wave(state)
        rung = rungs[min(state.rung, len(rungs) - 1)]
        since = state.measured_from or state.wave_opened_at or now
        metrics = {gate.metric for gate in gates if gate.source is Source.METRIC}
        found: dict[str, Sample] = {}
        groups: list[tuple[str, Callable[[Conn], Any]]] = [
            ("telemetry.completeness", lambda c: self._completeness(c, wave, rung, now)),
            ("telemetry.delay", lambda c: self._delays(c, wave, state, rungs, since, now)),
            ("commands.", lambda c: measure_commands(c, wave, state, rungs, rung, since, now)),
            ("connections.", lambda c: self._flapping(c, wave, since, now)),
        ]
        for prefix, measure in groups:
            wanted = [m for m in metrics if m.startswith(prefix)]
            if not wanted:
                continue
            try:
                async with self._backend.acquire() as conn:
                    stale = await self._stale(conn, rung, now) if prefix.startswith("telemetry.") else ""
                    if stale:
                        found.update({m: Sample(value=None, evidence=summary(stale)) for m in wanted})
                    else:
                        found.update(await measure(conn))
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("measurement_failed", migration=self._name, metric=prefix, error=str(error))
                for metric in wanted:
                    found[metric] = Sample(
                        value=None, evidence=summary(f"not measured: {type(error).__name__}")
                    )
        samples: dict[str, Sample] = {}
        for gate in gates:
            match gate.source:
                case Source.METRIC:
                    # Metrics of members and observations are computed where these are: by the decision.
                    if gate.metric not in OWN_METRICS:
                        samples[gate.text] = found.get(gate.metric, Sample(value=None))
                case Source.SQL:
                    samples[gate.text] = await free_sql(self._backend, gate.query)
                case Source.PROMETHEUS:
                    samples[gate.text] = await prometheus(gate.url, gate.query)
        return samples

    # -- telemetry ---------------------------------------------------------------------------------------

    async def _stale(self, conn: Conn, rung: Rung, now: float) -> str:
        """Why the account of telemetry tells of the past, or "" when it is at most the grace behind."""
        within_s = max(rung.grace_s, FRESH_S)
        if self._log_end is not None:
            try:
                self._ends.add(now, *await self._log_end(), within_s)
            except FleetError as error:
                return f"the end of the log is not known: {error}"
            row = await conn.fetchrow("SELECT stream_created, seq FROM log_position WHERE reader = 'ledger'")
            if row is None or not self._ends.reached(row["stream_created"], row["seq"]):
                return f"the telemetry reader is more than {within_s:g} s behind the log"
        if rung.flags.telemetry is TelemetryFlag.BOTH:
            return self._feed_behind(within_s)
        return ""

    async def _completeness(self, conn: Conn, wave: Wave, rung: Rung, now: float) -> dict[str, Sample]:
        name = "telemetry.completeness"
        if not wave.moved or rung.flags.telemetry is TelemetryFlag.OLD:
            return {name: Sample(value=None, evidence=summary("no device of the wave has moved"))}
        await self.note_baselines({m.device: m.epoch for m in wave.moved})
        top: Top = {}
        settled: Top = {}
        heard_at = 0.0
        for row in await conn.fetch(
            "SELECT device, channel, max(upper(ranges)) - 1 AS top, "
            "extract(epoch FROM max(last_at))::float8 AS last_at FROM ledger "
            "WHERE device = ANY($1::text[]) AND channel <> $2 AND path = ANY($3::text[]) "
            "AND NOT isempty(ranges) GROUP BY device, channel",
            [m.device for m in wave.moved],
            TRY_CHANNEL,
            [MQTT_PATH, self._old_path],
        ):
            key = (row["device"], row["channel"])
            top[key] = row["top"]
            heard_at = max(heard_at, row["last_at"])
            if row["last_at"] <= now - rung.grace_s:
                settled[key] = row["top"]
        if top and now - heard_at > rung.silent_after_s:
            # What came before says nothing of the time since: a wave that sends nothing is not complete.
            silent = f"nothing has come from the wave for {now - heard_at:.0f} s"
            return {name: Sample(value=None, evidence=summary(silent))}
        by_device: dict[str, dict[str, int]] = {}
        for (device, channel), seq in top.items():
            by_device.setdefault(device, {})[channel] = seq
        epochs = {m.device: m.epoch for m in wave.moved}
        for device, epoch in epochs.items():
            self._moved_tops.setdefault((device, epoch), by_device.get(device, {}))
        self._tops.add(now, top, rung.grace_s)
        upto = {**self._tops.before(now - rung.grace_s), **settled}
        keys = [key for key in upto if key[0] in epochs]
        rows = await conn.fetch(
            _MISSING_SQL,
            [device for device, _ in keys],
            [channel for _, channel in keys],
            [self._baselines.get(device, (0, {}))[1].get(channel) for device, channel in keys],
            [self._moved_tops[device, epochs[device]].get(channel, -1) for device, channel in keys],
            [upto[key] for key in keys],
            MQTT_PATH,
            EXAMPLES,
        )
        if not rows:
            return {name: Sample(value=None, evidence=summary("no numbered message is old enough to judge"))}
        expected, missing, devices = rows[0]["all_expected"], rows[0]["all_missing"], rows[0]["all_devices"]
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

    async def _delays(
        self,
        conn: Conn,
        wave: Wave,
        state: MigrationState,
        rungs: Sequence[Rung],
        since: float,
        now: float,
    ) -> dict[str, Sample]:
        moved = [m.device for m in wave.moved]
        lately = max(since, now - DELAY_SPAN_S)
        new = await _delay_counts(conn, MQTT_PATH, moved, lately, now)
        # Best of all the same devices at the same time; where they have left the old side, their past; else
        # the devices that are still there.
        staying = [
            m.device
            for m in state.members.values()
            if standing_flags(m, rungs).telemetry is not TelemetryFlag.NEW and m.wave != state.wave
        ]
        old, basis = list[int](), ""
        for basis, devices, start, end in (  # noqa: B007 (the basis that served is part of the evidence)
            ("the same devices, same time", moved, lately, now),
            ("the same devices, before", moved, since - DELAY_SPAN_S, now),
            ("devices still on the old side", staying, now - DELAY_SPAN_S, now),
        ):
            old = await _delay_counts(conn, self._old_path, devices, start, end)
            if sum(old) >= 20:
                break
        samples = {}
        for label, q in QUANTILES.items():
            value, before = quantile(new, q), quantile(old, q)
            samples[f"telemetry.delay.{label}"] = Sample(
                value=value,
                n=sum(new),
                old=before,
                old_n=sum(old),
                evidence=summary(
                    f"n = {sum(new):,}, old n = {sum(old):,} ({basis})", basis=basis, old_n=sum(old)
                ),
            )
        return samples

    # -- connections -------------------------------------------------------------------------------------

    async def _flapping(self, conn: Conn, wave: Wave, since: float, now: float) -> dict[str, Sample]:
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
        return {
            "connections.flapping": Sample(
                value=float(len(rows)) if moved else None,
                n=moved,
                evidence=summary(
                    f"{len(rows):,} of {moved:,} devices",
                    examples=[
                        {"device": row["device"], "connects": row["connects"]} for row in rows[:EXAMPLES]
                    ],
                ),
            )
        }

    # -- for the timeline --------------------------------------------------------------------------------

    async def rates(self, devices: Sequence[str], now: float) -> tuple[float | None, float | None]:
        """Messages a second over the last ten seconds, by the old path and the new one."""
        window = now - now % 10
        share = 1 - (now - window) / 10  # how much of the window before still lies in the last ten seconds
        async with self._backend.acquire() as conn:
            rows = await conn.fetch(
                "SELECT path, sum(CASE WHEN window_start >= $3 THEN messages ELSE messages * $4::float8 END) "
                "/ 10.0 AS rate FROM receipt_window WHERE window_start >= $2 AND path = ANY($5::text[]) "
                "AND device = ANY($1::text[]) GROUP BY path",
                devices,
                moment(window - 10),
                moment(window),
                share,
                [MQTT_PATH, self._old_path],
            )
        by_path = {row["path"]: float(row["rate"]) for row in rows}
        return by_path.get(self._old_path, 0.0), by_path.get(MQTT_PATH, 0.0)

    async def latencies(
        self, devices: Sequence[str], now: float
    ) -> dict[str, tuple[float | None, float | None]]:
        """(p50, p95) of the commands that ended in the last 30 s, by path `old` and `new`."""
        async with self._backend.acquire() as conn:
            rows = await conn.fetch(
                "SELECT p.path, percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY "
                "extract(epoch FROM p.ended_at - coalesce(p.sent_at, p.created_at))::float8) AS q "
                "FROM command_path p JOIN command c ON c.id = p.command "
                "WHERE p.ended_at >= $2 AND c.id >= $3 AND p.device = ANY($1::text[]) AND c.name <> $4 "
                "AND p.status NOT IN ('expired', 'unreachable') GROUP BY p.path",
                devices,
                moment(now - 30),
                uuid7(now - 90, 0),
                PROBE_COMMAND,
            )
        return {row["path"]: (row["q"][0], row["q"][1]) for row in rows}


async def _delay_counts(
    conn: Conn, path: str, devices: Sequence[str], since: float, until: float
) -> list[int]:
    """Counts by delay bucket of the windows that touch [since, until]."""
    if not devices:
        return []
    rows = await conn.fetch(
        "SELECT u.place - 1 AS bucket, sum(u.n)::bigint AS n FROM receipt_window w "
        "CROSS JOIN LATERAL unnest(w.delay_counts) WITH ORDINALITY u(n, place) "
        "WHERE w.window_start >= $1 AND w.window_start <= $2 AND w.path = $3 AND w.device = ANY($4::text[]) "
        "GROUP BY 1 HAVING sum(u.n) > 0 ORDER BY 1",
        moment(since - since % 10),
        moment(until),
        path,
        devices,
    )
    counts = [0] * (rows[-1]["bucket"] + 1) if rows else []
    for row in rows:
        counts[row["bucket"]] = row["n"]
    return counts


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
