"""The report: one page that needs no network, the same bytes for the same facts, safe for any name."""

import math
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.timeline import GatePoint, TimelinePoint
from fleetlift.migrate.page import AuditLine, Figure
from fleetlift.migrate.plots import Series, clock_label, lines, nice_ticks, time_ticks, value_label
from fleetlift.migrate.report import (
    LedgerLine,
    MemberLine,
    PathTotal,
    ReportData,
    render,
)

GATE = "telemetry.completeness >= 99.99%"


def facts(name: str = "connect") -> ReportData:
    points = [
        (
            1000.0 + t,
            TimelinePoint(
                phase="running",
                rung=1,
                wave=0,
                wave_phase="baking",
                devices_old=57 - t,
                devices_both=t,
                devices_new=0,
                rate_old=100.0,
                gates=(GatePoint(gate=GATE, verdict="revert", value=97.0, limit=99.99, unit="%", n=100),),
            ),
        )
        for t in range(20)
    ]
    return ReportData(
        name=name,
        tenant="carshare",
        phase="held",
        reason="",
        plan=f"migration: {name}",
        plan_version=1,
        started_at=1000.0,
        ended_at=1020.0,
        points=points,
        audit=[
            AuditLine(
                at=1003.0, actor="controller", kind="gate_breached", text=name, evidence={"missing": 412}
            )
        ],
        totals=[PathTotal(path="legacy", received=10, distinct=9, doubles=1)],
        ledger=[LedgerLine(device="d1", by_path={"legacy": 10}, stored=9, missing=1, gaps=("obd {[4,5)}",))],
        members=[MemberLine(device="d1", state="excluded", rung=0, reason=name)],
        figures=[Figure(label="lost", value="0", good=True), Figure(label="twice", value="3", good=False)],
        rungs=("old side", "telemetry both"),
    )


class _Tags(HTMLParser):
    """Keeps the open tags, so that a page that does not close what it opens is noticed."""

    void = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_network() -> None:
    tags = _Tags()
    tags.feed(render(facts()))
    assert tags.open == []
    assert tags.addresses == []
    assert {"svg", "table", "style", "script"} <= tags.seen


def test_a_breach_is_told_by_sign_and_words_not_by_colour_alone() -> None:
    page = render(facts())
    assert "✗ breached at 0:00" in page
    assert "✗ twice" in page
    assert "✓ lost" in page


def test_a_hostile_name_stays_text() -> None:
    page = render(facts('<script>alert("x")</script>'))
    assert "<script>alert" not in page


def test_the_same_facts_give_the_same_bytes() -> None:
    assert render(facts()) == render(facts())


def test_a_migration_that_never_began_has_a_report_too() -> None:
    tags = _Tags()
    empty = ReportData(
        name="n",
        tenant="t",
        phase="running",
        reason="",
        plan="",
        plan_version=1,
        started_at=5.0,
        ended_at=5.0,
        points=[],
        audit=[],
        totals=[],
        ledger=[],
        members=[],
    )
    tags.feed(render(empty))
    assert tags.open == []


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_span_the_values(low: float, width: float) -> None:
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    if low + width > low:
        blur = math.ulp(max(abs(low), abs(low + width)))  # a tick can be no finer than its float
        assert ticks[0] <= low + width * 0.001 + 2 * blur
        assert ticks[-1] >= low + width * 0.999 - 2 * blur


@given(st.floats(1, 1e8))
def test_the_time_axis_has_a_readable_number_of_ticks(span: float) -> None:
    assert time_ticks(span)[0] == 0
    if span < 5_000_000:
        assert len(time_ticks(span)) <= 10


def test_figures_are_written_as_people_write_them() -> None:
    assert value_label(99.73, "%") == "99.73 %"
    assert value_label(0.25, "s") == "250 ms"
    assert value_label(12345.0, "") == "12,345"
    assert clock_label(75) == "1:15"
    assert clock_label(12_000) == "3 h 20"


@given(st.lists(st.tuples(st.floats(0, 100), st.none() | st.floats(-1e6, 1e6)), max_size=30))
def test_any_measurements_can_be_drawn(points: list[tuple[float, float | None]]) -> None:
    """Nothing measured, one point or wild values: the plot never fails and never draws NaN."""
    svg = lines([Series(name="a", points=points)], title="t", span=100, unit="s", limit=None)
    assert "nan" not in svg.split("data-points")[0]
