"""MQTT topics and NATS subjects, as NATS Server maps them onto each other.

Levels become tokens; a dot within a level becomes `//`; an empty level becomes `/`. The mapping is one to
one: `to_topic(to_subject(topic)) == topic` for every topic that can be mapped.
Source: MQTT 3.1.1, section 4.7; NATS Server, `server/mqtt.go`, `mqttToNATSSubjectConversion`.
"""

import re

from fleetlift.core.errors import BadInput

STREAM = "$MQTT_msgs"
STORED = "$MQTT.msgs."  # what stands before the subject of a message in the stream
TOPIC_BYTES_MAX = 4096

_REFUSED = re.compile(r"[ \t\r\n\f\x00\x7f\ud800-\udfff]")  # the last: halves of a sign, not UTF-8


def to_subject(topic: str) -> str:
    """The NATS subject of an MQTT topic. Raises BadInput for wildcards and what NATS Server refuses."""
    if "+" in topic or "#" in topic or "*" in topic or ">" in topic:
        raise BadInput(f"topic {topic!r}: '+', '#', '*' and '>' cannot be part of a topic to publish to")
    return _mapped(topic)


def to_topic(subject: str) -> str:
    """The MQTT topic of a NATS subject."""
    if "/" not in subject:
        return subject.replace(".", "/")
    return "/".join("" if token == "/" else token.replace("//", ".") for token in subject.split("."))


def stored_topic(subject: str) -> str:
    """The topic of a message in the stream, whose subject begins with `$MQTT.msgs.`."""
    return to_topic(subject.removeprefix(STORED))


def _mapped(topic: str) -> str:
    if not topic or _REFUSED.search(topic) or len(topic.encode()) > TOPIC_BYTES_MAX:
        raise BadInput(
            f"topic {topic[:80]!r}: use 1 to {TOPIC_BYTES_MAX} bytes without space or control characters"
        )
    if "." not in topic and "//" not in topic and topic[0] != "/" and topic[-1] != "/":
        return topic.replace("/", ".")
    return ".".join(level.replace(".", "//") if level else "/" for level in topic.split("/"))
