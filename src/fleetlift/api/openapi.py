"""The API's own description, /api/openapi.json: what Litestar derives, with our errors and shorter names."""

import re
from typing import Any

import msgspec
from litestar import Litestar, Response, Router, get
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from fleetlift import __version__
from fleetlift.api.auth import VIEWER
from fleetlift.api.problems import MEDIA_TYPE, TYPE_PREFIX
from fleetlift.api.wire import Call
from fleetlift.core.identity import DEVICE_ID, TENANT_ID

DESCRIPTION = """A device backend, and the engine that moves a live fleet onto it.

Every call needs `Authorization: Bearer <token>`, except `/healthz` and `/readyz`. A token has a role:
`viewer` reads, `operator` also sends commands, changes shadows and steers migrations, `admin` also manages
devices, tokens and tenants. A token of a tenant sees that tenant's things only. Lists are paged: give `next`
of a page as `after`. Errors are problem documents (RFC 9457) whose `detail` says what to do."""

PROBLEM = {
    "type": "object",
    "description": "RFC 9457. `detail` says what to do; `errors` names the fields that are wrong.",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "examples": [TYPE_PREFIX + "not-found"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "incident": {"type": "string", "description": "Of a fault inside: its number in the log."},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {
                    "field": {"type": "string"},
                    "message": {"type": "string"},
                    "line": {"type": "integer"},
                    "column": {"type": "integer"},
                },
            },
        },
    },
}
SHADOW_UPDATE = {
    "type": "object",
    "required": ["state"],
    "properties": {
        "state": {
            "type": ["object", "null"],
            "properties": {"desired": {"type": ["object", "null"]}, "reported": {"type": ["object", "null"]}},
        },
        "version": {"type": "integer", "description": "Refused unless the shadow is at this version."},
        "clientToken": {"type": "string"},
    },
}
_LISTING = re.compile(r"Listing_(?:[\w.]+\.)?(\w+?)(?:Out)?_")


class NoPages(Router):
    """Litestar would serve HTML pages beside the description: they are left out."""

    def register(self, value: Any) -> Any:
        return []


CONFIG = OpenAPIConfig(
    title="Fleetlift",
    version=__version__,
    description=DESCRIPTION,
    components=Components(security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}),
    security=[{"token": []}],
    use_handler_docstrings=True,
    openapi_router=NoPages("/api", route_handlers=[], include_in_schema=False),
)


def describe(app: Litestar) -> dict[str, Any]:
    """The OpenAPI document of `app`."""
    text = msgspec.json.encode(app.openapi_schema.to_schema()).decode()
    text = _LISTING.sub(
        lambda match: f"ListOf{match[1].capitalize() if match[1] == 'str' else match[1]}", text
    )
    document: dict[str, Any] = msgspec.json.decode(text)
    document["components"]["schemas"]["Problem"] = PROBLEM
    error = {
        "description": "What went wrong, and what to do.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("In"):
            schema["additionalProperties"] = (
                False  # what is not known is refused, so that no typo goes unseen
            )
    document["components"]["schemas"]["TenantIn"]["properties"]["id"]["pattern"] = f"^{TENANT_ID.pattern}$"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path" and parameter["name"] == "device":
                    parameter["schema"]["pattern"] = f"^{DEVICE_ID.pattern}$"
            responses = operation["responses"]
            for status in [s for s in responses if s.startswith("4")]:
                del responses[status]
            responses["default"] = error
            if path in ("/healthz", "/readyz"):
                operation["security"] = []
            if path == "/metrics":
                responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
            if path.endswith("/events"):
                responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
            if path.endswith("/shadow") and method == "patch":
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": SHADOW_UPDATE}},
                }
    return document


@get("/api/openapi.json", opt=VIEWER, include_in_schema=False)
async def show_description(request: Call) -> Response[bytes]:
    state = request.app.state
    if "openapi" not in state:
        state["openapi"] = msgspec.json.encode(describe(request.app))
    return Response(state["openapi"], media_type="application/json")
