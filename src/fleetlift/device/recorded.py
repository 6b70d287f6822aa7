"""The recorded vehicles that play a fleet: 57 real trips, each in its own rhythm (`data/README.md`)."""

import gzip
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

EXTRACT: Final = Path(__file__).parent / "data" / "vehicles.jsonl.gz"
CHANNELS: Final = {"leon": "obd", "twizy": "can"}

HEALTHY, MISBEHAVING, NOT_UPDATABLE = 3, 4, 2
"""Hardware revisions of the demo's fleet: 4 misbehaves on the new side, 2 cannot be updated at all."""


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """One recording: `times_s[i]` since its start, `bodies[i]` the record as a JSON object."""

    name: str
    model: str  # leon | twizy
    times_s: tuple[float, ...]
    bodies: tuple[bytes, ...]

    @property
    def channel(self) -> str:
        return CHANNELS[self.model]

    def play(self, *, speed: float = 1.0) -> Iterator[tuple[float, bytes]]:
        """Endlessly (seconds since the start, body): when the trip is over it starts again a second later."""
        lap_s, start_s = self.times_s[-1] + 1.0, 0.0
        while True:
            for at_s, body in zip(self.times_s, self.bodies, strict=True):
                yield (start_s + at_s) / speed, body
            start_s += lap_s


class Vehicle(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the recorded fleet."""

    device: str
    trip: Trip
    attributes: dict[str, Any]


@lru_cache(maxsize=1)
def trips() -> tuple[Trip, ...]:
    """Every recorded trip, in the order of their start."""
    found = []
    with gzip.open(EXTRACT, "rb") as lines:
        for line in lines:
            head = msgspec.json.decode(line)
            times, bodies = [], []
            for raw in islice(lines, head["records"]):
                record = msgspec.json.decode(raw)
                times.append(record.pop("t_ms") / 1000)
                bodies.append(msgspec.json.encode(record))
            name = head["trip"]
            model = name.split("-")[1]
            found.append(Trip(name=name, model=model, times_s=tuple(times), bodies=tuple(bodies)))
    return tuple(found)


def vehicles(count: int = 57) -> list[Vehicle]:
    """`count` vehicles; beyond the 57 recorded ones, trips play again under other names (`…-r2`)."""
    recorded = trips()
    fleet = []
    for i in range(count):
        trip, round_ = recorded[i % len(recorded)], i // len(recorded) + 1
        device = trip.name if round_ == 1 else f"{trip.name}-r{round_}"
        fleet.append(Vehicle(device=device, trip=trip, attributes=attributes_of(device, trip.model)))
    return fleet


def attributes_of(device: str, model: str) -> dict[str, Any]:
    """Made-up hardware, always the same for the same name: a fifth misbehaves, a tenth is old."""
    chance = int.from_bytes(hashlib.blake2b(device.encode(), digest_size=4).digest()) / 2**32
    hardware = MISBEHAVING if chance < 0.2 else NOT_UPDATABLE if chance < 0.3 else HEALTHY
    return {
        "model": model,
        "hardware": hardware,
        "firmware": "1.9" if hardware == NOT_UPDATABLE else "2.4",
        "updatable": hardware != NOT_UPDATABLE,
    }
