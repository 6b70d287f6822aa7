"""Which copies of a command are stored: the first is for who listens now, and whatever becomes of it, one
that waits for the device follows."""

import asyncio
import time

import msgspec
import pytest
from mqtt_device import registered, serving, until
from test_commands import Car, car, ended, eventually, service, signing_in

from fleetlift.backend import commands
from fleetlift.backend.context import Context
from fleetlift.bus.subjects import STORED, STREAM
from fleetlift.core.command import Path, Status
from fleetlift.store import commands as store

__all__ = ["service", "signing_in"]  # fixtures


async def stored_copies(ctx: Context, command: str) -> int:
    """How many copies of a command are in the log."""
    subject = f"{STORED}$aws.commands.things.*.executions.{command}.request.json"
    asked = msgspec.json.encode({"subjects_filter": subject})
    answer = await ctx.nc.request(f"$JS.API.STREAM.INFO.{STREAM}", asked, timeout=5)
    return sum((msgspec.json.decode(answer.data)["state"].get("subjects") or {}).values())


async def said(ctx: Context, device: str, *, connected: bool) -> None:
    """What presence says of a device, true or not."""
    async with ctx.pool.acquire() as conn:
        await conn.execute(
            """INSERT INTO presence (device, connected, since) VALUES ($1, $2, now())
               ON CONFLICT (device) DO UPDATE SET connected = $2, since = now()""",
            device,
            connected,
        )


async def once_subscribed(ctx: Context, device: str) -> None:
    """A device with a persistent session that has subscribed once, and is away."""
    await registered(ctx, device)
    async with car(ctx, device, clean=False):
        pass


@pytest.mark.parametrize("clean", [True, False])
async def test_a_connected_device_gets_its_command_without_a_stored_copy(
    service: None, ctx: Context, clean: bool
) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", clean=clean) as one:
        await said(ctx, "car-1", connected=True)
        made = await commands.create_command(ctx, "car-1", "lock")
        done = await eventually(ctx, made.id, ended)
        assert done.status is Status.SUCCEEDED
        assert (one.copies, one.executed, done.paths[0].attempts) == ([made.id], [made.id], 1)
        assert await stored_copies(ctx, made.id) == 0


async def test_the_copy_for_a_device_that_is_away_is_stored_once(ctx: Context) -> None:
    await once_subscribed(ctx, "car-1")
    await said(ctx, "car-1", connected=False)
    async with serving(ctx, commands.run):
        made = await commands.create_command(ctx, "car-1", "lock")
        await eventually(ctx, made.id, lambda command: command.status is Status.SENT)
        assert await commands.send_again(ctx) == 0
        async with car(ctx, "car-1", clean=False) as one:
            done = await eventually(ctx, made.id, ended)
            assert (done.status, one.executed) == (Status.SUCCEEDED, [made.id])
        assert await stored_copies(ctx, made.id) == 1


@pytest.mark.parametrize("noticed", [False, True], ids=["half-dead", "left"])
async def test_a_live_copy_that_nobody_took_is_followed_by_a_stored_one(
    service: None, ctx: Context, noticed: bool
) -> None:
    """The connection is dead and presence has not heard of it; in one case it hears of it just afterwards."""
    await once_subscribed(ctx, "car-1")
    await said(ctx, "car-1", connected=True)
    made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=30)
    await eventually(ctx, made.id, lambda command: command.status is Status.SENT)
    assert await stored_copies(ctx, made.id) == 0
    if noticed:
        await said(ctx, "car-1", connected=False)
    await eventually(ctx, made.id, lambda command: command.paths[0].attempts == 2)
    async with asyncio.timeout(10):  # it is noted before it is sent
        while not await stored_copies(ctx, made.id):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await stored_copies(ctx, made.id) == 1
    await said(ctx, "car-1", connected=False)  # from here on, no other copy comes
    async with car(ctx, "car-1", clean=False) as one:
        done = await eventually(ctx, made.id, ended)
        assert (done.status, one.executed) == (Status.SUCCEEDED, [made.id])


async def test_killed_between_noting_a_copy_and_sending_it_the_next_worker_sends_one(ctx: Context) -> None:
    await registered(ctx, "car-1")
    async with car(ctx, "car-1") as one:
        await said(ctx, "car-1", connected=True)
        made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=30)
        async with ctx.pool.acquire() as conn:
            (lost,) = await store.take_queued(conn, Path.NEW, now=made.created_at)
        assert lost.live
        async with serving(ctx, commands.run):
            done = await eventually(ctx, made.id, ended)
        assert (done.status, one.executed) == (Status.SUCCEEDED, [made.id])
        assert await stored_copies(ctx, made.id) == 1


async def test_a_live_copy_is_not_sent_once_the_command_has_expired(ctx: Context) -> None:
    await registered(ctx, "car-1")
    await said(ctx, "car-1", connected=True)
    made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=1)
    async with ctx.pool.acquire() as conn:
        assert await store.take_queued(conn, Path.NEW, now=made.expires_at) == []


async def test_a_device_that_takes_both_copies_executes_once(service: None, ctx: Context) -> None:
    await registered(ctx, "car-1")
    one = Car(ctx, "car-1", silent=True)
    await one.connect()
    try:
        await said(ctx, "car-1", connected=True)
        made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=30)
        await until(lambda: len(one.copies) == 2 or None, what="a second copy")
        one.silent = False
        await eventually(ctx, made.id, lambda command: command.status is Status.SUCCEEDED)
        assert one.executed == [made.id]
    finally:
        one.close()


async def test_on_a_way_back_a_command_for_the_new_side_ends_by_what_the_old_one_brought(
    service: None, ctx: Context
) -> None:
    """The device obeys the old side already: what comes by the new one it does not take."""
    await registered(ctx, "car-1")
    async with car(ctx, "car-1", silent=True) as one:
        made = await commands.create_command(ctx, "car-1", "lock", expires_in_s=30)
        await until(lambda: one.copies or None, what="the copy")
        one.answer(made.id, "REJECTED", "WRONG_SIDE")
        assert (await one.mqtt.receive("response/accepted/json"))["executionId"] == made.id
        assert (await commands.get_command(ctx, made.id)).status is Status.SENT
        async with ctx.pool.acquire() as conn, conn.transaction():
            await store.add_path(conn, ["car-1"], Path.OLD, but="")  # as the device's report brings about
            await store.record_answer(conn, made.id, "old", "succeeded", {"did": "lock"}, time.time())
        found = await commands.get_command(ctx, made.id)
        assert found.status is Status.SUCCEEDED
        assert found.paths[1].detail["reasonCode"] == "WRONG_SIDE"
