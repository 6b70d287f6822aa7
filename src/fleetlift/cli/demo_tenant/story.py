"""The story of the tenant's demo: a shared cloud at work, a rehearsal, a move, a verdict."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fleetlift.bus.embedded import random_database_password
from fleetlift.cli.client import Api, connect
from fleetlift.cli.demo.stage import Stage
from fleetlift.cli.demo_tenant import cloud
from fleetlift.cli.demo_tenant.verdict import Verdict, figures, shown
from fleetlift.cli.migrate import print_event
from fleetlift.cli.rehearse import rehearsed
from fleetlift.cli.rehearse import show as show_rehearsal
from fleetlift.cli.tenant_watch import render
from fleetlift.config import free_port, load_run
from fleetlift.core.dns import HonoursTtl, PinsFirst
from fleetlift.core.errors import Unavailable
from fleetlift.core.migration import Phase
from fleetlift.core.tenant.status import MoveStatus, from_document
from fleetlift.load.plain import PlainDevice, PlainFleet
from fleetlift.load.resolving import Resolver
from fleetlift.migrate.tenant_report import read_report
from fleetlift.migrate.tenant_report import render as render_report
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.leftovers import leftovers
from fleetlift.testing_dns import DnsServer, running_knot

NAME: Final = "acme-to-dedicated"
ZONE: Final = "cloud.test"
HOST: Final = f"acme.{ZONE}"
OLD_HOST, NEW_HOST = "127.0.0.2", "127.0.0.3"
TENANTS: Final = {"acme": cloud.ACME, "pool": cloud.POOL}
TTL_S: Final = 5
POLL_S: Final = 0.4
PATIENCE_S: Final = 900.0
DEVICE_ROWS: Final = 60
MESSAGES_S: Final = 2.0  # of each device
PINNED: Final = 2  # devices that never ask DNS again
_OVER: Final = (Phase.FINISHED, Phase.HELD, Phase.REVERTED)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `fleetlift demo-tenant` was asked for."""

    devices: int
    rows: int
    writes_s: float
    load_s: float
    directory: Path


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """A PostgreSQL database: with its password for us, without for the plan."""

    url: str
    plain: str
    password: str


class Story(Stage):
    """One run. All that it leaves is in `options.directory`."""

    def __init__(self, options: Options, console: Console) -> None:
        super().__init__(options.directory.resolve(), console)
        self.options = options
        self._printed = 0

    async def run(self) -> int:
        """The whole story. Returns the exit status: 0 when every promise was kept."""
        self._check_knot()
        self.clear(self.options.devices)
        async with contextlib.AsyncExitStack() as stack:
            verdict = await self._tell(stack)
        self.close(verdict, shown(verdict), self.directory / "report.html")
        return 0 if verdict.good else 1

    async def _tell(self, stack: contextlib.AsyncExitStack) -> Verdict:
        source = await stack.enter_async_context(self._database("cloud"))
        target = await stack.enter_async_context(self._database("dedicated"))
        rows = await cloud.fill(source.url, devices=DEVICE_ROWS, values=self.options.rows)
        self.say(f"a shared database: {cloud.TENANTS} tenants, {rows:,} rows in the same tables")
        port = free_port(OLD_HOST, NEW_HOST)
        dns = await stack.enter_async_context(
            running_knot(
                self.directory / "knot",
                ZONE,
                [f"{name} {TTL_S} A {OLD_HOST}" for name in ("acme", "pool", "others")],
            )
        )
        old = self._serve(stack, "old", f"127.0.0.1:{free_port()}", {})
        relay = self._relay(stack, old, port)
        secrets_ = {
            "CLOUD_DB_PASSWORD": source.password,
            "ACME_DB_PASSWORD": target.password,
            "FLEETLIFT_DNS_KEY": dns.key_text,
        }
        new = self._serve(stack, "new", f"{NEW_HOST}:{port}", secrets_)
        self.say(f"the shared cloud at {OLD_HOST}, a dedicated Fleetlift at {NEW_HOST}, names on Knot")
        apis = [stack.enter_context(connect(data)) for data in (old, new)]
        fleet = await self._devices(stack, apis, dns, port)
        self.say(
            f"{len(fleet.devices)} devices on line by name, {PINNED} of them will never look it up again"
        )
        app = cloud.Application(source.url, target.url, tenant=cloud.ACME, rate_s=self.options.writes_s)
        await app.start()
        stack.push_async_callback(app.stop)
        self.say(f"an application writes {self.options.writes_s:g} times a second, and so do other tenants")
        plan = self._write_plan(source, target, dns, relay, port)
        await self._explain(source)
        rehearsal = await asyncio.to_thread(
            rehearsed, apis[1], plan, cycles=1, with_load=False, tell=self._whisper
        )
        show_rehearsal(rehearsal)
        if not rehearsal.good:
            raise Unavailable(f"the rehearsal did not go as it should: {rehearsal.cycles[-1].problem}")
        self.say("the test pool has been there and back")
        status = await self._migrate(apis[1], plan)
        await asyncio.sleep(3.0)  # life on the new side, before the accounts are closed
        return await self._settle(status, apis[1], source, target, (old, new), fleet, app, rehearsal.good)

    # -- the parts -------------------------------------------------------------------------------------

    def _whisper(self, text: str) -> None:
        self.say(text, sign="·", style="dim")

    def _check_knot(self) -> None:
        """A name server is needed; where we may, it is installed."""
        if shutil.which("knotd") or Path("/usr/sbin/knotd").exists():
            return
        script = Path(__file__).parents[4] / "scripts" / "debian_packages.sh"
        done = subprocess.run([str(script), "knot"], check=False) if script.is_file() else None
        if done is None or done.returncode:
            raise Unavailable(
                "the demo needs a name server that takes updates: apt-get install -y knot, then try again"
            )

    @contextlib.asynccontextmanager
    async def _database(self, name: str) -> AsyncIterator[Side]:
        place = self.directory / name
        place.mkdir()
        password = random_database_password()
        server = EmbeddedPostgres(
            place / "pg",
            password=password,
            log_file=place / "postgresql.log",
            extra={"wal_level": "logical", "max_wal_senders": "10", "max_replication_slots": "10"},
        )
        url = await server.start()
        try:
            parts = urlsplit(url)
            user = parts.netloc.rpartition("@")[0].partition(":")[0]
            yield Side(url=url, plain=parts._replace(netloc=f"{user}@").geturl(), password=password)
        finally:
            await server.stop()

    def _serve(
        self, stack: contextlib.AsyncExitStack, name: str, mqtt: str, environment: dict[str, str]
    ) -> Path:
        data = self.directory / name
        listen = ["--http", "127.0.0.1:0", "--mqtt", mqtt]
        self.start(stack, name, ["serve", "--data", str(data), *listen], "ready", environment)
        return data

    def _relay(self, stack: contextlib.AsyncExitStack, old: Path, port: int) -> Path:
        data = self.directory / "relay"
        self.start(
            stack,
            "relay",
            [
                *("relay", "--data", str(data), "--listen", f"{OLD_HOST}:{port}"),
                *("--old", load_run(old).mqtt, "--new", f"{NEW_HOST}:{port}"),
            ],
            "ready",
        )
        return data

    async def _devices(
        self, stack: contextlib.AsyncExitStack, apis: list[Api], dns: DnsServer, port: int
    ) -> PlainFleet:
        """Register everybody on both sides, and let them connect by name."""
        devices = []
        wanted = [("acme", self.options.devices), ("pool", 5), ("others", 10)]
        for api in apis:
            for tenant, _ in wanted:
                api.post("/tenants", {"id": tenant, "name": tenant})
        for tenant, count in wanted:
            for number in range(count):
                name, password = f"{tenant}-{number:04}", secrets.token_urlsafe(18)
                for api in apis[: 1 if tenant == "others" else 2]:
                    api.request(
                        "PUT",
                        f"/devices/{name}",
                        body={"tenant": tenant, "credentials": [{"kind": "password", "value": password}]},
                    )
                model = PinsFirst() if tenant == "acme" and number < PINNED else HonoursTtl()
                devices.append(
                    PlainDevice(
                        name,
                        password,
                        host=f"{tenant}.{ZONE}",
                        port=port,
                        resolver=Resolver(dns.address, model=model),
                        rate_s=MESSAGES_S,
                        body=lambda seq: {"speed_kmh": seq % 130},
                    )
                )
        fleet = PlainFleet(devices)
        fleet.start()
        stack.push_async_callback(fleet.stop)
        deadline = time.monotonic() + 60
        while fleet.connected < len(devices):
            if time.monotonic() > deadline:
                raise Unavailable(f"only {fleet.connected} of {len(devices)} devices came on line")
            await asyncio.sleep(0.1)
        return fleet

    def _write_plan(self, source: Side, target: Side, dns: DnsServer, relay: Path, port: int) -> Path:
        here = Path(__file__).parent
        path = self.directory / "plan.yaml"
        shutil.copy(here / "scenario.yaml", self.directory / "scenario.yaml")
        run = json.loads((relay / "relay.json").read_text())
        path.write_text(
            (here / "plan.yaml")
            .read_text()
            .format(
                source=source.plain,
                target=target.plain,
                name=HOST,
                port=port,
                new_host=NEW_HOST,
                relay=run["admin"],
                relay_token=relay / "relay.token",
                dns=dns.address,
                zone=ZONE,
                load=self.options.load_s,
            )
        )
        return path

    # -- the move --------------------------------------------------------------------------------------

    async def _explain(self, source: Side) -> None:
        """Which rows, before anything moves: the same as `fleetlift tenant explain` shows."""
        done = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fleetlift.cli.main", "tenant", "explain"),
            *("--plan", str(self.directory / "plan.yaml")),
            env={**os.environ, "CLOUD_DB_PASSWORD": source.password, "COLUMNS": str(self.console.width)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await done.communicate()
        (self.directory / "explain.txt").write_bytes(said)
        if done.returncode:
            raise Unavailable(f"the tenant could not be explained:\n{said.decode()}")
        self.console.print(Text(said.decode().rstrip()), soft_wrap=True)
        self.say("which rows come, and why: 'fleetlift tenant explain' says it for any plan")

    async def _migrate(self, api: Api, plan: Path) -> MoveStatus:
        body = {
            "plan": plan.read_text(),
            "files": {"scenario.yaml": (self.directory / "scenario.yaml").read_text()},
        }
        check = await asyncio.to_thread(api.post, "/migrations/check", body)
        (self.directory / "check.json").write_text(json.dumps(check, indent=2) + "\n")
        await asyncio.to_thread(api.post, "/migrations", body)
        self.say(f"the move {NAME} has started; its plan is {plan}")
        deadline = time.monotonic() + PATIENCE_S
        with Live(console=self.console, screen=self.console.is_terminal, auto_refresh=False) as live:
            while True:
                document = await asyncio.to_thread(api.get, f"/migrations/{NAME}")
                status = from_document(document)
                if self.console.is_terminal:
                    width, height = self.console.size
                    live.update(Group(render(status, width, height)), refresh=True)
                else:
                    for event in document["events"]:
                        if event["id"] > self._printed:
                            self._printed = event["id"]
                            print_event(event, evidence=False, as_json=False)
                if status.phase in _OVER:
                    break
                if time.monotonic() > deadline:
                    raise Unavailable(f"the move has not ended within {PATIENCE_S / 60:.0f} minutes")
                await asyncio.sleep(POLL_S)
        if status.phase is not Phase.FINISHED:
            self.say(f"the move is {status.phase}: {status.reason}", sign="✗", style="red")
        return status

    # -- the verdict -----------------------------------------------------------------------------------

    async def _settle(
        self,
        status: MoveStatus,
        api: Api,
        source: Side,
        target: Side,
        sides: tuple[Path, Path],
        fleet: PlainFleet,
        app: cloud.Application,
        rehearsal: bool,
    ) -> Verdict:
        """Close both accounts, then lay them beside what is stored."""
        self.say("devices and application fall silent; what they were promised is counted")
        await app.stop()
        left = await fleet.finish(30.0)
        acme = [d for d in fleet.devices if d.device.startswith(("acme", "pool"))]
        lost = twice = 0
        for _ in range(60):  # the last batch is a moment behind
            lost, twice = await self._messages(sides, acme)
            if not lost:
                break
            await asyncio.sleep(0.25)
        found: dict[str, Any] = {}
        for step in status.steps:
            found.update(step.figures)
        finished = status.phase is Phase.FINISHED
        rows_lost = await app.lost(moved=finished)
        missing = found.get("rows_missing", 0) + found.get("rows_differing", 0)
        leaked = found.get("rows_foreign", 0)
        left_on_source = 0
        if finished:
            leaked += await cloud.leaked(target.url, cloud.ACME)
            left_on_source = await self._release(api, source)
        verdict = Verdict(
            finished=finished,
            rows_moved=found.get("rows_verified", 0),
            rows_lost=rows_lost + missing,
            rows_leaked=leaked,
            writes=app.written,
            writes_refused=sum(app.refused.values()),
            freeze_s=found.get("freeze_s"),
            longest_wait_s=round(app.longest_wait_s, 3),
            devices=len(fleet.devices),
            messages_sent=sum(d.acknowledged.count for d in acme),
            messages_lost=lost + left,
            messages_twice=twice,
            stragglers=found.get("stragglers", 0),
            longest_gap_s=round(max(d.longest_gap_s for d in acme), 3),
            rehearsed=rehearsal,
            left_on_source=left_on_source,
            lasted_s=self.lasted_s,
        )
        await self._write_report(sides[1], verdict)
        return verdict

    async def _messages(self, sides: tuple[Path, Path], devices: list[PlainDevice]) -> tuple[int, int]:
        """Acknowledged messages that neither side has, and those that both have stored."""
        stored: list[set[tuple[str, int]]] = []
        for data in sides:
            conn = await asyncpg.connect(load_run(data).database_url)
            try:
                rows = await conn.fetch(
                    "SELECT device, seq FROM telemetry WHERE device = ANY($1)", [d.device for d in devices]
                )
            finally:
                await conn.close()
            stored.append({(row["device"], row["seq"]) for row in rows})
        there = stored[0] | stored[1]
        lost = 0
        for device in devices:
            for start, end in device.acknowledged.ranges():
                lost += sum(1 for seq in range(start, end) if (device.device, seq) not in there)
        return lost, len(stored[0] & stored[1])

    async def _release(self, api: Api, source: Side) -> int:
        """Give up the way back; how many things of Fleetlift's are left on the source then."""
        await asyncio.to_thread(
            api.request, "POST", f"/migrations/{NAME}/release", params={"wait": 15}, body={"force": False}
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            events = (await asyncio.to_thread(api.get, f"/migrations/{NAME}"))["events"]
            if any(event["kind"] == "move_cleaned" for event in events):
                break
            await asyncio.sleep(0.3)
        left = await leftovers(source.url)
        self.say(f"released: {len(left)} things of Fleetlift's are left on the source")
        return len(left)

    async def _write_report(self, backend: Path, verdict: Verdict) -> None:
        settings = load_run(backend)
        async with asyncpg.create_pool(
            settings.engine_database_url or settings.database_url, min_size=1, max_size=2
        ) as engine:
            data = await read_report(engine, NAME, backend, figures(verdict))
        (self.directory / "report.html").write_text(render_report(data), encoding="utf-8")
