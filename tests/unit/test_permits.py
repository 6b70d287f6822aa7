"""What a device's name allows, and how it may call itself."""

import pytest

from fleetlift.edge.permits import (
    client_id_fits,
    device_of,
    publish_subjects,
    read_request,
    subscribe_subjects,
)


@pytest.mark.parametrize(
    ("username", "device"),
    [
        ("car-1", "car-1"),
        ("car-1?SDK=PythonV2&Version=1", "car-1"),
        ("?SDK=x", None),
        ("", None),
        ("a.b", None),
        ("a>", None),
        ("a*", None),
        ("a b", None),
        ("x" * 129, None),
    ],
)
def test_the_user_name_is_the_device_up_to_a_question_mark(username: str, device: str | None) -> None:
    assert device_of(username) == device


@pytest.mark.parametrize(
    ("client_id", "fits"),
    [
        *(("a", True), ("a/2", True), ("a/x/y", True)),
        *(("", False), ("a/", False), ("ab", False), ("b", False), ("A", False), ("/a", False)),
        *(("a/.", False), ("a/" + "x" * 129, False)),
    ],
)
def test_a_client_id_is_the_devices_own(client_id: str, fits: bool) -> None:
    assert client_id_fits("a", client_id) is fits


def test_every_subject_names_the_device() -> None:
    """No permission reaches beyond the device, and no list is empty (which would allow everything)."""
    for subjects in (publish_subjects("car-1"), subscribe_subjects("car-1")):
        assert subjects
        for subject in subjects:
            assert "car-1" in subject.split(".") or subject == "$MQTT.sub.>"
            assert "*" not in subject.split(".car-1")[0]


@pytest.mark.parametrize("token", [b"", b"a.b", b"a.b.c", b"a.!!.c", b"a.e30.c", b"\xff.\xff.\xff"])
def test_what_is_no_request_is_refused(token: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_request(token)
