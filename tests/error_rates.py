"""How often gates err, by simulation: waves that are as good as the control, and waves with harm sown in.

Every round is looked at, and the first verdict that is not *hold* counts: that is what a controller does.
Devices differ (rates by a beta distribution, speeds by a log-normal one), so that operations of one device
are alike.

    python -m tests.error_rates --runs 10000 --seed 1
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fleetlift.core.delays import EDGES_S
from fleetlift.core.gates import Gate, judge, limit_of, parse_gate
from fleetlift.core.metrics import METRICS
from fleetlift.core.migration import Arm, Basis, Sample, Spread, Verdict
from fleetlift.core.sampled import Figure, assess

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
Floats = NDArray[np.float64]


class Look(NamedTuple):
    """What one round shows. `truth` is the mean rate at which operations have gone wrong so far, if known."""

    sample: Sample
    truth: float | None = None


Run = Callable[[Generator], Iterator[Look]]


class Case(NamedTuple):
    """`wrong` is the verdict that would be an error, `right` the one hoped for where the case is clear."""

    name: str
    gate: Gate
    run: Run
    wrong: Verdict
    right: Verdict | None = None


class Outcome(NamedTuple):
    case: Case
    runs: int
    advanced: int
    reverted: int
    looks: float  # until the verdict, on the average

    @property
    def wrong(self) -> int:
        return {Verdict.ADVANCE: self.advanced, Verdict.REVERT: self.reverted}[self.case.wrong]

    @property
    def right(self) -> int:
        return {Verdict.ADVANCE: self.advanced, Verdict.REVERT: self.reverted, None: 0}[self.case.right]


# -- what judges -------------------------------------------------------------------------------------------


def by_bounds(gate: Gate, sample: Sample) -> Verdict:
    """The verdict of `judge`, without the reason, which costs more time than the verdict."""
    if sample.value is None or sample.n < gate.at_least:
        return Verdict.HOLD
    if gate.ratio is not None and (sample.old is None or sample.old_n < gate.at_least):
        return Verdict.HOLD
    found = assess(limit_of(gate), sample, CONFIDENCE)
    return Verdict.ADVANCE if found.within else Verdict.REVERT if found.beyond else Verdict.HOLD


def by_comparison(gate: Gate, sample: Sample) -> Verdict:
    """Plain figures against the limit, as without a confidence."""
    return judge(gate, sample).verdict


# -- samples -----------------------------------------------------------------------------------------------


def arm_of(n: Floats, x: Floats) -> Arm:
    there = n > 0
    n, x = n[there], x[there]
    return Arm(
        devices=len(n),
        n=float(n.sum()),
        x=float(x.sum()),
        nn=float(n @ n),
        xx=float(x @ x),
        nx=float(n @ x),
    )


def spread_of(counts: Floats) -> Spread:
    """`counts`: devices by buckets."""
    n = counts.sum(axis=1)
    places = np.flatnonzero(counts.sum(axis=0))
    beyond = n[:, None] - counts.cumsum(axis=1)[:, places]
    return Spread(
        devices=int((n > 0).sum()),
        n=float(n.sum()),
        nn=float(n @ n),
        edges_s=tuple(EDGES_S[place] for place in places),
        x=tuple(beyond.sum(axis=0).tolist()),
        xx=tuple((beyond * beyond).sum(axis=0).tolist()),
        nx=tuple((beyond * n[:, None]).sum(axis=0).tolist()),
    )


def sample_of(metric: str, new: Arm, old: Arm | None, basis: Basis) -> Sample:
    rate = METRICS[metric].figure is Figure.RATE

    def value(one: Arm) -> float:
        return one.x / one.n if rate else 100 * (1 - one.x / one.n)

    def size(one: Arm) -> int:
        return one.devices if rate else round(one.n)

    return Sample(
        value=value(new) if new.n else None,
        n=size(new),
        old=value(old) if old is not None and old.n else None,
        old_n=size(old) if old is not None else 0,
        arm=new,
        old_arm=old,
        basis=basis,
    )


def times_sample(q: float, new: Spread, old: Spread | None, basis: Basis) -> Sample:
    def at(one: Spread) -> float:
        return next(e for e, x in zip(one.edges_s, one.x, strict=True) if x <= (1 - q) * one.n + 1e-9)

    return Sample(
        value=at(new) if new.n else None,
        n=round(new.n),
        old=at(old) if old is not None and old.n else None,
        old_n=round(old.n) if old is not None else 0,
        spread=new,
        old_spread=old,
        basis=basis,
    )


# -- worlds ------------------------------------------------------------------------------------------------


def rates(rng: Generator, devices: int, mean: float, alike: float) -> Floats:
    """The rates at which devices fail: beta distributed; `alike` is the correlation within a device."""
    size = 1 / alike - 1
    return rng.beta(mean * size, (1 - mean) * size, devices)


def wave_alone(devices: int, each: float, truth: float, alike: float, rounds: int) -> Run:
    """A wave whose devices fail in `truth` of their operations, all together; each does `each` a round."""

    def run(rng: Generator) -> Iterator[Look]:
        own = rates(rng, devices, truth, alike)
        own = np.clip(own * truth / max(own.mean(), 1e-9), 0, 1)
        own = np.clip(own + (truth - own.mean()), 0, 1)
        n, x, expected = np.zeros(devices), np.zeros(devices), 0.0
        for _ in range(rounds):
            more = rng.poisson(each, devices)
            n, x = n + more, x + rng.binomial(more, own)
            expected += float((more * own).sum())
            if n.sum():
                yield Look(
                    sample_of("commands.agreement", arm_of(n, x), None, Basis.NONE), expected / n.sum()
                )

    return run


def fits_of_failure(devices: int, truth: float, rounds: int) -> Run:
    """Failures come in fits: what failed last fails again with a probability of 80 %."""

    def run(rng: Generator) -> Iterator[Look]:
        failing = np.zeros(devices, bool)
        n, x, expected = np.zeros(devices), np.zeros(devices), 0.0
        begins = 0.2 * truth / (1 - truth)
        for _ in range(rounds):
            chance = np.where(failing, 0.8, begins)
            failing = rng.random(devices) < chance
            n, x, expected = n + 1, x + failing, expected + float(chance.sum())
            yield Look(sample_of("commands.agreement", arm_of(n, x), None, Basis.NONE), expected / n.sum())

    return run


def beside_control(
    wave: int, control: int, *, mean: float, alike: float, each: float, worse: float, rounds: int
) -> Run:
    """Success of two samples of one fleet; the wave's devices fail in `worse` (a share) more of the cases."""

    def run(rng: Generator) -> Iterator[Look]:
        own = np.minimum(rates(rng, wave, mean, alike) + worse, 1)
        theirs = rates(rng, control, mean, alike)
        n, x = np.zeros(wave), np.zeros(wave)
        m, y = np.zeros(control), np.zeros(control)
        busy, idle = rng.gamma(2, each / 2, wave), rng.gamma(2, each / 2, control)
        for _ in range(rounds):
            more, others = rng.poisson(busy), rng.poisson(idle)
            n, x = n + more, x + rng.binomial(more, own)
            m, y = m + others, y + rng.binomial(others, theirs)
            if n.sum() and m.sum():
                yield Look(sample_of("commands.success", arm_of(n, x), arm_of(m, y), Basis.DEVICES))

    return run


def one_in_a_hundred(wave: int, control: int, rounds: int) -> Run:
    """Of a hundred devices one fails always, on either side, and is used ten times as much as others."""

    def run(rng: Generator) -> Iterator[Look]:
        arms = []
        for devices in (wave, control):
            broken = rng.random(devices) < 0.01
            arms.append((np.zeros(devices), np.where(broken, 1.0, 0.001), np.where(broken, 10.0, 1.0)))
        bad = [np.zeros(wave), np.zeros(control)]
        for _ in range(rounds):
            for k, (n, chance, busy) in enumerate(arms):
                more = rng.poisson(busy)
                n += more
                bad[k] = bad[k] + rng.binomial(more, chance)
            new, old = (arm_of(arms[k][0], bad[k]) for k in (0, 1))
            yield Look(sample_of("commands.success", new, old, Basis.DEVICES))

    return run


def reconnects(wave: int, control: int, *, times: float, rounds: int) -> Run:
    """Devices connect anew twice an hour on the average, some of them far more; the wave `times` that."""

    def run(rng: Generator) -> Iterator[Look]:
        own, theirs = times * rng.gamma(0.7, 2 / 0.7, wave), rng.gamma(0.7, 2 / 0.7, control)
        x, y = np.zeros(wave), np.zeros(control)
        for k in range(1, rounds + 1):
            hours = k / 2
            x, y = x + rng.poisson(own / 2), y + rng.poisson(theirs / 2)
            new, old = arm_of(np.full(wave, hours), x), arm_of(np.full(control, hours), y)
            yield Look(sample_of("connections.rate", new, old, Basis.DEVICES))

    return run


def skewed_times(
    wave: int, control: int, *, slower: float, each: float, rounds: int, basis: Basis, differ: float = 0.3
) -> Run:
    """Log-normal times with a long tail; every device has a speed of its own."""
    edges = np.array(EDGES_S)

    def run(rng: Generator) -> Iterator[Look]:
        speeds = rng.normal(0, differ, wave)
        arms = [speeds + np.log(slower), speeds if basis is Basis.SAME else rng.normal(0, differ, control)]
        counts = [np.zeros((len(one), len(EDGES_S) + 1)) for one in arms]
        for _ in range(rounds):
            for k, one in enumerate(arms):
                who = rng.integers(0, len(one), rng.poisson(each * len(one)))
                took = 0.2 * np.exp(one[who] + rng.normal(0, 0.7, len(who)))
                np.add.at(counts[k], (who, np.searchsorted(edges, took)), 1)
            new, old = spread_of(counts[0]), spread_of(counts[1])
            if new.n and old.n:
                yield Look(times_sample(0.95, new, old, basis))

    return run


def cases() -> list[Case]:
    agree, level = parse_gate("commands.agreement >= 98%"), parse_gate("commands.success >= old - 2%")
    slow, often = parse_gate("commands.latency.p95 <= 1.2 x old"), parse_gate("connections.rate <= 1.3 x old")
    advance, revert = Verdict.ADVANCE, Verdict.REVERT
    alone, beside, times = wave_alone, beside_control, skewed_times
    fleet = partial(beside_control, mean=0.03, alike=0.3, each=8.0, rounds=16)
    pace = partial(skewed_times, each=8.0, rounds=14)
    apart, same = Basis.DEVICES, Basis.SAME
    return [
        Case("agreement just at the limit", agree, alone(10, 10, 0.02, 0.3, 16), revert),
        Case("agreement just beyond it", agree, alone(10, 10, 0.0201, 0.3, 16), advance),
        Case("agreement, in fits, at the limit", agree, fits_of_failure(50, 0.02, 40), revert),
        Case("agreement, in fits, beyond it", agree, fits_of_failure(50, 0.021, 40), advance),
        Case("agreement, all well", agree, alone(10, 10, 0.001, 0.01, 16), revert, advance),
        Case("agreement, 10 % differ", agree, alone(10, 10, 0.10, 0.1, 16), advance, revert),
        Case("success, A/A, 10 devices", level, fleet(10, 200, worse=0), revert),
        Case("success, A/A, 100 devices", level, fleet(100, 100, worse=0), revert),
        Case("success, 2 points worse, 10 devices", level, fleet(10, 200, worse=0.02), advance),
        Case("success, 2 points worse, 100", level, fleet(100, 100, worse=0.02), advance),
        Case("success, one broken in a hundred", level, one_in_a_hundred(30, 300, 16), revert),
        Case(
            "success, all well, 200 devices",
            level,
            beside(200, 400, mean=0.01, alike=0.02, each=8.0, worse=0, rounds=16),
            revert,
            advance,
        ),
        Case("success, 15 points worse, 50", level, fleet(50, 200, worse=0.15), advance, revert),
        Case("p95, A/A, 10 devices", slow, pace(10, 100, slower=1, basis=apart), revert),
        Case("p95, A/A, 60 devices", slow, pace(60, 60, slower=1, basis=apart), revert),
        Case("p95, A/A, the same devices", slow, pace(20, 20, slower=1, basis=same), revert),
        Case("p95, a third slower, 10", slow, pace(10, 100, slower=1.331, basis=apart), advance),
        Case("p95, a third slower, 60", slow, pace(60, 60, slower=1.331, basis=apart), advance),
        Case("p95, a third slower, the same", slow, pace(20, 20, slower=1.331, basis=same), advance),
        Case("p95, three times, 30", slow, pace(30, 60, slower=3, basis=apart), advance, revert),
        Case(
            "p95, all well, 100 devices alike",
            slow,
            times(100, 100, slower=1, each=20.0, rounds=14, basis=apart, differ=0.02),
            revert,
            advance,
        ),
        Case("reconnects, A/A, 10 devices", often, reconnects(10, 200, times=1, rounds=16), revert),
        Case("reconnects, A/A, 100 devices", often, reconnects(100, 100, times=1, rounds=16), revert),
        Case("reconnects, 1.3 times", often, reconnects(50, 200, times=1.3, rounds=16), advance),
        Case("reconnects, 5 times", often, reconnects(50, 200, times=5, rounds=16), advance, revert),
    ]


def try_case(case: Case, runs: int, seed: int, judged: Callable[[Gate, Sample], Verdict]) -> Outcome:
    """Let `case` happen `runs` times; an error that the truth of that very moment excuses is none."""
    found = {Verdict.ADVANCE: 0, Verdict.REVERT: 0}
    looks = 0
    for number in range(runs):
        rng = np.random.default_rng([seed, number, len(case.name)])
        for look, (sample, truth) in enumerate(case.run(rng), 1):
            verdict = judged(case.gate, sample)
            if verdict is Verdict.HOLD:
                continue
            if truth is None or verdict is not case.wrong or _errs(case, verdict, truth):
                found[verdict] += 1
                looks += look
            break
    decided = max(1, sum(found.values()))
    return Outcome(case, runs, found[Verdict.ADVANCE], found[Verdict.REVERT], looks / decided)


def _errs(case: Case, verdict: Verdict, truth: float) -> bool:
    assert case.gate.limit is not None
    harmless = truth <= 1 - case.gate.limit / 100 + 1e-12
    return harmless if verdict is Verdict.REVERT else not harmless


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=1000, help="of each case (default 1000)")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--plain", action="store_true", help="compare figures without bounds")
    asked = parser.parse_args()
    seed = asked.seed if asked.seed is not None else random.randrange(2**31)
    _say(f"seed {seed}, {asked.runs} runs of each case, confidence {100 * CONFIDENCE:g} %")
    _say(f"{'case':38} {'wrong':>8} {'right':>8} {'hold':>8} {'looks':>6} {'s':>6}")
    worst = 0.0
    for case in cases():
        if asked.only not in case.name:
            continue
        started = time.monotonic()
        one = try_case(case, asked.runs, seed, by_comparison if asked.plain else by_bounds)
        hold = one.runs - one.advanced - one.reverted
        right = f"{one.right / one.runs:8.2%}" if case.right else f"{'-':>8}"
        took = time.monotonic() - started
        _say(
            f"{case.name:38} {one.wrong / one.runs:8.2%} {right} {hold / one.runs:8.2%} "
            f"{one.looks:6.1f} {took:6.1f}"
        )
        worst = max(worst, one.wrong / one.runs)
    _say(f"the worst: {worst:.2%} wrong, of {ALPHA:.0%} allowed")
    return 0 if worst <= ALPHA else 1


if __name__ == "__main__":
    sys.exit(main())
