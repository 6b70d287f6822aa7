"""The relay: stands at the old address and forwards every connection, whole, to one side.

It reads only the first bytes of a connection, to tell whose it is; all others pass as they are, TLS too. The
routing table says which side a client goes to, and may be changed at any time; connections there are stay
where they are until they end or are let go. A connection goes to one side only, and what it has sent is never
sent to the other one.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from fleetlift.config import join_address, write_private
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.peek import Peek, peek
from fleetlift.core.relaying import (
    Pace,
    ProxyHeader,
    Router,
    Routes,
    To,
    WhenNewDown,
    checked_routes,
    client_of,
    proxy_header,
    replaced,
)
from fleetlift.edge.relay_visitors import Visitor, Visitors
from fleetlift.log import get_logger

log = get_logger(__name__)

Address = tuple[str, int]

BUFFER_BYTES: Final = 128 * 1024  # a direction of a connection holds about so much, then its sender waits
CONNECTIONS_MAX: Final = 100_000
FIRST_WITHIN_S: Final = 15.0  # a client that has not said who it is by then is closed
CONNECT_WITHIN_S: Final = 3.0  # a side that does not take a connection for so long is down
RETRY_S: Final = 0.1
HALF_OPEN_S: Final = 60.0  # one end has said its last word; the other one has so long
QUIET_S: Final = 0.05  # a backend that says nothing for so long has acknowledged what it got
QUIET_WITHIN_S: Final = 1.0
LINGER_S: Final = 1.0
SAVE_EVERY_S: Final = 1.0
BACKLOG: Final = 4096


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """How far letting go is. `left` counts connections to the old side that the table now sends elsewhere."""

    running: bool
    rate_per_s: float
    closed: int
    left: int
    others: int  # on the old side, where the table wants them


class Status(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int
    open_old: int
    open_new: int
    waiting: int  # have not said who they are, or are being connected
    accepted: int
    refused: int  # there was no room
    unnamed: int  # closed, having said nothing
    failed_old: int  # the side could not be reached
    failed_new: int
    fell_back: int
    bytes_up: int
    bytes_down: int
    clients: int
    forgotten: int
    watched_from: float
    watched_until: float
    release: Release


class Relay:
    """See the module. `listen` with port 0 takes a free one; `address` says which."""

    def __init__(
        self,
        data: Path,
        *,
        listen: Address,
        old: Address,
        new: Address,
        proxy_old: ProxyHeader = ProxyHeader.NONE,
        proxy_new: ProxyHeader = ProxyHeader.NONE,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self.address = listen
        self.sides = {To.OLD: old, To.NEW: new}
        self.proxy = {To.OLD: proxy_old, To.NEW: proxy_new}
        self.connections_max = connections_max
        self.fronts: set[_Front] = set()
        self.active: set[_Front] = set()  # have passed bytes since they were last saved
        self.accepted = self.refused = self.unnamed = self.fell_back = 0
        self.bytes_up = self.bytes_down = 0
        self.failed = {To.OLD: 0, To.NEW: 0}
        self._open = {To.OLD: 0, To.NEW: 0}
        self._data = data
        self._routes_file = data / "routes.json"
        self._tasks: set[asyncio.Task[None]] = set()
        self._pace: Pace | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._release_all = False
        self._release_began = 0.0
        self._rate_per_s = 0.0
        self._closed = 0
        self.visitors: Visitors
        self.router = Router(Routes())

    @property
    def routes(self) -> Routes:
        return self.router.routes

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Relay"]:
        """Take connections inside the block."""
        self._data.mkdir(parents=True, exist_ok=True)
        self.router = Router(self._stored_routes())
        self.visitors = Visitors(self._data / "visitors.db", time.time())
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(lambda: _Front(self), *self.address, backlog=BACKLOG)
        except OSError as problem:
            self.visitors.close()
            raise Unavailable(
                f"the relay cannot listen on {join_address(*self.address)} "
                f"({(problem.strerror or str(problem)).lower()}): choose another --listen, or stop what "
                "is there"
            ) from problem
        self.address = server.sockets[0].getsockname()[:2]
        saving = asyncio.create_task(self._save_for_ever(), name="save visitors")
        log.info("relay_started", listen=join_address(*self.address), epoch=self.routes.epoch)
        try:
            yield self
        finally:
            server.close()
            for task in (saving, self._releasing, *self._tasks):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(t for t in (saving, self._releasing) if t), return_exceptions=True)
            for front in list(self.fronts):
                front.end()
            await asyncio.sleep(0)
            await self._save()
            self.visitors.close()

    def _stored_routes(self) -> Routes:
        try:
            return checked_routes(msgspec.json.decode(self._routes_file.read_bytes(), type=Routes))
        except FileNotFoundError:
            return Routes()
        except (msgspec.DecodeError, BadInput) as problem:
            # To go on with other routes would send devices to a side that may be fenced.
            raise BadInput(
                f"{self._routes_file} cannot be read ({problem}): put it right, or remove it"
            ) from problem

    # --- what may be asked of it ---

    def set_routes(self, given: Routes) -> Routes:
        """Replace the table: on disk first, then at once for every connection that is not forwarded yet."""
        held = replaced(self.routes, given)
        if held is not self.routes and held != self.routes:
            write_private(self._routes_file, msgspec.json.encode(held).decode())
            self.router = Router(held)
            log.info("relay_routed", epoch=held.epoch, default=held.default, share_percent=held.share_percent)
        return self.routes

    def release(self, rate_per_s: float, *, everything: bool = False) -> Release:
        """Let connections to the old side go, at most `rate_per_s` in any second, those that the table now
        sends to the new side, oldest first; with `everything` the others too. Again: the rate is changed."""
        pace = Pace(rate_per_s)
        if self._pace is not None:
            pace.begin_after(self._pace)
        self._pace, self._rate_per_s, self._release_all = pace, rate_per_s, everything
        self._release_began = time.monotonic()
        if self._releasing is None or self._releasing.done():
            self._closed = 0
            self._releasing = asyncio.create_task(self._let_go_all(), name="release")
        return self.release_status()

    def stop_release(self) -> Release:
        if self._releasing is not None:
            self._releasing.cancel()
            self._releasing = None
        return self.release_status()

    def release_status(self) -> Release:
        on_old = [front for front in self.fronts if front.side is To.OLD]
        left = sum(front.leaving or self._leaves(front) for front in on_old)
        running = self._releasing is not None and not self._releasing.done()
        return Release(
            running=running,
            rate_per_s=self._rate_per_s if running else 0.0,
            closed=self._closed,
            left=left,
            others=len(on_old) - left,
        )

    def status(self) -> Status:
        return Status(
            epoch=self.routes.epoch,
            open_old=self._open[To.OLD],
            open_new=self._open[To.NEW],
            waiting=len(self.fronts) - self._open[To.OLD] - self._open[To.NEW],
            accepted=self.accepted,
            refused=self.refused,
            unnamed=self.unnamed,
            failed_old=self.failed[To.OLD],
            failed_new=self.failed[To.NEW],
            fell_back=self.fell_back,
            bytes_up=self.bytes_up + sum(front.up for front in self.fronts),
            bytes_down=self.bytes_down + sum(front.down for front in self.fronts),
            clients=len(self.visitors.by_client),
            forgotten=self.visitors.forgotten,
            watched_from=self.visitors.since,
            watched_until=self.visitors.until,
            release=self.release_status(),
        )

    # --- letting go ---

    def _leaves(self, front: "_Front") -> bool:
        return not front.leaving and (self._release_all or self.router.side(front.client) is To.NEW)

    async def _let_go_all(self) -> None:
        """Several are made ready at once, since each waits for its backend to fall quiet; one after the other
        goes."""
        turn = asyncio.Lock()
        while going := sorted(
            # One that comes back to the old side, because the table says so, is not let go again and again.
            (
                front
                for front in self.fronts
                if front.side is To.OLD and self._leaves(front) and front.opened_at <= self._release_began
            ),
            key=lambda front: front.opened_at,
        ):
            queue = iter(going)

            async def work(queue: "Any" = queue) -> None:
                for front in queue:
                    if front.side is To.OLD and self._leaves(front):
                        await self._let_go(front, turn)

            workers = max(1, min(200, int(self._rate_per_s * 0.2), len(going)))
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(work())
        log.info("relay_released", closed=self._closed)

    async def _let_go(self, front: "_Front", turn: asyncio.Lock) -> None:
        front.leaving = True
        try:
            await front.quieten()
            async with turn:
                # The rate may change while one waits its turn.
                while self._pace is not None and (wait_s := self._pace.wait_s(time.monotonic())):  # noqa: ASYNC110
                    await asyncio.sleep(wait_s)
                if front.side is not None:
                    front.let_go()
                    self._closed += 1
                    if self._pace is not None:
                        self._pace.went(time.monotonic())
        except asyncio.CancelledError:
            front.stay()
            raise

    # --- the account ---

    def forwarded(self, front: "_Front", side: To) -> None:
        self._open[side] += 1
        one = front.visitor
        assert one is not None
        one.side = side.value
        if side is To.OLD:
            one.open_old += 1
        else:
            one.open_new += 1
        self.visitors.changed(one)

    def ended(self, front: "_Front") -> None:
        """A connection is gone, or was never forwarded."""
        if front not in self.fronts:
            return
        self.fronts.discard(front)
        self._account(front, time.time())
        self.active.discard(front)
        if (one := front.visitor) is not None and front.side is not None:
            self._open[front.side] -= 1
            if front.side is To.OLD:
                one.open_old -= 1
            else:
                one.open_new -= 1
            self.visitors.changed(one)
        self.bytes_up += front.up
        self.bytes_down += front.down

    def _account(self, front: "_Front", now: float) -> None:
        if (one := front.visitor) is not None:
            one.bytes_up += front.up - front.up_saved
            one.bytes_down += front.down - front.down_saved
            front.up_saved, front.down_saved = front.up, front.down
            one.last_seen = now
            self.visitors.changed(one)

    async def _save_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            try:
                await self._save()
            except Exception as problem:  # a full disk must not end the forwarding
                log.error("relay_visitors_unsaved", problem=str(problem))

    async def _save(self) -> None:
        now = time.time()
        for front in self.active:
            self._account(front, now)
        self.active.clear()
        rows, watch = self.visitors.save_later(now)
        try:
            await asyncio.to_thread(self.visitors.save, rows, watch)
        except Exception:
            for row in rows:
                if (one := self.visitors.by_client.get(row[0])) is not None:
                    self.visitors.changed(one)
            raise

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Front(asyncio.Protocol):
    """A client's connection, and what joins it to a side."""

    __slots__ = (
        "_eof",
        "_first",
        "_gone",
        "_relay",
        "_timer",
        "back",
        "client",
        "down",
        "down_at",
        "down_saved",
        "leaving",
        "opened_at",
        "side",
        "transport",
        "up",
        "up_saved",
        "visitor",
    )

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self.transport: asyncio.Transport
        self.back: asyncio.Transport | None = None
        self.side: To | None = None  # once it is forwarded, until it ends
        self.client = ""
        self.visitor: Visitor | None = None
        self.leaving = False
        self.opened_at = time.monotonic()
        self.up = self.down = self.up_saved = self.down_saved = 0
        self.down_at = 0.0
        self._first: bytearray | None = bytearray()  # None once the client is known
        self._eof = 0  # ends that have said their last word
        self._gone = False
        self._timer: asyncio.TimerHandle | None = None

    # --- from the client ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        relay = self._relay
        relay.accepted += 1
        if len(relay.fronts) >= relay.connections_max:
            relay.refused += 1
            self._gone = True
            self.transport.abort()
            return
        relay.fronts.add(self)
        _prepare(self.transport)
        self._timer = asyncio.get_running_loop().call_later(FIRST_WITHIN_S, self._says_nothing)

    def data_received(self, data: bytes) -> None:
        if self.back is not None:
            self.up += len(data)
            self._relay.active.add(self)
            self.back.write(data)
        elif self._first is not None:
            self._first += data
            if (seen := peek(bytes(self._first))) is not None:
                self._known(seen)

    def eof_received(self) -> bool:
        if self._first is not None or self.back is None:
            return False  # it went before it was forwarded
        self._half_closed(self.back)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
        back, self.back = self.back, None
        if back is not None:
            back.close()  # what the client had sent is still delivered
        self._relay.ended(self)
        self.side = None

    def pause_writing(self) -> None:
        if self.back is not None:
            self.back.pause_reading()

    def resume_writing(self) -> None:
        if self.back is not None:
            self.back.resume_reading()

    # --- to a side ---

    def _says_nothing(self) -> None:
        self._relay.unnamed += 1
        self.end()

    def _known(self, seen: Peek) -> None:
        assert self._first is not None and self._timer is not None
        self._timer.cancel()
        first, self._first = bytes(self._first), None
        peer = self.transport.get_extra_info("peername") or ("", 0)
        self.client = client_of(seen, str(peer[0]))
        self.visitor = self._relay.visitors.came(self.client, str(peer[0]), seen.protocol, time.time())
        self.transport.pause_reading()
        self._relay.spawn(self._join(first))

    async def _join(self, first: bytes) -> None:
        try:
            await self._join_side(first)
        except Exception:
            log.exception("relay_connection_failed", client=self.client)
            self.end()

    async def _join_side(self, first: bytes) -> None:
        """Connect to the side that the table names, and go on."""
        relay = self._relay
        while True:
            router = relay.router
            side = router.side(self.client)
            back = await self._connect(side)
            if back is None and side is To.NEW and relay.routes.when_new_down is WhenNewDown.OLD:
                side = To.OLD
                back = await self._connect(side)
                relay.fell_back += back is not None
            # What was decided while the connection was being made holds for it too.
            if relay.router is router or self._gone:
                break
            if back is not None:
                back.transport.abort()
        if back is None or self._gone or back.lost:
            if back is not None:
                back.transport.abort()
            self.end()
            return
        self.back, self.side = back.transport, side
        relay.forwarded(self, side)
        source = self.transport.get_extra_info("peername") or ("", 0)
        target = self.transport.get_extra_info("sockname") or ("", 0)
        header = proxy_header(relay.proxy[side], source[:2], target[:2])
        self.up += len(first)
        relay.active.add(self)
        self.back.write(header + first)
        self.back.resume_reading()
        if not back.paused:
            self.transport.resume_reading()

    async def _connect(self, side: To) -> "_Back | None":
        relay, loop = self._relay, asyncio.get_running_loop()
        host, port = relay.sides[side]
        deadline = loop.time() + CONNECT_WITHIN_S
        while not self._gone:
            try:
                async with asyncio.timeout_at(deadline):
                    _, back = await loop.create_connection(lambda: _Back(self), host, port)
                return back
            except OSError:  # a TimeoutError is one
                if loop.time() + RETRY_S >= deadline:
                    break
                await asyncio.sleep(RETRY_S)
        relay.failed[side] += 1
        return None

    def _half_closed(self, other: asyncio.Transport) -> None:
        """One end has said its last word: pass it on. The other one may go on, for a while."""
        self._eof += 1
        if self._eof == 2:
            self.transport.close()
            return
        if other.can_write_eof():
            other.write_eof()
        self._timer = asyncio.get_running_loop().call_later(HALF_OPEN_S, self.end)

    def from_back(self, data: bytes) -> None:
        self.down += len(data)
        self.down_at = time.monotonic()
        self._relay.active.add(self)
        if not self._gone:
            self.transport.write(data)

    def back_lost(self, back: asyncio.Transport) -> None:
        if self.back is back and not self._gone:
            self.transport.close()

    def back_paused(self, paused: bool) -> None:
        if self.back is None or self._gone or self.leaving:
            return
        if paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    # --- letting go ---

    async def quieten(self) -> None:
        """Take nothing more from the client, and wait until the backend has acknowledged what it got: what is
        acknowledged is not sent again to the other side."""
        if not self._gone:
            self.transport.pause_reading()
        loop = asyncio.get_running_loop()
        quiet_from, deadline = loop.time(), loop.time() + QUIET_WITHIN_S
        while not self._gone and (now := loop.time()) < deadline:
            left = max(quiet_from, self.down_at) + QUIET_S - now
            if left <= 0:
                return
            await asyncio.sleep(left)

    def stay(self) -> None:
        """It is not let go after all."""
        self.leaving = False
        if not self._gone and self.back is not None:
            self.transport.resume_reading()

    def let_go(self) -> None:
        """End it so that the client gets all that was said to it: a FIN behind the last byte, no RST.

        What the client sends meanwhile was never acknowledged; it is read and dropped.
        """
        if self._gone or self.back is None:
            return
        back, self.back = self.back, None
        back.close()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.transport.abort)
        self._relay.ended(self)
        self.side = None

    def end(self) -> None:
        if not self._gone:
            self.transport.abort()
        if self.back is not None:
            self.back.abort()


class _Back(asyncio.Protocol):
    """The connection to a side on behalf of a client."""

    __slots__ = ("_front", "lost", "paused", "transport")

    def __init__(self, front: _Front) -> None:
        self._front = front
        self.transport: asyncio.Transport
        self.lost = self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        _prepare(self.transport)
        # Until it is decided that this side it is, nothing of it may reach the client.
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._front.from_back(data)

    def eof_received(self) -> bool:
        front = self._front
        if front.back is not self.transport:
            return False
        front._half_closed(front.transport)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._front.back_lost(self.transport)

    def pause_writing(self) -> None:
        self.paused = True
        self._front.back_paused(True)

    def resume_writing(self) -> None:
        self.paused = False
        self._front.back_paused(False)


def _prepare(transport: asyncio.Transport) -> None:
    transport.set_write_buffer_limits(high=BUFFER_BYTES)
    raw = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A peer that is gone without a word is noticed after some four minutes.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
