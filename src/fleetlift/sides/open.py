"""From what a plan file says of a side to the side itself."""

import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from fleetlift.core.errors import BadInput
from fleetlift.sides.base import Side

ENTRY_POINTS = "fleetlift.sides"
OWN_KEYS = "engine.key"  # stands in every data directory of ours
KEY_BYTES_MAX = 512
_KEY = re.compile(r"[!-~]{16,512}")

# Takes the target (what stands beside the kind in the plan) and the other entries of the mapping.
Builder = Callable[[str, Mapping[str, str]], Side]


def connect_side(spec: Mapping[str, str], *, builders: Mapping[str, Builder] | None = None) -> Side:
    """The side that `spec` names, as in `{"legacy": "tcp://127.0.0.1:7700", "key_file": "..."}`.

    Exactly one key is a kind of side; the others are its options. `builders` go before the built-in kinds
    and those that installed packages register as entry points of the group `fleetlift.sides`. Does no
    I/O beyond reading a key file. Raises BadInput.
    """
    kinds = {**_registered(), **_BUILT_IN, **(builders or {})}
    named = [kind for kind in spec if kind in kinds]
    if len(named) != 1:
        raise BadInput(
            f"a side is written as one of {', '.join(sorted(kinds))} with its address; this one has:"
            f" {', '.join(spec) or 'nothing'}"
        )
    (kind,) = named
    return kinds[kind](spec[kind], {name: value for name, value in spec.items() if name != kind})


def side_kinds() -> tuple[str, ...]:
    """The kinds of sides that a plan can name here: the built-in ones and those of installed packages."""
    return tuple({**_BUILT_IN, **_registered()})


def legacy_key(options: Mapping[str, str]) -> str:
    """The owner's key of a legacy server: from the file that `key_file` names, or FLEETLIFT_LEGACY_KEY."""
    if path := options.get("key_file"):
        return key_in(Path(path), "key_file", "the legacy server's owner.key")
    if key := os.environ.get("FLEETLIFT_LEGACY_KEY"):
        return key
    raise BadInput(
        "the legacy server's owner key is not known: set FLEETLIFT_LEGACY_KEY, or key_file in the plan"
    )


def key_in(path: Path, named: str, what: str) -> str:
    """The key in a file that a plan names as `named`; `what` it should be.

    The server that the plan names as well is sent what it holds, so it must be a key, and none of our own.
    """
    try:
        real = path.expanduser().resolve(strict=True)
        if any((above / OWN_KEYS).exists() for above in real.parents):
            raise BadInput(
                f"{named} {path}: lies in a data directory of Fleetlift; name a file of the old side"
            )
        text = ""
        if real.is_file():  # a pipe or a device might never end
            with real.open("rb") as file:
                text = file.read(KEY_BYTES_MAX + 1).decode().strip()
    except OSError as exc:
        raise BadInput(f"{named} {path}: {exc.strerror}; name {what}") from exc
    except UnicodeDecodeError:
        text = ""
    if not _KEY.fullmatch(text):
        raise BadInput(
            f"{named} {path}: holds no key (one word of 16 to {KEY_BYTES_MAX} characters); name {what}"
        )
    return text


def _legacy(target: str, options: Mapping[str, str]) -> Side:
    from fleetlift.sides.legacy.side import LegacySide

    return LegacySide(target, legacy_key(options))


def _fleetlift(target: str, options: Mapping[str, str]) -> Side:
    # Imported when it is asked for: a plan between two other sides needs no backend of ours.
    side: Side = import_module("fleetlift.sides.fleetlift").open_side(target, options)
    return side


_BUILT_IN: Mapping[str, Builder] = {"legacy": _legacy, "fleetlift": _fleetlift}


def _registered() -> dict[str, Builder]:
    """The kinds that installed packages bring, loaded when they are used."""

    def lazily(name: str) -> Builder:
        return lambda target, options: found[name].load()(target, options)

    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    return {name: lazily(name) for name in found}
