"""The processes of the demo: started from the command line, as a user would, and stopped cleanly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fleetlift.core.errors import Unavailable
from fleetlift.supervise import before_exec


class Part:
    """One `fleetlift …` process with its output in a log file. It dies with the demo, however that ends."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, env: dict[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fleetlift.cli.main", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # Ctrl-C reaches the demo alone, which stops its parts in order
                preexec_fn=before_exec(os.getpid(), signal.SIGTERM),
            )

    def printed(self, word: str) -> bool:
        """True once a line of its output contains `word`. Raises Unavailable when it has ended instead."""
        text = self.log.read_text(errors="replace")
        if word in text:
            return True
        if self._process.poll() is not None:
            last = "\n".join(text.splitlines()[-15:])
            raise Unavailable(
                f"{self.name} ended with status {self._process.returncode}:\n{last}\n(log: {self.log})"
            )
        return False

    def wait_printed(self, word: str, *, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not self.printed(word):
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} was not ready within {within_s:.0f} s; its log is {self.log}")
            time.sleep(0.05)

    def stop(self, *, within_s: float = 30.0) -> int | None:
        """SIGTERM, then SIGKILL. Returns the exit status; harmless when it has ended already."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode
