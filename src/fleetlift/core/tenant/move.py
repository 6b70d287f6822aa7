"""What a tenant's move does next: `decide(plan, state, seen, now)`, a pure function.

A move goes through its plan's steps one after the other. What a step does is work that may be killed at any
moment and started again; this file says only which work is wanted now (`Decision.want`), from what the work
reports, what gates show and what people ask for. The state that comes out is committed before the work is
started or stopped.

What never happens here, whatever comes in: a step begins before the one before it is done; a wave grows
without its gates measured and held; work goes on while a breach is open; the way back is offered when the
reverse stream is broken and the database has been switched.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from fleetlift.core.gates import judge
from fleetlift.core.migration import AuditEntry, GateResult, Phase, Request, RequestKind, Sample, Verdict
from fleetlift.core.plan import OnBreach
from fleetlift.core.tenant.plan import (
    SwitchDatabase,
    SwitchDns,
    TenantPlan,
    gates_of_step,
    step_name,
    wave_name,
    waves_of,
)
from fleetlift.core.units import format_duration


class StepPhase(StrEnum):
    WAITING = "waiting"
    WORKING = "working"
    BAKING = "baking"  # the work is done, its gates are watched
    AWAITING_APPROVAL = "awaiting-approval"
    DONE = "done"
    UNDOING = "undoing"
    UNDONE = "undone"


class StepEvent(StrEnum):
    BEGUN = "begun"
    WORKED = "worked"
    HELD_UP = "held-up"  # gates held for the bake; a person must approve
    PASSED = "passed"
    NEXT_WAVE = "next-wave"
    GOING_BACK = "going-back"
    BACK = "back"
    RESTARTED = "restarted"


MOVES: Final[Mapping[StepPhase, Mapping[StepEvent, StepPhase]]] = MappingProxyType(
    {
        StepPhase.WAITING: {StepEvent.BEGUN: StepPhase.WORKING},
        StepPhase.WORKING: {StepEvent.WORKED: StepPhase.BAKING, StepEvent.GOING_BACK: StepPhase.UNDOING},
        StepPhase.BAKING: {
            StepEvent.HELD_UP: StepPhase.AWAITING_APPROVAL,
            StepEvent.NEXT_WAVE: StepPhase.WORKING,
            StepEvent.PASSED: StepPhase.DONE,
            StepEvent.GOING_BACK: StepPhase.UNDOING,
            StepEvent.RESTARTED: StepPhase.WORKING,
        },
        StepPhase.AWAITING_APPROVAL: {
            StepEvent.NEXT_WAVE: StepPhase.WORKING,
            StepEvent.PASSED: StepPhase.DONE,
            StepEvent.GOING_BACK: StepPhase.UNDOING,
            StepEvent.RESTARTED: StepPhase.WORKING,
        },
        StepPhase.DONE: {StepEvent.GOING_BACK: StepPhase.UNDOING},
        StepPhase.UNDOING: {StepEvent.BACK: StepPhase.UNDONE},
        StepPhase.UNDONE: {StepEvent.RESTARTED: StepPhase.WAITING},
    }
)
"""Every legal move of a step; nothing else assigns its phase."""

TOUCHED: Final = frozenset(
    {StepPhase.WORKING, StepPhase.BAKING, StepPhase.AWAITING_APPROVAL, StepPhase.DONE, StepPhase.UNDOING}
)
"""Phases of a step that has left something that a way back must undo."""


class StepState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step. `facts` is what its work has to remember across a kill; `figures` what it shows."""

    phase: StepPhase = StepPhase.WAITING
    wave: int = 0
    text: str = ""
    figures: Mapping[str, Any] = {}
    facts: Mapping[str, Any] = {}
    started_at: float | None = None
    ended_at: float | None = None
    bake_started_at: float | None = None
    unmeasured_since: float | None = None


class MoveState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a tenant's move. `rung` is the number of the open step, counted from 1."""

    name: str
    phase: Phase = Phase.RUNNING
    rung: int = 1
    steps: tuple[StepState, ...] = ()
    reason: str = ""
    reverts: int = 0
    approved: bool = False
    way_back: str = ""  # why there is none, while the database is switched; "": there is one
    cleaned: bool = False  # after a release: nothing of the move is left on either side
    clean_error: str = ""  # why not, as last noted

    @property
    def step(self) -> int:
        return self.rung - 1


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Work to be done: that of a step (a wave of it), or what takes it back."""

    step: int
    wave: int = 0
    undo: bool = False


CLEAN: Final = Work(step=-1)
"""The work of a release: nothing of the move stays on either side."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How the work stands that is under way, or has ended since the last round."""

    work: Work
    done: bool = False
    error: str = ""  # it cannot go on: what happened and what to do
    text: str = ""
    figures: Mapping[str, Any] = {}


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision may rest on. `samples`: one a gate of the open step, by its text.

    `stream_error`: why following (before the switch) or the reverse stream (after it) cannot go on.
    `source_changed`: how the source's schema differs from the one that was copied.
    """

    requests: tuple[Request, ...] = ()
    report: Report | None = None
    samples: Mapping[str, Sample] = MappingProxyType({})
    stream_error: str = ""
    source_changed: str = ""


class MoveDecision(msgspec.Struct, frozen=True, kw_only=True):
    state: MoveState
    want: Work | None
    audit: tuple[AuditEntry, ...] = ()
    answered: tuple[int, ...] = ()
    gates: tuple[GateResult, ...] = ()


def begin(plan: TenantPlan) -> MoveState:
    """The state of a move that has not touched anything yet."""
    return MoveState(name=plan.name, steps=tuple(StepState() for _ in plan.steps))


def switched(plan: TenantPlan, state: MoveState) -> bool:
    """Whether the target may have taken writes: the database step has begun and is not taken back."""
    return any(
        isinstance(step, SwitchDatabase) and bool(one.facts.get("sealed"))
        for step, one in zip(plan.steps, state.steps, strict=False)
    )


def decide(plan: TenantPlan, state: MoveState, seen: Seen, now: float) -> MoveDecision:
    """The next state, the work that is wanted, and what to note. Equal arguments give equal decisions."""
    return _Deciding(plan, state, seen, now).run()


class _Deciding:
    def __init__(self, plan: TenantPlan, state: MoveState, seen: Seen, now: float) -> None:
        self.plan, self.state, self.seen, self.now = plan, state, seen, now
        self.audit: list[AuditEntry] = []
        self.answered: list[int] = []
        self.gates: tuple[GateResult, ...] = ()

    def run(self) -> MoveDecision:
        self._watch_stream()
        self._take_report()
        self._watch_source()
        for request in self.seen.requests:
            self._answer(request)
        if self.state.phase is Phase.RUNNING:
            self._go_on()
        elif self.state.phase is Phase.REVERTING:
            self._go_back()
        return MoveDecision(
            state=self.state,
            want=self._want(),
            audit=tuple(self.audit),
            answered=tuple(self.answered),
            gates=self.gates,
        )

    # -- helpers -----------------------------------------------------------------------------------------

    def note(self, kind: str, text: str, actor: str = "controller", **evidence: Any) -> None:
        self.audit.append(AuditEntry(kind=kind, text=text, actor=actor, evidence=evidence))

    def change(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def put(self, index: int, event: StepEvent | None = None, **changes: Any) -> StepState:
        """Change a step; its phase by `event` and the table alone."""
        before = self.state.steps[index]
        if event is not None:
            changes["phase"] = MOVES[before.phase][event]
        after = replace(before, **changes)
        steps = list(self.state.steps)
        steps[index] = after
        self.change(steps=tuple(steps))
        return after

    @property
    def at(self) -> int:
        return self.state.step

    @property
    def open(self) -> StepState:
        return self.state.steps[self.at]

    def _want(self) -> Work | None:
        match self.state.phase:
            case Phase.RUNNING if self.open.phase is StepPhase.WORKING:
                return Work(step=self.at, wave=self.open.wave)
            case Phase.REVERTING if self.open.phase is StepPhase.UNDOING:
                return Work(step=self.at, wave=self.open.wave, undo=True)
            case Phase.RELEASED if not self.state.cleaned:
                return CLEAN
        return None

    # -- what is seen ------------------------------------------------------------------------------------

    def _watch_stream(self) -> None:
        error = self.seen.stream_error
        taking_back = self.state.phase is Phase.REVERTING and isinstance(
            self.plan.steps[self.at], SwitchDatabase
        )
        if taking_back:
            return  # that work looks after the stream: not to hear of an error does not open the way back
        if switched(self.plan, self.state) or self.state.phase is Phase.FINISHED:
            if error != self.state.way_back:
                self.change(way_back=error)
                if error:
                    self.note("way_back_closed", f"the way back is closed: {error}", stream=error)
                else:
                    self.note("way_back_open", "the way back is open again")
        elif error and self.state.phase is Phase.RUNNING:
            self._hold(f"following the source has stopped: {error}", "follow_stopped")

    def _watch_source(self) -> None:
        changed = self.seen.source_changed
        if changed and self.state.phase is Phase.RUNNING and not switched(self.plan, self.state):
            self._hold(changed, "source_changed")

    def _take_report(self) -> None:
        report = self.seen.report
        if report is None:
            return
        if report.work == CLEAN:
            if report.done:
                self.change(cleaned=True)
                self.note("move_cleaned", report.text, **report.figures)
            elif report.error and report.error != self.state.clean_error:
                self.change(clean_error=report.error)
                self.note("clean_failed", f"not everything could be removed yet: {report.error}")
            return
        at = report.work.step
        if not 0 <= at < len(self.state.steps) or report.work != self._want():
            return
        one = self.put(at, text=report.text or self.state.steps[at].text, figures=dict(report.figures))
        name = wave_name(self.plan.steps[at], one.wave)
        if report.work.undo:
            if report.done:
                self.put(at, StepEvent.BACK, ended_at=self.now)
                self.note("step_undone", f"{name}: taken back", **one.figures)
            elif report.error:
                self._hold(f"{name} could not be taken back: {report.error}", "undo_failed")
        elif report.done:
            self.put(at, StepEvent.WORKED, bake_started_at=self.now, unmeasured_since=None)
            self.note("step_worked", f"{name}: {report.text}" if report.text else name, **one.figures)
        elif report.error:
            self._hold(f"{name}: {report.error}", "step_failed")

    def _hold(self, reason: str, kind: str, **evidence: Any) -> None:
        self.change(phase=Phase.HELD, reason=reason)
        self.note(kind, reason, **evidence)

    # -- onwards -----------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        one = self.open
        step = self.plan.steps[self.at]
        if one.phase is StepPhase.WAITING:
            self.put(self.at, StepEvent.BEGUN, started_at=self.now, wave=0, text="", figures={})
            self.note("step_begun", wave_name(step, 0), step=self.at)
            return
        if one.phase not in (StepPhase.BAKING, StepPhase.AWAITING_APPROVAL):
            return
        if not self._gates_hold():
            return
        assert one.bake_started_at is not None
        bake_s = step.bake_s if isinstance(step, SwitchDns) else 0.0
        if one.phase is StepPhase.BAKING:
            if self.now - one.bake_started_at < bake_s:
                return
            if isinstance(step, SwitchDns) and step.approve and not self.state.approved:
                self.put(self.at, StepEvent.HELD_UP)
                self.note("approval_awaited", f"{wave_name(step, one.wave)}: waits for approval")
                return
        elif not self.state.approved:
            return
        self.change(approved=False)
        if one.wave + 1 < waves_of(step):
            self.put(self.at, StepEvent.NEXT_WAVE, wave=one.wave + 1, bake_started_at=None)
            self.note("wave_opened", wave_name(step, one.wave + 1), step=self.at, wave=one.wave + 1)
            return
        self.put(self.at, StepEvent.PASSED, ended_at=self.now)
        self.note("step_done", f"{step_name(step)}: done", step=self.at, **self.open.figures)
        if self.at + 1 < len(self.plan.steps):
            self.change(rung=self.state.rung + 1)
        else:
            self.change(phase=Phase.FINISHED, reason="")
            self.note("migration_finished", "the tenant has moved; `release` gives up the way back")

    def _gates_hold(self) -> bool:
        """Judge the open step's gates; a breach holds the move, or sends it back."""
        step, one = self.plan.steps[self.at], self.open
        gates = gates_of_step(step)
        self.gates = tuple(judge(gate, self.seen.samples.get(gate.text)) for gate in gates)
        breached = [result for result in self.gates if result.verdict is Verdict.REVERT]
        missing = [result for result in self.gates if result.missing]
        if missing:
            since = one.unmeasured_since if one.unmeasured_since is not None else self.now
            if one.unmeasured_since is None:
                self.put(self.at, unmeasured_since=self.now)
            allowed_s = step.no_data_after_s if isinstance(step, SwitchDns) else 60.0
            if self.now - since > allowed_s:
                breached = missing
        elif one.unmeasured_since is not None:
            self.put(self.at, unmeasured_since=None)
        if not breached:
            return all(result.verdict is Verdict.ADVANCE for result in self.gates)
        first = breached[0]
        why = f"{first.gate}: {first.why}"
        name = wave_name(step, one.wave)
        self.note("gate_breached", f"{name}: {why}", gates={r.gate: r.why for r in breached}, step=self.at)
        reason = f"gate breached: {why}"
        if self.plan.on_breach is OnBreach.REVERT and isinstance(step, SwitchDns):
            if not self._no_way_back:
                self._turn_back(reason, "controller")
                return False
            # Names alone would lead devices to a database that takes nothing from them any more.
            reason += f"; it does not go back by itself, for the way back is closed: {self._no_way_back}"
        self.change(phase=Phase.HELD, reason=reason)
        return False

    # -- back --------------------------------------------------------------------------------------------

    @property
    def _no_way_back(self) -> str:
        """Why what was written on the target could not be brought back, or ""."""
        return self.state.way_back if switched(self.plan, self.state) else ""

    def _turn_back(self, reason: str, actor: str) -> None:
        self.change(phase=Phase.REVERTING, reason=reason, reverts=self.state.reverts + 1, approved=False)
        self.note("migration_reverting", f"going back: {reason}", actor)

    def _go_back(self) -> None:
        touched = [i for i, one in enumerate(self.state.steps) if one.phase in TOUCHED]
        if not touched:
            self.change(phase=Phase.REVERTED, rung=1, way_back="")
            self.note("migration_reverted", "reverted: the source serves as before")
            return
        last = touched[-1]
        self.change(rung=last + 1)
        if self.open.phase is not StepPhase.UNDOING:
            self.put(last, StepEvent.GOING_BACK)

    # -- people ------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> None:
        may = _MAY.get(request.kind, frozenset())
        if self.state.phase in may:
            refusal = _HANDLERS[request.kind](self, request)
        elif not may:
            refusal = f"a tenant's move knows no {request.kind}"
        else:
            refusal = f"the migration is {self.state.phase}"
        if refusal is not None:
            text = f"{request.kind} refused: {refusal}"
            self.note("request_refused", text, request.actor, args=request.args)
        self.answered.append(request.id)


def _pause(d: _Deciding, request: Request) -> str | None:
    at = d.open
    if isinstance(d.plan.steps[d.at], SwitchDatabase) and at.phase is StepPhase.WORKING:
        return "the database is being switched, which is bounded by itself: wait for it, or revert"
    d.change(phase=Phase.PAUSED, reason=f"paused by {request.actor}")
    d.note("migration_paused", f"paused by {request.actor}; changes are still followed", request.actor)
    return None


def _resume(d: _Deciding, request: Request) -> str | None:
    before = d.state.phase
    if any(request.args):
        return "a tenant's move has no devices to resume"
    if before is Phase.REVERTED:
        for index, one in enumerate(d.state.steps):
            if one.phase is StepPhase.UNDONE:
                d.put(index, StepEvent.RESTARTED, wave=0, facts={}, figures={}, text="", ended_at=None)
        d.change(rung=1)
    reverting = any(one.phase is StepPhase.UNDOING for one in d.state.steps)
    d.change(phase=Phase.REVERTING if reverting and before is Phase.HELD else Phase.RUNNING, reason="")
    if d.state.phase is Phase.RUNNING and d.open.phase in (StepPhase.BAKING, StepPhase.AWAITING_APPROVAL):
        if isinstance(d.plan.steps[d.at], SwitchDns):
            d.put(d.at, bake_started_at=d.now, unmeasured_since=None)
        else:  # its gates did not hold: the work is done again
            d.put(d.at, StepEvent.RESTARTED, bake_started_at=None, unmeasured_since=None)
    d.note("migration_resumed", f"resumed by {request.actor}; it was {before}", request.actor, was=before)
    return None


def _approve(d: _Deciding, request: Request) -> str | None:
    if d.open.phase is not StepPhase.AWAITING_APPROVAL:
        return "no wave waits for approval"
    d.change(approved=True)
    d.note(
        "wave_approved",
        f"{wave_name(d.plan.steps[d.at], d.open.wave)} approved by {request.actor}",
        request.actor,
    )
    return None


def _revert(d: _Deciding, request: Request) -> str | None:
    if request.args.get("device") or request.args.get("wave"):
        return "a tenant goes back as a whole"
    if d._no_way_back:
        return f"there is no way back that loses nothing: {d._no_way_back}"
    d._turn_back(f"reverted by {request.actor}", request.actor)
    return None


def _release(d: _Deciding, request: Request) -> str | None:
    d.change(phase=Phase.RELEASED, reason=f"released by {request.actor}")
    d.note("migration_released", f"released by {request.actor}: there is no way back any more", request.actor)
    return None


def _amend(d: _Deciding, request: Request) -> str | None:
    steps = d.state.steps[: len(d.plan.steps)]
    more = len(d.plan.steps) - len(steps)
    d.change(steps=(*steps, *(StepState() for _ in range(more))))
    d.note("plan_amended", f"plan amended by {request.actor}", request.actor)
    return None


_BEFORE: Final = frozenset({Phase.RUNNING, Phase.PAUSED, Phase.HELD})
_MAY: Final[Mapping[RequestKind, frozenset[Phase]]] = MappingProxyType(
    {
        RequestKind.PAUSE: frozenset({Phase.RUNNING}),
        RequestKind.RESUME: frozenset({Phase.PAUSED, Phase.HELD, Phase.REVERTED}),
        RequestKind.APPROVE: _BEFORE,
        RequestKind.REVERT: _BEFORE | {Phase.FINISHED},
        RequestKind.RELEASE: frozenset({Phase.FINISHED, Phase.REVERTED}),
        RequestKind.AMEND: _BEFORE,
    }
)
_HANDLERS: Final[Mapping[RequestKind, Callable[[_Deciding, Request], str | None]]] = MappingProxyType(
    {
        RequestKind.PAUSE: _pause,
        RequestKind.RESUME: _resume,
        RequestKind.APPROVE: _approve,
        RequestKind.REVERT: _revert,
        RequestKind.RELEASE: _release,
        RequestKind.AMEND: _amend,
    }
)


def bake_left_s(plan: TenantPlan, state: MoveState, now: float) -> float | None:
    """How long the open wave is still watched, when it is."""
    step, one = plan.steps[state.step], state.steps[state.step]
    if not isinstance(step, SwitchDns) or one.bake_started_at is None:
        return None
    return max(one.bake_started_at + step.bake_s - now, 0.0)


def describe(plan: TenantPlan, state: MoveState, now: float) -> str:
    """One line of where the move stands."""
    step, one = plan.steps[state.step], state.steps[state.step]
    left = bake_left_s(plan, state, now)
    tail = f"; watched for {format_duration(left)} more" if left else ""
    return f"{wave_name(step, one.wave)}: {one.text or one.phase}{tail}"
