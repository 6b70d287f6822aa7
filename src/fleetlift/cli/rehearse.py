"""`fleetlift migrate rehearse`: a test pool there and back, cycle after cycle, by the engine itself."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleetlift.cli.client import Api, Data, Json, connect

if TYPE_CHECKING:
    from fleetlift.migrate.rehearsal import Rehearsed

app = typer.Typer()

POLL_S: Final = 0.3
OVER: Final = ("reverted", "released")
CYCLE_WITHIN_S: Final = 6 * 3600.0


@app.command()
def rehearse(
    plan: Annotated[Path, typer.Argument(help="The plan of the tenant's move.", exists=True, dir_okay=False)],
    cycles: Annotated[int, typer.Option("--cycles", min=1, max=1000, help="How often there and back.")] = 1,
    with_load: Annotated[bool, typer.Option("--with-load", help="Also the plan's load tests.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Move the plan's test pool there and back, again and again, and show what differed between cycles.

    Every cycle goes through the same steps and gates as the real move, into a database that is made for it
    and dropped again. Exit status 1 when a cycle did not go as it should.
    """
    import msgspec

    from fleetlift.cli.migrate import read_plan
    from fleetlift.cli.screen import emit_json, note

    read_plan(plan)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it made is taken back, as by Ctrl-C
    with connect(data) as api:
        found = rehearsed(
            api, plan, cycles=cycles, with_load=with_load, tell=(lambda text: None) if as_json else note
        )
    if as_json:
        emit_json(msgspec.to_builtins(found))
    else:
        show(found)
    raise typer.Exit(0 if found.good else 1)


def rehearsed(
    api: Api, path: Path, *, cycles: int, with_load: bool, tell: Callable[[str], None]
) -> "Rehearsed":
    """Carry out a rehearsal, after taking back what an earlier one has left. Whatever happens, Ctrl-C too,
    what it made is taken back before this returns, unless the way back is held."""
    from fleetlift.cli.migrate import read_plan
    from fleetlift.core.errors import Conflict
    from fleetlift.migrate.rehearsal import rehearsal_plan, rehearsals_of
    from fleetlift.migrate.tenant_planfile import parse_tenant_plan

    files = read_plan(path)["files"] if with_load else {}
    text = rehearsal_plan(path.read_text(), file=str(path), with_load=with_load, files=files)
    name, family = parse_tenant_plan(text).name, rehearsals_of(parse_tenant_plan(path.read_text()).name)
    begun = False
    for one in api.items("/migrations", 10_000)[0]:
        if one["name"].startswith(family) and one["phase"] not in OVER:
            tell(f"taking back {one['name']}, an earlier rehearsal that is {one['phase']}")
            _taken_back(api, one["name"], tell)
        if one["name"] == name and one["phase"] == "released":
            raise Conflict(
                f"{name} was released: its pool stays on the new side. Rehearse with another pool, or change "
                "the plan once that is back"
            )
        begun = begun or one["name"] == name
    try:
        if not begun:
            _start(api, {"plan": text, "files": files})
        return _cycles(api, name, cycles, begun, tell)
    except BaseException:
        if any(one["name"] == name for one in api.items("/migrations", 10_000)[0]):
            tell(f"taking back {name}; its progress: fleetlift migrate watch {name}")
            _taken_back(api, name, tell)
        raise


def _start(api: Api, body: Mapping[str, Any]) -> None:
    """Start it. Interrupted before the answer, see that it has started: else it would do so a moment later,
    with nobody to take it back."""
    from fleetlift.core.errors import Conflict, Unavailable

    try:
        api.post("/migrations", body)
    except (KeyboardInterrupt, Unavailable):
        with contextlib.suppress(Conflict):  # it is there
            api.post("/migrations", body)
        raise


def _cycles(api: Api, name: str, cycles: int, again: bool, tell: Callable[[str], None]) -> "Rehearsed":
    """`again`: it has been there before, so the first cycle is a resumed one too."""
    from fleetlift.core.tenant.status import from_document
    from fleetlift.migrate.rehearsal import compared, cycle_of

    done = []
    for number in range(1, cycles + 1):
        if again or number > 1:
            api.request("POST", f"/migrations/{name}/resume", params={"wait": 15})
        tell(f"cycle {number} of {cycles}: there")
        document = wait_for(api, name, ("finished", "held", "reverted"), tell)
        there = from_document(document)
        problem = "" if there.phase == "finished" else f"{there.phase}: {there.reason}"
        began = time.monotonic()
        if there.phase != "reverted":
            tell(f"cycle {number} of {cycles}: back")
            back = from_document(_taken_back(api, name, tell, or_held=True))
            if back.phase != "reverted":
                problem = problem or f"it cannot go back: {back.way_back or back.reason}"
        done.append(cycle_of(number, there, back_s=time.monotonic() - began, problem=problem))
        if problem:
            break
    return compared(name, done)


def _taken_back(api: Api, name: str, tell: Callable[[str], None], *, or_held: bool = False) -> dict[str, Any]:
    """The status once the migration is reverted. Raises Conflict when its way back is held, unless that is
    asked for (`or_held`)."""
    from fleetlift.core.errors import Conflict
    from fleetlift.core.migration import Phase

    document = wait_for(api, name, tuple(Phase), tell)  # once it has answered what was asked of it
    if document["phase"] not in (*OVER, "reverting"):
        api.request("POST", f"/migrations/{name}/revert", params={"wait": 15})
    document = wait_for(api, name, (*OVER, "held", "finished"), tell)  # finished: it was refused
    if document["phase"] not in OVER and not or_held:
        why = document.get("way_back") or document["reason"]
        raise Conflict(f"{name} cannot go back: {why}; mend that, then fleetlift migrate revert {name}")
    return document


def wait_for(api: Api, name: str, phases: tuple[str, ...], tell: Callable[[str], None]) -> dict[str, Any]:
    """The status once the migration is in one of `phases`. Raises Unavailable after hours."""
    from fleetlift.core.errors import Unavailable

    deadline = time.monotonic() + CYCLE_WITHIN_S
    said = ""
    while True:
        document: dict[str, Any] = api.get(f"/migrations/{name}")
        step = document["steps"][document["step"]]["name"]
        if step != said and document["phase"] in ("running", "reverting"):
            said = step
            tell(f"  {step}" if document["phase"] == "running" else f"  taking back {step}")
        if document["phase"] in phases and not document["open_requests"]:
            return document
        if time.monotonic() > deadline:
            raise Unavailable(f"{name} is still {document['phase']} after {CYCLE_WITHIN_S / 3600:.0f} hours")
        time.sleep(POLL_S)


def _cell(name: str, row: Mapping[str, Any]) -> Any:
    return row.get(name, "")


def show(found: "Rehearsed") -> None:
    """The cycles side by side."""
    from fleetlift.cli.screen import listing, note, out, say, span

    names = list(dict.fromkeys(step.name for one in found.cycles for step in one.steps))
    rows = [
        {
            "cycle": str(one.number),
            **{step.name: span(step.took_s) for step in one.steps},
            "back": span(one.back_s),
            "freeze": span(float(one.figures["freeze_s"])) if "freeze_s" in one.figures else "",
            "problem": one.problem,
        }
        for one in found.cycles
    ]
    columns = ["cycle", *names, "back", "freeze", *(["problem"] if any(r["problem"] for r in rows) else [])]
    listing(
        rows,
        [(name, partial(_cell, name)) for name in columns],
        as_json=False,
        empty="No cycle.",
    )
    out().print()
    note(f"slowest step: {found.slowest}, {span(found.slowest_s)}")
    for name, values in found.differed.items():
        note(f"{name.replace('_', ' ')} differed: {', '.join(str(v) for v in values)}")
    if not found.differed:
        note("nothing that should be the same differed between cycles")
    if found.good:
        say("done", f"{len(found.cycles)} cycles there and back")
    else:
        last = found.cycles[-1]
        say("failed", f"cycle {last.number}: {last.problem or 'rows are not as they were'}")
