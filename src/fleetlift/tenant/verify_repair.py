"""What a verification found, mended: rows of the target become what they are on the source."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.schema import quoted
from fleetlift.core.tenant.verify_report import Key, Kind, Repaired, VerifyReport, by_table
from fleetlift.store.pool import Conn
from fleetlift.tenant.names import APPLIED, MOVE_SCHEMA
from fleetlift.tenant.verify_bag import Bag
from fleetlift.tenant.verify_rows import Shape, literal
from fleetlift.tenant.verify_sql import batches, one_of

if TYPE_CHECKING:
    from fleetlift.tenant.verify import Verifier

_STAYS = (Kind.UNSETTLED, Kind.FORBIDDEN)  # nothing on the target can be made right


async def repair(verifier: "Verifier", report: VerifyReport) -> Repaired:
    """Make the rows of `report`'s findings on the target what they are on the source now.

    Each table is locked against writers on the target first and read on the source afterwards, so that
    nothing newer is overwritten; whoever applies changes goes on from there, and is as it was before once
    `fresh_until` is applied. Surplus rows go as well; unsettled and forbidden ones stay. Rows without a key
    are repaired only when they have stood still on the source until the target's were locked, since a change
    that is applied later would count twice. Verify again afterwards.
    """
    source, target = await verifier.sessions()
    await verifier.make_keys(source)
    written = deleted = lsn = 0
    for table, keys in by_table(f for f in report.findings if f.kind not in _STAYS).items():
        shape = verifier.shapes.get(table)
        if shape is None:
            raise Conflict(f"{table} is not on both sides: make its table on the target first")
        for batch in batches(list(keys)):
            more = await _repaired(verifier, source, target, shape, batch)
            written, deleted = written + more.written, deleted + more.deleted
            lsn = max(lsn, more.fresh_until)
    return Repaired(fresh_until=lsn, written=written, deleted=deleted)


async def _repaired(
    verifier: "Verifier", source: Conn, target: Conn, shape: Shape, keys: list[Key]
) -> Repaired:
    assert verifier.keys is not None
    columns = [field.name for field in shape.fields if not field.generated]
    listed = ", ".join(quoted(name) for name in columns)
    bag = Bag(verifier, shape)
    if not shape.key:
        still = await bag.of(source, keys)
        await verifier.settle(await source.fetchval("SELECT pg_catalog.pg_current_wal_insert_lsn()"))
    async with target.transaction():
        for name, value in {
            "lock_timeout": "10s",
            "session_replication_role": "replica",
            **verifier.writes_with,
        }.items():
            await target.execute("SELECT pg_catalog.set_config($1, $2, true)", name, value)
        await target.execute(
            "SELECT pg_catalog.pg_logical_emit_message(true, $1, $2::text)", APPLIED, verifier.move
        )
        await target.execute(f"LOCK TABLE {shape.name} IN SHARE ROW EXCLUSIVE MODE")
        if shape.key:
            which = one_of(shape, keys)
            now = await verifier.source_rows(source, shape, keys, True)
            coming = [key for key, one in now.items() if one.row.owned or one.listed]
            fetched = f"{one_of(shape, coming)}" if coming else "false"
        else:
            await verifier.make_keys(source)
            now_there = await bag.of(source, keys)
            hexes = ", ".join(literal(key[0]) for key in keys if now_there[key] == still[key]) or "NULL"
            which = f"{shape.hexadecimal} IN ({hexes})"
            fetched = f"{which} AND {verifier.keys.comes(shape.table)}"
        out = io.BytesIO()
        mine = ", ".join("r." + quoted(name) for name in columns)
        await source.copy_from_query(f"SELECT {mine} FROM {shape.sql} r WHERE {fetched}", output=out)
        lsn = await source.fetchval("SELECT pg_catalog.pg_current_wal_insert_lsn()")
        out.seek(0)
        done = await target.execute(f"DELETE FROM {shape.sql} r WHERE {which}")
        deleted = int(done.rpartition(" ")[2])
        await target.execute(
            f"CREATE TEMPORARY TABLE fleetlift_repair ON COMMIT DROP AS "
            f"SELECT {listed} FROM {shape.sql} LIMIT 0"
        )
        await target.copy_to_table("fleetlift_repair", schema_name="pg_temp", source=out, columns=columns)
        done = await target.execute(
            f"INSERT INTO {shape.name} ({listed}) OVERRIDING SYSTEM VALUE "
            f"SELECT {listed} FROM pg_temp.fleetlift_repair"
        )
        written = int(done.rpartition(" ")[2])
        if shape.key and verifier.members.part(shape.table) is Part.OWNED:
            await _note_shared(target, shape, keys, [key for key in coming if not now[key].row.owned])
    return Repaired(fresh_until=lsn, written=written, deleted=max(0, deleted - written))


async def _note_shared(target: Conn, shape: Shape, keys: Iterable[Key], shared: Iterable[Key]) -> None:
    """Keep the follower's note of which rows of a table of owned ones came along as shared ones."""
    if await target.fetchval("SELECT to_regclass($1)", f"{MOVE_SCHEMA}.shared_row") is None:
        return
    noted = f"{MOVE_SCHEMA}.shared_row"
    await target.executemany(
        f"DELETE FROM {noted} WHERE table_name = $1 AND key = $2", [(shape.table, key) for key in keys]
    )
    await target.executemany(
        f"INSERT INTO {noted} (table_name, key) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        [(shape.table, key) for key in shared],
    )
