"""The simulated old side: the legacy server's promises in memory, and the feed that the bridge follows."""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from fleetlift.core.command import Path
from fleetlift.core.errors import Unavailable
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.sides.base import (
    CommandAnswered,
    FeedItem,
    PresenceChanged,
    ReportReceived,
    SideCommand,
    TelemetryReceived,
)
from fleetlift.simulate.clock import Clock
from fleetlift.simulate.history import History
from fleetlift.simulate.network import Wire

COMMIT_S = 0.01
DISPATCH_S = 0.2
FEED_MOST = 500


class _Held(msgspec.Struct):
    """One command of the outbox. `session`: the connection that it was handed to last, 0: none."""

    command: SideCommand
    session: int = 0
    ended: bool = False
    acknowledged: bool = False


class OldSide:
    """Telemetry is acknowledged once stored; a configuration of an older epoch is refused; commands wait."""

    def __init__(self, clock: Clock, history: History, chance: random.Random) -> None:
        self.up = True
        self.hanging = False
        self.inventory: dict[str, dict[str, object]] = {}
        self.since: dict[str, float] = {}
        self.connected: dict[str, Wire] = {}
        self.stored: dict[str, dict[str, RangeSet]] = {}
        self.configs: dict[str, Orders] = {}
        self.reports: dict[str, DeviceReport] = {}
        self.events: list[FeedItem] = []
        self._outbox: dict[str, _Held] = {}
        self._open: dict[str, dict[str, _Held]] = {}
        self._clock = clock
        self._history = history
        self._chance = chance
        self._session = 0
        self._sessions: dict[str, int] = {}
        self._wakes: list[asyncio.Event] = []

    # -- devices -----------------------------------------------------------------------------------------

    def opened(self, wire: Wire, credential: str) -> None:
        device = wire.link.device.id
        if (older := self.connected.get(device)) is not None and older.side_has:
            older.closed_by_side("a newer connection signed in")
        self.connected[device] = wire
        self._session += 1
        self._sessions[device] = self._session
        now = self._clock.now
        self.since[device] = now
        self._event(PresenceChanged(device=device, connected=True, at=now))
        self._history.note("old", "connected", device)
        wire.accepted(now)
        if (orders := self.configs.get(device)) is not None:
            wire.down(m.OrdersReceived(Path.OLD, orders))
        if self._open.get(device):
            self._clock.after(DISPATCH_S * self._chance.random(), self._dispatch, device)

    def closed(self, wire: Wire, reason: str) -> None:
        device = wire.link.device.id
        if self.connected.get(device) is wire:
            del self.connected[device]
            now = self._clock.now
            self.since[device] = now
            self._event(PresenceChanged(device=device, connected=False, at=now, reason=reason))
            self._history.note("old", "gone", device, reason)

    def drop_all(self, reason: str) -> None:
        for wire in list(self.connected.values()):
            wire.cut(reason)

    def telemetry(self, wire: Wire, sent: m.SendTelemetry) -> None:
        device, now = wire.link.device.id, self._clock.now
        channels = self.stored.setdefault(device, {})
        if (stored := channels.get(sent.channel)) is None:
            stored = channels[sent.channel] = RangeSet()
        stored.add(sent.seq)
        self._event(
            TelemetryReceived(
                device=device,
                channel=sent.channel,
                ts=sent.ts_ms / 1000,
                seq=sent.seq,
                body=sent.body,
                received_at=now,
            )
        )
        wire.down(m.TelemetryAcked(Path.OLD, ((sent.channel, sent.seq),)))

    def report(self, wire: Wire, report: DeviceReport) -> None:
        device = wire.link.device.id
        self.reports[device] = report
        self._event(ReportReceived(device=device, report=report, at=self._clock.now))
        self._history.note("old", "report", device, report.epoch, report.phase.value)

    def answered(self, wire: Wire, command: str, status: m.AnswerStatus, detail: bytes) -> None:
        device = wire.link.device.id
        held = self._outbox.get(command)
        if held is not None and not held.ended:
            if status is m.AnswerStatus.ACKNOWLEDGED:
                held.acknowledged = True
            else:
                held.ended = True
                self._open[device].pop(command, None)
            self._answer(device, command, status.value, detail)
        wire.down(m.AnswerAcked(Path.OLD, command, status))

    def _answer(self, device: str, command: str, status: str, detail: bytes = b"{}") -> None:
        self._history.note("old", "answer", device, command, status)
        self._event(
            CommandAnswered(
                device=device,
                command=command,
                status=status,
                detail=msgspec.json.decode(detail),
                at=self._clock.now,
            )
        )

    def _dispatch(self, device: str) -> None:
        """Hand out what waits, at most once to a connection."""
        wire = self.connected.get(device)
        if not self.up:
            return
        now = self._clock.now
        for held in list(self._open.get(device, {}).values()):
            command = held.command
            if now > command.expires_at:
                held.ended = True
                self._open[device].pop(command.id, None)
                self._answer(device, command.id, "expired")
            elif wire is not None and held.session != self._sessions[device] and not self.hanging:
                held.session = self._sessions[device]
                dry_run = command.mode == "dry-run"
                wire.down(
                    m.CommandReceived(Path.OLD, command.id, command.name, b"{}", dry_run, command.expires_at)
                )

    # -- its owner ---------------------------------------------------------------------------------------

    def deliver(self, orders: Mapping[str, Orders]) -> dict[str, str]:
        refused: dict[str, str] = {}
        for device, order in orders.items():
            held = self.configs.get(device)
            if device not in self.inventory:
                refused[device] = "not known"
            elif held is not None and held.epoch > order.epoch:
                refused[device] = f"a configuration of epoch {held.epoch} is held"
            elif held != order:
                self.configs[device] = order
                if (wire := self.connected.get(device)) is not None:
                    wire.down(m.OrdersReceived(Path.OLD, order))
        return refused

    def fleet(self) -> list[FleetDevice]:
        return [
            FleetDevice(
                id=device,
                attributes=dict(attributes),
                connected=device in self.connected,
                since=self.since.get(device),
            )
            for device, attributes in self.inventory.items()
        ]

    def send_command(self, command: SideCommand) -> None:
        if command.id in self._outbox:
            return
        held = self._outbox[command.id] = _Held(command)
        self._open.setdefault(command.device, {})[command.id] = held
        self._clock.after(DISPATCH_S * self._chance.random(), self._dispatch, command.device)
        self._clock.at(command.expires_at + 0.2, self._dispatch, command.device)

    # -- the feed ----------------------------------------------------------------------------------------

    def _event(self, item: FeedItem) -> None:
        self.events.append(item)
        for wake in self._wakes:
            wake.set()

    async def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        """What has happened after position `after`, and then what happens, a little later."""
        at = int(after or 0)
        wake = asyncio.Event()
        self._wakes.append(wake)
        try:
            while True:
                self.check()
                wake.clear()
                items = self.events[at : at + FEED_MOST]
                at += len(items)
                if items:
                    yield str(at), items
                    await asyncio.sleep(0.8)  # what comes meanwhile goes together
                elif at >= len(self.events):
                    await wake.wait()
        finally:
            self._wakes.remove(wake)

    def check(self) -> None:
        if not self.up:
            raise Unavailable("the old side does not answer")

    def lose_feed(self) -> None:
        """The server is gone: whoever waits for its feed is told."""
        for wake in self._wakes:
            wake.set()
