"""The controller: observe → decide → commit → act, again and again, for each migration not yet released.

One controller leads at a time, by an advisory lock on the engine's database; a version guard on each
migration turns away whoever has lost the lock and does not know it yet. Actions are orders that may be
repeated, so a controller killed at any step goes on from what was committed.

Test hook: with FLEETLIFT_KILL_AT=STEP[:N][,STEP[:N]…] in its environment the process kills itself (SIGKILL)
when it comes to that step for the Nth time (default 1), once for each entry: `DIR/killed-at` remembers which.
`STEPS` are their names, in the order of a round; the last four count only where something was done.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.config import Settings
from fleetlift.core.decide import begin, decide
from fleetlift.core.errors import BadInput, Conflict, FleetError
from fleetlift.core.migration import (
    AuditEntry,
    Decision,
    FleetDevice,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Request,
    RequestKind,
    Tell,
    Verdict,
)
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.plan import Plan, Rung, check_amendment, ladder
from fleetlift.core.selection import selected
from fleetlift.core.timeline import GatePoint, TimelinePoint
from fleetlift.levers.flag import FlagLever, Observed
from fleetlift.log import get_logger
from fleetlift.migrate import journal as journals
from fleetlift.migrate.bridge import Bridge
from fleetlift.migrate.journal import Journal
from fleetlift.migrate.measure import Measurer
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.status import side_of
from fleetlift.migrate.wave import standing_flags
from fleetlift.sides.fleetlift import FleetliftSide, endpoint_of, engine_key
from fleetlift.sides.open import connect_side
from fleetlift.store import engine as store
from fleetlift.store.engine import StoredMigration
from fleetlift.store.pool import Pool, open_pool, sole_owner

log = get_logger(__name__)

STEPS = ("observed", "decided", "committed", "journaled", "told", "sampled")
ROUND_EVERY_S = 0.5
ROUND_SHARE = 0.25  # a round of a large fleet takes at most this share of the time
PAUSE_MOST_S = 3.0  # a round that waited for a side that hangs must not be followed by as long a pause
SAMPLE_EVERY_S = 1.0
LEADER = "migration controller"
ERROR_PAUSE_S = 2.0
# a migration in one of these has its devices to itself
BUSY = (Phase.RUNNING, Phase.PAUSED, Phase.HELD, Phase.REVERTING, Phase.FINISHED)


class KillSwitch:
    """The documented test hook FLEETLIFT_KILL_AT: dies at named steps, at each of them once."""

    def __init__(self, text: str, remember: Path) -> None:
        self._remember = remember
        done = remember.read_text().split() if text and remember.is_file() else []
        self._left: dict[str, int] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, _, times = entry.partition(":")
            if name not in STEPS or not (times or "1").isdecimal():
                raise BadInput(f"FLEETLIFT_KILL_AT={text!r}: give STEP[:N]; steps are {', '.join(STEPS)}")
            if name not in done:
                self._left[name] = int(times or 1)

    def step(self, name: str) -> None:
        if name in self._left:
            self._left[name] -= 1
            if self._left[name] <= 0:
                with self._remember.open("a") as file:
                    file.write(f"{name}\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.kill(os.getpid(), signal.SIGKILL)


# -- for the API and the command line ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def engine_pool(ctx: Context) -> AsyncIterator[Pool]:
    """Connections to the engine's database: those of the backend, when it is the same one."""
    settings = ctx.settings
    if settings.engine_url == settings.database_url:
        yield ctx.pool
    else:
        async with open_pool(settings.engine_url, name="engine") as pool:
            yield pool


def side_entry(plan: Plan) -> dict[str, str]:
    """The plan's `from` as `sides.open` takes it."""
    return {plan.old.kind: plan.old.address, **plan.old.options}


def bridge_key(plan: Plan) -> str:
    """Names the old side in `feed_position`: its kind and address, since each server counts for itself."""
    return f"{plan.old.kind} {plan.old.address}"


async def read_inventory(plan: Plan) -> tuple[FleetDevice, ...]:
    """Every device that the plan's old side knows. Raises Unavailable when it does not answer."""
    side = connect_side(side_entry(plan))
    try:
        return tuple(await side.inventory())
    finally:
        await side.close()


async def start_migration(
    engine: Pool,
    plan_text: str,
    *,
    actor: str,
    now: float,
    file: str = "plan.yaml",
) -> MigrationState:
    """Check a plan against the fleet and store the migration; the controller takes it up at once.

    Raises BadInput (the plan, with file and line), Conflict (the name is taken, or devices are part of
    another migration) or Unavailable (the old side does not answer).
    """
    plan = parse_plan(plan_text, file=file)
    fleet = selected(plan, await read_inventory(plan))
    async with engine.acquire() as conn:
        epoch = max(await store.highest_epoch(conn), int(now))
        state = begin(plan, fleet, epoch)
        moving = [m.device for m in state.members.values() if m.state is not MemberState.EXCLUDED]
        if taken := await store.claimed(conn, moving, BUSY):
            device, other = taken[0]
            raise Conflict(
                f"{len(taken)} of these devices are part of migration {other!r} ({device}, for one): "
                "revert or release that one first"
            )
        await store.create(
            conn,
            tenant=plan.fleet.tenant,
            plan=plan_text,
            state=state,
            audit=[
                AuditEntry(
                    kind="migration_started",
                    text=f"started by {actor}: {len(moving):,} devices to move, "
                    f"{len(state.members) - len(moving):,} cannot be",
                    actor=actor,
                    evidence={"devices": len(moving), "excluded": len(state.members) - len(moving)},
                )
            ],
            created_by=actor,
            now=now,
        )
    log.info("migration_started", migration=plan.name, devices=len(moving), actor=actor)
    return state


async def request(
    engine: Pool,
    name: str,
    kind: RequestKind,
    args: Mapping[str, Any] | None = None,
    *,
    actor: str,
) -> int:
    """Ask the controller for something. Returns the request's id (`store.engine.is_answered`).

    For AMEND, `args["plan"]` is the new plan's text; it is checked here. Raises NotFound, BadInput or
    Conflict.
    """
    given = dict(args or {})
    async with engine.acquire() as conn:
        if kind is RequestKind.AMEND:
            stored = await store.head(conn, name)
            text = given.get("plan")
            if not isinstance(text, str):
                raise BadInput("an amendment needs the new plan's text as `plan`")
            check_amendment(parse_plan(stored.plan), parse_plan(text), stored.state.rung)
        return await store.add_request(conn, name, kind, given, actor)


# -- the service ------------------------------------------------------------------------------------------


async def run(ctx: Context) -> None:
    """Lead when it is this process's turn, until `ctx.stop` is set. Loses the lead with the connection."""
    switch = KillSwitch(os.environ.get("FLEETLIFT_KILL_AT", ""), ctx.settings.path / "killed-at")
    async with engine_pool(ctx) as engine:
        work = asyncio.create_task(_lead_forever(ctx, engine, switch), name="controller")
        stop = asyncio.create_task(ctx.stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)


async def _lead_forever(ctx: Context, engine: Pool, switch: KillSwitch) -> None:
    while True:
        try:
            async with sole_owner(ctx.settings.engine_url, LEADER) as lock:
                log.info("controller_leads")
                await Controller(ctx, engine, switch).lead(lock)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            log.warning("controller_lost_database", reason=str(error))
        await asyncio.sleep(ERROR_PAUSE_S)


def pause_after(took_s: float, every_s: float = ROUND_EVERY_S) -> float:
    """How long to wait, in seconds, after a round that took so long."""
    return max(every_s - took_s, min(took_s / ROUND_SHARE - took_s, PAUSE_MOST_S), 0.05)


class Controller:
    """Runs every migration that is not released, and a bridge for each old side that they name."""

    def __init__(self, ctx: Context, engine: Pool, switch: KillSwitch) -> None:
        self._ctx = ctx
        self._engine = engine
        self._switch = switch
        self._key = engine_key(ctx.settings.path)
        self._bridges: dict[str, tuple[Bridge, asyncio.Task[None]]] = {}
        self._running: dict[str, tuple[Runner, asyncio.Task[None]]] = {}
        self._wake: dict[str, asyncio.Event] = {}

    async def lead(self, lock: "asyncpg.Connection[Any]") -> None:
        """Work until the lock's connection is lost, or cancelled."""
        await lock.add_listener(store.REQUEST_CHANNEL, self._asked)
        broken: set[str] = set()
        try:
            while not lock.is_closed():
                async with self._engine.acquire() as conn:
                    wanted = await store.unreleased(conn)
                for name in [n for n in self._running if n not in wanted]:
                    await self._stop(name)
                for name in wanted:
                    if name not in self._running:
                        try:
                            await self._start(name)
                            broken.discard(name)
                        except FleetError as error:
                            # One migration that cannot be run must not keep the others from running.
                            if name not in broken:
                                log.error("migration_not_taken_up", migration=name, reason=str(error))
                                broken.add(name)
                await self._prune_bridges()
                await asyncio.sleep(ROUND_EVERY_S)
            log.warning("controller_lost_lock")
        finally:
            for name in list(self._running):
                await self._stop(name)
            await self._prune_bridges()

    def _asked(self, conn: Any, pid: int, channel: str, payload: object) -> None:
        if (event := self._wake.get(str(payload))) is not None:
            event.set()

    async def _start(self, name: str) -> None:
        async with self._engine.acquire() as conn:
            stored = await store.load(conn, name)
        plan = parse_plan(stored.plan, file=f"{name}.yaml")
        key = bridge_key(plan)
        if key not in self._bridges:
            bridge = Bridge(
                connect_side(side_entry(plan)),
                key=key,
                pool=self._ctx.pool,
                publisher=self._ctx.publisher,
                begin_at="now" if plan.old.options.get("feed_from") == "now" else "",
            )
            task = asyncio.create_task(bridge.run(), name=f"bridge {key}")
            self._bridges[key] = (bridge, task)
        bridge = self._bridges[key][0]
        bridge.migrations[name] = plan.fleet.tenant
        wake = self._wake.setdefault(name, asyncio.Event())
        runner = Runner(
            self._ctx.settings,
            stored,
            plan,
            bridge=bridge,
            new=FleetliftSide(self._ctx, tenant=plan.fleet.tenant, key=self._key),
            backend=self._ctx.pool,
            engine=self._engine,
            switch=self._switch,
        )
        task = asyncio.create_task(self._run(runner, wake), name=f"migration {name}")
        self._running[name] = (runner, task)
        log.info("migration_taken_up", migration=name, phase=stored.state.phase.value)

    async def _run(self, runner: "Runner", wake: asyncio.Event) -> None:
        """Rounds without end. What goes wrong in one is logged, and the next one reads everything anew."""
        failed = ""
        while True:
            started = time.monotonic()
            pause = ROUND_EVERY_S
            try:
                await runner.round(time.time())
                failed = ""
            except Conflict as error:
                log.warning("round_turned_away", migration=runner.name, reason=str(error))
                runner.forget()
            except Exception as error:
                # Whatever it is, the migration stands still and says so; the others go on.
                if str(error) != failed:
                    log.error("round_failed", migration=runner.name, reason=str(error), exc_info=True)
                    failed = str(error)
                runner.forget()
                pause = ERROR_PAUSE_S
            pause = pause_after(time.monotonic() - started, pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()
            wake.clear()

    async def _stop(self, name: str) -> None:
        runner, task = self._running.pop(name)
        self._wake.pop(name, None)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        runner.bridge.migrations.pop(name, None)

    async def _prune_bridges(self) -> None:
        for key, (bridge, task) in list(self._bridges.items()):
            if not bridge.migrations:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await bridge.close()
                del self._bridges[key]
            elif task.done():
                task.result()


class Runner:
    """The rounds of one migration."""

    def __init__(
        self,
        settings: Settings,
        stored: StoredMigration,
        plan: Plan,
        *,
        bridge: Bridge,
        new: FleetliftSide,
        backend: Pool,
        engine: Pool,
        switch: KillSwitch,
    ) -> None:
        self.name = stored.name
        self.bridge = bridge
        self._settings = settings
        self._stored: StoredMigration | None = stored
        self._use(plan)
        self._new = new
        self._engine = engine
        self._lever = FlagLever(bridge.side, new)
        self._measurer = Measurer(
            stored.name,
            backend=backend,
            engine=engine,
            old_path=bridge.side.name,
            log_end=new.log_end,
            feed_behind=bridge.feed_behind,
        )
        self._journal = Journal(journals.journal_path(settings.path, stored.name))
        self._switch = switch
        self._fresh = True  # nothing of what was told is remembered: tell again what is not obeyed
        self._journaled: dict[str, int] = {}  # device: newest epoch in the journal, as far as is remembered
        self._journal_size = -1
        self._selected: tuple[object, frozenset[str]] | None = None
        self._adopted: tuple[object, ...] | None = None
        self._foreign: frozenset[str] = frozenset()  # ids that another tenant has at the new side
        self._followed: dict[str, DeviceReport] = {}  # what the new side's routes were last set by
        self._sampled_at = 0.0
        self._sample_cost_s = 0.0
        self._down: dict[str, str] = {}

    def _use(self, plan: Plan) -> None:
        self._plan = plan
        self._rungs = ladder(plan)
        ca = Path(self._settings.ca_file) if self._settings.ca_file else None
        self._endpoint = endpoint_of(
            plan.new.address,
            mqtt=self._settings.mqtt,
            mqtts=self._settings.mqtts,
            ca_pem=ca.read_text() if ca is not None and ca.is_file() else None,
        )

    def forget(self) -> None:
        """Read everything from the store in the next round."""
        self._stored = None
        self._fresh = True

    async def round(self, now: float) -> None:
        """Observe, decide, commit, act, and note a point of the timeline.

        Raises Conflict when another controller has committed meanwhile; nothing was done then.
        """
        stored = await self._load()
        await self._take_in_emergency()
        async with self._engine.acquire() as conn:
            asked = await store.open_requests(conn, self.name)
        observed = await self._lever.observe(list(stored.state.members), self.bridge)
        self._note_down(observed)
        plan, text, refused = self._amended(stored, asked, observed)
        fleet = self._fleet(plan, observed)
        if observed.fleet is not None and observed.new_up:
            await self._adopt(observed.fleet, plan)
        if fleet is not None and self._foreign:
            fleet = tuple(device for device in fleet if device.id not in self._foreign)
        await self._follow_reports(observed)
        rungs = ladder(plan)
        state = stored.state
        rung = rungs[min(max(state.rung, 1), len(rungs) - 1)]
        samples = {}
        armed = state.phase in (Phase.RUNNING, Phase.PAUSED, Phase.HELD)
        if armed and state.wave_opened_at is not None and observed.new_up:
            samples = await self._measurer.samples(rung.gates, state, rungs, now)
        self._switch.step("observed")

        decision = decide(
            plan,
            state,
            Observations(
                fleet=fleet,
                devices=observed.devices,
                samples=samples,
                requests=tuple(r for r in asked if r.id not in refused),
                old_up=observed.old_up,
                new_up=observed.new_up,
            ),
            now,
        )
        self._switch.step("decided")
        if decision.state.phase is Phase.RELEASED:
            # Before the release is committed: nobody takes the migration up again after it.
            await self._new.withdraw([m.device for m in decision.state.members.values() if m.rung == 0])

        audit = (*decision.audit, *refused.values())
        answered = (*decision.answered, *refused)
        taken = text is not None and any(
            r.kind is RequestKind.AMEND and r.id in decision.answered for r in asked
        )
        gates = decision.gates
        if not gates and decision.state.phase is Phase.HELD:
            gates = stored.gates  # what was breached stays to be seen until somebody decides
        if decision.state != state or audit or answered or gates != stored.gates or taken:
            async with self._engine.acquire() as conn:
                stored = await store.commit(
                    conn,
                    stored,
                    decision.state,
                    audit=audit,
                    answered=answered,
                    gates=gates,
                    plan=text if taken else None,
                    now=now,
                )
            self._stored = stored
            if taken:
                self._use(plan)
            for entry in audit:
                log.info(entry.kind, migration=self.name, text=entry.text, actor=entry.actor)
            self._switch.step("committed")

        orders = self._orders([*decision.actions, *self._untold(stored.state, observed, decision)])
        await self._write_journal(now, orders, audit, opened=self._fresh or taken)
        if orders:
            self._switch.step("journaled")
            await self._tell(orders, observed.new_up)
            self._switch.step("told")
        self._fresh = False

        if await self._sample(stored, decision, observed, now):
            self._switch.step("sampled")

    async def _load(self) -> StoredMigration:
        if self._stored is None:
            async with self._engine.acquire() as conn:
                self._stored = await store.load(conn, self.name)
            self._use(parse_plan(self._stored.plan, file=f"{self.name}.yaml"))
        return self._stored

    # -- observing ---------------------------------------------------------------------------------------

    def _note_down(self, observed: Observed) -> None:
        down = dict(observed.down)
        if not observed.old_up:
            down["old"] = self.bridge.why_down
        for side in down.keys() - self._down.keys():
            log.warning("side_lost", migration=self.name, side=side, reason=down[side])
        for side in self._down.keys() - down.keys():
            log.info("side_back", migration=self.name, side=side)
        self._down = down

    def _fleet(self, plan: Plan, observed: Observed) -> tuple[FleetDevice, ...] | None:
        """The selected devices; the condition is asked again when the inventory was read anew."""
        if observed.fleet is None:
            return None
        basis = (self.bridge.snapshots, plan.fleet)
        if self._selected is None or self._selected[0] != basis:
            chosen = frozenset(device.id for device in selected(plan, observed.fleet))
            self._selected = (basis, chosen)
        chosen = self._selected[1]
        return tuple(device for device in observed.fleet if device.id in chosen)

    async def _adopt(self, fleet: Sequence[FleetDevice], plan: Plan) -> None:
        """Make the old side's devices known to the new side, whenever the inventory was read anew.

        Also those that the plan does not move: their telemetry comes by the feed, and their commands enter
        here and go by the old side. Devices whose attribute `tenant` names another tenant are left out.
        """
        basis = (self.bridge.snapshots, plan.fleet)
        if self._adopted == basis:
            return
        tenant = plan.fleet.tenant
        own = [device for device in fleet if device.attributes.get("tenant", tenant) == tenant]
        try:
            foreign = await self._new.adopt(own, self.name)
        except FleetError as error:
            log.warning("devices_not_adopted", migration=self.name, reason=str(error))
            return
        if foreign and not self._foreign:
            log.warning("devices_of_another_tenant", migration=self.name, devices=foreign[:20])
        self._foreign = frozenset(foreign)
        self._adopted = basis

    async def _follow_reports(self, observed: Observed) -> None:
        """Have commands routed as devices say that they obey: each new word of theirs once."""
        if not observed.new_up:
            return
        fresh = {
            device: seen.report
            for device, seen in observed.devices.items()
            if seen.report is not None and seen.report != self._followed.get(device)
        }
        if fresh:
            try:
                await self._new.follow_reports(fresh)
            except FleetError as error:
                log.warning("reports_not_followed", migration=self.name, reason=str(error))
            else:
                self._followed.update(fresh)

    def _amended(
        self, stored: StoredMigration, asked: Sequence[Request], observed: Observed
    ) -> tuple[Plan, str | None, dict[int, AuditEntry]]:
        """The plan to decide by: the newest amendment's, when there is one that can be used.

        An amendment is decided on only with the fleet at hand, so until then the stored plan holds.
        """
        plan, text = self._plan, None
        refused: dict[int, AuditEntry] = {}
        if observed.fleet is None:
            return plan, text, refused
        for one in asked:
            if one.kind is not RequestKind.AMEND:
                continue
            try:
                new = str(one.args.get("plan", ""))
                amended = parse_plan(new)
                check_amendment(plan, amended, stored.state.rung)
                plan, text = amended, new
            except FleetError as error:
                refused[one.id] = AuditEntry(
                    kind="request_refused", text=f"amend refused: {error}", actor=one.actor
                )
        return plan, text, refused

    async def _take_in_emergency(self) -> None:
        """Turn a new `emergency` record of the journal into a request, once for each epoch."""
        path = self._journal.path
        size = path.stat().st_size if path.is_file() else 0
        if size == self._journal_size:
            return
        story = await self._journal.story() if size else None
        self._journal_size = size
        for emergency in story.emergencies if story is not None else ():
            async with self._engine.acquire() as conn:
                await store.add_emergency(
                    conn,
                    self.name,
                    emergency.epoch,
                    emergency.actor,
                    devices=None if emergency.everything else emergency.devices,
                )

    # -- acting ------------------------------------------------------------------------------------------

    def _untold(self, state: MigrationState, observed: Observed, decision: Decision) -> list[Tell]:
        """After a start: orders that were committed and may never have gone out."""
        if not self._fresh:
            return []
        told = {action.device for action in decision.actions}
        tells = []
        for member in state.members.values():
            if member.epoch == 0 or member.device in told:
                continue
            seen = observed.devices.get(member.device)
            report = seen.report if seen is not None else None
            if report is None or report.epoch < member.epoch:
                tells.append(Tell(device=member.device, epoch=member.epoch, rung=member.rung))
        return tells

    def _orders(self, tells: Sequence[Tell]) -> dict[str, Orders]:
        orders = {}
        for tell in tells:
            flags = self._rungs[min(tell.rung, len(self._rungs) - 1)].flags
            orders[tell.device] = Orders(
                epoch=tell.epoch,
                migration=self.name,
                flags=flags,
                new=self._endpoint if flags.needs_new else None,
                credential=self._new.credential(tell.device) if flags.needs_new else None,
                try_within_s=self._plan.try_within_s,
                new_lost_limit_s=self._plan.new_lost_limit_s,
            )
        return orders

    async def _write_journal(
        self, now: float, orders: Mapping[str, Orders], audit: Sequence[AuditEntry], *, opened: bool
    ) -> None:
        """On disk before a device hears of it."""
        records: list[journals.Record] = []
        if opened:
            records.append(
                journals.Opened(
                    at=now, migration=self.name, old=side_entry(self._plan), plan=self._stored_plan()
                )
            )
        records += [journals.Decided(at=now, what=a.kind, text=a.text, actor=a.actor) for a in audit]
        new = {d: o for d, o in orders.items() if self._journaled.get(d, -1) < o.epoch}
        if new:
            records.append(
                journals.Told(
                    at=now,
                    orders=tuple(
                        journals.Order(device=d, epoch=o.epoch, flags=o.flags) for d, o in new.items()
                    ),
                )
            )
        if records:
            await self._journal.add(*records)
            self._journal_size = self._journal.path.stat().st_size
        self._journaled.update((d, o.epoch) for d, o in new.items())

    def _stored_plan(self) -> str:
        return self._stored.plan if self._stored is not None else ""

    async def _tell(self, orders: Mapping[str, Orders], new_up: bool) -> None:
        if new_up:
            try:
                await self._measurer.note_baselines(
                    {d: o.epoch for d, o in orders.items() if o.flags.needs_new}
                )
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("baselines_not_noted", migration=self.name, reason=str(error))
        moved = await self._lever.move(orders)
        for side, refused in (("old", moved.old_refused), ("new", moved.new_refused)):
            for device, reason in list(refused.items())[:20]:
                log.warning("order_refused", migration=self.name, side=side, device=device, reason=reason)
        for side, reason in moved.down.items():
            log.warning("orders_not_delivered", migration=self.name, side=side, reason=reason)

    # -- the timeline ------------------------------------------------------------------------------------

    async def _sample(
        self, stored: StoredMigration, decision: Decision, observed: Observed, now: float
    ) -> bool:
        """Note a point of the timeline when one is due, a breach always; whether it was."""
        breached = any(gate.verdict is Verdict.REVERT for gate in decision.gates)
        if not breached and now - self._sampled_at < max(SAMPLE_EVERY_S, 10 * self._sample_cost_s):
            return False
        started = time.monotonic()
        state = stored.state
        old, both, new = devices_by_side(state, self._rungs)
        rates: tuple[float | None, float | None] = (None, None)
        latencies: dict[str, tuple[float | None, float | None]] = {}
        if observed.new_up:
            try:
                rates = await self._measurer.rates(list(state.members), now)
                latencies = await self._measurer.latencies(list(state.members), now)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("timeline_not_measured", migration=self.name, reason=str(error))
        nothing = (None, None)
        point = TimelinePoint(
            phase=state.phase.value,
            rung=state.rung,
            wave=state.wave,
            wave_phase=state.wave_phase.value,
            devices_old=old,
            devices_both=both,
            devices_new=new,
            rate_old=rates[0],
            rate_new=rates[1],
            latency_old_p50=latencies.get("old", nothing)[0],
            latency_old_p95=latencies.get("old", nothing)[1],
            latency_new_p50=latencies.get("new", nothing)[0],
            latency_new_p95=latencies.get("new", nothing)[1],
            gates=tuple(
                GatePoint(
                    gate=g.gate,
                    verdict=g.verdict.value,
                    value=g.value,
                    limit=g.limit,
                    unit=g.unit,
                    n=g.n,
                )
                for g in decision.gates
            ),
        )
        async with self._engine.acquire() as conn:
            await store.add_sample(conn, self.name, now, point)
        self._sampled_at = now
        self._sample_cost_s = time.monotonic() - started
        return True


def devices_by_side(state: MigrationState, rungs: Sequence[Rung]) -> tuple[int, int, int]:
    """How many members are served by the old side alone, by both, by the new side alone."""
    old = both = new = 0
    for member in state.members.values():
        match side_of(standing_flags(member, rungs)):
            case "old":
                old += 1
            case "both":
                both += 1
            case _:
                new += 1
    return old, both, new
