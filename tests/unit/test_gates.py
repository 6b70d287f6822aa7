"""Gates: how they are written, and the verdict on a measurement."""

import contextlib
import math
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.core.delays import BUCKETS
from fleetlift.core.errors import BadInput
from fleetlift.core.figures import arm, rate_sample, share_sample, spread, time_sample
from fleetlift.core.gates import Gate, Op, Source, judge, parse_gate, parse_query_gate
from fleetlift.core.metrics import METRICS
from fleetlift.core.migration import Basis, GateResult, Sample, Verdict

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
        ("commands.success >= old - 0.5%", Op.GE, None, 1.0),
        ("commands.latency.p95 <= control + 100ms or 2s", Op.LE, 2.0, 1.0),
        ("connections.rate <= 1.3 x control", Op.LE, None, 1.3),
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
        ("commands.success >= old + 0.5%", "write 'old - 0.5%' for what is still good enough"),
        ("commands.success >= old - 5", "the margin of commands.success is a percentage"),
        ("commands.success >= old - soon", "is not a number with a unit"),
        ("commands.agreement >= old - 1%", "no counterpart on the old side"),
        ("commands.success == old", "needs <= or >="),
        ("hello", "is not a gate such as"),
        ("telemetry.delay.p99 <= soon", "is not a number with a unit"),
    ],
)
def test_mistakes_are_refused_with_what_was_expected(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)):
        parse_gate(text)


def test_a_gates_text_reads_back_as_the_same_gate() -> None:
    for name, metric in METRICS.items():
        limit = {"%": "99.5%", "s": "250ms", "/s": "9900/s", "": "3"}[metric.unit]
        gate = parse_gate(f"{name} {'>=' if metric.better == 'higher' else '<='} {limit}")
        assert parse_gate(gate.text) == gate


def test_a_margin_is_named_in_the_plans_own_words() -> None:
    gate = parse_gate("commands.success >= control - 0.5%")
    assert (gate.text, gate.margin) == ("commands.success >= old - 0.5%", 0.5)
    assert parse_gate(gate.text) == gate
    result = judge(gate, Sample(value=98.9, n=500, old=99.5, old_n=500))
    assert result.verdict is REVERT
    assert result.why == "commands.success 98.9 % < 99 % (old - 0.5% 99.5 %; n = 500)"


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
    limit = {"%": "1%", "s": "100h", "/s": "0.001/s", "": "1000000"}[metric.unit]
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
    limits = [{"%": "95%", "s": "250ms", "/s": "9900/s", "": "3"}[metric.unit]]
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
    limit = {"%": "95%", "s": "250ms", "/s": "9900/s", "": "3"}[metric.unit] + (
        " or 1.2 x old" if metric.has_old else ""
    )
    gate = parse_gate(f"{name} {'>=' if metric.better == 'higher' else '<='} {limit}")
    sample = Sample(value=value, n=n, old=old, old_n=old_n, evidence=evidence)
    for measured in (sample, None):
        result = judge(gate, measured)
        stored = msgspec.json.decode(msgspec.json.encode(result), type=GateResult)
        assert stored == result
        assert judge(gate, stored.sample) == result


# -- verdicts that are sure ----------------------------------------------------------------------------


def sure(text: str, confidence: float = 0.95) -> Gate:
    return replace(parse_gate(text), confidence=confidence)


def answers(good: int, bad: int, *, old: tuple[int, int] | None = None, devices: int = 10) -> Sample:
    """So many commands on each of `devices`, all of the bad ones on the first."""
    new = arm([(good + bad, bad), *[(good, 0)] * (devices - 1)])
    other = None if old is None else arm([(sum(old), old[1]), *[(old[0], 0)] * (devices - 1)])
    return share_sample(new, other, Basis.DEVICES, over_s=60.0, evidence={})


def test_a_sampled_gate_waits_until_it_is_sure_and_says_for_what() -> None:
    gate = sure("commands.agreement >= 98%")
    early = judge(gate, answers(9, 0))
    assert (early.verdict, early.undecided, early.missing) == (HOLD, True, False)
    assert "not decided yet whether >= 98 % (95.62 % to 100 %, 95 % sure; needs about 110 more" in early.why
    later = judge(gate, answers(21, 0))
    assert (later.verdict, later.undecided) == (ADVANCE, False)
    assert later.bound is not None and 98 < later.bound < 99
    bad = judge(gate, answers(9, 20))
    assert bad.verdict is REVERT and bad.why.startswith("commands.agreement 81.82 % < 98 % (at most ")


def test_missing_data_and_harm_without_tolerance_keep_their_own_rules() -> None:
    gate = sure("commands.agreement >= 98%")
    assert judge(gate, None).missing
    assert judge(gate, Sample(value=100.0, n=10_000)).missing  # figures alone are not enough to be sure by
    assert judge(sure("commands.latency.p95 <= 2 x old"), Sample(value=0.1, n=50)).missing
    none = judge(
        sure("connections.rate == 0"), rate_sample(arm([(1, 1)]), None, Basis.NONE, over_s=1, evidence={})
    )
    assert none.verdict is REVERT


def test_one_device_that_fails_a_thousand_times_is_one_device_beside_the_control() -> None:
    gate = sure("commands.success >= old - 2%")
    one_bad = judge(gate, answers(20, 1000, old=(20, 0), devices=50))
    assert one_bad.value is not None and one_bad.value < 60
    assert one_bad.verdict is HOLD
    all_bad = share_sample(arm([(40, 20)] * 50), arm([(20, 0)] * 50), Basis.DEVICES, over_s=1, evidence={})
    assert judge(gate, all_bad).verdict is REVERT


@pytest.mark.parametrize(("slower", "verdict"), [(0, ADVANCE), (8, REVERT)])
def test_quantiles_are_judged_by_their_bounds(slower: int, verdict: Verdict) -> None:
    old = spread([{40: 30, 45: 3}] * 100)
    new = spread([{40 + slower: 30, 45 + slower: 3}] * 100)
    sample = time_sample(0.95, new, old, Basis.DEVICES, over_s=60.0, evidence={})
    assert judge(sure("commands.latency.p95 <= 1.35 x old"), sample).verdict is verdict
    assert judge(sure("commands.latency.p95 <= 1.35 x old or 10s"), sample).verdict is ADVANCE


def test_a_handful_of_quick_answers_decides_nothing() -> None:
    few = time_sample(
        0.95, spread([{40: 6}] * 3), spread([{40: 30}] * 100), Basis.DEVICES, over_s=9, evidence={}
    )
    result = judge(sure("commands.latency.p95 <= 1.35 x old"), few)
    assert result.undecided and "or more" in result.why


def test_a_time_beyond_an_hour_is_still_a_measurement() -> None:
    late = time_sample(0.95, spread([{BUCKETS - 1: 50}] * 10), None, Basis.NONE, over_s=1, evidence={})
    assert judge(sure("commands.latency.p95 <= 10s"), late).verdict is REVERT


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=0, max_size=12),
    st.sampled_from(["commands.success >= old - 1%", "commands.success >= 0.9 x old or 95%"]),
    st.sampled_from(list(Basis)),
)
def test_a_sure_verdict_too_can_be_computed_again(
    new: list[tuple[int, int]], old: list[tuple[int, int]], text: str, basis: Basis
) -> None:
    arms = [arm((good + bad, bad) for good, bad in one) for one in (new, old)]
    gate = sure(text)
    result = judge(gate, share_sample(arms[0], arms[1], basis, over_s=9.0, evidence={}))
    stored = msgspec.json.decode(msgspec.json.encode(result), type=GateResult)
    assert stored == result and judge(gate, stored.sample) == result
    if result.verdict is ADVANCE:
        assert result.value is not None and result.limit is not None and result.value >= result.limit


# -- the page ------------------------------------------------------------------------------------------


def test_the_page_on_gates_lists_every_metric_as_the_code_has_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gates.md").read_text()
    units = {"%": "%", "s": "duration", "/s": "rate", "": "count"}
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
    assert len(written) == 5
    for text in written:
        parse_gate(text)
