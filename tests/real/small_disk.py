"""A real file system of a few megabytes, which can be filled."""

import asyncio
import os
import subprocess
from pathlib import Path

from fleetlift.store.embedded import EmbeddedPostgres


async def mounted(disk: Path, *, size: str) -> bool:
    """One on a new directory, where the machine lets us; else False."""
    disk.mkdir()
    return await _ran("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)


async def resized(disk: Path, *, size: str) -> None:
    assert await _ran("mount", "-o", f"remount,size={size}", disk)


async def unmounted(disk: Path, *, though_in_use: bool = False) -> None:
    assert await _ran("umount", *(["-l"] if though_in_use else []), disk)


def space_on(disk: Path, server: EmbeddedPostgres) -> Path:
    """A new directory there for a tablespace: the server's own, as it wants it."""
    space = disk / "space"
    space.mkdir()
    owner = (server.directory / "data").stat()
    os.chown(space, owner.st_uid, owner.st_gid)
    return space


async def _ran(*command: str | Path) -> bool:
    try:
        return (await asyncio.to_thread(subprocess.run, command, capture_output=True)).returncode == 0
    except OSError:
        return False
