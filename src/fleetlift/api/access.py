"""Tenants, and the tokens of people and programs."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from litestar import Router, delete, get, post
from litestar.params import FromPath, JSONBody

from fleetlift.api.auth import ADMIN, VIEWER
from fleetlift.api.wire import LIMIT, After, Call, Limit, Listing, listing, moment, services, stamp
from fleetlift.backend import registry, tokens
from fleetlift.core.errors import BadInput, Conflict, Forbidden
from fleetlift.store.devices import Tenant
from fleetlift.store.tokens import TokenRow

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]


_ONE_TENANT = (
    "SELECT id, name, extract(epoch FROM created_at)::float8 AS created_at FROM tenant WHERE id = $1"
)


class TenantIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`id`: 1 to 63 lower-case letters, digits or '-'."""

    id: str
    name: str = ""


class TenantOut(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    created_at: datetime


class TokenIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`tenant` left out: every tenant, or the one of the token that asks."""

    name: Name
    role: Literal["viewer", "operator", "admin"]
    tenant: str | None = None


class TokenOut(msgspec.Struct, frozen=True, kw_only=True):
    """A token without its secret. `tenant` null: every tenant."""

    id: str
    name: str
    role: str
    tenant: str | None
    created_at: datetime
    revoked_at: datetime | None


class TokenMade(msgspec.Struct, frozen=True, kw_only=True):
    """A new token. `token` is shown this once and stored nowhere."""

    id: str
    token: str
    name: str
    role: str
    tenant: str | None


def shown_tenant(tenant: Tenant) -> TenantOut:
    return TenantOut(id=tenant.id, name=tenant.name, created_at=moment(tenant.created_at))


def shown_token(row: TokenRow) -> TokenOut:
    return TokenOut(
        id=row.id,
        name=row.name,
        role=row.role,
        tenant=row.tenant,
        created_at=moment(row.created_at),
        revoked_at=stamp(row.revoked_at),
    )


@get("/tenants", opt=VIEWER, summary="List tenants")
async def list_tenants(request: Call, limit: Limit = LIMIT, after: After = None) -> Listing[TenantOut]:
    """A tenant's token sees its own."""
    async with services(request).pool.acquire() as conn:
        if (own := request.user.tenant) is not None:
            row = await conn.fetchrow(_ONE_TENANT, own)
            return Listing([shown_tenant(Tenant(**dict(row)))] if row and after is None else [])
        return listing(await registry.list_tenants(conn, limit=limit, after=after), shown_tenant)


@post("/tenants", opt=ADMIN, summary="Create a tenant")
async def create_tenant(request: Call, data: JSONBody[TenantIn]) -> TenantOut:
    if request.user.tenant is not None:
        raise Forbidden("Only a token of every tenant may create tenants.")
    async with services(request).pool.acquire() as conn, conn.transaction():
        # taken first, so that of two who create the same tenant one is told
        await conn.execute("LOCK TABLE tenant IN SHARE ROW EXCLUSIVE MODE")
        if await conn.fetchval("SELECT true FROM tenant WHERE id = $1", data.id):
            raise Conflict(f"tenant {data.id!r} exists already: choose another id")
        await registry.create_tenant(conn, data.id, data.name)
        row = await conn.fetchrow(_ONE_TENANT, data.id)
    assert row is not None
    return shown_tenant(Tenant(**dict(row)))


@get("/tokens", opt=ADMIN, summary="List tokens")
async def list_tokens(request: Call, limit: Limit = LIMIT, after: After = None) -> Listing[TokenOut]:
    """Without their secrets; revoked ones too. A tenant's administrator sees the tenant's."""
    async with services(request).pool.acquire() as conn:
        page = await tokens.list_tokens(conn, tenant=request.user.tenant, limit=limit, after=after)
    return listing(page, shown_token)


@post("/tokens", opt=ADMIN, summary="Create a token")
async def create_token(request: Call, data: JSONBody[TokenIn]) -> TokenMade:
    """A tenant's administrator makes tokens of that tenant only."""
    tenant = data.tenant or request.user.tenant
    if request.user.tenant not in (None, tenant):
        raise Forbidden(
            f"This token is of tenant {request.user.tenant!r} and makes tokens of that tenant only."
        )
    async with services(request).pool.acquire() as conn:
        ident, text = await tokens.create_token(conn, data.name, data.role, tenant)
    return TokenMade(id=ident, token=text, name=data.name, role=data.role, tenant=tenant)


@delete("/tokens/{token:str}", opt=ADMIN, summary="Revoke a token")
async def revoke_token(request: Call, token: FromPath[str]) -> None:
    """It stops working within five seconds. The token that asks cannot revoke itself."""
    if token == request.user.token:
        raise BadInput("This token cannot revoke itself: use another administrator's.")
    async with services(request).pool.acquire() as conn:
        await tokens.revoke_token(conn, token, tenant=request.user.tenant)


router = Router(
    "/",
    route_handlers=[list_tenants, create_tenant, list_tokens, create_token, revoke_token],
    tags=["access"],
)
