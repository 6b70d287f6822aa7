"""Queries of the audit log, `engine.audit`: each migration's lines are a chain of hashes (`core/chain.py`).

Lines are only ever added, in the transaction that does what they tell. Who adds them holds the migration's
row, new or just updated, so that a chain has one writer at a time.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from fleetlift.core import chain
from fleetlift.core.chain import Link
from fleetlift.core.errors import Conflict
from fleetlift.core.migration import AuditEntry
from fleetlift.store.pool import Conn


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the audit log with its place (`id` is the cursor) and moment (Unix seconds)."""

    id: int
    at: float
    actor: str
    kind: str
    text: str
    evidence: dict[str, Any] = {}


async def add(conn: Conn, name: str, entries: Sequence[AuditEntry], now: float) -> None:
    """Append `entries` to the migration's chain, in the caller's transaction."""
    if not entries:
        return
    number, previous = await head(conn, name)
    links = []
    for entry in entries:
        number += 1
        links.append(chain.link(name, previous, number, chain.written(now), entry))
        previous = links[-1].hash
    await conn.executemany(
        "INSERT INTO engine.audit (migration, number, at, actor, kind, text, evidence, hash) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7::text::json, $8)",
        [
            (
                name,
                one.number,
                datetime.fromtimestamp(now, UTC),
                one.actor,
                one.kind,
                one.text,
                chain.canonical(one.evidence).decode(),
                one.hash,
            )
            for one in links
        ],
    )


async def head(conn: Conn, name: str) -> tuple[int, str]:
    """How many entries the chain has, and the hash of the last one (of the root, while there is none)."""
    row = await conn.fetchrow(
        "SELECT number, hash FROM engine.audit WHERE migration = $1 AND number IS NOT NULL "
        "ORDER BY number DESC LIMIT 1",
        name,
    )
    if row is not None:
        return row["number"], row["hash"]
    plan = await conn.fetchval(
        "SELECT plan FROM engine.plan WHERE migration = $1 ORDER BY version LIMIT 1", name
    )
    return 0, chain.root(name, plan)


async def whole_chain(conn: Conn, name: str) -> list[Link]:
    """The migration's whole audit log. Conflict when it began before audit logs were chains."""
    rows = await conn.fetch(
        "SELECT number, at, actor, kind, text, evidence::text AS evidence, hash FROM engine.audit "
        "WHERE migration = $1 ORDER BY id",
        name,
    )
    if any(row["number"] is None for row in rows):
        raise Conflict(
            f"migration {name!r} began under a Fleetlift whose audit log was not a chain yet, so there is "
            "nothing to certify it by; `fleetlift migrate report` has its log"
        )
    return [
        Link(
            number=row["number"],
            at=chain.written(row["at"].timestamp()),
            actor=row["actor"],
            kind=row["kind"],
            text=row["text"],
            evidence=msgspec.json.decode(row["evidence"]),
            hash=row["hash"],
        )
        for row in rows
    ]


def _row(row: asyncpg.Record) -> AuditRow:
    return AuditRow(
        id=row["id"],
        at=row["at"].timestamp(),
        actor=row["actor"],
        kind=row["kind"],
        text=row["text"],
        evidence=msgspec.json.decode(row["evidence"]),
    )


async def page(conn: Conn, name: str, *, after: int = 0, limit: int = 100) -> list[AuditRow]:
    """Lines of the audit log after the line `after`, oldest first."""
    rows = await conn.fetch(
        "SELECT id, at, actor, kind, text, evidence::text AS evidence FROM engine.audit "
        "WHERE migration = $1 AND id > $2 ORDER BY id LIMIT $3",
        name,
        after,
        limit,
    )
    return [_row(row) for row in rows]


async def newest(conn: Conn, name: str, limit: int = 12) -> list[AuditRow]:
    """The newest lines of the audit log, oldest of them first."""
    rows = await conn.fetch(
        "SELECT id, at, actor, kind, text, evidence::text AS evidence FROM engine.audit "
        "WHERE migration = $1 ORDER BY id DESC LIMIT $2",
        name,
        limit,
    )
    return [_row(row) for row in reversed(rows)]


async def wave_times(conn: Conn, name: str) -> list[float]:
    """How long the moves of the last waves took, in seconds: from opening to the last device's evidence."""
    rows = await conn.fetch(
        "SELECT kind, extract(epoch FROM at)::float8 AS at FROM engine.audit "
        "WHERE migration = $1 AND kind IN ('wave_opened', 'wave_moved') ORDER BY id DESC LIMIT 20",
        name,
    )
    times, moved = [], None
    for row in rows:
        if row["kind"] == "wave_moved":
            moved = row["at"]
        elif moved is not None:
            times.append(moved - row["at"])
            moved = None
    return times


async def ended_at(conn: Conn, name: str) -> float | None:
    """When the migration last came to an end; None when it never has."""
    found: float | None = await conn.fetchval(
        "SELECT extract(epoch FROM max(at))::float8 FROM engine.audit WHERE migration = $1 "
        "AND kind IN ('migration_finished', 'migration_reverted', 'migration_released')",
        name,
    )
    return found
