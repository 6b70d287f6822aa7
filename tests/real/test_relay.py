"""The relay in front of two real MQTT brokers: devices are moved under it, none stranded and nothing lost."""

import asyncio
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from mqtt_device import until
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from fleetlift.bus.embedded import server_binary
from fleetlift.certificates import own_certificates
from fleetlift.core import mqtt
from fleetlift.core.errors import BadInput, Conflict, Forbidden, Unavailable
from fleetlift.core.relaying import ProxyHeader, Routes, To, WhenNewDown
from fleetlift.core.stale_tail import Reason, may_release
from fleetlift.edge import relay as relay_module
from fleetlift.edge.relay import Relay
from fleetlift.edge.relay_admin import own_token, serving_admin
from fleetlift.levers.relay import RelayControl
from fleetlift.testing import free_port, scratch_directory

Address = tuple[str, int]
LOOPBACK = ("127.0.0.1", 0)


@asynccontextmanager
async def broker(directory: Path, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Address]:
    """A NATS Server that takes any MQTT client."""
    port, client_port = port or free_port(), free_port()
    directory.mkdir()
    config = directory / "nats.conf"
    config.write_text(
        f"""server_name: {directory.name}\nlisten: 127.0.0.1:{client_port}
        jetstream {{ store_dir: "{directory}/js" }}\nmqtt {{ listen: {host}:{port} }}"""
    )
    with (directory / "log").open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - a fork
            [server_binary(), "-c", str(config)], stdout=output, stderr=output
        )
    try:
        await answering((host, port))
        yield host, port
    finally:
        process.kill()
        process.wait()


async def answering(address: Address) -> None:
    deadline = time.monotonic() + 20
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            writer.close()
            return
        assert time.monotonic() < deadline, f"nobody listens on {address}"
        await asyncio.sleep(0.02)


class Device:
    """A device that publishes numbered messages by QoS 1 for ever, and comes back when it is cut off."""

    def __init__(self, name: str, address: Address) -> None:
        self.connects = 0
        self._sent: dict[int, int] = {}
        self._acknowledged: list[int] = []  # packet ids; a PUBACK may be seen before `publish` has returned
        self.name = name
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = self._connected
        self.client.on_publish = lambda c, u, mid, code, p: self._acknowledged.append(mid)
        self.client.connect(*address)
        self.client.loop_start()

    def _connected(self, *_: object) -> None:
        self.connects += 1

    @property
    def acknowledged(self) -> set[int]:
        return {self._sent[mid] for mid in list(self._acknowledged) if mid in self._sent}

    def publish(self, number: int) -> None:
        self._sent[self.client.publish(f"dt/{self.name}", str(number).encode(), qos=1).mid] = number

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Stored:
    """All that a broker got, by a subscriber of its own that stays connected."""

    def __init__(self, address: Address) -> None:
        self.messages: dict[str, list[int]] = {}
        self._ready = False
        self.client = Client(CallbackAPIVersion.VERSION2, client_id=f"stored-{address[1]}")
        self.client.on_message = self._message
        self.client.on_subscribe = lambda *a: setattr(self, "_ready", True)
        self.client.connect(*address)
        self.client.subscribe("dt/#", 1)
        self.client.loop_start()

    async def ready(self) -> "Stored":
        await until(lambda: self._ready, what="a subscription")
        return self

    def _message(self, client: Client, userdata: object, message: MQTTMessage) -> None:
        self.messages.setdefault(message.topic[3:], []).append(int(message.payload))

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@asynccontextmanager
async def relaying(directory: Path, old: Address, new: Address, **more: object) -> AsyncIterator[Relay]:
    async with Relay(directory, listen=LOOPBACK, old=old, new=new, **more).serving() as running:  # type: ignore[arg-type]
        yield running


@asynccontextmanager
async def answers(word: bytes) -> AsyncIterator[tuple[Address, list[bytes]]]:
    """A side that answers each line with its own word; with all that it got, a connection each."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        place = len(got)
        got.append(b"")
        with suppress(OSError):
            while data := await reader.read(65536):
                got[place] += data
                writer.write(word)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    try:
        yield server.sockets[0].getsockname()[:2], got
    finally:
        server.close()


def connect_packet(client: str) -> bytes:
    return mqtt.encode(mqtt.Connect(client_id=client))


async def come(address: Address, client: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A device connects and gets a first answer; b"" when it is closed instead."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(connect_packet(client))
    with suppress(ConnectionError):
        async with asyncio.timeout(10):
            return reader, writer, await reader.read(100)
    return reader, writer, b""


async def side_of(address: Address, client: str) -> bytes:
    _, writer, word = await come(address, client)
    writer.close()
    return word


async def test_moving_under_load_loses_no_acknowledged_message(tmp_path: Path) -> None:
    """Devices publish all the time while they are moved to the other broker and back, let go at 20 a
    second."""
    with scratch_directory("fleetlift-relay-") as directory:
        async with AsyncExitStack() as stack:
            old = await stack.enter_async_context(broker(directory / "old"))
            new = await stack.enter_async_context(broker(directory / "new"))
            relay = await stack.enter_async_context(relaying(tmp_path / "relay", old, new))
            stored = [await Stored(address).ready() for address in (old, new)]
            devices = [Device(f"car-{n}", relay.address) for n in range(10)]
            for side in stored:
                stack.callback(side.close)
            for device in devices:
                stack.callback(device.close)
            await until(lambda: all(device.connects for device in devices), what="every device")
            number = 0

            async def publish_until(done: Callable[[], bool]) -> None:
                nonlocal number
                deadline = time.monotonic() + 20
                while not done():
                    assert time.monotonic() < deadline
                    number += 1
                    for device in devices:
                        device.publish(number)
                    await asyncio.sleep(0.01)

            for epoch, default, seen in ((1, To.NEW, stored[1]), (2, To.OLD, stored[0])):
                before = {name: len(numbers) for name, numbers in seen.messages.items()}
                relay.set_routes(Routes(epoch=epoch, default=default))
                if default is To.NEW:
                    relay.release(20)
                else:  # there is no letting go of the new side: it is left by its connections ending
                    for front in list(relay.fronts):
                        front.end()
                await publish_until(
                    lambda before=before, seen=seen, epoch=epoch: all(  # type: ignore[misc]
                        len(seen.messages.get(device.name, ())) > before.get(device.name, 0) + 10
                        and relay.visitors.by_client[device.name].connections > epoch
                        for device in devices
                    )
                )
            sent = set(range(1, number + 1))
            for device in devices:
                await until(lambda device=device: device.acknowledged >= sent, within_s=20)  # type: ignore[misc]
            for device in devices:
                await until(
                    lambda name=device.name: (
                        {  # type: ignore[misc]
                            n for side in stored for n in side.messages.get(name, ())
                        }
                        >= sent
                    ),
                    what=f"all that {device.name} was told is stored",
                )


async def test_letting_go_never_exceeds_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[float] = []
    let_go = relay_module._Front.let_go

    def noted(front: relay_module._Front) -> None:
        gone.append(time.monotonic())
        let_go(front)

    monkeypatch.setattr(relay_module._Front, "let_go", noted)
    async with (
        answers(b"old") as (old, _),
        answers(b"new") as (new, _),
        relaying(tmp_path, old, new) as relay,
    ):
        clients = [await come(relay.address, f"car-{n}") for n in range(90)]
        stay = [await come(relay.address, f"truck-{n}") for n in range(5)]
        relay.set_routes(Routes(epoch=1, default=To.NEW, prefixes={"truck-": To.OLD}))
        assert relay.status().open_old == 95  # a new table moves nobody by itself
        first = relay.release(20)
        assert (first.left, first.others, first.running) == (90, 5, True)
        await until(lambda: len(gone) >= 10)
        relay.release(100)  # a new rate begins with a distance from the last one
        await until(lambda: not relay.release_status().running, within_s=20)
        for reader, writer, _ in clients:
            assert await asyncio.wait_for(reader.read(), 10) == b""  # a FIN, not a reset
            writer.close()
        assert len(gone) == 90
        assert all(later - one >= 1 / 20 for one, later in pairwise(gone[:10]))
        assert all(later - one >= 1 / 100 for one, later in pairwise(gone))
        assert relay.status().open_old == 5
        assert all(word == b"old" for _, _, word in stay)
        assert await side_of(relay.address, "car-1") == b"new"
        # With everything, those go too, and one that comes back to the old side is not thrown out for ever.
        relay.release(1000, everything=True)
        await until(lambda: not relay.release_status().running)
        assert relay.status().open_old == 0
        back = await come(relay.address, "truck-1")
        assert back[2] == b"old" and relay.status().open_old == 1
        for _, writer, _ in (*stay, back):
            writer.close()


async def test_a_table_routes_by_client_prefix_share_and_default(tmp_path: Path) -> None:
    async with (
        answers(b"old") as (old, _),
        answers(b"new") as (new, _),
        relaying(tmp_path, old, new) as relay,
    ):
        assert await side_of(relay.address, "car-1") == b"old"
        relay.set_routes(
            Routes(epoch=3, prefixes={"test-": To.NEW, "test-odd-": To.OLD}, devices={"test-odd-7": To.NEW})
        )
        found = [
            await side_of(relay.address, name) for name in ("test-1", "test-odd-1", "test-odd-7", "car-1")
        ]
        assert found == [b"new", b"old", b"new", b"old"]
        relay.set_routes(Routes(epoch=4, share_percent=50))
        names = [f"car-{n}" for n in range(60)]
        half = {name for name in names if await side_of(relay.address, name) == b"new"}
        assert 15 < len(half) < 45
        relay.set_routes(Routes(epoch=5, share_percent=80))
        more = {name for name in names if await side_of(relay.address, name) == b"new"}
        assert half < more  # who has moved stays moved
        with pytest.raises(Conflict, match="epoch 5"):
            relay.set_routes(Routes(epoch=4, share_percent=50))
        with pytest.raises(Conflict):
            relay.set_routes(Routes(epoch=5, default=To.NEW))
        assert relay.set_routes(Routes(epoch=5, share_percent=80)).epoch == 5


async def test_a_side_that_is_down_refuses_soon_and_nobody_is_sent_to_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "CONNECT_WITHIN_S", 0.4)
    nobody = ("127.0.0.1", free_port())
    async with answers(b"old") as (old, got), relaying(tmp_path, old, nobody) as relay:
        relay.set_routes(Routes(epoch=1, default=To.NEW))
        began = time.monotonic()
        assert await side_of(relay.address, "car-1") == b""
        assert time.monotonic() - began < 3
        assert got == [] and relay.status().failed_new == 1
        # One that comes while the new side starts again is only late.
        monkeypatch.setattr(relay_module, "CONNECT_WITHIN_S", 10.0)
        waiting = asyncio.create_task(come(relay.address, "car-2"))
        await until(lambda: relay.status().waiting == 1)

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"new")

        async with await asyncio.start_server(greet, *nobody):
            _, writer, word = await waiting
            assert word == b"new" and got == []
            writer.close()
        monkeypatch.setattr(relay_module, "CONNECT_WITHIN_S", 0.2)
        relay.set_routes(Routes(epoch=2, default=To.NEW, when_new_down=WhenNewDown.OLD))
        assert await side_of(relay.address, "car-3") == b"old"
        assert len(got) == 1 and relay.status().fell_back == 1


async def test_a_table_that_changes_while_a_connection_is_made_holds_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fence no connection to the old side may begin, also none that was decided just before."""
    connect = relay_module._Front._connect

    async def slowly(front: relay_module._Front, side: To) -> object:
        back = await connect(front, side)
        if side is To.OLD:
            relay.set_routes(Routes(epoch=1, default=To.NEW))
        return back

    monkeypatch.setattr(relay_module._Front, "_connect", slowly)
    async with (
        answers(b"old") as (old, got),
        answers(b"new") as (new, _),
        relaying(tmp_path, old, new) as relay,
    ):
        assert await side_of(relay.address, "car-1") == b"new"
        assert got in ([], [b""])


async def test_bytes_pass_unchanged_both_ways_and_wait_where_nobody_reads(tmp_path: Path) -> None:
    blob = random.Random(1).randbytes(24 * 1024 * 1024)
    reading = asyncio.Event()
    whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def lazy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reading.wait()
        data = await reader.read(-1)
        writer.write(data[::-1])
        await writer.drain()
        writer.close()
        whole.set_result(data)

    server = await asyncio.start_server(lazy, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()[:2]
    async with server, relaying(tmp_path, address, address) as relay:
        reader, writer = await asyncio.open_connection(*relay.address, limit=2**26)
        hello = connect_packet("car-1")
        writer.write(hello + blob)
        writer.write_eof()
        passed = -1
        while passed != relay.status().bytes_up:  # until nothing moves any more
            passed = relay.status().bytes_up
            await asyncio.sleep(0.3)
        assert passed < len(blob) // 2, "the relay must not take in what it cannot pass on"
        reading.set()
        assert await asyncio.wait_for(whole, 20) == hello + blob
        assert await asyncio.wait_for(reader.read(-1), 20) == (hello + blob)[::-1]
        writer.close()
        await until(lambda: not relay.fronts)
        status = relay.status()
        assert status.bytes_up == status.bytes_down == len(hello + blob)


async def test_tls_passes_through_and_is_routed_by_its_server_name(tmp_path: Path) -> None:
    files = own_certificates(tmp_path / "ca", ["iot.example.test", "other.example.test"])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    async with AsyncExitStack() as stack:
        addresses = []
        for word in (b"old", b"new"):

            async def greet(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, word: bytes = word
            ) -> None:
                writer.write(word)
                writer.close()

            server = await asyncio.start_server(greet, "127.0.0.1", 0, ssl=context)
            await stack.enter_async_context(server)
            addresses.append(server.sockets[0].getsockname()[:2])
        relay = await stack.enter_async_context(relaying(tmp_path / "relay", *addresses))
        relay.set_routes(Routes(epoch=1, prefixes={"iot.example.test@": To.NEW}))
        trusting = ssl.create_default_context(cafile=str(files.ca))
        for name, word in (("iot.example.test", b"new"), ("other.example.test", b"old")):
            reader, writer = await asyncio.open_connection(*relay.address, ssl=trusting, server_hostname=name)
            assert await reader.read() == word
            writer.close()
        assert set(relay.visitors.by_client) == {"iot.example.test@127.0.0.1", "other.example.test@127.0.0.1"}


@pytest.mark.parametrize("kind", [ProxyHeader.V1, ProxyHeader.V2])
async def test_a_side_may_be_told_who_comes(tmp_path: Path, kind: ProxyHeader) -> None:
    async with answers(b"old") as (old, got), relaying(tmp_path, old, old, proxy_old=kind) as relay:
        _, writer, _ = await come(relay.address, "car-1")
        host, port = writer.get_extra_info("sockname")
        writer.close()
        if kind is ProxyHeader.V1:
            assert got[0].startswith(f"PROXY TCP4 {host} 127.0.0.1 {port} {relay.address[1]}\r\n".encode())
        else:
            assert got[0][:16] == b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"
            assert got[0][16:28] == bytes([127, 0, 0, 1] * 2) + port.to_bytes(2, "big") + relay.address[
                1
            ].to_bytes(2, "big")
        assert got[0].endswith(connect_packet("car-1"))


async def test_rude_clients_hold_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent ones are closed, too many are refused, rubbish is forwarded and its sender listed by address."""
    monkeypatch.setattr(relay_module, "FIRST_WITHIN_S", 0.3)
    async with answers(b"old") as (old, _), relaying(tmp_path, old, old, connections_max=3) as relay:
        silent, writer = await asyncio.open_connection(*relay.address)
        writer.write(connect_packet("car-1")[:5])
        with suppress(ConnectionError):
            assert await asyncio.wait_for(silent.read(), 5) == b""
        assert relay.status().unnamed == 1 and not relay.visitors.by_client
        rubbish, other = await asyncio.open_connection(*relay.address)
        other.write(b"GET / HTTP/1.0\r\n\r\n")
        assert await rubbish.read(10) == b"old"
        assert set(relay.visitors.by_client) == {"127.0.0.1"}
        others = [await come(relay.address, f"car-{n}") for n in range(4)]
        assert [word for _, _, word in others] == [b"old", b"old", b"", b""]
        assert relay.status().refused == 2
        for _, one, _ in others:
            one.close()
        other.close()
        writer.close()


@asynccontextmanager
async def command(
    data: Path, listen: Address, old: Address, new: Address
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """`fleetlift relay` in a process of its own."""
    arguments = ["--listen", f"127.0.0.1:{listen[1]}", "--data", str(data), "--log-level", "error"]
    sides = ["--old", f"127.0.0.1:{old[1]}", "--new", f"127.0.0.1:{new[1]}"]
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "fleetlift.cli.main", "relay", *arguments, *sides],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 20)
        assert line.startswith(b"relay ready on"), line
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_killed_and_started_again_it_knows_routes_and_visitors(tmp_path: Path) -> None:
    listen, data = ("127.0.0.1", free_port()), tmp_path / "data"
    async with answers(b"old") as (old, _), answers(b"new") as (new, _):
        async with command(data, listen, old, new) as process:
            assert (data / "relay.token").stat().st_mode & 0o777 == 0o600
            async with RelayControl.of(data) as control:
                assert await side_of(listen, "car-1") == b"old"
                await control.change_routes(default=To.NEW, switched_at=time.time() - 100, ttl_s=30)
                reader, writer, word = await come(listen, "car-2")
                assert word == b"new"
                before = await control.status()
                for _ in range(2):  # until it is on disk: the second begins when the first has ended
                    seen = (await control.status()).watched_until
                    async with asyncio.timeout(20):
                        while (await control.status()).watched_until == seen:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                with suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                writer.close()
                with pytest.raises(Unavailable, match="does not answer"):
                    await control.status()
        async with command(data, listen, old, new), RelayControl.of(data) as control:
            assert (await control.routes()).default is To.NEW
            assert await side_of(listen, "car-1") == b"new"
            found = {one.client: one for one in await control.stragglers()}
            assert set(found) == {"car-1", "car-2"} and found["car-1"].connections == 2
            assert found["car-1"].reason is Reason.IGNORES_TTL
            assert (await control.status()).watched_from <= before.watched_from + 0.001

            shown = await asyncio.to_thread(
                subprocess.run,
                [
                    sys.executable,
                    "-m",
                    "fleetlift.cli.main",
                    "relay",
                    "stragglers",
                    "--json",
                    "--data",
                    str(data),
                ],
                capture_output=True,
                check=True,
            )
            assert {one["client"] for one in json.loads(shown.stdout)} == {"car-1", "car-2"}

            tail = await control.tail(
                ["car-1", "car-2", "car-3"], on_new={}, switched_at=time.time() - 100, ttl_s=30
            )
            verdict = may_release(tail, now=time.time(), epsilon=0.5, longest_sleep_s=50)
            assert not verdict.allowed and verdict.never_seen == ("car-3",)
            assert set(verdict.stale) == {"car-1", "car-2"}


async def test_its_api_is_for_the_owner_on_this_machine(tmp_path: Path) -> None:
    nobody = ("127.0.0.1", free_port())
    async with relaying(tmp_path, nobody, nobody) as relay:
        token = own_token(tmp_path)
        with pytest.raises(BadInput, match="loopback"):
            async with serving_admin(relay, "0.0.0.0:0", token):
                pass
        async with serving_admin(relay, "127.0.0.1:0", token) as url, httpx.AsyncClient() as stranger:
            strange: tuple[dict[bytes, bytes], ...] = (
                {},
                {b"authorization": b"Bearer wrong"},
                {b"authorization": b"Bearer \xe9"},
            )
            for headers in strange:
                for method, path in (("GET", "status"), ("PUT", "routes"), ("POST", "release")):
                    answer = await stranger.request(
                        method, f"{url}/v1/{path}", headers=headers, content=b"{}"
                    )
                    assert answer.status_code == 401 and token not in answer.text
            async with RelayControl(url, token) as control:
                assert (await control.set_routes(Routes(epoch=7, default=To.NEW))).epoch == 7
                with pytest.raises(Conflict, match="epoch 7"):
                    await control.set_routes(Routes(epoch=6))
                with pytest.raises(BadInput):
                    await control.release(0)
                with pytest.raises(BadInput):
                    await control.set_routes(Routes(epoch=8, share_percent=101))
                mine = {"authorization": f"Bearer {token}"}
                for body in (b"", b"{", b'{"epoch": "x"}', b'{"unknown": 1}', b"\xff", b"[]" * 1000):
                    answer = await stranger.put(f"{url}/v1/routes", headers=mine, content=body)
                    assert answer.status_code == 400, body
                answer = await stranger.get(f"{url}/v1/stragglers?limit=x", headers=mine)
                assert answer.status_code == 400
                assert (await control.routes()) == Routes(epoch=7, default=To.NEW)
    (tmp_path / "relay.token").chmod(0o644)
    with pytest.raises(Forbidden, match="chmod 600"):
        own_token(tmp_path)
    (tmp_path / "routes.json").write_text('{"epoch": 9, "default"')
    with pytest.raises(BadInput, match=r"routes\.json"):
        async with relaying(tmp_path, nobody, nobody):
            pass


async def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(LOOPBACK)
        taken.listen()
        address = taken.getsockname()
        with pytest.raises(Unavailable, match="another --listen"):
            async with Relay(tmp_path, listen=address, old=address, new=address).serving():
                pass
