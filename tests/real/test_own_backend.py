"""Sides are opened by what a plan says of them; installed packages can bring more."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.migration import FleetDevice
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags, Orders
from fleetlift.sides.base import FeedItem, PresenceChanged, Side, SideCommand, TelemetryReceived
from fleetlift.sides.legacy.side import LegacySide
from fleetlift.sides.open import connect_side

PAGE = Path(__file__).parents[2] / "docs" / "your-own-backend.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's example, installed as its entry point says; the directory it serves from."""
    text = PAGE.read_text()
    packages = tmp_path / "packages"
    (info := packages / "files_side-1.dist-info").mkdir(parents=True)
    (packages / "files_side.py").write_text(_block(text, "python"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: files-side\nVersion: 1\n")
    group, point = _block(text, "toml").strip().splitlines()
    assert group == '[project.entry-points."fleetlift.sides"]'
    (info / "entry_points.txt").write_text(f"[fleetlift.sides]\n{point.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(packages))
    (backend := tmp_path / "backend").mkdir()
    return backend


def _block(text: str, kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found[1]


async def _first(side: Side, after: str) -> tuple[str, list[FeedItem]]:
    batches = cast("Any", side.feed(after))
    async with asyncio.timeout(5), aclosing(batches) as opened:
        async for position, items in cast("AsyncIterator[tuple[str, list[FeedItem]]]", opened):
            return position, items
    raise AssertionError("the feed ended")


async def test_the_example_of_the_page_is_a_side_once_it_is_installed(installed: Path) -> None:
    side = connect_side({"files": str(installed)})
    assert side.name == "files"
    with pytest.raises(Unavailable, match="mount the directory"):
        await side.inventory()

    devices = [FleetDevice(id="car-1", attributes={"hardware": 3}, connected=True)]
    (installed / "devices.json").write_bytes(msgspec.json.encode(devices))
    assert await side.inventory() == devices

    def order(epoch: int) -> Orders:
        return Orders(epoch=epoch, migration="m", flags=Flags())

    assert await side.deliver({"car-1": order(3)}) == {}
    assert await side.deliver({"car-1": order(3)}) == {}
    assert set(await side.deliver({"car-1": order(2)})) == {"car-1"}

    report = DeviceReport(epoch=3, phase=DevicePhase.OLD, flags=Flags())
    (installed / "car-1.report.json").write_bytes(msgspec.json.encode(report))
    assert await side.reports() == {"car-1": report}

    command = SideCommand(
        id="c-1", device="car-1", name="lock", params={}, mode="execute", expires_at=time.time() + 9
    )
    await side.send_command(command)
    assert msgspec.json.decode((installed / "c-1.command.json").read_bytes(), type=SideCommand) == command
    await side.close()


async def test_the_examples_feed_goes_on_at_its_position_and_waits_for_the_end_of_a_line(
    installed: Path,
) -> None:
    side = connect_side({"files": str(installed)})
    items = [
        TelemetryReceived(device="car-1", channel="gps", ts=1.0, seq=1, body=b'{"a":1}', received_at=2.0),
        PresenceChanged(device="car-1", connected=False, at=3.0),
    ]
    first, second = (msgspec.json.encode(item) + b"\n" for item in items)
    (installed / "feed.jsonl").write_bytes(first + second[:10])
    position, read = await _first(side, "")
    assert read == items[:1]
    (installed / "feed.jsonl").write_bytes(first + second)
    assert (await _first(side, position))[1] == items[1:]


def test_a_legacy_side_takes_its_key_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEETLIFT_LEGACY_KEY", raising=False)
    with pytest.raises(BadInput, match="FLEETLIFT_LEGACY_KEY"):
        connect_side({"legacy": "tcp://127.0.0.1:7700"})
    (tmp_path / "owner.key").write_text("k" * 43 + "\n")
    assert isinstance(
        connect_side({"legacy": "tcp://127.0.0.1:7700", "key_file": str(tmp_path / "owner.key")}), LegacySide
    )
    monkeypatch.setenv("FLEETLIFT_LEGACY_KEY", "k")
    assert connect_side({"legacy": "tcp://127.0.0.1:7700"}).name == "legacy"


@pytest.mark.parametrize(
    "spec", [{}, {"oracle": "x"}, {"legacy": "http://x:1"}, {"legacy": "tcp://x"}, {"legacy": "tcp://x:1/p"}]
)
def test_a_side_that_cannot_be_opened_says_what_was_expected(
    spec: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETLIFT_LEGACY_KEY", "k")
    with pytest.raises(BadInput, match="legacy"):
        connect_side(spec)


def test_a_builder_given_by_the_caller_goes_before_the_built_in_one() -> None:
    def build(target: str, options: object) -> Side:
        assert (target, options) == ("default", {"x": "1"})
        return LegacySide("tcp://127.0.0.1:1", "k", name="mine")

    assert connect_side({"fleetlift": "default", "x": "1"}, builders={"fleetlift": build}).name == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "FLEETLIFT_URL=http://127.0.0.1\nFLEETLIFT_TOKEN=flt_0123456789\n",
        "",
        "short",
        "x" * 5000,
        "\xff\xfe" * 20,
    ],
)
def test_a_plan_sends_no_file_to_a_server_unless_it_holds_a_key(tmp_path: Path, text: str) -> None:
    """Both are named by the plan: any other file of this machine would be told to whoever listens there."""
    file = tmp_path / "some.file"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(BadInput, match="holds no key"):
        connect_side({"legacy": "tcp://127.0.0.1:7700", "key_file": str(file)})


def test_a_plan_names_no_key_of_fleetlifts_own(tmp_path: Path) -> None:
    """Not by another name, nor from below, nor without an end."""
    data = tmp_path / "data"
    (data / "tls").mkdir(parents=True)
    key = data / "engine.key"
    key.write_text("0123456789abcdef" * 4 + "\n")
    (data / "tls" / "other.key").write_text("0123456789abcdef" * 4)
    (tmp_path / "innocent").symlink_to(key)
    for path in (key, data / "tls" / "other.key", tmp_path / "innocent", data / "tls" / ".." / "engine.key"):
        with pytest.raises(BadInput, match="data directory of Fleetlift"):
            connect_side({"legacy": "tcp://127.0.0.1:7700", "key_file": str(path)})
    with pytest.raises(BadInput, match="holds no key"):
        connect_side({"legacy": "tcp://127.0.0.1:7700", "key_file": "/dev/zero"})
