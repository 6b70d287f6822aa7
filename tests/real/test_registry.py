"""The registry and the tokens, on a real database."""

import time
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fleetlift.backend import passwords, registry, tokens
from fleetlift.backend.registry import Credential, NewDevice
from fleetlift.core.errors import BadInput, Conflict, FleetError, NotFound
from fleetlift.store import devices as store
from fleetlift.store.pool import Pool


def device(name: str = "d1", **what: Any) -> NewDevice:
    return NewDevice(id=name, tenant=what.pop("tenant", "t"), **what)


def secret(value: str) -> Credential:
    return Credential(kind="password", value=value)


def pem(key: Any) -> str:
    text: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return text.decode()


def certificate() -> str:
    import datetime as dt

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "d1")])
    now = dt.datetime.now(dt.UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now)
    return (
        built.not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


@pytest.fixture
async def conn(pool: Pool) -> Any:
    async with pool.acquire() as connection:
        await registry.create_tenant(connection, "t", "Tenant")
        yield connection


async def test_a_device_comes_back_without_its_secrets(conn: Any) -> None:
    """All that was put is there, of credentials the kinds alone; what is stored is a hash."""
    given = (
        secret("hunter2"),
        Credential(kind="public-key", value=pem(ec.generate_private_key(ec.SECP256R1()))),
    )
    made = await registry.put_device(conn, device(attributes={"hardware": 3}, credentials=given))
    assert (made.id, made.tenant, made.dialect, made.attributes) == ("d1", "t", "native", {"hardware": 3})
    assert made.credentials == ("password", "public-key")
    assert (made.connected, made.since) == (False, None)
    everything = str(await conn.fetch("SELECT * FROM device_credential")) + repr(made) + repr(given)
    assert "hunter2" not in everything
    [stored] = [c for c in (await store.credentials(conn, ["d1"]))["d1"] if c.kind == "password"]
    assert stored.value.startswith("$argon2id$")
    assert passwords.verify(stored.value, "hunter2")
    assert not passwords.verify(stored.value, "hunter3")


async def test_putting_again_replaces_and_leaves_out_what_is_not_named(conn: Any) -> None:
    """Credentials stay when none are named, go when an empty list is, and are replaced otherwise."""
    await registry.put_device(conn, device(credentials=(secret("a"), secret("b"))))
    await registry.put_device(conn, device(attributes={"x": 1}))
    assert len((await store.credentials(conn, ["d1"]))["d1"]) == 2
    await registry.put_device(conn, device(credentials=(secret("c"),)))
    [left] = (await store.credentials(conn, ["d1"]))["d1"]
    assert passwords.verify(left.value, "c")
    await registry.put_device(conn, device(credentials=()))
    assert await store.credentials(conn, ["d1"]) == {"d1": []}


async def test_a_granted_secret_stands_beside_the_devices_own(conn: Any) -> None:
    """A migration's credential survives a change of the device's own, and is taken back alone."""
    await registry.put_device(conn, device(credentials=(secret("own"),)))
    granted = passwords.generate_secret()
    assert await registry.grant_generated(conn, {"d1": granted, "unknown": granted}) == ["unknown"]
    before = await store.credentials(conn, ["d1"])
    await registry.grant_generated(conn, {"d1": granted})
    assert await store.credentials(conn, ["d1"]) == before, "repeating changes nothing"
    await registry.put_device(conn, device(credentials=(secret("new"),)))
    values = [c.value for c in (await store.credentials(conn, ["d1"]))["d1"]]
    assert [passwords.verify(values[0], "new"), passwords.verify(values[1], granted)] == [True, True]
    await registry.withdraw_generated(conn, ["d1"])
    assert len((await store.credentials(conn, ["d1"]))["d1"]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        device("a.b"),
        device(""),
        device("x" * 129),
        device(tenant="T!"),
        device(dialect="klingon"),
        device(attributes={"x": "y" * 20_000}),
        device(attributes={"x": "\x00"}),
        device(attributes={"x": object()}),
        device(credentials=(secret(""),)),
        device(credentials=(secret("x" * 1025),)),
        device(credentials=(secret("\ud800"),)),
        device(credentials=(secret("x"),) * 9),
        device(credentials=(Credential(kind="public-key", value="hello"),)),
        device(credentials=(Credential(kind="x509", value="hello"),)),
        device(credentials=(Credential(kind="x509", value="é" * 20_000),)),
        device(
            credentials=(Credential(kind="public-key", value=pem(rsa.generate_private_key(65537, 1024))),)
        ),
    ],
    ids=range(16),
)
async def test_what_cannot_be_a_device_is_refused(conn: Any, wrong: NewDevice) -> None:
    with pytest.raises(BadInput):
        await registry.put_device(conn, wrong)
    assert await store.count(conn) == 0


async def test_certificates_are_checked_and_kept(conn: Any) -> None:
    given = certificate()
    await registry.put_device(conn, device(credentials=(Credential(kind="x509", value=given),)))
    [stored] = (await store.credentials(conn, ["d1"]))["d1"]
    assert stored.value == given


async def test_a_tenant_sees_and_changes_only_its_own(conn: Any) -> None:
    await registry.create_tenant(conn, "other")
    await registry.put_device(conn, device())
    with pytest.raises(Conflict):
        await registry.put_device(conn, device(tenant="other"))
    with pytest.raises(NotFound):
        await registry.put_device(conn, device("d2", tenant="missing"))
    refused: list[FleetError] = []
    for call in (registry.get_device, registry.delete_device):
        with pytest.raises(NotFound) as raised:
            await call(conn, "d1", tenant="other")
        refused.append(raised.value)
    assert (await registry.list_devices(conn, tenant="other")).items == []
    await registry.delete_device(conn, "d1", tenant="t")
    with pytest.raises(NotFound):
        await registry.get_device(conn, "d1")
    assert [t.id for t in (await registry.list_tenants(conn)).items] == ["other", "t"]


async def test_a_deleted_devices_id_goes_to_no_other_tenant(conn: Any) -> None:
    """Its telemetry, shadows and commands stay: whoever had the id next would read them."""
    await registry.create_tenant(conn, "other")
    await registry.put_device(conn, device())
    await registry.delete_device(conn, "d1")
    with pytest.raises(Conflict):
        await registry.put_device(conn, device(tenant="other"))
    with pytest.raises(Conflict):
        await registry.put_devices(conn, [device("d2", tenant="other"), device(tenant="other")])
    assert (await registry.list_devices(conn, tenant="other")).items == []
    assert (await registry.put_device(conn, device())).tenant == "t"
    await registry.delete_device(conn, "d1")
    with pytest.raises(Conflict):
        await registry.put_device(conn, device(tenant="other"))


async def test_of_two_tenants_who_create_a_device_at_once_one_has_it(
    pool: Pool, conn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at whose it is and the writing are two steps: nobody takes a device in between."""
    await registry.create_tenant(conn, "other")
    looked = store.owners

    async def slow(there: Any, devices: Any) -> dict[str, str]:
        found = await looked(there, devices)
        monkeypatch.setattr(store, "owners", looked)
        async with pool.acquire() as second:
            await registry.put_device(second, device())
        return found

    monkeypatch.setattr(store, "owners", slow)
    with pytest.raises(Conflict):
        await registry.put_device(conn, device(tenant="other"))
    assert (await registry.get_device(conn, "d1")).tenant == "t"


async def test_devices_are_listed_by_condition_and_page(conn: Any) -> None:
    """Each device that the condition selects is on exactly one page, by id."""
    await registry.put_devices(conn, [device(f"d{n:04}", attributes={"hw": n % 3}) for n in range(2500)])
    seen: list[str] = []
    after = None
    while True:
        page = await registry.list_devices(conn, where="attributes.hw == 2", limit=100, after=after)
        seen += [d.id for d in page.items]
        if (after := page.next) is None:
            break
    assert seen == [f"d{n:04}" for n in range(2500) if n % 3 == 2]
    assert len(await registry.select_devices(conn, tenant="t")) == 2500
    assert (await registry.list_devices(conn, where="connected")).items == []
    with pytest.raises(BadInput):
        await registry.list_devices(conn, where="attributes.hw ==")
    with pytest.raises(BadInput):
        await registry.list_devices(conn, after="nonsense")


async def test_ten_thousand_devices_with_secrets_of_ours_need_no_slow_hash_each(
    conn: Any,
) -> None:
    made = [device(f"d{n}", credentials=(secret(passwords.generate_secret()),)) for n in range(10_000)]
    began = time.monotonic()
    await registry.put_devices(conn, made, generated=True)
    assert time.monotonic() - began < 60
    [stored] = (await store.credentials(conn, ["d9999"]))["d9999"]
    given = made[9999].credentials
    assert given is not None
    assert passwords.verify(stored.value, given[0].value)
    assert not passwords.verify(stored.value, given[0].value + "x")


async def test_tokens_tell_who_calls_until_they_are_revoked(pool: Pool, conn: Any) -> None:
    """A token names its role and tenant; a wrong, altered or revoked one names nobody."""
    token, text = await tokens.create_token(conn, "ci", "operator", "t")
    verifier = tokens.TokenVerifier(pool)
    who = await verifier.verify(text)
    assert who == tokens.Principal(token=token, name="ci", role=tokens.Role.OPERATOR, tenant="t")
    for wrong in ("", "x", text[:-1], text[:-1] + ("A" if text[-1] != "A" else "B"), text + "x", "flt_é"):
        assert await verifier.verify(wrong) is None
    assert text not in str(await conn.fetch("SELECT * FROM api_token"))
    [listed] = (await tokens.list_tokens(conn, tenant="t")).items
    assert (listed.id, listed.role, listed.revoked_at) == (token, "operator", None)
    with pytest.raises(NotFound):
        await tokens.revoke_token(conn, token, tenant="other")
    await tokens.revoke_token(conn, token, tenant="t")
    assert await tokens.TokenVerifier(pool).verify(text) is None
    assert tokens.Role.ADMIN.includes(tokens.Role.VIEWER)
    assert not tokens.Role.VIEWER.includes(tokens.Role.OPERATOR)


@pytest.mark.parametrize(
    ("name", "role", "tenant", "error"),
    [("x", "king", None, BadInput), ("", "admin", None, BadInput), ("x", "viewer", "nobody", NotFound)],
)
async def test_tokens_that_make_no_sense_are_refused(
    conn: Any, name: str, role: str, tenant: str | None, error: type[FleetError]
) -> None:
    with pytest.raises(error):
        await tokens.create_token(conn, name, role, tenant)
