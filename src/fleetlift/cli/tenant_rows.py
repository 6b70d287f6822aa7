"""`fleetlift tenant verify` and `repair`: is every row of a tenant where it should be, by its plan?"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleetlift.cli.client import Json

if TYPE_CHECKING:
    from fleetlift.core.tenant.plan import TenantPlan
    from fleetlift.core.tenant.verify_report import Repaired, VerifyProgress, VerifyReport
    from fleetlift.tenant.verify import Verifier

app = typer.Typer(help="A tenant's rows on both sides.", no_args_is_help=True)

APPLIED_WITHIN_S: Final = 120.0
POLL_S: Final = 0.05

PlanFile = Annotated[
    Path, typer.Option("--plan", help="The plan of the tenant's move.", exists=True, dir_okay=False)
]


@app.command()
def verify(
    plan: PlanFile,
    afresh: Annotated[
        bool, typer.Option("--afresh", help="Do not go on with a run that was cut off.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare every row of the tenant on source and target, also while both live.

    Exit status 1 when rows are missing, foreign or different; they are listed by key. The passwords are taken
    from the environment, as the plan says.
    """
    from fleetlift.cli.tenant_verify import show

    report = asyncio.run(_verify(_read(plan), resume=not afresh, quiet=as_json))
    raise typer.Exit(0 if show(report, as_json=as_json) else 1)


@app.command()
def repair(
    plan: PlanFile,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Verify, then fetch from the source what is not as it should be, and take away what is not the tenant's.

    For the time before the switch, while nobody but the move writes on the target.
    """
    from fleetlift.cli.screen import note
    from fleetlift.cli.tenant_verify import show

    read = _read(plan)
    report = asyncio.run(_verify(read, resume=True, quiet=as_json))
    if not report.blocks:
        show(report, as_json=as_json)
        return
    if not as_json:
        show(report)
    if not yes:
        typer.confirm("Repair these rows on the target?", abort=True, err=True)
    done, after = asyncio.run(_repair(read, report))
    if not as_json:
        note(f"{done.written:,} rows written, {done.deleted:,} taken away")
    raise typer.Exit(0 if show(after, as_json=as_json) else 1)


def _read(path: Path) -> "TenantPlan":
    from fleetlift.core.errors import BadInput
    from fleetlift.core.tenant.plan import TenantPlan
    from fleetlift.migrate.tenant_planfile import load_any_plan

    plan = load_any_plan(path)
    if not isinstance(plan, TenantPlan):
        raise BadInput(f"{path}: this is a fleet's plan; only a tenant's ('tenant:') has rows to compare")
    return plan


async def _verify(plan: "TenantPlan", *, resume: bool, quiet: bool) -> "VerifyReport":
    from fleetlift.cli.screen import err
    from fleetlift.cli.tenant_verify import progress_line

    console = err()
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status("connecting")) if not quiet else None

        def tell(at: "VerifyProgress") -> None:
            if status is not None:
                status.update(progress_line(at))

        async with _verifier(plan) as verifier:
            return await verifier.run(tell, resume=resume)


async def _repair(plan: "TenantPlan", report: "VerifyReport") -> "tuple[Repaired, VerifyReport]":
    from fleetlift.core.tenant.verify_report import by_table

    async with _verifier(plan) as verifier:
        repaired = await verifier.repair(report)
        await _tell_follower(plan, repaired.fresh_until)
        await _applied(plan, repaired.fresh_until)
        return repaired, await verifier.recheck(by_table(report.findings))


@contextlib.asynccontextmanager
async def _verifier(plan: "TenantPlan") -> "AsyncIterator[Verifier]":
    import asyncpg

    from fleetlift.core.errors import Unavailable
    from fleetlift.core.tenant.derive import closure_of
    from fleetlift.core.tenant.rules import parse_rules
    from fleetlift.migrate.tenant_check import url_of
    from fleetlift.tenant.introspect import read_schema
    from fleetlift.tenant.verify import Verifier

    source, target = url_of(plan.source), url_of(plan.target)
    try:
        conn = await asyncpg.connect(source, timeout=10.0)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Unavailable(f"the source cannot be reached: {error}") from error
    try:
        schema = await read_schema(conn)
    finally:
        await conn.close()
    closure = closure_of(schema, parse_rules(plan.copy.root, plan.copy.tables, schema))
    async with Verifier(
        source, target, closure, settle=lambda lsn: _applied(plan, lsn), move=plan.name
    ) as verifier:
        yield verifier


async def _tell_follower(plan: "TenantPlan", fresh_until: int) -> None:
    """Have the mover know that rows were read from the source up to `fresh_until`: it is noted where it looks
    when it connects, and made to connect again."""
    import asyncpg

    from fleetlift.migrate.tenant_check import url_of
    from fleetlift.tenant.names import MOVE_SCHEMA, slot_name

    conn = await asyncpg.connect(url_of(plan.target), timeout=10.0)
    try:
        if await conn.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{MOVE_SCHEMA}.copied"):
            await conn.execute(
                f"UPDATE {MOVE_SCHEMA}.copied SET fresh_until = "
                "greatest(fresh_until, '0/0'::pg_lsn + $2::numeric) WHERE move = $1",
                plan.name,
                fresh_until,
            )
        await conn.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = left($1, 63) AND pid <> pg_backend_pid()",
            f"fleetlift follow {slot_name(plan.name)}",
        )
    finally:
        await conn.close()


async def _applied(plan: "TenantPlan", lsn: int) -> None:
    """Wait until the mover has applied the source's log up to `lsn`; at once when nobody follows."""
    import asyncpg

    from fleetlift.core.errors import Unavailable
    from fleetlift.migrate.tenant_check import url_of
    from fleetlift.tenant.names import MOVE_SCHEMA, slot_name

    conn = await asyncpg.connect(url_of(plan.target), timeout=10.0)
    try:
        async with asyncio.timeout(APPLIED_WITHIN_S):
            while await conn.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{MOVE_SCHEMA}.position"):
                there = await conn.fetchval(
                    f"SELECT (lsn - '0/0')::bigint FROM {MOVE_SCHEMA}.position WHERE slot = $1",
                    slot_name(plan.name),
                )
                if there is None or there >= lsn:
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise Unavailable(
            f"the target has not caught up within {APPLIED_WITHIN_S:.0f} s: does the mover run? See /readyz"
        ) from None
    finally:
        await conn.close()
