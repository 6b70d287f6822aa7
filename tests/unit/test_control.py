"""Devices that stay behind to be compared with, and waves that wait until their gates are sure."""

from msgspec.structs import replace
from pretend import Pretend, plan

from fleetlift.core.figures import arm, share_sample
from fleetlift.core.migration import Basis, Member, MemberState, MigrationState, Phase, WavePhase
from fleetlift.core.units import Share
from fleetlift.migrate.wave import groups, open_wave

AGREE = "commands.agreement >= 98%"


def test_the_control_stays_behind_until_the_last_wave_of_each_rung() -> None:
    """The last of the order: chosen as evenly as everybody else, and the same at every rung."""
    base = plan(waves=("2 devices", "60%", "100%"))
    p = Pretend(replace(base, fleet=replace(base.fleet, control=Share(percent=50.0))), 20)
    control = {d for d, m in p.state.members.items() if m.rank >= 10}
    behind_of = set()
    while p.state.phase is not Phase.FINISHED:
        p.step()
        state = p.state
        if state.wave < 2:
            assert all(state.members[d].rung < state.rung for d in control)
            behind_of.add(state.rung)
    assert behind_of == {1, 2}
    assert p.on_new() == set(p.devices)


def test_a_wave_waits_for_a_gate_that_is_not_sure_and_that_is_no_breach() -> None:
    """However long it takes: there is data, only not enough of it. Then it passes, or goes back."""
    for bad, phase in ((0, Phase.FINISHED), (400, Phase.HELD)):
        p = Pretend(plan(waves=("100%",), gates=(AGREE,), no_data_after_s=30.0), 4)
        p.samples[AGREE] = share_sample(arm([(10, 0)] * 4), None, Basis.NONE, over_s=9.0, evidence={})
        p.run(120)
        assert (p.state.phase, p.state.wave_phase, p.state.wave) == (Phase.RUNNING, WavePhase.BAKING, 0)
        assert p.state.reason == f"waits for {AGREE}" and p.state.unmeasured_since is None
        p.samples[AGREE] = share_sample(arm([(100, bad / 4)] * 4), None, Basis.NONE, over_s=9.0, evidence={})
        p.until(phase)


def test_without_confidence_figures_are_compared_as_they_are() -> None:
    p = Pretend(plan(waves=("100%",), gates=(AGREE,), confidence=None), 4)
    p.samples[AGREE] = share_sample(arm([(10, 0)] * 4), None, Basis.NONE, over_s=9.0, evidence={})
    p.until(Phase.FINISHED)


def member(rank: int, **more: object) -> Member:
    given = {"state": MemberState.WAITING, **more}
    return Member(device=f"car-{rank}", rank=rank, **given)  # type: ignore[arg-type]


def raised(rank: int, *, wave: int = 1) -> Member:
    return member(rank, rung=1, wave=wave, epoch=3, state=MemberState.MOVED)


def test_who_is_compared_was_chosen_by_chance_and_is_where_it_should_be() -> None:
    """Canaries were named; who failed, is away or was sent back tells nothing of the others."""
    members = [
        *(raised(n) for n in range(2, 6)),
        raised(1, wave=0),
        member(6),
        member(7),
        member(8, state=MemberState.EXCLUDED),
        member(9, state=MemberState.RETURNED),
        member(10, rung=1, wave=1, epoch=3, state=MemberState.STRAGGLER),
    ]
    state = MigrationState(name="m", rung=1, wave=1, members={m.device: m for m in members})
    found = groups(open_wave(state), state, ("car-7",))
    assert [m.rank for m in found.moved] == [2, 3, 4, 5]
    assert [m.rank for m in found.control] == [6]
    assert [m.rank for m in found.others] == [1, 6]
    named = groups(open_wave(state), state, ("car-3",))
    assert (len(named.moved), named.control, named.others) == (4, (), ())
