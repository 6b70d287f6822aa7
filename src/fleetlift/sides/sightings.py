"""What the new side has seen of each device: read whole at first, then only where it has changed.

Of a large fleet little changes between two rounds. What was read is kept, and forgotten after anything that
went wrong, when the server was started anew, and every five minutes in any case.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from fleetlift.core.migration import DeviceObservation
from fleetlift.core.orders import SHADOW_NAME, DeviceReport
from fleetlift.store import shadows, sightings
from fleetlift.store.pool import Conn, Pool
from fleetlift.store.sightings import Reading

T = TypeVar("T")

LEAST = 1000  # devices; fewer are found by their keys sooner than what has changed is
ROWS_A_DEVICE = 20  # of the ledger that may be looked through for each device that is asked about
WHOLE_EVERY_S = 300.0

_decode_report = msgspec.json.Decoder(DeviceReport).decode
_NOTHING = DeviceObservation()


class Sightings:
    """Connection, report and newest telemetry of devices, as the backend's database has them."""

    def __init__(self, pool: Pool, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._monotonic = monotonic
        self._parsed: dict[str, tuple[str, DeviceReport]] = {}  # device: its report as last read
        self._seen: dict[str, DeviceObservation] = {}
        self._of: frozenset[str] = frozenset()  # the devices that `_seen` tells of
        self._upto: Reading | None = None  # what was written later is not in `_seen`
        self._whole_at = 0.0

    async def read(self, devices: Sequence[str]) -> dict[str, DeviceObservation]:
        """What is known of `devices` now; one that was never seen is left out."""
        upto, self._upto = self._upto, None  # until all has been read
        now = await self._ask(sightings.reading)
        wanted = frozenset(devices)
        small = len(wanted) < LEAST or now.rows > ROWS_A_DEVICE * len(wanted)
        late = self._monotonic() - self._whole_at >= WHOLE_EVERY_S
        if upto is None or upto.server != now.server or wanted != self._of or small or late:
            self._whole_at = self._monotonic()
            self._seen = await self._read_whole(list(devices))
            self._of = wanted
        else:
            await self._read_changed(upto)
        self._upto = now
        return dict(self._seen)

    def reports(self, found: Sequence[tuple[str, str]]) -> dict[str, DeviceReport]:
        """What devices report, of those that can be read; parsed only where it has changed."""
        parsed = ((device, self._report(device, text)) for device, text in found)
        return {device: report for device, report in parsed if report is not None}

    def _report(self, device: str, text: str) -> DeviceReport | None:
        known = self._parsed.get(device)
        if known is None or known[0] != text:
            try:
                known = (text, _decode_report(text))
            except (msgspec.MsgspecError, ValueError):
                return None
            self._parsed[device] = known
        return known[1]

    async def _ask(self, question: Callable[[Conn], Awaitable[T]]) -> T:
        async with self._pool.acquire() as conn:
            return await question(conn)

    async def _read_whole(self, devices: list[str]) -> dict[str, DeviceObservation]:
        found, online, heard = await asyncio.gather(
            # At once: of a large fleet one is decoded while the database works on the others.
            self._ask(lambda conn: shadows.reported(conn, SHADOW_NAME, devices)),
            self._ask(lambda conn: sightings.connected(conn, devices)),
            self._ask(lambda conn: sightings.heard(conn, devices)),
        )
        reports = self.reports(found)
        connected = {device for device, _ in online}
        by_new = {device: at for device, new, at in heard if new}
        by_old = {device: at for device, new, at in heard if not new}
        seen = reports.keys() | connected | by_new.keys() | by_old.keys()
        return {
            device: DeviceObservation(
                connected_new=device in connected,
                report_by_new=reports.get(device),
                new_telemetry_at=by_new.get(device),
                old_telemetry_at=by_old.get(device),
            )
            for device in devices  # in their order: whoever goes through a fleet finds them side by side
            if device in seen
        }

    async def _read_changed(self, since: Reading) -> None:
        found, online, heard = await asyncio.gather(
            self._ask(lambda conn: sightings.reported_since(conn, SHADOW_NAME, since)),
            self._ask(lambda conn: sightings.connected_since(conn, since)),
            self._ask(lambda conn: sightings.heard_since(conn, since)),
        )
        connected = dict(online)
        reports = {device: None if text is None else self._report(device, text) for device, text in found}
        by_new = {device: at for device, new, at in heard if new}
        by_old = {device: at for device, new, at in heard if not new}
        for device in self._of & (reports.keys() | connected.keys() | by_new.keys() | by_old.keys()):
            before = self._seen.get(device, _NOTHING)
            after = DeviceObservation(
                connected_new=connected.get(device, before.connected_new),
                report_by_new=reports.get(device, before.report_by_new),
                new_telemetry_at=_later(by_new.get(device), before.new_telemetry_at),
                old_telemetry_at=_later(by_old.get(device), before.old_telemetry_at),
            )
            if after == _NOTHING:
                self._seen.pop(device, None)
            else:
                self._seen[device] = after


def _later(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else max(one, other)
