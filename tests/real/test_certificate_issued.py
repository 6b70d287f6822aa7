"""A certificate from a real database: what it holds is what is stored, and it verifies."""

import msgspec
import pytest
from msgspec.structs import replace

from fleetlift.core.certificate import read, render
from fleetlift.core.command import Command, Mode, Path, PathState, PathStatus, Status, uuid7
from fleetlift.core.decide import begin, decide
from fleetlift.core.errors import Conflict, NotFound
from fleetlift.core.migration import (
    AuditEntry,
    DeviceObservation,
    FleetDevice,
    Observations,
    Phase,
    Sample,
)
from fleetlift.core.orders import DevicePhase, DeviceReport
from fleetlift.core.plan import ladder
from fleetlift.core.ranges import RangeSet
from fleetlift.migrate.certificate import issue, public_text, signing_key, verify_certificate
from fleetlift.migrate.planfile import parse_plan
from fleetlift.store import commands, ledger
from fleetlift.store import engine as store
from fleetlift.store.ledger import LedgerRow
from fleetlift.store.pool import Conn, Pool
from fleetlift.testing import scratch_directory

PLAN = """
migration: connect
fleet: {tenant: carshare}
from: {legacy: "tcp://127.0.0.1:1"}
to: {fleetlift: default}
confidence: none
steps:
  - move: telemetry
    stages: [both]
    waves: [1 device, 100%]
    bake: 1s
    gates: [telemetry.completeness >= 99%]
"""
START = 1_800_000_000.25
FLEET = tuple(FleetDevice(id=one, connected=True, since=1.0) for one in ("car-1", "Car-2", "car-3"))


async def started(conn: Conn) -> store.StoredMigration:
    state = begin(parse_plan(PLAN), FLEET, 10)
    await store.create(
        conn,
        tenant="carshare",
        plan=PLAN,
        state=state,
        audit=[AuditEntry(kind="migration_started", text="started", actor="ann")],
        created_by="ann",
        now=START,
    )
    return await store.load(conn, "connect")


async def finished(conn: Conn) -> None:
    """A whole migration: real decisions, committed one by one, of a fleet that obeys at once."""
    plan, stored, now = parse_plan(PLAN), await started(conn), START
    seen: dict[str, DeviceObservation] = {}
    good = Sample(value=99.97, n=15310, evidence={"summary": "4 of 15,310 missing"})
    while stored.state.phase is not Phase.FINISHED:
        now += 0.7
        assert now < START + 60
        view = Observations(fleet=FLEET, devices=seen, samples={"telemetry.completeness >= 99%": good})
        decision = decide(plan, stored.state, view, now)
        stored = await store.commit(
            conn, stored, decision.state, audit=decision.audit, gates=decision.gates, now=now
        )
        for tell in decision.actions:
            flags = ladder(plan)[tell.rung].flags
            report = DeviceReport(epoch=tell.epoch, phase=DevicePhase.MOVED, flags=flags)
            seen[tell.device] = DeviceObservation(
                connected_new=True, report=report, report_by_new=report, new_telemetry_at=now + 0.1
            )


async def with_facts(conn: Conn) -> None:
    """What the devices sent and were told meanwhile; one device is of nobody's migration."""

    def row(device: str, path: str, ranges: str, received: int, doubles: int = 0) -> LedgerRow:
        return LedgerRow(
            device=device,
            channel="can",
            path=path,
            ranges=RangeSet.from_pg(ranges),
            received=received,
            doubles=doubles,
            first_at=START,
            last_at=START + 9,
        )

    await ledger.save(
        conn,
        [
            row("car-1", "legacy", "{[1,101)}", 103, 3),
            row("car-1", "mqtt", "{[51,151)}", 100),
            row("Car-2", "mqtt", "{[1,10),[11,21)}", 19),
            row("stranger", "mqtt", "{[1,1000)}", 999),
        ],
    )
    await conn.execute("INSERT INTO tenant (id) VALUES ('carshare') ON CONFLICT DO NOTHING")
    both = tuple(
        PathState(path=path, mode=Mode.EXECUTE, status=PathStatus.SUCCEEDED, created_at=START + 1)
        for path in (Path.NEW, Path.OLD)
    )
    one = Command(
        id=uuid7(START + 1, 1),
        device="car-1",
        tenant="carshare",
        name="lock",
        params={},
        mode=Mode.EXECUTE,
        status=Status.SUCCEEDED,
        created_by="ann",
        created_at=START + 1,
        expires_at=START + 60,
        paths=both,
    )
    later = replace(one, id=uuid7(START + 900, 2), created_at=START + 900, paths=both[:1])
    elsewhere = replace(one, id=uuid7(START + 1, 3), device="stranger")
    failed = replace(one, id=uuid7(START + 1, 4), status=Status.FAILED, paths=both[:1])
    await commands.insert(conn, [one, later, elsewhere, failed])


async def test_a_certificate_holds_what_is_stored_and_verifies(pool: Pool) -> None:
    async with pool.acquire() as conn:
        await finished(conn)
        await with_facts(conn)
        members = await store.members_page(conn, "connect")
    with scratch_directory() as directory:
        data = await issue(pool, pool, "connect", data_dir=directory, now=START + 1000)
        assert (directory / "certificate.key").stat().st_mode & 0o777 == 0o600
        key = public_text(signing_key(directory))
        again = await issue(pool, pool, "connect", data_dir=directory, now=START + 1000)
    assert data == again
    found = verify_certificate(data, trusted_key=key)
    assert found.ok, [check for check in found.checks if not check.ok]
    certificate = read(data)
    assert [(m.device, m.rank) for m in certificate.members] == [(m.device, m.rank) for m in members]
    assert (found.members, found.finished, found.phase) == ({"moved": 3}, True, "finished")
    assert [msgspec.structs.astuple(total) for total in certificate.totals] == [
        ("legacy", "can", 1, 103, 100, 3, 0),
        ("mqtt", "can", 2, 119, 119, 0, 0),
    ]
    assert msgspec.structs.astuple(certificate.sums) == (150 + 19, 1, 50)
    assert certificate.commands.by_status == {"succeeded": 1, "failed": 1}
    assert certificate.commands.executed_twice == 1
    forged = replace(certificate, sums=replace(certificate.sums, missing=0))
    assert not verify_certificate(render(forged)).ok


async def test_a_migration_under_way_is_certified_only_on_demand(pool: Pool) -> None:
    async with pool.acquire() as conn:
        await started(conn)
    with scratch_directory() as directory:
        with pytest.raises(Conflict, match="--so-far"):
            await issue(pool, pool, "connect", data_dir=directory, now=START + 1)
        with pytest.raises(NotFound):
            await issue(pool, pool, "other", data_dir=directory, now=START + 1)
        data = await issue(pool, pool, "connect", data_dir=directory, now=START + 1, so_far=True)
    found = verify_certificate(data)
    assert found.ok and not found.finished and not found.issuer_checked


async def test_what_was_changed_in_the_database_is_found(pool: Pool) -> None:
    """Whoever edits the audit log where it is stored has broken its chain, signed though it is."""
    async with pool.acquire() as conn:
        await finished(conn)
        for change in (
            "UPDATE engine.audit SET actor = 'nobody' WHERE number = 3",
            "UPDATE engine.audit SET evidence = '{}' WHERE kind = 'wave_passed'",
            "DELETE FROM engine.audit WHERE number = 4",
            "UPDATE engine.plan SET plan = replace(plan, '99%', '90%')",
        ):
            with scratch_directory() as directory:
                await conn.execute(change)
                data = await issue(pool, pool, "connect", data_dir=directory, now=START + 1000)
            wrong = {check.name for check in verify_certificate(data).checks if not check.ok}
            assert "audit log" in wrong, change
