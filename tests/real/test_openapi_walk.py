"""Schemathesis walks the description of a running backend: what it answers is what it says it answers.

Whatever is sent, there is no fault inside; statuses, headers and bodies are those described, errors problem
documents, input that the description forbids is refused, and no call works without a token that is said to
need one. The walk is seeded; `python -m tests.fuzz` is where long ones belong.
"""

import asyncio
import os
import sys
from pathlib import Path

import httpx
import pytest

from fleetlift.testing import RunningBackend

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)
# 413: what is too large is refused before it is read, and so before anything else can be wrong with it.
CONFIG = "[checks]\nnegative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415]\n"


async def walk(backend: RunningBackend, directory: Path, token: str, *how: str) -> str:
    """What Schemathesis said; fails unless it found nothing."""
    (directory / "schemathesis.toml").write_text(CONFIG)
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{backend.url}/api/openapi.json",
        "--header",
        f"Authorization: Bearer {token}",
        "--checks",
        ",".join(CHECKS),
        "--workers=1",  # with more, CPython 3.11 now and then fails to parse in two threads at once
        "--seed=1",
        "--no-color",
        "--no-shrink",
        "--request-timeout=10",
        "--generation-database=none",
        "--warnings=off",
        *how,
        cwd=directory,
        env={**os.environ, "NO_PROXY": "*"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    text = output.decode(errors="replace")
    assert process.returncode == 0, "\n".join(line[:400] for line in text.splitlines()[-150:])
    return text


async def test_the_description_is_true_for_an_administrator(backend: RunningBackend, tmp_path: Path) -> None:
    text = await walk(backend, tmp_path, backend.token, "--phases=coverage,fuzzing", "--max-examples=3")
    assert "Tested: " in text
    log = (backend.data_dir / "logs" / "api.log").read_text()
    assert "request_failed" not in log and "Traceback" not in log


async def test_the_description_is_true_for_a_viewer(backend: RunningBackend, tmp_path: Path) -> None:
    async with httpx.AsyncClient(
        base_url=backend.url, headers={"authorization": f"Bearer {backend.token}"}, trust_env=False
    ) as client:
        made = await client.post("/api/v1/tokens", json={"name": "walker", "role": "viewer"})
    await walk(backend, tmp_path, made.json()["token"], "--phases=fuzzing", "--max-examples=3")
