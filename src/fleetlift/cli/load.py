"""`fleetlift load`: play a scenario against a target, show what it would send, fit one to a capture."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fleetlift.cli.client import Data, Json
from fleetlift.core.errors import BadInput
from fleetlift.core.units import format_count, format_quantity, parse_duration, parse_rate

if TYPE_CHECKING:
    from rich.console import Console, Group

    from fleetlift.core.gates import Gate
    from fleetlift.core.load_result import LoadResult
    from fleetlift.core.migration import GateResult
    from fleetlift.core.workload import Scenario
    from fleetlift.load.run import Progress, Target

app = typer.Typer(help="Load tests.", no_args_is_help=True)

REFRESH_S = 0.5
LINE_EVERY_S = 5.0  # away from a terminal

ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO", help="The scenario, as in docs/load.md.")]
Rate = Annotated[str, typer.Option("--rate", metavar="N/s", help="Play it at this mean rate, as in 10000/s.")]
For = Annotated[str, typer.Option("--for", metavar="DURATION", help="How long, instead of its own time.")]


@app.command()
def run(
    scenario: ScenarioFile,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URL",
            help="mqtt://HOST:PORT, mqtts://…, or http(s)://HOST/PATH with {device}, {topic}, {password}.",
        ),
    ],
    rate: Rate = "",
    time_for: For = "",
    provision: Annotated[
        int,
        typer.Option(
            "--provision",
            metavar="N",
            min=0,
            help="Make N devices on a Fleetlift (--data) for this test, and remove them afterwards.",
        ),
    ] = 0,
    credentials: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Who signs in: device,password or JSON lines, readable by you alone."
        ),
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Ask the Fleetlift (--data) what it has stored of it.")
    ] = False,
    gate: Annotated[
        list[str] | None, typer.Option("--gate", help="A condition, as in 'load.latency.p99 <= 250ms'.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=0, max=256, help="Generator processes; 0: as many as the rate needs.")
    ] = 0,
    ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The authority that signed the target's certificate.")
    ] = None,
    auth: Annotated[str, typer.Option(help="Of HTTP: basic, bearer or none.")] = "basic",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with plots.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Play a scenario against a target: an open model, in which arrivals never wait for answers.

    Latencies count from the moment a message was meant to be sent. A run in which the generator itself was
    late or starved is invalid, and says why. Ctrl-C ends it early, with the result so far. Exit status 1 when
    the run is invalid, acknowledged messages are lost, or a gate does not hold.
    """
    from fleetlift.cli import screen
    from fleetlift.core.gates import judge, parse_gate
    from fleetlift.core.load_result import load_samples
    from fleetlift.core.metrics import OF_LOAD
    from fleetlift.core.migration import Verdict
    from fleetlift.core.workload import with_devices
    from fleetlift.load.credentials import read_credentials
    from fleetlift.load.report import load_page
    from fleetlift.load.run import Target, endpoint_of
    from fleetlift.load.scenario import load_scenario

    gates = [parse_gate(text) for text in gate or ()]
    for one in gates:
        if not one.metric.startswith(OF_LOAD):
            raise BadInput(f"--gate {one.text}: a load test measures {OF_LOAD}… only")
    if auth not in ("basic", "bearer", "none"):
        raise BadInput(f"--auth {auth}: expected basic, bearer or none")
    if provision and credentials is not None:
        raise BadInput("--provision makes its own credentials: leave --credentials out")
    found = _asked(load_scenario(scenario), rate, time_for)
    endpoint_of(to)
    if provision:
        found = with_devices(found, provision)
    target = Target(
        url=to,
        logins=() if credentials is None else read_credentials(credentials),
        ca=None if ca is None else str(ca),
        auth=auth,
        provision=provision > 0,
    )
    result = asyncio.run(
        _run(found, target, data if prove or provision else False, processes or None, as_json)
    )
    samples = load_samples(result)
    verdicts = [judge(one, samples[one.metric]) for one in gates]
    if report is not None:
        report.write_text(load_page(result, verdicts), encoding="utf-8")
    if as_json:
        screen.emit_json(
            msgspec.to_builtins(result)
            | {
                "valid": result.valid,
                "errors": result.errors,
                "error_share": result.error_share,
                "lost": result.lost,
                "gates": [
                    {"gate": v.gate, "holds": v.verdict is Verdict.ADVANCE, "why": v.why} for v in verdicts
                ],
            }
        )
    else:
        _show(result, verdicts, gates)
        if report is not None:
            screen.note(f"The report is in {report}.")
    if result.invalid:
        screen.fail(f"this run does not count: {'; '.join(result.invalid)}")
        raise typer.Exit(1)
    if result.lost:
        screen.fail(f"{format_count(result.lost)} acknowledged messages are lost")
        raise typer.Exit(1)
    if any(v.verdict is not Verdict.ADVANCE for v in verdicts):
        raise typer.Exit(1)


def _asked(scenario: "Scenario", rate: str, time_for: str) -> "Scenario":
    rate_s = parse_rate(rate) if rate else scenario.rate_s
    for_s = parse_duration(time_for) if time_for else scenario.for_s
    if rate_s == 0 or for_s == 0:
        raise BadInput("--rate and --for must be above 0")
    return msgspec.structs.replace(scenario, rate_s=rate_s, for_s=for_s)


async def _run(
    scenario: "Scenario", target: "Target", data: "Path | bool | None", processes: int | None, quiet: bool
) -> "LoadResult":
    """`data` False: nobody is asked what was stored."""
    from fleetlift.cli import screen
    from fleetlift.cli.client import where
    from fleetlift.load.run import run_load
    from fleetlift.load.witness import FleetliftApi

    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        if not isinstance(data, bool):
            url, token, ca = where(data)
            api = await stack.enter_async_context(FleetliftApi(url, token, ca))
            target = msgspec.structs.replace(target, api=api, ca=target.ca or ca)
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        show = stack.enter_context(_watched(screen.err() if quiet else screen.out(), scenario))
        return await run_load(scenario, target, processes=processes, progress=show, stop=stop)


class _Watcher:
    """What `run_load` tells, on a screen: a live view, or a line now and then."""

    def __init__(self, console: "Console", scenario: "Scenario") -> None:
        from rich.live import Live

        self._console, self._scenario = console, scenario
        self._shown_at = 0.0
        self._doing = ""
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __call__(self, seen: "Progress") -> None:
        now = time.monotonic()
        fresh, self._doing = seen.doing != self._doing, seen.doing
        if not fresh and now - self._shown_at < (REFRESH_S if self._console.is_terminal else LINE_EVERY_S):
            return
        self._shown_at = now
        if self._console.is_terminal:
            self.live.update(view(seen, self._scenario), refresh=True)
        elif seen.doing != "done":
            self._console.print(line(seen), soft_wrap=True)
            sys.stdout.flush()


@contextlib.contextmanager
def _watched(console: "Console", scenario: "Scenario") -> Iterator[_Watcher]:
    watcher = _Watcher(console, scenario)
    if console.is_terminal:
        with watcher.live:
            yield watcher
    else:
        yield watcher


def line(seen: "Progress") -> str:
    """How it stands, on one line."""
    from fleetlift.cli import screen

    if seen.doing not in ("playing", "waiting for answers"):
        return f"{seen.doing}: {seen.done:,} of {seen.total:,}" if seen.total else seen.doing
    p99 = "–" if seen.p99_s is None else format_quantity(seen.p99_s, "s")
    return (
        f"{seen.at_s:.0f} s: {seen.offered_s:,.0f}/s offered, {seen.rate_s:,.0f}/s accepted, p99 {p99}, "
        f"{seen.errors:,} errors, {seen.connected:,} connected, "
        f"generator late {format_quantity(seen.late_p99_s, 's')}, {screen.span(seen.left_s)} left"
    )


def view(seen: "Progress", scenario: "Scenario") -> "Group":
    """How it stands, on a few lines; the generator's own lateness stands beside the target's latency."""
    from rich.console import Group
    from rich.text import Text

    from fleetlift.cli import screen
    from fleetlift.core.load_result import LATE_MAX_S

    head = Text(f"load  {scenario.name}   ", style="bold") + Text(seen.doing)
    if seen.doing not in ("playing", "waiting for answers"):
        return Group(head, Text(f"{seen.done:,} of {seen.total:,}" if seen.total else ""))
    p99 = "–" if seen.p99_s is None else format_quantity(seen.p99_s, "s")
    late = seen.late_p99_s > LATE_MAX_S
    return Group(
        head
        + Text(f"   {screen.span(seen.at_s)} of {screen.span(seen.for_s)}, {screen.span(seen.left_s)} left"),
        Text(
            f"{seen.offered_s:,.0f}/s offered   {seen.rate_s:,.0f}/s accepted   p99 {p99}   "
            f"{seen.connected:,} of {seen.devices:,} connected"
        ),
        Text(f"{seen.offered:,} offered   {seen.accepted:,} accepted   ")
        + Text(f"{'✗ ' if seen.errors else ''}{seen.errors:,} errors", style="red" if seen.errors else ""),
        Text(
            f"{'! ' if late else ''}generator late {format_quantity(seen.late_p99_s, 's')} (p99)",
            style="yellow" if late else "dim",
        ),
    )


def _show(result: "LoadResult", verdicts: "list[GateResult]", gates: "list[Gate]") -> None:
    from rich.table import Table
    from rich.text import Text

    from fleetlift.cli import screen
    from fleetlift.core.migration import Verdict

    counts, latency, stored = result.counts, result.latency, result.stored

    def time_of(value_s: float) -> str:
        return format_quantity(value_s, "s") if latency.n else "–"

    proof = (
        f"{format_count(stored.stored)} stored, {format_count(result.lost or 0)} lost; "
        f"{format_count(stored.reread)} read again of {format_count(stored.reread_of)}"
        if stored is not None
        else f"not proved: {result.why_unproved}"
    )
    screen.details(
        [
            ("scenario", f"{result.scenario}, seed {result.seed}"),
            ("target", result.target),
            ("offered", f"{counts.offered:,} in {screen.span(result.lasted_s)}"),
            ("accepted", f"{counts.accepted:,}, {result.rate_s:,.0f}/s"),
            ("errors", f"{counts.rejected:,} rejected, {counts.failed:,} failed ({result.error_share:.2%})"),
            ("stored", proof),
            (
                "latency",
                f"p50 {time_of(latency.p50_s)}, p95 {time_of(latency.p95_s)}, p99 {time_of(latency.p99_s)}, "
                f"p99.9 {time_of(latency.p999_s)}, max {time_of(latency.max_s)}",
            ),
            (
                "generator",
                f"late {format_quantity(result.late.p99_s, 's')} (p99), "
                f"{format_quantity(result.late.max_s, 's')} (most); "
                f"{', '.join(f'{100 * cpu:.0f} %' for cpu in result.cpu)} of a core",
            ),
            ("connections", f"{result.closed:,} closed by the target, {result.reconnects:,} made anew"),
        ]
    )
    if len(result.classes) > 1:
        table = Table("class", box=None, pad_edge=False)
        for name in ("devices", "offered", "accepted", "errors", "p50", "p99"):
            table.add_column(name, justify="right")
        for one in result.classes:
            n = one.latency.n
            table.add_row(
                one.name,
                f"{one.devices:,}",
                f"{one.counts.offered:,}",
                f"{one.counts.accepted:,}",
                f"{one.counts.rejected + one.counts.failed:,}",
                format_quantity(one.latency.p50_s, "s") if n else "–",
                format_quantity(one.latency.p99_s, "s") if n else "–",
            )
        screen.out().print(table)
    for text in result.problems:
        screen.out().print(Text(f"! {text}", style="yellow"), soft_wrap=True)
    for verdict in verdicts:
        screen.say("ok" if verdict.verdict is Verdict.ADVANCE else "failed", verdict.why)


@app.command()
def check(
    scenario: ScenarioFile,
    rate: Rate = "",
    time_for: For = "",
    as_json: Json = False,
) -> None:
    """Show what a scenario would send: devices, rate over time, bytes. Sends nothing."""
    from rich.table import Table

    from fleetlift.cli import screen
    from fleetlift.core.workload import expected
    from fleetlift.load.run import processes_for
    from fleetlift.load.scenario import load_scenario

    found = _asked(load_scenario(scenario), rate, time_for)
    comes = expected(found, stretches=20)
    if as_json:
        screen.emit_json(msgspec.to_builtins(comes) | {"scenario": found.name, "devices": found.devices})
        return
    screen.details(
        [
            ("scenario", f"{found.name}, seed {found.seed}"),
            ("devices", found.devices),
            ("lasts", screen.span(found.for_s)),
            ("messages", f"about {comes.messages:,.0f}"),
            ("rate", f"{comes.mean_rate_s:,.1f}/s on the average, {comes.peak_rate_s:,.1f}/s at the peak"),
            ("payload", f"about {comes.payload_bytes / 1e6:,.1f} MB"),
            ("time", f"{found.scale:.3g} times as fast as the classes say" if found.rate_s else "as written"),
            ("storms", len(found.storms)),
            ("processes", processes_for(found)),
        ]
    )
    table = Table("class", box=None, pad_edge=False)
    for name in ("devices", "messages/s", "mean bytes"):
        table.add_column(name, justify="right")
    for name, devices, class_rate_s, mean_bytes in comes.classes:
        table.add_row(name, f"{devices:,}", f"{class_rate_s:,.2f}", f"{mean_bytes:,.0f}")
    screen.out().print(table)
    if found.phases:
        most = max(r for _, r in comes.rates) or 1.0
        for end_s, rate_s in comes.rates:
            bar = "█" * round(40 * rate_s / most)
            screen.out().print(f"{screen.span(end_s):>12}  {rate_s:>12,.1f}/s  {bar}")


@app.command()
def fit(
    capture: Annotated[Path, typer.Argument(metavar="CAPTURE", help="What 'fleetlift capture' recorded.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to; else it is printed."),
    ] = None,
    name: Annotated[str, typer.Option(help="The scenario's name.")] = "captured",
    seed: Annotated[int, typer.Option(min=0, help="Its seed.")] = 1,
) -> None:
    """Fit a scenario to a capture: device classes, their modes, sizes, topics, and the shape of the time."""
    from fleetlift.cli import screen
    from fleetlift.core.workload_fit import fit as fitted
    from fleetlift.load.capture_file import read_capture
    from fleetlift.load.scenario import dump_scenario, parse_scenario

    observations = (
        (message.device, message.at_s, message.topic, len(message.payload))
        for message in read_capture(capture)
        if message.direction == "up"
    )
    text = dump_scenario(fitted(observations, name=name, seed=seed))
    found = parse_scenario(text)  # what was written can be read
    if output is None:
        sys.stdout.write(text)
        return
    output.write_text(text, encoding="utf-8")
    screen.say(
        "done",
        f"{output}: {found.devices:,} devices in {len(found.classes)} classes, "
        f"{found.own_rate_s:,.2f} messages/s, {screen.span(found.for_s)}",
    )
