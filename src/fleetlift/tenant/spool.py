"""What the source has sent and the target has not yet: messages in files, while the copy goes on.

A directory of segments, each a head and then blocks: length, checksum, the end of the last whole transaction
up to here, and messages, each behind its length. A block counts once it is whole; what a crash has torn is
cut off, with the transaction that was open, and the source sends it again, as nothing is confirmed to it
before it is on the disk. A segment begins with the descriptions of all tables sent so far, so that those
before it can go.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.pgoutput import COMMIT, RELATION

HEAD: Final = b"FLSPOOL1"
SEGMENT_BYTES: Final = 64 << 20
_BLOCK = struct.Struct(">IIQ")
_SIZE = struct.Struct(">I")


class Block(msgspec.Struct, frozen=True):
    """Messages in the order of the log; `segment` is the number of the file they are in."""

    messages: Sequence[bytes]
    segment: int


class Spool:
    """Segments in `directory`, written by one thread and read by another.

    `open` must be called before anything else. `last_commit`: the end of the last whole transaction in it, 0:
    none. `synced_commit`: of the last one that is on the disk.
    """

    def __init__(self, directory: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._file: int | None = None
        self._number = 0
        self._written = 0  # bytes of the segment being written
        self._relations: dict[bytes, bytes] = {}
        self._sizes: dict[int, int] = {}
        self.last_commit = 0
        self.synced_commit = 0
        self.first = 1  # the oldest segment there is

    @property
    def size_bytes(self) -> int:
        return sum(self._sizes.copy().values())

    def open(self) -> None:
        """Find what is there, cut off what is not whole, and be ready to append. Raises Conflict where a
        segment is damaged that was whole."""
        self._directory.mkdir(parents=True, exist_ok=True)
        numbers = sorted(int(path.stem.split("-")[1]) for path in self._directory.glob("spool-*.seg"))
        for number in numbers:
            end, last, whole = _scan(self._path(number))
            if not whole:
                if number != numbers[-1]:
                    raise Conflict(
                        f"{self._path(number)} is damaged at byte {end}: changes are lost, so the copy must "
                        "start again"
                    )
                os.truncate(self._path(number), end)
            self._sizes[number] = end
            self.last_commit = max(self.last_commit, last)
        self._number = numbers[-1] if numbers else 0
        for number in reversed(numbers):
            if self._end_with_commit(number):
                break
            # Nothing but the middle of a transaction, or descriptions of tables.
            self._path(number).unlink()
            del self._sizes[number]
        self.synced_commit = self.last_commit
        self.first = min(self._sizes, default=self._number + 1)

    def _end_with_commit(self, number: int) -> bool:
        """Cut the segment off behind the last commit in it; False: there is none."""
        path = self._path(number)
        data = path.read_bytes()[: self._sizes[number]]
        at, kept = len(HEAD), b""
        while at < len(data):
            length, _, _ = _BLOCK.unpack_from(data, at)
            body = data[at + _BLOCK.size : at + _BLOCK.size + length]
            messages = list(_messages(body))
            last = max((n for n, message in enumerate(messages) if message[0] == COMMIT), default=None)
            if last is not None:
                commit = int.from_bytes(messages[last][10:18], "big")
                whole = b"".join(_SIZE.pack(len(message)) + message for message in messages[: last + 1])
                kept = data[:at] + _block(whole, commit)
            at += _BLOCK.size + length
        if not kept:
            return False
        if kept != data:
            unfinished = path.with_suffix(".new")
            unfinished.write_bytes(kept)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.rename(path)
            self._sizes[number] = len(kept)
        return True

    def append(self, messages: Sequence[bytes]) -> None:
        """Write the messages as one block. Raises OSError with nothing of it kept, such as on a full disk."""
        commit = self.last_commit
        relations: dict[bytes, bytes] = {}
        parts = []
        for message in messages:
            kind = message[0]
            if kind == COMMIT:
                commit = int.from_bytes(message[10:18], "big")
            elif kind == RELATION:
                relations[message[1:5]] = message
            parts.append(_SIZE.pack(len(message)))
            parts.append(message)
        if self._file is None or self._written >= self._segment_bytes:
            self._next_segment()
        self._write(_block(b"".join(parts), commit))
        self._relations.update(relations)
        self.last_commit = commit

    def sync(self) -> None:
        """Have on the disk what was appended."""
        if self._file is not None and self.synced_commit != self.last_commit:
            commit = self.last_commit
            os.fdatasync(self._file)
            self.synced_commit = commit

    def read_from(self, segment: int, at: int) -> tuple[Block | None, int, int]:
        """The block at `at` of `segment`, and where the next one is; None: nothing is written there yet."""
        while True:
            path = self._path(segment)
            limit = self._sizes.get(segment, 0)
            at = max(at, len(HEAD))
            if at < limit:
                with path.open("rb") as file:
                    file.seek(at)
                    length, checksum, commit = _BLOCK.unpack(file.read(_BLOCK.size))
                    body = file.read(length)
                if zlib.crc32(body, commit & 0xFFFFFFFF) != checksum:
                    raise Conflict(f"{path} is damaged at byte {at}: the copy must start again")
                return Block(list(_messages(body)), segment), segment, at + _BLOCK.size + length
            if segment >= self._number:
                return None, segment, at
            segment, at = segment + 1, 0

    def forget_before(self, segment: int) -> None:
        """Remove the segments before `segment`: all in them is on the target."""
        while self.first < min(segment, self._number):
            self._path(self.first).unlink(missing_ok=True)
            self._sizes.pop(self.first, None)
            self.first += 1

    def clear(self) -> None:
        """Remove all: everything in it is on the target. The next `append` begins a segment."""
        self.close()
        for number in sorted(self._sizes):
            self._path(number).unlink(missing_ok=True)
        self._sizes.clear()
        self.first = self._number + 1

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, number: int) -> Path:
        return self._directory / f"spool-{number:08}.seg"

    def _next_segment(self) -> None:
        head = HEAD
        known = list(self._relations.values())
        if known:
            body = b"".join(_SIZE.pack(len(message)) + message for message in known)
            head += _block(body, self.last_commit)
        path = self._path(self._number + 1)
        file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        try:
            _write_all(file, head)
            os.fsync(file)
            directory = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        if self._file is not None:
            os.fdatasync(self._file)
            self.synced_commit = self.last_commit
            os.close(self._file)
        self._file = file
        self._written = len(head)
        self._sizes[self._number + 1] = len(head)
        self._number += 1

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            _write_all(self._file, data)
        except OSError:
            os.ftruncate(self._file, self._written)
            os.lseek(self._file, self._written, os.SEEK_SET)
            raise
        self._written += len(data)
        self._sizes[self._number] = self._written


def _block(body: bytes, commit: int) -> bytes:
    return _BLOCK.pack(len(body), zlib.crc32(body, commit & 0xFFFFFFFF), commit) + body


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _messages(body: bytes) -> Iterator[bytes]:
    at, end = 0, len(body)
    while at < end:
        size = int.from_bytes(body[at : at + 4], "big")
        yield body[at + 4 : at + 4 + size]
        at += 4 + size


def _scan(path: Path) -> tuple[int, int, bool]:
    """Where the last whole block ends, the last commit up to there, and whether nothing is behind it."""
    size = path.stat().st_size
    at, last = 0, 0
    with path.open("rb") as file:
        if file.read(len(HEAD)) != HEAD:
            return 0, 0, size == 0
        at = len(HEAD)
        while at < size:
            head = file.read(_BLOCK.size)
            if len(head) < _BLOCK.size:
                return at, last, False
            length, checksum, commit = _BLOCK.unpack(head)
            body = file.read(length) if length <= size - at else b""
            if len(body) < length or zlib.crc32(body, commit & 0xFFFFFFFF) != checksum:
                return at, last, False
            last = max(last, commit)
            at += _BLOCK.size + length
    return at, last, True
