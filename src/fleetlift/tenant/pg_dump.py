"""pg_dump as a child process. Passwords go by its environment, never on a command line."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Final

import psycopg2
from psycopg2.extensions import parse_dsn

from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.tenant.dumped import DumpedObject, dumped_objects
from fleetlift.store.embedded import VERSION, installed_binaries

_VARIABLES: Final[Mapping[str, str]] = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "passfile": "PGPASSFILE",
    "dbname": "PGDATABASE",
    "service": "PGSERVICE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "channel_binding": "PGCHANNELBINDING",
    "gssencmode": "PGGSSENCMODE",
    "krbsrvname": "PGKRBSRVNAME",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "application_name": "PGAPPNAME",
    "options": "PGOPTIONS",
}
_KEPT: Final = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "PGPASSFILE", "PGSERVICEFILE")
OUTPUT_BYTES_MAX: Final = 256 << 20


def connection_environment(url: str) -> dict[str, str]:
    """Variables by which PostgreSQL's own programs connect to `url`. Raises BadInput, without the URL."""
    try:
        parts = parse_dsn(url)
    except psycopg2.ProgrammingError as problem:
        raise BadInput(
            "a database's URL cannot be read: expected postgresql://user@host/database"
        ) from problem
    unknown = sorted(set(parts) - set(_VARIABLES))
    if unknown:
        raise BadInput(f"a database's URL has settings that pg_dump cannot be given: {', '.join(unknown)}")
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment.update({_VARIABLES[name]: str(value) for name, value in parts.items()})
    environment.setdefault("PGAPPNAME", "fleetlift pg_dump")
    return environment


def check_version(server_version: int) -> None:
    """Raises BadInput when our pg_dump is too old for a server (`server_version_num`)."""
    major = server_version // 10_000
    if major > VERSION:
        raise BadInput(
            f"the source is PostgreSQL {major}, and the pg_dump that comes with Fleetlift is {VERSION}: "
            "it cannot read a newer server's schema. Use a Fleetlift made for it"
        )


async def dump_schema(url: str, section: str, *, owners: bool = True) -> tuple[DumpedObject, ...]:
    """The objects of a section ("pre-data", "post-data") of a database's schema, without Fleetlift's own.

    Raises Unavailable with what pg_dump says.
    """
    environment = connection_environment(url)
    process = await asyncio.create_subprocess_exec(
        str(installed_binaries() / "pg_dump"),
        *("--schema-only", "--verbose", f"--section={section}", "--no-tablespaces", "--no-publications"),
        *("--no-subscriptions", "--no-security-labels", "--exclude-schema=fleetlift_*", "--no-password"),
        *(() if owners else ("--no-owner",)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        output, said = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = [
            line
            for line in said.decode(errors="replace").splitlines()
            if "error" in line or "detail" in line or "hint" in line
        ]
        raise Unavailable(f"pg_dump cannot read the source's schema: {' '.join(lines)[-1000:]}")
    if len(output) > OUTPUT_BYTES_MAX:
        raise Unavailable(f"the source's schema is larger than {OUTPUT_BYTES_MAX >> 20} MB")
    # The fence of another tenant's move stands on the same tables, and stays where it is.
    return tuple(
        one
        for one in dumped_objects(output.decode())
        if not (one.type == "TRIGGER" and one.name.split()[-1].startswith("fleetlift_"))
    )
