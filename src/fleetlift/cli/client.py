"""The command line's connection to a Fleetlift API.

Where it goes, in this order: `--data DIR` (the `admin.env` that `fleetlift serve` wrote there), the
environment (`FLEETLIFT_URL`, `FLEETLIFT_TOKEN`, `FLEETLIFT_CA`), `./fleetlift-data/admin.env`.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from fleetlift.core.errors import BadInput, Conflict, FleetError, Forbidden, NotFound, Unavailable

if TYPE_CHECKING:
    import httpx

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Data directory of a local server; its admin.env says where to call.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most this many.")]

DEFAULT_DATA = Path("fleetlift-data")
PAGE = 1000  # the API's own limit a page
BY_STATUS: Mapping[int, type[FleetError]] = {
    400: BadInput,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    405: BadInput,
    409: Conflict,
    413: BadInput,
    503: Unavailable,
}


def read_env(path: Path) -> dict[str, str]:
    """The variables of a file of `NAME=value` lines, as a shell would read them."""
    values = {}
    for line in path.read_text().splitlines():
        words = shlex.split(line, comments=True)
        for word in words[1:] if words[:1] == ["export"] else words[:1]:
            name, found, value = word.partition("=")
            if found:
                values[name] = value
    return values


def connect(data: Path | None = None) -> "Api":
    """The API that `data` or the environment names; Unavailable, with what to do, when neither does."""
    return Api(*where(data))


def where(data: Path | None = None) -> tuple[str, str, str | None]:
    """Its address, the token and the file of its authority. Raises as `connect` does."""
    values: Mapping[str, str]
    if data is None and os.environ.get("FLEETLIFT_URL"):
        values, origin = os.environ, "the environment"
    else:
        path = (data or DEFAULT_DATA) / "admin.env"
        if not path.is_file():
            raise Unavailable(
                f"No server is known: {path} does not exist. Start one with "
                f"'fleetlift serve --data {path.parent}', name its data directory with --data, or set "
                "FLEETLIFT_URL and FLEETLIFT_TOKEN."
            )
        try:
            values, origin = read_env(path), str(path)
        except PermissionError:
            raise Forbidden(
                f"{path} belongs to another user: run this as the one who started the server."
            ) from None
    if not values.get("FLEETLIFT_TOKEN"):
        raise Forbidden(f"FLEETLIFT_TOKEN is missing from {origin}; 'fleetlift token create' makes one.")
    return values["FLEETLIFT_URL"], values["FLEETLIFT_TOKEN"], values.get("FLEETLIFT_CA") or None


def segment(text: str) -> str:
    """`text` as one segment of a path."""
    return quote(text, safe=":")


class Api:
    """Calls to `/api/v1` of one server. Problem documents come back as errors of `core/errors.py`."""

    def __init__(self, url: str, token: str, ca: str | None = None, *, timeout_s: float = 30.0) -> None:
        import ssl

        import httpx

        self.url = url.rstrip("/")
        verify: ssl.SSLContext | bool = True
        if self.url.startswith("https://") and ca:
            if not Path(ca).is_file():
                raise BadInput(f"FLEETLIFT_CA names {ca}, which is not a file.")
            verify = ssl.create_default_context(cafile=ca)
        self._client = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {token}", "user-agent": "fleetlift-cli"},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            verify=verify,
            trust_env=False,  # a proxy of the environment must not see tokens meant for this server
        )

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def request(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, body: Any = None
    ) -> Any:
        """The JSON answer (None when there is none); `path` is below `/api/v1`."""
        response = self._send(method, "/api/v1" + path, params, body)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise self._stranger(response) from None

    def get(self, path: str, **params: Any) -> Any:
        return self.request("GET", path, params=params)

    def post(self, path: str, body: Any = None) -> Any:
        return self.request("POST", path, body=body)

    def text(self, path: str, **params: Any) -> str:
        return self._send("GET", "/api/v1" + path, params, None).text

    def items(self, path: str, limit: int, **params: Any) -> tuple[list[dict[str, Any]], bool]:
        """Up to `limit` items of a list, page by page, and whether there are more."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            page = self.get(path, limit=min(PAGE, limit - len(found)), after=after, **params)
            found += page["items"]
            after = page["next"]
            if after is None or len(found) >= limit:
                return found, after is not None

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Server-sent events of `path`, each as its JSON data, until the server ends the stream."""
        import httpx

        try:
            with self._client.stream(
                "GET",
                "/api/v1" + path,
                headers={"accept": "text/event-stream"},
                timeout=httpx.Timeout(10.0, read=60.0),
            ) as response:
                if response.is_error:
                    response.read()
                    raise self._error(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc

    def _send(self, method: str, path: str, params: Mapping[str, Any] | None, body: Any) -> "httpx.Response":
        import httpx

        query = {name: value for name, value in (params or {}).items() if value is not None}
        try:
            response = self._client.request(method, path, params=query, json=body)
        except httpx.TransportError as exc:
            raise self._unreachable(exc) from exc
        if response.is_error:
            raise self._error(response)
        return response

    def _unreachable(self, exc: Exception) -> FleetError:
        text = re.sub(r"^\[Errno -?\d+\] ", "", str(exc)).lower()
        if "CERTIFICATE" in text.upper():
            return Unavailable(
                f"{self.url} shows a certificate that cannot be checked ({text}). Set FLEETLIFT_CA to the "
                "file of the authority that signed it, DIR/ca.pem of the server."
            )
        return Unavailable(
            f"No Fleetlift server answers at {self.url} ({text or type(exc).__name__}). "
            "Is it running? 'fleetlift serve' starts one."
        )

    def _stranger(self, response: "httpx.Response") -> FleetError:
        return Unavailable(f"{self.url} answered {response.status_code}, and not as a Fleetlift server does.")

    def _error(self, response: "httpx.Response") -> FleetError:
        cls = BY_STATUS.get(response.status_code, FleetError)
        try:
            document = response.json()
            text = str(document["detail"])
            if incident := document.get("incident"):
                text += f" (incident {incident})"
        except (ValueError, KeyError, TypeError):
            return self._stranger(response)
        if response.status_code == 401:
            text = f"{self.url} does not know this token: it may be revoked, or of another server."
        return cls(text)
