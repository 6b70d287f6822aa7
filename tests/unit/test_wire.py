"""The thin NATS client takes a stream of bytes apart, however the network cuts it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.bus.wire import Wire, format_headers, parse_headers

MESSAGE = st.tuples(st.sampled_from([b"", b"r.1"]), st.booleans(), st.binary(max_size=60))


def encoded(reply: bytes, with_headers: bool, payload: bytes) -> bytes:
    head = b" ".join(filter(None, (b"a.b", b"1", reply)))
    if with_headers:
        block = format_headers({"Nmqtt-Pub": "1"})
        return b"HMSG %s %d %d\r\n%s%s\r\n" % (head, len(block), len(block) + len(payload), block, payload)
    return b"MSG %s %d\r\n%s\r\n" % (head, len(payload), payload)


@given(st.lists(MESSAGE, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_every_message_comes_out_once_whatever_the_chunks(
    messages: list[tuple[bytes, bool, bytes]], sizes: list[int]
) -> None:
    """Payloads may hold line ends and protocol words; chunks may end anywhere."""
    stream = b"".join(encoded(*message) for message in messages)
    came: list[tuple[bytes, bool, bytes]] = []

    async def feed() -> None:
        wire = Wire("u", "p", "t", lambda s, reply, block, body: came.append((reply, bool(block), body)))
        position = turn = 0
        while position < len(stream):
            size = sizes[turn % len(sizes)]
            wire.data_received(stream[position : position + size])
            position, turn = position + size, turn + 1

    asyncio.run(feed())
    assert came == messages


def test_headers_come_back() -> None:
    block = format_headers({"Fleetlift-Ts": "1.5", "Fleetlift-Seq": "7"})
    assert parse_headers(block) == ("", {"Fleetlift-Ts": "1.5", "Fleetlift-Seq": "7"})
    assert parse_headers(b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 3\r\n\r\n") == (
        "408 Request Timeout",
        {"Nats-Pending-Messages": "3"},
    )


def test_a_header_cannot_smuggle_a_line() -> None:
    with pytest.raises(ValueError, match="line break"):
        format_headers({"A": "b\r\nNmqtt-Pub: 1"})
