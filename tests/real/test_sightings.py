"""What was seen of devices is read anew only where it has changed, and nothing that has changed is missed."""

import asyncio
import random
from typing import Any

import msgspec
import pytest

from fleetlift.core.migration import DeviceObservation
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags
from fleetlift.sides import sightings
from fleetlift.sides.sightings import Sightings
from fleetlift.store import devices
from fleetlift.store.pool import Pool

CARS = [f"car-{n:02}" for n in range(40)]


@pytest.fixture
async def fleet(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(sightings, "LEAST", 1)
    await pool.execute("INSERT INTO tenant (id, name) VALUES ('t', 't')")
    await pool.execute("INSERT INTO device (id, tenant) SELECT unnest($1::text[]), 't'", CARS)
    return pool


async def come(where: Any, device: str, connected: bool = True) -> None:
    await where.execute(
        "INSERT INTO presence (device, connected, since) VALUES ($1, $2, now()) "
        "ON CONFLICT (device) DO UPDATE SET connected = $2, since = now()",
        device,
        connected,
    )


async def send(where: Any, device: str, path: str, at: float) -> None:
    await where.execute(
        "INSERT INTO ledger (device, channel, path, first_at, last_at) "
        "VALUES ($1, 'position', $2, to_timestamp($3), to_timestamp($3)) "
        "ON CONFLICT (device, channel, path) DO UPDATE SET last_at = excluded.last_at",
        device,
        path,
        at,
    )


async def say(where: Any, device: str, text: str | None, *, deleted: bool = False) -> None:
    await where.execute(
        "INSERT INTO shadow (device, name, version, reported, deleted_at) "
        "VALUES ($1, 'fleetlift', 1, $2::text::json, CASE WHEN $3 THEN now() END) "
        "ON CONFLICT (device, name) DO UPDATE SET reported = excluded.reported, "
        "deleted_at = excluded.deleted_at",
        device,
        text,
        deleted,
    )


def report(epoch: int) -> str:
    return msgspec.json.encode(DeviceReport(epoch=epoch, phase=DevicePhase.MOVED, flags=Flags())).decode()


async def whole(pool: Pool) -> dict[str, DeviceObservation]:
    """What one who has read nothing before sees."""
    return await Sightings(pool).read(CARS)


async def test_reading_what_has_changed_tells_what_reading_all_tells(fleet: Pool) -> None:
    """Whatever happens to devices, also when they are deleted, leave, or say what cannot be read."""
    kept, chance = Sightings(fleet), random.Random(1)
    for n in range(60):
        for device in chance.sample(CARS, 3):
            match chance.randrange(7):
                case 0:
                    await come(fleet, device, connected=chance.random() < 0.7)
                case 1 | 2:
                    await send(fleet, device, chance.choice(("mqtt", "legacy", "other")), 1e9 + n)
                case 3:
                    await say(fleet, device, report(n))
                case 4:
                    await say(fleet, device, chance.choice((None, '{"epoch": "x"}')))
                case 5:
                    await say(fleet, device, report(n), deleted=True)
                case _:
                    async with fleet.acquire() as conn, conn.transaction():
                        await devices.delete(conn, device)
                    if chance.random() < 0.5:
                        await come(fleet, device)
        assert await kept.read(CARS) == await whole(fleet)


async def test_only_what_has_changed_is_read(fleet: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all this would be for nothing; what was not touched stays the same object."""
    for device in CARS:
        await come(fleet, device)
    kept = Sightings(fleet)
    before = await kept.read(CARS)
    monkeypatch.setattr(kept, "_read_whole", None)
    await send(fleet, "car-07", "mqtt", 5.0)
    after = await kept.read(CARS)
    assert [device for device in CARS if after[device] is not before[device]] == ["car-07"]
    assert before["car-07"].new_telemetry_at is None
    assert after["car-07"] == DeviceObservation(connected_new=True, new_telemetry_at=5.0)


async def test_a_transaction_that_commits_late_is_not_missed(fleet: Pool) -> None:
    """It wrote before others that have been read since, and its numbers are the older ones."""
    kept = Sightings(fleet)
    await kept.read(CARS)
    async with fleet.acquire() as slow:
        transaction = slow.transaction()
        await transaction.start()
        await send(slow, "car-00", "mqtt", 5.0)
        await say(slow, "car-00", report(3))
        async with slow.transaction():  # a savepoint has a number of its own
            await come(slow, "car-00")
        for device in CARS[1:5]:
            await send(fleet, device, "mqtt", 6.0)
            assert "car-00" not in await kept.read(CARS)
        await transaction.commit()
    seen = await kept.read(CARS)
    assert seen == await whole(fleet)
    assert seen["car-00"].connected_new
    assert seen["car-00"].new_telemetry_at == 5.0


async def test_after_anything_that_went_wrong_all_is_read(
    fleet: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that was cut short may have taken in one part and not the others."""
    kept = Sightings(fleet)
    await kept.read(CARS)
    await send(fleet, "car-00", "mqtt", 5.0)
    with monkeypatch.context() as broken:
        broken.setattr("fleetlift.store.sightings.heard_since", _hangs)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await kept.read(CARS)
    monkeypatch.setattr(kept, "_read_changed", None)
    assert await kept.read(CARS) == await whole(fleet)


async def test_devices_that_join_are_read(fleet: Pool) -> None:
    """Of them nothing is kept, though they may have been there for long."""
    kept = Sightings(fleet)
    for device in CARS:
        await come(fleet, device)
    assert set(await kept.read(CARS[:5])) == set(CARS[:5])
    assert set(await kept.read(CARS[:6])) == set(CARS[:6])
    assert set(await kept.read(CARS[:2])) == set(CARS[:2])


async def _hangs(*_: object) -> list[Any]:
    await asyncio.sleep(60)
    return []
