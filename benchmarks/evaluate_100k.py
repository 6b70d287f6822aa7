"""One round over 100,000 devices in the middle of a wave: how long it takes, and how much memory.

A real PostgreSQL with everything that 100,000 devices leave there in some minutes (registry, presence,
shadows, ledger, receipt windows, commands, members); the controller's own round over it, in a process of its
own: both sides observed, every gate measured anew, the decision, the commit with what changed. The process
holds what a bridge knows of the old side, inventory and reports; no feed runs, so that nothing but the round
is measured.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import psutil

from benchmarks.bench import Bench
from benchmarks.figures import BenchFailed, Figure, Measured
from benchmarks.processes import Profile
from fleetlift.backend.context import open_context
from fleetlift.config import load_run
from fleetlift.core.decide import begin, decide
from fleetlift.core.migration import Decision, FleetDevice, Member, MemberState, MigrationState, WavePhase
from fleetlift.core.orders import DevicePhase, DeviceReport
from fleetlift.core.plan import ladder
from fleetlift.levers.flag import FlagLever
from fleetlift.migrate.journal import Journal
from fleetlift.migrate.measure import Measurer
from fleetlift.migrate.planfile import parse_plan
from fleetlift.migrate.ports import EngineStore
from fleetlift.migrate.runner import Runner
from fleetlift.sides.fleetlift import FleetliftSide, endpoint_of, engine_key
from fleetlift.sides.legacy.side import LegacySide
from fleetlift.store import engine as store
from fleetlift.store.pool import Conn
from fleetlift.testing import running_backend

DEVICES = 100_000
EARLIER, WAVE = 25_000, 25_000  # moved by the waves before, and by the open one
ARRIVING = 1_000  # of the wave: their evidence comes in with the rounds that are measured
ROUNDS = 5
SENDING, COMING = 10, 100  # between two rounds each tenth device sends, each hundredth connects anew
SPAN_S = 120  # for which the wave has been open
COMMANDS = 10_000
OLD = "legacy"

FIGURES = (
    Figure(
        name="evaluate_100k_s",
        unit="s",
        better="lower",
        target=2.0,
        means="one round over 100,000 devices: observe, measure every gate anew, decide, commit; the median",
        limit="one plain read of every device's newest receipt by each path",
    ),
    Figure(
        name="evaluate_100k_mb",
        unit="MB",
        better="lower",
        target=500.0,
        means="the most memory that the controller's process held meanwhile",
    ),
)

PLAN = """
migration: large
fleet: {tenant: bench}
from: {legacy: "tcp://127.0.0.1:1"}
to: {fleetlift: default}
lever: flag
steps:
  - move: telemetry
    stages: [both]
    waves: [100%]
    bake: 1h
  - move: commands
    stages: [both]
    waves: [25%, 50%, 100%]
    bake: 1h
    gates:
      - telemetry.completeness >= 99%
      - telemetry.delay.p99 <= 2 x old
      - devices.silent == 0
      - moves.success >= 90%
      - commands.agreement >= 99%
      - commands.latency.p95 <= 2 x old
      - commands.executed_twice == 0
"""


class Spent(msgspec.Struct, kw_only=True):
    """Seconds of a round or a part of it: by the clock, and of processors."""

    wall: float = 0.0
    controller: float = 0.0
    postgres: float = 0.0


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the process found: each round's seconds by part, its peak memory, and what it decided."""

    first: dict[str, Spent]
    rounds: list[dict[str, Spent]]
    peak_mb: float
    gates: list[str]
    moved: int


# -- filling ----------------------------------------------------------------------------------------------


def mid_wave(now: float) -> tuple[MigrationState, list[FleetDevice]]:
    """A migration whose second rung is at its second wave, a few of it still on their way."""
    plan = parse_plan(PLAN)
    since = now - 86_400
    fleet = [
        FleetDevice(id=f"car-{n:06}", attributes={"tenant": "bench"}, connected=True, since=since)
        for n in range(DEVICES)
    ]
    state = begin(plan, fleet, int(now) - 1000)
    opened, epoch = now - SPAN_S, state.epoch + 3
    members: dict[str, Member] = {}
    for member in state.members.values():
        raised = member.rank < EARLIER + WAVE
        own = member.rank >= EARLIER
        arriving = own and member.rank < EARLIER + ARRIVING
        members[member.device] = msgspec.structs.replace(
            member,
            rung=2 if raised else 1,
            came_from=1 if raised else 0,
            epoch=epoch if raised else epoch - 2,
            wave=(1 if own else 0) if raised else 0,
            state=MemberState.MOVING if arriving else MemberState.MOVED,
            told_at=opened,
            moved_at=None if arriving else opened + 5,
        )
    return msgspec.structs.replace(
        state,
        rung=2,
        wave=1,
        wave_phase=WavePhase.MOVING,
        wave_opened_at=opened,
        measured_from=opened,
        epoch=epoch,
        members=members,
    ), fleet


async def fill(conn: Conn, state: MigrationState, now: float, progress: Callable[[str], None]) -> None:
    rungs = ladder(parse_plan(PLAN))
    progress("registry, presence, ledger")
    await conn.execute("INSERT INTO tenant (id, name) VALUES ('bench', 'bench')")
    await conn.execute(f"""
        CREATE TEMP TABLE d AS
            SELECT 'car-' || lpad(n::text, 6, '0') AS id, n FROM generate_series(0, {DEVICES - 1}) n;
        INSERT INTO device (id, tenant, attributes) SELECT id, 'bench', '{{"tenant": "bench"}}' FROM d;
        INSERT INTO device_route (device, epoch, migration, telemetry, commands, link)
            SELECT id, 1, 'large', 'both', 'both', 'both' FROM d;
        INSERT INTO presence (device, connected, since) SELECT id, true, now() - interval '1 day' FROM d;
        INSERT INTO ledger (device, channel, path, ranges, received, first_at, last_at)
            SELECT id, c, p, int8multirange(int8range(1, 5000 + n % 100)), 5000, now() - interval '1 day',
                   now() - make_interval(secs => n % 60)
            FROM d, unnest(ARRAY['position', 'health']) c, unnest(ARRAY['mqtt', '{OLD}']) p""")
    progress("receipt windows")
    await conn.execute(f"""
        INSERT INTO receipt_window (device, path, window_start, messages, delay_counts)
            SELECT id, p, to_timestamp({now - now % 10} - 10 * w), 10,
                   array_fill(0, ARRAY[20 + (n + w) % 10]) || ARRAY[4, 4, 2]
            FROM d, unnest(ARRAY['mqtt', '{OLD}']) p, generate_series(0, {SPAN_S // 10}) w""")
    progress("commands")
    wave = [m for m in state.members.values() if m.rung == state.rung and m.wave == state.wave]
    names = [m.device for m in wave if m.state is MemberState.MOVED]
    await conn.execute(
        f"""CREATE TEMP TABLE c AS SELECT
                (lpad(to_hex(((extract(epoch FROM at) * 1000)::bigint)), 12, '0') || '7'
                 || substr(md5(n::text), 1, 3) || '8' || substr(md5(n::text), 4, 15))::uuid AS id, device, at
            FROM (SELECT n, ($1::text[])[1 + n % array_length($1::text[], 1)] AS device,
                         to_timestamp({now - SPAN_S + 10} + n * {(SPAN_S - 20) / COMMANDS}) AS at
                  FROM generate_series(1, {COMMANDS}) n) x""",
        names,
    )
    await conn.execute("""
        INSERT INTO command
                (id, device, tenant, name, params, mode, status, created_by, created_at, expires_at, ended_at)
            SELECT id, device, 'bench', 'lock', '{}', 'execute', 'succeeded', 'bench', at,
                   at + interval '60 s', at + interval '0.3 s' FROM c;
        INSERT INTO command_path
                (command, path, device, mode, status, attempts, created_at, sent_at, ended_at)
            SELECT id, path, device, 'execute', status, 1, at, at, at + interval '0.3 s'
            FROM c, (VALUES ('new', 'succeeded'), ('old', 'duplicate')) p(path, status)""")
    progress("shadows and members")
    reports = [
        (m.device, msgspec.json.encode(report_of(m, rungs)).decode())
        for m in state.members.values()
        if m.state is MemberState.MOVED
    ]
    await conn.execute(
        """INSERT INTO shadow (device, name, reported, reported_meta, version)
           SELECT device, 'fleetlift', report::json, '{}'::json, 3
           FROM unnest($1::text[], $2::text[]) r(device, report)""",
        [device for device, _ in reports],
        [report for _, report in reports],
    )
    await store.create(conn, tenant="bench", plan=PLAN, state=state, audit=(), created_by="bench", now=now)
    await conn.execute(
        """INSERT INTO engine.baseline (migration, device, epoch, seqs)
           SELECT 'large', device, epoch, '{"position": 4000, "health": 4000}' FROM engine.member"""
    )
    progress("statistics of the tables")
    await conn.execute("ANALYZE")


def report_of(member: Member, rungs: Any) -> DeviceReport:
    return DeviceReport(epoch=member.epoch, phase=DevicePhase.MOVED, flags=rungs[member.rung].flags)


# -- the controller's process -----------------------------------------------------------------------------


class _Bridge:
    """What a bridge knows of its old side: the inventory, and the reports that came by the feed."""

    up, why_down, snapshots = True, "", 1

    def __init__(self, fleet: Mapping[str, FleetDevice], reports: Mapping[str, DeviceReport]) -> None:
        self.fleet, self.reports = fleet, reports


class _Parts:
    """Seconds of a round, by what it did; its parts follow one another."""

    def __init__(self, postmaster: int) -> None:
        self.spent: dict[str, Spent] = {}
        self._postmaster = psutil.Process(postmaster)

    def _clocks(self) -> tuple[float, float, float]:
        postgres = 0.0
        for process in (self._postmaster, *self._postmaster.children()):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()  # parallel workers that have ended are the postmaster's children
                postgres += times.user + times.system + times.children_user + times.children_system
        return time.perf_counter(), time.process_time(), postgres

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        before = self._clocks()
        try:
            yield
        finally:
            wall, controller, postgres = (
                now - then for now, then in zip(self._clocks(), before, strict=True)
            )
            spent = self.spent.setdefault(name, Spent())
            spent.wall += wall
            spent.controller += controller
            spent.postgres += postgres

    def timed(self, name: str, work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **given: Any) -> Any:
            with self.measured(name):
                return await work(*args, **given)

        return call


async def controller(directory: Path, now: float) -> Said:
    settings = load_run(directory)
    state, fleet = mid_wave(now)
    rungs = ladder(parse_plan(PLAN))
    late = [m for m in state.members.values() if m.state is MemberState.MOVING]
    bridge = _Bridge(
        {device.id: device for device in fleet},
        {m.device: report_of(m, rungs) for m in state.members.values() if m.state is MemberState.MOVED},
    )
    del state, fleet
    parts, decided = _Parts(postmaster_of(settings.path)), list[Decision]()

    def deciding(*given: Any) -> Decision:
        with parts.measured("decide"):
            decided[:] = [decide(*given)]
        return decided[0]

    async with open_context(settings, name="controller") as ctx:
        new = FleetliftSide(ctx, tenant="bench", key=engine_key(settings.path))
        lever = FlagLever(LegacySide("tcp://127.0.0.1:1", ""), new)
        kept = EngineStore(ctx.pool)
        async with ctx.pool.acquire() as conn:
            stored = await store.load(conn, "large")

        def measurer() -> Measurer:
            return Measurer(
                "large",
                backend=ctx.pool,
                engine=ctx.pool,
                old_path=OLD,
                log_end=new.log_end,
                commands_end=None,
            )

        measures = measurer()
        for part, owner, name in (
            ("observe", lever, "observe"),
            ("tell", lever, "move"),
            ("commit", kept, "commit"),
            ("adopt", new, "adopt"),
            ("follow", new, "follow_reports"),
            ("measure", measures, "samples"),
            ("timeline", measures, "rates"),
            ("timeline", measures, "latencies"),
        ):
            setattr(owner, name, parts.timed(part, getattr(owner, name)))
        runner = Runner(
            stored,
            store=kept,
            old=bridge,
            old_entry=lambda plan: {OLD: "tcp://127.0.0.1:1"},
            new=new,
            lever=lever,
            measures=measures,
            journal=Journal(directory / "large.jsonl"),
            endpoint=lambda plan: endpoint_of("default", mqtt=settings.mqtt, mqtts="", ca_pem=None),
            step=lambda name: None,
            decide=deciding,
        )
        del stored

        async def one_round() -> dict[str, Spent]:
            parts.spent.clear()
            measures._cached = None  # every gate is measured anew
            with parts.measured("all"):
                await runner.round(time.time())
            return dict(parts.spent)

        first = await one_round()
        rounds = []
        for n in range(ROUNDS):
            some = late[n * len(late) // ROUNDS : (n + 1) * len(late) // ROUNDS]
            await arrive(ctx.pool, [(m.device, report_of(m, rungs)) for m in some])
            await live(ctx.pool, n)
            rounds.append(await one_round())
        moved = sum(m.state is MemberState.MOVED for m in decided[0].state.members.values())
        gates = [f"{gate.gate}: {gate.verdict.value} ({gate.why})" for gate in decided[0].gates]
    status = Path("/proc/self/status").read_text()
    peak_kb = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    return Said(first=first, rounds=rounds, peak_mb=peak_kb / 1024, gates=gates, moved=moved)


async def arrive(pool: Any, reports: list[tuple[str, DeviceReport]]) -> None:
    """Devices say on the new side that they have moved."""
    await pool.execute(
        """INSERT INTO shadow (device, name, reported, reported_meta, version)
           SELECT device, 'fleetlift', report::json, '{}'::json, 3
           FROM unnest($1::text[], $2::text[]) r(device, report)
           ON CONFLICT (device, name) DO UPDATE SET reported = excluded.reported""",
        [device for device, _ in reports],
        [msgspec.json.encode(report).decode() for _, report in reports],
    )


async def live(pool: Any, n: int) -> None:
    """What devices leave between two rounds: some send on both channels by both paths, some connect anew."""
    await pool.execute(
        """UPDATE ledger SET last_at = now(), received = received + 1,
                  ranges = ranges + int8multirange(int8range(upper(ranges), upper(ranges) + 1))
           WHERE substr(device, 5)::int % $1 = $2""",
        SENDING,
        n % SENDING,
    )
    await pool.execute(
        """INSERT INTO receipt_window (device, path, window_start, messages, delay_counts)
           SELECT id, p, to_timestamp(floor(extract(epoch FROM now()) / 10) * 10), 2,
                  array_fill(0, ARRAY[20]) || ARRAY[2]
           FROM device, unnest($3::text[]) p WHERE substr(id, 5)::int % $1 = $2
           ON CONFLICT (window_start, path, device) DO UPDATE SET
                  messages = receipt_window.messages + excluded.messages""",
        SENDING,
        n % SENDING,
        ["mqtt", OLD],
    )
    await pool.execute(
        "UPDATE presence SET since = now() WHERE substr(device, 5)::int % $1 = $2", COMING, n % COMING
    )


async def plain_read_s(url: str) -> float:
    """Seconds to fetch what the ledger knows of every device, and nothing done with it."""
    connection = await asyncpg.connect(url)
    try:
        began = time.monotonic()
        await connection.fetch("SELECT device, path, max(last_at) FROM ledger GROUP BY device, path")
        return time.monotonic() - began
    finally:
        await connection.close()


# -- the bench --------------------------------------------------------------------------------------------


async def run(bench: Bench) -> list[Measured]:
    async with running_backend(
        bench.directory / "backend", arguments=["--workers", "auth,telemetry"]
    ) as backend:
        now = time.time()
        state, _ = mid_wave(now)
        connection = await asyncpg.connect(backend.settings.database_url)
        try:
            await fill(connection, state, now, lambda what: bench.progress(f"filling: {what}"))
        finally:
            await connection.close()
        bench.progress("rounds")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.evaluate_100k", str(backend.data_dir), repr(now)),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        profile: Profile
        async with bench.profiled(
            "six rounds over 100,000 devices", {"serve": backend.pid, "controller": process.pid}
        ) as profile:
            text, _ = await process.communicate()
        bench.progress("one plain read")
        read_s = await plain_read_s(backend.settings.database_url)
    if process.returncode != 0:
        raise BenchFailed(f"the controller's process ended with {process.returncode}")
    said = msgspec.json.decode(text.splitlines()[-1], type=Said)
    if said.moved != DEVICES:
        raise BenchFailed(f"{DEVICES - said.moved:,} devices were not seen to have moved")
    unmeasured = [gate for gate in said.gates if "no data" in gate]
    if unmeasured:
        raise BenchFailed(f"not measured: {'; '.join(unmeasured)}")
    median = sorted(said.rounds, key=lambda one: one["all"].wall)[len(said.rounds) // 2]
    busy = "" if profile.others_cores <= 0.5 else f"others used {profile.others_cores:.1f} cores"
    notes = (
        f"the median of {ROUNDS} rounds: {_told(median)}",
        f"the first round after a start, with journal, registry and routes of all: {_told(said.first)}",
        *said.gates,
    )
    return [
        Measured(name="evaluate_100k_s", value=median["all"].wall, limit=read_s, invalid=busy, notes=notes),
        Measured(name="evaluate_100k_mb", value=said.peak_mb),
    ]


def _told(one: dict[str, Spent]) -> str:
    """Wall seconds, and in brackets CPU seconds of controller and PostgreSQL."""
    return ", ".join(
        f"{name} {s.wall:.2f} s ({s.controller:.2f} + {s.postgres:.2f} s CPU)"
        for name, s in sorted(one.items(), key=lambda item: -item[1].wall)
        if s.wall >= 0.005
    )


def postmaster_of(directory: Path) -> int:
    """The process of the embedded PostgreSQL: its backends are its children."""
    return int((directory / "postgresql" / "data" / "postmaster.pid").read_text().split()[0])


if __name__ == "__main__":
    found = asyncio.run(controller(Path(sys.argv[1]), float(sys.argv[2])))
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
