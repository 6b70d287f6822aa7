"""The step `copy: tenant data`: slot, schema, rows, follow, indexes, verify.

Each part may be repeated: the slot is made once, chunks that are done stay done, indexes that are there are
skipped, a verification goes on with the chunks it has not checked.
"""

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final, TypeVar

from fleetlift.cancelling import end
from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.chunks import CopyProgress
from fleetlift.core.tenant.dumped import Failed, SchemaProgress
from fleetlift.core.tenant.plan import Copy
from fleetlift.core.tenant.throttle import Throttle
from fleetlift.core.tenant.verify_report import Kind, VerifyProgress, VerifyReport
from fleetlift.core.units import format_duration
from fleetlift.mover.move import Move, until
from fleetlift.mover.streams import Streams
from fleetlift.tenant import ddl
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.emptying import drop_database, empty_target, is_there, make_database, maker_of
from fleetlift.tenant.explain import explain
from fleetlift.tenant.follow import Direction, Follower, Prepared
from fleetlift.tenant.leftovers import clean, put_identities_back
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.verify import Verifier

T = TypeVar("T")
LOOK_S: Final = 0.5
FINDINGS_SHOWN: Final = 5


async def copy(move: Move, at: int, streams: Streams) -> str:
    """Bring every row of the tenant, and keep them the same from then on."""
    step = move.plan.copy
    move.forget_closure()
    if not move.facts(at).get("copied"):
        await streams.stop(Direction.FORWARD)  # one that has spooled meanwhile knows the schema of before
    await _take_target(move, at)
    closure = await move.closure()
    if not move.facts(at).get("copied"):
        await no_leaks(move)
    follower = await streams.forward()
    prepared = await follower.prepare()
    await move.save(at, followed=True)
    move.kill("slot-made")
    move.tell("making the schema on the target")
    made = await ddl.create_schema(
        move.source_url,
        move.target_url,
        closure,
        move=move.name,
        progress=lambda p: _tell_schema(move, p),
    )
    await _own_identities(move)
    move.kill("schema-made")
    streams.begin(Direction.FORWARD)
    if not move.facts(at).get("copied"):
        await _while_following(follower, _copy_rows(move, at, step, prepared))
    follower.must_pass(int(move.facts(at).get("fresh_until", 0)))
    move.kill("rows-copied")
    follower.start_applying()
    # What was read outside of the slot's snapshot may lie ahead: until it is passed, a unique index or a
    # foreign key could fail for a reason that passes.
    await until(partial(_passed, move, follower))
    finished = await _while_following(
        follower,
        ddl.finish_schema(
            move.source_url,
            move.target_url,
            closure,
            move=move.name,
            workers=step.workers,
            progress=lambda p: _tell_schema(move, p),
        ),
    )
    if finished.failed:
        raise Conflict("the target refuses what the source has: " + "; ".join(map(_failed, finished.failed)))
    move.kill("schema-finished")

    async def caught_up() -> bool:
        shown = follower.progress
        if shown.stopped:
            raise Conflict(shown.stopped)
        move.tell(f"catching up: {shown.lag_bytes or 0:,} bytes behind", lag_bytes=shown.lag_bytes)
        return follower.caught_up

    await until(caught_up)
    move.kill("caught-up")
    report = await verify(move, streams)
    if report.blocks:
        raise Conflict(findings_text(report))
    await move.save(at, verified_s=report.took_s)
    rows = report.rows
    notes = f"; {len(made.notes) + len(finished.notes)} notes" if made.notes or finished.notes else ""
    return f"{rows:,} rows on the target, every one verified{notes}"


async def _take_target(move: Move, at: int) -> None:
    """Make the target's database where the plan says so. Raises Conflict when it is another move's."""
    url = move.target_url
    if move.plan.target.create and not await is_there(url):
        await move.save(at, made_database=True)  # first: what is made is dropped again
        await make_database(url)
    if (maker := await maker_of(url)) is not None:
        ddl.refuse_of(maker, move.name)


async def no_leaks(move: Move) -> None:
    """Raise Conflict when a row of another tenant would come along, or something cannot be moved as it is."""
    move.tell("looking at every reference of the tenant's rows")
    async with ddl.connected(move.source_url) as source:
        found = await explain(source, await move.closure())
    if not found.ok:
        raise Conflict("these rows cannot move as they are: " + "; ".join(found.obstacles))


async def _own_identities(move: Move) -> None:
    """Give the target's tables the replica identity that the source's had before following set it."""
    async with ddl.connected(move.target_url) as target:
        for row in await target.fetch(f"SELECT relation, clause FROM {MOVE_SCHEMA}.identity_before"):
            await target.execute(f"ALTER TABLE {row['relation']} REPLICA IDENTITY {row['clause']}")


async def _passed(move: Move, follower: Follower) -> bool:
    shown = follower.progress
    if shown.stopped:
        raise Conflict(shown.stopped)
    move.tell(f"applying what came meanwhile: {shown.rows:,} rows, {shown.lag_bytes or 0:,} bytes behind")
    return shown.applied_lsn >= shown.fresh_until


async def _while_following(follower: Follower, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; raise Conflict as soon as following has stopped, after which it would be for nothing."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            if why := follower.progress.stopped:
                raise Conflict(why)
        return task.result()
    finally:
        await end([task])


async def _copy_rows(move: Move, at: int, step: Copy, prepared: Prepared) -> None:
    copier = Copier(
        move.source_url,
        move.target_url,
        await move.closure(),
        move=move.name,
        snapshot=prepared.snapshot,
        consistent_lsn=prepared.lsn,
        replica_url=move.replica_url,
        chunk_rows=step.chunk_rows,
        workers=step.workers,
        throttle=Throttle(
            replica_lag_s=step.lag_at_most_s / 4,
            replica_lag_max_s=step.lag_at_most_s,
            slot_retained_bytes=step.slot_at_most_bytes // 4,
            slot_retained_bytes_max=step.slot_at_most_bytes,
        ),
        on_step=move.kill,
    )
    result = await copier.run(lambda p: _tell_copy(move, p))
    move.tell("rows copied", rows_copied=result.rows, rows_total=result.rows, copied_bytes=result.bytes)
    await move.save(at, copied=True, rows_copied=result.rows, fresh_until=result.fresh_until)


async def verify(move: Move, streams: Streams) -> VerifyReport:
    """Compare every row, while both databases live."""
    verifier = Verifier(move.source_url, move.target_url, await move.closure(), settle=streams.settle)
    try:
        await verifier.open()
        report = await verifier.run(progress=lambda p: tell_verify(move, p))
    finally:
        await verifier.close()
    move.tell("every row verified", **verified_figures(report))
    return report


def verified_figures(report: VerifyReport) -> dict[str, int]:
    """The figures of a verification, as step and report show them."""
    return {
        "rows_verified": report.rows,
        "rows_missing": report.total(Kind.MISSING),
        "rows_foreign": report.total(Kind.FOREIGN),
        "rows_differing": report.total(Kind.DIFFERING, Kind.DOUBLED),
    }


def findings_text(report: VerifyReport) -> str:
    """What stands against a switch, with the first rows by key."""
    shown = [f"{one.kind.value} {one.table} {', '.join(one.key)}" for one in report.findings[:FINDINGS_SHOWN]]
    total = report.total(*Kind) - report.total(Kind.SURPLUS)
    return (
        f"{total:,} rows are not as on the source: {'; '.join(shown)}. "
        "'fleetlift tenant verify' lists them, 'fleetlift tenant repair' fetches them anew"
    )


def _failed(one: Failed) -> str:
    rows = f" (for example {one.examples[0]})" if one.examples else ""
    return f"{one.name}: {one.reason}{rows}"


def _tell_schema(move: Move, shown: SchemaProgress) -> None:
    move.tell(f"schema: {shown.stage} {', '.join(shown.doing)}")


def _tell_copy(move: Move, shown: CopyProgress) -> None:
    left = "" if shown.left_s is None else f", about {format_duration(round(shown.left_s))} left"
    why = f"; slowed down: {shown.throttled_why}" if shown.throttled_why else ""
    move.tell(
        f"copying {shown.rows:,} of {shown.rows_total:,} rows, {shown.rows_s:,.0f}/s{left}{why}",
        rows_copied=shown.rows,
        rows_total=shown.rows_total,
        copied_bytes=shown.bytes,
    )


def tell_verify(move: Move, shown: VerifyProgress) -> None:
    left = "" if shown.left_s is None else f", about {format_duration(round(shown.left_s))} left"
    move.tell(f"verifying: {shown.rows:,} rows, {shown.rate_rows_s:,.0f}/s{left}")


async def undo_copy(move: Move, at: int, streams: Streams) -> str:
    """Nothing of the move stays on the source, and nothing of the tenant on the target."""
    await streams.stop(Direction.FORWARD)
    there = await is_there(move.target_url)
    ours = there and await maker_of(move.target_url) in (None, move.name)
    if ours:
        await put_identities_back(move.target_url, move.name, other_url=move.source_url)
    await clean(move.source_url, move.name, other_url=move.target_url)
    move.forget_spools()
    move.kill("source-cleaned")
    if not there:
        text = "the target's database is not there"
    elif not ours:
        text = "the target is another move's and was left as it is"
    elif move.facts(at).get("made_database"):
        await drop_database(move.target_url)
        text = "the target's database is dropped"
    else:
        await empty_target(move.target_url, move=move.name)
        await clean(move.target_url, move.name, other_url=move.source_url)
        text = "the target is empty again"
    move.kill("target-gone")
    await move.forget(at)
    return f"{text}, the source as before"
