"""The product broken on purpose, in places where it keeps a promise: each must be noticed by a checker.

A breakage replaces a piece of real code for a while. Where the real piece is SQL or a transaction, its
stand-in in the simulator is broken instead, which `stand_in` says.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import msgspec

from fleetlift.core import command as commands
from fleetlift.core import decide as decisions
from fleetlift.core import requests
from fleetlift.core.migration import Member, MemberState, Verdict
from fleetlift.core.orders import Orders
from fleetlift.core.plan import ladder
from fleetlift.core.round import Round
from fleetlift.core.telemetry import Telemetry
from fleetlift.device.commands import Commands
from fleetlift.device.moves import Cause, Moves
from fleetlift.device.outbox import Outbox
from fleetlift.migrate import runner as runners
from fleetlift.migrate.bridge import Bridge
from fleetlift.migrate.runner import Runner
from fleetlift.simulate import database as databases
from fleetlift.simulate import engine as engines
from fleetlift.simulate.device import ENDPOINT
from fleetlift.simulate.old_side import OldSide

Patch = Callable[[], Any]


class Breakage(msgspec.Struct, frozen=True, kw_only=True):
    """`caught_by`: the promises whose checkers may be the first to notice."""

    what: str
    patch: Patch
    caught_by: tuple[str, ...]
    stand_in: bool = False


def _replaced(place: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Replace an attribute by what `make` builds around the real one."""
    return lambda: mock.patch.object(place, name, make(getattr(place, name)))


# -- telemetry --------------------------------------------------------------------------------------------


def _no_identity(real: Any) -> Any:
    count = iter(range(1, 10**9))
    return property(lambda row: (row.seq or 0) + next(count) * 10**6)


def _forgets_rows(real: Any) -> Any:
    """The position is committed with the reading, the rows later: a worker killed in between loses them."""

    def take(database: Any, batch: Any) -> Any:
        commit = real(database, batch)
        database.telemetry_position = batch[-1][0]
        return commit

    return take


def _drops_when_sent(real: Any) -> Any:
    """A message leaves the outbox when it is sent, not when it was acknowledged."""

    def pump(outbox: Any, link: Any, now: float) -> None:
        real(outbox, link, now)
        in_flight = outbox._lanes[link.path].in_flight
        for held, _ in list(in_flight.values()):
            if not held.gone:
                outbox._actions.persist(outbox._leave(held), wait=False)
        in_flight.clear()

    return pump


def _position_first(real: Any) -> Any:
    """The bridge stores a feed's position before the messages it covers are in the log."""

    async def enter(bridge: Any, messages: Any) -> Any:
        newest = bridge.side._old.events
        await bridge._store.settle(bridge.key, str(len(newest)), [], [])
        return await real(bridge, messages)

    return enter


# -- commands ---------------------------------------------------------------------------------------------


def _forgets_commands(real: Any) -> Any:
    """After a reboot the device does not know which commands it has executed."""

    return lambda commands, saved: real(commands, ())


def _no_memory(real: Any) -> Any:
    """The second copy of a command is not recognised."""

    def received(commands: Any, event: Any, flag: Any, now: float) -> None:
        commands._known.pop(event.id, None)
        real(commands, event, flag, now)

    return received


def _never_closed(real: Any) -> Any:
    def ended(command: commands.Command, at: float) -> commands.Command:
        return command if command.status is commands.Status.ACKNOWLEDGED else real(command, at)

    return ended


# -- orders -----------------------------------------------------------------------------------------------


def _epoch_ignored(real: Any) -> Any:
    """The device obeys whatever order comes last."""

    def ordered(moves: Any, link: Any, orders: Any, now: float) -> bool:
        if 0 < orders.epoch < moves.record.epoch:
            moves.record = msgspec.structs.replace(moves.record, epoch=orders.epoch - 1)
        return bool(real(moves, link, orders, now))

    return ordered


def _told_before_commit(real: Any) -> Any:
    async def commit(controller: Any, before: Any, after: Any, **what: Any) -> Any:
        rungs = ladder(runners.read_plan(before.plan))
        orders = {
            m.device: Orders(
                epoch=m.epoch,
                migration="simulated",
                flags=rungs[m.rung].flags,
                new=ENDPOINT,
                credential=f"credential of {m.device}",
            )
            for m in after.members.values()
            if (old := before.state.members.get(m.device)) is None or old.epoch != m.epoch
        }
        if orders:
            await engines._OldPort(controller).deliver(orders)
        return await real(controller, before, after, **what)

    return commit


def _told_before_journal(real: Any) -> Any:
    """The journal is written after the devices were told."""

    async def write(runner: Any, now: float, orders: Mapping[str, Any], audit: Any, *, opened: bool) -> None:
        if orders:
            await runner._tell(orders, True)
        await real(runner, now, orders, audit, opened=opened)

    return write


def _no_dead_man(real: Any) -> Any:
    """A device that has lost the new side stays there."""

    def back(moves: Any, cause: Cause, reason: str, now: float) -> None:
        if cause is not Cause.NEW_LOST:
            real(moves, cause, reason, now)

    return back


# -- decisions --------------------------------------------------------------------------------------------


def _missing_passes(real: Any) -> Any:
    """A gate without data advances."""

    def judge(gate: Any, sample: Any) -> Any:
        result = real(gate, sample)
        return (
            msgspec.structs.replace(result, verdict=Verdict.ADVANCE, missing=False)
            if result.missing
            else result
        )

    return judge


def _one_too_many(real: Any) -> Any:
    return lambda shares, total, **more: min(real(shares, total, **more) + 1, total)


def _never_breached(real: Any) -> Any:
    """Limits are not looked at: whatever was measured will do."""

    def judge(gate: Any, sample: Any) -> Any:
        result = real(gate, sample)
        bad = result.verdict is Verdict.REVERT
        return msgspec.structs.replace(result, verdict=Verdict.ADVANCE) if bad else result

    return judge


def _forgets_excluded(real: Any) -> Any:
    """Devices that an amended plan has taken out are not sent back."""

    def exclude(round_: Round, members: Any, reason: str) -> None:
        for member in members:
            round_.put(member, state=MemberState.EXCLUDED, reason=reason or "taken out")

    return exclude


def _in_any_order(real: Any) -> Any:
    def chosen(candidates: Any, raised: int, limit: int) -> tuple[str, ...]:
        room = max(0, limit - raised)
        return tuple(device for _, device in sorted(candidates, reverse=True)[:room])

    return chosen


def _untold(real: Any) -> Any:
    """A revert leaves the devices out that are on their way."""

    def touched(round_: Round, member: Member) -> bool:
        return real(round_, member) and member.state is not MemberState.STRAGGLER

    return touched


def _no_line(real: Any) -> Any:
    def note(round_: Round, kind: str, text: str, actor: str = "controller", **evidence: Any) -> None:
        if kind != "wave_moved":
            real(round_, kind, text, actor, **evidence)

    return note


def _releases(real: Any) -> Any:
    return lambda round_, member: False


def _overwrites(real: Any) -> Any:
    return lambda database, before: None


def _grows_blind(real: Any) -> Any:
    return lambda deciding: deciding.fleet is not None


def _older_config(real: Any) -> Any:
    """The old side hands out whatever order it was given last, however old."""

    def deliver(side: Any, orders: Mapping[str, Any]) -> dict[str, str]:
        for device in orders:
            side.configs.pop(device, None)
        return dict(real(side, orders))

    return deliver


def _many(*patches: Patch) -> Patch:
    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return both


LOST, TWICE, BACK = "nothing lost", "nothing twice", "a way back"
BLIND, BLAST, ONE = "never blind", "bounded blast", "one authority"
STRANDED, WRITTEN, AUDIT = "nobody stranded", "written first", "audit complete"

BREAKAGES: dict[str, Breakage] = {
    "dedup-off": Breakage(
        what="a copy that came by another path, or again, is a message of its own",
        patch=_replaced(Telemetry, "msg_key", _no_identity),
        caught_by=(TWICE, LOST),
    ),
    "rows-after-position": Breakage(
        what="the telemetry reader commits its position before the rows",
        patch=_replaced(databases.Database, "take_telemetry", _forgets_rows),
        caught_by=(LOST,),
        stand_in=True,
    ),
    "outbox-dropped-early": Breakage(
        what="a message leaves the device's outbox once it is sent",
        patch=_replaced(Outbox, "pump", _drops_when_sent),
        caught_by=(LOST,),
    ),
    "feed-position-first": Breakage(
        what="the bridge stores the feed's position before its messages are in the log",
        patch=_replaced(Bridge, "_enter", _position_first),
        caught_by=(LOST, "commands end"),
    ),
    "commands-forgotten": Breakage(
        what="a device that was rebooted does not know the commands it has executed",
        patch=_replaced(Commands, "started", _forgets_commands),
        caught_by=(TWICE, "commands end"),
    ),
    "second-copy-executed": Breakage(
        what="a device executes the second copy of a command",
        patch=_replaced(Commands, "received", _no_memory),
        caught_by=(TWICE,),
    ),
    "expiry-forgotten": Breakage(
        what="a command that was acknowledged and never answered stays open",
        patch=_many(
            _replaced(commands, "ended", _never_closed),
            lambda: mock.patch("fleetlift.simulate.commands.ended", _never_closed(commands.ended)),
        ),
        caught_by=("commands end",),
    ),
    "epoch-ignored": Breakage(
        what="a device obeys an order that is older than the one it holds",
        patch=_many(
            _replaced(Moves, "ordered", _epoch_ignored), _replaced(OldSide, "deliver", _older_config)
        ),
        caught_by=(ONE, BACK, STRANDED),
    ),
    "told-before-commit": Breakage(
        what="devices are told before the decision is committed",
        patch=_replaced(engines.Controller, "commit", _told_before_commit),
        caught_by=(WRITTEN,),
    ),
    "journal-after-telling": Breakage(
        what="devices are told before the order is in the journal",
        patch=_replaced(Runner, "_write_journal", _told_before_journal),
        caught_by=(WRITTEN,),
    ),
    "dead-man-off": Breakage(
        what="a device that has lost the new side never goes back by itself",
        patch=_replaced(Moves, "back", _no_dead_man),
        caught_by=(BACK, STRANDED),
    ),
    "missing-data-passes": Breakage(
        what="a gate without data lets the wave pass",
        patch=_replaced(decisions, "judge", _missing_passes),
        caught_by=(BLIND,),
    ),
    "limits-ignored": Breakage(
        what="a gate passes whatever was measured",
        patch=_replaced(decisions, "judge", _never_breached),
        caught_by=(BLIND,),
    ),
    "blind-growth": Breakage(
        what="waves open while a side does not answer",
        patch=_replaced(decisions._Deciding, "_may_grow", _grows_blind),
        caught_by=(BLIND,),
    ),
    "one-too-many": Breakage(
        what="a wave takes one device more than its share",
        patch=_replaced(decisions, "approved", _one_too_many),
        caught_by=(BLAST,),
    ),
    "any-order": Breakage(
        what="a wave takes the last devices of the order first",
        patch=_replaced(decisions, "chosen", _in_any_order),
        caught_by=(BLAST,),
    ),
    "excluded-forgotten": Breakage(
        what="devices that are taken out stay where they are",
        patch=_replaced(Round, "exclude", _forgets_excluded),
        caught_by=(BACK, AUDIT),
    ),
    "stragglers-forgotten": Breakage(
        what="a revert leaves stragglers where they are",
        patch=_replaced(Round, "touched", _untold),
        caught_by=(BACK,),
    ),
    "released-early": Breakage(
        what="the old side is let go though devices are left behind",
        patch=_replaced(requests, "_left_behind", _releases),
        caught_by=("release",),
    ),
    "version-guard-off": Breakage(
        what="a controller that has lost the lead overwrites what the next one has decided",
        patch=_replaced(engines.EngineDatabase, "guard", _overwrites),
        caught_by=(ONE,),
        stand_in=True,
    ),
    "line-missing": Breakage(
        what="a change of state has no line in the audit log",
        patch=_replaced(Round, "note", _no_line),
        caught_by=(AUDIT,),
    ),
}


@contextlib.contextmanager
def broken(name: str) -> Iterator[Breakage]:
    """The product with one breakage, until the block ends."""
    breakage = BREAKAGES[name]
    with breakage.patch():
        yield breakage
