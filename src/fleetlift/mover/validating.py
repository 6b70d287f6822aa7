"""The step `validate: load`: a load test against the new side, its result judged by the step's gates."""

import asyncio
import os
from collections.abc import Mapping

import msgspec

from fleetlift.config import read_env
from fleetlift.core.errors import BadInput
from fleetlift.core.load_result import LoadResult, load_samples
from fleetlift.core.migration import Sample
from fleetlift.core.tenant.plan import Validate
from fleetlift.core.units import format_quantity
from fleetlift.load.run import Progress, Target, run_load
from fleetlift.load.scenario import parse_scenario
from fleetlift.load.witness import FleetliftApi
from fleetlift.migrate.tenant_report import load_file
from fleetlift.mover.move import Move


async def validate(move: Move, at: int) -> str:
    """Play the scenario; what came of it is kept for gates and report."""
    step = step_of(move, at)
    scenario = parse_scenario(move.files[step.scenario], file=step.scenario)
    async with _api(move) as api:
        result = await run_load(
            scenario,
            Target(url=move.plan.new.mqtt, ca=_ca(move), api=api, provision=True),
            rate_s=step.rate_s,
            for_s=step.for_s,
            progress=lambda p: _tell(move, p),
        )
    move.kill("load-played")
    await asyncio.to_thread(_write, move, at, result)
    move.tell(
        "load test done",
        load_offered=result.counts.offered,
        load_accepted=result.counts.accepted,
        load_errors=result.errors,
        load_lost=result.lost,
        load_p99_s=result.latency.p99_s,
        offered_s=None,
    )
    if not result.valid:
        raise BadInput(f"the load test does not count: {'; '.join(result.invalid)}")
    return (
        f"{result.counts.accepted:,} of {result.counts.offered:,} messages accepted at "
        f"{result.rate_s:,.0f}/s, p99 {format_quantity(result.latency.p99_s, 's')}"
    )


def step_of(move: Move, at: int) -> Validate:
    step = move.plan.steps[at]
    assert isinstance(step, Validate)
    return step


def _api(move: Move) -> FleetliftApi:
    """The new side's API, when it is a Fleetlift: the plan's `api:`, else this instance itself."""
    new = move.plan.new
    if new.api:
        token = os.environ.get(new.token_env, "") if new.token_env else ""
        if not token:
            raise BadInput(
                f"the new side's API wants a token: set {new.token_env or 'token_env in the plan'} "
                "where Fleetlift runs"
            )
        return FleetliftApi(new.api, token, new.ca_file or None)
    settings = move.settings
    own = read_env(settings.path / "admin.env")
    return FleetliftApi(settings.http_url, own["FLEETLIFT_TOKEN"], _ca(move))


def _ca(move: Move) -> str | None:
    return move.plan.new.ca_file or move.settings.ca_file or None


def _tell(move: Move, shown: Progress) -> None:
    if not shown.at_s:
        move.tell(f"load test: {shown.doing} {shown.done:,} of {shown.total:,}")
        return
    p99 = "–" if shown.p99_s is None else format_quantity(shown.p99_s, "s")
    move.tell(
        f"load: {shown.offered_s:,.0f}/s offered, {shown.rate_s:,.0f}/s accepted, p99 {p99}, "
        f"{shown.left_s:.0f} s left",
        offered_s=shown.offered_s,
        accepted_s=shown.rate_s,
        load_p99_s=shown.p99_s,
    )


def _write(move: Move, at: int, result: LoadResult) -> None:
    path = load_file(move.settings.path, move.name, at)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(result))
    part.replace(path)


def read_result(move: Move, at: int) -> LoadResult | None:
    """The newest result of the step, None while there is none."""
    try:
        return msgspec.json.decode(load_file(move.settings.path, move.name, at).read_bytes(), type=LoadResult)
    except FileNotFoundError:
        return None


async def measure(move: Move, at: int) -> Mapping[str, Sample]:
    """A sample for each of the step's gates, by its text; none while there is no result."""
    result = await asyncio.to_thread(read_result, move, at)
    if result is None:
        return {}
    found = load_samples(result)
    return {gate.text: found[gate.metric] for gate in step_of(move, at).gates if gate.metric in found}
