"""Parity of a migration: the gate's figure over the open wave, and the whole account for people."""

from collections.abc import Mapping, Sequence

import msgspec

from fleetlift.core.migration import Sample
from fleetlift.core.parity import Account, Rule, Tally, above_noise, field_noise
from fleetlift.core.plan import Plan
from fleetlift.migrate.wave import EXAMPLES, Wave, summary
from fleetlift.store import parity as store
from fleetlift.store.parity import ChannelParity
from fleetlift.store.pool import Conn

NOISE_LEAST = 100  # second readings of the old side without which nothing is known of its noise


class FieldParity(msgspec.Struct, frozen=True, kw_only=True):
    """One field that has differed. Shares are 0 to 1; `above_noise` is what counts."""

    channel: str
    field: str
    compared: int
    differing: int
    allowed: int  # differing as a rule allows
    noise: float  # share of second readings in which the old side differed from itself
    above_noise: float
    likely: str
    old: str
    new: str


class ChannelAccount(msgspec.Struct, frozen=True, kw_only=True):
    """One channel: every message in one class. `noise_compared` second readings of the old side."""

    channel: str
    devices: int
    all: int
    account: Account
    noise_compared: int
    noise_differing: int


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """What both sides saw of the devices that have sent to both, the last time that they did."""

    old: str
    all: int
    account: Account
    above_noise: float
    noise_compared: int
    noise_differing: int
    rules: tuple[str, ...]
    channels: tuple[ChannelAccount, ...]
    fields: tuple[FieldParity, ...]  # the most above noise first


async def measure_parity(conn: Conn, wave: Wave, old_path: str) -> dict[str, Sample]:
    """`parity.differing`: of the pairs that both sides have, the percentage that differs above noise."""
    name = "parity.differing"
    if not wave.moved:
        return {name: Sample(value=None, evidence=summary("no device of the wave has moved"))}
    channels = await store.by_channel(conn, old_path, [m.device for m in wave.moved])
    report = assemble(old_path, channels, await store.noise(conn, old_path), ())
    pairs = report.account.matched + report.account.differing + report.account.ignored
    if not pairs:
        return {name: Sample(value=None, evidence=summary("nothing has come by both sides yet"))}
    if report.noise_compared < NOISE_LEAST:
        few = f"the old side's own noise is not known yet: {report.noise_compared} messages read twice"
        return {name: Sample(value=None, n=pairs, evidence=summary(few))}
    worst = [f for f in report.fields if f.above_noise > 0][:EXAMPLES]
    text = f"{report.account.differing:,} of {pairs:,} differ"
    if worst:
        text += f", {worst[0].channel} {worst[0].field} most ({worst[0].likely})"
    return {
        name: Sample(
            value=100.0 * report.above_noise,
            n=pairs,
            evidence=summary(
                text,
                account=msgspec.to_builtins(report.account),
                noise=f"{report.noise_differing:,} of {report.noise_compared:,}",
                examples=[
                    {
                        "channel": f.channel,
                        "field": f.field,
                        "differing": f.differing,
                        "likely": f.likely,
                        "old": f.old,
                        "new": f.new,
                    }
                    for f in worst
                ],
            ),
        )
    }


async def read_parity(conn: Conn, plan: Plan, name: str, devices: Sequence[str]) -> ParityReport:
    """The account of `devices`, those of the migration `name`."""
    old_path = await store.old_path_of(conn, name) or plan.old.kind
    channels = await store.by_channel(conn, old_path, devices)
    return assemble(old_path, channels, await store.noise(conn, old_path), plan.parity)


def assemble(
    old_path: str, channels: Sequence[ChannelParity], noise: Mapping[str, Tally], rules: Sequence[Rule]
) -> ParityReport:
    """Sums over channels, and the fields that have differed."""
    fields = []
    for channel in channels:
        pairs = channel.tally.compared
        for name, tally in channel.tally.fields.items():
            own = field_noise(noise, channel.channel, name)
            fields.append(
                FieldParity(
                    channel=channel.channel,
                    field=name,
                    compared=pairs,
                    differing=tally.differing,
                    allowed=tally.allowed,
                    noise=own,
                    above_noise=max(0.0, tally.differing / pairs - own) if pairs else 0.0,
                    likely=tally.likely,
                    old=tally.old,
                    new=tally.new,
                )
            )
    accounts = [channel.account for channel in channels]
    total = Account(**{name: sum(getattr(a, name) for a in accounts) for name in Account.__struct_fields__})
    compared = total.matched + total.differing + total.ignored
    noisy = sum(tally.differing for tally in noise.values())
    read_twice = sum(tally.compared for tally in noise.values())
    return ParityReport(
        old=old_path,
        all=total.all,
        account=total,
        above_noise=above_noise(total.differing, compared, noisy, read_twice),
        noise_compared=read_twice,
        noise_differing=noisy,
        rules=tuple(rule.text for rule in rules),
        channels=tuple(
            ChannelAccount(
                channel=c.channel,
                devices=c.devices,
                all=c.account.all,
                account=c.account,
                noise_compared=noise.get(c.channel, Tally()).compared,
                noise_differing=noise.get(c.channel, Tally()).differing,
            )
            for c in channels
        ),
        fields=tuple(sorted(fields, key=lambda f: (-f.above_noise, -f.allowed, f.channel, f.field))),
    )
