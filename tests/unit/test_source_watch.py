"""How the mover looks at the source's schema while it follows: beside the rounds, and anew after a hold."""

import asyncio
from typing import cast

from fleetlift.mover.move import Move
from fleetlift.mover.source_watch import EVERY_S, SourceWatch


class Source:
    """Stands in for a move: what its source looks like."""

    name = "small"

    def __init__(self) -> None:
        self.changed = ""
        self.looks = 0
        self.away = False

    async def source_changed(self) -> str:
        self.looks += 1
        if self.away:
            raise ConnectionRefusedError("away")
        return self.changed


async def rounds(watch: SourceWatch, following: bool = True) -> str:
    said = ""
    for _ in range(5):
        said = watch.look(following)
        await asyncio.sleep(0)
    return said


async def test_it_is_looked_at_about_once_a_minute() -> None:
    now = [1000.0]
    source = Source()
    watch = SourceWatch(cast(Move, source), clock=lambda: now[0])
    assert await rounds(watch) == ""
    source.changed = "a new table"
    assert await rounds(watch) == ""
    assert source.looks == 1
    now[0] += EVERY_S
    assert await rounds(watch) == "a new table"
    source.away = True
    now[0] += EVERY_S
    assert await rounds(watch) == "a new table", "what cannot be read now is as it was"
    await watch.close()


async def test_after_a_hold_only_what_is_found_then_counts() -> None:
    source = Source()
    watch = SourceWatch(cast(Move, source))
    source.changed = "a new table"
    assert await rounds(watch) == "a new table"
    source.changed = ""
    assert await rounds(watch, following=False) == ""
    assert await rounds(watch) == ""
    assert source.looks == 2
    await watch.close()
