"""The fence's parts in a database, as SQL. `tag` tells the fences of several moves apart.

Every body names what it uses by its schema, and sets a search path of its own: it runs in whatever session
writes, with an empty search path too, as the fence's owner and not as the writer.
"""

from typing import Final

from fleetlift.core.tenant.fence import FROZEN, MOVED, NOT_OPEN, REFUSED, SEALED, Side
from fleetlift.core.tenant.schema import TableName, quoted
from fleetlift.tenant.names import FENCE_SCHEMA

SEQUENCES: Final = ("until", "span", "drained", "armed", "entered", "refused", "late", "frozen", "unmet")
"""`until`: closed until (Unix ms). `span`: for how long (ms). `drained`: 1 once nothing from before is under
way. `armed`: snapshots that began before this transaction id may not know the tenant's rows. `entered`: rows
that have become the tenant's. `refused`, `late`, `unmet`: writes turned away while closing, once sealed, and
of frozen features. `frozen`: features are frozen until (Unix ms)."""

SCHEMA: Final = f"""
CREATE SCHEMA IF NOT EXISTS {FENCE_SCHEMA};
REVOKE ALL ON SCHEMA {FENCE_SCHEMA} FROM PUBLIC;
CREATE TABLE IF NOT EXISTS {FENCE_SCHEMA}.move (
    tag text PRIMARY KEY, move text NOT NULL, side text NOT NULL, installed_at timestamptz);
REVOKE ALL ON {FENCE_SCHEMA}.move FROM PUBLIC;
"""

NOW_MS: Final = "(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint"


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def sequence(name: str, tag: str) -> str:
    return f"{FENCE_SCHEMA}.{name}_{tag}"


def read(name: str, tag: str) -> str:
    """The sequence's value; read from its page, so the newest under every isolation level."""
    return f"pg_catalog.pg_sequence_last_value('{sequence(name, tag)}'::pg_catalog.regclass)"


def put(name: str, tag: str, value: str) -> str:
    return f"pg_catalog.setval('{sequence(name, tag)}'::pg_catalog.regclass, {value}, true)"


def count(name: str, tag: str) -> str:
    """Counts outside of the transaction: what is raised next does not undo it."""
    return f"PERFORM pg_catalog.nextval('{sequence(name, tag)}'::pg_catalog.regclass);"


def _passes(token_hash: str) -> str:
    return f"""
  p := pg_catalog.current_setting('fleetlift_fence.pass', true);
  IF p <> '' AND '{token_hash}' =
    pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(p, 'UTF8')), 'hex') THEN
    RETURN NULL;
  END IF;"""


def _holds(key: int) -> str:
    high, low = (key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF
    return f"""EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND granted
      AND pid = pg_catalog.pg_backend_pid() AND objsubid = 1
      AND classid = '{high}'::pg_catalog.oid AND objid = '{low}'::pg_catalog.oid)"""


def _refuse(tag: str, side: Side, move: str, new_place: str) -> str:
    place = new_place or "the new place"
    if side is Side.SOURCE:
        moved = f"tenant {move} has moved: its rows are no longer written here"
        hint = f"Write to {place}. Nothing of this transaction was kept."
        sealed = MOVED
    else:
        moved = f"tenant {move} is not served here: this database is not open for writes"
        hint = "Write where the tenant is served; this database opens at the cutover. Nothing was kept."
        sealed = NOT_OPEN
    return f"""
    IF v = {SEALED} THEN
      {count("late", tag)}
      RAISE EXCEPTION USING ERRCODE = '{sealed}', MESSAGE = {literal(moved)},
        DETAIL = pg_catalog.format('%s on %I.%I', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME),
        HINT = {literal(hint)}, SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;
    END IF;
    {count("refused", tag)}
    RAISE EXCEPTION USING ERRCODE = '{REFUSED}',
      MESSAGE = {literal(f"tenant {move} is being moved: its rows cannot be written now")},
      DETAIL = pg_catalog.format('%s on %I.%I; writes are refused until %s at the latest', TG_OP,
        TG_TABLE_SCHEMA, TG_TABLE_NAME, pg_catalog.to_char(
        pg_catalog.to_timestamp(v / 1000.0) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')),
      HINT = {literal(f"Try again in a second: here, or at {place} once it has moved. Nothing was kept.")},
      SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;"""


def _guard(tag: str, key: int, side: Side, move: str, new_place: str, token_hash: str) -> str:
    """What happens to a write of the tenant's rows.

    The order matters: the lock first, then the number, so that a writer either is waited for by the mover or
    sees that the fence has closed. Nobody queues for the lock (the mover only ever *tries* it), so writers
    never wait for one another here.
    """
    return f"""{_passes(token_hash)}
  LOOP
    v := {read("until", tag)};
    IF v = 0 THEN
      PERFORM pg_catalog.pg_advisory_xact_lock_shared({key});
      v := {read("until", tag)};
      IF v = 0 OR (v <> {SEALED} AND {read("drained", tag)} = 0) THEN
        IF entering THEN {count("entered", tag)} END IF;
        RETURN NULL;
      END IF;
    ELSIF v <> {SEALED} THEN
      clock := {NOW_MS};
      IF clock >= v OR clock < v - {read("span", tag)} THEN
        -- Its time is over and the mover has not sealed it: whoever comes first opens it for all.
        PERFORM pg_catalog.pg_advisory_xact_lock_shared({key});
        IF {read("until", tag)} = v THEN PERFORM {put("until", tag, "0")}; END IF;
        CONTINUE;
      END IF;
      IF {read("drained", tag)} = 0 AND {_holds(key)} THEN
        -- It was let in before the fence closed; the mover waits for its end.
        IF entering THEN {count("entered", tag)} END IF;
        RETURN NULL;
      END IF;
    END IF;
    {_refuse(tag, side, move, new_place)}
  END LOOP;"""


def _trigger_function(name: str, declare: str, body: str, settings: str) -> str:
    return f"""
CREATE OR REPLACE FUNCTION {FENCE_SCHEMA}.{name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
{settings} AS $fleetlift$
DECLARE
  v bigint; clock bigint; p text; {declare}
BEGIN{body}
END $fleetlift$;
REVOKE ALL ON FUNCTION {FENCE_SCHEMA}.{name}() FROM PUBLIC;"""


def guard_function(tag: str, key: int, side: Side, move: str, new_place: str, token_hash: str) -> str:
    """For rows that a trigger's own WHEN has found to be the tenant's, and for whole statements."""
    return _trigger_function(
        f"guard_{tag}",
        "entering boolean := TG_NARGS > 0;",
        _guard(tag, key, side, move, new_place, token_hash),
        "SET search_path = pg_catalog, pg_temp",
    )


def look_function(
    name: str,
    tag: str,
    key: int,
    move: str,
    new_place: str,
    token_hash: str,
    *,
    new: str,
    old: str,
    decides: tuple[str, ...],
    inserts_enter: bool,
    search_path: str,
) -> str:
    """For a table whose rows are known to be the tenant's by looking at other tables.

    `decides`: the columns that `new` and `old` read; when none has changed, one look is enough. A transaction
    whose snapshot is older than the fence's closing may not see that a row has become the tenant's: it gets a
    serialization failure, which it must expect anyway, and sees it when it tries again.
    """
    same = " AND ".join(f"OLD.{quoted(c)} IS NOT DISTINCT FROM NEW.{quoted(c)}" for c in decides) or "false"
    body = f"""
  IF TG_OP = 'INSERT' THEN
    mine := {new};
    entering := {"mine" if inserts_enter else "false"};
  ELSIF TG_OP = 'DELETE' THEN
    mine := {old};
  ELSE
    mine := {old};
    IF mine IS NOT TRUE AND NOT ({same}) THEN
      mine := {new};
      entering := mine;
    END IF;
  END IF;
  IF mine IS NOT TRUE THEN
    v := {read("until", tag)};
    IF v <> 0 AND pg_catalog.current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
      AND (v = {SEALED} OR v > {NOW_MS})
      AND pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint
        <= {read("armed", tag)} THEN
      RAISE EXCEPTION USING ERRCODE = '40001',
        MESSAGE = 'could not serialize access: this transaction began before a tenant''s rows were fenced',
        HINT = 'The transaction might succeed if it is tried again.';
    END IF;
    RETURN NULL;
  END IF;{_guard(tag, key, Side.SOURCE, move, new_place, token_hash)}"""
    return _trigger_function(
        name,
        "mine boolean; entering boolean := false;",
        body,
        f"SET search_path = {search_path} SET row_security = off",
    )


def freeze_function(
    name: str, tag: str, move: str, token_hash: str, *, new: str, old: str, search_path: str
) -> str:
    """Refuses what a plan freezes of a table, for the tenant's rows, until the moment in `frozen`."""
    body = f"""
  clock := {NOW_MS};
  v := {read("frozen", tag)};
  IF clock >= v THEN RETURN NULL; END IF;{_passes(token_hash)}
  IF TG_OP = 'INSERT' THEN mine := {new};
  ELSE mine := {old};
  END IF;
  IF mine IS NOT TRUE THEN RETURN NULL; END IF;
  {count("unmet", tag)}
  RAISE EXCEPTION USING ERRCODE = '{FROZEN}',
    MESSAGE = pg_catalog.format({literal(f"tenant {move} is being moved: %s on %I.%I is suspended")},
      TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME),
    DETAIL = pg_catalog.format('suspended until %s at the latest', pg_catalog.to_char(
      pg_catalog.to_timestamp(v / 1000.0) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')),
    HINT = 'Try again after the move. Nothing was kept.', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;"""
    return _trigger_function(
        name, "mine boolean;", body, f"SET search_path = {search_path} SET row_security = off"
    )


def control_functions(tag: str, key: int) -> str:
    """What the mover calls. Each is one statement for it, so that a mover that stops holds no lock."""

    def function(name: str, arguments: str, returns: str, body: str) -> str:
        return f"""
CREATE OR REPLACE FUNCTION {FENCE_SCHEMA}.{name}_{tag}({arguments}) RETURNS {returns} LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $fleetlift$
DECLARE v bigint; clock bigint;
BEGIN
  -- One at a time: a mover that was thought dead does not seal what another one has opened.
  PERFORM pg_advisory_xact_lock({key ^ 2});
  v := {read("until", tag)};
  clock := {NOW_MS};
{body}
END $fleetlift$;
REVOKE ALL ON FUNCTION {FENCE_SCHEMA}.{name}_{tag} FROM PUBLIC;"""

    snapshot = put("armed", tag, "pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    return (
        function(
            "arm",
            "for_ms bigint",
            "bigint",
            f"""
  IF v = {SEALED} OR (v > clock AND v - {read("span", tag)} <= clock) THEN RETURN -1; END IF;
  PERFORM {put("drained", tag, "0")};
  PERFORM {snapshot};
  PERFORM {put("span", tag, "for_ms")};
  PERFORM {put("until", tag, "clock + for_ms")};
  RETURN clock + for_ms;""",
        )
        + function(
            "drain",
            "expected bigint",
            "integer",
            f"""
  IF v <> expected THEN RETURN -1; END IF;
  IF NOT pg_try_advisory_xact_lock({key}) THEN RETURN 0; END IF;
  IF {read("until", tag)} <> expected THEN RETURN -1; END IF;
  PERFORM {put("drained", tag, "1")};
  PERFORM {snapshot};
  RETURN 1;""",
        )
        + function(
            "seal",
            "expected bigint",
            "integer",
            f"""
  IF v = {SEALED} THEN RETURN 1; END IF;
  IF v <> expected OR {read("drained", tag)} <> 1 THEN RETURN -1; END IF;
  IF NOT pg_try_advisory_xact_lock({key}) THEN RETURN 0; END IF;
  clock := {NOW_MS};
  -- Under the lock: whoever was let through because its time was over has set it to 0 before.
  IF {read("until", tag)} <> expected OR clock >= expected OR clock < expected - {read("span", tag)} THEN
    RETURN -1;
  END IF;
  PERFORM {put("until", tag, str(SEALED))};
  RETURN 1;""",
        )
        + function(
            "thaw",
            "",
            "integer",
            f"""
  IF v = 0 THEN RETURN 1; END IF;
  IF v = {SEALED} THEN RETURN -1; END IF;
  PERFORM {put("until", tag, "0")};
  RETURN 1;""",
        )
        + function(
            "shut",
            "",
            "integer",
            f"""
  PERFORM {put("drained", tag, "1")};
  PERFORM {snapshot};
  PERFORM {put("until", tag, str(SEALED))};
  RETURN 1;""",
        )
        + function(
            "unseal",
            "",
            "integer",
            f"""
  IF v <> {SEALED} AND v <> 0 THEN RETURN -1; END IF;
  PERFORM {put("until", tag, "0")};
  RETURN 1;""",
        )
    )


def states(tag: str) -> str:
    """One row: all numbers of the fence, and the database's clock."""
    numbers = ", ".join(f"{read(name, tag)} AS {name}" for name in SEQUENCES)
    return f"SELECT {numbers}, {NOW_MS} AS clock"


_LOCKS: Final = """
WITH locks AS MATERIALIZED (SELECT * FROM pg_locks WHERE granted)
SELECT DISTINCT l.virtualtransaction AS id, coalesce(l.pid, 0) AS pid,
    coalesce(a.application_name, '') AS application, coalesce(a.usename, x.owner, '') AS usename,
    extract(epoch FROM clock_timestamp()
        - coalesce(a.xact_start, x.prepared, clock_timestamp()))::float8 AS age_s,
    coalesce(a.query, x.gid, '') AS query, coalesce(a.xact_start, x.prepared) AS began
FROM locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
-- A prepared transaction has no process: its own id is the one it has locked.
LEFT JOIN locks t ON l.pid IS NULL AND t.pid IS NULL AND t.virtualtransaction = l.virtualtransaction
    AND t.locktype = 'transactionid' AND t.mode = 'ExclusiveLock'
LEFT JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
WHERE l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.pid IS DISTINCT FROM pg_backend_pid()
"""

HOLDERS: Final = f"""{_LOCKS} AND l.locktype = 'advisory' AND l.objsubid = 1
    AND l.classid = $1::oid AND l.objid = $2::oid
ORDER BY age_s DESC
"""

WRITING: Final = f"""{_LOCKS} AND l.locktype = 'relation' AND l.relation = ANY($1::oid[])
    AND l.mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
ORDER BY age_s DESC
"""
"""Transactions that have written, or may have, to tables of a list; they hold such a lock until they end."""

RELATIONS: Final = """
WITH RECURSIVE part AS (
    SELECT $1::text::regclass::oid AS oid
    UNION SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
) SELECT c.oid, c.oid::regclass::text AS name, c.relkind::text AS kind FROM part JOIN pg_class c USING (oid)
"""

TRIGGERS: Final = """
SELECT t.tgname::text AS name, t.tgrelid AS oid, t.tgrelid::regclass::text AS relation,
    t.tgenabled::text AS enabled, t.tgparentid <> 0 AS inherited
FROM pg_trigger t WHERE NOT t.tgisinternal AND t.tgname LIKE $1
"""

LOOSE: Final = """
SELECT c.conname::text AS name, n.nspname || '.' || r.relname AS child FROM pg_constraint c
JOIN pg_class r ON r.oid = c.conrelid JOIN pg_namespace n ON n.oid = r.relnamespace
WHERE c.contype = 'f' AND (c.condeferrable OR NOT coalesce((to_jsonb(c) ->> 'conenforced')::boolean, true))
"""
"""Foreign keys that do not keep a child from being written before its parent."""

TYPE_SCHEMAS: Final = """
SELECT DISTINCT n.nspname::text AS name FROM pg_attribute a
JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_type b ON b.oid = t.typbasetype
JOIN pg_namespace n ON n.oid = coalesce(b.typnamespace, t.typnamespace)
WHERE a.attrelid = ANY($1::oid[]) AND a.attname = ANY($2::text[]) AND a.attnum > 0 AND NOT a.attisdropped
    AND n.nspname NOT IN ('pg_catalog', 'information_schema')
ORDER BY 1
"""
"""Where types live whose operators are not PostgreSQL's own (citext, say): a condition must find them."""


def relation_text(table: TableName) -> str:
    schema, _, name = table.partition(".")
    return f"{quoted(schema)}.{quoted(name)}"
