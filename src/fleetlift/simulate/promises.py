"""The promises, checked: at each decision, commit and order as it happens, and over the whole at the end.

Each check computes anew, from what was seen and by other code than the product's, what must hold.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from fleetlift.core import decide as decisions
from fleetlift.core.command import FINAL, GRACE_S, Path
from fleetlift.core.migration import (
    AuditEntry,
    Decision,
    Member,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Sample,
)
from fleetlift.core.orders import DevicePhase, Flags, Orders
from fleetlift.core.plan import Plan, Rung, ladder
from fleetlift.core.ranges import RangeSet
from fleetlift.core.units import Share
from fleetlift.simulate.clock import Clock
from fleetlift.simulate.device import Executed
from fleetlift.store.engine import StoredMigration

PROMISES: dict[str, str] = {
    "nothing lost": "what was acknowledged to a device, or was ever on its disk, is stored or still there",
    "nothing twice": "a message is stored once; the actuator moves at most once for a command",
    "commands end": "every command comes to one final state, soon after it expires, and stays there",
    "a way back": "asked to, every device that can be reached is on the old side again within a bound",
    "never blind": "no wave grows or passes unless each of its gates was measured and held",
    "bounded blast": "no more devices are told to climb than the open wave may have, and always the same",
    "one authority": "no older epoch is obeyed, no decision overwrites another, no side executes uncalled",
    "written first": "no device hears of an order that is not in the database and in the journal",
    "nobody stranded": "once faults have ended, every device reaches a side that takes what it sends",
    "release": "the old side is let go only when nobody is left behind unnoticed",
    "goes on": "no round of the controller fails, but for what is away",
    "audit complete": "each change of state has its line, and the decision can be computed again",
}
RECOMPUTE_EVERY = 16
_GATE = re.compile(r"(\S+) (<=|>=|<|>|==) ([0-9.]+)(%|s|ms|)")
_BY_OLD = ("old", "dry-run", "both")
_BY_NEW = ("both", "new")


class Violated(Exception):
    """A promise was broken. The simulation stops here."""

    def __init__(self, promise: str, what: str) -> None:
        assert promise in PROMISES
        super().__init__(f"{promise}: {what}")
        self.promise, self.what = promise, what


class Promises:
    """Implements `engine.Witness` and keeps what the checks at the end need."""

    def __init__(self, clock: Clock, journal_epoch: Callable[[str], int]) -> None:
        self.executed: list[Executed] = []
        self.waves_passed = self.decisions = 0
        self._clock = clock
        self._journal_epoch = journal_epoch
        self._seen: dict[str, tuple[Plan, MigrationState, Observations, float, Decision]] = {}
        self._orders: dict[tuple[str, int], Flags] = {}
        self._ranks: dict[str, int] = {}
        self._passed: set[tuple[int, int]] = set()
        self._newest: dict[tuple[str, str], int] = {}

    def broken(self, promise: str, what: str) -> None:
        """Stops the simulation, also when the product would swallow an exception here."""
        violated = Violated(promise, what)
        self._clock.loop.broken = self._clock.loop.broken or violated
        raise violated

    # -- as decisions are made ---------------------------------------------------------------------------

    def decided(
        self,
        controller: str,
        plan: Plan,
        state: MigrationState,
        seen: Observations,
        now: float,
        decision: Decision,
    ) -> None:
        self.decisions += 1
        self._seen[controller] = (plan, state, seen, now, decision)
        if decision.audit or self.decisions % RECOMPUTE_EVERY == 0:
            again = decisions.decide(plan, state, seen, now)
            if again != decision:
                self.broken("audit complete", "the same observations lead to another decision")

    def committed(
        self,
        controller: str,
        before: StoredMigration,
        after: StoredMigration,
        audit: Sequence[AuditEntry],
        stored: StoredMigration,
    ) -> None:
        if before.version != stored.version:
            self.broken(
                "one authority",
                f"{controller} has overwritten version {stored.version}, knowing {before.version} only",
            )
        plan, _, seen, now, _ = self._seen[controller]
        was, state = before.state, after.state
        kinds = [entry.kind for entry in audit]
        if _place(was) != _place(state) and not audit:
            self.broken("audit complete", f"{_place(was)} became {_place(state)} without a line")
        rungs = ladder(plan)
        self._orders_kept(was, state, rungs)
        self._ranks_stay(state)
        self._waves(was, state, rungs, seen, now, kinds)
        if state.phase is Phase.RELEASED and was.phase is not Phase.RELEASED:
            self._released(was, state, seen, rungs)

    def _orders_kept(self, was: MigrationState, state: MigrationState, rungs: Sequence[Rung]) -> None:
        for member in state.members.values():
            old = was.members.get(member.device)
            if member.epoch and (old is None or old.epoch != member.epoch or old.rung != member.rung):
                if old is not None and member.epoch < old.epoch:
                    self.broken("one authority", f"{member.device}: epoch {old.epoch} became {member.epoch}")
                key = (member.device, member.epoch)
                flags = rungs[min(member.rung, len(rungs) - 1)].flags
                if self._orders.setdefault(key, flags) != flags:
                    self.broken("one authority", f"{member.device}: epoch {member.epoch} means two things")

    def _ranks_stay(self, state: MigrationState) -> None:
        for device, member in state.members.items():
            if self._ranks.setdefault(device, member.rank) != member.rank:
                self.broken("bounded blast", f"{device} has changed its place in the order of waves")

    # -- waves -------------------------------------------------------------------------------------------

    def _waves(
        self,
        was: MigrationState,
        state: MigrationState,
        rungs: Sequence[Rung],
        seen: Observations,
        now: float,
        kinds: Sequence[str],
    ) -> None:
        if "wave_passed" in kinds:
            self._gates_held(was, rungs[min(was.rung, len(rungs) - 1)], rungs, seen, now)
            self._passed.add((was.rung, was.wave))
            self.waves_passed += 1
        raised = [
            member
            for member in state.members.values()
            if (old := was.members.get(member.device)) is not None and member.rung > old.rung
        ]
        if raised:
            self._may_raise(raised, was, state, rungs, seen)

    def _gates_held(
        self, was: MigrationState, rung: Rung, rungs: Sequence[Rung], seen: Observations, now: float
    ) -> None:
        for gate in rung.gates:
            match = _GATE.fullmatch(gate.text)
            assert match is not None, gate.text
            metric, op, number, unit = match.groups()
            limit = float(number) / (1000 if unit == "ms" else 1)
            match metric:
                case "moves.success":
                    moved, failed = self._moves(was, rung, seen, now)
                    sample = Sample(value=100.0 * moved / (moved + failed) if moved + failed else None, n=1)
                case "devices.failed":
                    sample = Sample(value=float(self._moves(was, rung, seen, now)[1]), n=1)
                case "devices.silent":
                    sample = Sample(value=float(self._silent(was, rung, rungs, seen, now)), n=1)
                case _:
                    sample = seen.samples.get(gate.text, Sample(value=None))
                    if sample.n < gate.at_least:
                        self.broken("never blind", f"passed {gate.text} on {sample.n} only")
            if sample.value is None or not math.isfinite(sample.value):
                self.broken("never blind", f"a wave has passed, and {gate.text} was not measured")
            elif not _compare(sample.value, op, limit):
                self.broken("never blind", f"a wave has passed {gate.text} with {sample.value:g}")

    def _moves(self, was: MigrationState, rung: Rung, seen: Observations, now: float) -> tuple[int, int]:
        """Devices of the open wave that have moved, and those that certainly have not."""
        fleet = {device.id: device for device in seen.fleet or ()}
        moved = failed = 0
        for member in was.members.values():
            if member.rung != was.rung or member.wave != was.wave or member.told_at is None:
                continue
            sight = seen.devices.get(member.device)
            if member.state in (MemberState.MOVED, MemberState.RETURNED):
                moved += 1
            elif member.state is MemberState.STRAGGLER and sight is not None:
                there = fleet.get(member.device)
                since = there.since if there is not None and there.since is not None else now
                online = sight.connected_old and now - max(since, member.told_at) > rung.settle_s + 10
                back = sight.report is not None and sight.report.phase is DevicePhase.WENT_BACK
                failed += bool(
                    online or (back and sight.report is not None and sight.report.epoch >= member.epoch)
                )
        if not moved and not failed:  # the wave's devices are away: what stands on the rung counts
            moved = sum(m.rung > 0 and m.state is MemberState.MOVED for m in was.members.values())
        return moved, failed

    def _silent(
        self, was: MigrationState, rung: Rung, rungs: Sequence[Rung], seen: Observations, now: float
    ) -> int:
        count = 0
        for member in was.members.values():
            if member.state is not MemberState.MOVED or member.moved_at is None:
                continue
            if rungs[min(member.rung, len(rungs) - 1)].flags.telemetry.value == "old":
                continue
            sight = seen.devices.get(member.device)
            heard = sight.new_telemetry_at if sight is not None else None
            count += now - max(heard or 0.0, member.moved_at) > rung.silent_after_s + 0.001
        return count

    def _may_raise(
        self,
        raised: Sequence[Member],
        was: MigrationState,
        state: MigrationState,
        rungs: Sequence[Rung],
        seen: Observations,
    ) -> None:
        names = ", ".join(member.device for member in raised[:3])
        fleet = {device.id for device in seen.fleet or ()}
        if seen.fleet is None or not seen.old_up or not seen.new_up or state.phase is not Phase.RUNNING:
            self.broken("never blind", f"{names} told to climb while {state.phase}, or a side was away")
        index = state.rung
        if any(member.rung != index for member in raised):
            self.broken("bounded blast", f"{names} told to climb to a rung that is not open")
        before = _before(state.rung, state.wave, rungs)
        if (
            before is not None
            and before not in self._passed
            and not self._was_full(before, state, rungs, seen)
        ):
            self.broken("never blind", f"wave {state.rung}/{state.wave} opened, and {before} never passed")
        able = [m for m in state.members.values() if m.state is not MemberState.EXCLUDED]
        here = [m for m in able if m.device in fleet]
        shares = [rungs[index].waves[state.wave], *(rung.waves[-1] for rung in rungs[1:index])]
        limit = min(_share(share, len(here)) for share in shares)
        there = sum(m.rung >= index for m in able)
        stood = sum(m.rung >= index and m.state is not MemberState.EXCLUDED for m in was.members.values())
        if there > max(limit, stood):
            self.broken(
                "bounded blast", f"{there} devices on rung {index}, and wave {state.wave} may have {limit}"
            )
        last = max(member.rank for member in raised)
        passed_over = [
            m.device for m in here if m.rank < last and m.rung < index and m.device not in state.kept_back
        ]
        if passed_over:
            self.broken("bounded blast", f"{passed_over[0]} was passed over by {names}")

    def _was_full(
        self,
        place: tuple[int, int],
        state: MigrationState,
        rungs: Sequence[Rung],
        seen: Observations,
    ) -> bool:
        """Whether a wave that was never opened had nobody to add, so that it was skipped."""
        index, wave = place
        fleet = {device.id for device in seen.fleet or ()}
        here = sum(m.device in fleet and m.state is not MemberState.EXCLUDED for m in state.members.values())
        shares = [rungs[index].waves[wave], *(rung.waves[-1] for rung in rungs[1:index])]
        on_rung = sum(m.rung >= index for m in state.members.values())
        return on_rung >= min(_share(share, here) for share in shares)

    # -- release -----------------------------------------------------------------------------------------

    def _released(
        self, was: MigrationState, state: MigrationState, seen: Observations, rungs: Sequence[Rung]
    ) -> None:
        if was.phase not in (Phase.FINISHED, Phase.REVERTED):
            self.broken("release", f"released while {was.phase}")
        forced = any(request.args.get("force") for request in seen.requests)
        if forced:
            return
        want = MemberState.MOVED if was.phase is Phase.FINISHED else MemberState.RETURNED
        for member in state.members.values():
            if member.state is MemberState.EXCLUDED:
                if member.epoch and member.moved_at is None:
                    self.broken("release", f"{member.device} was taken out and has not been seen to be back")
                continue
            untouched = member.state is MemberState.WAITING and was.phase is Phase.REVERTED
            halfway = was.phase is Phase.FINISHED and member.rung < len(rungs) - 1
            if (member.state is not want or halfway) and not untouched:
                self.broken("release", f"{member.device} is {member.state}, and nobody has signed for it")

    def known_order(self, device: str, epoch: int, flags: Flags) -> None:
        """An order that the emergency path has written into the journal by itself."""
        self._orders[device, epoch] = flags

    # -- orders ------------------------------------------------------------------------------------------

    def told(self, side: str, orders: Mapping[str, Orders]) -> None:
        for device, order in orders.items():
            if (flags := self._orders.get((device, order.epoch))) is None:
                self.broken("written first", f"{device} is told epoch {order.epoch}: nobody has committed it")
            elif flags != order.flags:
                self.broken("one authority", f"{device}: epoch {order.epoch} is told as something else")
            if self._journal_epoch(device) < order.epoch:
                self.broken("written first", f"{device} is told epoch {order.epoch}, not in the journal yet")

    def accepted(self, device: str, path: Path, flags: Flags) -> None:
        """A device has begun to execute a command that came by `path`."""
        if flags.commands.value not in (_BY_OLD if path is Path.OLD else _BY_NEW):
            self.broken("one authority", f"{device} executes a command of {path}, obeying {flags.commands}")

    def applied(self, device: str, before: int, after: int) -> None:
        if after < before:
            self.broken("one authority", f"{device} applied epoch {after} after {before}")

    def newest(self, where: str, device: str, epoch: int) -> None:
        """What a side holds for a device only ever grows."""
        if epoch < self._newest.get((where, device), 0):
            self.broken("one authority", f"{where} took an older epoch for {device}: {epoch}")
        self._newest[where, device] = epoch

    def executes(self, one: Executed) -> None:
        if one.by_agent and any(e.command == one.command and e.by_agent for e in self.executed):
            self.broken("nothing twice", f"{one.device} has executed {one.command} twice")
        self.executed.append(one)


def _place(state: MigrationState) -> tuple[Any, ...]:
    return (state.phase, state.rung, state.wave, state.wave_phase, state.approved, state.kept_back)


def _compare(value: float, op: str, limit: float) -> bool:
    slack = 1e-6 * max(1.0, abs(limit))
    match op:
        case "<=":
            return value <= limit + slack
        case ">=":
            return value >= limit - slack
        case "<":
            return value < limit
        case ">":
            return value > limit
        case _:
            return abs(value - limit) <= slack


def _share(share: Share, total: int) -> int:
    """The share in exact numbers, rounded up."""
    if share.devices is not None:
        return min(share.devices, total)
    return min(math.ceil(Fraction(str(share.percent)) * total / 100), total)


def _before(rung: int, wave: int, rungs: Sequence[Rung]) -> tuple[int, int] | None:
    if wave > 0:
        return rung, wave - 1
    if rung > 1:
        return rung - 1, len(rungs[rung - 1].waves) - 1
    return None


# -- at the end -------------------------------------------------------------------------------------------


def missing(wanted: Mapping[str, RangeSet], *stored: Mapping[str, RangeSet]) -> dict[str, str]:
    """What is in none of `stored`, by channel, as text."""
    lost = {}
    for channel, numbers in wanted.items():
        rest = numbers
        for some in stored:
            if channel in some:
                rest = rest.minus(some[channel])
        if rest:
            lost[channel] = rest.to_pg()
    return lost


def commands_ended(commands: Mapping[str, Any], slack_s: float) -> str:
    """Which command has not ended, or ended too late; "" when all have in time."""
    for command in commands.values():
        if command.ended_at is None or command.status not in FINAL:
            return f"{command.id} of {command.device} is still {command.status}"
        late = command.ended_at - command.expires_at - GRACE_S
        if late > slack_s:
            return f"{command.id} of {command.device} ended {late:.0f} s after its time"
    return ""
