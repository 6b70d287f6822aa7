"""How long a wave takes before its sampled gates can be decided, at the soonest: if nothing goes wrong at
all.

The same bounds that judge a wave are asked about one that has not begun, in which every device does as much
as the fleet's devices have lately done, none fails, and both sides are equally fast.
"""

import math
from typing import Final

import msgspec

from fleetlift.core.delays import EDGES_S
from fleetlift.core.gates import Gate, limit_of
from fleetlift.core.metrics import METRICS
from fleetlift.core.migration import Arm, Basis, Sample, Spread
from fleetlift.core.sampled import Figure, Limit, assess
from fleetlift.migrate.wave import LEAST

_SHAPE: Final = 0.5  # times differ by a log-normal distribution about as wide as this
_RECONNECTS_AN_HOUR: Final = 1.0
_HOUR_S: Final = 3600.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """What one device does in a second on the average; None: not known."""

    messages: float | None = None
    commands: float | None = None

    def of(self, gate: Gate) -> float | None:
        if METRICS[gate.metric].figure is Figure.RATE:
            return 1 / _HOUR_S
        return self.messages if gate.metric.startswith("telemetry.") else self.commands


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """When one gate of a rung can be decided: by so many `counts` (None: never), in so long for each wave.

    A wave's entry is None where it adds no device, where the fleet's pace is not known, and where it is
    never.
    """

    gate: str
    counts: str
    least: int | None
    waves_s: tuple[float | None, ...]
    never: tuple[int, ...] = ()  # the waves, from 0, in which it can never be decided


def forecast(gate: Gate, waves: tuple[tuple[int, int], ...], pace: Pace) -> Forecast:
    """`waves`: how many devices each moves, and how many are left behind as its control."""
    each, metric = pace.of(gate), METRICS[gate.metric]
    sure = not hopeless(gate)
    needed = [_least(gate, adds, control) if sure and adds else None for adds, control in waves]
    found = [n for n in needed if n is not None]
    return Forecast(
        gate=gate.text,
        counts="device-hours" if metric.figure is Figure.RATE else metric.counts,
        least=math.ceil(min(found)) if found else None,
        waves_s=tuple(
            n / (each * adds) if n is not None and each else None
            for n, (adds, _) in zip(needed, waves, strict=True)
        ),
        never=tuple(i for i, n in enumerate(needed) if n is None and waves[i][0]),
    )


def hopeless(gate: Gate) -> bool:
    """Whether no amount of data on a fleet of any size would do: two equal sides are never surely equal."""
    level = gate.ratio == 1 and not gate.margin and gate.limit is None
    return level or _least(gate, 10_000, 10_000) is None


def _least(gate: Gate, devices: int, control: int) -> float | None:
    """The operations of `devices` together after which the gate says advance; None: it never does."""
    assert gate.confidence is not None
    limit, confidence = limit_of(gate), gate.confidence

    def decides(n: float) -> bool:
        return assess(limit, _imagined(limit, n, devices, control), confidence).within

    low, high = 0.0, math.log(1e9)
    if not decides(math.exp(high)):
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if decides(math.exp(middle)) else (middle, high)
    return max(math.exp(high), float(gate.at_least))


def _imagined(limit: Limit, n: float, devices: int, control: int) -> Sample:
    others = control if control >= LEAST else devices
    theirs = n / devices * others
    basis = Basis.DEVICES if control >= LEAST else Basis.SAME
    if limit.figure is Figure.TIME:
        fast = limit.absolute if limit.absolute is not None else 1.0
        return Sample(
            value=0.0,
            spread=_spread(n, devices, fast),
            old_spread=_spread(theirs, others, fast),
            basis=basis,
        )
    mean = _RECONNECTS_AN_HOUR if limit.figure is Figure.RATE else 0.0
    if limit.figure is Figure.RATE and limit.absolute is not None:
        mean = min(mean, limit.absolute / 10)
    return Sample(value=0.0, arm=_arm(n, devices, mean), old_arm=_arm(theirs, others, mean), basis=basis)


def _arm(n: float, devices: int, mean: float) -> Arm:
    each = n / devices
    x = each * mean
    return Arm(devices=devices, n=n, x=n * mean, nn=n * each, xx=devices * (x * x + x), nx=n * x)


def _spread(n: float, devices: int, limit_s: float) -> Spread:
    """Times well below the limit: about a tenth of it, and one in a thousand half of it."""
    each, edges, beyond = n / devices, [], []
    for edge_s in EDGES_S:
        above = 0.5 * math.erfc(math.log(edge_s / (limit_s / 10)) / (_SHAPE * math.sqrt(2)))
        if 1e-9 < above < 1 - 1e-6:
            edges.append(edge_s)
            beyond.append(above)
    edges.append(min(edges[-1] * 1.1, EDGES_S[-1]) if edges else limit_s / 10)
    beyond.append(0.0)
    return Spread(
        devices=devices,
        n=n,
        nn=n * each,
        edges_s=tuple(edges),
        x=tuple(n * p for p in beyond),
        xx=tuple(devices * ((each * p) ** 2 + each * p * (1 - p)) for p in beyond),
        nx=tuple(n * each * p for p in beyond),
    )
