"""One round of a migration: the copy of its state that a decision works on, and what it may do with it."""

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from fleetlift.core.evidence import LISTED, newest
from fleetlift.core.migration import (
    AuditEntry,
    DeviceObservation,
    Member,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Tell,
    WavePhase,
)
from fleetlift.core.plan import Plan, Rung, ladder
from fleetlift.core.selection import cannot_move
from fleetlift.core.units import format_devices

_NOTHING = DeviceObservation()


class Round:
    """Local variables with names, thrown away when the decision has been made."""

    def __init__(self, plan: Plan, state: MigrationState, seen: Observations, now: float) -> None:
        self.plan, self.seen, self.now = plan, seen, now
        self.rungs = ladder(plan)
        # An amended plan may have fewer rungs or waves than the one the state was made under.
        rung = min(max(state.rung, 1), len(self.rungs) - 1)
        self.state = replace(state, rung=rung, wave=min(state.wave, len(self.rungs[rung].waves) - 1))
        self.members: dict[str, Member] = dict(state.members)
        self.fleet = None if seen.fleet is None else {device.id: device for device in seen.fleet}
        self.tells: dict[str, Tell] = {}
        self.audit: list[AuditEntry] = []
        self.answered: list[int] = []

    @property
    def rung(self) -> Rung:
        return self.rungs[self.state.rung]

    def change(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)

    def put(self, member: Member, **changes: Any) -> Member:
        after = replace(self.members[member.device], **changes)
        self.members[member.device] = after
        return after

    def of_wave(self) -> list[Member]:
        """The devices that the open wave has raised."""
        return [
            member
            for member in self.members.values()
            if member.rung == self.state.rung
            and member.wave == self.state.wave
            and member.state in (MemberState.MOVING, MemberState.MOVED, MemberState.STRAGGLER)
        ]

    def wave_name(self) -> str:
        share = self.rung.waves[self.state.wave]
        return f"{self.rung.name}, wave {self.state.wave + 1} of {len(self.rung.waves)} ({share})"

    def place(self) -> dict[str, Any]:
        """The open wave's place in the plan, for the audit log."""
        return {"rung": self.state.rung, "wave": self.state.wave}

    def note(self, kind: str, text: str, actor: str = "controller", **evidence: Any) -> None:
        self.audit.append(AuditEntry(kind=kind, text=text, actor=actor, evidence=evidence))

    def note_devices(self, kind: str, what: str, members: Sequence[Member]) -> None:
        if members:
            first = members[0]
            more = f" and {len(members) - 1} more" if len(members) > 1 else ""
            why = f" ({first.reason})" if first.reason else ""
            self.note(
                kind,
                f"{what}: {first.device}{why}{more}",
                devices={member.device: member.reason for member in members[:LISTED]},
                total=len(members),
            )

    # -- the fleet -------------------------------------------------------------------------------------

    def sight(self, member: Member) -> DeviceObservation:
        """What was seen of a device in this round."""
        return self.seen.devices.get(member.device, _NOTHING)

    def barred(self, device: str) -> str | None:
        """Why a device takes no part by plan and fleet, as far as they can be read."""
        assert self.fleet is not None
        if (there := self.fleet.get(device)) is None:
            return "not selected by the plan"
        return cannot_move(self.plan.fleet, there)

    def online(self, member: Member) -> bool:
        seen = self.sight(member)
        there = self.fleet.get(member.device) if self.fleet else None
        return seen.connected_old or seen.connected_new or (there is not None and there.connected)

    def since(self, member: Member) -> float | None:
        there = self.fleet.get(member.device) if self.fleet else None
        return there.since if there else None

    # -- orders ----------------------------------------------------------------------------------------

    def order(
        self,
        members: Iterable[Member],
        *,
        state: MemberState,
        rung: int | None = None,
        reason: str | None = None,
    ) -> list[Member]:
        """Order `members` to `rung` (None: the one each stands on) with one fresh epoch."""
        listed = sorted(members, key=lambda m: m.rank)
        if not listed:
            return []
        epoch = max(self.state.epoch, self._highest_seen()) + 1
        self.change(epoch=epoch)
        told = []
        for member in listed:
            goal = member.rung if rung is None else rung
            after = self.put(
                member,
                rung=goal,
                came_from=member.came_from if goal == member.rung else member.rung,
                epoch=epoch,
                state=state,
                reason=member.reason if reason is None else reason,
                told_at=self.now,
                moved_at=None,
            )
            self.tells[member.device] = Tell(device=member.device, epoch=epoch, rung=goal)
            told.append(after)
        return told

    def _highest_seen(self) -> int:
        return max(
            (
                report.epoch
                for seen in self.seen.devices.values()
                for report in (seen.report, seen.report_by_new)
                if report is not None
            ),
            default=0,
        )

    def exclude(self, members: Iterable[Member], reason: str) -> None:
        """Take devices out, by a person (`reason`) or by the plan; those ever told something go back."""
        back: list[Member] = []
        for member in members:
            out = self.put(
                member, state=MemberState.EXCLUDED, reason=reason or self.barred(member.device) or ""
            )
            if self.touched(member):
                back.append(out)
        self.order(back, state=MemberState.EXCLUDED, rung=0)

    def touched(self, member: Member) -> bool:
        """Whether the device may be elsewhere than on the old side.

        A store that was brought back from a backup knows less than the devices do, so they are asked too.
        """
        report = newest(self.sight(member))
        if report is not None and report.epoch > member.epoch and report.flags != self.rungs[0].flags:
            return True
        return member.epoch > 0 and not back_at_start(member)

    def return_wave(self, reason: str) -> list[Member]:
        """The open wave's devices go back to where the wave found them; the migration is held."""
        mine = self.of_wave()
        told: list[Member] = []
        for goal in sorted({member.came_from for member in mine}):
            told += self.order(
                (m for m in mine if m.came_from == goal), state=MemberState.RETURNING, rung=goal, reason=""
            )
        self._returning(told, Phase.HELD, reason)
        return told

    def _returning(self, told: Sequence[Member], phase: Phase, reason: str) -> None:
        """Devices are on their way back: no wave is open for them until they have arrived."""
        for member in told:
            self.put(member, wave=None)
        self.change(
            phase=phase,
            wave_phase=WavePhase.RETURNING,
            reason=reason,
            reverts=self.state.reverts + 1,
            returned_at=None,
            unmeasured_since=None,
            approved=False,
        )

    def revert_all(self, reason: str, kind: str, actor: str) -> None:
        told = self.order(
            (m for m in self.members.values() if m.state is not MemberState.EXCLUDED and self.touched(m)),
            state=MemberState.RETURNING,
            rung=0,
            reason="",
        )
        self._returning(told, Phase.REVERTING, reason)
        self.note(kind, f"{reason}: {format_devices(len(told))} told to go back", actor, devices=len(told))

    def close_wave(self) -> None:
        self.change(
            wave_phase=WavePhase.MOVING,
            wave_opened_at=None,
            bake_started_at=None,
            unmeasured_since=None,
            approved=False,
        )


def back_at_start(member: Member) -> bool:
    return member.rung == 0 and member.state is MemberState.RETURNED
