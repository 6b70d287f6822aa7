"""Commands: send one to a device, see what became of it by each path."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get, post
from litestar.params import FromPath, JSONBody

from fleetlift.api.auth import OPERATOR, VIEWER
from fleetlift.api.wire import LIMIT, After, Call, Limit, Listing, listing, moment, services, stamp
from fleetlift.backend import commands, registry
from fleetlift.core.command import (
    EXPIRES_IN_S_DEFAULT,
    EXPIRES_IN_S_MAX,
    EXPIRES_IN_S_MIN,
    Command,
    PathState,
)
from fleetlift.core.errors import NotFound
from fleetlift.store import commands as store


class CommandIn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`expires_in`: seconds it is good for. `mode` dry-run: the device answers what it would do."""

    name: str
    params: dict[str, Any] = {}
    expires_in: Annotated[float, msgspec.Meta(ge=EXPIRES_IN_S_MIN, le=EXPIRES_IN_S_MAX)] = (
        EXPIRES_IN_S_DEFAULT
    )
    mode: Literal["execute", "dry-run"] = "execute"


class PathOut(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a command by one path: `new` is Fleetlift's own MQTT, `old` a migration's other side.

    `latency`: seconds from its sending to the device's final answer; null when there was none.
    """

    path: str
    mode: str
    status: str
    attempts: int
    latency: float | None
    sent_at: datetime | None
    acknowledged_at: datetime | None
    ended_at: datetime | None
    detail: dict[str, Any]


class CommandOut(msgspec.Struct, frozen=True, kw_only=True):
    """A command: queued → sent → acknowledged → succeeded, failed, would-execute or expired."""

    id: str
    device: str
    tenant: str
    name: str
    params: dict[str, Any]
    mode: str
    status: str
    created_by: str
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
    paths: list[PathOut]


def shown_path(state: PathState) -> PathOut:
    return PathOut(
        path=state.path.value,
        mode=state.mode.value,
        status=state.status.value,
        attempts=state.attempts,
        latency=state.latency_s,
        sent_at=stamp(state.sent_at),
        acknowledged_at=stamp(state.acknowledged_at),
        ended_at=stamp(state.ended_at),
        detail=state.detail,
    )


def shown(command: Command) -> CommandOut:
    return CommandOut(
        id=command.id,
        device=command.device,
        tenant=command.tenant,
        name=command.name,
        params=command.params,
        mode=command.mode.value,
        status=command.status.value,
        created_by=command.created_by,
        created_at=moment(command.created_at),
        expires_at=moment(command.expires_at),
        ended_at=stamp(command.ended_at),
        paths=[shown_path(p) for p in command.paths],
    )


@post("/devices/{device:str}/commands", opt=OPERATOR, status_code=202, summary="Send a command")
async def send_command(request: Call, device: FromPath[str], data: JSONBody[CommandIn]) -> CommandOut:
    """By the paths that the device's migration names; both sides when it is under way."""
    new = commands.NewCommand(
        device=device, name=data.name, params=data.params, expires_in_s=data.expires_in, mode=data.mode
    )
    asked = commands.Asked(new, request.user.name, request.user.tenant)
    return shown(await services(request).intake.create(asked))


@get("/devices/{device:str}/commands", opt=VIEWER, summary="List a device's commands")
async def list_commands(
    request: Call, device: FromPath[str], limit: Limit = LIMIT, after: After = None
) -> Listing[CommandOut]:
    """Newest first."""
    async with services(request).pool.acquire() as conn:
        await registry.get_device(conn, device, tenant=request.user.tenant)
        return listing(await store.listed(conn, device, limit=limit, after=after), shown)


@get("/commands/{command:str}", opt=VIEWER, summary="Show a command")
async def show_command(request: Call, command: FromPath[str]) -> CommandOut:
    """Its status, and outcome and latency by each path."""
    found = await commands.get_command(services(request).ctx, command)
    if request.user.tenant not in (None, found.tenant):
        raise NotFound(f"command {command} is not known")
    return shown(found)


router = Router("/", route_handlers=[send_command, list_commands, show_command], tags=["commands"])
