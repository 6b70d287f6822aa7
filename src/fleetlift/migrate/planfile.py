"""The plan file: YAML text in, a `Plan` out, or every mistake in it with file, line and what was expected.

`docs/plan.md` lists every key; `yamlfile.py` reads the tree.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import yaml

from fleetlift.core import where
from fleetlift.core.errors import BadInput
from fleetlift.core.gates import Gate, did_you_mean
from fleetlift.core.identity import checked_device_id, checked_tenant_id
from fleetlift.core.metrics import OF_LOAD
from fleetlift.core.parity import Rule, parse_rule
from fleetlift.core.plan import CONFIDENCE, STAGES, Fleet, Move, OnBreach, Plan, Step
from fleetlift.core.units import Quantity, Share, parse_quantity, parse_share
from fleetlift.migrate.plan_reader import NO_GATES, BadPlan, PlanReader, grows
from fleetlift.sides.open import side_kinds as installed_sides
from fleetlift.yamlfile import compose, join, read_text

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
_STEPS_MAX, _CANARIES_MAX, _RULES_MAX = 100, 10_000, 200
_CONTROL_MOST: Final = 50.0
_CONFIDENCE_RANGE: Final = (50.0, 99.9999)
_NO_CANARIES: tuple[str, ...] = ()


def load_plan(path: Path) -> Plan:
    """The plan in a file. Raises BadInput (also when the file cannot be read)."""
    return parse_plan(read_text(path, "plan"), file=str(path))


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
    root = compose(text, file, what="plan", shown_in="docs/plan.md", bad=BadPlan)
    reader = _Reader(side_kinds=kinds, levers=tuple(levers))
    plan = reader.plan(root)
    if reader.problems or plan is None:
        raise BadPlan(file, reader.problems)
    return plan


class _Reader(PlanReader):
    """Reads the plan of a fleet's migration."""

    def __init__(self, *, side_kinds: tuple[str, ...], levers: tuple[str, ...]) -> None:
        super().__init__(side_kinds=side_kinds)
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
            self._checked(partial(parse_rule, field))(value, join(key, field))
            for field, value in parts.items()
        ]
        return tuple(rule for rule in rules if rule is not None)

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
        gates = self._get(parts, "gates", self._gates, NO_GATES, at=key)
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
                if name in parts and (share := self._confidence(parts[name], join(key, name))) != 0:
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

    def _gate(self, node: yaml.Node, key: str) -> Gate | None:
        gate = self._any_gate(node, key)
        if gate is not None and gate.metric.startswith(OF_LOAD):
            return self._wrong(
                node, key, f"{gate.metric} is measured by a load test, not of a fleet that moves"
            )
        return gate


def _goes_further(before: Step, step: Step) -> str | None:
    last, own = before.waves[-1:], step.waves[-1:]
    if last and own and last != own and grows(last[0], own[0]):
        return (
            f"goes up to {own[0]}, but the step before ends at {last[0]}: "
            "a device is moved in the order of the steps"
        )
    return None
