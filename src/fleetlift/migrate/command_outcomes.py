"""What became of commands by each side: agreement, success, latency, and what was executed twice."""

from collections.abc import Sequence

import msgspec

from fleetlift.core.command import uuid7
from fleetlift.core.migration import MigrationState, Sample
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag
from fleetlift.core.plan import Rung
from fleetlift.migrate.wave import EXAMPLES, QUANTILES, Wave, moment, standing_flags, summary
from fleetlift.store.pool import Conn

OLD_COMMANDS_SPAN_S = 3600.0


async def measure_commands(
    conn: Conn,
    wave: Wave,
    state: MigrationState,
    rungs: Sequence[Rung],
    rung: Rung,
    since: float,
    now: float,
) -> dict[str, Sample]:
    row = await conn.fetchrow(
        _COMMANDS_SQL,
        [m.device for m in wave.moved],
        [moment(max(since, m.moved_at or since)) for m in wave.moved],
        uuid7(since, 0),
        PROBE_COMMAND,
        rung.commands_timeout_s,
        moment(now),
        EXAMPLES,
    )
    assert row is not None
    agreed, judged = row["agreed"], row["judged"]
    examples = msgspec.json.decode(row["examples"]) if row["examples"] else []
    twice = msgspec.json.decode(row["twice_examples"]) if row["twice_examples"] else []
    differ = judged - agreed
    old_latency, old_n = row["old_latency"], row["old_n"]
    basis = "the same commands"
    if old_n < 5:
        basis = "the old side, other devices or earlier"
        staying = [
            m.device
            for m in state.members.values()
            if standing_flags(m, rungs).commands is not CommandsFlag.NEW and m.wave != state.wave
        ]
        other = await conn.fetchrow(
            _OLD_COMMANDS_SQL,
            [m.device for m in wave.told] + staying,
            uuid7(max(0.0, since - OLD_COMMANDS_SPAN_S), 0),
            PROBE_COMMAND,
            rung.commands_timeout_s,
            moment(now),
        )
        assert other is not None
        old_latency, old_n = other["latency"], other["n"]
        old_good, old_settled = other["good"], other["settled"]
    else:
        old_good, old_settled = row["old_good"], row["old_settled"]
    found = {
        "commands.agreement": Sample(
            value=100.0 * agreed / judged if judged else None,
            n=judged,
            evidence=summary(
                f"{differ:,} of {judged:,} differ" if judged else "no command has been answered yet",
                examples=examples,
                pending=row["pending"],
            ),
        ),
        "commands.success": Sample(
            value=100.0 * row["new_good"] / row["new_settled"] if row["new_settled"] else None,
            n=row["new_settled"],
            old=100.0 * old_good / old_settled if old_settled else None,
            old_n=old_settled,
            evidence=summary(
                f"{row['new_good']:,} of {row['new_settled']:,} by the new side", pending=row["pending"]
            ),
        ),
        "commands.executed_twice": Sample(
            value=float(row["twice"]) if row["total"] else None,
            n=row["total"],
            evidence=summary(f"{row['twice']:,} of {row['total']:,}", examples=twice),
        ),
    }
    for place, label in enumerate(QUANTILES):
        found[f"commands.latency.{label}"] = Sample(
            value=row["new_latency"][place] if row["new_n"] else None,
            n=row["new_n"],
            old=old_latency[place] if old_n else None,
            old_n=old_n,
            evidence=summary(f"n = {row['new_n']:,}, old n = {old_n:,} ({basis})", basis=basis),
        )
    return found


# A path's outcome: good, bad, second (duplicate), none (no answer in time), open (not due yet).
_OUTCOME = """CASE
    WHEN {p}.command IS NULL THEN NULL
    WHEN {p}.ended_at IS NULL AND c.due > $now THEN 'open'
    WHEN {p}.ended_at IS NULL OR {p}.ended_at > c.due OR {p}.status IN ('expired', 'unreachable') THEN 'none'
    WHEN {p}.status IN ('succeeded', 'would-execute') THEN 'good'
    WHEN {p}.status = 'duplicate' THEN 'second'
    ELSE 'bad' END"""
# Unanswered commands count as slow, with the time they were waited for.
_LATENCY = """extract(epoch FROM CASE
    WHEN {p}.ended_at IS NOT NULL AND {p}.status NOT IN ('expired', 'unreachable')
        THEN {p}.ended_at - coalesce({p}.sent_at, {p}.created_at)
    ELSE c.due - {p}.created_at END)::float8"""


def _outcome(path: str, now: str) -> str:
    return _OUTCOME.format(p=path).replace("$now", now)


_COMMANDS_SQL = f"""
WITH d AS (SELECT * FROM unnest($1::text[], $2::timestamptz[]) d(device, since)),
c AS (
    SELECT c.id, c.device, c.name, least(c.expires_at, c.created_at + make_interval(secs => $5)) AS due
    FROM d JOIN command c ON c.device = d.device AND c.id >= $3::uuid AND c.created_at >= d.since
    WHERE c.name <> $4),
x AS (
    SELECT c.id, c.device, c.name, n.mode AS new_mode, o.mode AS old_mode, n.status AS new_status,
        o.status AS old_status, {_outcome("n", "$6")} AS new, {_outcome("o", "$6")} AS old,
        {_LATENCY.format(p="n")} AS new_latency, {_LATENCY.format(p="o")} AS old_latency,
        n.mode = 'execute' AND o.mode = 'execute'
            AND (n.status = 'succeeded' OR n.detail->'late'->>'status' = 'succeeded')
            AND (o.status = 'succeeded' OR o.detail->'late'->>'status' = 'succeeded') AS twice
    FROM c LEFT JOIN command_path n ON n.command = c.id AND n.path = 'new'
           LEFT JOIN command_path o ON o.command = c.id AND o.path = 'old'),
y AS (
    SELECT x.*,
        CASE
            WHEN new IS NULL OR new = 'open' OR old = 'open' THEN NULL
            WHEN old IS NULL THEN new IN ('good', 'bad')
            WHEN old = 'none' AND new = 'none' THEN NULL
            WHEN new_mode = 'dry-run' OR old_mode = 'dry-run' THEN old = new AND old IN ('good', 'bad')
            ELSE (old IN ('good', 'bad') AND new = 'second') OR (new IN ('good', 'bad') AND old = 'second')
        END AS agreed
    FROM x)
SELECT count(*) FILTER (WHERE new IS NOT NULL) AS total,
    count(*) FILTER (WHERE agreed) AS agreed,
    count(*) FILTER (WHERE agreed IS NOT NULL) AS judged,
    count(*) FILTER (WHERE new = 'open' OR old = 'open') AS pending,
    count(*) FILTER (WHERE twice) AS twice,
    count(*) FILTER (WHERE new = 'good') AS new_good,
    count(*) FILTER (WHERE new IN ('good', 'bad', 'none')) AS new_settled,
    count(*) FILTER (WHERE old = 'good') AS old_good,
    count(*) FILTER (WHERE old IN ('good', 'bad', 'none')) AS old_settled,
    count(*) FILTER (WHERE new <> 'open') AS new_n,
    count(*) FILTER (WHERE old <> 'open') AS old_n,
    percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY new_latency)
        FILTER (WHERE new <> 'open') AS new_latency,
    percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY old_latency)
        FILTER (WHERE old <> 'open') AS old_latency,
    (SELECT json_agg(json_build_object('command', id, 'device', device, 'name', name, 'old', old_status,
        'new', new_status))
        FROM (SELECT * FROM y WHERE NOT agreed ORDER BY id DESC LIMIT $7) e)::text AS examples,
    (SELECT json_agg(json_build_object('command', id, 'device', device, 'name', name))
        FROM (SELECT * FROM y WHERE twice ORDER BY id LIMIT $7) e)::text AS twice_examples
FROM y
"""

_OLD_COMMANDS_SQL = f"""
WITH c AS (
    SELECT c.id, least(c.expires_at, c.created_at + make_interval(secs => $4)) AS due FROM command c
    WHERE c.device = ANY($1::text[]) AND c.id >= $2::uuid AND c.name <> $3),
x AS (
    SELECT {_outcome("o", "$5")} AS old, {_LATENCY.format(p="o")} AS latency
    FROM c JOIN command_path o ON o.command = c.id AND o.path = 'old')
SELECT count(*) FILTER (WHERE old <> 'open') AS n,
    count(*) FILTER (WHERE old = 'good') AS good,
    count(*) FILTER (WHERE old IN ('good', 'bad', 'none')) AS settled,
    percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY latency)
        FILTER (WHERE old <> 'open') AS latency
FROM x
"""
