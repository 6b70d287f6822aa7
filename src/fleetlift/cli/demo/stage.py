"""Where a demo is played: its directory and its clock, the programs it starts, and the verdict at its end."""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console, RenderableType
from rich.text import Text

from fleetlift.core.errors import Unavailable
from fleetlift.load.parts import Part

MARKER: Final = "demo.json"  # lies in directories that a demo may empty


class Stage:
    """Of one run. All that it leaves is in `directory`."""

    def __init__(self, directory: Path, console: Console) -> None:
        self.directory, self.console = directory, console
        self._started = time.monotonic()

    def say(self, text: str, *, sign: str = "✓", style: str = "green") -> None:
        at = Text(f"{time.monotonic() - self._started:4.0f} s ", style="dim")
        self.console.print(at, Text(sign, style=style), Text(text))

    @property
    def lasted_s(self) -> float:
        return round(time.monotonic() - self._started, 1)

    def clear(self, devices: int) -> None:
        """Begin with nothing; a directory that was not made by a demo is left alone."""
        if self.directory.is_dir() and any(self.directory.iterdir()):
            if not (self.directory / MARKER).is_file():
                raise Unavailable(f"{self.directory} holds something else: name another with --directory")
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / MARKER).write_text(json.dumps({"devices": devices}) + "\n")

    def start(
        self,
        parts: contextlib.ExitStack | contextlib.AsyncExitStack,
        name: str,
        arguments: list[str],
        ready: str,
        environment: Mapping[str, str] | None = None,
    ) -> Part:
        """A program that has printed `ready`; it stops with `parts`."""
        part = Part(name, arguments, self.directory / "logs" / f"{name}.log", environment=environment)
        parts.callback(part.stop)
        part.start()
        part.wait_printed(ready, within_s=60.0)
        return part

    def close(self, verdict: msgspec.Struct, shown: RenderableType, report: Path) -> None:
        """Keep the verdict, and show it."""
        (self.directory / "verdict.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(verdict), indent=2) + b"\n"
        )
        self.console.print()
        self.console.print(shown)
        self.console.print()
        self.say(f"the report is {report}; open it in a browser")
