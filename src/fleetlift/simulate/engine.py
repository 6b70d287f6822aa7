"""The engine in the simulator: its database, its journal, and controllers that live, hang, and are killed.

The rounds, the bridge, the lever and the emergency path are the real ones; here is what they reach for.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from fleetlift.core import decide as decisions
from fleetlift.core.command import Path, PathStatus, Reported
from fleetlift.core.errors import Conflict, FleetError, Unavailable
from fleetlift.core.migration import (
    AuditEntry,
    Decision,
    DeviceObservation,
    FleetDevice,
    GateResult,
    MigrationState,
    Observations,
    Request,
    RequestKind,
)
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.plan import Plan
from fleetlift.core.telemetry import DeadLetter
from fleetlift.core.timeline import TimelinePoint
from fleetlift.levers.flag import FlagLever
from fleetlift.migrate import journal as journals
from fleetlift.migrate.bridge import Bridge
from fleetlift.migrate.runner import ERROR_PAUSE_S, Runner, read_plan, rounds_forever
from fleetlift.sides.base import FeedItem, SideCommand
from fleetlift.simulate.clock import Clock, Crashed
from fleetlift.simulate.device import ENDPOINT
from fleetlift.simulate.history import History
from fleetlift.simulate.measures import SimulatedMeasures
from fleetlift.simulate.new_side import NewSide
from fleetlift.simulate.old_side import OldSide
from fleetlift.store.commands import Answer
from fleetlift.store.engine import StoredMigration

NAME = "simulated"
KEY = "legacy simulated"
T = TypeVar("T")


class Witness(Protocol):
    """Sees what controllers do, as they do it."""

    def decided(
        self,
        controller: str,
        plan: Plan,
        state: MigrationState,
        seen: Observations,
        now: float,
        decision: Decision,
    ) -> None: ...

    def committed(
        self,
        controller: str,
        before: StoredMigration,
        after: StoredMigration,
        audit: Sequence[AuditEntry],
        stored: StoredMigration,
    ) -> None: ...

    def told(self, side: str, orders: Mapping[str, Orders]) -> None: ...

    def broken(self, promise: str, what: str) -> None: ...


class EngineDatabase:
    """Schema `engine`, in memory. `failing`: no connection; `loses_answers`: commits, and does not say so."""

    def __init__(self, clock: Clock, history: History) -> None:
        self.migration: StoredMigration | None = None
        self.requests: dict[int, Request] = {}
        self.answered: set[int] = set()
        self.audit: list[tuple[float, AuditEntry]] = []
        self.samples: list[tuple[float, TimelinePoint]] = []
        self.failing = False
        self.loses_answers = 0.0
        self.wakes: list[asyncio.Event] = []
        self._clock = clock
        self._history = history

    @property
    def held(self) -> StoredMigration:
        assert self.migration is not None
        return self.migration

    def ask(self, kind: RequestKind, args: Mapping[str, Any], actor: str) -> int:
        id_ = len(self.requests) + 1
        self.requests[id_] = Request(id=id_, kind=kind, actor=actor, at=self._clock.now, args=dict(args))
        what = {k: v for k, v in args.items() if k != "plan"}
        self._history.note("operator", kind.value, msgspec.json.encode(what).decode())
        for wake in self.wakes:
            wake.set()
        return id_

    def emergency(self, epoch: int, actor: str, devices: Sequence[str] | None) -> None:
        kind = RequestKind.EMERGENCY if devices is None else RequestKind.REVERT
        wanted: list[dict[str, Any]] = [{"epoch": epoch}]
        if devices is not None:
            wanted = [{"epoch": epoch, "device": device} for device in devices]
        known = [r.args for r in self.requests.values() if r.kind is kind]
        for args in wanted:
            if args not in known:
                self.ask(kind, args, actor)

    def commit(
        self,
        before: StoredMigration,
        after: MigrationState,
        audit: Sequence[AuditEntry],
        answered: Sequence[int],
        gates: Sequence[GateResult],
        plan: str | None,
        now: float,
    ) -> StoredMigration:
        self.guard(before)
        self.migration = msgspec.structs.replace(
            before,
            state=after,
            gates=tuple(gates),
            version=before.version + 1,
            plan=plan or before.plan,
            plan_version=before.plan_version + (plan is not None),
            updated_at=now,
        )
        self.answered.update(answered)
        self.audit += [(now, entry) for entry in audit]
        return self.migration

    def guard(self, before: StoredMigration) -> None:
        """The optimistic guard of `store/engine.py`: WHERE version = …"""
        if before.version != self.held.version:
            raise Conflict("was changed by another controller meanwhile: read it again")


class JournalFile:
    """The engine's own disk: what is in it survives whatever else is lost."""

    def __init__(self) -> None:
        self.records: list[journals.Record] = []
        self._epochs: dict[str, int] = {}

    def add(self, *records: journals.Record) -> None:
        for record in records:
            self.records.append(record)
            match record:
                case journals.Told(orders=orders):
                    self._epochs.update((order.device, order.epoch) for order in orders)
                case journals.Emergency(devices=devices, epoch=epoch):
                    self._epochs.update((device, epoch) for device in devices)

    def epoch_of(self, device: str) -> int:
        """The newest epoch that the journal holds for a device."""
        return self._epochs.get(device, 0)


class Reach:
    """How one controller reaches one thing: in some time, not at all, or for ever."""

    def __init__(self, clock: Clock, alive: Callable[[], bool], chance: random.Random) -> None:
        self.hanging = False
        self.failing = False
        self.latency_s = 0.002 + 0.01 * chance.random()
        self._clock = clock
        self._alive = alive

    async def __call__(self, effect: Callable[[], T]) -> T:
        self._check()
        await asyncio.sleep(self.latency_s)
        while self.hanging:  # noqa: ASYNC110 (until its timeout, or until the fault is over)
            await asyncio.sleep(1.0)
        self._check()
        if self.failing:
            raise OSError("the connection was lost")
        return effect()

    def _check(self) -> None:
        if not self._alive():
            raise Crashed


class Controller:
    """One controller process from its start to its death: real rounds, a real bridge, a real lever."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        history: History,
        engine: EngineDatabase,
        journal: JournalFile,
        old: OldSide,
        new: NewSide,
        witness: Witness,
        chance: random.Random,
        *,
        round_every_s: float,
    ) -> None:
        self.name = name
        self.alive = True
        self.kill_at: dict[str, int] = {}
        self.reach_engine = Reach(clock, lambda: self.alive, chance)
        self.reach_old = Reach(clock, lambda: self.alive, chance)
        self.reach_new = Reach(clock, lambda: self.alive, chance)
        self._clock = clock
        self._history = history
        self._engine = engine
        self._journal = journal
        self._old = old
        self._new = new
        self._witness = witness
        self._chance = chance
        self._round_every_s = round_every_s
        self._bridge_task: asyncio.Task[None] | None = None
        history.note(name, "starts")
        self._task = clock.spawn(self._run(), name)

    async def _run(self) -> None:
        while True:
            try:
                stored = await self.load(NAME)
                break
            except OSError:
                await asyncio.sleep(ERROR_PAUSE_S)
        plan = read_plan(stored.plan)
        bridge = Bridge(
            _OldPort(self),
            key=KEY,
            store=_FeedPort(self),
            to_log=self._to_log,
            now=self._clock.time,
            monotonic=self._clock.time,
        )
        bridge.migrations[NAME] = plan.fleet.tenant
        self._bridge_task = self._clock.spawn(bridge.run(), f"{self.name} bridge")
        new = _NewPort(self)
        measures = SimulatedMeasures(
            self._new.database,
            self._clock,
            reach=self.reach_new,
            log_end=lambda: len(self._new.log),
            feed_behind=bridge.feed_behind,
        )
        runner = Runner(
            stored,
            store=self,
            old=bridge,
            old_entry=lambda plan: {plan.old.kind: plan.old.address},
            new=new,
            lever=FlagLever(bridge.side, new),
            measures=measures,
            journal=_JournalPort(self),
            endpoint=lambda plan: ENDPOINT,
            step=self.step,
            decide=self.decide,
            monotonic=self._clock.time,
        )
        wake = asyncio.Event()
        self._engine.wakes.append(wake)
        guarded, now = _Guarded(runner, self._witness), self._clock.time
        await rounds_forever(guarded, wake, every_s=self._round_every_s, now=now, monotonic=now)

    def kill(self, why: str) -> None:
        """SIGKILL: nothing of it runs any more."""
        if self.alive:
            self.alive = False
            self._history.note(self.name, "killed", why)
            self._task.cancel()
            if self._bridge_task is not None:
                self._bridge_task.cancel()

    def step(self, name: str) -> None:
        if name in self.kill_at:
            self.kill_at[name] -= 1
            if self.kill_at[name] <= 0:
                self.kill(f"at {name}")
                raise Crashed

    def decide(self, plan: Plan, state: MigrationState, seen: Observations, now: float) -> Decision:
        decision = decisions.decide(plan, state, seen, now)
        self._witness.decided(self.name, plan, state, seen, now, decision)
        return decision

    # -- ports.Store -------------------------------------------------------------------------------------

    async def _ask(self, effect: Callable[[], T]) -> T:
        if self._engine.failing:
            await asyncio.sleep(0.05)
            raise OSError("the engine's database does not answer")
        result = await self.reach_engine(effect)
        if self._engine.loses_answers and self._chance.random() < self._engine.loses_answers:
            raise OSError("the connection was lost after the transaction had been sent")
        return result

    async def load(self, name: str) -> StoredMigration:
        return await self._ask(lambda: self._engine.held)

    async def open_requests(self, name: str) -> Sequence[Request]:
        return await self._ask(
            lambda: tuple(r for i, r in self._engine.requests.items() if i not in self._engine.answered)
        )

    async def commit(
        self,
        before: StoredMigration,
        after: MigrationState,
        *,
        audit: Sequence[AuditEntry],
        answered: Sequence[int],
        gates: Sequence[GateResult],
        plan: str | None,
        now: float,
    ) -> StoredMigration:
        def effect() -> StoredMigration:
            stored = self._engine.held
            made = self._engine.commit(before, after, audit, answered, gates, plan, now)
            self._witness.committed(self.name, before, made, audit, stored)
            return made

        return await self._ask(effect)

    async def add_sample(self, name: str, at: float, point: TimelinePoint) -> None:
        await self._ask(lambda: self._engine.samples.append((at, point)))

    async def add_emergency(
        self, name: str, epoch: int, actor: str, *, devices: Sequence[str] | None
    ) -> None:
        await self._ask(lambda: self._engine.emergency(epoch, actor, devices))

    # -- the log -----------------------------------------------------------------------------------------

    async def _to_log(self, topic: str, payload: bytes, headers: Mapping[str, str]) -> int:
        if not self.alive:
            raise Crashed
        if not self._new.up or self._new.hanging or self.reach_new.failing:
            raise Unavailable("NATS does not answer")
        return self._new.append(topic, payload, headers)


class _Guarded:
    """A runner whose rounds may fail for what is away, and for nothing else."""

    def __init__(self, runner: Runner, witness: Witness) -> None:
        self.name = runner.name
        self.forget = runner.forget
        self._runner = runner
        self._witness = witness

    async def round(self, now: float) -> None:
        try:
            await self._runner.round(now)
        except (FleetError, OSError, TimeoutError):
            raise
        except Exception as error:
            self._witness.broken("goes on", f"a round has failed: {type(error).__name__}: {error}")


class _JournalPort:
    """`ports.Journal` on the engine's disk."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def size(self) -> int:
        return len(self._controller._journal.records)

    async def add(self, *records: journals.Record) -> None:
        await asyncio.sleep(0.003)
        if not self._controller.alive:
            raise Crashed
        self._controller._journal.add(*records)

    async def story(self) -> journals.Story | None:
        return journals.fold(self._controller._journal.records)


class _OldPort:
    """The old side as its owner has it, over the network. Implements `sides.base.Side`."""

    name = "legacy"

    def __init__(self, controller: Controller) -> None:
        self._reach = controller.reach_old
        self._old = controller._old
        self._witness = controller._witness

    def _call(self, effect: Callable[[], T]) -> T:
        self._old.check()
        return effect()

    async def _ask(self, effect: Callable[[], T]) -> T:
        while self._old.hanging:  # noqa: ASYNC110
            await asyncio.sleep(1.0)
        try:
            return await self._reach(lambda: self._call(effect))
        except OSError as error:
            raise Unavailable(str(error)) from error

    async def inventory(self) -> Sequence[FleetDevice]:
        return await self._ask(self._old.fleet)

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        if not orders:
            return {}

        def effect() -> dict[str, str]:
            self._witness.told("old", orders)
            return self._old.deliver(orders)

        return await self._ask(effect)

    async def reports(self) -> Mapping[str, DeviceReport]:
        return await self._ask(lambda: dict(self._old.reports))

    async def send_command(self, command: SideCommand) -> None:
        await self._ask(lambda: self._old.send_command(command))

    async def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        await self._ask(lambda: None)
        async for batch in self._old.feed(after):
            while self._old.hanging or self._reach.hanging:  # noqa: ASYNC110
                await asyncio.sleep(1.0)
            if self._reach.failing:
                raise Unavailable("the connection was lost")
            yield batch

    async def close(self) -> None:
        pass


class OwnersSide(_OldPort):
    """The old side as whoever reverts by the journal has it, from another machine."""

    def __init__(self, old: OldSide, witness: Witness) -> None:
        self._old = old
        self._witness = witness

    async def _ask(self, effect: Callable[[], T]) -> T:
        await asyncio.sleep(0.02)
        return self._call(effect)


class _NewPort:
    """The new side as the engine has it. Implements `levers.flag.NewSide` and `ports.New`."""

    name = "fleetlift"

    def __init__(self, controller: Controller) -> None:
        self._reach = controller.reach_new
        self._new = controller._new
        self._clock = controller._clock
        self._witness = controller._witness

    async def _ask(self, effect: Callable[[], T]) -> T:
        def call() -> T:
            self._new.check_up()
            return effect()

        try:
            return await self._reach(call)
        except OSError as error:
            raise Unavailable(str(error)) from error

    def credential(self, device: str) -> str:
        return f"credential of {device}"

    async def observe(self, devices: Sequence[str]) -> Mapping[str, DeviceObservation]:
        if not self._new.up:
            raise Unavailable("the new side's NATS does not answer")
        return await self._ask(lambda: self._new.database.observe(devices))

    async def adopt(self, devices: Sequence[FleetDevice], migration: str) -> list[str]:
        await self._ask(lambda: self._new.database.adopt(devices, migration))
        return []

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        if not orders:
            return {}

        def effect() -> dict[str, str]:
            self._witness.told("new", orders)
            return self._new.deliver(orders, self.credential)

        return await self._ask(effect)

    async def follow_reports(self, reports: Mapping[str, DeviceReport]) -> None:
        await self._ask(lambda: self._new.follow(reports))

    async def withdraw(self, devices: Sequence[str], *, migration: str) -> None:
        await self._ask(lambda: self._new.withdraw(devices))

    async def inventory(self) -> Sequence[FleetDevice]:
        return []

    async def reports(self) -> Mapping[str, DeviceReport]:
        return await self._ask(lambda: dict(self._new.database.reports))

    async def send_command(self, command: SideCommand) -> None:
        raise NotImplementedError

    async def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        return
        yield after, ()

    async def close(self) -> None:
        pass


class _FeedPort:
    """`ports.FeedStore` in the backend's database."""

    def __init__(self, controller: Controller) -> None:
        self._reach = controller.reach_new
        self._new = controller._new
        self._clock = controller._clock

    async def _ask(self, effect: Callable[[], T]) -> T:
        def call() -> T:
            self._new.check_up()
            return effect()

        return await self._reach(call)

    async def position(self, key: str) -> str | None:
        return await self._ask(lambda: self._new.database.feed_positions.get(key))

    async def owners(self, of: Sequence[str]) -> dict[str, str]:
        return {device: "t" for device in of if device in self._new.database.devices}

    async def settle(
        self, key: str, position: str, answers: Sequence[Answer], letters: Sequence[DeadLetter]
    ) -> int:
        def effect() -> int:
            database = self._new.database
            database.dead_letters += [letter.reason for letter in letters]
            database.feed_positions[key] = position
            return database.commands.answer(answers)

        return await self._ask(effect)

    async def take_outgoing(
        self, migrations: Sequence[str], *, again: bool, after: str, limit: int, now: float
    ) -> tuple[str, list[SideCommand]]:
        commands = self._new.database.commands
        if not again and not commands.waiting(Path.OLD, now):
            await asyncio.sleep(0.4)  # polls in steps of what matters here
            return "", []

        def effect() -> tuple[str, list[SideCommand]]:
            rows = sorted(c.id for c in commands.waiting(Path.OLD, now, again=again) if c.id > after)[:limit]
            if not rows:
                return "", []
            worth = commands.mark_sent(Path.OLD, rows, now)
            return rows[-1], [
                SideCommand(
                    id=c.id,
                    device=c.device,
                    name=c.name,
                    params={},
                    mode=next(p.mode for p in c.paths if p.path is Path.OLD).value,
                    expires_at=c.expires_at,
                )
                for c in worth
            ]

        return await self._ask(effect)

    async def unreachable(self, command: str, reason: str, at: float) -> None:
        answer = Answer(command=command, path=Path.OLD, reported=Reported(PathStatus.UNREACHABLE, {}), at=at)
        await self._ask(lambda: self._new.database.commands.answer([answer]))
