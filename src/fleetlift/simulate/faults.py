"""Faults as they happen to a world, and how each is mended."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fleetlift.core.command import Path
from fleetlift.migrate.runner import STEPS
from fleetlift.simulate.device import SimulatedDevice
from fleetlift.simulate.new_side import NewSide
from fleetlift.simulate.old_side import OldSide
from fleetlift.simulate.scenario import Fault, chance

if TYPE_CHECKING:
    from fleetlift.simulate.world import World

Mend = Callable[[], None]


def _nothing() -> None:
    pass


def strike(world: "World", fault: Fault) -> Mend:
    """Let the fault happen; returns what ends it. Mending twice is harmless."""
    return _KINDS[fault.kind](world, fault)


def _some(world: "World", fault: Fault) -> list[SimulatedDevice]:
    devices = [device for device in world.devices.values() if device.boots]
    count = max(1, round(fault.share * len(devices)))
    return chance(world.scenario.seed, f"fault {fault.number}").sample(devices, min(count, len(devices)))


def _path(fault: Fault) -> Path:
    return Path.OLD if fault.old else Path.NEW


# -- devices ----------------------------------------------------------------------------------------------


def _reboot(world: "World", fault: Fault) -> Mend:
    return _off(world, fault, power=False)


def _power(world: "World", fault: Fault) -> Mend:
    return _off(world, fault, power=True)


def _off(world: "World", fault: Fault, *, power: bool) -> Mend:
    down = [device for device in _some(world, fault) if device.alive]
    for device in down:
        device.crash(power=power)

    def mend() -> None:
        for device in down:
            if not device.alive:
                device.boot()

    return mend


def _disk_full(world: "World", fault: Fault) -> Mend:
    devices = _some(world, fault)
    for device in devices:
        device.disk.full = True

    def mend() -> None:
        for device in devices:
            device.disk.full = False

    return mend


def _clock(world: "World", fault: Fault) -> Mend:
    for device in _some(world, fault):
        size = (3.0, 40.0, 600.0, 86_400.0)[int(fault.how * 4)]
        device.set_clock(size if fault.old else -size)
    return _nothing


# -- links ------------------------------------------------------------------------------------------------


def _cut(world: "World", fault: Fault) -> Mend:
    for device in _some(world, fault):
        device.links[_path(fault)].cut()
    return _nothing


def _stall(world: "World", fault: Fault) -> Mend:
    links = [device.links[_path(fault)] for device in _some(world, fault)]
    for link in links:
        link.stall()

    def mend() -> None:
        for link in links:
            link.unstall()

    return mend


def _half_open(world: "World", fault: Fault) -> Mend:
    for device in _some(world, fault):
        device.links[_path(fault)].half_open(up=fault.how < 0.5)
    return _nothing


def _refused(world: "World", fault: Fault) -> Mend:
    links = [device.links[_path(fault)] for device in _some(world, fault)]
    for link in links:
        link.refuses = True
        link.cut()

    def mend() -> None:
        for link in links:
            link.refuses = False

    return mend


def _slow(world: "World", fault: Fault) -> Mend:
    devices = list(world.devices.values()) if fault.share == 1.0 else _some(world, fault)
    paths = tuple(Path) if fault.how < 0.4 else (_path(fault),)
    links = [device.links[path] for device in devices for path in paths]
    was = [(link.latency_s, link.jitter_s) for link in links]
    for link in links:
        link.latency_s, link.jitter_s = 0.5 + 2.5 * fault.how, 1.0

    def mend() -> None:
        for link, (latency_s, jitter_s) in zip(links, was, strict=True):
            link.latency_s, link.jitter_s = latency_s, jitter_s

    return mend


# -- sides ------------------------------------------------------------------------------------------------


def _new_down(world: "World", fault: Fault) -> Mend:
    world.new.up = False
    world.new.drop_all("the server is gone")

    def mend() -> None:
        world.new.up = True

    return mend


def _new_hangs(world: "World", fault: Fault) -> Mend:
    return _hang(world, world.new)


def _old_hangs(world: "World", fault: Fault) -> Mend:
    return _hang(world, world.old)


def _hang(world: "World", side: OldSide | NewSide) -> Mend:
    side.hanging = True
    for link in world.links():
        if link.server is side:
            link.stall()

    def mend() -> None:
        if side.hanging:
            side.hanging = False
            for link in world.links():
                if link.server is side:
                    link.unstall()

    return mend


def _database_down(world: "World", fault: Fault) -> Mend:
    world.new.database.up = False

    def mend() -> None:
        world.new.database.up = True

    return mend


def _old_down(world: "World", fault: Fault) -> Mend:
    world.old.up = False
    world.old.drop_all("the server is gone")
    world.old.lose_feed()

    def mend() -> None:
        world.old.up = True

    return mend


def _telemetry_worker(world: "World", fault: Fault) -> Mend:
    world.new.kill_telemetry()

    def mend() -> None:
        if not world.new.telemetry_up:
            world.new.start_telemetry()

    return mend


def _state_worker(world: "World", fault: Fault) -> Mend:
    world.new.kill_state()

    def mend() -> None:
        if not world.new.state_up:
            world.new.start_state()

    return mend


# -- the engine -------------------------------------------------------------------------------------------


def _controller(world: "World", fault: Fault) -> Mend:
    for controller in world.controllers:
        controller.kill("by a fault")
    return world.need_controller


def _at_a_step(world: "World", fault: Fault) -> Mend:
    if world.controllers:
        step = STEPS[int(fault.how * len(STEPS))]
        world.controllers[-1].kill_at[step] = 1 + int(fault.lasts_s) % 3
    # The process is started again by its supervisor, whenever the step comes.
    return _nothing


def _two_controllers(world: "World", fault: Fault) -> Mend:
    """The old leader has lost its lock and does not know it."""
    before = list(world.controllers)
    world.start_controller()
    after = world.controllers[-1]

    def mend() -> None:
        for controller in before if fault.how < 0.7 else [after]:
            controller.kill("has noticed that it does not lead")
        world.need_controller()

    return mend


def _engine_down(world: "World", fault: Fault) -> Mend:
    world.engine.failing = True

    def mend() -> None:
        world.engine.failing = False

    return mend


def _loses_answers(world: "World", fault: Fault) -> Mend:
    world.engine.loses_answers = 0.1 + 0.5 * fault.how

    def mend() -> None:
        world.engine.loses_answers = 0.0

    return mend


def _cut_off(world: "World", fault: Fault) -> Mend:
    """Controllers reach one side no more: they are told so, or hang."""
    reaches = [c.reach_old if fault.old else c.reach_new for c in world.controllers]
    for reach in reaches:
        reach.failing, reach.hanging = fault.how < 0.5, fault.how >= 0.5

    def mend() -> None:
        for reach in reaches:
            reach.failing = reach.hanging = False

    return mend


_KINDS: dict[str, Callable[["World", Fault], Mend]] = {
    "reboot": _reboot,
    "power": _power,
    "disk full": _disk_full,
    "clock": _clock,
    "cut": _cut,
    "stall": _stall,
    "half-open": _half_open,
    "refused": _refused,
    "slow": _slow,
    "new down": _new_down,
    "new hangs": _new_hangs,
    "database down": _database_down,
    "old down": _old_down,
    "old hangs": _old_hangs,
    "telemetry worker": _telemetry_worker,
    "state worker": _state_worker,
    "controller": _controller,
    "controller at a step": _at_a_step,
    "two controllers": _two_controllers,
    "engine down": _engine_down,
    "engine loses answers": _loses_answers,
    "controller cut off": _cut_off,
}
