"""A power cut of the new side takes what it acknowledged last; the device still has it."""

import pytest
from agent_world import NEW, OLD, World

from fleetlift.core.orders import CommandsFlag, Flags, LinkFlag, TelemetryFlag
from fleetlift.device.agent import AgentSettings
from fleetlift.device.messages import TelemetryAcked

ON_NEW = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)


def moved(settings: AgentSettings) -> World:
    w = World(settings=settings)
    w.run(1)
    w.move(ON_NEW, new_lost_limit_s=600)
    w.run(5)
    return w


def drive(w: World, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        w.produce(1)
        w.run(0.1)


@pytest.mark.parametrize("lost_s", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("idle_s", [0.0, 30.0])
def test_what_the_new_side_forgot_in_a_power_cut_is_sent_again(lost_s: float, idle_s: float) -> None:
    """Whether the loss is noticed at once or only half a minute later."""
    w = moved(AgentSettings())
    drive(w, 5)
    on_disk = dict(w.sides[NEW].stored)
    drive(w, lost_s)
    assert w.agent.outbox_depth == 0, "all of it was acknowledged"
    forgotten = w.sides[NEW].stored.keys() - on_disk.keys()
    assert forgotten
    w.set_state(NEW, "away")
    w.sides[NEW].stored.clear()
    w.sides[NEW].stored.update(on_disk)
    w.run(idle_s)
    w.set_state(NEW, "ok")
    w.run(30)
    assert not w.lost() and w.drained()
    assert forgotten <= w.sides[NEW].stored.keys()


def test_without_keeping_it_is_gone() -> None:
    """What the test above would show of an agent that lets go at once: so it can fail."""
    w = moved(AgentSettings(keep_acked_s=0.0))
    drive(w, 5)
    on_disk = dict(w.sides[NEW].stored)
    drive(w, 0.5)
    w.set_state(NEW, "away")
    w.sides[NEW].stored.clear()
    w.sides[NEW].stored.update(on_disk)
    w.set_state(NEW, "ok")
    w.run(30)
    assert w.lost()


def test_what_was_acknowledged_leaves_the_disk_once_the_side_was_seen_alive_after_it() -> None:
    """A second's worth stays, and no more; a full outbox lets go of it before it refuses anything."""
    w = moved(AgentSettings(outbox_max=100))
    drive(w, 20)
    assert w.agent.outbox_depth == 0
    assert 5 <= len(w.disk.saved().outbox) <= 15
    w.produce(100)
    assert (w.agent.refused, w.agent.shed) == (0, 0)
    w.run(5)
    assert not w.lost() and w.drained()


def test_a_late_word_of_the_old_side_counts_no_message_twice() -> None:
    """Sent to both, then asked of the new side alone: the old one may still acknowledge what is kept."""
    w = World()
    w.run(1)
    w.move(Flags(telemetry=TelemetryFlag.NEW))
    w.run(5)
    drive(w, 1)
    kept = tuple((entry.channel, entry.seq) for entry in w.disk.saved().outbox)
    assert kept
    assert w.agent.outbox_depth == 0
    w.agent.on(TelemetryAcked(OLD, kept), w.now)
    drive(w, 5)
    assert w.agent.outbox_depth == 0
    assert not w.lost() and w.drained()


def test_the_old_side_is_trusted_at_once() -> None:
    """It acknowledges what is on its disk; nothing is kept for it."""
    w = World()
    w.run(1)
    drive(w, 5)
    w.run(1)
    assert w.disk.saved().outbox == ()
    assert len(w.sides[OLD].stored) >= 50
