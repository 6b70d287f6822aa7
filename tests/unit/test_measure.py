"""What a measurement does with time and with answers of others, without a database."""

import pytest

from fleetlift.migrate.completeness import Tops
from fleetlift.migrate.free_queries import number, read_prometheus


def test_a_message_still_on_its_way_is_not_expected_yet() -> None:
    """The highest seq known a grace ago is what must have come by now."""
    tops = Tops()
    key = ("car-1", "position")
    for second in range(61):
        tops.add(float(second), {key: second}, grace_s=30.0)
    assert tops.before(30.0)[key] in range(20, 31)
    assert tops.before(30.0)[key] <= 30


def test_nothing_is_expected_of_a_time_before_anything_was_known() -> None:
    """After a restart, completeness has no value until a grace has passed."""
    tops = Tops()
    tops.add(100.0, {("car-1", "position"): 7}, grace_s=30.0)
    assert tops.before(99.9) == {}
    assert tops.before(100.0) == {("car-1", "position"): 7}


def test_its_memory_is_short() -> None:
    """However long a bake lasts, only a handful of moments are kept."""
    tops = Tops()
    for tenth in range(100_000):
        tops.add(tenth / 10, {("car-1", "position"): tenth}, grace_s=30.0)
    assert len(tops._history) <= 8


@pytest.mark.parametrize("value", [None, True, "many", object(), [1]])
def test_what_is_no_number_is_no_measurement(value: object) -> None:
    assert number(value).value is None
    assert number(value).evidence["summary"]


@pytest.mark.parametrize(("value", "is_"), [(3, 3.0), ("0.5", 0.5), (2.5, 2.5)])
def test_a_number_is_one(value: object, is_: float) -> None:
    assert number(value).value == is_


def test_one_series_of_prometheus_is_read() -> None:
    body = b'{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"value":[1,"0.25"]}]}}'
    assert read_prometheus(body).value == 0.25
    scalar = b'{"status":"success","data":{"resultType":"scalar","result":[1,"4"]}}'
    assert read_prometheus(scalar).value == 4.0


@pytest.mark.parametrize(
    "body",
    [
        b"<html>not found</html>",
        b'{"status":"error","error":"parse error"}',
        b'{"status":"success","data":{"resultType":"vector","result":[]}}',
        b'{"status":"success","data":{"resultType":"vector","result":'
        b'[{"metric":{},"value":[1,"1"]},{"metric":{},"value":[1,"2"]}]}}',
    ],
)
def test_any_other_answer_of_prometheus_is_no_data(body: bytes) -> None:
    """No series, two series, an error or another server: a gate on it never passes."""
    sample = read_prometheus(body)
    assert sample.value is None
    assert sample.evidence["summary"]
