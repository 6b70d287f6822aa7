"""The `fleetlift` command. Each area is loaded only when it is called, so that `--help` answers at once.

Exit status: 0 done, 1 failed or reverted, 2 wrong use.
"""

import importlib
import os
import re
import sys
from typing import Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from fleetlift import __version__
from fleetlift.core.errors import FleetError


class Area(NamedTuple):
    """One command at the top: where it lives and what `--help` says of it, known without loading it.

    `targets` are `module:attribute`; an attribute is a Typer app or a plain function. Several apps are
    joined into one group.
    """

    help: str
    targets: tuple[str, ...]
    panel: str = "Other"
    hidden: bool = False


RUN, MOVE, LOOK, TRY = "Run a backend", "Move a fleet", "Devices and data", "Try it out"
CLI = "fleetlift.cli."

AREAS: dict[str, Area] = {
    "serve": Area("Run a backend: engines, device edge, services, API.", (CLI + "serve:serve",), RUN),
    "doctor": Area(
        "Check this machine for what a backend needs, and say what to do.", (CLI + "doctor:doctor",), RUN
    ),
    "token": Area("Tokens for people and programs: create, list, revoke.", (CLI + "tokens:app",), RUN),
    "tenant": Area(
        "Tenants, the customers of a platform: create, list; explain, verify and clean up their moves.",
        (CLI + "tenants:app", CLI + "tenant_data:app", CLI + "tenant_rows:app", CLI + "tenant_clean:app"),
        RUN,
    ),
    "migrate": Area(
        "Move a live fleet, or a tenant: check, start, watch, approve, pause, revert, report, rehearse.",
        (CLI + "migrate:app", CLI + "certificate:of_migration", CLI + "rehearse:app"),
        MOVE,
    ),
    "relay": Area(
        "Stand at the old address: forward devices, list stragglers, let them go.", (CLI + "relay:app",), MOVE
    ),
    "dns": Area(
        "Names that devices come by: what servers answer, and what stands against a move.",
        (CLI + "dns:app",),
        MOVE,
    ),
    "capture": Area(
        "Record real device traffic, secrets removed, with a proof that it is complete.",
        (CLI + "capture:capture",),
        MOVE,
    ),
    "replay": Area(
        "Play a capture against another side; no device takes it for real.", (CLI + "capture:replay",), MOVE
    ),
    "load": Area(
        "Load tests: play a scenario against a target, show what it would send, fit one to a capture.",
        (CLI + "load:app",),
        MOVE,
    ),
    "certificate": Area(
        "Certificates of migrations: verify one, show the key that this instance signs with.",
        (CLI + "certificate:app",),
        MOVE,
    ),
    "device": Area(
        "Devices: list, show, put, delete; run one by hand.", (CLI + "devices:app", CLI + "device:app"), LOOK
    ),
    "telemetry": Area(
        "What devices sent: stored messages, the ledger, dead letters.", (CLI + "telemetry:app",), LOOK
    ),
    "command": Area("Commands to devices: send, show, list.", (CLI + "command:app",), LOOK),
    "shadow": Area("Desired and reported state: get, set, delete.", (CLI + "shadow:app",), LOOK),
    "demo": Area(
        "The main job, end to end, on this machine with recorded vehicles.", (CLI + "demo:demo",), TRY
    ),
    "demo-tenant": Area(
        "One tenant leaves a shared database and cloud, end to end, on this machine.",
        (CLI + "demo_tenant:demo_tenant",),
        TRY,
    ),
    "soak": Area(
        "Kill and halt every process of running migrations, and balance the account.",
        (CLI + "soak:soak",),
        TRY,
    ),
    "legacy": Area(
        "A home-grown telemetry server of the old kind, to move away from.", (CLI + "legacy:app",), TRY
    ),
    "simulate": Area(
        "Whole migrations on a simulated clock, with faults; every promise checked.",
        (CLI + "simulate:simulate",),
        TRY,
    ),
}


def load(name: str) -> Any:
    """The command that the area `name` stands for, as a click command; imports its modules."""
    area = AREAS[name]
    loaded = []
    for target in area.targets:
        module, _, attribute = target.partition(":")
        try:
            loaded.append(getattr(importlib.import_module(module), attribute))
        except ModuleNotFoundError as missing:
            if missing.name != module or len(area.targets) == 1:
                raise
            # an area of several parts stands without one that this build lacks
    if len(loaded) == 1 and not isinstance(loaded[0], typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name, help=None)(loaded[0])
        command = get_command(app)
    elif len(loaded) == 1 and loaded[0].registered_callback is not None:
        command = get_command(loaded[0])  # does something without a subcommand too
    else:
        app = typer.Typer(help=area.help, no_args_is_help=True, add_completion=False)
        for part in loaded:
            app.registered_commands.extend(part.registered_commands)
            app.registered_groups.extend(part.registered_groups)
        if len(app.registered_commands) + len(app.registered_groups) == 1:
            app.callback()(lambda: None)  # one subcommand is still a subcommand
        command = get_command(app)
    command.name = name
    reflow(command)
    return command


def reflow(command: Any) -> None:
    """Join the source's lines in every help text: paragraphs break where the screen ends."""
    if command.help:
        paragraphs = re.split(r"\n\s*\n", command.help.strip())
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for child in getattr(command, "commands", {}).values():
        reflow(child)


class LazyCommand(TyperCommand):
    """Stands in for an area until it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        assert self.name is not None
        return load(self.name).make_context(info_name, args, parent=parent, **extra)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        assert self.name is not None
        return load(self.name).shell_complete(ctx, incomplete)


app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fleetlift {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Move a live fleet of devices from one IoT backend to another: nothing lost, nothing done twice, and a
    way back at every step. Exit status: 0 done, 1 failed or reverted, 2 wrong use."""


def command_tree() -> TyperGroup:
    """The whole command with a stand-in for every area."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    for name, area in AREAS.items():
        group.add_command(
            LazyCommand(
                name, help=area.help, hidden=area.hidden, rich_help_panel=area.panel, callback=lambda: None
            )
        )
    return group


def main() -> NoReturn:
    """Run the command line; every error on purpose is one line that says what to do."""
    debug = bool(os.environ.get("FLEETLIFT_DEBUG"))
    try:
        command_tree().main(prog_name="fleetlift")
    except FleetError as exc:
        if debug:
            raise
        from fleetlift.cli.screen import fail

        fail(str(exc) or type(exc).__name__)
        sys.exit(1)
    except Exception as exc:
        if debug:
            raise
        from fleetlift.cli.screen import fail

        fail(
            f"{type(exc).__name__}: {exc}",
            "This is a fault in Fleetlift. FLEETLIFT_DEBUG=1 shows where it happened.",
        )
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
