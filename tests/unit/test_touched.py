"""What was touched is looked at until it was found alike, whatever happens to who looks."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import pytest

from fleetlift.core.errors import Conflict, Unavailable
from fleetlift.core.tenant.pgoutput import cell
from fleetlift.core.tenant.verify_report import Finding, Kind, TableCheck, VerifyReport
from fleetlift.tenant.cutover import TouchedChecks
from fleetlift.tenant.touched import TouchedKeys

ALIKE = VerifyReport()


def differing(*keys: str, counted: int = 0) -> VerifyReport:
    return VerifyReport(
        tables=(TableCheck(table="t", totals={Kind.DIFFERING: counted or len(keys)}),),
        findings=tuple(Finding(kind=Kind.DIFFERING, table="t", key=(key,)) for key in keys),
    )


class Table:
    def __init__(self, *key: str) -> None:
        self.key = key


class Verifier:
    """Answers what it is told to, and remembers what it was asked; "all" for a whole verification."""

    def __init__(self, *answers: VerifyReport | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []
        self.closure = self
        self.schema = self
        self.tables = {"t": Table("id"), "bag": Table()}

    async def run(self, *_: object, resume: bool) -> VerifyReport:
        return self._next("all")

    async def recheck(self, keys: Mapping[str, Collection[Sequence[str]]], *, thorough: bool) -> VerifyReport:
        return self._next({table: sorted(map(tuple, some)) for table, some in keys.items()})

    def _next(self, asked: Any) -> VerifyReport:
        self.asked.append(asked)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def noting(*keys: str, keys_max: int = 100) -> TouchedKeys:
    touched = TouchedKeys(keys_max)
    touched.begin()
    touched.add("t", map(cell, keys))
    return touched


def look(verifier: Verifier, touched: TouchedKeys, *, final: bool = False) -> VerifyReport:
    checks = TouchedChecks(cast(Any, verifier), touched)  # anew each time, as a step that is resumed makes it
    return asyncio.run(checks.recheck_touched(final=final))


def test_keys_stay_until_they_were_found_alike() -> None:
    touched = noting("1", "2")
    verifier = Verifier(Unavailable("away"), differing("2"), ALIKE, ALIKE)
    with pytest.raises(Unavailable):
        look(verifier, touched)
    look(verifier, touched)
    touched.add("t", [cell("3")])
    look(verifier, touched)
    look(verifier, touched)
    assert verifier.asked == [{"t": [("1",), ("2",)]}, {"t": [("1",), ("2",)]}, {"t": [("2",), ("3",)]}, {}]


def test_the_last_look_forgets_nothing() -> None:
    touched, verifier = noting("1"), Verifier(differing("1"), ALIKE)
    look(verifier, touched, final=True)
    look(verifier, touched, final=True)
    assert verifier.asked == [{"t": [("1",)]}, {"t": [("1",)]}]


@pytest.mark.parametrize("touched", [TouchedKeys(), noting(*map(str, range(9)), keys_max=8)])
def test_what_is_not_known_is_compared_as_a_whole_until_that_has_come_to_its_end(
    touched: TouchedKeys,
) -> None:
    verifier = Verifier(Unavailable("away"), differing("7"), differing("7"))
    with pytest.raises(Unavailable):
        look(verifier, touched)
    with pytest.raises(Conflict, match="too many"):
        look(verifier, touched, final=True)
    look(verifier, touched)
    look(verifier, touched, final=True)  # what the whole look found, nothing more
    assert verifier.asked == ["all", "all", {"t": [("7",)]}]


def test_findings_that_are_not_listed_need_another_whole_look() -> None:
    touched, verifier = noting("1"), Verifier(differing("1", counted=2), ALIKE, ALIKE)
    look(verifier, touched)
    with pytest.raises(Conflict, match="too many"):
        look(verifier, touched, final=True)
    look(verifier, touched)
    look(verifier, touched)
    assert verifier.asked == [{"t": [("1",)]}, "all", {}]


def test_a_table_without_a_key_is_looked_at_as_a_whole_and_its_time_is_counted() -> None:
    touched, verifier = noting(), Verifier(ALIKE, ALIKE, ALIKE)
    touched.add("bag", ())
    look(verifier, touched)
    look(verifier, touched)  # it may be written to again until the freeze
    look(verifier, touched, final=True)  # it was not
    assert verifier.asked == [{"t": [], "bag": []}, {"bag": []}, {}]
