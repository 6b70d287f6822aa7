"""Which paths commands go by while a device is on its way from side to side."""

from itertools import product

from fleetlift.core.orders import CommandsFlag, DevicePhase, DeviceReport, Flags, Orders
from fleetlift.core.route import Route, followed, ordered

ALONE = {CommandsFlag.OLD: "old", CommandsFlag.DRY_RUN: "old", CommandsFlag.NEW: "new", CommandsFlag.BOTH: ""}


def orders(epoch: int, commands: CommandsFlag) -> Orders:
    return Orders(epoch=epoch, migration="m", flags=Flags(commands=commands))


def test_an_older_order_changes_no_route() -> None:
    held = Route(epoch=5, migration="m")
    assert ordered(held, orders(4, CommandsFlag.NEW)) is None
    assert ordered(held, orders(5, CommandsFlag.NEW)) is None


def test_between_two_sides_that_execute_alone_commands_go_by_both() -> None:
    """Until the device has said what it obeys, one of the two copies is executed whatever that is."""
    for before, after in product(CommandsFlag, CommandsFlag):
        held = Route(epoch=1, migration="m", flags=Flags(commands=before))
        route = ordered(held, orders(2, after))
        assert route is not None
        hand_over = {ALONE[before], ALONE[after]} == {"old", "new"}
        assert route.flags.commands is (CommandsFlag.BOTH if hand_over else after)


def test_the_route_follows_what_the_device_says_and_keeps_its_epoch() -> None:
    held = Route(epoch=3, migration="m", flags=Flags(commands=CommandsFlag.BOTH))
    said = DeviceReport(epoch=3, phase=DevicePhase.WENT_BACK, flags=Flags())
    assert followed(held, said) == Route(epoch=3, migration="m")
    assert followed(held, DeviceReport(epoch=2, phase=DevicePhase.MOVED, flags=Flags())) is None
    assert followed(held, DeviceReport(epoch=3, phase=DevicePhase.TRYING, flags=Flags())) is None
