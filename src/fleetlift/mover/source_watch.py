"""Whether the source's schema is still the one that was copied, looked at again and again while following."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import asyncpg

from fleetlift.cancelling import end
from fleetlift.core.errors import FleetError
from fleetlift.log import get_logger
from fleetlift.mover.move import Move

log = get_logger(__name__)

EVERY_S: Final = 60.0


class SourceWatch:
    """Looks beside the rounds: none of them waits for a large catalogue or a database that is away."""

    def __init__(self, move: Move, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._move, self._clock = move, clock
        self._task: asyncio.Task[str] | None = None
        self._said = ""
        self._next_at = 0.0

    def look(self, following: bool) -> str:
        """What was found last: what has changed and what to do, or "". When it is not `following` that is
        forgotten, so that whoever resumes a held move is answered by a new look."""
        if not following:
            self._forget()
            return ""
        if self._task is not None and self._task.done():
            self._said = self._found(self._task)
            self._task = None
        if self._task is None and self._clock() >= self._next_at:
            self._next_at = self._clock() + EVERY_S
            self._task = asyncio.create_task(
                self._move.source_changed(), name=f"{self._move.name} source's schema"
            )
        return self._said

    async def close(self) -> None:
        task = self._forget()
        if task is not None:
            await end([task])

    def _forget(self) -> asyncio.Task[str] | None:
        task, self._task, self._said, self._next_at = self._task, None, "", 0.0
        if task is not None:
            task.cancel()
        return task

    def _found(self, task: asyncio.Task[str]) -> str:
        """What cannot be read now is read the next time; what was known stays so."""
        try:
            return task.result()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, FleetError) as error:
            log.warning("source_not_read", migration=self._move.name, reason=str(error) or repr(error))
            return self._said
