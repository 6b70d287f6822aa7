"""Real engines and whole backends for tests, of this project and of those who build on it.

Everything is on loopback, on free ports, in directories that go away.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import msgspec

from fleetlift.bus.connect import connected, ensure_log
from fleetlift.bus.embedded import EmbeddedNats, NatsSecrets, random_database_password
from fleetlift.config import Settings, load_run, read_env, split_address
from fleetlift.config import free_port as free_port
from fleetlift.core.errors import Unavailable
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.migrate import migrate
from fleetlift.supervise import before_exec, log_tail
from fleetlift.testing_dns import DnsServer as DnsServer
from fleetlift.testing_dns import running_bind as running_bind
from fleetlift.testing_dns import running_knot as running_knot

T = TypeVar("T")


@contextlib.contextmanager
def scratch_directory(prefix: str = "fleetlift-test-", parent: Path | None = None) -> Iterator[Path]:
    """A directory that the engines' users may pass through (pytest's own are closed to them)."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class LoopThread:
    """An event loop in a thread of its own, so that engines outlive the loop of a single test."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)


class TestPostgres:
    """A throwaway PostgreSQL, and databases in it that begin with the whole schema."""

    __test__ = False

    def __init__(self, directory: Path) -> None:
        self._server = EmbeddedPostgres(
            directory / "pg",
            password=random_database_password(),
            log_file=directory / "postgresql.log",
            throwaway=True,
            extra={"max_connections": "200", "shared_buffers": "64MB"},
        )
        self.url = ""  # of a migrated database that nobody should write to: it is the template
        self._count = 0

    async def start(self) -> None:
        self.url = await self._server.start()
        await migrate(self.url)

    async def stop(self) -> None:
        await self._server.stop()

    async def new_database(self, *, template: str = "fleetlift") -> str:
        """The URL of a fresh database with the newest schema (`template1`: an empty one)."""
        self._count += 1
        name = f"test_{self._count}"
        await self._maintain(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url.replace("@/fleetlift?", f"@/{name}?")

    async def drop_database(self, url: str) -> None:
        await self._maintain(f"DROP DATABASE IF EXISTS {urlsplit(url).path[1:]} WITH (FORCE)")

    async def _maintain(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url.replace("@/fleetlift?", "@/postgres?"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def nats_settings(directory: Path) -> Settings:
    """Settings of a fresh embedded NATS on free ports, without a database."""
    keys = NatsSecrets.new()
    return Settings(
        data_dir=str(directory),
        http=f"127.0.0.1:{free_port()}",
        mqtt=f"127.0.0.1:{free_port()}",
        nats_url=f"nats://127.0.0.1:{free_port()}",
        nats_auth_password=keys.auth,
        nats_svc_password=keys.svc,
        nats_sys_password=keys.sys,
        nats_issuer_seed=keys.issuer_seed,
        log_max_bytes=1024**3,
    )


class TestNats:
    """A NATS Server with the log made. Devices get in once an auth worker answers."""

    __test__ = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings = nats_settings(directory)
        self.server = EmbeddedNats(directory / "nats", self.settings, log_file=directory / "nats.log")

    async def start(self) -> None:
        await self.server.start()
        settings = self.settings
        async with connected(
            settings, user=settings.nats_svc_user, password=settings.nats_svc_password, name="setup"
        ) as client:
            await ensure_log(client, settings)

    async def stop(self) -> None:
        # Nothing in it is needed again, and a graceful stop of JetStream takes its time.
        self.server.child.spec = msgspec.structs.replace(self.server.child.spec, stop_signal=signal.SIGKILL)
        await self.server.stop()


class RunningBackend:
    """A `fleetlift serve` in a process of its own."""

    def __init__(self, data_dir: Path, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        self._arguments = arguments
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.settings = Settings(data_dir=str(data_dir))
        self.token = ""
        self.url = ""  # of the API, without a final slash
        self.mqtt = ("127.0.0.1", 0)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> Path:
        """What it printed."""
        return self.data_dir.with_name(self.data_dir.name + ".out")

    async def start(self, *, within_s: float = 60.0) -> None:
        """Start it and wait until it is ready. Raises Unavailable with what it printed."""
        command = [sys.executable, "-m", "fleetlift.cli.main", "serve", "--data", str(self.data_dir)]
        with self.output.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - a fork, then it is polled
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
                preexec_fn=before_exec(os.getpid(), signal.SIGTERM),
            )
        deadline = asyncio.get_running_loop().time() + within_s
        while not any(line.startswith("ready") for line in self.output.read_text().splitlines()):
            if self._process.poll() is not None or asyncio.get_running_loop().time() > deadline:
                text = log_tail(self.output, 30)
                await self.kill()
                raise Unavailable(f"fleetlift serve did not become ready:\n{text}")
            await asyncio.sleep(0.02)
        self.settings = load_run(self.data_dir)
        self.url = self.settings.http_url
        self.mqtt = split_address(self.settings.mqtt or self.settings.mqtts)
        self.token = read_env(self.data_dir / "admin.env")["FLEETLIFT_TOKEN"]

    async def stop(self, *, within_s: float = 60.0) -> int:
        """Stop it by SIGTERM and return its exit status; SIGKILL when it takes too long."""
        process = self._process
        assert process is not None
        if process.poll() is None:
            process.terminate()
        deadline = asyncio.get_running_loop().time() + within_s
        while (status := process.poll()) is None:
            if asyncio.get_running_loop().time() > deadline:
                process.kill()
            await asyncio.sleep(0.02)
        return status

    async def kill(self) -> None:
        """SIGKILL the parent; its children are then stopped by the kernel."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.kill()
        await asyncio.to_thread(self._process.wait)


@contextlib.asynccontextmanager
async def running_backend(
    data_dir: Path,
    *,
    http: str = "127.0.0.1:0",
    mqtt: str = "127.0.0.1:0",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[RunningBackend]:
    """A whole backend on `data_dir`, ready inside the block, stopped cleanly behind it.

    Addresses with port 0 pick free ports; see `url`, `mqtt`, `token`, `settings` of what is yielded.
    """
    listen = ["--http", http, *(["--mqtt", mqtt] if mqtt else [])]
    backend = RunningBackend(data_dir, [*listen, *arguments], environment or {})
    try:
        await backend.start()
        yield backend
    finally:
        await backend.stop()
