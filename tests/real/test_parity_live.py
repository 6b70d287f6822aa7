"""Parity over the real log and database: each message in one class, whatever is killed in between."""

import asyncio
import time
from typing import Any

import pytest
from log_reader import NOW, caught_up, publish, reading, stored

from fleetlift.backend.context import Context
from fleetlift.core.migration import Member, MemberState
from fleetlift.core.parity import Account, parse_rule
from fleetlift.core.telemetry import HEADER_AGAIN, HEADER_RECEIVED, HEADER_SEQ, HEADER_TS
from fleetlift.migrate.parity import measure_parity
from fleetlift.migrate.wave import Wave
from fleetlift.store import parity as store


async def by_device(ctx: Context, n: int, body: dict[str, Any] | None = None) -> None:
    await publish(ctx, "dt/d1/gps", {"ts": NOW + n, "seq": n, **(body or {"speed": n})})


async def by_feed(
    ctx: Context, n: int, body: dict[str, Any] | None = None, *, at: float | None = None, again: bool = False
) -> None:
    headers = {
        HEADER_TS: repr(NOW + n if at is None else at),
        HEADER_SEQ: str(n),
        HEADER_RECEIVED: repr(NOW + n + 0.5),
        **({HEADER_AGAIN: "1"} if again else {}),
    }
    await publish(ctx, "feed/legacy/d1/gps", body or {"speed": n}, headers)


async def sends_to_both(ctx: Context, since: str = "now() - interval '1 hour'") -> None:
    await ctx.pool.execute(
        "INSERT INTO device_route (device, epoch, migration, telemetry, commands, link, both_since) "
        f"VALUES ('d1', 1, 'm', 'both', 'old', 'both', {since}) "
        "ON CONFLICT (device) DO UPDATE SET both_since = excluded.both_since"
    )


async def channel(ctx: Context) -> store.ChannelParity:
    async with ctx.pool.acquire() as conn:
        [found] = await store.by_channel(conn, "legacy", ["d1"])
    return found


async def test_each_message_is_in_one_class(ctx: Context) -> None:
    """Matched, missing on one side, differing, allowed by a rule, at another time: all add up."""
    await sends_to_both(ctx)
    async with ctx.pool.acquire() as conn:
        await store.set_rules(conn, "m", "legacy", [parse_rule("heading", "ignore")])
    async with reading(ctx):
        for n in range(1, 21):
            if n != 5:
                odd = {7: {"speed": 99}, 8: {"speed": n, "heading": 1}}
                await by_feed(ctx, n, odd.get(n), at=NOW + n + 0.25 if n == 9 else None)
            if n not in (10, 11):
                await by_device(ctx, n)
        await caught_up(ctx)
    found = await channel(ctx)
    assert found.account == Account(matched=14, only_old=2, only_new=1, differing=2, ignored=1, retimed=1)
    assert found.account.all == 20
    assert {name: f.differing for name, f in found.tally.fields.items()} == {"speed": 1, "heading": 0}
    assert found.tally.fields["heading"].allowed == 1
    assert (found.tally.fields["speed"].old, found.tally.fields["speed"].new) == ("99", "7")


async def test_a_late_copy_opens_the_account_again(ctx: Context) -> None:
    await sends_to_both(ctx)
    async with reading(ctx):
        for n in range(1, 11):
            await by_feed(ctx, n)
            if n != 4:
                await by_device(ctx, n)
        await caught_up(ctx)
        assert (await channel(ctx)).account == Account(matched=9, only_old=1)
        await by_device(ctx, 4)
        await caught_up(ctx)
    assert (await channel(ctx)).account == Account(matched=10)


async def test_what_was_sent_to_one_side_on_purpose_is_not_missing_on_the_other(ctx: Context) -> None:
    """Between two times of sending to both, the device was on the old side alone; the last time counts."""
    await sends_to_both(ctx)
    async with reading(ctx):
        for n in range(1, 6):
            await by_feed(ctx, n)
            await by_device(ctx, n)
        await caught_up(ctx)
        for n in range(6, 11):
            await by_feed(ctx, n)
        await caught_up(ctx)
    await sends_to_both(ctx, since="now()")
    async with reading(ctx):
        for n in range(11, 16):
            await by_feed(ctx, n)
            await by_device(ctx, n)
        await caught_up(ctx)
    assert (await channel(ctx)).account == Account(matched=5)


async def test_a_copy_that_comes_a_third_time_is_not_compared_again(ctx: Context) -> None:
    await sends_to_both(ctx)
    async with reading(ctx):
        for _ in range(3):
            await by_feed(ctx, 1)
            await by_device(ctx, 1)
        await caught_up(ctx)
    assert (await channel(ctx)).account == Account(matched=1)


async def test_a_reader_that_starts_anew_counts_none_twice(ctx: Context) -> None:
    """The account falls behind the rows at high rates; what is read again after a kill adds nothing."""
    await sends_to_both(ctx)
    for part in range(5):
        async with reading(ctx):
            for n in range(part * 200, part * 200 + 200):
                await by_feed(ctx, n, {"speed": 0 if n % 100 == 0 else n + 1})
                await by_device(ctx, n, {"speed": n + 1})
    async with reading(ctx):
        await caught_up(ctx)
    found = await channel(ctx)
    assert found.account == Account(matched=990, differing=10)


async def test_the_old_side_is_compared_with_itself(ctx: Context) -> None:
    """A second reading is neither stored nor counted; it tells how far the old side differs from itself."""
    async with reading(ctx):
        for n in range(1, 21):
            await by_feed(ctx, n)
        await caught_up(ctx)
        for n in range(1, 21):
            await by_feed(ctx, n, {"speed": n if n % 10 else n + 0.5}, again=True)
        await by_feed(ctx, 99, again=True)  # never told before: nothing to compare with
        await caught_up(ctx)
    assert await stored(ctx) == 20
    async with ctx.pool.acquire() as conn:
        noise = (await store.noise(conn, "legacy"))["gps"]
        received = await conn.fetchval("SELECT sum(received) FROM ledger")
    assert received == 20
    assert (noise.compared, noise.differing, noise.fields["speed"].likely) == (20, 2, "rounding")


async def test_a_gate_has_no_figure_before_the_noise_is_known(ctx: Context) -> None:
    """Then it is the share of pairs that differ above it, with the worst field for an example."""
    await sends_to_both(ctx)
    member = Member(device="d1", rank=0, rung=1, epoch=1, state=MemberState.MOVED, told_at=1.0, moved_at=2.0)
    wave = Wave(told=(member,), moved=(member,))
    async with reading(ctx):
        for n in range(1, 101):
            await by_feed(ctx, n)
            await by_device(ctx, n, {"speed": n if n % 20 else n * 3.6})
        await caught_up(ctx)
        async with ctx.pool.acquire() as conn:
            unknown = (await measure_parity(conn, wave, "legacy"))["parity.differing"]
        for n in range(101, 201):
            await by_feed(ctx, n)
        await caught_up(ctx)
        for n in range(101, 201):
            await by_feed(ctx, n, {"speed": n if n > 101 else 0}, again=True)
        await caught_up(ctx)
        async with ctx.pool.acquire() as conn:
            known = (await measure_parity(conn, wave, "legacy"))["parity.differing"]
    assert unknown.value is None
    assert "noise is not known yet" in unknown.evidence["summary"]
    assert known.value == pytest.approx(4.0)
    assert known.n == 100
    assert known.evidence["summary"] == "5 of 100 differ, gps speed most (unit: m/s and km/h)"


async def test_rules_are_taken_up_while_the_reader_runs(ctx: Context) -> None:
    await sends_to_both(ctx)
    async with reading(ctx):
        await by_feed(ctx, 1, {"speed": 1})
        await by_device(ctx, 1, {"speed": 2})
        await caught_up(ctx)
        async with ctx.pool.acquire() as conn:
            await store.set_rules(conn, "m", "legacy", [parse_rule("speed", 5)])
        deadline = time.monotonic() + 10
        n = 2
        while (await channel(ctx)).account.ignored == 0:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
            await by_feed(ctx, n, {"speed": 1})
            await by_device(ctx, n, {"speed": 2})
            await caught_up(ctx)
            n += 1
        assert (await channel(ctx)).account.differing == 0
        async with ctx.pool.acquire() as conn:
            await store.keep_rules(conn, ["another"])
            assert await store.all_rules(conn) == {}
