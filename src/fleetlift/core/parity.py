"""How two copies of one telemetry message compare, field by field, and what is likely behind a difference.

While a device sends to both sides, the new side gets each message twice: from the device, and by the old
side's feed. `compare` takes the two bodies; rules of the plan say which fields to ignore and how far numbers
may be apart. What the old side says when asked twice for the same message is the noise that differences are
measured against.

Every message is in exactly one class: matched + only old + only new + differing + ignored by rule = all.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

import msgspec

from fleetlift.core.errors import BadInput

FIELDS_MAX: Final = 64  # of one message or one channel that are told apart; the rest is counted as `…`
REST: Final = "…"
WHOLE: Final = "(body)"  # a body that is no object has no fields
TIME: Final = "(time)"  # both sides have the number, and say different times of it
DEPTH_MAX: Final = 6  # deeper values are compared whole
EXAMPLE_CHARS: Final = 80
_BESIDE: Final = ("ts", "seq")  # stand in the body on one path and beside it on the other


class Kind(StrEnum):
    MATCHED = "matched"
    DIFFERING = "differing"
    IGNORED = "ignored"  # differs only in what a rule allows


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan allows of `field` on `channel` (both with `*`). All None: the field is ignored."""

    channel: str = "*"
    field: str
    absolute: float | None = None
    relative: float | None = None  # 0.01 is one percent

    @property
    def text(self) -> str:
        """As on screen and in the plan: `speed: 1%`."""
        if self.absolute is not None:
            what = f"{self.absolute:g}"
        elif self.relative is not None:
            what = f"{self.relative * 100:g}%"
        else:
            what = "ignore"
        return f"{self.field}: {what}" if self.channel == "*" else f"{self.channel} {self.field}: {what}"


_SHARE = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)\s*(%?)", re.ASCII)


def parse_rule(field: str, allowed: object) -> Rule:
    """A line of the plan's `parity:` section: `field: ignore`, `field: 0.5` or `field: 1%`.

    `field` may begin with a channel and a space (`position gps.*`). Raises BadInput with what was expected.
    """
    channel, _, name = field.strip().rpartition(" ")
    channel, name = channel.strip() or "*", name.strip()
    if not name or len(field) > 200:
        raise BadInput(f"{field[:80]!r} is not a field such as 'speed', 'gps.*' or 'position speed'")
    if allowed == "ignore":
        return Rule(channel=channel, field=name)
    match = _SHARE.fullmatch(str(allowed).strip()) if isinstance(allowed, str | int | float) else None
    if match is None or isinstance(allowed, bool):
        raise BadInput(f"{field}: expected 'ignore', a number such as 0.5 or a share such as 1%")
    number = float(match[1])
    if match[2]:
        return Rule(channel=channel, field=name, relative=number / 100)
    return Rule(channel=channel, field=name, absolute=number)


class Difference(msgspec.Struct, frozen=True, gc=False):
    """One field of one message. `allowed`: a rule lets it pass."""

    field: str
    cause: str
    old: str
    new: str
    allowed: bool


class Comparison(msgspec.Struct, frozen=True, gc=False):
    kind: Kind
    differences: tuple[Difference, ...] = ()


_SAME: Final = Comparison(Kind.MATCHED)


def compare(channel: str, old: str, new: str, rules: Sequence[Rule] = ()) -> Comparison:
    """Two bodies, JSON texts of the same message, as the old and as the new side have them.

    `ts` and `seq` are not looked at: they are the key by which the two were brought together.
    """
    if old == new:
        return _SAME
    left, right = msgspec.json.decode(old), msgspec.json.decode(new)
    if type(left) is dict and type(right) is dict:
        for name in _BESIDE:
            left.pop(name, None)
            right.pop(name, None)
    if msgspec.json.encode(left) == msgspec.json.encode(right):
        return _SAME
    before, after = flatten(left), flatten(right)
    found = []
    for field in dict.fromkeys((*before, *after)):
        a, b = before.get(field, _MISSING), after.get(field, _MISSING)
        if not _same(a, b):
            found.append(
                Difference(field, cause(a, b), _shown(a), _shown(b), _allowed(channel, field, a, b, rules))
            )
    if not found:
        return _SAME
    kind = Kind.IGNORED if all(difference.allowed for difference in found) else Kind.DIFFERING
    return Comparison(kind, tuple(found))


class _Missing:
    """Stands for a field that one side does not have."""


_MISSING: Final = _Missing()


def flatten(value: object) -> dict[str, object]:
    """Fields by path (`gps.lat`, `doors[0]`). Beyond the most fields or levels, values are kept whole."""
    if type(value) is not dict:
        return {WHOLE: value}
    found: dict[str, object] = {}
    rest: dict[str, object] = {}
    stack: list[tuple[str, object, int]] = [("", value, 0)]
    while stack:
        path, here, depth = stack.pop()
        inner: Iterable[tuple[str, object]] = ()
        if depth < DEPTH_MAX and type(here) is dict and here:
            inner = [(f"{path}.{key}" if path else key, item) for key, item in here.items()]
        elif depth < DEPTH_MAX and type(here) is list and here:
            inner = [(f"{path}[{place}]", item) for place, item in enumerate(here)]
        if inner or not path:
            stack += [(name, item, depth + 1) for name, item in reversed(list(inner))]
        elif len(found) < FIELDS_MAX:
            found[path[:200]] = here
        else:
            rest[path] = here
    if rest:
        found[REST] = rest
    return found


def _same(a: object, b: object) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if _is_number(a) and _is_number(b):
        return a == b
    return type(a) is type(b) and a == b


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _allowed(channel: str, field: str, a: Any, b: Any, rules: Sequence[Rule]) -> bool:
    for rule in rules:
        if not (fnmatch.fnmatchcase(channel, rule.channel) and fnmatch.fnmatchcase(field, rule.field)):
            continue
        if rule.absolute is None and rule.relative is None:
            return True
        if not (_is_number(a) and _is_number(b)):
            continue
        if rule.absolute is not None and abs(a - b) <= rule.absolute:
            return True
        if rule.relative is not None and abs(a - b) <= rule.relative * abs(a):
            return True
    return False


def _shown(value: object) -> str:
    if value is _MISSING:
        return "–"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= EXAMPLE_CHARS else text[: EXAMPLE_CHARS - 1] + "…"


# -- what is likely behind it ------------------------------------------------------------------------------

_FACTORS: Final = {
    3.6: "m/s and km/h",
    1.609344: "miles and km",
    0.44704: "mph and m/s",
    1.852: "knots and km/h",
    0.3048: "feet and metres",
    6.894757: "psi and kPa",
    3.785412: "gallons and litres",
    60.0: "minutes and seconds, or the like",
    100.0: "a share and percent, or the like",
    1000.0: "a thousand: milli or kilo",
    3600.0: "hours and seconds, or the like",
}
_QUARTER_S: Final = 900  # time zones differ by whole quarters of an hour
_ZONES_S: Final = 14 * 3600


def cause(old: object, new: object) -> str:
    """What is likely behind a difference, in a few words; "other" where nothing fits."""
    if old is _MISSING:
        return "missing on the old side"
    if new is _MISSING:
        return "missing on the new side"
    if old is None or new is None:
        return "null"
    if _is_number(old) and _is_number(new):
        return _numeric(float(old), float(new))  # type: ignore[arg-type]
    if isinstance(old, str) and isinstance(new, str):
        return _textual(old, new)
    if type(old) is not type(new):
        return "number as text" if _as_number(old) == _as_number(new) is not None else "type"
    return "other"


def _numeric(old: float, new: float) -> str:
    if not (abs(old) < 1e15 and abs(new) < 1e15):  # nor infinite, nor not a number
        return "other"
    for exact, short in ((old, new), (new, old)):
        for digits in range(10):
            if short == round(exact, digits):
                return "rounding"
            if short == math.trunc(exact * 10.0**digits) / 10.0**digits:
                return "cut off"
    apart = abs(old - new)
    for unit in (1.0, 1000.0):
        if old / unit > 1e8 and _QUARTER_S <= apart / unit <= _ZONES_S and (apart / unit) % _QUARTER_S == 0:
            return "time zone"
    if math.isclose(new, old * 1.8 + 32, rel_tol=1e-3) or math.isclose(old, new * 1.8 + 32, rel_tol=1e-3):
        return "unit: °C and °F"
    if old and new:
        ratio = max(abs(new / old), abs(old / new))
        for factor, name in _FACTORS.items():
            if math.isclose(ratio, max(factor, 1 / factor), rel_tol=2e-3):
                return f"unit: {name}"
    return "sign" if old == -new else "value"


def _textual(old: str, new: str) -> str:
    if old.strip() == new.strip():
        return "white space"
    if old.casefold() == new.casefold():
        return "capitals"
    first, second = _as_time(old), _as_time(new)
    if first is not None and second is not None:
        alike = (first.tzinfo is None) == (second.tzinfo is None)
        apart = abs((first - second).total_seconds()) if alike else 0
        if apart == 0:
            return "way of writing a time"
        return "time zone" if apart <= _ZONES_S and apart % _QUARTER_S == 0 else "time"
    if _as_number(old) == _as_number(new) is not None:
        return "way of writing a number"
    return "cut off" if old.startswith(new) or new.startswith(old) else "text"


def _as_number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _as_time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


# -- counting ----------------------------------------------------------------------------------------------


class FieldTally(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How often one field differed, allowed or not, by likely cause, with the newest example."""

    differing: int = 0
    allowed: int = 0
    causes: dict[str, int] = {}
    old: str = ""
    new: str = ""

    def add(self, other: "FieldTally") -> None:
        self.differing += other.differing
        self.allowed += other.allowed
        for name, n in other.causes.items():
            self.causes[name] = self.causes.get(name, 0) + n
        self.old, self.new = other.old or self.old, other.new or self.new

    @property
    def likely(self) -> str:
        """The most frequent cause."""
        return max(self.causes, key=lambda name: self.causes[name], default="")


class Tally(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What came of comparing. `compared` pairs, of which some differ and some differ as a rule allows."""

    compared: int = 0
    differing: int = 0
    ignored: int = 0
    fields: dict[str, FieldTally] = {}

    def note(self, comparison: Comparison) -> None:
        self.compared += 1
        self.differing += comparison.kind is Kind.DIFFERING
        self.ignored += comparison.kind is Kind.IGNORED
        for one in comparison.differences:
            tally = self._field(one.field)
            if one.allowed:
                tally.allowed += 1
            else:
                tally.differing += 1
            tally.causes[one.cause] = tally.causes.get(one.cause, 0) + 1
            tally.old, tally.new = one.old, one.new

    def add(self, other: "Tally") -> None:
        self.compared += other.compared
        self.differing += other.differing
        self.ignored += other.ignored
        for name, tally in other.fields.items():
            self._field(name).add(tally)

    def _field(self, name: str) -> FieldTally:
        if name not in self.fields and len(self.fields) >= FIELDS_MAX:
            name = REST
        return self.fields.setdefault(name, FieldTally())


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Every message that both sides should have: `matched + only_old + only_new + differing + ignored = all`.

    `retimed` are those of `differing` that both sides have under one number and different times, so that
    their bodies were not compared. `uncounted` messages carry no number and are in no class.
    """

    matched: int = 0
    only_old: int = 0
    only_new: int = 0
    differing: int = 0
    ignored: int = 0
    retimed: int = 0
    uncounted: int = 0

    @property
    def all(self) -> int:
        return self.matched + self.only_old + self.only_new + self.differing + self.ignored


def account(
    *,
    both: int,
    only_old: int,
    only_new: int,
    compared: int,
    differing: int,
    ignored: int,
    uncounted: int = 0,
) -> Account:
    """Bring together what the ledger counts (`both`, `only_*` numbers) and what was compared."""
    retimed = max(0, both - compared)
    return Account(
        matched=compared - differing - ignored,
        only_old=only_old,
        only_new=only_new,
        differing=differing + retimed,
        ignored=ignored,
        retimed=retimed,
        uncounted=uncounted,
    )


def above_noise(differing: int, compared: int, noisy: int, noise_compared: int) -> float:
    """The share of pairs that differ beyond what the old side differs from itself, 0 to 1."""
    if compared == 0:
        return 0.0
    noise = noisy / noise_compared if noise_compared else 0.0
    return max(0.0, differing / compared - noise)


def field_noise(noise: Mapping[str, Tally], channel: str, field: str) -> float:
    """The share of second readings in which the old side's own `field` differed, 0 to 1."""
    tally = noise.get(channel)
    if tally is None or not tally.compared or field not in tally.fields:
        return 0.0
    return tally.fields[field].differing / tally.compared
