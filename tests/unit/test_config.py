"""Settings: read once, secrets not shown, mistakes named."""

import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleetlift.certificates import own_certificates
from fleetlift.config import (
    Overrides,
    Settings,
    checked_address,
    load_run,
    overrides_from,
    save_run,
    split_address,
)
from fleetlift.core.errors import BadInput, Unavailable


def test_secrets_are_not_shown() -> None:
    """Settings end up in logs and tracebacks: passwords must not."""
    shown = repr(Settings(data_dir="d", nats_svc_password="hush", database_url="postgresql://u:hush@h/d"))
    assert "hush" not in shown
    assert "data_dir='d'" in shown


def test_settings_come_back_from_the_run_file(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), nats_svc_password="hush")
    save_run(settings)
    assert load_run(tmp_path) == settings
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600


def test_without_a_run_file_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="fleetlift serve --data"):
        load_run(tmp_path)


def test_the_environment_overrides() -> None:
    """Every field of Overrides has its FLEETLIFT_ variable; what is not a number is named."""
    assert overrides_from({}) == Overrides()
    found = overrides_from({"FLEETLIFT_DATABASE_URL": "postgresql://h/d", "FLEETLIFT_LOG_MAX_AGE_S": "60"})
    assert (found.database_url, found.log_max_age_s) == ("postgresql://h/d", 60)
    with pytest.raises(BadInput, match="FLEETLIFT_LOG_MAX_BYTES"):
        overrides_from({"FLEETLIFT_LOG_MAX_BYTES": "lots"})
    with pytest.raises(BadInput, match="always"):
        overrides_from({"FLEETLIFT_SYNC": "sometimes"})


def test_every_variable_is_on_the_settings_page() -> None:
    """Whoever adds a setting tells people of it."""
    page = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    missing = [name for name in Overrides.__struct_fields__ if f"FLEETLIFT_{name.upper()}" not in page]
    assert not missing


def test_an_external_nats_needs_its_passwords() -> None:
    """Half a configuration is refused at once, with the names of what is missing."""
    with pytest.raises(BadInput, match="FLEETLIFT_NATS_ISSUER_SEED"):
        overrides_from({"FLEETLIFT_NATS_URL": "nats://n:4222", "FLEETLIFT_NATS_SVC_PASSWORD": "x"})


@pytest.mark.parametrize("text", ["", "localhost", ":80", "h:port", "h:70000"])
def test_an_address_is_host_and_port(text: str) -> None:
    with pytest.raises(BadInput, match="HOST:PORT"):
        split_address(text)


def test_a_busy_port_is_refused_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        with pytest.raises(Unavailable, match="choose another address with --http"):
            checked_address(f"127.0.0.1:{taken.getsockname()[1]}", "http")


def test_port_0_becomes_a_free_port() -> None:
    host, port = split_address(checked_address("127.0.0.1:0", "http"))
    assert host == "127.0.0.1"
    assert port > 0


def test_own_certificates_are_good_for_the_names_asked_and_are_kept(tmp_path: Path) -> None:
    """The server certificate names localhost and every address; nothing is made twice."""
    from cryptography import x509

    made = own_certificates(tmp_path, ["192.0.2.7", "iot.example.com"])
    names = x509.load_pem_x509_certificate(made.cert.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert {"localhost", "iot.example.com"} <= set(names.value.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "192.0.2.7"} <= {str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)}
    assert made.key.stat().st_mode & 0o777 == 0o600
    before = made.cert.read_bytes(), made.ca.read_bytes()
    own_certificates(tmp_path, ["192.0.2.7", "iot.example.com"])
    assert (made.cert.read_bytes(), made.ca.read_bytes()) == before
    # New names or a near end: a new certificate by the same authority.
    later = datetime.now(UTC) + timedelta(days=380)
    own_certificates(tmp_path, ["192.0.2.7", "iot.example.com"], now=later)
    assert made.cert.read_bytes() != before[0]
    assert made.ca.read_bytes() == before[1]
    ca = x509.load_pem_x509_certificate(before[1])
    x509.load_pem_x509_certificate(made.cert.read_bytes()).verify_directly_issued_by(ca)
