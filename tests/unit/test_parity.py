"""Two copies of one message, compared: what counts as different, what a rule allows, what is behind it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.parity import (
    FIELDS_MAX,
    REST,
    Kind,
    Tally,
    above_noise,
    account,
    cause,
    compare,
    flatten,
    parse_rule,
)
from fleetlift.migrate.parity import assemble
from fleetlift.store.parity import ChannelParity

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_message_is_like_itself(value: object) -> None:
    assert compare("gps", json.dumps(value), json.dumps(value, indent=1)).kind is Kind.MATCHED


@given(VALUES, VALUES)
def test_comparing_is_the_same_from_both_sides(a: object, b: object) -> None:
    first, second = (compare("gps", json.dumps(x), json.dumps(y)) for x, y in ((a, b), (b, a)))
    assert first.kind is second.kind
    assert {d.field for d in first.differences} == {d.field for d in second.differences}


def test_time_and_number_are_the_key_and_not_compared() -> None:
    assert compare("gps", '{"lat": 1}', '{"ts": 5, "seq": 7, "lat": 1.0}').kind is Kind.MATCHED


@pytest.mark.parametrize(
    ("old", "new"),
    [("true", "1"), ("null", "0"), ('""', "null"), ('"1"', "1"), ("[]", "{}"), ("[1,2]", "[2,1]")],
)
def test_what_only_looks_alike_differs(old: str, new: str) -> None:
    assert compare("gps", f'{{"x": {old}}}', f'{{"x": {new}}}').kind is Kind.DIFFERING


def test_each_field_is_named_by_its_path() -> None:
    found = compare("gps", '{"a": {"b": [1, 2]}, "c": 1}', '{"a": {"b": [1, 3]}, "d": 1}')
    assert [d.field for d in found.differences] == ["a.b[1]", "c", "d"]


def test_rules_allow_by_field_channel_and_tolerance() -> None:
    rules = [parse_rule("speed", "1%"), parse_rule("position gps.*", 0.001), parse_rule("server_*", "ignore")]
    assert compare("gps", '{"speed": 100}', '{"speed": 100.9}', rules).kind is Kind.IGNORED
    assert compare("gps", '{"speed": 100}', '{"speed": 102}', rules).kind is Kind.DIFFERING
    near = ('{"gps": {"lat": 1.0}}', '{"gps": {"lat": 1.0005}}')
    assert compare("position", *near, rules).kind is Kind.IGNORED
    assert compare("other", *near, rules).kind is Kind.DIFFERING
    assert compare("gps", '{"server_at": 1}', "{}", rules).kind is Kind.IGNORED
    mixed = compare("gps", '{"server_at": 1, "x": 1}', '{"x": 2}', rules)
    assert mixed.kind is Kind.DIFFERING
    assert {d.field: d.allowed for d in mixed.differences} == {"server_at": True, "x": False}


@pytest.mark.parametrize(("field", "allowed"), [("", 1), ("x", "one"), ("x", True), ("x", -1), ("x", None)])
def test_a_rule_that_says_nothing_is_refused(field: str, allowed: object) -> None:
    with pytest.raises(BadInput):
        parse_rule(field, allowed)


@pytest.mark.parametrize(
    ("old", "new", "likely"),
    [
        (47.123456, 47.1235, "rounding"),
        (47.129, 47.12, "cut off"),
        (10.3, 37.08, "unit: m/s and km/h"),
        (21.5, 70.7, "unit: °C and °F"),
        (1_700_000_000, 1_700_003_600, "time zone"),
        ("2026-01-01T10:00:00+00:00", "2026-01-01T11:00:00+00:00", "time zone"),
        ("2026-01-01T10:00:00Z", "2026-01-01T11:00:00+01:00", "way of writing a time"),
        ("12", 12, "number as text"),
        ("Open", "open", "capitals"),
        ("open ", "open", "white space"),
        (None, 0, "null"),
        (5, -5, "sign"),
        (17, 23, "value"),
        (1e308, -1e308, "other"),
    ],
)
def test_the_likely_cause(old: object, new: object, likely: str) -> None:
    assert cause(old, new) == likely


def test_a_body_of_many_fields_is_bounded() -> None:
    assert set(flatten({f"f{n}": n for n in range(500)})) == {*(f"f{n}" for n in range(FIELDS_MAX)), REST}
    tally = Tally()
    for n in range(300):
        tally.note(compare("gps", f'{{"f{n}": 1}}', f'{{"f{n}": 2}}'))
    assert len(tally.fields) == FIELDS_MAX + 1
    assert sum(field.differing for field in tally.fields.values()) == tally.differing == 300


@given(*[st.integers(0, 10**6)] * 5, st.integers(0, 10**6))
def test_every_message_is_in_one_class(
    old: int, new: int, alike: int, differing: int, ignored: int, apart: int
) -> None:
    compared = alike + differing + ignored
    found = account(
        both=compared + apart,
        only_old=old,
        only_new=new,
        compared=compared,
        differing=differing,
        ignored=ignored,
    )
    assert found.all == old + new + compared + apart
    assert found.matched == alike


def test_only_what_lies_above_the_noise_counts() -> None:
    assert above_noise(5, 100, 50, 1000) == 0.0
    assert above_noise(7, 100, 50, 1000) == pytest.approx(0.02)
    assert above_noise(0, 0, 0, 0) == 0.0


def test_the_account_of_channels_is_summed_and_the_worst_field_comes_first() -> None:
    tally = Tally()
    for n in range(100):
        tally.note(compare("gps", f'{{"lat": {n}, "x": 0}}', f'{{"lat": {n if n > 5 else -n - 1}, "x": 0}}'))
    noise = Tally()
    for n in range(200):
        noise.note(compare("gps", '{"lat": 1}', f'{{"lat": {1 if n else 2}}}'))
    gps = ChannelParity(
        channel="gps",
        devices=2,
        account=account(both=100, only_old=1, only_new=2, compared=100, differing=6, ignored=0),
        tally=tally,
    )
    can = ChannelParity(
        channel="can",
        devices=1,
        account=account(both=50, only_old=0, only_new=0, compared=50, differing=0, ignored=0),
        tally=Tally(compared=50),
    )
    report = assemble("legacy", [gps, can], {"gps": noise}, [parse_rule("y", "ignore")])
    assert report.all == 153
    assert report.account.matched == 144
    assert report.above_noise == pytest.approx(6 / 150 - 1 / 200)
    [field] = report.fields
    assert (field.channel, field.field, field.differing, field.noise) == ("gps", "lat", 6, 1 / 200)
    assert report.rules == ("y: ignore",)
