"""Checks a certificate by itself: no database, no network, no trust in who wrote it.

What it shows: the file is as it was issued, by whose key; nothing is missing in the audit log; every verdict
follows from its sample; no wave went further than the plan let it; the sums are those of the accounts. What
it cannot show is that the samples were measured rightly: for that, who issued it has to be trusted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from fleetlift import __version__
from fleetlift.core import chain
from fleetlift.core.certificate import (
    FORMAT,
    Certificate,
    add_up,
    digest_of,
    first_difference,
    read,
    to_sign,
)
from fleetlift.core.errors import BadInput
from fleetlift.core.migration import MemberState, Phase
from fleetlift.core.plan import Plan, ladder
from fleetlift.core.ranges import RangeSet
from fleetlift.core.retrace import About, Retrace
from fleetlift.core.units import format_devices

ENDS: Final = {
    "migration_finished": Phase.FINISHED,
    "migration_reverted": Phase.REVERTED,
    "migration_released": Phase.RELEASED,
}
TOLD_MAX: Final = 50  # problems of one check that are told

ReadPlan = Callable[[str, Sequence[str]], Plan]
"""(text, kinds of sides that it may name) → the plan. Raises BadInput."""
IsSigned = Callable[[str, bytes, str], bool]
"""(key, message, signature), as the certificate writes them → whether the key has signed the message."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was checked. `detail` says what was found, `problems` what was wrong and where."""

    name: str
    ok: bool
    detail: str = ""
    problems: tuple[str, ...] = ()


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. `issuer_checked`: the key was compared with one that the reader knows."""

    ok: bool
    checks: tuple[Check, ...]
    migration: str = ""
    tenant: str = ""
    phase: str = ""
    finished: bool = False
    started_at: str = ""
    ended_at: str | None = None
    issued_at: str = ""
    fleetlift: str = ""
    key: str = ""
    issuer_checked: bool = False
    digest: str = ""
    chain_head: str = ""
    members: dict[str, int] = {}  # by state
    stored: int = 0
    missing: int = 0
    commands: int = 0
    executed_twice: int = 0


def verify(
    data: bytes, *, read_plan: ReadPlan, is_signed: IsSigned, trusted_key: str | None = None
) -> Verification:
    """Check the certificate in a file, all of it, whatever is wrong. `trusted_key`: the issuer's."""
    try:
        found = read(data)
        line = first_difference(found, data)
    except (BadInput, RecursionError, ValueError) as error:
        text = str(error) if isinstance(error, BadInput) else "it holds what no certificate does"
        return Verification(ok=False, checks=(Check(name="file", ok=False, problems=(text,)),))
    wrong = [] if line is None else [f"line {line} is not as a certificate is written: it was changed"]
    digest = digest_of(found)
    checks = [
        _check("file", wrong, f"{len(data):,} bytes, {FORMAT}"),
        _check(
            "digest",
            [] if digest == found.digest else ["the contents do not have the digest they should"],
            f"sha256 {found.digest[:16]}…",
        ),
        _signature(found, digest, is_signed, trusted_key),
    ]
    plans, problems = _plans(found, read_plan)
    times = list(_moments(found))
    checks.append(_check("plan", problems, f"{len(found.plans)} version{'s' * (len(found.plans) != 1)}"))
    checks.append(_chain(found, times))
    if plans and not problems and not times:
        checks += _story(found, plans)
    else:
        checks.append(_check("decisions", ["cannot be gone through without plan and times"], ""))
    checks += [_ledger(found), _commands(found)]
    return Verification(
        ok=all(check.ok for check in checks),
        checks=tuple(checks),
        migration=found.migration,
        tenant=found.tenant,
        phase=found.phase,
        finished=found.finished,
        started_at=found.started_at,
        ended_at=found.ended_at,
        issued_at=found.issued_at,
        fleetlift=found.fleetlift,
        key=found.key,
        issuer_checked=trusted_key is not None,
        digest=found.digest,
        chain_head=found.chain_head,
        members=dict(Counter(member.state for member in found.members)),
        stored=found.sums.stored,
        missing=found.sums.missing,
        commands=found.commands.total,
        executed_twice=found.commands.executed_twice,
    )


def _check(name: str, problems: Iterable[str], detail: str) -> Check:
    listed = list(problems)
    told = listed[:TOLD_MAX]
    if len(listed) > TOLD_MAX:
        told.append(f"and {len(listed) - TOLD_MAX} more")
    return Check(name=name, ok=not listed, detail=detail, problems=tuple(told))


def _signature(found: Certificate, digest: str, is_signed: IsSigned, trusted_key: str | None) -> Check:
    problems = []
    if not is_signed(found.key, to_sign(digest), found.signature):
        problems.append(f"{found.key or 'no key'} has not signed these contents")
    if trusted_key is not None and found.key != trusted_key:
        problems.append(f"issued by {found.key}, not by the key that was given ({trusted_key})")
    detail = (
        f"by {found.key[:24]}…" if trusted_key is not None else "who issued it was not checked: give --key"
    )
    return _check("signature", problems, detail)


def _plans(found: Certificate, read_plan: ReadPlan) -> tuple[list[tuple[str, Plan]], list[str]]:
    plans, problems = [], []
    for place, version in enumerate(found.plans, 1):
        if version.version != place:
            problems.append(f"version {version.version} stands where version {place} belongs")
        try:
            plan = read_plan(version.text, (found.old.kind, found.new.kind))
        except BadInput as error:
            problems.append(f"version {version.version} is no plan: {error}")
            continue
        plans.append((chain.digest(version.text), plan))
        said = (found.migration, found.tenant, found.old.kind, found.old.address, found.new.kind)
        if said != (plan.name, plan.fleet.tenant, plan.old.kind, plan.old.address, plan.new.kind) or (
            found.new.address != plan.new.address
        ):
            problems.append(f"version {version.version} is of another migration, tenant or sides")
    if not found.plans:
        problems.append("there is no plan")
    return plans, problems


def _moments(found: Certificate) -> Iterable[str]:
    """The times that are none."""
    times = [found.issued_at, found.started_at, found.ended_at]
    times += [version.since for version in found.plans]
    times += [entry.at for entry in found.audit]
    times += [at for member in found.members for at in (member.told_at, member.moved_at)]
    for at in filter(None, times):
        try:
            chain.read_time(at)
        except (ValueError, OverflowError):
            yield f"{at[:60]!r} is no time"


def _chain(found: Certificate, times: Sequence[str]) -> Check:
    problems = list(times)
    first = found.plans[0].text if found.plans else ""
    problems += chain.broken(found.migration, first, found.audit)
    if not found.audit or found.audit[-1].hash != found.chain_head:
        problems.append("the last entry does not have the hash that the certificate names as the last")
    return _check("audit log", problems, f"{len(found.audit):,} entries in one chain")


def _story(found: Certificate, plans: Sequence[tuple[str, Plan]]) -> list[Check]:
    """What the audit log tells, gone through again, and whether the rest of the certificate fits it."""
    trail = Retrace(plans)
    trail.run(found.audit)
    told = trail.problems
    gates = list(told[About.GATES])
    if gates and found.fleetlift != __version__:
        gates.append(
            f"issued by Fleetlift {found.fleetlift}, and this is {__version__}: verify it with that one"
        )
    devices = max(trail.raised.values(), default=0)
    return [
        _check("gates", gates, f"{trail.verdicts:,} verdicts computed again"),
        _check("shares", told[About.SHARES], f"at most {format_devices(devices)} on a rung, as approved"),
        _check("decisions", [*told[About.PLAN], *told[About.ORDER]], f"{trail.passed:,} waves passed"),
        _check("state", _state(found, trail), f"{found.phase}, {format_devices(len(found.members))}"),
    ]


def _state(found: Certificate, trail: Retrace) -> Iterable[str]:
    if found.phase != trail.phase:
        yield f"the certificate says {found.phase}, the audit log comes to {trail.phase}"
    if found.finished != (found.phase in set(ENDS.values())):
        yield f"a migration that is {found.phase} is {'not ' if found.finished else ''}over"
    ends = [entry for entry in found.audit if entry.kind in ENDS]
    if found.ended_at != (ends[-1].at if ends and found.finished else None):
        yield "it did not end when the certificate says"
    if found.audit and found.started_at != found.audit[0].at:
        yield "it did not start when the certificate says"
    since = [found.started_at, *(e.at for e in found.audit if e.kind == "plan_amended")]
    if any(version.since not in since for version in found.plans):
        yield "a plan is from another moment than the audit log says"
    if len({m.device for m in found.members}) < len(found.members):
        yield "a device is listed twice"
    if len({m.rank for m in found.members}) < len(found.members):
        yield "two devices have the same rank"
    top = len(ladder(trail.plan)) - 1
    for member in found.members:
        if member.state not in set(MemberState) or not 0 <= member.rung <= top:
            yield f"{member.device} stands nowhere on the ladder"
        elif member.rung > 0 and (member.epoch < 1 or member.told_at is None):
            yield f"{member.device} stands on rung {member.rung} and was never told"
        elif member.state == MemberState.MOVED and member.rung > 0 and member.moved_at is None:
            yield f"{member.device} is moved, and nobody has seen it move"
    standing = [m for m in found.members if m.state != MemberState.EXCLUDED]
    for rung in range(1, top + 1):
        here = sum(m.rung >= rung for m in standing)
        # A device that joined late may have come here by a wave of a higher rung.
        most = max((raised for at, raised in trail.raised.items() if at >= rung), default=0)
        if here > most:
            yield f"{here} devices stand on rung {rung} or higher, and no wave brought more than {most} there"
    by_state = Counter(m.state for m in found.members)
    if found.audit and found.audit[-1].kind == "migration_finished":
        then = found.audit[-1].evidence.get("moved")
        if not isinstance(then, int) or by_state[MemberState.MOVED] < then:
            yield f"{by_state[MemberState.MOVED]} devices are moved, {then} were when it finished"
    if trail.phase is Phase.REVERTED and any(m.rung > 0 for m in standing):
        yield "it is reverted, and devices stand on the new side"


def _ledger(found: Certificate) -> Check:
    problems = []
    members = {member.device for member in found.members}
    last = ("", "", "")
    for one in found.accounts:
        name = f"{one.device} {one.channel} by {one.path}"
        if (key := (one.device, one.channel, one.path)) <= last:
            problems.append(f"{name}: stands twice, or out of its order")
        last = key
        if one.device not in members:
            problems.append(f"{name}: is no device of the migration")
        try:
            count = RangeSet.from_pg(one.ranges).count
        except ValueError:
            problems.append(f"{name}: {one.ranges[:40]!r} are no ranges")
            continue
        if min(one.doubles, one.uncounted) < 0 or one.received != count + one.doubles + one.uncounted:
            problems.append(f"{name}: {one.received:,} copies are not what its numbers and doubles come to")
    if not problems:
        sums, totals = add_up(found.accounts)
        if totals != found.totals:
            problems.append("the totals by path and channel are not the sums of the accounts")
        if sums != found.sums:
            problems.append(
                f"the accounts come to {sums.stored:,} stored, {sums.missing:,} missing and "
                f"{sums.by_several_paths:,} by several paths, not to what the certificate says"
            )
    detail = f"{found.sums.stored:,} messages stored, {found.sums.missing:,} numbers missing"
    return _check("ledger", problems, detail)


def _commands(found: Certificate) -> Check:
    own, problems = found.commands, []
    if sum(own.by_status.values()) != own.total or not 0 <= own.executed_twice <= own.total:
        problems.append(f"the states do not add up to {own.total:,}")
    return _check("commands", problems, f"{own.total:,} commands, {own.executed_twice:,} executed twice")
