"""Which devices a plan selects, and which of those it can move."""

from collections.abc import Sequence
from functools import lru_cache

from fleetlift.core import where
from fleetlift.core.migration import FleetDevice
from fleetlift.core.plan import Fleet, Plan


def cannot_move(fleet: Fleet, device: FleetDevice) -> str | None:
    """Why a selected device is never moved, or None when it can be."""
    if not fleet.updatable:
        if device.attributes.get("updatable") is False:
            return "cannot be updated: its attribute updatable is false"
        return None
    if where.evaluate(_condition(fleet.updatable), _record(fleet, device)):
        return None
    return f"cannot be updated: does not meet {fleet.updatable}"


def _record(fleet: Fleet, device: FleetDevice) -> dict[str, object]:
    """A device as conditions see it."""
    return {
        "id": device.id,
        "tenant": fleet.tenant,
        "attributes": device.attributes,
        "connected": device.connected,
    }


@lru_cache(maxsize=32)
def _condition(text: str) -> where.Expression:
    return where.parse(text)


def selected(plan: Plan, inventory: Sequence[FleetDevice]) -> tuple[FleetDevice, ...]:
    """The devices that the plan's `where` selects of an inventory."""
    if not plan.fleet.where.strip():
        return tuple(inventory)
    condition = where.parse(plan.fleet.where)
    return tuple(d for d in inventory if where.evaluate(condition, _record(plan.fleet, d)))
