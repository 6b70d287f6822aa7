"""The plan of a tenant's move: the design's own file is read, and every mistake is told with its line."""

import pytest

from fleetlift.core.errors import Conflict
from fleetlift.core.plan import Plan
from fleetlift.core.tenant.plan import (
    Copy,
    Drain,
    Freeze,
    SwitchDatabase,
    SwitchDns,
    TenantPlan,
    Validate,
    Warm,
    check_tenant_amendment,
    wave_problems,
    with_password,
)
from fleetlift.core.units import Share
from fleetlift.migrate.plan_reader import BadPlan
from fleetlift.migrate.tenant_planfile import parse_any_plan, parse_tenant_plan

PLAN = """\
migration: acme-to-dedicated
tenant: acme
from: {postgresql: "postgresql://multi/cloud", mqtt: "mqtts://iot.example.com", password_env: SOURCE_PW}
to: {postgresql: "postgresql://acme/cloud", mqtt: "mqtts://acme.example.com"}
lever: dns
dns: {server: "127.0.0.1:5353", zone: example.com, key: "env:FLEETLIFT_DNS_KEY"}
features: {registration: [users, device]}
rehearse: {tenant: pool, root: customers.id = 9}
steps:
  - copy: tenant data
    root: customers.id = 42
    tables:
      ts_kv: entity_id -> device.id | asset.id
      audit_log: customer_id
      currency: all
    from_replica: true
    chunk: 10000 rows
    follow: true
    verify: every row
  - warm: caches
  - validate: load
    scenario: captured-peak.yaml
    rate: 10000/s
    for: 4d
    gates: [load.errors == 0, load.latency.p99 <= 250ms]
  - freeze: [registration]
    at_most: 60s
  - switch: database
    at_most: 5s
  - switch: dns
    records:
      - {name: iot.example.com, ttl: 30s, to: 10.0.0.2}
      - {name: pool.example.com, to: [10.0.0.2, 10.0.0.3], pool: true}
    waves: [test-pool, 10%, 100%]
    gates: [devices.silent == 0, telemetry.completeness == 100%]
  - drain: old
    stragglers: relay
"""


def test_a_whole_plan_is_read() -> None:
    plan = parse_any_plan(PLAN)
    assert isinstance(plan, TenantPlan)
    kinds = [type(step) for step in plan.steps]
    assert kinds == [Copy, Warm, Validate, Freeze, SwitchDatabase, SwitchDns, Drain]
    copy, _, validate, freeze, database, dns, drain = plan.steps
    assert isinstance(copy, Copy)
    assert copy.root == "customers.id = 42"
    assert copy.tables["currency"] == "all"
    assert copy.from_replica
    assert isinstance(validate, Validate)
    assert (validate.rate_s, validate.for_s) == (10_000.0, 345_600.0)
    assert isinstance(freeze, Freeze)
    assert freeze.at_most_s == 60.0
    assert isinstance(database, SwitchDatabase)
    assert database.at_most_s == 5.0
    assert isinstance(dns, SwitchDns)
    assert dns.waves == ("test-pool", Share(percent=10.0), Share(percent=100.0))
    assert [record.pool for record in dns.records] == [False, True]
    assert isinstance(drain, Drain)
    assert drain.relay
    assert plan.rehearsal is not None
    assert plan.rehearsal.root == "customers.id = 9"


def test_a_fleets_plan_is_still_one() -> None:
    fleet = """
migration: m
fleet: {tenant: t}
from: {legacy: "tcp://127.0.0.1:7700"}
to: {fleetlift: default}
steps: [{move: telemetry, waves: [100%], bake: 1m}]
"""
    assert isinstance(parse_any_plan(fleet), Plan)


@pytest.mark.parametrize(
    ("before", "after", "line", "said"),
    [
        ("root: customers.id = 42", "root: customers", 11, "customers.id = 42"),
        ("audit_log: customer_id", "audit_log: ''", 14, "audit_log"),
        ("follow: true", "follow: false", 18, "a move always follows"),
        ("chunk: 10000 rows", "chunk: many", 17, "10000 rows"),
        ("for: 4d", "for: 4", 24, "duration"),
        ("rate: 10000/s", "rate: fast", 23, "rate"),
        ("load.errors == 0", "devices.silent == 0", 25, "not measured in this step"),
        ("freeze: [registration]", "freeze: [login]", 10, "'login' is not among 'features:'"),
        ("at_most: 60s", "at_most: 0s", 27, "above 0"),
        ("to: 10.0.0.2}", "to: nowhere}", 32, "no value of a record of type A"),
        ("waves: [test-pool, 10%, 100%]", "waves: [10%, 100%]", 34, "the test pool needs its wave"),
        ("waves: [test-pool, 10%, 100%]", "waves: [test-pool, 50%, 10%]", 34, "waves must grow"),
        (", pool: true", "", 34, "there is no test pool"),
        ('key: "env:FLEETLIFT_DNS_KEY"', "key: c2VjcmV0", 6, "holds no secrets"),
        ("postgresql://multi/cloud", "postgresql://me:pw@multi/cloud", 3, "holds no secrets"),
        ("postgresql://multi/cloud", "mysql://multi/cloud", 3, "expected postgres"),
        ("postgresql://acme/cloud", "postgresql://multi/cloud", 4, "two databases"),
        ("stragglers: relay", "straglers: relay", 37, "did you mean 'stragglers'"),
        ("  - warm: caches", "  - heat: caches", 20, "begins with one of"),
        ("lever: dns", "lever: flag", 5, "expected: dns"),
    ],
)
def test_mistakes_are_told_with_their_line(before: str, after: str, line: int, said: str) -> None:
    assert before in PLAN
    with pytest.raises(BadPlan) as told:
        parse_tenant_plan(PLAN.replace(before, after, 1), file="acme.yaml")
    assert said in str(told.value)
    assert f"acme.yaml:{line}:" in str(told.value)


def test_steps_have_their_order() -> None:
    text = PLAN.replace("  - warm: caches\n", "").replace("steps:\n", "steps:\n  - warm: caches\n")
    with pytest.raises(BadPlan, match="begins with '- copy: tenant data'"):
        parse_tenant_plan(text)


def test_names_need_the_database_switched_before() -> None:
    text = PLAN.replace("  - switch: database\n    at_most: 5s\n", "")
    with pytest.raises(BadPlan, match="only after 'switch: database'"):
        parse_tenant_plan(text)


SERVER = 'dns: {server: "127.0.0.1:5353", zone: example.com, key: "env:FLEETLIFT_DNS_KEY"}'
ROUTE53 = "dns: {route53: Z123}"


def with_waves(dns: str, waves: str) -> TenantPlan:
    text = PLAN.replace(SERVER, dns).replace("[test-pool, 10%, 100%]", waves)
    return parse_tenant_plan(text)


@pytest.mark.parametrize(
    ("dns", "waves", "said"),
    [
        (SERVER, "[test-pool, 100%]", ""),
        (ROUTE53, "[test-pool, 10%, 33.5%, 100%]", ""),
        (SERVER, "[test-pool, 10%, 100%]", "a share of 10 %: these servers have no weighted records"),
        (ROUTE53, "[test-pool, 33.3%, 100%]", "a share of 33.3 %: weights are set in steps of half"),
        (ROUTE53, "[test-pool, 50%]", "the last one is 50%: it has to be 100%"),
        (SERVER, "[test-pool]", "the last one is test-pool: it has to be 100%"),
    ],
)
def test_waves_that_cannot_be_done_are_told_before_anything_moves(dns: str, waves: str, said: str) -> None:
    """They would come up when the database and the pool have switched, and only all could be taken back."""
    problems = wave_problems(with_waves(dns, waves))
    assert bool(problems) == bool(said)
    assert said in "".join(problems)


def test_an_amendment_brings_no_wave_that_cannot_be_done() -> None:
    """One that an older version let in does not stand in the way of another amendment."""
    good, bad = with_waves(SERVER, "[test-pool, 100%]"), with_waves(SERVER, "[test-pool, 10%, 100%]")
    check_tenant_amendment(good, good, 1)
    check_tenant_amendment(bad, good, 1)
    check_tenant_amendment(bad, bad, 1)
    with pytest.raises(Conflict, match="no weighted records"):
        check_tenant_amendment(good, bad, 1)


@pytest.mark.parametrize(
    ("url", "password", "whole"),
    [
        ("postgresql://me@host:5432/db", "p@ss/w", "postgresql://me:p%40ss%2Fw@host:5432/db"),
        ("postgresql://me@/db?host=/run", "x", "postgresql://me:x@/db?host=/run"),
        ("postgresql://me@host/db", None, "postgresql://me@host/db"),
    ],
)
def test_a_password_joins_its_address(url: str, password: str | None, whole: str) -> None:
    assert with_password(url, password) == whole
