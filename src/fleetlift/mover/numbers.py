"""Up to which number the new side had each channel before names went over.

Devices that went over once, back, and over again have numbered messages on both sides. What they sent to the
old side in between is not missing on the new one, so completeness counts from here on.
"""

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from fleetlift.core.telemetry import MQTT_PATH
from fleetlift.core.tenant.plan import TenantPlan
from fleetlift.mover.move import Move

FILE: Final = "numbers-{at}.json"


class Before(msgspec.Struct, frozen=True):
    """`upto`: of each channel, the first number that has not come yet."""

    devices: list[str] = []
    channels: list[str] = []
    upto: list[int] = []


def tenants_of(plan: TenantPlan) -> list[str]:
    """Whose devices the names of a plan lead: the tenant's own, and the test pool's."""
    return [plan.tenant, *([plan.rehearsal.tenant] if plan.rehearsal is not None else [])]


async def note_numbers(move: Move, at: int) -> None:
    """Keep what the new side has now, before the first name changes."""
    rows = await move.backend.fetch(_UPTO_SQL, tenants_of(move.plan), MQTT_PATH)
    before = Before(
        [row["device"] for row in rows], [row["channel"] for row in rows], [row["upto"] for row in rows]
    )
    await asyncio.to_thread(_write, _path(move, at), before)


async def numbers_before(move: Move, at: int) -> Before:
    """What was kept; nothing when there was nothing to keep."""
    try:
        return msgspec.json.decode(await asyncio.to_thread(_path(move, at).read_bytes), type=Before)
    except FileNotFoundError:
        return Before()


def forget_numbers(move: Move, at: int) -> None:
    _path(move, at).unlink(missing_ok=True)


def _path(move: Move, at: int) -> Path:
    return move.directory / FILE.format(at=at)


def _write(path: Path, before: Before) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(before))
    part.replace(path)


_UPTO_SQL = """
SELECT l.device, l.channel, upper(l.ranges) AS upto FROM ledger l JOIN device d ON d.id = l.device
WHERE d.tenant = ANY($1) AND l.path = $2 AND NOT isempty(l.ranges)
"""
