"""The plan of a tenant's move: YAML in, a `TenantPlan` out, or every mistake in it with file and line.

`docs/tenant-plan.md` lists every key. Which rows the `tables:` mean is checked against the source's schema
later, by `core/tenant/rules.py`, since a plan is read where no database is.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import ipaddress
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import yaml

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import Gate
from fleetlift.core.identity import checked_tenant_id
from fleetlift.core.metrics import OF_LOAD
from fleetlift.core.plan import OnBreach, Plan
from fleetlift.core.tenant.plan import (
    POOL,
    Copy,
    Database,
    DnsServer,
    Drain,
    Freeze,
    Front,
    MoveStep,
    Record,
    Rehearsal,
    SwitchDatabase,
    SwitchDns,
    TenantPlan,
    Validate,
    Warm,
    step_name,
)
from fleetlift.core.tenant.rules import BadRules, check_syntax, parse_root
from fleetlift.core.units import Share, parse_rate, parse_share
from fleetlift.migrate.plan_reader import BadPlan, PlanReader
from fleetlift.migrate.planfile import parse_plan
from fleetlift.yamlfile import compose, join, read_text

_TOP: Final = (
    *("migration", "tenant", "from", "to", "lever", "on_breach", "dns", "features", "rehearse", "steps"),
)
_SIDE: Final = (
    *("postgresql", "password_env", "replica", "mqtt", "api", "token_env", "ca_file"),
    *("relay", "relay_token_file", "create"),
)
_KINDS: Final = ("copy", "warm", "validate", "freeze", "switch", "drain")
_ORDER: Final = (Copy, Warm, Validate, Freeze, SwitchDatabase, SwitchDns, Drain)
_NAME_MAX, _RECORDS_MAX, _TABLES_MAX = 253, 1000, 10_000
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_HOST = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE | re.ASCII)
EVERYTHING: Final[tuple[Share | str, ...]] = (Share(percent=100.0),)
LOAD_GATES: Final = (OF_LOAD,)
DNS_GATES: Final = ("devices.silent", "telemetry.completeness")


def load_any_plan(path: Path) -> Plan | TenantPlan:
    """The plan in a file, of either kind. Raises BadInput (also when the file cannot be read)."""
    return parse_any_plan(read_text(path, "plan"), file=str(path))


def parse_any_plan(text: str, *, file: str = "plan.yaml") -> Plan | TenantPlan:
    """A fleet's plan, or a tenant's, by its top-level keys. Raises BadPlan with all mistakes at once."""
    root = compose(text, file, what="plan", shown_in="docs/plan.md", bad=BadPlan)
    return _read(root, file) if _of_tenant(root) else parse_plan(text, file=file)


def parse_tenant_plan(text: str, *, file: str = "plan.yaml") -> TenantPlan:
    """A tenant's plan. Raises BadPlan with all mistakes at once."""
    return _read(compose(text, file, what="plan", shown_in="docs/tenant-plan.md", bad=BadPlan), file)


def _of_tenant(root: yaml.Node) -> bool:
    keys = (
        {str(key.value) for key, _ in root.value if isinstance(key, yaml.ScalarNode)}
        if isinstance(root, yaml.MappingNode)
        else set()
    )
    return "tenant" in keys and "fleet" not in keys


def _read(root: yaml.Node, file: str) -> TenantPlan:
    reader = _Reader()
    plan = reader.plan(root)
    if reader.problems or plan is None:
        raise BadPlan(file, reader.problems)
    return plan


class _Reader(PlanReader):
    """Reads the plan of a tenant's move."""

    def __init__(self) -> None:
        super().__init__()
        self._of_step: tuple[str, ...] = ()

    def plan(self, root: yaml.Node) -> TenantPlan | None:
        if (top := self._mapping(root, "", "a plan is a mapping that begins with 'migration: NAME'")) is None:
            return None
        self._known(root, top, _TOP, "")
        self._needed(root, top, ("migration", "tenant", "from", "to", "steps"), "")
        name = self._get(top, "migration", self._name)
        tenant = self._get(top, "tenant", self._checked(checked_tenant_id))
        old = self._get(top, "from", self._tenant_side)
        new = self._get(top, "to", self._tenant_side)
        self._get(top, "lever", self._one_of(("dns",)), "dns")
        on_breach = self._get(top, "on_breach", self._one_of(tuple(OnBreach)), str(OnBreach.REVERT))
        dns = self._get(top, "dns", self._dns)
        features = self._get(top, "features", self._features) or {}
        rehearsal = self._get(top, "rehearse", self._rehearsal)
        steps = self._tenant_steps(top["steps"]) if "steps" in top else None
        if old and new and old[0].url == new[0].url:
            self._wrong(top["to"], "to.postgresql", "is the source itself: a move needs two databases")
        if steps is not None:
            self._agree(top, steps, dns, features)
        if self.problems or name is None or tenant is None or old is None or new is None or steps is None:
            return None
        return TenantPlan(
            name=name,
            tenant=tenant,
            source=old[0],
            target=new[0],
            old=old[1],
            new=new[1],
            steps=steps,
            dns=dns,
            features=features,
            rehearsal=rehearsal,
            on_breach=OnBreach(on_breach or OnBreach.REVERT),
        )

    def _agree(
        self,
        top: Mapping[str, yaml.Node],
        steps: tuple[MoveStep, ...],
        dns: DnsServer | None,
        features: Mapping[str, tuple[str, ...]],
    ) -> None:
        """What one part of the plan needs of another."""
        node = top["steps"]
        for number, step in enumerate(steps):
            if isinstance(step, SwitchDns) and dns is None and "dns" not in top:
                self._wrong(
                    node, f"steps[{number}]", "'switch: dns' needs 'dns:' at the top: how names change"
                )
            if isinstance(step, Freeze):
                for feature in step.features:
                    if feature not in features:
                        known = f"; known: {', '.join(features)}" if features else ""
                        self._wrong(
                            node,
                            f"steps[{number}].freeze",
                            f"{feature!r} is not among 'features:', which say which tables it fills{known}",
                        )
        places = [_ORDER.index(type(step)) for step in steps]
        for number, (before, after) in enumerate(pairwise(places)):
            if after < before:
                self._wrong(
                    node,
                    f"steps[{number + 1}]",
                    f"'{step_name(steps[number + 1])}' comes after '{step_name(steps[number])}'; the order "
                    "is copy, warm, validate, freeze, switch: database, switch: dns, drain",
                )
            elif after == before and not isinstance(steps[number], Validate):
                self._wrong(node, f"steps[{number + 1}]", f"'{step_name(steps[number])}' is there twice")
        if steps and not isinstance(steps[0], Copy):
            self._wrong(node, "steps[0]", "a move begins with '- copy: tenant data'")
        if any(isinstance(s, SwitchDns | Drain) for s in steps) and not any(
            isinstance(s, SwitchDatabase) for s in steps
        ):
            self._wrong(node, "steps", "names are switched only after 'switch: database'")

    # -- sides -------------------------------------------------------------------------------------------

    def _tenant_side(self, node: yaml.Node, key: str) -> tuple[Database, Front] | None:
        expected = 'a mapping such as {postgresql: "postgresql://db/cloud", mqtt: "mqtts://iot.example.com"}'
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        self._known(node, parts, _SIDE, key)
        self._needed(node, parts, ("postgresql",), key)
        create = self._get(parts, "create", self._bool, False, at=key)
        if create and key == "from":
            self._wrong(
                parts["create"], f"{key}.create", "the source is there already: only 'to:' may have it"
            )
        named = {n: p for n, p in parts.items() if n in _SIDE and n != "create"}
        texts = {n: self._side_text(p, join(key, n), n) for n, p in named.items()}
        for name, schemes in (
            ("postgresql", ("postgresql", "postgres")),
            ("replica", ("postgresql", "postgres")),
            ("mqtt", ("mqtt", "mqtts")),
            ("api", ("http", "https")),
            ("relay", ("http", "https")),
        ):
            text = texts.get(name)
            if text is not None and urlsplit(text).scheme not in schemes:
                self._wrong(parts[name], join(key, name), f"{text!r}: expected {schemes[-1]}://…")
        for name in ("password_env", "token_env"):
            text = texts.get(name)
            if text is not None and not _ENV.fullmatch(text):
                self._wrong(parts[name], join(key, name), "expected the name of an environment variable")
        if "relay" in texts and "relay_token_file" not in texts:
            self._wrong(node, join(key, "relay_token_file"), "is missing: the relay wants a token")
        got = {name: text or "" for name, text in texts.items()}
        if not got.get("postgresql"):
            return None
        return (
            Database(
                url=got["postgresql"],
                password_env=got.get("password_env", ""),
                replica=got.get("replica", ""),
                create=bool(create),
            ),
            Front(
                mqtt=got.get("mqtt", ""),
                api=got.get("api", ""),
                token_env=got.get("token_env", ""),
                ca_file=got.get("ca_file", ""),
                relay=got.get("relay", ""),
                relay_token_file=got.get("relay_token_file", ""),
            ),
        )

    def _dns(self, node: yaml.Node, key: str) -> DnsServer | None:
        expected = 'a mapping such as {server: "10.0.0.53", zone: example.com, key: "env:FLEETLIFT_DNS_KEY"}'
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        known = ("server", "zone", "key", "route53", "api")
        self._known(node, parts, (*known, "servers"), key)
        servers = self._get(parts, "servers", self._texts, at=key)
        texts = {n: self._text(p, join(key, n), "a text") or "" for n, p in parts.items() if n in known}
        if ("server" in parts) == ("route53" in parts):
            self._wrong(node, key, "say either 'server:' (RFC 2136) or 'route53:' (the hosted zone's id)")
        if "server" in parts:
            self._needed(node, parts, ("zone", "key"), key)
        if "key" in parts and not re.match(r"env:[A-Za-z_]\w*$|[./~]", texts["key"]):
            self._wrong(
                parts["key"], f"{key}.key", "a plan holds no secrets: say env:VARIABLE, or a file's path"
            )
        return DnsServer(servers=servers or (), **texts)

    def _features(self, node: yaml.Node, key: str) -> dict[str, tuple[str, ...]] | None:
        parts = self._mapping(
            node, key, "features with their tables, such as {registration: [users, device]}"
        )
        if parts is None:
            return None
        read = {name: self._texts(value, join(key, name)) for name, value in parts.items()}
        return {name: tables for name, tables in read.items() if tables}

    def _rehearsal(self, node: yaml.Node, key: str) -> Rehearsal | None:
        parts = self._mapping(node, key, "a mapping such as {tenant: pool, root: customers.id = 9}")
        if parts is None:
            return None
        self._known(node, parts, ("tenant", "root", "database"), key)
        self._needed(node, parts, ("tenant", "root"), key)
        tenant = self._get(parts, "tenant", self._checked(checked_tenant_id), at=key)
        root = self._get(parts, "root", self._root, at=key)
        database = self._get(parts, "database", self._name, "", at=key)
        if tenant is None or root is None or database is None:
            return None
        return Rehearsal(tenant=tenant, root=root, database=database)

    # -- steps -------------------------------------------------------------------------------------------

    def _tenant_steps(self, node: yaml.Node) -> tuple[MoveStep, ...] | None:
        items = self._list(node, "steps", "a list of steps such as '- copy: tenant data'", 20)
        if items is None:
            return None
        if not items:
            return self._wrong(node, "steps", "a move needs at least one step, '- copy: tenant data'")
        steps = [self._tenant_step(item, f"steps[{number}]") for number, item in enumerate(items)]
        return None if None in steps else tuple(step for step in steps if step is not None)

    def _tenant_step(self, node: yaml.Node, key: str) -> MoveStep | None:
        expected = f"a step is a mapping that begins with one of: {', '.join(_KINDS)}"
        if (parts := self._mapping(node, key, expected)) is None:
            return None
        kinds = [kind for kind in _KINDS if kind in parts]
        if len(kinds) != 1:
            first = next(iter(parts), "")
            return self._wrong(parts.get(first, node), join(key, first), expected)
        match kinds[0]:
            case "copy":
                return self._copy(node, parts, key)
            case "warm":
                self._known(node, parts, ("warm",), key)
                self._get(parts, "warm", self._one_of(("caches",)), at=key)
                return Warm()
            case "validate":
                return self._validate(node, parts, key)
            case "freeze":
                return self._freeze(node, parts, key)
            case "drain":
                return self._drain(node, parts, key)
        what = self._get(parts, "switch", self._one_of(("database", "dns")), at=key)
        if what == "database":
            return self._database(node, parts, key)
        return self._switch_dns(node, parts, key) if what == "dns" else None

    def _copy(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> Copy | None:
        known = ("copy", "root", "tables", "from_replica", "chunk", "workers", "follow", "verify")
        self._known(node, parts, (*known, "lag_at_most", "slot_at_most"), key)
        self._needed(node, parts, ("root",), key)
        self._get(parts, "copy", self._one_of(("tenant data",)), at=key)
        root = self._get(parts, "root", self._root, at=key)
        tables = self._get(parts, "tables", self._tables, at=key) if "tables" in parts else {}
        replica = self._get(parts, "from_replica", self._bool, False, at=key)
        chunk = self._get(parts, "chunk", self._rows, 10_000, at=key)
        workers = self._get(parts, "workers", self._few, 2, at=key)
        follow = self._get(parts, "follow", self._bool, True, at=key)
        if follow is False:
            self._wrong(parts["follow"], f"{key}.follow", "a move always follows: leave the line out")
        self._get(parts, "verify", self._one_of(("every row",)), at=key)
        lag = self._get(parts, "lag_at_most", self._positive, 10.0, at=key)
        slot = self._get(parts, "slot_at_most", self._bytes, 64 * 1024**3, at=key)
        if root is None or tables is None or chunk is None or workers is None:
            return None
        return Copy(
            root=root,
            tables=tables,
            from_replica=bool(replica),
            chunk_rows=chunk,
            workers=workers,
            lag_at_most_s=lag or 10.0,
            slot_at_most_bytes=slot or 64 * 1024**3,
        )

    def _validate(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> Validate | None:
        self._known(node, parts, ("validate", "scenario", "rate", "for", "gates"), key)
        self._needed(node, parts, ("scenario", "for"), key)
        self._get(parts, "validate", self._one_of(("load",)), at=key)
        scenario = self._get(parts, "scenario", self._file_name, at=key)
        for_s = self._get(parts, "for", self._positive, at=key)
        rate = self._get(parts, "rate", self._checked(parse_rate), at=key)
        gates = self._step_gates(parts, key, LOAD_GATES)
        if scenario is None or for_s is None:
            return None
        return Validate(scenario=scenario, for_s=for_s, rate_s=rate, gates=gates)

    def _freeze(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> Freeze | None:
        self._known(node, parts, ("freeze", "at_most"), key)
        self._needed(node, parts, ("at_most",), key)
        features = self._get(parts, "freeze", self._texts, at=key)
        at_most = self._get(parts, "at_most", self._positive, at=key)
        if not features or at_most is None:
            return None
        return Freeze(features=features, at_most_s=at_most)

    def _database(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> SwitchDatabase | None:
        self._known(node, parts, ("switch", "at_most", "terminate", "sequence_gap"), key)
        at_most = self._get(parts, "at_most", self._positive, 10.0, at=key)
        terminate = self._get(parts, "terminate", self._bool, False, at=key)
        gap = self._get(parts, "sequence_gap", self._count, 1_000_000, at=key)
        if at_most is None or gap is None:
            return None
        return SwitchDatabase(at_most_s=at_most, terminate=bool(terminate), sequence_gap=gap)

    def _switch_dns(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> SwitchDns | None:
        known = ("switch", "records", "waves", "bake", "gates", "approve", "release", "silent_after")
        self._known(node, parts, (*known, "no_data_after"), key)
        self._needed(node, parts, ("records",), key)
        records = self._get(parts, "records", self._records, at=key)
        waves = self._get(parts, "waves", self._dns_waves, EVERYTHING, at=key)
        bake = self._get(parts, "bake", self._duration, 0.0, at=key)
        gates = self._step_gates(parts, key, DNS_GATES)
        approve = self._get(parts, "approve", self._bool, False, at=key)
        release = self._get(parts, "release", self._checked(parse_rate), 50.0, at=key)
        silent = self._get(parts, "silent_after", self._positive, 300.0, at=key)
        no_data = self._get(parts, "no_data_after", self._positive, 60.0, at=key)
        if records is None or waves is None or bake is None:
            return None
        has_pool = any(record.pool for record in records)
        if POOL in waves and not has_pool:
            self._wrong(
                parts["waves"], f"{key}.waves", "no record has 'pool: true', so there is no test pool"
            )
        if has_pool and POOL not in waves:
            self._wrong(parts["waves"], f"{key}.waves", f"the test pool needs its wave: [{POOL}, 100%]")
        return SwitchDns(
            records=records,
            waves=waves,
            bake_s=bake,
            gates=gates,
            approve=bool(approve),
            release_per_s=release or 50.0,
            silent_after_s=silent or 300.0,
            no_data_after_s=no_data or 60.0,
        )

    def _drain(self, node: yaml.Node, parts: Mapping[str, yaml.Node], key: str) -> Drain | None:
        self._known(node, parts, ("drain", "stragglers", "stale", "quiet", "release"), key)
        self._get(parts, "drain", self._one_of(("old",)), at=key)
        kind = self._get(parts, "stragglers", self._one_of(("relay", "wait")), "relay", at=key)
        stale = self._get(parts, "stale", self._checked(parse_share), at=key)
        quiet = self._get(parts, "quiet", self._duration, 0.0, at=key)
        release = self._get(parts, "release", self._checked(parse_rate), 50.0, at=key)
        return Drain(
            relay=kind == "relay",
            stale_share=(stale.percent or 0.0) / 100 if stale is not None else 0.0,
            quiet_s=quiet or 0.0,
            release_per_s=release or 50.0,
        )

    def _step_gates(
        self, parts: Mapping[str, yaml.Node], key: str, of_step: tuple[str, ...]
    ) -> tuple[Gate, ...]:
        self._of_step = of_step
        return self._get(parts, "gates", self._gates, (), at=key) or ()

    def _gate(self, node: yaml.Node, key: str) -> Gate | None:
        gate = self._any_gate(node, key)
        if gate is not None and gate.metric and not gate.metric.startswith(self._of_step):
            return self._wrong(
                node, key, f"{gate.metric} is not measured in this step; expected: {', '.join(self._of_step)}"
            )
        return gate

    # -- values ------------------------------------------------------------------------------------------

    def _root(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a root row such as customers.id = 42")
        if text is not None:
            try:
                parse_root(text)
            except BadInput as error:
                return self._wrong(node, key, str(error))
        return text

    def _tables(self, node: yaml.Node, key: str) -> dict[str, Any] | None:
        parts = self._mapping(node, key, "tables with what to know of them, such as {currency: all}")
        if parts is None:
            return None
        if len(parts) > _TABLES_MAX:
            return self._wrong(node, key, f"has {len(parts)} tables; at most {_TABLES_MAX} are read")
        tables = {name: self._plain(value, join(key, name)) for name, value in parts.items()}
        try:
            check_syntax(tables)
        except BadRules as bad:
            for place, text in bad.problems:
                table = next((name for name in parts if place == name or place.startswith(f"{name}.")), "")
                self._wrong(parts.get(table, node), join(key, place), text)
        return tables

    def _plain(self, node: yaml.Node, key: str) -> Any:
        """Texts, lists and mappings of them, as they stand."""
        if isinstance(node, yaml.MappingNode):
            parts = self._mapping(node, key, "a mapping") or {}
            return {name: self._plain(value, join(key, name)) for name, value in parts.items()}
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, f"{key}[{n}]") for n, item in enumerate(node.value)]
        return self._text(node, key, "a text, a list or a mapping")

    def _records(self, node: yaml.Node, key: str) -> tuple[Record, ...] | None:
        items = self._list(node, key, "a list such as [{name: iot.example.com, to: 10.0.0.2}]", _RECORDS_MAX)
        if items is None:
            return None
        records = [self._record(item, f"{key}[{n}]") for n, item in enumerate(items)]
        found = tuple(record for record in records if record is not None)
        names = [(record.name, record.type) for record in found]
        for n, name in enumerate(names):
            if name in names[:n]:
                self._wrong(items[n], f"{key}[{n}]", f"{name[0]} is listed twice")
        return found

    def _record(self, node: yaml.Node, key: str) -> Record | None:
        parts = self._mapping(node, key, "a mapping such as {name: iot.example.com, to: 10.0.0.2, ttl: 30s}")
        if parts is None:
            return None
        self._known(node, parts, ("name", "to", "type", "ttl", "pool"), key)
        self._needed(node, parts, ("name",), key)
        name = self._get(parts, "name", self._host, at=key)
        kind = self._get(parts, "type", self._one_of(("A", "AAAA", "CNAME")), "A", at=key)
        to = self._get(parts, "to", self._texts, at=key) if "to" in parts else ()
        ttl = self._get(parts, "ttl", self._positive, 30.0, at=key)
        pool = self._get(parts, "pool", self._bool, False, at=key)
        if name is None or kind is None or to is None or ttl is None:
            return None
        for value in to:
            if not _fits(kind, value):
                self._wrong(parts["to"], f"{key}.to", f"{value!r} is no value of a record of type {kind}")
        return Record(name=name, to=to, type=kind, ttl_s=ttl, pool=bool(pool))

    def _dns_waves(self, node: yaml.Node, key: str) -> tuple[Share | str, ...] | None:
        items = self._list(node, key, f"a list such as [{POOL}, 100%]", 100)
        if not items:
            return None if items is None else self._wrong(node, key, f"is empty; expected [{POOL}, 100%]")
        pool = isinstance(items[0], yaml.ScalarNode) and items[0].value == POOL
        rest = items[1:] if pool else items
        read = self._checked(parse_share)
        shares = [read(item, f"{key}[{n + pool}]") for n, item in enumerate(rest)]
        last = 0.0
        for n, share in enumerate(shares):
            if share is None:
                return None
            if share.percent is None:
                return self._wrong(
                    rest[n], f"{key}[{n + pool}]", "names are switched by percentages, as in 10%"
                )
            if share.percent <= last:
                self._wrong(rest[n], f"{key}[{n + pool}]", "waves must grow")
            last = share.percent
        waves: list[Share | str] = [POOL] if pool else []
        return (*waves, *(share for share in shares if share is not None))

    def _texts(self, node: yaml.Node, key: str) -> tuple[str, ...] | None:
        """A text, or a list of them."""
        if isinstance(node, yaml.ScalarNode):
            text = self._text(node, key, "a text or a list of texts")
            return None if text is None else (text,)
        items = self._list(node, key, "a text or a list of texts", _RECORDS_MAX)
        texts = [self._text(item, f"{key}[{n}]", "a text") for n, item in enumerate(items or ())]
        return tuple(text for text in texts if text is not None) or self._wrong(node, key, "is empty")

    def _host(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "a name such as iot.example.com")
        if text is not None and not _HOST.fullmatch(text):
            return self._wrong(node, key, f"{text!r}: expected a name such as iot.example.com")
        return text if text is None else text.rstrip(".").lower()

    def _file_name(self, node: yaml.Node, key: str) -> str | None:
        text = self._text(node, key, "the name of a scenario's file")
        if text is not None and (not text.strip() or len(text) > _NAME_MAX):
            return self._wrong(node, key, "expected the name of a scenario's file, such as peak.yaml")
        return text

    def _rows(self, node: yaml.Node, key: str) -> int | None:
        text = self._text(node, key, "a number of rows such as 10000 rows")
        match = re.fullmatch(r"([0-9]{1,9})(?:\s+rows?)?", text.strip()) if text is not None else None
        if match is None or not int(match[1]):
            return self._wrong(node, key, "expected a number of rows such as 10000 rows")
        return int(match[1])

    def _few(self, node: yaml.Node, key: str) -> int | None:
        count = self._count(node, key)
        if count is not None and not 1 <= count <= 64:
            return self._wrong(node, key, "expected 1 to 64")
        return count

    def _bytes(self, node: yaml.Node, key: str) -> int | None:
        text = self._text(node, key, "a size such as 64GiB")
        match = re.fullmatch(r"([0-9]{1,6})\s*(MiB|GiB|TiB)", text.strip()) if text is not None else None
        if match is None or not int(match[1]):
            return self._wrong(node, key, "expected a size such as 64GiB")
        return int(match[1]) << {"MiB": 20, "GiB": 30, "TiB": 40}[match[2]]


def _fits(kind: str, value: str) -> bool:
    if kind == "CNAME":
        return _HOST.fullmatch(value) is not None
    try:
        return ipaddress.ip_address(value).version == (4 if kind == "A" else 6)
    except ValueError:
        return False
