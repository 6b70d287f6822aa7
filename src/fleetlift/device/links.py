"""The two links of a device as asyncio protocols: the old side's frames, the new side's MQTT.

A link turns bytes into the agent's events and back. It decides nothing: what to do about an event is the
agent's business, when to connect and to close as well.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

import msgspec

from fleetlift.core import legacy, mqtt
from fleetlift.core.command import BROUGHT_BY
from fleetlift.core.orders import SHADOW_NAME, DeviceReport, Orders
from fleetlift.device.messages import (
    AnswerAcked,
    AnswerCommand,
    AnswerStatus,
    CommandReceived,
    Connected,
    Event,
    Lost,
    OrdersReceived,
    Path,
    Refused,
    ReportAcked,
    SendTelemetry,
    SendTryTelemetry,
    ShadowAnswered,
    ShadowChanged,
    Subscribed,
    TelemetryAcked,
    TryTelemetryAcked,
)
from fleetlift.log import get_logger

log = get_logger(__name__)

KEEP_ALIVE_S: Final = 30
MAX_PACKET: Final = 1_048_576

CONNACK_TEXT = {
    1: "the server does not speak MQTT 3.1.1",
    2: "the server refused the client id",
    3: "the server is not available",
    4: "the server refused the user name or password",
    5: "the server did not let this device in",
}


class Host(Protocol):
    """What a link needs of the shell that has it."""

    device: str
    key: str
    firmware: str

    def event(self, link: "Link", event: Event) -> None:
        """Feed the agent, unless `link` is one it has already given up."""
        ...

    def after_stored(self, call: Callable[[], None]) -> None:
        """Call once all that the agent has wanted stored so far is stored."""
        ...


class Link(asyncio.Protocol):
    """What both links have in common: writes of one loop round go out together; silence is noticed."""

    path: Path

    def __init__(self, host: Host) -> None:
        self.host = host
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.ended = False
        self.opening: asyncio.Task[None] | None = None
        self._out: list[bytes] = []
        self._heard_at = self.loop.time()
        self._beat: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.ended:
            self.transport.abort()
            return
        self.hello()

    def hello(self) -> None:
        raise NotImplementedError

    def take(self, data: bytes) -> None:
        raise NotImplementedError

    def goodbye(self) -> bytes:
        raise NotImplementedError

    def beat(self) -> None:
        raise NotImplementedError

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        if self.ended:
            return
        try:
            self.take(data)
        except (mqtt.BadPacket, legacy.BadFrame) as exc:
            log.warning("device_link_spoke_nonsense", device=self.host.device, path=self.path, error=str(exc))
            self.fail(Lost(self.path, str(exc)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(Lost(self.path, str(exc) if exc else "the other end closed the connection"))

    def fail(self, event: Event) -> None:
        """The link is over; the agent hears of it once."""
        if self.ended:
            return
        self._end()
        if self.transport is not None:
            self.transport.abort()
        self.host.event(self, event)

    def close(self) -> None:
        """Send what waits, say goodbye and close; the agent hears nothing more of this link."""
        if self.ended:
            return
        if self.transport is not None:
            self.send(self.goodbye())
            self._flush()
            self.transport.close()
        self._end()

    def abandon(self) -> None:
        """Drop the connection as a killed process would."""
        self._end()
        if self.transport is not None:
            self.transport.abort()

    def _end(self) -> None:
        self.ended = True
        self._out.clear()
        if self.opening is not None and self.transport is None and self.opening is not asyncio.current_task():
            self.opening.cancel()
        if self._beat is not None:
            self._beat.cancel()

    def send(self, data: bytes) -> None:
        if not self._out:
            self.loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if self._out and self.transport is not None:
            self.transport.writelines(self._out)
            self._out.clear()

    def keep_beating(self, every_s: float, silent_s: float) -> None:
        """Call `beat` every `every_s`; end the link when nothing was heard for `silent_s`."""

        def again() -> None:
            if self.loop.time() - self._heard_at > silent_s:
                self.fail(Lost(self.path, f"nothing heard for {silent_s:g} s"))
                return
            self.beat()
            self._beat = self.loop.call_later(every_s, again)

        self._beat = self.loop.call_later(every_s, again)


class LegacyLink(Link):
    """The old side: docs/legacy-protocol.md."""

    path = Path.OLD

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._decoder = legacy.Decoder()
        self._in = False

    def hello(self) -> None:
        self.send(legacy.encode(legacy.Login(self.host.device, self.host.key, self.host.firmware)))

    def goodbye(self) -> bytes:
        return legacy.encode(legacy.Bye("closing"))

    def beat(self) -> None:
        self.send(legacy.encode(legacy.Heartbeat()))

    def take(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            if self.ended:
                return
            self._take(message)

    def _take(self, message: legacy.Message) -> None:
        event = self.host.event
        match message:
            case legacy.TelemetryAck(acks):
                event(self, TelemetryAcked(Path.OLD, tuple((a.channel, a.seq) for a in acks)))
            case legacy.LoginOk(server_time_ms, heartbeat_s):
                self._in = True
                every_s = max(heartbeat_s / 2, 0.5)
                self.keep_beating(every_s, every_s * 3)
                event(self, Connected(Path.OLD, time_s=server_time_ms / 1000))
            case legacy.LoginRefused(reason):
                self.fail(Refused(Path.OLD, reason))
            case legacy.Command(id_, name, mode, expires_at_ms, params):
                dry_run = mode is legacy.Mode.DRY_RUN
                event(self, CommandReceived(Path.OLD, id_, name, params, dry_run, expires_at_ms / 1000))
            case legacy.CommandReplyAck(id_, status):
                event(self, AnswerAcked(Path.OLD, id_, AnswerStatus(status.value)))
            case legacy.Config(_, document):
                if (orders := read_orders(document, self.host.device)) is not None:
                    event(self, OrdersReceived(Path.OLD, orders))
            case legacy.Bye(reason):
                self.fail((Lost if self._in else Refused)(Path.OLD, reason or "the server said goodbye"))
            case _:
                pass  # HEARTBEAT_ACK: that something was heard is all it says

    def telemetry(self, sent: SendTelemetry) -> None:
        self.send(legacy.encode(legacy.Telemetry(sent.channel, sent.seq, sent.ts_ms, sent.body)))

    def answer(self, answer: AnswerCommand) -> None:
        status = legacy.ReplyStatus(answer.status.value)
        self.send(legacy.encode(legacy.CommandReply(answer.id, status, answer.detail)))

    def report(self, report: DeviceReport) -> None:
        self.send(legacy.encode(legacy.ConfigReport(msgspec.json.encode(report))))


def read_orders(document: bytes, device: str) -> Orders | None:
    """The orders in a configuration document; None (and a line in the log) when there are none to read."""
    try:
        return _ORDERS.decode(document)
    except msgspec.DecodeError as exc:
        if document.strip() not in (b"", b"{}"):
            log.warning("orders_not_understood", device=device, error=str(exc))
        return None


_ORDERS = msgspec.json.Decoder(Orders)


class _State(msgspec.Struct, frozen=True):
    desired: msgspec.Raw = msgspec.Raw(b"null")  # in a union with None, msgspec takes Raw for null alone


class _Accepted(msgspec.Struct, frozen=True):
    state: _State = _State()
    timestamp: int | None = None


class _Rejected(msgspec.Struct, frozen=True):
    code: int = 0
    timestamp: int | None = None


class _DeltaState(msgspec.Struct, frozen=True):
    epoch: int | None = None


class _Delta(msgspec.Struct, frozen=True):
    state: _DeltaState


class _Request(msgspec.Struct, frozen=True):
    name: str
    expires_at: float
    params: msgspec.Raw = msgspec.Raw(b"{}")
    mode: str = "execute"
    replayed: msgspec.Raw = msgspec.Raw(b"false")


_ACCEPTED = msgspec.json.Decoder(_Accepted)
_REJECTED = msgspec.json.Decoder(_Rejected)
_DELTA = msgspec.json.Decoder(_Delta)
_REQUEST = msgspec.json.Decoder(_Request)
_NOT_REPLAYED = frozenset({b"false", b"null"})

# How an answer is written on AWS's command topics: status and, where it is not the plain case, reasonCode.
_RESPONSES: dict[AnswerStatus, tuple[str, str]] = {
    AnswerStatus.ACKNOWLEDGED: ("IN_PROGRESS", ""),
    AnswerStatus.SUCCEEDED: ("SUCCEEDED", ""),
    AnswerStatus.FAILED: ("FAILED", "FAILED"),
    AnswerStatus.WOULD_EXECUTE: ("SUCCEEDED", "WOULD_EXECUTE"),
    AnswerStatus.WOULD_REFUSE: ("REJECTED", "WOULD_REFUSE"),
    AnswerStatus.DUPLICATE: ("REJECTED", "DUPLICATE"),
    AnswerStatus.EXPIRED: ("REJECTED", "EXPIRED"),
}
_REFUSALS = frozenset({"WRONG_SIDE", "BUSY"})


def response(status: AnswerStatus, detail: bytes) -> bytes:
    """An answer as the payload of `…/executions/{id}/response/json`."""
    said: dict[str, Any] = msgspec.json.decode(detail)
    name, code = _RESPONSES[status]
    payload: dict[str, Any] = {"status": name}
    if (path := said.pop(BROUGHT_BY, None)) is not None:
        payload[BROUGHT_BY] = path
    if status is AnswerStatus.FAILED and said.get("code") in _REFUSALS:
        payload["status"] = "REJECTED"
    if code:
        if status is AnswerStatus.FAILED:
            code = str(said.get("code", code))
        payload["statusReason"] = {"reasonCode": code, "reasonDescription": str(said.get("reason", ""))}
    elif said:
        payload["result"] = said
    return msgspec.json.encode(payload)


class MqttLink(Link):
    """The new side: MQTT 3.1.1, QoS 1, a persistent session."""

    path = Path.NEW

    def __init__(self, host: Host, credential: str) -> None:
        super().__init__(host)
        self._credential = credential
        self._decoder = mqtt.Decoder(max_packet=MAX_PACKET)
        self._packet_id = 0
        self._waiting: dict[int, Event | tuple[str, int] | None] = {}  # what a PUBACK will mean
        device = host.device
        self._shadow = f"$aws/things/{device}/shadow/name/{SHADOW_NAME}"
        self._commands = f"$aws/commands/things/{device}/executions/"

    def hello(self) -> None:
        connect = mqtt.Connect(
            client_id=self.host.device,
            clean=False,
            keep_alive_s=KEEP_ALIVE_S,
            username=self.host.device,
            password=self._credential.encode(),
        )
        self.send(mqtt.encode(connect))

    def goodbye(self) -> bytes:
        return mqtt.encode(mqtt.Disconnect())

    def beat(self) -> None:
        self.send(mqtt.encode(mqtt.PingReq()))

    def take(self, data: bytes) -> None:
        acked: list[tuple[str, int]] = []
        for packet in self._decoder.feed(data):
            if self.ended:
                return
            if type(packet) is mqtt.PubAck:
                meaning = self._waiting.pop(packet.packet_id, None)
                if isinstance(meaning, tuple):
                    acked.append(meaning)
                elif meaning is not None:
                    self.host.event(self, meaning)
            else:
                self._take(packet)
        if acked and not self.ended:
            self.host.event(self, TelemetryAcked(Path.NEW, tuple(acked)))

    def _take(self, packet: mqtt.Packet) -> None:
        event = self.host.event
        match packet:
            case mqtt.Publish():
                try:
                    self._published(packet)
                except msgspec.DecodeError as exc:
                    log.warning(
                        "message_not_understood", device=self.host.device, topic=packet.topic, error=str(exc)
                    )
                if packet.qos:
                    # Acknowledged only once what it asked for is on disk: else it must come again.
                    ack = mqtt.puback(packet.packet_id)
                    self.host.after_stored(lambda: None if self.ended else self.send(ack))
            case mqtt.ConnAck(session_present, code):
                if code == mqtt.ConnectCode.ACCEPTED:
                    self.keep_beating(KEEP_ALIVE_S / 2, KEEP_ALIVE_S)
                    event(self, Connected(Path.NEW, session_present))
                else:
                    self.fail(Refused(Path.NEW, CONNACK_TEXT.get(code, f"CONNACK code {code}")))
            case mqtt.SubAck(_, codes):
                event(self, Subscribed(mqtt.SUBSCRIBE_REFUSED not in codes))
            case _:
                pass  # PINGRESP: that something was heard is all it says

    def _published(self, packet: mqtt.Publish) -> None:
        topic, event = packet.topic, self.host.event
        if topic.startswith(self._commands):
            request = _REQUEST.decode(packet.payload)
            id_ = topic[len(self._commands) :].split("/", 1)[0]
            # What is not plainly to be executed is not executed: a mode or a mark that says something else.
            dry_run = request.mode != "execute"
            replayed = bytes(request.replayed) not in _NOT_REPLAYED
            params, expires_at = bytes(request.params), request.expires_at
            event(self, CommandReceived(Path.NEW, id_, request.name, params, dry_run, expires_at, replayed))
        elif topic == self._shadow + "/update/delta":
            event(self, ShadowChanged(_DELTA.decode(packet.payload).state.epoch))
        elif topic == self._shadow + "/get/accepted":
            accepted = _ACCEPTED.decode(packet.payload)
            desired = bytes(accepted.state.desired)
            orders = None if desired == b"null" else read_orders(desired, self.host.device)
            event(self, ShadowAnswered(orders, time_s=_moment(accepted.timestamp)))
        elif topic == self._shadow + "/get/rejected":
            rejected = _REJECTED.decode(packet.payload)
            event(self, ShadowAnswered(None, ok=rejected.code == 404, time_s=_moment(rejected.timestamp)))

    def _publish(self, topic: str, payload: bytes, meaning: "Event | tuple[str, int] | None") -> None:
        packet_id = self._free_id()
        self._waiting[packet_id] = meaning
        self.send(mqtt.publish(topic, payload, qos=1, packet_id=packet_id))

    def _free_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % 0xFFFF + 1
            if self._packet_id not in self._waiting:
                return self._packet_id

    def subscribe(self) -> None:
        filters = (
            (self._shadow + "/get/+", 0),  # an answer that is lost is asked for again
            (self._shadow + "/update/delta", 1),
            (self._commands + "+/request/json", 1),
        )
        self.send(mqtt.encode(mqtt.Subscribe(self._free_id(), filters)))

    def telemetry(self, sent: SendTelemetry) -> None:
        payload = with_stamp(sent.body, b'"ts":%d,"seq":%d' % (sent.ts_ms, sent.seq))
        self._publish(f"dt/{self.host.device}/{sent.channel}", payload, (sent.channel, sent.seq))

    def try_telemetry(self, sent: SendTryTelemetry) -> None:
        payload = with_stamp(sent.body, b'"ts":%d' % sent.ts_ms)
        self._publish(f"dt/{self.host.device}/{sent.channel}", payload, TryTelemetryAcked())

    def answer(self, answer: AnswerCommand) -> None:
        self._publish(
            f"{self._commands}{answer.id}/response/json",
            response(answer.status, answer.detail),
            AnswerAcked(Path.NEW, answer.id, answer.status),
        )

    def report(self, report: DeviceReport) -> None:
        # Every field is written out: an absent one would leave the last value standing in the shadow.
        reported = {
            "epoch": report.epoch,
            "phase": report.phase.value,
            "flags": report.flags,
            "reason": report.reason,
        }
        payload = msgspec.json.encode({"state": {"reported": reported}})
        self._publish(self._shadow + "/update", payload, ReportAcked(Path.NEW))

    def shadow_get(self) -> None:
        self._publish(self._shadow + "/get", b"", None)


def _moment(timestamp: int | None) -> float | None:
    """The middle of the second that a shadow document is stamped with."""
    return None if timestamp is None else timestamp + 0.5


def with_stamp(body: bytes, stamp: bytes) -> bytes:
    """A JSON object's bytes with members put before its own."""
    inner = body.strip()
    if inner[:1] != b"{":
        raise ValueError("telemetry is a JSON object")
    rest = inner[1:].lstrip()
    return b"{" + stamp + (b"" if rest.startswith(b"}") else b",") + rest
