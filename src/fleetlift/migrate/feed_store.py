"""What the bridge keeps in the backend's database: positions, answers, commands on their way."""

from collections.abc import Sequence

import msgspec

from fleetlift.core.command import Path, PathStatus
from fleetlift.core.telemetry import DeadLetter
from fleetlift.sides.base import SideCommand
from fleetlift.store import commands, devices, telemetry
from fleetlift.store.pool import Pool


class PostgresFeedStore:
    """`ports.FeedStore` in PostgreSQL."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def position(self, key: str) -> str | None:
        async with self._pool.acquire() as conn:
            found: str | None = await conn.fetchval("SELECT position FROM feed_position WHERE side = $1", key)
        return found

    async def owners(self, of: Sequence[str]) -> dict[str, str]:
        async with self._pool.acquire() as conn:
            return await devices.known_owners(conn, of)

    async def settle(
        self, key: str, position: str, answers: Sequence[commands.Answer], letters: Sequence[DeadLetter]
    ) -> int:
        """Commands that are not ours, of the old side's own callers, are left out by the store."""
        changed = 0
        async with self._pool.acquire() as conn, conn.transaction():
            if answers:
                results = await commands.record_answers(conn, answers)
                changed = sum(result.changed for result in results)
            if letters:
                await telemetry.insert_dead_letters(conn, letters)
            await conn.execute(
                "INSERT INTO feed_position (side, position) VALUES ($1, $2) ON CONFLICT (side) "
                "DO UPDATE SET position = excluded.position, updated_at = now()",
                key,
                position,
            )
        return changed

    async def take_outgoing(
        self, migrations: Sequence[str], *, again: bool, after: str, limit: int, now: float
    ) -> tuple[str, list[SideCommand]]:
        """Marked before they are sent, so that no answer can come first and latency counts from here."""
        async with self._pool.acquire() as conn:
            rows = await conn.fetch(
                _OUTGOING_SQL, ["queued", "sent"] if again else ["queued"], migrations, limit, after
            )
            if not rows:
                return "", []
            async with conn.transaction():
                worth = await commands.mark_sent(conn, Path.OLD, [row["id"] for row in rows], now)
        return rows[-1]["id"], [
            SideCommand(
                id=row["id"],
                device=row["device"],
                name=row["name"],
                params=msgspec.json.decode(row["params"]),
                mode=row["mode"],
                expires_at=row["expires_at"],
            )
            for row in rows
            if row["id"] in worth
        ]

    async def unreachable(self, command: str, reason: str, at: float) -> None:
        async with self._pool.acquire() as conn, conn.transaction():
            await commands.record_answer(
                conn, command, Path.OLD, PathStatus.UNREACHABLE, {"reason": reason}, at
            )


_OUTGOING_SQL = """
SELECT c.id::text AS id, c.device, c.name, c.params::text AS params, p.mode,
    extract(epoch FROM c.expires_at)::float8 AS expires_at
FROM command_path p JOIN command c ON c.id = p.command JOIN device_route r ON r.device = p.device
WHERE p.path = 'old' AND p.ended_at IS NULL AND p.status = ANY($1::text[]) AND c.expires_at > now()
    AND r.migration = ANY($2::text[]) AND c.id > $4::uuid
ORDER BY c.id LIMIT $3
"""
