"""The rounds of one tenant's move: observe → decide → commit → start or stop the work that is wanted.

Work is one task at a time; it may be cancelled or killed at any moment and begins again from what it has
saved and from what stands in both databases. A database that is away is waited for; anything else that goes
wrong ends the work with its reason, and a person decides.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Protocol

from msgspec.structs import replace

from fleetlift.cancelling import end, raise_if_cancelled
from fleetlift.core.errors import FleetError
from fleetlift.core.migration import AuditEntry, Phase, Sample
from fleetlift.core.tenant.move import MoveDecision, MoveState, Report, Seen, Work, decide
from fleetlift.core.tenant.plan import TenantPlan, check_tenant_amendment, gates_of_step
from fleetlift.core.tenant.status import MovePoint
from fleetlift.core.timeline import GatePoint
from fleetlift.log import get_logger
from fleetlift.migrate.runner import newest_amendment
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.mover.move import AWAY, Move
from fleetlift.store import engine, tenant_moves
from fleetlift.store.pool import Pool
from fleetlift.store.tenant_moves import StoredMove

log = get_logger(__name__)

SAMPLE_EVERY_S: Final = 1.0
AWAY_PAUSE_S: Final = 1.0
read_plan = lru_cache(maxsize=64)(parse_tenant_plan)


class Works(Protocol):
    """What can be done for a move: the work of its steps, the streams beside it, its measurements."""

    async def run(self, move: Move, work: Work) -> str:
        """Do it; one line of what came of it. Raises FleetError when it cannot be done."""
        ...

    async def attend(self, move: Move, state: MoveState) -> str:
        """Keep the streams running that the state wants; why one of them cannot go on, or ""."""
        ...

    def source_changed(self, move: Move, state: MoveState) -> str:
        """How the source's schema differs from the one that is followed, or ""."""
        ...

    async def measure(self, move: Move, state: MoveState, now: float) -> Mapping[str, Sample]: ...

    def point(self, move: Move) -> Mapping[str, Any]:
        """What the timeline notes, fields of `MovePoint`."""
        ...

    async def close(self) -> None: ...


class MoveRunner:
    """The rounds of one move."""

    def __init__(
        self,
        stored: StoredMove,
        *,
        store: Pool,
        works: Callable[[], Works],
        move: Callable[["MoveRunner", TenantPlan], Move],
        step: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = stored.name
        self._stored: StoredMove | None = stored
        self._last = stored
        self._store = store
        self._step = step
        self._clock = clock
        self._lock = asyncio.Lock()  # between a round's decision and what its work saves
        self._plan = read_plan(stored.head.plan, file=f"{self.name}.yaml")
        self._move = move(self, self._plan)
        self._works = works()
        self._task: asyncio.Task[str] | None = None
        self._work: Work | None = None
        self._sampled_at = 0.0

    @property
    def state(self) -> MoveState:
        """As last committed."""
        return self._last.state

    def forget(self) -> None:
        """Read everything from the store in the next round."""
        self._stored = None

    async def save(self, at: int, facts: Mapping[str, Any]) -> None:
        """Commit what a step's work has to remember. Raises Conflict when another mover leads now."""
        async with self._lock:
            stored = await self._load()
            steps = list(stored.state.steps)
            steps[at] = replace(steps[at], facts=dict(facts))
            await self._commit(stored, replace(stored.state, steps=tuple(steps)), gates=stored.head.gates)

    async def round(self, now: float) -> None:
        """Raises Conflict when another mover has committed meanwhile; nothing was done then."""
        async with self._lock:
            stored = await self._load()
        async with self._store.acquire() as conn:
            asked = await engine.open_requests(conn, self.name)
        stream_error = await self._works.attend(self._move, stored.state)
        source_changed = self._works.source_changed(self._move, stored.state)
        samples = await self._samples(stored.state, now)
        async with self._lock:
            stored = await self._load()
            plan, text, refused = newest_amendment(
                self._plan, asked, read_plan, check_tenant_amendment, stored.state.step
            )
            report = self._report()
            decision = decide(
                plan,
                stored.state,
                Seen(
                    requests=tuple(r for r in asked if r.id not in refused),
                    report=report,
                    samples=samples,
                    stream_error=stream_error,
                    source_changed=source_changed,
                ),
                now,
            )
            await self._keep(stored, decision, refused, text)
            if text is not None and text == self._last.head.plan:
                self._plan, self._move.plan = plan, plan
        self._step("move-committed")
        await self._reconcile(decision.want)
        await self._note_point(decision, now)

    async def close(self) -> None:
        await self._reconcile(None)
        await self._works.close()

    # -- inside ------------------------------------------------------------------------------------------

    async def _load(self) -> StoredMove:
        if self._stored is None:
            async with self._store.acquire() as conn:
                self._stored = self._last = await tenant_moves.load(conn, self.name)
            self._plan = read_plan(self._stored.head.plan, file=f"{self.name}.yaml")
            self._move.plan = self._plan
        return self._stored

    async def _commit(self, before: StoredMove, after: MoveState, **what: Any) -> None:
        async with self._store.acquire() as conn:
            self._stored = self._last = await tenant_moves.commit(
                conn, before, after, now=self._clock(), **what
            )

    async def _keep(
        self,
        stored: StoredMove,
        decision: MoveDecision,
        refused: Mapping[int, AuditEntry],
        text: str | None,
    ) -> None:
        audit = (*decision.audit, *refused.values())
        answered = (*decision.answered, *refused)
        taken = text is not None and any(entry.kind == "plan_amended" for entry in audit)
        if decision.state == stored.state and not answered and decision.gates == stored.head.gates:
            return
        await self._commit(
            stored,
            decision.state,
            audit=audit,
            answered=answered,
            gates=decision.gates,
            plan=text if taken else None,
        )
        for entry in audit:
            log.info(entry.kind, migration=self.name, text=entry.text, actor=entry.actor)

    async def _samples(self, state: MoveState, now: float) -> Mapping[str, Sample]:
        step = self._plan.steps[state.step]
        if state.phase is not Phase.RUNNING or not gates_of_step(step):
            return {}
        return await self._works.measure(self._move, state, now)

    def _report(self) -> Report | None:
        """How the work stands; a task that has ended is reported once."""
        if self._work is None or self._task is None:
            return None
        text, figures = self._move.told
        if not self._task.done():
            return Report(work=self._work, text=text, figures=figures)
        task, work = self._task, self._work
        self._task = self._work = None
        if task.cancelled():
            return None
        error = task.exception()
        if error is None:
            return Report(work=work, done=True, text=task.result(), figures=self._move.told[1])
        if not isinstance(error, FleetError):
            log.error("work_failed", migration=self.name, step=work.step, reason=repr(error), exc_info=error)
        reason = str(error) or type(error).__name__
        return Report(work=work, error=reason, text=text, figures=figures)

    async def _reconcile(self, want: Work | None) -> None:
        """Have exactly the wanted work under way."""
        if self._work is not None and self._work != want:
            task, self._task, self._work = self._task, None, None
            if task is not None:
                await end([task])
        if want is not None and self._work is None:
            at = max(want.step, 0)
            self._move.begin_telling(self.state.steps[at].figures)
            self._work = want
            self._task = asyncio.create_task(self._patiently(want), name=f"{self.name} step {want.step}")

    async def _patiently(self, work: Work) -> str:
        """The work, again and again while a database is away."""
        while True:
            try:
                return await self._works.run(self._move, work)
            except AWAY as error:
                raise_if_cancelled()
                why = str(error) or type(error).__name__
                log.warning("work_interrupted", migration=self.name, step=work.step, reason=why)
                self._move.tell(f"waiting, then trying again: {why}")
                await asyncio.sleep(AWAY_PAUSE_S)

    async def _note_point(self, decision: MoveDecision, now: float) -> None:
        over = decision.state.phase in (Phase.REVERTED, Phase.RELEASED)
        if over or now - self._sampled_at < SAMPLE_EVERY_S:
            return
        self._sampled_at = now
        point = MovePoint(
            phase=decision.state.phase.value,
            step=decision.state.step,
            gates=tuple(
                GatePoint(
                    gate=g.gate, verdict=g.verdict.value, value=g.value, limit=g.limit, unit=g.unit, n=g.n
                )
                for g in decision.gates
            ),
            **self._works.point(self._move),
        )
        async with self._store.acquire() as conn:
            await engine.add_sample(conn, self.name, now, point)
