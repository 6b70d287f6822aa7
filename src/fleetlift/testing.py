"""Real engines and whole backends for tests, of this project and of those who build on it.

Everything is on loopback, on free ports, in directories that go away.
"""

import asyncio
import contextlib
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import msgspec

from fleetlift.bus.connect import connected, ensure_log
from fleetlift.bus.embedded import EmbeddedNats, NatsSecrets, random_database_password
from fleetlift.config import Settings
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.migrate import migrate

T = TypeVar("T")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def scratch_directory(prefix: str = "fleetlift-test-") -> Iterator[Path]:
    """A directory that the engines' users may pass through (pytest's own are closed to them)."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
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

    async def new_database(self) -> str:
        """The URL of a fresh database with the newest schema."""
        self._count += 1
        name = f"test_{self._count}"
        await self._maintain(f"CREATE DATABASE {name} TEMPLATE fleetlift")
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
