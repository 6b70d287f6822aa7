"""The commands of the simulated backend: what `store/commands.py` does in SQL, with the core's own tables."""

from collections.abc import Callable, Iterable, Sequence

from msgspec.structs import replace

from fleetlift.core.command import (
    FINAL,
    GRACE_S,
    RETRY_AFTER_CONNECT_S,
    Command,
    Mode,
    Path,
    PathState,
    PathStatus,
    Status,
    ended,
    paths_for,
    record,
    retry_due,
    settled,
    uuid7,
)
from fleetlift.core.orders import CommandsFlag
from fleetlift.store.commands import Answer

_SENDABLE = (PathStatus.QUEUED, PathStatus.SENT)


class Commands:
    """All commands, and those of them that are open. Times are Unix seconds."""

    def __init__(self, random_bits: Callable[[int], int]) -> None:
        self.all: dict[str, Command] = {}
        self.open: dict[str, Command] = {}  # with a path, or themselves, not ended
        self.resent_at: dict[tuple[str, Path], float] = {}
        self.broken: list[str] = []  # a final status that has changed, in words
        self._bits = random_bits

    def create(
        self,
        device: str,
        name: str,
        *,
        expires_in_s: float,
        mode: Mode,
        route: CommandsFlag | None,
        now: float,
        by: str,
    ) -> Command:
        command = Command(
            id=uuid7(now, self._bits(74)),
            device=device,
            tenant="t",
            name=name,
            params={},
            mode=mode,
            status=Status.QUEUED,
            created_by=by,
            created_at=now,
            expires_at=now + expires_in_s,
            paths=tuple(
                PathState(path=path, mode=its, created_at=now) for path, its in paths_for(route, mode, name)
            ),
        )
        self._put(command)
        return command

    def _put(self, after: Command) -> None:
        before = self.all.get(after.id)
        if before is not None and before.status in FINAL and after.status is not before.status:
            self.broken.append(f"{after.id} was {before.status}, and is {after.status} now")
        self.all[after.id] = after
        if after.ended_at is None or any(path.ended_at is None for path in after.paths):
            self.open[after.id] = after
        else:
            self.open.pop(after.id, None)

    def answer(self, answers: Iterable[Answer]) -> int:
        """Record answers; how many of them were news."""
        changed = 0
        for one in answers:
            command = self.all.get(one.command)
            if command is None or (one.device and one.device != command.device):
                continue
            if all(path.path is not one.path for path in command.paths):
                continue
            recorded = record(command.paths, one.path, one.reported, one.at)
            if recorded.changed:
                changed += 1
                self._put(settled(command, recorded.paths, one.at))
        return changed

    def add_path(self, device: str, path: Path, now: float, but: str) -> None:
        """Let open commands of a device that do not go by `path` go by it as well."""
        for command in list(self.open.values()):
            if command.device != device or command.name == but or command.ended_at is not None:
                continue
            if command.expires_at > now and all(state.path is not path for state in command.paths):
                added = PathState(path=path, mode=command.mode, created_at=now)
                paths = sorted((*command.paths, added), key=lambda state: state.path, reverse=True)
                self._put(replace(command, paths=tuple(paths)))

    def mark_sent(self, path: Path, ids: Iterable[str], now: float) -> list[Command]:
        """Those of which a copy is still worth sending."""
        worth = []
        for id_ in ids:
            command = self.all[id_]
            paths = []
            for state in command.paths:
                if state.path is path and state.status in _SENDABLE:
                    if state.sent_at is not None:
                        self.resent_at[id_, path] = now
                    state = replace(
                        state,
                        status=PathStatus.SENT,
                        attempts=state.attempts + 1,
                        sent_at=now if state.sent_at is None else state.sent_at,
                    )
                    worth.append(command)
                paths.append(state)
            status = Status.SENT if command.status is Status.QUEUED else command.status
            self._put(replace(command, paths=tuple(paths), status=status))
        return worth

    def waiting(self, path: Path, now: float, *, again: bool = False) -> list[Command]:
        """What is to be sent by a path for the first time; with `again` also what was sent, unanswered."""
        statuses = _SENDABLE if again else _SENDABLE[:1]
        return [
            command
            for command in self.open.values()
            if command.expires_at > now
            and any(state.path is path and state.status in statuses for state in command.paths)
        ]

    def send_again(self, connected_since: Callable[[str], float | None], now: float) -> list[Command]:
        """Copies by the new path for connected devices that have left theirs unanswered for long enough."""
        due = []
        for command in self.open.values():
            for state in command.paths:
                if state.path is not Path.NEW or state.status is not PathStatus.SENT:
                    continue
                since = connected_since(command.device)
                sent_at = self.resent_at.get((command.id, Path.NEW), state.sent_at)
                if since is None or sent_at is None or command.expires_at <= now:
                    continue
                if max(sent_at, since) < now - RETRY_AFTER_CONNECT_S and retry_due(
                    now=now, sent_at=sent_at, waiting_since=command.created_at, connected_since=since
                ):
                    due.append(command.id)
        return self.mark_sent(Path.NEW, due, now)

    def close_due(self, now: float) -> None:
        """End what is open though its expiry and grace are over."""
        for command in [c for c in self.open.values() if c.expires_at < now - GRACE_S]:
            self._put(ended(command, now))

    def of(self, devices: Sequence[str]) -> list[Command]:
        wanted = set(devices)
        return [command for command in self.all.values() if command.device in wanted]
