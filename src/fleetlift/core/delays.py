"""How late messages came, as counts in buckets whose width grows with the delay.

Each bucket's upper edge is 10 % above the one before, from 1 ms to an hour, so a quantile read from the
counts is at most 10 % too high, whatever the delays were. Counts of devices, paths and windows add up.
Arrays of counts may leave out the empty buckets at their end.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

_FIRST_S = 0.001
_LAST_S = 3600.0
_RATIO = 1.1


def _edges() -> tuple[float, ...]:
    edges = [_FIRST_S]
    while edges[-1] < _LAST_S:
        edges.append(round(min(edges[-1] * _RATIO, _LAST_S), 9))
    return tuple(edges)


EDGES_S: tuple[float, ...] = _edges()
"""Upper edges in seconds, included. Bucket 0 also takes negative delays, of clocks that run ahead."""

BUCKETS = len(EDGES_S) + 1  # the last one: more than an hour


def bucket(delay_s: float) -> int:
    """The bucket of one delay. Not-a-number counts as the latest: what is unknown must not look good."""
    if delay_s != delay_s:
        return BUCKETS - 1
    return bisect_left(EDGES_S, delay_s)


def dense(sparse: Mapping[int, int]) -> list[int]:
    """Counts by bucket number as an array, without the empty buckets at its end."""
    counts = [0] * (max(sparse) + 1) if sparse else []
    for i, n in sparse.items():
        counts[i] = n
    return counts


def merge(many: Iterable[Sequence[int]]) -> list[int]:
    """Add arrays of counts, of whatever lengths."""
    total: list[int] = []
    for counts in many:
        if len(counts) > len(total):
            total.extend([0] * (len(counts) - len(total)))
        for i, n in enumerate(counts):
            total[i] += n
    return total


def quantile(counts: Sequence[int], q: float) -> float | None:
    """The delay in seconds that a share `q` of the messages did not exceed; None without messages.

    It is the upper edge of the bucket that holds the quantile; infinity when that is the last bucket.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"quantile {q}: must be between 0 and 1")
    total = sum(counts)
    if total == 0:
        return None
    # The smallest rank r with r / total >= q; the tolerance undoes what 0.99 * 100 = 99.00000000000001 adds.
    wanted = max(1, -int(-(q * total - 1e-9) // 1))
    seen = 0
    for i, n in enumerate(counts):
        seen += n
        if seen >= wanted:
            return EDGES_S[i] if i < len(EDGES_S) else float("inf")
    return float("inf")
