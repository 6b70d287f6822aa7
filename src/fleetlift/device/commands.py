"""The memory of commands: each is executed at most once, and answered until a side has taken the answer."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from fleetlift.core.command import BROUGHT_BY
from fleetlift.core.identity import is_replay_id
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag
from fleetlift.device.actions import Actions
from fleetlift.device.clock import SideClock
from fleetlift.device.link import Link
from fleetlift.device.messages import (
    AnswerAcked,
    AnswerCommand,
    AnswerStatus,
    Change,
    CommandFinished,
    CommandForgotten,
    CommandKept,
    CommandReceived,
    CommandRecord,
    Execute,
    LinkState,
    Path,
)
from fleetlift.device.settings import AgentSettings

_EXECUTES: Final = {
    Path.OLD: frozenset({CommandsFlag.OLD, CommandsFlag.DRY_RUN, CommandsFlag.BOTH}),
    Path.NEW: frozenset({CommandsFlag.BOTH, CommandsFlag.NEW}),
}


class Commands:
    """Which commands have come, what became of them, and which answers each path still owes its side."""

    def __init__(
        self,
        settings: AgentSettings,
        actions: Actions,
        clock: SideClock,
        links: Mapping[Path, Link],
        judge: Callable[[str, bytes], str | None],
    ) -> None:
        self.duplicates = 0
        self.asked_time = False  # since the new side was connected, and it has not answered yet
        self._settings = settings
        self._actions = actions
        self._clock = clock
        self._links = links
        self._judge = judge
        self._known: dict[str, CommandRecord] = {}
        self._executing: set[str] = set()  # until the outcome is stored
        self._early: list[CommandReceived] = []  # came before the new side has told its time
        self._begun: deque[tuple[int, CommandReceived]] = deque()  # (token, command): executed once stored
        self._outcomes: deque[tuple[int, str]] = deque()  # (token, command id): answered once stored
        self._by_both: set[str] = set()  # ids of which a copy has come by the second path as well
        # By path and command id; with the time at which the answer was sent.
        self._owed: dict[Path, dict[str, tuple[AnswerStatus, bytes, float | None]]] = {
            path: {} for path in links
        }

    def started(self, saved: Iterable[CommandRecord]) -> None:
        interrupted: list[Change] = []
        for command in saved:
            if command.status is None:
                # Begun, and whether it was done nobody knows: it is never begun again.
                command = msgspec.structs.replace(
                    command,
                    status=AnswerStatus.FAILED,
                    detail=_detail("INTERRUPTED", "the device restarted while it executed this command"),
                )
                interrupted.append(CommandKept(command))
            self._known[command.id] = command
            if not command.answered and command.status is not None:
                self._owed[command.path][command.id] = (command.status, command.detail, None)
        if interrupted:
            self._actions.persist(*interrupted, wait=False)

    # --- received ---

    def received(self, event: CommandReceived, flag: CommandsFlag, now: float) -> None:
        path = event.path
        if path is Path.NEW and self._awaits_time(now):
            self._early.append(event)
            return
        expired = self._clock.time(now) > event.expires_at
        if event.replayed or is_replay_id(event.id):
            # Before all else: no flag makes a replayed command a real one, and its probe is no evidence.
            self._answer_replayed(event, expired)
            return
        if event.name == PROBE_COMMAND:
            self._answer(path, event.id, AnswerStatus.EXPIRED if expired else AnswerStatus.SUCCEEDED)
            return
        if event.dry_run or (path is Path.NEW and flag is CommandsFlag.DRY_RUN):
            if expired:
                self._answer(path, event.id, AnswerStatus.EXPIRED)
            elif (why := self._judge(event.name, event.params)) is None:
                self._answer(path, event.id, AnswerStatus.WOULD_EXECUTE)
            else:
                self._answer(path, event.id, AnswerStatus.WOULD_REFUSE, _detail("WOULD_REFUSE", why))
            return
        if (known := self._known.get(event.id)) is not None:
            self._known_again(path, known)
            return
        if expired:
            self._answer(path, event.id, AnswerStatus.EXPIRED)
            return
        if flag not in _EXECUTES[path]:
            text = f"this device takes commands as {flag.value!r}, so not by the {path.value} side"
            self._answer(path, event.id, AnswerStatus.FAILED, _detail("WRONG_SIDE", text))
            return
        if len(self._executing) >= self._settings.executing_max:
            text = f"{len(self._executing)} commands are being executed; send it again later"
            self._answer(path, event.id, AnswerStatus.FAILED, _detail("BUSY", text))
            return
        kept = CommandRecord(id=event.id, path=path, at=self._clock.time(now), expires_at=event.expires_at)
        self._known[event.id] = kept
        self._executing.add(event.id)
        self._begun.append((self._actions.persist(CommandKept(kept)), event))

    def _answer_replayed(self, event: CommandReceived, expired: bool) -> None:
        if expired:
            self._answer(event.path, event.id, AnswerStatus.EXPIRED)
        elif (why := self._judge(event.name, event.params)) is None:
            text = "a replayed command is never executed"
            self._answer(event.path, event.id, AnswerStatus.WOULD_EXECUTE, _detail("REPLAYED", text))
        else:
            self._answer(event.path, event.id, AnswerStatus.WOULD_REFUSE, _detail("REPLAYED", why))

    def _known_again(self, path: Path, known: CommandRecord) -> None:
        """A second copy: by the same path it gets the first one's answer again, by the other `duplicate`,
        unless this is the path by which the outcome has to go now."""
        self.duplicates += 1
        if known.path is not path:
            self._by_both.add(known.id)
            if self._closed(known.path) and not known.answered:
                if known.id in self._executing:
                    self._acknowledge(path, known.id)
                return
            text = f"the first copy came by the {known.path.value} side"
            self._answer(path, known.id, AnswerStatus.DUPLICATE, _detail("DUPLICATE", text))
        elif known.status is not None and known.id not in self._executing:
            self._answer(path, known.id, known.status, known.detail)
        else:
            self._acknowledge(path, known.id)

    def _awaits_time(self, now: float) -> bool:
        """Whether the new side is about to tell its time: what waited there for the device comes before."""
        new = self._links[Path.NEW]
        return (
            self.asked_time
            and not self._clock.known
            and new.state is LinkState.UP
            and now - new.connecting_since < self._settings.acked_within_s
            and len(self._early) < self._settings.owed_max
        )

    def judge_early(self, flag: CommandsFlag, now: float) -> None:
        """Once the time is known, or will not be: decide on what came before."""
        if self._early and not self._awaits_time(now):
            early, self._early = self._early, []
            for event in early:
                self.received(event, flag, now)

    # --- begun, finished ---

    @property
    def await_disk(self) -> bool:
        return bool(self._begun or self._outcomes)

    def stored(self) -> None:
        """The disk has taken everything up to the newest stored token."""
        stored = self._actions.stored
        while self._begun and self._begun[0][0] <= stored:
            self._execute(self._begun.popleft()[1])
        while self._outcomes and self._outcomes[0][0] <= stored:
            self._tell_outcome(self._outcomes.popleft()[1])

    def stored_alone(self, token: int) -> None:
        """A full disk takes no telemetry, but it has taken this: what waited for it alone goes on."""
        for begun in [one for one in self._begun if one[0] == token]:
            self._begun.remove(begun)
            self._execute(begun[1])
        for outcome in [one for one in self._outcomes if one[0] == token]:
            self._outcomes.remove(outcome)
            self._tell_outcome(outcome[1])

    def _execute(self, event: CommandReceived) -> None:
        self._acknowledge(event.path, event.id)
        self._actions.out.append(Execute(event.id, event.name, event.params))

    def finished(self, event: CommandFinished) -> None:
        known = self._known.get(event.id)
        if known is None or known.status is not None:
            return
        status = AnswerStatus.SUCCEEDED if event.ok else AnswerStatus.FAILED
        done = msgspec.structs.replace(known, status=status, detail=event.detail)
        self._known[event.id] = done
        self._outcomes.append((self._actions.persist(CommandKept(done)), event.id))

    def _tell_outcome(self, id_: str) -> None:
        done = self._known[id_]
        self._executing.discard(id_)
        if done.status is not None:
            self._answer(done.path, id_, done.status, done.detail)

    # --- answers ---

    def _acknowledge(self, path: Path, id_: str) -> None:
        """Said once, if the path is there: only final answers are owed."""
        if self._links[path].ready:
            self._actions.out.append(AnswerCommand(path, id_, AnswerStatus.ACKNOWLEDGED, b"{}"))

    def _answer(self, path: Path, id_: str, status: AnswerStatus, detail: bytes = b"{}") -> None:
        """Owe a final answer until the side has acknowledged it; `send_owed` sends it."""
        owed = self._owed[path]
        owed.pop(id_, None)
        if len(owed) >= self._settings.owed_max:
            del owed[next(iter(owed))]
        owed[id_] = (status, detail, None)

    def send_owed(self, link: Link, now: float) -> None:
        if not link.ready:
            return
        owed = self._owed[link.path]
        for path in self._owed:
            if path is not link.path and self._closed(path):
                self._take_over(path, link.path)
        for id_, (status, detail, sent_at) in owed.items():
            if sent_at is not None:
                continue
            owed[id_] = (status, detail, now)
            self._actions.out.append(AnswerCommand(link.path, id_, status, detail))

    def _closed(self, path: Path) -> bool:
        """Whether a path is down and stays so: what is owed by it is not taken there any more."""
        link = self._links[path]
        return link.state is LinkState.DOWN and not link.wanted

    def _take_over(self, closed: Path, path: Path) -> None:
        """Owe outcomes by the path that is left. An old side knows only the commands that it has sent."""
        for id_, (status, _, _) in list(self._owed[closed].items()):
            known = self._known.get(id_)
            if known is None or known.status is not status:
                continue  # an answer that speaks of a copy, and says nothing of what was done
            if path is Path.NEW or path is known.path or id_ in self._by_both:
                del self._owed[closed][id_]
                self._answer(path, id_, status, _outcome(known, path))

    def answer_acked(self, event: AnswerAcked) -> bool:
        """A side has an answer. True: it was that to a probe of the new side."""
        owed = self._owed[event.path].get(event.id)
        if owed is None or owed[0] is not event.status:
            return False
        del self._owed[event.path][event.id]
        known = self._known.get(event.id)
        if known is not None and known.status is owed[0] and owed[1] == _outcome(known, event.path):
            if not known.answered:
                self._known[event.id] = known = msgspec.structs.replace(known, answered=True)
                self._actions.persist(CommandKept(known), wait=False)
            return False
        # Only a probe succeeds without having been remembered.
        return event.path is Path.NEW and known is None and event.status is AnswerStatus.SUCCEEDED

    def lost(self, path: Path) -> None:
        """The link is down: what is owed is sent again by the next one."""
        owed = self._owed[path]
        for id_, (status, detail, _) in owed.items():
            owed[id_] = (status, detail, None)

    def needs(self, path: Path) -> bool:
        """Whether an answer is or will be owed by this path."""
        return bool(self._owed[path]) or any(self._known[id_].path is path for id_ in self._executing)

    # --- time ---

    def awaits_since(self, path: Path) -> float | None:
        """Since when an answer sent by this path has awaited its acknowledgement."""
        return next((sent_at for _, _, sent_at in self._owed[path].values() if sent_at is not None), None)

    def forget(self, now: float) -> None:
        """Let go of ids that no copy can come of any more."""
        if not any(link.ready for link in self._links.values()):
            return  # nobody is there to tell the time, and a wrong clock must not make ids forgotten early
        limit = self._clock.time(now) - self._settings.remember_commands_s
        old = [c.id for c in self._known.values() if max(c.at, c.expires_at) < limit and c.status]
        for id_ in old:
            del self._known[id_]
            self._by_both.discard(id_)
            for owed in self._owed.values():
                owed.pop(id_, None)
        if old:
            self._actions.persist(*map(CommandForgotten, old), wait=False)

    def jumped(self, by_s: float) -> None:
        for owed in self._owed.values():
            for id_, (status, detail, sent_at) in owed.items():
                owed[id_] = (status, detail, None if sent_at is None else sent_at + by_s)


def _outcome(known: CommandRecord, path: Path) -> bytes:
    """What is said of a command's outcome by a path: by another than the command came by, also which one."""
    if path is known.path:
        return known.detail
    return msgspec.json.encode({**msgspec.json.decode(known.detail), BROUGHT_BY: known.path.value})


def _detail(code: str, reason: str) -> bytes:
    detail: dict[str, Any] = {"code": code, "reason": reason}
    return msgspec.json.encode(detail)
