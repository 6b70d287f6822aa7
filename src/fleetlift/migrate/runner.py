"""The rounds of one migration: observe → decide → commit → journal → tell → note.

All that a round touches it has from `ports.py`; the decision itself is `core/decide.py`. Orders may be
repeated, so a round killed at any of `STEPS` is followed by one that goes on from what was committed.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.decide import decide
from fleetlift.core.errors import Conflict, FleetError
from fleetlift.core.migration import (
    AuditEntry,
    Decision,
    FleetDevice,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Request,
    RequestKind,
    Tell,
)
from fleetlift.core.orders import DeviceReport, Endpoint, Orders
from fleetlift.core.plan import Plan, check_amendment, ladder
from fleetlift.core.selection import selected
from fleetlift.levers.flag import Observed
from fleetlift.log import get_logger
from fleetlift.migrate import journal as journals
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.ports import GONE, Journal, Lever, Measures, New, Old, Store
from fleetlift.migrate.timeline import Timeline
from fleetlift.store.claims import Claimed
from fleetlift.store.engine import StoredMigration

log = get_logger(__name__)

STEPS = ("observed", "decided", "committed", "journaled", "told", "sampled")
"""The named steps of a round, in their order; the last four are reached only where something was done."""

ROUND_EVERY_S = 0.5
ROUND_SHARE = 0.25  # a round of a large fleet takes at most this share of the time
PAUSE_MOST_S = 3.0  # a round that waited for a side that hangs must not be followed by as long a pause
ERROR_PAUSE_S = 2.0

TOLD_AT_ONCE = 1000  # devices, between two looks at what people ask for
CALLS_OFF = (RequestKind.PAUSE, RequestKind.REVERT, RequestKind.EMERGENCY)

P = TypeVar("P")
read_plan = lru_cache(maxsize=64)(parse_plan)  # a plan is read again after each round that failed

Decide = Callable[[Plan, MigrationState, Observations, float], Decision]


def pause_after(took_s: float, every_s: float = ROUND_EVERY_S) -> float:
    """How long to wait, in seconds, after a round that took so long."""
    return max(every_s - took_s, min(took_s / ROUND_SHARE - took_s, PAUSE_MOST_S), 0.05)


def newest_amendment(
    plan: P,
    asked: Sequence[Request],
    read: Callable[[str], P],
    check: Callable[[P, P, int], None],
    place: int,
) -> tuple[P, str | None, dict[int, AuditEntry]]:
    """The plan to decide by after what is asked; the text of the newest amendment that can be used, None when
    there is none; and those that cannot, by request. `place`: how far the migration is, for `check`."""
    text = None
    refused: dict[int, AuditEntry] = {}
    for one in asked:
        if one.kind is not RequestKind.AMEND:
            continue
        try:
            new = str(one.args.get("plan", ""))
            amended = read(new)
            check(plan, amended, place)
            plan, text = amended, new
        except FleetError as error:
            refused[one.id] = AuditEntry(
                kind="request_refused", text=f"amend refused: {error}", actor=one.actor
            )
    return plan, text, refused


class Rounds(Protocol):
    """What has rounds: a `Runner`."""

    name: str

    async def round(self, now: float) -> None: ...

    def forget(self) -> None: ...


async def rounds_forever(
    runner: Rounds,
    wake: asyncio.Event,
    *,
    every_s: float = ROUND_EVERY_S,
    now: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> None:
    """Rounds without end. What goes wrong in one is logged, and the next one reads everything anew."""
    failed = ""
    while True:
        started = monotonic()
        pause = every_s
        try:
            await runner.round(now())
            failed = ""
        except Conflict as error:
            log.warning("round_turned_away", migration=runner.name, reason=str(error))
            runner.forget()
        except Exception as error:
            # Whatever it is, the migration stands still and says so; the others go on.
            if str(error) != failed:
                log.error("round_failed", migration=runner.name, reason=str(error), exc_info=True)
                failed = str(error)
            runner.forget()
            pause = max(ERROR_PAUSE_S, every_s)
        raise_if_cancelled()
        pause = pause_after(monotonic() - started, pause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await wake.wait()
        wake.clear()


class Runner:
    """The rounds of one migration."""

    def __init__(
        self,
        stored: StoredMigration,
        *,
        store: Store,
        old: Old,
        old_entry: Callable[[Plan], Mapping[str, str]],
        new: New,
        lever: Lever,
        measures: Measures,
        journal: Journal,
        endpoint: Callable[[Plan], Endpoint],
        step: Callable[[str], None],
        decide: Decide = decide,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`old_entry` and `endpoint` tell, of a plan, how to reach its old side and where devices go.
        `step` is called at each of `STEPS`."""
        self.name = stored.name
        self._stored: StoredMigration | None = stored
        self._store = store
        self._old = old
        self._old_entry = old_entry
        self._new = new
        self._lever = lever
        self._measures = measures
        self._journal = journal
        self._endpoint_of = endpoint
        self._step = step
        self._decide = decide
        self._timeline = Timeline(stored.name, store, measures, monotonic=monotonic)
        self._fresh = True  # nothing of what was told is remembered: tell again what is not obeyed
        self._journaled: dict[str, int] = {}  # device: newest epoch in the journal, as far as is remembered
        self._journal_size = -1
        self._selected: tuple[object, frozenset[str]] | None = None
        self._adopted: tuple[object, ...] | None = None
        self._foreign: frozenset[str] = frozenset()  # ids that another tenant has at the new side
        self._claimed: tuple[int, frozenset[str]] = (-1, frozenset())  # by other migrations, at a snapshot
        self._refused: dict[int, AuditEntry] = {}  # requests that would have taken them
        self._followed: dict[str, DeviceReport] = {}  # what the new side's routes were last set by
        self._down: dict[str, str] = {}
        self._use(read_plan(stored.plan, file=f"{self.name}.yaml"))

    @property
    def plan(self) -> Plan:
        """The plan that the rounds go by now."""
        return self._plan

    def _use(self, plan: Plan) -> None:
        self._plan = plan
        self._rungs = ladder(plan)
        self._endpoint = self._endpoint_of(plan)

    def forget(self) -> None:
        """Read everything from the store in the next round."""
        self._stored = None
        self._fresh = True

    async def round(self, now: float) -> None:
        """Observe, decide, commit, act, and note a point of the timeline.

        Raises Conflict when another controller has committed meanwhile; nothing was done then.
        """
        stored = await self._load()
        await self._take_in_emergency()
        asked = await self._store.open_requests(self.name)
        observed = await self._lever.observe(list(stored.state.members), self._old)
        self._note_down(observed)
        plan, text, refused = self._amended(stored, asked, observed)
        fleet = self._fleet(plan, observed)
        if observed.fleet is not None and observed.new_up:
            await self._adopt(observed.fleet, plan)
        left = self._foreign | self._claimed[1] if self._claimed[0] == self._old.snapshots else self._foreign
        if fleet is not None and left:
            fleet = tuple(device for device in fleet if device.id not in left)
        await self._follow_reports(observed)
        rungs = ladder(plan)
        state = stored.state
        rung = rungs[min(max(state.rung, 1), len(rungs) - 1)]
        samples = {}
        armed = state.phase in (Phase.RUNNING, Phase.PAUSED, Phase.HELD)
        if armed and state.wave_opened_at is not None and observed.new_up:
            samples = await self._measures.samples(rung.gates, state, rungs, now)
        self._step("observed")

        decision = self._decide(
            plan,
            state,
            Observations(
                fleet=fleet,
                devices=observed.devices,
                samples=samples,
                requests=tuple(r for r in asked if r.id not in refused),
                old_up=observed.old_up,
                new_up=observed.new_up,
            ),
            now,
        )
        self._step("decided")
        if decision.state.phase is Phase.RELEASED:
            # Before the release is committed: nobody takes the migration up again after it.
            staying = [m.device for m in decision.state.members.values() if m.rung == 0]
            await self._new.withdraw(staying, migration=decision.state.name)

        audit = (*decision.audit, *refused.values())
        answered = (*decision.answered, *refused)
        taken = text is not None and any(
            r.kind is RequestKind.AMEND and r.id in decision.answered for r in asked
        )
        gates = decision.gates
        if not gates and decision.state.phase is Phase.HELD:
            gates = stored.gates  # what was breached stays to be seen until somebody decides
        if decision.state != state or audit or answered or gates != stored.gates or taken:
            try:
                stored = await self._store.commit(
                    stored,
                    decision.state,
                    audit=audit,
                    answered=answered,
                    gates=gates,
                    plan=text if taken else None,
                    now=now,
                )
            except Claimed as error:
                self._leave(error, stored.state, [r for r in asked if r.id in decision.answered])
                raise
            self._stored = stored
            if taken:
                self._use(plan)
            for entry in audit:
                log.info(entry.kind, migration=self.name, text=entry.text, actor=entry.actor)
            self._step("committed")

        orders = self._orders([*decision.actions, *self._untold(stored.state, observed, decision)])
        await self._write_journal(now, orders, audit, opened=self._fresh or taken)
        if orders:
            self._step("journaled")
            await self._tell(orders, observed.new_up)
            self._step("told")
        self._fresh = False

        if await self._timeline.note(stored.state, decision, self._rungs, new_up=observed.new_up, now=now):
            self._step("sampled")

    async def _load(self) -> StoredMigration:
        if self._stored is None:
            self._stored = await self._store.load(self.name)
            self._use(read_plan(self._stored.plan, file=f"{self.name}.yaml"))
        return self._stored

    # -- observing ---------------------------------------------------------------------------------------

    def _note_down(self, observed: Observed) -> None:
        down = dict(observed.down)
        if not observed.old_up:
            down["old"] = self._old.why_down
        for side in down.keys() - self._down.keys():
            log.warning("side_lost", migration=self.name, side=side, reason=down[side])
        for side in self._down.keys() - down.keys():
            log.info("side_back", migration=self.name, side=side)
        self._down = down

    def _fleet(self, plan: Plan, observed: Observed) -> tuple[FleetDevice, ...] | None:
        """The selected devices; the condition is asked again when the inventory was read anew."""
        if observed.fleet is None:
            return None
        basis = (self._old.snapshots, plan.fleet)
        if self._selected is None or self._selected[0] != basis:
            chosen = frozenset(device.id for device in selected(plan, observed.fleet))
            self._selected = (basis, chosen)
        chosen = self._selected[1]
        return tuple(device for device in observed.fleet if device.id in chosen)

    async def _adopt(self, fleet: Sequence[FleetDevice], plan: Plan) -> None:
        """Make the old side's devices known to the new side, whenever the inventory was read anew.

        Also those that the plan does not move: their telemetry comes by the feed, and their commands enter
        here and go by the old side. Devices whose attribute `tenant` names another tenant are left out.
        """
        basis = (self._old.snapshots, plan.fleet)
        if self._adopted == basis:
            return
        tenant = plan.fleet.tenant
        own = [device for device in fleet if device.attributes.get("tenant", tenant) == tenant]
        try:
            foreign = await self._new.adopt(own, self.name)
        except FleetError as error:
            log.warning("devices_not_adopted", migration=self.name, reason=str(error))
            return
        if foreign and not self._foreign:
            log.warning("devices_of_another_tenant", migration=self.name, devices=foreign[:20])
        self._foreign = frozenset(foreign)
        self._adopted = basis

    def _leave(self, claimed: Claimed, state: MigrationState, asked: Sequence[Request]) -> None:
        """Devices that would join, and that another migration has, stay out until the inventory is read anew;
        who asked for them is refused in the next round."""
        before = self._claimed[1] if self._claimed[0] == self._old.snapshots else frozenset()
        part = {m.device for m in state.members.values() if m.state is not MemberState.EXCLUDED}
        self._claimed = (self._old.snapshots, before | (claimed.devices.keys() - part))
        for one in asked:
            if one.kind in (RequestKind.AMEND, RequestKind.RESUME):
                text = f"{one.kind} refused: {claimed}"
                self._refused[one.id] = AuditEntry(kind="request_refused", text=text, actor=one.actor)

    async def _follow_reports(self, observed: Observed) -> None:
        """Have commands routed as devices say that they obey: each new word of theirs once."""
        if not observed.new_up:
            return
        fresh = {
            device: seen.report
            for device, seen in observed.devices.items()
            if seen.report is not None and seen.report != self._followed.get(device)
        }
        if fresh:
            try:
                await self._new.follow_reports(fresh)
            except FleetError as error:
                log.warning("reports_not_followed", migration=self.name, reason=str(error))
            else:
                self._followed.update(fresh)

    def _amended(
        self, stored: StoredMigration, asked: Sequence[Request], observed: Observed
    ) -> tuple[Plan, str | None, dict[int, AuditEntry]]:
        """The plan to decide by: the newest amendment's, when there is one that can be used.

        An amendment is decided on only with the fleet at hand, so until then the stored plan holds.
        """
        refused = {one.id: self._refused[one.id] for one in asked if one.id in self._refused}
        if observed.fleet is None:
            return self._plan, None, refused
        left = [one for one in asked if one.id not in refused]
        plan, text, more = newest_amendment(self._plan, left, read_plan, check_amendment, stored.state.rung)
        return plan, text, refused | more

    async def _take_in_emergency(self) -> None:
        """Turn a new `emergency` record of the journal into a request, once for each epoch."""
        size = self._journal.size()
        if size == self._journal_size:
            return
        story = await self._journal.story() if size else None
        self._journal_size = size
        for emergency in story.emergencies if story is not None else ():
            await self._store.add_emergency(
                self.name,
                emergency.epoch,
                emergency.actor,
                devices=None if emergency.everything else emergency.devices,
            )

    # -- acting ------------------------------------------------------------------------------------------

    def _untold(self, state: MigrationState, observed: Observed, decision: Decision) -> list[Tell]:
        """After a start: orders that were committed and may never have gone out."""
        if not self._fresh:
            return []
        told = {action.device for action in decision.actions}
        tells = []
        for member in state.members.values():
            if member.epoch == 0 or member.device in told:
                continue
            seen = observed.devices.get(member.device)
            report = seen.report if seen is not None else None
            if report is None or report.epoch < member.epoch:
                tells.append(Tell(device=member.device, epoch=member.epoch, rung=member.rung))
        return tells

    def _orders(self, tells: Sequence[Tell]) -> dict[str, Orders]:
        orders = {}
        for tell in tells:
            flags = self._rungs[min(tell.rung, len(self._rungs) - 1)].flags
            orders[tell.device] = Orders(
                epoch=tell.epoch,
                migration=self.name,
                flags=flags,
                new=self._endpoint if flags.needs_new else None,
                credential=self._new.credential(tell.device) if flags.needs_new else None,
                try_within_s=self._plan.try_within_s,
                new_lost_limit_s=self._plan.new_lost_limit_s,
            )
        return orders

    async def _write_journal(
        self, now: float, orders: Mapping[str, Orders], audit: Sequence[AuditEntry], *, opened: bool
    ) -> None:
        """On disk before a device hears of it."""
        records: list[journals.Record] = []
        if opened:
            records.append(
                journals.Opened(
                    at=now,
                    migration=self.name,
                    old=dict(self._old_entry(self._plan)),
                    plan=self._stored_plan(),
                )
            )
        records += [journals.Decided(at=now, what=a.kind, text=a.text, actor=a.actor) for a in audit]
        new = {d: o for d, o in orders.items() if self._journaled.get(d, -1) < o.epoch}
        if new:
            records.append(
                journals.Told(
                    at=now,
                    orders=tuple(
                        journals.Order(device=d, epoch=o.epoch, flags=o.flags) for d, o in new.items()
                    ),
                )
            )
        if records:
            await self._journal.add(*records)
            self._journal_size = self._journal.size()
        self._journaled.update((d, o.epoch) for d, o in new.items())

    def _stored_plan(self) -> str:
        return self._stored.plan if self._stored is not None else ""

    async def _tell(self, orders: Mapping[str, Orders], new_up: bool) -> None:
        if new_up:
            try:
                await self._measures.note_baselines(
                    {d: o.epoch for d, o in orders.items() if o.flags.needs_new}
                )
            except GONE as error:
                log.warning("baselines_not_noted", migration=self.name, reason=str(error))
        # Those who go back first; a large wave part by part, so that a revert never waits for all of it.
        devices = sorted(orders, key=lambda device: orders[device].flags.needs_new)
        for start in range(0, len(devices), TOLD_AT_ONCE):
            if start and await self._called_off():
                left = len(devices) - start
                log.warning("telling_cut_short", migration=self.name, told=start, left=left)
                return
            await self._hand_out({d: orders[d] for d in devices[start : start + TOLD_AT_ONCE]})

    async def _called_off(self) -> bool:
        """Whether somebody has asked meanwhile to stop or to go back. Who is not told now is told by a later
        round, as one who has not answered its order."""
        return any(r.kind in CALLS_OFF for r in await self._store.open_requests(self.name))

    async def _hand_out(self, orders: Mapping[str, Orders]) -> None:
        moved = await self._lever.move(orders)
        for side, refused in (("old", moved.old_refused), ("new", moved.new_refused)):
            for device, reason in list(refused.items())[:20]:
                log.warning("order_refused", migration=self.name, side=side, device=device, reason=reason)
        for side, reason in moved.down.items():
            log.warning("orders_not_delivered", migration=self.name, side=side, reason=reason)
