"""`fleetlift certificate` on a terminal: exit status and what it says, with nothing but the file."""

import json
from pathlib import Path

import pytest
from certified import KEY, STRANGER, Recorded, certificate
from click.testing import CliRunner

from fleetlift.cli.main import load
from fleetlift.core.certificate import render
from fleetlift.core.migration import Phase
from fleetlift.migrate.certificate import public_text, signing_key
from fleetlift.migrate.planfile import parse_plan

PLAN = """
migration: connect
fleet: {tenant: carshare}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
confidence: none
steps:
  - move: telemetry
    waves: [1 device, 100%]
    bake: 5s
    gates: [telemetry.completeness >= 99%]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    p = Recorded(parse_plan(PLAN), 6, text=PLAN)
    p.until(Phase.FINISHED)
    path = tmp_path_factory.mktemp("certificate") / "connect-certificate.json"
    path.write_bytes(render(certificate(p)))
    return path


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(load("certificate"), [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def test_a_whole_certificate_verifies_and_the_limits_of_that_are_told(file: Path) -> None:
    status, shown, remark = run("verify", file)
    assert status == 0
    assert "✓ Every check has passed." in shown and "6 moved" in shown
    assert "--key" in remark
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_the_issuer_is_checked_by_a_key_or_a_file_that_holds_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(public_text(KEY) + "\n")
    for key in (public_text(KEY), tmp_path / "key"):
        status, _, remark = run("verify", file, "--key", key)
        assert (status, remark) == (0, "")
    status, shown, _ = run("verify", file, "--key", public_text(STRANGER))
    assert status == 1 and "not by the key that was given" in shown
    status, _, told = run("verify", file, "--key", "my key")
    assert status == 2 and "public key" in told


def test_a_changed_certificate_fails_and_what_was_changed_is_named(file: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.json"
    changed.write_bytes(file.read_bytes().replace(b'"told":5', b'"told":6', 1))
    status, shown, _ = run("verify", changed)
    assert status == 1
    assert "✗ failed" in shown and "(wave_opened" in shown and "does not hold" in shown
    status, shown, _ = run("verify", changed, "--json")
    document = json.loads(shown)
    assert status == 1 and not document["ok"]
    assert {c["name"] for c in document["checks"] if not c["ok"]} >= {"digest", "signature", "audit log"}
    changed.write_bytes(b"\x00")
    assert run("verify", changed)[0] == 1
    assert run("verify", tmp_path / "none.json")[0] == 2


def test_the_key_is_shown_of_a_servers_directory_alone(tmp_path: Path) -> None:
    """A mistyped directory gets no key."""
    result = CliRunner().invoke(load("certificate"), ["key", "--data", str(tmp_path)])
    assert result.exit_code == 1 and "data directory" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "admin.env").touch()
    status, shown, _ = run("key", "--data", tmp_path)
    assert (status, shown.strip()) == (0, public_text(signing_key(tmp_path)))
    assert (tmp_path / "certificate.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "certificate.key").write_text("broken")
    result = CliRunner().invoke(load("certificate"), ["key", "--data", str(tmp_path)])
    assert "restore it from a backup" in str(result.exception)
