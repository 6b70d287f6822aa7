"""A controller that is killed goes on where it was."""

from pathlib import Path

import pytest
from small_world import small_world

from fleetlift.migrate.runner import STEPS
from fleetlift.testing import scratch_directory


@pytest.mark.timeout(200)
async def test_a_controller_killed_at_every_named_step_goes_on_to_the_end() -> None:
    """SIGKILL between any two steps of a round: the migration goes through all the same, with one order a
    device and rung, nothing lost and nothing executed twice."""
    kills = {"observed": 2, "decided": 3, "committed": 2, "journaled": 1, "told": 1, "sampled": 3}
    assert tuple(kills) == STEPS
    text = ",".join(f"{step}:{n}" for step, n in kills.items())
    with scratch_directory() as directory:
        async with small_world(Path(directory), environment={"FLEETLIFT_KILL_AT": text}) as world:
            await world.start(world.plan[: world.plan.index("  - move: link")])
            done = await world.until(lambda s: s["phase"] == "finished", within_s=150)
            killed = (world.backend.data_dir / "killed-at").read_text().split()
            assert sorted(killed) == sorted(STEPS)
            assert (done["devices_new"], done["reverts"], done["stragglers_total"]) == (6, 0, 0)
            opened = [e["text"] for e in await world.events() if e["kind"] == "wave_opened"]
            assert len(opened) == len(set(opened))
            await world.nothing_lost_nothing_twice()
