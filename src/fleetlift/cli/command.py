"""`fleetlift command`: send a command to a device, see what became of it."""

import json
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from fleetlift.cli.client import Data, Json, Limit, connect, segment

app = typer.Typer(help="Commands to devices.", no_args_is_help=True)

FINAL = ("succeeded", "failed", "would-execute", "expired")
Device = Annotated[str, typer.Argument(help="The device.")]


class Mode(StrEnum):
    EXECUTE = "execute"
    DRY_RUN = "dry-run"


def read_params(pairs: list[str], document: str | None) -> dict[str, Any]:
    """Parameters from `key=value` (a value that is JSON is taken as such) and from one JSON object."""
    params: dict[str, Any] = {}
    if document is not None:
        try:
            params = json.loads(document)
        except ValueError as exc:
            raise typer.BadParameter(f"--params is not JSON: {exc}") from exc
        if not isinstance(params, dict):
            raise typer.BadParameter('--params takes a JSON object, as in \'{"door": "left"}\'')
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found or not name:
            raise typer.BadParameter(f"{pair!r}: write NAME=VALUE, as in door=left")
        try:
            params[name] = json.loads(text)
        except ValueError:
            params[name] = text
    return params


@app.command()
def send(
    device: Device,
    name: Annotated[str, typer.Argument(help="The command, as in lock.")],
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Parameters.", show_default=False)
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="Parameters as one JSON object.", show_default=False)
    ] = None,
    expires_in: Annotated[float, typer.Option("--expires-in", help="Seconds it is good for.")] = 60.0,
    mode: Annotated[
        Mode, typer.Option("--mode", help="dry-run: the device answers what it would do.")
    ] = Mode.EXECUTE,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the outcome.")] = True,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Send a command and wait for its outcome. Exit status 1 when it failed or expired."""
    from fleetlift.cli.screen import emit_json

    body = {
        "name": name,
        "params": read_params(pairs or [], params),
        "expires_in": expires_in,
        "mode": mode.value,
    }
    with connect(data) as api:
        sent = api.post(f"/devices/{segment(device)}/commands", body)
        deadline = time.monotonic() + expires_in + 15
        while wait and sent["status"] not in FINAL and time.monotonic() < deadline:
            time.sleep(0.2)
            sent = api.get(f"/commands/{sent['id']}")
    if as_json:
        emit_json(sent)
    else:
        display(sent)
    raise typer.Exit(1 if sent["status"] in ("failed", "expired") else 0)


@app.command()
def show(
    command: Annotated[str, typer.Argument(help="The command's id.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show a command: its status, and outcome and latency by each path."""
    from fleetlift.cli.screen import emit_json

    with connect(data) as api:
        found = api.get(f"/commands/{segment(command)}")
    if as_json:
        emit_json(found)
    else:
        display(found)


@app.command("list")
def list_(device: Device, limit: Limit = 100, data: Data = None, as_json: Json = False) -> None:
    """List a device's commands, newest first."""
    from fleetlift.cli.screen import compact, listing, signed, span, when

    with connect(data) as api:
        items, more = api.items(f"/devices/{segment(device)}/commands", limit)
    listing(
        items,
        [
            ("Command", lambda c: c["id"]),
            ("Name", lambda c: c["name"]),
            ("Status", lambda c: signed(c["status"])),
            (
                "Latency",
                lambda c: ", ".join(span(p["latency"]) for p in c["paths"] if p["latency"] is not None),
            ),
            ("Sent", lambda c: when(c["created_at"])),
            ("Mode", lambda c: c["mode"]),
            ("By path", lambda c: ", ".join(f"{p['path']} {p['status']}" for p in c["paths"])),
            ("Params", lambda c: compact(c["params"], 30)),
        ],
        as_json=as_json,
        empty="No command was sent to this device.",
        more=more,
    )


def display(command: Mapping[str, Any]) -> None:
    from fleetlift.cli.screen import compact, details, signed, span, when

    pairs: list[tuple[str, Any]] = [
        ("Command", command["id"]),
        ("Device", command["device"]),
        ("Name", f"{command['name']} {compact(command['params'])}"),
        ("Mode", command["mode"]),
        ("Status", signed(command["status"])),
        ("Sent", f"{when(command['created_at'])} by {command['created_by']}"),
        ("Expires", when(command["expires_at"])),
    ]
    for path in command["paths"]:
        latency = f" after {span(path['latency'])}" if path["latency"] is not None else ""
        told = outcome(path["status"], path["detail"])
        pairs.append((f"By {path['path']}", signed(path["status"], f"{path['status']}{latency}{told}")))
    details(pairs)


def outcome(status: str, detail: Mapping[str, Any]) -> str:
    """What a path tells beside its status: the reason in words, then all the rest as JSON; often nothing."""
    from fleetlift.cli.screen import compact

    rest = dict(detail)
    code, text = str(rest.pop("reasonCode", "")), str(rest.pop("reasonDescription", ""))
    if code.lower().replace("_", "-") == status:
        code = ""  # WOULD_EXECUTE says no more than would-execute
    reason = ": ".join(filter(None, (code, text)))
    return (f", {reason}" if reason else "") + (f"  {compact(rest, 200)}" if rest else "")
