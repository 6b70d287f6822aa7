"""Recorded vehicles: real trips, played again and again, each standing for one device.

`device/data/README.md` names their sources and licence (CC BY 4.0).
"""

import gzip
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from fleetlift.core.errors import BadInput

PAUSE_MS = 1_000  # between the end of a trip and its start over
HEALTHY, MISBEHAVING, FIXED = 3, 4, 2  # hardware revisions; FIXED is too old to be updated


class Trip(msgspec.Struct, frozen=True):
    """One recording: at `times_ms[i]` after its start the vehicle sent `bodies[i]`, a JSON object."""

    name: str
    times_ms: tuple[int, ...]
    bodies: tuple[bytes, ...]

    @property
    def model(self) -> str:
        return self.name.split("-")[1]

    @property
    def channel(self) -> str:
        """What the vehicle measures by: `obd` (Leon) or `can` (Twizy)."""
        return "obd" if self.model == "leon" else "can"

    @property
    def period_ms(self) -> int:
        return self.times_ms[-1] + PAUSE_MS


class Vehicle(msgspec.Struct, frozen=True):
    """A device of the recorded fleet."""

    id: str
    trip: Trip
    attributes: dict[str, Any]

    @property
    def updatable(self) -> bool:
        return bool(self.attributes["updatable"])


class _Head(msgspec.Struct):
    device: str
    records: int


@cache
def trips() -> tuple[Trip, ...]:
    """All recorded trips, by name."""
    path = files("fleetlift.device") / "data" / "vehicles.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    head, record = msgspec.json.Decoder(_Head), msgspec.json.Decoder(tuple[int, msgspec.Raw])
    found, at = [], 0
    while lines[at]:
        trip = head.decode(lines[at])
        rows = [record.decode(line) for line in lines[at + 1 : at + 1 + trip.records]]
        found.append(Trip(trip.device, tuple(t for t, _ in rows), tuple(bytes(body) for _, body in rows)))
        at += 1 + trip.records
    return tuple(found)


def revision(device: str) -> int:
    """A hardware revision, the same at every run: 4 for about 20 % of names, 2 for about 10 %, else 3."""
    share = (
        int.from_bytes(hashlib.blake2b(device.encode(), digest_size=8, salt=b"hw167").digest(), "big") / 2**64
    )
    if share < 0.2:
        return MISBEHAVING
    return FIXED if share < 0.3 else HEALTHY


def vehicles(count: int | None = None) -> tuple[Vehicle, ...]:
    """The first `count` vehicles; None: one a trip. Beyond that trips are used again under new names."""
    recorded = trips()
    count = len(recorded) if count is None else count
    if count < 1:
        raise BadInput(f"{count} devices: ask for at least one")
    fleet = []
    for n in range(count):
        again, index = divmod(n, len(recorded))
        trip = recorded[index]
        name = f"{trip.name}-r{again + 1}" if again else trip.name
        hardware = revision(name)
        attributes = {
            "model": trip.model,
            "hardware": hardware,
            "firmware": "1.9.0" if hardware == FIXED else "2.4.1",
            "updatable": hardware != FIXED,
        }
        fleet.append(Vehicle(name, trip, attributes))
    return tuple(fleet)


def played(trip: Trip) -> Iterator[tuple[float, bytes]]:
    """The trip over and over: (seconds since the first start, body), for ever."""
    lap = 0
    while True:
        start_ms = lap * trip.period_ms
        for t_ms, body in zip(trip.times_ms, trip.bodies, strict=True):
            yield (start_ms + t_ms) / 1000, body
        lap += 1
