"""Who comes, where to, and how fast they are let go."""

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core import mqtt
from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.peek import NAME_CHARS_MAX, OTHER, PEEK_BYTES_MAX, Peek, peek
from fleetlift.core.relaying import (
    Pace,
    ProxyHeader,
    Router,
    Routes,
    To,
    checked_routes,
    client_of,
    place,
    proxy_header,
    replaced,
)

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)


@given(NAMES, st.none() | NAMES, st.booleans(), st.data())
def test_a_client_is_known_by_its_first_bytes_however_they_come(
    client: str, username: str | None, with_will: bool, data: st.DataObject
) -> None:
    will = mqtt.Will(topic="will", payload=b"x" * 300) if with_will else None
    whole = mqtt.encode(mqtt.Connect(client_id=client, username=username, password=None, will=will))
    wanted = Peek(protocol="mqtt", client_id=client, username=username or "")
    assert peek(whole) == peek(whole + b"and what follows") == wanted
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert peek(whole[:cut]) is None or peek(whole[:cut]) == wanted


def connect_5(client: bytes, username: bytes) -> bytes:
    """MQTT 5 with properties, and a will of QoS 2 with properties of its own."""

    def blob(data: bytes) -> bytes:
        return len(data).to_bytes(2, "big") + data

    body = b"\0\4MQTT\5\xd6\0\x3c" + b"\5\x11\0\0\0\x0a" + blob(client)
    body += b"\5\x18\0\0\0\5" + blob(b"will/topic") + blob(b"gone") + blob(username) + blob(b"password")
    return b"\x10" + mqtt.remaining_length(len(body)) + body


def test_every_version_of_mqtt_is_read() -> None:
    assert peek(connect_5(b"car-5", b"user")) == Peek(protocol="mqtt", client_id="car-5", username="user")
    old = b"\0\6MQIsdp\3\2\0\x3c\0\5car-3"
    assert peek(b"\x10" + bytes([len(old)]) + old) == Peek(protocol="mqtt", client_id="car-3")


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sent = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return sent.read()


def test_the_server_name_of_tls_is_read() -> None:
    hello = client_hello("iot.example.com")
    wanted = Peek(protocol="tls", server_name="iot.example.com")
    assert peek(hello) == peek(hello + b"more") == wanted
    assert all(peek(hello[:cut]) is None for cut in range(len(hello)))
    assert peek(client_hello(None)) == Peek(protocol="tls")
    body = hello[5:]
    pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
    cut = b"".join(b"\x16\3\1" + len(piece).to_bytes(2, "big") + piece for piece in pieces)
    assert peek(cut) == wanted, "a ClientHello in several records"


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x10", b"\x16\3\1", b"\x10\x7f\0\4MQTT\4", b"\x10\x20\0\4MQTT\5"]),
)
def test_rubbish_gets_an_answer(data: bytes, start: bytes) -> None:
    found = peek(start + data)
    assert found is None or isinstance(found, Peek)
    assert peek((start + data).ljust(PEEK_BYTES_MAX, b"\xff")) is not None


def test_a_connect_that_never_ends_is_named_by_its_beginning() -> None:
    body = b"\0\4MQTT\4\xc6\0\x3c\0\5car-1" + b"\0\4will" + b"\xff\xff" + b"x" * 70_000
    endless = b"\x10" + mqtt.remaining_length(200_000) + body
    assert peek(endless[:1000]) is None
    found = peek(endless[:PEEK_BYTES_MAX])
    assert found == Peek(protocol="mqtt", client_id="car-1")
    long = mqtt.encode(mqtt.Connect(client_id="x" * 5000))
    seen = peek(long)
    assert seen is not None and len(seen.client_id) == NAME_CHARS_MAX


def test_names() -> None:
    assert client_of(Peek(client_id="a", username="b"), "192.0.2.1") == "a"
    assert client_of(Peek(username="b"), "192.0.2.1") == "b"
    assert client_of(Peek(server_name="iot.example.com"), "192.0.2.1") == "iot.example.com@192.0.2.1"
    assert client_of(OTHER, "192.0.2.1") == "192.0.2.1"


@given(st.lists(NAMES, max_size=50), st.floats(0, 100), st.floats(0, 100))
def test_a_larger_share_holds_all_of_a_smaller_one(names: list[str], one: float, other: float) -> None:
    small, large = (Router(Routes(share_percent=share)) for share in sorted((one, other)))
    for name in names:
        assert 0 <= place(name) < 100
        assert small.side(name) is To.OLD or large.side(name) is To.NEW


def test_the_most_particular_rule_counts() -> None:
    router = Router(
        Routes(
            default=To.NEW,
            devices={"test-odd-7": To.NEW},
            prefixes={"test-": To.OLD, "test-odd-": To.OLD, "t": To.NEW},
        )
    )
    found = {name: router.side(name) for name in ("test-odd-7", "test-odd-8", "test-1", "tram", "car")}
    assert [side.value for side in found.values()] == ["new", "old", "old", "new", "new"]
    assert Router(Routes(share_percent=100, default=To.OLD)).side("x") is To.NEW
    assert Router(Routes(share_percent=100, prefixes={"x": To.OLD})).side("x") is To.OLD


@given(st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_older_epoch_never_replaces_a_newer_one(held: int, given_: int, same: bool) -> None:
    before = Routes(epoch=held)
    after = Routes(epoch=given_, default=To.OLD if same else To.NEW)
    if given_ > held or (given_ == held and same):
        assert replaced(before, after) == after
    else:
        with pytest.raises(Conflict):
            replaced(before, after)


def test_bad_tables() -> None:
    for routes in (
        Routes(epoch=-1),
        Routes(share_percent=100.1),
        Routes(share_percent=float("nan")),
        Routes(prefixes={"": To.NEW}),
        Routes(ttl_s=float("inf")),
    ):
        with pytest.raises(BadInput):
            checked_routes(routes)


@given(st.floats(0.1, 1000), st.lists(st.floats(0, 0.2), min_size=1, max_size=300))
def test_a_pace_is_never_exceeded_in_any_second(rate: float, delays: list[float]) -> None:
    """Also when its caller was late, and has much to make up for."""
    pace, now, gone = Pace(rate), 0.0, []
    for delay in delays:
        now += delay
        now += pace.wait_s(now)
        pace.went(now)
        gone.append(now)
    most = max(1, int(rate))
    for first, later in zip(gone, gone[most:], strict=False):
        assert later - first >= most / rate - 1e-6


def test_a_new_rate_keeps_its_distance() -> None:
    slow, fast = Pace(1), Pace(100)
    slow.went(10.0)
    fast.begin_after(slow)
    assert fast.wait_s(10.0) == pytest.approx(0.01)
    for rate in (0, -1, float("nan"), 1e9):
        with pytest.raises(BadInput):
            Pace(rate)


def test_the_proxy_header_says_who_came() -> None:
    four, six = ("192.0.2.1", 1000), ("2001:db8::1", 2000)
    assert proxy_header(ProxyHeader.NONE, four, four) == b""
    assert proxy_header(ProxyHeader.V1, four, ("198.51.100.1", 1883)) == (
        b"PROXY TCP4 192.0.2.1 198.51.100.1 1000 1883\r\n"
    )
    assert proxy_header(ProxyHeader.V1, six, six) == b"PROXY TCP6 2001:db8::1 2001:db8::1 2000 2000\r\n"
    assert proxy_header(ProxyHeader.V1, four, six) == b"PROXY UNKNOWN\r\n"
    header = proxy_header(ProxyHeader.V2, six, six)
    assert header[:16] == b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24" and len(header) == 16 + 36
    assert proxy_header(ProxyHeader.V2, four, six)[12:] == b"\x21\0\0\0"
    mapped = ("::ffff:192.0.2.1", 1000)
    assert proxy_header(ProxyHeader.V1, mapped, four).startswith(b"PROXY TCP4 192.0.2.1 ")
