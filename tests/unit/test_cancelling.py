"""Tasks end when they are asked to, whatever a library makes of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from fleetlift import cancelling
from fleetlift.backend import telemetry
from fleetlift.core.errors import Unavailable
from fleetlift.core.tenant.cutover import CutoverState
from fleetlift.edge import presence
from fleetlift.mover import switching
from fleetlift.tenant import copy, cutover
from fleetlift.tenant.fence import Fence

Attempt = Callable[[], Awaitable[Any]]


class _Library:
    """Raises an error of its own in place of the first cancellation."""

    def __init__(self, error: Exception) -> None:
        self.error, self.asked = error, 0

    async def __call__(self) -> Any:
        self.asked += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if self.asked > 1:
                raise
            raise self.error from None


async def _plain_loop(attempt: Attempt) -> None:
    while True:
        try:
            await attempt()
        except asyncpg.InterfaceError:
            cancelling.raise_if_cancelled()


async def _copy(attempt: Attempt) -> None:
    copier: Any = SimpleNamespace(_patience_s=60.0, _retried=0)
    await copy.Copier._patiently(copier, "copying", attempt)


async def _cutover(attempt: Attempt) -> None:
    run: Any = SimpleNamespace(_now=lambda: 0.0, _settle_within_s=60.0, tell=print)
    await cutover._Run._patiently(run, attempt)


async def _fence(attempt: Attempt) -> None:
    async def aclose() -> None:
        return

    fence: Any = SimpleNamespace(
        _busy=asyncio.Lock(), _conn=SimpleNamespace(is_closed=lambda: False), aclose=aclose, side="source"
    )
    async with Fence._connection(fence):
        await attempt()


async def _switch(attempt: Attempt) -> None:
    async def switch() -> CutoverState:
        try:
            return await attempt()  # type: ignore[no-any-return]
        except asyncpg.InterfaceError as error:
            return CutoverState(aborted=str(error))

    async def caught_up() -> bool:
        return True

    await switching._tried(switch, caught_up)


@pytest.mark.parametrize(
    ("loop", "error"),
    [
        (_plain_loop, asyncpg.InterfaceError("closed")),
        (_copy, asyncpg.InterfaceError("closed")),
        (_cutover, Unavailable("closed")),
        (_fence, asyncpg.InterfaceError("closed")),
        (_switch, asyncpg.InterfaceError("closed")),
    ],
)
async def test_who_tries_again_ends_when_it_was_cancelled(
    loop: Callable[[Attempt], Awaitable[None]], error: Exception
) -> None:
    library = _Library(error)
    task = asyncio.ensure_future(loop(library))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task], timeout=2)
    assert task.cancelled() and library.asked == 1


async def test_a_time_that_is_up_ends_it_too() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await _plain_loop(_Library(asyncpg.InterfaceError("closed")))


async def test_who_waits_for_the_end_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loop that does not look; an error that comes in the end is not told as one that nobody took."""
    monkeypatch.setattr(cancelling, "ASK_AGAIN_S", 0.05)

    async def loop() -> None:
        library = _Library(asyncpg.InterfaceError("closed"))
        for _ in range(2):
            try:
                await library()
            except asyncpg.InterfaceError:
                continue
            except asyncio.CancelledError:
                raise ValueError("in the end") from None

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    task = asyncio.create_task(loop())
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await cancelling.end([task])
    assert task.done()
    del task
    assert not told


async def test_who_is_cancelled_while_it_waits_has_seen_the_end() -> None:
    async def slowly() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.shield(asyncio.sleep(0.2))
            done.set()

    done = asyncio.Event()
    task = asyncio.create_task(slowly())
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(cancelling.end([task]))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() and task.done()


@pytest.mark.parametrize("worker", [presence, telemetry], ids=["presence", "telemetry"])
async def test_a_worker_ends_when_its_database_dies_in_the_moment_of_its_stop(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = _Library(asyncpg.InterfaceError("connection is closed"))

    @contextlib.asynccontextmanager
    async def sole_owner(*_: object) -> AsyncIterator[None]:
        await library()
        yield

    monkeypatch.setattr(worker, "sole_owner", sole_owner)
    ctx: Any = SimpleNamespace(
        stop=asyncio.Event(),
        settings=SimpleNamespace(database_url=""),
        sys_nc=SimpleNamespace(is_closed=False),
    )
    running = asyncio.create_task(worker.run(ctx))
    while not library.asked:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    ctx.stop.set()
    async with asyncio.timeout(3):
        await running
    assert library.asked == 1
