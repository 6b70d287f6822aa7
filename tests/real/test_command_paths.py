"""Which paths a command goes by when the device's migration changes under it."""

import time

import pytest
from mqtt_device import registered
from test_commands import car, ended, eventually, route, service, signing_in

from fleetlift.backend import commands
from fleetlift.backend.context import Context
from fleetlift.core.command import Path, Status
from fleetlift.core.errors import Conflict
from fleetlift.device.links import response
from fleetlift.device.messages import AnswerStatus
from fleetlift.sides.fleetlift import FleetliftSide
from fleetlift.store import commands as store

__all__ = ["service", "signing_in"]  # fixtures


async def test_after_a_release_a_device_left_on_the_old_side_is_refused_at_once(ctx: Context) -> None:
    await registered(ctx, "left", "moved")
    await route(ctx, "left", "old")
    await route(ctx, "moved", "both")
    side = FleetliftSide(ctx, tenant="t1", key=b"k" * 32)
    await side.withdraw(["left"], migration="another")
    await commands.create_command(ctx, "left", "lock")
    await side.withdraw(["left"], migration="m")
    with pytest.raises(Conflict, match="since migration 'm' was released"):
        await commands.create_command(ctx, "left", "lock")
    (path,) = (await commands.create_command(ctx, "moved", "lock")).paths
    assert path.path is Path.NEW


async def test_an_outcome_that_comes_by_the_new_link_ends_the_command_of_the_old_path(
    service: None, ctx: Context
) -> None:
    """The old link closed while the device was at work; the answer names the path of the command."""
    await registered(ctx, "car-1")
    await route(ctx, "car-1", "old")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=30)
        async with ctx.pool.acquire() as conn, conn.transaction():
            await store.record_answer(conn, made.id, "old", "acknowledged", {}, time.time())
        await one.mqtt.publish(
            f"$aws/commands/things/car-1/executions/{made.id}/response/json",
            response(AnswerStatus.SUCCEEDED, b'{"door": "left", "fleetlift.path": "old"}'),
        )
        done = await eventually(ctx, made.id, ended)
        assert (done.status, done.paths[0].path) == (Status.SUCCEEDED, Path.OLD)
        assert done.paths[0].detail == {"result": {"door": "left"}}
