"""The source's changes as they come: a replication connection, read by a thread of its own.

While the copy goes on, what comes is spooled and confirmed to the slot once it is on the disk. Once the
applier has worked off the spool, changes go to it directly, and are confirmed once they are on the target.
Only ends of whole transactions are ever confirmed.
"""

import asyncio
import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import psycopg2
import psycopg2.extras

from fleetlift.core.tenant.pgoutput import lsn_text
from fleetlift.log import get_logger
from fleetlift.tenant.spool import Block, Spool

log = get_logger(__name__)

QUEUE_BYTES: Final = 32 << 20
_BURST_BYTES: Final = 1 << 20
_BURST: Final = 1000
_FEEDBACK_S: Final = 0.5
_SYNC_S: Final = 0.25
_DISK_RETRY_S: Final = 1.0
_GATHER_S: Final = 0.002
_SWITCH_S: Final = 0.001


def replication_connection(url: str, *, name: str) -> Any:
    """A connection that takes replication commands."""
    return psycopg2.connect(
        url,
        connection_factory=psycopg2.extras.LogicalReplicationConnection,
        application_name=f"fleetlift {name}",
        connect_timeout=10,
        keepalives_idle=15,
        keepalives_interval=5,
        keepalives_count=3,
        options="-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3 -c timezone=UTC "
        "-c bytea_output=hex -c client_encoding=UTF8",
    )


class Stream:
    """One session on a slot. `start` begins at `from_lsn`; `get` gives what came, spooled first.

    `applied` is to be set to the end of the last transaction that is on the target.
    """

    def __init__(
        self,
        url: str,
        *,
        slot: str,
        publication: str,
        from_lsn: int,
        spool: Spool,
        spool_bytes_max: int,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._url = url
        self._slot = slot
        self._publication = publication
        self._from = from_lsn
        self._spool = spool
        self._spool_bytes_max = spool_bytes_max
        self._queue_bytes_max = queue_bytes
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._queue: deque[tuple[list[bytes], int]] = deque()
        self._queued = 0
        self._lock = threading.Lock()
        self._signalled = False
        self._interrupted = False
        self._stop = False
        self._want_live = False
        self._live = False  # set by the thread once nothing more goes to the spool
        self._place = (spool.first, 0)
        self._spool_done = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._work, name=f"stream {slot}", daemon=True)
        self.problem: BaseException | None = None
        self.applied = from_lsn
        self.received = from_lsn
        self.confirmed = 0
        self.paused = ""  # why nothing is read at the moment
        self.connected = False

    @property
    def live(self) -> bool:
        """Whether the spool is worked off and changes come directly."""
        return self._spool_done

    @property
    def queued_bytes(self) -> int:
        return self._queued

    def start(self) -> None:
        # Each time the thread has waited for the source it waits for the interpreter as well: 5 ms by
        # default, in which nothing is read.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        self._thread.start()

    async def stop(self) -> None:
        """End the thread and the connection."""
        self._stop = True
        self._wake()
        await asyncio.to_thread(self._thread.join, 10.0)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    async def get(self) -> Block | None:
        """What comes next, in the order of the log; waits for it. None: somebody has called `interrupt`.
        Raises
        what ended the thread."""
        while True:
            self._event.clear()
            self._signalled = False
            if self._interrupted:
                self._interrupted = False
                return None
            if not self._spool_done:
                closed = self._live
                block, *place = self._spool.read_from(*self._place)
                if block is not None:
                    self._place = (place[0], place[1])
                    return block
                if closed:
                    self._spool_done = True
                    continue
                if not self._want_live:
                    self._want_live = True
                    self._wake()
            elif self._queue:
                messages, size = self._queue.popleft()
                with self._lock:
                    full = self._queued >= self._queue_bytes_max
                    self._queued -= size
                if full:
                    self._wake()
                return Block(messages, 0)
            if self.problem is not None:
                raise self.problem
            await self._event.wait()

    async def more_within(self, timeout_s: float) -> bool:
        """Whether `get` gives something at once, now or soon."""
        if self.waiting:
            return True
        self._event.clear()
        self._signalled = False
        if not self.waiting and not self._interrupted and self.problem is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        return self.waiting

    @property
    def waiting(self) -> bool:
        """Whether `get` would give something at once."""
        return bool(self._queue) if self._spool_done else True

    def interrupt(self) -> None:
        """Have `get` return once with nothing."""
        self._interrupted = True
        self._event.set()

    async def failed(self) -> None:
        """Wait for the thread to fail, while nothing is taken."""
        while self.problem is None:
            self._event.clear()
            self._signalled = False
            if self.problem is None:
                await self._event.wait()
        raise self.problem

    # --- the thread

    def _work(self) -> None:
        conn = None
        try:
            conn = replication_connection(self._url, name=f"follow {self._slot}")
            cursor = conn.cursor()
            cursor.start_replication(
                slot_name=self._slot,
                slot_type=psycopg2.extras.REPLICATION_LOGICAL,
                start_lsn=lsn_text(self._from),
                decode=False,
                options={
                    "proto_version": "1",
                    "publication_names": f'"{self._publication}"',
                    "messages": "true",
                },
            )
            self.connected = True
            self._read(cursor)
        except BaseException as problem:
            self.problem = problem
        finally:
            self.connected = False
            if conn is not None:
                with contextlib.suppress(psycopg2.Error):
                    conn.close()
            self._signal()

    def _read(self, cursor: Any) -> None:
        read_message = cursor.read_message
        told, synced = 0.0, time.monotonic()
        ready, reading = [cursor, self._wake_read], [cursor]
        while not self._stop:
            burst: list[bytes] = []
            size = 0
            message = last = None
            while size < _BURST_BYTES and len(burst) < _BURST:
                message = read_message()
                if message is None:
                    # Whoever takes it is busy: a little more can come along.
                    if burst and self._queue and select.select(reading, [], [], _GATHER_S)[0]:
                        continue
                    break
                payload = message.payload
                burst.append(payload)
                size += len(payload)
                last = message
            if last is not None:
                self.received = last.data_start
                self._take(cursor, burst, size)
            if self._want_live and not self._live:
                self._sync(cursor)
                self._live = True
                self._signal()
            now = time.monotonic()
            if not self._live and now - synced >= _SYNC_S:
                self._sync(cursor)
                synced = time.monotonic()
            durable = max(self.applied, self._spool.synced_commit)
            if now - told >= (_FEEDBACK_S if durable > self.confirmed else 2.0):
                self._tell(cursor, durable)
                told = now
            if message is None:
                unsynced = not self._live and self._spool.synced_commit != self._spool.last_commit
                wait_s = _SYNC_S if unsynced else _FEEDBACK_S
                if select.select(ready, [], [], wait_s)[0]:
                    self._drain_wake()

    def _tell(self, cursor: Any, durable: int) -> None:
        cursor.send_feedback(write_lsn=durable, flush_lsn=durable, apply_lsn=durable, force=True)
        self.confirmed = durable

    def _sync(self, cursor: Any) -> None:
        self._retrying(cursor, self._spool.sync)

    def _take(self, cursor: Any, burst: list[bytes], size: int) -> None:
        if not self._live:
            while not self._stop and not self._want_live and self._spool.size_bytes > self._spool_bytes_max:
                self._pause(
                    cursor,
                    f"the spool holds {self._spool.size_bytes} bytes, its limit; the source keeps the rest",
                )
            self.paused = ""
            self._retrying(cursor, lambda: self._spool.append(burst))
            self._signal()
            return
        while not self._stop and self._queued >= self._queue_bytes_max:
            self._pause(cursor, "")
        with self._lock:
            self._queued += size
        self._queue.append((burst, size))
        self._signal()

    def _retrying(self, cursor: Any, write: Callable[[], None]) -> None:
        while not self._stop:
            try:
                write()
            except OSError as problem:
                self._pause(
                    cursor, f"the spool cannot be written ({problem.strerror}): make room on its disk"
                )
                continue
            self.paused = ""
            return

    def _pause(self, cursor: Any, why: str) -> None:
        """Wait a little, without letting the source think that nobody is there any more."""
        if why and self.paused != why:
            log.warning("stream_paused", slot=self._slot, why=why)
        self.paused = why
        if select.select([self._wake_read], [], [], _DISK_RETRY_S)[0]:
            self._drain_wake()
        self._tell(cursor, max(self.applied, self._spool.synced_commit))

    def _drain_wake(self) -> None:
        if select.select([self._wake_read], [], [], 0)[0]:
            os.read(self._wake_read, 4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"x")

    def _signal(self) -> None:
        if not self._signalled:
            self._signalled = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._event.set)
