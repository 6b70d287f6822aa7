"""One process of the load generator: plays its devices on connections of their own, and times every answer.

Started by `load/run.py` as `python -m fleetlift.load.generator`; what is said over its pipes is in `wire.py`.

A message is meant to leave at a moment that the scenario gives, and its latency counts from there, however
long it waited for a connection, for an earlier answer, or for this process itself. What the process itself
added is measured apart (`late`, `lag`, its share of a core), and makes the run invalid when it is more than a
little.
"""

import asyncio
import base64
import contextlib
import gc
import heapq
import os
import ssl
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

import httptools
import msgspec
import uvloop

from fleetlift.core import mqtt
from fleetlift.core.errors import BadInput
from fleetlift.core.load_result import Counts
from fleetlift.core.workload import DeviceClass, Protocol, Send, class_of, cuts, sends, timeline
from fleetlift.load import histograms
from fleetlift.load.wire import (
    LINE_MOST,
    Account,
    Begin,
    Connected,
    Done,
    Failed,
    Order,
    Said,
    Stop,
    Tick,
    Work,
)

TICK_S: Final = 0.002  # what is due within a tick leaves at its end: lateness of that much is normal
PRIORITY: Final = 10
LOOK_S: Final = 0.02  # at most, when nothing is due
AT_ONCE: Final = 2000  # messages between two looks at what came back: those of a device leave together
CUTS_AT_ONCE: Final = 200
SIGN_INS_AT_ONCE: Final = 50
RECONNECTS_AT_ONCE: Final = 500
SIGN_IN_WITHIN_S: Final = 30.0
WAITING_MOST: Final = 10_000  # of one device; beyond, its messages fail
IN_FLIGHT_MOST: Final = 1000  # of one device
UNANSWERED_MOST: Final = 1_000_000  # of one process, looked at once a second; beyond, what is offered fails
RETRY_S: Final = (0.5, 10.0)
MISSING_MOST: Final = 200_000  # numbers in the account of one process


_LENGTHS: Final = tuple(mqtt.remaining_length(n) for n in range(4096))
_PING: Final = mqtt.encode(mqtt.PingReq())
_RETRY_LATER: Final = (mqtt.ConnectCode.UNAVAILABLE,)
_PAD: Final = (b"0123456789abcdefghijklmnopqrstuvwxyz" * 8000)[: 256 * 1024]

Message = tuple[float, int, int, int]  # intended, topic, number, size


class _Class:
    """The account of one class of devices. `times`: latencies of this second."""

    def __init__(self, of: DeviceClass) -> None:
        self.of = of
        self.offered = self.sent = self.accepted = self.rejected = self.failed = 0
        self.times, self.total = histograms.Times(), Counter[int]()

    @property
    def settled(self) -> bool:
        return self.offered == self.accepted + self.rejected + self.failed


class _Device(asyncio.Protocol):
    """One device: what waits, what is on its way, and its connection, which may come and go."""

    __slots__ = (
        "back_s",
        "buffer",
        "closing",
        "engine",
        "in_flight",
        "kind",
        "last_write",
        "missing",
        "name",
        "numbers",
        "packet_id",
        "password",
        "ready",
        "refused",
        "retry_s",
        "signing_in",
        "timer",
        "topics",
        "transport",
        "tried",
        "waiting",
    )

    def __init__(self, engine: "Engine", name: str, password: str, kind: _Class) -> None:
        self.engine, self.name, self.password, self.kind = engine, name, password, kind
        self.topics = [topic.of(name) for topic in kind.of.topics]
        self.numbers = [0] * len(self.topics)
        self.missing: list[tuple[int, int]] = []  # topic, number
        self.waiting: deque[Message] = deque()
        self.in_flight: dict[int, Message] = {}
        self.transport: asyncio.Transport | None = None
        self.ready = self.closing = self.tried = False
        self.back_s: float | None = None
        self.refused = ""
        self.buffer = b""
        self.packet_id = 0
        self.last_write = 0.0
        self.signing_in = 0.0
        self.retry_s = RETRY_S[0]
        self.timer: asyncio.TimerHandle | None = None

    # -- messages ------------------------------------------------------------------------------------------

    def offer(self, intended: float, topic: int, size: int) -> None:
        kind = self.kind
        kind.offered += 1
        number = self.numbers[topic] = self.numbers[topic] + 1
        if self.refused:
            kind.rejected += 1
            self._missed(topic, number)
        elif self.engine.full:
            kind.failed += 1
            self.engine.trouble("more messages were without an answer than a generator keeps")
            self._missed(topic, number)
        elif self.ready and len(self.in_flight) < self.most_in_flight and not self.waiting:
            self.send((intended, topic, number, size))
        elif len(self.waiting) < WAITING_MOST:
            self.waiting.append((intended, topic, number, size))
        else:
            kind.failed += 1
            self.engine.trouble("more messages waited for a connection than a device keeps")
            self._missed(topic, number)

    @property
    def most_in_flight(self) -> int:
        return IN_FLIGHT_MOST

    def send(self, message: Message) -> None:
        raise NotImplementedError

    def pump(self) -> None:
        """Send what waits, as far as it may go."""
        while self.waiting and self.ready and len(self.in_flight) < self.most_in_flight:
            self.send(self.waiting.popleft())

    def accepted(self, intended: float, now: float) -> None:
        kind = self.kind
        kind.accepted += 1
        kind.times.note(now - intended)
        self.engine.last_accepted = now

    def rejected(self, message: Message) -> None:
        self.kind.rejected += 1
        self._missed(message[1], message[2])

    def failed(self, message: Message) -> None:
        self.kind.failed += 1
        self._missed(message[1], message[2])

    def _missed(self, topic: int, number: int) -> None:
        engine = self.engine
        if engine.missing < MISSING_MOST:
            engine.missing += 1
            self.missing.append((topic, number))
        else:
            engine.account_whole = False

    def give_up(self) -> None:
        """The run is over: what was not answered has failed."""
        for message in (*self.in_flight.values(), *self.waiting):
            self.failed(message)
        self.in_flight.clear()
        self.waiting.clear()

    # -- the connection ------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Until signed in, refused or failed; a failure is tried again later by itself."""
        engine = self.engine
        self.closing = False
        self.signing_in = time.monotonic()
        try:
            async with asyncio.timeout(SIGN_IN_WITHIN_S):
                await engine.loop.create_connection(
                    lambda: self,
                    engine.endpoint.host,
                    engine.endpoint.port,
                    ssl=engine.tls,
                    server_hostname=engine.endpoint.host if engine.tls else None,
                )
        except (OSError, TimeoutError, ssl.SSLError) as exc:
            engine.trouble(f"no connection: {str(exc) or type(exc).__name__}")
            self.tried = True
            self._again()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""
        self.last_write = time.monotonic()
        self.timer = self.engine.loop.call_later(SIGN_IN_WITHIN_S, self._too_slow)
        self.greet()

    def greet(self) -> None:
        raise NotImplementedError

    def signed_in(self) -> None:
        self._forget_timer()
        self.ready = self.tried = True
        self.retry_s = RETRY_S[0]
        self.engine.connected += 1
        histograms.record(self.engine.sign_in, time.monotonic() - self.signing_in)
        self.pump()

    def refuse(self, why: str) -> None:
        """The target will not let this device in, however often it asks."""
        self._forget_timer()
        self.refused, self.tried = why, True
        self.engine.refused += 1
        self.engine.trouble(why)
        for message in self.waiting:
            self.rejected(message)
        self.waiting.clear()
        self.close()

    def close(self, back_s: float | None = None) -> None:
        """End the connection on purpose; come back at `back_s`, if ever."""
        self.closing, self.back_s = True, back_s
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_timer()
        if self.ready:
            self.engine.connected -= 1
        was_ready, self.ready, self.transport = self.ready, False, None
        self.tried = True
        self.lost()
        if self.refused or self.engine.over:
            return
        if not self.closing:
            self.engine.closed += 1
            when = "" if was_ready else " at sign-in"
            self.engine.trouble(f"the target closed a connection{when}{f': {exc}' if exc else ''}")
            self._again()
        elif self.back_s is not None:
            self.engine.come_back(self, max(self.back_s - time.monotonic(), 0.0))
            self.back_s = None

    def lost(self) -> None:
        """What was on its way goes again with the next connection, oldest first: as devices do."""
        if self.in_flight:
            self.waiting.extendleft(reversed(self.in_flight.values()))
            self.in_flight.clear()

    def _too_slow(self) -> None:
        self.engine.trouble("the target did not answer a sign-in in time")
        if self.transport is not None:
            self.transport.abort()

    def _forget_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _again(self) -> None:
        if not self.engine.over:
            self.engine.come_back(self, self.retry_s)
            self.retry_s = min(self.retry_s * 2, RETRY_S[1])


class _MqttDevice(_Device):
    """QoS 0 or 1. PUBACKs are taken straight from the bytes: they are nearly all that comes."""

    __slots__ = ("encoded",)

    def __init__(self, engine: "Engine", name: str, password: str, kind: _Class) -> None:
        super().__init__(engine, name, password, kind)
        self.encoded = [len(t.encode()).to_bytes(2, "big") + t.encode() for t in self.topics]

    def greet(self) -> None:
        hello = mqtt.Connect(client_id=self.name, keep_alive_s=round(self.engine.keep_alive_s))
        if self.password:
            hello = msgspec.structs.replace(hello, username=self.name, password=self.password.encode())
        assert self.transport is not None
        self.transport.write(mqtt.encode(hello))

    def send(self, message: Message) -> None:
        intended, topic, number, size = message
        engine = self.engine
        body = engine.body(intended, number, size)
        name = self.encoded[topic]
        assert self.transport is not None
        if engine.qos:
            packet_id = self.packet_id % 0xFFFF + 1
            while packet_id in self.in_flight:
                packet_id = packet_id % 0xFFFF + 1
            self.packet_id = packet_id
            self.in_flight[packet_id] = message
            rest = len(name) + 2 + len(body)
            length = _LENGTHS[rest] if rest < 4096 else mqtt.remaining_length(rest)
            self.transport.write(b"".join((b"\x32", length, name, packet_id.to_bytes(2, "big"), body)))
        else:
            rest = len(name) + len(body)
            self.transport.write(b"".join((b"\x30", mqtt.remaining_length(rest), name, body)))
            self.accepted(intended, time.monotonic())
        self.kind.sent += 1
        self.last_write = engine.now

    def data_received(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
        at, end, now = 0, len(data), time.monotonic()
        in_flight = self.in_flight
        while end - at >= 2:
            length = data[at + 1]
            if length > 127:
                self._unexpected(data[at:])
                return
            after = at + 2 + length
            if after > end:
                break
            kind = data[at]
            if kind == 0x40 and length == 2:
                message = in_flight.pop(data[at + 2] << 8 | data[at + 3], None)
                if message is None:
                    self.engine.trouble("the target acknowledged what was not on its way")
                else:
                    self.accepted(message[0], now)
            elif kind == 0x20 and length == 2 and not self.ready:
                self._answered(data[at + 3])
            elif kind != 0xD0:  # a PINGRESP needs nothing
                self._unexpected(data[at:])
                return
            at = after
        self.buffer = data[at:]
        if self.waiting:
            self.pump()

    def _answered(self, code: int) -> None:
        if code == mqtt.ConnectCode.ACCEPTED:
            self.signed_in()
        elif code in _RETRY_LATER:
            self.engine.trouble("the target was not available at sign-in")
            if self.transport is not None:
                self.transport.abort()
        else:
            self.refuse(f"the target did not let a device in (CONNACK {code})")

    def _unexpected(self, data: bytes) -> None:
        self.engine.trouble(f"the target sent what no device asked for ({data[:4].hex()})")
        if self.transport is not None:
            self.transport.abort()


class _HttpDevice(_Device):
    """One request at a time on a connection that is kept; what comes meanwhile waits its turn."""

    __slots__ = ("heads", "parser")

    def __init__(self, engine: "Engine", name: str, password: str, kind: _Class) -> None:
        super().__init__(engine, name, password, kind)
        endpoint = engine.endpoint
        head = f"Host: {endpoint.host}:{endpoint.port}\r\nContent-Type: application/json\r\n"
        if endpoint.auth == "basic" and password:
            both = base64.b64encode(f"{name}:{password}".encode()).decode()
            head += f"Authorization: Basic {both}\r\n"
        elif endpoint.auth == "bearer":
            head += f"Authorization: Bearer {password}\r\n"
        self.heads = []
        for topic in self.topics:
            path = endpoint.path
            for word, value in (("device", name), ("topic", topic), ("password", password)):
                path = path.replace("{" + word + "}", quote(value, safe="/" if word == "topic" else ""))
            self.heads.append(f"POST {path} HTTP/1.1\r\n{head}Content-Length: ".encode())
        self.parser: Any = None

    @property
    def most_in_flight(self) -> int:
        return 1

    def greet(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.signed_in()

    def send(self, message: Message) -> None:
        intended, topic, number, size = message
        body = self.engine.body(intended, number, size)
        assert self.transport is not None
        self.in_flight[0] = message
        self.transport.write(b"%s%d\r\n\r\n%s" % (self.heads[topic], len(body), body))
        self.kind.sent += 1
        self.last_write = self.engine.now

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.engine.trouble(f"the target's answer is not HTTP: {type(exc).__name__}")
            if self.transport is not None:
                self.transport.abort()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self.parser.get_status_code()
        if 100 <= status < 200:
            return
        message = self.in_flight.pop(0, None)
        if message is not None:
            if 200 <= status < 300:
                self.accepted(message[0], time.monotonic())
            else:
                self.engine.trouble(f"the target answered {status}")
                self.rejected(message)
        if not self.parser.should_keep_alive() and self.transport is not None:
            self.close(back_s=0.0)
            return
        self.engine.loop.call_soon(self.pump)  # not within the parser's own call

    def lost(self) -> None:
        """Nobody knows whether a request without an answer was obeyed: it has failed, and is not repeated."""
        for message in self.in_flight.values():
            self.failed(message)
        self.in_flight.clear()


class Engine:
    """All devices of this process, and the clock by which they send."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        scenario = work.scenario
        self.work, self.loop, self.endpoint = work, loop, work.endpoint
        self.qos, self.keep_alive_s = scenario.qos, scenario.keep_alive_s
        self.tls = ssl.create_default_context(cafile=work.endpoint.ca) if work.endpoint.tls else None
        self.classes = [_Class(of) for of in scenario.classes]
        kinds = class_of(scenario)
        make = _HttpDevice if scenario.protocol is Protocol.HTTP else _MqttDevice
        self.devices: list[_Device] = [
            make(self, p.device, p.password, self.classes[kinds[p.number]]) for p in work.players
        ]
        self.connected = self.refused = self.closed = self.reconnects = self.missing = 0
        self.account_whole = True
        self.over = self.stopping = self.full = False
        self.now = 0.0
        self.begin = 0.0
        self.epoch = 0.0
        self.last_accepted = 0.0
        self.late, self.late_now = Counter[int](), histograms.Times()
        self.lag, self.sign_in = histograms.empty(), histograms.empty()
        self._troubles: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Semaphore(RECONNECTS_AT_ONCE)
        self._head = b'{"ts":%%.3f,"seq":%%d,"load":"%s"' % work.run.encode()
        self._second = 0
        self._told = [0, 0, 0]
        self._cuts = self._cuts_of(work)

    def body(self, intended: float, number: int, size: int) -> bytes:
        """JSON of about `size` bytes; a message that is sent again is the same one to the byte."""
        head = self._head % (intended + self.epoch, number)
        pad = size - len(head) - 10
        return b'%s,"pad":"%s"}' % (head, _PAD[:pad]) if pad > 0 else head + b"}"

    def trouble(self, text: str) -> None:
        if text in self._troubles or len(self._troubles) < 50:
            self._troubles[text] += 1

    # -- connections ---------------------------------------------------------------------------------------

    async def sign_all_in(self) -> None:
        """Every device has tried once when this is over."""
        queue = iter(self.devices)

        async def one_after_the_other() -> None:
            for device in queue:
                await device.connect()
                while not device.tried:  # noqa: ASYNC110 - a thousand events for one phase would cost more
                    await asyncio.sleep(0.002)

        async def tell() -> None:
            while True:
                await asyncio.sleep(0.5)
                say(Connected(devices=self.connected, refused=self.refused))

        telling = self.loop.create_task(tell())
        try:
            await asyncio.gather(*(one_after_the_other() for _ in range(SIGN_INS_AT_ONCE)))
        finally:
            telling.cancel()
        self.reconnects = 0

    def say_ready(self) -> None:
        (problem, _), *_ = self._troubles.most_common(1) or [("", 0)]
        say(Connected(devices=self.connected, refused=self.refused, over=True, problem=problem))

    def come_back(self, device: _Device, after_s: float) -> None:
        """Connect again after that time, not too many at once."""

        async def connect() -> None:
            if device.transport is not None or self.over:
                return
            async with self._gate:
                self.reconnects += 1
                await device.connect()

        def start() -> None:
            task = self.loop.create_task(connect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.loop.call_later(after_s, start)

    def _cuts_of(self, work: Work) -> deque[tuple[float, int, float]]:
        if not work.scenario.storms:
            return deque()
        found = [
            (cut.at_s, n, cut.back_s)
            for n, player in enumerate(work.players)
            for cut in cuts(work.scenario, player.number)
        ]
        return deque(sorted(found))

    def _cut_some(self) -> None:
        for _ in range(CUTS_AT_ONCE):
            if not self._cuts or self.begin + self._cuts[0][0] > self.now:
                return
            _, n, back_s = self._cuts.popleft()
            device = self.devices[n]
            if device.transport is not None and not device.refused:
                device.close(self.begin + back_s)

    # -- time ----------------------------------------------------------------------------------------------

    def streams(self) -> tuple[list[Iterator[Send]], list[Send | None]]:
        scenario, time_line = self.work.scenario, timeline(self.work.scenario)
        streams = [
            sends(scenario, player.number, device.kind.of, time_line)
            for player, device in zip(self.work.players, self.devices, strict=True)
        ]
        return streams, [next(stream, None) for stream in streams]

    async def play(
        self, order: Begin, streams: list[Iterator[Send]], pending: list[Send | None]
    ) -> tuple[float, float]:
        """Offer everything in its time. Returns how long that took, and the share of a core it needed."""
        clock, devices = time.monotonic, self.devices
        self.begin, self.epoch = order.at, order.epoch
        begin, until = order.at, order.at + self.work.scenario.for_s
        heap = [(begin + send.at_s, n) for n, send in enumerate(pending) if send is not None]
        heapq.heapify(heap)
        note = self.late_now.note
        counted = [self.late_now, *(kind.times for kind in self.classes)]
        await asyncio.sleep(max(begin - clock(), 0.0))
        cpu, planned = time.process_time(), clock()
        while not self.stopping:
            self.now = now = clock()
            self.lag.record_value(max(int((now - planned) * 1e6), 1))
            if now >= until and not heap:
                break
            left = AT_ONCE
            while heap and left and heap[0][0] <= now:
                intended, n = heap[0]
                send = pending[n]
                assert send is not None
                devices[n].offer(intended, send.topic, send.size)
                note(clock() - intended)
                pending[n] = send = next(streams[n], None)
                if send is None:
                    heapq.heappop(heap)
                else:
                    heapq.heapreplace(heap, (begin + send.at_s, n))
                left -= 1
            for times in counted:
                times.count()
            if self._cuts:
                self._cut_some()
            while now >= begin + self._second + 1:
                self.tick()
            if left:
                due = heap[0][0] if heap else until
                planned = now + (TICK_S if due < now + TICK_S else min(due - now, LOOK_S))
                await asyncio.sleep(planned - clock())
            else:
                planned = clock()
                await asyncio.sleep(0)
        lasted_s = max(clock() - begin, 1e-9)
        return lasted_s, (time.process_time() - cpu) / lasted_s

    def tick(self) -> None:
        """The end of a second: tell it, lay its times to the others, keep connections alive."""
        second, late = Counter[int](), self.late_now.take()
        for kind in self.classes:
            counts = kind.times.take()
            second.update(counts)
            kind.total.update(counts)
        self.late.update(late)
        offered = sum(kind.offered for kind in self.classes)
        accepted = sum(kind.accepted for kind in self.classes)
        errors = sum(kind.rejected + kind.failed for kind in self.classes)
        say(
            Tick(
                second=self._second,
                offered=offered - self._told[0],
                accepted=accepted - self._told[1],
                errors=errors - self._told[2],
                connected=self.connected,
                late_p99_s=histograms.percentile_s(late, 99),
                latency=histograms.encoded(histograms.laid(second)) if second else "",
            )
        )
        self._told = [offered, accepted, errors]
        self.full = offered - accepted - errors > UNANSWERED_MOST
        self._second += 1
        if self.keep_alive_s and self.work.scenario.protocol is Protocol.MQTT:
            silent_since = time.monotonic() - self.keep_alive_s / 2
            for device in self.devices:
                if device.ready and device.last_write < silent_since and device.transport is not None:
                    device.transport.write(_PING)
                    device.last_write = self.now

    async def drain(self) -> None:
        """Wait for what is on its way; what has not been answered then has failed."""
        end = time.monotonic() + self.work.drain_s
        while not all(kind.settled for kind in self.classes) and time.monotonic() < end:
            await asyncio.sleep(0.02)
            self.now = now = time.monotonic()
            if now >= self.begin + self._second + 1:
                self.tick()
        self.over = True
        for device in self.devices:
            device.give_up()
        self.tick()

    def done(self, lasted_s: float, cpu: float) -> Done:
        account = []
        if self.work.account:
            for device in self.devices:
                missing: dict[int, list[int]] = {}
                for topic, number in device.missing:
                    missing.setdefault(topic, []).append(number)
                account += [
                    Account(
                        device=device.name,
                        topic=device.topics[n],
                        last=last,
                        missing=sorted(missing.get(n, [])),
                    )
                    for n, last in enumerate(device.numbers)
                    if last
                ]
        return Done(
            counts=[
                Counts(
                    offered=k.offered,
                    sent=min(k.sent, k.offered),
                    accepted=k.accepted,
                    rejected=k.rejected,
                    failed=k.failed,
                )
                for k in self.classes
            ],
            latency=[histograms.encoded(histograms.laid(k.total)) if k.total else "" for k in self.classes],
            late=histograms.encoded(histograms.laid(self.late)),
            lag=histograms.encoded(self.lag),
            sign_in=histograms.encoded(self.sign_in),
            cpu=cpu,
            lasted_s=lasted_s,
            last_accepted_s=max(self.last_accepted - self.begin, 0.0),
            closed=self.closed,
            reconnects=self.reconnects,
            problems=dict(self._troubles.most_common(10)),
            account=account,
            account_whole=self.account_whole,
        )

    async def close(self) -> None:
        self.over = True
        for number, device in enumerate(self.devices):
            if device.transport is not None:
                if device.ready and self.work.scenario.protocol is Protocol.MQTT:
                    device.transport.write(mqtt.encode(mqtt.Disconnect()))
                device.closing = True
                device.transport.close()
            if number % CUTS_AT_ONCE == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)


def say(what: Said) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()


async def _lines(loop: asyncio.AbstractEventLoop) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=LINE_MOST)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _run() -> None:
    loop = asyncio.get_running_loop()
    lines = await _lines(loop)
    engine = Engine(msgspec.json.decode(await lines.readline(), type=Work), loop)
    await engine.sign_all_in()
    streams, pending = engine.streams()
    gc.collect()
    gc.freeze()  # what is there stays: looking through it again and again would make the generator late
    gc.set_threshold(100_000, 50, 100)
    engine.say_ready()

    async def until_stopped() -> None:
        line = await lines.readline()
        if not line:
            os._exit(1)  # who started it has given up, and nobody listens any more
        if isinstance(msgspec.json.decode(line, type=Order), Stop):
            engine.stopping = True

    if not (line := await lines.readline()):
        return
    order = msgspec.json.decode(line, type=Order)
    if isinstance(order, Begin):
        stopped = loop.create_task(until_stopped())
        lasted_s, cpu = await engine.play(order, streams, pending)
        await engine.drain()
        say(engine.done(lasted_s, cpu))
        stopped.cancel()
    await engine.close()


def _ask_to_be_served_first() -> None:
    """Where it may: what it needs is little, and beside a busy target it would be late for others' sake."""
    with contextlib.suppress(OSError):
        os.nice(-PRIORITY)
    with contextlib.suppress(OSError):  # Linux weighs sessions first, and processes within them
        Path("/proc/self/autogroup").write_text(str(-PRIORITY))


def main() -> None:
    _ask_to_be_served_first()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run())
    except (OSError, BadInput, msgspec.MsgspecError) as problem:
        say(Failed(problem=str(problem) or type(problem).__name__))


if __name__ == "__main__":
    main()
