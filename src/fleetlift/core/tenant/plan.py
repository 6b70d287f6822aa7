"""The plan of a tenant's move, parsed: what `migrate/tenant_planfile.py` reads and `move.py` follows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from fleetlift.core.dns import checked_share
from fleetlift.core.errors import BadInput, Conflict
from fleetlift.core.gates import Gate
from fleetlift.core.plan import OnBreach
from fleetlift.core.units import Share

POOL: Final = "test-pool"
"""The wave of names that are the test pool's."""


class Database(msgspec.Struct, frozen=True, kw_only=True):
    """Where a side's data is: a URL without a password; `password_env` names the variable that has it.

    `replica`: of the source, a standby that the copy reads from (with the same password). `create`: of the
    target, the database is made by the move, and dropped when the move goes back.
    """

    url: str
    password_env: str = ""
    replica: str = ""
    create: bool = False


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """Where a side takes devices. `relay`: the admin address of the relay that stands at the old one."""

    mqtt: str = ""
    api: str = ""  # of a Fleetlift there: HTTP address
    token_env: str = ""
    ca_file: str = ""
    relay: str = ""
    relay_token_file: str = ""


class DnsServer(msgspec.Struct, frozen=True, kw_only=True):
    """How names are changed: RFC 2136 (`server` takes the updates of `zone`, signed by the TSIG key that
    `key` names, `env:VARIABLE` or a file), or Route 53 (`route53`: the hosted zone's id).

    `servers` are further authoritative servers that must show a change before it counts.
    """

    server: str = ""
    zone: str = ""
    key: str = ""
    route53: str = ""
    api: str = ""  # of Route 53, where it is not Amazon's own
    servers: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One name to switch. `to`: what it answers on the new side, () for the addresses of that side's `mqtt`;
    `pool`: it is the test pool's."""

    name: str
    to: tuple[str, ...] = ()
    type: str = "A"
    ttl_s: float = 30.0
    pool: bool = False


class Copy(msgspec.Struct, frozen=True, kw_only=True, tag="copy"):
    """Copy, follow and verify. `tables` is what the plan writes, read against the schema by `rules.py`."""

    root: str
    tables: Mapping[str, Any] = MappingProxyType({})
    from_replica: bool = False
    chunk_rows: int = 10_000
    workers: int = 2
    lag_at_most_s: float = 10.0  # of the source's own replicas, before the copy slows down
    slot_at_most_bytes: int = 64 * 1024**3


class Warm(msgspec.Struct, frozen=True, kw_only=True, tag="warm"):
    """Read into the target's memory what the source has in its own."""


class Validate(msgspec.Struct, frozen=True, kw_only=True, tag="validate"):
    """Play load against the new side. `scenario` names a file that comes with the plan."""

    scenario: str
    for_s: float
    rate_s: float | None = None
    gates: tuple[Gate, ...] = ()


class Freeze(msgspec.Struct, frozen=True, kw_only=True, tag="freeze"):
    """Refuse new rows of the features' tables, for `at_most_s` at the longest."""

    features: tuple[str, ...]
    at_most_s: float


class SwitchDatabase(msgspec.Struct, frozen=True, kw_only=True, tag="database"):
    """Fence, drain, position, verify, sequences, open, reverse stream.

    `at_most_s`: writers stand still no longer; over it the source serves on. `terminate`: sessions that
    hold a transaction open for longer than that are ended instead.
    """

    at_most_s: float = 10.0
    terminate: bool = False
    sequence_gap: int = 1_000_000


class SwitchDns(msgspec.Struct, frozen=True, kw_only=True, tag="dns"):
    """Names go over wave by wave: `test-pool` (the pool's names), then shares of the others."""

    records: tuple[Record, ...]
    waves: tuple[Share | str, ...]
    bake_s: float = 0.0
    gates: tuple[Gate, ...] = ()
    approve: bool = False
    release_per_s: float = 50.0  # connections closed at the old address, a second
    silent_after_s: float = 300.0
    no_data_after_s: float = 60.0


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """Wait until who still comes to the old address is below `stale_share`, for `quiet_s`.

    `relay`: who never asks DNS again is forwarded by the relay there, and is no longer waited for.
    """

    relay: bool = True
    stale_share: float = 0.0
    quiet_s: float = 0.0
    release_per_s: float = 50.0


MoveStep = Copy | Warm | Validate | Freeze | SwitchDatabase | SwitchDns | Drain


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
    """What `migrate rehearse` moves instead: the test pool's tenant, into a database that is made for it.

    `tenant`: whose devices, as the new side knows them; `database`: its name, on the target's server; "": one
    by the migration's name.
    """

    tenant: str
    root: str
    database: str


class TenantPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's move. `features` names the tables of what can be frozen."""

    name: str
    tenant: str
    source: Database
    target: Database
    old: Front
    new: Front
    steps: tuple[MoveStep, ...]
    dns: DnsServer | None = None
    features: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    rehearsal: Rehearsal | None = None
    on_breach: OnBreach = OnBreach.REVERT

    @property
    def copy(self) -> Copy:
        """The step that says which rows."""
        return next(step for step in self.steps if isinstance(step, Copy))


def step_name(step: MoveStep) -> str:
    """As on screen and in the audit log."""
    match step:
        case Copy():
            return "copy: tenant data"
        case Warm():
            return "warm: caches"
        case Validate():
            return "validate: load"
        case Freeze(features=features):
            return f"freeze: {', '.join(features)}"
        case SwitchDatabase():
            return "switch: database"
        case SwitchDns():
            return "switch: dns"
        case Drain():
            return "drain: old"


def gates_of_step(step: MoveStep) -> tuple[Gate, ...]:
    return step.gates if isinstance(step, Validate | SwitchDns) else ()


def waves_of(step: MoveStep) -> int:
    """How many times the step's work is done, each time further."""
    return len(step.waves) if isinstance(step, SwitchDns) else 1


def wave_name(step: MoveStep, wave: int) -> str:
    """`switch: dns, wave 2 of 2 (100%)`."""
    if not isinstance(step, SwitchDns):
        return step_name(step)
    return f"{step_name(step)}, wave {wave + 1} of {len(step.waves)} ({step.waves[wave]})"


def wave_problems(plan: TenantPlan) -> tuple[str, ...]:
    """Waves of names that cannot be done, or leave answers at the old side. Told before anything moves: once
    the database has switched only a revert of all would be left."""
    said = []
    for step in plan.steps:
        if not isinstance(step, SwitchDns):
            continue
        shares = [wave.percent or 0.0 for wave in step.waves if isinstance(wave, Share)]
        for share in shares:
            try:
                checked_share(share, weighted=plan.dns is not None and bool(plan.dns.route53))
            except BadInput as error:
                said.append(f"waves of 'switch: dns': {error}")
        if not all(record.pool for record in step.records) and (not shares or shares[-1] != 100):
            last = step.waves[-1] if step.waves else "none"
            said.append(
                f"waves of 'switch: dns': the last one is {last}: it has to be 100%, or some of the answers "
                "stay the old side's for good"
            )
    return tuple(said)


def check_tenant_amendment(old: TenantPlan, new: TenantPlan, step: int) -> None:
    """Raise Conflict when a move that stands at `step` cannot go on with `new`."""
    for what, before, after in (
        ("the migration's name", old.name, new.name),
        ("the tenant", old.tenant, new.tenant),
        ("the source", old.source, new.source),
        ("the target", old.target, new.target),
    ):
        if before != after:
            raise Conflict(f"an amended plan keeps {what}; revert and start another migration instead")
    if old.steps[: step + 1] != new.steps[: step + 1]:
        raise Conflict("an amended plan keeps the steps that are done or under way; change later ones")
    for problem in wave_problems(new):
        if problem not in wave_problems(old):
            raise Conflict(problem)


def with_password(url: str, password: str | None) -> str:
    """A database's URL with a password in it; None: as it is."""
    if password is None:
        return url
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))
