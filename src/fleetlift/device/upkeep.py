"""The upkeep of the two links: made while they are wanted, given up when silent, ended when idle."""

from collections.abc import Callable, Mapping

from fleetlift.device.actions import Actions
from fleetlift.device.commands import Commands
from fleetlift.device.link import Link
from fleetlift.device.messages import Close, ConnectNew, ConnectOld, LinkState, Path
from fleetlift.device.moves import Moves
from fleetlift.device.outbox import Outbox
from fleetlift.device.settings import AgentSettings


class Upkeep:
    """Connects, backs off, lingers and closes; a link that goes down says so to those who use it."""

    def __init__(
        self,
        settings: AgentSettings,
        actions: Actions,
        outbox: Outbox,
        commands: Commands,
        moves: Moves,
        links: Mapping[Path, Link],
        chance: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._actions = actions
        self._outbox = outbox
        self._commands = commands
        self._moves = moves
        self._links = links
        self._chance = chance

    def tend(self, link: Link, now: float) -> None:
        """Make or end the link as it is wanted."""
        if link.wanted:
            link.unwanted_since = None
            self._keep(link, now)
        elif link.state is not LinkState.DOWN:
            if link.unwanted_since is None:
                link.unwanted_since = now
            busy = link.ready and (self._moves.await_disk or self._commands.needs(link.path))
            if not busy or now - link.unwanted_since >= self._settings.linger_s:
                self.close(link, "", now)
                link.retry_now(now)

    def _keep(self, link: Link, now: float) -> None:
        s = self._settings
        if link.state is LinkState.DOWN:
            if now >= link.retry_at:
                self._connect(link, now)
        elif link.state is LinkState.CONNECTING:
            if now - link.connecting_since >= s.connect_within_s:
                self.close(link, f"no answer within {s.connect_within_s:g} s", now)
        elif (since := self._awaits_since(link)) is not None and now - since >= s.acked_within_s:
            # Lost since it last owed something, not since that was noticed.
            if link.down_since is None:
                link.down_since = since
            self.close(link, f"no acknowledgement within {s.acked_within_s:g} s", now)

    def _connect(self, link: Link, now: float) -> None:
        if link.path is Path.OLD:
            self._actions.out.append(ConnectOld())
        else:
            place = self._moves.place(link.attempts)
            self._actions.out.append(ConnectNew(place.endpoint, place.credential))
        link.state, link.connecting_since = LinkState.CONNECTING, now

    def close(self, link: Link, reason: str, now: float) -> None:
        self._actions.out.append(Close(link.path))
        self.down(link, reason, now)

    def down(self, link: Link, reason: str, now: float) -> None:
        if link.state is LinkState.DOWN:
            return
        link.down(reason, now, self._backoff_s(link.attempts))
        self._outbox.lost(link.path)
        self._commands.lost(link.path)

    def _backoff_s(self, attempts: int) -> float:
        """Doubling, at most `backoff_max_s`, spread over half to the whole of it."""
        s = self._settings
        return min(s.backoff_max_s, s.backoff_s * 2.0 ** min(attempts, 20)) * (0.5 + self._chance() / 2)

    def _awaits_since(self, link: Link) -> float | None:
        """Since when the other end has owed us something: an acknowledgement, or the subscription."""
        subscribing = link.path is Path.NEW and not link.ready
        since = (
            link.connecting_since if subscribing else None,
            self._outbox.awaits_since(link.path),
            self._commands.awaits_since(link.path),
        )
        return min((at for at in since if at is not None), default=None)

    def deadline(self, at: float) -> float:
        """When `tend` has something to do, if nothing happens before; at the latest `at`."""
        s = self._settings
        for link in self._links.values():
            if link.state is LinkState.CONNECTING:
                at = min(at, link.connecting_since + s.connect_within_s)
            elif link.state is LinkState.DOWN and link.wanted:
                at = min(at, link.retry_at)
            elif link.wanted and (since := self._awaits_since(link)) is not None:
                at = min(at, since + s.acked_within_s)
            if link.unwanted_since is not None:
                at = min(at, link.unwanted_since + s.linger_s)
        return at
