"""What a tenant's plan would do, before anything moves: what is missing, which tables come, how names stand.

Reads both databases and the name servers; writes to none of them.
"""

import asyncio
import os
from collections.abc import Mapping

import asyncpg
import msgspec

from fleetlift.core.errors import BadInput, FleetError
from fleetlift.core.migration import AuditEntry
from fleetlift.core.tenant.closure import Closure, Part
from fleetlift.core.tenant.derive import closure_of, refusals
from fleetlift.core.tenant.move import MoveState, begin
from fleetlift.core.tenant.plan import (
    Database,
    SwitchDns,
    TenantPlan,
    Validate,
    step_name,
    wave_problems,
    with_password,
)
from fleetlift.core.tenant.rules import parse_rules
from fleetlift.log import get_logger
from fleetlift.migrate.names import dns_lever, provider_of
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.store import tenant_moves
from fleetlift.store.pool import Conn, Pool
from fleetlift.tenant.emptying import database_of, maintenance_url
from fleetlift.tenant.explain import explain
from fleetlift.tenant.follow_books import OLDEST as FOLLOWED
from fleetlift.tenant.introspect import read_schema

log = get_logger(__name__)

EXPLAINED_WITHIN_S = 10.0  # a check is waited for by a person
FILES_MAX, FILE_CHARS_MAX = 20, 256 * 1024


class TableLine(msgspec.Struct, frozen=True, kw_only=True):
    """A table that has rows to bring. `rows` and `bytes` are the catalogue's estimates of the whole table."""

    table: str
    part: str
    rows: int
    bytes: int


class MoveCheck(msgspec.Struct, frozen=True, kw_only=True):
    """`problems` stand against a start; `warnings` do not."""

    kind: str = "tenant"
    name: str
    tenant: str
    ok: bool
    steps: tuple[str, ...] = ()
    tables: tuple[TableLine, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def url_of(database: Database, *, of: str = "") -> str:
    """A database's URL with its password from the environment. Raises BadInput."""
    password = None
    if database.password_env:
        password = os.environ.get(database.password_env)
        if password is None:
            raise BadInput(
                f"the environment variable {database.password_env} is not set where Fleetlift runs: set it "
                "to the database's password and start 'fleetlift serve' again"
            )
    return with_password(of or database.url, password)


async def check_move(plan: TenantPlan, files: Mapping[str, str]) -> MoveCheck:
    """Everything that can be known before the start."""
    problems: list[str] = []
    warnings: list[str] = []
    closure: Closure | None = None
    try:
        source = await _connect(url_of(plan.source), "source")
        try:
            problems += await _source_problems(source, plan)
            schema = await read_schema(source)
            closure = closure_of(schema, parse_rules(plan.copy.root, plan.copy.tables, schema))
            problems += refusals(closure)
            problems += _feature_problems(plan, closure)
            try:
                async with asyncio.timeout(EXPLAINED_WITHIN_S):
                    problems += (await explain(source, closure)).obstacles
            except TimeoutError:
                warnings.append(
                    f"the tenant's rows were not all looked at within {EXPLAINED_WITHIN_S:.0f} s: "
                    "'fleetlift tenant explain' does, and so does the first step before it copies"
                )
        finally:
            await source.close()
    except FleetError as error:
        problems.append(str(error))
    try:
        problems += await _target_problems(plan)
    except FleetError as error:
        problems.append(str(error))
    if plan.copy.from_replica and not plan.source.replica:
        problems.append("'from_replica: true' needs 'replica:' beside the source's 'postgresql:'")
    for step in plan.steps:
        if isinstance(step, Validate) and step.scenario not in files:
            problems.append(f"the scenario {step.scenario!r} did not come with the plan: put it beside it")
        if isinstance(step, SwitchDns):
            problems += await _dns_problems(plan, step)
    problems += wave_problems(plan)
    if not plan.old.relay and any(isinstance(step, SwitchDns) for step in plan.steps):
        warnings.append(
            "no relay stands at the old address ('relay:' under 'from:'), so a device that never asks DNS "
            "again is not forwarded, and who still comes there is not measured"
        )
    tables = () if closure is None else _tables(closure)
    return MoveCheck(
        name=plan.name,
        tenant=plan.tenant,
        ok=not problems,
        steps=tuple(step_name(step) for step in plan.steps),
        tables=tables,
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


async def start_move(
    engine: Pool, plan_text: str, files: Mapping[str, str], *, actor: str, now: float, file: str = "plan.yaml"
) -> MoveState:
    """Check a plan and store the move; the mover takes it up at once.

    Raises BadInput (the plan with file and line, or what stands against it) or Conflict (the name is taken,
    or the tenant is being moved already).
    """
    plan = parse_tenant_plan(plan_text, file=file)
    check_files(files)
    found = await check_move(plan, files)
    if not found.ok:
        raise BadInput("this move cannot start:\n" + "\n".join(f"- {problem}" for problem in found.problems))
    state = begin(plan)
    async with engine.acquire() as conn:
        await tenant_moves.create(
            conn,
            tenant=plan.tenant,
            plan=plan_text,
            files=files,
            state=state,
            audit=[
                AuditEntry(
                    kind="migration_started",
                    text=f"started by {actor}: {len(found.tables)} tables have rows of {plan.copy.root}",
                    actor=actor,
                    evidence={"tables": len(found.tables), "steps": list(found.steps)},
                )
            ],
            created_by=actor,
            now=now,
        )
    log.info("migration_started", migration=plan.name, tenant=plan.tenant, actor=actor)
    return state


def check_files(files: Mapping[str, str]) -> None:
    """Raise BadInput when there are too many, or they are too large."""
    if len(files) > FILES_MAX:
        raise BadInput(f"a plan brings at most {FILES_MAX} files")
    for name, content in files.items():
        if len(content) > FILE_CHARS_MAX:
            raise BadInput(f"{name}: a plan's files have at most {FILE_CHARS_MAX // 1024} KiB each")


async def _connect(url: str, side: str) -> Conn:
    try:
        return await asyncpg.connect(url, timeout=10.0)
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BadInput(f"the {side} cannot be reached: {error}") from error


async def _source_problems(conn: Conn, plan: TenantPlan) -> list[str]:
    row = await conn.fetchrow(
        "SELECT current_setting('wal_level') AS wal_level, "
        "current_setting('server_version_num')::int AS version, "
        "pg_is_in_recovery() AS standby, current_setting('max_replication_slots')::int AS slots, "
        "(SELECT count(*) FROM pg_replication_slots)::int AS used, "
        "(SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user) AS may_replicate, "
        "has_database_privilege(current_database(), 'CREATE') AS may_publish, current_user AS me"
    )
    assert row is not None
    problems = []
    problems += _version_problems("source", row["version"])
    if row["standby"]:
        problems.append("the source is a standby: name the primary, and the standby as 'replica:'")
    if row["wal_level"] != "logical":
        problems.append(
            f"the source has wal_level = {row['wal_level']}: set it to logical and restart it; nothing else "
            "can follow changes without triggers"
        )
    if row["used"] >= row["slots"]:
        problems.append(
            f"all {row['slots']} replication slots of the source are taken: raise max_replication_slots"
        )
    if not row["may_replicate"]:
        problems.append(f"user {row['me']} may not replicate: ALTER ROLE {row['me']} REPLICATION")
    if not row["may_publish"]:
        problems.append(f"user {row['me']} may not create publications: GRANT CREATE ON DATABASE to it")
    return problems


async def _target_problems(plan: TenantPlan) -> list[str]:
    url = url_of(plan.target)
    if plan.target.create:
        server = await _connect(maintenance_url(url), "target's server")
        try:
            there, may = await server.fetchrow(
                "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1), "
                "(SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user)",
                database_of(url),
            ) or (False, False)
            version = await server.fetchval("SELECT current_setting('server_version_num')::int")
        finally:
            await server.close()
        if not there:
            old = _version_problems("target", version)
            return old if may else [*old, "the target's user may not create databases: ALTER ROLE … CREATEDB"]
    target = await _connect(url, "target")
    try:
        return await _of_target(target)
    finally:
        await target.close()


async def _of_target(conn: Conn) -> list[str]:
    row = await conn.fetchrow(
        "SELECT current_setting('wal_level') AS wal_level, "
        "current_setting('server_version_num')::int AS version, (SELECT count(*) FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p') "
        "AND n.nspname !~ '^(pg_|information_schema|fleetlift_)')::int AS tables"
    )
    assert row is not None
    problems = _version_problems("target", row["version"])
    if row["tables"]:
        problems.append(
            f"the target has {row['tables']} tables already: a tenant moves into an empty database of its own"
        )
    if row["wal_level"] != "logical":
        problems.append(
            f"the target has wal_level = {row['wal_level']}: set it to logical, or nothing could flow back"
        )
    return problems


def _version_problems(side: str, version: int) -> list[str]:
    """Both sides are followed, the target for the way back."""
    if version >= FOLLOWED:
        return []
    return [
        f"the {side} is PostgreSQL {version // 10_000}: the oldest that can be followed is "
        f"{FOLLOWED // 10_000}; upgrade it first"
    ]


def _feature_problems(plan: TenantPlan, closure: Closure) -> list[str]:
    problems = []
    for feature, tables in plan.features.items():
        for table in tables:
            name = table if "." in table else f"public.{table}"
            if closure.parts.get(name) is not Part.OWNED:
                problems.append(f"features.{feature}: {table} is not a table that has rows of the tenant")
    return problems


def _tables(closure: Closure) -> tuple[TableLine, ...]:
    return tuple(
        TableLine(
            table=name,
            part=closure.parts[name].value,
            rows=closure.schema.tables[name].rows,
            bytes=closure.schema.tables[name].bytes,
        )
        for name in closure.order
    )


# -- names ---------------------------------------------------------------------------------------------------


async def _dns_problems(plan: TenantPlan, step: SwitchDns) -> list[str]:
    try:
        provider = provider_of(plan)
        try:
            return [f"{one.name}: {one.text}" for one in await dns_lever(plan, step, provider).check()]
        finally:
            await provider.close()
    except FleetError as error:
        return [str(error)]
