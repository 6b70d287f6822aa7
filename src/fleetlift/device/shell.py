"""The shell around one agent: real sockets, the clock, the disk and the vehicle itself.

It feeds the agent and does what the agent says; many shells share one loop, one journal and one process.
"""

import asyncio
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine
from functools import cache
from typing import Any, Protocol

import msgspec

from fleetlift.core.orders import Endpoint
from fleetlift.core.ranges import RangeSet
from fleetlift.device import messages as m
from fleetlift.device.agent import Agent, AgentSettings
from fleetlift.device.journal import Journal
from fleetlift.device.links import LegacyLink, Link, MqttLink
from fleetlift.log import get_logger

log = get_logger(__name__)


class Application(Protocol):
    """The device's own program, as far as commands reach it."""

    def judge(self, name: str, params: bytes) -> str | None:
        """Why the command would be refused, or None. Pure."""
        ...

    async def execute(self, id_: str, name: str, params: bytes) -> tuple[bool, bytes]:
        """Do it. Whether it succeeded, and a JSON object: the result or {"code", "reason"}."""
        ...


class Misbehaviour(msgspec.Struct, frozen=True, kw_only=True):
    """Firmware faults of the new side's code, for rehearsals."""

    drop_share: float = 0.0  # of telemetry by the new path: taken for sent, and never sent
    late_in_dry_run_s: float = 0.0  # how much later a dry run's answer goes by the new path


class DeviceShell:
    """One device. `start` reads its state and begins to connect; `produce` takes a measurement."""

    def __init__(
        self,
        device: str,
        key: str,
        *,
        old: tuple[str, int],
        journal: Journal,
        application: Application,
        settings: AgentSettings | None = None,
        firmware: str = "",
        misbehaviour: Misbehaviour | None = None,
        seed: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`now` is the device's own clock, which may be wrong."""
        self.device, self.key, self.firmware = device, key, firmware
        self.misbehaviour = misbehaviour
        self.application = application
        self._old_address = old
        self._journal = journal
        self._random = random.Random(seed)
        self._now = now
        self.agent = Agent(
            judge=application.judge, chance=self._random.random, settings=settings or AgentSettings()
        )
        self._links: dict[m.Path, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._token = self._stored = 0
        self._after: deque[tuple[int, Callable[[], None]]] = deque()
        self._stopped = False
        # What the device itself holds true, for the verdict of a whole migration.
        self.acked: dict[str, RangeSet] = {}  # by channel: acknowledged by any path, in this process's life
        self.executed: dict[str, int] = {}  # by command id: how often
        self.longest_gap_s = 0.0
        self.longest_gap_at: float | None = None
        self._waiting_since: float | None = None

    # --- life ---

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        saved = self._journal.load(self.device)
        if saved.outbox:
            self._waiting_since = time.time()
        self.feed(m.Started(saved))

    async def stop(self, *, abruptly: bool = False) -> None:
        """Close the links (abruptly: as a killed process would) and feed the agent nothing more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for link in list(self._links.values()):
            if abruptly:
                link.abandon()
            else:
                link.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def produce(self, channel: str, body: bytes) -> None:
        """Telemetry of the application: the bytes of a JSON object."""
        if self._waiting_since is None:
            self._waiting_since = time.time()
        self.feed(m.TelemetryProduced(channel, body))

    # --- gaps of service ---

    def gap_s(self, now: float) -> float:
        """For how long now telemetry has been waiting without any side acknowledging any of it."""
        return 0.0 if self._waiting_since is None else max(0.0, now - self._waiting_since)

    def _acknowledged(self, event: m.TelemetryAcked) -> None:
        now = time.time()
        if (gap := self.gap_s(now)) > self.longest_gap_s:
            self.longest_gap_s, self.longest_gap_at = gap, now
        for channel, seq in event.keys:
            if (held := self.acked.get(channel)) is None:
                held = self.acked[channel] = RangeSet()
            held.add(seq)
        self._waiting_since = now

    # --- the agent and its actions ---

    def event(self, link: Link, event: m.Event) -> None:
        if self._links.get(link.path) is link:
            if isinstance(event, (m.Lost, m.Refused)):
                del self._links[link.path]
            self.feed(event)

    def after_stored(self, call: Callable[[], None]) -> None:
        if self._token <= self._stored:
            call()
        else:
            self._after.append((self._token, call))

    def feed(self, event: m.Event) -> None:
        if self._stopped:
            return
        if isinstance(event, m.TelemetryAcked):
            self._acknowledged(event)
        for action in self.agent.on(event, self._now()):
            self._act(action)
        if not self.agent.outbox_depth:
            self._waiting_since = None

    def _act(self, action: m.Action) -> None:
        match action:
            case m.SendTelemetry():
                self._send(action)
            case m.Persist(token, changes, wait):
                if wait:
                    self._token = token
                    needs_room = any(isinstance(change, m.EntryAdded) for change in changes)
                    self._journal.write(
                        self.device,
                        changes,
                        lambda: self._on_stored(token),
                        None if needs_room else lambda: self.feed(m.Stored(token, alone=True)),
                    )
                else:
                    self._journal.write(self.device, changes)
            case m.SetTimer(at):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(max(0.0, at - self._now()), self._tick)
            case m.AnswerCommand():
                self._answer(action)
            case m.Execute(id_, name, params):
                self._spawn(self._execute(id_, name, params), f"execute {id_}")
            case m.Report(path, report):
                if path is m.Path.OLD and (old := self._old_link()) is not None:
                    old.report(report)
                    # The old side acknowledges no reports; it would repeat its orders.
                elif path is m.Path.NEW and (new := self._new_link()) is not None:
                    new.report(report)
            case m.ConnectOld():
                self._connect(LegacyLink(self), *self._old_address, None)
            case m.ConnectNew(endpoint, credential):
                self._connect(MqttLink(self, credential), endpoint.host, endpoint.port, endpoint)
            case m.Close(path):
                if (link := self._links.pop(path, None)) is not None:
                    link.close()
            case m.SubscribeNew():
                if (new := self._new_link()) is not None:
                    new.subscribe()
            case m.SendTryTelemetry():
                if (new := self._new_link()) is not None:
                    new.try_telemetry(action)
            case m.ShadowGet():
                if (new := self._new_link()) is not None:
                    new.shadow_get()

    def _tick(self) -> None:
        self._timer = None
        self.feed(m.Timer())

    def _on_stored(self, token: int) -> None:
        self._stored = token
        self.feed(m.Stored(token))
        while self._after and self._after[0][0] <= token:
            self._after.popleft()[1]()

    def _old_link(self) -> LegacyLink | None:
        link = self._links.get(m.Path.OLD)
        return link if isinstance(link, LegacyLink) else None

    def _new_link(self) -> MqttLink | None:
        link = self._links.get(m.Path.NEW)
        return link if isinstance(link, MqttLink) else None

    def _send(self, sent: m.SendTelemetry) -> None:
        if sent.path is m.Path.OLD:
            if (old := self._old_link()) is not None:
                old.telemetry(sent)
            return
        new = self._new_link()
        fault = self.misbehaviour
        if new is not None and fault is not None and self._random.random() < fault.drop_share:
            self._loop.call_soon(self.event, new, m.TelemetryAcked(m.Path.NEW, ((sent.channel, sent.seq),)))
        elif new is not None:
            new.telemetry(sent)

    def _answer(self, answer: m.AnswerCommand) -> None:
        if answer.path is m.Path.OLD:
            if (old := self._old_link()) is not None:
                old.answer(answer)
            return
        new = self._new_link()
        if new is None:
            return
        fault = self.misbehaviour
        dry_run = answer.status in (m.AnswerStatus.WOULD_EXECUTE, m.AnswerStatus.WOULD_REFUSE)
        if fault is not None and fault.late_in_dry_run_s and dry_run:
            self._loop.call_later(fault.late_in_dry_run_s, lambda: None if new.ended else new.answer(answer))
        else:
            new.answer(answer)

    async def _execute(self, id_: str, name: str, params: bytes) -> None:
        self.executed[id_] = self.executed.get(id_, 0) + 1
        try:
            ok, detail = await self.application.execute(id_, name, params)
        except Exception as exc:  # the vehicle's own fault must not take the agent with it
            log.exception("command_crashed", device=self.device, command=id_, name=name)
            ok, detail = (
                False,
                msgspec.json.encode({"code": "CRASHED", "reason": f"{type(exc).__name__}: {exc}"}),
            )
        self.feed(m.CommandFinished(id_, ok, detail))

    # --- connecting ---

    def _connect(self, link: Link, host: str, port: int, endpoint: Endpoint | None) -> None:
        self._links[link.path] = link
        link.opening = self._spawn(self._open(link, host, port, endpoint), f"connect {link.path}")

    async def _open(self, link: Link, host: str, port: int, endpoint: Endpoint | None) -> None:
        try:
            tls = _tls(endpoint.ca_pem) if endpoint is not None and endpoint.tls else None
            await self._loop.create_connection(lambda: link, host, port, ssl=tls)
        except (OSError, ssl.SSLError, ValueError) as exc:
            link.fail(m.Refused(link.path, str(exc) or type(exc).__name__))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(work, name=f"{self.device}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@cache
def _tls(ca_pem: str | None) -> ssl.SSLContext:
    """What the new side's certificate is checked by: the CA of the orders, else the system's."""
    return ssl.create_default_context(cadata=ca_pem)
