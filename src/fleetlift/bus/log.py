"""Reading the log: the stream `$MQTT_msgs`, which holds every message a device may have had a PUBACK for.

The position belongs to the reader, not to the server: it is stored with the effects, in one transaction, and
handed back at the start (`store.positions`). The consumer in the server is nameless, keeps no state, and is
made anew after every interruption just behind the last message that was handed out. So nothing is skipped,
and nothing comes twice unless the reader itself starts again from an older position.
"""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError

from fleetlift.bus.subjects import STORED, STREAM, stored_topic
from fleetlift.bus.wire import Wire, connect, parse_headers
from fleetlift.config import Settings
from fleetlift.core.errors import Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

_NO_HEADERS: MappingProxyType[str, str] = MappingProxyType({})
_PULL_EXPIRES_S = 30
_HEARTBEAT_S = 5
_SILENCE_MAX_S = 12.0  # two heartbeats missed: the connection is dead though TCP has not noticed
_BYTES_IN_FLIGHT_MAX = 48 * 1024 * 1024
_RETRY_S = 0.25
_NEWEST_WITHIN_S = 2.0
_NO_MESSAGE = 10037  # JetStream's code: no message found
_SAME_TIME_S = 5e-6  # times that differ by less are the same: a float holds a quarter of a microsecond


class LogMessage(msgspec.Struct, frozen=True, gc=False):
    """One stored message. `subject` is without `$MQTT.msgs.`; `at` is when it was stored, Unix seconds."""

    seq: int
    subject: str
    topic: str
    headers: Any  # Mapping[str, str]; shared between messages, not to be changed
    payload: bytes
    at: float


class LogPosition(msgspec.Struct, frozen=True):
    """A place in the log. A stream that was made anew counts from 1 again: hence its time of creation.

    One that lost its end gives the same numbers again: hence the time `at` (Unix seconds) of the message;
    None: not known.
    """

    created: datetime
    seq: int
    at: float | None = None

    def as_row(self) -> tuple[datetime, int, float | None]:
        return (self.created, self.seq, self.at)


class LogBatch(list[LogMessage]):
    """Messages in order of `seq`, at least one. `position` is where the reader stands once they are stored.

    `behind` is how many messages that match were still unread in the server when the last of these left it.
    """

    position: LogPosition
    behind: int


async def read(
    settings: Settings,
    *,
    after: LogPosition | tuple[datetime, int, float | None] | None,
    filters: Sequence[str],
    name: str,
    batch_max: int = 5000,
    linger_s: float = 0.02,
    until_end: bool = False,
) -> AsyncIterator[LogBatch]:
    """Batches of the messages after position `after` (None: from the beginning), for ever.

    `filters` are NATS subjects of topics, without `$MQTT.msgs.` (`dt.>`). A batch is handed out when
    `batch_max` messages are there, or `linger_s` after its first. A server that goes away is waited for.
    When the stream was made anew, reading begins at its first message. With `until_end`, ends once nothing is
    left to read.

    A reader of most of the log filters by `>` and leaves out the rest itself: with 2000 subjects the server
    picks 50,000 messages a second by `dt.>`, and hands out 220,000 without picking.
    """
    start = LogPosition(*after) if isinstance(after, tuple) else after
    source = _Source(settings, filters, name, start, batch_max)
    try:
        async for batch in source.batches(linger_s, until_end):
            yield batch
    finally:
        source.close()


async def stream_state(settings: Settings) -> tuple[datetime, int, int]:
    """(creation time, first sequence, last sequence) of the log. Raises Unavailable."""
    async with _asking(settings) as source:
        info = await source.stream_info()
        return info.created, info.state.first_seq, info.state.last_seq


async def standing(settings: Settings, position: tuple[datetime, int, float | None]) -> LogPosition:
    """Where a stored position is in the log as it is now.

    It is the same unless the log lost its end since, then that is where the rest of it ends; or unless the
    stream was made anew, then it is its beginning. Raises Unavailable.
    """
    async with _asking(settings) as source:
        return await source.standing(LogPosition(*position), await source.stream_info())


async def newest(nc: Client, filters: Sequence[str]) -> tuple[datetime, int, float]:
    """When the log was made; number and time (Unix seconds) of the newest message on `filters`, 0: none.

    Over a connection that is there already. Raises Unavailable.
    """
    try:
        answer = await nc.request(f"$JS.API.STREAM.INFO.{STREAM}", b"", timeout=_NEWEST_WITHIN_S)
        created = msgspec.json.decode(answer.data, type=_StreamInfo).created
        seq, at = 0, 0.0
        for subject in filters:
            asked = msgspec.json.encode({"last_by_subj": STORED + subject})
            answer = await nc.request(f"$JS.API.STREAM.MSG.GET.{STREAM}", asked, timeout=_NEWEST_WITHIN_S)
            found = msgspec.json.decode(answer.data, type=_MessageReply)
            if found.message is not None and found.message.seq > seq:
                seq, at = found.message.seq, found.message.time.timestamp()
            elif found.error is not None and found.error.err_code != _NO_MESSAGE:
                raise Unavailable(f"NATS does not tell about the log ({found.error.description})")
    except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
        raise Unavailable(f"NATS does not tell about the log ({type(error).__name__})") from error
    return created, seq, at


@contextlib.asynccontextmanager
async def _asking(settings: Settings) -> "AsyncIterator[_Source]":
    source = _Source(settings, (), "asking", None, 1)
    try:
        await source.connect_only()
        yield source
    finally:
        source.close()


class _StreamState(msgspec.Struct):
    first_seq: int
    last_seq: int


class _StreamInfo(msgspec.Struct):
    created: datetime
    state: _StreamState


class _ApiError(msgspec.Struct):
    description: str = ""
    code: int = 0
    err_code: int = 0


class _ApiReply(msgspec.Struct):
    error: _ApiError | None = None


class _StoredMessage(msgspec.Struct):
    seq: int
    time: datetime


class _MessageReply(msgspec.Struct):
    message: _StoredMessage | None = None
    error: _ApiError | None = None


class _ConsumerInfo(msgspec.Struct):
    name: str
    num_pending: int = 0


class _Interrupted(Exception):
    """The consumer is lost; a new one continues behind the last message."""


class _Source:
    def __init__(
        self,
        settings: Settings,
        filters: Sequence[str],
        name: str,
        position: LogPosition | None,
        batch_max: int,
    ) -> None:
        self._settings = settings
        self._filters = [STORED + subject for subject in filters]
        self._name = name
        self._position = position
        self._batch_max = batch_max
        self._wire: Wire | None = None
        self._answers: dict[bytes, asyncio.Future[bytes]] = {}
        self._numbers = itertools.count(1)
        self._reset()

    def _reset(self) -> None:
        self._messages: deque[LogMessage] = deque()
        self._outstanding = 0  # asked for and not yet come
        self._held_bytes = 0
        self._next_in_consumer = 1
        self._broken = ""
        self._heard_at = time.monotonic()
        self._arrived = asyncio.Event()
        self._headers: dict[bytes, Any] = {}
        self._behind = 0

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        for answer in self._answers.values():
            answer.cancel()
        self._answers.clear()

    async def batches(self, linger_s: float, until_end: bool) -> AsyncIterator[LogBatch]:
        failures = 0
        while True:
            try:
                unread = await self._open()
                failures = 0
                while unread or not until_end:
                    batch = await self._next_batch(linger_s)
                    self._position = batch.position
                    yield batch
                    unread = batch.behind
                return
            except (_Interrupted, Unavailable) as problem:
                failures += 1
                if failures in (1, 20):  # once when it begins, once when it lasts
                    log.warning("log_reader_interrupted", reader=self._name, reason=str(problem))
                self.close()
                await asyncio.sleep(min(2.0, _RETRY_S * failures))

    async def connect_only(self) -> None:
        self._reset()
        wire = await connect(
            self._settings.nats_url,
            user=self._settings.nats_svc_user,
            password=self._settings.nats_svc_password,
            ca=self._settings.nats_ca,
            name=f"log-reader {self._name}",
            on_message=self._on_message,
        )
        self._wire = wire
        # A predecessor's pull request may live on in the server: the inbox is never used twice.
        wire.send(b"SUB %s.> 1\r\n" % wire.inbox)
        self._pull_inbox = wire.inbox + b".m"
        wire.closed.add_done_callback(lambda done: self._break(f"connection lost: {done.result()}", wire))

    async def _open(self) -> int:
        """Connect, find the stream, make the consumer. Returns how many messages are there to read."""
        await self.connect_only()
        info = await self.stream_info()
        if self._position is None:
            position = LogPosition(info.created, 0)
        else:
            position = await self.standing(self._position, info)
        self._position = position
        created = await self._api(
            f"CONSUMER.CREATE.{STREAM}",
            {
                "stream_name": STREAM,
                "config": {
                    "deliver_policy": "by_start_sequence",
                    "opt_start_seq": position.seq + 1,
                    "ack_policy": "none",
                    "max_deliver": -1,
                    "filter_subjects": self._filters,
                    "replay_policy": "instant",
                    "inactive_threshold": 30_000_000_000,
                    "num_replicas": 1,
                    "mem_storage": True,
                    "metadata": {"reader": self._name},
                },
            },
        )
        consumer = msgspec.json.decode(created, type=_ConsumerInfo)
        self._pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{consumer.name}".encode()
        self._pull()
        return consumer.num_pending

    async def standing(self, position: LogPosition, info: _StreamInfo) -> LogPosition:
        """`position`, or where one must go on that cannot go on there."""
        if position.created != info.created:
            if position.seq:
                log.warning("log_stream_was_made_anew", reader=self._name, stood_at=position.seq)
            return LogPosition(info.created, 0)
        last = info.state.last_seq
        if position.seq <= last and not await self._is_another(position, info.state.first_seq):
            return position
        # The server lost the end of its log (power cut, restored copy) and gives its numbers again.
        end = min(position.seq, last)
        if position.at is not None:
            end = await self._last_read(position.at, info.state.first_seq, end)
        log.error("log_stream_lost_its_end", reader=self._name, at=position.seq, end=end)
        return LogPosition(info.created, end)

    async def _is_another(self, position: LogPosition, first: int) -> bool:
        """Whether the message at this number is not the one that was read, or is gone though older ones are
        there."""
        if position.at is None or position.seq < first:
            return False
        found = await self._message_at(position.seq)
        return found is None or found[0] != position.seq or abs(found[1] - position.at) > _SAME_TIME_S

    async def _last_read(self, at: float, first: int, end: int) -> int:
        """The number of the last message up to `end` that the log took no later than `at`, by halving."""
        low, high = first - 1, end
        while low < high:
            middle = (low + high + 1) // 2
            found = await self._message_at(middle)
            if found is not None and found[1] <= at + _SAME_TIME_S:
                low = max(middle, min(found[0], high))
            else:
                high = middle - 1
        return low

    async def _message_at(self, seq: int) -> tuple[int, float] | None:
        """Number and time of the first message from `seq` on; None when there is none."""
        body = {"seq": seq, "next_by_subj": ">"}
        reply = msgspec.json.decode(
            await self._api(f"STREAM.MSG.GET.{STREAM}", body, missing=True), type=_MessageReply
        )
        found = reply.message
        return None if found is None else (found.seq, found.time.timestamp())

    async def stream_info(self) -> _StreamInfo:
        return msgspec.json.decode(await self._api(f"STREAM.INFO.{STREAM}", {}), type=_StreamInfo)

    async def _api(self, call: str, body: dict[str, Any], *, missing: bool = False) -> bytes:
        """One call; `missing`: that there is no such message is an answer."""
        wire = self._wire
        assert wire is not None
        reply = wire.inbox + b".a%d" % next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[reply] = answer
        payload = msgspec.json.encode(body)
        wire.send(b"PUB $JS.API.%s %s %d\r\n%s\r\n" % (call.encode(), reply, len(payload), payload))
        try:
            async with asyncio.timeout(5.0):
                text = await answer
        except TimeoutError:
            raise Unavailable(f"JetStream does not answer {call}") from None
        finally:
            self._answers.pop(reply, None)
        error = msgspec.json.decode(text, type=_ApiReply).error
        if error is not None and not (missing and error.err_code == _NO_MESSAGE):
            raise Unavailable(f"JetStream refuses {call}: {error.description} ({error.code})")
        return text

    def _pull(self) -> None:
        """Ask for more when half of what is allowed in flight has been handed out."""
        wire = self._wire
        room = 2 * self._batch_max - self._outstanding - len(self._messages)
        if wire is None or room < self._batch_max or self._held_bytes > _BYTES_IN_FLIGHT_MAX // 2:
            return
        payload = msgspec.json.encode(
            {
                "batch": room,
                "max_bytes": _BYTES_IN_FLIGHT_MAX // 2,
                "expires": _PULL_EXPIRES_S * 1_000_000_000,
                "idle_heartbeat": _HEARTBEAT_S * 1_000_000_000,
            }
        )
        wire.send(b"PUB %s %s %d\r\n%s\r\n" % (self._pull_subject, self._pull_inbox, len(payload), payload))
        self._outstanding += room

    def _break(self, reason: str, wire: Wire | None = None) -> None:
        if wire is None or wire is self._wire:
            self._broken = self._broken or reason
            self._arrived.set()
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(Unavailable(reason))

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        self._heard_at = time.monotonic()
        if not reply.startswith(b"$JS.ACK."):
            if subject == self._pull_inbox:
                self._on_status(headers)
                return
            answer = self._answers.get(subject)
            if answer is not None and not answer.done():
                if headers.startswith(b"NATS/1.0 503"):
                    answer.set_exception(Unavailable("JetStream is not ready"))
                else:
                    answer.set_result(payload)
            return
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time ns>.<pending>
        words = reply.split(b".")
        in_consumer = int(words[-3])
        if self._broken or in_consumer != self._next_in_consumer:
            # Something between server and us was lost: never hand out what comes behind the gap.
            self._break(f"message {in_consumer} came where {self._next_in_consumer} was due")
            return
        self._next_in_consumer += 1
        self._outstanding -= 1
        self._held_bytes += len(payload)
        text = subject.decode()
        message = LogMessage(
            int(words[-4]),
            text.removeprefix(STORED),
            stored_topic(text),
            self._parsed(headers),
            payload,
            int(words[-2]) / 1e9,
        )
        self._behind = int(words[-1])
        self._messages.append(message)
        self._arrived.set()

    def _parsed(self, block: bytes) -> Any:
        """Nearly all messages carry the same short header (`Nmqtt-Pub: 1`): parsed once."""
        known = self._headers.get(block)
        if known is None:
            known = MappingProxyType(parse_headers(block)[1]) if block else _NO_HEADERS
            if len(block) < 48 and len(self._headers) < 64:
                self._headers[block] = known
        return known

    def _on_status(self, block: bytes) -> None:
        status, headers = parse_headers(block)
        code = status[:3]
        if code == "100":  # heartbeat
            return
        text = status.lower().replace(" ", "")
        ended = code in ("404", "408") or (code == "409" and ("maxbytes" in text or "completed" in text))
        if ended and "Nats-Pending-Messages" in headers:
            # This request has ended; what it did not fill is not coming any more.
            self._outstanding -= int(headers["Nats-Pending-Messages"])
            self._pull()
        else:
            self._break(f"consumer lost: {status}")

    async def _next_batch(self, linger_s: float) -> LogBatch:
        while not self._messages:
            if self._broken:
                raise _Interrupted(self._broken)
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes with what it awaits.
                async with asyncio.timeout(_SILENCE_MAX_S / 3):
                    await self._arrived.wait()
            if not self._messages and time.monotonic() - self._heard_at > _SILENCE_MAX_S:
                self._break("nothing was heard of the server")
        if linger_s and len(self._messages) < self._batch_max and not self._broken:
            await asyncio.sleep(linger_s)
        count = min(len(self._messages), self._batch_max)
        batch = LogBatch(self._messages.popleft() for _ in range(count))
        self._held_bytes -= sum(len(message.payload) for message in batch)
        assert self._position is not None
        batch.position = LogPosition(self._position.created, batch[-1].seq, batch[-1].at)
        batch.behind = self._behind + len(self._messages)
        self._pull()
        return batch
