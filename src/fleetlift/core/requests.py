"""What people ask of a migration while it runs: each request is done, or refused with the reason."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from fleetlift.core.chain import digest
from fleetlift.core.evidence import listed
from fleetlift.core.migration import Member, MemberState, Phase, Request, RequestKind, WavePhase
from fleetlift.core.round import Round
from fleetlift.core.units import format_devices, format_some

_MAY: Final[Mapping[RequestKind, frozenset[Phase]]] = MappingProxyType(
    {
        RequestKind.PAUSE: frozenset({Phase.RUNNING}),
        RequestKind.RESUME: frozenset(set(Phase) - {Phase.RUNNING, Phase.RELEASED}),
        RequestKind.APPROVE: frozenset({Phase.RUNNING, Phase.PAUSED}),
        RequestKind.REVERT: frozenset(
            {Phase.RUNNING, Phase.PAUSED, Phase.HELD, Phase.REVERTING, Phase.REVERTED, Phase.FINISHED}
        ),
        RequestKind.AMEND: frozenset(set(Phase) - {Phase.RELEASED}),
        RequestKind.RELEASE: frozenset({Phase.FINISHED, Phase.REVERTED}),
        RequestKind.EMERGENCY: frozenset(set(Phase) - {Phase.RELEASED}),
    }
)
"""In which phases a request is taken; in the others it is refused, with a line in the audit log."""


def answer_requests(round_: Round) -> None:
    """Take each open request, or refuse it with a line in the audit log that says why."""
    for request in round_.seen.requests:
        # Who left the plan is known from the fleet alone; while it cannot be read the request waits.
        if request.kind is RequestKind.AMEND and round_.fleet is None:
            break
        single = request.kind in (RequestKind.RESUME, RequestKind.REVERT) and "device" in request.args
        if round_.state.phase in _MAY[request.kind] or (single and round_.state.phase is not Phase.RELEASED):
            refusal = _HANDLERS[request.kind](round_, request)
        else:
            refusal = f"the migration is {round_.state.phase}"
        if refusal is not None:
            text = f"{request.kind} refused: {refusal}"
            round_.note("request_refused", text, request.actor, args=request.args)
        round_.answered.append(request.id)


def _pause(round_: Round, request: Request) -> str | None:
    round_.change(phase=Phase.PAUSED, reason=f"paused by {request.actor}")
    round_.note("migration_paused", f"paused by {request.actor}; gates stay armed", request.actor)
    return None


def _resume(round_: Round, request: Request) -> str | None:
    if "device" in request.args:
        return _resume_device(round_, str(request.args["device"]), request.actor)
    before = round_.state.phase
    text = f"resumed by {request.actor}; it was {before}"
    round_.note("migration_resumed", text, request.actor, was=before)
    match before:
        case Phase.PAUSED:
            round_.change(phase=Phase.RUNNING, reason="")
        case Phase.HELD | Phase.FINISHED:
            _try_again(round_)
        case _:
            round_.change(phase=Phase.RUNNING, rung=1, wave=0, reason="")
            round_.close_wave()
    return None


def _try_again(round_: Round) -> None:
    """Open the held wave again, or go on with it where its devices have stayed."""
    returned = round_.state.wave_phase is WavePhase.RETURNING or round_.state.phase is Phase.FINISHED
    round_.change(phase=Phase.RUNNING, reason="", measured_from=round_.now, unmeasured_since=None)
    if returned:
        round_.close_wave()
    elif round_.state.bake_started_at is not None:
        round_.change(bake_started_at=round_.now)
    round_.order(
        (m for m in round_.members.values() if m.state is MemberState.STRAGGLER and m.rung > 0),
        state=MemberState.MOVING,
        reason="",
    )


def _resume_device(round_: Round, device: str, actor: str) -> str | None:
    member = round_.members.get(device)
    if member is None or device not in round_.state.kept_back:
        return f"{device} is not among the devices that were sent back"
    round_.change(kept_back=tuple(d for d in round_.state.kept_back if d != device))
    on_its_way = member.told_at is not None and member.moved_at is None
    round_.put(member, state=MemberState.RETURNING if on_its_way else MemberState.WAITING, reason="")
    round_.note("device_resumed", f"{device} takes part again, asked by {actor}", actor, device=device)
    return None


def _approve(round_: Round, request: Request) -> str | None:
    if round_.state.wave_phase is not WavePhase.AWAITING_APPROVAL:
        return "no wave waits for approval"
    round_.change(approved=True)
    text = f"{round_.wave_name()} approved by {request.actor}"
    round_.note("wave_approved", text, request.actor, **round_.place())
    return None


def _revert(round_: Round, request: Request) -> str | None:
    if "device" in request.args:
        return _revert_device(round_, str(request.args["device"]), request.actor)
    if request.args.get("wave"):
        return _revert_wave(round_, request.actor)
    if round_.state.phase in (Phase.REVERTING, Phase.REVERTED):
        return f"the migration is {round_.state.phase} already"
    round_.revert_all(f"reverted by {request.actor}", "migration_reverting", request.actor)
    return None


def _revert_wave(round_: Round, actor: str) -> str | None:
    if round_.state.wave_opened_at is None or round_.state.phase in (Phase.REVERTING, Phase.REVERTED):
        return "no wave is open"
    if round_.state.wave_phase is WavePhase.RETURNING:
        return "the wave is going back already"
    round_.return_wave(f"sent back by {actor}")
    text = f"{round_.wave_name()}: {round_.state.reason}"
    round_.note("wave_returning", text, actor, **round_.place())
    return None


def _revert_device(round_: Round, device: str, actor: str) -> str | None:
    member = round_.members.get(device)
    if member is None:
        return f"{device} is not a device of this migration"
    if device not in round_.state.kept_back:
        round_.change(kept_back=(*round_.state.kept_back, device))
    round_.exclude([member], f"sent back by {actor}")
    round_.note("device_sent_back", f"{device} sent back by {actor}", actor, device=device)
    return None


def _amend(round_: Round, request: Request) -> str | None:
    assert round_.fleet is not None
    gone = [
        member
        for member in round_.members.values()
        if member.state is not MemberState.EXCLUDED and round_.barred(member.device) is not None
    ]
    round_.exclude(gone, "")
    stay = sum(member.state is not MemberState.EXCLUDED for member in round_.members.values())
    round_.note(
        "plan_amended",
        f"plan amended by {request.actor}: goes on with {format_devices(stay)}, {len(gone):,} taken out",
        request.actor,
        taken_out=listed(member.device for member in gone),
        taken_out_total=len(gone),
        plan=digest(str(request.args.get("plan", ""))),
    )
    if round_.state.phase in (Phase.HELD, Phase.FINISHED):
        _try_again(round_)
    return None


def _release(round_: Round, request: Request) -> str | None:
    left = [m.device for m in round_.members.values() if _left_behind(round_, m)]
    if left and not request.args.get("force"):
        names = format_some(left, 5)
        return f"{format_devices(len(left))} not moved yet ({names}); release with force to give them up"
    round_.change(phase=Phase.RELEASED, reason=f"released by {request.actor}")
    round_.note(
        "migration_released",
        f"released by {request.actor}: there is no way back any more",
        request.actor,
        given_up=listed(left),
    )
    return None


def _left_behind(round_: Round, member: Member) -> bool:
    """Whether a device would be cut off, or held by half, once nobody keeps the old side.

    Not stragglers alone: also those that have joined since, or are still on their way back.
    """
    if member.state is MemberState.EXCLUDED:
        return member.told_at is not None and member.moved_at is None
    if round_.state.phase is Phase.REVERTED:
        return member.state not in (MemberState.RETURNED, MemberState.WAITING)
    return member.state is not MemberState.MOVED or member.rung < len(round_.rungs) - 1


def _emergency(round_: Round, request: Request) -> str | None:
    epoch = request.args.get("epoch")
    if isinstance(epoch, int):
        round_.change(epoch=max(round_.state.epoch, epoch))
    if round_.state.phase in (Phase.REVERTING, Phase.REVERTED):
        # The journal may be used as often as one likes: there is nothing more to send back.
        text = f"reverted by the journal once more; the migration was {round_.state.phase} already"
        round_.note("emergency_repeated", text, request.actor, epoch=epoch)
    else:
        reason = "reverted by the journal, outside the controller"
        round_.revert_all(reason, "emergency_taken_in", request.actor)
    return None


_HANDLERS: Final[Mapping[RequestKind, Callable[[Round, Request], str | None]]] = {
    RequestKind.PAUSE: _pause,
    RequestKind.RESUME: _resume,
    RequestKind.APPROVE: _approve,
    RequestKind.REVERT: _revert,
    RequestKind.AMEND: _amend,
    RequestKind.RELEASE: _release,
    RequestKind.EMERGENCY: _emergency,
}
