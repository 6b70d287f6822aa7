"""Playing a capture against a side: devices by identities of the replay, in order, each message counted.

The model is open: a message is due at its own time, whether or not earlier ones have been acknowledged; only
when more are waiting than memory may hold does the reading wait, and says so. By device they go in the order
of the capture, `window` in flight; after a broken connection those not acknowledged are sent again first.
The position on disk is where everything before has ended: a killed replay repeats a little and skips nothing.
"""

import asyncio
import contextlib
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
from hdrh.histogram import HdrHistogram

from fleetlift.config import write_private
from fleetlift.core import mqtt
from fleetlift.core.capture import CapturedMessage
from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, Unavailable
from fleetlift.core.identity import REPLAY, is_replay_id, is_replay_tenant
from fleetlift.core.replay import LeftOut, Publish, SendCommand, Tally, checked_names, play, replay_id
from fleetlift.load.capture_file import read_capture, read_manifest
from fleetlift.log import get_logger

log = get_logger(__name__)

WINDOW = 32
WAITING_MAX = 100_000  # messages read and not ended
WAITING_BYTES_MAX = 128 * 1024 * 1024
SIGN_INS_AT_ONCE = 50
COMMANDS_AT_ONCE = 32
GIVE_UP_S = 60.0  # without a connection, or an acknowledgement on one
CONNECT_WITHIN_S = 10.0
ACKED_WITHIN_S = 20.0  # then a connection is made anew
KEEP_ALIVE_S = 120
SAVE_EVERY_S = 1.0
TICK_S = 0.002
YIELD_EVERY_S = 0.005
_BACKOFF_S, _BACKOFF_S_MAX = 0.2, 5.0
_REFUSED_FOR_GOOD = frozenset(
    {
        mqtt.ConnectCode.BAD_PROTOCOL,
        mqtt.ConnectCode.BAD_CLIENT_ID,
        mqtt.ConnectCode.BAD_CREDENTIALS,
        mqtt.ConnectCode.NOT_AUTHORIZED,
    }
)
LOSSES_ONE_BY_ONE, LOSSES_MAX = 3, 6  # connections lost in a row, without an acknowledgement
SIGN_IN_TRIES = 5  # a side that has just started refuses those it will let in soon


class Api(msgspec.Struct, frozen=True):
    """A Fleetlift API: it says whose the identities are, makes them, and takes their commands."""

    url: str
    token: str
    ca: str = ""

    def __repr__(self) -> str:
        return f"Api({self.url})"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`speed` 0: as fast as the side acknowledges. `api` None with `unchecked`: a side without a registry.

    `credentials`: password by identity; `names`: identity by recorded device, others by their `replay-` name.
    """

    capture: Path
    host: str
    port: int
    state: Path
    tls: bool = False
    ca: str = ""
    speed: float = 1.0
    names: Mapping[str, str] = {}
    credentials: Mapping[str, str] = {}
    api: Api | None = None
    unchecked: bool = False
    provision: bool = False
    tenant: str = REPLAY
    window: int = WINDOW
    give_up_s: float = GIVE_UP_S
    again: bool = False  # from the beginning, whatever the position says

    def __repr__(self) -> str:
        return f"Options(capture={self.capture}, to={self.host}:{self.port}, speed={self.speed})"


class Position(msgspec.Struct, kw_only=True):
    """`done`: so many messages of the capture have ended, those before all of them."""

    capture: str
    to: str
    done: int
    tally: Tally


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies are from the time at which a message was due; `held_s`: how long reading waited for room."""

    capture: str
    to: str
    finished: bool
    reason: str
    total: int
    played: int
    acknowledged: int
    refused: int
    failed: int
    left_out: int
    open: int
    again: int
    reasons: dict[str, int]
    took_s: float
    held_s: float
    late_max_s: float
    ack_p50_s: float
    ack_p99_s: float
    ack_max_s: float


class _Item:
    """One message on its way. `place`: its number in the capture."""

    __slots__ = ("due", "place", "size", "times", "what")

    def __init__(self, place: int, what: Publish | SendCommand, due: float) -> None:
        self.place, self.what, self.due = place, what, due
        self.times = 0
        self.size = len(what.payload) + 200


class Ends:
    """Which messages have ended, and how: counted in the order of the capture, so that a position can stand
    for all before it."""

    def __init__(self, done: int, tally: Tally) -> None:
        self.done, self.tally = done, tally
        self._ends: deque[tuple[str, str, int] | None] = deque()

    def began(self) -> int:
        """The number of the next message."""
        self._ends.append(None)
        return self.done + len(self._ends) - 1

    def ended(self, place: int, how: str, reason: str = "", times: int = 0) -> None:
        self._ends[place - self.done] = (how, reason, times)
        while self._ends and (end := self._ends[0]) is not None:
            self._ends.popleft()
            self.done += 1
            how, reason, times = end
            tally = self.tally
            setattr(tally, how, getattr(tally, how) + 1)
            tally.played += times > 0
            tally.again += times > 1
            if reason:
                tally.because(reason)

    @property
    def waiting(self) -> int:
        return len(self._ends)


class _SideGone(Exception):
    """The side does not answer any more; the replay stops, and can be gone on with."""


class Replay:
    """Plays one capture. `stop` set: it ends early, with its position kept."""

    def __init__(self, options: Options, *, stop: asyncio.Event | None = None) -> None:
        self.options = options
        self.stop = stop or asyncio.Event()
        self.manifest = read_manifest(options.capture)
        self._to = f"{options.host}:{options.port}"
        self.names = identities(list(self.manifest.devices), options.names)
        self.credentials = dict(options.credentials)
        position = self._position()
        self.ends = Ends(position.done, position.tally)
        self.late_max_s = self.held_s = 0.0
        self.waiting_bytes = 0
        self.doing = "starting"
        self._room = asyncio.Event()
        self._players: dict[str, _Player] = {}
        self._latency = HdrHistogram(1, 3_600_000_000, 3)
        self._sign_ins = asyncio.Semaphore(SIGN_INS_AT_ONCE)
        self._commands = asyncio.Semaphore(COMMANDS_AT_ONCE)
        self._broken: asyncio.Future[None] | None = None
        self._last_answer = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = _trusting(options.ca) if options.tls else None
        self._client: httpx.AsyncClient | None = None

    async def run(self) -> Outcome:
        """Raises BadInput or Conflict when the side might take the replay for real: then nothing was sent."""
        began = time.monotonic()
        self._broken = asyncio.get_running_loop().create_future()
        reason = ""
        async with contextlib.AsyncExitStack() as stack:
            if self.options.api is not None:
                self._client = await stack.enter_async_context(_client(self.options.api))
            self.doing = "checking the side"
            await self._check()
            stack.push_async_callback(self._close)
            self.begin(self._save_for_ever(), "replay-position")
            self.doing = "playing"
            try:
                await self._play()
            except _SideGone as gone:
                reason = str(gone)
            self.doing = "closing"
        if self.stop.is_set() and self.ends.tally.open:
            reason = reason or "it was interrupted"
        self._save()
        return self._outcome(reason, time.monotonic() - began)

    # -- before anything is sent -------------------------------------------------------------------------

    async def _check(self) -> None:
        """Every identity belongs to the replays' own tenant, and has a credential. Fails closed."""
        options = self.options
        if not is_replay_tenant(options.tenant):
            raise BadInput(f"tenant {options.tenant!r} is not one of replays: use {REPLAY!r} or {REPLAY}-…")
        wanted = set(self.names.values())
        assert all(is_replay_id(identity) for identity in wanted)
        if self._client is None:
            if not options.unchecked:
                raise BadInput(
                    "nothing says whose the devices of this side are: name its API (--data, or FLEETLIFT_URL "
                    "and FLEETLIFT_TOKEN), or, when it is a broker that has none, say --no-registry"
                )
        else:
            if options.provision:
                await self._provision(self._client, sorted(wanted))
            await _check_owners(self._client, wanted, options.tenant)
        if missing := sorted(wanted - self.credentials.keys()):
            raise BadInput(
                f"{len(missing)} identities have no credential, such as {missing[0]!r}: name a file with "
                "--credentials, or let --provision make them"
            )

    async def _provision(self, client: httpx.AsyncClient, wanted: list[str]) -> None:
        """Make the identities in a tenant of their own, with passwords that stay in the state directory."""
        from secrets import token_urlsafe

        path = self.options.state / "credentials.jsonl"
        known = read_credentials(path) if path.exists() else {}
        new = {identity: known.get(identity) or token_urlsafe(32) for identity in wanted}
        if new.keys() - known.keys():
            lines = (
                msgspec.json.encode({"device": d, "password": p}).decode()
                for d, p in {**known, **new}.items()
            )
            write_private(path, "\n".join(lines) + "\n")
        try:
            await self._register(client, new, known.keys())
        except httpx.TransportError as problem:
            why = str(problem) or type(problem).__name__
            raise Unavailable(f"the side's API does not answer ({why})") from problem
        self.credentials.update(new)

    async def _register(self, client: httpx.AsyncClient, new: Mapping[str, str], known: Set[str]) -> None:
        made = await client.post("/tenants", json={"id": self.options.tenant, "name": "Replays"})
        if made.is_error and made.status_code != 409:
            raise _problem(made, f"the tenant {self.options.tenant!r} cannot be made")
        there = await _registered(client, self.options.tenant)
        at_once = asyncio.Semaphore(8)

        async def put(identity: str) -> None:
            body = {
                "tenant": self.options.tenant,
                "attributes": {"replay": self.manifest.id},
                "credentials": [{"kind": "password", "value": new[identity]}],
            }
            async with at_once:
                answer = await client.put(f"/devices/{identity}", json=body)
            if answer.is_error:
                raise _problem(answer, f"the identity {identity!r} cannot be made")

        missing = [identity for identity in new if identity not in known or identity not in there]
        await asyncio.gather(*(put(identity) for identity in missing))

    # -- playing -----------------------------------------------------------------------------------------

    async def _play(self) -> None:
        assert self._broken is not None
        messages = self._messages()
        work = asyncio.create_task(self._feed(messages), name="replay-feed")
        stopped = asyncio.create_task(self.stop.wait(), name="replay-stop")
        try:
            waits: set[asyncio.Future[Any]] = {work, stopped, self._broken}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._broken.done():
                self._broken.result()
            if work.done():
                work.result()
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)
            messages.close()

    async def _feed(self, messages: "_Messages") -> None:
        """Hand each message to its device when it is due, then wait until all have ended."""
        speed = self.options.speed
        start, first_at = time.monotonic(), None
        yielded_at = start
        for message in messages:
            now = time.monotonic()
            if first_at is None:
                first_at = message.at_s
            due = start + (message.at_s - first_at) / speed if speed else now
            if due > now + TICK_S:
                await asyncio.sleep(due - now)
                yielded_at = now
            elif speed:
                self.late_max_s = max(self.late_max_s, now - due)
            if (
                now - yielded_at > YIELD_EVERY_S
            ):  # late or as fast as can be: answers must be heard all the same
                await asyncio.sleep(0)
                yielded_at = time.monotonic()
            if self.ends.waiting >= WAITING_MAX or self.waiting_bytes >= WAITING_BYTES_MAX:
                await self._wait_for_room()
            self._take(message, due if speed else time.monotonic())
        while self.ends.waiting:
            self._room.clear()
            await self._room.wait()

    async def _wait_for_room(self) -> None:
        began = time.monotonic()
        while self.ends.waiting >= WAITING_MAX // 2 or self.waiting_bytes >= WAITING_BYTES_MAX // 2:
            self._room.clear()
            await self._room.wait()
        self.held_s += time.monotonic() - began

    def _take(self, message: CapturedMessage, due: float) -> None:
        place = self.ends.began()
        identity = self.names.get(message.device)
        if identity is None:
            raise Conflict(f"device {message.device!r} is in the capture, and not in its manifest")
        what = play(message, identity, now=time.time())
        if isinstance(what, LeftOut):
            self.ends.ended(place, "left_out", what.reason)
            return
        item = _Item(place, what, due)
        self.waiting_bytes += item.size
        self._player(identity).add(item)

    def _messages(self) -> "_Messages":
        return _Messages(read_capture(self.options.capture, skip=self.ends.done))

    def _player(self, identity: str) -> "_Player":
        player = self._players.get(identity)
        if player is None:
            player = self._players[identity] = _Player(self, identity)
        return player

    # -- what players tell -------------------------------------------------------------------------------

    def ended(self, item: _Item, how: str, reason: str = "") -> None:
        if how == "acknowledged":
            self._last_answer = time.monotonic()
            taken = max(1, int((self._last_answer - item.due) * 1e6))
            self._latency.record_value(min(taken, 3_600_000_000))
        self.waiting_bytes -= item.size
        self.ends.ended(item.place, how, reason, item.times)
        self._room.set()

    def gone(self, reason: str) -> bool:
        """A device has had no answer for too long. True: nobody has, and the replay stops where it is."""
        if time.monotonic() - self._last_answer < self.options.give_up_s:
            return False
        broken = self._broken
        if broken is not None and not broken.done():
            broken.set_exception(_SideGone(f"{self._to} does not answer any more ({reason})"))
        return True

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of the replay itself ends it: whoever died in silence would be waited for for ever."""
        self._tasks.discard(task)
        broken = self._broken
        if not task.cancelled() and (fault := task.exception()) and broken is not None and not broken.done():
            broken.set_exception(fault)

    async def connect(self, player: "_Player") -> "_Connection":
        loop = asyncio.get_running_loop()
        async with self._sign_ins, asyncio.timeout(CONNECT_WITHIN_S):
            _, connection = await loop.create_connection(
                lambda: _Connection(player.identity, self.credentials[player.identity], player),
                self.options.host,
                self.options.port,
                ssl=self._context,
            )
            try:
                await asyncio.shield(connection.welcomed)
            except BaseException:
                connection.close()
                raise
            return connection

    async def send_command(self, item: _Item) -> tuple[str, str]:
        """How it ended, and why. Raises Unavailable to have it tried again."""
        what = item.what
        assert isinstance(what, SendCommand) and self._client is not None
        body = {"name": what.name, "params": what.params, "mode": "dry-run"}
        async with self._commands:
            try:
                answer = await self._client.post(f"/devices/{what.device}/commands", json=body)
            except httpx.TransportError as problem:
                raise Unavailable(str(problem) or type(problem).__name__) from problem
        if answer.status_code >= 500 or answer.status_code == 429:
            raise Unavailable(f"the API answered {answer.status_code}")
        if answer.is_error:
            return "refused", f"the API refused a command with {answer.status_code}"
        return "acknowledged", ""

    @property
    def has_api(self) -> bool:
        return self._client is not None

    # -- position ----------------------------------------------------------------------------------------

    def _path(self) -> Path:
        return self.options.state / "position.json"

    def _position(self) -> Position:
        fresh = Position(
            capture=self.manifest.id, to=self._to, done=0, tally=Tally(total=self.manifest.messages)
        )
        self.options.state.mkdir(parents=True, exist_ok=True)
        if self.options.again or not self._path().exists():
            return fresh
        try:
            found = msgspec.json.decode(self._path().read_bytes(), type=Position)
        except (msgspec.MsgspecError, ValueError) as problem:
            raise BadInput(f"{self._path()} is damaged ({problem}): begin again with --again") from None
        if (found.capture, found.to) != (fresh.capture, fresh.to):
            raise BadInput(
                f"{self._path()} is of capture {found.capture} to {found.to}: name another --state"
            )
        return found

    def _save(self) -> None:
        ends = self.ends
        position = Position(capture=self.manifest.id, to=self._to, done=ends.done, tally=ends.tally)
        write_private(self._path(), msgspec.json.encode(position).decode() + "\n")

    async def _save_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            self._save()
            for player in list(self._players.values()):
                player.beat()

    async def _close(self) -> None:
        for player in self._players.values():
            player.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _outcome(self, reason: str, took_s: float) -> Outcome:
        tally, latency = self.ends.tally, self._latency
        return Outcome(
            capture=self.manifest.id,
            to=self._to,
            finished=tally.open == 0,
            reason=reason,
            total=tally.total,
            played=tally.played,
            acknowledged=tally.acknowledged,
            refused=tally.refused,
            failed=tally.failed,
            left_out=tally.left_out,
            open=tally.open,
            again=tally.again,
            reasons=tally.reasons,
            took_s=took_s,
            held_s=self.held_s,
            late_max_s=self.late_max_s,
            ack_p50_s=latency.get_value_at_percentile(50) / 1e6,
            ack_p99_s=latency.get_value_at_percentile(99) / 1e6,
            ack_max_s=latency.get_max_value() / 1e6,
        )


class _Messages(Iterator[CapturedMessage]):
    """The messages of a capture; closed, its file is."""

    def __init__(self, messages: Iterator[CapturedMessage]) -> None:
        self._messages = messages

    def __next__(self) -> CapturedMessage:
        return next(self._messages)

    def close(self) -> None:
        close: Callable[[], None] | None = getattr(self._messages, "close", None)
        if close is not None:
            close()


class _Player:
    """One device: what waits, what is in flight, and the connection it goes by. Order is kept throughout."""

    def __init__(self, replay: Replay, identity: str) -> None:
        self.replay, self.identity = replay, identity
        self._waiting: deque[_Item] = deque()
        self._flying: dict[int, _Item] = {}  # by packet id, in the order of sending
        self._orders: deque[_Item] = deque()  # commands for the API
        self._ordering: asyncio.Task[None] | None = None
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._packet_id = 0
        self._refusal = ""  # why nothing is sent any more
        self._heard_at = time.monotonic()  # an acknowledgement on this connection
        self._acked_at = time.monotonic()  # on any
        self._losses = 0  # of connections, since the last acknowledgement
        self._closed = False

    def add(self, item: _Item) -> None:
        if self._refusal:
            self.replay.ended(item, "refused", self._refusal)
        elif isinstance(item.what, SendCommand) and self.replay.has_api:
            self._orders.append(item)
            if self._ordering is None or self._ordering.done():
                self._ordering = self.replay.begin(self._order(), f"replay-commands-{self.identity}")
        else:
            self._waiting.append(item)
            self._pump()

    def _pump(self) -> None:
        connection = self._connection
        if connection is None:
            connecting = self._connecting is not None and not self._connecting.done()
            if (self._waiting or self._flying) and not self._closed and not connecting:
                self._connecting = self.replay.begin(self._connect(), f"replay-{self.identity}")
            return
        while self._waiting and len(self._flying) < self._window():
            if not self._flying:
                self._heard_at = self._acked_at = time.monotonic()
            self._send(connection, self._waiting.popleft(), self._free_id(), dup=False)

    def _window(self) -> int:
        """One at a time once connections end again and again: to find what the side cannot bear."""
        return 1 if self._losses >= LOSSES_ONE_BY_ONE else self.replay.options.window

    def _send(self, connection: "_Connection", item: _Item, packet_id: int, *, dup: bool) -> None:
        what = item.what
        try:
            data = mqtt.publish(what.topic, what.payload, qos=1, packet_id=packet_id, dup=dup)
        except mqtt.BadPacket as problem:
            self.replay.ended(item, "refused", f"it cannot be published ({problem})"[:200])
            return
        item.times += 1
        self._flying[packet_id] = item
        connection.send(data)

    def _free_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % 0xFFFF + 1
            if self._packet_id not in self._flying:
                return self._packet_id

    async def _connect(self) -> None:
        """A connection, as long as one is needed; then everything that was in flight goes again, in order."""
        backoff_s, refusals = _BACKOFF_S, 0
        began = time.monotonic()
        if self._losses > 1:
            await asyncio.sleep(min(1.0, _BACKOFF_S * self._losses))
        while not self._closed:
            try:
                connection = await self.replay.connect(self)
            except _SignInRefused as refused:
                refusals += 1
                if refused.for_good and refusals >= SIGN_IN_TRIES:
                    self._refuse(str(refused))
                    return
                reason = str(refused)
            except (OSError, TimeoutError, mqtt.BadPacket) as problem:
                reason = str(problem) or type(problem).__name__
            else:
                self._connection = connection
                self._heard_at = time.monotonic()
                flying, self._flying = self._flying, {}
                if self._window() == 1:
                    self._waiting.extendleft(reversed(flying.values()))
                    flying = {}
                for packet_id, item in flying.items():
                    self._send(connection, item, packet_id, dup=True)
                if connection.ended:  # while this task had not come to its turn yet
                    self._connection = None
                else:
                    self._pump()
                    return
                reason = "the connection was closed at once"
            if time.monotonic() - began > self.replay.options.give_up_s:
                if not self.replay.gone(reason):
                    self._fail(f"no connection for {self.replay.options.give_up_s:g} s")
                return
            await asyncio.sleep(backoff_s * (0.5 + random.random() / 2))
            backoff_s = min(_BACKOFF_S_MAX, backoff_s * 2)

    def acked(self, packet_id: int) -> None:
        item = self._flying.pop(packet_id, None)
        if item is not None:
            self._heard_at = self._acked_at = time.monotonic()
            self._losses = 0
            self.replay.ended(item, "acknowledged")
            self._pump()

    def lost(self, connection: "_Connection") -> None:
        if self._connection is connection:
            self._connection = None
            if self._flying:
                self._losses += 1
            if self._losses >= LOSSES_MAX and len(self._flying) == 1:
                (item,) = self._flying.values()
                self._flying, self._losses = {}, 0
                self.replay.ended(item, "refused", "the side closes the connection on it")
            self._pump()

    def beat(self) -> None:
        """Once a second: a silent connection is made anew, an idle one kept alive."""
        connection, silent_s = self._connection, time.monotonic() - self._heard_at
        give_up_s = self.replay.options.give_up_s
        if self._flying and time.monotonic() - self._acked_at > give_up_s:
            if not self.replay.gone(f"it acknowledges nothing to {self.identity}"):
                self._fail(f"no acknowledgement for {give_up_s:g} s")
            return
        if connection is None:
            return
        if self._flying and silent_s > ACKED_WITHIN_S:
            connection.close()
            self.lost(connection)
        elif not self._flying and time.monotonic() - connection.sent_at > KEEP_ALIVE_S / 2:
            connection.send(mqtt.encode(mqtt.PingReq()))

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.send(mqtt.encode(mqtt.Disconnect()))
            connection.close()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self._end_all("refused", reason)

    def _fail(self, reason: str) -> None:
        """Whether the side has what was in flight nobody knows; what still waited was never sent."""
        self._end_all("failed", reason)

    def _end_all(self, how: str, reason: str) -> None:
        items = [*self._flying.values(), *self._waiting]
        self._flying, self._waiting = {}, deque()
        for item in items:
            self.replay.ended(item, how, reason)

    # -- commands ----------------------------------------------------------------------------------------

    async def _order(self) -> None:
        """Send commands by the API, one after the other."""
        while self._orders:
            item = self._orders[0]
            began, backoff_s = time.monotonic(), _BACKOFF_S
            while True:
                item.times += 1
                try:
                    how, reason = await self.replay.send_command(item)
                    break
                except Unavailable as problem:
                    if time.monotonic() - began > self.replay.options.give_up_s:
                        if self.replay.gone(str(problem)):
                            return
                        how, reason = (
                            "failed",
                            f"no answer of the API for {self.replay.options.give_up_s:g} s",
                        )
                        break
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(_BACKOFF_S_MAX, backoff_s * 2)
            self._orders.popleft()
            self.replay.ended(item, how, reason)


class _SignInRefused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"the side refused the sign-in (CONNACK {code})")
        self.for_good = code in _REFUSED_FOR_GOOD


class _Connection(asyncio.Protocol):
    """MQTT 3.1.1 by one socket, publishing only; what is sent in one round of the loop leaves together."""

    def __init__(self, identity: str, password: str, player: _Player) -> None:
        self._identity, self._password, self._player = identity, password, player
        self._loop = asyncio.get_running_loop()
        self.welcomed: asyncio.Future[None] = self._loop.create_future()
        self.welcomed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.ended = False
        self.sent_at = time.monotonic()
        self._decoder = mqtt.Decoder(max_packet=65_536)
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        connect = mqtt.Connect(
            client_id=self._identity,
            clean=True,
            keep_alive_s=KEEP_ALIVE_S,
            username=self._identity,
            password=self._password.encode(),
        )
        self.send(mqtt.encode(connect))

    def send(self, data: bytes) -> None:
        self.sent_at = time.monotonic()
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and self._transport is not None and not self.ended:
            self._transport.writelines(self._out)
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        try:
            for packet in self._decoder.feed(data):
                if type(packet) is mqtt.PubAck:
                    self._player.acked(packet.packet_id)
                elif isinstance(packet, mqtt.ConnAck) and not self.welcomed.done():
                    if packet.code == mqtt.ConnectCode.ACCEPTED:
                        self.welcomed.set_result(None)
                    else:
                        self.welcomed.set_exception(_SignInRefused(packet.code))
        except mqtt.BadPacket as problem:
            log.warning("replay_side_spoke_nonsense", device=self._identity, problem=str(problem))
            self.close()
            self.connection_lost(problem)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.welcomed.done():
            self.welcomed.set_exception(ConnectionResetError("the side closed the connection"))
        if not self.ended:
            self.ended = True
            self._player.lost(self)

    def close(self) -> None:
        self._flush()
        self.ended = True
        if self._transport is not None:
            self._transport.close()


# -- helpers ----------------------------------------------------------------------------------------------


def identities(devices: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """By which identity each recorded device is replayed. Raises BadInput unless all are replays' own."""
    found = {device: names.get(device) or replay_id(device) for device in devices}
    return checked_names(found)


def read_credentials(path: Path) -> dict[str, str]:
    """Passwords by identity: JSON lines `{"device", "password"}`, or one JSON object. Raises BadInput."""
    try:
        text = path.read_bytes()
    except OSError as problem:
        raise BadInput(f"{path}: {problem.strerror}") from problem
    try:
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
            return (
                msgspec.json.decode(text, type=dict[str, str]) if b'"password"' not in text else _lines(text)
            )
        return _lines(text)
    except (msgspec.MsgspecError, ValueError):
        raise BadInput(f'{path}: expected lines of {{"device": "replay-…", "password": "…"}}') from None


class _Credential(msgspec.Struct, frozen=True):
    device: str
    password: str


def _lines(text: bytes) -> dict[str, str]:
    found = msgspec.json.Decoder(_Credential).decode_lines(text) if text.strip() else []
    return {one.device: one.password for one in found}


def _client(api: Api) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=api.url.rstrip("/") + "/api/v1",
        headers={"authorization": f"Bearer {api.token}", "user-agent": "fleetlift-replay"},
        timeout=httpx.Timeout(30.0, connect=5.0),
        verify=_trusting(api.ca) if api.url.startswith("https://") else True,
        trust_env=False,  # a proxy of the environment must not see tokens meant for this server
    )


def _trusting(ca: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca or None)
    except OSError as problem:
        raise BadInput(f"CA file {ca}: {problem.strerror or problem}") from problem


async def _registered(client: httpx.AsyncClient, tenant: str) -> set[str]:
    """The devices of a tenant, by the side's registry."""
    found: set[str] = set()
    query = {"tenant": tenant, "limit": "1000"}
    while True:
        answer = await _asked(client, "/devices", query)
        if answer.is_error:
            raise _problem(answer, "the side does not tell whose its devices are")
        page = answer.json()
        found |= {device["id"] for device in page["items"]}
        if page["next"] is None:
            return found
        query["after"] = page["next"]


async def _check_owners(client: httpx.AsyncClient, wanted: set[str], tenant: str) -> None:
    """Conflict unless every identity is registered and belongs to the tenant of the replay."""
    strangers = wanted - await _registered(client, tenant)
    if not strangers:
        return
    for device in sorted(strangers)[:20]:
        answer = await _asked(client, f"/devices/{device}", {})
        if not answer.is_error:
            raise Conflict(
                f"device {device!r} belongs to tenant {answer.json()['tenant']!r} and may be a real one: "
                "nothing is replayed to this side"
            )
    raise Conflict(
        f"{len(strangers)} identities are not registered on this side, such as {min(strangers)!r}: "
        "--provision makes them; nothing was replayed"
    )


async def _asked(client: httpx.AsyncClient, path: str, query: Mapping[str, str]) -> httpx.Response:
    try:
        return await client.get(path, params=dict(query))
    except httpx.TransportError as problem:
        why = str(problem) or type(problem).__name__
        raise Unavailable(f"the side's API does not answer ({why})") from problem


def _problem(answer: httpx.Response, what: str) -> FleetError:
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"status {answer.status_code}"
    cls: type[FleetError] = {401: Forbidden, 403: Forbidden, 409: Conflict}.get(answer.status_code, BadInput)
    return cls(f"{what}: {detail}")
