"""A scenario from what real devices sent: classes, both modes, sizes, topics, rates and the day's shape.

Only times, topics and sizes are looked at. What it finds is a model, not a copy: devices that behaved alike
become one class, and their messages a background, bursts, or both.
"""

import math
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Final

import msgspec

from fleetlift.core.errors import BadInput
from fleetlift.core.units import Share
from fleetlift.core.workload import SIZE_MOST, Active, DeviceClass, Phase, Scenario, Sizes, Topic

CLASSES_MOST: Final = 8
TOPICS_MOST: Final = 20
BURST_LEAST: Final = 4  # messages that come closely after each other are a burst from so many on
APART: Final = 8.0  # so many times longer the pauses between bursts must be than those within
MESSAGES_MOST: Final = 20_000_000
_QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_SIZES_KEPT: Final = 5000  # a class, evenly over its messages
_BINS_MOST: Final = 24
_BIN_LEAST_S, _BIN_LEAST_MESSAGES = 10.0, 100
_UNEVEN: Final = 1.5  # the loudest stretch against the quietest, from which on phases are made

Observation = tuple[str, float, str, int]  # device, when (s), topic, bytes


@dataclass(slots=True)
class _Seen:
    """One device's messages."""

    times: "array[float]"
    topics: Counter[str]
    sizes: "array[int]"


class _Modes(msgspec.Struct, frozen=True):
    """What a device's times come to."""

    background: int  # messages outside bursts
    bursts: int
    in_bursts: int  # messages
    bursts_s: float  # how long they took together


def fit(observations: Iterable[Observation], *, name: str = "captured", seed: int = 1) -> Scenario:
    """The scenario that `observations`, in any order, look like. Raises BadInput when they are too few."""
    seen: dict[str, _Seen] = {}
    count = 0
    for device, at_s, topic, size in observations:
        count += 1
        if count > MESSAGES_MOST:
            raise BadInput(f"more than {MESSAGES_MOST:,} messages: fit a part of the capture")
        one = seen.get(device)
        if one is None:
            one = seen[device] = _Seen(array("d"), Counter(), array("i"))
        one.times.append(at_s)
        one.topics[_template(topic, device)] += 1
        one.sizes.append(min(size, SIZE_MOST))
    if count < 2:
        raise BadInput("the capture holds too few messages to fit a scenario to: at least two are needed")
    for one in seen.values():
        one.times = array("d", sorted(one.times))
    first = min(one.times[0] for one in seen.values())
    span_s = max(max(one.times[-1] for one in seen.values()) - first, 1.0)
    pause_s = _pause(seen.values())
    modes = {device: _modes(one.times, pause_s) for device, one in seen.items()}
    groups = _groups(seen, modes, span_s)
    classes = tuple(
        _class(f"class-{n}", [(seen[d], modes[d]) for d in devices], span_s, len(seen))
        for n, devices in enumerate(groups, 1)
    )
    return Scenario(
        name=name,
        devices=len(seen),
        classes=classes,
        for_s=round(span_s, 3),
        phases=_phases(seen.values(), first, span_s, count),
        seed=seed,
    )


def _template(topic: str, device: str) -> str:
    """The topic with `{device}` where the id stands; an id that is not in it is put before."""
    levels = topic.translate({ord("{"): "_", ord("}"): "_", ord("+"): "_", ord("#"): "_"}).split("/")
    if device in levels:
        levels[levels.index(device)] = "{device}"
        return "/".join(levels)
    return "dt/{device}/" + "/".join(levels)


def _pause(seen: Iterable[_Seen]) -> float:
    """How long a pause must be to end a burst; 0: there are no bursts to be told apart.

    The pauses of all devices, on a logarithmic scale, are split where the two parts differ most (Otsu); it
    counts only when the one part is clearly longer than the other.
    """
    gaps = sorted(max(b - a, 1e-3) for one in seen for a, b in pairwise(one.times))
    if len(gaps) < 2 * BURST_LEAST:
        return 0.0
    step = max(1, len(gaps) // 20_000)
    logs = [math.log(gap) for gap in gaps[::step]]
    total, n = sum(logs), len(logs)
    best, at, low = -1.0, 0, 0.0
    for k in range(1, n):
        low += logs[k - 1]
        apart = (total - low) / (n - k) - low / k
        between = k * (n - k) * apart * apart
        if between > best and logs[k] > logs[k - 1]:
            best, at = between, k
    if not at or math.exp(median(logs[at:]) - median(logs[:at])) < APART:
        return 0.0
    return math.exp((logs[at - 1] + logs[at]) / 2)


def _modes(times: Sequence[float], pause_s: float) -> _Modes:
    background = bursts = in_bursts = 0
    bursts_s = 0.0
    begin = 0
    for n in range(1, len(times) + 1):
        if n < len(times) and times[n] - times[n - 1] < pause_s:
            continue
        if n - begin >= BURST_LEAST:
            bursts += 1
            in_bursts += n - begin
            # The last message stands for the time until the one that did not come any more.
            bursts_s += (times[n - 1] - times[begin]) * (n - begin) / (n - begin - 1)
        else:
            background += n - begin
        begin = n
    return _Modes(background, bursts, in_bursts, bursts_s)


def _groups(seen: dict[str, _Seen], modes: dict[str, _Modes], span_s: float) -> list[list[str]]:
    """Devices alike: the same topics, with bursts or without, and as loud to a factor of about three."""
    found: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for device in sorted(seen):
        loud = round(2 * math.log10(len(seen[device].times) / span_s))
        found[(tuple(sorted(seen[device].topics)), modes[device].bursts > 0, loud)].append(device)
    groups = sorted(found.items(), key=lambda item: (-len(item[1]), str(item[0])))
    while len(groups) > CLASSES_MOST:
        key, devices = groups.pop()
        # The smallest joins what is most like it: the same modes first, then the loudness.
        near = min(groups, key=lambda g: (g[0][1] != key[1], abs(_loud(g[0]) - _loud(key)), -len(g[1])))
        near[1].extend(devices)
        groups.sort(key=lambda item: (-len(item[1]), str(item[0])))
    return [devices for _, devices in groups]


def _loud(key: tuple[object, ...]) -> int:
    assert isinstance(key[2], int)
    return key[2]


def _class(name: str, devices: Sequence[tuple[_Seen, _Modes]], span_s: float, total: int) -> DeviceClass:
    lived_s = span_s * len(devices)
    bursts_s = sum(m.bursts_s for _, m in devices)
    bursts = sum(m.bursts for _, m in devices)
    background = sum(m.background for _, m in devices) / lived_s
    active = None
    if bursts and bursts_s > 0:
        for_s = bursts_s / bursts
        every_s = max(lived_s / bursts, for_s)
        # Times in a file are whole milliseconds; the rate makes up for what rounding takes.
        for_s, every_s = max(round(for_s, 3), 0.001), max(round(every_s, 3), 0.001)
        rate_s = sum(m.in_bursts for _, m in devices) / lived_s * every_s / for_s
        active = Active(rate_s=_rounded(rate_s), for_s=for_s, every_s=max(every_s, for_s))
    topics: Counter[str] = Counter()
    for one, _ in devices:
        topics.update(one.topics)
    kept = topics.most_common(TOPICS_MOST)
    weight = kept[-1][1] if kept else 1
    return DeviceClass(
        name=name,
        share=Share(devices=len(devices)),
        topics=tuple(
            Topic(template, 1.0 if len(kept) == 1 else round(n / weight, 4)) for template, n in kept
        ),
        size=_sizes([size for one, _ in devices for size in one.sizes]),
        background_s=_rounded(background),
        active=active,
    )


def _rounded(rate_s: float) -> float:
    """To seven digits: more say nothing, and would not survive a file."""
    return float(f"{rate_s:.7g}") if rate_s else 0.0


def _sizes(sizes: list[int]) -> Sizes:
    sizes.sort()
    kept = sizes[:: max(1, len(sizes) // _SIZES_KEPT)]
    if kept[0] == sizes[-1]:
        return Sizes(((0.0, kept[0]),))
    points = [(q, kept[min(len(kept) - 1, int(q * len(kept)))]) for q in _QUANTILES[:-1]]
    return Sizes((*points, (1.0, sizes[-1])))


def _phases(seen: Iterable[_Seen], first: float, span_s: float, count: int) -> tuple[Phase, ...]:
    """How loud each stretch was beside the mean; none when that hardly changed."""
    bins = int(min(_BINS_MOST, span_s / _BIN_LEAST_S, count / _BIN_LEAST_MESSAGES))
    if bins < 2:
        return ()
    edges = [first + span_s * n / bins for n in range(1, bins)]
    per_bin = [0] * bins
    for one in seen:
        for at in one.times:
            per_bin[bisect_right(edges, at)] += 1
    mean = fmean(per_bin)
    levels = [round(n / mean, 2) for n in per_bin]
    if max(levels) < _UNEVEN * min(levels):
        return ()
    for_s = round(span_s / bins, 3)
    return tuple(Phase(for_s=for_s, start=level, end=level) for level in levels)
