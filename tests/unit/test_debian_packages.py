"""`scripts/debian_packages.sh` installs what is missing, where it may; else it says what to run."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "debian_packages.sh"


class Machine:
    """A PATH on which dpkg-query, apt-get, id and sudo are stand-ins that note how they are called."""

    def __init__(self, directory: Path, *, installed: str, uid: int = 0, sudo: bool = False) -> None:
        self.calls = directory / "calls"
        self.policy = directory / "policy-rc.d"
        self._bin = directory / "bin"
        self._bin.mkdir()
        self._fails = directory / "fails"
        self._program(
            "dpkg-query", f'for p in {installed or "-"}; do [ "$3" = "$p" ] && echo installed; done; exit 0'
        )
        self._program(
            "apt-get",
            f'echo "apt-get $*" >> {self.calls}; [ -e {self.policy} ] && echo policy >> {self.calls}\n'
            f'case "$1" in install) [ ! -e {self._fails} ];; update) rm -f {self._fails};; esac',
        )
        self._program("id", f"echo {uid}")
        self._program("sudo", 'shift; exec "$@"' if sudo else "exit 1")

    def _program(self, name: str, body: str) -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def needs_update(self) -> None:
        self._fails.touch()

    def run(self, *packages: str) -> tuple[int, str, list[str]]:
        """Exit status, what was said, and how apt-get was called."""
        done = subprocess.run(
            ["sh", str(SCRIPT), *packages],
            env={**os.environ, "PATH": f"{self._bin}:/usr/bin:/bin", "POLICY_RC": str(self.policy)},
            capture_output=True,
            text=True,
        )
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done.returncode, done.stdout + done.stderr, calls


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    assert Machine(tmp_path, installed="knot bind9").run("knot", "bind9") == (0, "", [])


@pytest.mark.parametrize(("uid", "sudo"), [(0, False), (1000, True)])
def test_only_what_is_missing_is_installed_without_starting_it(tmp_path: Path, uid: int, sudo: bool) -> None:
    machine = Machine(tmp_path, installed="knot", uid=uid, sudo=sudo)
    status, said, calls = machine.run("knot", "bind9")
    assert (status, said) == (0, "")
    assert calls == ["apt-get install -y -qq --no-install-recommends bind9", "policy"]
    assert not machine.policy.exists()


def test_old_lists_are_renewed_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, installed="")
    machine.needs_update()
    status, _, calls = machine.run("knot")
    assert status == 0
    assert [call.split()[1] for call in calls if call != "policy"] == ["install", "update", "install"]


def test_who_may_not_install_is_told_the_one_command(tmp_path: Path) -> None:
    status, said, calls = Machine(tmp_path, installed="", uid=1000).run("knot", "bind9")
    assert status == 1 and calls == []
    assert "sudo apt-get install -y --no-install-recommends knot bind9" in said
