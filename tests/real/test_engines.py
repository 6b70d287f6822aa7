"""Engines under one parent: locked, restarted, cleaned up, stopped; acknowledged messages stay."""

import asyncio
import contextlib
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import asyncpg
import msgspec
import psutil
import pytest
from mqtt_paho import PahoDevice

from fleetlift.backend import registry
from fleetlift.backend.context import Context
from fleetlift.bus.embedded import EmbeddedNats
from fleetlift.bus.log import read
from fleetlift.certificates import own_certificates
from fleetlift.config import read_env
from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.edge import auth
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Pool
from fleetlift.supervise import ChildSpec, Supervised, is_alive, locked_directory, rotate_log
from fleetlift.testing import (
    LoopThread,
    RunningBackend,
    TestNats,
    TestPostgres,
    running_backend,
    scratch_directory,
)

# One worker is enough where engines are the matter.
FEW = ["--workers", "telemetry"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")


async def until(true: Callable[[], Awaitable[bool]], what: str, within_s: float = 20.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + within_s
    while not await true():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


def python_child(directory: Path, program: str, **more: object) -> ChildSpec:
    return ChildSpec(
        name="child",
        command=[sys.executable, "-S", "-c", program],
        log_file=directory / "child.log",
        **more,  # type: ignore[arg-type]
    )


async def test_a_child_that_dies_is_started_again_ever_more_slowly(directory: Path) -> None:
    """Each death in a row doubles the wait, so that a broken child does not burn the machine."""
    pauses: list[float] = []
    child = Supervised(python_child(directory, "raise SystemExit(3)"))
    child.on_death = lambda problem, pause_s: pauses.append(pause_s)
    await child.start(wait=False)
    await until(lambda: _true(len(pauses) >= 3), "three deaths")
    await child.stop()
    assert pauses[:3] == [0.2, 0.4, 0.8]


async def test_a_child_that_never_gets_ready_says_what_it_logged(directory: Path) -> None:
    """The error holds the end of the child's log: the reason is at hand."""
    child = Supervised(python_child(directory, "raise SystemExit('no such thing')"), ready=_never)
    with pytest.raises(Unavailable, match="no such thing"):
        await child.start()
    await child.stop()


async def test_a_child_that_ignores_the_signal_is_killed_after_its_limit(directory: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    )
    child = Supervised(python_child(directory, stubborn, stop_within_s=0.3))
    await child.start()
    await until(lambda: _true("up" in (directory / "child.log").read_text()), "child up")
    process = psutil.Process(child.pid)
    await child.stop()
    assert not process.is_running()


async def test_a_child_that_hangs_is_started_again_but_not_while_nobody_can_ask_it(directory: Path) -> None:
    """A child that lives and answers nothing is killed; that the way to it is down is not held against it."""
    says: list[Callable[[], bool]] = [lambda: True]

    async def answers() -> bool:
        return says[0]()

    def nobody_can_ask() -> bool:
        asked.append(True)
        raise Unavailable("the bus is away")

    asked: list[bool] = []
    spec = python_child(directory, "import time; time.sleep(99)", hung_after_s=0.4)
    child = Supervised(spec, ready=answers)
    problems: list[str] = []
    child.on_death = lambda problem, pause_s: problems.append(problem)
    await child.start()
    first = child.pid
    says[0] = nobody_can_ask
    await until(lambda: _true(len(asked) > 8), "twice the limit")
    assert child.pid == first
    says[0] = lambda: child.pid != first
    await until(lambda: _true(child.pid not in (None, first) and child.state == "ready"), "another process")
    assert len(problems) == 1
    assert "gave no answer" in problems[0]
    await child.stop()


def test_a_log_stays_bounded(directory: Path) -> None:
    """What is too long moves to a second file, by halves; a writer that appends goes on."""
    path = directory / "x.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 3000)
        rotate_log(path, bytes_max=2000)
        writer.write(b"b")
    assert path.read_bytes() == b"b"
    assert path.with_name("x.log.1").stat().st_size == 1000


async def test_a_second_instance_is_refused_and_told_which_process_has_the_directory(directory: Path) -> None:
    async with locked_directory(directory):
        with pytest.raises(Conflict, match=f"process {os.getpid()}"):
            async with locked_directory(directory):
                pass
    async with locked_directory(directory):
        pass


async def test_a_directory_that_cannot_be_written_is_named(directory: Path) -> None:
    (directory / "file").write_text("")
    with pytest.raises(Unavailable, match="choose another with --data"):
        async with locked_directory(directory / "file" / "data"):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root must not run PostgreSQL")
@linux
async def test_root_can_run_postgresql_where_only_root_may_go(directory: Path) -> None:
    """Below a closed directory (as /root is) the server runs unprivileged in a user namespace."""
    closed = directory / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "pg", password="secret", log_file=directory / "pg.log", throwaway=True)
    try:
        connection = await asyncpg.connect(await server.start())
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
    finally:
        await server.stop()


async def test_a_stranger_gets_no_further_without_the_password(postgres: TestPostgres) -> None:
    """PostgreSQL has no TCP port, and its socket wants the password."""
    url = postgres.url.replace("fleetlift:", "fleetlift:not", 1)
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url)


async def test_a_slow_statement_is_logged_without_what_it_was_about(pool: Pool) -> None:
    """Parameters are devices' data and hashes of secrets; PostgreSQL would log them whole."""
    assert await pool.fetchval("SHOW log_parameter_max_length") == "0"
    assert await pool.fetchval("SHOW log_parameter_max_length_on_error") == "0"


async def test_a_deep_data_directory_does_not_break_the_socket(directory: Path) -> None:
    """A Unix socket's path has 107 bytes at most: a longer one moves to a short place."""
    deep = directory / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    server = EmbeddedPostgres(deep / "pg", password="secret", log_file=directory / "pg.log", throwaway=True)
    try:
        connection = await asyncpg.connect(await server.start())
        await connection.close()
        sockets = server._sockets_made
    finally:
        await server.stop()
    assert sockets is not None
    assert not sockets.exists()


async def test_an_acknowledged_message_outlives_a_killed_server(
    ctx: Context, nats_server: TestNats, engine_loop: LoopThread
) -> None:
    """What had a PUBACK before `kill -9` of NATS is in the log afterwards."""
    device = registry.NewDevice(
        id="car-1",
        tenant="t",
        credentials=(registry.Credential(kind="password", value="secret-of-car-1"),),
    )
    async with ctx.pool.acquire() as connection:
        await registry.put_devices(connection, [device], make_tenants=True)
    answering = asyncio.create_task(auth.run(ctx))
    host, _, port = ctx.settings.mqtt.rpartition(":")
    car = PahoDevice("car-1", "secret-of-car-1", (host, int(port)))
    try:
        await until(lambda: _true(car.connected.is_set()), "car connected")
        for n in range(3000):
            car.publish("dt/car-1/gps", b'{"seq":%d}' % n)
            if n == 1500:
                await until(lambda: _true(len(car.acknowledged) > 200), "some acknowledged")
                nats_server.server.child.kill()
                at_kill = set(car.acknowledged)
        await until(lambda: _true(len(car.acknowledged) == 3000), "all acknowledged", 60.0)
    finally:
        car.close()
        ctx.stop.set()
        await answering
    stored: set[bytes] = set()
    async for batch in read(ctx.settings, after=None, filters=["dt.>"], name="t", until_end=True):
        stored |= {message.payload for message in batch}
    assert at_kill
    assert stored >= car.acknowledged


class TestServe:
    """`fleetlift serve` as a process."""

    @pytest.fixture
    async def few(self, directory: Path) -> AsyncIterator[RunningBackend]:
        async with running_backend(directory / "data", arguments=FEW) as backend:
            yield backend

    async def test_first_start_leaves_an_administrator_and_private_files(self, few: RunningBackend) -> None:
        """admin.env, keys and run.json are for the owner alone; ca.pem is for everybody."""
        env = read_env(few.data_dir / "admin.env")
        assert env["FLEETLIFT_URL"] == few.url
        assert env["FLEETLIFT_TOKEN"].startswith("flt_")
        assert Path(env["FLEETLIFT_CA"]).read_text().startswith("-----BEGIN CERTIFICATE")
        for name in ("admin.env", "keys.json", "run.json", "nats/nats.conf", "tls/server-key.pem", "lock"):
            assert (few.data_dir / name).stat().st_mode & 0o777 == 0o600, name
        # No secret is on a command line for `ps` to show.
        secrets = [few.settings.nats_svc_password, few.settings.nats_issuer_seed, few.token]
        for process in psutil.Process(few.pid).children(recursive=True):
            line = " ".join(process.cmdline())
            assert not any(secret in line for secret in secrets)

    async def test_sigterm_stops_everything_with_status_0_and_the_next_start_goes_on(
        self, few: RunningBackend
    ) -> None:
        """The token and the data stay; nothing is left running."""
        family = psutil.Process(few.pid).children(recursive=True)
        first = few.token
        assert await few.stop() == 0
        assert not [child for child in family if is_alive(child.pid)]
        assert not (few.data_dir / "run.json").exists()
        await few.start()
        assert few.token == first
        assert await few.stop() == 0

    async def test_a_second_serve_is_refused(self, few: RunningBackend) -> None:
        second = RunningBackend(few.data_dir, ["--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0"], {})
        output = few.output.read_text()
        with pytest.raises(Unavailable, match=f"another instance \\(process {few.pid}\\)"):
            await second.start()
        few.output.write_text(output)

    @pytest.mark.parametrize("engine", ["nats-server", "postgres"])
    async def test_a_killed_engine_comes_back(self, few: RunningBackend, engine: str) -> None:
        """`kill -9` of an engine: within seconds there is a new one on the same address."""
        victim = next(p for p in psutil.Process(few.pid).children() if p.name() == engine)
        victim.kill()

        async def answers() -> bool:
            with contextlib.suppress(OSError, asyncpg.PostgresError, TimeoutError):
                host, _, port = few.settings.mqtt.rpartition(":")
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                connection = await asyncpg.connect(few.settings.database_url, timeout=2.0)
                await connection.close()
                return any(
                    p.name() == engine and p.pid != victim.pid for p in psutil.Process(few.pid).children()
                )
            return False

        await until(answers, f"{engine} is back")
        assert await few.stop() == 0

    @linux
    async def test_a_killed_parent_leaves_nothing_behind_and_can_be_started_again(
        self, few: RunningBackend
    ) -> None:
        """Engines do not outlive the parent, and the successor waits until the last of them is gone."""
        family = psutil.Process(few.pid).children(recursive=True)
        assert {"postgres", "nats-server"} <= {child.name() for child in family}
        await few.kill()
        await few.start()  # at once: the lock is still held by engines that stop
        assert not [child for child in family if is_alive(child.pid)]
        assert await few.stop() == 0

    async def test_tls_is_good_for_localhost_by_the_own_ca(self, directory: Path) -> None:
        """Devices that trust ca.pem reach MQTT by TLS; plain MQTT is not offered then."""
        async with running_backend(
            directory / "data", mqtt="", arguments=[*FEW, "--mqtts", "127.0.0.1:0"]
        ) as backend:
            trust = ssl.create_default_context(cafile=backend.data_dir / "ca.pem")
            host, _, port = backend.settings.mqtts.rpartition(":")
            for name in ("localhost", "127.0.0.1"):
                with (
                    socket.create_connection((host, int(port)), 5.0) as raw,
                    trust.wrap_socket(raw, server_hostname=name) as tls,
                ):
                    assert tls.version() == "TLSv1.3"

    async def test_engines_of_ones_own_serve_as_well(
        self, directory: Path, database_url: str, engine_loop: LoopThread
    ) -> None:
        """With FLEETLIFT_DATABASE_URL and FLEETLIFT_NATS_URL (by TLS) nothing is started but the workers."""
        server = TestNats(directory)
        files = own_certificates(directory, [])
        settings = msgspec.structs.replace(
            server.settings, nats_url=server.settings.nats_url.replace("nats:", "tls:"), nats_ca=str(files.ca)
        )
        secured = EmbeddedNats(directory / "nats", settings, log_file=directory / "nats.log")
        secured.extra = f'tls {{ cert_file: "{files.cert}", key_file: "{files.key}" }}\n'
        engine_loop.run(secured.start())
        environment = {
            "FLEETLIFT_DATABASE_URL": database_url,
            "FLEETLIFT_NATS_URL": settings.nats_url,
            "FLEETLIFT_NATS_CA": settings.nats_ca,
            "FLEETLIFT_NATS_AUTH_PASSWORD": settings.nats_auth_password,
            "FLEETLIFT_NATS_SVC_PASSWORD": settings.nats_svc_password,
            "FLEETLIFT_NATS_SYS_PASSWORD": settings.nats_sys_password,
            "FLEETLIFT_NATS_ISSUER_SEED": settings.nats_issuer_seed,
        }
        try:
            async with running_backend(
                directory / "data", mqtt=settings.mqtt, arguments=FEW, environment=environment
            ) as backend:
                names = {child.name() for child in psutil.Process(backend.pid).children(recursive=True)}
                assert not names & {"postgres", "nats-server"}
                assert not (backend.data_dir / "postgresql").exists()
        finally:
            engine_loop.run(secured.stop())

    async def test_a_busy_port_is_told_before_anything_starts(self, directory: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            backend = RunningBackend(directory / "data", ["--http", address, "--mqtt", "127.0.0.1:0"], {})
            with pytest.raises(Unavailable, match="http cannot listen on"):
                await backend.start()
        assert not (directory / "data" / "postgresql").exists()


async def _true(value: bool) -> bool:
    return value


async def _never() -> bool:
    return False
