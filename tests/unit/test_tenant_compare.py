"""The verifier's decisions: which rows differ, when a difference counts, which rows lead to the root."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.compare import (
    SourceRow,
    Sum,
    TargetRow,
    Verdict,
    judged,
    kind_of,
    kind_of_count,
    parts_that_differ,
    reaching,
    suspects,
)
from fleetlift.core.tenant.verify_report import Finding, Kind, TableCheck, VerifyReport, by_table

DIGESTS = st.tuples(st.integers(0, 3), st.integers(0, 1))
ROWS = st.lists(st.tuples(st.tuples(st.sampled_from("abcdef")), DIGESTS), max_size=12)


@given(ROWS, ROWS)
def test_suspects_are_the_keys_whose_rows_are_not_alike(
    source: list[tuple[tuple[str], tuple[int, int]]], target: list[tuple[tuple[str], tuple[int, int]]]
) -> None:
    """Exactly those keys whose rows, as often as they are there, are not the same ones; each once."""
    found = suspects(source, target)
    keys = {key for key, _ in source} | {key for key, _ in target}
    expected = {
        key
        for key in keys
        if Counter(d for k, d in source if k == key) != Counter(d for k, d in target if k == key)
    }
    assert set(found) == expected
    assert len(found) == len(expected)


@given(
    st.dictionaries(st.integers(0, 5), st.integers(1, 9)),
    st.dictionaries(st.integers(0, 5), st.integers(1, 9)),
)
def test_parts_that_differ_name_every_part_that_is_not_alike(
    mine: dict[int, int], theirs: dict[int, int]
) -> None:
    """A part that only one side has differs, too."""
    found = parts_that_differ(
        {n: Sum(rows=rows, first=rows, second=-rows) for n, rows in mine.items()},
        {n: Sum(rows=rows, first=rows, second=-rows) for n, rows in theirs.items()},
    )
    assert found == tuple(n for n in range(6) if mine.get(n) != theirs.get(n))


STATES = st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=1, max_size=6)


@given(STATES, st.data())
def test_a_target_that_lags_within_what_was_applied_is_never_wrong(
    history: list[int | None], data: st.DataObject
) -> None:
    """Whatever state of the source from the first look on the target shows, it is never judged different."""
    rows = [
        SourceRow(
            digest=None if s is None else (s, s), owned=s is not None, version="" if s is None else str(n)
        )
        for n, s in enumerate(history)
    ]
    shown = data.draw(st.sampled_from(rows))
    target = TargetRow(digests=(shown.digest,) if shown.digest is not None else ())
    verdict = judged(rows[0], target, rows[-1], brought=False)
    if shown in (rows[0], rows[-1]):
        assert verdict is Verdict.SAME
    elif len(set(rows)) > 1 and rows[0] != rows[-1]:
        assert verdict is not Verdict.DIFFERENT
    seen = frozenset(row.digest for row in rows)
    assert judged(rows[0], target, rows[-1], brought=False, between=seen) is Verdict.SAME


@given(st.integers(0, 3), st.integers(0, 3))
def test_a_target_that_never_was_so_is_different_once_the_source_stands_still(mine: int, theirs: int) -> None:
    """With the source's row untouched between two looks, only equality is the same."""
    row = SourceRow(digest=(mine, 0), owned=True, version="v")
    verdict = judged(row, TargetRow(digests=((theirs, 0),)), row, brought=False)
    assert verdict is (Verdict.SAME if mine == theirs else Verdict.DIFFERENT)


ROW = SourceRow(digest=(1, 1), owned=True, version="v")
OTHERS = SourceRow(digest=(1, 1), owned=False, version="v")
GONE = SourceRow()


@pytest.mark.parametrize(
    ("source", "target", "brought", "part", "kind"),
    [
        (ROW, TargetRow(), False, Part.OWNED, Kind.MISSING),
        (ROW, TargetRow(digests=((2, 1),)), False, Part.OWNED, Kind.DIFFERING),
        (ROW, TargetRow(digests=((1, 1), (1, 1))), False, Part.OWNED, Kind.DOUBLED),
        (OTHERS, TargetRow(digests=((1, 1),)), False, Part.OWNED, Kind.FOREIGN),
        (OTHERS, TargetRow(digests=((1, 1),)), False, Part.SHARED, Kind.SURPLUS),
        (OTHERS, TargetRow(), True, Part.SHARED, Kind.MISSING),
        (GONE, TargetRow(digests=((1, 1),)), False, Part.SHARED, Kind.FOREIGN),
        (GONE, TargetRow(digests=((1, 1),)), True, Part.OWNED, Kind.FOREIGN),
    ],
)
def test_what_is_wrong_has_a_name(
    source: SourceRow, target: TargetRow, brought: bool, part: Part, kind: Kind
) -> None:
    """Another tenant's row is foreign; only a left-over row of a shared table is surplus."""
    assert kind_of(source, target, brought=brought, part=part) is kind


@given(st.integers(0, 4), st.integers(0, 4))
def test_counts_of_rows_without_a_key_agree_or_have_a_name(mine: int, theirs: int) -> None:
    """Fewer are missing; more are doubled, or foreign where the source has none."""
    kind = kind_of_count(mine, theirs)
    assert (kind is None) == (mine == theirs)
    assert (kind is Kind.MISSING) == (theirs < mine)
    assert (kind is Kind.FOREIGN) == (mine == 0 < theirs)


@given(st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, 7))), st.sets(st.integers(0, 7), max_size=2))
def test_what_reaches_a_root_does_so_step_by_step(graph: dict[int, set[int]], roots: set[int]) -> None:
    """The least set that has the roots and everything that refers into it: cycles do not hold themselves."""
    expected = set(roots)
    for _ in range(9):
        expected |= {node for node, parents in graph.items() if parents & expected}
    assert reaching(roots, graph) == expected


def test_a_report_blocks_on_rows_and_on_problems_but_not_on_surplus() -> None:
    """Surplus blocks nothing; unsettled rows keep the two from agreeing and name themselves."""
    surplus = VerifyReport(tables=(TableCheck(table="public.a", totals={Kind.SURPLUS: 1}),))
    unsettled = VerifyReport(
        tables=(TableCheck(table="public.a", totals={Kind.UNSETTLED: 1}),),
        findings=(Finding(kind=Kind.UNSETTLED, table="public.a", key=("1",)),),
    )
    missing = VerifyReport(tables=(TableCheck(table="public.a", totals={Kind.MISSING: 1}),))
    assert (surplus.blocks, surplus.agrees) == (False, True)
    assert (unsettled.blocks, unsettled.agrees) == (False, False)
    assert unsettled.unsettled == {"public.a": (("1",),)}
    assert missing.blocks and not missing.agrees
    assert VerifyReport(problems=("public.a: no such table",)).blocks
    assert by_table(unsettled.findings) == {"public.a": (("1",),)}
