"""Acknowledged messages a second by one core of the load generator, against one core of Locust's MQTT user.

The same Mosquitto on a core of its own, the same number of devices, the same size of message, QoS 1, in one
run. Locust's task is one message, as Locust counts; it gets the best of its settings, and need not keep any
rate: it sends as fast as answers come. Ours must be on time at the rate that counts, with every message
acknowledged.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.ingest import too_busy
from benchmarks.ingest_vs_handwritten import find_mosquitto, install_mosquitto, listening
from benchmarks.ladder import highest
from benchmarks.locust_mqtt import Did, Task
from benchmarks.processes import Profile, cpu_profile
from fleetlift.core.load_result import LoadResult
from fleetlift.core.units import format_quantity
from fleetlift.load.run import Progress, Target, run_load
from fleetlift.load.scenario import parse_scenario
from fleetlift.testing import free_port

DEVICES = 100
BYTES = 170
RATES = tuple(1000.0 * n for n in (5, 7, 10, 14, 17, 20, 24, 28, 34, 40, 48, 56, 60, 64, 68, 72, 76, 80))
BEGIN_AT = 56_000.0
P99_MAX_S = 0.25
SETTINGS = ((1, False), (1, True))  # Locust's: messages of a task, its way of waiting for sockets
TEN_AT_ONCE = (10, False)  # shown beside it: tasks of ten messages, which leave in one piece

FIGURES = (
    Figure(
        name="load_vs_locust",
        unit="×",
        better="higher",
        target=10.0,
        means="MQTT QoS 1 messages acknowledged a second by one core of fleetlift load, against Locust",
        limit="Locust itself, which is 1 ×",
    ),
)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of ours."""

    result: LoadResult
    profile: Profile

    @property
    def problem(self) -> str:
        result = self.result
        if result.invalid:
            return "; ".join(result.invalid)
        if result.errors:
            return f"{result.errors} messages were not acknowledged"
        if result.latency.p99_s > P99_MAX_S:
            return f"p99 {result.latency.p99_s:.2f} s"
        return ""


@contextlib.asynccontextmanager
async def broker(directory: Path, core: int) -> AsyncIterator[tuple[int, int]]:
    """(port, pid) of a Mosquitto that keeps nothing and runs on `core`."""
    port = free_port()
    configuration = directory / "mosquitto.conf"
    configuration.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nlog_type error\n"
        + ("user root\n" if os.geteuid() == 0 else "")
    )
    process = await asyncio.create_subprocess_exec(
        *(find_mosquitto(), "-c", str(configuration)), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        os.sched_setaffinity(process.pid, {core})
        await listening(port)
        yield port, process.pid
    finally:
        process.kill()
        await process.wait()


async def locust(port: int, core: int, setting: tuple[int, bool], seconds: float) -> tuple[Did, int]:
    """One stretch of Locust on `core`."""
    window, selectors = setting
    given = Task(
        host="127.0.0.1",
        port=port,
        users=DEVICES,
        window=window,
        seconds=seconds,
        body="x" * BYTES,
        selectors=selectors,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.locust_mqtt"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )
    os.sched_setaffinity(process.pid, {core})
    try:
        async with asyncio.timeout(seconds + 60.0):
            text, _ = await process.communicate(msgspec.json.encode(given) + b"\n")
    except TimeoutError:
        process.kill()
        await process.wait()
        raise BenchFailed("Locust did not come to an end") from None
    if not text.strip():
        raise BenchFailed(f"Locust ended without a result (exit status {process.returncode})")
    return msgspec.json.decode(text, type=Did), process.pid


async def ours(bench: Bench, port: int, pid: int, core: int, rate: float, seconds: float) -> Trial:
    """One stretch of the generator, one process on `core`."""
    scenario = parse_scenario(
        f"""
scenario: bench-locust
devices: {DEVICES}
for: {seconds:.0f}s
rate: {rate:.0f}/s
classes:
  - class: device
    share: 100%
    topics: dt/{{device}}/status
    size: {BYTES}
    background: 1/s
"""
    )
    what = f"ours, {rate:,.0f} msg/s for {seconds:.0f} s"

    def progress(seen: Progress) -> None:
        bench.progress(what, seen.accepted, rate * seconds, "msg")

    roots = {"mosquitto": pid, "generator": 0, "bench": os.getpid()}  # the first name counts

    def pin(pids: list[int]) -> None:
        os.sched_setaffinity(pids[0], {core})
        roots["generator"] = pids[0]

    target = Target(url=f"mqtt://127.0.0.1:{port}")
    async with cpu_profile(what, roots) as profile:
        result = await run_load(scenario, target, processes=1, progress=progress, on_start=pin)
    return Trial(result=result, profile=profile)


async def run(bench: Bench) -> list[Measured]:
    await install_mosquitto(bench)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BenchFailed("two cores are needed: one for the broker, one for the generator")
    broker_core, core = cores[:2]
    async with broker(bench.directory, broker_core) as (port, pid):
        tried: dict[tuple[int, bool], float] = {}
        for setting in SETTINGS:
            bench.progress(f"Locust{', selectors' if setting[1] else ''}")
            tried[setting] = (await locust(port, core, setting, bench.seconds(5.0, 2.0)))[0].rate_s
        ten, _ = await locust(port, core, TEN_AT_ONCE, bench.seconds(5.0, 2.0))
        best = max(tried, key=lambda setting: tried[setting])
        bench.progress("Locust, with the best of its settings")
        seconds = bench.seconds(20.0, 5.0)
        async with cpu_profile("Locust", {"mosquitto": pid, "bench": os.getpid()}) as profile:
            theirs, _ = await locust(port, core, best, seconds)
        bench.profiles.append(profile)

        async def trial(rate: float, seconds: float) -> Trial:
            return await ours(bench, port, pid, core, rate, seconds)

        _, proof, all_tried = await highest(
            RATES, BEGIN_AT, trial, short_s=bench.seconds(5.0, 2.0), long_s=seconds
        )
        bench.profiles.append(proof.profile)
    result = proof.result
    invalid = proof.problem or too_busy(proof.profile) or too_busy(profile)
    peer_s = max(theirs.rate_s, *tried.values())
    steps = ", ".join(f"{r:,.0f}{f' ({t.problem})' if t.problem else ''}" for r, t in all_tried)
    return [
        Measured(
            name="load_vs_locust",
            value=result.rate_s / peer_s,
            limit=1.0,
            invalid=invalid,
            notes=(
                f"ours {result.rate_s:,.0f} msg/s ({100 * max(result.cpu):.0f} % of its core; PUBACK p99 "
                f"{format_quantity(result.latency.p99_s, 's')}, late p99 "
                f"{format_quantity(result.late.p99_s, 's')}), Locust {peer_s:,.0f} msg/s "
                f"({100 * theirs.cpu:.0f} % of its core; p99 {theirs.p99_s:.2f} s); "
                f"in tasks of ten messages Locust makes {ten.rate_s:,.0f} msg/s",
                f"{DEVICES} connections each, {BYTES} bytes, Mosquitto on the other core; ours at {steps}",
            ),
        )
    ]
