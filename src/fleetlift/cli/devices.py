"""`fleetlift device list|show|put|delete`: the registry. `device run` is in `device.py`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fleetlift.cli.client import Data, Json, Limit, connect, segment

app = typer.Typer(help="Devices.", no_args_is_help=True)

Device = Annotated[str, typer.Argument(help="The device's id.")]


@app.command("list")
def list_(
    where: Annotated[
        str, typer.Option("--where", help="Which ones, as in 'attributes.hardware >= 3 and connected'.")
    ] = "",
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Only this tenant's.", show_default=False)
    ] = None,
    limit: Limit = 100,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List devices by id."""
    from fleetlift.cli.screen import compact, listing, when

    with connect(data) as api:
        items, more = api.items("/devices", limit, where=where or None, tenant=tenant)
    listing(
        items,
        [
            ("Device", lambda d: d["id"]),
            ("Connection", lambda d: connection(d)),
            ("Since", lambda d: when(d["since"])),
            ("Attributes", lambda d: compact(d["attributes"])),
            ("Tenant", lambda d: d["tenant"]),
            ("Dialect", lambda d: d["dialect"]),
        ],
        as_json=as_json,
        empty="No device fits." if where or tenant else "No device is registered.",
        more=more,
    )


@app.command()
def show(device: Device, data: Data = None, as_json: Json = False) -> None:
    """Show a device, and the newest message of each of its channels."""
    from fleetlift.cli.screen import compact, details, emit_json, listing, when

    with connect(data) as api:
        found = api.get(f"/devices/{segment(device)}")
        if as_json:
            emit_json(found)
            return
        latest = api.get(f"/devices/{segment(device)}/telemetry/latest")["items"]
    details(
        [
            ("Device", found["id"]),
            ("Tenant", found["tenant"]),
            ("Dialect", found["dialect"]),
            ("Attributes", json.dumps(found["attributes"], ensure_ascii=False)),
            ("Credentials", ", ".join(found["credentials"]) or "none: it cannot sign in"),
            ("Connection", connection(found)),
            *([("Since", when(found["since"]))] if found["since"] else []),
            *([("Left because", found["reason"])] if found["reason"] else []),
            ("Created", when(found["created_at"])),
            ("Changed", when(found["updated_at"])),
        ]
    )
    if latest:
        listing(
            latest,
            [
                ("Channel", lambda m: m["channel"]),
                ("At", lambda m: when(m["ts"])),
                ("Seq", lambda m: "" if m["seq"] is None else str(m["seq"])),
                ("Path", lambda m: m["path"]),
                ("Newest message", lambda m: compact(m["body"], 80)),
            ],
            as_json=False,
            empty="",
        )


@app.command()
def put(
    device: Device,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Who owns it; not needed with a tenant's token.", show_default=False),
    ] = None,
    dialect: Annotated[str, typer.Option("--dialect", help="The dialect it speaks.")] = "native",
    attributes: Annotated[str, typer.Option("--attributes", help="A JSON object.")] = "{}",
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file",
            help="File that holds its password; '-' reads standard input.",
            show_default=False,
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option("--public-key", help="PEM file, for signed JWTs.", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="PEM file of its certificate.", show_default=False),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Create a device or replace it. Without a credential given, it keeps those it has."""
    import sys

    from fleetlift.cli.screen import emit_json, say

    try:
        parsed = json.loads(attributes)
    except ValueError as exc:
        raise typer.BadParameter(f"--attributes is not JSON: {exc}") from exc
    body: dict[str, Any] = {"dialect": dialect, "attributes": parsed}
    if tenant is not None:
        body["tenant"] = tenant
    credentials = []
    if password_file is not None:
        text = sys.stdin.read() if str(password_file) == "-" else read_file("--password-file", password_file)
        credentials.append({"kind": "password", "value": text.rstrip("\r\n")})
    if public_key is not None:
        credentials.append({"kind": "public-key", "value": read_file("--public-key", public_key)})
    if certificate is not None:
        credentials.append({"kind": "x509", "value": read_file("--certificate", certificate)})
    if credentials:
        body["credentials"] = credentials
    with connect(data) as api:
        made = api.request("PUT", f"/devices/{segment(device)}", body=body)
    if as_json:
        emit_json(made)
    else:
        say("done", f"{device} is registered.")


@app.command()
def delete(device: Device, data: Data = None) -> None:
    """Delete a device: it is disconnected and not let in again. What it sent stays stored."""
    from fleetlift.cli.screen import say

    with connect(data) as api:
        api.request("DELETE", f"/devices/{segment(device)}")
    say("done", f"{device} is deleted.")


def read_file(option: str, path: Path) -> str:
    """The text of a file that an option names; wrong use when it cannot be read."""
    try:
        return path.read_text()
    except OSError as exc:
        raise typer.BadParameter(f"{option} {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise typer.BadParameter(f"{option} {path}: not a text file in UTF-8") from exc


def connection(device: Any) -> Any:
    from fleetlift.cli.screen import signed

    if device["since"] is None:
        return signed("never seen")
    return signed("connected" if device["connected"] else "away")
