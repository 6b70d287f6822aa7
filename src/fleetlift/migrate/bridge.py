"""The bridge to an old side: its feed into the log, commands to its devices, and what it knows of them.

There is one bridge for each old side that a migration not yet released names. Telemetry that the old side has
received enters the same log as that of our own devices, marked with its path. The feed's position is stored
only once all it covers is durably in the log, so a bridge that is killed reads some of it again, which the
telemetry reader recognises, and loses nothing.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from fleetlift.cancelling import end
from fleetlift.core.command import Path, PathStatus, reported
from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DeviceReport
from fleetlift.core.telemetry import DeadLetter, dead_letter
from fleetlift.levers.flag import newest
from fleetlift.log import get_logger
from fleetlift.migrate.noise import NoiseReader
from fleetlift.migrate.ports import GONE, FeedStore
from fleetlift.migrate.reconnects import OldConnects
from fleetlift.sides.base import (
    CommandAnswered,
    FeedItem,
    PresenceChanged,
    ReportReceived,
    Side,
    SideCommand,
    TelemetryReceived,
    log_entry,
)
from fleetlift.store.commands import Answer

log = get_logger(__name__)

SNAPSHOT_EVERY_S = 5.0  # the whole inventory and all reports are read again so often, the feed apart
SNAPSHOT_SHARE = 0.05  # ... but reading them takes at most this share of the time
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
BATCHES_IN_FLIGHT = 8
FEED_SETTLES_S = 1.0  # a feed that has nothing to tell for so long after its start has nothing to catch up
SILENT_BEATS = 3  # a feed that has missed so many of its signs of life may have more to tell than it can
COURIER_POLL_S = 0.05
COURIER_BATCH = 500
COURIER_PARALLEL = 50
SEND_WITHIN_S = 10.0
UUID_ZERO = "00000000-0000-0000-0000-000000000000"
DOWN_ERRORS = (FleetError, *GONE)


ToLog = Callable[[str, bytes, Mapping[str, str]], Awaitable[int]]

# Position, messages on their way into the log, answers, and when the old side got the last message.
_Batch = tuple[str, asyncio.Future[list[DeadLetter]] | None, list[CommandAnswered], float | None]


class FeedCounts(msgspec.Struct):
    """What the bridge has done since it started."""

    telemetry: int = 0
    answers: int = 0
    reports: int = 0
    presence: int = 0
    refused: int = 0  # items that can never enter the log, such as an impossible topic
    commands: int = 0


class Bridge:
    """Keeps one old side and the new backend in step.

    `key` names the feed's position (side and address); `begin_at` is where a feed never read before begins.
    `to_log(topic, payload, headers)` returns once the message is durable.
    `noise` reads a part of the feed twice, for parity. `up`, `fleet` and `reports` are what the old side is
    known to hold now; `fleet` is None until it was read.
    """

    def __init__(
        self,
        old: Side,
        *,
        key: str,
        store: FeedStore,
        to_log: ToLog,
        begin_at: str = "",
        noise: NoiseReader | None = None,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.side = old
        self.key = key
        self.counts = FeedCounts()
        self.migrations: dict[str, str] = {}  # those that this side is the old one of, with their tenants
        self.connects = OldConnects(now())
        self.snapshots = 0  # grows whenever the inventory was read anew
        self.why_down = "not connected yet"
        self._store = store
        self._to_log = to_log
        self._noise = noise
        self._now = now
        self._monotonic = monotonic
        self._begin_at = begin_at
        self._up = False
        self._fleet: dict[str, FleetDevice] | None = None
        self._reports: dict[str, DeviceReport] = {}
        self._feed_since: float | None = None  # monotonic; None: the feed is not being followed
        self._feed_lag_s: float | None = None  # how old the newest item was when it was safe in the log
        self._feed_asked: float | None = None  # monotonic; since when the feed has been waited for
        self._settled = ""  # up to where the feed is safe in the log
        self._touched: set[str] = set()  # devices that the feed has spoken of since the snapshot began

    @property
    def up(self) -> bool:
        return self._up

    @property
    def fleet(self) -> Mapping[str, FleetDevice] | None:
        return self._fleet

    @property
    def reports(self) -> Mapping[str, DeviceReport]:
        return self._reports

    def feed_behind(self, within_s: float) -> str:
        """Why what the old side got until `within_s` ago may not be in the log yet; "" when it is."""
        if self._feed_since is None or (
            self._feed_lag_s is None and self._monotonic() - self._feed_since < FEED_SETTLES_S
        ):
            return "the old side's feed is not being followed"
        if self._feed_lag_s is not None and self._feed_lag_s > within_s:
            return f"the old side's feed is {self._feed_lag_s:.0f} s behind by the old side's clock"
        # A connection that the network has forgotten looks like a fleet that has nothing to say.
        every_s = getattr(self.side, "feed_speaks_every_s", None)
        if every_s is not None and self._feed_asked is not None:
            silent_s = self._monotonic() - self._feed_asked
            if silent_s > max(within_s, SILENT_BEATS * every_s):
                return f"the old side's feed has given no sign of life for {silent_s:.0f} s"
        return ""

    async def run(self) -> None:
        """Run until cancelled. Each part comes back by itself when the side or the backend was away."""
        parts = {"feed": self._feed_once, "inventory": self._snapshots, "courier": self._courier}
        if self._noise is not None:
            parts["noise"] = self._noise.run
        tasks = [
            asyncio.create_task(self._again(part, name), name=f"{name} {self.key}")
            for name, part in parts.items()
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            await end(tasks)

    async def _again(self, part: Any, what: str) -> None:
        failures = 0
        while True:
            started = self._monotonic()
            try:
                await part()
                reason = "the side closed the connection"
            except* DOWN_ERRORS as errors:
                reason = _first(errors)
            except* Exception as errors:
                # A side may be anybody's code: its faults stop its own bridge for a while, and nothing else.
                reason = _first(errors)
                log.error("bridge_part_failed", side=self.key, part=what, reason=reason, exc_info=True)
            if what == "inventory":
                self._up, self.why_down = False, reason
            elif what == "feed":
                self._feed_since = None
            if self._monotonic() - started > 10:
                failures = 0
            if failures == 0:
                log.warning("bridge_part_lost", side=self.key, part=what, reason=reason)
            await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
            failures += 1

    # -- what the side holds -----------------------------------------------------------------------------

    async def _snapshots(self) -> None:
        while True:
            started = self._monotonic()
            await self.refresh()
            took = self._monotonic() - started
            await asyncio.sleep(max(SNAPSHOT_EVERY_S, took / SNAPSHOT_SHARE))

    async def refresh(self) -> None:
        """Read inventory and reports anew. Raises Unavailable when the side does not answer."""
        self._touched.clear()
        async with asyncio.timeout(60):
            inventory = await self.side.inventory()
            reports = await self.side.reports()
        before = self._fleet or {}
        fleet = {device.id: device for device in inventory}
        fresh = dict(reports)
        for device in self._touched:
            # The feed was quicker than the answer that was being put together.
            if device in before and device in fleet:
                known = before[device]
                fleet[device] = msgspec.structs.replace(
                    fleet[device], connected=known.connected, since=known.since
                )
            if (report := newest(fresh.get(device), self._reports.get(device))) is not None:
                fresh[device] = report
        self._fleet, self._reports = fleet, fresh
        if not self._up:
            log.info("old_side_reached", side=self.key, devices=len(fleet))
        self.snapshots += 1
        self._up, self.why_down = True, ""

    def _note_presence(self, item: PresenceChanged) -> None:
        self.counts.presence += 1
        if item.connected:
            self.connects.add(item.device, item.at)
        known = (self._fleet or {}).get(item.device)
        if self._fleet is not None and (known is None or known.since is None or item.at >= known.since):
            known = known or FleetDevice(id=item.device)
            self._fleet[item.device] = msgspec.structs.replace(known, connected=item.connected, since=item.at)
            self._touched.add(item.device)

    def _note_report(self, item: ReportReceived) -> None:
        self.counts.reports += 1
        best = newest(self._reports.get(item.device), item.report)
        assert best is not None
        self._reports[item.device] = best
        self._touched.add(item.device)

    # -- its feed ----------------------------------------------------------------------------------------

    async def position(self) -> str:
        """Up to where the feed is durably in the log; where it is to begin when none of it is."""
        return await self._store.position(self.key) or self._begin_at

    async def _feed_once(self) -> None:
        """Follow the feed until it ends or something fails."""
        pending: asyncio.Queue[_Batch] = asyncio.Queue(BATCHES_IN_FLIGHT)
        async with asyncio.TaskGroup() as group:
            settling = group.create_task(self._settle(pending))
            try:
                after = await self.position()
                self._feed_since, self._feed_lag_s = self._monotonic(), None
                if self._noise is not None:
                    self._noise.begin()
                self._feed_asked, self._settled = self._monotonic(), after
                async for position, items in self.side.feed(after):
                    if not items and position == after:
                        # A sign of life: there is nothing newer, so what is safe in the log is all there is.
                        self._feed_asked = self._monotonic()
                        if self._settled == after:
                            self._feed_lag_s = 0.0
                        continue
                    self._feed_asked, after = None, position
                    stored: asyncio.Future[list[DeadLetter]] | None = None
                    answers: list[CommandAnswered] = []
                    messages: list[TelemetryReceived] = []
                    for item in items:
                        self._take(item, messages, answers)
                    if messages:
                        # Tasks of the group: whatever fails ends this round before a position is stored.
                        stored = group.create_task(self._enter(messages))
                    if self._noise is not None:
                        self._noise.passed(position, len(messages))
                    await pending.put(
                        (position, stored, answers, messages[-1].received_at if messages else None)
                    )
                    self._feed_asked = self._monotonic()
                await pending.join()
            finally:
                await end([settling])

    def _take(
        self, item: FeedItem, messages: list[TelemetryReceived], answers: list[CommandAnswered]
    ) -> None:
        match item:
            case TelemetryReceived():
                messages.append(item)
            case CommandAnswered():
                answers.append(item)
            case PresenceChanged():
                self._note_presence(item)
            case ReportReceived():
                self._note_report(item)

    async def _enter(self, messages: Sequence[TelemetryReceived]) -> list[DeadLetter]:
        """Put messages into the log; returns when all are durable. What can never enter is a dead letter.

        So is what names a device of a tenant that this side moves nothing for: stored under the device's id,
        that tenant would read it as its own. Such a letter names no device: who owns one sees its letters.
        """
        # Of this moment: should the last migration be released while we wait, nothing here becomes foreign.
        served = {None, *self.migrations.values()}
        if not self.migrations:
            raise Unavailable("no migration from this side is left")
        owners = await self._store.owners(list({m.device for m in messages}))
        claimed = {  # by the old side's own inventory, as far as it says so
            m.device: known.attributes.get("tenant")
            for m in messages
            if (known := (self._fleet or {}).get(m.device)) is not None
        }
        foreign = {device for device, tenant in (claimed | owners).items() if tenant not in served}
        ours = [m for m in messages if m.device not in foreign]
        results = await asyncio.gather(*(self._enter_one(m) for m in ours), return_exceptions=True)
        letters = [
            dead_letter(
                log_entry(self.side.name, m)[0],
                "",
                self.side.name,
                "device: belongs to a tenant that no migration from this side is for",
                m.body,
                m.received_at,
            )
            for m in messages
            if m.device in foreign
        ]
        for message, result in zip(ours, results, strict=True):
            if isinstance(result, BadInput):
                letters.append(
                    dead_letter(
                        log_entry(self.side.name, message)[0],
                        message.device if message.device in owners else "",
                        self.side.name,
                        str(result),
                        message.body,
                        message.received_at,
                    )
                )
            elif isinstance(result, BaseException):
                raise result
        self.counts.telemetry += len(messages) - len(letters)
        self.counts.refused += len(letters)
        return letters

    async def _enter_one(self, message: TelemetryReceived) -> int:
        topic, headers = log_entry(self.side.name, message)
        return await self._to_log(topic, message.body, headers)

    async def _settle(
        self,
        pending: "asyncio.Queue[_Batch]",
    ) -> None:
        """Store positions, in order, each after all that it covers."""
        while True:
            batch = [await pending.get()]
            while not pending.empty():
                batch.append(pending.get_nowait())
            answers: list[CommandAnswered] = []
            letters: list[DeadLetter] = []
            newest: float | None = None
            for _, stored, some, received_at in batch:
                newest = received_at or newest
                if stored is not None:
                    letters.extend(await stored)
                answers.extend(some)
            known = [answer for one in answers if (answer := self._understood(one)) is not None]
            self.counts.answers += await self._store.settle(self.key, batch[-1][0], known, letters)
            self._settled = batch[-1][0]
            if newest is not None:
                self._feed_lag_s = self._now() - newest
            for _ in batch:
                pending.task_done()

    def _understood(self, answer: CommandAnswered) -> Answer | None:
        try:
            status = PathStatus(answer.status)
        except ValueError:
            log.warning("feed_answer_refused", side=self.key, command=answer.command, status=answer.status)
            return None
        said = reported(status, answer.detail)
        return Answer(
            command=answer.command,
            path=said.path or Path.OLD,
            reported=said,
            at=answer.at,
            device=answer.device,
        )

    # -- commands to its devices -------------------------------------------------------------------------

    async def _courier(self) -> None:
        """Hand commands of path `old` to the side: at first all that may have got lost, then what is new.

        A copy sent twice is refused by its id, so whatever was marked as sent when this process, or the side,
        went away is sent again.
        """
        await self.deliver_commands(again=True)
        while True:
            if not await self.deliver_commands():
                await asyncio.sleep(COURIER_POLL_S)

    async def deliver_commands(self, *, again: bool = False) -> int:
        """Send what is queued now, and `again` what is unanswered; returns how many were sent.

        Raises Unavailable when the side is away; what was not sent then is sent when the courier starts anew.
        """
        done = 0
        after = UUID_ZERO
        while True:
            after, commands = await self._store.take_outgoing(
                list(self.migrations), again=again, after=after, limit=COURIER_BATCH, now=self._now()
            )
            if not after:
                return done
            await self._send(commands)
            done += len(commands)

    async def _send(self, commands: Sequence[SideCommand]) -> None:
        room = asyncio.Semaphore(COURIER_PARALLEL)
        refused: dict[str, str] = {}

        async def send(command: SideCommand) -> None:
            async with room:
                try:
                    async with asyncio.timeout(SEND_WITHIN_S):
                        await self.side.send_command(command)
                except Unavailable:
                    raise
                except FleetError as error:
                    refused[command.id] = str(error)

        async with asyncio.TaskGroup() as group:
            for command in commands:
                group.create_task(send(command))
        self.counts.commands += len(commands) - len(refused)
        for id_, reason in refused.items():
            await self._store.unreachable(id_, reason, self._now())

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await self.side.close()


def _first(errors: BaseExceptionGroup[BaseException]) -> str:
    """The first single error of a group, as text."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
