"""Workloads: what a scenario says, who sends when by it, and what fits a capture."""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fleetlift.cli.load import fit as fit_command
from fleetlift.core.capture import Account, CapturedMessage, Direction, Manifest, State
from fleetlift.core.errors import BadInput, Forbidden
from fleetlift.core.units import Share, parse_rate
from fleetlift.core.workload import (
    Active,
    DeviceClass,
    Phase,
    Protocol,
    Scenario,
    Send,
    Sizes,
    Storm,
    Timeline,
    Topic,
    class_of,
    cuts,
    expected,
    sends,
    timeline,
    with_devices,
)
from fleetlift.core.workload_fit import Observation, fit
from fleetlift.load import scenario as scenario_file
from fleetlift.load.capture_file import CaptureWriter
from fleetlift.load.credentials import Login, read_credentials
from fleetlift.load.scenario import BadScenario, dump_scenario, load_scenario, parse_scenario

PARKED = DeviceClass(
    name="parked",
    share=Share(percent=90),
    topics=(Topic("dt/{device}/status"),),
    size=Sizes(((0.0, 120),)),
    background_s=6 / 3600,
)
DRIVING = DeviceClass(
    name="driving",
    share=Share(percent=10),
    topics=(Topic("dt/{device}/position", 4), Topic("dt/{device}/engine", 1)),
    size=Sizes(((0.0, 100), (0.5, 170), (1.0, 400))),
    background_s=6 / 3600,
    active=Active(rate_s=2, for_s=300, every_s=3600),
)
FLEET = Scenario(name="fleet", devices=200, classes=(PARKED, DRIVING), for_s=7200)
MANY = with_devices(FLEET, 2000)  # enough of them for chance to even out

WHOLE = """
scenario: captured-peak
devices: 1000
for: 60s
rate: 10000/s
protocol: mqtt
qos: 1
keep_alive: 2m
seed: 7
classes:
  - class: parked
    share: 90%
    topics: dt/{device}/status
    size: 120
    background: 6/h
  - class: driving
    share: 10%
    topics:
      dt/{device}/position: 4
      dt/{device}/engine: 1
    size: {p0: 100, p50: 170, p99.9: 900, p100: 2 KiB}
    background: 30/m
    active: {rate: 2/s, for: 5m, every: 1h}
phases:
  - {for: 10s, from: 0%, to: 100%}
  - {for: 20s, to: 100%}
  - {for: 5s, level: 300%}
repeat: true
storms:
  - {at: 30s, share: 50%, within: 5s, every: 1h}
"""


def stream(scenario: Scenario, device: int) -> list[Send]:
    of = scenario.classes[class_of(scenario)[device]]
    return list(sends(scenario, device, of, timeline(scenario)))


def every_send(scenario: Scenario) -> Iterator[Send]:
    kinds, time = class_of(scenario), timeline(scenario)
    for n in range(scenario.devices):
        yield from sends(scenario, n, scenario.classes[kinds[n]], time)


# -- who sends when ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_sends_and_another_one_others() -> None:
    assert [stream(FLEET, n) for n in range(5)] == [stream(FLEET, n) for n in range(5)]
    assert stream(FLEET, 3) != stream(replace(FLEET, seed=2), 3)
    assert stream(FLEET, 3) != stream(FLEET, 4)


def test_a_fleet_sends_about_as_much_as_its_classes_say() -> None:
    total = sum(1 for _ in every_send(MANY))
    assert total == pytest.approx(expected(MANY).messages, rel=0.04)
    assert expected(MANY).messages == pytest.approx(MANY.own_rate_s * MANY.for_s)


def test_times_grow_and_end_with_the_scenario() -> None:
    for device in range(20):
        times = [send.at_s for send in stream(FLEET, device)]
        assert all(a < b for a, b in pairwise(times))
        assert all(0 <= at < FLEET.for_s for at in times)


def test_an_active_device_sends_in_bursts_and_a_parked_one_does_not() -> None:
    kinds = class_of(FLEET)
    driving = [d for d in range(FLEET.devices) if kinds[d] == 1]
    gaps = [b.at_s - a.at_s for d in driving for a, b in pairwise(stream(FLEET, d))]
    assert mean(gap < 1 for gap in gaps) > 0.9
    parked = [d for d in range(40) if kinds[d] == 0]
    assert all(b.at_s - a.at_s > 60 for d in parked for a, b in pairwise(stream(FLEET, d)))


def test_a_given_rate_is_kept_whatever_the_classes_say() -> None:
    """All is played quicker: each device keeps its own rhythm."""
    quick = replace(MANY, rate_s=500.0, for_s=20.0)
    total = sum(1 for _ in every_send(quick))
    assert total == pytest.approx(500 * 20, rel=0.04)
    assert expected(quick).mean_rate_s == pytest.approx(500)


def test_sizes_and_topics_are_drawn_as_they_are_given() -> None:
    busy = replace(FLEET, classes=(replace(DRIVING, share=Share(percent=100)),), rate_s=500.0, for_s=20.0)
    found = [send for n in range(busy.devices) for send in stream(busy, n)]
    assert mean(send.topic == 0 for send in found) == pytest.approx(0.8, abs=0.03)
    assert mean(send.size <= 170 for send in found) == pytest.approx(0.5, abs=0.03)
    assert {min(s.size for s in found), max(s.size for s in found)} <= set(range(100, 401))
    assert mean(s.size for s in found) == pytest.approx(DRIVING.size.mean, rel=0.03)


def test_phases_shape_the_rate_and_nothing_is_sent_at_level_nought() -> None:
    phases = (
        Phase(for_s=10, start=0, end=0),
        Phase(for_s=10, start=0, end=2),
        Phase(for_s=10, start=3, end=3),
    )
    shaped = replace(MANY, phases=phases, rate_s=300.0, for_s=40.0)
    times = [send.at_s for send in every_send(shaped)]
    per_phase = [sum(10 * k <= at < 10 * k + 10 for at in times) for k in range(4)]
    assert per_phase[0] == 0
    assert per_phase[1] == pytest.approx(3000, rel=0.15)
    assert per_phase[2] == pytest.approx(9000, rel=0.15)
    assert per_phase[3] == pytest.approx(9000, rel=0.15)  # the last level holds
    again = replace(shaped, repeat=True, for_s=60.0)
    times = [send.at_s for send in every_send(again)]
    assert not [at for at in times if 30 <= at < 40]
    assert sum(50 <= at < 60 for at in times) == pytest.approx(9000, rel=0.15)


levels = st.floats(0, 5).map(lambda level: round(level, 2))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.builds(Phase, for_s=st.floats(0.5, 100), start=levels, end=levels), max_size=5),
    st.booleans(),
    st.floats(0.01, 100),
    st.floats(0, 500),
)
def test_a_timeline_and_its_inverse_agree(
    phases: list[Phase], repeat: bool, scale: float, at_s: float
) -> None:
    """`when` finds the first moment at which that much of the devices' own time is over."""
    time = Timeline(phases, repeat=repeat, scale=scale)
    own = time.own(at_s)
    back = time.when(own)
    if math.isinf(back):
        assert time.level(at_s) == 0
    else:
        assert time.own(back) == pytest.approx(own, rel=1e-6, abs=1e-6)
        assert back <= at_s + 1e-5 * (1 + at_s) or time.level(at_s) == 0 or time.own(back) <= own * (1 + 1e-6)


@given(st.integers(1, 500), st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_every_device_has_one_class(devices: int, parts: list[float]) -> None:
    whole = sum(parts)
    classes = tuple(
        replace(PARKED, name=f"c{n}", share=Share(percent=100 * part / whole)) for n, part in enumerate(parts)
    )
    scenario = replace(FLEET, devices=devices, classes=classes)
    assert sum(scenario.counts) == len(class_of(scenario)) == devices
    assert all(abs(n - devices * p / whole) < 1 for n, p in zip(scenario.counts, parts, strict=True))


def test_classes_are_spread_so_that_each_process_gets_a_fleet_alike() -> None:
    kinds = class_of(FLEET)
    assert [sum(kinds[n : n + 50]) for n in range(0, 200, 50)] == [5] * 4


def test_a_smaller_fleet_keeps_the_mixture() -> None:
    assert with_devices(FLEET, 50).counts == (45, 5)


def test_a_storm_cuts_its_share_and_brings_everybody_back_in_time() -> None:
    storm = Storm(at_s=30, share=Share(percent=50), within_s=5, every_s=60)
    stormy = replace(FLEET, storms=(storm,), for_s=120.0)
    found = [cuts(stormy, n) for n in range(FLEET.devices)]
    assert found == [cuts(stormy, n) for n in range(FLEET.devices)]
    for at in (30, 90):
        cut = [c for one in found for c in one if c.at_s == at]
        assert 70 < len(cut) < 130
        assert all(at <= c.back_s <= at + 5 for c in cut)


# -- the file ----------------------------------------------------------------------------------------------


def test_a_whole_scenario_is_read() -> None:
    found = parse_scenario(WHOLE)
    assert (found.name, found.devices, found.for_s, found.rate_s) == ("captured-peak", 1000, 60, 10_000)
    assert (found.protocol, found.qos, found.keep_alive_s, found.seed) == (Protocol.MQTT, 1, 120, 7)
    assert found.counts == (900, 100)
    driving = found.classes[1]
    assert driving.topics == (Topic("dt/{device}/position", 4), Topic("dt/{device}/engine", 1))
    assert driving.size.points == ((0, 100), (0.5, 170), (0.999, 900), (1, 2048))
    assert driving.active == Active(rate_s=2, for_s=300, every_s=3600)
    assert found.phases == (
        Phase(for_s=10, start=0, end=1),
        Phase(for_s=20, start=1, end=1),
        Phase(for_s=5, start=3, end=3),
    )
    assert found.storms == (Storm(at_s=30, share=Share(percent=50), within_s=5, every_s=3600),)
    assert parse_scenario(dump_scenario(found)) == found


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("devices: 1000", "devices: none", "scenario.yaml:3:10: devices: expected a whole number"),
        ("devices: 1000", "devices: 0", "expected 1 to 1,000,000 devices"),
        ("for: 60s\n", "", "for: is missing"),
        ("for: 60s", "for: 60", "a number needs its unit, as in 60s"),
        ("rate: 10000/s", "rate: 10000", "a number needs its time, as in 10000/s"),
        ("rate: 10000/s", "rates: 10000/s", "is not a key here (did you mean 'rate'?)"),
        ("protocol: mqtt", "protocol: coap", "expected: mqtt, http"),
        ("qos: 1", "qos: 2", "expected: 0, 1"),
        ("share: 90%", "share: 80%", "shares come to 90% of the devices that no class counts"),
        ("share: 90%", "share: 2000 devices", "name 2000 devices together, the scenario has 1000"),
        ("class: parked", "class: driving", "'driving' is there twice"),
        ("dt/{device}/status", "dt/status", "{device} must stand where the device's id goes"),
        ("dt/{device}/status", "dt/{device}/{channel}", "only {device} is filled in"),
        ("dt/{device}/status", '"dt/{device}/#"', "without wildcards"),
        ("size: 120", "size: big", "is not a size such as 170, 2 KiB or 100-300"),
        ("size: 120", "size: 300-100", "the smaller size comes first"),
        ("size: 120", "size: 999999", "at most 262144 are sent"),
        ("p50: 170", "p50: 50", "quantiles and their sizes must grow"),
        ("p50: 170", "median: 170", "is not a quantile such as p0"),
        ("    background: 6/h\n", "", "sends nothing: give 'background: 6/h'"),
        ("for: 5m, every: 1h", "for: 5h, every: 1h", "is longer than 'every'"),
        ("active: {rate: 2/s, ", "active: {", "classes[1].active.rate: is missing"),
        ("level: 300%", "level: 3", "expected a level such as 100% or 250%"),
        ("level: 300%", "level: 300%, to: 100%", "give 'level', or 'from' and 'to'"),
        ("every: 1h}\nphases", "every: 0s}\nphases", "expected a duration above 0"),
        ("within: 5s, every: 1h", "within: 5s, every: 2s", "must be longer than 'within'"),
        ("scenario: captured-peak", "scenario: a b", "use 1 to 63 letters"),
        ("seed: 7", "seed: &a 7\nx: *a", "references (*name) are not used in a scenario"),
    ],
)
def test_a_mistake_is_told_with_its_place(old: str, new: str, says: str) -> None:
    assert old in WHOLE
    with pytest.raises(BadScenario, match=re.escape(says)) as caught:
        parse_scenario(WHOLE.replace(old, new, 1))
    assert re.match(r"scenario\.yaml:\d+:\d+: ", str(caught.value))


def test_the_scenario_on_the_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "load.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert parse_scenario(text).devices == 1000
    for key in (*scenario_file._TOP, *scenario_file._CLASS):
        assert f"`{key}" in page or f".{key}`" in page, key


ODD = ("  ", "{", "}", "[", "- ", "a: b", "1e999", "\x00", "p50: .inf")
SCRAPS = st.sampled_from([*WHOLE.splitlines(), *ODD])


@settings(max_examples=200, deadline=None)
@given(st.lists(SCRAPS | st.text(max_size=20), max_size=30))
def test_whatever_a_file_holds_it_is_read_or_refused(scraps: list[str]) -> None:
    try:
        found = parse_scenario("\n".join(scraps))
    except BadInput as refused:
        assert len(str(refused)) < 200_000
        return
    assert sum(found.counts) == found.devices


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(WHOLE.replace("qos: 1", "qos: 3").replace("size: 120", "size: x"))
    with pytest.raises(BadScenario) as caught:
        load_scenario(path)
    assert len(caught.value.problems) == 2
    with pytest.raises(BadInput, match="the scenario cannot be read"):
        load_scenario(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "rate_s"), [("10000/s", 10_000), ("30/m", 0.5), ("6 / h", 6 / 3600)])
def test_rates_are_written_as_people_write_them(text: str, rate_s: float) -> None:
    assert parse_rate(text) == pytest.approx(rate_s)


# -- from a capture ----------------------------------------------------------------------------------------


def observed(scenario: Scenario) -> list[Observation]:
    kinds = class_of(scenario)
    found = []
    for n in range(scenario.devices):
        of = scenario.classes[kinds[n]]
        for send in sends(scenario, n, of, timeline(scenario)):
            device = f"car-{n:04}"
            found.append((device, 1e9 + send.at_s, of.topics[send.topic].of(device), send.size))
    return found


def test_a_fitted_scenario_has_the_rates_modes_and_sizes_of_the_capture() -> None:
    seen = observed(replace(FLEET, for_s=4 * 3600.0))
    found = fit(seen)
    assert found.devices == len({device for device, *_ in seen})
    assert expected(found).messages == pytest.approx(len(seen), rel=0.05)
    driving = [c for c in found.classes if c.active]
    assert sum((c.share.devices or 0) for c in driving) == 20
    for one in driving:
        assert one.active is not None
        assert one.active.rate_s == pytest.approx(2, rel=0.2)
        assert one.active.for_s == pytest.approx(300, rel=0.3)
        assert {t.template for t in one.topics} == {"dt/{device}/position", "dt/{device}/engine"}
    assert mean(c.active.every_s for c in driving if c.active) == pytest.approx(3600, rel=0.4)
    parked = [c for c in found.classes if not c.active]
    assert all(c.background_s == pytest.approx(6 / 3600, rel=0.2) for c in parked)
    assert all(c.size == Sizes(((0.0, 120),)) for c in parked)


def test_a_fitted_scenario_plays_about_what_was_captured() -> None:
    seen = observed(replace(FLEET, for_s=4 * 3600.0))
    found = fit(reversed(seen))  # in any order
    again = observed(found)
    assert len(again) == pytest.approx(len(seen), rel=0.15)
    assert mean(size for *_, size in again) == pytest.approx(mean(size for *_, size in seen), rel=0.05)


def test_a_fitted_scenario_is_a_file_that_can_be_read() -> None:
    found = fit(observed(replace(FLEET, for_s=3600.0)), name="peak", seed=3)
    again = parse_scenario(dump_scenario(found))
    assert (again.name, again.seed, again.counts) == ("peak", 3, found.counts)
    assert expected(again).messages == pytest.approx(expected(found).messages, rel=1e-3)


def test_the_shape_of_the_day_becomes_phases() -> None:
    phases = (Phase(for_s=600, start=0.2, end=0.2), Phase(for_s=600, start=2, end=2))
    found = fit(observed(replace(MANY, phases=phases, rate_s=20.0, for_s=1200.0)))
    assert found.phases
    first, last = found.phases[0].start, found.phases[-1].start
    assert first == pytest.approx(0.18, abs=0.08)
    assert last == pytest.approx(1.82, abs=0.3)


def test_many_kinds_of_devices_become_a_few_classes() -> None:
    seen = [
        (f"d{n}", 1e9 + k * (n + 1), f"dt/d{n}/{'x' * (n % 30 + 1)}", 50)
        for n in range(60)
        for k in range(20)
    ]
    found = fit(seen)
    assert len(found.classes) <= 8
    assert sum(found.counts) == 60
    assert expected(found).messages == pytest.approx(len(seen), rel=0.1)


def test_the_command_fits_a_capture(tmp_path: Path) -> None:
    """What devices sent counts; commands to them do not."""
    recording = CaptureWriter(
        tmp_path / "c",
        Manifest(id="c1", started_at_s=1e9, until_s=1e9 + 60),
        Account(created="2026-01-01T00:00:00+00:00", first=1, seq=0, at_s=1e9),
    )
    for n in range(1, 61):
        recording.account.passes(n, 1e9 + n)
        recording.account.offered += 1
        direction: Direction = "down" if n % 10 == 0 else "up"
        recording.add(CapturedMessage(f"car-{n % 2}", 1e9 + n, f"dt/car-{n % 2}/gps", 1, b"{}", direction))
    recording.close(State.COMPLETE)
    fit_command(tmp_path / "c", tmp_path / "s.yaml", "night", 5)
    found = load_scenario(tmp_path / "s.yaml")
    assert (found.name, found.seed, found.devices) == ("night", 5, 2)
    assert expected(found).messages == pytest.approx(54, abs=3)
    assert {t.template for c in found.classes for t in c.topics} == {"dt/{device}/gps"}


def test_too_little_is_refused() -> None:
    with pytest.raises(BadInput, match="too few messages"):
        fit([("a", 1.0, "dt/a/x", 5)])


# -- who signs in ------------------------------------------------------------------------------------------


def test_credentials_are_read_from_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(
        'device,password\ncar-1,secret\n# none\n{"device": "car-2", "password": "other"}\ncar-3\n'
    )
    path.chmod(0o600)
    assert read_credentials(path) == [Login("car-1", "secret"), Login("car-2", "other"), Login("car-3")]
    assert "secret" not in repr(read_credentials(path))
    path.chmod(0o640)
    with pytest.raises(Forbidden, match="others may read it: chmod 600"):
        read_credentials(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no device"),
        ("a,hidden,c\n", "expected device,password"),
        ('{"device": 5, "password": "hidden"}\n', "expected device,password"),
        ("a,hidden\na,hidden\n", "'a' is there twice"),
        (",hidden\n", "the device's id is empty"),
    ],
)
def test_bad_credentials_are_refused_without_telling_them(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "devices.csv"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadInput, match=says) as caught:
        read_credentials(path)
    assert "hidden" not in str(caught.value)
