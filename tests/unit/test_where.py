"""The expression that selects devices: what it selects, and what it says when it is written wrongly."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.where import attributes_used, evaluate, fields_used, parse

CAR: dict[str, object] = {
    "id": "car-7",
    "tenant": "carshare",
    "attributes": {
        "hardware": 3,
        "model": "leon",
        "fw": "1.10.0",
        "electric": False,
        "serial": "17",
        "odd key": 1,
        "trim": {"level": 2},
    },
    "connected": True,
    "connection": {"reason": "Kicked"},
    "shadow": {"reported": {"locked": True, "speed": 42.5}},
}


@pytest.mark.parametrize(
    "text",
    [
        "attributes.hardware >= 3 and connected",
        'attributes.model in ["leon", "twizy"]',
        "attributes.model == 'leon' or attributes.model == 'zoe'",
        "not (attributes.hardware < 3)",
        "attributes.model not in ['zoe']",
        'id like "car-*"',
        'id like "*ar*7*"',
        'id not like "bus-*"',
        "exists(attributes.fw) and not exists(attributes.nothing)",
        "attributes.fw >= 1.9.3",
        "attributes.fw > 1.9",
        'attributes.fw > "1.9"',
        "attributes.fw == 1.10",
        'attributes.fw > "1.10.0-rc1"',
        "attributes.serial == 17",
        "attributes.serial > 9",
        "attributes.electric == false",
        "attributes.electric != true",
        "attributes.trim.level == 2.0",
        'attributes."odd key" == 1',
        "shadow.reported.locked and shadow.reported.speed > 40",
        'connection.reason != "Read Error"',
        "3 <= attributes.hardware",
        "attributes.hardware == 4 or attributes.hardware == 3 and connected",
        "attributes.hardware > -1",
        'tenant == "carshare"',
        "true",
    ],
)
def test_selects_the_car(text: str) -> None:
    assert evaluate(parse(text), CAR)


@pytest.mark.parametrize(
    "text",
    [
        "attributes.hardware > 3",
        "attributes.nothing == 1",
        "attributes.nothing != 1",
        "attributes.nothing",
        "attributes.nothing < 1 or attributes.nothing >= 1",
        "attributes.model",
        "attributes.electric",
        "attributes.electric == 0",
        "attributes.model < 5",
        "attributes.fw < 1.9",
        'attributes.hardware like "3*"',
        "attributes.hardware.deeper == 3",
        "not connected",
        "false",
    ],
)
def test_does_not_select_the_car(text: str) -> None:
    """An absent field makes every comparison false, also `!=`; values of other kinds do not compare."""
    assert not evaluate(parse(text), CAR)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "expected a field or a value, found the end"),
        ("attributes.hardware = 3", 21, "use '=='"),
        ("attributes.hardware >= ", 24, "expected a field or a value"),
        ("attributes.model == leon", 21, 'A text is written as "leon"'),
        ("hardware >= 3", 1, "'hardware' is not a field; expected id, tenant, connected, attributes.…"),
        ("(connected", 11, "expected ')', found the end"),
        ("connected connected", 11, "expected 'and', 'or' or the end"),
        ('id == "car', 7, "not closed"),
        ("id in 3", 7, "expected a list"),
        ('id in ["a" "b"]', 12, "expected ']'"),
        ("id in [a]", 8, 'write a text as "text"'),
        ("attributes == 3", 12, "expected '.' and a name"),
        ("id.x == 3", 3, "leave out the '.'"),
        ("exists attributes.x", 8, "expected '('"),
        ("attributes.x & 3", 14, "'&' is not expected here"),
        ("3", 2, "expected a comparison"),
        ("id not 3", 8, "expected 'in' or 'like'"),
        ("(" * 40 + "connected" + ")" * 40, 34, "more than 32 levels"),
    ],
)
def test_an_error_names_the_column_and_what_was_expected(text: str, column: int, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert f"column {column}:" in str(caught.value)
    assert says in str(caught.value)


def test_a_condition_of_endless_length_is_refused() -> None:
    with pytest.raises(BadInput, match="at most 4096"):
        parse("connected or " * 1000 + "connected")


def test_names_of_what_it_reads() -> None:
    expression = parse("attributes.a.b > 1 and (exists(attributes.c) or connected) and id in ['x']")
    assert attributes_used(expression) == {"attributes.a.b", "attributes.c"}
    assert fields_used(expression) == {"attributes.a.b", "attributes.c", "connected", "id"}


def test_a_long_row_of_stars_takes_no_longer() -> None:
    assert not evaluate(parse(f'id like "{"a*" * 500}b"'), {"id": "a" * 3000})


@given(st.text(max_size=60))
def test_whatever_is_written_either_parses_or_is_refused_as_bad_input(text: str) -> None:
    try:
        expression = parse(text)
    except BadInput:
        return
    evaluate(expression, CAR)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_numbers_order_as_numbers(a: int, b: int) -> None:
    record: dict[str, object] = {"attributes": {"a": a}}
    assert evaluate(parse(f"attributes.a < {b}"), record) == (a < b)
    assert evaluate(parse(f"attributes.a == {b}"), record) == (a == b)


def test_no_pattern_takes_long_on_any_document() -> None:
    """A viewer writes the pattern, a device the text; one process answers everybody."""
    text = "a" * 64_000
    patterns = [f"*{'a' * 3000}b", f"*{'a' * 2000}b{'a' * 1000}*", f"{'a*' * 1500}b*", f"*{'ab' * 1500}*"]
    started = time.perf_counter()
    for pattern in patterns:
        assert not evaluate(parse(f'attributes.x like "{pattern}"'), {"attributes": {"x": text}})
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("*", "", True),
        ("**b", "ab", True),
        ("a*b*c", "abxbc", True),
        ("a*bc*c", "abc", False),
        ("*ab", "aab", True),
        ("ab", "abc", False),
        ("", "", True),
    ],
)
def test_stars_stand_for_any_text(pattern: str, text: str, matches: bool) -> None:
    assert evaluate(parse(f'id like "{pattern}"'), {"id": text}) is matches
