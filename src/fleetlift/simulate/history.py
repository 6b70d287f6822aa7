"""All that happened in one simulation: what a trace shows, and the digest by which two runs are compared."""

import hashlib
from typing import Any

import msgspec

from fleetlift.simulate.clock import START, Clock

Line = tuple[Any, ...]


class History:
    """Lines of (seconds since the start, who, what, …); everything in them is text, number or a list."""

    def __init__(self, clock: Clock) -> None:
        self.lines: list[Line] = []
        self._clock = clock

    def note(self, who: str, what: str, *more: Any) -> None:
        self.lines.append((round(self._clock.now - START, 6), who, what, *more))

    def digest(self) -> str:
        """The same for the same history, whatever process computed it."""
        return hashlib.blake2b(msgspec.msgpack.encode(self.lines), digest_size=16).hexdigest()

    def tail(self, lines: int) -> list[str]:
        return [shown(line) for line in self.lines[-lines:]]


def shown(line: Line) -> str:
    at, who, what, *more = line
    return f"{at:10.3f}  {who:<14} {what:<18} " + " ".join(str(part) for part in more)
