"""JSON as a type: what a parsed document may hold, and how deep it goes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
    JsonObject: TypeAlias = dict[str, Json]
else:  # a decoder cannot build a type that names itself
    Json = Any
    JsonObject = dict[str, Any]


def deeper_than(value: object, levels: int) -> bool:
    """Whether objects and arrays are within each other more than `levels` times. Takes no stack."""
    work: list[tuple[object, int]] = [(value, 1)]
    while work:
        here, depth = work.pop()
        if isinstance(here, Mapping | list):
            if depth > levels:
                return True
            inside = here.values() if isinstance(here, Mapping) else here
            work.extend((inner, depth + 1) for inner in inside)
    return False
