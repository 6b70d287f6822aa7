"""Goes through an audit log again and says where it tells of what a migration never does.

Every verdict is computed again from its sample, every wave's share from the plan that held, and each step has
to be one that `decide` takes: opened, moved, baked long enough, every gate held, approved where the plan asks
for it. What is no step of waves or phases (devices that joined, stragglers, refusals) is passed over.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec

from fleetlift.core.chain import Link, read_time
from fleetlift.core.decide import always_watched
from fleetlift.core.errors import Conflict
from fleetlift.core.evidence import judge_again
from fleetlift.core.migration import Phase, Sample, Verdict
from fleetlift.core.plan import OnBreach, Plan, Rung, check_amendment, ladder
from fleetlift.core.units import format_duration
from fleetlift.core.waves import approved

ROUNDING_S: Final = 0.001  # moments are written to the microsecond


class Stage(StrEnum):
    """How far the open wave is."""

    NONE = "not open"
    MOVING = "moving"
    BAKING = "baking"
    WAITING = "waiting for approval"
    BACK = "going back"


class About(StrEnum):
    """What a problem is about."""

    PLAN = "plan"
    GATES = "gates"
    SHARES = "shares"
    ORDER = "order"


class _Noted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gate's verdict as the audit log keeps it."""

    gate: str
    verdict: Verdict
    why: str
    missing: bool
    sample: Sample


_Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]


class _Place(msgspec.Struct, frozen=True, kw_only=True):
    rung: _Count
    wave: _Count


class _Share(msgspec.Struct, frozen=True, kw_only=True):
    fleet: _Count
    limit: _Count
    raised: _Count
    told: _Count = 0


_OPEN: Final = (Stage.MOVING, Stage.BAKING, Stage.WAITING)
# A wave whose devices were all taken out while they moved is opened again, or skipped when that adds none.
_NEXT: Final = (Stage.NONE, Stage.MOVING)
_ENDED: Final = (Phase.FINISHED, Phase.REVERTED)


class Retrace:
    """The state of a migration as its audit log alone tells it, and what does not fit."""

    def __init__(self, plans: Sequence[tuple[str, Plan]]) -> None:
        """`plans`: each version in turn, with the SHA-256 of its text. There is at least one."""
        self._plans = list(plans)
        self._version = 0
        self._rungs = ladder(plans[0][1])
        self.phase = Phase.RUNNING
        self.rung, self.wave, self.stage = 1, 0, Stage.NONE
        self.verdicts = 0  # computed again
        self.passed = 0
        self.raised: dict[int, int] = {}  # the most devices that a wave has brought to a rung (or higher)
        self.problems: dict[About, list[str]] = defaultdict(list)
        self._baked_from = 0.0
        self._approved = False
        self._done = False  # the last wave has passed
        self._now = ""
        self._entry: Link

    @property
    def plan(self) -> Plan:
        return self._plans[self._version][1]

    def run(self, entries: Sequence[Link]) -> None:
        if not entries or entries[0].kind != "migration_started":
            self.problems[About.ORDER].append("the first entry does not tell that the migration started")
        # A round that takes in an amendment decides all by the new plan; of several the last one holds.
        amended = {e.at: str(e.evidence.get("plan", "")) for e in entries if e.kind == "plan_amended"}
        for place, entry in enumerate(entries):
            self._entry = entry
            if entry.at != self._now and entry.at in amended:
                self._take_plan(amended[entry.at])
            self._now = entry.at
            if place and entry.kind == "migration_started":
                self._wrong(About.ORDER, "the migration starts a second time")
            elif (handler := _HANDLERS.get(entry.kind)) is not None:
                handler(self)
        if self._version + 1 < len(self._plans):
            self.problems[About.PLAN].append("there are plans that no entry of the audit log takes up")

    # -- the small ones --------------------------------------------------------------------------------

    def _wrong(self, about: About, what: str) -> None:
        self.problems[about].append(f"entry {self._entry.number} ({self._entry.kind}): {what}")

    def _expect(self, *, phase: Sequence[Phase], stage: Sequence[Stage] | None = None) -> None:
        if self.phase not in phase:
            self._wrong(About.ORDER, f"the migration is {self.phase} by then")
        if stage is not None and self.stage not in stage:
            self._wrong(About.ORDER, f"the wave is {self.stage} by then")

    def _figures(self, kind: type[Any]) -> Any:
        """The entry's evidence as `kind`; None, noted, when it does not have it."""
        try:
            return msgspec.convert(self._entry.evidence, kind)
        except msgspec.ValidationError as error:
            self._wrong(About.ORDER, f"its figures are not complete ({error})")
            return None

    def _in_place(self) -> bool:
        """Whether the entry is about the wave that is next or open, by rung and wave of the plan."""
        found: _Place | None = self._figures(_Place)
        if found is None:
            return False
        if (found.rung, found.wave) != (self.rung, self.wave):
            self._wrong(
                About.ORDER,
                f"it is about rung {found.rung}, wave {found.wave + 1}, where rung {self.rung}, "
                f"wave {self.wave + 1} has its turn",
            )
            # Taken up where the log goes on, so that one gap is told once.
            if 0 < found.rung < len(self._rungs) and 0 <= found.wave < len(self._rungs[found.rung].waves):
                self.rung, self.wave = found.rung, found.wave
        return True

    def _at(self) -> Rung:
        return self._rungs[self.rung]

    def _next(self) -> None:
        self.stage, self._approved = Stage.NONE, False
        if self.wave + 1 < len(self._at().waves):
            self.wave += 1
        elif self.rung + 1 < len(self._rungs):
            self.rung, self.wave = self.rung + 1, 0
        else:
            self._done = True

    # -- the plan --------------------------------------------------------------------------------------

    def _take_plan(self, wanted: str) -> None:
        if self._version + 1 >= len(self._plans) or self._plans[self._version + 1][0] != wanted:
            self._wrong(About.PLAN, "the plan that it takes up is not in the certificate")
            return
        before = self.plan
        self._version += 1
        try:
            check_amendment(before, self.plan, self.rung)
        except Conflict as error:
            self._wrong(About.PLAN, str(error))
        self._rungs = ladder(self.plan)
        self.rung = min(self.rung, len(self._rungs) - 1)
        self.wave = min(self.wave, len(self._at().waves) - 1)

    def _amended(self) -> None:
        self._expect(phase=tuple(set(Phase) - {Phase.RELEASED}))
        if self.phase in (Phase.HELD, Phase.FINISHED):
            self._try_again()

    # -- waves -----------------------------------------------------------------------------------------

    def _share(self) -> _Share | None:
        """The entry's figures, its limit computed again from the plan and the size of the fleet."""
        found: _Share | None = self._figures(_Share)
        if found is None or not self._in_place():
            return None
        shares = (self._at().waves[self.wave], *(r.waves[-1] for r in self._rungs[1 : self.rung]))
        control, last = self.plan.fleet.control, self.wave + 1 == len(self._at().waves)
        limit = approved(shares, found.fleet, control=control, last=last)
        if limit != found.limit:
            self._wrong(
                About.SHARES, f"{found.limit} devices approved, but the plan says {limit} of {found.fleet}"
            )
        return found

    def _opened(self) -> None:
        self._expect(phase=[Phase.RUNNING], stage=_NEXT)
        if (found := self._share()) is not None:
            if found.told < 1 or found.raised < found.told or found.raised > found.limit:
                self._wrong(
                    About.SHARES,
                    f"{found.told} devices told make {found.raised} on the rung, approved are {found.limit}",
                )
            self.raised[self.rung] = max(self.raised.get(self.rung, 0), found.raised)
        if self._done:
            self._wrong(About.ORDER, "the last wave has passed by then")
        self.stage, self._approved = Stage.MOVING, False

    def _skipped(self) -> None:
        self._expect(phase=[Phase.RUNNING], stage=_NEXT)
        if (found := self._share()) is not None and found.raised < found.limit:
            self._wrong(About.SHARES, f"{found.raised} devices on the rung are fewer than {found.limit}")
        self._next()

    def _moved(self) -> None:
        self._expect(phase=[Phase.RUNNING, Phase.PAUSED], stage=[Stage.MOVING])
        self._in_place()
        self.stage, self._baked_from = Stage.BAKING, read_time(self._entry.at)

    def _baked(self) -> None:
        baked_s = read_time(self._entry.at) - self._baked_from
        if baked_s < self._at().bake_s - ROUNDING_S:
            self._wrong(
                About.ORDER,
                f"baked for {format_duration(max(baked_s, 0))} of {format_duration(self._at().bake_s)}",
            )

    def _awaits(self) -> None:
        self._expect(phase=[Phase.RUNNING], stage=[Stage.BAKING])
        if self._in_place():
            self._held()
        self._baked()
        if not self._at().approve:
            self._wrong(About.ORDER, "the plan asks for no approval")
        self.stage, self._approved = Stage.WAITING, False

    def _approve(self) -> None:
        self._expect(phase=[Phase.RUNNING, Phase.PAUSED], stage=[Stage.WAITING])
        self._in_place()
        self._approved = True

    def _passed(self) -> None:
        self._expect(phase=[Phase.RUNNING], stage=[Stage.BAKING, Stage.WAITING])
        if self._in_place():
            self._held()
        if self.stage is Stage.WAITING:
            if not self._approved:
                self._wrong(About.ORDER, "nobody has approved the wave")
        else:
            self._baked()
            if self._at().approve:
                self._wrong(About.ORDER, "the plan asks for an approval, and nobody has given it")
        self.passed += 1
        self._next()

    # -- gates -----------------------------------------------------------------------------------------

    def _verdicts(self) -> Mapping[str, _Noted] | None:
        """The entry's verdicts by gate, each computed again; None when they are not there as they must be."""
        try:
            noted = msgspec.convert(self._entry.evidence.get("gates"), list[_Noted])
        except msgspec.ValidationError as error:
            self._wrong(About.GATES, f"its verdicts are not complete ({error})")
            return None
        gates = {gate.text: gate for gate in self._at().gates}
        if [one.gate for one in noted] != list(gates):
            self._wrong(About.GATES, f"its gates are not those of the plan ({', '.join(gates)})")
            return None
        for one in noted:
            self.verdicts += 1
            try:
                found = judge_again(gates[one.gate], one.sample)
            except (ArithmeticError, ValueError, TypeError):
                self._wrong(About.GATES, f"{one.gate}: its sample is no measurement")
                continue
            if (found.verdict, found.why, found.missing) != (one.verdict, one.why, one.missing):
                what = f"{one.gate} says {one.verdict} ({one.why})"
                self._wrong(About.GATES, f"{what}, its sample says {found.verdict} ({found.why})")
        return {one.gate: one for one in noted}

    def _held(self) -> None:
        for one in (self._verdicts() or {}).values():
            if one.verdict is not Verdict.ADVANCE:
                self._wrong(About.GATES, f"{one.gate} did not hold ({one.why})")

    def _breached(self) -> None:
        self._expect(phase=[Phase.RUNNING, Phase.PAUSED], stage=_OPEN)
        found = self._verdicts() if self._in_place() else None
        gates = {gate.text: gate for gate in self._at().gates}
        if found is not None:
            cause = found.get(str(self._entry.evidence.get("gate")))
            if cause is None or not (cause.verdict is Verdict.REVERT or cause.missing):
                self._wrong(About.GATES, "the gate that it names was not breached")
            elif self.stage is Stage.MOVING and not always_watched(gates[cause.gate]):
                self._wrong(
                    About.ORDER, "the wave is moving by then, and that gate is watched from the bake on"
                )
        self.phase, self._approved = Phase.HELD, False
        if self.plan.on_breach is OnBreach.REVERT:
            self.stage = Stage.BACK

    # -- what people ask for, and the ends -------------------------------------------------------------

    def _pause(self) -> None:
        self._expect(phase=[Phase.RUNNING])
        self.phase = Phase.PAUSED

    def _resume(self) -> None:
        if self._entry.evidence.get("was") != self.phase:
            self._wrong(About.ORDER, f"the migration is {self.phase} by then")
        if self.phase is Phase.PAUSED:
            self.phase = Phase.RUNNING
        elif self.phase in (Phase.HELD, Phase.FINISHED):
            self._try_again()
        else:
            self._expect(phase=[Phase.REVERTING, Phase.REVERTED])
            self.phase, self.stage, self._done = Phase.RUNNING, Stage.NONE, False
            self.rung, self.wave = 1, 0

    def _try_again(self) -> None:
        if self.stage is Stage.BACK or self.phase is Phase.FINISHED:
            self.stage = Stage.NONE
        self._baked_from = read_time(self._entry.at)
        self.phase, self._done = Phase.RUNNING, False

    def _foreign(self) -> None:
        if self.phase in (Phase.RUNNING, Phase.PAUSED, Phase.FINISHED):
            self.phase = Phase.HELD

    def _wave_back(self) -> None:
        self._expect(phase=[Phase.RUNNING, Phase.PAUSED, Phase.HELD, Phase.FINISHED], stage=_OPEN)
        self._in_place()
        self.phase, self.stage, self._approved = Phase.HELD, Stage.BACK, False

    def _wave_returned(self) -> None:
        self._expect(phase=[Phase.HELD], stage=[Stage.BACK])

    def _reverting(self) -> None:
        self._expect(phase=[Phase.RUNNING, Phase.PAUSED, Phase.HELD, Phase.FINISHED])
        self._all_back()

    def _all_back(self) -> None:
        if self.phase is Phase.RELEASED:
            self._expect(phase=[])
        self.phase, self.stage, self._approved = Phase.REVERTING, Stage.BACK, False

    def _reverted(self) -> None:
        self._expect(phase=[Phase.REVERTING])
        self.phase = Phase.REVERTED

    def _finish(self) -> None:
        self._expect(phase=[Phase.RUNNING], stage=[Stage.NONE])
        if not self._done:
            self._wrong(
                About.ORDER, f"rung {self.rung}, wave {self.wave + 1} of the plan has not passed by then"
            )
        self.phase = Phase.FINISHED

    def _release(self) -> None:
        self._expect(phase=_ENDED)
        self.phase = Phase.RELEASED


_HANDLERS: Final[Mapping[str, Callable[[Retrace], None]]] = {
    "plan_amended": Retrace._amended,
    "wave_opened": Retrace._opened,
    "wave_skipped": Retrace._skipped,
    "wave_moved": Retrace._moved,
    "wave_awaits_approval": Retrace._awaits,
    "wave_approved": Retrace._approve,
    "wave_passed": Retrace._passed,
    "gate_breached": Retrace._breached,
    "migration_paused": Retrace._pause,
    "migration_resumed": Retrace._resume,
    "foreign_orders_seen": Retrace._foreign,
    "wave_returning": Retrace._wave_back,
    "wave_returned": Retrace._wave_returned,
    "migration_reverting": Retrace._reverting,
    "emergency_taken_in": Retrace._all_back,
    "migration_reverted": Retrace._reverted,
    "migration_finished": Retrace._finish,
    "migration_released": Retrace._release,
}
