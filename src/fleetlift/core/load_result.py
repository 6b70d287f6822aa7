"""What a load test came to, whether it counts, and its figures as samples for gates.

offered = accepted + rejected + failed, for each class and in all. What the generator itself did wrong makes a
run invalid, and an invalid run has no figures: a gate that asks for one then holds, as for missing data.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from fleetlift.core.migration import Sample
from fleetlift.core.units import format_count, format_quantity

LATE_MAX_S: Final = 0.1  # p99 from the intended to the actual sending; beyond it a run does not count
LAG_MAX_S: Final = 0.1  # p99 of how late the generator's own loop came round
CPU_MAX: Final = 0.97  # of a core, by any of the generator's processes
POINTS_MOST: Final = 3600  # of the series; a longer run has coarser ones


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of times in seconds. `n` 0: nothing was measured, and the others mean nothing."""

    n: int = 0
    p50_s: float = 0.0
    p95_s: float = 0.0
    p99_s: float = 0.0
    p999_s: float = 0.0
    max_s: float = 0.0


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """`sent`: given to a connection; `rejected`: the target said no; `failed`: it never answered.

    With QoS 0 nothing is acknowledged: what was sent is accepted.
    """

    offered: int = 0
    sent: int = 0
    accepted: int = 0
    rejected: int = 0
    failed: int = 0

    @property
    def balanced(self) -> bool:
        return self.offered == self.accepted + self.rejected + self.failed

    def plus(self, other: "Counts") -> "Counts":
        return Counts(
            offered=self.offered + other.offered,
            sent=self.sent + other.sent,
            accepted=self.accepted + other.accepted,
            rejected=self.rejected + other.rejected,
            failed=self.failed + other.failed,
        )


class ClassResult(msgspec.Struct, frozen=True, kw_only=True):
    """One class of devices. `histogram`: its latencies in microseconds, as HdrHistogram's V2 in Base64."""

    name: str
    devices: int
    counts: Counts
    latency: Quantiles
    histogram: str = ""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of the run, `for_s` from `at_s` on. `p99_s`: of what was acknowledged in it; None: nothing.

    Where seconds were laid together, `p99_s` is the worst of theirs.
    """

    at_s: float
    for_s: float = 1.0
    offered: int = 0
    accepted: int = 0
    errors: int = 0
    connected: int = 0
    p99_s: float | None = None
    late_p99_s: float = 0.0


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the target itself says it has of the run.

    `stored`: distinct messages by its own account; `lost`: acknowledged and not among them; `reread`:
    messages fetched one by one, of the `reread_of` that were acknowledged to the devices asked about;
    `reread_missing`: acknowledged and not among those; `doubled`: copies beyond the first.
    """

    stored: int
    lost: int
    reread: int = 0
    reread_of: int = 0
    reread_missing: int = 0
    doubled: int = 0


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `invalid` says why its figures must not count; empty: they do.

    Latencies are from the intended moment of sending to the acknowledgement. `late`: from the intended to
    the actual sending. `lag`: how late the generator's loop came round. `cpu`: of a core, each process.
    `rate_s`: acknowledged messages a second until the last one was. `why_unproved`: why the target was not
    asked what it has stored.
    """

    scenario: str
    target: str
    protocol: str
    qos: int
    devices: int
    processes: int
    seed: int
    started_at: float
    asked_for_s: float
    lasted_s: float
    wall_s: float
    rate_s: float
    counts: Counts
    latency: Quantiles
    late: Quantiles
    lag: Quantiles
    sign_in: Quantiles
    cpu: tuple[float, ...]
    closed: int
    reconnects: int
    classes: tuple[ClassResult, ...]
    series: tuple[Point, ...]
    histogram: str
    buckets: tuple[tuple[float, int], ...] = ()  # of all latencies: (upper edge in s, how many)
    stored: Stored | None = None
    why_unproved: str = ""
    invalid: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        return not self.invalid

    @property
    def errors(self) -> int:
        return self.counts.rejected + self.counts.failed

    @property
    def error_share(self) -> float:
        return self.errors / self.counts.offered if self.counts.offered else 0.0

    @property
    def lost(self) -> int | None:
        """Acknowledged messages that the target does not have; None: nobody could ask."""
        return None if self.stored is None else max(self.stored.lost, self.stored.reread_missing)


def why_invalid(
    counts: Counts, late: Quantiles, lag: Quantiles, cpu: tuple[float, ...], *, late_max_s: float = LATE_MAX_S
) -> tuple[str, ...]:
    """What the generator did wrong; empty when the run counts."""
    found = []
    if not counts.balanced:
        found.append(
            f"the account does not balance: {counts.offered} offered, "
            f"{counts.accepted} accepted + {counts.rejected} rejected + {counts.failed} failed"
        )
    if not counts.offered:
        found.append("nothing was offered")
    if late.n and late.p99_s > late_max_s:
        found.append(
            f"the generator was late: 99th percentile {format_quantity(late.p99_s, 's')}, "
            f"at most {format_quantity(late_max_s, 's')} counts"
        )
    if lag.n and lag.p99_s > LAG_MAX_S:
        found.append(
            f"the generator was starved: its loop came round late by {format_quantity(lag.p99_s, 's')} "
            f"(99th percentile), at most {format_quantity(LAG_MAX_S, 's')} counts"
        )
    if cpu and max(cpu) > CPU_MAX:
        found.append(
            f"the generator was starved: a process used {100 * max(cpu):.0f} % of its core; "
            "give it more processes, or a machine of its own"
        )
    return tuple(found)


def load_samples(result: LoadResult) -> Mapping[str, Sample]:
    """A sample for each metric of `load.…`, by its name. All without a value when the run does not count."""
    counts, latency = result.counts, result.latency

    def of(value: float | None, n: int, summary: str) -> Sample:
        if result.invalid:
            return Sample(value=None, evidence={"summary": f"invalid: {'; '.join(result.invalid)}"})
        return Sample(value=value, n=n, evidence={"summary": summary}, over_s=result.lasted_s)

    def time(value_s: float) -> Sample:
        return of(value_s if latency.n else None, latency.n, f"{format_count(latency.n)} messages accepted")

    stored = result.stored
    proof = (
        result.why_unproved or "the target was not asked what it has"
        if stored is None
        else f"{format_count(stored.stored)} stored of {format_count(counts.accepted)} accepted, "
        f"{format_count(stored.reread)} read again"
    )
    lost = result.lost
    return {
        "load.errors": of(
            float(result.errors),
            counts.offered,
            f"{format_count(counts.rejected)} rejected and {format_count(counts.failed)} failed "
            f"of {format_count(counts.offered)} offered",
        ),
        "load.latency.p50": time(latency.p50_s),
        "load.latency.p95": time(latency.p95_s),
        "load.latency.p99": time(latency.p99_s),
        "load.latency.max": time(latency.max_s),
        "load.lost": of(None if lost is None else float(lost), counts.accepted, proof),
        "load.rate": of(
            result.rate_s if counts.accepted else None,
            counts.accepted,
            f"{format_count(counts.accepted)} accepted in {format_quantity(result.wall_s, 's')}",
        ),
    }


def laid_together(points: tuple[Point, ...], most: int = POINTS_MOST) -> tuple[Point, ...]:
    """At most `most` points, by laying neighbours together: counts add up, times keep the worst."""
    while len(points) > most:
        points = tuple(_both(points[n : n + 2]) for n in range(0, len(points), 2))
    return points


def _both(points: tuple[Point, ...]) -> Point:
    p99s = [p.p99_s for p in points if p.p99_s is not None]
    return Point(
        at_s=points[0].at_s,
        for_s=sum(p.for_s for p in points),
        offered=sum(p.offered for p in points),
        accepted=sum(p.accepted for p in points),
        errors=sum(p.errors for p in points),
        connected=points[-1].connected,
        p99_s=max(p99s) if p99s else None,
        late_p99_s=max(p.late_p99_s for p in points),
    )
