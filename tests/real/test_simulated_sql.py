"""What the simulator decides in the core and the product in SQL is the same decision."""

import random
from itertools import product

from fleetlift.backend.context import Context
from fleetlift.core.account import Channel, expected_and_missing
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import CommandsFlag, DevicePhase, DeviceReport, Endpoint, Flags, Orders
from fleetlift.core.ranges import RangeSet
from fleetlift.core.route import Route, followed, ordered
from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.migrate.completeness import _MISSING_SQL
from fleetlift.sides.fleetlift import FleetliftSide
from fleetlift.store import ledger
from fleetlift.store.ledger import LedgerRow
from fleetlift.store.pool import Pool


async def test_completeness_by_sql_is_completeness_by_ranges(pool: Pool) -> None:
    """For a few hundred channels with gaps, baselines and beginnings drawn at random."""
    chance = random.Random(4711)
    channels: dict[str, Channel] = {}
    for n in range(300):
        got = RangeSet(chance.sample(range(1, 60), chance.randrange(0, 50)))
        channels[f"car-{n:03}"] = Channel(
            baseline=chance.choice((None, chance.randrange(0, 60))),
            base=chance.randrange(-1, 60),
            upto=chance.randrange(0, 80),
            got=got,
        )
    async with pool.acquire() as conn:
        await ledger.save(
            conn,
            [
                LedgerRow(device=d, channel="p", path=MQTT_PATH, ranges=c.got, first_at=1.0, last_at=2.0)
                for d, c in channels.items()
                if c.got
            ],
        )
        rows = await conn.fetch(
            _MISSING_SQL,
            list(channels),
            ["p"] * len(channels),
            [c.baseline for c in channels.values()],
            [c.base for c in channels.values()],
            [c.upto for c in channels.values()],
            MQTT_PATH,
            1000,
        )
    by_sql = {row["device"]: (row["expected"], row["missing"]) for row in rows}
    by_ranges = {}
    for device, channel in channels.items():
        expected, missing = expected_and_missing(channel)
        if expected:
            by_ranges[device] = (expected, missing.count)
    assert by_sql == by_ranges


async def test_routes_by_sql_are_routes_by_the_core(ctx: Context) -> None:
    """Every order after every order, an older one among them, and every word of a device after that."""
    side = FleetliftSide(ctx, tenant="carshare", key=bytes(32))
    steps = list(product(CommandsFlag, CommandsFlag, (4, 6)))
    devices = {f"car-{n}": step for n, step in enumerate(steps)}
    await side.adopt([FleetDevice(id=device) for device in devices], "move")
    held: dict[str, Route] = {device: Route(migration="move") for device in devices}
    for place in (0, 1):
        orders = {
            device: Orders(
                epoch=5 if place == 0 else step[2],
                migration="move",
                flags=Flags(commands=step[0] if place == 0 else step[1]),
                new=Endpoint(host="127.0.0.1", port=1883),
            )
            for device, step in devices.items()
        }
        await side.deliver(orders)
        for device, order in orders.items():
            held[device] = ordered(held[device], order) or held[device]
        assert await _routes(ctx) == held
    for commands, epoch in product(CommandsFlag, (5, 6)):
        report = DeviceReport(epoch=epoch, phase=DevicePhase.MOVED, flags=Flags(commands=commands))
        await side.follow_reports(dict.fromkeys(devices, report))
        for device in devices:
            held[device] = followed(held[device], report) or held[device]
        assert await _routes(ctx) == held


async def _routes(ctx: Context) -> dict[str, Route]:
    async with ctx.pool.acquire() as conn:
        rows = await conn.fetch("SELECT device, epoch, migration, commands FROM device_route")
    return {
        row["device"]: Route(
            epoch=row["epoch"],
            migration=row["migration"],
            flags=Flags(commands=CommandsFlag(row["commands"])),
        )
        for row in rows
    }
