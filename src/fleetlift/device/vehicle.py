"""What the recorded vehicles do when they are told to: the application beside the agent."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

COMMANDS = ("lock", "unlock", "honk", "set-interval")


class _Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`set-interval`: seconds between two signs of life."""

    health_s: float


class VehicleApplication:
    """Doors, horn and configuration. `takes_s` is how long the vehicle is busy with a command."""

    def __init__(self, *, takes_s: float = 0.05) -> None:
        self.locked = True
        self.health_s = 10.0
        self._takes_s = takes_s
        self.on_health_s: Callable[[float], None] = lambda seconds: None

    def judge(self, name: str, params: bytes) -> str | None:
        if name not in COMMANDS:
            return f"{name!r} is not known; this vehicle knows {', '.join(COMMANDS)}"
        if name == "set-interval":
            try:
                health_s = msgspec.json.decode(params, type=_Interval).health_s
            except msgspec.DecodeError as exc:
                return f'set-interval takes {{"health_s": seconds}}: {exc}'
            if not 1 <= health_s <= 3600:
                return f"health_s {health_s:g}: use 1 to 3600 seconds"
        return None

    async def execute(self, id_: str, name: str, params: bytes) -> tuple[bool, bytes]:
        if (why := self.judge(name, params)) is not None:
            return False, msgspec.json.encode({"code": "NOT_UNDERSTOOD", "reason": why})
        await asyncio.sleep(self._takes_s)
        result: dict[str, Any]
        if name == "set-interval":
            self.health_s = msgspec.json.decode(params, type=_Interval).health_s
            self.on_health_s(self.health_s)
            result = {"health_s": self.health_s}
        elif name == "honk":
            result = {"honked": True}
        else:
            self.locked = name == "lock"
            result = {"locked": self.locked}
        return True, msgspec.json.encode(result)
