"""Which work belongs to which step; the one place that knows all of them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from fleetlift.backend.context import Context
from fleetlift.core.migration import Phase, Sample
from fleetlift.core.tenant.move import CLEAN, MoveState, StepPhase, Work
from fleetlift.core.tenant.plan import (
    Copy,
    Drain,
    Freeze,
    MoveStep,
    SwitchDatabase,
    SwitchDns,
    TenantPlan,
    Validate,
    Warm,
)
from fleetlift.mover import (
    cleaning,
    copying,
    draining,
    freezing,
    measuring,
    naming,
    switching,
    validating,
    warming,
)
from fleetlift.mover.move import Move
from fleetlift.mover.runner import MoveRunner
from fleetlift.mover.source_watch import SourceWatch
from fleetlift.mover.streams import Streams
from fleetlift.store.pool import Pool
from fleetlift.store.tenant_moves import StoredMove
from fleetlift.tenant.follow import Direction

CLEAN_AGAIN_S: Final = 60.0  # at most: what a release could not remove is tried again ever more rarely
Do = Callable[[Move, int, int, Streams], Awaitable[str]]


async def _nothing(move: Move, at: int, wave: int, streams: Streams) -> str:
    return "nothing to take back"


WORKS: Final[Mapping[type[MoveStep], tuple[Do, Do]]] = {
    Copy: (
        lambda move, at, _, streams: copying.copy(move, at, streams),
        lambda move, at, _, streams: copying.undo_copy(move, at, streams),
    ),
    Warm: (lambda move, at, _, streams: warming.warm_caches(move, at), _nothing),
    Validate: (lambda move, at, _, streams: validating.validate(move, at), _nothing),
    Freeze: (
        lambda move, at, _, streams: freezing.freeze(move, at),
        lambda move, at, _, streams: freezing.undo_freeze(move, at),
    ),
    SwitchDatabase: (
        lambda move, at, _, streams: switching.switch_database(move, at, streams),
        lambda move, at, _, streams: switching.undo_switch(move, at, streams),
    ),
    SwitchDns: (
        lambda move, at, wave, streams: naming.switch_names(move, at, wave),
        lambda move, at, _, streams: naming.undo_names(move, at),
    ),
    Drain: (
        lambda move, at, _, streams: draining.drain(move, at),
        lambda move, at, _, streams: draining.undo_drain(move, at),
    ),
}
"""Of each kind of step: what does it, and what takes it back."""


class StepWorks:
    """The works of one move."""

    def __init__(self, move: Move) -> None:
        self._streams = Streams(move)
        self._measures = measuring.Measures()
        self._counts = measuring.Counts()
        self._source = SourceWatch(move)
        self._clean_pause_s = 0.0

    async def run(self, move: Move, work: Work) -> str:
        if work == CLEAN:
            await asyncio.sleep(self._clean_pause_s)
            self._clean_pause_s = min(max(2 * self._clean_pause_s, 1.0), CLEAN_AGAIN_S)
            return await cleaning.clean_up(move, self._streams)
        do, undo = WORKS[type(move.plan.steps[work.step])]
        return await (undo if work.undo else do)(move, work.step, work.wave, self._streams)

    async def attend(self, move: Move, state: MoveState) -> str:
        await self._counts.look(move, state)
        return await self._streams.attend(state)

    def source_changed(self, move: Move, state: MoveState) -> str:
        following = self._streams.wanted(state) is Direction.FORWARD
        return self._source.look(following and state.phase is Phase.RUNNING)

    async def measure(self, move: Move, state: MoveState, now: float) -> Mapping[str, Sample]:
        step, one = move.plan.steps[state.step], state.steps[state.step]
        if state.phase is not Phase.RUNNING or one.phase is StepPhase.WORKING:
            return {}
        if isinstance(step, Validate):
            return await validating.measure(move, state.step)
        if isinstance(step, SwitchDns):
            return await self._measures.measure(move, step, one.wave)
        return {}

    def point(self, move: Move) -> Mapping[str, Any]:
        figures = move.told[1]
        names = ("rows_copied", "rows_total", "offered_s", "accepted_s", "load_p99_s")
        copied = {
            name: move.state.steps[0].figures.get(name)
            for name in ("rows_copied", "rows_total")
            if name not in figures
        }
        return {
            **{name: figures[name] for name in names if name in figures},
            **copied,
            **self._streams.shown(),
            **self._counts.shown(),
        }

    async def close(self) -> None:
        await self._source.close()
        await self._streams.close()


def runner_of(stored: StoredMove, *, ctx: Context, store: Pool, step: Callable[[str], None]) -> MoveRunner:
    """The runner of a move, with everything that it needs."""
    made: list[Move] = []

    def make(runner: MoveRunner, plan: TenantPlan) -> Move:
        move = Move(
            plan,
            settings=ctx.settings,
            backend=ctx.pool,
            files=stored.files,
            state=lambda: runner.state,
            save=runner.save,
            kill=step,
        )
        made.append(move)
        return move

    def works() -> StepWorks:
        return StepWorks(made[0])

    return MoveRunner(stored, store=store, works=works, move=make, step=step)
