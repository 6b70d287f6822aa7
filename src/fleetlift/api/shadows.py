"""Shadows: what a device should be and what it says it is, by AWS's rules."""

from typing import Annotated

from litestar import Router, delete, get, patch
from litestar.params import FromPath, QueryParameter, RawBody

from fleetlift.api.auth import OPERATOR, VIEWER
from fleetlift.api.wire import LIMIT, After, Call, Limit, Listing, services
from fleetlift.backend import registry, shadows
from fleetlift.core.errors import Forbidden
from fleetlift.core.orders import SHADOW_NAME
from fleetlift.core.shadow import Deleted, Document

Name = Annotated[str, QueryParameter(max_length=64, description="A named shadow; the classic one without.")]


async def check_device(request: Call, device: str) -> None:
    """NotFound unless the device is there and the caller's to see."""
    async with services(request).pool.acquire() as conn:
        await registry.get_device(conn, device, tenant=request.user.tenant)


async def check_change(request: Call, device: str, name: str) -> None:
    """The same, and Forbidden where a tenant's token would give orders, or make up what a device reports."""
    await check_device(request, device)
    if name == SHADOW_NAME and request.user.tenant is not None:
        raise Forbidden(
            f"The shadow {SHADOW_NAME!r} carries the orders of migrations: changing it by hand takes a token "
            "of every tenant. A tenant's operator pauses, resumes and reverts the migration instead."
        )


@get("/devices/{device:str}/shadow", opt=VIEWER, summary="Show a shadow")
async def get_shadow(request: Call, device: FromPath[str], name: Name = "") -> Document:
    """`state` with desired, reported and delta, `metadata`, `version`, `timestamp`."""
    await check_device(request, device)
    return await shadows.get_shadow(services(request).ctx, device, name)


@patch("/devices/{device:str}/shadow", opt=OPERATOR, summary="Change a shadow")
async def update_shadow(request: Call, device: FromPath[str], body: RawBody, name: Name = "") -> Document:
    """A shadow update document: `{"state": {"desired": {...}}, "version": 3}`. Null removes a key."""
    await check_change(request, device, name)
    return await shadows.update_shadow(services(request).ctx, device, name, body)


@delete("/devices/{device:str}/shadow", opt=OPERATOR, status_code=200, summary="Delete a shadow")
async def delete_shadow(request: Call, device: FromPath[str], name: Name = "") -> Deleted:
    """Its version goes on when it is made again within 48 hours."""
    await check_change(request, device, name)
    return await shadows.delete_shadow(services(request).ctx, device, name)


@get("/devices/{device:str}/shadows", opt=VIEWER, summary="List a device's named shadows")
async def list_shadows(
    request: Call, device: FromPath[str], limit: Limit = LIMIT, after: After = None
) -> Listing[str]:
    """Without the classic one."""
    await check_device(request, device)
    page = await shadows.list_named(services(request).ctx, device, limit=limit, after=after)
    return Listing(list(page.items), page.next)


router = Router(
    "/", route_handlers=[get_shadow, update_shadow, delete_shadow, list_shadows], tags=["shadows"]
)
