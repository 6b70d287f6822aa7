"""One simulated migration from its first order to its last check."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from fleetlift.core.command import Mode, Path
from fleetlift.core.decide import begin
from fleetlift.core.errors import FleetError
from fleetlift.core.migration import AuditEntry, MemberState, Phase, RequestKind, WavePhase
from fleetlift.core.orders import DevicePhase, Flags
from fleetlift.core.plan import check_amendment
from fleetlift.core.ranges import RangeSet
from fleetlift.core.selection import selected
from fleetlift.core.telemetry import Telemetry, parse
from fleetlift.device.messages import LinkState
from fleetlift.migrate import journal as journals
from fleetlift.migrate.emergency import bring_back
from fleetlift.migrate.runner import read_plan
from fleetlift.sides.base import TelemetryReceived
from fleetlift.simulate import faults
from fleetlift.simulate.clock import START, Clock
from fleetlift.simulate.database import Database
from fleetlift.simulate.device import NAMES, Sides, SimulatedDevice
from fleetlift.simulate.engine import KEY, NAME, Controller, EngineDatabase, JournalFile, OwnersSide
from fleetlift.simulate.history import History
from fleetlift.simulate.network import Link
from fleetlift.simulate.new_side import NewSide
from fleetlift.simulate.old_side import OldSide
from fleetlift.simulate.promises import Promises, Violated, commands_ended, missing
from fleetlift.simulate.scenario import Scenario, chance, settings
from fleetlift.store.engine import StoredMigration

MAIN_MOST_S = 700.0  # a migration that has not come to an end by then is looked at as it is
SETTLE_MOST_S = 260.0  # after the last fault: strandings, time-outs and back-offs all fit into it
BACK_WITHIN_S = 200.0
LOOK_EVERY_S = 5.0  # how often the operator looks
FRESH_S = 5.0  # a message may be on its way from the log to its row for so long
SUPERVISOR_S = 1.0  # how soon a controller that died is started again


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one simulation came to. `violated` None: every promise held."""

    seed: int
    devices: int
    phase: str
    simulated_s: float
    wall_s: float
    faults: int
    events: int
    rounds: int
    waves_passed: int
    commands: int
    messages: int
    digest: str
    violated: str | None = None
    what: str = ""
    trace: tuple[str, ...] = ()


class World:
    """Everything of one case, wired together. `run` may be called once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.history = History(self.clock)
        seed = scenario.seed
        self.new = NewSide(
            self.clock, self.history, Database(chance(seed, "database")), chance(seed, "new side")
        )
        self.old = OldSide(self.clock, self.history, chance(seed, "old side"))
        self.engine = EngineDatabase(self.clock, self.history)
        self.journal = JournalFile()
        self.promises = Promises(self.clock, self.journal.epoch_of)
        self.controllers: list[Controller] = []
        self.devices: dict[str, SimulatedDevice] = {}
        self.started = 0
        self._mends: list[Callable[[], None]] = []
        self._faulty = True
        self._struck = 0
        self._operator = chance(seed, "operator")
        self._commander = chance(seed, "commands")
        self._controller_chance = chance(seed, "controllers")
        self._commanding = True
        self._next_look = START + LOOK_EVERY_S
        self._supervised = True
        for drawn in scenario.devices:
            device = SimulatedDevice(
                drawn.id,
                self.clock,
                self.history,
                Sides(self.old, self.new),
                self.promises,
                settings=settings(drawn),
                firmware=drawn.firmware,
                attributes={"hardware": drawn.hardware, "updatable": drawn.updatable},
                period_s=drawn.period_s,
                chance=chance(seed, f"device {drawn.id}"),
            )
            self.devices[drawn.id] = device
            if drawn.joins_at is None:
                self._join(device)
            else:
                self.clock.after(drawn.joins_at, self._join, device)

    def links(self) -> Iterator[Link]:
        for device in self.devices.values():
            yield from device.links.values()

    def _join(self, device: SimulatedDevice) -> None:
        self.old.inventory[device.id] = device.attributes
        device.boot()

    # -- controllers -------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        self.controllers = [c for c in self.controllers if c.alive]
        self.started += 1
        self.controllers.append(
            Controller(
                f"controller-{self.started}",
                self.clock,
                self.history,
                self.engine,
                self.journal,
                self.old,
                self.new,
                self.promises,
                self._controller_chance,
                round_every_s=self.scenario.round_every_s,
            )
        )

    def need_controller(self) -> None:
        if not any(controller.alive for controller in self.controllers):
            self.start_controller()

    def _supervise(self) -> None:
        if self._supervised:
            self.need_controller()
        self.clock.after(SUPERVISOR_S, self._supervise)

    # -- the whole ---------------------------------------------------------------------------------------

    def run(self, *, trace: int = 200) -> Outcome:
        began = time.perf_counter()
        violated: Violated | None = None
        try:
            self._run()
        except Violated as problem:
            violated = problem
            self.history.note("checker", "VIOLATED", problem.promise, problem.what)
        finally:
            for controller in self.controllers:
                controller.kill("the simulation is over")
            self.clock.close()
        stored = self.engine.migration
        return Outcome(
            seed=self.scenario.seed,
            devices=len(self.devices),
            phase=stored.state.phase.value if stored is not None else "",
            simulated_s=self.clock.now - START,
            wall_s=time.perf_counter() - began,
            faults=self._struck,
            events=self.clock.happened,
            rounds=self.promises.decisions,
            waves_passed=self.promises.waves_passed,
            commands=len(self.new.database.commands.all),
            messages=len(self.new.database.rows),
            digest=self.history.digest(),
            violated=violated.promise if violated is not None else None,
            what=violated.what if violated is not None else "",
            trace=tuple(self.history.tail(abs(trace))) if violated is not None or trace < 0 else (),
        )

    def _run(self) -> None:
        self.clock.run(START + 1.0)
        self._begin()
        self.clock.after(0.5, self._supervise)
        self.clock.after(1.0, self._command)
        for fault in self.scenario.faults:
            self.clock.at(START + fault.at, self._strike, fault)
        last = max((f.at + f.lasts_s for f in self.scenario.faults), default=0.0)
        self._main(START + min(last, MAIN_MOST_S))
        self._settle()
        self._check("after the faults")
        self._ending()

    def _begin(self) -> None:
        plan = read_plan(self.scenario.text)
        fleet = selected(plan, self.old.fleet())
        if not fleet:
            plan = read_plan(self.scenario.text.replace("hardware >= 2", "hardware >= 1"))
            fleet = selected(plan, self.old.fleet())
        try:
            state = begin(plan, fleet, int(self.clock.now))
        except FleetError:
            for device in self.old.inventory.values():
                device["updatable"] = True
            state = begin(plan, selected(plan, self.old.fleet()), int(self.clock.now))
        self.engine.migration = StoredMigration(
            name=NAME,
            tenant="t",
            plan=self.scenario.text,
            plan_version=1,
            version=1,
            created_by="ana",
            created_at=self.clock.now,
            updated_at=self.clock.now,
            state=state,
        )
        self.engine.audit.append((self.clock.now, AuditEntry(kind="migration_started", text="")))
        self.start_controller()

    def _main(self, faults_until: float) -> None:
        """Until the migration has come to an end, and the faults as well."""

        def over() -> bool:
            self._operate()
            done = self.engine.held.state.phase in (Phase.FINISHED, Phase.REVERTED, Phase.RELEASED)
            return done and self.clock.now >= faults_until

        cut_at = self.scenario.cut_at
        self.clock.run(START + (MAIN_MOST_S if cut_at is None else cut_at), over)

    # -- faults ------------------------------------------------------------------------------------------

    def _strike(self, fault: Any) -> None:
        if not self._faulty:
            return
        self._struck += 1
        self.history.note("fault", fault.kind, fault.number, round(fault.lasts_s, 1), fault.share, fault.old)
        mend = faults.strike(self, fault)
        self._mends.append(mend)
        self.clock.after(fault.lasts_s, self._mend, fault, mend)

    def _mend(self, fault: Any, mend: Callable[[], None]) -> None:
        if self._faulty:
            self.history.note("fault", "mended", fault.number)
            mend()

    def _end_faults(self) -> None:
        self.history.note("fault", "no more")
        for mend in self._mends:
            mend()
        self._faulty = False
        for controller in self.controllers:
            controller.kill_at.clear()
        for extra in [c for c in self.controllers if c.alive][:-1]:
            extra.kill("has noticed that it does not lead")

    # -- people ------------------------------------------------------------------------------------------

    def _operate(self) -> None:
        if self.clock.now < self._next_look:
            return
        self._next_look = self.clock.now + LOOK_EVERY_S * (0.5 + self._operator.random())
        c, state, ask = self._operator, self.engine.held.state, self.engine.ask
        if state.wave_phase is WavePhase.AWAITING_APPROVAL and c.random() < 0.6:
            ask(RequestKind.APPROVE, {}, "ana")
        elif state.phase is Phase.PAUSED and c.random() < 0.5:
            ask(RequestKind.RESUME, {}, "ana")
        elif state.phase is Phase.HELD and c.random() < 0.3:
            self._decide_held()
        elif c.random() < self.scenario.meddling:
            self._meddle()

    def _decide_held(self) -> None:
        match self._operator.randrange(5):
            case 0:
                self.engine.ask(RequestKind.REVERT, {}, "ana")
            case 1:
                self._amend("attributes.hardware >= 3")
            case _:
                self.engine.ask(RequestKind.RESUME, {}, "ana")

    def _meddle(self) -> None:
        c, ask = self._operator, self.engine.ask
        device = c.choice(sorted(self.devices))
        match c.randrange(10):
            case 0 | 1:
                ask(RequestKind.PAUSE, {}, "ana")
            case 2:
                ask(RequestKind.REVERT, {"wave": True}, "ana")
            case 3 | 4:
                ask(RequestKind.REVERT, {"device": device}, "ana")
            case 5:
                kept = self.engine.held.state.kept_back
                ask(RequestKind.RESUME, {"device": c.choice(kept) if kept else device}, "ana")
            case 6:
                self._amend(c.choice(("attributes.hardware >= 3", "attributes.hardware >= 2", "")))
            case 7:
                ask(RequestKind.RESUME, {}, "ana")
            case 8:
                ask(RequestKind.RELEASE, {}, "ana")
            case _:
                ask(RequestKind.REVERT, {}, "ana")

    def _amend(self, where: str) -> None:
        plan = dict(self.scenario.plan)
        plan["fleet"] = {"tenant": "t", "where": where} if where else {"tenant": "t"}
        text = msgspec.json.encode(plan).decode()
        held = self.engine.held
        check_amendment(read_plan(held.plan), read_plan(text), held.state.rung)
        self.engine.ask(RequestKind.AMEND, {"plan": text}, "ana")

    def _command(self) -> None:
        if not self._commanding:
            return
        c, database = self._commander, self.new.database
        if database.up and database.devices:
            device = c.choice(sorted(database.devices))
            mode = Mode.DRY_RUN if c.random() < 0.05 else Mode.EXECUTE
            id_ = database.create_command(
                device,
                c.choice((*NAMES, "levitate")) if c.random() < 0.1 else c.choice(NAMES),
                expires_in_s=c.uniform(5, 30),
                now=self.clock.now,
                by="ana",
                mode=mode,
            )
            self.history.note("operator", "command", id_, device, mode.value)
            self.new.wake_courier()
        self.clock.after(self.scenario.commands_every_s * (0.5 + c.random()), self._command)

    # -- after the faults --------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Everything is mended and nobody asks for anything new: it must all come to rest."""
        self._end_faults()
        self._commanding = False
        self.need_controller()
        for device in self.devices.values():
            if not device.alive and device.boots:
                device.boot()
        self._rest(SETTLE_MOST_S)

    def _rest(self, most_s: float) -> None:
        since = self.clock.now

        def at_rest() -> bool:
            return self.clock.now - since > 15.0 and not self._unrest()

        self.clock.run(self.clock.now + most_s, at_rest)

    def _unrest(self) -> str:
        """What has not come to rest yet; "" when all has."""
        database = self.new.database
        for device in self.devices.values():
            if device.boots and (why := self._stranded(device)):
                return why
        if database.telemetry_position < len(self.new.log):
            return "the telemetry reader is behind the log"
        if database.commands.open:
            return "a command is open"
        return "the feed is behind" if self._feed_behind() else ""

    def _feed_behind(self) -> bool:
        if self.engine.held.state.phase is Phase.RELEASED:
            return False
        position = int(self.new.database.feed_positions.get(KEY) or 0)
        return position < len(self.old.events) - 200

    def _stranded(self, device: SimulatedDevice) -> str:
        """Why no side serves this device; "" when one does, and takes what it sends."""
        agent = device.agent
        if not device.alive:
            return f"{device.id} is off"
        wanted = Path.NEW if agent.flags.telemetry.value == "new" else Path.OLD
        if agent.phase is DevicePhase.TRYING:
            return f"{device.id} is trying"
        if agent.link(wanted) is not LinkState.UP:
            return f"{device.id} has no link to the {wanted} side ({agent.phase}, {agent.flags})"
        now_ms = (self.clock.now + device.skew_s - 30.0) * 1000
        acked = device.acked[wanted]
        stuck = [
            entry
            for entry in device.disk.outbox.values()
            if entry.ts_ms < now_ms and entry.seq not in acked.get(entry.channel, ())
        ]
        return f"{device.id} does not get rid of {len(stuck)} messages" if stuck else ""

    def _check(self, when: str) -> None:
        """The promises over the whole, at rest."""
        broken = self.promises.broken
        database = self.new.database
        rows = database.numbers()
        self._count_the_newest(rows)
        self._check_feed(rows, when)
        for device in self.devices.values():
            if device.boots and (why := self._stranded(device)):
                broken("nobody stranded", f"{when}: {why}")
            self._check_device(device, rows.get(device.id, {}), when)
        if why := commands_ended(database.commands.all, SETTLE_MOST_S):
            broken("commands end", f"{when}: {why}")
        if database.commands.broken:
            broken("commands end", database.commands.broken[0])
        if database.dead_letters:
            broken("nothing lost", f"{when}: a message was refused: {database.dead_letters[0]}")
        self._check_once()

    def _check_feed(self, rows: dict[str, dict[str, RangeSet]], when: str) -> None:
        """What lies before the position that the bridge has stored has come over."""
        position = int(self.new.database.feed_positions.get(KEY) or 0)
        for item in self.old.events[:position]:
            if type(item) is not TelemetryReceived or item.seq is None:
                continue
            if item.seq not in rows.get(item.device, {}).get(item.channel, ()):
                what = f"{item.device} {item.channel} {item.seq}"
                self.promises.broken("nothing lost", f"{when}: the feed has gone past {what}")

    def _count_the_newest(self, rows: dict[str, dict[str, RangeSet]]) -> None:
        """What came into the log a moment ago need not be a row yet."""
        for _, topic, headers, payload, at in reversed(self.new.log):
            if at < self.clock.now - FRESH_S:
                break
            found = parse(topic, headers, payload, at)
            if isinstance(found, Telemetry) and found.seq is not None:
                channels = rows.setdefault(found.device, {})
                channels.setdefault(found.channel, RangeSet()).add(found.seq)

    def _check_device(self, device: SimulatedDevice, rows: dict[str, RangeSet], when: str) -> None:
        broken, id_ = self.promises.broken, device.id
        for before, after in zip(device.disk.epochs, device.disk.epochs[1:], strict=False):
            self.promises.applied(id_, before, after)
        if lost := missing(self.new.acked.get(id_, {}), rows):
            broken("nothing lost", f"{when}: {id_} has an acknowledgement of the new side for {lost}")
        old = self.old.stored.get(id_, {})
        if lost := missing(device.acked[Path.OLD], old):
            broken("nothing lost", f"{when}: {id_} has an acknowledgement of the old side for {lost}")
        if device.firmware.drop_share:
            return  # such firmware throws messages away; that gates see it is another matter
        waiting = device.disk.waiting()
        if lost := missing(device.disk.kept, old, rows, waiting):
            broken("nothing lost", f"{when}: {id_} had {lost} on its disk, and they are nowhere")

    def _check_once(self) -> None:
        numbers: set[tuple[str, str, int]] = set()
        for device, channel, _, key in self.new.database.rows:
            if key >= 0:
                if (device, channel, key) in numbers:
                    self.promises.broken("nothing twice", f"{device} {channel} {key} is stored twice")
                numbers.add((device, channel, key))

    # -- how it ends -------------------------------------------------------------------------------------

    def _ending(self) -> None:
        if self.engine.held.state.phase is Phase.RELEASED:
            return
        match self.scenario.ending:
            case "revert":
                self.engine.ask(RequestKind.REVERT, {}, "ana")
                self._all_back("by a revert", reverted=True)
            case "journal":
                self._revert_by_journal()
            case "release":
                self.engine.ask(RequestKind.RELEASE, {}, "ana")
                self.clock.run(self.clock.now + 20.0, lambda: not self._open_requests())
            case _:
                pass

    def _open_requests(self) -> bool:
        return len(self.engine.answered) < len(self.engine.requests)

    def _all_back(self, how: str, *, reverted: bool) -> None:
        def back() -> bool:
            done = self.engine.held.state.phase is Phase.REVERTED or not reverted
            return done and not self._away()

        self.clock.run(self.clock.now + BACK_WITHIN_S, back)
        if away := self._away():
            self.promises.broken("a way back", f"{how}: {away}")
        if reverted and self.engine.held.state.phase is not Phase.REVERTED:
            state = self.engine.held.state
            stuck = [m.device for m in state.members.values() if m.state is MemberState.RETURNING]
            self.promises.broken("a way back", f"{how}: the migration is {state.phase}, {stuck[:3]}")
        self._rest(60.0)
        self._check(how)

    def _away(self) -> str:
        """Which device is not on the old side, and served by it; "" when all are."""
        for device in self.devices.values():
            if not device.boots:
                continue
            agent = device.agent
            if agent.flags != Flags() or agent.phase not in (DevicePhase.OLD, DevicePhase.WENT_BACK):
                return f"{device.id} is {agent.phase} with {agent.flags}"
            if agent.link(Path.OLD) is not LinkState.UP:
                return f"{device.id} has no link to the old side"
        return ""

    def _revert_by_journal(self) -> None:
        """Database, new side and controller are gone: the journal and the old side must be enough."""
        if (held := journals.fold(self.journal.records)) is None or not held.orders:
            return
        self.history.note("fault", "all but the old side is gone")
        self._supervised = False
        for controller in self.controllers:
            controller.kill("gone")
        self.engine.failing = True
        self.new.up = self.new.database.up = False
        self.new.drop_all("gone")
        side = OwnersSide(self.old, self.promises)
        work = bring_back(
            held,
            side,
            self._add_to_journal,
            devices=None,
            actor="ana",
            wait_s=BACK_WITHIN_S,
            now=self.clock.time,
            monotonic=self.clock.time,
        )
        task = self.clock.spawn(work, "emergency")
        self.clock.run(self.clock.now + BACK_WITHIN_S, lambda: task.done() and not self._away())
        if away := self._away():
            self.promises.broken("a way back", f"by the journal: {away}")
        self.engine.failing = False
        self.new.up = self.new.database.up = True
        self._supervised = True
        self.need_controller()
        self._all_back("after a revert by the journal", reverted=True)

    async def _add_to_journal(self, record: journals.Record) -> None:
        self.journal.add(record)
        if isinstance(record, journals.Emergency):
            for device in record.devices:
                self.promises.known_order(device, record.epoch, Flags())
