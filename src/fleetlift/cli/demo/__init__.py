"""`fleetlift demo`: the main job end to end on this machine, with recorded real vehicles."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    devices: Annotated[
        int, typer.Option(min=12, max=5000, help="Vehicles; beyond 57 the recorded trips play again.")
    ] = 57,
    speed: Annotated[float, typer.Option(min=0.1, max=50, help="How much faster than recorded.")] = 1.0,
    directory: Annotated[Path, typer.Option(help="Where it works and leaves its report.")] = Path(
        "build/demo"
    ),
    bake: Annotated[float, typer.Option(min=1, help="Seconds for which each wave is watched.")] = 6.0,
    commands: Annotated[float, typer.Option(min=0.1, max=500, help="Operator's commands a second.")] = 50.0,
) -> None:
    """Move a live fleet from an old backend to Fleetlift, with a fault on the way.

    Starts everything it needs on loopback, shows the migration live, ends with a verdict, and leaves a report
    at DIRECTORY/report.html. Exit status 0 when nothing was lost and nothing happened twice.
    """
    from rich.console import Console

    from fleetlift.cli.demo.story import Demo, Options

    options = Options(devices=devices, speed=speed, directory=directory, bake_s=bake, commands_per_s=commands)
    raise typer.Exit(Demo(options, Console(highlight=False)).run())
