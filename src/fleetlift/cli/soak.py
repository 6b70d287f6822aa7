"""`fleetlift soak`: strike every process of running migrations, again and again; nothing may break."""

import asyncio
import contextlib
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleetlift.cli import screen
from fleetlift.core.errors import BadInput
from fleetlift.core.units import parse_duration
from fleetlift.load.soak import Options, Soak, Struck, Verdict, chosen

REFRESH_S = 0.5


def soak(
    time_for: Annotated[str, typer.Option("--for", help="How long, as in 90s, 1h, 2d.")] = "10m",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Which faults, when, for how long; default: by chance.")
    ] = None,
    devices: Annotated[int, typer.Option(min=4, max=1000, help="Devices of the fleet.")] = 12,
    only: Annotated[
        str, typer.Option(metavar="FAULT,…", help="Only these faults, or groups: kill, step, hang, stuck.")
    ] = "",
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, max=4, help="How many faults strike together.")
    ] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="Work in this new directory, and leave it. Default: a temporary one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON, for programs.")] = False,
) -> None:
    """Kill and halt every process of running migrations, with traffic, and balance the account.

    A legacy server, a backend and a fleet run in processes of their own on loopback; migrations go through
    the whole ladder and back, while faults strike at moments drawn from the seed. After each the world must
    become whole again. Ends with the seed, a table of strikes and the ledger. Ctrl-C ends it early, with the
    verdict so far. Exit status 1 when a promise broke: then the directory is kept.
    """
    options = Options(
        for_s=parse_duration(time_for),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        devices=devices,
        only=tuple(filter(None, only.split(","))),
        at_once=at_once,
    )
    chosen(options.only)
    directory = _directory(keep)
    console = screen.err() if as_json else screen.out()
    verdict = asyncio.run(_run(options, directory, console, as_json))
    if as_json:
        screen.emit_json(msgspec.to_builtins(verdict))
    else:
        console.print(shown(verdict))
    if verdict.good and keep is None:
        shutil.rmtree(directory, ignore_errors=True)
    elif not verdict.good:
        screen.fail(
            f"a promise broke: {verdict.problems[0]}",
            f"Logs and data are in {directory}; repeat with --seed {verdict.seed}.",
        )
        raise typer.Exit(1)


def _directory(keep: Path | None) -> Path:
    """An empty directory that the engines' users may pass through."""
    if keep is None:
        made = Path(tempfile.mkdtemp(prefix="fleetlift-soak-"))
    else:
        if keep.is_dir() and any(keep.iterdir()):
            raise BadInput(f"--keep {keep} holds something already: name a new directory")
        keep.mkdir(parents=True, exist_ok=True)
        made = keep.resolve()
    made.chmod(0o711)
    return made


async def _run(options: Options, directory: Path, console: Console, quiet: bool) -> Verdict:
    run = Soak(options, directory)
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, run.stop.set)
    work = asyncio.create_task(run.run(), name="soak")
    if console.is_terminal and not quiet:
        with Live(console=console, auto_refresh=False) as live:
            while not work.done():
                live.update(view(run, console.width), refresh=True)
                await asyncio.wait([work], timeout=REFRESH_S)
            live.update(Text(""), refresh=True)
    else:
        said = 0
        while not work.done():
            await asyncio.wait([work], timeout=REFRESH_S)
            for number, text in list(run.progress.said):
                if number > said:
                    said = number
                    with contextlib.suppress(BrokenPipeError):
                        console.print(text, highlight=False, soft_wrap=True)
                        sys.stdout.flush()
    return await work


def view(run: Soak, width: int) -> Group:
    """How it stands: time left, migration, ledger, strikes by kind, what happened last."""
    p, ledger = run.progress, run.progress.ledger
    lasted_s = time.monotonic() - run.started
    lines = [
        f"soak  seed {run.options.seed}   {screen.span(lasted_s)} of {screen.span(run.options.for_s)}, "
        f"{screen.span(run.left_s)} left   {p.doing}",
        f"{p.migrations} halves of migrations done, {p.held} times held   now {p.migration}",
        f"{ledger.messages_acknowledged:,} messages acknowledged, {ledger.messages_lost:,} lost, "
        f"{ledger.messages_twice:,} twice; {ledger.commands_executed:,} commands executed, "
        f"{ledger.commands_executed_twice:,} twice  (at the last balance)",
    ]
    head = []
    for line in lines:
        text = Text(line)
        text.truncate(width, overflow="ellipsis")
        head.append(text)
    last = [Text(text) for _, text in p.said]
    for text in last:
        text.truncate(width, overflow="ellipsis")
    return Group(*head, Text(), strikes(p.struck), Text(), *last)


def strikes(struck: list[Struck] | tuple[Struck, ...]) -> Table:
    """One line a kind of fault: how often, and how long until the world was whole again."""
    by_kind: dict[str, list[float]] = {}
    for one in struck:
        by_kind.setdefault(" + ".join(one.faults), []).append(one.whole_after_s)
    table = Table(box=None, pad_edge=False)
    table.add_column("fault")
    for name in ("strikes", "whole after, median", "at most"):
        table.add_column(name, justify="right")
    for kind in sorted(by_kind):
        took = sorted(by_kind[kind])
        table.add_row(kind, str(len(took)), f"{took[len(took) // 2]:.1f} s", f"{took[-1]:.1f} s")
    return table


def shown(verdict: Verdict) -> Group:
    """The end: seed, strikes, ledger, and each promise with its sign."""
    ledger = verdict.ledger
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()

    def row(value: int, label: str, *, none_allowed: bool = False) -> None:
        bad = none_allowed and value > 0
        sign = ("✗ " if bad else "✓ ") if none_allowed else "  "
        table.add_row(f"{value:,}", Text(sign + label, "bold red" if bad else ""))

    row(ledger.messages_acknowledged, "messages acknowledged to devices")
    row(ledger.messages_stored, "stored")
    row(ledger.messages_lost, "lost", none_allowed=True)
    row(ledger.messages_twice, "stored twice", none_allowed=True)
    row(ledger.commands_taken, "commands taken by the API")
    row(ledger.commands_lost, "commands lost", none_allowed=True)
    row(ledger.commands_executed, "commands executed")
    row(ledger.commands_executed_twice, "commands executed twice", none_allowed=True)
    row(ledger.commands_unfinished, "commands without a final state", none_allowed=True)
    row(ledger.commands_changed, "commands with a second final state", none_allowed=True)
    for status, count in ledger.commands_by_status.items():
        row(count, f"commands ended as {status}")
    row(ledger.executed_but_expired, "of these executed, with an answer that came too late")
    row(verdict.migrations, "halves of migrations: there, or back")
    row(verdict.held, "times a gate held one, and it was told to go on")
    head = f"seed {verdict.seed}   {screen.span(verdict.lasted_s)}   {verdict.strikes} strikes"
    problems = [Text(f"✗ {text}", "bold red") for text in verdict.problems]
    return Group(Text(), Text(head, "bold"), strikes(list(verdict.struck)), Text(), table, *problems)
