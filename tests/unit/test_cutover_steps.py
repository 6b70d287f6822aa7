"""Which step of a cutover is next, for everything that the databases can say."""

import itertools

import msgspec
import pytest

from fleetlift.core.tenant.cutover import (
    ORDER,
    RETURN_ORDER,
    STEPS,
    Abort,
    CutoverState,
    Do,
    Done,
    DoReturn,
    Facts,
    ReturnStep,
    Step,
    next_return,
    next_step,
    survived,
)
from fleetlift.core.tenant.fence import Serving, Status, serving

EVERY = [
    Facts(source=source, target=target, ours=ours)
    for source, target, ours in itertools.product(Status, Status, (False, True))
]


def _after(facts: Facts, step: Step) -> Facts:
    """What the databases say once a step has been done."""
    match step:
        case Step.FENCE_INSTALLED:
            source = Status.OPEN if facts.source is Status.ABSENT else facts.source
            return Facts(source=source, target=Status.SEALED, ours=facts.ours)
        case Step.ARMED:
            return Facts(source=Status.CLOSED, target=facts.target, ours=True)
        case Step.SEALED:
            return Facts(source=Status.SEALED, target=facts.target)
        case Step.OPENED:
            return Facts(source=facts.source, target=Status.OPEN)
    return facts


def _walk(done: frozenset[Step], facts: Facts) -> tuple[list[Step], Facts]:
    """Follow the decisions to the end, thawing as a mover does; the facts on the way are checked."""
    taken: list[Step] = []
    begun_open = serving(facts.source, facts.target) is Serving.BOTH
    for _ in range(60):
        match next_step(done, facts):
            case Done():
                return taken, facts
            case Abort():
                assert facts.source is not Status.SEALED
                facts = Facts(
                    source=Status.ABSENT if facts.source is Status.ABSENT else Status.OPEN,
                    target=facts.target,
                )
                done = survived(done)
            case Do(step=step):
                taken.append(step)
                facts = _after(facts, step)
                begun_open = begun_open and step is not Step.FENCE_INSTALLED
                assert begun_open or serving(facts.source, facts.target) is not Serving.BOTH
                done |= {step}
    raise AssertionError("it never ends")


def test_the_steps_are_taken_in_order() -> None:
    taken, facts = _walk(frozenset(), Facts(source=Status.ABSENT, target=Status.ABSENT))
    assert taken == list(ORDER) == [row.step for row in STEPS] == list(Step)
    assert (facts.source, facts.target) == (Status.SEALED, Status.OPEN)


@pytest.mark.parametrize("facts", EVERY, ids=lambda f: f"{f.source}-{f.target}-{f.ours}")
def test_from_everywhere_it_ends_with_one_side_serving(facts: Facts) -> None:
    for count in range(len(ORDER) + 1):
        taken, after = _walk(frozenset(ORDER[:count]), facts)
        assert after.source is Status.SEALED
        if facts.target is Status.ABSENT and facts.source is Status.SEALED:
            continue  # a target without a fence is open already
        assert after.target is Status.OPEN
        if facts.source is not Status.SEALED:
            sealed = taken.index(Step.SEALED)
            assert taken.index(Step.OPENED) > sealed
            if Step.ARMED in taken:
                armed = max(n for n, step in enumerate(taken) if step is Step.ARMED)
                assert taken[armed:sealed] == list(ORDER[ORDER.index(Step.ARMED) : ORDER.index(Step.SEALED)])
            else:  # this very mover still holds the fence closed
                assert facts.ours
                assert facts.source is Status.CLOSED


def test_the_target_opens_only_beside_a_sealed_source() -> None:
    for facts in EVERY:
        for count in range(len(ORDER) + 1):
            if next_step(frozenset(ORDER[:count]), facts) == Do(Step.OPENED):
                assert facts.source is Status.SEALED


def test_a_fence_that_has_opened_by_itself_ends_the_attempt() -> None:
    done = frozenset(ORDER[: ORDER.index(Step.POSITION_REACHED)])
    assert isinstance(next_step(done, Facts(source=Status.OPEN, target=Status.SEALED, ours=True)), Abort)


def test_what_a_mover_only_knew_is_done_again() -> None:
    assert survived(frozenset(Step)) == {Step.FENCE_INSTALLED, Step.REVERSE_PREPARED}


def test_the_way_back_is_taken_in_order_and_never_guesses() -> None:
    facts, done = Facts(source=Status.SEALED, target=Status.OPEN), frozenset[ReturnStep]()
    taken = []
    while isinstance(said := next_return(done, facts), DoReturn):
        taken.append(said.step)
        done |= {said.step}
        match said.step:
            case ReturnStep.ARMED:
                facts = Facts(source=Status.SEALED, target=Status.CLOSED, ours=True)
            case ReturnStep.SEALED:
                facts = Facts(source=Status.SEALED, target=Status.SEALED)
            case ReturnStep.OPENED:
                facts = Facts(source=Status.OPEN, target=Status.SEALED)
    assert taken == list(RETURN_ORDER)
    assert said == Done()


@pytest.mark.parametrize("facts", EVERY, ids=lambda f: f"{f.source}-{f.target}-{f.ours}")
def test_the_source_opens_again_only_beside_a_sealed_target(facts: Facts) -> None:
    for count in range(len(RETURN_ORDER) + 1):
        if next_return(frozenset(RETURN_ORDER[:count]), facts) == DoReturn(ReturnStep.OPENED):
            assert (facts.source, facts.target) == (Status.SEALED, Status.SEALED)


def test_a_state_survives_being_saved() -> None:
    state = CutoverState(done=(Step.FENCE_INSTALLED,), aborted="bound", took_s={"armed": 0.1}, freeze_s=0.2)
    assert msgspec.json.decode(msgspec.json.encode(state), type=CutoverState) == state
