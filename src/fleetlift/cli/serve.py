"""`fleetlift serve`: a whole backend under one parent process.

The parent does no work of its own. It holds the data directory, starts the engines and the workers, starts
again what dies, and stops everything in order: first the workers, then the engines they need.
"""

import asyncio
import contextlib
import os
import resource
import signal
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import typer

from fleetlift.cli.worker import ROLES, STOP_SERVICES_S
from fleetlift.config import (
    RUN_FILE,
    Overrides,
    Settings,
    checked_address,
    overrides_from,
    read_env,
    save_run,
    split_address,
    write_private,
)
from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.log import configure, get_logger
from fleetlift.supervise import ChildSpec, Supervised, locked_directory, rotate_log

log = get_logger(__name__)

READY_WITHIN_S = 60.0
HUNG_AFTER_S = 20.0  # a worker that answers no ping for so long is killed and started again

Say = Callable[[str], None]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `serve` was asked for. Addresses as given; port 0 picks a free one."""

    data: Path
    http: str = "127.0.0.1:8080"
    mqtt: str = ""
    mqtts: str = ""
    https: bool = False
    cert: str = ""
    key: str = ""
    roles: tuple[str, ...] = tuple(ROLES)


def serve(
    data: Path = typer.Option(
        Path("fleetlift-data"), "--data", help="Directory for everything that is kept."
    ),
    http: str = typer.Option("127.0.0.1:8080", "--http", metavar="HOST:PORT", help="Address of the API."),
    mqtt: str = typer.Option(
        "",
        "--mqtt",
        metavar="HOST:PORT",
        help="Plain MQTT for devices.",
        show_default="127.0.0.1:1883, unless --mqtts",
    ),
    mqtts: str = typer.Option(
        "",
        "--mqtts",
        metavar="HOST:PORT",
        help="MQTT by TLS. With --mqtt on the same address, both on one port.",
    ),
    https: bool = typer.Option(False, "--https", help="Serve the API by TLS."),
    cert: str = typer.Option(
        "", "--cert", metavar="PEM", help="Certificate (with its chain) instead of our own."
    ),
    key: str = typer.Option("", "--key", metavar="PEM", help="Key of that certificate."),
    roles: str = typer.Option(
        ",".join(ROLES), "--workers", hidden=True, help="Workers to start, where others run elsewhere."
    ),
) -> None:
    """Run a backend: engines, device edge, services and API, until Ctrl-C or SIGTERM.

    Without FLEETLIFT_DATABASE_URL and FLEETLIFT_NATS_URL it brings its own PostgreSQL and NATS Server. The
    first start writes an administrator's token to DATA/admin.env.
    """
    options = Options(
        data=data, http=http, mqtt=mqtt, mqtts=mqtts, https=https, cert=cert, key=key, roles=_roles(roles)
    )

    def say(text: str) -> None:
        typer.echo(text)
        sys.stdout.flush()

    try:
        asyncio.run(_serve(options, say))
    except FleetError as problem:
        typer.echo(f"fleetlift serve: {problem}", err=True)
        raise typer.Exit(2 if isinstance(problem, BadInput) else 1) from None


def _roles(text: str) -> tuple[str, ...]:
    roles = tuple(filter(None, text.split(",")))
    for role in roles:
        if role not in ROLES:
            raise typer.BadParameter(f"{role!r}: one of {', '.join(ROLES)}")
    return roles


async def _serve(options: Options, say: Say) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with _running(options, say, stop) as settings:
        if settings is not None:
            edge = settings.mqtts or settings.mqtt
            say(f"ready: API {settings.http_url}, MQTT {edge}, data in {options.data}")
            await stop.wait()
        say("stopping")
    say("stopped")


@contextlib.asynccontextmanager
async def _running(options: Options, say: Say, stop: asyncio.Event) -> AsyncIterator[Settings | None]:
    """A whole backend inside the block. Yields None when `stop` was set before it was ready."""
    directory = options.data.resolve()
    async with contextlib.AsyncExitStack() as stack:
        lock = await stack.enter_async_context(locked_directory(directory, on_wait=say))
        # Others may pass through, to what is theirs: PostgreSQL runs as another user when root starts us.
        directory.chmod(0o711 if os.geteuid() == 0 else 0o700)
        logs = directory / "logs"
        logs.mkdir(exist_ok=True)
        logs.chmod(0o700)
        rotate_log(logs / "serve.log")
        output = stack.enter_context((logs / "serve.log").open("a", buffering=1))
        overrides = overrides_from()
        configure(level=overrides.log_level, role="serve", file=output)
        settings = plan_settings(options, directory, overrides)
        _raise_file_limit()

        workers = [
            Supervised(
                ChildSpec(
                    name=role,
                    command=[
                        sys.executable,
                        "-m",
                        "fleetlift",
                        "worker",
                        role,
                        "--data",
                        str(directory),
                    ],
                    log_file=logs / f"{role}.log",
                    stop_within_s=STOP_SERVICES_S + 5.0,
                    orphan_signal=signal.SIGKILL,
                    ready_within_s=READY_WITHIN_S,
                    pass_fds=(lock.fd,),
                    wait_for_go=True,
                    hung_after_s=HUNG_AFTER_S,
                ),
                ready=_worker_ready(settings, role),
            )
            for role in options.roles
        ]
        for child in workers:
            _announce_deaths(child, say)
        stack.callback((directory / RUN_FILE).unlink, missing_ok=True)
        engines = contextlib.AsyncExitStack()
        await stack.enter_async_context(engines)
        stack.push_async_callback(_stop_all, workers)
        # Their imports take longer than the engines' start: both at once.
        for worker in workers:
            await worker.start(wait=False)
        began = asyncio.create_task(_bring_up(options, settings, overrides, workers, engines, lock.fd, say))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([began, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not began.done():
            began.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await began
            yield None
            return
        settings = began.result()
        keeper = asyncio.create_task(_keep_logs_bounded(logs), name="log rotation")
        stack.callback(keeper.cancel)
        yield settings


async def _bring_up(
    options: Options,
    settings: Settings,
    overrides: Overrides,
    workers: list[Supervised],
    engines: contextlib.AsyncExitStack,
    lock_fd: int,
    say: Say,
) -> Settings:
    directory = Path(settings.data_dir)
    first = not (directory / "admin.env").exists()
    began = time.monotonic()

    async def database() -> str:
        from fleetlift.store.migrate import migrate

        url = settings.database_url
        if settings.database_embedded:
            from fleetlift.store.embedded import EmbeddedPostgres

            server = EmbeddedPostgres(
                directory / "postgresql",
                password=_keys(directory).database,
                log_file=directory / "logs" / "postgresql.log",
                pass_fds=(lock_fd,),
            )
            engines.push_async_callback(server.stop)
            url = await server.start()
            assert server.child is not None
            _announce_deaths(server.child, say)
            say(f"PostgreSQL started ({time.monotonic() - began:.1f} s)")
        applied = await migrate(url)
        if applied:
            say(f"database schema brought to version {applied[-1]}")
        if settings.engine_database_url:
            await migrate(settings.engine_database_url, part="engine")
        return url

    async def bus() -> None:
        from fleetlift.bus.connect import connected, ensure_log

        if settings.nats_embedded:
            from fleetlift.bus.embedded import EmbeddedNats

            server = EmbeddedNats(
                directory / "nats",
                settings,
                log_file=directory / "logs" / "nats.log",
                pass_fds=(lock_fd,),
                sync=overrides.sync,
            )
            engines.push_async_callback(server.stop)
            await server.start()
            _announce_deaths(server.child, say)
            say(f"NATS Server started ({time.monotonic() - began:.1f} s)")
        async with connected(
            settings, user=settings.nats_svc_user, password=settings.nats_svc_password, name="setup"
        ) as client:
            await ensure_log(client, settings)

    url, _ = await _both(database(), bus())
    settings = msgspec.structs.replace(settings, database_url=url)
    await _write_admin_env(settings)
    save_run(settings)
    if first:
        say(f"administrator's token written to {directory / 'admin.env'}")
    for worker in workers:
        worker.go()
    for worker in workers:
        try:
            await worker.wait_ready()
        except Unavailable as problem:
            raise Unavailable(f"worker {problem}") from None
    if set(options.roles) == set(ROLES):
        await _await_readyz(settings)
    say(f"{len(workers)} workers started ({time.monotonic() - began:.1f} s)")
    return settings


async def _both(one: Awaitable[str], two: Awaitable[None]) -> tuple[str, None]:
    """Await both at once; when one fails the other is cancelled and the plain error is raised."""
    tasks = [asyncio.ensure_future(one), asyncio.ensure_future(two)]
    try:
        return await asyncio.gather(*tasks)  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _announce_deaths(child: Supervised, say: Say) -> None:
    child.on_death = lambda problem, pause_s: say(
        f"{child.spec.name} {problem}; starting it again in {pause_s:.1f} s (log: {child.spec.log_file})"
    )


async def _stop_all(children: list[Supervised]) -> None:
    await asyncio.gather(*(child.stop() for child in children), return_exceptions=True)


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """Secrets made at the first start, in `DIR/keys.json` (0600)."""

    database: str
    auth: str
    svc: str
    sys: str
    issuer_seed: str


def _keys(directory: Path) -> Keys:
    path = directory / "keys.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Keys)
    except FileNotFoundError:
        pass
    except msgspec.DecodeError as problem:
        raise Unavailable(f"{path} is damaged ({problem}): restore it from a backup") from problem
    from fleetlift.bus.embedded import NatsSecrets, random_database_password

    fresh = NatsSecrets.new()
    keys = Keys(
        database=random_database_password(),
        auth=fresh.auth,
        svc=fresh.svc,
        sys=fresh.sys,
        issuer_seed=fresh.issuer_seed,
    )
    write_private(path, msgspec.json.encode(keys).decode())
    return keys


def plan_settings(options: Options, directory: Path, overrides: Overrides) -> Settings:
    """Settings with real ports, secrets and certificates. Raises BadInput for what cannot be."""
    if options.mqtt and options.mqtts and options.mqtt != options.mqtts:
        raise BadInput(
            "--mqtt and --mqtts: the device edge has one listener. Give one of them, or both with the same "
            "address (that port then takes plain MQTT and TLS)"
        )
    if bool(options.cert) != bool(options.key):
        raise BadInput("--cert and --key belong together: give both or neither")
    for path in filter(None, (options.cert, options.key)):
        if not Path(path).is_file():
            raise BadInput(f"{path} is not a file: give a PEM file")
    if options.cert:
        _check_pair(options.cert, options.key)
    http = checked_address(options.http, "http")
    edge = options.mqtts or options.mqtt or "127.0.0.1:1883"
    if not overrides.nats_url:
        edge = checked_address(edge, "mqtts" if options.mqtts else "mqtt")
    if edge == http:
        raise BadInput(f"--http and the MQTT listener cannot share {edge}: give them different ports")
    ca, cert, key = "", options.cert, options.key
    if not cert:
        from fleetlift.certificates import own_certificates

        own = own_certificates(directory, {split_address(http)[0], split_address(edge)[0]})
        ca, cert, key = str(own.ca), str(own.cert), str(own.key)
    settings = Settings(
        data_dir=str(directory),
        http=http,
        http_tls=options.https,
        mqtt=edge if options.mqtt or not options.mqtts else "",
        mqtts=edge if options.mqtts else "",
        ca_file=ca,
        cert_file=str(Path(cert).resolve()),
        key_file=str(Path(key).resolve()),
        database_url=overrides.database_url,
        database_embedded=not overrides.database_url,
        engine_database_url=overrides.engine_database_url,
        log_max_age_s=overrides.log_max_age_s,
        log_max_bytes=overrides.log_max_bytes,
        log_replicas=overrides.log_replicas,
        telemetry_keep_days=overrides.telemetry_keep_days,
        shadow_state_bytes=overrides.shadow_state_bytes,
        log_level=overrides.log_level,
        pid=os.getpid(),
        started_at=datetime.now(UTC).timestamp(),
    )
    if overrides.nats_url:
        return msgspec.structs.replace(
            settings,
            nats_embedded=False,
            **{
                name: getattr(overrides, name)
                for name in Overrides.__struct_fields__
                if name.startswith("nats_")
            },
        )
    keys = _keys(directory)
    return msgspec.structs.replace(
        settings,
        nats_url=f"nats://{checked_address('127.0.0.1:0', 'nats')}",
        nats_auth_password=keys.auth,
        nats_svc_password=keys.svc,
        nats_sys_password=keys.sys,
        nats_issuer_seed=keys.issuer_seed,
    )


def _check_pair(cert: str, key: str) -> None:
    """BadInput unless these are a certificate and its key: the engines would fail on them again and again."""

    def no_passphrase() -> str:
        raise BadInput(f"--key {key}: is locked by a passphrase; give it without one, readable by you alone")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=no_passphrase)
    except ssl.SSLError as error:
        what = "is not the key of that certificate" if "MISMATCH" in str(error) else "cannot be read as PEM"
        raise BadInput(f"--cert {cert}, --key {key}: the pair {what} ({error.reason or error})") from None
    except OSError as error:
        raise BadInput(f"--cert {cert}, --key {key}: {error.strerror}") from None


def _raise_file_limit() -> None:
    """Each device is a file descriptor in the server: take all that we are allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.debug("file_limit_raised", before=soft, now=hard)


async def _write_admin_env(settings: Settings) -> None:
    """`DIR/admin.env`: where the API is and the administrator's token, which is made once."""
    path = Path(settings.data_dir) / "admin.env"
    values = read_env(path)
    token = values.get("FLEETLIFT_TOKEN", "")
    if not token:
        import asyncpg

        from fleetlift.backend.tokens import create_token

        connection = await asyncpg.connect(settings.database_url, timeout=10.0)
        try:
            _, token = await create_token(connection, "first administrator", "admin", None)
        finally:
            await connection.close()
    values |= {"FLEETLIFT_URL": settings.http_url, "FLEETLIFT_TOKEN": token, "FLEETLIFT_CA": settings.ca_file}
    write_private(path, "".join(f"{name}={value}\n" for name, value in values.items()))


def _worker_ready(settings: Settings, role: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        from fleetlift.backend.alive import SUBJECT
        from fleetlift.bus.wire import connect

        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def on_message(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
            if not answered.done():
                answered.set_result(not headers.startswith(b"NATS/1.0 503"))

        wire = await connect(
            settings.nats_url,
            user=settings.nats_svc_user,
            password=settings.nats_svc_password,
            ca=settings.nats_ca,
            name=f"is {role} ready",
            on_message=on_message,
        )
        try:
            inbox = wire.inbox
            wire.send(b"SUB %s 1\r\nPUB %s%s %s 0\r\n\r\n" % (inbox, SUBJECT.encode(), role.encode(), inbox))
            async with asyncio.timeout(2.0):
                return await answered
        finally:
            wire.close()

    return check


async def _await_readyz(settings: Settings) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    url = f"{settings.http_url}/readyz"
    problem = ""
    while time.monotonic() < deadline:
        status, problem = await asyncio.to_thread(
            status_of, url, settings.cert_file if settings.http_tls else ""
        )
        if status == 200:
            return
        await asyncio.sleep(0.05)
    raise Unavailable(f"{url} did not become ready within {READY_WITHIN_S:.0f} s: {problem}")


def status_of(url: str, own_certificate: str) -> tuple[int, str]:
    """HTTP status of a GET at one of our own addresses (0: no answer), and what is wrong with it."""
    context = None
    if own_certificate:
        # It is ourselves we ask, on an address the certificate may not name.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with opener.open(url, timeout=5.0) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read(2000).decode(errors="replace")
    except OSError as error:
        return 0, str(error)


async def _keep_logs_bounded(logs: Path) -> None:
    while True:
        await asyncio.sleep(60.0)
        for path in logs.glob("*.log"):
            await asyncio.to_thread(rotate_log, path)
