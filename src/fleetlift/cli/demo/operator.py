"""The operator's traffic of the demo: a person at a console who never stops working while the fleet moves."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from fleetlift.cli.client import Api, segment
from fleetlift.core.errors import FleetError

COMMANDS: Final[Sequence[tuple[str, dict[str, Any]]]] = (
    ("lock", {}),
    ("unlock", {}),
    ("set-interval", {"health_s": 10}),
    ("set-interval", {"health_s": 20}),
)


class Operator:
    """Sends commands to random devices at a steady rate, from a thread of its own.

    The model is open: the next command is due at its time whether or not the last one was answered.
    """

    def __init__(
        self, api: Api, devices: Sequence[str], rate_s: float, *, expires_in_s: float = 20.0
    ) -> None:
        self._api, self._devices, self._rate_s, self._expires_in_s = api, devices, rate_s, expires_in_s
        self._random = random.Random(2026)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="operator", daemon=True)
        self.sent: list[str] = []
        self.refused: list[str] = []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No further commands; returns when the last one is handed over."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due += self._random.expovariate(self._rate_s)
            name, params = self._random.choice(COMMANDS)
            path = f"/devices/{segment(self._random.choice(self._devices))}/commands"
            body = {"name": name, "params": params, "expires_in": self._expires_in_s, "mode": "execute"}
            try:
                self.sent.append(self._api.post(path, body)["id"])
            except FleetError as exc:
                self.refused.append(str(exc))
