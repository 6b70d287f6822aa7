"""Shadows over real MQTT, a real log and a real database."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from mqtt_device import PASSWORD, Device, letting_in, registered, serving, until

from fleetlift.backend import shadows
from fleetlift.backend.context import Context, open_context
from fleetlift.config import Settings
from fleetlift.core.errors import BadInput, Conflict, NotFound
from fleetlift.core.shadow import ShadowKey
from fleetlift.store import shadows as store


@pytest.fixture
async def service(ctx: Context) -> AsyncIterator[None]:
    async with serving(ctx, shadows.run):
        yield


@pytest.fixture(autouse=True)
async def signing_in(ctx: Context) -> AsyncIterator[None]:
    """Devices are let in by the service that lets devices in."""
    await registered(ctx, "lamp", "car-1")
    async with letting_in(ctx):
        yield


async def logged(ctx: Context, device: str, body: object) -> None:
    """A shadow update of a device as the log holds it after its PUBACK."""
    payload = msgspec.json.encode(body)
    await ctx.publisher.to_log(f"$aws/things/{device}/shadow/update", payload, {"Nmqtt-Pub": "1"})


@contextlib.asynccontextmanager
async def device(settings: Settings, name: str, *, clean: bool = True) -> AsyncIterator[Device]:
    made = await Device(settings, name, clean=clean).connect()
    try:
        yield made
    finally:
        made.close()


async def test_a_device_updates_reads_and_deletes_its_shadow(service: None, settings: Settings) -> None:
    async with device(settings, "lamp") as lamp:
        base = "$aws/things/lamp/shadow"
        await lamp.subscribe(f"{base}/get/+", f"{base}/update/+", f"{base}/delete/+")
        await lamp.publish(f"{base}/get", b"")
        assert await lamp.receive("get/rejected") == {
            "code": 404,
            "message": "No shadow exists with name: 'lamp'",
        }
        await lamp.publish(f"{base}/update", {"state": {"desired": {"led": "off"}}, "clientToken": "t"})
        accepted = await lamp.receive("update/accepted")
        assert (accepted["version"], accepted["clientToken"]) == (1, "t")
        assert (await lamp.receive("update/delta"))["state"] == {"led": "off"}
        assert (await lamp.receive("update/documents"))["current"]["version"] == 1
        await lamp.publish(f"{base}/update", {"state": {"reported": {"led": "off"}}})
        assert (await lamp.receive("update/accepted", count=2))["version"] == 2
        await lamp.publish(f"{base}/update", {"state": {"reported": 3}})
        assert (await lamp.receive("update/rejected"))["message"] == "Reported node must be an object"
        await lamp.publish(f"{base}/get", b"")
        assert (await lamp.receive("get/accepted"))["state"] == {
            "desired": {"led": "off"},
            "reported": {"led": "off"},
        }
        await lamp.publish(f"{base}/delete", b"")
        assert (await lamp.receive("delete/accepted"))["version"] == 2
        assert len(lamp.bodies("update/delta")) == 1


async def test_requests_by_qos_0_are_answered_too(service: None, settings: Settings) -> None:
    async with device(settings, "lamp") as lamp:
        base = "$aws/things/lamp/shadow/name/fleetlift"
        await lamp.subscribe(f"{base}/update/accepted", qos=0)
        await lamp.publish(f"{base}/update", {"state": {"reported": {"a": 1}}}, qos=0)
        assert (await lamp.receive("update/accepted"))["version"] == 1


async def test_named_and_classic_shadows_are_apart(service: None, ctx: Context, settings: Settings) -> None:
    async with device(settings, "lamp") as lamp:
        for name in ("", "/name/config", "/name/$net:1"):
            await lamp.subscribe(f"$aws/things/lamp/shadow{name}/update/accepted")
            await lamp.publish(f"$aws/things/lamp/shadow{name}/update", {"state": {"reported": {"n": name}}})
            await lamp.receive(f"shadow{name}/update/accepted")
    assert (await shadows.get_shadow(ctx, "lamp", "config")).state == {"reported": {"n": "/name/config"}}
    assert (await shadows.get_shadow(ctx, "lamp")).state == {"reported": {"n": ""}}
    assert list((await shadows.list_named(ctx, "lamp")).items) == ["$net:1", "config"]
    first = await shadows.list_named(ctx, "lamp", limit=1)
    assert list((await shadows.list_named(ctx, "lamp", limit=1, after=first.next)).items) == ["config"]


async def test_a_caller_s_update_reaches_the_device(service: None, ctx: Context, settings: Settings) -> None:
    async with device(settings, "lamp") as lamp:
        await lamp.subscribe("$aws/things/lamp/shadow/update/delta")
        accepted = await shadows.update_shadow(ctx, "lamp", "", {"state": {"desired": {"led": "on"}}})
        assert accepted.version == 1
        assert (await lamp.receive("update/delta"))["state"] == {"led": "on"}
    with pytest.raises(Conflict, match="Version conflict"):
        await shadows.update_shadow(ctx, "lamp", "", {"state": {}, "version": 7})
    with pytest.raises(BadInput, match="Missing required node: state"):
        await shadows.update_shadow(ctx, "lamp", "", {})
    with pytest.raises(BadInput, match="maximum size") as caught:
        await shadows.update_shadow(ctx, "lamp", "", {"state": {"desired": {"a": "x" * 70_000}}})
    assert caught.value.status == 413
    assert (await shadows.delete_shadow(ctx, "lamp")).version == 1
    with pytest.raises(NotFound):
        await shadows.get_shadow(ctx, "lamp")
    with pytest.raises(NotFound):
        await shadows.delete_shadow(ctx, "lamp")
    with pytest.raises(BadInput, match="shadow name"):
        await shadows.get_shadow(ctx, "lamp", "no/slash")


async def test_the_size_limit_is_a_setting(ctx: Context, settings: Settings) -> None:
    """AWS's own 8 KB can be asked for, by whoever tests firmware against it."""
    async with open_context(
        msgspec.structs.replace(settings, shadow_state_bytes=8192), name="strict"
    ) as strict:
        with pytest.raises(BadInput, match="maximum size"):
            await shadows.update_shadow(strict, "lamp", "", {"state": {"desired": {"a": "x" * 9000}}})
    await shadows.update_shadow(ctx, "lamp", "", {"state": {"desired": {"a": "x" * 9000}}})


async def test_a_desired_change_waits_for_a_device_that_is_away(ctx: Context, settings: Settings) -> None:
    """A persistent session is given the delta when it comes back, and a get shows it to any device."""
    async with serving(ctx, shadows.run), device(settings, "lamp", clean=False) as lamp:
        await lamp.subscribe("$aws/things/lamp/shadow/update/delta")
    await shadows.update_shadow(ctx, "lamp", "", {"state": {"desired": {"led": "on"}}})
    async with serving(ctx, shadows.run), device(settings, "lamp", clean=False) as lamp:
        assert (await lamp.receive("update/delta"))["state"] == {"led": "on"}


async def test_updates_sent_while_the_service_was_down_are_applied_once(
    ctx: Context, settings: Settings
) -> None:
    """What had its PUBACK is in the log: applied in order when the service is back, and never again."""
    base = "$aws/things/lamp/shadow"
    async with device(settings, "lamp") as lamp:
        for n in range(20):
            await lamp.publish(f"{base}/update", {"state": {"reported": {"n": n}}})
        for _ in range(3):
            async with serving(ctx, shadows.run):
                await lamp.subscribe(f"{base}/get/accepted")
                before = len(lamp.bodies("get/accepted"))
                await lamp.publish(f"{base}/get", b"")
                seen = await lamp.receive("get/accepted", count=before + 1)
                assert (seen["version"], seen["state"]) == (20, {"reported": {"n": 19}})


async def test_a_service_cancelled_again_and_again_applies_every_update_exactly_once(
    ctx: Context,
) -> None:
    """The version counts accepted updates: after any number of interruptions it equals what was sent."""
    names = [f"d{n}" for n in range(5)]

    async def send() -> None:
        for n in range(60):
            await asyncio.gather(*(logged(ctx, name, {"state": {"reported": {"n": n}}}) for name in names))

    sending = asyncio.create_task(send())
    for _ in range(8):
        async with serving(ctx, shadows.run):
            await asyncio.sleep(0.1)
    await sending
    async with serving(ctx, shadows.run):
        await _all_versions(ctx, names, 60)


async def _all_versions(ctx: Context, names: list[str], version: int) -> None:
    keys = [ShadowKey(name) for name in names]
    held: dict[ShadowKey, Any] = {}
    for _ in range(500):
        async with ctx.pool.acquire() as conn:
            held = await store.load(conn, keys)
        if len(held) == len(keys) and all(shadow.version >= version for shadow in held.values()):
            break
        await asyncio.sleep(0.02)
    assert {shadow.version for shadow in held.values()} == {version}


async def test_writers_in_several_processes_lose_no_update(ctx: Context, settings: Settings) -> None:
    """The log's reader, the API and orders write the same shadows at once; each update counts."""
    names = [f"d{n}" for n in range(4)]
    async with serving(ctx, shadows.run), open_context(settings, name="other") as other:

        async def send() -> None:
            for n in range(30):
                await asyncio.gather(
                    *(logged(ctx, name, {"state": {"reported": {"n": n}}}) for name in names)
                )

        async def call(by: Context, key: str) -> None:
            for n in range(30):
                for name in names:
                    await shadows.update_shadow(by, name, "", {"state": {"desired": {key: n}}})

        async def orders() -> None:
            for n in range(30):
                assert not await shadows.set_desired_many(
                    other, {name: {"order": n} for name in names}, name=""
                )

        await asyncio.gather(send(), call(ctx, "a"), call(other, "b"), orders())
        await _all_versions(ctx, names, 120)


async def test_orders_replace_desired_as_a_whole_and_repeating_changes_no_version(
    service: None, ctx: Context, settings: Settings
) -> None:
    async with device(settings, "car-1") as car:
        base = "$aws/things/car-1/shadow/name/fleetlift/update"
        await car.subscribe(f"{base}/delta")
        await shadows.set_desired_many(ctx, {"car-1": {"epoch": 1, "credential": "s", "flags": {"a": 1}}})
        await shadows.set_desired_many(ctx, {"car-1": {"epoch": 2, "flags": {"b": 2}}})
        assert (await car.receive("delta", count=2))["state"] == {"epoch": 2, "flags": {"b": 2}}
        await shadows.set_desired_many(ctx, {"car-1": {"epoch": 2, "flags": {"b": 2}}})
        again = await car.receive("delta", count=3)
        assert (again["version"], again["state"]) == (2, {"epoch": 2, "flags": {"b": 2}})
        refusals = await shadows.set_desired_many(
            ctx,
            {"car-1": {"epoch": 1}, "car-2": {"epoch": 1}},
            refuse=lambda name, held: "older epoch" if held and held["epoch"] == 2 else None,
        )
        assert refusals == {"car-1": "older epoch"}
    held = await shadows.named_shadows(ctx)
    assert {name: shadow.desired for name, shadow in held.items()} == {
        "car-1": {"epoch": 2, "flags": {"b": 2}},
        "car-2": {"epoch": 1},
    }


async def test_one_request_that_cannot_be_stored_is_set_aside_and_the_others_are_kept(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = store.save

    async def refusing(conn: Any, changed: Any) -> None:
        if any(key.device == "bad" for key in changed):
            raise ValueError("this cannot be stored")
        await save(conn, changed)

    monkeypatch.setattr(store, "save", refusing)
    for name in ("d1", "bad", "d2", "d3"):
        await logged(ctx, name, {"state": {"reported": {"a": 1}}})
    async with serving(ctx, shadows.run):
        await _all_versions(ctx, ["d1", "d2", "d3"], 1)
    async with ctx.pool.acquire() as conn:
        assert await conn.fetchval("SELECT topic FROM dead_letter") == "$aws/things/bad/shadow/update"


async def test_one_batch_answers_each_request_as_if_it_had_come_alone(
    ctx: Context, settings: Settings
) -> None:
    """The same shadow several times, conflicts and bad requests among good ones, of two devices at once."""
    async with device(settings, "lamp") as lamp, device(settings, "car-1") as car:
        for one, name in ((lamp, "lamp"), (car, "car-1")):
            await one.subscribe(f"$aws/things/{name}/shadow/update/+", qos=0)
        requests: list[object] = [
            {"state": {"reported": {"n": 1}}, "clientToken": "first"},
            {"state": {"desired": {"n": 2}}, "version": 1, "clientToken": "second"},
            {"state": {"reported": {"n": 9}}, "version": 1, "clientToken": "stale"},
            b"no JSON",
            {"state": {"reported": 3}, "clientToken": "bad"},
            {"state": {"reported": {"n": 2}}, "version": 2, "clientToken": "third"},
            {"state": None, "clientToken": "clear"},
            {"state": {"reported": {"m": 1}}, "version": 4, "clientToken": "last"},
        ]
        for request in requests:  # both wait in the log before anybody works them off
            for one, name in ((lamp, "lamp"), (car, "car-1")):
                await one.publish(f"$aws/things/{name}/shadow/update", request)
        async with serving(ctx, shadows.run):
            for one in (lamp, car):
                await one.receive("update/documents", count=5)
                said = [
                    (body["clientToken"], body["version"])
                    for topic, body in one.received
                    if topic.endswith("update/accepted")
                ]
                assert said == [("first", 1), ("second", 2), ("third", 3), ("clear", 4), ("last", 5)]
                refused = [(body["code"], body.get("clientToken")) for body in one.bodies("update/rejected")]
                assert refused == [(409, "stale"), (400, None), (400, "bad")]
                (delta,) = one.bodies("update/delta")
                assert (delta["clientToken"], delta["state"], delta["version"]) == ("second", {"n": 2}, 2)
                documents = one.bodies("update/documents")
                assert "previous" not in documents[0]
                assert [d["current"]["version"] for d in documents] == [1, 2, 3, 4, 5]
                assert [d["previous"]["version"] for d in documents[1:]] == [1, 2, 3, 4]
                assert documents[1]["current"]["state"] == {"desired": {"n": 2}, "reported": {"n": 1}}
                assert documents[4]["current"]["state"] == {"reported": {"m": 1}}
    held = await shadows.get_shadow(ctx, "lamp")
    assert (held.version, held.state) == (5, {"reported": {"m": 1}})


async def test_the_service_ends_when_told_to_stop(ctx: Context) -> None:
    task = asyncio.create_task(shadows.run(ctx))
    await asyncio.sleep(0.2)
    ctx.stop.set()
    await asyncio.wait_for(task, 5.0)


async def test_the_aws_sdk_s_own_shadow_client(service: None, ctx: Context, settings: Settings) -> None:
    """get (404), update and its delta with `awsiot.iotshadow.IotShadowClient`, signed in as a device."""
    from awscrt import mqtt
    from awscrt.exceptions import AwsCrtError
    from awsiot import iotshadow

    host, port = settings.mqtt.rsplit(":", 1)
    connection = mqtt.Connection(
        client=mqtt.Client(),
        host_name=host,
        port=int(port),
        client_id="lamp",
        clean_session=True,
        username="lamp",
        password=PASSWORD,
    )

    async def done(future: Any) -> Any:
        return await asyncio.wait_for(asyncio.wrap_future(future), 10.0)

    async with asyncio.timeout(30):
        while True:  # refused until who checks passwords has started
            with contextlib.suppress(AwsCrtError):
                await done(connection.connect())
                break
            await asyncio.sleep(0.2)
        client = iotshadow.IotShadowClient(connection)
        errors: list[Any] = []
        accepted: list[Any] = []
        deltas: list[Any] = []
        qos = mqtt.QoS.AT_LEAST_ONCE
        for subscribed, _ in (
            client.subscribe_to_get_shadow_rejected(
                iotshadow.GetShadowSubscriptionRequest(thing_name="lamp"), qos, errors.append
            ),
            client.subscribe_to_update_shadow_accepted(
                iotshadow.UpdateShadowSubscriptionRequest(thing_name="lamp"), qos, accepted.append
            ),
            client.subscribe_to_shadow_delta_updated_events(
                iotshadow.ShadowDeltaUpdatedSubscriptionRequest(thing_name="lamp"), qos, deltas.append
            ),
        ):
            await done(subscribed)
        await done(
            client.publish_get_shadow(iotshadow.GetShadowRequest(thing_name="lamp", client_token="g"), qos)
        )
        await until(lambda: errors or None, what="the SDK's rejected")
        assert (errors[0].code, errors[0].message) == (404, "No shadow exists with name: 'lamp'")
        assert errors[0].client_token == "g"
        await done(
            client.publish_update_shadow(
                iotshadow.UpdateShadowRequest(
                    thing_name="lamp",
                    state=iotshadow.ShadowState(desired={"led": "on"}, reported={"led": "off"}),
                    client_token="u",
                ),
                qos,
            )
        )
        await until(lambda: (accepted and deltas) or None, what="the SDK's accepted and delta")
        assert accepted[0].version == 1 and accepted[0].state.desired == {"led": "on"}
        assert deltas[0].state == {"led": "on"}
        await done(connection.disconnect())


async def test_updates_that_waited_are_worked_off_in_few_transactions(ctx: Context) -> None:
    """Two thousand updates of five hundred devices: many in a transaction."""
    body = {"state": {"reported": {"speed": 50}}}
    await asyncio.gather(*(logged(ctx, f"d{n % 500}", body) for n in range(2000)))
    async with serving(ctx, shadows.run):
        await _all_versions(ctx, [f"d{n}" for n in range(500)], 4)
    async with ctx.pool.acquire() as conn:
        transactions = await conn.fetchval("SELECT count(DISTINCT xmin::text) FROM shadow")
    assert transactions <= 50
