"""Gates: how they are written, and the verdict on a measurement."""

import contextlib
import math
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import METRICS, Op, Source, judge, parse_gate, parse_query_gate
from fleetlift.core.migration import GateResult, Sample, Verdict

ADVANCE, HOLD, REVERT = Verdict.ADVANCE, Verdict.HOLD, Verdict.REVERT


# -- the grammar ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "op", "limit", "ratio"),
    [
        ("telemetry.completeness >= 99.99%", Op.GE, 99.99, None),
        ("commands.executed_twice == 0", Op.EQ, 0, None),
        ("telemetry.delay.p99 <= 1.2 x old", Op.LE, None, 1.2),
        ("commands.latency.p95 <= 1.2 x old or 250ms", Op.LE, 0.25, 1.2),
        ("commands.latency.p95<=250ms or 1.2x old", Op.LE, 0.25, 1.2),
        ("devices.silent<3", Op.LT, 3, None),
        ("commands.success >= 0.99 x old", Op.GE, None, 0.99),
    ],
)
def test_gates_are_read_as_written(text: str, op: Op, limit: float | None, ratio: float | None) -> None:
    gate = parse_gate(text)
    assert (gate.op, gate.limit, gate.ratio) == (op, limit, ratio)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("telemetry.complete >= 99%", "did you mean 'telemetry.completeness'"),
        ("telemetry.completeness >= 99", "compared with a percentage"),
        ("commands.latency.p95 <= 5%", "compared with a duration"),
        ("devices.silent == 2s", "compared with a plain number"),
        ("telemetry.completeness <= 99%", "asks for the worse"),
        ("devices.silent >= 1", "asks for the worse"),
        ("telemetry.completeness >= 101%", "can never hold"),
        ("telemetry.completeness >= 1.2 x old", "no counterpart on the old side"),
        ("telemetry.delay.p99 == 1.2 x old", "needs <= or >="),
        ("telemetry.delay.p99 <= 1 x old or 2 x old", "one limit beside"),
        ("telemetry.delay.p99 <= 1s or 2s", "one limit"),
        ("telemetry.delay.p99 != 1s", "'!='"),
        ("hello", "is not a gate such as"),
        ("telemetry.delay.p99 <= soon", "is not a number with a unit"),
    ],
)
def test_mistakes_are_refused_with_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)):
        parse_gate(text)


def test_a_gates_text_reads_back_as_the_same_gate() -> None:
    for name, metric in METRICS.items():
        limit = {"%": "99.5%", "s": "250ms", "": "3"}[metric.unit]
        gate = parse_gate(f"{name} {'>=' if metric.better == 'higher' else '<='} {limit}")
        assert parse_gate(gate.text) == gate


def test_a_free_query_is_a_gate_with_a_name() -> None:
    gate = parse_query_gate(Source.SQL, "SELECT  1\n", "<= 5", name="queue age")
    assert gate.text == "queue age <= 5"
    assert parse_query_gate(Source.SQL, "SELECT\n 1", "<= 250ms").text == "sql: SELECT 1 <= 250ms"
    assert judge(gate, Sample(value=6.0, n=1)).why == "queue age 6 > 5 (n = 1)"
    with pytest.raises(BadInput, match="not a comparison"):
        parse_query_gate(Source.SQL, "SELECT 1", "five")


@given(st.text(max_size=80))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    for body in (text, f"devices.silent == {text}", f"commands.latency.p95 <= {text} x old or {text}"):
        with contextlib.suppress(BadInput):
            parse_gate(body)


# -- verdicts ------------------------------------------------------------------------------------------


def test_a_verdict_carries_its_figures() -> None:
    gate = parse_gate("telemetry.completeness >= 99.99%")
    sample = Sample(value=97.31, n=15310, evidence={"summary": "412 of 15,310 missing, 6 devices"})
    result = judge(gate, sample)
    assert result.verdict is REVERT
    assert result.why == "telemetry.completeness 97.31 % < 99.99 % (412 of 15,310 missing, 6 devices)"
    assert (result.value, result.limit, result.unit, result.n) == (97.31, 99.99, "%", 15310)


def test_a_ratio_is_shown_with_the_old_sides_figure() -> None:
    gate = parse_gate("commands.latency.p95 <= 1.2 x old")
    result = judge(gate, Sample(value=0.3, n=50, old=0.2, old_n=50))
    assert result.verdict is REVERT
    assert result.why == "commands.latency.p95 300 ms > 240 ms (1.2 x old 200 ms; n = 50)"
    assert judge(gate, Sample(value=0.24, n=50, old=0.2, old_n=50)).verdict is ADVANCE


def test_a_figure_is_never_rounded_until_it_looks_like_the_limit_it_missed() -> None:
    result = judge(parse_gate("telemetry.delay.p95 <= 1s"), Sample(value=1.0000001, n=100))
    assert result.verdict is REVERT
    assert "95 1.0000001 s > 1 s" in result.why


@pytest.mark.parametrize(
    ("value", "old", "verdict"),
    [(0.2, 0.1, ADVANCE), (0.26, 0.1, REVERT), (0.26, 0.3, ADVANCE), (0.37, 0.3, REVERT)],
)
def test_of_two_limits_the_laxer_holds(value: float, old: float, verdict: Verdict) -> None:
    gate = parse_gate("commands.latency.p95 <= 1.2 x old or 250ms")
    assert judge(gate, Sample(value=value, n=50, old=old, old_n=50)).verdict is verdict


def test_within_the_absolute_limit_the_old_side_need_not_be_known() -> None:
    gate = parse_gate("commands.latency.p95 <= 1.2 x old or 250ms")
    assert judge(gate, Sample(value=0.2, n=50)).verdict is ADVANCE
    assert judge(gate, Sample(value=0.3, n=50)).verdict is HOLD


SAMPLES_OF_NOTHING = [
    None,
    Sample(value=None, n=1000),
    Sample(value=math.nan, n=1000, old=0.1, old_n=1000),
    Sample(value=math.inf, n=1000, old=0.1, old_n=1000),
    Sample(value=0.0, n=0, old=0.1, old_n=1000),
]


@pytest.mark.parametrize("sample", SAMPLES_OF_NOTHING)
@pytest.mark.parametrize("name", list(METRICS))
def test_missing_data_never_advances(name: str, sample: Sample | None) -> None:
    metric = METRICS[name]
    limit = {"%": "1%", "s": "100h", "": "1000000"}[metric.unit]
    result = judge(parse_gate(f"{name} {'>=' if metric.better == 'higher' else '<='} {limit}"), sample)
    assert result.verdict is HOLD and result.missing


@pytest.mark.parametrize(
    "sample",
    [
        Sample(value=0.1, n=50),
        Sample(value=0.1, n=50, old=math.nan, old_n=50),
        Sample(value=0.1, n=50, old=0.1, old_n=0),
        Sample(value=0.1, n=50, old=0.1, old_n=2),
    ],
)
def test_a_ratio_without_enough_of_the_old_side_never_advances(sample: Sample) -> None:
    result = judge(parse_gate("commands.latency.p95 <= 1000 x old"), sample)
    assert result.verdict is HOLD and result.missing


def test_the_minimum_of_a_metric_can_be_set() -> None:
    gate = parse_gate("commands.agreement >= 99%", at_least=50)
    assert judge(gate, Sample(value=100.0, n=49)).verdict is HOLD
    assert judge(gate, Sample(value=100.0, n=50)).verdict is ADVANCE


def test_harm_without_tolerance_reverts_however_little_was_measured() -> None:
    gate = parse_gate("commands.executed_twice == 0")
    assert gate.zero_tolerance
    assert judge(gate, Sample(value=1.0, n=0)).verdict is REVERT
    assert judge(gate, Sample(value=0.0, n=0)).verdict is HOLD
    assert judge(gate, Sample(value=0.0, n=1)).verdict is ADVANCE
    assert not parse_gate("telemetry.delay.p50 <= 0s").zero_tolerance


@given(
    st.sampled_from(list(METRICS)),
    st.floats(allow_nan=True, allow_infinity=True) | st.none(),
    st.integers(0, 100),
    st.floats() | st.none(),
    st.integers(0, 100),
)
def test_an_advance_always_rests_on_a_measurement_within_its_limit(
    name: str, value: float | None, n: int, old: float | None, old_n: int
) -> None:
    metric = METRICS[name]
    op = ">=" if metric.better == "higher" else "<="
    limits = [{"%": "95%", "s": "250ms", "": "3"}[metric.unit]]
    if metric.has_old:
        limits += ["1.2 x old", f"1.2 x old or {limits[0]}"]
    for limit in limits:
        result = judge(parse_gate(f"{name} {op} {limit}"), Sample(value=value, n=n, old=old, old_n=old_n))
        assert result.why
        if result.verdict is ADVANCE:
            assert value is not None and math.isfinite(value) and n >= metric.at_least
            assert result.limit is not None
            assert math.isfinite(result.limit)
            beyond = value - result.limit if op == "<=" else result.limit - value
            assert beyond <= abs(result.limit) * 1e-6 + 1e-9


@given(
    st.sampled_from(list(METRICS)),
    st.floats(allow_nan=True, allow_infinity=True) | st.none(),
    st.integers(0, 100),
    st.floats() | st.none(),
    st.integers(0, 100),
    st.sampled_from([{}, {"summary": "6 of 12", "examples": [{"device": "car-1"}]}]),
)
def test_a_verdict_can_be_computed_again_from_its_stored_sample(
    name: str, value: float | None, n: int, old: float | None, old_n: int, evidence: dict[str, object]
) -> None:
    """What the audit log keeps is enough: judging the sample that a result carries gives that result."""
    metric = METRICS[name]
    limit = {"%": "95%", "s": "250ms", "": "3"}[metric.unit] + (" or 1.2 x old" if metric.has_old else "")
    gate = parse_gate(f"{name} {'>=' if metric.better == 'higher' else '<='} {limit}")
    sample = Sample(value=value, n=n, old=old, old_n=old_n, evidence=evidence)
    for measured in (sample, None):
        result = judge(gate, measured)
        stored = msgspec.json.decode(msgspec.json.encode(result), type=GateResult)
        assert stored == result
        assert judge(gate, stored.sample) == result


# -- the page ------------------------------------------------------------------------------------------


def test_the_page_on_gates_lists_every_metric_as_the_code_has_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    units = {"%": "%", "s": "duration", "": "count"}
    rows = [
        f"| `{m.name}` | {m.better} | {units[m.unit]} | {m.at_least} {m.counts} | {m.meaning} "
        f"| {'sampled' if m.sampled else 'counted'} | {'yes' if m.has_old else ''} |"
        for m in METRICS.values()
    ]
    listed = [line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 8]
    assert listed == rows


def test_the_gates_on_the_page_are_gates() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    written = re.findall(r"^  - ([a-z]+\..*?)(?:\s+#.*)?$", page, re.MULTILINE)
    assert len(written) == 4
    for text in written:
        parse_gate(text)
