"""One clock for everything: a heap of what happens when, and an event loop for `async` code on top of it.

Nothing ever waits. The clock jumps to the next thing that happens; equal times keep the order in which they
were asked for, so that a seed gives one history.
"""

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, cast

START = 1_800_000_000.0  # Unix seconds at which every simulation begins

T = TypeVar("T")


class Crashed(BaseException):
    """A simulated process was killed here: nothing after this line ran."""


class Clock:
    """Simulated time, and what is to happen in it."""

    def __init__(self) -> None:
        self.now = START
        self.happened = 0
        self.loop = SimulatedLoop(self)
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._n = 0

    def time(self) -> float:
        return self.now

    def at(self, when: float, call: Callable[..., object], *args: Any) -> None:
        self._n += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._n, call, args))

    def after(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        self._n += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._n, call, args))

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> None:
        """Let happen what happens until then, or until `stop` says so (asked once a second)."""
        heap, ready = self._heap, self.loop.ready
        before = events._get_running_loop()
        events._set_running_loop(cast(Any, self.loop))
        look_at = self.now
        try:
            while True:
                while ready:
                    handle = ready.popleft()
                    if not handle.cancelled():
                        handle._run()
                if self.loop.broken is not None:
                    raise self.loop.broken
                if not heap or heap[0][0] > until:
                    self.now = max(self.now, until)
                    return
                if stop is not None and self.now >= look_at:
                    if stop():
                        return
                    look_at = self.now + 1.0
                when, _, call, args = heapq.heappop(heap)
                self.now = when
                self.happened += 1
                call(*args)
        finally:
            events._set_running_loop(before)

    def close(self) -> None:
        """Let every task end."""
        self.loop.broken = None
        before = events._get_running_loop()
        events._set_running_loop(cast(Any, self.loop))
        try:
            for task in sorted(self.loop.tasks, key=lambda task: task.get_name()):
                task.cancel()
            while self.loop.ready:
                handle = self.loop.ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            events._set_running_loop(before)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        return self.loop.create_task(work, name=name)


class SimulatedLoop:
    """As much of an event loop as tasks, timeouts and task groups need, on simulated time."""

    def __init__(self, clock: Clock) -> None:
        self.ready: deque[asyncio.Handle] = deque()
        self.broken: BaseException | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self._clock = clock

    def time(self) -> float:
        return self._clock.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, cast(Any, self), context)
        self.ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._clock.now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, cast(Any, self), context)
        self._clock.at(when, self._due, handle)
        return handle

    def _due(self, handle: asyncio.TimerHandle) -> None:
        if not handle.cancelled():
            self.ready.append(handle)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=cast(Any, self))

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None
    ) -> "asyncio.Task[Any]":
        task = asyncio.Task(coro, loop=cast(Any, self), name=name, context=context)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A callback has failed: that is a fault of the simulator, unless a simulated process died there."""
        problem = context.get("exception")
        if isinstance(problem, BaseException) and not isinstance(problem, Crashed | asyncio.CancelledError):
            self.broken = self.broken or problem
