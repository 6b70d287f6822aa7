"""A small migration that goes all the way."""

from pathlib import Path

import pytest
from small_world import small_world

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
