"""A rehearsal: the same plan for the test pool, there and back, again and again, and what differed.

Each cycle is a migration like any other, carried out by the same engine; here is only what is rehearsed and
how cycles are compared.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import msgspec
import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.tenant.status import MoveStatus
from fleetlift.migrate.tenant_planfile import parse_tenant_plan

DATABASE_MOST: Final = 63  # characters of a name, PostgreSQL's limit
COMPARED: Final = ("rows_verified", "rows_missing", "rows_foreign", "rows_differing", "names_switched")
"""Figures that every cycle shares, unless something is wrong; rows may grow with the pool."""


def rehearsal_plan(
    text: str,
    *,
    file: str = "plan.yaml",
    with_load: bool = False,
    files: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The plan that moves the test pool: same steps and gates, another root, database and names.

    It has a name by all that it says and by the `files` it uses, so that what is rehearsed is never an older
    plan. Raises BadInput when the plan has no `rehearse:`.
    """
    plan = parse_tenant_plan(text, file=file)
    if plan.rehearsal is None:
        raise BadInput(
            f"{file}: a rehearsal needs 'rehearse: {{tenant: …, root: …}}': the test pool's tenant and its "
            "root row, as docs/tenant-plan.md shows"
        )
    data: dict[str, Any] = yaml.safe_load(text)
    data["tenant"] = plan.rehearsal.tenant
    data["to"] = {**data["to"], "create": True}
    database = plan.rehearsal.database or f"rehearsal_{plan.name.replace('-', '_')}"[:DATABASE_MOST]
    data["to"]["postgresql"] = _in_database(plan.target.url, database)
    steps = []
    for step in data.pop("steps"):
        if "copy" in step:
            steps.append({**step, "root": plan.rehearsal.root})
        elif step.get("switch") == "dns":
            pool = [
                {k: v for k, v in record.items() if k != "pool"}
                for record in step["records"]
                if record.get("pool")
            ]
            if pool:
                steps.append({**step, "records": pool, "waves": ["100%"], "approve": False})
        elif "validate" not in step or with_load:
            steps.append(step)
    names = any(step.get("switch") == "dns" for step in steps)
    data["steps"] = [step for step in steps if names or "drain" not in step]
    data.pop("rehearse")
    said = json.dumps([data, dict(files)], sort_keys=True, default=str)
    data["migration"] = f"{rehearsals_of(plan.name)}{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    made: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    parse_tenant_plan(made, file="rehearsal.yaml")
    return made


def rehearsals_of(name: str) -> str:
    """What the names of a plan's rehearsals begin with."""
    return f"{name[:40]}-rehearsal-"


def _in_database(url: str, database: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{database}"))


class StepTook(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one cycle, in seconds."""

    name: str
    took_s: float


class Cycle(msgspec.Struct, frozen=True, kw_only=True):
    """One time there and back. `problem`: where it ended otherwise; "": it did not."""

    number: int
    steps: tuple[StepTook, ...]
    figures: Mapping[str, Any]
    there_s: float
    back_s: float
    problem: str = ""


class Rehearsed(msgspec.Struct, frozen=True, kw_only=True):
    """What a rehearsal showed. `differed`: figures that were not the same in each cycle, and their values."""

    migration: str
    cycles: tuple[Cycle, ...]
    slowest: str
    slowest_s: float
    differed: Mapping[str, tuple[Any, ...]]
    good: bool


def cycle_of(number: int, there: MoveStatus, *, back_s: float, problem: str = "") -> Cycle:
    """A cycle from the status when it was there."""
    steps = tuple(
        StepTook(name=step.name, took_s=round(step.ended_at - step.started_at, 3))
        for step in there.steps
        if step.started_at is not None and step.ended_at is not None
    )
    figures: dict[str, Any] = {}
    for step in there.steps:
        figures.update({k: v for k, v in step.figures.items() if isinstance(v, int | float | str)})
    return Cycle(
        number=number,
        steps=steps,
        figures=figures,
        there_s=round(sum(step.took_s for step in steps), 3),
        back_s=round(back_s, 3),
        problem=problem,
    )


def compared(migration: str, cycles: Sequence[Cycle]) -> Rehearsed:
    """Lay cycles side by side."""
    took = [(step.took_s, f"{step.name} (cycle {one.number})") for one in cycles for step in one.steps]
    slowest_s, slowest = max(took, default=(0.0, ""))
    differed = {}
    for name in COMPARED:
        values = tuple(one.figures.get(name) for one in cycles)
        if len(set(values)) > 1:
            differed[name] = values
    wrong = any(
        one.problem or any(one.figures.get(f"rows_{kind}") for kind in ("missing", "foreign", "differing"))
        for one in cycles
    )
    return Rehearsed(
        migration=migration,
        cycles=tuple(cycles),
        slowest=slowest,
        slowest_s=slowest_s,
        differed=differed,
        good=bool(cycles) and not wrong,
    )
