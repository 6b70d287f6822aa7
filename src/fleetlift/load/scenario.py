"""The scenario file of a load test: YAML in, a `Scenario` out, or every mistake with file and line; and back.

`docs/load.md` lists every key.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import re
from pathlib import Path
from typing import Any, Final

import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.units import (
    DURATION_EXPECTED,
    Share,
    format_duration,
    parse_duration,
    parse_quantity,
    parse_rate,
    parse_share,
)
from fleetlift.core.workload import (
    DEVICES_MOST,
    SIZE_MOST,
    Active,
    DeviceClass,
    Phase,
    Protocol,
    Scenario,
    Sizes,
    Storm,
    Topic,
)
from fleetlift.yamlfile import BadFile, NodeReader, compose, join, read_text

_TOP: Final = (
    *("scenario", "devices", "for", "rate", "protocol", "qos", "classes", "phases", "repeat", "storms"),
    *("keep_alive", "seed"),
)
_CLASS: Final = ("class", "share", "topics", "size", "background", "active")
_CLASSES_MAX, _TOPICS_MAX, _PHASES_MAX, _STORMS_MAX, _POINTS_MAX = 100, 100, 1000, 100, 101
_LEVEL_MOST: Final = 1000.0
_RATE_MOST: Final = 10_000_000.0
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", re.ASCII)
_TOPIC = re.compile(r"[^\x00-\x1f\x7f+#]{1,512}")
_BYTES = re.compile(r"([0-9]{1,9})(?:\s*(B|KB|KiB))?", re.ASCII)
_QUANTILE = re.compile(r"p([0-9]{1,3}(?:\.[0-9]{1,4})?)", re.ASCII)
_NO_PHASES: tuple[Phase, ...] = ()
_NO_STORMS: tuple[Storm, ...] = ()
_DEFAULT_SIZE: Final = Sizes(((0.0, 170),))


class BadScenario(BadFile):
    """A scenario that cannot be used; `problems` holds every mistake, in the file's order."""


def load_scenario(path: Path) -> Scenario:
    """The scenario in a file. Raises BadInput (also when the file cannot be read)."""
    return parse_scenario(read_text(path, "scenario"), file=str(path))


def parse_scenario(text: str, *, file: str = "scenario.yaml") -> Scenario:
    """The scenario that `text` writes. Raises BadScenario with all mistakes at once."""
    root = compose(text, file, what="scenario", shown_in="docs/load.md", bad=BadScenario)
    reader = _Reader()
    found = reader.scenario(root)
    if reader.problems or found is None:
        raise BadScenario(file, reader.problems)
    return found


class _Reader(NodeReader):
    def scenario(self, root: yaml.Node) -> Scenario | None:
        expected = "a scenario is a mapping that begins with 'scenario: NAME'"
        if (top := self._mapping(root, "", expected)) is None:
            return None
        self._known(root, top, _TOP, "")
        self._needed(root, top, ("scenario", "devices", "for", "classes"), "")
        name = self._get(top, "scenario", self._name)
        devices = self._get(top, "devices", self._devices)
        for_s = self._get(top, "for", self._positive)
        rate_s = self._get(top, "rate", self._rate)
        protocol = self._get(top, "protocol", self._one_of(tuple(Protocol)), str(Protocol.MQTT))
        qos = self._get(top, "qos", self._one_of(("0", "1")), "1")
        classes = self._get(top, "classes", self._classes)
        phases = self._get(top, "phases", self._phases, _NO_PHASES)
        repeat = self._get(top, "repeat", self._bool, False)
        storms = self._get(top, "storms", self._storms, _NO_STORMS)
        keep_alive_s = self._get(top, "keep_alive", self._keep_alive, 300.0)
        seed = self._get(top, "seed", self._count, 1)
        if self.problems or name is None or devices is None or for_s is None or classes is None:
            return None
        fixed = sum(c.share.devices or 0 for c in classes)
        percent = sum(c.share.percent or 0.0 for c in classes)
        if fixed > devices:
            return self._wrong(
                top["classes"], "classes", f"name {fixed} devices together, the scenario has {devices}"
            )
        if fixed < devices and abs(percent - 100) > 0.01:
            return self._wrong(
                top["classes"],
                "classes",
                f"shares come to {percent:g}% of the devices that no class counts; expected 100%",
            )
        found = Scenario(
            name=name,
            devices=devices,
            classes=classes,
            for_s=for_s,
            protocol=Protocol(protocol or Protocol.MQTT),
            qos=int(qos or "1"),
            phases=phases or (),
            repeat=bool(repeat),
            storms=storms or (),
            rate_s=rate_s,
            keep_alive_s=keep_alive_s or 0.0,
            seed=seed or 0,
        )
        if not found.own_rate_s > 0:
            return self._wrong(top["classes"], "classes", "nobody sends anything: give background or active")
        return found

    def _name(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a name")
        if text is not None and not _NAME.fullmatch(text):
            return self._wrong(node, key, f"{text!r}: use 1 to 63 letters, digits, '-', '_' or '.'")
        return text

    def _devices(self, node: yaml.Node, key: str) -> int | None:
        count = self._count(node, key)
        if count is not None and not 0 < count <= DEVICES_MOST:
            return self._wrong(node, key, f"{count}: expected 1 to {DEVICES_MOST:,} devices")
        return count

    def _rate(self, node: yaml.Node, key: str) -> float | None:
        rate = self._checked(parse_rate)(node, key)
        if rate is not None and not 0 < rate <= _RATE_MOST:
            return self._wrong(node, key, f"expected a rate above 0, at most {_RATE_MOST:,.0f}/s")
        return rate

    def _keep_alive(self, node: yaml.Node, key: str) -> float | None:
        seconds = self._duration(node, key)
        if seconds is not None and seconds > 65_535:
            return self._wrong(node, key, "MQTT allows 65535s at most; 0s switches it off")
        return seconds

    def _level(self, node: yaml.Node, key: str) -> float | None:
        expected = f"expected a level such as 100% or 250%, at most {_LEVEL_MOST * 100:g}%"
        text = self._text(node, key, "a level such as 100%")
        if text is None:
            return None
        try:
            quantity = parse_quantity(text)
        except BadInput:
            return self._wrong(node, key, f"{text!r}: {expected}")
        if quantity.unit != "%" or not 0 <= quantity.value <= 100 * _LEVEL_MOST:
            return self._wrong(node, key, f"{text!r}: {expected}")
        return quantity.value / 100

    # -- classes -------------------------------------------------------------------------------------------

    def _classes(self, node: yaml.Node, key: str) -> tuple[DeviceClass, ...] | None:
        items = self._list(node, key, "a list of classes such as '- class: parked'", _CLASSES_MAX)
        if items is None:
            return None
        if not items:
            return self._wrong(node, key, "is empty: a load test needs at least one class of devices")
        found = [self._class(item, f"{key}[{n}]") for n, item in enumerate(items)]
        seen: set[str] = set()
        for n, (item, one) in enumerate(zip(items, found, strict=True)):
            if one is not None and one.name in seen:
                self._wrong(item, f"{key}[{n}].class", f"{one.name!r} is there twice")
            seen.add(one.name if one is not None else "")
        return tuple(c for c in found if c is not None)

    def _class(self, node: yaml.Node, key: str) -> DeviceClass | None:
        if (parts := self._mapping(node, key, "a class is a mapping that begins with 'class: NAME'")) is None:
            return None
        self._known(node, parts, _CLASS, key)
        self._needed(node, parts, ("class", "share", "topics"), key)
        name = self._get(parts, "class", self._name, at=key)
        share = self._get(parts, "share", self._checked(parse_share), at=key)
        topics = self._get(parts, "topics", self._topics, at=key)
        size = self._get(parts, "size", self._sizes, _DEFAULT_SIZE, at=key)
        background_s = self._get(parts, "background", self._rate, 0.0, at=key)
        active = self._get(parts, "active", self._active, at=key)
        if "background" not in parts and "active" not in parts:
            self._wrong(node, key, "sends nothing: give 'background: 6/h', or 'active', or both")
        if name is None or share is None or topics is None or size is None:
            return None
        return DeviceClass(
            name=name, share=share, topics=topics, size=size, background_s=background_s or 0.0, active=active
        )

    def _active(self, node: yaml.Node, key: str) -> Active | None:
        expected = "a mapping such as {rate: 2/s, for: 5m, every: 1h}"
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        self._known(node, parts, ("rate", "for", "every"), key)
        self._needed(node, parts, ("rate", "for", "every"), key)
        rate_s = self._get(parts, "rate", self._rate, at=key)
        for_s = self._get(parts, "for", self._positive, at=key)
        every_s = self._get(parts, "every", self._positive, at=key)
        if rate_s is None or for_s is None or every_s is None:
            return None
        if for_s > every_s:
            return self._wrong(parts["for"], join(key, "for"), "is longer than 'every'")
        return Active(rate_s=rate_s, for_s=for_s, every_s=every_s)

    def _topics(self, node: yaml.Node, key: str) -> tuple[Topic, ...] | None:
        """One topic, a list of them, or a mapping with how often each is used beside the others."""
        if isinstance(node, yaml.ScalarNode):
            one = self._topic(node, key)
            return None if one is None else (Topic(one),)
        if isinstance(node, yaml.SequenceNode):
            items = self._list(node, key, "topics", _TOPICS_MAX) or []
            read = [self._topic(item, f"{key}[{n}]") for n, item in enumerate(items)]
            found = tuple(Topic(text) for text in read if text is not None)
        else:
            expected = "a topic such as dt/{device}/status, a list of topics, or {topic: how often}"
            if (parts := self._mapping(node, key, expected)) is None:
                return None
            if len(parts) > _TOPICS_MAX:
                return self._wrong(node, key, f"has {len(parts)} entries; at most {_TOPICS_MAX} are read")
            weighted = []
            for name, value in parts.items():
                weight = self._weight(value, join(key, name))
                if (problem := _topic_problem(name)) is not None:
                    self._wrong(value, join(key, name), problem)
                elif weight is not None:
                    weighted.append(Topic(name, weight))
            found = tuple(weighted)
        if not found and not self.problems:
            return self._wrong(node, key, "is empty: name at least one topic, such as dt/{device}/status")
        return found

    def _topic(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a topic such as dt/{device}/status")
        if text is not None and (problem := _topic_problem(text)) is not None:
            return self._wrong(node, key, problem)
        return text

    def _weight(self, node: yaml.Node, key: str) -> float | None:
        text = self._text(node, key, "a number, such as 3, or a share, such as 30%")
        if text is None:
            return None
        try:
            quantity = parse_quantity(text)
        except BadInput as exc:
            return self._wrong(node, key, str(exc))
        if quantity.unit not in ("", "%") or not quantity.value > 0:
            return self._wrong(node, key, f"{text!r}: expected a number above 0, or a share such as 30%")
        return quantity.value

    def _sizes(self, node: yaml.Node, key: str) -> Sizes | None:
        """`170`, `100-300` (any of them), or quantiles: `{p0: 80, p50: 170, p99: 900, p100: 4096}`."""
        if isinstance(node, yaml.MappingNode):
            return self._quantiles(node, key)
        text = self._text(node, key, "a size such as 170, 100-300 or {p0: 80, p50: 170, p100: 900}")
        if text is None:
            return None
        low, dash, high = text.partition("-")
        small = self._bytes(node, key, low)
        large = self._bytes(node, key, high) if dash else small
        if small is None or large is None:
            return None
        if small > large:
            return self._wrong(node, key, f"{text!r}: the smaller size comes first")
        return Sizes(((0.0, small),)) if small == large else Sizes(((0.0, small), (1.0, large)))

    def _quantiles(self, node: yaml.Node, key: str) -> Sizes | None:
        parts = self._mapping(node, key, "quantiles such as {p0: 80, p50: 170, p100: 900}")
        if parts is None:
            return None
        if not parts or len(parts) > _POINTS_MAX:
            return self._wrong(node, key, f"expected 1 to {_POINTS_MAX} quantiles such as p50: 170")
        points: list[tuple[float, int]] = []
        for name, value in parts.items():
            at = join(key, name)
            match = _QUANTILE.fullmatch(name)
            if match is None or float(match[1]) > 100:
                self._wrong(value, at, "is not a quantile such as p0, p50, p99.9 or p100")
                continue
            text = self._text(value, at, "a size such as 170")
            size = None if text is None else self._bytes(value, at, text)
            if size is None:
                continue
            share = round(float(match[1]) / 100, 9)
            if points and (share <= points[-1][0] or size < points[-1][1]):
                self._wrong(value, at, "quantiles and their sizes must grow")
            points.append((share, size))
        return Sizes(tuple(points)) if points else None

    def _bytes(self, node: yaml.Node, key: str, text: str) -> int | None:
        if not (match := _BYTES.fullmatch(text.strip())):
            return self._wrong(node, key, f"{text.strip()!r} is not a size such as 170, 2 KiB or 100-300")
        size = int(match[1]) * {None: 1, "B": 1, "KB": 1000, "KiB": 1024}[match[2]]
        if size > SIZE_MOST:
            return self._wrong(node, key, f"{size} bytes: at most {SIZE_MOST} are sent in one message")
        return size

    # -- time ----------------------------------------------------------------------------------------------

    def _phases(self, node: yaml.Node, key: str) -> tuple[Phase, ...] | None:
        items = self._list(node, key, "a list such as '- {for: 30s, from: 0%, to: 100%}'", _PHASES_MAX)
        if items is None:
            return None
        found: list[Phase] = []
        for n, item in enumerate(items):
            at = f"{key}[{n}]"
            expected = "a phase such as {for: 30s, from: 0%, to: 100%} or {for: 5s, level: 300%}"
            if (parts := self._mapping(item, at, expected)) is None:
                continue
            self._known(item, parts, ("for", "level", "from", "to"), at)
            self._needed(item, parts, ("for",), at)
            for_s = self._get(parts, "for", self._positive, at=at)
            if "level" in parts and ("from" in parts or "to" in parts):
                self._wrong(item, at, "give 'level', or 'from' and 'to'")
            level = self._get(parts, "level", self._level, at=at)
            before = found[-1].end if found else 1.0
            start = self._get(parts, "from", self._level, before, at=at)
            end = self._get(parts, "to", self._level, start, at=at)
            if "level" not in parts and "to" not in parts:
                self._wrong(item, at, f"expected {expected}")
            if level is not None:
                start = end = level
            if for_s is not None and start is not None and end is not None:
                found.append(Phase(for_s=for_s, start=start, end=end))
        if found and not self.problems and not any(p.start or p.end for p in found):
            return self._wrong(node, key, "every level is 0%: nothing would be sent")
        return tuple(found)

    def _storms(self, node: yaml.Node, key: str) -> tuple[Storm, ...] | None:
        items = self._list(node, key, "a list such as '- {at: 30s, share: 50%, within: 5s}'", _STORMS_MAX)
        if items is None:
            return None
        found: list[Storm] = []
        for n, item in enumerate(items):
            at = f"{key}[{n}]"
            expected = "a storm such as {at: 30s, share: 50%, within: 5s}"
            if (parts := self._mapping(item, at, expected)) is None:
                continue
            self._known(item, parts, ("at", "share", "within", "every"), at)
            self._needed(item, parts, ("at", "share", "within"), at)
            at_s = self._get(parts, "at", self._duration, at=at)
            share = self._get(parts, "share", self._checked(parse_share), at=at)
            within_s = self._get(parts, "within", self._duration, at=at)
            every_s = self._get(parts, "every", self._positive, at=at)
            if at_s is not None and share is not None and within_s is not None:
                if every_s is not None and every_s <= within_s:
                    self._wrong(parts["every"], join(at, "every"), "must be longer than 'within'")
                found.append(Storm(at_s=at_s, share=share, within_s=within_s, every_s=every_s))
        return tuple(found)


def _topic_problem(text: str) -> str | None:
    if not _TOPIC.fullmatch(text):
        return f"{text[:80]!r}: expected a topic of 1 to 512 characters without wildcards"
    if "{device}" not in text:
        return f"{text[:80]!r}: {{device}} must stand where the device's id goes"
    if "{" in text.replace("{device}", "") or "}" in text.replace("{device}", ""):
        return f"{text[:80]!r}: only {{device}} is filled in"
    return None


# -- and back ---------------------------------------------------------------------------------------------


def dump_scenario(scenario: Scenario) -> str:
    """The file that `parse_scenario` reads as this scenario."""
    top: dict[str, Any] = {
        "scenario": scenario.name,
        "devices": scenario.devices,
        "for": _span(scenario.for_s),
    }
    if scenario.rate_s is not None:
        top["rate"] = _rate(scenario.rate_s)
    top |= {"protocol": str(scenario.protocol), "qos": scenario.qos}
    top |= {"keep_alive": _span(scenario.keep_alive_s), "seed": scenario.seed}
    top["classes"] = [_class(c) for c in scenario.classes]
    if scenario.phases:
        top["phases"] = [_phase(p) for p in scenario.phases]
    if scenario.repeat:
        top["repeat"] = True
    if scenario.storms:
        top["storms"] = [
            {"at": _span(s.at_s), "share": str(s.share), "within": _span(s.within_s)}
            | ({} if s.every_s is None else {"every": _span(s.every_s)})
            for s in scenario.storms
        ]
    return str(yaml.safe_dump(top, sort_keys=False, allow_unicode=True, width=110))


def _class(of: DeviceClass) -> dict[str, Any]:
    found: dict[str, Any] = {"class": of.name, "share": _share(of.share)}
    if all(topic.weight == 1 for topic in of.topics):
        found["topics"] = [topic.template for topic in of.topics]
    else:
        found["topics"] = {topic.template: _number(topic.weight) for topic in of.topics}
    if len(of.size.points) == 1:
        found["size"] = of.size.points[0][1]
    else:
        found["size"] = {f"p{_number(100 * share)}": size for share, size in of.size.points}
    if of.background_s:
        found["background"] = _rate(of.background_s)
    if of.active:
        found["active"] = {
            "rate": _rate(of.active.rate_s),
            "for": _span(of.active.for_s),
            "every": _span(of.active.every_s),
        }
    return found


def _phase(phase: Phase) -> dict[str, Any]:
    if phase.start == phase.end:
        return {"for": _span(phase.for_s), "level": f"{_number(100 * phase.start)}%"}
    levels = {"from": f"{_number(100 * phase.start)}%", "to": f"{_number(100 * phase.end)}%"}
    return {"for": _span(phase.for_s), **levels}


def _span(seconds: float) -> str:
    text = format_duration(seconds)
    try:
        parse_duration(text)
    except BadInput as exc:  # a scenario made by a program, with a time that no file can say
        raise BadInput(f"{seconds} s is not {DURATION_EXPECTED}") from exc
    return text


def _rate(rate_s: float) -> str:
    """In the unit in which the number is not too small to be read."""
    for unit, seconds in (("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)):
        if rate_s * seconds >= 1 or unit == "d":
            return f"{_number(rate_s * seconds)}/{unit}"
    raise AssertionError


def _share(share: Share) -> str:
    return str(share)


def _number(value: float) -> float | int:
    rounded = round(value, 6)
    return int(rounded) if rounded == int(rounded) else rounded
