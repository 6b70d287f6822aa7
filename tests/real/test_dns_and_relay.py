"""The switch as a whole: names on a real DNS server, the relay at the old address, all kinds of devices."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

from dns_servers import lever
from test_relay import Stored, answering, broker

from fleetlift.core import mqtt
from fleetlift.core.dns import DnsRecord, HonoursTtl, IgnoresTtl, PinsFirst, ResolverModel
from fleetlift.core.errors import Unavailable
from fleetlift.core.relaying import Routes, To
from fleetlift.core.stale_tail import may_release
from fleetlift.edge.relay import Relay
from fleetlift.edge.relay_admin import own_token, serving_admin
from fleetlift.levers.relay import RelayControl
from fleetlift.load.resolving import Resolver
from fleetlift.testing import DnsServer, free_port, running_knot, scratch_directory

NAME = "iot.example.test"
OLD, NEW = "127.0.0.2", "127.0.0.3"


class Device:
    """Firmware that cannot be changed: resolves as it does, publishes by QoS 1, comes back when cut off."""

    def __init__(self, name: str, dns: DnsServer, port: int, model: ResolverModel) -> None:
        self.name = name
        self.acknowledged = 0
        self.connected_to = ""
        self._resolver, self._port = Resolver(dns.address, model=model), port
        self._sent = 0

    async def run(self) -> None:
        while True:
            with contextlib.suppress(OSError, Unavailable):
                (address, *_) = await self._resolver.resolve(NAME)
                reader, writer = await asyncio.open_connection(address, self._port)
                try:
                    await self._speak(reader, writer, address)
                finally:
                    writer.close()
            await asyncio.sleep(0.05)

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        decoder = mqtt.Decoder()
        writer.write(mqtt.encode(mqtt.Connect(client_id=self.name)))
        while data := await reader.read(1000):
            for packet in decoder.feed(data):
                if isinstance(packet, mqtt.PubAck):
                    self.acknowledged = self._sent
                elif isinstance(packet, mqtt.ConnAck):
                    self.connected_to = address
                await asyncio.sleep(0.01)
                self._sent = self.acknowledged + 1  # the one that was not acknowledged is sent again
                payload = str(self._sent).encode()
                writer.write(
                    mqtt.publish(f"dt/{self.name}", payload, qos=1, packet_id=1 + self._sent % 60_000)
                )


async def reached(condition: object, *, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.02)


async def test_a_switch_with_devices_that_follow_late_or_never(tmp_path: Path) -> None:
    """Nothing acknowledged is lost, the old side is empty in the end, and who holds it up is named."""
    with scratch_directory("fleetlift-switch-") as directory:
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            port = free_port()
            dns = await enter(running_knot(directory / "knot", records=[f"iot 1 A {OLD}"]))
            old = await enter(broker(directory / "old"))
            new = await enter(broker(directory / "new", host=NEW, port=port))
            relay = await enter(Relay(tmp_path, listen=(OLD, port), old=old, new=new).serving())
            admin = await enter(serving_admin(relay, "127.0.0.1:0", own_token(tmp_path)))
            control = await enter(RelayControl(admin, own_token(tmp_path)))
            stored = [await Stored(address).ready() for address in (old, new)]
            for one in stored:
                stack.callback(one.close)
            await answering((NEW, port))

            kinds: dict[str, ResolverModel] = {
                "good": HonoursTtl(),
                "slow": IgnoresTtl(min_s=3600),
                "pinned": PinsFirst(),
            }
            devices = [
                Device(f"{kind}-{n}", dns, port, model) for kind, model in kinds.items() for n in range(3)
            ]
            running = [asyncio.create_task(device.run()) for device in devices]
            stack.callback(lambda: [task.cancel() for task in running])
            await reached(lambda: all(device.acknowledged > 5 for device in devices))

            move = lever(dns, DnsRecord(name=NAME, new=(NEW,), ttl_s=1))
            originals = await move.originals()
            low = await move.lower_ttl(originals)
            await move.wait_until(low.switch_from)
            changed = await move.switch(originals, switch_from=low.switch_from)
            assert {device.connected_to for device in devices} == {OLD}, "a switch alone moves no connection"

            await control.set_routes(Routes(epoch=1, default=To.NEW, switched_at=changed.at, ttl_s=1))
            await move.wait_until(changed.gone_at)
            assert (await control.release(30)).left == len(devices)
            await reached(lambda: relay.status().open_old == 0 and relay.status().open_new == 6)
            marks = {device.name: device.acknowledged for device in devices}
            await reached(lambda: all(d.acknowledged > marks[d.name] + 5 for d in devices))
            assert {device.name for device in devices if device.connected_to == NEW} == {
                "good-0",
                "good-1",
                "good-2",
            }

            names = [device.name for device in devices]
            tail = await control.tail(
                [*names, "sleeper"],
                on_new={name: time.time() for name in names if stored[1].messages.get(name)},
                switched_at=changed.at,
                ttl_s=1,
            )
            verdict = may_release(tail, now=time.time(), epsilon=0.01, longest_sleep_s=3600)
            assert not verdict.allowed and verdict.never_seen == ("sleeper",)
            assert {name for name in verdict.stale if not name.startswith("good")} == {
                f"{kind}-{n}" for kind in ("slow", "pinned") for n in range(3)
            }

            await move.revert(originals)
            await control.change_routes(default=To.OLD, switched_at=None)
            for front in list(relay.fronts):
                front.end()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for device in devices:
                both = {n for side in stored for n in side.messages.get(device.name, ())}
                await reached(lambda both=both, device=device: both >= set(range(1, device.acknowledged + 1)))


def fleetlift(*arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fleetlift.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "FLEETLIFT_DNS_KEY": key},
    )


async def test_the_command_shows_names_and_what_stands_against_a_move() -> None:
    with scratch_directory("fleetlift-dns-") as directory:
        async with running_knot(directory, records=[f"iot 300 A {OLD}"]) as dns:
            at = ("--zone", dns.zone, "--primary", dns.address)
            check = ("dns", "check", NAME, "--new", NEW, *at)
            wrong = dns.key_text.rpartition(":")[0] + ":AAAA"
            shown, good, bad, none = await asyncio.gather(
                asyncio.to_thread(fleetlift, "dns", "show", NAME, *at, "--json"),
                asyncio.to_thread(fleetlift, *check, key=dns.key_text),
                asyncio.to_thread(fleetlift, *check, key=wrong),
                asyncio.to_thread(fleetlift, *check),
            )
            (row,) = json.loads(shown.stdout)
            assert (row["values"], row["ttl_s"], row["server"]) == ([OLD], 300, dns.address)
            assert good.returncode == 0 and "Nothing stands against it" in good.stdout
            assert bad.returncode == 1 and "TSIG key" in bad.stdout
            assert none.returncode == 1 and "FLEETLIFT_DNS_KEY is not set" in none.stderr
            for text in (good.stdout, bad.stdout, bad.stderr, none.stderr):
                assert "AAAA:" not in text and dns.key_text.rpartition(":")[2] not in text
