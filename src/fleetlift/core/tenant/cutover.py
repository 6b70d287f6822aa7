"""The cutover of a tenant's database as a table of steps, and which one is next: a pure decision.

What is decided rests on what both fences say *now*, as read from the databases, and only then on what was
noted: a mover that was killed cannot know whether its last statement went through. Never are both sides
open; and both are closed only between two steps, either of which may be taken by whoever resumes.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from fleetlift.core.tenant.fence import Serving, Status, serving


class Step(StrEnum):
    FENCE_INSTALLED = "fence-installed"
    REVERSE_PREPARED = "reverse-prepared"
    VERIFIED_FULLY = "verified-fully"
    ARMED = "armed"
    DRAINED = "drained"
    POSITION_READ = "position-read"
    POSITION_REACHED = "position-reached"
    TOUCHED_VERIFIED = "touched-verified"
    SEQUENCES_SET = "sequences-set"
    SEALED = "sealed"
    OPENED = "opened"
    REVERSE_STARTED = "reverse-started"


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `kept`: what it did outlives the mover; else it is done again after a kill. `undone`: what
    becomes of it when the cutover is given up before the seal."""

    step: Step
    does: str
    kept: bool
    frozen: bool  # the tenant's writes are refused while it is done
    undone: str


STEPS: Final[tuple[StepRow, ...]] = (
    StepRow(
        step=Step.FENCE_INSTALLED,
        does="fence on both sides: open on the source, closed on the target",
        kept=True,
        frozen=False,
        undone="stays, open on the source; removed with the move",
    ),
    StepRow(
        step=Step.REVERSE_PREPARED,
        does="slot and publication on the target, before its first write",
        kept=True,
        frozen=False,
        undone="stays; removed with the move",
    ),
    StepRow(
        step=Step.VERIFIED_FULLY,
        does="every row compared; from here on the keys of changed rows are noted",
        kept=False,  # the notes are the mover's
        frozen=False,
        undone="nothing to undo",
    ),
    StepRow(
        step=Step.ARMED,
        does="the source's fence closes until its bound",
        kept=False,
        frozen=True,
        undone="thawed; by itself at its bound",
    ),
    StepRow(
        step=Step.DRAINED,
        does="transactions that were let in before have ended",
        kept=False,
        frozen=True,
        undone="thawed",
    ),
    StepRow(
        step=Step.POSITION_READ,
        does="the source's position, after all that was acknowledged",
        kept=False,
        frozen=True,
        undone="forgotten",
    ),
    StepRow(
        step=Step.POSITION_REACHED,
        does="the follower has applied up to it",
        kept=False,
        frozen=True,
        undone="nothing to undo",
    ),
    StepRow(
        step=Step.TOUCHED_VERIFIED,
        does="rows changed since they were compared are compared again",
        kept=False,
        frozen=True,
        undone="nothing to undo",
    ),
    StepRow(
        step=Step.SEQUENCES_SET,
        does="the target's sequences lie ahead of the source's",
        kept=False,
        frozen=True,
        undone="stays: being ahead harms nobody",
    ),
    StepRow(
        step=Step.SEALED,
        does="the source's fence is closed for good, if its bound has not been hit",
        kept=True,
        frozen=True,
        undone="does not happen: this is the point of no return",
    ),
    StepRow(
        step=Step.OPENED,
        does="the target's fence opens",
        kept=True,
        frozen=True,
        undone="does not happen before the seal",
    ),
    StepRow(
        step=Step.REVERSE_STARTED,
        does="changes on the target flow back to the source",
        kept=False,  # streams live in the mover: started again with it
        frozen=False,
        undone="does not happen before the seal",
    ),
)
"""In order. Every step may be repeated."""

ORDER: Final = tuple(row.step for row in STEPS)
_KEPT: Final = frozenset(row.step for row in STEPS if row.kept)
_UNTIL_SEAL: Final = ORDER[: ORDER.index(Step.SEALED)]
_BEFORE_ARMED: Final = frozenset(ORDER[: ORDER.index(Step.ARMED)])


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What both fences say. `ours`: this mover, not one before it, has closed the source's."""

    source: Status
    target: Status
    ours: bool = False


class Do(msgspec.Struct, frozen=True):
    step: Step


class Abort(msgspec.Struct, frozen=True):
    """Thaw and forget all from `armed` on; the source serves on. `again`: go on from there at once."""

    reason: str
    again: bool = False


class Done(msgspec.Struct, frozen=True):
    pass


Next: TypeAlias = Do | Abort | Done


def survived(done: frozenset[Step]) -> frozenset[Step]:
    """What of `done` a mover that starts again may rely on."""
    return done & _KEPT & _BEFORE_ARMED


def next_step(done: frozenset[Step], facts: Facts) -> Next:
    """What is next in a cutover of which `done` is noted, given what both databases say."""
    if facts.source is Status.SEALED:
        # Nothing before the seal is asked for again: it has happened, whatever was noted of it.
        if facts.target in (Status.SEALED, Status.CLOSED):
            return Do(Step.OPENED)
        return Done() if Step.REVERSE_STARTED in done else Do(Step.REVERSE_STARTED)
    begun = done - _BEFORE_ARMED
    if facts.source is Status.CLOSED and not facts.ours:
        return Abort("a mover that is gone had closed the source's fence", again=True)
    if begun and facts.source is not Status.CLOSED:
        return Abort("the fence opened by itself: the bound was hit before the source was sealed")
    if Step.FENCE_INSTALLED not in done or facts.source is Status.ABSENT or facts.target is not Status.SEALED:
        if begun:
            return Abort("a fence is not as it was left: somebody else is at work on it")
        return Do(Step.FENCE_INSTALLED)
    # Whether it is sealed is what the fence says, never what was noted.
    return Do(next((step for step in _UNTIL_SEAL if step not in done), Step.SEALED))


class ReturnStep(StrEnum):
    """The way back after the seal: the same, from the target to the source. `VERIFIED`: what was written on
    the target is compared before anything is closed, all rows where it is not known which were."""

    VERIFIED = "back-verified"
    ARMED = "back-armed"
    DRAINED = "back-drained"
    POSITION_READ = "back-position-read"
    POSITION_REACHED = "back-position-reached"
    TOUCHED_VERIFIED = "back-touched-verified"
    SEQUENCES_SET = "back-sequences-set"
    SEALED = "back-sealed"
    OPENED = "back-opened"


RETURN_ORDER: Final = tuple(ReturnStep)


class DoReturn(msgspec.Struct, frozen=True):
    step: ReturnStep


def next_return(done: frozenset[ReturnStep], facts: Facts) -> DoReturn | Abort | Done:
    """The same for the way back. `facts.ours`: this mover has closed the *target's* fence."""
    if facts.source is not Status.SEALED:
        if serving(facts.source, facts.target) is Serving.BOTH:
            return Abort("both sides are open: close one of them before anything else")
        return Done()
    if facts.target is Status.SEALED:
        # Either the target has been sealed on the way back, or it never was open: the source has all.
        return DoReturn(ReturnStep.OPENED)
    if facts.target is Status.CLOSED and not facts.ours:
        return Abort("a mover that is gone had closed the target's fence", again=True)
    if facts.target is Status.ABSENT:
        return Abort("the target has no fence: it cannot be closed, so nothing can be brought back from it")
    if done - {ReturnStep.VERIFIED} and facts.target is not Status.CLOSED:
        return Abort("the fence opened by itself: the bound was hit before the target was sealed")
    before = RETURN_ORDER[: RETURN_ORDER.index(ReturnStep.SEALED)]
    return DoReturn(next((step for step in before if step not in done), ReturnStep.SEALED))


class CutoverState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a cutover stands; saved after every step, so that people see it and a new mover goes on.

    Times in Unix ms are of the clock of the database that was fenced. `aborted`: why it was given up, ""
    while it is not; it may be tried again. `sealed`: the tenant's writes belong to the target.
    """

    done: tuple[Step, ...] = ()
    back: tuple[ReturnStep, ...] = ()
    attempts: int = 0
    aborted: str = ""
    closed_at_ms: int = 0
    until_ms: int = 0
    position: int = 0
    sealed: bool = False
    finished: bool = False
    returned: bool = False
    freeze_s: float | None = None
    refused: int = 0
    ended: tuple[str, ...] = ()  # sessions that were ended so that the drain came to its end
    long: tuple[str, ...] = ()  # transactions that were long open before it began
    took_s: Mapping[str, float] = MappingProxyType({})
