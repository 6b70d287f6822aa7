"""From figures by device to the samples that gates judge: shares, rates and times, with what bounds need.

The measurements by SQL and the simulator make their samples here, so that a gate means the same in both.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fleetlift.core.delays import EDGES_S
from fleetlift.core.migration import Arm, Basis, Sample, Spread

LONGEST_S = EDGES_S[-1]


def arm(figures: Iterable[tuple[float, float]]) -> Arm:
    """The sums over devices of (n, x): operations (or hours), and how many of them went wrong (or events)."""
    devices, n, x, nn, xx, nx = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for own_n, own_x in figures:
        if own_n > 0:
            devices += 1
            n, x = n + own_n, x + own_x
            nn, xx, nx = nn + own_n * own_n, xx + own_x * own_x, nx + own_n * own_x
    return Arm(devices=devices, n=n, x=x, nn=nn, xx=xx, nx=nx)


def spread(histograms: Iterable[Mapping[int, int]]) -> Spread:
    """The sums over devices of their counts by bucket of `core/delays.py`."""
    by_device = [{place: n for place, n in one.items() if n > 0} for one in histograms]
    by_device = [one for one in by_device if one]
    edges = sorted({min(place, len(EDGES_S) - 1) for one in by_device for place in one})
    x, xx, nx = [0] * len(edges), [0] * len(edges), [0] * len(edges)
    total, squares = 0, 0
    for one in by_device:
        own = left = sum(one.values())
        total, squares = total + own, squares + own * own
        steps = iter(sorted(one.items()))
        place, n = next(steps)
        for i, edge in enumerate(edges):
            while place <= edge and n:
                left -= n
                place, n = next(steps, (len(EDGES_S) + 1, 0))
            if not left:
                break
            x[i], xx[i], nx[i] = x[i] + left, xx[i] + left * left, nx[i] + own * left
    return Spread(
        devices=len(by_device),
        n=total,
        nn=squares,
        edges_s=tuple(EDGES_S[edge] for edge in edges),
        x=tuple(x),
        xx=tuple(xx),
        nx=tuple(nx),
    )


def share_sample(
    new: Arm, old: Arm | None, basis: Basis, *, over_s: float, evidence: Mapping[str, Any]
) -> Sample:
    """Of `new.n` operations, the share in percent that did *not* go wrong."""
    return _sample(new, old, basis, over_s, evidence, lambda one: 100.0 * (one.n - one.x) / one.n)


def rate_sample(
    new: Arm, old: Arm | None, basis: Basis, *, over_s: float, evidence: Mapping[str, Any]
) -> Sample:
    """Events an hour of a device; an arm's `n` are hours. `n` of the sample counts the devices."""
    return _sample(new, old, basis, over_s, evidence, lambda one: one.x / one.n, count_devices=True)


def _sample(
    new: Arm,
    old: Arm | None,
    basis: Basis,
    over_s: float,
    evidence: Mapping[str, Any],
    value: Any,
    *,
    count_devices: bool = False,
) -> Sample:
    there = old is not None and old.n > 0
    return Sample(
        value=value(new) if new.n > 0 else None,
        n=new.devices if count_devices else round(new.n),
        old=value(old) if there else None,
        old_n=(old.devices if count_devices else round(old.n)) if old is not None else 0,
        evidence=dict(evidence),
        arm=new,
        old_arm=old if there else None,
        basis=basis if there else Basis.NONE,
        over_s=over_s,
    )


def time_sample(
    q: float,
    new: Spread,
    old: Spread | None,
    basis: Basis,
    *,
    over_s: float,
    evidence: Mapping[str, Any],
) -> Sample:
    """The time in seconds that a share `q` of the operations did not exceed. An hour is the longest told."""
    there = old is not None and old.n > 0
    return Sample(
        value=time_at(new, q),
        n=round(new.n),
        old=time_at(old, q) if old is not None else None,
        old_n=round(old.n) if old is not None else 0,
        evidence=dict(evidence),
        spread=new,
        old_spread=old if there else None,
        basis=basis if there else Basis.NONE,
        over_s=over_s,
    )


def time_at(one: Spread, q: float) -> float | None:
    """The quantile of all operations together; None without any."""
    for edge_s, beyond in zip(one.edges_s, one.x, strict=True):
        if beyond <= (1 - q) * one.n + 1e-9:
            return edge_s
    return LONGEST_S if one.n > 0 else None


def sparse(counts: Sequence[int]) -> dict[int, int]:
    """An array of counts by bucket as a mapping, without the empty ones."""
    return {place: n for place, n in enumerate(counts) if n}
