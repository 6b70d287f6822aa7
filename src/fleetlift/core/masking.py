"""Taking secrets out of recorded messages: passwords, tokens, keys, and on request the names of devices.

Masking errs on the safe side: a field is masked by what its name contains. A body without any sign of a
secret is left as it is, byte for byte. What is compressed, encrypted or in a binary encoding cannot be seen.
"""

import base64
import hmac
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from fleetlift.core.errors import BadInput

MASK = "***"
DEPTH_MAX = 64

# A field is secret when its name, without separators and in lower case, contains one of these …
SECRET_WORDS = (
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "pwd",
    "secret",
    "token",
    "apikey",
    "accesskey",
    "privatekey",
    "sharedkey",
    "devicekey",
    "authorization",
    "authentication",
    "credential",
    "bearer",
    "cookie",
    "sessionid",
    "jwt",
    "psk",
)
SECRET_NAMES = ("auth", "pass", "pin", "pw")  # … or is one of these

# A topic's group is masked: access tokens that stand in a path, or behind a word that says so.
TOPICS = (
    r"(?:^|/)api/v1/([^/]+)/",  # ThingsBoard: api/v1/{token}/telemetry
    r"[?&;](?:access_?token|token|password|key|api_?key|sig|signature|auth)=([^&/;]+)",
    r"(?i:(?:^|/)(?:tokens?|passwords?|secrets?|api-?keys?|credentials?)/)([^/]+)",
)


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is masked beside the defaults, and what is not.

    `words` as SECRET_WORDS; `names`: fields by their whole name; `keep`: names that are never masked;
    `topics` and `texts`: regular expressions whose first group is masked. `defaults` False: only these.
    """

    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    defaults: bool = True


class Masker:
    """Masks by rules. `key` makes a masked level of a topic tell tokens apart without telling them.

    `pseudonyms`: devices get other names, which only whoever has the key can find out again.
    """

    def __init__(self, rules: Rules, key: bytes, *, pseudonyms: bool = False) -> None:
        self._key = key
        self._pseudonyms = pseudonyms
        self._names: dict[str, str] = {}
        words = [_plain(word) for word in (*(SECRET_WORDS if rules.defaults else ()), *rules.words)]
        names = [_plain(name) for name in (*(SECRET_NAMES if rules.defaults else ()), *rules.names)]
        if not all((*words, *names)):
            raise BadInput("masking rules: a word or name without letters would mask everything")
        self._words = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        self._whole = frozenset(names)
        self._keep = frozenset(map(_plain, rules.keep))
        self._topics = _compiled((*(TOPICS if rules.defaults else ()), *rules.topics))
        extra = _compiled(rules.texts)
        spread = [r"[-_ .]?".join(map(re.escape, word)) for word in words]
        spread += [rf"\b{re.escape(name)}\b" for name in names]
        if spread:
            assigned = r"(?i)(?:" + "|".join(spread) + r")[\w-]*\\?[\"']?\s*[:=]\s*\\?[\"']?([^\"'\s,;&}\\]+)"
            extra.append(re.compile(assigned))
        if rules.defaults:
            extra = _compiled(_TEXTS) + extra  # first: behind "Authorization:" the secret is the second word
        self._texts = extra
        signs = (*words, *names, *(("eyj", "basic", "bearer", "privatekey") if rules.defaults else ()))
        self._signs = [sign.encode("utf-8", "replace") for sign in signs]
        self._known_topics: dict[str, tuple[str, int]] = {}
        # What the quick look cannot see makes every body be looked at.
        self._own = bool(rules.texts) or not all(sign.isascii() for sign in signs)

    def device(self, device: str) -> str:
        """The name that a device has in the capture."""
        if not self._pseudonyms:
            return device
        name = self._names.get(device)
        if name is None:
            if len(self._names) >= 1_000_000:
                self._names.clear()
            name = self._names[device] = "p-" + self._digest(device, 15).lower()
        return name

    def topic(self, topic: str, device: str) -> tuple[str, int]:
        """The topic without secrets and with the device's name in the capture; how many were masked."""
        known = self._known_topics.get(topic)
        if known is None:
            if len(self._known_topics) >= _TOPICS_KNOWN_MAX:
                self._known_topics.clear()
            known = self._known_topics[topic] = self._masked_topic(topic)
        if self._pseudonyms:
            levels = [self.device(device) if level == device else level for level in known[0].split("/")]
            return "/".join(levels), known[1]
        return known

    def _masked_topic(self, topic: str) -> tuple[str, int]:
        masked = 0
        for pattern in self._topics:
            topic, times = pattern.subn(self._masked_level, topic)
            masked += times
        return topic, masked

    def payload(self, payload: bytes, device: str) -> tuple[bytes, int]:
        masked = 0
        if self._own or self._may_hold_secrets(payload):
            payload, masked = self._without_secrets(payload)
        if self._pseudonyms and device.encode() in payload:
            own = re.compile(rb"(?<![\w:-])" + re.escape(device.encode()) + rb"(?![\w:-])")
            payload = own.sub(self.device(device).encode(), payload)
        return payload, masked

    def _may_hold_secrets(self, payload: bytes) -> bool:
        """One quick look tells most bodies from those that may: letters alone, whatever stands between them.
        A character that is escaped, or wider than a byte, may hide a word."""
        if b"\\u" in payload or b"://" in payload or b"\0" in payload:
            return True
        letters = payload.translate(_LOWER, _BETWEEN)
        return any(sign in letters for sign in self._signs)

    def _masked_level(self, match: re.Match[str]) -> str:
        start, end = match.span(1)
        text = match[0]
        at = match.start(0)
        return text[: start - at] + "masked-" + self._digest(match[1], 5).lower() + text[end - at :]

    def _digest(self, text: str, size: int) -> str:
        return base64.b32encode(hmac.digest(self._key, text.encode(), "sha256")[:size]).decode()

    def _without_secrets(self, payload: bytes) -> tuple[bytes, int]:
        try:
            value = json.loads(payload)
        except (ValueError, RecursionError):
            text, masked = self._text(payload.decode("latin-1"))
            return (text.encode("latin-1", "replace"), masked) if masked else (payload, 0)
        clean, masked = self._value(value, 0)
        if not masked:
            return payload, 0
        return json.dumps(clean, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"), masked

    def _value(self, value: Any, depth: int) -> tuple[Any, int]:
        if depth > DEPTH_MAX:
            return MASK, 1  # too deep to look at
        match value:
            case dict():
                clean, masked = {}, 0
                for name, inner in value.items():
                    if self._secret(name) and inner is not None and inner != "":
                        clean[name] = MASK
                        masked += 1
                    else:
                        clean[name], times = self._value(inner, depth + 1)
                        masked += times
                return clean, masked
            case list():
                parts = [self._value(inner, depth + 1) for inner in value]
                return [part for part, _ in parts], sum(times for _, times in parts)
            case str():
                return self._string(value, depth)
        return value, 0

    def _string(self, text: str, depth: int) -> tuple[str, int]:
        if text[:1] in ("{", "["):  # a document within a document
            try:
                inner = json.loads(text)
            except (ValueError, RecursionError):
                pass
            else:
                clean, masked = self._value(inner, depth + 1)
                if not masked:
                    return text, 0
                return json.dumps(clean, ensure_ascii=False, separators=(",", ":")), masked
        return self._text(text)

    def _text(self, text: str) -> tuple[str, int]:
        masked = 0
        for pattern in self._texts:
            text, times = pattern.subn(_masked_group, text)
            masked += times
        return text, masked

    def _secret(self, name: str) -> bool:
        plain = _plain(name)
        if plain in self._keep:
            return False
        return plain in self._whole or self._words.search(plain) is not None


_TEXTS = (
    r"(?i)\b(?:bearer|basic)\s+([A-Za-z0-9._~+/=-]{6,})",
    r"(eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*)",  # a signed JWT
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----([^-]*)",
    r"[a-zA-Z][a-zA-Z0-9+.-]{1,20}://([^/\s@\"']{1,256})@",  # user and password of a URL
)


_TOPICS_KNOWN_MAX = 100_000
_LOWER = bytes(range(256)).lower()
_BETWEEN = bytes(byte for byte in range(256) if byte > 127 or not chr(byte).isalnum())


def _masked_group(match: re.Match[str]) -> str:
    start, end = match.span(1)
    at = match.start(0)
    return match[0][: start - at] + MASK + match[0][end - at :]


def _plain(name: str) -> str:
    return re.sub(r"[^\w]|_", "", name).lower()


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as problem:
            raise BadInput(f"masking rule {pattern!r} is no regular expression ({problem})") from None
        if not compiled.groups:
            raise BadInput(
                f"masking rule {pattern!r}: put what is to be masked into a group, as in key=(\\w+)"
            )
        found.append(compiled)
    return found
