"""What the work of every step has at hand: the plan, both databases, what it remembers and what it shows."""

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

from fleetlift.config import Settings
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.derive import closure_of
from fleetlift.core.tenant.move import MoveState
from fleetlift.core.tenant.plan import TenantPlan
from fleetlift.core.tenant.rules import parse_rules
from fleetlift.core.tenant.schema_changes import schema_changes, told
from fleetlift.migrate.tenant_check import url_of
from fleetlift.store.pool import Pool
from fleetlift.tenant.follow_state import Direction
from fleetlift.tenant.introspect import read_schema

AWAY: Final = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # what a connection says that died in the middle of a statement
    Unavailable,
)
"""What is waited out: one of the databases, or what stands before it, is away."""

Save = Callable[[int, Mapping[str, Any]], Awaitable[None]]


class Move:
    """One move, as its works see it. `at` is always a step's index in the plan."""

    def __init__(
        self,
        plan: TenantPlan,
        *,
        settings: Settings,
        backend: Pool,
        files: Mapping[str, str],
        state: Callable[[], MoveState],
        save: Save,
        kill: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.settings = settings
        self.backend = backend
        self.files = files
        self.kill = kill
        self._state = state
        self._save = save
        self._closure: Closure | None = None
        self._token = ""
        self.told: tuple[str, dict[str, Any]] = ("", {})
        self.directory: Path = settings.path / "moves" / plan.name

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def source_url(self) -> str:
        return url_of(self.plan.source)

    @property
    def target_url(self) -> str:
        return url_of(self.plan.target)

    @property
    def replica_url(self) -> str | None:
        """Where the copy reads, when the plan wants it from a replica."""
        if not self.plan.copy.from_replica:
            return None
        if not self.plan.source.replica:
            raise BadInput("'from_replica: true' needs 'replica:' beside the source's 'postgresql:'")
        return url_of(self.plan.source, of=self.plan.source.replica)

    @property
    def token(self) -> str:
        """What lets the streams pass the fences; made once, kept in a file of the mover's own."""
        if not self._token:
            path = self.directory / "fence.key"
            self.directory.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)
                part.touch(mode=0o600)
                part.write_text(secrets.token_urlsafe(32))
                os.link(part, path)
            self._token = path.read_text()
        return self._token

    @property
    def pass_settings(self) -> dict[str, str]:
        """Session settings of who may write though a fence is closed."""
        return {"fleetlift_fence.pass": self.token}

    @property
    def state(self) -> MoveState:
        return self._state()

    def facts(self, at: int) -> Mapping[str, Any]:
        """What the work of a step has saved, also before a kill."""
        return self._state().steps[at].facts

    async def save(self, at: int, **facts: Any) -> None:
        """Remember `facts` of a step, committed when this returns."""
        await self._save(at, {**self.facts(at), **facts})

    async def forget(self, at: int) -> None:
        await self._save(at, {})

    def forget_spools(self) -> None:
        """Remove what streams that are over have kept on disk."""
        for direction in Direction:
            shutil.rmtree(self.directory / f"spool-{direction}", ignore_errors=True)

    def tell(self, text: str, **figures: Any) -> None:
        """Show what is going on; `figures` are added to those shown before."""
        self.told = (text, {**self.told[1], **{k: v for k, v in figures.items() if v is not None}})

    def begin_telling(self, figures: Mapping[str, Any]) -> None:
        self.told = ("", dict(figures))

    async def closure(self) -> Closure:
        """Which rows, by the source's schema as it was at the copy and the plan's rules. Raises BadInput.

        Kept in a file: whatever a mover that starts again finds on the source, it goes on with what the copy,
        the publication and the target's tables were made by.
        """
        if self._closure is None:
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                self._closure = msgspec.json.decode(self._closure_file.read_bytes(), type=Closure)
        if self._closure is None:
            closure = await self._closure_now()
            self.directory.mkdir(parents=True, exist_ok=True)
            part = self._closure_file.with_suffix(".part")
            part.write_bytes(msgspec.json.encode(closure))
            part.replace(self._closure_file)
            self._closure = closure
        return self._closure

    def forget_closure(self) -> None:
        """Read the schema anew the next time."""
        self._closure_file.unlink(missing_ok=True)
        self._closure = None

    async def source_changed(self) -> str:
        """What of the source's schema is not as it was at the copy, and what to do; "" when all is."""
        before = await self.closure()
        try:
            return told(schema_changes(before, await self._closure_now()))
        except BadInput as error:  # the plan's rules do not fit it any more
            return told((str(error),))

    async def _closure_now(self) -> Closure:
        conn = await asyncpg.connect(self.source_url, timeout=10.0)
        try:
            schema = await read_schema(conn)
        finally:
            await conn.close()
        return closure_of(schema, parse_rules(self.plan.copy.root, self.plan.copy.tables, schema))

    @property
    def _closure_file(self) -> Path:
        return self.directory / "closure.json"


async def until(
    condition: Callable[[], Awaitable[bool]], *, every_s: float = 0.1, within_s: float | None = None
) -> bool:
    """Wait for a condition; False when it has not come true in time."""
    deadline = None if within_s is None else time.monotonic() + within_s
    while not await condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        await asyncio.sleep(every_s)
    return True
