"""The command line: quick, one line an error, exit statuses kept, JSON wherever something is listed."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer

from fleetlift.cli import main as cli
from fleetlift.cli.check import lines
from fleetlift.cli.client import connect, read_env
from fleetlift.cli.command import read_params
from fleetlift.cli.migrate import exit_status, over
from fleetlift.cli.screen import SIGNS, compact, span
from fleetlift.cli.shadow import flat, put_in
from fleetlift.core.command import PathStatus, Status
from fleetlift.core.errors import Forbidden, Unavailable
from fleetlift.core.migration import MemberState, Phase, WavePhase

CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("FLEETLIFT_")} | {
    "NO_COLOR": "1",
    "COLUMNS": "100",
}

NOTHING: Mapping[str, str] = {}


def fleetlift(
    *args: str, cwd: Path | None = None, env: Mapping[str, str] = NOTHING
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "fleetlift.cli.main", *args],
        capture_output=True,
        text=True,
        env=CLEAN | dict(env),
        cwd=cwd,
        timeout=30,
        check=False,
    )


def commands() -> Iterator[tuple[str, Any]]:
    """Every command there is with its full name, hidden ones left out."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        if getattr(command, "hidden", False):
            return
        children = getattr(command, "commands", None)
        if children:
            for child, found in children.items():
                yield from walk(f"{name} {child}", found)
        else:
            yield name, command

    for area, entry in cli.AREAS.items():
        if not entry.hidden and area != "demo":
            yield from walk(area, cli.load(area))


def options(command: Any) -> set[str]:
    return {opt for param in command.params for opt in param.opts}


def test_every_list_and_show_speaks_json() -> None:
    """Whatever lists or shows something can be read by a program."""
    reading = {"list", "show", "devices", "events", "get", "status", "check", "dead-letters", "feed"}
    found = [name for name, _ in commands() if name.split()[-1] in reading]
    assert len(found) >= 12
    for name, command in commands():
        if name.split()[-1] in reading:
            assert "--json" in options(command), f"fleetlift {name} has no --json"


def test_every_command_explains_itself() -> None:
    for name, command in commands():
        assert command.help, f"fleetlift {name} says nothing of itself"
        for param in command.params:
            assert getattr(param, "help", None), f"fleetlift {name}: {param.name} is not explained"


def test_no_secret_is_taken_on_the_command_line() -> None:
    """Passwords and tokens come by file, standard input or environment: other users see command lines."""
    for name, command in commands():
        taken = options(command) & {"--password", "--token", "--secret", "--key-text"}
        assert not taken, f"fleetlift {name} takes {taken}"


def test_help_answers_at_once() -> None:
    """`--help` loads none of the areas."""
    code = (
        "import sys, fleetlift.cli.main as m\n"
        "sys.argv = ['fleetlift', '--help']\n"
        "try: m.main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'asyncpg', 'httpx', 'litestar', 'nats', 'fleetlift.cli.serve'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=False
    )
    assert done.returncode == 0, done.stderr
    for area in ("serve", "migrate", "device", "command", "shadow", "token"):
        assert area in done.stdout
    assert "worker" not in done.stdout


def test_a_worker_loads_only_what_its_role_needs() -> None:
    """Five workers start at once: what only a command line, a PEM or a query needs would delay them all."""
    code = (
        "import sys, fleetlift.cli.worker as w\n"
        "for role in ('telemetry', 'state', 'auth', 'controller'):\n"
        "    [w.load_service(name) for name in w.ROLES[role]]\n"
        "heavy = {'cryptography', 'httpx', 'litestar', 'psutil', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_worker_without_a_known_role_says_who_starts_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fleetlift", "worker", "cook", "--data", "."],
        capture_output=True,
        text=True,
        env=CLEAN,
        check=False,
    )
    assert done.returncode == 1
    assert "fleetlift serve" in done.stderr
    assert "controller" in done.stderr


def test_exit_statuses_tell_wrong_use_from_failure(tmp_path: Path) -> None:
    assert fleetlift("--version").stdout.startswith("fleetlift ")
    assert fleetlift("no-such-thing").returncode == 2
    assert fleetlift("migrate", "check", "no-such-file.yaml").returncode == 2
    assert fleetlift("command", "send", "car-1", "lock", "--params", "{").returncode == 2
    assert fleetlift("command", "send", "car-1", "lock", "door").returncode == 2
    assert fleetlift("shadow", "set", "car-1").returncode == 2
    assert fleetlift("migrate", "revert", "--wave", "--device", "car-1").returncode == 2
    assert fleetlift("device", "list", cwd=tmp_path).returncode == 1


def test_an_error_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    """No stack trace, unless FLEETLIFT_DEBUG asks for one."""
    done = fleetlift("device", "list", cwd=tmp_path)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("✗ No server is known") and "fleetlift serve" in done.stderr
    away = {"FLEETLIFT_URL": "http://127.0.0.1:9", "FLEETLIFT_TOKEN": "flt_x"}
    done = fleetlift("device", "list", env=away)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "No Fleetlift server answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" in fleetlift("device", "list", env=away | {"FLEETLIFT_DEBUG": "1"}).stderr


def test_a_plan_with_mistakes_is_told_by_file_and_line_without_a_server(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("migration: x\nfleet: {tenant: t}\nspeed: 5\n")
    done = fleetlift("migrate", "check", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 1 and "bad.yaml:3:1" in done.stderr


def test_where_to_call_comes_from_the_data_directory_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--data goes before the environment, and that before ./fleetlift-data."""
    (tmp_path / "admin.env").write_text(
        "FLEETLIFT_URL=http://127.0.0.1:1\nFLEETLIFT_TOKEN=flt_a\nFLEETLIFT_CA=\n"
    )
    monkeypatch.setenv("FLEETLIFT_URL", "http://127.0.0.1:2/")
    monkeypatch.setenv("FLEETLIFT_TOKEN", "flt_b")
    assert connect(tmp_path).url == "http://127.0.0.1:1"
    assert connect().url == "http://127.0.0.1:2"
    monkeypatch.delenv("FLEETLIFT_TOKEN")
    with pytest.raises(Forbidden, match="token create"):
        connect()
    monkeypatch.delenv("FLEETLIFT_URL")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unavailable, match="fleetlift-data"):
        connect()


def test_env_files_are_read_as_a_shell_would(tmp_path: Path) -> None:
    (tmp_path / "e").write_text('A=1\nexport B="two words"\n# C=3\nD=x=y  # remark\n\n')
    assert read_env(tmp_path / "e") == {"A": "1", "B": "two words", "D": "x=y"}


class Refusing(BaseHTTPRequestHandler):
    """Answers every call with what the test has put into `answer`: (status, content type, body)."""

    answer: tuple[int, str, bytes] = (200, "application/json", b"{}")

    def do_GET(self) -> None:
        status, kind, body = self.answer
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "body", "said"),
    [
        (409, "application/problem+json", b'{"detail": "try later"}', "try later"),
        (500, "application/problem+json", b'{"detail": "oh", "incident": "ab12"}', "incident ab12"),
        (401, "application/problem+json", b'{"detail": "x"}', "does not know this token"),
        (502, "text/html", b"<html>bad gateway</html>", "not as a Fleetlift server does"),
        (200, "application/json", b"not json", "not as a Fleetlift server does"),
    ],
)
def test_whatever_answers_the_error_is_plain(
    refusing: str, status: int, kind: str, body: bytes, said: str
) -> None:
    """Problem documents are read out; something that is no Fleetlift server is named as such."""
    Refusing.answer = (status, kind, body)
    done = fleetlift("device", "show", "x", env={"FLEETLIFT_URL": refusing, "FLEETLIFT_TOKEN": "flt_x"})
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


def test_every_state_has_a_mark_beside_its_colour() -> None:
    """Colours are never the only sign."""
    for states in (Phase, WavePhase, MemberState, Status, PathStatus):
        for state in states:
            mark, _ = SIGNS[state.value]
            assert mark.strip(), state


def test_watching_ends_when_there_is_nothing_more_to_see() -> None:
    """A held migration waits for a person: a script is told, someone at a terminal stays."""
    for phase in ("finished", "reverted", "released"):
        assert over(phase, after_revert=False, at_terminal=True)
    assert over("held", after_revert=False, at_terminal=False)
    assert not over("held", after_revert=False, at_terminal=True)
    assert not over("held", after_revert=True, at_terminal=False)
    assert not over("running", after_revert=False, at_terminal=False)
    assert [exit_status(p) for p in ("finished", "released", "running", "held", "reverted")] == [
        0,
        0,
        0,
        1,
        1,
    ]


def test_parameters_are_json_where_they_can_be() -> None:
    assert read_params(["door=left", "level=3", "on=true"], None) == {"door": "left", "level": 3, "on": True}
    assert read_params(["a=1"], '{"a": 0, "b": [1]}') == {"a": 1, "b": [1]}
    for pairs, document in ((["door"], None), (["=x"], None), ([], "[1]"), ([], "{")):
        with pytest.raises(typer.BadParameter):
            read_params(pairs, document)


def test_dotted_names_go_inwards() -> None:
    state: dict[str, Any] = {}
    for pair in ("interval=30", "lights.inside=true", "lights.level=low", "gone=null"):
        put_in(state, pair)
    assert state == {"interval": 30, "lights": {"inside": True, "level": "low"}, "gone": None}
    assert flat(state) == {"interval": 30, "lights.inside": True, "lights.level": "low", "gone": None}
    for pair in ("interval.x=1", "a..b=1", "a"):
        with pytest.raises(typer.BadParameter):
            put_in(state, pair)


def test_durations_and_values_are_short() -> None:
    spans = {
        None: "–",
        0.0004: "0 ms",
        0.25: "250 ms",
        3.21: "3.2 s",
        59.4: "59 s",
        185: "3 min 05 s",
        7800: "2 h 10 min",
    }
    assert {key: span(key) for key in spans} == spans
    assert span(3 * 86400 + 4 * 3600) == "3 d 4 h" and span(-2) == "-2.0 s"
    assert compact({"a": [1, 2]}) == '{"a": [1, 2]}' and len(compact("x" * 100, 10)) == 10


def test_a_check_shows_waves_and_what_is_missing() -> None:
    found = {
        "ok": False,
        "migration": "connect",
        "tenant": "carshare",
        "from_side": "legacy",
        "to_side": "fleetlift",
        "inventory": 57,
        "selected": 50,
        "movable": 44,
        "connected": 40,
        "order": [f"car-{n:04d}" for n in range(44)],
        "excluded": [{"device": "car-9", "reason": "cannot be updated: its attribute updatable is false"}],
        "excluded_total": 6,
        "rungs": [
            {
                "rung": 1,
                "step": "telemetry",
                "stage": "both",
                "bake_s": 7200.0,
                "approve": True,
                "gates": ["telemetry.completeness >= 99.99%"],
                "waves": [
                    {"label": "10 devices", "adds": 10, "total": 10},
                    {"label": "1%", "adds": 0, "total": 10},
                ],
            }
        ],
        "takes_s": 7200.0,
        "findings": [{"severity": "error", "kind": "x", "text": "The old side does not answer."}],
    }
    text = "\n".join(line.plain for line in lines(found, 80))
    for part in (
        "57 devices known",
        "telemetry → both",
        "10 devices +10",
        "1% -",
        "a person approves",
        "gate telemetry.completeness >= 99.99%",
        "car-0000",
        "1: cannot be updated",
        "✗ The old side does not answer.",
        "✗ It cannot start like this.",
    ):
        assert part in text, part
    assert max(len(line.plain) for line in lines(found, 80) if line.plain.startswith("  car")) <= 80
    assert json.dumps(found)


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    """docs/cli.md is written from the commands: `make docs` after a change."""
    script = Path(__file__).parents[2] / "scripts" / "make_cli_docs.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, env=CLEAN, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_narrow_table_keeps_names_whole_and_says_which_columns_it_leaves_out() -> None:
    from fleetlift.cli.screen import fitting

    assert fitting([36, 6, 0, 19], 80) == {0: 36, 1: 6, 3: 19}  # an empty column goes
    assert fitting([36, 6, 100], 80) == {0: 36, 1: 6, 2: 34}  # a long one gives way
    assert fitting([36, 19, 19, 30], 80) == {0: 36, 1: 19, 2: 19}  # the rightmost is left out
    assert fitting([100, 5], 80) == {0: 100}


@pytest.mark.parametrize(
    ("status", "detail", "told"),
    [
        ("would-execute", {"reasonCode": "WOULD_EXECUTE", "reasonDescription": ""}, ""),
        ("failed", {"reasonCode": "JAMMED", "reasonDescription": "ice"}, ", JAMMED: ice"),
        ("succeeded", {"result": {"locked": True}}, '  {"result": {"locked": true}}'),
    ],
)
def test_a_commands_outcome_reads_as_words(status: str, detail: dict[str, object], told: str) -> None:
    from fleetlift.cli.command import outcome

    assert outcome(status, detail) == told


def test_help_texts_break_where_the_screen_ends() -> None:
    command = cli.load("serve")
    assert all("\n" not in paragraph for paragraph in command.help.split("\n\n"))
