"""The legacy server: thousands of devices and their owner on one TCP port, everything in one SQLite file.

It is what many fleets run today, with the traits of its kind: telemetry is acknowledged once it is stored,
commands are handed out by a loop that polls its outbox every `dispatch_every_s`, one process serves all.
`docs/legacy-protocol.md` tells what goes over the wire.
"""

import asyncio
import csv
import fcntl
import io
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import msgspec

from fleetlift.core import legacy as wire
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound, Unavailable
from fleetlift.core.identity import checked_device_id
from fleetlift.log import get_logger
from fleetlift.sides.legacy import storage as store

log = get_logger(__name__)

SIGN_IN_BODY_BYTES = 8 * 1024  # of a frame from a peer that has not signed in
SIGN_IN_WITHIN_S = 10.0
UNREAD_FOR_S = 30.0  # a device that takes nothing for so long is cut off
OWNER_UNREAD_FOR_S = 300.0
IDLE_FEED_S = 1.0  # how often a feed that has nothing to tell says so
STOP_WITHIN_S = 2.0
GATHER_S = 0.002  # how long the first work of a transaction waits for others
LINK_PENDING_BYTES = 4 * 1024 * 1024  # received and not yet stored, of one connection
PENDING_BYTES = 64 * 1024 * 1024  # and of all
FORGET_EVERY_S = 600.0

T = TypeVar("T")
M = TypeVar("M")
Done = Callable[[object], None]


class DeviceSeed(msgspec.Struct, frozen=True):
    """A line of an inventory file."""

    device: str
    key: str
    attributes: dict[str, Any] = {}


class LegacyServer:
    """`async with LegacyServer(data_dir) as server:` serves until the block ends.

    `server.address` is (host, port) and `server.url` what LegacySide takes; `server.owner_key` lets an owner
    in. Everything acknowledged is in `data_dir`. Raises Conflict when another process serves from there.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        owner_key: str | None = None,
        dispatch_every_s: float = 0.2,
        heartbeat_s: int = 30,
        enroll: bool = False,
        keep_days: float | None = None,
        connections_max: int = 50_000,
    ) -> None:
        self.data_dir = data_dir
        self.heartbeat_s = heartbeat_s
        self.enroll = enroll
        self.owner_key = owner_key or ""
        self.address = (host, port)
        self.broken: asyncio.Future[None]  # done with the error when a part of the server has failed
        self._dispatch_every_s = dispatch_every_s
        self._keep_days = keep_days
        self._connections_max = connections_max
        self._links: set[_Link] = set()
        self._devices: dict[str, _Link] = {}  # the connection that each device is served by
        self._keys: dict[str, bytes] = {}
        self._touched: set[_Link] = set()  # have something stored by this commit
        self._holding: set[_Link] = set()  # are not read from until more is stored
        self._pending: list[tuple[store.Work, Done]] = []
        self._pending_bytes = 0
        self._has_work = asyncio.Event()
        self._no_links = asyncio.Event()  # set while stopping, once all are gone
        self._feeds: set[asyncio.Event] = set()  # set when something new is stored
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def url(self) -> str:
        return f"tcp://{self.address[0]}:{self.address[1]}"

    @property
    def connected(self) -> int:
        """How many devices are signed in."""
        return len(self._devices)

    @property
    def buffered_bytes(self) -> int:
        """What is held in memory: received and not yet stored, and written and not yet read by peers."""
        unread = sum(link.transport.get_write_buffer_size() for link in self._links if not link.closed)
        return self._pending_bytes + unread

    # ---- start and stop ------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.broken = self._loop.create_future()
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(self.data_dir)
        try:
            self.owner_key = self.owner_key or owner_key_in(self.data_dir)
            self._storage = store.Storage(self.data_dir / "legacy.sqlite")
            self._writer = ThreadPoolExecutor(1, "legacy-writer")
            self._reader = ThreadPoolExecutor(1, "legacy-reader")
            self._keys = await self._ask(self._storage.read_keys)
            self._spawn(self._commit_forever(), "commit")
            await self._do(partial(self._storage.sign_everyone_out, _now_ms(), "the server was started anew"))
            self._server = await self._loop.create_server(
                lambda: _Link(self), self.address[0], self.address[1], backlog=4096
            )
        except BaseException:
            os.close(self._lock)
            raise
        self.address = self._server.sockets[0].getsockname()[:2]
        (self.data_dir / "address").write_text(f"{self.address[0]}:{self.address[1]}\n")
        self._spawn(self._dispatch_forever(), "dispatch")
        self._spawn(self._sweep_forever(), "sweep")
        if self._keep_days is not None:
            self._spawn(self._forget_forever(self._keep_days), "forget")
        log.info("legacy_server_started", address=self.url, devices=len(self._keys))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._server.close()
        for link in self._links:
            link.hold("stopping")
        await self._settle()  # what has come is stored, and acknowledged
        for link in list(self._links):
            link.close("the server is stopping")
        if self._links:
            await _wait(self._no_links, STOP_WITHIN_S)
        for link in list(self._links):
            link.transport.abort()
        await asyncio.sleep(0)
        await self._settle()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._writer.shutdown()
        self._reader.shutdown()
        self._storage.close()
        if self.broken.done() and not self.broken.cancelled():
            self.broken.exception()
        os.close(self._lock)
        log.info("legacy_server_stopped")

    async def _settle(self) -> None:
        """Wait until all that was submitted is stored."""
        if not self.broken.done():
            await self._do(lambda: None)

    async def register(self, devices: Sequence[DeviceSeed]) -> None:
        """Create these devices, or replace their keys and attributes."""
        hashes = {seed.device: store.key_hash(store.checked_key(seed.key)) for seed in devices}
        for seed in devices:
            checked_device_id(seed.device)

        def register_all() -> None:
            for seed in devices:
                self._storage.register(seed.device, hashes[seed.device], msgspec.json.encode(seed.attributes))

        await self._do(register_all)
        self._keys.update(hashes)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"legacy-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("legacy_task_failed", task=task.get_name(), error=repr(exc))
            if not self.broken.done():
                self.broken.set_exception(exc)

    # ---- storing -------------------------------------------------------------------------------------

    def _submit(self, work: store.Work, done: Done) -> None:
        """Have `work` done in the next transaction, then `done` called with its result."""
        self._pending.append((work, done))
        self._has_work.set()

    async def _do(self, work: Callable[[], T]) -> T:
        """The result of `work` once it is stored. Raises the FleetError it ended in."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def done(result: object) -> None:
            if future.done():
                return
            if isinstance(result, FleetError):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._submit(work, done)
        result: T = await future
        return result

    async def _ask(self, read: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._reader, read)

    async def _commit_forever(self) -> None:
        while True:
            await self._has_work.wait()
            await asyncio.sleep(GATHER_S)
            self._has_work.clear()
            batch, self._pending = self._pending, []
            before = self._storage.last_position
            results = await self._loop.run_in_executor(
                self._writer, self._storage.apply, [work for work, _ in batch]
            )
            for (_, done), result in zip(batch, results, strict=True):
                done(result)
            if self._storage.last_position != before:
                for wake in self._feeds:
                    wake.set()
            touched, self._touched = self._touched | self._holding, set()
            for link in touched:
                link.after_commit()

    # ---- devices -------------------------------------------------------------------------------------

    def sign_in(self, link: "_Link", login: wire.Login) -> None:
        refusal = self._refusal(login)
        if refusal:
            log.warning("legacy_login_refused", device=login.device, remote=link.remote, reason=refusal)
            link.send(wire.LoginRefused(refusal))
            link.close("")
            return
        device = login.device
        if login.device not in self._keys:  # only with `enroll`: the first key that comes is the device's
            hashed = store.key_hash(login.key)
            self._keys[device] = hashed
            self._submit(partial(self._storage.register, device, hashed, b"{}"), _ignore)
        older = self._devices.get(device)
        self._devices[device] = link
        link.become_device(device)
        if older is not None:
            older.close("a newer connection signed in")
        reason = "signed in" if older is None else "signed in again"

        def done(result: object) -> None:
            if not isinstance(result, store.SignedIn):
                link.close("the server cannot store anything now; come back later")
                return
            link.session = result.session
            link.send(wire.LoginOk(_now_ms(), self.heartbeat_s))
            if result.config is not None:
                link.send(wire.Config(result.config.revision, result.config.document))

        self._submit(partial(self._storage.sign_in, device, login.firmware, _now_ms(), reason), done)

    def _refusal(self, login: wire.Login) -> str:
        """Why a device may not sign in; empty when it may."""
        held = self._keys.get(login.device)
        if held is not None:
            return "" if store.key_matches(login.key, held) else "the key is wrong"
        if not self.enroll:
            return "this device is not known: its owner must register it"
        try:
            checked_device_id(login.device)
            store.checked_key(login.key)
        except BadInput as exc:
            return wire.short(str(exc))
        return ""

    def take_telemetry(self, link: "_Link", messages: list[wire.Telemetry], at_ms: int) -> None:
        device = link.device
        rows: list[store.TelemetryRow] = []
        acks: list[wire.Ack] = []
        size = 0
        for message in messages:
            rows.append((device, at_ms, message.channel, message.seq, message.ts_ms, message.body))
            acks.append(wire.Ack(message.channel, message.seq))
            size += len(message.body) + 200
        self._pending_bytes += size
        link.pending_bytes += size

        def done(result: object) -> None:
            self._pending_bytes -= size
            link.pending_bytes -= size
            if isinstance(result, FleetError):
                link.close("the server cannot store anything now; come back later")
            else:
                link.acks += acks
                self._touched.add(link)

        self._submit(partial(self._storage.add_telemetry, rows), done)
        if link.pending_bytes > LINK_PENDING_BYTES or self._pending_bytes > PENDING_BYTES:
            self._hold(link)

    def take_reply(self, link: "_Link", reply: wire.CommandReply, at_ms: int) -> None:
        def done(result: object) -> None:
            if isinstance(result, FleetError):
                link.close("the server cannot store anything now; come back later")
            else:
                link.send(wire.CommandReplyAck(reply.id, reply.status))

        self._submit(partial(self._storage.add_answer, link.device, reply, at_ms), done)

    def take_report(self, link: "_Link", report: wire.ConfigReport, at_ms: int) -> None:
        def done(result: object) -> None:
            if isinstance(result, FleetError):
                log.warning("legacy_report_refused", device=link.device, reason=str(result))

        self._submit(partial(self._storage.add_report, link.device, report.document, at_ms), done)

    def _hold(self, link: "_Link") -> None:
        link.hold("pending")
        self._holding.add(link)

    def lost(self, link: "_Link", reason: str) -> None:
        """A connection has ended, for good."""
        self._links.discard(link)
        if self._stopping and not self._links:
            self._no_links.set()
        self._holding.discard(link)
        if link.device and self._devices.get(link.device) is link:
            del self._devices[link.device]
            self._submit(partial(self._storage.sign_out, link.device, _now_ms(), wire.short(reason)), _ignore)

    def found(self, link: "_Link") -> bool:
        """A connection was made; False when it is one too many."""
        if self._stopping or len(self._links) >= self._connections_max:
            return False
        self._links.add(link)
        return True

    def may_read_on(self, link: "_Link") -> bool:
        """Whether there is room again for what a held connection sends."""
        room = link.pending_bytes < LINK_PENDING_BYTES // 2 and self._pending_bytes < PENDING_BYTES // 2
        if room:
            self._holding.discard(link)
        return room

    async def _dispatch_forever(self) -> None:
        while True:
            await asyncio.sleep(self._dispatch_every_s)
            try:
                await self._dispatch(_now_ms())
            except (Unavailable, sqlite3.Error) as exc:
                log.error("legacy_dispatch_failed", error=str(exc))

    async def _dispatch(self, now_ms: int) -> None:
        due, late = await self._ask(partial(self._storage.read_due, now_ms))
        sent = [entry for entry in due if self._hand_out(entry)]
        if sent:
            await self._do(partial(self._storage.mark_sent, sent))
        if late:
            await self._do(partial(self._storage.expire, now_ms))

    def _hand_out(self, due: store.DueCommand) -> bool:
        link = self._devices.get(due.device)
        if link is None or link.session != due.session or link.blocked:
            return False
        link.send(due.command)
        return True

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self.heartbeat_s / 3))
            now = self._loop.time()
            for link in list(self._links):
                if why := link.overdue(now):
                    link.cut(why)

    async def _forget_forever(self, keep_days: float) -> None:
        while True:
            before_ms = _now_ms() - int(keep_days * 86_400_000)
            try:
                gone = store.FORGET_ROWS
                while gone >= store.FORGET_ROWS:
                    gone = await self._do(partial(self._storage.forget, before_ms))
                    await asyncio.sleep(0.05)  # devices' messages go first
            except Unavailable as exc:
                log.error("legacy_forgetting_failed", error=str(exc))
            await asyncio.sleep(FORGET_EVERY_S)

    # ---- the owner -----------------------------------------------------------------------------------

    def sign_in_owner(self, link: "_Link", login: wire.OwnerLogin) -> None:
        if secrets.compare_digest(login.key.encode(), self.owner_key.encode()):
            link.become_owner()
            link.send(wire.OwnerOk(_now_ms()))
            return
        log.warning("legacy_owner_refused", remote=link.remote)
        link.send(wire.LoginRefused("the owner's key is wrong"))
        link.close("")

    def take_request(self, link: "_Link", message: wire.Message) -> None:
        match message:
            case wire.SetConfig():
                self._set_config(link, message)
            case wire.SendCommand():
                self._answer_later(
                    link, message.request, partial(self._storage.add_command, message, _now_ms())
                )
            case wire.RegisterDevice():
                self._register(link, message)
            case wire.ListDevices():
                self._read(link, message.request, self._reply(link, self._storage.read_devices, message))
            case wire.ListReports():
                self._read(link, message.request, self._reply(link, self._storage.read_reports, message))
            case wire.FeedFrom():
                self._read(link, message.request, self._feed(link, message.request, message.after))
            case wire.Heartbeat():
                link.send(wire.HeartbeatAck())
            case wire.Bye():
                link.close("")
            case _:
                link.cut(f"an owner does not send {type(message).__name__}")

    def _answer_later(
        self, link: "_Link", request: int, work: store.Work, then: Callable[[Any], None] | None = None
    ) -> None:
        """OK or ERROR to a request once its work is stored."""
        size = 1000
        link.pending_bytes += size

        def done(result: object) -> None:
            link.pending_bytes -= size
            if isinstance(result, FleetError):
                link.send(wire.Error(request, _code(result), str(result)))
                return
            if then is not None:
                then(result)
            link.send(wire.Ok(request))

        self._submit(work, done)
        if link.pending_bytes > LINK_PENDING_BYTES:
            self._hold(link)

    def _set_config(self, link: "_Link", asked: wire.SetConfig) -> None:
        def push(held: store.HeldConfig) -> None:
            device = self._devices.get(asked.device)
            # A device whose sign-in is not yet stored gets the configuration with its LOGIN_OK.
            if held.changed and device is not None and device.session:
                device.send(wire.Config(held.revision, held.document))

        self._answer_later(
            link, asked.request, partial(self._storage.set_config, asked.device, asked.document), push
        )

    def _register(self, link: "_Link", asked: wire.RegisterDevice) -> None:
        try:
            hashed = store.key_hash(store.checked_key(asked.key)) if asked.key else None
        except BadInput as exc:
            link.send(wire.Error(asked.request, wire.ErrorCode.BAD_REQUEST, str(exc)))
            return

        def known(_: object) -> None:
            if hashed is not None:
                self._keys[asked.device] = hashed

        work = partial(self._storage.register, asked.device, hashed, asked.attributes)
        self._answer_later(link, asked.request, work, known)

    def _read(self, link: "_Link", request: int, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except sqlite3.Error as exc:
                log.error("legacy_read_failed", error=str(exc))
                link.send(wire.Error(request, wire.ErrorCode.UNAVAILABLE, f"could not read: {exc}"))

        self._spawn(guarded(), "read")

    async def _reply(self, link: "_Link", read: Callable[[M], wire.Message], asked: M) -> None:
        link.send(await self._ask(partial(read, asked)))

    async def _feed(self, link: "_Link", request: int, after: int) -> None:
        last = self._storage.last_position
        if after == wire.FEED_FROM_NOW:
            after = last
            link.send(wire.FeedBatch(request, after))
        if after > last:
            why = f"the feed ends at {last}, so {after} is of another data directory: start again from 0"
            link.send(wire.Error(request, wire.ErrorCode.POSITION_GONE, why))
            return
        wake = asyncio.Event()
        self._feeds.add(wake)
        try:
            while not link.closed:
                wake.clear()
                try:
                    frame, after = await self._ask(partial(self._storage.read_feed, request, after))
                except store.Forgotten as gone:
                    left = gone.first - 1
                    why = f"what followed {after} is no longer kept: start again from {left}, or from 0"
                    link.send(wire.Error(request, wire.ErrorCode.POSITION_GONE, why))
                    return
                link.write(frame or wire.encode(wire.FeedBatch(request, after)))
                # Not read by the owner: nothing more is fetched until it is.
                if not await link.writable(OWNER_UNREAD_FOR_S):
                    link.cut("the feed was not read")
                if not frame:
                    await _wait(wake, IDLE_FEED_S)
        finally:
            self._feeds.discard(wake)


class _Link(asyncio.Protocol):
    """One connection: bytes in, messages to the server; its bounds and the reasons to stop reading."""

    transport: asyncio.Transport

    def __init__(self, server: LegacyServer) -> None:
        self.device = ""  # its id, once it has signed in
        self.session = 0  # 0: the sign-in is not yet stored
        self.remote = ""
        self.pending_bytes = 0  # received and not yet stored
        self.acks: list[wire.Ack] = []  # stored, to be told with the end of this commit
        self.closed = False
        self._server = server
        self._owner = False
        self._decoder = wire.Decoder(max_body_bytes=SIGN_IN_BODY_BYTES)
        self._why = ""
        self._held: set[str] = set()  # the reasons why nothing is read now
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._blocked_at: float | None = None
        self._heard_at = 0.0

    # ---- asyncio's calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass of it
        self._heard_at = asyncio.get_running_loop().time()
        self.remote = str(transport.get_extra_info("peername"))
        raw = self.transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.set_write_buffer_limits(high=512 * 1024)
        if not self._server.found(self):
            log.warning("legacy_connection_refused", remote=self.remote)
            self.closed = True
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        self._heard_at = asyncio.get_running_loop().time()
        fault: wire.BadFrame | None = None
        try:
            messages: Sequence[wire.Message] = self._decoder.feed(data)
        except wire.BadFrame as exc:
            messages, fault = exc.before, exc
        self._take(messages)
        if fault is not None:
            log.warning(
                "legacy_frame_refused", remote=self.remote, device=self.device, fault=fault.fault.value
            )
            self.close(f"bad frame: {fault}")

    def pause_writing(self) -> None:
        self._can_write.clear()
        self._blocked_at = asyncio.get_running_loop().time()
        self.hold("writing")  # who does not take answers is not asked for more work

    def resume_writing(self) -> None:
        self._can_write.set()
        self._blocked_at = None
        self._release("writing")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._can_write.set()
        self._server.lost(self, self._why or ("connection lost" if exc else "connection closed"))

    # ---- the server's calls --------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        return self._blocked_at is not None

    def become_device(self, device: str) -> None:
        self.device = device
        self._decoder.max_body_bytes = wire.MAX_BODY_BYTES

    def become_owner(self) -> None:
        self._owner = True
        self._decoder.max_body_bytes = wire.MAX_BODY_BYTES

    def send(self, message: wire.Message) -> None:
        self.write(wire.encode(message))

    def write(self, frame: bytes) -> None:
        if not self.closed:
            self.transport.write(frame)

    async def writable(self, within_s: float) -> bool:
        """Wait until the peer has taken what was written; False when it has not in time."""
        return self._can_write.is_set() or await _wait(self._can_write, within_s)

    def close(self, reason: str) -> None:
        """Say why (when there is something to say), and close once that is written."""
        if self.closed:
            return
        if reason:
            self.send(wire.Bye(wire.short(reason)))
            self._why = self._why or reason
        self.closed = True
        if self.blocked:
            self.transport.abort()  # it reads nothing, so it would never end
        else:
            self.transport.close()

    def cut(self, reason: str) -> None:
        log.info("legacy_connection_cut", remote=self.remote, device=self.device, reason=reason)
        self.close(reason)

    def hold(self, why: str) -> None:
        if not self._held and not self.closed:
            self.transport.pause_reading()
        self._held.add(why)

    def _release(self, why: str) -> None:
        if why in self._held:
            self._held.discard(why)
            if not self._held and not self.closed:
                self.transport.resume_reading()

    def after_commit(self) -> None:
        """Tell what was stored, and read on when there is room again."""
        if self.acks:
            acks, self.acks = self.acks, []
            for at in range(0, len(acks), wire.MAX_ACKS):
                self.send(wire.TelemetryAck(tuple(acks[at : at + wire.MAX_ACKS])))
        if "pending" in self._held and self._server.may_read_on(self):
            self._release("pending")

    def overdue(self, now: float) -> str:
        """Why this connection should not go on; empty when it may."""
        if self.closed:
            self.transport.abort()  # said good-bye at the last round, and still there
            return ""
        if self._blocked_at is not None and not self._owner and now - self._blocked_at > UNREAD_FOR_S:
            return "what was sent was not read"
        silent_s = now - self._heard_at
        if self.device and not self._held and silent_s > 2.5 * self._server.heartbeat_s:
            return f"silent for {silent_s:.0f} s"
        if not self.device and not self._owner and silent_s > SIGN_IN_WITHIN_S:
            return "did not sign in"
        return ""

    # ---- messages ------------------------------------------------------------------------------------

    def _take(self, messages: Sequence[wire.Message]) -> None:
        at_ms = _now_ms()
        telemetry: list[wire.Telemetry] = []
        for message in messages:
            if type(message) is wire.Telemetry and self.device:
                if len(message.body) > wire.MAX_TELEMETRY_BYTES:
                    self.cut(f"a telemetry body of more than {wire.MAX_TELEMETRY_BYTES} bytes")
                    break
                telemetry.append(message)
                continue
            if telemetry:  # the feed keeps the order in which things came
                self._server.take_telemetry(self, telemetry, at_ms)
                telemetry = []
            if self.device:
                self._take_from_device(message, at_ms)
            elif self._owner:
                self._server.take_request(self, message)
            elif isinstance(message, wire.Login):
                self._server.sign_in(self, message)
            elif isinstance(message, wire.OwnerLogin):
                self._server.sign_in_owner(self, message)
            else:
                self.cut("sign in first")
            if self.closed:
                return
        if telemetry:
            self._server.take_telemetry(self, telemetry, at_ms)

    def _take_from_device(self, message: wire.Message, at_ms: int) -> None:
        match message:
            case wire.CommandReply() if len(message.detail) <= wire.MAX_DOCUMENT_BYTES:
                self._server.take_reply(self, message, at_ms)
            case wire.ConfigReport() if len(message.document) <= wire.MAX_DOCUMENT_BYTES:
                self._server.take_report(self, message, at_ms)
            case wire.Heartbeat():
                self.send(wire.HeartbeatAck())
            case wire.Bye():
                self._why = f"said good-bye: {message.reason}" if message.reason else "said good-bye"
                self.close("")
            case _:
                self.cut(f"a device does not send such a {type(message).__name__}")


def owner_key_in(data_dir: Path) -> str:
    """The owner's key of a data directory, made at the first call: mode 0600, never on a command line."""
    path = data_dir / "owner.key"
    if not path.exists():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    return path.read_text().strip()


def read_inventory(path: Path) -> list[DeviceSeed]:
    """Devices of a file: JSON lines `{"device", "key", "attributes"}`, or CSV with a header.

    In CSV every column but `device` and `key` is an attribute; numbers, true and false are taken as such.
    Raises BadInput that names the line.
    """
    try:
        text = path.read_text()
    except OSError as exc:
        raise BadInput(f"{path}: {exc.strerror}") from exc
    seeds: list[DeviceSeed] = []
    if path.suffix == ".csv":
        for line, row in enumerate(csv.DictReader(io.StringIO(text)), start=2):
            device, key = row.pop("device", None), row.pop("key", None)
            if not device or not key:
                raise BadInput(f"{path}:{line}: the columns `device` and `key` must be filled")
            attributes = {name: _plain(value) for name, value in row.items() if name and value}
            seeds.append(DeviceSeed(device, key, attributes))
    else:
        for line, entry in enumerate(text.splitlines(), start=1):
            if not entry.strip():
                continue
            try:
                seeds.append(msgspec.json.decode(entry, type=DeviceSeed))
            except msgspec.DecodeError as exc:
                raise BadInput(f"{path}:{line}: {exc}") from exc
    for line, seed in enumerate(seeds, start=1):
        try:
            checked_device_id(seed.device)
            store.checked_key(seed.key)
        except BadInput as exc:
            raise BadInput(f"{path}, device {line} ({seed.device}): {exc}") from exc
    return seeds


def _plain(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if isinstance(value, int | float | bool) else text


def _lock(data_dir: Path) -> int:
    """Hold the data directory for this process. Raises Conflict when another one does."""
    fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        raise Conflict(
            f"another legacy server runs from {data_dir}: stop it, or give another --data"
        ) from exc
    return fd


_CODES: tuple[tuple[type[FleetError], wire.ErrorCode], ...] = (
    (NotFound, wire.ErrorCode.UNKNOWN_DEVICE),
    (Conflict, wire.ErrorCode.OLDER_EPOCH),
    (Unavailable, wire.ErrorCode.UNAVAILABLE),
)


def _code(error: FleetError) -> wire.ErrorCode:
    return next((code for of, code in _CODES if isinstance(error, of)), wire.ErrorCode.BAD_REQUEST)


async def _wait(event: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _ignore(_: object) -> None:
    pass
