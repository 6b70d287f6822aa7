"""The engine's tables: what is committed together, and who is turned away."""

import asyncio

import pytest
from msgspec.structs import replace

from fleetlift.core import chain
from fleetlift.core.errors import Conflict, NotFound
from fleetlift.core.migration import (
    AuditEntry,
    GateResult,
    Member,
    MemberState,
    MigrationState,
    Phase,
    RequestKind,
    Verdict,
)
from fleetlift.core.timeline import TimelinePoint
from fleetlift.migrate.controller import LEADER
from fleetlift.store import audit, claims
from fleetlift.store import engine as store
from fleetlift.store.claims import Claimed
from fleetlift.store.pool import Conn, Pool, sole_owner


def members(count: int) -> dict[str, Member]:
    return {f"car-{n}": Member(device=f"car-{n}", rank=n) for n in range(count)}


async def make(conn: Conn, count: int = 3, name: str = "move") -> store.StoredMigration:
    await store.create(
        conn,
        tenant="carshare",
        plan="migration: move",
        state=MigrationState(name=name, epoch=10, members=members(count)),
        audit=[AuditEntry(kind="migration_started", text="started")],
        created_by="ann",
        now=1000.0,
    )
    return await store.load(conn, name)


async def test_a_decision_is_stored_whole(pool: Pool) -> None:
    """State, members, audit, verdicts and answered requests are read back as they were decided."""
    async with pool.acquire() as conn:
        before = await make(conn)
        asked = await store.add_request(conn, "move", RequestKind.PAUSE, {"why": "lunch"}, "ann")
        raised = replace(
            before.state.members["car-1"],
            rung=1,
            epoch=11,
            state=MemberState.MOVING,
            told_at=1001.5,
            wave=0,
            came_from=0,
        )
        after = replace(
            before.state,
            phase=Phase.PAUSED,
            epoch=11,
            wave_opened_at=1001.5,
            kept_back=("car-9",),
            members={**before.state.members, "car-1": raised, "car-7": Member(device="car-7", rank=7)},
        )
        gate = GateResult(gate="devices.silent == 0", verdict=Verdict.HOLD, why="…", evidence={"n": [1, 2]})
        assert (await store.open_requests(conn, "move"))[0].args == {"why": "lunch"}
        await store.commit(
            conn,
            before,
            after,
            audit=[AuditEntry(kind="migration_paused", text="paused", actor="ann", evidence={"a": 1})],
            answered=[asked],
            gates=[gate],
            now=1002.0,
        )
        found = await store.load(conn, "move")
        assert found.state == after
        assert found.gates == (gate,)
        assert await store.open_requests(conn, "move") == ()
        assert await store.is_answered(conn, asked)
        lines = await audit.page(conn, "move")
        assert [(line.kind, line.actor) for line in lines] == [
            ("migration_started", "controller"),
            ("migration_paused", "ann"),
        ]
        assert await audit.page(conn, "move", after=lines[0].id) == lines[1:]


async def test_of_two_controllers_that_decide_at_once_one_commits(pool: Pool) -> None:
    """The other is turned away and nothing of its decision is stored."""
    async with pool.acquire() as one, pool.acquire() as other:
        await make(one)
        first, second = await store.load(one, "move"), await store.load(other, "move")

        async def decide(conn: Conn, read: store.StoredMigration, who: str) -> None:
            await store.commit(
                conn,
                read,
                replace(
                    read.state,
                    reason=who,
                    members={**read.state.members, who: Member(device=who, rank=50)},
                ),
                audit=[AuditEntry(kind="decided", text=who)],
                now=1001.0,
            )

        outcomes = await asyncio.gather(
            decide(one, first, "one"), decide(other, second, "other"), return_exceptions=True
        )
        assert [type(o) for o in outcomes if o is not None] == [Conflict]
        winner = "one" if outcomes[0] is None else "other"
        found = await store.load(one, "move")
        assert found.state.reason == winner
        assert {"one", "other"} & found.state.members.keys() == {winner}
        assert [line.text for line in await audit.page(one, "move")] == ["started", winner]


async def test_one_controller_leads_at_a_time(database_url: str) -> None:
    """The next one waits until the first has let go, and then leads."""
    order: list[str] = []

    async def lead(who: str, hold: asyncio.Event) -> None:
        async with sole_owner(database_url, LEADER, retry_s=0.02):
            order.append(who)
            leads.set()
            await hold.wait()
            order.append(f"{who} left")

    gate, leads = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(lead("first", gate))
        await leads.wait()
        group.create_task(lead("second", gate))
        await asyncio.sleep(0.1)
        assert order == ["first"]
        gate.set()
    assert order == ["first", "first left", "second", "second left"]


async def test_a_hundred_thousand_members_are_stored_in_one_transaction(pool: Pool) -> None:
    """Creating, raising all and reading back a large fleet stays one transaction each."""
    async with pool.acquire() as conn:
        before = await make(conn, 100_000)
        after = replace(
            before.state,
            members={d: replace(m, rung=1, epoch=11) for d, m in before.state.members.items()},
        )
        await store.commit(conn, before, after, now=1001.0)
        [count] = await store.member_counts(conn, "move")
        assert (count.rung, count.devices) == (1, 100_000)
        page = await store.members_page(conn, "move", after=99_997)
        assert [m.rank for m in page] == [99_998, 99_999]


async def test_names_are_unique_and_the_unknown_is_not_found(pool: Pool) -> None:
    async with pool.acquire() as conn:
        await make(conn)
        with pytest.raises(Conflict):
            await make(conn)
        for call in (store.head(conn, "other"), store.load(conn, "other")):
            with pytest.raises(NotFound):
                await call
        with pytest.raises(NotFound):
            await store.add_request(conn, "other", RequestKind.PAUSE, {}, "ann")
        assert await store.highest_epoch(conn) == 10
        assert await claims.claimed(conn, ["car-1", "car-99"]) == [("car-1", "move")]


async def test_an_emergency_is_asked_for_once(pool: Pool) -> None:
    """However often the journal is read, each emergency becomes one request."""
    async with pool.acquire() as conn:
        await make(conn)
        for _ in range(3):
            await store.add_emergency(conn, "move", 99, "ann", devices=None)
            await store.add_emergency(conn, "move", 100, "ann", devices=["car-1", "car-2"])
        asked = await store.open_requests(conn, "move")
        assert [(r.kind, r.args) for r in asked] == [
            (RequestKind.EMERGENCY, {"epoch": 99}),
            (RequestKind.REVERT, {"epoch": 100, "device": "car-1"}),
            (RequestKind.REVERT, {"epoch": 100, "device": "car-2"}),
        ]


async def test_the_timeline_is_read_in_its_order(pool: Pool) -> None:
    async with pool.acquire() as conn:
        await make(conn)
        point = TimelinePoint(
            phase="running",
            rung=1,
            wave=0,
            wave_phase="baking",
            devices_old=2,
            devices_both=1,
            devices_new=0,
        )
        for at in (3.0, 1.0, 2.0):
            await store.add_sample(conn, "move", at, replace(point, wave=int(at)))
        assert [(at, p.wave) for at, p in await store.samples(conn, "move", since=1.0)] == [
            (2.0, 2),
            (3.0, 3),
        ]


async def test_the_audit_log_is_a_chain_from_the_first_line_on(pool: Pool) -> None:
    """Lines of a start, of decisions and of an amendment follow from each other; a changed one does not."""
    async with pool.acquire() as conn:
        before = await make(conn)
        told = AuditEntry(
            kind="wave_opened",
            text="größer",
            evidence={"share": 0.1, "nan": float("nan"), "whole": 1.0, "large": 1e22, "gates": [{"n": 1}]},
        )
        after = replace(before.state, reason="x")
        stored = await store.commit(conn, before, after, audit=[told, told], now=1001.25)
        amended = AuditEntry(kind="plan_amended", text="…", actor="ann")
        await store.commit(conn, stored, after, audit=[amended], plan="migration: move # 2", now=1002.0)
        plans = await store.plan_versions(conn, "move")
        assert plans == [(1, 1000.0, "migration: move"), (2, 1002.0, "migration: move # 2")]
        links = await audit.whole_chain(conn, "move")
        assert [one.number for one in links] == [1, 2, 3, 4]
        assert chain.broken("move", plans[0][2], links) == []
        assert await audit.head(conn, "move") == (4, links[-1].hash)
        await conn.execute("UPDATE engine.audit SET text = 'smaller' WHERE number = 2")
        [problem] = chain.broken("move", plans[0][2], await audit.whole_chain(conn, "move"))
        assert problem.startswith("entry 2 (wave_opened")


async def test_lines_from_before_the_chain_are_left_as_they_are(pool: Pool) -> None:
    """A migration that was under way at the upgrade goes on; it is only not certified."""
    async with pool.acquire() as conn:
        before = await make(conn)
        await conn.execute("UPDATE engine.audit SET number = NULL, hash = NULL")
        entry = AuditEntry(kind="migration_paused", text="paused")
        await store.commit(conn, before, before.state, audit=[entry], now=1001.0)
        assert (await audit.head(conn, "move"))[0] == 1
        assert [line.kind for line in await audit.page(conn, "move")] == ["migration_started", entry.kind]
        with pytest.raises(Conflict, match="not a chain yet"):
            await audit.whole_chain(conn, "move")


async def test_of_two_migrations_started_with_the_same_device_at_once_one_is_turned_away(pool: Pool) -> None:
    async with pool.acquire() as one, pool.acquire() as other:
        for round_ in range(5):
            names = [f"first-{round_}", f"second-{round_}"]
            outcomes = await asyncio.gather(
                make(one, name=names[0]), make(other, name=names[1]), return_exceptions=True
            )
            assert sorted(type(o).__name__ for o in outcomes) == ["Claimed", "StoredMigration"]
            [error] = [o for o in outcomes if isinstance(o, Claimed)]
            assert "car-0, car-1, car-2" in str(error) and error.devices.keys() == members(3).keys()
            await one.execute("UPDATE engine.migration SET phase = 'released'")


async def test_devices_taken_meanwhile_are_not_taken_back(pool: Pool) -> None:
    """Two that went back are resumed at once: one has the devices. Nor does a fleet that grows take any."""
    async with pool.acquire() as one, pool.acquire() as other:
        await make(one, name="first")
        await one.execute("UPDATE engine.migration SET phase = 'reverted'")
        await make(one, name="second")
        await one.execute("UPDATE engine.migration SET phase = 'reverted'")
        await one.execute("""UPDATE engine.migration SET state = jsonb_set(state, '{phase}', '"reverted"')""")

        async def resume(conn: Conn, name: str) -> store.StoredMigration:
            before = await store.load(conn, name)
            after = replace(before.state, phase=Phase.RUNNING)
            return await store.commit(conn, before, after, now=1001.0)

        outcomes = await asyncio.gather(resume(one, "first"), resume(other, "second"), return_exceptions=True)
        assert sorted(type(o).__name__ for o in outcomes) == ["Claimed", "StoredMigration"]

        third = await make(one, 0, name="third")
        grown = replace(third.state, members={"car-1": Member(device="car-1", rank=0)})
        with pytest.raises(Claimed, match="car-1"):
            await store.commit(one, third, grown, now=1002.0)
        out = replace(grown.members["car-1"], state=MemberState.EXCLUDED)
        kept = await store.commit(one, third, replace(grown, members={"car-1": out}), now=1002.0)
        with pytest.raises(Claimed):
            await store.commit(one, kept, grown, now=1003.0)
