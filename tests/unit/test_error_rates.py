"""Gates err as seldom as they say, however often they are looked at: simulated waves, clustered and skewed.

`python -m tests.error_rates --runs 10000` does more of the same.
"""

import math

import numpy as np
import pytest

from error_rates import ALPHA, Case, arm_of, by_bounds, by_comparison, cases, spread_of, try_case
from fleetlift.core.figures import arm, spread
from fleetlift.core.migration import Verdict

RUNS = 80
SEED = 20260101  # the same at every run: a failure can be looked at again

CASES = {case.name: case for case in cases()}


def most_by_chance(runs: int) -> int:
    """Errors that a gate with just the stated rate exceeds in one run of the test in a thousand."""
    left, errors = 0.0, -1
    while left < 0.999:
        errors += 1
        left += math.comb(runs, errors) * ALPHA**errors * (1 - ALPHA) ** (runs - errors)
    return errors


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gate_errs_no_more_often_than_it_says(case: Case) -> None:
    """No false advance under harm beyond the limit, no false revert of a wave as good as the control; where a
    case is clear, the gate comes to say so."""
    found = try_case(case, RUNS, SEED, by_bounds)
    assert found.wrong <= most_by_chance(RUNS), f"seed {SEED}: {found}"
    if case.right is not None:
        assert found.right >= 0.5 * RUNS, f"seed {SEED}: too weak: {found}"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("agreement just at the limit", Verdict.REVERT),
        ("success, A/A, 10 devices", Verdict.REVERT),
        ("success, 2 points worse, 10 devices", Verdict.ADVANCE),
        ("p95, A/A, 10 devices", Verdict.REVERT),
        ("reconnects, 1.3 times", Verdict.ADVANCE),
    ],
)
def test_plain_figures_err_far_more_often(name: str, verdict: Verdict) -> None:
    """The same cases without bounds: what the test above would say if a gate compared figures as they are."""
    assert CASES[name].wrong is verdict
    assert try_case(CASES[name], RUNS, SEED, by_comparison).wrong > most_by_chance(RUNS)


def test_the_simulation_makes_its_samples_as_the_product_does() -> None:
    rng = np.random.default_rng(SEED)
    n, x = rng.poisson(3, 40).astype(float), rng.poisson(1, 40).astype(float)
    assert arm_of(n, x) == arm(zip(n.tolist(), x.tolist(), strict=True))
    counts = rng.poisson(0.2, (30, 60)).astype(float)
    histograms = [{place: int(k) for place, k in enumerate(row) if k} for row in counts]
    assert spread_of(counts) == spread(histograms)
