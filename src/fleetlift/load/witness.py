"""Asks a Fleetlift what it has stored of a load test; makes the test's devices there, and removes them.

Every acknowledged message must be there, exactly once. Over HTTP the ledger is asked about every device that
was made for the run, and a share of the messages is read back one by one, which is all that can be asked
about devices that had a past. A database that can be reached counts every row.
"""

import asyncio
import contextlib
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol
from urllib.parse import quote

import asyncpg
import httpx

from fleetlift.backend.passwords import generate_secret
from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.core.load_result import Stored
from fleetlift.core.ranges import RangeSet
from fleetlift.load.credentials import Login
from fleetlift.load.wire import Account

TENANT: Final = "load-test"
AT_ONCE: Final = 8
REREAD_MOST: Final = 100_000  # messages read back one by one over HTTP
STORED_WITHIN_S: Final = 180.0
_PAGE: Final = 1000
_RANGES_SHOWN: Final = 1000  # by the API, of one account

Told = Callable[[str, int, int], None]  # what is being done, how far, of how many


class Witness(Protocol):
    """Somebody who knows what the target has stored."""

    async def ask(self, accounts: Sequence[Account], run: str, since: float, tell: Told) -> Stored:
        """What is there of `run`, which began at `since` (Unix seconds). Waits for what is still to come."""


def channel_of(account: Account) -> str | None:
    """The channel that a message on this topic is stored in; None: it is not telemetry of a Fleetlift."""
    prefix = f"dt/{account.device}/"
    return account.topic[len(prefix) :] if account.topic.startswith(prefix) else None


def acknowledged(account: Account) -> RangeSet:
    found = RangeSet()
    first = 1
    for number in account.missing:
        if number > first:
            found.add_range(first, number)
        first = number + 1
    if account.last >= first:
        found.add_range(first, account.last + 1)
    return found


class FleetliftApi:
    """A Fleetlift's API, as an administrator sees it. Use it as a context manager."""

    def __init__(self, url: str, token: str, ca: str | None = None) -> None:
        self.url = url.rstrip("/")
        verify: ssl.SSLContext | bool = True
        if self.url.startswith("https://") and ca:
            verify = ssl.create_default_context(cafile=ca)
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {token}", "user-agent": "fleetlift-load"},
            timeout=httpx.Timeout(60.0, connect=5.0),
            limits=httpx.Limits(max_connections=AT_ONCE),
            verify=verify,
            trust_env=False,  # a proxy of the environment must not see the token
        )
        self._fresh = False  # the devices were made for the run: their ledgers hold nothing else

    async def __aenter__(self) -> "FleetliftApi":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def call(self, method: str, path: str, *, allowed: tuple[int, ...] = (), **more: Any) -> Any:
        try:
            answer = await self._client.request(method, "/api/v1" + path, **more)
        except httpx.TransportError as exc:
            raise Unavailable(f"{self.url} does not answer ({str(exc) or type(exc).__name__})") from exc
        if answer.is_error and answer.status_code not in allowed:
            try:
                text = str(answer.json()["detail"])
            except (ValueError, KeyError, TypeError):
                text = f"status {answer.status_code}"
            raise FleetError(f"{self.url}: {method} {path}: {text}")
        return answer.json() if answer.content and not answer.is_error else None

    # -- devices -------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def provisioned(self, count: int, run: str, tell: Told) -> AsyncIterator[list[Login]]:
        """`count` devices of the tenant `load-test`, with made passwords; they are gone afterwards.

        What they have sent stays stored, as for any device that is deleted.
        """
        logins = [Login(f"load-{run}-{n:06}", generate_secret()) for n in range(count)]
        await self.call("POST", "/tenants", json={"id": TENANT, "name": "Load tests"}, allowed=(409,))
        made: list[Login] = []

        async def make(login: Login) -> None:
            body = {"tenant": TENANT, "credentials": [{"kind": "password", "value": login.password}]}
            made.append(login)
            await self.call("PUT", f"/devices/{login.device}", json=body)

        async def remove(login: Login) -> None:
            await self.call("DELETE", f"/devices/{login.device}", allowed=(404,))

        try:
            await _each(logins, make, "making devices", tell)
            self._fresh = True
            yield logins
        finally:
            await asyncio.shield(_each(made, remove, "removing devices", tell))

    # -- what is stored ------------------------------------------------------------------------------------

    async def ask(self, accounts: Sequence[Account], run: str, since: float, tell: Told) -> Stored:
        channels = _channels(accounts)
        stored = lost = done = 0
        deadline = time.monotonic() + STORED_WITHIN_S
        by_device: dict[str, list[Account]] = defaultdict(list)
        for account in accounts:
            by_device[account.device].append(account)

        async def one(device: str) -> None:
            nonlocal stored, lost, done
            while True:
                known = {
                    entry["channel"]: entry
                    for entry in (await self.call("GET", f"/devices/{quote(device)}/ledger"))["items"]
                    if entry["path"] == "any"
                }
                found = [_compared(a, known.get(channels[a.topic])) for a in by_device[device]]
                if not any(missing for _, missing in found) or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)
            stored += sum(has for has, _ in found)
            lost += sum(missing for _, missing in found)
            done += 1
            tell("asking what is stored", done, len(by_device))

        if self._fresh:
            await _each(list(by_device), one, "", lambda *_: None)
        chosen, most = [], REREAD_MOST
        for account in accounts:
            if account.accepted <= most:
                chosen.append(account)
                most -= account.accepted
        reread = missing = doubled = 0
        tell("reading back", 0, sum(a.accepted for a in chosen))

        async def read(account: Account) -> None:
            nonlocal reread, missing, doubled
            wanted = acknowledged(account)
            while True:
                seen, again = await self._read(account, channels[account.topic], run, since)
                lacks = sum(1 for first, end in wanted.ranges() for n in range(first, end) if n not in seen)
                if not lacks or self._fresh or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.5)
            missing += lacks
            doubled += again
            reread += len(seen)
            tell("reading back", reread, sum(a.accepted for a in chosen))

        await _each(chosen, read, "", lambda *_: None)
        return Stored(
            stored=stored if self._fresh else reread,
            lost=lost if self._fresh else missing,
            reread=reread,
            reread_of=sum(a.accepted for a in chosen),
            reread_missing=missing,
            doubled=doubled,
        )

    async def _read(self, account: Account, channel: str, run: str, since: float) -> tuple[set[int], int]:
        """The numbers of the run's messages that the device has on this channel, and how many came twice."""
        seen: set[int] = set()
        doubled, after = 0, None
        while True:
            params = {"channel": channel, "limit": _PAGE, "since": _stamp(since)}
            page = await self.call(
                "GET",
                f"/devices/{quote(account.device)}/telemetry",
                params=params | ({"after": after} if after else {}),
            )
            for item in page["items"]:
                body = item["body"]
                if isinstance(body, dict) and body.get("load") == run:
                    doubled += item["seq"] in seen
                    seen.add(item["seq"])
            if (after := page["next"]) is None:
                return seen, doubled


class Database:
    """The database of a Fleetlift: counts every row."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def ask(self, accounts: Sequence[Account], run: str, since: float, tell: Told) -> Stored:
        channels = _channels(accounts)
        wanted = sum(a.accepted for a in accounts)
        connection = await asyncpg.connect(self._url)
        try:
            devices = sorted({a.device for a in accounts})
            names = sorted(set(channels.values()))
            deadline = time.monotonic() + STORED_WITHIN_S
            while True:
                counted = await connection.fetchval(
                    "SELECT coalesce(sum(received), 0)::bigint FROM ledger"
                    " WHERE device = ANY($1) AND channel = ANY($2)",
                    devices,
                    names,
                )
                tell("waiting until all is stored", min(counted, wanted), wanted)
                if counted >= wanted or time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.2)
            rows = await connection.fetch(
                """SELECT device, channel, count(*) AS rows, count(DISTINCT seq) AS stored, max(seq) AS last
                     FROM telemetry WHERE device = ANY($1) AND channel = ANY($2) AND ts >= to_timestamp($3)
                    GROUP BY device, channel""",
                devices,
                names,
                since - 0.001,
            )
            found = {(row["device"], row["channel"]): row for row in rows}
            stored = lost = doubled = reread = 0
            for account in accounts:
                row = found.get((account.device, channels[account.topic]))
                if row is None:
                    lost += account.accepted
                    continue
                stored += row["stored"]
                reread += row["rows"]
                doubled += row["rows"] - row["stored"]
                if row["stored"] != account.last or row["last"] != account.last:
                    lost += await self._missing(connection, account, channels[account.topic], since)
        finally:
            await connection.close()
        return Stored(
            stored=stored,
            lost=lost,
            reread=reread,
            reread_of=wanted,
            reread_missing=lost,
            doubled=doubled,
        )

    async def _missing(
        self, connection: "asyncpg.Connection[Any]", account: Account, channel: str, since: float
    ) -> int:
        seqs = await connection.fetchval(
            "SELECT array_agg(DISTINCT seq) FROM telemetry"
            " WHERE device = $1 AND channel = $2 AND ts >= to_timestamp($3)",
            account.device,
            channel,
            since - 0.001,
        )
        there = set(seqs or ())
        return sum(
            1 for first, end in acknowledged(account).ranges() for n in range(first, end) if n not in there
        )


def _channels(accounts: Sequence[Account]) -> dict[str, str]:
    """By topic. Raises BadInput when one of them is not telemetry of a Fleetlift."""
    found: dict[str, str] = {}
    for account in accounts:
        channel = channel_of(account)
        if channel is None:
            raise BadInput(f"{account.topic}: only dt/{{device}}/… is stored by a Fleetlift as telemetry")
        found[account.topic] = channel
    return found


def _compared(account: Account, entry: dict[str, Any] | None) -> tuple[int, int]:
    """(numbers that the ledger has, acknowledged ones that it has not)."""
    if entry is None:
        return 0, account.accepted
    if len(entry["ranges"]) >= _RANGES_SHOWN:  # the rest is not shown: counts have to do
        return entry["distinct"], max(account.accepted - entry["distinct"], 0)
    there = RangeSet()
    for first, last in entry["ranges"]:
        there.add_range(first, last + 1)
    wanted = acknowledged(account)
    return entry["distinct"], wanted.union(there).count - there.count


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at - 0.001, UTC).isoformat()


async def _each(items: Sequence[Any], work: Callable[[Any], Any], what: str, tell: Told) -> None:
    """Work on every item, some at once; the first error is raised when all are through."""
    queue = iter(items)
    done = 0

    async def some() -> None:
        nonlocal done
        for item in queue:
            await work(item)
            done += 1
            tell(what, done, len(items))

    for result in await asyncio.gather(*(some() for _ in range(AT_ONCE)), return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
