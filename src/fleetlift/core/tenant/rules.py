"""What a plan says of tables, read: `root: customers.id = 42` and `tables:`, to `Rules`.

    ts_kv: entity_id -> device.id when entity_type = 'DEVICE' | asset.id when entity_type = 'ASSET'
    audit_log: customer_id                     # a column that holds the root's key
    currency: all                              # comes whole
    job_queue: none                            # stays
    device: {copy: [profile_id], forbid: [asset_id]}
    link: {own: [a_id, b_id], refer: [b_id]}   # owned by either; where b's row does not come, as it is
    event_tag: {identity: full}
    reading: {refs: [device_id -> device.id, (site, room) -> site.room(id, number)], own: [device_id]}

`parse_rules` needs the schema; `check_syntax` only what is written, for a plan that is read without a
database. Both find every mistake before they raise.
"""

# `return self._wrong(...)` notes a problem and gives the None that stands for "could not be read".
# mypy: disable-error-code="func-returns-value"

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from fleetlift.core.errors import BadInput
from fleetlift.core.gates import did_you_mean
from fleetlift.core.tenant.closure import Policy, Reference, Root, Rules
from fleetlift.core.tenant.derive import columns_text, short
from fleetlift.core.tenant.schema import DatabaseSchema, Table, TableName

_NAME: Final = r'(?:"[^".]{1,63}"|[^\W\d][\w$]{0,62})'
_TABLE: Final = rf"(?:{_NAME}\.)?{_NAME}"
_ROOT: Final = re.compile(rf"\s*({_TABLE})\.({_NAME})\s*=\s*(\S.*?)\s*", re.DOTALL)
_COLUMNS: Final = re.compile(rf"\s*(?:({_NAME})|\(\s*({_NAME}(?:\s*,\s*{_NAME})*)\s*\))\s*")
_TARGET: Final = re.compile(
    rf"\s*(?:({_TABLE})\.({_NAME})|({_TABLE})\s*\(\s*({_NAME}(?:\s*,\s*{_NAME})*)\s*\))\s*"
    rf"(?:when\s+(\S.*?))?\s*",
    re.DOTALL,
)
_WHEN: Final = re.compile(rf"\s*({_NAME})\s*=\s*(?:'((?:[^']|'')*)'|(-?\w+))\s*(?:and\s|$)", re.IGNORECASE)
_KEYS: Final = ("refs", "own", "copy", "refer", "forbid", "identity")
_POLICIES: Final = {policy.value: policy for policy in Policy}
_LENGTH_MAX: Final = 4096
_ITEMS_MAX: Final = 1000
_SAID: Final = (
    "expected 'all', 'none', a column with the root's key, COLUMN -> TABLE.COLUMN, "
    "or a mapping of own, copy, refer, forbid, refs, identity"
)


class BadRules(BadInput):
    """What a plan says of tables cannot be used.

    `problems` are pairs of key and text; the key is the way below `tables` (`device.copy`), "" for the root.
    """

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join(f"tables.{key}: {text}" if key else f"root: {text}" for key, text in self.problems)
        )


class RootText(NamedTuple):
    """A root as written: its table may lack the schema."""

    table: str
    column: str
    value: str


class Way(NamedTuple):
    """One target of a reference as written; an empty `to` is the root's row."""

    columns: tuple[str, ...]
    to: str
    to_columns: tuple[str, ...]
    when: tuple[tuple[str, str], ...]


class Said(NamedTuple):
    """What is written of one table."""

    whole: bool = False
    left_out: bool = False
    ways: tuple[Way, ...] = ()
    policies: tuple[tuple[Policy, tuple[str, ...]], ...] = ()
    full_identity: bool = False


def parse_root(text: str) -> RootText:
    """`customers.id = 42`, `crm.customers.id = '42'`. Raises BadInput."""
    match = _ROOT.fullmatch(text) if len(text) <= _LENGTH_MAX else None
    if match is None:
        raise BadInput(f"{_cut(text)!r}: expected a root row such as customers.id = 42")
    table, column, value = match.groups()
    if value[0] in "'\"":
        if len(value) < 2 or value[-1] != value[0]:
            raise BadInput(f"{_cut(text)!r}: the value's quote is not closed")
        value = value[1:-1].replace(value[0] * 2, value[0])
    if "\0" in value:
        raise BadInput("root: a value cannot hold the character 0")
    return RootText(_table_name(table), _plain(column), value)


def check_syntax(tables: Mapping[str, Any]) -> None:
    """Read `tables` without a schema. Raises BadRules with every mistake."""
    problems: list[tuple[str, str]] = []
    for key, value in tables.items():
        _said(key, value, problems)
    if problems:
        raise BadRules(problems)


def parse_rules(root_text: str, tables: Mapping[str, Any], schema: DatabaseSchema) -> Rules:
    """The rules that a plan's root and tables mean in this schema. Raises BadRules with every mistake."""
    return _Reading(schema).rules(root_text, tables)


def table_called(schema: DatabaseSchema, name: str) -> Table:
    """The table that people mean by `name`: with its schema, else public's, else the only one of that name.

    Raises BadInput.
    """
    wanted = _table_name(name)
    tables = schema.tables
    for full in (wanted, f"public.{wanted}"):
        if full in tables:
            return tables[full]
    found = [table for table in tables if table.partition(".")[2] == wanted]
    if len(found) > 1:
        raise BadInput(f"{wanted!r} is in several schemas: write one of {', '.join(sorted(found))}")
    if found:
        return tables[found[0]]
    for full, reason in schema.skipped.items():
        if wanted in (full, short(full)):
            raise BadInput(f"{wanted} is {reason}")
    known = [short(table) for table in tables]
    raise BadInput(f"there is no table {wanted!r} in the source{did_you_mean(wanted, known)}")


class _Reading:
    def __init__(self, schema: DatabaseSchema) -> None:
        self._schema = schema
        self._problems: list[tuple[str, str]] = []

    def rules(self, root_text: str, tables: Mapping[str, Any]) -> Rules:
        root = self._root(root_text)
        references: list[Reference] = []
        whole, left_out, full = [], [], []
        policies: dict[tuple[TableName, tuple[str, ...]], Policy] = {}
        otherwise: dict[tuple[TableName, tuple[str, ...]], Policy] = {}
        seen: dict[TableName, str] = {}
        for key, value in tables.items():
            said = _said(key, value, self._problems)
            table = self._table(key, key)
            if said is None or table is None:
                continue
            if table.name in seen:
                self._wrong(key, f"is the same table as {seen[table.name]!r}, which is there already")
                continue
            seen[table.name] = key
            whole += [table.name] if said.whole else []
            left_out += [table.name] if said.left_out else []
            full += [table.name] if said.full_identity else []
            mine = [one for way in said.ways if (one := self._reference(key, table, way, root))]
            references += mine
            known = {one.columns for one in mine} | {one.columns for one in table.foreign_keys}
            self._policies(key, table, said, known, policies, otherwise)
        self._fates(root, whole, left_out, seen)
        if self._problems or root is None:
            raise BadRules(self._problems)
        return Rules(
            root=root,
            references=tuple(references),
            whole=tuple(whole),
            left_out=tuple(left_out),
            policies=policies,
            full_identity=tuple(full),
            otherwise=otherwise,
        )

    def _root(self, text: str) -> Root | None:
        try:
            read = parse_root(text)
        except BadInput as problem:
            return self._wrong("", str(problem))
        table = self._table("", read.table)
        if table is None:
            return None
        column = self._columns("", table, (read.column,))
        if column is None:
            return None
        unique = table.key == column
        if not unique and not any(
            key.to == table.name and key.to_columns == column
            for other in self._schema.tables.values()
            for key in other.foreign_keys
        ):
            return self._wrong(
                "",
                f"{short(table.name)}.{column[0]} does not tell rows apart; name the column of its key"
                + (f" ({columns_text(table.key)})" if len(table.key) == 1 else ""),
            )
        return Root(table=table.name, column=column[0], value=read.value)

    def _fates(
        self, root: Root | None, whole: list[TableName], left_out: list[TableName], keys: Mapping[str, str]
    ) -> None:
        for name in (*whole, *left_out):
            if root is not None and name == root.table:
                what = "'all' would bring every tenant" if name in whole else "it cannot be left out"
                self._wrong(keys[name], f"holds the root row: {what}")

    def _table(self, key: str, name: str) -> Table | None:
        try:
            return table_called(self._schema, name)
        except BadInput as problem:
            return self._wrong(key, str(problem))

    def _columns(self, key: str, table: Table, columns: Sequence[str]) -> tuple[str, ...] | None:
        known = [column.name for column in table.columns]
        for column in columns:
            if column not in known:
                return self._wrong(
                    key, f"{short(table.name)} has no column {column!r}{did_you_mean(column, known)}"
                )
        return tuple(columns)

    def _reference(self, key: str, table: Table, way: Way, root: Root | None) -> Reference | None:
        if way.to == "":
            if root is None:
                return None
            to = self._schema.tables[root.table]
            to_columns: tuple[str, ...] = (root.column,)
        else:
            target = self._table(key, way.to)
            if target is None or self._columns(key, target, way.to_columns) is None:
                return None
            to, to_columns = target, way.to_columns
        if self._columns(key, table, (*way.columns, *(column for column, _ in way.when))) is None:
            return None
        return Reference(
            table=table.name, columns=way.columns, to=to.name, to_columns=to_columns, when=way.when
        )

    def _policies(
        self,
        key: str,
        table: Table,
        said: Said,
        known: set[tuple[str, ...]],
        policies: dict[tuple[TableName, tuple[str, ...]], Policy],
        otherwise: dict[tuple[TableName, tuple[str, ...]], Policy],
    ) -> None:
        names = {one.name: one.columns for one in table.foreign_keys}
        chosen: dict[tuple[str, ...], list[Policy]] = {}
        for policy, written in said.policies:
            columns = names.get(written[0], written) if len(written) == 1 else written
            if columns not in known:
                options = sorted({columns_text(one) for one in known})
                self._wrong(
                    f"{key}.{policy}",
                    f"no reference goes out from {columns_text(written)} of {short(table.name)}; "
                    + (
                        f"it has: {', '.join(options)}"
                        if options
                        else "it has none (declare one under 'refs': [COLUMN -> TABLE.COLUMN])"
                    ),
                )
                continue
            if policy not in chosen.setdefault(columns, []):
                chosen[columns].append(policy)
        for columns, all_ in chosen.items():
            rest = [policy for policy in all_ if policy is not Policy.OWN]
            place = (table.name, columns)
            if len(rest) > 1 or (len(all_) > 1 and Policy.OWN not in all_):
                self._wrong(
                    key,
                    f"{columns_text(columns)} is under {' and '.join(sorted(all_))}; one reference has one "
                    "policy (or 'own' with one of 'copy' and 'refer', for where it points at a row that does "
                    "not come)",
                )
            elif Policy.OWN in all_:
                policies[place] = Policy.OWN
                if rest and rest[0] is not Policy.FORBID:
                    otherwise[place] = rest[0]
            else:
                policies[place] = rest[0]

    def _wrong(self, key: str, text: str) -> None:
        self._problems.append((key, text))


# -- what is written, without a schema ----------------------------------------------------------------------


def _said(key: str, value: Any, problems: list[tuple[str, str]]) -> Said | None:
    before = len(problems)
    try:
        _table_name(key)
    except BadInput as problem:
        problems.append((key, str(problem)))
    said = None
    try:
        if isinstance(value, str):
            said = _of_text(value)
        elif isinstance(value, Mapping):
            said = _of_mapping(key, value, problems)
        else:
            problems.append((key, _SAID))
    except BadInput as problem:
        problems.append((key, str(problem)))
    return said if len(problems) == before else None


def _of_text(text: str) -> Said:
    match text.strip().lower():
        case "all":
            return Said(whole=True)
        case "none":
            return Said(left_out=True)
        case "":
            raise BadInput(_SAID)
    return Said(ways=_ways(text))


def _of_mapping(key: str, value: Mapping[str, Any], problems: list[tuple[str, str]]) -> Said | None:
    ways: list[Way] = []
    policies: list[tuple[Policy, tuple[str, ...]]] = []
    full = False
    for name, given in value.items():
        place = f"{key}.{name}"
        if name == "identity":
            full = str(given).strip().lower() == "full"
            if not full:
                problems.append((place, "expected 'full', the one identity that can be asked for"))
        elif name == "refs" or name in _POLICIES:
            for item in _items(place, given, problems):
                try:
                    if name == "refs":
                        ways += _ways(item)
                    else:
                        policies.append((_POLICIES[name], _columns(item)))
                except BadInput as problem:
                    problems.append((place, str(problem)))
        else:
            problems.append(
                (place, f"is not a key here{did_you_mean(str(name), _KEYS)}; known: {', '.join(_KEYS)}")
            )
    return Said(ways=tuple(ways), policies=tuple(policies), full_identity=full)


def _items(place: str, given: Any, problems: list[tuple[str, str]]) -> list[str]:
    """A list of texts; a single text is a list of one. YAML splits `(a, b)` in a list of its own style."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or not all(isinstance(item, str) for item in given):
        problems.append((place, "expected a list of columns, such as [profile_id]"))
        return []
    if len(given) > _ITEMS_MAX:
        problems.append((place, f"has {len(given)} entries; at most {_ITEMS_MAX} are read"))
        return []
    joined: list[str] = []
    for item in given:
        if joined and joined[-1].count("(") > joined[-1].count(")"):
            joined[-1] += f", {item}"
        else:
            joined.append(item)
    return joined


def _ways(text: str) -> tuple[Way, ...]:
    """`entity_id -> device.id | asset.id`, or `customer_id` for the root's row."""
    if len(text) > _LENGTH_MAX:
        raise BadInput(f"is longer than {_LENGTH_MAX} characters")
    left, arrow, right = text.partition("->")
    columns = _columns(left)
    if not arrow:
        return (Way(columns, "", (), ()),)
    ways = []
    for part in _split(right, "|"):
        match = _TARGET.fullmatch(part)
        if match is None:
            raise BadInput(f"{_cut(part.strip())!r}: expected TABLE.COLUMN, such as device.id, after '->'")
        table, column, table_of_many, many, when = match.groups()
        to_columns = (_plain(column),) if column else _names(many)
        if len(to_columns) != len(columns):
            raise BadInput(
                f"{_cut(text.strip())!r}: {len(columns)} column(s) before '->', {len(to_columns)} after it"
            )
        ways.append(Way(columns, _table_name(table or table_of_many), to_columns, _when(when)))
    return tuple(ways)


def _when(text: str | None) -> tuple[tuple[str, str], ...]:
    if text is None:
        return ()
    found, at = [], 0
    while at < len(text):
        match = _WHEN.match(text, at)
        if match is None:
            raise BadInput(f"{_cut(text)!r}: after 'when', expected COLUMN = 'VALUE' (several with 'and')")
        column, quoted, bare = match.groups()
        found.append((_plain(column), bare if quoted is None else quoted.replace("''", "'")))
        at = match.end()
    return tuple(found)


def _columns(text: str) -> tuple[str, ...]:
    match = _COLUMNS.fullmatch(text)
    if match is None:
        raise BadInput(f"{_cut(text.strip())!r} is no column, nor columns such as (a, b); {_SAID}")
    one, many = match.groups()
    return (_plain(one),) if one else _names(many)


def _names(text: str) -> tuple[str, ...]:
    return tuple(_plain(name) for name in re.findall(_NAME, text))


def _table_name(text: str) -> str:
    if not re.fullmatch(rf"\s*{_TABLE}\s*", text):
        raise BadInput(f"{_cut(text)!r} is no table's name, such as device or crm.device")
    return ".".join(_plain(name) for name in re.findall(_NAME, text))


def _plain(name: str) -> str:
    return name.strip('"')


def _split(text: str, sign: str) -> list[str]:
    """`text` at each `sign` that is not within quotes."""
    parts, quote = [""], ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == sign:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
