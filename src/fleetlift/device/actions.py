"""What is to be done about one event, as the parts of an agent add to it: actions, tokens, the timer."""

import math

from fleetlift.device.messages import Action, Change, Persist, SetTimer


class Actions:
    """`out` is what the event at hand asks for, in order. `token` is the newest given to the disk, `stored`
    the newest that the disk has taken, `timer_at` when the shell will feed the next Timer."""

    __slots__ = ("out", "stored", "timer_at", "token")

    def __init__(self) -> None:
        self.out: list[Action] = []
        self.token = 0
        self.stored = 0
        self.timer_at = math.inf

    def persist(self, *changes: Change, wait: bool = True) -> int:
        """What must not be done before the changes are on disk waits for the token that this returns."""
        self.token += 1
        self.out.append(Persist(self.token, changes, wait))
        return self.token

    def arm(self, at: float) -> None:
        if at < self.timer_at:
            self.timer_at = at
            self.out.append(SetTimer(at))
