"""The audit log as a chain: each entry's hash covers the entry and the hash of the one before it.

    root   = SHA-256(canonical({"chain": "fleetlift audit 1", "migration": …, "plan": …}))
    hash_n = SHA-256(hash_(n-1) + canonical({"actor": …, "at": …, "evidence": …, "kind": …,
                                             "migration": …, "number": n, "text": …}))

Hashes are joined as their 32 bytes and written as 64 hexadecimal digits. The root's `plan` is the SHA-256 of
the first plan's text in UTF-8: it binds the chain to one migration and what it set out to do. Canonical is
what Python's `json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` writes, in UTF-8.
So an entry changed, left out, put in or moved breaks the chain.
"""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from fleetlift.core.migration import AuditEntry

NAME: Final = "fleetlift audit 1"


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the chain. `number` counts from 1 within the migration; `at` is RFC 3339 in UTC."""

    number: int
    at: str
    actor: str
    kind: str
    text: str
    evidence: dict[str, Any]
    hash: str


def canonical(value: object) -> bytes:
    """The one way to write a value as JSON. Numbers that are none become null."""
    plain = msgspec.json.decode(msgspec.json.encode(value))
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(data: bytes | str) -> str:
    """SHA-256 as 64 hexadecimal digits; a text's is that of its UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def written(at: float) -> str:
    """Unix seconds as RFC 3339 in UTC, to the microsecond: what the database keeps, too."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def read_time(text: str) -> float:
    """The inverse of `written`. Raises ValueError for anything that it does not write."""
    at = datetime.fromisoformat(text).timestamp()
    if written(at) != text:
        raise ValueError(f"{text!r} is not a moment such as 2026-01-31T12:00:00.000000Z")
    return at


def root(migration: str, plan: str) -> str:
    """The hash before the first entry: it binds the chain to the migration's name and its first plan."""
    return digest(canonical({"chain": NAME, "migration": migration, "plan": digest(plan)}))


def link(migration: str, previous: str, number: int, at: str, entry: AuditEntry) -> Link:
    """The entry that follows the hash `previous`."""
    # What JSON cannot keep is gone before the hash is made, so that it can be made again from what is stored.
    evidence = msgspec.json.decode(msgspec.json.encode(entry.evidence), type=dict[str, Any])
    unsealed = Link(
        number=number,
        at=at,
        actor=entry.actor,
        kind=entry.kind,
        text=entry.text,
        evidence=evidence,
        hash="",
    )
    return msgspec.structs.replace(unsealed, hash=hash_of(migration, previous, unsealed))


def hash_of(migration: str, previous: str, link: Link) -> str:
    """What an entry's hash must be, whatever it says that it is."""
    body = {
        "migration": migration,
        "number": link.number,
        "at": link.at,
        "actor": link.actor,
        "kind": link.kind,
        "text": link.text,
        "evidence": link.evidence,
    }
    return digest(bytes.fromhex(previous) + canonical(body))


def broken(migration: str, plan: str, links: Iterable[Link]) -> list[str]:
    """Where a chain does not hold, one line each; empty when every entry follows from the one before.

    After a break the chain is taken up at the hash that is written, so each break is told once.
    """
    problems = []
    previous = root(migration, plan)
    for place, one in enumerate(links, 1):
        if one.number != place:
            problems.append(f"entry {one.number} ({one.kind}) stands where entry {place} belongs")
        if one.hash != hash_of(migration, previous, one):
            problems.append(
                f"entry {one.number} ({one.kind}, {one.at}) does not follow from the one before it: "
                "it, or one before it, was changed, put in or left out"
            )
        previous = one.hash if _is_hash(one.hash) else "00" * 32
    return problems


def _is_hash(text: str) -> bool:
    return len(text) == 64 and not text.strip("0123456789abcdef")
