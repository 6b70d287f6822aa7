"""Points of a migration's timeline: what view and report draw their lines through."""

import time
from collections.abc import Callable, Sequence

from fleetlift.core.migration import Decision, MigrationState, Verdict
from fleetlift.core.plan import Rung
from fleetlift.core.timeline import GatePoint, TimelinePoint
from fleetlift.log import get_logger
from fleetlift.migrate.ports import GONE, Measures, Store
from fleetlift.migrate.status import side_of
from fleetlift.migrate.wave import standing_flags

log = get_logger(__name__)

SAMPLE_EVERY_S = 1.0


class Timeline:
    """The timeline of one migration."""

    def __init__(
        self, name: str, store: Store, measures: Measures, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._store = store
        self._measures = measures
        self._monotonic = monotonic
        self._sampled_at = 0.0
        self._cost_s = 0.0

    async def note(
        self, state: MigrationState, decision: Decision, rungs: Sequence[Rung], *, new_up: bool, now: float
    ) -> bool:
        """Note a point when one is due, a breach always; whether it was."""
        breached = any(gate.verdict is Verdict.REVERT for gate in decision.gates)
        if not breached and now - self._sampled_at < max(SAMPLE_EVERY_S, 10 * self._cost_s):
            return False
        started = self._monotonic()
        old, both, new = devices_by_side(state, rungs)
        rates: tuple[float | None, float | None] = (None, None)
        latencies: dict[str, tuple[float | None, float | None]] = {}
        if new_up:
            try:
                rates = await self._measures.rates(list(state.members), now)
                latencies = await self._measures.latencies(list(state.members), now)
            except GONE as error:
                log.warning("timeline_not_measured", migration=self._name, reason=str(error))
        nothing = (None, None)
        point = TimelinePoint(
            phase=state.phase.value,
            rung=state.rung,
            wave=state.wave,
            wave_phase=state.wave_phase.value,
            devices_old=old,
            devices_both=both,
            devices_new=new,
            rate_old=rates[0],
            rate_new=rates[1],
            latency_old_p50=latencies.get("old", nothing)[0],
            latency_old_p95=latencies.get("old", nothing)[1],
            latency_new_p50=latencies.get("new", nothing)[0],
            latency_new_p95=latencies.get("new", nothing)[1],
            gates=tuple(
                GatePoint(
                    gate=g.gate,
                    verdict=g.verdict.value,
                    value=g.value,
                    limit=g.limit,
                    unit=g.unit,
                    n=g.n,
                )
                for g in decision.gates
            ),
        )
        await self._store.add_sample(self._name, now, point)
        self._sampled_at = now
        self._cost_s = self._monotonic() - started
        return True


def devices_by_side(state: MigrationState, rungs: Sequence[Rung]) -> tuple[int, int, int]:
    """How many members are served by the old side alone, by both, by the new side alone."""
    old = both = new = 0
    for member in state.members.values():
        match side_of(standing_flags(member, rungs)):
            case "old":
                old += 1
            case "both":
                both += 1
            case _:
                new += 1
    return old, both, new
