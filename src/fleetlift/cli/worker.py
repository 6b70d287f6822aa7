"""One worker of a backend: a process in which the services of a role run side by side. `serve` starts these.

The command line's own libraries stay out of it: five workers start at once, and what each imports is what a
start of the backend takes.
"""

import asyncio
import gc
import importlib
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fleetlift.config import Settings, load_run
from fleetlift.core.errors import FleetError
from fleetlift.log import configure, get_logger

log = get_logger(__name__)

# Each service is a coroutine `run(ctx)`. Loaded by name, so that a service that cannot be imported takes only
# its own role down.
ROLES: dict[str, tuple[str, ...]] = {
    "telemetry": ("fleetlift.backend.telemetry:run",),
    "state": (
        "fleetlift.backend.shadows:run",
        "fleetlift.backend.commands:run",
        "fleetlift.edge.presence:run",
    ),
    "auth": ("fleetlift.edge.auth:run",),
    "api": ("fleetlift.api.app:run",),
    "controller": ("fleetlift.migrate.controller:run",),
    "mover": ("fleetlift.mover.service:run",),
}
STOP_SERVICES_S = 10.0

Service = Callable[[Any], Awaitable[None]]


def main() -> None:
    """`python -m fleetlift worker ROLE --data DIR`. Begins when a line comes on standard input."""
    match sys.argv[2:]:
        case [role, "--data", data] if role in ROLES:
            pass
        case _:
            sys.exit(
                f"a worker is started by 'fleetlift serve', as worker ROLE --data DIR; {', '.join(ROLES)}"
            )
    # Little that a start makes is garbage; looking for it takes a fifth of the time.
    gc.disable()
    services = [(name, load_service(name)) for name in ROLES[role]]
    import uvloop

    if not sys.stdin.readline():
        return  # the parent is gone
    try:
        settings = load_run(Path(data))
        configure(level=settings.log_level, role=role)
        uvloop.run(run_services(settings, role, services))
    except FleetError as problem:
        sys.exit(f"worker {role}: {problem}")


def load_service(dotted: str) -> Service:
    """The coroutine function named `module:function`."""
    module, _, name = dotted.partition(":")
    found: Service = getattr(importlib.import_module(module), name)
    return found


async def run_services(settings: Settings, role: str, services: list[tuple[str, Service]]) -> None:
    """Run services side by side until SIGTERM; when one ends or fails, all end and so does the process."""
    from fleetlift.backend.alive import answering
    from fleetlift.backend.context import open_context

    async with open_context(settings, name=role) as ctx:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ctx.stop.set)

        async def service_of(name: str, run: Service) -> None:
            try:
                await run(ctx)
            except Exception:
                log.exception("service_failed", service=name)
                raise
            if not ctx.stop.is_set():
                raise RuntimeError(f"service {name} ended by itself")

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(service_of(name, run), name=name) for name, run in services]

            # Answered only once every service has had its first turns.
            await asyncio.sleep(0)
            async with answering(ctx.nc, role):
                log.info("worker_started", services=[name for name, _ in services])
                gc.freeze()
                gc.enable()
                await ctx.stop.wait()
            _, unfinished = await asyncio.wait(tasks, timeout=STOP_SERVICES_S)
            for task in unfinished:
                log.warning("service_cancelled", service=task.get_name(), after_s=STOP_SERVICES_S)
                task.cancel()
        log.info("worker_stopped")
