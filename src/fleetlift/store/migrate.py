"""Schema migrations: numbered SQL files, applied in order, each in a transaction, once.

`store/migrations/NNNN_name.sql`. Table `schema_version` holds number, name and digest of what was applied.
Starters that come at the same time queue for an advisory lock; the later ones find the work done.
"""

import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import asyncpg
import msgspec

from fleetlift.core.errors import Conflict
from fleetlift.log import get_logger
from fleetlift.store.pool import lock_key

log = get_logger(__name__)

_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_TABLE = """CREATE TABLE IF NOT EXISTS public.schema_version (
    number      integer PRIMARY KEY,
    name        text NOT NULL,
    digest      text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
)"""


class SchemaChange(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    name: str
    sql: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def changes(part: str = "all") -> tuple[SchemaChange, ...]:
    """The files in order. `part`: "all", or "engine" for the migration engine's files alone.

    A file belongs to the engine when its name begins with `engine`.
    """
    found = []
    for file in resources.files("fleetlift.store").joinpath("migrations").iterdir():
        match = _FILE.fullmatch(file.name)
        if match and (part == "all" or match[2].startswith("engine")):
            found.append(SchemaChange(number=int(match[1]), name=match[2], sql=file.read_text("utf-8")))
    found.sort(key=lambda change: change.number)
    assert len({change.number for change in found}) == len(found), "two migrations with the same number"
    return tuple(found)


async def migrate(url: str, *, part: str = "all", known: Sequence[SchemaChange] | None = None) -> list[int]:
    """Bring the database at `url` to the newest schema; returns the numbers applied now.

    Raises Conflict when an applied file has changed since, or when the database is newer than this program.
    """
    known = changes(part) if known is None else known
    connection: asyncpg.Connection[Any] = await asyncpg.connect(url, timeout=10.0, command_timeout=None)
    try:
        # Held by the session, not a transaction: each file commits on its own.
        await connection.execute("SELECT pg_advisory_lock($1)", lock_key("schema"))
        await connection.execute(_TABLE)
        applied = {
            row["number"]: row
            for row in await connection.fetch("SELECT number, name, digest FROM public.schema_version")
        }
        _check(known, applied)
        done = []
        for change in known:
            if change.number in applied:
                continue
            async with connection.transaction():
                await connection.execute(change.sql)
                await connection.execute(
                    "INSERT INTO public.schema_version (number, name, digest) VALUES ($1, $2, $3)",
                    change.number,
                    change.name,
                    change.digest,
                )
            log.info("schema_migrated", number=change.number, name=change.name)
            done.append(change.number)
        return done
    finally:
        await connection.close()


def _check(known: Sequence[SchemaChange], applied: dict[int, "asyncpg.Record"]) -> None:
    by_number = {change.number: change for change in known}
    newest = max(by_number, default=0)
    for number, row in sorted(applied.items()):
        if number > newest:
            raise Conflict(
                f"the database has schema {number} ({row['name']}), this program knows up to {newest}: "
                "run the newer Fleetlift, or restore the database of before its upgrade"
            )
        change = by_number.get(number)
        if change is not None and change.digest != row["digest"]:
            raise Conflict(
                f"schema migration {number:04d}_{change.name}.sql was changed after it had been applied: "
                "put the file back as it was and add a new one instead"
            )
