"""Issues and verifies the certificate of a migration: facts and keys for `core/certificate.py`.

An instance signs with a key of its own, `DIR/certificate.key` (mode 0600). Whoever knows the public half from
`fleetlift certificate key`, by a way that is trusted, knows who issued a certificate.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetlift import __version__
from fleetlift.config import own_key
from fleetlift.core import chain
from fleetlift.core.certificate import (
    FORMAT,
    Account,
    Certificate,
    PlanVersion,
    SideName,
    Standing,
    add_up,
    digest_of,
    render,
    sealed,
    to_sign,
)
from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.migration import Member
from fleetlift.core.plan import Plan
from fleetlift.core.verification import ENDS, Verification, verify
from fleetlift.migrate.planfile import parse_plan
from fleetlift.sides.open import side_kinds
from fleetlift.store import audit, ledger
from fleetlift.store import certificate as facts
from fleetlift.store import engine as store
from fleetlift.store.ledger import LedgerRow
from fleetlift.store.pool import Pool

if TYPE_CHECKING:  # loaded when a key is used: every start of a worker would pay for it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_FILE: Final = "certificate.key"
SCHEME: Final = "ed25519:"


# -- keys -------------------------------------------------------------------------------------------------


def signing_key(data_dir: Path) -> "Ed25519PrivateKey":
    """The instance's key, drawn when there is none yet. BadInput when the file holds none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(own_key(data_dir / KEY_FILE))


def public_text(key: "Ed25519PrivateKey") -> str:
    """The public half, as certificates and `fleetlift certificate key` write it: `ed25519:` and 64 digits."""
    return SCHEME + key.public_key().public_bytes_raw().hex()


def checked_key(text: str) -> str:
    """A public key as somebody has handed it on. BadInput when it is none."""
    key = text.strip()
    if not _hex(key.removeprefix(SCHEME), 32) or not key.startswith(SCHEME):
        raise BadInput(
            f"{key[:80]!r} is no public key: give {SCHEME} and 64 hexadecimal digits, as "
            "'fleetlift certificate key' shows it, or a file that holds that"
        )
    return key


def is_signed(key: str, message: bytes, signature: str) -> bool:
    """Whether `key` has signed `message`; False for what is no key or no signature."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    found, sign = _hex(key.removeprefix(SCHEME), 32), _hex(signature, 64)
    if not key.startswith(SCHEME) or found is None or sign is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(found).verify(sign, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _hex(text: str, length: int) -> bytes | None:
    """The bytes of lower-case digits; None for anything else, so that there is one way to write them."""
    if len(text) != 2 * length or text.strip("0123456789abcdef"):
        return None
    return bytes.fromhex(text)


# -- verifying --------------------------------------------------------------------------------------------


def verify_certificate(data: bytes, *, trusted_key: str | None = None) -> Verification:
    """Check a certificate's file. `trusted_key`: the public key that must have signed it."""
    return verify(data, read_plan=_read_plan, is_signed=is_signed, trusted_key=trusted_key)


def _read_plan(text: str, kinds: Sequence[str]) -> Plan:
    # Sides of other installations may be of kinds that this one has not; nothing connects to them here.
    return parse_plan(text, side_kinds=(*side_kinds(), *kinds))


# -- issuing ----------------------------------------------------------------------------------------------


async def issue(
    engine: Pool, backend: Pool, name: str, *, data_dir: Path, now: float, so_far: bool = False
) -> bytes:
    """The certificate of migration `name` as it stands now, signed.

    Raises NotFound, or Conflict while it is not over (unless `so_far`) or when its audit log is no chain.
    """
    async with engine.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        stored = await store.head(conn, name)
        finished = stored.state.phase in ENDS.values()
        if not finished and not so_far:
            raise Conflict(
                f"migration {name!r} is {stored.state.phase}: its certificate is issued when it is finished, "
                "reverted or released. Ask with --so-far for one that says how it stands"
            )
        links = await audit.whole_chain(conn, name)
        plans = await store.plan_versions(conn, name)
        members = await store.members_page(conn, name, limit=None)
    ended_at = next((link.at for link in reversed(links) if link.kind in ENDS), None) if finished else None
    devices = [member.device for member in members]
    async with backend.acquire() as conn, conn.transaction(isolation="repeatable_read", readonly=True):
        rows = await ledger.rows(conn, devices=devices)
        until = now if ended_at is None else chain.read_time(ended_at)
        commands = await facts.commands(conn, devices, stored.created_at, until)

    def written() -> bytes:
        plan = parse_plan(stored.plan, file=f"{name}.yaml")
        accounts = tuple(sorted((_account(row) for row in rows), key=lambda a: (a.device, a.channel, a.path)))
        sums, totals = add_up(accounts)
        unsealed = Certificate(
            format=FORMAT,
            fleetlift=__version__,
            migration=name,
            tenant=stored.tenant,
            issued_at=chain.written(now),
            finished=finished,
            phase=stored.state.phase,
            started_at=chain.written(stored.created_at),
            ended_at=ended_at,
            old=SideName(kind=plan.old.kind, address=plan.old.address),
            new=SideName(kind=plan.new.kind, address=plan.new.address),
            chain_head=links[-1].hash,
            sums=sums,
            commands=commands,
            plans=tuple(PlanVersion(version=n, since=chain.written(at), text=text) for n, at, text in plans),
            audit=tuple(links),
            members=tuple(_standing(member) for member in members),
            totals=totals,
            accounts=accounts,
        )
        key = signing_key(data_dir)
        signature = key.sign(to_sign(digest_of(unsealed))).hex()
        return render(sealed(unsealed, key=public_text(key), signature=signature))

    # Seconds of work for a large fleet: the loop has other callers meanwhile.
    return await asyncio.to_thread(written)


def _standing(member: Member) -> Standing:
    return Standing(
        device=member.device,
        rank=member.rank,
        rung=member.rung,
        wave=member.wave,
        epoch=member.epoch,
        state=member.state,
        reason=member.reason,
        told_at=None if member.told_at is None else chain.written(member.told_at),
        moved_at=None if member.moved_at is None else chain.written(member.moved_at),
    )


def _account(row: LedgerRow) -> Account:
    return Account(
        device=row.device,
        channel=row.channel,
        path=row.path,
        ranges=row.ranges.to_pg(),
        received=row.received,
        doubles=row.doubles,
        uncounted=row.uncounted,
    )
