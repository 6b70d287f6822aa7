"""`fleetlift doctor` tells what is wrong, and what to do, before somebody needs to ask."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetlift.cli.doctor import Finding, Patient, State, examine
from fleetlift.testing import running_backend, scratch_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


def patient(data: Path, *, http: str = "127.0.0.1:0") -> Patient:
    return Patient(data=data, http=http, mqtt="127.0.0.1:0", running=None)


def failures(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.state is State.FAIL}


def test_a_fit_machine_has_no_failures(directory: Path) -> None:
    """Versions of both engines are found, ports are free, there is space."""
    findings = examine(patient(directory / "data"))
    assert not failures(findings)
    assert {"python", "nats", "postgresql", "disk", "open files", "clock", "data"} <= {
        f.check for f in findings
    }


def test_a_busy_port_fails_with_advice(directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        found = failures(examine(patient(directory, http=f"127.0.0.1:{taken.getsockname()[1]}")))
    assert "choose another address" in found["port http"].advice


def test_secrets_that_others_can_read_fail(directory: Path) -> None:
    (directory / "keys.json").write_text("{}")
    (directory / "keys.json").chmod(0o644)
    assert failures(examine(patient(directory)))["data"].advice.startswith("chmod 600")


def test_a_cluster_of_another_version_fails(directory: Path) -> None:
    """PostgreSQL does not start on the files of another major version: better known beforehand."""
    cluster = directory / "postgresql" / "data"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("15\n")
    assert "dump it" in failures(examine(patient(directory)))["data"].advice


def test_half_an_environment_fails(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETLIFT_NATS_URL", "nats://127.0.0.1:1")
    assert "FLEETLIFT_NATS_ISSUER_SEED" in failures(examine(patient(directory)))["environment"].text


async def test_a_running_backend_is_well_and_its_ports_are_its_own(directory: Path) -> None:
    """On the command line, as JSON, with exit status 0."""
    async with running_backend(directory / "data") as backend:
        addresses = ["--http", backend.settings.http, "--mqtt", backend.settings.mqtt]
        command = [sys.executable, "-m", "fleetlift.cli.main", "doctor", "--data", str(backend.data_dir)]
        done = await asyncio.to_thread(
            subprocess.run, [*command, *addresses, "--json"], capture_output=True, check=False
        )
        findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
        assert findings["backend"]["text"].startswith("ready at")
        assert "instance that runs here" in findings["port http"]["text"]
        assert findings["database"]["state"] == "ok"
        assert done.returncode == 0, findings
