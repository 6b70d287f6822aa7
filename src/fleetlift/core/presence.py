"""Who is connected, worked out from events that may come late, twice, in another order, or not at all.

A connection is named by (server, cid). A device is connected while it has at least one: at a take-over the
new connection's event may come before the old one's end, so an end only counts for its own connection.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

CLOSED_REMEMBERED = 10_000


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """One MQTT connection. `since` is Unix seconds."""

    server: str
    cid: int
    device: str
    since: float
    remote: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.server, self.cid


class DevicePresence(msgspec.Struct, frozen=True, kw_only=True):
    """A device's presence: its newest connection, or when and why the last one ended."""

    device: str
    connected: bool
    since: float
    reason: str = ""
    server: str = ""
    cid: int = 0
    remote: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What happened: a device connected (also anew, by a take-over), or its last connection ended."""

    device: str
    connected: bool
    at: float
    reason: str = ""


class Connections:
    """All connections that are known, and what has changed since `take_changes`."""

    def __init__(self, known: Mapping[str, DevicePresence] | None = None) -> None:
        """`known`: what was stored of devices that were connected when last heard of."""
        self._open: dict[tuple[str, int], Connection] = {}
        self._by_device: dict[str, dict[tuple[str, int], Connection]] = {}
        self._closed: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._presence: dict[str, DevicePresence] = {}
        self._changes: list[Change] = []
        for device, was in (known or {}).items():
            if was.connected:
                self._add(
                    Connection(
                        server=was.server, cid=was.cid, device=device, since=was.since, remote=was.remote
                    )
                )

    def opened(self, connection: Connection) -> None:
        """A connection was made. An end that came first has the last word."""
        if connection.key in self._open or connection.key in self._closed:
            return
        self._add(connection)
        self._tell_newest(connection.device)
        self._changes.append(Change(device=connection.device, connected=True, at=connection.since))

    def closed(self, server: str, cid: int, at: float, reason: str) -> None:
        """A connection has ended."""
        self._closed[server, cid] = None
        if len(self._closed) > CLOSED_REMEMBERED:
            self._closed.popitem(last=False)
        gone = self._open.pop((server, cid), None)
        if gone is None:
            return
        rest = self._by_device[gone.device]
        del rest[gone.key]
        if rest:
            self._tell_newest(gone.device)
            return
        del self._by_device[gone.device]
        self._presence[gone.device] = DevicePresence(
            device=gone.device,
            connected=False,
            since=at,
            reason=reason,
            server=server,
            cid=cid,
            remote=gone.remote,
        )
        self._changes.append(Change(device=gone.device, connected=False, at=at, reason=reason))

    def reconcile(
        self, server: str, listed: Iterable[Connection], before: frozenset[tuple[str, int]], at: float
    ) -> None:
        """Take in a server's own list. `before` are the connections that were known before it was asked for.

        What the list lacks has ended, unless it was made while the list was on its way; what is new in it
        was made while nobody listened.
        """
        there = {connection.key: connection for connection in listed}
        for connection in sorted(there.values(), key=lambda c: c.since):
            self.opened(connection)
        for key in before:
            if key[0] == server and key in self._open and key not in there:
                self.closed(*key, at, "unseen")

    def lost_server(self, server: str, at: float) -> None:
        """A server is gone, and all its connections with it."""
        for key in [key for key in self._open if key[0] == server]:
            self.closed(*key, at, "server lost")

    def keys(self) -> frozenset[tuple[str, int]]:
        return frozenset(self._open)

    def servers(self) -> frozenset[str]:
        return frozenset(server for server, _ in self._open)

    def of(self, device: str) -> list[Connection]:
        return list(self._by_device.get(device, {}).values())

    def is_connected(self, device: str) -> bool:
        return device in self._by_device

    def take_changes(self) -> tuple[dict[str, DevicePresence], list[Change]]:
        """Presence of the devices that changed, and what happened, in order; then begins anew."""
        presence, changes = self._presence, self._changes
        self._presence, self._changes = {}, []
        return presence, changes

    def _add(self, connection: Connection) -> None:
        self._open[connection.key] = connection
        self._by_device.setdefault(connection.device, {})[connection.key] = connection

    def _tell_newest(self, device: str) -> None:
        newest = max(self._by_device[device].values(), key=lambda c: (c.since, c.cid))
        self._presence[device] = DevicePresence(
            device=device,
            connected=True,
            since=newest.since,
            server=newest.server,
            cid=newest.cid,
            remote=newest.remote,
        )
