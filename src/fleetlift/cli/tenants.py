"""`fleetlift tenant`: the customers of a platform."""

from typing import Annotated

import typer

from fleetlift.cli.client import Data, Json, Limit, connect

app = typer.Typer(help="Tenants, the customers of a platform.", no_args_is_help=True)


@app.command("list")
def list_(limit: Limit = 100, data: Data = None, as_json: Json = False) -> None:
    """List tenants."""
    from fleetlift.cli.screen import listing, when

    with connect(data) as api:
        items, more = api.items("/tenants", limit)
    listing(
        items,
        [
            ("Tenant", lambda t: t["id"]),
            ("Name", lambda t: t["name"]),
            ("Created", lambda t: when(t["created_at"])),
        ],
        as_json=as_json,
        empty="No tenant.",
        more=more,
    )


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Its id: lower-case letters, digits or '-'.")],
    name: Annotated[str, typer.Option("--name", help="How people call it.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Create a tenant."""
    from fleetlift.cli.screen import emit_json, say

    with connect(data) as api:
        made = api.post("/tenants", {"id": tenant, "name": name})
    if as_json:
        emit_json(made)
    else:
        say("done", f"Tenant {made['id']} is created.")
