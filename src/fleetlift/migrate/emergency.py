"""The way back when everything else is gone: the journal and the old side alone.

Needs no database, no log, no controller. The order back carries an epoch above everything in the journal, so
devices obey it; the journal's own record of it tells the controller, when it is back, what was done.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags, Orders
from fleetlift.log import get_logger
from fleetlift.migrate.journal import Emergency, Journal, Record, Story, story
from fleetlift.sides.base import Side
from fleetlift.sides.open import connect_side

log = get_logger(__name__)

POLL_S = 0.5
ATTEMPT_EVERY_S = 2.0
DELIVER_CHUNK = 500


class EmergencyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. `silent`: ordered back, and not heard of yet; they obey when they connect."""

    migration: str
    epoch: int
    told: tuple[str, ...]
    back: tuple[str, ...]
    silent: tuple[str, ...]
    refused: dict[str, str]


async def revert_by_journal(
    path: Path,
    side_factory: Callable[[Mapping[str, str]], Side] = connect_side,
    *,
    migration: str | None = None,
    devices: Sequence[str] | None = None,
    actor: str = "emergency",
    wait_s: float = 60.0,
    progress: Callable[[int, int], None] = lambda back, total: None,
) -> EmergencyResult:
    """Order the journal's devices (all, or `devices`) back to the old side; wait for their word.

    `migration` is checked against the journal's, when given. The old side may be away at first: it is tried
    again until `wait_s` is over; Unavailable then, when orders could not be handed to it. Repeating it is
    harmless. Raises BadInput for a file that is no journal, or holds another migration or no such device.
    """
    held = await asyncio.to_thread(story, path)
    if migration is not None and migration != held.migration:
        raise BadInput(f"{path} is the journal of migration {held.migration!r}, not of {migration!r}")
    side = side_factory({name: str(value) for name, value in held.old.items()})
    try:
        return await bring_back(
            held, side, Journal(path).add, devices=devices, actor=actor, wait_s=wait_s, progress=progress
        )
    finally:
        await side.close()


async def bring_back(
    held: Story,
    side: Side,
    add: Callable[[Record], Awaitable[None]],
    *,
    devices: Sequence[str] | None,
    actor: str,
    wait_s: float,
    progress: Callable[[int, int], None] = lambda back, total: None,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> EmergencyResult:
    """The same with the journal's story at hand; `add` puts a record into the journal, on disk."""
    if unknown := set(devices or ()) - held.orders.keys():
        raise BadInput(f"{min(unknown)} was never told to move by migration {held.migration!r}")
    told = tuple(sorted(held.orders if devices is None else set(devices)))
    epoch = max(held.epoch + 1, int(now()))
    record = Emergency(at=now(), epoch=epoch, actor=actor, devices=told, everything=devices is None)
    # Before any device hears of it: a controller that comes back must not take the epoch for another order.
    await add(record)
    deadline = monotonic() + wait_s
    refused = await _deliver(side, told, epoch, held.migration, lambda: monotonic() < deadline)
    wanted = set(told) - refused.keys()
    back: set[str] = set()
    while True:
        try:
            reports = await side.reports()
            back = {d for d in wanted if is_back(reports.get(d), epoch)}
            progress(len(back), len(wanted))
        except (Unavailable, OSError, TimeoutError) as error:
            log.warning("old_side_lost", reason=str(error))
        if back >= wanted or monotonic() >= deadline:
            break
        await asyncio.sleep(POLL_S)
    result = EmergencyResult(
        migration=held.migration,
        epoch=epoch,
        told=told,
        back=tuple(sorted(back)),
        silent=tuple(sorted(wanted - back)),
        refused=dict(refused),
    )
    await add(msgspec.structs.replace(record, at=now(), back=result.back, refused=result.refused))
    return result


def is_back(report: DeviceReport | None, epoch: int) -> bool:
    """Whether a device says that it obeys the old side alone, by an order at least as new as `epoch`."""
    return (
        report is not None
        and report.epoch >= epoch
        and report.flags == Flags()
        and report.phase is not DevicePhase.TRYING
    )


async def _deliver(
    side: Side, devices: tuple[str, ...], epoch: int, migration: str, may_go_on: Callable[[], bool]
) -> dict[str, str]:
    """Hand out the orders, part by part, trying again while the side is away. Refusals by device."""
    refused: dict[str, str] = {}
    order = Orders(epoch=epoch, migration=migration, flags=Flags())
    for start in range(0, len(devices), DELIVER_CHUNK):
        chunk = dict.fromkeys(devices[start : start + DELIVER_CHUNK], order)
        while True:
            try:
                refused.update(await side.deliver(chunk))
                break
            except (Unavailable, OSError, TimeoutError) as error:
                if not may_go_on():
                    raise Unavailable(
                        f"the old side does not answer ({error}): {start} of {len(devices)} devices were "
                        "ordered back; repair it and do this again"
                    ) from error
                log.warning("old_side_not_reached", reason=str(error))
                await asyncio.sleep(ATTEMPT_EVERY_S)
    return refused
