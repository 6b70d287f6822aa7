"""Completeness from the ledger's ranges: which numbers of a channel the new side should have, and lacks.

`migrate/measure.py` asks PostgreSQL the same, for a whole wave at once; a test holds the two together.
"""

import msgspec

from fleetlift.core.ranges import MAX_MEMBER, RangeSet


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """One channel of a device that has moved.

    `baseline`: the highest number that the new side had before the device was told; None: it had none.
    `base`: the highest number known anywhere when it had moved, -1: none. `upto`: the newest number old
    enough to be judged. `got`: the numbers that came by the new path.
    """

    baseline: int | None
    base: int
    upto: int
    got: RangeSet


def expected_and_missing(channel: Channel) -> tuple[int, RangeSet]:
    """How many numbers are due from the first one that the new side has seen since the baseline (or, where it
    has seen none, from the first one after `base`) to `upto`, and those of them that it lacks."""
    since = RangeSet()
    lowest = None if channel.baseline is None else channel.baseline + 1
    for start, end in channel.got.ranges():
        if lowest is None or end > lowest:
            since.add_range(start if lowest is None else max(start, lowest), min(end, MAX_MEMBER))
    first = next((start for start, _ in since.ranges()), channel.base + 1)
    missing = RangeSet()
    if first > channel.upto:
        return 0, missing
    for start, end in since.gaps(first, channel.upto):
        missing.add_range(start, end)
    return channel.upto - first + 1, missing
