"""Errors as problem documents (RFC 9457): one table from what was raised to what the caller reads.

A document has `type` (a stable name to test for), `title`, `status`, `detail` (what to do), `instance` (the
path asked for) and, where fields of the input are wrong, `errors`: a list of `{field, message}`. An internal
error carries `incident`, the number under which the log holds what happened; the document never does.
"""

import uuid
from typing import Any

import asyncpg
import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotAuthorizedException,
    NotFoundException,
    PermissionDeniedException,
    SerializationException,
    ValidationException,
)

from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, NotFound, Unavailable
from fleetlift.log import get_logger
from fleetlift.migrate.plan_reader import BadPlan

log = get_logger(__name__)

TYPE_PREFIX = "urn:fleetlift:problem:"
MEDIA_TYPE = "application/problem+json"


class Kind(msgspec.Struct, frozen=True):
    """One row of the table: the name in `type`, the title, the status, and seconds to wait before a retry."""

    slug: str
    title: str
    status: int
    retry_after_s: int | None = None


NOT_SIGNED_IN = Kind("not-signed-in", "A token is needed", 401)
FORBIDDEN = Kind("forbidden", "This token may not do that", 403)
NO_SUCH_PATH = Kind("no-such-path", "There is nothing at this path", 404)
WRONG_METHOD = Kind("wrong-method", "This path does not know that method", 405)
TOO_LARGE = Kind("too-large", "The request is too large", 413)
UNAVAILABLE = Kind("unavailable", "A part that is needed does not answer", 503, retry_after_s=2)
INTERNAL = Kind("internal", "Something went wrong inside Fleetlift", 500)
BAD_INPUT = Kind("bad-input", "The input cannot be used as it is", 400)

KINDS: dict[type[Exception], Kind] = {
    BadInput: BAD_INPUT,
    NotFound: Kind("not-found", "There is no such thing", 404),
    Conflict: Kind("conflict", "The state does not allow that now", 409),
    Forbidden: FORBIDDEN,
    Unavailable: UNAVAILABLE,
    asyncpg.PostgresConnectionError: UNAVAILABLE,
    asyncpg.InterfaceError: UNAVAILABLE,  # the pool is closing, or a connection was lost under a query
    asyncpg.CannotConnectNowError: UNAVAILABLE,
    asyncpg.AdminShutdownError: UNAVAILABLE,
    ConnectionError: UNAVAILABLE,
    TimeoutError: UNAVAILABLE,
    NotAuthorizedException: NOT_SIGNED_IN,
    PermissionDeniedException: FORBIDDEN,
    NotFoundException: NO_SUCH_PATH,
    MethodNotAllowedException: WRONG_METHOD,
    ValidationException: BAD_INPUT,
    SerializationException: BAD_INPUT,
    msgspec.ValidationError: BAD_INPUT,
    msgspec.DecodeError: BAD_INPUT,
    UnicodeDecodeError: BAD_INPUT,  # what msgspec raises for JSON in another encoding than UTF-8
    asyncpg.CharacterNotInRepertoireError: BAD_INPUT,
    asyncpg.UntranslatableCharacterError: BAD_INPUT,
    RecursionError: BAD_INPUT,  # JSON nested deeper than any document of ours
}

ADVICE = {
    NOT_SIGNED_IN.slug: "Send 'Authorization: Bearer <token>' with a token that is known and not revoked; "
    "`fleetlift token create` makes one.",
    NO_SUCH_PATH.slug: "The paths are listed in /api/openapi.json.",
    UNAVAILABLE.slug: "Try again in a few seconds; /readyz names the part that is missing.",
    INTERNAL.slug: "Look up the incident in the log of the server, and report it if it comes back.",
    TOO_LARGE.slug: "Send less at once: a request may hold 1 MiB.",
}


def kind_of(exc: Exception) -> Kind:
    """The row for `exc`, by its nearest class in the table; anything unknown is internal."""
    for cls in type(exc).__mro__:
        if cls in KINDS:
            kind = KINDS[cls]
            if isinstance(exc, FleetError) and exc.status != kind.status:
                return msgspec.structs.replace(kind, status=exc.status)  # a subclass with its own status
            return kind
    if isinstance(exc, HTTPException):
        if exc.status_code == 413:
            return TOO_LARGE
        if exc.status_code < 500:
            return msgspec.structs.replace(BAD_INPUT, status=exc.status_code)
    if isinstance(exc, OSError) and not isinstance(exc, (FileNotFoundError, PermissionError)):
        return UNAVAILABLE
    if type(exc).__module__.startswith("nats.") and "Timeout" in type(exc).__name__:
        return UNAVAILABLE
    return INTERNAL


def field_errors(exc: Exception) -> list[dict[str, Any]]:
    """Which fields of the input are wrong: `{field, message}` of each, as Litestar found them."""
    if isinstance(exc, BadPlan):
        return [
            {"field": p.key or "plan", "message": p.text, "line": p.line, "column": p.column}
            for p in exc.problems
        ]
    extra = getattr(exc, "extra", None)
    if not isinstance(extra, list):
        return []
    return [
        {"field": str(item.get("key") or "body"), "message": str(item.get("message", ""))}
        for item in extra
        if isinstance(item, dict)
    ]


def problem(exc: Exception, path: str) -> dict[str, Any]:
    """The document for `exc`; of an internal error nothing but its incident number gets out."""
    kind = kind_of(exc)
    errors = field_errors(exc)
    if isinstance(exc, FleetError) and kind is not INTERNAL:
        detail = str(exc) or kind.title
    elif errors:
        detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors)
    elif isinstance(exc, asyncpg.PostgresError) and kind is BAD_INPUT:
        detail = "A text holds a character that cannot be stored, such as NUL."
    elif isinstance(exc, UnicodeDecodeError):
        detail = f"The body is not UTF-8 text: byte {exc.start} of a text in it is not."
    elif isinstance(exc, RecursionError):
        detail = "The document is nested too deeply."
    elif isinstance(exc, SerializationException) or kind is BAD_INPUT:
        cause = exc.__cause__ or exc
        detail = cause.detail if isinstance(cause, HTTPException) else str(cause)
    else:
        detail = ADVICE.get(kind.slug, kind.title)
    document: dict[str, Any] = {
        "type": TYPE_PREFIX + kind.slug,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "instance": path,
    }
    if errors:
        document["errors"] = errors
    for name in ("code", "field"):  # e.g. the shadow service's own error codes
        value = getattr(exc, name, None)
        if isinstance(exc, FleetError) and isinstance(value, str | int):
            document[name] = value
    if kind is INTERNAL:
        document["incident"] = uuid.uuid4().hex[:12]
    return document


def answer(request: Request[Any, Any, Any], exc: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything that is raised."""
    if isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        inner = exc.exceptions[0]
        exc = inner if isinstance(inner, Exception) else exc
    kind = kind_of(exc)
    document = problem(exc, request.url.path)
    if kind is INTERNAL:
        log.error(
            "request_failed",
            incident=document["incident"],
            method=request.method,
            path=request.url.path,
            exc_info=exc,
        )
    elif kind is UNAVAILABLE:
        log.warning("request_found_part_missing", path=request.url.path, error=f"{type(exc).__name__}: {exc}")
    headers = {"cache-control": "no-store"}
    if kind is NOT_SIGNED_IN:
        headers["www-authenticate"] = 'Bearer realm="fleetlift"'
    if kind.retry_after_s:
        headers["retry-after"] = str(kind.retry_after_s)
    if isinstance(exc, MethodNotAllowedException) and exc.headers:
        headers.update(exc.headers)
    return Response(
        msgspec.json.encode(document),
        status_code=kind.status,
        media_type=MEDIA_TYPE if request.method != "HEAD" else MediaType.TEXT,
        headers=headers,
    )
