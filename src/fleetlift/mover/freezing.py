"""The step `freeze`: the features' tables take no new rows of the tenant, for a bounded time.

The bound is kept by the database itself, so it holds also when nobody is left to thaw. Before the database is
switched every row is verified; where that outlasts the bound the features are frozen after it.
"""

from typing import Final

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.fence import Side
from fleetlift.core.tenant.plan import Freeze, SwitchDatabase, TenantPlan
from fleetlift.core.units import format_duration
from fleetlift.mover.move import Move
from fleetlift.tenant.fence import Fence

VERIFIED_WITHIN: Final = 0.5  # of the bound; where the copy's verification took longer, the next comes first


def fence_of(move: Move, closure: Closure, side: Side) -> Fence:
    """The fence of one side."""
    source = side is Side.SOURCE
    return Fence(
        move.source_url if source else move.target_url,
        closure,
        move=move.name,
        side=side,
        token=move.token,
        new_place=move.plan.new.mqtt or "its own database",
    )


def tables_of(plan: TenantPlan, step: Freeze) -> tuple[str, ...]:
    """The tables that the step's features fill, as `schema.table`."""
    names = [table for feature in step.features for table in plan.features[feature]]
    return tuple(dict.fromkeys(name if "." in name else f"public.{name}" for name in names))


async def freeze(move: Move, at: int) -> str:
    """Refuse new rows of the features' tables from now on, at the longest for the step's bound; or prepare
    it for the switch, which does it once it has verified."""
    step = move.plan.steps[at]
    assert isinstance(step, Freeze)
    fence = fence_of(move, await move.closure(), Side.SOURCE)
    try:
        move.tell("setting up the fence, open")
        await fence.install()
        move.kill("freeze-installed")
        if later := _outlasted(move, step):
            await fence.freeze(tables_of(move.plan, step), 0)
            await move.save(at, until_ms=0)
        else:
            await _freeze(move, at, step, fence)
    finally:
        await fence.aclose()
    if later:
        took = format_duration(round(later, 1))
        return f"{', '.join(step.features)} will be frozen by the switch, after verifying, which took {took}"
    return f"{', '.join(step.features)} frozen for {format_duration(step.at_most_s)} at the longest"


def _outlasted(move: Move, step: Freeze) -> float:
    """How long verifying took, when the step's bound would not do for a switch after it; else 0."""
    took_s = float(move.facts(0).get("verified_s", 0.0))
    switches = any(isinstance(one, SwitchDatabase) for one in move.plan.steps)
    return took_s if switches and took_s > step.at_most_s * VERIFIED_WITHIN else 0.0


async def _freeze(move: Move, at: int, step: Freeze, fence: Fence) -> None:
    until_ms = await fence.clock_ms() + round(step.at_most_s * 1000)
    await fence.freeze(tables_of(move.plan, step), until_ms)
    await move.save(at, until_ms=until_ms)


async def thawed(move: Move, fence: Fence) -> bool:
    """Whether the plan freezes features and they are not frozen now: not yet, or their bound has been hit."""
    freezes = any(isinstance(step, Freeze) for step in move.plan.steps)
    return freezes and not (await fence.state()).frozen


async def freeze_again(move: Move, fence: Fence) -> None:
    """Freeze the plan's features from now on, for their bound."""
    for at, step in enumerate(move.plan.steps):
        if isinstance(step, Freeze):
            move.tell(f"freezing {', '.join(step.features)}")
            await _freeze(move, at, step, fence)


async def still_frozen(move: Move, fence: Fence) -> None:
    """Raise Conflict when the plan freezes features and the bound has been hit meanwhile."""
    for at, step in enumerate(move.plan.steps):
        if not isinstance(step, Freeze) or not move.facts(at).get("until_ms"):
            continue
        if not (await fence.state()).frozen:
            raise Conflict(
                f"the freeze of {', '.join(step.features)} ended after {format_duration(step.at_most_s)}, "
                "before the database was switched; the source serves on. Resume, and they are frozen again "
                "once every row has been verified; or revert"
            )


async def undo_freeze(move: Move, at: int) -> str:
    fence = fence_of(move, await move.closure(), Side.SOURCE)
    try:
        await fence.unfreeze()
        move.kill("thawed")
        await fence.remove()
        move.kill("fence-removed")
    finally:
        await fence.aclose()
    await move.forget(at)
    return "thawed"
