"""Plan files: what is read, and what is refused with its line."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.orders import CommandsFlag, Flags, LinkFlag, TelemetryFlag
from fleetlift.core.plan import Move, OnBreach, Plan, check_amendment, gates_of, ladder
from fleetlift.core.units import Share
from fleetlift.migrate import planfile
from fleetlift.migrate.plan_reader import BadPlan
from fleetlift.migrate.planfile import load_plan, parse_plan

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
EXAMPLE = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]

HEAD = """\
migration: m
fleet: {tenant: carshare}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
steps:
"""
STEP = "  - {move: telemetry, waves: [100%], bake: 1s}\n"


def step(inside: str) -> str:
    return f"  - {{move: telemetry, bake: 1s, {inside}}}\n"


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(BadPlan) as caught:
        parse_plan(text)
    return [(p.line, p.key, p.text) for p in caught.value.problems]


def one_problem(text: str) -> tuple[int, str, str]:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


# -- what is read --------------------------------------------------------------------------------------


def test_the_example_of_the_manual_is_a_plan() -> None:
    plan = parse_plan(EXAMPLE)
    assert plan.name == "connect-to-fleetlift"
    assert plan.fleet.where == "attributes.hardware >= 3"
    assert (plan.old.kind, plan.old.address) == ("legacy", "tcp://127.0.0.1:7700")
    assert plan.on_breach is OnBreach.REVERT
    assert [step.move for step in plan.steps] == [Move.TELEMETRY, Move.COMMANDS, Move.LINK]
    assert plan.steps[0].waves[:2] == (Share(devices=10), Share(percent=1.0))
    assert [step.bake_s for step in plan.steps] == [7200, 3600, 86400]


def test_every_stage_of_every_step_is_a_rung() -> None:
    rungs = ladder(parse_plan(EXAMPLE))
    assert [rung.name for rung in rungs] == [
        "old side",
        "telemetry: both",
        "telemetry: new",
        "commands: dry-run",
        "commands: both",
        "commands: new",
        "link: new",
    ]
    assert rungs[0].flags == Flags()
    assert rungs[3].flags == Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.DRY_RUN)
    assert rungs[6].flags == Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
    assert all(gate.text == "moves.success >= 95%" for gate in (rung.gates[-1] for rung in rungs[1:]))


def test_a_steps_own_gate_on_moves_replaces_the_built_in_one() -> None:
    plan = parse_plan(HEAD + step("waves: [100%], gates: [moves.success >= 50%]"))
    assert [gate.text for gate in gates_of(plan)] == ["moves.success >= 50%"]


def test_times_at_the_top_hold_for_all_steps_unless_a_step_has_its_own() -> None:
    text = (
        "settle: 5s\nbake: 10s\napprove: true\n"
        + HEAD
        + (
            "  - {move: telemetry, waves: [100%]}\n"
            "  - {move: commands, waves: [100%], settle: 7s, approve: false}\n"
        )
    )
    first, second = parse_plan(text).steps
    assert (first.settle_s, first.bake_s, first.approve) == (5, 10, True)
    assert (second.settle_s, second.bake_s, second.approve) == (7, 10, False)


def test_no_data_after_is_the_bake_but_a_minute_at_least() -> None:
    def rung(more: str) -> float:
        return ladder(parse_plan(HEAD + f"  - {{move: telemetry, waves: [100%], {more}}}\n"))[
            1
        ].no_data_after_s

    assert rung("bake: 2h") == 7200
    assert rung("bake: 5s") == 60
    assert rung("bake: 5s, no_data_after: 10s") == 10


def test_stages_of_one_capability_may_be_spread_over_steps() -> None:
    plan = parse_plan(
        HEAD
        + "  - {move: telemetry, stages: [both], waves: [100%], bake: 1s}\n"
        + "  - {move: commands, waves: [100%], bake: 1s}\n"
        + "  - {move: telemetry, waves: [100%], bake: 1s}\n"
    )
    assert [rung.stage for rung in ladder(plan)] == ["old", "both", "dry-run", "both", "new", "new"]


def test_free_queries_are_gates_too() -> None:
    plan = parse_plan(
        HEAD
        + "  - move: telemetry\n    waves: [100%]\n    bake: 1s\n    gates:\n"
        + '      - {sql: "SELECT count(*) FROM dead_letter", must: "<= 5", name: dead letters}\n'
        + '      - {prometheus: "http://127.0.0.1:9090/", query: up, must: ">= 1", at_least: 1}\n'
        + "      - {gate: commands.agreement >= 99%, at_least: 50}\n"
    )
    sql, prometheus, agreement = plan.steps[0].gates
    assert sql.text == "dead letters <= 5"
    assert (prometheus.url, prometheus.query, prometheus.at_least) == ("http://127.0.0.1:9090", "up", 1)
    assert agreement.at_least == 50


def test_a_last_wave_below_the_whole_fleet_is_meant() -> None:
    assert parse_plan(HEAD + step("waves: [10%, 30%]")).steps[0].waves[-1].percent == 30


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "says"),
    [
        (HEAD.replace("tenant:", "tenat:") + STEP, 2, "fleet.tenat", "did you mean 'tenant'?"),
        ("lever: dns\n" + HEAD + STEP, 1, "lever", "expected: flag"),
        ("on_breach: ignore\n" + HEAD + STEP, 1, "on_breach", "expected: revert, hold"),
        ("bakes: 3s\n" + HEAD + STEP, 1, "bakes", "did you mean 'bake'?"),
        ("settle: 0s\n" + HEAD + STEP, 1, "settle", "above 0"),
        ("approve: maybe\n" + HEAD + STEP, 1, "approve", "expected true or false"),
        (HEAD + "  []\n", 6, "steps", "at least one step"),
        (
            HEAD + "  - {move: telemetri, waves: [100%], bake: 1s}\n",
            6,
            "steps[0].move",
            "did you mean 'telemetry'",
        ),
        (HEAD + "  - {copy: tenant data}\n", 6, "steps[0].copy", "is not a step kind of a fleet migration"),
        (HEAD + "  - {drain: old}\n", 6, "steps[0].drain", "is not a step kind of a fleet migration"),
        (
            HEAD + step("waves: [5%, 5%]"),
            6,
            "steps[0].waves[1]",
            "waves must grow",
        ),
        (
            HEAD + step("waves: [5%, 110%]"),
            6,
            "steps[0].waves[1]",
            "100% is the most",
        ),
        (HEAD + step("waves: [0%]"), 6, "steps[0].waves[0]", "moves nothing"),
        (
            HEAD + step("waves: [100%, 5 devices]"),
            6,
            "steps[0].waves[1]",
            "must grow",
        ),
        (HEAD + step("waves: []"), 6, "steps[0].waves", "is empty"),
        (HEAD + "  - {move: telemetry, waves: [100%]}\n", 6, "steps[0]", "bake is missing"),
        (HEAD + "  - {move: telemetry, waves: [100%], bake: 5}\n", 6, "steps[0].bake", "as in 5s"),
        (HEAD + step("waves: 100%"), 6, "steps[0].waves", "a list of shares"),
        (
            HEAD + "  - {move: telemetry, stages: [new, both], waves: [100%], bake: 1s}\n",
            6,
            "steps[0].stages[1]",
            "come in this order: both, new",
        ),
        (
            HEAD + "  - {move: telemetry, stages: [dry-run], waves: [100%], bake: 1s}\n",
            6,
            "steps[0].stages[0]",
            "is not a stage of telemetry",
        ),
        (HEAD + STEP + STEP, 7, "steps[1]", "at its last stage already"),
        (HEAD + "  - {move: link, waves: [100%], bake: 1s}\n", 6, "steps[0]", "can be closed only after"),
        (
            HEAD + step("waves: [50%]") + "  - {move: commands, bake: 1s, waves: [60%]}\n",
            7,
            "steps[1].waves",
            "the step before ends at 50%",
        ),
        (
            HEAD + step("waves: [100%], gates: [telemetry.complete >= 1%]"),
            6,
            "steps[0].gates[0]",
            "is not a metric",
        ),
        (
            HEAD + step("waves: [100%], gates: [devices.silent == 0, devices.silent == 0]"),
            6,
            "steps[0].gates[1]",
            "there twice",
        ),
        (
            HEAD + '  - {move: telemetry, waves: [100%], bake: 1s, gates: [{sql: "SELECT 1"}]}\n',
            6,
            "steps[0].gates[0].must",
            "is missing",
        ),
        (
            HEAD.replace("tenant: carshare", 'tenant: carshare, where: "attributes.x >"') + STEP,
            2,
            "fleet.where",
            "column",
        ),
        (HEAD.replace("carshare", "Car Share") + STEP, 2, "fleet.tenant", "lower-case letters"),
        (
            HEAD.replace("carshare", "carshare, canaries: [a, a]") + STEP,
            2,
            "fleet.canaries[1]",
            "listed twice",
        ),
        (HEAD.replace("carshare", "carshare, canaries: [a b]") + STEP, 2, "fleet.canaries[0]", "device id"),
        (HEAD.replace("legacy", "legcy") + STEP, 3, "from.legcy", "did you mean 'legacy'?"),
        (HEAD.replace("migration: m", "migration: 'a/b'") + STEP, 1, "migration", "letters, digits"),
        (HEAD + STEP + "lever: flag\nlever: flag\n", 8, "lever", "is there twice"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_was_expected(
    text: str, line: int, key: str, says: str
) -> None:
    found_line, found_key, found_text = one_problem(text)
    assert (found_line, found_key) == (line, key)
    assert says in found_text


def test_all_mistakes_of_a_file_are_told_at_once() -> None:
    text = HEAD.replace("tenant: carshare", "tenat: x") + (
        "  - move: telemetri\n    waves: [5, 0%]\n    bake: 5\n    gates: [nonsense]\n"
    )
    assert [line for line, _, _ in problems(text)] == [2, 6, 7, 7, 8, 9]


def test_a_wrong_bake_at_the_top_is_one_mistake() -> None:
    """The steps that would have had it are not said to lack theirs."""
    step = "  - {move: telemetry, waves: [100%]}\n"
    found = problems("bake: 5\n" + HEAD + step)
    assert [key for _, key, _ in found] == ["bake"]


def test_the_text_of_the_error_can_be_clicked_on() -> None:
    with pytest.raises(BadPlan) as caught:
        parse_plan(HEAD + step("waves: [0%]"), file="fleet/plan.yaml")
    assert str(caught.value).startswith("fleet/plan.yaml:6:41: steps[0].waves[0]: ")


@pytest.mark.parametrize("needed", ["migration", "fleet", "from", "to", "steps"])
def test_what_is_missing_is_named(needed: str) -> None:
    text = re.sub(rf"^{needed}:.*\n", "", HEAD + STEP, flags=re.MULTILINE)
    text = text.replace(STEP, "") if needed == "steps" else text
    assert (1, needed, "is missing") in problems(text)


@pytest.mark.parametrize(
    "old",
    [
        '{legacy: "tcp://ana:hunter2@127.0.0.1:7700"}',
        '{legacy: "tcp://127.0.0.1:7700?password=hunter2"}',
        '{legacy: "tcp://127.0.0.1:7700", token: hunter2}',
        '{legacy: "tcp://127.0.0.1:7700", owner_secret: hunter2}',
    ],
)
def test_a_plan_holds_no_secrets_and_the_refusal_does_not_repeat_them(old: str) -> None:
    line, _, text = one_problem(re.sub("^from:.*$", f"from: {old}", HEAD, flags=re.MULTILINE) + STEP)
    assert line == 3
    assert "environment variable" in text and "hunter2" not in text


def test_a_secret_may_be_named_by_variable_or_file() -> None:
    old = '{legacy: "tcp://127.0.0.1:7700", key_file: owner.key, token_env: LEGACY_TOKEN}'
    plan = parse_plan(re.sub("^from:.*$", f"from: {old}", HEAD, flags=re.MULTILINE) + STEP)
    assert plan.old.options == {"key_file": "owner.key", "token_env": "LEGACY_TOKEN"}


def test_references_are_refused_before_they_can_grow() -> None:
    _, _, text = one_problem("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    assert "references" in text


NO_PLANS = {
    "empty": "",
    "comment": "# nothing\n",
    "list": "[]",
    "words": "just words",
    "open": "a: [",
    "tab": "\t- x",
    "two colons": "a: b: c",
    "version": "%YAML 9" + "9" * 5000 + "\n--- a",
    "escape": '"\\U99999999"',
    "nul": "a\0b",
    "two documents": "--- a\n--- b\n",
    "deep": "[" * 50_000,
    "long": "x" * 300_000,
}


@pytest.mark.parametrize("text", NO_PLANS.values(), ids=NO_PLANS.keys())
def test_what_is_no_plan_at_all_is_refused_kindly(text: str) -> None:
    with pytest.raises(BadPlan):
        parse_plan(text)


def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="plan cannot be read"):
        load_plan(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        load_plan(tmp_path / "binary.yaml")
    (tmp_path / "plan.yaml").write_text(EXAMPLE)
    assert load_plan(tmp_path / "plan.yaml") == parse_plan(EXAMPLE)


KEYS = (*planfile._TOP, *planfile._STEP, "tenant", "where", "canaries", "legacy", "fleetlift", "sql", "must")
VALUES = ("5%", "10 devices", "2h", "true", "telemetry", "both", "new", "devices.silent == 0", "null", "12")
WORDS = st.sampled_from([*KEYS, *VALUES])
TREES = st.recursive(
    WORDS | st.text(max_size=8) | st.integers() | st.none() | st.booleans() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=6),
    max_leaves=25,
)


@settings(deadline=None)
@given(TREES)
def test_any_yaml_is_a_plan_or_refused(tree: object) -> None:
    try:
        assert isinstance(parse_plan(yaml.safe_dump(tree, sort_keys=False)), Plan)
    except BadPlan as refused:
        assert refused.problems


@settings(deadline=None)
@given(st.text(max_size=200) | st.text("{}[]:,-#&*!|>'\"%@`? \n\tab", max_size=80))
def test_any_text_is_a_plan_or_refused(text: str) -> None:
    try:
        parse_plan(text)
    except BadPlan as refused:
        assert refused.problems


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_plan_with_one_place_spoilt_is_a_plan_or_refused(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(EXAMPLE) - 1))
    cut = data.draw(st.integers(0, 12))
    put = data.draw(st.text("{}[]:,-%0 \nabx", max_size=5))
    try:
        parse_plan(EXAMPLE[:at] + put + EXAMPLE[at + cut :])
    except BadPlan as refused:
        assert refused.problems


# -- amendments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attributes.hardware >= 3", "attributes.hardware >= 4"),
        ("waves: [10 devices, 1%,", "waves: [5 devices, 1%,"),
        ("bake: 2h", "bake: 4h"),
        ("  - move: link                             # close the connection to the old side\n"
         "    waves: [5%, 50%, 100%]\n    bake: 1d\n", ""),
    ],
    ids=["fleet", "waves", "times", "a later step"],
)  # fmt: skip
def test_what_may_be_amended(old: str, new: str) -> None:
    assert old in EXAMPLE
    check_amendment(parse_plan(EXAMPLE), parse_plan(EXAMPLE.replace(old, new)), rung=3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("migration: connect-to-fleetlift", "migration: other", "name"),
        ("tenant: carshare", "tenant: other", "tenant"),
        ("127.0.0.1:7700", "127.0.0.1:7701", "old side"),
        ("stages: [dry-run, both, new]", "stages: [both, new]", "steps and stages"),
    ],
)
def test_what_may_not_be_amended(old: str, new: str, says: str) -> None:
    with pytest.raises(Conflict, match=says):
        check_amendment(parse_plan(EXAMPLE), parse_plan(EXAMPLE.replace(old, new)), rung=3)


def test_what_may_differ_is_read_and_what_makes_no_sense_is_refused_with_its_line() -> None:
    text = (
        HEAD.replace("steps:", 'parity: {server_time: ignore, "position gps.*": 0.5, speed: 1%}\nsteps:')
        + STEP
    )
    assert [rule.text for rule in parse_plan(text).parity] == [
        "server_time: ignore",
        "position gps.*: 0.5",
        "speed: 1%",
    ]
    line, key, says = one_problem(text.replace("1%", "often"))
    assert (line, key) == (5, "parity.speed")
    assert "expected 'ignore'" in says


SURE = HEAD + "  - {move: telemetry, waves: [100%], bake: 1s, gates: [telemetry.delay.p95 <= 1.2 x old]}\n"


@pytest.mark.parametrize(
    ("said", "confidence"),
    [("", 0.95), ("confidence: 99%\n", 0.99), ("confidence: 99.9%\n", 0.999), ("confidence: none\n", None)],
)
def test_sampled_gates_are_as_sure_as_the_plan_asks(said: str, confidence: float | None) -> None:
    """Counted figures are what they are, and need no confidence."""
    delay, success = ladder(parse_plan(SURE.replace("steps:", said + "steps:")))[1].gates
    assert (delay.confidence, success.confidence) == (confidence, None)


def test_a_steps_own_confidence_wins() -> None:
    text = SURE.replace("steps:", "confidence: 99%\nsteps:").replace("bake: 1s", "bake: 1s, confidence: none")
    assert parse_plan(text).steps[0].confidence is None


@pytest.mark.parametrize("said", ["0.95", "95", "40%", "100%", "high", "0%"])
def test_a_confidence_is_a_percentage_or_none(said: str) -> None:
    _, key, says = one_problem(SURE.replace("steps:", f"confidence: {said}\nsteps:"))
    assert key == "confidence" and "expected a percentage from 50% to 99.9999%, or none" in says


def test_a_control_is_a_share_of_the_fleet_and_not_most_of_it() -> None:
    def with_control(share: str) -> str:
        return SURE.replace("fleet: {tenant: ", f"fleet: {{control: {share}, tenant: ")

    control = parse_plan(with_control("10 devices")).fleet.control
    assert control is not None and control.devices == 10
    assert one_problem(with_control("60%"))[1:] == (
        "fleet.control",
        "60% leaves too few devices for the waves before the last: 50% is the most",
    )


# -- the page ------------------------------------------------------------------------------------------


def test_the_page_on_plans_lists_every_key() -> None:
    for key in {*planfile._TOP, *planfile._STEP, "tenant", "where", "updatable", "canaries", "control"}:
        assert f"`{key}`" in PAGE, key


@pytest.mark.parametrize("missing", ["migration", "fleet", "from", "to", "steps"])
def test_a_missing_key_is_told_though_another_one_sounds_like_it(missing: str) -> None:
    """`lever` is near enough to `fleet` to be taken for its misspelling, and is a key of its own."""
    lines = {
        "migration": "migration: m",
        "fleet": "fleet: {tenant: t}",
        "from": 'from: {legacy: "tcp://127.0.0.1:1"}',
        "to": "to: {fleetlift: default}",
        "lever": "lever: flag",
        "steps": "steps: [{move: telemetry, waves: [100%], bake: 1s}]",
    }
    text = "\n".join(line for key, line in lines.items() if key != missing)
    with pytest.raises(BadPlan) as caught:
        parse_plan(text, side_kinds=("legacy", "fleetlift"))
    assert [(p.key, p.text) for p in caught.value.problems] == [(missing, "is missing")]
