"""The registry: which devices there are, whose they are, and how they prove who they are.

A device has up to `MAX_CREDENTIALS` credentials of its tenant's; any one of them lets it in. Beside them
there is one place for the credential that a migration gives it (`grant_generated`), which replacing the
device's own credentials leaves alone. Secrets are hashed before they reach the database, and never come back.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from fleetlift.backend import passwords
from fleetlift.core import where as conditions
from fleetlift.core.errors import BadInput, Conflict, NotFound
from fleetlift.core.identity import checked_device_id, checked_replay_identity, checked_tenant_id
from fleetlift.core.jsonvalue import deeper_than
from fleetlift.store import devices as store
from fleetlift.store.devices import Device, DeviceRow, StoredCredential, Tenant
from fleetlift.store.paging import DEFAULT_LIMIT, Page
from fleetlift.store.pool import Conn

MAX_CREDENTIALS = 8
MAX_SECRET_CHARS = 1024
MAX_PEM_CHARS = 16 * 1024
MAX_ATTRIBUTES_BYTES = 16 * 1024
MAX_ATTRIBUTES_DEPTH = 32  # deeper ones could be stored and then not be read again
GRANTED = 100  # the place of the credential that a migration gave

_DIALECTS = frozenset({"native", "aws", "google", "thingsboard", "artik", "azure"})

Kind = Literal["password", "token", "public-key", "x509"]


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """A credential as it is given: a secret (`password`, `token`) or a PEM (`public-key`, `x509`)."""

    kind: Kind
    value: str

    def __repr__(self) -> str:
        return f"Credential(kind={self.kind!r}, value=…)"


class NewDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a device when it is put. `credentials` None leaves those it has; () removes them."""

    id: str
    tenant: str
    dialect: str = "native"
    attributes: dict[str, Any] = {}
    credentials: tuple[Credential, ...] | None = None


async def put_device(conn: Conn, device: NewDevice) -> Device:
    """Create or replace one device. Raises BadInput, NotFound (tenant) or Conflict (another tenant's)."""
    await put_devices(conn, [device])
    return await get_device(conn, device.id)


async def put_devices(
    conn: Conn,
    new: Sequence[NewDevice],
    *,
    generated: bool = False,
    make_tenants: bool = False,
) -> None:
    """Create or replace devices, all or none.

    `generated` says that every secret among the credentials was made by Fleetlift of 32 random bytes: hashing
    them takes microseconds instead of the 20 ms that a password from outside needs. `make_tenants` creates
    tenants that are missing. Raises BadInput, NotFound (tenant) or Conflict (a device of another tenant).
    """
    rows = [checked(device) for device in new]
    if len({row.id for row in rows}) != len(rows):
        raise BadInput("a device is named twice: name each device once")
    secrets = [(d.id, n, c) for d in new for n, c in enumerate(d.credentials or ())]
    stored = await asyncio.to_thread(_hashed, secrets, generated)
    tenants = {row.tenant for row in rows}
    async with conn.transaction():
        if make_tenants:
            await store.add_missing_tenants(conn, sorted(tenants))
        elif missing := sorted(tenants - await store.existing_tenants(conn, sorted(tenants))):
            raise NotFound(f"tenant {missing[0]!r} does not exist: create it first")
        before = await store.owners(conn, [row.id for row in rows])
        for row in rows:
            if before.get(row.id, row.tenant) != row.tenant:
                raise Conflict(f"device {row.id!r} belongs to another tenant: use another id")
        for gone, owner in (await store.former_owners(conn, [row.id for row in rows])).items():
            if any(row.id == gone and row.tenant != owner for row in rows):
                # What it sent, and what waits for it in the log, would be the new tenant's to read.
                raise Conflict(f"device {gone!r} was another tenant's, and its data is: use another id")
        written = await store.put(conn, rows)
        for row in rows:
            if row.id not in written:  # somebody else was quicker
                raise Conflict(f"device {row.id!r} belongs to another tenant: use another id")
        renewed = [d.id for d in new if d.credentials is not None and d.id in before]
        revoked: set[str] = set()
        if renewed:
            for n in range(MAX_CREDENTIALS):
                revoked |= set(await store.delete_credentials(conn, renewed, n=n))
        await store.put_credentials(conn, stored)
        await store.tell_revoked(conn, sorted(revoked))


async def check_unclaimed(conn: Conn, device: str) -> None:
    """Conflict when messages are stored under an id that nobody has had: they are not for whoever takes it.

    So it is with what an old side's feed names before anybody has registered it.
    """
    if not await store.known_owners(conn, [device]) and await store.has_messages(conn, device):
        raise Conflict(
            f"device {device!r} has messages already and no owner: it takes a token of every tenant "
            "to say whose it is"
        )


async def get_device(conn: Conn, device: str, *, tenant: str | None = None) -> Device:
    """Raises NotFound, also for a device of another tenant."""
    found = await store.get(conn, device, tenant=tenant)
    if found is None:
        raise NotFound(f"device {device!r} does not exist: create it, or check its id")
    return found


async def list_devices(
    conn: Conn,
    *,
    tenant: str | None = None,
    where: str = "",
    limit: int = DEFAULT_LIMIT,
    after: str | None = None,
) -> Page[Device]:
    """A page of devices by id; `where` as in `core/where.py`. Raises BadInput."""
    return await store.get_page(conn, tenant=tenant, where=_condition(where), limit=limit, after=after)


async def select_devices(conn: Conn, *, tenant: str | None = None, where: str = "") -> list[Device]:
    """Every device that `where` selects, by id. Raises BadInput."""
    return await store.select(conn, tenant=tenant, where=_condition(where))


async def delete_device(conn: Conn, device: str, *, tenant: str | None = None) -> None:
    """Remove a device: it is disconnected and not let in again. Its telemetry stays. Raises NotFound."""
    async with conn.transaction():
        if not await store.delete(conn, device, tenant=tenant):
            raise NotFound(f"device {device!r} does not exist: check its id")
        await store.tell_revoked(conn, [device])


async def grant_generated(conn: Conn, secrets: Mapping[str, str]) -> list[str]:
    """Let devices in by a secret that Fleetlift made for them, beside the credentials they have.

    `secrets` maps devices to secrets of at least 32 random bytes. Repeating it with the same secrets changes
    nothing. Returns the devices that do not exist.
    """
    async with conn.transaction():
        known = await store.credentials(conn, list(secrets))
        unchanged = {
            device
            for device, mine in known.items()
            for c in mine
            if c.n == GRANTED and passwords.is_cheap(c.value) and passwords.verify(c.value, secrets[device])
        }
        await store.put_credentials(
            conn,
            [
                StoredCredential(
                    device=device,
                    n=GRANTED,
                    kind="password",
                    value=passwords.hash_generated(secrets[device]),
                )
                for device in known
                if device not in unchanged
            ],
        )
    return sorted(set(secrets) - set(known))


async def withdraw_generated(conn: Conn, devices: Sequence[str]) -> None:
    """Take back what `grant_generated` gave; devices that are connected by it are disconnected."""
    async with conn.transaction():
        await store.tell_revoked(conn, await store.delete_credentials(conn, devices, n=GRANTED))


async def create_tenant(conn: Conn, tenant: str, name: str = "") -> None:
    """Create a tenant, or rename it. Raises BadInput."""
    if len(name) > 200 or "\x00" in name:
        raise BadInput("tenant name: use at most 200 characters")
    await store.put_tenant(conn, checked_tenant_id(tenant), name or tenant)


async def list_tenants(conn: Conn, *, limit: int = DEFAULT_LIMIT, after: str | None = None) -> Page[Tenant]:
    return await store.list_tenants(conn, limit=limit, after=after)


def _condition(text: str) -> conditions.Expression:
    return conditions.parse(text) if text.strip() else conditions.EVERYTHING


def checked(device: NewDevice) -> DeviceRow:
    checked_device_id(device.id)
    checked_tenant_id(device.tenant)
    checked_replay_identity(device.id, device.tenant)
    if device.dialect not in _DIALECTS:
        raise BadInput(f"dialect {device.dialect!r}: use one of {', '.join(sorted(_DIALECTS))}")
    if deeper_than(device.attributes, MAX_ATTRIBUTES_DEPTH):
        raise BadInput(
            f"device {device.id!r}: attributes are nested deeper than {MAX_ATTRIBUTES_DEPTH} levels"
        )
    try:
        attributes = msgspec.json.encode(device.attributes).decode()
    except (TypeError, ValueError, OverflowError, RecursionError) as wrong:
        raise BadInput(f"device {device.id!r}: attributes are not JSON ({wrong})") from None
    if len(attributes) > MAX_ATTRIBUTES_BYTES:
        raise BadInput(f"device {device.id!r}: attributes take at most {MAX_ATTRIBUTES_BYTES} bytes of JSON")
    if "\\u0000" in attributes:
        raise BadInput(f"device {device.id!r}: attributes must not hold the character NUL")
    if device.credentials is not None and len(device.credentials) > MAX_CREDENTIALS:
        raise BadInput(f"device {device.id!r}: at most {MAX_CREDENTIALS} credentials")
    for credential in device.credentials or ():
        _check_credential(device.id, credential)
    return DeviceRow(id=device.id, tenant=device.tenant, dialect=device.dialect, attributes=attributes)


def _check_credential(device: str, credential: Credential) -> None:
    value = credential.value
    if credential.kind in ("password", "token"):
        if not 1 <= len(value) <= MAX_SECRET_CHARS:
            raise BadInput(f"device {device!r}: a {credential.kind} has 1 to {MAX_SECRET_CHARS} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadInput(f"device {device!r}: a {credential.kind} must be Unicode text") from None
    elif len(value) > MAX_PEM_CHARS:
        raise BadInput(f"device {device!r}: a PEM has at most {MAX_PEM_CHARS} characters")
    elif credential.kind == "public-key":
        _check_public_key(device, value)
    else:
        _check_certificate(device, value)


# `cryptography` is loaded by the first PEM only: every start of a worker would pay for it.


def _check_public_key(device: str, pem: str) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"device {device!r}: expected a PEM that begins with BEGIN PUBLIC KEY") from None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < 2048:
        raise BadInput(f"device {device!r}: an RSA key needs at least 2048 bits")
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise BadInput(f"device {device!r}: expected an RSA, EC or Ed25519 key")


def _check_certificate(device: str, pem: str) -> None:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        certificate.public_key()
        ends = certificate.not_valid_after_utc
    except (ValueError, UnsupportedAlgorithm):
        raise BadInput(f"device {device!r}: expected a PEM that begins with BEGIN CERTIFICATE") from None
    if ends < datetime.now(UTC):
        raise BadInput(f"device {device!r}: the certificate ended on {ends:%Y-%m-%d}")


def _hashed(secrets: Sequence[tuple[str, int, Credential]], generated: bool) -> list[StoredCredential]:
    hash_secret = passwords.hash_generated if generated else passwords.hash_password
    return [
        StoredCredential(
            device=device,
            n=n,
            kind=c.kind,
            value=hash_secret(c.value) if c.kind in ("password", "token") else c.value,
        )
        for device, n, c in secrets
    ]
