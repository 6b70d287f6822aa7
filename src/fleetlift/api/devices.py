"""Devices: create or replace, list, show, delete."""

from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, delete, get, put
from litestar.params import FromPath, JSONBody, QueryParameter

from fleetlift.api.auth import ADMIN, VIEWER
from fleetlift.api.wire import (
    LIMIT,
    After,
    Call,
    Limit,
    Listing,
    listing,
    moment,
    owned_tenant,
    services,
    stamp,
)
from fleetlift.backend import registry
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.core.errors import BadInput, Forbidden
from fleetlift.core.where import MAX_LENGTH
from fleetlift.store.devices import Device

Where = Annotated[
    str,
    QueryParameter(
        max_length=MAX_LENGTH,
        description="Which ones: `attributes.hardware >= 3 and connected`.",
    ),
]
Tenant = Annotated[
    str | None,
    QueryParameter(max_length=63, description="Only this tenant's; for tokens of every tenant."),
]


class DeviceIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device as it is put. `credentials` left out keeps those it has; an empty list removes them."""

    tenant: str | None = None
    dialect: str = "native"
    attributes: dict[str, Any] = {}
    credentials: list[Credential] | None = None


class DeviceOut(msgspec.Struct, frozen=True, kw_only=True):
    """A device. `credentials` are the kinds it has; `since`: when it came or left, null if never seen."""

    id: str
    tenant: str
    dialect: str
    attributes: dict[str, Any]
    credentials: list[str]
    connected: bool
    since: datetime | None
    reason: str
    created_at: datetime
    updated_at: datetime


def shown(device: Device) -> DeviceOut:
    return DeviceOut(
        id=device.id,
        tenant=device.tenant,
        dialect=device.dialect,
        attributes=device.attributes,
        credentials=list(device.credentials),
        connected=device.connected,
        since=stamp(device.since),
        reason=device.reason,
        created_at=moment(device.created_at),
        updated_at=moment(device.updated_at),
    )


@get("/", opt=VIEWER, summary="List devices")
async def list_devices(
    request: Call, where: Where = "", tenant: Tenant = None, limit: Limit = LIMIT, after: After = None
) -> Listing[DeviceOut]:
    """By id. A tenant's token sees its own devices only."""
    async with services(request).pool.acquire() as conn:
        page = await registry.list_devices(
            conn, tenant=owned_tenant(request, tenant), where=where, limit=limit, after=after
        )
    return listing(page, shown)


@get("/{device:str}", opt=VIEWER, summary="Show a device")
async def show_device(request: Call, device: FromPath[str]) -> DeviceOut:
    async with services(request).pool.acquire() as conn:
        return shown(await registry.get_device(conn, device, tenant=request.user.tenant))


@put("/{device:str}", opt=ADMIN, summary="Create or replace a device")
async def put_device(request: Call, device: FromPath[str], data: JSONBody[DeviceIn]) -> Response[DeviceOut]:
    """201 when it is new. Secrets are stored hashed and never returned."""
    tenant = data.tenant or request.user.tenant
    if tenant is None:
        raise BadInput('tenant: name the tenant that owns the device, as in {"tenant": "carshare"}')
    if request.user.tenant not in (None, tenant):
        raise Forbidden(
            f"This token is of tenant {request.user.tenant!r} and cannot give devices to {tenant!r}."
        )
    async with services(request).pool.acquire() as conn:
        if request.user.tenant is not None:
            await registry.check_unclaimed(conn, device)
        existed = await conn.fetchval("SELECT true FROM device WHERE id = $1", device)
        put = await registry.put_device(
            conn,
            NewDevice(
                id=device,
                tenant=tenant,
                dialect=data.dialect,
                attributes=data.attributes,
                credentials=None if data.credentials is None else tuple(data.credentials),
            ),
        )
    return Response(shown(put), status_code=200 if existed else 201)


@delete("/{device:str}", opt=ADMIN, summary="Delete a device")
async def delete_device(request: Call, device: FromPath[str]) -> None:
    """It is disconnected and not let in again. What it has sent stays stored."""
    async with services(request).pool.acquire() as conn:
        await registry.delete_device(conn, device, tenant=request.user.tenant)


router = Router(
    "/devices", route_handlers=[list_devices, show_device, put_device, delete_device], tags=["devices"]
)
