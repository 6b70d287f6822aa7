"""Runs on disk: `latest.json` for whoever reads figures, one file a run for whoever compares them."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from benchmarks.figures import Result
from benchmarks.machine import Machine
from benchmarks.processes import Profile

DIRECTORY = Path(__file__).parent.parent / "build" / "bench"
LATEST = "latest.json"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One figure in `latest.json`: nothing but the plain values."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """All that one run left. `failed` tells, bench by bench, why there is no figure."""

    at: str  # local time, the file's name
    quick: bool
    machine: Machine | None
    figures: list[Result]
    profiles: dict[str, list[Profile]] = {}
    failed: dict[str, str] = {}


class NoSuchRun(Exception):
    """What was asked for is not there; the text says what is."""


def now_name() -> str:
    return datetime.now().strftime("%Y-%m-%dT%H-%M-%S")


def save(run: Run, directory: Path) -> Path:
    """Keep the run in a file of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{run.at}.json"
    _write(path, msgspec.json.encode(run))
    return path


def merge_latest(results: Iterable[Result], directory: Path, order: Sequence[str]) -> Path:
    """Put valid results in the place of older ones of the same name; the others stay as they are."""
    path = directory / LATEST
    lines: dict[str, Line] = {}
    if path.exists():
        try:
            lines = {line.name: line for line in msgspec.json.decode(path.read_bytes(), type=list[Line])}
        except msgspec.DecodeError as problem:
            raise NoSuchRun(f"{path} is not a list of figures ({problem}): remove it") from None
    for found in results:
        if not found.invalid:
            lines[found.name] = Line(
                name=found.name, value=found.value, unit=found.unit, limit=found.limit, ratio=found.ratio
            )
    place = {name: n for n, name in enumerate(order)}
    ordered = sorted(lines.values(), key=lambda line: place.get(line.name, len(place)))
    directory.mkdir(parents=True, exist_ok=True)
    _write(path, msgspec.json.encode(ordered))
    return path


def names(directory: Path) -> list[str]:
    """Kept runs, oldest first."""
    return sorted(path.stem for path in directory.glob("????-??-??T??-??-??.json"))


def load(name: str, directory: Path) -> Run:
    """A kept run by its name (`2026-11-22T20-15-03`) or its file's path. Raises NoSuchRun."""
    path = Path(name) if name.endswith(".json") else directory / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Run)
    except FileNotFoundError:
        known = names(directory)
        there = ", ".join(known[-5:]) if known else f"none in {directory}"
        raise NoSuchRun(f"there is no run {name!r}; the newest are: {there}") from None
    except (msgspec.DecodeError, OSError) as problem:
        raise NoSuchRun(f"{path} cannot be read as a run: {problem}") from None


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(msgspec.json.format(content).decode() + "\n")
    temporary.replace(path)
