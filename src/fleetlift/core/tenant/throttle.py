"""How fast a copy may read, from what the source has to do besides.

The pace is the share of time in which a worker copies: 1 is flat out, 0 stands still until it is asked again.
Between "easy" and "too much" of a figure the pace falls evenly; the worst figure decides. Not knowing is a
reason to go slowly, never to go on as if all were well.
"""

import msgspec


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One of the source's own replicas. `lag_s` is how far its replay is behind; None: it does not say."""

    name: str
    lag_s: float | None = None


class SourceLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the source is doing: backends at work that are not ours, its replicas, and the log that the
    move's slot holds back. `known` is False when it could not be asked."""

    active: int = 0
    replicas: tuple[Replica, ...] = ()
    slot_retained_bytes: int = 0
    known: bool = True


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """Where slowing down begins and where the copy stands still. A bound of 0 means: do not look at it."""

    active: int = 20
    active_max: int = 100
    replica_lag_s: float = 5.0
    replica_lag_max_s: float = 30.0
    slot_retained_bytes: int = 4 << 30
    slot_retained_bytes_max: int = 16 << 30
    unknown_share: float = 0.25  # the pace while the source's load cannot be read
    rows_s_max: float = 0.0  # of all workers together; 0: no bound


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """`share` of the time to copy in, and for people why it is not all of it."""

    share: float = 1.0
    why: str = ""


FULL = Pace()


def pace(load: SourceLoad, limits: Throttle) -> Pace:
    """The pace that `load` leaves us."""
    if not load.known:
        return Pace(share=limits.unknown_share, why="the source's load cannot be read")
    found = [
        Pace(
            share=_share(load.active, limits.active, limits.active_max),
            why=f"{load.active} statements of others are running on the source",
        ),
        Pace(
            share=_share(
                load.slot_retained_bytes, limits.slot_retained_bytes, limits.slot_retained_bytes_max
            ),
            why=f"the move's slot holds back {load.slot_retained_bytes / 1e9:.1f} GB of the source's log",
        ),
        *(
            Pace(
                share=_share(replica.lag_s, limits.replica_lag_s, limits.replica_lag_max_s),
                why=f"replica {replica.name} is {replica.lag_s:.0f} s behind",
            )
            for replica in load.replicas
            if replica.lag_s is not None
        ),
    ]
    worst = min(found, key=lambda one: one.share)
    return worst if worst.share < 1.0 else FULL


def _share(value: float, easy: float, too_much: float) -> float:
    if too_much <= 0 or value <= easy:
        return 1.0
    if value >= too_much:
        return 0.0
    return (too_much - value) / (too_much - easy)


def rest_s(worked_s: float, share: float) -> float:
    """How long to rest after `worked_s` of copying, to copy in `share` of the time. `share` is above 0."""
    return worked_s * (1.0 - share) / share


def rows_rest_s(rows: int, worked_s: float, rows_s_max: float, workers: int) -> float:
    """How long one of `workers` rests after `rows` in `worked_s`, for all to stay below `rows_s_max`."""
    if rows_s_max <= 0:
        return 0.0
    return max(0.0, rows * workers / rows_s_max - worked_s)
