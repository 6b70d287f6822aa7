"""How long it takes to verify every row of a tenant, beside the time it took to copy them.

Both in the same run, on the same two databases of one server, with nobody else writing: twenty tenants, of
which the one that is moved has half of all rows.
"""

import time

import asyncpg

from benchmarks import tenant_data
from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from fleetlift.bus.embedded import random_database_password
from fleetlift.core.tenant.closure import Root, Rules
from fleetlift.core.tenant.derive import closure_of
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.ddl import create_schema, finish_schema
from fleetlift.tenant.introspect import read_schema
from fleetlift.tenant.verify import Verifier

ROWS, QUICK_ROWS = 1_000_000, 100_000
ROUNDS = 3

FIGURES = (
    Figure(
        name="tenant_verify_vs_copy",
        unit="",
        better="lower",
        target=0.25,
        means="time to verify every row of a tenant, as a share of the time to copy them; aim: 0.1",
        limit="seconds of the copy, without indexes and constraints",
    ),
)


async def run(bench: Bench) -> list[Measured]:
    rows = QUICK_ROWS if bench.quick else ROWS
    bench.directory.chmod(0o711)
    server = EmbeddedPostgres(
        bench.directory / "pg",
        password=random_database_password(),
        log_file=bench.directory / "postgresql.log",
        extra={"wal_level": "logical", "shared_buffers": "256MB", "max_wal_size": "4GB"},
    )
    url = await server.start()
    try:
        source, target = (url.replace("@/fleetlift?", f"@/{name}?") for name in ("source", "target"))
        admin = await asyncpg.connect(url)
        for name in ("source", "target"):
            await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        bench.progress(f"making {2 * rows:,} rows")
        expected = await tenant_data.fill(source, rows=rows)
        conn = await asyncpg.connect(source)
        rules = Rules(
            root=Root(table="public.customers", column="id", value=str(tenant_data.TENANT)),
            whole=("public.currency",),
        )
        closure = closure_of(await read_schema(conn), rules)
        await conn.close()
        bench.progress("copying")
        await create_schema(source, target, closure)
        began = time.monotonic()
        await Copier(source, target, closure).run()
        copy_s = time.monotonic() - began
        await finish_schema(source, target, closure)
        conn = await asyncpg.connect(target)
        await conn.execute("VACUUM (ANALYZE)")
        await conn.close()
        took = []
        async with Verifier(source, target, closure) as verifier:
            for n in range(1, ROUNDS + 1):
                report = await verifier.run(
                    lambda at, n=n: bench.progress(f"verifying, round {n}", at.rows, expected.total, "rows")  # type: ignore[misc]
                )
                if not report.agrees or report.rows != expected.total:
                    raise BenchFailed(
                        f"{report.rows:,} of {expected.total:,} rows compared, "
                        f"{len(report.findings)} findings, problems: {report.problems}"
                    )
                took.append(report.took_s)
    finally:
        await server.stop()
    took_s = sorted(took)[len(took) // 2]
    return [
        Measured(
            name="tenant_verify_vs_copy",
            value=took_s / copy_s,
            limit=copy_s,
            notes=(
                f"{expected.total:,} rows: copied in {copy_s:.2f} s, verified in {took_s:.2f} s "
                f"({expected.total / took_s:,.0f}/s), the median of {ROUNDS}",
            ),
        )
    ]
