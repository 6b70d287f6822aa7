"""The faults a soak strikes with, as a table: how each strikes, and how it heals where nothing heals it."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import NamedTuple

import psutil

from fleetlift.core.errors import Unavailable
from fleetlift.load.fleet import READY
from fleetlift.load.parts import Part
from fleetlift.load.world import START_WITHIN_S, World
from fleetlift.migrate.runner import STEPS

ENGINES = ("nats", "postgres")
WORKERS = ("telemetry", "state", "auth", "api", "controller")
HANG_S = (1.0, 8.0)
AWAY_S = (0.0, 3.0)  # how long what we start again ourselves stays away
STEP_WITHIN_S = 90.0  # until a running migration comes to a named step
PID_WITHIN_S = 60.0

Strike = Callable[[World, Random], Awaitable[str]]


class Fault(NamedTuple):
    """`strike` does it, heals what would not heal by itself, and says what it did."""

    strike: Strike
    group: str  # what `--only` may name beside the fault itself


async def _pid(world: World, name: str) -> int:
    deadline = time.monotonic() + PID_WITHIN_S
    while (pid := world.pid(name)) is None:
        if time.monotonic() > deadline:
            raise Unavailable(f"{name} does not run, and nobody starts it again")
        await asyncio.sleep(0.05)
    return pid


def _killed(name: str) -> Strike:
    """SIGKILL; the backend's parent starts it again."""

    async def strike(world: World, chance: Random) -> str:
        pid = await _pid(world, name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"kill -9 {name} ({pid})"

    return strike


async def _one_backend_of_postgres(world: World, chance: Random) -> str:
    """SIGKILL of one server process: PostgreSQL throws out all connections and recovers by itself."""
    pid = await _pid(world, "postgres")
    try:
        chosen = chance.choice(sorted(psutil.Process(pid).children(), key=lambda child: child.pid))
        chosen.kill()
    except (psutil.NoSuchProcess, IndexError):
        return "postgres was gone already"
    return f"kill -9 a process of postgres ({chosen.pid})"


def _ended(part: Callable[[World], Part], ready: str) -> Strike:
    """SIGKILL of a process of ours, which is started again after a while."""

    async def strike(world: World, chance: Random) -> str:
        struck, away_s = part(world), chance.uniform(*AWAY_S)
        pid = struck.pid
        struck.kill()
        await asyncio.sleep(away_s)
        if struck.pid is None:
            struck.start()
        await struck.until_printed(ready, within_s=START_WITHIN_S)
        return f"kill -9 {struck.name} ({pid}), started again after {away_s:.1f} s"

    return strike


def _hung(name: str) -> Strike:
    """SIGSTOP, and SIGCONT after some seconds: slow disk, full machine, a debugger."""

    async def strike(world: World, chance: Random) -> str:
        own = {"legacy": world.legacy, "device": world.fleet}.get(name)
        pid = (own.pid or 0) if own is not None else await _pid(world, name)
        for_s = chance.uniform(*HANG_S)
        try:
            halted = psutil.Process(pid)
            halted.suspend()
        except psutil.NoSuchProcess:  # another strike of the same moment was quicker
            return f"{name} was gone already"
        try:
            await asyncio.sleep(for_s)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                halted.resume()
        return f"halted {name} ({pid}) for {for_s:.1f} s"

    return strike


def _stuck(name: str) -> Strike:
    """SIGSTOP and no SIGCONT: the backend's parent must notice that it hangs."""

    async def strike(world: World, chance: Random) -> str:
        pid = await _pid(world, name)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).suspend()
        deadline = time.monotonic() + PID_WITHIN_S
        while world.pid(name) in (pid, None):
            if time.monotonic() > deadline:
                psutil.Process(pid).resume()
                raise Unavailable(f"{name} hung for {PID_WITHIN_S:.0f} s and nobody started it again")
            await asyncio.sleep(0.1)
        return f"halted {name} ({pid}) for good"

    return strike


def _at_step(step: str) -> Strike:
    """The controller kills itself when it next comes to this step of its round."""

    async def strike(world: World, chance: Random) -> str:
        world.killed_at.write_text("".join(f"{other}\n" for other in STEPS if other != step))
        with contextlib.suppress(ProcessLookupError):
            os.kill(await _pid(world, "controller"), signal.SIGKILL)  # its successor reads the file
        deadline = time.monotonic() + STEP_WITHIN_S
        while step not in world.killed_at.read_text().split():
            if time.monotonic() > deadline:
                world.killed_at.write_text("\n".join(STEPS) + "\n")
                return f"the controller did not come to step {step} within {STEP_WITHIN_S:.0f} s"
            await asyncio.sleep(0.1)
        return f"killed the controller at step {step}"

    return strike


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        **{name: Fault(_killed(name), "kill") for name in (*ENGINES, *WORKERS)},
        "postgres-process": Fault(_one_backend_of_postgres, "kill"),
        "serve": Fault(_ended(lambda world: world.backend, "ready"), "kill"),
        "legacy": Fault(_ended(lambda world: world.legacy, "ready"), "kill"),
        "device": Fault(_ended(lambda world: world.fleet, READY), "kill"),
        **{f"controller@{step}": Fault(_at_step(step), "step") for step in STEPS},
        **{f"hang-{name}": Fault(_hung(name), "hang") for name in (*ENGINES, *WORKERS, "legacy", "device")},
        **{f"stuck-{name}": Fault(_stuck(name), "stuck") for name in WORKERS},
    }
)
"""By name. `nats` and the like: `kill -9`; `controller@STEP`: at a named step of the engine; `hang-…`: halted
for some seconds; `stuck-…`: halted for good."""
