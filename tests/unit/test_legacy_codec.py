"""The legacy protocol: what is encoded comes back, and nothing else is believed."""

import re
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlift.core import legacy
from fleetlift.core.errors import BadInput
from fleetlift.core.legacy import (
    MAX_BODY_BYTES,
    MESSAGES,
    Ack,
    BadFrame,
    Decoder,
    DeviceEntry,
    FeedBatch,
    FrameFault,
    Heartbeat,
    Item,
    Login,
    Message,
    OwnerLogin,
    RegisterDevice,
    ReportEntry,
    Telemetry,
    TelemetryAck,
    encode,
)

DOCS = Path(__file__).parents[2] / "docs" / "legacy-protocol.md"
FRAME = encode(Telemetry("gps", 7, 1_700_000_000_000, b'{"lat":52.5}'))

U63 = st.integers(0, 2**63 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
SHORT = st.text(st.characters(codec="utf-8"), max_size=60)
BYTES = st.binary(max_size=200)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "u16": st.integers(0, 2**16 - 1),
    "u32": st.integers(0, 2**32 - 1),
    "u63": U63,
    "i64": I64,
    "bool": st.booleans(),
    "text8": SHORT,
    "text16": st.text(st.characters(codec="utf-8"), max_size=400),
    "json32": BYTES,
    "mode": st.sampled_from(legacy.Mode),
    "status": st.sampled_from(legacy.ReplyStatus),
    "code": st.sampled_from(legacy.ErrorCode),
    "list of Ack": st.lists(st.builds(Ack, SHORT, U63), max_size=5).map(tuple),
    "list of DeviceEntry": st.lists(st.builds(DeviceEntry, SHORT, st.booleans(), I64, BYTES), max_size=5).map(
        tuple
    ),
    "list of ReportEntry": st.lists(st.builds(ReportEntry, SHORT, I64, BYTES), max_size=5).map(tuple),
    "list of item": st.lists(
        st.one_of(
            st.builds(legacy.TelemetryItem, U63, SHORT, I64, SHORT, U63, I64, BYTES),
            st.builds(legacy.AnswerItem, U63, SHORT, I64, SHORT, st.sampled_from(legacy.ReplyStatus), BYTES),
            st.builds(legacy.PresenceItem, U63, SHORT, I64, st.booleans(), SHORT),
            st.builds(legacy.ReportItem, U63, SHORT, I64, BYTES),
        ),
        max_size=5,
    ).map(tuple),
}


def _messages(of: type[Any]) -> st.SearchStrategy[Message]:
    parts = [FIELDS[field.name] for field in MESSAGES[of][1]]
    if "more" in of.__struct_fields__:
        parts.insert(1, st.booleans())
    return st.builds(of, *parts)


ANY_MESSAGE = st.sampled_from(list(MESSAGES)).flatmap(_messages)


@given(st.lists(ANY_MESSAGE, max_size=6), st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_messages_come_back_as_they_were_however_the_stream_is_cut(
    messages: list[Message], cuts: list[int]
) -> None:
    stream = b"".join(map(encode, messages))
    decoder = Decoder()
    read: list[Message] = []
    at = turn = 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        read += decoder.feed(stream[at : at + step])
        at, turn = at + step, turn + 1
    assert read == messages
    assert decoder.held_bytes == 0


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_garbage_ends_in_a_typed_error_and_holds_no_more_than_one_frame(chunks: list[bytes]) -> None:
    decoder = Decoder(max_body_bytes=1000)
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            assert decoder.held_bytes <= 1000 + legacy.HEADER_BYTES + legacy.CHECKSUM_BYTES
    except BadFrame as fault:
        assert fault.fault in FrameFault


@given(st.sampled_from(list(MESSAGES)), st.binary(max_size=120), st.sampled_from([0, 1]))
def test_any_body_under_a_good_checksum_is_a_message_or_a_fault_of_its_field(
    of: type[Any], body: bytes, flags: int
) -> None:
    frame = legacy.MAGIC + bytes([1, MESSAGES[of][0]]) + flags.to_bytes(2) + len(body).to_bytes(4) + body
    try:
        (message,) = Decoder().feed(frame + zlib.crc32(frame).to_bytes(4))
    except BadFrame as fault:
        assert fault.fault in (FrameFault.FIELD, FrameFault.FLAGS)
    else:
        assert isinstance(message, of)
        assert encode(message)[: len(frame)] == frame


@settings(max_examples=200)
@given(st.integers(0, len(FRAME) - 1), st.integers(1, 255))
def test_one_changed_byte_never_passes_as_a_message(at: int, change: int) -> None:
    broken = FRAME[:at] + bytes([FRAME[at] ^ change]) + FRAME[at + 1 :]
    decoder = Decoder()
    try:
        assert decoder.feed(broken) == []  # a longer length: it waits for the rest
        for _ in range(MAX_BODY_BYTES // 4096 + 2):
            assert decoder.feed(bytes(4096)) == []
    except BadFrame:
        return
    pytest.fail("a broken frame was neither refused nor found out by its checksum")


def _with_checksum(frame: bytes) -> bytes:
    return frame + zlib.crc32(frame).to_bytes(4)


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", FrameFault.MAGIC),
        (b"G", FrameFault.MAGIC),
        (b"CX", FrameFault.MAGIC),
        (bytes.fromhex("434c 02 0b 0000 00000000"), FrameFault.VERSION),
        (bytes.fromhex("434c 01 0b 8000 00000000"), FrameFault.FLAGS),
        (_with_checksum(bytes.fromhex("434c 01 0b 0001 00000000")), FrameFault.FLAGS),
        (bytes.fromhex("434c 01 04 0000 00100001"), FrameFault.OVERSIZE),
        (_with_checksum(bytes.fromhex("434c 01 7f 0000 00000000")), FrameFault.TYPE),
        (bytes.fromhex("434c 01 0b 0000 00000000 00000000"), FrameFault.CHECKSUM),
        (_with_checksum(bytes.fromhex("434c 01 0b 0000 00000001 00")), FrameFault.FIELD),
        (_with_checksum(bytes.fromhex("434c 01 0d 0000 00000002 0161")), None),
        (_with_checksum(bytes.fromhex("434c 01 0d 0000 00000002 01ff")), FrameFault.FIELD),
        (_with_checksum(bytes.fromhex("434c 01 0d 0000 00000002 0961")), FrameFault.FIELD),
    ],
)
def test_each_fault_is_named_as_soon_as_it_can_be_seen(stream: bytes, fault: FrameFault | None) -> None:
    decoder = Decoder()
    if fault is None:
        assert len(decoder.feed(stream)) == 1
        return
    with pytest.raises(BadFrame) as caught:
        decoder.feed(stream)
    assert caught.value.fault is fault
    with pytest.raises(BadFrame):  # a broken stream stays broken
        decoder.feed(encode(Heartbeat()))


def test_good_frames_before_a_bad_one_are_handed_over_with_the_error() -> None:
    with pytest.raises(BadFrame) as caught:
        Decoder().feed(encode(Heartbeat()) + FRAME + b"nonsense that is long enough")
    assert [type(message) for message in caught.value.before] == [Heartbeat, Telemetry]


@pytest.mark.parametrize(
    "message",
    [
        Telemetry("x" * 256, 1, 0, b"{}"),
        Telemetry("gps", -1, 0, b"{}"),
        Telemetry("gps", 2**63, 0, b"{}"),
        Telemetry("gps", 1, 2**63, b"{}"),
        Telemetry("gps", 1, 0, bytes(MAX_BODY_BYTES)),
        TelemetryAck(tuple(Ack("gps", n) for n in range(65_536))),
        FeedBatch(2**32, 0),
    ],
)
def test_what_does_not_fit_into_a_frame_is_refused_by_the_sender(message: Message) -> None:
    with pytest.raises(BadInput):
        encode(message)


def test_keys_do_not_show_when_a_message_is_printed() -> None:
    for message in (
        Login("car-1", "secret"),
        OwnerLogin("secret"),
        RegisterDevice(1, "car-1", "secret", b"{}"),
    ):
        assert "secret" not in repr(message)


def test_the_protocol_page_shows_every_message_with_its_fields_and_true_bytes() -> None:
    sections = re.split(r"^### 0x", DOCS.read_text(), flags=re.MULTILINE)[1:]
    names = {of: re.sub(r"(?<!^)(?=[A-Z])", "_", of.__name__).upper() for of in MESSAGES}
    assert [section.splitlines()[0] for section in sections] == [
        f"{type_:02x} {names[of]}" for of, (type_, _) in MESSAGES.items()
    ]
    for section, (of, (_, fields)) in zip(sections, MESSAGES.items(), strict=True):
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", section, flags=re.MULTILINE)
        own = [name for name in of.__struct_fields__ if name != "more"]
        kinds = [field.name.split()[0] for field in fields]
        assert rows == list(zip(own, kinds, strict=True)), names[of]
        (block,) = re.findall(r"```frame\n(.*?)\n(.*?)```", section, flags=re.DOTALL)
        message = eval(block[0], vars(legacy))  # our own page, in our own words
        assert type(message) is of
        assert encode(message) == bytes.fromhex(block[1]), names[of]
        assert Decoder().feed(bytes.fromhex(block[1])) == [message]


def test_every_item_kind_is_a_struct_that_names_position_device_and_time() -> None:
    for of in Item.__args__:
        assert of.__struct_fields__[:3] == ("position", "device", "at_ms")
        assert issubclass(of, msgspec.Struct)
