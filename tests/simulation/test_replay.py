"""The same seed gives the same history: in one process, in another one, and as a smaller case of itself."""

import os
import subprocess
import sys

import pytest

from fleetlift.core.errors import FleetError
from fleetlift.simulate.breakages import broken
from fleetlift.simulate.run import Case, simulate, simulate_many, smaller
from fleetlift.simulate.scenario import draw

SEEDS = (2, 3, 11)


def test_a_seed_gives_one_history() -> None:
    assert [simulate(seed).digest for seed in SEEDS] == [simulate(seed).digest for seed in SEEDS]


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_another_process_sees_the_same_history(hash_seed: str) -> None:
    """Python shuffles the order of sets by process; no decision may hang on it."""
    code = (
        "from fleetlift.simulate.run import simulate\n"
        f"print(*[simulate(seed).digest for seed in {SEEDS}], sep='\\n')"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert there.stdout.split() == [simulate(seed).digest for seed in SEEDS]


def test_processes_give_outcomes_in_the_order_of_the_seeds() -> None:
    seeds = range(2, 8)
    assert [one.seed for one in simulate_many(seeds, jobs=2)] == list(seeds)


def test_leaving_out_faults_leaves_the_rest_of_the_case_as_it_was() -> None:
    whole = draw(11)
    fewer = draw(11, faults=[whole.faults[0].number])
    assert fewer.devices == whole.devices and fewer.plan == whole.plan
    assert fewer.faults == whole.faults[:1]


def test_a_failing_case_is_made_smaller_and_still_fails() -> None:
    case = Case(seed=1, breakage="second-copy-executed")
    first = simulate(1, breakage=case.breakage)
    assert first.violated == "nothing twice"
    small, outcome = smaller(case, first.violated, most=12)
    assert outcome.violated == first.violated
    assert small.faults is not None and len(small.faults) <= len(draw(1).faults)
    assert small.command.startswith("fleetlift simulate --seed 1 --runs 1 --trace")


def test_a_breakage_ends_with_its_block() -> None:
    with broken("one-too-many"):
        pass
    assert simulate(2).violated is None


def test_a_fault_of_the_checker_is_no_silent_pass() -> None:
    """What goes wrong in the simulator itself comes out, whatever the product would swallow."""
    from fleetlift.simulate.world import World

    world = World(draw(2))

    def fail() -> None:
        raise FleetError("not by the product")

    world.clock.after(5.0, fail)
    with pytest.raises(FleetError):
        world.run()
