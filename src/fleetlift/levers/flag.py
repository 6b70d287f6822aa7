"""The flag lever: devices are moved by a flag in their firmware, told by both sides.

An order goes out by the old side and by the new one. Whichever reaches the device first counts; the other
copy has the same epoch and changes nothing. A side that is down loses no order: it is given again until
the device reports its epoch.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import msgspec

from fleetlift.core.errors import FleetError
from fleetlift.core.migration import DeviceObservation, FleetDevice
from fleetlift.core.orders import DevicePhase, DeviceReport, Orders
from fleetlift.sides.base import Side

T = TypeVar("T")

CHUNK = 500  # devices handed to a side at once


class NewSide(Side, Protocol):
    """The new side also shows the evidence that a move counts by."""

    async def observe(self, devices: Sequence[str]) -> Mapping[str, DeviceObservation]:
        """Connection, report and newest telemetry of each device, as this side has seen them."""
        ...


class OldSide(Protocol):
    """The old side as its feed keeps it up to date, beside the side itself."""

    @property
    def up(self) -> bool: ...
    @property
    def fleet(self) -> Mapping[str, FleetDevice] | None: ...
    @property
    def reports(self) -> Mapping[str, DeviceReport]: ...


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What became of handing out orders. `down`: sides that did not answer, with the reason."""

    old_refused: Mapping[str, str] = {}
    new_refused: Mapping[str, str] = {}
    down: Mapping[str, str] = {}


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    devices: Mapping[str, DeviceObservation]
    fleet: tuple[FleetDevice, ...] | None
    old_up: bool
    new_up: bool
    down: Mapping[str, str] = {}


_NOTHING = DeviceObservation()
_PHASE_ORDER = {DevicePhase.TRYING: 0, DevicePhase.OLD: 1, DevicePhase.MOVED: 2, DevicePhase.WENT_BACK: 3}


def newest(one: DeviceReport | None, other: DeviceReport | None) -> DeviceReport | None:
    """The report that says more: of the newer epoch, else of the later phase of the same order.

    A device that went back says so by the old link only; at the same epoch that is the later word.
    """
    if one is None or other is None or one == other:
        return one if other is None else other
    return max(one, other, key=lambda report: (report.epoch, _PHASE_ORDER[report.phase]))


class _Known(msgspec.Struct, frozen=True, gc=False):
    """What both sides know of a device, and what that comes to."""

    by_new: DeviceObservation | None
    there: FleetDevice | None
    report: DeviceReport | None
    merged: DeviceObservation


class FlagLever:
    """Tell devices by both sides and merge what both sides know of them."""

    def __init__(self, old: Side, new: NewSide, *, timeout_s: float = 10.0) -> None:
        self._old = old
        self._new = new
        self._timeout_s = timeout_s
        self._known: dict[str, _Known] = {}  # as last observed
        self._up = False  # the old side, then

    async def move(self, orders: Mapping[str, Orders]) -> Moved:
        """Hand the orders to both sides; one that is down is reported, and the other gets them all the same.

        Orders back to the old side go to both at once. Orders that need the new side go there first: a device
        that hears of them by the old side would otherwise knock before its credential is known.
        Safe to repeat: a side refuses an epoch older than the one it holds and takes the same one again.
        """
        back = {device: one for device, one in orders.items() if not one.flags.needs_new}
        (old, old_error), (new, new_error) = await asyncio.gather(
            self._hand_out(self._old, back), self._hand_out(self._new, back)
        )
        onward = {device: one for device, one in orders.items() if one.flags.needs_new}
        for_new = await self._hand_out(self._new, onward)
        for_old = await self._hand_out(self._old, onward)
        old, old_error = {**old, **for_old[0]}, old_error or for_old[1]
        new, new_error = {**new, **for_new[0]}, new_error or for_new[1]
        down = {name: why for name, why in (("old", old_error), ("new", new_error)) if why}
        return Moved(old_refused=old, new_refused=new, down=down)

    async def _hand_out(self, side: Side, orders: Mapping[str, Orders]) -> tuple[dict[str, str], str]:
        """Deliver part by part, so that a large wave is not taken for a side that hangs."""
        refused: dict[str, str] = {}
        devices = list(orders)
        for start in range(0, len(devices), CHUNK):
            part = {device: orders[device] for device in devices[start : start + CHUNK]}
            some, error = await self._tolerant(partial(side.deliver, part), {})
            refused.update(some)
            if error:
                return refused, error
        return refused, ""

    async def observe(self, devices: Sequence[str], old: OldSide) -> Observed:
        """What both sides know of `devices` now; a device that neither has ever seen is left out.

        A side that is down leaves its half empty.
        """
        seen, new_error = await self._tolerant(lambda: self._new.observe(devices), {})
        fleet, up, reports = old.fleet, old.up, old.reports
        before = self._known if up == self._up else {}
        known: dict[str, _Known] = {}
        for device in devices:
            by_new, report = seen.get(device), reports.get(device)
            there = fleet.get(device) if fleet is not None else None
            last = before.get(device)
            if last and last.by_new is by_new and last.there is there and last.report is report:
                known[device] = last  # as it is with most of a large fleet
            elif by_new is not None or report is not None or (there is not None and there.since is not None):
                known[device] = _Known(by_new, there, report, _merged(by_new, there if up else None, report))
        self._known, self._up = known, up
        return Observed(
            devices={device: one.merged for device, one in known.items()},
            fleet=None if fleet is None or not up else tuple(fleet.values()),
            old_up=up,
            new_up=not new_error,
            down={"new": new_error} if new_error else {},
        )

    async def _tolerant(
        self, call: Callable[[], Awaitable[Mapping[str, T]]], otherwise: Mapping[str, T]
    ) -> tuple[Mapping[str, T], str]:
        """The call's answer and "", or `otherwise` and why the side did not answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call(), ""
        except TimeoutError:
            return otherwise, f"no answer within {self._timeout_s:g} s"
        except (FleetError, OSError) as error:
            return otherwise, str(error) or type(error).__name__


def _merged(
    by_new: DeviceObservation | None, there: FleetDevice | None, report: DeviceReport | None
) -> DeviceObservation:
    by_new = by_new or _NOTHING
    return DeviceObservation(
        connected_old=there is not None and there.connected,
        connected_new=by_new.connected_new,
        report=newest(report, by_new.report_by_new),
        report_by_new=by_new.report_by_new,
        new_telemetry_at=by_new.new_telemetry_at,
        old_telemetry_at=by_new.old_telemetry_at,
    )
