"""From a breach to the moment when the last of a wave's 1,000 devices is back on the old side.

A real legacy server, a whole backend and 1,000 device agents; one wave moves the telemetry of all of them to
the new side; then a gate is breached for good, and the controller sends the wave back by itself. Time counts
from the breach in the audit log until the last agent itself has applied the order: in phase `old`, by flags
that name the old side alone, with its link there up.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import asyncpg
import httpx
import msgspec

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.ingest import too_busy
from fleetlift.core.orders import Flags
from fleetlift.device import messages
from fleetlift.device.fleet import DeviceSpec, Fleet
from fleetlift.device.shell import DeviceShell
from fleetlift.sides.legacy.server import DeviceSeed, LegacyServer
from fleetlift.testing import RunningBackend, running_backend

DEVICES = 1000
MESSAGES_EVERY_S = 5.0  # of each device
MOVED_WITHIN_S = 240.0
BACK_WITHIN_S = 120.0

FIGURES = (
    Figure(
        name="revert_1000_s",
        unit="s",
        better="lower",
        target=10.0,
        means="from the breach in the audit log until the last of 1,000 devices is back on the old side",
    ),
)

PLAN = """
migration: thousand
fleet: {{tenant: bench}}
from: {{legacy: "{url}", key_file: "{key_file}"}}
to: {{fleetlift: default}}
lever: flag
try_within: 60s
new_lost_limit: 60s
settle: 4m
steps:
  - move: telemetry
    stages: [new]
    waves: [100%]
    bake: 1h
    gates:
      - {{sql: "SELECT count(*) FROM dead_letter", must: "<= 0", name: dead letters}}
"""


def is_back(shell: DeviceShell) -> bool:
    """By the device's own truth: the newest order applied, nothing by the new side, the old link up."""
    agent = shell.agent
    return (
        agent.flags == Flags()
        and agent.phase.value == "old"
        and agent.link(messages.Path.OLD) is messages.LinkState.UP
    )


async def run(bench: Bench) -> list[Measured]:
    names = [f"car-{n:04}" for n in range(100 if bench.quick else DEVICES)]
    keys = {name: f"not-a-real-key-of-{name}" for name in names}
    async with contextlib.AsyncExitStack() as stack:
        legacy = await stack.enter_async_context(LegacyServer(bench.directory / "legacy"))
        await legacy.register([DeviceSeed(name, key, {}) for name, key in keys.items()])
        backend = await stack.enter_async_context(running_backend(bench.directory / "backend"))
        specs = [DeviceSpec(name, key) for name, key in keys.items()]
        fleet = Fleet(specs, old=legacy.address, state_dir=bench.directory / "devices")
        bench.progress("devices sign in to the old side")
        await fleet.start()
        stack.push_async_callback(fleet.stop)
        driving = asyncio.create_task(_drive(fleet))
        stack.callback(driving.cancel)
        key_file = bench.directory / "legacy" / "owner.key"
        api = await stack.enter_async_context(_api(backend))
        started = await api.post("/migrations", json={"plan": PLAN.format(url=legacy.url, key_file=key_file)})
        if started.is_error:
            raise BenchFailed(f"the migration did not start: {started.text}")
        moved_s = await _moved(bench, api, len(names))
        roots = {"serve": backend.pid, "devices and old side": os.getpid()}
        async with bench.profiled("the way back", roots) as profile:
            measured = await _back(bench, api, backend, fleet, moved_s)
    return [msgspec.structs.replace(measured, invalid=too_busy(profile))]


def _api(backend: RunningBackend) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{backend.url}/api/v1", headers={"authorization": f"Bearer {backend.token}"}, timeout=30
    )


async def _drive(fleet: Fleet) -> None:
    """Measurements of every device, spread evenly over time."""
    number, names = 0, list(fleet.shells)
    while True:
        began = time.monotonic()
        for at, name in enumerate(names):
            number += 1
            fleet.shells[name].produce("position", b'{"lat":47.1,"n":%d}' % number)
            if (early_s := began + at * MESSAGES_EVERY_S / len(names) - time.monotonic()) > 0.005:
                await asyncio.sleep(early_s)
        await asyncio.sleep(0.005)


async def _moved(bench: Bench, api: httpx.AsyncClient, devices: int) -> float:
    began = time.monotonic()
    while True:
        status = (await api.get("/migrations/thousand")).json()
        if status["phase"] != "running" or time.monotonic() > began + MOVED_WITHIN_S:
            raise BenchFailed(f"the wave has not moved: {status['phase']}, {status['moving']} on their way")
        if status["wave_phase"] == "baking" and not status["moving"]:
            if status["stragglers_total"]:
                raise BenchFailed(f"{status['stragglers_total']} devices have not moved")
            return time.monotonic() - began
        bench.progress("the wave moves", devices - status["moving"], devices, "devices")
        await asyncio.sleep(0.2)


async def _back(
    bench: Bench, api: httpx.AsyncClient, backend: RunningBackend, fleet: Fleet, moved_s: float
) -> Measured:
    connection = await asyncpg.connect(backend.settings.database_url)
    try:
        await connection.execute(
            "INSERT INTO dead_letter (received_at, path, topic, device, reason, payload, payload_bytes) "
            "VALUES (now(), 'mqtt', 'bench', '', 'the breach of the bench', '', 0)"
        )
    finally:
        await connection.close()
    asked = time.time()
    back: dict[str, float] = {}
    while len(back) < len(fleet.shells):
        now = time.time()
        if now > asked + BACK_WITHIN_S:
            raise BenchFailed(
                f"{len(back)} of {len(fleet.shells)} devices were back in {BACK_WITHIN_S:.0f} s"
            )
        back.update({n: now for n, shell in fleet.shells.items() if n not in back and is_back(shell)})
        bench.progress("the wave goes back", len(back), len(fleet.shells), "devices")
        await asyncio.sleep(0.02)
    breach = await _breach(api)
    times = sorted(at - breach for at in back.values())
    return Measured(
        name="revert_1000_s",
        value=times[-1],
        notes=(
            f"{len(times):,} devices: the first after {times[0]:.2f} s, half of them after "
            f"{times[len(times) // 2]:.2f} s, the last after {times[-1]:.2f} s",
            f"the breach was seen {breach - asked:.2f} s after its cause; the wave moved in {moved_s:.0f} s",
        ),
    )


async def _breach(api: httpx.AsyncClient) -> float:
    """When the audit log says that the gate was breached, Unix seconds."""
    events: list[Mapping[str, Any]] = (await api.get("/migrations/thousand/events?limit=1000")).json()[
        "items"
    ]
    for event in events:
        if event["kind"] == "gate_breached":
            return datetime.fromisoformat(event["at"]).timestamp()
    raise BenchFailed("no breach is in the audit log")
