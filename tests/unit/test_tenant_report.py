"""The report of a tenant's move: one page that needs no network, the same bytes for the same facts."""

from html.parser import HTMLParser

import pytest
from move_examples import NAMES, T0, points, steps
from msgspec.structs import replace

from fleetlift.core.tenant.move import StepPhase
from fleetlift.migrate.page import AuditLine, Figure
from fleetlift.migrate.tenant_report import MoveReport, figure_of, render

EVIL = '"><script>alert("x")</script><img src=//evil onerror=x>'
DONE = StepPhase.DONE


def facts(name: str = "acme-to-dedicated") -> MoveReport:
    made = steps(*(DONE,) * 7)
    switched = replace(
        made[4],
        figures={
            "rows_verified": 12_345,
            "rows_missing": 0,
            "rows_foreign": 0,
            "rows_differing": 2,
            "writes_refused": 3,
            "freeze_s": 0.12,
            "freeze_steps": [["armed", 0.01], ["sealed", 0.02]],
        },
    )
    return MoveReport(
        name=name,
        tenant="acme",
        phase="finished",
        reason="",
        plan=f"migration: {name}",
        plan_version=2,
        started_at=T0,
        ended_at=T0 + 60,
        steps=(*made[:4], switched, *made[5:]),
        points=points(60),
        audit=[
            AuditLine(at=T0 + 3, actor="ops", kind="migration_started", text=f"started {name}", evidence={}),
            AuditLine(
                at=T0 + 30, actor="controller", kind="gate_breached", text=name, evidence={"missing": name}
            ),
        ],
        chain_head="ab" * 32,
    )


class Tags(HTMLParser):
    """Keeps the open tags, so that a page that does not close what it opens is noticed."""

    void = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_is_well_formed_and_needs_no_network() -> None:
    tags = Tags(render(facts()))
    assert tags.addresses == []
    assert {"svg", "table", "style", "script"} <= tags.seen


def test_every_section_is_there() -> None:
    """Steps, rows, lag, freeze, traffic, load, log and plan: each with what there is to see."""
    page = render(facts())
    headings = Tags(page).headings
    for heading in ("Steps", "Rows over time", "Traffic by side", "Load on the new side", "Plan (version 2)"):
        assert heading in headings, headings
    assert any("behind" in one for one in headings) and any("switched" in one for one in headings)
    assert all(name in page for name in NAMES)
    assert "armed" in page and "sealed" in page


def test_the_verdict_is_told_by_sign_and_words_not_by_colour_alone() -> None:
    page = render(facts())
    assert "✓ rows missing" in page and "✗ rows that differ" in page
    assert "12,345" in page and "writers stood still" in page


def test_figures_that_are_given_win_over_those_of_the_steps() -> None:
    page = render(replace(facts(), figures=[Figure(label="rows lost", value="0", good=True)]))
    assert "✓ rows lost" in page and "✗ rows that differ" not in page


def test_the_newest_figure_of_a_name_counts() -> None:
    assert figure_of(facts(), "rows_differing") == 2 and figure_of(facts(), "nothing") is None


def test_hostile_names_stay_text_wherever_they_come() -> None:
    """In the name, the tenant, the reason, the plan, a step, a figure, the log and its evidence."""
    base = facts(EVIL)
    evil_step = replace(
        base.steps[0], name=EVIL, text=EVIL, figures={EVIL: EVIL, "freeze_steps": [[EVIL, 1.0]]}
    )
    page = render(
        replace(
            base,
            tenant=EVIL,
            phase=EVIL,
            reason=EVIL,
            chain_head=EVIL,
            steps=(*base.steps[1:], evil_step),
            figures=[Figure(label=EVIL, value=EVIL, good=None)],
        )
    )
    assert "<script>alert" not in page and "<img" not in page
    assert "img" not in Tags(page).seen


def test_the_same_facts_give_the_same_bytes() -> None:
    assert render(facts()) == render(facts())


@pytest.mark.parametrize("count", [0, 1])
def test_a_move_that_never_began_has_a_report_too(count: int) -> None:
    empty = replace(facts(), steps=steps(), points=points(count), audit=[], ended_at=T0, chain_head="")
    Tags(render(empty))


def test_a_long_move_is_drawn_with_few_points() -> None:
    """A month of seconds makes a page of the same size as ten minutes."""
    short, long = (len(render(replace(facts(), points=points(n), ended_at=T0 + n))) for n in (600, 60_000))
    assert long < 3 * short
