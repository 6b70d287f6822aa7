"""What every plan file is read by: names, sides, waves and gates, each complaint with its place."""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import re
from typing import Final
from urllib.parse import urlsplit

import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import Gate, Source, did_you_mean, parse_gate, parse_query_gate
from fleetlift.core.plan import SideSpec
from fleetlift.core.units import Share, parse_share
from fleetlift.yamlfile import BadFile, NodeReader

NO_GATES: Final[tuple[Gate, ...]] = ()
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}", re.ASCII)
_SECRET = re.compile(r"password|passwd|secret|token|credential|api_?key|private_?key", re.IGNORECASE)
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,40}", re.ASCII)
_WAVES_MAX, _GATES_MAX = 100, 100


class BadPlan(BadFile):
    """A plan file that cannot be used; `problems` holds every mistake, in the file's order."""


class PlanReader(NodeReader):
    """Reads the parts that plans of either kind have."""

    def __init__(self, *, side_kinds: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._side_kinds = side_kinds

    def _name(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a name")
        if text is not None and not _NAME.fullmatch(text):
            return self._wrong(node, key, f"{text!r}: use 1 to 63 letters, digits, '-' or '_'")
        return text

    def _side(self, node: yaml.Node, key: str) -> SideSpec | None:
        expected = (
            f'a mapping such as {{legacy: "tcp://127.0.0.1:7700"}}; kinds: {", ".join(self._side_kinds)}'
        )
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        if not parts:
            return self._wrong(node, key, f"expected {expected}")
        kinds = [name for name in parts if name in self._side_kinds]
        if not kinds:
            first = next(iter(parts))
            return self._wrong(
                parts[first],
                f"{key}.{first}",
                f"is not a kind of side{did_you_mean(first, self._side_kinds)}; expected {expected}",
            )
        if len(kinds) > 1:
            return self._wrong(node, key, f"names more than one side: {', '.join(kinds)}")
        (kind,) = kinds
        texts = {name: self._side_text(part, f"{key}.{name}", name) for name, part in parts.items()}
        for name in parts:
            if name != kind and not _OPTION.fullmatch(name):
                self._wrong(parts[name], f"{key}.{name}", "option names are small letters, digits and '_'")
        values = {name: value for name, value in texts.items() if value is not None}
        if kind not in values:
            return None
        if not values[kind]:
            return self._wrong(parts[kind], f"{key}.{kind}", "say where it is: an address, or 'default'")
        return SideSpec(
            kind=kind,
            address=values[kind],
            options={name: value for name, value in values.items() if name != kind},
        )

    def _side_text(self, node: yaml.Node, key: str, name: str) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            return self._wrong(node, key, "expected a text")
        if _SECRET.search(name) and not name.endswith(("_env", "_file")):
            return self._wrong(
                node,
                key,
                f"a plan holds no secrets: name the environment variable that does, as in {name}_env: "
                f"{name.upper()}",
            )
        if has_password(node.value):
            return self._wrong(
                node,
                key,
                "a plan holds no secrets: take the password out of the address and name the environment "
                "variable that has it, as in password_env: NAME",
            )
        return str(node.value).strip()

    def _waves(self, node: yaml.Node, key: str) -> tuple[Share, ...] | None:
        items = self._list(node, key, "a list of shares such as [10 devices, 5%, 100%]", _WAVES_MAX)
        if items is None:
            return None
        if not items:
            return self._wrong(node, key, "is empty; expected shares such as [10 devices, 5%, 100%]")
        read = self._checked(parse_share)
        shares = [read(item, f"{key}[{n}]") for n, item in enumerate(items)]
        for n in range(1, len(shares)):
            if (before := shares[n - 1]) is not None and (after := shares[n]) is not None:
                further = grows(before, after)
                if further is not None and not further:
                    self._wrong(items[n], f"{key}[{n}]", f"waves must grow: {after} comes after {before}")
        return tuple(share for share in shares if share is not None)

    def _gates(self, node: yaml.Node, key: str) -> tuple[Gate, ...] | None:
        items = self._list(node, key, "a list of gates such as 'devices.silent == 0'", _GATES_MAX)
        if items is None:
            return None
        gates: list[Gate] = []
        for n, item in enumerate(items):
            gate = self._gate(item, f"{key}[{n}]")
            if gate is not None:
                if any(gate.text == other.text for other in gates):
                    self._wrong(item, f"{key}[{n}]", f"{gate.text!r} is there twice")
                gates.append(gate)
        return tuple(gates)

    def _gate(self, node: yaml.Node, key: str) -> Gate | None:
        """One gate; a kind of plan may refuse some."""
        return self._any_gate(node, key)

    def _any_gate(self, node: yaml.Node, key: str) -> Gate | None:
        if not isinstance(node, yaml.MappingNode):
            return self._checked(parse_gate)(node, key)
        expected = "{gate: …}, {sql: …, must: …} or {prometheus: URL, query: …, must: …}"
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        at_least = self._get(parts, "at_least", self._count, at=key)
        if "gate" in parts:
            self._known(node, parts, ("gate", "at_least"), key)
            return self._get(
                parts, "gate", self._checked(lambda text: parse_gate(text, at_least=at_least)), at=key
            )
        if "sql" in parts:
            source, query_key = Source.SQL, "sql"
        elif "prometheus" in parts:
            source, query_key = Source.PROMETHEUS, "query"
        else:
            return self._wrong(node, key, f"expected {expected}")
        self._known(node, parts, once(str(source), query_key, "must", "name", "at_least"), key)
        self._needed(node, parts, (query_key, "must"), key)
        query = self._get(parts, query_key, self._query, at=key)
        must = self._get(parts, "must", self._query, at=key)
        name = self._get(parts, "name", self._query, "", at=key)
        url = self._get(parts, "prometheus", self._url, "", at=key)
        if query is None or must is None or name is None or url is None:
            return None
        try:
            return parse_query_gate(source, query, must, url=url, name=name, at_least=at_least or 0)
        except BadInput as exc:
            return self._wrong(parts["must"], f"{key}.must", str(exc))

    def _query(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a text")
        if text is not None and (not text.strip() or len(text) > 4000):
            return self._wrong(node, key, "expected a text of 1 to 4000 characters")
        return text

    def _url(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a URL")
        if text is None:
            return None
        if has_password(text):
            return self._wrong(node, key, "a plan holds no secrets: give the address without a password")
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", text):
            return self._wrong(node, key, f"{text!r}: expected an address such as http://127.0.0.1:9090")
        return text.rstrip("/")


def once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def grows(before: Share, after: Share) -> bool | None:
    """Whether the second share is the larger; None when that depends on the fleet's size."""
    if before.devices is not None and after.devices is not None:
        return after.devices > before.devices
    if before.percent is not None and after.percent is not None:
        return after.percent > before.percent
    if before.percent == 100:
        return False
    return None


def has_password(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.password) or bool(re.search(r"[?&](password|token|secret)=", text, re.IGNORECASE))
    except ValueError:
        return "@" in text
