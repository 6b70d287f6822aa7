"""The flag lever: both sides are told, and one that is down holds up nobody."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from fleetlift.core.errors import Unavailable
from fleetlift.core.migration import DeviceObservation, FleetDevice
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags, Orders, TelemetryFlag
from fleetlift.levers.flag import CHUNK, FlagLever, newest
from fleetlift.sides.base import FeedItem, SideCommand

BOTH = Flags(telemetry=TelemetryFlag.BOTH)


class OneSide:
    """A side in memory, which may be down or hang."""

    def __init__(self, *, down: bool = False, hangs: bool = False) -> None:
        self.name = "memory"
        self.down, self.hangs = down, hangs
        self.held: dict[str, int] = {}
        self.seen: dict[str, DeviceObservation] = {}

    async def inventory(self) -> Sequence[FleetDevice]:
        return []

    async def _answer(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.down:
            raise Unavailable("the side is down")

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        await self._answer()
        refused = {d: "older" for d, o in orders.items() if o.epoch < self.held.get(d, 0)}
        self.held.update((d, o.epoch) for d, o in orders.items() if d not in refused)
        return refused

    async def observe(self, devices: Sequence[str]) -> Mapping[str, DeviceObservation]:
        await self._answer()
        return self.seen

    async def reports(self) -> Mapping[str, DeviceReport]:
        return {}

    async def send_command(self, command: SideCommand) -> None: ...

    async def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        return
        yield

    async def close(self) -> None: ...


class Known:
    """What the bridge knows of the old side."""

    def __init__(self, fleet: Mapping[str, FleetDevice] | None, *, up: bool = True) -> None:
        self.up, self.fleet = up, fleet
        self.reports: Mapping[str, DeviceReport] = {}


def orders(count: int, epoch: int = 5) -> dict[str, Orders]:
    return {f"car-{n}": Orders(epoch=epoch, migration="m", flags=BOTH) for n in range(count)}


@pytest.mark.parametrize("how", [{"down": True}, {"hangs": True}])
async def test_orders_go_out_by_the_side_that_is_there(how: dict[str, bool]) -> None:
    """A side that is down or hangs is named; the other one has every order."""
    old, new = OneSide(), OneSide(**how)
    moved = await FlagLever(old, new, timeout_s=0.05).move(orders(3))
    assert list(moved.down) == ["new"]
    assert old.held == {f"car-{n}": 5 for n in range(3)}


async def test_a_large_wave_goes_out_in_parts_and_refusals_are_told() -> None:
    old, new = OneSide(), OneSide()
    new.held["car-7"] = 9
    moved = await FlagLever(old, new).move(orders(2 * CHUNK + 1))
    assert (len(old.held), len(new.held)) == (2 * CHUNK + 1, 2 * CHUNK + 1)
    assert moved.new_refused == {"car-7": "older"}
    assert not moved.down


async def test_what_both_sides_know_is_put_together() -> None:
    """Presence of each side, the report that says more, and nothing of a device never seen."""
    new = OneSide()
    by_new = DeviceReport(epoch=5, phase=DevicePhase.MOVED, flags=BOTH)
    new.seen["car-0"] = DeviceObservation(connected_new=True, report_by_new=by_new)
    known = Known(
        {
            "car-0": FleetDevice(id="car-0", connected=True, since=1.0),
            "car-1": FleetDevice(id="car-1", connected=False, since=2.0),
            "car-2": FleetDevice(id="car-2"),
        }
    )
    back = DeviceReport(epoch=5, phase=DevicePhase.WENT_BACK, flags=Flags(), reason="lost it")
    known.reports = {"car-0": back}
    seen = await FlagLever(OneSide(), new).observe(["car-0", "car-1", "car-2"], known)
    assert set(seen.devices) == {"car-0", "car-1"}
    assert seen.devices["car-0"] == DeviceObservation(
        connected_old=True, connected_new=True, report=back, report_by_new=by_new
    )
    assert seen.fleet is not None
    assert len(seen.fleet) == 3


async def test_a_fleet_that_cannot_be_read_now_is_not_an_empty_one() -> None:
    """What was last known of a side that is away is no basis for growth."""
    lever = FlagLever(OneSide(), OneSide(down=True))
    seen = await lever.observe(["car-0"], Known({"car-0": FleetDevice(id="car-0", since=1.0)}, up=False))
    assert (seen.fleet, seen.old_up, seen.new_up) == (None, False, False)
    assert not seen.devices["car-0"].connected_old


def test_the_newer_order_outweighs_the_phase() -> None:
    went_back = DeviceReport(epoch=5, phase=DevicePhase.WENT_BACK, flags=Flags())
    trying = DeviceReport(epoch=6, phase=DevicePhase.TRYING, flags=BOTH)
    assert newest(went_back, trying) is newest(trying, went_back) is trying
    assert newest(None, trying) is trying
    assert newest(None, None) is None


async def test_what_changes_on_either_side_is_seen_at_the_next_look() -> None:
    """What is kept of the last look serves only where neither side says anything else."""
    new = OneSide()
    new.seen["car-0"] = DeviceObservation(connected_new=True)
    known = Known({"car-0": FleetDevice(id="car-0", connected=True, since=1.0)})
    lever = FlagLever(OneSide(), new)

    async def look() -> DeviceObservation:
        return (await lever.observe(["car-0"], known)).devices["car-0"]

    first = await look()
    assert await look() is first
    known.up = False
    assert await look() == DeviceObservation(connected_new=True)
    known.up = True
    assert await look() == first
    assert known.fleet is not None
    known.fleet = {"car-0": FleetDevice(id="car-0", connected=False, since=2.0)}
    assert await look() == DeviceObservation(connected_new=True)
    known.reports = {"car-0": DeviceReport(epoch=5, phase=DevicePhase.MOVED, flags=BOTH)}
    assert (await look()).report == known.reports["car-0"]
    new.seen["car-0"] = DeviceObservation(connected_new=True, new_telemetry_at=7.0)
    assert (await look()).new_telemetry_at == 7.0
