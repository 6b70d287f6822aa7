"""The device's disk and the recorded fleet."""

import itertools
import resource
import signal
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from fleetlift.core.errors import BadInput
from fleetlift.core.orders import DevicePhase, Flags
from fleetlift.device import messages as m
from fleetlift.device.fleet import make_inventory, read_inventory, specs_of
from fleetlift.device.journal import Journal
from fleetlift.device.links import response, with_stamp
from fleetlift.device.recorded import played, trips, vehicles
from fleetlift.device.shell import Misbehaviour


class Clock:
    """Calls that are due later, made by hand."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def __call__(self, delay_s: float, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_what_is_stored_is_found_again_by_the_next_process(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    record = m.Record(epoch=3, phase=DevicePhase.MOVED, flags=Flags(), reason="why")
    command = m.CommandRecord(id="c1", path=m.Path.OLD, at=1.0, expires_at=2.0)
    entries = [m.Entry("can", n, n * 1000, b'{"n":%d}' % n) for n in range(1, 4)]
    told: list[str] = []
    journal.write("d1", [m.RecordChanged(record), m.CommandKept(command)])
    journal.write("d1", [m.EntryAdded(e) for e in entries], lambda: told.append("stored"))
    journal.write("d2", [m.EntryAdded(entries[0])])
    assert told == []
    clock.run()
    assert told == ["stored"]
    journal.write("d1", [m.EntryDropped("can", 2), m.CommandForgotten("c1")])
    journal.close()

    found = Journal(tmp_path, schedule=clock)
    saved = found.load("d1")
    assert saved.record == record and saved.next_seq == {"can": 4} and saved.commands == ()
    assert saved.outbox == (entries[0], entries[2])
    assert found.load("d3") == m.Saved()
    found.close()


def test_a_disk_that_refuses_stores_nothing_says_nothing_and_is_tried_again(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    journal._db.execute("PRAGMA query_only = ON")
    told: list[str] = []
    journal.write("d1", [m.EntryAdded(m.Entry("can", 1, 1, b"{}"))], lambda: told.append("stored"))
    clock.run()
    clock.run()
    assert told == [] and clock.calls
    journal._db.execute("PRAGMA query_only = OFF")
    clock.run()
    assert told == ["stored"] and len(journal.load("d1").outbox) == 1
    journal.close()


def test_the_state_is_for_the_owner_alone(tmp_path: Path) -> None:
    """It holds the credential for the new side."""
    journal = Journal(tmp_path / "state", schedule=Clock())
    assert stat.S_IMODE((tmp_path / "state" / "device.db").stat().st_mode) == 0o600
    journal.close()


def test_there_are_57_trips_and_they_play_for_ever() -> None:
    assert len(trips()) == 57 and {t.model for t in trips()} == {"leon", "twizy"}
    trip = trips()[0]
    lap = len(trip.times_ms)
    played_twice = list(itertools.islice(played(trip), 2 * lap))
    times = [at for at, _ in played_twice]
    assert times == sorted(times) and times[0] == 0.0
    assert [body for _, body in played_twice[:lap]] == [body for _, body in played_twice[lap:]]
    assert all(msgspec.json.decode(body).get("device") is None for body in trip.bodies[:50])


def test_more_devices_than_trips_use_them_again_under_new_names() -> None:
    fleet = vehicles(130)
    assert len({v.id for v in fleet}) == 130
    assert fleet[57].id == fleet[0].id + "-r2" and fleet[114].id == fleet[0].id + "-r3"
    assert fleet[:57] == vehicles()


def test_revisions_are_shared_out_as_the_demo_needs_them() -> None:
    hardware = Counter(v.attributes["hardware"] for v in vehicles())
    assert hardware == {3: 40, 4: 11, 2: 6}
    assert all(v.updatable == (v.attributes["hardware"] != 2) for v in vehicles())


def test_an_inventory_keeps_the_keys_it_has(tmp_path: Path) -> None:
    path = tmp_path / "inventory.jsonl"
    first = make_inventory(path, vehicles(3))
    second = make_inventory(path, vehicles(5))
    assert {k: second[k] for k in first} == first and len(second) == 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_inventory(path)["veh-leon-20170705-1"].attributes["model"] == "leon"
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(BadInput, match=r"inventory\.jsonl:6"):
        read_inventory(path)


def test_only_the_faulty_revision_misbehaves() -> None:
    fault = Misbehaviour(drop_share=0.1)
    specs = specs_of(vehicles(), {v.id: "k" * 20 for v in vehicles()}, faulty_revision=4, misbehaviour=fault)
    assert {s.attributes["hardware"] for s in specs if s.misbehaviour} == {4}


@pytest.mark.parametrize(
    ("status", "detail", "payload"),
    [
        ("acknowledged", b"{}", {"status": "IN_PROGRESS"}),
        ("succeeded", b'{"locked":true}', {"status": "SUCCEEDED", "result": {"locked": True}}),
        (
            "failed",
            b'{"code":"INTERRUPTED","reason":"r"}',
            {"status": "FAILED", "statusReason": {"reasonCode": "INTERRUPTED", "reasonDescription": "r"}},
        ),
        (
            "failed",
            b'{"code":"WRONG_SIDE","reason":"r"}',
            {"status": "REJECTED", "statusReason": {"reasonCode": "WRONG_SIDE", "reasonDescription": "r"}},
        ),
        (
            "duplicate",
            b'{"code":"DUPLICATE","reason":"r"}',
            {"status": "REJECTED", "statusReason": {"reasonCode": "DUPLICATE", "reasonDescription": "r"}},
        ),
        (
            "would-execute",
            b"{}",
            {"status": "SUCCEEDED", "statusReason": {"reasonCode": "WOULD_EXECUTE", "reasonDescription": ""}},
        ),
    ],
)
def test_answers_are_written_as_the_command_topics_want_them(
    status: str, detail: bytes, payload: dict[str, object]
) -> None:
    assert msgspec.json.decode(response(m.AnswerStatus(status), detail)) == payload


@pytest.mark.parametrize(
    ("body", "stamped"),
    [
        (b'{"a":1}', b'{"ts":5,"a":1}'),
        (b"{}", b'{"ts":5}'),
        (b" { } ", b'{"ts":5}'),
    ],
)
def test_a_body_is_stamped_without_being_parsed(body: bytes, stamped: bytes) -> None:
    assert with_stamp(body, b'"ts":5') == stamped


# --- a full disk -------------------------------------------------------------------------------------------


def fill(journal: Journal) -> None:
    """From now on the file may not grow: SQLite's own limit, and its own error."""
    [pages] = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")


def free(journal: Journal) -> None:
    journal._db.execute("PRAGMA max_page_count = 1000000")


def entries(first: int, last: int) -> list[m.EntryAdded]:
    return [m.EntryAdded(m.Entry("can", n, n, b'{"v":"%s"}' % (b"x" * 3000))) for n in range(first, last + 1)]


def test_a_full_disk_keeps_what_needs_no_room_and_stores_the_rest_when_it_has_some(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    told: list[str] = []
    journal.write("d", [m.RecordChanged(m.Record(epoch=1)), *entries(1, 20)])
    clock.run()
    fill(journal)
    journal.write("d", entries(21, 40), lambda: told.append("entries"))
    journal.write(
        "d",
        [m.RecordChanged(m.Record(epoch=2))],
        lambda: told.append("record"),
        lambda: told.append("record alone"),
    )
    clock.run()
    assert told == ["record alone"] and journal.load("d").record.epoch == 2
    clock.run()
    assert told == ["record alone"] and len(journal.load("d").outbox) == 20
    free(journal)
    clock.run()
    assert told == ["record alone", "entries", "record"] and len(journal.load("d").outbox) == 40
    journal.close()


def test_entries_that_leave_make_room_for_those_that_come(tmp_path: Path) -> None:
    """Nobody has to free a full disk: what a side acknowledges does."""
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    journal.write("d", entries(1, 20))
    clock.run()
    fill(journal)
    told: list[str] = []
    journal.write("d", entries(21, 35), lambda: told.append("stored"))
    clock.run()
    assert told == []
    journal.write("d", [m.EntryDropped("can", n) for n in range(1, 21)])
    clock.run()
    clock.run()
    assert told == ["stored"] and [e.seq for e in journal.load("d").outbox] == list(range(21, 36))
    assert journal.load("d").next_seq == {"can": 36}
    journal.close()


def test_an_entry_whose_first_commit_succeeded_unnoticed_is_stored_once(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    journal.write("d", entries(1, 1))
    clock.run()
    journal.write("d", entries(1, 1))
    clock.run()
    assert len(journal.load("d").outbox) == 1
    journal.close()


def test_a_device_with_a_full_disk_starts(tmp_path: Path) -> None:
    clock = Clock()
    journal = Journal(tmp_path, schedule=clock)
    journal.write("d", entries(1, 20))
    journal.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may grow by a byte
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        found = Journal(tmp_path, schedule=clock)
        assert len(found.load("d").outbox) == 20
        found.write("d", entries(21, 21))
        with capture_logs() as logged:
            clock.run()
        assert [line["event"] for line in logged] == ["device_disk_failed"]
        assert len(found.load("d").outbox) == 20
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    clock.run()
    assert len(found.load("d").outbox) == 21
    found.close()
