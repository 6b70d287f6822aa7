"""A `python -m …` process that is started, struck, started again and stopped; its output is in a log file."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleetlift.core.errors import Unavailable
from fleetlift.supervise import before_exec

FLEETLIFT = "fleetlift.cli.main"


class Part:
    """One process at a time. It dies with the process that started it, however that ends."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        *,
        module: str = FLEETLIFT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.log = name, log
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._said_before = 0  # bytes of the log that its predecessors have written

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        assert self.pid is None, f"{self.name} runs already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._said_before = output.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which stops its parts in order
                preexec_fn=before_exec(os.getpid(), signal.SIGTERM),
            )

    def printed(self, word: str) -> bool:
        """True once its output contains `word`. Raises Unavailable when it has ended instead."""
        with self.log.open("rb") as file:
            file.seek(self._said_before)
            text = file.read().decode(errors="replace")
        if word in text:
            return True
        if self.pid is None:
            status = self._process.returncode if self._process is not None else None
            last = "\n".join(text.splitlines()[-15:])
            raise Unavailable(f"{self.name} ended with status {status}:\n{last}\n(log: {self.log})")
        return False

    def wait_printed(self, word: str, *, within_s: float) -> None:
        """Block until it has printed `word`. Raises Unavailable."""
        deadline = time.monotonic() + within_s
        while not self.printed(word):
            self._not_later_than(deadline, within_s)
            time.sleep(0.05)

    async def until_printed(self, word: str, *, within_s: float) -> None:
        """As `wait_printed`, without blocking the loop."""
        deadline = time.monotonic() + within_s
        while not self.printed(word):
            self._not_later_than(deadline, within_s)
            await asyncio.sleep(0.02)

    def _not_later_than(self, deadline: float, within_s: float) -> None:
        if time.monotonic() > deadline:
            raise Unavailable(f"{self.name} was not ready within {within_s:.0f} s; its log is {self.log}")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, *, within_s: float = 30.0) -> int | None:
        """SIGTERM, then SIGKILL. Returns the exit status; harmless when it has ended already."""
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.terminate()
            process.send_signal(signal.SIGCONT)  # one that was halted would not hear the first
            try:
                process.wait(within_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode
