"""How a large wave is told: part by part, those who go back first, and never against what was asked since."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from fleetlift.core.migration import MigrationState, Request, RequestKind
from fleetlift.core.orders import Endpoint, Flags, Orders, TelemetryFlag
from fleetlift.levers.flag import Moved
from fleetlift.migrate.runner import TOLD_AT_ONCE, Runner
from fleetlift.store.engine import StoredMigration

PLAN = """
migration: large
fleet: {tenant: t}
from: {legacy: "tcp://127.0.0.1:1"}
to: {fleetlift: default}
lever: flag
steps:
  - move: telemetry
    waves: [100%]
    bake: 1s
"""


class World:
    """A lever that remembers, and requests that come once so many parts have been told."""

    def __init__(self, kind: RequestKind | None = None, after: int = 0) -> None:
        self.parts: list[list[str]] = []
        self.kind, self.after = kind, after

    async def move(self, orders: Mapping[str, Orders]) -> Moved:
        self.parts.append(list(orders))
        return Moved()

    async def note_baselines(self, epochs: Mapping[str, int]) -> None:
        pass

    async def open_requests(self, name: str) -> Sequence[Request]:
        if self.kind is None or len(self.parts) < self.after:
            return ()
        return (Request(id=1, kind=self.kind, actor="ada", at=0.0),)

    async def tell(self, orders: Mapping[str, Orders]) -> None:
        state = MigrationState(name="large")
        stored = StoredMigration(
            name="large",
            tenant="t",
            plan=PLAN,
            plan_version=1,
            version=1,
            created_by="ada",
            created_at=0.0,
            updated_at=0.0,
            state=state,
        )
        this = cast(Any, self)
        runner = Runner(
            stored,
            store=this,
            old=this,
            old_entry=lambda plan: {},
            new=this,
            lever=this,
            measures=this,
            journal=this,
            endpoint=lambda plan: Endpoint(host="localhost", port=1),
            step=lambda name: None,
        )
        await runner._tell(orders, True)


def orders(onwards: int, back: int = 0) -> dict[str, Orders]:
    flags = Flags(telemetry=TelemetryFlag.NEW)
    given = {f"on-{n}": Orders(epoch=2, migration="large", flags=flags) for n in range(onwards)}
    return given | {f"back-{n}": Orders(epoch=2, migration="large", flags=Flags()) for n in range(back)}


async def test_everybody_is_told_once_and_those_who_go_back_first() -> None:
    world = World()
    await world.tell(orders(2 * TOLD_AT_ONCE, back=10))
    told = [device for part in world.parts for device in part]
    assert [len(part) for part in world.parts] == [TOLD_AT_ONCE, TOLD_AT_ONCE, 10]
    assert len(set(told)) == 2 * TOLD_AT_ONCE + 10
    assert all(device.startswith("back-") for device in told[:10])


async def test_a_revert_does_not_wait_until_a_large_wave_has_been_told() -> None:
    for kind in (RequestKind.REVERT, RequestKind.PAUSE, RequestKind.EMERGENCY):
        world = World(kind, after=2)
        await world.tell(orders(10 * TOLD_AT_ONCE))
        assert len(world.parts) == 2


async def test_what_stops_nothing_keeps_nobody_from_being_told() -> None:
    for kind in (RequestKind.APPROVE, RequestKind.RESUME, RequestKind.AMEND, RequestKind.RELEASE):
        world = World(kind)
        await world.tell(orders(2 * TOLD_AT_ONCE))
        assert len(world.parts) == 2
