"""The names of all that a move leaves on either database while it runs."""

import hashlib
import re
from typing import Final

MOVE_SCHEMA: Final = "fleetlift_move"  # on the target: chunks copied, position applied, rows checked
FENCE_SCHEMA: Final = "fleetlift_fence"  # on either: what keeps writers out

APPLIED: Final = "fleetlift applied"
"""Prefix of the logical message that begins each transaction in which a move writes the tenant's rows; the
message is the move's name. A follower of that move skips such a transaction: the other side has had it."""

_LONGEST: Final = 63 - len("fleetlift_") - len("_back")


def slot_name(move: str) -> str:
    """The replication slot on the source; a slot's name has lower-case letters, digits and '_' only."""
    plain = re.sub(r"[^a-z0-9_]", "_", move.lower())
    if plain != move or len(plain) > _LONGEST:
        plain = f"{plain[: _LONGEST - 9]}_{hashlib.sha256(move.encode()).hexdigest()[:8]}"
    return f"fleetlift_{plain}"


def publication_name(move: str) -> str:
    """The publication on the source."""
    return slot_name(move)


def reverse_slot_name(move: str) -> str:
    """Slot and publication on the target, for the way back."""
    return f"{slot_name(move)}_back"
