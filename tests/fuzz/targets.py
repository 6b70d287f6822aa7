"""What is fuzzed: each target takes bytes and may raise nothing but the house's own errors.

Where a codec goes both ways, what was read is written and read again, and must come out the same.
"""

import contextlib
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.api.access import TenantIn, TokenIn
from fleetlift.api.commands import CommandIn
from fleetlift.api.devices import DeviceIn
from fleetlift.api.migrations import PlanIn, ReleaseIn, ResumeIn, RevertIn
from fleetlift.api.problems import INTERNAL, kind_of
from fleetlift.backend import registry
from fleetlift.bus import subjects
from fleetlift.core import (
    capture,
    command,
    dns,
    gates,
    legacy,
    masking,
    mqtt,
    peek,
    relaying,
    shadow,
    telemetry,
    units,
    where,
)
from fleetlift.core.errors import BadInput, FleetError
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.core.tenant import pgoutput
from fleetlift.edge import permits
from fleetlift.levers import rfc2136
from fleetlift.load import capture_file
from fleetlift.migrate import journal
from fleetlift.migrate.planfile import parse_plan
from fleetlift.store.paging import from_cursor

Target = Callable[[bytes], None]
NOW = 1_700_000_000.0
RECORD: Mapping[str, object] = {
    "id": "car-1",
    "tenant": "carshare",
    "connected": True,
    "attributes": {"hardware": 3, "firmware": "1.10.2", "tags": ["a"], "x": None, "n": 1.5},
    "connection": {"since": 5},
    "shadow": {"desired": {}, "reported": {"v": "2.0.0-rc1"}},
}


def text_of(data: bytes) -> str:
    """Any bytes as a text, lone surrogates included: what a caller in Python could pass."""
    return data.decode("utf-8", "surrogateescape")


def pieces(data: bytes) -> list[bytes]:
    """`data` behind its first byte, cut into pieces whose size that byte tells."""
    size = data[0] % 64 + 1 if data else 1
    return [data[at : at + size] for at in range(1, len(data), size)]


def mqtt_packets(data: bytes) -> None:
    """Packets of MQTT, the stream cut anywhere."""
    decoder = mqtt.Decoder(max_packet=65_536)
    packets: list[mqtt.Packet] = []
    try:
        for piece in pieces(data):
            packets += decoder.feed(piece)
    except mqtt.BadPacket:
        pass
    for packet in packets:
        again = mqtt.Decoder().feed(mqtt.encode(packet))
        assert again == [packet], (packet, again)


def legacy_frames(data: bytes) -> None:
    """Frames of the legacy protocol, the stream cut anywhere."""
    decoder = legacy.Decoder(max_body_bytes=65_536)
    messages: list[legacy.Message] = []
    try:
        for piece in pieces(data):
            messages += decoder.feed(piece)
            assert decoder.held_bytes <= 65_536 + legacy.HEADER_BYTES + legacy.CHECKSUM_BYTES
    except legacy.BadFrame:
        pass
    for message in messages:
        assert legacy.Decoder().feed(legacy.encode(message)) == [message]


def legacy_bodies(data: bytes) -> None:
    """Bodies of legacy frames under a header and a checksum that are right."""
    if len(data) < 2:
        return
    head = legacy.MAGIC + bytes((legacy.VERSION, data[0], 0, data[1] & 1)) + len(data[2:]).to_bytes(4, "big")
    frame = head + data[2:]
    try:
        messages = legacy.Decoder().feed(frame + zlib.crc32(frame).to_bytes(4, "big"))
    except legacy.BadFrame:
        return
    for message in messages:
        assert legacy.Decoder().feed(legacy.encode(message)) == [message]


def telemetry_messages(data: bytes) -> None:
    """A topic, a line of headers and a payload of the log. Never raises; what comes out can be stored."""
    topic, _, rest = data.partition(b"\n")
    head, _, payload = rest.partition(b"\n")
    names = (telemetry.HEADER_TS, telemetry.HEADER_SEQ, telemetry.HEADER_RECEIVED)
    headers = dict(zip(names, text_of(head).split(" "), strict=False))
    found = telemetry.parse(text_of(topic), headers, payload, NOW)
    texts = (
        (found.device, found.channel, found.body, found.path)
        if isinstance(found, telemetry.Telemetry)
        else (found.device, found.topic, found.reason, found.path)
    )
    for text in texts:
        assert "\x00" not in text
        text.encode()
    if isinstance(found, telemetry.Telemetry):
        assert -(2**63) <= found.msg_key < 2**63 and 0 <= found.ts_ms < 2**63


def shadow_requests(data: bytes) -> None:
    """Updates of one shadow, one a line, each on what the last one left; then get and delete."""
    key = shadow.ShadowKey("car-1")
    held: shadow.Shadow | None = None
    for n, line in enumerate(data.split(b"\n")[:8]):
        for operation in (shadow.Operation.UPDATE, shadow.Operation.GET):
            outcome = shadow.handle(operation, key, held, line, NOW + n)
            for answer in outcome.answers:
                msgspec.json.encode(answer.body)
            held = outcome.shadow or held
    shadow.handle(shadow.Operation.DELETE, key, held, data[:200], NOW + 9)


def command_answers(data: bytes) -> None:
    """A device's response to a command."""
    try:
        reported = command.read_response(data)
    except BadInput:
        return
    stored = msgspec.json.encode(reported.detail)
    assert b"\\u0000" not in stored.replace(b"\\\\", b"")


def plans(data: bytes) -> None:
    """A plan file."""
    try:
        plan = parse_plan(text_of(data), side_kinds=("legacy", "fleetlift"))
    except BadInput as wrong:
        assert len(str(wrong)) < 200_000
        return
    assert plan.steps


def conditions(data: bytes) -> None:
    """An expression that selects devices, and what it selects."""
    try:
        expression = where.parse(text_of(data))
    except BadInput:
        return
    where.evaluate(expression, RECORD)
    where.evaluate(expression, {})
    where.fields_used(expression)


def gate_texts(data: bytes) -> None:
    """A gate, and the comparison of a query's."""
    text = text_of(data)
    try:
        gate = gates.parse_gate(text)
        assert gates.parse_gate(gate.text).text == gate.text
        gates.judge(gate, None)
    except BadInput:
        pass
    with contextlib.suppress(BadInput):
        gates.judge(gates.parse_query_gate(gates.Source.SQL, "SELECT 1", text), None)


def quantities(data: bytes) -> None:
    """Durations, shares and numbers with units."""
    text = text_of(data)
    for parse in (units.parse_duration, units.parse_share, units.parse_quantity):
        try:
            found = parse(text)
        except BadInput:
            continue
        if isinstance(found, float):
            assert abs(units.parse_duration(units.format_duration(found)) - found) < 0.001
        elif isinstance(found, units.Share):
            assert units.parse_share(str(found)).of(1000) == found.of(1000)


def journals(data: bytes) -> None:
    """The engine's journal, as a crash, a full disk or an editor may leave it."""
    with tempfile.TemporaryDirectory(dir=_memory()) as directory:
        path = Path(directory) / "move.jsonl"
        path.write_bytes(data)
        with contextlib.suppress(FleetError):
            journal.story(path)


def orders(data: bytes) -> None:
    """The documents that orders and reports travel in, by the way both ends read them."""
    for kind in (Orders, DeviceReport):
        try:
            found: Any = msgspec.json.decode(data, type=kind)
        except (ValueError, RecursionError):
            continue
        assert msgspec.json.decode(msgspec.json.encode(found), type=kind) == found


def bodies(data: bytes) -> None:
    """Bodies of the API; the first byte says of which call. Whatever is wrong is a 4xx."""
    kinds = (DeviceIn, CommandIn, TenantIn, TokenIn, PlanIn, RevertIn, ResumeIn, ReleaseIn)
    if not data:
        return
    try:
        body = msgspec.json.decode(data[1:], type=kinds[data[0] % len(kinds)])
        match body:
            case DeviceIn():
                registry.checked(
                    registry.NewDevice(
                        id="car-1",
                        tenant=body.tenant or "t",
                        dialect=body.dialect,
                        attributes=body.attributes,
                        credentials=None if body.credentials is None else tuple(body.credentials),
                    )
                )
            case CommandIn():
                command.checked_name(body.name)
                command.checked_params(body.params)
                command.checked_expiry(body.expires_in)
            case PlanIn():
                parse_plan(body.plan, side_kinds=("legacy", "fleetlift"))
    except Exception as wrong:
        if kind_of(wrong) is INTERNAL:
            raise


def cursors(data: bytes) -> None:
    """What a caller gives as the page after which to go on."""
    for shape in (tuple[str], tuple[int], tuple[int, str]):
        try:
            found: tuple[Any, ...] = from_cursor(text_of(data), shape)
        except BadInput:
            continue
        for part in found:
            if isinstance(part, int):
                assert -(2**63) <= part < 2**63
            else:
                part.encode()
                assert "\x00" not in part


def sign_ins(data: bytes) -> None:
    """What NATS Server asks of the sign-in, and the names a client may give itself."""
    text = text_of(data)
    device = permits.device_of(text)
    if device is not None:
        assert not set(device) & set(".*> /+#")
        assert permits.client_id_fits(device, device)
    permits.client_id_fits("car-1", text)
    with contextlib.suppress(ValueError):
        permits.read_request(data)


def topics(data: bytes) -> None:
    """Topics to subjects and back."""
    text = text_of(data)
    try:
        subject = subjects.to_subject(text)
    except BadInput:
        return
    assert subjects.to_topic(subject) == text
    assert not any(sign in subject for sign in "*> \t\r\n")


def captures(data: bytes) -> None:
    """A segment as a killed recorder, a disk or a stranger leaves it: what is recovered can be read whole."""
    with tempfile.TemporaryDirectory(dir=_memory()) as name:
        directory = Path(name)
        capture_file.write_manifest(directory, capture.Manifest(id="c", started_at_s=NOW, until_s=NOW))
        (directory / capture.segment_name(1, is_open=True)).write_bytes(data)
        manifest = capture_file.recover(directory).manifest
        assert sum(1 for _ in capture_file.read_capture(directory)) == manifest.messages
        closed = capture.Segment(
            capture="c", number=1, records=1, first_at_s=NOW, last_at_s=NOW, sha256="0" * 64
        )
        (directory / closed.name).write_bytes(data)
        with contextlib.suppress(capture.DamagedCapture):
            for _ in capture_file.read_segment(directory, closed):
                pass


def masked_bodies(data: bytes) -> None:
    """Bodies and topics of anything, masked: never an error, and masking again changes nothing more."""
    masker = masking.Masker(masking.Rules(), b"k" * 32)
    once, _ = masker.payload(data, "car-1")
    assert masker.payload(once, "car-1")[0] == once
    masker.topic(data.decode("utf-8", "replace"), "car-1")


def first_bytes(data: bytes) -> None:
    """What a new connection to the relay begins with, cut anywhere: more bytes change no answer."""
    found = peek.peek(data)
    if found is not None and len(data) < peek.PEEK_BYTES_MAX:
        assert peek.peek(data + b"x") == found
    if data:
        earlier = peek.peek(data[: data[-1] % len(data)])
        assert earlier is None or earlier == found or len(data) >= peek.PEEK_BYTES_MAX
    if found is not None:
        relaying.Router(relaying.Routes(share_percent=50)).side(relaying.client_of(found, "192.0.2.1"))


def relay_routes(data: bytes) -> None:
    """A routing table of the relay, as its API takes it and as it lies on disk."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, BadInput):
        routes = relaying.checked_routes(msgspec.json.decode(data, type=relaying.Routes))
        assert msgspec.json.decode(msgspec.json.encode(routes), type=relaying.Routes) == routes
        relaying.Router(routes).side("car-1")


def dns_names(data: bytes) -> None:
    """Names, addresses and TSIG keys as people give them."""
    text = text_of(data)
    for read in (dns.checked_name, rfc2136.parse_key):
        with contextlib.suppress(BadInput):
            read(text)
    for kind in dns.RecordType:
        with contextlib.suppress(BadInput):
            dns.checked_values(kind, [text])


def replication_messages(data: bytes) -> None:
    """Messages of PostgreSQL's logical replication, one behind its length each."""
    at = 0
    while at < len(data):
        message = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        try:
            found = pgoutput.decode(message)
        except BadInput:
            continue
        assert pgoutput.decode(pgoutput.encode(found)) == found


def _memory() -> str | None:
    """A directory in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


TARGETS: dict[str, Target] = {
    "mqtt": mqtt_packets,
    "legacy": legacy_frames,
    "legacy-bodies": legacy_bodies,
    "telemetry": telemetry_messages,
    "shadow": shadow_requests,
    "command-answers": command_answers,
    "plan": plans,
    "where": conditions,
    "gate": gate_texts,
    "units": quantities,
    "journal": journals,
    "orders": orders,
    "api-bodies": bodies,
    "cursors": cursors,
    "sign-in": sign_ins,
    "topics": topics,
    "pgoutput": replication_messages,
    "capture": captures,
    "masking": masked_bodies,
    "first-bytes": first_bytes,
    "relay-routes": relay_routes,
    "dns-names": dns_names,
}
