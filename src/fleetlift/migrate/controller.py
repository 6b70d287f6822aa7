"""The controller: observe → decide → commit → act, again and again, for each migration not yet released.

One controller leads at a time, by an advisory lock on the engine's database; a version guard on each
migration turns away whoever has lost the lock and does not know it yet. Actions are orders that may be
repeated, so a controller killed at any step goes on from what was committed.
`runner.py` holds the round itself, `kill_switch.py` the test hook that kills the process at its steps.
"""

import asyncio
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import asyncpg

from fleetlift.backend.context import Context
from fleetlift.cancelling import end
from fleetlift.core.decide import begin
from fleetlift.core.errors import BadInput
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
from fleetlift.migrate.leading import Leader, lead_in_turn
from fleetlift.migrate.measure import Measurer
from fleetlift.migrate.noise import NoiseReader
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.ports import GONE, EngineStore
from fleetlift.migrate.runner import Runner, rounds_forever
from fleetlift.sides.fleetlift import FleetliftSide, endpoint_of, engine_key
from fleetlift.sides.open import connect_side
from fleetlift.store import engine as store
from fleetlift.store import parity
from fleetlift.store.engine import StoredMigration
from fleetlift.store.pool import Conn, Pool

log = get_logger(__name__)

LEADER = "migration controller"


# -- for the API and the command line ---------------------------------------------------------------------


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
    """Lead when it is this process's turn, until `ctx.stop` is set."""
    switch = KillSwitch(os.environ.get("FLEETLIFT_KILL_AT", ""), ctx.settings.path / "killed-at")
    await lead_in_turn(
        ctx, LEADER, lambda engine, lock: Controller(ctx, engine, switch).lead(lock), role=Controller.role
    )


class Controller(Leader):
    """Runs every migration that is not released, and a bridge for each old side that they name."""

    role = "controller"

    def __init__(self, ctx: Context, engine: Pool, switch: KillSwitch) -> None:
        super().__init__(engine)
        self._ctx = ctx
        self._switch = switch
        self._key = engine_key(ctx.settings.path)
        self._bridges: dict[str, tuple[Bridge, asyncio.Task[None] | None]] = {}
        self._running: dict[str, tuple[Bridge, Runner]] = {}
        self._unreleased: frozenset[str] | None = None  # whose rules the telemetry reader has
        self._rules: dict[str, tuple[Rule, ...]] = {}  # of parity, as the telemetry reader was told

    async def lead(self, lock: "asyncpg.Connection[Any]") -> None:
        try:
            await super().lead(lock)
        finally:
            await self._tend_bridges()

    async def wanted(self, conn: Conn) -> Collection[str]:
        return await store.unreleased(conn)

    async def tend(self, wanted: Collection[str]) -> None:
        await self._tell_rules(frozenset(wanted))
        await self._tend_bridges()

    async def take_up(self, name: str, wake: asyncio.Event) -> "asyncio.Task[None]":
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
        runner = self._runner(stored, plan, bridge)
        self._running[name] = (bridge, runner)
        log.info("migration_taken_up", migration=name, phase=stored.state.phase.value)
        return asyncio.create_task(rounds_forever(runner, wake), name=f"migration {name}")

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
        for name, (bridge, runner) in self._running.items():
            rules = runner.plan.parity
            if self._rules.get(name) != rules:
                try:
                    async with self._ctx.pool.acquire() as conn:
                        await parity.set_rules(conn, name, bridge.side.name, rules)
                except GONE as error:
                    log.warning("rules_not_told", migration=name, reason=str(error))
                else:
                    self._rules[name] = rules

    async def let_go(self, name: str) -> None:
        bridge, _ = self._running.pop(name)
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
