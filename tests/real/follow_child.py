"""A follower in a process of its own, which dies at a named point: `follow_child.py PICKLE POINT NTH`."""

import asyncio
import os
import pickle
import signal
import sys
from pathlib import Path

from fleetlift.tenant.follow import Follower


async def main(file: str, point: str, nth: int) -> None:
    source, target, closure, directory, applying = pickle.loads(Path(file).read_bytes())
    seen = 0

    def at(name: str) -> None:
        nonlocal seen
        if name == point:
            seen += 1
            if seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    follower = Follower(source, target, closure, move="t", directory=directory, at=at)
    await follower.prepare()
    if applying:
        follower.start_applying()
    await follower.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
