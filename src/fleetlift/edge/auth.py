"""Sign-in: answers NATS Server when a device connects, by the registry.

Every sign-in reads the device's credentials (many devices in one query), so a credential that was taken back
is refused at once. What is remembered is only which stored hash a password was found to fit, or found not to:
a storm of reconnects hashes nothing. When PostgreSQL is away, devices that were let in by this worker within
`TRUSTED_FOR_S` get in again, all others are refused and try again.
"""

import asyncio
import hmac
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, sha256

import asyncpg
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from fleetlift.backend import passwords
from fleetlift.backend.context import Context
from fleetlift.bus.connect import connected
from fleetlift.core.errors import Unavailable
from fleetlift.edge.permits import Signer, SignInRequest, client_id_fits, device_of, read_request
from fleetlift.log import get_logger
from fleetlift.store import devices as store
from fleetlift.store import telemetry as counter_store
from fleetlift.store.devices import StoredCredential
from fleetlift.store.pool import Pool

log = get_logger(__name__)

SUBJECT = "$SYS.REQ.USER.AUTH"
QUEUE = "fleetlift-auth"
ANSWER_WITHIN_S = 2.5  # the server waits 3 s; an answer after that is wasted work
IN_HAND_MAX = 2000  # sign-ins at a time; more are refused and come again
HASHING_MAX = 200  # waiting for a thread to hash; at 20 ms each, later ones would be too late anyway
LOOKUP_MAX = 500  # devices in one query
LOOKUP_WITHIN_S = 1.0  # then PostgreSQL counts as away, while there is still time to answer

REMEMBERED_MAX = 200_000
TRUSTED_FOR_S = 600.0
REFUSALS_LOGGED_A_SECOND = 20
SAME_REFUSAL_LOGGED_EVERY_S = 60.0

_DATABASE_AWAY = (OSError, TimeoutError, Unavailable, asyncpg.PostgresError, asyncpg.InterfaceError)


async def run(ctx: Context, *, ready: asyncio.Event | None = None) -> None:
    """Answer sign-ins until `ctx.stop` is set; several of these share the load. `ready`: set once it does."""
    settings = ctx.settings
    worker = _Worker(ctx)
    async with connected(
        settings, user=settings.nats_auth_user, password=settings.nats_auth_password, name="auth"
    ) as nc:
        try:
            async with asyncio.TaskGroup() as tasks:
                worker.tasks = tasks
                subscription = await nc.subscribe(SUBJECT, queue=QUEUE, cb=worker.on_request)
                await nc.flush(5)
                counting = tasks.create_task(worker.count_for_ever(), name="auth-counters")
                log.info("sign_in_ready")
                if ready is not None:
                    ready.set()
                await ctx.stop.wait()
                # Others of the queue group take over; what is in hand is still answered.
                await subscription.unsubscribe()
                counting.cancel()
        finally:
            worker.close()


class Refused(Exception):
    """The device is not let in; the text says why, for the log."""


class _Worker:
    def __init__(self, ctx: Context) -> None:
        self.tasks: asyncio.TaskGroup | None = None
        self._ctx = ctx
        self._signer = Signer(ctx.settings.nats_issuer_seed, ctx.settings.nats_device_account)
        self._checker = Checker(ctx.pool)
        self._in_hand = 0
        self._counted: Counter[tuple[str, str]] = Counter()
        self._refusals = _RefusalLog()

    def close(self) -> None:
        self._checker.close()

    async def on_request(self, message: Msg) -> None:
        assert self.tasks is not None
        if self._in_hand >= IN_HAND_MAX:
            self._counted["fleetlift_sign_ins_dropped_total", ""] += 1
            return  # no answer within the server's limit is a refusal
        self._in_hand += 1
        self.tasks.create_task(self._answer(message))

    async def _answer(self, message: Msg) -> None:
        try:
            try:
                request = read_request(message.data)
            except ValueError as problem:
                log.error("sign_in_unreadable", problem=str(problem))
                return
            user_nkey, server_id = request.user_nkey, request.server_id.id
            device = device_of(request.connect_opts.user)
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    device = await self._checked(request, device)
                answer = self._signer.permit(device, user_nkey=user_nkey, server_id=server_id)
                self._counted["fleetlift_sign_ins_accepted_total", ""] += 1
            except (Refused, TimeoutError) as refusal:
                reason = str(refusal) or "took too long"
                answer = self._signer.refusal(reason, user_nkey=user_nkey, server_id=server_id)
                self._counted["fleetlift_sign_ins_refused_total", ""] += 1
                self._refusals.log(device or "", reason, request.client_info.host)
            await message.respond(answer)
        except NatsError as problem:
            log.warning("sign_in_not_answered", problem=str(problem))
        except Exception:
            # One odd request must not end the worker that all devices depend on; no answer is a refusal.
            log.exception("sign_in_failed")
        finally:
            self._in_hand -= 1

    async def _checked(self, request: SignInRequest, device: str | None) -> str:
        info, options = request.client_info, request.connect_opts
        if not info.type.startswith("mqtt"):
            raise Refused(f"devices sign in by MQTT, not {info.type or 'nats'}")
        if device is None:
            raise Refused("the user name is not a device id")
        if not client_id_fits(device, info.mqtt_id):
            raise Refused("the client id must be the device id, or begin with it and '/'")
        if not options.pass_:
            raise Refused("no password")
        await self._checker.check(device, options.pass_)
        return device

    async def count_for_ever(self) -> None:
        while True:
            await asyncio.sleep(5.0)
            if self._counted:
                counted, self._counted = self._counted, Counter()
                try:
                    async with self._ctx.pool.acquire() as conn:
                        await counter_store.add_to_counters(conn, counted)
                except _DATABASE_AWAY:
                    self._counted.update(counted)


class Checker:
    """Checks a device's password against the registry."""

    def __init__(self, pool: Pool) -> None:
        self._lookup = _Lookup(pool)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="hash")
        self._hashing = 0
        self._pepper = secrets.token_bytes(32)
        # (device, password) by a keyed digest: digest of the stored hash that it fits, and when it did.
        self._fits: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self._fits_not: OrderedDict[bytes, bytes] = OrderedDict()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def check(self, device: str, password: str) -> None:
        """Returns when `password` is one of the device's. Raises Refused."""
        key = hmac.digest(self._pepper, f"{device}\0{password}".encode(errors="replace"), "sha256")
        try:
            known = await self._lookup.get(device)
        except _DATABASE_AWAY as problem:
            fit = self._fits.get(key)
            if fit is not None and time.monotonic() - fit[1] < TRUSTED_FOR_S:
                return
            raise Refused(f"the registry does not answer ({type(problem).__name__})") from None
        if known is None:
            raise Refused("no such device")
        usable = [c.value for c in known if c.kind in ("password", "token")]
        if not usable:
            raise Refused("the device has no password")
        if await self._fits_one(key, usable, password):
            return
        raise Refused("wrong password")

    async def _fits_one(self, key: bytes, stored: Sequence[str], password: str) -> bool:
        digests = [sha256(value.encode()).digest() for value in stored]
        fit = self._fits.get(key)
        if fit is not None and fit[0] in digests:
            self._remember(key, fit[0])
            return True
        all_of_them = sha256(b"".join(sorted(digests))).digest()
        if self._fits_not.get(key) == all_of_them:
            return False
        # Cheap schemes first: a device with a credential of ours never waits for a slow hash.
        for value, digest in sorted(
            zip(stored, digests, strict=True), key=lambda pair: not passwords.is_cheap(pair[0])
        ):
            if await self._verify(value, password):
                self._remember(key, digest)
                return True
        self._fits_not[key] = all_of_them
        if len(self._fits_not) > REMEMBERED_MAX:
            self._fits_not.popitem(last=False)
        return False

    async def _verify(self, stored: str, password: str) -> bool:
        if passwords.is_cheap(stored):
            return passwords.verify(stored, password)
        if self._hashing >= HASHING_MAX:
            raise Refused("too many passwords are being checked")
        self._hashing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, passwords.verify, stored, password)
        finally:
            self._hashing -= 1

    def _remember(self, key: bytes, digest: bytes) -> None:
        self._fits[key] = (digest, time.monotonic())
        self._fits.move_to_end(key)
        if len(self._fits) > REMEMBERED_MAX:
            self._fits.popitem(last=False)


class _Lookup:
    """Reads credentials, all that are asked for during one query with the next."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[str, asyncio.Future[list[StoredCredential] | None]] = {}
        self._busy: asyncio.Task[None] | None = None

    async def get(self, device: str) -> list[StoredCredential] | None:
        """None: there is no such device. Raises what the database raises."""
        answer = self._waiting.get(device)
        if answer is None:
            answer = self._waiting[device] = asyncio.get_running_loop().create_future()
            # An error that nobody waits for any more is nobody's.
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._busy is None or self._busy.done():
            self._busy = asyncio.create_task(self._work(), name="auth-lookup")
        return await asyncio.shield(answer)

    async def _work(self) -> None:
        while self._waiting:
            names = list(self._waiting)[:LOOKUP_MAX]
            asked = {name: self._waiting.pop(name) for name in names}
            try:
                async with asyncio.timeout(LOOKUP_WITHIN_S), self._pool.acquire() as conn:
                    found = await store.credentials(conn, names)
            except BaseException as problem:
                for answer in asked.values():
                    if not answer.done():
                        away = problem if isinstance(problem, Exception) else Unavailable("stopping")
                        answer.set_exception(away)
                if not isinstance(problem, Exception):
                    raise
            else:
                for name, answer in asked.items():
                    if not answer.done():
                        answer.set_result(found.get(name))


class _RefusalLog:
    """Logs refusals, but not each of a device that tries again and again, nor of a whole fleet at once."""

    def __init__(self) -> None:
        self._last: OrderedDict[bytes, float] = OrderedDict()
        self._second = 0
        self._logged = self._silent = 0

    def log(self, device: str, reason: str, host: str) -> None:
        now = time.monotonic()
        if int(now) != self._second:
            if self._silent:
                log.warning("sign_ins_refused", count=self._silent)
            self._second, self._logged, self._silent = int(now), 0, 0
        key = blake2b(f"{device}\0{reason}".encode(), digest_size=16).digest()
        if now - self._last.get(key, -1e9) < SAME_REFUSAL_LOGGED_EVERY_S:
            return
        if self._logged >= REFUSALS_LOGGED_A_SECOND:
            self._silent += 1
            return
        self._logged += 1
        self._last[key] = now
        self._last.move_to_end(key)
        if len(self._last) > 10_000:
            self._last.popitem(last=False)
        log.warning("sign_in_refused", device=device, reason=reason, host=host)
