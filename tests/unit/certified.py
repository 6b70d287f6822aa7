"""Certificates of pretended migrations, for the tests of verification."""

from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from pretend import START, Pretend

from fleetlift import __version__
from fleetlift.core import chain
from fleetlift.core.certificate import (
    FORMAT,
    Account,
    Certificate,
    Commands,
    PlanVersion,
    SideName,
    Standing,
    add_up,
    digest_of,
    render,
    sealed,
    to_sign,
)
from fleetlift.core.errors import BadInput
from fleetlift.core.migration import AuditEntry, Decision, RequestKind
from fleetlift.core.plan import Plan
from fleetlift.core.verification import ENDS, Verification, verify
from fleetlift.migrate.certificate import is_signed, public_text

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
TEXT = "the plan as a file"


class Recorded(Pretend):
    """A pretended migration whose audit log keeps its times, from the start on."""

    def __init__(self, the_plan: Plan, devices: int = 20, *, text: str = TEXT) -> None:
        super().__init__(the_plan, devices)
        started = AuditEntry(kind="migration_started", text="started")
        self.history: list[tuple[float, AuditEntry]] = [(START, started)]
        self.plans: list[tuple[float, str, Plan]] = [(START, text, the_plan)]

    def step(self, **how: Any) -> Decision:
        now = self.now
        decision = super().step(**how)
        self.history += [(now, entry) for entry in decision.audit]
        return decision

    def amend(self, text: str, plan: Plan) -> None:
        """What the controller does with an amendment: one round by the new plan, its text in the request."""
        self.ask(RequestKind.AMEND, plan=text)
        self.plan = plan
        self.plans.append((self.now, text, plan))
        self.step()


def accounts(devices: Sequence[str]) -> tuple[Account, ...]:
    """What both paths brought of each: some by both, some doubled, one number missing."""
    return tuple(
        Account(
            device=device,
            channel="can",
            path=path,
            ranges=ranges,
            received=received,
            doubles=doubles,
            uncounted=0,
        )
        for device in sorted(devices)
        for path, ranges, received, doubles in (
            ("legacy", "{[1,41),[42,61)}", 61, 2),
            ("mqtt", "{[50,101)}", 51, 0),
        )
    )


def certificate(p: Recorded) -> Certificate:
    """The certificate of what `p` has done so far, sealed by `KEY`."""
    links: list[chain.Link] = []
    previous = chain.root(p.plan.name, p.plans[0][1])
    for at, entry in p.history:
        links.append(chain.link(p.plan.name, previous, len(links) + 1, chain.written(at), entry))
        previous = links[-1].hash
    phase = p.state.phase
    finished = phase in ENDS.values()
    ends = [one.at for one in links if one.kind in ENDS]
    held = accounts(list(p.state.members)[:3])
    sums, totals = add_up(held)
    return seal(
        Certificate(
            format=FORMAT,
            fleetlift=__version__,
            migration=p.plan.name,
            tenant=p.plan.fleet.tenant,
            issued_at=chain.written(p.now),
            finished=finished,
            phase=phase,
            started_at=chain.written(START),
            ended_at=ends[-1] if finished else None,
            old=SideName(kind=p.plan.old.kind, address=p.plan.old.address),
            new=SideName(kind=p.plan.new.kind, address=p.plan.new.address),
            chain_head=previous,
            sums=sums,
            commands=Commands(total=9, by_status={"succeeded": 7, "expired": 2}, executed_twice=0),
            plans=tuple(
                PlanVersion(version=n, since=chain.written(at), text=text)
                for n, (at, text, _) in enumerate(p.plans, 1)
            ),
            audit=tuple(links),
            members=tuple(
                Standing(
                    device=m.device,
                    rank=m.rank,
                    rung=m.rung,
                    wave=m.wave,
                    epoch=m.epoch,
                    state=m.state,
                    reason=m.reason,
                    told_at=None if m.told_at is None else chain.written(m.told_at),
                    moved_at=None if m.moved_at is None else chain.written(m.moved_at),
                )
                for m in sorted(p.state.members.values(), key=lambda m: m.rank)
            ),
            totals=totals,
            accounts=held,
        )
    )


def seal(unsealed: Certificate, key: Ed25519PrivateKey = KEY) -> Certificate:
    signature = key.sign(to_sign(digest_of(unsealed))).hex()
    return sealed(unsealed, key=public_text(key), signature=signature)


def chained_again(found: Certificate, **changes: Any) -> Certificate:
    """The certificate of a forger who knows how: chain, digest and signature made anew, by a key of his."""
    forged = replace(found, **changes)
    links: list[chain.Link] = []
    previous = chain.root(forged.migration, forged.plans[0].text)
    for one in forged.audit:
        unsealed = replace(one, number=len(links) + 1)
        links.append(replace(unsealed, hash=chain.hash_of(forged.migration, previous, unsealed)))
        previous = links[-1].hash
    return seal(replace(forged, audit=tuple(links), chain_head=previous), STRANGER)


def verified(p: Recorded, data: bytes | Certificate, *, trusted_key: str | None = None) -> Verification:
    known = {text: plan for _, text, plan in p.plans}

    def read_plan(text: str, kinds: Sequence[str]) -> Plan:
        if text not in known:
            raise BadInput("no such plan")
        return known[text]

    given = data if isinstance(data, bytes) else render(data)
    return verify(given, read_plan=read_plan, is_signed=is_signed, trusted_key=trusted_key)


def problems(found: Verification) -> dict[str, tuple[str, ...]]:
    """What was wrong, by check."""
    return {check.name: check.problems for check in found.checks if not check.ok}
