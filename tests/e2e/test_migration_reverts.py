"""Migrations that go back: by a gate, by a person, and without the new side."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from small_world import World, small_world

from fleetlift.core.orders import DevicePhase, Flags
from fleetlift.device.shell import Misbehaviour
from fleetlift.migrate.emergency import revert_by_journal
from fleetlift.testing import scratch_directory


@pytest.mark.timeout(150)
async def test_a_faulty_revision_is_found_sent_back_and_left_behind() -> None:
    """A device that drops telemetry on the new side is noticed by the gate, its wave goes back by itself, and
    the plan, narrowed to the others, goes on to the end."""
    with scratch_directory() as directory:
        async with small_world(
            Path(directory), misbehaving={"car-0": Misbehaviour(drop_share=0.5)}, commanded=False
        ) as world:
            plan = world.plan.replace(
                "fleet: {tenant: carshare}", "fleet: {tenant: carshare, canaries: [car-0]}"
            )
            plan = plan[: plan.index("  - move: commands")]
            await world.start(plan)
            held = await world.until(lambda s: s["phase"] == "held", within_s=40)
            assert "telemetry.completeness" in held["reason"]
            assert held["reverts"] == 1
            [breach] = [e for e in await world.events() if e["kind"] == "gate_breached"]
            assert "car-0" in str(breach["evidence"])
            await world.until(
                lambda s: any(e["kind"] == "wave_returned" for e in s["events"]) and s["devices_old"] == 6
            )
            assert all(shell.agent.flags == Flags() for shell in world.fleet.shells.values())
            narrowed = plan.replace(
                "{tenant: carshare,", '{tenant: carshare, where: "attributes.hardware >= 2",'
            )
            await world.call("POST", "/migrations/small/amend", {"plan": narrowed})
            done = await world.until(lambda s: s["phase"] == "finished", within_s=60)
            assert (done["devices"], done["devices_both"], done["excluded"]) == (5, 5, 1)
            assert world.fleet.shells["car-0"].agent.flags == Flags()


@pytest.mark.timeout(150)
async def test_a_person_takes_one_device_back_and_then_everything() -> None:
    """A device, then all of them return to the old side while messages and commands go on."""
    with scratch_directory() as directory:
        async with small_world(Path(directory)) as world:
            await world.start()
            await world.until(lambda s: s["rung"] >= 2, within_s=60)
            await world.call("POST", "/migrations/small/revert", {"device": "car-3"})
            await world.until(lambda s: s["excluded"] == 1)
            await _eventually(lambda: world.fleet.shells["car-3"].agent.flags == Flags())
            await world.call("POST", "/migrations/small/revert")
            await world.until(lambda s: s["phase"] == "reverted", within_s=30)
            await _eventually(
                lambda: all(shell.agent.flags == Flags() for shell in world.fleet.shells.values())
            )
            assert world.fleet.status().connected_old == 6
            await world.nothing_lost_nothing_twice()
            await world.call("POST", "/migrations/small/release?wait=5", {})
            await world.until(lambda s: s["phase"] == "released", within_s=20)
            assert await _kept_credentials(world) == 0


@pytest.mark.timeout(150)
async def test_with_the_new_side_dead_the_journal_brings_everything_back() -> None:
    """Kill the whole backend: journal and old side are enough, and the controller takes it in later."""
    with scratch_directory() as directory:
        async with small_world(Path(directory)) as world:
            await world.start()
            await world.until(lambda s: s["rung"] >= 2 and s["devices_both"] == 6, within_s=60)
            await world.backend.kill()
            result = await revert_by_journal(world.journal, actor="the night shift", wait_s=30)
            assert result.back == tuple(sorted(world.devices))
            assert not result.silent
            assert not result.refused
            for shell in world.fleet.shells.values():
                assert shell.agent.flags == Flags()
                assert shell.agent.phase is DevicePhase.OLD
                assert shell.agent.record.epoch == result.epoch
            acked = world.fleet.status().acked_old
            await _eventually(lambda: world.fleet.status().acked_old > acked + 20)

            await world.backend.start()
            await world.until(lambda s: s["phase"] == "reverted", within_s=30)
            kinds = [event["kind"] for event in await world.events()]
            assert "emergency_taken_in" in kinds
            await world.nothing_lost_nothing_twice()


async def _kept_credentials(world: World) -> int:
    connection = await asyncpg.connect(world.backend.settings.database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM device_credential"))
    finally:
        await connection.close()


async def _eventually(what: Any, within_s: float = 15.0) -> None:
    async with asyncio.timeout(within_s):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
