"""Write docs/cli.md from the command line itself: `python scripts/make_cli_docs.py [--check]`."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fleetlift.cli.main import AREAS, load

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

HEAD = """# The command line

This page is written by `scripts/make_cli_docs.py` from the commands themselves.

**Where it calls.** Commands that ask a server find it by `--data DIR` (the directory `fleetlift serve` runs
on: its `admin.env` holds address and token), else by `FLEETLIFT_URL`, `FLEETLIFT_TOKEN` and `FLEETLIFT_CA` of
the environment, else in `./fleetlift-data`.

**Output.** Results go to standard output, remarks and errors to standard error. Every list has `--json`.
Every coloured word has a mark beside it; `NO_COLOR=1` leaves the colours out.

**Exit status.** 0 done; 1 failed, reverted or held; 2 wrong use. An error is one line that says what to do;
`FLEETLIFT_DEBUG=1` adds where it happened.
"""


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The commands below `name`, in their own order, hidden ones left out."""
    if getattr(command, "hidden", False):
        return
    children = getattr(command, "commands", None)
    if not children:
        yield name, command
        return
    for child, found in children.items():
        yield from commands(f"{name} {child}", found)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def usage(name: str, command: Any) -> str:
    parts = [f"fleetlift {name}"]
    for param in command.params:
        if param.param_type_name == "argument":
            shown = (param.metavar or param.name.upper()).strip("[]{}").removesuffix("]...").upper()
            many = "..." if param.nargs == -1 or getattr(param, "multiple", False) else ""
            parts.append(f"{shown}{many}" if param.required else f"[{shown}{many}]")
    return " ".join([*parts, "[OPTIONS]"])


def rows(command: Any) -> Iterator[str]:
    """One row of the table for each argument and option."""
    for param in command.params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        if param.param_type_name == "argument":
            left = param.name.upper()
        else:
            left = ", ".join([*param.opts, *getattr(param, "secondary_opts", [])])
        default = getattr(param, "show_default", True)
        value = param.default
        text = param.help or ""
        if isinstance(default, str):
            text += f" Default: {default}."
        elif default and value not in (None, "", False, True, ()) and not callable(value):
            text += f" Default: {getattr(value, 'value', value)}."
        yield f"| `{left}` | {cell(text)} |"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for area, entry in AREAS.items():
        if entry.hidden:
            continue
        parts.append(f"## fleetlift {area}\n")
        found = list(commands(area, load(area)))
        if found[0][0] != area:
            parts.append(f"{entry.help}\n")
        for name, command in found:
            if name != area:
                parts.append(f"### fleetlift {name}\n")
            parts.append(f"```\n{usage(name, command)}\n```\n\n{cell(command.help or '')}\n")
            table = list(rows(command))
            if table:
                parts.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *table]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == text else f"{PAGE.name} is out of date: `make docs` writes it anew")
    PAGE.write_text(text)
