"""Which rows differ between two databases that both change meanwhile: the decisions, without I/O."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import TypeVar

import msgspec

from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.verify_report import Key, Kind

Digest = tuple[int, int]
"""128 bits of one row: its canonical form hashed with two seeds."""


class Sum(msgspec.Struct, frozen=True, kw_only=True):
    """Some rows together: how many, and the sums of both halves of their digests (in any order)."""

    rows: int = 0
    first: int = 0
    second: int = 0


def parts_that_differ(source: Mapping[int, Sum], target: Mapping[int, Sum]) -> tuple[int, ...]:
    """Of a chunk cut in parts by each row's digest: those that are not alike, ascending."""
    return tuple(
        sorted(n for n in source.keys() | target.keys() if source.get(n, Sum()) != target.get(n, Sum()))
    )


def suspects(source: Iterable[tuple[Key, Digest]], target: Iterable[tuple[Key, Digest]]) -> list[Key]:
    """Keys whose rows are not the same ones, equally often, on both sides; in the order first met."""
    mine, theirs = Counter(source), Counter(target)
    keys: dict[Key, None] = {}
    for key, digest in [*mine, *theirs]:
        if mine[key, digest] != theirs[key, digest]:
            keys[key] = None
    return list(keys)


class SourceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row as it was on the source. `version` changes with every write to it; "" when it was not there.

    `digest` is None when it was not there; `owned`: by the tenant, or all rows of its table come.
    """

    digest: Digest | None = None
    owned: bool = False
    version: str = ""


class TargetRow(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one key on the target (more than one where no index forbids it), and whether a row there
    refers to it by an edge that brings it along."""

    digests: tuple[Digest, ...] = ()
    needed: bool = False


class Verdict(StrEnum):
    SAME = "same"
    DIFFERENT = "different"
    CHANGING = "changing"


def wanted(row: SourceRow, *, brought: bool) -> tuple[Digest, ...]:
    """What the target must have of it; `brought`: it would come along as a shared row."""
    return (row.digest,) if row.digest is not None and (row.owned or brought) else ()


def judged(
    before: SourceRow,
    target: TargetRow,
    after: SourceRow,
    *,
    brought: bool,
    between: AbstractSet[Digest | None] = frozenset(),
) -> Verdict:
    """Whether `target`, read between `before` and `after` with all of before applied, is right.

    A target that shows any state which the source had from `before` on is right. It is wrong only when the
    source stood still; else nothing is said. `between`: digests seen meanwhile (None: the row was gone).
    """
    if target.digests in (wanted(before, brought=brought), wanted(after, brought=brought)):
        return Verdict.SAME
    if len(target.digests) == 1 and target.digests[0] in between:
        return Verdict.SAME
    if not target.digests and None in between:
        return Verdict.SAME
    if before == after:
        return Verdict.DIFFERENT
    return Verdict.CHANGING


def kind_of(source: SourceRow, target: TargetRow, *, brought: bool, part: Part) -> Kind:
    """What is wrong with a row that is judged different.

    A row that is left over in a table of shared rows only, and still is on the source, belongs to nobody
    else: surplus. In a table whose rows tenants own it would be another tenant's: foreign.
    """
    want = wanted(source, brought=brought)
    if not want:
        left_over = part is Part.SHARED and source.digest is not None and len(target.digests) == 1
        return Kind.SURPLUS if left_over else Kind.FOREIGN
    if not target.digests:
        return Kind.MISSING
    return Kind.DOUBLED if len(target.digests) > 1 else Kind.DIFFERING


def kind_of_count(source: int, target: int) -> Kind | None:
    """What is wrong with a row of a table without a key that is there so many times."""
    if source == target:
        return None
    if target < source:
        return Kind.MISSING
    return Kind.DOUBLED if source else Kind.FOREIGN


Node = TypeVar("Node", bound=Hashable)


def reaching(roots: AbstractSet[Node], refers_to: Mapping[Node, Iterable[Node]]) -> set[Node]:
    """The nodes from which `refers_to` leads to a root, roots included; a mere cycle leads nowhere."""
    referred_by: dict[Node, list[Node]] = {}
    for node, parents in refers_to.items():
        for parent in parents:
            referred_by.setdefault(parent, []).append(node)
    found = set(roots)
    frontier = list(roots)
    while frontier:
        for child in referred_by.get(frontier.pop(), ()):
            if child not in found:
                found.add(child)
                frontier.append(child)
    return found
