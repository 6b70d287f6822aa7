"""The controller: observe → decide → commit → act, again and again, for each migration not yet released.

One controller leads at a time, by an advisory lock on the engine's database; a version guard on each
migration turns away whoever has lost the lock and does not know it yet. Actions are orders that may be
repeated, so a controller killed at any step goes on from what was committed.
`runner.py` holds the round itself, `kill_switch.py` the test hook that kills the process at its steps.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.backend.follow import end
from fleetlift.core.decide import begin
from fleetlift.core.errors import BadInput, FleetError
from fleetlift.core.migration import (
    AuditEntry,
    FleetDevice,
    MemberState,
    MigrationState,
    RequestKind,
)
from fleetlift.core.orders import Endpoint
from fleetlift.core.parity import Rule
from fleetlift.core.plan import Plan, check_amendment
from fleetlift.core.selection import selected
from fleetlift.levers.flag import FlagLever
from fleetlift.log import get_logger
from fleetlift.migrate import journal as journals
from fleetlift.migrate.bridge import Bridge
from fleetlift.migrate.feed_store import PostgresFeedStore
from fleetlift.migrate.journal import Journal
from fleetlift.migrate.kill_switch import KillSwitch
from fleetlift.migrate.measure import Measurer
from fleetlift.migrate.noise import NoiseReader
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.ports import GONE, EngineStore
from fleetlift.migrate.runner import ERROR_PAUSE_S, ROUND_EVERY_S, Runner, rounds_forever
from fleetlift.sides.fleetlift import FleetliftSide, endpoint_of, engine_key
from fleetlift.sides.open import connect_side
from fleetlift.store import engine as store
from fleetlift.store import parity
from fleetlift.store.engine import StoredMigration
from fleetlift.store.pool import Pool, open_pool, sole_owner

log = get_logger(__name__)

LEADER = "migration controller"


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


class Controller:
    """Runs every migration that is not released, and a bridge for each old side that they name."""

    def __init__(self, ctx: Context, engine: Pool, switch: KillSwitch) -> None:
        self._ctx = ctx
        self._engine = engine
        self._switch = switch
        self._key = engine_key(ctx.settings.path)
        self._bridges: dict[str, tuple[Bridge, asyncio.Task[None] | None]] = {}
        self._running: dict[str, tuple[Bridge, Runner, asyncio.Task[None]]] = {}
        self._unreleased: frozenset[str] | None = None  # whose rules the telemetry reader has
        self._rules: dict[str, tuple[Rule, ...]] = {}  # of parity, as the telemetry reader was told
        self._wake: dict[str, asyncio.Event] = {}

    async def lead(self, lock: "asyncpg.Connection[Any]") -> None:
        """Work until the lock's connection is lost, or cancelled."""
        await lock.add_listener(store.REQUEST_CHANNEL, self._asked)
        broken: set[str] = set()
        try:
            while not lock.is_closed():
                async with self._engine.acquire() as conn:
                    wanted = await store.unreleased(conn)
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
                for name in [n for n in self._running if n not in wanted]:
                    await self._stop(name)
                await self._tell_rules(frozenset(wanted))
                await self._tend_bridges()
                await asyncio.sleep(ROUND_EVERY_S)
            log.warning("controller_lost_lock")
        finally:
            for name in list(self._running):
                await self._stop(name)
            await self._tend_bridges()

    def _asked(self, conn: Any, pid: int, channel: str, payload: object) -> None:
        if (event := self._wake.get(str(payload))) is not None:
            event.set()

    async def _start(self, name: str) -> None:
        async with self._engine.acquire() as conn:
            stored = await store.load(conn, name)
        plan = parse_plan(stored.plan, file=f"{name}.yaml")
        key = bridge_key(plan)
        if key not in self._bridges:
            side = connect_side(side_entry(plan))
            bridge = Bridge(
                side,
                key=key,
                store=PostgresFeedStore(self._ctx.pool),
                to_log=self._ctx.publisher.to_log,
                begin_at="now" if plan.old.options.get("feed_from") == "now" else "",
                noise=NoiseReader(side, self._ctx.publisher.to_log),
            )
            self._bridges[key] = (bridge, None)
        bridge = self._bridges[key][0]
        bridge.migrations[name] = plan.fleet.tenant
        wake = self._wake.setdefault(name, asyncio.Event())
        runner = self._runner(stored, plan, bridge)
        task = asyncio.create_task(rounds_forever(runner, wake), name=f"migration {name}")
        self._running[name] = (bridge, runner, task)
        log.info("migration_taken_up", migration=name, phase=stored.state.phase.value)

    def _runner(self, stored: StoredMigration, plan: Plan, bridge: Bridge) -> Runner:
        settings = self._ctx.settings
        new = FleetliftSide(self._ctx, tenant=plan.fleet.tenant, key=self._key)
        return Runner(
            stored,
            store=EngineStore(self._engine),
            old=bridge,
            old_entry=side_entry,
            new=new,
            lever=FlagLever(bridge.side, new),
            measures=Measurer(
                stored.name,
                backend=self._ctx.pool,
                engine=self._engine,
                old_path=bridge.side.name,
                canaries=plan.fleet.canaries,
                log_end=new.log_end,
                commands_end=new.commands_end,
                feed_behind=bridge.feed_behind,
                presence_lost=new.presence_lost,
                old_connects=bridge.connects,
            ),
            journal=Journal(journals.journal_path(settings.path, stored.name)),
            endpoint=self._endpoint,
            step=self._switch.step,
        )

    def _endpoint(self, plan: Plan) -> Endpoint:
        """Where the plan's new side takes devices."""
        settings = self._ctx.settings
        ca = Path(settings.ca_file) if settings.ca_file else None
        return endpoint_of(
            plan.new.address,
            mqtt=settings.mqtt,
            mqtts=settings.mqtts,
            ca_pem=ca.read_text() if ca is not None and ca.is_file() else None,
        )

    async def _tell_rules(self, unreleased: frozenset[str]) -> None:
        """Let the telemetry reader know what plans allow to differ, when it has changed."""
        if self._unreleased != unreleased:
            try:
                async with self._ctx.pool.acquire() as conn:
                    await parity.keep_rules(conn, list(unreleased))
            except GONE as error:
                log.warning("rules_not_dropped", reason=str(error))
            else:
                self._unreleased = unreleased
                self._rules = {name: rules for name, rules in self._rules.items() if name in unreleased}
        for name, (bridge, runner, _) in self._running.items():
            rules = runner.plan.parity
            if self._rules.get(name) != rules:
                try:
                    async with self._ctx.pool.acquire() as conn:
                        await parity.set_rules(conn, name, bridge.side.name, rules)
                except GONE as error:
                    log.warning("rules_not_told", migration=name, reason=str(error))
                else:
                    self._rules[name] = rules

    async def _stop(self, name: str) -> None:
        bridge, _, task = self._running.pop(name)
        self._wake.pop(name, None)
        await end([task])
        bridge.migrations.pop(name, None)

    async def _tend_bridges(self) -> None:
        """Begin those that are new, once every migration is known that they are for: what a bridge reads of a
        tenant that it does not know is refused. End those that no migration needs any more."""
        for key, (bridge, task) in list(self._bridges.items()):
            if not bridge.migrations:
                if task is not None:
                    await end([task])
                await bridge.close()
                del self._bridges[key]
            elif task is None:
                self._bridges[key] = (bridge, asyncio.create_task(bridge.run(), name=f"bridge {key}"))
            elif task.done():
                task.result()
