"""A thousand simulated migrations, each of another seed: every promise holds in all of them."""

import pytest

from fleetlift.simulate.run import Case, simulate

SEEDS = 25  # in one case, so that two workers share them evenly
CASES = 40


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", range(CASES))
def test_every_promise_holds_under_faults(case: int) -> None:
    for seed in range(1 + case * SEEDS, 1 + (case + 1) * SEEDS):
        outcome = simulate(seed)
        assert outcome.violated is None, (
            f"{outcome.violated}: {outcome.what}\nsee it: {Case(seed=seed).command}\n"
            + "\n".join(outcome.trace[-40:])
        )
