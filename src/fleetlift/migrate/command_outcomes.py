"""What became of commands by each side: agreement, success, latency, and what was executed twice.

Figures that are judged by bounds take commands in the order in which they were made, up to the first that is
still open: what has been answered already would look better than what it is a part of.
"""

from collections.abc import Sequence

import asyncpg
import msgspec

from fleetlift.core.command import uuid7
from fleetlift.core.delays import EDGES_S
from fleetlift.core.figures import share_sample, spread, time_sample
from fleetlift.core.migration import Arm, Basis, Member, Sample, Spread
from fleetlift.core.orders import PROBE_COMMAND, CommandsFlag
from fleetlift.core.plan import Rung
from fleetlift.core.units import format_devices
from fleetlift.migrate.wave import EXAMPLES, LEAST, QUANTILES, Groups, Wave, moment, standing_flags, summary
from fleetlift.store.pool import Conn

OLD_COMMANDS_SPAN_S = 3600.0
_ENOUGH = 5  # commands that make a comparison


class _Old(msgspec.Struct):
    """What the new side's commands are compared with."""

    success: Arm
    latency: Spread
    basis: Basis
    whose: str


async def measure_commands(
    conn: Conn, wave: Wave, groups: Groups, rungs: Sequence[Rung], rung: Rung, since: float, now: float
) -> dict[str, Sample]:
    begins = {m.device: max(since, m.moved_at or since) for m in wave.moved}
    row = await conn.fetchrow(
        _COMMANDS_SQL,
        list(begins),
        [moment(at) for at in begins.values()],
        uuid7(since, 0),
        PROBE_COMMAND,
        rung.commands_timeout_s,
        moment(now),
        EXAMPLES,
        list(EDGES_S),
        [m.device for m in groups.moved],
    )
    assert row is not None
    examples = msgspec.json.decode(row["examples"]) if row["examples"] else []
    twice = msgspec.json.decode(row["twice_examples"]) if row["twice_examples"] else []
    agreement, success, latency = _arm(row, "j"), _arm(row, "s"), _spread(row["new_times"])
    same = _Old(_arm(row, "o"), _spread(row["old_times"]), Basis.SAME, "the same commands")
    old = await _compared(conn, same, wave, groups, rungs, rung, since, now)
    span_s = now - since
    differ = round(agreement.x)
    told = (
        f"{differ:,} of {round(agreement.n):,} differ" if agreement.n else "no command has been answered yet"
    )
    found = {
        "commands.agreement": share_sample(
            agreement,
            None,
            Basis.NONE,
            over_s=span_s,
            evidence=summary(told, examples=examples, pending=row["pending"]),
        ),
        "commands.success": share_sample(
            success,
            old.success,
            old.basis,
            over_s=span_s,
            evidence=summary(
                f"{round(success.n - success.x):,} of {round(success.n):,} by the new side; old n = "
                f"{round(old.success.n):,} ({old.whose})",
                pending=row["pending"],
                basis=old.whose,
            ),
        ),
        "commands.executed_twice": Sample(
            value=float(row["twice"]) if row["total"] else None,
            n=row["total"],
            evidence=summary(f"{row['twice']:,} of {row['total']:,}", examples=twice),
        ),
    }
    for label, q in QUANTILES.items():
        found[f"commands.latency.{label}"] = time_sample(
            q,
            latency,
            old.latency,
            old.basis,
            over_s=span_s,
            evidence=summary(
                f"n = {round(latency.n):,}, old n = {round(old.latency.n):,} ({old.whose})", basis=old.whose
            ),
        )
    return found


async def _compared(
    conn: Conn,
    same: _Old,
    wave: Wave,
    groups: Groups,
    rungs: Sequence[Rung],
    rung: Rung,
    since: float,
    now: float,
) -> _Old:
    """The control; else the same commands by the other path; else the devices before; else the others."""

    async def read(members: Sequence[Member], start: float, end: float, basis: Basis, whose: str) -> _Old:
        by_new = [standing_flags(m, rungs).commands is CommandsFlag.NEW for m in members]
        row = await conn.fetchrow(
            _OTHERS_SQL,
            [m.device for m in members],
            ["new" if new and end > since else "old" for new in by_new],
            uuid7(max(0.0, start), 0),
            PROBE_COMMAND,
            rung.commands_timeout_s,
            moment(now),
            moment(end),
            list(EDGES_S),
        )
        assert row is not None
        return _Old(_arm(row, "o"), _spread(row["times"]), basis, whose)

    if len(groups.control) >= LEAST:
        whose = f"control, {format_devices(len(groups.control))}"
        found = await read(groups.control, since, now, Basis.DEVICES, whose)
        if found.latency.n >= _ENOUGH:
            return found
    if same.latency.n >= _ENOUGH:
        return same
    before = since - OLD_COMMANDS_SPAN_S
    found = await read(wave.moved, before, since, Basis.SAME, "the same devices, before")
    if found.latency.n >= _ENOUGH or not groups.others:
        return found
    return await read(groups.others, before, now, Basis.DEVICES, "other devices or earlier")


def _arm(row: asyncpg.Record, which: str) -> Arm:
    devices, n, x, nn, xx, nx = row[f"{which}_sums"]
    return Arm(devices=int(devices), n=n, x=x, nn=nn, xx=xx, nx=nx)


def _spread(times: str | None) -> Spread:
    """Of [device, bucket, count] in JSON."""
    by_device: dict[str, dict[int, int]] = {}
    for device, place, n in msgspec.json.decode(times or "[]", type=list[tuple[str, int, int]]):
        by_device.setdefault(device, {})[place] = n
    return spread(by_device.values())


def _sums(n: str, x: str) -> str:
    """The sums that an `Arm` is made of, as an array, over rows of devices."""
    parts = ["1", n, x, f"{n} * {n}", f"{x} * {x}", f"{n} * {x}"]
    return (
        f"ARRAY[{', '.join(f'coalesce(sum(({part})::float8) FILTER (WHERE {n} > 0), 0)' for part in parts)}]"
    )


# A path's outcome: good, bad (also what was carried out in a dry run), second (duplicate), none (no answer in
# time), open (not due yet).
_OUTCOME = """CASE
    WHEN {p}.command IS NULL THEN NULL
    WHEN {p}.ended_at IS NULL AND c.due > $now THEN 'open'
    WHEN {p}.ended_at IS NULL OR {p}.ended_at > c.due OR {p}.status IN ('expired', 'unreachable') THEN 'none'
    WHEN {p}.status = 'would-execute' OR ({p}.status = 'succeeded' AND {p}.mode = 'execute') THEN 'good'
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
    SELECT c.id, c.device, c.name, c.created_at,
        least(c.expires_at, c.created_at + make_interval(secs => $5)) AS due
    FROM d JOIN command c ON c.device = d.device AND c.id >= $3::uuid AND c.created_at >= d.since
    WHERE c.name <> $4),
x AS (
    SELECT c.id, c.device, c.name, c.created_at, n.mode AS new_mode, o.mode AS old_mode,
        n.status AS new_status, o.status AS old_status,
        {_outcome("n", "$6")} AS new, {_outcome("o", "$6")} AS old,
        {_LATENCY.format(p="n")} AS new_latency, {_LATENCY.format(p="o")} AS old_latency,
        (n.status = 'succeeded' OR n.detail->'late'->>'status' = 'succeeded')
            AND (o.status = 'succeeded' OR o.detail->'late'->>'status' = 'succeeded') AS twice
    FROM c LEFT JOIN command_path n ON n.command = c.id AND n.path = 'new'
           LEFT JOIN command_path o ON o.command = c.id AND o.path = 'old'),
y AS MATERIALIZED (
    SELECT x.*,
        CASE
            WHEN new IS NULL OR new = 'open' OR old = 'open' THEN NULL
            WHEN old IS NULL THEN new IN ('good', 'bad')
            WHEN old = 'none' AND new = 'none' THEN NULL
            WHEN new_mode = 'dry-run' OR old_mode = 'dry-run' THEN old = new AND old IN ('good', 'bad')
            ELSE (old IN ('good', 'bad') AND new = 'second') OR (new IN ('good', 'bad') AND old = 'second')
        END AS agreed
    FROM x),
z AS (
    SELECT * FROM y WHERE created_at <
        coalesce((SELECT min(created_at) FROM y WHERE new = 'open' OR old = 'open'), 'infinity')),
s AS (
    SELECT device, count(*) FILTER (WHERE agreed IS NOT NULL) AS jn, count(*) FILTER (WHERE NOT agreed) AS jx,
        count(*) FILTER (WHERE new IN ('good', 'bad', 'none')) AS sn,
        count(*) FILTER (WHERE new IN ('bad', 'none')) AS sx,
        count(*) FILTER (WHERE old IN ('good', 'bad', 'none')) AS own,
        count(*) FILTER (WHERE old IN ('bad', 'none')) AS ox
    FROM z GROUP BY device)
SELECT count(*) FILTER (WHERE new IS NOT NULL) AS total,
    count(*) FILTER (WHERE new = 'open' OR old = 'open') AS pending,
    count(*) FILTER (WHERE twice) AS twice,
    (SELECT {_sums("jn", "jx")} FROM s) AS j_sums,
    (SELECT {_sums("sn", "sx")} FROM s) AS s_sums,
    (SELECT {_sums("own", "ox")} FROM s) AS o_sums,
    (SELECT json_agg(json_build_array(device, bucket, n)) FROM (
        SELECT device, width_bucket(new_latency, $8::float8[]) AS bucket, count(*) AS n
        FROM z WHERE new IS NOT NULL AND device = ANY($9::text[]) GROUP BY 1, 2) h)::text AS new_times,
    (SELECT json_agg(json_build_array(device, bucket, n)) FROM (
        SELECT device, width_bucket(old_latency, $8::float8[]) AS bucket, count(*) AS n
        FROM z WHERE old IS NOT NULL AND device = ANY($9::text[]) GROUP BY 1, 2) h)::text AS old_times,
    (SELECT json_agg(json_build_object('command', id, 'device', device, 'name', name, 'old', old_status,
        'new', new_status))
        FROM (SELECT * FROM y WHERE NOT agreed ORDER BY id DESC LIMIT $7) e)::text AS examples,
    (SELECT json_agg(json_build_object('command', id, 'device', device, 'name', name))
        FROM (SELECT * FROM y WHERE twice ORDER BY id LIMIT $7) e)::text AS twice_examples
FROM y
"""

# The same of devices that are not moved, each by the path that serves it; what was made before $7.
_OTHERS_SQL = f"""
WITH d AS (SELECT * FROM unnest($1::text[], $2::text[]) d(device, path)),
c AS (
    SELECT c.id, c.device, d.path, c.created_at,
        least(c.expires_at, c.created_at + make_interval(secs => $5)) AS due
    FROM d JOIN command c ON c.device = d.device AND c.id >= $3::uuid AND c.created_at < $7
    WHERE c.name <> $4),
y AS MATERIALIZED (
    SELECT c.device, c.created_at, {_outcome("o", "$6")} AS old, {_LATENCY.format(p="o")} AS latency
    FROM c JOIN command_path o ON o.command = c.id AND o.path = c.path),
z AS (
    SELECT * FROM y
    WHERE created_at < coalesce((SELECT min(created_at) FROM y WHERE old = 'open'), 'infinity')),
s AS (
    SELECT device, count(*) FILTER (WHERE old IN ('good', 'bad', 'none')) AS own,
        count(*) FILTER (WHERE old IN ('bad', 'none')) AS ox
    FROM z GROUP BY device)
SELECT (SELECT {_sums("own", "ox")} FROM s) AS o_sums,
    (SELECT json_agg(json_build_array(device, bucket, n)) FROM (
        SELECT device, width_bucket(latency, $8::float8[]) AS bucket, count(*) AS n
        FROM z GROUP BY 1, 2) h)::text AS times
"""
