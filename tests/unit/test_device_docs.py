"""docs/device.md says what the agent does."""

import re
from pathlib import Path

import msgspec

from fleetlift.device.agent import AgentSettings
from fleetlift.device.moves import MOVES

PAGE = (Path(__file__).parents[2] / "docs" / "device.md").read_text()


def test_the_table_of_phases_is_the_agents_own() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| `([a-z-]+)` \| `([a-z-]+)` \|$", PAGE, re.M)
    assert rows == [
        (phase.value, cause.value, after.value)
        for phase, moves in MOVES.items()
        for cause, after in moves.items()
    ]


def test_every_limit_is_on_the_page_with_its_default() -> None:
    rows = {
        name: float(value.strip())
        for names, values in re.findall(r"^\| (`[a-z_`, ]+`) \| ([\d., ]+) \|", PAGE, re.M)
        for name, value in zip(re.findall(r"`(\w+)`", names), values.split(","), strict=True)
    }
    expected = msgspec.to_builtins(AgentSettings())
    expected.pop("updatable")
    assert rows == {name: float(value) for name, value in expected.items()}
