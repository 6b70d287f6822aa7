"""Who is calling, and what the role allows. Nothing is open that does not say so.

A route names the role it needs by `opt={"role": ...}` (see `VIEWER`, `OPERATOR`, `ADMIN`); one that
forgets to needs an administrator. Only `opt=OPEN` needs no token at all.
"""

from collections.abc import Mapping
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException
from litestar.handlers import BaseRouteHandler
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult

from fleetlift.backend.tokens import Role
from fleetlift.core.errors import Forbidden

VIEWER: dict[str, Any] = {"role": Role.VIEWER}
OPERATOR: dict[str, Any] = {"role": Role.OPERATOR}
ADMIN: dict[str, Any] = {"role": Role.ADMIN}
OPEN: dict[str, Any] = {"open": True}


def bearer_of(headers: Mapping[str, str]) -> str:
    """The bearer token of a request; empty when there is none."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


class BearerAuthentication(AbstractAuthenticationMiddleware):
    """Takes the bearer token of a request (RFC 6750, 2.1) and finds whose it is."""

    async def authenticate_request(
        self, connection: ASGIConnection[Any, Any, Any, Any]
    ) -> AuthenticationResult:
        if text := bearer_of(connection.headers):
            principal = await connection.app.state["services"].verifier.verify(text)
            if principal is not None:
                return AuthenticationResult(user=principal, auth=None)
        raise NotAuthorizedException("a valid token is needed")


def require_role(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Litestar guard: Forbidden unless the caller's role includes the one that the route needs."""
    if handler.opt.get("open"):
        return
    needed: Role = handler.opt.get("role", Role.ADMIN)
    if not connection.user.role.includes(needed):
        raise Forbidden(
            f"This needs the role {needed.value}; token {connection.user.name!r} has "
            f"{connection.user.role.value}. Ask an administrator for another token."
        )
