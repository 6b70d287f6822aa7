"""What is accepted as telemetry, and the reason why the rest is not."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.telemetry import (
    DEAD_LETTER_BYTES,
    HEADER_RECEIVED,
    HEADER_SEQ,
    HEADER_TS,
    MAX_BODY_BYTES,
    MAX_SEQ,
    DeadLetter,
    Telemetry,
    parse,
)

AT = 1_700_000_000.25


def accepted(body: bytes | dict[str, Any], topic: str = "dt/d1/gps", **headers: str) -> Telemetry:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = parse(topic, {k.replace("_", "-"): v for k, v in headers.items()}, payload, AT)
    assert isinstance(found, Telemetry), found
    return found


def refused(body: bytes | dict[str, Any], topic: str = "dt/d1/gps", **headers: str) -> DeadLetter:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = parse(topic, {k.replace("_", "-"): v for k, v in headers.items()}, payload, AT)
    assert isinstance(found, DeadLetter), found
    return found


def test_a_devices_message_gives_device_channel_time_and_count() -> None:
    found = accepted({"ts": 1_700_000_000, "seq": 7, "lat": 1.5}, "dt/car-1/gps/raw")
    assert (found.device, found.channel, found.path) == ("car-1", "gps/raw", "mqtt")
    assert (found.ts_ms, found.seq, found.msg_key) == (1_700_000_000_000, 7, 7)
    assert found.received_at == AT
    assert found.delay_s == 0.25


@pytest.mark.parametrize(
    ("ts", "ms"),
    [
        (0, 0),
        (1_700_000_000, 1_700_000_000_000),
        (1_700_000_000.1234, 1_700_000_000_123),
        (1_700_000_000_123, 1_700_000_000_123),
        (99_999_999_999, 99_999_999_999_000),
        (100_000_000_000, 100_000_000_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500),
        ("2023-11-14T22:13:20.123456Z", 1_700_000_000_123),
    ],
)
def test_a_time_may_be_seconds_milliseconds_or_rfc_3339(ts: Any, ms: int) -> None:
    assert accepted({"ts": ts}).ts_ms == ms


@pytest.mark.parametrize("ts", [-1, 1e300, True, [], {}, "yesterday", "2023-11-14T22:13:20", "", 1e15])
def test_other_times_are_refused(ts: Any) -> None:
    assert refused({"ts": ts}).reason.startswith("ts: ")


@pytest.mark.parametrize("body", [b"{}", b'{"ts":null}', b"[1,2]", b"3.5", b'"on"'])
def test_without_a_time_the_logs_own_holds(body: bytes) -> None:
    """Any JSON is telemetry; what has no time is dated by its receipt, what has no count is not counted."""
    found = accepted(body)
    assert (found.ts_ms, found.ts_given, found.seq) == (1_700_000_000_250, False, None)
    assert found.delay_s == 0


def test_without_a_count_a_message_is_known_by_its_body() -> None:
    one, same, other = (accepted(b) for b in (b'{"ts":1,"v":1}', b'{"ts":1,"v":1}', b'{"ts":1,"v":2}'))
    assert one.msg_key == same.msg_key != other.msg_key
    assert one.msg_key < 0


@pytest.mark.parametrize("seq", [0, 5, MAX_SEQ, 5.0, None])
def test_counts_are_integers_from_zero(seq: Any) -> None:
    assert accepted({"seq": seq}).seq == seq


@pytest.mark.parametrize("seq", [-1, MAX_SEQ + 1, 2**63, 10**40, 1.5, True, False, "5", [], {}])
def test_other_counts_are_refused(seq: Any) -> None:
    assert refused({"seq": seq}).reason.startswith("seq: ")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":-Infinity}', "not JSON"),
        (b'{"a":1e999}', "not JSON"),
        (b'{"a":"\\ud800"}', "not JSON"),
        (b'{"a":1}{"b":2}', "not JSON"),
        (b'{"a":"\xff"}', "not UTF-8"),
        (b"[" * 65 + b"]" * 65, "nested deeper"),
        (b"[" * 100_000, "nested deeper"),
        (b'"' + b"x" * MAX_BODY_BYTES + b'"', "bytes"),
    ],
)
def test_a_body_that_cannot_be_stored_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    letter = refused(body)
    assert reason in letter.reason
    assert (letter.device, letter.path, letter.topic) == ("d1", "mqtt", "dt/d1/gps")
    assert letter.payload == body[:DEAD_LETTER_BYTES]
    assert letter.payload_bytes == len(body)
    assert letter.received_at == AT


def test_nesting_and_size_are_accepted_up_to_their_limits() -> None:
    accepted(b"[" * 64 + b"]" * 64)
    accepted(json.dumps([{"v": "[{" * 100}] * 200).encode())
    accepted(b'"' + b"x" * (MAX_BODY_BYTES - 2) + b'"')


@pytest.mark.parametrize(
    "topic",
    [
        *("dt", "dt/", "dt/d1", "dt/d1/", "dt//gps", "dt/d.1/gps", "x/d1/gps", ""),
        *("feed", "feed/legacy/d1", "feed//d1/gps", "feed/mqtt/d1/gps"),
        *("dt/d1/" + "x" * 513, "dt/d1/a\x00b"),
    ],
)
def test_topics_without_device_and_channel_are_refused(topic: str) -> None:
    letter = refused(b"{}", topic)
    assert letter.reason.startswith("topic: ")
    assert "\x00" not in letter.topic


def test_the_old_sides_feed_brings_its_own_time_count_and_receipt() -> None:
    """In a feed's message the headers hold, not the body, and the path is the side's name."""
    found = accepted(
        {"ts": 5, "seq": 5},
        "feed/legacy/car-1/gps",
        **{HEADER_TS: "1700000000.123", HEADER_SEQ: "42", HEADER_RECEIVED: "1700000000.5"},
    )
    assert (found.path, found.device, found.channel) == ("legacy", "car-1", "gps")
    assert (found.ts_ms, found.seq, found.received_at) == (1_700_000_000_123, 42, 1_700_000_000.5)


def test_a_message_has_one_identity_on_both_paths() -> None:
    """A device's time in seconds, its own or by the old side, is the same millisecond."""
    direct = accepted({"ts": 1700000000.1235, "seq": 3})
    fed = accepted(b"{}", "feed/legacy/d1/gps", **{HEADER_TS: "1700000000.1235", HEADER_SEQ: "3"})
    assert (direct.ts_ms, direct.msg_key) == (fed.ts_ms, fed.msg_key)


@pytest.mark.parametrize(
    "headers",
    [
        *({HEADER_TS: "x"}, {HEADER_TS: "nan"}, {HEADER_TS: "-1"}, {HEADER_RECEIVED: "inf"}),
        *({HEADER_SEQ: "-1"}, {HEADER_SEQ: "1.5"}, {HEADER_SEQ: "9" * 5000}, {HEADER_SEQ: "²"}),
    ],
)
def test_a_feed_with_headers_that_make_no_sense_is_refused(headers: dict[str, str]) -> None:
    assert refused(b"{}", "feed/legacy/d1/gps", **headers).reason.startswith("Fleetlift-")


@given(
    topic=st.one_of(st.text(), st.sampled_from(["dt/d1/gps", "feed/legacy/d1/gps"])),
    headers=st.dictionaries(st.sampled_from([HEADER_TS, HEADER_SEQ, HEADER_RECEIVED]), st.text()),
    payload=st.binary(),
    at=st.floats(0, 4e9),
)
def test_no_bytes_make_it_raise(topic: str, headers: dict[str, str], payload: bytes, at: float) -> None:
    found = parse(topic, headers, payload, at)
    assert isinstance(found, Telemetry | DeadLetter)
    if isinstance(found, DeadLetter):
        assert found.reason
        found.topic.encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["ts", "seq", "v"]), inner),
    )
)
def test_any_json_is_stored_or_refused_with_a_reason(value: Any) -> None:
    found = parse("dt/d1/x", None, json.dumps(value).encode(), AT)
    if isinstance(found, Telemetry):
        assert json.loads(found.body) == value
        assert -(2**63) <= found.msg_key <= MAX_SEQ
    else:
        assert found.reason.split(":")[0] in {"body", "ts", "seq"}
