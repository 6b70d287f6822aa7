"""Gates on a free query: one number, from SQL or a Prometheus server; no value where there is none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import asyncpg
import msgspec

from fleetlift.core.migration import Sample
from fleetlift.migrate.wave import summary
from fleetlift.store.pool import Conn, Pool

QUERY_TIMEOUT_S = 3.0
GATE_ROLE = "fleetlift_gates"  # made by store/migrations/0004_gate_role.sql
PROMETHEUS_BYTES_MAX = 1024 * 1024


def number(value: object) -> Sample:
    """A sample of whatever a query returned; no value when that is no number."""
    if value is None or isinstance(value, bool):
        return Sample(value=None, evidence=summary("the query returned no number"))
    try:
        return Sample(value=float(value), n=1)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Sample(value=None, evidence=summary("the query returned no number"))


async def free_sql(pool: Pool, query: str) -> Sample:
    """The one number that `query` returns, within a few seconds; no value when it returns anything else.

    It is read-only and runs as `GATE_ROLE`, which may read what gates are about and no credential, and cannot
    become its owner again: one statement, and none of the functions that would change the role.
    """
    try:
        async with (
            asyncio.timeout(QUERY_TIMEOUT_S + 1),
            _lent(pool) as conn,
            conn.transaction(readonly=True),
        ):
            if not await conn.fetchval(_GATE_ROLE_IS_SAFE, GATE_ROLE):
                return Sample(
                    value=None,
                    evidence=summary(
                        f"this database has no safe role {GATE_ROLE} for free queries: docs/engines.md says "
                        "how its administrator makes one"
                    ),
                )
            await conn.execute(
                f"SET LOCAL statement_timeout = {int(QUERY_TIMEOUT_S * 1000)}; SET LOCAL ROLE {GATE_ROLE}"
            )
            rows = await conn.fetch(f"SELECT * FROM (\n{query.rstrip().rstrip(';')}\n) gate LIMIT 2")
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return Sample(value=None, evidence=summary(f"the query failed: {_why(error)}"))
    if len(rows) != 1 or len(rows[0]) != 1:
        return Sample(value=None, evidence=summary("the query must return one row with one number"))
    return number(rows[0][0])


@contextlib.asynccontextmanager
async def _lent(pool: Pool) -> AsyncIterator[Conn]:
    """A connection that keeps nothing of what a query has left on it, such as a lock or a setting."""
    async with pool.acquire() as conn:
        try:
            yield conn
        except BaseException:
            conn.terminate()
            raise
        await conn.reset()


def _why(error: Exception) -> str:
    """What may be told to whoever reads the evidence: the server's words only where they quote no row."""
    text = str(error)[:200]
    state = getattr(error, "sqlstate", None) or ""
    return text if text and state[:2] in ("42", "57") else type(error).__name__


# A gate's query must not be able to leave the role, nor be the owner by membership.
_GATE_ROLE_IS_SAFE = """
SELECT NOT rolsuper
    AND NOT has_function_privilege(oid, 'pg_catalog.set_config(text, text, boolean)', 'EXECUTE')
    AND NOT has_function_privilege(oid, 'pg_catalog.pg_notify(text, text)', 'EXECUTE')
    AND NOT has_table_privilege(oid, 'device_credential', 'SELECT')
    AND NOT has_table_privilege(oid, 'api_token', 'SELECT')
    AND pg_has_role(session_user, oid, 'SET')
FROM pg_roles WHERE rolname = $1
"""


class _PrometheusData(msgspec.Struct, frozen=True):
    result: msgspec.Raw
    resultType: str = ""  # noqa: N815 (the name in Prometheus's answer)


class _Prometheus(msgspec.Struct, frozen=True):
    status: str
    data: _PrometheusData | None = None
    error: str = ""


class _Series(msgspec.Struct, frozen=True):
    value: tuple[float, str]


def read_prometheus(body: bytes) -> Sample:
    """The one number in an answer of `/api/v1/query` (Prometheus HTTP API, "Instant queries")."""
    try:
        answer = msgspec.json.decode(body, type=_Prometheus)
        if answer.status != "success" or answer.data is None:
            return Sample(value=None, evidence=summary(f"Prometheus says: {answer.error[:200]}"))
        if answer.data.resultType == "scalar":
            return number(msgspec.json.decode(answer.data.result, type=tuple[float, str])[1])
        series = msgspec.json.decode(answer.data.result, type=list[_Series])
    except msgspec.MsgspecError as error:
        return Sample(value=None, evidence=summary(f"not an answer of Prometheus: {error}"))
    if len(series) != 1:
        return Sample(
            value=None, evidence=summary(f"the query returned {len(series)} series, one is expected")
        )
    return number(series[0].value[1])


async def prometheus(url: str, query: str) -> Sample:
    """Ask a Prometheus server; no value when it does not answer with one number in time."""
    import httpx  # here, as few gates ask one and every start would pay for it

    try:
        async with (
            asyncio.timeout(QUERY_TIMEOUT_S),
            httpx.AsyncClient(timeout=QUERY_TIMEOUT_S, trust_env=False) as client,
            client.stream("GET", f"{url.rstrip('/')}/api/v1/query", params={"query": query}) as answer,
        ):
            body = b""
            async for part in answer.aiter_bytes(64 * 1024):
                body += part
                if len(body) > PROMETHEUS_BYTES_MAX:
                    return Sample(value=None, evidence=summary("the answer of Prometheus is too long"))
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return Sample(value=None, evidence=summary(f"Prometheus did not answer: {type(error).__name__}"))
    return read_prometheus(body)
