"""What a bench promises to measure, and what it measured."""

from typing import Literal

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table. `means`: what is measured; `limit`: what is measured beside it."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    target: float
    means: str = ""
    limit: str = ""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The value of one figure, and of its limit where that could be measured in the same run.

    `invalid` says why the value must not count (the generator was late, the machine was busy); it is then
    shown, and kept with the run, but never in `latest.json`. `notes` are printed below the table.
    """

    name: str
    value: float
    limit: float | None = None
    invalid: str = ""
    notes: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with what was measured, as it is kept with its run. `ratio` is value / limit."""

    name: str
    value: float
    unit: str
    limit: float | None
    ratio: float | None
    better: Literal["higher", "lower"]
    target: float
    limit_is: str = ""
    invalid: str = ""
    notes: tuple[str, ...] = ()

    @property
    def meets(self) -> bool:
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


class BenchFailed(Exception):
    """The measurement shows a broken promise (lost or doubled messages) or could not be made at all."""


def result(figure: Figure, measured: Measured) -> Result:
    """`measured`, with what is known of its figure."""
    limit = measured.limit
    return Result(
        name=figure.name,
        value=measured.value,
        unit=figure.unit,
        limit=limit,
        ratio=measured.value / limit if limit else None,
        better=figure.better,
        target=figure.target,
        limit_is=figure.limit,
        invalid=measured.invalid,
        notes=measured.notes,
    )
