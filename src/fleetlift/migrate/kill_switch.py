"""A test hook: the controller, or the mover, kills itself at named steps.

With FLEETLIFT_KILL_AT=STEP[:N][,STEP[:N]…] in its environment the process kills itself (SIGKILL) when it
comes to that step for the Nth time (default 1), once for each entry: `DIR/killed-at` remembers which.
"""

import os
import signal
from pathlib import Path

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.cutover import RETURN_ORDER
from fleetlift.core.tenant.cutover import Step as CutoverStep
from fleetlift.migrate.runner import STEPS

MOVE_STEPS = (
    *("move-committed", "slot-made", "schema-made", "rows-copied", "schema-finished", "caught-up"),
    *("caches-warmed", "load-played", "freeze-installed", "drain-begun"),
    *("names-read", "ttl-lowered", "names-switched", "relay-told", "names-reverted"),
    *("drain-stopped", "thawed", "fence-removed", "source-cleaned", "target-gone"),
    *("target-released", "source-released", "all-released"),
    *(step.value for step in (*CutoverStep, *RETURN_ORDER)),
)
"""The mover's: of its rounds, of the steps' works, of the switch of a database and the way back from it."""
KNOWN = (*STEPS, *MOVE_STEPS)


class KillSwitch:
    """Dies at named steps, at each of them once."""

    def __init__(self, text: str, remember: Path) -> None:
        self._remember = remember
        done = remember.read_text().split() if text and remember.is_file() else []
        self._left: dict[str, int] = {}
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, _, times = entry.partition(":")
            if name not in KNOWN or not (times or "1").isdecimal():
                raise BadInput(f"FLEETLIFT_KILL_AT={text!r}: give STEP[:N]; steps are {', '.join(KNOWN)}")
            if name not in done:
                self._left[name] = int(times or 1)

    def step(self, name: str) -> None:
        if name in self._left:
            self._left[name] -= 1
            if self._left[name] <= 0:
                with self._remember.open("a") as file:
                    file.write(f"{name}\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.kill(os.getpid(), signal.SIGKILL)
