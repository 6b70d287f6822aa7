"""Queries of commands and their paths. Functions take a connection and leave transactions to their caller.

Whoever changes a command locks its row first, in order of id, and its paths are changed under that lock: the
answers of both paths, the senders and the sweeper can work at the same time, from different processes.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from uuid import UUID

import asyncpg
import msgspec

from fleetlift.core.command import (
    Command,
    Mode,
    Path,
    PathState,
    PathStatus,
    Reported,
    ResponseError,
    Status,
    ended,
    record,
    settled,
    storable,
)
from fleetlift.core.errors import BadInput, NotFound
from fleetlift.core.jsonvalue import JsonObject
from fleetlift.core.orders import CommandsFlag
from fleetlift.store.paging import DEFAULT_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn

_COMMAND = """c.id::text AS id, c.device, c.tenant, c.name, c.params::text AS params, c.mode, c.status,
    c.created_by, extract(epoch FROM c.created_at)::float8 AS created_at,
    extract(epoch FROM c.expires_at)::float8 AS expires_at,
    extract(epoch FROM c.ended_at)::float8 AS ended_at"""
_PATH = """p.command::text AS command, p.path, p.mode, p.status, p.attempts,
    extract(epoch FROM p.created_at)::float8 AS created_at, extract(epoch FROM p.sent_at)::float8 AS sent_at,
    extract(epoch FROM p.acknowledged_at)::float8 AS acknowledged_at,
    extract(epoch FROM p.ended_at)::float8 AS ended_at, p.detail::text AS detail"""


class Route(msgspec.Struct, frozen=True):
    """What decides a new command's paths. `commands` None: no migration has the device."""

    tenant: str
    commands: CommandsFlag | None
    migration: str = ""
    released: bool = False  # the migration was, and what goes by its old side reaches nobody


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A command as it is to be sent by one path. `params` is JSON text. Times are Unix seconds."""

    id: str
    device: str
    name: str
    params: msgspec.Raw
    mode: str
    created_at: float
    expires_at: float
    sent_at: float | None = None  # of the newest copy
    connected_since: float | None = None  # None: presence does not know the device as connected
    live: bool = False  # no copy of it was stored yet


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A report of one path of a command. `device` not empty: the command must be that device's."""

    command: str
    path: Path
    reported: Reported
    at: float
    device: str = ""


async def routes(conn: Conn, devices: Sequence[str]) -> dict[str, Route]:
    """Tenant and route of each device that is registered."""
    found = await conn.fetch(
        """SELECT d.id, d.tenant, r.commands, r.migration, r.released
           FROM device d LEFT JOIN device_route r ON r.device = d.id
           WHERE d.id = ANY($1::text[])""",
        devices,
    )
    return {
        row["id"]: Route(row["tenant"], CommandsFlag(row["commands"]), row["migration"], row["released"])
        if row["commands"]
        else Route(row["tenant"], None)
        for row in found
    }


async def insert(conn: Conn, commands: Sequence[Command]) -> None:
    """Store new commands with their paths, in the caller's transaction. An id that is known is left alone."""
    paths = [(c, path) for c in commands for path in c.paths]
    await conn.execute(
        """WITH made AS (
               INSERT INTO command
                   (id, device, tenant, name, params, mode, status, created_by, created_at, expires_at)
               SELECT id, device, tenant, name, params::jsonb, mode, status, created_by,
                      to_timestamp(created_at), to_timestamp(expires_at)
               FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[],
                           $8::text[], $9::float8[], $10::float8[])
                    n(id, device, tenant, name, params, mode, status, created_by, created_at, expires_at)
               ON CONFLICT DO NOTHING RETURNING id, device, created_at)
           INSERT INTO command_path (command, path, device, mode, status, created_at)
           SELECT made.id, n.path, made.device, n.mode, n.status, made.created_at
           FROM unnest($11::uuid[], $12::text[], $13::text[], $14::text[]) n(command, path, mode, status)
                JOIN made ON made.id = n.command""",
        [c.id for c in commands],
        [c.device for c in commands],
        [c.tenant for c in commands],
        [c.name for c in commands],
        [msgspec.json.encode(c.params).decode() for c in commands],
        [c.mode.value for c in commands],
        [c.status.value for c in commands],
        [c.created_by for c in commands],
        [c.created_at for c in commands],
        [c.expires_at for c in commands],
        [c.id for c, _ in paths],
        [path.path.value for _, path in paths],
        [path.mode.value for _, path in paths],
        [path.status.value for _, path in paths],
    )


async def add_path(conn: Conn, devices: Sequence[str], path: Path, *, but: str) -> None:
    """Let open commands of `devices` that do not go by `path` go by it as well, except those named `but`."""
    await conn.execute(
        """WITH c AS (
               SELECT id, device, mode FROM command
               WHERE device = ANY($1::text[]) AND ended_at IS NULL AND expires_at > now() AND name <> $3
               ORDER BY id FOR UPDATE)
           INSERT INTO command_path (command, path, device, mode, status, created_at)
           SELECT id, $2, device, mode, 'queued', now() FROM c
           ON CONFLICT DO NOTHING""",
        devices,
        path.value,
        but,
    )


async def get_many(conn: Conn, ids: Collection[str]) -> dict[str, Command]:
    """Commands by id, with their paths. What is no UUID is not found."""
    wanted = list(filter(None, map(_canonical, ids)))
    found = await conn.fetch(f"SELECT {_COMMAND} FROM command c WHERE c.id = ANY($1::uuid[])", wanted)
    return await _with_paths(conn, found)


async def listed(
    conn: Conn, device: str, *, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[Command]:
    """A device's commands, newest first."""
    checked_limit(limit)
    before = None if after is None else from_cursor(after, tuple[str])[0]
    try:
        found = await conn.fetch(
            f"""SELECT {_COMMAND} FROM command c WHERE c.device = $1 AND ($2::uuid IS NULL OR c.id < $2)
                ORDER BY c.id DESC LIMIT $3""",
            device,
            before,
            limit + 1,
        )
    except asyncpg.DataError:
        raise BadInput("after: not a cursor of this list; use the `next` of the page before") from None
    commands = await _with_paths(conn, found[:limit])
    items = list(commands.values())
    return Page(items, to_cursor(items[-1].id) if len(found) > limit else None)


# -- answers -------------------------------------------------------------------------------------------


async def record_answer(
    conn: Conn,
    command: str,
    path: Path | str,
    status: PathStatus | str,
    detail: Mapping[str, object],
    at: float,
) -> bool:
    """Record what one path of a command has come to, by the state machine. Repeating changes nothing.

    Returns whether it changed anything. A report after the path's end is kept in its `detail.late`. Raises
    NotFound for an unknown command or a path it does not go by, BadInput for an unknown status.
    """
    try:
        reported = Reported(PathStatus(status), storable(detail))
        by = Path(path)
    except ValueError as error:
        raise BadInput(f"command answer: {error}") from error
    (result,) = await record_answers(conn, [Answer(command=command, path=by, reported=reported, at=at)])
    if result.error is ResponseError.NOT_FOUND:
        raise NotFound(f"command {command} is not known, or does not go by path {by}")
    return result.changed


class Result(msgspec.Struct, frozen=True):
    changed: bool
    error: ResponseError | None = None


async def record_answers(conn: Conn, answers: Sequence[Answer]) -> list[Result]:
    """The same for many answers at once, in order; one result for each."""
    commands = await lock(conn, {answer.command for answer in answers})
    before = dict(commands)
    results = []
    for answer in answers:
        command = commands.get(_canonical(answer.command))
        if (
            command is None
            or (answer.device and answer.device != command.device)
            or all(state.path is not answer.path for state in command.paths)
        ):
            results.append(Result(False, ResponseError.NOT_FOUND))
            continue
        recorded = record(command.paths, answer.path, answer.reported, answer.at)
        results.append(Result(recorded.changed, recorded.error))
        if recorded.changed:
            commands[command.id] = settled(command, recorded.paths, answer.at)
    await _save(conn, before, commands)
    return results


async def lock(conn: Conn, ids: Collection[str]) -> dict[str, Command]:
    """Commands with their paths, locked until the transaction ends. What is no UUID is not found."""
    wanted = sorted(filter(None, map(_canonical, ids)))
    found = await conn.fetch(
        f"SELECT {_COMMAND} FROM command c WHERE c.id = ANY($1::uuid[]) ORDER BY c.id FOR UPDATE", wanted
    )
    return await _with_paths(conn, found)


async def due(conn: Conn, *, expired_before: float, limit: int = 1000) -> list[str]:
    """Commands that are open, or have a path that is, and expired before that time."""
    found = await conn.fetch(
        """SELECT c.id::text AS id FROM command c WHERE c.ended_at IS NULL AND c.expires_at < to_timestamp($1)
           UNION
           SELECT c.id::text FROM command_path p JOIN command c ON c.id = p.command
           WHERE p.ended_at IS NULL AND c.expires_at < to_timestamp($1)
           LIMIT $2""",
        expired_before,
        limit,
    )
    return [row["id"] for row in found]


async def close(conn: Conn, ids: Sequence[str], at: float) -> None:
    """End commands whose expiry and grace are over."""
    before = await lock(conn, ids)
    await _save(conn, before, {command.id: ended(command, at) for command in before.values()})


async def _save(conn: Conn, before: Mapping[str, Command], after: Mapping[str, Command]) -> None:
    paths = [
        (command.id, path)
        for command in after.values()
        for path, was in zip(command.paths, before[command.id].paths, strict=True)
        if path != was
    ]
    if paths:
        await conn.execute(
            """UPDATE command_path p SET status = n.status, detail = n.detail::jsonb,
                   acknowledged_at = to_timestamp(n.acknowledged_at), ended_at = to_timestamp(n.ended_at)
               FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::float8[], $6::float8[])
                    n(command, path, status, detail, acknowledged_at, ended_at)
               WHERE p.command = n.command AND p.path = n.path""",
            [command for command, _ in paths],
            [path.path.value for _, path in paths],
            [path.status.value for _, path in paths],
            [msgspec.json.encode(path.detail).decode() for _, path in paths],
            [path.acknowledged_at for _, path in paths],
            [path.ended_at for _, path in paths],
        )
    commands = [
        command
        for command in after.values()
        if (command.status, command.ended_at) != (before[command.id].status, before[command.id].ended_at)
    ]
    if commands:
        await conn.execute(
            """UPDATE command c SET status = n.status, ended_at = to_timestamp(n.ended_at)
               FROM unnest($1::uuid[], $2::text[], $3::float8[]) n(id, status, ended_at) WHERE c.id = n.id""",
            [command.id for command in commands],
            [command.status.value for command in commands],
            [command.ended_at for command in commands],
        )


# -- sending -------------------------------------------------------------------------------------------

_OUTGOING = """c.id::text AS id, c.device, c.name, c.params::text AS params, p.mode, p.live,
    extract(epoch FROM c.created_at)::float8 AS created_at,
    extract(epoch FROM c.expires_at)::float8 AS expires_at,
    extract(epoch FROM coalesce(p.resent_at, p.sent_at))::float8 AS sent_at,
    (SELECT extract(epoch FROM d.since)::float8 FROM presence d
     WHERE d.device = p.device AND d.connected) AS connected_since"""


async def take_queued(conn: Conn, path: Path, *, now: float, limit: int = 1000) -> list[Outgoing]:
    """What waits to be sent by a path for the first time, oldest first; from here on it counts as sent.

    One statement, which is a transaction of its own. What goes to a device that is connected is noted as
    `live`: its first copy is for who listens now.
    """
    found = await conn.fetch(
        f"""WITH c AS MATERIALIZED (
                SELECT id, device, name, params, status, created_at, expires_at FROM command
                WHERE id = ANY(ARRAY(
                    SELECT p.command FROM command_path p JOIN command c ON c.id = p.command
                    WHERE p.path = $1 AND p.status = 'queued' AND c.expires_at > to_timestamp($2)
                    ORDER BY p.created_at LIMIT $3))
                ORDER BY id FOR UPDATE),
            told AS (UPDATE command SET status = 'sent' FROM c
                     WHERE command.id = c.id AND command.status = 'queued')
            UPDATE command_path p SET status = 'sent', attempts = attempts + 1,
                sent_at = to_timestamp($2),
                live = EXISTS (SELECT FROM presence d WHERE d.device = p.device AND d.connected)
            FROM c WHERE p.command = c.id AND p.path = $1 AND p.status = 'queued'
            RETURNING {_OUTGOING}""",
        path.value,
        now,
        limit,
    )
    return sorted(map(_outgoing, found), key=lambda one: (one.created_at, one.id))


async def unanswered(
    conn: Conn, path: Path, *, now: float, quiet_s: float, limit: int = 5000
) -> list[Outgoing]:
    """What was sent by a path and has had no answer for `quiet_s`: to devices that are connected, and to
    those that have left before a copy was stored for them."""
    found = await conn.fetch(
        f"""SELECT {_OUTGOING}
            FROM command_path p JOIN command c ON c.id = p.command LEFT JOIN presence d ON d.device = p.device
            WHERE p.path = $1 AND p.ended_at IS NULL AND p.status = 'sent' AND (d.connected OR p.live)
              AND c.expires_at > to_timestamp($2)
              AND greatest(coalesce(p.resent_at, p.sent_at), CASE WHEN d.connected THEN d.since END)
                  < to_timestamp($2::float8 - $3::float8)
            ORDER BY coalesce(p.resent_at, p.sent_at) LIMIT $4""",
        path.value,
        now,
        quiet_s,
        limit,
    )
    return [_outgoing(row) for row in found]


async def mark_sent(conn: Conn, path: Path, ids: Collection[str], at: float) -> set[str]:
    """Note that stored copies are sent by a path; returns the commands of which one is still worth sending.

    `sent_at` stays that of the first copy: latency counts from there. A path that was acknowledged or has
    ended meanwhile gets no other copy.
    """
    wanted = sorted(ids)
    await conn.execute("SELECT FROM command WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE", wanted)
    found = await conn.fetch(
        """UPDATE command_path SET status = 'sent', attempts = attempts + 1, live = false,
               sent_at = coalesce(sent_at, to_timestamp($3)),
               resent_at = CASE WHEN sent_at IS NULL THEN NULL ELSE to_timestamp($3) END
           WHERE command = ANY($1::uuid[]) AND path = $2 AND status IN ('queued', 'sent')
           RETURNING command::text AS command""",
        wanted,
        path.value,
        at,
    )
    sent = {row["command"] for row in found}
    await conn.execute(
        "UPDATE command SET status = 'sent' WHERE id = ANY($1::uuid[]) AND status = 'queued'", sorted(sent)
    )
    return sent


def _outgoing(row: asyncpg.Record) -> Outgoing:
    values = dict(row)
    values["params"] = msgspec.Raw(values["params"].encode())
    return Outgoing(**values)


# -- rows ----------------------------------------------------------------------------------------------


async def _with_paths(conn: Conn, rows: Sequence[asyncpg.Record]) -> dict[str, Command]:
    """Commands by id in the order of `rows`, each with its paths: old before new."""
    if not rows:
        return {}
    found = await conn.fetch(
        f"""SELECT {_PATH} FROM command_path p WHERE p.command = ANY($1::uuid[])
            ORDER BY p.command, p.path DESC""",
        [row["id"] for row in rows],
    )
    paths: dict[str, list[PathState]] = {}
    for row in found:
        paths.setdefault(row["command"], []).append(_path(row))
    return {row["id"]: _command(row, paths.get(row["id"], ())) for row in rows}


def _command(row: asyncpg.Record, paths: Iterable[PathState]) -> Command:
    return Command(
        id=row["id"],
        device=row["device"],
        tenant=row["tenant"],
        name=row["name"],
        params=msgspec.json.decode(row["params"], type=JsonObject),
        mode=Mode(row["mode"]),
        status=Status(row["status"]),
        created_by=row["created_by"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        ended_at=row["ended_at"],
        paths=tuple(paths),
    )


def _path(row: asyncpg.Record) -> PathState:
    return PathState(
        path=Path(row["path"]),
        mode=Mode(row["mode"]),
        status=PathStatus(row["status"]),
        attempts=row["attempts"],
        created_at=row["created_at"],
        sent_at=row["sent_at"],
        acknowledged_at=row["acknowledged_at"],
        ended_at=row["ended_at"],
        detail=msgspec.json.decode(row["detail"], type=JsonObject),
    )


def _canonical(command: str) -> str:
    """The id as the database writes it; empty for what is no UUID."""
    try:
        return str(UUID(command))
    except ValueError:
        return ""
