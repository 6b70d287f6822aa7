"""Which keys were touched since they were last found alike, so that a verification need not look at all."""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import msgspec

from fleetlift.core.tenant.changes import Key
from fleetlift.core.tenant.schema import TableName
from fleetlift.tenant.apply import key_texts

TOUCHED_MAX: Final = 200_000

Texts = tuple[str, ...]
"""A key as texts."""


class Touched(msgspec.Struct, frozen=True, kw_only=True):
    """Keys, as texts, of the rows that were written or taken away and not found alike since; a table without
    a key has none, and is named. `all_of_it`: there were too many to be kept, or it is not known which, so
    that everything has to be looked at. `tables`: all that were written to since everything was."""

    keys: Mapping[TableName, tuple[Texts, ...]]
    all_of_it: bool
    tables: frozenset[TableName] = frozenset()


class TouchedKeys:
    """Remembers keys, a bounded number, until it is told that their rows are alike (`leave`).

    They are kept here and not by who compares them, so that a comparison that fails forgets nothing. Before
    `begin` or `all_from_now`, nothing is known: a follower made anew has not seen what came before.
    """

    def __init__(self, keys_max: int = TOUCHED_MAX) -> None:
        self._max = keys_max
        self._keys: dict[TableName, set[Key]] = {}  # since they were last taken
        self._count = 0
        self._over = True
        self._taken: dict[TableName, set[Texts]] = {}
        self._taken_over = False
        self._tables: set[TableName] = set()

    def begin(self) -> None:
        """Nothing was touched before; whatever is from now on will be noted."""
        self.all_from_now()
        self._taken_over = False

    def all_from_now(self) -> None:
        """Everything is looked at from now on. Until `leave` says that it was, everything has to be."""
        self._keys, self._count, self._over = {}, 0, False
        self._taken, self._taken_over = {}, True
        self._tables = set()

    def add(self, table: TableName, keys: Iterable[Key]) -> None:
        """Rows with these keys were touched; a table without a key is noted by none."""
        self._tables.add(table)
        if self._over:
            return
        held = self._keys.setdefault(table, set())
        before = len(held)
        held.update(keys)
        self._count += len(held) - before
        if self._count > self._max:
            self.overflow()

    def overflow(self) -> None:
        """What was touched is not known any more."""
        self._over = True
        self._keys.clear()

    def take(self) -> Touched:
        """All that has to be looked at. It is taken again the next time, but for what `leave` leaves out."""
        for table, keys in self._keys.items():
            self._taken.setdefault(table, set()).update(tuple(key_texts(key)) for key in keys)
        self._taken_over = self._taken_over or self._over or sum(map(len, self._taken.values())) > self._max
        self._keys, self._count, self._over = {}, 0, False
        if self._taken_over:
            self._taken.clear()
        return Touched(
            keys={table: tuple(keys) for table, keys in self._taken.items()},
            all_of_it=self._taken_over,
            tables=frozenset(self._tables),
        )

    def leave(self, keys: Mapping[TableName, Collection[Texts]], *, all_of_it: bool) -> None:
        """What was taken was looked at; this has to be looked at again."""
        self._taken = {} if all_of_it else {table: set(some) for table, some in keys.items()}
        self._taken_over = all_of_it
