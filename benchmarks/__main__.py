"""`python -m benchmarks [--only NAME]` measures; `python -m benchmarks compare` tells what has changed."""

import argparse
import asyncio
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

import msgspec

from benchmarks import machine, runs, tables
from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured, Result, result
from benchmarks.processes import Profile
from fleetlift.testing import scratch_directory

BENCHES = (
    "ingest",
    "ingest_vs_handwritten",
    "shadow_updates",
    "commands",
    "evaluate_100k",
    "revert_1000",
    "gap",
    "simulation_speedup",
    "serve",
    "tenant_copy",
    "tenant_follow",
    "tenant_verify",
    "tenant_freeze",
    "load_vs_locust",
    "load_10k",
)


QUIET_WITHIN_S = 15  # what the bench before has left running gets this long to end


class BenchModule(Protocol):
    """What `benchmarks/NAME.py` holds."""

    FIGURES: tuple[Figure, ...]
    run: Callable[[Bench], Awaitable[list[Measured]]]


class WrongUse(Exception):
    """The command line asks for something that is not there."""


class Broken:
    """A bench that cannot be loaded: it fails like any other, and the others run."""

    FIGURES: tuple[Figure, ...] = ()

    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    async def run(self, bench: Bench) -> list[Measured]:
        raise BenchFailed(f"it cannot be loaded: {type(self._problem).__name__}: {self._problem}")


def modules() -> dict[str, BenchModule]:
    """The benches there are, in the order they run."""
    found: dict[str, BenchModule] = {}
    for name in BENCHES:
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        try:
            found[name] = cast(BenchModule, importlib.import_module(f"benchmarks.{name}"))
        except Exception as problem:
            found[name] = cast(BenchModule, Broken(problem))
    return found


def chosen(only: Sequence[str], known: dict[str, BenchModule]) -> list[str]:
    """The benches that `only` names, by their own name or by one of their figures'. Raises WrongUse."""
    if not only:
        return list(known)
    by_figure = {figure.name: name for name, module in known.items() for figure in module.FIGURES}
    found = []
    for asked in only:
        name = asked if asked in known else by_figure.get(asked)
        if name is None:
            names = sorted({*known, *by_figure})
            close = difflib.get_close_matches(asked, names, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise WrongUse(f"there is no figure or bench {asked!r}: {hint}There are {', '.join(names)}")
        found.append(name)
    return [name for name in known if name in found]


async def measure(bench: Bench, module: BenchModule) -> list[Result]:
    """Run one bench. Raises BenchFailed, also when it forgets a figure or brings one that is not its own."""
    found = {m.name: m for m in await module.run(bench)}
    expected = {figure.name: figure for figure in module.FIGURES}
    if strange := sorted(set(found) - set(expected)):
        raise BenchFailed(f"it measured {', '.join(strange)}, which FIGURES does not name")
    if missing := sorted(set(expected) - set(found)):
        raise BenchFailed(f"it did not measure {', '.join(missing)}")
    return [result(figure, found[name]) for name, figure in expected.items()]


def run_all(
    names: Sequence[str], known: dict[str, BenchModule], *, quick: bool, scratch: Path | None
) -> runs.Run:
    """Run benches one after the other; one that fails does not keep the others from running."""
    results: list[Result] = []
    profiles: dict[str, list[Profile]] = {}
    failed: dict[str, str] = {}
    at = runs.now_name()
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    facts = None
    for name in names:
        with scratch_directory("fleetlift-bench-", scratch) as directory:
            facts = facts or machine.look(directory)
            bench = Bench(name, directory, quick=quick)
            bench.earlier = {r.name: r for r in results}
            bench.progress("waiting for a quiet machine")
            busy = machine.quiet(1 if quick else QUIET_WITHIN_S)
            try:
                results += _checked(asyncio.run(measure(bench, known[name])), busy)
            except BenchFailed as problem:
                failed[name] = str(problem)
            except Exception as problem:
                failed[name] = f"{type(problem).__name__}: {problem}"
                bench.clear()
                traceback.print_exc()
            finally:
                bench.clear()
            if bench.profiles:
                profiles[name] = bench.profiles
    return runs.Run(at=at, quick=quick, machine=facts, figures=results, profiles=profiles, failed=failed)


def _checked(results: list[Result], busy_cores: float) -> list[Result]:
    """The same, not to be counted when the machine was busy before anything was measured."""
    if busy_cores <= machine.BUSY_MAX_CORES:
        return results
    why = f"the machine was busy already: {busy_cores:g} cores"
    return [r if r.invalid else msgspec.structs.replace(r, invalid=why) for r in results]


def show(run: runs.Run) -> None:
    """Print what a run found."""
    if run.machine is not None:
        m = run.machine
        print(f"{m.cores} cores of {m.cpu}, {m.memory_gb:g} GB, kernel {m.kernel}, {m.filesystem}")
        print(f"Python {m.python}, PostgreSQL {m.postgresql}, NATS Server {m.nats_server}, at {m.commit}")
        print()
    if run.profiles:
        print("Where the time goes\n")
        for name, found in run.profiles.items():
            for profile in found:
                print(tables.profile(name, profile), end="\n\n")
    if run.figures:
        print(tables.figures(run.figures, quick=run.quick))
    for name, problem in run.failed.items():
        print(f"\nFAILED {name}: {problem}")


def compare(named: Sequence[str], directory: Path) -> str:
    """The comparison of two named runs, or of the last one with the newest before it that shares a figure."""
    if named:
        if len(named) != 2:
            raise WrongUse("name two runs to compare, or none for the last two")
        return tables.comparison(*(runs.load(name, directory) for name in named))
    kept = runs.names(directory)
    if len(kept) < 2:
        raise runs.NoSuchRun(f"two runs are needed, {directory} holds {len(kept)}: make bench")
    last = runs.load(kept[-1], directory)
    measured = {r.name for r in last.figures}
    for name in reversed(kept[:-1]):
        before = runs.load(name, directory)
        if measured & {r.name for r in before.figures}:
            return tables.comparison(before, last)
    raise runs.NoSuchRun(f"no run before {last.at} measured any of {', '.join(sorted(measured))}: make bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a bench failed or its run does not count, 2 wrong use."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "compare":
            print(compare(options.runs, options.directory))
            return 0
        known = modules()
        order = [figure.name for module in known.values() for figure in module.FIGURES]
        if options.list:
            for name, module in known.items():
                for figure in module.FIGURES:
                    print(f"{figure.name:<22} {name:<22} {figure.means}".rstrip())
            return 0
        names = chosen(options.only or (), known)
        run = run_all(names, known, quick=options.quick, scratch=options.scratch)
        show(run)
        if options.quick and not options.save:
            print("\nNothing is kept of a quick run; --save keeps it.")
        elif run.figures:
            path = runs.save(run, options.directory)
            latest = runs.merge_latest(run.figures, options.directory, order)
            print(f"\nkept in {path}, and in {latest}")
        return 1 if run.failed or any(r.invalid for r in run.figures) else 0
    except (WrongUse, runs.NoSuchRun) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="a figure or a bench; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="short runs, to see that everything works")
    parser.add_argument("--save", action="store_true", help="keep a quick run as well")
    parser.add_argument("--list", action="store_true", help="name all figures and their benches")
    parser.add_argument("--scratch", type=Path, help="where the engines' files go while measuring")
    parser.add_argument(
        "--directory", type=Path, default=runs.DIRECTORY, help="where runs are kept (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", metavar="compare")
    against = commands.add_parser("compare", help="what has changed between the last two runs")
    against.add_argument("runs", nargs="*", metavar="RUN", help="two kept runs, by name or file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
