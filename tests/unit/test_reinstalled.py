"""A device that had moved is installed anew: it tries the same order again, and needs its probe again."""

import pytest
from pretend import Pretend, PretendDevice, plan

from fleetlift.core.migration import MemberState, Phase, RequestKind
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags
from fleetlift.core.plan import Move, ladder

ALL_MOVES = (Move.TELEMETRY, Move.COMMANDS, Move.LINK)
TRY_S = 8


class Reinstalled(PretendDevice):
    """Its disk can be wiped. Then it is on the old side, gets its order there and tries for `TRY_S`."""

    tries_since: float | None = None
    wanted = Flags()

    def wipe(self, now: float) -> None:
        self.tries_since, self.wanted, self.flags, self.since = now, self.flags, Flags(), now

    def told(self, epoch: int, flags: Flags) -> None:
        if self.tries_since is not None and epoch == self.epoch and flags.needs_new:
            self.flags, self.tries_since = flags, None
            self._say(DevicePhase.MOVED)
        super().told(epoch, flags)

    def step(self, now: float, new_up: bool) -> None:
        if self.pending is not None:
            self.tries_since = None
        if self.tries_since is not None:
            self._say(DevicePhase.TRYING if now - self.tries_since < TRY_S else DevicePhase.WENT_BACK)
        super().step(now, new_up)

    def _say(self, phase: DevicePhase) -> None:
        said = DeviceReport(epoch=self.epoch, phase=phase, flags=self.flags)
        if phase is DevicePhase.WENT_BACK:
            self.report, self.tries_since = said, None
        else:
            # Of one epoch the later phase counts as the newest word of both sides: see `levers/flag.py`.
            self.report_by_new = said


def moved_world(gates: tuple[str, ...] = ("devices.silent == 0",)) -> tuple[Pretend, Reinstalled]:
    p = Pretend(plan(moves=ALL_MOVES, waves=("100%",), gates=gates, silent_after_s=10.0, bake_s=60), 40)
    device = p.devices["car-002"] = Reinstalled("car-002")
    p.until_wave(len(ladder(p.plan)) - 1, 0)
    p.run(20)
    assert p.state.members[device.name].state is MemberState.MOVED
    return p, device


def test_it_comes_back_by_itself_within_its_try() -> None:
    p, device = moved_world()
    last, told = device.flags, len(p.tells)
    device.wipe(p.now)
    p.run(TRY_S)
    assert device.flags == last and {tell.device for tell in p.tells[told:]} == {device.name}
    assert "devices_try_again" in p.kinds()
    p.until(Phase.FINISHED)
    assert p.state.reverts == 0 and p.on_new() == set(p.devices)


@pytest.mark.parametrize("kind", [RequestKind.PAUSE, None])
def test_it_does_while_nothing_may_climb(kind: RequestKind | None) -> None:
    """It is not raised by that: it stands on its rung already. None: the migration has finished."""
    p, device = moved_world()
    if kind is None:
        p.until(Phase.FINISHED)
    else:
        p.ask(kind)
        p.run(2)
    last, epoch = device.flags, p.state.epoch
    device.wipe(p.now)
    p.run(TRY_S)
    assert device.flags == last and p.state.epoch == epoch


def test_it_is_left_alone_while_a_side_is_down() -> None:
    """Nobody is sent to a new side that does not answer; it gives up its try and is told afresh later."""
    p, device = moved_world(gates=())
    told = len(p.tells)
    device.wipe(p.now)
    p.new_up = False
    p.run(TRY_S + 2)
    assert device.flags == Flags() and len(p.tells) == told
    p.new_up = True
    p.run(200)
    assert p.on_new() == set(p.devices) and p.state.reverts == 0


def test_it_is_not_told_for_good() -> None:
    """One that cannot finish its try is asked some times, as long as that lasts."""
    p, device = moved_world(gates=())
    told = len(p.tells)
    device.wipe(p.now)
    end = p.now + 60
    while p.now < end:
        p.step(deliver=lambda _: False)
    assert len(p.tells) == told
    assert p.kinds().count("devices_try_again") <= 3
