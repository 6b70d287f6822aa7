"""A tenant's names go over with its devices on line, and come back: nothing lost, nobody else moved."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio
from names_world import COPY, DATABASE, NEW_HOST, OLD_HOST, OWN_TTL_S, World, Zone, running_world, until
from tenant_cloud import leftovers_in, told, without_password

from fleetlift.core.tenant.fence import FROZEN
from fleetlift.tenant.fence import lock_key
from fleetlift.testing import scratch_directory
from tenant_world import fill_cloud, running_postgres

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

KILLS = (
    *("load-played", "names-read", "ttl-lowered", "names-switched", "relay-told", "drain-begun"),
    *("drain-stopped", "names-reverted"),
)
DRAIN = "  - drain: old\n    stragglers: relay\n    quiet: 1s\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    names = {item.name for item in request.session.items}
    kills = ",".join(KILLS) if "test_a_mover_killed_between_names_comes_through_and_back" in names else ""
    with scratch_directory() as directory:
        async with running_world(directory, kill_at=kills) as running:
            yield running


SCENARIOS: dict[str, Callable[[World], Coroutine[Any, Any, None]]] = {}


def beside_others(
    scenario: Callable[[World], Coroutine[Any, Any, None]],
) -> Callable[[Mapping[str, asyncio.Task[None]]], Coroutine[Any, Any, None]]:
    """A test of a tenant of its own that mostly waits: it runs at the same time as others of its kind."""
    SCENARIOS[scenario.__name__] = scenario

    async def test(under_way: Mapping[str, asyncio.Task[None]]) -> None:
        await under_way[scenario.__name__]

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def under_way(
    world: World, request: pytest.FixtureRequest
) -> AsyncIterator[Mapping[str, asyncio.Task[None]]]:
    wanted = {item.name for item in request.session.items}
    tasks = {name: asyncio.create_task(run(world)) for name, run in SCENARIOS.items() if name in wanted}
    yield tasks
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


def is_new(host: str) -> bool:
    return host == NEW_HOST


SCENARIO = """\
scenario: small
devices: 10
for: 2s
protocol: mqtt
qos: 1
seed: 1
classes:
  - class: all
    share: 100%
    topics: dt/{device}/status
    size: 100
    background: 5/s
"""


def validate(gates: str) -> str:
    return f"  - validate: load\n    scenario: small.yaml\n    for: 2s\n    gates: [{gates}]\n"


@contextlib.asynccontextmanager
async def own_zone(world: World, name: str) -> AsyncIterator[Zone]:
    """A name server that may fail without anybody else noticing. Its TTL is long enough for a test to act
    while it is waited out, on a busy machine too."""
    zone = Zone(world.directory / f"knot-{name}", ttl_s=8)
    await zone.start()
    try:
        yield zone
    finally:
        await zone.stop()


@contextlib.asynccontextmanager
async def let_in(source: str, move: str) -> AsyncIterator[None]:
    """A transaction that holds what the fence gives to every writer it lets in, before there is a fence: one
    that had written would keep the slot from being made."""
    conn = await asyncpg.connect(source)
    await conn.transaction().start()
    await conn.execute("SELECT pg_advisory_xact_lock_shared($1)", lock_key(move))
    try:
        yield
    finally:
        await conn.close()


@contextlib.asynccontextmanager
async def blocking(source: str) -> AsyncIterator[None]:
    """A transaction of the tenant's that stays open."""
    conn = await asyncpg.connect(source)
    await conn.transaction().start()
    await conn.execute("UPDATE device SET name = name || '!' WHERE customer_id = 2")
    try:
        yield
    finally:
        await conn.close()


async def register(url: str, email: str) -> None:
    conn = await asyncpg.connect(url)
    try:
        await conn.execute("INSERT INTO users (customer_id, email) VALUES (2, $1)", email)
    finally:
        await conn.close()


async def until_frozen(url: str, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        for number in range(10_000):
            try:
                await register(url, f"again-{number}@example.com")
            except asyncpg.PostgresError as error:
                if error.sqlstate == FROZEN:
                    return
            await asyncio.sleep(0.05)


async def databases(url: str, name: str) -> list[str]:
    conn = await asyncpg.connect(url)
    try:
        return [r[0] for r in await conn.fetch("SELECT datname FROM pg_database WHERE datname = $1", name)]
    finally:
        await conn.close()


async def test_a_mover_killed_between_names_comes_through_and_back(world: World) -> None:
    """SIGKILL at each step of the names, there and back: records, TTLs and routes end as they should."""
    async with world.cast() as cast:
        before = await cast.record()
        steps = COPY + validate("load.errors == 0") + DATABASE + cast.names() + DRAIN
        await cast.start(cast.plan(steps), {"small.yaml": SCENARIO})
        while "does not count" in (found := await cast.until("finished", "held"))["reason"]:
            await cast.ask("resume")  # the machine had no time for the generator
        assert found["phase"] == "finished", told(found)
        record = await cast.record()
        assert (record.values, record.ttl_s) == ((NEW_HOST,), 1)
        await cast.ask("revert")
        await cast.until("reverted")
        killed = (world.directory / "new" / "mover-killed-at").read_text().split()
        assert sorted(killed) == sorted(KILLS)
        assert await cast.record() == before
        await until(lambda: all(d.address == OLD_HOST for d in cast.devices), "everybody back")
        async with world.relay_control() as relay:
            assert not {d.device for d in cast.devices} & set((await relay.routes()).devices)
        assert await cast.lost("own") == 0
        assert await leftovers_in(cast.pair.source) == []


@beside_others
async def test_a_name_server_that_is_away_is_waited_for_and_a_wrong_key_is_told(world: World) -> None:
    async with own_zone(world, "away") as zone, world.cast(zone=zone) as cast:
        await cast.start(cast.plan(COPY + DATABASE + cast.names()))
        await cast.until_step("switch: dns", "working", says="waiting for the old TTL")
        await zone.stop()
        try:
            await cast.until_step("switch: dns", "working", says="the DNS server")
            zone.write_key(f"{zone.dns.key.algorithm}:{zone.dns.key.name}:{'A' * 43}=")
        finally:
            await zone.start()
        found = await cast.until("held")
        assert "refuses the TSIG key" in found["reason"], found["reason"]
        record = await cast.record()
        assert record.values == (OLD_HOST,), "nothing was switched without a key"
        zone.write_key(zone.dns.key_text)
        await cast.ask("resume")
        await cast.until("finished")
        record = await cast.record()
        assert record.values == (NEW_HOST,)
        assert await cast.lost("own") == 0
        await zone.stop()
        try:
            await cast.ask("release")
            assert "DNS server" in await cast.until_event("clean_failed")
            for url in (cast.pair.source, cast.pair.target):  # slots fill disks: they wait for no name server
                assert await leftovers_in(url) == []
        finally:
            await zone.start()
        await cast.until_event("move_cleaned", within_s=90)


@beside_others
async def test_names_go_over_pool_first_and_who_pins_is_forwarded(world: World) -> None:
    """Devices of three resolver models move; the one that never asks again is named, and served too."""
    async with world.cast(pool=True, others=2) as cast:
        own, pool, others = cast.of("own"), cast.of("pool"), cast.of("others")
        top = f"rehearse: {{tenant: {cast.tenant('pool')}, root: customers.id = 3}}\n"
        await cast.start(cast.plan(COPY + DATABASE + cast.names(pool=True, approve="true") + DRAIN, top=top))
        await cast.until_step("switch: dns", "awaiting-approval", wave=0)
        await until(lambda: all(d.address == NEW_HOST for d in pool), "the pool's devices on the new side")
        assert all(d.address == OLD_HOST for d in own), "the tenant's devices wait for their wave"
        await cast.ask("approve")
        await cast.until_step("switch: dns", "awaiting-approval", wave=1)
        await until(lambda: sum(d.address == NEW_HOST for d in own) == len(own) - 1, "all but the pinned")
        await cast.ask("approve")
        found = await cast.until("finished")
        drained = found["steps"][-1]
        where = found["timeline"][-1]["point"]
        assert (where["at_old"], where["at_new"]) == (1, len(own)), where
        assert cast.pinned in drained["text"] and "forwarded" in drained["text"], drained
        assert next(d for d in own if d.device == cast.pinned).address == OLD_HOST
        async with world.relay_control() as relay:
            seen = {one.client: one for one in await relay.stragglers()}
        assert seen[cast.pinned].side == "new"
        assert all(seen[d.device].side == "old" and d.address == OLD_HOST for d in others)
        assert await cast.lost("own", "pool", "others") == 0
        assert not await cast.stored("new", others)
        for role in ("own", "pool"):
            record = await cast.record(role)
            assert record.values == (NEW_HOST,)
        await world.zone.write_record(cast.host("pool"), "127.0.0.9")  # somebody moves it on
        await cast.ask("release")
        assert cast.host("pool") in await cast.until_event("move_cleaned")
        record, moved_on = await cast.record(), await cast.record("pool")
        assert record.ttl_s == OWN_TTL_S
        assert (moved_on.values, moved_on.ttl_s) == (("127.0.0.9",), 1)


@beside_others
async def test_a_breach_takes_names_routes_and_database_back(world: World) -> None:
    """Devices fall silent on the new side: all goes back, with what was written there meanwhile."""
    async with world.cast(others=1) as cast:
        own, others = cast.of("own"), cast.of("others")
        before = await cast.record()
        await cast.start(cast.plan(COPY + DATABASE + cast.names(bake="10m", silent_after="6s")))
        await cast.until_step("switch: dns", "baking")
        await until(lambda: sum(is_new(d.address) for d in own) == len(own) - 1, "devices on the new side")
        await cast.write(cast.pair.target, "written on the target")
        await cast.fleet.stop()
        found = await cast.until("reverted")
        breach = await cast.until_event("gate_breached")
        assert "devices.silent == 0" in breach and any(d.device in breach for d in own), breach
        assert await cast.read(cast.pair.source) == "written on the target"
        assert await cast.record() == before
        async with world.relay_control() as relay:
            assert not {d.device for d in own} & set((await relay.routes()).devices)
        assert await leftovers_in(cast.pair.source) == await leftovers_in(cast.pair.target) == []
        assert found["steps"][0]["phase"] == "undone"
        cast.fleet.start()
        await until(lambda: all(d.address == OLD_HOST for d in own), "everybody back at the old address")
        assert await cast.lost("own", "others") == 0
        assert not await cast.stored("new", others)


@beside_others
async def test_missing_data_holds_a_wave_then_breaches_and_may_leave_it_to_people(world: World) -> None:
    """`on_breach: hold`: names and database stay where they are, and somebody decides."""
    async with world.cast(online=False) as cast:
        before = await cast.record()
        names = cast.names(bake="0s", no_data_after="8s")
        await cast.start(cast.plan(COPY + DATABASE + names, top="on_breach: hold\n"))
        await cast.until_step("switch: dns", "baking")
        async with asyncio.timeout(20):
            while not (gates := (await cast.status())["gates"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert all(gate["missing"] and gate["verdict"] == "hold" for gate in gates), gates
        found = await cast.until("held")
        assert "gate breached" in found["reason"] and "no data" in found["reason"], found["reason"]
        record = await cast.record()
        assert record.values == (NEW_HOST,)
        cast.fleet.start()  # somebody finds out why, and switches the devices on
        await until(lambda: cast.fleet.connected == len(cast.devices), "devices on line")
        await cast.ask("resume")
        await cast.until("finished")
        await cast.ask("revert")
        await cast.until("reverted")
        assert await cast.record() == before
        free = [
            d for d in cast.devices if d.device != cast.pinned
        ]  # which has only ever heard of the new side
        await until(lambda: all(d.address == OLD_HOST for d in free), "let go of by the new side")
        assert await cast.lost("own") == 0


@beside_others
async def test_what_somebody_else_has_set_is_not_overwritten(world: World) -> None:
    async with own_zone(world, "shared") as zone, world.cast(online=False, zone=zone) as cast:
        await cast.start(cast.plan(COPY + DATABASE + cast.names(gates="[]", bake="0s")))
        await cast.until_step("switch: dns", "working", says="waiting for the old TTL")
        await cast.zone.write_record(cast.host("own"), "127.0.0.9")
        found = await cast.until("held")
        assert cast.host("own") in found["reason"] and "127.0.0.9" in found["reason"], found["reason"]
        record = await cast.record()
        assert record.values == ("127.0.0.9",)
        await cast.ask("revert")
        found = await cast.until("held")
        assert "could not be taken back" in found["reason"] and "127.0.0.9" in found["reason"]
        await cast.zone.write_record(cast.host("own"), OLD_HOST)
        await cast.ask("resume")
        await cast.until("reverted")
        record = await cast.record()
        assert (record.values, record.ttl_s) == ((OLD_HOST,), zone.ttl_s)


@beside_others
async def test_a_load_test_passes_its_gates_or_holds_the_move(world: World) -> None:
    """A rate that nothing reaches holds it; to resume plays the load again."""
    async with world.cast(online=False) as cast:
        steps = COPY + validate("load.errors == 0, load.lost == 0") + validate("load.rate >= 100000/s")
        await cast.start(cast.plan(steps + DATABASE), {"small.yaml": SCENARIO})
        found = await cast.until("held")
        while "does not count" in found["reason"]:  # the machine had no time for the generator
            await cast.ask("resume")
            found = await cast.until("held")
        assert found["steps"][1]["phase"] == "done", told(found)
        assert found["steps"][1]["figures"]["load_lost"] == 0
        assert "load.rate >= 100000/s" in found["reason"], found["reason"]
        await cast.ask("resume")
        await cast.until_step("validate: load", "working")
        found = await cast.until("held")
        played = [event["text"] for event in found["events"] if "validate: load: " in event["text"]]
        assert len(played) >= 3, played
        assert found["steps"][3]["phase"] == "waiting", "the database is not switched on an unproved side"


@beside_others
async def test_a_freeze_that_is_over_before_the_switch_thaws_and_may_be_had_again(world: World) -> None:
    """A transaction stands in the way of the switch until the freeze has ended by itself: three tries, each
    up to its bound, take longer. Resumed, the rows are verified before the features are frozen again."""
    async with world.cast(online=False) as cast:
        freeze = "  - freeze: [registration]\n    at_most: 3s\n"
        switch = "  - switch: database\n    at_most: 1s\n"
        plan = cast.plan(COPY + freeze + switch, top="features: {registration: [users]}\n")
        async with let_in(cast.pair.source, cast.move):
            await cast.start(plan)
            found = await cast.until("held")
        assert "the freeze of registration ended after 3s" in found["reason"], found["reason"]
        await register(cast.pair.source, "late@example.com")
        await cast.write(cast.pair.source, "served on")
        async with blocking(cast.pair.source):  # the fence cannot close, so that there is time to look
            await cast.ask("resume")
            await until_frozen(cast.pair.source)
        while (await cast.until("finished", "held"))["phase"] == "held":
            await cast.ask("resume")
        await cast.ask("revert")
        await cast.until("reverted")
        assert await leftovers_in(cast.pair.source) == []
        assert await cast.read(cast.pair.source) == "served on"


@beside_others
async def test_a_bound_that_verifying_outlasts_begins_after_it(world: World) -> None:
    """Else such a tenant could never be switched: not with the bound, and not with what is left of it."""
    async with world.cast(online=False) as cast:
        freeze = "  - freeze: [registration]\n    at_most: 10ms\n"
        await cast.start(cast.plan(COPY + freeze + DATABASE, top="features: {registration: [users]}\n"))
        found = await cast.until("finished", "held")
        for _ in range(5):  # what a busy machine gave up
            if found["phase"] == "held":
                await cast.ask("resume")
                found = await cast.until("finished", "held")
        assert found["phase"] == "finished", told(found)
        assert "will be frozen by the switch, after verifying" in found["steps"][1]["text"], told(found)


@beside_others
async def test_a_rehearsal_goes_there_and_back_twice_and_leaves_nothing(world: World) -> None:
    """By the command line: the pool's rows and names as before, its devices on line, its database gone."""
    async with world.cast(pool=True) as cast:
        rehearsal = f"rehearsal_{cast.number}"
        top = (
            f"rehearse: {{tenant: {cast.tenant('pool')}, root: customers.id = 3, database: {rehearsal}}}\n"
            "features: {registration: [users]}\n"
        )
        steps = COPY + "  - freeze: [registration]\n    at_most: 60s\n" + DATABASE
        plan = world.directory / f"{cast.move}.yaml"
        plan.write_text(cast.plan(steps + cast.names(pool=True) + DRAIN, top=top))
        rows, record = await cast.digest(cast.pair.source, 2, 3), await cast.record("pool")
        status, said = await world.command(
            *("migrate", "rehearse", str(plan), "--cycles", "2", "--json"),
            *("--data", str(world.directory / "new")),
        )
        assert status == 0, said
        found = json.loads(said)
        assert found["good"] and [one["problem"] for one in found["cycles"]] == ["", ""]
        assert found["differed"] == {}
        steps_run = [step["name"] for step in found["cycles"][1]["steps"]]
        assert steps_run == [
            *("copy: tenant data", "freeze: registration", "switch: database", "switch: dns", "drain: old")
        ]
        assert await cast.digest(cast.pair.source, 2, 3) == rows
        assert await cast.record("pool") == record
        assert not await databases(cast.pair.source, rehearsal)
        url = {"SOURCE": cast.pair.source}
        status, said = await world.command(
            "tenant", "leftovers", "--from-env", "SOURCE", "--json", environment=url
        )
        assert status == 0 and json.loads(said) in ([], {"items": []}), said
        assert not await cast.stored("new", cast.of("own")), "the tenant's own devices were left alone"
        await until(lambda: all(d.address == OLD_HOST for d in cast.of("pool")), "the pool is back")
        assert all(d.connects > 2 for d in cast.of("pool")), "the pool's devices went there and back"
        assert await cast.lost("own", "pool") == 0


@beside_others
async def test_a_rehearsal_that_is_cut_short_is_taken_back_and_a_changed_plan_is_what_is_rehearsed(
    world: World,
) -> None:
    """Killed, it is taken back by the next; stopped, by itself; the plan is the one in the file."""
    async with world.cast(pool=True, online=False) as cast:
        top = f"rehearse: {{tenant: {cast.tenant('pool')}, root: customers.id = 3}}\n"
        file = world.directory / f"{cast.move}.yaml"
        command = ("migrate", "rehearse", str(file), "--data", str(world.directory / "new"))

        async def rehearsals() -> dict[str, str]:
            answer = await world.call("new", "GET", "/migrations?limit=1000")
            return {
                one["name"]: one["phase"]
                for one in answer["items"]
                if one["name"].startswith(f"{cast.move}-rehearsal-")
            }

        said_to = world.directory / f"{cast.move}.out"

        async def begun(count: int) -> "asyncio.subprocess.Process":
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fleetlift.cli.main", *command, "--cycles", "50"),
                stdout=said_to.open("w"),
                stderr=asyncio.subprocess.STDOUT,
            )
            async with asyncio.timeout(60):
                while len(await rehearsals()) < count:
                    assert process.returncode is None
                    await asyncio.sleep(0.05)
            return process

        file.write_text(cast.plan(COPY + DATABASE.replace("at_most: 5s", "at_most: 6s"), top=top))
        killed = await begun(1)
        killed.kill()
        await killed.wait()
        file.write_text(cast.plan(COPY + DATABASE, top=top))
        stopped = await begun(2)
        stopped.terminate()  # not SIGINT: what a shell runs in the background ignores that
        try:
            async with asyncio.timeout(90):
                assert await stopped.wait() != 0
        except TimeoutError:
            stopped.kill()
            raise AssertionError(said_to.read_text()) from None
        assert set((await rehearsals()).values()) == {"reverted"}
        status, said = await world.command(*command, "--json")
        assert status == 0, said
        assert len(await rehearsals()) == 2
        assert not await databases(cast.pair.source, f"rehearsal_{cast.move.replace('-', '_')}")


@beside_others
async def test_a_check_tells_what_is_wrong_and_a_start_refuses_it(world: World) -> None:
    async with (
        world.cast(online=False) as cast,
        running_postgres(world.directory / "physical", extra={"wal_level": "replica"}) as physical,
    ):
        _, password = without_password(world.server.url)
        await fill_cloud(physical.url, tenants=2, devices=1, values=1)
        conn = await asyncpg.connect(physical.url)
        await conn.execute(f"ALTER ROLE CURRENT_USER PASSWORD '{password}'")
        await conn.close()
        other = without_password(physical.url)[0]
        full = without_password(cast.pair.source)[0].replace("source_", "full_")
        conn = await asyncpg.connect(cast.pair.source)
        name = urlsplit(full).path[1:]
        await conn.execute(f"CREATE DATABASE {name}")
        await conn.close()
        conn = await asyncpg.connect(cast.pair.source.replace("source_", "full_"))
        await conn.execute("CREATE TABLE already (id int)")
        await conn.close()
        good = COPY + DATABASE
        cases = {
            "the source has wal_level = replica": cast.plan(good, source=other),
            "the target has wal_level = replica": cast.plan(good, target=other),
            "the target cannot be reached": cast.plan(good, target="postgresql://fleetlift@127.0.0.1:1/x"),
            "the target has 1 tables already": cast.plan(good, target=full),
            "the scenario 'small.yaml' did not come with the plan": cast.plan(
                COPY + validate("load.errors == 0") + DATABASE
            ),
            "these servers have no weighted records": cast.plan(good + cast.names(waves="[10%, 100%]")),
            "the last one is 10%": cast.plan(good + cast.names(waves="[10%]")),
            "NOT_SET is not set": cast.plan(good).replace("DB_PASSWORD", "NOT_SET"),
        }
        try:
            for problem, plan in cases.items():
                found = await world.call("new", "POST", "/migrations/check", {"plan": plan, "files": {}})
                assert not found["ok"] and any(problem in one for one in found["problems"]), found
                refused = await world.call(
                    "new", "POST", "/migrations", {"plan": plan, "files": {}}, allow=400
                )
                assert problem in refused["detail"], refused
            file = world.directory / "wrong.yaml"
            file.write_text(cases["the target has 1 tables already"])
            for verb, expected in (("check", 1), ("start", 1)):
                data = str(world.directory / "new")
                status, said = await world.command("migrate", verb, str(file), "--data", data)
                assert status in (expected, 2) and "1 tables already" in said, said
        finally:
            conn = await asyncpg.connect(cast.pair.source)
            await conn.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await conn.close()
