"""A device is connected while it has a connection, whatever the order of the events."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fleetlift.core.presence import Connection, Connections, DevicePresence


def connection(cid: int, device: str = "d", server: str = "s", since: float | None = None) -> Connection:
    return Connection(server=server, cid=cid, device=device, since=cid if since is None else since)


def told(known: Connections) -> list[tuple[str, bool]]:
    return [(c.device, c.connected) for c in known.take_changes()[1]]


def test_a_take_over_is_not_an_absence() -> None:
    """The old connection's end comes after the new one's beginning and does not count."""
    known = Connections()
    known.opened(connection(1))
    known.opened(connection(2))
    known.closed("s", 1, 5.0, "Duplicate Client ID")
    presence, changes = known.take_changes()
    assert (presence["d"].connected, presence["d"].cid) == (True, 2)
    assert [c.connected for c in changes] == [True, True]


def test_the_reason_of_the_last_end_is_kept() -> None:
    known = Connections()
    known.opened(connection(1))
    known.closed("s", 1, 5.0, "Kicked")
    assert known.take_changes()[0]["d"] == DevicePresence(
        device="d", connected=False, since=5.0, reason="Kicked", server="s", cid=1
    )


def test_an_end_that_comes_first_has_the_last_word() -> None:
    known = Connections()
    known.closed("s", 1, 5.0, "Client Closed")
    known.opened(connection(1))
    assert not known.is_connected("d")
    assert told(known) == []


def test_the_servers_list_puts_right_what_was_missed() -> None:
    """Unlisted connections have ended, unknown ones are there; younger than the list stays untouched."""
    known = Connections({"old": DevicePresence(device="old", connected=True, since=1, server="s", cid=1)})
    before = known.keys()
    known.opened(connection(3, "young"))
    known.closed("s", 4, 9.0, "ended while the list was on its way")
    listed = [connection(2, "new"), connection(4, "ended")]
    known.reconcile("s", listed, before, 9.0)
    assert [known.is_connected(d) for d in ("old", "new", "young", "ended")] == [False, True, True, False]


def test_a_lost_server_takes_only_its_own_connections() -> None:
    known = Connections()
    known.opened(connection(1, "a", "s"))
    known.opened(connection(1, "b", "t"))
    known.lost_server("s", 5.0)
    assert (known.is_connected("a"), known.is_connected("b")) == (False, True)
    assert known.servers() == {"t"}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), max_size=12), st.randoms())
def test_any_order_of_events_ends_in_the_same_presence(
    lives: list[tuple[str, bool]], order: random.Random
) -> None:
    """Each connection opens, and perhaps ends; shuffled events tell the truth in the end."""
    known = Connections()
    events = [(True, cid, d) for cid, (d, _) in enumerate(lives)]
    events += [(False, cid, d) for cid, (d, ends) in enumerate(lives) if ends]
    order.shuffle(events)
    for opens, cid, device in events:
        if opens:
            known.opened(connection(cid, device))
        else:
            known.closed("s", cid, cid + 0.5, "gone")
    for device in "ab":
        assert known.is_connected(device) == any(d == device and not ends for d, ends in lives)
        stored = known.take_changes()[0].get(device) if device == "a" else None
        if stored is not None:
            assert stored.connected == known.is_connected(device)
