"""Measurements for gates, by SQL from ledger, receipt windows, commands and presence.

A measurement is of the open wave: the devices that it raised, since they have moved. What is still on its
way (younger than the rung's grace or command timeout) counts neither for nor against. Every sample carries
the evidence it was computed from; what cannot be measured, or would be a figure of the past, has no value,
and a gate never passes on that.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import asyncpg

from fleetlift.core.command import uuid7
from fleetlift.core.decide import OWN_METRICS
from fleetlift.core.errors import FleetError
from fleetlift.core.gates import Gate, Source
from fleetlift.core.migration import MigrationState, Sample
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag, TelemetryFlag
from fleetlift.core.plan import Rung
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.log import get_logger
from fleetlift.migrate.command_outcomes import measure_commands
from fleetlift.migrate.completeness import Completeness
from fleetlift.migrate.delays import DelayBook, measure_delays
from fleetlift.migrate.free_queries import free_sql, prometheus
from fleetlift.migrate.parity import measure_parity
from fleetlift.migrate.reconnects import OldConnects, measure_flapping, measure_rate
from fleetlift.migrate.wave import groups, moment, open_wave, summary
from fleetlift.store.pool import Conn, Pool

log = get_logger(__name__)

FRESH_S = 2.0  # the account of telemetry is written at least every second

Positions = Callable[[], Awaitable[tuple[datetime, int]]]


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

    @property
    def nothing(self) -> bool:
        """Whether there was nothing to read."""
        return bool(self._history) and self._history[0][2] == 0

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
        canaries: Collection[str] = (),
        log_end: Positions | None = None,
        commands_end: Positions | None = None,
        feed_behind: Callable[[float], str] = lambda within_s: "",
        presence_lost: Callable[[], Awaitable[str]] | None = None,
        old_connects: OldConnects | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`log_end` tells the log's time of creation and last number, `commands_end` the number of the last
        answer to a command; `feed_behind(within_s)` why the old side's feed does not show what was sent up to
        so long ago, `presence_lost` why presence is not kept, or "". `canaries` were named, not chosen."""
        self._backend = backend
        self._name = name
        self._old_path = old_path
        self._canaries = frozenset(canaries)
        self._monotonic = monotonic
        self._log_end = log_end
        self._commands_end = commands_end
        self._feed_behind = feed_behind
        self._presence_lost = presence_lost
        self._old_connects = old_connects
        self._ends = {"ledger": LogEnds(), "commands": LogEnds()}
        self._completeness = Completeness(name, backend=backend, engine=engine, old_path=old_path)
        self._delays = DelayBook()
        self._cached: tuple[object, float, dict[str, Sample]] | None = None

    async def note_baselines(self, epochs: Mapping[str, int]) -> None:
        await self._completeness.note_baselines(epochs)

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
        sides = groups(wave, state, self._canaries)
        within_s = max(rung.grace_s, FRESH_S)

        async def completeness(conn: Conn) -> Mapping[str, Sample]:
            return await self._completeness.measure(conn, wave, rung, now)

        async def delays(conn: Conn) -> Mapping[str, Sample]:
            return await measure_delays(
                conn,
                self._delays,
                wave,
                sides,
                state,
                rungs,
                self._old_path,
                since=since,
                now=now,
                over_at=now - within_s - 10,
            )

        async def parity(conn: Conn) -> Mapping[str, Sample]:
            return await measure_parity(conn, wave, self._old_path)

        async def commands(conn: Conn) -> Mapping[str, Sample]:
            return await measure_commands(conn, wave, sides, rungs, rung, since, now)

        async def flapping(conn: Conn) -> Mapping[str, Sample]:
            return {"connections.flapping": await measure_flapping(conn, wave, since, now)}

        async def rate(conn: Conn) -> Mapping[str, Sample]:
            return {
                "connections.rate": await measure_rate(
                    conn, wave, sides, rungs, self._old_connects, since, now
                )
            }

        families: list[tuple[str, Callable[[Conn], Awaitable[Mapping[str, Sample]]], Any]] = [
            ("telemetry.completeness", completeness, self._telemetry_stale),
            ("telemetry.delay", delays, self._telemetry_stale),
            ("parity.", parity, self._telemetry_stale),
            ("commands.", commands, self._commands_stale),
            ("connections.flapping", flapping, self._presence_stale),
            ("connections.rate", rate, self._presence_stale),
        ]
        for prefix, measure, stale in families:
            wanted = [m for m in metrics if m.startswith(prefix)]
            if not wanted:
                continue
            try:
                async with self._backend.acquire() as conn:
                    if why := await stale(conn, rung, within_s, now):
                        found.update({m: Sample(value=None, evidence=summary(why)) for m in wanted})
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

    # -- figures of the past -----------------------------------------------------------------------------

    async def _telemetry_stale(self, conn: Conn, rung: Rung, within_s: float, now: float) -> str:
        """Why the account of telemetry tells of the past, or "" when it is at most the grace behind."""
        if why := await self._behind(conn, "ledger", self._log_end, within_s, now):
            return why
        return self._feed_behind(within_s) if rung.flags.telemetry is TelemetryFlag.BOTH else ""

    async def _commands_stale(self, conn: Conn, rung: Rung, within_s: float, now: float) -> str:
        """The same of answers to commands: those by the new side's log, and those by the old side's feed."""
        if why := await self._behind(conn, "commands", self._commands_end, within_s, now):
            return why
        both = rung.flags.commands in (CommandsFlag.DRY_RUN, CommandsFlag.BOTH)
        return self._feed_behind(within_s) if both else ""

    async def _presence_stale(self, conn: Conn, rung: Rung, within_s: float, now: float) -> str:
        return await self._presence_lost() if self._presence_lost is not None else ""

    async def _behind(
        self, conn: Conn, reader: str, end: Positions | None, within_s: float, now: float
    ) -> str:
        """Whether a reader has come to where what it reads ended `within_s` ago."""
        if end is None:
            return ""
        ends = self._ends[reader]
        try:
            ends.add(now, *await end(), within_s)
        except FleetError as error:
            return f"the end of the log is not known: {error}"
        if ends.nothing:
            return ""
        row = await conn.fetchrow("SELECT stream_created, seq FROM log_position WHERE reader = $1", reader)
        if row is None or not ends.reached(row["stream_created"], row["seq"]):
            which = {"ledger": "telemetry"}.get(reader, reader)
            return f"the reader of {which} is more than {within_s:g} s behind the log"
        return ""

    # -- for the timeline --------------------------------------------------------------------------------
    # Of a whole fleet: joined, for a planner that is given the devices by `= ANY` looks at each of them.

    async def rates(self, devices: Sequence[str], now: float) -> tuple[float | None, float | None]:
        """Messages a second over the last ten seconds, by the old path and the new one."""
        window = now - now % 10
        share = 1 - (now - window) / 10  # how much of the window before still lies in the last ten seconds
        async with self._backend.acquire() as conn:
            rows = await conn.fetch(
                "SELECT path, sum(CASE WHEN window_start >= $3 THEN messages ELSE messages * $4::float8 END) "
                "/ 10.0 AS rate FROM receipt_window JOIN unnest($1::text[]) d(device) USING (device) "
                "WHERE window_start >= $2 AND path = ANY($5::text[]) GROUP BY path",
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
                "JOIN unnest($1::text[]) d(device) ON d.device = p.device "
                "WHERE p.ended_at >= $2 AND c.id >= $3 AND c.name <> $4 "
                "AND p.status NOT IN ('expired', 'unreachable') GROUP BY p.path",
                devices,
                moment(now - 30),
                uuid7(now - 90, 0),
                PROBE_COMMAND,
            )
        return {row["path"]: (row["q"][0], row["q"][1]) for row in rows}
