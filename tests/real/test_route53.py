"""The DNS lever on Route 53's API: real botocore, against a stand-in for the service
(`route53_server.py`)."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from route53_server import Refused, Route53Server, Row, serving

from fleetlift.core.dns import NEW_SET, OLD_SET, DnsRecord, RecordsChanged, RecordType
from fleetlift.core.errors import BadInput, Forbidden, Unavailable
from fleetlift.levers.dns import DnsLever
from fleetlift.levers.route53 import NotInSync, Route53

IOT = DnsRecord(name="iot.example.test", new=("198.51.100.1",), ttl_s=30)
SIMPLE: Row = ("iot.example.test.", "A", "", None, 300, ("192.0.2.2", "192.0.2.1"))
ALIASED: Row = ("www.example.test.", "CNAME", "", None, 300, ("Old-Cloud.example.net",))


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Route53Server]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = Route53Server("Z1", [SIMPLE, ALIASED])
    with serving(server) as url:
        server.url = url  # type: ignore[attr-defined]
        yield server


def provider(zone: Route53Server, *, insync_within_s: float = 30.0) -> Route53:
    url: str = zone.url  # type: ignore[attr-defined]
    return Route53("/hostedzone/Z1", api=url, poll_s=0.01, timeout_s=5, insync_within_s=insync_within_s)


async def test_there_by_weights_and_back_exactly(zone: Route53Server) -> None:
    move = DnsLever(provider(zone), [IOT])
    assert await move.check() == []
    assert zone.rows[-1] == ("iot.example.test.", "A", "", None, 300, ("192.0.2.1", "192.0.2.2"))
    originals = await move.originals()
    await move.lower_ttl(originals)
    for share, weights in ((10, (20, 180)), (0.5, (1, 199)), (50, (100, 100))):
        await move.switch(originals, share_percent=share, switch_from=0.0)
        sets = {row[2]: row[3:] for row in zone.rows if row[0] == SIMPLE[0]}
        assert sets == {
            NEW_SET: (weights[0], 30, ("198.51.100.1",)),
            OLD_SET: (weights[1], 30, ("192.0.2.1", "192.0.2.2")),
        }
        assert await move.shares(originals) == {IOT.name: share}
        assert set(zone.changes.values()) == {0}, "a change counts once it is INSYNC"
    with pytest.raises(BadInput, match="half a per cent"):
        await move.switch(originals, share_percent=0.3, switch_from=0.0)
    await move.switch(originals, switch_from=0.0)
    assert [row[2:] for row in zone.rows if row[0] == SIMPLE[0]] == [("", None, 30, ("198.51.100.1",))]
    await move.switch(originals, share_percent=25, switch_from=0.0)
    await move.revert(originals)
    await move.restore_ttl(originals)
    assert [row[2:] for row in zone.rows if row[0] == SIMPLE[0]] == [
        ("", None, 300, ("192.0.2.1", "192.0.2.2"))
    ]


async def test_a_cname_is_weighted_too(zone: Route53Server) -> None:
    record = DnsRecord(name="www.example.test", type=RecordType.CNAME, new=("new-cloud.example.net",))
    move = DnsLever(provider(zone), [record])
    originals = await move.originals()
    assert originals[0].values == ("old-cloud.example.net",)
    await move.lower_ttl(originals)
    await move.switch(originals, share_percent=10, switch_from=0.0)
    assert await move.shares(originals) == {record.name: 10}
    await move.revert(originals)
    assert [row[5] for row in zone.rows if row[0] == ALIASED[0]] == [("old-cloud.example.net.",)]


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_answers_that_are_lost_do_no_harm(zone: Route53Server, lost: int) -> None:
    move = DnsLever(provider(zone), [IOT])
    originals = await move.originals()
    zone.lose_answers = lost
    await move.lower_ttl(originals)
    assert [row[4] for row in zone.rows if row[0] == SIMPLE[0]] == [30]


async def test_a_concurrent_change_is_refused_whole(
    zone: Route53Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs: Row = (*SIMPLE[:5], ("203.0.113.9",))
    stored = Route53._stored

    async def overtaken(self: Route53, name: str, kind: RecordType) -> object:
        found = await stored(self, name, kind)
        zone.rows = [theirs, ALIASED]
        return found

    move = DnsLever(provider(zone), [IOT])
    originals = await move.originals()
    monkeypatch.setattr(Route53, "_stored", overtaken)
    with pytest.raises(RecordsChanged, match="nothing was overwritten"):
        await move.lower_ttl(originals)
    assert zone.rows == [theirs, ALIASED]


async def test_what_it_says_when_it_cannot(zone: Route53Server) -> None:
    move = DnsLever(provider(zone), [IOT])
    originals = await move.originals()
    zone.refuse = Refused(403, "AccessDenied", "User is not authorized to perform this")
    with pytest.raises(Forbidden, match="AccessDenied"):
        await move.lower_ttl(originals)
    zone.refuse = Refused(503, "ServiceUnavailable", "try later")
    (problem,) = await move.check(originals)
    assert "ServiceUnavailable" in problem.text
    zone.refuse = None
    url: str = zone.url  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="does not exist"):
        await DnsLever(Route53("Z2", api=url), [IOT]).originals()
    zone.pending_polls = 10**9
    slow = DnsLever(provider(zone, insync_within_s=0.05), [IOT])
    with pytest.raises(NotInSync, match="not out on all servers"):
        await slow.lower_ttl(originals)
    assert len(zone.batches) == 1
    with pytest.raises(BadInput, match="hosted zone"):
        Route53("../etc")
    zone.pending_polls = 1
    weighted: list[Row] = [("iot.example.test.", "A", "mine", 5, 300, ("192.0.2.1",))]
    zone.rows = weighted
    assert "of your own" in (await move.check())[0].text
    assert zone.rows == weighted


async def test_an_endpoint_that_is_away(zone: Route53Server) -> None:
    with closing(__import__("socket").socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        away = Route53("Z1", api=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout_s=0.5)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer"):
            await DnsLever(away, [IOT]).originals()
        assert time.monotonic() - began < 15
