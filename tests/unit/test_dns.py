"""The DNS lever's decisions: what is to stand at a name, when, and how to tell where a name is."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.dns import (
    MOVES,
    REVERSE,
    DnsRecord,
    Event,
    HonoursTtl,
    IgnoresTtl,
    Phase,
    PinsFirst,
    RecordsChanged,
    RecordSet,
    RecordType,
    Weighted,
    advance,
    agrees,
    checked_name,
    checked_record,
    checked_share,
    checked_values,
    gone_at,
    lowered,
    may_switch_at,
    phase_of,
    share_of,
    stale_resolutions,
    switched,
)
from fleetlift.core.errors import BadInput, Conflict, Forbidden
from fleetlift.levers.rfc2136 import TsigKey, parse_key, read_key

RECORD = DnsRecord(name="iot.example.com", old=("192.0.2.1",), new=("198.51.100.1",), ttl_s=30)
ORIGINAL = RecordSet(name="iot.example.com", type=RecordType.A, ttl_s=3600, values=("192.0.2.1",))


def test_every_step_has_a_way_back() -> None:
    """From every phase the name can be brought back to how it was, and no phase is a dead end."""
    for phase in Phase:
        reached = {phase}
        while more := {after for one in reached for after in MOVES[one].values()} - reached:
            reached |= more
        assert Phase.PLANNED in reached and Phase.SETTLED in reached
    for event, back in REVERSE.items():
        for before, moves in MOVES.items():
            if event in moves:
                assert back in MOVES[moves[event]], f"{event} from {before} cannot be undone"
    with pytest.raises(Conflict, match="cannot switch; possible: lower"):
        advance(Phase.PLANNED, Event.SWITCH)
    with pytest.raises(Conflict):
        advance(Phase.TTL_LOWERED, Event.SWITCH)


@given(st.integers(0, 200))
def test_a_share_that_was_set_is_read_back(steps: int) -> None:
    share = steps / 2
    there = switched(RECORD, ORIGINAL, share)
    assert share_of(RECORD, ORIGINAL, there) == share
    assert there.ttl_s == 30
    assert bool(there.weights) == (0 < share < 100)
    assert sum(one.weight for one in there.weights) in (0, 200)


def test_phases_are_read_from_what_stands() -> None:
    low, new = lowered(ORIGINAL, 30), switched(RECORD, ORIGINAL, 100)
    settled = RecordSet(name=new.name, type=new.type, ttl_s=3600, values=new.values)
    found = [
        phase_of(RECORD, ORIGINAL, there, waited=waited)
        for there, waited in ((ORIGINAL, False), (low, False), (low, True), (new, True), (settled, True))
    ]
    assert found == list(Phase)
    assert lowered(low, 60).ttl_s == 30, "a TTL is never raised by lowering it"


@pytest.mark.parametrize(
    "values", [("203.0.113.1",), ("192.0.2.1", "198.51.100.1"), ("192.0.2.1", "203.0.113.1"), ()]
)
def test_what_is_nobodys_is_somebody_elses(values: tuple[str, ...]) -> None:
    there = RecordSet(name=ORIGINAL.name, type=RecordType.A, ttl_s=30, values=values)
    with pytest.raises(RecordsChanged, match="neither"):
        share_of(RECORD, ORIGINAL, there)


def test_a_foreign_weight_is_somebody_elses() -> None:
    ours = switched(RECORD, ORIGINAL, 10).weights
    for weights in (ours[:1], (*ours, Weighted(id="x", weight=1, values=("203.0.113.1",)))):
        there = RecordSet(name=ORIGINAL.name, type=RecordType.A, ttl_s=30, values=(), weights=weights)
        with pytest.raises(RecordsChanged):
            share_of(RECORD, ORIGINAL, there)


def test_plain_dns_takes_no_share() -> None:
    assert [checked_share(share, weighted=False) for share in (0, 100)] == [0, 100]
    with pytest.raises(BadInput, match="relay"):
        checked_share(50, weighted=False)
    for share in (-1, 101, 0.25, math.nan, math.inf):
        with pytest.raises(BadInput):
            checked_share(share, weighted=True)


def test_a_weighted_name_answers_with_one_side() -> None:
    wanted = switched(RECORD, ORIGINAL, 50)
    answer = RecordSet(name=ORIGINAL.name, type=RecordType.A, ttl_s=30, values=("198.51.100.1",))
    assert agrees(wanted, answer)
    assert not agrees(wanted, RecordSet(name=answer.name, type=answer.type, ttl_s=31, values=answer.values))
    assert not agrees(
        wanted, RecordSet(name=answer.name, type=answer.type, ttl_s=30, values=("203.0.113.1",))
    )
    assert not agrees(ORIGINAL, answer)


@given(
    st.floats(0, 1e6),
    st.floats(1, 1e5),
    st.floats(0, 1e5),
    st.sampled_from([HonoursTtl(), IgnoresTtl(min_s=50)]),
)
def test_no_cache_that_honours_ttls_holds_a_long_one_after_the_wait(
    lowered_at: float, old_ttl_s: float, before_s: float, model: HonoursTtl | IgnoresTtl
) -> None:
    """Whenever before the lowering a cache asked, it has asked again by the switch; else it ignores TTLs."""
    asked_at = lowered_at - before_s
    expires = asked_at + model.keeps_s(old_ttl_s)
    if isinstance(model, HonoursTtl):
        assert expires <= may_switch_at(lowered_at, old_ttl_s)
    else:
        assert expires <= may_switch_at(lowered_at, max(old_ttl_s, 50))


def test_stale_shares() -> None:
    assert [stale_resolutions(t, 30) for t in (-1, 0, 15, 30, 60)] == [1, 1, 0.5, 0, 0]
    assert stale_resolutions(60, 30, share_percent=10) == pytest.approx(0.9)
    assert stale_resolutions(15, 30, share_percent=50) == pytest.approx(0.75)
    assert gone_at(100, 30) == 130
    assert PinsFirst().keeps_s(30) == math.inf


@pytest.mark.parametrize(
    "text", ["", ".", "a..b", "-a.b", "a b", "é.example", "a" * 64, "a." * 127 + "bb", "*.a"]
)
def test_bad_names(text: str) -> None:
    with pytest.raises(BadInput, match="not a host name"):
        checked_name(text)


def test_names_and_values_have_one_form() -> None:
    assert checked_name("IoT.Example.com.") == "iot.example.com"
    assert checked_values(RecordType.A, ["192.0.2.10", "192.0.2.9", "192.0.2.9"]) == (
        "192.0.2.9",
        "192.0.2.10",
    )
    assert checked_values(RecordType.AAAA, ["2001:DB8:0::1"]) == ("2001:db8::1",)
    assert checked_values(RecordType.CNAME, ["Cloud.example.net."]) == ("cloud.example.net",)
    for kind, values in itertools.product(RecordType, (["nonsense!"], ["1.2.3"], ["a.b", "c.d"])):
        if (kind, values) != (RecordType.CNAME, ["1.2.3"]):
            with pytest.raises(BadInput):
                checked_values(kind, values)
    with pytest.raises(BadInput, match="old and new at once"):
        checked_record(DnsRecord(name="a.b", old=("192.0.2.1",), new=("192.0.2.1", "192.0.2.2")))
    for wrong in (DnsRecord(name="a.b", new=()), DnsRecord(name="a.b", new=("192.0.2.1",), ttl_s=0)):
        with pytest.raises(BadInput):
            checked_record(wrong)


def test_a_key_is_read_and_never_shown(tmp_path) -> None:  # type: ignore[no-untyped-def]
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQ="
    made = f'key "mover" {{\n\talgorithm hmac-sha512;\n\tsecret "{secret}";\n}};\n'
    wanted = TsigKey(name="mover", algorithm="hmac-sha512", secret=b"secret-secret-secret")
    file = tmp_path / "key"
    file.write_text(made)
    file.chmod(0o600)
    assert parse_key(f"hmac-sha512:mover:{secret}") == parse_key(made) == read_key(str(file)) == wanted
    assert read_key("env:KEY", {"KEY": f"mover:{secret}"}).algorithm == "hmac-sha256"
    assert "secret-secret" not in repr(wanted) and secret not in repr(wanted)
    file.chmod(0o640)
    with pytest.raises(Forbidden, match="chmod 600"):
        read_key(str(file))
    for wrong in ("", secret, f"hmac-md4:mover:{secret}", "mover:***", "a:b:c:d"):
        with pytest.raises(BadInput) as refused:
            parse_key(wrong)
        assert secret not in str(refused.value)
    with pytest.raises(BadInput, match="KEY is not set"):
        read_key("env:KEY", {})
    with pytest.raises(BadInput, match="cannot be read"):
        read_key(str(tmp_path / "missing"))
