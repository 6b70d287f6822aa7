"""`fleetlift simulate`: whole migrations on a simulated clock and network, with faults drawn from a seed."""

import secrets
import sys
import time
from collections import Counter
from typing import Annotated

import msgspec
import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleetlift.cli import screen
from fleetlift.core.errors import BadInput
from fleetlift.simulate.breakages import BREAKAGES
from fleetlift.simulate.promises import PROMISES
from fleetlift.simulate.run import Case, run_case, simulate_many, smaller
from fleetlift.simulate.scenario import DEVICES_MOST
from fleetlift.simulate.world import Outcome

REFRESH_S = 0.5
TRACE_LINES = 400


class Tally(msgspec.Struct):
    """What all runs together have come to."""

    wanted: int
    started_at: float
    runs: int = 0
    simulated_s: float = 0.0
    faults: int = 0
    devices: int = 0
    commands: int = 0
    messages: int = 0
    waves_passed: int = 0
    phases: Counter[str] = msgspec.field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.runs += 1
        self.simulated_s += outcome.simulated_s
        self.faults += outcome.faults
        self.devices += outcome.devices
        self.commands += outcome.commands
        self.messages += outcome.messages
        self.waves_passed += outcome.waves_passed
        self.phases[outcome.phase] += 1


def simulate(
    runs: Annotated[int, typer.Option(min=1, help="How many migrations.")] = 1000,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The first seed; the others follow. Default: by chance.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, max=DEVICES_MOST, help="Devices of each fleet. Default: by the seed.")
    ] = None,
    faults: Annotated[
        str, typer.Option(metavar="N,…", help="Of the seed's faults only these, or none; for one run.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one a processor.")] = 0,
    trace: Annotated[bool, typer.Option(help="Print the history of a single run.")] = False,
    breakage: Annotated[
        str, typer.Option("--break", metavar="NAME", help="Break the product on purpose; `list` shows how.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON, for programs.")] = False,
) -> None:
    """Simulate whole migrations, and check every promise at every step.

    The real agent, controller, bridge and decisions run on a simulated clock, network and disk; devices,
    plans, faults and operators are drawn from the seed, and the same seed gives the same history. Stops at
    the first broken promise, makes the case smaller, and says how to see it again. Exit status 1 then.
    """
    if breakage == "list":
        _list_breakages(as_json)
        return
    if breakage and breakage not in BREAKAGES:
        raise BadInput(f"{breakage!r} is no breakage: `fleetlift simulate --break list` shows them")
    first = secrets.randbelow(2**31) if seed is None else seed
    if trace or faults:
        if runs != 1:
            raise BadInput("--trace and --faults are for a single case: give --seed and --runs 1")
        _show_one(
            Case(seed=first, devices=devices, faults=_numbers(faults), breakage=breakage), trace, as_json
        )
        return
    tally, broken = _run_all(range(first, first + runs), jobs, devices, breakage, as_json)
    case, outcome = None, broken
    if broken is not None and broken.violated is not None:
        case = Case(seed=broken.seed, devices=devices, breakage=breakage)
        case, outcome = smaller(case, broken.violated)
    _verdict(tally, broken, case, outcome, first, as_json)
    if broken is not None:
        raise typer.Exit(1)


def _numbers(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    if text == "none":
        return ()
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise BadInput(f"--faults {text!r}: give numbers such as 0,3, or none")
    return tuple(int(part) for part in text.split(","))


def _run_all(
    seeds: range, jobs: int, devices: int | None, breakage: str, as_json: bool
) -> tuple[Tally, Outcome | None]:
    tally = Tally(wanted=len(seeds), started_at=time.monotonic())
    console = screen.err() if as_json else screen.out()
    shown_at = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for outcome in simulate_many(seeds, jobs=jobs, devices=devices, breakage=breakage):
            tally.add(outcome)
            if outcome.violated is not None:
                return tally, outcome
            now = time.monotonic()
            if now - shown_at >= (REFRESH_S if console.is_terminal else 10.0):
                shown_at = now
                if console.is_terminal:
                    live.update(_progress(tally), refresh=True)
                elif not as_json and tally.runs < tally.wanted:
                    console.print(_progress(tally))
    return tally, None


def _progress(tally: Tally) -> Text:
    took_s = max(time.monotonic() - tally.started_at, 1e-6)
    rate = tally.runs / took_s
    left_s = (tally.wanted - tally.runs) / rate if rate else None
    return Text(
        f"{tally.runs:,} of {tally.wanted:,} migrations, {rate:.1f}/s, "
        f"{tally.simulated_s / 3600:,.1f} h simulated ({tally.simulated_s / took_s:,.0f} x), "
        f"{tally.faults:,} faults, {screen.span(left_s)} left"
    )


def _verdict(
    tally: Tally, broken: Outcome | None, case: Case | None, small: Outcome | None, first: int, as_json: bool
) -> None:
    took_s = max(time.monotonic() - tally.started_at, 1e-6)
    if as_json:
        screen.emit_json(
            {
                "runs": tally.runs,
                "first_seed": first,
                "took_s": round(took_s, 3),
                "simulated_s": round(tally.simulated_s, 1),
                "speed_up": round(tally.simulated_s / took_s, 1),
                "devices": tally.devices,
                "faults": tally.faults,
                "commands": tally.commands,
                "messages": tally.messages,
                "waves_passed": tally.waves_passed,
                "phases": dict(sorted(tally.phases.items())),
                "broken": None if broken is None else msgspec.to_builtins(broken),
                "replay": None if case is None else case.command,
            }
        )
        return
    ends = ", ".join(f"{phase} {n:,}" for phase, n in tally.phases.most_common())
    screen.details(
        [
            ("migrations", f"{tally.runs:,}, from seed {first} on"),
            ("they ended", ends),
            ("simulated", f"{tally.simulated_s / 3600:,.1f} h in {screen.span(took_s)}"),
            ("speed", f"{tally.simulated_s / took_s:,.0f} x real time"),
            ("devices", f"{tally.devices:,}"),
            ("faults", f"{tally.faults:,}"),
            ("stored", f"{tally.messages:,} messages, {tally.commands:,} commands"),
            ("waves passed", f"{tally.waves_passed:,}"),
        ]
    )
    if broken is None:
        screen.note(f"Every promise held: {', '.join(PROMISES)}.")
        return
    assert case is not None and small is not None
    for line in small.trace[-25:]:
        sys.stdout.write(line[:200] + "\n")
    screen.fail(
        f"seed {broken.seed} broke a promise. {small.violated}: {small.what}", f"See it: {case.command}"
    )


def _show_one(case: Case, trace: bool, as_json: bool) -> None:
    outcome = run_case(case, -TRACE_LINES if trace else 60)
    if as_json:
        screen.emit_json(msgspec.to_builtins(outcome))
    else:
        for line in outcome.trace:
            sys.stdout.write(line + "\n")
        screen.details(
            [
                ("seed", str(outcome.seed)),
                ("devices", str(outcome.devices)),
                ("ended", outcome.phase),
                ("simulated", f"{outcome.simulated_s:,.0f} s in {outcome.wall_s:.2f} s"),
                ("history", outcome.digest),
            ]
        )
        if outcome.violated is not None:
            screen.fail(f"{outcome.violated}: {outcome.what}", PROMISES[outcome.violated])
    if outcome.violated is not None:
        raise typer.Exit(1)


def _list_breakages(as_json: bool) -> None:
    if as_json:
        screen.emit_json(
            [
                {"name": name, "what": one.what, "caught_by": one.caught_by, "stand_in": one.stand_in}
                for name, one in BREAKAGES.items()
            ]
        )
        return
    table = Table("name", "what is broken", "noticed as", box=None, pad_edge=False)
    for name, one in BREAKAGES.items():
        table.add_row(name, one.what, ", ".join(one.caught_by))
    screen.out().print(table)
