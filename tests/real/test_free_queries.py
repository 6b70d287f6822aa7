"""Free queries of gates: what plans may ask the database, and what they can never reach."""

import asyncio
import time
from pathlib import Path

import pytest

from fleetlift.core.gates import Source, parse_query_gate
from fleetlift.core.migration import Sample
from fleetlift.migrate import free_queries
from fleetlift.migrate.check import unreadable
from fleetlift.store.pool import Pool

SECRET = "SELECT length(string_agg(value, '')) FROM device_credential"


async def asked(pool: Pool, query: str) -> Sample:
    return await free_queries.free_sql(pool, query)


@pytest.mark.parametrize(
    "query",
    [
        SECRET,
        "SELECT count(*) FROM api_token",
        "SELECT length(rolpassword) FROM pg_authid LIMIT 1",
        "SELECT length(pg_read_file('/etc/hostname'))",
        "SELECT count(*) FROM pg_ls_dir('/')",
        # Back to the owner's rights by a setting, and then a query within the query.
        "SELECT CASE WHEN set_config('role', 'none', true) = 'none' THEN"
        " length(query_to_xml('SELECT value FROM device_credential', true, true, '')::text) END",
        "SELECT lo_export(1, '/tmp/x')",
        "SELECT 1 FROM pg_notify('device_revoked', '[\"car-1\"]')",
        "SELECT pg_terminate_backend(pid)::int FROM pg_stat_activity WHERE pid <> pg_backend_pid() LIMIT 1",
        "SELECT 1) gate; DROP TABLE tenant; SELECT * FROM (SELECT 1",
        "SELECT 1 INTO TEMP stolen",
    ],
)
async def test_a_free_query_reaches_no_secret_and_no_power(pool: Pool, query: str) -> None:
    """The database's owner would be allowed all of this; a gate's query is not the owner's."""
    await pool.execute("INSERT INTO tenant (id) VALUES ('t')")
    await pool.execute("INSERT INTO device (id, tenant) VALUES ('car-1', 't')")
    await pool.execute("INSERT INTO device_credential VALUES ('car-1', 0, 'password', 'hash-of-a-secret')")
    gate = parse_query_gate(Source.SQL, query, "<= 5")
    assert (await asked(pool, query)).value is None
    assert await unreadable(pool, gate) is not None
    assert await pool.fetchval("SELECT count(*) FROM device") == 1


async def test_checking_a_plan_runs_no_program(pool: Pool, tmp_path: Path) -> None:
    """COPY … TO PROGRAM is allowed in a read-only transaction, to a superuser."""
    await pool.execute("SELECT 1")
    mark = Path("/tmp") / f"fleetlift-{tmp_path.name}-{time.time_ns()}"
    gate = parse_query_gate(Source.SQL, f"COPY (SELECT 1) TO PROGRAM 'touch {mark}'", "<= 5")
    try:
        assert await unreadable(pool, gate) is not None
        assert not mark.exists()
    finally:
        mark.unlink(missing_ok=True)


async def test_the_reason_a_query_failed_quotes_no_data(pool: Pool) -> None:
    """It becomes evidence that a tenant's viewers read: a failed cast must not carry a row to them."""
    await pool.execute("INSERT INTO tenant (id, name) VALUES ('t', 'a name not meant for all')")
    sample = await asked(pool, "SELECT name::int FROM tenant")
    assert sample.value is None
    assert "not meant for all" not in str(sample.evidence)


async def test_the_connection_is_its_owners_again_after_a_query(pool: Pool) -> None:
    for query in ("SELECT 1", "SELECT no", SECRET):
        await asked(pool, query)
    async with pool.acquire() as conn:
        assert await conn.fetchval("SELECT current_user = session_user")
        await conn.execute("INSERT INTO tenant (id) VALUES ('t')")


async def test_where_the_role_could_be_left_free_queries_are_refused(pool: Pool) -> None:
    """In a database of one's own the role is the administrator's work; half of it is not enough."""
    await pool.execute("GRANT EXECUTE ON FUNCTION pg_catalog.set_config(text, text, boolean) TO PUBLIC")
    sample = await asked(pool, "SELECT 1")
    assert sample.value is None
    assert "docs/engines.md" in sample.evidence["summary"]


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that answers a byte at a time, for ever."""
    try:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.1)
    except OSError:
        pass
    finally:
        writer.close()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that answers more than anybody asked for."""
    try:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(2000):
            writer.write(b" " * 100_000)
            await writer.drain()
        flooded.append(True)
    except OSError:
        pass
    finally:
        writer.close()


flooded: list[bool] = []


@pytest.mark.parametrize("behaviour", [drip, flood])
async def test_a_prometheus_server_that_never_ends_is_no_data(
    monkeypatch: pytest.MonkeyPatch, behaviour: "type[object]"
) -> None:
    """The round goes on: neither its time nor its memory is the other server's to take."""
    monkeypatch.setattr(free_queries, "QUERY_TIMEOUT_S", 0.8)
    server = await asyncio.start_server(behaviour, "127.0.0.1", 0)  # type: ignore[arg-type]
    port = server.sockets[0].getsockname()[1]
    try:
        async with asyncio.timeout(3):
            sample = await free_queries.prometheus(f"http://127.0.0.1:{port}", "up")
        assert sample.value is None
        assert not flooded
    finally:
        server.close()


@pytest.mark.parametrize("number", ["max(pg_backend_pid())", "count(*) / 0"])
async def test_a_query_leaves_nothing_on_the_connection(pool: Pool, number: str) -> None:
    """Whoever borrows the connection next finds no lock that it did not take, also after a failure."""
    query = f"SELECT {number} FROM (SELECT pg_advisory_lock(4711) OFFSET 0) l"
    await asked(pool, query)
    left = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 4711"
    assert await pool.fetchval(left) == 0
