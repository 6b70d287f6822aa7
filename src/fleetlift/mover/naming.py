"""The step `switch: dns`: names go over wave by wave, and the relay at the old address with them."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence, Set
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from fleetlift.core.dns import RecordSet
from fleetlift.core.errors import Conflict, FleetError
from fleetlift.core.relaying import Routes, To
from fleetlift.core.tenant.plan import POOL, SwitchDns
from fleetlift.core.units import Share, format_duration
from fleetlift.levers.dns import DnsLever
from fleetlift.levers.relay import RelayControl
from fleetlift.migrate.names import dns_lever, provider_of
from fleetlift.mover.move import Move
from fleetlift.mover.numbers import forget_numbers, note_numbers, tenants_of
from fleetlift.sides.open import key_in
from fleetlift.store.devices import tell_revoked

LET_GO_AT_ONCE: Final = 50
CLOCKS_DIFFER_S: Final = 1.0
REROUTE_TRIES: Final = 20


@contextlib.asynccontextmanager
async def lever_of(move: Move, step: SwitchDns) -> AsyncIterator[DnsLever]:
    provider = provider_of(move.plan)
    try:
        yield dns_lever(move.plan, step, provider)
    finally:
        await provider.close()


def relay_of(move: Move) -> RelayControl | None:
    """The relay at the old address, when the plan names one."""
    old = move.plan.old
    if not old.relay:
        return None
    token = key_in(Path(old.relay_token_file), "relay_token_file", "the relay's relay.token")
    return RelayControl(old.relay, token)


async def switch_names(move: Move, at: int, wave: int) -> str:
    """One wave: lower the TTLs and wait the old ones out (once), then switch, and tell the relay."""
    step = _step(move, at)
    async with lever_of(move, step) as lever:
        originals = await _originals(move, at, lever)
        move.kill("names-read")
        facts = move.facts(at)
        move.tell("lowering the TTL of every name")
        lowered = await lever.lower_ttl(originals, lowered_at=facts.get("lowered_at"))
        await move.save(at, lowered_at=lowered.lowered_at, switch_from=lowered.switch_from)
        move.kill("ttl-lowered")
        move.tell("waiting for the old TTL to run out")
        await lever.wait_until(lowered.switch_from)
        # One sleeps by another clock than the switch asks.
        while 0 < lowered.switch_from - time.time() < CLOCKS_DIFFER_S:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        names, share = _of_wave(step, wave)
        changed = await lever.switch(
            originals, share_percent=share, switch_from=lowered.switch_from, names=names
        )
        await move.save(at, switched_at=changed.at, gone_at=changed.gone_at, share=share, wave=wave)
        move.kill("names-switched")
    if step.waves[wave] == POOL and move.plan.rehearsal is not None:
        await _forward(move, step, changed.at, move.plan.rehearsal.tenant)
    elif wave + 1 == len(step.waves):
        await _forward(move, step, changed.at, move.plan.tenant)
    shown = "the test pool's names" if step.waves[wave] == POOL else f"{share:g} %"
    move.tell("switched", names_switched=len(names), share_percent=share)
    return f"{shown} switched; old answers are gone from caches within {format_duration(step_ttl_s(step))}"


def step_ttl_s(step: SwitchDns) -> float:
    return max(record.ttl_s for record in step.records)


async def _forward(move: Move, step: SwitchDns, switched_at: float, tenant: str) -> None:
    """Whoever of the tenant's devices still comes to the old address is forwarded from now on, and let go of
    gently; those of other tenants, who come there as well, stay."""
    relay = relay_of(move)
    if relay is None:
        return
    devices = await devices_of(move, tenant)
    async with relay:
        await _reroute(
            relay,
            lambda held: replace(
                held,
                devices={**held.devices, **dict.fromkeys(devices, To.NEW)},
                switched_at=switched_at,
                ttl_s=step_ttl_s(step),
            ),
        )
        move.kill("relay-told")
        await relay.release(step.release_per_s)


async def _reroute(relay: RelayControl, changed: Callable[[Routes], Routes]) -> None:
    """Change the relay's table as it stands. Other moves change it too: who comes second reads it again."""
    for left in reversed(range(REROUTE_TRIES)):
        held = await relay.routes()
        wanted = changed(held)
        if wanted == held:
            return
        try:
            await relay.set_routes(replace(wanted, epoch=held.epoch + 1))
        except Conflict:
            if not left:
                raise
        else:
            return


def _without(held: Routes, devices: Set[str]) -> Routes:
    others = {device: side for device, side in held.devices.items() if device not in devices}
    return replace(held, devices=others, switched_at=held.switched_at if others else None)


async def devices_of(move: Move, *tenants: str) -> list[str]:
    """The devices of `tenants` (of the tenant that moves), as this instance knows them."""
    rows = await move.backend.fetch(
        "SELECT id FROM device WHERE tenant = ANY($1) ORDER BY id", list(tenants or (move.plan.tenant,))
    )
    return [row["id"] for row in rows]


def _of_wave(step: SwitchDns, wave: int) -> tuple[list[str], float]:
    share = step.waves[wave]
    if isinstance(share, Share):
        return [record.name for record in step.records if not record.pool], share.percent or 100.0
    return [record.name for record in step.records if record.pool], 100.0


async def _originals(move: Move, at: int, lever: DnsLever) -> Sequence[RecordSet]:
    """What stood at the names before the first change, read once and kept."""
    held: Any = move.facts(at).get("originals")
    if held is None:
        found = await lever.originals()
        await note_numbers(move, at)
        await move.save(at, originals=msgspec.to_builtins(found))
        return found
    return msgspec.convert(held, tuple[RecordSet, ...])


async def undo_names(move: Move, at: int) -> str:
    """Every name back to what stood there, the relay first: it sends devices back at once. It is not done
    before the relay has been told, or whoever pins the old address would still be forwarded."""
    step = _step(move, at)
    if "originals" not in move.facts(at):
        return "no name was changed"
    relay = relay_of(move)
    trouble: FleetError | None = None
    if relay is not None:
        own = frozenset(await devices_of(move, *tenants_of(move.plan)))
        async with relay:
            try:
                await _reroute(relay, lambda held: _without(held, own))
            except FleetError as error:
                trouble = error
    async with lever_of(move, step) as lever:
        originals = await _originals(move, at, lever)
        changed = await lever.revert(originals)
        move.kill("names-reverted")
        if trouble is not None:
            raise trouble
        await _let_go(move, step, changed.at + step_ttl_s(step))
        await lever.restore_ttl(originals)
    await move.forget(at)
    forget_numbers(move, at)
    return "every name is as it was"


async def _let_go(move: Move, step: SwitchDns, gone_at: float) -> None:
    """Names move answers, not connections: devices that are connected here are let go of, gently, once caches
    hold the old side's answer again. Nothing that they have sent is lost by it."""
    if not await _connected(move):
        return
    move.tell("waiting until no cache leads devices here any more")
    await asyncio.sleep(max(0.0, gone_at - time.time()))
    here = await _connected(move)
    at_once = min(LET_GO_AT_ONCE, math.ceil(step.release_per_s))
    for first in range(0, len(here), at_once):
        some = here[first : first + at_once]
        move.tell(f"letting devices go: {first:,} of {len(here):,}")
        async with move.backend.acquire() as conn:
            await tell_revoked(conn, some)
        await asyncio.sleep(len(some) / step.release_per_s)


async def _connected(move: Move) -> list[str]:
    rows = await move.backend.fetch(
        "SELECT d.id FROM device d JOIN presence p ON p.device = d.id "
        "WHERE d.tenant = ANY($1) AND p.connected ORDER BY d.id",
        tenants_of(move.plan),
    )
    return [row["id"] for row in rows]


def _step(move: Move, at: int) -> SwitchDns:
    step = move.plan.steps[at]
    assert isinstance(step, SwitchDns)
    return step
