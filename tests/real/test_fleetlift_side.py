"""Fleetlift as the new side: one authority a device, orders and evidence, credentials that are never kept."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from fleetlift.backend import alive, commands, registry, shadows
from fleetlift.backend.context import Context
from fleetlift.core.errors import BadInput
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import (
    PROBE_COMMAND,
    SHADOW_NAME,
    CommandsFlag,
    DevicePhase,
    DeviceReport,
    Endpoint,
    Flags,
    Orders,
    TelemetryFlag,
)
from fleetlift.sides.fleetlift import PRESENCE_ROLE, FleetliftSide, credential_of, endpoint_of, engine_key

KEY = bytes(range(32))
BOTH = Flags(telemetry=TelemetryFlag.BOTH)
CARS = [FleetDevice(id=f"car-{n}", attributes={"hardware": n}) for n in range(3)]


def order(epoch: int, flags: Flags = BOTH, migration: str = "move") -> Orders:
    return Orders(
        epoch=epoch,
        migration=migration,
        flags=flags,
        new=Endpoint(host="127.0.0.1", port=1883),
        credential=credential_of(KEY, "car-0"),
        try_within_s=5.0,
    )


@pytest.fixture
async def side(ctx: Context) -> FleetliftSide:
    side = FleetliftSide(ctx, tenant="carshare", key=KEY)
    await side.adopt(CARS, "move")
    return side


async def test_an_older_epoch_is_refused_by_the_store(ctx: Context, side: FleetliftSide) -> None:
    """Whoever comes late with an older order changes neither route nor shadow, however they race."""
    assert await side.deliver({"car-0": order(20)}) == {}
    refused = await side.deliver({"car-0": order(19, Flags()), "car-1": order(19)})
    assert list(refused) == ["car-0"]
    raced = await asyncio.gather(
        *(
            side.deliver({"car-2": order(epoch, replace(BOTH, commands=CommandsFlag.BOTH))})
            for epoch in (31, 35, 33, 34, 32)
        ),
        return_exceptions=True,
    )
    assert not [r for r in raced if isinstance(r, BaseException)]
    async with ctx.pool.acquire() as conn:
        routes = dict(map(tuple, await conn.fetch("SELECT device, epoch FROM device_route")))
    assert routes == {"car-0": 20, "car-1": 19, "car-2": 35}
    held = await shadows.named_shadows(ctx, SHADOW_NAME)
    assert {d: (s.desired or {})["epoch"] for d, s in held.items()} == routes


async def test_giving_an_order_again_is_harmless(ctx: Context, side: FleetliftSide) -> None:
    """The same order twice is accepted, makes no new version and only one probe."""
    for _ in range(3):
        assert await side.deliver({"car-0": order(20)}) == {}
    shadow = (await shadows.named_shadows(ctx, SHADOW_NAME))["car-0"]
    assert shadow.version == 1
    probes = (await commands.list_commands(ctx, "car-0")).items
    assert [(c.name, [p.path for p in c.paths]) for c in probes] == [(PROBE_COMMAND, ["new"])]


async def test_the_credential_lets_the_device_in_and_is_kept_nowhere(
    ctx: Context, side: FleetliftSide
) -> None:
    """It is derived, not stored: only its hash is in the database, and the shadow does not tell it."""
    await side.deliver({"car-0": order(20)})
    secret = side.credential("car-0")
    assert secret == credential_of(KEY, "car-0") != credential_of(KEY, "car-1")
    assert len(secret) >= 43
    async with ctx.pool.acquire() as conn:
        held = await conn.fetchval("SELECT value FROM device_credential WHERE device = 'car-0'")
        shadow = await conn.fetchval("SELECT desired::text FROM shadow WHERE device = 'car-0'")
    assert held.startswith("$random$")
    assert secret not in held + shadow
    assert "credential" not in msgspec.json.decode(shadow)


async def test_commands_go_by_the_side_that_the_order_names(ctx: Context, side: FleetliftSide) -> None:
    """Known from the first moment by the old side; then as each order says; back again with the last."""

    async def paths() -> list[tuple[str, str]]:
        made = await commands.create_command(ctx, "car-1", "lock")
        return sorted((p.path.value, p.mode.value) for p in made.paths)

    assert await paths() == [("old", "execute")]
    await side.deliver({"car-1": order(20, replace(BOTH, commands=CommandsFlag.DRY_RUN))})
    assert await paths() == [("new", "dry-run"), ("old", "execute")]
    await side.deliver({"car-1": order(21, replace(BOTH, commands=CommandsFlag.BOTH))})
    assert await paths() == [("new", "execute"), ("old", "execute")]
    await side.deliver({"car-1": order(22, replace(BOTH, commands=CommandsFlag.NEW))})
    assert await paths() == [("new", "execute")]


async def test_commands_reach_a_device_by_the_side_that_it_obeys(ctx: Context, side: FleetliftSide) -> None:
    """By both while it is not known to have changed sides, then by the one that it names; a device that went
    back by itself is reached by the old side again, and an order given meanwhile is not undone."""
    new = replace(BOTH, commands=CommandsFlag.NEW)

    async def paths() -> list[str]:
        made = await commands.create_command(ctx, "car-1", "lock")
        return sorted(p.path.value for p in made.paths)

    async def says(epoch: int, phase: DevicePhase, flags: Flags) -> None:
        await side.follow_reports({"car-1": DeviceReport(epoch=epoch, phase=phase, flags=flags)})

    await side.deliver({"car-1": order(20, new)})
    await says(20, DevicePhase.TRYING, Flags())
    assert await paths() == ["new", "old"]
    await says(20, DevicePhase.MOVED, new)
    assert await paths() == ["new"]
    await says(20, DevicePhase.WENT_BACK, Flags())
    assert await paths() == ["old"]
    await side.deliver({"car-1": order(21, new)})
    await says(20, DevicePhase.WENT_BACK, Flags())
    assert await paths() == ["new", "old"]
    await says(21, DevicePhase.MOVED, new)
    await side.deliver({"car-1": order(22, Flags())})
    assert await paths() == ["new", "old"]
    await says(22, DevicePhase.OLD, Flags())
    assert await paths() == ["old"]
    # Brought back by the journal, which this side knew nothing of.
    await side.deliver({"car-1": order(23, new)})
    await says(23, DevicePhase.MOVED, new)
    await says(99, DevicePhase.OLD, Flags())
    assert await paths() == ["old"]
    assert await side.deliver({"car-1": order(24, new)}) == {}


async def test_a_command_under_way_follows_a_device_that_has_changed_sides(
    ctx: Context, side: FleetliftSide
) -> None:
    """What was sent by the side that the device has just left goes by the other one too, once."""
    new = replace(BOTH, commands=CommandsFlag.NEW)
    await side.deliver({"car-1": order(20, new)})
    await side.follow_reports({"car-1": DeviceReport(epoch=20, phase=DevicePhase.MOVED, flags=new)})
    made = await commands.create_command(ctx, "car-1", "lock")
    assert [p.path for p in made.paths] == ["new"]
    back = DeviceReport(epoch=20, phase=DevicePhase.WENT_BACK, flags=Flags())
    await FleetliftSide(ctx, tenant="another", key=KEY).follow_reports({"car-1": back})
    assert len((await commands.get_command(ctx, made.id)).paths) == 1
    for _ in range(2):
        await side.follow_reports({"car-1": back})
    paths = (await commands.get_command(ctx, made.id)).paths
    assert [(p.path, p.mode, p.status) for p in paths] == [
        ("old", "execute", "queued"),
        ("new", "execute", "queued"),
    ]
    probes = [c for c in (await commands.list_commands(ctx, "car-1")).items if c.name == PROBE_COMMAND]
    assert [[p.path for p in c.paths] for c in probes] == [["new"]]


async def test_what_a_device_says_by_the_new_side_is_the_evidence(ctx: Context, side: FleetliftSide) -> None:
    """Its report comes from the shadow's reported state; a device never seen is not in it."""
    report = DeviceReport(epoch=20, phase=DevicePhase.MOVED, flags=BOTH)
    await shadows.update_shadow(
        ctx, "car-0", SHADOW_NAME, {"state": {"reported": msgspec.to_builtins(report)}}
    )
    await shadows.update_shadow(ctx, "car-1", SHADOW_NAME, {"state": {"reported": {"epoch": "not a report"}}})
    assert dict(await side.reports()) == {"car-0": report}
    seen = await side.observe(["car-0", "car-1", "car-2"])
    assert seen["car-0"].report_by_new == report
    assert "car-2" not in seen


async def test_the_end_of_the_log_is_told(ctx: Context, side: FleetliftSide) -> None:
    """What gates hold the readers' positions against."""
    created, before = await side.log_end()
    last = await ctx.publisher.to_log("dt/car-0/position", b"{}")
    assert await side.log_end() == (created, last)
    assert last > before


async def test_the_last_answer_to_a_command_is_told_whichever_device_gave_it(
    ctx: Context, side: FleetliftSide
) -> None:
    """The log goes on with telemetry; what the reader of answers must have come to is the last of these."""
    created, _ = await side.log_end()
    assert await side.commands_end() == (created, 0)
    for device in ("car-0", "car-1"):
        last = await ctx.publisher.to_log(f"$aws/commands/things/{device}/executions/x/response/json", b"{}")
        await ctx.publisher.to_log(f"dt/{device}/position", b"{}")
        assert await side.commands_end() == (created, last)


async def test_presence_is_lost_when_no_worker_of_its_role_answers(ctx: Context, side: FleetliftSide) -> None:
    assert "does not answer" in await side.presence_lost()
    async with alive.answering(ctx.nc, PRESENCE_ROLE):
        assert await side.presence_lost() == ""


async def test_a_device_of_another_tenant_is_left_alone(ctx: Context, side: FleetliftSide) -> None:
    """It is named, keeps its tenant and gets no route of this migration."""
    other = FleetliftSide(ctx, tenant="rental", key=KEY)
    assert await other.adopt([*CARS, FleetDevice(id="van-1")], "theirs") == ["car-0", "car-1", "car-2"]
    async with ctx.pool.acquire() as conn:
        assert await conn.fetchval("SELECT count(*) FROM device WHERE tenant = 'rental'") == 1
        assert await conn.fetchval("SELECT count(*) FROM device_route WHERE migration = 'theirs'") == 1
    async with ctx.pool.acquire() as conn:  # deleted, its data is still the first tenant's; the others go on
        await registry.delete_device(conn, "car-2")
    assert await other.adopt([CARS[2], FleetDevice(id="van-2")], "theirs") == ["car-2"]
    refused = await other.deliver({"car-0": order(20, migration="theirs")})
    assert "tenant" in refused["car-0"]
    assert "car-0" not in await shadows.named_shadows(ctx, SHADOW_NAME)


async def test_adopting_keeps_what_the_registry_knows(ctx: Context) -> None:
    """Attributes of the old side are added and renewed; the registry's own stay."""
    for hardware in (1, 2):
        side = FleetliftSide(ctx, tenant="carshare", key=KEY)
        await side.adopt([FleetDevice(id="car-9", attributes={"hardware": hardware})], "move")
        async with ctx.pool.acquire() as conn:
            await conn.execute("UPDATE device SET attributes = attributes || '{\"garage\": 4}'")
    async with ctx.pool.acquire() as conn:
        text = await conn.fetchval("SELECT attributes::text FROM device WHERE id = 'car-9'")
    assert msgspec.json.decode(text) == {"hardware": 2, "garage": 4}


def test_the_engine_s_key_is_drawn_once_and_private(tmp_path: Path) -> None:
    assert engine_key(tmp_path) == engine_key(tmp_path)
    assert (tmp_path / "engine.key").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["engine.key"]
    (tmp_path / "engine.key").write_text("short")
    with pytest.raises(BadInput, match="backup"):
        engine_key(tmp_path)


def test_where_devices_are_sent_to() -> None:
    """`default` is our own listener, TLS before plain; another address may be named."""
    plain = endpoint_of("default", mqtt="0.0.0.0:1883", mqtts="", ca_pem=None)
    assert plain == Endpoint(host="127.0.0.1", port=1883)
    tls = endpoint_of("default", mqtt="127.0.0.1:1883", mqtts="127.0.0.1:8883", ca_pem="PEM")
    assert tls == Endpoint(host="127.0.0.1", port=8883, tls=True, ca_pem="PEM")
    named = endpoint_of("mqtts://iot.example.com:8883", mqtt="", mqtts="", ca_pem=None)
    assert named == Endpoint(host="iot.example.com", port=8883, tls=True)
    for wrong in ("iot.example.com", "http://x:1", "mqtt://x"):
        with pytest.raises(BadInput):
            endpoint_of(wrong, mqtt="", mqtts="", ca_pem=None)
