"""Every limit of docs/limits.md that a caller or a device can reach is gone beyond, and what comes of it."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import pytest_asyncio

from fleetlift import yamlfile
from fleetlift.api.app import BODY_BYTES_MAX
from fleetlift.api.migrations import PLAN_CHARS_MAX, STREAMS_MAX, WAIT_S_MAX
from fleetlift.backend import registry
from fleetlift.bus.embedded import MAX_PAYLOAD, SUBSCRIPTIONS_MAX
from fleetlift.core import command, legacy, mqtt, relaying, telemetry, where, workload
from fleetlift.core.shadow import DEFAULT as SHADOW
from fleetlift.migrate import tenant_check
from fleetlift.store.paging import MAX_LIMIT
from fleetlift.tenant import follow, verify
from fleetlift.testing import RunningBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = (Path(__file__).parent.parent.parent / "docs" / "limits.md").read_text()
V1 = "/api/v1"
SECRET = "x" * 40


def nested(levels: int) -> dict[str, Any]:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return {"a": value}


def put(**how: Any) -> dict[str, Any]:
    return {"tenant": "t", **how}


def credential(kind: str, value: str) -> dict[str, str]:
    return {"kind": kind, "value": value}


DEVICE = f"{V1}/devices/d"
BEYOND: dict[str, tuple[str, str, Any, int]] = {
    "body": ("PUT", DEVICE, put(attributes={"a": "x" * BODY_BYTES_MAX}), 413),
    "attributes": ("PUT", DEVICE, put(attributes={"a": "x" * registry.MAX_ATTRIBUTES_BYTES}), 400),
    "attributes' depth": ("PUT", DEVICE, put(attributes=nested(registry.MAX_ATTRIBUTES_DEPTH)), 400),
    "credentials": (
        "PUT",
        DEVICE,
        put(credentials=[credential("token", SECRET)] * (registry.MAX_CREDENTIALS + 1)),
        400,
    ),
    "secret": (
        "PUT",
        DEVICE,
        put(credentials=[credential("password", "x" * (registry.MAX_SECRET_CHARS + 1))]),
        400,
    ),
    "PEM": ("PUT", DEVICE, put(credentials=[credential("x509", "x" * (registry.MAX_PEM_CHARS + 1))]), 400),
    "device id": ("PUT", f"{V1}/devices/{'d' * 129}", put(), 400),
    "tenant id": ("POST", f"{V1}/tenants", {"id": "t" * 64}, 400),
    "tenant name": ("POST", f"{V1}/tenants", {"id": "u", "name": "x" * 201}, 400),
    "token name": ("POST", f"{V1}/tokens", {"name": "x" * 201, "role": "viewer"}, 400),
    "page": ("GET", f"{V1}/devices?limit={MAX_LIMIT + 1}", None, 400),
    "cursor": ("GET", f"{V1}/devices?after={'a' * 1025}", None, 400),
    "condition": ("GET", f"{V1}/devices?where={'connected or ' * 400}connected", None, 400),
    "condition's depth": ("GET", f"{V1}/devices?where={'(' * (where.MAX_DEPTH + 2)}", None, 400),
    "channel": ("GET", f"{DEVICE}/telemetry?channel={'c' * 513}", None, 400),
    "shadow": (
        "PATCH",
        f"{DEVICE}/shadow",
        {"state": {"desired": {"a": "x" * SHADOW.state_bytes}}},
        413,
    ),
    "shadow's request": (
        "PATCH",
        f"{DEVICE}/shadow",
        {"state": {"desired": {"a": "x" * SHADOW.request_bytes}}},
        413,
    ),
    "shadow's depth": ("PATCH", f"{DEVICE}/shadow", {"state": {"desired": nested(SHADOW.depth)}}, 400),
    "shadow's name": ("GET", f"{DEVICE}/shadow?name={'n' * 65}", None, 400),
    "params": (
        "POST",
        f"{DEVICE}/commands",
        {"name": "x", "params": {"a": "x" * command.PARAMS_BYTES_MAX}},
        400,
    ),
    "params' depth": (
        "POST",
        f"{DEVICE}/commands",
        {"name": "x", "params": nested(command.PARAMS_DEPTH_MAX)},
        400,
    ),
    "expiry": ("POST", f"{DEVICE}/commands", {"name": "x", "expires_in": 8 * 86_400}, 400),
    "plan": ("POST", f"{V1}/migrations/check", {"plan": "#" * (PLAN_CHARS_MAX + 1)}, 400),
    "plan's depth": ("POST", f"{V1}/migrations/check", {"plan": "a: " + "[" * 17 + "]" * 17}, 400),
    "plan's references": ("POST", f"{V1}/migrations/check", {"plan": "a: &x [1]\nb: [*x, *x]"}, 400),
    "wait": ("POST", f"{V1}/migrations/m/pause?wait={WAIT_S_MAX + 1}", None, 400),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(backend: RunningBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=backend.url,
        headers={"authorization": f"Bearer {backend.token}"},
        trust_env=False,
        timeout=20,
    ) as client:
        await client.post(f"{V1}/tenants", json={"id": "t"})
        answer = await client.put(DEVICE, json=put(credentials=[credential("token", SECRET)]))
        assert answer.status_code == 201
        yield client


@pytest.mark.parametrize("what", BEYOND)
async def test_what_is_too_much_is_refused_with_a_reason(api: httpx.AsyncClient, what: str) -> None:
    method, path, body, status = BEYOND[what]
    answer = await api.request(method, path, json=body) if body else await api.request(method, path)
    assert answer.status_code == status, answer.text[:500]
    document = answer.json()
    assert document["detail"] and len(answer.content) < 20_000, "a refusal does not send the input back"
    assert "incident" not in document


async def device(backend: RunningBackend, client_id: str = "d") -> tuple[Any, Any, bytes]:
    reader, writer = await asyncio.open_connection(*backend.mqtt)
    writer.write(mqtt.encode(mqtt.Connect(client_id=client_id, username="d", password=SECRET.encode())))
    return reader, writer, await asyncio.wait_for(reader.read(4), 10)


async def test_what_a_device_sends_too_much_of_is_a_letter_or_the_end_of_its_connection(
    backend: RunningBackend, api: httpx.AsyncClient
) -> None:
    """Telemetry that is too large, too deep or of too long a channel is kept as a letter, with its reason."""
    reader, writer, welcome = await device(backend)
    assert welcome == b"\x20\x02\x00\x00"
    large = json.dumps({"a": "x" * telemetry.MAX_BODY_BYTES}).encode()
    deep = b'{"a":' * 65 + b"1" + b"}" * 65
    sent = (
        ("dt/d/x", large),
        ("dt/d/x", deep),
        ("dt/d/" + "c" * 600, b"{}"),
        ("dt/d/" + "c" * 60_000, b"{}"),
        ("dt/d/x", b'{"seq":%d}' % 2**63),
    )
    for n, (topic, body) in enumerate(sent, 1):
        writer.write(mqtt.publish(topic, body, qos=1, packet_id=n))
        assert await asyncio.wait_for(reader.readexactly(4), 10) == mqtt.puback(n)
    writer.close()
    conn = await asyncpg.connect(backend.settings.database_url)
    try:
        deadline = time.monotonic() + 20
        while (
            len(
                found := await conn.fetch(
                    "SELECT reason, length(payload) n FROM dead_letter WHERE device = 'd'"
                )
            )
            < 5
        ):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)
    finally:
        await conn.close()
    reasons = " ".join(row["reason"] for row in found)
    for part in (str(telemetry.MAX_BODY_BYTES), "nested deeper", "channel of 1 to 512", "seq: expected 0 to"):
        assert part in reasons
    assert max(row["n"] for row in found) == telemetry.DEAD_LETTER_BYTES

    reader, writer, welcome = await device(backend)
    assert welcome == b"\x20\x02\x00\x00"
    answer = b""
    with contextlib.suppress(ConnectionError):
        writer.write(mqtt.publish("dt/d/x", b"x" * (MAX_PAYLOAD + 1), qos=1, packet_id=1))
        answer = await asyncio.wait_for(reader.read(100), 10)
    assert answer == b"", "not acknowledged: the server closes the connection"
    writer.close()
    _, writer, welcome = await device(backend, "d/" + "s" * 129)
    assert welcome != b"\x20\x02\x00\x00"
    writer.close()


async def test_a_legacy_frame_that_is_too_large_is_refused_from_its_header_alone() -> None:
    header = legacy.MAGIC + bytes((1, 1, 0, 0)) + (legacy.MAX_BODY_BYTES + 1).to_bytes(4, "big")
    decoder = legacy.Decoder()
    with pytest.raises(legacy.BadFrame, match="at most"):
        decoder.feed(header)
    assert decoder.held_bytes == 0


async def test_the_page_tells_the_limits_that_the_code_has() -> None:
    """Change one, and docs/limits.md is to be changed with it."""
    kib = 1024
    for text in (
        f"{BODY_BYTES_MAX // kib // kib} MiB",
        f"{MAX_LIMIT:,}",
        f"{where.MAX_LENGTH:,} characters",
        f"{where.MAX_DEPTH} levels",
        f"{registry.MAX_ATTRIBUTES_BYTES // kib} KiB",
        f"{registry.MAX_ATTRIBUTES_DEPTH} levels",
        f"credentials of a device | {registry.MAX_CREDENTIALS} |",
        f"{registry.MAX_SECRET_CHARS:,} characters",
        f"{registry.MAX_PEM_CHARS // kib} KiB",
        f"{SHADOW.state_bytes // kib} KiB",
        f"{SHADOW.depth} levels",
        f"{SHADOW.request_bytes // kib} KiB",
        f"{command.PARAMS_BYTES_MAX // kib} KiB",
        f"{command.PARAMS_DEPTH_MAX} levels",
        f"{int(command.EXPIRES_IN_S_MAX // 86_400)} days",
        f"{yamlfile.MAX_BYTES // kib} KiB",
        f"{telemetry.MAX_BODY_BYTES // kib} KiB",
        f"{telemetry.MAX_NESTING} levels",
        f"{telemetry.MAX_CHANNEL_CHARS} characters",
        f"{MAX_PAYLOAD // kib // kib} MiB",
        f"{SUBSCRIPTIONS_MAX} subscriptions",
        f"{legacy.MAX_BODY_BYTES // kib // kib} MiB",
        f"{legacy.MAX_DOCUMENT_BYTES // kib} KiB",
        f"{STREAMS_MAX} streams",
        f"{tenant_check.FILES_MAX}, of {tenant_check.FILE_CHARS_MAX // kib} KiB each",
        f"{follow.SPOOL_BYTES_MAX // kib**3} GiB on the mover's disk",
        f"{follow.TOUCHED_MAX:,}",
        f"{verify.MAX_FINDINGS:,} are listed",
        f"{relaying.RULES_MAX:,}",
        f"{workload.DEVICES_MOST:,}",
        f"{WAIT_S_MAX:g} s",
    ):
        assert text in PAGE, text
