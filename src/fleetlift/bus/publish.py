"""Publishing into the log and to devices, with an acknowledgement for each message and many in flight."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence

import msgspec

from fleetlift.bus.subjects import STORED, to_subject
from fleetlift.bus.wire import Wire, connect, format_headers
from fleetlift.config import Settings
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

ACK_WITHIN_S = 10.0
IN_FLIGHT_MAX = 4000
GROUP_MAX = 500  # messages that leave together and are confirmed together
_AS_MQTT = format_headers({"Nmqtt-Pub": "1"})
_STORED = STORED.encode()


class _Error(msgspec.Struct):
    description: str = ""
    code: int = 0


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


class ToDevice(msgspec.Struct, frozen=True, gc=False):
    """A message to a device's MQTT topic. `stored` False: only for who listens now, and not in the log."""

    topic: str
    payload: bytes
    stored: bool = True


class _Waiting:
    """Messages on their way that share one future: done with the newest sequence once all are confirmed."""

    __slots__ = ("left", "problem", "seq", "stored")

    def __init__(self, left: int) -> None:
        self.left = left
        self.seq = 0
        self.problem = ""
        self.stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def take(self, headers: bytes, payload: bytes) -> None:
        if headers.startswith(b"NATS/1.0 503"):
            self.problem = "the log is not there: is JetStream running?"
        else:
            ack = _decode_ack(payload)
            if ack.error is None:
                self.seq = max(self.seq, ack.seq)
            else:
                self.problem = f"the log refused the message: {ack.error.description}"
        self.left -= 1
        if self.left <= 0 and not self.stored.done():
            if self.problem:
                self.stored.set_exception(Unavailable(self.problem))
            else:
                self.stored.set_result(self.seq)

    def fail(self, problem: str) -> None:
        if not self.stored.done():
            self.stored.set_exception(Unavailable(problem))


_decode_ack = msgspec.json.Decoder(_Ack).decode


class Publisher:
    """Messages to devices and into the log, over one connection that comes back by itself.

    Calls from many tasks are pipelined; each returns when JetStream has stored its message. At most
    `IN_FLIGHT_MAX` wait for that, the next callers wait for room.
    """

    def __init__(self, settings: Settings, *, name: str = "publisher") -> None:
        self._settings = settings
        self._name = name
        self._wire: Wire | None = None
        self._connecting = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[bytes, _Waiting] = {}
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._group_room = asyncio.Semaphore(IN_FLIGHT_MAX // GROUP_MAX)
        self._closed = False

    async def to_device(self, topic: str, payload: bytes) -> int:
        """Publish to an MQTT topic as a device would, QoS 1. Returns the sequence in the log.

        Subscribers with QoS 1 get it now or when they next connect (within the log's age), others when
        connected. Raises Unavailable when it is not known to be stored (it may be: repeating delivers twice),
        BadInput when the topic cannot be published to or the payload is too large.
        """
        subject = to_subject(topic)
        return await self._store(subject, payload, _AS_MQTT, live=True)

    async def to_devices(self, messages: Sequence[ToDevice]) -> str:
        """The same for many, in their order, which costs a fraction of as many single calls.

        Returns why some of them are not known to be stored; empty when all are. One that cannot be published
        at all (its topic, its size) keeps none of the others back.
        """
        problem = ""
        for start in range(0, len(messages), GROUP_MAX):
            async with self._group_room:
                try:
                    problem = await self._send_group(messages[start : start + GROUP_MAX]) or problem
                except Unavailable as lost:
                    problem = str(lost)
        return problem

    async def to_log(self, topic: str, payload: bytes, headers: Mapping[str, str] | None = None) -> int:
        """Store a message in the log under an MQTT topic; no device gets it. Returns its sequence.

        For what came by another way than MQTT. Raises as `to_device`.
        """
        block = format_headers(dict(headers)) if headers else b""
        return await self._store(to_subject(topic), payload, block, live=False)

    async def close(self) -> None:
        self._closed = True
        if self._wire is not None:
            self._wire.close()

    async def _store(self, subject: str, payload: bytes, block: bytes, *, live: bool) -> int:
        async with self._room:
            wire = await self._ready()
            total = len(block) + len(payload)
            if total > wire.info.max_payload:
                raise BadInput(f"the message has {total} bytes: {wire.info.max_payload} are allowed")
            name = subject.encode()
            reply = self._reply(wire)
            message = _put(_STORED + name + b" " + reply, block, payload)
            if live:
                message += _put(name, block, payload)
            return await self._confirmed(wire, reply, [message], 1)

    async def _send_group(self, messages: Sequence[ToDevice]) -> str:
        wire = await self._ready()
        reply = self._reply(wire)
        frames: list[bytes] = []
        stored = 0
        problem = ""
        for message in messages:
            try:
                name = to_subject(message.topic).encode()
            except BadInput as refused:
                problem = str(refused)
                continue
            if len(_AS_MQTT) + len(message.payload) > wire.info.max_payload:
                problem = f"{message.topic}: {len(message.payload)} bytes are too many for a message"
                continue
            if message.stored:
                stored += 1
                frames.append(_put(_STORED + name + b" " + reply, _AS_MQTT, message.payload))
                frames.append(_put(name, _AS_MQTT, message.payload))
            else:
                frames.append(_put(name, b"", message.payload))
        if stored:
            await self._confirmed(wire, reply, frames, stored)
        elif frames:
            wire.send(b"".join(frames))
        return problem

    async def _ready(self) -> Wire:
        wire = self._wire
        if wire is None or wire.closed.done():
            wire = await self._connect()
        if not wire.writable.is_set():
            await wire.writable.wait()
        return wire

    def _reply(self, wire: Wire) -> bytes:
        return wire.inbox + b".%d" % next(self._numbers)

    async def _confirmed(self, wire: Wire, reply: bytes, frames: Sequence[bytes], count: int) -> int:
        """Send, and wait until `count` messages were confirmed to `reply`."""
        if wire.closed.done():
            raise Unavailable(f"NATS went away: {wire.closed.result()}")
        waiting = self._waiting[reply] = _Waiting(count)
        wire.send(b"".join(frames))
        try:
            async with asyncio.timeout(ACK_WITHIN_S):
                return await waiting.stored
        except TimeoutError:
            raise Unavailable(f"NATS did not confirm within {ACK_WITHIN_S:.0f} s: try again") from None
        finally:
            self._waiting.pop(reply, None)

    async def _connect(self) -> Wire:
        async with self._connecting:
            if self._closed:
                raise Unavailable("the publisher is closed")
            if self._wire is not None and not self._wire.closed.done():
                return self._wire
            wire = await connect(
                self._settings.nats_url,
                user=self._settings.nats_svc_user,
                password=self._settings.nats_svc_password,
                ca=self._settings.nats_ca,
                name=self._name,
                on_message=self._on_ack,
            )
            wire.send(b"SUB %s.* 1\r\n" % wire.inbox)
            wire.closed.add_done_callback(lambda done: self._lost(wire, done.result()))
            self._wire = wire
            return wire

    def _on_ack(self, subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        waiting = self._waiting.get(subject)
        if waiting is not None:
            waiting.take(headers, payload)

    def _lost(self, wire: Wire, reason: str) -> None:
        if not self._closed:
            log.warning("publisher_disconnected", publisher=self._name, reason=reason)
        for reply, waiting in list(self._waiting.items()):
            if reply.startswith(wire.inbox):
                waiting.fail(f"NATS went away before it confirmed: {reason}")


def _put(subject: bytes, block: bytes, payload: bytes) -> bytes:
    """One message of the protocol; `subject` may have a reply subject behind it."""
    if block:
        sizes = b"%d %d" % (len(block), len(block) + len(payload))
        return b"HPUB %s %s\r\n%s%s\r\n" % (subject, sizes, block, payload)
    return b"PUB %s %d\r\n%s\r\n" % (subject, len(payload), payload)
