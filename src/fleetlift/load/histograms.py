"""Times in HdrHistograms: microseconds, three digits, mergeable between processes and kept as text."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from hdrh.histogram import HdrHistogram

from fleetlift.core.load_result import Quantiles

_MOST_US: Final = 3_600_000_000
_DIGITS: Final = 3


def empty() -> HdrHistogram:
    return HdrHistogram(1, _MOST_US, _DIGITS)


def record(histogram: HdrHistogram, seconds: float) -> None:
    """A time; what does not fit is the least or the most that does."""
    histogram.record_value(min(max(int(seconds * 1e6), 1), _MOST_US))


class Times:
    """Times in seconds, noted one by one at next to no cost and counted a thousand at a time, since to record
    each in a histogram takes as long as much else of a message together."""

    def __init__(self) -> None:
        self._noted: list[float] = []
        self._counts: Counter[int] = Counter()
        self.note = self._noted.append

    def count(self, at_least: int = 1000) -> None:
        """Count those noted, when there are enough. Of each, the eleven bits that a histogram tells apart."""
        if len(self._noted) < at_least:
            return
        found = [int(seconds * 1e6) for seconds in self._noted]
        self._noted.clear()
        self._counts.update([us >> n << n if (n := us.bit_length() - 11) > 0 else us for us in found])

    def take(self) -> Counter[int]:
        """How many there were of each, in microseconds, since the last time."""
        self.count(1)
        counts, self._counts = self._counts, Counter()
        return counts


def laid(counts: Mapping[int, int]) -> HdrHistogram:
    """A histogram of so many of each, in microseconds."""
    histogram = empty()
    for us, count in counts.items():
        histogram.record_value(min(max(us, 1), _MOST_US), count)
    return histogram


def percentile_s(counts: Mapping[int, int], percent: float) -> float:
    """The time that this share of the times do not exceed, in seconds; 0 when there are none."""
    left = max(1, int(sum(counts.values()) * percent / 100 + 0.5))  # a histogram rounds so
    for us, count in sorted(counts.items()):
        left -= count
        if left <= 0:
            return us / 1e6
    return 0.0


def encoded(histogram: HdrHistogram) -> str:
    return str(histogram.encode().decode())


def add(histogram: HdrHistogram, text: str) -> None:
    """Add one that was `encoded`; an empty text is an empty one."""
    if text:
        histogram.decode_and_add(text.encode())


def quantiles(histogram: HdrHistogram) -> Quantiles:
    n = int(histogram.get_total_count())
    if not n:
        return Quantiles()

    def at(percent: float) -> float:
        return float(histogram.get_value_at_percentile(percent)) / 1e6

    return Quantiles(
        n=n,
        p50_s=at(50),
        p95_s=at(95),
        p99_s=at(99),
        p999_s=at(99.9),
        max_s=float(histogram.get_max_value()) / 1e6,
    )


def buckets(histogram: HdrHistogram, a_decade: int = 8) -> list[tuple[float, int]]:
    """(upper edge in s, count), growing by the same factor, without empty ends: for a plot."""
    found: dict[int, int] = {}
    factor = 10 ** (1 / a_decade)
    for item in histogram.get_recorded_iterator():
        value, place, edge = item.value_iterated_to, 0, 1.0
        while edge < value:
            edge *= factor
            place += 1
        found[place] = found.get(place, 0) + int(item.count_added_in_this_iter_step)
    if not found:
        return []
    return [(factor**n / 1e6, found.get(n, 0)) for n in range(min(found), max(found) + 1)]
