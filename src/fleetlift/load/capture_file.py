"""Captures on disk: written so that a kill at any moment leaves whole blocks, read with bounded memory.

A directory holds closed segments (`000001.seg`), while recording an open one (`000002.open`), the manifest,
and `progress.jsonl`: where in the log each block ends. A line of it is written before its block, so every
whole block has its place, and a recorder that was killed goes on behind the last one.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

import msgspec
import zstandard

from fleetlift.config import write_private
from fleetlift.core.capture import (
    FORMAT,
    HEADER_BYTES,
    MAGIC,
    RECORDS,
    Account,
    BlockHeader,
    CapturedMessage,
    DamagedCapture,
    Manifest,
    Segment,
    State,
    UnfinishedCapture,
    block,
    check_body,
    check_counts,
    count_devices,
    decode_footer,
    decode_records,
    encode_footer,
    encode_record,
    join_records,
    read_header,
    segment_name,
)
from fleetlift.core.errors import BadInput, Conflict

MANIFEST, PROGRESS, LOCK, RESERVE = "manifest.json", "progress.jsonl", "lock", "reserve"
BLOCK_BYTES = 256 * 1024  # uncompressed, from which a block is written
SEGMENT_BYTES = 64 * 1024 * 1024  # compressed, from which a segment is closed
RESERVE_BYTES = 1024 * 1024  # given back when the disk is full, so that what is there can be closed
MANIFEST_BYTES_MAX = 512 * 1024 * 1024
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class OutOfRoom(Exception):
    """Nothing more can be recorded; what was recorded until here is kept. The text says why."""


class _Checkpoint(msgspec.Struct, frozen=True):
    """That `account` holds once the segment has `size` bytes."""

    segment: int
    size: int
    account: Account


# -- writing -------------------------------------------------------------------------------------------------


class CaptureWriter:
    """Records messages into a directory, as its only writer.

    After `OutOfRoom` nothing is added; `close` then closes what is there.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        account: Account,
        *,
        max_bytes: int | None = None,
        block_bytes: int = BLOCK_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        lock: IO[str] | None = None,
    ) -> None:
        """Begin a new capture, or with the `lock` that `recover` took go on with one."""
        self.directory, self.manifest, self.account = directory, manifest, account
        self.counts: dict[str, tuple[int, int]] = dict(manifest.devices)
        self._max_bytes, self._block_bytes, self._segment_bytes = max_bytes, block_bytes, segment_bytes
        self._compressor = zstandard.ZstdCompressor(level=3)
        self._records: list[bytes] = []
        self._pending: list[CapturedMessage] = []
        self._raw_bytes = 0
        self._file: BinaryIO | None = None
        self._full = ""
        self._saved = account
        self._sha = hashlib.sha256()
        self._number = self._size = self._count = self._commands = 0
        self._first_at, self._last_at = float("inf"), 0.0
        self._begin(lock)

    def _begin(self, lock: IO[str] | None) -> None:
        if lock is None:
            try:
                _make(self.directory)
            except OSError as problem:
                raise BadInput(f"{self.directory} cannot be made: {problem.strerror}") from problem
            lock = _locked(self.directory)
        self._lock = lock
        try:
            self._reserve()
            self._write_manifest()
            self._progress = (self.directory / PROGRESS).open("ab")
            self._segment_reset()
            self.checkpoint()
        except OSError as problem:
            lock.close()
            raise BadInput(f"nothing can be recorded in {self.directory}: {problem.strerror}") from problem

    def _reserve(self) -> None:
        with (self.directory / RESERVE).open("wb") as file:
            file.write(os.urandom(RESERVE_BYTES))  # not zeros: some file systems would store none
            os.fsync(file.fileno())

    @property
    def stored_bytes(self) -> int:
        return self.manifest.stored_bytes + self._size

    @property
    def messages(self) -> int:
        """In blocks on disk."""
        return self.manifest.messages + self._count

    def add(self, message: CapturedMessage) -> None:
        """Record a message; `account` must speak of it already. Raises OutOfRoom, BadInput (too large)."""
        record = encode_record(message)
        self._records.append(record)
        self._pending.append(message)
        self._raw_bytes += len(record)
        if self._raw_bytes >= self._block_bytes:
            self.checkpoint()

    def checkpoint(self, *, sync: bool = False) -> None:
        """Put everything so far, and where the source is, on disk. Raises OutOfRoom."""
        if self._full:
            raise OutOfRoom(self._full)
        account = msgspec.json.decode(msgspec.json.encode(self.account), type=Account)
        data = b""
        if self._records:
            raw = join_records(self._records)
            data = block(RECORDS, self._compressor.compress(raw), len(raw), len(self._records))
            if self._max_bytes is not None and self.stored_bytes + len(data) > self._max_bytes:
                self._stop(f"it has the {self._max_bytes:,} bytes that were allowed")
        size = self._size + len(data) + (0 if self._file or not data else len(MAGIC))
        before = self._progress.seek(0, os.SEEK_END)
        try:
            line = msgspec.json.encode(_Checkpoint(self._number, size, account)) + b"\n"
            self._progress.write(line)
            self._progress.flush()
            if data:
                if self._file is None:
                    self._open_segment()
                assert self._file is not None
                _write(self._file, data)
                if sync:
                    os.fdatasync(self._file.fileno())
            if sync:
                os.fdatasync(self._progress.fileno())
        except OSError as problem:
            if problem.errno not in _NO_ROOM:
                raise
            self._give_back(before)
            self._stop(f"the disk is full ({problem.strerror})")
        self._size = size
        if data:
            self._sha.update(data)
            self._count += len(self._records)
            for message in self._pending:
                count_devices(self.counts, message)
                self._first_at = min(self._first_at, message.at_s)
                self._last_at = max(self._last_at, message.at_s)
                self._commands += is_command(message)
        self._saved = account
        self._forget_pending()
        if self._size >= self._segment_bytes:
            try:
                self._close_segment()
            except OSError as problem:
                if problem.errno not in _NO_ROOM:
                    raise
                self._stop(f"the disk is full ({problem.strerror})")

    def close(self, state: State, reason: str = "", *, commands_offered: int | None = None) -> Manifest:
        """Close segment and manifest; on a full disk, the reserve makes the room for it."""
        if not self._full:
            with contextlib.suppress(OutOfRoom):
                self.checkpoint(sync=True)
        if self._full and state is State.COMPLETE:
            state, reason = State.STOPPED, self._full
        (self.directory / RESERVE).unlink(missing_ok=True)
        try:
            self._close_segment()
            self.manifest = settled(
                self.manifest, self._saved, self.counts, state, reason, commands_offered=commands_offered
            )
            self._write_manifest()
        finally:
            self._progress.close()
            self._lock.close()
            (self.directory / LOCK).unlink(missing_ok=True)
        return self.manifest

    def commands(self) -> list[str]:
        """Topics of all commands recorded so far. Reads everything back."""
        found = [m.topic for m in self._pending if is_command(m)]
        for segment in self.manifest.segments:
            for messages in read_segment(self.directory, segment):
                found += [m.topic for m in messages if is_command(m)]
        path = self.directory / segment_name(self._number, is_open=True)
        if self._file is not None:
            with _named(path), path.open("rb") as file:
                for header, stored in _Scan(file):
                    found += [m.topic for m in _records(header, stored) if is_command(m)]
        return found

    def abandon(self) -> None:
        """Let go of the files as a killed process would."""
        if self._file is not None:
            self._file.close()
        self._progress.close()
        self._lock.close()

    def _forget_pending(self) -> None:
        self._records, self._pending, self._raw_bytes = [], [], 0

    def _stop(self, why: str) -> None:
        self._full = why
        self._forget_pending()
        raise OutOfRoom(why)

    def _give_back(self, progress_size: int) -> None:
        """Take half-written ends away again: cutting a file needs no room."""
        with contextlib.suppress(OSError):
            self._progress.close()
        with (self.directory / PROGRESS).open("r+b") as file:
            file.truncate(progress_size)
        self._progress = (self.directory / PROGRESS).open("ab")
        if self._file is not None:
            os.ftruncate(self._file.fileno(), self._size)
            self._file.seek(self._size)

    def _segment_reset(self) -> None:
        self._number = len(self.manifest.segments) + 1
        self._sha = hashlib.sha256(MAGIC)
        self._size = self._count = self._commands = 0
        self._first_at, self._last_at = float("inf"), 0.0

    def _open_segment(self) -> None:
        path = self.directory / segment_name(self._number, is_open=True)
        self._file = _private(path)
        _write(self._file, MAGIC)

    def _close_segment(self) -> None:
        if self._file is None:
            return
        if self._count == 0:  # its first block found no room
            self._file.close()
            self._file = None
            (self.directory / segment_name(self._number, is_open=True)).unlink()
            self._segment_reset()
            return
        segment = Segment(
            capture=self.manifest.id,
            number=self._number,
            records=self._count,
            first_at_s=self._first_at,
            last_at_s=self._last_at,
            sha256=self._sha.hexdigest(),
        )
        size = _seal(self.directory, self._file, segment, self._size)
        self._file = None
        self._listed(segment, size)
        self._segment_reset()
        self._write_manifest()
        self._shorten_progress()

    def _listed(self, segment: Segment, size: int) -> None:
        old = self.manifest
        self.manifest = msgspec.structs.replace(
            old,
            segments=[*old.segments, segment],
            stored_bytes=old.stored_bytes + size,
            captured=old.captured + self._count - self._commands,
            commands_captured=old.commands_captured + self._commands,
        )

    def _shorten_progress(self) -> None:
        """Only the newest line is needed, and the file would grow for ever."""
        line = msgspec.json.encode(_Checkpoint(self._number, 0, self._saved)) + b"\n"
        self._progress.close()
        write_private(self.directory / PROGRESS, line.decode())
        self._progress = (self.directory / PROGRESS).open("ab")

    def _write_manifest(self) -> None:
        # Counts by device are large, and are found again from the segments: they come with the end.
        write_manifest(self.directory, self.manifest)


def is_command(message: CapturedMessage) -> bool:
    return message.direction == "down" and message.topic.endswith("/request/json")


def settled(
    manifest: Manifest,
    account: Account,
    counts: dict[str, tuple[int, int]],
    state: State,
    reason: str,
    *,
    commands_offered: int | None = None,
) -> Manifest:
    """The manifest with its account. A tenant's capture tells nothing that depends on other tenants."""
    segments = manifest.segments
    gaps = account.gaps
    if manifest.tenant is not None:
        gaps = [msgspec.structs.replace(gap, messages=None) for gap in gaps]
    last_at_s = max((one.last_at_s for one in segments), default=None)
    return msgspec.structs.replace(
        manifest,
        state=state,
        reason=reason,
        ended_at_s=account.at_s if manifest.tenant is None else last_at_s,
        first_at_s=min((one.first_at_s for one in segments), default=None),
        last_at_s=last_at_s,
        offered=account.offered,
        commands_offered=commands_offered,
        masked=account.masked,
        payload_bytes=account.payload_bytes,
        gaps=gaps,
        gaps_more=account.gaps_more,
        log=None if manifest.tenant is not None or not account.created else account.range(),
        devices=counts,
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_private(directory / MANIFEST, msgspec.json.encode(manifest).decode() + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Raises BadInput when there is no capture, DamagedCapture when its manifest cannot be read."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_BYTES_MAX:
            raise DamagedCapture(f"{path} has more than {MANIFEST_BYTES_MAX:,} bytes")
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{directory} is not a capture: it has no {MANIFEST}") from None
    except (msgspec.MsgspecError, ValueError) as problem:
        raise DamagedCapture(f"{path} is damaged ({problem})") from None
    if manifest.format != FORMAT:
        raise BadInput(f"{directory} has format {manifest.format}, this program reads format {FORMAT}")
    return manifest


def _make(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadInput(f"{directory} holds something already: name a new directory, or go on with --resume")
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _private(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: a disk that is nearly full takes the beginning and says nothing."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _locked(directory: Path) -> IO[str]:
    lock = (directory / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise Conflict(f"{directory} is being recorded at this moment: stop that first") from None
    return lock


def _seal(directory: Path, file: BinaryIO, segment: Segment, size: int) -> int:
    """Write the footer, give the segment its final name, and return how large it is."""
    footer = encode_footer(segment)
    try:
        _write(file, footer)
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), size)
        file.seek(size)
        raise
    file.close()
    (directory / segment_name(segment.number, is_open=True)).rename(directory / segment.name)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return size + len(footer)


# -- reading -------------------------------------------------------------------------------------------------


def read_capture(path: Path, *, skip: int = 0) -> Iterator[CapturedMessage]:
    """Every message in the order of the capture, but the first `skip`; one block is in memory at a time.

    Raises DamagedCapture naming the segment that is not as it was written, when it is come to, and at the end
    when the messages are not those that the manifest counts. Raises UnfinishedCapture for one never closed.
    """
    manifest = read_manifest(path)
    if manifest.state is State.RECORDING:
        raise UnfinishedCapture(
            f"{path} was never closed: its recorder is still at work, or was killed. 'fleetlift capture --to "
            f"{path} --recover' closes it with all that is whole"
        )
    counted: dict[str, tuple[int, int]] | None = {} if skip == 0 else None
    for segment in manifest.segments:
        if skip >= segment.records:
            skip -= segment.records
            continue
        for messages in read_segment(path, segment):
            if skip:
                skip, messages = max(0, skip - len(messages)), messages[skip:]
            for message in messages:
                if counted is not None:
                    count_devices(counted, message)
                yield message
    if counted is not None:
        with _named(path / MANIFEST):
            check_counts(manifest, counted)


def read_segment(directory: Path, expected: Segment) -> Iterator[list[CapturedMessage]]:
    """The messages of a closed segment, block by block. Raises DamagedCapture naming it."""
    path = directory / expected.name
    with _named(path), path.open("rb") as file:
        scan = _Scan(file)
        for header, stored in scan:
            if header.kind != RECORDS:
                break
            yield _records(header, stored)
        if scan.footer is None:
            raise DamagedCapture("it ends without a footer: it was cut off")
        if scan.footer != expected or scan.footer.sha256 != scan.sha256:
            raise DamagedCapture("its footer and its contents do not belong together")
        if scan.records != expected.records or file.read(1):
            raise DamagedCapture("it holds more, or fewer, records than its footer says")


class _Scan:
    """The blocks of a segment one after the other, up to and including the footer. `whole`: where the last
    whole block of records ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()
        self.footer: Segment | None = None
        self.whole = self.records = 0

    @property
    def sha256(self) -> str:
        return self._sha.hexdigest()

    def __iter__(self) -> Iterator[tuple[BlockHeader, bytes]]:
        magic = self._file.read(len(MAGIC))
        if magic != MAGIC:
            raise DamagedCapture("it does not begin as a segment does")
        self._sha.update(magic)
        self.whole = len(magic)
        while head := self._file.read(HEADER_BYTES):
            if len(head) < HEADER_BYTES:
                raise DamagedCapture("it is cut off within a block")
            header = read_header(head)
            stored = self._file.read(header.stored_bytes)
            if len(stored) < header.stored_bytes:
                raise DamagedCapture("it is cut off within a block")
            check_body(header, stored)
            if header.kind != RECORDS:
                self.footer = decode_footer(stored)
                yield header, stored
                return
            yield header, stored
            self._sha.update(head)
            self._sha.update(stored)
            self.whole += HEADER_BYTES + len(stored)
            self.records += header.records


def _records(header: BlockHeader, stored: bytes) -> list[CapturedMessage]:
    try:
        # Without this look, the size in the frame would be believed and the memory taken.
        if zstandard.frame_content_size(stored) != header.raw_bytes:
            raise DamagedCapture("a block is not as large as its header says")
        raw = zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError as problem:
        raise DamagedCapture(f"a block cannot be unpacked ({problem})") from None
    if len(raw) != header.raw_bytes:
        raise DamagedCapture("a block is not as large as its header says")
    return decode_records(raw, header.records)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedCapture as problem:
        raise DamagedCapture(f"{path} is damaged: {problem}") from None
    except FileNotFoundError:
        raise DamagedCapture(f"{path} is missing") from None


# -- recovering ----------------------------------------------------------------------------------------------


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What `recover` found. `recent`: topics of the newest commands, for who goes on."""

    manifest: Manifest
    account: Account
    recent: dict[str, float]


def recover(directory: Path, *, reason: str = "its recorder was killed") -> Recovered:
    """Close a capture whose recorder was killed: closed segments count, the open one up to its last whole
    block; the manifest says so. Repeating it changes nothing.

    Raises Conflict while it is being recorded, DamagedCapture when a closed segment is not whole.
    """
    found, lock = recover_to_go_on(directory, reason=reason)
    lock.close()
    (directory / LOCK).unlink(missing_ok=True)
    return found


def recover_to_go_on(directory: Path, *, reason: str) -> tuple[Recovered, IO[str]]:
    """The same, for a writer that goes on: it keeps the lock."""
    before = read_manifest(directory)
    lock = _locked(directory)
    try:
        return _recovered(directory, before, reason), lock
    except BaseException:
        lock.close()
        raise


def _recovered(directory: Path, before: Manifest, reason: str) -> Recovered:
    for leftover in directory.glob(".*"):
        leftover.unlink()
    (directory / RESERVE).unlink(missing_ok=True)
    segments = list(before.segments)
    account, open_records = None, False
    if before.state is State.RECORDING:
        number = len(segments) + 1
        open_path = directory / segment_name(number, is_open=True)
        closed_path = directory / segment_name(number)
        if closed_path.exists():  # killed before the manifest could say so
            segments.append(_footer_of(closed_path))
            number += 1
            open_path = directory / segment_name(number, is_open=True)
        account = _account_at(directory, number, 0)
        if open_path.exists():
            segment, whole = _close_open(directory, open_path, number, before.id)
            if segment is not None:
                segments.append(segment)
                open_records = True
                account = _account_at(directory, number, whole) or account
    counts: dict[str, tuple[int, int]] = {}
    commands = size = 0
    newest: dict[str, float] = {}
    for segment in segments:
        for messages in read_segment(directory, segment):
            for message in messages:
                count_devices(counts, message)
                if is_command(message):
                    commands += 1
                    newest[message.topic] = message.at_s
            if newest:
                horizon = max(newest.values()) - 120.0
                newest = {topic: at for topic, at in newest.items() if at >= horizon}
        size += (directory / segment.name).stat().st_size
    account = account or _account_at(directory, None, 0)
    if account is None:
        account = Account(created="", first=1, seq=0, at_s=before.started_at_s)
    if before.state is not State.RECORDING:
        return Recovered(manifest=before, account=account, recent=newest)
    # First the place, then the word that all is well: a line ahead of its block must not be believed later.
    line = msgspec.json.encode(_Checkpoint(len(segments) + 1, 0, account))
    write_private(directory / PROGRESS, line.decode() + "\n")
    records = sum(one.records for one in segments)
    manifest = msgspec.structs.replace(
        before,
        segments=segments,
        stored_bytes=size,
        captured=records - commands,
        commands_captured=commands,
    )
    kept = "the open segment was kept up to its last whole block" if open_records else "no segment was open"
    manifest = settled(manifest, account, counts, State.RECOVERED, f"{reason}; {kept}")
    write_manifest(directory, manifest)
    return Recovered(manifest=manifest, account=account, recent=newest)


def _footer_of(path: Path) -> Segment:
    with _named(path), path.open("rb") as file:
        scan = _Scan(file)
        for _ in scan:
            pass
        if scan.footer is None:
            raise DamagedCapture("it ends without a footer: it was cut off")
        return scan.footer


def _close_open(directory: Path, path: Path, number: int, capture: str) -> tuple[Segment | None, int]:
    """Cut an open segment behind its last whole block and close it; None when it holds none."""
    first_at, last_at = float("inf"), 0.0
    with path.open("rb") as source:
        scan = _Scan(source)
        with contextlib.suppress(DamagedCapture):
            for header, stored in scan:
                if header.kind == RECORDS:
                    for message in _records(header, stored):
                        first_at, last_at = min(first_at, message.at_s), max(last_at, message.at_s)
    if scan.records == 0:
        path.unlink()
        return None, 0
    segment = Segment(
        capture=capture,
        number=number,
        records=scan.records,
        first_at_s=first_at,
        last_at_s=last_at,
        sha256=scan.sha256,
        recovered=True,
    )
    file = path.open("r+b", buffering=0)
    file.truncate(scan.whole)
    file.seek(scan.whole)
    _seal(directory, file, segment, scan.whole)
    return segment, scan.whole


def _account_at(directory: Path, number: int | None, size: int) -> Account | None:
    """The newest account that speaks of no more than `size` bytes of segment `number` (None: any)."""
    found: Account | None = None
    with contextlib.suppress(FileNotFoundError), (directory / PROGRESS).open("rb") as file:
        for line in file:
            try:
                checkpoint = msgspec.json.decode(line, type=_Checkpoint)
            except msgspec.MsgspecError:
                continue  # the line that was being written
            if number is None or (checkpoint.segment, checkpoint.size) <= (number, size):
                found = checkpoint.account
    return found
