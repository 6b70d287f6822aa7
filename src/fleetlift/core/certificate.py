"""The certificate of a migration: one JSON file with the evidence of every decision, for auditors.

It is text: one field a line, of a list one element a line, in the order of the fields of `Certificate`, and
keys within a line sorted. There is one way to write it, so a file that differs from it in a byte was changed.
`docs/certificate.md` describes it for people, `core/verification.py` checks it.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, Final, NoReturn

import msgspec
from msgspec.structs import replace

from fleetlift.core.chain import Link, canonical, digest
from fleetlift.core.errors import BadInput
from fleetlift.core.ranges import RangeSet

FORMAT: Final = "fleetlift certificate 1"
SIGNED: Final = b"fleetlift certificate 1\n"  # stands before the digest in what is signed
_SEAL: Final = ("digest", "key", "signature")


class SideName(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    address: str


class PlanVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan file's text, and since when it held: the first from the start, the others by an amendment."""

    version: int
    since: str
    text: str


class Standing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a device of the migration stands when the certificate is issued."""

    device: str
    rank: int
    rung: int
    wave: int | None
    epoch: int
    state: str
    reason: str
    told_at: str | None
    moved_at: str | None


class Account(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one path has brought of one channel of one device; `ranges` as PostgreSQL writes a multirange."""

    device: str
    channel: str
    path: str
    ranges: str
    received: int
    doubles: int  # copies of numbers that this path had brought before; not stored again
    uncounted: int  # messages without a number


class Total(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The accounts of one path and channel, summed up."""

    path: str
    channel: str
    devices: int
    received: int
    distinct: int
    doubles: int
    uncounted: int


class Sums(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All accounts together. `missing` numbers lie within a channel's first and last and came by no path."""

    stored: int
    missing: int
    by_several_paths: int  # numbers that more than one path has brought, stored once


class Commands(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Commands to the migration's devices while it ran, by the state that they are in."""

    total: int
    by_status: dict[str, int]
    executed_twice: int


class Certificate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happened, complete: from this alone each verdict can be computed again. Times are RFC 3339, UTC.

    `digest` is the SHA-256 of all other fields but `key` and `signature`, which are those of the instance
    that issued it (Ed25519, over `SIGNED` and the digest); the three are empty until it is sealed.
    """

    format: str
    fleetlift: str
    migration: str
    tenant: str
    issued_at: str
    finished: bool  # False: issued while it was still under way
    phase: str
    started_at: str
    ended_at: str | None
    old: SideName
    new: SideName
    chain_head: str
    sums: Sums
    commands: Commands
    plans: tuple[PlanVersion, ...]
    audit: tuple[Link, ...]
    members: tuple[Standing, ...]
    totals: tuple[Total, ...]
    accounts: tuple[Account, ...]
    digest: str = ""
    key: str = ""
    signature: str = ""


def add_up(accounts: Iterable[Account]) -> tuple[Sums, tuple[Total, ...]]:
    """All accounts together, and by path and channel. Raises ValueError for ranges that are none."""
    by_path: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    seqs: dict[tuple[str, str], RangeSet] = {}
    stored = missing = overlap = 0
    for one in accounts:
        ranges = RangeSet.from_pg(one.ranges)
        by_path[one.path, one.channel].update(
            devices=1,
            received=one.received,
            distinct=ranges.count,
            doubles=one.doubles,
            uncounted=one.uncounted,
        )
        stored += one.uncounted
        overlap += ranges.count
        before = seqs.get((one.device, one.channel))
        seqs[one.device, one.channel] = ranges if before is None else before.union(ranges)
    for union in seqs.values():
        stored += union.count
        overlap -= union.count
        if union.highest is not None:
            missing += union.highest + 1 - next(union.ranges())[0] - union.count
    totals = tuple(
        Total(path=path, channel=channel, **counts) for (path, channel), counts in sorted(by_path.items())
    )
    return Sums(stored=stored, missing=missing, by_several_paths=overlap), totals


def digest_of(certificate: Certificate) -> str:
    """What the certificate's digest must be."""
    document = msgspec.to_builtins(certificate)
    return digest(canonical({name: value for name, value in document.items() if name not in _SEAL}))


def to_sign(found: str) -> bytes:
    """The bytes that are signed for a digest."""
    return SIGNED + found.encode()


def sealed(certificate: Certificate, *, key: str, signature: str) -> Certificate:
    return replace(certificate, digest=digest_of(certificate), key=key, signature=signature)


def render(certificate: Certificate) -> bytes:
    """The file, byte for byte."""
    fields = []
    for name, value in msgspec.to_builtins(certificate).items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(canonical(one).decode() for one in value) + "\n]"
        else:
            text = canonical(value).decode()
        fields.append(f'"{name}": {text}')
    return ("{\n" + ",\n".join(fields) + "\n}\n").encode()


def read(data: bytes) -> Certificate:
    """The certificate in a file, not verified. Raises BadInput when the file is none."""
    try:
        document: Any = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"this is no certificate: it is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadInput(
            f'this is no certificate that this Fleetlift knows: it should say "format": {json.dumps(FORMAT)}'
        )
    try:
        return msgspec.convert(document, Certificate)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadInput(f"this is no whole certificate: {error}") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def first_difference(certificate: Certificate, data: bytes) -> int | None:
    """The line, from 1, where a file is not written as a certificate is; None when it is."""
    right = render(certificate)
    if right == data:
        return None
    there, wanted = data.split(b"\n"), right.split(b"\n")
    for line, (a, b) in enumerate(zip(there, wanted, strict=False), 1):
        if a != b:
            return line
    return min(len(there), len(wanted)) + 1
