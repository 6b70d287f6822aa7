"""The streams of a move: forward from the copy until the switch, back from then until the release.

They outlive the work of single steps: whatever the open step does, changes are followed. After a restart they
are taken up again as the state says.
"""

import asyncio
import time
from typing import Final

import asyncpg

from fleetlift.cancelling import end
from fleetlift.core.errors import FleetError, Unavailable
from fleetlift.core.migration import Phase
from fleetlift.core.tenant.move import TOUCHED, MoveState, StepPhase, switched
from fleetlift.core.tenant.plan import Copy, SwitchDatabase
from fleetlift.log import get_logger
from fleetlift.mover.move import AWAY, Move
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.follow_state import FollowState

log = get_logger(__name__)

SETTLED_WITHIN_S: Final = 60.0
AWAY_FOR_S: Final = 15.0  # a database that does not answer for so long closes the way back
BACK_AGAIN_S: Final = 60.0  # so often a way back that has stopped is tried again
_OVER: Final = (Phase.REVERTED, Phase.RELEASED)
_STANDING: Final = (Phase.HELD, Phase.PAUSED)


class Streams:
    """Both followers of one move, those that it needs now."""

    def __init__(self, move: Move) -> None:
        self._move = move
        self._followers: dict[Direction, Follower] = {}
        self._tasks: dict[Direction, asyncio.Task[None]] = {}
        self._begun_at: dict[Direction, float] = {}
        self._phase = Phase.RUNNING  # of the move, in the round before
        self._closed = ""  # why there is no way back
        self._away_since: float | None = None
        self._lock = asyncio.Lock()

    # -- for the works -----------------------------------------------------------------------------------

    async def forward(self) -> Follower:
        """The follower from source to target; made, not yet running."""
        return await self._follower(Direction.FORWARD)

    async def reverse(self) -> Follower:
        """The follower from target to source; made, not yet running."""
        return await self._follower(Direction.REVERSE)

    async def _follower(self, direction: Direction) -> Follower:
        found = self._followers.get(direction)
        if found is None:
            move = self._move
            back = direction is Direction.REVERSE
            found = self._followers[direction] = Follower(
                move.target_url if back else move.source_url,
                move.source_url if back else move.target_url,
                await move.closure(),
                move=move.name,
                directory=move.directory,
                direction=direction,
                target_settings=move.pass_settings,
            )
        return found

    def begin(self, direction: Direction) -> None:
        """Let a follower that was prepared run, also one that has stopped. May be repeated."""
        task = self._tasks.get(direction)
        if task is None or task.done():
            follower = self._followers[direction]
            follower.forget_stop()
            self._begun_at[direction] = time.monotonic()
            self._tasks[direction] = asyncio.create_task(
                follower.run(), name=f"{self._move.name} {direction}"
            )

    async def settle(self, lsn: int) -> None:
        """Wait until the target has what the source had at `lsn`."""
        follower = await self.forward()
        if not await follower.reached(lsn, SETTLED_WITHIN_S):
            raise Unavailable(f"the target has not caught up within {SETTLED_WITHIN_S:.0f} s")

    async def stop(self, direction: Direction, *, drop: bool = False) -> None:
        """End a stream; with `drop` nothing of it stays on either side."""
        async with self._lock:
            task = self._tasks.pop(direction, None)
            if task is not None:
                await end([task])
            if drop:
                await (await self._follower(direction)).drop()
            follower = self._followers.pop(direction, None)
            if follower is not None:
                await follower.release_snapshot()
            if direction is Direction.REVERSE:
                self._closed = ""

    # -- for the runner ----------------------------------------------------------------------------------

    async def attend(self, state: MoveState) -> str:
        """Take up what the state wants and does not run; why a stream cannot go on, "" while it can.

        One that has stopped is tried again when the move is resumed, the way back also from time to time.
        """
        resumed = self._phase in _STANDING and state.phase not in _STANDING
        self._phase = state.phase
        wanted = self.wanted(state)
        for direction in [one for one in self._tasks if one is not wanted and not self._at_work(state)]:
            await self.stop(direction)
        if wanted is None:
            return ""
        try:
            why = await self._keep_running(wanted, again=resumed, copied=_copied(state))
            if not _copied(state):  # who goes on with the copy reads from a snapshot of his own
                await self._followers[wanted].release_snapshot()
            away = not why and self._followers[wanted].progress.state is FollowState.RECONNECTING
        except AWAY as error:  # the next round tries again
            log.warning("stream_waits", migration=self._move.name, stream=wanted, reason=repr(error))
            why, away = "", True
        except asyncpg.PostgresError as error:
            why, away = f"a database refuses the stream: {error}", False
        if wanted is Direction.FORWARD:
            return why
        return self._still_closed(why or self._for_long(away))

    async def _keep_running(self, wanted: Direction, *, again: bool, copied: bool) -> str:
        """Have a stream run; why it cannot. `again`: also when it has stopped. Until the rows are `copied` it
        only spools: the source must not keep its log for as long as the copy stands still."""
        task = self._tasks.get(wanted)
        if task is not None and task.done():
            error = None if task.cancelled() else task.exception()
            if wanted is Direction.REVERSE:
                again = again or time.monotonic() - self._begun_at[wanted] >= BACK_AGAIN_S
            if isinstance(error, FleetError) and not again:
                return str(error)
            if error is not None and not isinstance(error, FleetError):
                log.error("stream_failed", migration=self._move.name, stream=wanted, reason=repr(error))
        if task is None or task.done():
            async with self._lock:
                follower = await self._follower(wanted)
                try:
                    await follower.prepare(anew=False)  # all that it needs was made by a step's work
                except Unavailable:
                    raise
                except FleetError as error:
                    return str(error)
                self.begin(wanted)
                if copied:
                    follower.start_applying()
        return ""

    def _for_long(self, away: bool) -> str:
        """Why there is no way back, when a database has been away for long enough to say so."""
        if not away:
            self._away_since = None
            return ""
        self._away_since = self._away_since or time.monotonic()
        if time.monotonic() - self._away_since < AWAY_FOR_S:
            return ""
        return f"a database has not answered for {AWAY_FOR_S:g} s"

    def _still_closed(self, why: str) -> str:
        """A way back that was closed is open when it has caught up, not when it is tried again."""
        if why:
            self._closed = why
        elif self._closed and (back := self._followers.get(Direction.REVERSE)) and back.caught_up:
            self._closed = ""
        return self._closed

    def wanted(self, state: MoveState) -> Direction | None:
        """Which stream has to run beside the work of the open step. A step that makes or drops one looks
        after it itself."""
        if state.phase in _OVER or self._at_work(state):
            return None
        if switched(self._move.plan, state):
            return Direction.REVERSE
        if any(one.phase in (StepPhase.UNDOING, StepPhase.UNDONE) for one in state.steps):
            return None  # on the way back nothing is followed any more
        copy = state.steps[0]
        followed = copy.facts.get("followed") or _copied(state)
        return Direction.FORWARD if copy.phase in TOUCHED and followed else None

    def _at_work(self, state: MoveState) -> bool:
        """Whether the open step's own work begins or ends streams now."""
        step, one = self._move.plan.steps[state.step], state.steps[state.step]
        if state.phase is Phase.REVERTING:
            return isinstance(step, Copy | SwitchDatabase) and one.phase is StepPhase.UNDOING
        return (
            state.phase is Phase.RUNNING
            and one.phase is StepPhase.WORKING
            and isinstance(step, Copy | SwitchDatabase)
        ) or state.phase is Phase.RELEASED

    def shown(self) -> dict[str, float | int | None]:
        """What the timeline notes of the stream that runs."""
        for follower in self._followers.values():
            progress = follower.progress
            return {
                "rows_applied": progress.rows,
                "applied_s": progress.rows_s,
                "lag_s": progress.lag_s,
                "lag_bytes": progress.lag_bytes,
                "not_carried": progress.not_carried or None,
            }
        return {}

    async def close(self) -> None:
        for direction in list(self._tasks):
            await self.stop(direction)


def _copied(state: MoveState) -> bool:
    return bool(state.steps[0].facts.get("copied"))
