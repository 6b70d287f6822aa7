"""Where the time goes: CPU seconds by process, and the hottest functions of those that run Python."""

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import msgspec
import psutil

HOTTEST = 5
SAMPLES_A_SECOND = 50  # more would be felt by what is measured
_SAMPLE_EVERY_S = 1.0


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """One process, or all of a kind together. `cores` is its mean share of a core (0.5: half of one)."""

    name: str
    cpu_s: float
    cores: float
    processes: int


class Hot(msgspec.Struct, frozen=True, kw_only=True):
    """The functions in which a process was seen most often, or why nobody could look."""

    name: str
    lines: tuple[str, ...] = ()
    problem: str = ""


class Profile(msgspec.Struct, kw_only=True):
    """Who used the processor while `what` was measured. `machine_cores` counts everything on the machine."""

    what: str
    wall_s: float = 0.0
    machine_cores: float = 0.0
    shares: list[Share] = []
    hot: list[Hot] = []

    @property
    def others_cores(self) -> float:
        """What processes that do not belong to the bench used: on a quiet machine next to nothing."""
        return max(0.0, self.machine_cores - sum(share.cores for share in self.shares))


def role_of(process: psutil.Process) -> str:
    """A process of a backend by what it does: `nats-server`, `postgres`, or the worker's role."""
    name = str(process.name())
    if name.startswith("postgres"):
        return "postgres"
    if name == "nats-server":
        return name
    command = process.cmdline()
    if "worker" in command:
        return command[command.index("worker") + 1]
    return "serve" if "serve" in command else name


def _with_children(roots: Mapping[str, int]) -> dict[int, str]:
    """Every process below `roots` by pid, under the name it was given or the role it has."""
    found: dict[int, str] = {}
    for name, pid in roots.items():
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(pid)
            found.setdefault(pid, name)
            for child in top.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    found.setdefault(child.pid, role_of(child))
    return found


def _cpu_s(pids: Iterable[int]) -> dict[int, float]:
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            found[pid] = times.user + times.system
    return found


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


@contextlib.asynccontextmanager
async def cpu_profile(what: str, roots: Mapping[str, int]) -> AsyncIterator[Profile]:
    """CPU seconds of `roots` (name: pid) and all below them, while the block runs; read it afterwards.

    Processes that come and go in between count with what they had used when they were last seen.
    """
    profile = Profile(what=what)
    names: dict[int, str] = {}
    first: dict[int, float] = {}
    last: dict[int, float] = {}

    def look(*, beginning: bool = False) -> None:
        found = _with_children(roots)
        names.update({pid: name for pid, name in found.items() if pid not in names})
        for pid, used_s in _cpu_s(names).items():
            # One that came later began with nothing.
            first.setdefault(pid, used_s if beginning else 0.0)
            last[pid] = used_s

    async def watch() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_EVERY_S)
            look()

    look(beginning=True)
    began, machine_s = time.monotonic(), _machine_cpu_s()
    task = asyncio.create_task(watch(), name="cpu-profile")
    try:
        yield profile
    finally:
        task.cancel()
        look()
        profile.wall_s = max(time.monotonic() - began, 1e-9)
        profile.machine_cores = (_machine_cpu_s() - machine_s) / profile.wall_s
        used: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for pid, name in names.items():
            used[name] += last.get(pid, 0.0) - first.get(pid, 0.0)  # type: ignore[assignment]
            count[name] += 1
        profile.shares = [
            Share(name=name, cpu_s=cpu_s, cores=cpu_s / profile.wall_s, processes=count[name])
            for name, cpu_s in sorted(used.items(), key=lambda pair: -pair[1])
        ]


def python_workers(root: int, roles: Iterable[str]) -> dict[str, int]:
    """The pids of a backend's workers with these roles."""
    wanted = set(roles)
    return {name: pid for pid, name in _with_children({"serve": root}).items() if name in wanted}


async def hottest(pids: Mapping[str, int], *, for_s: float = 5.0) -> list[Hot]:
    """Where these Python processes are, seen by py-spy for some seconds, all at once.

    It costs them a little: call it beside the measured stretch, not within.
    """
    return list(await asyncio.gather(*(_record(name, pid, for_s) for name, pid in pids.items())))


async def _record(name: str, pid: int, for_s: float) -> Hot:
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.exists() else shutil.which("py-spy")
    if tool is None:
        return Hot(name=name, problem="py-spy is not installed: make setup")
    with tempfile.TemporaryDirectory() as directory:
        folded = Path(directory, "stacks")
        process = await asyncio.create_subprocess_exec(
            *(tool, "record", "--pid", str(pid), "--duration", str(max(1, round(for_s))), "--nonblocking"),
            *("--rate", str(SAMPLES_A_SECOND), "--format", "raw", "--function", "--output", str(folded)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(for_s + 30.0):
                _, problems = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return Hot(name=name, problem="py-spy did not come to an end")
        if process.returncode:
            said = [line for line in problems.decode(errors="replace").splitlines() if line.strip()]
            return Hot(
                name=name, problem=f"py-spy could not look: {said[-1].strip() if said else 'no reason'}"
            )
        lines = tuple(hot_functions(folded.read_text() if folded.exists() else ""))
    return (
        Hot(name=name, lines=lines) if lines else Hot(name=name, problem="it was idle whenever py-spy looked")
    )


def hot_functions(folded: str, most: int = HOTTEST) -> list[str]:
    """The functions that were running most often, of stacks as flame graphs take them (`a;b;c 12`).

    What counts is the end of a stack: the function itself, not what it called. Time in C (uvloop, asyncpg,
    msgspec) is seen in the Python function that called it; `Runner.run` is the event loop itself.
    """
    own: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdecimal():
            own[stack.rsplit(";", 1)[-1]] += int(count)
    total = sum(own.values())
    return [f"{100 * n / total:3.0f} %  {function}" for function, n in own.most_common(most)]
