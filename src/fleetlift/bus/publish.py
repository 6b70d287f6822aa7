"""Publishing into the log and to devices, with an acknowledgement for each message and many in flight."""

import asyncio
import itertools
from collections.abc import Mapping

import msgspec

from fleetlift.bus.subjects import STORED, to_subject
from fleetlift.bus.wire import Wire, connect, format_headers
from fleetlift.config import Settings
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

ACK_WITHIN_S = 10.0
IN_FLIGHT_MAX = 4000
_AS_MQTT = format_headers({"Nmqtt-Pub": "1"})


class _Error(msgspec.Struct):
    description: str = ""
    code: int = 0


class _Ack(msgspec.Struct):
    seq: int = 0
    error: _Error | None = None


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
        self._waiting: dict[bytes, asyncio.Future[int]] = {}
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._closed = False

    async def to_device(self, topic: str, payload: bytes) -> int:
        """Publish to an MQTT topic as a device would, QoS 1. Returns the sequence in the log.

        Subscribers with QoS 1 get it now or when they next connect (within the log's age), others when
        connected. Raises Unavailable when it is not known to be stored (it may be: repeating delivers twice),
        BadInput when the topic cannot be published to or the payload is too large.
        """
        subject = to_subject(topic)
        return await self._store(subject, payload, _AS_MQTT, live=True)

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
            wire = self._wire
            if wire is None or wire.closed.done():
                wire = await self._connect()
            if not wire.writable.is_set():
                await wire.writable.wait()
            total = len(block) + len(payload)
            if total > wire.info.max_payload:
                raise BadInput(f"the message has {total} bytes: {wire.info.max_payload} are allowed")
            reply = wire.inbox + b".%d" % next(self._numbers)
            stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._waiting[reply] = stored
            name = subject.encode()
            target = STORED.encode() + name
            if block:
                sizes = b"%d %d" % (len(block), total)
                message = b"HPUB %s %s %s\r\n%s%s\r\n" % (target, reply, sizes, block, payload)
                if live:
                    message += b"HPUB %s %s\r\n%s%s\r\n" % (name, sizes, block, payload)
            else:
                message = b"PUB %s %s %d\r\n%s\r\n" % (target, reply, total, payload)
            if wire.closed.done():
                self._waiting.pop(reply, None)
                raise Unavailable(f"NATS went away: {wire.closed.result()}")
            wire.send(message)
            try:
                async with asyncio.timeout(ACK_WITHIN_S):
                    return await stored
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
        stored = self._waiting.get(subject)
        if stored is None or stored.done():
            return
        if headers.startswith(b"NATS/1.0 503"):
            stored.set_exception(Unavailable("the log is not there: is JetStream running?"))
            return
        ack = msgspec.json.decode(payload, type=_Ack)
        if ack.error is not None:
            stored.set_exception(Unavailable(f"the log refused the message: {ack.error.description}"))
        else:
            stored.set_result(ack.seq)

    def _lost(self, wire: Wire, reason: str) -> None:
        if not self._closed:
            log.warning("publisher_disconnected", publisher=self._name, reason=reason)
        for reply, stored in list(self._waiting.items()):
            if reply.startswith(wire.inbox) and not stored.done():
                stored.set_exception(Unavailable(f"NATS went away before it confirmed: {reason}"))
