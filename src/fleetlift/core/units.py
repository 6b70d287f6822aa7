"""Durations, shares and numbers with units, as people write them: `1h30m`, `5%`, `10 devices`, `250ms`.

Inside the program a duration is seconds, a percentage is percent (`99.9%` is 99.9), a count is plain.
"""

import math
import re
from collections.abc import Sequence
from typing import Final

import msgspec

from fleetlift.core.errors import BadInput

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_NUMBER = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
_PART = re.compile(rf"({_NUMBER})\s*(ms|min|s|m|h|d|w)")
_DURATION = re.compile(rf"{_PART.pattern}(?:\s*{_PART.pattern})*", re.ASCII)
_PERCENT = re.compile(rf"({_NUMBER})\s*%", re.ASCII)
_DEVICES = re.compile(r"([0-9]{1,9})\s+devices?", re.ASCII)
_RATE = re.compile(rf"({_NUMBER})\s*/\s*(s|min|m|h|d)", re.ASCII)
_PLAIN = re.compile(rf"-?{_NUMBER}(?:e-?[0-9]{{1,2}})?", re.ASCII)
_LONGEST_S: Final = 10 * 365 * 86400.0

DURATION_EXPECTED: Final = "a duration such as 500ms, 30s, 2h, 1h30m or 14d"
SHARE_EXPECTED: Final = "a share of the fleet such as '10 devices', '5%' or '100%'"


def parse_duration(text: str) -> float:
    """Seconds of `30s`, `2h`, `14d`, `500ms`, `1h30m`; ten years at most. Raises BadInput."""
    text = text.strip()
    if not _DURATION.fullmatch(text):
        hint = f"; a number needs its unit, as in {text}s" if _PLAIN.fullmatch(text) else ""
        raise BadInput(f"{text!r} is not {DURATION_EXPECTED}{hint}")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
    if seconds > _LONGEST_S:
        raise BadInput(f"{text!r} is longer than ten years")
    return round(seconds, 9)


def format_duration(seconds: float) -> str:
    """The shortest exact way to write it, to the millisecond: 5400 is `1h30m`, 0.25 is `250ms`, 0 is `0s`."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    left = round(seconds * 1000)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def format_count(value: float) -> str:
    """15310 is `15,310`; a fraction keeps up to four significant decimals."""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    text = f"{value:,.4f}".rstrip("0")
    return text if text.rstrip("0,.-") else f"{value:.3g}"


def format_devices(count: int) -> str:
    """`1 device`, `15,310 devices`."""
    return f"{count:,} device{'' if count == 1 else 's'}"


def format_some(names: Sequence[str], most: int) -> str:
    """The first few of `names`, with a sign that there are more."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


RATE_EXPECTED: Final = "a rate such as 10000/s, 30/m or 6/h"


def parse_rate(text: str) -> float:
    """A second, of `10000/s`, `30/m`, `6/h`, `1/d`. Raises BadInput."""
    text = text.strip()
    if not (match := _RATE.fullmatch(text)):
        hint = f"; a number needs its time, as in {text}/s" if _PLAIN.fullmatch(text) else ""
        raise BadInput(f"{text!r} is not {RATE_EXPECTED}{hint}")
    return float(match[1]) / _SECONDS[match[2]]


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A share of a fleet: so many devices, or so much per cent; exactly one of the two is set."""

    devices: int | None = None
    percent: float | None = None

    def of(self, total: int) -> int:
        """How many of `total` devices this is: rounded up, never more than there are."""
        if self.devices is not None:
            return min(self.devices, total)
        assert self.percent is not None
        # A percentage such as 0.1 has no exact float; without the rounding 0.1 % of 3000 would be 4.
        return min(math.ceil(round(self.percent * total / 100, 6)), total)

    def __str__(self) -> str:
        if self.devices is not None:
            return f"{self.devices} device{'' if self.devices == 1 else 's'}"
        assert self.percent is not None
        return f"{self.percent:.9f}".rstrip("0").rstrip(".") + "%"


def parse_share(text: str) -> Share:
    """`10 devices`, `1 device` or `5%`: more than nothing, at most 100 %. Raises BadInput."""
    text = text.strip()
    if match := _DEVICES.fullmatch(text):
        share = Share(devices=int(match[1]))
    elif match := _PERCENT.fullmatch(text):
        share = Share(percent=float(match[1]))
    else:
        hint = f"; say '{text} devices' or '{text}%'" if _PLAIN.fullmatch(text) else ""
        raise BadInput(f"{text!r} is not {SHARE_EXPECTED}{hint}")
    if not share.devices and not share.percent:
        raise BadInput(f"{text!r} moves nothing: a wave needs more than 0")
    if share.percent is not None and share.percent > 100:
        raise BadInput(f"{text!r} is more than the whole fleet: 100% is the most")
    return share


class Quantity(msgspec.Struct, frozen=True, kw_only=True):
    """A number with its unit: `%` (percent), `s` (seconds), `/s` (a second) or none."""

    value: float
    unit: str = ""

    def __str__(self) -> str:
        return format_quantity(self.value, self.unit)


def parse_quantity(text: str) -> Quantity:
    """`99.9%`, `250ms`, `9900/s`, `1.5`, `0`. Raises BadInput."""
    text = text.strip()
    if match := _PERCENT.fullmatch(text):
        return Quantity(value=float(match[1]), unit="%")
    if _PLAIN.fullmatch(text):
        return Quantity(value=float(text))
    if _DURATION.fullmatch(text):
        return Quantity(value=parse_duration(text), unit="s")
    if _RATE.fullmatch(text):
        return Quantity(value=parse_rate(text), unit="/s")
    raise BadInput(f"{text!r} is not a number with a unit such as 99.9%, 250ms, 2s or 0")


def format_quantity(value: float, unit: str) -> str:
    """As on screen: `97.31 %`, `250 ms`, `1.3 s`, `15,310`."""
    if unit == "%":
        # 99.996 must not be shown as 100.00: what is short of all keeps a digit that tells so.
        digits = 2 if value in (0, 100) or 0.01 <= value <= 99.99 else 4
        text = f"{value:.{digits}f}".rstrip("0").rstrip(".")
        if text == "100" and value < 100:
            text = "99.9999+"
        return f"{text} %"
    if unit == "s":
        if abs(value) < 1:
            return f"{value * 1000:.3g} ms" if abs(value) < 0.1 else f"{value * 1000:.0f} ms"
        if 120 <= value < _LONGEST_S:
            return format_duration(round(value))
        return f"{value:.2f}".rstrip("0").rstrip(".") + " s" if abs(value) < 120 else f"{value:.3g} s"
    return format_count(value) + (f" {unit}" if unit else "")
