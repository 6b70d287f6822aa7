"""Queries of API tokens. Only a hash of a token's secret half is stored."""

import msgspec

from fleetlift.store.paging import DEFAULT_LIMIT, Page, checked_limit, from_cursor, to_cursor
from fleetlift.store.pool import Conn


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """A token as people see it. Times are Unix seconds; `tenant` None: every tenant."""

    id: str
    name: str
    role: str
    tenant: str | None
    created_at: float
    revoked_at: float | None


_COLUMNS = """id, name, role, tenant, extract(epoch FROM created_at)::float8 AS created_at,
    extract(epoch FROM revoked_at)::float8 AS revoked_at"""


async def add(conn: Conn, token: str, name: str, role: str, tenant: str | None, secret_hash: bytes) -> None:
    await conn.execute(
        """INSERT INTO api_token (id, name, role, tenant, secret_hash) VALUES ($1, $2, $3, $4, $5)
           ON CONFLICT (id) DO UPDATE SET name = $2, role = $3, tenant = $4,
               secret_hash = $5, revoked_at = NULL""",
        token,
        name,
        role,
        tenant,
        secret_hash,
    )


async def find_valid(conn: Conn, token: str) -> tuple[TokenRow, bytes] | None:
    """The token and the hash of its secret; None when there is none, or it was revoked."""
    found = await conn.fetchrow(
        f"SELECT {_COLUMNS}, secret_hash FROM api_token WHERE id = $1 AND revoked_at IS NULL", token
    )
    if found is None:
        return None
    values = dict(found)
    secret_hash: bytes = values.pop("secret_hash")
    return TokenRow(**values), secret_hash


async def revoke(conn: Conn, token: str, *, tenant: str | None = None) -> bool:
    """False when there is no such token (of that tenant). Revoking twice is harmless."""
    status = await conn.execute(
        """UPDATE api_token SET revoked_at = coalesce(revoked_at, now())
           WHERE id = $1 AND ($2::text IS NULL OR tenant = $2)""",
        token,
        tenant,
    )
    return status != "UPDATE 0"


async def get_page(
    conn: Conn, *, tenant: str | None = None, limit: int = DEFAULT_LIMIT, after: str | None = None
) -> Page[TokenRow]:
    """Tokens by id, revoked ones too; of one tenant, or all."""
    checked_limit(limit)
    found = await conn.fetch(
        f"""SELECT {_COLUMNS} FROM api_token WHERE ($1::text IS NULL OR tenant = $1)
            AND ($2::text IS NULL OR id > $2) ORDER BY id LIMIT $3""",
        tenant,
        None if after is None else from_cursor(after, tuple[str])[0],
        limit + 1,
    )
    items = [TokenRow(**dict(r)) for r in found[:limit]]
    return Page(items, to_cursor(items[-1].id) if len(found) > limit else None)
