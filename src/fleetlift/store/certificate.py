"""What a migration's certificate needs of the backend beside the ledger: its devices' commands, counted."""

from collections.abc import Sequence
from datetime import UTC, datetime

from fleetlift.core.certificate import Commands
from fleetlift.core.orders import PROBE_COMMAND
from fleetlift.store.pool import Conn


async def commands(conn: Conn, devices: Sequence[str], since: float, until: float) -> Commands:
    """Commands made for `devices` in that time (Unix seconds), probes of the engine itself left out.

    One was executed twice when both its paths were told to execute it and both say that they have.
    """
    rows = await conn.fetch(
        """SELECT c.status, count(*) AS commands, count(*) FILTER (WHERE
                  n.mode = 'execute' AND o.mode = 'execute'
                  AND (n.status = 'succeeded' OR n.detail->'late'->>'status' = 'succeeded')
                  AND (o.status = 'succeeded' OR o.detail->'late'->>'status' = 'succeeded')) AS twice
           FROM command c
           LEFT JOIN command_path n ON n.command = c.id AND n.path = 'new'
           LEFT JOIN command_path o ON o.command = c.id AND o.path = 'old'
           WHERE c.device = ANY($1::text[]) AND c.created_at BETWEEN $2 AND $3 AND c.name <> $4
           GROUP BY c.status""",
        devices,
        datetime.fromtimestamp(since, UTC),
        datetime.fromtimestamp(until, UTC),
        PROBE_COMMAND,
    )
    return Commands(
        total=sum(row["commands"] for row in rows),
        by_status={row["status"]: row["commands"] for row in rows},
        executed_twice=sum(row["twice"] for row in rows),
    )
