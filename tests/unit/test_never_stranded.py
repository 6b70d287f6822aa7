"""No device is ever stranded: every point of a move, with every fault, and a reboot in the middle of it.

Once the fault is over, the device reaches a side that accepts it within a time that its settings give, and
obeys a newer order that comes by that side alone. What it measured is neither lost nor still waiting then.
"""

from collections.abc import Callable, Iterator

import msgspec
import pytest
from agent_world import ENDPOINT, NEW, OLD, World, flags, orders

from fleetlift.core.orders import DevicePhase, Endpoint, Flags, TelemetryFlag
from fleetlift.device import messages as m
from fleetlift.device.agent import AgentSettings

SETTINGS = AgentSettings()
LIMIT_S = 30.0  # of a try, and of a lost new side
AGAIN_S = (
    SETTINGS.connect_within_s + SETTINGS.backoff_max_s + 1.0
)  # a link that is wanted is made within this
NOTICED_S = SETTINGS.acked_within_s + 1.0  # a connection that went dead is noticed within this

# How long it takes at most until a device is served, from the end of the fault.
WITHIN_S = {
    # It wants the old link already, or still has the limit of the lost new side to wait for.
    OLD: LIMIT_S + NOTICED_S + AGAIN_S,
    # The old side has to be away for `stranded_after_s` before orders are awaited on the new one.
    NEW: LIMIT_S + NOTICED_S + SETTINGS.stranded_after_s + AGAIN_S,
}

ALL_NEW = flags("new", "new", "new")
LADDER = {
    "both": flags("both"),
    "new": flags("new"),
    "both-dry-run": flags("both", "dry-run"),
    "new-dry-run": flags("new", "dry-run"),
    "both-both": flags("both", "both"),
    "new-both": flags("new", "both"),
    "new-new": flags("new", "new"),
    "closed": ALL_NEW,
    "contradicting": flags("both", "new", "new"),
}
LEGS = ("telemetry", "shadow", "command")

Step = Callable[[World], None]


def wrong(place: str, w: World) -> None:
    """An order whose new side cannot be reached, or does not let the device in."""
    host, credential = ("wrong.example.com", "secret") if place == "host" else (ENDPOINT.host, "wrong")
    tls = place == "certificate"
    host = "wrong-certificate.example.com" if tls else host
    given = orders(
        w.agent.record.epoch + 1, ALL_NEW, new=Endpoint(host=host, port=8883, tls=tls), credential=credential
    )
    for path in (OLD, NEW):
        w.order(path, given)


# --- where a device may be when it strikes ---------------------------------------------------------------


def _fresh(w: World) -> None:
    w.run(1)


def _ordered_unstored(w: World) -> None:
    """The order has come, and a reboot now would find nothing of it on the disk."""
    w.run(1)
    w.fill_disk()
    w.order(OLD, orders(1, ALL_NEW))
    w.run(0.1)


def _trying(mute: tuple[str, ...]) -> Step:
    def go(w: World) -> None:
        w.run(1)
        w.sides[NEW].mute = set(mute)
        for path in (OLD, NEW):
            w.order(path, orders(1, flags("both", "both")))
        w.probe(1)
        w.run(2)
        assert w.in_phase(DevicePhase.TRYING), w

    return go


def _connecting(state: str) -> Step:
    def go(w: World) -> None:
        w.run(1)
        w.set_state(NEW, state)
        w.order(OLD, orders(1, ALL_NEW))
        w.run(2)
        assert w.in_phase(DevicePhase.TRYING), w

    return go


def _succeeded_unstored(w: World) -> None:
    """The try has succeeded, and the disk does not know it yet."""
    _trying(("command",))(w)
    w.fill_disk()
    w.sides[NEW].mute = set()
    w.probe(1)
    w.run(1)
    assert w.in_phase(DevicePhase.MOVED) and w.disk.record.phase is DevicePhase.TRYING, w


def _moved(name: str) -> Step:
    def go(w: World) -> None:
        w.run(1)
        w.move(LADDER[name])
        w.run(1)

    return go


def _losing(w: World) -> None:
    """Moved, and the new side has been away for some of the limit."""
    _moved("closed")(w)
    w.set_state(NEW, "away")
    w.run(15)
    assert w.in_phase(DevicePhase.MOVED), w


def _lost_unstored(w: World) -> None:
    """Gone back by itself, and the disk does not know it yet."""
    _losing(w)
    w.fill_disk()
    w.run(20)
    assert w.in_phase(DevicePhase.WENT_BACK) and w.disk.record.phase is DevicePhase.MOVED, w


def _went_back(w: World) -> None:
    w.run(1)
    w.set_state(NEW, "refusing")
    w.order(OLD, orders(1, ALL_NEW))
    w.run(40)
    w.set_state(NEW, "ok")
    assert w.in_phase(DevicePhase.WENT_BACK)


def _reverted(w: World) -> None:
    _moved("closed")(w)
    w.order(NEW, orders(2, Flags(), new=None, credential=None))
    w.run(5)
    assert w.in_phase(DevicePhase.OLD)


def _revert_unstored(w: World) -> None:
    """The order back is in force, and the disk does not know it yet."""
    _moved("closed")(w)
    w.fill_disk()
    w.order(NEW, orders(2, Flags(), new=None, credential=None))
    w.run(0.2)
    assert w.in_phase(DevicePhase.OLD) and w.disk.record.phase is DevicePhase.MOVED


def _raised_unstored(w: World) -> None:
    """One rung further while served, and the disk does not know it yet."""
    _moved("new-both")(w)
    w.fill_disk()
    w.order(OLD, orders(2, ALL_NEW))
    w.run(0.2)
    assert w.agent.flags == ALL_NEW and w.disk.record.flags == LADDER["new-both"]


POINTS: dict[str, Step] = {
    "fresh": _fresh,
    "ordered-unstored": _ordered_unstored,
    **{f"connecting-{state}": _connecting(state) for state in ("refusing", "away", "silent", "denying")},
    **{
        f"trying-without-{'-'.join(mute)}": _trying(mute)
        for n in range(1, 8)
        if (mute := tuple(leg for bit, leg in enumerate(LEGS) if n >> bit & 1))
    },
    "succeeded-unstored": _succeeded_unstored,
    **{f"moved-{name}": _moved(name) for name in LADDER},
    "raised-unstored": _raised_unstored,
    "losing": _losing,
    "lost-unstored": _lost_unstored,
    "went-back": _went_back,
    "reverted": _reverted,
    "revert-unstored": _revert_unstored,
}


# --- what strikes ----------------------------------------------------------------------------------------


def _gone(path: m.Path, state: str, seconds: float) -> Step:
    def strike(w: World) -> None:
        w.set_state(path, state)
        if state == "denying":
            w.break_link(path)
        w.run(seconds)

    return strike


def _both_gone(w: World) -> None:
    for path in (OLD, NEW):
        w.set_state(path, "away")
    w.run(3600)


def _rebooting(w: World) -> None:
    """A watchdog that finds no connection, again and again, in less than any limit."""
    for _ in range(8):
        w.run(9)
        w.crash()


def _rebooting_while_gone(path: m.Path) -> Step:
    def strike(w: World) -> None:
        w.set_state(path, "away")
        _rebooting(w)

    return strike


def _jump(by_s: float) -> Step:
    def strike(w: World) -> None:
        w.jump(by_s)
        w.run(3)

    return strike


def _full(w: World) -> None:
    w.fill_disk()
    w.produce(20)
    w.run(60)


def _order_lost(w: World) -> None:
    """A newer order that neither side delivers, and forgets."""
    kept = {path: w.sides[path].orders for path in (OLD, NEW)}
    for path in (OLD, NEW):
        w.set_state(path, "away")
        w.order(path, orders(w.agent.record.epoch + 1, ALL_NEW))
    w.run(5)
    for path in (OLD, NEW):
        w.sides[path].orders = kept[path]


def _order_repeated(w: World) -> None:
    for _ in range(3):
        for path in (OLD, NEW):
            if (given := w.sides[path].orders) is not None:
                w.order(path, given)
        w.run(0.5)


def _order_stale(w: World) -> None:
    kept = {path: w.sides[path].orders for path in (OLD, NEW)}
    for path in (OLD, NEW):
        w.order(path, orders(0, ALL_NEW))
        w.run(0.5)
        w.sides[path].orders = kept[path]


FAULTS: dict[str, Step] = {
    "none": lambda w: None,
    "reboot": lambda w: w.crash(),
    "rebooting": _rebooting,
    **{f"new-{state}": _gone(NEW, state, 100) for state in ("refusing", "away", "silent", "denying")},
    **{f"old-{state}": _gone(OLD, state, 100) for state in ("refusing", "away", "silent")},
    "new-away-a-moment": _gone(NEW, "away", 5),
    "old-away-a-moment": _gone(OLD, "away", 5),
    "both-away-an-hour": _both_gone,
    "rebooting-while-new-away": _rebooting_while_gone(NEW),
    "rebooting-while-old-away": _rebooting_while_gone(OLD),
    "wrong-credential": lambda w: wrong("credential", w),
    "wrong-certificate": lambda w: wrong("certificate", w),
    "wrong-host": lambda w: wrong("host", w),
    "order-lost": _order_lost,
    "order-repeated": _order_repeated,
    "order-stale": _order_stale,
    "disk-full": _full,
    "clock-an-hour-on": _jump(3600),
    "clock-an-hour-back": _jump(-3600),
}


def _reboot_with_a_wrong_clock(w: World) -> None:
    w.jump(-7200)
    w.crash()


# What comes on top of the fault.
WORSE: dict[str, Step] = {
    "": lambda w: None,
    "and-a-reboot": lambda w: w.crash(),
    "and-a-clock-set-on": lambda w: w.jump(3600),
    "and-a-reboot-with-a-wrong-clock": _reboot_with_a_wrong_clock,
}

# Which sides accept the device again when all is over.
AFTER = {"both": (OLD, NEW), "old-alone": (OLD,), "new-alone": (NEW,)}


def combinations() -> Iterator[tuple[str, str, str]]:
    for fault in FAULTS:
        for worse in list(WORSE)[: 2 if fault == "both-away-an-hour" else None]:  # an hour takes its time
            for after in AFTER:
                yield fault, worse, after


def served(w: World, path: m.Path) -> bool:
    side = w.sides[path]
    return side.state == "ok" and side.connected and (path is OLD or side.subscribed)


def knows_new(w: World) -> bool:
    """A device that was never told of a new side cannot be helped by it."""
    record = w.agent.record
    held = record.orders
    named = held is not None and held.new == ENDPOINT and held.credential == "secret"
    return named or record.served_at == m.Place(ENDPOINT, "secret")


@pytest.mark.parametrize("point", POINTS)
def test_from_every_point_of_a_move_with_every_fault_a_device_is_served_again(point: str) -> None:
    for n, (fault, worse, after) in enumerate(combinations()):
        w = World(seed=n)
        try:
            POINTS[point](w)
            w.produce(5)
            FAULTS[fault](w)
            w.produce(5)
            WORSE[worse](w)
            w.run(0.3)
            is_served_again(w, AFTER[after])
        except AssertionError as problem:
            case = f"{point}, {fault} {worse}, then {after}"
            raise AssertionError(f"{case}: {problem}") from problem


def is_served_again(w: World, accepting: tuple[m.Path, ...]) -> None:
    """The fault ends; `accepting` sides let the device in from now on."""
    w.free_disk()
    w.sides[NEW].mute = set()
    for path in (OLD, NEW):
        w.set_state(path, "ok" if path in accepting else "away")
    if accepting == (NEW,) and not knows_new(w):
        return
    w.until(lambda: any(served(w, path) for path in accepting), WITHIN_S[accepting[0]])
    w.run(3)  # what it finds there may be an order that sends it to the other side
    w.until(lambda: any(served(w, path) for path in accepting), WITHIN_S[accepting[0]])
    obeys_a_newer_order(w, next(path for path in accepting if served(w, path)), accepting)
    assert not w.lost()


def obeys_a_newer_order(w: World, by: m.Path, accepting: tuple[m.Path, ...]) -> None:
    """By the side that serves it: onto the new side where that accepts it, else wholly to the old one."""
    aim = ALL_NEW if NEW in accepting else Flags()
    epoch = w.agent.record.epoch + 10
    given = orders(epoch, aim)
    w.order(by, given)
    if NEW in accepting:
        w.sides[NEW].backlog.clear()  # probes of earlier tries
        w.probe(epoch)
    # What it finds there first may be the wrong order, which it then tries: the newer one comes after that.
    within_s = LIMIT_S + WITHIN_S[accepting[0]]
    w.until(lambda: w.agent.record.epoch == epoch and w.agent.flags == aim, within_s)
    serving = NEW if aim.telemetry is TelemetryFlag.NEW else OLD
    w.produce(3)
    w.until(lambda: served(w, serving) and w.drained(), AGAIN_S)
    w.until(lambda: any(r.epoch == epoch for r in w.sides[serving].reports), AGAIN_S)
    assert msgspec.structs.replace(w.agent.record, try_started_at=None) == msgspec.structs.replace(
        w.disk.record, try_started_at=None
    )


def test_how_many_cases_there_are() -> None:
    assert len(POINTS) * len(list(combinations())) > 7_000
