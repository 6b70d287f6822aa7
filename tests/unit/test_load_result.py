"""The result of a load test: its account, when it does not count, and what gates make of it."""

import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import judge, parse_gate
from fleetlift.core.load_result import (
    LATE_MAX_S,
    ClassResult,
    Counts,
    LoadResult,
    Point,
    Quantiles,
    Stored,
    laid_together,
    load_samples,
    why_invalid,
)
from fleetlift.core.metrics import METRICS, OF_LOAD
from fleetlift.core.migration import GateResult, Verdict
from fleetlift.core.ranges import RangeSet
from fleetlift.core.workload import Protocol
from fleetlift.load import histograms
from fleetlift.load.report import load_page
from fleetlift.load.run import endpoint_of
from fleetlift.load.wire import Account
from fleetlift.load.witness import acknowledged, channel_of
from fleetlift.migrate.plan_reader import BadPlan
from fleetlift.migrate.planfile import parse_plan

COUNTS = Counts(offered=600_000, sent=600_000, accepted=600_000)
GOOD = LoadResult(
    scenario="captured-peak",
    target="mqtt://127.0.0.1:1883",
    protocol="mqtt",
    qos=1,
    devices=1000,
    processes=2,
    seed=7,
    started_at=1.8e9,
    asked_for_s=60,
    lasted_s=60,
    wall_s=60.2,
    rate_s=600_000 / 60.2,
    counts=COUNTS,
    latency=Quantiles(n=600_000, p50_s=0.01, p95_s=0.05, p99_s=0.12, p999_s=0.3, max_s=0.6),
    late=Quantiles(n=600_000, p50_s=0.001, p95_s=0.002, p99_s=0.004, p999_s=0.01, max_s=0.02),
    lag=Quantiles(n=30_000, p99_s=0.003),
    sign_in=Quantiles(n=1000, p99_s=0.05),
    cpu=(0.3, 0.31),
    closed=0,
    reconnects=0,
    classes=(ClassResult(name="a<b>", devices=1000, counts=COUNTS, latency=Quantiles(n=600_000)),),
    series=tuple(Point(at_s=float(n), offered=10_000, accepted=10_000, p99_s=0.12) for n in range(60)),
    histogram="",
    buckets=((0.01, 300_000), (0.1, 290_000), (1.0, 10_000)),
    stored=Stored(stored=600_000, lost=0, reread=100_000, reread_of=100_000),
)


def verdict(result: LoadResult, gate: str) -> GateResult:
    parsed = parse_gate(gate)
    return judge(parsed, load_samples(result)[parsed.metric])


# -- gates -------------------------------------------------------------------------------------------------


def test_every_metric_of_a_load_test_has_a_sample() -> None:
    assert set(load_samples(GOOD)) == {name for name in METRICS if name.startswith(OF_LOAD)}


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        ("load.errors == 0", "load.errors 0 == 0 (0 rejected and 0 failed of 600,000 offered)"),
        ("load.latency.p99 <= 250ms", "load.latency.p99 120 ms <= 250 ms (600,000 messages accepted)"),
        ("load.lost == 0", "load.lost 0 == 0 (600,000 stored of 600,000 accepted, 100,000 read again)"),
        ("load.rate >= 9900/s", "load.rate 9,966.7774 /s >= 9,900 /s (600,000 accepted in 60.2 s)"),
    ],
)
def test_a_good_run_passes_and_says_by_what(gate: str, why: str) -> None:
    found = verdict(GOOD, gate)
    assert (found.verdict, found.why) == (Verdict.ADVANCE, why)


@pytest.mark.parametrize(
    ("changed", "gate"),
    [
        ({"counts": Counts(offered=100, accepted=99, rejected=1)}, "load.errors == 0"),
        ({"counts": Counts(offered=100, accepted=99, failed=1)}, "load.errors == 0"),
        ({"latency": Quantiles(n=600_000, p99_s=0.2501)}, "load.latency.p99 <= 250ms"),
        ({"stored": Stored(stored=599_999, lost=1)}, "load.lost == 0"),
        (
            {"stored": Stored(stored=600_000, lost=0, reread=9, reread_of=10, reread_missing=1)},
            "load.lost == 0",
        ),
        ({"rate_s": 9_899.0}, "load.rate >= 9900/s"),
    ],
)
def test_a_breach_is_a_breach(changed: dict[str, object], gate: str) -> None:
    assert verdict(replace(GOOD, **changed), gate).verdict is Verdict.REVERT


def test_an_invalid_run_passes_no_gate_whatever_its_figures() -> None:
    """It has no figures: each gate holds, as for missing data, and says why."""
    result = replace(GOOD, invalid=("the generator was late",))
    for gate in ("load.errors == 0", "load.latency.p99 <= 250ms", "load.lost == 0", "load.rate >= 1/s"):
        found = verdict(result, gate)
        assert found.verdict is Verdict.HOLD and found.missing
        assert "invalid: the generator was late" in found.why


def test_what_nobody_proved_is_not_taken_for_nothing_lost() -> None:
    result = replace(GOOD, stored=None, why_unproved="the target cannot be asked what it has stored")
    found = verdict(result, "load.lost == 0")
    assert found.verdict is Verdict.HOLD and "cannot be asked" in found.why
    assert result.lost is None


def test_a_run_in_which_nothing_was_accepted_has_no_latency() -> None:
    empty = replace(GOOD, counts=Counts(offered=10, failed=10), latency=Quantiles(), rate_s=0.0, stored=None)
    assert verdict(empty, "load.latency.p99 <= 250ms").missing
    assert verdict(empty, "load.rate >= 1/s").missing
    assert verdict(empty, "load.errors == 0").verdict is Verdict.REVERT


def test_a_plan_that_moves_a_fleet_refuses_gates_of_load() -> None:
    plan = """
migration: x
fleet: {tenant: a}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
steps: [{move: telemetry, waves: [100%], bake: 1h, gates: [load.errors == 0]}]
"""
    with pytest.raises(BadPlan, match=re.escape("load.errors is measured by a load test")):
        parse_plan(plan, side_kinds=("legacy", "fleetlift"))


# -- when it does not count --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "late_s", "lag_s", "cpu", "says"),
    [
        (COUNTS, 0.0, 0.0, (0.9,), None),
        (COUNTS, LATE_MAX_S, LATE_MAX_S, (0.9, 0.2), None),
        (COUNTS, LATE_MAX_S * 1.1, 0.0, (0.5,), "the generator was late: 99th percentile 110 ms"),
        (COUNTS, 0.0, 0.5, (0.5,), "starved: its loop came round late by 500 ms"),
        (COUNTS, 0.0, 0.0, (0.5, 0.99), "a process used 99 % of its core"),
        (replace(COUNTS, accepted=599_999), 0.0, 0.0, (0.5,), "the account does not balance"),
        (Counts(), 0.0, 0.0, (0.5,), "nothing was offered"),
    ],
)
def test_a_generator_that_was_late_or_starved_makes_a_run_invalid(
    counts: Counts, late_s: float, lag_s: float, cpu: tuple[float, ...], says: str | None
) -> None:
    found = why_invalid(counts, Quantiles(n=1, p99_s=late_s), Quantiles(n=1, p99_s=lag_s), cpu)
    assert (not found) if says is None else says in "; ".join(found)


# -- the series --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(0, 9)), min_size=1, max_size=200))
def test_a_long_series_is_made_coarser_without_losing_a_message(seen: list[tuple[int, int, float]]) -> None:
    points = tuple(Point(at_s=float(n), offered=a, accepted=b, p99_s=c) for n, (a, b, c) in enumerate(seen))
    found = laid_together(points, 16)
    assert len(found) <= 16
    assert sum(p.offered for p in found) == sum(p.offered for p in points)
    assert sum(p.accepted for p in found) == sum(p.accepted for p in points)
    assert max(p.p99_s or 0 for p in found) == max(p.p99_s or 0 for p in points)
    assert sum(p.for_s for p in found) == len(points)


# -- histograms --------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=300), st.integers(1, 5))
def test_histograms_of_processes_are_laid_together(times: list[float], parts: int) -> None:
    """The same as one histogram of all; quantiles to three digits."""
    whole, merged = histograms.empty(), histograms.empty()
    for n in range(parts):
        part = histograms.empty()
        for time_s in times[n::parts]:
            histograms.record(part, time_s)
            histograms.record(whole, time_s)
        histograms.add(merged, histograms.encoded(part))
    assert histograms.quantiles(merged) == histograms.quantiles(whole)
    assert histograms.quantiles(whole).max_s == pytest.approx(max(times), rel=0.002, abs=2e-6)
    assert sum(n for _, n in histograms.buckets(whole)) == len(times)


def test_no_time_at_all_has_no_quantiles() -> None:
    assert histograms.quantiles(histograms.empty()) == Quantiles()
    assert histograms.buckets(histograms.empty()) == []


# -- the account -------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.sets(st.integers(1, 60)))
def test_what_was_acknowledged_is_all_but_what_was_not(last: int, missing: set[int]) -> None:
    missing = {n for n in missing if n <= last}
    account = Account(device="a", topic="dt/a/x", last=last, missing=sorted(missing))
    expected = RangeSet()
    for n in range(1, last + 1):
        if n not in missing:
            expected.add_range(n, n + 1)
    assert list(acknowledged(account).ranges()) == list(expected.ranges())
    assert acknowledged(account).count == account.accepted


def test_only_telemetry_of_a_fleetlift_has_a_channel() -> None:
    assert channel_of(Account(device="a", topic="dt/a/engine/oil", last=1)) == "engine/oil"
    assert channel_of(Account(device="a", topic="v1/devices/me/telemetry", last=1)) is None


# -- targets -----------------------------------------------------------------------------------------------


def test_a_target_is_an_address_without_secrets() -> None:
    protocol, endpoint = endpoint_of("mqtts://iot.example.com")
    assert (protocol, endpoint.port, endpoint.tls) == (Protocol.MQTT, 8883, True)
    protocol, endpoint = endpoint_of("http://127.0.0.1:8080/api/v1/{password}/telemetry?x=1")
    assert (protocol, endpoint.path) == (Protocol.HTTP, "/api/v1/{password}/telemetry?x=1")
    assert endpoint_of("https://h/")[1].path == "/topics/{topic}?qos=1"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("tcp://h:1", "expected mqtt://HOST:PORT"),
        ("mqtt://", "expected mqtt://HOST:PORT"),
        ("mqtt://h:x", "expected mqtt://HOST:PORT"),
        ("mqtt://u:hidden@h:1", "holds no credentials"),
        ("mqtt://h:1/topic", "an MQTT target has no path"),
        ("http://h/a%0d%0aX: y", "expected mqtt://HOST:PORT"),
    ],
)
def test_a_bad_address_is_refused(url: str, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)) as caught:
        endpoint_of(url)
    assert "hidden" not in str(caught.value)


# -- the report --------------------------------------------------------------------------------------------


def test_the_report_shows_verdict_figures_plots_and_gates() -> None:
    page = load_page(GOOD, [verdict(GOOD, "load.errors == 0")])
    for text in ("captured-peak", "600,000", "offered", "accepted", "Histogram of latencies", "a&lt;b&gt;"):
        assert text in page
    assert "load.errors == 0" in page
    assert page.count("<svg") == 3
    assert "http://" not in page.replace(GOOD.target, "")  # it needs no network
    assert load_page(GOOD) == load_page(GOOD)


def test_the_report_of_an_invalid_run_says_so_first() -> None:
    page = load_page(replace(GOOD, invalid=("the generator was late",), buckets=(), series=()))
    assert "This run does not count: the generator was late" in page


def test_a_result_comes_back_from_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(GOOD), type=LoadResult) == GOOD
