"""A source's schema on the target: tables before the rows, indexes, constraints and triggers after them.

The schema is what pg_dump says it is. What comes before the rows is made in one transaction together with a
marker, so that it is there as a whole or not at all. What comes after is made object by object, each in a
transaction of its own: whatever stops in between goes on where it was. Of what the target refuses the others
are made all the same, and the refused ones are listed with rows that are in the way.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

import asyncpg
import msgspec

from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.errors import BadInput, Conflict, Unavailable
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.dumped import (
    FOREIGN,
    DumpedObject,
    Failed,
    ForeignKeyFacts,
    SchemaProgress,
    SchemaReport,
    finishing_stages,
    not_valid,
    split_always,
    why_left_out,
)
from fleetlift.core.tenant.schema import TableName, quoted, quoted_table
from fleetlift.core.tenant.sequences import SequenceState, ahead, has_given, staying
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.pg_dump import check_version, dump_schema

Conn: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Told = Callable[[SchemaProgress], None]

_SESSION: Final[Mapping[str, str]] = {
    "application_name": "fleetlift schema",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "search_path": "",
    "check_function_bodies": "off",
    "row_security": "off",
    "client_min_messages": "warning",
    "xmloption": "content",
    "default_tablespace": "",
}
_EXAMPLES: Final = 3
_LOCK_WAIT: Final = (
    "3s"  # then others get their turn; a statement that waits for a lock holds up all after it
)
_ATTEMPTS: Final = 40


@contextlib.asynccontextmanager
async def connected(url: str, **settings: str) -> AsyncIterator[Conn]:
    """A session for schema work. Raises Unavailable when the database does not answer."""
    try:
        conn = await asyncpg.connect(url, timeout=30.0, server_settings={**_SESSION, **settings})
    except (OSError, asyncpg.PostgresError, TimeoutError) as problem:
        raise Unavailable(f"a database does not answer: {problem or type(problem).__name__}") from problem
    try:
        yield conn
    finally:
        # A cancelled statement may still be running; a polite goodbye would wait for it.
        try:
            await conn.close(timeout=5.0)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            conn.terminate()
        except asyncio.CancelledError:
            conn.terminate()
            raise


# -- before the rows --------------------------------------------------------------------------------------

_MARKER = f"""
CREATE SCHEMA IF NOT EXISTS {MOVE_SCHEMA};
REVOKE ALL ON SCHEMA {MOVE_SCHEMA} FROM PUBLIC;
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.made (
    move text PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), report text NOT NULL);
CREATE TABLE IF NOT EXISTS {MOVE_SCHEMA}.at_opening (statement text PRIMARY KEY);
"""

_FOUND_ON_TARGET = """
SELECT n.nspname || '.' || c.relname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname <> 'information_schema'
  AND n.nspname !~ '^pg_' AND n.nspname !~ '^fleetlift_'
  AND NOT EXISTS (SELECT FROM pg_depend d
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY c.relkind NOT IN ('r', 'p'), 1
"""

# Owners and whoever has been granted something. What the first superuser owns is in no list of
# dependencies, so owners are asked of the objects themselves.
_ROLES = """
SELECT r.rolname FROM pg_roles r
WHERE r.rolname !~ '^pg_' AND r.oid IN (
    SELECT refobjid FROM pg_shdepend
    WHERE refclassid = 'pg_authid'::regclass
      AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
    UNION SELECT c.relowner FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
          WHERE n.nspname !~ '^(pg_|fleetlift_)' AND n.nspname <> 'information_schema'
    UNION SELECT p.proowner FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
          WHERE n.nspname !~ '^(pg_|fleetlift_)' AND n.nspname <> 'information_schema'
    UNION SELECT t.typowner FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
          WHERE n.nspname !~ '^(pg_|fleetlift_)' AND n.nspname <> 'information_schema'
    UNION SELECT nspowner FROM pg_namespace
          WHERE nspname !~ '^(pg_|fleetlift_)' AND nspname <> 'information_schema')
ORDER BY 1
"""

# Indexes by which a row is found again: primary keys, replica identities, and what stands in for them.
_UNIQUE_INDEXES = """
SELECT i.indexrelid AS oid, con.oid AS constraint_oid, ci.relname AS index, n.nspname AS schema,
    n.nspname || '.' || c.relname AS table, i.indisprimary AS primary, i.indisreplident AS identity,
    array(SELECT a.attname FROM unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY k(number, place)
          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number ORDER BY place)::text[]
        AS columns,
    i.indnkeyatts AS width,
    (SELECT inhparent FROM pg_inherits WHERE inhrelid = i.indexrelid) AS parent
FROM pg_index i
JOIN pg_class ci ON ci.oid = i.indexrelid
JOIN pg_class c ON c.oid = i.indrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_constraint con ON con.conindid = i.indexrelid AND con.contype IN ('p', 'u')
WHERE i.indisunique AND i.indpred IS NULL AND n.nspname !~ '^(pg_|fleetlift_)'
ORDER BY ci.relname
"""


async def create_schema(
    source_url: str,
    target_url: str,
    closure: Closure,
    *,
    move: str = "move",
    progress: Told | None = None,
) -> SchemaReport:
    """Make the source's schema on an empty target: all that must be there before the rows.

    Every table comes, also those without rows; of indexes only keys, which upserts need. One transaction.
    When this move has made it already, that run's report comes back with `resumed`. Raises Conflict when
    the target is not empty or refuses an object (then nothing of it is there), BadInput for versions that
    do not fit.
    """
    async with connected(source_url) as source, connected(target_url) as target:
        await _check_versions(source, target)
        if (made := await made_by(target)) is not None:
            refuse_of(made[0], move)
            return msgspec.structs.replace(made[1], resumed=True)
        there = [row[0] for row in await target.fetch(_FOUND_ON_TARGET)]
        if there:
            more = f" and {len(there) - 5} more" if len(there) > 5 else ""
            raise Conflict(
                f"the target is not empty: it has {', '.join(there[:5])}{more}. A tenant moves into an "
                "empty database: create one, or drop what is there"
            )
        superuser = await target.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        before, after = await asyncio.gather(
            dump_schema(source_url, "pre-data", owners=superuser),
            dump_schema(source_url, "post-data", owners=superuser),
        )
        keys = await _key_objects(source, closure, after)
        roles = [row[0] for row in await source.fetch(_ROLES)]
        return await _create(target, before, keys, roles, move=move, owners=superuser, progress=progress)


async def made_by(target: Conn) -> tuple[str, SchemaReport] | None:
    """The move that has made the target's schema, with its report; None: nobody has."""
    if await target.fetchval("SELECT to_regclass($1)", f"{MOVE_SCHEMA}.made") is None:
        return None
    row = await target.fetchrow(f"SELECT move, report FROM {MOVE_SCHEMA}.made")
    return (row["move"], msgspec.json.decode(row["report"], type=SchemaReport)) if row else None


def refuse_of(maker: str, move: str) -> None:
    """Raise Conflict where another move has made the target's schema."""
    if maker != move:
        raise Conflict(
            f"the target was prepared by the move {maker!r}: abort or release that one first, "
            "or give an empty database"
        )


async def _check_versions(source: Conn, target: Conn) -> None:
    from_, to = [int(await conn.fetchval("SHOW server_version_num")) for conn in (source, target)]
    check_version(from_)
    if to // 10_000 < from_ // 10_000:
        raise BadInput(
            f"the target is PostgreSQL {to // 10_000}, the source {from_ // 10_000}: a schema cannot go "
            "to an older version"
        )


async def _key_objects(source: Conn, closure: Closure, after: Sequence[DumpedObject]) -> list[DumpedObject]:
    """Those of the later objects that make rows found again, with their partitions' parts."""
    rows = await source.fetch(_UNIQUE_INDEXES)
    chosen: set[int] = set()
    served: set[TableName] = set()
    for row in rows:
        table = closure.schema.tables.get(row["table"])
        stands_in = (
            table is not None
            and bool(table.key)
            and not table.primary_key
            and row["table"] not in served
            and len(row["columns"]) == row["width"]
            and set(row["columns"]) == set(table.key)
        )
        if row["primary"] or row["identity"] or stands_in:
            chosen.add(row["oid"])
            served.add(row["table"])
    while True:
        parts = {row["oid"] for row in rows if row["parent"] in chosen} - chosen
        if not parts:
            break
        chosen |= parts
    oids = {oid for row in rows if row["oid"] in chosen for oid in (row["oid"], row["constraint_oid"]) if oid}
    names = {(row["schema"], row["index"]) for row in rows if row["oid"] in chosen}
    return [
        one
        for one in after
        if (one.type in ("CONSTRAINT", "INDEX") and one.oid in oids)
        or (one.type == "INDEX ATTACH" and (one.schema, one.name) in names)
    ]


async def _create(
    target: Conn,
    before: Sequence[DumpedObject],
    keys: Sequence[DumpedObject],
    roles: Sequence[str],
    *,
    move: str,
    owners: bool,
    progress: Told | None,
) -> SchemaReport:
    available = {row[0] for row in await target.fetch("SELECT name FROM pg_available_extensions")}
    made: list[str] = []
    left_out: list[str] = []
    objects = [*before, *keys]
    async with target.transaction():
        missing = [
            role
            for role in roles
            if not await target.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role)
        ]
        for role in missing:
            await _one(target, f"role {role}", f"CREATE ROLE {quoted(role)} NOLOGIN")
        await target.execute(_MARKER)
        for number, one in enumerate(objects):
            if progress is not None:
                progress(SchemaProgress(stage="tables", done=number, total=len(objects), doing=(one.title,)))
            reason = _why_not(one, available)
            if reason:
                left_out.append(f"{one.title}: {reason}")
                continue
            sql = one.sql
            if one.type == "SCHEMA":
                sql = sql.replace("CREATE SCHEMA ", "CREATE SCHEMA IF NOT EXISTS ", 1)
            await _one(target, one.title, sql)
            made.append(one.title)
        report = SchemaReport(
            made=tuple(made),
            left_out=tuple(left_out),
            roles=tuple(missing),
            notes=(
                ()
                if owners
                else ("all objects belong to the user who made them: only a superuser can give them away",)
            ),
        )
        await target.execute(
            f"INSERT INTO {MOVE_SCHEMA}.made (move, report) VALUES ($1, $2)",
            move,
            msgspec.json.encode(report).decode(),
        )
    return report


async def _one(target: Conn, title: str, sql: str) -> None:
    try:
        await target.execute(sql)
    except asyncpg.PostgresError as problem:
        raise Conflict(f"the target refuses {title}: {problem}; nothing of the schema was made") from problem


def _why_not(one: DumpedObject, available: set[str]) -> str:
    if one.type in FOREIGN:
        return "it leads to other databases, which a tenant's own must not reach"
    if one.type == "EXTENSION" and one.name not in available:
        return "the target's server does not have this extension"
    if one.type == "COMMENT" and one.name.startswith("EXTENSION "):
        name = one.name.removeprefix("EXTENSION ").strip('"')
        return "" if name in available else "the target's server does not have this extension"
    return ""


# -- after the rows ---------------------------------------------------------------------------------------

_FOREIGN_KEYS = """
SELECT con.oid, con.conname AS name, con.convalidated AS valid,
    n.nspname || '.' || c.relname AS table, tn.nspname || '.' || t.relname AS to,
    cn.nspname || '.' || child.relname AS declared_on, child.relkind = 'p' AS partitioned,
    array(SELECT a.attname FROM unnest(con.conkey) WITH ORDINALITY k(number, place)
          JOIN pg_attribute a ON a.attrelid = con.conrelid AND a.attnum = k.number ORDER BY place)::text[]
        AS columns,
    array(SELECT a.attname FROM unnest(con.confkey) WITH ORDINALITY k(number, place)
          JOIN pg_attribute a ON a.attrelid = con.confrelid AND a.attnum = k.number ORDER BY place)::text[]
        AS to_columns
FROM pg_constraint con
JOIN pg_class child ON child.oid = con.conrelid
JOIN pg_namespace cn ON cn.oid = child.relnamespace
JOIN pg_class c ON c.oid = coalesce(pg_partition_root(con.conrelid), con.conrelid)
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_class t ON t.oid = coalesce(pg_partition_root(con.confrelid), con.confrelid)
JOIN pg_namespace tn ON tn.oid = t.relnamespace
WHERE con.contype = 'f'
"""

_CHECKS = """
SELECT con.oid, con.conname AS name, con.convalidated AS valid, n.nspname || '.' || c.relname AS declared_on,
    pg_get_expr(con.conbin, con.conrelid) AS expression
FROM pg_constraint con JOIN pg_class c ON c.oid = con.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE con.contype = 'c'
"""

_MADE_ALREADY = """
SELECT con.oid::text, 'CONSTRAINT', n.nspname, c.relname || ' ' || con.conname
FROM pg_constraint con JOIN pg_class c ON c.oid = con.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
UNION ALL
SELECT '', 'INDEX', n.nspname, c.relname
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('i', 'I')
"""

_MATERIALIZED = """
SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'm' AND c.relispopulated AND n.nspname !~ '^fleetlift_' ORDER BY c.oid
"""

_EXISTS: Final = (
    asyncpg.DuplicateObjectError,
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateFunctionError,
    asyncpg.DuplicateAliasError,
)
_AGAIN: Final = (
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.SerializationError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.InterfaceError,
    asyncpg.QueryCanceledError,
    ConnectionError,
    Unavailable,
)


async def finish_schema(
    source_url: str,
    target_url: str,
    closure: Closure,
    *,
    move: str = "move",
    workers: int = 2,
    progress: Told | None = None,
) -> SchemaReport:
    """Make what comes after the rows: indexes and unique, check and exclusion constraints, foreign keys
    (first for new rows, then validated), then triggers and rules; then ANALYZE.

    Whatever is there already is skipped, so it may be called again after a kill, or after what was in the
    way has gone. What the target refuses is in `failed`, all else is made. A trigger that fires for applied
    changes too (ENABLE ALWAYS) fires for its own writers only until `open_triggers`. Raises Conflict when
    this move has not made the target's schema, Unavailable when a database stays away.
    """
    async with connected(source_url) as source, connected(target_url) as target:
        await _check_versions(source, target)
        made = await made_by(target)
        if made is None or made[0] != move:
            raise Conflict(f"the move {move!r} has not made this target's schema: create it first")
        superuser = await target.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
        objects = await dump_schema(source_url, "post-data", owners=superuser)
        finishing = _Finishing(source, target, target_url, closure, workers, progress)
        return await finishing.run(objects)


class _Finishing:
    """One run of `finish_schema`."""

    def __init__(
        self,
        source: Conn,
        target: Conn,
        target_url: str,
        closure: Closure,
        workers: int,
        progress: Told | None,
    ) -> None:
        self._source, self._target, self._target_url = source, target, target_url
        self._closure, self._progress = closure, progress
        self._workers = max(1, workers)
        self._references: dict[int, asyncpg.Record] = {}
        self._checks: dict[int, asyncpg.Record] = {}
        self._made: list[str] = []
        self._existed: list[str] = []
        self._failed: list[Failed] = []
        self._left_out: list[str] = []
        self._notes: list[str] = []
        self._doing: list[str] = []
        self._there: set[tuple[str, str, str]] = set()

    async def run(self, objects: Sequence[DumpedObject]) -> SchemaReport:
        self._references = {row["oid"]: row for row in await self._source.fetch(_FOREIGN_KEYS)}
        self._checks = {row["oid"]: row for row in await self._source.fetch(_CHECKS)}
        self._there = {(row[1], row[2], row[3]) for row in await self._target.fetch(_MADE_ALREADY)}
        for stage in finishing_stages(objects):
            match stage.name:
                case "indexes":
                    await self._each(stage.name, stage.objects, self._make, self._workers)
                case "references":
                    await self._make_references(stage.objects)
                case "triggers":
                    await self._each(stage.name, stage.objects, self._make_trigger, 1)
                case _:
                    await self._each(stage.name, stage.objects, self._make, 1)
        await self._refresh()
        await self._analyze()
        return SchemaReport(
            made=tuple(self._made),
            existed=tuple(self._existed),
            failed=tuple(self._failed),
            left_out=tuple(self._left_out),
            notes=tuple(self._notes),
        )

    async def _each(
        self,
        stage: str,
        objects: Sequence[DumpedObject],
        make: Callable[[Conn, DumpedObject], Awaitable[None]],
        workers: int,
    ) -> None:
        """All of a stage, `workers` at a time, each with a session of its own."""
        waiting = list(reversed(objects))
        done = 0

        def told() -> None:
            if self._progress is not None:
                self._progress(
                    SchemaProgress(stage=stage, done=done, total=len(objects), doing=tuple(self._doing))
                )

        async def work() -> None:
            nonlocal done
            session: contextlib.AsyncExitStack | None = None
            conn: Conn | None = None
            try:
                while waiting:
                    one = waiting.pop()
                    self._doing.append(one.title)
                    told()
                    for attempt in range(_ATTEMPTS):
                        try:
                            if session is None or conn is None or conn.is_closed():
                                session = contextlib.AsyncExitStack()
                                conn = await session.enter_async_context(
                                    connected(self._target_url, lock_timeout=_LOCK_WAIT)
                                )
                            await make(conn, one)
                            break
                        except _AGAIN as problem:
                            raise_if_cancelled()
                            if session is not None:
                                await session.aclose()
                            session = conn = None
                            if attempt + 1 == _ATTEMPTS:
                                raise Unavailable(
                                    f"{one.title} could not be made: {problem}. What is there is kept: go on "
                                    "when the target is well"
                                ) from problem
                            await asyncio.sleep(min(3.0, 0.1 * 2**attempt))
                    self._doing.remove(one.title)
                    done += 1
                    told()
            finally:
                if session is not None:
                    await session.aclose()

        async with asyncio.TaskGroup() as group:
            for number in range(min(workers, len(objects))):
                group.create_task(work(), name=f"{stage} {number}")

    def _is_there(self, one: DumpedObject) -> bool:
        kind = "INDEX" if one.type == "INDEX" else "CONSTRAINT"
        return one.type != "INDEX ATTACH" and (kind, one.schema, one.name) in self._there

    async def _make(self, conn: Conn, one: DumpedObject) -> None:
        if self._is_there(one):
            self._existed.append(one.title)
            return
        await self._try(conn, one, one.sql)

    async def _try(self, conn: Conn, one: DumpedObject, sql: str) -> bool:
        try:
            async with conn.transaction():
                await conn.execute(sql)
        except _EXISTS:
            self._existed.append(one.title)
            return True
        except _AGAIN:
            raise
        except asyncpg.PostgresError as problem:
            self._failed.append(
                Failed(name=one.title, reason=str(problem), examples=await self._examples(one, problem))
            )
            return False
        self._made.append(one.title)
        return True

    async def _make_references(self, objects: Sequence[DumpedObject]) -> None:
        """Foreign keys: first all for new rows (that takes no time), then each is validated."""
        version = int(await self._target.fetchval("SHOW server_version_num"))
        wanted: list[DumpedObject] = []
        for one in objects:
            row = self._references.get(one.oid)
            facts = row and ForeignKeyFacts(name=row["name"], table=row["table"], to=row["to"])
            reason = why_left_out(self._closure, facts) if facts else ""
            if reason:
                self._left_out.append(f"{one.title}: {reason}")
            else:
                wanted.append(one)

        async def make(conn: Conn, one: DumpedObject) -> None:
            if self._is_there(one):
                self._existed.append(one.title)
                return
            row = self._references.get(one.oid)
            whole = row is None or (row["partitioned"] and version < 180_000)
            await self._try(conn, one, one.sql if whole else not_valid(one.sql))

        async def validate(conn: Conn, one: DumpedObject) -> None:
            row = self._references[one.oid]
            try:
                table = quoted_table(row["declared_on"])
                await conn.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {quoted(row['name'])}")
            except _AGAIN:
                raise
            except asyncpg.PostgresError as problem:
                self._failed.append(
                    Failed(name=one.title, reason=str(problem), examples=await self._examples(one, problem))
                )

        await self._each("references", wanted, make, 1)
        failed = {one.name for one in self._failed}
        # One that its own database has never validated may be violated there too: it stays as it is.
        checked = [
            one
            for one in wanted
            if one.title not in failed and one.oid in self._references and self._references[one.oid]["valid"]
        ]
        await self._each("validating", checked, validate, self._workers)
        refused = {one.name for one in self._failed} - failed
        self._made = [title for title in self._made if title not in refused]

    async def _make_trigger(self, conn: Conn, one: DumpedObject) -> None:
        sql, later = split_always(one.sql)
        if later:
            await conn.executemany(
                f"INSERT INTO {MOVE_SCHEMA}.at_opening VALUES ($1) ON CONFLICT DO NOTHING",
                [(text,) for text in later],
            )
            self._notes.append(f"{one.title} fires for applied changes only once the target opens")
        if not sql:
            return
        await self._try(conn, one, sql)

    async def _examples(self, one: DumpedObject, problem: asyncpg.PostgresError) -> tuple[str, ...]:
        """Rows that are in the way, for people; what the server says itself when they cannot be asked for."""
        said = (str(problem.detail),) if getattr(problem, "detail", None) else ()
        query = ""
        if (row := self._references.get(one.oid)) is not None:
            matched = " AND ".join(
                f"p.{quoted(to)} = c.{quoted(column)}"
                for column, to in zip(row["columns"], row["to_columns"], strict=True)
            )
            present = " AND ".join(f"c.{quoted(column)} IS NOT NULL" for column in row["columns"])
            columns = ", ".join(f"c.{quoted(column)}" for column in self._shown(row["table"], row["columns"]))
            query = (
                f"SELECT {columns} FROM {quoted_table(row['declared_on'])} AS c WHERE {present} "
                f"AND NOT EXISTS (SELECT FROM {quoted_table(row['to'])} AS p WHERE {matched}) "
                f"LIMIT {_EXAMPLES}"
            )
        elif (row := self._checks.get(one.oid)) is not None:
            columns = ", ".join(quoted(column) for column in self._shown(row["declared_on"], ()))
            query = (
                f"SELECT {columns} FROM {quoted_table(row['declared_on'])} WHERE NOT ({row['expression']}) "
                f"LIMIT {_EXAMPLES}"
            )
        if not query:
            return said
        try:
            async with connected(self._target_url, statement_timeout="30s") as conn:
                rows = await conn.fetch(query)
        except (asyncpg.PostgresError, Unavailable):
            return said
        return (
            tuple(", ".join(f"{name} = {value}" for name, value in found.items()) for found in rows) or said
        )

    def _shown(self, table: TableName, columns: Iterable[str]) -> list[str]:
        """The columns by which people find a row again."""
        found = self._closure.schema.tables.get(table)
        names = [*(found.key if found else ()), *columns]
        if not names and found:
            names = [column.name for column in found.columns][:4]
        return list(dict.fromkeys(names))

    async def _refresh(self) -> None:
        """Materialized views are filled by their own queries; one may need another one first."""
        waiting = [row[0] for row in await self._source.fetch(_MATERIALIZED)]
        while waiting:
            problems: dict[str, str] = {}
            for name in waiting:
                self._tell("views", name)
                try:
                    await self._target.execute(f"REFRESH MATERIALIZED VIEW {quoted_table(name)}")
                except asyncpg.PostgresError as problem:
                    problems[name] = str(problem)
            if len(problems) == len(waiting):
                self._failed += [
                    Failed(name=f"materialized view {name}", reason=text) for name, text in problems.items()
                ]
                return
            waiting = list(problems)

    async def _analyze(self) -> None:
        for table in self._closure.order:
            self._tell("analyzing", table)
            await self._target.execute(f"ANALYZE {quoted_table(table)}")

    def _tell(self, stage: str, name: str) -> None:
        if self._progress is not None:
            self._progress(SchemaProgress(stage=stage, done=0, total=0, doing=(name,)))


async def open_triggers(target_url: str) -> tuple[str, ...]:
    """Let triggers that are declared so fire for applied changes as well, once the applier is done.

    Returns the statements that were run. May be called again.
    """
    async with connected(target_url, lock_timeout=_LOCK_WAIT) as target, target.transaction():
        if await target.fetchval("SELECT to_regclass($1)", f"{MOVE_SCHEMA}.at_opening") is None:
            return ()
        rows = await target.fetch(f"DELETE FROM {MOVE_SCHEMA}.at_opening RETURNING statement")
        for row in rows:
            await target.execute(row["statement"])
        return tuple(sorted(row["statement"] for row in rows))


# -- sequences --------------------------------------------------------------------------------------------


class SequencesReport(msgspec.Struct, frozen=True, kw_only=True):
    """What each sequence was set to on the target; those already further ahead are not in it.

    `stands`: the last id that each of the target's can have given out by now; none of one that gave none.
    """

    set: Mapping[str, int] = msgspec.field(default_factory=dict)
    stands: Mapping[str, int] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()


_SEQUENCES = """
SELECT n.nspname || '.' || c.relname AS name, s.seqincrement AS increment, s.seqmin AS minimum,
    s.seqmax AS maximum, s.seqcycle AS cycle,
    (SELECT format_type(a.atttypid, NULL) FROM pg_depend d
     JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
     WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass
       AND d.deptype IN ('a', 'i') LIMIT 1) AS column_type
FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname !~ '^(pg_|fleetlift_)' AND n.nspname <> 'information_schema'
ORDER BY 1
"""

_INTEGERS: Final[Mapping[str, int]] = {"smallint": (1 << 15) - 1, "integer": (1 << 31) - 1}


async def set_sequences_ahead(
    source_url: str, target_url: str, closure: Closure, *, gap: int = 1_000_000
) -> SequencesReport:
    """Set the target's sequences `gap` ids ahead of the source's, so that ids given on the one from now on
    are not given on the other. Call it once writers are fenced; again is harmless: never backwards.
    """
    ahead_ = SequencesAhead(source_url, target_url, closure, gap=gap)
    try:
        return await ahead_()
    finally:
        await ahead_.aclose()


class SequencesAhead:
    """`set_sequences_ahead` by sessions that stay open: called before the freeze too, so that within it
    nothing connects, and nothing is planned anew. `report`: what the last call has found and done.

    `back`: only sequences that may have given ids to the tenant's rows on the `source`, which is the move's
    target then: not those of other tables, nor those that still stand where they did at the switch (`stood`).
    """

    def __init__(
        self,
        source_url: str,
        target_url: str,
        closure: Closure,
        *,
        gap: int = 1_000_000,
        back: bool = False,
        stood: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._urls, self._closure, self._gap = (source_url, target_url), closure, gap
        self._back, self._stood = back, stood
        self.report: SequencesReport | None = None
        self._open: contextlib.AsyncExitStack | None = None
        self._sides: tuple[Conn, Conn] | None = None

    async def aclose(self) -> None:
        opened, self._open, self._sides = self._open, None, None
        if opened is not None:
            await opened.aclose()

    async def _connected(self) -> tuple[Conn, Conn]:
        if self._sides is None or any(conn.is_closed() for conn in self._sides):
            await self.aclose()
            async with contextlib.AsyncExitStack() as stack:
                source, target = [await stack.enter_async_context(connected(url)) for url in self._urls]
                self._sides, self._open = (source, target), stack.pop_all()
        assert self._sides is not None
        return self._sides

    async def __call__(self) -> SequencesReport:
        source, target = await self._connected()
        try:
            self.report = await self._set(source, target)
            return self.report
        except BaseException:
            await self.aclose()  # a session that was cut short may still be at work
            raise

    async def _set(self, source: Conn, target: Conn) -> SequencesReport:
        theirs, ours = await asyncio.gather(
            _sequences(source, self._closure), _sequences(target, self._closure)
        )
        if self._back:
            left = staying(self._closure)
            theirs = {
                name: state
                for name, state in theirs.items()
                if name not in left and has_given(state, self._stood.get(name))
            }
        if not theirs:
            return SequencesReport()
        notes: list[str] = []
        wanted: dict[str, tuple[int, bool]] = {}
        for name, state in theirs.items():
            if name not in ours:
                notes.append(f"{name}: the target has no such sequence")
                continue
            found = ahead(state, ours[name], self._gap)
            if found.note:
                notes.append(found.note)
            if found.value is not None:
                wanted[name] = (found.value, found.is_called)
        if wanted:
            names = list(wanted)
            await target.fetch(
                "SELECT setval(name::regclass, value, called) "
                "FROM unnest($1::text[], $2::bigint[], $3::bool[]) AS s(name, value, called)",
                [quoted_table(name) for name in names],
                [wanted[name][0] for name in names],
                [wanted[name][1] for name in names],
            )
        now = {name: (one.last_value, one.is_called) for name, one in ours.items() if name in theirs} | wanted
        return SequencesReport(
            set={name: value for name, (value, _) in wanted.items()},
            stands={name: value for name, (value, called) in now.items() if called},
            notes=tuple(notes),
        )


async def _sequences(conn: Conn, closure: Closure) -> dict[str, SequenceState]:
    rows = await conn.fetch(_SEQUENCES)
    if not rows:
        return {}
    fills = {
        column.sequence: column.type
        for table in closure.schema.tables.values()
        for column in table.columns
        if column.sequence
    }
    # One statement: in a freeze every round trip counts.
    values = await conn.fetch(
        " UNION ALL ".join(
            f"SELECT {number} AS number, last_value, is_called FROM {quoted_table(row['name'])}"
            for number, row in enumerate(rows)
        )
    )
    found: dict[str, SequenceState] = {}
    for value in values:
        row = rows[value["number"]]
        widest = _INTEGERS.get(row["column_type"] or fills.get(row["name"], ""), (1 << 63) - 1)
        found[row["name"]] = SequenceState(
            name=row["name"],
            last_value=value["last_value"],
            is_called=value["is_called"],
            increment=row["increment"],
            minimum=row["minimum"],
            maximum=row["maximum"],
            cycle=row["cycle"],
            column_max=widest,
            column_min=-widest - 1,
        )
    return found
