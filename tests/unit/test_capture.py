"""Captures: the format, damage, kills, the account, masking; and what a replay makes of a message."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_world import NEW, OLD, World, flags, orders
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlift.backend.registry import NewDevice, checked
from fleetlift.bus.log import LogMessage
from fleetlift.core import mqtt
from fleetlift.core.capture import (
    Account,
    CapturedMessage,
    DamagedCapture,
    Direction,
    Manifest,
    State,
    UnfinishedCapture,
    in_share,
    origin,
    shortfalls,
)
from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.masking import Masker, Rules
from fleetlift.core.orders import PROBE_COMMAND
from fleetlift.core.replay import LeftOut, Publish, SendCommand, Tally, checked_names, play, replay_id
from fleetlift.device import messages as m
from fleetlift.device.links import MqttLink
from fleetlift.load.capture import Recorder, Selection
from fleetlift.load.capture_file import (
    PROGRESS,
    CaptureWriter,
    read_capture,
    read_manifest,
    recover,
    recover_to_go_on,
)
from fleetlift.load.replay import Ends

NOW = 1_700_000_000.0


def message(n: int, *, device: str = "", direction: Direction = "up", body: bytes = b"") -> CapturedMessage:
    device = device or f"car-{n % 3}"
    payload = body or json.dumps({"seq": n, "ts": NOW + n}).encode()
    return CapturedMessage(device, NOW + n, f"dt/{device}/gps", 1, payload, direction)


def writer(
    directory: Path, *, block_bytes: int = 400, segment_bytes: int = 1500, max_bytes: int | None = None
) -> CaptureWriter:
    manifest = Manifest(id="c1", started_at_s=NOW, until_s=NOW + 60)
    account = Account(created="2026-01-01T00:00:00+00:00", first=1, seq=0, at_s=NOW)
    return CaptureWriter(
        directory,
        manifest,
        account,
        block_bytes=block_bytes,
        segment_bytes=segment_bytes,
        max_bytes=max_bytes,
    )


def record(into: CaptureWriter, numbers: Sequence[int]) -> None:
    for n in numbers:
        into.account.passes(n, NOW + n)
        into.account.offered += 1
        into.add(message(n))


def captured(directory: Path, count: int) -> list[CapturedMessage]:
    """A closed capture of `count` messages, and these messages."""
    recording = writer(directory)
    record(recording, range(1, count + 1))
    recording.close(State.COMPLETE)
    return [message(n) for n in range(1, count + 1)]


def test_what_was_recorded_is_read_again_in_its_order(tmp_path: Path) -> None:
    """Across blocks and segments; and the account balances, device by device."""
    expected = captured(tmp_path / "c", 200)
    manifest = read_manifest(tmp_path / "c")
    assert list(read_capture(tmp_path / "c")) == expected
    assert len(manifest.segments) > 2
    assert manifest.offered == manifest.captured == 200 == sum(s.records for s in manifest.segments)
    assert manifest.devices == {"car-0": (66, 0), "car-1": (67, 0), "car-2": (67, 0)}
    assert shortfalls(manifest) == []
    assert (manifest.first_at_s, manifest.last_at_s) == (NOW + 1, NOW + 200)


@pytest.mark.parametrize("skip", [0, 1, 7, 50, 199, 200, 500])
def test_reading_can_begin_anywhere(tmp_path: Path, skip: int) -> None:
    expected = captured(tmp_path / "c", 200)
    assert list(read_capture(tmp_path / "c", skip=skip)) == expected[skip:]


def test_large_bodies_are_kept_whole(tmp_path: Path) -> None:
    """One message may be larger than a block, and larger than a segment."""
    recording = writer(tmp_path / "c")
    bodies = [b"x" * 100, bytes(range(256)) * 4096, b"", b"y" * 262_144]
    for n, body in enumerate(bodies, 1):
        recording.account.passes(n, NOW + n)
        recording.account.offered += 1
        recording.add(CapturedMessage("car-1", NOW + n, "dt/car-1/x", 1, body, "up"))
    recording.close(State.COMPLETE)
    assert [one.payload for one in read_capture(tmp_path / "c")] == bodies
    with pytest.raises(BadInput, match="a capture holds up to"):
        writer(tmp_path / "d").add(message(1, body=b"x" * (17 * 1024 * 1024)))


def test_every_cut_of_a_segment_is_told_by_name(tmp_path: Path) -> None:
    captured(tmp_path / "c", 100)
    path = tmp_path / "c" / "000002.seg"
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedCapture, match=r"000002\.seg"):
            list(read_capture(tmp_path / "c"))


def test_every_changed_byte_of_a_segment_is_told_by_name(tmp_path: Path) -> None:
    captured(tmp_path / "c", 100)
    path = tmp_path / "c" / "000002.seg"
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 0x41,)) + whole[at + 1 :])
        with pytest.raises(DamagedCapture, match=r"000002\.seg"):
            list(read_capture(tmp_path / "c"))


def test_missing_swapped_and_foreign_segments_are_told(tmp_path: Path) -> None:
    captured(tmp_path / "c", 200)
    first, second = tmp_path / "c" / "000001.seg", tmp_path / "c" / "000002.seg"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedCapture, match=r"000001\.seg"):
        list(read_capture(tmp_path / "c"))
    first.write_bytes(kept + b"more")
    with pytest.raises(DamagedCapture, match=r"000001\.seg"):
        list(read_capture(tmp_path / "c"))
    first.unlink()
    with pytest.raises(DamagedCapture, match=r"000001\.seg is missing"):
        list(read_capture(tmp_path / "c"))
    with pytest.raises(BadInput, match="not a capture"):
        list(read_capture(tmp_path))


def test_a_manifest_that_counts_otherwise_is_told(tmp_path: Path) -> None:
    captured(tmp_path / "c", 20)
    manifest = read_manifest(tmp_path / "c")
    wrong = msgspec.structs.replace(manifest, devices={**manifest.devices, "car-0": (5, 0)})
    (tmp_path / "c" / "manifest.json").write_bytes(msgspec.json.encode(wrong))
    with pytest.raises(DamagedCapture, match="'car-0'"):
        list(read_capture(tmp_path / "c"))


def test_a_killed_capture_is_recovered_at_whatever_byte_it_was_cut(tmp_path: Path) -> None:
    """What is whole counts, nothing is invented, and the account speaks of exactly what was kept; going on
    from there loses nothing and doubles nothing."""
    recording = writer(tmp_path / "c", segment_bytes=10_000)
    record(recording, range(1, 61))
    recording.checkpoint()
    recording.abandon()
    path = tmp_path / "c" / "000001.open"
    whole, progress = path.read_bytes(), (tmp_path / "c" / PROGRESS).read_bytes()
    manifest = (tmp_path / "c" / "manifest.json").read_bytes()
    with pytest.raises(UnfinishedCapture, match="--recover"):
        list(read_capture(tmp_path / "c"))
    seen = set()
    for size in range(0, len(whole) + 1, 29):
        directory = tmp_path / f"cut-{size}"
        directory.mkdir()
        (directory / "000001.open").write_bytes(whole[:size])
        (directory / PROGRESS).write_bytes(progress)
        (directory / "manifest.json").write_bytes(manifest)
        found, lock = recover_to_go_on(directory, reason="killed")
        kept = list(read_capture(directory))
        assert kept == [message(n) for n in range(1, len(kept) + 1)]
        assert found.manifest.state is State.RECOVERED
        assert found.account.seq == found.account.offered == len(kept)
        seen.add(len(kept))
        goes_on = CaptureWriter(
            directory,
            msgspec.structs.replace(found.manifest, state=State.RECORDING),
            found.account,
            lock=lock,
        )
        record(goes_on, range(found.account.seq + 1, 71))
        after = goes_on.close(State.COMPLETE)
        assert [one.at_s - NOW for one in read_capture(directory)] == list(range(1, 71))
        assert shortfalls(after) == []
    assert len(seen) > 5


def test_recovering_twice_or_while_recording_changes_nothing(tmp_path: Path) -> None:
    recording = writer(tmp_path / "c")
    record(recording, range(1, 100))
    with pytest.raises(Conflict, match="being recorded"):
        recover(tmp_path / "c")
    recording.abandon()
    first = recover(tmp_path / "c").manifest
    assert first.state is State.RECOVERED
    assert "last whole block" in first.reason
    assert recover(tmp_path / "c").manifest == first
    assert any("recovered" in one for one in shortfalls(first))


def test_a_capture_stops_at_its_bytes_with_what_it_has(tmp_path: Path) -> None:
    recording = writer(tmp_path / "c", max_bytes=3000)
    with pytest.raises(Exception, match="3,000 bytes"):
        record(recording, range(1, 10_000))
    manifest = recording.close(State.COMPLETE)
    kept = list(read_capture(tmp_path / "c"))
    assert manifest.state is State.STOPPED
    assert manifest.offered == manifest.captured == len(kept) > 50
    assert shortfalls(manifest) == ["it is stopped: it has the 3,000 bytes that were allowed"]


def test_a_capture_that_was_stopped_can_be_gone_on_with(tmp_path: Path) -> None:
    recording = writer(tmp_path / "c")
    record(recording, range(1, 41))
    recording.close(State.STOPPED, "it was interrupted")
    found, lock = recover_to_go_on(tmp_path / "c", reason="")
    goes_on = CaptureWriter(
        tmp_path / "c",
        msgspec.structs.replace(found.manifest, state=State.RECORDING),
        found.account,
        lock=lock,
    )
    record(goes_on, range(found.account.seq + 1, 81))
    assert shortfalls(goes_on.close(State.COMPLETE)) == []
    assert list(read_capture(tmp_path / "c")) == [message(n) for n in range(1, 81)]


def test_a_directory_that_holds_something_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    with pytest.raises(BadInput, match="holds something"):
        writer(tmp_path / "c")


# -- the account --------------------------------------------------------------------------------------------


def test_what_the_log_no_longer_had_is_named() -> None:
    account = Account(created="a", first=1, seq=0, at_s=NOW)
    account.passes(1, NOW + 1)
    account.passes(5, NOW + 9)
    account.anew("b", NOW + 20)
    account.passes(1, NOW + 21)
    account.passes(1, NOW + 30)
    assert [(gap.messages, gap.after_s - NOW) for gap in account.gaps] == [(3, 1), (None, 9), (None, 21)]
    manifest = Manifest(
        id="x", state=State.COMPLETE, started_at_s=NOW, until_s=NOW, gaps=account.gaps, log=account.range()
    )
    assert len(shortfalls(manifest)) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"captured": 9}, "10 messages were offered and 9 captured"),
        ({"commands_offered": 2}, "2 commands were made and 0 captured"),
        ({"devices": {"a": (9, 0)}}, "are counted by device"),
        ({"state": State.STOPPED, "reason": "full"}, "it is stopped: full"),
        ({"gaps_more": 2}, "2 more gaps"),
    ],
)
def test_each_shortfall_is_said(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    captured(tmp_path / "c", 10)
    manifest = read_manifest(tmp_path / "c")
    assert shortfalls(manifest) == []
    assert any(said in one for one in shortfalls(msgspec.structs.replace(manifest, **change)))


def test_every_topic_of_a_device_is_recognised() -> None:
    kinds: dict[str, tuple[str, str] | None] = {
        "dt/car-1/gps/fine": ("car-1", "up"),
        "feed/legacy/car-1/gps": ("car-1", "feed"),
        "$aws/things/car-1/shadow/update": ("car-1", "up"),
        "$aws/things/car-1/shadow/name/fleetlift/get": ("car-1", "up"),
        "$aws/things/car-1/shadow/update/delta": ("car-1", "down"),
        "$aws/things/car-1/shadow/name/x/get/accepted": ("car-1", "down"),
        "$aws/commands/things/car-1/executions/7/request/json": ("car-1", "command"),
        "$aws/commands/things/car-1/executions/7/response/json": ("car-1", "up"),
        "$aws/commands/things/car-1/executions/7/response/rejected/json": ("car-1", "down"),
        "fleetlift/capture/1/begin": None,
        "dt": None,
        "dt/not a device/x": None,
    }
    for topic, expected in kinds.items():
        found = origin(topic)
        assert (None if found is None else (found.device, found.kind)) == expected, topic


def test_a_share_is_stable_and_a_larger_one_holds_a_smaller() -> None:
    devices = [f"car-{n}" for n in range(5000)]
    five, twenty = ({d for d in devices if in_share(d, percent)} for percent in (5, 20))
    assert five < twenty
    assert 180 < len(five) < 320
    assert sorted(five)[:3] == ["car-1024", "car-1035", "car-1039"]  # the same in every version
    assert all(in_share(d, 100) for d in devices)


def log_message(seq: int, topic: str, body: bytes) -> LogMessage:
    return LogMessage(seq, topic.replace("/", "."), topic, {"Nmqtt-Pub": "1"}, body, NOW + seq)


def recorded(directory: Path, log: Sequence[LogMessage], selection: Selection) -> Manifest:
    recording = writer(directory)
    recording.manifest = msgspec.structs.replace(recording.manifest, tenant=selection.tenant)
    recorder = Recorder(selection, Masker(Rules(), b"k" * 32), recording, "fleetlift/capture/")
    recorder.owners = {"a-1": "a", "a-2": "a", "b-1": "b", "b-2": "b"}
    for one in log:
        recorder.take(one)
    return recording.close(State.COMPLETE)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a-1", "a-2"]), st.booleans()), max_size=30), st.data())
def test_another_tenants_traffic_leaves_no_trace_in_a_capture(
    tmp_path_factory: pytest.TempPathFactory, mine: list[tuple[str, bool]], data: st.DataObject
) -> None:
    """Byte for byte the same files, whatever the other tenant sends; but for the operator's account."""
    directory = tmp_path_factory.mktemp("noninterference")
    a_log = [log_message(2 * n + 1, f"dt/{d}/gps", b'{"seq":%d}' % n) for n, (d, _) in enumerate(mine)]
    others = []
    for n, (_, busy) in enumerate(mine):
        if busy:
            device = data.draw(st.sampled_from(["b-1", "b-2", "nobody"]))
            body = data.draw(st.binary(max_size=50))
            others.append(log_message(2 * n + 2, f"dt/{device}/gps", body))
    selection = Selection(tenant="a")
    alone = [*a_log]
    if not others:
        return
    # The same numbers for tenant a: what is not there is another message of nobody's.
    quiet = [log_message(one.seq, "nobody/s", b"") for one in others]
    first = recorded(directory / "1", sorted([*alone, *quiet], key=lambda one: one.seq), selection)
    second = recorded(directory / "2", sorted([*alone, *others], key=lambda one: one.seq), selection)
    assert {one.device for one in read_capture(directory / "2")} <= {"a-1", "a-2"}
    assert first == second
    names = [path.name for path in sorted((directory / "1").iterdir()) if path.name != PROGRESS]
    for name in names:
        assert (directory / "1" / name).read_bytes() == (directory / "2" / name).read_bytes(), name


# -- masking ------------------------------------------------------------------------------------------------


_DEFAULTS = Rules()


def masked(body: str, rules: Rules = _DEFAULTS) -> str:
    return Masker(rules, b"k" * 32).payload(body.encode(), "car-1")[0].decode()


@pytest.mark.parametrize(
    "body",
    [
        '{"password": "hunter2"}',
        '{"wifi": {"PassWord": "hunter2"}}',
        '{"user_pass_word": ["hunter2"]}',
        '{"accessToken": "hunter2"}',
        '{"api-key": {"value": "hunter2"}}',
        '{"pass\\u0077ord": "hunter2"}',
        '{"log": "connecting with password=hunter2 now"}',
        '{"request": "{\\"credentials\\": \\"hunter2\\"}"}',
        '{"headers": ["Authorization: Bearer hunter2-hunter2"]}',
        '{"url": "https://me:hunter2@example.com/x"}',
        '[{"auth": "hunter2"}]',
        "password: hunter2",
        "GET /x?token=hunter2&n=1",
        '{"psk": 1, "secret": "hunter2"} trailing',
        '{"jwt": "x", "note": "eyJhbGciOi.eyJodW50ZXIy.hunter2"}',
        '{"state": {"desired": {"credential": "hunter2", "epoch": 3}}}',
        '{"password": "a", "password": "hunter2"}',
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
        "[" * 80 + '{"a": "token=hunter2"}' + "]" * 80,
    ],
)
def test_secrets_do_not_reach_a_capture(body: str) -> None:
    assert "hunter2" not in masked(body)


@pytest.mark.parametrize(
    "body",
    [
        '{"ts": 1, "seq": 2, "lat": 47.10, "pinned": true}',
        '{"text": "a spinning wheel, author unknown"}',
        '{"url": "https://example.com/x"}',
        "not json \\u0000",
        '{"x": 1.50, "note": "basic"}',
        "",
    ],
)
def test_bodies_without_secrets_stay_as_they_are(body: str) -> None:
    assert masked(body) == body


def test_a_masked_body_keeps_everything_else() -> None:
    assert json.loads(masked('{"seq": 7, "ts": 1.5, "token": "t", "big": 123456789012345678901}')) == {
        "seq": 7,
        "ts": 1.5,
        "token": "***",
        "big": 123456789012345678901,
    }


def test_binary_bodies_are_left_and_other_encodings_are_seen() -> None:
    masker = Masker(Rules(), b"k" * 32)
    binary = bytes(range(256))
    assert masker.payload(binary, "car-1") == (binary, 0)
    assert b"h\x00u" not in masker.payload('{"password": "hunter2"}'.encode("utf-16"), "car-1")[0]


def test_rules_can_be_added_and_names_be_kept() -> None:
    rules = Rules(
        words=("vin",), keep=("token_count",), texts=(r"plate (\w+)",), topics=(r"^dt/[^/]+/(\w+)$",)
    )
    assert json.loads(masked('{"VIN": "W1", "token_count": 3, "t": "plate AB12"}', rules)) == {
        "VIN": "***",
        "token_count": 3,
        "t": "plate ***",
    }
    assert Masker(rules, b"k" * 32).topic("dt/car-1/gps", "car-1")[0].startswith("dt/car-1/masked-")
    assert masked('{"token": "x"}', Rules(defaults=False)) == '{"token": "x"}'
    assert json.loads(masked('{"Geheimw\u00f6rter": "x"}', Rules(words=("w\u00f6rter",)))) == {
        "Geheimw\u00f6rter": "***"
    }
    for wrong in (Rules(texts=("(",)), Rules(topics=("no group",)), Rules(words=("-",))):
        with pytest.raises(BadInput, match="masking rule"):
            Masker(wrong, b"k" * 32)


def test_tokens_in_topics_are_masked_and_told_apart() -> None:
    masker = Masker(Rules(), b"k" * 32)
    one, other = (masker.topic(f"api/v1/{token}/telemetry", "car-1")[0] for token in ("A1B2", "C3D4"))
    assert one != other
    assert "A1B2" not in one
    assert one == masker.topic("api/v1/A1B2/telemetry", "car-1")[0]
    assert masker.topic("dt/car-1/gps", "car-1") == ("dt/car-1/gps", 0)


def test_pseudonyms_hide_a_device_and_keep_its_messages_together() -> None:
    masker = Masker(Rules(), b"k" * 32, pseudonyms=True)
    name = masker.device("car-1")
    assert masker.topic("dt/car-1/gps", "car-1")[0] == f"dt/{name}/gps"
    body, _ = masker.payload(b'{"id": "car-1", "next": "car-12"}', "car-1")
    assert json.loads(body) == {"id": name, "next": "car-12"}
    assert Masker(Rules(), b"k" * 32, pseudonyms=True).device("car-1") == name
    assert Masker(Rules(), b"j" * 32, pseudonyms=True).device("car-1") != name


# -- the mark of a replay -----------------------------------------------------------------------------------


def test_what_is_replayed_comes_from_a_replays_identity_only() -> None:
    sent = play(message(1), "replay-car-1", now=NOW)
    assert sent == Publish("replay-car-1", "dt/replay-car-1/gps", message(1).payload)
    response = message(1, body=b"{}")
    response = msgspec.structs.replace(
        response, topic="$aws/commands/things/car-1/executions/7/response/json"
    )
    answered = play(response, "replay-car-1", now=NOW)
    assert isinstance(answered, Publish)
    assert answered.topic == "$aws/commands/things/replay-car-1/executions/replay-7/response/json"
    with pytest.raises(BadInput, match="no identity of a replay"):
        play(message(1), "car-1", now=NOW)
    elsewhere = msgspec.structs.replace(message(1), topic="v1/devices/me/telemetry")
    assert isinstance(play(elsewhere, "replay-car-1", now=NOW), LeftOut)


def test_a_replayed_command_bears_every_mark() -> None:
    topic = "$aws/commands/things/car-1/executions/7/request/json"
    body = {"name": "unlock", "params": {"door": 1}, "mode": "execute", "expires_at": NOW - 1000}
    command = CapturedMessage("car-1", NOW, topic, 1, json.dumps(body).encode(), "down")
    sent = play(command, "replay-car-1", now=NOW)
    assert isinstance(sent, SendCommand)
    assert sent.topic == "$aws/commands/things/replay-car-1/executions/replay-7/request/json"
    assert json.loads(sent.payload) == {
        "name": "unlock",
        "params": {"door": 1},
        "mode": "dry-run",
        "replayed": True,
        "expires_at": NOW + 60,
    }
    delta = msgspec.structs.replace(command, topic="$aws/things/car-1/shadow/update/delta")
    assert isinstance(play(delta, "replay-car-1", now=NOW), LeftOut)  # it could order a device to move
    damaged = msgspec.structs.replace(command, payload=b"no json")
    assert isinstance(play(damaged, "replay-car-1", now=NOW), LeftOut)


def test_identities_that_could_be_real_are_refused() -> None:
    for names in ({"a": "a"}, {"a": "Replay-a"}, {"a": "replay-x", "b": "replay-x"}, {"a": "replay-/x"}):
        with pytest.raises(BadInput):
            checked_names(names)
    with pytest.raises(BadInput, match="is not replayed"):
        replay_id("replay-car-1")
    assert len(replay_id("c" * 128)) <= 128


@pytest.mark.parametrize(
    ("device", "tenant", "taken"),
    [
        ("car-1", "acme", True),
        ("replay-car-1", "replay", True),
        ("replay-car-1", "replay-acme", True),
        ("replay-car-1", "acme", False),
        ("REPLAY-car-1", "acme", False),
        ("car-1", "replay", False),
        ("car-1", "replay-acme", False),
        ("REPLAY-car-1", "replay", False),
    ],
)
def test_the_registry_keeps_real_devices_and_replays_apart(device: str, tenant: str, taken: bool) -> None:
    new = NewDevice(id=device, tenant=tenant)
    if taken:
        checked(new)
    else:
        with pytest.raises(BadInput, match="reserved for replays"):
            checked(new)


@pytest.mark.parametrize("path", [OLD, NEW])
@pytest.mark.parametrize("commands", ["old", "dry-run", "both", "new"])
@pytest.mark.parametrize("name", ["lock", PROBE_COMMAND])
def test_a_device_executes_nothing_that_bears_a_mark(path: m.Path, commands: str, name: str) -> None:
    """Whatever its flags, by whichever side: neither the mark alone nor the id alone is executed, and a
    replayed probe proves nothing."""
    world = World()
    world.order(OLD, orders(1, flags("both", commands)))
    world.probe()
    world.run(5)
    world.agent.on(m.CommandReceived(path, "7", name, b"{}", False, world.now + 99, True), world.now)
    world.command(path, "replay-8", name)
    world.command(path, "REPLAY-9", "unknown")
    world.run(5)
    assert world.executed == []
    said = world.sides[path].final("replay-8") + world.sides[path].final("7")
    assert said
    assert set(said) <= {m.AnswerStatus.WOULD_EXECUTE, m.AnswerStatus.WOULD_REFUSE}
    world.command(path, "real", "lock")
    world.run(5)
    executes = {OLD: ("old", "dry-run", "both"), NEW: ("both", "new")}[path]
    assert world.executed == (["real"] if commands in executes else [])


@pytest.mark.parametrize(
    ("request_", "executes", "replayed"),
    [
        ({}, True, False),
        ({"replayed": False}, True, False),
        ({"replayed": None}, True, False),
        ({"replayed": True}, True, True),
        ({"replayed": "no"}, True, True),
        ({"replayed": 0}, True, True),
        ({"mode": "dry-run"}, False, False),
        ({"mode": "rehearse"}, False, False),
        ({"mode": ""}, False, False),
    ],
)
async def test_a_link_takes_every_doubtful_mark_for_one(
    request_: dict[str, Any], executes: bool, replayed: bool
) -> None:
    events: list[m.Event] = []

    class Host:
        device, key, firmware = "car-1", "", ""

        def event(self, link: object, event: m.Event) -> None:
            events.append(event)

        def after_stored(self, call: Callable[[], None]) -> None:
            call()

    link = MqttLink(Host(), "secret")
    body = {"name": "lock", "params": {}, "mode": "execute", "expires_at": NOW, **request_}
    topic = "$aws/commands/things/car-1/executions/7/request/json"
    link.data_received(mqtt.publish(topic, json.dumps(body).encode(), qos=1, packet_id=1))
    (event,) = events
    assert isinstance(event, m.CommandReceived)
    assert (not event.dry_run, event.replayed) == (executes, replayed)


def test_positions_stand_only_for_what_has_ended_before_them() -> None:
    ends = Ends(10, Tally(total=20, acknowledged=10))
    first, second, third = ends.began(), ends.began(), ends.began()
    ends.ended(second, "acknowledged", times=1)
    ends.ended(third, "left_out", "why")
    assert (ends.done, ends.tally.acknowledged) == (10, 10)
    ends.ended(first, "acknowledged", times=2)
    assert (ends.done, ends.tally.acknowledged, ends.tally.again, ends.tally.played) == (13, 12, 1, 2)
    assert (ends.tally.left_out, ends.tally.open, ends.tally.reasons) == (1, 7, {"why": 1})
