"""The fence on a real PostgreSQL: who is refused, who is let through, who is waited for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import asyncpg
import pytest
from cutover_world import cloud_closure, until

from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.fence import FROZEN, MOVED, NOT_OPEN, REFUSED, Side, Status
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.fence import Fence, Lapsed, StillWriting
from tenant_world import fill_cloud, fresh_pair

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
MOVE = "acme"


@pytest.fixture
async def url(server: EmbeddedPostgres) -> AsyncIterator[str]:
    async with fresh_pair(server) as pair:
        await fill_cloud(pair.source, tenants=3, devices=4, values=2)
        yield pair.source


@pytest.fixture
async def closure(url: str) -> Closure:
    return await cloud_closure(url)


@pytest.fixture
async def fence(url: str, closure: Closure) -> AsyncIterator[Fence]:
    made = Fence(url, closure, move=MOVE, side=Side.SOURCE, new_place="acme.example.com/cloud")
    await made.install()
    yield made
    await made.aclose()


@pytest.fixture
async def connect(url: str) -> AsyncIterator[Callable[..., Awaitable[Connection]]]:
    opened: list[Connection] = []

    async def one(**settings: str) -> Connection:
        conn = await asyncpg.connect(url, server_settings={"application_name": "shop", **settings})
        opened.append(conn)
        return conn

    yield one
    for conn in opened:
        conn.terminate()


@pytest.fixture
async def conn(connect: Callable[..., Awaitable[Connection]]) -> Connection:
    return await connect()


OURS = {
    "insert": "INSERT INTO device (customer_id, name) VALUES (2, 'new')",
    "several rows": "INSERT INTO device (customer_id, name) VALUES (1, 'a'), (3, 'b'), (2, 'c')",
    "on conflict": "INSERT INTO users (customer_id, email) VALUES (2, 'user1@tenant-2') "
    "ON CONFLICT (email) DO UPDATE SET customer_id = 2",
    "update": "UPDATE device SET name = name || '!' WHERE customer_id = 2",
    "update all": "UPDATE device SET name = name || '!'",
    "delete": "DELETE FROM users WHERE customer_id = 2",
    "enters": "UPDATE device SET customer_id = 2, name = 'x' WHERE id = 1",
    "leaves": "UPDATE device SET customer_id = 1, name = 'x' WHERE customer_id = 2 AND name LIKE '%-1'",
    "child": "UPDATE alarm SET note = 'x' WHERE device_id IN (SELECT id FROM device WHERE customer_id = 2)",
    "by id as text": "INSERT INTO ts_kv SELECT 'DEVICE', max(id)::text, 'speed', 99, 1 FROM device "
    "WHERE customer_id = 2",
    "child enters": "UPDATE alarm SET number = 9, "
    "device_id = (SELECT max(id) FROM device WHERE customer_id = 2) WHERE device_id = 1 AND number = 1",
    "merge": "MERGE INTO device d USING (VALUES (2::bigint, 'merged')) v (c, n) ON d.name = v.n "
    "WHEN NOT MATCHED THEN INSERT (customer_id, name) VALUES (v.c, v.n)",
    "partition": "INSERT INTO audit_log_now (customer_id, action) VALUES (2, 'direct')",
    "partitioned": "INSERT INTO audit_log (customer_id, at, action) VALUES (2, '2025-01-01', 'old')",
    "moves partition": "UPDATE audit_log SET at = '2026-02-02' WHERE customer_id = 2 AND at < '2026-01-01'",
    "truncate": "TRUNCATE ts_kv",
    "truncate partition": "TRUNCATE audit_log_old",
    "writable cte": "WITH d AS (UPDATE device SET name = name || '?' WHERE customer_id = 2 RETURNING id) "
    "SELECT count(*) FROM d",
}
OTHERS = {
    "insert": "INSERT INTO device (customer_id, name) VALUES (1, 'new')",
    "update": "UPDATE device SET name = name || '!' WHERE customer_id <> 2",
    "delete": "DELETE FROM device WHERE customer_id = 3 "
    "AND id NOT IN (SELECT device_id FROM group_device) AND id NOT IN (SELECT device_id FROM event_tag)",
    "child": "UPDATE alarm SET note = 'x' WHERE device_id IN (SELECT id FROM device WHERE customer_id = 1)",
    "partitioned": "INSERT INTO audit_log (customer_id, action) VALUES (1, 'x'), (NULL, 'y')",
    "nothing of ours": "UPDATE device SET name = 'x' WHERE customer_id = 2 AND false",
    "by id as text": "INSERT INTO ts_kv VALUES ('DEVICE', '1', 'speed', 99, 1), ('ASSET', 'x', 'load', 1, 1)",
}


async def sqlstate(conn: Connection, statement: str) -> str:
    """The SQLSTATE of a statement in a transaction that is rolled back, "" when it went through."""
    transaction = conn.transaction()
    await transaction.start()
    try:
        await conn.execute(statement)
    except asyncpg.PostgresError as exc:
        return str(exc.sqlstate)
    finally:
        await transaction.rollback()
    return ""


async def test_each_kind_of_write_of_the_tenant_is_refused_and_none_of_others(
    fence: Fence, conn: Connection, connect: Callable[..., Awaitable[Connection]]
) -> None:
    for statement in (OURS | OTHERS).values():
        assert await sqlstate(conn, statement) == ""
    await fence.arm(for_s=60, drain_within_s=5)
    refused = {name: await sqlstate(conn, statement) for name, statement in OURS.items()}
    assert refused == dict.fromkeys(OURS, REFUSED)
    assert {name: await sqlstate(conn, s) for name, s in OTHERS.items()} == dict.fromkeys(OTHERS, "")
    for settings in (
        {"session_replication_role": "replica"},
        {"search_path": ""},
        {"default_transaction_isolation": "repeatable read"},
        {"default_transaction_isolation": "serializable"},
    ):
        other = await connect(**settings)
        for ours, state in ((True, REFUSED), (False, "")):
            customer = 2 if ours else 1
            insert = f"INSERT INTO public.device (customer_id, name) VALUES ({customer}, 'z')"
            alarm = f"""UPDATE public.alarm SET note = 'a' WHERE device_id =
                (SELECT max(id) FROM public.device WHERE customer_id = {customer})"""
            assert await sqlstate(other, insert) == state, settings
            assert await sqlstate(other, alarm) == state, settings
    with pytest.raises(asyncpg.PostgresError, match="being moved"):
        await conn.copy_records_to_table(
            "device", records=[(1, "a"), (2, "b")], columns=["customer_id", "name"]
        )
    await conn.copy_records_to_table("device", records=[(1, "copied")], columns=["customer_id", "name"])
    refusals = (await fence.refused()).closing
    assert refusals == len(OURS) + 8 + 1


async def test_cascades_deferred_triggers_and_foreign_owners_meet_it(fence: Fence, conn: Connection) -> None:
    await conn.execute("""
        CREATE FUNCTION public.rename(c bigint) RETURNS void LANGUAGE sql SECURITY DEFINER
        SET search_path = '' AS $$ UPDATE public.device SET name = name || '+' WHERE customer_id = c $$;
        CREATE TABLE public.wish (customer_id bigint);
        CREATE FUNCTION public.grant_wish() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          INSERT INTO public.device (customer_id, name) VALUES (NEW.customer_id, 'wish'); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON public.wish DEFERRABLE INITIALLY DEFERRED
          FOR EACH ROW EXECUTE FUNCTION public.grant_wish();
        DELETE FROM group_device; DELETE FROM event_tag;
        CREATE ROLE stranger_app; GRANT SELECT, INSERT, UPDATE, DELETE ON device, alarm TO stranger_app;
        GRANT USAGE ON SEQUENCE device_id_seq TO stranger_app;
    """)
    try:
        await fence.arm(for_s=60, drain_within_s=5)
        assert await sqlstate(conn, "SELECT public.rename(2)") == REFUSED
        assert await sqlstate(conn, "SELECT public.rename(1)") == ""
        assert await sqlstate(conn, "DELETE FROM device WHERE customer_id = 2") == REFUSED
        assert await sqlstate(conn, "DELETE FROM device WHERE customer_id = 1") == ""
        with pytest.raises(asyncpg.PostgresError) as refused:
            await conn.execute("INSERT INTO public.wish VALUES (2)")
        assert refused.value.sqlstate == REFUSED
        await conn.execute("INSERT INTO public.wish VALUES (1)")
        await conn.execute("SET ROLE stranger_app")
        assert await sqlstate(conn, "UPDATE alarm SET note = 'x'") == REFUSED
        assert await sqlstate(conn, "INSERT INTO device (customer_id, name) VALUES (1, 'x')") == ""
        for attempt in (
            f"SELECT fleetlift_fence.thaw_{fence.tag}()",
            f"SELECT setval('fleetlift_fence.until_{fence.tag}', 0)",
        ):
            assert await sqlstate(conn, attempt) == "42501"
        await conn.execute("RESET ROLE")
    finally:
        await conn.execute("RESET ROLE; DROP OWNED BY stranger_app; DROP ROLE stranger_app")


async def test_what_is_under_way_ends_normally_before_it_is_drained(
    fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    holder, newcomer = await connect(), await connect()
    await holder.execute("BEGIN; INSERT INTO device (customer_id, name) VALUES (2, 'first')")
    arming = asyncio.create_task(fence.arm(for_s=60, drain_within_s=30))
    probe = await connect()
    await until(lambda: probe.fetchval(f"SELECT last_value > 0 FROM fleetlift_fence.until_{fence.tag}"))
    assert await sqlstate(newcomer, OURS["insert"]) == REFUSED
    assert await sqlstate(newcomer, OTHERS["insert"]) == ""
    await holder.execute("INSERT INTO device (customer_id, name) VALUES (2, 'second')")
    assert not arming.done()
    await holder.execute("COMMIT")
    drained = await arming
    assert drained.until_ms - drained.closed_at_ms == 60_000
    assert await sqlstate(holder, OURS["insert"]) == REFUSED
    assert await probe.fetchval("SELECT count(*) FROM device WHERE name IN ('first', 'second')") == 2


async def test_a_transaction_held_open_stops_the_arming_and_is_named(fence: Fence, conn: Connection) -> None:
    await conn.execute("BEGIN; UPDATE device SET name = name || '!' WHERE customer_id = 2")
    with pytest.raises(StillWriting, match="shop") as told:
        await fence.arm(for_s=60, drain_within_s=0.2)
    assert [holder.application for holder in told.value.holders] == ["shop"]
    assert (await fence.state()).status is Status.OPEN
    await conn.execute("INSERT INTO device (customer_id, name) VALUES (2, 'goes on'); COMMIT")


async def test_it_is_ended_when_the_plan_says_so(
    fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    holder, other = await connect(), await connect()
    await other.execute("BEGIN; UPDATE device SET name = name || '!' WHERE customer_id = 1")
    await holder.execute("BEGIN; INSERT INTO device (customer_id, name) VALUES (2, 'unfinished')")
    drained = await fence.arm(for_s=60, drain_within_s=2, terminate=True)
    assert [ended.application for ended in drained.ended] == ["shop"]
    await other.execute("COMMIT")
    assert await other.fetchval("SELECT count(*) FROM device WHERE name = 'unfinished'") == 0


async def test_a_prepared_transaction_is_waited_for(
    fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    conn = await connect()
    await conn.execute("BEGIN; INSERT INTO device (customer_id, name) VALUES (2, 'prepared')")
    await conn.execute("PREPARE TRANSACTION 'two-phase'")
    try:
        with pytest.raises(StillWriting, match="prepared transaction 'two-phase'"):
            await fence.arm(for_s=60, drain_within_s=0.2, terminate=True)
    finally:
        await conn.execute("COMMIT PREPARED 'two-phase'")
    await fence.arm(for_s=60, drain_within_s=5)


async def test_a_row_that_enters_beside_an_open_child_is_waited_for(
    fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    """The child was another tenant's when it was written; its device has become ours before it commits.

    Without a foreign key, as values of devices have none; a declared one would make the device wait.
    """
    child, mover = await connect(), await connect()
    await child.execute("BEGIN; INSERT INTO ts_kv VALUES ('DEVICE', '1', 'hidden', 1)")
    await mover.execute("UPDATE device SET customer_id = 2, name = 'moved in' WHERE id = 1")
    with pytest.raises(StillWriting) as told:
        await fence.arm(for_s=60, drain_within_s=0.3, terminate=True)
    assert told.value.holders[0].bystander
    await child.execute("COMMIT")
    await fence.arm(for_s=60, drain_within_s=5)
    assert await sqlstate(mover, "UPDATE ts_kv SET num = 2 WHERE key = 'hidden'") == REFUSED


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_an_old_snapshot_cannot_hide_a_row(
    fence: Fence, connect: Callable[..., Awaitable[Connection]], isolation: str
) -> None:
    old, mover = await connect(), await connect()
    await old.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT count(*) FROM device")
    await mover.execute("UPDATE device SET customer_id = 2, name = 'moved in' WHERE id = 1")
    await fence.arm(for_s=60, drain_within_s=5)
    with pytest.raises(asyncpg.SerializationError):
        await old.execute("INSERT INTO ts_kv VALUES ('DEVICE', '1', 'hidden', 1)")
    await old.execute("ROLLBACK")
    with pytest.raises(asyncpg.PostgresError) as refused:
        await old.execute(
            f"BEGIN ISOLATION LEVEL {isolation}; INSERT INTO ts_kv VALUES ('DEVICE', '1', 'h', 1)"
        )
    assert refused.value.sqlstate == REFUSED
    await old.execute("ROLLBACK")
    await old.execute(
        f"BEGIN ISOLATION LEVEL {isolation}; INSERT INTO ts_kv VALUES ('DEVICE', '5x', 'h', 1); COMMIT"
    )


async def test_an_old_snapshot_sees_that_the_fence_has_closed(
    fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    old = await connect()
    await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM device")
    await fence.arm(for_s=60, drain_within_s=5)
    with pytest.raises(asyncpg.PostgresError) as refused:
        await old.execute(OURS["insert"])
    assert refused.value.sqlstate == REFUSED


async def test_it_opens_by_itself_and_cannot_be_sealed_then(fence: Fence, conn: Connection) -> None:
    drained = await fence.arm(for_s=3, drain_within_s=5)
    assert await sqlstate(conn, OURS["insert"]) == REFUSED
    await until(lambda: _is(fence, Status.OPEN))
    await conn.execute(OURS["insert"])
    assert not await fence.seal(drained.until_ms)
    assert (await fence.state()).status is Status.OPEN


async def test_a_clock_that_goes_back_neither_holds_it_closed_nor_seals_what_was_open(
    fence: Fence, conn: Connection
) -> None:
    """As if the database's clock had jumped back by an hour: the moment lies further ahead than it can."""
    drained = await fence.arm(for_s=60, drain_within_s=5)
    later = drained.until_ms + 3_600_000
    await conn.execute(f"SELECT setval('fleetlift_fence.until_{fence.tag}', {later})")
    assert (await fence.state()).status is Status.OPEN
    assert not await fence.seal(later)
    await conn.execute(OURS["insert"])
    assert not await fence.seal(later)


async def test_sealed_is_for_good_until_the_way_back(fence: Fence, conn: Connection) -> None:
    drained = await fence.arm(for_s=60, drain_within_s=5)
    assert await fence.seal(drained.until_ms)
    assert await fence.seal(drained.until_ms)
    assert not await fence.thaw()
    with pytest.raises(asyncpg.PostgresError) as refused:
        await conn.execute(OURS["insert"])
    assert refused.value.sqlstate == MOVED
    assert refused.value.hint is not None and "acme.example.com/cloud" in refused.value.hint
    with pytest.raises(Conflict, match="sealed: it cannot be armed"):
        await fence.arm(for_s=1, drain_within_s=1)
    assert (await fence.refused()).sealed == 1
    await fence.install()
    assert (await fence.state()).status is Status.SEALED
    await fence.unseal()
    await conn.execute(OURS["insert"])


async def test_only_a_drained_fence_is_sealed(fence: Fence, conn: Connection) -> None:
    until = await conn.fetchval(f"SELECT fleetlift_fence.arm_{fence.tag}(60000)")
    assert not await fence.seal(until)
    assert await fence.thaw()


async def test_a_cancelled_arming_leaves_it_open(closure: Closure, fence: Fence, conn: Connection) -> None:
    await conn.execute("BEGIN; UPDATE device SET name = name || '!' WHERE customer_id = 2")
    arming = asyncio.create_task(fence.arm(for_s=60, drain_within_s=60))
    other = Fence(fence._url, closure, move=MOVE, side=Side.SOURCE)
    await until(lambda: _is(other, Status.CLOSED))
    await other.aclose()
    arming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await arming
    assert (await fence.state()).status is Status.OPEN


async def _is(fence: Fence, status: Status) -> bool:
    return (await fence.state()).status is status


async def _true(value: bool) -> bool:
    return value


async def test_who_has_the_pass_writes_through_and_nobody_else(
    closure: Closure, fence: Fence, connect: Callable[..., Awaitable[Connection]]
) -> None:
    drained = await fence.arm(for_s=60, drain_within_s=5)
    assert await fence.seal(drained.until_ms)
    stream = await connect(session_replication_role="replica", **fence.pass_settings)
    for statement in OURS.values():
        assert await sqlstate(stream, statement) == ""
    wrong = await connect(**{"fleetlift_fence.pass": "guessed"})
    assert await sqlstate(wrong, OURS["insert"]) == MOVED
    await fence.try_pass()
    renewed = Fence(fence._url, closure, move=MOVE, side=Side.SOURCE)
    await renewed.install()
    assert await sqlstate(stream, OURS["insert"]) == MOVED
    assert await sqlstate(await connect(**renewed.pass_settings), OURS["insert"]) == ""
    await renewed.aclose()
    source = await wrong.fetch(
        "SELECT prosrc FROM pg_proc WHERE pronamespace = 'fleetlift_fence'::regnamespace"
    )
    assert not any(renewed.token in row["prosrc"] for row in source)


async def test_the_target_is_closed_for_all_until_it_opens(
    closure: Closure, url: str, conn: Connection
) -> None:
    target = Fence(url, closure, move=MOVE, side=Side.TARGET)
    await target.install()
    await target.close()
    statements = {**OURS, **OTHERS}
    states = {name: await sqlstate(conn, statement) for name, statement in statements.items()}
    assert states == dict.fromkeys(statements, NOT_OPEN)
    await target.open()
    assert {name: await sqlstate(conn, s) for name, s in OURS.items()} == dict.fromkeys(OURS, "")
    await target.arm(for_s=60, drain_within_s=5)
    assert await sqlstate(conn, OTHERS["insert"]) == REFUSED
    await target.aclose()


async def test_a_frozen_feature_is_refused_for_its_time_only(fence: Fence, conn: Connection) -> None:
    later_ms = await fence.clock_ms() + 60_000
    await fence.freeze({"public.users": ["insert"], "public.audit_log": ["insert"]}, later_ms)
    register = "INSERT INTO users (customer_id, email) VALUES ({}, 'new@x')"
    assert await sqlstate(conn, register.format(2)) == FROZEN
    assert await sqlstate(conn, register.format(1)) == ""
    assert await sqlstate(conn, "INSERT INTO audit_log_now (customer_id, action) VALUES (2, 'x')") == FROZEN
    assert await sqlstate(conn, "UPDATE users SET email = 'x@y' WHERE email = 'user1@tenant-2'") == ""
    assert await sqlstate(conn, OURS["insert"]) == ""
    assert (await fence.refused()).frozen == 2
    await fence.freeze(["public.users"], await fence.clock_ms())
    assert await sqlstate(conn, register.format(2)) == ""
    await fence.freeze(["public.users"], later_ms)
    await fence.unfreeze()
    assert await sqlstate(conn, register.format(2)) == ""
    await fence.install()
    assert not (await fence.state()).frozen


async def test_putting_it_up_never_holds_others_up_for_long(
    closure: Closure, url: str, connect: Callable[..., Awaitable[Connection]]
) -> None:
    holder, other = await connect(), await connect()
    await holder.execute("BEGIN; UPDATE device SET name = name || '!' WHERE customer_id = 1")
    fence = Fence(url, closure, move=MOVE, side=Side.SOURCE)
    with pytest.raises(Unavailable, match=r"in the way: process \d+"):
        await fence.install(within_s=0.2)
    assert (await fence.state()).status is Status.ABSENT
    installing = asyncio.create_task(fence.install(lock_timeout_s=0.05, within_s=60))
    slowest = 0.0
    for number in range(60):
        began = asyncio.get_running_loop().time()
        await other.execute(f"INSERT INTO device (customer_id, name) VALUES (1, 'meanwhile {number}')")
        slowest = max(slowest, asyncio.get_running_loop().time() - began)
    assert not installing.done()
    await holder.execute("COMMIT")
    await installing
    assert (await fence.state()).status is Status.OPEN
    # 50 ms behind us at most; the rest is the machine's.
    assert slowest < 5.0
    await fence.aclose()


async def test_it_goes_without_a_trace_and_may_be_put_up_twice(
    closure: Closure, fence: Fence, conn: Connection
) -> None:
    second = Fence(fence._url, closure, move="other", side=Side.SOURCE)
    await second.install()
    await fence.install()
    await fence.freeze(["public.users"], await fence.clock_ms() + 60_000)
    await fence.arm(for_s=60, drain_within_s=5)
    with pytest.raises(Conflict, match="closed cannot remove"):
        await fence.remove()
    await fence.thaw()
    await fence.remove()
    await fence.remove()
    assert (await fence.state()).status is Status.ABSENT
    assert (await second.state()).status is Status.OPEN
    await second.remove()
    assert await conn.fetchval("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'fleetlift%'") == 0
    assert await conn.fetchval("SELECT to_regnamespace('fleetlift_fence')") is None
    await second.aclose()


async def test_a_partition_made_later_is_fenced_too(fence: Fence, conn: Connection) -> None:
    await conn.execute("""
        CREATE TABLE audit_log_next (
          id bigint NOT NULL, customer_id bigint, at timestamptz NOT NULL, action text NOT NULL);
        ALTER TABLE audit_log ATTACH PARTITION audit_log_next
          FOR VALUES FROM ('2030-01-01') TO ('2031-01-01');
        """)
    await fence.install()
    await fence.arm(for_s=60, drain_within_s=5)
    direct = (
        "INSERT INTO audit_log_next (id, customer_id, at, action) "
        "OVERRIDING SYSTEM VALUE VALUES (1, 2, '2030-05-05', 'x')"
    )
    assert await sqlstate(conn, direct) == REFUSED
    assert await sqlstate(conn, "TRUNCATE audit_log_next") == REFUSED
    await conn.execute("SET session_replication_role = replica")
    assert await sqlstate(conn, direct) == REFUSED


async def test_every_acknowledged_write_precedes_the_position(
    fence: Fence, url: str, connect: Callable[..., Awaitable[Connection]]
) -> None:
    """Writers that never stop: what is drained is all there is, while other tenants' writers go on."""
    acknowledged: set[str] = set()
    others = {"armed": 0, "failed": 0}
    stop, armed = asyncio.Event(), asyncio.Event()

    async def ours(number: int) -> None:
        writer = await connect()
        count = 0
        while not stop.is_set():
            name = f"w{number}-{(count := count + 1)}"
            with contextlib.suppress(asyncpg.PostgresError):
                async with writer.transaction():
                    await writer.execute("INSERT INTO device (customer_id, name) VALUES (2, $1)", name)
                    await writer.execute("INSERT INTO ts_kv VALUES ('DEVICE', '5', $1, 1)", name)
                acknowledged.add(name)
            await asyncio.sleep(0)

    async def theirs(number: int) -> None:
        writer = await connect()
        count = 0
        while not stop.is_set():
            try:
                await writer.execute(
                    "INSERT INTO ts_kv VALUES ('DEVICE', '1', $1, 1)", f"t{number}-{(count := count + 1)}"
                )
                others["armed"] += armed.is_set()
            except asyncpg.PostgresError:
                others["failed"] += 1
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(ours(n)) for n in range(3)] + [
        asyncio.create_task(theirs(n)) for n in range(2)
    ]
    reader = await connect()
    try:
        for _ in range(5):
            before = len(acknowledged)
            await until(lambda before=before: _true(len(acknowledged) >= before + 20))  # type: ignore[misc]
            await fence.arm(for_s=60, drain_within_s=10)
            armed.set()
            rows = {row["name"] for row in await reader.fetch("SELECT name FROM device WHERE name LIKE 'w%'")}
            seen = others["armed"]
            await until(lambda seen=seen: _true(others["armed"] >= seen + 10))  # type: ignore[misc]
            again = {
                row["name"] for row in await reader.fetch("SELECT name FROM device WHERE name LIKE 'w%'")
            }
            assert rows == again == acknowledged
            armed.clear()
            await fence.thaw()
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    assert others["failed"] == 0
    assert (await fence.refused()).closing > 0


async def test_a_lapse_during_the_drain_is_told(closure: Closure, fence: Fence, conn: Connection) -> None:
    await conn.execute("BEGIN; UPDATE device SET name = name || '!' WHERE customer_id = 2")
    arming = asyncio.create_task(fence.arm(for_s=2.0, drain_within_s=25))
    other = Fence(fence._url, closure, move=MOVE, side=Side.SOURCE)
    await until(lambda: _is(other, Status.CLOSED))
    await until(lambda: _is(other, Status.OPEN))
    await conn.execute("INSERT INTO device (customer_id, name) VALUES (2, 'late'); COMMIT")
    with pytest.raises(Lapsed):
        await arming
    await other.aclose()
