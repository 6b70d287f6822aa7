"""One typed object holds every setting. Read once, at the start; nobody else touches `os.environ`.

The parent process writes it to `DIR/run.json` (mode 0600: it holds the engines' passwords) and each worker
reads it from there, so that no secret is ever on a command line or in an environment.
"""

import contextlib
import os
import random
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from fleetlift.core.errors import BadInput, Unavailable

SECRET_FIELDS = frozenset(
    {"nats_auth_password", "nats_svc_password", "nats_sys_password", "nats_issuer_seed", "database_url"}
    | {"engine_database_url"}
)
RUN_FILE = "run.json"
_FREE_PORTS = range(20_000, 32_000)
_given: set[int] = set()


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Where everything is. Addresses are `host:port` with the real port; empty when there is none."""

    data_dir: str
    http: str = "127.0.0.1:8080"
    http_tls: bool = False  # the API is served by TLS with cert_file and key_file
    mqtt: str = "127.0.0.1:1883"  # plain MQTT; empty when only TLS is offered
    mqtts: str = ""
    ca_file: str = ""  # whom callers must trust to believe our certificate
    cert_file: str = ""
    key_file: str = ""

    nats_url: str = "nats://127.0.0.1:4222"
    nats_embedded: bool = True
    nats_ca: str = ""  # PEM file of the authority of an external server reached by tls://
    nats_auth_user: str = "auth"  # account AUTH: answers the auth callout
    nats_auth_password: str = ""
    nats_svc_user: str = "svc"  # account DEV: the services, beside the devices
    nats_svc_password: str = ""
    nats_sys_user: str = "sys"  # account SYS: presence, kicking
    nats_sys_password: str = ""
    nats_issuer_seed: str = ""  # account nkey that signs what the callout grants
    nats_device_account: str = "DEV"

    database_url: str = ""
    database_embedded: bool = True
    engine_database_url: str = ""  # the migration engine's; the same database unless told otherwise

    log_max_age_s: int = 7 * 86400  # how long the log keeps messages
    log_max_bytes: int = 20 * 1024**3
    log_replicas: int = 1  # on so many servers of a cluster
    telemetry_keep_days: int = 30  # older telemetry is dropped, a whole day at a time
    shadow_state_bytes: int = 65_536  # desired and reported of one shadow together; AWS allows 8192
    log_level: str = "info"
    pid: int = 0  # of the parent
    started_at: float = 0.0

    def __repr__(self) -> str:
        shown = (
            f"{name}={'***' if name in SECRET_FIELDS and getattr(self, name) else repr(getattr(self, name))}"
            for name in self.__struct_fields__
        )
        return f"Settings({', '.join(shown)})"

    @property
    def engine_url(self) -> str:
        """The database URL of the migration engine."""
        return self.engine_database_url or self.database_url

    @property
    def path(self) -> Path:
        return Path(self.data_dir)

    @property
    def http_url(self) -> str:
        """The API's address as a caller on this machine writes it, without a final slash."""
        host, port = split_address(self.http)
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self.http_tls else 'http'}://{shown}:{port}"


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment says: engines of one's own instead of the embedded ones, and limits."""

    nats_url: str = ""  # nats://HOST:PORT, or tls://HOST:PORT; of a cluster several, with commas between
    nats_ca: str = ""
    nats_auth_user: str = "auth"
    nats_auth_password: str = ""
    nats_svc_user: str = "svc"
    nats_svc_password: str = ""
    nats_sys_user: str = "sys"
    nats_sys_password: str = ""
    nats_issuer_seed: str = ""
    nats_device_account: str = "DEV"
    database_url: str = ""
    engine_database_url: str = ""
    log_max_age_s: int = 7 * 86400
    log_max_bytes: int = 20 * 1024**3
    log_replicas: int = 1
    telemetry_keep_days: int = 30
    shadow_state_bytes: int = 65_536
    log_level: str = "info"
    sync: str = "100ms"  # embedded NATS: how often the log is forced to disk; "always" is 25 times slower


def overrides_from(environ: Mapping[str, str] | None = None) -> Overrides:
    """Settings given as `FLEETLIFT_…` variables, one for each field of `Overrides`.

    Raises BadInput naming the variable that cannot be used.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, str | int] = {}
    for field in msgspec.structs.fields(Overrides):
        variable = f"FLEETLIFT_{field.name.upper()}"
        text = environ.get(variable, "")
        if not text:
            continue
        if field.type is int:
            if not text.isdecimal() or int(text) <= 0:
                raise BadInput(f"{variable}={text!r}: give a whole number above 0")
            found[field.name] = int(text)
        else:
            found[field.name] = text
    overrides = msgspec.convert(found, Overrides)
    if not re.fullmatch(r"always|[1-9]\d{0,5}(ms|s)", overrides.sync):
        raise BadInput(f"FLEETLIFT_SYNC={overrides.sync!r}: give always, or a time such as 100ms or 1s")
    if overrides.log_replicas > 1 and not overrides.nats_url:
        raise BadInput(
            f"FLEETLIFT_LOG_REPLICAS={overrides.log_replicas}: the embedded NATS is one server; name a "
            "cluster in FLEETLIFT_NATS_URL (docs/durability.md)"
        )
    if overrides.log_replicas not in (1, 3, 5):
        raise BadInput(f"FLEETLIFT_LOG_REPLICAS={overrides.log_replicas}: give 1, 3 or 5")
    needed = ("nats_auth_password", "nats_svc_password", "nats_sys_password", "nats_issuer_seed")
    missing = [f"FLEETLIFT_{name.upper()}" for name in needed if not getattr(overrides, name)]
    if overrides.nats_url and missing:
        raise BadInput(
            f"FLEETLIFT_NATS_URL is set, but not {', '.join(missing)}: docs/engines.md says which users and "
            "keys an external NATS needs"
        )
    return overrides


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, and never see half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def own_key(path: Path) -> bytes:
    """The 32 secret bytes in a private file of the data directory, drawn when there are none yet."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        write_private(temporary, secrets.token_hex(32) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # of two processes one wins, and nobody reads half a key
        finally:
            temporary.unlink()
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise BadInput(f"{path} is not a key of 64 hexadecimal digits: restore it from a backup")
    return key


def save_run(settings: Settings) -> None:
    """Leave the settings of the running instance in `DIR/run.json`."""
    write_private(
        settings.path / RUN_FILE, msgspec.json.format(msgspec.json.encode(settings)).decode() + "\n"
    )


def load_run(data_dir: str | Path) -> Settings:
    """The settings of the instance running on `data_dir`. Raises Unavailable when none has started there."""
    path = Path(data_dir) / RUN_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Settings)
    except FileNotFoundError:
        raise Unavailable(f"{path} is missing: start `fleetlift serve --data {data_dir}` first") from None
    except (msgspec.DecodeError, OSError) as problem:
        raise BadInput(f"{path} cannot be read ({problem}): start `fleetlift serve` again") from problem


def read_env(path: Path) -> dict[str, str]:
    """NAME=value lines of a file; empty when there is none."""
    if not path.exists():
        return {}
    pairs = (
        line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#")
    )
    return {name.strip(): value.strip() for name, _, value in pairs}


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` as (host, port). Raises BadInput."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"address {text!r}: write HOST:PORT, as in 127.0.0.1:8080 (port 0 picks a free one)")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen_once(host: str, port: int) -> None:
    """Raises OSError where nobody could listen now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        # A listener on every address is only noticed by listening oneself.
        probe.listen(1)


def free_port(*hosts: str) -> int:
    """A port on which nobody listens now on any of `hosts` (loopback unless given).

    Neither one that was given before, nor one of those that the system gives to connections (on Linux from
    32768 on): such a one may be taken before it is listened on.
    """
    left = [port for port in _FREE_PORTS if port not in _given]
    for port in random.sample(left, len(left)):
        with contextlib.suppress(OSError):
            for host in hosts or ("127.0.0.1",):
                _listen_once(host, port)
            _given.add(port)
            return port
    raise Unavailable(f"no port from {_FREE_PORTS[0]} to {_FREE_PORTS[-1]} is free: name one")


def checked_address(text: str, purpose: str) -> str:
    """`text` with a real port that can be listened on now. Raises Unavailable when it is busy or not ours."""
    host, port = split_address(text)
    try:
        if port == 0:
            _listen_once(host, 0)  # whether the address is ours
            return join_address(host, free_port(host))
        _listen_once(host, port)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise Unavailable(
            f"{purpose} cannot listen on {text} ({reason.lower()}): choose another address with "
            f"--{purpose}, or stop the program that uses it"
        ) from problem
    return join_address(host, port)
