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
