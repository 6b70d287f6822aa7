"""Which paths a command goes by when the device's migration changes under it."""

import pytest
from mqtt_device import registered
from test_commands import route

from fleetlift.backend import commands
from fleetlift.backend.context import Context
from fleetlift.core.command import Path
from fleetlift.core.errors import Conflict
from fleetlift.sides.fleetlift import FleetliftSide


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
