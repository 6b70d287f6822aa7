"""Which paths a device's commands go by while a migration has it: the rules that the store keeps.

`sides/fleetlift.py` says the same in SQL, for many devices at once; a test holds the two together.
"""

import msgspec

from fleetlift.core.orders import CommandsFlag, DevicePhase, DeviceReport, Flags, Orders

_OLD_ALONE = frozenset({CommandsFlag.OLD, CommandsFlag.DRY_RUN})  # only the old side's copies are executed


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for one device. `epoch` 0: it was never told anything."""

    epoch: int = 0
    migration: str = ""
    flags: Flags = Flags()


def ordered(held: Route | None, orders: Orders) -> Route | None:
    """The route once `orders` were given; None when the store holds a newer epoch, or the same one.

    Between a side that alone executes and the other one, commands go by both until the device has said what
    it obeys: by the new one alone they would not be executed while it still obeys the old one, and the other
    way round. The device refuses the second copy.
    """
    if held is not None and held.epoch >= orders.epoch:
        return None
    flags = orders.flags
    if held is not None:
        before, after = held.flags.commands, flags.commands
        if (before in _OLD_ALONE and after is CommandsFlag.NEW) or (
            before is CommandsFlag.NEW and after in _OLD_ALONE
        ):
            flags = msgspec.structs.replace(flags, commands=CommandsFlag.BOTH)
    return Route(epoch=orders.epoch, migration=orders.migration, flags=flags)


def followed(held: Route, report: DeviceReport) -> Route | None:
    """The route once the device has said what it obeys; None when that changes nothing, or is old news."""
    if report.phase is DevicePhase.TRYING or held.epoch > report.epoch or held.flags == report.flags:
        return None
    return msgspec.structs.replace(held, flags=report.flags)
