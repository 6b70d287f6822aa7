"""`fleetlift demo-tenant`: one tenant leaves a multi-tenant cloud, end to end on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def demo_tenant(
    devices: Annotated[int, typer.Option(min=5, max=2000, help="The tenant's devices on line.")] = 40,
    rows: Annotated[
        int, typer.Option(min=1, max=2000, help="Values a device; there are 60 rows of devices a tenant.")
    ] = 500,
    writes: Annotated[
        float, typer.Option(min=1, max=2000, help="Writes a second of the tenant's application.")
    ] = 100.0,
    load: Annotated[
        float, typer.Option(min=10, max=20_000, help="Messages a second of the load test.")
    ] = 1000.0,
    directory: Annotated[Path, typer.Option(help="Where it works and leaves its report.")] = Path(
        "build/demo-tenant"
    ),
) -> None:
    """Move one of twenty tenants out of a shared database and cloud, while everybody works.

    Starts everything it needs on loopback: two PostgreSQL servers, two Fleetlifts, a relay, a name server, an
    application whose writers never stop, devices that look up a name. The tenant is explained, copied,
    followed, verified, validated under load, rehearsed once and switched. Ends with a verdict, and leaves a
    report at DIRECTORY/report.html. Exit status 0 when nothing was lost and nothing leaked.
    """
    import asyncio

    from rich.console import Console

    from fleetlift.cli.demo_tenant.story import Options, Story

    options = Options(devices=devices, rows=rows, writes_s=writes, load_s=load, directory=directory)
    raise typer.Exit(asyncio.run(Story(options, Console(highlight=False)).run()))
