"""The account of a soak: what devices and callers were promised, against what is stored.

Two sides that share nothing. What was promised: every seq that a side acknowledged to a device, every command
that the API took, every execution that a device noted before it began. What is stored: every row, by a plain
query, not by Fleetlift's own ledger.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence

import asyncpg
import msgspec

from fleetlift.core.command import FINAL
from fleetlift.core.ranges import RangeSet
from fleetlift.device.fleet import DeviceTruth
from fleetlift.load.world import World

SETTLE_S = 60.0  # the old side's feed and the last batch may be so far behind what was acknowledged
CLOSE_S = 45.0  # a command is closed so long after its expiry at the latest

Channel = tuple[str, str]  # device, channel

_ROWS = """
SELECT device, channel, seq, count(*) FROM telemetry
 WHERE device = ANY($1) AND seq IS NOT NULL GROUP BY device, channel, seq
"""
_COMMANDS = """
SELECT c.id::text AS id, c.status, c.ended_at IS NOT NULL AS ended,
    extract(epoch FROM c.expires_at)::float8 AS expires_at FROM command c
 WHERE c.device = ANY($1)
"""


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """What the two sides come to. `problems` says which promise broke, and where."""

    messages_acknowledged: int = 0
    messages_stored: int = 0
    messages_waiting: int = 0  # on the devices still
    messages_lost: int = 0
    messages_twice: int = 0
    commands_taken: int = 0
    commands_lost: int = 0  # taken by the API, and not to be found
    commands_unfinished: int = 0
    commands_changed: int = 0  # that had a final state, and later another one
    commands_executed: int = 0
    commands_executed_twice: int = 0
    commands_by_status: Mapping[str, int] = {}
    executed_but_expired: int = 0  # told to the caller as expired: the answer came too late
    problems: Sequence[str] = ()

    @property
    def good(self) -> bool:
        return not self.problems


class Accountant:
    """Lays the two sides side by side, again and again, and remembers final states that it has seen."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.taken: list[str] = []  # ids of commands that the API has taken
        self._final: dict[str, str] = {}

    async def balance(self) -> Ledger:
        """The ledger of now, once what is on its way has had its time."""
        truth, waiting = self._acknowledged()
        deadline = time.monotonic() + SETTLE_S
        while True:
            async with self._world.database() as connection:
                stored, rows, twice = await _stored(connection, self._world.devices)
            lost = {
                key: gone for key, seqs in truth.items() if (gone := seqs.minus(stored.get(key, RangeSet())))
            }
            if not lost or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        problems = [f"{device} {channel}: lost {gone.to_pg()}" for (device, channel), gone in lost.items()]
        problems += [f"{device} {channel}: {n} rows repeat a seq" for (device, channel), n in twice.items()]
        async with self._world.database() as connection:
            commands = await self._commands(connection, problems)
        return msgspec.structs.replace(
            commands,
            messages_acknowledged=sum(seqs.count for seqs in truth.values()),
            messages_stored=rows,
            messages_waiting=waiting,
            messages_lost=sum(gone.count for gone in lost.values()),
            messages_twice=sum(twice.values()),
            problems=problems,
        )

    def _acknowledged(self) -> tuple[dict[Channel, RangeSet], int]:
        told: Mapping[str, DeviceTruth] = self._world.told().truth or {}
        found: dict[Channel, RangeSet] = {}
        waiting = 0
        for device, known in told.items():
            for channel, seqs in known.channels.items():
                ranges = found.setdefault((device, channel), RangeSet())
                for first, last in seqs.acked:
                    ranges.add_range(first, last + 1)
                waiting += sum(last - first + 1 for first, last in seqs.waiting)
        return found, waiting

    async def _commands(
        self, connection: "asyncpg.Connection[asyncpg.Record]", problems: list[str]
    ) -> Ledger:
        executions = self._world.executions()
        taken = list(self.taken)
        found = {row["id"]: row for row in await connection.fetch(_COMMANDS, self._world.devices)}
        lost = [one for one in taken if one not in found]
        late = time.time() - CLOSE_S
        unfinished = [one for one, row in found.items() if not row["ended"] and row["expires_at"] < late]
        changed = []
        by_status: dict[str, int] = {}
        for one, row in found.items():
            if not row["ended"]:
                continue
            status = row["status"]
            by_status[status] = by_status.get(status, 0) + 1
            if status not in FINAL:
                problems.append(f"command {one} has ended as {status}, which is no final state")
            if self._final.setdefault(one, status) != status:
                changed.append(one)
                problems.append(f"command {one} was {self._final[one]} and then {status}")
        executed_twice = [one for one, times in executions.items() if times > 1]
        problems += [f"command {one} was taken and is not there" for one in lost]
        problems += [f"command {one} has no final state long after its expiry" for one in unfinished]
        problems += [f"command {one} was executed {executions[one]} times" for one in executed_twice]
        return Ledger(
            commands_taken=len(taken),
            commands_lost=len(lost),
            commands_unfinished=len(unfinished),
            commands_changed=len(changed),
            commands_executed=len(executions),
            commands_executed_twice=len(executed_twice),
            commands_by_status=dict(sorted(by_status.items())),
            executed_but_expired=sum(
                one in executions and row["ended"] and row["status"] == "expired"
                for one, row in found.items()
            ),
        )


async def _stored(
    connection: "asyncpg.Connection[asyncpg.Record]", devices: Sequence[str]
) -> tuple[dict[Channel, RangeSet], int, dict[Channel, int]]:
    """By channel the seqs that are stored, how many rows that is, and how many rows repeat one."""
    seqs: dict[Channel, RangeSet] = {}
    twice: dict[Channel, int] = {}
    rows = 0
    async with connection.transaction(readonly=True):
        async for device, channel, seq, copies in connection.cursor(_ROWS, devices):
            key = (device, channel)
            seqs.setdefault(key, RangeSet()).add(seq)
            rows += copies
            if copies > 1:
                twice[key] = twice.get(key, 0) + copies - 1
    return seqs, rows, twice
