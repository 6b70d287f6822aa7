"""The gates' measurements in the simulator: what `migrate/measure.py` asks PostgreSQL, from dictionaries.

Completeness is the core's own account. What is still on its way counts neither for nor against; what cannot
be measured has no value.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fleetlift.core.account import Channel, expected_and_missing
from fleetlift.core.command import Command, Mode, PathState, PathStatus
from fleetlift.core.command import Path as CommandPath
from fleetlift.core.decide import OWN_METRICS
from fleetlift.core.figures import arm, share_sample, spread, time_sample
from fleetlift.core.gates import Gate
from fleetlift.core.migration import Basis, Member, MigrationState, Sample
from fleetlift.core.orders import PROBE_COMMAND, TRY_CHANNEL, TelemetryFlag
from fleetlift.core.plan import Rung
from fleetlift.core.ranges import RangeSet
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.migrate.completeness import Tops
from fleetlift.migrate.delays import BEFORE_S as DELAY_SPAN_S
from fleetlift.migrate.measure import FRESH_S
from fleetlift.migrate.reconnects import FLAP_CONNECTS, FLAP_SPAN_S
from fleetlift.migrate.wave import QUANTILES, open_wave, summary
from fleetlift.simulate.clock import Clock
from fleetlift.simulate.database import Database

OLD_PATH = "legacy"
_GOOD = (PathStatus.SUCCEEDED, PathStatus.WOULD_EXECUTE)
_NO_ANSWER = (PathStatus.EXPIRED, PathStatus.UNREACHABLE)

Reach = Callable[[Callable[[], Any]], Awaitable[Any]]


class SimulatedMeasures:
    """Measures for one controller; like the real one it holds only a short memory."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        *,
        reach: Reach,
        log_end: Callable[[], int],
        feed_behind: Callable[[float], str],
    ) -> None:
        self._database = database
        self._clock = clock
        self._reach = reach
        self._log_end = log_end
        self._feed_behind = feed_behind
        self._ends: list[tuple[float, int]] = []
        self._tops = Tops()
        self._moved_tops: dict[tuple[str, int], dict[str, int]] = {}

    def _check(self) -> None:
        if not self._database.up:
            raise OSError("the database does not answer")

    async def note_baselines(self, epochs: Mapping[str, int]) -> None:
        await self._reach(lambda: self._note_baselines(epochs))

    def _note_baselines(self, epochs: Mapping[str, int]) -> None:
        self._check()
        wanted = {d: e for d, e in epochs.items() if self._database.baselines.get(d, (-1, {}))[0] < e}
        if not wanted:
            return
        tops: dict[str, dict[str, int]] = {device: {} for device in wanted}
        for (device, channel), paths in self._database.ledger.items():
            account = paths.get(MQTT_PATH)
            if device in wanted and account is not None and account.ranges.highest is not None:
                tops[device][channel] = account.ranges.highest
        for device, epoch in wanted.items():
            self._database.baselines[device] = (epoch, tops[device])

    async def samples(
        self, gates: Sequence[Gate], state: MigrationState, rungs: Sequence[Rung], now: float
    ) -> dict[str, Sample]:
        metrics = {gate.metric for gate in gates if gate.metric not in OWN_METRICS}
        if not metrics:
            return {}
        try:
            found: dict[str, Sample] = await self._reach(lambda: self._measure(metrics, state, rungs, now))
        except OSError as error:
            found = {m: Sample(value=None, evidence=summary(f"not measured: {error}")) for m in metrics}
        return {gate.text: found[gate.metric] for gate in gates if gate.metric in found}

    def _measure(
        self, metrics: set[str], state: MigrationState, rungs: Sequence[Rung], now: float
    ) -> dict[str, Sample]:
        self._check()
        rung = rungs[min(state.rung, len(rungs) - 1)]
        moved = open_wave(state).moved
        since = state.measured_from or state.wave_opened_at or now
        found: dict[str, Sample] = {}
        if telemetry := {m for m in metrics if m.startswith("telemetry.")}:
            if stale := self._stale(rung, now):
                found |= {m: Sample(value=None, evidence=summary(stale)) for m in telemetry}
            else:
                if "telemetry.completeness" in telemetry:
                    found["telemetry.completeness"] = self._completeness(moved, rung, now)
                found |= self._delays(moved, since, now)
        if any(m.startswith("commands.") for m in metrics):
            found |= self._commands(moved, rung, since, now)
        if "connections.flapping" in metrics:
            found["connections.flapping"] = self._flapping(moved, since, now)
        return found

    # -- telemetry ---------------------------------------------------------------------------------------

    def _stale(self, rung: Rung, now: float) -> str:
        within_s = max(rung.grace_s, FRESH_S)
        if self._ends and now - self._ends[-1][0] > within_s:
            self._ends.clear()
        self._ends.append((now, self._log_end()))
        while len(self._ends) > 1 and self._ends[1][0] <= now - within_s:
            self._ends.pop(0)
        if self._database.telemetry_position < self._ends[0][1]:
            return "the telemetry reader is behind the log"
        if rung.flags.telemetry is TelemetryFlag.BOTH:
            return self._feed_behind(within_s)
        return ""

    def _completeness(self, moved: Sequence[Member], rung: Rung, now: float) -> Sample:
        if not moved or rung.flags.telemetry is TelemetryFlag.OLD:
            return Sample(value=None, evidence=summary("no device of the wave has moved"))
        self._note_baselines({m.device: m.epoch for m in moved})
        epochs = {m.device: m.epoch for m in moved}
        top: dict[tuple[str, str], int] = {}
        settled: dict[tuple[str, str], int] = {}
        heard_at = 0.0
        for key, paths in self._database.ledger.items():
            if key[0] not in epochs or key[1] == TRY_CHANNEL:
                continue
            for account in paths.values():
                highest = account.ranges.highest
                if highest is not None:
                    top[key] = max(top.get(key, -1), highest)
                    heard_at = max(heard_at, account.last_at)
            if key in top and max(a.last_at for a in paths.values()) <= now - rung.grace_s:
                settled[key] = top[key]
        if top and now - heard_at > rung.silent_after_s:
            return Sample(value=None, evidence=summary("nothing has come from the wave for too long"))
        by_device: dict[str, dict[str, int]] = {}
        for (device, channel), seq in top.items():
            by_device.setdefault(device, {})[channel] = seq
        for device, epoch in epochs.items():
            self._moved_tops.setdefault((device, epoch), by_device.get(device, {}))
        self._tops.add(now, top, rung.grace_s)
        upto = {**self._tops.before(now - rung.grace_s), **settled}
        due = lacking = 0
        for (device, channel), last in upto.items():
            if device not in epochs:
                continue
            by_new = self._database.ledger[device, channel].get(MQTT_PATH)
            expected, missing = expected_and_missing(
                Channel(
                    baseline=self._database.baselines.get(device, (0, {}))[1].get(channel),
                    base=self._moved_tops[device, epochs[device]].get(channel, -1),
                    upto=last,
                    got=by_new.ranges if by_new is not None else RangeSet(),
                )
            )
            due += expected
            lacking += missing.count
        if not due:
            return Sample(value=None, evidence=summary("no numbered message is old enough to judge"))
        return Sample(
            value=100.0 * (due - lacking) / due,
            n=due,
            evidence=summary(f"{lacking:,} of {due:,} missing", expected=due, missing=lacking),
        )

    def _delays(self, moved: Sequence[Member], since: float, now: float) -> dict[str, Sample]:
        lately = max(since, now - DELAY_SPAN_S)
        new = spread(self._buckets(moved, MQTT_PATH, lately, now))
        old = spread(self._buckets(moved, OLD_PATH, since - DELAY_SPAN_S, now))
        return {
            f"telemetry.delay.{label}": time_sample(
                q, new, old, Basis.SAME, over_s=now - since, evidence=summary(f"n = {new.n:,}")
            )
            for label, q in QUANTILES.items()
        }

    def _buckets(self, members: Sequence[Member], path: str, start: float, end: float) -> list[Counter[int]]:
        return [
            Counter(
                bucket
                for at, bucket in self._database.delays.get((member.device, path), ())
                if start <= at <= end
            )
            for member in members
        ]

    # -- commands ----------------------------------------------------------------------------------------

    def _commands(self, moved: Sequence[Member], rung: Rung, since: float, now: float) -> dict[str, Sample]:
        begins = {m.device: max(since, m.moved_at or since) for m in moved}
        twice = total = 0
        agreement: dict[str, list[int]] = {}  # by device: judged, and differing
        success: dict[str, list[int]] = {}
        for command in self._database.commands.of(list(begins)):
            if command.name == PROBE_COMMAND or command.created_at < begins[command.device]:
                continue
            by = {path.path: path for path in command.paths}
            if (new_path := by.get(CommandPath.NEW)) is None:
                continue
            total += 1
            due = min(command.expires_at, command.created_at + rung.commands_timeout_s)
            new = _outcome(new_path, due, now)
            old_path = by.get(CommandPath.OLD)
            old = _outcome(old_path, due, now) if old_path is not None else None
            twice += old_path is not None and _twice(command, new_path, old_path)
            if new not in ("open", "second"):
                _count(success, command.device, new != "good")
            if (verdict := _agreed(new_path, old_path, new, old)) is not None:
                _count(agreement, command.device, not verdict)
        return {
            "commands.agreement": _share(agreement, now - since),
            "commands.success": _share(success, now - since),
            "commands.executed_twice": Sample(value=float(twice) if total else None, n=total),
        }

    def _flapping(self, moved: Sequence[Member], since: float, now: float) -> Sample:
        flapping = 0
        for member in moved:
            begin = max(member.moved_at or since, since, now - FLAP_SPAN_S)
            connects = self._database.connects.get(member.device, ())
            flapping += sum(at >= begin for at in connects) >= FLAP_CONNECTS
        return Sample(value=float(flapping) if moved else None, n=len(moved))

    # -- for the timeline, which the simulator does not look at ------------------------------------------

    async def rates(self, devices: Sequence[str], now: float) -> tuple[float | None, float | None]:
        return None, None

    async def latencies(
        self, devices: Sequence[str], now: float
    ) -> dict[str, tuple[float | None, float | None]]:
        return {}


def _count(counts: dict[str, list[int]], device: str, wrong: bool) -> None:
    own = counts.setdefault(device, [0, 0])
    own[0] += 1
    own[1] += wrong


def _share(counts: Mapping[str, Sequence[int]], over_s: float) -> Sample:
    figures = arm((own[0], own[1]) for own in counts.values())
    return share_sample(figures, None, Basis.NONE, over_s=over_s, evidence={})


def _outcome(path: PathState, due: float, now: float) -> str:
    if path.ended_at is None and due > now:
        return "open"
    if path.ended_at is None or path.ended_at > due or path.status in _NO_ANSWER:
        return "none"
    if path.status in _GOOD:
        return "good"
    return "second" if path.status is PathStatus.DUPLICATE else "bad"


def _twice(command: Command, new: PathState, old: PathState) -> bool:
    return all(
        path.mode is Mode.EXECUTE and (path.status is PathStatus.SUCCEEDED or _late(path) == "succeeded")
        for path in (new, old)
    )


def _late(path: PathState) -> object:
    late = path.detail.get("late")
    return late.get("status") if isinstance(late, dict) else None


def _agreed(new_path: PathState, old_path: PathState | None, new: str, old: str | None) -> bool | None:
    if new == "open" or old == "open":
        return None
    if old_path is None or old is None:
        return new in ("good", "bad")
    if new == old == "none":
        return None
    if Mode.DRY_RUN in (new_path.mode, old_path.mode):
        return old == new and old in ("good", "bad")
    return (old in ("good", "bad") and new == "second") or (new in ("good", "bad") and old == "second")
