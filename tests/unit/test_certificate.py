"""The certificate: whatever happened, it verifies; whatever is changed in it, it does not."""

import json
import random
from typing import Any

import pytest
from certified import KEY, STRANGER, Recorded, certificate, chained_again, problems, seal, verified
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from pretend import plan, shake

from fleetlift.core.certificate import Certificate, render
from fleetlift.core.chain import Link
from fleetlift.core.errors import BadInput
from fleetlift.core.migration import MemberState, Phase, RequestKind, Sample
from fleetlift.core.plan import Move, OnBreach, Plan
from fleetlift.core.units import parse_share
from fleetlift.migrate.certificate import checked_key, is_signed, public_text

COMPLETENESS = "telemetry.completeness >= 99%"
BAD = Sample(value=97.31, n=15310, evidence={"summary": "412 of 15,310 missing, 6 devices"})
GOOD = Sample(value=100.0, n=15310)


def breached_once() -> Recorded:
    """A whole migration with an approval, a breach, a second try and an amendment."""
    p = Recorded(plan(waves=("2 devices", "50%", "100%"), approve=True), 10)
    while p.state.phase is not Phase.FINISHED:
        p.step()
        if p.state.wave_phase == "awaiting-approval" and not p.requests:
            p.ask(RequestKind.APPROVE)
        if p.state.rung == 1 and p.state.wave == 1 and "gate_breached" not in p.kinds():
            p.samples[COMPLETENESS] = BAD
        if p.state.phase is Phase.HELD and p.state.returned_at is not None:
            p.samples[COMPLETENESS] = GOOD
            p.ask(RequestKind.RESUME)
        if p.state.rung == 2 and len(p.plans) == 1:
            p.amend("without the middle wave", plan(waves=("2 devices", "100%"), approve=True))
        assert p.now < 1_800_005_000
    return p


@pytest.fixture(scope="module")
def world() -> Recorded:
    return breached_once()


@pytest.fixture(scope="module")
def whole(world: Recorded) -> Certificate:
    return certificate(world)


# -- what is true verifies -----------------------------------------------------------------------------


def test_a_migration_with_a_breach_and_an_amendment_verifies(world: Recorded, whole: Certificate) -> None:
    found = verified(world, whole)
    assert problems(found) == {}
    assert found.ok and found.phase == "finished" and not found.issuer_checked
    assert {"gate_breached", "wave_approved", "plan_amended"} <= {one.kind for one in whole.audit}
    assert (found.stored, found.missing) == (3 * 99, 3)
    assert verified(world, whole, trusted_key=public_text(KEY)).issuer_checked


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_whatever_happens_the_audit_log_can_be_retraced(seed: int) -> None:
    """Faults, breaches, pauses, reverts, resumes, approvals and new plans in any order."""
    rng = random.Random(seed)
    on_breach = rng.choice(list(OnBreach))
    shape: dict[str, Any] = {
        "moves": rng.choice([(Move.TELEMETRY,), (Move.TELEMETRY, Move.COMMANDS, Move.LINK)]),
        "bake_s": rng.choice([0.0, 5.0]),
        "on_breach": on_breach,
        "approve": rng.random() < 0.3,
        "no_data_after_s": 8.0,
    }
    control = parse_share("20%") if rng.random() < 0.3 else None

    def planned(**other: Any) -> Plan:
        made = plan(**{**shape, **other})
        return replace(made, fleet=replace(made.fleet, control=control))

    p = Recorded(planned(), 12)
    kinds = [kind for kind in RequestKind if kind not in (RequestKind.AMEND, RequestKind.RELEASE)]
    for round_ in range(rng.choice([60, 250])):
        if rng.random() < 0.15:
            shake(p, rng)
        if rng.random() < 0.1:
            p.samples[COMPLETENESS] = rng.choice(
                [BAD, GOOD, GOOD, GOOD, Sample(value=None), Sample(value=float("nan"))]
            )
        if rng.random() < 0.05:
            p.old_up, p.new_up, p.readable = (rng.random() < 0.8 for _ in range(3))
        if p.state.wave_phase == "awaiting-approval" and rng.random() < 0.5:
            p.ask(RequestKind.APPROVE)
        if p.state.phase not in (Phase.RUNNING, Phase.FINISHED) and rng.random() < 0.2:
            p.ask(RequestKind.RESUME)
        if rng.random() < 0.04:
            kind = rng.choice(kinds)
            args: dict[str, Any] = {}
            if kind is RequestKind.REVERT:
                args = rng.choice([{}, {"wave": True}, {"device": "car-003"}])
            p.ask(kind, **args)
        if rng.random() < 0.02 and p.readable and p.state.phase is not Phase.RELEASED:
            waves = rng.choice([("1 device", "100%"), ("10%", "30%", "60%", "100%")])
            p.amend(f"plan of round {round_}", planned(waves=waves, bake_s=2.0))
        p.step()
    if p.state.phase in (Phase.FINISHED, Phase.REVERTED) and rng.random() < 0.5:
        p.ask(RequestKind.RELEASE, force=True)
        p.step()
    found = certificate(p)
    assert problems(verified(p, found)) == {}


# -- what was changed does not -------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_changed_byte_anywhere_is_found(world: Recorded, whole: Certificate, data: st.DataObject) -> None:
    """Any byte, set to any other, left out or put in; the same for whole lines."""
    file = render(whole)
    place = data.draw(st.integers(0, len(file) - 1))
    match data.draw(st.sampled_from(["set", "flip", "drop", "insert", "line", "twice"])):
        case "set":
            other = data.draw(st.integers(0, 255).filter(lambda byte: byte != file[place]))
            changed = file[:place] + bytes([other]) + file[place + 1 :]
        case "flip":
            bit = 1 << data.draw(st.integers(0, 7))
            changed = file[:place] + bytes([file[place] ^ bit]) + file[place + 1 :]
        case "drop":
            changed = file[:place] + file[place + 1 :]
        case "insert":
            changed = (
                file[:place] + data.draw(st.sampled_from([b" ", b"\n", b"0", b",", b"\xff"])) + file[place:]
            )
        case "line":
            lines = file.splitlines(keepends=True)
            changed = b"".join(lines[: place % len(lines)] + lines[place % len(lines) + 1 :])
        case _:
            lines = file.splitlines(keepends=True)
            changed = b"".join(
                [*lines[: place % len(lines)], lines[place % len(lines)], *lines[place % len(lines) :]]
            )
    assert changed == file or not verified(world, changed).ok


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_changed_entry_is_found_also_under_a_new_digest_and_signature(
    world: Recorded, whole: Certificate, data: st.DataObject
) -> None:
    """Who changes, drops, doubles or moves entries and seals the file anew has broken the chain."""
    place = data.draw(st.integers(0, len(whole.audit) - 1))
    one, before, after = whole.audit[place], whole.audit[:place], whole.audit[place + 1 :]
    other = data.draw(st.integers(0, len(whole.audit) - 1).filter(lambda n: n != place))
    swapped = list(whole.audit)
    swapped[place], swapped[other] = swapped[other], swapped[place]
    audit = data.draw(
        st.sampled_from(
            [
                (*before, *after),
                (*before, one, one, *after),
                tuple(swapped),
                (*before, replace(one, text=one.text + " "), *after),
                (*before, replace(one, actor="nobody"), *after),
                (*before, replace(one, evidence={**one.evidence, "n": 1}), *after),
            ]
        )
    )
    found = verified(world, seal(replace(whole, audit=audit)))
    assert "audit log" in problems(found)
    assert not {"file", "digest", "signature"} & problems(found).keys()


def forged(whole: Certificate, kind: str, change: Any) -> Certificate:
    """The first entry of `kind` with its evidence changed, the chain made anew."""
    place = next(n for n, one in enumerate(whole.audit) if one.kind == kind)
    evidence = json.loads(json.dumps(whole.audit[place].evidence))
    change(evidence)
    audit = (*whole.audit[:place], replace(whole.audit[place], evidence=evidence), *whole.audit[place + 1 :])
    return chained_again(whole, audit=audit)


def set_gate(**what: Any) -> Any:
    return lambda evidence: evidence["gates"][0].update(what)


@pytest.mark.parametrize(
    ("kind", "change", "check"),
    [
        ("wave_passed", set_gate(verdict="hold"), "gates"),
        ("wave_passed", set_gate(why="telemetry.completeness 99.9 % >= 99 % (n = 1,000)"), "gates"),
        ("wave_passed", set_gate(sample={"value": 97.0, "n": 1000}), "gates"),
        ("wave_passed", set_gate(sample={"value": None}), "gates"),
        ("wave_passed", set_gate(sample={"value": 1e308, "n": 10**400}), "gates"),
        ("wave_passed", lambda e: e["gates"].pop(), "gates"),
        ("wave_passed", lambda e: e.update(gates=[]), "gates"),
        ("wave_passed", lambda e: e.pop("gates"), "gates"),
        ("gate_breached", set_gate(verdict="advance", why="it held"), "gates"),
        ("gate_breached", lambda e: e.update(gate="moves.success >= 95%"), "gates"),
        ("wave_opened", lambda e: e.update(limit=5), "shares"),
        ("wave_opened", lambda e: e.update(told=5, raised=5), "shares"),
        ("wave_opened", lambda e: e.update(told=0), "shares"),
        ("wave_opened", lambda e: e.update(fleet=10**12), "decisions"),
        ("wave_opened", lambda e: e.update(wave=1), "decisions"),
        ("wave_opened", lambda e: e.update(rung=-1), "decisions"),
        ("wave_opened", lambda e: e.pop("rung"), "decisions"),
        ("plan_amended", lambda e: e.update(plan="0" * 64), "decisions"),
        ("migration_resumed", lambda e: e.update(was="paused"), "decisions"),
        ("migration_finished", lambda e: e.update(moved=11), "state"),
    ],
)
def test_a_forged_figure_is_found_though_the_chain_holds(
    world: Recorded, whole: Certificate, kind: str, change: Any, check: str
) -> None:
    """What follows from plan and sample is computed again, so a chain made anew does not help."""
    found = verified(world, forged(whole, kind, change))
    assert check in problems(found)
    assert not {"file", "digest", "signature", "audit log"} & problems(found).keys()


@pytest.mark.parametrize(
    "kind", ["wave_opened", "wave_moved", "wave_awaits_approval", "wave_approved", "wave_passed"]
)
def test_a_step_left_out_is_found_though_the_chain_holds(
    world: Recorded, whole: Certificate, kind: str
) -> None:
    for place, one in enumerate(whole.audit):
        if one.kind == kind:
            found = verified(
                world, chained_again(whole, audit=whole.audit[:place] + whole.audit[place + 1 :])
            )
            assert "decisions" in problems(found), place


def test_a_bake_cut_short_is_found(world: Recorded, whole: Certificate) -> None:
    place = next(n for n, one in enumerate(whole.audit) if one.kind == "wave_moved")
    later = next(one.at for one in whole.audit if one.kind == "wave_passed")
    audit: tuple[Link, ...] = (
        *whole.audit[:place],
        replace(whole.audit[place], at=later),
        *whole.audit[place + 1 :],
    )
    found = verified(world, chained_again(whole, audit=audit))
    assert any("baked for" in text for text in problems(found)["decisions"])


def test_what_does_not_fit_the_audit_log_is_found(world: Recorded, whole: Certificate) -> None:
    """Devices, phase, times, plans and sums have to agree with it and with each other."""
    first = whole.members[0]
    account = whole.accounts[0]
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("state", {"phase": "reverted"}),
        ("state", {"finished": False}),
        ("state", {"ended_at": whole.started_at}),
        ("state", {"started_at": whole.issued_at}),
        ("state", {"members": (*whole.members, replace(first, rank=99))}),
        ("state", {"members": (*whole.members, replace(first, device="car-999", rank=99))}),
        ("state", {"members": (replace(first, rung=9), *whole.members[1:])}),
        ("state", {"members": (replace(first, epoch=0), *whole.members[1:])}),
        ("state", {"members": (replace(first, state=MemberState.STRAGGLER), *whole.members[1:])}),
        ("plan", {"tenant": "another"}),
        ("plan", {"plans": (*whole.plans, replace(whole.plans[1], version=4))}),
        ("plan", {"plans": (whole.plans[0], replace(whole.plans[1], text="never seen"))}),
        ("decisions", {"plans": whole.plans[:1]}),
        ("audit log", {"started_at": "yesterday"}),
        ("ledger", {"sums": replace(whole.sums, missing=0)}),
        ("ledger", {"totals": whole.totals[1:]}),
        ("ledger", {"accounts": (replace(account, ranges="{[1,61)}", received=62), *whole.accounts[1:])}),
        ("ledger", {"accounts": (replace(account, received=60), *whole.accounts[1:])}),
        ("ledger", {"accounts": (replace(account, ranges="{[1,)}"), *whole.accounts[1:])}),
        ("ledger", {"accounts": (account, *whole.accounts)}),
        ("commands", {"commands": replace(whole.commands, total=8)}),
    ]
    for check, changes in wrong:
        found = verified(world, chained_again(whole, **changes))
        assert check in problems(found), (check, changes)


def test_the_key_tells_who_issued_it(world: Recorded, whole: Certificate) -> None:
    """A file sealed anew by somebody else is whole, but not by the key that one knows."""
    other = chained_again(whole)
    assert verified(world, other).ok
    assert problems(verified(world, other, trusted_key=public_text(KEY))).keys() == {"signature"}
    assert "signature" in problems(verified(world, replace(whole, key=public_text(STRANGER))))
    assert "signature" in problems(verified(world, replace(whole, signature=whole.signature.upper())))
    assert not is_signed("", b"", "")
    assert not is_signed("rsa:" + "0" * 64, b"", "0" * 128)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"NaN",
        b"[" * 100_000,
        b'{"format": "fleetlift certificate 2"}',
        b'{"format": "fleetlift certificate 1"}',
        b'{"format": "fleetlift certificate 1", "migration": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_certificate_is_told_so(world: Recorded, data: bytes) -> None:
    found = verified(world, data)
    assert not found.ok
    assert "no" in problems(found)["file"][0]


def test_a_migration_under_way_is_marked_as_such() -> None:
    p = Recorded(plan(), 8)
    p.run(40)
    found = verified(p, certificate(p))
    assert found.ok and not found.finished and found.ended_at is None


def test_a_share_beyond_the_plan_is_found_also_when_it_was_really_done() -> None:
    """The controller's own mistake would show, too: the plan that held says less than the log."""
    p = Recorded(plan(waves=("50%", "100%")), 8)
    p.until(Phase.FINISHED)
    meant = plan(waves=("50%", "100%"))
    step = replace(meant.steps[0], waves=(parse_share("1 device"), parse_share("100%")))
    p.plans[0] = (p.plans[0][0], p.plans[0][1], replace(meant, steps=(step,)))
    assert "shares" in problems(verified(p, certificate(p)))


def test_keys_are_read_as_they_are_shown() -> None:
    text = public_text(KEY)
    assert checked_key(f" {text}\n") == text
    for wrong in ("", "ed25519:", text.upper(), text[:-1], "ssh-ed25519 AAAA"):
        with pytest.raises(BadInput, match="is no public key"):
            checked_key(wrong)
