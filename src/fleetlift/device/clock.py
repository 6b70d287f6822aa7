"""What time it is on the sides, told by a device whose own clock may be wrong.

The expiry of a command is a time by the sides' clock. A device compares it with its own only while it knows
no better: each side tells its time when the device connects, and the difference is kept from then on.
"""

from typing import Final

NEAR_S: Final = 2.0  # a smaller difference is taken for the network's, and the device's own clock is used


class SideClock:
    """The sides' clock as the device knows it. Times are Unix seconds; `now` is the device's own."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None  # how far the device's clock is ahead of the sides'

    @property
    def known(self) -> bool:
        return self._ahead_s is not None

    def told(self, side_time: float, now: float) -> None:
        """A side has just said that it is `side_time`."""
        ahead_s = now - side_time
        self._ahead_s = ahead_s if abs(ahead_s) >= NEAR_S else 0.0

    def jumped(self, by_s: float) -> None:
        """The device's clock was set on (or, below 0, back) by so much; the sides' was not."""
        if self._ahead_s is not None:
            self._ahead_s += by_s

    def time(self, now: float) -> float:
        """The sides' time; the device's own as long as no side has told any."""
        return now - (self._ahead_s or 0.0)
