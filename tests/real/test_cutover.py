"""The cutover on real databases, with writers that never stop: killed and cancelled at every step."""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import msgspec
import psycopg2
import pytest
from cutover_mover import MOVE, ROWS, SCHEMA, Configuration, Mover, closure_at, cut_over, fences, moving
from cutover_world import until

from fleetlift.core.errors import Conflict
from fleetlift.core.tenant.cutover import CutoverState, Step
from fleetlift.core.tenant.fence import MOVED, NOT_OPEN, REFUSED, Status
from fleetlift.core.tenant.verify_report import VerifyReport
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.cutover import CutoverParts, TouchedChecks, run_return
from fleetlift.tenant.ddl import set_sequences_ahead
from fleetlift.tenant.follow import TOUCHED_MAX, Follower
from fleetlift.tenant.names import APPLIED
from fleetlift.testing import scratch_directory
from tenant_world import fresh_pair


class Writers:
    """Applications that write where the tenant is served, and note every write that was acknowledged."""

    def __init__(self, given: Configuration) -> None:
        self._given = given
        self.ours: set[int] = set()
        self.theirs: set[int] = set()
        self.refused = 0
        self.at: dict[str, int] = {given.source: 0, given.target: 0}
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()

    async def __aenter__(self) -> "Writers":
        self._tasks = [asyncio.create_task(self._write(20 + n)) for n in range(2)]
        self._tasks.append(asyncio.create_task(self._write_for_another()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _write(self, device: int) -> None:
        here, there = self._given.source, self._given.target
        conns = {
            url: await asyncpg.connect(url, server_settings={"application_name": "shop"})
            for url in (here, there)
        }
        n = device * 1_000_000
        while not self._stop.is_set():
            n += 1
            try:
                async with conns[here].transaction():
                    await conns[here].execute("INSERT INTO reading VALUES ($1, $2, 'new')", device, n)
                    await conns[here].execute("INSERT INTO tag VALUES ($1, $2)", device, str(n))
                    await conns[here].execute("DELETE FROM tag WHERE tag = $1", str(n - 2))
                    await conns[here].execute(
                        "UPDATE device SET name = $2 WHERE id = $1", device, f"{device} at {n}"
                    )
                self.ours.add(n)
                self.at[here] += 1
            except asyncpg.PostgresError as exc:
                assert exc.sqlstate in (REFUSED, MOVED, NOT_OPEN), exc
                self.refused += 1
                if exc.sqlstate != REFUSED:
                    here, there = there, here
            await asyncio.sleep(0.002)
        for conn in conns.values():
            await conn.close()

    async def _write_for_another(self) -> None:
        conn = await asyncpg.connect(self._given.source)
        n = 0
        while not self._stop.is_set():
            n += 1
            await conn.execute("INSERT INTO reading VALUES (10, $1, 'new')", 1_000_000 + n)
            self.theirs.add(1_000_000 + n)
            await asyncio.sleep(0.002)
        await conn.close()

    async def more(self, count: int = 10) -> None:
        """Wait for so many more writes."""
        wanted = len(self.ours) + count

        async def written() -> bool:
            return len(self.ours) >= wanted

        await until(written)


@pytest.fixture
async def given(server: EmbeddedPostgres) -> AsyncIterator[Configuration]:
    with scratch_directory() as directory:
        async with fresh_pair(server) as pair:
            made = Configuration(
                source=pair.source, target=pair.target, directory=str(directory), token=secrets.token_hex(16)
            )
            for url in (pair.source, pair.target):
                conn = await asyncpg.connect(url)
                await conn.execute(SCHEMA)
                await conn.close()
            # The slot first: so all rows come by the stream, and no copy is needed here.
            follower = Follower(
                pair.source, pair.target, await closure_at(pair.source), move="small", directory=directory
            )
            await follower.prepare()
            await follower.release_snapshot()
            conn = await asyncpg.connect(pair.source)
            await conn.execute(ROWS)
            await conn.close()
            yield made


async def rows(url: str, what: str) -> set[int]:
    conn = await asyncpg.connect(url)
    try:
        return {row[0] for row in await conn.fetch(what)}
    finally:
        await conn.close()


OURS = "SELECT n FROM reading WHERE value = 'new' AND device_id >= 20 AND device_id < 30"
THEIRS = "SELECT n FROM reading WHERE value = 'new' AND device_id = 10"


TAGS = "SELECT tag::bigint FROM tag WHERE tag <> 'old'"


def tags(writers: Writers) -> set[int]:
    """What is left of those that were acknowledged: a write takes away the one before the one before it."""
    return {n for n in writers.ours if n + 2 not in writers.ours}


async def check(given: Configuration, writers: Writers, *, served_at: str) -> None:
    """Every acknowledged write is where the tenant is served, exactly; others' only on the source."""
    assert await rows(served_at, OURS) == writers.ours
    assert await rows(served_at, TAGS) == tags(writers)
    assert await rows(given.source, THEIRS) == writers.theirs
    assert await rows(given.target, THEIRS) == set()
    assert await rows(given.target, "SELECT id FROM customers") == {2}


async def statuses(given: Configuration) -> tuple[Status, Status]:
    source, target = fences(given, await closure_at(given.source))
    try:
        return (await source.state()).status, (await target.state()).status
    finally:
        await source.aclose()
        await target.aclose()


async def finish(given: Configuration, writers: Writers) -> None:
    """Go on with what was killed or cancelled, until the tenant is served at the target."""
    async with moving(given) as mover:
        state = await cut_over(mover, given)
        assert state.aborted == ""
        assert state.finished
        await writers.more()
        assert await statuses(given) == (Status.SEALED, Status.OPEN)
        # What is written on the target now comes back to the source.
        writers._stop.set()
        await asyncio.gather(*writers._tasks)
        position = await mover.parts.target.position()
        assert await mover.reverse.follower.reached(position, 20)
        await check(given, writers, served_at=given.target)
        assert await rows(given.source, OURS) == writers.ours


async def test_there_and_back_and_nothing_is_lost(given: Configuration) -> None:
    async with Writers(given) as writers, moving(given) as mover:
        await writers.more()
        state = await cut_over(mover, given)
        assert state.finished, state
        assert state.done == tuple(Step)
        assert state.freeze_s is not None
        await writers.more()
        assert writers.at[given.target] > 0
        await until(lambda: _caught_up(mover.reverse.follower))
        back = await run_return(
            _back(mover), state, at_most_s=20, save=given.save, step=lambda _: None, settle_within_s=20
        )
        assert back.returned, back
        assert await statuses(given) == (Status.OPEN, Status.SEALED)
        before = writers.at[given.source]
        await writers.more()
        assert writers.at[given.source] > before
    assert await rows(given.source, OURS) == writers.ours
    assert await rows(given.source, THEIRS) == writers.theirs


async def _caught_up(follower: Follower) -> bool:
    return follower.caught_up


async def _over(follower: Follower) -> bool:
    return follower.touched._over


async def _behind(follower: Follower) -> bool:
    return not follower.caught_up


def _back(mover: Mover) -> CutoverParts:
    source, target = mover.parts.source, mover.parts.target
    return msgspec.structs.replace(
        mover.parts,
        stream=mover.reverse.follower,
        checks=mover.back,
        set_sequences=lambda: set_sequences_ahead(target._url, source._url, source._closure, gap=1000),
    )


async def _return(mover: Mover, given: Configuration) -> CutoverState:
    await until(lambda: _caught_up(mover.reverse.follower))
    return await run_return(
        _back(mover), given.state(), at_most_s=20, save=given.save, step=lambda _: None, settle_within_s=20
    )


async def test_the_way_back_is_there_after_more_changes_than_are_noted(given: Configuration) -> None:
    async with Writers(given) as writers, moving(given) as mover:
        assert (await cut_over(mover, given)).finished
        mover.reverse.follower.touched._max = 20
        await writers.more(30)
        await until(lambda: _over(mover.reverse.follower))
        mover.reverse.follower.touched._max = TOUCHED_MAX
        back = await _return(mover, given)
        assert back.returned, back
        await writers.more()
        assert await statuses(given) == (Status.OPEN, Status.SEALED)
    assert await rows(given.source, OURS) == writers.ours
    assert await rows(given.source, TAGS) == tags(writers)


async def test_a_mover_that_knows_nothing_of_before_compares_all_before_it_closes_the_target(
    given: Configuration,
) -> None:
    """Its notes went with the mover before it. What differs is told, as often as it is asked."""
    async with moving(given) as mover:
        assert (await cut_over(mover, given)).finished
        passing = mover.parts.source.pass_settings
    source = await asyncpg.connect(given.source, server_settings=passing)
    try:
        await _unseen(source, "DELETE FROM reading WHERE device_id = 20 AND n = 1")
        async with Writers(given) as writers, moving(given) as mover:
            await mover.reverse.prepare()
            await mover.reverse.start()
            await writers.more()
            for _ in range(2):
                back = await _return(mover, given)
                assert "foreign public.reading 20/1" in back.aborted, back
                assert await statuses(given) == (Status.SEALED, Status.OPEN)
            assert (await mover.parts.target.refused()).closing == 0
            await _unseen(source, "INSERT INTO reading VALUES (20, 1, 'r1')")
            back = await _return(mover, given)
            assert back.returned, back
    finally:
        await source.close()
    assert await rows(given.source, OURS) == writers.ours


async def _unseen(conn: "asyncpg.Connection[asyncpg.Record]", write: str) -> None:
    """A write that no follower of the move carries to the other side."""
    async with conn.transaction():
        await conn.execute("SELECT pg_logical_emit_message(true, $1, $2::text)", APPLIED, MOVE)
        await conn.execute(write)


async def test_what_is_shared_may_have_gone_its_own_way(given: Configuration) -> None:
    """Only what is carried back is compared on the way back, though all of it is."""
    async with moving(given) as mover:
        assert (await cut_over(mover, given)).finished
        mover.reverse.follower.touched.overflow()
        source, target = await asyncpg.connect(given.source), await asyncpg.connect(given.target)
        try:
            await source.execute("UPDATE customers SET name = 'other' WHERE id <> 2")
            await target.execute("CREATE TABLE report (id int); INSERT INTO report VALUES (1)")
            await source.execute("ALTER TABLE customers ADD note text DEFAULT 'new here'")
        finally:
            await source.close()
            await target.close()
        back = await _return(mover, given)
        assert back.returned, back


async def test_a_doubled_row_without_a_key_is_seen_in_the_freeze(given: Configuration) -> None:
    async with moving(given) as mover:

        def write(step: str) -> None:
            if step == Step.VERIFIED_FULLY:
                with psycopg2.connect(given.source) as conn, conn.cursor() as cursor:
                    cursor.execute("INSERT INTO tag VALUES (21, 'new')")
                with psycopg2.connect(given.target) as conn, conn.cursor() as cursor:
                    cursor.execute("SET fleetlift_fence.pass = %s", (given.token,))
                    cursor.execute("INSERT INTO tag VALUES (21, 'new')")

        state = await cut_over(mover, given, write)
        assert "1 doubled" in state.aborted, state
        assert (await statuses(given))[0] is Status.OPEN


POINTING_AWAY = {
    "a new row": "INSERT INTO link VALUES (4, 20, 11)",
    "an old row": "UPDATE link SET peer_id = 12 WHERE id = 2",
    "what it points at left": "UPDATE device SET customer_id = 3 WHERE id = 21",
}


@pytest.mark.parametrize("what", POINTING_AWAY)
async def test_a_reference_that_stops_the_move_is_seen_in_the_freeze(given: Configuration, what: str) -> None:
    """Written after the last look at all rows: the target would have a row that its foreign key forbids."""
    async with moving(given) as mover:

        def write(step: str) -> None:
            if step == Step.VERIFIED_FULLY:
                with psycopg2.connect(given.source) as conn, conn.cursor() as cursor:
                    cursor.execute(POINTING_AWAY[what])

        state = await cut_over(mover, given, write)
        assert "1 forbidden" in state.aborted and "public.link" in state.aborted, state
        assert (await statuses(given))[0] is Status.OPEN


AFTER_SEAL = frozenset({Step.SEALED, Step.OPENED, Step.REVERSE_STARTED})


async def test_killed_at_every_step_it_goes_on(given: Configuration) -> None:
    """One mover after the other, each killed a step further than the one before it."""
    file = Path(given.directory) / "configuration.json"
    file.write_bytes(msgspec.json.encode(given))
    async with Writers(given) as writers:
        for step in Step:
            mover = await asyncio.create_subprocess_exec(
                sys.executable,
                str(Path(__file__).with_name("cutover_mover.py")),
                str(file),
                step,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            _, problem = await mover.communicate()
            assert mover.returncode == -9, f"{step}: {problem.decode()}"
            source, target = await statuses(given)
            assert not (source is Status.OPEN and target is Status.OPEN), step
            assert (source is Status.SEALED) == (step in AFTER_SEAL), step
        await finish(given, writers)


async def test_a_dead_movers_fence_opens_by_itself(given: Configuration) -> None:
    file = Path(given.directory) / "configuration.json"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(given, at_most_s=6.0)))
    async with Writers(given) as writers:
        mover = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("cutover_mover.py")),
            str(file),
            Step.TOUCHED_VERIFIED,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert await mover.wait() == -9
        await writers.more()
        assert (await statuses(given))[0] is Status.OPEN
        assert writers.refused > 0
    assert await rows(given.source, OURS) == writers.ours


async def test_cancelled_at_every_step_it_thaws_or_goes_on(given: Configuration) -> None:
    async with Writers(given) as writers:
        async with moving(given) as mover:
            for step in Step:

                def cancel(name: str, step: Step = step) -> None:
                    if name == step:
                        task = asyncio.current_task()
                        assert task is not None
                        task.cancel()

                with contextlib.suppress(asyncio.CancelledError):
                    # After the last step it may end before it has to wait once more.
                    await asyncio.create_task(cut_over(mover, given, cancel))
                source, target = await statuses(given)
                sealed = step in AFTER_SEAL
                assert source is (Status.SEALED if sealed else Status.OPEN), step
                opened = step in (Step.OPENED, Step.REVERSE_STARTED)
                assert target is (Status.OPEN if opened else Status.SEALED), step
                if not sealed:
                    await writers.more(3)
        await finish(given, writers)


async def test_neither_stream_carries_what_the_other_has_written(given: Configuration) -> None:
    """The way back is recorded before the source is sealed, and a mover may follow forward for a while after
    the target was opened: what one of them applies comes out of the other's log."""

    def write(step: str) -> None:
        if step == Step.VERIFIED_FULLY:
            with psycopg2.connect(given.source) as conn, conn.cursor() as cursor:
                cursor.execute("UPDATE device SET customer_id = 1 WHERE id = 22")  # leaves, with its rows
                cursor.execute("UPDATE device SET customer_id = 2, name = 'new here' WHERE id = 30")

    async with moving(given) as mover:
        target = await asyncpg.connect(given.target)
        try:
            await target.execute("INSERT INTO device VALUES (10, 2, 'surplus')")
            await mover.reverse.prepare()
            repaired = await mover.verifier.repair(await mover.verifier.run())
            assert repaired.deleted == 1
            assert (await cut_over(mover, given, write)).finished
            async with asyncio.timeout(60):
                for n in range(300):
                    await target.execute("UPDATE device SET name = $1 WHERE id = 21", f"at {n}")
                    await asyncio.sleep(0.005)
                await mover.reverse.follower.reached(await mover.parts.target.position(), 20)
                await mover.forward.reached(await mover.parts.source.position(), 20)
        finally:
            await target.close()
    devices = "SELECT customer_id * 100 + id FROM device WHERE id IN (10, 21, 22, 30)"
    assert await rows(given.source, devices) == {110, 221, 122, 230}
    assert await rows(given.target, devices) == {221, 230}
    assert await rows(given.source, "SELECT n FROM reading WHERE device_id = 22") == {1, 2, 3, 4, 5}
    assert await rows(given.source, "SELECT n FROM reading WHERE device_id = 30") == {1, 2, 3, 4, 5}
    for url in (given.source, given.target):
        assert await rows(url, "SELECT substr(name, 4)::int FROM device WHERE id = 21") == {299}


class Stalling(TouchedChecks):
    """The applier stands still from the last look before the freeze on."""

    stalled: "asyncpg.Connection[asyncpg.Record]"
    looks = 0

    async def recheck_touched(self, *, final: bool) -> VerifyReport:
        self.looks += 1
        report = await super().recheck_touched(final=final)
        if self.looks == 2:
            await self.stalled.execute("BEGIN; LOCK TABLE fleetlift_move.position")
        return report


async def test_over_the_bound_the_source_serves_on(given: Configuration) -> None:
    short = msgspec.structs.replace(given, at_most_s=5.0)
    async with Writers(given) as writers, moving(given) as mover:
        await writers.more()
        checks = Stalling(mover.verifier, mover.forward.touched)
        checks.stalled = await asyncpg.connect(given.target)
        usual = mover.parts
        mover.parts = msgspec.structs.replace(usual, checks=checks)
        state = await cut_over(mover, short)
        assert "not applied within" in state.aborted, state
        assert not state.finished
        assert state.refused > 0
        assert (await statuses(given))[0] is Status.OPEN
        await writers.more()
        await until(lambda: _behind(mover.forward))
        again = await cut_over(mover, short)
        assert "caught up" in again.aborted, again
        await checks.stalled.close()
        await until(lambda: _caught_up(mover.forward))
        mover.parts = usual
        assert (await cut_over(mover, given)).finished
        await writers.more()
    assert await rows(given.target, OURS) == writers.ours


async def test_it_does_not_begin_without_a_way_back_or_with_what_never_ends(given: Configuration) -> None:
    conn = await asyncpg.connect(given.source)
    try:
        async with moving(given) as mover:
            await mover.parts.source.install()
            await conn.execute("BEGIN; INSERT INTO reading VALUES (10, 999, 'prepared')")
            await conn.execute("PREPARE TRANSACTION 'in-the-way'")
            state = await cut_over(mover, given)
            assert "prepared transactions may stay open" in state.aborted
            await conn.execute("ROLLBACK PREPARED 'in-the-way'")

            async def broken() -> None:
                raise Conflict("no slot is free on the target")

            mover.reverse.prepare = broken  # type: ignore[method-assign]
            await given.save(msgspec.structs.replace(state, done=()))
            state = await cut_over(mover, given)
            assert "no slot is free" in state.aborted
            assert (await statuses(given))[0] is Status.OPEN
            refused = await mover.parts.source.refused()
            assert refused.closing == 0
    finally:
        await conn.close()
