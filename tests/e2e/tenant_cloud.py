"""A tenant's move end to end: a source and a target, a Fleetlift that moves, and writers that never stop."""

import asyncio
import contextlib
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx

from fleetlift.core.tenant.fence import FROZEN, MOVED, NOT_OPEN, REFUSED
from fleetlift.testing import RunningBackend, running_backend

TENANT, NAME = 2, "tenant-2"
AWAY = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError)
OVER = ("finished", "held", "reverted", "released")

PLAN = """\
migration: move-2
tenant: acme
from: {{postgresql: "{source}", password_env: SOURCE_PASSWORD}}
to: {{postgresql: "{target}", password_env: TARGET_PASSWORD}}
features: {{registration: [users]}}
steps:
  - copy: tenant data
    root: customers.id = 2
    tables:
      ts_kv: "entity_id -> device.id when entity_type = 'DEVICE' | asset.id when entity_type = 'ASSET'"
      audit_log: customer_id
      currency: all
      event_tag: {{identity: full}}
    chunk: 40 rows
  - warm: caches
  - freeze: [registration]
    at_most: 10m
  - switch: database
    at_most: 5s
    terminate: true
"""


def without_password(url: str) -> tuple[str, str]:
    """A database's URL as a plan writes it, and its password."""
    parts = urlsplit(url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    return parts._replace(netloc=f"{user}@").geturl(), password


@contextlib.asynccontextmanager
async def mover(
    directory: Path,
    source: str,
    target: str,
    *,
    kill_at: str = "",
    create: bool = False,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator["Mover"]:
    """A backend whose mover can reach both databases. `kill_at`: FLEETLIFT_KILL_AT; `create`: the move
    makes the target."""
    (source_url, source_password), (target_url, target_password) = map(without_password, (source, target))
    env = {
        "SOURCE_PASSWORD": source_password,
        "TARGET_PASSWORD": target_password,
        **({"FLEETLIFT_KILL_AT": kill_at} if kill_at else {}),
        **(environment or {}),
    }
    async with (
        running_backend(directory, environment={**os.environ, **env}) as backend,
        httpx.AsyncClient(
            base_url=f"{backend.url}/api/v1",
            headers={"authorization": f"Bearer {backend.token}"},
            timeout=30.0,
        ) as client,
    ):
        plan = PLAN.format(source=source_url, target=target_url)
        yield Mover(backend, client, plan.replace("to: {", "to: {create: true, ") if create else plan, env)


class Mover:
    def __init__(
        self, backend: RunningBackend, client: httpx.AsyncClient, plan: str, environment: Mapping[str, str]
    ) -> None:
        self.backend, self.client, self.plan = backend, client, plan
        self.environment = environment

    async def run(self, *arguments: str) -> tuple[int, str]:
        """The command line with the plan: its exit status and all that it printed."""
        path = self.backend.data_dir / "plan.yaml"
        path.write_text(self.plan)
        done = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fleetlift.cli.main", *arguments, "--plan", str(path)),
            env={**os.environ, **self.environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await done.communicate()
        assert done.returncode is not None
        return done.returncode, said.decode()

    async def start(self) -> None:
        await self.post("/tenants", {"id": "acme", "name": "Acme"}, allow=(409,))
        await self.post("/migrations", {"plan": self.plan})

    async def post(self, path: str, body: Any = None, *, allow: tuple[int, ...] = ()) -> Any:
        answer = await self.client.post(path, json=body)
        assert answer.is_success or answer.status_code in allow, answer.text
        return answer.json()

    async def ask(self, verb: str, body: Any = None) -> None:
        await self.post(f"/migrations/move-2/{verb}?wait=15", body)

    async def status(self) -> dict[str, Any]:
        answer = await self.client.get("/migrations/move-2")
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def until(self, *phases: str, within_s: float = 90.0) -> dict[str, Any]:
        """The status once it is in one of `phases` and nothing is asked for any more."""
        return await until_phase(self.status, phases, within_s)

    async def until_cleaned(self, within_s: float = 60.0) -> None:
        """Until the log says that nothing of the move is left."""
        async with asyncio.timeout(within_s):
            while True:
                if "move_cleaned" in [event["kind"] for event in (await self.status())["events"]]:
                    return
                await asyncio.sleep(0.1)

    async def until_step(self, number: int, phase: str, within_s: float = 90.0) -> dict[str, Any]:
        async with asyncio.timeout(within_s):
            while True:
                found = await self.status()
                if found["steps"][number]["phase"] == phase:
                    return found
                assert found["phase"] not in OVER, told(found)
                await asyncio.sleep(0.05)


def told(status: Mapping[str, Any]) -> str:
    """For whoever reads a failed test."""
    events = "\n".join(f"{e['kind']}: {e['text']}" for e in status["events"])
    return f"{status['phase']}: {status['reason']}\n{events}"


async def until_phase(
    status: Callable[[], Awaitable[dict[str, Any]]], phases: Collection[str], within_s: float
) -> dict[str, Any]:
    """The status of a move once it is in one of `phases` and nothing is asked for any more."""
    found: dict[str, Any] = {}
    try:
        async with asyncio.timeout(within_s):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    found = await status()
                    if found["phase"] in phases and not found["open_requests"]:
                        return found
                    assert found["phase"] not in OVER or found["open_requests"], told(found)
                await asyncio.sleep(0.05)
    except TimeoutError:
        what = told(found) if found else "it was never heard of"
        raise AssertionError(f"not {' or '.join(phases)} within {within_s:g} s: {what}") from None


class Writers:
    """Applications that write for the tenant and beside it, and keep the account of what was acknowledged."""

    def __init__(self, source: str, target: str) -> None:
        self.places = (source, target)
        self.stop = asyncio.Event()
        self.values: dict[int, int] = {}
        self.points: set[tuple[int, int]] = set()
        self.tags: set[tuple[int, int]] = set()  # in a table without a key
        self.gone: set[tuple[int, int]] = set()  # points deleted again
        self.unsure: set[int] = set()
        self.refused: Counter[str] = Counter()
        self.others = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, writers: int = 3) -> None:
        conn = await asyncpg.connect(self.places[0])
        ids = [
            r[0] for r in await conn.fetch("SELECT id FROM device WHERE customer_id = $1 ORDER BY id", TENANT)
        ]
        await conn.close()
        for number in range(writers):
            self._tasks.append(asyncio.create_task(self._write(number, ids[number::writers])))
        self._tasks.append(asyncio.create_task(self._write_others()))

    async def finish(self) -> None:
        self.stop.set()
        await asyncio.gather(*self._tasks)

    async def write(self, more: int, within_s: float = 20.0) -> None:
        """Until so many further writes were acknowledged."""
        wanted = len(self.points) + more
        async with asyncio.timeout(within_s):
            while len(self.points) < wanted:  # noqa: ASYNC110 - it is the database that is waited for
                await asyncio.sleep(0.02)

    async def _write(self, number: int, devices: list[int]) -> None:
        chance, place, count = random.Random(number), 0, 0
        conns: list[asyncpg.Connection[Any] | None] = [None, None]
        try:
            while not self.stop.is_set():
                await asyncio.sleep(0.004)
                count += 1
                device = chance.choice(devices)
                while not self.stop.is_set():
                    try:
                        conn = conns[place]
                        if conn is None or conn.is_closed():
                            conn = conns[place] = await asyncpg.connect(self.places[place], timeout=5.0)
                        await self._one(conn, device, number * 1_000_000 + count)
                        break
                    except asyncpg.PostgresError as error:
                        code = error.sqlstate or ""
                        if code in (MOVED, NOT_OPEN):
                            place = 1 - place
                        elif code not in (REFUSED, FROZEN) and not code.startswith(("57P", "08")):
                            raise
                        elif code not in (REFUSED, FROZEN):
                            self.unsure.add(device)
                            conns[place] = None
                        self.refused[code] += 1
                    except AWAY:
                        self.unsure.add(device)
                        conns[place] = None
                    await asyncio.sleep(0.01)
        finally:
            for one in conns:
                if one is not None:
                    with contextlib.suppress(Exception):
                        await one.close(timeout=2.0)

    async def _one(self, conn: "asyncpg.Connection[Any]", device: int, number: int) -> None:
        async with conn.transaction():
            await conn.execute(
                "UPDATE device SET attributes = jsonb_set(attributes, '{value}', to_jsonb($2::int)) "
                "WHERE id = $1",
                device,
                number,
            )
            await conn.execute(
                "INSERT INTO ts_kv VALUES ('DEVICE', $1::bigint::text, 'w', $2, $3)", device, number, 1.5
            )
            if number % 3 == 0:
                await conn.execute("INSERT INTO event_tag VALUES ($1, 'w' || $2::int)", device, number)
            if number % 7 == 0:
                await conn.execute("DELETE FROM alarm WHERE device_id = $1 AND number = 9", device)
                await conn.execute("INSERT INTO alarm VALUES ($1, 9, 'low', NULL, 'again')", device)
        self.values[device] = number
        self.points.add((device, number))
        if number % 3 == 0:
            self.tags.add((device, number))
        self.unsure.discard(device)

    async def _write_others(self) -> None:
        """Other tenants, in the same tables; their writes must never be refused or held up for long."""
        conn: asyncpg.Connection[Any] | None = None
        while not self.stop.is_set():
            await asyncio.sleep(0.01)
            try:
                if conn is None or conn.is_closed():
                    conn = await asyncpg.connect(self.places[0], timeout=5.0)
                await conn.execute(
                    "UPDATE device SET attributes = attributes || '{\"x\": 1}' WHERE customer_id = 3"
                )
                self.others += 1
            except (*AWAY, asyncpg.PostgresConnectionError):
                conn = None
            except asyncpg.PostgresError as error:
                assert (error.sqlstate or "").startswith(("57P", "08")), error
                conn = None
        if conn is not None:
            await conn.close()

    async def account(self, url: str) -> dict[str, int]:
        """Acknowledged writes that are not in `url`, and what is there that nobody has written, or twice."""
        conn = await asyncpg.connect(url)
        values = {
            r["id"]: r["v"]
            for r in await conn.fetch(
                "SELECT id, (attributes->>'value')::int AS v FROM device WHERE customer_id = $1", TENANT
            )
        }
        rows = await conn.fetch("SELECT entity_id, ts FROM ts_kv WHERE entity_type = 'DEVICE' AND key = 'w'")
        tags = Counter(
            tuple(row)
            for row in await conn.fetch(
                "SELECT device_id, substr(tag, 2)::int FROM event_tag WHERE tag ~ '^w'"
            )
        )
        await conn.close()
        points = {(int(r["entity_id"]), r["ts"]) for r in rows}
        wrong = [d for (d, n), count in tags.items() if count > 1 or (d, n) not in self.tags]
        return {
            "values": sum(1 for d, v in self.values.items() if d not in self.unsure and values.get(d) != v),
            "points": len(self.points - points) + len(self.tags - tags.keys()),
            "strange": sum(
                1 for d in (*wrong, *(d for d, _ in points - self.points)) if d not in self.unsure
            ),
        }


async def foreign_rows(target: str) -> int:
    """Rows on the target whose own text says that they are of another tenant."""
    conn = await asyncpg.connect(target)
    found = await conn.fetchval(
        "SELECT (SELECT count(*) FROM customers WHERE id <> $1)"
        " + (SELECT count(*) FROM device WHERE customer_id <> $1)"
        " + (SELECT count(*) FROM users WHERE customer_id <> $1)"
        " + (SELECT count(*) FROM asset WHERE customer_id <> $1)"
        " + (SELECT count(*) FROM audit_log WHERE action NOT LIKE $2)",
        TENANT,
        f"{NAME} did %",
    )
    await conn.close()
    return int(found)


async def leftovers_in(url: str) -> list[str]:
    """Everything of Fleetlift's in a database, by the catalogues alone."""
    conn = await asyncpg.connect(url)
    try:
        rows = await conn.fetch(
            "SELECT 'slot ' || slot_name AS what FROM pg_replication_slots "
            "WHERE database = current_database() "
            "UNION ALL SELECT 'publication ' || pubname FROM pg_publication "
            "UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname LIKE 'fleetlift%' "
            "UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE '%fleetlift%' "
            "UNION ALL SELECT 'identity ' || relname FROM pg_class WHERE relreplident = 'f' "
            "AND relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace"
        )
    finally:
        await conn.close()
    return [row["what"] for row in rows]
