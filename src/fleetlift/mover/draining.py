"""The step `drain: old`: until hardly anybody comes to the old address, or those who do are forwarded."""

import asyncio
import time
from typing import Final

from msgspec.structs import replace

from fleetlift.core.stale_tail import may_release
from fleetlift.core.tenant.plan import Drain, SwitchDns
from fleetlift.core.units import format_some
from fleetlift.mover.measuring import last_on_new
from fleetlift.mover.move import Move
from fleetlift.mover.naming import devices_of, relay_of, step_ttl_s

LOOK_EVERY_S: Final = 1.0
SMALLEST_SHARE: Final = 1e-9


async def drain(move: Move, at: int) -> str:
    """Wait, and show who still comes. With `stragglers: relay` those who come are served by the new side all
    the same, so that only the gentle release is waited for."""
    step = move.plan.steps[at]
    assert isinstance(step, Drain)
    names = next((n for n, one in enumerate(move.plan.steps) if isinstance(one, SwitchDns)), None)
    relay = relay_of(move)
    if relay is None or names is None:
        return "nobody stands at the old address to count who comes: nothing to wait for"
    switch = move.plan.steps[names]
    assert isinstance(switch, SwitchDns)
    switched_at = move.facts(names).get("switched_at")
    quiet_s = max(step.quiet_s, step_ttl_s(switch))  # who was let go just now is none who stays
    let_go_at: float | None = None
    async with relay:
        await relay.release(step.release_per_s)
        move.kill("drain-begun")
        while True:
            now = time.time()  # before it is asked: whose connection is open then is seen later than this
            tail = await relay.tail(
                await devices_of(move),
                on_new=await last_on_new(move.backend, move.plan.tenant),
                switched_at=switched_at,
                ttl_s=step_ttl_s(switch),
            )
            tail = replace(tail, strangers={})  # devices of other tenants come there, and stay
            found = may_release(
                tail,
                now=now,
                epsilon=max(step.stale_share, SMALLEST_SHARE),
                longest_sleep_s=step.quiet_s,
            )
            release = await relay.release_status()
            forwarded = len(found.stale)
            move.tell(
                f"{forwarded} still come to the old address: {format_some(found.stale, 5)}"
                if forwarded
                else "nobody comes to the old address any more",
                stragglers=forwarded,
                never_seen=len(found.never_seen),
                released=release.closed,
            )
            if found.allowed:
                return "nobody comes to the old address any more"
            if release.running and release.left:
                let_go_at = None
            elif let_go_at is None:
                let_go_at = time.time()
            if step.relay and let_go_at is not None and time.time() - let_go_at >= quiet_s:
                who = f" ({format_some(found.stale, 5)})" if forwarded else ""
                return f"{forwarded} still come to the old address and are forwarded{who}"
            await asyncio.sleep(LOOK_EVERY_S)


async def undo_drain(move: Move, at: int) -> str:
    relay = relay_of(move)
    if relay is not None:
        async with relay:
            await relay.stop_release()
    move.kill("drain-stopped")
    return "nothing to take back"
