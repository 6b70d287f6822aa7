"""The load generator against real backends: nothing lost, nothing hidden, and itself under suspicion."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from fault_proxy import BOTH, FaultProxy
from fleetlift.core.errors import Unavailable
from fleetlift.core.gates import judge, parse_gate
from fleetlift.core.load_result import LoadResult, load_samples
from fleetlift.core.migration import Verdict
from fleetlift.core.workload import Scenario
from fleetlift.load.credentials import Login
from fleetlift.load.run import Progress, Target, run_load
from fleetlift.load.scenario import dump_scenario, parse_scenario
from fleetlift.load.witness import Database, FleetliftApi
from fleetlift.testing import RunningBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")


def scenario(devices: int = 8, rate: str = "200/s", for_: str = "2s", more: str = "") -> Scenario:
    return parse_scenario(
        f"""
scenario: test
devices: {devices}
for: {for_}
rate: {rate}
{more}
classes:
  - class: parked
    share: 50%
    topics: dt/{{device}}/status
    background: 1/s
  - class: driving
    share: 50%
    topics:
      dt/{{device}}/status: 3
      dt/{{device}}/engine/oil: 1
    size: 100-300
    active: {{rate: 2/s, for: 10s, every: 20s}}
"""
    )


@contextlib.asynccontextmanager
async def api_of(backend: RunningBackend) -> AsyncIterator[FleetliftApi]:
    async with FleetliftApi(backend.url, backend.token) as api:
        yield api


def mqtt_url(address: tuple[str, int]) -> str:
    return f"mqtt://{address[0]}:{address[1]}"


async def on_time(play: Callable[[], Awaitable[LoadResult]]) -> LoadResult:
    """A run that counts: on a busy machine the generator may be late, and it is tried again."""
    for _ in range(5):
        result = await play()
        if result.valid:
            return result
    pytest.fail(f"no run counted: {result.invalid}")


def passes(result: LoadResult, gate: str) -> bool:
    parsed = parse_gate(gate)
    return judge(parsed, load_samples(result)[parsed.metric]).verdict is Verdict.ADVANCE


async def test_what_is_acknowledged_is_stored_and_read_again(backend: RunningBackend) -> None:
    """The account balances, and the target's own ledger and messages agree with it; the devices are gone."""
    async with api_of(backend) as api:
        target = Target(url=mqtt_url(backend.mqtt), api=api, provision=True)
        result = await on_time(lambda: run_load(scenario(), target, processes=2))
        left = await api.call("GET", "/devices", params={"tenant": "load-test"})
    counts = result.counts
    assert counts.balanced and counts.offered == counts.accepted > 200
    assert result.processes == 2
    assert sum(c.counts.offered for c in result.classes) == counts.offered
    assert sum(p.offered for p in result.series) == counts.offered
    assert sum(p.accepted for p in result.series) == counts.accepted
    assert result.stored is not None
    assert result.stored.stored == result.stored.reread == counts.accepted
    assert (result.lost, result.stored.doubled) == (0, 0)
    for gate in ("load.errors == 0", "load.lost == 0", "load.latency.p99 <= 10s", "load.rate >= 10/s"):
        assert passes(result, gate)
    assert left["items"] == []


async def test_a_stall_of_the_server_shows_in_the_latency(backend: RunningBackend) -> None:
    """Nothing passes for 200 ms: whoever was meant to send meanwhile waits, and every one of them counts.

    A generator that waits for answers before it sends again would have one late message a connection.
    """
    stalled = asyncio.Event()
    async with api_of(backend) as api, FaultProxy(backend.mqtt) as proxy:

        async def stall() -> None:
            await stalled.wait()
            proxy.stalled = BOTH
            await asyncio.sleep(0.2)
            proxy.stalled = frozenset()

        def progress(seen: Progress) -> None:
            if seen.at_s >= 1:
                stalled.set()

        stalling = asyncio.create_task(stall())
        target = Target(url=mqtt_url(proxy.address), api=api, provision=True)
        result = await run_load(scenario(for_="3s"), target, progress=progress)
        await stalling
    assert result.errors == 0
    assert result.latency.p99_s >= 0.15
    assert result.latency.p50_s < result.latency.p99_s
    assert result.late.p99_s < result.latency.p99_s  # it was not the generator
    assert max(p.p99_s or 0 for p in result.series) >= 0.15
    assert not passes(result, "load.latency.p99 <= 100ms")
    assert result.lost == 0


async def test_a_starved_generator_makes_the_run_invalid(backend: RunningBackend) -> None:
    """Halted for half a second it is late; its figures pass no gate, though the target did nothing wrong."""
    pids: list[int] = []
    halted = asyncio.Event()

    async def halt() -> None:
        await halted.wait()
        os.kill(pids[0], signal.SIGSTOP)
        try:
            await asyncio.sleep(0.5)
        finally:
            os.kill(pids[0], signal.SIGCONT)

    def progress(seen: Progress) -> None:
        if seen.at_s >= 1:
            halted.set()

    async with api_of(backend) as api:
        halting = asyncio.create_task(halt())
        target = Target(url=mqtt_url(backend.mqtt), api=api, provision=True)
        result = await run_load(
            scenario(for_="3s"), target, processes=1, progress=progress, on_start=pids.extend
        )
        await halting
    assert any("the generator was late" in why for why in result.invalid), result.invalid
    assert result.counts.balanced
    assert not passes(result, "load.errors == 0")
    assert not passes(result, "load.latency.p99 <= 10s")


async def test_more_than_a_core_can_do_makes_the_run_invalid(backend: RunningBackend) -> None:
    """A message each 0.1 µs: no process gets through its loop that often, whatever the machine."""
    async with api_of(backend) as api, api.provisioned(4, "more", lambda *_: None) as logins:
        asked = scenario(devices=4, rate="10000000/s", for_="100ms")
        result = await run_load(asked, Target(url=mqtt_url(backend.mqtt), logins=logins), processes=1)
    assert result.invalid
    assert result.counts.balanced


async def test_storms_cut_connections_and_lose_nothing(backend: RunningBackend) -> None:
    """Devices that come back send what waited; its latency counts from when it was meant to be sent."""
    storms = "storms:\n  - {at: 500ms, share: 100%, within: 1s}"
    async with api_of(backend) as api:
        target = Target(
            url=mqtt_url(backend.mqtt),
            api=api,
            provision=True,
            witness=Database(backend.settings.database_url),
        )
        result = await run_load(scenario(for_="2s", more=storms), target, processes=2)
    assert result.reconnects >= 8
    assert result.errors == 0 and result.lost == 0
    assert result.stored is not None and result.stored.doubled == 0
    assert result.latency.max_s > 0.1
    assert min(p.connected for p in result.series) < 8


async def test_connections_that_the_network_cuts_are_made_again(backend: RunningBackend) -> None:
    cut = asyncio.Event()
    async with api_of(backend) as api, FaultProxy(backend.mqtt) as proxy:

        def progress(seen: Progress) -> None:
            if seen.at_s >= 1 and not cut.is_set():
                cut.set()
                proxy.cut()

        target = Target(url=mqtt_url(proxy.address), api=api, provision=True)
        result = await run_load(scenario(for_="3s"), target, progress=progress)
    assert result.closed >= 8 and result.reconnects >= 8
    assert result.counts.balanced
    assert result.errors == 0 and result.lost == 0
    assert any("closed a connection" in text for text in result.problems)


async def test_a_target_that_dies_leaves_failures_in_the_account(backend: RunningBackend) -> None:
    async with api_of(backend) as api, FaultProxy(backend.mqtt) as proxy:

        def progress(seen: Progress) -> None:
            if seen.at_s >= 1 and proxy.accepted:
                gone.append(asyncio.ensure_future(proxy.refuse()))

        gone: list[asyncio.Future[None]] = []
        target = Target(url=mqtt_url(proxy.address), api=api, provision=True)
        result = await run_load(scenario(for_="3s"), target, progress=progress, drain_s=0.5)
        await asyncio.gather(*gone)
    assert result.counts.balanced
    assert result.counts.failed > 0
    assert not passes(result, "load.errors == 0")
    assert result.lost == 0  # what was acknowledged before is there


async def test_devices_that_are_not_let_in_are_rejected(backend: RunningBackend) -> None:
    async with api_of(backend) as api, api.provisioned(8, "some", lambda *_: None) as logins:
        half = [*logins[:4], *(Login(login.device, "wrong") for login in logins[4:])]
        result = await run_load(scenario(), Target(url=mqtt_url(backend.mqtt), logins=half))
        wrong = [Login(login.device, "wrong") for login in logins]
        with pytest.raises(Unavailable, match="no device could sign in"):
            await run_load(scenario(), Target(url=mqtt_url(backend.mqtt), logins=wrong))
    assert result.counts.balanced
    assert result.counts.rejected > 0 and result.counts.accepted > 0
    assert result.lost is None and "cannot be asked" in result.why_unproved
    assert any("CONNACK 5" in text for text in result.problems)


async def test_a_run_can_be_ended_early(backend: RunningBackend) -> None:
    stop = asyncio.Event()

    def progress(seen: Progress) -> None:
        if seen.at_s >= 1:
            stop.set()

    async with api_of(backend) as api:
        target = Target(url=mqtt_url(backend.mqtt), api=api, provision=True)
        result = await run_load(scenario(for_="1h"), target, progress=progress, stop=stop)
    assert result.lasted_s < 60
    assert result.counts.balanced and result.lost == 0


async def test_a_generator_that_is_killed_ends_the_run_with_an_error(backend: RunningBackend) -> None:
    pids: list[int] = []

    def progress(seen: Progress) -> None:
        if seen.at_s >= 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)

    async with api_of(backend) as api:
        target = Target(url=mqtt_url(backend.mqtt), api=api, provision=True)
        with pytest.raises(Unavailable, match="ended before its work was done"):
            await run_load(scenario(for_="1m"), target, processes=2, progress=progress, on_start=pids.extend)
        left = await api.call("GET", "/devices", params={"tenant": "load-test"})
    assert left["items"] == []


async def test_messages_without_acknowledgement_are_counted_as_sent(backend: RunningBackend) -> None:
    async with api_of(backend) as api:
        target = Target(url=mqtt_url(backend.mqtt), api=api, provision=True)
        result = await run_load(scenario(more="qos: 0", for_="1s"), target)
    assert result.counts.balanced and result.counts.accepted == result.counts.offered > 0
    assert result.stored is None and "QoS 0" in result.why_unproved


# -- HTTP --------------------------------------------------------------------------------------------------


class _Web:
    """A web server of the standard library's sockets, which answers each path with what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 200
        self.close_after = 0  # requests on a connection; 0: it is kept

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *rest = head.decode().strip().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in rest)}
                body = await reader.readexactly(int(headers["content-length"]))
                self.seen.append((first, headers, body))
                answered += 1
                last = answered == self.close_after
                more = b"Connection: close\r\n" if last else b""
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n%s\r\n{}" % (self.status, more))
                await writer.drain()
                if last:
                    break
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


async def test_http_posts_go_to_the_template_with_the_devices_own_credentials() -> None:
    web = _Web()
    async with web.running() as url:
        target = Target(url=url, logins=[Login(f"car-{n}", "secret") for n in range(8)])
        result = await run_load(scenario(for_="1s"), target)
    assert result.protocol == "http"
    assert result.counts.accepted == result.counts.offered == len(web.seen) > 100
    paths = {first.split()[1] for first, _, _ in web.seen}
    assert "/topics/dt/car-0/status?qos=1" in paths
    assert all(headers["authorization"].startswith("Basic ") for _, headers, _ in web.seen)
    bodies = [msgspec.json.decode(body) for _, _, body in web.seen]
    assert all({"ts", "seq", "load"} <= set(body) for body in bodies)


async def test_http_answers_that_say_no_are_rejections_and_closed_connections_are_made_again() -> None:
    web = _Web()
    web.close_after = 5
    async with web.running() as url:
        target = Target(
            url=url + "/up/{password}", auth="none", logins=[Login(f"c{n}", "t") for n in range(8)]
        )
        result = await run_load(scenario(for_="1s"), target)
        web.status = 503
        refused = await run_load(scenario(for_="500ms"), target)
    assert result.counts.accepted == result.counts.offered
    assert result.reconnects > 8
    assert web.seen[0][0] == "POST /up/t HTTP/1.1"
    assert refused.counts.rejected == refused.counts.offered > 0
    assert any("answered 503" in text for text in refused.problems)


# -- the command -------------------------------------------------------------------------------------------


async def test_the_command_runs_checks_and_fits(backend: RunningBackend, tmp_path: Path) -> None:
    """From a terminal: what would be sent, a run with devices made for it, gates, a report."""
    path, page = tmp_path / "scenario.yaml", tmp_path / "report.html"
    path.write_text(dump_scenario(scenario(for_="1s")))

    async def fleetlift(*arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fleetlift", "load", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    status, out, err = await fleetlift("check", str(path), "--rate", "100/s")
    assert (status, err) == (0, "")
    assert "about 100" in out
    status, out, err = await fleetlift(
        *(
            "run",
            str(path),
            "--to",
            mqtt_url(backend.mqtt),
            "--provision",
            "6",
            "--data",
            str(backend.data_dir),
        ),
        *("--gate", "load.errors == 0", "--gate", "load.lost == 0", "--report", str(page), "--json"),
    )
    found = msgspec.json.decode(out)
    assert status == (0 if found["valid"] else 1), err
    assert found["lost"] == 0 and found["devices"] == 6
    assert [gate["holds"] for gate in found["gates"]] == [found["valid"]] * 2
    assert found["counts"]["offered"] == found["counts"]["accepted"] > 0
    assert "Histogram of latencies" in page.read_text()
    status, _, err = await fleetlift("run", str(path), "--to", "mqtt://127.0.0.1:1")
    assert status == 1 and "no device could sign in" in err
