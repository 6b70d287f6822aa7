"""The moves of a device: its phase, the try of the new side, the ways back, and what it reports of them."""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec

from fleetlift.core.errors import FleetError
from fleetlift.core.orders import (
    TRY_CHANNEL,
    CommandsFlag,
    DevicePhase,
    DeviceReport,
    Flags,
    LinkFlag,
    Orders,
    TelemetryFlag,
)
from fleetlift.device.actions import Actions
from fleetlift.device.link import Link
from fleetlift.device.messages import (
    LinkState,
    Path,
    Place,
    Record,
    RecordChanged,
    Report,
    SendTryTelemetry,
    ShadowGet,
)
from fleetlift.device.outbox import Outbox
from fleetlift.device.settings import AgentSettings


class Cause(StrEnum):
    """What moves a device from phase to phase."""

    ORDERED_OLD = "ordered-old"  # a newer epoch whose flags need no new side
    ORDERED_NEW = "ordered-new"  # a newer epoch whose flags need the new side, which is not being served
    ORDERED_WHILE_SERVED = "ordered-while-served"  # the same, while the new side serves this device
    TRY_SUCCEEDED = "try-succeeded"  # telemetry, command and shadow have gone round on the new side
    TRY_FAILED = "try-failed"  # the deadline passed, or the order cannot be tried
    NEW_LOST = "new-lost"  # the new side was lost for longer than the limit


MOVES: Final[Mapping[DevicePhase, Mapping[Cause, DevicePhase]]] = {
    DevicePhase.OLD: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
    },
    DevicePhase.TRYING: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
        Cause.TRY_SUCCEEDED: DevicePhase.MOVED,
        Cause.TRY_FAILED: DevicePhase.WENT_BACK,
    },
    DevicePhase.MOVED: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
        Cause.ORDERED_WHILE_SERVED: DevicePhase.MOVED,
        Cause.NEW_LOST: DevicePhase.WENT_BACK,
    },
    DevicePhase.WENT_BACK: {
        Cause.ORDERED_OLD: DevicePhase.OLD,
        Cause.ORDERED_NEW: DevicePhase.TRYING,
    },
}


class IllegalMove(FleetError):
    """A mistake of the program: this cause means nothing in this phase."""


class Leg(StrEnum):
    """The three round trips of a try."""

    TELEMETRY = "telemetry"
    SHADOW = "shadow"
    COMMAND = "command"


class Moves:
    """The record of the move, and all that may change it."""

    def __init__(
        self, settings: AgentSettings, actions: Actions, outbox: Outbox, links: Mapping[Path, Link]
    ) -> None:
        self.record = Record()
        self.stale_orders = 0
        self._settings = settings
        self._actions = actions
        self._outbox = outbox
        self._links = links
        self._old, self._new = links[Path.OLD], links[Path.NEW]
        self._report_token: int | None = None  # what is to be reported waits for this to be stored
        self._legs: set[Leg] = set()
        self._legs_at = math.inf

    def started(self, record: Record, now: float) -> None:
        self.record = record
        if record.phase is DevicePhase.TRYING:
            self._legs_at = now
        elif record.phase is DevicePhase.MOVED:
            # Each start counts the limit of a lost side anew: a device that is started again and again for
            # want of a connection would never reach it.
            if (times := record.starts_unserved) >= self._settings.starts_unserved_max:
                self.back(Cause.NEW_LOST, f"started {times} times without being served by the new side", now)
            else:
                self._note_starts(times + 1)

    def _note_starts(self, unserved: int) -> None:
        self.record = msgspec.structs.replace(self.record, starts_unserved=unserved)
        self._actions.persist(RecordChanged(self.record), wait=False)

    def served(self, link: Link) -> None:
        """There is evidence that the side serves this device; being connected is none."""
        if link.state is LinkState.UP:
            link.down_since = None
            link.attempts = 0
            if link is self._new and self.record.starts_unserved:
                self._note_starts(0)

    # --- the phase ---

    def ordered(self, link: Link, orders: Orders, now: float) -> bool:
        """Obey an order if it is newer. True: the new link is to be made anew, for the new side has moved."""
        record = self.record
        self.served(link)
        if not self._settings.updatable:
            if orders.epoch > 0 and link.ready:
                report = DeviceReport(
                    epoch=orders.epoch,
                    phase=DevicePhase.OLD,
                    flags=Flags(),
                    reason="unsupported: this firmware cannot be updated",
                )
                self._actions.out.append(Report(link.path, report))
            return False
        if orders.epoch <= record.epoch:
            if orders.epoch < record.epoch:
                self.stale_orders += 1
                if link.ready and self._report_token is None:
                    self._report(link)  # so that the side learns what holds
            return False
        if (held := record.orders) is not None:
            # Where the new side is comes with the first order only, and is kept for the way out of a
            # stranding even when a later order needs no new side.
            orders = msgspec.structs.replace(
                orders, new=orders.new or held.new, credential=orders.credential or held.credential
            )
        same_place = held is not None and held.new == orders.new and held.credential == orders.credential
        if not orders.flags.needs_new:
            self.move(Cause.ORDERED_OLD, now, orders=orders, flags=orders.flags)
            return False
        if record.phase is DevicePhase.MOVED and same_place and self._new.down_since is None:
            self.move(Cause.ORDERED_WHILE_SERVED, now, orders=orders, flags=orders.flags)
            return False
        self._legs.clear()
        self._legs_at = now
        self._new.why_down = ""
        self.move(Cause.ORDERED_NEW, now, orders=orders, try_started_at=now)
        if orders.new is None or orders.credential is None:
            self.back(Cause.TRY_FAILED, "try failed: the order names no endpoint or no credential", now)
            return False
        if self._new.state is LinkState.DOWN:
            self._new.retry_now(now)
            return False
        return not same_place

    def leg_done(self, leg: Leg, now: float) -> None:
        if self.record.phase is not DevicePhase.TRYING or self._new.state is not LinkState.UP:
            return
        self._legs.add(leg)
        if len(self._legs) == len(Leg):
            assert self.record.orders is not None
            self.move(Cause.TRY_SUCCEEDED, now, flags=self.record.orders.flags)

    def back(self, cause: Cause, reason: str, now: float) -> None:
        self.move(cause, now, flags=Flags(), reason=reason)

    def move(
        self,
        cause: Cause,
        now: float,
        *,
        orders: Orders | None = None,
        flags: Flags | None = None,
        reason: str = "",
        try_started_at: float | None = None,
    ) -> None:
        """The only place where the phase changes. The change is stored, then reported by every link."""
        before = self.record
        if (phase := MOVES[before.phase].get(cause)) is None:
            raise IllegalMove(f"{cause.value} in phase {before.phase.value}")
        self.record = Record(
            epoch=orders.epoch if orders else before.epoch,
            phase=phase,
            flags=flags if flags is not None else before.flags,
            reason=reason,
            orders=orders or before.orders,
            try_started_at=try_started_at,
            served_at=_place(before.orders) if cause is Cause.TRY_SUCCEEDED else before.served_at,
        )
        self._report_token = self._actions.persist(RecordChanged(self.record))
        if self._old.down_since is not None and phase is not before.phase:
            # Nobody may have needed the old side until now: count its absence from here.
            self._old.down_since = now
        if self.record.flags.telemetry is not before.flags.telemetry:
            self._outbox.demand(self.record.flags.telemetry)

    # --- reports ---

    @property
    def await_disk(self) -> bool:
        """A report is due once the record is stored."""
        return self._report_token is not None

    def report(self) -> DeviceReport:
        r = self.record
        return DeviceReport(epoch=r.epoch, phase=r.phase, flags=r.flags, reason=r.reason)

    def ready(self, link: Link) -> None:
        """The link takes reports and answers from now on."""
        link.ready = True
        if self.record.epoch and self._report_token is None:
            self._report(link)

    def stored(self) -> None:
        """The disk has taken everything up to the newest stored token."""
        if self._report_token is not None and self._report_token <= self._actions.stored:
            self._tell_report()

    def stored_alone(self, token: int) -> None:
        if self._report_token == token:
            self._tell_report()

    def _tell_report(self) -> None:
        self._report_token = None
        for link in (self._old, self._new):
            if link.ready:
                self._report(link)

    def _report(self, link: Link) -> None:
        self._actions.out.append(Report(link.path, self.report()))

    # --- the try, and the dead-man ---

    def subscribed(self, now: float) -> None:
        """The new side delivers orders and commands from now on."""
        self.ready(self._new)
        self._actions.out.append(ShadowGet())
        if self.record.phase is DevicePhase.TRYING:
            self._legs_at = now + self._settings.retry_legs_s
            self._try_telemetry(now)

    def tend(self, now: float) -> None:
        """Try again what a try still lacks, and go back when a limit has passed."""
        record = self.record
        if record.phase is DevicePhase.TRYING:
            self._tend_try(now)
        elif record.phase is DevicePhase.MOVED and (since := self._new.down_since) is not None:
            assert record.orders is not None
            if now - since >= _limit(record.orders.new_lost_limit_s):
                why = f": {self._new.why_down}" if self._new.why_down else ""
                self.back(Cause.NEW_LOST, f"new side lost for {now - since:.0f} s{why}", now)

    def _tend_try(self, now: float) -> None:
        record = self.record
        assert record.orders is not None
        within = _limit(record.orders.try_within_s)
        started = record.try_started_at
        if started is None or started > now:
            # The clock was set back while the device was off: the try is not made longer by that.
            started = now
            self.record = msgspec.structs.replace(record, try_started_at=now)
        if now - started >= within:
            self.back(Cause.TRY_FAILED, self._why_the_try_failed(within), now)
        elif now >= self._legs_at:
            self._legs_at = now + self._settings.retry_legs_s
            if self._new.ready:
                if Leg.SHADOW not in self._legs:
                    self._actions.out.append(ShadowGet())
                if Leg.TELEMETRY not in self._legs:
                    self._try_telemetry(now)

    def _try_telemetry(self, now: float) -> None:
        body = msgspec.json.encode({"epoch": self.record.epoch})
        self._actions.out.append(SendTryTelemetry(TRY_CHANNEL, round(now * 1000), body))

    def _why_the_try_failed(self, within: float) -> str:
        if self._new.state is not LinkState.UP:
            return f"try failed: no connection within {within:g} s: {self._new.why_down or 'no answer'}"
        missing = ", ".join(leg.value for leg in Leg if leg not in self._legs)
        return f"try failed: no round trip of {missing} within {within:g} s"

    # --- which links the phase asks for ---

    @property
    def _knows_new(self) -> bool:
        return _place(self.record.orders) is not None or self.record.served_at is not None

    def wants(self, now: float) -> tuple[bool, bool]:
        """Whether the old and the new link are wanted now."""
        record = self.record
        known = self._knows_new
        if record.phase is DevicePhase.MOVED:
            if _closes_old(record.flags):
                # The old link closes once the new one serves; until then, and while the new one is lost
                # for less than the limit, it stays as it is.
                return self._old.wanted and self._new.down_since is not None, True
            return True, True
        if record.phase is DevicePhase.TRYING:
            return True, known
        since = self._old.down_since
        stranded = since is not None and now - since >= self._settings.stranded_after_s
        return True, known and stranded

    def place(self, attempt: int) -> Place:
        """Where to look for the new side. Without an old side, and with a newest order that may name a wrong
        place, every other attempt goes to where the device was served before."""
        named, known = _place(self.record.orders), self.record.served_at
        stranded = self.record.phase in (DevicePhase.OLD, DevicePhase.WENT_BACK)
        place = known if named is None or (stranded and known is not None and attempt % 2) else named
        assert place is not None
        return place

    # --- time ---

    def deadline(self, now: float) -> float:
        """When `tend` or `wants` may have something new to say, if nothing happens before."""
        record = self.record
        if record.phase is DevicePhase.TRYING and record.orders is not None:
            started = record.try_started_at if record.try_started_at is not None else now
            return min(started + _limit(record.orders.try_within_s), self._legs_at)
        if record.phase is DevicePhase.MOVED and self._new.down_since is not None:
            assert record.orders is not None
            return self._new.down_since + _limit(record.orders.new_lost_limit_s)
        if self._old.down_since is not None and self._knows_new and not self._new.wanted:
            return self._old.down_since + self._settings.stranded_after_s
        return math.inf

    def jumped(self, by_s: float) -> None:
        self._legs_at += by_s
        if self.record.try_started_at is not None:
            started_at = self.record.try_started_at + by_s
            self.record = msgspec.structs.replace(self.record, try_started_at=started_at)
            if self.record.phase is DevicePhase.TRYING:
                self._actions.persist(RecordChanged(self.record), wait=False)


def _closes_old(flags: Flags) -> bool:
    """A closed old link together with work for the old side would strand that work: then it stays open."""
    return (
        flags.link is LinkFlag.NEW
        and flags.telemetry is TelemetryFlag.NEW
        and flags.commands is CommandsFlag.NEW
    )


def _place(orders: Orders | None) -> Place | None:
    if orders is None or orders.new is None:
        return None
    return Place(orders.new, orders.credential or "")


def _limit(seconds: float) -> float:
    """An order's limit, kept within what lets a device come back: a second to an hour."""
    return min(max(seconds, 1.0), 3600.0)
