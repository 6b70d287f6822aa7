"""Two Fleetlifts, a relay at the old address, names on Knot, devices that look them up: what a tenant's names
move between. Each test has tenants, names and devices of its own in it."""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
from tenant_cloud import OVER, told, until_phase, without_password

from fleetlift.config import free_port, load_run
from fleetlift.core.dns import HonoursTtl, IgnoresTtl, PinsFirst, RecordSet, RecordType, ResolverModel
from fleetlift.levers.relay import RelayControl
from fleetlift.levers.rfc2136 import Rfc2136
from fleetlift.load.parts import Part
from fleetlift.load.plain import PlainDevice, PlainFleet
from fleetlift.load.resolving import Resolver
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.testing import DnsServer, RunningBackend, running_backend, running_knot
from tenant_world import Pair, fill_cloud, fresh_pair, running_postgres

ZONE = "cloud.test"
OLD_HOST, NEW_HOST = "127.0.0.2", "127.0.0.3"
OWN_TTL_S = 2  # of the names before the move
CASTS = 16
MODELS: tuple[ResolverModel, ...] = (HonoursTtl(), HonoursTtl(), IgnoresTtl(min_s=3.0), PinsFirst())

COPY = """\
  - copy: tenant data
    root: customers.id = 2
    tables:
      ts_kv: "entity_id -> device.id when entity_type = 'DEVICE' | asset.id when entity_type = 'ASSET'"
      audit_log: customer_id
      currency: all
      event_tag: {identity: full}
"""
DATABASE = """\
  - switch: database
    at_most: 5s
    terminate: true
"""


async def until(condition: Callable[[], bool], what: str, within_s: float = 40.0) -> None:
    """Wait for a condition."""
    try:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - it is the other side that is waited for
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {within_s:g} s: {what}") from None


class Zone:
    """Knot with the names of all tests, and the key by which a plan changes them."""

    def __init__(self, directory: Path, *, ttl_s: int = OWN_TTL_S) -> None:
        self.directory, self.ttl_s = directory, ttl_s
        self.key_file = directory.with_suffix(".key")
        self.dns: DnsServer
        self._stack: contextlib.AsyncExitStack | None = None

    async def start(self) -> None:
        """Where it was before, when it has run already."""
        held: DnsServer | None = getattr(self, "dns", None)
        port, key = (0, None) if held is None else (int(held.address.rpartition(":")[2]), held.key)
        roles = ("own", "pool", "others")
        names = [f"{role}{n} {self.ttl_s} A {OLD_HOST}" for n in range(CASTS) for role in roles]
        self._stack = contextlib.AsyncExitStack()
        self.dns = await self._stack.enter_async_context(
            running_knot(self.directory, ZONE, names, port=port, key=key)
        )
        if held is None:
            self.write_key(self.dns.key_text)

    async def stop(self) -> None:
        if self._stack is not None:
            await self._stack.aclose()
            self._stack = None

    def write_key(self, text: str) -> None:
        self.key_file.touch(mode=0o600)
        self.key_file.write_text(text)

    async def record(self, name: str) -> RecordSet:
        provider = Rfc2136(ZONE, primary=self.dns.address, key=self.dns.key)
        found = await provider.read(name, RecordType.A)
        assert found is not None
        return found

    async def write_record(self, name: str, address: str) -> None:
        """As somebody else would who has a key too."""
        provider = Rfc2136(ZONE, primary=self.dns.address, key=self.dns.key)
        now = await self.record(name)
        await provider.write([msgspec.structs.replace(now, values=(address,))], [now])


class World:
    """Everything that stands there for all tests; all of it is on loopback."""

    def __init__(self, directory: Path, server: EmbeddedPostgres, port: int) -> None:
        self.directory, self.server, self.port = directory, server, port
        self.zone = Zone(directory / "knot")
        self.old: RunningBackend
        self.new: RunningBackend
        self.relay: Part
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._new: contextlib.AsyncExitStack | None = None
        self._casts = 0

    @property
    def relay_data(self) -> Path:
        return self.directory / "relay"

    def relay_control(self) -> RelayControl:
        return RelayControl.of(self.relay_data)

    async def start_new(self, kill_at: str) -> None:
        """The new side's Fleetlift, with FLEETLIFT_KILL_AT, and the clients of both."""
        _, password = without_password(self.server.url)
        environment = {"DB_PASSWORD": password, **({"FLEETLIFT_KILL_AT": kill_at} if kill_at else {})}
        self._new = contextlib.AsyncExitStack()
        self.new = await self._new.enter_async_context(
            running_backend(
                self.directory / "new",
                mqtt=f"{NEW_HOST}:{self.port}",
                environment={**os.environ, **environment},
            )
        )
        self._clients = {
            name: await self._new.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"{side.url}/api/v1",
                    headers={"authorization": f"Bearer {side.token}"},
                    timeout=30.0,
                )
            )
            for name, side in (("old", self.old), ("new", self.new))
        }

    async def stop(self) -> None:
        if self._new is not None:
            await self._new.aclose()
            self._new = None

    async def call(self, side: str, method: str, path: str, body: Any = None, *, allow: int = 0) -> Any:
        answer = await self._clients[side].request(method, path, json=body)
        assert answer.is_success or answer.status_code == allow, answer.text
        return answer.json()

    async def command(self, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
        """`fleetlift …` as people type it: exit status and standard output. Within two minutes."""
        done = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fleetlift.cli.main", *arguments),
            env={**os.environ, "COLUMNS": "200", **(environment or {})},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, also = await asyncio.wait_for(done.communicate(), 120)
        except TimeoutError:
            done.kill()
            raise AssertionError(f"fleetlift {' '.join(arguments)} did not end within two minutes") from None
        assert done.returncode is not None
        return done.returncode, said.decode() or also.decode()

    @contextlib.asynccontextmanager
    async def cast(
        self, *, pool: bool = False, others: int = 0, online: bool = True, zone: Zone | None = None
    ) -> AsyncIterator["Cast"]:
        """A tenant with two databases, names and devices that nobody else uses."""
        number = self._casts
        self._casts += 1
        async with fresh_pair(self.server) as pair:
            await fill_cloud(pair.source, tenants=4, devices=4, values=5)
            cast = Cast(self, number, pair, zone or self.zone)
            await cast.register("own", MODELS)
            if pool:
                await cast.register("pool", (HonoursTtl(), HonoursTtl()))
            if others:
                await cast.register("others", (HonoursTtl(),) * others)
            fleet = cast.fleet = PlainFleet(cast.devices)
            if online:
                fleet.start()
            try:
                if online:
                    await until(lambda: fleet.connected == len(cast.devices), "every device on line")
                yield cast
            finally:
                await fleet.stop()
                await cast.end()


class Cast:
    """One test's tenant in the world, its devices and its moves."""

    def __init__(self, world: World, number: int, pair: Pair, zone: Zone) -> None:
        self.world, self.number, self.pair, self.zone = world, number, pair, zone
        self.devices: list[PlainDevice] = []
        self.fleet: PlainFleet
        self.move = f"move-{number}"

    def tenant(self, role: str) -> str:
        return f"{role}{self.number}"

    def host(self, role: str) -> str:
        return f"{self.tenant(role)}.{ZONE}"

    def of(self, role: str) -> list[PlainDevice]:
        return [one for one in self.devices if one.device.startswith(self.tenant(role) + "-")]

    @property
    def pinned(self) -> str:
        return f"{self.tenant('own')}-{len(MODELS) - 1}"

    async def register(self, role: str, models: tuple[ResolverModel, ...]) -> None:
        sides = ("old",) if role == "others" else ("old", "new")
        tenant = self.tenant(role)
        for side in sides:
            await self.world.call(side, "POST", "/tenants", {"id": tenant, "name": tenant}, allow=409)
        for number, model in enumerate(models):
            name, password = f"{tenant}-{number}", secrets.token_urlsafe(12)
            body = {"tenant": tenant, "credentials": [{"kind": "password", "value": password}]}
            for side in sides:
                await self.world.call(side, "PUT", f"/devices/{name}", body)
            self.devices.append(
                PlainDevice(
                    name,
                    password,
                    host=self.host(role),
                    port=self.world.port,
                    resolver=Resolver(self.zone.dns.address, model=model),
                    rate_s=5.0,
                )
            )

    def plan(self, steps: str, *, top: str = "", source: str = "", target: str = "") -> str:
        """A plan's text."""
        urls = [without_password(url)[0] for url in (self.pair.source, self.pair.target)]
        run = msgspec.json.decode((self.world.relay_data / "relay.json").read_bytes())
        return (
            f"migration: {self.move}\ntenant: {self.tenant('own')}\n"
            f'from: {{postgresql: "{source or urls[0]}", password_env: DB_PASSWORD, '
            f'mqtt: "mqtt://{OLD_HOST}:{self.world.port}", relay: "{run["admin"]}", '
            f'relay_token_file: "{self.world.relay_data / "relay.token"}"}}\n'
            f'to: {{postgresql: "{target or urls[1]}", password_env: DB_PASSWORD, '
            f'mqtt: "mqtt://{NEW_HOST}:{self.world.port}"}}\n'
            f'dns: {{server: "{self.zone.dns.address}", zone: {ZONE}, key: "{self.zone.key_file}"}}\n'
            f"{top}steps:\n{steps}"
        )

    def names(self, *, pool: bool = False, **more: str) -> str:
        """The step `switch: dns`."""
        records = [f"{{name: {self.host('own')}, to: {NEW_HOST}, ttl: 1s}}"]
        if pool:
            records.insert(0, f"{{name: {self.host('pool')}, to: {NEW_HOST}, ttl: 1s, pool: true}}")
        keys = {
            "records": f"[{', '.join(records)}]",
            "waves": "[test-pool, 100%]" if pool else "[100%]",
            "bake": "1s",
            "gates": "[devices.silent == 0, telemetry.completeness == 100%]",
            "release": "20/s",
            **more,
        }
        return "  - switch: dns\n" + "".join(f"    {key}: {value}\n" for key, value in keys.items())

    # -- a move ------------------------------------------------------------------------------------------

    async def start(self, plan: str, files: Mapping[str, str] | None = None) -> None:
        await self.world.call("new", "POST", "/migrations", {"plan": plan, "files": dict(files or {})})

    async def ask(self, verb: str) -> None:
        await self.world.call("new", "POST", f"/migrations/{self.move}/{verb}?wait=15")

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.world.call("new", "GET", f"/migrations/{self.move}")
        return found

    async def record(self, role: str = "own") -> RecordSet:
        """What stands at a name now."""
        return await self.zone.record(self.host(role))

    async def until(self, *phases: str, within_s: float = 60.0) -> dict[str, Any]:
        """The status once it is in one of `phases` and nothing is asked for any more."""
        return await until_phase(self.status, phases, within_s)

    async def until_step(self, name: str, phase: str, *, says: str = "", wave: int = 0) -> dict[str, Any]:
        """The step of that name once it is in `phase`, in its wave, and its text holds `says`."""
        found: dict[str, Any] = {}
        try:
            async with asyncio.timeout(60):
                while True:
                    found = await self.status()
                    for one in found["steps"]:
                        there = one["name"] == name and one["phase"] == phase and one.get("wave", 0) == wave
                        if there and says in one.get("text", ""):
                            return dict(one)
                    assert found["phase"] not in OVER, told(found)
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise AssertionError(f"{name} is not {phase} ({says}): {told(found)} {found['steps']}") from None

    async def until_event(self, kind: str, within_s: float = 60.0) -> str:
        """The text of the newest event of that kind in the move's log."""
        async with asyncio.timeout(within_s):
            while True:
                texts = [e["text"] for e in (await self.status())["events"] if e["kind"] == kind]
                if texts:
                    return str(texts[-1])
                await asyncio.sleep(0.1)

    async def end(self) -> None:
        """Take back what a test has left, so that its databases can go."""
        with contextlib.suppress(AssertionError, httpx.HTTPError):
            for _ in range(3):
                phase = (await self.status())["phase"]
                if phase in ("reverted", "released"):
                    return
                await self.ask("revert")
                await self.until("reverted", "held", within_s=30)

    # -- the account -------------------------------------------------------------------------------------

    async def lost(self, *roles: str, within_s: float = 20.0) -> int:
        """Let the devices of `roles` fall silent and send what waits; how many acknowledged messages neither
        side has."""
        devices = [one for role in roles for one in self.of(role)]
        for one in devices:
            one.fall_silent()
        async with asyncio.timeout(within_s):
            for one in devices:
                await one.emptied()
        lost = -1
        async with asyncio.timeout(within_s):
            while lost:
                there = await self.stored("old", devices) | await self.stored("new", devices)
                lost = sum(
                    (one.device, seq) not in there
                    for one in devices
                    for start, end in one.acknowledged.ranges()
                    for seq in range(start, end)
                )
                await asyncio.sleep(0.1)  # the last batch is a moment behind
        return lost

    async def stored(self, side: str, devices: list[PlainDevice]) -> set[tuple[str, int]]:
        """What a side has of them."""
        data = self.world.directory / side
        conn = await asyncpg.connect(load_run(data).database_url)
        try:
            rows = await conn.fetch(
                "SELECT device, seq FROM telemetry WHERE device = ANY($1)", [one.device for one in devices]
            )
        finally:
            await conn.close()
        return {(row["device"], row["seq"]) for row in rows}

    async def digest(self, url: str, *customers: int) -> str:
        """Of the rows of these customers, for before and after."""
        conn = await asyncpg.connect(url)
        try:
            digest: str = await conn.fetchval(
                "SELECT md5(string_agg(row, '|' ORDER BY row)) FROM ("
                "SELECT c::text AS row FROM customers c WHERE id = ANY($1) "
                "UNION ALL SELECT d::text FROM device d WHERE customer_id = ANY($1) "
                "UNION ALL SELECT u::text FROM users u WHERE customer_id = ANY($1) "
                "UNION ALL SELECT a::text FROM alarm a JOIN device d ON d.id = device_id "
                "WHERE customer_id = ANY($1) "
                "UNION ALL SELECT t::text FROM ts_kv t JOIN device d ON d.id::text = entity_id "
                "AND entity_type = 'DEVICE' WHERE customer_id = ANY($1)) rows",
                list(customers),
            )
        finally:
            await conn.close()
        return digest

    async def write(self, url: str, value: str) -> None:
        """What an application of the tenant writes."""
        conn = await asyncpg.connect(url)
        try:
            await conn.execute("UPDATE customers SET name = $1 WHERE id = 2", value)
        finally:
            await conn.close()

    async def read(self, url: str) -> str:
        conn = await asyncpg.connect(url)
        try:
            return str(await conn.fetchval("SELECT name FROM customers WHERE id = 2"))
        finally:
            await conn.close()


@contextlib.asynccontextmanager
async def running_world(directory: Path, *, kill_at: str = "") -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_postgres(directory / "cloud"))
        world = World(directory, server, free_port(OLD_HOST, NEW_HOST))
        stack.push_async_callback(world.zone.stop)
        await world.zone.start()
        world.old = await stack.enter_async_context(running_backend(directory / "old"))
        world.relay = Part(
            "relay",
            [
                *("relay", "--data", str(world.relay_data), "--listen", f"{OLD_HOST}:{world.port}"),
                *("--old", "{}:{}".format(*world.old.mqtt), "--new", f"{NEW_HOST}:{world.port}"),
            ],
            directory / "relay.log",
        )
        stack.callback(world.relay.stop)
        world.relay.start()
        await world.relay.until_printed("ready", within_s=30.0)
        stack.push_async_callback(world.stop)
        await world.start_new(kill_at)
        yield world
