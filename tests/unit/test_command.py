"""A command's paths and the one status its caller sees."""

import contextlib
from itertools import product
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.command import (
    BROUGHT_BY,
    EXPIRES_IN_S_MAX,
    FINAL,
    MOVES,
    OPEN,
    BadResponse,
    Mode,
    Path,
    PathState,
    PathStatus,
    Reported,
    ResponseError,
    Status,
    checked_expiry,
    checked_name,
    checked_params,
    close,
    paths_for,
    read_response,
    record,
    reported,
    resolve,
    retry_due,
    storable,
    uuid7,
)
from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.jsonvalue import JsonObject
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag
from fleetlift.device.links import response
from fleetlift.device.messages import AnswerStatus

P = PathStatus


def new(status: PathStatus = P.SENT, mode: Mode = Mode.EXECUTE) -> PathState:
    return PathState(path=Path.NEW, mode=mode, status=status, sent_at=10.0)


def old(status: PathStatus = P.SENT, mode: Mode = Mode.EXECUTE) -> PathState:
    return PathState(path=Path.OLD, mode=mode, status=status, sent_at=10.0)


# -- which paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "paths"),
    [
        (None, ((Path.NEW, Mode.EXECUTE),)),
        (CommandsFlag.NEW, ((Path.NEW, Mode.EXECUTE),)),
        (CommandsFlag.OLD, ((Path.OLD, Mode.EXECUTE),)),
        (CommandsFlag.DRY_RUN, ((Path.OLD, Mode.EXECUTE), (Path.NEW, Mode.DRY_RUN))),
        (CommandsFlag.BOTH, ((Path.OLD, Mode.EXECUTE), (Path.NEW, Mode.EXECUTE))),
    ],
)
def test_the_migration_names_the_paths(
    route: CommandsFlag | None, paths: tuple[tuple[Path, Mode], ...]
) -> None:
    assert paths_for(route, Mode.EXECUTE) == paths
    assert all(mode is Mode.DRY_RUN for _, mode in paths_for(route, Mode.DRY_RUN))
    assert paths_for(route, Mode.EXECUTE, PROBE_COMMAND) == ((Path.NEW, Mode.EXECUTE),)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("route", [None, *CommandsFlag])
def test_after_a_release_no_command_goes_by_the_old_side(route: CommandsFlag | None, mode: Mode) -> None:
    by_old = route in (CommandsFlag.OLD, CommandsFlag.DRY_RUN)
    assert paths_for(route, mode, released=True) == (() if by_old else ((Path.NEW, mode),))


# -- what a device says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "becomes"),
    [
        ("IN_PROGRESS", "", P.ACKNOWLEDGED),
        ("SUCCEEDED", "", P.SUCCEEDED),
        ("SUCCEEDED", "WOULD_EXECUTE", P.WOULD_EXECUTE),
        ("FAILED", "DOOR_OPEN", P.FAILED),
        ("REJECTED", "UNSUPPORTED", P.FAILED),
        ("REJECTED", "WOULD_REFUSE", P.WOULD_REFUSE),
        ("REJECTED", "DUPLICATE", P.DUPLICATE),
        ("REJECTED", "EXPIRED", P.EXPIRED),
        ("TIMED_OUT", "", P.FAILED),
    ],
)
def test_a_response_names_the_path_s_status(status: str, code: str, becomes: PathStatus) -> None:
    body: dict[str, Any] = {"status": status, "result": {"locked": True}}
    if code:
        body["statusReason"] = {"reasonCode": code}
    reported = read_response(msgspec.json.encode(body))
    assert reported.status is becomes
    assert reported.detail["result"] == {"locked": True}
    assert reported.detail.get("reasonCode", "") == code


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"", ResponseError.INVALID_JSON),
        (b"{", ResponseError.INVALID_JSON),
        (b'{"status":"\xff"}', ResponseError.INVALID_JSON),
        (b"[" * 60_000, ResponseError.INVALID_REQUEST),
        (b"[]", ResponseError.INVALID_REQUEST),
        (b"{}", ResponseError.INVALID_REQUEST),
        (b'{"status":"DONE"}', ResponseError.INVALID_REQUEST),
        (b'{"status":"SUCCEEDED","result":3}', ResponseError.INVALID_REQUEST),
        (
            b'{"status":"SUCCEEDED","result":{"a":' + b"[" * 40 + b"]" * 40 + b"}}",
            ResponseError.INVALID_REQUEST,
        ),
        (b" " * 70_000, ResponseError.INVALID_REQUEST),
    ],
)
def test_a_response_that_cannot_be_read_is_refused_in_aws_s_words(
    payload: bytes, error: ResponseError
) -> None:
    with pytest.raises(BadResponse) as caught:
        read_response(payload)
    assert caught.value.error is error


@given(st.binary(max_size=80))
def test_whatever_a_device_sends_is_read_or_refused(payload: bytes) -> None:
    with contextlib.suppress(BadResponse):
        read_response(payload)


@pytest.mark.parametrize(("said", "path"), [("old", Path.OLD), ("new", Path.NEW), ("x", None), (None, None)])
def test_an_answer_that_comes_by_the_other_path_says_so(said: str | None, path: Path | None) -> None:
    detail: dict[str, object] = {"door": "left"}
    if said is not None:
        detail[BROUGHT_BY] = said
    assert reported(P.SUCCEEDED, detail) == Reported(P.SUCCEEDED, {"door": "left"}, path)
    by_mqtt = read_response(response(AnswerStatus.SUCCEEDED, msgspec.json.encode(detail)))
    assert by_mqtt == Reported(P.SUCCEEDED, {"result": {"door": "left"}}, path)


def test_what_the_database_cannot_keep_is_replaced() -> None:
    kept = storable({"a\x00": "b\x00c", "n": [10**30, 5], "x": {"y": None}, "o": object})
    assert kept == {"a\ufffd": "b\ufffdc", "n": [10**30, 5], "x": {"y": None}, "o": str(object)}


# -- a path's states -----------------------------------------------------------------------------------


def test_every_status_has_a_row_and_only_duplicate_is_an_end_that_can_be_corrected() -> None:
    assert set(MOVES) == set(PathStatus)
    ends_with_moves = {status for status in PathStatus if status not in OPEN and MOVES[status]}
    assert ends_with_moves == {P.DUPLICATE}


def test_acknowledged_then_succeeded_with_both_latencies() -> None:
    first = record([new()], Path.NEW, Reported(P.ACKNOWLEDGED, {}), 10.2)
    assert resolve(first.paths) is Status.ACKNOWLEDGED
    second = record(first.paths, Path.NEW, Reported(P.SUCCEEDED, {"result": {"a": 1}}), 11.5)
    (path,) = second.paths
    assert path.status is P.SUCCEEDED
    assert path.ack_latency_s == pytest.approx(0.2)
    assert path.latency_s == 1.5
    assert path.detail == {"result": {"a": 1}}
    assert resolve(second.paths) is Status.SUCCEEDED


def test_a_report_that_comes_twice_changes_nothing() -> None:
    once = record([new()], Path.NEW, Reported(P.SUCCEEDED, {"x": 1}), 11.0)
    twice = record(once.paths, Path.NEW, Reported(P.SUCCEEDED, {"x": 2}), 12.0)
    assert twice.paths == once.paths and not twice.changed and twice.error is None


def test_an_acknowledgement_that_was_overtaken_by_the_outcome_changes_nothing() -> None:
    done = record([new()], Path.NEW, Reported(P.SUCCEEDED, {}), 11.0)
    assert not record(done.paths, Path.NEW, Reported(P.ACKNOWLEDGED, {}), 12.0).changed


def test_a_late_answer_is_kept_in_the_detail_and_changes_no_final_state() -> None:
    closed, status = close([new()], 70.0)
    assert status is Status.EXPIRED
    late = record(closed, Path.NEW, Reported(P.SUCCEEDED, {"result": {"a": 1}}), 75.0)
    (path,) = late.paths
    assert path.status is P.EXPIRED and path.ended_at == 70.0
    assert path.detail["late"] == {"status": "succeeded", "at": 75.0, "result": {"a": 1}}
    assert late.error is ResponseError.TERMINAL
    again = record(late.paths, Path.NEW, Reported(P.FAILED, {}), 76.0)
    assert again.paths == late.paths and again.error is ResponseError.TERMINAL


def test_a_second_copy_on_the_only_path_leaves_the_outcome_to_come() -> None:
    """A retry of our own made the copy: the device has the command, and no other path can have brought it."""
    answered = record([new()], Path.NEW, Reported(P.DUPLICATE, {}), 12.0)
    assert answered.paths[0].status is P.ACKNOWLEDGED
    done = record(answered.paths, Path.NEW, Reported(P.SUCCEEDED, {}), 13.0)
    assert resolve(done.paths) is Status.SUCCEEDED
    assert not record(done.paths, Path.NEW, Reported(P.DUPLICATE, {}), 14.0).changed


def test_with_two_paths_the_second_copy_is_a_duplicate_and_the_command_succeeded_once() -> None:
    first = record([old(), new()], Path.OLD, Reported(P.SUCCEEDED, {}), 11.0)
    both = record(first.paths, Path.NEW, Reported(P.DUPLICATE, {}), 11.1)
    assert [path.status for path in both.paths] == [P.SUCCEEDED, P.DUPLICATE]
    assert resolve(both.paths) is Status.SUCCEEDED


def test_a_duplicate_that_comes_first_waits_for_the_other_path() -> None:
    first = record([old(), new()], Path.NEW, Reported(P.DUPLICATE, {}), 11.0)
    assert resolve(first.paths) is Status.ACKNOWLEDGED
    assert resolve(record(first.paths, Path.OLD, Reported(P.FAILED, {}), 12.0).paths) is Status.FAILED


def test_an_outcome_corrects_a_duplicate_on_the_same_path() -> None:
    """The device met a redelivered copy of what it was executing; the outcome by that path shows it."""
    first = record([old(), new()], Path.NEW, Reported(P.DUPLICATE, {}), 11.0)
    second = record(first.paths, Path.OLD, Reported(P.DUPLICATE, {}), 11.5)
    assert resolve(second.paths) is Status.ACKNOWLEDGED
    third = record(second.paths, Path.NEW, Reported(P.SUCCEEDED, {}), 12.0)
    assert resolve(third.paths) is Status.SUCCEEDED


WRONG_BY: dict[Path, JsonObject] = {
    Path.NEW: {"reasonCode": "WRONG_SIDE"},
    Path.OLD: {"code": "WRONG_SIDE", "reason": "r"},
}


@pytest.mark.parametrize("path", Path)
def test_the_wrong_side_is_no_outcome_and_the_other_path_ends_the_command(path: Path) -> None:
    wrong = Reported(P.FAILED, WRONG_BY[path])
    (other,) = set(Path) - {path}
    first = record([old(), new()], path, wrong, 11.0)
    assert first.changed and first.error is None
    assert resolve(first.paths) is Status.SENT
    assert not record(first.paths, path, wrong, 12.0).changed  # of the next copy
    for outcome, status in ((P.SUCCEEDED, Status.SUCCEEDED), (P.FAILED, Status.FAILED)):
        assert resolve(record(first.paths, other, Reported(outcome, {}), 13.0).paths) is status


def test_after_the_wrong_side_a_later_copy_by_the_same_path_can_end_the_command() -> None:
    wrong = record([new()], Path.NEW, Reported(P.FAILED, {"reasonCode": "WRONG_SIDE"}), 11.0)
    assert resolve(wrong.paths) is Status.SENT
    done = record(wrong.paths, Path.NEW, Reported(P.SUCCEEDED, {"result": {"a": 1}}), 14.0)
    assert (resolve(done.paths), done.paths[0].detail) == (Status.SUCCEEDED, {"result": {"a": 1}})


def test_a_command_that_was_never_taken_ends_as_expired_and_says_why() -> None:
    wrong = record([new()], Path.NEW, Reported(P.FAILED, {"reasonCode": "WRONG_SIDE"}), 11.0)
    (path,), status = close(wrong.paths, 70.0)
    assert (status, path.status, path.detail) == (Status.EXPIRED, P.EXPIRED, {"reasonCode": "WRONG_SIDE"})
    assert not record([path], Path.NEW, Reported(P.FAILED, {"reasonCode": "WRONG_SIDE"}), 75.0).changed


def test_once_begun_the_wrong_side_of_another_copy_changes_nothing() -> None:
    begun = record([new()], Path.NEW, Reported(P.ACKNOWLEDGED, {}), 11.0)
    assert not record(begun.paths, Path.NEW, Reported(P.FAILED, WRONG_BY[Path.NEW]), 12.0).changed


def test_a_path_the_command_does_not_go_by_cannot_report() -> None:
    with pytest.raises(Conflict, match="does not go by path old"):
        record([new()], Path.OLD, Reported(P.SUCCEEDED, {}), 11.0)


# -- the command's status ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "status"),
    [
        ([new(P.QUEUED)], Status.QUEUED),
        ([new(P.SENT), old(P.QUEUED)], Status.SENT),
        ([new(P.FAILED), old(P.SENT)], Status.SENT),
        ([new(P.FAILED), old(P.EXPIRED)], Status.FAILED),
        ([new(P.UNREACHABLE), old(P.SUCCEEDED)], Status.SUCCEEDED),
        ([new(P.UNREACHABLE)], Status.EXPIRED),
        ([new(P.WOULD_EXECUTE, Mode.DRY_RUN)], Status.WOULD_EXECUTE),
        ([new(P.WOULD_REFUSE, Mode.DRY_RUN)], Status.FAILED),
        ([old(P.FAILED), new(P.SENT, Mode.DRY_RUN)], Status.FAILED),
        ([old(P.SENT), new(P.WOULD_EXECUTE, Mode.DRY_RUN)], Status.SENT),
        ([old(P.EXPIRED), new(P.WOULD_EXECUTE, Mode.DRY_RUN)], Status.EXPIRED),
        ([old(P.SUCCEEDED), new(P.WOULD_REFUSE, Mode.DRY_RUN)], Status.SUCCEEDED),
    ],
)
def test_the_status_by_its_paths(paths: list[PathState], status: Status) -> None:
    assert resolve(paths) is status


STATUSES = st.sampled_from(PathStatus)


@given(st.lists(st.tuples(STATUSES, st.sampled_from(Mode)), min_size=1, max_size=2))
def test_closing_a_command_leaves_one_final_status_whatever_came_before(
    states: list[tuple[PathStatus, Mode]],
) -> None:
    paths = [
        PathState(path=path, mode=mode, status=status)
        for path, (status, mode) in zip(Path, states, strict=False)
    ]
    closed, status = close(paths, 99.0)
    assert status in FINAL
    assert not {path.status for path in closed} & OPEN
    assert (status is Status.SUCCEEDED) == any(path.status is P.SUCCEEDED for path in paths)


@given(st.lists(st.tuples(st.sampled_from(Path), STATUSES), max_size=8))
def test_once_final_a_command_keeps_its_status_unless_a_path_turns_out_to_have_succeeded(
    reports: list[tuple[Path, PathStatus]],
) -> None:
    """In whatever order reports come, a path that has ended moves on only from duplicate to its outcome."""
    paths: tuple[PathState, ...] = (old(), new())
    for path, status in reports:
        before = {state.path: state.status for state in paths}
        paths = record(paths, path, Reported(status, {}), 11.0).paths
        for state in paths:
            was = before[state.path]
            assert state.status is was or state.status in MOVES[was]


def test_no_order_of_two_copies_executes_twice() -> None:
    """The device executes one copy and refuses the other: exactly one path says succeeded, in any order."""
    for executed, order in product(Path, [(Path.OLD, Path.NEW), (Path.NEW, Path.OLD)]):
        paths: tuple[PathState, ...] = (old(), new())
        for path in order:
            status = P.SUCCEEDED if path is executed else P.DUPLICATE
            paths = record(paths, path, Reported(status, {}), 11.0).paths
        assert sorted(state.status for state in paths) == [P.DUPLICATE, P.SUCCEEDED]
        assert resolve(paths) is Status.SUCCEEDED


# -- sending -------------------------------------------------------------------------------------------


def test_copies_to_a_silent_device_thin_out() -> None:
    sent, now, copies = 0.0, 0.0, []
    while now < 300:
        now += 0.5
        if retry_due(now=now, sent_at=sent, waiting_since=0.0, connected_since=-100.0):
            copies.append(now)
            sent = now
    assert copies[:5] == [2.0, 4.0, 6.0, 9.0, 13.5]
    assert len(copies) < 16


def test_a_device_that_comes_back_gets_its_copy_soon_after_it_has_connected() -> None:
    assert not retry_due(now=100.5, sent_at=5.0, waiting_since=5.0, connected_since=100.0)
    assert retry_due(now=101.0, sent_at=5.0, waiting_since=5.0, connected_since=100.0)
    assert retry_due(now=103.1, sent_at=101.0, waiting_since=5.0, connected_since=100.0)


@given(st.floats(0, 4e9), st.integers(0, 2**74 - 1))
def test_ids_are_version_7_and_sort_by_time(now: float, random: int) -> None:
    made = UUID(uuid7(now, random))
    assert made.version == 7 and made.variant == "specified in RFC 4122"
    assert made.int >> 80 == int(now * 1000)
    assert uuid7(now + 0.002, 0) > str(made)


@pytest.mark.parametrize("name", ["lock", "fleetlift.probe", "set-config_2:x"])
def test_names_that_are_taken(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize("name", ["", "-lock", "a" * 65, "löck", "a b"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="use 1 to 64"):
        checked_name(name)


@pytest.mark.parametrize("params", [3, [1], {"a": "x" * 70_000}, {"a": "\x00"}, {"a": object()}])
def test_params_that_are_refused(params: object) -> None:
    with pytest.raises(BadInput, match="command params"):
        checked_params(params)


def test_an_expiry_is_bounded() -> None:
    assert checked_expiry(60) == 60
    for wrong in (0.5, EXPIRES_IN_S_MAX + 1, float("nan"), -1):
        with pytest.raises(BadInput, match="expires_in"):
            checked_expiry(wrong)
