"""The append-only journal: what a migration told each device, on the engine's own disk.

One file a migration, `DIR/journal/NAME.jsonl`, one JSON record a line. Each record is on disk (fsync) before
the devices are told, so that the newest epoch in the journal is never older than one a device holds. With
the file and the old side alone, `fleetlift migrate revert --journal FILE` brings the devices back. It holds
no credential. A line that a crash has cut short is skipped by the reader and closed off by the next writer.
"""

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.identity import DEVICE_ID
from fleetlift.core.orders import Flags


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened", tag_field="kind"):
    """Which migration this is and how the old side is reached. Written at start, and after an amendment."""

    at: float
    migration: str
    old: dict[str, Any]  # the plan's `from`, without secrets
    plan: str = ""


class Order(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    device: str
    epoch: int
    flags: Flags


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="told", tag_field="kind"):
    """Devices about to be told, with the epoch and the flags of their orders."""

    at: float
    orders: tuple[Order, ...]


class Decided(msgspec.Struct, frozen=True, kw_only=True, tag="decided", tag_field="kind"):
    """One line of the audit log, so that the story can be read here too."""

    at: float
    what: str
    text: str
    actor: str = "controller"


class Emergency(msgspec.Struct, frozen=True, kw_only=True, tag="emergency", tag_field="kind"):
    """`revert --journal` was used: `devices` were ordered back with `epoch`."""

    at: float
    epoch: int
    actor: str
    devices: tuple[str, ...]
    everything: bool = True  # all devices of the journal; else single ones
    back: tuple[str, ...] = ()  # those of them that have reported to be back; filled by the last record
    refused: dict[str, str] = {}


Record = Opened | Told | Decided | Emergency

_decode = msgspec.json.Decoder(Record).decode
_encode = msgspec.json.Encoder().encode


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal comes to: the newest order of each device, and the newest epoch of all."""

    migration: str
    old: dict[str, Any]
    orders: dict[str, Order]
    epoch: int
    emergencies: tuple[Emergency, ...] = ()
    torn: int = 0  # lines that could not be read


def journal_path(data_dir: Path, migration: str) -> Path:
    """Where the journal of `migration` lies. BadInput for a name that is no plain file name."""
    if not DEVICE_ID.fullmatch(migration):
        raise BadInput(f"migration name {migration!r}: use 1 to 128 letters, digits, ':', '_' or '-'")
    return data_dir / "journal" / f"{migration}.jsonl"


def read(path: Path) -> Iterable[Record | None]:
    """The records in order; None for a line that cannot be read (a torn write, or a later version's)."""
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield _decode(line)
                except (ValueError, RecursionError):  # also bytes that are no text
                    yield None


def story(path: Path) -> Story:
    """Read a whole journal. BadInput when the file is missing or holds no opening record."""
    if not path.is_file():
        raise BadInput(f"{path}: no such journal; they are kept in DIR/journal/NAME.jsonl")
    if (told := fold(read(path))) is None:
        raise BadInput(f"{path}: no record says which migration this is; is it a journal of Fleetlift?")
    return told


def fold(records: Iterable[Record | None]) -> Story | None:
    """What records come to; None when none of them says which migration this is."""
    migration, old, epoch, torn = "", None, 0, 0
    orders: dict[str, Order] = {}
    emergencies: list[Emergency] = []
    for record in records:
        match record:
            case None:
                torn += 1
            case Opened():
                migration, old = record.migration, record.old
            case Told():
                for order in record.orders:
                    known = orders.get(order.device)
                    if known is None or order.epoch >= known.epoch:
                        orders[order.device] = order
                    epoch = max(epoch, order.epoch)
            case Emergency():
                emergencies.append(record)
                epoch = max(epoch, record.epoch)
            case Decided():
                pass
    if old is None:
        return None
    return Story(
        migration=migration,
        old=old,
        orders=orders,
        epoch=epoch,
        emergencies=tuple(emergencies),
        torn=torn,
    )


def append(path: Path, records: Sequence[Record]) -> None:
    """Add records and return once they are on disk. Closes off a line that a crash has cut short."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + b"".join(_encode(record) + b"\n" for record in records)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    if fresh:
        parent = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


class Journal:
    """The journal of one migration, written by the controller."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self) -> int:
        """In bytes; 0 when there is none yet."""
        return self.path.stat().st_size if self.path.is_file() else 0

    async def add(self, *records: Record) -> None:
        """On disk when this returns."""
        if records:
            await asyncio.to_thread(append, self.path, records)

    async def told(self, at: float, orders: Mapping[str, tuple[int, Flags]]) -> None:
        if orders:
            listed = tuple(Order(device=d, epoch=epoch, flags=flags) for d, (epoch, flags) in orders.items())
            await self.add(Told(at=at, orders=listed))

    async def story(self) -> Story | None:
        """What the journal comes to; None when there is none yet."""
        if not self.path.is_file():
            return None
        return await asyncio.to_thread(story, self.path)
