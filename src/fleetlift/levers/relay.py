"""The relay lever: tells a relay where devices go, and hears from it who still comes to the old address."""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
import msgspec

from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, NotFound, Unavailable
from fleetlift.core.relaying import Routes
from fleetlift.core.stale_tail import Tail
from fleetlift.edge.relay import Release, Status
from fleetlift.edge.relay_admin import TOKEN_FILE
from fleetlift.edge.relay_visitors import Straggler

T = TypeVar("T")

RUN_FILE: Final = "relay.json"
_BY_STATUS: Final[Mapping[int, type[FleetError]]] = {
    400: BadInput,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
}


class RelayRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a running relay leaves in `DIR/relay.json`."""

    listen: str
    admin: str  # URL
    pid: int


class _Page(msgspec.Struct, frozen=True):
    items: list[Straggler]
    next: str | None = None


class RelayControl:
    """A relay by its API. Calls raise Unavailable when it does not answer."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 10.0) -> None:
        self.url = url
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {token}"},
            timeout=timeout_s,
            trust_env=False,  # the token is for this machine only
        )

    @classmethod
    def of(cls, data: Path) -> Self:
        """The relay that runs on the data directory `data`."""
        try:
            run = msgspec.json.decode((data / RUN_FILE).read_bytes(), type=RelayRun)
            return cls(run.admin, (data / TOKEN_FILE).read_text().strip())
        except FileNotFoundError:
            raise Unavailable(
                f"no relay has run on {data}: start one by `fleetlift relay --data {data}`"
            ) from None
        except (OSError, msgspec.DecodeError) as problem:
            raise BadInput(
                f"{data / RUN_FILE} cannot be read ({problem}): start the relay again"
            ) from problem

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def status(self) -> Status:
        return await self._call("GET", "/v1/status", Status)

    async def routes(self) -> Routes:
        return await self._call("GET", "/v1/routes", Routes)

    async def set_routes(self, routes: Routes) -> Routes:
        """Conflict when the relay holds a newer epoch. The same table may be given again."""
        return await self._call("PUT", "/v1/routes", Routes, routes)

    async def change_routes(self, **changes: Any) -> Routes:
        """The table with some fields changed, at the next epoch; as it is when they are so already."""
        held = await self.routes()
        if msgspec.structs.replace(held, **changes) == held:
            return held
        return await self.set_routes(msgspec.structs.replace(held, **changes, epoch=held.epoch + 1))

    async def release(self, rate_per_s: float, *, everything: bool = False) -> Release:
        body = {"rate_per_s": rate_per_s, "everything": everything}
        return await self._call("POST", "/v1/release", Release, body)

    async def release_status(self) -> Release:
        return await self._call("GET", "/v1/release", Release)

    async def stop_release(self) -> Release:
        return await self._call("DELETE", "/v1/release", Release)

    async def stragglers(self, *, since: float = 0.0) -> list[Straggler]:
        """All clients seen at the old address since then, by name."""
        found: list[Straggler] = []
        after = ""
        while True:
            query = str(httpx.QueryParams({"since": repr(since), "after": after, "limit": 10_000}))
            page = await self._call("GET", f"/v1/stragglers?{query}", _Page)
            found += page.items
            if page.next is None:
                return found
            after = page.next

    async def tail(
        self,
        devices: Iterable[str],
        *,
        on_new: Mapping[str, float],
        switched_at: float | None,
        ttl_s: float,
    ) -> Tail:
        """What `core/stale_tail.py` decides on: the relay's clients beside the fleet's `devices`."""
        fleet: Set[str] = frozenset(devices)
        status, clients = await self.status(), await self.stragglers()
        return Tail(
            devices=fleet,
            on_old={one.client: one.last_seen for one in clients if one.client in fleet},
            on_new=on_new,
            strangers={one.client: one.last_seen for one in clients if one.client not in fleet},
            switched_at=switched_at,
            ttl_s=ttl_s,
            measured_from=status.watched_from,
            measured_until=status.watched_until,
            forgotten=status.forgotten,
        )

    async def _call(self, method: str, path: str, kind: type[T], body: Any = None) -> T:
        try:
            content = None if body is None else msgspec.json.encode(body)
            answer = await self._client.request(method, path, content=content)
        except httpx.HTTPError as problem:
            raise Unavailable(
                f"the relay at {self.url} does not answer ({str(problem) or type(problem).__name__}): is "
                "it running?"
            ) from problem
        try:
            if answer.is_success:
                return msgspec.json.decode(answer.content, type=kind)
            detail = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError) as problem:
            raise Unavailable(
                f"{self.url} answers {answer.status_code}, and not as a relay does"
            ) from problem
        raise _BY_STATUS.get(answer.status_code, FleetError)(detail)
