"""What was spooled is read again, whatever was torn off."""

import errno
import os
from pathlib import Path

import pytest

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.pgoutput import Begin, Commit, Insert, Message, Relation, cell, encode
from fleetlift.tenant.spool import Spool

RELATION = encode(Relation(1, "public", "t", "d", ()))


def _transaction(n: int, rows: int = 2) -> list[bytes]:
    messages: list[Message] = [Begin(n * 10, 0, n)]
    messages += [Insert(1, [cell(f"{n}.{row}")]) for row in range(rows)]
    messages.append(Commit(n * 10, n * 10 + 5, 0))
    return [encode(message) for message in messages]


def _all(spool: Spool) -> list[bytes]:
    found: list[bytes] = []
    place = (spool.first, 0)
    while True:
        block, *rest = spool.read_from(*place)
        if block is None:
            return found
        found += block.messages
        place = (rest[0], rest[1])


def _opened(directory: Path, **settings: int) -> Spool:
    spool = Spool(directory, **settings)
    spool.open()
    return spool


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    spool = _opened(tmp_path)
    spool.append([RELATION, *_transaction(1)])
    spool.append(_transaction(2))
    assert spool.last_commit == 25 and spool.synced_commit == 0
    spool.sync()
    assert spool.synced_commit == 25
    again = _opened(tmp_path)
    assert _all(again) == _all(spool) == [RELATION, *_transaction(1), *_transaction(2)]
    assert again.last_commit == again.synced_commit == 25


def test_cut_anywhere_whole_transactions_stay(tmp_path: Path) -> None:
    """Whatever a crash leaves of the end of the file: no transaction is half there, none is lost before
    it."""
    spool = _opened(tmp_path)
    for n in range(1, 4):
        spool.append(_transaction(n)[:2])
        spool.append(_transaction(n)[2:])
    spool.close()
    (file,) = tmp_path.glob("*.seg")
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        cut = _opened(tmp_path)
        count = cut.last_commit // 10
        assert _all(cut) == [message for n in range(1, count + 1) for message in _transaction(n)]
        for left in tmp_path.glob("*"):
            left.unlink()
    assert count == 2


def test_a_transaction_that_was_open_is_cut_off_and_comes_again(tmp_path: Path) -> None:
    spool = _opened(tmp_path, segment_bytes=200)
    spool.append([*_transaction(1), *_transaction(2)[:2]])
    for n in range(30):
        spool.append([encode(Insert(1, [cell(f"open {n}")]))])
    spool.close()
    assert len(list(tmp_path.glob("*.seg"))) > 3
    again = _opened(tmp_path)
    assert again.last_commit == 15
    again.append(_transaction(2))
    assert _all(again) == [*_transaction(1), *_transaction(2)]


def test_segments_go_once_they_are_applied_and_tables_stay_described(tmp_path: Path) -> None:
    spool = _opened(tmp_path, segment_bytes=100)
    spool.append([RELATION, *_transaction(1)])
    for n in range(2, 8):
        spool.append(_transaction(n))
    before = spool.size_bytes
    spool.forget_before(5)
    assert spool.size_bytes < before and spool.first == 5
    assert _all(spool)[0] == RELATION
    spool.clear()
    assert spool.size_bytes == 0 and not list(tmp_path.glob("*.seg"))


def test_a_damaged_segment_in_the_middle_is_told(tmp_path: Path) -> None:
    spool = _opened(tmp_path, segment_bytes=100)
    for n in range(1, 5):
        spool.append(_transaction(n))
    spool.close()
    first = sorted(tmp_path.glob("*.seg"))[0]
    data = bytearray(first.read_bytes())
    data[40] ^= 1
    first.write_bytes(bytes(data))
    with pytest.raises(Conflict, match="start again"):
        _opened(tmp_path)


def test_a_full_disk_leaves_no_half_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = _opened(tmp_path)
    spool.append(_transaction(1))
    write = os.write

    def full(file: int, data: memoryview) -> int:
        write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        spool.append(_transaction(2))
    monkeypatch.setattr(os, "write", write)
    assert spool.last_commit == 15
    spool.append(_transaction(2))
    assert _all(spool) == [*_transaction(1), *_transaction(2)]
    assert _all(_opened(tmp_path)) == [*_transaction(1), *_transaction(2)]
