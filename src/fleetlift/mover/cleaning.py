"""A release: nothing of the move stays on either side."""

import msgspec

from fleetlift.core.dns import RecordsChanged, RecordSet
from fleetlift.core.errors import Conflict, NotFound, Unavailable
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
    is gone has nothing left in it. The databases come first: a slot that nobody reads fills their disks,
    while a name server may be away for long.
    """
    for direction in Direction:
        await streams.stop(direction)
    if await is_there(move.target_url):
        await ddl.open_triggers(move.target_url)
    left = []
    urls = {"source": move.source_url, "target": move.target_url}
    for name, other in (("target", "source"), ("source", "target")):
        if await is_there(urls[name]):
            await clean(urls[name], move.name, other_url=urls[other])
            left += [f"{name}: {one.text}" for one in await leftovers(urls[name], move.name)]
        move.kill(f"{name}-released")
    if left:
        raise Conflict("these are still there: " + "; ".join(left))
    others = await _restore_ttls(move)
    move.forget_spools()
    move.kill("all-released")
    return "nothing of the move is left on either side" + "".join(f"; {one}" for one in others)


async def _restore_ttls(move: Move) -> list[str]:
    """Give the names their own TTL again; which of them are somebody else's by now, and stay as they are."""
    others = []
    for at, step in enumerate(move.plan.steps):
        held = move.facts(at).get("originals")
        if not isinstance(step, SwitchDns) or held is None:
            continue
        originals = msgspec.convert(held, tuple[RecordSet, ...])
        async with lever_of(move, step) as lever:
            for name in dict.fromkeys(one.name for one in originals):
                try:
                    await lever.restore_ttl(originals, names=[name])
                except (NotFound, RecordsChanged) as error:
                    others.append(f"{error}; its TTL is left as it is")
                except Unavailable as error:  # told, and tried again
                    raise Conflict(f"{name} has not got its own TTL again: {error}") from error
    return others
