"""How long a tenant's writes stand still when they are taken to another server, under load.

A million rows, ten connections that change 500 of them a second in transactions of two, a follower that
applies these, a full verification meanwhile; then the cutover with all of its steps, and back again, three
times. What counts is the source's own clock from the moment its fence closes until the target's is open. It
is checked against what the writers saw, and every write that was acknowledged must be where it belongs.

Beside it, in the same run, what somebody would do by hand who had native logical replication of the same
rows: take the right to write away, wait for open transactions and for the subscription, set the sequences,
give the right on the target. Nothing is verified there, and nothing leads back.
"""

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.tenant_copy import closure_of_tenant, plain, servers
from benchmarks.tenant_data import TENANT, fill
from fleetlift.bus.embedded import random_database_password
from fleetlift.core.tenant.closure import Closure
from fleetlift.core.tenant.cutover import STEPS, CutoverState
from fleetlift.core.tenant.fence import Side
from fleetlift.core.tenant.verify_report import VerifyReport
from fleetlift.tenant.copy import Copier
from fleetlift.tenant.cutover import CutoverParts, TouchedChecks, run_cutover, run_return
from fleetlift.tenant.ddl import SequencesAhead, create_schema, finish_schema
from fleetlift.tenant.fence import Fence
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.verify import Verifier

ROWS, QUICK_ROWS = 1_000_000, 50_000
WRITERS = 10
WRITES_S = 500
IN_ONE = 2  # rows that one transaction changes
ROUNDS = 3
AT_MOST_S = 5.0
MOVE = "bench_freeze"
WRITER = "application"
AGAIN_S = 0.002  # a writer that was refused tries again
BEFORE_S = 1.0  # writers are at it for so long before and after each switch

FIGURES = (
    Figure(
        name="tenant_freeze_s",
        unit="s",
        better="lower",
        target=1.0,
        means="a tenant of 1 M rows under 500 writes/s: how long these are refused at a cutover; aim: 0.2",
        limit="native logical replication switched by hand, nothing verified, no way back",
    ),
)


# -- applications ----------------------------------------------------------------------------------------


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What writers saw. Times are of the machine's steady clock."""

    acknowledged: list[tuple[float, int, int, int]]  # when, where (0: source), device, ts
    refused: list[float]
    late: int  # writes that began a tenth of a second late or more, but for waiting out a refusal

    def of(self, place: int) -> set[tuple[int, int]]:
        return {(device, ts) for _, at, device, ts in self.acknowledged if at == place}

    def stood_still_s(self, began: float, ended: float, to: int) -> tuple[float, float]:
        """The longest time without an acknowledged write within a period, and the time from the first
        refusal to the first write that was acknowledged at the place `to`."""
        times = [one for one in self.acknowledged if began <= one[0] <= ended]
        refused = [at for at in self.refused if began <= at <= ended]
        if not times or not refused:
            raise BenchFailed("the writers saw nothing of the switch")
        gap = max(after[0] - before[0] for before, after in itertools.pairwise(times))
        there = next((one[0] for one in times if one[0] > refused[0] and one[1] == to), None)
        if there is None:
            raise BenchFailed("no write was acknowledged where the tenant has gone")
        return gap, there - refused[0]


async def write(urls: list[str], devices: list[int], first_ts: int) -> None:
    """Change rows where it is let, until standard input ends; then tell what happened. Runs by itself."""
    acknowledged: list[tuple[float, int, int, int]] = []
    refused: list[float] = []
    late = 0
    stop = asyncio.Event()
    every_s = WRITERS * IN_ONE / WRITES_S

    async def writer(number: int) -> None:
        nonlocal late
        conns = [await asyncpg.connect(url, command_timeout=60) for url in urls]
        place, device, ts = 0, devices[number % len(devices)], first_ts + number
        due = time.monotonic() + every_s * number / WRITERS
        while not stop.is_set():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            late += time.monotonic() - due > 0.1
            waited = False
            while not stop.is_set():
                try:
                    async with conns[place].transaction():
                        await conns[place].execute(
                            "INSERT INTO reading VALUES ($1, $2, 'speed', 1, NULL)", device, ts
                        )
                        await conns[place].execute(
                            "UPDATE device SET name = $2 WHERE id = $1", device, str(ts)
                        )
                    if not acknowledged:
                        print("begun", flush=True)
                    acknowledged.append((time.monotonic(), place, device, ts))
                    break
                except asyncpg.PostgresError as error:
                    refused.append(time.monotonic())
                    waited = True
                    if error.sqlstate not in ("FL001", "FL002", "FL004", "42501"):
                        raise
                    if error.sqlstate != "FL001":
                        place = 1 - place
                    await asyncio.sleep(AGAIN_S)
            ts += WRITERS
            device = devices[(devices.index(device) + WRITERS) % len(devices)]
            due = time.monotonic() + every_s if waited else due + every_s
        for conn in conns:
            await conn.close()

    async def told_to_stop() -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        stop.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(told_to_stop())
        for number in range(WRITERS):
            tasks.create_task(writer(number))
    acknowledged.sort()
    refused.sort()
    sys.stdout.write(
        msgspec.json.encode(Written(acknowledged=acknowledged, refused=refused, late=late)).decode()
    )


@contextlib.asynccontextmanager
async def writing(
    source: str, target: str, devices: list[int], first_ts: int
) -> AsyncIterator[list[Written]]:
    """Writers in a process of their own while the block runs; what they saw is in the list afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.tenant_freeze"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 26,
    )
    assert process.stdin is not None
    found: list[Written] = []
    try:
        process.stdin.write(json.dumps([[source, target], devices, first_ts]).encode() + b"\n")
        await process.stdin.drain()
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)  # the first write was acknowledged
        yield found
        out, _ = await asyncio.wait_for(process.communicate(b""), 60)
        if process.returncode:
            raise BenchFailed("a writer failed: see above")
        found.append(msgspec.json.decode(out, type=Written))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def rows_written(url: str, first_ts: int) -> set[tuple[int, int]]:
    conn = await asyncpg.connect(url)
    try:
        rows = await conn.fetch(
            "SELECT device_id, ts FROM reading WHERE ts BETWEEN $1 AND $1 + 9999999", first_ts
        )
        return {(row[0], row[1]) for row in rows}
    finally:
        await conn.close()


# -- by hand -----------------------------------------------------------------------------------------------

GRANT = f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {WRITER}"
REVOKE = f"REVOKE INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public FROM {WRITER}"
SEQUENCES = ("device_id_seq", "event_id_seq", "customers_id_seq")


class Native:
    """A subscription to the same rows, and the connections of whoever switches it."""

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target

    async def caught_up(self, lsn: str) -> None:
        async with asyncio.timeout(120):
            while not await self._source.fetchval(  # noqa: ASYNC110
                "SELECT bool_or(replay_lsn >= $1::text::pg_lsn) FROM pg_stat_replication "
                "WHERE application_name = 'bench'",
                lsn,
            ):
                await asyncio.sleep(AGAIN_S)

    async def position(self) -> str:
        return str(await self._source.fetchval("SELECT pg_current_wal_insert_lsn()::text"))

    async def switch(self) -> float:
        """Seconds during which nobody could write."""
        began = time.monotonic()
        await self._source.execute(REVOKE)
        async with self._source.transaction():  # whoever was writing has ended then
            await self._source.execute("LOCK TABLE reading, device, event, invoice, customers IN SHARE MODE")
        await self.caught_up(await self.position())
        values = [await self._source.fetchval(f"SELECT last_value FROM {name}") for name in SEQUENCES]
        for name, value in zip(SEQUENCES, values, strict=True):
            await self._target.execute(f"SELECT setval('{name}', {value + 1_000_000})")
        await self._target.execute(GRANT)
        return time.monotonic() - began

    async def back(self) -> None:
        """As before, so that it can be done again: what was written on the target is nobody's concern."""
        await self._target.execute(REVOKE)
        await self._source.execute(GRANT)


@contextlib.asynccontextmanager
async def native(source: str, target: str, closure: Closure) -> AsyncIterator[Native]:
    """The rows on the target, with its indexes, and followed by a subscription that has caught up."""
    await create_schema(source, target, closure, move=MOVE)
    async with contextlib.AsyncExitStack() as stack:
        first, second = [await asyncpg.connect(url) for url in (source, target)]
        stack.push_async_callback(first.close)
        stack.push_async_callback(second.close)
        await first.execute("CREATE PUBLICATION bench FOR TABLE reading, event, device, customers, invoice")
        await first.execute("SELECT pg_create_logical_replication_slot('bench_native', 'pgoutput')")
        await plain(source, target)
        await finish_schema(source, target, closure, move=MOVE)
        await second.execute(
            f"CREATE SUBSCRIPTION bench CONNECTION '{source}' PUBLICATION bench WITH "
            "(create_slot = false, slot_name = 'bench_native', copy_data = false, synchronous_commit = on)"
        )
        try:
            found = Native(first, second)
            await found.caught_up(await found.position())
            yield found
        finally:
            await second.execute("DROP SUBSCRIPTION bench")
            await first.execute("DROP PUBLICATION bench")


async def hand_switched(
    bench: Bench, urls: tuple[str, str], writers: tuple[str, str], closure: Closure, devices: list[int]
) -> tuple[list[float], list[float]]:
    """Seconds of the switches by hand, and of the longest time without an acknowledged write in each."""
    first_ts = 1_900_000_000_000
    took, spans = [], []
    bench.progress("native: copying")
    async with native(*urls, closure) as by_hand:
        async with writing(*writers, devices, first_ts) as found:
            for number in range(ROUNDS):
                bench.progress("native: switched by hand", number, ROUNDS, "rounds")
                await asyncio.sleep(BEFORE_S)
                began = time.monotonic() - BEFORE_S / 2
                took.append(await by_hand.switch())
                await asyncio.sleep(BEFORE_S)
                spans.append((began, time.monotonic()))
                await by_hand.back()
        await by_hand.caught_up(await by_hand.position())
        (written,) = found
        if written.of(0) | written.of(1) != await rows_written(urls[1], first_ts):
            raise BenchFailed("the subscription lost writes")
    return took, [written.stood_still_s(*span, 1)[0] for span in spans]


# -- ours --------------------------------------------------------------------------------------------------


class Checks(TouchedChecks):
    """As a mover has it: tidied before."""

    def __init__(self, verifier: Verifier, follower: Follower) -> None:
        super().__init__(verifier, follower.touched)
        self._follower = follower

    async def verify_fully(self) -> VerifyReport:
        await self._follower.tidy()
        return await super().verify_fully()


class Stream:
    """A follower and its task; what a cutover wants of the reverse stream."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.task: asyncio.Task[None] | None = None

    async def prepare(self) -> None:
        if (await self.follower.prepare()).snapshot is not None:
            self.follower.touched.begin()

    async def start(self) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self.follower.run())
            self.follower.start_applying()

    async def caught_up(self) -> None:
        async with asyncio.timeout(60):
            while not self.follower.caught_up:
                if self.task is not None and self.task.done():
                    raise BenchFailed(f"following ended: {self.task.exception()}")
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            self.task = None


class Switched(msgspec.Struct, frozen=True, kw_only=True):
    """One cutover and the way back. `began` and `ended` of the machine's steady clock."""

    there: CutoverState
    back: CutoverState
    began: float
    between: float
    ended: float


def _fence(url: str, closure: Closure, side: Side, token: str) -> Fence:
    return Fence(url, closure, move=MOVE, side=side, token=token, new_place="new.example.com")


async def saved(_: CutoverState) -> None:
    """Nobody resumes this one."""


async def switched(
    bench: Bench, urls: tuple[str, str], writers: tuple[str, str], closure: Closure, devices: list[int]
) -> tuple[Switched, Written]:
    """Copied, followed, verified, cut over and taken back, while the writers go on."""
    (source, target), first_ts = urls, 2_000_000_000_000
    token = random_database_password()
    from_, to = _fence(source, closure, Side.SOURCE, token), _fence(target, closure, Side.TARGET, token)
    follower = Follower(
        source,
        target,
        closure,
        move=MOVE,
        directory=bench.directory / "spool",
        target_settings=to.pass_settings,
    )
    reverse = Follower(
        target,
        source,
        closure,
        move=MOVE,
        directory=bench.directory / "spool-back",
        direction=Direction.REVERSE,
        target_settings=from_.pass_settings,
    )
    forward_stream, back_stream = Stream(follower), Stream(reverse)

    async def settle(lsn: int) -> None:
        if not await follower.reached(lsn, 60):
            raise BenchFailed("the follower does not follow")

    async def settle_back(lsn: int) -> None:
        if not await reverse.reached(lsn, 60):
            raise BenchFailed("the reverse stream does not follow")

    verifier = Verifier(source, target, closure, settle=settle)
    behind = Verifier(source, target, closure, settle=settle_back, back=True)
    sequences, back_sequences = (
        SequencesAhead(source, target, closure),
        SequencesAhead(target, source, closure, gap=1),
    )
    parts = CutoverParts(
        source=from_,
        target=to,
        stream=follower,
        checks=Checks(verifier, follower),
        reverse=back_stream,
        set_sequences=sequences,
    )

    def tell(_: CutoverState, text: str) -> None:
        bench.progress(f"cutover: {text}")

    try:
        bench.progress("copying")
        prepared = await follower.prepare()
        await create_schema(source, target, closure, move=MOVE)
        conn = await asyncpg.connect(target)
        await conn.execute(GRANT)
        await conn.close()
        await forward_stream.start()
        copied = await Copier(source, target, closure, move=MOVE, snapshot=prepared.snapshot).run()
        follower.must_pass(copied.fresh_until)
        async with writing(*writers, devices, first_ts) as found:
            await forward_stream.caught_up()
            await finish_schema(source, target, closure, move=MOVE)
            conn = await asyncpg.connect(target)
            await conn.execute("VACUUM (ANALYZE)")
            await conn.close()
            await forward_stream.caught_up()
            began = time.monotonic()
            there = await run_cutover(parts, CutoverState(), at_most_s=AT_MOST_S, save=saved, progress=tell)
            if there.aborted or there.freeze_s is None:
                raise BenchFailed(f"the cutover was given up: {there.aborted}")
            await forward_stream.stop()
            await asyncio.sleep(BEFORE_S)
            await back_stream.caught_up()
            between = time.monotonic()
            back = await run_return(
                msgspec.structs.replace(
                    parts,
                    stream=reverse,
                    checks=TouchedChecks(behind, reverse.touched),
                    set_sequences=back_sequences,
                ),
                there,
                at_most_s=AT_MOST_S,
                save=saved,
            )
            if back.aborted or back.freeze_s is None:
                raise BenchFailed(f"the way back was given up: {back.aborted}")
            await asyncio.sleep(BEFORE_S)
            ended = time.monotonic()
        (written,) = found
        if (mine := written.of(0) | written.of(1)) != (there_now := await rows_written(source, first_ts)):
            raise BenchFailed(f"{len(mine):,} writes were acknowledged, {len(there_now):,} are on the source")
        return Switched(there=there, back=back, began=began, between=between, ended=ended), written
    finally:
        await forward_stream.stop()
        await back_stream.stop()
        await verifier.close()
        await behind.close()
        await sequences.aclose()
        await back_sequences.aclose()
        await from_.aclose()
        await to.aclose()


async def run(bench: Bench) -> list[Measured]:
    rows = QUICK_ROWS if bench.quick else ROWS
    directory = bench.directory / "tenant-freeze"
    async with servers(directory) as (source, server):
        bench.progress(f"making {2 * rows:,} rows")
        await fill(source.url, rows=rows)
        closure = await closure_of_tenant(source.url)
        password = random_database_password()
        for url in (source.url, server.url):
            conn = await asyncpg.connect(url)
            await conn.execute(f"CREATE ROLE {WRITER} LOGIN PASSWORD '{password}'")
            await conn.close()
        admin = await asyncpg.connect(server.url)
        for name in ("native", "ours"):
            await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        conn = await asyncpg.connect(source.url)
        await conn.execute(GRANT)
        devices = [row[0] for row in await conn.fetch(f"SELECT id FROM device WHERE customer_id = {TENANT}")]
        await conn.close()
        targets = {name: server.url.replace("@/fleetlift?", f"@/{name}?") for name in ("native", "ours")}

        def as_writer(url: str) -> str:
            return f"postgresql://{WRITER}:{password}@{url.partition('@')[2]}"

        both = {name: (source.url, url) for name, url in targets.items()}
        apps = {name: (as_writer(source.url), as_writer(url)) for name, url in targets.items()}
        by_hand, by_hand_seen = await hand_switched(bench, both["native"], apps["native"], closure, devices)
        ours, written = await switched(bench, both["ours"], apps["ours"], closure, devices)
    gap_s, seen_s = written.stood_still_s(ours.began, ours.between, 1)
    back_gap_s, _ = written.stood_still_s(ours.between, ours.ended, 0)
    freeze_s, back_s = ours.there.freeze_s, ours.back.freeze_s
    assert freeze_s is not None and back_s is not None
    steps = ", ".join(
        f"{row.step} {ours.there.took_s[row.step] * 1000:.0f}"
        for row in STEPS
        if row.frozen and row.step in ours.there.took_s
    )
    hand_s = sorted(by_hand)[ROUNDS // 2]
    invalid = ""
    if seen_s > freeze_s + 0.1 or seen_s < freeze_s - 0.1:
        invalid = f"writers saw a freeze of {seen_s:.3f} s, the source's clock one of {freeze_s:.3f} s"
    return [
        Measured(
            name="tenant_freeze_s",
            value=freeze_s,
            limit=hand_s,
            invalid=invalid,
            notes=(
                f"milliseconds of it: {steps}; {ours.there.refused} writes refused",
                f"writers: {seen_s:.3f} s from the first refusal to the first write on the target, at most "
                f"{gap_s:.3f} s without one; {len(written.acknowledged) * IN_ONE:,} writes, "
                f"{written.late} began late",
                f"the way back: {back_s:.3f} s, {back_gap_s:.3f} s seen by writers; every write kept",
                f"native by hand: {', '.join(f'{s:.3f}' for s in by_hand)} s, seen by writers "
                f"{', '.join(f'{s:.3f}' for s in by_hand_seen)} s",
            ),
        )
    ]


if __name__ == "__main__":
    given = json.loads(sys.stdin.buffer.readline())
    asyncio.run(write(*given))
