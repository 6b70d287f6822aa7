"""Canaries: messages in the source's log that tell, when they come out, how far behind following is."""

import asyncio
import secrets
import time
from collections import deque
from typing import Any, Final

import asyncpg
import msgspec

CANARY: Final = "fleetlift"


class Canaries:
    """Those of one follower. `side`: the connection they are sent by; `flushed`: the source's log, as last
    seen."""

    def __init__(self) -> None:
        self.side: asyncpg.Connection[Any] | None = None
        self.lock = asyncio.Lock()
        self.flushed = 0
        self.out_at = 0.0  # when the last one came out
        self._nonce = secrets.token_hex(6)
        self._count = 0
        self._out: deque[tuple[int, float]] = deque()  # those that have not come out, and when they went in

    def clear(self) -> None:
        """Nothing is known until another one has come out."""
        self._out.clear()
        self.out_at = 0.0

    async def emit(self) -> None:
        side = self.side
        if side is None:
            raise OSError("not connected to the source")
        async with self.lock:
            self._count += 1
            number = self._count
            self._out.append((number, time.monotonic()))
            body = msgspec.json.encode({"of": self._nonce, "n": number}).decode()
            self.flushed = await side.fetchval(
                "SELECT (pg_logical_emit_message(true, $1, $2) - '0/0')::bigint", CANARY, body
            )

    def came(self, content: bytes) -> None:
        try:
            body = msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.DecodeError:
            return
        if body.get("of") != self._nonce:
            return
        while self._out and self._out[0][0] <= int(body.get("n", 0)):
            self._out.popleft()
        self.out_at = time.monotonic()

    def lag_s(self, now: float) -> float | None:
        if self._out:
            return now - self._out[0][1]
        return 0.0 if self.out_at else None
