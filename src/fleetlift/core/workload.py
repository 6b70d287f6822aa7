"""What a fleet sends, as a model: who sends when, how much, and on which topics. Deterministic from a seed.

A scenario has classes of devices. Each device has a background mode (a few messages an hour, say) and may
have an active one (several a second, for some minutes, every hour or so). Phases make the whole louder or
quieter over time; storms cut a share of the connections and let the devices come back together.

The model is open: `sends` gives each device's intended moments of sending, and nothing that a server does,
or fails to do, changes them. A device's stream depends on the seed and its own number alone, so that it is
the same however devices are shared out to processes.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import Final

import msgspec

from fleetlift.core.units import Share

DEVICES_MOST: Final = 1_000_000
SIZE_MOST: Final = 256 * 1024
_GOLDEN: Final = (5**0.5 - 1) / 2  # multiples of it, modulo one, lie evenly
_JITTER: Final = (0.5, 1.5)  # of the time between two messages, and of how long a device stays active


class Protocol(StrEnum):
    MQTT = "mqtt"
    HTTP = "http"


class Topic(msgspec.Struct, frozen=True):
    """`template` holds `{device}` where the device's id goes. `weight`: how often, beside the others."""

    template: str
    weight: float = 1.0

    def of(self, device: str) -> str:
        return self.template.replace("{device}", device)


class Sizes(msgspec.Struct, frozen=True):
    """A distribution of payload sizes: (share of messages, bytes that they do not exceed), both growing."""

    points: tuple[tuple[float, int], ...]

    def at(self, share: float) -> int:
        """The size at a quantile, 0 to 1; between two points in proportion."""
        points = self.points
        if len(points) == 1 or share <= points[0][0]:
            return points[0][1]
        for (low, small), (high, large) in pairwise(points):
            if share <= high:
                return round(small + (large - small) * (share - low) / (high - low))
        return points[-1][1]

    @property
    def mean(self) -> float:
        points = self.points
        total, low = points[0][0] * points[0][1], points[0]
        for high in points[1:]:
            total += (high[0] - low[0]) * (low[1] + high[1]) / 2
            low = high
        return total + (1 - low[0]) * low[1]


class Active(msgspec.Struct, frozen=True, kw_only=True):
    """A mode that comes and goes: `rate_s` messages a second, for about `for_s`, about every `every_s`."""

    rate_s: float
    for_s: float
    every_s: float


class DeviceClass(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that behave alike. `background_s`: messages a second of each device, always."""

    name: str
    share: Share  # of the scenario's devices
    topics: tuple[Topic, ...]
    size: Sizes
    background_s: float = 0.0
    active: Active | None = None

    @property
    def mean_rate_s(self) -> float:
        """Messages a second of one device, on the average, at level 1."""
        active = self.active
        return self.background_s + (active.rate_s * active.for_s / active.every_s if active else 0.0)


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of time. The level (1: what the classes say) goes straight from `start` to `end`."""

    for_s: float
    start: float
    end: float


class Storm(msgspec.Struct, frozen=True, kw_only=True):
    """At `at_s` (and `every_s` after that) a share of the connections ends; all are back `within_s` later."""

    at_s: float
    share: Share
    within_s: float
    every_s: float | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A whole workload. `rate_s` None: as the classes say; else the mean rate at level 1, by quicker time.

    `phases` empty: level 1. Behind the last phase its end level holds; with `repeat` the first comes again.
    """

    name: str
    devices: int
    classes: tuple[DeviceClass, ...]
    for_s: float
    protocol: Protocol = Protocol.MQTT
    qos: int = 1
    phases: tuple[Phase, ...] = ()
    repeat: bool = False
    storms: tuple[Storm, ...] = ()
    rate_s: float | None = None
    keep_alive_s: float = 300.0
    seed: int = 1

    @property
    def own_rate_s(self) -> float:
        """Messages a second at level 1, by what the classes say."""
        return sum(n * c.mean_rate_s for n, c in zip(self.counts, self.classes, strict=True))

    @property
    def scale(self) -> float:
        """How many times quicker than the classes say time goes for the devices."""
        own = self.own_rate_s
        return 1.0 if self.rate_s is None or own <= 0 else self.rate_s / own

    @property
    def counts(self) -> tuple[int, ...]:
        """How many devices each class has; together all of them."""
        return counts(self.devices, [c.share for c in self.classes])


def with_devices(scenario: Scenario, devices: int) -> Scenario:
    """The same mixture of classes in a fleet of another size."""
    classes = tuple(
        msgspec.structs.replace(c, share=Share(percent=100 * n / scenario.devices))
        for c, n in zip(scenario.classes, scenario.counts, strict=True)
    )
    return msgspec.structs.replace(scenario, devices=devices, classes=classes)


class Send(msgspec.Struct, frozen=True, gc=False):
    """One intended message: when (seconds from the start), on which of the class's topics, how large."""

    at_s: float
    topic: int
    size: int


def counts(devices: int, shares: Sequence[Share]) -> tuple[int, ...]:
    """`devices` dealt out: fixed numbers first, the rest by percentage, so that nobody is left over."""
    fixed = [share.devices or 0 for share in shares]
    rest = max(devices - sum(fixed), 0)
    percents = [share.percent or 0.0 for share in shares]
    whole = sum(percents)
    if not whole:
        return tuple(fixed)
    exact = [rest * percent / whole for percent in percents]
    dealt = [math.floor(n + 1e-9) for n in exact]
    left = rest - sum(dealt)
    by_remainder = sorted(range(len(exact)), key=lambda i: (dealt[i] - exact[i], i))
    for i in [i for i in by_remainder if percents[i]][:left]:
        dealt[i] += 1
    return tuple(a + b for a, b in zip(fixed, dealt, strict=True))


def class_of(scenario: Scenario) -> list[int]:
    """The class of each device by its number: spread evenly, so that any stretch is like the whole."""
    order: list[tuple[float, int]] = []
    for number, count in enumerate(scenario.counts):
        order += [((k + 0.5) / count, number) for k in range(count)]
    order.sort()
    return [number for _, number in order]


# -- time ---------------------------------------------------------------------------------------------------


class Timeline:
    """The level over time, its integral (the devices' own time) and back."""

    def __init__(self, phases: Sequence[Phase], *, repeat: bool = False, scale: float = 1.0) -> None:
        self._phases = [p for p in phases if p.for_s > 0] or [Phase(for_s=math.inf, start=1.0, end=1.0)]
        self._scale = scale
        self._starts, self._sums = [0.0], [0.0]
        for phase in self._phases[:-1] if math.isinf(self._phases[-1].for_s) else self._phases:
            self._starts.append(self._starts[-1] + phase.for_s)
            self._sums.append(self._sums[-1] + phase.for_s * (phase.start + phase.end) / 2)
        self._repeat = repeat and bool(phases) and self._sums[-1] > 0
        self.steady = not phases  # one second of the devices' own time is then always `1 / scale` long

    def level(self, at_s: float) -> float:
        if self._repeat:
            at_s %= self._starts[-1]
        n = bisect_right(self._starts, at_s) - 1
        if n >= len(self._phases):
            return self._phases[-1].end
        phase = self._phases[n]
        if math.isinf(phase.for_s):
            return phase.start
        return phase.start + (phase.end - phase.start) * (at_s - self._starts[n]) / phase.for_s

    def own(self, at_s: float) -> float:
        """How much of their own time devices have lived through by `at_s`."""
        turns = 0.0
        if self._repeat:
            whole, at_s = divmod(at_s, self._starts[-1])
            turns = whole * self._sums[-1]
        n = min(bisect_right(self._starts, at_s) - 1, len(self._starts) - 1)
        into = at_s - self._starts[n]
        start = self._phases[n].start if n < len(self._phases) else self._phases[-1].end
        return self._scale * (turns + self._sums[n] + into * (start + self.level(at_s)) / 2)

    def when(self, own: float) -> float:
        """The moment at which that much of their own time is over; infinite when it never is."""
        own /= self._scale
        if self.steady:
            return own
        offset = 0.0
        if self._repeat:
            whole, own = divmod(own, self._sums[-1])
            offset = whole * self._starts[-1]
        n = bisect_right(self._sums, own) - 1
        left = own - self._sums[n]
        if n >= len(self._phases):
            level = self._phases[-1].end
            return self._starts[-1] + left / level if level > 0 else math.inf
        phase = self._phases[n]
        slope = 0.0 if math.isinf(phase.for_s) else (phase.end - phase.start) / phase.for_s
        if slope == 0.0:
            return offset + self._starts[n] + (left / phase.start if phase.start > 0 else math.inf)
        root = math.sqrt(max(phase.start**2 + 2 * slope * left, 0.0))
        return offset + self._starts[n] + (root - phase.start) / slope


def timeline(scenario: Scenario) -> Timeline:
    return Timeline(scenario.phases, repeat=scenario.repeat, scale=scenario.scale)


# -- devices ------------------------------------------------------------------------------------------------


def sends(scenario: Scenario, device: int, of: DeviceClass, time: Timeline) -> Iterator[Send]:
    """What device number `device`, of class `of`, means to send, in order, until the scenario is over."""
    random = Random(f"{scenario.seed} {device}")
    drawn = _Drawn(of)
    topics, sizes = len(of.topics) > 1, len(of.size.points) > 1
    topic, size = 0, of.size.points[0][1]
    when, until = time.when, scenario.for_s
    # Devices begin all over their rhythm, evenly and not by chance: few must not all be active at once.
    turn = (device * _GOLDEN + Random(scenario.seed).random()) % 1.0
    for own in _moments(of, random, turn):
        at_s = when(own)
        if at_s >= until:
            return
        if topics:
            topic = drawn.topic(random)
        if sizes:
            size = of.size.at(random.random())
        yield Send(at_s, topic, size)


class _Drawn:
    """Topics of a class, quick to draw."""

    def __init__(self, of: DeviceClass) -> None:
        self._of = of

    @cached_property
    def _bounds(self) -> list[float]:
        total, bounds = 0.0, []
        for topic in self._of.topics:
            total += topic.weight
            bounds.append(total)
        return bounds

    def topic(self, random: Random) -> int:
        bounds = self._bounds
        return min(bisect_right(bounds, random.random() * bounds[-1]), len(bounds) - 1)


def _moments(of: DeviceClass, random: Random, turn: float) -> Iterator[float]:
    """A device's sends in its own time: both modes merged, without an end unless it sends nothing."""
    background = _background(of.background_s, random)
    if of.active is None:
        yield from background
        return
    bursts = _bursts(of.active, random, turn)
    one, other = next(background, math.inf), next(bursts, math.inf)
    while not math.isinf(one) or not math.isinf(other):
        if one <= other:
            yield one
            one = next(background, math.inf)
        else:
            yield other
            other = next(bursts, math.inf)


def _background(rate_s: float, random: Random) -> Iterator[float]:
    if rate_s <= 0:
        return
    draw = random.random
    at = draw() / rate_s
    least_s, more_s = _JITTER[0] / rate_s, (_JITTER[1] - _JITTER[0]) / rate_s
    while True:
        yield at
        at += least_s + more_s * draw()


def _bursts(active: Active, random: Random, turn: float) -> Iterator[float]:
    """`turn`: how far into its rhythm, of being active and then not, the device is at the beginning."""
    if active.rate_s <= 0:
        return
    pause_s = active.every_s - active.for_s
    if pause_s <= 0:
        yield from _background(active.rate_s, random)
        return
    begins = -turn * active.every_s
    ends = begins + active.for_s
    if ends <= 0:
        begins += active.every_s
        ends += active.every_s
    while True:
        at = begins + random.random() / active.rate_s
        while at < ends:
            if at >= 0:
                yield at
            at += random.uniform(*_JITTER) / active.rate_s
        begins = ends + pause_s * random.uniform(*_JITTER)
        ends = begins + active.for_s * random.uniform(*_JITTER)


class Cut(msgspec.Struct, frozen=True):
    """A device's connection ends at `at_s`; it comes back at `back_s`."""

    at_s: float
    back_s: float


def cuts(scenario: Scenario, device: int) -> list[Cut]:
    """What the storms do to device number `device`, in order."""
    found: list[Cut] = []
    for number, storm in enumerate(scenario.storms):
        share = storm.share.of(scenario.devices) / scenario.devices
        at_s, turn = storm.at_s, 0
        while at_s < scenario.for_s:
            random = Random(f"{scenario.seed} storm {number} {turn} {device}")
            if random.random() < share:
                found.append(Cut(at_s, at_s + random.random() * storm.within_s))
            if storm.every_s is None:
                break
            at_s, turn = at_s + storm.every_s, turn + 1
    return sorted(found, key=lambda cut: cut.at_s)


# -- what it comes to ---------------------------------------------------------------------------------------


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a scenario comes to, on the average: messages, bytes of payload, and the rate of each stretch."""

    messages: float
    payload_bytes: float
    mean_rate_s: float
    peak_rate_s: float
    rates: tuple[tuple[float, float], ...]  # (end of the stretch in s, mean rate in it)
    classes: tuple[tuple[str, int, float, float], ...]  # name, devices, rate at level 1, mean bytes


def expected(scenario: Scenario, stretches: int = 60) -> Expected:
    """By computation, without drawing a single message."""
    own, time = scenario.own_rate_s, timeline(scenario)
    step = scenario.for_s / stretches
    rates = []
    for n in range(stretches):
        lived = time.own((n + 1) * step) - time.own(n * step)
        rates.append(((n + 1) * step, own * lived / step))
    messages = own * time.own(scenario.for_s)
    per_class = [
        (c.name, n, n * c.mean_rate_s * scenario.scale, c.size.mean)
        for c, n in zip(scenario.classes, scenario.counts, strict=True)
    ]
    all_rates = sum(rate for _, _, rate, _ in per_class)
    mean_bytes = sum(rate * size for _, _, rate, size in per_class) / all_rates if all_rates else 0.0
    levels = [1.0] if not scenario.phases else [max(p.start, p.end) for p in scenario.phases]
    return Expected(
        messages=messages,
        payload_bytes=messages * mean_bytes,
        mean_rate_s=messages / scenario.for_s,
        peak_rate_s=own * scenario.scale * max(levels),
        rates=tuple(rates),
        classes=tuple(per_class),
    )
