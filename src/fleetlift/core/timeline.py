"""What the controller notes down each round: the points that view and report draw their lines through."""

import msgspec


class GatePoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One gate's verdict at one moment; `limit` has its ratio to the old side resolved."""

    gate: str
    verdict: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    n: int = 0


class TimelinePoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of `engine.sample.data`. Rates in messages a second, latencies in seconds; None: not measured.

    `devices_*` count members by where their telemetry and commands go: only the old side, both, only the new.
    Rates are by arrival on that side; latencies are of commands that ended in the last 30 s, by path.
    """

    phase: str
    rung: int
    wave: int
    wave_phase: str
    devices_old: int
    devices_both: int
    devices_new: int
    rate_old: float | None = None
    rate_new: float | None = None
    latency_old_p50: float | None = None
    latency_old_p95: float | None = None
    latency_new_p50: float | None = None
    latency_new_p95: float | None = None
    gates: tuple[GatePoint, ...] = ()
