"""A soak: migrations there and back, with traffic, while one process after the other is struck.

All that is left to chance comes from one seed: which fault is next, when, and for how long. After each strike
the world must become whole again; after each half of a migration, and at the end, the account is balanced.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from random import Random

import asyncpg
import httpx
import msgspec

from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.load.account import Accountant, Ledger
from fleetlift.load.faults import FAULTS
from fleetlift.load.world import Refused, World

AWAY = (httpx.HTTPError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, Unavailable)
COMMANDS = ("lock", "unlock", "honk")
POLL_S = 0.3
STANDSTILL_S = 300.0  # a migration that does not change for so long does not go on
RESUME_AFTER_S = 2.0
_OVER = ("finished", "reverted")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. `strikes`: these faults in this order, instead of chance; the end comes when they
    and half a migration are through."""

    for_s: float
    seed: int
    devices: int = 12
    only: tuple[str, ...] = ()
    at_once: int = 1
    commands_per_s: float = 5.0
    command_expires_s: float = 20.0
    bake: str = "2s"
    pause_s: tuple[float, float] = (0.5, 6.0)  # between a world that is whole and the next strike
    strikes: tuple[str, ...] = ()


class Struck(msgspec.Struct, frozen=True):
    """One strike. `whole_after_s`: from its beginning, and so with the time for which a process hung."""

    at_s: float
    faults: tuple[str, ...]
    did: str
    where: str  # how far the migration was
    whole_after_s: float


class Progress(msgspec.Struct, kw_only=True):
    """How it stands, for whoever looks on."""

    doing: str = "starting"
    migration: str = ""
    migrations: int = 0  # halves that came to their end: there, or back
    held: int = 0  # times that a gate held a migration, and it was told to go on
    struck: list[Struck] = []
    ledger: Ledger = Ledger()
    problems: list[str] = []
    said: deque[tuple[int, str]] = deque(maxlen=8)  # numbered from 1


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The result. `good`: every promise was kept."""

    good: bool
    seed: int
    lasted_s: float
    devices: int
    migrations: int
    held: int
    strikes: int
    struck: Sequence[Struck]
    ledger: Ledger
    problems: Sequence[str]


class Broken(FleetError):
    """A promise broke; going on would only blur where."""


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """The faults that `--only` means: by their names or their groups. Raises BadInput."""
    groups = {fault.group for fault in FAULTS.values()}
    for name in only:
        if name not in FAULTS and name not in groups:
            raise BadInput(f"fault {name!r}: one of {', '.join([*sorted(groups), *FAULTS])}")
    return tuple(name for name, fault in FAULTS.items() if not only or {name, fault.group} & set(only))


class Soak:
    """One run in `directory`, which must be empty. `run` returns the verdict; `stop` ends it early."""

    def __init__(self, options: Options, directory: Path) -> None:
        self.options = options
        self.progress = Progress(struck=[], problems=[], said=deque(maxlen=8))
        self.stop = asyncio.Event()
        self.started = time.monotonic()
        self._said = 0
        self._faults = options.strikes or chosen(options.only)
        self._chance = Random(options.seed)
        self._world = World(directory, options.devices)
        self._accountant = Accountant(self._world)

    @property
    def left_s(self) -> float:
        return max(0.0, self.options.for_s - (time.monotonic() - self.started))

    def _say(self, text: str) -> None:
        self._said += 1
        self.progress.said.append((self._said, f"{time.monotonic() - self.started:7.1f} s  {text}"))

    async def run(self) -> Verdict:
        """Until the time is over, `stop` is set or a promise broke. Raises Unavailable on a bad start."""
        try:
            await self._world.start()
            self.started = time.monotonic()
            self._say(f"{self.options.devices} devices, seed {self.options.seed}")
            try:
                await self._strike_while_it_moves()
                self.progress.doing = "settling"
                await self._settle()
            except Broken as problem:
                self.progress.problems.append(str(problem))
        finally:
            self.progress.doing = "stopping"
            await self._world.stop()
        p = self.progress
        return Verdict(
            good=not p.problems,
            seed=self.options.seed,
            lasted_s=round(time.monotonic() - self.started, 1),
            devices=self.options.devices,
            migrations=p.migrations,
            held=p.held,
            strikes=len(p.struck),
            struck=p.struck,
            ledger=p.ledger,
            problems=p.problems,
        )

    async def _strike_while_it_moves(self) -> None:
        tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("strikes", self._strike()),
                ("migrations", self._migrate()),
                ("commands", self._command()),
            )
        ]
        over = asyncio.create_task(self.stop.wait(), name="stop")
        try:
            done, _ = await asyncio.wait(
                [*tasks, over], timeout=self.left_s, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            for task in (*tasks, over):
                task.cancel()
            await asyncio.gather(*tasks, over, return_exceptions=True)

    # -- strikes -----------------------------------------------------------------------------------------

    async def _strike(self) -> None:
        await self._whole(time.time(), "the start")
        for number in range(10**9):
            await asyncio.sleep(self._chance.uniform(*self.options.pause_s))
            if self.options.strikes:
                if number == len(self.options.strikes):
                    while not self.progress.migrations:  # noqa: ASYNC110 - nothing else waits for it
                        await asyncio.sleep(POLL_S)
                    return
                names: tuple[str, ...] = (self.options.strikes[number],)
            else:
                names = tuple(self._chance.sample(self._faults, min(self.options.at_once, len(self._faults))))
            await self._strike_with(names)

    async def _strike_with(self, names: tuple[str, ...]) -> None:
        began, where = time.monotonic(), self.progress.migration
        self.progress.doing = f"striking: {', '.join(names)}"
        chances = [Random(self._chance.random()) for _ in names]
        try:
            did = await asyncio.gather(
                *(
                    FAULTS[name].strike(self._world, chance)
                    for name, chance in zip(names, chances, strict=True)
                )
            )
        except FleetError as problem:
            raise Broken(f"{', '.join(names)}: {problem}") from problem
        self.progress.doing = f"healing: {', '.join(names)}"
        text = "; ".join(did)
        await self._whole(time.time(), text)
        took_s = round(time.monotonic() - began, 2)
        at_s = round(began - self.started, 1)
        self.progress.struck.append(Struck(at_s, names, text, where, took_s))
        self._say(f"{text}: whole after {took_s:.1f} s ({where})")
        self.progress.doing = "watching"
        if twice := [one for one, times in self._world.executions().items() if times > 1]:
            raise Broken(f"after {text}: executed twice: {', '.join(twice[:5])}")

    async def _whole(self, since: float, after: str) -> None:
        if why := await self._world.until_whole(since):
            raise Broken(f"not whole again after {after}: {why}")

    # -- traffic -----------------------------------------------------------------------------------------

    async def _command(self) -> None:
        """Commands to devices by chance, whatever goes on; what the API has taken is remembered."""
        chance = Random(self.options.seed + 1)
        calls: set[asyncio.Task[None]] = set()
        try:
            while True:
                await asyncio.sleep(chance.expovariate(self.options.commands_per_s))
                device, name = chance.choice(self._world.devices), chance.choice(COMMANDS)
                if len(calls) < 50:
                    call = asyncio.create_task(self._send(device, name))
                    calls.add(call)
                    call.add_done_callback(calls.discard)
        finally:
            for call in calls:
                call.cancel()

    async def _send(self, device: str, name: str) -> None:
        body = {"name": name, "expires_in": self.options.command_expires_s}
        with contextlib.suppress(Refused, *AWAY):
            made = await self._world.call("POST", f"/devices/{device}/commands", body)
            self._accountant.taken.append(made["id"])

    # -- migrations --------------------------------------------------------------------------------------

    async def _migrate(self) -> None:
        """Through the whole ladder, and back, again and again. The former is released once the next runs."""
        former = ""
        for number in range(1, 10**9):
            name = f"soak-{number}"
            await self._ask("POST", "/migrations", {"plan": self._world.plan(name, self.options.bake)})
            if former:
                await self._ask("POST", f"/migrations/{former}/release")
            await self._until(name, "finished")
            await self.balance()
            await self._ask("POST", f"/migrations/{name}/revert", {})
            await self._until(name, "reverted")
            await self.balance()
            former = name

    async def _ask(self, method: str, path: str, body: object = None) -> None:
        """Ask until there is an answer. That a repeated request is refused is the first one's success."""
        tried = 0
        while True:
            tried += 1
            try:
                await self._world.call(method, path, body)
                return
            except Refused as problem:
                if tried == 1:
                    raise Broken(str(problem)) from problem
                return
            except AWAY:
                await asyncio.sleep(POLL_S)

    async def _until(self, name: str, phase: str) -> None:
        """Wait for the end of this half. A migration that a gate holds is told to go on, as people would."""
        moved_at, seen, held_since = time.monotonic(), "", 0.0
        while True:
            await asyncio.sleep(POLL_S)
            try:
                status = await self._world.migration(name)
            except AWAY:
                continue
            now = time.monotonic()
            moved = [status[key] for key in ("devices_new", "devices_old", "devices_moving") if key in status]
            where = f"{status['phase']} rung {status['rung']} wave {status['wave']} {status['wave_phase']}"
            self.progress.migration = f"{name} {where}"
            if status["phase"] == phase:
                self.progress.migrations += 1
                self._say(f"{name} {phase}")
                return
            if status["phase"] == "held":
                held_since = held_since or now
                if now - held_since > RESUME_AFTER_S:
                    self.progress.held += 1
                    self._say(f"{name} is held and told to go on: {status.get('reason')}")
                    await self._ask("POST", f"/migrations/{name}/resume", {})
                    held_since = 0.0
            else:
                held_since = 0.0
            if (look := f"{where} {moved}") != seen:
                moved_at, seen = now, look
            elif now - moved_at > STANDSTILL_S:
                raise Broken(f"{name} does not go on: {look}, {status.get('reason')}")

    # -- the account -------------------------------------------------------------------------------------

    async def balance(self) -> None:
        """Balance the account, as soon as the database can be asked. Raises Broken."""
        while True:
            try:
                ledger = await self._accountant.balance()
                break
            except AWAY:
                await asyncio.sleep(POLL_S)
        self.progress.ledger = ledger
        if not ledger.good:
            self.progress.problems.extend(ledger.problems[:20])
            raise Broken(f"{len(ledger.problems)} broken promises")

    async def _settle(self) -> None:
        """No more faults and no more traffic: everything must come to its end."""
        await self._whole_at_the_end()
        deadline = time.monotonic() + self.options.command_expires_s + 30.0
        while time.monotonic() < deadline:
            with contextlib.suppress(*AWAY):
                async with self._world.database() as connection:
                    if not await connection.fetchval("SELECT count(*) FROM command WHERE ended_at IS NULL"):
                        break
            await asyncio.sleep(0.3)
        else:
            self.progress.problems.append("commands are without a final state long after their expiry")
        await asyncio.to_thread(self._world.fleet.stop, within_s=60.0)
        await self.balance()

    async def _whole_at_the_end(self) -> None:
        """A fault that the end of the time cut short may have left a part of ours dead."""
        for part in self._world.parts:
            if part.pid is None:
                part.start()
        since = time.time()
        sending = asyncio.create_task(self._command())
        try:
            await self._whole(since, "the end of the strikes")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
