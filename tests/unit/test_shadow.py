"""The shadow's rules, case by case and as laws. The wording of the cases follows AWS's developer guide."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fleetlift.core.jsonvalue import Json, JsonObject
from fleetlift.core.shadow import (
    DEFAULT,
    STRICT,
    Body,
    Limits,
    Operation,
    Outcome,
    Shadow,
    ShadowKey,
    Suffix,
    delta,
    handle,
    replacing,
    same,
    update,
)
from fleetlift.core.shadow import Update as Request

KEY = ShadowKey("lamp")
NAMED = ShadowKey("lamp", "fleetlift")
T = 1_700_000_000.25


def plain(body: Body) -> Any:
    return msgspec.json.decode(msgspec.json.encode(body))


def send(
    shadow: Shadow | None,
    body: object,
    *,
    operation: Operation = Operation.UPDATE,
    now: float = T,
    key: ShadowKey = KEY,
    limits: Limits = DEFAULT,
) -> Outcome:
    payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return handle(operation, key, shadow, payload, now, limits)


def stored(*updates: object, now: float = T) -> Shadow:
    shadow: Shadow | None = None
    for body in updates:
        shadow = send(shadow, body, now=now).shadow or shadow
    assert shadow is not None
    return shadow


def read(shadow: Shadow | None, key: ShadowKey = KEY, payload: bytes = b"") -> Any:
    return plain(handle(Operation.GET, key, shadow, payload, T).answers[0].body)


def test_a_first_update_makes_the_shadow_at_version_1_and_answers_with_what_was_named() -> None:
    outcome = send(None, {"state": {"reported": {"led": "on"}}, "clientToken": "abc"})
    assert [answer.suffix for answer in outcome.answers] == [Suffix.UPDATE_ACCEPTED, Suffix.DOCUMENTS]
    assert plain(outcome.answers[0].body) == {
        "state": {"reported": {"led": "on"}},
        "metadata": {"reported": {"led": {"timestamp": 1_700_000_000}}},
        "version": 1,
        "timestamp": 1_700_000_000,
        "clientToken": "abc",
    }
    assert plain(outcome.answers[1].body) == {
        "current": {
            "state": {"reported": {"led": "on"}},
            "metadata": {"reported": {"led": {"timestamp": 1_700_000_000}}},
            "version": 1,
        },
        "timestamp": 1_700_000_000,
        "clientToken": "abc",
    }


def test_accepted_then_delta_then_documents() -> None:
    before = stored({"state": {"reported": {"led": "on", "hue": 3}}})
    outcome = send(before, {"state": {"desired": {"led": "off", "hue": 3.0}}}, now=T + 5)
    assert [answer.suffix for answer in outcome.answers] == [
        Suffix.UPDATE_ACCEPTED,
        Suffix.DELTA,
        Suffix.DOCUMENTS,
    ]
    assert plain(outcome.answers[1].body) == {
        "version": 2,
        "timestamp": 1_700_000_005,
        "state": {"led": "off"},
        "metadata": {"led": {"timestamp": 1_700_000_005}},
    }
    documents = plain(outcome.answers[2].body)
    assert documents["previous"]["version"] == 1
    assert documents["previous"]["state"] == {"reported": {"led": "on", "hue": 3}}
    assert documents["current"]["state"]["desired"] == {"led": "off", "hue": 3.0}


def test_the_delta_is_told_again_by_updates_that_do_not_touch_it() -> None:
    before = stored({"state": {"desired": {"led": "off"}}})
    outcome = send(before, {"state": {"reported": {"battery": 80}}})
    assert plain(outcome.answers[1].body)["state"] == {"led": "off"}


def test_get_shows_the_document_with_its_delta_and_leaves_out_empty_sections() -> None:
    assert read(stored({"state": {"desired": {"a": {"b": 1, "c": 2}}, "reported": {"a": {"b": 1}}}})) == {
        "state": {"desired": {"a": {"b": 1, "c": 2}}, "reported": {"a": {"b": 1}}, "delta": {"a": {"c": 2}}},
        "metadata": {
            "desired": {"a": {"b": {"timestamp": 1_700_000_000}, "c": {"timestamp": 1_700_000_000}}},
            "reported": {"a": {"b": {"timestamp": 1_700_000_000}}},
        },
        "version": 1,
        "timestamp": 1_700_000_000,
    }
    assert read(stored({"state": {"desired": {}}}))["state"] == {}


def test_a_null_removes_a_field_and_its_metadata_and_is_echoed_with_a_timestamp() -> None:
    before = stored({"state": {"reported": {"a": 1, "b": {"c": 1, "d": 2}}}})
    outcome = send(before, {"state": {"reported": {"a": None, "b": {"c": None}, "x": None}}})
    echo = plain(outcome.answers[0].body)
    assert echo["state"] == {"reported": {"a": None, "b": {"c": None}, "x": None}}
    assert echo["metadata"]["reported"]["a"] == {"timestamp": 1_700_000_000}
    after = read(outcome.shadow)
    assert after["state"] == {"reported": {"b": {"d": 2}}}
    assert after["metadata"] == {"reported": {"b": {"d": {"timestamp": 1_700_000_000}}}}


def test_the_last_field_takes_its_section_along() -> None:
    before = stored({"state": {"desired": {"a": 1}, "reported": {"a": 1}}})
    assert read(send(before, {"state": {"desired": {"a": None}}}).shadow)["state"] == {"reported": {"a": 1}}
    assert read(send(before, {"state": {"reported": None}}).shadow)["state"] == {
        "desired": {"a": 1},
        "delta": {"a": 1},
    }


def test_a_null_state_clears_both_sections_and_the_shadow_stays() -> None:
    outcome = send(stored({"state": {"desired": {"a": 1}, "reported": {"a": 2}}}), {"state": None})
    assert plain(outcome.answers[0].body) == {
        "state": None,
        "metadata": {"timestamp": 1_700_000_000},
        "version": 2,
        "timestamp": 1_700_000_000,
    }
    assert read(outcome.shadow) == {
        "state": {},
        "metadata": {},
        "version": 2,
        "timestamp": 1_700_000_000,
    }


def test_an_empty_object_is_a_value() -> None:
    outcome = send(None, {"state": {"desired": {"a": {}}}})
    assert plain(outcome.answers[1].body)["state"] == {"a": {}}


def test_arrays_are_replaced_as_a_whole_and_stamped_by_element() -> None:
    before = stored({"state": {"desired": {"a": [1, 2, 3]}, "reported": {"a": [1, 2]}}})
    outcome = send(before, {"state": {"desired": {"a": [1, {"b": 2}]}}})
    assert plain(outcome.answers[1].body)["state"] == {"a": [1, {"b": 2}]}
    assert plain(outcome.answers[1].body)["metadata"] == {
        "a": [{"timestamp": 1_700_000_000}, {"b": {"timestamp": 1_700_000_000}}]
    }


def test_metadata_keeps_the_time_a_field_was_last_named() -> None:
    before = stored({"state": {"reported": {"a": 1, "b": 2}}})
    after = read(send(before, {"state": {"reported": {"a": 1}}}, now=T + 9).shadow)
    assert after["metadata"]["reported"] == {
        "a": {"timestamp": 1_700_000_009},
        "b": {"timestamp": 1_700_000_000},
    }


def test_a_field_named_timestamp_or_of_another_kind_than_before_is_kept_apart() -> None:
    before = stored({"state": {"reported": {"timestamp": 1, "a": {"timestamp": 2}}}})
    after = read(send(before, {"state": {"reported": {"timestamp": {"x": 1}, "a": 5}}}).shadow)
    assert after["state"]["reported"] == {"timestamp": {"x": 1}, "a": 5}
    assert after["metadata"]["reported"] == {
        "timestamp": {"x": {"timestamp": 1_700_000_000}},
        "a": {"timestamp": 1_700_000_000},
    }


def test_true_is_not_1_and_1_is_1_point_0() -> None:
    shadow = stored({"state": {"desired": {"a": True, "b": 1}, "reported": {"a": 1, "b": 1.0}}})
    assert delta(shadow) == ({"a": True}, {"a": {"timestamp": 1_700_000_000}})


def test_nothing_but_desired_and_reported_is_stored() -> None:
    after = read(stored({"state": {"delta": {"x": 1}, "desired": {"a": 1}, "more": 2}, "extra": 3}))
    assert after["state"] == {"desired": {"a": 1}, "delta": {"a": 1}}


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"{", 400, "Invalid JSON"),
        (b'"state"', 400, "Invalid JSON"),
        (b'{"state":{"desired":{"a":"\x01"}}}', 400, "Invalid JSON"),
        (
            b'{"state":{"desired":{"a":"\xff"}}}',
            415,
            "Unsupported documented encoding; supported encoding is UTF-8",
        ),
        (b"[" * 100_000, 400, "JSON contains too many levels of nesting; maximum is 6"),
        ({}, 400, "Missing required node: state"),
        ({"state": 3}, 400, "State node must be an object"),
        ({"state": []}, 400, "State node must be an object"),
        ({"state": {"desired": 3}}, 400, "Desired node must be an object"),
        ({"state": {"reported": []}}, 400, "Reported node must be an object"),
        ({"state": {}, "version": "1"}, 400, "Invalid version"),
        ({"state": {}, "version": True}, 400, "Invalid version"),
        ({"state": {}, "clientToken": "t" * 65}, 400, "Invalid clientToken"),
        ({"state": {}, "clientToken": 5}, 400, "Invalid clientToken"),
        ({"state": {"desired": {"a": [1, None]}}}, 400, "State contains an invalid node"),
        ({"state": {"desired": {"a": [{"b": None}]}}}, 400, "State contains an invalid node"),
        ({"state": {"desired": {"a": "x" * 70_000}}}, 413, "The payload exceeds the maximum size allowed"),
        (b" " * 300_000, 413, "The payload exceeds the maximum size allowed"),
    ],
)
def test_a_request_that_cannot_be_used_is_answered_with_aws_s_error(
    body: object, code: int, message: str
) -> None:
    outcome = send(stored({"state": {"reported": {"a": 1}}}), body)
    assert outcome.shadow is None
    (answer,) = outcome.answers
    assert answer.suffix is Suffix.UPDATE_REJECTED
    assert plain(answer.body) == {"code": code, "message": message, "timestamp": 1_700_000_000}


def test_an_error_carries_the_client_token() -> None:
    outcome = send(None, {"state": {"desired": 1}, "clientToken": "t1"})
    assert plain(outcome.answers[0].body)["clientToken"] == "t1"


def test_an_update_based_on_another_version_conflicts_and_changes_nothing() -> None:
    shadow = stored({"state": {"reported": {"a": 1}}})
    outcome = send(shadow, {"state": {"reported": {"a": 2}}, "version": 2, "clientToken": "t"})
    assert outcome.shadow is None
    assert plain(outcome.answers[0].body) == {
        "code": 409,
        "message": "Version conflict",
        "timestamp": 1_700_000_000,
        "clientToken": "t",
    }
    assert send(shadow, {"state": {"reported": {"a": 2}}, "version": 1}).shadow is not None
    assert send(None, {"state": {}, "version": 1}).shadow is None
    assert send(None, {"state": {}, "version": 0}).shadow is not None


@pytest.mark.parametrize("operation", [Operation.GET, Operation.DELETE])
def test_a_missing_shadow_is_told_in_exactly_the_words_firmware_compares(operation: Operation) -> None:
    outcome = send(None, b"", operation=operation)
    assert plain(outcome.answers[0].body) == {"code": 404, "message": "No shadow exists with name: 'lamp'"}
    named = send(None, {"clientToken": "t"}, operation=operation, key=NAMED)
    assert plain(named.answers[0].body) == {
        "code": 404,
        "message": "No shadow exists with name: 'lamp~fleetlift'",
        "clientToken": "t",
    }


def test_a_deleted_shadow_is_gone_but_its_numbering_goes_on_for_48_hours() -> None:
    shadow = stored({"state": {"reported": {"a": 1}}}, {"state": {"reported": {"a": 2}}})
    outcome = send(shadow, b'{"clientToken":"d"}', operation=Operation.DELETE)
    assert plain(outcome.answers[0].body) == {"version": 2, "timestamp": 1_700_000_000, "clientToken": "d"}
    gone = outcome.shadow
    assert read(gone)["code"] == 404
    assert send(gone, b"", operation=Operation.DELETE).shadow is None
    again = send(gone, {"state": {"desired": {"b": 1}}}, now=T + 3600)
    assert again.shadow is not None and again.shadow.version == 3
    assert "previous" not in plain(again.answers[-1].body)
    later = send(gone, {"state": {"desired": {"b": 1}}}, now=T + 49 * 3600)
    assert later.shadow is not None and later.shadow.version == 1


def test_size_counts_both_sections_after_the_merge_and_not_the_metadata() -> None:
    limits = Limits(state_bytes=100)
    shadow = send(None, {"state": {"desired": {"a": "x" * 70}}}, limits=limits).shadow
    assert shadow is not None
    too_much = send(shadow, {"state": {"reported": {"b": "x" * 30}}}, limits=limits)
    assert plain(too_much.answers[0].body)["code"] == 413
    assert send(shadow, {"state": {"desired": {"a": "y" * 70}}}, limits=limits).shadow is not None


def test_depth_counts_from_the_children_of_a_section() -> None:
    two = Limits(depth=2)
    assert send(None, {"state": {"desired": {"a": {"b": 1}}}}, limits=two).shadow is not None
    assert send(None, {"state": {"desired": {"a": {"b": {"c": 1}}}}}, limits=two).shadow is None


def test_strict_limits_are_aws_s() -> None:
    assert send(None, {"state": {"desired": {"a": "x" * 9_000}}}, limits=STRICT).shadow is None
    assert send(None, {"state": {"desired": {"a": "x" * 9_000}}}).shadow is not None


# -- laws ----------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "timestamp"])
LEAVES = st.one_of(st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.text("xyz", max_size=2))
VALUES: st.SearchStrategy[Json] = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


def with_nulls(values: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.recursive(
        values | st.none(), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
    )


PATCHES = st.dictionaries(NAMES, with_nulls(VALUES), max_size=4)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=4)


def changed(shadow: Shadow | None, **sections: Any) -> Shadow:
    after = update(shadow, Request(**sections), T).shadow
    assert after is not None
    return after


@given(PATCHES, PATCHES)
def test_applying_a_patch_twice_is_applying_it_once(first: JsonObject, patch: JsonObject) -> None:
    once = changed(changed(None, desired=first), desired=patch)
    twice = changed(once, desired=patch)
    assert (twice.desired, twice.desired_meta) == (once.desired, once.desired_meta)
    assert twice.version == once.version + 1


@given(DOCUMENTS, PATCHES)
def test_an_update_leaves_its_request_and_the_shadow_before_as_they_were(
    document: JsonObject, patch: JsonObject
) -> None:
    before = changed(None, desired=document, reported=document)
    kept = (msgspec.json.encode(before), msgspec.json.encode(patch))
    changed(before, desired=patch)
    assert (msgspec.json.encode(before), msgspec.json.encode(patch)) == kept


def paths(value: Json, here: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return {path for key, inner in value.items() for path in paths(inner, (*here, key))}
    return {here}


@given(DOCUMENTS, PATCHES)
def test_metadata_has_the_state_s_tree(document: JsonObject, patch: JsonObject) -> None:
    def alike(state: Json, meta: Json) -> bool:
        if isinstance(state, dict):
            return (
                isinstance(meta, dict)
                and state.keys() == meta.keys()
                and all(alike(state[key], meta[key]) for key in state)
            )
        if isinstance(state, list):
            return isinstance(meta, list) and len(state) == len(meta) and all(map(alike, state, meta))
        return meta == {"timestamp": 1_700_000_000}

    after = changed(changed(None, desired=document), desired=patch)
    assert (after.desired is None) == (after.desired_meta is None)
    assert after.desired is None or alike(after.desired, after.desired_meta)


@given(DOCUMENTS, DOCUMENTS)
def test_a_device_that_reports_its_delta_has_none_left(desired: JsonObject, reported: JsonObject) -> None:
    """The delta is exactly what the device lacks: once reported, it is empty; nothing smaller would do."""
    shadow = changed(None, desired=desired, reported=reported)
    lacking = delta(shadow)
    if lacking is None:
        assert all(key in reported for key in desired)
        return
    assert delta(changed(shadow, reported=lacking[0])) is None
    for path in paths(lacking[0]):
        wanted, had = _at(desired, path), _at(reported, path)
        assert had is None or not same(wanted, had)


def _at(value: Json, path: tuple[str, ...]) -> Json:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


@given(DOCUMENTS, DOCUMENTS)
def test_a_replacing_patch_makes_a_section_exactly_what_is_wanted(
    held: JsonObject, wanted: JsonObject
) -> None:
    shadow = changed(None, desired=held)
    after = changed(shadow, desired=replacing(shadow.desired, wanted))
    assert same(after.desired or {}, wanted)


class ShadowMachine(RuleBasedStateMachine):
    """A shadow against two flat dictionaries and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow: Shadow | None = None
        self.sections: dict[str, dict[str, Json]] = {"desired": {}, "reported": {}}
        self.version = 0
        self.exists = False

    @rule(section=st.sampled_from(["desired", "reported"]), key=NAMES, value=LEAVES | st.none())
    def write(self, section: str, key: str, value: Json) -> None:
        outcome = send(self.shadow, {"state": {section: {key: value}}})
        assert outcome.shadow is not None
        self.shadow, self.exists = outcome.shadow, True
        self.version += 1
        if value is None:
            self.sections[section].pop(key, None)
        else:
            self.sections[section][key] = value
        suffixes = [answer.suffix for answer in outcome.answers]
        assert suffixes[0] is Suffix.UPDATE_ACCEPTED and suffixes[-1] is Suffix.DOCUMENTS
        assert (Suffix.DELTA in suffixes) == bool(self._lacking())

    @rule(off_by=st.sampled_from([-1, 1, 7]))
    def write_on_a_wrong_version(self, off_by: int) -> None:
        current = self.version if self.exists else 0
        if current + off_by >= 0:
            outcome = send(self.shadow, {"state": {"desired": {"a": 9}}, "version": current + off_by})
            assert outcome.shadow is None and outcome.refused is not None and outcome.refused.code == 409

    @rule()
    def clear(self) -> None:
        self.shadow = send(self.shadow, {"state": None}).shadow
        self.sections, self.exists = {"desired": {}, "reported": {}}, True
        self.version += 1

    @rule()
    def remove(self) -> None:
        outcome = send(self.shadow, b"", operation=Operation.DELETE)
        assert (outcome.shadow is not None) == self.exists
        self.shadow = outcome.shadow or self.shadow
        self.sections, self.exists = {"desired": {}, "reported": {}}, False

    def _lacking(self) -> dict[str, Json]:
        reported = self.sections["reported"]
        return {
            key: value
            for key, value in self.sections["desired"].items()
            if key not in reported or not same(reported[key], value)
        }

    @invariant()
    def a_reader_sees_the_model(self) -> None:
        seen = read(self.shadow)
        if not self.exists:
            assert seen["code"] == 404
            return
        expected: dict[str, Any] = {name: held for name, held in self.sections.items() if held}
        if lacking := self._lacking():
            expected["delta"] = lacking
        assert same(seen["state"], expected)
        assert seen["version"] == self.version


ShadowMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestShadowAgainstItsModel = ShadowMachine.TestCase
