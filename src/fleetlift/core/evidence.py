"""What the reports of devices and the telemetry seen of them prove about their moves."""

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from fleetlift.core.gates import Gate, judge
from fleetlift.core.migration import DeviceObservation, GateResult, Member, Sample, Verdict
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags, TelemetryFlag
from fleetlift.core.units import format_devices, format_some

LISTED: Final = 20  # devices named in one line of evidence
ON_THE_WAY: Final = "on_the_way"  # in a sample's evidence: devices that may yet turn the verdict
BY_NEW: Final = (TelemetryFlag.BOTH, TelemetryFlag.NEW)


def has_moved(member: Member, seen: DeviceObservation, flags: Flags) -> bool:
    """Evidence from the new side: its report of the order, and telemetry by it where `flags` ask for that."""
    report = seen.report_by_new
    if report is None or report.phase is not DevicePhase.MOVED or member.told_at is None:
        return False
    if report.epoch < member.epoch or report.flags != flags:
        return False
    if flags.telemetry in BY_NEW:
        return seen.new_telemetry_at is not None and seen.new_telemetry_at > member.told_at
    return True


def has_returned(member: Member, seen: DeviceObservation, flags: Flags, came_from: Flags) -> bool:
    """Whether either side shows that the device obeys `flags`, those of the rung it was sent back to."""
    for report in (seen.report, seen.report_by_new):
        if report is not None and report.epoch >= member.epoch and report.flags == flags:
            return report.phase is not DevicePhase.TRYING
    # Telemetry on the old path tells something only of a device that no longer sent any there: that was told
    # so, and has said that it obeys.
    said = newest(seen)
    return (
        flags == Flags()
        and came_from.telemetry is TelemetryFlag.NEW
        and said is not None
        and said.flags.telemetry is TelemetryFlag.NEW
        and member.told_at is not None
        and seen.old_telemetry_at is not None
        and seen.old_telemetry_at > member.told_at
    )


def obeys_another(seen: DeviceObservation, flags: Flags, epoch: int) -> bool:
    """Whether the device obeys an order back to the old side newer than `epoch`, the newest of ours."""
    report = newest(seen)
    return report is not None and report.epoch > epoch and report.flags == Flags() and flags != Flags()


def went_back(member: Member, seen: DeviceObservation) -> bool:
    """Whether the device has given this order up. It stays so until a newer order: no report outdoes it."""
    if member.epoch == 0:
        return False
    for report in (seen.report, seen.report_by_new):
        if report is not None and report.phase is DevicePhase.WENT_BACK and report.epoch >= member.epoch:
            return True
    return False


def tries_again(member: Member, seen: DeviceObservation) -> bool:
    """Whether a device that has moved is at the same order's try once more, as after its disk was wiped.

    The report by the new side tells: what it says there comes in order, and by the old side alone it cannot
    know what the new one has seen of it.
    """
    report = seen.report_by_new
    return report is not None and report.phase is DevicePhase.TRYING and report.epoch == member.epoch > 0


def why_back(member: Member, seen: DeviceObservation) -> str:
    for report in (seen.report, seen.report_by_new):
        if report is not None and report.phase is DevicePhase.WENT_BACK and report.epoch >= member.epoch:
            return f"went back by itself: {report.reason}" if report.reason else "went back by itself"
    return "went back by itself"


def foreign_reason(seen: DeviceObservation) -> str:
    report = newest(seen)
    return f"obeys order {report.epoch}, which is not this migration's" if report else ""


def newest(seen: DeviceObservation) -> DeviceReport | None:
    one, other = seen.report, seen.report_by_new
    if one is None or other is None:
        return other if one is None else one
    return other if other.epoch > one.epoch else one


def listed(devices: Iterable[str]) -> list[str]:
    """The first of them, as many as one line of evidence names."""
    return list(devices)[:LISTED]


class Moves:
    """Devices told to move that could be reached: moved, failed, or still under way."""

    def __init__(self) -> None:
        self.moved: list[Member] = []
        self.failed: list[Member] = []
        self.pending: list[Member] = []


def judge_moves(gate: Gate, moves: Moves) -> GateResult:
    # Those under way may yet turn out either way: a breach is one that they cannot mend, a pass one that
    # they cannot spoil.
    best = judge(gate, _success(moves, hoped=len(moves.pending)))
    if best.verdict is Verdict.REVERT or not moves.pending:
        return best
    worst = judge(gate, _success(moves, feared=len(moves.pending)))
    if worst.verdict is Verdict.ADVANCE:
        return worst
    return _on_the_way(gate, best, len(moves.pending))


def judge_again(gate: Gate, sample: Sample) -> GateResult:
    """The verdict that a stored sample of `gate` led to, also where devices were still on their way."""
    found = judge(gate, sample)
    pending = sample.evidence.get(ON_THE_WAY)
    if isinstance(pending, int) and found.verdict is not Verdict.REVERT:
        return _on_the_way(gate, found, pending)
    return found


def _on_the_way(gate: Gate, best: GateResult, pending: int) -> GateResult:
    assert best.sample is not None
    noted = {**best.sample.evidence, ON_THE_WAY: pending}
    return replace(
        best,
        verdict=Verdict.HOLD,
        why=f"{gate.metric}: {format_devices(pending)} still on the way",
        sample=replace(best.sample, evidence=noted),
    )


def _success(moves: Moves, *, hoped: int = 0, feared: int = 0) -> Sample:
    moved, failed = moves.moved, moves.failed
    total = len(moved) + len(failed) + hoped + feared
    if not moved and not failed:
        return Sample(value=None, evidence={"summary": "no device has moved or failed yet"})
    names = [member.device for member in failed]
    summary = f"{len(moved)} of {format_devices(total)} moved"
    if failed:
        why = f": {failed[0].reason}" if failed[0].reason else ""
        summary += f", {len(failed)} failed, {format_some(names, 3)}{why}"
    return Sample(
        value=100.0 * (len(moved) + hoped) / total,
        n=total,
        evidence={"summary": summary, "failed": listed(names)},
    )


def failures(moves: Moves) -> Sample:
    names = [member.device for member in moves.failed]
    known = len(moves.moved) + len(names)
    summary = f"of {format_devices(known)}" + (f": {format_some(names, 3)}" if names else "")
    return Sample(value=len(names), n=known, evidence={"summary": summary, "failed": listed(names)})
