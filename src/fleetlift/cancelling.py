"""Cancelling that cannot be lost: who cancels asks again, and who tries again what has failed ends.

A library may raise an error of its own in place of a cancellation: asyncpg's transactions do when the
connection breaks in the same moment. Taken for one that passes, the work would begin again for ever.
"""

import asyncio
from collections.abc import Collection
from typing import Any, Final

ASK_AGAIN_S: Final = 6.0


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and see them end, also when we are cancelled meanwhile. What they raise is not heard."""
    pending, cancelled = set(tasks), False
    while pending:
        for task in pending:
            task.cancel()
        try:
            _, pending = await asyncio.wait(pending, timeout=ASK_AGAIN_S)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if cancelled:
        raise asyncio.CancelledError


def raise_if_cancelled() -> None:
    """For whoever has caught an error and would try again: end instead when this task was asked to, or the
    time of an `asyncio.timeout` around it is up."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
