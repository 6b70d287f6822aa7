"""What an agent knows of one of its two links; the sockets behind them are in `links.py`."""

from fleetlift.device.messages import LinkState, Path


class Link:
    """How a link is, since when, and whether it is wanted. Times are the device's own."""

    __slots__ = (
        "attempts",
        "connecting_since",
        "down_since",
        "path",
        "ready",
        "retry_at",
        "state",
        "unwanted_since",
        "wanted",
        "why_down",
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = LinkState.DOWN
        self.wanted = False
        self.ready = False  # up, and (on the new side) subscribed: reports and answers may go
        self.attempts = 0
        self.retry_at = 0.0
        self.connecting_since = 0.0
        self.down_since: float | None = 0.0  # None: it serves, by evidence and not only by being connected
        self.unwanted_since: float | None = None
        self.why_down = ""  # the last time, for the report of a failed try

    def down(self, reason: str, now: float, backoff_s: float) -> None:
        if self.down_since is None:
            self.down_since = now
        if reason:
            self.why_down = reason
        self.state = LinkState.DOWN
        self.ready = False
        self.retry_at = now + backoff_s
        self.attempts += 1
        self.unwanted_since = None

    def retry_now(self, now: float) -> None:
        """What is known of failed attempts no longer counts."""
        self.attempts, self.retry_at = 0, now

    def jumped(self, by_s: float) -> None:
        self.retry_at += by_s
        self.connecting_since += by_s
        if self.down_since is not None:
            self.down_since += by_s
        if self.unwanted_since is not None:
            self.unwanted_since += by_s
