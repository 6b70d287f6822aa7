"""The MQTT 3.1.1 codec: what it writes it reads, what it cannot read it refuses, and it is bounded."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core import mqtt
from fleetlift.core.mqtt import BadPacket, Decoder, encode

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
TOPIC = st.text(st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=40)
ID = st.integers(1, 0xFFFF)
QOS = st.integers(0, 1)
WILL = st.builds(mqtt.Will, topic=TOPIC, payload=st.binary(max_size=40), qos=QOS, retain=st.booleans())


@st.composite
def connects(draw: st.DrawFn) -> mqtt.Connect:
    username = draw(st.none() | TEXT)
    clean = draw(st.booleans())
    return mqtt.Connect(
        client_id=draw(TEXT if clean else TOPIC),
        clean=clean,
        keep_alive_s=draw(st.integers(0, 0xFFFF)),
        username=username,
        password=draw(st.none() | st.binary(max_size=40)) if username is not None else None,
        will=draw(st.none() | WILL),
    )


@st.composite
def publishes(draw: st.DrawFn) -> mqtt.Publish:
    qos = draw(QOS)
    return mqtt.Publish(
        draw(TOPIC),
        draw(st.binary(max_size=300)),
        qos,
        draw(ID) if qos else 0,
        draw(st.booleans()),
        draw(st.booleans()) if qos else False,
    )


PACKETS = st.one_of(
    connects(),
    publishes(),
    st.builds(mqtt.ConnAck, st.booleans(), st.integers(0, 255)),
    st.builds(mqtt.PubAck, ID),
    st.builds(mqtt.Subscribe, ID, st.lists(st.tuples(TEXT, QOS), min_size=1, max_size=4).map(tuple)),
    st.builds(mqtt.SubAck, ID, st.lists(st.sampled_from([0, 1, 2, 128]), min_size=1, max_size=4).map(tuple)),
    st.builds(mqtt.Unsubscribe, ID, st.lists(TEXT, min_size=1, max_size=4).map(tuple)),
    st.builds(mqtt.UnsubAck, ID),
    st.just(mqtt.PingReq()),
    st.just(mqtt.PingResp()),
    st.just(mqtt.Disconnect()),
)


@given(st.lists(PACKETS, max_size=5), st.integers(1, 64))
def test_what_is_written_is_read_back_however_the_bytes_are_cut(packets: list[mqtt.Packet], cut: int) -> None:
    wire = b"".join(map(encode, packets))
    decoder = Decoder()
    got: list[mqtt.Packet] = []
    for at in range(0, len(wire), cut):
        got += decoder.feed(wire[at : at + cut])
    assert got == packets


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_garbage_is_refused_or_waited_for_but_never_crashes(chunks: list[bytes]) -> None:
    decoder = Decoder(max_packet=1000)
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except BadPacket:
        return
    assert len(decoder._buffer) <= 1005


@given(PACKETS, st.data())
def test_a_damaged_packet_is_refused_or_read_as_some_packet(packet: mqtt.Packet, data: st.DataObject) -> None:
    wire = bytearray(encode(packet))
    wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(BadPacket):
        Decoder(max_packet=1000).feed(bytes(wire))


def test_connect_is_the_standards_own_example() -> None:
    """Section 3.1.2, figure 3.6: user, password, will QoS 1, clean session, keep alive 10."""
    wire = encode(
        mqtt.Connect(
            client_id="d",
            clean=True,
            keep_alive_s=10,
            username="u",
            password=b"p",
            will=mqtt.Will(topic="w", payload=b"!", qos=1),
        )
    )
    assert wire[2:12] == bytes((0, 4)) + b"MQTT" + bytes((4, 0b11001110, 0, 10))
    assert wire[12:] == b"\0\1d\0\1w\0\1!\0\1u\0\1p"


@pytest.mark.parametrize(
    ("length", "field"),
    [(0, "00"), (127, "7f"), (128, "8001"), (16_383, "ff7f"), (16_384, "808001"), (268_435_455, "ffffff7f")],
)
def test_the_length_field_follows_table_2_4(length: int, field: str) -> None:
    assert mqtt.remaining_length(length).hex() == field


def test_a_packet_longer_than_allowed_is_refused_before_it_has_come() -> None:
    with pytest.raises(BadPacket, match="2000 bytes: 1000 are allowed"):
        Decoder(max_packet=1000).feed(b"\x30" + mqtt.remaining_length(2000))


@pytest.mark.parametrize(
    "wire",
    [
        b"\x36\x05\x00\x01a\x00\x01",  # QoS 3
        b"\x34\x05\x00\x01a\x00\x01",  # QoS 2
        b"\x32\x05\x00\x01a\x00\x00",  # QoS 1 with packet id 0
        b"\x30\x03\x00\x01+",  # a wildcard in a topic
        b"\x30\x01\x00",  # shorter than its topic
        b"\x40\x03\x00\x01\x00",  # PUBACK with a byte too many
        b"\x41\x02\x00\x01",  # reserved flags set
        b"\x90\x03\x00\x01\x03",  # a SUBACK code that does not exist
        b"\x30\xff\xff\xff\xff\x7f",  # a length field of five bytes
        b"\xf0\x00",  # MQTT 5's AUTH
    ],
)
def test_what_the_standard_forbids_is_refused(wire: bytes) -> None:
    with pytest.raises(BadPacket):
        Decoder().feed(wire)


@pytest.mark.parametrize(
    "packet",
    [
        mqtt.Connect(client_id="d", password=b"p"),
        mqtt.Connect(client_id="", clean=False),
        mqtt.Publish("a/+", b""),
        mqtt.Publish("a", b"", 2, 1),
        mqtt.Publish("a", b"", 1, 0),
        mqtt.Subscribe(1, ()),
        mqtt.Publish("a\0", b""),
        mqtt.Publish("x" * 70_000, b""),
    ],
)
def test_what_the_standard_forbids_is_not_written(packet: mqtt.Packet) -> None:
    with pytest.raises(BadPacket):
        encode(packet)


def test_many_packets_in_pieces_of_any_size_come_out_one_by_one() -> None:
    payload = b"x" * 200
    wire = b"".join(mqtt.publish("dt/veh-1/obd", payload, qos=1, packet_id=n) for n in range(1, 20_001))
    decoder = Decoder()
    count = sum(len(decoder.feed(wire[at : at + 65_536])) for at in range(0, len(wire), 65_536))
    assert count == 20_000
