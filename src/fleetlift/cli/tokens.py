"""`fleetlift token`: who may do what."""

from enum import StrEnum
from typing import Annotated

import typer

from fleetlift.cli.client import Data, Json, Limit, connect, segment

app = typer.Typer(help="Tokens for people and programs.", no_args_is_help=True)


class Role(StrEnum):
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is, as it will stand in the audit log.")],
    role: Annotated[
        Role, typer.Option("--role", help="viewer reads; operator also acts; admin also manages.")
    ] = Role.VIEWER,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Only this tenant's things.", show_default=False)
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make a token. Its text is printed this once, alone on standard output."""
    from fleetlift.cli.screen import emit_json, note

    with connect(data) as api:
        made = api.post("/tokens", {"name": name, "role": role.value, "tenant": tenant})
    if as_json:
        emit_json(made)
        return
    scope = f"tenant {made['tenant']}" if made["tenant"] else "every tenant"
    note(f"Token {made['id']} for {name}: {role.value}, {scope}. It is shown this once:")
    typer.echo(made["token"])


@app.command("list")
def list_(limit: Limit = 100, data: Data = None, as_json: Json = False) -> None:
    """List tokens, without their secrets."""
    from fleetlift.cli.screen import listing, signed, when

    with connect(data) as api:
        items, more = api.items("/tokens", limit)
    listing(
        items,
        [
            ("Token", lambda t: t["id"]),
            ("Name", lambda t: t["name"]),
            ("Role", lambda t: t["role"]),
            ("Tenant", lambda t: t["tenant"] or "every"),
            ("Created", lambda t: when(t["created_at"])),
            ("", lambda t: signed("revoked", f"revoked {when(t['revoked_at'])}") if t["revoked_at"] else ""),
        ],
        as_json=as_json,
        empty="No token.",
        more=more,
    )


@app.command()
def revoke(token: Annotated[str, typer.Argument(help="The token's id.")], data: Data = None) -> None:
    """Make a token worthless. It stops working within five seconds."""
    from fleetlift.cli.screen import say

    with connect(data) as api:
        api.request("DELETE", f"/tokens/{segment(token)}")
    say("done", f"Token {token} is revoked.")
