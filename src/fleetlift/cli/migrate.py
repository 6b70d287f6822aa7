"""`fleetlift migrate`: check a plan, start it, watch it, steer it, go back.

Exit status: 0 done, 1 failed, reverted or held, 2 wrong use.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fleetlift.cli.client import Api, Data, Json, Limit, connect, segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

app = typer.Typer(help="Move a live fleet from one backend to another.", no_args_is_help=True)

REFRESH_S = 1.0
AWAY_S = 120.0  # how long a server may be away while it is watched by a program
WAIT_S = 15  # how long to wait for the controller to deal with a request

Name = Annotated[
    str | None,
    typer.Argument(help="The migration. May be left out when there is only one.", show_default=False),
]
PlanFile = Annotated[
    Path, typer.Argument(help="The plan file (YAML).", exists=True, dir_okay=False, readable=True)
]


class State(StrEnum):
    """States a device of a migration can be in."""

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    RETURNING = "returning"
    RETURNED = "returned"
    STRAGGLER = "straggler"
    EXCLUDED = "excluded"


def the_one(api: Api, name: str | None) -> str:
    """`name`, or the only migration that is not over."""
    from fleetlift.core.errors import BadInput, NotFound

    if name is not None:
        return name
    items, _ = api.items("/migrations", 1000)
    running = [m["name"] for m in items if m["phase"] not in ("finished", "reverted", "released")]
    found = running or [m["name"] for m in items]
    if not found:
        raise NotFound("There is no migration yet: 'fleetlift migrate start PLAN' begins one.")
    if len(found) > 1:
        raise BadInput(f"There are several migrations: name one of {', '.join(sorted(found)[:10])}.")
    return str(found[0])


def path_of(name: str, rest: str = "") -> str:
    return f"/migrations/{segment(name)}{rest}"


@app.command()
def check(plan: PlanFile, data: Data = None, as_json: Json = False) -> None:
    """Check a plan against the fleet: which devices, which waves, what is missing. Nothing moves."""
    from fleetlift.cli.check import show_check
    from fleetlift.cli.screen import emit_json

    body = read_plan(plan)  # mistakes are told with the file's own name, and without a server
    with connect(data) as api:
        found = api.post("/migrations/check", body)
    if as_json:
        emit_json(found)
        ok = bool(found.get("ok", True))
    else:
        ok = show_check(found)
    raise typer.Exit(0 if ok else 1)


@app.command()
def start(
    plan: PlanFile,
    watching: Annotated[bool, typer.Option("--watch", help="Watch it until it is over.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Start a migration. The plan is checked first; with a mistake in it nothing starts."""
    from fleetlift.cli.screen import emit_json, say

    body = read_plan(plan)
    with connect(data) as api:
        made = api.post("/migrations", body)
        if as_json:
            emit_json(made)
        elif not watching:
            say(
                "running",
                f"{made['name']} has started: 'fleetlift migrate watch {made['name']}' shows it live.",
            )
        if watching:
            raise typer.Exit(follow(api, made["name"]))


@app.command("list")
def list_(limit: Limit = 100, data: Data = None, as_json: Json = False) -> None:
    """List migrations."""
    from fleetlift.cli.screen import listing, signed, when

    with connect(data) as api:
        items, more = api.items("/migrations", limit)
    listing(
        items,
        [
            ("Migration", lambda m: m["name"]),
            ("Phase", lambda m: signed(m["phase"])),
            ("Rung", lambda m: m["rung"]),
            ("Wave", lambda m: m["wave"] + 1),
            ("Wave is", lambda m: signed(m["wave_phase"]) if m["phase"] == "running" else ""),
            ("Reverts", lambda m: m["reverts"]),
            ("Remark", lambda m: m["reason"]),
            ("Tenant", lambda m: m["tenant"]),
            ("Started", lambda m: when(m["created_at"])),
        ],
        as_json=as_json,
        empty="No migration yet: 'fleetlift migrate start PLAN' begins one.",
        more=more,
    )


@app.command()
def status(name: Name = None, data: Data = None, as_json: Json = False) -> None:
    """How a migration stands, once. `watch` shows it live."""
    from fleetlift.cli.screen import emit_json, out

    with connect(data) as api:
        document = api.get(path_of(the_one(api, name)))
    if as_json:
        emit_json(document)
    else:
        console = out()
        width = min(console.width, 120)
        console.print(screens_of(document).snapshot(document, width), soft_wrap=True)
    raise typer.Exit(exit_status(document["phase"]))


@app.command()
def watch(
    name: Name = None,
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each state as a line of JSON.")] = False,
) -> None:
    """Watch a migration live until it is over. Away from a terminal, events are printed line by line."""
    with connect(data) as api:
        raise typer.Exit(follow(api, the_one(api, name), as_json=as_json))


@app.command()
def approve(name: Name = None, data: Data = None) -> None:
    """Approve the wave that waits for it."""
    ask(data, name, "approve")


@app.command()
def pause(name: Name = None, data: Data = None) -> None:
    """Let nothing grow; gates stay armed and still bring a wave back."""
    ask(data, name, "pause")


@app.command()
def resume(
    name: Name = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Only: this device takes part again.", show_default=False),
    ] = None,
    data: Data = None,
) -> None:
    """Go on after a pause, try a breached wave again, or let a device that was sent back take part again."""
    ask(data, name, "resume", {"device": device} if device else None)


@app.command()
def amend(
    plan: PlanFile,
    name: Name = None,
    data: Data = None,
) -> None:
    """Replace the plan of a migration (narrow it, usually) and go on with it."""
    from fleetlift.migrate.tenant_planfile import load_any_plan

    parsed = load_any_plan(plan)
    ask(data, name or parsed.name, "amend", {"plan": plan.read_text()})


@app.command()
def revert(
    name: Name = None,
    wave: Annotated[bool, typer.Option("--wave", help="Only the open wave.")] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Only this device.", show_default=False)
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            "--journal",
            help="Go back by the old side alone, with no server: the engine's DIR/journal/NAME.jsonl.",
            exists=True,
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="With --journal: seconds to wait for the devices' word.")
    ] = 60.0,
    watching: Annotated[bool, typer.Option("--watch", help="Watch until everything is back.")] = False,
    data: Data = None,
) -> None:
    """Bring back everything, the open wave or one device. Works while the new side is down; with --journal
    also when the server and its database are gone."""
    if wave and device:
        raise typer.BadParameter("choose --wave or --device, not both")
    if journal is not None:
        raise typer.Exit(revert_by_journal(journal, name, device=device, wave=wave, wait_s=wait))
    body: dict[str, Any] = {"wave": True} if wave else {"device": device} if device else {}
    with connect(data) as api:
        chosen = the_one(api, name)
        send(api, chosen, "revert", body)
        if watching:
            follow(api, chosen, after_revert=True)


@app.command()
def release(
    name: Name = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also give up devices that have not moved.")] = False,
    data: Data = None,
) -> None:
    """Give up the way back for good: nothing of the migration is kept on the sides."""
    with connect(data) as api:
        chosen = the_one(api, name)
        if not yes:
            if not sys.stdin.isatty():
                raise typer.BadParameter("this cannot be undone: say --yes")
            typer.confirm(f"Release {chosen}? There is no way back after that.", abort=True, err=True)
        send(api, chosen, "release", {"force": True} if force else None)


@app.command()
def report(
    name: Name = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write it.", show_default="NAME-report.html")
    ] = None,
    data: Data = None,
) -> None:
    """Write the report: one self-contained HTML file with plots, gates, the ledger and the audit log."""
    from fleetlift.cli.screen import say

    with connect(data) as api:
        chosen = the_one(api, name)
        html = api.text(path_of(chosen, "/report"))
    target = out_file or Path(f"{chosen}-report.html")
    if str(target) == "-":
        sys.stdout.write(html)
        return
    target.write_text(html)
    say("done", f"{target} ({len(html) // 1024} KiB)")


@app.command()
def events(
    name: Name = None,
    following: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new events as they happen.")
    ] = False,
    evidence: Annotated[bool, typer.Option("--evidence", help="Show the figures of each decision.")] = False,
    limit: Limit = 1000,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """The audit log: every decision, who made it, and the figures that led to it."""
    from fleetlift.cli.screen import emit_json, note

    with connect(data) as api:
        chosen = the_one(api, name)
        if following:
            for event in api.events(path_of(chosen, "/events")):
                print_event(event, evidence, as_json)
            return
        items, more = api.items(path_of(chosen, "/events"), limit)
    if as_json:
        emit_json(items)
        return
    for event in items:
        print_event(event, evidence, as_json=False)
    if more:
        note("There is more: raise --limit.")


@app.command()
def devices(
    name: Name = None,
    state: Annotated[
        list[State] | None, typer.Option("--state", help="Only in this state; may be repeated.")
    ] = None,
    limit: Limit = 1000,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """The devices of a migration in the order of waves; stragglers and excluded ones with the reason."""
    from fleetlift.cli.screen import listing, signed, when

    with connect(data) as api:
        chosen = the_one(api, name)
        wanted = [s.value for s in state] if state else None
        items, more = api.items(path_of(chosen, "/devices"), limit, state=wanted)
    listing(
        items,
        [
            ("Device", lambda m: m["device"]),
            ("State", lambda m: signed(m["state"])),
            ("Rung", lambda m: m["rung"]),
            ("Wave", lambda m: None if m["wave"] is None else m["wave"] + 1),
            ("Reason", lambda m: m["reason"]),
            ("Told", lambda m: when(m["told_at"])),
            ("Moved", lambda m: when(m["moved_at"])),
        ],
        as_json=as_json,
        empty="No device in that state.",
        more=more,
    )


@app.command()
def parity(name: Name = None, data: Data = None, as_json: Json = False) -> None:
    """Show what both sides saw of the same messages: each in one class, and every field that differed."""
    from fleetlift.cli.parity import show_parity
    from fleetlift.cli.screen import emit_json

    with connect(data) as api:
        found = api.get(path_of(the_one(api, name), "/parity"))
    if as_json:
        emit_json(found)
    else:
        show_parity(found)


# -- inside ---------------------------------------------------------------------------------------------


class Screens(NamedTuple):
    """How a migration of one kind is drawn, from the API's document."""

    render: "Callable[[Mapping[str, Any], int, int], RenderableType]"
    snapshot: "Callable[[Mapping[str, Any], int], RenderableType]"


def screens_of(document: Mapping[str, Any]) -> Screens:
    if document.get("kind") == "tenant":
        from fleetlift.cli import tenant_watch
        from fleetlift.core.tenant.status import from_document as read_move

        return Screens(
            lambda d, width, height: tenant_watch.render(read_move(d), width, height),
            lambda d, width: tenant_watch.snapshot(read_move(d), width),
        )
    from fleetlift.cli import watch as fleet_watch
    from fleetlift.core.status import from_document

    return Screens(
        lambda d, width, height: fleet_watch.render(from_document(d), width, height),
        lambda d, width: fleet_watch.snapshot(from_document(d), width),
    )


def read_plan(path: Path) -> dict[str, Any]:
    """A plan checked by itself, with the files that it names, as the API takes them."""
    from fleetlift.core.tenant.plan import TenantPlan, Validate
    from fleetlift.migrate.tenant_planfile import load_any_plan
    from fleetlift.yamlfile import read_text

    plan = load_any_plan(path)
    files = {}
    if isinstance(plan, TenantPlan):
        for step in plan.steps:
            if isinstance(step, Validate):
                files[step.scenario] = read_text(path.parent / step.scenario, "scenario")
    return {"plan": path.read_text(), "files": files}


def exit_status(phase: str) -> int:
    return 1 if phase in ("reverted", "reverting", "held") else 0


def ask(data: Path | None, name: str | None, verb: str, body: Any = None) -> None:
    with connect(data) as api:
        send(api, the_one(api, name), verb, body)


def send(api: Api, name: str, verb: str, body: Any) -> None:
    """Ask the controller and say what came of it: the events it noted meanwhile."""
    from fleetlift.cli.screen import note, say
    from fleetlift.core.errors import Conflict

    before = newest_event(api, name)
    asked = api.request("POST", path_of(name, f"/{verb}"), params={"wait": WAIT_S}, body=body)
    if not asked["answered"]:
        note(f"The controller has not dealt with it after {WAIT_S} s; it will. Does /readyz miss it?")
        return
    found = events_after(api, name, before)
    for event in found:
        print_event(event, evidence=False, as_json=False)
    refused = [e["text"] for e in found if e["kind"] == "request_refused"]
    if refused:
        raise Conflict(f"{name}: {refused[-1]}")
    say("done", f"{name}: {verb} was dealt with.")


def newest_event(api: Api, name: str) -> int:
    shown = api.get(path_of(name))["events"]
    return int(shown[-1]["id"]) if shown else 0


def events_after(api: Api, name: str, last: int) -> list[dict[str, Any]]:
    return [e for e in api.get(path_of(name))["events"] if e["id"] > last]


def print_event(event: Mapping[str, Any], evidence: bool, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(event, ensure_ascii=False))
        return
    from rich.text import Text

    from fleetlift.cli.screen import out, when
    from fleetlift.cli.watch import sign_of

    mark, style = sign_of(event["kind"])
    who = "" if event["actor"] == "controller" or event["actor"] in event["text"] else f"{event['actor']}: "
    line = (
        Text(f"{when(event['at'])} ", style="grey58")
        + Text(f"{mark} ", style=style)
        + Text(who + event["text"])
    )
    out().print(line, soft_wrap=True)
    if evidence and event.get("evidence"):
        out().print(
            Text("  " + json.dumps(event["evidence"], ensure_ascii=False), style="grey58"), soft_wrap=True
        )


def over(phase: str, *, after_revert: bool, at_terminal: bool) -> bool:
    """Whether there is nothing more to watch. A held migration waits for a person: who sits there stays."""
    if phase in ("finished", "released", "reverted"):
        return True
    return phase == "held" and not at_terminal and not after_revert


def follow(api: Api, name: str, *, as_json: bool = False, after_revert: bool = False) -> int:
    """Watch until it is over; returns the exit status. A server that goes away for a while is waited for."""
    from rich.console import Console

    console = Console(highlight=False)
    if as_json or not console.is_terminal:
        return follow_lines(api, name, as_json=as_json, after_revert=after_revert)
    from rich.live import Live
    from rich.text import Text

    from fleetlift.core.errors import Unavailable

    found: dict[str, Any] | None = None
    trouble = ""
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while found is None or not over(found["phase"], after_revert=after_revert, at_terminal=True):
                began = time.monotonic()
                try:
                    found, trouble = api.get(path_of(name)), ""
                except Unavailable as exc:
                    trouble = str(exc)
                room = console.height - bool(trouble)
                screen = screens_of(found).render(found, console.width, room) if found else Text("")
                if trouble:
                    from rich.console import Group

                    live.update(
                        Group(Text(f"✗ {trouble}"[: console.width], style="red"), screen), refresh=True
                    )
                else:
                    live.update(screen, refresh=True)
                time.sleep(max(0.0, REFRESH_S - (time.monotonic() - began)))
    except KeyboardInterrupt:
        pass  # leaving the screen leaves the migration alone
    if found is None:
        return 1
    console.print(screens_of(found).snapshot(found, min(console.width, 120)))
    return exit_status(found["phase"])


def follow_lines(api: Api, name: str, *, as_json: bool, after_revert: bool) -> int:
    """Events (or states as JSON) line by line, for logs and programs."""
    import json

    from fleetlift.cli.screen import note
    from fleetlift.core.errors import Unavailable

    last, trouble_since = -1, None
    while True:
        try:
            document, trouble_since = api.get(path_of(name)), None
        except Unavailable as exc:
            if trouble_since is None:
                note(str(exc))
            trouble_since = trouble_since or time.monotonic()
            if time.monotonic() - trouble_since > AWAY_S:
                raise
            time.sleep(REFRESH_S)
            continue
        if as_json:
            typer.echo(json.dumps(document, ensure_ascii=False))
        else:
            for event in document["events"]:
                if event["id"] > last:
                    last = event["id"]
                    print_event(event, evidence=False, as_json=False)
        if over(document["phase"], after_revert=after_revert, at_terminal=False):
            return exit_status(document["phase"])
        time.sleep(REFRESH_S)


def revert_by_journal(
    journal: Path, name: str | None, *, device: str | None, wave: bool, wait_s: float
) -> int:
    """The emergency path: the journal and the old side are enough."""
    import asyncio
    import getpass

    from fleetlift.cli.screen import fail, note, progress, say
    from fleetlift.migrate.emergency import revert_by_journal as revert_now

    if wave:
        raise typer.BadParameter("--journal brings back everything, or one --device")
    seen = 0
    with progress("Going back", None, "devices") as advance:

        def heard(back: int, total: int) -> None:
            nonlocal seen
            advance(back - seen, total)
            seen = back

        result = asyncio.run(
            revert_now(
                journal,
                migration=name,
                devices=[device] if device else None,
                actor=getpass.getuser(),
                wait_s=wait_s,
                progress=heard,
            )
        )
    say("reverted", f"{len(result.told):,} devices of {result.migration} were ordered back by the old side.")
    say("done", f"{len(result.back):,} have said that they obey it alone.")
    if result.silent:
        note(f"{len(result.silent):,} are silent, and obey when they connect: {some(result.silent)}")
    for one, reason in list(result.refused.items())[:20]:
        fail(f"{one}: {reason}")
    return 1 if result.refused else 0


def some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")
