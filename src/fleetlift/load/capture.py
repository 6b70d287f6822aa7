"""Recording what devices send to a running Fleetlift, from its log, with the proof that nothing is missing.

The log numbers its messages without a hole, and the recorder reads all of them, those it leaves out too: so
every number between the first and the last is accounted for. Where a capture begins and ends is marked by a
message of its own in the log; it is complete once the second one has come out.
Commands are read from the registry of commands, since a command to a connected device is in no log.
"""

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import asyncpg
import msgspec

from fleetlift.bus.log import LogBatch, LogMessage, LogPosition, read, stream_state
from fleetlift.bus.publish import Publisher
from fleetlift.config import Settings
from fleetlift.core.capture import (
    Account,
    CapturedMessage,
    Direction,
    Manifest,
    Origin,
    State,
    in_share,
    origin,
)
from fleetlift.core.command import uuid7
from fleetlift.core.errors import BadInput, NotFound, Unavailable
from fleetlift.core.identity import is_replay_id, is_replay_tenant
from fleetlift.core.masking import Masker, Rules
from fleetlift.core.telemetry import HEADER_AGAIN, HEADER_RECEIVED, HEADER_SEQ, HEADER_TS
from fleetlift.device.links import with_stamp
from fleetlift.load.capture_file import (
    BLOCK_BYTES,
    SEGMENT_BYTES,
    CaptureWriter,
    OutOfRoom,
    read_manifest,
    recover_to_go_on,
)
from fleetlift.log import get_logger
from fleetlift.store import devices as device_store
from fleetlift.store.pool import Pool, open_pool

log = get_logger(__name__)

CHECKPOINT_S = 0.5
COMMANDS_EVERY_S = 1.0
COMMANDS_OVERLAP_S = 30.0  # a transaction this old may still add a command that was made then
COMMANDS_MAX = 5000  # in one query
COUNTS_MAX = 3  # of commands at the end: one may be committed between counting and looking
END_WITHIN_S = 30.0
BATCH_MAX = 4000
OWNERS_CACHED_MAX = 2_000_000
_DATABASE_AWAY = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)
MARK = "fleetlift/capture"  # topic of the messages that mark a capture's beginning and end


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Whose messages are recorded. `feed`: a side whose feed is recorded, not what devices publish."""

    percent: float = 100.0
    devices: frozenset[str] | None = None
    tenant: str | None = None
    feed: str = ""

    def chooses(self, device: str) -> bool:
        if self.devices is not None and device not in self.devices:
            return False
        return self.percent >= 100.0 or in_share(device, self.percent)

    def __str__(self) -> str:
        parts = [f"{self.percent:g}% of devices"]
        if self.devices is not None:
            parts.append(f"{len(self.devices)} named devices")
        if self.feed:
            parts.append(f"the feed of {self.feed}")
        return ", ".join(parts)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`key`: for pseudonyms; None: devices keep their names."""

    to: Path
    for_s: float
    selection: Selection = Selection()
    max_bytes: int | None = None
    rules: Rules = Rules()
    key: bytes | None = None
    resume: bool = False
    block_bytes: int = BLOCK_BYTES
    segment_bytes: int = SEGMENT_BYTES

    def __repr__(self) -> str:
        return f"Options(to={self.to}, for_s={self.for_s}, selection={self.selection})"


class Progress(msgspec.Struct):
    """How a capture stands. `behind`: messages of the log not yet read."""

    messages: int = 0
    stored_bytes: int = 0
    payload_bytes: int = 0
    behind: int = 0
    until_s: float = 0.0
    doing: str = "starting"


class Recorder:
    """Decides about each message of the log, and hands those selected to the writer. No I/O of its own."""

    def __init__(self, selection: Selection, masker: Masker, writer: CaptureWriter, marks: str) -> None:
        self._selection, self._masker, self._writer, self._marks = selection, masker, writer, marks
        self.owners: dict[str, str] = {}

    def unknown(self, batch: Sequence[LogMessage]) -> list[str]:
        """Devices of a batch whose tenant has to be looked up before `take`."""
        if self._selection.tenant is None:
            return []
        found = {where.device for message in batch if (where := origin(message.topic)) is not None}
        return [device for device in found - self.owners.keys() if self._selection.chooses(device)]

    def take(self, message: LogMessage) -> None:
        """Account for a message, and record it when it is selected. Raises OutOfRoom."""
        account = self._writer.account
        account.passes(message.seq, message.at)
        where = origin(message.topic)
        reason = self._left_out(message, where)
        if reason:
            account.leaves_out(reason)
            return
        assert where is not None
        account.offered += 1
        if where.kind == "feed":
            self._record(where.device, *_of_feed(message, where), "up")
        else:
            qos = 0 if message.headers.get("Nmqtt-Pub") == "0" else 1
            way: Direction = "down" if where.kind == "down" else "up"
            self._record(where.device, message.at, message.topic, qos, message.payload, way)

    def take_command(self, row: Mapping[str, Any]) -> None:
        self._writer.account.commands += 1
        request = {
            "name": row["name"],
            "params": msgspec.Raw(row["params"].encode()),
            "mode": row["mode"],
            "expires_at": row["expires_at"],
        }
        topic = f"$aws/commands/things/{row['device']}/executions/{row['id']}/request/json"
        self._record(row["device"], row["created_at"], topic, 1, msgspec.json.encode(request), "down")

    def _left_out(self, message: LogMessage, where: Origin | None) -> str:
        if where is None:
            return "mark" if message.topic.startswith(self._marks) else "no device's"
        if is_replay_id(where.device):
            return "replayed"
        if where.kind == "command":
            return "copy of a command"
        if self._selection.feed:
            if where.kind != "feed" or where.side != self._selection.feed:
                return "not of the feed"
            if HEADER_AGAIN in message.headers:
                return "read again"
        elif where.kind == "feed":
            return "of a feed"
        if not self.selected(where.device):
            return "not selected"
        return ""

    def selected(self, device: str) -> bool:
        wanted = self._selection
        if not wanted.chooses(device):
            return False
        return wanted.tenant is None or self.owners.get(device) == wanted.tenant

    def _record(self, device: str, at_s: float, topic: str, qos: int, payload: bytes, way: Direction) -> None:
        account = self._writer.account
        topic, in_topic = self._masker.topic(topic, device)
        payload, in_payload = self._masker.payload(payload, device)
        account.masked += in_topic + in_payload
        account.payload_bytes += len(payload)
        name = self._masker.device(device)
        try:
            self._writer.add(CapturedMessage(name, at_s, topic, qos, payload, way))
        except BadInput as too_large:
            log.warning("message_not_captured", reason=str(too_large))  # and missing in the account


def _of_feed(message: LogMessage, where: Origin) -> tuple[float, str, int, bytes]:
    """A feed's message as the device would have published it itself: ts and seq within its body."""
    head = message.headers
    at_s = message.at
    with contextlib.suppress(ValueError):
        at_s = float(head.get(HEADER_RECEIVED, message.at))
    stamp = []
    with contextlib.suppress(ValueError):
        stamp.append(f'"ts":{round(float(head[HEADER_TS]) * 1000)}') if HEADER_TS in head else None
    if head.get(HEADER_SEQ, "").isdecimal():
        stamp.append(f'"seq":{head[HEADER_SEQ]}')
    payload = message.payload
    if stamp and payload.strip()[:1] == b"{":
        payload = with_stamp(payload, ",".join(stamp).encode())
    return at_s, where.topic, 1, payload


async def capture(
    settings: Settings, options: Options, *, stop: asyncio.Event, progress: Progress | None = None
) -> Manifest:
    """Record until the time is over, `stop` is set, or nothing more fits. Returns the closed manifest.

    Raises BadInput, NotFound (tenant), Unavailable when log or database do not answer at the start.
    """
    progress = progress or Progress()
    if options.selection.tenant is not None and is_replay_tenant(options.selection.tenant):
        raise BadInput(f"tenant {options.selection.tenant!r} is the replays' own: it has nothing to capture")
    async with open_pool(settings.database_url, name="capture", size=2) as pool:
        await _check_tenant(pool, options.selection.tenant)
        publisher = Publisher(settings, name="capture")
        try:
            run = await _begin(settings, options, pool, publisher, stop, progress)
            return await run.run()
        finally:
            await publisher.close()


async def _check_tenant(pool: Pool, tenant: str | None) -> None:
    if tenant is None:
        return
    async with pool.acquire() as conn:
        if not await device_store.existing_tenants(conn, [tenant]):
            raise NotFound(f"tenant {tenant!r} does not exist: 'fleetlift tenant list' names them")


async def _begin(
    settings: Settings,
    options: Options,
    pool: Pool,
    publisher: Publisher,
    stop: asyncio.Event,
    progress: Progress,
) -> "_Run":
    created, _, _ = await stream_state(settings)
    now = time.time()
    seen: dict[str, float] = {}
    if options.resume:
        before = read_manifest(options.to)
        _check_same(before, options)
        found, lock = recover_to_go_on(options.to, reason="its recorder was killed")
        manifest, account, seen = found.manifest, found.account, found.recent
        if manifest.state not in (State.RECOVERED, State.STOPPED) or not account.created:
            lock.close()
            raise BadInput(f"{options.to} is {manifest.state.value}: there is nothing to go on with")
        manifest = msgspec.structs.replace(
            manifest,
            state=State.RECORDING,
            reason="",
            until_s=now + options.for_s,
            resumed=manifest.resumed + 1,
        )
    else:
        manifest = Manifest(
            id=secrets.token_hex(8),
            source="fleetlift log",
            tenant=options.selection.tenant,
            share=str(options.selection),
            pseudonyms=_key_mark(options.key),
            started_at_s=now,
            until_s=now + options.for_s,
        )
        lock = None
        account = Account(created=created.isoformat(), first=1, seq=0, at_s=now)
    try:
        if not options.resume:
            begun = await publisher.to_log(f"{MARK}/{manifest.id}/begin", b"")
            account.first, account.seq, account.commands_until_s = begun + 1, begun, now
        writer = CaptureWriter(
            options.to,
            manifest,
            account,
            max_bytes=options.max_bytes,
            block_bytes=options.block_bytes,
            segment_bytes=options.segment_bytes,
            lock=lock,
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    masker = Masker(options.rules, options.key or secrets.token_bytes(32), pseudonyms=options.key is not None)
    recorder = Recorder(options.selection, masker, writer, f"{MARK}/")
    return _Run(settings, options, pool, publisher, stop, progress, writer, recorder, seen)


def _check_same(before: Manifest, options: Options) -> None:
    """A capture goes on as it began: its account would be of something else."""
    if (before.tenant, before.share) != (options.selection.tenant, str(options.selection)):
        of = f" of tenant {before.tenant!r}" if before.tenant else ""
        raise BadInput(f"{options.to} records {before.share}{of}: go on with the same selection")
    if before.pseudonyms != _key_mark(options.key):
        how = "with another key for --pseudonyms" if before.pseudonyms else "without --pseudonyms"
        raise BadInput(f"{options.to} was begun {how}: go on in the same way")


def _key_mark(key: bytes | None) -> str:
    """What tells keys apart without telling them."""
    return "" if key is None else hmac.digest(key, b"which key", "sha256").hex()[:16]


class _Run:
    def __init__(
        self,
        settings: Settings,
        options: Options,
        pool: Pool,
        publisher: Publisher,
        stop: asyncio.Event,
        progress: Progress,
        writer: CaptureWriter,
        recorder: Recorder,
        seen: dict[str, float],
    ) -> None:
        self._settings, self._options, self._pool, self._publisher = settings, options, pool, publisher
        self._stop, self._progress = stop, progress
        self._writer, self._recorder = writer, recorder
        self._until = time.time() + options.for_s
        self._early = ""  # why it ends before its time
        self._marked = asyncio.Event()
        self._end_at = 0.0  # when its end was marked in the log, monotonic
        self._end_at_s = 0.0  # and by the clock
        self._mark_end = f"{MARK}/{writer.manifest.id}/{secrets.token_hex(4)}/end"
        self._seen = {topic.split("/")[5]: at for topic, at in seen.items()}
        progress.until_s = self._until

    async def run(self) -> Manifest:
        self._progress.doing = "recording"
        state, reason = State.COMPLETE, ""
        try:
            await self._record_all()
        except (OutOfRoom, _NoEnd) as early:
            state, reason = State.STOPPED, str(early)
        except BaseException:
            self._writer.abandon()
            raise
        if state is State.COMPLETE and self._early:
            state, reason = State.STOPPED, self._early
        self._progress.doing = "closing"
        offered = await self._commands_offered() if state is State.COMPLETE or self._early else None
        manifest = self._writer.close(state, reason, commands_offered=offered)
        self._show()
        log.info("capture_ended", state=manifest.state, messages=manifest.messages, reason=manifest.reason)
        return manifest

    async def _record_all(self) -> None:
        """Until the end has come out of the log and all commands are there. Raises what went wrong first."""
        work = [self._read(), self._follow_commands(), self._end()]
        tasks = [asyncio.create_task(one, name=f"capture-{n}") for n, one in enumerate(work)]
        watching = asyncio.create_task(self._watch_end(), name="capture-watch")
        try:
            left = set(tasks)
            while left:
                done, _ = await asyncio.wait({*left, watching}, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                left -= done
        finally:
            for task in (*tasks, watching):
                task.cancel()
            await asyncio.gather(*tasks, watching, return_exceptions=True)

    # -- the log -----------------------------------------------------------------------------------------

    async def _read(self) -> None:
        account = self._writer.account
        created = datetime.fromisoformat(account.created)
        batches = read(
            self._settings,
            after=LogPosition(created, account.seq, account.at_s if self._options.resume else None),
            filters=(">",),
            name="capture",
            batch_max=BATCH_MAX,
            linger_s=0.05,
        )
        saved_at = time.monotonic()
        async with contextlib.aclosing(cast("AsyncGenerator[LogBatch, None]", batches)):
            async for batch in batches:
                ended = await self._take(batch)
                if ended or time.monotonic() - saved_at > CHECKPOINT_S:
                    self._writer.checkpoint(sync=True)
                    saved_at = time.monotonic()
                self._progress.behind = batch.behind
                self._show()
                if ended:
                    return

    async def _watch_end(self) -> None:
        """Raises when the end was marked and does not come."""
        await self._marked.wait()
        await asyncio.sleep(END_WITHIN_S)
        raise _NoEnd(f"the mark of its end did not come out of the log within {END_WITHIN_S:g} s")

    async def _take(self, batch: LogBatch) -> bool:
        """Record a batch. True: the capture's end was in it."""
        account = self._writer.account
        created = batch.position.created
        if created.isoformat() != account.created:
            account.anew(created.isoformat(), batch[0].at)
        if unknown := self._recorder.unknown(batch):
            await self._look_up(unknown)
        for message in batch:
            self._recorder.take(message)
            if message.topic == self._mark_end:
                return True
        return False

    async def _look_up(self, devices: Sequence[str]) -> None:
        if len(self._recorder.owners) > OWNERS_CACHED_MAX:
            self._recorder.owners.clear()
        while True:
            try:
                async with self._pool.acquire() as conn:
                    self._recorder.owners.update(await device_store.known_owners(conn, devices))
                return
            except _DATABASE_AWAY as problem:
                log.warning("capture_waits_for_database", reason=str(problem) or repr(problem))
                await asyncio.sleep(0.5)

    # -- the end -----------------------------------------------------------------------------------------

    async def _end(self) -> None:
        left_s = self._until - time.time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left_s)):
                await self._stop.wait()
                self._early = "it was interrupted"
        self._progress.doing = "reading to the end"
        deadline = time.monotonic() + END_WITHIN_S
        while True:
            try:
                await self._publisher.to_log(self._mark_end, b"")
                self._end_at, self._end_at_s = time.monotonic(), time.time()
                self._marked.set()
                return
            except Unavailable as problem:
                if time.monotonic() > deadline:
                    raise _NoEnd(f"the log did not take the mark of its end ({problem})") from None
                await asyncio.sleep(0.5)

    # -- commands ----------------------------------------------------------------------------------------

    async def _follow_commands(self) -> None:
        """Record commands as they are made; the last time a little after the end, when all have committed."""
        if self._options.selection.feed:
            return
        while True:
            ended = self._end_at_s
            try:
                await self._new_commands(ended or time.time())
                self._writer.checkpoint()
            except _DATABASE_AWAY as problem:
                log.warning("capture_waits_for_database", reason=str(problem) or repr(problem))
                if ended and time.monotonic() - self._end_at > END_WITHIN_S:
                    raise _NoEnd(f"the database does not tell the commands ({problem})") from None
            else:
                if ended:
                    return
            await asyncio.sleep(0.05 if self._end_at else COMMANDS_EVERY_S)

    async def _new_commands(self, until_s: float) -> None:
        account = self._writer.account
        since_s = max(account.commands_until_s - COMMANDS_OVERLAP_S, self._writer.manifest.started_at_s)
        last = uuid7(since_s - 1.0, 0)
        while True:
            async with self._pool.acquire() as conn:
                rows = await conn.fetch(_COMMANDS, last, self._options.selection.tenant, COMMANDS_MAX)
            for row in rows:
                self._take_command(row, until_s)
            if len(rows) < COMMANDS_MAX:
                break
            last = str(rows[-1]["id"])
        account.commands_until_s = max(account.commands_until_s, until_s)
        horizon = since_s - COMMANDS_OVERLAP_S
        self._seen = {id_: at for id_, at in self._seen.items() if at >= horizon}

    def _take_command(self, row: Mapping[str, Any], until_s: float) -> None:
        id_, at_s = str(row["id"]), row["created_at"]
        if id_ in self._seen or not self._writer.manifest.started_at_s <= at_s < until_s:
            return
        if is_replay_id(row["device"]):
            return
        if self._options.selection.tenant is not None:
            self._recorder.owners.setdefault(row["device"], row["tenant"])
        if self._recorder.selected(row["device"]):
            self._seen[id_] = at_s
            self._recorder.take_command({**row, "id": id_})

    async def _commands_offered(self) -> int | None:
        """How many commands were made in the time of the capture, by another query than recorded them.

        Those that it finds and the other has not are recorded now: their ids do not tell their time, or they
        committed late.
        """
        if self._options.selection.feed:
            return 0
        started_at_s, until_s = self._writer.manifest.started_at_s, self._writer.account.commands_until_s
        asked = (started_at_s, until_s, self._options.selection.tenant)
        chooses = self._options.selection.chooses
        try:
            async with self._pool.acquire() as conn:
                for _ in range(COUNTS_MAX):
                    rows = await conn.fetch(_COUNTED, *asked)
                    there = (r for r in rows if chooses(r["device"]) and not is_replay_id(r["device"]))
                    counted: int = sum(r["n"] for r in there)
                    if counted == self._writer.account.commands:
                        break
                    recorded = await asyncio.to_thread(self._recorded_commands)
                    self._seen.update(dict.fromkeys(recorded, until_s))
                    async with conn.transaction():
                        async for row in conn.cursor(_COMMANDS_AGAIN, *asked):
                            self._take_command(row, until_s)
                    self._writer.checkpoint()
                return counted
        except _DATABASE_AWAY as problem:
            log.warning("commands_not_counted", reason=str(problem) or repr(problem))
        except OutOfRoom as problem:
            log.warning("commands_not_recorded", reason=str(problem))
        return None

    def _recorded_commands(self) -> list[str]:
        return [topic.split("/")[5] for topic in self._writer.commands()]

    def _show(self) -> None:
        progress, writer = self._progress, self._writer
        progress.messages, progress.stored_bytes = writer.messages, writer.stored_bytes
        progress.payload_bytes = writer.account.payload_bytes


_COMMANDS = """SELECT id, device, tenant, name, params::text AS params, mode,
                      extract(epoch FROM created_at)::float8 AS created_at,
                      extract(epoch FROM expires_at)::float8 AS expires_at
               FROM command WHERE id > $1::uuid AND ($2::text IS NULL OR tenant = $2)
               ORDER BY id LIMIT $3"""

_COMMANDS_AGAIN = """SELECT id, device, tenant, name, params::text AS params, mode,
                            extract(epoch FROM created_at)::float8 AS created_at,
                            extract(epoch FROM expires_at)::float8 AS expires_at
                     FROM command
                     WHERE extract(epoch FROM created_at)::float8 >= $1
                       AND extract(epoch FROM created_at)::float8 < $2
                       AND ($3::text IS NULL OR tenant = $3) ORDER BY created_at"""

_COUNTED = """SELECT device, count(*) AS n FROM command
              WHERE extract(epoch FROM created_at)::float8 >= $1
                AND extract(epoch FROM created_at)::float8 < $2 AND ($3::text IS NULL OR tenant = $3)
              GROUP BY device"""


class _NoEnd(Exception):
    """The end of the capture cannot be proven; the text says why."""
