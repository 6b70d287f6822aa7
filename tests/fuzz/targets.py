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
from fleetlift.core import command, gates, legacy, mqtt, shadow, telemetry, units, where
from fleetlift.core.errors import BadInput, FleetError
from fleetlift.core.orders import DeviceReport, Orders
from fleetlift.edge import permits
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
}
