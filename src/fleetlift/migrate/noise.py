"""How far the old side differs from itself: a part of its feed is read a second time and compared.

Parity counts only differences above this noise, so it is measured before any device sends to both sides, and
again from time to time. The second reading enters the log marked as such; the telemetry reader compares it
with what is stored of the first one and keeps neither.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import cast

from fleetlift.core.errors import BadInput
from fleetlift.core.telemetry import HEADER_AGAIN
from fleetlift.log import get_logger
from fleetlift.sides.base import Side, TelemetryReceived, log_entry

log = get_logger(__name__)

FIRST_AFTER_S = 5.0  # a first reading, of what has come by then
AGAIN_EVERY_S = 600.0
READ_MAX = 2000  # messages of one second reading
READ_WITHIN_S = 20.0
POSITIONS_MAX = 200

ToLog = Callable[[str, bytes, Mapping[str, str]], Awaitable[int]]


class NoiseReader:
    """Reads behind the feed, which says how far it has come."""

    def __init__(self, side: Side, to_log: ToLog) -> None:
        self._side = side
        self._to_log = to_log
        self._passed: deque[tuple[str, int]] = deque(maxlen=POSITIONS_MAX)  # position, messages up to it

    def begin(self) -> None:
        """The feed begins, at first or anew: what lies between its positions is not known any more."""
        self._passed.clear()

    def passed(self, position: str, messages: int) -> None:
        """The feed has come to `position`, by so many more messages of telemetry."""
        self._passed.append((position, messages))

    async def run(self) -> None:
        """Read a part again every now and then, until cancelled. Raises what the side raises."""
        await asyncio.sleep(FIRST_AFTER_S)
        while True:
            read = await self.read_again()
            await asyncio.sleep(AGAIN_EVERY_S if read else FIRST_AFTER_S)

    async def read_again(self) -> int:
        """Read again what came since the oldest position known; returns how many messages that were."""
        if len(self._passed) < 2:
            return 0
        passed = list(self._passed)
        after, until = passed[0][0], passed[-1][0]
        due = min(sum(messages for _, messages in passed[1:]), READ_MAX)
        if due == 0:
            return 0
        read = 0
        feed = cast("AsyncGenerator[tuple[str, Sequence[object]], None]", self._side.feed(after))
        with contextlib.suppress(TimeoutError):
            async with contextlib.aclosing(feed), asyncio.timeout(READ_WITHIN_S):
                async for position, items in feed:
                    messages = [item for item in items if isinstance(item, TelemetryReceived)][: due - read]
                    await asyncio.gather(*(self._enter(message) for message in messages))
                    read += len(messages)
                    if read >= due or position == until:
                        break
        log.info("old_side_read_again", side=self._side.name, messages=read)
        return read

    async def _enter(self, message: TelemetryReceived) -> None:
        topic, headers = log_entry(self._side.name, message)
        # What can never enter was said so of at the first reading.
        with contextlib.suppress(BadInput):
            await self._to_log(topic, message.body, {**headers, HEADER_AGAIN: "1"})
