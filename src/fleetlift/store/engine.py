"""Queries of schema `engine`: migrations, their members, requests and samples (`audit.py`: the audit log).

Every function takes a connection to the engine's database and leaves transactions to its caller, except
`create` and `commit`, which are one transaction each. JSON travels as text, so no codec is needed.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import asyncpg
import msgspec

from fleetlift.core.errors import Conflict, NotFound
from fleetlift.core.migration import (
    AuditEntry,
    GateResult,
    Member,
    MemberState,
    MigrationState,
    Phase,
    Request,
    RequestKind,
)
from fleetlift.core.timeline import TimelinePoint
from fleetlift.store import audit as audit_log
from fleetlift.store import claims
from fleetlift.store.claims import BUSY
from fleetlift.store.pool import Conn

Point = TypeVar("Point", bound=msgspec.Struct)

# Told by NOTIFY when a person asked for something; the controller need not wait for its next round.
REQUEST_CHANNEL = "engine_request"


class Headline(Protocol):
    """What the states of both kinds of migrations have."""

    @property
    def name(self) -> str: ...

    @property
    def phase(self) -> Phase: ...


FLEET, TENANT = "fleet", "tenant"
"""Kinds of migrations: devices move by waves, or a tenant's data and names do."""


class StoredMigration(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `engine.migration`. `state.members` is empty unless `load` read them.

    `version` is the optimistic guard that `commit` wants back. Of a tenant's move `state` has what both kinds
    have; `store/tenant_moves.py` reads the whole.
    """

    name: str
    tenant: str
    plan: str
    plan_version: int
    version: int
    created_by: str
    created_at: float
    updated_at: float
    kind: str = FLEET
    state: MigrationState
    gates: tuple[GateResult, ...] = ()


def _time(at: float | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)


def _unix(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


_HEAD = (
    "SELECT name, tenant, plan, plan_version, version, created_by, created_at, updated_at, kind, "
    "state::text AS state, gates::text AS gates FROM engine.migration"
)


def _stored(row: asyncpg.Record) -> StoredMigration:
    return StoredMigration(
        name=row["name"],
        tenant=row["tenant"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        version=row["version"],
        created_by=row["created_by"],
        created_at=row["created_at"].timestamp(),
        updated_at=row["updated_at"].timestamp(),
        kind=row["kind"],
        state=msgspec.json.decode(row["state"], type=MigrationState),
        gates=msgspec.json.decode(row["gates"], type=tuple[GateResult, ...]),
    )


def _member(row: asyncpg.Record) -> Member:
    return Member(
        device=row["device"],
        rank=row["rank"],
        rung=row["rung"],
        epoch=row["epoch"],
        state=MemberState(row["state"]),
        reason=row["reason"],
        told_at=_unix(row["told_at"]),
        moved_at=_unix(row["moved_at"]),
        wave=row["wave"],
        came_from=row["came_from"],
    )


async def create(
    conn: Conn,
    *,
    tenant: str,
    plan: str,
    state: MigrationState,
    audit: Sequence[AuditEntry],
    created_by: str,
    now: float,
) -> None:
    """Store a new migration with its members, in one transaction.

    Conflict when the name is taken, or devices are part of another migration.
    """
    async with conn.transaction():
        await claims.claim(conn, state.name, [m.device for m in state.members.values() if _takes_part(m)])
        await add_head(
            conn,
            msgspec.structs.replace(state, members={}),
            kind=FLEET,
            tenant=tenant,
            plan=plan,
            created_by=created_by,
            now=now,
        )
        await conn.copy_records_to_table(
            "member",
            schema_name="engine",
            columns=[
                "migration",
                "device",
                "rank",
                "rung",
                "epoch",
                "state",
                "reason",
                "wave",
                "told_at",
                "moved_at",
                "came_from",
            ],
            records=[
                (
                    state.name,
                    m.device,
                    m.rank,
                    m.rung,
                    m.epoch,
                    m.state.value,
                    m.reason,
                    m.wave,
                    _time(m.told_at),
                    _time(m.moved_at),
                    m.came_from,
                )
                for m in state.members.values()
            ],
        )
        await audit_log.add(conn, state.name, audit, now)


async def add_head(
    conn: Conn, state: Headline, *, kind: str, tenant: str, plan: str, created_by: str, now: float
) -> None:
    """The row of a new migration and its plan. Conflict when the name is taken."""
    made = await conn.fetchval(
        "INSERT INTO engine.migration "
        "(name, tenant, plan, phase, state, created_by, created_at, updated_at, kind)"
        " VALUES ($1, $2, $3, $4, $5::text::jsonb, $6, $7, $7, $8) ON CONFLICT (name) DO NOTHING RETURNING 1",
        state.name,
        tenant,
        plan,
        state.phase.value,
        _json(state),
        created_by,
        _time(now),
        kind,
    )
    if made is None:
        raise Conflict(f"a migration named {state.name!r} exists already: choose another name in the plan")
    await _add_plan(conn, state.name, 1, plan, now)


async def put_head(
    conn: Conn,
    state: Headline,
    *,
    version: int,
    gates: Sequence[GateResult],
    answered: Sequence[int],
    plan: str | None,
    now: float,
) -> asyncpg.Record:
    """Write the row of a decision, in the caller's transaction, and mark its requests as answered; `plan`
    replaces the plan. Returns version, plan and plan_version. Conflict unless `version` is what is stored."""
    row: asyncpg.Record | None = await conn.fetchrow(
        "UPDATE engine.migration SET state = $3::text::jsonb, phase = $4, gates = $5::text::jsonb, "
        "updated_at = $6, version = version + 1, plan = coalesce($7, plan), "
        "plan_version = plan_version + ($7 IS NOT NULL)::int "
        "WHERE name = $1 AND version = $2 RETURNING version, plan, plan_version",
        state.name,
        version,
        _json(state),
        state.phase.value,
        _json(list(gates)),
        _time(now),
        plan,
    )
    if row is None:
        raise Conflict(f"migration {state.name!r} was changed by another controller meanwhile: read it again")
    if answered:
        await conn.execute(
            "UPDATE engine.request SET answered_at = $2 WHERE id = ANY($1::bigint[]) AND answered_at IS NULL",
            list(answered),
            _time(now),
        )
    if plan is not None:
        await _add_plan(conn, state.name, row["plan_version"], plan, now)
    return row


async def head(conn: Conn, name: str) -> StoredMigration:
    """The migration without its members. NotFound when there is none of that name."""
    row = await conn.fetchrow(f"{_HEAD} WHERE name = $1", name)
    if row is None:
        raise NotFound(f"no migration named {name!r}: `fleetlift migrate list` shows those there are")
    return _stored(row)


async def load(conn: Conn, name: str) -> StoredMigration:
    """The migration with its members, as one consistent snapshot. NotFound when there is none."""
    async with conn.transaction(isolation="repeatable_read", readonly=True):
        stored = await head(conn, name)
        rows = await conn.fetch("SELECT * FROM engine.member WHERE migration = $1 ORDER BY rank", name)
    members = {row["device"]: _member(row) for row in rows}
    return msgspec.structs.replace(stored, state=msgspec.structs.replace(stored.state, members=members))


async def listed(
    conn: Conn, *, tenant: str | None = None, after: str = "", limit: int = 100
) -> list[StoredMigration]:
    """Migrations by name after `after`, without members; `tenant` None: every tenant's."""
    rows = await conn.fetch(
        f"{_HEAD} WHERE name > $1 AND ($2::text IS NULL OR tenant = $2) ORDER BY name LIMIT $3",
        after,
        tenant,
        limit,
    )
    return [_stored(row) for row in rows]


async def unreleased(conn: Conn) -> dict[str, int]:
    """Names and plan versions of the fleets' migrations that the controller still looks after."""
    rows = await conn.fetch(
        "SELECT name, plan_version FROM engine.migration WHERE phase <> $1 AND kind = $2 ORDER BY created_at",
        Phase.RELEASED.value,
        FLEET,
    )
    return {row["name"]: row["plan_version"] for row in rows}


async def commit(
    conn: Conn,
    before: StoredMigration,
    after: MigrationState,
    *,
    audit: Sequence[AuditEntry] = (),
    answered: Sequence[int] = (),
    gates: Sequence[GateResult] = (),
    plan: str | None = None,
    now: float,
) -> StoredMigration:
    """Write one decision: state, changed members, audit and answered requests, all or nothing.

    `before` is what the decision was made from; Conflict when somebody has committed since, Claimed when
    devices that would take part from now on are part of another migration; then nothing is written. `plan`
    replaces the plan (an amendment). Returns what is stored now.
    """
    old_members = before.state.members
    changed = [m for m in after.members.values() if old_members.get(m.device) != m]
    gone = [device for device in old_members if device not in after.members]
    was_busy = before.state.phase in BUSY
    joining = [
        m.device
        for m in (changed if was_busy else after.members.values())
        if _takes_part(m)
        and not (was_busy and m.device in old_members and _takes_part(old_members[m.device]))
    ]
    async with conn.transaction():
        if after.phase in BUSY:
            await claims.claim(conn, before.name, joining)
        row = await put_head(
            conn,
            msgspec.structs.replace(after, members={}),
            version=before.version,
            gates=gates,
            answered=answered,
            plan=plan,
            now=now,
        )
        if changed:
            await _put_members(conn, before.name, changed)
        if gone:
            await conn.execute(
                "DELETE FROM engine.member WHERE migration = $1 AND device = ANY($2::text[])",
                before.name,
                gone,
            )
        await audit_log.add(conn, before.name, audit, now)
    return msgspec.structs.replace(
        before,
        state=after,
        gates=tuple(gates),
        version=row["version"],
        plan=row["plan"],
        plan_version=row["plan_version"],
        updated_at=now,
    )


def _takes_part(member: Member) -> bool:
    return member.state is not MemberState.EXCLUDED


async def _put_members(conn: Conn, name: str, members: Sequence[Member]) -> None:
    await conn.execute(
        "INSERT INTO engine.member "
        "(migration, device, rank, rung, epoch, state, reason, wave, told_at, moved_at, came_from) "
        "SELECT $1, * FROM unnest($2::text[], $3::int[], $4::int[], $5::bigint[], $6::text[], $7::text[], "
        "$8::int[], $9::timestamptz[], $10::timestamptz[], $11::int[]) "
        "ON CONFLICT (migration, device) DO UPDATE SET rank = excluded.rank, rung = excluded.rung, "
        "epoch = excluded.epoch, state = excluded.state, reason = excluded.reason, wave = excluded.wave, "
        "told_at = excluded.told_at, moved_at = excluded.moved_at, "
        "came_from = excluded.came_from",
        name,
        [m.device for m in members],
        [m.rank for m in members],
        [m.rung for m in members],
        [m.epoch for m in members],
        [m.state.value for m in members],
        [m.reason for m in members],
        [m.wave for m in members],
        [_time(m.told_at) for m in members],
        [_time(m.moved_at) for m in members],
        [m.came_from for m in members],
    )


async def _add_plan(conn: Conn, name: str, version: int, plan: str, now: float) -> None:
    await conn.execute(
        "INSERT INTO engine.plan (migration, version, since, plan) VALUES ($1, $2, $3, $4)",
        name,
        version,
        _time(now),
        plan,
    )


async def plan_versions(conn: Conn, name: str) -> list[tuple[int, float, str]]:
    """Every plan of a migration: version, since when (Unix seconds), text."""
    rows = await conn.fetch(
        "SELECT version, since, plan FROM engine.plan WHERE migration = $1 ORDER BY version", name
    )
    return [(row["version"], row["since"].timestamp(), row["plan"]) for row in rows]


async def add_request(conn: Conn, name: str, kind: RequestKind, args: Mapping[str, Any], actor: str) -> int:
    """Note what a person asks for; the controller answers it in its next round.

    Returns the request's id. NotFound when there is no such migration.
    """
    async with conn.transaction():
        found = await conn.fetchval(
            "INSERT INTO engine.request (migration, kind, args, actor) "
            "SELECT $1, $2, $3::text::jsonb, $4 WHERE EXISTS (SELECT FROM engine.migration WHERE name = $1) "
            "RETURNING id",
            name,
            kind.value,
            _json(dict(args)),
            actor,
        )
        if found is None:
            raise NotFound(f"no migration named {name!r}: `fleetlift migrate list` shows those there are")
        await conn.execute("SELECT pg_notify($1, $2)", REQUEST_CHANNEL, name)
    return int(found)


async def add_emergency(
    conn: Conn, name: str, epoch: int, actor: str, *, devices: Sequence[str] | None
) -> None:
    """Ask for what `revert --journal` has done outside to be taken in; once for each epoch (and device).

    `devices` None: everything went back.
    """
    kind = RequestKind.EMERGENCY if devices is None else RequestKind.REVERT
    asked: list[dict[str, Any]] = [{"epoch": epoch}]
    if devices is not None:
        asked = [{"epoch": epoch, "device": device} for device in devices]
    await conn.execute(
        "INSERT INTO engine.request (migration, kind, args, actor) "
        "SELECT $1, $2, a::jsonb, $4 FROM unnest($3::text[]) a WHERE NOT EXISTS ("
        "SELECT FROM engine.request WHERE migration = $1 AND kind = $2 AND args = a::jsonb)",
        name,
        kind.value,
        [_json(one) for one in asked],
        actor,
    )


async def open_requests(conn: Conn, name: str) -> tuple[Request, ...]:
    """Requests not yet answered, in the order they were made."""
    rows = await conn.fetch(
        "SELECT id, kind, actor, at, args::text AS args FROM engine.request "
        "WHERE migration = $1 AND answered_at IS NULL ORDER BY id LIMIT 1000",
        name,
    )
    return tuple(
        Request(
            id=row["id"],
            kind=RequestKind(row["kind"]),
            actor=row["actor"],
            at=row["at"].timestamp(),
            args=msgspec.json.decode(row["args"]),
        )
        for row in rows
    )


async def is_answered(conn: Conn, request: int) -> bool:
    """True once the controller has dealt with the request. NotFound for an id never given."""
    row = await conn.fetchrow("SELECT answered_at FROM engine.request WHERE id = $1", request)
    if row is None:
        raise NotFound(f"no request {request}")
    return row["answered_at"] is not None


async def members_page(
    conn: Conn,
    name: str,
    *,
    states: Sequence[MemberState] = (),
    after: int = -1,
    limit: int | None = 100,
) -> list[Member]:
    """Members in their order, after rank `after`; `states` empty: all; `limit` None: to the last."""
    rows = await conn.fetch(
        "SELECT * FROM engine.member WHERE migration = $1 AND rank > $2 "
        "AND ($3::text[] = '{}' OR state = ANY($3::text[])) ORDER BY rank LIMIT $4",
        name,
        after,
        [s.value for s in states],
        limit,
    )
    return [_member(row) for row in rows]


class MemberCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many members have these in common; `never_seen` of them have never been seen by either side."""

    rung: int
    came_from: int
    state: MemberState
    devices: int
    never_seen: int


async def member_counts(conn: Conn, name: str) -> list[MemberCount]:
    """Where the members stand, counted."""
    rows = await conn.fetch(
        "SELECT rung, came_from, state, count(*) AS devices, "
        "count(*) FILTER (WHERE reason = 'never seen') AS never_seen "
        "FROM engine.member WHERE migration = $1 GROUP BY 1, 2, 3",
        name,
    )
    return [MemberCount(**{**dict(row), "state": MemberState(row["state"])}) for row in rows]


async def open_request_count(conn: Conn, name: str) -> int:
    return int(
        await conn.fetchval(
            "SELECT count(*) FROM engine.request WHERE migration = $1 AND answered_at IS NULL", name
        )
    )


async def highest_epoch(conn: Conn) -> int:
    """The newest epoch that any migration has used; 0 when there is none."""
    return int(
        await conn.fetchval(
            "SELECT greatest((SELECT coalesce(max(epoch), 0) FROM engine.member), "
            "(SELECT coalesce(max((state->>'epoch')::bigint), 0) FROM engine.migration))"
        )
    )


async def add_sample(conn: Conn, name: str, at: float, point: msgspec.Struct) -> None:
    await conn.execute(
        "INSERT INTO engine.sample (migration, at, data) VALUES ($1, $2, $3::text::jsonb) "
        "ON CONFLICT (migration, at) DO NOTHING",
        name,
        _time(at),
        _json(point),
    )


async def samples(
    conn: Conn, name: str, *, since: float = 0.0, limit: int = 100_000
) -> list[tuple[float, TimelinePoint]]:
    """The timeline's points after `since`, oldest first."""
    return await samples_of(conn, name, TimelinePoint, since=since, limit=limit)


async def samples_of(
    conn: Conn, name: str, kind: type[Point], *, since: float = 0.0, limit: int = 100_000
) -> list[tuple[float, Point]]:
    """The same, of a migration whose points are of that kind."""
    rows = await conn.fetch(
        "SELECT at, data::text AS data FROM engine.sample WHERE migration = $1 AND at > $2 "
        "ORDER BY at LIMIT $3",
        name,
        _time(since),
        limit,
    )
    decode = msgspec.json.Decoder(kind).decode
    return [(row["at"].timestamp(), decode(row["data"])) for row in rows]
