"""The streams of tenants' moves as their movers look after them: which runs, and what ends or closes it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import asyncpg
import psycopg2
import pytest
from follow_world import read_closure, rules, until
from move_world import SCHEMA, Moving, fill, move, run, value
from msgspec.structs import replace

from fleetlift.core.migration import Phase, RequestKind
from fleetlift.core.tenant.cutover import Step
from fleetlift.core.tenant.move import StepPhase, StepState
from fleetlift.mover import streams
from fleetlift.mover.streams import Streams
from fleetlift.mover.wiring import StepWorks
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.store.pool import Pool
from fleetlift.tenant import follow_books, stream
from fleetlift.tenant.fence import tag_of
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.leftovers import clean
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fresh_pair, running_postgres

SERVER_SETTINGS = {"fsync": "off"}


@pytest.fixture
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        await fill(fresh.source)
        yield fresh


@pytest.fixture
async def moving(pool: Pool, pair: Pair, tmp_path: Path) -> AsyncIterator[Moving]:
    async with move(pool, tmp_path, pair.source, pair.target) as made:
        yield made


async def test_the_end_of_one_way_back_leaves_that_of_another_move_alone(
    server: EmbeddedPostgres, pool: Pool, pair: Pair, moving: Moving, tmp_path: Path
) -> None:
    """Two tenants of one source: one goes back, is released; the other, later, loses nothing by it."""
    async with (
        fresh_pair(server) as other_pair,
        move(pool, tmp_path, pair.source, other_pair.target, name="two", owner=2) as other,
    ):
        for one in (moving, other):
            await one.start()
            await one.until_phase(Phase.FINISHED)
        for kind, phase in ((RequestKind.REVERT, Phase.REVERTED), (RequestKind.RELEASE, Phase.RELEASED)):
            await moving.ask(kind)
            await moving.until_phase(phase)
        await moving.until(lambda state: state.cleaned)
        await run(other_pair.target, "UPDATE item SET name = 'there' WHERE id = 1")
        await other.stop()
        await run(other_pair.target, "UPDATE item SET name = 'meanwhile' WHERE id = 3")
        await other.start()
        assert not (await other.state()).way_back
        await other.ask(RequestKind.REVERT)
        await other.until_phase(Phase.REVERTED)
        names = "SELECT string_agg(name, ', ' ORDER BY id) FROM item WHERE id IN (1, 3)"
        assert await value(pair.source, names) == "there, meanwhile"
        assert await value(pair.source, "SELECT to_regnamespace('fleetlift_move') IS NULL")


async def test_what_only_the_target_has_is_not_dropped_when_the_source_was_opened(
    moving: Moving, pair: Pair
) -> None:
    """As after a failover to a standby without the seal: a revert would take the source for up to date."""
    await moving.start()
    await moving.until_phase(Phase.FINISHED)
    await run(pair.source, f"SELECT fleetlift_fence.unseal_{tag_of(moving.name)}()")
    await run(pair.target, "UPDATE item SET name = 'only there' WHERE id = 2")
    await moving.ask(RequestKind.REVERT)
    state = await moving.until_phase(Phase.HELD)
    assert "both sides may have taken writes" in state.reason
    assert await value(pair.target, "SELECT name FROM item WHERE id = 2") == "only there"
    slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    assert await value(pair.target, slots) == 1
    await clean(pair.target, moving.name, other_url=pair.source)  # somebody gives the target up
    await moving.ask(RequestKind.RESUME)
    await moving.until_phase(Phase.REVERTED)


async def test_each_way_back_puts_its_own_targets_identities_back(
    server: EmbeddedPostgres, pair: Pair, tmp_path: Path
) -> None:
    """Tables of one name on two targets, noted on the one source."""
    async with fresh_pair(server) as other:
        backs: list[Follower] = []
        its_rules = rules("public.owner.id", "1", full_identity=("public.event",))
        for target in (pair.target, other.target):
            await run(target, SCHEMA)
            closure = await read_closure(target, its_rules)
            back = Follower(
                target,
                pair.source,
                closure,
                move=f"m{len(backs)}",
                directory=tmp_path / f"m{len(backs)}",
                direction=Direction.REVERSE,
            )
            await back.prepare()
            backs.append(back)
        identity = "SELECT relreplident::text FROM pg_class WHERE relname = 'event'"
        for back, target in zip(backs, (pair.target, other.target), strict=True):
            assert await value(target, identity) == "f"
            await back.drop()
            assert await value(target, identity) == "d"
        assert await value(pair.source, "SELECT to_regnamespace('fleetlift_move') IS NULL")


async def test_a_way_back_that_is_lost_is_never_made_anew_in_silence(moving: Moving, pair: Pair) -> None:
    """Its books gone while no mover is there: closed, shown, and a revert is refused."""
    await moving.start()
    await moving.until_phase(Phase.FINISHED)
    await moving.stop()
    await run(pair.source, "DELETE FROM fleetlift_move.position")
    await run(pair.target, "UPDATE item SET name = 'there' WHERE id = 2")
    await moving.start()
    state = await moving.until(lambda state: bool(state.way_back))
    assert "fleetlift_one_back is not in fleetlift_move.position any more" in state.way_back
    await moving.ask(RequestKind.REVERT)
    assert (await moving.until_phase(Phase.FINISHED)).way_back
    await moving.ask(RequestKind.RELEASE)
    await moving.until(lambda state: state.cleaned)


def deaf(monkeypatch: pytest.MonkeyPatch, to: type, name: str, *, but: Callable[..., bool]) -> asyncio.Event:
    """Have a method wait for ever and, when it is cancelled first, raise what asyncpg's transactions raise
    then if their connection breaks in the same moment. `but`: which calls are done. Set when it waits."""
    does, waits = getattr(to, name), asyncio.Event()

    async def instead(*arguments: Any) -> Any:
        if but(*arguments):
            return await does(*arguments)
        first = not waits.is_set()
        waits.set()
        try:
            return await asyncio.Event().wait()
        except asyncio.CancelledError:
            if first:
                raise asyncpg.InterfaceError("the underlying connection is closed") from None
            raise

    monkeypatch.setattr(to, name, instead)
    return waits


async def test_a_revert_begins_though_the_word_to_stop_was_lost(
    moving: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work that it takes back ends, and does not begin again as if a database had been away."""
    waits = deaf(monkeypatch, StepWorks, "run", but=lambda _works, _move, work: work.undo)
    await moving.start()
    async with asyncio.timeout(15):
        await waits.wait()
    await moving.ask(RequestKind.REVERT)
    await moving.until_phase(Phase.REVERTED, within_s=15)


async def test_a_stream_ends_though_the_word_to_stop_was_lost(
    moving: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = deaf(monkeypatch, Follower, "_session", but=lambda _follower: False)
    await moving.start()
    async with asyncio.timeout(15):
        await waits.wait()
    await moving.ask(RequestKind.REVERT)
    await moving.until_phase(Phase.REVERTED, within_s=15)


async def test_reverted_while_the_source_is_slow_to_connect_no_slot_appears_later(
    moving: Moving, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes back waits for the thread that connects only for a while; nobody would drop its slot."""
    connects, go = threading.Event(), threading.Event()

    def slowly(url: str, *, name: str) -> Any:
        connects.set()
        assert go.wait(60)
        return stream.replication_connection(url, name=name)

    monkeypatch.setattr(follow_books, "replication_connection", slowly)
    monkeypatch.setattr(follow_books, "GIVEN_UP_WITHIN_S", 0.3)
    try:
        await moving.start()
        await until(connects.is_set)
        await moving.ask(RequestKind.REVERT)
        await moving.until_phase(Phase.REVERTED, within_s=15)
    finally:
        go.set()
    await asyncio.sleep(1.0)
    assert await value(pair.source, "SELECT count(*) FROM pg_replication_slots") == 0


class Killed(BaseException):
    """The mover dies; nothing of it is noted."""


LONG = "ALTER TABLE item ADD CONSTRAINT short CHECK (length(name) < 20)"
SHORT = "ALTER TABLE item DROP CONSTRAINT short"
WRITE = "UPDATE item SET name = repeat('long', 9) WHERE id = 2"
WRITTEN = "SELECT name LIKE 'long%' FROM item WHERE id = 2"


async def copied_and_paused(moving: Moving) -> None:
    """The rows are copied and followed; the step goes on when it is resumed."""

    def step(name: str) -> None:
        if name == "caught-up" and not asked:
            asked.append(asyncio.create_task(moving.ask(RequestKind.PAUSE)))

    asked: list[asyncio.Task[None]] = []
    await moving.start(step)
    await moving.until_phase(Phase.PAUSED)
    await asyncio.gather(*asked)


def streams_of(moving: Moving) -> Streams:
    assert moving.runner is not None
    return cast(StepWorks, moving.runner._works)._streams


async def test_what_a_constraint_has_stopped_goes_on_when_it_is_resumed(moving: Moving, pair: Pair) -> None:
    """In the step that follows, and with the same follower: what it knows of touched rows is not lost."""
    await copied_and_paused(moving)
    follower = await streams_of(moving).forward()
    await run(pair.target, LONG)
    await run(pair.source, WRITE)
    await until(lambda: "constraint short" in follower.progress.stopped)
    await run(pair.target, SHORT)
    await moving.ask(RequestKind.RESUME)
    state = await moving.until_phase(Phase.FINISHED, Phase.HELD, within_s=15)
    assert state.phase is Phase.FINISHED, state.reason
    assert await value(pair.target, WRITTEN)


async def test_between_two_steps_too_it_is_tried_again_when_it_is_resumed(moving: Moving, pair: Pair) -> None:
    await copied_and_paused(moving)
    state = await moving.state()
    await moving.stop()
    await moving.start()
    assert moving.runner is not None
    streams = Streams(moving.runner._move)
    await moving.stop()
    done = replace(state.steps[0], phase=StepPhase.DONE)
    between = replace(state, phase=Phase.RUNNING, rung=2, steps=(done, StepState()))
    held = replace(between, phase=Phase.HELD)
    try:
        assert await streams.attend(between) == ""
        await run(pair.target, LONG)
        await run(pair.source, WRITE)
        async with asyncio.timeout(20):
            while not (why := await streams.attend(between)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert "constraint short" in why
        assert await streams.attend(held) == why
        await run(pair.target, SHORT)
        assert await streams.attend(between) == ""
        follower = await streams.forward()
        await until(lambda: follower.caught_up)
        assert await streams.attend(between) == ""
        assert await value(pair.target, WRITTEN)
    finally:
        await streams.close()


async def test_a_way_back_that_was_closed_opens_by_itself(
    moving: Moving, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried again from time to time, without a word each time; open when it has caught up."""
    monkeypatch.setattr(streams, "BACK_AGAIN_S", 0.3)
    await moving.start()
    await moving.until_phase(Phase.FINISHED)
    await run(pair.source, LONG)
    await run(pair.target, WRITE)
    assert "constraint short" in (await moving.until(lambda state: bool(state.way_back))).way_back
    await asyncio.sleep(1.5)
    assert (await moving.state()).way_back
    await run(pair.source, SHORT)
    await moving.until(lambda state: not state.way_back)
    assert await value(pair.source, WRITTEN)
    assert await moving.noted("way_back_closed") == await moving.noted("way_back_open") == 1


async def test_while_the_copy_is_paused_the_source_keeps_neither_log_nor_snapshot(
    moving: Moving, pair: Pair
) -> None:
    """Also for a mover that begins in the pause; and the rest is copied by a snapshot of its own."""

    def step(name: str) -> None:
        if name.startswith("chunk public.event") and "resumed" not in asked:
            if not asked:
                asked["paused"] = asyncio.create_task(moving.ask(RequestKind.PAUSE))
            raise OSError("no chunk of it comes through before the pause")

    asked: dict[str, asyncio.Task[None]] = {}
    slot = "FROM pg_replication_slots WHERE slot_name = 'fleetlift_one'"
    await moving.start(step)
    await moving.until_phase(Phase.PAUSED)
    for n, restarts in enumerate((False, True)):
        if restarts:
            await moving.stop()
            await moving.start(step)
        await run(
            pair.source,
            f"UPDATE item SET name = 'meanwhile {n}' WHERE id IN (2, 3)",
            f"INSERT INTO item VALUES ({100 + n}, 1, 'new'); INSERT INTO event VALUES ({100 + n}, 'new')",
            f"DELETE FROM event WHERE item_id = {10 + 2 * n}; DELETE FROM item WHERE id = {10 + 2 * n}",
        )
        written = await value(pair.source, "SELECT pg_current_wal_flush_lsn()::text")
        read = f"SELECT confirmed_flush_lsn >= '{written}' {slot}"
        await until(partial(value, pair.source, read), 10)
        held = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name LIKE '%slot fleetlift_one'"
        await until(partial(value, pair.source, held), 10)
    assert not await value(pair.target, "SELECT count(*) FROM event")
    assert (await moving.state()).phase is Phase.PAUSED
    asked["resumed"] = asyncio.create_task(moving.ask(RequestKind.RESUME))
    state = await moving.until(lambda state: state.phase in (Phase.FINISHED, Phase.HELD))
    assert state.phase is Phase.FINISHED, state.reason
    for rows in (
        "SELECT string_agg(i::text, ' ' ORDER BY id) FROM item i WHERE owner_id = 1",
        "SELECT string_agg(e::text, ' ' ORDER BY item_id) FROM event e JOIN item i ON i.id = item_id "
        "WHERE owner_id = 1",
    ):
        assert await value(pair.source, rows) == await value(pair.target, rows)


@pytest.mark.parametrize("at", ["schema-made", "rows-copied", "schema-finished"])
async def test_what_stops_following_stops_the_copy(moving: Moving, pair: Pair, at: str) -> None:
    """Also while rows are copied, indexes are made, or it waits for the stream."""

    def step(name: str) -> None:
        if name == at:
            with psycopg2.connect(pair.source) as conn, conn.cursor() as cursor:
                cursor.execute("TRUNCATE event")

    await moving.start(step)
    held = await moving.until_phase(Phase.HELD, Phase.FINISHED)
    assert held.phase is Phase.HELD and "TRUNCATE" in held.reason.upper(), held.reason
    await moving.ask(RequestKind.REVERT)
    await moving.until_phase(Phase.REVERTED)


async def test_a_database_that_is_away_closes_the_way_back_and_stops_no_round(
    server: EmbeddedPostgres, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a mover that follows, and before one that begins: requests are answered, and it opens again."""
    monkeypatch.setattr(streams, "AWAY_FOR_S", 0.5)
    with scratch_directory() as directory:
        async with (
            running_postgres(directory, extra={"fsync": "off"}, throwaway=False) as away,
            fresh_pair(server, away) as pair,
            move(pool, tmp_path, pair.source, pair.target) as moving,
        ):
            await fill(pair.source)
            await moving.start()
            await moving.until_phase(Phase.FINISHED)
            for restarts in (False, True):
                if restarts:
                    await moving.stop()
                await away.stop()
                if restarts:
                    await moving.start()
                closed = await moving.until(lambda state: bool(state.way_back))
                assert "has not answered for 0.5 s" in closed.way_back
                await moving.ask(RequestKind.REVERT)
                await moving.until(lambda state: state.phase is Phase.FINISHED)
                assert await moving.noted("request_refused") == 1 + restarts
                await away.start()
                await run(pair.target, WRITE)
                await moving.until(lambda state: not state.way_back)
                assert await value(pair.source, WRITTEN)
            await moving.ask(RequestKind.REVERT)
            await moving.until_phase(Phase.REVERTED)


async def test_killed_when_the_target_is_open_a_revert_brings_all_of_it_back(
    moving: Moving, pair: Pair
) -> None:
    """Nobody has noted the seal; what both fences say does it, and the rounds leave its stream alone."""

    def step(name: str) -> None:
        if name == Step.OPENED:
            opened.set()
            raise Killed

    opened = asyncio.Event()
    await moving.start(step)
    async with asyncio.timeout(60):
        await opened.wait()
    await moving.stop()
    assert not (await moving.state()).steps[1].facts.get("sealed")
    # So much that the way back does not fit between two rounds.
    await run(pair.target, "INSERT INTO item SELECT n, 1, 'there' FROM generate_series(100, 60000) n", WRITE)
    await moving.ask(RequestKind.REVERT)
    await moving.start()
    state = await moving.until_phase(Phase.REVERTED, Phase.HELD)
    assert state.phase is Phase.REVERTED, state.reason
    assert await value(pair.source, WRITTEN)
    assert await value(pair.source, "SELECT count(*) FROM item WHERE name = 'there'") == 59_901
