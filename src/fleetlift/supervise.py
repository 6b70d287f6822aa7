"""Child processes that are kept alive, and a data directory that belongs to one instance at a time.

The lock on the directory is inherited by every child: the kernel frees it only when the last of them is gone,
so no successor ever starts on a directory that an old engine still writes to, not even after the parent was
killed. On Linux children are told by the kernel to stop when their parent dies.
"""

import asyncio
import contextlib
import ctypes
import enum
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from fleetlift.core.errors import Conflict, FleetError, Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

_PR_SET_PDEATHSIG = 1
_CLONE_NEWUSER = 0x10000000
# Loaded before any fork: what runs between fork and exec must not load anything.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

LOG_BYTES_MAX = 64 * 1024**2
BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 15.0
HEALTHY_AFTER_S = 30.0  # having run this long, the next death is a first one again
ASK_EVERY_S = 4.0  # whether a child that has `hung_after_s` still answers


class RunAs(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a child runs as. `namespace`: keep the user, but call it `uid` in a user namespace (Linux).

    The namespace is for a program that refuses to run as root and whose files lie where only root may go.
    """

    uid: int
    gid: int
    namespace: bool = False


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start and how to stop it."""

    name: str
    command: Sequence[str]
    log_file: Path
    stop_signal: int = signal.SIGTERM
    orphan_signal: int = signal.SIGTERM  # sent by the kernel when the parent dies
    stop_within_s: float = 20.0
    ready_within_s: float = 30.0
    run_as: RunAs | None = None
    environment: Mapping[str, str] | None = None
    cwd: str | None = None
    pass_fds: Sequence[int] = ()
    wait_for_go: bool = False  # standard input is a pipe; a line is written by `go()`
    hung_after_s: float | None = None  # not ready for so long, it is killed and started again; None: never


class ChildState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # died; will be started again
    STOPPED = "stopped"


class Supervised:
    """One child process: started, checked, started again when it dies, stopped.

    `ready` is awaited again and again until it returns True; it may raise while the child is not yet there.
    """

    def __init__(self, spec: ChildSpec, ready: Callable[[], Awaitable[bool]] | None = None) -> None:
        self.spec = spec
        self.state = ChildState.STOPPED
        self._check = ready
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._first_ready: asyncio.Future[None] | None = None
        self._going = False
        self.on_death: Callable[[str, float], None] | None = None  # (what happened, seconds until the next)

    @property
    def pid(self) -> int | None:
        """The process id now, None while there is no process."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    async def start(self, *, wait: bool = True) -> None:
        """Start the child and keep it alive until `stop`. With `wait`, return once it is ready.

        Raises Unavailable, with the last lines of its log, when it is not ready in time or dies at once.
        """
        assert self._keeper is None, "started twice"
        self._first_ready = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(), name=f"keep {self.spec.name}")
        if wait:
            await self.wait_ready()

    async def wait_ready(self) -> None:
        """Return once the child has been ready for the first time. Raises as `start`."""
        assert self._first_ready is not None
        await asyncio.shield(self._first_ready)

    def go(self) -> None:
        """Let a child that was started with `wait_for_go` begin; its successors begin at once."""
        self._going = True
        self._tell_go()

    async def stop(self) -> None:
        """Stop the child by its signal, by SIGKILL when it takes too long. Returns once it is gone."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        process = self._process
        if process is not None and process.poll() is None:
            self._signal(process, self.spec.stop_signal)
            if not await _gone(process, self.spec.stop_within_s):
                log.warning("child_killed", child=self.spec.name, after_s=self.spec.stop_within_s)
                self._signal(process, signal.SIGKILL)
                await _gone(process, 10.0)
        self._close_stdin()
        if self._first_ready is not None and not self._first_ready.done():
            self._first_ready.cancel()
        self.state = ChildState.STOPPED

    def kill(self) -> None:
        """SIGKILL the process (a fault, for tests); it is started again."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    async def _keep(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            problem: str
            try:
                self.state = ChildState.STARTING
                self._process = self._spawn()
                problem = await self._become_ready(self._process)
                if not problem:
                    self.state = ChildState.READY
                    self._resolve(None)
                    problem = await self._end(self._process)
            except OSError as error:
                problem = f"cannot be started: {error}"
            self._close_stdin()
            failures = 1 if time.monotonic() - began > HEALTHY_AFTER_S else failures + 1
            tail = log_tail(self.spec.log_file)
            if self._first_ready is not None and not self._first_ready.done() and failures >= 3:
                shown = f"; last lines of {self.spec.log_file}:\n{tail}" if tail else ""
                self._resolve(Unavailable(f"{self.spec.name} {problem}{shown}"))
            self.state = ChildState.WAITING
            pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (failures - 1))
            log.warning("child_died", child=self.spec.name, problem=problem, restart_in_s=pause_s)
            if self.on_death is not None:
                self.on_death(problem, pause_s)
            await asyncio.sleep(pause_s)

    async def _become_ready(self, process: subprocess.Popen[bytes]) -> str:
        """Empty when ready, else what went wrong; then the process is gone."""
        if self._going:
            self._tell_go()
        deadline = time.monotonic() + self.spec.ready_within_s
        pause_s = 0.02
        while process.poll() is None:
            if self.spec.wait_for_go and not self._going:
                deadline = time.monotonic() + self.spec.ready_within_s
            elif self._check is None:
                return ""
            else:
                with contextlib.suppress(OSError, FleetError, asyncio.TimeoutError):
                    async with asyncio.timeout(5.0):
                        if await self._check():
                            return ""
            if time.monotonic() > deadline:
                self._signal(process, signal.SIGKILL)
                await _gone(process, 10.0)
                return f"was not ready within {self.spec.ready_within_s:.0f} s"
            await asyncio.sleep(pause_s)
            pause_s = min(0.1, pause_s * 1.3)
        return _how_it_ended(process.returncode)

    async def _end(self, process: subprocess.Popen[bytes]) -> str:
        """How it ended. One that lives and does not answer any more is killed first."""
        if self.spec.hung_after_s is None or self._check is None:
            return _how_it_ended(await _exit_status(process))
        watch = asyncio.create_task(self._silence(self.spec.hung_after_s), name=f"watch {self.spec.name}")
        gone = asyncio.create_task(_exit_status(process))
        try:
            await asyncio.wait({watch, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return _how_it_ended(gone.result())
            problem = watch.result()
            self._signal(process, signal.SIGKILL)
            await gone
            return problem
        finally:
            watch.cancel()
            gone.cancel()

    async def _silence(self, hung_after_s: float) -> str:
        """Return, with the reason, once the child was asked and gave no answer for so long.

        Where nobody could be asked, since what leads to the child is away, its silence does not count.
        """
        assert self._check is not None
        every_s = min(ASK_EVERY_S, hung_after_s / 4)
        silent_s = 0.0
        while silent_s < hung_after_s:
            asked_at = time.monotonic()
            await asyncio.sleep(every_s)
            try:
                async with asyncio.timeout(10.0):
                    answers = await self._check()
            except TimeoutError:
                answers = False
            except (OSError, FleetError):
                answers = True
            # A machine that was suspended, and we with it, is no silence of the child's.
            silent_s = 0.0 if answers else silent_s + min(time.monotonic() - asked_at, 2 * every_s)
        return f"gave no answer for {silent_s:.0f} s, and was killed"

    def _spawn(self) -> subprocess.Popen[bytes]:
        spec = self.spec
        rotate_log(spec.log_file)
        run_as = spec.run_as
        switch = run_as is not None and not run_as.namespace and os.geteuid() == 0
        with spec.log_file.open("ab") as output:
            return subprocess.Popen(
                list(spec.command),
                stdin=subprocess.PIPE if spec.wait_for_go else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=spec.cwd,
                env=None if spec.environment is None else {**os.environ, **spec.environment},
                # A Ctrl-C at the terminal goes to the parent alone, which stops the children in order.
                start_new_session=True,
                pass_fds=tuple(spec.pass_fds),
                user=run_as.uid if switch and run_as is not None else None,
                group=run_as.gid if switch and run_as is not None else None,
                extra_groups=[] if switch else None,
                preexec_fn=before_exec(os.getpid(), spec.orphan_signal, run_as),
            )

    def _tell_go(self) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.closed:
            with contextlib.suppress(OSError):
                process.stdin.write(b"go\n")
                process.stdin.flush()

    def _close_stdin(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _signal(self, process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    def _resolve(self, problem: Exception | None) -> None:
        future = self._first_ready
        if future is None or future.done():
            return
        if problem is None:
            future.set_result(None)
        else:
            future.set_exception(problem)
            # Whoever waits gets it; that nobody may be waiting is no reason for a warning at exit.
            future.exception()


def before_exec(parent: int, orphan_signal: int, run_as: RunAs | None = None) -> Callable[[], None] | None:
    """What the child does between fork and exec. Only calls into the kernel: no locks, no imports."""
    libc = _libc
    if libc is None:
        return None
    namespace = run_as if run_as is not None and run_as.namespace else None

    def prepare() -> None:
        if namespace is not None:
            _enter_user_namespace(libc, namespace)
        libc.prctl(_PR_SET_PDEATHSIG, int(orphan_signal), 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked to be told
            os._exit(1)

    return prepare


def _enter_user_namespace(libc: ctypes.CDLL, run_as: RunAs) -> None:
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are not allowed here")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{run_as.uid} {outer_uid} 1\n"),
        ("gid_map", f"{run_as.gid} {outer_gid} 1\n"),
    ):
        file = os.open(f"/proc/self/{name}", os.O_WRONLY)
        os.write(file, text.encode())
        os.close(file)


def run_once(command: Sequence[str], *, run_as: RunAs | None, timeout_s: float = 120.0) -> None:
    """Run a command to its end, as a user. Raises Unavailable with its output when it fails."""
    switch = run_as is not None and not run_as.namespace and os.geteuid() == 0
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            user=run_as.uid if switch and run_as is not None else None,
            group=run_as.gid if switch and run_as is not None else None,
            extra_groups=[] if switch else None,
            preexec_fn=before_exec(os.getpid(), signal.SIGKILL, run_as),
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as problem:
        raise Unavailable(f"{command[0]} cannot be run: {problem}") from problem
    if done.returncode != 0:
        output = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise Unavailable(f"{command[0]} failed with status {done.returncode}: {output[-2000:]}")


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "is gone"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


async def _exit_status(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end without a thread: by a pidfd where the kernel has them, else by looking."""
    if sys.platform == "linux" and hasattr(os, "pidfd_open"):
        loop = asyncio.get_running_loop()
        try:
            handle = os.pidfd_open(process.pid)
        except OSError:
            pass
        else:
            ended = asyncio.Event()
            loop.add_reader(handle, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(handle)
                os.close(handle)
    while (code := process.poll()) is None:  # noqa: ASYNC110 - nothing tells us
        await asyncio.sleep(0.05)
    return code


async def _gone(process: subprocess.Popen[bytes], within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await _exit_status(process)
    except TimeoutError:
        return False
    return True


def log_tail(path: Path, lines: int = 12) -> str:
    """The last lines of a child's log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def rotate_log(path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
    """Keep a log bounded: what is longer moves to `NAME.1`. Safe while a child appends to it.

    Children append (O_APPEND), so the file is copied and cut, not renamed.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size > bytes_max:
            with path.open("rb+") as file, path.with_name(path.name + ".1").open("wb") as old:
                file.seek(-bytes_max // 2, os.SEEK_END)
                old.write(file.read())
                file.truncate(0)


class DirectoryLock:
    """The lock on a data directory: `DIR/lock`, holding the parent's process id."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def release(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextlib.asynccontextmanager
async def locked_directory(
    directory: Path, *, wait_s: float = 30.0, on_wait: Callable[[str], None] | None = None
) -> AsyncIterator[DirectoryLock]:
    """Hold `directory` alone, making it when missing. Pass `lock.fd` on to every child.

    Raises Conflict with the process id of the instance that has it; when that instance is dead but its
    engines still stop, waits for them up to `wait_s`. Raises Unavailable when it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise Unavailable(
            f"the data directory {directory} cannot be written ({(problem.strerror or '').lower()}): "
            "choose another with --data, or change its owner"
        ) from problem
    lock = DirectoryLock(directory / "lock", fd)
    try:
        deadline = time.monotonic() + wait_s
        told = False
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
                if holder.isdecimal() and is_alive(int(holder)):
                    raise Conflict(
                        f"another instance (process {holder}) runs on {directory}: stop it first, "
                        "or choose another directory with --data"
                    ) from None
                if time.monotonic() > deadline:
                    raise Conflict(
                        f"processes of an earlier instance still use {directory}: "
                        f"{', '.join(holders(lock.path)) or 'see fuser ' + str(lock.path)}; end them first"
                    ) from None
                if not told and on_wait is not None:
                    on_wait("waiting for the engines of an earlier instance, which was killed, to stop")
                    told = True
                await asyncio.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        os.set_inheritable(fd, False)
        yield lock
    finally:
        lock.release()


def is_alive(pid: int) -> bool:
    """True when the process runs; one that has ended and was not yet collected does not."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def holders(path: Path) -> list[str]:
    """`name (pid)` of each process that has `path` open, as far as we may see."""
    import psutil

    found = []
    for process in psutil.process_iter(["name"]):
        with contextlib.suppress(psutil.Error, OSError):
            for entry in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if entry.readlink() == path.resolve():
                        found.append(f"{process.info['name']} ({process.pid})")
                        break
    return found
