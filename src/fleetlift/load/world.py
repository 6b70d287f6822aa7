"""A whole world in child processes: a legacy server, a backend by `fleetlift serve`, and a fleet."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
import psutil

from fleetlift.config import Settings, load_run, read_env, split_address
from fleetlift.core.errors import FleetError, Unavailable
from fleetlift.device.agent import AgentSettings
from fleetlift.device.fleet import FleetStatus, InventoryEntry
from fleetlift.load.fleet import CHANNEL, READY, Device, FleetOrders
from fleetlift.load.parts import Part
from fleetlift.migrate.runner import STEPS
from fleetlift.testing import free_port

AGENT = AgentSettings(backoff_s=0.2, backoff_max_s=2.0, health_every_s=5.0, retry_legs_s=1.0)
MESSAGES_PER_S = 10.0
START_WITHIN_S = 90.0
WHOLE_WITHIN_S = 120.0
DRAIN_S = 20.0

PLAN = """
migration: {name}
fleet: {{tenant: carshare}}
from: {{legacy: "tcp://{old}", key_file: "{key_file}"}}
to: {{fleetlift: default}}
lever: flag
try_within: 20s
new_lost_limit: 2m
settle: 30s
grace: 2s
silent_after: 1m
commands_timeout: 20s
steps:
  - move: telemetry
    stages: [both, new]
    waves: [3 devices, 100%]
    bake: {bake}
    gates: [telemetry.completeness >= 99%, devices.silent == 0]
  - move: commands
    stages: [dry-run, both, new]
    waves: [50%, 100%]
    bake: {bake}
    gates: [commands.executed_twice == 0]
  - move: link
    waves: [100%]
    bake: {bake}
    gates: [devices.silent == 0]
"""

_HEARD_SINCE = """
SELECT d FROM unnest($1::text[]) d WHERE NOT EXISTS (
    SELECT FROM telemetry t WHERE t.device = d AND t.channel = $2 AND t.ts > to_timestamp($3))
"""
_OBEYED_SINCE = """
SELECT EXISTS (SELECT FROM command WHERE created_at > to_timestamp($1) AND status = 'succeeded')
"""


class Refused(FleetError):
    """The API answered, and said no."""


class World:
    """What a soak strikes at, and what it looks at."""

    def __init__(self, directory: Path, devices: int) -> None:
        self.directory = directory
        self.devices = [f"car-{n}" for n in range(devices)]
        self._old = f"127.0.0.1:{free_port()}"
        logs = directory / "logs"
        inventory = ["--devices", str(directory / "inventory.jsonl")]
        at = ["--data", str(directory / "legacy"), "--listen", self._old]
        self.legacy = Part("legacy", ["legacy", "serve", *at, *inventory], logs / "legacy.log")
        data = ["--data", str(self.data)]
        listen = [word for name in ("http", "mqtt") for word in (f"--{name}", f"127.0.0.1:{free_port()}")]
        steps = ",".join(STEPS)
        self.backend = Part(
            "backend",
            ["serve", *data, *listen],
            logs / "backend.log",
            environment={"FLEETLIFT_KILL_AT": steps},
        )
        orders = [str(directory / "fleet-orders.json")]
        self.fleet = Part("fleet", orders, logs / "fleet.log", module="fleetlift.load.fleet")
        self._client: httpx.AsyncClient | None = None

    @property
    def data(self) -> Path:
        return self.directory / "fleetlift"

    @property
    def killed_at(self) -> Path:
        """The controller dies, once, at each of its steps that is not named in this file."""
        return self.data / "killed-at"

    @property
    def parts(self) -> Sequence[Part]:
        return self.fleet, self.backend, self.legacy

    async def start(self) -> None:
        """Start everything; returns when it is ready. Raises Unavailable."""
        keys = {name: os.urandom(18).hex() for name in self.devices}
        entries = [InventoryEntry(name, key, {"hardware": 2}) for name, key in keys.items()]
        (self.directory / "inventory.jsonl").write_bytes(
            b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
        )
        self.write_fleet_orders([Device(name, key) for name, key in keys.items()])
        self.data.mkdir()
        self.killed_at.write_text("\n".join(STEPS) + "\n")
        for part in (self.legacy, self.backend):
            part.start()
        await self.legacy.until_printed("ready", within_s=START_WITHIN_S)
        self.fleet.start()
        await self.fleet.until_printed(READY, within_s=START_WITHIN_S)
        await self.backend.until_printed("ready", within_s=START_WITHIN_S)
        token = read_env(self.data / "admin.env")["FLEETLIFT_TOKEN"]
        self._client = httpx.AsyncClient(
            base_url=self.settings.http_url, headers={"authorization": f"Bearer {token}"}, timeout=10.0
        )

    def write_fleet_orders(self, devices: list[Device]) -> None:
        orders = FleetOrders(
            old=split_address(self._old),
            devices=devices,
            messages_per_s=MESSAGES_PER_S,
            drain_s=DRAIN_S,
            settings=AGENT,
            state=str(self.directory / "devices"),
            status=str(self.directory / "fleet.json"),
            executed=str(self.directory / "executed.log"),
        )
        path = self.directory / "fleet-orders.json"
        path.touch(0o600)
        path.write_bytes(msgspec.json.encode(orders))

    async def stop(self) -> None:
        """End every process, whatever state it is in."""
        if self._client is not None:
            await self._client.aclose()
        for part in self.parts:
            await asyncio.to_thread(part.stop, within_s=90.0)

    # -- processes ---------------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """The process id of `nats`, `postgres` or a worker by its role; None while there is none."""
        parent = self.backend.pid
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(parent).children() if parent is not None else ():
                with contextlib.suppress(psutil.Error):
                    line = child.cmdline()
                    program = Path(line[0]).name if line else ""
                    known = {"nats-server": "nats", "postgres": "postgres"}.get(program)
                    if known is None and "worker" in line:
                        known = line[line.index("worker") + 1]
                    if known == name:
                        return child.pid
        return None

    @property
    def settings(self) -> Settings:
        return load_run(self.data)

    # -- asking ------------------------------------------------------------------------------------------

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """One call of the API. Raises Refused for a no, httpx's errors while it is away."""
        assert self._client is not None
        answer = await self._client.request(method, f"/api/v1{path}", json=body)
        if 400 <= answer.status_code < 500:
            raise Refused(f"{method} {path}: {answer.text[:500]}")
        answer.raise_for_status()
        return answer.json() if answer.content else None

    @contextlib.asynccontextmanager
    async def database(self) -> Any:
        connection = await asyncpg.connect(self.settings.database_url, timeout=5.0, command_timeout=60.0)
        try:
            yield connection
        finally:
            with contextlib.suppress(Exception):
                await connection.close(timeout=2.0)

    def told(self) -> FleetStatus:
        """What the fleet said last. Raises Unavailable before its first word."""
        try:
            return msgspec.json.decode((self.directory / "fleet.json").read_bytes(), type=FleetStatus)
        except FileNotFoundError:
            raise Unavailable("the fleet has said nothing yet") from None

    def executions(self) -> dict[str, int]:
        """How often each command was executed, by id, over all lives of the fleet."""
        counts: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.directory / "executed.log").read_text().splitlines():
                command = line.partition(" ")[2]
                counts[command] = counts.get(command, 0) + 1
        return counts

    async def ailing(self, since: float) -> str:
        """What is not whole yet, "" when all is: the backend is ready, every device's telemetry of after
        `since` (Unix seconds) is stored, and a command made after it has succeeded."""
        try:
            assert self._client is not None
            answer = await self._client.get("/readyz")
            if answer.status_code != 200:
                return f"not ready: {answer.text[:300]}"
            if self.told().at < since:
                return "the fleet says nothing"
            async with self.database() as connection:
                missing = await connection.fetch(_HEARD_SINCE, self.devices, CHANNEL, since)
                if missing:
                    return f"{len(missing)} devices not heard of, as {missing[0]['d']}"
                if not await connection.fetchval(_OBEYED_SINCE, since):
                    return "no new command has succeeded"
        except (httpx.HTTPError, OSError, TimeoutError, asyncpg.PostgresError, FleetError) as problem:
            return f"{type(problem).__name__}: {problem}"
        except asyncpg.InterfaceError as problem:
            return f"database: {problem}"
        return ""

    async def until_whole(self, since: float, *, within_s: float = WHOLE_WITHIN_S) -> str:
        """Wait until all is whole again; returns "" or, at the deadline, what is not."""
        deadline = time.monotonic() + within_s
        while why := await self.ailing(since):
            if time.monotonic() > deadline:
                return why
            await asyncio.sleep(0.1)
        return ""

    def plan(self, name: str, bake: str) -> str:
        key_file = self.directory / "legacy" / "owner.key"
        return PLAN.format(name=name, old=self._old, key_file=key_file, bake=bake)

    async def migration(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self.call("GET", f"/migrations/{name}")
        return found
