"""The network between devices and sides: ordered connections that are slow, stall, break, or die on one end.

A connection is like TCP: what is sent arrives once and in order, or not at all when the connection ends
first. Which end learns of the end, and when, is what faults are about.
"""

import random
from collections.abc import Callable
from typing import Any, Protocol

from fleetlift.core.command import Path
from fleetlift.device.messages import Connected, Event, Lost, Refused
from fleetlift.simulate.clock import Clock

DEVICE_SILENT_S = {Path.OLD: 45.0, Path.NEW: 30.0}  # after which a device gives up a link that says nothing
SIDE_SILENT_S = {Path.OLD: 75.0, Path.NEW: 45.0}  # and a side


class Device(Protocol):
    id: str

    def arrived(self, wire: "Wire", event: Event) -> None: ...


class Server(Protocol):
    """The listening end of a side. `up` False: nobody listens; `hanging`: it accepts and says nothing."""

    up: bool
    hanging: bool

    def opened(self, wire: "Wire", credential: str) -> None: ...

    def closed(self, wire: "Wire", reason: str) -> None: ...


class Link:
    """The way of one device to one side, with what is wrong with it now."""

    def __init__(
        self, clock: Clock, device: Device, path: Path, server: Server, chance: random.Random
    ) -> None:
        self.clock = clock
        self.device = device
        self.path = path
        self.server = server
        self.chance = chance
        self.latency_s = 0.01 + 0.08 * chance.random()
        self.jitter_s = 0.05 * chance.random()
        self.refuses = False
        self.stalled = False
        self.held: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.wires: list[Wire] = []

    def delay(self) -> float:
        return self.latency_s + self.jitter_s * self.chance.random()

    def connect(self, credential: str) -> "Wire":
        wire = Wire(self)
        self.wires = [w for w in self.wires if w.device_has or w.side_has]
        self.wires.append(wire)
        if self.refuses or not self.server.up:
            wire.side_has = False
            self.clock.after(self.delay(), wire.at_device, Refused(self.path, "connection refused"))
        elif self.stalled:
            self.held.append((self._arrive, (wire, credential)))
        else:
            self.clock.after(self.delay(), self._arrive, wire, credential)
        return wire

    def _arrive(self, wire: "Wire", credential: str) -> None:
        if not wire.side_has:
            return
        if not self.server.up:
            wire.side_has = False
            wire.down(Refused(self.path, "connection refused"))
        elif not self.server.hanging:
            self.server.opened(wire, credential)

    # -- faults ------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Every connection breaks, and both ends learn of it."""
        for wire in self.wires:
            wire.cut("connection reset")

    def stall(self) -> None:
        """Nothing gets through, and nobody is told; TCP sends it again when the way is free."""
        self.stalled = True
        for wire in self.wires:
            wire.go_silent()

    def unstall(self) -> None:
        self.stalled = False
        held, self.held = self.held, []
        for call, args in held:
            self.clock.after(self.latency_s, call, *args)

    def half_open(self, *, up: bool) -> None:
        """Of the open connections one direction is dead for good: to the side (`up`), or to the device."""
        for wire in self.wires:
            if up:
                wire.mute = True
            else:
                wire.deaf = True
            wire.go_silent()


class Wire:
    """One connection, as its two ends have it."""

    __slots__ = (
        "deaf",
        "device_has",
        "down_at",
        "link",
        "mute",
        "session",
        "side_has",
        "subscribed",
        "up_at",
    )

    def __init__(self, link: Link) -> None:
        self.link = link
        self.device_has = self.side_has = True
        self.mute = self.deaf = False
        self.subscribed = False
        self.session = False  # signed in, and not taken over
        self.up_at = self.down_at = 0.0

    def up(self, call: Callable[..., object], *args: Any) -> None:
        """To the side: `call(wire, *args)` there, unless the connection has ended for the side by then."""
        link = self.link
        if self.mute:
            return
        if link.stalled:
            link.held.append((self._at_side, (call, *args)))
            return
        when = link.clock.now + link.latency_s + link.jitter_s * link.chance.random()
        self.up_at = when = when if when > self.up_at else self.up_at
        link.clock.at(when, self._at_side, call, *args)

    def _at_side(self, call: Callable[..., object], *args: Any) -> None:
        if self.side_has and not self.mute:
            if self.link.stalled:
                self.link.held.append((self._at_side, (call, *args)))
            elif not self.link.server.hanging:
                call(self, *args)

    def down(self, event: Event) -> None:
        """To the device."""
        link = self.link
        if self.deaf:
            return
        if link.stalled:
            link.held.append((self.at_device, (event,)))
            return
        when = link.clock.now + link.latency_s + link.jitter_s * link.chance.random()
        self.down_at = when = when if when > self.down_at else self.down_at
        link.clock.at(when, self.at_device, event)

    def at_device(self, event: Event) -> None:
        if not self.device_has or self.deaf:
            return
        if self.link.stalled and not isinstance(event, Refused):
            self.link.held.append((self.at_device, (event,)))
            return
        if isinstance(event, Lost | Refused):
            self.device_has = False
        self.link.device.arrived(self, event)

    def accepted(self, time_s: float | None, *, session_present: bool = False) -> None:
        self.session = True
        self.down(Connected(self.link.path, session_present, time_s))

    # -- ends --------------------------------------------------------------------------------------------

    def closed_by_device(self) -> None:
        """In order: the side takes what was sent before."""
        self.device_has = False
        self.up(self._fin, "said good-bye")

    def _fin(self, wire: "Wire", reason: str) -> None:
        self.end_at_side(reason)

    def died_with_device(self, *, power: bool) -> None:
        """The device's process is gone (the other end is told), or its power (it is not)."""
        self.device_has = False
        if power:
            self.mute = True
            self.link.clock.after(SIDE_SILENT_S[self.link.path], self.end_at_side, "silent")
        else:
            self.up(self._fin, "connection reset")

    def closed_by_side(self, reason: str) -> None:
        self.side_has = self.session = False
        self.down(Lost(self.link.path, reason))

    def cut(self, reason: str) -> None:
        self.end_at_side(reason)
        self.end_at_device(reason)

    def end_at_side(self, reason: str) -> None:
        if self.side_has:
            self.side_has = self.session = False
            self.link.server.closed(self, reason)

    def end_at_device(self, reason: str) -> None:
        if self.device_has:
            self.device_has = False
            self.link.device.arrived(self, Lost(self.link.path, reason))

    def go_silent(self) -> None:
        """From here on each end waits for its keep-alive to give up."""
        path, clock = self.link.path, self.link.clock
        clock.after(DEVICE_SILENT_S[path], self._still_silent, self.end_at_device)
        clock.after(SIDE_SILENT_S[path], self._still_silent, self.end_at_side)

    def _still_silent(self, end: Callable[[str], None]) -> None:
        if self.link.stalled or self.mute or self.deaf:
            end("nothing heard")
