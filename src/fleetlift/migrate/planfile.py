"""The plan file: YAML text in, a `Plan` out, or every mistake in it with file, line and what was expected.

The YAML is read as a tree of nodes with their places (`yaml.compose`), never as Python objects, so that
each complaint can name a line and nothing in a file can be constructed. `docs/plan.md` lists every key.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import yaml

from fleetlift.core import where
from fleetlift.core.errors import BadInput
from fleetlift.core.gates import Gate, Source, did_you_mean, parse_gate, parse_query_gate
from fleetlift.core.identity import checked_device_id, checked_tenant_id
from fleetlift.core.parity import Rule, parse_rule
from fleetlift.core.plan import CONFIDENCE, STAGES, Fleet, Move, OnBreach, Plan, SideSpec, Step
from fleetlift.core.units import Quantity, Share, parse_duration, parse_quantity, parse_share
from fleetlift.sides.open import side_kinds as installed_sides

MAX_BYTES: Final = 256 * 1024
LEVERS: Final = ("flag",)

_STEP_KINDS_OF_TENANTS: Final = ("copy", "warm", "validate", "freeze", "switch", "drain")
_TIMES: Final = {
    "settle": "settle_s",
    "grace": "grace_s",
    "silent_after": "silent_after_s",
    "commands_timeout": "commands_timeout_s",
    "retry_after": "retry_after_s",
    "no_data_after": "no_data_after_s",
}
_DEFAULTS: Final = ("bake", "approve", "confidence", *_TIMES)  # may stand at the top, for all steps
_TOP: Final = (
    *("migration", "fleet", "from", "to", "lever", "on_breach", "steps", "try_within", "new_lost_limit"),
    "parity",
    *_DEFAULTS,
)
_STEP: Final = ("move", "stages", "waves", "gates", *_DEFAULTS)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,62}", re.ASCII)
_SECRET = re.compile(r"password|passwd|secret|token|credential|api_?key|private_?key", re.IGNORECASE)
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,40}", re.ASCII)
_WAVES_MAX, _STEPS_MAX, _GATES_MAX, _CANARIES_MAX, _RULES_MAX = 100, 100, 100, 10_000, 200
_DEPTH_MAX: Final = 16
_CONTROL_MOST: Final = 50.0
_CONFIDENCE_RANGE: Final = (50.0, 99.9999)
_TOLD_MAX: Final = 100  # problems in the text of one error
_OPENING: Final = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING: Final = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_NO_GATES: tuple[Gate, ...] = ()
_NO_CANARIES: tuple[str, ...] = ()

T = TypeVar("T")


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One mistake of a plan file. `line` and `column` count from 1; `key` is the way to the place."""

    line: int
    column: int
    key: str
    text: str


class BadPlan(BadInput):
    """A plan file that cannot be used; `problems` holds every mistake, in the file's order."""

    def __init__(self, file: str, problems: Collection[Problem]) -> None:
        self.file = file
        self.problems = tuple(sorted(problems, key=lambda p: (p.line, p.column)))
        lines = [
            f"{file}:{p.line}:{p.column}: {p.key + ': ' if p.key else ''}{p.text}"
            for p in self.problems[:_TOLD_MAX]
        ]
        if len(self.problems) > _TOLD_MAX:
            lines.append(f"{file}: and {len(self.problems) - _TOLD_MAX} more")
        super().__init__("\n".join(lines))


def load_plan(path: Path) -> Plan:
    """The plan in a file. Raises BadInput (also when the file cannot be read)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode()
    except OSError as exc:
        raise BadInput(f"{path}: the plan cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise BadInput(f"{path}: a plan is UTF-8 text, and byte {exc.start} of this file is not") from exc
    return parse_plan(text, file=str(path))


def parse_plan(
    text: str,
    *,
    file: str = "plan.yaml",
    side_kinds: Collection[str] | None = None,
    levers: Collection[str] = LEVERS,
) -> Plan:
    """The plan that `text` writes. Raises BadPlan with all mistakes at once.

    `side_kinds` None: those that this installation knows.
    """
    kinds = installed_sides() if side_kinds is None else tuple(side_kinds)
    root = _compose(text, file)
    reader = _Reader(side_kinds=kinds, levers=tuple(levers))
    plan = reader.plan(root)
    if reader.problems or plan is None:
        raise BadPlan(file, reader.problems)
    return plan


def _compose(text: str, file: str) -> yaml.Node:
    def broken(what: str, mark: yaml.Mark | None = None) -> BadPlan:
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        return BadPlan(file, [Problem(line=line, column=column, key="", text=what)])

    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise broken(f"a plan has at most {MAX_BYTES // 1024} KiB")
    try:
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEPTH_MAX:
                raise broken("lists or mappings are nested too deeply", token.start_mark)
            # A reference can make a file of one line as large as the world, or a loop.
            if isinstance(token, yaml.AliasToken):
                raise broken("references (*name) are not used in plans: write it out", token.start_mark)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        what = " ".join(part for part in (exc.context, exc.problem) if part)
        raise broken(f"this is not YAML: {what}", exc.problem_mark or exc.context_mark) from exc
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        raise broken(f"this is not YAML: {str(exc).splitlines()[0] if str(exc) else exc}") from exc
    if root is None:
        raise broken("the plan is empty; docs/plan.md shows one")
    return root


class _Reader:
    """Reads nodes into structs and collects what is wrong; None stands for what could not be read."""

    def __init__(self, *, side_kinds: tuple[str, ...], levers: tuple[str, ...]) -> None:
        self.problems: list[Problem] = []
        self._side_kinds = side_kinds
        self._levers = levers
        self._bake_given = False

    # -- the parts of a plan ---------------------------------------------------------------------------

    def plan(self, root: yaml.Node) -> Plan | None:
        if (top := self._mapping(root, "", "a plan is a mapping that begins with 'migration: NAME'")) is None:
            return None
        if "tenant" in top and "fleet" not in top:
            self._wrong(
                top["tenant"],
                "tenant",
                "this is the plan of a tenant's move; a fleet migration has 'fleet: {tenant: …}'",
            )
            return None
        self._known(root, top, _TOP, "")
        self._needed(root, top, ("migration", "fleet", "from", "to", "steps"), "")
        name = self._get(top, "migration", self._name)
        fleet = self._get(top, "fleet", self._fleet)
        old = self._get(top, "from", self._side)
        new = self._get(top, "to", self._side)
        lever = self._get(top, "lever", self._one_of(self._levers), "flag")
        on_breach = self._get(top, "on_breach", self._one_of(tuple(OnBreach)), str(OnBreach.REVERT))
        try_within_s = self._get(top, "try_within", self._positive, 30.0)
        new_lost_limit_s = self._get(top, "new_lost_limit", self._positive, 30.0)
        parity = self._get(top, "parity", self._parity)
        defaults = self._defaults(top, "")
        self._bake_given = "bake" in top  # also when it is wrong: then that is said, once
        steps = self._steps(top["steps"], defaults) if "steps" in top else None
        if old is not None and new is not None and old == new:
            self._wrong(top["to"], "to", "is the same as 'from': a migration needs two sides")
        if self.problems or name is None or fleet is None or old is None or new is None or steps is None:
            return None
        return Plan(
            name=name,
            fleet=fleet,
            old=old,
            new=new,
            steps=steps,
            lever=lever or "flag",
            on_breach=OnBreach(on_breach or OnBreach.REVERT),
            parity=parity or (),
            try_within_s=try_within_s or 30.0,
            new_lost_limit_s=new_lost_limit_s or 30.0,
        )

    def _parity(self, node: yaml.Node, key: str) -> tuple[Rule, ...] | None:
        expected = "fields with what may differ, such as {speed: 1%, server_time: ignore}"
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        if len(parts) > _RULES_MAX:
            return self._wrong(node, key, f"has {len(parts)} rules; at most {_RULES_MAX} are read")
        rules = [
            self._checked(partial(parse_rule, field))(value, _join(key, field))
            for field, value in parts.items()
        ]
        return tuple(rule for rule in rules if rule is not None)

    def _name(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a name")
        if text is not None and not _NAME.fullmatch(text):
            return self._wrong(node, key, f"{text!r}: use 1 to 63 letters, digits, '-' or '_'")
        return text

    def _fleet(self, node: yaml.Node, key: str) -> Fleet | None:
        expected = 'a mapping such as {tenant: carshare, where: "attributes.hardware >= 3"}'
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        self._known(node, parts, ("tenant", "where", "updatable", "canaries", "control"), key)
        self._needed(node, parts, ("tenant",), key)
        tenant = self._get(parts, "tenant", self._checked(checked_tenant_id), at=key)
        condition = self._get(parts, "where", self._where, "", at=key)
        updatable = self._get(parts, "updatable", self._where, "", at=key)
        canaries = self._get(parts, "canaries", self._canaries, _NO_CANARIES, at=key)
        control = self._get(parts, "control", self._control, at=key)
        if tenant is None or condition is None or updatable is None or canaries is None:
            return None
        return Fleet(tenant=tenant, where=condition, updatable=updatable, canaries=canaries, control=control)

    def _control(self, node: yaml.Node, key: str) -> Share | None:
        share = self._checked(parse_share)(node, key)
        if share is not None and share.percent is not None and share.percent > _CONTROL_MOST:
            return self._wrong(
                node, key, f"{share} leaves too few devices for the waves before the last: 50% is the most"
            )
        return share

    def _where(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a condition such as 'attributes.hardware >= 3'")
        if text is not None and text.strip():
            try:
                where.parse(text)
            except BadInput as exc:
                return self._wrong(node, key, str(exc))
        return text if text is None else text.strip()

    def _canaries(self, node: yaml.Node, key: str) -> tuple[str, ...] | None:
        items = self._list(node, key, "a list of device ids", _CANARIES_MAX)
        if items is None:
            return None
        check = self._checked(checked_device_id)
        ids = [check(item, f"{key}[{n}]") for n, item in enumerate(items)]
        for n, (item, device) in enumerate(zip(items, ids, strict=True)):
            if device is not None and device in ids[:n]:
                self._wrong(item, f"{key}[{n}]", f"{device!r} is listed twice")
        return tuple(device for device in ids if device is not None)

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
        if _has_password(node.value):
            return self._wrong(
                node,
                key,
                "a plan holds no secrets: take the password out of the address and name the environment "
                "variable that has it, as in password_env: NAME",
            )
        return str(node.value).strip()

    # -- steps -----------------------------------------------------------------------------------------

    def _steps(self, node: yaml.Node, defaults: Mapping[str, float | bool | None]) -> tuple[Step, ...] | None:
        items = self._list(node, "steps", "a list of steps such as '- move: telemetry'", _STEPS_MAX)
        if items is None:
            return None
        if not items:
            return self._wrong(
                node, "steps", "a migration needs at least one step, such as '- move: telemetry'"
            )
        reached: dict[Move, int] = {}
        steps: list[Step] = []
        for number, item in enumerate(items):
            step = self._step(item, f"steps[{number}]", defaults, reached)
            if step is not None:
                if steps and (further := _goes_further(steps[-1], step)):
                    self._wrong(item, f"steps[{number}].waves", further)
                steps.append(step)
        return tuple(steps)

    def _step(
        self, node: yaml.Node, key: str, defaults: Mapping[str, float | bool | None], reached: dict[Move, int]
    ) -> Step | None:
        moves = ", ".join(Move)
        if (
            parts := self._mapping(node, key, f"a step is a mapping that begins with 'move: …' ({moves})")
        ) is None:
            return None
        for kind in _STEP_KINDS_OF_TENANTS:
            if kind in parts:
                return self._wrong(
                    parts[kind],
                    f"{key}.{kind}",
                    f"is not a step kind of a fleet migration; use move: {moves}",
                )
        self._known(node, parts, _STEP, key)
        self._needed(node, parts, ("move", "waves"), key)
        move_text = self._get(parts, "move", self._one_of(tuple(Move)), at=key)
        waves = self._get(parts, "waves", self._waves, at=key)
        gates = self._get(parts, "gates", self._gates, _NO_GATES, at=key)
        own = {**defaults, **self._defaults(parts, key)}
        if "bake" not in parts and not self._bake_given:
            self._wrong(node, key, "bake is missing: how long a wave is watched before the next, such as 2h")
        if move_text is None:
            return None
        move = Move(move_text)
        stages = self._stages(parts.get("stages"), node, key, move, reached.get(move, 0))
        if stages is not None:
            reached[move] = STAGES[move].index(stages[-1]) + 1
            if move is Move.LINK and any(
                reached.get(m, 0) < len(STAGES[m]) for m in (Move.TELEMETRY, Move.COMMANDS)
            ):
                self._wrong(
                    node,
                    key,
                    "the link to the old side can be closed only after steps that bring telemetry and "
                    "commands to stage new",
                )
        if waves is None or gates is None or stages is None or "bake" not in own:
            return None
        times = {
            field: float(seconds) for name, field in _TIMES.items() if (seconds := own.get(name)) is not None
        }
        confidence = own.get("confidence", CONFIDENCE)
        return Step(
            move=move,
            stages=stages,
            waves=waves,
            bake_s=float(own["bake"] or 0.0),
            gates=gates,
            approve=bool(own.get("approve", False)),
            confidence=None if confidence is None else float(confidence),
            **times,
        )

    def _defaults(self, parts: Mapping[str, yaml.Node], key: str) -> dict[str, float | bool | None]:
        """The times, `approve` and `confidence`, as far as given here."""
        found: dict[str, float | bool | None] = {}
        for name in _DEFAULTS:
            if name == "confidence":
                if name in parts and (share := self._confidence(parts[name], _join(key, name))) != 0:
                    found[name] = share
                continue
            read = self._bool if name == "approve" else self._duration
            if name in _TIMES and name != "grace":
                read = self._positive
            value = self._get(parts, name, read, at=key)
            if value is not None:
                found[name] = value
        return found

    def _confidence(self, node: yaml.Node, key: str) -> float | None:
        """A share, None for `none`, or 0 for what could not be read."""
        text = self._text(node, key, "a percentage such as 95%, or none")
        if text is None:
            return 0
        if text.strip() == "none":
            return None
        try:
            quantity = parse_quantity(text)
        except BadInput:
            quantity = Quantity(value=0.0)
        low, high = _CONFIDENCE_RANGE
        if quantity.unit != "%" or not low <= quantity.value <= high:
            self._wrong(node, key, f"{text!r}: expected a percentage from {low:g}% to {high:g}%, or none")
            return 0
        return round(quantity.value / 100, 9)

    def _stages(
        self, node: yaml.Node | None, step: yaml.Node, key: str, move: Move, done: int
    ) -> tuple[str, ...] | None:
        left = STAGES[move][done:]
        if not left:
            return self._wrong(step, key, f"{move} is at its last stage already after an earlier step")
        if node is None:
            return left
        key = f"{key}.stages"
        items = self._list(node, key, f"a list of stages: {', '.join(left)}", len(STAGES[move]))
        if items is None:
            return None
        if not items:
            return self._wrong(node, key, f"is empty; expected some of: {', '.join(left)}")
        stages: list[str] = []
        for n, item in enumerate(items):
            text = self._text(item, f"{key}[{n}]", "a stage")
            if text is None:
                return None
            if text not in STAGES[move]:
                return self._wrong(
                    item,
                    f"{key}[{n}]",
                    f"{text!r} is not a stage of {move}{did_you_mean(text, STAGES[move])}; "
                    f"expected: {', '.join(left)}",
                )
            if text not in left or (stages and STAGES[move].index(text) <= STAGES[move].index(stages[-1])):
                return self._wrong(
                    item, f"{key}[{n}]", f"stages of {move} come in this order: {', '.join(STAGES[move])}"
                )
            stages.append(text)
        return tuple(stages)

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
                grows = _grows(before, after)
                if grows is not None and not grows:
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
        self._known(node, parts, _once(str(source), query_key, "must", "name", "at_least"), key)
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
        if _has_password(text):
            return self._wrong(node, key, "a plan holds no secrets: give the address without a password")
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", text):
            return self._wrong(node, key, f"{text!r}: expected an address such as http://127.0.0.1:9090")
        return text.rstrip("/")

    # -- values ----------------------------------------------------------------------------------------

    def _checked(self, parse: Callable[[str], T]) -> Callable[[yaml.Node, str], T | None]:
        """A reader of texts that `parse` understands; its BadInput becomes a problem of the place."""

        def read(node: yaml.Node, key: str) -> T | None:
            text = self._text(node, key, "a text")
            if text is None:
                return None
            try:
                return parse(text)
            except BadInput as exc:
                return self._wrong(node, key, str(exc))

        return read

    def _duration(self, node: yaml.Node, key: str) -> float | None:
        return self._checked(parse_duration)(node, key)

    def _positive(self, node: yaml.Node, key: str) -> float | None:
        seconds = self._duration(node, key)
        if seconds == 0:
            return self._wrong(node, key, "expected a duration above 0")
        return seconds

    def _bool(self, node: yaml.Node, key: str) -> bool | None:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":bool"):
            return str(node.value).lower() in ("true", "yes", "on")
        return self._wrong(node, key, "expected true or false")

    def _count(self, node: yaml.Node, key: str) -> int | None:
        if isinstance(node, yaml.ScalarNode) and re.fullmatch(r"[0-9]{1,9}", node.value):
            return int(node.value)
        return self._wrong(node, key, "expected a whole number")

    def _one_of(self, known: tuple[str, ...]) -> Callable[[yaml.Node, str], str | None]:
        def read(node: yaml.Node, key: str) -> str | None:
            text = self._text(node, key, f"one of: {', '.join(known)}")
            if text is not None and text not in known:
                return self._wrong(
                    node, key, f"{text!r}{did_you_mean(text, known)}; expected: {', '.join(known)}"
                )
            return text

        return read

    def _text(self, node: yaml.Node, key: str, expected: str) -> str | None:
        if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null"):
            return str(node.value)
        return self._wrong(node, key, f"expected {expected}")

    # -- shapes ----------------------------------------------------------------------------------------

    def _mapping(self, node: yaml.Node, key: str, expected: str) -> dict[str, yaml.Node] | None:
        if not isinstance(node, yaml.MappingNode):
            return self._wrong(node, key, f"expected {expected}")
        found: dict[str, yaml.Node] = {}
        for name, value in _pairs(node):
            if not isinstance(name, yaml.ScalarNode):
                self._wrong(name, key, "keys are plain words")
            elif name.value in found:
                self._wrong(name, _join(key, name.value), "is there twice")
            else:
                found[str(name.value)] = value
        return found

    def _list(self, node: yaml.Node, key: str, expected: str, most: int) -> list[yaml.Node] | None:
        if not isinstance(node, yaml.SequenceNode):
            return self._wrong(node, key, f"expected {expected}")
        if len(node.value) > most:
            return self._wrong(node, key, f"has {len(node.value)} entries; at most {most} are read")
        return list(node.value)

    def _known(
        self, node: yaml.Node, parts: Mapping[str, yaml.Node], known: tuple[str, ...], key: str
    ) -> None:
        assert isinstance(node, yaml.MappingNode)
        for name, _ in _pairs(node):
            if isinstance(name, yaml.ScalarNode) and name.value in parts and name.value not in known:
                self._wrong(
                    name,
                    _join(key, str(name.value)),
                    f"is not a key here{did_you_mean(str(name.value), known)}; known: {', '.join(known)}",
                )

    def _needed(
        self, node: yaml.Node, parts: Mapping[str, yaml.Node], needed: tuple[str, ...], key: str
    ) -> None:
        complained_of = {problem.key for problem in self.problems}
        for name in needed:
            # A key that looks like a misspelt one is complained of already, with the right spelling.
            others = (other for other in parts if _join(key, other) in complained_of)
            misspelt = any(repr(name) in did_you_mean(other, needed) for other in others)
            if name not in parts and not misspelt:
                self._wrong(node, _join(key, name), "is missing")

    def _get(
        self,
        parts: Mapping[str, yaml.Node],
        name: str,
        read: Callable[[yaml.Node, str], T | None],
        default: T | None = None,
        *,
        at: str = "",
    ) -> T | None:
        return read(parts[name], _join(at, name)) if name in parts else default

    def _wrong(self, node: yaml.Node, key: str, text: str) -> None:
        mark = node.start_mark
        self.problems.append(
            Problem(
                line=mark.line + 1 if mark else 1,
                column=mark.column + 1 if mark else 1,
                key=_short(key, 200),
                text=_short(text, 1000),
            )
        )


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    yield from node.value


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + " …"


def _once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _grows(before: Share, after: Share) -> bool | None:
    """Whether the second share is the larger; None when that depends on the fleet's size."""
    if before.devices is not None and after.devices is not None:
        return after.devices > before.devices
    if before.percent is not None and after.percent is not None:
        return after.percent > before.percent
    if before.percent == 100:
        return False
    return None


def _goes_further(before: Step, step: Step) -> str | None:
    last, own = before.waves[-1:], step.waves[-1:]
    if last and own and last != own and _grows(last[0], own[0]):
        return (
            f"goes up to {own[0]}, but the step before ends at {last[0]}: "
            "a device is moved in the order of the steps"
        )
    return None


def _has_password(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return bool(parts.password) or bool(re.search(r"[?&](password|token|secret)=", text, re.IGNORECASE))
    except ValueError:
        return "@" in text
