"""Whatever comes, nothing is raised but the house's own errors, and nothing takes long.

The targets, and what fuzzing has found, are those of `tests/fuzz`; `make fuzz` searches on, by coverage.
"""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.migrate.plan_reader import BadPlan
from fleetlift.migrate.planfile import parse_plan
from fuzz.targets import TARGETS

SEEDS = Path(__file__).parent.parent / "fuzz" / "seeds"
SECONDS_MAX = 20.0  # for any one input: a plan of 256 KiB takes the longest, one or two of them


def held(name: str, data: bytes) -> None:
    """One input through one target, in time."""
    began = time.process_time()
    TARGETS[name](data)
    assert time.process_time() - began < SECONDS_MAX, f"{name} took too long"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, id=f"{name}/{path.name}")
        for name in TARGETS
        for path in sorted((SEEDS / name).iterdir())
    ],
)
def test_what_was_found_before_holds(name: str, path: Path) -> None:
    held(name, path.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {path.name for path in SEEDS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_input_ends_in_an_error_of_the_house(name: str, data: st.DataObject) -> None:
    """A good input with some of its bytes changed, left out, doubled, or garbage put between them."""
    seed = data.draw(st.sampled_from([path.read_bytes() for path in sorted((SEEDS / name).iterdir())]))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(seed)))
        gone = data.draw(st.integers(0, 8))
        seed = seed[:at] + data.draw(st.binary(max_size=8)) * data.draw(st.integers(0, 3)) + seed[at + gone :]
    held(name, seed)


LARGE = {
    "brackets": b"[" * 200_000,
    "braces": b'{"a":' * 60_000,
    "indentation": b"".join(b" " * n + b"a:\n" for n in range(600)),
    "quotes": b"'" * 100_001,
    "not": b"not " * 30_000,
    "parentheses": b"(" * 100_000,
    "units": b"1s" * 60_000 + b"x",
    "spaces": b" " * 200_000 + b"x",
    "stars": b'id like "' + b"*a" * 2_000 + b'"',
    "digits": b"9" * 200_000,
    "levels": b"/" * 200_000,
    "zeros": bytes(200_000),
    "ones": b"\xff" * 200_000,
    "references": b"a: &a [x]\nb: &b [" + b"*a, " * 20_000 + b"]",
    "pairs": b"{" + b",".join(b'"%d":1' % n for n in range(20_000)) + b"}",
}


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("name", TARGETS)
def test_size_and_depth_end_in_an_error_and_in_time(name: str, shape: str) -> None:
    head = {"telemetry": b"dt/car-1/x\n\n", "api-bodies": b"\x00", "journal": b'{"kind":"opened","old":'}
    held(name, head.get(name, b"") + LARGE[shape])


# -- plans, as trees ---------------------------------------------------------------------------------------

PLAN: dict[str, Any] = yaml.safe_load((SEEDS / "plan" / "00").read_text())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["1s", "5%", "10 devices", "telemetry", "new", "both", "*", "devices.silent == 0", "-1s"]
    ),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    if isinstance(tree, dict):
        return [(tree, key) for key in tree] + [place for part in tree.values() for place in places(part)]
    if isinstance(tree, list):
        return [(tree, n) for n in range(len(tree))] + [place for part in tree for place in places(part)]
    return []


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_plan_with_anything_anywhere_is_read_or_told_line_by_line(data: st.DataObject) -> None:
    tree = yaml.safe_load(yaml.safe_dump(PLAN))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(tree)))
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                container[key] = data.draw(TREES)
            case "remove":
                del container[key]
            case _ if isinstance(container, dict):
                container[data.draw(st.text(max_size=12))] = data.draw(TREES)
            case _:
                container.append(data.draw(TREES))
        if not places(tree):
            break
    text = yaml.safe_dump(tree, allow_unicode=True)
    try:
        parse_plan(text, side_kinds=("legacy", "fleetlift"))
    except BadPlan as wrong:
        lines = text.count("\n") + 1
        assert wrong.problems and all(1 <= p.line <= lines and p.text for p in wrong.problems)


@given(text=st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_is_no_plan_and_no_crash(text: str) -> None:
    with pytest.raises(BadInput):
        parse_plan(text, side_kinds=("legacy", "fleetlift"))
