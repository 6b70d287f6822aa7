"""Durations, shares and numbers with units read as people write them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.units import (
    Share,
    format_duration,
    format_quantity,
    parse_duration,
    parse_quantity,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("500ms", 0.5),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("14d", 14 * 86400),
        ("1.5m", 90),
        ("2min", 120),
        ("1w", 604800),
        ("0s", 0),
    ],
)
def test_durations_are_read_as_written(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "-3s", "3 x", "1h30", "1e9d", "9999999d", "½h", "٣s"])
def test_other_texts_are_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(BadInput, match=r"duration|ten years"):
        parse_duration(text)


def test_a_bare_number_is_told_its_unit() -> None:
    with pytest.raises(BadInput, match="as in 30s"):
        parse_duration("30")


@given(st.integers(0, 10**11))
def test_formatting_a_duration_loses_nothing(ms: int) -> None:
    assert parse_duration(format_duration(ms / 1000)) == ms / 1000


@pytest.mark.parametrize(
    ("text", "of_1000"),
    [("10 devices", 10), ("1 device", 1), ("5%", 50), ("0.11%", 2), ("100%", 1000)],
)
def test_shares_are_rounded_up(text: str, of_1000: int) -> None:
    assert parse_share(text).of(1000) == of_1000


def test_a_share_never_exceeds_the_fleet() -> None:
    assert parse_share("10 devices").of(3) == 3
    assert parse_share("100%").of(0) == 0


@pytest.mark.parametrize(
    "text", ["0%", "0 devices", "101%", "5", "-5%", "5 cars", "", "5 %%", "10 devices ."]
)
def test_impossible_shares_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_share(text)


@given(st.integers(1, 10_000), st.integers(0, 10**6))
def test_percentages_have_no_rounding_of_their_own(hundredths: int, total: int) -> None:
    """12.34 % of a fleet is the exact number rounded up, not one more because of binary fractions."""
    share = Share(percent=hundredths / 100)
    assert share.of(total) == -(-hundredths * total // 10_000)


@given(
    st.one_of(
        st.builds(Share, devices=st.integers(1, 10**6)),
        st.builds(Share, percent=st.sampled_from([0.5, 5.0, 99.99, 100.0])),
    )
)
def test_a_share_reads_back_as_it_was_written(share: Share) -> None:
    assert parse_share(str(share)) == share


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("99.9%", 99.9, "%"), ("250ms", 0.25, "s"), ("0", 0, ""), ("-3", -3, "")],
)
def test_quantities_keep_their_unit(text: str, value: float, unit: str) -> None:
    quantity = parse_quantity(text)
    assert (quantity.value, quantity.unit) == (value, unit)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (97.31, "%", "97.31 %"),
        (99.996, "%", "99.996 %"),
        (99.999999, "%", "99.9999+ %"),
        (100.0, "%", "100 %"),
        (0.25, "s", "250 ms"),
        (0.0123, "s", "12.3 ms"),
        (1.3, "s", "1.3 s"),
        (5400.0, "s", "1h30m"),
        (15310, "", "15,310"),
        (0.5, "", "0.5"),
        (1e300, "", "1e+300"),
        (float("inf"), "s", "inf s"),
    ],
)
def test_figures_are_shown_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text


@given(st.text(max_size=30))
def test_no_text_makes_the_parsers_fail_otherwise(text: str) -> None:
    for parse in (parse_duration, parse_share, parse_quantity):
        with contextlib.suppress(BadInput):
            parse(text)
