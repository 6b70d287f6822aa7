"""Pages of long lists. A cursor is opaque to callers: it names the last row they have seen."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from fleetlift.core.errors import BadInput

T = TypeVar("T")

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000


class Page(msgspec.Struct, Generic[T], frozen=True):
    """Some items of a list; `next` is the cursor (`after`) of the following page, None at the end."""

    items: Sequence[T]
    next: str | None = None


def checked_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_LIMIT:
        raise BadInput(f"limit {limit}: use 1 to {MAX_LIMIT}")
    return limit


def to_cursor(*key: str | int) -> str:
    """The cursor of the row with this key."""
    return urlsafe_b64encode(msgspec.json.encode(key)).decode().rstrip("=")


def from_cursor(text: str, shape: type[T]) -> T:
    """The key in a cursor; `shape` is its tuple type. Raises BadInput for a text that is no cursor."""
    try:
        if len(text) > 4096:
            raise ValueError("too long")
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        key = msgspec.json.decode(raw, type=shape)
        if not all(map(_fits, key)):  # type: ignore[call-overload]
            raise ValueError("no key of ours")
        return key
    except (ValueError, RecursionError):
        raise BadInput("after: not a cursor; use the `next` of the page before, or leave it out") from None


def _fits(part: object) -> bool:
    """Whether PostgreSQL can compare a column with it."""
    if isinstance(part, int):
        return -(2**63) <= part < 2**63
    return not isinstance(part, str) or "\x00" not in part
