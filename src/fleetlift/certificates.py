"""A certificate authority of one's own, for an instance that was given no certificates."""

import ipaddress
import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from fleetlift.config import write_private

CA_DAYS = 3650
SERVER_DAYS = 397  # what clients accept at most
RENEW_BEFORE_DAYS = 60


class Certificates(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of PEM files."""

    ca: Path
    cert: Path
    key: Path


class _Made(msgspec.Struct):
    names: list[str]
    not_after: datetime


def own_certificates(directory: Path, hosts: Iterable[str], *, now: datetime | None = None) -> Certificates:
    """The instance's CA (`ca.pem`) and a server certificate for this machine's names and `hosts`.

    Made when missing; the server certificate is renewed when its names change or its end is near.
    """
    now = now or datetime.now(UTC)
    paths = Certificates(
        ca=directory / "ca.pem",
        cert=directory / "tls" / "server.pem",
        key=directory / "tls" / "server-key.pem",
    )
    wildcards = {"0.0.0.0", "::", ""}
    names = sorted({"localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts} - wildcards)
    note = directory / "tls" / "server.json"
    if paths.ca.exists() and paths.cert.exists() and paths.key.exists() and note.exists():
        made = msgspec.json.decode(note.read_bytes(), type=_Made)
        if made.names == names and made.not_after - now > timedelta(days=RENEW_BEFORE_DAYS):
            return paths
    paths.cert.parent.mkdir(parents=True, exist_ok=True)
    paths.cert.parent.chmod(0o700)
    not_after = _make(paths, names, now)
    write_private(note, msgspec.json.encode(_Made(names=names, not_after=not_after)).decode())
    return paths


def _make(paths: Certificates, names: list[str], now: datetime) -> datetime:
    # Loaded only here: most starts find everything made.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])

    def private(key: ec.EllipticCurvePrivateKey) -> str:
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    start = now - timedelta(hours=1)  # for devices whose clocks are behind
    ca_key_path = paths.cert.parent / "ca-key.pem"
    if paths.ca.exists() and ca_key_path.exists():
        loaded = serialization.load_pem_private_key(ca_key_path.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        ca_key, ca = loaded, x509.load_pem_x509_certificate(paths.ca.read_bytes())
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        subject = name(f"Fleetlift CA {os.urandom(4).hex()}")
        ca = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(ca_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(x509, ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        write_private(ca_key_path, private(ca_key))
        paths.ca.write_bytes(ca.public_bytes(serialization.Encoding.PEM))
        paths.ca.chmod(0o644)
    key = ec.generate_private_key(ec.SECP256R1())
    not_after = now + timedelta(days=SERVER_DAYS)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name("localhost"))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(x509, ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([_general_name(x509, text) for text in names]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    write_private(paths.key, private(key))
    paths.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return not_after


def _usage(x509, *, ca: bool):  # type: ignore[no-untyped-def]
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(x509, text: str):  # type: ignore[no-untyped-def]
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
