"""The DNS lever on real servers, Knot and BIND: lowered, waited, switched, back; by anybody, at any
moment."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import dns.message
import dns.query
import dns.tsig
import dns.update
import msgspec
import pytest
from dns_servers import IOT, NEW, OLD, OLD_2, lever, provider
from dns_servers import server as server  # the fixture
from mqtt_device import until

from fault_proxy import UP, FaultProxy
from fleetlift.certificates import own_certificates
from fleetlift.config import split_address
from fleetlift.core.dns import (
    DnsRecord,
    HonoursTtl,
    IgnoresTtl,
    Phase,
    PinsFirst,
    RecordsChanged,
    RecordSet,
    RecordType,
)
from fleetlift.core.errors import BadInput, Conflict, Forbidden, NotFound, Unavailable
from fleetlift.levers.dns import DnsLever, Lowered
from fleetlift.levers.rfc2136 import Rfc2136
from fleetlift.load.resolving import Resolver
from fleetlift.testing import DnsServer, free_port, running_knot, scratch_directory

A = RecordType.A


async def answers(server: DnsServer, name: str, kind: RecordType = A) -> RecordSet | None:
    return await provider(server).read(name, kind)


async def by_hand(server: DnsServer, name: str, ttl_s: int, *values: str, kind: str = "A") -> None:
    """Somebody else's change."""
    update = dns.update.UpdateMessage(
        server.zone, keyring=dns.tsig.Key(server.key.name, server.key.secret, server.key.algorithm)
    )
    update.replace(name + ".", dns.rdataset.from_text("IN", kind, ttl_s, *values))
    host, port = split_address(server.address)
    answer = await asyncio.to_thread(dns.query.tcp, update, host, 5, port)
    assert answer.rcode() == 0


def as_a(name: str, ttl_s: int, *values: str) -> RecordSet:
    return RecordSet(name=name, type=A, ttl_s=ttl_s, values=values)


async def test_there_and_back(server: DnsServer) -> None:
    """The TTL is lowered, waited out, the name switched, settled and brought back; each is seen at the
    server."""
    move = lever(server)
    assert await move.check() == []
    originals = await move.originals()
    assert originals == (as_a("iot.example.test", 2, OLD, OLD_2),)

    low = await move.lower_ttl(originals)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)
    assert low.switch_from == low.lowered_at + 2
    with pytest.raises(Conflict, match="old TTL"):
        await move.switch(originals, switch_from=low.switch_from)
    assert await move.phases(originals) == {"iot.example.test": Phase.TTL_LOWERED}

    await move.wait_until(low.switch_from)
    changed = await move.switch(originals, switch_from=low.switch_from)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, NEW)
    assert changed.gone_at == changed.at + 1
    assert await move.phases(originals) == {"iot.example.test": Phase.SWITCHED}
    (seen,) = await move.observe()
    assert (seen.values, seen.ttl_s, seen.problem) == ((NEW,), 1, "")

    await move.restore_ttl(originals)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 2, NEW)
    assert await move.phases(originals) == {"iot.example.test": Phase.SETTLED}

    await move.revert(originals)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)
    await move.restore_ttl(originals)
    assert await answers(server, "iot.example.test") == originals[0]


async def test_the_test_pool_goes_first_by_its_own_name(server: DnsServer) -> None:
    pool = DnsRecord(name="test-pool.example.test", new=(NEW,), ttl_s=1)
    move = lever(server, *IOT, pool)
    originals = await move.originals()
    await move.lower_ttl(originals)
    await move.switch(originals, switch_from=0.0, names=["test-pool.example.test"])
    assert await move.shares(originals) == {"iot.example.test": 0, "test-pool.example.test": 100}
    await move.switch(originals, switch_from=0.0)
    assert await move.shares(originals) == {"iot.example.test": 100, "test-pool.example.test": 100}
    with pytest.raises(BadInput, match="no weighted records"):
        await move.switch(originals, switch_from=0.0, share_percent=50)


async def test_a_cname_is_moved_too(server: DnsServer) -> None:
    record = DnsRecord(
        name="www.example.test", type=RecordType.CNAME, new=("new-cloud.example.net",), ttl_s=1
    )
    move = lever(server, record)
    assert await move.check() == []
    originals = await move.originals()
    assert originals[0].values == ("old-cloud.example.net",)
    await move.lower_ttl(originals)
    await move.switch(originals, switch_from=0.0)
    found = await answers(server, "www.example.test", RecordType.CNAME)
    assert found is not None and found.values == ("new-cloud.example.net",)
    await move.revert(originals)
    await move.restore_ttl(originals)
    assert await answers(server, "www.example.test", RecordType.CNAME) == originals[0]


class Killed(BaseException):
    """Stands for kill -9: nothing of the process is left but what it had stored."""


Step = Callable[[DnsLever, tuple[RecordSet, ...], Lowered | None], Awaitable[object]]


class Killing(Rfc2136):
    """Dies at the n-th message to the server, before or after it was carried out."""

    def __init__(self, server: DnsServer, *, die_at: int, after: bool) -> None:
        super().__init__(server.zone, primary=server.address, key=server.key)
        self._left, self._after = die_at, after

    async def _send(self, *args, **more) -> bool:  # type: ignore[no-untyped-def]
        self._left -= 1
        if self._left == 0 and not self._after:
            raise Killed
        done = await super()._send(*args, **more)
        if self._left == 0:
            raise Killed
        return done


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_killed_at_every_update_and_repeated(server: DnsServer, after: bool) -> None:
    """A whole move there and back, killed at each update once, ends as if nothing had happened."""
    first = lever(server)
    originals = await first.originals()
    stored: Lowered | None = None
    kills = 0
    steps: list[Step] = [
        lambda one, given, low: one.lower_ttl(given, lowered_at=low.lowered_at if low else None),
        lambda one, given, low: one.switch(given, switch_from=0.0),
        lambda one, given, low: one.restore_ttl(given),
        lambda one, given, low: one.lower_ttl(given, lowered_at=low.lowered_at if low else None),
        lambda one, given, low: one.revert(given),
        lambda one, given, low: one.restore_ttl(given),
    ]
    after_each = []
    for step in steps:
        for die_at in (1, 2, 3):
            try:
                killing = DnsLever(Killing(server, die_at=die_at, after=after), IOT, within_s=10)
                await step(killing, originals, stored)
            except Killed:
                kills += 1
        done = await step(lever(server), originals, stored)
        if isinstance(done, Lowered):
            stored = done
        after_each.append(await answers(server, "iot.example.test"))
    assert kills >= len(steps)
    name = "iot.example.test"
    assert after_each == [
        as_a(name, 1, OLD, OLD_2),
        as_a(name, 1, NEW),
        as_a(name, 2, NEW),
        as_a(name, 1, NEW),
        as_a(name, 1, OLD, OLD_2),
        as_a(name, 2, OLD, OLD_2),
    ]


async def test_a_resumed_wait_goes_on_and_an_unknown_one_begins_anew(server: DnsServer) -> None:
    move = lever(server)
    originals = await move.originals()
    low = await move.lower_ttl(originals)
    again = await lever(server).lower_ttl(originals, lowered_at=low.lowered_at)
    assert again == low
    unknown = await lever(server).lower_ttl(originals)
    assert unknown.lowered_at >= low.lowered_at and unknown.switch_from == unknown.lowered_at + 2
    await by_hand(server, "iot.example.test", 2, OLD, OLD_2)  # the TTL was raised meanwhile
    raised = await lever(server).lower_ttl(originals, lowered_at=low.lowered_at)
    assert raised.switch_from > low.switch_from


@pytest.mark.parametrize("values", [("203.0.113.9",), (OLD,), (OLD, OLD_2, NEW)])
async def test_what_somebody_else_changed_is_not_overwritten(
    server: DnsServer, values: tuple[str, ...]
) -> None:
    move = lever(server)
    originals = await move.originals()
    await move.lower_ttl(originals)
    await by_hand(server, "iot.example.test", 1, *values)
    steps = (move.switch(originals, switch_from=0.0), move.revert(originals), move.restore_ttl(originals))
    for step in (*steps, move.lower_ttl(originals)):
        with pytest.raises(RecordsChanged, match="neither the old side's"):
            await step
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, *values)
    await move.revert(originals, force=True)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)


@pytest.mark.parametrize(
    "theirs", [as_a("iot.example.test", 2, NEW), as_a("iot.example.test", 7, OLD, OLD_2)]
)
async def test_a_change_in_the_last_moment_is_refused_by_the_server(
    server: DnsServer, theirs: RecordSet
) -> None:
    """Between our look and our update: the update names what it is bound to, values and TTL."""

    class Overtaken(Rfc2136):
        async def _send(self, *args, **more) -> bool:  # type: ignore[no-untyped-def]
            await by_hand(server, theirs.name, theirs.ttl_s, *theirs.values)
            return await super()._send(*args, **more)

    move = DnsLever(Overtaken(server.zone, primary=server.address, key=server.key), IOT)
    originals = await move.originals()
    with pytest.raises(RecordsChanged, match="somebody else"):
        await move.lower_ttl(originals)
    assert await answers(server, "iot.example.test") == theirs


async def test_other_names_may_change_meanwhile(server: DnsServer) -> None:
    count = 0

    class Busy(Rfc2136):
        async def _send(self, *args, **more) -> bool:  # type: ignore[no-untyped-def]
            nonlocal count
            if count < 3:
                count += 1
                await by_hand(server, "test-pool.example.test", 60 + count, "203.0.113.1")
            return await super()._send(*args, **more)

    move = DnsLever(Busy(server.zone, primary=server.address, key=server.key), IOT)
    originals = await move.originals()
    await move.lower_ttl(originals)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)


async def test_a_wrong_key_is_told_before_anything_changes(server: DnsServer) -> None:
    wrong = msgspec.structs.replace(server.key, secret=b"x" * 32)
    unknown = msgspec.structs.replace(server.key, name="another-key")
    for key in (wrong, unknown):
        move = DnsLever(provider(server, key=key), IOT)
        (problem,) = await move.check()
        assert "TSIG key" in problem.text or "let the key" in problem.text
        assert "eHh4" not in problem.text
        with pytest.raises(Forbidden):
            await move.lower_ttl(await move.originals())
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 2, OLD, OLD_2)


async def test_what_the_check_finds(server: DnsServer) -> None:
    missing = DnsRecord(name="nobody.example.test", new=(NEW,))
    alias = DnsRecord(name="www.example.test", new=(NEW,))
    dual = DnsRecord(name="dual.example.test", new=(NEW,), ttl_s=1)
    wild = DnsRecord(name="a.wild.example.test", new=(NEW,), ttl_s=1)
    other = DnsRecord(name="test-pool.example.test", old=("203.0.113.7",), new=(NEW,), ttl_s=1)
    elsewhere = DnsRecord(name="iot.example.org", new=(NEW,))
    problems = await lever(server, missing, alias, dual, wild, other, elsewhere, *IOT).check()
    by_name = {problem.name: problem.text for problem in problems}
    assert "has no A record" in by_name[missing.name]
    assert "is a CNAME for old-cloud.example.net" in by_name[alias.name]
    assert "AAAA" in by_name[dual.name]
    assert "wildcard" in by_name[wild.name]
    assert "not the old side's 203.0.113.7" in by_name[other.name]
    assert "not in the zone" in by_name[elsewhere.name]
    assert set(by_name) == {record.name for record in (missing, alias, dual, wild, other, elsewhere)}
    with pytest.raises(NotFound):
        await lever(server, missing).originals()


async def test_both_families_of_a_name_move_together(server: DnsServer) -> None:
    dual = DnsRecord(name="dual.example.test", new=(NEW,), ttl_s=1)
    six = DnsRecord(name="dual.example.test", type=RecordType.AAAA, new=("2001:DB8::2",), ttl_s=1)
    move = lever(server, dual, six)
    assert await move.check() == []
    originals = await move.originals()
    await move.lower_ttl(originals)
    await move.switch(originals, switch_from=0.0)
    found = await answers(server, "dual.example.test", RecordType.AAAA)
    assert found is not None and found.values == ("2001:db8::2",)
    assert await move.shares(originals) == {"dual.example.test": 100}


async def test_a_server_that_is_away_or_never_answers(server: DnsServer) -> None:
    async with FaultProxy(split_address(server.address)) as proxy:
        address = f"{proxy.address[0]}:{proxy.address[1]}"
        move = DnsLever(provider(server, primary=address, timeout_s=0.3), IOT, within_s=1)
        originals = await DnsLever(provider(server), IOT, within_s=1).originals()
        proxy.stalled = frozenset({UP})
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            await move.lower_ttl(originals)
        proxy.stalled = frozenset()
        await proxy.refuse()
        with pytest.raises(Unavailable, match="cannot be asked"):
            await move.lower_ttl(originals)
        (problem,) = await move.check()
        assert "cannot be asked" in problem.text
        await proxy.accept()
        proxy.latency_s = (0.02, 0.1)
        await DnsLever(provider(server, primary=address), IOT, within_s=20).lower_ttl(originals)
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)


class Through(Rfc2136):
    """Asks directly, and sends its updates through a proxy, with little patience."""

    def __init__(self, server: DnsServer, proxy: FaultProxy) -> None:
        super().__init__(server.zone, primary=server.address, key=server.key)
        self._proxy = proxy.address

    async def _send(self, *args, **more) -> bool:  # type: ignore[no-untyped-def]
        usual = self._primary, self._timeout_s
        self._primary, self._timeout_s = self._proxy, 1.0
        try:
            return await super()._send(*args, **more)
        finally:
            self._primary, self._timeout_s = usual


async def test_an_update_whose_answer_is_lost_is_done_once(server: DnsServer) -> None:
    """Carried out, but never answered: the repeated one sees that and is content."""
    async with FaultProxy(split_address(server.address)) as proxy:
        proxy.stalled = frozenset({"down"})
        move = DnsLever(Through(server, proxy), IOT, within_s=5)
        originals = await move.originals()
        await move.lower_ttl(originals)
        assert proxy.accepted == 1
    assert await answers(server, "iot.example.test") == as_a("iot.example.test", 1, OLD, OLD_2)


async def test_an_update_that_arrives_after_the_way_back_changes_nothing(server: DnsServer) -> None:
    """A switch hangs on its way, the mover gives up and goes back; then the switch arrives."""
    async with FaultProxy(split_address(server.address)) as proxy:
        through = DnsLever(Through(server, proxy), IOT, within_s=5)
        originals = await through.originals()
        await through.lower_ttl(originals)
        proxy.stalled = frozenset({UP})
        with pytest.raises(Unavailable, match="may have carried it out"):
            await through.switch(originals, switch_from=0.0)
        assert (await answers(server, "iot.example.test")) == as_a("iot.example.test", 1, OLD, OLD_2)
        direct = lever(server)
        await direct.revert(originals)
        proxy.stalled = frozenset()
        await until(lambda: not proxy.forwarding, what="the end of what was held back")
        assert (await answers(server, "iot.example.test")) == as_a("iot.example.test", 1, OLD, OLD_2)


async def test_every_authoritative_server_must_follow() -> None:
    """With a secondary: a change is out when it has arrived there, and a server that stays behind is
    named."""
    with scratch_directory("fleetlift-dns-") as one, scratch_directory("fleetlift-dns-") as two:
        async with running_knot(one, records=[f"iot 2 A {OLD}"]) as alone:
            pass
        from fleetlift.testing_dns import free_dns_port

        second_port = free_dns_port()
        second_address = f"127.0.0.1:{second_port}"
        port = int(alone.address.rpartition(":")[2])
        async with running_knot(one, key=alone.key, port=port, notify=second_address) as first:
            async with running_knot(two, key=alone.key, port=second_port, primary=first.address) as second:
                both = Rfc2136(first.zone, primary=first.address, key=first.key, servers=[second.address])
                move = DnsLever(both, IOT, within_s=10)
                assert await move.check() == []
                originals = await move.originals()
                await move.lower_ttl(originals)
                await move.switch(originals, switch_from=0.0)
                assert {seen.server: seen.values for seen in await move.observe()} == {
                    first.address: (NEW,),
                    second.address: (NEW,),
                }
            lame = DnsLever(both, IOT, within_s=0.3)
            with pytest.raises(Unavailable, match=second.address):
                await lame.revert(originals)
            assert any(second.address in problem.text for problem in await lame.check(originals))


@asynccontextmanager
async def tls_server(host: str, port: int, directory: Path, *names: str) -> AsyncIterator[Path]:
    """A TLS server with a certificate of an authority of its own for `names`; gives the authority's file."""
    files = own_certificates(directory, names)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(files.cert, files.key)
    ends = await asyncio.start_server(lambda r, w: w.close(), host, port, ssl=context)
    async with ends:
        yield files.ca


async def test_both_sides_must_have_a_certificate_for_the_name(tmp_path: Path) -> None:
    port = free_port()
    name = "iot.example.test"
    with scratch_directory("fleetlift-dns-") as directory:
        async with running_knot(directory, records=["iot 2 A 127.0.0.2"]) as server:
            record = DnsRecord(name=name, new=("127.0.0.3",), ttl_s=1, tls_port=port)
            same = tmp_path / "same"
            async with tls_server("127.0.0.2", port, same, name) as ca:

                async def found(**more: float) -> list[str]:
                    move = DnsLever(provider(server), [record], ca_file=str(ca), **more)  # type: ignore[arg-type]
                    return [problem.text for problem in await move.check()]

                (text,) = await found()
                assert "new side at 127.0.0.3" in text and "cannot be reached" in text
                async with tls_server("127.0.0.3", port, tmp_path / "stranger", name):
                    (text,) = await found()
                    assert "new side" in text and "refused for iot.example.test" in text
                async with tls_server("127.0.0.3", port, same, name):
                    assert await found() == []
                    texts = await found(certificate_days_min=500)
                    assert len(texts) == 2 and all("renew it" in text for text in texts)
            async with (
                tls_server("127.0.0.2", port, tmp_path / "other-name", "other.example.test") as ca,
                tls_server("127.0.0.3", port, tmp_path / "other-name", "other.example.test"),
            ):
                texts = [p.text for p in await DnsLever(provider(server), [record], ca_file=str(ca)).check()]
                assert len(texts) == 2 and all("iot.example.test" in text for text in texts)


async def test_devices_follow_as_their_resolvers_do(server: DnsServer) -> None:
    """Who honours the TTL follows within it, who ignores it later, who pins never."""
    now = 1000.0
    models = (HonoursTtl(), IgnoresTtl(min_s=60.0), PinsFirst())
    devices = [Resolver(server.address, model=model, clock=lambda: now) for model in models]

    async def resolved() -> list[str]:
        return [(await device.resolve("test-pool.example.test"))[0] for device in devices]

    assert await resolved() == [OLD, OLD, OLD]
    await by_hand(server, "test-pool.example.test", 1, NEW)
    now += 1
    assert await resolved() == [OLD, OLD, OLD]
    now += 1.5
    assert await resolved() == [NEW, OLD, OLD]
    now += 60
    assert await resolved() == [NEW, NEW, OLD]
    await by_hand(server, "www.example.test", 1, "test-pool.example.test.", kind="CNAME")
    assert await devices[0].resolve("www.example.test") == (NEW,)
    with pytest.raises(Unavailable, match="no A record"):
        await devices[0].resolve("nobody.example.test")
