"""Presence: which device is connected, since when, and why it left.

NATS Server tells of connections as events, which no crash and no interruption replays. So what is stored is
compared with the server's own list at the start, after every interruption, and once a minute.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import asyncpg
import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from fleetlift.backend.context import Context
from fleetlift.backend.follow import until_stopped
from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.errors import Unavailable
from fleetlift.core.presence import Connection, Connections, DevicePresence
from fleetlift.log import get_logger
from fleetlift.store import presence as store
from fleetlift.store.devices import REVOKED_CHANNEL
from fleetlift.store.pool import CONNECT_ERRORS, sole_owner

log = get_logger(__name__)

SAVE_EVERY_S = 0.1
RECONCILE_EVERY_S = 60.0
LIST_PAGE = 1024
ANSWER_WITHIN_S = 2.0
CUT_OFF_AT_ONCE = 16  # each request is a subscription, and a connection has few (see the embedded server)
KICK_AGAIN_S = 2.0

_RETRYABLE = (*CONNECT_ERRORS, Unavailable, NatsError, asyncpg.PostgresError, asyncpg.InterfaceError)


class _Server(msgspec.Struct):
    id: str


class _Client(msgspec.Struct):
    id: int
    start: datetime | None = None
    user: str = ""
    host: str = ""
    client_type: str = ""


class _Event(msgspec.Struct):
    server: _Server
    client: _Client
    timestamp: datetime | None = None
    reason: str = ""


class _Row(msgspec.Struct):
    cid: int
    type: str = ""
    ip: str = ""
    start: datetime | None = None
    authorized_user: str = ""


class _List(msgspec.Struct):
    num_connections: int = 0
    total: int = 0
    offset: int = 0
    connections: list[_Row] | None = None


class _Answer(msgspec.Struct):
    server: _Server
    data: _List | None = None


async def run(ctx: Context) -> None:
    """Keep presence until `ctx.stop` is set; one process at a time does.

    It also cuts off devices whose credentials were taken back.
    """
    await until_stopped(ctx, _keep_for_ever(ctx))


async def kick(ctx: Context, device: str) -> int:
    """Close every connection of a device; returns how many. It may come back if its credential still holds.

    Raises Unavailable when no server answers.
    """
    kicked = 0
    async for server, row in _list(ctx, device):
        payload = msgspec.json.encode({"cid": row.cid})
        try:
            await ctx.sys_nc.request(f"$SYS.REQ.SERVER.{server}.KICK", payload, timeout=ANSWER_WITHIN_S)
        except NatsError as problem:
            raise Unavailable(f"NATS did not close the connection of {device} ({problem})") from problem
        kicked += 1
    return kicked


async def _keep_for_ever(ctx: Context) -> None:
    while True:
        try:
            async with sole_owner(ctx.settings.database_url, "presence") as ownership:
                await _Keeper(ctx).work(ownership)
        except* _RETRYABLE as problems:
            first: BaseException = problems
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            log.warning("presence_interrupted", problem=f"{type(first).__name__}: {first}")
        raise_if_cancelled()
        if ctx.sys_nc.is_closed:
            # It comes back by itself after everything but a refusal; a process that starts anew has another.
            raise Unavailable("NATS has closed the connection of the system account for good")
        await asyncio.sleep(0.5)


class _Keeper:
    """One term of keeping presence; a new term begins with what is stored and the servers' lists."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._known = Connections()
        self._silent: set[str] = set()  # servers that did not answer the last time they were asked
        self._reconcile_now = asyncio.Event()
        self._decode_event = msgspec.json.Decoder(_Event)
        self._cutting = asyncio.Semaphore(CUT_OFF_AT_ONCE)

    async def work(self, ownership: "asyncpg.Connection[Any]") -> None:
        async with self._ctx.pool.acquire() as conn:
            stored = await store.connected(conn)
        self._known = Connections(
            {
                p.device: DevicePresence(
                    device=p.device,
                    connected=True,
                    since=p.since,
                    server=p.server_id,
                    cid=p.cid,
                    remote=p.remote,
                )
                for p in stored.values()
            }
        )
        account, sys_nc = self._ctx.settings.nats_device_account, self._ctx.sys_nc
        subscriptions = [
            await sys_nc.subscribe(f"$SYS.ACCOUNT.{account}.CONNECT", cb=self._on_connect),
            await sys_nc.subscribe(f"$SYS.ACCOUNT.{account}.DISCONNECT", cb=self._on_disconnect),
        ]
        await sys_nc.flush(5)
        # Credentials that are taken back must cut off who is connected by them: told by the registry.
        await ownership.add_listener(REVOKED_CHANNEL, self._on_revoked)
        self._reconcile_now.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                tasks.create_task(self._save_for_ever(ownership), name="presence-save")
                tasks.create_task(self._reconcile_for_ever(), name="presence-reconcile")
        finally:
            for subscription in subscriptions:
                with contextlib.suppress(NatsError):
                    await subscription.unsubscribe()

    async def _on_connect(self, message: Msg) -> None:
        event = self._decoded(message)
        if event is None or not event.client.client_type.startswith("mqtt") or not event.client.user:
            return
        at = _seconds(event.client.start or event.timestamp)
        self._known.opened(
            Connection(
                server=event.server.id,
                cid=event.client.id,
                device=event.client.user,
                since=at,
                remote=event.client.host,
            )
        )

    async def _on_disconnect(self, message: Msg) -> None:
        event = self._decoded(message)
        if event is not None:
            self._known.closed(event.server.id, event.client.id, _seconds(event.timestamp), event.reason)

    def _decoded(self, message: Msg) -> _Event | None:
        try:
            return self._decode_event.decode(message.data)
        except msgspec.MsgspecError as problem:
            log.error("presence_event_unreadable", problem=str(problem))
            return None

    def _on_revoked(self, _conn: object, _pid: int, _channel: str, payload: object) -> None:
        try:
            devices = msgspec.json.decode(str(payload), type=list[str])
        except msgspec.MsgspecError:
            return
        for device in devices:
            self._tasks.create_task(self._cut_off(device), name=f"cut-off-{device}")

    async def _cut_off(self, device: str) -> None:
        # Twice: a sign-in that was being answered when the credential went may finish just after the first.
        for pause_s in (0.0, KICK_AGAIN_S):
            await asyncio.sleep(pause_s)
            try:
                async with self._cutting:
                    kicked = await kick(self._ctx, device)
                if kicked:
                    log.info("device_cut_off", device=device, connections=kicked)
            except Unavailable as problem:
                log.warning("device_not_cut_off", device=device, problem=str(problem))

    async def _save_for_ever(self, ownership: "asyncpg.Connection[Any]") -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            if ownership.is_closed():
                raise Unavailable("the connection that owns presence was lost")
            presence, changes = self._known.take_changes()
            if not presence and not changes:
                continue
            async with self._ctx.pool.acquire() as conn, conn.transaction():
                await store.save(
                    conn,
                    {
                        device: store.Presence(
                            device=device,
                            connected=p.connected,
                            since=p.since,
                            reason=p.reason,
                            server_id=p.server,
                            cid=p.cid,
                            remote=p.remote,
                        )
                        for device, p in presence.items()
                    },
                    [
                        store.PresenceEvent(device=c.device, connected=c.connected, at=c.at, reason=c.reason)
                        for c in changes
                    ],
                )

    async def _reconcile_for_ever(self) -> None:
        reconnects = self._ctx.sys_nc.stats["reconnects"]
        due = 0.0
        while True:
            now = time.monotonic()
            if self._ctx.sys_nc.stats["reconnects"] != reconnects or self._silent:
                reconnects, due = self._ctx.sys_nc.stats["reconnects"], 0.0
            if now >= due and self._ctx.sys_nc.is_connected:
                try:
                    await self._reconcile()
                    due = now + RECONCILE_EVERY_S
                except Unavailable as problem:
                    log.warning("presence_not_reconciled", problem=str(problem))
            await asyncio.sleep(1.0)

    async def _reconcile(self) -> None:
        before = self._known.keys()
        listed: dict[str, list[Connection]] = {}
        async for server, row in _list(self._ctx):
            connections = listed.setdefault(server, [])
            if row is not _NO_ROW:
                connections.append(
                    Connection(
                        server=server,
                        cid=row.cid,
                        device=row.authorized_user,
                        since=_seconds(row.start),
                        remote=row.ip,
                    )
                )
        now = time.time()
        for server, connections in listed.items():
            self._known.reconcile(server, connections, before, now)
        # A server that is silent twice is gone; one missed answer may be a busy moment.
        absent = self._known.servers() - listed.keys()
        for server in absent & self._silent:
            self._known.lost_server(server, now)
        self._silent = set(absent - self._silent)


_NO_ROW = _Row(cid=0)


async def _list(ctx: Context, device: str | None = None) -> AsyncIterator[tuple[str, _Row]]:
    """(server, connection) of all devices, or one, by every server that answers.

    Without `device`, a server's answer begins with `_NO_ROW`, so that one without connections is seen too.
    Raises Unavailable when no server answers.
    """
    nc, offset, more, answered = ctx.sys_nc, 0, True, False
    while more:
        more = False
        query: dict[str, Any] = {
            "acc": ctx.settings.nats_device_account,
            "auth": True,
            "limit": LIST_PAGE,
            "offset": offset,
        }
        if device is not None:
            query["user"] = device
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(inbox)
        try:
            await nc.publish("$SYS.REQ.SERVER.PING.CONNZ", msgspec.json.encode(query), reply=inbox)
            wait_s = ANSWER_WITHIN_S
            while True:
                try:
                    message = await subscription.next_msg(timeout=wait_s)
                except (NatsError, TimeoutError):
                    break
                wait_s = 0.3  # the others answer at about the same time
                answer = msgspec.json.decode(message.data, type=_Answer)
                if answer.data is None:
                    continue
                answered = True
                if device is None and offset == 0:
                    yield answer.server.id, _NO_ROW
                for row in answer.data.connections or ():
                    if row.type.startswith("mqtt") and row.authorized_user:
                        yield answer.server.id, row
                more = more or offset + len(answer.data.connections or ()) < answer.data.total
        except NatsError as problem:
            raise Unavailable(f"NATS does not list its connections ({problem})") from problem
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()
        offset += LIST_PAGE
    if not answered:
        raise Unavailable("no NATS server lists its connections: is the system account reachable?")


def _seconds(when: datetime | None) -> float:
    return time.time() if when is None else when.timestamp()
