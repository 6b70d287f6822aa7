"""A rehearsal moves the test pool by the same plan, and says what was not the same each time."""

from pathlib import Path
from typing import Any, cast

import pytest

from fleetlift.cli.client import Api
from fleetlift.cli.rehearse import rehearsed
from fleetlift.core.errors import BadInput, Conflict, Unavailable
from fleetlift.core.migration import Phase
from fleetlift.core.tenant.move import StepPhase
from fleetlift.core.tenant.plan import Copy, Drain, Freeze, SwitchDatabase, SwitchDns, Validate
from fleetlift.core.tenant.status import MoveStatus, StepLine
from fleetlift.core.units import Share
from fleetlift.migrate.rehearsal import Cycle, StepTook, compared, cycle_of, rehearsal_plan
from fleetlift.migrate.tenant_planfile import parse_tenant_plan

PLAN = """\
migration: acme-to-dedicated
tenant: acme
from: {postgresql: "postgresql://me@cloud/shared?sslmode=require", mqtt: "mqtts://iot.example.com"}
to: {postgresql: "postgresql://me@dedicated:5433/acme?sslmode=require", mqtt: "mqtts://10.0.0.2"}
dns: {server: 10.0.0.53, zone: example.com, key: "env:KEY"}
features: {registration: [users]}
rehearse: {tenant: pool, root: customers.id = 9}
on_breach: hold
steps:
  - copy: tenant data
    root: customers.id = 42
    tables: {currency: all}
    chunk: 500 rows
  - validate: load
    scenario: peak.yaml
    for: 10s
    gates: [load.errors == 0]
  - freeze: [registration]
    at_most: 1m
  - switch: database
    at_most: 3s
  - switch: dns
    records:
      - {name: pool.example.com, to: 10.0.0.2, pool: true}
      - {name: iot.example.com, to: 10.0.0.2}
    waves: [test-pool, 100%]
    approve: true
    bake: 1h
    gates: [devices.silent == 0, telemetry.completeness == 100%]
  - drain: old
    quiet: 10s
"""


def test_the_pool_moves_by_the_same_steps_and_gates_to_another_database() -> None:
    """What differs is whose rows and names they are, and that nobody is asked."""
    real, made = parse_tenant_plan(PLAN), parse_tenant_plan(rehearsal_plan(PLAN))
    assert made.name.startswith("acme-to-dedicated-rehearsal-") and made.tenant == "pool"
    assert made.source == real.source and made.old == real.old and made.on_breach == real.on_breach
    assert made.target.url == "postgresql://me@dedicated:5433/rehearsal_acme_to_dedicated?sslmode=require"
    assert made.target.create and made.rehearsal is None
    copy, freeze, database, names, drain = made.steps
    assert isinstance(copy, Copy) and copy.root == "customers.id = 9"
    assert (copy.tables, copy.chunk_rows) == (real.copy.tables, real.copy.chunk_rows)
    assert isinstance(freeze, Freeze) and isinstance(drain, Drain)
    assert (freeze, database, drain) == (real.steps[2], real.steps[3], real.steps[5])
    assert isinstance(names, SwitchDns) and isinstance(real.steps[4], SwitchDns)
    assert [one.name for one in names.records] == ["pool.example.com"]
    assert names.waves == (Share(percent=100.0),) and not names.approve
    assert (names.gates, names.bake_s) == (real.steps[4].gates, real.steps[4].bake_s)


def test_the_load_is_played_only_when_it_is_asked_for() -> None:
    kinds = [type(step) for step in parse_tenant_plan(rehearsal_plan(PLAN, with_load=True)).steps]
    assert kinds == [Copy, Validate, Freeze, SwitchDatabase, SwitchDns, Drain]


def test_a_pool_without_names_is_moved_up_to_its_database() -> None:
    """The tenant's own names are never touched by a rehearsal, and there is no one to drain."""
    plan = PLAN.replace("      - {name: pool.example.com, to: 10.0.0.2, pool: true}\n", "").replace(
        "[test-pool, 100%]", "[100%]"
    )
    kinds = [type(step) for step in parse_tenant_plan(rehearsal_plan(plan)).steps]
    assert kinds == [Copy, Freeze, SwitchDatabase]


def test_a_rehearsal_may_name_its_database_and_a_long_name_stays_a_name() -> None:
    plan = PLAN.replace("root: customers.id = 9}", "root: customers.id = 9, database: try_out}").replace(
        "acme-to-dedicated", "a" * 60
    )
    made = parse_tenant_plan(rehearsal_plan(plan))
    assert made.target.url.endswith("/try_out?sslmode=require")
    assert made.name.startswith(f"{'a' * 40}-rehearsal-") and len(made.name) <= 63


def test_each_plan_has_rehearsals_of_its_own_name() -> None:
    """So that what is rehearsed is never an older plan of the same migration; files count as well."""
    texts = (PLAN, PLAN.replace("at_most: 3s", "at_most: 4s"))
    plans = [rehearsal_plan(text, files=files) for text in texts for files in ({}, {"peak.yaml": "rate: 1"})]
    assert len({parse_tenant_plan(plan).name for plan in plans}) == 4
    assert rehearsal_plan(PLAN + "# said another way\n") == rehearsal_plan(PLAN)


def test_a_plan_without_a_pool_says_what_to_write() -> None:
    plan = PLAN.replace("rehearse: {tenant: pool, root: customers.id = 9}\n", "")
    with pytest.raises(BadInput, match=r"move\.yaml: a rehearsal needs 'rehearse:"):
        rehearsal_plan(plan, file="move.yaml")


def there(*took_s: float | None, phase: Phase = Phase.FINISHED, **figures: object) -> MoveStatus:
    return MoveStatus(
        name="acme-rehearsal",
        tenant="pool",
        source="cloud/shared",
        target="dedicated/fleetlift_rehearsal",
        phase=phase,
        started_at=100.0,
        now=200.0,
        steps=tuple(
            StepLine(
                name=f"step {n}",
                phase=StepPhase.DONE,
                figures=figures,
                started_at=100.0,
                ended_at=None if s is None else 100.0 + s,
            )
            for n, s in enumerate(took_s)
        ),
    )


def test_a_cycle_keeps_what_ended_and_figures_that_can_be_compared() -> None:
    one = cycle_of(3, there(1.25, 2.5, None, rows_verified=7, freeze_steps=[["armed", 0.1]]), back_s=4.00049)
    assert [(step.name, step.took_s) for step in one.steps] == [("step 0", 1.25), ("step 1", 2.5)]
    assert (one.number, one.there_s, one.back_s, one.problem) == (3, 3.75, 4.0, "")
    assert one.figures == {"rows_verified": 7}


def cycle(number: int, *took_s: float, problem: str = "", **figures: object) -> Cycle:
    return Cycle(
        number=number,
        steps=tuple(StepTook(name=f"step {n}", took_s=s) for n, s in enumerate(took_s)),
        figures=figures,
        there_s=sum(took_s),
        back_s=1.0,
        problem=problem,
    )


CLEAN: dict[str, Any] = {
    "rows_verified": 40,
    "rows_missing": 0,
    "rows_foreign": 0,
    "rows_differing": 0,
    "freeze_s": 0.1,
}


def test_the_slowest_step_is_named_with_its_cycle() -> None:
    found = compared("acme", [cycle(1, 1.0, 2.0, **CLEAN), cycle(2, 1.0, 9.0, **CLEAN)])
    assert (found.slowest, found.slowest_s) == ("step 1 (cycle 2)", 9.0)
    assert found.good and found.differed == {}


def test_what_should_be_the_same_and_is_not_is_shown_cycle_by_cycle() -> None:
    """Times may differ; rows that were verified, and names that were switched, may not."""
    found = compared(
        "acme",
        [cycle(1, 1.0, **CLEAN), cycle(2, 1.0, **{**CLEAN, "rows_verified": 41, "freeze_s": 0.3})],
    )
    assert found.differed == {"rows_verified": (40, 41)}
    assert found.good


def test_a_figure_that_one_cycle_lacks_has_differed() -> None:
    found = compared("acme", [cycle(1, names_switched=1, **CLEAN), cycle(2, **CLEAN)])
    assert found.differed == {"names_switched": (1, None)}


@pytest.mark.parametrize("kind", ["missing", "foreign", "differing"])
def test_rows_that_are_wrong_in_any_cycle_spoil_the_rehearsal(kind: str) -> None:
    assert not compared("acme", [cycle(1, **{**CLEAN, f"rows_{kind}": 1}), cycle(2, **CLEAN)]).good


def test_a_cycle_that_ended_otherwise_spoils_the_rehearsal() -> None:
    found = compared("acme", [cycle(1, **CLEAN), cycle(2, problem="held: gate breached", **CLEAN)])
    assert not found.good and found.cycles[1].problem == "held: gate breached"


def test_no_cycle_at_all_is_no_success() -> None:
    found = compared("acme", [])
    assert not found.good and (found.slowest, found.slowest_s) == ("", 0.0)


class Interrupted:
    """An API whose first start is interrupted before its answer, and takes effect all the same."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error
        self.name = parse_tenant_plan(rehearsal_plan(PLAN)).name
        self.there = False
        self.reverted = False

    def post(self, path: str, body: Any = None) -> None:
        assert path == "/migrations"
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.there = True
        raise Conflict("a migration of that name exists")

    def items(self, path: str, limit: int) -> tuple[list[dict[str, Any]], bool]:
        return [{"name": self.name, "phase": "running"}] if self.there else [], False

    def get(self, path: str) -> dict[str, Any]:
        phase = "reverted" if self.reverted else "running"
        return {"phase": phase, "step": 0, "steps": [{"name": "copy"}], "open_requests": 0, "reason": ""}

    def request(self, method: str, path: str, **more: Any) -> None:
        assert (method, path) == ("POST", f"/migrations/{self.name}/revert")
        self.reverted = True


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Unavailable("no answer")])
def test_a_rehearsal_that_is_interrupted_while_it_starts_is_taken_back(
    error: BaseException, tmp_path: Path
) -> None:
    """The server looks at everything before it begins: it may begin when nobody waits for it any more."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    api = Interrupted(error)
    with pytest.raises(type(error)):
        rehearsed(cast(Api, api), path, cycles=1, with_load=False, tell=lambda text: None)
    assert api.reverted
