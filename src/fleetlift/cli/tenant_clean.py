"""`fleetlift tenant leftovers` and `clean`: what a move has left on a database."""

import asyncio
import os
from typing import Annotated

import typer

from fleetlift.cli.client import Json

app = typer.Typer(help="What a move has left on a database.", no_args_is_help=True)

FromEnv = Annotated[str, typer.Option("--from-env", help="Environment variable with the database's URL.")]


def _url(variable: str) -> str:
    from fleetlift.core.errors import BadInput

    if not (url := os.environ.get(variable, "")):
        raise BadInput(f"the environment variable {variable} is not set: it has the database's URL")
    return url


@app.command()
def leftovers(
    from_env: FromEnv,
    move: Annotated[str, typer.Option("--move", help="Of this move only, by its name.")] = "",
    as_json: Json = False,
) -> None:
    """List what moves have left on a database: slots, publications, fences, schemas, settings."""
    from fleetlift.cli.screen import listing
    from fleetlift.tenant.leftovers import leftovers as found_at

    found = asyncio.run(found_at(_url(from_env), move or None))
    listing(
        [{"kind": str(one.kind), "name": one.name} for one in found],
        [("Kind", lambda one: one["kind"]), ("Name", lambda one: one["name"])],
        as_json=as_json,
        empty="Nothing of a move is there.",
        more=False,
    )


@app.command()
def clean(
    move: Annotated[str, typer.Argument(help="The move's name.")],
    from_env: FromEnv,
    other_env: Annotated[
        str,
        typer.Option(
            "--other-env", help="Environment variable with the other side's URL, where it is needed."
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove all that a move has left on a database. The move cannot go on or back after that.

    A fence that keeps a tenant's writes out goes too: make sure that its applications write at its new place.
    """
    from fleetlift.cli.screen import say
    from fleetlift.tenant.leftovers import clean as clean_at

    url = _url(from_env)
    if not yes:
        typer.confirm(f"Remove all of move {move} from this database?", abort=True)
    removed = asyncio.run(clean_at(url, move, other_url=_url(other_env) if other_env else None))
    for one in removed:
        say("done", f"removed: {one.text}")
    if not removed:
        say("done", f"Nothing of move {move} is there.")
