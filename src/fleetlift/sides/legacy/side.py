"""The legacy backend as a side of a migration: the owner's calls, behind the interface of `sides/base.py`."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from fleetlift.core import legacy as wire
from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, NotFound, Unavailable
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.log import get_logger
from fleetlift.sides.base import (
    CommandAnswered,
    FeedItem,
    PresenceChanged,
    ReportReceived,
    SideCommand,
    TelemetryReceived,
)

log = get_logger(__name__)

CONNECT_WITHIN_S = 5.0
ANSWER_WITHIN_S = 15.0
FEED_SILENT_FOR_S = 10.0  # then the connection is made anew
IN_FLIGHT_MAX = 256  # requests sent and not yet answered
READ_BYTES = 256 * 1024

_ERRORS: dict[wire.ErrorCode, type[FleetError]] = {
    wire.ErrorCode.UNKNOWN_DEVICE: NotFound,
    wire.ErrorCode.OLDER_EPOCH: Conflict,
    wire.ErrorCode.BAD_REQUEST: BadInput,
    wire.ErrorCode.UNAVAILABLE: Unavailable,
    wire.ErrorCode.POSITION_GONE: Conflict,
}

M = TypeVar("M")


class LegacySide:
    """Implements `sides.base.Side` with the owner's calls of a legacy server at `url` ("tcp://host:port").

    Connects at the first call, and again at the next one after a loss; the call during which the server is
    lost raises Unavailable. Forbidden: the owner's key is wrong. The feed has a connection of its own.
    """

    feed_speaks_every_s = 1.0  # IDLE_FEED_S of the server

    def __init__(self, url: str, key: str, *, name: str = "legacy") -> None:
        self.name = name
        self._host, self._port = host_and_port(url)
        self._key = key
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._in_flight = asyncio.Semaphore(IN_FLIGHT_MAX)

    async def inventory(self) -> Sequence[FleetDevice]:
        """Every device the server knows, in the order of their ids."""
        devices: list[FleetDevice] = []
        after = ""
        while True:
            page = await self._call(partial(wire.ListDevices, after=after), wire.DeviceList)
            for entry in page.items:
                devices.append(
                    FleetDevice(
                        id=entry.id,
                        attributes=_object(entry.attributes),
                        connected=entry.connected,
                        since=entry.since_ms / 1000 if entry.since_ms >= 0 else None,
                    )
                )
            if not page.more or not page.items:
                return devices
            after = page.items[-1].id

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        """Each device's orders become its configuration document; refusals by device, with the reason."""
        refused: dict[str, str] = {}

        async def deliver_one(device: str, order: Orders) -> None:
            document = msgspec.json.encode(order)
            try:
                await self._call(lambda request: wire.SetConfig(request, device, document), wire.Ok)
            except (NotFound, Conflict, BadInput) as exc:
                refused[device] = str(exc)

        await _all(deliver_one(device, order) for device, order in orders.items())
        return refused

    async def reports(self) -> Mapping[str, DeviceReport]:
        """The last report of each device. One that cannot be read is left out, with a line in the log."""
        reports: dict[str, DeviceReport] = {}
        after = ""
        while True:
            page = await self._call(partial(wire.ListReports, after=after), wire.ReportList)
            for entry in page.items:
                if (report := _report(entry.device, entry.document)) is not None:
                    reports[entry.device] = report
            if not page.more or not page.items:
                return reports
            after = page.items[-1].device

    async def send_command(self, command: SideCommand) -> None:
        """Returns once the command is in the server's outbox. Raises NotFound for an unknown device."""
        await self._call(
            lambda request: wire.SendCommand(
                request,
                command.device,
                command.id,
                command.name,
                wire.Mode(command.mode),
                round(command.expires_at * 1000),
                msgspec.json.encode(command.params),
            ),
            wire.Ok,
        )

    async def register(self, device: str, key: str, attributes: Mapping[str, Any]) -> None:
        """Create a device, or replace its attributes and, unless it is empty, its key."""
        document = msgspec.json.encode(attributes)
        await self._call(lambda request: wire.RegisterDevice(request, device, key, document), wire.Ok)

    async def set_config(self, device: str, document: Mapping[str, Any]) -> None:
        """Replace a device's configuration. Raises Conflict when its `epoch` is older than the held one."""
        text = msgspec.json.encode(document)
        await self._call(lambda request: wire.SetConfig(request, device, text), wire.Ok)

    async def feed(self, after: str) -> AsyncGenerator[tuple[str, Sequence[FeedItem]], None]:
        """Batches of what the server received after position `after` ("": from the beginning), for good.

        With "now" the first batch is empty: its position is where the feed stands. Later ones are empty
        as signs of life: the server had nothing newer than that position.

        The next batch is taken from the connection when the caller comes for it, so a slow caller slows the
        server's sending and nothing piles up. Raises Unavailable when the server is lost, Conflict when it
        no longer holds what follows `after`.
        """
        try:
            position = wire.FEED_FROM_NOW if after == "now" else int(after or "0")
        except ValueError as exc:
            raise BadInput(f"feed position {after!r}: the legacy server's are whole numbers") from exc
        connection = await self._open()
        try:
            connection.write(wire.FeedFrom(1, position))
            while True:
                for message in await connection.read(FEED_SILENT_FOR_S):
                    match message:
                        case wire.FeedBatch():
                            yield str(message.position), _items(message.items)
                        case wire.Error():
                            raise _error(message)
                        case wire.Bye():
                            raise self._unavailable(message.reason or "it said good-bye")
                        case _:
                            pass
        finally:
            await connection.close()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None

    async def _call(self, ask: Callable[[int], wire.Message], answer: type[M]) -> M:
        """Send what `ask` makes of a fresh request id; the answer, which must be an `answer`."""
        async with self._in_flight:
            async with self._connecting:
                if self._connection is None or not self._connection.alive:
                    await self.close()
                    self._connection = await self._open()
                    self._connection.start_answering()
                connection = self._connection
            reply = await connection.call(ask)
        if isinstance(reply, wire.Error):
            raise _error(reply)
        if not isinstance(reply, answer):
            raise self._unavailable(f"it answered {type(reply).__name__} where {answer.__name__} was due")
        return reply

    async def _open(self) -> "_Connection":
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=READ_BYTES)
        except (OSError, TimeoutError) as exc:
            raise self._unavailable(_reason(exc)) from exc
        connection = _Connection(reader, writer, self._unavailable)
        try:
            connection.write(wire.OwnerLogin(self._key))
            match (await connection.read(CONNECT_WITHIN_S))[:1]:
                case [wire.OwnerOk()]:
                    return connection
                case [wire.LoginRefused(reason=reason)]:
                    raise Forbidden(
                        f"the legacy server at {self._host}:{self._port} refused the owner: {reason}; set"
                        " FLEETLIFT_LEGACY_KEY or key_file to the content of its owner.key"
                    )
                case _:
                    raise self._unavailable("it does not answer the owner's login")
        except BaseException:
            await connection.close()
            raise

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(
            f"the legacy server at {self._host}:{self._port} does not answer ({why}):"
            " see that it runs, and try again"
        )


class _Connection:
    """An owner's connection. After `start_answering`, calls may overlap; else `read` takes what comes."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        unavailable: Callable[[str], Unavailable],
    ) -> None:
        self.alive = True
        self._reader, self._writer = reader, writer
        self._unavailable = unavailable
        self._decoder = wire.Decoder()
        self._last_request = 0
        self._waiting: dict[int, asyncio.Future[wire.Message]] = {}
        self._answering: asyncio.Task[None] | None = None

    def write(self, message: wire.Message) -> None:
        self._writer.write(wire.encode(message))

    async def read(self, within_s: float | None) -> list[wire.Message]:
        """The next messages, at least one. Raises Unavailable when none comes in time, or never will."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    data = await self._reader.read(READ_BYTES)
                    if not data:
                        raise self._unavailable("it closed the connection")
                    if messages := self._decoder.feed(data):
                        return messages
        except TimeoutError as exc:
            raise self._unavailable("no answer in time") from exc
        except OSError as exc:
            raise self._unavailable(str(exc)) from exc
        except wire.BadFrame as exc:
            raise self._unavailable(f"it does not speak this protocol: {exc}") from exc

    def start_answering(self) -> None:
        self._answering = asyncio.create_task(self._answer(), name="legacy-side-answers")

    async def call(self, ask: Callable[[int], wire.Message]) -> wire.Message:
        self._last_request = self._last_request % 0xFFFFFFFF + 1
        request = self._last_request
        future: asyncio.Future[wire.Message] = asyncio.get_running_loop().create_future()
        frame = wire.encode(ask(request))
        self._waiting[request] = future
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                if not self.alive:
                    raise self._unavailable("the connection was lost")
                self._writer.write(frame)
                await self._writer.drain()
                return await future
        except TimeoutError as exc:
            self.alive = False  # whatever it answers later is not waited for: start with a fresh connection
            raise self._unavailable("no answer in time") from exc
        except OSError as exc:
            self.alive = False
            raise self._unavailable(str(exc)) from exc
        finally:
            self._waiting.pop(request, None)
            future.cancel()

    async def _answer(self) -> None:
        why = "the connection was closed"
        try:
            while True:
                for message in await self.read(None):
                    future = self._waiting.get(getattr(message, "request", 0))
                    if future is not None and not future.done():
                        future.set_result(message)
        except Unavailable as exc:
            why = str(exc)
        finally:
            self.alive = False
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unavailable(why))

    async def close(self) -> None:
        self.alive = False
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()


def host_and_port(url: str) -> tuple[str, int]:
    """Of "tcp://host:port". Raises BadInput."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port is not None and not parts.path.strip("/"):
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise BadInput(f"{url!r} is no address of a legacy server: write it as tcp://host:port")


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all at once; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except* FleetError as several:
        raise _first(several) from None


def _first(several: BaseExceptionGroup[FleetError]) -> FleetError:
    leaf: BaseException = several
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, FleetError)
    return leaf


def _error(message: wire.Error) -> FleetError:
    return _ERRORS[message.code](message.reason)


def _items(items: Sequence[wire.Item]) -> list[FeedItem]:
    return [item for raw in items if (item := _feed_item(raw)) is not None]


def _feed_item(raw: wire.Item) -> FeedItem | None:
    at = raw.at_ms / 1000
    match raw:
        case wire.TelemetryItem():
            return TelemetryReceived(
                device=raw.device,
                channel=raw.channel,
                ts=raw.ts_ms / 1000,
                seq=raw.seq,
                body=raw.body,
                received_at=at,
            )
        case wire.AnswerItem():
            return CommandAnswered(
                device=raw.device,
                command=raw.command,
                status=raw.status.value,
                detail=_object(raw.detail),
                at=at,
            )
        case wire.PresenceItem():
            return PresenceChanged(device=raw.device, connected=raw.connected, at=at, reason=raw.reason)
        case _:
            report = _report(raw.device, raw.document)
            return ReportReceived(device=raw.device, report=report, at=at) if report is not None else None


def _report(device: str, document: bytes) -> DeviceReport | None:
    try:
        return msgspec.json.decode(document, type=DeviceReport)
    except (ValueError, RecursionError) as exc:
        log.warning("device_report_refused", device=device, reason=str(exc))
        return None


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object; the server has checked that, but the feed must go on whatever comes."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"unreadable": text.decode(errors="replace")}


def _reason(exc: OSError) -> str:
    """Why a connection was not made, in words alone: asyncio's text has a number and the address."""
    if exc.errno is not None and exc.errno > 0:
        return os.strerror(exc.errno).lower()
    return str(exc) or "no answer"
