"""Migrations over bad networks: a fault proxy on each link, and the promises hold all the same.

Limits are scaled: a new side counts as lost after two seconds, so that an outage of some seconds is what one
of minutes is in earnest.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from small_world import QUICK, Links, World, small_world

from fault_proxy import BOTH, FaultProxy
from fleetlift.core.command import FINAL
from fleetlift.core.orders import Flags
from fleetlift.testing import scratch_directory

STEPS = """
steps:
  - move: telemetry
    stages: [both, new]
    waves: [100%]
    bake: 500ms
    gates: [telemetry.completeness >= 95%, devices.silent == 0]
  - move: commands
    stages: [both, new]
    waves: [100%]
    bake: 500ms
    gates: [commands.executed_twice == 0]
  - move: link
    waves: [100%]
    bake: 5s
"""

SETTINGS = msgspec.structs.replace(QUICK, acked_within_s=2.5, connect_within_s=2.5, stranded_after_s=4.0)
# The bake of the last wave is longer than any outage: who finishes earlier than that has proved nothing.
# A connection that goes dead is noticed by an acknowledgement that does not come, and made anew.
GAP_S = SETTINGS.acked_within_s + SETTINGS.connect_within_s + SETTINGS.backoff_max_s


@asynccontextmanager
async def bad_world(devices: int = 3) -> AsyncIterator[tuple[World, Links]]:
    with scratch_directory() as directory:
        async with small_world(Path(directory), devices=devices, proxied=True, settings=SETTINGS) as world:
            assert world.links is not None
            world.plan = world.plan.partition("steps:")[0] + STEPS
            yield world, world.links


async def all_is_accounted_for(world: World) -> None:
    """Nothing lost, nothing twice, every command in one final state and executed at most once."""
    asked = len(world.commands)
    await world.nothing_lost_nothing_twice()
    connection = await asyncpg.connect(world.backend.settings.database_url)
    try:
        assert asked
        async with asyncio.timeout(20):
            while True:
                open_ = await connection.fetch(
                    "SELECT id::text, status FROM command WHERE NOT status = ANY($1::text[])"
                    " AND created_at < now() - interval '2 seconds'",
                    [status.value for status in FINAL],
                )
                if not open_:
                    break
                await asyncio.sleep(0.2)
        executed_twice = await connection.fetch(
            "SELECT command FROM command_path WHERE status = 'succeeded' AND mode = 'execute'"
            " GROUP BY command HAVING count(*) > 1"
        )
        assert not executed_twice
    finally:
        await connection.close()


async def nobody_is_stranded(world: World, within_s: float = 20.0) -> None:
    """Every device gets its telemetry through, by the side that its flags name."""
    async with asyncio.timeout(within_s):
        for shell in world.fleet.shells.values():
            acked = dict(shell.agent.acked)  # a link that is lost takes some of it back
            while not any(now > acked[path] for path, now in shell.agent.acked.items()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def wave_of(status: Mapping[str, Any]) -> tuple[int, int]:
    return status["rung"], status["wave"]


@pytest.mark.timeout(170)
async def test_the_new_side_unreachable_in_every_wave() -> None:
    """Each wave meets an outage that outlasts the limit: refused, stalled, half-open. What it had moved goes
    back by itself, the plan is held and resumed, and in the end all devices have moved."""
    async with bad_world() as (world, links):
        outages = [_refused, _stalled, _half_open]
        await world.start(world.plan)
        struck: set[tuple[int, int]] = set()
        resumed = 0
        async with asyncio.timeout(150):
            while True:
                status = await world.status()
                if status["phase"] == "finished":
                    break
                if status["phase"] == "held":
                    resumed += 1
                    await world.call("POST", "/migrations/small/resume")
                elif wave_of(status) not in struck and status["phase"] == "running" and status["rung"]:
                    struck.add(wave_of(status))
                    await outages[len(struck) % len(outages)](links.devices_new, 3.5)
                    await nobody_is_stranded(world)
                await asyncio.sleep(0.1)
        assert len(struck) == 5 and resumed, struck
        await nobody_is_stranded(world)
        assert world.fleet.status().connected_new == len(world.devices)
        await all_is_accounted_for(world)


async def _refused(proxy: FaultProxy, seconds: float) -> None:
    await proxy.refuse()
    await asyncio.sleep(seconds)
    await proxy.accept()


async def _stalled(proxy: FaultProxy, seconds: float) -> None:
    proxy.stalled = BOTH
    await asyncio.sleep(seconds)
    proxy.stalled = frozenset()


async def _half_open(proxy: FaultProxy, seconds: float) -> None:
    """Connections die without a word, and new ones get nowhere either for a while."""
    proxy.half_open()
    proxy.stalled = BOTH
    await asyncio.sleep(seconds)
    proxy.stalled = frozenset()


@pytest.mark.timeout(150)
async def test_the_old_side_unreachable_at_the_start_in_a_wave_and_during_a_revert() -> None:
    """Without the old side nobody is moved on; devices that are on the new one stay served by it; a revert
    reaches those that it can at once, and the others when the old side is there again."""
    async with bad_world() as (world, links):
        for proxy in links.old_side:
            await proxy.refuse()
        with pytest.raises(AssertionError, match="see that it runs, and try again"):
            await world.start()
        for proxy in links.old_side:
            await proxy.accept()
        await world.start()

        await world.until(lambda s: s["devices_both"] == len(world.devices), within_s=60)
        for proxy in links.old_side:
            await proxy.refuse()
        await asyncio.sleep(4)
        status = await world.status()
        assert status["phase"] == "running" and status["reverts"] == 0, status["reason"]
        for proxy in links.old_side:
            await proxy.accept()

        await world.until(lambda s: s["rung"] >= 3, within_s=60)
        for proxy in links.old_side:
            await proxy.refuse()
        await world.call("POST", "/migrations/small/revert")
        told = time.monotonic() + 20
        while not all(shell.agent.flags == Flags() for shell in world.fleet.shells.values()):
            assert time.monotonic() < told, "the new side has told them"
            await asyncio.sleep(0.1)
        for proxy in links.old_side:
            await proxy.accept()
        await world.until(lambda s: s["phase"] == "reverted", within_s=40)
        await nobody_is_stranded(world)
        assert world.fleet.status().connected_old == len(world.devices)
        await all_is_accounted_for(world)


@pytest.mark.timeout(150)
async def test_both_sides_slow() -> None:
    """200 to 500 ms each way and 20 kB/s on every link: everything takes longer, and nothing fails."""
    async with bad_world() as (world, links):
        for proxy in links.all:
            proxy.latency_s, proxy.bytes_per_s = (0.2, 0.5), 20_000.0
        plan = world.plan
        for tight, roomy in {
            "grace: 500ms": "grace: 4s",
            "new_lost_limit: 2s": "new_lost_limit: 8s",
            "commands_timeout: 3s": "commands_timeout: 10s",
            "[both, new]": "[both]",
        }.items():
            plan = plan.replace(tight, roomy)
        await world.start(plan.partition("  - move: link")[0])
        done = await world.until(lambda s: s["phase"] in ("finished", "held"), within_s=90)
        assert done["phase"] == "finished", done["reason"]
        assert (done["devices_both"], done["reverts"], done["stragglers_total"]) == (len(world.devices), 0, 0)
        await nobody_is_stranded(world)
        for proxy in links.all:
            proxy.latency_s, proxy.bytes_per_s = (0.0, 0.0), 0.0
        await all_is_accounted_for(world)


@pytest.mark.timeout(150)
async def test_half_open_cut_and_overtaken_connections() -> None:
    """Dead peers are noticed by what they owe; a new connection that overtakes its predecessor takes over; no
    device is without service for longer than its timers say."""
    async with bad_world() as (world, links):
        plan = world.plan.partition("  - move: link")[0].replace("[both, new]", "[both]")
        await world.start(plan.replace("new_lost_limit: 2s", "new_lost_limit: 20s"))
        await world.until(lambda s: s["phase"] == "finished", within_s=60)
        for proxy in links.all:
            proxy.half_open()
        await asyncio.sleep(GAP_S)
        for _ in range(2):
            await asyncio.gather(*(proxy.reorder(1.0) for proxy in links.all))
            await asyncio.sleep(2.0)
        for proxy in links.all:
            proxy.cut(reset=False)
        await nobody_is_stranded(world)
        status, all_of_them = world.fleet.status(), (len(world.devices),) * 2
        async with asyncio.timeout(20):
            while (status.connected_old, status.connected_new) != all_of_them:
                await asyncio.sleep(0.05)
                status = world.fleet.status()
        assert status.longest_gap_s < GAP_S + 5.0, status.longest_gap_device
        await all_is_accounted_for(world)
