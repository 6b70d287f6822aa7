"""From the log to the rows: stored once, never lost, whatever is killed in between."""

import asyncio
import contextlib
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from log_reader import NOW, caught_up, eventually, publish, publish_all, reading, stored

from fleetlift.backend import telemetry
from fleetlift.backend.context import Context
from fleetlift.core.delays import BUCKETS
from fleetlift.core.errors import BadInput
from fleetlift.core.telemetry import HEADER_RECEIVED, HEADER_SEQ, HEADER_TS
from fleetlift.store import ledger
from fleetlift.store import telemetry as store


async def test_a_message_of_the_log_becomes_a_row(ctx: Context) -> None:
    """Device, channel, time, count and body come back as they were sent."""
    async with reading(ctx):
        await publish(ctx, "dt/car-1/gps/raw", b'{"ts": 1700000000.5, "seq": 7, "lat": 1.50}')
        await caught_up(ctx)
    async with ctx.pool.acquire() as conn:
        [row] = (await store.read(conn, "car-1")).items
    assert (row.channel, row.ts, row.seq, row.path) == ("gps/raw", 1_700_000_000.5, 7, "mqtt")
    assert bytes(row.body) == b'{"ts": 1700000000.5, "seq": 7, "lat": 1.50}'
    assert abs(row.received_at - time.time()) < 60


async def test_a_message_by_two_paths_is_stored_once_and_the_ledger_sees_both(ctx: Context) -> None:
    async with reading(ctx):
        for n in (1, 2, 2, 4):
            await publish(ctx, "dt/d1/gps", {"ts": NOW + n, "seq": n})
        for n in (1, 2, 3):
            headers = {HEADER_TS: repr(NOW + n), HEADER_SEQ: str(n), HEADER_RECEIVED: repr(NOW + n + 0.5)}
            await publish(ctx, "feed/legacy/d1/gps", {"ts": NOW + n, "seq": n}, headers)
        await caught_up(ctx)
    assert await stored(ctx) == 4
    async with ctx.pool.acquire() as conn:
        legacy, mqtt = await ledger.rows(conn, devices=["d1"])
        assert (mqtt.path, mqtt.ranges.to_pg(), mqtt.received, mqtt.doubles) == (
            "mqtt",
            "{[1,3),[4,5)}",
            4,
            1,
        )
        assert (legacy.path, legacy.ranges.to_pg(), legacy.received, legacy.doubles) == (
            "legacy",
            "{[1,4)}",
            3,
            0,
        )
        totals = {t.path: t.distinct for t in await ledger.totals(conn)}
        assert totals == {"mqtt": 3, "legacy": 3}
        windows = await conn.fetch("SELECT path, messages, delay_counts FROM receipt_window")
        counted: Counter[str] = Counter()
        for window in windows:  # a path has two of them when its messages lie across their border
            counted[window["path"]] += window["messages"]
        assert counted == {"mqtt": 4, "legacy": 3}
        assert all(sum(w["delay_counts"]) == w["messages"] for w in windows)


async def test_a_device_that_was_installed_anew_begins_a_new_count(ctx: Context) -> None:
    """Its numbers come again with other messages: all are stored, and the ledger tells the counts apart."""

    def fed(n: int, ts: float, received_at: float) -> dict[str, str]:
        return {HEADER_TS: repr(ts), HEADER_SEQ: str(n), HEADER_RECEIVED: repr(received_at)}

    again = time.time() - 50
    async with reading(ctx):
        for n in range(1, 41):
            await publish(ctx, "dt/d1/gps", {"ts": again - 100 + n, "seq": n})
            if n <= 38:
                await publish(ctx, "feed/legacy/d1/gps", {"v": n}, fed(n, again - 100 + n, again - 99 + n))
        await publish(ctx, "dt/d1/gps", {"ts": again - 99, "seq": 1})  # sent twice: begins nothing
        await caught_up(ctx)
        for n in (1, 2, 3):
            await publish(ctx, "feed/legacy/d1/gps", {"v": n}, fed(n, again + n, time.time()))
        # Late, and of the earlier count.
        await publish(ctx, "feed/legacy/d1/gps", {"v": 39}, fed(39, again - 61, again - 60))
        for n in (1, 2, 5):
            await publish(ctx, "dt/d1/gps", {"ts": again + n, "seq": n})
        await publish(ctx, "dt/d1/gps", {"ts": again + 1, "seq": 1})
        await caught_up(ctx)
    assert await stored(ctx) == 40 + 4
    async with ctx.pool.acquire() as conn:
        legacy, mqtt = await ledger.rows(conn, devices=["d1"])
        assert (mqtt.ranges.to_pg(), legacy.ranges.to_pg()) == ("{[1,3),[5,6)}", "{[1,4)}")
        assert (mqtt.restarts, mqtt.earlier, legacy.restarts, legacy.earlier) == (1, 40, 1, 40)
        assert (mqtt.received, mqtt.doubles, mqtt.uncounted) == (45, 2, 0)
        assert (legacy.received, legacy.doubles, legacy.uncounted) == (42, 0, 1)
        [account] = await ledger.by_device(conn, ["d1"])
        assert (account.missing, account.gaps) == (1, ("gps {[4,5)}",))


async def test_two_devices_of_one_id_lose_nothing_and_are_noticed(ctx: Context) -> None:
    """A clone counts for itself: the same numbers, other messages."""
    async with reading(ctx):
        for n in range(1, 21):
            for clone in (0.0, 0.25):
                await publish(ctx, "dt/d1/gps", {"ts": NOW + n + clone, "seq": n, "clone": clone})
        await caught_up(ctx)
    assert await stored(ctx) == 40
    async with ctx.pool.acquire() as conn:
        [row] = await ledger.rows(conn, devices=["d1"])
    assert (row.received, row.restarts, row.doubles + row.earlier) == (40, 1, 20)


async def test_a_day_in_an_outbox_changes_nothing_but_the_delay(ctx: Context) -> None:
    """Messages keep their own time: they lie in yesterday's partition and count as later than an hour."""
    async with reading(ctx):
        for n in range(110):
            at = time.time() - (86_400 if n < 100 else 0)
            await publish(ctx, "dt/d1/gps", {"ts": at + n / 1000, "seq": n})
        await caught_up(ctx)
    assert await stored(ctx) == 110
    async with ctx.pool.acquire() as conn:
        [row] = await ledger.rows(conn, devices=["d1"])
        assert (row.ranges.to_pg(), row.doubles, row.restarts) == ("{[0,110)}", 0, 0)
        elsewhere = await conn.fetchval("SELECT count(*) FROM telemetry_other")
        counted = await conn.fetch("SELECT delay_counts FROM receipt_window")
    assert elsewhere == 0
    assert sum(w["delay_counts"][BUCKETS - 1] for w in counted if len(w["delay_counts"]) == BUCKETS) == 100


async def test_without_a_time_a_repetition_is_known_by_count_and_body(ctx: Context) -> None:
    """The same count and body twice is one message; a counter that began again brings new ones."""
    async with reading(ctx):
        for body in ({"seq": 1, "v": 1}, {"seq": 1, "v": 1}, {"seq": 2, "v": 1}, {"seq": 1, "v": 9}):
            await publish(ctx, "dt/d1/t", body)
        await caught_up(ctx)
        await publish(ctx, "dt/d1/t", {"seq": 2, "v": 1})
        await caught_up(ctx)
    assert await stored(ctx) == 3


async def test_what_cannot_be_stored_is_a_dead_letter_with_the_reason(ctx: Context) -> None:
    """Each unreadable message is kept with its reason, and those around it are stored."""
    async with reading(ctx):
        await publish(ctx, "dt/d1/x", {"seq": 1})
        await publish(ctx, "dt/d1/x", b"not json")
        await publish(ctx, "dt/d1/x", b'"' + b"x" * (256 * 1024) + b'"')
        await publish(ctx, "dt/d1/x", {"seq": -1})
        await publish(ctx, "dt/d1", {"seq": 1})
        await publish(ctx, "dt/d1/x", {"seq": 2})
        await caught_up(ctx)
    assert await stored(ctx) == 2
    async with ctx.pool.acquire() as conn:
        letters = (await store.dead_letters(conn, device="d1")).items
        assert [x.reason.split(":")[0] for x in letters] == ["topic", "seq", "body", "body"]
        assert (letters[2].payload_bytes, len(letters[2].payload)) == (256 * 1024 + 2, 64 * 1024)
        counted = {c.name: c.value for c in await store.counters(conn)}
        assert counted["fleetlift_telemetry_dead_letters_total"] == 4
        assert counted["fleetlift_telemetry_received_messages_total"] == 2
        assert counted["fleetlift_telemetry_stored_messages_total"] == 2


async def test_a_row_that_postgresql_refuses_does_not_stop_the_reader(ctx: Context) -> None:
    """The one row is found among many and set aside; the rest of its batch is stored."""
    await ctx.pool.execute(
        "ALTER TABLE telemetry ADD CONSTRAINT no_poison CHECK (body::text NOT LIKE '%poison%')"
    )
    await publish_all(ctx, "d1", range(100))
    await publish(ctx, "dt/d1/gps", {"ts": NOW, "seq": 500, "v": "poison"})
    await publish(ctx, "dt/d1/t", {"seq": 1, "v": "fine"})
    await publish(ctx, "dt/d1/t", {"seq": 1, "v": "poison"})
    await publish_all(ctx, "d1", range(100, 200))
    async with reading(ctx):
        await caught_up(ctx)
    assert await stored(ctx) == 201
    async with ctx.pool.acquire() as conn:
        letters = (await store.dead_letters(conn, device="d1")).items
    assert [(x.topic, x.reason.split(":")[0]) for x in letters] == [
        ("dt/d1/t", "database"),
        ("dt/d1/gps", "database"),
    ]


async def test_strange_but_valid_json_is_stored(ctx: Context) -> None:
    bodies = [
        b'{"a":"\\u0000"}',
        '{"a":"😀\\ud83d\\ude00"}'.encode(),
        b'{"a":1,"a":2}',
        b"[]",
        b"1e300",
        b"null",
    ]
    async with reading(ctx):
        for body in bodies:
            await publish(ctx, "dt/d1/x", body)
        await caught_up(ctx)
    async with ctx.pool.acquire() as conn:
        items = (await store.read(conn, "d1")).items
    # Those that came within one millisecond have no order among each other.
    assert sorted(bytes(row.body) for row in items) == sorted(bodies)


async def test_readers_killed_in_mid_batch_lose_and_double_nothing(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, ledger, windows and counters are exact after a dozen readers were killed at odd moments."""
    monkeypatch.setattr(telemetry, "BATCH_MAX", 150)
    monkeypatch.setattr(telemetry, "LINGER_S", 0.0)
    monkeypatch.setattr(telemetry, "ACCOUNT_AT_ONCE", 0)
    monkeypatch.setattr(telemetry, "ACCOUNT_EVERY_S", 0.05)
    devices, each = 10, 600

    async def send() -> None:
        for start in range(0, each, 50):
            for d in range(devices):
                await publish_all(ctx, f"d{d}", range(start, start + 50))
            await publish(ctx, "dt/d0/gps", b"broken")
            await publish_all(ctx, "d0", range(start, start + 10))

    sending = asyncio.create_task(send())
    for kill in range(12):
        task = asyncio.create_task(telemetry.run(ctx))
        await asyncio.sleep(0.05 + 0.03 * kill)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await sending
    async with reading(ctx):
        await caught_up(ctx)
    rounds = each // 50
    assert await stored(ctx) == devices * each
    assert await ctx.pool.fetchval("SELECT count(*) FROM dead_letter") == rounds
    async with ctx.pool.acquire() as conn:
        rows = await ledger.rows(conn)
        counted = {c.name: c.value for c in await store.counters(conn)}
    assert {row.ranges.to_pg() for row in rows} == {f"{{[0,{each})}}"}
    assert {row.device: (row.received, row.doubles) for row in rows} == {
        f"d{d}": (each + (rounds * 10 if d == 0 else 0), rounds * 10 if d == 0 else 0) for d in range(devices)
    }
    assert await ctx.pool.fetchval("SELECT sum(messages) FROM receipt_window") == devices * each + rounds * 10
    assert counted["fleetlift_telemetry_received_messages_total"] == devices * each + rounds * 10
    assert counted["fleetlift_telemetry_stored_messages_total"] == devices * each
    assert counted["fleetlift_telemetry_dead_letters_total"] == rounds


async def test_only_one_process_reads_and_another_takes_over(ctx: Context) -> None:
    """A second reader waits; when the first is killed it goes on where that one was."""
    async with reading(ctx):
        await publish_all(ctx, "d1", range(10))
        await caught_up(ctx)
        second = asyncio.create_task(telemetry.run(ctx))
        await publish_all(ctx, "d1", range(10, 20))
        await caught_up(ctx)
    await publish_all(ctx, "d1", range(20, 30))
    await caught_up(ctx)
    second.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await second
    assert await stored(ctx) == 30


async def test_a_lost_database_connection_only_interrupts(ctx: Context) -> None:
    async with reading(ctx):
        await publish_all(ctx, "d1", range(50))
        await caught_up(ctx)
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            await ctx.pool.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            )
        await publish_all(ctx, "d1", range(50, 100))

        async def check() -> bool:
            with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                return await stored(ctx) == 100
            return False

        await eventually(check)


async def test_a_log_made_anew_is_read_from_its_beginning(ctx: Context) -> None:
    async with reading(ctx):
        await publish_all(ctx, "d1", range(20))
        await caught_up(ctx)
    js = ctx.nc.jetstream()
    config = (await js.stream_info("$MQTT_msgs")).config
    await js.delete_stream("$MQTT_msgs")
    await js.add_stream(config)
    async with reading(ctx):
        await publish_all(ctx, "d1", range(20, 25))
        await caught_up(ctx)
    assert await stored(ctx) == 25


async def test_each_day_has_its_partition_and_far_off_clocks_share_one(ctx: Context) -> None:
    """Partitions are made ahead and when needed; rows that waited for their day move there."""
    today = datetime.now(UTC)
    async with reading(ctx):
        for days_off in (-400, -20, 0, 1, 500):
            await publish(ctx, "dt/d1/x", {"ts": (today + timedelta(days=days_off)).timestamp(), "seq": 1})
        await caught_up(ctx)
    by_table = {
        r["t"]: r["n"]
        for r in await ctx.pool.fetch(
            "SELECT tableoid::regclass::text AS t, count(*) AS n FROM telemetry GROUP BY 1"
        )
    }
    names = [f"telemetry_{today + timedelta(days=d):%Y%m%d}" for d in (-20, 0, 1)]
    assert by_table == {"telemetry_other": 2, **dict.fromkeys(names, 1)}
    async with ctx.pool.acquire() as conn, conn.transaction():
        assert await store.make_day(conn, (today + timedelta(days=500)).date()) == 1
    assert await ctx.pool.fetchval("SELECT count(*) FROM telemetry_other") == 1
    assert await stored(ctx) == 5


async def test_old_days_are_dropped_whole(ctx: Context) -> None:
    today = datetime.now(UTC).date()
    async with ctx.pool.acquire() as conn, conn.transaction():
        for back in (40, 31, 30):
            await store.make_day(conn, today - timedelta(days=back))
    async with reading(ctx):
        await publish(ctx, "dt/d1/x", {"ts": 5, "seq": 1})
        await caught_up(ctx)
    async with ctx.pool.acquire() as conn:
        days = await store.days(conn)
    assert min(days) == today - timedelta(days=ctx.settings.telemetry_keep_days)
    assert await stored(ctx) == 1, "a clock that is far behind is no reason to forget a message"


async def test_telemetry_is_read_back_in_order_by_pages(ctx: Context) -> None:
    """Oldest or newest first, by channel and time, each message on exactly one page."""
    async with reading(ctx):
        for n in range(20):
            await publish(ctx, f"dt/d1/{'ab'[n % 2]}", {"ts": NOW + n // 4, "seq": n})
        await publish(ctx, "dt/d2/a", {"ts": NOW, "seq": 99})
        await caught_up(ctx)
    async with ctx.pool.acquire() as conn:

        async def walk(**how: Any) -> list[int | None]:
            seqs, after = [], None
            while True:
                page = await store.read(conn, "d1", limit=3, after=after, **how)
                assert len(page.items) <= 3
                seqs += [row.seq for row in page.items]
                if page.next is None:
                    return seqs
                after = page.next

        forth = await walk()
        assert sorted(n for n in forth if n is not None) == list(range(20))
        assert [n // 4 for n in forth if n is not None] == sorted(n // 4 for n in range(20))
        assert await walk(newest=True) == forth[::-1]
        assert await walk(channel="a") == list(range(0, 20, 2))
        assert await walk(channel="a", since=NOW + 1, until=NOW + 3) == [4, 6, 8, 10]
        assert [(row.channel, row.seq) for row in await store.latest(conn, "d1")] == [("a", 18), ("b", 19)]
        assert (await store.read(conn, "nobody")).items == []
        with pytest.raises(BadInput, match="cursor"):
            await store.read(conn, "d1", after="nonsense")
        with pytest.raises(BadInput, match="limit"):
            await store.read(conn, "d1", limit=0)
