"""The product broken on purpose: each breakage is noticed, by the checker of the promise that it breaks."""

import pytest

from fleetlift.simulate.breakages import BREAKAGES
from fleetlift.simulate.run import simulate

# Where to begin, so that the first seeds already have what it takes (an amendment, a crash in a window of
# milliseconds); any seed after it may be the one that notices.
FROM = {
    "commands-forgotten": 12,
    "dead-man-off": 12,
    "epoch-ignored": 25,
    "excluded-forgotten": 30,
    "feed-position-first": 17,
    "rows-after-position": 26,
    "stragglers-forgotten": 390,
}
WITHIN = 80  # seeds


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(BREAKAGES))
def test_the_breakage_is_noticed(name: str) -> None:
    breakage = BREAKAGES[name]
    for seed in range(FROM.get(name, 1), FROM.get(name, 1) + WITHIN):
        outcome = simulate(seed, breakage=name)
        if outcome.violated is not None:
            assert outcome.violated in breakage.caught_by, f"seed {seed}: {outcome.violated}: {outcome.what}"
            return
    pytest.fail(f"nobody has noticed in {WITHIN} seeds that {breakage.what}")
