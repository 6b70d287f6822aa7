"""A small fleet on a real legacy server, a whole backend beside it, and people who command both."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from fault_proxy import FaultProxy
from fleetlift.core.ranges import RangeSet
from fleetlift.device.agent import AgentSettings
from fleetlift.device.fleet import DeviceSpec, Fleet
from fleetlift.device.shell import Misbehaviour
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer
from fleetlift.store import ledger
from fleetlift.testing import RunningBackend, running_backend

QUICK = AgentSettings(backoff_s=0.1, backoff_max_s=1.0, linger_s=0.3, health_every_s=1.0, retry_legs_s=1.0)


class Links:
    """A fault proxy on each link: the devices' to both sides, and the engine's to the old side."""

    def __init__(self, devices_old: FaultProxy, devices_new: FaultProxy, engine_old: FaultProxy) -> None:
        self.devices_old, self.devices_new, self.engine_old = devices_old, devices_new, engine_old

    @property
    def old_side(self) -> tuple[FaultProxy, ...]:
        return self.devices_old, self.engine_old

    @property
    def all(self) -> tuple[FaultProxy, ...]:
        return self.devices_old, self.devices_new, self.engine_old


PLAN = """
migration: small
fleet: {{tenant: carshare{where}}}
from: {{legacy: "{url}", key_file: "{key_file}"}}
to: {{fleetlift: default}}
lever: flag
try_within: 8s
new_lost_limit: 2s
settle: 10s
grace: 500ms
silent_after: 5s
commands_timeout: 3s
confidence: none
steps:
  - move: telemetry
    stages: [both, new]
    waves: [2 devices, 100%]
    bake: 1s
    gates: [telemetry.completeness >= 99%, devices.silent == 0]
  - move: commands
    stages: [dry-run, both, new]
    waves: [100%]
    bake: 1s
    gates: [commands.agreement >= 99%, commands.executed_twice == 0]
  - move: link
    waves: [100%]
    bake: 500ms
"""


class World:
    """What a test holds in its hands."""

    def __init__(self, legacy: LegacyServer, backend: RunningBackend, fleet: Fleet, plan: str) -> None:
        self.legacy, self.backend, self.fleet, self.plan = legacy, backend, fleet, plan
        self.commands: list[str] = []
        self.links: Links | None = None

    @property
    def devices(self) -> list[str]:
        return [spec.id for spec in self.fleet.specs]

    @property
    def journal(self) -> Path:
        return self.backend.data_dir / "journal" / "small.jsonl"

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        async with httpx.AsyncClient(
            base_url=f"{self.backend.url}/api/v1", headers={"authorization": f"Bearer {self.backend.token}"}
        ) as client:
            answer = await client.request(method, path, json=body, timeout=20)
        assert answer.status_code < 400, answer.text
        return answer.json() if answer.content else None

    async def start(self, plan: str | None = None) -> None:
        await self.call("POST", "/migrations", {"plan": plan or self.plan})

    async def status(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self.call("GET", "/migrations/small")
        return found

    async def events(self) -> list[Mapping[str, Any]]:
        found = await self.call("GET", "/migrations/small/events?limit=1000")
        return list(found["items"])

    async def until(
        self, what: Callable[[Mapping[str, Any]], bool], within_s: float = 60.0
    ) -> Mapping[str, Any]:
        """The first status that `what` holds of. On timeout, what was going on."""
        last: Mapping[str, Any] = {}
        try:
            async with asyncio.timeout(within_s):
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        last = await self.status()
                        if what(last):
                            return last
                    await asyncio.sleep(0.1)
        except TimeoutError:
            said = "\n".join(f"{e['at']} {e['kind']}: {e['text']}" for e in await self.events())
            gates = [f"{g['verdict']} {g['why']}" for g in last.get("gates", [])]
            raise AssertionError(
                f"still {last.get('phase')} rung {last.get('rung')} wave {last.get('wave')} "
                f"{last.get('wave_phase')}: {last.get('reason')}\n{gates}\n{said}\n"
                f"{[(d, s.phase, s.epoch, s.reason) for d, s in self.fleet.status().by_device.items()]}"
            ) from None

    async def nothing_lost_nothing_twice(self) -> None:
        """Each message that was acknowledged to a device is stored, once; no command was executed twice."""
        self.fleet.pause_producing()
        connection = await asyncpg.connect(self.backend.settings.database_url)
        try:
            missing: dict[str, RangeSet] = {}
            for _ in range(200):
                missing = await self._missing(connection)
                if not missing:
                    break
                await asyncio.sleep(0.1)
            assert not missing, {k: v.to_pg() for k, v in missing.items()}
            twice = await connection.fetchval(
                "SELECT count(*) FROM (SELECT FROM telemetry WHERE seq IS NOT NULL "
                "GROUP BY device, channel, seq HAVING count(*) > 1) d"
            )
            assert twice == 0
        finally:
            await connection.close()
        for device, shell in self.fleet.shells.items():
            assert all(n == 1 for n in shell.executed.values()), device

    async def _missing(self, connection: "asyncpg.Connection[Any]") -> dict[str, RangeSet]:
        stored: dict[tuple[str, str], RangeSet] = {}
        for row in await ledger.rows(connection):
            key = (row.device, row.channel)
            stored[key] = stored.get(key, RangeSet()).union(row.ranges)
        missing = {}
        for device, truth in self.fleet.truth().items():
            for channel, known in truth.channels.items():
                acked = RangeSet()
                for first, last in known.acked:
                    acked.add_range(first, last + 1)
                if lost := acked.minus(stored.get((device, channel), RangeSet())):
                    missing[f"{device} {channel}"] = lost
        return missing


async def _drive(world: World) -> None:
    """Measurements of every device, ten a second."""
    n = 0
    while True:
        n += 1
        for device in world.devices:
            world.fleet.shells[device].produce("position", b'{"lat":47.1,"n":%d}' % n)
        await asyncio.sleep(0.1)


async def _command(world: World, ask: Callable[[], Awaitable[Any]] | None = None) -> None:
    """An operator's traffic: locking and unlocking, whatever goes on."""
    chance = random.Random(7)
    while True:
        with contextlib.suppress(httpx.TransportError, AssertionError):
            made = await world.call(
                "POST",
                f"/devices/{chance.choice(world.devices)}/commands",
                {"name": chance.choice(["lock", "unlock"]), "expires_in": 10},
            )
            world.commands.append(made["id"])
        await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def small_world(
    directory: Path,
    *,
    devices: int = 6,
    misbehaving: Mapping[str, Misbehaviour] | None = None,
    environment: Mapping[str, str] | None = None,
    commanded: bool = True,
    tls: bool = False,
    proxied: bool = False,
    settings: AgentSettings = QUICK,
) -> AsyncIterator[World]:
    """Legacy server, backend and fleet, all running; `car-0` has hardware 1, the others 2.

    With `tls` the backend takes devices by TLS only, with a certificate of its own authority. With `proxied`
    there is a fault proxy on every link, in `links`.
    """
    listen: dict[str, Any] = {"mqtt": "", "arguments": ["--mqtts", "127.0.0.1:0"]} if tls else {}
    keys = {f"car-{n}": f"not-a-real-key-of-car-{n}" for n in range(devices)}
    attributes = {f"car-{n}": {"hardware": 1 if n == 0 else 2} for n in range(devices)}
    async with contextlib.AsyncExitStack() as stack:
        legacy = await stack.enter_async_context(LegacyServer(directory / "legacy"))
        await legacy.register([DeviceSeed(d, key, attributes[d]) for d, key in keys.items()])
        backend = await stack.enter_async_context(
            running_backend(directory / "backend", environment=environment or {}, **listen)
        )
        links: Links | None = None
        if proxied:
            targets = (legacy.address, backend.mqtt, legacy.address)
            links = Links(*[await stack.enter_async_context(FaultProxy(target)) for target in targets])
        fleet = Fleet(
            [DeviceSpec(d, key, attributes[d], None, (misbehaving or {}).get(d)) for d, key in keys.items()],
            old=links.devices_old.address if links else legacy.address,
            state_dir=directory / "devices",
            settings=settings,
        )
        await fleet.start()
        stack.push_async_callback(fleet.stop)
        url = links.engine_old.url if links else legacy.url
        plan = PLAN.format(url=url, key_file=directory / "legacy" / "owner.key", where="")
        if links:
            host, port = links.devices_new.address
            plan = plan.replace("to: {fleetlift: default}", f'to: {{fleetlift: "mqtt://{host}:{port}"}}')
        world = World(legacy, backend, fleet, plan)
        world.links = links
        tasks = [asyncio.create_task(_drive(world))]
        if commanded:
            tasks.append(asyncio.create_task(_command(world)))
        try:
            yield world
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
