"""The verdict of the demo: what the devices say they handed over, against what is stored.

Two accounts that share nothing stand side by side. The fleet's own: every seq that a backend acknowledged,
every command that a vehicle really executed. The backend's: every row, by a plain query, not by the ledger.
"""

from collections.abc import Mapping, Sequence

import asyncpg
import msgspec
from rich.table import Table
from rich.text import Text

from fleetlift.core.ranges import RangeSet
from fleetlift.device.fleet import DeviceTruth
from fleetlift.migrate.page import Figure, duration_figure

Channel = tuple[str, str]  # device, channel

COPIES = """
SELECT device, channel, seq, count(*) FROM telemetry
 WHERE device = ANY($1) AND seq IS NOT NULL GROUP BY device, channel, seq
"""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the backend holds: seqs by channel, and rows that repeat a seq of their channel."""

    seqs: Mapping[Channel, RangeSet]
    rows: int
    repeated: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's result; `build/demo/verdict.json` holds it. `gap_s` None: no gap was seen."""

    finished: bool
    devices: int
    moved: int
    stayed: int
    messages_sent: int
    messages_stored: int
    messages_lost: int
    messages_twice: int
    commands_sent: int
    commands_executed: int
    commands_executed_twice: int
    commands_unfinished: int
    longest_gap_s: float | None
    reverts: int
    lasted_s: float

    @property
    def good(self) -> bool:
        return self.finished and not (
            self.messages_lost
            or self.messages_twice
            or self.commands_executed_twice
            or self.commands_unfinished
            or self.messages_sent == 0
            or self.commands_executed == 0
        )


async def read_stored(database_url: str, devices: Sequence[str]) -> Stored:
    """Every counted row of the devices, read back by a query that shares nothing with the ledger."""
    conn = await asyncpg.connect(database_url)
    try:
        async with conn.transaction(readonly=True):
            rows = repeated = 0
            seqs: dict[Channel, RangeSet] = {}
            async for device, channel, seq, copies in conn.cursor(COPIES, devices):
                seqs.setdefault((device, channel), RangeSet()).add(seq)
                rows += copies
                repeated += copies - 1
    finally:
        await conn.close()
    return Stored(seqs=seqs, rows=rows, repeated=repeated)


def acknowledged(truth: Mapping[str, DeviceTruth]) -> dict[Channel, RangeSet]:
    """By channel, the seqs that some side has acknowledged to the device."""
    found: dict[Channel, RangeSet] = {}
    for device, told in truth.items():
        for channel, seqs in told.channels.items():
            ranges = found.setdefault((device, channel), RangeSet())
            for first, last in seqs.acked:
                ranges.add_range(first, last + 1)
    return found


async def read_unfinished(database_url: str, commands: Sequence[str]) -> int:
    """How many of these commands have no final state yet."""
    conn = await asyncpg.connect(database_url)
    try:
        found = await conn.fetchval(
            "SELECT count(*) FROM command WHERE id = ANY($1::uuid[]) AND ended_at IS NULL", list(commands)
        )
        return int(found)
    finally:
        await conn.close()


def missing(acknowledged: Mapping[Channel, RangeSet], stored: Stored) -> int:
    """How many acknowledged messages are not stored."""
    nothing = RangeSet()
    return sum(seqs.minus(stored.seqs.get(key, nothing)).count for key, seqs in acknowledged.items())


def figures(verdict: Verdict) -> list[Figure]:
    """The verdict as the report shows it, each promise with its sign."""
    return [
        Figure(label="messages sent", value=f"{verdict.messages_sent:,}"),
        Figure(label="messages stored", value=f"{verdict.messages_stored:,}"),
        Figure(label="messages lost", value=f"{verdict.messages_lost:,}", good=verdict.messages_lost == 0),
        Figure(label="stored twice", value=f"{verdict.messages_twice:,}", good=verdict.messages_twice == 0),
        Figure(label="commands executed", value=f"{verdict.commands_executed:,}"),
        Figure(
            label="commands executed twice",
            value=f"{verdict.commands_executed_twice:,}",
            good=verdict.commands_executed_twice == 0,
        ),
        Figure(label="longest gap of service of any device", value=duration_figure(verdict.longest_gap_s)),
        Figure(label="waves that went back", value=f"{verdict.reverts:,}"),
    ]


def shown(verdict: Verdict) -> Table:
    """The verdict as a table for the terminal."""
    table = Table(title="Verdict", title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    for figure in figures(verdict):
        sign, style = {True: ("✓ ", "green"), False: ("✗ ", "bold red"), None: ("  ", "")}[figure.good]
        table.add_row(Text(figure.value, style="bold"), Text(sign + figure.label, style=style))
    table.add_row(
        Text(f"{verdict.moved} of {verdict.devices}", style="bold"),
        Text(f"  devices are on the new side; {verdict.stayed} are still served by the old one"),
    )
    if verdict.commands_unfinished:
        unfinished = Text(str(verdict.commands_unfinished), style="bold")
        table.add_row(unfinished, Text("✗ commands without a final state", style="bold red"))
    return table
