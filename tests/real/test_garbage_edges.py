"""Garbage at the doors of a whole backend: a clear refusal, no fault inside, others served, no growth."""

import asyncio
import json
import random
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
import pytest_asyncio

from fleetlift.core import mqtt
from fleetlift.testing import RunningBackend

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

V1 = "/api/v1"
SECRET = "x" * 40
GROWTH_MB_MAX = 96  # of one process, by all the garbage of a test; a leak of each message would be more


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(backend: RunningBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=backend.url,
        headers={"authorization": f"Bearer {backend.token}"},
        trust_env=False,
        timeout=20,
    ) as client:
        await client.post(f"{V1}/tenants", json={"id": "t"})
        for device in ("rude", "polite"):
            body = {"tenant": "t", "credentials": [{"kind": "token", "value": SECRET}]}
            assert (await client.put(f"{V1}/devices/{device}", json=body)).status_code == 201
        yield client


def log_of(backend: RunningBackend, role: str) -> str:
    return (backend.data_dir / "logs" / f"{role}.log").read_text()


def rss_mb(backend: RunningBackend) -> dict[tuple[str, int], float]:
    """Memory of each worker and of NATS Server; PostgreSQL's is shared and its own."""
    found = {}
    for child in psutil.Process(backend.pid).children(recursive=True):
        words = child.cmdline()
        name = "nats" if "nats-server" in words[:1][0] else words[4] if "worker" in words else ""
        if name:
            found[name, child.pid] = child.memory_info().rss / 2**20
    return found


def cursor(key: Any) -> str:
    return urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


DEEP = b"[" * 5000 + b"]" * 5000
REQUESTS: list[tuple[str, str, bytes | None]] = [
    ("PUT", "/devices/x", b'{"tenant": "\xff\xfe"}'),
    ("PUT", "/devices/x", b'{"attributes": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}"),
    ("PUT", "/devices/x", b'{"tenant": "t", "attributes": {"a": "\\ud800"}}'),
    ("PUT", "/devices/x", b'{"tenant": "t", "attributes": {"a": "\\u0000"}}'),
    ("PUT", "/devices/x", b'{"tenant": "t", "attributes": {"a": 1e999}}'),
    ("PUT", "/devices/x", b'{"tenant": "t\\u0000"}'),
    ("PUT", "/devices/x", b""),
    ("PUT", "/devices/x", b"null"),
    ("PUT", "/devices/x", DEEP),
    ("PUT", "/devices/%00", b'{"tenant": "t"}'),
    ("PUT", "/devices/a%2Fb", b'{"tenant": "t"}'),
    ("PUT", "/devices/%ff%fe", b'{"tenant": "t"}'),
    ("GET", "/devices/%00", None),
    ("GET", "/devices/%ff%fe", None),
    ("GET", "/devices?where=%00", None),
    ("GET", "/devices?where=%ff", None),
    ("GET", "/devices?where=id==", None),
    ("GET", "/devices?limit=-1", None),
    ("GET", "/devices?limit=99999999999999999999999999", None),
    ("GET", "/devices?after=x", None),
    ("GET", f"/devices?after={cursor([5])}", None),
    ("GET", f"/devices?after={cursor(['a' + chr(0)])}", None),
    ("GET", f"/dead-letters?after={cursor([10**30])}", None),
    ("GET", f"/dead-letters?after={cursor([2**63])}", None),
    ("GET", f"/migrations?after={cursor([[]])}", None),
    ("GET", "/devices/polite/telemetry?since=0001-01-01T00:00:00%2B14:00", None),
    ("GET", "/devices/polite/telemetry?since=9999-12-31T23:59:59-14:00", None),
    ("GET", "/devices/polite/telemetry?since=tomorrow", None),
    ("GET", "/devices/polite/telemetry?since=1e400", None),
    ("GET", "/devices/polite/telemetry?until=NaN", None),
    ("GET", "/devices/polite/telemetry?channel=%00", None),
    ("GET", "/devices/polite/shadow?name=%00", None),
    ("GET", "/devices/polite/shadow?name=" + "n" * 65, None),
    ("PATCH", "/devices/polite/shadow", b'{"state": {"desired": ' + DEEP + b"}}"),
    ("PATCH", "/devices/polite/shadow", b'{"state": {"desired": {"a": 1}}, "version": 1e30}'),
    ("PATCH", "/devices/polite/shadow", b'{"state": {"desired": {"a": 1}}, "version": 99999999999999999999}'),
    ("PATCH", "/devices/polite/shadow", b'{"clientToken": "\\ud800", "state": {}}'),
    ("PATCH", "/devices/polite/shadow", b"\xff"),
    ("POST", "/devices/polite/commands", b'{"name": "x", "expires_in": 1e308}'),
    ("POST", "/devices/polite/commands", b'{"name": "x", "expires_in": NaN}'),
    ("POST", "/devices/polite/commands", b'{"name": "x\\u0000"}'),
    ("POST", "/devices/polite/commands", b'{"name": "", "params": {}}'),
    ("POST", "/devices/polite/commands", b'{"name": "x", "params": {"a": ' + DEEP + b"}}"),
    ("GET", "/commands/%00", None),
    ("GET", "/commands/not-a-uuid", None),
    ("DELETE", "/tokens/%00", None),
    ("POST", "/tokens", b'{"name": "\\u0000", "role": "viewer"}'),
    ("POST", "/tokens", b'{"name": "n", "role": "viewer", "tenant": "\\u0000"}'),
    ("POST", "/tenants", b'{"id": "ok-1", "name": "\\u0000"}'),
    ("POST", "/migrations", b'{"plan": "\\u0000"}'),
    ("POST", "/migrations", b'{"plan": "\\ud800"}'),
    ("POST", "/migrations/check", b'{"plan": "a: &a [x]\\nb: [*a, *a]"}'),
    ("GET", "/migrations/%00", None),
    ("GET", "/migrations/x/devices?state=nonsense", None),
    ("POST", "/migrations/x/revert", b'{"wave": true, "device": "d"}'),
    ("POST", "/migrations/x/pause?wait=-1", None),
    ("POST", "/migrations/x/pause?wait=inf", None),
    ("POST", "/migrations/x/pause?wait=nan", None),
]


async def test_each_bad_request_is_told_what_is_wrong(
    backend: RunningBackend, api: httpx.AsyncClient
) -> None:
    """A 4xx with a reason, whatever the bytes; nothing of it is a fault inside."""
    for method, path, body in REQUESTS:
        answer = await api.request(method, f"{V1}{path}", content=body)
        if path.startswith(("/devices/polite/telemetry?since=0001", "/devices/polite/telemetry?since=9999")):
            assert answer.status_code in (200, 400), (path, answer.text)  # odd, and moments all the same
            continue
        assert 400 <= answer.status_code < 500, (method, path, body and body[:80], answer.text[:500])
        document = answer.json()
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert document["detail"] and document["status"] == answer.status_code
        assert len(answer.content) < 20_000, "an error does not send the input back"
    assert "request_failed" not in log_of(backend, "api")


async def test_bytes_that_are_no_http_end_their_own_connection_only(
    backend: RunningBackend, api: httpx.AsyncClient
) -> None:
    host, port = backend.url.removeprefix("http://").split(":")
    chance = random.Random(5)
    head = b"POST /api/v1/devices HTTP/1.1\r\nHost: x\r\n"
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client that came to the wrong door
        chance.randbytes(5000),
        head + b"Content-Length: -5\r\n\r\n",
        head + b"Content-Length: 99999999999999999999\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        head + b"x-long: " + b"a" * 200_000 + b"\r\n\r\n",
        head + b"".join(b"x-%d: y\r\n" % n for n in range(20_000)) + b"\r\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        writer.write_eof()
        try:
            answer = await asyncio.wait_for(reader.read(100_000), 15)
        except ConnectionError:
            answer = b""
        assert not answer or answer.split(b" ", 2)[1][:1] == b"4", (data[:60], answer[:200])
        writer.close()
    assert (await api.get("/readyz")).status_code == 200
    assert "Traceback" not in log_of(backend, "api")


async def speak(backend: RunningBackend, data: bytes, *, wait_s: float = 5.0) -> bytes:
    """What the device edge answers to `data`, up to the moment when it closes or `wait_s` are over."""
    reader, writer = await asyncio.open_connection(*backend.mqtt)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(65536), wait_s)
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.transport.abort()


def hello(device: str, **how: Any) -> bytes:
    return mqtt.encode(mqtt.Connect(client_id=device, username=device, password=SECRET.encode(), **how))


class Device:
    """A signed-in device that sends with QoS 1."""

    def __init__(self, backend: RunningBackend, name: str) -> None:
        self.backend, self.name, self.sent = backend, name, 0
        self._decoder = mqtt.Decoder()

    async def open(self) -> "Device":
        """Signed in; comes back after a connection that was closed unanswered, as any device does.

        The broker does so when its store cannot find the device's session in four seconds, which happens on
        a busy machine. An answer that refuses is never asked again.
        """
        for wait_s in (0.5, 2.0, 8.0, None):
            self.reader, self.writer = await asyncio.open_connection(*self.backend.mqtt)
            self.writer.write(hello(self.name))
            if answer := await asyncio.wait_for(self.reader.read(4), 20):
                assert answer == b"\x20\x02\x00\x00"
                return self
            self.writer.close()
            if wait_s is not None:
                await asyncio.sleep(wait_s)
        pytest.fail("the server closes every connection before it answers")

    async def send(self, messages: list[tuple[str, bytes]]) -> None:
        """Returns once every message was acknowledged.

        The broker closes a connection whose messages it cannot store in five seconds, which happens on a busy
        machine; a device then comes back and sends them again, a few times at most.
        """
        for at in range(0, len(messages), 200):
            part = messages[at : at + 200]
            for _ in range(3):
                if await self._acknowledged(part):
                    break
                self._decoder = mqtt.Decoder()
                await self.open()
            else:
                pytest.fail("the server closes the connection again and again")

    async def _acknowledged(self, part: list[tuple[str, bytes]]) -> bool:
        """False when the server closed the connection before all was acknowledged."""
        self.writer.write(
            b"".join(mqtt.publish(t, p, qos=1, packet_id=n) for n, (t, p) in enumerate(part, 1))
        )
        left = len(part)
        while left:
            if not (data := await asyncio.wait_for(self.reader.read(65536), 20)):
                return False
            left -= sum(isinstance(p, mqtt.PubAck) for p in self._decoder.feed(data))
        return True


async def served(backend: RunningBackend, api: httpx.AsyncClient, seq: int) -> None:
    """A device that behaves is still let in, and what it sends is stored."""
    device = await Device(backend, "polite").open()
    await device.send([("dt/polite/status", json.dumps({"seq": seq, "ts": time.time()}).encode())])
    device.writer.close()
    deadline = time.monotonic() + 30
    while True:
        items = (await api.get(f"{V1}/devices/polite/telemetry?order=newest&limit=5")).json()["items"]
        if any(item["seq"] == seq for item in items):
            return
        assert time.monotonic() < deadline, "what a device sent is not stored"
        await asyncio.sleep(0.05)


async def test_packets_that_are_no_mqtt_end_their_own_connection_only(
    backend: RunningBackend, api: httpx.AsyncClient
) -> None:
    """Truncated, oversized, of another level or another protocol: refused, and others go on."""
    await served(backend, api, 1)
    before = rss_mb(backend)
    whole = hello("rude")
    level = whole.replace(b"MQTT\x04", b"MQTT\x05")
    cases = [
        b"",
        whole[:7],
        level,
        whole.replace(b"MQTT\x04", b"MQIs\x03"),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"\x10\xff\xff\xff\x7f" + b"x" * 4000,
        b"\x10\xff\xff\xff\xff\xff",
        mqtt.publish("dt/rude/x", b"{}"),
        b"\xf0\x00",
        whole + b"\x30\xff\xff\xff\x7f" + b"x" * 4000,
        whole + b"\x00\x00",
        whole + whole,
        whole + b"\x82\x02\x00\x01",
        whole + b"\x34\x0e\x00\x09dt/rude/x\x00\x01{}",
        whole + b"\x32\x0d\x00\x09dt/rude/x\x00\x00{}",
        whole + mqtt.encode(mqtt.Subscribe(1, (("a/#/b", 1), ("+a", 0)))),
        whole + b"\x32\x0c\x00\x09dt/\xff\xfe/x\x00\x01",
    ]
    for data in cases:
        answer = await speak(backend, data, wait_s=0.3 if not data or data == whole[:7] else 5.0)
        if not data.startswith(whole):
            assert answer != b"\x20\x02\x00\x00", data[:40]
    chance = random.Random(11)
    for _ in range(20):  # noise, by a few hundred connections
        await asyncio.gather(
            *(
                speak(
                    backend,
                    b"\x10" + chance.randbytes(200) if n % 2 else whole + chance.randbytes(800),
                    wait_s=0.2,
                )
                for n in range(16)
            )
        )
    await served(backend, api, 2)
    await settled_memory(backend, before)


async def test_ten_thousand_payloads_of_garbage_are_kept_as_letters_and_leave_no_trace_in_memory(
    backend: RunningBackend, api: httpx.AsyncClient
) -> None:
    """Signed in, on its own topics: telemetry, shadows and answers that are none of these."""
    chance = random.Random(3)
    odd = [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b'"text"',
        b"[" * 3000,
        b'{"seq": -1}',
        b'{"seq": 1e99}',
        b'{"ts": "never", "seq": 1}',
        b'{"a": "\\u0000", "seq": 5}',
        b'{"a": "\\ud800", "seq": 6}',
        b'{"state": {"desired": ' + b'{"a":' * 40 + b"1" + b"}" * 43,
        b'{"state": 5}',
        b'{"status": "BORED"}',
    ]
    topics = [
        "dt/rude",
        "dt/rude/x",
        "dt/rude/" + "c" * 600,
        "dt/rude/a/b/c",
        "$aws/things/rude/shadow/update",
        "$aws/things/rude/shadow/get",
        "$aws/things/rude/shadow/delete",
        "$aws/things/rude/shadow/name/n/update",
        "$aws/commands/things/rude/executions/1/response/json",
        "$aws/commands/things/rude/executions/01890a5d-ac96-774b-bcce-b302099a8057/response/json",
    ]

    def some(count: int) -> list[tuple[str, bytes]]:
        return [
            (chance.choice(topics), chance.choice(odd) if n % 3 else chance.randbytes(chance.randrange(300)))
            for n in range(count)
        ]

    device = await Device(backend, "rude").open()
    await device.send(some(1000))  # what every process needs once
    await served(backend, api, 3)
    before = rss_mb(backend)
    await device.send(some(10_000))
    device.writer.close()
    await served(backend, api, 4)
    conn = await asyncpg.connect(backend.settings.database_url)
    try:
        reasons = await conn.fetch(
            "SELECT DISTINCT reason FROM dead_letter WHERE device = 'rude' AND reason <> '' LIMIT 50"
        )
    finally:
        await conn.close()
    assert any("not JSON" in r["reason"] for r in reasons)
    await settled_memory(backend, before)
    for role in ("telemetry", "state", "auth"):
        assert "Traceback" not in log_of(backend, role), role


async def settled_memory(backend: RunningBackend, before: dict[tuple[str, int], float]) -> None:
    """No process has grown for good, and none was started anew."""
    deadline = time.monotonic() + 10
    while True:
        after = rss_mb(backend)
        assert after.keys() == before.keys(), "a process died of it"
        grown = {
            who: round(mb - before[who]) for who, mb in after.items() if mb - before[who] > GROWTH_MB_MAX
        }
        if not grown:
            return
        assert time.monotonic() < deadline, f"grown by MB: {grown}"
        await asyncio.sleep(0.5)
