"""The HTTP API against a real database and a real bus: every route, roles and tenants, pages, bad input."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import msgspec
import pytest

from fleetlift.api import app as api_app
from fleetlift.api import migrations as api_migrations
from fleetlift.api.health import ROLES
from fleetlift.backend import alive, registry, tokens
from fleetlift.backend.context import Context
from fleetlift.backend.registry import NewDevice
from fleetlift.config import Settings, checked_address
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
from fleetlift.core.status import from_document
from fleetlift.core.telemetry import Telemetry
from fleetlift.core.timeline import TimelinePoint
from fleetlift.store import engine, ledger, telemetry

V1 = "/api/v1"
PLAN = """
migration: connect
fleet: {tenant: carshare}
from: {legacy: "tcp://127.0.0.1:1"}
to: {fleetlift: default}
steps:
  - move: telemetry
    waves: [1 device, 100%]
    bake: 1s
    gates: [telemetry.completeness >= 99%]
"""


class House:
    """A running API and a client for each token."""

    def __init__(self, ctx: Context, url: str, clients: Mapping[str, httpx.AsyncClient]) -> None:
        self.ctx = ctx
        self.url = url
        self._clients = clients

    def __getitem__(self, who: str) -> httpx.AsyncClient:
        """The client of a token: `admin`, `operator`, `viewer`, or with a tenant `viewer@carshare`."""
        return self._clients[who]


@contextlib.asynccontextmanager
async def serving(ctx: Context) -> AsyncIterator[str]:
    """The API on a free port, stopped at the end."""
    running = asyncio.create_task(api_app.run(ctx))
    url = ctx.settings.http_url
    try:
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            deadline = time.monotonic() + 10
            while True:
                assert not running.done() and time.monotonic() < deadline, "the API did not start"
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{url}/healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.02)
        yield url
    finally:
        ctx.stop.set()
        await asyncio.wait_for(running, 10)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, http=checked_address("127.0.0.1:0", "http"))


@pytest.fixture
async def house(ctx: Context) -> AsyncIterator[House]:
    """Two tenants with two cars each, and a token of every kind."""
    async with ctx.pool.acquire() as conn:
        for tenant in ("carshare", "meters"):
            await registry.create_tenant(conn, tenant)
        await registry.put_devices(
            conn,
            [
                NewDevice(id="car-1", tenant="carshare", attributes={"hardware": 3}),
                NewDevice(id="car-2", tenant="carshare", attributes={"hardware": 4}),
                NewDevice(id="meter-1", tenant="meters"),
                NewDevice(id="meter-2", tenant="meters"),
            ],
        )
        texts = {}
        for role in ("viewer", "operator", "admin"):
            for owner in (None, "carshare", "meters"):
                name = role if owner is None else f"{role}@{owner}"
                _, texts[name] = await tokens.create_token(conn, name, role, owner)
    async with serving(ctx) as url, contextlib.AsyncExitStack() as stack:
        clients = {}
        for name, text in {**texts, "stranger": "flt_" + "0" * 16 + "_" + "x" * 43}.items():
            clients[name] = await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=url, headers={"authorization": f"Bearer {text}"}, trust_env=False, timeout=20
                )
            )
        clients["nobody"] = await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False))
        yield House(ctx, url, clients)


def is_problem(answer: httpx.Response, status: int, slug: str = "") -> dict[str, Any]:
    """The problem document of `answer`, which must be a whole one of that status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["title"] and document["detail"] and document["instance"].startswith("/")
    assert document["type"].startswith("urn:fleetlift:problem:")
    assert "Traceback" not in answer.text and ".py" not in answer.text
    if slug:
        assert document["type"].endswith(f":{slug}")
    return document


async def started(house: House, name: str = "connect", tenant: str = "carshare") -> None:
    """A migration of the tenant's two devices as the controller would have stored it."""
    devices = ["car-1", "car-2"] if tenant == "carshare" else ["meter-1", "meter-2"]
    state = MigrationState(
        name=name,
        epoch=7,
        members={
            devices[0]: Member(device=devices[0], rank=0, rung=1, epoch=7, state=MemberState.MOVED, wave=0),
            devices[1]: Member(
                device=devices[1], rank=1, state=MemberState.STRAGGLER, reason="not connected", told_at=5.0
            ),
        },
    )
    async with house.ctx.pool.acquire() as conn:
        await engine.create(
            conn,
            tenant=tenant,
            plan=PLAN.replace("connect", name).replace("carshare", tenant),
            state=state,
            audit=[AuditEntry(kind="migration_started", text="started", evidence={"devices": 2})],
            created_by="test",
            now=time.time() - 60,
        )
        before = await engine.load(conn, name)
        await engine.commit(
            conn,
            before,
            before.state,
            audit=[AuditEntry(kind="wave_opened", text="wave 1: 1 device told")],
            gates=[
                GateResult(
                    gate="telemetry.completeness >= 99%",
                    verdict=Verdict.ADVANCE,
                    why="100 %",
                    value=100.0,
                    limit=99.0,
                    unit="%",
                    n=40,
                )
            ],
            now=time.time(),
        )
        await engine.add_sample(
            conn,
            name,
            time.time(),
            TimelinePoint(
                phase="running",
                rung=1,
                wave=0,
                wave_phase="baking",
                devices_old=1,
                devices_both=1,
                devices_new=0,
                rate_old=10.0,
                rate_new=5.0,
            ),
        )


# -- who may call ---------------------------------------------------------------------------------------

# method, path, body, the least role
ROUTES: list[tuple[str, str, Any, str]] = [
    ("GET", f"{V1}/devices", None, "viewer"),
    ("GET", f"{V1}/devices/car-1", None, "viewer"),
    ("PUT", f"{V1}/devices/car-9", {"tenant": "carshare"}, "admin"),
    ("DELETE", f"{V1}/devices/car-2", None, "admin"),
    ("GET", f"{V1}/devices/car-1/telemetry", None, "viewer"),
    ("GET", f"{V1}/devices/car-1/telemetry/latest", None, "viewer"),
    ("GET", f"{V1}/devices/car-1/ledger", None, "viewer"),
    ("GET", f"{V1}/dead-letters", None, "viewer"),
    ("POST", f"{V1}/devices/car-1/commands", {"name": "lock"}, "operator"),
    ("GET", f"{V1}/devices/car-1/commands", None, "viewer"),
    ("GET", f"{V1}/commands/01890a5d-ac96-774b-bcce-b302099a8057", None, "viewer"),
    ("GET", f"{V1}/devices/car-1/shadow", None, "viewer"),
    ("PATCH", f"{V1}/devices/car-1/shadow", {"state": {"desired": {"a": 1}}}, "operator"),
    ("DELETE", f"{V1}/devices/car-1/shadow", None, "operator"),
    ("GET", f"{V1}/devices/car-1/shadows", None, "viewer"),
    ("GET", f"{V1}/migrations", None, "viewer"),
    ("POST", f"{V1}/migrations", {"plan": PLAN}, "operator"),
    ("POST", f"{V1}/migrations/check", {"plan": PLAN}, "operator"),
    ("GET", f"{V1}/migrations/connect", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/plan", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/events", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/devices", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/report", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/certificate", None, "viewer"),
    ("GET", f"{V1}/migrations/connect/parity", None, "viewer"),
    ("POST", f"{V1}/migrations/connect/pause", None, "operator"),
    ("POST", f"{V1}/migrations/connect/resume", None, "operator"),
    ("POST", f"{V1}/migrations/connect/approve", None, "operator"),
    ("POST", f"{V1}/migrations/connect/revert", {}, "operator"),
    ("POST", f"{V1}/migrations/connect/amend", {"plan": PLAN}, "operator"),
    ("POST", f"{V1}/migrations/connect/release", None, "operator"),
    ("GET", f"{V1}/tenants", None, "viewer"),
    ("POST", f"{V1}/tenants", {"id": "third"}, "admin"),
    ("GET", f"{V1}/tokens", None, "admin"),
    ("POST", f"{V1}/tokens", {"name": "n", "role": "viewer"}, "admin"),
    ("DELETE", f"{V1}/tokens/0000000000000000", None, "admin"),
    ("GET", "/metrics", None, "viewer"),
    ("GET", "/api/openapi.json", None, "viewer"),
]
LADDER = ("viewer", "operator", "admin")


async def call(client: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
    return (
        await client.request(method, path, json=body)
        if body is not None
        else await client.request(method, path)
    )


async def test_nothing_is_open_without_a_token_but_health(house: House) -> None:
    """Without a token, with an unknown or a malformed one, every route answers 401 with a challenge."""
    await started(house)
    for method, path, body, _ in ROUTES:
        for who in ("nobody", "stranger"):
            answer = await call(house[who], method, path, body)
            is_problem(answer, 401, "not-signed-in")
            assert answer.headers["www-authenticate"].startswith("Bearer")
    for header in ("Basic YTpi", "Bearer", "Bearer x y", "flt_x", "Bearer flt_" + "é"):
        answer = await house["nobody"].get(f"{V1}/devices", headers={b"authorization": header.encode()})
        is_problem(answer, 401)
    assert (await house["nobody"].get("/healthz")).json() == {"status": "alive"}
    assert (await house["nobody"].get("/readyz")).status_code in (200, 503)


async def test_each_role_does_what_it_may_and_no_more(house: House) -> None:
    """A viewer reads, an operator also acts, an administrator also manages; less is answered 403."""
    await started(house)
    for method, path, body, least in ROUTES:
        for role in LADDER[: LADDER.index(least)]:
            document = is_problem(await call(house[role], method, path, body), 403, "forbidden")
            assert least in document["detail"]
        answer = await call(house[least], method, path, body)
        assert answer.status_code not in (401, 403, 405, 500), (method, path, answer.text)


async def test_every_route_of_the_description_is_tested_here(house: House) -> None:
    """The table above is the whole API: a new route must say which role it needs."""
    described = (await house["viewer"].get("/api/openapi.json")).json()
    known = {(m, p.replace(V1, "")) for m, p, _, _ in ROUTES}

    def tested(method: str, path: str) -> bool:
        parts = path.replace(V1, "").split("/")
        return any(
            m == method
            and len(p.split("/")) == len(parts)
            and all(a == b or a.startswith("{") for a, b in zip(parts, p.split("/"), strict=True))
            for m, p in known
        )

    for path, operations in described["paths"].items():
        for method in operations:
            assert path in ("/healthz", "/readyz") or tested(method.upper(), path), (method, path)
    assert described["openapi"].startswith("3.")
    assert "urn:fleetlift:problem" in json.dumps(described["components"]["schemas"]["Problem"])


async def test_a_tenant_sees_only_its_own(house: House) -> None:
    """Another tenant's devices, shadows, commands and migrations are not there, whatever the role."""
    await started(house)
    sent = (await house["operator"].post(f"{V1}/devices/car-1/commands", json={"name": "lock"})).json()
    for role in LADDER:
        stranger, owner = house[f"{role}@meters"], house[f"{role}@carshare"]
        for path in (
            "/devices/car-1",
            "/devices/car-1/telemetry",
            "/devices/car-1/telemetry/latest",
            "/devices/car-1/ledger",
            "/devices/car-1/commands",
            "/devices/car-1/shadow",
            "/devices/car-1/shadows",
            f"/commands/{sent['id']}",
            "/migrations/connect",
            "/migrations/connect/plan",
            "/migrations/connect/events",
            "/migrations/connect/devices",
            "/migrations/connect/report",
            "/migrations/connect/certificate?so_far=true",
        ):
            is_problem(await stranger.get(V1 + path), 404)
            if path != "/devices/car-1/shadow":
                assert (await owner.get(V1 + path)).status_code == 200, path
        for path in ("/devices", "/migrations", "/tenants"):
            ours = {i.get("id") or i["name"] for i in (await owner.get(V1 + path)).json()["items"]}
            theirs = {i.get("id") or i["name"] for i in (await stranger.get(V1 + path)).json()["items"]}
            assert ours and not ours & theirs
    meddler = house["admin@meters"]
    for verb in ("pause", "resume", "approve", "release", "revert"):
        is_problem(await meddler.post(f"{V1}/migrations/connect/{verb}"), 404)
    is_problem(await meddler.post(f"{V1}/devices/car-1/commands", json={"name": "lock"}), 404)
    is_problem(await meddler.patch(f"{V1}/devices/car-1/shadow", json={"state": {}}), 404)
    is_problem(await meddler.delete(f"{V1}/devices/car-1/shadow"), 404)
    is_problem(await meddler.delete(f"{V1}/devices/car-1"), 404)
    is_problem(await meddler.put(f"{V1}/devices/car-1", json={"tenant": "carshare"}), 403)
    is_problem(await meddler.put(f"{V1}/devices/car-1", json={}), 409)
    async with house.ctx.pool.acquire() as conn:
        assert await engine.open_requests(conn, "connect") == ()
        assert (await registry.get_device(conn, "car-1")).tenant == "carshare"


async def test_a_tenants_operator_steers_but_brings_no_plan(house: House) -> None:
    """A plan names servers and queries that run with the server's rights: only a global token brings one."""
    await started(house)
    ours = house["operator@carshare"]
    assert (await ours.post(f"{V1}/migrations/connect/pause")).status_code == 202
    for path in ("", "/check", "/connect/amend"):
        is_problem(await ours.post(f"{V1}/migrations{path}", json={"plan": PLAN}), 403)


async def test_a_tenants_administrator_cannot_step_out_of_it(house: House) -> None:
    ours = house["admin@carshare"]
    made = (await ours.post(f"{V1}/tokens", json={"name": "x", "role": "admin"})).json()
    assert made["tenant"] == "carshare"
    is_problem(await ours.post(f"{V1}/tokens", json={"name": "x", "role": "viewer", "tenant": "meters"}), 403)
    is_problem(await ours.post(f"{V1}/tenants", json={"id": "more"}), 403)
    listed = (await ours.get(f"{V1}/tokens")).json()["items"]
    assert {t["tenant"] for t in listed} == {"carshare"}
    theirs = (await house["admin@meters"].get(f"{V1}/tokens")).json()["items"][0]["id"]
    is_problem(await ours.delete(f"{V1}/tokens/{theirs}"), 404)
    assert "meters" not in (await ours.get("/metrics")).text


async def test_orders_are_not_given_by_a_tenants_token(house: House) -> None:
    """The shadow `fleetlift` sends devices from one side to the other: it is not a tenant's to write."""
    path, order = f"{V1}/devices/car-1/shadow?name=fleetlift", {"state": {"desired": {"epoch": 2**50}}}
    for who in ("operator@carshare", "admin@carshare"):
        is_problem(await house[who].patch(path, json=order), 403)
        is_problem(await house[who].patch(path, json={"state": {"reported": {"epoch": 2**50}}}), 403)
        is_problem(await house[who].delete(path), 403)
    is_problem(await house["operator@meters"].patch(path, json=order), 404)
    assert (await house["operator"].patch(path, json=order)).status_code == 200
    assert (await house["viewer@carshare"].get(path)).status_code == 200
    mine = f"{V1}/devices/car-1/shadow?name=lamp"
    assert (await house["operator@carshare"].patch(mine, json=order)).status_code == 200


async def test_a_stream_ends_when_its_token_is_revoked(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_migrations, "STREAM_CHECK_S", 0.1)
    monkeypatch.setattr(tokens, "_CACHED_FOR_S", 0.1)
    await started(house)
    made = (await house["admin"].post(f"{V1}/tokens", json={"name": "x", "role": "viewer"})).json()
    headers = {"accept": "text/event-stream", "authorization": f"Bearer {made['token']}"}
    async with house["nobody"].stream("GET", f"{V1}/migrations/connect/events", headers=headers) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines)
        assert (await house["admin"].delete(f"{V1}/tokens/{made['id']}")).status_code == 204
        async with asyncio.timeout(5):
            async for _ in lines:
                pass


# -- the areas ------------------------------------------------------------------------------------------


async def test_a_device_is_created_replaced_listed_and_deleted(house: House) -> None:
    """PUT says 201 for a new one; secrets never come back; deleting makes it 404."""
    admin = house["admin"]
    body = {
        "tenant": "carshare",
        "attributes": {"hardware": 5, "firmware": "1.10.2"},
        "credentials": [{"kind": "password", "value": "a secret of its own"}],
    }
    made = await admin.put(f"{V1}/devices/car:7_a", json=body)
    assert made.status_code == 201 and "a secret of its own" not in made.text
    assert made.json()["credentials"] == ["password"]
    assert (await admin.put(f"{V1}/devices/car:7_a", json={"tenant": "carshare"})).status_code == 200
    shown = (await admin.get(f"{V1}/devices/car:7_a")).json()
    assert shown["credentials"] == ["password"] and shown["attributes"] == {}
    assert shown["created_at"].endswith("Z") and shown["since"] is None and shown["connected"] is False
    assert (await admin.put(f"{V1}/devices/car:7_a", json={"tenant": "carshare", "credentials": []})).json()[
        "credentials"
    ] == []
    assert (await admin.delete(f"{V1}/devices/car:7_a")).status_code == 204
    is_problem(await admin.get(f"{V1}/devices/car:7_a"), 404, "not-found")


async def test_where_selects_devices(house: House) -> None:
    viewer = house["viewer"]
    found = await viewer.get(f"{V1}/devices", params={"where": "attributes.hardware >= 4"})
    assert [d["id"] for d in found.json()["items"]] == ["car-2"]
    found = await viewer.get(f"{V1}/devices", params={"tenant": "meters"})
    assert [d["id"] for d in found.json()["items"]] == ["meter-1", "meter-2"]
    is_problem(
        await viewer.get(f"{V1}/devices", params={"where": "attributes.hardware >>"}), 400, "bad-input"
    )


async def test_every_list_pages_through_all_items_once(house: House) -> None:
    """`next` of a page goes on behind it, and is null at the end."""
    await started(house)
    await started(house, "second", "meters")
    for _ in range(3):
        await house["operator"].post(f"{V1}/devices/car-1/commands", json={"name": "lock"})
    for name in ("a", "b", "c"):
        await house["operator"].patch(
            f"{V1}/devices/car-1/shadow?name={name}", json={"state": {"desired": {"x": 1}}}
        )
    async with house.ctx.pool.acquire() as conn:
        await telemetry.insert(conn, messages("car-1", 5))
        await note_channels(conn, "car-1")
    for path, key in (
        ("/devices", "id"),
        ("/tenants", "id"),
        ("/tokens", "id"),
        ("/devices/car-1/commands", "id"),
        ("/devices/car-1/shadows", None),
        ("/devices/car-1/telemetry", "seq"),
        ("/migrations", "name"),
        ("/migrations/connect/events", "id"),
        ("/migrations/connect/devices", "device"),
    ):
        whole = (await house["admin"].get(V1 + path, params={"limit": 1000})).json()
        assert whole["next"] is None and len(whole["items"]) > 1, path
        seen: list[Any] = []
        after = None
        while True:
            page = (
                await house["admin"].get(V1 + path, params={"limit": 1} | ({"after": after} if after else {}))
            ).json()
            seen += page["items"]
            assert len(page["items"]) == 1
            if (after := page["next"]) is None:
                break
        assert [i if key is None else i[key] for i in seen] == [
            i if key is None else i[key] for i in whole["items"]
        ]
        for bad in ("not-a-cursor", "e30", "x" * 1025):
            is_problem(await house["admin"].get(V1 + path, params={"after": bad}), 400, "bad-input")
        for limit in ("0", "1001", "-1", "many", "1.5"):
            document = is_problem(
                await house["admin"].get(V1 + path, params={"limit": limit}), 400, "bad-input"
            )
            assert document["errors"][0]["field"] == "limit"


def messages(device: str, n: int) -> list[Telemetry]:
    now = time.time()
    return [
        Telemetry(
            device=device,
            channel="status",
            ts_ms=int((now - 100 + i) * 1000),
            seq=i,
            body=f'{{"seq": {i}, "speed": 1.50}}',
            path="mqtt",
            received_at=now,
        )
        for i in range(n)
    ]


async def note_channels(conn: Any, device: str) -> None:
    """The ledger names a device's channels; the worker writes it with the rows."""
    await conn.execute(
        "INSERT INTO ledger (device, channel, path, first_at, last_at) "
        "VALUES ($1, 'status', 'mqtt', now(), now())",
        device,
    )


async def test_telemetry_comes_back_as_it_was_sent(house: House) -> None:
    """Bodies keep their very text (1.50 stays 1.50); ranges, channels and the order can be asked for."""
    async with house.ctx.pool.acquire() as conn:
        await telemetry.insert(conn, messages("car-1", 5))
        await note_channels(conn, "car-1")
    viewer = house["viewer@carshare"]
    answer = await viewer.get(f"{V1}/devices/car-1/telemetry")
    assert '"speed": 1.50' in answer.text
    items = answer.json()["items"]
    assert [m["seq"] for m in items] == [0, 1, 2, 3, 4]
    assert set(items[0]) == {"channel", "ts", "seq", "body", "path", "received_at"}
    ranged = await viewer.get(
        f"{V1}/devices/car-1/telemetry", params={"since": items[1]["ts"], "until": items[3]["ts"]}
    )
    assert [m["seq"] for m in ranged.json()["items"]] == [1, 2]
    newest = await viewer.get(f"{V1}/devices/car-1/telemetry", params={"order": "newest", "limit": 2})
    assert [m["seq"] for m in newest.json()["items"]] == [4, 3]
    latest = await viewer.get(f"{V1}/devices/car-1/telemetry/latest")
    assert [m["seq"] for m in latest.json()["items"]] == [4]
    none = await viewer.get(f"{V1}/devices/car-1/telemetry", params={"channel": "other"})
    assert none.json() == {"items": [], "next": None}
    path = f"{V1}/devices/car-1/telemetry"
    is_problem(await viewer.get(path, params={"since": "2026-01-01T00:00:00"}), 400)
    is_problem(await viewer.get(path, params={"since": "yesterday"}), 400)
    is_problem(await viewer.get(path, params={"since": items[3]["ts"], "until": items[1]["ts"]}), 400)
    is_problem(await viewer.get(path, params={"order": "random"}), 400)


async def test_the_ledger_shows_gaps_and_doubles_by_path(house: House) -> None:
    """What each path brought, what it lacks of what any path brought, and what nobody brought."""
    insert = (
        "INSERT INTO ledger (device, channel, path, ranges, received, doubles, first_at, last_at) "
        "VALUES ('car-1', 'obd', $1, $2::text::int8multirange, $3, $4, now(), now())"
    )
    async with house.ctx.pool.acquire() as conn:
        await conn.execute(insert, "legacy", "{[1,6)}", 7, 2)
        await conn.execute(insert, "mqtt", "{[4,5),[8,11)}", 4, 0)
    items = (await house["viewer@carshare"].get(f"{V1}/devices/car-1/ledger")).json()["items"]
    assert [
        (a["path"], a["distinct"], a["missing"], a["doubles"], a["ranges"], a["gaps"]) for a in items
    ] == [
        ("legacy", 5, 5, 2, [[1, 5]], [[6, 10]]),
        ("mqtt", 4, 6, 0, [[4, 4], [8, 10]], [[1, 3], [5, 7]]),
        ("any", 8, 2, 2, [[1, 5], [8, 10]], [[6, 7]]),
    ]
    async with house.ctx.pool.acquire() as conn:  # the report's account of the same device
        [account] = await ledger.by_device(conn, ["car-1", "car-2"])
        totals = {t.path: (t.received, t.distinct, t.doubles) for t in await ledger.totals(conn)}
    assert account.received == {"legacy": 7, "mqtt": 4}
    assert (account.stored, account.missing, account.gaps) == (8, 2, ("obd {[6,8)}",))
    assert totals == {"legacy": (7, 5, 2), "mqtt": (4, 4, 0)}


async def test_messages_outlive_their_device_for_those_who_see_everything(house: House) -> None:
    async with house.ctx.pool.acquire() as conn:
        await telemetry.insert(conn, messages("car-1", 2))
        await note_channels(conn, "car-1")
    await house["admin"].delete(f"{V1}/devices/car-1")
    assert len((await house["viewer"].get(f"{V1}/devices/car-1/telemetry")).json()["items"]) == 2
    is_problem(await house["viewer@carshare"].get(f"{V1}/devices/car-1/telemetry"), 404)
    is_problem(await house["viewer"].get(f"{V1}/devices/nobody/telemetry"), 404)


async def test_a_command_is_queued_and_read_back(house: House) -> None:
    """202 with an id; the caller's name is kept; each path is shown with outcome and latency."""
    operator = house["operator@carshare"]
    sent = await operator.post(
        f"{V1}/devices/car-1/commands",
        json={"name": "lock", "params": {"door": "left"}, "expires_in": 30, "mode": "dry-run"},
    )
    assert sent.status_code == 202
    command = sent.json()
    assert command["status"] == "queued" and command["created_by"] == "operator@carshare"
    assert command["paths"][0]["path"] == "new" and command["paths"][0]["latency"] is None
    again = (await house["viewer@carshare"].get(f"{V1}/commands/{command['id']}")).json()
    assert again["params"] == {"door": "left"} and again["mode"] == "dry-run"
    listed = (await operator.get(f"{V1}/devices/car-1/commands")).json()["items"]
    assert [c["id"] for c in listed] == [command["id"]]
    for body in (
        {},
        {"name": "lock", "expires_in": 0},
        {"name": "lock", "expires_in": 1e9},
        {"name": "lock", "expires_in": "soon"},
        {"name": "lock", "mode": "maybe"},
        {"name": "lock", "params": [1]},
        {"name": "lock", "parms": {}},
        {"name": "a b"},
    ):
        is_problem(await operator.post(f"{V1}/devices/car-1/commands", json=body), 400, "bad-input")
    is_problem(await operator.post(f"{V1}/devices/no-such/commands", json={"name": "lock"}), 404)
    is_problem(await operator.get(f"{V1}/commands/nonsense"), 404)


async def test_a_shadow_follows_awss_rules(house: House) -> None:
    """Update, version conflict, delta, named shadows, delete; errors say so in AWS's words."""
    operator, path = house["operator"], f"{V1}/devices/car-1/shadow"
    is_problem(await operator.get(path), 404)
    first = await operator.patch(
        path, json={"state": {"desired": {"interval": 30}, "reported": {"interval": 10}}}
    )
    assert first.status_code == 200 and first.json()["version"] == 1
    shown = (await operator.get(path)).json()
    assert shown["state"]["desired"] == {"interval": 30} and shown["state"]["delta"] == {"interval": 30}
    is_problem(
        await operator.patch(path, json={"state": {"desired": {"a": 1}}, "version": 9}), 409, "conflict"
    )
    removed = await operator.patch(path, json={"state": {"desired": {"interval": None}}, "version": 1})
    assert removed.json()["version"] == 2
    await operator.patch(f"{path}?name=doors", json={"state": {"desired": {"locked": True}}})
    assert (await operator.get(f"{V1}/devices/car-1/shadows")).json()["items"] == ["doors"]
    for body in (b"", b"{", b"[]", b'{"state": 5}', b'{"nothing": 1}', b'"\xff"'):
        answer = await operator.patch(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 415), (body, answer.text)
        is_problem(answer, answer.status_code)
    is_problem(await operator.get(path, params={"name": "no/such name"}), 400)
    large = {"state": {"desired": {"x": "y" * 70_000}}}
    is_problem(await operator.patch(path, json=large), 413)
    assert (await operator.delete(path)).json()["version"] == 2
    is_problem(await operator.delete(path), 404)


async def test_tenants_and_tokens(house: House) -> None:
    """A token is shown once, works at once, and stops working within seconds of its revocation."""
    admin = house["admin"]
    assert (await admin.post(f"{V1}/tenants", json={"id": "third", "name": "Third"})).status_code == 201
    is_problem(await admin.post(f"{V1}/tenants", json={"id": "third"}), 409, "conflict")
    is_problem(await admin.post(f"{V1}/tenants", json={"id": "Not Good"}), 400)
    made = (
        await admin.post(f"{V1}/tokens", json={"name": "anna", "role": "viewer", "tenant": "third"})
    ).json()
    listed = await admin.get(f"{V1}/tokens")
    assert made["id"] in listed.text and made["token"] not in listed.text
    is_problem(await admin.post(f"{V1}/tokens", json={"name": "x", "role": "owner"}), 400)
    is_problem(await admin.post(f"{V1}/tokens", json={"name": "", "role": "viewer"}), 400)
    is_problem(await admin.post(f"{V1}/tokens", json={"name": "x", "role": "viewer", "tenant": "none"}), 404)
    headers = {"authorization": f"bearer {made['token']}"}
    assert (await house["nobody"].get(f"{V1}/devices", headers=headers)).status_code == 200
    assert (await admin.delete(f"{V1}/tokens/{made['id']}")).status_code == 204
    deadline = time.monotonic() + 8
    while (await house["nobody"].get(f"{V1}/devices", headers=headers)).status_code != 401:
        assert time.monotonic() < deadline, "a revoked token still works"
        await asyncio.sleep(0.2)
    own = next(t for t in (await admin.get(f"{V1}/tokens")).json()["items"] if t["name"] == "admin")
    is_problem(await admin.delete(f"{V1}/tokens/{own['id']}"), 400)


# -- migrations ------------------------------------------------------------------------------------------


async def test_a_migration_is_shown_whole(house: House) -> None:
    """Status, list, plan, devices, events and report of one migration."""
    await started(house)
    viewer = house["viewer@carshare"]
    document = (await viewer.get(f"{V1}/migrations/connect")).json()
    assert document["started_at"].endswith("Z")
    status = from_document(document)
    assert (status.name, status.phase, status.devices) == ("connect", Phase.RUNNING, 2)
    assert status.gates[0].value == 100.0 and status.stragglers[0].device == "car-2"
    assert status.events[-1].kind == "wave_opened" and status.timeline[-1].point.rate_old == 10.0
    assert (await viewer.get(f"{V1}/migrations")).json()["items"][0]["phase"] == "running"
    assert (await viewer.get(f"{V1}/migrations/connect/plan")).text == PLAN
    members = (await viewer.get(f"{V1}/migrations/connect/devices")).json()["items"]
    assert [(m["device"], m["state"]) for m in members] == [("car-1", "moved"), ("car-2", "straggler")]
    late = await viewer.get(f"{V1}/migrations/connect/devices?state=straggler&state=excluded")
    assert [m["device"] for m in late.json()["items"]] == ["car-2"]
    is_problem(await viewer.get(f"{V1}/migrations/connect/devices?state=lost"), 400)
    events = (await viewer.get(f"{V1}/migrations/connect/events")).json()["items"]
    assert [e["kind"] for e in events] == ["migration_started", "wave_opened"]
    assert events[0]["evidence"] == {"devices": 2}
    report = await viewer.get(f"{V1}/migrations/connect/report")
    assert report.headers["content-type"].startswith("text/html") and "<html" in report.text
    is_problem(await viewer.get(f"{V1}/migrations/none"), 404)
    told = is_problem(await viewer.get(f"{V1}/migrations/connect/certificate"), 409)
    assert "--so-far" in told["detail"]
    certificate = (await viewer.get(f"{V1}/migrations/connect/certificate?so_far=true")).json()
    assert (certificate["finished"], len(certificate["audit"])) == (False, 2)


async def test_a_migration_does_not_take_back_devices_that_another_one_has(house: House) -> None:
    """`connect` went back and `again` took its devices: `connect` is neither resumed nor amended."""
    await started(house)
    async with house.ctx.pool.acquire() as conn:
        await conn.execute("UPDATE engine.migration SET phase = 'reverted'")
    await started(house, "again")
    operator = house["operator"]
    for path, body in (
        ("connect/resume", None),
        ("connect/resume", {"device": "car-1"}),
        ("connect/amend", {"plan": PLAN}),
    ):
        told = is_problem(await operator.post(f"{V1}/migrations/{path}", json=body), 409)
        assert "'again'" in told["detail"] and "car-1" in told["detail"]
    async with house.ctx.pool.acquire() as conn:
        await conn.execute("UPDATE engine.migration SET phase = 'released' WHERE name = 'again'")
    assert (await operator.post(f"{V1}/migrations/connect/resume")).status_code == 202


async def test_requests_reach_the_controller_with_the_callers_name(house: House) -> None:
    await started(house)
    operator = house["operator@carshare"]
    for verb in ("pause", "resume", "approve", "release"):
        assert (await operator.post(f"{V1}/migrations/connect/{verb}")).json()["answered"] is False
    await operator.post(f"{V1}/migrations/connect/revert")
    await operator.post(f"{V1}/migrations/connect/resume", json={"device": "car-1"})
    await operator.post(f"{V1}/migrations/connect/release", json={"force": True})
    await operator.post(f"{V1}/migrations/connect/revert", json={"wave": True})
    await operator.post(f"{V1}/migrations/connect/revert", json={"device": "car-1"})
    await operator.post(f"{V1}/migrations/connect/resume", json={"device": "car-1"})
    await operator.post(f"{V1}/migrations/connect/release", json={"force": True})
    narrowed = PLAN.replace("{tenant: carshare}", '{tenant: carshare, where: "attributes.hardware < 4"}')
    assert (
        await house["operator"].post(f"{V1}/migrations/connect/amend", json={"plan": narrowed})
    ).status_code == 202
    async with house.ctx.pool.acquire() as conn:
        asked = await engine.open_requests(conn, "connect")
    assert [(r.kind, r.args) for r in asked] == [
        (RequestKind.PAUSE, {}),
        (RequestKind.RESUME, {}),
        (RequestKind.APPROVE, {}),
        (RequestKind.RELEASE, {}),
        (RequestKind.REVERT, {}),
        (RequestKind.RESUME, {"device": "car-1"}),
        (RequestKind.RELEASE, {"force": True}),
        (RequestKind.REVERT, {"wave": True}),
        (RequestKind.REVERT, {"device": "car-1"}),
        (RequestKind.RESUME, {"device": "car-1"}),
        (RequestKind.RELEASE, {"force": True}),
        (RequestKind.AMEND, {"plan": narrowed}),
    ]
    assert {r.actor for r in asked[:9]} == {"operator@carshare"}
    is_problem(await operator.post(f"{V1}/migrations/connect/revert", json={"device": "nobody"}), 404)
    is_problem(
        await operator.post(f"{V1}/migrations/connect/revert", json={"device": "car-1", "wave": True}), 400
    )
    other = PLAN.replace("migration: connect", "migration: other")
    is_problem(await house["operator"].post(f"{V1}/migrations/connect/amend", json={"plan": other}), 400)


async def test_waiting_returns_once_the_request_is_dealt_with(house: House) -> None:
    await started(house)
    asking = asyncio.create_task(house["operator"].post(f"{V1}/migrations/connect/pause?wait=10"))
    deadline = time.monotonic() + 5
    async with house.ctx.pool.acquire() as conn:
        while not (asked := await engine.open_requests(conn, "connect")):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        before = await engine.load(conn, "connect")
        await engine.commit(conn, before, before.state, answered=[asked[0].id], now=time.time())
    answer = await asking
    assert answer.status_code == 200 and answer.json()["answered"] is True


async def test_a_plan_with_mistakes_names_each_with_its_line(house: House) -> None:
    bad = PLAN.replace("bake: 1s", "bake: soon").replace("waves:", "wavez:")
    for path in ("", "/check"):
        document = is_problem(await house["operator"].post(f"{V1}/migrations{path}", json={"plan": bad}), 400)
        assert len(document["errors"]) >= 2
        assert all(e["line"] > 1 and e["message"] for e in document["errors"])
    for body in ({}, {"plan": ""}, {"plan": 5}, {"plan": PLAN, "name": "x"}, {"plan": "x" * 300_000}):
        is_problem(await house["operator"].post(f"{V1}/migrations", json=body), 400)


async def test_check_says_what_is_missing(house: House) -> None:
    """An old side that does not answer is a finding, not an error; the waves are shown all the same."""
    answer = await house["operator"].post(f"{V1}/migrations/check", json={"plan": PLAN})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["ok"] is False
    assert "old_side_away" in {f["kind"] for f in found["findings"]}
    assert [r["stage"] for r in found["rungs"]] == ["both", "new"]


async def test_events_follow_live_and_go_on_where_they_were_lost(house: House) -> None:
    """Server-sent events: what is there, then what comes; Last-Event-ID leaves out what was seen."""
    await started(house)
    got: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def listen(after: str | None) -> None:
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        async with house["viewer@carshare"].stream(
            "GET", f"{V1}/migrations/connect/events", headers=headers
        ) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    got.put_nowait(json.loads(line[5:]))

    listening = asyncio.create_task(listen(None))
    first = await asyncio.wait_for(got.get(), 5)
    second = await asyncio.wait_for(got.get(), 5)
    assert (first["kind"], second["kind"]) == ("migration_started", "wave_opened")
    async with house.ctx.pool.acquire() as conn:
        before = await engine.load(conn, "connect")
        await engine.commit(
            conn, before, before.state, audit=[AuditEntry(kind="gate_breached", text="x")], now=time.time()
        )
    assert (await asyncio.wait_for(got.get(), 5))["kind"] == "gate_breached"
    listening.cancel()
    listening = asyncio.create_task(listen(str(second["id"])))
    assert (await asyncio.wait_for(got.get(), 5))["kind"] == "gate_breached"
    listening.cancel()
    is_problem(
        await house["viewer@meters"].get(
            f"{V1}/migrations/connect/events", headers={"accept": "text/event-stream"}
        ),
        404,
    )


async def test_open_streams_do_not_keep_the_server_from_stopping(house: House) -> None:
    await started(house)
    async with house["viewer"].stream(
        "GET", f"{V1}/migrations/connect/events", headers={"accept": "text/event-stream"}
    ) as answer:
        lines = answer.aiter_lines()
        assert await anext(lines)
        house.ctx.stop.set()
        async with asyncio.timeout(5):
            async for _ in lines:
                pass


# -- health and limits ----------------------------------------------------------------------------------


async def test_ready_means_that_every_worker_answers(house: House) -> None:
    """Each missing worker is named; with all of them there it is ready."""
    answer = await house["nobody"].get("/readyz")
    assert answer.status_code == 503
    parts = answer.json()["parts"]
    assert parts["database"] == parts["bus"] == "ok"
    assert all(parts[f"worker {role}"] != "ok" for role in ROLES)
    async with contextlib.AsyncExitStack() as stack:
        for role in ROLES:
            await stack.enter_async_context(alive.answering(house.ctx.nc, role))
        answer = await house["nobody"].get("/readyz")
        assert answer.status_code == 200 and answer.json()["ready"] is True


async def test_metrics_are_prometheus_text(house: House) -> None:
    await started(house)
    text = (await house["viewer"].get("/metrics")).text
    assert "fleetlift_devices 4.0" in text
    assert 'fleetlift_migration_phase{migration="connect",phase="running"} 1.0' in text
    assert "fleetlift_http_requests_total" in text
    assert "fleetlift_devices 2.0" in (await house["viewer@meters"].get("/metrics")).text


async def test_bad_requests_are_answered_in_kind(house: House) -> None:
    """Unknown paths, wrong methods, bodies that are no JSON, of the wrong type, or too large."""
    admin = house["admin"]
    is_problem(await admin.get(f"{V1}/nothing"), 404, "no-such-path")
    is_problem(await admin.post(f"{V1}/devices/car-1"), 405, "wrong-method")
    json_type = {"content-type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"null", b"[]", b'"text"', b"[" * 100_000):
        answer = await admin.put(f"{V1}/devices/car-8", content=content, headers=json_type)
        is_problem(answer, 400, "bad-input")
    document = is_problem(
        await admin.put(f"{V1}/devices/car-8", json={"tenant": "carshare", "attributes": 5}), 400, "bad-input"
    )
    assert "attributes" in document["detail"]
    document = is_problem(
        await admin.put(f"{V1}/devices/car-8", json={"tenant": "carshare", "nam": "x"}), 400
    )
    assert "nam" in document["detail"]
    is_problem(await admin.put(f"{V1}/devices/{'x' * 129}", json={"tenant": "carshare"}), 400)
    is_problem(await admin.put(f"{V1}/devices/a%20b", json={"tenant": "carshare"}), 400)
    huge = await admin.put(f"{V1}/devices/car-8", content=b" " * (2 * 1024 * 1024), headers=json_type)
    is_problem(huge, 413, "too-large")
    is_problem(await admin.get(f"{V1}/devices/car-1%00"), 400, "bad-input")


async def test_a_database_that_is_away_is_a_503_and_not_a_stack_trace(house: House) -> None:
    await house["viewer"].get(f"{V1}/devices")  # the token is known for some seconds
    await house.ctx.pool.close()
    is_problem(await house["viewer"].get(f"{V1}/devices"), 503, "unavailable")
    ready = await house["nobody"].get("/readyz")
    assert ready.status_code == 503 and ready.json()["parts"]["database"] != "ok"
    assert (await house["nobody"].get("/healthz")).status_code == 200
