"""The old side is not released while somebody still needs it (I22)."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlift.core.dns import HonoursTtl, IgnoresTtl, PinsFirst, ResolverModel
from fleetlift.core.stale_tail import Reason, Tail, forecast, may_release, reason

DAY, MONTH = 86_400.0, 30 * 86_400.0
SWITCHED, TTL = 1_000_000.0, 300.0


def tail(**more: object) -> Tail:
    given: dict[str, object] = {
        "devices": {"a", "b", "c"},
        "on_old": {},
        "on_new": {"a": SWITCHED + 10, "b": SWITCHED + 10, "c": SWITCHED + 10},
        "switched_at": SWITCHED,
        "ttl_s": TTL,
        "measured_from": SWITCHED - DAY,
        "measured_until": SWITCHED + DAY,
    }
    return Tail(**{**given, **more})  # type: ignore[arg-type]


NOW = SWITCHED + DAY


def test_a_fleet_that_has_moved_lets_the_old_side_go() -> None:
    verdict = may_release(tail(), now=NOW, epsilon=0.01, longest_sleep_s=3600)
    assert verdict.allowed and verdict.reasons == () and verdict.stale_share == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"on_old": {"a": NOW - 10}}, "still come to the old address.*: a"),
        ({"strangers": {"203.0.113.5": NOW - 10}}, "203.0.113.5"),
        ({"on_new": {"a": NOW, "b": NOW}}, "1 device not seen on either side.*: c"),
        ({"on_new": {"a": NOW, "b": NOW, "c": SWITCHED - 1}}, "1 device not seen.*: c"),
        ({"measured_from": NOW - 60}, "must be watched for 59m more"),
        ({"measured_from": None, "measured_until": None}, "never watched"),
        ({"measured_until": NOW - 61}, "not watched now"),
        ({"switched_at": None}, "not switched"),
        ({"forgotten": 1}, "want of room"),
        ({"devices": set()}, "no device"),
    ],
)
def test_what_holds_it_up(more: dict[str, object], why: str) -> None:
    import re

    verdict = may_release(tail(**more), now=NOW, epsilon=0.01, longest_sleep_s=3600)
    assert not verdict.allowed
    assert any(re.search(why, text) for text in verdict.reasons), verdict.reasons


def test_the_share_must_be_below_epsilon_not_at_it() -> None:
    devices = {f"d{n}" for n in range(100)}
    seen = dict.fromkeys(devices, SWITCHED + 1)
    one = tail(devices=devices, on_new=seen, on_old={"d1": NOW})
    assert not may_release(one, now=NOW, epsilon=0.01, longest_sleep_s=60).allowed
    assert may_release(one, now=NOW, epsilon=0.011, longest_sleep_s=60).allowed
    for epsilon in (0.0, -1.0, math.nan, 1.1):
        assert not may_release(one, now=NOW, epsilon=epsilon, longest_sleep_s=60).allowed


def test_a_sign_off_is_for_those_never_seen_only() -> None:
    missing = tail(on_new={"a": NOW, "b": NOW})
    assert may_release(missing, now=NOW, epsilon=0.01, longest_sleep_s=60, signed_off={"c"}).signed_off == (
        "c",
    )
    assert may_release(missing, now=NOW, epsilon=0.01, longest_sleep_s=60, signed_off={"c"}).allowed
    stale = tail(on_old={"c": NOW}, on_new={"a": NOW, "b": NOW})
    assert not may_release(stale, now=NOW, epsilon=0.01, longest_sleep_s=60, signed_off={"c"}).allowed


def test_one_that_the_relay_leads_to_the_new_side_has_not_moved() -> None:
    """It is seen on the new side all the time, and needs the old address all the same."""
    assert may_release(
        tail(on_old={"a": NOW - 3601}, on_new={"a": NOW, "b": NOW, "c": NOW}),
        now=NOW,
        epsilon=0.01,
        longest_sleep_s=3600,
    ).allowed
    assert not may_release(
        tail(on_old={"a": NOW - 50}, on_new={"a": NOW, "b": NOW, "c": NOW}),
        now=NOW,
        epsilon=0.01,
        longest_sleep_s=3600,
    ).allowed


MODELS = st.one_of(
    st.just(HonoursTtl()),
    st.just(PinsFirst()),
    st.floats(60, 3 * DAY).map(lambda min_s: IgnoresTtl(min_s=min_s)),
)
FLEETS = st.lists(
    st.tuples(MODELS, st.floats(600, MONTH), st.floats(0, 1)), min_size=1, max_size=12
)  # how it resolves, how often it wakes, when in its cycle


@settings(max_examples=60, deadline=None)
@given(FLEETS, st.sampled_from([0.001, 0.2]), st.lists(st.floats(0, 3 * MONTH), max_size=30))
def test_release_strands_nobody(
    fleet: list[tuple[ResolverModel, float, float]], epsilon: float, looks: list[float]
) -> None:
    """Whenever release is allowed with a true longest sleep, less than epsilon of the fleet ever comes to the
    old address again: by caches that ignore TTLs, pinned addresses, and devices that sleep for a month."""
    names = [f"d{n}" for n in range(len(fleet))]
    longest = max(every for _, every, _ in fleet)
    wakes: dict[str, list[tuple[float, str]]] = {}
    for name, (model, every, phase) in zip(names, fleet, strict=True):
        at = SWITCHED - 2 * MONTH - phase * every
        kept_until, side, visits = -math.inf, "old", []
        while at < SWITCHED + 8 * MONTH:
            if at >= kept_until:
                side = "old" if at < SWITCHED else "new"
                kept_until = at + model.keeps_s(TTL)
            visits.append((at, side))
            at += every
        wakes[name] = visits
    for look in sorted({*looks, 2 * MONTH, 2.9 * MONTH}):
        now = SWITCHED + look
        seen: dict[str, dict[str, float]] = {"old": {}, "new": {}}
        for name, visits in wakes.items():
            for at, side in visits:
                if at <= now:
                    seen[side][name] = at
        verdict = may_release(
            Tail(
                devices=frozenset(names),
                on_old=seen["old"],
                on_new=seen["new"],
                switched_at=SWITCHED,
                ttl_s=TTL,
                measured_from=SWITCHED,
                measured_until=now,
            ),
            now=now,
            epsilon=epsilon,
            longest_sleep_s=longest,
        )
        if verdict.allowed:
            stranded = {name for name in names if any(at > now and side == "old" for at, side in wakes[name])}
            assert stranded <= set(verdict.stale)
            assert len(stranded) / len(names) < epsilon


def test_the_reason_is_guessed_from_when_it_came() -> None:
    def why(last_opened: float, **more: object) -> Reason:
        given: dict[str, object] = {"first_seen": 0.0, "open_now": 0, "switched_at": SWITCHED, "ttl_s": TTL}
        return reason(**{**given, "last_opened": last_opened, **more})  # type: ignore[arg-type]

    assert why(SWITCHED + 1, switched_at=None) is Reason.NOT_SWITCHED
    assert why(SWITCHED - DAY, open_now=1) is Reason.LONG_LIVED
    assert why(SWITCHED + TTL) is Reason.CACHED
    assert why(SWITCHED + TTL + 1) is Reason.IGNORES_TTL
    assert why(SWITCHED + 2 * DAY) is Reason.PINNED


def test_the_end_of_the_tail_is_foretold() -> None:
    samples = [(t, 0.5 ** (t / DAY)) for t in (0.0, DAY, 2 * DAY, 3 * DAY)]
    found = forecast(samples, epsilon=0.5**10)
    assert found.at == pytest.approx(10 * DAY) and found.half_life_s == pytest.approx(DAY)
    pinned = [(t, 0.02 + share) for t, share in samples]
    assert forecast(pinned, epsilon=0.01, floor=0.02).at is None, "those who pin never leave by themselves"
    assert forecast(pinned, epsilon=0.02 + 0.5**10, floor=0.02).at == pytest.approx(10 * DAY)
    assert forecast([(t, 0.3) for t, _ in samples], epsilon=0.01).at is None
    assert forecast(samples[:2], epsilon=0.01).at is None
    assert forecast([], epsilon=0.01).at is None
    assert forecast(samples, epsilon=0.5, not_before=5 * DAY).at == 5 * DAY
