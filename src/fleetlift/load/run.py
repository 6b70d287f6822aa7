"""Run a load test: start the generators, let them begin together, put together what they tell, ask for proof.

`run_load` is used by the command line, the benches, and a tenant's step `validate: load`.
"""

import asyncio
import contextlib
import math
import os
import secrets
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.core.load_result import (
    POINTS_MOST,
    ClassResult,
    Counts,
    LoadResult,
    Point,
    laid_together,
    load_samples,
    why_invalid,
)
from fleetlift.core.workload import Protocol, Scenario, expected
from fleetlift.load import histograms
from fleetlift.load.credentials import Login
from fleetlift.load.wire import (
    LINE_MOST,
    Begin,
    Connected,
    Done,
    Endpoint,
    Failed,
    Order,
    Player,
    Said,
    Stop,
    Tick,
    Work,
)
from fleetlift.load.witness import FleetliftApi, Witness
from fleetlift.migrate.load_section import load_result_plots, load_section
from fleetlift.supervise import before_exec

__all__ = [
    "Progress",
    "Target",
    "endpoint_of",
    "load_result_plots",
    "load_samples",
    "load_section",
    "run_load",
]

A_PROCESS: Final = 12_000.0  # messages a second that one process is given at most, unless told otherwise
BEGIN_IN_S: Final = 0.3
SIGN_IN_MOST_S: Final = 1800.0
SILENT_MOST_S: Final = 60.0  # a generator that says nothing for so long does not work any more
_PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "http": 80, "https": 443}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where the load goes. `url`: mqtt://, mqtts://, http:// or https://, without credentials.

    `logins`: who signs in; empty: devices named by the run, without passwords. With `api` (a Fleetlift) and
    `provision` the devices are made for the run instead. `witness`: who is asked what was stored, else `api`.
    """

    url: str
    logins: Sequence[Login] = ()
    ca: str | None = None
    auth: str = "basic"
    api: FleetliftApi | None = None
    provision: bool = False
    witness: Witness | None = None


class Progress(msgspec.Struct, kw_only=True):
    """How it stands, for whoever looks on. `done` and `total` count what `doing` is about."""

    doing: str = "starting"
    done: int = 0
    total: int = 0
    at_s: float = 0.0
    for_s: float = 0.0
    devices: int = 0
    connected: int = 0
    offered: int = 0
    accepted: int = 0
    errors: int = 0
    offered_s: float = 0.0  # in the last second
    rate_s: float = 0.0
    p99_s: float | None = None
    late_p99_s: float = 0.0

    @property
    def left_s(self) -> float:
        return max(self.for_s - self.at_s, 0.0)


def endpoint_of(url: str, *, ca: str | None = None, auth: str = "basic") -> tuple[Protocol, Endpoint]:
    """What a URL says. Raises BadInput."""
    expected = "expected mqtt://HOST:PORT, mqtts://HOST:PORT, http://… or https://…"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise BadInput(f"{url!r}: {expected}") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise BadInput(f"{parts.scheme}://{parts.hostname or ''}: {expected}")
    if parts.password or parts.username:
        raise BadInput("the target's address holds no credentials: name a file with --credentials")
    protocol = Protocol.MQTT if parts.scheme.startswith("mqtt") else Protocol.HTTP
    path = unquote(parts.path) + (f"?{parts.query}" if parts.query else "")
    if protocol is Protocol.MQTT and path.strip("/"):
        raise BadInput(f"{url!r}: an MQTT target has no path; topics are in the scenario")
    if protocol is Protocol.HTTP and not path.strip("/"):
        path = "/topics/{topic}?qos=1"
    if any(ord(letter) < 33 for letter in path):
        raise BadInput(f"{url!r}: {expected}")
    endpoint = Endpoint(
        host=parts.hostname,
        port=port or _PORTS[parts.scheme],
        tls=parts.scheme in ("mqtts", "https"),
        ca=ca,
        path=path,
        auth=auth,
    )
    return protocol, endpoint


def processes_for(scenario: Scenario) -> int:
    """As many as the peak needs, at most one a core."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, math.ceil(expected(scenario).peak_rate_s / A_PROCESS), scenario.devices))


async def run_load(
    scenario: Scenario,
    target: Target,
    *,
    rate_s: float | None = None,
    for_s: float | None = None,
    processes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: asyncio.Event | None = None,
    drain_s: float = 30.0,
    on_start: Callable[[list[int]], None] | None = None,
) -> LoadResult:
    """Play `scenario` against `target`. `stop` ends it early, with the result so far.

    `on_start` is told the generators' process ids. Raises BadInput, or Unavailable when no device gets in or
    a generator ends.
    """
    scenario = msgspec.structs.replace(
        scenario,
        rate_s=scenario.rate_s if rate_s is None else rate_s,
        for_s=scenario.for_s if for_s is None else for_s,
    )
    protocol, endpoint = endpoint_of(target.url, ca=target.ca, auth=target.auth)
    if protocol is not scenario.protocol:
        scenario = msgspec.structs.replace(scenario, protocol=protocol)
    run = secrets.token_hex(4)
    shown = Progress(for_s=scenario.for_s, devices=scenario.devices)
    tell = progress or (lambda progress: None)

    def step(what: str, done: int, total: int) -> None:
        shown.doing, shown.done, shown.total = what, done, total
        tell(shown)

    async with contextlib.AsyncExitStack() as stack:
        logins = target.logins
        if target.provision:
            if target.api is None:
                raise BadInput("devices can be made on a Fleetlift only: say where its API is")
            logins = await stack.enter_async_context(target.api.provisioned(scenario.devices, run, step))
        if not logins:
            logins = [Login(f"load-{run}-{n:06}") for n in range(scenario.devices)]
        if len(logins) < scenario.devices:
            raise BadInput(
                f"the scenario has {scenario.devices} devices, and there are credentials for {len(logins)}"
            )
        count = max(1, min(processes or processes_for(scenario), scenario.devices))
        players = [
            Player(number=n, device=login.device, password=login.password)
            for n, login in enumerate(logins[: scenario.devices])
        ]
        witness = target.witness or target.api
        generators = [
            await stack.enter_async_context(
                _generator(
                    Work(
                        scenario=scenario,
                        endpoint=endpoint,
                        players=players[n * len(players) // count : (n + 1) * len(players) // count],
                        run=run,
                        account=witness is not None,
                        drain_s=drain_s,
                    )
                )
            )
            for n in range(count)
        ]
        if on_start is not None:
            on_start([g.pid for g in generators])
        test = _Test(scenario, target, generators, shown, tell)
        await test.sign_in()
        ended = await test.play(stop)
        result = test.result(ended)
        stored, why = None, ""
        if witness is None:
            why = "the target cannot be asked what it has stored"
        elif not all(done.account_whole for done in ended):
            why = "too many messages failed to keep an account of each"
        elif scenario.protocol is Protocol.MQTT and scenario.qos == 0:
            why = "nothing is acknowledged with QoS 0, and so nothing can be missing"
        else:
            try:
                accounts = [account for done in ended for account in done.account]
                stored = await witness.ask(accounts, run, result.started_at, step)
            except FleetError as exc:
                why = str(exc)
        shown.doing = "done"
        tell(shown)
        return msgspec.structs.replace(result, stored=stored, why_unproved=why)


# -- the generators ---------------------------------------------------------------------------------------


class _Generator:
    """One process at work."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def tell(self, what: Work | Order) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # that it has ended is noticed by listening to it
            self._process.stdin.write(msgspec.json.encode(what) + b"\n")
            await self._process.stdin.drain()

    async def hear(self, within_s: float) -> Said:
        """Raises Unavailable when it fails, ends or falls silent."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(within_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise Unavailable(
                f"a generator (process {self.pid}) has said nothing for {within_s:.0f} s"
            ) from None
        if not line:
            raise Unavailable(f"a generator (process {self.pid}) ended before its work was done")
        said: Said = msgspec.json.decode(line, type=Said)
        if isinstance(said, Failed):
            raise Unavailable(f"a generator cannot go on: {said.problem}")
        return said


@contextlib.asynccontextmanager
async def _generator(work: Work) -> AsyncIterator[_Generator]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fleetlift.load.generator"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_MOST,
        preexec_fn=before_exec(os.getpid(), signal.SIGKILL),
        start_new_session=True,  # Ctrl-C reaches the parent alone, which stops its generators in order
    )
    generator = _Generator(process)
    try:
        await generator.tell(work)
        yield generator
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(5.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class _Second(msgspec.Struct):
    """What has been told of one second, by so many generators."""

    told: int = 0
    offered: int = 0
    accepted: int = 0
    errors: int = 0
    connected: int = 0
    late_p99_s: float = 0.0
    latency: list[str] = []


class _Test:
    """One run of all generators, from their sign-in to the result."""

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        generators: list[_Generator],
        shown: Progress,
        tell: Callable[[Progress], None],
    ) -> None:
        self._scenario, self._target, self._generators = scenario, target, generators
        self._shown, self._tell = shown, tell
        self._seconds: dict[int, _Second] = defaultdict(_Second)
        self._points: list[Point] = []
        self._ended = 0
        self._started_at = 0.0

    async def sign_in(self) -> None:
        """Until every device has tried. Raises Unavailable when none is in."""
        shown = self._shown
        shown.doing, shown.done, shown.total = "signing in", 0, self._scenario.devices
        latest: list[Connected] = [Connected(devices=0, refused=0)] * len(self._generators)

        async def one(n: int) -> None:
            while not latest[n].over:
                said = await self._generators[n].hear(SILENT_MOST_S * 5)
                assert isinstance(said, Connected)
                latest[n] = said
                shown.connected = shown.done = sum(c.devices for c in latest)
                self._tell(shown)

        async with asyncio.timeout(SIGN_IN_MOST_S):
            await asyncio.gather(*(one(n) for n in range(len(self._generators))))
        if not shown.connected:
            problem = next((c.problem for c in latest if c.problem), "nobody says why")
            raise Unavailable(f"no device could sign in at {self._target.url}: {problem}")

    async def play(self, stop: asyncio.Event | None) -> list[Done]:
        at = time.monotonic() + BEGIN_IN_S
        epoch = time.time() - time.monotonic()
        self._started_at = at + epoch
        self._shown.doing, self._shown.done, self._shown.total = "playing", 0, 0
        for generator in self._generators:
            await generator.tell(Begin(at=at, epoch=epoch))

        async def stopped() -> None:
            assert stop is not None
            await stop.wait()
            for generator in self._generators:
                await generator.tell(Stop())

        stopping = None if stop is None else asyncio.create_task(stopped(), name="stop")
        try:
            return await asyncio.gather(*(self._until_done(g) for g in self._generators))
        finally:
            if stopping is not None:
                stopping.cancel()

    async def _until_done(self, generator: _Generator) -> Done:
        while not isinstance(said := await generator.hear(SILENT_MOST_S), Done):
            if isinstance(said, Tick):
                self._heard(said)
        self._ended += 1
        return said

    def _heard(self, tick: Tick) -> None:
        second = self._seconds[tick.second]
        second.told += 1
        second.offered += tick.offered
        second.accepted += tick.accepted
        second.errors += tick.errors
        second.connected += tick.connected
        second.late_p99_s = max(second.late_p99_s, tick.late_p99_s)
        second.latency = [*second.latency, tick.latency]
        for number in sorted(self._seconds):
            # A generator that drains longer tells of seconds that others do not live to see.
            if self._seconds[number].told >= len(self._generators) or self._ended:
                self._whole(number, self._seconds.pop(number))

    def _whole(self, number: int, second: _Second) -> None:
        latency = histograms.empty()
        for text in second.latency:
            histograms.add(latency, text)
        found = histograms.quantiles(latency)
        self._points.append(
            Point(
                at_s=float(number),
                offered=second.offered,
                accepted=second.accepted,
                errors=second.errors,
                connected=second.connected,
                p99_s=found.p99_s if found.n else None,
                late_p99_s=second.late_p99_s,
            )
        )
        if len(self._points) > 2 * POINTS_MOST:
            self._points = list(laid_together(tuple(self._points), POINTS_MOST))
        shown = self._shown
        shown.at_s = number + 1.0
        shown.connected = second.connected
        shown.offered += second.offered
        shown.accepted += second.accepted
        shown.errors += second.errors
        shown.offered_s, shown.rate_s = float(second.offered), float(second.accepted)
        shown.p99_s = found.p99_s if found.n else None
        shown.late_p99_s = second.late_p99_s
        if number >= self._scenario.for_s:
            shown.doing = "waiting for answers"
        self._tell(shown)

    def result(self, ended: list[Done]) -> LoadResult:
        for number in sorted(self._seconds):
            self._whole(number, self._seconds.pop(number))
        scenario = self._scenario
        total = histograms.empty()
        classes = []
        for n, (of, devices) in enumerate(zip(scenario.classes, scenario.counts, strict=True)):
            latency, counts = histograms.empty(), Counts()
            for done in ended:
                histograms.add(latency, done.latency[n])
                counts = counts.plus(done.counts[n])
            total.add(latency)
            classes.append(
                ClassResult(
                    name=of.name,
                    devices=devices,
                    counts=counts,
                    latency=histograms.quantiles(latency),
                    histogram=histograms.encoded(latency) if latency.get_total_count() else "",
                )
            )
        late, lag, sign_in = histograms.empty(), histograms.empty(), histograms.empty()
        problems: dict[str, int] = defaultdict(int)
        for done in ended:
            histograms.add(late, done.late)
            histograms.add(lag, done.lag)
            histograms.add(sign_in, done.sign_in)
            for text, times in done.problems.items():
                problems[text] += times
        counts = Counts()
        for one in classes:
            counts = counts.plus(one.counts)
        lasted_s = max(done.lasted_s for done in ended)
        wall_s = max(lasted_s, *(done.last_accepted_s for done in ended))
        cpu = tuple(round(done.cpu, 4) for done in ended)
        late_q, lag_q = histograms.quantiles(late), histograms.quantiles(lag)
        return LoadResult(
            scenario=scenario.name,
            target=self._target.url,
            protocol=str(scenario.protocol),
            qos=scenario.qos,
            devices=scenario.devices,
            processes=len(ended),
            seed=scenario.seed,
            started_at=self._started_at,
            asked_for_s=scenario.for_s,
            lasted_s=lasted_s,
            wall_s=wall_s,
            rate_s=counts.accepted / wall_s,
            counts=counts,
            latency=histograms.quantiles(total),
            late=late_q,
            lag=lag_q,
            sign_in=histograms.quantiles(sign_in),
            cpu=cpu,
            closed=sum(done.closed for done in ended),
            reconnects=sum(done.reconnects for done in ended),
            classes=tuple(classes),
            series=laid_together(tuple(self._points)),
            histogram=histograms.encoded(total) if total.get_total_count() else "",
            buckets=tuple(histograms.buckets(total)),
            invalid=why_invalid(counts, late_q, lag_q, cpu),
            problems=tuple(
                f"{text} ({n:,} times)" for text, n in sorted(problems.items(), key=lambda i: -i[1])
            ),
        )
