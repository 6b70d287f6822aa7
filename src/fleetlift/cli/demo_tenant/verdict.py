"""What the demo's move came to."""

from collections.abc import Sequence

import msgspec
from rich.table import Table
from rich.text import Text

from fleetlift.migrate.page import Figure, duration_figure


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The figures by which the demo is judged. `rows_lost`: acknowledged writes that are not on the target,
    and rows that a verification misses there."""

    finished: bool
    rows_moved: int
    rows_lost: int
    rows_leaked: int
    writes: int
    writes_refused: int
    freeze_s: float | None
    longest_wait_s: float
    devices: int
    messages_sent: int
    messages_lost: int
    messages_twice: int
    stragglers: int
    longest_gap_s: float
    rehearsed: bool
    left_on_source: int
    lasted_s: float

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return (
            self.finished
            and self.rehearsed
            and self.rows_moved > 0
            and self.messages_sent > 0
            and not (self.rows_lost or self.rows_leaked or self.messages_lost or self.left_on_source)
        )


def figures(v: Verdict) -> Sequence[Figure]:
    """As the report shows them."""
    return (
        Figure(label="rows moved, every one verified", value=f"{v.rows_moved:,}", good=v.rows_moved > 0),
        Figure(label="rows lost", value=f"{v.rows_lost:,}", good=v.rows_lost == 0),
        Figure(label="rows of other tenants", value=f"{v.rows_leaked:,}", good=v.rows_leaked == 0),
        Figure(label="writers stood still", value=duration_figure(v.freeze_s)),
        Figure(label="writes refused meanwhile", value=f"{v.writes_refused:,}"),
        Figure(label="messages of devices", value=f"{v.messages_sent:,}", good=v.messages_sent > 0),
        Figure(label="messages lost", value=f"{v.messages_lost:,}", good=v.messages_lost == 0),
        Figure(label="longest gap of a device", value=duration_figure(v.longest_gap_s)),
        Figure(label="left on the source", value=f"{v.left_on_source}", good=v.left_on_source == 0),
    )


def shown(v: Verdict) -> Table:
    """As the terminal shows them."""
    table = Table(
        title="Verdict: every promise was kept" if v.good else "Verdict: something was not kept",
        title_style="bold green" if v.good else "bold red",
        show_header=False,
        box=None,
        padding=(0, 2),
    )
    for figure in figures(v):
        sign = {True: ("✓", "green"), False: ("✗", "red"), None: ("", "")}[figure.good]
        table.add_row(Text(sign[0], style=sign[1]), figure.label, Text(figure.value, style=f"bold {sign[1]}"))
    table.add_row(
        "",
        "writes acknowledged, longest wait of one",
        Text(f"{v.writes:,}, {v.longest_wait_s:.2f} s"),
    )
    table.add_row("", "devices on line, forwarded by the relay", Text(f"{v.devices}, {v.stragglers}"))
    table.add_row("", "lasted", Text(f"{v.lasted_s:.0f} s"))
    return table
