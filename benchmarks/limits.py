"""What PostgreSQL alone can do of the work that a bench asks for: the limits beside the figures.

One connection, the same server and the same durability, the same documents, in transactions of `GROUP`; no
network of devices, no rules, no answers.
"""

import time

import asyncpg

GROUP = 50
SECONDS = 3.0


async def upserts_per_s(connection: "asyncpg.Connection[asyncpg.Record]", body: str, devices: int) -> float:
    """Documents of `devices` replaced a second, one row each."""
    await connection.execute(
        "CREATE TABLE bench_document "
        "(device int PRIMARY KEY, document json NOT NULL, version bigint NOT NULL)"
    )
    try:
        done, began = 0, time.monotonic()
        while (took := time.monotonic() - began) < SECONDS:
            first = done % devices
            await connection.execute(
                "INSERT INTO bench_document AS b SELECT d, $1::text::json, 1 FROM unnest($2::int[]) d "
                "ON CONFLICT (device) DO UPDATE SET document = EXCLUDED.document, version = b.version + 1",
                body,
                [(first + n) % devices for n in range(min(GROUP, devices))],
            )
            done += min(GROUP, devices)
        return done / took
    finally:
        await connection.execute("DROP TABLE bench_document")


async def orders_per_s(connection: "asyncpg.Connection[asyncpg.Record]", body: str) -> tuple[float, float]:
    """Rows a second that are inserted and then updated to their end; the p99 in seconds of one pair alone."""
    await connection.execute(
        "CREATE TABLE bench_order (id bigint PRIMARY KEY, body json NOT NULL, status text NOT NULL)"
    )

    async def group(first: int, many: int) -> None:
        ids = list(range(first, first + many))
        await connection.execute(
            "INSERT INTO bench_order SELECT i, $1::text::json, 'sent' FROM unnest($2::bigint[]) i", body, ids
        )
        await connection.execute("UPDATE bench_order SET status = 'succeeded' WHERE id = ANY($1)", ids)

    try:
        done, began = 0, time.monotonic()
        while (took := time.monotonic() - began) < SECONDS:
            await group(done, GROUP)
            done += GROUP
        rate = done / took
        alone = []
        for n in range(100):
            began = time.monotonic()
            await group(done + n, 1)
            alone.append(time.monotonic() - began)
        return rate, sorted(alone)[98]
    finally:
        await connection.execute("DROP TABLE bench_order")
