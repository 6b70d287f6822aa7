"""Sets of sequence numbers, kept as ranges: what the ledger holds of every channel of every device."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

# PostgreSQL writes int8 ranges as [start, end), and the end must itself be a bigint.
MAX_MEMBER = 2**63 - 2
MIN_MEMBER = -(2**63)

_RANGE = re.compile(r"([\[(])(-?\d+),(-?\d+)([\])])")


class RangeSet:
    """A mutable set of int64 (up to `MAX_MEMBER`), compact where numbers are consecutive.

    Two sorted lists hold half-open ranges [start, end) that never touch each other; the numbers of a
    counter that only grows, with few gaps, cost next to nothing, and adding the next one is constant time.
    """

    __slots__ = ("_ends", "_size", "_starts")

    def __init__(self, members: Iterable[int] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._size = 0
        self.add_many(members)

    def add(self, n: int) -> bool:
        """Add one number; False when it was a member already. Raises ValueError outside of int64."""
        return self.add_range(n, n + 1) == 1

    def add_many(self, members: Iterable[int]) -> int:
        """Add numbers; returns how many of them were new."""
        before = self._size
        for n in members:
            self.add_range(n, n + 1)
        return self._size - before

    def add_range(self, start: int, end: int) -> int:
        """Add start, …, end - 1; returns how many of them were new."""
        if start >= end:
            return 0
        if start < MIN_MEMBER or end - 1 > MAX_MEMBER:
            raise ValueError(f"[{start}, {end}) does not fit into int64")
        starts, ends = self._starts, self._ends
        if not ends or start > ends[-1]:
            starts.append(start)
            ends.append(end)
            self._size += end - start
            return end - start
        if start == ends[-1]:
            ends[-1] = end
            self._size += end - start
            return end - start
        # Ranges lo, …, hi - 1 overlap or touch the new one and melt into it. Ranges never touch, so both
        # lists are strictly sorted.
        lo = bisect_right(ends, start - 1)
        hi = bisect_right(starts, end)
        if lo == hi:
            starts.insert(lo, start)
            ends.insert(lo, end)
            self._size += end - start
            return end - start
        first, last = min(start, starts[lo]), max(end, ends[hi - 1])
        had = ends[lo] - starts[lo] if hi - lo == 1 else sum(ends[i] - starts[i] for i in range(lo, hi))
        if hi - lo == 1:
            starts[lo], ends[lo] = first, last
        else:
            starts[lo:hi] = [first]
            ends[lo:hi] = [last]
        added = (last - first) - had
        self._size += added
        return added

    def __contains__(self, n: object) -> bool:
        if not isinstance(n, int):
            return False
        i = bisect_right(self._starts, n) - 1
        return i >= 0 and n < self._ends[i]

    def __len__(self) -> int:
        """How many numbers, not how many ranges. Beyond sys.maxsize use `count`."""
        return self._size

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RangeSet({self.to_pg()!r})"

    @property
    def count(self) -> int:
        """How many numbers are in the set."""
        return self._size

    @property
    def range_count(self) -> int:
        """How many ranges it takes to hold them: the cost of the set."""
        return len(self._starts)

    @property
    def highest(self) -> int | None:
        return self._ends[-1] - 1 if self._ends else None

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The ranges as [start, end), rising."""
        return zip(self._starts, self._ends, strict=True)

    def gaps(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """What is missing of lo, …, hi (both included), as rising ranges [start, end)."""
        missing: list[tuple[int, int]] = []
        at, stop = lo, hi + 1
        i = max(bisect_right(self._starts, lo) - 1, 0)
        while i < len(self._starts) and self._starts[i] < stop and at < stop:
            start, end = self._starts[i], self._ends[i]
            if start > at:
                missing.append((at, start))
            at = max(at, end)
            i += 1
        if at < stop:
            missing.append((at, stop))
        return missing

    def union(self, other: "RangeSet") -> "RangeSet":
        both = self.copy()
        for start, end in other.ranges():
            both.add_range(start, end)
        return both

    def minus(self, other: "RangeSet") -> "RangeSet":
        """The members that `other` lacks."""
        rest = RangeSet()
        for start, end in self.ranges():
            for low, high in other.gaps(start, end - 1):
                rest.add_range(low, high)
        return rest

    def copy(self) -> "RangeSet":
        twin = RangeSet()
        twin._starts, twin._ends, twin._size = list(self._starts), list(self._ends), self._size
        return twin

    def to_pg(self) -> str:
        """The text of PostgreSQL's int8multirange, as in `{[1,5),[7,8)}`."""
        return "{" + ",".join(f"[{a},{b})" for a, b in zip(self._starts, self._ends, strict=True)) + "}"

    @classmethod
    def from_pg(cls, text: str) -> "RangeSet":
        """Read the text of an int8multirange. Raises ValueError when it is none, or is unbounded."""
        inner = text.strip()
        if not (inner.startswith("{") and inner.endswith("}")):
            raise ValueError(f"not a multirange: {text[:80]!r}")
        found = cls()
        rest = inner[1:-1]
        at = 0
        for match in _RANGE.finditer(rest):
            if rest[at : match.start()].strip(", ") != "":
                break
            left, low, high, right = match.groups()
            found.add_range(int(low) + (left == "("), int(high) + (right == "]"))
            at = match.end()
        if rest[at:].strip():
            raise ValueError(f"not a multirange of bounded ranges: {text[:80]!r}")
        return found
