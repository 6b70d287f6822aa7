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

from fleetlift.backend.tokens import Principal, Role
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
    """Takes the bearer token of a request (RFC 6750, 2.1), finds whose it is and whether the role is enough.

    The role is looked at here and not in one of Litestar's guards: for a guard it copies the whole handler,
    at every request.
    """

    async def authenticate_request(
        self, connection: ASGIConnection[Any, Any, Any, Any]
    ) -> AuthenticationResult:
        if text := bearer_of(connection.headers):
            principal = await connection.app.state["services"].verifier.verify(text)
            if principal is not None:
                require_role(principal, connection.route_handler)
                return AuthenticationResult(user=principal, auth=None)
        raise NotAuthorizedException("a valid token is needed")


def require_role(principal: Principal, handler: BaseRouteHandler) -> None:
    """Forbidden unless the caller's role includes the one that the route needs."""
    needed: Role = handler.opt.get("role", Role.ADMIN)
    if not principal.role.includes(needed):
        raise Forbidden(
            f"This needs the role {needed.value}; token {principal.name!r} has "
            f"{principal.role.value}. Ask an administrator for another token."
        )
