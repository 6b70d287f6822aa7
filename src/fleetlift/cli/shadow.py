"""`fleetlift shadow`: what a device should be, and what it says it is."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetlift.cli.client import Data, Json, connect, segment

app = typer.Typer(help="Desired and reported state of devices.", no_args_is_help=True)

Device = Annotated[str, typer.Argument(help="The device.")]
ShadowName = Annotated[
    str, typer.Option("--name", help="A named shadow; the classic one without.", show_default=False)
]


def path_of(device: str) -> str:
    return f"/devices/{segment(device)}/shadow"


@app.command()
def get(device: Device, name: ShadowName = "", data: Data = None, as_json: Json = False) -> None:
    """Show a shadow: desired, reported, and what the device still lacks."""
    from fleetlift.cli.screen import emit_json

    with connect(data) as api:
        document = api.get(path_of(device), name=name or None)
    if as_json:
        emit_json(document)
    else:
        display(device, name, document)


@app.command("set")
def set_(
    device: Device,
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...", help="Desired values; a dotted name goes inwards.", show_default=False
        ),
    ] = None,
    desired: Annotated[
        str | None,
        typer.Option("--desired", help="Desired state as JSON, or @FILE, or - .", show_default=False),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option("--version", help="Only if the shadow is at this version.", show_default=False),
    ] = None,
    name: ShadowName = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Change desired state. Values that are JSON are taken as such; `null` removes a key."""
    from fleetlift.cli.screen import emit_json, say

    state = read_json(desired) if desired is not None else {}
    for pair in pairs or []:
        put_in(state, pair)
    if not state:
        raise typer.BadParameter("nothing to set: write NAME=VALUE, or --desired '{...}'")
    body: dict[str, Any] = {"state": {"desired": state}}
    if version is not None:
        body["version"] = version
    with connect(data) as api:
        answer = api.request("PATCH", path_of(device), params={"name": name or None}, body=body)
    if as_json:
        emit_json(answer)
    else:
        say("done", f"{device}: the shadow is at version {answer['version']}.")


@app.command()
def delete(device: Device, name: ShadowName = "", data: Data = None) -> None:
    """Delete a shadow."""
    from fleetlift.cli.screen import say

    with connect(data) as api:
        api.request("DELETE", path_of(device), params={"name": name or None})
    say("done", f"{device}: the shadow is deleted.")


def read_json(text: str) -> dict[str, Any]:
    """A JSON object given as text, as @FILE or, with '-', on standard input."""
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text()
        found = json.loads(text)
    except (OSError, ValueError) as exc:
        raise typer.BadParameter(f"not readable as JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise typer.BadParameter("expected a JSON object, as in '{\"interval\": 30}'")
    return found


def put_in(state: dict[str, Any], pair: str) -> None:
    """Put `a.b=value` into `state` as {"a": {"b": value}}."""
    name, found, text = pair.partition("=")
    keys = name.split(".")
    if not found or not all(keys):
        raise typer.BadParameter(f"{pair!r}: write NAME=VALUE, as in interval=30 or lights.inside=true")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in keys[:-1]:
        state = state.setdefault(key, {})
        if not isinstance(state, dict):
            raise typer.BadParameter(f"{pair!r}: {key!r} has a value of its own already")
    state[keys[-1]] = value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a document by their dotted name."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def display(device: str, name: str, document: dict[str, Any]) -> None:
    from fleetlift.cli.screen import compact, details, listing, signed

    state = document.get("state") or {}
    desired, reported = flat(state.get("desired") or {}), flat(state.get("reported") or {})
    desired.pop("", None), reported.pop("", None)
    lacking = [key for key in desired if reported.get(key, ...) != desired[key]]
    details(
        [
            ("Device", device),
            ("Shadow", name or "classic"),
            ("Version", document["version"]),
            (
                "State",
                signed("drifted", f"{len(lacking)} to be taken over") if lacking else signed("in sync"),
            ),
        ]
    )

    def cell(side: dict[str, Any], key: str) -> str:
        return compact(side[key], 40) if key in side else ""

    rows = [{"key": key} for key in sorted({*desired, *reported})]
    if rows:
        listing(
            rows,
            [
                ("Key", lambda r: r["key"]),
                ("Desired", lambda r: cell(desired, r["key"])),
                ("Reported", lambda r: cell(reported, r["key"])),
                ("", lambda r: signed("drifted", "lacks it") if r["key"] in lacking else ""),
            ],
            as_json=False,
            empty="",
        )
