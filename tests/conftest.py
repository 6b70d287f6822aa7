"""Real engines for tests: one PostgreSQL a test process, a fresh database and a fresh NATS a test."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import hypothesis
import msgspec
import pytest
import pytest_asyncio

from fleetlift.backend.context import Context, open_context
from fleetlift.config import Settings
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Pool, open_pool
from fleetlift.testing import (
    LoopThread,
    RunningBackend,
    TestNats,
    TestPostgres,
    running_backend,
    scratch_directory,
)
from tenant_world import running_postgres

# How long an example takes is the machine's matter, not the property's. A commit's tests give one answer:
# other examples than its own are tried with --hypothesis-profile=explore.
hypothesis.settings.register_profile(
    "explore", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "house", hypothesis.settings.get_profile("explore"), derandomize=True, database=None
)
hypothesis.settings.load_profile("house")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(request: pytest.FixtureRequest) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL for the databases of a module, with its `SERVER_SETTINGS` where it has some."""
    with scratch_directory() as directory:
        settings = getattr(request.module, "SERVER_SETTINGS", {})
        async with running_postgres(directory / "cloud", extra=settings) as running:
            yield running


@pytest.fixture(scope="session")
def engine_loop() -> Iterator[LoopThread]:
    loop = LoopThread()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def postgres(engine_loop: LoopThread) -> Iterator[TestPostgres]:
    with scratch_directory() as directory:
        server = TestPostgres(directory)
        engine_loop.run(server.start())
        yield server
        engine_loop.run(server.stop())


@pytest.fixture
def database_url(postgres: TestPostgres, engine_loop: LoopThread) -> Iterator[str]:
    """A fresh database with the newest schema."""
    url = engine_loop.run(postgres.new_database())
    yield url
    engine_loop.run(postgres.drop_database(url))


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """A connection pool on a fresh database."""
    async with open_pool(database_url, name="test") as opened:
        yield opened


@pytest.fixture
def nats_server(engine_loop: LoopThread) -> Iterator[TestNats]:
    """A fresh NATS Server with JetStream, MQTT and the log; `nats_server.settings` says where."""
    with scratch_directory() as directory:
        server = TestNats(directory)
        engine_loop.run(server.start())
        yield server
        engine_loop.run(server.stop())


@pytest.fixture
def settings(nats_server: TestNats, database_url: str) -> Settings:
    """Settings with a fresh NATS and a fresh database."""
    return msgspec.structs.replace(nats_server.settings, database_url=database_url)


@pytest.fixture
async def ctx(settings: Settings) -> AsyncIterator[Context]:
    """What a service gets, on a fresh database and a fresh NATS. `stop` is set at the end."""
    async with open_context(settings, name="test") as context:
        yield context
        context.stop.set()
        await asyncio.sleep(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend() -> AsyncIterator[RunningBackend]:
    """A whole `fleetlift serve` in a process of its own, for the tests of one module."""
    with scratch_directory() as directory:
        async with running_backend(directory / "data") as running:
            yield running
