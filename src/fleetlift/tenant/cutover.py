"""The cutover and the way back: facts are read, `core/tenant/cutover.py` says what is next, it is done here.

Before the source is sealed anything that goes wrong, and any cancelling, thaws the source; after it every
step is repeated until it has been done. Killed in between, the fence of the source opens by itself at its
bound, or `run_cutover` (which reads both databases first) goes on.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import asyncpg
import msgspec
from msgspec.structs import replace

from fleetlift.cancelling import raise_if_cancelled
from fleetlift.core.errors import Conflict, FleetError, Unavailable
from fleetlift.core.tenant.cutover import (
    RETURN_ORDER,
    Abort,
    CutoverState,
    Done,
    Facts,
    ReturnStep,
    Step,
    next_return,
    next_step,
    survived,
)
from fleetlift.core.tenant.fence import Status
from fleetlift.core.tenant.verify_report import Kind, VerifyProgress, VerifyReport, by_table
from fleetlift.tenant.fence import Fence, Lapsed
from fleetlift.tenant.touched import TouchedKeys
from fleetlift.tenant.verify import Verifier

LONG_TRANSACTION_S: Final = 5.0
PREPARE_WITHIN_S: Final = 120.0
_RETRY_S: Final = 0.2


class Stream(Protocol):
    """A follower, in either direction."""

    @property
    def caught_up(self) -> bool: ...

    async def reached(self, lsn: int, within_s: float) -> bool:
        """Wait until everything up to `lsn` is applied; False when it is not in time."""
        ...


class Checks(Protocol):
    """Verification, and the keys that were changed since."""

    async def verify_fully(self) -> VerifyReport:
        """Compare every row; keys touched from its beginning on are noted."""
        ...

    async def recheck_touched(self, *, final: bool) -> VerifyReport:
        """Compare the noted keys, or all when they are not known; what agrees is forgotten. When it is
        `final`, writers stand still: nothing is forgotten, and Conflict raised rather than all compared."""
        ...


class Reverse(Protocol):
    """The stream from the target back to the source."""

    async def prepare(self) -> None:
        """Make its slot and publication on the target. May be repeated; what is there is kept."""
        ...

    async def start(self) -> None:
        """Let it run from there. May be repeated."""
        ...


class TouchedChecks:
    """`Checks` by a verifier and the keys that a follower has touched. `told`: how a whole run goes on."""

    def __init__(
        self,
        verifier: Verifier,
        touched: TouchedKeys,
        *,
        told: Callable[[VerifyProgress], None] = lambda _: None,
    ) -> None:
        self._verifier, self._touched, self._told = verifier, touched, told

    async def verify_fully(self) -> VerifyReport:
        self._touched.all_from_now()
        report = await self._verifier.run(self._told, resume=False)
        self._leave(report)
        return report

    async def recheck_touched(self, *, final: bool) -> VerifyReport:
        touched = self._touched.take()
        if touched.all_of_it and final:
            raise Conflict(
                "too many rows were changed since all of them were compared: try again, it begins with that"
            )
        if touched.all_of_it:
            return await self.verify_fully()
        keys = dict(touched.keys)
        if not final:
            # Those without a key may be written to again at any time: the last look has to be worth its time.
            tables = self._verifier.closure.schema.tables
            keys |= {table: keys.get(table, ()) for table in touched.tables if not tables[table].key}
        report = await self._verifier.recheck(keys, thorough=final)
        if not final:
            self._leave(report)
        return report

    def _leave(self, report: VerifyReport) -> None:
        """What differs now may only be on its way; the last look is when writers stand still."""
        left = [one for one in report.findings if one.kind is not Kind.SURPLUS]
        counted = report.total(*(kind for kind in Kind if kind is not Kind.SURPLUS))
        self._touched.leave(by_table(left), all_of_it=bool(report.problems) or counted > len(left))


Save = Callable[[CutoverState], Awaitable[None]]
Progress = Callable[[CutoverState, str], None]


class CutoverParts(msgspec.Struct, frozen=True, kw_only=True):
    """What a cutover works with. `stream` and `checks` are of the direction that is switched.

    `set_sequences` is called before the fence closes as well, where nobody waits for it: what it needs
    (sessions, plans) it should keep.
    """

    source: Fence
    target: Fence
    stream: Stream
    checks: Checks
    reverse: Reverse
    set_sequences: Callable[[], Awaitable[Any]]


def no_step(_name: str) -> None:
    """The hook of tests that kill or cancel at a named step."""


async def run_cutover(
    parts: CutoverParts,
    state: CutoverState,
    *,
    at_most_s: float,
    save: Save,
    terminate: bool = False,
    step: Callable[[str], None] = no_step,
    progress: Progress = lambda _state, _text: None,
    settle_within_s: float = 60.0,
) -> CutoverState:
    """Switch the tenant's writes from the source to the target; they stand still for `at_most_s` at most.

    Also resumes one: what both databases say decides. The state that comes back is `finished`, or `aborted`
    with the reason and the source serving (call again to try again). After the seal, a database that does not
    answer is asked again for `settle_within_s`; then Unavailable is raised and a later call goes on.
    """
    return await _Forward(parts, state, at_most_s, save, terminate, step, progress, settle_within_s).run()


async def run_return(
    parts: CutoverParts,
    state: CutoverState,
    *,
    at_most_s: float,
    save: Save,
    terminate: bool = False,
    step: Callable[[str], None] = no_step,
    progress: Progress = lambda _state, _text: None,
    settle_within_s: float = 60.0,
) -> CutoverState:
    """The way back: writes go from the target to the source again, nothing lost. `parts.stream` and `checks`
    are those of the reverse stream; `set_sequences` sets the *source's* ahead. Bounds as in `run_cutover`.
    """
    return await _Back(parts, state, at_most_s, save, terminate, step, progress, settle_within_s).run()


async def facts_of(parts: CutoverParts, *, ours: bool = False) -> Facts:
    """What both fences say now."""
    source, target = await asyncio.gather(parts.source.state(), parts.target.state())
    return Facts(source=source.status, target=target.status, ours=ours)


class _Run:
    """What both directions share: the fenced side freezes, drains, is followed to its end and sealed."""

    def __init__(
        self,
        parts: CutoverParts,
        state: CutoverState,
        at_most_s: float,
        save: Save,
        terminate: bool,
        step: Callable[[str], None],
        progress: Progress,
        settle_within_s: float,
    ) -> None:
        self.parts, self.state, self.at_most_s = parts, state, at_most_s
        self._save, self._terminate, self._step, self._progress = save, terminate, step, progress
        self._settle_within_s = settle_within_s
        self.arming_at = 0.0  # on our own steady clock, as the next
        self.armed_at: float | None = None  # only for how long we may wait
        self.took: dict[str, float] = dict(state.took_s)

    @property
    def fenced(self) -> Fence:
        """The side that writes are taken from."""
        raise NotImplementedError

    @property
    def left_s(self) -> float:
        assert self.armed_at is not None
        return max(0.0, self.at_most_s - (self._now() - self.armed_at))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def put(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes, took_s=dict(self.took))
        await self._save(self.state)

    def tell(self, text: str) -> None:
        self._progress(self.state, text)

    async def arm(self, armed: str) -> None:
        """Close the fence and wait for what is under way. `armed` is told to the hook in between."""

        async def closed(closed_at_ms: int, until_ms: int) -> None:
            self.armed_at = self._now()
            self.state = replace(self.state, closed_at_ms=closed_at_ms, until_ms=until_ms)
            self._step(armed)

        self.arming_at = self._now()
        drained = await self.fenced.arm(
            for_s=self.at_most_s,
            drain_within_s=self.at_most_s * 0.8,
            terminate=self._terminate,
            closed=closed,
        )
        self.state = replace(self.state, ended=(*self.state.ended, *map(str, drained.ended)))

    async def read_position(self) -> None:
        self.state = replace(self.state, position=await self.fenced.position())

    async def reach_position(self) -> None:
        within_s = self.left_s
        if not await self.parts.stream.reached(self.state.position, within_s):
            raise Conflict(f"the changes up to the position were not applied within {within_s:.1f} s")

    async def fits(self) -> None:
        """Refuse to close what writes would stand still behind for longer than the bound."""
        stream, checks, side = self.parts.stream, self.parts.checks, self.fenced.side
        began = self._now()
        if not await stream.reached(await self.fenced.position(), max(self.at_most_s, 1.0)):
            raise Conflict(
                f"the follower needs more than {self.at_most_s:g} s to reach the {side}'s position: the "
                f"{side} is not closed, because writes would stand still for longer than the bound"
            )
        reached_s = self._now() - began
        await self._sequences()
        # Twice: what the first look leaves over is what the second, and the one in the freeze, has to do.
        await checks.recheck_touched(final=False)
        again = self._now()
        await checks.recheck_touched(final=False)
        estimate_s = reached_s + self._now() - again
        self.took["estimate"] = estimate_s
        if estimate_s > self.at_most_s * 0.8:
            raise Conflict(
                f"the freeze would take about {estimate_s:.2f} s, of {self.at_most_s:g} s allowed: "
                f"it is not begun. Try again when the {side} is less busy, or raise the bound"
            )

    async def _sequences(self) -> None:
        await self.parts.set_sequences()

    async def verify_touched(self) -> None:
        report = await self.parts.checks.recheck_touched(final=True)
        if not report.agrees:
            raise Conflict(f"rows that were changed since the verification differ: {_told(report)}")

    async def seal(self) -> None:
        """Seal the fenced side. Without an answer its state is read until there is one."""
        try:
            sealed = await self.fenced.seal(self.state.until_ms, within_s=min(1.0, self.left_s))
        except (Unavailable, TimeoutError):
            sealed = await self._patiently(self._is_sealed)
        if not sealed:
            raise Lapsed("the bound was hit before the seal; the side that was fenced serves on")

    async def _is_sealed(self) -> bool:
        return (await self.fenced.state()).status is Status.SEALED

    async def _patiently(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do what must be done, again while a database does not answer."""
        end = self._now() + self._settle_within_s
        while True:
            try:
                return await work()
            except (Unavailable, asyncpg.PostgresError, OSError) as exc:
                raise_if_cancelled()
                if self._now() > end:
                    raise Unavailable(
                        f"the switch is not finished: {exc}; it goes on when it is resumed"
                    ) from exc
                self.tell(f"waiting for a database: {exc}")
                await asyncio.sleep(_RETRY_S)

    async def _facts(self, ours: bool = False) -> Facts:
        found = await self._patiently(lambda: facts_of(self.parts, ours=ours))
        assert isinstance(found, Facts)
        return found

    async def thaw(self) -> bool:
        """Let the fenced side serve on; False when it is sealed. What cannot be thawed opens by itself."""
        self.armed_at = None
        with contextlib.suppress(FleetError, asyncpg.PostgresError, OSError):
            return await self.fenced.thaw()
        return True

    async def bounded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work of a step while writes are refused, within what is left of the bound."""
        try:
            async with asyncio.timeout(self.left_s):
                await work()
        except TimeoutError:
            raise Conflict(f"writes would have stood still for more than {self.at_most_s:g} s") from None


class _Forward(_Run):
    @property
    def fenced(self) -> Fence:
        return self.parts.source

    async def run(self) -> CutoverState:
        self.state = replace(self.state, aborted="", back=(), returned=False)
        done = survived(frozenset(self.state.done))
        self.state = replace(self.state, attempts=self.state.attempts + 1)
        await self.put(done=_in_order(done))
        facts = await self._facts()
        try:
            return await self._go(set(done), facts)
        except BaseException:
            # Cancelled, or an error of ours: the source serves on unless it has been sealed.
            if not self.state.sealed:
                await asyncio.shield(self._give_up())
            raise

    async def _give_up(self) -> None:
        if not await self.thaw():
            self.state = replace(self.state, sealed=True)

    async def _go(self, done: set[Step], facts: Facts) -> CutoverState:
        while True:
            match next_step(frozenset(done), facts):
                case Done():
                    await self.put(done=_in_order(done), finished=True, sealed=True)
                    return self.state
                case Abort(reason=reason, again=again):
                    if (over := await self._aborted(reason, again)) is not None:
                        return over
                    done = set(survived(frozenset(done)))
                    facts = await facts_of(self.parts)
                    continue
                case do:
                    this = do.step
            self.tell(this)
            began = self._now()
            try:
                facts = await self._do(this, facts)
            except (FleetError, asyncpg.PostgresError, OSError) as exc:
                raise_if_cancelled()
                if self.state.sealed:
                    raise
                if (over := await self._aborted(str(exc), again=False)) is not None:
                    return over
                facts = await facts_of(self.parts)  # it was sealed after all
                continue
            done.add(this)
            self.took[this] = self._now() - (self.arming_at if this is Step.ARMED else began)
            if this is Step.SEALED:
                self.state = replace(self.state, sealed=True)
            if this not in (Step.ARMED, Step.DRAINED):  # both are told from within
                self._step(this)
            # No commit to our own store while writes are refused, but for what must not be forgotten.
            if this not in _IN_FREEZE:
                await self.put(done=_in_order(done))

    async def _aborted(self, reason: str, again: bool) -> CutoverState | None:
        if not await self.thaw():
            self.state = replace(self.state, sealed=True)
            return None
        done = _in_order(survived(frozenset(self.state.done)))
        if again:
            await self.put(done=done)
            return None
        with contextlib.suppress(FleetError):
            self.state = replace(self.state, refused=(await self.parts.source.refused()).closing)
        await self.put(done=done, aborted=reason)
        self.tell(f"given up: {reason}; the source serves on")
        return self.state

    async def _do(self, this: Step, facts: Facts) -> Facts:
        parts = self.parts
        match this:
            case Step.FENCE_INSTALLED:
                await parts.target.install()
                if facts.source is not Status.SEALED:
                    await parts.target.close()
                await parts.source.install()
                return await facts_of(parts)
            case Step.REVERSE_PREPARED:
                await self._no_prepared()
                try:
                    async with asyncio.timeout(PREPARE_WITHIN_S):
                        await parts.reverse.prepare()
                except TimeoutError:
                    raise Conflict(
                        f"the way back could not be prepared within {PREPARE_WITHIN_S:.0f} s: a slot on "
                        "the target is ready only when all transactions that were open there have ended"
                    ) from None
                await parts.source.try_pass()
            case Step.VERIFIED_FULLY:
                self._caught_up()
                report = await parts.checks.verify_fully()
                if report.blocks:
                    raise Conflict(f"verification found differences: {_told(report)}")
            case Step.ARMED:
                await self._ready()
                await self.arm(Step.ARMED)
                self._step(Step.DRAINED)
                return replace(facts, source=Status.CLOSED, ours=True)
            case Step.DRAINED:
                pass  # `arm` came back: it is
            case Step.POSITION_READ:
                await self.bounded(self.read_position)
            case Step.POSITION_REACHED:
                await self.reach_position()
            case Step.TOUCHED_VERIFIED:
                await self.bounded(self.verify_touched)
            case Step.SEQUENCES_SET:
                await self.bounded(self._sequences)
            case Step.SEALED:
                await self.seal()
                return replace(facts, source=Status.SEALED)
            case Step.OPENED:
                await self._patiently(self._open)
                return await self._facts()
            case Step.REVERSE_STARTED:
                await self._patiently(parts.reverse.start)
        return facts

    async def _ready(self) -> None:
        """Refuse to close what is not ready: the freeze must end in time, and the way back must be there."""
        self._caught_up()
        long = await self.parts.source.long_transactions(LONG_TRANSACTION_S)
        self.state = replace(self.state, long=tuple(map(str, long)))
        await self._no_prepared()
        await self.fits()

    def _caught_up(self) -> None:
        if not self.parts.stream.caught_up:
            raise Conflict("the follower has not caught up with the source: wait for it, then try again")

    async def _no_prepared(self) -> None:
        open_ = await self.parts.source.long_transactions(0.0)
        if prepared := [str(holder) for holder in open_ if holder.pid == 0]:
            raise Conflict(
                f"{'; '.join(prepared)}: prepared transactions may stay open for ever; "
                "commit them or roll them back, then try again"
            )

    async def _open(self) -> None:
        # Read, not remembered: a target must never open beside a source that takes writes.
        source = await self.parts.source.state()
        if source.status is not Status.SEALED:
            raise Conflict(f"the source's fence is {source.status}, not sealed: the target stays closed")
        if (await self.parts.target.state()).status is not Status.OPEN:
            await self.parts.target.open()
        changes: dict[str, Any] = {"refused": source.refused.closing}
        if self.state.closed_at_ms and self.state.freeze_s is None:
            now_ms = await self.parts.source.clock_ms()
            changes["freeze_s"] = (now_ms - self.state.closed_at_ms) / 1000
        self.state = replace(self.state, sealed=True, **changes)


class _Back(_Run):
    @property
    def fenced(self) -> Fence:
        return self.parts.target

    async def run(self) -> CutoverState:
        self.state = replace(self.state, aborted="", back=())
        await self.put()
        ours = False
        done: set[ReturnStep] = set()
        sealed = False
        try:
            while True:
                facts = await self._facts(ours)
                match next_return(frozenset(done), facts):
                    case Done():
                        await self.put(returned=True, finished=False, sealed=False, done=())
                        return self.state
                    case Abort(reason=reason, again=again):
                        if await self._aborted(reason, again):
                            return self.state
                        done, ours = set(), False
                        continue
                    case do:
                        this = do.step
                self.tell(this)
                began = self._now()
                try:
                    await self._do(this)
                except (FleetError, asyncpg.PostgresError, OSError) as exc:
                    raise_if_cancelled()
                    if sealed or this is ReturnStep.OPENED:
                        raise
                    if await self._aborted(str(exc), again=False):
                        return self.state
                    continue
                ours = ours or this is ReturnStep.ARMED
                sealed = sealed or this is ReturnStep.SEALED
                done.add(this)
                self.took[this] = self._now() - (self.arming_at if this is ReturnStep.ARMED else began)
                if this not in (ReturnStep.ARMED, ReturnStep.DRAINED):
                    self._step(this)
                if this in (ReturnStep.SEALED, ReturnStep.OPENED):
                    await self.put(back=tuple(s for s in RETURN_ORDER if s in done))
        except BaseException:
            if not sealed:
                await asyncio.shield(self.thaw())
            raise

    async def _aborted(self, reason: str, again: bool) -> bool:
        """Whether it is given up: the target serves on."""
        if not await self.thaw():
            return False
        if again:
            return False
        await self.put(aborted=reason, back=())
        self.tell(f"given up: {reason}; the target serves on")
        return True

    async def _do(self, this: ReturnStep) -> None:
        match this:
            case ReturnStep.VERIFIED:
                self._caught_up()
                # Nothing was closed yet: this may take as long as it takes.
                report = await self.parts.checks.recheck_touched(final=False)
                if report.blocks:
                    raise Conflict(f"the source is not as the target is: {_told(report)}")
            case ReturnStep.ARMED:
                self._caught_up()
                await self.fits()
                await self.arm(ReturnStep.ARMED)
                self._step(ReturnStep.DRAINED)
            case ReturnStep.DRAINED:
                pass
            case ReturnStep.POSITION_READ:
                await self.bounded(self.read_position)
            case ReturnStep.POSITION_REACHED:
                await self.reach_position()
            case ReturnStep.TOUCHED_VERIFIED:
                await self.bounded(self.verify_touched)
            case ReturnStep.SEQUENCES_SET:
                await self.bounded(self._sequences)
            case ReturnStep.SEALED:
                await self.seal()
            case ReturnStep.OPENED:
                await self._patiently(self._open)

    def _caught_up(self) -> None:
        if not self.parts.stream.caught_up:
            raise Conflict("the reverse stream has not caught up: there is no way back yet")

    async def _open(self) -> None:
        target = await self.parts.target.state()
        if target.status is not Status.SEALED:
            raise Conflict(f"the target's fence is {target.status}, not sealed: the source stays closed")
        await self.parts.source.unseal()
        if self.state.closed_at_ms:
            now_ms = await self.parts.target.clock_ms()
            self.state = replace(self.state, freeze_s=(now_ms - self.state.closed_at_ms) / 1000)


_IN_FREEZE: Final = frozenset(
    {
        Step.ARMED,
        Step.DRAINED,
        Step.POSITION_READ,
        Step.POSITION_REACHED,
        Step.TOUCHED_VERIFIED,
        Step.SEQUENCES_SET,
        Step.SEALED,
    }
)


def _in_order(done: set[Step] | frozenset[Step]) -> tuple[Step, ...]:
    return tuple(step for step in Step if step in done)


def _told(report: VerifyReport) -> str:
    shown = [f"{f.kind} {f.table} {'/'.join(f.key)}" for f in report.findings[:5]]
    totals: Mapping[str, int] = {
        kind: sum(one.totals.get(kind, 0) for one in report.tables)
        for kind in {kind for one in report.tables for kind in one.totals}
    }
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(totals.items()) if count)
    return "; ".join([*report.problems[:3], counted, *shown]) or "not every row was compared"
