"""The highest rate that a backend sustains under an open model of requests and answers."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from benchmarks.bench import Bench
from benchmarks.clients import Load, generate
from benchmarks.figures import BenchFailed
from benchmarks.ingest import too_busy
from benchmarks.ladder import highest
from benchmarks.processes import Profile
from fleetlift.testing import RunningBackend

SUSTAINED_S = 30.0


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for. `module` is the generator's; `path` says from where to where a request is timed."""

    module: str
    noun: str
    path: str
    rates: tuple[float, ...]
    target: float
    p99_max_s: float


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch at one rate."""

    kind: Kind
    load: Load
    profile: Profile

    @property
    def problem(self) -> str:
        load = self.load
        if load.answered != load.sent:
            return f"{load.sent - load.answered} of {load.sent} {self.kind.noun} did not come to their end"
        return f"p99 {load.p99_s:.2f} s" if load.p99_s > self.kind.p99_max_s else ""


class Sustained(msgspec.Struct, frozen=True, kw_only=True):
    """What was found: the rate, the proof's load, and why it must not count (empty: it does)."""

    rate: float
    load: Load
    invalid: str
    notes: tuple[str, ...]


async def sustained(
    bench: Bench,
    backend: RunningBackend,
    kind: Kind,
    spec: Callable[[float, float], Any],
    stored: Callable[[], Awaitable[int]],
) -> Sustained:
    """Search up and down the rates, and prove the best one.

    `spec(rate, seconds)` is what the generator is told; `stored()` how many requests the database holds as
    answered, over all trials so far. Raises BenchFailed when that is less than what was answered.
    """
    ended = 0

    async def trial(rate: float, seconds: float) -> Trial:
        nonlocal ended
        bench.progress(f"{rate:,.0f} {kind.noun} a second for {seconds:.0f} s")
        roots = {"serve": backend.pid}
        async with bench.profiled(f"{rate:,.0f} {kind.noun} a second", roots) as profile:
            load = await generate(kind.module, spec(rate, seconds), lambda pid: roots.update(generator=pid))
        bench.profiles.pop()
        if load.refused:
            raise BenchFailed(f"{load.refused} {kind.noun} were refused")
        ended += load.answered
        held = await stored()
        if held < ended:
            raise BenchFailed(f"{ended} {kind.noun} were answered, and {held} are stored")
        ended = held  # in a trial that failed some may have ended later
        return Trial(kind=kind, load=load, profile=profile)

    rate, proof, tried = await highest(
        kind.rates,
        kind.target,
        trial,
        short_s=bench.seconds(8.0, 4.0),
        long_s=bench.seconds(SUSTAINED_S),
    )
    bench.profiles.append(proof.profile)
    load = proof.load
    notes = (
        f"not sustained: {proof.problem}"
        if proof.problem
        else f"{load.sent:,} {kind.noun}, every one answered and stored",
        f"{kind.path}: p50 {load.p50_s * 1000:.0f} ms, p99 {load.p99_s * 1000:.0f} ms, longest "
        f"{load.max_s * 1000:.0f} ms; the generator was late by {load.late_p99_s * 1000:.0f} ms (p99)",
        "p99 of each trial: " + ", ".join(f"{r:,.0f}: {t.load.p99_s:.2f} s" for r, t in tried),
    )
    invalid = proof.problem or load.late or too_busy(proof.profile)
    return Sustained(rate=rate, load=load, invalid=invalid, notes=notes)
