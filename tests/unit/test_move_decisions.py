"""What a tenant's move does next: steps in order, nothing without its gates, a way back at any point."""

import dataclasses

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.core.gates import parse_gate
from fleetlift.core.migration import Phase, Request, RequestKind, Sample
from fleetlift.core.plan import OnBreach
from fleetlift.core.tenant.move import (
    CLEAN,
    MOVES,
    MoveDecision,
    MoveState,
    Report,
    Seen,
    StepPhase,
    Work,
    begin,
    decide,
)
from fleetlift.core.tenant.plan import (
    Copy,
    Database,
    Drain,
    Freeze,
    Front,
    Record,
    SwitchDatabase,
    SwitchDns,
    TenantPlan,
    Validate,
)
from fleetlift.core.units import Share

SILENT = parse_gate("devices.silent == 0")
ERRORS = parse_gate("load.errors == 0")
GOOD = Sample(value=0.0, n=10)
BAD = Sample(value=3.0, n=10)

PLAN = TenantPlan(
    name="acme",
    tenant="acme",
    source=Database(url="postgresql://a/x"),
    target=Database(url="postgresql://b/x"),
    old=Front(),
    new=Front(),
    steps=(
        Copy(root="customers.id = 42"),
        Validate(scenario="peak.yaml", for_s=10.0, gates=(ERRORS,)),
        Freeze(features=("registration",), at_most_s=60.0),
        SwitchDatabase(),
        SwitchDns(
            records=(Record(name="iot.example.com"), Record(name="pool.example.com", pool=True)),
            waves=("test-pool", Share(percent=100.0)),
            bake_s=5.0,
            gates=(SILENT,),
        ),
        Drain(),
    ),
)
COPY, VALIDATE, FREEZE, DATABASE, DNS, DRAIN = range(6)


@dataclasses.dataclass
class World:
    """A mover of few words: whatever work is wanted is done in the next round."""

    plan: TenantPlan = PLAN
    state: MoveState = dataclasses.field(default_factory=lambda: begin(PLAN))
    now: float = 1000.0
    sample: Sample | None = GOOD
    done: list[Work] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)
    asked: int = 0

    def round(self, *requests: Request, report: Report | None = None, stream_error: str = "") -> MoveDecision:
        samples = {} if self.sample is None else {SILENT.text: self.sample, ERRORS.text: self.sample}
        seen = Seen(requests=requests, report=report, samples=samples, stream_error=stream_error)
        decision = decide(self.plan, self.state, seen, self.now)
        self.state = decision.state
        self.kinds += [entry.kind for entry in decision.audit]
        self.now += 1.0
        return decision

    def ask(self, kind: RequestKind, **args: object) -> MoveDecision:
        self.asked += 1
        return self.round(Request(id=self.asked, kind=kind, actor="ops", at=self.now, args=dict(args)))

    def work(self, rounds: int = 100, *, upto: int | None = None) -> None:
        """Do what is wanted until nothing is, or step `upto` is being worked on."""
        want = self.round().want
        for _ in range(rounds):
            if want is not None and upto is not None and want.step == upto and not want.undo:
                return
            if want is None:
                if self.state.phase is not Phase.RUNNING and self.state.phase is not Phase.REVERTING:
                    return
                want = self.round().want
                continue
            self.done.append(want)
            if want.step == DATABASE:
                self.facts(DATABASE, sealed=not want.undo)
            want = self.round(report=Report(work=want, done=True, text="did it")).want

    def facts(self, at: int, **facts: object) -> None:
        steps = list(self.state.steps)
        steps[at] = replace(steps[at], facts=facts)
        self.state = replace(self.state, steps=tuple(steps))


def test_a_move_goes_through_its_steps_in_their_order() -> None:
    world = World()
    world.work()
    assert world.state.phase is Phase.FINISHED
    assert world.done == [
        Work(step=COPY),
        Work(step=VALIDATE),
        Work(step=FREEZE),
        Work(step=DATABASE),
        Work(step=DNS, wave=0),
        Work(step=DNS, wave=1),
        Work(step=DRAIN),
    ]
    assert all(step.phase is StepPhase.DONE for step in world.state.steps)


def test_a_wave_of_names_waits_for_its_bake() -> None:
    world = World()
    world.work(upto=DNS)
    world.round(report=Report(work=Work(step=DNS), done=True))
    before = world.now
    while world.state.steps[DNS].wave == 0:
        world.round()
    assert world.now - before >= 5.0


def test_missing_data_holds_and_then_breaches() -> None:
    """A gate that measures nothing never passes; after its time it is a breach, and everything goes back."""
    world = World(sample=None)
    world.state = World().state
    world.sample = GOOD
    world.work(upto=DNS)
    world.sample = None
    world.round(report=Report(work=Work(step=DNS), done=True))
    for _ in range(30):
        world.round()
    assert world.state.steps[DNS].phase is StepPhase.BAKING
    world.work(rounds=300)
    assert world.state.phase is Phase.REVERTED
    assert "gate_breached" in world.kinds


def test_a_breach_takes_every_step_back_in_reverse() -> None:
    world = World()
    world.work(upto=DNS)
    world.done.clear()
    world.sample = BAD
    world.round(report=Report(work=Work(step=DNS), done=True))
    world.work()
    assert world.state.phase is Phase.REVERTED
    assert [work.step for work in world.done] == [DNS, DATABASE, FREEZE, VALIDATE, COPY]
    assert all(work.undo for work in world.done)


def test_on_breach_hold_leaves_it_to_a_person() -> None:
    world = World(plan=replace(PLAN, on_breach=OnBreach.HOLD))
    world.work(upto=DNS)
    world.sample = BAD
    decision = world.round(report=Report(work=Work(step=DNS), done=True))
    decision = world.round()
    assert world.state.phase is Phase.HELD
    assert decision.want is None


def test_a_failed_load_test_holds_and_is_done_again_when_resumed() -> None:
    world = World()
    world.work(upto=VALIDATE)
    world.sample = BAD
    world.round(report=Report(work=Work(step=VALIDATE), done=True))
    world.round()
    assert world.state.phase is Phase.HELD
    world.sample = GOOD
    decision = world.ask(RequestKind.RESUME)
    assert decision.want == Work(step=VALIDATE)


def test_work_that_fails_holds_the_move_with_its_reason() -> None:
    world = World()
    world.work(upto=COPY)
    decision = world.round(report=Report(work=Work(step=COPY), error="the target's disk is full"))
    assert world.state.phase is Phase.HELD
    assert "disk is full" in world.state.reason
    assert decision.want is None
    assert world.ask(RequestKind.RESUME).want == Work(step=COPY)


@pytest.mark.parametrize("upto", [COPY, VALIDATE, FREEZE, DATABASE, DNS, DRAIN])
def test_a_revert_at_any_step_undoes_what_was_done_and_no_more(upto: int) -> None:
    world = World()
    world.work(upto=upto)
    world.done.clear()
    world.ask(RequestKind.REVERT)
    world.work()
    assert world.state.phase is Phase.REVERTED
    assert [work.step for work in world.done] == list(range(upto, -1, -1))


def test_a_move_that_went_back_begins_anew() -> None:
    world = World()
    world.work(upto=DNS)
    world.ask(RequestKind.REVERT)
    world.work()
    world.done.clear()
    decision = world.ask(RequestKind.RESUME)
    assert decision.state.phase is Phase.RUNNING
    world.work()
    assert world.state.phase is Phase.FINISHED
    assert [work.step for work in world.done] == [0, 1, 2, 3, 4, 4, 5]


def test_without_a_reverse_stream_there_is_no_way_back_and_it_says_so() -> None:
    """I17: when what flows back breaks, the way back is closed at once, and open again with it."""
    world = World()
    world.work()
    world.round(stream_error="the slot is lost")
    assert world.state.way_back == "the slot is lost"
    world.round(
        Request(id=1, kind=RequestKind.REVERT, actor="ops", at=world.now), stream_error="the slot is lost"
    )
    assert world.state.phase is Phase.FINISHED
    assert world.kinds[-1] == "request_refused"
    world.round()
    assert world.state.way_back == ""


def test_a_breach_with_the_way_back_closed_holds_and_takes_no_names_back() -> None:
    """They would lead devices to a database that takes nothing from them any more."""
    world = World()
    world.work(upto=DNS)
    world.round(report=Report(work=Work(step=DNS), done=True))
    world.sample = BAD
    decision = world.round(stream_error="the slot is lost")
    assert decision.want is None
    assert world.state.phase is Phase.HELD
    assert "devices.silent" in world.state.reason and "the slot is lost" in world.state.reason
    assert world.state.way_back == "the slot is lost"


def test_the_way_back_is_not_said_to_be_open_while_it_is_gone() -> None:
    """Its own work looks after the stream, so that no error is heard of; gone, there is none to be closed."""
    world = World()
    world.work(upto=DNS)
    world.ask(RequestKind.REVERT)
    world.round(report=Report(work=Work(step=DNS, undo=True), done=True), stream_error="the target is away")
    assert world.round().want == Work(step=DATABASE, undo=True)
    assert world.state.way_back == "the target is away"
    assert "way_back_open" not in world.kinds
    world.work()
    assert world.state.phase is Phase.REVERTED
    assert world.state.way_back == ""


def test_a_stream_that_stops_before_the_switch_holds_the_move() -> None:
    world = World()
    world.work(upto=FREEZE)
    decision = world.round(stream_error="table device was truncated")
    assert world.state.phase is Phase.HELD
    assert decision.want is None


def test_a_source_that_was_changed_holds_the_move_before_the_switch_only() -> None:
    """What the work has done is kept; once the target has the writes the source's schema holds nothing up."""
    world = World()
    world.work(upto=FREEZE)
    report = Report(work=Work(step=FREEZE), done=True)
    decision = decide(world.plan, world.state, Seen(report=report, source_changed="a new table"), world.now)
    assert (decision.state.phase, decision.state.reason) == (Phase.HELD, "a new table")
    assert decision.state.steps[FREEZE].phase is StepPhase.BAKING
    assert decision.want is None
    world.work()
    after = decide(world.plan, world.state, Seen(source_changed="a new table"), world.now)
    assert after.state.phase is Phase.FINISHED


def test_the_switch_of_the_database_cannot_be_paused() -> None:
    world = World()
    world.work(upto=DATABASE)
    world.ask(RequestKind.PAUSE)
    assert world.state.phase is Phase.RUNNING
    assert world.kinds[-1] == "request_refused"


def test_a_pause_stops_the_work_and_resume_wants_it_again() -> None:
    world = World()
    world.work(upto=COPY)
    assert world.ask(RequestKind.PAUSE).want is None
    assert world.ask(RequestKind.RESUME).want == Work(step=COPY)


def test_approval_is_waited_for() -> None:
    steps = list(PLAN.steps)
    dns = steps[DNS]
    assert isinstance(dns, SwitchDns)
    steps[DNS] = replace(dns, approve=True)
    world = World(plan=replace(PLAN, steps=tuple(steps)))
    world.work(upto=DNS)
    world.round(report=Report(work=Work(step=DNS), done=True))
    for _ in range(20):
        world.round()
    assert world.state.steps[DNS].phase is StepPhase.AWAITING_APPROVAL
    world.ask(RequestKind.APPROVE)
    assert world.round().want == Work(step=DNS, wave=1)


def test_a_release_cleans_and_is_over() -> None:
    world = World()
    world.work()
    assert world.ask(RequestKind.RELEASE).want == CLEAN
    for why in ("the source is away", "the source is away", "a slot is in use"):
        assert world.round(report=Report(work=CLEAN, error=why)).want == CLEAN
    assert world.kinds.count("clean_failed") == 2, "a reason is noted once, however often it is tried"
    assert world.round(report=Report(work=CLEAN, done=True, text="nothing is left")).want is None
    assert world.state.cleaned


def test_a_late_report_of_other_work_changes_nothing() -> None:
    world = World()
    world.work(upto=FREEZE)
    before = world.state
    world.round(report=Report(work=Work(step=COPY), done=True))
    world.round(report=Report(work=Work(step=DNS, wave=1), done=True))
    assert world.state == before


def test_the_way_back_that_fails_is_held_and_goes_on_backwards() -> None:
    world = World()
    world.work(upto=DNS)
    world.ask(RequestKind.REVERT)
    want = world.round().want
    assert want == Work(step=DNS, undo=True)
    world.round(report=Report(work=want, error="the name server refuses"))
    assert world.state.phase is Phase.HELD
    assert world.ask(RequestKind.RESUME).want == want


def test_final_rows_and_every_phase_are_in_the_table() -> None:
    assert set(MOVES) == set(StepPhase)


@settings(max_examples=300)
@given(st.data())
def test_whatever_comes_no_step_begins_before_the_one_before_it_is_done(data: st.DataObject) -> None:
    """Random reports, requests, samples and stream errors; and the state survives its way to the database."""
    world = World()
    for number in range(60):
        what = data.draw(st.sampled_from(["done", "fail", "none", "request", "stream", "sample"]))
        want = decide(world.plan, world.state, Seen(), world.now).want
        if what == "done" and want is not None:
            world.facts(want.step, sealed=not want.undo) if want.step == DATABASE else None
            world.round(report=Report(work=want, done=True))
        elif what == "fail" and want is not None:
            world.round(report=Report(work=want, error="no"))
        elif what == "request":
            kind = data.draw(st.sampled_from(list(RequestKind)))
            world.round(Request(id=number, kind=kind, actor="x", at=world.now))
        elif what == "stream":
            world.round(stream_error="broken")
        elif what == "sample":
            world.sample = data.draw(st.sampled_from([GOOD, BAD, None]))
            world.round()
        else:
            world.round()
        coded = msgspec.json.encode(world.state)
        assert msgspec.json.decode(coded, type=MoveState) == world.state
        open_ = [i for i, one in enumerate(world.state.steps) if one.phase is not StepPhase.DONE]
        for index, one in enumerate(world.state.steps):
            if one.phase in (StepPhase.WORKING, StepPhase.BAKING, StepPhase.DONE):
                before = [i for i in open_ if i < index]
                assert not before, "a step is under way though an earlier one is not done"
        if world.state.phase is Phase.REVERTED:
            assert all(one.phase in (StepPhase.WAITING, StepPhase.UNDONE) for one in world.state.steps)
