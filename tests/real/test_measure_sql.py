"""Gates' measurements on rows as the backend writes them."""

import random
import time
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from fleetlift.core.command import uuid7
from fleetlift.core.delays import bucket
from fleetlift.core.figures import arm, spread
from fleetlift.core.gates import Source, parse_gate, parse_query_gate
from fleetlift.core.migration import Basis, Member, MemberState, MigrationState, Sample, WavePhase
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag, Flags, LinkFlag, TelemetryFlag
from fleetlift.core.plan import Move, Rung
from fleetlift.core.units import parse_share
from fleetlift.migrate.measure import Measurer
from fleetlift.migrate.reconnects import OldConnects
from fleetlift.store import engine as store
from fleetlift.store.pool import Pool

NOW = float(int(time.time()))
OPENED = NOW - 60.0
TELEMETRY = Flags(telemetry=TelemetryFlag.BOTH)
DRY = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.DRY_RUN)
BOTH = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.BOTH, link=LinkFlag.BOTH)


def rungs(flags: Flags) -> tuple[Rung, ...]:
    return (
        Rung(index=0, step=-1),
        Rung(
            index=1,
            step=0,
            move=Move.TELEMETRY,
            flags=flags,
            waves=(parse_share("100%"),),
            grace_s=5.0,
            commands_timeout_s=10.0,
        ),
    )


def wave(*devices: str, waiting: str = "") -> MigrationState:
    epoch = 5
    members = {
        d: Member(
            device=d,
            rank=n,
            rung=1,
            epoch=epoch,
            state=MemberState.MOVED,
            told_at=OPENED,
            moved_at=OPENED + 1,
            wave=0,
        )
        for n, d in enumerate(devices)
    }
    if waiting:
        members[waiting] = Member(device=waiting, rank=90)
    return MigrationState(
        name="move",
        rung=1,
        wave=0,
        wave_phase=WavePhase.BAKING,
        wave_opened_at=OPENED,
        measured_from=OPENED,
        epoch=epoch,
        members=members,
    )


@pytest.fixture
async def measurer(pool: Pool) -> Measurer:
    async with pool.acquire() as conn:
        await store.create(
            conn,
            tenant="carshare",
            plan="",
            state=MigrationState(name="move"),
            audit=[],
            created_by="ann",
            now=OPENED,
        )
    return Measurer("move", backend=pool, engine=pool, old_path="legacy")


async def measure(
    measurer: Measurer, metric: str, state: MigrationState, flags: Flags, now: float = NOW
) -> Sample:
    limit = {"%": "99%", "s": "1s", "": "0"}
    gate = parse_gate(
        f"{metric} >= 99%"
        if metric.endswith(("completeness", "agreement", "success"))
        else f"{metric} <= {limit['s' if '.p' in metric else '']}"
    )
    return (await measurer.samples([gate], state, rungs(flags), now))[gate.text]


async def ledger(
    pool: Pool,
    device: str,
    path: str,
    ranges: str,
    *,
    age_s: float = 6.0,
    channel: str = "pos",
) -> None:
    await pool.execute(
        "INSERT INTO ledger (device, channel, path, ranges, received, first_at, last_at) "
        "VALUES ($1, $2, $3, $4::text::int8multirange, 1, to_timestamp($5), to_timestamp($6)) "
        "ON CONFLICT (device, channel, path) DO UPDATE "
        "SET ranges = excluded.ranges, last_at = excluded.last_at",
        device,
        channel,
        path,
        ranges,
        OPENED,
        NOW - age_s,
    )


# -- completeness ------------------------------------------------------------------------------------------


async def test_completeness_counts_what_the_old_path_knows_and_the_new_one_lacks(
    pool: Pool, measurer: Measurer
) -> None:
    """From the first seq on the new path, every number known by either path is expected there."""
    await measurer.note_baselines({"car-1": 5, "car-2": 5})
    await ledger(pool, "car-1", "legacy", "{[0,200)}")
    await ledger(pool, "car-1", "mqtt", "{[100,150),[160,190)}")
    await ledger(pool, "car-2", "legacy", "{[0,50)}")
    await ledger(pool, "car-2", "mqtt", "{[20,50)}")
    sample = await measure(measurer, "telemetry.completeness", wave("car-1", "car-2"), TELEMETRY)
    assert (sample.n, sample.evidence["missing"], sample.evidence["devices"]) == (130, 20, 1)
    assert sample.value == pytest.approx(100 * 110 / 130)
    assert sample.evidence["summary"] == "20 of 130 missing, 1 device"
    [example] = sample.evidence["examples"]
    assert (example["device"], example["gaps"]) == ("car-1", "{[150,160),[190,200)}")


async def test_completeness_is_a_count_whatever_the_gaps(pool: Pool, measurer: Measurer) -> None:
    """Where nothing is missing as well as where much is, it is what a count of single numbers gives."""
    chance = random.Random(1)
    cars = [f"car-{n:03}" for n in range(150)]
    before: dict[str, set[int]] = {}
    for car in cars:
        before[car] = set(range(chance.choice((0, 5)), chance.choice((8, 12))))
        if chance.random() < 0.3:
            before[car] = set()
        if before[car]:
            await ledger(pool, car, "mqtt", multirange(before[car]))
        await ledger(pool, car, "legacy", "{[0,12)}")
    await measurer.note_baselines(dict.fromkeys(cars, 5))
    await measure(measurer, "telemetry.completeness", wave(*cars), TELEMETRY)

    expected = missing = 0
    for car in cars:
        more = set(range(chance.choice((12, 12, 13)), chance.randint(13, 20)))
        lost = set(chance.sample(range(10, 20), 3)) if chance.random() < 0.3 else set()
        has = set() if chance.random() < 0.1 else (before[car] | more) - lost
        if has:
            await ledger(pool, car, "mqtt", multirange(has))
        top = chance.randint(12, 20)
        await ledger(pool, car, "legacy", f"{{[0,{top})}}")
        has = has or before[car]
        baseline = max(before[car], default=-1)
        own = {one for one in has if one > baseline}
        wanted = range(min(own, default=12), max(top, *(one + 1 for one in has or {0})))
        expected += len(wanted)
        missing += len(set(wanted) - own)
    sample = await measure(measurer, "telemetry.completeness", wave(*cars), TELEMETRY)
    assert (sample.n, sample.evidence["missing"]) == (expected, missing)
    assert 0 < missing < expected


def multirange(numbers: set[int]) -> str:
    return "{" + ",".join(f"[{one},{one + 1})" for one in sorted(numbers)) + "}"


async def test_a_message_still_under_way_is_not_missing(pool: Pool, measurer: Measurer) -> None:
    """What the old path got a moment ago may still come by the new one; a grace later it is missing."""
    await measurer.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "legacy", "{[0,200)}", age_s=0.0)
    await ledger(pool, "car-1", "mqtt", "{[100,190)}", age_s=0.0)
    first = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY)
    assert first.value is None
    later = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY, NOW + 5.5)
    assert (later.n, later.evidence["missing"]) == (100, 10)


async def test_a_channel_that_never_comes_by_the_new_side_is_missing(pool: Pool, measurer: Measurer) -> None:
    """A device that keeps a whole channel from the new side is not overlooked."""
    await measurer.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "mqtt", "{[100,200)}")
    await ledger(pool, "car-1", "legacy", "{[0,200)}")
    await ledger(pool, "car-1", "legacy", "{[0,50)}", channel="battery")
    first = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY)
    assert first.value == 100.0
    await ledger(pool, "car-1", "legacy", "{[0,80)}", channel="battery")
    sample = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY)
    assert sample.evidence["missing"] == 30
    assert sample.evidence["examples"][0]["channel"] == "battery"


async def test_what_a_device_left_out_while_it_was_away_is_not_missing(
    pool: Pool, measurer: Measurer
) -> None:
    """A device that went back and moves again counts from its new order on, also after a restart."""
    await ledger(pool, "car-1", "mqtt", "{[0,100)}")
    await measurer.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "legacy", "{[0,400)}")
    await ledger(pool, "car-1", "mqtt", "{[0,100),[300,390)}")
    for fresh in (measurer, Measurer("move", backend=pool, engine=pool, old_path="legacy")):
        sample = await measure(fresh, "telemetry.completeness", wave("car-1"), TELEMETRY)
        assert (sample.n, sample.evidence["missing"]) == (100, 10)


async def test_a_device_that_counts_anew_is_measured_by_its_new_count(pool: Pool, measurer: Measurer) -> None:
    """Installed anew in the middle of a wave: its former heights make neither a huge gap nor a pass."""
    await ledger(pool, "car-1", "mqtt", "{[0,4000)}")
    await measurer.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "legacy", "{[0,5000)}")
    await ledger(pool, "car-1", "mqtt", "{[0,4000),[4500,5000)}")
    before = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY)
    assert (before.value, before.n) == (100.0, 500)

    await pool.execute("UPDATE ledger SET restarts = 1, began_at = to_timestamp($1)", NOW - 20)
    await ledger(pool, "car-1", "legacy", "{[1,10)}")
    await ledger(pool, "car-1", "mqtt", "{}")
    sample = await measure(measurer, "telemetry.completeness", wave("car-1"), TELEMETRY, NOW + 1)
    assert sample.value is None, "on the old side alone until it has tried again: nothing to judge"

    await ledger(pool, "car-1", "legacy", "{[1,60)}")
    await ledger(pool, "car-1", "mqtt", "{[20,50)}")
    for fresh in (measurer, Measurer("move", backend=pool, engine=pool, old_path="legacy")):
        sample = await measure(fresh, "telemetry.completeness", wave("car-1"), TELEMETRY, NOW + 2)
        assert (sample.n, sample.evidence["missing"]) == (40, 10)


async def test_a_wave_that_has_fallen_silent_is_not_complete(pool: Pool, measurer: Measurer) -> None:
    """Connected devices that have stopped to send leave no gap behind: that is no data, and never a pass."""
    await measurer.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "mqtt", "{[100,200)}")
    alone = Flags(telemetry=TelemetryFlag.NEW)
    assert (await measure(measurer, "telemetry.completeness", wave("car-1"), alone)).value == 100.0
    later = await measure(measurer, "telemetry.completeness", wave("car-1"), alone, NOW + 400)
    assert (later.value, later.evidence["summary"]) == (None, "nothing has come from the wave for 406 s")


async def test_figures_of_a_reader_that_has_fallen_behind_are_no_data(pool: Pool, measurer: Measurer) -> None:
    """A telemetry reader that stands still leaves an account of the past: no gate passes on it."""
    created = datetime.fromtimestamp(OPENED, UTC)
    end = 1000

    async def log_end() -> tuple[datetime, int]:
        return created, end

    async def reader_at(seq: int) -> None:
        await pool.execute(
            "INSERT INTO log_position (reader, stream_created, seq) VALUES ('ledger', $1, $2) "
            "ON CONFLICT (reader) DO UPDATE SET seq = excluded.seq",
            created,
            seq,
        )

    fresh = Measurer("move", backend=pool, engine=pool, old_path="legacy", log_end=log_end)
    await fresh.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "legacy", "{[0,200)}")
    await ledger(pool, "car-1", "mqtt", "{[100,200)}")
    await delays(pool, "car-1", "mqtt", 0.2, 100)

    async def value(metric: str, at: float) -> float | None:
        fresh._cached = None
        return (await measure(fresh, metric, wave("car-1"), TELEMETRY, at)).value

    assert await value("telemetry.completeness", NOW) is None  # no reader has ever stored where it stands
    await reader_at(1000)
    assert await value("telemetry.completeness", NOW + 1) == 100.0
    end = 1400
    for second in range(2, 5):  # within the grace
        assert await value("telemetry.completeness", NOW + second) == 100.0
    for second in range(5, 9):
        await value("telemetry.completeness", NOW + second)
    assert await value("telemetry.completeness", NOW + 9) is None
    assert await value("telemetry.delay.p99", NOW + 9) is None
    await reader_at(1400)
    assert await value("telemetry.completeness", NOW + 10) == 100.0
    assert await value("telemetry.delay.p99", NOW + 10) is not None
    # After a pause nothing is known of what came meanwhile: only a reader at the very end will do.
    end = 1500
    assert await value("telemetry.completeness", NOW + 60) is None


async def test_a_feed_that_is_behind_leaves_completeness_without_data(pool: Pool, measurer: Measurer) -> None:
    """While a device sends by both, what the old side has is half of the comparison."""
    behind = Measurer(
        "move", backend=pool, engine=pool, old_path="legacy", feed_behind=lambda within_s: "the feed is away"
    )
    await behind.note_baselines({"car-1": 5})
    await ledger(pool, "car-1", "legacy", "{[0,200)}")
    await ledger(pool, "car-1", "mqtt", "{[100,200)}")
    sample = await measure(behind, "telemetry.completeness", wave("car-1"), TELEMETRY)
    assert (sample.value, sample.evidence["summary"]) == (None, "the feed is away")
    alone = Flags(telemetry=TelemetryFlag.NEW)
    assert (await measure(behind, "telemetry.completeness", wave("car-1"), alone)).value == 100.0


# -- delay, silence ----------------------------------------------------------------------------------------


async def delays(pool: Pool, device: str, path: str, delay_s: float, count: int) -> None:
    counts = [0] * (bucket(delay_s) + 1)
    counts[-1] = count
    start = NOW - NOW % 10 - 10
    await pool.execute(
        "INSERT INTO receipt_window (device, path, window_start, messages, delay_counts) "
        "VALUES ($1, $2, to_timestamp($3), $4, $5)",
        device,
        path,
        start,
        count,
        counts,
    )


async def test_delay_is_compared_with_the_same_devices_on_the_old_path(
    pool: Pool, measurer: Measurer
) -> None:
    await delays(pool, "car-1", "mqtt", 0.2, 100)
    await delays(pool, "car-1", "legacy", 0.4, 100)
    await delays(pool, "car-7", "legacy", 9.0, 100)
    sample = await measure(measurer, "telemetry.delay.p99", wave("car-1"), TELEMETRY)
    assert sample.value == pytest.approx(0.2, rel=0.11)
    assert sample.old == pytest.approx(0.4, rel=0.11)
    assert (sample.n, sample.old_n) == (100, 100)


async def test_where_the_old_path_is_gone_devices_still_there_are_the_comparison(
    pool: Pool, measurer: Measurer
) -> None:
    await delays(pool, "car-1", "mqtt", 0.2, 100)
    await delays(pool, "car-7", "legacy", 0.3, 100)
    state = wave("car-1", waiting="car-7")
    sample = await measure(measurer, "telemetry.delay.p50", state, Flags(telemetry=TelemetryFlag.NEW))
    assert sample.old == pytest.approx(0.3, rel=0.11)
    assert sample.evidence["basis"] == "devices still on the old side"


async def test_a_wave_that_sent_nothing_has_no_delay(measurer: Measurer) -> None:
    sample = await measure(measurer, "telemetry.delay.p99", wave("car-1"), TELEMETRY)
    assert (sample.value, sample.n) == (None, 0)


# -- commands ----------------------------------------------------------------------------------------------


async def command(
    pool: Pool,
    n: int,
    *,
    old: str | None = None,
    new: str | None = None,
    new_mode: str = "execute",
    age_s: float = 20.0,
    took: tuple[float, float] = (0.1, 0.1),
    device: str = "car-1",
    name: str = "lock",
) -> None:
    """A command of `age_s` ago; `old` and `new` are the paths' statuses, None: it does not go there."""
    made = NOW - age_s
    ident = uuid7(made, n)
    await pool.execute(
        "INSERT INTO command "
        "(id, device, tenant, name, params, mode, status, created_by, created_at, expires_at) "
        "VALUES ($1, $2, 'carshare', $4, '{}', 'execute', 'sent', 'ann', to_timestamp($3), "
        "to_timestamp($3::float8 + 60))",
        ident,
        device,
        made,
        name,
    )
    for path, status, mode, s in (("old", old, "execute", took[0]), ("new", new, new_mode, took[1])):
        if status is not None:
            open_ = status in ("queued", "sent", "acknowledged")
            await pool.execute(
                "INSERT INTO command_path "
                "(command, path, device, mode, status, created_at, sent_at, ended_at) "
                "VALUES ($1, $2, $3, $4, $5, to_timestamp($6), to_timestamp($6), to_timestamp($7))",
                ident,
                path,
                device,
                mode,
                status,
                made,
                None if open_ else made + s,
            )


@pytest.mark.parametrize(
    ("old", "new", "agree"),
    [
        ("succeeded", "would-execute", True),
        ("failed", "would-refuse", True),
        ("succeeded", "would-refuse", False),
        ("failed", "would-execute", False),
        ("succeeded", "expired", False),
        ("succeeded", "sent", False),  # unanswered for longer than the rung's timeout
        ("expired", "expired", None),  # the device was away: says nothing of either side
    ],
)
async def test_agreement_in_dry_run(
    pool: Pool, measurer: Measurer, old: str, new: str, agree: bool | None
) -> None:
    """The new side agrees when it would do what the old side did."""
    await command(pool, 1, old=old, new=new, new_mode="dry-run")
    sample = await measure(measurer, "commands.agreement", wave("car-1"), DRY)
    assert sample.value == (None if agree is None else 100.0 * agree)
    assert sample.n == (agree is not None)


async def test_what_is_carried_out_in_a_dry_run_is_seen(pool: Pool, measurer: Measurer) -> None:
    """Firmware that takes a dry run for real executes each command twice, and agrees with nothing."""
    await command(pool, 1, old="succeeded", new="succeeded", new_mode="dry-run")
    await command(pool, 2, old="succeeded", new="would-execute", new_mode="dry-run")
    dry = Flags(commands=CommandsFlag.DRY_RUN)
    double = await measure(measurer, "commands.executed_twice", wave("car-1"), dry)
    assert (double.value, double.n) == (1.0, 2)
    measurer._cached = None
    agreed = await measure(measurer, "commands.agreement", wave("car-1"), dry)
    assert (agreed.value, agreed.n) == (50.0, 2)


@pytest.mark.parametrize(
    ("old", "new", "agree", "twice"),
    [
        ("succeeded", "duplicate", True, 0),
        ("duplicate", "succeeded", True, 0),
        ("failed", "duplicate", True, 0),
        ("succeeded", "succeeded", False, 1),
        ("duplicate", "duplicate", False, 0),
        ("succeeded", "expired", False, 0),
    ],
)
async def test_agreement_in_both(
    pool: Pool, measurer: Measurer, old: str, new: str, agree: bool, twice: int
) -> None:
    """One path executes and the other is refused as its double; twice executed is counted."""
    await command(pool, 1, old=old, new=new)
    sample = await measure(measurer, "commands.agreement", wave("car-1"), BOTH)
    assert (sample.value, sample.n) == (100.0 * agree, 1)
    measurer._cached = None
    double = await measure(measurer, "commands.executed_twice", wave("car-1"), BOTH)
    assert (double.value, double.n) == (float(twice), 1)


async def test_a_command_in_flight_is_not_judged_yet(pool: Pool, measurer: Measurer) -> None:
    await command(pool, 1, old="succeeded", new="sent", new_mode="dry-run", age_s=3.0)
    sample = await measure(measurer, "commands.agreement", wave("car-1"), DRY)
    assert (sample.value, sample.evidence["pending"]) == (None, 1)


async def test_other_devices_probes_and_earlier_commands_do_not_count(pool: Pool, measurer: Measurer) -> None:
    await command(pool, 1, old="succeeded", new="expired", device="car-9")
    await command(pool, 2, new="expired", name="fleetlift.probe")
    await command(pool, 3, old="succeeded", new="expired", age_s=70.0)
    sample = await measure(measurer, "commands.agreement", wave("car-1"), BOTH)
    assert (sample.value, sample.n) == (None, 0)


async def test_latency_counts_commands_without_an_answer_as_slow(pool: Pool, measurer: Measurer) -> None:
    """A side that loses commands does not look fast."""
    for n in range(8):
        await command(pool, n, old="succeeded", new="duplicate", took=(0.2, 0.1))
    for n in range(8, 10):
        await command(pool, n, old="succeeded", new="sent", took=(0.2, 0.0))
    sample = await measure(measurer, "commands.latency.p95", wave("car-1"), BOTH)
    assert sample.value is not None
    assert sample.value > 5.0
    assert sample.old == pytest.approx(0.2, abs=0.01)
    assert (sample.n, sample.old_n) == (10, 10)


async def test_on_the_last_rung_latency_is_compared_with_earlier_and_other_devices(
    pool: Pool, measurer: Measurer
) -> None:
    for n in range(6):
        await command(pool, n, new="succeeded", took=(0.0, 0.3))
        await command(pool, n + 10, old="succeeded", took=(0.5, 0.0), device="car-7")
    state = wave("car-1", waiting="car-7")
    sample = await measure(measurer, "commands.latency.p50", state, Flags(commands=CommandsFlag.NEW))
    assert sample.value == pytest.approx(0.3, abs=0.01)
    assert sample.old == pytest.approx(0.5, rel=0.11)
    agreement = await measure(measurer, "commands.agreement", state, Flags(commands=CommandsFlag.NEW))
    assert (agreement.value, agreement.n) == (100.0, 6)


# -- the timeline ------------------------------------------------------------------------------------------


async def test_the_timeline_shows_the_devices_of_the_migration(pool: Pool, measurer: Measurer) -> None:
    """Messages a second and latencies, by path; those of other devices and probes are left out."""
    for device in ("car-1", "car-2", "stranger"):
        await delays(pool, device, "mqtt", 0.2, 100)
        await delays(pool, device, "legacy", 0.2, 50)
        await delays(pool, device, "other", 0.2, 900)
    over = NOW - NOW % 10  # what was counted in the window before is all in the last ten seconds
    assert await measurer.rates(["car-1", "car-2"], over) == (10.0, 20.0)
    assert await measurer.rates([], over) == (0.0, 0.0)

    await command(pool, 1, old="succeeded", new="succeeded", took=(0.5, 0.25))
    await command(pool, 2, new="succeeded", took=(0.0, 9.0), device="stranger")
    await command(pool, 3, new="succeeded", took=(0.0, 9.0), name=PROBE_COMMAND)
    await command(pool, 4, new="expired", took=(0.0, 9.0))
    found = await measurer.latencies(["car-1", "car-2"], NOW)
    assert found == {"old": pytest.approx((0.5, 0.5)), "new": pytest.approx((0.25, 0.25))}


# -- the others --------------------------------------------------------------------------------------------


async def test_a_device_that_comes_and_goes_is_flapping(pool: Pool, measurer: Measurer) -> None:
    for device, times in (("car-1", 4), ("car-2", 2), ("car-9", 9)):
        for n in range(times):
            await pool.execute(
                "INSERT INTO presence_event (device, connected, at) VALUES ($1, true, to_timestamp($2))",
                device,
                NOW - n - 1,
            )
    sample = await measure(measurer, "connections.flapping", wave("car-1", "car-2"), TELEMETRY)
    assert (sample.value, sample.n) == (1.0, 2)
    assert sample.evidence["examples"] == [{"device": "car-1", "connects": 4}]


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("SELECT count(*) FROM device", 0.0),
        ("SELECT 2.5;", 2.5),
        ("SELECT 1, 2", None),
        ("SELECT NULL", None),
        ("SELECT n FROM generate_series(1, 3) n", None),
        ("no SQL at all", None),
        ("INSERT INTO tenant (id) VALUES ('x') RETURNING 1", None),
        ("WITH x AS (DELETE FROM tenant RETURNING 1) SELECT count(*) FROM x", None),
        ("SELECT count(*) FROM (SELECT pg_sleep(30)) s", None),
    ],
)
async def test_a_free_query_gives_one_number_and_changes_nothing(
    pool: Pool, measurer: Measurer, query: str, value: float | None
) -> None:
    """Read-only and short; whatever else it returns is no data."""
    gate = parse_query_gate(Source.SQL, query, "<= 5")
    started = time.monotonic()
    sample = (await measurer.samples([gate], wave("car-1"), rungs(TELEMETRY), NOW))[gate.text]
    assert sample.value == value
    assert time.monotonic() - started < 25


async def test_a_prometheus_server_that_is_away_is_no_data(measurer: Measurer) -> None:
    gate = parse_query_gate(Source.PROMETHEUS, "up", ">= 1", url="http://127.0.0.1:9")
    sample = (await measurer.samples([gate], wave("car-1"), rungs(TELEMETRY), NOW))[gate.text]
    assert sample.value is None


# -- beside a control --------------------------------------------------------------------------------------


def with_control(state: MigrationState, *devices: str, **differ: object) -> MigrationState:
    """The state with `devices` not raised yet."""
    behind = {d: Member(device=d, rank=100 + n, **differ) for n, d in enumerate(devices)}  # type: ignore[arg-type]
    return replace(state, members={**state.members, **behind})


CONTROL = tuple(f"van-{n}" for n in range(6))
CARS = tuple(f"car-{n}" for n in range(1, 4))


async def test_commands_are_compared_with_equally_chosen_devices_that_stay_behind(
    pool: Pool, measurer: Measurer
) -> None:
    """The sums are by device: one device's failures are told from those of many."""
    for n, device in enumerate(CARS * 4):
        await command(
            pool, n, new="failed" if device == "car-1" else "succeeded", old="duplicate", device=device
        )
    for n, device in enumerate(CONTROL * 2):
        await command(pool, 100 + n, old="succeeded", device=device)
    await command(pool, 300, old="failed", device="canary")
    state = with_control(wave(*CARS), *CONTROL, "canary")
    by_name = Measurer("move", backend=pool, engine=pool, old_path="legacy", canaries=["canary"])
    sample = await measure(by_name, "commands.success", state, BOTH)
    assert sample.arm == arm([(4, 4), (4, 0), (4, 0)])
    assert (sample.basis, sample.old_arm) == (Basis.DEVICES, arm([(2, 0)] * 6))
    assert "control, 6 devices" in sample.evidence["summary"]
    times = await measure(by_name, "commands.latency.p95", state, BOTH)
    assert times.spread is not None and times.old_spread is not None
    assert (times.spread.devices, times.old_spread.devices, times.old_spread.n) == (3, 6, 12)


async def test_a_wave_with_a_canary_is_compared_with_itself(pool: Pool, measurer: Measurer) -> None:
    """Who was named and not chosen differs from the others for reasons of somebody's own."""
    for n, device in enumerate(CARS * 4):
        await command(pool, n, new="succeeded", old="duplicate", device=device)
    for n, device in enumerate(CONTROL * 2):
        await command(pool, 100 + n, old="succeeded", device=device)
    named = Measurer("move", backend=pool, engine=pool, old_path="legacy", canaries=["car-1"])
    sample = await measure(named, "commands.latency.p95", with_control(wave(*CARS), *CONTROL), BOTH)
    assert (sample.basis, sample.evidence["basis"]) == (Basis.SAME, "the same commands")


async def test_commands_count_up_to_the_first_that_is_still_open(pool: Pool, measurer: Measurer) -> None:
    """Else what is answered quickly would speak for what is not answered at all."""
    for n in range(6):
        await command(pool, n, new="succeeded", age_s=20.0 - n)
    await command(pool, 50, new="sent", age_s=9.0, device="car-2")
    for n in range(60, 70):
        await command(pool, n, new="succeeded", age_s=5.0)
    alone = Flags(commands=CommandsFlag.NEW)
    sample = await measure(measurer, "commands.success", wave("car-1", "car-2"), alone)
    assert (sample.n, sample.evidence["pending"]) == (6, 1)
    measurer._cached = None
    later = await measure(measurer, "commands.success", wave("car-1", "car-2"), alone, NOW + 2)
    assert later.n == 17
    assert later.value == pytest.approx(100 * 16 / 17)


async def test_delays_are_read_once_and_added_up(pool: Pool, measurer: Measurer) -> None:
    """What lies in windows that are over is not read again; a control is counted by its own path."""
    for device in CARS:
        await delays(pool, device, "mqtt", 0.2, 50)
    for device in CONTROL:
        await delays(pool, device, "legacy", 0.1, 10)
    state = with_control(wave(*CARS), *CONTROL)
    first = await measure(measurer, "telemetry.delay.p95", state, TELEMETRY)
    assert first.spread == spread([{bucket(0.2): 50}] * 3)
    assert (first.basis, first.old_spread) == (Basis.DEVICES, spread([{bucket(0.1): 10}] * 6))
    measurer._cached = None
    await measure(measurer, "telemetry.delay.p95", state, TELEMETRY, NOW + 60)
    await pool.execute("DELETE FROM receipt_window")
    measurer._cached = None
    again = await measure(measurer, "telemetry.delay.p95", state, TELEMETRY, NOW + 61)
    assert (again.spread, again.old_spread) == (first.spread, first.old_spread)


async def test_connections_an_hour_are_those_of_both_sides(pool: Pool) -> None:
    """The old side's are known from its feed; who has a link to the new side counts there."""
    old = OldConnects(OPENED - 100)
    for device in CONTROL[:3]:
        old.add(device, NOW - 5)
    old.add("van-0", OPENED - 50)  # before the measurement
    for at in (NOW - 30, NOW - 20):
        await pool.execute(
            "INSERT INTO presence_event (device, connected, at) VALUES ('car-1', true, to_timestamp($1))", at
        )
    counting = Measurer("move", backend=pool, engine=pool, old_path="legacy", old_connects=old)
    sample = await measure(counting, "connections.rate", with_control(wave(*CARS), *CONTROL), TELEMETRY)
    assert sample.arm is not None and sample.old_arm is not None
    assert (sample.arm.devices, sample.arm.x) == (3, 2)
    assert sample.arm.n == pytest.approx(3 * 59 / 3600)
    assert (sample.old_arm.devices, sample.old_arm.x) == (6, 3)
    assert sample.value == pytest.approx(2 / sample.arm.n)


async def test_figures_of_commands_and_presence_of_the_past_are_no_data(pool: Pool) -> None:
    """With the worker dead, "none was executed twice" would hold alone, and so would "nobody flaps"."""
    created, last, lost = datetime.fromtimestamp(OPENED, UTC), 0, ""

    async def commands_end() -> tuple[datetime, int]:
        return created, last

    async def presence_lost() -> str:
        return lost

    fresh = Measurer(
        "move",
        backend=pool,
        engine=pool,
        old_path="legacy",
        commands_end=commands_end,
        presence_lost=presence_lost,
    )
    await command(pool, 1, new="succeeded")

    async def value(metric: str, at: float) -> tuple[float | None, str]:
        fresh._cached = None
        found = await measure(fresh, metric, wave("car-1"), Flags(commands=CommandsFlag.NEW), at)
        return found.value, found.evidence["summary"]

    assert await value("commands.executed_twice", NOW) == (0.0, "0 of 1")  # nothing was ever answered
    last = 700
    for second in range(1, 9):
        seen = await value("commands.executed_twice", NOW + second)
    assert seen == (None, "the reader of commands is more than 5 s behind the log")
    await pool.execute(
        "INSERT INTO log_position (reader, stream_created, seq) VALUES ('commands', $1, 700)", created
    )
    assert (await value("commands.executed_twice", NOW + 9))[0] == 0.0
    assert (await value("connections.flapping", NOW + 9))[0] == 0.0
    lost = "the worker that keeps presence (state) does not answer"
    assert await value("connections.flapping", NOW + 10) == (None, lost)
