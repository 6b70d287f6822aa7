"""Devices that publish at a given rate, in a process of their own: the load of the ingest benches.

The model is open: message `m` is meant to leave at `start + m / rate`, whether or not earlier ones have been
acknowledged, and every latency counts from that moment. A generator that is late itself says so.

The process is a plain epoll loop over non-blocking sockets, since on two cores it must leave most of them to
what is measured. It takes JSON lines on standard input (first `Fleet`, then a `Job` each) and answers with
JSON lines: `Said`.
"""

import asyncio
import contextlib
import select
import socket
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.figures import BenchFailed
from fleetlift.core import mqtt

TICK_S = 0.002  # what is due within a tick leaves at its end: lateness of that much is normal
SIGN_INS_AT_ONCE = 50
ACKS_WITHIN_S = 60.0
LATE_MAX_S = 0.1  # the 99th percentile of lateness beyond which a run does not count

_BODY = (
    b'{"ts":%.3f,"seq":%d,"lat":47.137421,"lon":8.542319,"speed":13.9,"heading":271,'
    b'"soc":78.5,"odometer":48211.7,"cabin":21.5,"locked":true,"ignition":false}'
)


class Fleet(msgspec.Struct, frozen=True):
    """Where to, and who: (client id, password). Without a password none is sent."""

    host: str
    port: int
    devices: list[tuple[str, str]]


class Job(msgspec.Struct, frozen=True):
    """Messages on `dt/{device}/{channel}`, in turn by every device, numbered from 1.

    `rate` 0: as fast as acknowledgements come, with `window` in flight for each device.
    """

    channel: str
    rate: float
    seconds: float
    window: int = 0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What was done. Latencies are from the intended time of sending; `wall_s` is until the last PUBACK.

    `closed` connections were ended by the broker; what was in flight on them was not acknowledged.
    """

    sent: int
    acked: int
    closed: int
    sending_s: float
    wall_s: float
    late_p99_s: float
    late_max_s: float
    ack_p50_s: float
    ack_p99_s: float
    ack_max_s: float

    @property
    def trouble(self) -> str:
        """What the broker did not bear; empty when it acknowledged everything."""
        if self.closed:
            return f"the broker closed {self.closed} connections"
        if self.acked != self.sent:
            return f"{self.sent - self.acked} messages were not acknowledged within {ACKS_WITHIN_S:.0f} s"
        return ""

    @property
    def late(self) -> str:
        """Why the generator makes this run invalid; empty when it does not."""
        if self.late_p99_s <= LATE_MAX_S:
            return ""
        return f"the generator itself was late (99th percentile {self.late_p99_s:.2f} s)"


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the generator: signed in, on its way, done, or why it could not go on."""

    connected: int = 0
    sent: int = 0
    acked: int = 0
    done: Load | None = None
    problem: str = ""


# -- the generator's process ------------------------------------------------------------------------------


class _Device:
    __slots__ = ("buffer", "in_flight", "name", "seq", "sock", "unsent")

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name, self.sock = name, sock
        self.seq = 0
        self.in_flight: dict[int, float] = {}
        self.buffer = b""
        self.unsent = b""


class _Generator:
    def __init__(self, devices: Sequence[_Device]) -> None:
        self.devices = devices
        self.by_fd = {device.sock.fileno(): device for device in devices}
        self.poll = select.epoll()
        for fd in self.by_fd:
            self.poll.register(fd, select.EPOLLIN)
        self.blocked: set[_Device] = set()
        self.closed: set[_Device] = set()
        self.acked = 0
        self.latencies = array("d")
        self.lateness = array("d")

    def work(self, job: Job) -> Load:
        for device in self.devices:
            device.seq = 0
        self.acked, self.latencies, self.lateness = 0, array("d"), array("d")
        clock = time.monotonic
        topics = [f"dt/{device.name}/{job.channel}" for device in self.devices]
        began = clock() + TICK_S
        since_epoch = time.time() - clock()  # read once: the intended times must not jump
        sent, told_at = 0, began
        send = self._send_due if job.rate else self._send_flat_out
        while (now := clock()) < began + job.seconds:
            sent = send(job, topics, began, since_epoch, sent, now)
            self._take_acks(now)
            if now - told_at >= 1.0:
                told_at = now
                _say(Said(sent=sent, acked=self.acked))
            if (rest := TICK_S - (clock() - now)) > 0:
                time.sleep(rest)
        if job.rate:
            sent = send(job, topics, began, since_epoch, sent, began + job.seconds)
        sending_s = clock() - began
        while self.acked + self._given_up() < sent and clock() < began + job.seconds + ACKS_WITHIN_S:
            self._flush_blocked()
            self._take_acks(clock())
            time.sleep(TICK_S)
        return Load(
            sent=sent,
            acked=self.acked,
            closed=len(self.closed),
            sending_s=sending_s,
            wall_s=clock() - began,
            late_p99_s=quantile(self.lateness, 0.99),
            late_max_s=quantile(self.lateness, 1.0),
            ack_p50_s=quantile(self.latencies, 0.5),
            ack_p99_s=quantile(self.latencies, 0.99),
            ack_max_s=quantile(self.latencies, 1.0),
        )

    def _send_due(
        self, job: Job, topics: list[str], began: float, since_epoch: float, sent: int, now: float
    ) -> int:
        devices, count, rate = self.devices, len(self.devices), job.rate
        due = min(int((now - began) * rate), round(job.seconds * rate))
        self._flush_blocked()
        lateness = self.lateness
        while sent < due:
            intended = began + sent / rate
            n = sent % count
            self._publish(devices[n], topics[n], intended, intended + since_epoch)
            lateness.append(time.monotonic() - intended)
            sent += 1
        return sent

    def _send_flat_out(
        self, job: Job, topics: list[str], began: float, since_epoch: float, sent: int, now: float
    ) -> int:
        self._flush_blocked()
        for device, topic in zip(self.devices, topics, strict=True):
            while len(device.in_flight) < job.window:
                self._publish(device, topic, now, now + since_epoch)
                sent += 1
        return sent

    def _publish(self, device: _Device, topic: str, intended: float, ts: float) -> None:
        device.seq = seq = device.seq + 1
        packet_id = seq % 0xFFFF + 1
        device.in_flight[packet_id] = intended
        data = mqtt.publish(topic, _BODY % (ts, seq), qos=1, packet_id=packet_id)
        if device.unsent:
            device.unsent += data
            return
        try:
            gone = device.sock.send(data)
        except BlockingIOError:
            gone = 0
        except OSError:
            return  # closed; its PUBACK is not coming, which is told by the reading side
        if gone < len(data):
            device.unsent = data[gone:]
            self.blocked.add(device)

    def _flush_blocked(self) -> None:
        for device in list(self.blocked):
            with contextlib.suppress(OSError):
                device.unsent = device.unsent[device.sock.send(device.unsent) :]
            if not device.unsent or device in self.closed:
                self.blocked.discard(device)

    def _given_up(self) -> int:
        return sum(len(device.in_flight) for device in self.closed)

    def _take_acks(self, now: float) -> None:
        latencies = self.latencies
        for fd, _ in self.poll.poll(0, len(self.by_fd)):
            device = self.by_fd[fd]
            try:
                data = device.sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                self.poll.unregister(fd)
                self.closed.add(device)
                continue
            if device.buffer:
                data = device.buffer + data
            whole = len(data) & ~3
            for at in range(0, whole, 4):
                if data[at] != 0x40:
                    raise BenchFailed(f"the broker sent {data[at : at + 4].hex()} where a PUBACK was due")
                intended = device.in_flight.pop(data[at + 2] << 8 | data[at + 3], None)
                if intended is None:
                    raise BenchFailed(f"the broker acknowledged to {device.name} what it had not sent")
                latencies.append(now - intended)
                self.acked += 1
            device.buffer = data[whole:]


def quantile(values: "array[float]", share: float) -> float:
    """The value that `share` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _sign_in(fleet: Fleet) -> list[_Device]:
    found: list[_Device] = []
    for first in range(0, len(fleet.devices), SIGN_INS_AT_ONCE):
        group = []
        for name, password in fleet.devices[first : first + SIGN_INS_AT_ONCE]:
            sock = socket.create_connection((fleet.host, fleet.port), timeout=30.0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = mqtt.Connect(client_id=name, clean=True, keep_alive_s=0)
            if password:
                hello = msgspec.structs.replace(hello, username=name, password=password.encode())
            sock.sendall(mqtt.encode(hello))
            group.append(_Device(name, sock))
        for device in group:
            answer = b""
            while len(answer) < 4:
                if not (more := device.sock.recv(4 - len(answer))):
                    raise BenchFailed(f"the broker closed the connection of {device.name} at sign-in")
                answer += more
            if answer != b"\x20\x02\x00\x00":
                raise BenchFailed(f"the broker did not let {device.name} in: CONNACK {answer.hex()}")
            device.sock.setblocking(False)
        found += group
    return found


def _say(what: Said) -> None:
    sys.stdout.write(msgspec.json.encode(what).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    try:
        fleet = msgspec.json.decode(sys.stdin.readline(), type=Fleet)
        generator = _Generator(_sign_in(fleet))
        _say(Said(connected=len(fleet.devices)))
        while line := sys.stdin.readline():
            _say(Said(done=generator.work(msgspec.json.decode(line, type=Job))))
        for device in generator.devices:
            with contextlib.suppress(OSError):
                device.sock.send(mqtt.encode(mqtt.Disconnect()))
    except (BenchFailed, OSError) as problem:
        _say(Said(problem=str(problem)))


# -- the bench's side -------------------------------------------------------------------------------------


class Generator:
    """The running process, all devices signed in."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def publish(self, job: Job, on_progress: Callable[[Said], None] = lambda said: None) -> Load:
        """Do one job. Raises BenchFailed when the generator itself fails."""
        await self.tell(job)
        while (said := await self.hear()).done is None:
            on_progress(said)
        return said.done

    async def tell(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(what) + b"\n")
        await self._process.stdin.drain()

    async def hear(self, within_s: float = 120.0) -> Said:
        assert self._process.stdout is not None
        async with asyncio.timeout(within_s):
            line = await self._process.stdout.readline()
        said = msgspec.json.decode(line, type=Said) if line else Said(problem="it ended")
        if said.problem:
            raise BenchFailed(f"the generator: {said.problem}")
        return said


@contextlib.asynccontextmanager
async def generator(address: tuple[str, int], devices: Sequence[tuple[str, str]]) -> AsyncIterator[Generator]:
    """A generator with `devices` (id, password) connected to the broker at `address`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.mqtt_load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    found = Generator(process)
    try:
        await found.tell(Fleet(*address, list(devices)))
        await found.hear()
        yield found
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(10.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    main()
