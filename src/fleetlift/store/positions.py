"""Where each reader of the log stands. Moved in the transaction that stores what was read."""

from datetime import datetime
from typing import TypeAlias

from fleetlift.core.errors import Conflict
from fleetlift.store.pool import Conn

Place: TypeAlias = tuple[datetime, int, float | None]
"""Creation time of the stream, last sequence stored, and when the log took that message (Unix seconds)."""


async def load(connection: Conn, reader: str) -> Place | None:
    """Where the reader stands, or None when it is new."""
    row = await connection.fetchrow(
        "SELECT stream_created, seq, message_at FROM log_position WHERE reader = $1", reader
    )
    return None if row is None else (row["stream_created"], row["seq"], row["message_at"])


async def advance(connection: Conn, reader: str, *, before: Place | None, after: Place) -> None:
    """Move the reader from `before` to `after`, inside the caller's transaction.

    Raises Conflict when it does not stand at `before`: another process has moved it, so everything in this
    transaction was done by somebody else already. Roll back, load again, read again.
    """
    if before is None:
        status = await connection.execute(
            "INSERT INTO log_position (reader, stream_created, seq, message_at) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT DO NOTHING",
            reader,
            *after,
        )
    else:
        status = await connection.execute(
            "UPDATE log_position SET stream_created = $2, seq = $3, message_at = $4, updated_at = now() "
            "WHERE reader = $1 AND stream_created = $5 AND seq = $6",
            reader,
            *after,
            *before[:2],
        )
    if status.rsplit(" ", 1)[-1] != "1":
        raise Conflict(f"reader {reader} was moved by another process: read again from the stored position")
