"""What the command line puts on a screen: tables that fit, states with a sign, progress, JSON.

Colour is never the only sign: every coloured word carries a mark (✓ ✗ ! …) as well. Output for programs goes
to standard output, remarks and errors to standard error.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

# word → (mark, style): every state that any list or screen shows
SIGNS: Mapping[str, tuple[str, str]] = {
    "succeeded": ("✓", "green"),
    "finished": ("✓", "green"),
    "advance": ("✓", "green"),
    "moved": ("✓", "green"),
    "connected": ("●", "green"),
    "ok": ("✓", "green"),
    "done": ("✓", "green"),
    "in sync": ("✓", "green"),
    "would-execute": ("≈", "green"),
    "released": ("✓", "green"),
    "running": ("▶", "cyan"),
    "open": ("▶", "cyan"),
    "moving": ("→", "cyan"),
    "sent": ("→", "cyan"),
    "acknowledged": ("→", "cyan"),
    "baking": ("◷", "cyan"),
    "awaiting-approval": ("?", "yellow"),
    "queued": ("·", ""),
    "waiting": ("·", "dim"),
    "duplicate": ("=", "dim"),
    "excluded": ("-", "dim"),
    "away": ("○", "dim"),
    "never seen": ("○", "dim"),
    "skipped": ("-", "dim"),
    "revoked": ("-", "dim"),
    "paused": ("‖", "yellow"),
    "hold": ("!", "yellow"),
    "held": ("!", "yellow"),
    "drifted": ("!", "yellow"),
    "straggler": ("!", "yellow"),
    "unreachable": ("!", "yellow"),
    "would-refuse": ("!", "yellow"),
    "expired": ("✗", "red"),
    "failed": ("✗", "red"),
    "reverting": ("↩", "red"),
    "returning": ("↩", "red"),
    "revert": ("✗", "red"),
    "reverted": ("↩", "red"),
    "returned": ("↩", "yellow"),
}


def out() -> Console:
    """The console for results. Piped output gets room for whole lines."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def err() -> Console:
    return Console(stderr=True, highlight=False)


def signed(word: str, label: str = "") -> Text:
    """`word` (or `label`) with the mark and colour of the state it names."""
    mark, style = SIGNS.get(word, ("", ""))
    return Text(f"{mark} {label or word}".strip(), style=style)


def fail(text: str, advice: str = "") -> None:
    """One red line to standard error, and what to do."""
    console = err()
    console.print(Text("✗ ", style="bold red") + Text(text, style="red"), soft_wrap=True)
    if advice:
        console.print(Text(f"  {advice}", style="dim"), soft_wrap=True)


def note(text: str) -> None:
    """A remark to standard error, so that standard output stays clean for programs."""
    err().print(Text(text, style="dim"), soft_wrap=True)


def say(mark_of: str, text: str) -> None:
    """One line of result that begins with the mark of the state `mark_of`."""
    mark, style = SIGNS.get(mark_of, ("", ""))
    out().print(Text(f"{mark} ", style=style) + Text(text), soft_wrap=True)


def emit_json(value: Any) -> None:
    """`value` as indented JSON on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def when(stamp: str | float | None) -> str:
    """A moment in the reader's own time zone, to the second; '' for none."""
    if stamp is None or stamp == "":
        return ""
    moment = (
        datetime.fromtimestamp(stamp, UTC)
        if isinstance(stamp, int | float)
        else datetime.fromisoformat(stamp)
    )
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float | None) -> str:
    """A duration as people say it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min, 3 d 4 h; '–' for None."""
    if seconds is None:
        return "–"
    if seconds < 0:
        return "-" + span(-seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def compact(value: Any, width: int = 60) -> str:
    """A JSON value on one line, cut with '…' at `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return text if len(text) <= width else text[: width - 1] + "…"


GAP = 2  # between two columns
LONG = 24  # a column this wide or narrower is never cut

Cell = str | Text | int | float | None
Column = tuple[str, Callable[[Mapping[str, Any]], Cell]]


def listing(
    items: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    as_json: bool,
    empty: str,
    more: bool = False,
) -> None:
    """A list: a table for people (`columns`: heading and how to read the cell), or JSON for programs.

    `empty` is said instead of an empty table; `more` adds that the list goes on.
    """
    if as_json:
        emit_json(list(items))
        return
    if not items:
        note(empty)
        return
    console = out()
    rows = [[read(item) for _, read in columns] for item in items]
    cells = [[_cell(value) for value in row] for row in rows]
    natural = [
        max(cell_len(heading), *(row[n].cell_len for row in cells))
        if any(row[n].plain for row in cells)
        else 0
        for n, (heading, _) in enumerate(columns)
    ]
    widths = fitting(natural, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for n, width in widths.items():
        numeric = all(isinstance(row[n], int | float) or row[n] is None for row in rows)
        justify: JustifyMethod = "right" if numeric else "left"
        table.add_column(columns[n][0], justify=justify, width=width, overflow="ellipsis", no_wrap=True)
    for line in cells:
        table.add_row(*(line[n] for n in widths))
    console.print(table)
    if left_out := [heading for n, (heading, _) in enumerate(columns) if natural[n] and n not in widths]:
        note(f"No room for: {', '.join(left_out)}. A wider terminal or --json shows them.")
    if more:
        note("There is more: raise --limit, or narrow the list.")


def fitting(natural: Sequence[int], room: int) -> dict[int, int]:
    """Which columns of a table to show in `room` characters, and how wide.

    Empty columns (natural width 0) go. Long ones give way down to `LONG`; if that is not enough, columns are
    left out from the right. The first, which names the row, always stays whole: it is what people copy.
    """
    shown = [n for n, width in enumerate(natural) if width or n == 0]
    least = {n: natural[n] if n == 0 else min(natural[n], LONG) for n in shown}
    while len(shown) > 1 and sum(least[n] + GAP for n in shown) - GAP > room:
        shown.pop()
    spare = room - (sum(least[n] + GAP for n in shown) - GAP)
    widths = {}
    for n in shown:
        more = max(0, min(spare, natural[n] - least[n]))
        widths[n], spare = least[n] + more, spare - more
    return widths


def _cell(value: Cell) -> Text:
    if isinstance(value, Text):
        return value
    return Text("" if value is None else f"{value:,}" if isinstance(value, int | float) else value)


def details(pairs: Iterable[tuple[str, Cell]]) -> None:
    """One thing: a line for each property."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, _cell(value))
    out().print(table)


class Advance(Protocol):
    """Tells a progress bar that `by` more is done, and of how much in all when that is known by now."""

    def __call__(self, by: float, total: float | None = None) -> None: ...


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "") -> Iterator[Advance]:
    """A progress bar with rate and time left; yields `advance`. Silent away from a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if not task.speed else f"{task.speed:,.0f} {unit}/s".replace(" /", "/"))

    console = err()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bars:
        task = bars.add_task(what, total=total)

        def advance(by: float, total: float | None = None) -> None:
            bars.update(task, advance=by, total=total)

        yield advance
