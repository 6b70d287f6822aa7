"""Commands over real MQTT, a real log and a real database: each ends in exactly one final state."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from mqtt_device import Device, letting_in, registered, serving, until

from fleetlift.backend import commands
from fleetlift.backend.commands import NewCommand
from fleetlift.backend.context import Context
from fleetlift.core.command import FINAL, Command, Path, PathStatus, Status, uuid7
from fleetlift.core.errors import BadInput, Conflict, NotFound
from fleetlift.core.orders import PROBE_COMMAND
from fleetlift.edge import presence
from fleetlift.store import commands as store


async def eventually(
    ctx: Context, command: str, holds: Callable[[Command], bool], within_s: float = 15.0
) -> Command:
    """The command once `holds` of it."""
    deadline = time.monotonic() + within_s
    while True:
        found = await commands.get_command(ctx, command)
        if holds(found):
            return found
        assert time.monotonic() < deadline, f"it stayed {found}"
        await asyncio.sleep(0.02)


def ended(command: Command) -> bool:
    return command.status in FINAL and all(path.ended_at is not None for path in command.paths)


async def route(ctx: Context, device: str, flag: str) -> None:
    async with ctx.pool.acquire() as conn:
        await conn.execute(
            """INSERT INTO device_route (device, epoch, migration, telemetry, commands, link)
               VALUES ($1, 1, 'm', 'both', $2, 'both')
               ON CONFLICT (device) DO UPDATE SET commands = EXCLUDED.commands""",
            device,
            flag,
        )


class Car:
    """A device that executes each command id once, as the agent does, and counts what it did."""

    def __init__(self, ctx: Context, name: str, *, clean: bool = True, silent: bool = False) -> None:
        self.name = name
        self.silent = silent
        self.mqtt = Device(ctx.settings, name, clean=clean)
        self.executed: list[str] = []
        self.copies: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self._seen: set[str] = set()
        self.mqtt.on_json = self._on_request

    async def connect(self) -> "Car":
        await self.mqtt.connect()
        await self.mqtt.subscribe(
            f"$aws/commands/things/{self.name}/executions/+/request/json",
            f"$aws/commands/things/{self.name}/executions/+/response/accepted/json",
            f"$aws/commands/things/{self.name}/executions/+/response/rejected/json",
        )
        return self

    def _on_request(self, topic: str, body: Any) -> None:
        if not topic.endswith("/request/json"):
            return
        command = topic.split("/")[5]
        self.copies.append(command)
        self.requests.append(body)
        if self.silent:
            return
        if command in self._seen:
            self.answer(command, "REJECTED", "DUPLICATE")
            return
        self._seen.add(command)
        if body["mode"] == "dry-run":
            self.answer(command, "SUCCEEDED", "WOULD_EXECUTE")
            return
        self.answer(command, "IN_PROGRESS")
        self.executed.append(command)
        self.answer(command, "SUCCEEDED", result={"did": body["name"]})

    def answer(
        self, command: str, status: str, code: str = "", result: dict[str, Any] | None = None, qos: int = 1
    ) -> None:
        body: dict[str, Any] = {"status": status}
        if code:
            body["statusReason"] = {"reasonCode": code}
        if result is not None:
            body["result"] = result
        self.mqtt.publish_json(
            f"$aws/commands/things/{self.name}/executions/{command}/response/json", body, qos
        )

    def close(self) -> None:
        self.mqtt.close()


@contextlib.asynccontextmanager
async def car(ctx: Context, name: str, **options: Any) -> AsyncIterator[Car]:
    made = await Car(ctx, name, **options).connect()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
async def signing_in(ctx: Context) -> AsyncIterator[None]:
    """Devices are let in by the service that lets devices in."""
    async with letting_in(ctx):
        yield


@pytest.fixture
async def service(ctx: Context) -> AsyncIterator[None]:
    async with serving(ctx, commands.run):
        yield


async def test_a_command_is_sent_executed_and_answered(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1") as one:
        made = await commands.create_command(ctx, "car-1", "lock", {"door": "left"}, 30, "execute", "ann")
        assert made.status is Status.QUEUED
        done = await eventually(ctx, made.id, ended)
        assert done.status is Status.SUCCEEDED
        assert (done.device, done.tenant, done.name, done.params, done.created_by) == (
            "car-1",
            "t1",
            "lock",
            {"door": "left"},
            "ann",
        )
        (path,) = done.paths
        assert (path.path, path.status, path.attempts) == (Path.NEW, PathStatus.SUCCEEDED, 1)
        assert path.detail == {"result": {"did": "lock"}}
        assert path.latency_s is not None and 0 <= path.latency_s < 5
        assert path.ack_latency_s is not None and path.ack_latency_s <= path.latency_s
        assert one.requests == [
            {
                "name": "lock",
                "params": {"door": "left"},
                "mode": "execute",
                "expires_at": pytest.approx(made.expires_at),
            }
        ]
        assert await one.mqtt.receive("response/accepted/json") == {"executionId": made.id}


async def test_a_caller_s_dry_run_executes_nothing(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1") as one:
        made = await commands.create_command(ctx, "car-1", "lock", mode="dry-run")
        done = await eventually(ctx, made.id, ended)
        assert done.status is Status.WOULD_EXECUTE
        assert one.executed == []


async def test_a_failure_keeps_the_device_s_reason(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "unlock")
        await eventually(ctx, made.id, lambda command: command.status is Status.SENT)
        one.answer(made.id, "FAILED", "DOOR_OPEN", qos=0)
        done = await eventually(ctx, made.id, ended)
        assert done.status is Status.FAILED
        assert done.paths[0].detail["reasonCode"] == "DOOR_OPEN"


async def test_a_silent_device_s_command_expires_and_a_late_answer_changes_nothing(
    service: None, ctx: Context
) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=1.0)
        await asyncio.sleep(max(0.0, made.expires_at - time.time()))
        await commands.close_expired(ctx, grace_s=0.0)
        done = await commands.get_command(ctx, made.id)
        assert (done.status, done.paths[0].status) == (Status.EXPIRED, PathStatus.EXPIRED)
        assert done.ended_at is not None and done.ended_at >= done.expires_at
        one.answer(made.id, "SUCCEEDED")
        rejected = await one.mqtt.receive("response/rejected/json")
        assert (rejected["error"], rejected["executionId"]) == ("TerminalStateReached", made.id)
        late = await commands.get_command(ctx, made.id)
        assert (late.status, late.ended_at) == (Status.EXPIRED, done.ended_at)
        assert late.paths[0].detail["late"]["status"] == "succeeded"  # type: ignore[index,call-overload]


async def test_an_answer_that_waits_for_its_reader_is_read_before_its_command_is_closed(ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", silent=True) as one:
        first = await commands.create_command(ctx, "car-1", "lock")
        async with serving(ctx, commands.run):  # the reader stands somewhere in this log
            one.answer(first.id, "SUCCEEDED")
            await eventually(ctx, first.id, ended)
        made, silent = await commands.create_commands(
            ctx, [NewCommand(device="car-1", name=name, expires_in_s=1.0) for name in ("lock", "open")]
        )
        await one.mqtt.publish(
            f"$aws/commands/things/car-1/executions/{made.id}/response/json", {"status": "SUCCEEDED"}
        )
        await asyncio.sleep(1.1)
        assert await commands.close_expired(ctx, grace_s=0.0) == 0
        assert (await commands.get_command(ctx, made.id)).status is Status.QUEUED
        async with serving(ctx, commands.run):
            assert (await eventually(ctx, made.id, ended)).status is Status.SUCCEEDED
        assert await commands.close_expired(ctx, grace_s=0.0) == 1
        assert (await commands.get_command(ctx, silent.id)).status is Status.EXPIRED


async def test_an_answer_is_recorded_once_however_often_it_comes(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "lock")
        await eventually(ctx, made.id, lambda command: command.status is Status.SENT)
        for _ in range(3):
            one.answer(made.id, "SUCCEEDED", result={"n": 1})
        await one.mqtt.receive("response/accepted/json", count=3)
        done = await commands.get_command(ctx, made.id)
        one.answer(made.id, "FAILED")
        await one.mqtt.receive("response/rejected/json")
        again = await commands.get_command(ctx, made.id)
        assert (
            (again.status, again.ended_at)
            == (done.status, done.ended_at)
            == (Status.SUCCEEDED, done.ended_at)
        )


async def test_a_device_cannot_answer_for_another(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1", "car-2")
    async with car(ctx, "car-1", silent=True), car(ctx, "car-2") as other:
        made = await commands.create_command(ctx, "car-1", "lock")
        other.answer(made.id, "SUCCEEDED")
        assert (await other.mqtt.receive("response/rejected/json"))["error"] == "ResourceNotFound"
        other.answer("not-a-uuid", "SUCCEEDED")
        await other.mqtt.receive("response/rejected/json", count=2)
        other.answer(made.id, "DONE")
        assert (await other.mqtt.receive("response/rejected/json", count=3))["error"] == "InvalidRequest"
        assert (await commands.get_command(ctx, made.id)).status in (Status.QUEUED, Status.SENT)


async def test_a_device_that_was_away_gets_its_command_when_it_comes_back(ctx: Context) -> None:
    """With a persistent session from the queue; without one by the copy that its connection brings about."""
    await registered(ctx, "kept", "fresh")
    async with serving(ctx, commands.run, presence.run):
        for name, clean in (("kept", False), ("fresh", True)):
            async with car(ctx, name, clean=clean):
                pass
            made = await commands.create_command(ctx, name, "lock", expires_in_s=60)
            await eventually(ctx, made.id, lambda command: command.status is Status.SENT)
            async with car(ctx, name, clean=clean) as one:
                done = await eventually(ctx, made.id, ended)
                assert done.status is Status.SUCCEEDED
                assert one.executed == [made.id]


async def test_a_connected_device_that_misses_a_copy_gets_another_and_executes_once(ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with serving(ctx, commands.run), car(ctx, "car-1", silent=True) as one:
        async with ctx.pool.acquire() as conn:
            await conn.execute(
                "INSERT INTO presence (device, connected, since) VALUES ('car-1', true, now())"
            )
        made = await commands.create_command(ctx, "car-1", "lock")
        await until(lambda: one.copies or None, what="the first copy")
        one.silent = False
        done = await eventually(ctx, made.id, ended)
        assert done.paths[0].attempts == 2
        assert one.executed == [made.id]
        assert done.status is Status.SUCCEEDED


@pytest.mark.parametrize(
    ("flag", "paths"),
    [
        ("old", [(Path.OLD, "execute")]),
        ("dry-run", [(Path.OLD, "execute"), (Path.NEW, "dry-run")]),
        ("both", [(Path.OLD, "execute"), (Path.NEW, "execute")]),
        ("new", [(Path.NEW, "execute")]),
    ],
)
async def test_the_migration_s_route_names_the_paths(
    ctx: Context, flag: str, paths: list[tuple[Path, str]]
) -> None:
    await registered(ctx, "car-1")
    await route(ctx, "car-1", flag)
    made = await commands.create_command(ctx, "car-1", "lock")
    stored = await commands.get_command(ctx, made.id)
    assert stored == made
    assert [(path.path, path.mode) for path in stored.paths] == paths
    probe = await commands.create_command(ctx, "car-1", PROBE_COMMAND)
    assert [(path.path, path.mode) for path in probe.paths] == [(Path.NEW, "execute")]


@pytest.mark.parametrize("old_first", [True, False])
async def test_by_both_paths_a_command_succeeds_once(service: None, ctx: Context, old_first: bool) -> None:
    """The old side's answer comes by `record_answer`, in either order with the new side's."""
    await registered(ctx, "car-1")
    await route(ctx, "car-1", "both")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "lock")
        await eventually(ctx, made.id, lambda c: c.paths[1].status is PathStatus.SENT)

        async def by_old(status: str) -> bool:
            async with ctx.pool.acquire() as conn, conn.transaction():
                return await store.record_answer(conn, made.id, "old", status, {"raw": 1}, time.time())

        if old_first:
            assert await by_old("succeeded")
            one.answer(made.id, "REJECTED", "DUPLICATE")
        else:
            one.answer(made.id, "REJECTED", "DUPLICATE")
            await eventually(ctx, made.id, lambda c: c.paths[1].status is PathStatus.DUPLICATE)
            assert (await commands.get_command(ctx, made.id)).status is Status.ACKNOWLEDGED
            assert await by_old("succeeded")
        done = await eventually(ctx, made.id, ended)
        assert done.status is Status.SUCCEEDED
        assert [path.status for path in done.paths] == [PathStatus.SUCCEEDED, PathStatus.DUPLICATE]
        assert not await by_old("succeeded")


async def test_an_old_path_s_answer_that_cannot_be_is_refused(ctx: Context) -> None:
    await registered(ctx, "car-1")
    made = await commands.create_command(ctx, "car-1", "lock")
    async with ctx.pool.acquire() as conn:
        for command in (uuid7(time.time(), 1), "nonsense"):
            with pytest.raises(NotFound):
                await store.record_answer(conn, command, "new", "succeeded", {}, time.time())
        with pytest.raises(NotFound, match="does not go by path old"):
            await store.record_answer(conn, made.id, "old", "succeeded", {}, time.time())
        with pytest.raises(BadInput, match="no-such-status"):
            await store.record_answer(conn, made.id, "new", "no-such-status", {}, time.time())


async def test_many_commands_with_interruptions_each_end_once(ctx: Context) -> None:
    """The worker is cancelled again and again; every command is executed once and ends as succeeded."""
    names = [f"car-{n}" for n in range(4)]
    await registered(ctx, *names)
    async with contextlib.AsyncExitStack() as stack:
        cars = [await stack.enter_async_context(car(ctx, name)) for name in names]
        made: list[str] = []

        async def create() -> None:
            for n in range(25):
                new = [NewCommand(device=name, name=f"lock-{n}") for name in names]
                made.extend(command.id for command in await commands.create_commands(ctx, new))
                await asyncio.sleep(0.02)

        creating = asyncio.create_task(create())
        for _ in range(5):
            async with serving(ctx, commands.run):
                await asyncio.sleep(0.15)
        await creating
        async with ctx.pool.acquire() as conn:
            await conn.executemany(
                "INSERT INTO presence (device, connected, since) VALUES ($1, true, now())",
                [(n,) for n in names],
            )
        async with serving(ctx, commands.run):
            for command in made:
                done = await eventually(ctx, command, ended)
                assert done.status is Status.SUCCEEDED
        executed = [command for one in cars for command in one.executed]
        assert sorted(executed) == sorted(made)


async def test_every_command_ends_by_expiry_and_grace_whatever_its_device_does(ctx: Context) -> None:
    """Answered, silent, unreachable by the old side, never connected: one final state each, for good."""
    names = ["good", "silent", "away", "old-only", "two-ways"]
    await registered(ctx, *names)
    await route(ctx, "old-only", "old")
    await route(ctx, "two-ways", "both")
    async with serving(ctx, commands.run), car(ctx, "good"), car(ctx, "silent", silent=True):
        made = {
            c.device: c.id
            for c in await commands.create_commands(
                ctx, [NewCommand(device=name, name="lock", expires_in_s=1.5) for name in names]
            )
        }
        async with ctx.pool.acquire() as conn, conn.transaction():
            await store.record_answer(conn, made["two-ways"], "old", "unreachable", {}, time.time())
        final = {name: await eventually(ctx, command, ended, within_s=12.0) for name, command in made.items()}
    statuses = {name: command.status for name, command in final.items()}
    assert statuses == {
        "good": Status.SUCCEEDED,
        "silent": Status.EXPIRED,
        "away": Status.EXPIRED,
        "old-only": Status.EXPIRED,
        "two-ways": Status.EXPIRED,
    }
    assert await commands.close_expired(ctx, grace_s=0.0) == 0
    for name, command in made.items():
        assert await commands.get_command(ctx, command) == final[name]


async def test_what_cannot_be_a_command_is_refused(ctx: Context) -> None:
    await registered(ctx, "car-1")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"device": "nobody"}, NotFound, "does not exist"),
        ({"device": "a b"}, BadInput, "device id"),
        ({"name": "-x"}, BadInput, "command name"),
        ({"params": {"a": "x" * 70_000}}, BadInput, "at most 65536"),
        ({"params": {"a": "\x00"}}, BadInput, "NUL"),
        ({"expires_in_s": 0.2}, BadInput, "expires_in"),
        ({"expires_in_s": 8 * 86400}, BadInput, "expires_in"),
        ({"mode": "maybe"}, BadInput, "execute or dry-run"),
        ({"id": "17"}, BadInput, "use a UUID"),
    ]
    for change, error, says in wrong:
        given: dict[str, Any] = {"device": "car-1", "name": "lock", **change}
        with pytest.raises(error, match=says):
            await commands.create_command(ctx, **given)
    with pytest.raises(NotFound):
        await commands.get_command(ctx, "nonsense")


async def test_an_id_of_one_s_own_makes_creation_repeatable(ctx: Context) -> None:
    await registered(ctx, "car-1", "car-2")
    own = uuid7(time.time(), 42)
    first = await commands.create_command(ctx, "car-1", "lock", {"a": 1}, id=own)
    again = await commands.create_command(ctx, "car-1", "lock", {"a": 1}, id=own)
    assert again == first and first.id == own
    with pytest.raises(Conflict, match="taken by another"):
        await commands.create_command(ctx, "car-2", "lock", id=own)


async def test_commands_asked_for_at_once_are_queued_together_and_fail_each_alone(ctx: Context) -> None:
    """One transaction for those that gather while another is under way; an error is only its asker's."""
    await registered(ctx, "lamp")
    intake = commands.Intake(ctx)
    own_id = "0190d1d8-0000-7000-8000-000000000001"

    def asked(tenant: str | None = None, **fields: Any) -> commands.Asked:
        return commands.Asked(
            commands.NewCommand(**{"device": "lamp", "name": "blink", **fields}), "me", tenant
        )

    wanted = [
        *(asked(params={"n": n}) for n in range(30)),
        asked(device="nobody"),
        asked(tenant="another"),
        asked(tenant="t1", params={"n": "own tenant"}),
        asked(id=own_id),
        asked(id=own_id, name="other"),
        asked(params={"text": "a null character \x00 cannot be stored"}),
    ]
    results = await asyncio.gather(*(intake.create(one) for one in wanted), return_exceptions=True)
    made = [one for one in results if isinstance(one, Command)]
    assert [one.params.get("n") for one in made] == [*range(30), "own tenant", None]
    others = [(type(one).__name__, str(one)) for one in results if not isinstance(one, Command)]
    assert [name for name, _ in others] == ["NotFound", "NotFound", "Conflict", "BadInput"], others
    assert len({one.id for one in made}) == 32
    async with ctx.pool.acquire() as conn:
        stored = await store.get_many(conn, [one.id for one in made])
        assert stored == {one.id: one for one in made}
        together = await conn.fetchval("SELECT count(DISTINCT xmin::text) FROM command")
    assert together <= 32
    with pytest.raises(BadInput):
        await intake.create(asked(name=""))
    await asyncio.gather(*(intake.create(asked()) for _ in range(50)))
    async with ctx.pool.acquire() as conn:
        last = await conn.fetch("SELECT xmin::text FROM command ORDER BY id DESC LIMIT 50")
    assert len({row["xmin"] for row in last}) <= 2


async def test_a_device_s_commands_are_listed_newest_first_in_pages(ctx: Context) -> None:
    await registered(ctx, "car-1")
    made = []
    for n in range(5):
        made.append((await commands.create_command(ctx, "car-1", f"c{n}")).id)
        await asyncio.sleep(0.002)  # ids made within one millisecond have no order
    page = await commands.list_commands(ctx, "car-1", limit=3)
    rest = await commands.list_commands(ctx, "car-1", limit=3, after=page.next)
    assert [command.id for command in (*page.items, *rest.items)] == made[::-1]
    assert rest.next is None
    with pytest.raises(BadInput, match="cursor"):
        await commands.list_commands(ctx, "car-1", after="nonsense")


async def test_the_service_ends_when_told_to_stop(ctx: Context) -> None:
    async def work() -> None:
        await commands.run(ctx)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.2)
    ctx.stop.set()
    await asyncio.wait_for(task, 5.0)
