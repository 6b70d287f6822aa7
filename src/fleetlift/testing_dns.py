"""Real DNS servers for tests and demos: Knot and BIND on loopback, with a TSIG key, in a directory of their
own.

They come from Debian's packages `knot` and `bind9`; `scripts/debian_packages.sh` installs them where it may.
"""

import asyncio
import base64
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from fleetlift.config import free_port, join_address
from fleetlift.core.errors import FleetError, Unavailable
from fleetlift.levers.dns_query import ask
from fleetlift.levers.rfc2136 import TsigKey
from fleetlift.supervise import before_exec, log_tail

READY_WITHIN_S = 20.0


def free_dns_port() -> int:
    """A port of loopback that is free for UDP and TCP."""
    while True:
        with socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            port = free_port()
            udp.bind(("127.0.0.1", port))
            return port


class DnsServer(msgspec.Struct, frozen=True, kw_only=True):
    """A server at work. `address` is host:port, for TCP and UDP."""

    kind: str  # knot | bind
    zone: str
    address: str
    key: TsigKey
    pid: int

    @property
    def key_text(self) -> str:
        """The key as FLEETLIFT_DNS_KEY takes it. A secret: for environments and private files only."""
        return f"{self.key.algorithm}:{self.key.name}:{base64.b64encode(self.key.secret).decode()}"


def _zone_file(zone: str, records: Sequence[str]) -> str:
    head = [
        f"$ORIGIN {zone}.",
        "$TTL 300",
        "@ 300 IN SOA ns hostmaster 1 3600 600 86400 60",
        "@ 300 IN NS ns",
        "ns 300 IN A 127.0.0.1",
    ]
    return "\n".join([*head, *records, ""])


def _knot_config(
    directory: Path, zone: str, port: int, key: TsigKey, primary: str | None, notify: str
) -> str:
    remotes = [
        f"  - id: {name}\n    address: {address.replace(':', '@')}\n    key: {key.name}\n"
        for name, address in (("primary", primary), ("secondary", notify))
        if address
    ]
    return f"""
server:
  listen: 127.0.0.1@{port}
  rundir: {directory}/run
  udp-workers: 1
  tcp-workers: 1
  background-workers: 1
database:
  storage: {directory}/db
  journal-db-max-size: 16M
log:
  - target: stderr
    any: info
key:
  - id: {key.name}
    algorithm: {key.algorithm}
    secret: {base64.b64encode(key.secret).decode()}
acl:
  - id: keyed
    key: {key.name}
    action: [update, transfer, notify]
{"remote:" if remotes else ""}
{"".join(remotes)}
zone:
  - domain: {zone}
    storage: {directory}
    file: zone.db
    acl: keyed
    semantic-checks: off
    {"master: primary" if primary else ""}
    {"notify: secondary" if notify else ""}
"""


def _bind_config(directory: Path, zone: str, port: int, key: TsigKey) -> str:
    secret = base64.b64encode(key.secret).decode()
    return f"""
options {{
    directory "{directory}"; listen-on port {port} {{ 127.0.0.1; }}; listen-on-v6 {{ none; }};
    pid-file none; session-keyfile none; recursion no; notify no; dnssec-validation no; max-cache-size 8m;
}};
controls {{ }};
key "{key.name}" {{ algorithm {key.algorithm}; secret "{secret}"; }};
zone "{zone}" {{ type primary; file "{directory}/zone.db"; allow-update {{ key "{key.name}"; }}; }};
"""


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed: run scripts/debian_packages.sh {package}")
    return found


@contextlib.asynccontextmanager
async def _running(
    kind: str, command: Sequence[str], directory: Path, zone: str, port: int, key: TsigKey
) -> AsyncIterator[DnsServer]:
    log_file = directory / f"{kind}.log"
    with log_file.open("ab") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - a fork, then it is polled
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=before_exec(os.getpid(), signal.SIGKILL),
        )
    try:
        deadline = asyncio.get_running_loop().time() + READY_WITHIN_S
        while True:
            with contextlib.suppress(FleetError):
                await ask(("127.0.0.1", port), zone, "SOA", timeout_s=1.0)
                break
            if process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"{kind} did not become ready:\n{log_tail(log_file, 20)}")
            await asyncio.sleep(0.02)
        address = join_address("127.0.0.1", port)
        yield DnsServer(kind=kind, zone=zone, address=address, key=key, pid=process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.asynccontextmanager
async def running_knot(
    directory: Path,
    zone: str = "example.test",
    records: Sequence[str] = (),
    *,
    port: int = 0,
    key: TsigKey | None = None,
    primary: str | None = None,
    notify: str = "",
) -> AsyncIterator[DnsServer]:
    """Knot with one zone. `records` are lines of a zone file, such as `iot 300 A 127.0.0.1`.

    With `primary` (host:port) it holds a copy of that server's zone; `notify` is where it tells of changes.
    Started again in the same directory with the same port and key it goes on where it was.
    """
    key = key or TsigKey(name="fleetlift-test", algorithm="hmac-sha256", secret=secrets.token_bytes(32))
    port = port or free_dns_port()
    for name in ("run", "db"):
        (directory / name).mkdir(exist_ok=True, parents=True)
    if not (directory / "zone.db").exists() and primary is None:
        (directory / "zone.db").write_text(_zone_file(zone, records))
    config = directory / "knot.conf"
    config.touch(0o600)
    config.write_text(_knot_config(directory, zone, port, key, primary, notify))
    command = [_program("knotd", "knot"), "-c", str(config)]
    async with _running("knot", command, directory, zone, port, key) as server:
        yield server


@contextlib.asynccontextmanager
async def running_bind(
    directory: Path,
    zone: str = "example.test",
    records: Sequence[str] = (),
    *,
    port: int = 0,
    key: TsigKey | None = None,
) -> AsyncIterator[DnsServer]:
    """BIND with one zone, as `running_knot`."""
    key = key or TsigKey(name="fleetlift-test", algorithm="hmac-sha256", secret=secrets.token_bytes(32))
    port = port or free_dns_port()
    directory.mkdir(exist_ok=True, parents=True)
    if not (directory / "zone.db").exists():
        (directory / "zone.db").write_text(_zone_file(zone, records))
    config = directory / "named.conf"
    config.touch(0o600)
    config.write_text(_bind_config(directory, zone, port, key))
    command = [_program("named", "bind9"), "-g", "-n", "1", "-c", str(config)]
    async with _running("bind", command, directory, zone, port, key) as server:
        yield server
