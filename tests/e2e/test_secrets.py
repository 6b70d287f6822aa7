"""No secret of a migration gets out, whatever goes wrong in it: logs, answers, reports, command lines."""

import asyncio
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
from small_world import small_world

from fleetlift.config import read_env
from fleetlift.core import mqtt
from fleetlift.sides.fleetlift import credential_of, engine_key
from fleetlift.testing import scratch_directory

# Files whose purpose is to hold a secret. They must be closed to others; every other file must hold none.
KEEPERS = {
    "admin.env",
    "keys.json",
    "run.json",
    "nats.conf",
    "key.pem",
    "ca-key.pem",
    "server-key.pem",
    "owner.key",
    "engine.key",
    "legacy.sqlite",  # the old side's own, with the orders that carry passwords: docs/decisions/0010
    "legacy.sqlite-wal",
    "legacy.sqlite-shm",
    "device.db",
    "device.db-wal",
    "device.db-shm",
}
DATABASES = {"postgresql", "nats"}  # directories of the engines: PostgreSQL's and NATS Server's own, closed


def secrets_of(backend: Path, legacy: Path) -> dict[str, bytes]:
    """Every secret that is there, by what it is."""
    found = {
        "administrator's token": read_env(backend / "admin.env")["FLEETLIFT_TOKEN"],
        "owner key": (legacy / "owner.key").read_text().strip(),
        "planted device password": PLANTED_PASSWORD,
        "planted token text": PLANTED_TOKEN,
        "password of a database in a plan": PLANTED_URL_PASSWORD,
    }
    for name, value in json.loads((backend / "keys.json").read_text()).items():
        found[f"key {name}"] = value
    found |= {f"device key {n}": f"not-a-real-key-of-car-{n}" for n in range(3)}
    for path in backend.rglob("*.pem"):
        if b"PRIVATE KEY" in path.read_bytes():
            found[f"private key {path.name}"] = path.read_text().splitlines()[1]
    return {name: value.encode() for name, value in found.items() if len(value) >= 12}


PLANTED_PASSWORD = "marker-PASSWORD-7f3a9c51e2"
PLANTED_TOKEN = "flt_0123456789abcdef_marker-TOKEN-5d2b8e10a4f7c3961b0e7a2d4c8f"
PLANTED_URL_PASSWORD = "marker-URLPASS-91ab37c0"


def command(url: str, token: str, *words: str) -> bytes:
    """What the command line said, on both of its outputs."""
    done = subprocess.run(
        [sys.executable, "-m", "fleetlift.cli.main", *words],
        env={"PATH": "/usr/bin:/bin", "FLEETLIFT_URL": url, "FLEETLIFT_TOKEN": token, **_python_path()},
        capture_output=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def _python_path() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PYTHONPATH", "HOME") if name in os.environ}


async def test_no_secret_leaves_its_own_file() -> None:
    """Bad credentials, refused sign-ins, a side that fails, bad plans, a lost engine: none tells any."""
    said: dict[str, bytes] = {}
    with scratch_directory() as directory:
        async with small_world(directory, devices=3) as world:
            backend, url = world.backend, world.backend.url
            api = httpx.AsyncClient(
                base_url=f"{url}/api/v1", headers={"authorization": f"Bearer {backend.token}"}, timeout=30
            )
            async with api:
                # Credentials, good and bad.
                for kind, value in (
                    ("password", PLANTED_PASSWORD),
                    ("x509", PLANTED_PASSWORD),
                    ("k", PLANTED_PASSWORD),
                ):
                    answer = await api.put(
                        "/devices/planted",
                        json={"tenant": "carshare", "credentials": [{"kind": kind, "value": value}]},
                    )
                    said[f"put {kind}"] = answer.content
                await api.post("/tenants", json={"id": "carshare"})
                said["put again"] = (
                    await api.put(
                        "/devices/planted",
                        json={
                            "tenant": "carshare",
                            "credentials": [{"kind": "password", "value": PLANTED_PASSWORD}],
                        },
                    )
                ).content
                # Refused sign-ins at every door.
                for user in ("planted", "nobody", "svc"):
                    reader, writer = await asyncio.open_connection(*backend.mqtt)
                    hello = mqtt.Connect(
                        client_id=user, username=user, password=(PLANTED_PASSWORD + "x").encode()
                    )
                    writer.write(mqtt.encode(hello))
                    said[f"sign-in {user}"] = await asyncio.wait_for(reader.read(100), 10)
                    writer.close()
                for header in (f"Bearer {PLANTED_TOKEN}", f"Basic {PLANTED_TOKEN}", PLANTED_TOKEN):
                    async with httpx.AsyncClient() as stranger:
                        answer = await stranger.get(
                            f"{url}/api/v1/devices", headers={"authorization": header}
                        )
                        said[f"refused {header[:6]}"] = answer.content
                # Plans that are wrong about secrets.
                wrong = [
                    world.plan.replace("key_file:", f"password: {PLANTED_URL_PASSWORD}, key_file:"),
                    world.plan.replace("tcp://", f"tcp://owner:{PLANTED_URL_PASSWORD}@"),
                    world.plan.replace("owner.key", "storage.db"),
                    world.plan.replace(
                        str(world.legacy.data_dir / "owner.key"), str(backend.data_dir / "keys.json")
                    ),
                    world.plan.replace(world.legacy.url, "tcp://127.0.0.1:1"),
                ]
                for n, plan in enumerate(wrong):
                    for path in ("/migrations/check", "/migrations"):
                        said[f"plan {n} {path}"] = (await api.post(path, json={"plan": plan})).content
                    file = directory / f"wrong-{n}.yaml"
                    file.write_text(plan)
                said["check"] = await asyncio.to_thread(
                    command, url, backend.token, "migrate", "check", str(directory / "wrong-1.yaml")
                )
                # A migration, far enough to have given out passwords and sent commands by both sides.
                await world.start()
                await world.until(lambda s: s["rung"] >= 4 or s["phase"] == "finished", 90)
                lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
                said["command lines"] = "\n".join(lines).encode()
                for path in (
                    "/devices",
                    "/devices/planted",
                    "/devices/car-0",
                    "/devices/car-0/commands",
                    "/devices/car-0/shadow?name=fleetlift",
                    "/devices/car-0/ledger",
                    "/tokens",
                    "/dead-letters",
                    "/migrations/small",
                    "/migrations/small/plan",
                    "/migrations/small/report",
                    "/migrations/small/devices",
                    "/migrations/small/events?limit=1000",
                ):
                    said[f"GET {path}"] = (await api.get(path)).content
                said["metrics"] = (await api.get(f"{url}/metrics")).content
                said["openapi"] = (await api.get(f"{url}/api/openapi.json")).content
                for token, words in (
                    (backend.token, ("token", "list")),
                    (backend.token, ("migrate", "events", "small")),
                    (backend.token, ("doctor",)),
                    (PLANTED_TOKEN, ("device", "list")),
                ):
                    said[" ".join(words)] = await asyncio.to_thread(command, url, token, *words)
                # An engine that dies under its workers makes tracebacks.
                for child in psutil.Process(backend.pid).children(recursive=True):
                    if "nats-server" in " ".join(child.cmdline()[:1]):
                        child.kill()
                await asyncio.sleep(1.0)
            secrets = secrets_of(backend.data_dir, world.legacy.data_dir)
            said["printed"] = backend.output.read_bytes()
            key = engine_key(backend.data_dir)
            secrets |= {f"new password of {d}": credential_of(key, d).encode() for d in world.devices}
        assert len(secrets) >= 12
        leaks = []
        for file in sorted(p for p in directory.rglob("*") if p.is_file()):
            inside = set(file.relative_to(directory).parts)
            if inside & DATABASES or file.name.startswith("wrong-"):  # the last: the test's own
                continue
            data = file.read_bytes()
            told = [name for name, value in secrets.items() if value in data]
            if file.name in KEEPERS or "devices" in inside:
                assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, f"{file} is open to others"
            elif told:
                leaks.append((str(file.relative_to(directory)), told))
        for what, data in said.items():
            told = [name for name, value in secrets.items() if value in data]
            if told:
                leaks.append((what, told))
        assert leaks == []
