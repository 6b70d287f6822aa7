"""Tables without a key: rows are told by what they hold."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from fleetlift.core.tenant.compare import Digest, kind_of_count, parts_that_differ
from fleetlift.core.tenant.verify_report import Finding, Key, Kind
from fleetlift.store.pool import Conn
from fleetlift.tenant.verify_rows import Shape
from fleetlift.tenant.verify_sql import both, hexadecimal, sums

if TYPE_CHECKING:
    from fleetlift.tenant.verify import Verifier

BAG_PARTS: Final = 1_024  # of a table without a key
TRIES: Final = 6


class Bag:
    """A table without a key: rows are counted by what they hold, and looked at again where that differs."""

    def __init__(self, verifier: "Verifier", shape: Shape) -> None:
        self._verifier, self._shape = verifier, shape
        self.source_rows = self.target_rows = 0

    async def findings(self, *, thorough: bool = True) -> list[Finding]:
        """Which rows differ; if not `thorough`, only whether any does."""
        v, shape = self._verifier, self._shape
        source, target = await v.sessions()
        mine, theirs = await both(
            sums(source, shape, self._comes(), BAG_PARTS), sums(target, shape, "true", BAG_PARTS)
        )
        self.source_rows = sum(one.rows for one in mine.values())
        self.target_rows = sum(one.rows for one in theirs.values())
        found: list[Finding] = []
        parts = parts_that_differ(mine, theirs)
        if parts and not thorough:
            return [Finding(kind=Kind.UNSETTLED, table=shape.table, key=())]
        for n in range(0, len(parts), 32):
            found += await self._looked_at(source, target, parts[n : n + 32])
        return found

    async def of(self, source: Conn, keys: Iterable[Key]) -> dict[Key, tuple[int, int]]:
        """How often these rows are on the source, with their versions."""
        parts = sorted({int(key[0][:16], 16) & (BAG_PARTS - 1) for key in keys})
        counts = await self._counts(source, self._comes(), parts)
        found: dict[Key, tuple[int, int]] = {
            (hexadecimal(digest),): count for digest, count in counts.items()
        }
        return {key: found.get(key, (0, 0)) for key in keys}

    def _comes(self) -> str:
        assert self._verifier.keys is not None
        return self._verifier.keys.comes(self._shape.table)

    async def _looked_at(self, source: Conn, target: Conn, parts: Sequence[int]) -> list[Finding]:
        """Counts that differ the same way twice, from a source whose counts stood still."""
        v, shape = self._verifier, self._shape
        suspected: dict[Digest, tuple[Kind | None, int, int]] = {}
        changing: set[Digest] = set()
        for attempt in range(TRIES):
            await v.make_keys(source)
            before = await self._counts(source, self._comes(), parts)
            lsn = await source.fetchval("SELECT pg_catalog.pg_current_wal_insert_lsn()")
            if not v.back:
                await v.settle(lsn)
            there = await self._counts(target, "true", parts)
            if v.back:
                await v.settle_back(target)
            await v.make_keys(source)
            after = await self._counts(source, self._comes(), parts)
            now: dict[Digest, tuple[Kind | None, int, int]] = {}
            changing = set()
            for digest in before.keys() | there.keys() | after.keys():
                (mine, version), (theirs, _), later = (
                    counts.get(digest, (0, 0)) for counts in (before, there, after)
                )
                if theirs in (mine, later[0]):
                    continue
                if (mine, version) != later:
                    changing.add(digest)
                    continue
                now[digest] = (kind_of_count(mine, theirs), mine, theirs)
            confirmed = {digest for digest, what in now.items() if suspected.get(digest) == what}
            suspected = now
            if attempt and confirmed == now.keys() and not changing:
                break
        return [
            Finding(kind=what[0] or Kind.UNSETTLED, table=shape.table, key=(hexadecimal(digest),))
            for digest, what in suspected.items()
        ] + [
            Finding(kind=Kind.UNSETTLED, table=shape.table, key=(hexadecimal(digest),)) for digest in changing
        ]

    async def _counts(self, conn: Conn, which: str, parts: Sequence[int]) -> dict[Digest, tuple[int, int]]:
        """How often each row is there, and a number that changes when one of those is written to."""
        rows = await conn.fetch(
            'SELECT a, b, count(*), sum(pg_catalog.hashtextextended(v COLLATE "C", 0)) '
            f"FROM {self._shape.hashed(which, BAG_PARTS, parts)} GROUP BY a, b"
        )
        return {(row[0], row[1]): (row[2], int(row[3])) for row in rows}
