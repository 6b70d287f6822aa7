"""Which migration has a device: one at a time, also when two are started or resumed in the same instant."""

from collections.abc import Sequence
from typing import Final

from fleetlift.core.errors import Conflict
from fleetlift.core.migration import MemberState, Phase
from fleetlift.core.units import format_devices, format_some
from fleetlift.store.pool import Conn, lock_key

# A migration in one of these has its devices to itself.
BUSY: Final = (Phase.RUNNING, Phase.PAUSED, Phase.HELD, Phase.REVERTING, Phase.FINISHED)


class Claimed(Conflict):
    """Devices are part of another migration. `devices` says of which."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.devices = dict(pairs)
        names = format_some([device for device, _ in pairs], 3)
        others = format_some(sorted({repr(other) for _, other in pairs}), 3)
        super().__init__(
            f"{format_devices(len(pairs))} ({names}) {'is' if len(pairs) == 1 else 'are'} part of migration "
            f"{others}: revert or release that one first"
        )


async def claim(conn: Conn, name: str, devices: Sequence[str]) -> None:
    """Raise Claimed when a migration other than `name` has one of `devices`.

    Until the caller's transaction ends, no other one takes any: of two that come together one is turned away.
    """
    if not devices:
        return
    await conn.execute("SELECT pg_advisory_xact_lock($1)", lock_key("devices of migrations"))
    taken = [(device, other) for device, other in await claimed(conn, devices) if other != name]
    if taken:
        raise Claimed(taken)


async def claimed(conn: Conn, devices: Sequence[str]) -> list[tuple[str, str]]:
    """(device, migration) of those `devices` that a migration has to itself."""
    rows = await conn.fetch(
        "SELECT m.device, m.migration FROM engine.member m JOIN engine.migration g ON g.name = m.migration "
        "WHERE g.phase = ANY($2::text[]) AND m.state <> $3 AND m.device = ANY($1::text[]) "
        "ORDER BY 1 LIMIT 1000",
        devices,
        [p.value for p in BUSY],
        MemberState.EXCLUDED.value,
    )
    return [(row["device"], row["migration"]) for row in rows]


async def claimed_from(conn: Conn, name: str, *, device: str | None = None) -> list[tuple[str, str]]:
    """(device, other migration) of the devices of `name` that another one has by now.

    `device`: this one only, also where `name` excludes it.
    """
    members = await conn.fetch(
        "SELECT device FROM engine.member WHERE migration = $1 "
        "AND (device = $2::text OR ($2::text IS NULL AND state <> $3))",
        name,
        device,
        MemberState.EXCLUDED.value,
    )
    return [
        (one, other)
        for one, other in await claimed(conn, [row["device"] for row in members])
        if other != name
    ]
