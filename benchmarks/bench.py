"""What a bench gets to work with: a scratch directory, a progress line, profiles."""

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TextIO

from benchmarks.figures import Result
from benchmarks.processes import Hot, Profile, cpu_profile, hottest

_SHOWN_EVERY_S = 0.5  # on a terminal, where a line is written over
_LOGGED_EVERY_S = 10.0  # elsewhere, where each stays


class Bench:
    """One bench at work. `directory` is its own, on a real disk, and goes away afterwards.

    `quick` asks for the shortest run that still shows something; its figures are marked as such.
    """

    def __init__(
        self, name: str, directory: Path, *, quick: bool = False, output: TextIO | None = None
    ) -> None:
        self.name, self.directory, self.quick = name, directory, quick
        self.profiles: list[Profile] = []
        self.earlier: dict[str, Result] = {}  # by figure: what benches before this one found in the same run
        self._output = output or sys.stderr
        self._terminal = self._output.isatty()
        self._what = ""
        self._began = 0.0
        self._shown = 0.0
        self._width = 0

    def seconds(self, full: float, quick: float = 10.0) -> float:
        """How long to measure: `full`, or less in a quick run."""
        return min(full, quick) if self.quick else full

    def progress(
        self, what: str, done: float | None = None, total: float | None = None, unit: str = ""
    ) -> None:
        """Say what is going on; with `done` and `total` also how fast, and how long it still takes."""
        now = time.monotonic()
        fresh = what != self._what
        if fresh:
            self._what, self._began = what, now
        every_s = _SHOWN_EVERY_S if self._terminal else _LOGGED_EVERY_S
        if not fresh and now - self._shown < every_s and done != total:
            return
        self._shown = now
        self._write(f"{self.name}: {what}{_pace(done, total, unit, now - self._began)}")

    def clear(self) -> None:
        """Take the progress line away, where it can be."""
        if self._terminal and self._width:
            self._output.write("\r" + " " * self._width + "\r")
            self._output.flush()
        self._width, self._what = 0, ""

    def _write(self, text: str) -> None:
        if self._terminal:
            text = text[:78]
            self._output.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._output.write(text + "\n")
        self._output.flush()

    @contextlib.asynccontextmanager
    async def profiled(self, what: str, roots: Mapping[str, int]) -> AsyncIterator[Profile]:
        """CPU seconds of processes (name: pid, and all below them) while the block runs.

        Give a backend as `{"serve": backend.pid}`: its workers and engines appear by their roles.
        """
        async with cpu_profile(what, roots) as profile:
            yield profile
        self.profiles.append(profile)

    async def look_inside(self, pids: Mapping[str, int], *, for_s: float = 5.0) -> list[Hot]:
        """The hottest functions of Python processes, seen for some seconds from now on.

        Costs them a little: keep the load up for it, but outside what is measured. Lands in the profile that
        was taken last.
        """
        found = await hottest(pids, for_s=for_s)
        if self.profiles:
            self.profiles[-1].hot.extend(found)
        return found


def _pace(done: float | None, total: float | None, unit: str, for_s: float) -> str:
    if done is None:
        return ""
    text = f", {done:,.0f}"
    if total:
        text += f" of {total:,.0f}"
    text += f" {unit}" if unit else ""
    if for_s > 0.5 and done > 0:
        rate = done / for_s
        if unit != "s":
            text += f", {rate:,.0f}/s"
        if total:
            text += f", {max(0.0, (total - done) / rate):,.0f} s left"
    return text
