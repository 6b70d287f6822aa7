"""A log on three servers of a NATS cluster: one of them dies, and nothing acknowledged is lost."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fleetlift.bus.connect import connected, ensure_log
from fleetlift.bus.embedded import server_binary
from fleetlift.bus.log import read
from fleetlift.bus.publish import Publisher
from fleetlift.bus.subjects import STREAM
from fleetlift.config import Settings, overrides_from
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.testing import free_port, scratch_directory

CONFIGURATION = """
server_name: n{number}
listen: "127.0.0.1:{client}"
jetstream {{ store_dir: "{store}", sync_interval: "100ms" }}
cluster {{ name: edge, listen: "127.0.0.1:{route}", routes: [{routes}] }}
accounts {{
  DEV {{ jetstream: enabled, users: [ {{user: svc, password: svc}} ] }}
  SYS {{ users: [ {{user: sys, password: sys}} ] }}
}}
system_account: SYS
"""


class Cluster:
    """Three servers; `kill(n)` is SIGKILL."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = [free_port() for _ in range(3)]
        self._routes = [free_port() for _ in range(3)]
        self._processes: list[asyncio.subprocess.Process] = []
        self.settings = Settings(
            data_dir=str(directory),
            nats_url=",".join(f"nats://127.0.0.1:{port}" for port in self.ports),
            nats_svc_user="svc",
            nats_svc_password="svc",
            log_max_bytes=256 * 1024**2,
            log_replicas=3,
        )

    async def start(self) -> None:
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self._routes)
        for number, (client, route) in enumerate(zip(self.ports, self._routes, strict=True)):
            file = self.directory / f"n{number}.conf"
            store = self.directory / f"n{number}"
            file.write_text(
                CONFIGURATION.format(number=number, client=client, route=route, routes=routes, store=store)
            )
            with (self.directory / f"n{number}.log").open("wb") as log:
                self._processes.append(
                    await asyncio.create_subprocess_exec(
                        str(server_binary()), "-c", str(file), stdout=log, stderr=log
                    )
                )

    def kill(self, number: int) -> None:
        os.kill(self._processes[number].pid, signal.SIGKILL)

    async def stop(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch_directory() as path:
        yield path


@pytest.mark.timeout(150)
async def test_the_leader_of_the_log_dies_and_nothing_acknowledged_is_lost(directory: Path) -> None:
    """Publishers and readers find another server of the list; the log has all, on the two that are left."""
    cluster = Cluster(directory)
    await cluster.start()
    try:
        leader = await made_log(cluster.settings)
        publisher = Publisher(cluster.settings, name="test")
        acknowledged: list[bytes] = []
        for number in range(600):
            if number == 200:
                cluster.kill(leader)
            payload = b"%d" % number
            async with asyncio.timeout(60):
                while True:
                    try:
                        await publisher.to_log("dt/car-1/x", payload)
                        break
                    except Unavailable:  # not known to be stored: again, as a device does
                        await asyncio.sleep(0.2)
            acknowledged.append(payload)
        await publisher.close()
        found = [
            message.payload
            async for batch in read(
                cluster.settings, after=None, filters=["dt.>"], name="all", until_end=True
            )
            for message in batch
        ]
        assert set(acknowledged) <= set(found)
        assert list(dict.fromkeys(found)) == acknowledged, "in order, however often one came"
    finally:
        await cluster.stop()


async def made_log(settings: Settings) -> int:
    """Make the log as `serve` does, twice; returns the number of the server that leads it."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(Exception):  # the cluster has not met yet
                async with connected(settings, user="svc", password="svc", name="setup") as client:
                    await ensure_log(client, settings)
                    await ensure_log(client, settings)
                    info = await client.jetstream().stream_info(STREAM)
                    assert info.config.num_replicas == 3
                    assert info.cluster is not None
                    assert info.cluster.leader is not None
                    return int(info.cluster.leader[1:])
            await asyncio.sleep(0.3)


def test_replicas_need_a_cluster() -> None:
    with pytest.raises(BadInput, match="FLEETLIFT_LOG_REPLICAS=3: the embedded NATS is one server"):
        overrides_from({"FLEETLIFT_LOG_REPLICAS": "3"})
    with pytest.raises(BadInput, match="give 1, 3 or 5"):
        overrides_from({"FLEETLIFT_LOG_REPLICAS": "2", "FLEETLIFT_NATS_URL": "nats://a:1,nats://b:1"})
    assert msgspec.structs.asdict(overrides_from({}))["log_replicas"] == 1
