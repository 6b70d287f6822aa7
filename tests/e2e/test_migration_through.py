"""A small migration that goes all the way."""

from pathlib import Path

import httpx
import pytest
from small_world import World, small_world

from fleetlift.migrate.certificate import public_text, signing_key, verify_certificate
from fleetlift.testing import scratch_directory


@pytest.mark.timeout(150)
async def test_a_fleet_moves_with_nothing_lost_and_nothing_done_twice() -> None:
    """Telemetry, commands and the link move by waves, while messages and commands go on; then it is over."""
    with scratch_directory() as directory:
        async with small_world(Path(directory)) as world:
            await world.start()
            done = await world.until(lambda s: s["phase"] == "finished", within_s=90)
            assert (done["devices_new"], done["devices_old"], done["stragglers_total"]) == (6, 0, 0)
            assert done["reverts"] == 0
            status = world.fleet.status()
            assert status.connected_old == 0
            assert status.connected_new == 6
            assert status.executed > 0
            kinds = [event["kind"] for event in await world.events()]
            assert kinds.count("wave_passed") >= 6
            assert kinds[-1] == "migration_finished"
            await world.nothing_lost_nothing_twice()
            await _certified(world)


@pytest.mark.timeout(150)
async def test_devices_move_over_tls_by_the_authority_that_their_orders_name() -> None:
    """The certificate authority comes with the orders; a device trusts no other, and takes no plain link."""
    with scratch_directory() as directory:
        async with small_world(Path(directory), devices=3, commanded=False, tls=True) as world:
            plan = world.plan.partition("  - move: commands")[0]
            await world.start(plan)
            done = await world.until(lambda s: s["phase"] == "finished", within_s=60)
            assert done["stragglers_total"] == 0
            told = [shell.agent.record.orders for shell in world.fleet.shells.values()]
            assert all(o and o.new and o.new.tls and "CERTIFICATE" in (o.new.ca_pem or "") for o in told)
            assert world.fleet.status().connected_new == 3
            await world.nothing_lost_nothing_twice()


async def _certified(world: World) -> None:
    """The certificate shows all of it to whoever has the file alone; a changed figure in it is found."""
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {world.backend.token}"}) as client:
        url = f"{world.backend.url}/api/v1/migrations/small/certificate"
        data = (await client.get(url, timeout=20)).content
    key = public_text(signing_key(world.backend.data_dir))
    found = verify_certificate(data, trusted_key=key)
    assert found.ok, [check for check in found.checks if not check.ok]
    assert (found.phase, found.members, found.executed_twice) == ("finished", {"moved": 6}, 0)
    assert (found.missing, found.issuer_checked) == (0, True)
    assert found.stored > 0 and found.commands > 0
    assert not verify_certificate(data.replace(b'"told":2', b'"told":3', 1), trusted_key=key).ok
