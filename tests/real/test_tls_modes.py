"""Plain, TLS, both on one port: each door takes whom it is for, and tells the others so at once."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from fleetlift.certificates import own_certificates
from fleetlift.cli.serve import Options, plan_settings
from fleetlift.config import overrides_from
from fleetlift.core import mqtt
from fleetlift.core.errors import BadInput
from fleetlift.device.shell import _tls as device_context
from fleetlift.testing import RunningBackend, free_port, running_backend, scratch_directory

SECRET = "x" * 40
HELLO = mqtt.encode(mqtt.Connect(client_id="d", username="d", password=SECRET.encode()))
WELCOME = b"\x20\x02\x00\x00"


async def hello(
    address: tuple[str, int], context: ssl.SSLContext | None = None, *, name: str | None = None
) -> bytes:
    """What a device that signs in is answered; empty when the connection is closed instead."""
    reader, writer = await asyncio.open_connection(
        *address, ssl=context, server_hostname=(name or address[0]) if context else None
    )
    try:
        writer.write(HELLO)
        return await asyncio.wait_for(reader.read(100), 10)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


async def register(backend: RunningBackend) -> None:
    by_tls = backend.url.startswith("https")
    verify = ssl.create_default_context(cafile=str(backend.data_dir / "ca.pem")) if by_tls else True
    async with httpx.AsyncClient(
        base_url=f"{backend.url}/api/v1",
        headers={"authorization": f"Bearer {backend.token}"},
        verify=verify,
        trust_env=False,
    ) as api:
        await api.post("/tenants", json={"id": "t"})
        body = {"tenant": "t", "credentials": [{"kind": "token", "value": SECRET}]}
        assert (await api.put("/devices/d", json=body)).status_code == 201


def old_client(version: ssl.TLSVersion) -> ssl.SSLContext:
    """A client that speaks nothing newer, and looks at no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = version
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_plain_and_tls_on_one_port_and_the_api_by_tls() -> None:
    """Both doors check nothing away: TLS 1.2 at least, names and authorities by the client."""
    with scratch_directory() as directory:
        port = f"127.0.0.1:{free_port()}"
        async with running_backend(
            directory / "data", mqtt=port, arguments=["--mqtts", port, "--https"]
        ) as backend:
            await register(backend)
            ca = (backend.data_dir / "ca.pem").read_text()
            assert await hello(backend.mqtt) == WELCOME
            assert await hello(backend.mqtt, device_context(ca)) == WELCOME
            with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname mismatch"):
                await hello(backend.mqtt, device_context(ca), name="iot.example.com")
            stranger = own_certificates(directory / "stranger", {"127.0.0.1"})
            with pytest.raises(ssl.SSLCertVerificationError):
                await hello(backend.mqtt, device_context(stranger.ca.read_text()))
            with pytest.raises(ssl.SSLCertVerificationError):
                await hello(backend.mqtt, ssl.create_default_context())
            host, https = backend.url.removeprefix("https://").split(":")
            for address in (backend.mqtt, (host, int(https))):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await hello(address, old_client(ssl.TLSVersion.TLSv1_1))
            async with httpx.AsyncClient(trust_env=False) as client:
                with pytest.raises(httpx.TransportError):  # plain HTTP at the door for TLS
                    await client.get(f"http://{host}:{https}/healthz")
                with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
                    await client.get(f"{backend.url}/healthz")
            for key in (backend.data_dir / "tls").glob("*key.pem"):
                assert key.stat().st_mode & 0o077 == 0


async def test_by_tls_alone_with_a_certificate_of_ones_own_that_has_ended() -> None:
    """Devices refuse it, a plain client gets no answer, and the backend itself still starts and serves."""
    with scratch_directory() as directory:
        ended = own_certificates(
            directory / "own", {"127.0.0.1"}, now=datetime.now(UTC) - timedelta(days=500)
        )
        arguments = ["--mqtts", "127.0.0.1:0", "--cert", str(ended.cert), "--key", str(ended.key)]
        async with running_backend(directory / "data", mqtt="", arguments=arguments) as backend:
            await register(backend)
            with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
                await hello(backend.mqtt, device_context(ended.ca.read_text()))
            assert await hello(backend.mqtt) != WELCOME
            unchecked = old_client(ssl.TLSVersion.TLSv1_2)
            assert await hello(backend.mqtt, unchecked) == WELCOME


async def test_a_tls_client_at_a_plain_door_is_told_at_once() -> None:
    with scratch_directory() as directory:
        async with running_backend(directory / "data") as backend:
            await register(backend)
            assert await hello(backend.mqtt) == WELCOME
            for address in (backend.mqtt, ("127.0.0.1", int(backend.url.rsplit(":", 1)[1]))):
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    async with asyncio.timeout(10):
                        await hello(address, ssl.create_default_context())


def test_a_certificate_that_cannot_serve_is_refused_before_anything_starts(tmp_path: Path) -> None:
    one, other = (own_certificates(tmp_path / name, {"127.0.0.1"}) for name in ("one", "other"))
    (tmp_path / "text.pem").write_text("no PEM")
    for cert, key, expected in (
        (str(one.cert), str(other.key), "is not the key of that certificate"),
        (str(tmp_path / "text.pem"), str(one.key), "cannot be read as PEM"),
        (str(one.cert), str(tmp_path / "text.pem"), "cannot be read as PEM"),
        (str(one.cert), "", "belong together"),
        (str(tmp_path / "none.pem"), str(one.key), "is not a file"),
    ):
        options = Options(data=tmp_path / "data", http="127.0.0.1:0", mqtts="127.0.0.1:0", cert=cert, key=key)
        with pytest.raises(BadInput, match=expected):
            plan_settings(options, tmp_path / "data", overrides_from())
