"""A release: nothing of the move stays on either side."""

import msgspec

from fleetlift.core.dns import RecordSet
from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.plan import SwitchDns
from fleetlift.mover.move import Move
from fleetlift.mover.naming import lever_of
from fleetlift.mover.streams import Streams
from fleetlift.tenant import ddl
from fleetlift.tenant.emptying import is_there
from fleetlift.tenant.follow import Direction
from fleetlift.tenant.leftovers import clean, leftovers


async def clean_up(move: Move, streams: Streams) -> str:
    """Slots, publications, fences, bookkeeping and settings go; the names get their own TTL again.

    All of it is found by its name: which rows the tenant has need not be known any more, and a database that
    is gone has nothing left in it.
    """
    for direction in Direction:
        await streams.stop(direction)
    if await is_there(move.target_url):
        await ddl.open_triggers(move.target_url)
    for at, step in enumerate(move.plan.steps):
        originals = move.facts(at).get("originals")
        if isinstance(step, SwitchDns) and originals is not None:
            async with lever_of(move, step) as lever:
                await lever.restore_ttl(msgspec.convert(originals, tuple[RecordSet, ...]))
    left = []
    urls = {"source": move.source_url, "target": move.target_url}
    for name, other in (("target", "source"), ("source", "target")):
        if await is_there(urls[name]):
            await clean(urls[name], move.name, other_url=urls[other])
            left += [f"{name}: {one.text}" for one in await leftovers(urls[name], move.name)]
        move.kill(f"{name}-released")
    if left:
        raise Conflict("these are still there: " + "; ".join(left))
    move.forget_spools()
    move.kill("all-released")
    return "nothing of the move is left on either side"
