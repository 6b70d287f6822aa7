"""The step `switch: database`, and the way back from it."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.tenant.cutover import STEPS, CutoverState
from fleetlift.core.tenant.fence import Side, Status
from fleetlift.core.tenant.plan import SwitchDatabase
from fleetlift.core.tenant.schema import TableName
from fleetlift.core.tenant.verify_report import VerifyReport
from fleetlift.mover.copying import no_leaks, tell_verify, verified_figures
from fleetlift.mover.freezing import fence_of, freeze_again, still_frozen, thawed
from fleetlift.mover.move import Move, until
from fleetlift.mover.streams import SETTLED_WITHIN_S, Streams
from fleetlift.tenant import ddl
from fleetlift.tenant.cutover import CutoverParts, TouchedChecks, facts_of, run_cutover, run_return
from fleetlift.tenant.fence import Fence
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.verify import Verifier

CAUGHT_UP_WITHIN_S: Final = 120.0
TRIES: Final = 3
AGAIN_S: Final = 1.0
SERVES_ON: Final = "the source serves on"
BOTH_OPEN: Final = (
    "both sides may have taken writes: the source was sealed and is not any more (a failover to a standby "
    "without the seal, or somebody opened it), and the target serves. To go back now would lose what was "
    "written on the target. Bring over what is only there, give the target up ('fleetlift tenant clean "
    "{move}' on it), and resume"
)
BACK_GAP: Final = 1  # the source's sequences are every tenant's: they need not be far ahead


class Checked(TouchedChecks):
    """Verification for a switch: tidied before, and shown. Without `source` it is one for the way back."""

    def __init__(
        self, move: Move, verifier: Verifier, follower: Follower, *, source: Fence | None = None
    ) -> None:
        super().__init__(verifier, follower.touched, told=partial(tell_verify, move))
        self._move, self._follower, self._source = move, follower, source
        self.thawed = False  # whether features are to be frozen only when every row has been verified

    async def verify_fully(self) -> VerifyReport:
        await self._frozen()
        if self._source is not None:
            await self._follower.tidy()
        report = await super().verify_fully()
        self._move.tell("every row verified", **verified_figures(report))
        if self._source is not None:  # a verification takes as long as it takes
            # References may have been written since the copy; later ones are seen by their rows' keys.
            await no_leaks(self._move)
            await as_copied(self._move)
            if self.thawed:
                await freeze_again(self._move, self._source)
                self.thawed = False  # another try has what is left of the bound, not a new one
            else:
                await still_frozen(self._move, self._source)
        return report

    async def _frozen(self) -> None:
        """Do not verify for long what cannot be switched afterwards."""
        if self._source is not None and not self.thawed:
            await still_frozen(self._move, self._source)


class Back:
    """The stream from the target back to the source, as a cutover needs it."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def prepare(self) -> None:
        """Before the target's first write: so what it touches is known from the beginning."""
        follower = await self._streams.reverse()
        if (await follower.prepare()).snapshot is not None:
            follower.touched.begin()

    async def start(self) -> None:
        """Raises Conflict when what it needs is gone: made anew, it would lose what was written meanwhile."""
        await (await self._streams.reverse()).prepare(anew=False)
        self._streams.begin(Direction.REVERSE)


class BackAfterwards(Back):
    """The same once the target serves: that goes on without a way back too, and the runner shows why."""

    async def start(self) -> None:
        with contextlib.suppress(Conflict):
            await super().start()


async def switch_database(move: Move, at: int, streams: Streams) -> str:
    """Take the tenant's writes from the source to the target, within the bound, or leave them there."""
    step = _step(move, at)
    closure = await move.closure()
    follower = await streams.forward()
    source, target = fence_of(move, closure, Side.SOURCE), fence_of(move, closure, Side.TARGET)
    verifier = Verifier(move.source_url, move.target_url, closure, settle=streams.settle)
    checks = Checked(move, verifier, follower, source=source)
    sequences = ddl.SequencesAhead(move.source_url, move.target_url, closure, gap=step.sequence_gap)
    parts = CutoverParts(
        source=source,
        target=target,
        stream=follower,
        checks=checks,
        reverse=BackAfterwards(streams),
        set_sequences=sequences,
    )
    try:
        before = await facts_of(parts)
        if before.source is not Status.SEALED:
            await as_copied(move)
            await follower.prepare()
            streams.begin(Direction.FORWARD)
            follower.start_applying()
            checks.thawed = await thawed(move, source)
            if not await until(partial(_caught_up, move, follower), within_s=CAUGHT_UP_WITHIN_S):
                raise Conflict(f"the target has not caught up within {CAUGHT_UP_WITHIN_S:.0f} s: try again")
        state = await _tried(
            lambda: run_cutover(
                parts,
                _state(move, at),
                at_most_s=step.at_most_s,
                terminate=step.terminate,
                save=partial(_save, move, at, sequences=sequences),
                step=move.kill,
                progress=lambda _, text: move.tell(text.replace("-", " ")),
            ),
            partial(_caught_up, move, follower),
        )
    finally:
        await verifier.close()
        await sequences.aclose()
        await source.aclose()
        await target.aclose()
    if state.aborted:
        serves = "" if SERVES_ON in state.aborted else f"; {SERVES_ON}"
        raise Conflict(f"{state.aborted}{serves}")
    await streams.stop(Direction.FORWARD, drop=True)
    await ddl.open_triggers(move.target_url)
    frozen = [
        (row.step.value, round(state.took_s[row.step], 4))
        for row in STEPS
        if row.frozen and row.step in state.took_s
    ]
    move.tell(
        "switched",
        freeze_s=state.freeze_s,
        writes_refused=state.refused,
        freeze_steps=frozen,
        sessions_ended=len(state.ended) or None,
    )
    took = "" if state.freeze_s is None else f"; writers stood still for {state.freeze_s:.2f} s"
    return f"the tenant's writes go to the target{took}, {state.refused} were refused meanwhile"


async def undo_switch(move: Move, at: int, streams: Streams) -> str:
    """Take the tenant's writes back to the source, with all that was written on the target."""
    step = _step(move, at)
    await streams.stop(Direction.FORWARD)  # nothing is followed that way any more
    closure = await move.closure()
    source, target = fence_of(move, closure, Side.SOURCE), fence_of(move, closure, Side.TARGET)
    settle = partial(_settled_back, streams)
    verifier = Verifier(move.source_url, move.target_url, closure, settle=settle, back=True)
    stood = move.facts(at).get("sequences", {})
    sequences = ddl.SequencesAhead(
        move.target_url, move.source_url, closure, gap=BACK_GAP, back=True, stood=stood
    )
    text = "the source was never closed for good"
    try:
        follower = await streams.reverse()
        parts = CutoverParts(
            source=source,
            target=target,
            stream=follower,
            checks=Checked(move, verifier, follower),
            reverse=Back(streams),
            set_sequences=sequences,
        )
        facts = await facts_of(parts)
        if facts.source is Status.SEALED:
            if facts.target is not Status.SEALED:
                await Back(streams).start()
                if not await until(partial(_caught_up, move, follower), within_s=CAUGHT_UP_WITHIN_S):
                    raise Conflict("the reverse stream has not caught up: nothing was taken back yet")
            state = await _tried(
                lambda: run_return(
                    parts,
                    _state(move, at),
                    at_most_s=step.at_most_s,
                    terminate=step.terminate,
                    save=partial(_save, move, at),
                    step=move.kill,
                    progress=lambda _, text: move.tell(text.replace("-", " ")),
                ),
                partial(_caught_up, move, follower),
            )
            if state.aborted:
                raise Conflict(f"{state.aborted}; the target serves on")
            text = "the source has all that was written on the target, and serves"
            if state.freeze_s is not None:
                move.tell("back", back_freeze_s=state.freeze_s)
                text += f"; writers stood still for {state.freeze_s:.2f} s"
        elif move.facts(at).get("sealed") and facts.target in (Status.OPEN, Status.CLOSED):
            raise Conflict(BOTH_OPEN.format(move=move.name))
        else:
            await source.thaw()
        text += _left_behind(move, await follower.not_carried())
        await streams.stop(Direction.REVERSE, drop=True)
        await source.remove()
    finally:
        await verifier.close()
        await sequences.aclose()
        await source.aclose()
        await target.aclose()
    await move.forget(at)
    return text


async def as_copied(move: Move) -> None:
    """Raise Conflict when the source has tables or references of the tenant that nobody copied or fences."""
    if changed := await move.source_changed():
        raise Conflict(changed)


async def _tried(
    switch: Callable[[], Awaitable[CutoverState]], caught_up: Callable[[], Awaitable[bool]]
) -> CutoverState:
    """A switch that was given up left everything as it was, so it is tried a few times."""
    for _ in range(TRIES - 1):
        state = await switch()
        if not state.aborted:
            return state
        raise_if_cancelled()
        await asyncio.sleep(AGAIN_S)
        await until(caught_up, within_s=CAUGHT_UP_WITHIN_S)
    return await switch()


def _left_behind(move: Move, counts: Mapping[TableName, int]) -> str:
    """What the way back did not carry, for it is the other tenants' as well; "" when that is nothing."""
    told = ", ".join(f"{count:,} of {table}" for table, count in sorted(counts.items()))
    if not told:
        return ""
    move.tell("back", changes_not_carried=sum(counts.values()))
    return f"; changes of rows that all tenants share were not carried: {told}"


async def _settled_back(streams: Streams, lsn: int) -> None:
    """Wait until the source has what the target had at `lsn`."""
    if not await (await streams.reverse()).reached(lsn, SETTLED_WITHIN_S):
        raise Unavailable(f"the source has not caught up within {SETTLED_WITHIN_S:.0f} s")


async def _caught_up(move: Move, follower: Follower) -> bool:
    shown = follower.progress
    if shown.stopped:
        raise Conflict(shown.stopped)
    move.tell(
        f"catching up: {shown.lag_bytes or 0:,} bytes behind{f', {shown.waits}' if shown.waits else ''}"
    )
    return follower.caught_up


def _state(move: Move, at: int) -> CutoverState:
    held = move.facts(at).get("cutover")
    return CutoverState() if held is None else msgspec.convert(held, CutoverState)


async def _save(
    move: Move, at: int, state: CutoverState, *, sequences: ddl.SequencesAhead | None = None
) -> None:
    """`sequences`: of a switch forward, so that the way back knows which of them have given out ids."""
    facts: dict[str, Any] = {"cutover": msgspec.to_builtins(state), "sealed": state.sealed}
    if sequences is not None and sequences.report is not None:
        facts["sequences"] = dict(sequences.report.stands)
    await move.save(at, **facts)


def _step(move: Move, at: int) -> SwitchDatabase:
    step = move.plan.steps[at]
    assert isinstance(step, SwitchDatabase)
    return step
