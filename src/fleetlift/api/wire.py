"""What all areas of the API share: who calls, pages, times, bodies read as bytes."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Generic, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.params import QueryParameter

from fleetlift.backend.commands import Intake
from fleetlift.backend.context import Context
from fleetlift.backend.tokens import Principal, TokenVerifier
from fleetlift.core.errors import BadInput
from fleetlift.store.paging import DEFAULT_LIMIT, MAX_LIMIT, Page
from fleetlift.store.pool import Pool

T = TypeVar("T")
S = TypeVar("S")

Call = Request[Principal, None, State]

Limit = Annotated[
    int,
    QueryParameter(ge=1, le=MAX_LIMIT, description=f"Items on this page, at most {MAX_LIMIT}."),
]
After = Annotated[str | None, QueryParameter(max_length=1024, description="`next` of the page before.")]
LIMIT = DEFAULT_LIMIT


class Services(msgspec.Struct, frozen=True, kw_only=True):
    """What handlers work with. `engine` is the migration engine's database, often the same."""

    ctx: Context
    pool: Pool
    engine: Pool
    verifier: TokenVerifier
    intake: Intake
    started_at: float


class Listing(msgspec.Struct, Generic[T], frozen=True):
    """One page of a list. `next`: what to give as `after` for the page that follows; null at the end."""

    items: list[T]
    next: str | None = None


def services(request: Call) -> Services:
    found = request.app.state["services"]
    assert isinstance(found, Services)
    return found


def listing(page: Page[S], shape: Callable[[S], T]) -> Listing[T]:
    """A page of the store as the API answers it; `shape` turns one item into what is answered."""
    return Listing([shape(item) for item in page.items], page.next)


def stamp(at: float | None) -> datetime | None:
    """Unix seconds as a moment in UTC, which is written as RFC 3339."""
    return None if at is None else datetime.fromtimestamp(at, UTC)


def moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def unix(at: datetime | None, field: str) -> float | None:
    """A moment from the query as Unix seconds; BadInput without a time zone."""
    if at is None:
        return None
    if at.tzinfo is None:
        raise BadInput(f"{field}: give a time zone, as in 2026-01-31T12:00:00Z")
    return at.timestamp()


def owned_tenant(request: Call, asked: str | None = None) -> str | None:
    """The tenant that a list is limited to: the token's own, else the one asked for, else None for all."""
    return request.user.tenant or asked or None
