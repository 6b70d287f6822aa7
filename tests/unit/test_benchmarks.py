"""The benches' harness: what counts, what is kept, what is shown. Nothing here is timed."""

import io
import re
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benches are no part of the package

from benchmarks import __main__ as command
from benchmarks import machine, mqtt_load, runs, tables
from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured, Result, result
from benchmarks.ladder import highest
from benchmarks.machine import Machine
from benchmarks.mqtt_load import Load
from benchmarks.processes import Hot, Profile, Share, hot_functions

RATE = Figure(name="rate_msg_s", unit="msg/s", better="higher", target=10_000, limit="raw COPY")
DELAY = Figure(name="delay_s", unit="s", better="lower", target=1.0)
MACHINE = Machine(
    cores=2,
    cpu="some processor",
    memory_gb=8.0,
    kernel="6.1",
    filesystem="ext4",
    python="3.11.7",
    nats_server="2.15.1",
    postgresql=18,
    packages={},
    commit="abc",
    busy_cores=0.0,
)


def module(*found: Measured, figures: tuple[Figure, ...] = (RATE, DELAY)) -> command.BenchModule:
    async def run(bench: Bench) -> list[Measured]:
        return list(found)

    return cast(command.BenchModule, SimpleNamespace(FIGURES=figures, run=run))


def run_of(at: str, *results: Result, quick: bool = False, on: Machine = MACHINE) -> runs.Run:
    return runs.Run(at=at, quick=quick, machine=on, figures=list(results))


def rate(value: float, *, limit: float | None = 40_000, invalid: str = "") -> Result:
    return result(RATE, Measured(name="rate_msg_s", value=value, limit=limit, invalid=invalid))


def delay(value: float, *, limit: float | None = None) -> Result:
    return result(DELAY, Measured(name="delay_s", value=value, limit=limit))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, command.BenchModule]:
    """Two benches instead of the real ones."""
    found = {
        "ingest": module(
            Measured(name="rate_msg_s", value=12_000, limit=40_000), Measured(name="delay_s", value=0.4)
        ),
        "starts": module(
            Measured(name="start_s", value=1.5),
            figures=(Figure(name="start_s", unit="s", better="lower", target=2),),
        ),
    }
    monkeypatch.setattr(command, "modules", lambda: found)
    monkeypatch.setattr(machine, "look", lambda scratch: MACHINE)
    monkeypatch.setattr(machine, "quiet", lambda within_s: 0.1)
    return found


# -- what is chosen ---------------------------------------------------------------------------------------


def test_one_bench_is_chosen_by_its_name_or_by_one_of_its_figures(
    known: dict[str, command.BenchModule],
) -> None:
    assert command.chosen((), known) == ["ingest", "starts"]
    assert command.chosen(["starts"], known) == ["starts"]
    assert command.chosen(["delay_s"], known) == ["ingest"]
    assert command.chosen(["start_s", "delay_s", "rate_msg_s"], known) == ["ingest", "starts"]


def test_a_wrong_name_is_answered_with_the_right_ones(
    known: dict[str, command.BenchModule], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, the closest name and all that there are; nothing runs."""
    assert command.main(["--only", "delay_ms"]) == 2
    said = capsys.readouterr().err
    assert "'delay_ms'" in said
    assert "did you mean delay_s?" in said
    assert all(name in said for name in ("ingest", "starts", "rate_msg_s", "delay_s", "start_s"))


def test_every_bench_that_there_is_names_its_figures_with_target_and_direction() -> None:
    """The real modules load, and no figure belongs to two of them."""
    figures = [figure for found in command.modules().values() for figure in found.FIGURES]
    names = [figure.name for figure in figures]
    assert len(names) == len(set(names))
    assert {"ingest_msg_s", "ingest_p99_s", "ingest_vs_handwritten", "gap_s"} <= set(names)
    assert {"serve_first_s", "serve_again_s"} <= set(names)
    assert all(figure.target >= 0 and figure.means for figure in figures)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) and len(name) <= 24 for name in names)


# -- what is kept -----------------------------------------------------------------------------------------


def test_latest_is_a_plain_list_and_one_figure_measured_anew_leaves_the_others(tmp_path: Path) -> None:
    order = ["rate_msg_s", "delay_s"]
    runs.merge_latest([delay(0.4), rate(12_000)], tmp_path, order)
    path = runs.merge_latest([delay(0.5, limit=0.1)], tmp_path, order)
    assert msgspec.json.decode(path.read_bytes()) == [
        {"name": "rate_msg_s", "value": 12_000, "unit": "msg/s", "limit": 40_000, "ratio": 0.3},
        {"name": "delay_s", "value": 0.5, "unit": "s", "limit": 0.1, "ratio": 5.0},
    ]


def test_an_invalid_value_never_replaces_a_valid_one(tmp_path: Path) -> None:
    runs.merge_latest([rate(12_000)], tmp_path, [])
    path = runs.merge_latest([rate(99_000, invalid="the generator was late")], tmp_path, [])
    assert [line["value"] for line in msgspec.json.decode(path.read_bytes())] == [12_000]


def test_a_damaged_latest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / runs.LATEST).write_text('{"no": "list"}')
    with pytest.raises(runs.NoSuchRun, match="remove it"):
        runs.merge_latest([rate(1)], tmp_path, [])


def test_a_run_is_kept_with_its_machine_and_comes_back(tmp_path: Path) -> None:
    kept = run_of("2026-11-22T20-15-03", rate(12_000, invalid="why"), delay(0.4))
    runs.save(kept, tmp_path)
    assert runs.names(tmp_path) == ["2026-11-22T20-15-03"]
    assert runs.load("2026-11-22T20-15-03", tmp_path) == kept
    with pytest.raises(runs.NoSuchRun, match="the newest are: 2026-11-22T20-15-03"):
        runs.load("2026-11-23T00-00-00", tmp_path)


def test_a_whole_run_is_shown_kept_and_merged(
    known: dict[str, command.BenchModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--directory", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 cores of some processor" in said
    assert re.search(r"rate_msg_s\s+12,000 msg/s\s+≥ 10,000\s+40,000\s+0\.3\s+meets", said)
    latest = msgspec.json.decode((tmp_path / runs.LATEST).read_bytes())
    assert [line["name"] for line in latest] == ["rate_msg_s", "delay_s", "start_s"]
    [name] = runs.names(tmp_path)
    assert runs.load(name, tmp_path).machine == MACHINE


def test_a_quick_run_is_marked_and_kept_only_when_asked(
    known: dict[str, command.BenchModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--quick", "--directory", str(tmp_path)]) == 0
    assert "too short to be compared" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert command.main(["--quick", "--save", "--directory", str(tmp_path)]) == 0
    assert (tmp_path / runs.LATEST).exists()
    assert runs.load(runs.names(tmp_path)[0], tmp_path).quick


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (module(Measured(name="rate_msg_s", value=1)), "it did not measure delay_s"),
        (module(Measured(name="other", value=1)), "it measured other"),
    ],
)
def test_a_bench_that_does_not_measure_its_figures_fails(
    known: dict[str, command.BenchModule],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: command.BenchModule,
    said: str,
) -> None:
    """The others run all the same, their values are kept, and the exit status says that one failed."""
    known["ingest"] = found
    assert command.main(["--directory", str(tmp_path)]) == 1
    assert f"FAILED ingest: {said}" in capsys.readouterr().out
    latest = msgspec.json.decode((tmp_path / runs.LATEST).read_bytes())
    assert [line["name"] for line in latest] == ["start_s"]


def test_a_bench_that_cannot_be_loaded_does_not_keep_the_others_from_running(
    known: dict[str, command.BenchModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known["ingest"] = cast(command.BenchModule, command.Broken(NameError("name 'x' is not defined")))
    assert command.main(["--directory", str(tmp_path)]) == 1
    assert "FAILED ingest: it cannot be loaded: NameError: name 'x'" in capsys.readouterr().out
    latest = msgspec.json.decode((tmp_path / runs.LATEST).read_bytes())
    assert [line["name"] for line in latest] == ["start_s"]


def test_an_invalid_run_fails_and_says_why(
    known: dict[str, command.BenchModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = Measured(name="rate_msg_s", value=9, invalid="the generator itself was late")
    known["ingest"] = module(late, Measured(name="delay_s", value=0.4))
    assert command.main(["--only", "ingest", "--directory", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "INVALID" in said
    assert "does not count: the generator itself was late" in said
    latest = msgspec.json.decode((tmp_path / runs.LATEST).read_bytes())
    assert [line["name"] for line in latest] == ["delay_s"]


def test_a_busy_machine_makes_every_value_invalid(
    known: dict[str, command.BenchModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "quiet", lambda within_s: 1.4)
    assert command.main(["--directory", str(tmp_path)]) == 1
    kept = runs.load(runs.names(tmp_path)[0], tmp_path)
    assert [r.invalid for r in kept.figures] == ["the machine was busy already: 1.4 cores"] * 3
    assert msgspec.json.decode((tmp_path / runs.LATEST).read_bytes()) == []


# -- what is shown ----------------------------------------------------------------------------------------


def test_the_table_says_by_words_what_meets_its_target_and_fits_80_columns() -> None:
    long = "a note that is longer than any terminal is wide " * 4
    shown = tables.figures(
        [
            rate(9_000),
            delay(0.4),
            result(
                msgspec.structs.replace(RATE, name="evaluate_100k_mb", unit="MB", better="lower", target=512),
                Measured(name="evaluate_100k_mb", value=0.0004, limit=123_456.7, notes=(long,)),
            ),
        ]
    )
    lines = shown.splitlines()
    assert all(len(line) <= tables.WIDTH for line in lines), max(lines, key=len)
    assert lines[2].endswith("MISSES")
    assert lines[3].endswith("meets")
    assert "rate_msg_s: limit: raw COPY" in shown


def test_a_comparison_tells_better_from_worse_by_sign_and_word() -> None:
    before = run_of("2026-11-22T20-15-03", rate(10_000), delay(0.4))
    after = run_of("2026-11-23T20-15-03", rate(12_000), delay(0.6))
    shown = tables.comparison(before, after)
    assert re.search(r"rate_msg_s .*\+20\.0%  \+ better", shown)
    assert re.search(r"delay_s .*\+50\.0%  - WORSE", shown)
    back = tables.comparison(after, before)
    assert re.search(r"rate_msg_s .*-16\.7%  - WORSE", back)
    assert re.search(r"delay_s .*-33\.3%  \+ better", back)
    assert all(len(line) <= tables.WIDTH for line in shown.splitlines())


def test_a_comparison_says_what_cannot_be_compared() -> None:
    other = msgspec.structs.replace(MACHINE, cores=64, busy_cores=1.5)
    before = run_of("2026-11-22T20-15-03", rate(10_000, invalid="late"), quick=True)
    after = run_of("2026-11-23T20-15-03", rate(10_100), delay(0.6), on=other)
    shown = tables.comparison(before, after)
    assert "not compared: invalid" in shown
    assert "only in this" in shown
    assert "was a quick run" in shown
    assert "was busy already" in shown
    assert "Not the same machine: cores was 2, is 64." in shown
    same = tables.comparison(run_of("a", rate(10_000)), run_of("b", rate(10_100)))
    assert "= the same" in same


def test_compare_takes_the_last_run_and_the_newest_that_shares_a_figure(tmp_path: Path) -> None:
    """A run of one figure in between does not hide the change of another."""
    with pytest.raises(runs.NoSuchRun, match="two runs are needed"):
        command.compare([], tmp_path)
    runs.save(run_of("2026-11-20T00-00-00", rate(10_000)), tmp_path)
    runs.save(run_of("2026-11-21T00-00-00", delay(0.4)), tmp_path)
    runs.save(run_of("2026-11-22T00-00-00", rate(20_000)), tmp_path)
    assert "2026-11-20T00-00-00  →  2026-11-22T00-00-00" in command.compare([], tmp_path)
    named = command.compare(["2026-11-20T00-00-00", "2026-11-21T00-00-00"], tmp_path)
    assert "only in the first" in named
    with pytest.raises(command.WrongUse, match="two runs"):
        command.compare(["2026-11-20T00-00-00"], tmp_path)


def test_a_profile_names_processes_and_admits_what_it_could_not_see() -> None:
    profile = Profile(
        what="10,000 msg/s",
        wall_s=10.0,
        machine_cores=1.5,
        shares=[
            Share(name="nats-server", cpu_s=6.0, cores=0.6, processes=1),
            Share(name="postgres", cpu_s=2.0, cores=0.2, processes=12),
            Share(name="auth", cpu_s=0.01, cores=0.001, processes=1),
        ],
        hot=[Hot(name="telemetry", lines=("60 %  parse",)), Hot(name="state", problem="py-spy could not")],
    )
    shown = tables.profile("ingest", profile)
    assert re.search(r"6 s CPU\s+0\.60 cores\s+nats-server", shown)
    assert "postgres (12 processes)" in shown
    assert "auth" not in shown  # next to nothing
    assert re.search(r"0\.70 cores  kernel and processes of others", shown)
    assert "    60 %  parse" in shown
    assert "state: py-spy could not" in shown


def test_hot_functions_are_those_at_the_end_of_stacks() -> None:
    folded = "run;take;parse 30\nrun;take 10\nrun;take;parse;decode 60\nnonsense\n"
    assert hot_functions(folded, 2) == [" 60 %  decode", " 30 %  parse"]


def test_progress_has_rate_and_time_left_and_does_not_flood_a_file() -> None:
    output = io.StringIO()
    bench = Bench("ingest", Path(), output=output)
    bench.progress("publishing", 0, 1000, "msg")
    for n in range(1, 1000):
        bench.progress("publishing", n, 1000, "msg")
    assert output.getvalue() == "ingest: publishing, 0 of 1,000 msg\n"


# -- the highest rate -------------------------------------------------------------------------------------


class _Trial(msgspec.Struct):
    problem: str


def _machine(can: float, tires_to: float | None = None) -> tuple[Callable[[float, float], Any], list[Any]]:
    """Something that sustains `can` for a short while and `tires_to` for a long one."""
    asked: list[tuple[float, float]] = []

    async def trial(rate: float, seconds: float) -> _Trial:
        asked.append((rate, seconds))
        most = tires_to if tires_to is not None and seconds > 10 else can
        return _Trial("" if rate <= most else "late")

    return trial, asked


@pytest.mark.parametrize(
    ("can", "tires_to", "expected"), [(9, None, 8), (100, None, 16), (4, None, 4), (2, None, 2), (16, 5, 4)]
)
async def test_the_highest_rate_is_proved_by_a_long_trial(
    can: float, tires_to: float | None, expected: float
) -> None:
    trial, asked = _machine(can, tires_to)
    found, proof, tried = await highest((1, 2, 4, 8, 16), 4, trial, short_s=5, long_s=60)
    assert (found, proof.problem) == (expected, "")
    assert asked[-1] == (expected, 60)
    assert len(tried) == len(asked)


async def test_a_rate_that_nothing_sustains_is_told_with_its_problem() -> None:
    trial, _ = _machine(0.5)
    found, proof, _ = await highest((1, 2, 4), 2, trial, short_s=5, long_s=60)
    assert (found, proof.problem) == (1, "late")


def test_a_late_generator_says_so_and_what_the_broker_did_not_bear() -> None:
    load = Load(
        sent=10,
        acked=10,
        closed=0,
        sending_s=1,
        wall_s=1,
        late_p99_s=0.01,
        late_max_s=3,
        ack_p50_s=0,
        ack_p99_s=0,
        ack_max_s=0,
    )
    assert not load.late
    assert not load.trouble
    assert "closed 2" in msgspec.structs.replace(load, acked=4, closed=2).trouble
    assert "6 messages were not acknowledged" in msgspec.structs.replace(load, acked=4).trouble
    late = msgspec.structs.replace(load, late_p99_s=mqtt_load.LATE_MAX_S * 2)
    assert "the generator itself was late" in late.late


def test_quantiles_of_few_values() -> None:
    assert mqtt_load.quantile(array("d"), 0.99) == 0.0
    assert mqtt_load.quantile(array("d", [3, 1, 2]), 0.5) == 2
    assert mqtt_load.quantile(array("d", range(100)), 0.99) == 99


def test_a_bench_that_fails_is_told_apart_from_a_crash(
    known: dict[str, command.BenchModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def lost(bench: Bench) -> list[Measured]:
        raise BenchFailed("3 of 10 acknowledged messages were not stored")

    known["ingest"] = cast(command.BenchModule, SimpleNamespace(FIGURES=(RATE,), run=lost))
    assert command.main(["--only", "ingest", "--directory", str(tmp_path)]) == 1
    seen = capsys.readouterr()
    assert "FAILED ingest: 3 of 10 acknowledged messages were not stored" in seen.out
    assert "Traceback" not in seen.err
    assert not list(tmp_path.iterdir())
