"""Who may do what over HTTP: every route of the application, by every kind of caller, cell by cell.

And non-interference: whatever happens to tenant B's things, tenant A reads the same bytes.
"""

import contextlib
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import asyncpg
import httpx
import pytest
import pytest_asyncio

from fleetlift.api.app import make_app
from fleetlift.backend import registry
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.core.migration import AuditEntry, Member, MemberState, MigrationState, Phase
from fleetlift.core.telemetry import Telemetry, dead_letter
from fleetlift.core.timeline import TimelinePoint
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer
from fleetlift.store import engine, ledger, telemetry
from fleetlift.testing import RunningBackend, scratch_directory

pytestmark = pytest.mark.asyncio(loop_scope="module")

V1 = "/api/v1"
ROLES = ("viewer", "operator", "admin")
CALLERS = ("nobody", "wrong", "revoked", *(f"{role}@{of}" for of in ("a", "b", "every") for role in ROLES))
OUTCOMES = {".": (200, 201, 202, 204), "u": (401,), "f": (403,), "n": (404,), "c": (409,), "b": (400,)}

# What comes of each route. Columns: no token, wrong, revoked | viewer, operator, admin of tenant A, whose the
# things named are | the same of tenant B | the same of every tenant.
# `.` done, u 401 (sign in), f 403 (not this role), n 404 (not there for you), c 409 (another's id), b 400.
OPEN = "... ... ... ..."
READ = "uuu ... nnn ..."  # one of A's things
LIST = "uuu ... ... ..."  # shows the caller's own
ACT = "uuu f.. fnn f.."
MANAGE = "uuu ff. ffn ff."
ENGINE = "uuu fff fff f.."  # brings a plan: tokens of every tenant only
MATRIX: dict[str, str] = {
    "GET /healthz": OPEN,
    "GET /readyz": OPEN,
    "GET /metrics": LIST,
    "GET /api/openapi.json": LIST,
    f"GET {V1}/devices": LIST,
    f"GET {V1}/devices?tenant=a": LIST,
    f"GET {V1}/devices/{{device}}": READ,
    f"PUT {V1}/devices/{{device}}": "uuu ff. ffc ffb",
    f"PUT {V1}/devices/{{device}} for a": "uuu ff. fff ff.",
    f"PUT {V1}/devices/{{device}} for b": "uuu fff ffc ffc",
    f"DELETE {V1}/devices/{{device}}": MANAGE,
    f"GET {V1}/devices/{{device}}/telemetry": READ,
    f"GET {V1}/devices/{{device}}/telemetry/latest": READ,
    f"GET {V1}/devices/{{device}}/ledger": READ,
    f"GET {V1}/devices/{{device}}/commands": READ,
    f"POST {V1}/devices/{{device}}/commands": ACT,
    f"GET {V1}/devices/{{device}}/shadow": READ,
    f"PATCH {V1}/devices/{{device}}/shadow": ACT,
    f"PATCH {V1}/devices/{{device}}/shadow?name=fleetlift": "uuu fff fnn f..",
    f"DELETE {V1}/devices/{{device}}/shadow": ACT,
    f"GET {V1}/devices/{{device}}/shadows": READ,
    f"GET {V1}/dead-letters": LIST,
    f"GET {V1}/dead-letters?device=a-1": LIST,
    f"GET {V1}/commands/{{command}}": READ,
    f"GET {V1}/migrations": LIST,
    f"POST {V1}/migrations": ENGINE,
    f"POST {V1}/migrations/check": ENGINE,
    f"GET {V1}/migrations/{{name}}": READ,
    f"GET {V1}/migrations/{{name}}/plan": READ,
    f"GET {V1}/migrations/{{name}}/report": READ,
    f"GET {V1}/migrations/{{name}}/parity": READ,
    f"GET {V1}/migrations/{{name}}/certificate": READ,
    f"GET {V1}/migrations/{{name}}/devices": READ,
    f"GET {V1}/migrations/{{name}}/events": READ,
    f"POST {V1}/migrations/{{name}}/pause": ACT,
    f"POST {V1}/migrations/{{name}}/resume": ACT,
    f"POST {V1}/migrations/{{name}}/approve": ACT,
    f"POST {V1}/migrations/{{name}}/revert": ACT,
    f"POST {V1}/migrations/{{name}}/release": ACT,
    f"POST {V1}/migrations/{{name}}/amend": ENGINE,
    f"GET {V1}/tenants": LIST,
    f"POST {V1}/tenants": "uuu fff fff ff.",
    f"GET {V1}/tokens": "uuu ff. ff. ff.",
    f"POST {V1}/tokens": "uuu ff. ff. ff.",
    f"POST {V1}/tokens for a": "uuu ff. fff ff.",
    f"DELETE {V1}/tokens/{{token}}": MANAGE,
}
PLAN = """
migration: {name}
fleet: {{tenant: {tenant}, where: 'id == "{tenant}"'}}
from: {{legacy: "{url}", key_file: "{key_file}"}}
to: {{fleetlift: default}}
steps: [{{move: telemetry, waves: [100%], bake: 1s}}]
"""


class World:
    """A whole backend with two tenants who have the like of everything, and a client for every caller."""

    def __init__(self, backend: RunningBackend, legacy: LegacyServer, key_file: str) -> None:
        self.backend, self.legacy, self.key_file = backend, legacy, key_file
        self.clients: dict[str, httpx.AsyncClient] = {}
        self.commands: dict[str, str] = {}
        self.conn: asyncpg.Connection[Any]
        self._numbers = itertools.count()

    def plan(self, name: str, tenant: str) -> str:
        return PLAN.format(name=name, tenant=tenant, url=self.legacy.url, key_file=self.key_file)

    async def ask(self, who: str, method: str, path: str, body: Any = None) -> httpx.Response:
        content = None if body is None else json.dumps(body).encode()
        return await self.clients[who].request(method, path, content=content)

    async def as_admin(self, method: str, path: str, body: Any = None) -> Any:
        answer = await self.ask("admin@every", method, f"{V1}{path}", body)
        assert answer.status_code < 300, answer.text
        return answer.json() if answer.content else None

    async def furnish(self, tenant: str) -> None:
        """A tenant with devices, messages, commands, shadows, letters and a migration that has ended."""
        one, two = f"{tenant}-1", f"{tenant}-2"
        await self.as_admin("POST", "/tenants", {"id": tenant, "name": f"tenant {tenant}"})
        for device in (one, two):
            await self.as_admin(
                "PUT",
                f"/devices/{device}",
                {"tenant": tenant, "attributes": {"hardware": 3, "colour": f"colour-of-{tenant}"}},
            )
        await self.store_messages(tenant, 1, 4)
        sent = await self.as_admin(
            "POST", f"/devices/{one}/commands", {"name": f"wink-{tenant}", "expires_in": 86_400}
        )
        self.commands[tenant] = sent["id"]
        shadow = {"state": {"desired": {f"wish-{tenant}": 1}}}
        for query in ("", "?name=cabin"):
            await self.as_admin("PATCH", f"/devices/{one}/shadow{query}", shadow)
        name = f"move-{tenant}"
        members = {
            device: Member(device=device, rank=rank, rung=1, epoch=7, state=MemberState.MOVED, wave=0)
            for rank, device in enumerate((one, two))
        }
        state = MigrationState(name=name, epoch=7, phase=Phase.RELEASED, members=members)
        await engine.create(
            self.conn,
            tenant=tenant,
            plan=self.plan(name, tenant),
            state=state,
            audit=[AuditEntry(kind="migration_started", text=f"started for {tenant}", evidence={"n": 2})],
            created_by=f"someone of {tenant}",
            now=time.time() - 60,
        )
        await engine.add_sample(
            self.conn,
            name,
            time.time() - 30,
            TimelinePoint(
                phase="released",
                rung=1,
                wave=0,
                wave_phase="baking",
                devices_old=0,
                devices_both=0,
                devices_new=2,
                rate_old=0.0,
                rate_new=5.0,
            ),
        )

    async def store_messages(self, tenant: str, first: int, last: int) -> None:
        """Messages `first` to `last` of the tenant's first device, and a letter for each."""
        device, now = f"{tenant}-1", time.time()
        rows = [
            Telemetry(device, "status", 1_000_000 + n, n, f'{{"of":"{tenant}","seq":{n}}}', "mqtt", now)
            for n in range(first, last)
        ]
        letters = [
            dead_letter(f"dt/{device}/x", device, "mqtt", f"bad thing of {tenant}", b"?", now) for _ in rows
        ]
        async with self.conn.transaction():
            await telemetry.insert(self.conn, rows)
            await telemetry.insert_dead_letters(self.conn, letters)
            await self.conn.execute(
                """INSERT INTO ledger (device, channel, path, ranges, received, first_at, last_at)
                   VALUES ($1, 'status', 'mqtt', $2::text::int8multirange, $3, now(), now())
                   ON CONFLICT (device, channel, path) DO UPDATE SET ranges = excluded.ranges,
                       received = excluded.received""",
                device,
                f"{{[1,{last})}}",
                last - 1,
            )

    async def fresh(self, what: str) -> tuple[dict[str, str], Any]:
        """What a cell of `what` names, things of tenant A (new ones where they may go), and its body."""
        n = next(self._numbers)
        named = {"device": "a-1", "command": self.commands["a"], "name": "move-a", "token": ""}
        body: Any = None
        match what:
            case s if s.startswith(f"DELETE {V1}/devices/{{device}}") and "shadow" not in s:
                named["device"] = f"a-doomed-{n}"
                await self.as_admin("PUT", f"/devices/{named['device']}", {"tenant": "a"})
            case s if s.startswith(f"PUT {V1}/devices"):
                named["device"] = f"a-put-{n}"
                await self.as_admin("PUT", f"/devices/{named['device']}", {"tenant": "a"})
                body = {"attributes": {"n": n}}
                if " for " in what:
                    body["tenant"] = what[-1]
            case s if s.endswith("/commands") and s.startswith("POST"):
                body = {"name": "lock", "expires_in": 1}
            case s if s.startswith("PATCH"):
                body = {"state": {"desired": {"n": n}}}
            case s if s == f"DELETE {V1}/devices/{{device}}/shadow":
                named["device"] = f"a-shadow-{n}"
                await self.as_admin("PUT", f"/devices/{named['device']}", {"tenant": "a"})
                await self.as_admin(
                    "PATCH", f"/devices/{named['device']}/shadow", {"state": {"desired": {"n": n}}}
                )
            case s if s in (f"POST {V1}/migrations", f"POST {V1}/migrations/check"):
                await self.legacy.register([DeviceSeed(f"c-{n}", "not-a-real-key-of-a-device", {})])
                body = {"plan": self.plan(f"new-{n}", f"c-{n}")}
            case s if s.endswith("/amend"):
                body = {"plan": self.plan("move-a", "a")}
            case s if s == f"POST {V1}/tenants":
                body = {"id": f"t-{n}"}
            case s if s.startswith(f"POST {V1}/tokens"):
                body = {"name": "made", "role": "viewer", **({"tenant": "a"} if " for " in what else {})}
            case s if s.startswith(f"DELETE {V1}/tokens"):
                made = await self.as_admin("POST", "/tokens", {"name": "x", "role": "viewer", "tenant": "a"})
                named["token"] = made["id"]
        return named, body


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(backend: RunningBackend) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(scratch_directory())
        legacy = await stack.enter_async_context(LegacyServer(directory / "legacy"))
        key_file = directory / "owner.key"
        key_file.write_text(legacy.owner_key)
        made = World(backend, legacy, str(key_file))
        made.conn = await asyncpg.connect(backend.settings.database_url)
        stack.push_async_callback(made.conn.close)

        async def client(who: str, token: str | None) -> None:
            headers = {} if token is None else {"authorization": f"Bearer {token}"}
            made.clients[who] = await stack.enter_async_context(
                httpx.AsyncClient(base_url=backend.url, headers=headers, trust_env=False, timeout=20)
            )

        await client("nobody", None)
        await client("wrong", "flt_" + "0" * 16 + "_" + "x" * 43)
        await client("admin@every", backend.token)
        for tenant in ("a", "b"):
            await made.furnish(tenant)
        for owner, role in itertools.product(("a", "b", "every"), ROLES):
            body = {"name": f"{role} of {owner}", "role": role}
            if owner != "every":
                body["tenant"] = owner
            token = await made.as_admin("POST", "/tokens", body)
            if (owner, role) != ("every", "admin"):
                await client(f"{role}@{owner}", token["token"])
        spent = await made.as_admin("POST", "/tokens", {"name": "spent", "role": "admin"})
        await made.as_admin("DELETE", f"/tokens/{spent['id']}")
        await client("revoked", spent["token"])
        yield made


def routes() -> set[str]:
    """Every method and path that the application answers, as `METHOD /path/{parameter}`."""
    typed = re.compile(r"{(\w+):\w+}")
    return {
        method + " " + typed.sub(r"{\1}", route.path)
        for route in make_app(cast(Any, None)).routes
        for method in cast(Any, route).methods
        if method != "OPTIONS"
    }


def plain(what: str) -> str:
    """A row of the matrix without its query and variant."""
    return re.sub(r"\?\S*| for \w+$", "", what)


async def test_every_route_has_its_row() -> None:
    """A new endpoint says here who may call it, or this fails."""
    assert {plain(what) for what in MATRIX} == routes()


@pytest.mark.parametrize("what", MATRIX)
async def test_each_caller_may_do_exactly_what_the_matrix_says(world: World, what: str) -> None:
    expected = MATRIX[what].replace(" ", "")
    assert len(expected) == len(CALLERS)
    method, path = what.partition(" for ")[0].split(" ", 1)
    for who, outcome in zip(CALLERS, expected, strict=True):
        named, body = await world.fresh(what)
        answer = await world.ask(who, method, path.format(**named), body)
        assert answer.status_code in OUTCOMES[outcome], f"{who}: {answer.status_code} {answer.text}"
        if outcome != ".":
            assert answer.headers["content-type"].startswith("application/problem+json")
            for marker in ("colour-of-a", "wink-a", "wish-a", "bad thing of a", "someone of a"):
                assert marker not in answer.text, f"{who} reads {marker}"
        if answer.headers.get("content-type", "").startswith("application/json"):
            assert "x-content-type-options" in answer.headers


async def test_the_methods_that_nobody_wrote_down_are_no_side_door(world: World) -> None:
    """OPTIONS and HEAD of every path need a token as well, and change nothing."""
    for path in sorted({plain(what).split(" ", 1)[1] for what in MATRIX}):
        for who in ("nobody", "wrong", "revoked"):
            assert (await world.ask(who, "OPTIONS", path)).status_code == 401, path
        answer = await world.ask("admin@b", "OPTIONS", path)
        assert answer.status_code == 204 and not answer.content, path
        for who in ("nobody", "admin@b"):
            assert (await world.ask(who, "HEAD", path)).status_code in (401, 405), path


# -- nothing of B in what A sees ---------------------------------------------------------------------------

SEEN_BY_A = [
    "/metrics",
    "/api/openapi.json",
    *(
        f"{V1}{path}"
        for path in (
            "/devices",
            "/devices?limit=1",
            "/devices?tenant=b",
            '/devices?where=attributes.colour == "colour-of-b"',
            "/devices?where=exists(attributes.hardware)",
            '/devices?where=id == "b-1" or tenant == "b"',
            "/devices?where=not connected",
            "/devices/a-1",
            "/devices/b-1",
            "/devices/a-1/telemetry",
            "/devices/a-1/telemetry?order=newest&limit=2",
            "/devices/b-1/telemetry",
            "/devices/a-1/telemetry/latest",
            "/devices/b-1/telemetry/latest",
            "/devices/a-1/ledger",
            "/devices/b-1/ledger",
            "/devices/a-1/commands",
            "/devices/b-1/commands",
            "/devices/a-1/shadow",
            "/devices/a-1/shadow?name=cabin",
            "/devices/b-1/shadow",
            "/devices/b-1/shadow?name=cabin",
            "/devices/a-1/shadows",
            "/devices/b-1/shadows",
            "/dead-letters",
            "/dead-letters?device=b-1",
            "/commands/{a}",
            "/commands/{b}",
            "/migrations",
            "/migrations?limit=1",
            "/migrations/move-a",
            "/migrations/move-b",
            "/migrations/move-a/plan",
            "/migrations/move-b/plan",
            "/migrations/move-a/report",
            "/migrations/move-a/parity",
            "/migrations/move-b/report",
            "/migrations/move-a/parity",
            "/migrations/move-b/parity",
            "/migrations/move-b/certificate",
            "/migrations/move-a/devices",
            "/migrations/move-b/devices",
            "/migrations/move-a/events",
            "/migrations/move-b/events",
            "/tenants",
            "/tokens",
        )
    ),
]
CLOCKS = re.compile(rb'"(now|controller_seen_at)":[^,}]*|,"timestamp":\d+}$')


async def answers(world: World, who: str) -> dict[str, bytes]:
    """Everything that `who` can read, byte by byte; of what carries the time of asking, all but that."""
    seen = {}
    for path in SEEN_BY_A:
        answer = await world.ask(who, "GET", path.format(**world.commands))
        assert answer.status_code in (200, 403, 404), (path, answer.text)
        seen[path] = str(answer.status_code).encode() + b" " + CLOCKS.sub(b"", answer.content)
    async with world.clients[who].stream(
        "GET", f"{V1}/migrations/move-a/events", headers={"accept": "text/event-stream"}
    ) as stream:
        async for chunk in stream.aiter_bytes():
            seen["stream"] = chunk
            break
    for refused in ("/devices/b-1/commands", "/migrations/move-b/pause", "/migrations/move-b/revert"):
        answer = await world.ask(
            who, "POST", f"{V1}{refused}", {"name": "x"} if "commands" in refused else None
        )
        seen[f"POST {refused}"] = answer.content
    return seen


async def change_everything_of_b(world: World) -> None:
    """Devices, messages, letters, commands, shadows, tokens, migrations: more of them, others, fewer."""
    admin: Callable[..., Any] = world.as_admin
    await world.store_messages("b", 4, 40)
    for n in range(3, 9):
        await admin("PUT", f"/devices/b-{n}", {"tenant": "b", "attributes": {"hardware": n}})
    await admin("PUT", "/devices/b-1", {"tenant": "b", "attributes": {"colour": "another"}})
    await admin("DELETE", "/devices/b-2")
    for _ in range(3):
        await admin("POST", "/devices/b-1/commands", {"name": "wink-b-again"})
    await admin("DELETE", "/devices/b-1/shadow?name=cabin")
    await admin("PATCH", "/devices/b-1/shadow?name=boot", {"state": {"desired": {"open": True}}})
    await admin("POST", "/tokens", {"name": "of b", "role": "admin", "tenant": "b"})
    for verb in ("pause", "revert"):
        await admin("POST", f"/migrations/move-b/{verb}")
    state = MigrationState(
        name="another-of-b",
        epoch=9,
        phase=Phase.RELEASED,
        members={"b-3": Member(device="b-3", rank=0, epoch=9, state=MemberState.STRAGGLER, reason="gone")},
    )
    await engine.create(
        world.conn,
        tenant="b",
        plan=world.plan("another-of-b", "b"),
        state=state,
        audit=[AuditEntry(kind="migration_started", text="started")],
        created_by="b",
        now=time.time(),
    )
    await world.conn.execute("DELETE FROM engine.migration WHERE name = 'move-b'")
    await registry.put_devices(
        world.conn,
        [NewDevice(id="b-9", tenant="b", credentials=(Credential(kind="password", value="x" * 40),))],
        generated=True,
    )
    assert len(await ledger.rows(world.conn, devices=["b-1"])) == 1


async def test_whatever_happens_to_another_tenant_a_tenant_reads_the_same_bytes(world: World) -> None:
    """Non-interference: lists, searches, pages, streams, figures, reports and refusals are A's alone."""
    callers = [f"{role}@a" for role in ROLES]
    for _ in range(100):  # A's own commands of earlier tests end in their own time
        if not await world.conn.fetchval(
            "SELECT count(*) FROM command WHERE ended_at IS NULL AND name = 'lock'"
        ):
            break
        await world.conn.execute("SELECT pg_sleep(0.2)")
    before = {who: await answers(world, who) for who in callers}
    again = {who: await answers(world, who) for who in callers}
    for who, path in itertools.product(callers, before[callers[0]]):
        assert again[who][path] == before[who][path], f"{who} {path} does not stand still by itself"
    await change_everything_of_b(world)
    after = {who: await answers(world, who) for who in callers}
    for who, path in itertools.product(callers, before[callers[0]]):
        assert after[who][path] == before[who][path], (who, path)
        for trace in (b"colour-of-b", b"wink-b", b"wish-b", b"thing of b", b"someone of b", b'"tenant":"b"'):
            assert trace not in after[who][path], (who, path, trace)
        if b"b-1" not in path.encode():
            assert b'"b-' not in after[who][path], (who, path)


async def test_a_page_of_another_tenants_list_is_no_key_to_it(world: World) -> None:
    """A cursor that B was given leads A to its own things, or nowhere."""
    for path in ("/devices", "/dead-letters", "/migrations", "/tokens", "/tenants"):
        page = (await world.ask("admin@every", "GET", f"{V1}{path}?limit=1")).json()
        if page["next"] is None:
            continue
        answer = await world.ask("admin@a", "GET", f"{V1}{path}?after={page['next']}")
        assert answer.status_code == 200
        assert b"b-" not in answer.content and b'"tenant":"b"' not in answer.content, path
