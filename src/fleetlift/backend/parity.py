"""Comparing the two copies of messages that a device sends to both sides, as the telemetry reader finds them.

The reader hands over each copy whose number another path has brought already; the first copy is in the
database. Tallies are kept in memory and written with the reader's account, in the same transaction and at the
same position, so that a reader that starts anew counts none twice and leaves none out.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence

from fleetlift.core.parity import Tally, compare
from fleetlift.core.telemetry import MQTT_PATH, Telemetry
from fleetlift.store import parity as store
from fleetlift.store.parity import Key, ParityRow, Rules
from fleetlift.store.pool import Conn

REFRESH_S = 1.0  # rules and routes are read again so often
CACHED_MAX = 100_000


class Parity:
    """The tallies in memory: what is being counted, and what is not yet written."""

    def __init__(self) -> None:
        self._rows: OrderedDict[Key, ParityRow] = OrderedDict()
        self._changed: set[Key] = set()
        self._noise: dict[str, dict[str, Tally]] = {}
        self._rules: dict[str, Rules] = {}
        self._rules_at = float("-inf")
        self._both: dict[
            str, tuple[float, float | None]
        ] = {}  # device: when it was read, since when it is so

    @property
    def changes(self) -> int:
        return len(self._changed) + len(self._noise)

    async def take(self, conn: Conn, seconds: Sequence[Telemetry], again: Sequence[Telemetry]) -> None:
        """Compare with what is stored, once the first copies are.

        `seconds` are copies of what another path has brought, `again` what the old side was asked for twice.
        """
        if not seconds and not again:
            return
        await self._refresh(conn, {row.device for row in seconds})
        await self._load(conn, {_key(row, row.path) for row in seconds if row.path != MQTT_PATH})
        copies = await store.stored_copies(conn, [*seconds, *again])
        missing = {
            _key(row, copy.path)
            for row, copy in zip(seconds, copies, strict=False)
            if copy is not None and row.path == MQTT_PATH != copy.path
        }
        await self._load(conn, missing)
        for row, copy in zip(seconds, copies, strict=False):
            # Under a number that is used anew the message itself is stored, and nothing to compare it with.
            if copy is None or (row.path == MQTT_PATH) == (copy.path == MQTT_PATH):
                continue
            old_path = copy.path if row.path == MQTT_PATH else row.path
            old, new = (copy.body, row.body) if row.path == MQTT_PATH else (row.body, copy.body)
            self._count(row, old_path, old, new)
        for row, copy in zip(again, copies[len(seconds) :], strict=True):
            if copy is not None and copy.path == row.path:
                tally = self._noise.setdefault(row.path, {}).setdefault(row.channel, Tally())
                tally.note(compare(row.channel, copy.body, row.body))

    def _count(self, row: Telemetry, old_path: str, old: str, new: str) -> None:
        key = _key(row, old_path)
        rules = self._rules.get(old_path, Rules())
        since = self._both.get(row.device, (0.0, None))[1]
        entry = self._rows[key]
        if since is not None and (since > entry.last_at or rules.changed_at != entry.rules_at):
            # It has not sent to both ever since the pair before, or that was compared by other rules.
            entry = self._rows[key] = ParityRow(rules_at=rules.changed_at)
        entry.tally.note(compare(row.channel, old, new, rules.rules))
        assert row.seq is not None
        last = entry.spans.highest
        if since is not None and last is not None and row.seq > last:
            # What is in between should be there twice.
            entry.spans.add_range(last, row.seq + 1)
        else:
            entry.spans.add(row.seq)
        entry.last_at = time.time()  # our clock, as the route's: a feed's time of receipt is the old side's
        self._changed.add(key)

    async def _refresh(self, conn: Conn, devices: set[str]) -> None:
        now = time.monotonic()
        if now - self._rules_at >= REFRESH_S:
            self._rules = await store.all_rules(conn)
            self._rules_at = now
        if old := [d for d in devices if d not in self._both or now - self._both[d][0] >= REFRESH_S]:
            since = await store.both_since(conn, old)
            self._both.update((device, (now, since.get(device))) for device in old)

    async def _load(self, conn: Conn, keys: set[Key]) -> None:
        if unknown := keys - self._rows.keys():
            known = await store.load(conn, sorted(unknown))
            for key in unknown:
                self._rows[key] = known.get(key) or ParityRow()
        for key in keys:
            self._rows.move_to_end(key)

    async def save(self, conn: Conn, at: float) -> None:
        """Write what has changed. It counts as written once `saved` is called."""
        await store.save(conn, {key: self._rows[key] for key in self._changed})
        for old_path, added in self._noise.items():
            await store.add_noise(conn, old_path, added, at)

    def saved(self) -> None:
        self._changed.clear()
        self._noise.clear()
        while len(self._rows) > CACHED_MAX:
            self._rows.popitem(last=False)
        if len(self._both) > CACHED_MAX:
            self._both.clear()


def _key(row: Telemetry, old_path: str) -> Key:
    return row.device, row.channel, old_path
