"""`python -m tests.fuzz [--for 10m] [--target NAME]`: fuzz each target for its share of the time.

What Atheris learns stays in `build/fuzz/NAME/corpus`, so that the next run goes on from there; an input that
breaks a target is written to `build/fuzz/NAME/crash-…`, with the command that repeats it. Copy it to
`tests/fuzz/seeds/NAME/` and it is tried in every test run.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BUILD = Path("build/fuzz")
ONE_INPUT_S = 5  # an input that takes longer is a fault as well
MEMORY_MB = 2048
LENGTH_MAX = 16_384


def fuzz_one(name: str, arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process. Modules are measured as they are imported, so not before."""
    import atheris

    with atheris.instrument_imports(include=["fleetlift"]):
        from .targets import TARGETS
    atheris.Setup([f"fuzz {name}", *arguments], TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: float, seed: int) -> bool:
    """Whether `name` held for `seconds`."""
    from fleetlift.core.units import format_duration

    directory = BUILD / name
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    before = set(directory.glob("*-*"))
    with (directory / "log").open("wb") as log:
        status = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz", "--one", name),
                f"-max_total_time={max(1, round(seconds))}",
                f"-seed={seed}",
                f"-timeout={ONE_INPUT_S}",
                f"-rss_limit_mb={MEMORY_MB}",
                f"-max_len={LENGTH_MAX}",
                f"-artifact_prefix={directory}/",
                "-print_final_stats=1",
                str(corpus),
                str(HERE / "seeds" / name),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    text = (directory / "log").read_text(errors="replace")
    runs = next((line.split()[-1] for line in text.splitlines() if "number_of_executed_units" in line), "?")
    print(  # noqa: T201
        f"{name:16} {'ok' if status == 0 else 'BROKEN':7} {runs:>10} inputs in "
        f"{format_duration(round(time.monotonic() - began))}, corpus {len(list(corpus.iterdir()))}"
    )
    for crash in sorted(set(directory.glob("*-*")) - before):
        print(f"  {crash}: repeat with {sys.executable} -m tests.fuzz --one {name} {crash}")  # noqa: T201
    if status:
        print("".join(f"  {line}\n" for line in text.splitlines()[-25:]))  # noqa: T201
    return status == 0


def main() -> int:
    from fleetlift.core.units import format_duration, parse_duration

    from .targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--for", dest="time", default="10m", help="for all targets together, such as 10m")
    parser.add_argument(
        "--target", action="append", choices=sorted(TARGETS), help="only this one; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time; it is printed")
    options = parser.parse_args()
    seed = options.seed or int.from_bytes(os.urandom(3), "big") + 1
    names = options.target or list(TARGETS)
    share_s = parse_duration(options.time) / len(names)
    print(f"{len(names)} targets, {format_duration(round(share_s))} each, seed {seed}; kept in {BUILD}")  # noqa: T201
    held = [run(name, share_s, seed) for name in names]
    return 0 if all(held) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
    sys.exit(main())
