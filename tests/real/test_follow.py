"""What is committed on the source, as it concerns the tenant, is on the target: once, in order, soon."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import psycopg2
import pytest
import pytest_asyncio
from follow_world import CLOUD_RULES, Direction, World, rules, until, world
from small_disk import mounted, resized, space_on, unmounted

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant import follow_books, follow_session, stream
from fleetlift.tenant.follow import Follower, FollowState
from fleetlift.testing import scratch_directory
from tenant_world import CLOUD_SQL, Pair, fill_cloud, fresh_pair, running_postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")


SERVER_SETTINGS = {"fsync": "off"}


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        yield fresh


ITEMS = """
CREATE TABLE owner (id int PRIMARY KEY, name text);
CREATE TABLE item (id int PRIMARY KEY, owner_id int NOT NULL REFERENCES owner, name text UNIQUE, big text);
CREATE TABLE part (item_id int REFERENCES item ON UPDATE CASCADE ON DELETE CASCADE, n int, body text,
  PRIMARY KEY (item_id, n));
CREATE TABLE event (item_id int REFERENCES item ON UPDATE CASCADE ON DELETE CASCADE, body text);
"""
ITEM_ROWS = """
ALTER TABLE item ALTER big SET STORAGE EXTERNAL;
INSERT INTO owner VALUES (1, 'one'), (2, 'two');
INSERT INTO item SELECT n, 1 + n % 2, 'item ' || n, repeat(n || ' ', 2000) FROM generate_series(1, 20) n;
INSERT INTO part SELECT i.id, n, 'part' FROM item i, generate_series(1, 3) n;
INSERT INTO event SELECT i.id, 'event' FROM item i, generate_series(1, 2) n;
"""
ITEM_RULES = rules("public.owner.id", "1", full_identity=("public.event",))

# Items with an even number are the tenant's. Each statement is a case of its own, on rows of its own.
CASES = {
    "insert": "INSERT INTO item VALUES (30, 1, 'new', 'x'); INSERT INTO part VALUES (30, 1, 'new')",
    "update": "UPDATE item SET name = 'changed' WHERE id = 2",
    "delete": "DELETE FROM item WHERE id = 4",
    "re-insert": "DELETE FROM item WHERE id = 6; INSERT INTO item VALUES (6, 1, 'again', 'y'); "
    "INSERT INTO part VALUES (6, 9, 'again')",
    "key update": "UPDATE item SET id = 108 WHERE id = 8",
    "key taken over": "UPDATE item SET id = 110 WHERE id = 10; INSERT INTO item VALUES (10, 1, 'over', 'z')",
    "tenant out": "UPDATE item SET owner_id = 2 WHERE id = 12",
    "tenant in": "UPDATE item SET owner_id = 1 WHERE id = 1",
    "in and key": "UPDATE item SET owner_id = 1, id = 103 WHERE id = 3",
    "out and in": "UPDATE item SET owner_id = 2 WHERE id = 14; UPDATE part SET body = 'while out' "
    "WHERE item_id = 14; UPDATE item SET owner_id = 1 WHERE id = 14",
    "child moves": "UPDATE part SET item_id = 5, n = 7 WHERE item_id = 16 AND n = 1; "
    "UPDATE part SET item_id = 16, n = 8 WHERE item_id = 5 AND n = 2",
    "rows without a key": "INSERT INTO event VALUES (18, 'event'); UPDATE event SET item_id = 7 WHERE ctid = "
    "(SELECT ctid FROM event WHERE item_id = 18 LIMIT 1); DELETE FROM event WHERE ctid = "
    "(SELECT ctid FROM event WHERE item_id = 20 LIMIT 1)",
}
ORDERS = ("copy-update-log", "update-copy-log", "update-log-copy")


@pytest.mark.parametrize("order", ORDERS)
async def test_the_three_orders_of_copy_update_and_log(pair: Pair, tmp_path: Path, order: str) -> None:
    """A row may be copied before it changes, after it has changed and before the change is applied, or
    after."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        snapshot = await w.prepare()
        keyed = [table for table in w.closure.order if table != "public.event"]
        w.run()
        if order == "update-copy-log":
            await w.copy(snapshot, ["public.event", "public.owner"])
        else:
            await w.copy(snapshot)
        for case in CASES.values():
            async with w.source.transaction():
                await w.source.execute(case)
        if order == "update-copy-log":
            await w.copy(None, keyed)
        w.follower.start_applying()
        if order == "update-log-copy":
            await w.settled()
            await w.copy(None, keyed)
        await w.same()
        for case in CASES.values():
            await _undone(w, case)
        await w.same()


async def _undone(w: World, case: str) -> None:
    """The same statements once more, live now, where they still do something; refused ones change nothing."""
    try:
        async with w.source.transaction():
            await w.source.execute(case.replace("108", "208").replace("110", "210").replace("30", "31"))
    except asyncpg.PostgresError:
        pass


async def test_a_small_change_is_there_at_once(pair: Pair, tmp_path: Path) -> None:
    """An idle follower has a change on the target long before its canary: a freeze waits for it."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare())
        w.run()
        w.follower.start_applying()
        await w.same()
        await until(lambda: w.follower.caught_up)
        took = []
        for n in range(20):
            began = time.perf_counter()
            await w.source.execute("UPDATE item SET big = $1 WHERE id = 2", str(n))
            lsn = await w.source.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
            assert await w.follower.reached(lsn, 5)
            took.append(time.perf_counter() - began)
            assert await w.target.fetchval("SELECT big FROM item WHERE id = 2") == str(n)
        assert sorted(took)[10] < 0.5, took


async def test_values_that_were_not_touched_stay(pair: Pair, tmp_path: Path) -> None:
    """A long value that an update leaves alone is not sent: it stays, moves with its key, or is fetched."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare())
        await w.source.execute(
            "UPDATE item SET name = 'a' WHERE id = 2; UPDATE item SET id = 104 WHERE id = 4; "
            "UPDATE item SET owner_id = 1 WHERE id = 3; UPDATE item SET owner_id = 1, id = 105 WHERE id = 5; "
            "UPDATE item SET name = 'b' WHERE id = 105"
        )
        w.run()
        w.follower.start_applying()
        await w.same()


async def test_swapped_unique_values_do_not_stop_it(pair: Pair, tmp_path: Path) -> None:
    """Net effects put in row by row may clash where the transactions did not."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.follow()
        for _ in range(3):
            await w.source.execute(
                "UPDATE item SET name = 'tmp' WHERE id = 2; UPDATE item SET name = 'item 2' WHERE id = 4; "
                "UPDATE item SET name = 'item 4' WHERE id = 6; UPDATE item SET name = 'item 6' WHERE id = 2"
            )
            await w.source.execute(
                "UPDATE item SET name = 'tmp' WHERE id = 2; UPDATE item SET name = 'item 6' WHERE id = 6; "
                "UPDATE item SET name = 'item 4' WHERE id = 4; UPDATE item SET name = 'item 2' WHERE id = 2"
            )
        await w.source.execute("UPDATE item SET owner_id = 1, name = 'x' WHERE id = 3")
        await w.source.execute("UPDATE item SET owner_id = 1, name = 'item 3' WHERE id = 5")
        await w.same()


async def test_a_row_that_comes_and_goes_is_gone_though_it_was_read_in_between(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent enters, so it is read from the source, before the batch in which it comes and goes."""
    monkeypatch.setattr(follow_session, "_BATCH_CHANGES", 5)  # the parent's transaction is a batch
    for name, value in {"_BUSY_CHANGES": 1, "_GATHER_S": 1.5, "_LINGER_S": 2.0}.items():
        monkeypatch.setattr(follow_session, name, value)  # the next batch holds what comes in 2 s
    gone: list[int] = []

    def at(name: str) -> None:
        if name == "after rows" and not gone:
            with psycopg2.connect(pair.source) as conn, conn.cursor() as cursor:
                cursor.execute("DELETE FROM part WHERE item_id = 1 AND n = 99")
                gone.append(cursor.rowcount)
            time.sleep(0.5)  # the stream, a thread, has it before this batch is done and the next one closed

    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare(at=at))
        await w.source.execute("UPDATE item SET owner_id = 1 WHERE id IN (1, 3, 5, 7, 9)")
        await w.source.execute("INSERT INTO part VALUES (1, 99, 'x')")
        w.run()
        w.follower.start_applying()
        await w.same()
        assert gone == [1]


async def test_new_rows_come_as_they_are(pair: Pair, tmp_path: Path) -> None:
    """Nothing in a text means anything on its way; a row that somebody put there stops nothing."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.follow()
        odd = ["", "\\N", "\\", "a\tb", "a\nb", "\r\n", "\\.", "ä\u2028", None, "plain"]
        await w.source.executemany("INSERT INTO part VALUES (2, $1, $2)", list(enumerate(odd, 50)))
        await w.same()
        await w.target.execute("INSERT INTO part VALUES (2, 70, 'of somebody else')")
        await w.source.execute("INSERT INTO part SELECT 2, n, 'ours' FROM generate_series(69, 71) n")
        await w.same()


async def test_a_constraint_that_the_target_violates_is_named(pair: Pair, tmp_path: Path) -> None:
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare())
        await w.target.execute("ALTER TABLE item ADD CONSTRAINT short CHECK (length(name) < 20)")
        task = w.run()
        w.follower.start_applying()
        await w.source.execute("UPDATE item SET name = repeat('long', 9) WHERE id = 2")
        with pytest.raises(Conflict, match=r"refuses a change.*constraint short.*longlong"):
            await asyncio.wait_for(task, 30)
        assert w.follower.progress.state is FollowState.STOPPED


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("TRUNCATE part", r"public\.part was truncated"),
        ("ALTER TABLE part ADD more int; UPDATE part SET more = 1", "new column more"),
        ("ALTER TABLE part DROP body; UPDATE part SET n = n + 10", "has lost body"),
        (
            "ALTER TABLE part ALTER n TYPE bigint; UPDATE part SET n = n + 10",
            "type of n was integer and is bigint",
        ),
        ("UPDATE item SET owner_id = 2; DELETE FROM owner WHERE id = 1", "tenant's own row"),
    ],
)
async def test_what_cannot_be_followed_stops_the_move(
    pair: Pair, tmp_path: Path, statement: str, said: str
) -> None:
    """Before it and nothing of it is on the target, and trying again says the same."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare())
        task = w.run()
        w.follower.start_applying()
        await w.settled()
        await w.source.execute(statement)
        with pytest.raises(Conflict, match=said):
            await asyncio.wait_for(task, 30)
        w.new_follower()
        again = w.run()
        w.follower.start_applying()
        with pytest.raises(Conflict, match=said):
            await asyncio.wait_for(again, 30)
        assert not w.follower.caught_up
        assert await w.target.fetchval("SELECT count(*) FROM part") == 30


async def test_a_partition_that_goes_is_noticed(pair: Pair, tmp_path: Path) -> None:
    await fill_cloud(pair.source)
    async with world(pair, tmp_path, CLOUD_RULES, ddl=CLOUD_SQL) as w:
        await w.copy(await w.prepare())
        task = w.run()
        w.follower.start_applying()
        await w.source.execute(
            "CREATE TABLE audit_log_far (id bigint NOT NULL, customer_id bigint, at timestamptz NOT NULL, "
            "action text NOT NULL)"
        )
        await w.source.execute(
            "ALTER TABLE audit_log DETACH PARTITION audit_log_now; ALTER TABLE audit_log ATTACH PARTITION "
            "audit_log_far FOR VALUES FROM ('2030-01-01') TO ('2031-01-01'); ALTER TABLE audit_log ATTACH "
            "PARTITION audit_log_now DEFAULT"
        )
        await w.source.execute(
            "INSERT INTO audit_log (customer_id, at, action) VALUES (2, '2030-05-05', 'far'), (2, now(), "
            "'now')"
        )
        await w.settled()
        assert await w.target.fetchval("SELECT count(*) FROM audit_log WHERE action IN ('far', 'now')") == 2
        await w.source.execute("DROP TABLE audit_log_far")
        with pytest.raises(Conflict, match=r"partition public\.audit_log_far was detached"):
            await asyncio.wait_for(task, 30)


async def test_a_table_whose_changes_could_not_be_told_is_refused(pair: Pair, tmp_path: Path) -> None:
    """Publishing it would make the application's own updates fail."""
    without = rules("public.owner.id", "1")
    async with world(pair, tmp_path, without, ddl=ITEMS, rows=ITEM_ROWS) as w:
        with pytest.raises(BadInput, match=r"public\.event has no key"):
            await w.prepare()
        assert not await w.source.fetch("SELECT 1 FROM pg_publication")
        await w.source.execute("DELETE FROM event")


async def test_nothing_is_left_behind(pair: Pair, tmp_path: Path) -> None:
    """Slot, publication, spool and the tables' identities; twice, and before anything was made."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.new_follower().drop()
        await w.prepare()
        identity = "SELECT relreplident::text FROM pg_class WHERE relname = 'event'"
        assert await w.source.fetchval(identity) == "f"
        w.run()
        await until(lambda: w.follower.progress.state is FollowState.SPOOLING)
        await w.stop()
        await w.follower.drop()
        await w.follower.drop()
        assert await w.source.fetchval(identity) == "d"
        assert not await w.source.fetch(
            "SELECT 1 FROM pg_replication_slots WHERE database = current_database()"
        )
        assert not await w.source.fetch("SELECT 1 FROM pg_publication")
        assert not list(tmp_path.rglob("*.seg"))


class _Held:
    """A replication connection, and its cursor, whose thread stands still at a point until `go` is set."""

    def __init__(self, real: Any, point: str, hold: Callable[[str], None]) -> None:
        self._real, self._point, self._hold = real, point, hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def cursor(self) -> "_Held":
        self._hold("connected")
        return _Held(self._real.cursor(), self._point, self._hold)

    def execute(self, command: str) -> None:
        if command.startswith("CREATE"):
            self._hold("to be made")
        self._real.execute(command)
        if command.startswith("CREATE"):
            self._hold("made")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("point", ["connecting", "connected", "to be made", "made"])
async def test_a_slot_that_was_given_up_does_not_appear_later(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, late: bool
) -> None:
    """Its thread cannot be cancelled. `late`: it goes on only when nobody waits for it any more."""
    there, go = threading.Event(), threading.Event()

    def hold(at: str) -> None:
        if at == point:
            there.set()
            assert go.wait(30)

    def connection(url: str, *, name: str) -> Any:
        hold("connecting")
        return _Held(stream.replication_connection(url, name=name), point, hold)

    slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    monkeypatch.setattr(follow_books, "replication_connection", connection)
    monkeypatch.setattr(follow_books, "GIVEN_UP_WITHIN_S", 0.3 if late else 20.0)
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        writer = await asyncpg.connect(pair.source)
        preparing = asyncio.create_task(w.new_follower().prepare())
        try:
            await until(there.is_set)
            preparing.cancel()
            await asyncio.wait([preparing], timeout=1.0)
            preparing.cancel()  # asked again
            assert preparing.done() is late
            if point == "to be made" and not late:  # it would wait for this transaction's end
                await writer.execute("BEGIN; SELECT pg_current_xact_id()")
            go.set()
            await asyncio.wait([preparing], timeout=10)
            assert preparing.cancelled()
            await asyncio.sleep(1.0 if late else 0.0)
            assert await w.source.fetchval(slots) == 0
        finally:
            go.set()
            await writer.close()
        await w.follower.drop()
        assert await w.source.fetchval(slots) == 0


async def test_a_slot_that_is_lost_says_that_the_copy_must_start_again(pair: Pair, tmp_path: Path) -> None:
    """It is never made anew in silence: what was committed meanwhile would be missing."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.follow()
        await w.stop()
        slot = w.follower.slot
        await until(lambda: _inactive(w, slot))
        await w.source.execute("SELECT pg_drop_replication_slot($1)", slot)
        await w.source.execute("UPDATE item SET name = 'missed' WHERE id = 2")
        with pytest.raises(Conflict, match="copy must start again"):
            await w.new_follower().prepare()
        task = w.run()
        with pytest.raises(Conflict, match="copy must start again"):
            await asyncio.wait_for(task, 30)
        assert not await w.source.fetch("SELECT 1 FROM pg_replication_slots WHERE slot_name = $1", slot)


async def test_a_slot_over_its_limit_says_which_one(tmp_path: Path) -> None:
    """The source keeps so much of its log for a mover that is away, and no more."""
    with scratch_directory() as directory:
        limits = {"fsync": "off", "max_slot_wal_keep_size": "16MB", "max_wal_size": "32MB"}
        async with (
            running_postgres(directory, extra=limits) as own,
            fresh_pair(own) as pair,
            world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w,
        ):
            await w.follow()
            await w.stop()
            slot = w.follower.slot
            await until(lambda: _inactive(w, slot))
            for _ in range(6):
                await w.source.execute("SELECT pg_logical_emit_message(false, 'much', repeat('x', 10000000))")
                await w.source.execute("SELECT pg_switch_wal()")
            await w.source.execute("CHECKPOINT")
            w.new_follower()
            w.follower.start_applying()
            with pytest.raises(Conflict, match=r"max_slot_wal_keep_size.*start again, with a higher limit"):
                await asyncio.wait_for(w.run(), 30)


async def test_a_full_disk_of_the_target_is_waited_out(tmp_path: Path) -> None:
    """A real one: a table of the target lies on a file system with no room left, until it gets more."""
    with scratch_directory() as directory:
        disk = directory / "disk"
        if not await mounted(disk, size="3m"):
            pytest.skip("no file system can be mounted here")
        try:
            async with (
                running_postgres(directory / "own", extra={"fsync": "off"}) as own,
                fresh_pair(own) as pair,
                world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w,
            ):
                directory.chmod(0o711)
                await w.target.execute(f"CREATE TABLESPACE small LOCATION '{space_on(disk, own)}'")
                await w.target.execute("ALTER TABLE part SET TABLESPACE small")
                await w.follow()
                await w.source.execute(
                    "INSERT INTO part SELECT 2, n, repeat('x', 1000) FROM generate_series(9, 6000) n"
                )
                await until(lambda: _said(w, "No space left on device"))
                await w.source.execute("INSERT INTO part VALUES (2, 8, 'written meanwhile')")
                assert not w.follower.caught_up
                await resized(disk, size="64m")
                await w.same()
        finally:
            await unmounted(disk)


async def _said(w: World, text: str) -> bool:
    return text in w.follower.progress.trouble


async def _inactive(w: World, slot: str) -> bool:
    return not await w.source.fetchval("SELECT active FROM pg_replication_slots WHERE slot_name = $1", slot)


async def test_a_spool_that_is_lost_is_noticed(pair: Pair, tmp_path: Path) -> None:
    """The source has forgotten what was spooled: going on would lose it."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(await w.prepare())
        w.run()
        await w.source.execute("UPDATE item SET name = 'spooled' WHERE id = 2")
        await until(lambda: w.follower.progress.spooled_bytes > 0)
        await w.stop()
        for path in tmp_path.rglob("spool-forward"):
            path.rename(tmp_path / "elsewhere")
        w.new_follower()
        with pytest.raises(Conflict, match="copy must start again"):
            await asyncio.wait_for(w.run(), 30)


async def test_what_others_write_fakes_no_progress(pair: Pair, tmp_path: Path) -> None:
    """Much that is filtered out, and keep-alives about it, move no position: only what was applied does. And
    where nothing of the tenant comes for long, the slot does not hold the source's log for ever."""
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.source.execute("CREATE TABLE elsewhere (n int)")
        await w.copy(await w.prepare())
        w.run()
        await until(lambda: w.follower.progress.state is FollowState.SPOOLING)
        began = w.follower.progress
        await w.source.execute("INSERT INTO elsewhere SELECT generate_series(1, 200000)")
        await w.source.execute("UPDATE item SET name = 'waits' WHERE id = 2")
        lsn = await w.source.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        await until(lambda: w.follower.progress.received_lsn >= lsn)
        await until(lambda: (w.follower.progress.lag_bytes or 0) > 5_000_000)
        still = w.follower.progress
        assert still.applied_lsn == began.applied_lsn and not still.caught_up
        assert await w.target.fetchval("SELECT count(*) FROM item WHERE name = 'waits'") == 0
        assert not await w.follower.reached(lsn, 0.3)
        w.follower.start_applying()
        assert await w.follower.reached(lsn, 20)
        assert await w.target.fetchval("SELECT count(*) FROM item WHERE name = 'waits'") == 1
        confirmed = (
            "SELECT (confirmed_flush_lsn - '0/0')::bigint FROM pg_replication_slots WHERE slot_name = $1"
        )

        async def let_go() -> bool:
            return bool(await w.source.fetchval(confirmed, w.follower.slot) >= lsn)

        await until(let_go)


async def test_a_huge_transaction_goes_in_pieces(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it or nothing is seen on the target, and what is held of it in memory is bounded."""
    monkeypatch.setattr(follow_session, "_PIECE_CHANGES", 5000)
    seen: list[int] = []
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.copy(
            await w.prepare(at=lambda name: seen.append(_held(w.follower)) if name == "before rows" else None)
        )
        w.run()
        w.follower.start_applying()
        await w.settled()
        async with w.source.transaction():
            await w.source.execute("INSERT INTO part SELECT 2, n, 'huge' FROM generate_series(10, 150000) n")
            await w.source.execute("UPDATE item SET owner_id = 1 WHERE id = 3")
            await w.source.execute("DELETE FROM part WHERE n BETWEEN 100 AND 200")
        counts = set()
        task = asyncio.create_task(w.settled(60))
        while not task.done():
            counts.add(await w.target.fetchval("SELECT count(*) FROM part WHERE body = 'huge'"))
        await task
        counts.add(await w.target.fetchval("SELECT count(*) FROM part WHERE body = 'huge'"))
        assert counts == {0, 149_991 - 101}
        assert len(seen) > 20 and max(seen) < stream.QUEUE_BYTES * 2
        await w.same()


def _held(follower: Follower) -> int:
    return follower.progress.queued_bytes


async def test_two_followers_of_a_move_do_not_both_apply(pair: Pair, tmp_path: Path) -> None:
    async with world(pair, tmp_path, ITEM_RULES, ddl=ITEMS, rows=ITEM_ROWS) as w:
        await w.follow()
        other = Follower(pair.source, pair.target, w.closure, move="t", directory=tmp_path)
        other.start_applying()
        task = asyncio.create_task(other.run())
        await until(lambda: "another follower" in other.progress.trouble)
        await w.same()
        await w.stop()
        await until(lambda: other.caught_up)
        task.cancel()
        await asyncio.wait([task])


async def test_the_way_back_carries_the_tenants_rows(pair: Pair, tmp_path: Path) -> None:
    """From target to source: owned rows as they are; of shared and whole ones only what is new."""
    await fill_cloud(pair.source)
    async with world(pair, tmp_path, CLOUD_RULES, ddl=CLOUD_SQL) as w:
        await w.copy(await w.prepare())
        w.run()
        w.follower.start_applying()
        await w.same()
        await w.stop()
        back = Follower(
            pair.target, pair.source, w.closure, move="t", directory=tmp_path, direction=Direction.REVERSE
        )
        await back.prepare()
        task = asyncio.create_task(back.run())
        others = "SELECT count(*), max(name) FROM device WHERE customer_id <> 2"
        before = await w.source.fetchrow(others)
        await w.target.execute(
            "INSERT INTO device (id, customer_id, name, profile_id) VALUES (900, 2, 'made there', 2); "
            "INSERT INTO ts_kv VALUES ('DEVICE', '900', 'speed', 1, 1); "
            "UPDATE device SET name = name || '?' WHERE id < 900; DELETE FROM event_tag WHERE tag = 'tag1'; "
            "UPDATE currency SET name = 'changed'; INSERT INTO currency VALUES ('GBP', 'Pound')"
        )
        lsn = await w.target.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        assert await back.reached(lsn, 20)
        assert await w.source.fetchrow(others) == before
        found = await w.differences()
        assert set(found) == {"public.currency"}
        assert await w.source.fetchval("SELECT name FROM currency WHERE code = 'GBP'") == "Pound"
        assert await w.source.fetchval("SELECT count(*) FROM currency WHERE name = 'changed'") == 0
        assert back.progress.not_carried == 3
        again = Follower(
            pair.target, pair.source, w.closure, move="t", directory=tmp_path, direction=Direction.REVERSE
        )
        assert await again.not_carried() == {"public.currency": 3}  # also for a mover that starts anew
        task.cancel()
        await asyncio.wait([task])
        await back.drop()
        assert not await w.source.fetchval("SELECT to_regnamespace('fleetlift_move') IS NOT NULL")
