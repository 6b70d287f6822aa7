"""Where each reader of the log stands. Moved in the transaction that stores what was read."""

from datetime import datetime

from fleetlift.core.errors import Conflict
from fleetlift.store.pool import Conn


async def load(connection: Conn, reader: str) -> tuple[datetime, int] | None:
    """(creation time of the stream, last sequence stored), or None when the reader is new."""
    row = await connection.fetchrow("SELECT stream_created, seq FROM log_position WHERE reader = $1", reader)
    return None if row is None else (row["stream_created"], row["seq"])


async def advance(
    connection: Conn,
    reader: str,
    *,
    before: tuple[datetime, int] | None,
    after: tuple[datetime, int],
) -> None:
    """Move the reader from `before` to `after`, inside the caller's transaction.

    Raises Conflict when it does not stand at `before`: another process has moved it, so everything in this
    transaction was done by somebody else already. Roll back, load again, read again.
    """
    if before is None:
        status = await connection.execute(
            "INSERT INTO log_position (reader, stream_created, seq) VALUES ($1, $2, $3) "
            "ON CONFLICT DO NOTHING",
            reader,
            *after,
        )
    else:
        status = await connection.execute(
            "UPDATE log_position SET stream_created = $2, seq = $3, updated_at = now() "
            "WHERE reader = $1 AND stream_created = $4 AND seq = $5",
            reader,
            *after,
            *before,
        )
    if status.rsplit(" ", 1)[-1] != "1":
        raise Conflict(f"reader {reader} was moved by another process: read again from the stored position")
