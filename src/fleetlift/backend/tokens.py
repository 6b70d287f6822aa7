"""API tokens: who may do what.

A token reads `flt_{id}_{secret}`: the id finds its row, the secret (32 random bytes) is compared by hash.
"""

import hmac
import re
import secrets
import time
from collections import OrderedDict
from enum import StrEnum
from hashlib import sha256

import msgspec

from fleetlift.core.errors import BadInput, NotFound
from fleetlift.store import devices as device_store
from fleetlift.store import tokens as store
from fleetlift.store.paging import DEFAULT_LIMIT, Page
from fleetlift.store.pool import Conn, Pool
from fleetlift.store.tokens import TokenRow

_TOKEN = re.compile(r"flt_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_CACHED_FOR_S = 5.0  # a revoked token works at most this much longer
_CACHED_MAX = 1000


class Role(StrEnum):
    """What a token may do; each role may do what those before it may."""

    VIEWER = "viewer"  # read
    OPERATOR = "operator"  # send commands, change shadows and devices, steer migrations
    ADMIN = "admin"  # tenants and tokens

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who is calling. `tenant` None: every tenant."""

    token: str  # the public half
    name: str
    role: Role
    tenant: str | None = None


async def create_token(conn: Conn, name: str, role: str, tenant: str | None = None) -> tuple[str, str]:
    """Make a token; returns its id and its text, which is shown this once and stored nowhere.

    Raises BadInput (role, name) or NotFound (tenant).
    """
    checked = _checked_role(role)
    if not 1 <= len(name) <= 200 or "\x00" in name:
        raise BadInput("token name: use 1 to 200 characters")
    if tenant is not None and not await device_store.existing_tenants(conn, [tenant]):
        raise NotFound(f"tenant {tenant!r} does not exist: create it first")
    token, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    await store.add(conn, token, name, checked, tenant, _hash(secret))
    return token, f"flt_{token}_{secret}"


async def revoke_token(conn: Conn, token: str, *, tenant: str | None = None) -> None:
    """Make a token (by id) worthless. Raises NotFound, also for another tenant's."""
    if not await store.revoke(conn, token, tenant=tenant):
        raise NotFound(f"token {token!r} does not exist: check its id")


async def list_tokens(
    conn: Conn, *, tenant: str | None = None, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[TokenRow]:
    """Tokens by id, without their secrets; of one tenant, or all."""
    return await store.get_page(conn, tenant=tenant, limit=limit, after=after)


class TokenVerifier:
    """Tells who a token belongs to, remembering good ones for a few seconds."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()

    async def verify(self, text: str) -> Principal | None:
        """None for a token that is unknown, wrong or revoked (for `_CACHED_FOR_S` seconds, still known)."""
        if not _TOKEN.fullmatch(text):
            return None
        key, now = _hash(text), time.monotonic()
        if (known := self._known.get(key)) is not None:
            if known[0] > now:
                return known[1]
            del self._known[key]
        async with self._pool.acquire() as conn:
            principal = await verify_token(conn, text)
        if principal is not None:
            self._known[key] = (now + _CACHED_FOR_S, principal)
            if len(self._known) > _CACHED_MAX:
                self._known.popitem(last=False)
        return principal


async def verify_token(conn: Conn, text: str) -> Principal | None:
    """Who a token belongs to, asking the database; None for one that is unknown, wrong or revoked."""
    if (parts := _TOKEN.fullmatch(text)) is None:
        return None
    found = await store.find_valid(conn, parts[1])
    if found is None or not hmac.compare_digest(found[1], _hash(parts[2])):
        return None
    row = found[0]
    return Principal(token=row.id, name=row.name, role=Role(row.role), tenant=row.tenant)


def _checked_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise BadInput(f"role {role!r}: use viewer, operator or admin") from None


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()
