"""Topics and subjects map onto each other one to one, as NATS Server has it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlift.bus.subjects import stored_topic, to_subject, to_topic
from fleetlift.core.errors import BadInput

LEVEL = st.text(
    st.characters(exclude_characters="/+#*> \t\r\n\f\x00\x7f", exclude_categories=["Cs"]), max_size=8
)
TOPIC = st.lists(LEVEL, min_size=1, max_size=6).map("/".join).filter(bool)


@pytest.mark.parametrize(
    ("topic", "subject"),
    [
        ("a/b", "a.b"),
        ("a.b/c", "a//b.c"),
        ("$aws/things/t.1/shadow", "$aws.things.t//1.shadow"),
        ("/a/b", "/.a.b"),
        ("a//b", "a./.b"),
        ("a/b/", "a.b./"),
        ("/", "/./"),
    ],
)
def test_topics_map_as_the_server_maps_them(topic: str, subject: str) -> None:
    """The table that was measured on NATS Server 2.15."""
    assert to_subject(topic) == subject
    assert to_topic(subject) == topic
    assert stored_topic("$MQTT.msgs." + subject) == topic


@given(TOPIC)
def test_a_topic_comes_back_from_its_subject(topic: str) -> None:
    """Nothing is lost on the way: two topics never share a subject."""
    assert to_topic(to_subject(topic)) == topic


@given(TOPIC)
def test_a_subject_has_no_empty_token(topic: str) -> None:
    """NATS refuses empty tokens, so none may come out."""
    assert all(to_subject(topic).split("."))


@pytest.mark.parametrize("topic", ["", "a b", "a/+", "a/#", "a\nb", "a/*", "a/>", "x" * 5000])
def test_what_the_server_would_refuse_is_refused_before(topic: str) -> None:
    with pytest.raises(BadInput):
        to_subject(topic)
