"""The table of metrics: what a gate can ask about.

A figure is counted, when every message or device is accounted for and it is what happened, or is a sample of
what could as well have come out otherwise. `docs/gates.md` says which is which, and why.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

import msgspec

from fleetlift.core.sampled import Figure


class Better(StrEnum):
    HIGHER = "higher"
    LOWER = "lower"


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate can ask about. `at_least`: the n below which there is no verdict."""

    name: str
    meaning: str
    unit: str  # "%", "s", "/s" or "" (a count)
    better: Better
    at_least: int
    counts: str  # what n counts
    figure: Figure
    has_old: bool = False  # can be compared with the old side

    @property
    def sampled(self) -> bool:
        return self.figure is not Figure.COUNTED


def _metrics(*rows: tuple[str, str, Better, int, str, Figure, bool, str]) -> Mapping[str, Metric]:
    return MappingProxyType(
        {
            name: Metric(
                name=name,
                unit=unit,
                better=better,
                at_least=n,
                counts=counts,
                figure=figure,
                has_old=old,
                meaning=meaning,
            )
            for name, unit, better, n, counts, figure, old, meaning in rows
        }
    )


_UP, _DOWN = Better.HIGHER, Better.LOWER
_COUNTED, _SHARE, _TIME, _RATE = Figure.COUNTED, Figure.SHARE, Figure.TIME, Figure.RATE
METRICS: Final = _metrics(
    (
        *("telemetry.completeness", "%", _UP, 10, "messages", _COUNTED, False),
        "of the messages that moved devices have numbered, the share that the new side has",
    ),
    (
        *("telemetry.delay.p50", "s", _DOWN, 20, "messages", _TIME, True),
        "half of the messages came sooner after the time that they carry",
    ),
    ("telemetry.delay.p95", "s", _DOWN, 20, "messages", _TIME, True, "95 of 100 messages came sooner"),
    ("telemetry.delay.p99", "s", _DOWN, 20, "messages", _TIME, True, "99 of 100 messages came sooner"),
    (
        *("parity.differing", "%", _DOWN, 100, "pairs", _COUNTED, False),
        "of the messages that both sides have, the share that differs above the old side's own noise",
    ),
    (
        *("devices.silent", "", _DOWN, 1, "moved devices", _COUNTED, False),
        "moved devices that the new side has not heard from for longer than `silent_after`",
    ),
    (
        *("devices.failed", "", _DOWN, 1, "told devices", _COUNTED, False),
        "devices of the wave that went back by themselves, or stayed though they are connected",
    ),
    (
        *("commands.agreement", "%", _UP, 5, "commands", _SHARE, False),
        "of the commands sent by both paths, the share that both paths answered alike",
    ),
    (
        *("commands.success", "%", _UP, 5, "commands", _SHARE, True),
        "of the commands that ended, the share that did what was asked",
    ),
    (
        *("commands.latency.p50", "s", _DOWN, 5, "commands", _TIME, True),
        "half of the commands were answered sooner",
    ),
    (
        *("commands.latency.p95", "s", _DOWN, 5, "commands", _TIME, True),
        "95 of 100 commands were answered sooner",
    ),
    (
        *("commands.latency.p99", "s", _DOWN, 20, "commands", _TIME, True),
        "99 of 100 commands were answered sooner",
    ),
    (
        *("commands.executed_twice", "", _DOWN, 1, "commands", _COUNTED, False),
        "commands that a device carried out more than once",
    ),
    (
        *("connections.flapping", "", _DOWN, 1, "moved devices", _COUNTED, False),
        "moved devices that connected to the new side three times or more in five minutes",
    ),
    (
        *("connections.rate", "", _DOWN, 1, "moved devices", _RATE, True),
        "how often a device connects anew, in an hour on the average",
    ),
    (
        *("moves.success", "%", _UP, 1, "told devices", _COUNTED, False),
        "of the devices told to move that could be reached, the share that moved and stayed",
    ),
    (
        *("load.errors", "", _DOWN, 1, "messages offered", _COUNTED, False),
        "messages of a load test that the target refused, or that never reached it",
    ),
    (
        "load.latency.p50",
        "s",
        _DOWN,
        100,
        "messages accepted",
        _COUNTED,
        False,
        "half were acknowledged sooner",
    ),
    (
        "load.latency.p95",
        "s",
        _DOWN,
        100,
        "messages accepted",
        _COUNTED,
        False,
        "95 of 100 were acknowledged sooner",
    ),
    (
        *("load.latency.p99", "s", _DOWN, 100, "messages accepted", _COUNTED, False),
        "99 of 100 were acknowledged sooner after the moment they were meant to be sent",
    ),
    (
        *("load.latency.max", "s", _DOWN, 100, "messages accepted", _COUNTED, False),
        "the longest time that any message took to be acknowledged",
    ),
    (
        *("load.lost", "", _DOWN, 1, "messages accepted", _COUNTED, False),
        "messages that the target acknowledged and does not have",
    ),
    (
        *("load.rate", "/s", _UP, 1, "messages accepted", _COUNTED, False),
        "messages acknowledged a second, until the last one was",
    ),
)
OF_LOAD: Final = "load."  # metrics that begin so are of a load test, not of a fleet
