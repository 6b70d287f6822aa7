"""The story of the demo: a fleet on its old backend, a migration, a fault on the way, a verdict."""

import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import asyncpg
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fleetlift.cli.client import Api, connect
from fleetlift.cli.demo.operator import Operator
from fleetlift.cli.demo.stage import Stage
from fleetlift.cli.demo.verdict import (
    Stored,
    Verdict,
    acknowledged,
    figures,
    missing,
    read_stored,
    read_unfinished,
    shown,
)
from fleetlift.cli.migrate import print_event
from fleetlift.cli.watch import render
from fleetlift.config import load_run
from fleetlift.core.errors import Unavailable
from fleetlift.core.migration import Phase
from fleetlift.core.migration import Verdict as Gate
from fleetlift.core.status import MigrationStatus, from_document
from fleetlift.device.fleet import FleetStatus
from fleetlift.device.recorded import MISBEHAVING
from fleetlift.load.parts import Part
from fleetlift.migrate.report import read_report
from fleetlift.migrate.report import render as render_report

NAME: Final = "connect-to-fleetlift"
WIDE, NARROW = "attributes.hardware >= 2", f"attributes.hardware != {MISBEHAVING}"
POLL_S: Final = 0.4
TIME_TO_READ_S: Final = 5.0  # a breach stays on the screen so long before the plan is narrowed
PATIENCE_S: Final = 900.0  # a demo that takes longer has failed
_OVER: Final = (Phase.FINISHED, Phase.REVERTED, Phase.RELEASED)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `fleetlift demo` was asked for. `bake_s` is how long each wave is watched at the least."""

    devices: int
    speed: float
    directory: Path
    bake_s: float
    commands_per_s: float


class Demo(Stage):
    """One run. All that it leaves is in `options.directory`."""

    def __init__(self, options: Options, console: Console) -> None:
        super().__init__(options.directory, console)
        self.options = options
        self._printed = 0  # the newest event that was printed where there is no live screen

    def run(self) -> int:
        """The whole story. Returns the exit status: 0 when every promise was kept."""
        self.clear(self.options.devices)
        with ExitStack() as parts:
            old, fleet = self._start_old_side(parts)
            backend = self._start_new_side(parts)
            api = parts.enter_context(connect(backend))
            operator = self._migrate(parts, api, old)
            finished = self._watch(api, old)
            self.say("the operator puts the console away; devices drain their outboxes")
            operator.stop()
            verdict = asyncio.run(self._settle(finished, backend, fleet, operator))
            report = asyncio.run(self._write_report(backend, verdict))
        self.close(verdict, shown(verdict), report)
        return 0 if verdict.good else 1

    # -- the parts -------------------------------------------------------------------------------------

    def _start_old_side(self, parts: ExitStack) -> tuple[str, Part]:
        inventory, data = self.directory / "inventory.jsonl", self.directory / "legacy"
        count = ["--devices", str(self.options.devices), "--inventory", str(inventory)]
        self.start(parts, "inventory", ["device", "inventory", *count], "devices in")
        serve = [
            "legacy",
            "serve",
            "--data",
            str(data),
            "--listen",
            "127.0.0.1:0",
            "--devices",
            str(inventory),
        ]
        self.start(parts, "legacy", serve, "ready")
        old = f"tcp://{(data / 'address').read_text().strip()}"
        self.say(f"the old backend listens on {old}: one TCP server with a protocol of its own")
        fleet = self.start(
            parts,
            "fleet",
            [
                *("device", "fleet", *count, "--old", old, "--speed", f"{self.options.speed:g}"),
                *("--state", str(self.directory / "devices"), "--status", str(self._fleet_status)),
                *("--faulty-revision", str(MISBEHAVING), "--drain", "15"),
            ],
            "running",
        )
        self.say(f"{self.options.devices} recorded vehicles drive, each an agent with a disk of its own")
        return old, fleet

    @property
    def _fleet_status(self) -> Path:
        return self.directory / "fleet.json"

    def _start_new_side(self, parts: ExitStack) -> Path:
        data = self.directory / "fleetlift"
        listen = ["--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"]
        self.start(parts, "serve", ["serve", "--data", str(data), *listen], "ready")
        self.say("Fleetlift is ready on its embedded engines, NATS and PostgreSQL")
        return data

    # -- the migration ---------------------------------------------------------------------------------

    def _plan(self, where: str, old: str) -> str:
        """The plan file, also left in the directory for whoever wants to read it."""
        text = (Path(__file__).parent / "plan.yaml").read_text()
        key_file = (self.directory / "legacy" / "owner.key").resolve()
        text = text.format(where=where, old=old, key_file=key_file, bake=f"{self.options.bake_s:g}s")
        (self.directory / "plan.yaml").write_text(text)
        return text

    def _migrate(self, parts: ExitStack, api: Api, old: str) -> Operator:
        """Check and start; the operator's work goes on from before the first wave."""
        plan = self._plan(WIDE, old)
        api.post("/tenants", {"id": "carshare", "name": "Car sharing"})
        check = api.post("/migrations/check", {"plan": plan})
        (self.directory / "check.json").write_text(json.dumps(check, indent=2) + "\n")
        api.post("/migrations", {"plan": plan})
        self.say(f"the migration {NAME} has started; its plan is {self.directory / 'plan.yaml'}")
        devices = [line["device"] for line in map(json.loads, self._inventory())]
        deadline = time.monotonic() + 30.0
        while len(api.items("/devices", len(devices))[0]) < len(devices):
            if time.monotonic() > deadline:
                raise Unavailable(f"the fleet was not taken over; see {self.directory}/fleetlift/logs")
            time.sleep(0.1)
        operator = Operator(api, devices, self.options.commands_per_s)
        parts.callback(operator.stop)
        operator.start()
        self.say(f"an operator locks, unlocks and sets vehicles, {self.options.commands_per_s:g} a second")
        return operator

    def _inventory(self) -> list[str]:
        return (self.directory / "inventory.jsonl").read_text().splitlines()

    def _watch(self, api: Api, old: str) -> MigrationStatus:
        """The live screen until the migration has ended. Once, after a breach, the plan is narrowed."""
        narrowed = False
        reverts = 0  # of which the plan was narrowed; that it is taken in shows a moment later
        deadline = time.monotonic() + PATIENCE_S
        held_at: float | None = None
        with Live(console=self.console, screen=self.console.is_terminal, auto_refresh=False) as live:
            while True:
                status = from_document(api.get(f"/migrations/{NAME}"))
                if self.console.is_terminal:
                    live.update(self._screen(status, narrowed), refresh=True)
                else:
                    self._print_events(api)
                if status.phase in _OVER:
                    return status
                if status.phase is Phase.HELD:
                    held_at = held_at or time.monotonic()
                    if narrowed and status.reverts > reverts:
                        raise Unavailable(f"the migration is held again: {status.reason}")
                    if not narrowed and time.monotonic() - held_at > TIME_TO_READ_S:
                        api.post(f"/migrations/{NAME}/amend", {"plan": self._plan(NARROW, old)})
                        narrowed, reverts = True, status.reverts
                if time.monotonic() > deadline:
                    raise Unavailable(f"the migration has not ended within {PATIENCE_S / 60:.0f} minutes")
                time.sleep(POLL_S)

    def _screen(self, status: MigrationStatus, narrowed: bool) -> Group:
        width, height = self.console.size
        return Group(render(status, width, height - 1), Text(), caption(status, narrowed, width))

    def _print_events(self, api: Api) -> None:
        for event in api.get(f"/migrations/{NAME}")["events"]:
            if event["id"] > self._printed:
                self._printed = event["id"]
                print_event(event, evidence=False, as_json=False)

    # -- the verdict -----------------------------------------------------------------------------------

    async def _settle(self, end: MigrationStatus, backend: Path, fleet: Part, operator: Operator) -> Verdict:
        """Wait for what is still under way (bounded), then lay the two accounts side by side."""
        database = load_run(backend).database_url
        for _ in range(100):  # commands end by their expiry at the latest
            if not (unfinished := await read_unfinished(database, operator.sent)):
                break
            await asyncio.sleep(0.3)
        await asyncio.to_thread(fleet.stop)
        told = msgspec.json.decode(self._fleet_status.read_bytes(), type=FleetStatus)
        truth = told.truth
        if truth is None:
            raise Unavailable(f"the fleet left no account of what it sent; see {fleet.log}")
        sent = acknowledged(truth)
        stored = Stored(seqs={}, rows=0, repeated=0)
        for _ in range(60):  # the old side's feed and the last batch are a moment behind
            stored = await read_stored(database, list(truth))
            if missing(sent, stored) == 0:
                break
            await asyncio.sleep(0.25)
        on_new = sum(1 for d in told.by_device.values() if d.link == "new")
        return Verdict(
            finished=end.phase is Phase.FINISHED,
            devices=len(truth),
            moved=on_new,
            stayed=len(truth) - on_new,
            messages_sent=sum(seqs.count for seqs in sent.values()),
            messages_stored=stored.rows - stored.repeated,
            messages_lost=missing(sent, stored),
            messages_twice=stored.repeated,
            commands_sent=len(operator.sent),
            commands_executed=sum(1 for d in truth.values() for times in d.executed.values() if times),
            commands_executed_twice=sum(times > 1 for d in truth.values() for times in d.executed.values()),
            commands_unfinished=unfinished,
            longest_gap_s=max((d.longest_gap_s for d in truth.values()), default=None),
            reverts=end.reverts,
            lasted_s=self.lasted_s,
        )

    async def _write_report(self, backend: Path, verdict: Verdict) -> Path:
        settings = load_run(backend)
        async with (
            asyncpg.create_pool(settings.database_url, min_size=1, max_size=2) as pool,
            asyncpg.create_pool(
                settings.engine_database_url or settings.database_url, min_size=1, max_size=2
            ) as engine,
        ):
            data = await read_report(engine, pool, NAME, figures(verdict))
        path = self.directory / "report.html"
        path.write_text(render_report(data), encoding="utf-8")
        return path


def caption(status: MigrationStatus, narrowed: bool, width: int) -> Text:
    """One line below the screen: what a spectator should know now."""
    if status.phase is Phase.HELD:
        why = next((g.why for g in status.gates if g.verdict is Gate.REVERT), status.reason)
        text = Text(
            f" revision {MISBEHAVING} misbehaves on the new side: {why}; the plan is narrowed",
            "bold yellow",
        )
    elif narrowed:
        text = Text(f" narrowed to the healthy revision: {NARROW}", "dim")
    else:
        text = Text(" a fleet moves while it drives; an operator goes on working", "dim")
    text.truncate(width, overflow="ellipsis")
    text.end = ""
    return text
