"""The journal: what it promises to whoever has nothing else left."""

from pathlib import Path

import pytest

from fleetlift.core.errors import BadInput
from fleetlift.core.orders import Flags, TelemetryFlag
from fleetlift.migrate.journal import (
    Decided,
    Emergency,
    Journal,
    Opened,
    Order,
    Told,
    append,
    journal_path,
    story,
)

BOTH = Flags(telemetry=TelemetryFlag.BOTH)
OPENED = Opened(at=1.0, migration="move", old={"legacy": "tcp://127.0.0.1:7700"}, plan="migration: move")


def told(device: str, epoch: int, flags: Flags = BOTH) -> Told:
    return Told(at=2.0, orders=(Order(device=device, epoch=epoch, flags=flags),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal_path(tmp_path, "move")


def test_the_newest_order_of_each_device_counts(path: Path) -> None:
    """Reading it again gives every device's last order and the newest epoch of all."""
    append(path, [OPENED, told("car-1", 5), told("car-2", 6)])
    append(path, [told("car-1", 7, Flags()), Decided(at=3.0, what="wave_opened", text="…")])
    found = story(path)
    assert {d: (o.epoch, o.flags) for d, o in found.orders.items()} == {
        "car-1": (7, Flags()),
        "car-2": (6, BOTH),
    }
    assert (found.epoch, found.migration, found.old, found.torn) == (7, "move", OPENED.old, 0)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_short_by_a_crash_loses_only_itself(path: Path, cut: int) -> None:
    """What follows a torn line is read, and what was before it too."""
    append(path, [OPENED, told("car-1", 5), told("car-2", 6)])
    path.write_bytes(path.read_bytes()[:-cut])
    append(path, [told("car-3", 7)])
    found = story(path)
    # One byte short is a whole record without its line end.
    assert sorted(found.orders) == (["car-1", "car-2", "car-3"] if cut == 1 else ["car-1", "car-3"])
    assert found.torn == (0 if cut == 1 else 1)
    assert found.epoch == 7


def test_an_epoch_of_an_emergency_counts_as_used(path: Path) -> None:
    """The next emergency takes a newer epoch than the one before."""
    append(path, [OPENED, told("car-1", 5), Emergency(at=4.0, epoch=9, actor="me", devices=("car-1",))])
    assert story(path).epoch == 9
    assert [e.epoch for e in story(path).emergencies] == [9]


def test_no_secret_can_be_in_it_and_only_its_owner_may_read_it(path: Path) -> None:
    """Orders are kept without credential or endpoint; file and folder are private."""
    append(path, [OPENED, told("car-1", 5)])
    assert set(Order.__struct_fields__) == {"device", "epoch", "flags"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such journal"):
        story(tmp_path / "missing.jsonl")
    (tmp_path / "notes.jsonl").write_text('{"kind": "shopping"}\nmilk\n')
    with pytest.raises(BadInput, match="which migration"):
        story(tmp_path / "notes.jsonl")
    with pytest.raises(BadInput):
        journal_path(tmp_path, "../etc/passwd")


async def test_it_is_there_when_the_call_returns(path: Path) -> None:
    journal = Journal(path)
    assert await journal.story() is None
    await journal.add(OPENED)
    await journal.told(2.0, {"car-1": (3, BOTH)})
    found = await journal.story()
    assert found is not None
    assert found.epoch == 3
