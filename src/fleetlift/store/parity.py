"""Queries of parity: tallies of compared messages, the old side's noise, the rules, and whole accounts.

Every function takes a connection and leaves transactions to its caller. Times are Unix seconds.
"""

from collections.abc import Mapping, Sequence

import msgspec

from fleetlift.core.parity import Account, FieldTally, Rule, Tally, account
from fleetlift.core.ranges import RangeSet
from fleetlift.core.telemetry import MQTT_PATH, Telemetry
from fleetlift.store.pool import Conn

Key = tuple[str, str, str]  # device, channel, old path


class ParityRow(msgspec.Struct, kw_only=True):
    """One channel of one device. `spans` are the numbers between first and last pairs."""

    spans: RangeSet = msgspec.field(default_factory=RangeSet)
    tally: Tally = msgspec.field(default_factory=Tally)
    last_at: float = 0.0
    rules_at: float = 0.0  # `changed_at` of the rules that it was compared by


class Stored(msgspec.Struct, frozen=True):
    """The copy of a message that came first."""

    path: str
    body: str


async def stored_copies(conn: Conn, rows: Sequence[Telemetry]) -> list[Stored | None]:
    """What is stored under the key of each of `rows`, in their order."""
    found = await conn.fetch(
        """SELECT t.path, t.body::text AS body FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
               WITH ORDINALITY k(device, channel, ts_ms, msg_key, place)
           LEFT JOIN telemetry t ON t.device = k.device AND t.channel = k.channel
               AND t.ts = to_timestamp(k.ts_ms::float8 / 1000) AND t.msg_key = k.msg_key
           ORDER BY k.place""",
        [r.device for r in rows],
        [r.channel for r in rows],
        [r.ts_ms for r in rows],
        [r.msg_key for r in rows],
    )
    return [None if r["path"] is None else Stored(r["path"], r["body"]) for r in found]


async def load(conn: Conn, keys: Sequence[Key]) -> dict[Key, ParityRow]:
    found = await conn.fetch(
        """SELECT device, channel, old_path, spans::text AS spans, compared, differing, ignored,
               fields::text AS fields, extract(epoch FROM last_at)::float8 AS last_at, rules_at
           FROM parity JOIN unnest($1::text[], $2::text[], $3::text[]) k(device, channel, old_path)
               USING (device, channel, old_path)""",
        [key[0] for key in keys],
        [key[1] for key in keys],
        [key[2] for key in keys],
    )
    return {
        (r["device"], r["channel"], r["old_path"]): ParityRow(
            spans=RangeSet.from_pg(r["spans"]), tally=_tally(r), last_at=r["last_at"], rules_at=r["rules_at"]
        )
        for r in found
    }


async def save(conn: Conn, rows: Mapping[Key, ParityRow]) -> None:
    """Set rows to what they are now."""
    if rows:
        keys = sorted(rows)
        await conn.execute(
            """INSERT INTO parity (device, channel, old_path, spans, compared, differing, ignored, fields,
                                   last_at, rules_at)
               SELECT device, channel, old_path, spans::int8multirange, compared, differing, ignored,
                   fields::jsonb, to_timestamp(last_at), rules_at
               FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[],
                           $7::bigint[], $8::text[], $9::float8[], $10::float8[])
                    t(device, channel, old_path, spans, compared, differing, ignored, fields, last_at,
                      rules_at)
               ON CONFLICT (device, channel, old_path) DO UPDATE SET spans = EXCLUDED.spans,
                   compared = EXCLUDED.compared, differing = EXCLUDED.differing, ignored = EXCLUDED.ignored,
                   fields = EXCLUDED.fields, last_at = EXCLUDED.last_at, rules_at = EXCLUDED.rules_at""",
            [key[0] for key in keys],
            [key[1] for key in keys],
            [key[2] for key in keys],
            [rows[key].spans.to_pg() for key in keys],
            [rows[key].tally.compared for key in keys],
            [rows[key].tally.differing for key in keys],
            [rows[key].tally.ignored for key in keys],
            [_fields(rows[key].tally) for key in keys],
            [rows[key].last_at for key in keys],
            [rows[key].rules_at for key in keys],
        )


async def both_since(conn: Conn, devices: Sequence[str]) -> dict[str, float]:
    """Since when devices have been sending to both sides; without those that do not."""
    found = await conn.fetch(
        "SELECT device, extract(epoch FROM both_since)::float8 AS since FROM device_route "
        "WHERE device = ANY($1::text[]) AND both_since IS NOT NULL",
        devices,
    )
    return {r["device"]: r["since"] for r in found}


# -- noise -------------------------------------------------------------------------------------------------


async def add_noise(conn: Conn, old_path: str, added: Mapping[str, Tally], at: float) -> None:
    """Add second readings, by channel."""
    known = await noise(conn, old_path)
    for channel, tally in sorted(added.items()):
        together = known.get(channel, Tally())
        together.add(tally)
        await conn.execute(
            """INSERT INTO parity_noise (old_path, channel, compared, differing, fields, last_at)
               VALUES ($1, $2, $3, $4, $5::text::jsonb, to_timestamp($6))
               ON CONFLICT (old_path, channel) DO UPDATE SET compared = EXCLUDED.compared,
                   differing = EXCLUDED.differing, fields = EXCLUDED.fields, last_at = EXCLUDED.last_at""",
            old_path,
            channel,
            together.compared,
            together.differing,
            _fields(together),
            at,
        )


async def noise(conn: Conn, old_path: str) -> dict[str, Tally]:
    """The old side's difference from itself, by channel."""
    found = await conn.fetch(
        "SELECT channel, compared, differing, 0::bigint AS ignored, fields::text AS fields "
        "FROM parity_noise WHERE old_path = $1",
        old_path,
    )
    return {r["channel"]: _tally(r) for r in found}


# -- rules -------------------------------------------------------------------------------------------------


class Rules(msgspec.Struct, frozen=True):
    """What may differ between one old side and the new one, and since when these are the rules."""

    rules: tuple[Rule, ...] = ()
    changed_at: float = 0.0


async def set_rules(conn: Conn, migration: str, old_path: str, rules: Sequence[Rule]) -> None:
    """Replace the rules of one migration. When they change, comparing begins anew."""
    await conn.execute(
        """INSERT INTO parity_rules AS p (migration, old_path, rules) VALUES ($1, $2, $3::text::jsonb)
           ON CONFLICT (migration) DO UPDATE SET old_path = EXCLUDED.old_path, rules = EXCLUDED.rules,
               changed_at = now()
           WHERE (p.old_path, p.rules) IS DISTINCT FROM (EXCLUDED.old_path, EXCLUDED.rules)""",
        migration,
        old_path,
        msgspec.json.encode(rules).decode(),
    )


async def old_path_of(conn: Conn, migration: str) -> str | None:
    """The name of a migration's old side, once its rules were set."""
    found: str | None = await conn.fetchval(
        "SELECT old_path FROM parity_rules WHERE migration = $1", migration
    )
    return found


async def keep_rules(conn: Conn, migrations: Sequence[str]) -> None:
    """Forget the rules of all other migrations: what a released plan allowed is allowed no more."""
    await conn.execute("DELETE FROM parity_rules WHERE migration <> ALL($1::text[])", migrations)


async def all_rules(conn: Conn) -> dict[str, Rules]:
    """By the old side's name."""
    found: dict[str, Rules] = {}
    for r in await conn.fetch(
        "SELECT old_path, rules::text AS rules, extract(epoch FROM changed_at)::float8 AS changed_at "
        "FROM parity_rules ORDER BY migration"
    ):
        before = found.get(r["old_path"], Rules())
        own = msgspec.json.decode(r["rules"], type=tuple[Rule, ...])
        found[r["old_path"]] = Rules(before.rules + own, max(before.changed_at, r["changed_at"]))
    return found


# -- whole accounts ----------------------------------------------------------------------------------------


class ChannelParity(msgspec.Struct, frozen=True, kw_only=True):
    """One channel over some devices: the account of its messages, and the tallies of its fields."""

    channel: str
    devices: int
    account: Account
    tally: Tally


async def by_channel(conn: Conn, old_path: str, devices: Sequence[str]) -> list[ChannelParity]:
    """Accounts of `devices`, channel by channel, of all that was sent to both sides."""
    tallies: dict[str, Tally] = {}
    for r in await conn.fetch(
        """SELECT p.channel, 0::bigint AS compared, 0::bigint AS differing, 0::bigint AS ignored,
               jsonb_build_object(f.key, f.value)::text AS fields
           FROM parity p CROSS JOIN LATERAL jsonb_each(p.fields) f
           WHERE p.old_path = $1 AND p.device = ANY($2::text[])""",
        old_path,
        devices,
    ):
        tallies.setdefault(r["channel"], Tally()).add(_tally(r))
    result = []
    for r in await conn.fetch(_ACCOUNTS_SQL, old_path, MQTT_PATH, devices):
        tally = tallies.get(r["channel"], Tally())
        tally.compared, tally.differing, tally.ignored = r["compared"], r["differing"], r["ignored"]
        result.append(
            ChannelParity(
                channel=r["channel"],
                devices=r["devices"],
                account=account(
                    both=r["in_both"],
                    only_old=r["only_old"],
                    only_new=r["only_new"],
                    compared=r["compared"],
                    differing=r["differing"],
                    ignored=r["ignored"],
                    uncounted=r["uncounted"],
                ),
                tally=tally,
            )
        )
    return result


# Within the spans: numbers that came by both paths, and by one alone.
_ACCOUNTS_SQL = """
WITH x AS (
    SELECT p.channel, p.compared, p.differing, p.ignored,
        coalesce(o.ranges, '{}') * p.spans AS o, coalesce(n.ranges, '{}') * p.spans AS n,
        coalesce(o.uncounted, 0) AS uncounted
    FROM parity p
    LEFT JOIN ledger o ON o.device = p.device AND o.channel = p.channel AND o.path = p.old_path
    LEFT JOIN ledger n ON n.device = p.device AND n.channel = p.channel AND n.path = $2
    WHERE p.old_path = $1 AND p.device = ANY($3::text[])),
y AS (
    SELECT x.*,
        (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM unnest(o * n) r) AS in_both,
        (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM unnest(o - n) r) AS only_old,
        (SELECT coalesce(sum(upper(r) - lower(r)), 0) FROM unnest(n - o) r) AS only_new
    FROM x)
SELECT channel, count(*) AS devices, sum(in_both)::bigint AS in_both, sum(only_old)::bigint AS only_old,
    sum(only_new)::bigint AS only_new, sum(compared)::bigint AS compared,
    sum(differing)::bigint AS differing, sum(ignored)::bigint AS ignored, sum(uncounted)::bigint AS uncounted
FROM y GROUP BY channel ORDER BY channel
"""


def _fields(tally: Tally) -> str:
    return msgspec.json.encode(tally.fields).decode()


def _tally(row: Mapping[str, object]) -> Tally:
    return Tally(
        compared=row["compared"],  # type: ignore[arg-type]
        differing=row["differing"],  # type: ignore[arg-type]
        ignored=row["ignored"],  # type: ignore[arg-type]
        fields=msgspec.json.decode(str(row["fields"]), type=dict[str, FieldTally]),
    )
