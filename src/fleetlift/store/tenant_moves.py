"""Queries of tenants' moves: rows of `engine.migration` of kind `tenant`, and the files of their plans.

Requests, samples, plans and the audit log are the same as every migration's (`engine.py`, `audit.py`).
"""

from collections.abc import Mapping, Sequence

import msgspec

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.migration import AuditEntry, GateResult
from fleetlift.core.tenant.move import MoveState
from fleetlift.store import audit as audit_log
from fleetlift.store import engine
from fleetlift.store.engine import TENANT, StoredMigration
from fleetlift.store.pool import Conn


class StoredMove(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's move: the row that every migration has, and its own state."""

    head: StoredMigration
    state: MoveState
    files: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        return self.head.name


async def create(
    conn: Conn,
    *,
    tenant: str,
    plan: str,
    files: Mapping[str, str],
    state: MoveState,
    audit: Sequence[AuditEntry],
    created_by: str,
    now: float,
) -> None:
    """Store a new move, in one transaction. Conflict when the name is taken, or the tenant is being moved."""
    async with conn.transaction():
        await conn.execute("LOCK TABLE engine.migration IN SHARE ROW EXCLUSIVE MODE")
        other = await conn.fetchval(
            "SELECT name FROM engine.migration WHERE kind = $1 AND tenant = $2 AND name <> $3 "
            "AND phase NOT IN ('reverted', 'released')",
            TENANT,
            tenant,
            state.name,
        )
        if other is not None:
            raise Conflict(f"tenant {tenant!r} is being moved by {other!r}: release or revert that first")
        await engine.add_head(
            conn, state, kind=TENANT, tenant=tenant, plan=plan, created_by=created_by, now=now
        )
        await conn.executemany(
            "INSERT INTO engine.plan_file (migration, name, content) VALUES ($1, $2, $3)",
            [(state.name, name, content) for name, content in files.items()],
        )
        await audit_log.add(conn, state.name, audit, now)


async def load(conn: Conn, name: str) -> StoredMove:
    """The move with its files. NotFound when there is none, BadInput when it is a fleet's."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        head = await engine.head(conn, name)
        if head.kind != TENANT:
            raise BadInput(f"{name!r} moves a fleet, not a tenant")
        state = await conn.fetchval("SELECT state::text FROM engine.migration WHERE name = $1", name)
        files = await conn.fetch("SELECT name, content FROM engine.plan_file WHERE migration = $1", name)
    return StoredMove(
        head=head,
        state=msgspec.json.decode(state, type=MoveState),
        files={row["name"]: row["content"] for row in files},
    )


async def unfinished(conn: Conn) -> list[str]:
    """Names of the moves that the mover still looks after."""
    rows = await conn.fetch(
        "SELECT name FROM engine.migration WHERE kind = $1 "
        "AND NOT coalesce((state->>'cleaned')::boolean, false) ORDER BY created_at",
        TENANT,
    )
    return [row["name"] for row in rows]


async def commit(
    conn: Conn,
    before: StoredMove,
    after: MoveState,
    *,
    audit: Sequence[AuditEntry] = (),
    answered: Sequence[int] = (),
    gates: Sequence[GateResult] = (),
    plan: str | None = None,
    now: float,
) -> StoredMove:
    """Write one decision, all or nothing. Conflict when somebody has committed since `before` was read."""
    async with conn.transaction():
        row = await engine.put_head(
            conn,
            after,
            version=before.head.version,
            gates=gates,
            answered=answered,
            plan=plan,
            now=now,
        )
        await audit_log.add(conn, before.name, audit, now)
    head = msgspec.structs.replace(
        before.head,
        gates=tuple(gates),
        version=row["version"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        updated_at=now,
    )
    return msgspec.structs.replace(before, head=head, state=after)
