"""A device is in one migration at a time, whatever a plan says and however a fleet grows."""

from collections.abc import Mapping, Sequence
from typing import Any

from fleetlift.core.decide import begin
from fleetlift.core.gates import Gate
from fleetlift.core.migration import AuditEntry, FleetDevice, MigrationState, RequestKind, Sample
from fleetlift.core.orders import DeviceReport, Endpoint, Orders
from fleetlift.core.plan import Plan, Rung
from fleetlift.core.selection import selected
from fleetlift.levers.flag import Moved, Observed, OldSide
from fleetlift.migrate import journal
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.ports import EngineStore
from fleetlift.migrate.runner import Runner
from fleetlift.store import audit
from fleetlift.store import engine as store
from fleetlift.store.claims import Claimed
from fleetlift.store.pool import Pool

PLAN = """
migration: {name}
fleet: {{tenant: carshare, where: "{where}"}}
from: {{legacy: "tcp://127.0.0.1:1"}}
to: {{fleetlift: default}}
steps: [{{move: telemetry, waves: [100%], bake: 1s}}]
"""


class Quiet:
    """A fleet that both sides know, and that never says anything: the world as a round needs it."""

    def __init__(self, *devices: str) -> None:
        self.fleet = tuple(FleetDevice(id=one, connected=True, since=1.0) for one in devices)
        self.snapshots = 1
        self.why_down = ""
        self.told: set[str] = set()
        self.records: list[journal.Record] = []

    async def observe(self, devices: Sequence[str], old: OldSide) -> Observed:
        return Observed(devices={}, fleet=self.fleet, old_up=True, new_up=True)

    async def move(self, orders: Mapping[str, Orders]) -> Moved:
        self.told |= orders.keys()
        return Moved()

    async def adopt(self, devices: Sequence[FleetDevice], migration: str) -> list[str]:
        return []

    async def follow_reports(self, reports: Mapping[str, DeviceReport]) -> None: ...

    async def withdraw(self, devices: Sequence[str], *, migration: str) -> None: ...

    def credential(self, device: str) -> str:
        return "secret"

    async def samples(
        self, gates: Sequence[Gate], state: MigrationState, rungs: Sequence[Rung], now: float
    ) -> dict[str, Sample]:
        return {}

    async def note_baselines(self, epochs: Mapping[str, int]) -> None: ...

    async def rates(self, devices: Sequence[str], now: float) -> tuple[float | None, float | None]:
        return None, None

    async def latencies(
        self, devices: Sequence[str], now: float
    ) -> dict[str, tuple[float | None, float | None]]:
        return {}

    def size(self) -> int:
        return 0

    async def add(self, *records: journal.Record) -> None:
        self.records += records

    async def story(self) -> journal.Story | None:
        return None


async def started(pool: Pool, world: Any, name: str, where: str) -> Runner:
    text = PLAN.format(name=name, where=where)
    plan = parse_plan(text)
    state = begin(plan, selected(plan, world.fleet), 10)
    async with pool.acquire() as conn:
        await store.create(
            conn,
            tenant="carshare",
            plan=text,
            state=state,
            audit=[AuditEntry(kind="migration_started", text="started")],
            created_by="ann",
            now=1000.0,
        )
        stored = await store.load(conn, name)

    def endpoint(plan: Plan) -> Endpoint:
        return Endpoint(host="127.0.0.1", port=1883)

    return Runner(
        stored,
        store=EngineStore(pool),
        old=world,
        old_entry=lambda plan: {},
        new=world,
        lever=world,
        measures=world,
        journal=world,
        endpoint=endpoint,
        step=lambda name: None,
    )


async def rounds(runner: Runner, since: float, count: int = 3) -> None:
    """Some rounds, as `rounds_forever` does them."""
    for n in range(count):
        try:
            await runner.round(since + n)
        except Claimed:
            runner.forget()


async def test_an_amendment_does_not_take_devices_of_another_migration(pool: Pool) -> None:
    """It is refused with their names; the migration goes on by its plan."""
    world = Quiet("car-1", "car-2", "car-3")
    await started(pool, world, "theirs", "id == 'car-3'")
    ours = await started(pool, world, "ours", "id == 'car-1'")
    await rounds(ours, 1001.0)
    async with pool.acquire() as conn:
        wider = PLAN.format(name="ours", where="id in ('car-1', 'car-2', 'car-3')")
        await store.add_request(conn, "ours", RequestKind.AMEND, {"plan": wider}, "ann")
        await rounds(ours, 1010.0)
        [refusal] = await audit.newest(conn, "ours", 1)
        assert refusal.kind == "request_refused" and refusal.actor == "ann"
        assert refusal.text.startswith("amend refused: 1 device (car-3) is part of migration 'theirs'")
        found = await store.load(conn, "ours")
        assert (found.plan_version, set(found.state.members)) == (1, {"car-1"})
        narrower = PLAN.format(name="ours", where="id in ('car-1', 'car-2')")
        await store.add_request(conn, "ours", RequestKind.AMEND, {"plan": narrower}, "ann")
        await rounds(ours, 1020.0)
        found = await store.load(conn, "ours")
        assert (found.plan_version, set(found.state.members)) == (2, {"car-1", "car-2"})
    assert world.told <= {"car-1", "car-2"}


async def test_a_device_that_joins_the_fleets_of_two_migrations_goes_to_one(pool: Pool) -> None:
    """The other one goes on without it, and takes it when the first has let it go."""
    world = Quiet("car-1", "car-2")
    one = await started(pool, world, "one", "id in ('car-1', 'new')")
    two = await started(pool, world, "two", "id in ('car-2', 'new')")
    world.fleet = (*world.fleet, FleetDevice(id="new", connected=True, since=1.0))
    world.snapshots = 2
    await rounds(one, 1001.0)
    await rounds(two, 1001.0)
    async with pool.acquire() as conn:
        assert set((await store.load(conn, "one")).state.members) == {"car-1", "new"}
        assert set((await store.load(conn, "two")).state.members) == {"car-2"}
        assert "car-2" in world.told
        await conn.execute("UPDATE engine.migration SET phase = 'released' WHERE name = 'one'")
        world.snapshots = 3
        await rounds(two, 1010.0)
        assert set((await store.load(conn, "two")).state.members) == {"car-2", "new"}
