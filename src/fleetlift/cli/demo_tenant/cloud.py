"""The application of the demo's cloud: twenty tenants' rows, and writers that never stop.

A writer knows one thing of the move: a write that is refused is tried at the other place. What was
acknowledged to it is in its account, and must be found in the end.
"""

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

from fleetlift.core.tenant.fence import FROZEN, MOVED, NOT_OPEN, REFUSED

TENANTS: Final = 20
WRITERS: Final = 4
_AWAY: Final = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


def name_of(tenant: int) -> str:
    return "acme" if tenant == 7 else f"tenant-{tenant:02}"


ACME: Final = 7
POOL: Final = 20
"""The tenant that is moved, and the one that it is rehearsed with."""


async def fill(url: str, *, devices: int, values: int) -> int:
    """Make the cloud: schema and rows of `TENANTS` customers; how many rows."""
    conn = await asyncpg.connect(url)
    try:
        await conn.execute((Path(__file__).parent / "cloud.sql").read_text())
        await conn.executemany(
            "INSERT INTO customers (id, name, country_id) VALUES ($1, $2, $3)",
            [(n, name_of(n), 1 + n % 3) for n in range(1, TENANTS + 1)],
        )
        for statement in _FILL:
            await conn.execute(statement.replace(":devices", str(devices)).replace(":values", str(values)))
        await conn.execute("ANALYZE")
        return int(await conn.fetchval(_COUNT))
    finally:
        await conn.close()


_FILL: Final = (
    "SELECT setval(pg_get_serial_sequence('customers', 'id'), 1000)",
    "INSERT INTO users (customer_id, email) SELECT c.id, 'user' || n || '@' || c.name || '.test' "
    "FROM customers c, generate_series(1, 10) n ORDER BY 1, 2",
    "UPDATE users u SET manager_id = (SELECT min(id) FROM users m WHERE m.customer_id = u.customer_id) "
    "WHERE id <> (SELECT min(id) FROM users m WHERE m.customer_id = u.customer_id)",
    "INSERT INTO asset (customer_id, name) SELECT c.id, c.name || '-site-' || n "
    "FROM customers c, generate_series(1, 5) n",
    "INSERT INTO asset (customer_id, name, parent_id) SELECT customer_id, name || '-room', id FROM asset",
    "INSERT INTO device (customer_id, name, profile_id, asset_id, attributes) "
    "SELECT c.id, c.name || '-dev-' || n, 2 + n % 2, "
    "(SELECT id FROM asset a WHERE a.customer_id = c.id ORDER BY name OFFSET n % 10 LIMIT 1), "
    "jsonb_build_object('serial', c.name || '/' || n) FROM customers c, generate_series(1, :devices) n",
    "INSERT INTO alarm SELECT d.id, n, 'high', NULL, d.name FROM device d, generate_series(1, 2) n",
    "INSERT INTO alarm_comment (device_id, number, body) SELECT device_id, number, 'seen' FROM alarm",
    "INSERT INTO ts_kv SELECT 'DEVICE', d.id::text, 'speed', n, n * 0.5 "
    "FROM device d, generate_series(1, :values) n",
    "INSERT INTO audit_log (customer_id, at, action) "
    "SELECT c.id, '2025-12-30'::timestamptz + n * interval '1 hour', c.name || ' did ' || n "
    "FROM customers c, generate_series(1, 100) n",
)
_COUNT: Final = (
    "SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM asset) + (SELECT count(*) FROM device) + "
    "(SELECT count(*) FROM alarm) + (SELECT count(*) FROM alarm_comment) + (SELECT count(*) FROM ts_kv) + "
    "(SELECT count(*) FROM audit_log) + (SELECT count(*) FROM customers)"
)


class Account(msgspec.Struct, kw_only=True):
    """What was acknowledged to a writer. `values`: of each device, the number last written; `points` the
    timestamps of rows; `unsure`: devices whose last write may or may not have been carried out."""

    values: dict[int, int] = {}
    points: dict[int, list[int]] = {}
    registered: list[str] = []
    unsure: set[int] = set()


class Application:
    """Writers of one tenant, and of the others beside it. `places` are tried in turn when one refuses."""

    def __init__(self, source_url: str, target_url: str, *, tenant: int, rate_s: float) -> None:
        self._places = (source_url, target_url)
        self._tenant = tenant
        self._every_s = WRITERS / rate_s
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.accounts = [Account() for _ in range(WRITERS)]
        self.refused: Counter[str] = Counter()  # by SQLSTATE
        self.written = self.others = 0
        self.longest_wait_s = 0.0  # from the first try of a write to its acknowledgement

    async def start(self) -> None:
        conn = await asyncpg.connect(self._places[0])
        try:
            ids = [
                r[0]
                for r in await conn.fetch(
                    "SELECT id FROM device WHERE customer_id = $1 ORDER BY id", self._tenant
                )
            ]
            strangers = [
                r[0]
                for r in await conn.fetch(
                    "SELECT id FROM device WHERE customer_id NOT IN ($1, $2) ORDER BY id LIMIT 200",
                    self._tenant,
                    POOL,
                )
            ]
        finally:
            await conn.close()
        for number, account in enumerate(self.accounts):
            mine = ids[number::WRITERS]
            self._tasks.append(
                asyncio.create_task(self._write(number, account, mine), name=f"writer {number}")
            )
        self._tasks.append(asyncio.create_task(self._write_others(strangers), name="other tenants"))

    async def stop(self) -> None:
        """Let each writer end its write. What was acknowledged stays acknowledged."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    # -- writers -----------------------------------------------------------------------------------------

    async def _write(self, number: int, account: Account, devices: list[int]) -> None:
        chance = random.Random(number)
        place = 0
        conns: list[asyncpg.Connection[Any] | None] = [None, None]
        count = 0
        try:
            while not self._stop.is_set():
                await asyncio.sleep(self._every_s)
                count += 1
                device = chance.choice(devices)
                began = time.monotonic()
                while True:
                    try:
                        conn = await self._connection(conns, place)
                        await self._one(conn, account, device, count, number)
                        self.written += 1
                        break
                    except asyncpg.PostgresError as error:
                        code = error.sqlstate or ""
                        if code == FROZEN:
                            self.refused[code] += 1
                            break  # registration can wait until the freeze is over
                        if code not in (REFUSED, MOVED, NOT_OPEN):
                            raise
                        self.refused[code] += 1
                        if code != REFUSED:
                            place = 1 - place
                    except _AWAY:
                        conns[place] = None
                        account.unsure.add(device)
                    if self._stop.is_set():
                        account.unsure.add(device)
                        break
                    await asyncio.sleep(0.01)
                self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began)
        finally:
            for one in conns:
                if one is not None:
                    await one.close()

    async def _connection(
        self, conns: list["asyncpg.Connection[Any] | None"], place: int
    ) -> "asyncpg.Connection[Any]":
        found = conns[place]
        if found is None or found.is_closed():
            found = conns[place] = await asyncpg.connect(self._places[place], timeout=5.0)
        return found

    async def _one(
        self, conn: "asyncpg.Connection[Any]", account: Account, device: int, count: int, number: int
    ) -> None:
        """One write, noted once it is acknowledged. Each transaction writes two tables or more."""
        if count % 25 == 0:
            email = f"joined-{number}-{count}@acme.test"
            await conn.execute("INSERT INTO users (customer_id, email) VALUES ($1, $2)", self._tenant, email)
            account.registered.append(email)
            return
        at = time.time_ns() // 1000
        async with conn.transaction():
            await conn.execute(
                "UPDATE device SET attributes = jsonb_set(attributes, '{value}', to_jsonb($2::int)) "
                "WHERE id = $1",
                device,
                count,
            )
            await conn.execute(
                "INSERT INTO ts_kv VALUES ('DEVICE', $1::bigint::text, 'speed', $2, $3)", device, at, count
            )
            if count % 10 == 0:
                await conn.execute("DELETE FROM alarm WHERE device_id = $1 AND number = 1", device)
            if count % 10 == 5:
                await conn.execute(
                    "INSERT INTO alarm VALUES ($1, 1, 'low', NULL, 'again') ON CONFLICT DO NOTHING", device
                )
        account.values[device] = count
        account.points.setdefault(device, []).append(at)
        account.unsure.discard(device)

    async def _write_others(self, devices: list[int]) -> None:
        """Other tenants go on in the same tables, on the source, whatever happens to this one."""
        chance = random.Random(99)
        conn = await asyncpg.connect(self._places[0])
        try:
            while not self._stop.is_set():
                await asyncio.sleep(self._every_s)
                device = chance.choice(devices)
                await conn.execute(
                    "INSERT INTO ts_kv VALUES ('DEVICE', $1::bigint::text, 'speed', $2, 1)",
                    device,
                    time.time_ns() // 1000,
                )
                self.others += 1
        finally:
            await conn.close()

    # -- the account -------------------------------------------------------------------------------------

    async def lost(self, *, moved: bool) -> int:
        """How many acknowledged writes are not where the tenant lives now."""
        conn = await asyncpg.connect(self._places[moved])
        try:
            values = {
                row["id"]: row["value"]
                for row in await conn.fetch("SELECT id, (attributes->>'value')::int AS value FROM device")
            }
            points = {
                (int(row["entity_id"]), row["ts"])
                for row in await conn.fetch("SELECT entity_id, ts FROM ts_kv WHERE entity_type = 'DEVICE'")
            }
            emails = {row[0] for row in await conn.fetch("SELECT email FROM users")}
        finally:
            await conn.close()
        lost = 0
        for account in self.accounts:
            lost += sum(
                1
                for device, value in account.values.items()
                if device not in account.unsure and values.get(device) != value
            )
            lost += sum(
                1 for device, times in account.points.items() for at in times if (device, at) not in points
            )
            lost += sum(1 for email in account.registered if email not in emails)
        return lost


async def leaked(target_url: str, tenant: int) -> int:
    """How many rows on the target are of other tenants, by what the rows themselves say."""
    conn = await asyncpg.connect(target_url)
    try:
        return int(await conn.fetchval(_LEAKED, tenant))
    finally:
        await conn.close()


_LEAKED: Final = """
SELECT (SELECT count(*) FROM customers WHERE id <> $1)
    + (SELECT count(*) FROM users WHERE customer_id <> $1)
    + (SELECT count(*) FROM asset WHERE customer_id <> $1)
    + (SELECT count(*) FROM device WHERE customer_id <> $1)
    + (SELECT count(*) FROM audit_log WHERE customer_id IS DISTINCT FROM $1)
    + (SELECT count(*) FROM ts_kv t WHERE NOT EXISTS (SELECT FROM device d WHERE d.id::text = t.entity_id))
    + (SELECT count(*) FROM alarm a WHERE NOT EXISTS (SELECT FROM device d WHERE d.id = a.device_id))
"""
