"""What a migration does next: `decide(plan, state, observations, now)`, a pure function.

Each round takes in the fleet, answers requests, looks for evidence, judges the gates, goes on (or back), and
repeats orders that have not been obeyed. The state that comes out is committed before its actions are done;
actions are orders to devices and may be repeated, so that a controller killed anywhere goes on from the
stored state.

What never happens here, whatever comes in: a device is told to climb while a breach is open, while the fleet
cannot be read or a side is down; more devices stand on a rung than its wave approved; a wave grows without
each of its gates measured and held; an epoch is used twice.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from msgspec.structs import replace

from fleetlift.core.errors import BadInput
from fleetlift.core.evidence import (
    BY_NEW,
    LISTED,
    Moves,
    failures,
    foreign_reason,
    has_moved,
    has_returned,
    judge_moves,
    listed,
    newest,
    obeys_another,
    tries_again,
    went_back,
    why_back,
)
from fleetlift.core.gates import Gate, judge
from fleetlift.core.migration import (
    Decision,
    DeviceObservation,
    FleetDevice,
    GateResult,
    Member,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Sample,
    Tell,
    Verdict,
    WavePhase,
)
from fleetlift.core.orders import DevicePhase
from fleetlift.core.plan import OnBreach, Plan
from fleetlift.core.requests import answer_requests
from fleetlift.core.round import Round, back_at_start
from fleetlift.core.selection import cannot_move
from fleetlift.core.units import format_devices, format_duration, format_some
from fleetlift.core.waves import approved, chosen, newcomers, ordered

TELL_AGAIN_S: Final = 5.0  # the soonest that an order is repeated; it doubles up to TELL_AGAIN_MOST_S
TELL_AGAIN_MOST_S: Final = 60.0
OFFLINE_AFTER_S: Final = 10.0  # a device that is away need not be waited for as long as one that is there
OWN_METRICS: Final = ("moves.success", "devices.failed", "devices.silent")
"""Metrics that `decide` computes itself, from members and observations, unless a sample is given."""


def always_watched(gate: Gate) -> bool:
    """Whether a gate sends a wave back also while its devices are still moving."""
    return gate.zero_tolerance or gate.metric in OWN_METRICS


def begin(plan: Plan, fleet: Sequence[FleetDevice], epoch: int) -> MigrationState:
    """The state of a migration that has not told any device anything yet.

    `fleet` is what the plan's `where` selects; `epoch` is at least the newest that any migration has used.
    Raises BadInput when there is nothing to move.
    """
    if not any(cannot_move(plan.fleet, device) is None for device in fleet):
        raise BadInput(
            f"no device of tenant {plan.fleet.tenant!r} can be moved by this plan: "
            f"{len(fleet)} selected; see `fleetlift migrate check`"
        )
    by_id = {device.id: device for device in fleet}
    members = {}
    for rank, device in enumerate(ordered(plan.name, plan.fleet.canaries, by_id)):
        reason = cannot_move(plan.fleet, by_id[device])
        members[device] = Member(
            device=device,
            rank=rank,
            state=MemberState.WAITING if reason is None else MemberState.EXCLUDED,
            reason=reason or "",
        )
    return MigrationState(name=plan.name, epoch=epoch, members=members)


def decide(plan: Plan, state: MigrationState, observations: Observations, now: float) -> Decision:
    """The next state with what to do and what to note. Equal arguments give equal decisions.

    `now` is Unix seconds; `observations.samples` has one sample a gate, by its text, measured from
    `state.measured_from` on.
    """
    return _Deciding(plan, state, observations, now).run()


class _Deciding(Round):
    """What one call of `decide` does with its round."""

    gates: tuple[GateResult, ...] = ()

    def run(self) -> Decision:
        if self.state.phase is not Phase.RELEASED:
            self._take_in_fleet()
        answer_requests(self)
        if self.state.phase is not Phase.RELEASED:
            self._look_for_evidence()
            self._judge_gates()
            self._go_on()
            self._tell_again()
        members = self.members
        return Decision(
            state=replace(self.state, members=members),
            actions=tuple(self.tells.values()),
            audit=tuple(self.audit),
            answered=tuple(self.answered),
            gates=self.gates,
        )

    # -- the fleet -------------------------------------------------------------------------------------

    def _take_in_fleet(self) -> None:
        """Enrol devices that have joined; devices never told that have left take no part."""
        if self.fleet is None:
            return
        fresh: dict[str, int] = {}
        if not self.fleet.keys() <= self.members.keys():
            ranks = {device: member.rank for device, member in self.members.items()}
            fresh = newcomers(self.plan.name, self.plan.fleet.canaries, ranks, self.fleet)
        for device, rank in fresh.items():
            self.members[device] = Member(device=device, rank=rank)
        if fresh:
            self.note(
                "devices_joined", f"{format_devices(len(fresh))} joined the fleet", devices=listed(fresh)
            )
        kept_back = frozenset(self.state.kept_back)
        apart = (MemberState.EXCLUDED, MemberState.WAITING)
        for member in [one for one in self.members.values() if one.state in apart]:
            if member.device in kept_back:
                continue
            if member.state is MemberState.EXCLUDED:
                if self.barred(member.device) is None:
                    back = member.told_at is not None and member.moved_at is None
                    self.put(member, state=MemberState.RETURNING if back else MemberState.WAITING, reason="")
            elif (why := self.barred(member.device)) is not None:
                self.put(member, state=MemberState.EXCLUDED, reason=why)

    # -- evidence --------------------------------------------------------------------------------------

    def _look_for_evidence(self) -> None:
        late: list[Member] = []  # found to be stragglers now
        caught_up: list[Member] = []
        gone_back: list[Member] = []
        taken: list[Member] = []
        for member in list(self.members.values()):
            if member.told_at is None:
                continue
            seen = self.sight(member)
            match member.state:
                case MemberState.MOVED | MemberState.RETURNED if member.rung > 0:  # most of a large fleet
                    if went_back(member, seen):
                        gone_back.append(self._straggler(member, why_back(member, seen)))
                    elif self._obeys_another(member, seen):
                        taken.append(self._straggler(member, foreign_reason(seen)))
                case MemberState.EXCLUDED:
                    if member.moved_at is None and self._is_back(member, seen):
                        self.put(member, moved_at=self.now)
                case MemberState.RETURNING:
                    self._see_return(member, seen)
                case MemberState.STRAGGLER if member.rung == 0:
                    self._see_return(member, seen)
                case MemberState.MOVING | MemberState.STRAGGLER:
                    if went_back(member, seen):
                        if member.state is MemberState.MOVING:
                            gone_back.append(self._straggler(member, why_back(member, seen)))
                    elif self._obeys_another(member, seen):
                        if member.state is MemberState.MOVING:
                            taken.append(self._straggler(member, foreign_reason(seen)))
                    elif has_moved(member, seen, self.rungs[member.rung].flags):
                        if member.state is MemberState.STRAGGLER:
                            caught_up.append(member)
                        self.put(member, state=MemberState.MOVED, moved_at=self.now, reason="")
                    elif member.state is MemberState.MOVING and (why := self._overdue(member, seen)):
                        late.append(self._straggler(member, why))
                case _:
                    pass
        self.note_devices("devices_went_back", "gone back by themselves", gone_back)
        self.note_devices("stragglers_found", "not moved in time", late)
        self.note_devices("stragglers_moved", "moved after all", caught_up)
        if taken:
            self.note_devices(
                "foreign_orders_seen", "obeying a newer order that is not this migration's", taken
            )
            if self.state.phase in (Phase.RUNNING, Phase.PAUSED, Phase.FINISHED):
                self.change(
                    phase=Phase.HELD,
                    reason=f"a newer order back to the old side, not given by this migration, is obeyed by "
                    f"{format_devices(len(taken))}; resume to take them again, or revert",
                )

    def _see_return(self, member: Member, seen: DeviceObservation) -> None:
        if member.rung > 0 and went_back(member, seen):
            self._straggler(member, why_back(member, seen))
        elif self._is_back(member, seen):
            self.put(member, state=MemberState.RETURNED, moved_at=self.now, reason="")
        elif member.state is MemberState.RETURNING:
            away = "" if self.online(member) else f"{self._away(member)}; its order waits"
            if away != member.reason:
                self.put(member, reason=away)

    def _is_back(self, member: Member, seen: DeviceObservation) -> bool:
        came_from = self.rungs[min(member.came_from, len(self.rungs) - 1)].flags
        return has_returned(member, seen, self.rungs[member.rung].flags, came_from)

    def _obeys_another(self, member: Member, seen: DeviceObservation) -> bool:
        return obeys_another(seen, self.rungs[member.rung].flags, self.state.epoch)

    def _overdue(self, member: Member, seen: DeviceObservation) -> str:
        """Why a device that was told to move counts as a straggler by now; "" while it may still come."""
        assert member.told_at is not None
        waited, settle_s = self.now - member.told_at, self.rungs[member.rung].settle_s
        if not self.online(member):
            return self._away(member) if waited >= min(settle_s, OFFLINE_AFTER_S) else ""
        if waited < settle_s:
            return ""
        took = f"within {format_duration(settle_s)}"
        report = newest(seen)
        if report is None or report.epoch < member.epoch:
            return f"connected, but has not answered its order {took}"
        if report.phase is DevicePhase.TRYING:
            return f"still trying the new side after {format_duration(settle_s)}"
        by_new = seen.report_by_new
        if by_new is None or by_new.epoch < member.epoch:
            return f"says that it has moved, but the new side has not heard it say so {took}"
        if by_new.flags != self.rungs[member.rung].flags:
            return f"has answered its order with other flags than it was told {took}"
        return f"has moved, but no telemetry of it has come by the new side {took}"

    def _away(self, member: Member) -> str:
        since, seen = self.since(member), self.sight(member)
        if since is None:
            ever = seen.report or seen.report_by_new or seen.new_telemetry_at or seen.old_telemetry_at
            return "offline" if ever else "never seen"
        return f"offline since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC"

    def _straggler(self, member: Member, why: str) -> Member:
        return self.put(member, state=MemberState.STRAGGLER, reason=why, moved_at=None)

    # -- gates -----------------------------------------------------------------------------------------

    def _judge_gates(self) -> None:
        if self.state.phase in (Phase.FINISHED, Phase.REVERTING, Phase.REVERTED):
            return
        if self.state.wave_opened_at is None or self.state.wave_phase is WavePhase.RETURNING:
            return
        self.gates = tuple(self._judge(gate) for gate in self.rung.gates)

    def _judge(self, gate: Gate) -> GateResult:
        given = self.seen.samples.get(gate.text)
        if given is not None or gate.metric not in OWN_METRICS:
            return judge(gate, given)
        if gate.metric == "devices.silent":
            return judge(gate, self._silent())
        wave, everyone = self._moves()
        if gate.metric == "devices.failed":
            return judge(gate, failures(wave))
        # A fault of the wave shows in the wave; one of the whole new side in all that was moved so far.
        results = [judge_moves(gate, moves) for moves in (wave, everyone)]
        for verdict in (Verdict.REVERT, Verdict.HOLD):
            for result in results:
                if result.verdict is verdict:
                    return result
        return results[0]

    def _moves(self) -> tuple[Moves, Moves]:
        """How the moves of the open wave went, and those of all devices; the same when the wave is away."""
        everyone = self._sorted(member for member in self.members.values() if member.rung > 0)
        wave = self._sorted(self.of_wave())
        return (wave if any((wave.moved, wave.failed, wave.pending)) else everyone), everyone

    def _sorted(self, members: Iterable[Member]) -> Moves:
        moves = Moves()
        for member in members:
            if member.state in (MemberState.MOVED, MemberState.RETURNED):
                moves.moved.append(member)
            elif member.state in (MemberState.MOVING, MemberState.STRAGGLER):
                if went_back(member, self.sight(member)):
                    moves.failed.append(member)
                elif self.online(member):
                    there = max(member.told_at or 0.0, self.since(member) or 0.0)
                    in_time = self.now - there < self.rungs[member.rung].settle_s
                    (moves.pending if in_time else moves.failed).append(member)
        return moves

    def _silent(self) -> Sample:
        """Moved devices that the new side has not heard of for longer than the step allows."""
        by_new = [rung.flags.telemetry in BY_NEW for rung in self.rungs]
        moved = [m for m in self.members.values() if m.state is MemberState.MOVED and by_new[m.rung]]
        limit_s = self.rung.silent_after_s
        silent = []
        for member in moved:
            heard, moved_at = self.sight(member).new_telemetry_at, member.moved_at
            if (heard is None or self.now - heard > limit_s) and (
                moved_at is None or self.now - moved_at > limit_s
            ):
                silent.append(member.device)
        summary = f"of {len(moved):,} moved devices, for longer than {format_duration(limit_s)}"
        if silent:
            summary += f": {format_some(sorted(silent), 3)}"
        return Sample(
            value=len(silent),
            n=len(moved),
            evidence={"summary": summary, "silent": listed(sorted(silent))},
        )

    # -- onwards, or back ------------------------------------------------------------------------------

    def _go_on(self) -> None:
        match self.state.phase:
            case Phase.RUNNING | Phase.PAUSED:
                if not self._breached():
                    self._climb()
            case Phase.HELD:
                self._see_wave_return()
            case Phase.REVERTING:
                self._see_all_return()
            case _:
                pass

    def _breached(self) -> bool:
        """Deal with a breach, if there is one: a gate's limit missed, or no data for too long."""
        if self.state.wave_opened_at is None:
            return False
        watched = self.state.wave_phase in (WavePhase.BAKING, WavePhase.AWAITING_APPROVAL)
        by_text = {gate.text: gate for gate in self.rung.gates}
        for result in self.gates:
            gate = by_text[result.gate]
            if result.verdict is Verdict.REVERT and (watched or always_watched(gate)):
                if not self.seen.old_up:
                    # Sent back now, devices would be served by nobody; nothing grows meanwhile either.
                    reason = "waits for the old side, to send the wave back to it"
                    if not self.state.reason.startswith(reason):
                        self.note("breach_held", f"{reason}: {result.why}", gate=result.gate)
                    self.change(reason=f"{reason}: {result.why}")
                    return True
                self._breach(result, result.why)
                return True
        missing = [result for result in self.gates if result.missing]
        if not missing or not watched:
            self.change(unmeasured_since=None)
            return False
        if self.state.unmeasured_since is None:
            self.change(unmeasured_since=self.now)
        assert self.state.unmeasured_since is not None
        unmeasured_s = self.now - self.state.unmeasured_since
        # With the old side gone there is nothing to go back to, and it may be what the figures lack.
        if unmeasured_s < self.rung.no_data_after_s or not self.seen.old_up:
            return False
        self._breach(missing[0], f"no data for {format_duration(_coarse(unmeasured_s))}: {missing[0].why}")
        return True

    def _breach(self, result: GateResult, why: str) -> None:
        name, place, mine = self.wave_name(), self.place(), self.of_wave()
        if self.plan.on_breach is OnBreach.REVERT:
            told = self.return_wave(why)
            what = f"{format_devices(len(told))} told to go back"
        else:
            self.change(phase=Phase.HELD, reason=why, unmeasured_since=None, approved=False)
            what = f"held with {format_devices(len(mine))} where they are; a person decides"
        self.note(
            "gate_breached",
            f"{name}: {why}; {what}",
            gate=result.gate,
            value=result.value,
            limit=result.limit,
            unit=result.unit,
            n=result.n,
            old=result.old,
            devices=len(mine),
            **place,
            gates=self._verdicts(),
        )

    def _climb(self) -> None:
        """Take the open wave as far as it may go now; the next wave opens in the same round."""
        for _ in range(sum(len(rung.waves) for rung in self.rungs) + 1):
            if self.state.wave_opened_at is None:
                if not self._may_grow() or not self._open_wave():
                    return
                continue
            match self.state.wave_phase:
                case WavePhase.MOVING:
                    if not self._wave_has_moved():
                        return
                case WavePhase.BAKING:
                    if not self._wave_has_baked():
                        return
                    if self.rung.approve:
                        self.change(wave_phase=WavePhase.AWAITING_APPROVAL, approved=False)
                        self.note(
                            "wave_awaits_approval",
                            f"{self.wave_name()} has baked and waits for approval",
                            **self.place(),
                            gates=self._verdicts(),
                        )
                    else:
                        self._pass_wave()
                case WavePhase.AWAITING_APPROVAL:
                    if not self.state.approved or not self._gates_hold() or not self._may_grow():
                        return
                    self._pass_wave()
                case WavePhase.RETURNING:
                    return
            if self.state.phase is Phase.FINISHED:
                return

    def _may_grow(self) -> bool:
        """False, with the reason in the state, while no device may be told to climb."""
        if self.state.phase is not Phase.RUNNING:
            return False
        if self.fleet is None:
            reason = "waits: the fleet cannot be read"
        elif not self.seen.old_up:
            reason = "waits: the old side does not answer"
        elif not self.seen.new_up:
            reason = "waits: the new side does not answer"
        else:
            reason = ""
        if reason and reason != self.state.reason:
            self.note("growth_held", reason)
        self.change(reason=reason)
        return not reason

    def _open_wave(self) -> bool:
        """Raise the wave's devices. True when the wave adds none and the next one was made ready."""
        assert self.fleet is not None
        able = [m for m in self.members.values() if m.state is not MemberState.EXCLUDED]
        here = [m for m in able if m.device in self.fleet and (m.rung > 0 or self.barred(m.device) is None)]
        if not here:
            self.change(reason="waits: the plan selects no device")
            return False
        index, wave = self.state.rung, self.state.wave
        shares = (self.rung.waves[wave], *(rung.waves[-1] for rung in self.rungs[1:index]))
        last = wave + 1 == len(self.rung.waves)
        limit = approved(shares, len(here), control=self.plan.fleet.control, last=last)
        raised = sum(m.rung >= index for m in able)
        picked = chosen(((m.rank, m.device) for m in here if m.rung < index), raised, limit)
        if not picked:
            self.note(
                "wave_skipped",
                f"{self.wave_name()} adds no device: {format_devices(raised)} of {limit} are there already",
                **self.place(),
                raised=raised,
                limit=limit,
                fleet=len(here),
            )
            self._next_wave()
            return self.state.phase is not Phase.FINISHED
        for device in picked:
            self.put(self.members[device], wave=wave)
        chosen_ones = [self.members[device] for device in picked]
        self.order(chosen_ones, state=MemberState.MOVING, rung=index, reason="")
        self.change(
            wave_phase=WavePhase.MOVING,
            wave_opened_at=self.now,
            measured_from=self.now,
            bake_started_at=None,
            unmeasured_since=None,
            returned_at=None,
            approved=False,
            reason="",
        )
        self.note(
            "wave_opened",
            f"{self.wave_name()} opened: {format_devices(len(picked))} told to move, "
            f"{raised + len(picked)} of {len(here)} on this rung",
            **self.place(),
            devices=listed(picked),
            told=len(picked),
            raised=raised + len(picked),
            limit=limit,
            fleet=len(here),
            epoch=self.state.epoch,
        )
        return False

    def _wave_has_moved(self) -> bool:
        mine = self.of_wave()
        if any(member.state is MemberState.MOVING for member in mine):
            return False
        here = [m for m in self.members.values() if m.rung == self.state.rung]
        moved = sum(member.state is MemberState.MOVED for member in mine)
        if not mine:
            # A person or an amended plan has taken all of them out: open it again with others.
            self.close_wave()
            return True
        if not any(member.state is MemberState.MOVED for member in here):
            self.change(reason="waits: no device of the wave has moved or can be reached")
            return False
        behind = [member for member in mine if member.state is MemberState.STRAGGLER]
        self.change(wave_phase=WavePhase.BAKING, bake_started_at=self.now, reason="")
        self.note(
            "wave_moved",
            f"{self.wave_name()}: {format_devices(moved)} moved"
            + (f", {len(behind)} did not" if behind else "")
            + f"; bakes for {format_duration(self.rung.bake_s)}",
            **self.place(),
            moved=moved,
            stragglers={member.device: member.reason for member in behind[:LISTED]},
        )
        # The gates of this round were measured while the wave was still moving.
        return False

    def _wave_has_baked(self) -> bool:
        assert self.state.bake_started_at is not None
        if self.now - self.state.bake_started_at < self.rung.bake_s:
            return False
        return self._gates_hold() and self._may_grow()

    def _gates_hold(self) -> bool:
        waits = [result.gate for result in self.gates if result.verdict is not Verdict.ADVANCE]
        if waits and self.state.phase is Phase.RUNNING:
            self.change(reason=f"waits for {', '.join(waits)}")
        return not waits

    def _pass_wave(self) -> None:
        self.note(
            "wave_passed",
            f"{self.wave_name()} passed all gates",
            **self.place(),
            gates=self._verdicts(),
        )
        self._next_wave()

    def _next_wave(self) -> None:
        self.close_wave()
        if self.state.wave + 1 < len(self.rung.waves):
            self.change(wave=self.state.wave + 1)
        elif self.state.rung + 1 < len(self.rungs):
            self.change(rung=self.state.rung + 1, wave=0)
        else:
            self._finish()

    def _verdicts(self) -> list[dict[str, Any]]:
        """Each gate's verdict with its whole sample, from which it can be computed again."""
        return [
            {
                "gate": result.gate,
                "verdict": result.verdict,
                "why": result.why,
                "missing": result.missing,
                "sample": result.sample,
            }
            for result in self.gates
        ]

    def _finish(self) -> None:
        behind = [m for m in self.members.values() if m.state is MemberState.STRAGGLER]
        moved = sum(m.state is MemberState.MOVED for m in self.members.values())
        out = sum(m.state is MemberState.EXCLUDED for m in self.members.values())
        reason = f"not moved: {format_devices(len(behind))}" if behind else ""
        self.change(phase=Phase.FINISHED, reason=reason)
        self.note(
            "migration_finished",
            f"finished: {format_devices(moved)} moved, {len(behind)} did not, {out} take no part",
            moved=moved,
            stragglers={member.device: member.reason for member in behind[:LISTED]},
            stragglers_total=len(behind),
            excluded=out,
        )

    def _see_wave_return(self) -> None:
        if self.state.wave_phase is not WavePhase.RETURNING or self.state.returned_at is not None:
            return
        going = [m for m in self.members.values() if m.state is MemberState.RETURNING]
        if any(self.online(member) for member in going) or (going and not self.seen.old_up):
            return
        self.change(returned_at=self.now)
        self.note(
            "wave_returned",
            f"{self.wave_name()} has gone back"
            + (f"; out of reach: {format_devices(len(going))}" if going else ""),
            unreached={member.device: member.reason for member in going[:LISTED]},
        )

    def _see_all_return(self) -> None:
        going = [
            member
            for member in self.members.values()
            if member.state is MemberState.RETURNING
            or (member.state is MemberState.EXCLUDED and member.told_at and member.moved_at is None)
        ]
        if any(self.online(member) for member in going) or (going and not self.seen.old_up):
            return
        for member in going:
            if member.state is MemberState.RETURNING:
                self._straggler(member, member.reason or "has not been heard of since it was told to go back")
        self.change(phase=Phase.REVERTED, returned_at=self.now)
        back = sum(back_at_start(member) for member in self.members.values())
        self.note(
            "migration_reverted",
            f"reverted: {format_devices(back)} back on the old side"
            + (f", {len(going)} out of reach" if going else ""),
            back=back,
            unreached={member.device: member.reason for member in going[:LISTED]},
            unreached_total=len(going),
        )

    # -- repeating -------------------------------------------------------------------------------------

    def _tell_again(self) -> None:
        """Repeat orders not yet obeyed: soon at first, then more slowly; at once to a device come online.

        A device that has moved and tries again needs its order's probe once more. It is not raised by that,
        so it gets it while nothing may climb as well.
        """
        last = self.state.told_again_at
        if last is not None and self.now - last < TELL_AGAIN_S:
            return
        up = self._sides_up()
        climbing = up and self.state.phase in (Phase.RUNNING, Phase.FINISHED)
        again: list[Member] = []
        afresh: list[Member] = []
        anew: list[Member] = []
        for member in self.members.values():
            if member.told_at is None or member.device in self.tells:
                continue
            seen = self.sight(member)
            if not self._unanswered(member):
                if member.rung > 0 and up and tries_again(member, seen) and self.online(member):
                    anew.append(member)
                continue
            if member.rung > 0 and member.state in (MemberState.MOVING, MemberState.STRAGGLER):
                if not climbing:
                    continue
                if went_back(member, seen):
                    # It stays back until an order of a newer epoch comes.
                    if self.now - member.told_at >= self.rungs[member.rung].retry_after_s:
                        afresh.append(member)
                    continue
            report = newest(seen)
            other = report is not None and report.flags != self.rungs[member.rung].flags
            if report is not None and other and report.epoch > member.epoch:
                # It refuses our order as older than what it has obeyed since.
                if not self._obeys_another(member, seen):
                    afresh.append(member)
            elif self._due(member, last):
                again.append(member)
        if not again and not afresh and not anew:
            return
        self.note_devices("devices_try_again", "moved, and trying the new side anew", anew)
        for member in again + anew:
            self.tells[member.device] = Tell(device=member.device, epoch=member.epoch, rung=member.rung)
        for state in (MemberState.MOVING, MemberState.RETURNING, MemberState.EXCLUDED):
            self.order((m for m in afresh if _as_told(m) is state), state=state)
        self.change(told_again_at=self.now)

    def _sides_up(self) -> bool:
        return self.seen.old_up and self.seen.new_up

    @staticmethod
    def _unanswered(member: Member) -> bool:
        if member.state is MemberState.EXCLUDED:
            return member.moved_at is None
        return member.state in (MemberState.MOVING, MemberState.RETURNING, MemberState.STRAGGLER)

    def _due(self, member: Member, last: float | None) -> bool:
        assert member.told_at is not None
        before = max(last if last is not None else member.told_at, member.told_at)
        since = self.since(member)
        if self.online(member) and since is not None and since > before:
            return True
        return _repeats(self.now - member.told_at) > _repeats(before - member.told_at)


def _as_told(member: Member) -> MemberState:
    """The state of a device whose order is given afresh: a straggler is on its way again."""
    if member.state is MemberState.STRAGGLER:
        return MemberState.MOVING if member.rung > 0 else MemberState.RETURNING
    return member.state


def _repeats(age_s: float) -> int:
    """How often an order this old should have been repeated: after 5, 10, 20, 40 s, then every minute."""
    doubling = int(math.log2(TELL_AGAIN_MOST_S / TELL_AGAIN_S)) + 1
    if age_s < TELL_AGAIN_S:
        return 0
    return min(int(math.log2(age_s / TELL_AGAIN_S)) + 1, doubling) + int(age_s // TELL_AGAIN_MOST_S)


def _coarse(seconds: float) -> float:
    """Rounded to what a reader wants to know."""
    if seconds < 120:
        return round(max(seconds, 0))
    return round(seconds / 60) * 60.0 if seconds < 7200 else round(seconds / 3600) * 3600.0
